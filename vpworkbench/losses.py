"""Masks of visual tokens and the losses MLM, ITM, VLA, MFR and MVM: small pure functions (paper Sec. 3.3).

A loss is a sum. The engine divides it once, by the count of the whole optimiser step, so accumulation changes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional


class Objective(ABC):
    """What a model is trained for: losses of a batch as sums, and the counts that make means of them."""

    weights: Mapping[str, float]  # of each loss in the total

    @abstractmethod
    def counts(self, batch: Any) -> dict[str, int]:
        """Number of items that each loss is a mean over; `batch` is that of a whole optimiser step."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Sum of each loss over a micro-batch."""

    def watch(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """Further numbers for each line of metrics; the model is in evaluation mode, here and in `probe`."""
        return {}

    def probe(self, model: nn.Module) -> dict[str, float]:
        """Held-out numbers, logged every `train.probe_every` steps; `held_out_loss` decides which weights are best."""
        return {}


Select = Literal["row", "column", "symmetric"]


def visual_mask(
    noise: Tensor,
    budget: int,
    *,
    parsing: Tensor | None = None,
    select: Select = "row",
    vision_tokens: Tensor | None = None,
) -> Tensor:
    """Hide one picked visual token and the tokens related to it (paper Eq. 9, Fig. 2).

    Parameters
    ----------
    noise : Tensor, (text, vision)
        Uniform numbers; the largest marks the pick, and among equal scores the larger comes first.
    budget : int
        k, the number of tokens to hide, the pick included.
    parsing : Tensor or None, (text, vision, vision)
        Parsing attention W, or any other scores of the tokens (last axis) for each pick. None: the other tokens are
        drawn at random.
    select
        Rank tokens by A[pick, :], by A[:, pick] or by the sum, where A = 0.5 (I + W) as in Eq. 3. The pick comes first:
        in a row of A by its value (A_ii >= 0.5), in a column by definition.
    vision_tokens : bool Tensor or None, (text, vision)
        False at padding; None if there is none.

    Returns
    -------
    bool Tensor, (text, vision)
        Exactly k True in each row; with padding the same share of the real tokens, rounded, at least one.
    """
    tokens = noise.shape[1]
    if not 1 <= budget <= tokens:
        raise ValueError(f"a mask of {budget} among {tokens} visual tokens; set mask.budget to at most {tokens}")
    real = torch.ones_like(noise, dtype=torch.bool) if vision_tokens is None else vision_tokens
    order = noise.masked_fill(~real, -1).argsort(dim=1, descending=True)  # the pick first
    if parsing is not None:
        scores = scores_of_pick(parsing, order[:, 0], select).masked_fill(~real, -torch.inf)
        scores = scores.scatter(1, order[:, :1], torch.inf)
        order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))
    allowed = (real.sum(dim=1, keepdim=True) * budget / tokens).round().clamp(min=1)
    hidden = torch.arange(budget, device=noise.device) < allowed
    return torch.zeros_like(real).scatter_(1, order[:, :budget], hidden) & real


def scores_of_pick(scores: Tensor, pick: Tensor, select: Select = "row") -> Tensor:
    """What a pick gives to the tokens, gets from them, or both; (text, vision, vision), (text,) -> (text, vision)."""
    rows = torch.arange(len(pick), device=pick.device)
    given, received = scores[rows, pick], scores[rows, :, pick]
    return {"row": given, "column": received, "symmetric": given + received}[select]


def code_mask(noise: Tensor, codes: Tensor) -> Tensor:
    """Hide all tokens with one code (SOHO Sec. 3.3), so that no hidden token can be copied from one like it.

    The largest `noise` (uniform) among the first tokens of each code marks the pick: all codes of an image are equally
    likely. `noise`, `codes` and the mask are (text, vision).
    """
    same = codes[:, :, None] == codes[:, None, :]
    first = ~same.tril(diagonal=-1).any(dim=2)
    picked = noise.masked_fill(~first, -1).argmax(dim=1, keepdim=True)
    return codes == codes.gather(1, picked)


def hide_pixels(images: Tensor, masked: Tensor) -> Tensor:
    """Paint the squares of hidden visual tokens mid-grey, so that their neighbours cannot encode them.

    `images` are uint8 (image, 3, height, width), `masked` is bool (image, vision), tokens of a square grid, row by row.
    """
    side = round(masked.shape[1] ** 0.5)
    squares = masked.view(-1, 1, side, side)
    pixels = images.shape[-1] // side
    return images.masked_fill(squares.repeat_interleave(pixels, -1).repeat_interleave(pixels, -2), 128)


