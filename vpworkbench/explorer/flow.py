"""View 3: Inter-Modality Flow of every span of layers, the mixing behind one span, and the modalities as clusters."""

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

from vpworkbench.explorer.parts import WIDTH, Note, column, row, unheard
from vpworkbench.explorer.readings import Reading
from vpworkbench.explorer.widgets import Chart, Maps
from vpworkbench.figures.style import COLOURS, GREY, LANGUAGE, PALETTE, VISION, escaped, finish
from vpworkbench.system import collector_off

HEIGHT = 560
MODELS = PALETTE[2:]
"""Of the first and the second model: no colour of language or vision, which the tokens have."""
MENU = ["sendChartToCloud", "select2d", "lasso2d", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "autoScale2d"]
"""Left out of plotly's menu, which would upload the chart, and cover the title of the last panel.

Dragging zooms, a double click resets.
"""
LONGEST = 20  # letters of a name in the title of a panel
ALT = "Inter-Modality Flow as a triangle and two curves, NMI by layer, and tokens on two components by modality."


class FlowView:
    """The (i, j) triangle beside its two curves; below, NMI and the tokens of one layer on two components.

    Nothing is built before it is asked for (`open`): plotly's widget takes a second to import, and the first view of an
    explorer need not wait for it.

    Attributes
    ----------
    widget : ipywidgets.Widget
    """

    title = "Flow"

    def __init__(self, readings: Sequence[Reading]) -> None:
        self.layer = ipywidgets.IntSlider(
            0, 0, 1, description="layer of the tokens above (0: the input)", layout={"width": "420px"},
            style={"description_width": "initial"},
        )  # fmt: skip
        self.spans = ipywidgets.IntRangeSlider(
            value=(1, 1), min=1, max=1, description="layers i to j", layout={"width": "300px"}
        )
        self.model = ipywidgets.Dropdown(description="tokens of", layout={"width": "300px"})
        self.spans.observe(lambda change: self._draw_span(), "value")
        for control in (self.layer, self.model):
            control.observe(lambda change: self._draw_points(), "value")
        self.note = Note(
            "Click a cell of the triangle, or choose layers i to j below: the block structure of A from the input of "
            "layer i to the output of layer j. Dashed: attention spread evenly."
        )
        self._figure: go.FigureWidget | None = None
        self._maps: list[Maps] = []
        self.changed = unheard
        self.save = Chart(label="Flow, NMI and tokens", alt=ALT, width=WIDTH)
        self.widget = column(self.note)
        self.show(readings)

    @property
    def figure(self) -> go.FigureWidget:
        """The only one of an explorer: its script alone is 5 MB in a saved notebook."""
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
        """The one whose tokens are drawn."""
        return self.readings[self.model.value]

    @property
    def points(self) -> NDArray[np.float64]:
        """Its tokens on two components behind the chosen layer, (token, 2)."""
        every = self.chosen.map  # LXMERT: two steps a layer
        return every[round(self.layer.value * (len(every) - 1) / self.chosen.layers)]

    @property
    def points_title(self) -> str:
        name = self.chosen.subject.name
        return f"tokens: {name if len(name) <= LONGEST else f'{name[: LONGEST - 1]}…'}, layer {self.layer.value}"

    def open(self) -> None:
        """Build what is drawn, where it is not there yet."""
        if self._figure is None:
            self._build()

    def show(self, readings: Sequence[Reading]) -> None:
        """Look at new readings; what is chosen stays where it is there."""
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
        """Choose a span of layers, from 0, and the layer whose tokens are drawn (0: the input).

        Raises
        ------
        ValueError
            For a span or layer that is not there.
        """
        most = self.spans.max
        if not 0 <= start <= stop < most:
            raise ValueError(f"span ({start}, {stop}) is not there: 0 <= start <= stop < {most}")
        if not 0 <= model < len(self.readings):
            raise ValueError(f"model {model} is not there; {len(self.readings)} are, from 0")
        if layer is not None and not 0 <= layer <= most:
            raise ValueError(f"layer {layer} is not there; 0 to {most}")
        self.open()
        self.spans.value, self.model.value = (start + 1, stop + 1), model
        self.layer.value = self.layer.value if layer is None else layer

    def code(self) -> str:
        """The call that recreates the view."""
        return f"view.span({self.span[0]}, {self.span[1]}, model={self.model.value}, layer={self.layer.value})"

    def tables(self) -> dict[str, pd.DataFrame]:
        """`flow`: every span with its null; `clusters`: NMI by layer, 0 the input."""
        spans, clusters = [], []
        for reading in self.readings:
            start, stop = np.triu_indices(reading.layers)
            spans.append(pd.DataFrame({
                "model": reading.subject.name, "from_layer": start + 1, "to_layer": stop + 1,
                "flow": reading.flow[start, stop], "uniform": reading.null[start, stop],
            }))  # fmt: skip
            clusters.append(pd.DataFrame({"model": reading.subject.name, "layer": np.arange(len(reading.nmi)),
                                          "nmi": reading.nmi}))  # fmt: skip
        return {"flow": pd.concat(spans, ignore_index=True), "clusters": pd.concat(clusters, ignore_index=True)}

    def close(self) -> None:
        self._drop()
        self.save.close()
        self.readings = []

    def _drop(self) -> None:
        for one in self._maps:
            one.close()
        if self._figure is not None:
            self._figure.close()
        self._figure, self._maps = None, []

    # ------------------------------------------------------------------------------------------------ drawing

    def _build(self) -> None:
        self._maps = [
            Maps(values=np.zeros((1, 1, 1)), names=["A"], row_name="query", column_name="key", percent=True,
                 width=WIDTH // 2) for _ in self.readings
        ]  # fmt: skip
        self._figure = _empty([reading.subject.name for reading in self.readings],
                              [reading.layers for reading in self.readings])  # fmt: skip
        self._draw()  # while it is no widget: what is told a view that is being made can be lost
        self._figure = _widget_class()(self._figure)
        self._figure._config = {"displaylogo": False, "toImageButtonOptions": {"format": "svg", "filename": "flow"},
                                "modeBarButtonsToRemove": MENU}  # fmt: skip
        self._figure.open()
        for number, trace in enumerate(self._triangles()):
            trace.on_click(lambda _, points, state, number=number: self._clicked(number, points))
        self.widget.children = (self.note, self.save, self._figure, row(self.layer, self.spans, self.model),
                                row(*self._maps))  # fmt: skip

    def _triangles(self) -> list[go.Heatmap]:
        return [trace for trace in self.figure.data if isinstance(trace, go.Heatmap)]

    def _traces(self, number: int) -> list[Any]:
        return _traces(self.figure, number)

    def _clicked(self, number: int, points: Any) -> None:
        if points.xs and points.ys[0] <= points.xs[0]:  # beyond the layers of the other model: the last they share
            self.spans.value, self.model.value = (int(points.ys[0]), int(points.xs[0])), number

    def _draw_span(self) -> None:
        if self._figure is None:
            return
        start, stop = self.span
        for reading, maps in zip(self.readings, self._maps, strict=True):
            matrix, splits = reading.span(start, stop)
            off = matrix[~np.eye(len(matrix), dtype=bool)]
            pooled = "" if len(matrix) == int(reading.counted.sum()) else f", pooled from {int(reading.counted.sum())}"
            maps.update(
                values=matrix[None], names=[f"words first, then {len(matrix) - splits[0]} visual tokens{pooled}"],
                splits=splits, low=[0.0], high=[float(np.quantile(off, 0.995)) if len(off) else 1.0],
                label=f"{reading.subject.name}: A from the input of layer {start + 1} to the output of {stop + 1}",
                alt="Rows are queries, columns keys; the lines part words and visual tokens.",
            )  # fmt: skip
        with self.figure.batch_update():
            for number in range(len(self.readings)):
                self._traces(number)[-1].update({"x": [stop + 1], "y": [start + 1]})
        self.changed()

    def _draw_points(self) -> None:
        if self._figure is None:
            return
        points, title = self.points, self._figure.layout.annotations[-1]
        with self._figure.batch_update():
            for trace, chosen in zip([one for one in self._figure.data if one.meta == "points"], self.chosen.counted,
                                     strict=True):  # fmt: skip
                trace.update({"x": points[chosen, 0], "y": points[chosen, 1]})
            title.text = escaped(self.points_title)
        self.changed()


@cache
def _widget_class() -> type[go.FigureWidget]:
    """plotly's widget, opened when it holds its data.

    By itself it opens first, and tells the data afterwards: a view that the page makes at once can miss them.
    """

    with collector_off():  # plotly imports its widget where it is first named
        widget = go.FigureWidget

    class Filled(widget):
        def open(self) -> None:
            if self._widget_data:
                super().open()

    return Filled


def _traces(figure: go.Figure, number: int) -> list[Any]:
    """Of one model, in the order of `_values`."""
    return [trace for trace in figure.data if trace.meta == number]


def _fill(figure: go.Figure, readings: Sequence[Reading]) -> go.Figure:
    for number, reading in enumerate(readings):
        for trace, values in zip(_traces(figure, number), _values(reading), strict=True):
            trace.update(values)
    return figure


def _values(reading: Reading) -> list[dict[str, Any]]:
    """What each trace of a model shows, in the order in which `_empty` adds them."""
    flow, null = reading.flow, reading.null
    layers = np.arange(1, reading.layers + 1)
    upper = np.triu(np.isfinite(flow))
    told = np.where(upper, np.char.mod("%.0f", 100 * flow), "")
    cells = np.where(upper, flow, None).tolist()  # a matrix travels as JSON, which has no nan
    return [
        # x and y too: a heat map in the page forgets them where only its z changes.
        {"x": layers, "y": layers, "z": cells, "text": told},
        {"y": flow[0]}, {"y": null[0]}, {"y": flow.diagonal()}, {"y": null.diagonal()},
        {"x": np.linspace(0, reading.layers, len(reading.nmi)), "y": reading.nmi}, {},  # LXMERT: two steps a layer
    ]  # fmt: skip


def _empty(names: Sequence[str], layers: Sequence[int]) -> go.Figure:
    """The figure without numbers: updates then change data alone, a layout in an update takes twice as long."""
    two = len(names) > 1
    below = [{}, {}, {}] if two else [{}, {"colspan": 2}, None]
    titles = ["flow from i to j, %" if not two else escaped(names[0]), "F from the input to j", "F within layer i"]
    titles += [escaped(names[1]), "NMI", "tokens"] if two else ["NMI (0: mixed, 1: apart)", "tokens by modality"]
    figure = make_subplots(2, 3, specs=[[{}, {}, {}], below], subplot_titles=titles, horizontal_spacing=0.09,
                           vertical_spacing=0.17)  # fmt: skip
    cells = [(1, 1), (2, 1)]
    nmi, points = ((2, 2), (2, 3)) if two else ((2, 1), (2, 2))
    for number, (name, count) in enumerate(zip(names, layers, strict=True)):
        along, colour = list(range(1, count + 1)), MODELS[number]
        cell = dict(zip(("row", "col"), cells[number], strict=True))
        figure.add_heatmap(
            x=along, y=along, name=name, meta=number, colorscale=COLOURS, showscale=False, hoverongaps=False, xgap=1,
            ygap=1, texttemplate="%{text}" if count <= 12 else None,
            hovertemplate="from layer %{y} to layer %{x}: %{z:.1%}<extra></extra>", **cell,
        )  # fmt: skip
        look = {"meta": number, "legendgroup": name, "line": {"color": colour}, "mode": "lines+markers"}
        uniform = look | {"line": {"color": colour, "dash": "dash"}, "mode": "lines", "showlegend": False}
        for place in (2, 3):
            figure.add_scatter(x=along, name=escaped(name), showlegend=two and place == 2, row=1, col=place,
                               hovertemplate="layer %{x}: %{y:.1%}", **look)  # fmt: skip
            figure.add_scatter(x=along, name="uniform", row=1, col=place, hovertemplate="uniform: %{y:.1%}", **uniform)
        figure.add_scatter(x=[0, *along], name=escaped(name), showlegend=False, hovertemplate="layer %{x}: %{y:.2f}",
                           row=nmi[0], col=nmi[1], **look)  # fmt: skip
        figure.add_scatter(x=[1], y=[1], mode="markers", meta=number, hoverinfo="skip", showlegend=False,
                           marker={"symbol": "square-open", "size": max(10, min(40, 150 // count)), "color": VISION,
                                   "line": {"width": 3}}, **cell)  # fmt: skip
        step = max(1, math.ceil(count / 12))
        figure.update_yaxes(title_text="from layer i", autorange="reversed", dtick=step, showgrid=False, **cell)
        figure.update_xaxes(title_text="to layer j", dtick=step, showgrid=False, **cell)
    for name, colour, symbol in (("language", LANGUAGE, "circle"), ("vision", VISION, "square")):
        figure.add_scatter(mode="markers", name=name, meta="points", row=points[0], col=points[1], opacity=0.85,
                           marker={"color": colour, "symbol": symbol, "size": 7}, hoverinfo="name")  # fmt: skip
    step = max(1, math.ceil(max(layers) / 12))
    for place in (2, 3):
        figure.update_xaxes(title_text="layer", dtick=step, row=1, col=place)
        figure.update_yaxes(tickformat=".0%", rangemode="tozero", row=1, col=place)
    figure.update_xaxes(title_text="layer (0: input)", dtick=step, row=nmi[0], col=nmi[1])
    figure.update_yaxes(range=[-0.03, 1.03], row=nmi[0], col=nmi[1])
    figure.update_xaxes(title_text="first component", row=points[0], col=points[1])
    figure.update_yaxes(title_text="second component", row=points[0], col=points[1])
    figure.update_layout(legend={"orientation": "h", "y": -0.12, "font": {"color": GREY}}, uirevision="keep")
    return finish(figure, alt=ALT, width=WIDTH, height=HEIGHT)
