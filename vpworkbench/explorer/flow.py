"""View 3: Inter-Modality Flow of every span of layers, the mixing matrix of a span, and the modalities as clusters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from vpworkbench.explorer import still
from vpworkbench.explorer.page import Part, Section
from vpworkbench.explorer.parts import WIDTH, StatusText, View, row
from vpworkbench.explorer.readings import Reading, check_index
from vpworkbench.explorer.widgets import Chart, Maps
from vpworkbench.figures.probes import triangle
from vpworkbench.figures.style import GREY, LANGUAGE, PALETTE, VISION, escaped, finish
from vpworkbench.system import collector_off

MODELS = PALETTE[2:]
"""Colours of the first and the second model; those of language and vision are for tokens."""
TOKENS = ("language", LANGUAGE, "circle"), ("vision", VISION, "square")
MENU = ["sendChartToCloud", "select2d", "lasso2d", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "autoScale2d"]
"""Buttons left out of plotly's menu: one uploads the chart, and a wide menu covers the title of the last panel."""
TITLE = "Flow, NMI and tokens"
LONGEST_NAME = 20  # letters in the title of a panel
ALT = "Inter-Modality Flow as a triangle and two curves, NMI by layer, and tokens on two components by modality."


class FlowView(View):
    """The (i, j) triangle beside its two curves; below, NMI and the tokens of one layer on two components.

    Nothing is built before it is needed (`open`): plotly's widget takes a second to import, and the first view of an
    explorer need not wait for it.
    """

    title = "Flow"

    def __init__(self, readings: Sequence[Reading]) -> None:
        super().__init__()
        self.readings = list(readings)
        layers = min(reading.layers for reading in readings)
        self.layer = ipywidgets.IntSlider(
            layers,
            0,
            layers,
            description="layer of the tokens above (0: the input)",
            layout={"width": "420px"},
            style={"description_width": "initial"},
        )
        self.spans = ipywidgets.IntRangeSlider(
            value=(1, 1), min=1, max=layers, description="layers i to j", layout={"width": "300px"}
        )
        self.model = ipywidgets.Dropdown(
            options=[(reading.subject.name, number) for number, reading in enumerate(readings)],
            description="tokens of",
            layout={"width": "300px", "display": None if len(readings) > 1 else "none"},
        )
        self.spans.observe(lambda change: self._draw_span(), "value")
        for control in (self.layer, self.model):
            control.observe(lambda change: self._draw_points(), "value")
        self.status = StatusText(
            "Click a cell of the triangle, or choose layers i to j below, to see how A mixes words and visual tokens "
            "from the input of layer i to the output of layer j. Dashed: uniform attention."
        )
        self._figure: go.FigureWidget | None = None
        self._maps: list[Maps] = []
        self.save = Chart(label=TITLE, alt=ALT, width=WIDTH)
        self.widget.children = (self.status,)

    @property
    def figure(self) -> go.FigureWidget:
        """The explorer's only plotly figure: its script takes 5 MB in a saved notebook."""
        self.open()
        return self._figure

    @property
    def maps(self) -> list[Maps]:
        """A^{i,j} of the chosen span, for each model."""
        self.open()
        return self._maps

    @property
    def span(self) -> tuple[int, int]:
        """First and last layer of the chosen span, from 0."""
        start, stop = self.spans.value
        return start - 1, stop - 1

    @property
    def chosen(self) -> Reading:
        """The reading whose tokens are drawn."""
        return self.readings[self.model.value]

    @property
    def points(self) -> NDArray[np.float64]:
        """Its tokens on two components at the output of the chosen layer, (token, 2)."""
        components = self.chosen.components  # LXMERT has two steps for each layer
        return components[round(self.layer.value * (len(components) - 1) / self.chosen.layers)]

    @property
    def points_title(self) -> str:
        name = self.chosen.subject.name
        short = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
        return f"tokens: {short}, layer {self.layer.value}"

    def open(self) -> None:
        """Build the figure and the maps, once."""
        if self._figure is not None:
            return
        axes = {"row_name": "query", "column_name": "key"}
        self._maps = [Maps(percent=True, width=WIDTH // 2, **axes) for _ in self.readings]
        self._figure = _flow_figure(self.readings)
        self._draw_span()  # before it is a widget: the page can miss an update of a view that it is still making
        self._draw_points()
        self._figure = _widget_class()(self._figure)
        camera = {"format": "svg", "filename": "flow"}
        self._figure._config = {"displaylogo": False, "toImageButtonOptions": camera, "modeBarButtonsToRemove": MENU}
        self._figure.open()
        for number, trace in enumerate(self._figure.select_traces({"type": "heatmap"})):
            trace.on_click(lambda _, points, state, number=number: self._clicked(number, points))
        controls = row(self.layer, self.spans, self.model)
        self.widget.children = (self.status, self.save, self._figure, controls, row(*self._maps))

    def show(self, readings: Sequence[Reading]) -> None:
        self.readings = list(readings)
        note = readings[0].note
        self.save.label = f"{TITLE}{note} (dashed: nothing blocked)" if note else TITLE
        if self._figure is None:
            return
        with self._figure.batch_update():
            for shown, new in zip(self._figure.data, _flow_figure(self.readings).data, strict=True):
                if shown.meta is None:  # not the mark of the span, nor the tokens
                    shown.update({name: new[name] for name in ("x", "y", "z", "text") if name in new})
        self._draw_span()
        self._draw_points()

    def set(self, start: int, stop: int, *, model: int = 0, layer: int | None = None) -> None:
        """Choose a span of layers, from 0, and the layer whose tokens are drawn (0: the input)."""
        layers = self.spans.max
        if not 0 <= start <= stop < layers:
            raise ValueError(f"span ({start}, {stop}) does not exist: 0 <= start <= stop < {layers}")
        check_index("model", model, len(self.readings))
        check_index("layer", layer, layers + 1)
        self.open()
        self.spans.value, self.model.value = (start + 1, stop + 1), model
        self.layer.value = self.layer.value if layer is None else layer

    def code(self) -> str:
        return f"view.span({self.span[0]}, {self.span[1]}, model={self.model.value}, layer={self.layer.value})"

    def section(self) -> Section:
        figure = Part(go.Figure(self.figure), self._still())
        intro = "Dashed: uniform attention. Below the figure: A of the marked span of layers."
        return Section(self.title, intro, [Part(self.save), figure, *map(Part, self.maps)])

    def _still(self) -> bytes:
        """The first model's triangle, the curves of all models, and the tokens of the chosen one."""
        figure = still.blank(940, 260)
        triangle, *flows, nmi, points = figure.subplots(1, 5)
        still.matrix(triangle, self.readings[0].flow, "flow from i to j", "from layer", "to layer")
        for one, colour in zip(self.readings, MODELS, strict=False):
            for axes, values, title in zip(flows, one.curves, ("F from the input", "F within layer"), strict=True):
                still.curves(axes, *values, title, colour)
            nmi.plot(range(len(one.nmi)), one.nmi, marker="o", ms=3, color=colour, label=one.subject.name)
        nmi.set(title="NMI", ylim=(-0.03, 1.03), xlabel="layer (0: input)")
        if len(self.readings) > 1:
            nmi.legend(fontsize=6)
        for modality, (name, colour, _) in zip(self.chosen.modalities, TOKENS, strict=True):
            points.scatter(*self.points[modality].T, s=8, color=colour, label=name)
        points.set(title=still.shortened(self.points_title, 40), xticks=[], yticks=[])
        points.legend(fontsize=6)
        return still.png(figure)

    def tables(self) -> dict[str, pd.DataFrame]:
        """`flow`: every span with its null; `clusters`: NMI by layer, 0 the input."""
        spans, clusters = [], []
        for reading in self.readings:
            start, stop = np.triu_indices(reading.layers)
            flow = {"flow": reading.flow[start, stop], "uniform": reading.null[start, stop]}
            model = {"model": reading.subject.name}
            spans.append(pd.DataFrame(model | {"from_layer": start + 1, "to_layer": stop + 1} | flow))
            clusters.append(pd.DataFrame(model | {"layer": np.arange(len(reading.nmi)), "nmi": reading.nmi}))
        return {"flow": pd.concat(spans, ignore_index=True), "clusters": pd.concat(clusters, ignore_index=True)}

    # ------------------------------------------------------------------------------------------------ drawing

    def _clicked(self, number: int, points: Any) -> None:
        if points.xs and points.ys[0] <= points.xs[0]:  # the slider ends at the last layer that both models have
            self.spans.value, self.model.value = (int(points.ys[0]), int(points.xs[0])), number

    def _draw_span(self) -> None:
        if self._figure is None:
            return
        start, stop = self.span
        for reading, maps in zip(self.readings, self._maps, strict=True):
            matrix, splits = reading.span(start, stop)
            tokens, size, words = int(reading.modalities.sum()), len(matrix), splits[0]
            pooled = "" if size == tokens else f", pooled from {tokens}"
            boxes = [0, 0, words, words, size], [0, words, 0, size, words]  # what words read, what the image reads
            blocked = reading.blocks(start, stop)
            maps.update(
                values=matrix[None],
                names=[f"words first, then {size - words} visual tokens{pooled}"],
                splits=splits,
                hatched=[box for box, is_blocked in zip(boxes, blocked, strict=True) if is_blocked],
                low=[0.0],
                high=[_top_of_scale(matrix)],
                label=f"{reading.subject.name}: A from the input of layer {start + 1} to the output of {stop + 1}"
                + reading.note,
                alt="Rows are queries, columns keys; the lines separate words and visual tokens.",
            )
        with self._figure.batch_update():
            self._figure.update_traces({"x": [stop + 1], "y": [start + 1]}, {"meta": "span"})
        self.changed()

    def _draw_points(self) -> None:
        if self._figure is None:
            return
        points, title = self.points, self._figure.layout.annotations[-1]
        with self._figure.batch_update():
            traces = self._figure.select_traces({"meta": "points"})
            for trace, modality in zip(traces, self.chosen.modalities, strict=True):
                trace.update({"x": points[modality, 0], "y": points[modality, 1]})
            title.text = escaped(self.points_title)
        self.changed()


def _top_of_scale(matrix: NDArray[np.float32]) -> float:
    """Top of the colour scale of a mixing matrix: its diagonal, the residual, is much larger than the rest."""
    beside_diagonal = matrix[~np.eye(len(matrix), dtype=bool)]
    return float(np.quantile(beside_diagonal, 0.995)) if len(beside_diagonal) else 1.0


@cache
def _widget_class() -> type[go.FigureWidget]:
    """plotly's widget, opened only when it has its data.

    plotly opens it first and sends the data afterwards: a view that the page makes at once can miss them.
    """
    with collector_off():  # plotly imports its widget at the first use
        widget = go.FigureWidget

    class Filled(widget):
        def open(self) -> None:
            if self._widget_data:
                super().open()

    return Filled


def _flow_figure(readings: Sequence[Reading]) -> go.Figure:
    """Triangle, curves, NMI and the mark of the span for each model, then the tokens of one; these two without data."""
    two = len(readings) > 1
    names = [escaped(reading.subject.name) for reading in readings]
    titles = [names[0] if two else "flow from i to j, %", "F from the input to j", "F within layer i"]
    titles += [names[1], "NMI", "tokens"] if two else ["NMI (0: mixed, 1: apart)", "tokens by modality"]
    below = [{}, {}, {}] if two else [{}, {"colspan": 2}, None]
    gaps = {"horizontal_spacing": 0.09, "vertical_spacing": 0.17}
    figure = make_subplots(2, 3, specs=[[{}, {}, {}], below], subplot_titles=titles, **gaps)
    nmi, points = {"row": 2, "col": 1 + two}, {"row": 2, "col": 2 + two}
    step = max(1, math.ceil(max(reading.layers for reading in readings) / 12))
    for number, (name, reading) in enumerate(zip(names, readings, strict=True)):
        cells, place = triangle(reading.flow), {"row": 1 + number, "col": 1}
        cells.z = np.where(np.isfinite(cells.z), cells.z, None).tolist()  # a matrix travels as JSON, which has no nan
        figure.add_trace(cells.update(name=reading.subject.name, showscale=False), **place)
        figure.update_yaxes(title_text="from layer i", autorange="reversed", dtick=step, showgrid=False, **place)
        figure.update_xaxes(title_text="to layer j", dtick=step, showgrid=False, **place)
        _add_curves(figure, reading, {"name": name, "legendgroup": name}, MODELS[number], two=two)
        size = max(10, min(40, 150 // reading.layers))
        mark = {"symbol": "square-open", "size": size, "color": VISION, "line": {"width": 3}}
        look = {"mode": "markers", "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(meta="span", marker=mark, **look, **place)
    for name, colour, symbol in TOKENS:
        look = {"mode": "markers", "marker": {"color": colour, "symbol": symbol, "size": 7}, "opacity": 0.85}
        figure.add_scatter(name=name, meta="points", hoverinfo="name", **look, **points)
    figure.update_xaxes(title_text="first component", **points)
    figure.update_yaxes(title_text="second component", **points)
    for column in (2, 3):
        figure.update_xaxes(title_text="layer", dtick=step, row=1, col=column)
        figure.update_yaxes(tickformat=".0%", rangemode="tozero", row=1, col=column)
    figure.update_xaxes(title_text="layer (0: input)", dtick=step, **nmi)
    figure.update_yaxes(range=[-0.03, 1.03], **nmi)
    figure.update_layout(legend={"orientation": "h", "y": -0.12, "font": {"color": GREY}}, uirevision="keep")
    return finish(figure, alt=ALT, width=WIDTH, height=560)


def _add_curves(figure: go.Figure, reading: Reading, model: dict[str, str], colour: str, *, two: bool) -> None:
    """Flow from the input and within layers, each with its null, and NMI; a legend if there are two models."""
    layers, line = np.arange(1, reading.layers + 1), {"color": colour}
    solid = {"mode": "lines+markers", "line": line} | model
    dashed = {"mode": "lines", "line": line | {"dash": "dash"}, "showlegend": False} | model | {"name": "uniform"}
    for column, (flow, null) in enumerate(reading.curves, start=2):
        place, legend = {"row": 1, "col": column}, two and column == 2
        figure.add_scatter(x=layers, y=flow, showlegend=legend, hovertemplate="layer %{x}: %{y:.1%}", **solid, **place)
        figure.add_scatter(x=layers, y=null, hovertemplate="uniform: %{y:.1%}", **dashed, **place)
    steps, place = np.linspace(0, reading.layers, len(reading.nmi)), {"row": 2, "col": 1 + two}
    hover = "layer %{x}: %{y:.2f}"
    figure.add_scatter(x=steps, y=reading.nmi, showlegend=False, hovertemplate=hover, **solid, **place)
