"""Sample scenes: first which things there are, then a layout in which all of them can be recognised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.ndimage import find_objects

from vpworkbench.scenes.drawing import gap, mask_of
from vpworkbench.scenes.scene import COLOURS, COVERED, MATERIALS, SHAPES, SIZES, SPLITS, Scene, Thing
from vpworkbench.settings.scenes import SceneSettings


class Level(NamedTuple):
    """The meaning of a difficulty; lengths are shares of the image's side."""

    things: tuple[int, int]  # fewest, most
    radii: tuple[float, float, float]  # small, medium, large
    visible: float  # smallest visible share of any thing
    overlapping: float  # probability that a thing is laid over another one
    touching: float  # probability that a thing is set against another one


LEVELS: dict[str, Level] = {
    "easy": Level((2, 4), (0.110, 0.146, 0.188), visible=0.7, overlapping=0.05, touching=0.12),
    "medium": Level((3, 6), (0.094, 0.128, 0.165), visible=0.6, overlapping=0.2, touching=0.12),
    "hard": Level((4, 8), (0.078, 0.108, 0.142), visible=0.5, overlapping=0.45, touching=0.12),
}
COVERED_SHARE = 0.3  # of the scenes
CLEARANCE = 0.045  # smallest distance of things that do not touch, as a share of the side
INSIDE_CHANCE = 0.3  # probability that another thing is put into a ring, where there is one
LAYOUTS = 30  # tried for the same things, so that large things stay as frequent as small ones


def scene_of(settings: SceneSettings, split: str, index: int) -> Scene:
    """Scene `index` of a split; writes no file."""
    return sample_scene(scene_rng(settings, split, index, stream=0), LEVELS[settings.difficulty], settings.image_px)


def sample_scene(rng: np.random.Generator, level: Level, image_px: int) -> Scene:
    """A scene with at least two uncovered things of different colour or shape."""
    while True:
        kinds = _sample_kinds(rng, level)
        for _ in range(LAYOUTS):
            things = _lay_out(rng, kinds, level, image_px)
            things = things and with_boxes(things, image_px, level.visible)
            if things:
                return Scene(tuple(things), image_px)


def scene_rng(settings: SceneSettings, split: str, index: int, stream: int) -> np.random.Generator:
    """Streams: 0 the scene, 1 its ground, 2 its texts, 3 the statements about a group of four."""
    return np.random.default_rng([settings.seed, SPLITS.index(split), index, stream])


class _Kind(NamedTuple):
    shape: str
    colour: str
    size: int  # index into SIZES
    material: str
    ring: int | None = None  # index of the ring that holds it


def _sample_kinds(rng: np.random.Generator, level: Level) -> list[_Kind]:
    """Independent uniform attributes; then some things are made to share a colour, a shape or both."""
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
    kinds[other] = kinds[other]._replace(size=0, ring=ring)
    return kinds


def _lay_out(rng: np.random.Generator, kinds: Sequence[_Kind], level: Level, image_px: int) -> list[Thing] | None:
    """Place large things first; None if one of them finds no place."""
    order = sorted(range(len(kinds)), key=lambda i: (kinds[i].ring is not None, -kinds[i].size))
    placed: dict[int, Thing] = {}
    for i in order:
        shape, colour, size, material, ring = kinds[i]
        radius = round(level.radii[size] * image_px * float(rng.uniform(0.97, 1.03)), 2)
        angle = round(float(rng.uniform(-0.25, 0.25)), 3)
        thing = Thing(shape, colour, SIZES[size], material, x=0.0, y=0.0, radius=radius, angle=angle, depth=0)
        if ring is not None:
            holder = placed[ring]
            place = holder.x + float(rng.uniform(-1, 1)), holder.y + float(rng.uniform(-1, 1))
        else:
            place = _find_place(rng, thing, list(placed.values()), level, image_px)
        if place is None:
            return None
        placed[i] = replace(thing, x=round(place[0], 2), y=round(place[1], 2))
    depths = rng.permutation(len(kinds))
    return [replace(placed[int(i)], depth=depth) for depth, i in enumerate(depths)]


def _find_place(
    rng: np.random.Generator, thing: Thing, others: Sequence[Thing], level: Level, image_px: int
) -> tuple[float, float] | None:
    """A random free place, or one at or over another thing, as often as the level says."""
    chance = rng.random() - level.touching
    if others and chance < level.overlapping:
        return _find_contact(rng, thing, others, image_px, touching=chance < 0)
    for x, y in rng.uniform(thing.radius + 1, image_px - thing.radius - 1, size=(40, 2)):
        if is_free(x, y, thing.radius, others, image_px):
            return float(x), float(y)
    return None


def is_free(x: float, y: float, radius: float, others: Sequence[Thing], image_px: int) -> bool:
    """Whether a circle of this centre and radius is in the image and clear of all other things."""
    low, high = radius + 1, image_px - radius - 1
    if not (low <= x <= high and low <= y <= high):
        return False
    reach = radius + CLEARANCE * image_px
    return all(math.hypot(x - other.x, y - other.y) >= reach + other.radius for other in others)


def _find_contact(
    rng: np.random.Generator, thing: Thing, things: Sequence[Thing], image_px: int, *, touching: bool
) -> tuple[float, float] | None:
    """A place where `thing` just touches, or partly covers, another thing."""
    for _ in range(8):
        partner = things[int(rng.integers(len(things)))]
        if partner.shape == "ring" and not touching:
            continue  # a thing over a ring might be taken to lie inside it
        others = [other for other in things if other is not partner]
        direction = float(rng.uniform(0, 2 * math.pi))
        step = (math.cos(direction), math.sin(direction))
        distance = (thing.radius + partner.radius) * float(rng.uniform(0.72, 0.9))
        place = (partner.x + step[0] * distance, partner.y + step[1] * distance)
        if touching and is_free(*place, thing.radius, others, image_px):
            place = _contact(thing, partner, step)
        if is_free(*place, thing.radius, others, image_px):
            return place
    return None


def _contact(thing: Thing, partner: Thing, step: tuple[float, float]) -> tuple[float, float]:
    """Approach by the gap, again and again: the outlines meet and never cross."""
    distance = thing.radius + partner.radius
    for _ in range(4):
        moved = replace(thing, x=partner.x + step[0] * distance, y=partner.y + step[1] * distance)
        distance -= gap(moved, partner)
    return partner.x + step[0] * distance, partner.y + step[1] * distance


def with_boxes(things: Sequence[Thing], image_px: int, visible: float) -> list[Thing] | None:
    """The things with the boxes of their visible pixels; None if too much of one is hidden."""
    pixels = []
    owner = np.zeros((image_px, image_px), dtype=np.uint8)
    for number, thing in enumerate(things, start=1):
        window, mask = mask_of(thing, image_px)
        owner[window][mask] = number
        pixels.append(mask.sum())
    seen = np.bincount(owner.ravel(), minlength=len(things) + 1)[1:]
    if (seen < visible * np.array(pixels)).any():
        return None
    edges = [(x.start, y.start, x.stop, y.stop) for y, x in find_objects(owner)]
    return [replace(thing, box=tuple(map(float, box))) for thing, box in zip(things, edges, strict=True)]