def masked_language_modeling(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log likelihood of the hidden words of matched pairs (paper Eq. 7); (word, vocabulary), int64 (word,)."""
    return functional.cross_entropy(at_least_float32(logits), labels, reduction="sum")


def image_text_matching(logits: Tensor, matched: Tensor) -> Tensor:
    """Negative log likelihood of match or not (paper Eq. 8); logits (text, 2), matched bool (text,)."""
    return functional.cross_entropy(at_least_float32(logits), matched.long(), reduction="sum")


def cosine_cost(text: Tensor, vision: Tensor) -> Tensor:
    """1 - cosine of every word and visual token; (text, word, d), (text, vision, d) -> (text, word, vision)."""
    text, vision = (functional.normalize(at_least_float32(states), dim=-1) for states in (text, vision))
    return 1 - text @ vision.transpose(1, 2)


@torch.no_grad()
def transport_plan(cost: Tensor, word_tokens: Tensor, vision_tokens: Tensor) -> Tensor:
    """Plan of optimal transport by the inexact proximal point method (IPOT, Xie et al. 2020, paper ref. 42).

    50 proximal steps of size beta = 0.5; one Sinkhorn step solves the problem of each. `cost` and the plan are (text,
    word, vision); `word_tokens`, bool (text, word), and `vision_tokens`, bool (text, vision), are the tokens to
    transport, each set with uniform mass 1. The plan is zero at all other tokens, and all zero if a set is empty.
    """
    both = word_tokens[:, :, None] & vision_tokens[:, None, :]
    kernel = torch.where(both, (-cost / 0.5).exp(), 0)
    count_words = word_tokens.sum(dim=1, keepdim=True).clamp(min=1).to(cost)
    count_vision = vision_tokens.sum(dim=1, keepdim=True).clamp(min=1).to(cost)
    plan = both.to(cost)
    right = vision_tokens / count_vision
    tiny = torch.finfo(cost.dtype).tiny
    for _ in range(50):
        step = kernel * plan
        left = word_tokens / (count_words * torch.bmm(step, right[..., None])[..., 0]).clamp(min=tiny)
        right = vision_tokens / (count_vision * torch.bmm(left[:, None], step)[:, 0]).clamp(min=tiny)
        plan = left[..., None] * step * right[:, None, :]
    return plan


def transport_distance(text: Tensor, vision: Tensor, word_tokens: Tensor, vision_tokens: Tensor) -> Tensor:
    """OT distance in [0, 2] between the words and the visual tokens of each pair, (text,).

    The gradient goes through the cost only. `text` is (text, word, d), `vision` (text, vision, d); `word_tokens`, bool
    (text, word), and `vision_tokens`, bool (text, vision), are False at [CLS], [SEP] and padding.
    """
    cost = cosine_cost(text, vision)
    return (transport_plan(cost.detach(), word_tokens, vision_tokens) * cost).sum(dim=(1, 2))


def token_alignment(distance: Tensor, matched: Tensor) -> Tensor:
    """VLA draws matched pairs together and pushes unmatched ones apart: the difference of their sums (Sec. 3.3)."""
    return torch.where(matched, distance, -distance).sum()


def masked_feature_regression(
    predicted: Tensor, target: Tensor, *, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Squared error of the hidden visual tokens of matched pairs (paper Eq. 9), summed over them; both are (hidden, c).

    No gradient reaches the target: the parser must not chase its own masks. `reduction` is over channels: Eq. 9 prints
    the sum, which is c times the mean.
    """
    error = (at_least_float32(predicted) - at_least_float32(target.detach())).square()
    return (error.mean(dim=-1) if reduction == "mean" else error.sum(dim=-1)).sum()


def masked_visual_modeling(logits: Tensor, codes: Tensor, masked: Tensor) -> Tensor:
    """Negative log likelihood of the code of the hidden tokens (SOHO Eq. 5): a mean for each pair, summed over pairs.

    Of matched pairs: `logits` (text, vision, code), `codes` int64 (text, vision), and `masked`, bool (text, vision),
    True at the hidden tokens, at least one in each pair.
    """
    each = functional.cross_entropy(at_least_float32(logits).transpose(1, 2), codes, reduction="none")
    return ((each * masked).sum(dim=1) / masked.sum(dim=1)).sum()


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision -> float32: sums over many terms lose too much in bfloat16."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
