"""The drawings of NLVR v1, as its field `structured_rep` describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

COLOURS = {"Yellow": "yellow", "Black": "black", "#0099ff": "blue"}  # as the file writes them -> as statements do
SHAPES = ("square", "circle", "triangle")
BOX_PX = 100
BOX_STEP_PX = 150  # from the left edge of one box to that of the next


@dataclass(frozen=True)
class Item:
    """One drawn object; (x, y) is the top-left corner of its bounding square, in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    size: float


Box = tuple[Item, ...]


def read_boxes(structured_rep: Any) -> tuple[Box, ...]:
    """The three boxes of a drawing; a ValueError says what is wrong with `structured_rep`."""
    boxes = structured_rep if isinstance(structured_rep, list) else []
    if len(boxes) != 3 or not all(isinstance(box, list) for box in boxes):
        raise ValueError(f"structured_rep must hold three lists of objects, got {structured_rep!r}")
    return tuple(tuple(_read_item(entry) for entry in box) for box in structured_rep)


def drawn_at(boxes: Sequence[Box], order: int) -> list[tuple[float, float, float, float]]:
    """x0 y0 x1 y1 of every item of a drawing, in pixels.

    Parameters
    ----------
    boxes : sequence of boxes
        From `read_boxes`.
    order : int
        Which of the six permutations of the boxes the image shows: the last number of its file's name.
    """
    placed = []
    for place, number in enumerate(list(permutations(range(3)))[order]):
        left = place * BOX_STEP_PX
        for item in boxes[number]:
            right, bottom = min(item.x + item.size, BOX_PX), min(item.y + item.size, BOX_PX)
            placed.append((left + item.x, item.y, left + right, bottom))
    return placed


def _read_item(entry: Any) -> Item:
    keys = ("type", "color", "x_loc", "y_loc", "size")
    if not isinstance(entry, dict) or not entry.keys() >= set(keys):
        raise ValueError(f"an object must be a dict with {', '.join(keys)}; got {entry!r}")
    shape, colour, *numbers = (entry[key] for key in keys)
    if shape not in SHAPES or colour not in list(COLOURS):
        known = f"types: {', '.join(SHAPES)}; colors: {', '.join(COLOURS)}"
        raise ValueError(f"unknown type or color: {shape!r}, {colour!r}; known {known}")
    for key, number in zip(keys[2:], numbers, strict=True):
        if type(number) not in (int, float) or not 0 <= number <= BOX_PX:
            raise ValueError(f"{key} must be a number from 0 to {BOX_PX}, got {number!r}")
    return Item(shape, COLOURS[colour], *numbers)
