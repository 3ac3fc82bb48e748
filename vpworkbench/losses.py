"""Masks of visual tokens and the losses MLM, ITM, VLA, MFR and MVM: small pure functions (paper Sec. 3.3).

A loss is a sum; the engine divides it once by the count of the whole optimiser step, so that accumulation changes
nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional


class Objective(ABC):
    """What a model is trained for: losses of a batch as sums, and the counts that make means of them.

    Attributes
    ----------
    weights : mapping of str to float
        Weight of each loss in the total.
    """

    weights: Mapping[str, float]

    @abstractmethod
    def counts(self, batch: Any) -> dict[str, int]:
        """Number of items that each loss is a mean over; `batch` is that of a whole optimiser step."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Sum of each loss over a micro-batch."""

    def watch(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """Further numbers for each line of metrics."""
        return {}

    def probe(self, model: nn.Module) -> dict[str, float]:
        """Held-out numbers, logged every `train.probe_every` steps; `held_out_loss` decides which weights are best."""
        return {}


def visual_mask(
    noise: Tensor,
    budget: int,
    *,
    parsing: Tensor | None = None,
    select: Literal["row", "column", "symmetric"] = "row",
    vision_tokens: Tensor | None = None,
) -> Tensor:
    """Hide one picked visual token and those that depend on it (paper Eq. 9, Fig. 2).

    Parameters
    ----------
    noise : Tensor, (text, vision)
        Uniform numbers; the largest marks the pick.
    budget : int
        k, tokens to hide, the pick included.
    parsing : Tensor or None, (text, vision, vision)
        Parsing attention W, rows summing to 1. None: the others are drawn at random.
    select
        Rank by A[pick, :], by A[:, pick] or by their sum, where A = 0.5 (I + W) as in Eq. 3. In a row of A the pick
        comes first by itself (A_ii >= 0.5); in a column it is put first.
    vision_tokens : bool Tensor or None, (text, vision)
        The real tokens of images with fewer than others; None where all are real.

    Returns
    -------
    bool Tensor, (text, vision)
        Exactly k True in each row; with `vision_tokens` that share of the real tokens, rounded, at least one.

    Raises
    ------
    ValueError
        If k exceeds the number of tokens.
    """
    tokens = noise.shape[1]
    if not 1 <= budget <= tokens:
        raise ValueError(f"a mask of {budget} among {tokens} visual tokens; set mask.budget to at most {tokens}")
    rank = noise
    if vision_tokens is not None:
        rank = noise = noise.masked_fill(~vision_tokens, -1)
    if parsing is not None:
        pick = noise.argmax(dim=1)
        rows = torch.arange(len(noise), device=noise.device)
        attends, attended = parsing[rows, pick], parsing[rows, :, pick]
        rank = {"row": attends, "column": attended, "symmetric": attends + attended}[select].clone()
        rank[rows, pick] = torch.inf
    hidden = torch.ones_like(noise[:, :budget], dtype=torch.bool)
    if vision_tokens is not None:
        allowed = (vision_tokens.sum(dim=1, keepdim=True) * budget / tokens).round().clamp(min=1)
        hidden = torch.arange(budget, device=noise.device) < allowed
    masked = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, rank.topk(budget, dim=1).indices, hidden)
    return masked if vision_tokens is None else masked & vision_tokens


def code_mask(noise: Tensor, codes: Tensor) -> Tensor:
    """Hide all tokens that became one code (SOHO Sec. 3.3): a hidden token cannot be copied from one like it.

    Parameters
    ----------
    noise : Tensor, (text, vision)
        Uniform numbers; of the first token of each code the largest marks the pick, so each code of an image is picked
        as often as the others.
    codes : int64 Tensor, (text, vision)

    Returns
    -------
    bool Tensor, (text, vision)
    """
    same = codes[:, :, None] == codes[:, None, :]
    first = ~same.tril(diagonal=-1).any(dim=2)
    picked = noise.masked_fill(~first, -1).argmax(dim=1, keepdim=True)
    return codes == codes.gather(1, picked)


def hide_pixels(images: Tensor, masked: Tensor) -> Tensor:
    """Paint the squares of hidden visual tokens mid-grey, so that no neighbour has seen them.

    Parameters
    ----------
    images : uint8 Tensor, (image, 3, height, width)
    masked : bool Tensor, (image, vision)
        A square grid of tokens, row by row.
    """
    side = round(masked.shape[1] ** 0.5)
    squares = masked.view(-1, 1, side, side)
    pixels = images.shape[-1] // side
    return images.masked_fill(squares.repeat_interleave(pixels, -1).repeat_interleave(pixels, -2), 128)


