"""Image -> visual tokens: the Swin visual parser, grid CNN, patch projection and regions behind one interface.

Every family is a module that maps uint8 images (or regions) to `VisualTokens`; `config.families.FAMILIES` is the whole
registry. The networks are timm's own and keep timm's names, so that published checkpoints load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, window_partition
from torch import Tensor, nn
from torch.nn import functional

from vpworkbench.errors import SettingsError
from vpworkbench.model.dictionary import Dictionary
from vpworkbench.settings import VisualSettings, nearest


class VisualTokens(NamedTuple):
    """What every visual family gives.

    Attributes
    ----------
    features : Tensor, (image, vision, channel)
        V of paper Eq. 1; on a whole grid token i = row * grid + column.
    parsing : Tensor or None, (image, head, vision, vision)
        Attention of the parser's last block, rows summing to 1; None for families without one.
    tokens : bool Tensor or None, (image, vision)
        The real places, padding excluded; None where all are.
    boxes : Tensor or None, (image, vision, 4)
        x0 y0 x1 y1 of regions as shares of the image; None for tokens on a grid.
    codes : int64 Tensor or None, (image, vision)
        Which code of the visual dictionary each token became; None without one.
    places : int64 Tensor or None, (image, vision)
        Of tokens on a grid, where some are left out: row * grid + column of the others.
    """

    features: Tensor
    parsing: Tensor | None
    tokens: Tensor | None = None
    boxes: Tensor | None = None
    codes: Tensor | None = None
    places: Tensor | None = None

    def of(self, image_index: Tensor | None) -> VisualTokens:
        """The tokens of some images, repeated as asked; without the parsing attention."""
        kept = self._replace(parsing=None)
        if image_index is None:
            return kept
        return VisualTokens(*(None if part is None else part[image_index] for part in kept))

    def at(self, places: Tensor) -> VisualTokens:
        """Some tokens of each image alone; `places` (image, chosen), of images without padding."""
        rows = torch.arange(len(places), device=places.device)[:, None]
        parsing = self.parsing
        if parsing is not None:
            parsing = parsing.permute(0, 2, 3, 1)[rows[..., None], places[:, :, None], places[:, None]]
            parsing = parsing.permute(0, 3, 1, 2)
            parsing = parsing / parsing.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        codes = None if self.codes is None else self.codes[rows, places]
        return VisualTokens(self.features[rows, places], parsing, codes=codes, places=places)

    def real(self) -> Tensor:
        """bool (image, vision): `tokens`, or True everywhere."""
        if self.tokens is None:
            return torch.ones(self.features.shape[:2], dtype=torch.bool, device=self.features.device)
        return self.tokens

    def mean(self) -> Tensor:
        """(image, c), padding left out."""
        if self.tokens is None:
            return self.features.mean(dim=1)
        weights = self.tokens[..., None].to(self.features)
        return (self.features * weights).sum(dim=1) / weights.sum(dim=1)

    def largest(self) -> Tensor:
        """(image, c), padding left out."""
        if self.tokens is None:
            return self.features.amax(dim=1)
        return self.features.masked_fill(~self.tokens[..., None], -torch.inf).amax(dim=1)


class _Visual(nn.Module):
    """Common to all families: normalises uint8 pixels on the device where the model is."""

    width: int

    def __init__(self, settings: VisualSettings, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def real_tokens(self, images: Tensor) -> Tensor:
        """bool (image, vision): the visual tokens of these images that are no padding; all of them."""
        return torch.ones(len(images), self.settings.tokens, dtype=torch.bool, device=images.device)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (image, 3, height, width) -> float, by the mean and std that the weights were trained with."""
        side = self.settings.image_px
        if images.shape[1:] != (3, side, side):
            raise ValueError(f"images have shape {tuple(images.shape)}; this model takes (image, 3, {side}, {side})")
        return (images.to(self.mean.dtype) - self.mean) / self.std


class _Recorded(nn.Softmax):
    """The softmax of an attention, keeping its last output; the caller takes it at once."""

    weights: Tensor | None = None

    def forward(self, scores: Tensor) -> Tensor:
        self.weights = super().forward(scores)
        return self.weights


