"""Generated scenes: pictures of coloured shapes with exact ground truth, the embedded default data.

A scene is a handful of things on a muted textured ground. A thing has a shape, a colour, a size and
a material; it may hide a part of another, never more than its difficulty allows. In three scenes of
ten one thing is *covered*: a cloth shows its colour, size, material and place, and hides its shape.
`language.py` says what is true of a scene, and what cannot be known because of the cloth.

Image `i` of a split depends on (seed, split, i) alone: a larger set begins with the smaller one,
and the number of processes changes nothing. `write_scenes` writes the formats of the real data
sets, so that one set of readers serves both.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from scipy.ndimage import map_coordinates
from tqdm.auto import tqdm

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
COVERED_SHARE = 0.3  # of the scenes

Difficulty = Literal["easy", "medium", "hard"]
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


# Sampling ------------------------------------------------------------------------------------


class Level(NamedTuple):
    """What a difficulty means; lengths as shares of the image's side."""

    things: tuple[int, int]  # fewest, most
    radii: tuple[float, float, float]  # small, medium, large
    visible: float  # smallest visible share of any thing
    overlapping: float  # chance that a thing is laid over another one
    touching: float  # chance that a thing is set against another one


LEVELS: dict[str, Level] = {
    "easy": Level((2, 4), (0.110, 0.146, 0.188), visible=0.7, overlapping=0.05, touching=0.12),
    "medium": Level((3, 6), (0.094, 0.128, 0.165), visible=0.6, overlapping=0.2, touching=0.12),
    "hard": Level((4, 8), (0.078, 0.108, 0.142), visible=0.5, overlapping=0.45, touching=0.12),
}
HOLE = 0.66  # inner radius of a ring of radius 1
CLEARANCE = 0.045  # things that do not touch keep this distance, as a share of the side
INSIDE_CHANCE = 0.3  # that a ring, where there is one, gets another thing into its hole


def sample_scene(rng: np.random.Generator, *, image_px: int, difficulty: Difficulty) -> Scene:
    """Draw a scene: first what things there are, then a layout in which all can be recognised.

    Parameters
    ----------
    rng : numpy.random.Generator
    image_px : int
        Side of the square picture.
    difficulty : {"easy", "medium", "hard"}
        See `LEVELS`: 2 to 4, 3 to 6 or 4 to 8 things, at least 0.7, 0.6 or 0.5 of each visible.

    Returns
    -------
    Scene
        With at least two uncovered things that differ in colour or shape.
    """
    level = LEVELS[difficulty]
    while True:
        kinds = _sample_kinds(rng, level)
        for _ in range(30):  # new layouts of the same things, or large things would become rare
            things = _lay_out(rng, kinds, level, image_px)
            things = things and _with_boxes(things, image_px, level.visible)
            if things:
                return Scene(tuple(things), image_px)


class _Kind(NamedTuple):
    shape: str
    colour: str
    size: int  # index into SIZES
    material: str
    within: int | None = None  # index of the ring that holds it


def _sample_kinds(rng: np.random.Generator, level: Level) -> list[_Kind]:
    """Independent uniform attributes, then some things that share a colour, a shape or both."""
    covered = rng.random() < COVERED_SHARE
    count = int(rng.integers(max(level.things[0], 3 if covered else 2), level.things[1] + 1))
    while True:
        shapes, colours = rng.integers(8, size=(2, count))
        sizes, materials = rng.integers(3, size=count), rng.integers(2, size=count)
        for shared in (shapes, colours):
            if rng.random() < 0.3:
                source, target = rng.choice(count, size=2, replace=False)
                shared[target] = shared[source]
        first = int(covered)  # thing 0 is the covered one; the layout shuffles the depths
        if len(set(zip(shapes[first:], colours[first:], strict=True))) > 1:
            break
    names = list(COLOURS)
    kinds = [
        _Kind(SHAPES[shape], names[colour], int(size), MATERIALS[material])
        for shape, colour, size, material in zip(shapes, colours, sizes, materials, strict=True)
    ]
    if covered:
        kinds[0] = kinds[0]._replace(shape=COVERED)
    return _put_inside(rng, kinds) if rng.random() < INSIDE_CHANCE else kinds


