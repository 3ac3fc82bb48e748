"""Image -> visual tokens: the Swin visual parser, grid CNN, patch projection and regions behind one interface.

Every family is a module that maps uint8 images (or regions) to `VisualTokens`; `config.families.FAMILIES` is the whole
registry. The networks are timm's own and keep timm's names, so that published checkpoints load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vpworkbench.settings import VisualSettings


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
    positions : int64 Tensor or None, (image, vision)
        Of tokens on a grid, where some are left out: row * grid + column of the others.
    """

    features: Tensor
    parsing: Tensor | None
    tokens: Tensor | None = None
    boxes: Tensor | None = None
    codes: Tensor | None = None
    positions: Tensor | None = None

    def for_texts(self, image_index: Tensor | None) -> VisualTokens:
        """The tokens of some images, repeated as asked; without the parsing attention."""
        kept = self._replace(parsing=None)
        if image_index is None:
            return kept
        return VisualTokens(*(None if part is None else part[image_index] for part in kept))

    def subset(self, positions: Tensor) -> VisualTokens:
        """Some tokens of each image alone; `positions` (image, chosen), of images without padding."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        parsing = self.parsing
        if parsing is not None:
            parsing = parsing.permute(0, 2, 3, 1)[rows[..., None], positions[:, :, None], positions[:, None]]
            parsing = parsing.permute(0, 3, 1, 2)
            parsing = parsing / parsing.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        codes = None if self.codes is None else self.codes[rows, positions]
        return VisualTokens(self.features[rows, positions], parsing, codes=codes, positions=positions)

    def not_padding(self) -> Tensor:
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


class PixelFamily(nn.Module):
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


class PatchProjection(PixelFamily):
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
