"""Every plot of the workbench, as a plain plotly figure.

Functions take arrays (numpy, CPU tensors, DataFrames) and return one `go.Figure`; no model, no file inside.
Layers count from 0 in arrays and from 1 on axes; shares lie in [0, 1] in arrays and are percent on axes.
Backgrounds are transparent and text is mid-grey, so that a figure reads in light and dark themes.
`figure.layout.meta["alt"]` says in one sentence, in plain text, what is seen. Text that comes from data is
escaped where it is drawn, as plotly would read it as markup.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from PIL import Image
from plotly.subplots import make_subplots

from vpworkbench.probes.intervals import Interval, bootstrap_interval

if TYPE_CHECKING:
    from vpworkbench.pretrain import HeldOut

Samples = ArrayLike | Mapping[str, ArrayLike]
"""(example, layer), or the name of each model -> (example, layer)."""

# Okabe and Ito (2008), for all eyes. Black and yellow are left out and blue is a little lighter: all colours
# must be seen on white and on #111111.
BLUE, VERMILLION, GREEN = "#1C82C4", "#D55E00", "#009E73"
ORANGE, SKY, PURPLE = "#E69F00", "#56B4E9", "#CC79A7"
PALETTE = (BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE)
LANGUAGE, VISION = BLUE, VERMILLION
COLOURS = "Cividis"  # even steps for all eyes
GREY = "#7a7a7a"  # contrast above 4 on white and on #111111
_FAINT, _CLEAR = "rgba(128, 128, 128, 0.25)", "rgba(0, 0, 0, 0)"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")  # models differ by more than colour

_WIDTH, _HEIGHT = 900, 340  # pixels; fits beside the side bar of a 1280-pixel JupyterLab
_LOSSLESS_PX = 160  # larger pictures are embedded as JPEG, a tenth of the size
_GAP_PX, _LINE_PX, _LETTER_PX = 14, 16, 6.4  # between pictures; line and mean letter of a caption

_AXIS = {
    "gridcolor": _FAINT,
    "zerolinecolor": _FAINT,
    "linecolor": GREY,
    "automargin": True,
    "title": {"standoff": 10, "font": {"size": 12}},
}
TEMPLATE = go.layout.Template(
    layout={
        "paper_bgcolor": _CLEAR,
        "plot_bgcolor": _CLEAR,
        "font": {"color": GREY, "size": 12, "family": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"},
        "title": {"x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 12}, "font": {"size": 15}},
        "colorway": PALETTE,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"bgcolor": _CLEAR},
        "modebar": {"bgcolor": _CLEAR, "color": "#999999", "activecolor": SKY},
        "hoverlabel": {"font": {"size": 12}},
    }
)


class ExportError(RuntimeError):
    """A picture of a figure that cannot be made here; the message says what is missing."""


# --------------------------------------------------------------------------------------------------- pictures


def pictures(
    images: ArrayLike | Sequence[np.ndarray], captions: Sequence[str | Sequence[str]], *, columns: int = 4
) -> go.Figure:
    """A contact sheet: images with their captions under them.

    Parameters
    ----------
    images : array of uint8, shape (image, height, width, 3), or a sequence of such images
    captions : sequence of str or of sequences of str
        One or several for each image; wrapped, and shown as they are.

    Raises
    ------
    ValueError
        If numbers do not agree, or pixels are not uint8 (height, width, 3).
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images need as many captions, not {len(captions)}")
    if len(images) == 0 or columns < 1:
        raise ValueError(f"pictures needs images and columns, not {len(images)} images in {columns} columns")
    columns = min(columns, len(images))
    panels = [_Panel(image, caption) for image, caption in zip(images, captions, strict=True)]
    figure = _panels(panels, columns=columns, panel_px=min(260, (_WIDTH - _GAP_PX) // columns - _GAP_PX))
    return finish(figure, alt=f"{len(panels)} images with their captions under them.")


def tokens(image: np.ndarray, grid: int | tuple[int, int]) -> go.Figure:
    """The image under its grid of visual tokens, numbered as in code: i = row * columns + column, from 0.

    Parameters
    ----------
    image : array of uint8, shape (height, width, 3)
    grid : int or (rows, columns)
    """
    rows, columns = _grid(grid)
    panel = _Panel(image, f"{rows} x {columns} tokens")
    figure = _panels([panel], grid=(rows, columns), columns=1, panel_px=360)
    figure.add_trace(_grid_lines(rows, columns))
    row, column = np.divmod(np.arange(rows * columns), columns)
    size = float(np.clip(0.36 * 360 / columns, 8, 14))
    figure.add_scatter(
        x=column + 0.5, y=row + 0.5, text=[str(token) for token in range(rows * columns)], mode="text",
        textfont={"color": "white", "size": size, "shadow": "0 0 3px black, 0 0 3px black"},
        hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    alt = f"An image divided into {rows} rows and {columns} columns of tokens, numbered row by row from 0."
    return finish(figure, title="Visual tokens", alt=alt)


def parsing(image: np.ndarray, attention: ArrayLike, picks: Sequence[int], grid: int | tuple[int, int]) -> go.Figure:
    """Where picked visual tokens look: the image, darkened by each pick's row of the parsing attention.

    Parameters
    ----------
    image : array of uint8, shape (height, width, 3)
    attention : array, shape (vision, vision)
        Rows sum to 1; averaged over heads.
    picks : sequence of int
        Tokens, from 0.
    grid : int or (rows, columns)

    Raises
    ------
    ValueError
        If attention and grid do not agree, a row does not sum to 1, or a pick is no token.
    """
    rows, columns = _grid(grid)
    weights = np.asarray(attention, dtype=float)
    _check_shape("attention", weights, (rows * columns,) * 2, (rows, columns))
    picks = [_checked_pick(pick, rows * columns) for pick in picks]
    if not picks:
        raise ValueError("parsing needs at least one pick")
    if np.abs(weights[picks].sum(axis=1) - 1).max() > 0.01:
        raise ValueError("rows of attention must sum to 1; average over heads, do not add them up")
    captions = [f"token {pick}, brightest {_percent(weights[pick].max())}" for pick in picks]
    figure = _panels(
        [_Panel(image, "the image"), *(_Panel(image, caption) for caption in captions)],
        grid=(rows, columns), columns=min(4, len(picks) + 1), panel_px=208,
    )  # fmt: skip
    for panel, pick in enumerate(picks, start=1):
        _add(figure, panel, _shade(weights[pick], rows, columns), _outline(pick, columns))
    title = f"Where visual tokens look (bright; even attention would be {_percent(1 / len(weights))} each)"
    chosen = ", ".join(map(str, picks))
    alt = f"An image and, for tokens {chosen}, a copy each that is bright where the token attends."
    return finish(figure, title=title, alt=alt)


def masks(
    image: np.ndarray,
    masks: Mapping[str, ArrayLike],
    *,
    names: Sequence[str] | None = None,
    pick: int | None = None,
    grid: int | tuple[int, int],
) -> go.Figure:
    """The image with the tokens that each mask hides greyed out (paper Fig. 2).

    Parameters
    ----------
    image : array of uint8, shape (height, width, 3)
    masks : mapping of str to bool array, shape (vision,)
        True where a token is hidden.
    names : sequence of str, optional
        Which masks, in this order; all of them where not given.
    pick : int, optional
        The token that the masks were built around, outlined.
    grid : int or (rows, columns)
    """
    rows, columns = _grid(grid)
    names = list(masks) if names is None else list(names)
    if missing := [name for name in names if name not in masks]:
        raise ValueError(f"names {missing} are not among the masks {list(masks)}")
    hidden = {name: np.asarray(masks[name]) for name in names}
    for name, mask in hidden.items():
        _check_shape(f"mask {name!r}", mask, (rows * columns,), (rows, columns))
        if mask.dtype != bool:
            raise ValueError(f"mask {name!r} must be bool, True where a token is hidden, not {mask.dtype}")
    captions = [f"{name}: {int(mask.sum())} of {mask.size} tokens hidden" for name, mask in hidden.items()]
    figure = _panels(
        [_Panel(image, "the image"), *(_Panel(image, caption) for caption in captions)],
        grid=(rows, columns), columns=min(4, len(names) + 1), panel_px=208,
    )  # fmt: skip
    for panel, mask in enumerate([None, *hidden.values()]):
        if mask is not None:
            _add(figure, panel, _cover(mask, rows, columns), _grid_lines(rows, columns))
        if pick is not None:
            _add(figure, panel, _outline(_checked_pick(pick, rows * columns), columns))
    title = "Tokens hidden from the fusion" + (f", built around token {pick}" if pick is not None else "")
    alt = f"An image, and copies with hidden tokens greyed out: {'; '.join(captions)}."
    return finish(figure, title=_escaped(title), alt=alt)


def attention_on_image(
    image: np.ndarray,
    weights: ArrayLike,
    grid: int | tuple[int, int],
    *,
    title: str = "Attention on the image",
) -> go.Figure:
    """The image beside a copy that is bright where the weights are large.

    Parameters
    ----------
    image : array of uint8, shape (height, width, 3)
    weights : array, shape (vision,)
        Not negative; brightness is relative to the largest.
    grid : int or (rows, columns)
    """
    rows, columns = _grid(grid)
    weights = np.asarray(weights, dtype=float)
    _check_shape("weights", weights, (rows * columns,), (rows, columns))
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.max() > 0):
        raise ValueError("weights must be finite, not negative and not all 0")
    caption = f"{_percent(weights.sum())} in all, brightest {_percent(weights.max())}"
    panels = [_Panel(image, "the image"), _Panel(image, caption)]
    figure = _panels(panels, grid=(rows, columns), columns=2, panel_px=260)
    _add(figure, 1, _shade(weights, rows, columns))
    brightest = int(weights.argmax())
    alt = f"An image and a copy that is bright where attention is large, brightest at token {brightest}."
    return finish(figure, title=_escaped(title), alt=alt)


# --------------------------------------------------------------------------------------------------- training

_OBJECTIVES = {
    "mlm": "masked words (MLM), nats",
    "itm": "match or not (ITM), nats",
    "vla": "alignment (VLA), cosine distance",
    "mfr": "masked features (MFR), squared",
}
_WATCHED = {
    "lr_share": "learning rate, % of its peak",
    "gradient_norm": "gradient norm",
    "target_variance": "variance of visual features",
    "target_rank": "effective rank of visual features",
    "step_s": "seconds a step",
}
_SMOOTH_FROM = 40  # lines of metrics


def losses(metrics: pd.DataFrame) -> go.Figure:
    """What a run logged, one small panel for each quantity: objectives in blue, the rest in green.

    Parameters
    ----------
    metrics : DataFrame
        Of `Run.metrics()`: a column `step`, and one for each quantity; those not known here go by their own
        name. From 40 lines on a running mean is drawn over the raw values.
    """
    order = [*_OBJECTIVES, *(name for name in metrics if name not in _WATCHED), *_WATCHED]
    names = [name for name in dict.fromkeys(order) if name in metrics and name != "step"]
    numeric = metrics[names].apply(pd.to_numeric, errors="coerce").dropna(axis=1, how="all")
    names = list(numeric)
    if "step" not in metrics or not names:
        raise ValueError(f"losses needs a column `step` and at least one more, not {list(metrics.columns)}")
    rows, columns = _small_multiples(len(names))
    titles = [(_OBJECTIVES | _WATCHED).get(name, _escaped(str(name))) for name in names]
    figure = make_subplots(
        rows, columns, subplot_titles=titles, horizontal_spacing=0.2 / columns, vertical_spacing=0.3 / rows
    )
    for index, name in enumerate(names):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        colour, label = GREEN if name in _WATCHED else BLUE, _escaped(str(name))
        smooth = len(metrics) >= _SMOOTH_FROM and name != "lr_share"
        figure.add_scatter(
            x=metrics["step"], y=numeric[name], name=label, line={"color": colour, "width": 1.5},
            mode="lines" if len(metrics) > 5 else "lines+markers", opacity=0.35 if smooth else 1, **place,
        )  # fmt: skip
        if smooth:
            mean = numeric[name].rolling(max(5, len(metrics) // 12), center=True, min_periods=1).mean()
            line = {"color": colour, "width": 2}
            figure.add_scatter(x=metrics["step"], y=mean, name=f"{label}, mean", mode="lines", line=line, **place)
        if name == "lr_share":
            figure.update_yaxes(tickformat=".0%", **place)
        if index + columns >= len(names):
            figure.update_xaxes(title_text="step", **place)
    figure.update_layout(showlegend=False)
    last = int(metrics["step"].iloc[-1])
    alt = f"{', '.join(map(str, names))} over {last} optimiser steps, one panel each."
    return finish(figure, title=f"Training over {last:,} steps", alt=alt, height=90 + 145 * rows)


def _small_multiples(count: int) -> tuple[int, int]:
    """Rows and columns: the fewest empty panels, rather wide than tall."""
    columns = count if count <= 4 else min((4, 3), key=lambda columns: -count % columns)
    return math.ceil(count / columns), columns


def held_out(held_out: HeldOut) -> go.Figure:
    """Held-out match decisions and masked words, with each text's image and with another one.

    Parameters
    ----------
    held_out : pretrain.HeldOut
        Error bars are its 95% intervals.
    """
    titles = ("Match or not (ITM)", "Hidden word (MLM)")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.12)
    itm = {"its image": held_out.itm_accuracy, "another image": held_out.itm_other_image}
    mlm = {"its image": held_out.mlm_with_image, "another image": held_out.mlm_other_image}
    _add_bars(figure, itm, [BLUE, ORANGE], letters=20, row=1, col=1)
    _add_bars(figure, mlm, [BLUE, ORANGE], letters=20, row=1, col=2)
    figure.update_yaxes(title_text="decisions that are right", col=1)
    figure.update_yaxes(title_text="words guessed right", col=2)
    figure.add_hline(
        0.5, line={"color": GREY, "dash": "dash", "width": 1.5}, row=1, col=1,
        annotation_text="chance", annotation_position="top right",
    )  # fmt: skip
    ratio = held_out.mlm_ratio
    more = f"{ratio.mean:.2f} times [{ratio.low:.2f}, {ratio.high:.2f}] as often with its image"
    figure.update_xaxes(title_text=more, row=1, col=2)
    alt = (
        f"Match decisions right: {_percent(held_out.itm_accuracy.mean)} with the image, "
        f"{_percent(held_out.itm_other_image.mean)} with another one, chance 50%; "
        f"hidden words right: {_percent(held_out.mlm_with_image.mean)} with the image, "
        f"{_percent(held_out.mlm_other_image.mean)} with another one."
    )
    return finish(figure, title="Held-out images: does the model use the picture?", alt=alt, width=760)


def accuracy_bars(
    values: Mapping[str, float | Interval],
    *,
    chance: Mapping[str, float] | None = None,
    title: str = "Accuracy",
    axis: str = "accuracy",
) -> go.Figure:
    """Accuracies by name, with intervals where there are some.

    Parameters
    ----------
    values : mapping of str to float or probes.intervals.Interval
        Shares in [0, 1].
    chance : mapping of str to float, optional
        Marked over the bars of the same names.
    title, axis : str
        What the shares are, where they are no accuracies.
    """
    chance = dict(chance or {})
    if unknown := [name for name in chance if name not in values]:
        raise ValueError(f"chance is given for {unknown}, which are not among the values {list(values)}")
    if not values:
        raise ValueError("accuracy_bars needs at least one value")
    width = int(np.clip(140 * len(values) + 120, 380, _WIDTH))
    figure = go.Figure()
    means = _add_bars(figure, values, [BLUE] * len(values), letters=int((width - 120) / len(values) / 7))
    if chance:
        names = list(values)
        figure.add_scatter(
            x=[names.index(name) for name in chance], y=list(chance.values()), mode="markers", name="chance",
            marker={"symbol": "line-ew", "size": 46, "line": {"color": VERMILLION, "width": 2.5}},
            hovertemplate="chance %{y:.1%}<extra></extra>", showlegend=True,
        )  # fmt: skip
    figure.update_yaxes(title_text=_escaped(axis))
    told = ", ".join(f"{name} {_percent(mean)}" for name, mean in zip(values, means, strict=True))
    alt = f"{title}: {told}."
    return finish(figure, title=_escaped(title), alt=alt, width=width)


# ----------------------------------------------------------------------------------------------------- probes


def flow_curves(
    from_input: Samples,
    within_layer: Samples,
    *,
    null_from_input: Samples | None = None,
    null_within_layer: Samples | None = None,
) -> go.Figure:
    """Inter-Modality Flow from the input to each layer and within each layer (paper Fig. 3 and 4).

    Parameters
    ----------
    from_input, within_layer : array, shape (example, layer), or mapping of model name to such arrays
        F^{1,j} and F^{j,j}; mean over examples with a bootstrap 95% band.
    null_from_input, null_within_layer : array, shape (example, layer) or (layer,), or mapping, optional
        The same under uniform attention, dashed: it depends on the token counts alone.

    Raises
    ------
    ValueError
        If models, layers or examples do not agree.
    """
    curves = (_by_name(from_input, "from_input"), _by_name(within_layer, "within_layer"))
    if list(curves[0]) != list(curves[1]):
        raise ValueError(f"from_input has the models {list(curves[0])}, within_layer {list(curves[1])}")
    for name, (one, other) in zip(curves[0], zip(*(by.values() for by in curves), strict=True), strict=True):
        if one.shape != other.shape:
            raise ValueError(f"from_input{_of(name)} is {one.shape}, within_layer {other.shape}")
    nulls = (
        _nulls(null_from_input, curves[0], "null_from_input", "from_input"),
        _nulls(null_within_layer, curves[1], "null_within_layer", "within_layer"),
    )
    titles = ("From the input to layer j (Fig. 3)", "Within layer j (Fig. 4)")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.09)
    for column, (models, null) in enumerate(zip(curves, nulls, strict=True), start=1):
        _add_curves(figure, models, null, legend=column == 1, row=1, col=column)
    figure.update_xaxes(title_text="layer j")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(title_text="attention that crosses", col=1)
    ends = f"{_ends(curves[0], 'from the input')}; {_ends(curves[1], 'within a layer')}"
    title = f"Inter-Modality Flow, mean and 95% band over {_examples(curves[0])}"
    return finish(figure, title=title, alt=f"Share of attention that crosses the modalities, by layer; {ends}.")


def flow_triangle(flow: ArrayLike) -> go.Figure:
    """Inter-Modality Flow of every span of layers.

    Parameters
    ----------
    flow : array, shape (layer, layer)
        `flow[i, j]` from the input of layer i to the output of layer j; nan where j < i.
    """
    flow = np.asarray(flow, dtype=float)
    if flow.ndim != 2 or len(flow) != flow.shape[1] or len(flow) == 0:
        raise ValueError(f"flow must be (layer, layer), of one example or a mean, not {flow.shape}")
    layers = np.arange(1, len(flow) + 1)
    upper = np.where(layers[:, None] <= layers, flow, np.nan)
    numbers = np.where(np.isnan(upper), "", np.char.mod("%.1f", 100 * upper))
    figure = go.Figure(
        go.Heatmap(
            x=layers, y=layers, z=upper, text=numbers, texttemplate="%{text}" if len(flow) <= 16 else None,
            colorscale=COLOURS, hoverongaps=False, xgap=1, ygap=1,
            colorbar={"tickformat": ".0%", "outlinewidth": 0, "thickness": 14},
            hovertemplate="from the input of layer %{y} to the output of layer %{x}: %{z:.1%}<extra></extra>",
        )
    )  # fmt: skip
    step = max(1, math.ceil(len(flow) / 16))
    figure.update_xaxes(title_text="to the output of layer j", dtick=step, tick0=1, showgrid=False)
    figure.update_yaxes(
        title_text="from the input of layer i", dtick=step, tick0=1, autorange="reversed", showgrid=False,
        scaleanchor="x", constrain="domain",
    )  # fmt: skip
    figure.update_xaxes(constrain="domain")
    alt = (
        f"Share of attention that crosses the modalities for every span of {len(flow)} layers, "
        f"from {_percent(np.nanmin(upper))} to {_percent(np.nanmax(upper))}."
    )
    title = "Inter-Modality Flow from layer i to layer j, %"
    return finish(figure, title=title, alt=alt, width=520, height=420)


def flow_directions(text_to_vision: ArrayLike, vision_to_text: ArrayLike) -> go.Figure:
    """The two directions of the flow within each layer, one on the other; they add up to Fig. 4.

    Parameters
    ----------
    text_to_vision, vision_to_text : array, shape (example, layer)
        Share of attention from words to the image and back; the error bar is the 95% interval of their sum.
    """
    up, down = np.asarray(text_to_vision, dtype=float), np.asarray(vision_to_text, dtype=float)
    if up.ndim != 2 or up.shape != down.shape:
        raise ValueError(f"text_to_vision is {up.shape}, vision_to_text {down.shape}; both: (example, layer)")
    layers = np.arange(1, up.shape[1] + 1)
    both = bootstrap_interval(up + down)
    means = bootstrap_interval(up).mean, bootstrap_interval(down).mean
    figure = go.Figure()
    look = {"x": layers, "hovertemplate": "layer %{x}: %{y:.1%}"}
    figure.add_bar(**look, y=means[0], name="text to vision", marker=_fill(LANGUAGE))
    figure.add_bar(**look, y=means[1], name="vision to text", marker=_fill(VISION), error_y=_error_bars(both))
    figure.update_layout(barmode="stack", bargap=0.35)
    figure.update_xaxes(title_text="layer", **_layer_ticks(len(layers)))
    figure.update_yaxes(title_text="attention that crosses", tickformat=".0%")
    alt = (
        f"Attention from text to vision, {_percent(means[0][0])} in layer 1 and {_percent(means[0][-1])} in "
        f"layer {len(layers)}, and from vision to text, {_percent(means[1][0])} and {_percent(means[1][-1])}."
    )
    title = f"Which way attention crosses, within each layer ({_examples({'': up})})"
    return finish(figure, title=title, alt=alt, width=640)


def nmi(values: Samples, *, with_input: bool = False) -> go.Figure:
    """How far apart the modalities lie in each layer (paper Fig. 5): NMI, smaller is more fused.

    Parameters
    ----------
    values : array, shape (example, layer), or mapping of model name to such arrays
        Mean over examples with a bootstrap 95% band; nan entries are left out.
    with_input : bool
        The first entry is the input of layer 1, as in `probes.capture.hidden_states`: it is drawn at 0.
    """
    models = _by_name(values, "values")
    figure = make_subplots(1, 1)
    _add_curves(figure, models, {}, legend=True, first=0 if with_input else 1, row=1, col=1)
    figure.update_xaxes(title_text="layer (0: input of layer 1)" if with_input else "layer")
    figure.update_yaxes(title_text="NMI (0: mixed, 1: apart)", range=[-0.02, 1.02])
    title = f"Modalities as clusters, mean and 95% band over {_examples(models)}"
    alt = f"NMI of two clusters and the two modalities by layer; {_ends(models, 'mean')}."
    return finish(figure, title=title, alt=alt, width=640)


def modality_map(points: ArrayLike, vision: ArrayLike, tokens: ArrayLike, *, layer: int) -> go.Figure:
    """Tokens of one example on two principal components, coloured by modality.

    Parameters
    ----------
    points : array, shape (token, 2)
        From `probes.nmi.modality_pca`; nan at tokens left out.
    vision, tokens : bool array, shape (token,)
        Visual tokens, and real (non-padding) positions.
    layer : int
        From 0; the title counts from 1.
    """
    points, vision, tokens = np.asarray(points, dtype=float), np.asarray(vision), np.asarray(tokens)
    if points.shape != (len(vision), 2) or vision.shape != tokens.shape:
        raise ValueError(
            f"points is {points.shape}, vision {vision.shape}, tokens {tokens.shape}: "
            "(token, 2), (token,) and (token,) are needed"
        )
    figure = go.Figure()
    counts = {}
    for name, colour, symbol, chosen in (
        ("language", LANGUAGE, "circle", ~vision.astype(bool)),
        ("vision", VISION, "square", vision.astype(bool)),
    ):
        index = np.flatnonzero(chosen & tokens.astype(bool) & np.isfinite(points).all(axis=1))
        counts[name] = len(index)
        figure.add_scatter(
            x=points[index, 0], y=points[index, 1], customdata=index, mode="markers",
            name=f"{name} ({len(index)})",
            marker={"color": colour, "symbol": symbol, "size": 8, "opacity": 0.9},
            hovertemplate=f"{name} token %{{customdata}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="first principal component", constrain="domain")
    figure.update_yaxes(title_text="second principal component", scaleanchor="x", constrain="domain")
    alt = (
        f"{counts['language']} language tokens and {counts['vision']} visual tokens of layer {layer + 1} "
        "on their first two principal components."
    )
    return finish(figure, title=f"Tokens by modality, layer {layer + 1}", alt=alt, width=560, height=400)


def word_attention(words: Sequence[str], weights: ArrayLike, *, title: str = "Attention on words") -> go.Figure:
    """Attention on each token of a sentence.

    Parameters
    ----------
    words : sequence of str
        Tokens in order; equal ones stay apart.
    weights : array, shape (word,)
    """
    weights = np.asarray(weights, dtype=float)
    if weights.shape != (len(words),) or len(words) == 0:
        raise ValueError(f"{len(words)} words need weights of shape ({len(words)},), not {weights.shape}")
    place = np.arange(len(words))  # names would merge equal words into one bar
    labels = [_escaped(str(word)) for word in words]
    figure = go.Figure(
        go.Bar(
            x=place, y=weights, marker=_fill(LANGUAGE), customdata=labels, showlegend=False,
            hovertemplate="%{customdata}: %{y:.1%}<extra></extra>",
        )
    )  # fmt: skip
    angle = -45 if len(words) > 12 else 0
    figure.update_xaxes(tickvals=place, ticktext=labels, showgrid=False, tickangle=angle)
    figure.update_yaxes(title_text="attention", tickformat=".0%" if np.nanmax(weights) >= 0.05 else ".1%")
    most = int(np.nanargmax(weights))
    alt = f"Attention on {len(words)} words, most on {words[most]!r}: {_percent(weights[most])}."
    width = int(np.clip(46 * len(words) + 120, 380, _WIDTH))
    return finish(figure, title=_escaped(title), alt=alt, width=width, height=300)


# ----------------------------------------------------------------------------------------------------- export


def to_image(figure: go.Figure, path: str | Path, *, scale: float = 2) -> Path:
    """Save a figure as PNG or SVG, by the path's suffix, with a transparent background.

    Raises
    ------
    ExportError
        If kaleido or a browser is missing; the message names the remedy.
    """
    own = "or use the camera button of the figure's own menu"
    if importlib.util.find_spec("kaleido") is None:
        raise ExportError(f"PNG and SVG need kaleido and Chrome or Chromium: pip install kaleido, {own}")
    try:
        figure.write_image(path, scale=scale)
    except RuntimeError as error:
        remedy = "install one (apt install chromium, or plotly_get_chrome)"
        raise ExportError(f"PNG and SVG need a working Chrome or Chromium: {remedy}, {own}") from error
    return Path(path)


# -------------------------------------------------------------------------------------- pictures and overlays


class _Panel(NamedTuple):
    image: np.ndarray
    captions: str | Sequence[str]


def _panels(panels: Sequence[_Panel], *, columns: int, panel_px: int, grid: tuple[int, int] | None = None) -> go.Figure:
    """Images in rows with their captions under them, every one on axes of its own.

    Axes count tokens where there is a grid, pixels elsewhere, from the upper left corner; they are not shown.
    """
    images = [_checked_image(panel.image) for panel in panels]
    texts = [_wrapped(panel.captions, int(panel_px / _LETTER_PX)) for panel in panels]
    tall = [panel_px * image.shape[0] / image.shape[1] for image in images]
    under = [_LINE_PX * len(lines) + 2 * _GAP_PX for lines in texts]
    rows = [slice(start, start + columns) for start in range(0, len(panels), columns)]
    row_px = [max(tall[row]) + max(under[row]) for row in rows]
    width, height = columns * (panel_px + _GAP_PX) + _GAP_PX, sum(row_px)
    figure = go.Figure()
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left, top = _GAP_PX + column * (panel_px + _GAP_PX), sum(row_px[:row])
        x = [left / width, (left + panel_px) / width]
        y = [1 - (top + tall[index]) / height, 1 - top / height]
        extent = grid or image.shape[:2]
        _add(figure, index, _picture(image, extent, largest_px=2 * panel_px))
        _add_hidden_axes(figure, index, x, y, extent)
        figure.add_annotation(
            x=x[0], y=y[0], xref="paper", yref="paper", xanchor="left", yanchor="top", align="left",
            text="<br>".join(texts[index]), yshift=-2, showarrow=False,
        )  # fmt: skip
    figure.update_layout(width=width, height=height, margin={"l": 0, "r": 0, "t": 0, "b": 0})
    return figure


def _add(figure: go.Figure, panel: int, *traces: go.Scatter | go.Heatmap | go.Image) -> None:
    number = "" if panel == 0 else str(panel + 1)
    for trace in traces:
        figure.add_trace(trace.update(xaxis=f"x{number}", yaxis=f"y{number}"))


def _add_hidden_axes(figure: go.Figure, panel: int, x: list[float], y: list[float], extent: tuple[int, int]) -> None:
    number = "" if panel == 0 else str(panel + 1)
    rows, columns = extent
    axis = {"visible": False, "constrain": "domain"}
    across = axis | {"domain": x, "range": [0, columns], "anchor": f"y{number}"}
    down = axis | {"domain": y, "range": [rows, 0], "anchor": f"x{number}", "scaleanchor": False}
    figure.update_layout({f"xaxis{number}": across, f"yaxis{number}": down})


def _picture(image: np.ndarray, extent: tuple[int, int], *, largest_px: int) -> go.Image:
    """An embedded picture stretched over `extent` (rows, columns) of its axes."""
    picture = Image.fromarray(image)
    picture.thumbnail((largest_px, largest_px))
    kind = "PNG" if max(picture.size) <= _LOSSLESS_PX else "JPEG"
    buffer = io.BytesIO()
    picture.save(buffer, kind, optimize=True, quality=88)
    source = f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    dx, dy = extent[1] / picture.width, extent[0] / picture.height
    place = {"x0": dx / 2, "dx": dx, "y0": dy / 2, "dy": dy}  # centre of the first pixel, size of a pixel
    return go.Image(source=source, **place, zsmooth="fast", hoverinfo="skip")


def _shade(weights: np.ndarray, rows: int, columns: int) -> go.Heatmap:
    """Black that lets the picture through where weights are large."""
    scale = [[0, "rgba(0, 0, 0, 0.86)"], [1, _CLEAR]]
    return _overlay(weights, rows, columns, scale, zmax=weights.max(), hover="%{z:.1%}")


def _cover(mask: np.ndarray, rows: int, columns: int) -> go.Heatmap:
    """Dark grey over hidden tokens; nan, so nothing, over the others."""
    scale = [[0, "#4a4a4a"], [1, "#4a4a4a"]]
    return _overlay(np.where(mask, 1.0, np.nan), rows, columns, scale, zmax=1, hover="hidden")


def _overlay(values: np.ndarray, rows: int, columns: int, scale: list[list], *, zmax: float, hover: str) -> go.Heatmap:
    numbers = np.arange(rows * columns).reshape(rows, columns).astype(str)
    return go.Heatmap(
        z=values.reshape(rows, columns), x0=0.5, y0=0.5, dx=1, dy=1, zmin=0, zmax=zmax, showscale=False,
        colorscale=scale, hoverongaps=False, text=numbers,
        hovertemplate=f"token %{{text}}: {hover}<extra></extra>",
    )  # fmt: skip


def _grid_lines(rows: int, columns: int) -> go.Scatter:
    x = [value for column in range(columns + 1) for value in (column, column, None)]
    y = [value for _ in range(columns + 1) for value in (0, rows, None)]
    x += [value for _ in range(rows + 1) for value in (0, columns, None)]
    y += [value for row in range(rows + 1) for value in (row, row, None)]
    return go.Scatter(
        x=x, y=y, mode="lines", line={"color": "rgba(255, 255, 255, 0.55)", "width": 1}, name="grid",
        hoverinfo="skip", showlegend=False,
    )  # fmt: skip


def _outline(token: int, columns: int) -> go.Scatter:
    row, column = divmod(token, columns)
    x, y = column + np.array([0, 1, 1, 0, 0]), row + np.array([0, 0, 1, 1, 0])
    return go.Scatter(
        x=x, y=y, mode="lines", line={"color": ORANGE, "width": 3}, name=f"token {token}", showlegend=False,
        hoverinfo="skip", cliponaxis=False,
    )  # fmt: skip


def _checked_image(image: ArrayLike) -> np.ndarray:
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"an image must be uint8 (height, width, 3), not {pixels.dtype} {pixels.shape}")
    return np.ascontiguousarray(pixels)


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...], grid: tuple[int, int]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} is {array.shape}, but a grid of {grid[0]} x {grid[1]} needs {shape}")


