"""How the drawings of NLVR v1 are read."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from vpworkbench.data.nlvr1 import Box, Item

GOOD = {"type": "circle", "color": "#0099ff", "x_loc": 1, "y_loc": 2.5, "size": 10}
read_box = TypeAdapter(Box).validate_python


def test_boxes_are_read_as_published():
    assert read_box([GOOD]) == (Item("circle", "blue", 1, 2.5, 10),)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "valid tuple"),
        (["circle"], "dictionary"),
        ([{key: value for key, value in GOOD.items() if key != "size"}], "size"),
        ([GOOD | {"type": "hexagon"}], "type"),
        ([GOOD | {"type": ["circle"]}], "type"),
        ([GOOD | {"color": "yellow"}], "'Yellow', 'Black' or '#0099ff'"),
        ([GOOD | {"x_loc": "1"}], "x_loc"),
        ([GOOD | {"y_loc": True}], "y_loc"),
        ([GOOD | {"y_loc": -1}], "y_loc"),
        ([GOOD | {"size": float("nan")}], "size"),
    ],
)
def test_a_broken_drawing_is_refused(wrong, message):
    with pytest.raises(ValidationError, match=message):
        read_box(wrong)
