"""Images with tokens, attention and masks drawn over them.

An image is a uint8 array (height, width, 3). `grid` is the number of tokens per side; token i lies at row i // grid and
column i % grid. Tokens count from 0.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from PIL import Image

from vpworkbench.figures.style import CLEAR, ORANGE, WIDTH, escaped, finish, percent, wrapped

_LOSSLESS_PX = 160  # larger pictures are embedded as JPEG, a tenth of the size
_GAP_PX, _LINE_PX, _LETTER_PX = 14, 16, 6.4  # between pictures; line height and mean letter width of a caption
_QUARTER_PX = (WIDTH - _GAP_PX) // 4 - _GAP_PX  # width of a panel where four are side by side
_DARKNESS = 0.86  # of an image where the attention is 0


def pictures(images: Sequence[np.ndarray], captions: Sequence[str | Sequence[str]]) -> go.Figure:
    """A contact sheet: images in rows of four, with their captions below.

    An image has one caption or several; long ones are wrapped.
    """
    if not len(images):
        raise ValueError("pictures needs at least one image")
    columns = min(4, len(images))
    panel_px = min(260, (WIDTH - _GAP_PX) // columns - _GAP_PX)
    figure = _panels(images, captions, columns=columns, panel_px=panel_px)
    return finish(figure, alt=f"{len(images)} images with their captions below.")


def regions(image: np.ndarray, boxes: ArrayLike) -> go.Figure:
    """The image with the boxes of its visual tokens, (vision, 4): x0 y0 x1 y1 as shares of the image."""
    figure = _panels([image], [f"{len(boxes)} regions"], grid=1, columns=1, panel_px=360)
    for number, (x0, y0, x1, y1) in enumerate(np.asarray(boxes, dtype=float)):
        line = {"color": ORANGE, "width": 2}
        look = {"name": f"token {number}", "hoverinfo": "name", "showlegend": False}
        figure.add_scatter(x=[x0, x1, x1, x0, x0], y=[y0, y0, y1, y1, y0], mode="lines", line=line, **look)
        figure.add_annotation(x=x0, y=y0, text=str(number), showarrow=False, xanchor="left", yanchor="bottom")
    return finish(figure, title="Visual tokens", alt=f"An image with {len(boxes)} numbered boxes.")


def tokens(image: np.ndarray, grid: int) -> go.Figure:
    """The image with the grid of its visual tokens and their numbers."""
    figure = _panels([image], [f"{grid} x {grid} tokens"], grid=grid, columns=1, panel_px=360)
    figure.add_trace(_grid_lines(grid))
    row, column = np.divmod(np.arange(grid**2), grid)
    size = float(np.clip(0.36 * 360 / grid, 8, 14))
    font = {"color": "white", "size": size, "shadow": "0 0 3px black, 0 0 3px black"}
    look = {"mode": "text", "textfont": font, "hoverinfo": "skip", "showlegend": False}
    figure.add_scatter(x=column + 0.5, y=row + 0.5, text=[str(token) for token in range(grid**2)], **look)
    alt = f"An image divided into {grid} rows and {grid} columns of tokens, numbered row by row from 0."
    return finish(figure, title="Visual tokens", alt=alt)


def parsing(image: np.ndarray, attention: ArrayLike, picks: Sequence[int], grid: int) -> go.Figure:
    """Where picked visual tokens attend: the image, darkened by each pick's row of the parsing attention.

    `attention` is averaged over heads, (vision, vision); its rows sum to 1.
    """
    picks = [int(pick) for pick in picks]
    weights = np.asarray(attention, dtype=float)
    if np.abs(weights[picks].sum(axis=1) - 1).max() > 0.01:
        raise ValueError("rows of attention must sum to 1: average it over heads")
    captions = ["the image", *(f"token {pick}, brightest {percent(weights[pick].max())}" for pick in picks)]
    figure = _beside_the_image(image, captions, grid)
    for panel, pick in enumerate(picks, start=1):
        _add(figure, panel, _shade(weights[pick], grid), _outline(pick, grid))
    title = f"Where visual tokens attend (bright; uniform attention would be {percent(1 / len(weights))} each)"
    alt = f"An image and, for tokens {', '.join(map(str, picks))}, a copy each that is bright where the token attends."
    return finish(figure, title=title, alt=alt)


def masks(image: np.ndarray, masks: Mapping[str, ArrayLike], *, pick: int | None = None, grid: int) -> go.Figure:
    """The image with the tokens that each mask, bool (vision,), hides greyed out (paper Fig. 2).

    `pick` is the token around which the masks were built; it is outlined.
    """
    hidden = {name: np.asarray(mask, dtype=bool) for name, mask in masks.items()}
    captions = [f"{name}: {int(mask.sum())} of {mask.size} tokens hidden" for name, mask in hidden.items()]
    figure = _beside_the_image(image, ["the image", *captions], grid)
    for panel, mask in enumerate([None, *hidden.values()]):
        if mask is not None:
            drawn = np.where(mask, 1.0, np.nan)  # plotly draws nothing at nan
            cover = _overlay(drawn, grid, "#4a4a4a", "#4a4a4a", zmax=1, hover="hidden")
            _add(figure, panel, cover, _grid_lines(grid))
        if pick is not None:
            _add(figure, panel, _outline(int(pick), grid))
    title = "Tokens hidden from the fusion" + (f", built around token {pick}" if pick is not None else "")
    alt = f"An image, and copies with hidden tokens greyed out: {'; '.join(captions)}."
    return finish(figure, title=title, alt=alt)


def attention_on_image(image: np.ndarray, weights: ArrayLike, grid: int, *, title: str) -> go.Figure:
    """The image beside a copy that is bright where the weights, (vision,), are near the largest."""
    weights = np.asarray(weights, dtype=float)
    caption = f"{percent(weights.sum())} in all, brightest {percent(weights.max())}"
    figure = _panels([image] * 2, ["the image", caption], grid=grid, columns=2, panel_px=260)
    _add(figure, 1, _shade(weights, grid))
    brightest = int(weights.argmax())
    alt = f"An image and a copy that is bright where attention is large, brightest at token {brightest}."
    return finish(figure, title=escaped(title), alt=alt)


def darkened(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """The uint8 image, dark where the attention, shape (row, column), is small: as in figures, but as pixels."""
    share = Image.fromarray((attention / max(attention.max(), 1e-12)).astype(np.float32))
    light = np.asarray(share.resize(image.shape[1::-1], Image.Resampling.NEAREST))
    return (image * (1 - _DARKNESS + _DARKNESS * light[..., None])).round().astype(np.uint8)


def data_url(picture: Image.Image, kind: str, **options: object) -> str:
    """A picture as text that a page can hold; `kind` is PNG or JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------------- panels of images