def _put_inside(rng: np.random.Generator, kinds: list[_Kind]) -> list[_Kind]:
    rings = [i for i, kind in enumerate(kinds) if kind.shape == "ring"]
    others = [i for i, kind in enumerate(kinds) if kind.shape not in ("ring", COVERED)]
    if not rings or not others:
        return kinds
    ring, other = rings[0], others[int(rng.integers(len(others)))]
    kinds[ring] = kinds[ring]._replace(size=2)
    kinds[other] = kinds[other]._replace(size=0, within=ring)
    return kinds


def _lay_out(
    rng: np.random.Generator, kinds: Sequence[_Kind], level: Level, image_px: int
) -> list[Thing] | None:
    """Place large things first; None if one finds no place."""
    order = sorted(range(len(kinds)), key=lambda i: (kinds[i].within is not None, -kinds[i].size))
    placed: dict[int, Thing] = {}
    for i in order:
        kind = kinds[i]
        radius = level.radii[kind.size] * image_px * float(rng.uniform(0.97, 1.03))
        angle = float(rng.uniform(-0.25, 0.25))
        template = Thing(
            kind.shape, kind.colour, SIZES[kind.size], kind.material,
            x=0.0, y=0.0, radius=round(radius, 2), angle=round(angle, 3), depth=0,
        )  # fmt: skip
        holder = placed.get(kind.within) if kind.within is not None else None
        neighbours = [thing for j, thing in placed.items() if j != kind.within]
        place = _find_place(rng, template, holder, neighbours, level, image_px)
        if place is None:
            return None
        placed[i] = replace(template, x=round(place[0], 2), y=round(place[1], 2))
    depths = rng.permutation(len(kinds))
    return [replace(placed[int(i)], depth=depth) for depth, i in enumerate(depths)]


def _find_place(
    rng: np.random.Generator,
    thing: Thing,
    holder: Thing | None,
    neighbours: Sequence[Thing],
    level: Level,
    image_px: int,
) -> tuple[float, float] | None:
    if holder is not None:
        return holder.x + float(rng.uniform(-1, 1)), holder.y + float(rng.uniform(-1, 1))
    chance = rng.random() - level.touching
    if neighbours and chance < level.overlapping:
        return _find_contact(rng, thing, neighbours, image_px, touching=chance < 0)
    for x, y in rng.uniform(thing.radius + 1, image_px - thing.radius - 1, size=(40, 2)):
        if _is_free(x, y, thing.radius, neighbours, image_px):
            return float(x), float(y)
    return None


def _is_free(x: float, y: float, radius: float, others: Sequence[Thing], image_px: int) -> bool:
    low, high = radius + 1, image_px - radius - 1
    if not (low <= x <= high and low <= y <= high):
        return False
    reach = radius + CLEARANCE * image_px
    return all(math.hypot(x - other.x, y - other.y) >= reach + other.radius for other in others)


def _find_contact(
    rng: np.random.Generator,
    thing: Thing,
    neighbours: Sequence[Thing],
    image_px: int,
    *,
    touching: bool,
) -> tuple[float, float] | None:
    """A place where `thing` just touches, or partly covers, one of its neighbours."""
    for _ in range(8):
        partner = neighbours[int(rng.integers(len(neighbours)))]
        if partner.shape == "ring" and not touching:
            continue  # what lies over a ring might be taken to lie inside it
        others = [other for other in neighbours if other is not partner]
        direction = float(rng.uniform(0, 2 * math.pi))
        step = (math.cos(direction), math.sin(direction))
        distance = (thing.radius + partner.radius) * float(rng.uniform(0.72, 0.9))
        place = (partner.x + step[0] * distance, partner.y + step[1] * distance)
        if not _is_free(*place, thing.radius, others, image_px):
            continue
        if touching:
            place = _contact(thing, partner, step)
        if not touching or _is_free(*place, thing.radius, others, image_px):
            return place
    return None


def _contact(thing: Thing, partner: Thing, step: tuple[float, float]) -> tuple[float, float]:
    """Come nearer by the gap, again and again: the outlines meet and never cross."""
    distance = thing.radius + partner.radius
    for _ in range(4):
        moved = replace(thing, x=partner.x + step[0] * distance, y=partner.y + step[1] * distance)
        distance -= gap(moved, partner)
    return partner.x + step[0] * distance, partner.y + step[1] * distance


