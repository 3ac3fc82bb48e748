"""Joint embedding and fusion Transformer: words and visual tokens in one BERT (paper Sec. 3.3)."""

from __future__ import annotations

import math
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vpworkbench.model.visual import VisualTokens
from vpworkbench.settings import FusionSettings


class Fusion(nn.Module):
    """The multi-modal Transformer: `[CLS] words [SEP] padding, visual tokens` through a BERT encoder.

    `bert` is a transformers `BertModel`: its weights have their published names, and the probes read its attention
    through the interface of transformers. `vocabulary` is the number of entries of the tokenizer, `vision_width` is c,
    the channels of the visual tokens, and `grid` their number on a side; None for regions, which UNITER's embedding
    places by their boxes: a LayerNorm on the projected features, one on the projected box, one on their sum. With
    `learned_position` tokens on a grid get a learned position table (ViLT) instead of the paper's sine.
    """

    def __init__(
        self,
        settings: FusionSettings,
        *,
        vocabulary: int,
        vision_width: int,
        grid: int | None,
        learned_position: bool = False,
    ) -> None:
        from transformers import BertConfig, BertModel  # takes a second: only where a model is built

        super().__init__()
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            intermediate_size=settings.feed_forward,
            hidden_dropout_prob=settings.dropout,
            attention_probs_dropout_prob=settings.dropout,
            max_position_embeddings=settings.positions,
            attn_implementation="sdpa",
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.mask_token = nn.Parameter(torch.empty(vision_width).normal_(std=0.02))
        self.vision_in = nn.Linear(vision_width, settings.width)
        self.vision_norm = nn.LayerNorm(settings.width, eps=config.layer_norm_eps)
        if grid is None:
            self.feature_norm = nn.LayerNorm(settings.width, eps=config.layer_norm_eps)
            self.box_in = nn.Linear(7, settings.width)
            self.box_norm = nn.LayerNorm(settings.width, eps=config.layer_norm_eps)
        elif learned_position:
            self.position = nn.Parameter(torch.empty(grid**2, settings.width).normal_(std=0.02))
        else:
            self.register_buffer("position", sine_position(grid, settings.width), persistent=False)
        self.whole_image = nn.Linear(settings.width, settings.width) if settings.whole_image else None
        self.vision_type = nn.Parameter(torch.zeros(settings.width)) if settings.visual_type else None

    @property
    def text_stream(self) -> nn.Module:
        """What a BERT can start, under BERT's names."""
        return self.bert

    def embed_vision(self, visual: VisualTokens, masked: Tensor | None = None) -> Tensor:
        """(example, vision, c) -> (example, vision, d); a learned vector replaces masked tokens first."""
        features = visual.features.to(self.mask_token.dtype)  # a model in half precision may get float32 ones
        if masked is not None:
            features = torch.where(masked[..., None], self.mask_token, features)
        embedded = self.vision_in(features)
        if visual.boxes is None:
            embedded = embedded + (self.position if visual.positions is None else self.position[visual.positions])
        else:
            embedded = self.feature_norm(embedded) + self.box_norm(self.box_in(box_vector(visual.boxes).to(features)))
        if self.vision_type is not None:
            embedded = embedded + self.vision_type
        return self.bert.embeddings.dropout(self.vision_norm(embedded))

    def forward(
        self,
        words: Tensor,
        word_tokens: Tensor,
        vision: Tensor | None = None,
        vision_tokens: Tensor | None = None,
        causal: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The embedding of the joint sequence and the output of each layer, (example, word + vision, d).

        Parameters
        ----------
        words, word_tokens : int64 and bool Tensor, (example, word)
            Token ids; False at padding.
        vision : Tensor or None, (example, vision, d)
            From `embed_vision`; None for text only.
        vision_tokens : bool Tensor or None, (example, vision)
            False at padding; None if there is none.
        causal : bool Tensor or None, (example,)
            Examples with `seq2seq_mask`.
        """
        hidden, tokens = self._embedded(words, word_tokens, vision, vision_tokens)
        mask = self._mask(hidden, tokens) if causal is None else seq2seq_mask(tokens, words.shape[1], causal)
        states = [hidden]
        for layer in self.bert.encoder.layer:
            states.append(layer(states[-1], mask))
        return tuple(states)

    def cls_output(
        self, words: Tensor, word_tokens: Tensor, vision: Tensor | None = None, vision_tokens: Tensor | None = None
    ) -> Tensor:
        """The last layer's output at [CLS], (example, d): `forward` with one query in the last layer.

        With three layers it saves a fifth of the work.
        """
        hidden, tokens = self._embedded(words, word_tokens, vision, vision_tokens)
        mask = self._mask(hidden, tokens)
        *layers, last = self.bert.encoder.layer
        for layer in layers:
            hidden = layer(hidden, mask)
        attention = last.attention.self
        # Two slices of `hidden`, not one: a shared slice would sum its gradients in another order.
        query, key, value = (
            states.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
            for states in (attention.query(hidden[:, :1]), attention.key(hidden), attention.value(hidden))
        )
        mask = None if mask is None else mask[:, :, :1]
        dropout = attention.dropout.p if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        attended = last.attention.output(mixed.transpose(1, 2).flatten(2), hidden[:, :1])
        return last.feed_forward_chunk(attended)[:, 0]

    def _embedded(
        self, words: Tensor, word_tokens: Tensor, vision: Tensor | None, vision_tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The embedded sequence, (example, word + vision, d), and where it is real, bool (example, word + vision)."""
        embed = self.bert.embeddings
        if vision is None:
            return embed(input_ids=words), word_tokens
        if vision_tokens is None:
            vision_tokens = word_tokens.new_ones(vision.shape[:2])
        if self.whole_image is None:
            hidden = embed(input_ids=words)
        else:  # where tokens are hidden, the mean holds their mask vector: nothing leaks
            shares = vision_tokens[..., None] / vision_tokens.sum(dim=1)[:, None, None]
            image = self.whole_image((vision * shares.to(vision)).sum(dim=1, keepdim=True))
            hidden = embed(inputs_embeds=embed.word_embeddings(words) + image)
        return torch.cat([hidden, vision], dim=1), torch.cat([word_tokens, vision_tokens], dim=1)

    def _mask(self, hidden: Tensor, tokens: Tensor) -> Tensor | None:
        """The mask of padding as the layers of BERT take it."""
        if self.bert.config._attn_implementation == "sdpa":
            return tokens[:, None, None]  # transformers first asks if anything is padded: a GPU has to wait
        from transformers.masking_utils import create_bidirectional_mask

        return create_bidirectional_mask(self.bert.config, inputs_embeds=hidden, attention_mask=tokens)


FUSIONS = {"joint": "vpworkbench.model.fusion:Fusion", "two-stream": "vpworkbench.model.two_streams:TwoStreams"}
"""Setting `fusion.kind` -> its class, imported when a model is built."""


def build_fusion(settings: FusionSettings, **shape: Any) -> Fusion:
    """The fusion with random weights; `shape` as `Fusion` takes it."""
    return resolve_name(FUSIONS[settings.kind])(settings, **shape)


def seq2seq_mask(tokens: Tensor, words: int, causal: Tensor) -> Tensor:
    """Who may attend to whom where an image is turned into words (UniLM, Unified VLP); bool (example, 1, query, key).

    [CLS] and the visual tokens see each other; each other word sees them, itself and the words before it. `tokens`,
    bool (example, word + vision), is False at padding; the first `words` positions are words; where `causal`, bool
    (example,), is False, an example has no such mask.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    written = (place > 0) & (place < words)
    sees = ~written | (written[:, None] & (place <= place[:, None]))
    return ((sees | ~causal[:, None, None]) & tokens[:, None])[:, None]


def sine_position(grid: int, width: int) -> Tensor:
    """2-D sine position of a square grid, (grid * grid, width), in DETR's form.

    y in the first half of the channels, x in the second; sine on even channels, cosine on odd ones. Places run from 1
    to `grid`, normalised to 2 pi.
    """
    place = torch.arange(1, grid + 1) / (grid + 1e-6) * 2 * math.pi
    half = width // 2
    scale = 10_000 ** (2 * (torch.arange(half) // 2) / half)
    angle = place[:, None] / scale
    code = torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)  # place channel
    rows, columns = code[:, None].expand(-1, grid, -1), code[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def box_vector(boxes: Tensor) -> Tensor:
    """UNITER's numbers of a box, shares of the image: x0 y0 x1 y1 (..., 4), and width, height and area -> (..., 7)."""
    size = boxes[..., 2:] - boxes[..., :2]
    return torch.cat([boxes, size, size.prod(dim=-1, keepdim=True)], dim=-1)
