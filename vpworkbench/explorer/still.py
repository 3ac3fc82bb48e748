"""The views as pictures that need no browser: for GitHub, for a page with scripts off."""

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
    """PNG of the image with its mask and the flow curves, a row for each model."""
    figure = _figure(940, 250 * len(readings))
    rows = figure.subplots(len(readings), 4, squeeze=False)
    for number, (reading, axes) in enumerate(zip(readings, rows, strict=True)):
        axes[0].imshow(reading.image)
        axes[0].set_title(_cut(f"{reading.subject.name}: {reading.text}", 26))
        axes[0].set_axis_off()
        place = _place(masks.readings, reading) if masks is not None else None
        if place is None:
            _panel(axes[1], reading, "", np.zeros(len(reading.boxes)), "")
        else:
            kind = 2 if masks.values[place][2].any() else 3  # by attention where there is one
            _panel(axes[1], reading, "mask", masks.values[place][kind], CAPTIONS[kind], masks.pick)
        _curves(axes[2], reading.flow[0], reading.null[0], "flow from the input to layer j", MODELS[number])
        _curves(axes[3], reading.flow.diagonal(), reading.null.diagonal(), "flow within layer i", MODELS[number])
    return _png(figure)


def panels(view: MasksView, number: int) -> bytes:
    """PNG of the four panels of one model."""
    reading, values, panels = view.readings[number], view.values[number], view.panels[number]
    figure = _figure(235 * len(panels.kinds), 260)
    shown = [CAPTIONS.index(caption) for caption in panels.captions]
    for axes, place in zip(figure.subplots(1, len(shown)), shown, strict=True):
        _panel(axes, reading, KINDS[place], values[place], CAPTIONS[place], view.pick)
    return _png(figure)


def errors(view: MasksView, number: int) -> bytes:
    """PNG of the errors behind the masks."""
    reading, captions = view.readings[number], view.errors[number].captions
    figure = _figure(235 * len(captions), 250)
    found = np.nan_to_num(view.errors_of(reading))[-len(captions) :]
    for axes, caption, one in zip(figure.subplots(1, len(captions), squeeze=False)[0], captions, found, strict=True):
        _panel(axes, reading, "shade", one, caption)
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
    _panel(figure.subplots(), reading, "shade", looks[word], _cut(f"“{reading.words[word]}” looks here", 60))
    figure.text(0.5, 0.02, _cut(reading.text, 80), ha="center", fontsize=8, color=GREY)
    return _png(figure)


def curves(view: FlowView) -> bytes:
    """PNG of the first model's triangle beside the curves of all and the chosen one's tokens."""
    reading = view.readings[0]
    figure = _figure(940, 260)
    axes = figure.subplots(1, 5)
    _matrix(axes[0], reading.flow, "flow from i to j", "from layer", "to layer")
    for number, one in enumerate(view.readings):
        _curves(axes[1], one.flow[0], one.null[0], "F from the input", MODELS[number])
        _curves(axes[2], one.flow.diagonal(), one.null.diagonal(), "F within layer", MODELS[number])
        axes[3].plot(range(len(one.nmi)), one.nmi, marker="o", ms=3, color=MODELS[number], label=one.subject.name)
    if len(view.readings) > 1:
        axes[3].legend(fontsize=6)
    axes[3].set(title="NMI", ylim=(-0.03, 1.03), xlabel="layer (0: input)")
    points = view.points
    for chosen, colour, name in zip(view.chosen.counted, (LANGUAGE, VISION), ("language", "vision"), strict=True):
        axes[4].scatter(points[chosen, 0], points[chosen, 1], s=8, color=colour, label=name)
    axes[4].set(title=_cut(view.points_title, 40), xticks=[], yticks=[])
    axes[4].legend(fontsize=6)
    return _png(figure)


def mixing(view: FlowView, number: int) -> bytes:
    """PNG of A^{i,j} of the chosen span."""
    matrix, splits = view.readings[number].span(*view.span)
    figure = _figure(470, 380)
    axes = figure.subplots()
    off = matrix[~np.eye(len(matrix), dtype=bool)]
    top = float(np.quantile(off, 0.995)) if len(off) else 1.0
    _matrix(axes, matrix, view.maps[number].label, "query", "key", low=0, high=top, first=0)
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


def _panel(axes: Axes, reading: Reading, kind: str, values: np.ndarray, title: str, pick: int | None = None) -> None:
    """The image under what its tokens hold, as the page draws it: where boxes overlap the smallest is seen."""
    height, width = reading.image.shape[:2]
    held = np.zeros((height, width))
    edges = (reading.boxes * [width, height, width, height]).round().astype(int)
    areas = (reading.boxes[:, 2:] - reading.boxes[:, :2]).prod(axis=1)
    for place in np.argsort(-areas, kind="stable"):
        x0, y0, x1, y1 = edges[place]
        held[y0:y1, x0:x1] = values[place]
    axes.imshow(reading.image)
    ink = np.zeros((height, width, 4))
    if kind == "shade":
        ink[..., 3] = 0.8 * (1 - held / max(values.max(initial=0), 1e-12))
    elif kind == "mask":
        lines = np.add.outer(np.arange(height), np.arange(width)) % max(4, width // 24) == 0
        ink[...] = np.where(lines[..., None], 0.5, 0.17)
        ink[..., 3] = 0.94 * (held >= 0.5)
    axes.imshow(ink)
    if not reading.on_grid:
        for box in reading.boxes:
            _outline(axes, reading.image, box, colour="white", width=1)
    if pick is not None:
        _outline(axes, reading.image, reading.boxes[pick])
    axes.set_title(title)
    axes.set_axis_off()


def _outline(axes: Axes, image: np.ndarray, box: np.ndarray, *, colour: str = VISION, width: float = 2) -> None:
    height, wide = image.shape[:2]
    x0, y0, x1, y1 = box * [wide, height, wide, height] - 0.5
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, lw=width))


def _curves(axes: Axes, values: np.ndarray, null: np.ndarray, title: str, colour: str) -> None:
    layers = np.arange(1, len(values) + 1)
    axes.plot(layers, values, marker="o", ms=3, color=colour)
    axes.plot(layers, null, ls="--", color=colour)
    axes.set(title=title, xlabel="layer", xticks=layers[:: max(1, len(layers) // 6)])
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.set_ylim(bottom=0, auto=True)  # another model's curve may reach higher


def _matrix(axes: Axes, values: np.ndarray, title: str, rows: str, columns: str, *, low: float | None = None,
            high: float | None = None, first: int = 1) -> None:  # fmt: skip
    """Rows and columns are counted from `first`: layers and heads from one, tokens from nought, as in the page."""
    axes.imshow(values, cmap=COLOURS.lower(), vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.set(title=title, ylabel=rows, xlabel=columns)
    for axis, count in zip((axes.yaxis, axes.xaxis), values.shape, strict=True):
        places = np.arange(0, count, max(1, math.ceil(count / 6)))
        axis.set_ticks(places, places + first)


def _cut(text: str, letters: int) -> str:
    plain = text.replace("$", r"\$")  # matplotlib would set formulas
    return plain if len(plain) <= letters else f"{plain[: letters - 1]}…"
