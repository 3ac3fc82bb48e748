"""From images or regions to visual tokens: what every visual family returns, and the families without a timm network.

`settings.families.FAMILIES` lists all families; those of `swin.py`, `vit.py` and `grid.py` are imported when they are
built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pkgutil import resolve_name
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vpworkbench.settings import VisualSettings


class VisualTokens(NamedTuple):
    """The output of every visual family; what a family does not have is None."""

    features: Tensor  # (image, vision, channel): V of paper Eq. 1; on a whole grid token i = row * grid + column
    parsing: Tensor | None = None  # (image, head, vision, vision): attention of the parser's last block, rows sum to 1
    tokens: Tensor | None = None  # bool (image, vision): False at padding; None if there is no padding
    boxes: Tensor | None = None  # (image, vision, 4): x0 y0 x1 y1 of regions, as shares of the image
    codes: Tensor | None = None  # int64 (image, vision): the code that replaced each token, or the class of each region
    positions: Tensor | None = None  # int64 (image, vision): places on the grid, if some of its tokens were left out

    def for_texts(self, image_index: Tensor | None) -> VisualTokens:
        """The tokens of the image of each text, without parsing attention; None: text i belongs to image i."""
        tokens = self._replace(parsing=None)
        if image_index is None:
            return tokens
        return VisualTokens(*(None if part is None else part[image_index] for part in tokens))

    def subset(self, positions: Tensor) -> VisualTokens:
        """Keep only these tokens of a grid without padding, `positions` (image, chosen); attention rows sum to 1."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        parsing = self.parsing
        if parsing is not None:
            parsing = parsing.permute(0, 2, 3, 1)[rows[..., None], positions[:, :, None], positions[:, None]]
            parsing = parsing.permute(0, 3, 1, 2)  # image head chosen chosen
            parsing = parsing / parsing.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        codes = None if self.codes is None else self.codes[rows, positions]
        return VisualTokens(self.features[rows, positions], parsing, codes=codes, positions=positions)

    def not_padding(self) -> Tensor:
        """bool (image, vision): `tokens`, or True everywhere."""
        if self.tokens is None:
            return torch.ones(self.features.shape[:2], dtype=torch.bool, device=self.features.device)
        return self.tokens

    def mean(self) -> Tensor:
        """Mean over the real tokens, (image, channel)."""
        if self.tokens is None:
            return self.features.mean(dim=1)
        weights = self.tokens[..., None].to(self.features)
        return (self.features * weights).sum(dim=1) / weights.sum(dim=1)

    def largest(self) -> Tensor:
        """Largest value over the real tokens, (image, channel)."""
        return self.features.masked_fill(~self.not_padding()[..., None], -torch.inf).amax(dim=1)


def pack(tokens: VisualTokens) -> Tensor:
    """Tokens of a grid as one float16 tensor, (image, vision, channel [+ 2 vision]), small enough to keep for a set.

    Features are rounded. Parsing attention, averaged over heads, keeps its 32 bits, two columns for each number:
    rounded weights would come in another order, and so make other masks.
    """
    parts = [tokens.features.half()]
    if tokens.parsing is not None:
        parts.append(tokens.parsing.float().mean(dim=1).contiguous().view(torch.float16))
    return torch.cat(parts, dim=2)


def unpack(packed: Tensor, width: int) -> VisualTokens:
    """What `pack` made of features with `width` channels; the parsing attention has one head."""
    parsing = packed[..., width:].contiguous().view(torch.float32)[:, None] if packed.shape[2] > width else None
    return VisualTokens(packed[..., :width].float(), parsing)


def encode(visual: nn.Module, images: Tensor) -> VisualTokens:
    """Visual tokens of uint8 images (image, 3, height, width), of packed regions, or kept by `pack`."""
    is_packed = visual.settings.kind.pixels and images.dtype == torch.float16 and images.ndim == 3
    return unpack(images, visual.width) if is_packed else visual(images)


def build_visual(settings: VisualSettings) -> nn.Module:
    """The visual side with random weights; nothing is downloaded."""
    network = settings.kind.network
    return (resolve_name(network) if isinstance(network, str) else network)(settings)


class PixelFamily(nn.Module):
    """Base of the families that read pixels; `width` is the number of channels of a token."""

    width: int

    def __init__(self, settings: VisualSettings, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (image, 3, height, width) -> float, by the mean and std that the weights were trained with."""
        side = self.settings.image_px
        if images.shape[1:] != (3, side, side):
            raise ValueError(f"images have shape {tuple(images.shape)}; this model takes (image, 3, {side}, {side})")
        return (images.to(self.mean.dtype) - self.mean) / self.std


class AttentionRecorder(nn.Dropout):
    """Stands for the dropout of an attention layer of timm, and keeps the weights that pass through it."""

    weights: Tensor | None = None  # of the last pass

    @classmethod
    def on_last(cls, layers: Sequence[nn.Module]) -> AttentionRecorder:
        """Put one on the last of these attention layers; only there are weights explicit, the others stay fused."""
        for layer in layers:
            layer.fused_attn = layer is not layers[-1]
        layers[-1].attn_drop = recorder = cls(layers[-1].attn_drop.p)
        return recorder

    def forward(self, weights: Tensor) -> Tensor:
        self.weights = weights
        return super().forward(weights)

    def of(self, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """What `run` returns, and the weights of its pass; none are kept, not even after an error."""
        try:
            return run(), self.weights
        finally:
            self.weights = None


class PatchProjection(PixelFamily):
    """A linear projection of each patch (ViLT's visual side)."""

    def __init__(self, settings: VisualSettings) -> None:
        super().__init__(settings, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.width = settings.patch_width
        self.projection = nn.Conv2d(3, self.width, kernel_size=settings.stride, stride=settings.stride)

    def forward(self, images: Tensor) -> VisualTokens:
        """uint8 (image, 3, height, width) -> tokens (image, vision, channel)."""
        return VisualTokens(self.projection(self.normalise(images)).flatten(2).transpose(1, 2))


class RegionFeatures(nn.Module):
    """Features of regions from a detector (UNITER, BUTD), as `data.regions.RegionFiles` packs them; no weights."""

    def __init__(self, settings: VisualSettings) -> None:
        super().__init__()
        self.settings, self.width = settings, settings.region_width

    def forward(self, images: Tensor) -> VisualTokens:
        """Packed regions (image, region, channel + 5): features, box, 1 + class -> tokens (image, region, channel)."""
        if images.dim() != 3 or images.shape[2] != self.width + 5:
            raise ValueError(
                f"regions have shape {tuple(images.shape)}; this model takes (image, region, {self.width} + 5) as "
                "data.regions.RegionFiles stacks them"
            )
        features, boxes, kind = images.split((self.width, 4, 1), dim=2)
        kind = kind[..., 0]
        codes = (kind.long() - 1).clamp(min=0) if self.settings.classes else None
        return VisualTokens(features, tokens=kind > 0, boxes=boxes, codes=codes)
