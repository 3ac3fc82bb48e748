"""View 1: what a visual token depends on, and what can be guessed once those tokens are hidden (paper Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor

from vpworkbench.data.objects import boxed_objects, objects_of_pictures
from vpworkbench.errors import CheckpointError, SettingsError
from vpworkbench.explorer import still
from vpworkbench.explorer.page import Part, Section
from vpworkbench.explorer.parts import WIDTH, Delayed, StatusText, View, image_traits, row
from vpworkbench.explorer.readings import Reading, check_index
from vpworkbench.explorer.widgets import Panels, Table
from vpworkbench.guides import Source, open_source
from vpworkbench.losses import Select, scores_of_pick, visual_mask
from vpworkbench.model.visual import VisualTokens
from vpworkbench.probes.masks import mask_scores


class Rule(NamedTuple):
    """What the mask beside the random one hides with the pick: by a `mask.mode`, as a button and a panel say it."""

    mode: str
    tip: str
    look: str
    select: Select = "row"


RULES = {
    "row": Rule("attention", "attention: what the pick attends to", "attention of the token"),
    "column": Rule("attention", "attention: what attends to the pick", "attention of the token", "column"),
    "symmetric": Rule("attention", "attention: both", "attention of the token", "symmetric"),
    "similar": Rule("similar", "the nearest by features", "likeness to the token"),
    "block": Rule("block", "the nearest by position", "nearness to the token"),
    "object": Rule("object", "the true object, then the nearest", "its object, then nearness"),
}
KINDS = ["plain", "shade", "mask", "mask"]


@dataclass(eq=False)
class Ranking:
    """The visual tokens of one reading, and how each `mask.mode` ranks them for a pick.

    `given` are the scores of a `mask.source` by mode, (1, vision, vision), where the model was trained with one.
    """

    reading: Reading
    visual: VisualTokens
    given: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.reading.subject.name

    @property
    def heads(self) -> int:
        """Heads of the parsing attention to choose from."""
        return 0 if self.visual.parsing is None or "attention" in self.given else self.visual.parsing.shape[1]

    @property
    def has_attention(self) -> bool:
        return self.heads > 0 or "attention" in self.given

    @property
    def places(self) -> NDArray[np.int64]:
        """Places of the tokens among those of the visual side, which has padding behind regions."""
        return self.reading.vision - self.reading.inputs.forward["words"].shape[1]

    def scores(self, mode: str, head: int, objects: Tensor) -> Tensor | None:
        """(1, vision, vision), by one head of the parsing attention or by their mean (-1); None: no attention."""
        if mode in self.given:
            return self.given[mode]
        parsing = self.visual.parsing
        if parsing is not None:
            parsing = (parsing.mean(dim=1) if head < 0 else parsing[:, head]).float().cpu()
        features = self.visual.features[:, self.places].float().cpu()
        return mask_scores(mode, features, parsing, torch.from_numpy(self.reading.boxes)[None], objects[None])

    @torch.no_grad()
    def errors(self, masks: NDArray[np.float32]) -> NDArray[np.float32]:
        """Squared error of MFR, mean over channels (paper Eq. 9), (mask, token); nan at tokens that are not hidden."""
        model, forward = self.reading.subject.base, self.reading.inputs.forward
        words = {name: forward[name].expand(len(masks), -1) for name in ("words", "word_tokens")}
        visual = self.visual.for_texts(torch.zeros(len(masks), dtype=torch.long, device=model.device))
        masked = torch.zeros(visual.features.shape[:2], dtype=torch.bool)
        masked[:, self.places] = torch.from_numpy(masks).bool()
        masked = masked.to(model.device)
        predicted = model.mfr(model.fuse(visual, **words, masked=masked).vision)
        error = (predicted - visual.features).square().mean(dim=-1)
        return error.masked_fill(~masked, torch.nan).float().cpu().numpy()[:, self.places]


class MasksView(View):
    """The image with its tokens; one pick, how a rule ranks the others for it, the resulting mask, and a random mask.

    Only models of this package are shown. One without a parsing attention has the other rules, and by attention only
    the random mask. Where a run was trained with a `mask.source`, that model ranks, as it did in training.
    """

    title = "Masks"

    def __init__(self, readings: Sequence[Reading]) -> None:
        super().__init__()
        self.pick, self._draw, self._delayed = -1, 0, Delayed(0.35)
        self._images_due = True  # of the panels of errors, which are drawn later
        self.k = ipywidgets.IntSlider(
            2, 1, 2, description="k hidden", style={"description_width": "initial"}, layout={"width": "300px"}
        )
        self.fit = ipywidgets.Button(
            description="k = its object", tooltip="a mask as large as the picked object", layout={"width": "115px"}
        )
        self.select = ipywidgets.ToggleButtons(style={"button_width": "95px"})
        self.head = ipywidgets.Dropdown(options=_head_options(0), layout={"width": "125px"})
        self.again = ipywidgets.Button(
            description="draw again", tooltip="another random mask", layout={"width": "100px"}
        )
        self.status, self.numbers = StatusText(), Table(label="What each mask hides and leaves", width=WIDTH)
        self.panels: list[Panels] = []  # one for each model
        self.errors: list[Panels] = []
        self.values: list[NDArray[np.float32]] = []  # (panel, token) of each model, also of panels that are not shown
        for control in (self.k, self.select, self.head):
            control.observe(lambda change: self._redraw(), "value")
        self.fit.on_click(lambda button: self.k.set_trait("value", self._object_size))
        self.again.on_click(lambda button: self._draw_again())
        self._rows = row(self.k, self.fit, self.again), row(self.select, self.head)  # the same ones stay on the page
        self.show(readings)

    def show(self, readings: Sequence[Reading]) -> None:
        self._delayed.cancel()
        ours = [reading for reading in readings if reading.subject.base is not None]
        self.readings = ours if all(ours[0].same_boxes(other) for other in ours) else ours[:1]  # one pick must fit all
        self._notes = [
            f"{other.subject.name} cuts the image into other tokens; only the first model is shown here."
            for other in ours[len(self.readings) :]
        ]
        self._rankings = [_ranking(reading, self._notes) for reading in self.readings]
        names = [reading.subject.name for reading in readings if reading.subject.base is None]
        if names := names + [one.name for one in self._rankings if not one.has_attention]:
            self._notes.append(
                f"No mask by attention for {', '.join(names)}: only the Swin parser and ViTs have a parsing attention."
            )
        self.status.set(*(self._notes or ["Click a token, or use the arrow keys and Enter."]))
        if not self.readings:
            self.widget.children = (self.status,)
            return
        self._objects = _objects(self.readings[0])
        self._fit_controls()
        if len(self.panels) != len(self.readings):
            for panel in [*self.panels, *self.errors]:
                panel.close()
            self.panels, self.errors = [Panels() for _ in self.readings], [Panels() for _ in self.readings]
            for panel in [*self.panels, *self.errors]:
                panel.observe(self._token_picked, "picked")
        self.widget.children = (self.status, *self._rows, *self.panels, self.numbers, *self.errors)
        self._redraw(images=True)

    def set(
        self,
        token: int | None = None,
        *,
        k: int | None = None,
        select: str | None = None,
        head: int | None = None,
        draw: int | None = None,
    ) -> None:
        """Pick a token and choose what is hidden with it; what is not given stays, but no head means all heads.

        `select` is a key of `RULES`.
        """
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
        for ranking, values in zip(self._rankings, self.values, strict=True):
            rule = self._rule.mode
            names = [rule, f"{rule}_mask", "random_mask", f"{rule}_error", "random_error"]
            columns = dict(zip(names, [*values[1:], *ranking.errors(values[2:])], strict=True))
            parts.append(pd.DataFrame({"model": ranking.name, "token": range(values.shape[1])} | columns))
        return {"masks": pd.concat(parts, ignore_index=True)} if parts else {}

    def section(self) -> Section:
        if not self.readings:
            return Section(self.title, self.status.text)
        self._delayed.cancel()
        self._reconstruct()
        parts = []
        for reading, values, panels, errors in zip(self.readings, self.values, self.panels, self.errors, strict=True):
            shown = _shown(values)
            figure = still.blank(235 * len(shown), 260)
            for axes, panel in zip(figure.subplots(1, len(shown)), shown, strict=True):
                self._draw_panel(axes, reading, values, panel)
            parts += [Part(panels, still.png(figure)), Part(errors)]
        intro = "Hover over a token to see its numbers. To pick another token, open the explorer: the model must run."
        return Section(self.title, " ".join([*self._notes, intro]), [*parts, Part(self.numbers)])

    def draw_mask(self, axes: Axes, reading: Reading) -> None:
        """Draw the mask of a reading as a still picture; the random one if it has no other."""
        values = self.values[self.readings.index(reading)]
        self._draw_panel(axes, reading, values, 2 if values[2].any() else 3)

    def _draw_panel(self, axes: Axes, reading: Reading, values: NDArray[np.float32], panel: int) -> None:
        still.panel(axes, reading, KINDS[panel], values[panel], self._captions[panel], self.pick)

    def close(self) -> None:
        super().close()
        self._delayed.cancel()
        self._rankings, self.values = [], []

    # ------------------------------------------------------------------------------------------------ drawing

    def _fit_controls(self) -> None:
        """Set the controls to the tokens, heads and objects of new readings."""
        tokens = len(self.readings[0].boxes)
        heads = min((one.heads for one in self._rankings if one.heads), default=0)  # those that all of them have
        has = {"attention": any(one.has_attention for one in self._rankings), "object": bool(self._objects.any())}
        rules, chosen = tuple(name for name, rule in RULES.items() if has.get(rule.mode, True)), self.select.value
        with self.quiet():
            if self.select.options != rules:
                self.select.options, self.select.tooltips = rules, [RULES[name].tip for name in rules]
                self.select.value = chosen if chosen in rules else rules[0]
            if self.k.max != tokens:
                self.k.max, self.k.value = tokens, max(2, round(0.15 * tokens))
            head = self.head.value
            self.head.options = _head_options(heads)
            self.head.value = head if head < heads else -1
        self.head.layout.display = None if heads else "none"
        self.fit.layout.display = None if self._objects.any() else "none"
        if not 0 <= self.pick < tokens:
            on_objects = self._objects.nonzero()
            self.pick = int(on_objects[0]) if len(on_objects) else tokens // 2

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
        self.values = [self._values_of(ranking) for ranking in self._rankings]
        for reading, panel, values in zip(self.readings, self.panels, self.values, strict=True):
            shown, (by_rule, at_random) = _shown(values), values[2:].sum(axis=1).astype(int)
            hidden = f"{by_rule} tokens are hidden by {self._rule.mode} and {at_random} at random"
            traits = {"label": f"{reading.subject.name}: masks", "alt": f"Token {self.pick} is picked; {hidden}."}
            traits |= image_traits(reading) if images else {}
            traits |= {"kinds": [KINDS[n] for n in shown], "captions": [self._captions[n] for n in shown]}
            traits |= {"width": WIDTH // 4 * len(shown), "outlined": self._on_object.nonzero()[:, 0].tolist()}
            panel.update(values=values[shown], picked=self.pick, **traits)
        self.fit.disabled = self._object_size < 2
        self._show_numbers()
        self.changed()
        self._images_due |= images
        self._delayed(self._reconstruct)

    @property
    def _rule(self) -> Rule:
        return RULES[self.select.value]

    @property
    def _captions(self) -> list[str]:
        return ["the image", self._rule.look, f"{self._rule.mode} mask", "random mask"]

    def _values_of(self, ranking: Ranking) -> NDArray[np.float32]:
        """(panel, token): zeros, scores of the tokens for the pick, mask by them, random mask."""
        tokens = len(self._objects)
        noise = torch.rand(1, tokens, generator=torch.Generator().manual_seed(self._draw))
        noise[0, self.pick] = 2
        values = torch.zeros(4, tokens)
        rule, scores = self._rule, ranking.scores(self._rule.mode, self.head.value, self._objects)
        if scores is not None:
            values[1] = scores_of_pick(scores.float(), torch.tensor([self.pick]), rule.select)[0]
            if rule.mode != "attention":
                values[1] -= values[1].min()  # shades begin at 0
            values[2] = visual_mask(noise, self.k.value, parsing=scores.float(), select=rule.select)[0]
        values[3] = visual_mask(noise, self.k.value)[0]
        return values.numpy()

    def _reconstruct(self) -> None:
        errors = [one.errors(values[2:]) for one, values in zip(self._rankings, self.values, strict=True)]
        for reading, panel, values, found in zip(self.readings, self.errors, self.values, errors, strict=True):
            traits = image_traits(reading) if self._images_due else {}
            traits["label"] = f"{reading.subject.name}: error of hidden tokens"
            traits["alt"] = "Bright where the features of a hidden token are guessed badly."
            masks = [n for n in _shown(values) if KINDS[n] == "mask"]
            traits["captions"] = [f"error under the {self._captions[n]}" for n in masks]
            traits |= {"kinds": ["shade"] * len(masks), "width": WIDTH // 4 * len(masks)}
            panel.update(values=np.nan_to_num(found)[-len(masks) :], picked=self.pick, **traits)
        self._images_due = False
        self._show_numbers(errors)

    # ------------------------------------------------------------------------------------------------ numbers

    @property
    def _on_object(self) -> Tensor:
        """(vision,): True at the tokens of the picked object; all False if the pick is on background."""
        picked = self._objects[self.pick]
        return (self._objects == picked) & (picked > 0)

    @property
    def _object_size(self) -> int:
        return int(self._on_object.sum())

    def _show_numbers(self, errors: Sequence[NDArray[np.float32]] = ()) -> None:
        """Fill the table; `errors` are those under each model's masks, empty while they are computed."""
        has_objects = bool(self._objects.any())
        rows = []
        for number, (reading, values) in enumerate(zip(self.readings, self.values, strict=True)):
            for place, name in enumerate((self._rule.mode, "random")):
                mask = torch.from_numpy(values[2 + place]).bool()
                if not mask.any():
                    continue  # no parsing attention
                shares = [self._share_on_object(mask, name == "random")] if has_objects else []
                error = f"{np.nanmean(errors[number][place]):.3f}" if len(errors) else "…"
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


