"""The Swin visual parser (paper Sec. 3.1): timm's Swin Transformer, and the attention of its last block."""

from __future__ import annotations

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, window_partition
from torch import Tensor
from torch.nn import functional

from vpworkbench.model.visual import AttentionRecorder, PixelFamily, VisualTokens
from vpworkbench.settings import VisualSettings


class SwinParser(PixelFamily):
    """The visual parser: a Swin Transformer under timm's names, so that published checkpoints load."""

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
        blocks = [module for module in self.modules() if isinstance(module, SwinTransformerBlock)]
        last, self._recorder = blocks[-1], AttentionRecorder.on_last([block.attn for block in blocks])
        self.single_window = last.window_size == last.input_resolution and not any(last.shift_size)
        self.register_buffer("places", window_places(last), persistent=False)

    def forward(self, images: Tensor) -> VisualTokens:
        """uint8 (image, 3, height, width) -> tokens (image, m, c) and parsing attention (image, head, m, m)."""
        features, weights = self._recorder.of(lambda: self.network.forward_features(self.normalise(images)))
        features = features.flatten(1, 2)
        if self.single_window:
            return VisualTokens(features, weights)
        return VisualTokens(features, scatter_windows(weights, self.places, features.shape[1]))


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