def masked_language_modeling(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log likelihood of the hidden words (paper Eq. 7).

    Parameters
    ----------
    logits : Tensor, (word, vocabulary)
        At the hidden places of matched pairs.
    labels : int64 Tensor, (word,)
    """
    return functional.cross_entropy(_wide(logits), labels, reduction="sum")


def image_text_matching(logits: Tensor, matched: Tensor) -> Tensor:
    """Negative log likelihood of match or not (paper Eq. 8); logits (text, 2), matched bool (text,)."""
    return functional.cross_entropy(_wide(logits), matched.long(), reduction="sum")


def cosine_cost(text: Tensor, vision: Tensor) -> Tensor:
    """1 - cosine of every word and visual token; (text, word, d), (text, vision, d) -> (text, word, vision)."""
    text, vision = functional.normalize(_wide(text), dim=-1), functional.normalize(_wide(vision), dim=-1)
    return 1 - text @ vision.transpose(1, 2)


@torch.no_grad()
def transport_plan(cost: Tensor, words: Tensor, vision: Tensor, *, beta: float = 0.5, iterations: int = 50) -> Tensor:
    """Plan of optimal transport by the inexact proximal point method (IPOT, Xie et al. 2020, paper ref. 42).

    Parameters
    ----------
    cost : Tensor, (example, word, vision)
    words, vision : bool Tensor, (example, word), (example, vision)
        The places that take part; each set has uniform mass 1.
    beta : float
        Proximal step; each of the `iterations` solves its problem by one Sinkhorn step.

    Returns
    -------
    Tensor, (example, word, vision)
        Zero at places that take no part; all zero where a set is empty.
    """
    both = words[:, :, None] & vision[:, None, :]
    kernel = torch.where(both, (-cost / beta).exp(), 0)
    count_words = words.sum(dim=1, keepdim=True).clamp(min=1).to(cost)
    count_vision = vision.sum(dim=1, keepdim=True).clamp(min=1).to(cost)
    plan = both.to(cost)
    right = vision / count_vision
    tiny = torch.finfo(cost.dtype).tiny
    for _ in range(iterations):
        step = kernel * plan
        left = words / (count_words * torch.bmm(step, right[..., None])[..., 0]).clamp(min=tiny)
        right = vision / (count_vision * torch.bmm(left[:, None], step)[:, 0]).clamp(min=tiny)
        plan = left[..., None] * step * right[:, None, :]
    return plan


def transport_distance(text: Tensor, vision: Tensor, words: Tensor, seen: Tensor) -> Tensor:
    """OT distance between the words and the visual tokens of each pair; the gradient goes through the cost only.

    Parameters
    ----------
    text, vision : Tensor, (example, word, d), (example, vision, d)
    words, seen : bool Tensor, (example, word), (example, vision)
        The places that take part: no [CLS], [SEP] or pads.

    Returns
    -------
    Tensor, (example,), in [0, 2]
    """
    cost = cosine_cost(text, vision)
    return (transport_plan(cost.detach(), words, seen) * cost).sum(dim=(1, 2))


def token_alignment(distance: Tensor, matched: Tensor) -> Tensor:
    """VLA: matched pairs near, unmatched far: sum over matched - sum over unmatched (Sec. 3.3)."""
    return torch.where(matched, distance, -distance).sum()


def masked_feature_regression(
    predicted: Tensor, target: Tensor, *, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """Squared error of the hidden visual tokens (paper Eq. 9), summed over them.

    Parameters
    ----------
    predicted, target : Tensor, (hidden, c)
        At the hidden tokens of matched pairs. No gradient reaches the target: the parser must not chase its masks.
    reduction
        Over channels; Eq. 9 prints the sum, c times the default.
    """
    error = (_wide(predicted) - _wide(target.detach())).square()
    return (error.mean(dim=-1) if reduction == "mean" else error.sum(dim=-1)).sum()


def masked_visual_modeling(logits: Tensor, codes: Tensor, masked: Tensor) -> Tensor:
    """Negative log likelihood of the code of the hidden tokens (SOHO Eq. 5), a mean for each pair, summed over pairs.

    Parameters
    ----------
    logits : Tensor, (text, vision, code)
        Of matched pairs.
    codes : int64 Tensor, (text, vision)
    masked : bool Tensor, (text, vision)
        The hidden tokens, at least one of each pair; all of one code.
    """
    each = functional.cross_entropy(_wide(logits).transpose(1, 2), codes, reduction="none")
    return ((each * masked).sum(dim=1) / masked.sum(dim=1)).sum()


def _wide(values: Tensor) -> Tensor:
    """At least float32: sums over many terms lose too much in bfloat16."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