def _checked_pick(pick: int, count: int) -> int:
    if not 0 <= int(pick) < count:
        raise ValueError(f"pick {int(pick)} is not among the {count} tokens, which count from 0")
    return int(pick)


def _grid(grid: int | tuple[int, int]) -> tuple[int, int]:
    rows, columns = (grid, grid) if isinstance(grid, (int, np.integer)) else grid
    if rows < 1 or columns < 1:
        raise ValueError(f"grid must have rows and columns, not {rows} x {columns}")
    return int(rows), int(columns)


# -------------------------------------------------------------------------------------------- curves and bars


def _by_name(values: Samples, what: str) -> dict[str, np.ndarray]:
    """Arrays (example, layer) by name of the model; one alone has the name ''."""
    named = dict(values) if isinstance(values, Mapping) else {"": values}
    arrays = {str(name): np.asarray(value, dtype=float) for name, value in named.items()}
    for name, array in arrays.items():
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"{what}{_of(name)} must be (example, layer), not {array.shape}")
    if not arrays:
        raise ValueError(f"{what} names no model")
    return arrays


def _of(name: str) -> str:
    return f" of {name!r}" if name else ""


def _nulls(null: Samples | None, models: dict[str, np.ndarray], what: str, of: str) -> dict[str, np.ndarray]:
    """(layer,) by name of the model, for the models that have one."""
    if null is None:
        return {}
    named = dict(null) if isinstance(null, Mapping) else dict.fromkeys(models, null)
    if unknown := [name for name in named if name not in models]:
        raise ValueError(f"{what} is given for {unknown}, {of} for {list(models)}")
    lines = {name: np.asarray(value, dtype=float) for name, value in named.items()}
    lines = {name: line.mean(axis=0) if line.ndim == 2 else line for name, line in lines.items()}
    for name, line in lines.items():
        if line.shape != models[name].shape[1:]:
            raise ValueError(f"{what}{_of(name)} has layers {line.shape}, {of} {models[name].shape[1:]}")
    return lines


