"""How the drawings of NLVR v1 are read."""

from __future__ import annotations

import pytest

from vpworkbench.data.nlvr1 import Item, read_boxes


def item(type_: str, color: str, x: float, y: float, size: float = 20) -> dict:
    return {"type": type_, "color": color, "x_loc": x, "y_loc": y, "size": size}


def test_boxes_are_read_as_published():
    boxes = read_boxes([[item("circle", "#0099ff", 1, 2.5, 10)], [], []])
    assert boxes == ((Item("circle", "blue", 1, 2.5, 10),), (), ())


GOOD = item("circle", "Yellow", 1, 2, 10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "three lists of objects"),
        ([[], []], "three lists of objects"),
        ([[], [], {}], "three lists of objects"),
        ([["circle"], [], []], "must be a dict with type, color"),
        ([[{k: v for k, v in GOOD.items() if k != "size"}], [], []], "size; got"),
        ([[GOOD | {"type": "hexagon"}], [], []], "unknown type or color: 'hexagon'"),
        ([[GOOD | {"type": ["circle"]}], [], []], "unknown type or color"),
        ([[GOOD | {"color": "yellow"}], [], []], "known types: .*Yellow, Black, #0099ff"),
        ([[GOOD | {"x_loc": "1"}], [], []], "x_loc must be a number from 0 to 100, got '1'"),
        ([[GOOD | {"y_loc": True}], [], []], "y_loc must be a number"),
        ([[GOOD | {"y_loc": -1}], [], []], "y_loc must be a number from 0"),
        ([[GOOD | {"size": float("nan")}], [], []], "size must be a number"),
    ],
)
def test_a_broken_drawing_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        read_boxes(wrong)