class SwinParser(_Visual):
    """The visual parser (paper Sec. 3.1): a Swin Transformer and the attention of its last block.

    Only the last block computes explicit weights; the others use fused attention.
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
        blocks = [module for module in self.modules() if isinstance(module, SwinTransformerBlock)]
        for block in blocks:
            block.attn.fused_attn = block is not blocks[-1]
        self._softmax = blocks[-1].attn.softmax = _Recorded(dim=-1)
        last = blocks[-1]
        self.in_order = last.window_size == last.input_resolution and not any(last.shift_size)  # one window, no shift
        self.register_buffer("places", window_places(last), persistent=False)

    def forward(self, images: Tensor) -> VisualTokens:
        """uint8 (image, 3, height, width) -> tokens (image, m, c) and parsing attention (image, head, m, m)."""
        try:
            features = self.network.forward_features(self.normalise(images)).flatten(1, 2)
        finally:  # whatever happens: the weights hold all that the backward pass needs
            weights, self._softmax.weights = self._softmax.weights, None
        if self.in_order:
            return VisualTokens(features, weights)
        return VisualTokens(features, scatter_windows(weights, self.places, features.shape[1]))


def window_places(block: SwinTransformerBlock) -> Tensor:
    """Which token stands at each place of each window of a Swin block; int64 (window, place), m at padding.

    The block rolls its grid by the shift, pads it to whole windows (12 x 12 to 14 x 14 for windows of 7) and cuts.
    """
    height, width = block.input_resolution
    (window_h, window_w), (shift_h, shift_w) = block.window_size, block.shift_size
    grid = torch.arange(height * width).view(1, height, width, 1).roll((-shift_h, -shift_w), dims=(1, 2))
    padding = (0, 0, 0, -width % window_w, 0, -height % window_h)
    padded = functional.pad(grid, padding, value=height * width)
    return window_partition(padded, block.window_size).flatten(1)


def scatter_windows(weights: Tensor, places: Tensor, tokens: int) -> Tensor:
    """Attention inside windows -> attention between tokens.

    Parameters
    ----------
    weights : Tensor, (image * window, head, place, place)
    places : Tensor, (window, place)
        From `window_places`.

    Returns
    -------
    Tensor, (image, head, vision, vision)
        Zero outside a token's window; padded places dropped and rows renormalised to sum 1.
    """
    windows, area = places.shape
    weights = weights.unflatten(0, (-1, windows)).transpose(1, 2)  # image head window place place
    joint = weights.new_zeros(*weights.shape[:2], tokens + 1, tokens + 1)
    rows = places[:, :, None].expand(windows, area, area)
    columns = places[:, None, :].expand(windows, area, area)
    joint[:, :, rows, columns] = weights
    joint = joint[:, :, :tokens, :tokens]
    return joint / joint.sum(dim=-1, keepdim=True)


class GridFeatures(_Visual):
    """Grid features of any timm CNN (paper Table 5: R50, R101; Pixel-BERT); with a dictionary, SOHO's codes of them."""

    def __init__(self, settings: VisualSettings) -> None:
        network, width = timms_cnn(settings.backbone, settings.stride)
        super().__init__(settings, network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
        self.network, self.width = network, width
        self.dictionary = Dictionary(settings.dictionary, self.width) if settings.dictionary else None

    def train(self, mode: bool = True) -> GridFeatures:
        """With `frozen_norm` (set where weights are taken over) batch norm keeps its statistics, as in DETR.

        From scratch it must follow its batches, and then accumulation is not exact.
        """
        super().train(mode)
        if self.settings.frozen_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> VisualTokens:
        """uint8 (image, 3, height, width) -> tokens (image, m, c)."""
        features = self.network(self.normalise(images)).flatten(2).transpose(1, 2)
        if self.dictionary is None:
            return VisualTokens(features, None)
        features, codes = self.dictionary(features)
        return VisualTokens(features, None, codes=codes)


def timms_cnn(backbone: str, stride: int) -> tuple[nn.Module, int]:
    """A CNN of timm with random weights, whose last map has a place every `stride` pixels, and its channels.

    Raises
    ------
    SettingsError
        For a name that timm does not know, and a network that makes no such map.
    """
    options = {} if stride == 32 else {"output_stride": stride}
    try:
        network = timm.create_model(backbone, pretrained=False, num_classes=0, global_pool="", **options)
        with torch.no_grad():
            _, width, *places = network.eval()(torch.zeros(1, 3, 2 * stride, 2 * stride)).shape
        if places != [2, 2]:
            raise ValueError(f"{2 * stride} x {2 * stride} px give a map of {places}, not of 2 x 2")
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError) as error:
        hint = "" if timm.is_model(backbone) else nearest(backbone, timm.list_models())
        raise SettingsError(
            f"visual.backbone {backbone!r}, visual.stride {stride}: timm makes no grid of it "
            f"({str(error) or 'it has no such stride'}){hint}; it takes a CNN with `output_stride` (8, 16 or 32), as "
            "resnet50, efficientnet_b0 and convnext_tiny have it; others at stride 32 alone"
        ) from None
    return network.train(), width


class PatchProjection(_Visual):
    """A linear projection of patches, independent of each other (ViLT's visual side)."""

    def __init__(self, settings: VisualSettings) -> None:
        super().__init__(settings, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.width = settings.patch_width
        self.projection = nn.Conv2d(3, self.width, kernel_size=settings.stride, stride=settings.stride)

    def forward(self, images: Tensor) -> VisualTokens:
        """uint8 (image, 3, height, width) -> tokens (image, m, c)."""
        return VisualTokens(self.projection(self.normalise(images)).flatten(2).transpose(1, 2), None)


class RegionFeatures(nn.Module):
    """Features of regions that a detector found before (UNITER, BUTD); the fusion embeds them with their boxes.

    It has no weights: what it takes is what `data.regions.RegionFiles` stacks.
    """

    def __init__(self, settings: VisualSettings) -> None:
        super().__init__()
        self.settings, self.width = settings, settings.region_width

    def real_tokens(self, images: Tensor) -> Tensor:
        """bool (image, vision): the regions of these images that are no padding."""
        return images[..., -1] > 0

    def forward(self, images: Tensor) -> VisualTokens:
        """Packed regions (image, region, c + 5): features, box, whether it is real -> tokens (image, m, c)."""
        if images.dim() != 3 or images.shape[2] != self.width + 5:
            raise ValueError(
                f"regions have shape {tuple(images.shape)}; this model takes (image, region, {self.width} + 5) as "
                "data.regions.RegionFiles stacks them"
            )
        features, boxes, real = images.split((self.width, 4, 1), dim=2)
        return VisualTokens(features, None, real[..., 0] > 0, boxes)


def build_visual(settings: VisualSettings) -> nn.Module:
    """The visual side with random weights; nothing is fetched."""
    return settings.kind.build(settings)
