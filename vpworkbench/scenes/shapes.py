"""The shapes of things: signed distances and shading on a fixed grid, looked up wherever a thing is drawn.

The same outlines decide how far two things are apart (`gap`), how much of a thing is seen, and how
it is painted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from scipy.ndimage import map_coordinates

from vpworkbench.scenes.scene import COVERED, Thing

HOLE = 0.66  # inner radius of a ring of radius 1


class Sculpture(NamedTuple):
    """A shape of radius 1 on a grid; all arrays (row, column)."""

    distance: np.ndarray  # to the outline, negative inside
    shade: dict[str, np.ndarray]  # material -> factor on the colour
    gloss: np.ndarray  # how much white a shiny thing reflects


EXTENT = 1.6  # the grid spans [-EXTENT, EXTENT] in both directions
STEPS = 97


@cache
def sculpt(shape: str) -> Sculpture:
    """The fields of a shape, computed once."""
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


def look_up(field: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
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
    return thing.radius * look_up(sculpt(thing.shape).distance, *_turned(thing, x, y))


def _turned(thing: Thing, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image coordinates in the thing's own frame, where its radius is 1."""
    cos, sin = math.cos(thing.angle) / thing.radius, math.sin(thing.angle) / thing.radius
    x, y = x - thing.x, y - thing.y
    return x * cos + y * sin, y * cos - x * sin


def window_of(thing: Thing, image_px: int, border: int) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
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
