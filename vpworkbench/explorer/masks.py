"""View 1: what a visual token depends on, and what can be guessed once those tokens are hidden (paper Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import ipywidgets
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpworkbench.data.objects import objects_of_pictures
from vpworkbench.explorer.parts import WIDTH, Delayed, StatusText, View, image_traits, row
from vpworkbench.explorer.readings import Reading, check_index, same_boxes
from vpworkbench.explorer.widgets import Panels, Table
from vpworkbench.losses import visual_mask
from vpworkbench.model.visual import VisualTokens
from vpworkbench.probes import objects_of_boxes

Select = Literal["row", "column", "symmetric"]
KINDS = ["plain", "shade", "mask", "mask"]
CAPTIONS = ["the image", "attention of the token", "attention mask", "random mask"]
ERRORS = ["error under the attention mask", "error under the random mask"]


class Parsed(NamedTuple):
    """Parsing attention (head, vision, vision), or None if the model has none, and the visual tokens."""

    attention: Tensor | None
    visual: VisualTokens


class MasksView(View):
    """The image with its tokens; one pick, its row of the parsing attention, the resulting mask, and a random mask.

    Attributes
    ----------
    panels, errors : list of Panels
        One for each model of this package; only the random mask if a model has no parsing attention.
    numbers : Table
        What each mask hides and leaves.
    values : list of array, shape (panel, token)
        Values in the panels of each model, including panels that are not shown.
    """

    title = "Masks"

    def __init__(self, readings: Sequence[Reading]) -> None:
        super().__init__()
        self.pick, self._draw, self._delayed = -1, 0, Delayed()
        self.k = ipywidgets.IntSlider(
            2, 1, 2, description="k hidden", style={"description_width": "initial"}, layout={"width": "300px"}
        )
        self.fit = ipywidgets.Button(
            description="k = its object", tooltip="a mask as large as the picked object", layout={"width": "115px"}
        )
        tooltips = ["what the pick attends to", "what attends to the pick", "both"]
        self.select = ipywidgets.ToggleButtons(
            options=["row", "column", "symmetric"], tooltips=tooltips, style={"button_width": "95px"}
        )
        self.head = ipywidgets.Dropdown(options=_head_options(0), layout={"width": "125px"})
        self.again = ipywidgets.Button(
            description="draw again", tooltip="another random mask", layout={"width": "100px"}
        )
        self.status, self.numbers = StatusText(), Table(label="What each mask hides and leaves", width=WIDTH)
        self.panels: list[Panels] = []
        self.errors: list[Panels] = []
        self.values: list[NDArray[np.float32]] = []
        for control in (self.k, self.select, self.head):
            control.observe(lambda change: self._redraw(), "value")
        self.fit.on_click(lambda button: self.k.set_trait("value", self._object_size))
        self.again.on_click(lambda button: self._draw_again())
        self.show(readings)

    def show(self, readings: Sequence[Reading]) -> None:
        self._delayed.cancel()
        self.readings = [reading for reading in readings if reading.subject.base is not None]
        self._parsed = [_parsed(reading) for reading in self.readings]
        lines = []
        if self.readings and not same_boxes(self.readings):  # one pick cannot fit both
            lines = [
                f"{other.subject.name} cuts the image into other tokens; only the first model is shown here."
                for other in self.readings[1:]
            ]
            self.readings, self._parsed = self.readings[:1], self._parsed[:1]
        lines += self._without_attention(readings)
        self.status.set(*(lines or ["Click a token, or use the arrow keys and Enter."]))
        if not self.readings:
            self._drop_panels()
            self.values = []
            self.widget.children = (self.status,)
            return
        self._objects = _objects(self.readings[0])
        self._fit_controls()
        self._build()
        self._redraw(images=True)

    def set(
        self,
        token: int | None = None,
        *,
        k: int | None = None,
        select: Select | None = None,
        head: int | None = None,
        draw: int | None = None,
    ) -> None:
        """Pick a token and choose what is hidden with it; what is not given stays, but no head means all heads."""
        tokens = len(self.readings[0].boxes) if self.readings else 0
        check_index("token", token, tokens)
        check_index("head", head, len(self.head.options) - 1)
        if k is not None and not 1 <= k <= tokens:
            raise ValueError(f"k: cannot hide {k} tokens; there are {tokens}")
        if select not in (None, *self.select.options):
            raise ValueError(f"select: {select!r} is none of {', '.join(self.select.options)}")
        with self.quiet():
            self.pick = self.pick if token is None else token
            self.k.value = self.k.value if k is None else k
            self.select.value = select or self.select.value
            self.head.value = -1 if head is None else head
            self._draw = self._draw if draw is None else draw
        self._redraw()

    def code(self) -> str:
        if not self.readings:
            return ""
        head = None if self.head.value < 0 else self.head.value
        select = self.select.value
        return f"view.pick({self.pick}, k={self.k.value}, select={select!r}, head={head}, draw={self._draw})"

    def tables(self) -> dict[str, pd.DataFrame]:
        """`masks`: one row for each model and visual token."""
        parts = []
        for reading, values in zip(self.readings, self.values, strict=True):
            table = pd.DataFrame(values[1:].T, columns=["attention", "attention_mask", "random_mask"])
            table["attention_error"], table["random_error"] = self.errors_of(reading)
            table.insert(0, "token", range(len(table)))
            table.insert(0, "model", reading.subject.name)
            parts.append(table)
        return {"masks": pd.concat(parts, ignore_index=True)} if parts else {}

    def settle(self) -> None:
        """Do delayed work at once."""
        self._delayed.cancel()
        if self.readings:
            self._reconstruct(images=True)

    def close(self) -> None:
        super().close()
        self._delayed.cancel()
        self._drop_panels()
        self._parsed, self.values = [], []

    # ------------------------------------------------------------------------------------------------ drawing

    def _without_attention(self, readings: Sequence[Reading]) -> list[str]:
        """The line that names the models without a parsing attention."""
        names = [reading.subject.name for reading in readings if reading.subject.base is None]
        pairs = zip(self.readings, self._parsed, strict=True)
        names += [reading.subject.name for reading, parsed in pairs if parsed.attention is None]
        if not names:
            return []
        random = "; random masks are drawn." if self.readings else "."
        return [f"No mask by attention for {', '.join(names)}: only the Swin parser has a parsing attention{random}"]

    def _fit_controls(self) -> None:
        """Set the controls to the tokens, heads and objects of new readings."""
        tokens = len(self.readings[0].boxes)
        heads = max((0 if one.attention is None else len(one.attention) for one in self._parsed), default=0)
        with self.quiet():
            if self.k.max != tokens:
                self.k.max, self.k.value = tokens, max(2, round(0.15 * tokens))
            self.head.options, self.head.value = _head_options(heads), -1
        for control in (self.select, self.head):
            control.layout.display = None if heads else "none"
        self.fit.layout.display = None if self._objects.any() else "none"
        if not 0 <= self.pick < tokens:
            on_objects = self._objects[0].nonzero()
            self.pick = int(on_objects[0]) if len(on_objects) else tokens // 2

    def _build(self) -> None:
        """Make the panels anew if the models have others."""
        self._shown = [range(4) if parsed.attention is not None else (0, 3) for parsed in self._parsed]
        if [len(panel.kinds) for panel in self.panels] != [len(shown) for shown in self._shown]:
            self._drop_panels()
            for shown in self._shown:
                kinds, captions = [KINDS[place] for place in shown], [CAPTIONS[place] for place in shown]
                masks = ERRORS[2 - len(shown) // 2 :]
                self.panels.append(_empty_panels(kinds, captions))
                self.errors.append(_empty_panels(["shade"] * len(masks), masks))
            for panel in [*self.panels, *self.errors]:
                panel.observe(self._token_picked, "picked")
        controls = row(self.k, self.fit, self.again), row(self.select, self.head)
        self.widget.children = (self.status, *controls, *self.panels, self.numbers, *self.errors)

    def _drop_panels(self) -> None:
        for panel in [*self.panels, *self.errors]:
            panel.close()
        self.panels, self.errors = [], []

    def _token_picked(self, change: dict[str, Any]) -> None:
        if change["new"] < 0:
            change["owner"].picked = self.pick  # Escape: something is always picked
        elif change["new"] != self.pick:
            self.pick = change["new"]
            self._redraw()

    def _draw_again(self) -> None:
        self._draw += 1
        self._redraw()

    def _redraw(self, *, images: bool = False) -> None:
        """Send the page its slice; the errors of reconstruction follow a moment later."""
        if self._is_quiet or not self.readings:
            return
        self.values = [self._values_of(parsed.attention) for parsed in self._parsed]
        for reading, panel, values, shown in zip(self.readings, self.panels, self.values, self._shown, strict=True):
            hidden = [int(mask.sum()) for mask in values[2:]]
            alt = f"Token {self.pick} is picked; {hidden[0]} tokens are hidden by attention and {hidden[1]} at random."
            traits = {"label": f"{reading.subject.name}: masks", "alt": alt} | (image_traits(reading) if images else {})
            panel.update(values=values[list(shown)], picked=self.pick, **traits)
        self.fit.disabled = self._object_size < 2
        self._show_numbers()
        self.changed()
        self._delayed(lambda: self._reconstruct(images=images))

    def _values_of(self, parsing: Tensor | None) -> NDArray[np.float32]:
        """(panel, token): zeros, attention of the pick, mask by attention, random mask."""
        tokens = len(self.readings[0].boxes)
        noise = torch.rand(1, tokens, generator=torch.Generator().manual_seed(self._draw))
        noise[0, self.pick] = 2
        values = torch.zeros(4, tokens)
        if parsing is not None:
            weights = parsing.mean(dim=0) if self.head.value < 0 else parsing[self.head.value]
            given, received = weights[self.pick], weights[:, self.pick]
            select = self.select.value
            values[1] = {"row": given, "column": received, "symmetric": given + received}[select]
            values[2] = visual_mask(noise, self.k.value, parsing=weights[None], select=select)[0]
        values[3] = visual_mask(noise, self.k.value)[0]
        return values.numpy()

    def _reconstruct(self, *, images: bool = False) -> None:
        errors = [self.errors_of(reading) for reading in self.readings]
        for reading, panel, found in zip(self.readings, self.errors, errors, strict=True):
            traits = image_traits(reading) if images or not panel.image else {}
            traits["label"] = f"{reading.subject.name}: error of hidden tokens"
            traits["alt"] = "Bright where the features of a hidden token are guessed badly."
            panel.update(values=np.nan_to_num(found)[-len(panel.kinds) :], picked=self.pick, **traits)
        self._show_numbers(errors)

    @torch.no_grad()
    def errors_of(self, reading: Reading) -> NDArray[np.float32]:
        """Squared error of MFR, mean over channels (paper Eq. 9), (mask, token); nan at tokens that are not hidden."""
        number = self.readings.index(reading)
        model, visual = reading.subject.base, self._parsed[number].visual
        words = {name: reading.forward[name].expand(2, -1) for name in ("words", "word_tokens")}
        both = visual.for_texts(torch.zeros(2, dtype=torch.long, device=model.device))
        places = reading.vision - words["words"].shape[1]  # without the padding of regions
        masked = torch.zeros(both.features.shape[:2], dtype=torch.bool)
        masked[:, places] = torch.from_numpy(self.values[number][2:]).bool()
        masked = masked.to(model.device)
        predicted = model.mfr(model.fuse(both, **words, masked=masked).vision)
        error = (predicted - both.features).square().mean(dim=-1)
        return error.masked_fill(~masked, torch.nan).cpu().numpy()[:, places]

    # ------------------------------------------------------------------------------------------------ numbers

    @property
    def _on_object(self) -> Tensor:
        """(vision,): True at the tokens of the picked object; all False if the pick is on background."""
        picked = self._objects[0, self.pick]
        return (self._objects[0] == picked) & (picked > 0)

    @property
    def _object_size(self) -> int:
        return int(self._on_object.sum())

    def _show_numbers(self, errors: Sequence[NDArray[np.float32]] = ()) -> None:
        """Fill the table; `errors` are those of `errors_of` for each model, empty while they are computed."""
        has_objects = bool(self._objects.any())
        rows = []
        for number, (reading, values) in enumerate(zip(self.readings, self.values, strict=True)):
            for place, name in enumerate(("attention", "random")):
                mask = torch.from_numpy(values[2 + place]).bool()
                if not mask.any():
                    continue  # no parsing attention
                shares = [self._share_on_object(mask, name == "random")] if has_objects else []
                error = _mean_text(errors[number][place]) if len(errors) else "…"
                rows.append([reading.subject.name, name, *shares, error])
        size = f" ({self._object_size} tokens)" if self._object_size else ""
        shares = [f"hidden beside the pick, on its object{size}"] if has_objects else []
        self.numbers.update(names=["model", "mask", *shares, "squared error per hidden token"], rows=rows)

    def _share_on_object(self, mask: Tensor, random: bool) -> str:
        """Share of the hidden tokens beside the pick that lie on the picked object; for random masks also expected."""
        others, size = int(mask.sum()) - 1, self._object_size
        if not size:
            return "the pick is on background"
        if not others:
            return "–"
        share = int((mask & self._on_object).sum() - 1) / others
        expected = (size - 1) / (len(mask) - 1)
        return f"{100 * share:.0f}%" + (f", {100 * expected:.0f}% expected" if random else "")


def _empty_panels(kinds: list[str], captions: list[str]) -> Panels:
    return Panels(width=WIDTH // 4 * len(kinds), kinds=kinds, captions=captions, values=np.zeros((len(kinds), 0)))


def _head_options(heads: int) -> list[tuple[str, int]]:
    """Options of a dropdown; -1 is the mean, because a dropdown shows None as no choice."""
    return [("mean of heads", -1), *((f"head {head + 1}", head) for head in range(heads))]


def _mean_text(errors: NDArray[np.float32]) -> str:
    """Mean over the hidden tokens."""
    return f"{np.nanmean(errors):.3f}" if np.isfinite(errors).any() else "–"


@torch.no_grad()
def _parsed(reading: Reading) -> Parsed:
    visual = reading.subject.base.visual(reading.forward["images"])
    return Parsed(None if visual.parsing is None else visual.parsing[0].float().cpu(), visual)


def _objects(reading: Reading) -> Tensor:
    """The object of each token, (1, vision); zeros if the picture has no object masks."""
    visual = reading.subject.base.settings.visual
    if reading.picture.scene is None:
        return torch.zeros(1, len(reading.boxes), dtype=torch.long)
    if visual.kind.on_grid:
        return objects_of_pictures([reading.picture], visual.grid)
    return objects_of_boxes(torch.from_numpy(reading.picture.object_map()), torch.from_numpy(reading.boxes))[None]
