"""View 3: Inter-Modality Flow of every span of layers, the mixing matrix of a span, and the modalities as clusters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import ipywidgets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from vpworkbench.explorer.parts import WIDTH, StatusText, View, row
from vpworkbench.explorer.readings import Reading, check_index
from vpworkbench.explorer.widgets import Chart, Maps
from vpworkbench.figures.style import COLOURS, GREY, LANGUAGE, PALETTE, VISION, escaped, finish
from vpworkbench.system import collector_off

HEIGHT = 560
MODELS = PALETTE[2:]
"""Colours of the first and the second model; those of language and vision are for tokens."""
MENU = ["sendChartToCloud", "select2d", "lasso2d", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "autoScale2d"]
"""Buttons left out of plotly's menu: one uploads the chart, and a wide menu covers the title of the last panel.

Dragging zooms, a double click resets.
"""
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
        self.layer = ipywidgets.IntSlider(
            0,
            0,
            1,
            description="layer of the tokens above (0: the input)",
            layout={"width": "420px"},
            style={"description_width": "initial"},
        )
        self.spans = ipywidgets.IntRangeSlider(
            value=(1, 1), min=1, max=1, description="layers i to j", layout={"width": "300px"}
        )
        self.model = ipywidgets.Dropdown(description="tokens of", layout={"width": "300px"})
        self.spans.observe(lambda change: self._draw_span(), "value")
        for control in (self.layer, self.model):
            control.observe(lambda change: self._draw_points(), "value")
        self.status = StatusText(
            "Click a cell of the triangle, or choose layers i to j below, to see how A mixes words and visual tokens "
            "from the input of layer i to the output of layer j. Dashed: uniform attention."
        )
        self._figure: go.FigureWidget | None = None
        self._maps: list[Maps] = []
        self.save = Chart(label="Flow, NMI and tokens", alt=ALT, width=WIDTH)
        self.widget.children = (self.status,)
        self.show(readings)

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
        if self._figure is None:
            self._build()

    def show(self, readings: Sequence[Reading]) -> None:
        self.readings = list(readings)
        names, is_open = [reading.subject.name for reading in self.readings], self._figure is not None
        if is_open and [one.name for one in self._triangles()] != names:
            self._drop()
        options = tuple((name, number) for number, name in enumerate(names))
        if self.model.options != options:
            self.model.options, self.model.value = options, 0
            self.model.layout.display = None if len(names) > 1 else "none"
        most = min(reading.layers for reading in self.readings)
        if self.layer.max != most:
            self.layer.max = self.layer.value = self.spans.max = most
        if is_open:
            self._draw() if self._figure is not None else self._build()

    def _draw(self) -> None:
        with self.figure.batch_update():
            _fill(self.figure, self.readings)
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

    def close(self) -> None:
        super().close()
        self._drop()
        self.save.close()

    def _drop(self) -> None:
        for one in self._maps:
            one.close()
        if self._figure is not None:
            self._figure.close()
        self._figure, self._maps = None, []

    # ------------------------------------------------------------------------------------------------ drawing

    def _build(self) -> None:
        axes = {"names": ["A"], "row_name": "query", "column_name": "key"}
        self._maps = [Maps(values=np.zeros((1, 1, 1)), percent=True, width=WIDTH // 2, **axes) for _ in self.readings]
        self._figure = _empty_figure(self.readings)
        self._draw()  # before it is a widget: the page can miss an update of a view that it is still making
        self._figure = _widget_class()(self._figure)
        camera = {"format": "svg", "filename": "flow"}
        self._figure._config = {"displaylogo": False, "toImageButtonOptions": camera, "modeBarButtonsToRemove": MENU}
        self._figure.open()
        for number, trace in enumerate(self._triangles()):
            trace.on_click(lambda _, points, state, number=number: self._clicked(number, points))
        controls = row(self.layer, self.spans, self.model)
        self.widget.children = (self.status, self.save, self._figure, controls, row(*self._maps))

    def _triangles(self) -> list[go.Heatmap]:
        return [trace for trace in self.figure.data if isinstance(trace, go.Heatmap)]

    def _clicked(self, number: int, points: Any) -> None:
        if points.xs and points.ys[0] <= points.xs[0]:  # the slider ends at the last layer that both models have
            self.spans.value, self.model.value = (int(points.ys[0]), int(points.xs[0])), number

    def _draw_span(self) -> None:
        if self._figure is None:
            return
        start, stop = self.span
        for reading, maps in zip(self.readings, self._maps, strict=True):
            matrix, splits = reading.span(start, stop)
            tokens = int(reading.modalities.sum())
            pooled = "" if len(matrix) == tokens else f", pooled from {tokens}"
            maps.update(
                values=matrix[None],
                names=[f"words first, then {len(matrix) - splits[0]} visual tokens{pooled}"],
                splits=splits,
                low=[0.0],
                high=[_top_of_scale(matrix)],
                label=f"{reading.subject.name}: A from the input of layer {start + 1} to the output of {stop + 1}",
                alt="Rows are queries, columns keys; the lines separate words and visual tokens.",
            )
        with self.figure.batch_update():
            for number in range(len(self.readings)):
                _traces(self.figure, number)[-1].update({"x": [stop + 1], "y": [start + 1]})
        self.changed()

    def _draw_points(self) -> None:
        if self._figure is None:
            return
        points, title = self.points, self._figure.layout.annotations[-1]
        traces = [trace for trace in self._figure.data if trace.meta == "points"]
        with self._figure.batch_update():
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


def _traces(figure: go.Figure, number: int) -> list[Any]:
    """Traces of one model, in the order of `_values`."""
    return [trace for trace in figure.data if trace.meta == number]


def _fill(figure: go.Figure, readings: Sequence[Reading]) -> go.Figure:
    for number, reading in enumerate(readings):
        for trace, values in zip(_traces(figure, number), _values(reading), strict=True):
            trace.update(values)
    return figure


def _values(reading: Reading) -> list[dict[str, Any]]:
    """The data of each trace of a model, in the order in which `_empty_figure` adds them."""
    flow, null = reading.flow, reading.null
    layers = np.arange(1, reading.layers + 1)
    upper = np.triu(np.isfinite(flow))
    labels = np.where(upper, np.char.mod("%.0f", 100 * flow), "")
    cells = np.where(upper, flow, None).tolist()  # a matrix travels as JSON, which has no nan
    # x and y too: a heat map in the page forgets them if only its z changes.
    triangle = {"x": layers, "y": layers, "z": cells, "text": labels}
    curves = [{"y": flow[0]}, {"y": null[0]}, {"y": flow.diagonal()}, {"y": null.diagonal()}]
    clusters = {"x": np.linspace(0, reading.layers, len(reading.nmi)), "y": reading.nmi}
    return [triangle, *curves, clusters, {}]  # the last one marks the span


class _Cells(NamedTuple):
    """Row and column of each panel."""

    triangles: list[dict[str, int]]
    curves: list[dict[str, int]]
    nmi: dict[str, int]
    points: dict[str, int]


def _empty_figure(readings: Sequence[Reading]) -> go.Figure:
    """The figure without numbers: updates then change only data; changing the layout too takes twice as long."""
    names = [escaped(reading.subject.name) for reading in readings]
    layers = [reading.layers for reading in readings]
    two = len(names) > 1
    below = [{}, {}, {}] if two else [{}, {"colspan": 2}, None]
    titles = [names[0] if two else "flow from i to j, %", "F from the input to j", "F within layer i"]
    titles += [names[1], "NMI", "tokens"] if two else ["NMI (0: mixed, 1: apart)", "tokens by modality"]
    spacing = {"horizontal_spacing": 0.09, "vertical_spacing": 0.17}
    figure = make_subplots(2, 3, specs=[[{}, {}, {}], below], subplot_titles=titles, **spacing)
    cells = _Cells(
        triangles=[{"row": 1, "col": 1}, {"row": 2, "col": 1}],
        curves=[{"row": 1, "col": 2}, {"row": 1, "col": 3}],
        nmi={"row": 2, "col": 2 if two else 1},
        points={"row": 2, "col": 3 if two else 2},
    )
    for number, (name, count) in enumerate(zip(names, layers, strict=True)):
        _add_triangle(figure, number, readings[number].subject.name, count, cells.triangles[number])
        _add_curves(figure, number, name, count, cells, show_legend=two)
        _add_span_mark(figure, number, count, cells.triangles[number])
    _add_points(figure, cells.points)
    step = _tick_step(max(layers))
    for cell in cells.curves:
        figure.update_xaxes(title_text="layer", dtick=step, **cell)
        figure.update_yaxes(tickformat=".0%", rangemode="tozero", **cell)
    figure.update_xaxes(title_text="layer (0: input)", dtick=step, **cells.nmi)
    figure.update_yaxes(range=[-0.03, 1.03], **cells.nmi)
    figure.update_layout(legend={"orientation": "h", "y": -0.12, "font": {"color": GREY}}, uirevision="keep")
    return finish(figure, alt=ALT, width=WIDTH, height=HEIGHT)


def _add_triangle(figure: go.Figure, number: int, name: str, layers: int, cell: dict[str, int]) -> None:
    along, step = list(range(1, layers + 1)), _tick_step(layers)
    look = {"colorscale": COLOURS, "showscale": False, "hoverongaps": False, "xgap": 1, "ygap": 1}
    text = {
        "texttemplate": "%{text}" if layers <= 12 else None,
        "hovertemplate": "from layer %{y} to layer %{x}: %{z:.1%}<extra></extra>",
    }
    figure.add_heatmap(x=along, y=along, name=name, meta=number, **look, **text, **cell)
    figure.update_yaxes(title_text="from layer i", autorange="reversed", dtick=step, showgrid=False, **cell)
    figure.update_xaxes(title_text="to layer j", dtick=step, showgrid=False, **cell)


def _add_curves(figure: go.Figure, number: int, name: str, layers: int, cells: _Cells, *, show_legend: bool) -> None:
    """Flow from the input and within layers, each with its null, then NMI."""
    along, colour = list(range(1, layers + 1)), MODELS[number]
    line = {"meta": number, "legendgroup": name}
    solid = line | {"line": {"color": colour}, "mode": "lines+markers", "name": name}
    dashed = line | {"line": {"color": colour, "dash": "dash"}, "mode": "lines", "name": "uniform"}
    for cell in cells.curves:
        legend = show_legend and cell is cells.curves[0]
        figure.add_scatter(x=along, showlegend=legend, hovertemplate="layer %{x}: %{y:.1%}", **solid, **cell)
        figure.add_scatter(x=along, showlegend=False, hovertemplate="uniform: %{y:.1%}", **dashed, **cell)
    figure.add_scatter(x=[0, *along], showlegend=False, hovertemplate="layer %{x}: %{y:.2f}", **solid, **cells.nmi)


def _add_span_mark(figure: go.Figure, number: int, layers: int, cell: dict[str, int]) -> None:
    """A square around the cell of the chosen span."""
    size = max(10, min(40, 150 // layers))
    marker = {"symbol": "square-open", "size": size, "color": VISION, "line": {"width": 3}}
    look = {"mode": "markers", "hoverinfo": "skip", "showlegend": False}
    figure.add_scatter(x=[1], y=[1], meta=number, marker=marker, **look, **cell)


def _add_points(figure: go.Figure, cell: dict[str, int]) -> None:
    """Tokens on two components, language and vision."""
    for name, colour, symbol in (("language", LANGUAGE, "circle"), ("vision", VISION, "square")):
        marker = {"color": colour, "symbol": symbol, "size": 7}
        look = {"mode": "markers", "opacity": 0.85, "hoverinfo": "name"}
        figure.add_scatter(name=name, meta="points", marker=marker, **look, **cell)
    figure.update_xaxes(title_text="first component", **cell)
    figure.update_yaxes(title_text="second component", **cell)


def _tick_step(layers: int) -> int:
    return max(1, math.ceil(layers / 12))