def _with_boxes(things: Sequence[Thing], image_px: int, visible: float) -> list[Thing] | None:
    """The things with their visible boxes; None if one is hidden too far."""
    whole = []
    owner = np.zeros((image_px, image_px), dtype=np.uint8)
    for number, thing in enumerate(things, start=1):
        window, u, v = _window(thing, image_px, border=1)
        mask = _look_up(_sculpt(thing.shape).distance, u, v) < 0
        owner[window][mask] = number
        whole.append(int(mask.sum()))
    boxed = []
    for number, (thing, pixels) in enumerate(zip(things, whole, strict=True), start=1):
        mask = owner == number
        if mask.sum() < visible * pixels:
            return None
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        boxed.append(replace(thing, box=tuple(float(edge) for edge in box)))
    return boxed


# Shapes: signed distances and shading on a fixed grid, looked up wherever a thing is drawn ------


class Sculpture(NamedTuple):
    """A shape of radius 1 on a grid; all arrays (row, column)."""

    distance: np.ndarray  # to the outline, negative inside
    shade: dict[str, np.ndarray]  # material -> factor on the colour
    gloss: np.ndarray  # how much white a shiny thing reflects


EXTENT = 1.6  # the grid spans [-EXTENT, EXTENT] in both directions
STEPS = 97


@cache
def _sculpt(shape: str) -> Sculpture:
    axis = np.linspace(-EXTENT, EXTENT, STEPS)
    u, v = np.meshgrid(axis, axis)
    distance = _DISTANCES[shape](u, v)
    slope_v, slope_u = np.gradient(distance, axis, axis)
    bevel = {"ball": 0.95, "ring": 0.17, "cross": 0.3, "moon": 0.3}.get(shape, 0.4)
    tilt = np.clip(1 + distance / bevel, 0, 0.95) ** 1.5
    normal = np.stack([slope_u * tilt, slope_v * tilt, np.sqrt(1 - tilt**2)])
    light = np.array([-0.45, -0.62, 0.64])
    diffuse = np.tensordot(light, normal, axes=1)
    folds = np.zeros_like(u)
    if shape == COVERED:
        folds = 0.16 * np.sin(9.5 * u + 1.5 * np.sin(2.5 * v)) * np.clip((v + 0.7) / 1.2, 0, 1)
    matte = 0.74 + 0.36 * diffuse - 0.05 * v + folds
    shiny = 0.60 + 0.52 * diffuse - 0.10 * v + folds
    half = np.array([-0.26, -0.36, 0.90])
    spark = np.clip(np.tensordot(half, normal, axes=1), 0, 1) ** 40
    sheen = np.exp(-(((u + 0.28) / 0.26) ** 2 + ((v + 0.36) / 0.15) ** 2))
    flat = 0.0 if shape == "ball" else 1.0
    gloss = np.clip(0.85 * spark * (tilt > 0.03) + 0.6 * flat * sheen, 0, 0.9)
    fields = (distance, matte, shiny, gloss)
    distance, matte, shiny, gloss = (field.astype(np.float32) for field in fields)
    return Sculpture(distance, {"matte": matte, "shiny": shiny}, gloss)


