"""Cost of a model: parameters, multiply-adds and tokens, for its visual side and for the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vpworkbench.model.model import VisualParsingModel, evaluating


class Budget(NamedTuple):
    """Cost of one image with one text: parameters (pre-training heads included), multiply-adds, and tokens.

    Matrix products and convolutions count, as is usual. `visual_*` is the part that makes visual tokens: 0 for given
    features, None for models without a separate visual side.
    """

    visual_parameters: int | None
    parameters: int
    visual_multiply_adds: int | None
    multiply_adds: int
    visual_tokens: int
    words: int

    def __str__(self) -> str:
        parameters, work = f"{short(self.parameters)} parameters", f"{short(self.multiply_adds)} multiply-adds"
        if self.visual_parameters is not None:
            parameters += f" ({short(self.visual_parameters)} of them visual)"
            work += f" ({short(self.visual_multiply_adds)} of them visual)"
        return f"{parameters}, {work} for {self.words} words and {self.visual_tokens} visual tokens"


def budget(model: VisualParsingModel) -> Budget:
    """Cost of one of our models, at its longest text and its largest number of regions; no data is read."""
    visual, device = model.settings.visual, model.device
    if visual.kind.pixels:
        images = torch.zeros(1, 3, visual.image_px, visual.image_px, dtype=torch.uint8, device=device)
    else:
        images = torch.ones(1, visual.regions, visual.region_width + 5, device=device)
    words = torch.zeros(1, model.settings.text_tokens, dtype=torch.int64, device=device)
    return Budget(
        visual_parameters=_parameters(model.visual),
        parameters=_parameters(model),
        visual_multiply_adds=_multiply_adds(model.visual, images),
        multiply_adds=_multiply_adds(model, images, words, torch.ones_like(words, dtype=torch.bool)),
        visual_tokens=visual.tokens,
        words=words.shape[1],
    )


def budget_of(model: nn.Module, forward: Mapping[str, Any], vision: Tensor) -> Budget:
    """Cost of any model for the keyword arguments of its forward, one image and one text; `budget` for ours.

    `vision` is bool (1, token), True at visual tokens.
    """
    if isinstance(model, VisualParsingModel):
        return budget(model)
    work = _multiply_adds(model, **forward)
    return Budget(None, _parameters(model), None, work, int(vision.sum()), int((~vision).sum()))


@torch.no_grad()
def _multiply_adds(model: nn.Module, *inputs: Tensor, **forward: Any) -> int:
    counter = FlopCounterMode(display=False)
    with evaluating(model), counter, sdpa_kernel(SDPBackend.MATH):  # it counts matrix products only
        model(*inputs, **forward)
    return counter.get_total_flops() // 2


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def short(number: float) -> str:
    """Three digits, and a letter for thousands, millions or billions: 1209186 is `1.21 M`."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
