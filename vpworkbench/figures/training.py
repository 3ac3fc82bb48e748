"""What a run logged, and what it reached on held-out data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from vpworkbench.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALETTE,
    VERMILLION,
    WIDTH,
    error_bars,
    escaped,
    fill,
    finish,
    percent,
    wrapped,
)
from vpworkbench.stats import Interval

_OBJECTIVES = {
    "mlm": "masked words (MLM), nats",
    "itm": "match or not (ITM), nats",
    "vla": "alignment (VLA), cosine distance",
    "mfr": "masked features (MFR), squared",
    "mvm": "masked codes (MVM), nats",
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
    "step_s": "seconds a step",
}
DASHES = ("solid", "dot", "dash")
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
    titles = [(_OBJECTIVES | _WATCHED).get(name, escaped(str(name))) for name in names]
    figure = make_subplots(
        rows, columns, subplot_titles=titles, horizontal_spacing=0.2 / columns, vertical_spacing=0.3 / rows
    )
    for index, name in enumerate(names):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        colour, label = GREEN if name in _WATCHED else BLUE, escaped(str(name))
        smooth = len(metrics) >= _SMOOTH_FROM and name != "lr_share"
        drawn = numeric[name].dropna()  # probes are not in every line
        figure.add_scatter(
            x=metrics["step"][drawn.index], y=drawn, name=label, line={"color": colour, "width": 1.5},
            mode="lines" if len(drawn) > 5 else "lines+markers", opacity=0.35 if smooth else 1, **place,
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


def run_curves(curves: Mapping[str, pd.DataFrame], quantity: str) -> go.Figure:
    """One logged quantity of several runs over each other.

    Parameters
    ----------
    curves : mapping of str to DataFrame
        By the run's name: columns `step` and `quantity`, as `results.curves` gives them.
    """
    figure = go.Figure()
    for number, (name, metrics) in enumerate(curves.items()):
        line = {"color": PALETTE[number % len(PALETTE)], "dash": DASHES[number // len(PALETTE) % len(DASHES)]}
        figure.add_scatter(
            x=metrics["step"], y=metrics[quantity], name=escaped(name), line=line | {"width": 1.5},
            mode="lines" if len(metrics) > 5 else "lines+markers",
        )  # fmt: skip
    title = (_OBJECTIVES | _WATCHED).get(quantity, escaped(quantity))
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text=title)
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.2})
    ends = [f"{name} {metrics[quantity].iloc[-1]:.3g}" for name, metrics in curves.items() if len(metrics)]
    alt = f"{quantity} of {len(curves)} runs; at their ends: {', '.join(ends) or 'nothing'}."
    return finish(figure, title=title, alt=alt, height=420)


def _small_multiples(count: int) -> tuple[int, int]:
    """Rows and columns: the fewest empty panels, rather wide than tall."""
    columns = count if count <= 4 else min((4, 3), key=lambda columns: -count % columns)
    return math.ceil(count / columns), columns


def held_out(held_out: Any) -> go.Figure:
    """Held-out match decisions and masked words, with each text's image and with another one.

    Parameters
    ----------
    held_out : evaluate.HeldOut
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
        f"Match decisions right: {percent(held_out.itm_accuracy.mean)} with the image, "
        f"{percent(held_out.itm_other_image.mean)} with another one, chance 50%; "
        f"hidden words right: {percent(held_out.mlm_with_image.mean)} with the image, "
        f"{percent(held_out.mlm_other_image.mean)} with another one."
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
    width = int(np.clip(140 * len(values) + 120, 380, WIDTH))
    figure = go.Figure()
    means = _add_bars(figure, values, [BLUE] * len(values), letters=int((width - 120) / len(values) / 7))
    if chance:
        names = list(values)
        figure.add_scatter(
            x=[names.index(name) for name in chance], y=list(chance.values()), mode="markers", name="chance",
            marker={"symbol": "line-ew", "size": 46, "line": {"color": VERMILLION, "width": 2.5}},
            hovertemplate="chance %{y:.1%}<extra></extra>", showlegend=True,
        )  # fmt: skip
    figure.update_yaxes(title_text=escaped(axis))
    told = ", ".join(f"{name} {percent(mean)}" for name, mean in zip(values, means, strict=True))
    alt = f"{title}: {told}."
    return finish(figure, title=escaped(title), alt=alt, width=width)


