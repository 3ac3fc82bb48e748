"""Paint scenes: a muted textured ground, soft shadows, and each thing in its colour and material."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from PIL import Image

from vpworkbench.scenes.scene import COLOURS, Scene, Thing
from vpworkbench.scenes.shapes import look_up, sculpt, window_of

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
    window, u, v = window_of(thing, len(canvas), border=1)
    sculpture = sculpt(thing.shape)
    inward = -thing.radius * look_up(sculpture.distance, u, v)  # px
    paint = np.array(COLOURS[thing.colour], dtype=np.float32)
    paint = paint * look_up(sculpture.shade[thing.material], u, v)[:, :, None]
    if thing.material == "shiny":
        gloss = look_up(sculpture.gloss, u, v)[:, :, None]
        paint += gloss * (255 - paint)
    cover = np.clip(0.5 + inward, 0, 1)[:, :, None]
    canvas[window] += cover * (np.minimum(paint, 255) - canvas[window])
    object_map[window][inward > 0] = number


def _shade_ground(canvas: np.ndarray, thing: Thing) -> None:
    """A soft shadow down and to the right, on the ground and on what lies deeper."""
    shift = max(1, round(0.018 * len(canvas)))
    fallen = replace(thing, x=thing.x + shift, y=thing.y + shift)
    window, u, v = window_of(fallen, len(canvas), border=shift)
    inward = -thing.radius * look_up(sculpt(thing.shape).distance, u, v)
    depth = np.clip(0.5 + inward / (3 * shift), 0, 1)
    canvas[window] *= (1 - 0.38 * depth * depth)[:, :, None]
