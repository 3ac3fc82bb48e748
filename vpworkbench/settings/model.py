"""Settings of the model: the visual side and the fusion."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from vpworkbench.errors import SettingsError
from vpworkbench.settings.base import LocalPath, Settings, known
from vpworkbench.settings.families import FAMILIES, Family

SMALLEST_PX, LARGEST_PX = 8, 4096
FamilyName = Annotated[str, AfterValidator(lambda name: known(name, FAMILIES, "no visual family"))]
SpecialTokens = Literal["language", "exclude"]
"""What [CLS] and [SEP] count as: words (the default of paper Eq. 5), or neither modality."""


class VisualSettings(Settings):
    """The visual side: how an image becomes visual tokens (paper Sec. 3.1, Table 5)."""

    family: FamilyName = Field("swin", description="swin, vit; grid (SOHO, Pixel-BERT), patch (ViLT), regions")
    image_px: int = Field(96, ge=SMALLEST_PX, le=LARGEST_PX, description="side of the square input")
    patch_px: int = Field(8, ge=1, description="swin: side of a patch of the first stage")
    width: int = Field(96, ge=8, description="swin: channels of the first stage; each later stage doubles them")
    depths: tuple[int, ...] = Field((2, 2), min_length=1, description="swin: blocks in each stage")
    heads: tuple[int, ...] = Field((3, 6), min_length=1, description="swin: heads in each stage")
    window: int = Field(6, ge=1, description="swin: side of an attention window, in tokens")
    drop_path: float = Field(0.0, ge=0, lt=1, description="swin, vit: stochastic depth of the last block")
    vit: str = Field("vit_small_patch14_dinov2", description="vit: a Vision Transformer of timm, patchN in its name")
    merge: int = Field(2, ge=1, description="vit: N x N neighbouring patches are pooled into one visual token")
    backbone: str = Field("resnet10t", description="grid: a CNN of timm; needs `output_stride` unless stride is 32")
    stride: int = Field(16, ge=4, description="grid, patch: pixels from one token to the next")
    patch_width: int = Field(192, ge=8, description="patch: channels of the projection")
    frozen: bool = Field(False, description="not trained: its tokens are computed once for a set, not at every step")
    frozen_norm: bool = Field(False, description="grid: freeze batch-norm statistics; pre-trained ones always are")
    dictionary: int = Field(0, ge=0, le=65_536, description="grid: codes in the dictionary (SOHO: 2048); 0: none")
    sampled: int = Field(0, ge=0, description="tokens drawn per image in pre-training (Pixel-BERT); 0: all")
    position: Literal["sine", "learned"] = Field("sine", description="of grid tokens: the paper's, or a table (ViLT)")
    regions: int = Field(36, ge=1, le=1024, description="regions: at most N per image, the first N in its file")
    region_width: int = Field(2048, ge=1, description="regions: channels of a feature (BUTD: 2048)")
    classes: int = Field(0, ge=0, le=65_536, description="regions: classes in the files, for `loss.mrc`; 0: not read")
    region_files: LocalPath = Field("", description="regions: a folder with an npz for each image, or a BUTD tsv")

    @field_validator("vit")
    @classmethod
    def _has_patches(cls, name: str) -> str:
        if not re.search(r"patch\d+", name):
            raise ValueError(f"{name!r} names no size of patches; give a ViT of timm, as vit_small_patch14_dinov2")
        return name

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.depths) != len(self.heads):
            raise ValueError(f"depths {self.depths} and heads {self.heads} must have one entry for each stage")
        if self.kind.step and self.image_px % (step := self.kind.step(self)):
            raise ValueError(f"image_px {self.image_px} must be a multiple of {step} (one visual token)")
        if self.dictionary and not self.kind.dictionary:
            able = ", ".join(repr(name) for name, kind in FAMILIES.items() if kind.dictionary)
            raise ValueError(f"dictionary {self.dictionary}: visual family {self.family!r} has none (only {able})")
        if self.classes and self.kind.pixels:
            raise ValueError(
                f"classes {self.classes}: visual family {self.family!r} reads pixels; region files have them"
            )
        if self.frozen and (self.dictionary or not self.kind.pixels):
            what = "a dictionary, which learns by moving averages" if self.dictionary else "no weights"
            raise ValueError(f"frozen: this visual side has {what}; leave frozen false")
        if not self.kind.on_grid and (self.sampled or self.position != "sine"):
            raise ValueError(f"visual family {self.family!r} embeds boxes: sampled must be 0, position 'sine'")
        if self.sampled > self.tokens:
            raise ValueError(f"sampled {self.sampled} is larger than the {self.tokens} visual tokens")
        return self

    @property
    def kind(self) -> Family:
        """The family as a value."""
        return FAMILIES[self.family]

    @property
    def vit_patch_px(self) -> int:
        """Side of a patch of `vit`."""
        return int(re.search(r"patch(\d+)", self.vit)[1])

    @property
    def codes(self) -> int:
        """Kinds of visual tokens that a hidden one can be classified into: codes or classes; 0 if there are none."""
        return self.dictionary or self.classes

    @property
    def grid(self) -> int:
        """Tokens on a side; m = grid ** 2."""
        if self.kind.step is None:
            raise ValueError(f"tokens of visual family {self.family!r} have boxes and form no grid")
        return self.image_px // self.kind.step(self)

    @property
    def tokens(self) -> int:
        """m, the number of visual tokens (paper Eq. 1); without a grid, the largest number."""
        return self.grid**2 if self.kind.on_grid else self.regions

    @property
    def trained_tokens(self) -> int:
        """The number of visual tokens of an image in pre-training."""
        return self.sampled or self.tokens

    def sized(self, tokens: int) -> dict[str, int]:
        """The values to set for a number of visual tokens; without a grid, for at most that number.

        A token keeps its size in pixels, so the image grows; Swin's last stage keeps one window. A number that is no
        square is a `SettingsError` that lists the possible ones.
        """
        if self.kind.step is None:
            return {"regions": tokens}
        step, side = self.kind.step(self), math.isqrt(max(tokens, 0))
        sides = range(max(2, -(-SMALLEST_PX // step)), LARGEST_PX // step + 1)
        if side**2 != tokens or side not in sides:
            first = ", ".join(str(possible**2) for possible in sides[:12])
            raise SettingsError(
                f"visual_tokens: {tokens} is not possible: {self.family!r} has a square grid of {step} px tokens; "
                f"possible are {first} and so on up to {sides[-1] ** 2}"
            )
        return {"image_px": side * step, "window": side}


class FusionSettings(Settings):
    """The fusion Transformer: a BERT encoder over words and visual tokens (paper Sec. 3.3)."""

    kind: Literal["joint", "two-stream"] = Field("joint", description="one sequence, or two that meet (ViLBERT)")
    layers: int = Field(3, ge=1)
    width: int = Field(192, ge=8, description="d, channels of the joint sequence")
    heads: int = Field(6, ge=1)
    feed_forward: int = Field(768, ge=8)
    dropout: float = Field(0.1, ge=0, lt=1)
    positions: int = Field(512, ge=8, description="rows of the table of word positions, as in BERT")
    whole_image: bool = Field(False, description="add the projected mean of the visual tokens to each word (VL-BERT)")
    visual_type: bool = Field(False, description="add a learned vector to visual tokens [peer: SOHO]")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 (2-D sine position)")
        return self


class ModelSettings(Settings):
    """What rebuilds a model; saved as `config.json` of a checkpoint."""

    architecture: Literal["vpworkbench"] = "vpworkbench"
    visual: VisualSettings
    fusion: FusionSettings
    text_tokens: int = Field(ge=4)
