"""Curves that a run logged, and scores on held-out data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, product
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from vpworkbench.figures import style
from vpworkbench.figures.style import error_bars, escaped, fill, finish, percent, stacked, wrapped
from vpworkbench.stats import Interval

_OBJECTIVES = {
    "mlm": "masked words (MLM), nats",
    "itm": "match or not (ITM), nats",
    "vla": "alignment (VLA), cosine distance",
    "mfr": "masked features (MFR), squared",
    "mvm": "masked codes (MVM), nats",
    "mrc": "masked classes (MRC), nats",
}
_WATCHED = {
    "training_score": "score on training examples",
    "lr_share": "learning rate, % of its peak",
    "gradient_norm": "gradient norm",
    "target_variance": "variance of visual features",
    "target_rank": "effective rank of visual features",
    "held_out_loss": "held-out loss (Eq. 10)",
    "flow": "flow to the last layer, held out",
    "nmi": "NMI at the last layer, held out",
    "step_s": "seconds per step",
}
DASHES = ("solid", "dot", "dash")
_SMOOTH_FROM = 40  # lines of metrics


def losses(metrics: pd.DataFrame) -> go.Figure:
    """One small panel for each logged quantity: objectives in blue, the rest in green.

    `metrics` has a column `step` and one for each quantity, see `Run.metrics`. With 40 lines or more, a running mean is
    drawn over the raw values.
    """
    order = [*_OBJECTIVES, *(name for name in metrics if name not in _WATCHED), *_WATCHED]
    names = [name for name in dict.fromkeys(order) if name in metrics and name != "step"]
    numeric = metrics[names].apply(pd.to_numeric, errors="coerce").dropna(axis=1, how="all")
    names = list(numeric)
    if "step" not in metrics or not names:
        raise ValueError(f"losses needs a column `step` and at least one more, not {list(metrics.columns)}")
    rows, columns = _small_multiples(len(names))
    titles = [_title(name) for name in names]
    figure = make_subplots(rows, columns, subplot_titles=titles, vertical_spacing=0.3 / rows)
    for index, name in enumerate(names):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        colour, label = style.GREEN if name in _WATCHED else style.BLUE, escaped(str(name))
        smooth = len(metrics) >= _SMOOTH_FROM and name != "lr_share"
        drawn = numeric[name].dropna()  # probes are not in every line
        look = {"line": {"color": colour, "width": 1.5}, "mode": _mode(drawn), "opacity": 0.35 if smooth else 1}
        figure.add_scatter(x=metrics["step"][drawn.index], y=drawn, name=label, **look, **place)
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


def run_curves(curves: Mapping[str, pd.DataFrame], quantity: str) -> go.Figure:
    """One logged quantity of several runs in one panel; `curves` are those of `results.curves`."""
    figure = go.Figure()
    for (dash, colour), (name, metrics) in zip(cycle(product(DASHES, style.PALETTE)), curves.items()):
        line = {"color": colour, "dash": dash, "width": 1.5}
        x, y = metrics["step"], metrics[quantity]
        figure.add_scatter(x=x, y=y, name=escaped(name), line=line, mode=_mode(metrics))
    title = _title(quantity)
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text=title)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.2})
    ends = [f"{name} {metrics[quantity].iloc[-1]:.3g}" for name, metrics in curves.items() if len(metrics)]
    alt = f"{quantity} of {len(curves)} runs; last values: {', '.join(ends) or 'none'}."
    return finish(figure, title=title, alt=alt, height=420)


def _title(quantity: str) -> str:
    return (_OBJECTIVES | _WATCHED).get(quantity, escaped(str(quantity)))


def _mode(points: pd.Series | pd.DataFrame) -> str:
    return "lines" if len(points) > 5 else "lines+markers"


def _small_multiples(count: int) -> tuple[int, int]:
    """Rows and columns with the fewest empty panels, rather wide than tall."""
    columns = count if count <= 4 else min((4, 3), key=lambda columns: -count % columns)
    return math.ceil(count / columns), columns


def held_out(result: Any) -> go.Figure:
    """Match decisions and hidden words on held-out images, with each text's own image and with another one.

    `result` is a `train.evaluate.HeldOut`.
    """
    titles = ("Match or not (ITM)", "Hidden word (MLM)")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.12)
    itm = {"its image": result.itm_accuracy, "another image": result.itm_other_image}
    mlm = {"its image": result.mlm_with_image, "another image": result.mlm_other_image}
    _add_bars(figure, itm, [style.BLUE, style.ORANGE], letters=20, row=1, col=1)
    _add_bars(figure, mlm, [style.BLUE, style.ORANGE], letters=20, row=1, col=2)
    figure.update_yaxes(title_text="correct decisions", col=1)
    figure.update_yaxes(title_text="correct words", col=2)
    line = {"color": style.GREY, "dash": "dash", "width": 1.5}
    note = {"annotation_text": "chance", "annotation_position": "top right"}
    figure.add_hline(0.5, line=line, row=1, col=1, **note)
    ratio = result.mlm_ratio
    times = f"{ratio:.2f} times as often with its image"
    times = times if result.mlm_other_image.mean > 0 else "none is correct with another image"
    figure.update_xaxes(title_text=times, row=1, col=2)
    alt = (
        f"Correct match decisions: {percent(result.itm_accuracy.mean)} with the image, "
        f"{percent(result.itm_other_image.mean)} with another one, chance 50%; "
        f"correct hidden words: {percent(result.mlm_with_image.mean)} with the image, "
        f"{percent(result.mlm_other_image.mean)} with another one."
    )
    return finish(figure, title="Held-out images: does the model use the picture?", alt=alt, width=760)


def accuracy_bars(
    values: Mapping[str, float | Interval],
    *,
    chance: Mapping[str, float] | None = None,
    title: str = "Accuracy",
    axis: str = "accuracy",
) -> go.Figure:
    """Accuracies, or other shares in [0, 1], by name; with error bars if they have intervals.

    `chance` has the chance levels of some names; they are marked on the bars.
    """
    width = int(np.clip(140 * len(values) + 120, 380, style.WIDTH))
    figure = go.Figure()
    means = _add_bars(figure, values, [style.BLUE] * len(values), letters=int((width - 120) / len(values) / 7))
    if chance:
        names = list(values)
        x, y = [names.index(name) for name in chance], list(chance.values())
        mark = {"symbol": "line-ew", "size": 46, "line": {"color": style.VERMILLION, "width": 2.5}}
        look = {"mode": "markers", "marker": mark, "hovertemplate": "chance %{y:.1%}<extra></extra>"}
        figure.add_scatter(x=x, y=y, name="chance", showlegend=True, **look)
    figure.update_yaxes(title_text=escaped(axis))
    shares = ", ".join(f"{name} {percent(mean)}" for name, mean in zip(values, means, strict=True))
    return finish(figure, title=escaped(title), alt=f"{title}: {shares}.", width=width)


def task_scores(results: Mapping[str, Any], *, title: str) -> go.Figure:
    """Held-out scores by name of the model: one bar each, or one for each recall if the task is retrieval.

    A result has a method `intervals()` that returns one score, or several, by name.
    """
    scores = {name: result.intervals() for name, result in results.items()}
    if any(len(score) > 1 for score in scores.values()):
        return grouped_bars(scores, title=title, axis="queries with a right answer in the top K (TR texts, IR images)")
    single = {name: next(iter(score.values())) for name, score in scores.items()}
    return accuracy_bars(single, title=title, axis="score")


def grouped_bars(groups: Mapping[str, Mapping[str, Interval]], *, title: str, axis: str) -> go.Figure:
    """The same shares in [0, 1] of several models, or of one at several times, side by side: group -> name -> share."""
    figure, told = go.Figure(), []
    for colour, (group, found) in zip(cycle(style.PALETTE), groups.items()):
        bars = stacked(list(found.values()))
        look = {"name": escaped(group), "marker": fill(colour), "error_y": error_bars(bars)}
        bounds = [f"[{100 * one.low:.1f}, {100 * one.high:.1f}]" for one in found.values()]
        figure.add_bar(x=list(found), y=bars.mean, customdata=bounds, hovertemplate="%{y:.1%} %{customdata}", **look)
        told.append(f"{group} " + ", ".join(f"{name} {percent(one.mean)}" for name, one in found.items()))
    figure.update_layout(barmode="group", hovermode="x unified", legend={"orientation": "h", "y": -0.15})
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02], title_text=escaped(axis))
    return finish(figure, title=escaped(title), alt=f"{title}, {axis}: {'; '.join(told)}.")


def forest(rows: Mapping[str, tuple[Interval, Interval]], *, no_matter: float, title: str, axis: str) -> go.Figure:
    """Differences by name, the first one on top: thick its interval, thin the one corrected for many comparisons.

    Between plus and minus `no_matter`, shaded, a difference does not matter.
    """
    figure, names = go.Figure(), [escaped(name) for name in rows]
    for intervals, width in ((1, 2), (0, 7)):
        bars = stacked([one[intervals] for one in rows.values()])
        look = {"color": style.BLUE, "thickness": width, "width": 0}
        marks = {"mode": "markers", "marker": {"color": style.BLUE, "size": 11}, "showlegend": False}
        figure.add_scatter(x=bars.mean, y=names, error_x=error_bars(bars) | look, **marks)
    figure.add_vrect(-no_matter, no_matter, fillcolor=style.GREY, opacity=0.15, line_width=0, layer="below")
    figure.add_vline(0, line={"color": style.GREY, "width": 1.5})
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title_text=escaped(f"{axis} (thick: 95%, thin: corrected for all comparisons)"))
    told = (f"{name} {plain.mean:+.3f} [{plain.low:+.3f}, {plain.high:+.3f}]" for name, (plain, _) in rows.items())
    alt = f"{title}, {axis}: {'; '.join(told)}."
    return finish(figure, title=escaped(title), alt=alt, height=110 + 42 * len(rows)).update_layout(margin_l=190)


def scores_against(
    measures: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], *, title: str, score: str
) -> go.Figure:
    """A score against several measures of the same runs: measure -> group -> values and scores; one panel each."""
    rows, columns = _small_multiples(len(measures))
    titles = [escaped(name) for name in measures]
    figure = make_subplots(rows, columns, subplot_titles=titles, shared_yaxes=True, vertical_spacing=0.22 / rows)
    for index, groups in enumerate(measures.values()):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        for colour, (group, (values, scores)) in zip(cycle(style.PALETTE), groups.items()):
            look = {"mode": "markers", "marker": {"color": colour, "size": 8}, "legendgroup": group}
            label = {"name": escaped(group), "showlegend": index == 0}
            figure.add_scatter(x=values, y=scores, hovertemplate="%{x:.3f}, score %{y:.1%}", **look, **label, **place)
    figure.update_yaxes(tickformat=".0%")
    figure.update_yaxes(title_text=escaped(score), col=1)
    counts = ", ".join(f"{len(scores)} of {group}" for group, (_, scores) in next(iter(measures.values())).items())
    alt = f"{score} against {', '.join(measures)}; one mark for each run: {counts}."
    return finish(figure, title=escaped(title), alt=alt, height=120 + 200 * rows)


def _add_bars(
    figure: go.Figure, values: Mapping[str, float | Interval], colours: Sequence[str], *, letters: int, **place: int
) -> list[float]:
    """Add bars of shares with their intervals, and each number below its bar; return the means."""
    intervals = [one if isinstance(one, Interval) else Interval(one, math.nan, math.nan, 1) for one in values.values()]
    labels = []
    for name, one in zip(values, intervals, strict=True):
        if not 0 <= one.mean <= 1:
            raise ValueError(f"{name!r} is {one.mean:g}; shares in [0, 1] are needed")
        bounds = [f"[{100 * one.low:.1f}, {100 * one.high:.1f}]"] if math.isfinite(one.low) else []
        labels.append("<br>".join([*wrapped(str(name), max(8, letters)), f"<b>{percent(one.mean)}</b>", *bounds]))
    x, bars = np.arange(len(labels)), stacked(intervals)
    look = {"width": 0.5, "marker": fill(colours), "error_y": error_bars(bars), "showlegend": False}
    hover = {"customdata": labels, "hovertemplate": "%{customdata}<extra></extra>"}
    figure.add_bar(x=x, y=bars.mean, **look, **hover, **place)
    figure.update_xaxes(tickvals=x, ticktext=labels, showgrid=False, range=[-0.5, len(x) - 0.5], **place)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02], **place)
    return bars.mean.tolist()