def _add_curves(
    figure: go.Figure,
    models: dict[str, np.ndarray],
    nulls: dict[str, np.ndarray],
    *,
    legend: bool,
    first: int = 1,
    row: int,
    col: int,
) -> None:
    """Mean, 95% band and null of each model over its layers."""
    place = {"row": row, "col": col}
    longest = 0
    for index, (name, values) in enumerate(models.items()):
        colour, symbol = PALETTE[index % len(PALETTE)], _SYMBOLS[index % len(_SYMBOLS)]
        layers = np.arange(first, first + values.shape[1])
        longest = max(longest, len(layers))
        label = _escaped(name) or "model"
        interval = bootstrap_interval(values)
        figure.add_trace(_band(layers, interval, colour, label), **place)
        figure.add_scatter(
            x=layers, y=interval.mean, mode="lines+markers", name=label, legendgroup=label,
            showlegend=legend and (len(models) > 1 or bool(nulls)),
            line={"color": colour, "width": 2}, marker={"symbol": symbol, "size": 7},
            customdata=np.stack([interval.low, interval.high], axis=1),
            hovertemplate="layer %{x}: %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]", **place,
        )  # fmt: skip
        if name in nulls:
            figure.add_scatter(
                x=layers, y=nulls[name], mode="lines", name=f"{label}, if uniform", legendgroup="null",
                line={"color": colour, "width": 1.5, "dash": "dash"}, opacity=0.8, showlegend=False,
                hovertemplate="layer %{x}: %{y:.3f}", **place,
            )  # fmt: skip
    if nulls and legend:  # one entry for the dashed lines of all models, in nobody's colour
        figure.add_scatter(
            x=[None], y=[None], mode="lines", name="uniform attention", legendgroup="null",
            line={"color": GREY, "width": 1.5, "dash": "dash"}, **place,
        )  # fmt: skip
    figure.update_xaxes(**_layer_ticks(longest, first), **place)


