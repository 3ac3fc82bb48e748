"""View 2: which words look where on the image, and which patches read which words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd

from vpworkbench.explorer.parts import WIDTH, Note, column, row, shown_image, unheard
from vpworkbench.explorer.readings import Reading
from vpworkbench.explorer.widgets import Maps, Reader

GRID = ["words to image", "image to words", "entropy (1: even)"]


class WordsView:
    """A grid of layers and heads picks what the sentence and the image below it show.

    Attributes
    ----------
    widget : ipywidgets.Widget
    maps, readers : list
        `Maps` and `Reader` of each model.
    """

    title = "Words and patches"

    def __init__(self, readings: Sequence[Reading]) -> None:
        self.mean = ipywidgets.Checkbox(True, description="mean of heads", indent=False, layout={"width": "auto"})
        self.rolled = ipywidgets.Checkbox(
            False, description="rolled out from the input (Eq. 4)", indent=False, layout={"width": "auto"}
        )
        for control in (self.mean, self.rolled):
            control.observe(lambda change: self._redraw(), "value")
        self.note = Note("Click a cell for its layer and head; hover over a word or a patch, click pins it.")
        self.maps: list[Maps] = []
        self.readers: list[Reader] = []
        self.widget = column()
        self._is_quiet, self.changed = False, unheard
        self.show(readings)

    def show(self, readings: Sequence[Reading]) -> None:
        """Look at new readings; layer and head stay where they are there."""
        self.readings = list(readings)
        if len(self.maps) != len(readings):
            self._build()
        for reading, maps, reader in zip(self.readings, self.maps, self.readers, strict=True):
            layer, head = maps.picked or (reading.layers - 1, 0)
            inside = [min(layer, reading.layers - 1), min(head, reading.heads - 1)]
            places = len(reading.words) + len(reading.boxes)
            self._is_quiet = True
            maps.update(values=reading.grid, names=GRID, picked=inside, label=f"{reading.subject.name}: attention",
                        alt="Shares of attention by layer and head.")  # fmt: skip
            reader.update(
                image=shown_image(reading.image), boxes=reading.boxes, on_grid=reading.on_grid, words=reading.words,
                pinned=reader.pinned if reader.pinned < places else -1, **self.slice(reading, inside),
            )  # fmt: skip
            self._is_quiet = False

    def set(self, place: int | None = None, *, layer: int | None = None, head: int | None = None,
            rolled: bool | None = None) -> None:  # fmt: skip
        """Pin a place (words first, then patches; -1: none) and choose layer and head (None: their mean), from 0.

        Raises
        ------
        ValueError
            For a place, layer or head that is not there.
        """
        for reading in self.readings:
            places = len(reading.words) + len(reading.boxes)
            for name, value, stop in (("place", place, places), ("layer", layer, reading.layers),
                                      ("head", head, reading.heads)):  # fmt: skip
                if value is not None and not (-1 if name == "place" else 0) <= value < stop:
                    raise ValueError(f"{name}: {value} is not there; {stop} are, from 0")
        self._is_quiet = True
        self.mean.value = head is None
        self.rolled.value = self.rolled.value if rolled is None else rolled
        for maps, reader in zip(self.maps, self.readers, strict=True):
            before = maps.picked
            maps.picked = [before[0] if layer is None else layer, before[1] if head is None else head]
            reader.pinned = reader.pinned if place is None else place
        self._is_quiet = False
        self._redraw()

    def code(self) -> str:
        """The call that recreates the view."""
        layer, head = self.maps[0].picked
        return (f"view.read({self.readers[0].pinned}, layer={layer}, head={None if self.mean.value else head}, "
                f"rolled={self.rolled.value})")  # fmt: skip

    def tables(self) -> dict[str, pd.DataFrame]:
        """`heads`: the grid; `looks`: attention between every word and every patch, both ways."""
        heads, looks = [], []
        for reading, maps in zip(self.readings, self.maps, strict=True):
            layers, count = np.indices(reading.grid.shape[1:])
            values = dict(zip(("text_to_vision", "vision_to_text", "entropy"), reading.grid, strict=True))
            heads.append(pd.DataFrame({"model": reading.subject.name, "layer": layers.ravel() + 1,
                                       "head": count.ravel() + 1}
                                      | {name: value.ravel() for name, value in values.items()}))  # fmt: skip
            parts = self.slice(reading, maps.picked)
            word, patch = np.indices(parts["looks"].shape)
            looks.append(pd.DataFrame({
                "model": reading.subject.name, "word": [reading.words[place] for place in word.ravel()],
                "place": word.ravel(), "token": patch.ravel(), "looks": parts["looks"].ravel(),
                "reads": parts["reads"].T.ravel(),
            }))  # fmt: skip
        return {"heads": pd.concat(heads, ignore_index=True), "looks": pd.concat(looks, ignore_index=True)}

    def close(self) -> None:
        for one in [*self.maps, *self.readers]:
            one.close()
        self.readings = []

    def _build(self) -> None:
        for one in [*self.maps, *self.readers]:
            one.close()
        self.maps = [
            Maps(values=np.zeros((3, 1, 1)), names=GRID, row_name="layer", column_name="head", count_from=1,
                 percent=True, low=[0.0, 0.0, 0.0], high=[1.0, 1.0, 1.0], width=WIDTH) for _ in self.readings
        ]  # fmt: skip
        self.readers = [
            Reader(image=b"", boxes=np.zeros((0, 4)), looks=np.zeros((0, 0)), reads=np.zeros((0, 0)), width=WIDTH)
            for _ in self.readings
        ]
        for maps, reader in zip(self.maps, self.readers, strict=True):
            maps.observe(self._picked, "picked")
            reader.observe(self._pinned, "pinned")
        pairs = [one for pair in zip(self.maps, self.readers, strict=True) for one in pair]
        self.widget.children = (self.note, row(self.mean, self.rolled), *pairs)

    def slice(self, reading: Reading, picked: Sequence[int]) -> dict[str, Any]:
        layer, head = picked
        head = None if self.mean.value else head
        rolled = self.rolled.value
        kind = f"rolled out to layer {layer + 1}" if rolled else f"layer {layer + 1}"
        kind += "" if head is None or rolled else f", head {head + 1}"
        return {
            "looks": reading.looks(layer, head, rolled=rolled), "reads": reading.reads(layer, head, rolled=rolled),
            "label": f"{reading.subject.name}: {kind}",
            "alt": "A picture, bright where the word under the pointer looks, and the sentence.",
        }  # fmt: skip

    def _picked(self, change: dict[str, Any]) -> None:
        """A click on a cell asks for that head, not for the mean."""
        if self._is_quiet or not change["new"]:
            return
        self._is_quiet = True
        self.mean.value = False
        for maps, reading in zip(self.maps, self.readings, strict=True):
            layer, head = change["new"]
            if layer < reading.layers and head < reading.heads:
                maps.picked = [layer, head]
        self._is_quiet = False
        self._redraw()

    def _pinned(self, change: dict[str, Any]) -> None:
        if self._is_quiet:
            return
        owner = self.readings[self.readers.index(change["owner"])]
        for reader, reading in zip(self.readers, self.readings, strict=True):  # the same words, the same patches
            if reading.words == owner.words and len(reading.boxes) == len(owner.boxes):
                reader.pinned = change["new"]
        self.changed()

    def _redraw(self) -> None:
        if self._is_quiet:
            return
        for reading, maps, reader in zip(self.readings, self.maps, self.readers, strict=True):
            reader.update(**self.slice(reading, maps.picked))
        self.changed()
