"""A generated scene: coloured shapes on a muted ground, with exact ground truth. The built-in data set.

A thing has a shape, a colour, a size and a material. It may hide part of another thing, but never more than the
difficulty allows. In three scenes of ten, one thing is *covered*: a cloth shows its colour, size, material and place,
and hides its shape.

The modules, in the order that data passes them: `layout` samples scenes, `drawing` paints them, `language` decides
which sentences are true of them, `texts` and `statements` write sentences, and `write` writes everything in the formats
of published data sets.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

SHAPES = ("ball", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLOURS = {
    "red": (214, 40, 44),
    "yellow": (248, 212, 44),
    "green": (44, 152, 66),
    "cyan": (66, 206, 222),
    "blue": (36, 76, 204),
    "pink": (238, 108, 188),
    "black": (34, 34, 40),
    "white": (246, 246, 244),
}
SIZES = ("small", "medium", "large")
MATERIALS = ("matte", "shiny")
COVERED = "cloth"  # the shape of a covered thing; sentences never mention it

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: its attributes, its place, and the box of its visible pixels."""

    shape: str
    colour: str
    size: str
    material: str
    x: float  # centre, px
    y: float
    radius: float  # px; the outline lies within this circle
    angle: float  # radians, clockwise in the picture
    depth: int  # 0 is furthest; the index in the scene
    box: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # x0 y0 x1 y1, px; ends excluded

    @property
    def covered(self) -> bool:
        """Whether a cloth hides the shape."""
        return self.shape == COVERED

    @property
    def name(self) -> str:
        """Colour and shape: "red star"."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """The things in a picture, from the furthest to the nearest."""

    things: tuple[Thing, ...]
    image_px: int

    @property
    def uncovered(self) -> list[Thing]:
        """The things whose shape is visible."""
        return [thing for thing in self.things if not thing.covered]

    @property
    def pairs(self) -> list[tuple[Thing, Thing]]:
        """Ordered pairs of uncovered things that differ in colour or shape."""
        return [(a, b) for a, b in permutations(self.uncovered, 2) if a.name != b.name]

    def to_json(self) -> dict[str, Any]:
        """Plain dict: `{"things": [...], "image_px": ...}`."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Scene:
        """Inverse of `to_json`; also reads an image entry of `dataset_scenes.json`."""
        things = tuple(Thing(**thing | {"box": tuple(thing["box"])}) for thing in entry["things"])
        return cls(things, entry["image_px"])