def _band(layers: np.ndarray, interval: Interval, colour: str, label: str) -> go.Scatter:
    known = np.isfinite(interval.low)
    x, low, high = layers[known], interval.low[known], interval.high[known]
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]), y=np.concatenate([high, low[::-1]]), fill="toself", mode="lines",
        line={"width": 0}, fillcolor=_translucent(colour, 0.22), name=f"{label}, 95%", legendgroup=label,
        showlegend=False, hoverinfo="skip",
    )  # fmt: skip


def _translucent(colour: str, share: float) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {share})"


def _fill(colours: str | Sequence[str]) -> dict[str, object]:
    """Look of bars: translucent, so that an error bar is seen inside them too."""
    one = isinstance(colours, str)
    inside = _translucent(colours, 0.55) if one else [_translucent(colour, 0.55) for colour in colours]
    return {"color": inside, "line": {"color": colours if one else list(colours), "width": 1.5}}


def _layer_ticks(layers: int, first: int = 1) -> dict[str, object]:
    step = max(1, math.ceil(layers / 12))
    return {"tickmode": "linear", "tick0": first, "dtick": step, "range": [first - 0.5, first + layers - 0.5]}


def _add_bars(
    figure: go.Figure,
    values: Mapping[str, float | Interval],
    colours: Sequence[str],
    *,
    letters: int,
    **place: int,
) -> list[float]:
    """Bars of shares with their intervals; each number stands with its name under the bar. The means."""
    bounds = [_bounds(value) for value in values.values()]
    for name, bound in zip(values, bounds, strict=True):
        if not 0 <= bound.mean <= 1:
            raise ValueError(f"{name!r} is {bound.mean:g}; shares in [0, 1] are needed")
    stacked = Interval(*(np.array(part, dtype=float) for part in zip(*bounds, strict=True)))
    labels = []
    for name, bound in zip(values, bounds, strict=True):
        lines = [*_wrapped(str(name), max(8, letters)), f"<b>{_percent(bound.mean)}</b>"]
        known = math.isfinite(bound.low)
        labels.append("<br>".join(lines + [f"[{100 * bound.low:.1f}, {100 * bound.high:.1f}]"] * known))
    x = np.arange(len(labels))
    figure.add_bar(
        x=x, y=stacked.mean, error_y=_error_bars(stacked), marker=_fill(colours), width=0.5,
        customdata=labels, hovertemplate="%{customdata}<extra></extra>", showlegend=False, **place,
    )  # fmt: skip
    figure.update_xaxes(tickvals=x, ticktext=labels, showgrid=False, range=[-0.5, len(x) - 0.5], **place)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02], **place)
    return stacked.mean.tolist()