def task_scores(results: Mapping[str, Any], *, title: str) -> go.Figure:
    """Held-out scores by name with their intervals: one bar each, or for retrieval all recalls of both directions."""
    if any(hasattr(result, "intervals") for result in results.values()):
        return recall_bars({name: result.intervals() for name, result in results.items()}, title=title)
    return accuracy_bars({name: result.interval() for name, result in results.items()}, title=title, axis="score")


def recall_bars(recalls: Mapping[str, Mapping[str, Interval]], *, title: str = "Retrieval") -> go.Figure:
    """Recall at K of several models, side by side, with their intervals.

    Parameters
    ----------
    recalls : mapping of str to mapping of str to probes.intervals.Interval
        By model, then `TR R@1` and so on, the same for each.
    """
    if not recalls:
        raise ValueError("recall_bars needs at least one model")
    figure, told = go.Figure(), []
    for colour, (name, found) in zip(cycle(PALETTE), recalls.items()):
        means = np.array([interval.mean for interval in found.values()], dtype=float)
        spans = Interval(*(np.array(part, dtype=float) for part in zip(*found.values(), strict=True)))
        figure.add_bar(
            x=list(found), y=means, name=escaped(name), error_y=error_bars(spans), marker=fill(colour),
            customdata=[f"[{100 * span.low:.1f}, {100 * span.high:.1f}]" for span in found.values()],
            hovertemplate="%{y:.1%} %{customdata}",
        )  # fmt: skip
        told.append(f"{name} " + ", ".join(f"{key} {percent(mean)}" for key, mean in zip(found, means, strict=True)))
    figure.update_layout(barmode="group", hovermode="x unified", legend={"orientation": "h", "y": -0.15})
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02], title_text="queries with a right one among the K best")
    alt = f"{title}, TR: texts of an image, IR: the image of a text. {'; '.join(told)}."
    return finish(figure, title=escaped(title), alt=alt)


def _add_bars(
    figure: go.Figure, values: Mapping[str, float | Interval], colours: Sequence[str], *, letters: int, **place: int
) -> list[float]:
    """Bars of shares with their intervals; each number stands with its name under the bar. The means."""
    bounds = [_bounds(value) for value in values.values()]
    for name, bound in zip(values, bounds, strict=True):
        if not 0 <= bound.mean <= 1:
            raise ValueError(f"{name!r} is {bound.mean:g}; shares in [0, 1] are needed")
    stacked = Interval(*(np.array(part, dtype=float) for part in zip(*bounds, strict=True)))
    labels = []
    for name, bound in zip(values, bounds, strict=True):
        lines = [*wrapped(str(name), max(8, letters)), f"<b>{percent(bound.mean)}</b>"]
        known = math.isfinite(bound.low)
        labels.append("<br>".join(lines + [f"[{100 * bound.low:.1f}, {100 * bound.high:.1f}]"] * known))
    x = np.arange(len(labels))
    figure.add_bar(
        x=x, y=stacked.mean, error_y=error_bars(stacked), marker=fill(colours), width=0.5,
        customdata=labels, hovertemplate="%{customdata}<extra></extra>", showlegend=False, **place,
    )  # fmt: skip
    figure.update_xaxes(tickvals=x, ticktext=labels, showgrid=False, range=[-0.5, len(x) - 0.5], **place)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02], **place)
    return stacked.mean.tolist()


def _bounds(value: float | Interval) -> Interval:
    return value if isinstance(value, Interval) else Interval(float(value), math.nan, math.nan, 1)
