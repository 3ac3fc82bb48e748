"""Flow of attention weighted by its gradient (Chefer et al., ICCV 2021): only attention that serves a decision counts.

The maps themselves and their gradients are needed, so this holds layer x head x token^2 numbers at once, unlike
`inter_modality_flow`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vpworkbench.probes.capture import AttentionCall, attention_handled, run_model
from vpworkbench.probes.formula import crossing_share
from vpworkbench.probes.layers import LayerChoice, LayerNames, Place, streams_of
from vpworkbench.probes.modality import both_modalities


def gradient_weighted_flow(
    model: nn.Module,
    inputs: Mapping[str, Any],
    vision: Tensor,
    tokens: Tensor,
    target: Callable[[Any], Tensor],
    *,
    language: Tensor | None = None,
    layers: LayerNames | None = None,
) -> Tensor:
    """Share of relevance that crosses the modalities, for every span of layers.

    In the place of the mean over heads of W, Eq. 3 gets the mean of relu(W * dy/dW), and nothing is halved, as in
    Chefer et al.'s Eq. 5-6: R = (I + mean relu(W * dy/dW)) R. Eq. 5 is taken of R.

    Parameters
    ----------
    target : callable
        From the model's output to y: the score that is explained, e.g. `lambda out: out.logits[:, 1]`; shape
        (example,) or a scalar. Examples must not depend on each other.
    model, inputs, vision, tokens, language, layers
        As of `inter_modality_flow`.

    Returns
    -------
    Tensor, shape (example, layer, layer)
        In [0, 1], [b, i, j] from the input of layer i to the output of layer j; nan where j < i.

    Raises
    ------
    ValueError
        As `inter_modality_flow`; and if y does not depend on the attention.
    """
    sets = both_modalities(vision, tokens, language)
    choice = LayerChoice(*sets.vision.shape, layers, streams_of(model))
    maps: list[tuple[Tensor, Place]] = []

    def explicit(call: AttentionCall) -> Tensor:
        place = choice.place(call)
        if place is None:
            return call.output()
        weights = call.weights()
        weights = weights + torch.zeros_like(weights, requires_grad=True)  # also where all parameters are frozen
        maps.append((weights, place))
        value = call.value.repeat_interleave(weights.shape[1] // call.value.shape[1], dim=1)
        return (weights.to(value) @ value).transpose(1, 2)

    with attention_handled(model, explicit, gradients=True):
        score = target(run_model(model, inputs))
        choice.close(model, inputs)
        if not score.requires_grad:
            raise ValueError("target does not depend on the model's attention: return a score computed from the output")
        gradients = torch.autograd.grad(score.sum(), [weights for weights, _ in maps], allow_unused=True)
    products: list[Tensor] = []  # R of each start, example query key
    shares: list[Tensor] = []
    for (weights, place), gradient in zip(maps, gradients, strict=True):
        if place.opens:
            identity = torch.eye(sets.vision.shape[1], dtype=torch.float64, device=weights.device)
            layer = identity.repeat(len(weights), 1, 1)
        if gradient is not None:
            relevance = (weights.detach() * gradient).clamp(min=0).mean(dim=1)
            layer[:, place.queries, place.keys] += relevance.double()
        if place.closes:
            products = [layer @ product for product in products] + [layer]
            shares.append(torch.stack([_shares(product, sets.vision, sets.language) for product in products], dim=1))
    flow = shares[0].new_full((len(vision), len(shares), len(shares)), torch.nan)
    for stop, starts in enumerate(shares):
        flow[:, : stop + 1, stop] = starts
    return flow


def _shares(product: Tensor, vision: Tensor, language: Tensor) -> Tensor:
    return torch.stack([crossing_share(*one) for one in zip(product, vision, language, strict=True)])
