"""The views as pictures that need no browser: for GitHub, for a page with scripts off."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vpworkbench.explorer.flow import FlowView
from vpworkbench.explorer.masks import CAPTIONS, ERRORS, MasksView
from vpworkbench.explorer.readings import Reading
from vpworkbench.explorer.words import GRID, WordsView
from vpworkbench.figures.style import COLOURS, GREY, LANGUAGE, PALETTE, VISION

INCH_PX = 100


def overview(readings: Sequence[Reading], masks: MasksView | None) -> bytes:
    """PNG of the image with its mask and the flow curves, a row for each model."""
    figure = _figure(940, 250 * len(readings))
    rows = figure.subplots(len(readings), 4, squeeze=False)
    for number, (reading, axes) in enumerate(zip(readings, rows, strict=True)):
        axes[0].imshow(reading.image)
        axes[0].set_title(_cut(f"{reading.subject.name}: {reading.text}", 34))
        axes[1].imshow(reading.image)
        axes[1].set_title("attention mask")
        place = _place(masks.readings, reading) if masks is not None else None
        if place is not None:
            values = masks.values[place]
            _cover(axes[1], reading.image, reading.boxes, values[2])
            _outline(axes[1], reading.image, reading.boxes[masks.pick])
        _curves(axes[2], reading.flow[0], reading.null[0], "flow from the input to layer j", PALETTE[number])
        _curves(axes[3], reading.flow.diagonal(), reading.null.diagonal(), "flow within layer i", PALETTE[number])
        for axis in axes[:2]:
            axis.set_axis_off()
    return _png(figure)


def panels(view: MasksView, number: int) -> bytes:
    """PNG of the four panels of one model."""
    reading, values = view.readings[number], view.values[number]
    figure = _figure(940, 260)
    for axes, caption, kind, one in zip(figure.subplots(1, 4), CAPTIONS, ("", "shade", "mask", "mask"), values,
                                        strict=True):  # fmt: skip
        axes.imshow(reading.image)
        if kind == "shade":
            _cover(axes, reading.image, reading.boxes, 0.82 * (1 - one / max(one.max(), 1e-12)), colour="black")
        elif kind == "mask":
            _cover(axes, reading.image, reading.boxes, one)
        _outline(axes, reading.image, reading.boxes[view.pick])
        axes.set_title(caption)
        axes.set_axis_off()
    return _png(figure)


def errors(view: MasksView, number: int) -> bytes:
    """PNG of the errors behind both masks."""
    reading = view.readings[number]
    figure = _figure(470, 250)
    for axes, caption, one in zip(figure.subplots(1, 2), ERRORS, np.nan_to_num(view.errors_of(reading)), strict=True):
        axes.imshow(reading.image)
        _cover(axes, reading.image, reading.boxes, 0.82 * (1 - one / max(one.max(), 1e-12)), colour="black")
        axes.set_title(caption, fontsize=7)
        axes.set_axis_off()
    return _png(figure)


def heads(view: WordsView, number: int) -> bytes:
    """PNG of the grid of layers and heads."""
    figure = _figure(940, 260)
    for axes, name, values in zip(figure.subplots(1, 3), GRID, view.readings[number].grid, strict=True):
        _matrix(axes, values, name, "layer", "head", low=0, high=1)
    return _png(figure)


def sentence(view: WordsView, number: int) -> bytes:
    """PNG: the image where the pinned word, or else the last one, looks; the sentence under it."""
    reading, reader = view.readings[number], view.readers[number]
    looks = view.slice(reading, view.maps[number].picked)["looks"]
    word = reader.pinned if 0 <= reader.pinned < len(reading.words) else len(reading.words) - 1
    figure = _figure(470, 300)
    axes = figure.subplots()
    axes.imshow(reading.image)
    shade = 0.82 * (1 - looks[word] / max(looks[word].max(), 1e-12))
    _cover(axes, reading.image, reading.boxes, shade, colour="black")
    axes.set_axis_off()
    axes.set_title(_cut(f"“{reading.words[word]}” looks here", 60))
    figure.text(0.5, 0.02, _cut(reading.text, 80), ha="center", fontsize=8, color=GREY)
    return _png(figure)


def curves(view: FlowView) -> bytes:
    """PNG of triangle, curves, NMI and tokens of the first model."""
    reading = view.readings[0]
    figure = _figure(940, 260)
    axes = figure.subplots(1, 5)
    _matrix(axes[0], reading.flow, "flow from i to j", "from layer", "to layer")
    for number, one in enumerate(view.readings):
        _curves(axes[1], one.flow[0], one.null[0], "F from the input", PALETTE[number])
        _curves(axes[2], one.flow.diagonal(), one.null.diagonal(), "F within layer", PALETTE[number])
        axes[3].plot(range(len(one.nmi)), one.nmi, marker="o", ms=3, color=PALETTE[number])
    axes[3].set(title="NMI", ylim=(-0.03, 1.03), xlabel="layer (0: input)")
    points = reading.map[min(view.layer.value, len(reading.map) - 1)]
    for chosen, colour, name in zip(reading.counted, (LANGUAGE, VISION), ("language", "vision"), strict=True):
        axes[4].scatter(points[chosen, 0], points[chosen, 1], s=8, color=colour, label=name)
    axes[4].set(title="tokens", xticks=[], yticks=[])
    axes[4].legend(fontsize=6)
    return _png(figure)


def mixing(view: FlowView, number: int) -> bytes:
    """PNG of A^{i,j} of the chosen span."""
    matrix, splits = view.readings[number].span(*view.span)
    figure = _figure(470, 380)
    axes = figure.subplots()
    off = matrix[~np.eye(len(matrix), dtype=bool)]
    top = float(np.quantile(off, 0.995)) if len(off) else 1.0
    _matrix(axes, matrix, view.maps[number].label, "query", "key", low=0, high=top)
    for split in splits:
        axes.axhline(split - 0.5, color="white", lw=1)
        axes.axvline(split - 0.5, color="white", lw=1)
    return _png(figure)


def _place(readings: Sequence[Reading], reading: Reading) -> int | None:
    return next((place for place, one in enumerate(readings) if one is reading), None)


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


def _cover(axes: Axes, image: np.ndarray, boxes: np.ndarray, opacity: np.ndarray, *, colour: str = GREY) -> None:
    for (x0, y0, x1, y1), share in zip(_pixels(image, boxes), opacity, strict=True):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, color=colour, alpha=float(share), lw=0))


def _outline(axes: Axes, image: np.ndarray, box: np.ndarray) -> None:
    ((x0, y0, x1, y1),) = _pixels(image, box[None])
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=VISION, lw=2))


def _pixels(image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return boxes * [width, height, width, height] - 0.5


def _curves(axes: Axes, values: np.ndarray, null: np.ndarray, title: str, colour: str) -> None:
    layers = np.arange(1, len(values) + 1)
    axes.plot(layers, values, marker="o", ms=3, color=colour)
    axes.plot(layers, null, ls="--", color=colour)
    axes.set(title=title, xlabel="layer", xticks=layers[:: max(1, len(layers) // 6)])
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.set_ylim(bottom=0)


def _matrix(axes: Axes, values: np.ndarray, title: str, rows: str, columns: str, *, low: float | None = None,
            high: float | None = None) -> None:  # fmt: skip
    axes.imshow(values, cmap=COLOURS.lower(), vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.set(title=title, ylabel=rows, xlabel=columns)


def _cut(text: str, letters: int) -> str:
    plain = text.replace("$", r"\$")  # matplotlib would set formulas
    return plain if len(plain) <= letters else f"{plain[: letters - 1]}…"