def _look_up(field: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    scale = (STEPS - 1) / (2 * EXTENT)
    places = np.stack([(v + EXTENT) * scale, (u + EXTENT) * scale])
    return map_coordinates(field, places, order=1, mode="nearest", prefilter=False)


def _polygon(points: Sequence[tuple[float, float]], rounding: float) -> Callable[..., np.ndarray]:
    """Signed distance to a polygon whose corners are rounded."""
    corners = np.array(points)

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        nearest = np.full(u.shape, np.inf)
        inside = np.zeros(u.shape, dtype=bool)
        for (u0, v0), (u1, v1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            along_u, along_v = u1 - u0, v1 - v0
            share = ((u - u0) * along_u + (v - v0) * along_v) / (along_u**2 + along_v**2)
            share = np.clip(share, 0, 1)
            nearest = np.minimum(
                nearest, np.hypot(u - u0 - share * along_u, v - v0 - share * along_v)
            )
            if v0 != v1:
                inside ^= ((v0 > v) != (v1 > v)) & (u < u0 + (v - v0) * along_u / along_v)
        return np.where(inside, -nearest, nearest) - rounding

    return distance


def _star_points(tips: int, inner: float, outer: float) -> list[tuple[float, float]]:
    angles = [math.pi * k / tips - math.pi / 2 for k in range(2 * tips)]
    reach = [outer if k % 2 == 0 else inner for k in range(2 * tips)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(reach, angles, strict=True)]


def _heart_points(corners: int = 40) -> list[tuple[float, float]]:
    points = []
    for turn in (2 * math.pi * k / corners for k in range(corners)):
        waves = 13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn)
        points.append((0.93 * math.sin(turn) ** 3, 0.06 * (math.cos(4 * turn) - waves)))
    return points


def _cross_points(arm: float, half_width: float) -> list[tuple[float, float]]:
    a, w = arm, half_width
    quarter = [(w, -a), (w, -w), (a, -w)]
    turned = [(-v, u) for u, v in quarter]
    return quarter + turned + [(-u, -v) for u, v in quarter + turned]


def _cloth_points(corners: int = 16) -> list[tuple[float, float]]:
    """A dome that widens to a wavy hem."""
    dome = [math.pi * (1 + k / corners) for k in range(corners + 1)]
    top = [(0.62 * math.cos(a), 0.84 * math.sin(a) - 0.04) for a in dome]
    hem = [(0.8 - 1.6 * k / 24, 0.58 + 0.07 * math.cos(k / 24 * 6 * math.pi)) for k in range(25)]
    return top + hem


def _moon(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A disc with a bite: its fat side is left."""
    disc = np.hypot(u - 0.1, v) - 0.9
    bite = np.hypot(u - 0.62, v + 0.08) - 0.74
    return np.maximum(disc, -bite)


_DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "ball": lambda u, v: np.hypot(u, v) - 0.92,
    "square": _polygon([(-0.66, -0.66), (0.66, -0.66), (0.66, 0.66), (-0.66, 0.66)], 0.06),
    "triangle": _polygon([(0, -0.9), (0.86, 0.6), (-0.86, 0.6)], 0.06),
    "star": _polygon(_star_points(5, inner=0.4, outer=0.97), 0.03),
    "heart": _polygon(_heart_points(), 0.02),
    "cross": _polygon(_cross_points(arm=0.86, half_width=0.25), 0.05),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - (0.98 + HOLE) / 2) - (0.98 - HOLE) / 2,
    "moon": _moon,
    COVERED: _polygon(_cloth_points(), 0.05),
}


@lru_cache(maxsize=65536)
def gap(first: Thing, second: Thing) -> float:
    """Distance in px between two outlines, negative where the things overlap.

    At the point halfway between two outlines the larger of the two distances is smallest, and is
    half the gap; so the minimum over a fine grid suffices. Things far apart get a lower bound, the
    distance of their enclosing circles.
    """
    apart = math.hypot(first.x - second.x, first.y - second.y) - first.radius - second.radius
    if apart > 0.6 * min(first.radius, second.radius):
        return apart
    margin = 2 + max(apart, 0) / 2
    axes = []
    for one, other in ((first.x, second.x), (first.y, second.y)):
        low = max(one - first.radius, other - second.radius) - margin
        axes.append(np.arange(low, min(one + first.radius, other + second.radius) + margin, 0.5))
    x, y = np.meshgrid(*axes)
    return float(2 * np.maximum(_distance_to(first, x, y), _distance_to(second, x, y)).min())


def _distance_to(thing: Thing, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return thing.radius * _look_up(_sculpt(thing.shape).distance, *_turned(thing, x, y))


def _turned(thing: Thing, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image coordinates in the thing's own frame, where its radius is 1."""
    cos, sin = math.cos(thing.angle) / thing.radius, math.sin(thing.angle) / thing.radius
    x, y = x - thing.x, y - thing.y
    return x * cos + y * sin, y * cos - x * sin


def _window(
    thing: Thing, image_px: int, border: int
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """The part of the picture around a thing, and its pixel centres in the thing's own frame."""
    edges = []
    for centre in (thing.y, thing.x):
        low = max(0, math.floor(centre - thing.radius) - border)
        edges.append((low, min(image_px, math.ceil(centre + thing.radius) + border)))
    (y0, y1), (x0, x1) = edges
    x = np.arange(x0, x1, dtype=np.float32)[None, :] + 0.5
    y = np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5
    u, v = _turned(thing, x, y)
    return (slice(y0, y1), slice(x0, x1)), u, v


# Drawing -------------------------------------------------------------------------------------

# All far from the colours of things: little saturation, middle lightness.
GROUNDS = (
    (176, 166, 150), (150, 158, 168), (160, 168, 152), (172, 160, 166),
    (140, 142, 148), (184, 178, 168), (146, 160, 160), (166, 154, 142),
)  # fmt: skip


def render(scene: Scene, rng: np.random.Generator | int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Parameters
    ----------
    scene : Scene
    rng : numpy.random.Generator or int
        Decides the ground only; an int is a seed.

    Returns
    -------
    image : uint8 array, shape (row, column, 3)
    object_map : uint8 array, shape (row, column)
        0 on the ground, i + 1 on the visible pixels of `scene.things[i]`.
    """
    canvas = _ground(np.random.default_rng(rng), scene.image_px)
    object_map = np.zeros(canvas.shape[:2], dtype=np.uint8)
    for number, thing in enumerate(scene.things, start=1):
        _draw(canvas, object_map, thing, number)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), object_map


def _ground(rng: np.random.Generator, image_px: int) -> np.ndarray:
    """A muted colour, soft clouds, one faint pattern and a little grain; (row, column, 3)."""
    base = np.array(GROUNDS[int(rng.integers(len(GROUNDS)))], dtype=np.float32)
    axis = np.linspace(0, 1, image_px, dtype=np.float32)
    u, v = axis[None, :], axis[:, None]
    angle = rng.uniform(0, math.pi)
    across = u * np.float32(math.cos(angle)) + v * np.float32(math.sin(angle))
    along = v * np.float32(math.cos(angle)) - u * np.float32(math.sin(angle))
    waves = np.float32(2 * math.pi * rng.uniform(5, 11))
    pattern = int(rng.integers(5))
    if pattern == 0:  # stripes
        texture = np.sin(waves * across)
    elif pattern == 1:  # checks
        texture = np.sign(np.sin(waves * across) * np.sin(waves * along))
    elif pattern == 2:  # dots
        texture = np.clip(3 * np.sin(waves * across) * np.sin(waves * along) - 1.5, -0.3, 1)
    elif pattern == 3:  # wood
        texture = np.sin(waves * across + 3 * np.sin(4 * along + np.float32(rng.uniform(0, 6))))
    else:  # plain
        texture = np.zeros((image_px, image_px), dtype=np.float32)
    coarse = Image.fromarray(rng.standard_normal((6, 6), dtype=np.float32))
    clouds = np.asarray(coarse.resize((image_px, image_px), Image.Resampling.BICUBIC))
    grain = rng.standard_normal((image_px, image_px), dtype=np.float32)
    lightness = np.float32(rng.uniform(2, 4)) * texture + 5 * clouds + grain
    lightness += 10 * (0.5 - v)  # lit from above
    return base + lightness[:, :, None]


def _draw(canvas: np.ndarray, object_map: np.ndarray, thing: Thing, number: int) -> None:
    """Paint one thing and its soft shadow over what is there."""
    _shade_ground(canvas, thing)
    window, u, v = _window(thing, len(canvas), border=1)
    sculpture = _sculpt(thing.shape)
    inward = -thing.radius * _look_up(sculpture.distance, u, v)  # px
    paint = np.array(COLOURS[thing.colour], dtype=np.float32)
    paint = paint * _look_up(sculpture.shade[thing.material], u, v)[:, :, None]
    if thing.material == "shiny":
        gloss = _look_up(sculpture.gloss, u, v)[:, :, None]
        paint += gloss * (255 - paint)
    cover = np.clip(0.5 + inward, 0, 1)[:, :, None]
    canvas[window] += cover * (np.minimum(paint, 255) - canvas[window])
    object_map[window][inward > 0] = number


def _shade_ground(canvas: np.ndarray, thing: Thing) -> None:
    """A soft shadow down and to the right, on the ground and on what lies deeper."""
    shift = max(1, round(0.018 * len(canvas)))
    fallen = replace(thing, x=thing.x + shift, y=thing.y + shift)
    window, u, v = _window(fallen, len(canvas), border=shift)
    inward = -thing.radius * _look_up(_sculpt(thing.shape).distance, u, v)
    depth = np.clip(0.5 + inward / (3 * shift), 0, 1)
    canvas[window] *= (1 - 0.38 * depth * depth)[:, :, None]


# Writing -------------------------------------------------------------------------------------


class SceneSettings(BaseModel):
    """How many scenes of which kind; equal settings give equal files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int = Field(4000, ge=1, description="training images")
    val: int = Field(400, ge=0, description="validation images")
    test: int = Field(400, ge=0, description="test images")
    image_px: int = Field(96, ge=32, le=1024, description="side of the square images")
    difficulty: Difficulty = Field("easy", description="2-4, 3-6 or 4-8 things an image")
    seed: int = Field(0, ge=0)
    generator: Literal[1] = Field(1, description="version of the generator")


def scene_of(settings: SceneSettings, split: str, index: int) -> Scene:
    """Scene `index` of a split, without any file."""
    rng = _rng(settings, split, index, stream=0)
    return sample_scene(rng, image_px=settings.image_px, difficulty=settings.difficulty)


def _rng(settings: SceneSettings, split: str, index: int, stream: int) -> np.random.Generator:
    """Streams: 0 the scene, 1 its ground, 2 its texts, 3 the statements about a group of four."""
    return np.random.default_rng([settings.seed, SPLITS.index(split), index, stream])


def write_scenes(
    folder: Path, settings: SceneSettings, *, processes: int | None = None, progress: bool = True
) -> Path:
    """Write a data set of scenes, complete or not at all.

    Parameters
    ----------
    folder : Path
        Created. If it holds these very settings already, nothing is done.
    settings : SceneSettings
    processes : int, optional
        Default: the number of usable cores. The files do not depend on it.
    progress : bool
        Show a progress bar once the work has taken two seconds.

    Returns
    -------
    Path
        `folder`, with `images.zip`, `object_maps.zip`, `dataset_scenes.json` (Karpathy), the
        questions and annotations of VQA v2, `nlvr2/`, `snli_ve_*.jsonl` and `settings.json`.

    Raises
    ------
    FileExistsError
        If `folder` holds something else.
    OSError
        If it cannot be written, for example on a full disk; nothing is left behind.
    """
    folder = Path(folder)
    if _is_written(folder, settings):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_all(draft, settings, processes, progress)
        draft.chmod(0o755)  # mkdtemp made it private
        _publish(draft, folder, settings)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        raise OSError(
            error.errno,
            f"could not write the scenes to {folder}: {error.strerror or error}; "
            "the unfinished files were removed. Free some space or choose another folder",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _is_written(folder: Path, settings: SceneSettings) -> bool:
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError):
        raise FileExistsError(
            f"{folder} exists and holds no generated scenes; choose another folder"
        ) from None
    wanted = settings.model_dump()
    if found == wanted:
        return True
    differing = [key for key in wanted | found if wanted.get(key) != found.get(key)]
    changes = "; ".join(
        f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} asked" for key in differing
    )
    raise FileExistsError(
        f"{folder} holds scenes of other settings ({changes}); "
        "choose another folder, or delete this one to have it written anew"
    )


def _publish(draft: Path, folder: Path, settings: SceneSettings) -> None:
    """Files to disk first, the name last: a folder that exists is complete."""
    paths = [*draft.rglob("*"), draft]
    for path in paths:
        if os.name == "posix" or path.is_file():  # Windows cannot open folders
            handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    try:
        draft.rename(folder)
    except OSError:
        if not _is_written(folder, settings):  # else another process was faster, with equal files
            raise


class _Part(NamedTuple):
    """The texts and bytes of some neighbouring images of one split, ready to be written."""

    split: str
    pictures: list[tuple[str, bytes]]  # file name, PNG
    object_maps: list[tuple[str, bytes]]
    pair_pictures: list[tuple[str, bytes]]
    entries: list[str]  # JSON, as are all below
    questions: list[str]
    annotations: list[str]
    statements: list[str]
    hypotheses: list[str]


GROUP = 4  # images that share two statements, as two pairs
PART = 16 * GROUP


def _write_all(draft: Path, settings: SceneSettings, processes: int | None, progress: bool) -> None:
    counts = {"train": settings.images, "val": settings.val, "test": settings.test}
    tasks = [
        (settings, split, start, min(start + PART, count))
        for split, count in counts.items()
        for start in range(0, count, PART)
    ]
    bar = tqdm(total=sum(counts.values()), unit=" images", delay=2, disable=not progress)
    with ExitStack() as stack:
        stack.enter_context(bar)
        files = stack.enter_context(_Files(draft, [split for split in counts if counts[split]]))
        for part in _parts(tasks, processes or _usable_cores(), stack):
            files.write(part)
            bar.update(len(part.pictures))
    (draft / "settings.json").write_text(settings.model_dump_json(indent=2) + "\n")


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _parts(tasks: list[tuple], processes: int, stack: ExitStack) -> Iterator[_Part]:
    """Parts in order; a few are made ahead, never all, so that memory stays small."""
    processes = min(processes, len(tasks))
    if processes <= 1:
        yield from map(_make_part, tasks)
        return
    pool = ProcessPoolExecutor(processes, initializer=_ignore_interrupt)
    stack.callback(pool.shutdown, cancel_futures=True)
    waiting = iter(tasks)
    ahead = [pool.submit(_make_part, task) for task in islice(waiting, 3 * processes)]
    while ahead:
        yield ahead.pop(0).result()
        ahead += [pool.submit(_make_part, task) for task in islice(waiting, 1)]


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers


def _make_part(task: tuple[SceneSettings, str, int, int]) -> _Part:
    settings, split, start, stop = task
    part = _Part(split, *([] for _ in _Part._fields[1:]))
    scenes = [scene_of(settings, split, index) for index in range(start, stop)]
    for index, scene in enumerate(scenes, start):
        image, object_map = render(scene, _rng(settings, split, index, stream=1))
        name = f"{split}-{index:06d}.png"
        part.pictures.append((name, _png(image)))
        part.object_maps.append((name, _png(object_map)))
        _add_texts(part, scene, index, _rng(settings, split, index, stream=2))
    for first in range(0, len(scenes) - GROUP + 1, GROUP):
        rng = _rng(settings, split, start + first, stream=3)
        _add_pairs(part, scenes[first : first + GROUP], first, start + first, rng)
    return part


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _image_id(split: str, index: int) -> int:
    return SPLITS.index(split) * 10_000_000 + index


def _add_texts(part: _Part, scene: Scene, index: int, rng: np.random.Generator) -> None:
    """Captions, questions and hypotheses of one image."""
    from vpworkbench.data import language  # it reads this module's scenes

    name, number = f"{part.split}-{index:06d}", _image_id(part.split, index)
    captions = language.captions(scene, rng)
    sentences = [
        {"raw": text, "tokens": text.split(), "imgid": number, "sentid": number * 5 + k}
        for k, text in enumerate(captions)
    ]
    entry = {
        "filename": f"{name}.png", "imgid": number, "split": part.split,
        "sentids": [sentence["sentid"] for sentence in sentences], "sentences": sentences,
    } | scene.to_json()  # fmt: skip
    part.entries.append(json.dumps(entry))
    for k, question in enumerate(language.questions(scene, rng)):
        ids = {"image_id": number, "question_id": number * 1000 + k}
        part.questions.append(json.dumps(ids | {"question": question.text}))
        annotation = ids | {
            "question_type": question.kind, "answer_type": question.answer_type,
            "multiple_choice_answer": question.answer,
            "answers": language.ten_answers(question, rng),
        }  # fmt: skip
        part.annotations.append(json.dumps(annotation))
    for k, (text, label) in enumerate(language.hypotheses(scene, captions[0], rng)):
        line = {
            "Flickr30K_ID": name, "sentence1": captions[0], "sentence2": text,
            "gold_label": label, "annotator_labels": [label],
            "captionID": f"{name}.png#0", "pairID": f"{name}.png#0r{k}{label[0]}",
        }  # fmt: skip
        part.hypotheses.append(json.dumps(line))


NLVR2_SPLITS = {"train": "train", "val": "dev", "test": "test1"}


def _add_pairs(
    part: _Part, scenes: Sequence[Scene], first: int, index: int, rng: np.random.Generator
) -> None:
    """Two statements on two pairs of images; each is true of one pair and false of the other."""
    from vpworkbench.data import language

    pairs = ((scenes[0], scenes[1]), (scenes[2], scenes[3]))
    statements = language.pair_statements(*pairs, rng)
    split, group = NLVR2_SPLITS[part.split], index // GROUP
    for pair in (0, 1) if statements else ():
        sources = part.pictures[first + 2 * pair : first + 2 * pair + 2]
        for side, (_, png) in enumerate(sources):
            part.pair_pictures.append((f"{split}-{group}-{pair}-img{side}.png", png))
        for k, sentence in enumerate(statements):
            line = {
                "sentence": sentence, "label": str(k == pair), "synset": "scene",
                "identifier": f"{split}-{group}-{pair}-{k}",
                "left_url": sources[0][0], "right_url": sources[1][0],
            }  # fmt: skip
            part.statements.append(json.dumps(line))


class _Files:
    """The open files of a data set; parts are added in order."""

    def __init__(self, folder: Path, splits: Sequence[str]) -> None:
        self.stack = ExitStack()
        (folder / "nlvr2").mkdir()
        try:
            self.pictures = self._zip(folder / "images.zip")
            self.object_maps = self._zip(folder / "object_maps.zip")
            self.pair_pictures = self._zip(folder / "nlvr2" / "images.zip")
            info = {"dataset": "scenes"}
            self.entries = self._list(folder / "dataset_scenes.json", "images", info)
            self.questions, self.annotations, self.statements, self.hypotheses = {}, {}, {}, {}
            for split in splits:
                info = _vqa_header(split)
                name = f"v2_OpenEnded_scenes_{split}_questions.json"
                self.questions[split] = self._list(folder / name, "questions", info)
                name = f"v2_scenes_{split}_annotations.json"
                self.annotations[split] = self._list(folder / name, "annotations", info)
                published = NLVR2_SPLITS[split]
                self.statements[split] = self._open(folder / "nlvr2" / f"{published}.json")
                published = {"val": "dev"}.get(split, split)
                self.hypotheses[split] = self._open(folder / f"snli_ve_{published}.jsonl")
        except BaseException:
            self.stack.close()
            raise

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.__exit__(*error)

    def write(self, part: _Part) -> None:
        """Append a part to every file."""
        for name, png in part.pictures:
            _store(self.pictures, f"images/{name}", png)
        for name, png in part.object_maps:
            _store(self.object_maps, f"object_maps/{name}", png)
        for name, png in part.pair_pictures:
            _store(self.pair_pictures, f"images/{name}", png)
        self.entries.add(part.entries)
        self.questions[part.split].add(part.questions)
        self.annotations[part.split].add(part.annotations)
        self.statements[part.split].writelines(line + "\n" for line in part.statements)
        self.hypotheses[part.split].writelines(line + "\n" for line in part.hypotheses)

    def _open(self, path: Path) -> Any:
        return self.stack.enter_context(path.open("w", encoding="utf-8"))

    def _zip(self, path: Path) -> zipfile.ZipFile:
        return self.stack.enter_context(zipfile.ZipFile(path, "w", zipfile.ZIP_STORED))

    def _list(self, path: Path, key: str, header: dict[str, Any]) -> _JsonList:
        return self.stack.enter_context(_JsonList(self._open(path), key, header))


def _store(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name), data)  # ZipInfo's date is fixed: equal files


def _vqa_header(split: str) -> dict[str, Any]:
    return {
        "info": {"description": "Generated scenes in the format of VQA v2", "version": "2.0"},
        "license": {"name": "generated"},
        "data_type": "scenes",
        "data_subtype": split,
        "task_type": "Open-Ended",
    }


class _JsonList:
    """A JSON object whose last key is a long list, written as it comes."""

    def __init__(self, file: Any, key: str, header: dict[str, Any]) -> None:
        self.file, self.separator = file, ""
        file.write(json.dumps(header)[:-1] + f', "{key}": [\n')

    def add(self, items: Sequence[str]) -> None:
        """Append items that are JSON already."""
        for item in items:
            self.file.write(self.separator + item)
            self.separator = ",\n"

    def __enter__(self) -> _JsonList:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.write("\n]}\n")
