"""One PNG for each view, for GitHub and for browsers without scripts."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vpworkbench.explorer.flow import MODELS, FlowView
from vpworkbench.explorer.masks import CAPTIONS, KINDS, MasksView
from vpworkbench.explorer.readings import Reading
from vpworkbench.explorer.words import GRID, WordsView
from vpworkbench.figures.style import COLOURS, GREY, LANGUAGE, VISION

INCH_PX = 100


def overview(readings: Sequence[Reading], masks: MasksView | None) -> bytes:
    """The image, its mask and the flow curves, a row for each model."""
    figure = _figure(940, 250 * len(readings))
    rows = figure.subplots(len(readings), 4, squeeze=False)
    for number, (reading, axes) in enumerate(zip(readings, rows, strict=True)):
        axes[0].imshow(reading.image)
        axes[0].set_title(_shortened(f"{reading.subject.name}: {reading.text}", 26))
        axes[0].set_axis_off()
        shown = [] if masks is None else [place for place, one in enumerate(masks.readings) if one is reading]
        if shown:
            values = masks.values[shown[0]]
            kind = 2 if values[2].any() else 3  # by attention if there is one
            _panel(axes[1], reading, "mask", values[kind], CAPTIONS[kind], masks.pick)
        else:
            _panel(axes[1], reading, "plain", np.zeros(len(reading.boxes)), "")
        _curves(axes[2], reading.flow[0], reading.null[0], "flow from the input to layer j", MODELS[number])
        _curves(axes[3], reading.flow.diagonal(), reading.null.diagonal(), "flow within layer i", MODELS[number])
    return _png(figure)


def masks(view: MasksView, number: int) -> bytes:
    """The panels of one model."""
    reading, values, captions = view.readings[number], view.values[number], view.panels[number].captions
    figure = _figure(235 * len(captions), 260)
    for axes, caption in zip(figure.subplots(1, len(captions)), captions, strict=True):
        place = CAPTIONS.index(caption)
        _panel(axes, reading, KINDS[place], values[place], caption, view.pick)
    return _png(figure)


def words(view: WordsView, number: int) -> bytes:
    """The grid of layers and heads, then where the pinned word, or else the last one, looks on the image."""
    reading, reader = view.readings[number], view.readers[number]
    looks = view.attention(reading, view.maps[number].picked)["looks"]
    word = reader.pinned if 0 <= reader.pinned < len(reading.words) else len(reading.words) - 1
    figure = _figure(940, 260)
    *grid, image = figure.subplots(1, 4)
    for axes, name, values in zip(grid, GRID, reading.grid, strict=True):
        _matrix(axes, values, name, "layer", "head", vmin=0, vmax=1)
    _panel(image, reading, "shade", looks[word], _shortened(f"“{reading.words[word]}” looks here", 30))
    figure.supxlabel(_shortened(reading.text, 120), fontsize=8, color=GREY)
    return _png(figure)


def flow(view: FlowView) -> bytes:
    """The first model's triangle, the curves of all models, and the tokens of the chosen one."""
    reading = view.readings[0]
    figure = _figure(940, 260)
    triangle, from_input, within, nmi, points = figure.subplots(1, 5)
    _matrix(triangle, reading.flow, "flow from i to j", "from layer", "to layer")
    for one, colour in zip(view.readings, MODELS, strict=False):
        _curves(from_input, one.flow[0], one.null[0], "F from the input", colour)
        _curves(within, one.flow.diagonal(), one.null.diagonal(), "F within layer", colour)
        nmi.plot(range(len(one.nmi)), one.nmi, marker="o", ms=3, color=colour, label=one.subject.name)
    nmi.set(title="NMI", ylim=(-0.03, 1.03), xlabel="layer (0: input)")
    if len(view.readings) > 1:
        nmi.legend(fontsize=6)
    looks = zip(view.chosen.modalities, (LANGUAGE, VISION), ("language", "vision"), strict=True)
    for modality, colour, name in looks:
        points.scatter(*view.points[modality].T, s=8, color=colour, label=name)
    points.set(title=_shortened(view.points_title, 40), xticks=[], yticks=[])
    points.legend(fontsize=6)
    return _png(figure)


# ------------------------------------------------------------------------------------------------------ parts


def _figure(width_px: int, height_px: int) -> Figure:
    figure = Figure(figsize=(width_px / INCH_PX, height_px / INCH_PX), dpi=INCH_PX, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.title.set_fontsize(8)
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_fontsize(7)
        axes.yaxis.label.set_fontsize(7)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor="white")
    return stream.getvalue()


def _panel(axes: Axes, reading: Reading, kind: str, values: np.ndarray, title: str, pick: int | None = None) -> None:
    """The image with the values of its tokens on top, as the page draws them; small boxes are above large ones."""
    height, width = reading.image.shape[:2]
    pixels = np.zeros((height, width))
    edges = (reading.boxes * [width, height, width, height]).round().astype(int)
    areas = (reading.boxes[:, 2:] - reading.boxes[:, :2]).prod(axis=1)
    for place in np.argsort(-areas, kind="stable"):
        x0, y0, x1, y1 = edges[place]
        pixels[y0:y1, x0:x1] = values[place]
    ink = np.zeros((height, width, 4))
    if kind == "shade":
        ink[..., 3] = 0.8 * (1 - pixels / max(values.max(initial=0), 1e-12))
    elif kind == "mask":
        lines = np.add.outer(np.arange(height), np.arange(width)) % max(4, width // 24) == 0
        ink[...] = np.where(lines[..., None], 0.5, 0.17)
        ink[..., 3] = 0.94 * (pixels >= 0.5)
    axes.imshow(reading.image)
    axes.imshow(ink)
    outlines = [] if reading.on_grid else [(box, "white", 1) for box in reading.boxes]
    outlines += [] if pick is None else [(reading.boxes[pick], VISION, 2)]
    for box, colour, thickness in outlines:
        x0, y0, x1, y1 = box * [width, height, width, height] - 0.5
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, lw=thickness))
    axes.set_title(title)
    axes.set_axis_off()


def _curves(axes: Axes, values: np.ndarray, null: np.ndarray, title: str, colour: str) -> None:
    layers = np.arange(1, len(values) + 1)
    axes.plot(layers, values, marker="o", ms=3, color=colour)
    axes.plot(layers, null, ls="--", color=colour)
    axes.set(title=title, xlabel="layer", xticks=layers[:: max(1, len(layers) // 6)])
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.set_ylim(bottom=0, auto=True)  # another model's curve may be higher


def _matrix(axes: Axes, values: np.ndarray, title: str, row_name: str, column_name: str, **limits: float) -> None:
    axes.imshow(values, cmap=COLOURS.lower(), aspect="auto", interpolation="nearest", **limits)
    axes.set(title=title, ylabel=row_name, xlabel=column_name)
    for axis, count in zip((axes.yaxis, axes.xaxis), values.shape, strict=True):
        places = np.arange(0, count, max(1, math.ceil(count / 6)))
        axis.set_ticks(places, places + 1)  # layers and heads are counted from 1, as in the page


def _shortened(text: str, letters: int) -> str:
    plain = text.replace("$", r"\$")  # matplotlib reads $ as mathematics
    return plain if len(plain) <= letters else f"{plain[: letters - 1]}…"
