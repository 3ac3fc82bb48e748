"""What a generated scene is: pictures of coloured shapes with exact ground truth, the embedded default data.

A scene is a handful of things on a muted textured ground. A thing has a shape, a colour, a size and
a material; it may hide a part of another, never more than its difficulty allows. In three scenes of
ten one thing is *covered*: a cloth shows its colour, size, material and place, and hides its shape.

From here the data flows through these rooms: `shapes.py` gives the shapes their outlines, `sampling.py`
draws scenes, `rendering.py` paints them, `language.py` says what is true of them, and what cannot be
known because of the cloth; `captions.py`, `questions.py`, `statements.py` and `hypotheses.py` write
texts; `scene_files.py` writes it all in the formats of the real data sets.
"""

from __future__ import annotations

from dataclasses import dataclass
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
COVERED = "cloth"  # the shape that is drawn for a covered thing; no word of the language

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: what it is, where it is, and the box of its visible pixels."""

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


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that is true of a picture, from the furthest thing to the nearest."""

    things: tuple[Thing, ...]
    image_px: int

    def to_json(self) -> dict[str, Any]:
        """Plain dict: `{"things": [...], "image_px": ...}`."""
        things = [{name: getattr(thing, name) for name in Thing.__slots__} for thing in self.things]
        for thing in things:
            thing["box"] = list(thing["box"])
        return {"things": things, "image_px": self.image_px}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Scene:
        """Inverse of `to_json`; also reads an image entry of `dataset_scenes.json`."""
        things = tuple(Thing(**thing | {"box": tuple(thing["box"])}) for thing in entry["things"])
        return cls(things, entry["image_px"])