def _beside_the_image(image: np.ndarray, captions: Sequence[str], grid: int) -> go.Figure:
    """The same image once for each caption, at most four in a row."""
    columns = min(4, len(captions))
    return _panels([image] * len(captions), captions, grid=grid, columns=columns, panel_px=_QUARTER_PX)


def _panels(
    images: Sequence[np.ndarray],
    captions: Sequence[str | Sequence[str]],
    *,
    columns: int,
    panel_px: int,
    grid: int | None = None,
) -> go.Figure:
    """Images in rows with their captions below, each with its own hidden axes.

    Axes count tokens where there is a grid, else pixels, from the upper left corner.
    """
    images = [np.asarray(image) for image in images]
    texts = [wrapped(caption, int(panel_px / _LETTER_PX)) for caption in captions]
    image_px = [panel_px * image.shape[0] / image.shape[1] for image in images]
    text_px = [_LINE_PX * len(lines) + 2 * _GAP_PX for lines in texts]
    rows = [slice(start, start + columns) for start in range(0, len(images), columns)]
    row_px = [max(image_px[row]) + max(text_px[row]) for row in rows]
    width, height = columns * (panel_px + _GAP_PX) + _GAP_PX, sum(row_px)
    figure = go.Figure()
    for index, (image, lines) in enumerate(zip(images, texts, strict=True)):
        row, column = divmod(index, columns)
        left, top = _GAP_PX + column * (panel_px + _GAP_PX), sum(row_px[:row])
        x = [left / width, (left + panel_px) / width]
        y = [1 - (top + image_px[index]) / height, 1 - top / height]
        down, across = (grid, grid) if grid else image.shape[:2]
        _add(figure, index, _picture(image, down, across, largest_px=2 * panel_px))
        number, axis = index + 1, {"visible": False, "constrain": "domain"}
        x_axis = axis | {"domain": x, "range": [0, across], "anchor": f"y{number}"}
        y_axis = axis | {"domain": y, "range": [down, 0], "anchor": f"x{number}", "scaleanchor": False}
        figure.update_layout({f"xaxis{number}": x_axis, f"yaxis{number}": y_axis})
        anchor = {"xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "top", "align": "left", "yshift": -2}
        figure.add_annotation(x=x[0], y=y[0], text="<br>".join(lines), showarrow=False, **anchor)
    return figure.update_layout(width=width, height=height, margin={"l": 0, "r": 0, "t": 0, "b": 0})


def _add(figure: go.Figure, panel: int, *traces: go.Scatter | go.Heatmap | go.Image) -> None:
    for trace in traces:
        figure.add_trace(trace.update(xaxis=f"x{panel + 1}", yaxis=f"y{panel + 1}"))


def _picture(image: np.ndarray, rows: int, columns: int, *, largest_px: int) -> go.Image:
    """An embedded picture, stretched over `rows` and `columns` of its axes."""
    picture = Image.fromarray(image)
    picture.thumbnail((largest_px, largest_px))
    kind = "PNG" if max(picture.size) <= _LOSSLESS_PX else "JPEG"
    dx, dy = columns / picture.width, rows / picture.height
    place = {"x0": dx / 2, "dx": dx, "y0": dy / 2, "dy": dy}  # centre of the first pixel, size of a pixel
    source = data_url(picture, kind, optimize=True, quality=88)
    return go.Image(source=source, **place, zsmooth="fast", hoverinfo="skip")


# ------------------------------------------------------------------------------------------- traces over a panel


def _shade(weights: np.ndarray, grid: int) -> go.Heatmap:
    """Black that lets the picture through where weights are large."""
    return _overlay(weights, grid, f"rgba(0, 0, 0, {_DARKNESS})", CLEAR, zmax=weights.max(), hover="%{z:.1%}")


def _overlay(values: np.ndarray, grid: int, low: str, high: str, *, zmax: float, hover: str) -> go.Heatmap:
    place = {"x0": 0.5, "y0": 0.5, "dx": 1, "dy": 1}
    colours = {"colorscale": [[0, low], [1, high]], "zmin": 0, "zmax": zmax, "showscale": False}
    numbers = np.arange(grid**2).reshape(grid, grid).astype(str)
    text = {"text": numbers, "hovertemplate": f"token %{{text}}: {hover}<extra></extra>", "hoverongaps": False}
    return go.Heatmap(z=values.reshape(grid, grid), **place, **colours, **text)


def _grid_lines(grid: int) -> go.Scatter:
    steps = [value for step in range(grid + 1) for value in (step, step, None)]
    ends = [0, grid, None] * (grid + 1)
    line = {"color": "rgba(255, 255, 255, 0.55)", "width": 1}
    look = {"mode": "lines", "line": line, "name": "grid", "hoverinfo": "skip", "showlegend": False}
    return go.Scatter(x=steps + ends, y=ends + steps, **look)


def _outline(token: int, grid: int) -> go.Scatter:
    row, column = divmod(token, grid)
    x, y = column + np.array([0, 1, 1, 0, 0]), row + np.array([0, 0, 1, 1, 0])
    look = {"line": {"color": ORANGE, "width": 3}, "hoverinfo": "skip", "showlegend": False, "cliponaxis": False}
    return go.Scatter(x=x, y=y, mode="lines", name=f"token {token}", **look)
