"""Inter-Modality Flow, NMI and attention: the paper's Fig. 3 to 5, and what lies behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from vpworkbench.figures.style import (
    COLOURS,
    GREY,
    LANGUAGE,
    PALETTE,
    VISION,
    WIDTH,
    error_bars,
    escaped,
    fill,
    finish,
    percent,
    translucent,
)
from vpworkbench.stats import Interval, bootstrap_interval

Samples = ArrayLike | Mapping[str, ArrayLike | Interval]
"""(example, layer), or the name of each model -> (example, layer), or an interval of its own for each layer."""
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")  # models differ by more than colour


def flow_curves(
    from_input: Samples,
    within_layer: Samples,
    *,
    null_from_input: Samples | None = None,
    null_within_layer: Samples | None = None,
    over: str = "",
) -> go.Figure:
    """Inter-Modality Flow from the input to each layer and within each layer (paper Fig. 3 and 4).

    Parameters
    ----------
    from_input, within_layer : array, shape (example, layer), or mapping of model name to such arrays
        F^{1,j} and F^{j,j}; mean over examples with a bootstrap 95% band.
    null_from_input, null_within_layer : array, shape (example, layer) or (layer,), or mapping, optional
        The same under uniform attention, dashed: it depends on the token counts alone.
    over : str
        What the bands are over, for the title; empty: the examples.

    Raises
    ------
    ValueError
        If models, layers or examples do not agree.
    """
    curves = (_by_name(from_input, "from_input"), _by_name(within_layer, "within_layer"))
    if list(curves[0]) != list(curves[1]):
        raise ValueError(f"from_input has the models {list(curves[0])}, within_layer {list(curves[1])}")
    for name, (one, other) in zip(curves[0], zip(*(by.values() for by in curves), strict=True), strict=True):
        if _shape(one) != _shape(other):
            raise ValueError(f"from_input{_of(name)} is {_shape(one)}, within_layer {_shape(other)}")
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
    title = f"Inter-Modality Flow, mean and 95% band over {escaped(over) or _examples(curves[0])}"
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
        f"from {percent(np.nanmin(upper))} to {percent(np.nanmax(upper))}."
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
    figure.add_bar(**look, y=means[0], name="text to vision", marker=fill(LANGUAGE))
    figure.add_bar(**look, y=means[1], name="vision to text", marker=fill(VISION), error_y=error_bars(both))
    figure.update_layout(barmode="stack", bargap=0.35)
    figure.update_xaxes(title_text="layer", **_layer_ticks(len(layers)))
    figure.update_yaxes(title_text="attention that crosses", tickformat=".0%")
    alt = (
        f"Attention from text to vision, {percent(means[0][0])} in layer 1 and {percent(means[0][-1])} in "
        f"layer {len(layers)}, and from vision to text, {percent(means[1][0])} and {percent(means[1][-1])}."
    )
    title = f"Which way attention crosses, within each layer ({_examples({'': up})})"
    return finish(figure, title=title, alt=alt, width=640)


def nmi(values: Samples, *, with_input: bool = False, over: str = "") -> go.Figure:
    """How far apart the modalities lie in each layer (paper Fig. 5): NMI, smaller is more fused.

    Parameters
    ----------
    values : array, shape (example, layer), or mapping of model name to such arrays
        Mean over examples with a bootstrap 95% band; nan entries are left out.
    with_input : bool
        The first entry is the input of layer 1, as in `probes.hidden_states`: it is drawn at 0.
    over : str
        As of `flow_curves`.
    """
    models = _by_name(values, "values")
    figure = make_subplots(1, 1)
    _add_curves(figure, models, {}, legend=True, first=0 if with_input else 1, row=1, col=1)
    figure.update_xaxes(title_text="layer (0: input of layer 1)" if with_input else "layer")
    figure.update_yaxes(title_text="NMI (0: mixed, 1: apart)", range=[-0.02, 1.02])
    title = f"Modalities as clusters, mean and 95% band over {escaped(over) or _examples(models)}"
    alt = f"NMI of two clusters and the two modalities by layer; {_ends(models, 'mean')}."
    return finish(figure, title=title, alt=alt, width=WIDTH if over else 640)


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
    labels = [escaped(str(word)) for word in words]
    figure = go.Figure(
        go.Bar(
            x=place, y=weights, marker=fill(LANGUAGE), customdata=labels, showlegend=False,
            hovertemplate="%{customdata}: %{y:.1%}<extra></extra>",
        )
    )  # fmt: skip
    angle = -45 if len(words) > 12 else 0
    figure.update_xaxes(tickvals=place, ticktext=labels, showgrid=False, tickangle=angle)
    figure.update_yaxes(title_text="attention", tickformat=".0%" if np.nanmax(weights) >= 0.05 else ".1%")
    most = int(np.nanargmax(weights))
    alt = f"Attention on {len(words)} words, most on {words[most]!r}: {percent(weights[most])}."
    width = int(np.clip(46 * len(words) + 120, 380, WIDTH))
    return finish(figure, title=escaped(title), alt=alt, width=width, height=300)


def score_against_flow(
    models: Mapping[str, tuple[Interval, Interval]],
    *,
    nulls: Mapping[str, float],
    seeds: Mapping[str, Sequence[tuple[float, float]]],
    over: str,
    score: str,
    floor: float | None = None,
) -> go.Figure:
    """What a model reaches downstream against the attention that crosses in it, one point each.

    Parameters
    ----------
    models : mapping of str to (flow, score)
        F from the input to the last layer, and the score, each a mean with its interval.
    nulls : mapping of str to float
        The same flow under uniform attention: an open mark at the height of the point.
    seeds : mapping of str to pairs (flow, score)
        Of single runs, small.
    over, score : str
        What the intervals are over, and what the score is of.
    floor : float, optional
        What the text alone reaches, a line.
    """
    if not models:
        raise ValueError("score_against_flow needs at least one model")
    figure, told = go.Figure(), []
    for index, (name, (flow, reached)) in enumerate(models.items()):
        colour, symbol = PALETTE[index % len(PALETTE)], _SYMBOLS[index % len(_SYMBOLS)]
        label, height = escaped(name), float(reached.mean)
        look = {"legendgroup": label, "showlegend": False}
        figure.add_scatter(
            x=[nulls[name], float(flow.mean)], y=[height, height], mode="lines+markers", hoverinfo="skip",
            line={"color": colour, "dash": "dot", "width": 1.2},
            marker={"symbol": [f"{symbol}-open", symbol], "size": [9, 0], "color": colour}, **look,
        )  # fmt: skip
        figure.add_scatter(
            x=[pair[0] for pair in seeds[name]], y=[pair[1] for pair in seeds[name]], mode="markers", opacity=0.5,
            marker={"symbol": symbol, "size": 5, "color": colour}, hovertemplate="one run: %{x:.1%}, %{y:.1%}", **look,
        )  # fmt: skip
        bars = [error_bars(Interval(*(np.array([part], dtype=float) for part in one))) for one in (flow, reached)]
        figure.add_scatter(
            x=[float(flow.mean)], y=[height], mode="markers", name=label, legendgroup=label,
            marker={"symbol": symbol, "size": 11, "color": colour}, error_x=bars[0] | {"color": colour},
            error_y=bars[1] | {"color": colour}, hovertemplate="flow %{x:.1%}, score %{y:.1%}",
        )  # fmt: skip
        told.append(f"{name} {percent(height)} at {percent(flow.mean)}, null {percent(nulls[name])}")
    if floor is not None:
        figure.add_hline(
            floor, line={"color": GREY, "dash": "dash", "width": 1.5}, annotation_text="text alone",
            annotation_position="bottom right",
        )  # fmt: skip
        told.append(f"text alone {percent(floor)}")
    figure.update_xaxes(title_text="attention that crosses, input to last layer (open: uniform)", tickformat=".1~%")
    figure.update_yaxes(title_text=escaped(score), tickformat=".1~%")
    figure.update_layout(showlegend=True)
    title = f"Score against flow, 95% intervals over {escaped(over)}"
    return finish(figure, title=title, alt=f"{score} against flow from the input: {'; '.join(told)}.", height=400)


def _by_name(values: Samples, what: str) -> dict[str, np.ndarray | Interval]:
    """Arrays (example, layer), or intervals, by name of the model; one alone has the name ''."""
    named = dict(values) if isinstance(values, Mapping) else {"": values}
    arrays = {
        str(name): value if isinstance(value, Interval) else np.asarray(value, dtype=float)
        for name, value in named.items()
    }
    for name, array in arrays.items():
        if not isinstance(array, Interval) and (array.ndim != 2 or 0 in array.shape):
            raise ValueError(f"{what}{_of(name)} must be (example, layer), not {array.shape}")
    if not arrays:
        raise ValueError(f"{what} names no model")
    return arrays


def _shape(values: np.ndarray | Interval) -> tuple[int, ...]:
    return np.shape(values.mean) if isinstance(values, Interval) else values.shape


def _of(name: str) -> str:
    return f" of {name!r}" if name else ""


def _nulls(null: Samples | None, models: dict[str, np.ndarray | Interval], what: str, of: str) -> dict[str, np.ndarray]:
    """(layer,) by name of the model, for the models that have one."""
    if null is None:
        return {}
    named = dict(null) if isinstance(null, Mapping) else dict.fromkeys(models, null)
    if unknown := [name for name in named if name not in models]:
        raise ValueError(f"{what} is given for {unknown}, {of} for {list(models)}")
    lines = {name: np.asarray(value, dtype=float) for name, value in named.items()}
    lines = {name: line.mean(axis=0) if line.ndim == 2 else line for name, line in lines.items()}
    for name, line in lines.items():
        if line.shape != _shape(models[name])[-1:]:
            raise ValueError(f"{what}{_of(name)} has layers {line.shape}, {of} {_shape(models[name])[-1:]}")
    return lines


def _add_curves(
    figure: go.Figure,
    models: dict[str, np.ndarray | Interval],
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
        layers = np.arange(first, first + _shape(values)[-1])
        longest = max(longest, len(layers))
        label = escaped(name) or "model"
        interval = values if isinstance(values, Interval) else bootstrap_interval(values)
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
        line={"width": 0}, fillcolor=translucent(colour, 0.22), name=f"{label}, 95%", legendgroup=label,
        showlegend=False, hoverinfo="skip",
    )  # fmt: skip


def _layer_ticks(layers: int, first: int = 1) -> dict[str, object]:
    step = max(1, math.ceil(layers / 12))
    return {"tickmode": "linear", "tick0": first, "dtick": step, "range": [first - 0.5, first + layers - 0.5]}


def _examples(models: dict[str, np.ndarray | Interval]) -> str:
    counts = sorted({int(np.max(one.count)) if isinstance(one, Interval) else len(one) for one in models.values()})
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{number} example{'s' if counts[-1] != 1 else ''}"


def _ends(models: dict[str, np.ndarray | Interval], what: str) -> str:
    """First and last mean of each model, for the alternative text."""
    parts = []
    for name, values in models.items():
        mean = values.mean if isinstance(values, Interval) else bootstrap_interval(values, resamples=1).mean
        parts.append(f"{name + ' ' if name else ''}{mean[0]:.2f} to {mean[-1]:.2f}")
    return f"{what} {', '.join(parts)}"
