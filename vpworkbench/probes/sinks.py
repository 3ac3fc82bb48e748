"""Attention sinks: tokens that most queries attend to, whatever they ask for.

Language models give much attention to a few tokens that mean little, such as the first one (Xiao et al. 2024,
"Efficient Streaming Language Models with Attention Sinks"), vision-language models also to some visual tokens, whatever
the text (Kang et al. 2025, "See What You Are Told: Visual Attention Sink in Large Multimodal Models"). Attention that
ends on a sink counts as flow, and says little about what is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vpworkbench.probes.attention import AttentionCall
from vpworkbench.probes.formula import Modalities
from vpworkbench.probes.layers import Block, LayerChoice, LayerNames
from vpworkbench.probes.layouts import modalities_of


@dataclass(frozen=True)
class Sinks:
    """The sinks of a batch.

    Attributes
    ----------
    by_layer : BoolTensor, shape (example, layer, token)
        The sinks of each layer.
    received : Tensor, shape (example, layer, token)
        Attention that each token receives, as a multiple of what uniform attention would give it: mean over the other
        tokens that may attend to it; nan where there are none.
    sets : Modalities
        The sets V and L that were given.
    layers : tuple of str
        Names of the attention layers.
    """

    by_layer: Tensor
    received: Tensor
    sets: Modalities
    layers: tuple[str, ...]

    @property
    def tokens(self) -> Tensor:
        """Sinks in at least half of the layers, bool (example, token)."""
        return 2 * self.by_layer.sum(dim=1) >= self.by_layer.shape[1]

    @property
    def without(self) -> Modalities:
        """V and L without `tokens`: pass them to `inter_modality_flow` for the flow without sinks."""
        return self.sets._replace(vision=self.sets.vision & ~self.tokens, language=self.sets.language & ~self.tokens)

    @property
    def counts(self) -> dict[str, float]:
        """How many of `tokens` are visual and language tokens, means over examples."""
        kinds = {"vision": self.sets.vision, "language": self.sets.language}
        return {name: float((self.tokens & kind).sum(dim=1).double().mean()) for name, kind in kinds.items()}


def find_sinks(
    model: nn.Module,
    inputs: Mapping[str, Any],
    vision: Tensor,
    tokens: Tensor,
    *,
    language: Tensor | None = None,
    times: float = 5.0,
    layers: LayerNames | None = None,
) -> Sinks:
    """Find the tokens that receive much attention whatever the query of one input, be it a word or a visual token.

    A token is a sink of a layer if more than half of the words, and more than half of the visual tokens, give it at
    least `times` as much attention as uniform attention would. Attention is averaged over heads; that of a token to
    itself does not count. A modality has a say if at least half of its tokens may attend to the token: in a causal
    decoder only few may attend to late tokens. Without a say of either there is no sink. (Gu et al. 2025, "When
    Attention Sink Emerges in Language Models", compare the mean over queries with a threshold.)

    One input cannot show that a token is a sink whatever the text. For visual tokens, pass one image with several
    texts, padded so that the image has the same places in all: `(found.tokens & vision).all(dim=0)`.

    It costs about one eager pass, in bounded memory: no attention map is stored. The other parameters are those of
    `inter_modality_flow`.

    Raises
    ------
    ValueError
        If `times` is not above 1, or where `inter_modality_flow` refuses the model or the tokens.
    """
    if not times > 1:
        raise ValueError(f"times={times}: uniform attention gives every token 1 time its share; a sink receives more")
    sets = modalities_of(model, inputs, vision, tokens, language)
    counter = SinkCounter(sets, LayerChoice(*vision.shape, layers, model), times)
    counter.choice.run(model, inputs, counter)
    by_layer, received = (
        torch.stack([part.to(vision.device) for part in parts], dim=1) for parts in (counter.sinks, counter.received)
    )
    return Sinks(by_layer, received, sets, tuple(counter.choice.names))


class SinkCounter:
    """Handles every attention of one pass: counts, for each key, the queries that give it much attention."""

    def __init__(self, sets: Modalities, choice: LayerChoice, times: float) -> None:
        self.sets, self.choice, self.times = sets, choice, times
        self.sinks: list[Tensor] = []  # per layer: bool (example, token)
        self.received: list[Tensor] = []  # per layer: (example, token)

    def __call__(self, call: AttentionCall) -> Tensor:
        block = self.choice.block(call)
        if block is not None:
            self.sets = Modalities(*(part.to(call.query.device) for part in self.sets))
            if block.is_first:
                # Over the queries of V, L and all: how many may attend to a token, how many give it much, and what they
                # give it.
                shape = len(self.sets.tokens), 3, self.sets.tokens.shape[1]  # example set token
                self._may, self._much, self._given = torch.zeros(3, *shape, device=call.query.device).unbind()
            self._count(call, block)
            if block.is_last:
                self._close_layer()
        return call.output()

    def _count(self, call: AttentionCall, block: Block) -> None:
        places = torch.arange(self.sets.tokens.shape[1], device=call.query.device)
        queries, keys = places[block.queries], places[block.keys]
        sets = torch.stack(self.sets, dim=1)[:, :, block.queries].float()  # example set query
        pairs = call.allowed()
        for some, weights in call.mean_weights():
            allowed = pairs[:, :, some].any(dim=1)  # example some key
            share = weights * allowed.sum(dim=-1, keepdim=True)  # 1 is uniform
            allowed = allowed & (queries[some, None] != keys)
            for counted, values in (
                (self._may, allowed),
                (self._much, allowed & (share >= self.times)),
                (self._given, share.masked_fill(~allowed, 0)),
            ):
                counted[:, :, block.keys] += sets[:, :, some] @ values.to(sets)

    def _close_layer(self) -> None:
        may, much = self._may[:, :2], self._much[:, :2]
        sets = torch.stack([self.sets.vision, self.sets.language], dim=1)
        others = sets.sum(dim=2, keepdim=True) - sets.int()  # no token has a say on itself
        has_say = (may > 0) & (2 * may >= others)
        is_sink = (2 * much > may) | ~has_say
        self.sinks.append(is_sink.all(dim=1) & has_say.any(dim=1) & self.sets.tokens)
        self.received.append((self._given / self._may)[:, 2])
