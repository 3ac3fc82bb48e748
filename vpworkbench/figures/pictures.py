"""Images with tokens, attention and masks drawn over them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from PIL import Image

from vpworkbench.figures.style import CLEAR, ORANGE, WIDTH, escaped, finish, percent, wrapped

Grid = int | tuple[int, int]
"""Tokens per side, or (rows, columns)."""
_LOSSLESS_PX = 160  # larger pictures are embedded as JPEG, a tenth of the size
_GAP_PX, _LINE_PX, _LETTER_PX = 14, 16, 6.4  # between pictures; line height and mean letter width of a caption
_QUARTER_PX = (WIDTH - _GAP_PX) // 4 - _GAP_PX  # width of a panel where four are side by side
_DARKNESS = 0.86  # of an image where the attention is 0


def pictures(
    images: ArrayLike | Sequence[np.ndarray], captions: Sequence[str | Sequence[str]], *, columns: int = 4
) -> go.Figure:
    """A contact sheet: images with their captions below.

    Parameters
    ----------
    images : array of uint8, shape (image, height, width, 3), or a sequence of such images
    captions : sequence of str or of sequences of str
        One or several for each image. Long captions are wrapped.
    """
    if len(images) != len(captions) or len(images) == 0:
        raise ValueError(f"pictures needs images with one caption each, not {len(images)} and {len(captions)} captions")
    columns = min(columns, len(images))
    panel_px = min(260, (WIDTH - _GAP_PX) // columns - _GAP_PX)
    figure = _panels(images, captions, columns=columns, panel_px=panel_px)
    return finish(figure, alt=f"{len(images)} images with their captions below.")


def regions(image: np.ndarray, boxes: ArrayLike) -> go.Figure:
    """The image with the boxes of its visual tokens, numbered as in code, from 0.

    Parameters
    ----------
    image : array of uint8, shape (height, width, 3)
    boxes : array, shape (vision, 4)
        x0 y0 x1 y1 as shares of the image.
    """
    boxes = np.asarray(boxes, dtype=float)
    if boxes.shape != (len(boxes), 4):
        raise ValueError(f"boxes must be (vision, 4), not {boxes.shape}")
    figure = _panels([image], [f"{len(boxes)} regions"], grid=(1, 1), columns=1, panel_px=360)
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        line = {"color": ORANGE, "width": 2}
        look = {"name": f"token {number}", "hoverinfo": "name", "showlegend": False}
        figure.add_scatter(x=[x0, x1, x1, x0, x0], y=[y0, y0, y1, y1, y0], mode="lines", line=line, **look)
        figure.add_annotation(x=x0, y=y0, text=str(number), showarrow=False, xanchor="left", yanchor="bottom")
    return finish(figure, title="Visual tokens", alt=f"An image with {len(boxes)} numbered boxes.")


def tokens(image: np.ndarray, grid: Grid) -> go.Figure:
    """The image with the grid of its visual tokens, numbered as in code: i = row * columns + column, from 0.

    Parameters
    ----------
    image : array of uint8, shape (height, width, 3)
    """
    rows, columns = _rows_and_columns(grid)
    figure = _panels([image], [f"{rows} x {columns} tokens"], grid=(rows, columns), columns=1, panel_px=360)
    figure.add_trace(_grid_lines(rows, columns))
    row, column = np.divmod(np.arange(rows * columns), columns)
    numbers = [str(token) for token in range(rows * columns)]
    size = float(np.clip(0.36 * 360 / columns, 8, 14))
    font = {"color": "white", "size": size, "shadow": "0 0 3px black, 0 0 3px black"}
    look = {"mode": "text", "textfont": font, "hoverinfo": "skip", "showlegend": False}
    figure.add_scatter(x=column + 0.5, y=row + 0.5, text=numbers, **look)
    alt = f"An image divided into {rows} rows and {columns} columns of tokens, numbered row by row from 0."
    return finish(figure, title="Visual tokens", alt=alt)


def parsing(image: np.ndarray, attention: ArrayLike, picks: Sequence[int], grid: Grid) -> go.Figure:
    """Where picked visual tokens attend: the image, darkened by each pick's row of the parsing attention.

    Parameters
    ----------
    image : array of uint8, shape (height, width, 3)
    attention : array, shape (vision, vision)
        Averaged over heads; rows sum to 1.
    picks : sequence of int
        Tokens, from 0.
    """
    rows, columns = _rows_and_columns(grid)
    weights = np.asarray(attention, dtype=float)
    _check_shape("attention", weights, (rows * columns,) * 2)
    picks = [_checked_pick(pick, rows * columns) for pick in picks]
    if not picks:
        raise ValueError("parsing needs at least one pick")
    if np.abs(weights[picks].sum(axis=1) - 1).max() > 0.01:
        raise ValueError("rows of attention must sum to 1: average it over heads")
    captions = ["the image", *(f"token {pick}, brightest {percent(weights[pick].max())}" for pick in picks)]
    figure = _beside_the_image(image, captions, (rows, columns))
    for panel, pick in enumerate(picks, start=1):
        _add(figure, panel, _shade(weights[pick], rows, columns), _outline(pick, columns))
    title = f"Where visual tokens attend (bright; uniform attention would be {percent(1 / len(weights))} each)"
    alt = f"An image and, for tokens {', '.join(map(str, picks))}, a copy each that is bright where the token attends."
    return finish(figure, title=title, alt=alt)


def masks(
    image: np.ndarray,
    masks: Mapping[str, ArrayLike],
    *,
    names: Sequence[str] | None = None,
    pick: int | None = None,
    grid: Grid,
) -> go.Figure:
    """The image with the tokens that each mask hides greyed out (paper Fig. 2).

    Parameters
    ----------
    image : array of uint8, shape (height, width, 3)
    masks : mapping of str to bool array, shape (vision,)
        True where a token is hidden.
    names : sequence of str, optional
        The masks to draw, in this order; default: all.
    pick : int, optional
        The token around which the masks were built; it is outlined.
    """
    rows, columns = _rows_and_columns(grid)
    names = list(masks) if names is None else list(names)
    if missing := [name for name in names if name not in masks]:
        raise ValueError(f"names {missing} are not among the masks {list(masks)}")
    hidden = {name: np.asarray(masks[name]) for name in names}
    for name, mask in hidden.items():
        _check_shape(f"mask {name!r}", mask, (rows * columns,))
        if mask.dtype != bool:
            raise ValueError(f"mask {name!r} must be bool, True where a token is hidden, not {mask.dtype}")
    captions = [f"{name}: {int(mask.sum())} of {mask.size} tokens hidden" for name, mask in hidden.items()]
    figure = _beside_the_image(image, ["the image", *captions], (rows, columns))
    for panel, mask in enumerate([None, *hidden.values()]):
        if mask is not None:
            _add(figure, panel, _cover(mask, rows, columns), _grid_lines(rows, columns))
        if pick is not None:
            _add(figure, panel, _outline(_checked_pick(pick, rows * columns), columns))
    title = "Tokens hidden from the fusion" + (f", built around token {pick}" if pick is not None else "")
    alt = f"An image, and copies with hidden tokens greyed out: {'; '.join(captions)}."
    return finish(figure, title=title, alt=alt)


def attention_on_image(
    image: np.ndarray, weights: ArrayLike, grid: Grid, *, title: str = "Attention on the image"
) -> go.Figure:
    """The image beside a copy that is bright where the weights are large.

    Parameters
    ----------
    image : array of uint8, shape (height, width, 3)
    weights : array, shape (vision,)
        Not negative; brightness is relative to the largest.
    """
    rows, columns = _rows_and_columns(grid)
    weights = np.asarray(weights, dtype=float)
    _check_shape("weights", weights, (rows * columns,))
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.max() > 0):
        raise ValueError("weights must be finite, not negative and not all 0")
    caption = f"{percent(weights.sum())} in all, brightest {percent(weights.max())}"
    figure = _panels([image] * 2, ["the image", caption], grid=(rows, columns), columns=2, panel_px=260)
    _add(figure, 1, _shade(weights, rows, columns))
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


def _beside_the_image(image: np.ndarray, captions: Sequence[str], grid: tuple[int, int]) -> go.Figure:
    """The same image once for each caption, at most four in a row."""
    columns = min(4, len(captions))
    return _panels([image] * len(captions), captions, grid=grid, columns=columns, panel_px=_QUARTER_PX)


def _panels(
    images: Sequence[np.ndarray],
    captions: Sequence[str | Sequence[str]],
    *,
    columns: int,
    panel_px: int,
    grid: tuple[int, int] | None = None,
) -> go.Figure:
    """Images in rows with their captions below, each with its own axes.

    Axes count tokens where there is a grid, else pixels, from the upper left corner. They are hidden.
    """
    images = [_checked_image(image) for image in images]
    texts = [wrapped(caption, int(panel_px / _LETTER_PX)) for caption in captions]
    image_px = [panel_px * image.shape[0] / image.shape[1] for image in images]
    text_px = [_LINE_PX * len(lines) + 2 * _GAP_PX for lines in texts]
    rows = [slice(start, start + columns) for start in range(0, len(images), columns)]
    row_px = [max(image_px[row]) + max(text_px[row]) for row in rows]
    width, height = columns * (panel_px + _GAP_PX) + _GAP_PX, sum(row_px)
    figure = go.Figure()
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        left, top = _GAP_PX + column * (panel_px + _GAP_PX), sum(row_px[:row])
        x = [left / width, (left + panel_px) / width]
        y = [1 - (top + image_px[index]) / height, 1 - top / height]
        extent = grid or image.shape[:2]
        _add(figure, index, _picture(image, extent, largest_px=2 * panel_px))
        _add_hidden_axes(figure, index, x, y, extent)
        anchor = {"xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "top", "align": "left", "yshift": -2}
        figure.add_annotation(x=x[0], y=y[0], text="<br>".join(texts[index]), showarrow=False, **anchor)
    return figure.update_layout(width=width, height=height, margin={"l": 0, "r": 0, "t": 0, "b": 0})


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
    dx, dy = extent[1] / picture.width, extent[0] / picture.height
    place = {"x0": dx / 2, "dx": dx, "y0": dy / 2, "dy": dy}  # centre of the first pixel, size of a pixel
    source = data_url(picture, kind, optimize=True, quality=88)
    return go.Image(source=source, **place, zsmooth="fast", hoverinfo="skip")


# ------------------------------------------------------------------------------------------- traces over a panel


def _shade(weights: np.ndarray, rows: int, columns: int) -> go.Heatmap:
    """Black that lets the picture through where weights are large."""
    scale = [[0, f"rgba(0, 0, 0, {_DARKNESS})"], [1, CLEAR]]
    return _overlay(weights, rows, columns, scale, zmax=weights.max(), hover="%{z:.1%}")


def _cover(mask: np.ndarray, rows: int, columns: int) -> go.Heatmap:
    """Dark grey over hidden tokens; nan, which draws nothing, over the others."""
    scale = [[0, "#4a4a4a"], [1, "#4a4a4a"]]
    return _overlay(np.where(mask, 1.0, np.nan), rows, columns, scale, zmax=1, hover="hidden")


def _overlay(values: np.ndarray, rows: int, columns: int, scale: list[list], *, zmax: float, hover: str) -> go.Heatmap:
    place = {"x0": 0.5, "y0": 0.5, "dx": 1, "dy": 1}
    colours = {"colorscale": scale, "zmin": 0, "zmax": zmax, "showscale": False}
    numbers = np.arange(rows * columns).reshape(rows, columns).astype(str)
    text = {"text": numbers, "hovertemplate": f"token %{{text}}: {hover}<extra></extra>", "hoverongaps": False}
    return go.Heatmap(z=values.reshape(rows, columns), **place, **colours, **text)


def _grid_lines(rows: int, columns: int) -> go.Scatter:
    x = [value for column in range(columns + 1) for value in (column, column, None)]
    y = [value for _ in range(columns + 1) for value in (0, rows, None)]
    x += [value for _ in range(rows + 1) for value in (0, columns, None)]
    y += [value for row in range(rows + 1) for value in (row, row, None)]
    line = {"color": "rgba(255, 255, 255, 0.55)", "width": 1}
    return go.Scatter(x=x, y=y, mode="lines", line=line, name="grid", hoverinfo="skip", showlegend=False)


def _outline(token: int, columns: int) -> go.Scatter:
    row, column = divmod(token, columns)
    x, y = column + np.array([0, 1, 1, 0, 0]), row + np.array([0, 0, 1, 1, 0])
    look = {"line": {"color": ORANGE, "width": 3}, "hoverinfo": "skip", "showlegend": False, "cliponaxis": False}
    return go.Scatter(x=x, y=y, mode="lines", name=f"token {token}", **look)


# -------------------------------------------------------------------------------------------------------- checks


def _checked_image(image: ArrayLike) -> np.ndarray:
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"an image must be uint8 (height, width, 3), not {pixels.dtype} {pixels.shape}")
    return np.ascontiguousarray(pixels)


def _check_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} is {array.shape}, but the grid needs {shape}")


def _checked_pick(pick: int, count: int) -> int:
    if not 0 <= int(pick) < count:
        raise ValueError(f"pick {int(pick)} is not among the {count} tokens, which count from 0")
    return int(pick)


def _rows_and_columns(grid: Grid) -> tuple[int, int]:
    rows, columns = (grid, grid) if isinstance(grid, (int, np.integer)) else grid
    return int(rows), int(columns)
