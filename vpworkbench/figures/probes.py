"""Inter-Modality Flow and NMI: the paper's Fig. 3 to 5, and views of the same numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from vpworkbench.figures import style
from vpworkbench.figures.style import error_bars, escaped, fill, finish, percent, stacked, translucent, wrapped
from vpworkbench.stats import Interval, bootstrap_interval

Samples = ArrayLike | Mapping[str, ArrayLike | Interval]
"""(example, layer); or name of each model -> (example, layer), or a ready interval for each layer."""
Uncounted = Sequence[str] | Mapping[str, Sequence[str]]
"""Names of layers, of one model or of each."""
_GAP = 0.16  # between maps, for the scale of each
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")  # models differ by more than colour


def flow_curves(
    from_input: Samples,
    within_layer: Samples,
    *,
    null_from_input: Samples | None = None,
    null_within_layer: Samples | None = None,
    live: ArrayLike | Mapping[str, ArrayLike] | None = None,
    over: str = "",
    uncounted: Uncounted = (),
) -> go.Figure:
    """Inter-Modality Flow from the input to each layer and within each layer (paper Fig. 3 and 4).

    `from_input` and `within_layer` are F^{1,j} and F^{j,j}, (example, layer): the mean over examples with a bootstrap
    95% band. Their nulls, (example, layer) or (layer,), are the same under uniform attention, dashed: they depend on
    the token counts only. `live`, (example, layer, layer), is the part of every span that can reach a read-out, dotted;
    see `InterModalityFlow.live`. Each may be a mapping of model name to such arrays. `over` names what the bands are
    over, for the title; empty: the examples. `uncounted` are layers that mix tokens without being counted, of one model
    or of each.
    """
    curves = _intervals(from_input), _intervals(within_layer)
    nulls = _lines(null_from_input, curves[0]), _lines(null_within_layer, curves[1])
    spans = _lines(live, curves[0])  # mean over examples, (layer, layer)
    if any(span.ndim != 2 for span in spans.values()):
        raise ValueError("live needs an array (example, layer, layer) for each model")
    alive = {name: span[0] for name, span in spans.items()}, {name: span.diagonal() for name, span in spans.items()}
    titles = ("From the input to layer j (Fig. 3)", "Within layer j (Fig. 4)")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.09)
    for column, (models, *lines) in enumerate(zip(curves, nulls, alive, strict=True), start=1):
        beside = dict(zip(_DASHES, lines, strict=True))
        _add_curves(figure, models, beside, legend=column == 1, row=1, col=column)
    figure.update_xaxes(title_text="layer j")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(title_text="share of attention across modalities", col=1)
    ends = f"{_ends(curves[0], 'from the input')}; {_ends(curves[1], 'within a layer')}"
    title = f"Inter-Modality Flow, mean and 95% band over {escaped(over) or _examples(curves[0])}"
    finish(figure, title=title, alt=f"Share of attention that crosses the modalities, by layer; {ends}.")
    return _name_uncounted(figure, uncounted, letters=120)


def flow_triangle(flow: ArrayLike, *, uncounted: Uncounted = ()) -> go.Figure:
    """Inter-Modality Flow of every span: `flow[i, j]` from the input of layer i to the output of layer j.

    `uncounted` as in `flow_curves`.
    """
    cells = triangle(np.asarray(flow, dtype=float))
    figure = go.Figure(cells.update(colorbar={"outlinewidth": 0, "thickness": 14}))
    ticks = {"dtick": max(1, math.ceil(len(flow) / 16)), "tick0": 1, "showgrid": False, "constrain": "domain"}
    figure.update_xaxes(title_text="to the output of layer j", **ticks)
    figure.update_yaxes(title_text="from the input of layer i", autorange="reversed", scaleanchor="x", **ticks)
    alt = (
        f"Share of attention that crosses the modalities for every span of {len(flow)} layers, "
        f"from {percent(np.nanmin(cells.z))} to {percent(np.nanmax(cells.z))}."
    )
    title = "Inter-Modality Flow from layer i to layer j, %"
    return _name_uncounted(finish(figure, title=title, alt=alt, width=520, height=420), uncounted, letters=75)


def _name_uncounted(figure: go.Figure, uncounted: Uncounted, *, letters: int) -> go.Figure:
    """A note below a finished figure; layers of one stack are named once, with their numbers."""
    models = uncounted if isinstance(uncounted, Mapping) else {"": uncounted}
    notes = []
    for model, layers in models.items():
        stacks: dict[str, list[str]] = {}
        for layer in layers:
            stack, _, number = layer.rpartition(".")
            stacks.setdefault(stack, []).append(number)
        named = "; ".join(f"{stack} {', '.join(numbers)}" for stack, numbers in stacks.items())
        notes += [f"{model and model + ': '}without softmax attention, and not counted: {named}"] if layers else []
    if not notes:
        return figure
    lines = [line for note in notes for line in wrapped(note, letters)]
    room, layout = 14 * len(lines) + 8, figure.layout
    place = {"xref": "paper", "yref": "paper", "x": 0, "y": 0, "xanchor": "left", "yanchor": "top", "yshift": -44}
    figure.add_annotation(text="<br>".join(lines), showarrow=False, align="left", font={"size": 11}, **place)
    alt = f"{layout.meta['alt']} {'. '.join(notes)}."
    return figure.update_layout(height=layout.height + room, margin={"b": layout.margin.b + room}, meta={"alt": alt})


def triangle(values: np.ndarray, groups: Sequence[str] = (), *, share: bool = True) -> go.Heatmap:
    """The cells of `flow_triangle` or `layer_maps`, with their numbers where there is room."""
    layers = np.arange(1, values.shape[1] + 1)
    rows = list(groups) or layers
    drawn = values if groups else np.where(layers[:, None] <= layers, values, np.nan)
    numbers = np.char.mod("%.1f", 100 * drawn) if share else np.char.mod("%.2f", drawn)
    numbers = np.where(np.isnan(drawn), "", numbers)
    text = {"text": numbers, "texttemplate": "%{text}" if len(layers) <= 16 else None}
    colours = {"colorscale": style.COLOURS} if share else {"colorscale": style.DIVERGING, "zmid": 0}
    look = {"hoverongaps": False, "xgap": 1, "ygap": 1, "colorbar": {"tickformat": ".0%" if share else None}}
    number = "%{z:.1%}" if share else "%{z:.2f}"
    place = "%{y}, layer %{x}" if groups else "from the input of layer %{y} to the output of layer %{x}"
    return go.Heatmap(
        x=layers, y=rows, z=drawn, hovertemplate=f"{place}: {number}<extra></extra>", **text, **look, **colours
    )


def layer_curves(
    curves: Samples, *, title: str, axis: str, first: int = 1, level: tuple[str, float] | None = None
) -> go.Figure:
    """Any numbers by layer, each with its 95% band: effects of knock-out, or a read-out by the lens.

    `curves` are as in `flow_curves`; `first` is 0 where the first is of the input of layer 1; `level` is the name and
    height of a dashed line, such as chance.
    """
    found = _intervals(curves)
    figure = make_subplots(1, 1)
    _add_curves(figure, found, {}, legend=True, first=first, row=1, col=1)
    if level is not None:
        note = {"annotation_text": escaped(level[0]), "annotation_position": "bottom right"}
        figure.add_hline(level[1], line={"color": style.GREY, "dash": "dash", "width": 1.5}, **note)
    figure.update_xaxes(title_text="layer (0: input of layer 1)" if first == 0 else "layer")
    figure.update_yaxes(title_text=escaped(axis))
    alt = f"{title}, {axis} by layer; {_ends(found, 'mean')}."
    return finish(figure, title=escaped(title), alt=alt)


def layer_maps(
    maps: Mapping[str, ArrayLike], *, title: str, groups: Sequence[str] = (), shares: Collection[str] = ()
) -> go.Figure:
    """Maps side by side, with a scale each: of spans, as in `flow_triangle`, or of groups of tokens by layer.

    `maps` are arrays (layer, layer), drawn where layer j is not before layer i; with `groups`, the names of the rows,
    (group, layer). The maps named in `shares` are drawn in percent, the others around 0.
    """
    figure = make_subplots(1, len(maps), subplot_titles=[escaped(name) for name in maps], horizontal_spacing=_GAP)
    said = []
    for column, (name, values) in enumerate(maps.items(), start=1):
        cells = triangle(np.asarray(values, dtype=float), [escaped(group) for group in groups], share=name in shares)
        domain = figure.layout["xaxis" if column == 1 else f"xaxis{column}"].domain
        bar = {"x": domain[1] + _GAP / 20, "xanchor": "left", "outlinewidth": 0, "thickness": 10, "nticks": 6}
        figure.add_trace(cells.update(colorbar=bar), row=1, col=column)
        form = ".1%" if name in shares else ".2f"
        said.append(f"{name} from {np.nanmin(cells.z):{form}} to {np.nanmax(cells.z):{form}}")
    layers = len(cells.x)
    figure.update_xaxes(title_text="before layer" if groups else "to layer j", showgrid=False, **_layer_ticks(layers))
    figure.update_yaxes(autorange="reversed", showgrid=False)
    if not groups:
        figure.update_yaxes(title_text="from layer i", col=1)
        figure.update_yaxes(dtick=max(1, math.ceil(layers / 12)), tick0=1)
    width = min(960, 140 + 320 * len(maps) + (180 if groups else 0))
    return finish(figure, title=escaped(title), alt=f"{title}: {'; '.join(said)}.", width=width, height=360)


def flow_directions(text_to_vision: ArrayLike, vision_to_text: ArrayLike) -> go.Figure:
    """The two directions of the flow within each layer, (example, layer) each, stacked; they add up to Fig. 4.

    The error bar is the 95% interval of their sum.
    """
    up, down = np.asarray(text_to_vision, dtype=float), np.asarray(vision_to_text, dtype=float)
    layers = np.arange(1, up.shape[1] + 1)
    both = bootstrap_interval(up + down)
    means = bootstrap_interval(up).mean, bootstrap_interval(down).mean
    figure = go.Figure()
    look = {"x": layers, "hovertemplate": "layer %{x}: %{y:.1%}"}
    figure.add_bar(**look, y=means[0], name="text to vision", marker=fill(style.LANGUAGE))
    figure.add_bar(**look, y=means[1], name="vision to text", marker=fill(style.VISION), error_y=error_bars(both))
    figure.update_layout(barmode="stack", bargap=0.35)
    figure.update_xaxes(title_text="layer", **_layer_ticks(len(layers)))
    figure.update_yaxes(title_text="share of attention across modalities", tickformat=".0%")
    alt = (
        f"Attention from text to vision, {percent(means[0][0])} in layer 1 and {percent(means[0][-1])} in "
        f"layer {len(layers)}, and from vision to text, {percent(means[1][0])} and {percent(means[1][-1])}."
    )
    title = f"Which way attention crosses, within each layer ({_examples({'': both})})"
    return finish(figure, title=title, alt=alt, width=640)


def nmi(values: Samples, *, over: str = "") -> go.Figure:
    """How well two clusters match the two modalities in each layer (paper Fig. 5): a smaller NMI is more fused.

    `values` is (example, layer + 1), or a mapping of model name to such arrays, with the input of layer 1 first, which
    is drawn at 0. Mean over examples with a bootstrap 95% band, nan entries left out; `over` is as in `flow_curves`.
    """
    models = _intervals(values)
    title = f"Modalities as clusters, mean and 95% band over {over or _examples(models)}"
    figure = layer_curves(models, title=title, axis="NMI (0: mixed, 1: apart)", first=0)
    figure.update_yaxes(range=[-0.02, 1.02])
    return figure.update_layout(width=style.WIDTH if over else 640)


def modality_map(points: ArrayLike, vision: ArrayLike, tokens: ArrayLike, *, layer: int) -> go.Figure:
    """Tokens of one example on two principal components, coloured by modality.

    `points` are (token, 2), see `probes.modality_pca`; `vision` and `tokens` are bool (token,), True at visual tokens
    and at real positions; `layer` counts from 0, in the title from 1.
    """
    points, vision, tokens = np.asarray(points, dtype=float), np.asarray(vision, bool), np.asarray(tokens, bool)
    figure = go.Figure()
    drawn = tokens & np.isfinite(points).all(axis=1)
    language, visual = np.flatnonzero(drawn & ~vision), np.flatnonzero(drawn & vision)
    looks = ("language", style.LANGUAGE, "circle", language), ("vision", style.VISION, "square", visual)
    for name, colour, symbol, index in looks:
        marker = {"color": colour, "symbol": symbol, "size": 8, "opacity": 0.9}
        hover = {"customdata": index, "hovertemplate": f"{name} token %{{customdata}}<extra></extra>"}
        look = {"mode": "markers", "name": f"{name} ({len(index)})", "marker": marker}
        figure.add_scatter(x=points[index, 0], y=points[index, 1], **look, **hover)
    figure.update_xaxes(title_text="first principal component", constrain="domain")
    figure.update_yaxes(title_text="second principal component", scaleanchor="x", constrain="domain")
    alt = (
        f"{len(language)} language tokens and {len(visual)} visual tokens of layer {layer + 1} "
        "on their first two principal components."
    )
    return finish(figure, title=f"Tokens by modality, layer {layer + 1}", alt=alt, width=560, height=400)


def score_against_flow(
    models: Mapping[str, tuple[Interval, Interval]],
    *,
    nulls: Mapping[str, float],
    seeds: Mapping[str, Sequence[tuple[float, float]]],
    over: str,
    score: str,
    floor: float | None = None,
) -> go.Figure:
    """Downstream score against the attention that crosses the modalities, one point for each model.

    `models` has flow from the input to the last layer, and the score, by name; `nulls` the same flow under uniform
    attention, an open mark at the height of the point; `seeds` (flow, score) of single runs, small marks. `over` and
    `score` name what the intervals are over, and the score; `floor`, a dashed line, is that of a model of text only.
    """
    figure, points = go.Figure(), []
    for index, (name, (flow, reached)) in enumerate(models.items()):
        _add_point(figure, index, name, models[name], nulls[name], seeds[name])
        points.append(f"{name} {percent(reached.mean)} at {percent(flow.mean)}, null {percent(nulls[name])}")
    if floor is not None:
        note = {"annotation_text": "text only", "annotation_position": "bottom right"}
        figure.add_hline(floor, line={"color": style.GREY, "dash": "dash", "width": 1.5}, **note)
        points.append(f"text only {percent(floor)}")
    axis = "share of attention across modalities, input to last layer (open: uniform attention)"
    figure.update_xaxes(title_text=axis, tickformat=".1~%")
    figure.update_yaxes(title_text=escaped(score), tickformat=".1~%")
    figure.update_layout(showlegend=True)
    title = f"Score against flow, 95% intervals over {escaped(over)}"
    return finish(figure, title=title, alt=f"{score} against flow from the input: {'; '.join(points)}.", height=400)


def _add_point(
    figure: go.Figure,
    index: int,
    name: str,
    point: tuple[Interval, Interval],
    null: float,
    seeds: Sequence[tuple[float, float]],
) -> None:
    """One model: its mean with error bars, its single runs, and a dotted line to its null."""
    colour, symbol, label = *_look(index), escaped(name)
    x, y = (float(interval.mean) for interval in point)
    group = {"legendgroup": label, "showlegend": False}
    line = {"color": colour, "dash": "dot", "width": 1.2}
    ends = {"symbol": [f"{symbol}-open", symbol], "size": [9, 0], "color": colour}
    figure.add_scatter(x=[null, x], y=[y, y], mode="lines+markers", hoverinfo="skip", line=line, marker=ends, **group)
    small = {"marker": {"symbol": symbol, "size": 5, "color": colour}, "mode": "markers", "opacity": 0.5}
    hover = "one run: %{x:.1%}, %{y:.1%}"
    flows, scores = zip(*seeds, strict=True)
    figure.add_scatter(x=flows, y=scores, hovertemplate=hover, **small, **group)
    across, up = (error_bars(stacked([interval])) | {"color": colour} for interval in point)
    look = {"marker": {"symbol": symbol, "size": 11, "color": colour}, "hovertemplate": "flow %{x:.1%}, score %{y:.1%}"}
    figure.add_scatter(x=[x], y=[y], mode="markers", name=label, legendgroup=label, error_x=across, error_y=up, **look)


# ------------------------------------------------------------------------------------- curves of one or more models


def _intervals(samples: Samples) -> dict[str, Interval]:
    """An interval for each layer, by name of the model; a single model has the name ''."""
    named = samples if isinstance(samples, Mapping) else {"": samples}
    found = {name: one if isinstance(one, Interval) else bootstrap_interval(one) for name, one in named.items()}
    if any(one.mean.ndim != 1 for one in found.values()):
        raise ValueError("curves need an array (example, layer) for each model; one example needs a first axis, too")
    return found


def _lines(values: Samples | None, models: dict[str, Interval]) -> dict[str, np.ndarray]:
    """Values of each layer, or span, by name of the model, for the models that have some; means over examples."""
    if values is None:
        return {}
    named = values if isinstance(values, Mapping) else dict.fromkeys(models, values)
    lines = {name: np.asarray(line, dtype=float) for name, line in named.items()}
    return {name: line.mean(axis=0) if line.ndim > 1 else line for name, line in lines.items()}


_DASHES = {"uniform attention": "dash", "can reach the read-out": "dot"}  # lines beside the curves


def _add_curves(
    figure: go.Figure,
    models: dict[str, Interval],
    beside: dict[str, dict[str, np.ndarray]],
    *,
    legend: bool,
    first: int = 1,
    **place: int,
) -> None:
    """Mean and 95% band of each model over its layers, which count from `first`, and lines of `_DASHES` beside it."""
    beside = {kind: lines for kind, lines in beside.items() if lines}
    for index, (name, interval) in enumerate(models.items()):
        (colour, symbol), label = _look(index), escaped(name) or "model"
        layers = np.arange(first, first + len(interval.mean))
        figure.add_trace(_band(layers, interval, colour, label), **place)
        look = {"line": {"color": colour, "width": 2}, "marker": {"symbol": symbol, "size": 7}}
        hover = {
            "customdata": np.stack([interval.low, interval.high], axis=1),
            "hovertemplate": "layer %{x}: %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]",
        }
        entry = {"legendgroup": label, "showlegend": legend and (len(models) > 1 or bool(beside))}
        look |= {"mode": "lines+markers", "name": label}
        figure.add_scatter(x=layers, y=interval.mean, **look, **entry, **hover, **place)
        for kind, lines in beside.items():
            if name in lines:
                look = _line(kind, colour) | {"name": f"{label}, {kind}", "opacity": 0.8, "showlegend": False}
                figure.add_scatter(x=layers, y=lines[name], hovertemplate="layer %{x}: %{y:.3f}", **look, **place)
    for kind in beside if legend else ():  # one grey entry for the lines of all models
        figure.add_scatter(x=[None], y=[None], name=kind, **_line(kind, style.GREY), **place)
    longest = max(len(interval.mean) for interval in models.values())
    figure.update_xaxes(**_layer_ticks(longest, first), **place)


def _line(kind: str, colour: str) -> dict[str, object]:
    return {"mode": "lines", "legendgroup": kind, "line": {"color": colour, "width": 1.5, "dash": _DASHES[kind]}}


def _look(index: int) -> tuple[str, str]:
    """Colour and symbol of a model."""
    return style.PALETTE[index % len(style.PALETTE)], _SYMBOLS[index % len(_SYMBOLS)]


def _band(layers: np.ndarray, interval: Interval, colour: str, label: str) -> go.Scatter:
    known = np.isfinite(interval.low)
    x, low, high = layers[known], interval.low[known], interval.high[known]
    outline = {"x": np.concatenate([x, x[::-1]]), "y": np.concatenate([high, low[::-1]])}
    look = {"mode": "lines", "line": {"width": 0}, "fill": "toself", "fillcolor": translucent(colour, 0.22)}
    entry = {"name": f"{label}, 95%", "legendgroup": label, "showlegend": False}
    return go.Scatter(**outline, **look, **entry, hoverinfo="skip")


def _layer_ticks(layers: int, first: int = 1) -> dict[str, object]:
    step = max(1, math.ceil(layers / 12))
    return {"tickmode": "linear", "tick0": first, "dtick": step, "range": [first - 0.5, first + layers - 0.5]}


def _examples(models: dict[str, Interval]) -> str:
    counts = sorted({int(np.max(interval.count)) for interval in models.values()})
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{number} example{'s' if counts[-1] != 1 else ''}"


def _ends(models: dict[str, Interval], label: str) -> str:
    """First and last mean of each model, for the alternative text."""
    ends = (f"{name} {one.mean[0]:.2f} to {one.mean[-1]:.2f}".strip() for name, one in models.items())
    return f"{label} {', '.join(ends)}"
