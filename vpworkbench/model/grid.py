"""Grid features of a CNN (paper Table 5: R50, R101; Pixel-BERT), and SOHO's codes of them."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vpworkbench.errors import SettingsError
from vpworkbench.model.dictionary import Dictionary
from vpworkbench.model.visual import PixelFamily, VisualTokens
from vpworkbench.settings import VisualSettings, nearest


class GridFeatures(PixelFamily):
    """The last feature map of a timm CNN, one token per place; a visual dictionary may replace tokens by codes."""

    def __init__(self, settings: VisualSettings) -> None:
        network, width = grid_cnn(settings.backbone, settings.stride)
        super().__init__(settings, network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
        self.network, self.width = network, width
        self.dictionary = Dictionary(settings.dictionary, self.width) if settings.dictionary else None

    def train(self, mode: bool = True) -> GridFeatures:
        """With `frozen_norm` (set wherever trained weights are loaded) batch norm keeps its statistics, as in DETR.

        From scratch it has to follow its batches, and then gradient accumulation is not exact.
        """
        super().train(mode)
        if self.settings.frozen_norm:
            for norm in (module for module in self.modules() if isinstance(module, _BatchNorm)):
                norm.eval()
        return self

    def forward(self, images: Tensor) -> VisualTokens:
        """uint8 (image, 3, height, width) -> tokens (image, vision, channel)."""
        features = self.network(self.normalise(images)).flatten(2).transpose(1, 2)
        if self.dictionary is None:
            return VisualTokens(features)
        features, codes = self.dictionary(features)
        return VisualTokens(features, codes=codes)


def grid_cnn(backbone: str, stride: int) -> tuple[nn.Module, int]:
    """A timm CNN with random weights whose last map has one place every `stride` pixels, and its channels.

    A `SettingsError` if timm does not know the name, or the network makes no such map.
    """
    options = {} if stride == 32 else {"output_stride": stride}
    try:
        network = timm.create_model(backbone, pretrained=False, num_classes=0, global_pool="", **options)
        with torch.no_grad():
            _, width, *places = network.eval()(torch.zeros(1, 3, 2 * stride, 2 * stride)).shape
        if places != [2, 2]:
            raise ValueError(f"{2 * stride} x {2 * stride} px give a map of {places} places, not of 2 x 2")
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError) as error:
        hint = "" if timm.is_model(backbone) else nearest(backbone, timm.list_models())
        raise SettingsError(
            f"visual.backbone {backbone!r}, visual.stride {stride}: timm makes no grid of features with it "
            f"({str(error) or 'it has no such stride'}){hint}; use a CNN with `output_stride` 8, 16 or 32, such as "
            "resnet50, efficientnet_b0 or convnext_tiny; other networks work only at stride 32"
        ) from None
    return network.train(), width
