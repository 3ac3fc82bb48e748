"""Do masks follow objects? (paper Fig. 2, counted): the share of hidden tokens on the picked token's object.

* `shares_on_objects`: the mask is as large as the picked object, and the pick itself does not count. A rule that
  follows objects perfectly scores 1 whatever their sizes, so rules and models can be compared.
* `shares_at_budget`: the mask has the fixed size used in training. Small objects cannot fill it, so the
  result also has the largest share that the budget allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vpworkbench.stats import Interval, bootstrap_interval, paired_interval

ON_OBJECT = 0.2
"""Share of a token's pixels that an object must cover for the token to be on it."""
ON_PHOTOGRAPH = 0.5
"""The same for photographs, whose objects are many tokens large: with a fifth, their borders would count too."""
SMALLEST_OBJECT = 3
"""Tokens of the smallest object that is picked: of two tokens, one hidden token beside the pick says little."""


# ------------------------------------------------------------------------------------------- the object of a token


def objects_of_tokens(object_map: Tensor, grid: int | tuple[int, int], share: float = ON_OBJECT) -> Tensor:
    """The object that each token of a grid is on: it covers most of the token's pixels, and at least `share` of them.

    Parameters
    ----------
    object_map : Tensor of whole numbers, shape (..., height, width)
        Number of the object visible at each pixel; 0 is background.
    grid : int or (int, int)
        Rows and columns of tokens. A pixel belongs to the token that covers its centre, so the image's size need not be
        a multiple of the grid.

    Returns
    -------
    LongTensor, shape (..., rows * columns)
        Row by row; 0 for background, ties go to the smaller number.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    height, width = object_map.shape[-2:]
    if not (0 < rows <= height and 0 < columns <= width):
        raise ValueError(f"{height} x {width} pixels cannot be divided into {rows} x {columns} tokens")
    row = (2 * torch.arange(height, device=object_map.device) + 1) * rows // (2 * height)
    column = (2 * torch.arange(width, device=object_map.device) + 1) * columns // (2 * width)
    maps = object_map.reshape(-1, height, width)
    image = torch.arange(len(maps), device=object_map.device)[:, None, None]
    token = (image * rows + row[:, None]) * columns + column
    numbers = int(maps.max()) + 1
    count = len(maps) * rows * columns
    pixels = (token * numbers + maps).flatten().bincount(minlength=count * numbers)
    return _largest_object(pixels.view(*object_map.shape[:-2], rows * columns, numbers), share)


def objects_of_boxes(object_map: Tensor, boxes: Tensor, share: float = ON_OBJECT) -> Tensor:
    """The object in each box of one image, by the rule of `objects_of_tokens`.

    `object_map` is (height, width), `boxes` are x0 y0 x1 y1 as shares of the image, (token, 4); int64 (token,).
    """
    height, width = object_map.shape
    numbers = int(object_map.max()) + 1
    corners = (boxes * boxes.new_tensor([width, height, width, height])).round().long().tolist()
    parts = [object_map[y0:y1, x0:x1].flatten() for x0, y0, x1, y1 in corners]
    return _largest_object(torch.stack([part.bincount(minlength=numbers) for part in parts]), share)


def _largest_object(pixels: Tensor, share: float) -> Tensor:
    """Number of the object, from the pixels of each number inside each token: (..., token, number) -> (..., token)."""
    covered = pixels.double() / pixels.sum(dim=-1, keepdim=True).clamp(min=1)
    covered[..., 0] = -1  # background is no object
    most, number = covered.max(dim=-1)  # the first of equals
    return torch.where(most >= share, number, 0)


# ------------------------------------------------------------------------- rules that choose which tokens are hidden


def nearest_by_position(boxes: Tensor) -> Tensor:
    """Scores of tokens around each pick, larger when nearer; boxes (..., token, 4) -> (..., token, token)."""
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    distances = torch.cdist(centres.double(), centres.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return -distances.round(decimals=5)  # float32 boxes: neighbours on all sides must be equally near


def nearest_by_colour(images: Tensor, grid: int) -> Tensor:
    """Scores by mean RGB colour; images (image, 3, height, width) -> (image, vision, vision)."""
    colours = functional.adaptive_avg_pool2d(images.double(), grid).flatten(2).transpose(1, 2)
    return -torch.cdist(colours, colours, compute_mode="donot_use_mm_for_euclid_dist")


def nearest_by_features(features: Tensor) -> Tensor:
    """Scores by cosine similarity; features (image, vision, channel) -> (image, vision, vision)."""
    directions = functional.normalize(features.double(), dim=-1)
    return directions @ directions.transpose(1, 2)


def mask_scores(
    mode: str,
    features: Tensor,
    parsing: Tensor | None = None,
    boxes: Tensor | None = None,
    objects: Tensor | None = None,
) -> Tensor | None:
    """How `mask.mode` ranks tokens for each pick, (image, vision, vision); None: at random.

    Parameters
    ----------
    features : Tensor, (image, vision, channel)
    parsing : Tensor, (image, vision, vision), for `attention`
    boxes : Tensor, (image, vision, 4), for `block` and `object`
    objects : LongTensor, (image, vision), for `object`
    """
    rules = {
        "attention": lambda: parsing,
        "similar": lambda: nearest_by_features(features),
        "block": lambda: nearest_by_position(boxes),
        "object": lambda: objects_first(objects, boxes),
    }
    return rules[mode]() if mode in rules else None


def objects_first(objects: Tensor, boxes: Tensor) -> Tensor:
    """Scores of a mask that knows the objects: the tokens of the pick's object, then the nearest.

    No mask by objects can do more. Around a pick on the background all tokens are ranked by their distance. `objects`
    is (..., vision), from `objects_of_tokens`, `boxes` (..., vision, 4) -> (..., vision, vision).
    """
    same = (objects[..., :, None] == objects[..., None, :]) & (objects > 0)[..., None]
    return nearest_by_position(boxes) + 2 * same  # no distance is larger than the square's diagonal


# -------------------------------------------------------------------------------- masks as large as the picked object


@dataclass(frozen=True)
class ObjectShares:
    """Share of hidden tokens on the picked object, the pick left out, for each rule that chooses what is hidden.

    `shares` has them by rule, (object,), in [0, 1]: means over an object's tokens as picks. `random` is expected of
    random masks.
    """

    shares: dict[str, np.ndarray]
    sizes: np.ndarray  # (object,) tokens of each object, and of the mask
    images: np.ndarray  # (object,) the image that each object is in

    def intervals(self, seed: int = 0) -> dict[str, Interval]:
        """Mean share of each rule with its bootstrap interval over objects; empty without objects."""
        if not len(self.sizes):
            return {}
        return {rule: bootstrap_interval(shares, seed) for rule, shares in self.shares.items()}

    def difference(self, first: str, second: str, seed: int = 0) -> Interval:
        """Mean difference between two rules on the same objects."""
        return paired_interval(self.shares[first], self.shares[second], seed)


def shares_on_objects(rules: Mapping[str, Tensor], objects: Tensor, tokens: Tensor | None = None) -> ObjectShares:
    """How much of a mask as large as the picked object lies on that object, for several rules.

    Every token of every object of at least `SMALLEST_OBJECT` tokens is picked in turn. On an object of n tokens the
    mask hides the pick and the n - 1 other tokens with the largest scores; the share is that of those n - 1 on the
    object.

    Parameters
    ----------
    rules : mapping of Tensor, shape (image, vision, vision)
        Name of the rule -> score of each token (last axis) for each pick. Equal scores count as drawn at random among
        them: the share is its expectation.
    objects : LongTensor, shape (image, vision)
        From `objects_of_tokens`.
    tokens : BoolTensor, shape (image, vision), optional
        Real tokens; padding is never hidden.
    """
    image, pick = (objects > 0).nonzero(as_tuple=True)
    on_object = objects[image] == objects[image, pick, None]  # pick token
    size = on_object.sum(dim=1)
    kept = size >= SMALLEST_OBJECT
    image, pick, on_object, size = image[kept], pick[kept], on_object[kept], size[kept]
    real = torch.ones_like(objects, dtype=torch.bool) if tokens is None else tokens
    others = real[image].scatter(1, pick[:, None], False)
    keys, owner = torch.stack([image, objects[image, pick]]).unique(dim=1, return_inverse=True)
    picks = owner.bincount(minlength=keys.shape[1])

    def of_objects(values: Tensor) -> np.ndarray:
        sums = torch.zeros(len(picks), dtype=torch.float64).index_add_(0, owner, values.double())
        return (sums / picks).numpy()

    scores = dict(rules) | {"random": torch.zeros(*objects.shape, objects.shape[1])}
    shares = {
        rule: of_objects(_expected_share(score[image, pick], on_object, others, size - 1))
        for rule, score in scores.items()
    }
    return ObjectShares(shares, of_objects(size).round().astype(int), keys[0].numpy())


def _expected_share(scores: Tensor, on_object: Tensor, others: Tensor, hidden: Tensor) -> Tensor:
    """Share on the object of the `hidden` (pick,) best of `others`, ties drawn at random; the rest (pick, token)."""
    scores = scores.double().masked_fill(~others, -torch.inf)
    last = scores.sort(dim=1, descending=True).values.gather(1, hidden[:, None] - 1)
    above, tied = scores > last, (scores == last) & others
    left = hidden - above.sum(dim=1)
    hits = (above & on_object).sum(dim=1) + left * (tied & on_object).sum(dim=1) / tied.sum(dim=1)
    return hits / hidden


# ---------------------------------------------------------------------------------------- masks of a fixed budget


class BudgetShares(NamedTuple):
    """Masks of a fixed budget beside random ones; over images, with 95% bootstrap intervals. The pick counts."""

    share: Interval
    random: Interval
    largest: Interval  # a perfect mask of this budget
    difference: Interval  # share - random, paired by image
    images: int
    on_background: int  # images left out because the pick is on no object


def shares_at_budget(masked: Tensor, pick: Tensor, objects: Tensor, *, seed: int = 0) -> BudgetShares:
    """Means of `mask_on_object` over images, for masks of one budget."""
    share, random, largest = (part.cpu().double().numpy() for part in mask_on_object(masked, pick, objects))
    left_out = int(np.isnan(share).sum())
    return BudgetShares(
        share=bootstrap_interval(share, seed),
        random=bootstrap_interval(random, seed),
        largest=bootstrap_interval(largest, seed),
        difference=paired_interval(share, random, seed),
        images=len(share) - left_out,
        on_background=left_out,
    )


class MaskOnObject(NamedTuple):
    """Shares in [0, 1] of masked tokens, the pick included, on the picked object; (image,), nan if it is background."""

    share: Tensor
    random: Tensor  # expected if the tokens beside the pick were drawn at random, with the same budget
    largest: Tensor  # that the budget allows: small objects cannot fill the mask


def mask_on_object(masked: Tensor, pick: Tensor, objects: Tensor) -> MaskOnObject:
    """How much of each mask lies on the object of its picked token.

    Parameters
    ----------
    masked : BoolTensor, shape (image, vision)
        Hidden tokens, the picked one included.
    pick : LongTensor, shape (image,)
    objects : LongTensor, shape (image, vision)
        From `objects_of_tokens`.
    """
    if not masked.gather(1, pick[:, None]).all():
        raise ValueError("the picked token must be masked too: it is part of the budget")
    picked = objects.gather(1, pick[:, None])
    budget, size = masked.sum(dim=1), (objects == picked).sum(dim=1)
    share = (masked & (objects == picked)).sum(dim=1) / budget
    # the mean of a hypergeometric count
    random = (1 + (budget - 1) * (size - 1) / max(masked.shape[1] - 1, 1)) / budget
    largest = size.clamp(max=budget) / budget
    return MaskOnObject(*(part.masked_fill(picked[:, 0] == 0, torch.nan) for part in (share, random, largest)))
