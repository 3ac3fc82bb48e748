"""The drawings of NLVR v1, as its field `structured_rep` describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StrictFloat, StrictInt

COLOURS = {"Yellow": "yellow", "Black": "black", "#0099ff": "blue"}  # as the file writes them -> as statements do
SHAPES = ("square", "circle", "triangle")
BOX_PX = 100
BOX_STEP_PX = 150  # from the left edge of one box to that of the next


@dataclass(frozen=True)
class Item:
    """One drawn object; (x, y) is the top-left corner of its bounding square, in pixels.

    Pydantic reads it from an entry of the file, whose keys the aliases name.
    """

    shape: Annotated[Literal[SHAPES], Field(validation_alias="type")]
    colour: Annotated[Literal[tuple(COLOURS)], AfterValidator(COLOURS.__getitem__), Field(validation_alias="color")]
    x: Annotated[StrictInt | StrictFloat, Field(ge=0, le=BOX_PX, validation_alias="x_loc")]
    y: Annotated[StrictInt | StrictFloat, Field(ge=0, le=BOX_PX, validation_alias="y_loc")]
    size: Annotated[StrictInt | StrictFloat, Field(ge=0, le=BOX_PX)]


Box = tuple[Item, ...]


def drawn_at(boxes: Sequence[Box], order: int) -> list[tuple[float, float, float, float]]:
    """x0 y0 x1 y1 of every item of a drawing, in pixels.

    Parameters
    ----------
    boxes : sequence of Box
        The three boxes in the order of the file.
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
