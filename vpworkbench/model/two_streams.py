"""Two-stream fusion (ViLBERT): words and visual tokens keep a stream each, which meet in co-attention layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.lxmert.modeling_lxmert import LxmertXLayer

from vpworkbench.model.fusion import Fusion
from vpworkbench.settings import FusionSettings


class CoAttention(LxmertXLayer):
    """LXMERT's cross-modality layer on one joint state, so that the probes find a state of each layer.

    Words attend to visual tokens and visual tokens to words, both by the same weights; then each stream to itself.
    """

    def forward(self, hidden: Tensor, words: int, mask: Tensor) -> Tensor:
        """(example, word + vision, d) -> the same; `mask` is added to scores, (example, 1, 1, word + vision)."""
        lengths = words, hidden.shape[1] - words
        (language, image), (word_mask, image_mask) = hidden.split(lengths, dim=1), mask.split(lengths, dim=3)
        return torch.cat(super().forward(language, word_mask, image, image_mask), dim=1)


class TwoStreams(Fusion):
    """The first half of the layers are BERT's, on words only, as in ViLBERT; in the others the streams meet.

    A word passes as many feed-forward layers as in the joint fusion. The states are those of the layers that meet.
    """

    def __init__(self, settings: FusionSettings, **shape: Any) -> None:
        super().__init__(settings, **shape)
        self.recomputes = False
        layers, words_only = self.bert.encoder.layer, settings.layers // 2
        self.bert.encoder.layer = layers[:words_only]
        self.meeting = nn.ModuleList(CoAttention(self.bert.config) for _ in layers[words_only:])
        self.meeting.apply(self.bert._init_weights)

    def set_grad_checkpointing(self, on: bool) -> None:
        """Recompute activations in the backward pass; the training calls it by the name that timm's networks have."""
        self.recomputes = on

    @property
    def text_stream(self) -> nn.Module:
        stream = nn.Module()
        stream.embeddings, stream.encoder = self.bert.embeddings, nn.Module()
        meeting = (
            nn.ModuleDict({"attention": one.lang_self_att, "intermediate": one.lang_inter, "output": one.lang_output})
            for one in self.meeting
        )
        stream.encoder.layer = nn.ModuleList([*self.bert.encoder.layer, *meeting])
        return stream

    def forward(
        self, words: Tensor, word_tokens: Tensor, vision: Tensor | None = None, vision_tokens: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        joint, tokens = self._embedded(words, word_tokens, vision, vision_tokens)
        language, image = joint.split((words.shape[1], joint.shape[1] - words.shape[1]), dim=1)
        mask = self._mask(language, word_tokens)
        for layer in self.bert.encoder.layer:
            language = layer(language, mask)
        states = [torch.cat([language, image], dim=1)]
        added = torch.zeros_like(tokens, dtype=joint.dtype).masked_fill(~tokens, torch.finfo(joint.dtype).min)
        for layer in self.meeting:
            given = states[-1], words.shape[1], added[:, None, None]
            states.append(checkpoint(layer, *given, use_reentrant=False) if self.recomputes else layer(*given))
        return tuple(states)

    def cls_output(self, *given: Tensor | None) -> Tensor:
        return self(*given)[-1][:, 0]
