"""Tokens as boxes: grids, and what one model says of its tokens, brought over to the tokens of another.

Boxes are x0 y0 x1 y1 as shares of the image.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grid_boxes(rows: int, columns: int, within: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)) -> Tensor:
    """Boxes of a grid, row by row, inside a part of the image; (rows * columns, 4)."""
    left, top, right, bottom = within
    y = torch.linspace(top, bottom, rows + 1)
    x = torch.linspace(left, right, columns + 1)
    corners = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # row, column, (x, y)
    return torch.cat([corners[:-1, :-1], corners[1:, 1:]], dim=-1).flatten(0, 1)


def shared_area(boxes: Tensor, others: Tensor) -> Tensor:
    """Area that each box shares with each other box; (..., token, 4), (..., other, 4) -> (..., token, other)."""
    low = torch.maximum(boxes[..., :, None, :2], others[..., None, :, :2])
    high = torch.minimum(boxes[..., :, None, 2:], others[..., None, :, 2:])
    return (high - low).clamp(min=0).prod(dim=-1)


def features_in(boxes: Tensor, features: Tensor, given: Tensor) -> Tensor:
    """Features of the tokens `given`, averaged over the area of each of `boxes`: (..., token, channel).

    `boxes` are (..., token, 4), `features` (..., other, channel), `given` (..., other, 4). The result is zero where a
    box shares no area with those given, as padding does.
    """
    area = shared_area(boxes, given).to(features)
    return area / area.sum(dim=-1, keepdim=True).clamp(min=1e-12) @ features


def attention_in(boxes: Tensor, attention: Tensor, given: Tensor) -> Tensor:
    """Attention between the tokens `given`, brought over to `boxes`: rows averaged by area, columns summed.

    A box gets the share of a column that is its share of the token's area. On grids all shares find a place. Other
    boxes leave some out, so each row is divided by its sum; it is zero where a box has no area.

    `boxes` are (..., token, 4), `attention` (..., other, other), `given` (..., other, 4); returns (..., token, token).
    """
    area = shared_area(boxes, given).to(attention)
    columns = area / (given[..., 2:] - given[..., :2]).prod(dim=-1).to(attention)[..., None, :]
    brought = features_in(boxes, attention @ columns.transpose(-1, -2), given)
    return brought / brought.sum(dim=-1, keepdim=True).clamp(min=1e-12)
