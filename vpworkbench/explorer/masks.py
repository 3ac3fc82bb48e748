"""View 1: what a visual token depends on, and what hiding it with those tokens leaves to guess (paper Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import ipywidgets
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpworkbench.data.objects import objects_of_pictures
from vpworkbench.explorer.parts import WIDTH, Later, Note, column, heads_of, row, shown_image, unheard
from vpworkbench.explorer.readings import Reading, same_boxes
from vpworkbench.explorer.widgets import Panels, Table
from vpworkbench.losses import visual_mask
from vpworkbench.probes import mask_on_object, objects_of_boxes, random_on_object

Select = Literal["row", "column", "symmetric"]
KINDS = ["plain", "shade", "mask", "mask"]
CAPTIONS = ["the image", "attention of the token", "attention mask", "random mask"]
ERRORS = ["error behind the attention mask", "error behind the random mask"]


class MasksView:
    """The image with its tokens; one pick, its row of the parsing attention, the mask that follows, a random one.

    Attributes
    ----------
    widget : ipywidgets.Widget
    panels, errors : list of Panels
        One for each model of this package; attention is left out where there is no parsing attention.
    numbers : Table
        What each mask leaves.
    """

    title = "Masks"

    def __init__(self, readings: Sequence[Reading]) -> None:
        self.pick, self._draw, self._later = -1, 0, Later()
        self.changed = unheard
        self.k = ipywidgets.IntSlider(
            2, 1, 2, description="k hidden", style={"description_width": "initial"}, layout={"width": "220px"}
        )
        self.select = ipywidgets.ToggleButtons(
            options=["row", "column", "symmetric"],
            tooltips=["what the pick attends to", "what attends to the pick", "both"],
            style={"button_width": "90px"},
        )
        self.head = ipywidgets.Dropdown(options=heads_of(0), layout={"width": "125px"})
        self.again = ipywidgets.Button(
            description="draw again", tooltip="another random mask", layout={"width": "100px"}
        )
        self.note, self.numbers = Note(), Table(label="What each mask leaves", width=WIDTH)
        self.panels: list[Panels] = []
        self.values: list[NDArray[np.float32]] = []  # of the panels of each model
        self.errors: list[Panels] = []
        self.widget = column()
        for control in (self.k, self.select, self.head):
            control.observe(lambda change: self._redraw(), "value")
        self.again.on_click(lambda button: self._draw_again())
        self.show(readings)

    def show(self, readings: Sequence[Reading]) -> None:
        """Look at new readings: another image, another text, or another model."""
        self._later.cancel()
        self.readings = [reading for reading in readings if reading.subject.base is not None]
        self._parsed = [_parsed(reading) for reading in self.readings]
        told = []
        if self.readings and not same_boxes(self.readings):  # one pick cannot fit both
            told = [f"{one.subject.name} cuts the image otherwise; only the first is shown here."
                    for one in self.readings[1:]]  # fmt: skip
            self.readings, self._parsed = self.readings[:1], self._parsed[:1]
        without = [reading.subject.name for reading in readings if reading.subject.base is None]
        without += [one.subject.name for one, (parsing, _) in zip(self.readings, self._parsed, strict=True)
                    if parsing is None]  # fmt: skip
        if without:
            told.append(f"No mask by attention for {', '.join(without)}: only the Swin parser has a parsing attention"
                        + ("; random masks are drawn." if self.readings else "."))  # fmt: skip
        self.note.say(*(told or ["Click a token; arrow keys and Enter do the same."]))
        if not self.readings:
            self._drop_panels()
            self.values = []
            self.widget.children = (self.note,)
            return
        tokens = len(self.readings[0].boxes)
        self._objects = _objects(self.readings[0])
        self._shown = [range(4) if parsing is not None else (0, 3) for parsing, _ in self._parsed]
        heads = max((0 if parsing is None else len(parsing) for parsing, _ in self._parsed), default=0)
        with self._quiet():
            if self.k.max != tokens:
                self.k.max, self.k.value = tokens, max(2, round(0.15 * tokens))
            self.head.options, self.head.value = heads_of(heads), -1
            for control in (self.select, self.head):
                control.layout.display = None if heads else "none"
        if not 0 <= self.pick < tokens:
            on = np.flatnonzero(self._objects[0].numpy())
            self.pick = int(on[0]) if len(on) else tokens // 2
        self._build()
        self._redraw(images=True)

    def set(self, token: int | None = None, *, k: int | None = None, select: Select | None = None,
            head: int | None = None, draw: int | None = None) -> None:  # fmt: skip
        """Pick a token, and choose what is hidden with it; what is not given stays.

        Raises
        ------
        ValueError
            For a token, k, head or way of choosing that is not there.
        """
        tokens = len(self.readings[0].boxes) if self.readings else 0
        for name, value, stop in (("token", token, tokens), ("k", None if k is None else k - 1, tokens),
                                  ("head", head, len(self.head.options) - 1)):  # fmt: skip
            if value is not None and not 0 <= value < stop:
                raise ValueError(f"{name}: {value + (name == 'k')} is not there; {stop} are")
        if select not in (None, *self.select.options):
            raise ValueError(f"select: {select!r} is none of {', '.join(self.select.options)}")
        with self._quiet():
            self.pick = self.pick if token is None else token
            self.k.value = self.k.value if k is None else k
            self.select.value = select or self.select.value
            self.head.value = -1 if head is None else head
            self._draw = self._draw if draw is None else draw
        self._redraw()

    def code(self) -> str:
        """The call that recreates the view."""
        if not self.readings:
            return ""
        head = None if self.head.value < 0 else self.head.value
        return (f"view.pick({self.pick}, k={self.k.value}, select={self.select.value!r}, head={head}, "
                f"draw={self._draw})")  # fmt: skip

    def tables(self) -> dict[str, pd.DataFrame]:
        """The numbers of what is seen, one row for each visual token and model."""
        parts = []
        for reading, values in zip(self.readings, self.values, strict=True):
            told = pd.DataFrame(values[1:].T, columns=["attention", "attention_mask", "random_mask"])
            for name, error in zip(("attention_error", "random_error"), self.errors_of(reading), strict=True):
                told[name] = error
            told.insert(0, "token", range(len(told)))
            told.insert(0, "model", reading.subject.name)
            parts.append(told)
        return {"masks": pd.concat(parts, ignore_index=True)} if parts else {}

    def settle(self) -> None:
        """Do at once what waits for the hand to rest."""
        self._later.cancel()
        if self.readings:
            self._reconstruct(images=True)

    def close(self) -> None:
        self._later.cancel()
        self._drop_panels()
        self.readings, self._parsed, self.values = [], [], []

    # ------------------------------------------------------------------------------------------------ drawing

    def _build(self) -> None:
        if [len(panel.kinds) for panel in self.panels] != [len(shown) for shown in self._shown]:
            self._drop_panels()
            empty = {"image": b"", "boxes": np.zeros((0, 4))}
            for shown in self._shown:
                kinds, captions = [KINDS[place] for place in shown], [CAPTIONS[place] for place in shown]
                wide = WIDTH if len(shown) > 2 else WIDTH // 2
                self.panels.append(Panels(
                    width=wide, kinds=kinds, captions=captions, values=np.zeros((len(shown), 0)), **empty
                ))  # fmt: skip
                masks = ERRORS[2 - len(shown) // 2 :]
                self.errors.append(Panels(
                    width=WIDTH // 4 * len(masks), kinds=["shade"] * len(masks), captions=masks,
                    values=np.zeros((len(masks), 0)), **empty,
                ))  # fmt: skip
            for panel in [*self.panels, *self.errors]:
                panel.observe(self._picked, "picked")
        controls = row(self.k, self.select, self.head, self.again)
        self.widget.children = (self.note, controls, *self.panels, self.numbers, *self.errors)

    def _drop_panels(self) -> None:
        for panel in [*self.panels, *self.errors]:
            panel.close()
        self.panels, self.errors = [], []

    def _picked(self, change: dict[str, Any]) -> None:
        if change["new"] < 0:
            change["owner"].picked = self.pick  # Escape: something is always picked
        elif change["new"] != self.pick:
            self.pick = change["new"]
            self._redraw()

    def _draw_again(self) -> None:
        self._draw += 1
        self._redraw()

    def _quiet(self) -> Any:
        """In the block, controls that change redraw nothing."""
        view = self

        class Quiet:
            def __enter__(self) -> None:
                view._is_quiet = True

            def __exit__(self, *error: object) -> None:
                view._is_quiet = False

        return Quiet()

    _is_quiet = False

    def _redraw(self, *, images: bool = False) -> None:
        """Send the page its slice; errors of reconstruction follow when the hand rests."""
        if self._is_quiet or not self.readings:
            return
        self.values = [self._panel_values(parsing) for parsing, _ in self._parsed]
        for reading, panel, values, shown in zip(self.readings, self.panels, self.values, self._shown, strict=True):
            more = (
                {"image": shown_image(reading.image), "boxes": reading.boxes, "on_grid": reading.on_grid}
                if images
                else {}
            )
            panel.update(values=values[list(shown)], picked=self.pick, label=f"{reading.subject.name}: masks",
                         alt=self._alt(values), **more)  # fmt: skip
        self._tell()
        self.changed()
        self._later(lambda: self._reconstruct(images=images))

    def _panel_values(self, parsing: Tensor | None) -> NDArray[np.float32]:
        """(panel, token): grid, attention of the pick, both masks."""
        tokens = len(self.readings[0].boxes)
        noise = torch.rand(1, tokens, generator=torch.Generator().manual_seed(self._draw))
        noise[0, self.pick] = 2
        values = torch.zeros(4, tokens)
        if parsing is not None:
            one = parsing.mean(dim=0) if self.head.value < 0 else parsing[self.head.value]
            values[1] = {"row": one[self.pick], "column": one[:, self.pick],
                         "symmetric": one[self.pick] + one[:, self.pick]}[self.select.value]  # fmt: skip
            values[2] = visual_mask(noise, self.k.value, parsing=one[None], select=self.select.value)[0]
        values[3] = visual_mask(noise, self.k.value)[0]
        return values.numpy()

    def _alt(self, values: NDArray[np.float32]) -> str:
        return (f"Token {self.pick} is picked; {int(values[2].sum())} tokens are hidden by attention and "
                f"{int(values[3].sum())} at random.")  # fmt: skip

    def _tell(self, errors: Sequence[Sequence[float]] = ()) -> None:
        told = self._summary(errors)
        self.numbers.update(names=list(told.columns), rows=told.to_numpy().tolist())

    def _summary(self, errors: Sequence[Sequence[float]]) -> pd.DataFrame:
        """What each mask leaves, as it is told; `errors`: the mean of each mask for each model, () while they come."""
        pick, known = torch.tensor([self.pick]), bool(self._objects.any())
        rows = []
        for number, (reading, values) in enumerate(zip(self.readings, self.values, strict=True)):
            for place, name in enumerate(("attention", "random")):
                mask = torch.from_numpy(values[2 + place]).bool()[None]
                if not mask.any():
                    continue  # no parsing attention
                share = _share(mask_on_object(mask, pick, self._objects).item())
                if name == "random" and known and share != "background":
                    share += f", {_share(random_on_object(mask, pick, self._objects).item())} expected"
                error = errors[number][place] if errors else None
                told = "…" if error is None else "–" if np.isnan(error) else f"{error:.3f}"
                rows.append([reading.subject.name, name, *([share] if known else []), told])
        names = ["model", "mask", *(["on the picked object"] if known else []), "squared error per hidden token"]
        return pd.DataFrame(rows, columns=names)

    def _reconstruct(self, *, images: bool = False) -> None:
        found = [self.errors_of(reading) for reading in self.readings]
        for reading, panel, errors in zip(self.readings, self.errors, found, strict=True):
            more = (
                {"image": shown_image(reading.image), "boxes": reading.boxes, "on_grid": reading.on_grid}
                if images or not panel.image
                else {}
            )
            shown = np.nan_to_num(errors)[-len(panel.kinds) :]
            panel.update(values=shown, picked=self.pick, label=f"{reading.subject.name}: error of hidden tokens",
                         alt="Bright where the features of a hidden token are guessed badly.", **more)  # fmt: skip
        self._tell(_means(found))

    @torch.no_grad()
    def errors_of(self, reading: Reading) -> NDArray[np.float32]:
        """Squared error of MFR, mean over channels (paper Eq. 9), (mask, token); nan at tokens that are seen."""
        place = self.readings.index(reading)
        model, features = reading.subject.base, self._parsed[place][1]
        words = {name: reading.forward[name].expand(2, -1) for name in ("words", "word_tokens")}
        both = features.for_texts(torch.zeros(2, dtype=torch.long, device=model.device))
        seen = reading.vision - words["words"].shape[1]  # without the padding of regions
        masked = torch.zeros(both.features.shape[:2], dtype=torch.bool)
        masked[:, seen] = torch.from_numpy(self.values[place][2:]).bool()
        masked = masked.to(model.device)
        predicted = model.mfr(model.fuse(both, **words, masked=masked).vision)
        error = (predicted - both.features).square().mean(dim=-1)
        return error.masked_fill(~masked, torch.nan).cpu().numpy()[:, seen]


def _means(found: Sequence[NDArray[np.float32]]) -> list[list[float]]:
    """Over the hidden tokens, for each model and mask."""
    return [[float(np.nanmean(one)) if np.isfinite(one).any() else np.nan for one in errors] for errors in found]


def _share(share: float) -> str:
    return "background" if np.isnan(share) else f"{100 * share:.0f}%"


@torch.no_grad()
def _parsed(reading: Reading) -> tuple[Tensor | None, Any]:
    """Parsing attention (head, vision, vision), None where there is none, and the visual tokens."""
    visual = reading.subject.base.visual(reading.forward["images"])
    return (None if visual.parsing is None else visual.parsing[0].float().cpu()), visual


def _objects(reading: Reading) -> Tensor:
    """The object under each token, (1, vision); zeros where the picture has no object masks."""
    if reading.picture.scene is None:
        return torch.zeros(1, len(reading.boxes), dtype=torch.long)
    if reading.subject.base.settings.visual.kind.on_grid:
        return objects_of_pictures([reading.picture], reading.subject.base.settings.visual.grid)
    return objects_of_boxes(torch.from_numpy(reading.picture.object_map()), torch.from_numpy(reading.boxes))[None]
