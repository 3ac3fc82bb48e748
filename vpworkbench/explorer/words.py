"""View 2: which words look where on the image, and which patches read which words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd

from vpworkbench.explorer import still
from vpworkbench.explorer.page import Part, Section
from vpworkbench.explorer.parts import WIDTH, StatusText, View, image_traits, row
from vpworkbench.explorer.readings import Reading, check_index
from vpworkbench.explorer.widgets import Maps, Reader
from vpworkbench.figures.style import GREY

GRID = ["words to image", "image to words", "entropy (1: uniform)"]


class WordsView(View):
    """A grid of layers and heads; the chosen cell decides which attention the sentence and the image below show."""

    title = "Words and patches"

    def __init__(self, readings: Sequence[Reading]) -> None:
        super().__init__()
        look = {"indent": False, "layout": {"width": "auto"}}
        self.mean = ipywidgets.Checkbox(True, description="mean of heads", **look)
        self.rolled = ipywidgets.Checkbox(False, description="rolled out from the input (Eq. 4)", **look)
        tips = ["where words look, in a layer", "where words go, by exact optimal transport after the last layer"]
        self.way = ipywidgets.ToggleButtons(
            options=["attention", "transport"], tooltips=tips, style={"button_width": "95px"}
        )
        for control in (self.way, self.mean, self.rolled):
            control.observe(lambda change: self._redraw(), "value")
        self.status = StatusText(
            "Click a cell to choose layer and head. Hover over a word or a patch; click to pin it."
        )
        scale = {"percent": True, "low": [0.0] * 3, "high": [1.0] * 3, "row_name": "layer", "column_name": "head"}
        self.maps = [Maps(names=GRID, count_from=1, width=WIDTH, **scale) for _ in readings]
        self.readers = [Reader(width=WIDTH) for _ in readings]
        for maps, reader in zip(self.maps, self.readers, strict=True):
            maps.observe(self._cell_picked, "picked")
            reader.observe(self._place_pinned, "pinned")
        pairs = [widget for pair in zip(self.maps, self.readers, strict=True) for widget in pair]
        self.widget.children = (self.status, row(self.way, self.mean, self.rolled), *pairs)
        self.show(readings)

    def show(self, readings: Sequence[Reading]) -> None:
        self.readings = list(readings)
        for reading, maps, reader in zip(self.readings, self.maps, self.readers, strict=True):
            layer, head = maps.picked or (reading.layers - 1, 0)
            picked = [min(layer, reading.layers - 1), min(head, reading.heads - 1)]
            pinned = reader.pinned if reader.pinned < len(reading.words) + len(reading.boxes) else -1
            label, alt = f"{reading.subject.name}: attention{reading.note}", "Shares of attention by layer and head."
            with self.quiet():
                maps.update(values=reading.grid, hatched=_hatched(reading), picked=picked, label=label, alt=alt)
                reader.update(
                    words=reading.words, pinned=pinned, **image_traits(reading), **self._attention(reading, picked)
                )

    def set(
        self,
        place: int | None = None,
        *,
        layer: int | None = None,
        head: int | None = None,
        rolled: bool | None = None,
        transport: bool = False,
    ) -> None:
        """Pin a place (words first, then patches; -1: none) and choose layer and head, from 0 (no head: their mean).

        With `transport` words and patches show the exact plan of optimal transport instead of attention.
        """
        first = self.readings[0]  # what another model does not have, it leaves as it is
        if place != -1:
            check_index("place", place, len(first.words) + len(first.boxes))
        check_index("layer", layer, first.layers)
        check_index("head", head, first.heads)
        with self.quiet():
            self.way.value = "transport" if transport else "attention"
            self.mean.value = head is None
            self.rolled.value = self.rolled.value if rolled is None else rolled
            for reading, maps, reader in zip(self.readings, self.maps, self.readers, strict=True):
                chosen, counts = zip((layer, head), maps.picked, strict=True), (reading.layers, reading.heads)
                maps.picked = [
                    before if new is None or new >= count else new
                    for (new, before), count in zip(chosen, counts, strict=True)
                ]
                if place is not None and place < len(reading.words) + len(reading.boxes):
                    reader.pinned = place
        self._redraw()

    def code(self) -> str:
        layer, head = self.maps[0].picked
        head = None if self.mean.value else head
        way = ", transport=True" if self._transports else ""
        return f"view.read({self.readers[0].pinned}, layer={layer}, head={head}, rolled={self.rolled.value}{way})"

    def section(self) -> Section:
        parts = []
        for reading, maps, reader in zip(self.readings, self.maps, self.readers, strict=True):
            parts += [Part(maps, self._still(reading, maps.picked, reader.pinned)), Part(reader)]
        intro = "Hover over a word to see where it looks, over a patch to see what it reads. Click pins."
        return Section(self.title, intro, parts)

    def _still(self, reading: Reading, picked: Sequence[int], pinned: int) -> bytes:
        """The grid of layers and heads, then where the pinned word, or else the last one, looks on the image."""
        word = pinned if 0 <= pinned < len(reading.words) else len(reading.words) - 1
        figure = still.blank(940, 260)
        *grid, image = figure.subplots(1, 4)
        for number, (axes, name, values) in enumerate(zip(grid, GRID, reading.grid, strict=True)):
            hatched = [box[1:] for box in _hatched(reading) if box[0] == number]
            still.matrix(axes, values, name, "layer", "head", hatched, vmin=0, vmax=1)
        looks, _ = self._looks_and_reads(reading, picked)
        blocked = self._blocked(reading, picked)["looks_blocked"]
        verb = "goes" if self._transports else "cannot look" if blocked else "looks"
        title = still.shortened(f"“{reading.words[word]}” {verb} here", 30)
        kind, values = ("mask", np.ones_like(looks[word])) if blocked else ("shade", looks[word])
        still.panel(image, reading, kind, values, title)
        figure.supxlabel(still.shortened(reading.text, 120), fontsize=8, color=GREY)
        return still.png(figure)

    def tables(self) -> dict[str, pd.DataFrame]:
        """`heads`: the grid; `looks`: attention between every word and every patch, both ways, and `transport`."""
        pairs = list(zip(self.readings, self.maps, strict=True))
        heads = [_table_of_heads(reading) for reading, _ in pairs]
        looks = [_table_of_looks(reading, *self._looks_and_reads(reading, maps.picked)) for reading, maps in pairs]
        return {"heads": pd.concat(heads, ignore_index=True), "looks": pd.concat(looks, ignore_index=True)}

    def _looks_and_reads(self, reading: Reading, picked: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """`Reading.looks` and `Reading.reads` at the picked (layer, head) or for the mean of heads; or by transport."""
        if self._transports:
            plan = reading.transport
            return plan, (plan / np.maximum(plan.sum(axis=0), 1e-12)).T
        layer, head = picked[0], None if self.mean.value else picked[1]
        rolled = self.rolled.value
        return reading.looks(layer, head, rolled=rolled), reading.reads(layer, head, rolled=rolled)

    @property
    def _transports(self) -> bool:
        return self.way.value == "transport"

    def _blocked(self, reading: Reading, picked: Sequence[int]) -> dict[str, bool]:
        """Whether all of `_looks_and_reads` is blocked."""
        looks, reads = reading.blocks(0 if self.rolled.value else picked[0], picked[0])
        return {"looks_blocked": looks and not self._transports, "reads_blocked": reads and not self._transports}

    def _attention(self, reading: Reading, picked: Sequence[int]) -> dict[str, Any]:
        """The traits of a `Reader` at the picked (layer, head)."""
        looks, reads = self._looks_and_reads(reading, picked)
        layer, head = picked
        if self._transports:
            label = "optimal transport after the last layer"
        elif self.rolled.value:
            label = f"rolled out to layer {layer + 1}"
        else:
            label = f"layer {layer + 1}" + ("" if self.mean.value else f", head {head + 1}")
        alt = "A picture, bright where the word under the pointer looks, and the sentence."
        label = f"{reading.subject.name}: {label}{reading.note}"
        return {"looks": looks, "reads": reads, "label": label, "alt": alt} | self._blocked(reading, picked)

    def _cell_picked(self, change: dict[str, Any]) -> None:
        """A click on a cell asks for that head, not for the mean."""
        if self._is_quiet or not change["new"]:
            return
        layer, head = change["new"]
        with self.quiet():
            self.mean.value = False
            for maps, reading in zip(self.maps, self.readings, strict=True):
                if layer < reading.layers and head < reading.heads:
                    maps.picked = [layer, head]
        self._redraw()

    def _place_pinned(self, change: dict[str, Any]) -> None:
        if self._is_quiet:
            return
        owner = self.readings[self.readers.index(change["owner"])]
        for reader, reading in zip(self.readers, self.readings, strict=True):
            if reading.words == owner.words and len(reading.boxes) == len(owner.boxes):
                reader.pinned = change["new"]
        self.changed()

    def _redraw(self) -> None:
        if self._is_quiet:
            return
        for reading, maps, reader in zip(self.readings, self.maps, self.readers, strict=True):
            reader.update(**self._attention(reading, maps.picked))
        self.changed()


def _hatched(reading: Reading) -> list[list[int]]:
    """The blocked cells of the grid as boxes of `Maps`."""
    if reading.block is None:
        return []
    _, first, last = reading.block
    blocked = enumerate(reading.blocks(first, last))  # in the order of GRID
    return [[number, first, 0, last + 1, reading.heads] for number, is_blocked in blocked if is_blocked]


def _table_of_heads(reading: Reading) -> pd.DataFrame:
    layer, head = (index.ravel() + 1 for index in np.indices(reading.grid.shape[1:]))
    to_vision, to_text, entropy = (values.ravel() for values in reading.grid)
    columns = {"layer": layer, "head": head, "text_to_vision": to_vision, "vision_to_text": to_text, "entropy": entropy}
    return pd.DataFrame({"model": reading.subject.name} | columns)


def _table_of_looks(reading: Reading, looks: np.ndarray, reads: np.ndarray) -> pd.DataFrame:
    place, token = (index.ravel() for index in np.indices(looks.shape))
    words = [reading.words[number] for number in place]
    columns = {"word": words, "place": place, "token": token, "looks": looks.ravel(), "reads": reads.T.ravel()}
    columns["transport"] = reading.transport.ravel()
    return pd.DataFrame({"model": reading.subject.name} | columns)
