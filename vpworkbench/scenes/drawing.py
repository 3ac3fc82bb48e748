"""Paint scenes: a muted textured ground, soft shadows, and each thing in its colour and material.

Every shape is a signed distance to an outline of radius 1. The same outlines decide how a thing is painted, how much of
it is visible, and how far apart two things are (`gap`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import map_coordinates

from vpworkbench.scenes.scene import COLOURS, COVERED, Scene, Thing

# All far from the colours of things: little saturation, middle lightness.
GROUNDS = (
    (176, 166, 150),
    (150, 158, 168),
    (160, 168, 152),
    (172, 160, 166),
    (140, 142, 148),
    (184, 178, 168),
    (146, 160, 160),
    (166, 154, 142),
)
HOLE = 0.66  # inner radius of a ring of radius 1
EXTENT = 1.6  # the grid of a shape spans [-EXTENT, EXTENT] in both directions
STEPS = 97  # points on a side of that grid


def render(scene: Scene, rng: np.random.Generator | int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene: uint8 image (row, column, 3), and uint8 map of its things (row, column).

    The map is 0 on the ground, i + 1 on the visible pixels of `scene.things[i]`. `rng`, or a seed, only decides the
    ground.
    """
    canvas = _ground(np.random.default_rng(rng), scene.image_px)
    object_map = np.zeros(canvas.shape[:2], dtype=np.uint8)
    for number, thing in enumerate(scene.things, start=1):
        _draw(canvas, object_map, thing, number)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), object_map


def mask_of(thing: Thing, image_px: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """A window around a thing, and a bool array (row, column) of the pixels in it that the thing covers."""
    window, inward, _, _ = _window(thing, image_px, border=1)
    return window, inward > 0


@lru_cache(maxsize=65536)
def gap(first: Thing, second: Thing) -> float:
    """Distance in px between two outlines, negative where the things overlap.

    At the point halfway between two outlines, the larger of the two distances is smallest, and is half the gap; so the
    minimum over a fine grid suffices. Things far apart get a lower bound: the distance of their enclosing circles.
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
    distances = [
        thing.radius * _look_up(_sculpt(thing.shape).distance, *_turned(thing, x, y)) for thing in (first, second)
    ]
    return float(2 * np.maximum(*distances).min())


# ---------------------------------------------------------------------------------------------------- painting


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
    """Paint one thing and its soft shadow over the canvas."""
    _draw_shadow(canvas, thing)
    window, inward, u, v = _window(thing, len(canvas), border=1)
    sculpture = _sculpt(thing.shape)
    paint = np.array(COLOURS[thing.colour], dtype=np.float32)
    paint = paint * _look_up(sculpture.shade[thing.material], u, v)[:, :, None]
    if thing.material == "shiny":
        gloss = _look_up(sculpture.gloss, u, v)[:, :, None]
        paint += gloss * (255 - paint)
    cover = np.clip(0.5 + inward, 0, 1)[:, :, None]
    canvas[window] += cover * (np.minimum(paint, 255) - canvas[window])
    object_map[window][inward > 0] = number


def _draw_shadow(canvas: np.ndarray, thing: Thing) -> None:
    """A soft shadow down and to the right, on the ground and on deeper things."""
    shift = max(1, round(0.018 * len(canvas)))
    shadow = replace(thing, x=thing.x + shift, y=thing.y + shift)
    window, inward, _, _ = _window(shadow, len(canvas), border=shift)
    depth = np.clip(0.5 + inward / (3 * shift), 0, 1)
    canvas[window] *= (1 - 0.38 * depth * depth)[:, :, None]


def _window(thing: Thing, image_px: int, border: int) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray]:
    """The part of the picture around a thing; for each pixel, px inside the outline, and its u and v."""
    edges = []
    for centre in (thing.y, thing.x):
        low = max(0, math.floor(centre - thing.radius) - border)
        edges.append((low, min(image_px, math.ceil(centre + thing.radius) + border)))
    (y0, y1), (x0, x1) = edges
    x = np.arange(x0, x1, dtype=np.float32)[None, :] + 0.5
    y = np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5
    u, v = _turned(thing, x, y)
    inward = -thing.radius * _look_up(_sculpt(thing.shape).distance, u, v)
    return (slice(y0, y1), slice(x0, x1)), inward, u, v


def _turned(thing: Thing, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image coordinates in the thing's own frame, where its radius is 1."""
    cos, sin = math.cos(thing.angle) / thing.radius, math.sin(thing.angle) / thing.radius
    x, y = x - thing.x, y - thing.y
    return x * cos + y * sin, y * cos - x * sin


# ------------------------------------------------------------------------------------------------------ shapes


class _Sculpture(NamedTuple):
    """A shape of radius 1 on a grid; all arrays (row, column)."""

    distance: np.ndarray  # to the outline, negative inside
    shade: dict[str, np.ndarray]  # material -> factor on the colour
    gloss: np.ndarray  # share of white that a shiny thing reflects


@cache
def _sculpt(shape: str) -> _Sculpture:
    """The fields of a shape, computed once: the bevelled outline, lit from the upper left."""
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
    distance, matte, shiny, gloss = (field.astype(np.float32) for field in (distance, matte, shiny, gloss))
    return _Sculpture(distance, {"matte": matte, "shiny": shiny}, gloss)


def _look_up(field: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Values of a field at points of the shape's own frame, interpolated."""
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
            nearest = np.minimum(nearest, np.hypot(u - u0 - share * along_u, v - v0 - share * along_v))
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
    """A crescent: a disc without a second disc."""
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
