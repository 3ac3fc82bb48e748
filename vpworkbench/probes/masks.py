"""The mask probe (paper Fig. 2, made quantitative): do masked tokens lie on one object?

Attention-guided masking hides the tokens that the picked token attends to. Where object masks are
known, the share of them on the picked token's object says how well they follow the object.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vpworkbench.stats import Interval, bootstrap_interval


def object_tokens(object_map: Tensor, grid: tuple[int, int]) -> Tensor:
    """The object that covers most of each token's pixels.

    Parameters
    ----------
    object_map : Tensor of whole numbers, shape (..., height, width)
        Number of the object visible at each pixel; 0 is background.
    grid : tuple of two int
        Rows and columns of tokens. A pixel belongs to the token that covers its centre, so the
        image's size need not be a multiple of the grid.

    Returns
    -------
    LongTensor, shape (..., rows * columns)
        Row by row; ties go to the smaller number.
    """
    rows, columns = grid
    height, width = object_map.shape[-2:]
    if object_map.is_floating_point() or object_map.dtype == torch.bool:
        raise ValueError(f"object_map must hold whole numbers, not {object_map.dtype}")
    if not (0 < rows <= height and 0 < columns <= width):
        raise ValueError(f"{height} x {width} pixels cannot be divided by {rows} x {columns} tokens")
    device = object_map.device
    row = torch.arange(height, device=device) * rows // height
    column = torch.arange(width, device=device) * columns // width
    token = (row[:, None] * columns + column).flatten()
    names, number = object_map.unique(return_inverse=True)  # sorted: argmax takes the smaller
    number = number.reshape(-1, height * width)
    votes = torch.zeros(len(number), rows * columns * len(names), device=device)
    votes.scatter_add_(1, token * len(names) + number, torch.ones_like(number, dtype=votes.dtype))
    winner = votes.unflatten(1, (rows * columns, len(names))).argmax(dim=-1)
    return names[winner].long().reshape(*object_map.shape[:-2], rows * columns)


def mask_on_object(masked: Tensor, pick: Tensor, objects: Tensor) -> Tensor:
    """Share of masked tokens on the picked token's object.

    Parameters
    ----------
    masked : BoolTensor, shape (image, vision)
        Hidden tokens, the picked one included.
    pick : LongTensor, shape (image,)
    objects : LongTensor, shape (image, vision)
        From `object_tokens`.

    Returns
    -------
    Tensor, shape (image,)
        In [0, 1]; nan where the pick is background.
    """
    picked = _object_of_pick(masked, pick, objects)
    share = (masked & (objects == picked)).sum(dim=1) / masked.sum(dim=1)
    return share.masked_fill(picked[:, 0] == 0, torch.nan)


def random_on_object(masked: Tensor, pick: Tensor, objects: Tensor) -> Tensor:
    """Expected `mask_on_object` had the tokens beside the pick been drawn at random, same budget.

    Exact (the mean of a hypergeometric count), so the comparison has no noise of its own.
    Parameters and result are those of `mask_on_object`.
    """
    picked = _object_of_pick(masked, pick, objects)
    budget, size = masked.sum(dim=1), (objects == picked).sum(dim=1)
    others = max(masked.shape[1] - 1, 1)
    share = (1 + (budget - 1) * (size - 1) / others) / budget
    return share.masked_fill(picked[:, 0] == 0, torch.nan)


class MaskComparison(NamedTuple):
    """Masks against random ones of the same budget, over images; intervals are 95% bootstrap."""

    share: Interval
    random: Interval
    difference: Interval  # paired: share - random of each image
    images: int
    on_background: int  # images left out because the pick lies on no object


def compare_masks(masked: Tensor, pick: Tensor, objects: Tensor, *, seed: int = 0) -> MaskComparison:
    """Mask probe over images, against its random control; parameters as for `mask_on_object`."""
    share = mask_on_object(masked, pick, objects).cpu().double().numpy()
    control = random_on_object(masked, pick, objects).cpu().double().numpy()
    left_out = int(np.isnan(share).sum())
    intervals = [bootstrap_interval(part, seed) for part in (share, control, share - control)]
    return MaskComparison(*intervals, images=len(share) - left_out, on_background=left_out)


def _object_of_pick(masked: Tensor, pick: Tensor, objects: Tensor) -> Tensor:
    """(image, 1), after checking what belongs together."""
    if masked.dtype != torch.bool or masked.shape != objects.shape or masked.ndim != 2:
        raise ValueError(
            "masked must be bool and objects whole numbers, both (image, vision), not "
            f"{masked.dtype} {tuple(masked.shape)} and {objects.dtype} {tuple(objects.shape)}"
        )
    if pick.shape != masked.shape[:1]:
        raise ValueError(f"pick must hold one token for each of {len(masked)} images")
    if not masked.gather(1, pick[:, None]).all():
        raise ValueError("the picked token must be masked too: it is part of the budget")
    return objects.gather(1, pick[:, None])
