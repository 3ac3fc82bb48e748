"""Joint embedding and fusion Transformer: words and visual tokens in one BERT (paper Sec. 3.3)."""

from __future__ import annotations

import math

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from vpworkbench.model.visual import VisualTokens
from vpworkbench.settings import FusionSettings


class Fusion(nn.Module):
    """The multi-modal Transformer: `[CLS] words [SEP] padding, visual tokens` through a BERT encoder.

    Parameters
    ----------
    vocabulary : int
        Entries of the tokenizer.
    vision_width : int
        c, channels of the visual tokens.
    grid : int or None
        Tokens on a side. None for regions, which UNITER's embedding places by their boxes: a LayerNorm on the projected
        features, one on the projected box, one on their sum.
    learned_position : bool
        Tokens on a grid get a learned position table (ViLT) instead of the paper's sine.

    Notes
    -----
    `bert` is a transformers `BertModel`: its weights load and save under their published names, and its attention goes
    through the transformers attention interface, where the probes read it.
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
        super().__init__()
        config = transformers.BertConfig(
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
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
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
        self.vision_type = nn.Parameter(torch.zeros(settings.width)) if settings.visual_type else None

    def embed_vision(self, visual: VisualTokens | Tensor, masked: Tensor | None = None) -> Tensor:
        """(example, vision, c) -> (example, vision, d); a learned vector replaces masked tokens first."""
        visual = VisualTokens(visual, None) if isinstance(visual, Tensor) else visual
        features = visual.features
        if masked is not None:
            features = torch.where(masked[..., None], self.mask_token.to(features.dtype), features)
        embedded = self.vision_in(features)
        if visual.boxes is None:
            embedded = embedded + (self.position if visual.positions is None else self.position[visual.positions])
        else:
            embedded = self.feature_norm(embedded) + self.box_norm(self.box_in(box_vector(visual.boxes)))
        if self.vision_type is not None:
            embedded = embedded + self.vision_type
        return self.bert.embeddings.dropout(self.vision_norm(embedded))

    def forward(
        self, words: Tensor, word_tokens: Tensor, vision: Tensor | None = None, vision_tokens: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Hidden states of the joint sequence.

        Parameters
        ----------
        words : int64 Tensor, (example, word)
        word_tokens : bool Tensor, (example, word)
            False at padding.
        vision : Tensor or None, (example, vision, d)
            From `embed_vision`; None for text only.
        vision_tokens : bool Tensor or None, (example, vision)
            False at padding; None if there is none.

        Returns
        -------
        tuple of Tensor, (example, word + vision, d)
            The embedding, then the output of each layer.
        """
        hidden, mask = self._joint_sequence(words, word_tokens, vision, vision_tokens)
        states = [hidden]
        for layer in self.bert.encoder.layer:
            states.append(layer(states[-1], mask))
        return tuple(states)

    def cls_output(
        self, words: Tensor, word_tokens: Tensor, vision: Tensor | None = None, vision_tokens: Tensor | None = None
    ) -> Tensor:
        """The last layer's output at [CLS], (example, d), as in `forward`, for less work.

        The last layer computes one query instead of all: with three layers a fifth of the work is saved.
        """
        hidden, mask = self._joint_sequence(words, word_tokens, vision, vision_tokens)
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

    def _joint_sequence(
        self, words: Tensor, word_tokens: Tensor, vision: Tensor | None, vision_tokens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The embedded sequence and the mask of its padding, as the layers of BERT take them."""
        hidden, tokens = self.bert.embeddings(input_ids=words), word_tokens
        if vision is not None:
            if vision_tokens is None:
                vision_tokens = tokens.new_ones(vision.shape[:2])
            hidden, tokens = torch.cat([hidden, vision], dim=1), torch.cat([tokens, vision_tokens], dim=1)
        config = self.bert.config
        if config._attn_implementation == "sdpa":
            return hidden, tokens[:, None, None]  # transformers first asks if anything is padded: a GPU has to wait
        masks = transformers.masking_utils
        return hidden, masks.create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=tokens)


def sine_position(grid: int, width: int, *, temperature: float = 10_000) -> Tensor:
    """2-D sine position of a square grid, in DETR's form: y in the first half of the channels, x in the second.

    Returns
    -------
    Tensor, (grid * grid, width)
        Places run from 1 to `grid`, normalised to 2 pi; sine on even channels, cosine on odd ones.
    """
    place = torch.arange(1, grid + 1) / (grid + 1e-6) * 2 * math.pi
    half = width // 2
    scale = temperature ** (2 * (torch.arange(half) // 2) / half)
    angle = place[:, None] / scale
    code = torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)  # place channel
    rows, columns = code[:, None].expand(-1, grid, -1), code[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def box_vector(boxes: Tensor) -> Tensor:
    """UNITER's seven numbers of a box: (..., 4) x0 y0 x1 y1 -> (..., 7), with width, height and area added.

    All are shares of the image.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    return torch.cat([boxes, size, size.prod(dim=-1, keepdim=True)], dim=-1)
