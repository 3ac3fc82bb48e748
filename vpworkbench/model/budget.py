"""What a model costs: parameters, multiply-adds and tokens, of its visual side and of the whole.

A comparison of models says little without it: it stands beside each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vpworkbench.model.model import VisualParsingModel


class Budget(NamedTuple):
    """Of one image with one text; products of matrices and convolutions are counted, as elsewhere.

    Attributes
    ----------
    visual_parameters, visual_multiply_adds : int or None
        Of what makes visual tokens of an image: none where its features are given, None where a model's visual side
        does not stand apart.
    parameters, multiply_adds : int
        Of the whole, heads for pre-training included in the parameters.
    visual_tokens, words : int
        Places of each in the joint sequence.
    """

    visual_parameters: int | None
    parameters: int
    visual_multiply_adds: int | None
    multiply_adds: int
    visual_tokens: int | None
    words: int

    def __str__(self) -> str:
        side = "" if self.visual_parameters is None else f"{short(self.visual_parameters)} of them visual"
        work = "" if self.visual_multiply_adds is None else f"{short(self.visual_multiply_adds)} of them visual"
        tokens = f"{self.words} words" + (f" and {self.visual_tokens} visual tokens" if self.visual_tokens else "")
        return (
            f"{short(self.parameters)} parameters{f' ({side})' * bool(side)}, {short(self.multiply_adds)} "
            f"multiply-adds{f' ({work})' * bool(work)} for {tokens}"
        )


def budget(model: VisualParsingModel) -> Budget:
    """Of a model of ours with a text and as many regions as it takes; nothing is read."""
    visual, device = model.settings.visual, model.device
    if visual.kind.pixels:
        images = torch.zeros(1, 3, visual.image_px, visual.image_px, dtype=torch.uint8, device=device)
    else:
        images = torch.ones(1, visual.regions, visual.region_width + 5, device=device)
    words = torch.zeros(1, model.settings.text_tokens, dtype=torch.int64, device=device)
    forward = {"images": images, "words": words, "word_tokens": torch.ones_like(words, dtype=torch.bool)}
    return _measured(model, forward, model.visual, visual.tokens, words.shape[1])


def budget_of(model: nn.Module, forward: Mapping[str, Any], vision: Tensor) -> Budget:
    """Of any model with inputs of its own; a model of ours by its largest ones, to which it pads all others.

    Parameters
    ----------
    forward : mapping
        Keyword arguments of its forward, for one image and one text.
    vision : bool Tensor, (1, token)
        The visual places.
    """
    if isinstance(model, VisualParsingModel):
        return budget(model)
    return _measured(model, forward, None, int(vision.sum()), int((~vision).sum()))


@torch.no_grad()
def _measured(
    model: nn.Module, forward: Mapping[str, Any], visual: nn.Module | None, visual_tokens: int, words: int
) -> Budget:
    training = model.training
    model.eval()
    parts = (lambda: model(**forward), (lambda: visual(forward["images"])) if visual is not None else None)
    whole, side = (None if part is None else _multiply_adds(part) for part in parts)
    model.train(training)
    return Budget(
        visual_parameters=None if visual is None else _parameters(visual),
        parameters=_parameters(model),
        visual_multiply_adds=side,
        multiply_adds=whole,
        visual_tokens=visual_tokens,
        words=words,
    )


def _multiply_adds(call: Any) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts products alone
        call()
    return counter.get_total_flops() // 2


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def short(number: float) -> str:
    """Three digits, and a letter for thousands, millions or billions: 1209186 is `1.21 M`."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