def _bounds(value: float | Interval) -> Interval:
    return value if isinstance(value, Interval) else Interval(float(value), math.nan, math.nan, 1)


def _error_bars(interval: Interval) -> dict[str, object]:
    up, down = interval.high - interval.mean, interval.mean - interval.low
    look = {"color": GREY, "thickness": 2, "width": 6}
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down} | look


# -------------------------------------------------------------------------------------------- text and layout


def _escaped(text: str) -> str:
    """Text as plotly will show it: neither its markup nor, between dollars, formulas."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def _wrapped(captions: str | Sequence[str], letters: int) -> list[str]:
    """Escaped lines; of several captions each begins with a bullet."""
    if isinstance(captions, str):
        texts = [captions]
    else:
        texts = [f"• {caption}" for caption in captions] if len(captions) > 1 else list(captions)
    lines = [line for text in texts for line in textwrap.wrap(text, letters) or [""]]
    return [_escaped(line) for line in lines]  # after wrapping: an entity must not be broken


def _percent(share: float) -> str:
    return f"{100 * float(share):.1f}%"


def _examples(models: dict[str, np.ndarray]) -> str:
    counts = sorted({len(values) for values in models.values()})
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{number} example{'s' if counts[-1] != 1 else ''}"


def _ends(models: dict[str, np.ndarray], what: str) -> str:
    """First and last mean of each model, for the alternative text."""
    parts = []
    for name, values in models.items():
        mean = bootstrap_interval(values, resamples=1).mean
        parts.append(f"{name + ' ' if name else ''}{mean[0]:.2f} to {mean[-1]:.2f}")
    return f"{what} {', '.join(parts)}"


def finish(
    figure: go.Figure, *, alt: str, title: str = "", width: int | None = None, height: int | None = None
) -> go.Figure:
    """The look that all figures share; one of pictures has its size already, and gets room for the title."""
    layout: dict[str, object] = {"template": TEMPLATE, "meta": {"alt": alt}}
    top = 44 if title else 10
    if figure.layout.width is not None:
        layout |= {"height": figure.layout.height + top, "margin": {"t": top}}
    else:
        top += 22 * bool(figure.layout.annotations)  # titles of panels
        figure.update_annotations(font_size=12)
        layout |= {"width": width or _WIDTH, "height": height or _HEIGHT}
        layout |= {"margin": {"l": 60, "r": 20, "t": top, "b": 50}}
    if title:
        layout["title"] = {"text": title, "y": 1, "yanchor": "top", "pad": {"t": 14, "l": 12}}
    return figure.update_layout(layout)
