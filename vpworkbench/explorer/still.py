"""Pictures of the views, for GitHub and for browsers without scripts."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vpworkbench.figures.pictures import darkened
from vpworkbench.figures.style import COLOURS, VISION

INCH_PX = 100
HIDDEN = 74  # grey of a hidden token


def blank(width_px: int, height_px: int) -> Figure:
    return Figure(figsize=(width_px / INCH_PX, height_px / INCH_PX), dpi=INCH_PX, layout="constrained")


def png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.title.set_fontsize(8)
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_fontsize(7)
        axes.yaxis.label.set_fontsize(7)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor="white")
    return stream.getvalue()


class OnImage(Protocol):
    """An image, uint8 (height, width, 3), and the boxes of its tokens, (token, 4), shares of it."""

    image: np.ndarray
    boxes: np.ndarray
    on_grid: bool


def panel(axes: Axes, reading: OnImage, kind: str, values: np.ndarray, title: str, pick: int | None = None) -> None:
    """The image with the values of its tokens on top, as the page draws them; small boxes are above large ones."""
    height, width = reading.image.shape[:2]
    corners, pixels = reading.boxes * [width, height, width, height], np.zeros((height, width))
    areas = (reading.boxes[:, 2:] - reading.boxes[:, :2]).prod(axis=1)
    for place in np.argsort(-areas, kind="stable"):
        x0, y0, x1, y1 = corners[place].round().astype(int)
        pixels[y0:y1, x0:x1] = values[place]
    if kind == "shade":
        axes.imshow(darkened(reading.image, pixels))
    else:  # nothing is hidden on a plain image
        axes.imshow(np.where(pixels[..., None] >= 0.5, HIDDEN, reading.image))
    outlines = [] if reading.on_grid else [(corner, "white", 1) for corner in corners]
    outlines += [] if pick is None else [(corners[pick], VISION, 2)]
    for corner, colour, thickness in outlines:
        x0, y0, x1, y1 = corner - 0.5
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, lw=thickness))
    axes.set_title(title)
    axes.set_axis_off()


def curves(axes: Axes, values: np.ndarray, null: np.ndarray, title: str, colour: str) -> None:
    """Shares by layer, solid, and their null, dashed."""
    layers = np.arange(1, len(values) + 1)
    axes.plot(layers, values, marker="o", ms=3, color=colour)
    axes.plot(layers, null, ls="--", color=colour)
    axes.set(title=title, xlabel="layer", xticks=layers[:: max(1, len(layers) // 6)])
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.set_ylim(bottom=0, auto=True)  # another model's curve may be higher


def matrix(
    axes: Axes,
    values: np.ndarray,
    title: str,
    row_name: str,
    column_name: str,
    hatched: Sequence[Sequence[int]] = (),
    **limits: float,
) -> None:
    """A map; `hatched` are boxes of cells, first row and column, then those after the last."""
    axes.imshow(values, cmap=COLOURS.lower(), aspect="auto", interpolation="nearest", **limits)
    for top, left, bottom, right in hatched:
        corner, sides = (left - 0.5, top - 0.5), (right - left, bottom - top)
        axes.add_patch(Rectangle(corner, *sides, facecolor=[HIDDEN / 255] * 3, edgecolor="white", hatch="///", lw=0))
    axes.set(title=title, ylabel=row_name, xlabel=column_name)
    for axis, count in zip((axes.yaxis, axes.xaxis), values.shape, strict=True):
        places = np.arange(0, count, max(1, math.ceil(count / 6)))
        axis.set_ticks(places, places + 1)  # layers and heads are counted from 1, as in the page


def shortened(text: str, letters: int) -> str:
    plain = text.replace("$", r"\$")  # matplotlib reads $ as mathematics
    return plain if len(plain) <= letters else f"{plain[: letters - 1]}…"
