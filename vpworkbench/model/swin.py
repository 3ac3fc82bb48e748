"""The Swin visual parser (paper Sec. 3.1): timm's Swin Transformer, and the attention of its last block."""

from __future__ import annotations

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, window_partition
from torch import Tensor, nn
from torch.nn import functional

from vpworkbench.model.visual import PixelFamily, VisualTokens
from vpworkbench.settings import VisualSettings


class SwinParser(PixelFamily):
    """The visual parser: a Swin Transformer under timm's names, so that published checkpoints load.

    Only the last block computes explicit attention weights; the others use fused attention.
    """

    def __init__(self, settings: VisualSettings) -> None:
        super().__init__(settings, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        self.network = SwinTransformer(
            img_size=settings.image_px,
            patch_size=settings.patch_px,
            embed_dim=settings.width,
            depths=settings.depths,
            num_heads=settings.heads,
            window_size=settings.window,
            drop_path_rate=settings.drop_path,
            num_classes=0,
            global_pool="",
        )
        self.width = self.network.num_features
        *others, last = [module for module in self.modules() if isinstance(module, SwinTransformerBlock)]
        for block in others:
            block.attn.fused_attn = True
        last.attn.fused_attn = False
        self._softmax = last.attn.softmax = _RecordingSoftmax(dim=-1)
        self.single_window = last.window_size == last.input_resolution and not any(last.shift_size)
        self.register_buffer("places", window_places(last), persistent=False)

    def forward(self, images: Tensor) -> VisualTokens:
        """uint8 (image, 3, height, width) -> tokens (image, m, c) and parsing attention (image, head, m, m)."""
        try:
            features = self.network.forward_features(self.normalise(images)).flatten(1, 2)
        finally:  # keep no weights between passes, not even after an error
            weights, self._softmax.weights = self._softmax.weights, None
        if self.single_window:
            return VisualTokens(features, weights)
        return VisualTokens(features, scatter_windows(weights, self.places, features.shape[1]))


class _RecordingSoftmax(nn.Softmax):
    weights: Tensor | None = None  # its last output

    def forward(self, scores: Tensor) -> Tensor:
        self.weights = super().forward(scores)
        return self.weights


def window_places(block: SwinTransformerBlock) -> Tensor:
    """The token at each place of each window of a Swin block; int64 (window, place), m at padding.

    The block rolls its grid by the shift, pads it to whole windows (12 x 12 to 14 x 14 for windows of 7) and cuts.
    """
    height, width = block.input_resolution
    (window_h, window_w), (shift_h, shift_w) = block.window_size, block.shift_size
    grid = torch.arange(height * width).view(1, height, width, 1).roll((-shift_h, -shift_w), dims=(1, 2))
    padding = (0, 0, 0, -width % window_w, 0, -height % window_h)
    padded = functional.pad(grid, padding, value=height * width)
    return window_partition(padded, block.window_size).flatten(1)


def scatter_windows(weights: Tensor, places: Tensor, tokens: int) -> Tensor:
    """Attention inside windows, (image * window, head, place, place) -> between tokens, (image, head, vision, vision).

    It is zero outside a token's window; padding is dropped, and rows are renormalised to sum 1. `places` come from
    `window_places`; `tokens` is m.
    """
    weights = weights.unflatten(0, (-1, len(places))).transpose(1, 2)  # image head window place place
    joint = weights.new_zeros(*weights.shape[:2], tokens + 1, tokens + 1)
    joint[:, :, places[:, :, None], places[:, None, :]] = weights
    joint = joint[:, :, :tokens, :tokens]
    return joint / joint.sum(dim=-1, keepdim=True)