def _shown(values: NDArray[np.float32]) -> list[int]:
    """The panels to show of (panel, token): without a mask by the rule, only the image and the random mask."""
    return [0, 1, 2, 3] if values[2].any() else [0, 3]


def _head_options(heads: int) -> list[tuple[str, int]]:
    """Options of a dropdown; -1 is the mean, because a dropdown shows None as no choice."""
    return [("mean of heads", -1), *((f"head {head + 1}", head) for head in range(heads))]


def _objects(reading: Reading) -> Tensor:
    """The object of each token, (vision,); 0 for background and in pictures without object masks."""
    visual = reading.subject.base.settings.visual
    if visual.kind.on_grid:
        return objects_of_pictures([reading.picture], visual.grid)[0]
    return boxed_objects([reading.picture], torch.from_numpy(reading.boxes)[None])[0]


@torch.no_grad()
def _ranking(reading: Reading, notes: list[str]) -> Ranking:
    """A note says if a `mask.source` ranks, or why it cannot be asked."""
    base, mask = reading.subject.base, reading.subject.mask
    ranking = Ranking(reading, base.visual(reading.inputs.forward["images"]))
    if mask.source:
        try:
            source = Source(open_source(mask, base.settings.visual), mask, base.settings.visual)
        except (SettingsError, CheckpointError) as error:
            notes.append(f"{ranking.name}: its mask.source cannot be loaded: {error}")
            return ranking
        places = torch.from_numpy(ranking.places)
        ranking.given[mask.mode] = source.stack([reading.picture])[:, places][:, :, places]
        notes.append(f"{ranking.name}: {mask.mode} is that of {Path(mask.source).name}, by which it was trained.")
    return ranking
