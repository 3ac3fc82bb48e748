"""Plain self-attention over a grid, by timm: ViT, DeiT, DINOv2, and the image towers of CLIP and SigLIP."""

from __future__ import annotations

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vpworkbench.boxes import attention_in, features_in, grid_boxes
from vpworkbench.errors import SettingsError, first_line
from vpworkbench.model.visual import AttentionRecorder, PixelFamily, VisualTokens
from vpworkbench.settings import VisualSettings, nearest


class VitParser(PixelFamily):
    """A Vision Transformer under timm's names; class and register tokens are no visual tokens.

    `visual.merge` pools squares of m x m patches into one token: features are averaged, and so are the rows of the
    attention, whose columns are summed.
    """

    def __init__(self, settings: VisualSettings) -> None:
        network = vision_transformer(settings)
        super().__init__(settings, network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
        self.network, self.width = network, network.num_features
        self._recorder = AttentionRecorder.on_last([block.attn for block in network.blocks])

    def forward(self, images: Tensor) -> VisualTokens:
        """uint8 (image, 3, height, width) -> tokens (image, m, c) and parsing attention (image, head, m, m)."""
        features, weights = self._recorder.of(lambda: self.network.forward_features(self.normalise(images)))
        others = self.network.num_prefix_tokens
        features, weights = features[:, others:], weights[:, :, others:, others:]
        if self.settings.merge == 1:
            return VisualTokens(features, weights / weights.sum(dim=-1, keepdim=True))
        grids = self.network.patch_embed.grid_size, (self.settings.grid, self.settings.grid)
        patches, merged = (grid_boxes(*grid).double().to(images.device) for grid in grids)
        with torch.autocast(images.device.type, enabled=False):  # rounded weights would make other masks
            weights = weights.float() / weights.float().sum(dim=-1, keepdim=True)
            pooled = features_in(merged, features.float(), patches)
            return VisualTokens(pooled, attention_in(merged, weights, patches))


def vision_transformer(settings: VisualSettings) -> VisionTransformer:
    """The Vision Transformer of timm that `visual.vit` names, with random weights, for images of `visual.image_px`.

    A `SettingsError` if timm does not know the name, or the network is another one.
    """
    name, shape = settings.vit, {"num_classes": 0, "global_pool": "", "img_size": settings.image_px}
    try:
        network = timm.create_model(name, pretrained=False, drop_path_rate=settings.drop_path, **shape)
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError) as error:
        reason = first_line(error)
    else:
        patch = settings.vit_patch_px
        if isinstance(network, VisionTransformer) and network.patch_embed.patch_size == (patch, patch):
            return network
        reason = f"it is a {type(network).__name__}"
    hint = "" if timm.is_model(name) else nearest(name, timm.list_models(module="vision_transformer"))
    raise SettingsError(
        f"visual.vit {name!r}: no plain Vision Transformer of timm with square patches ({reason}){hint}; use one such "
        "as vit_small_patch14_dinov2, vit_base_patch16_224, deit_small_patch16_224 or vit_base_patch16_siglip_224"
    )
