"""What a visual side reads of an image: its pixels, or the features of regions. One object, `stack`, serves both."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vpworkbench.data.records import Example, ImageFile, Picture
from vpworkbench.data.regions import RegionFiles
from vpworkbench.errors import SettingsError
from vpworkbench.model.model import Inputs, VisualParsingModel
from vpworkbench.settings import VisualSettings

Readable = Picture | ImageFile | Image.Image | np.ndarray
"""Anything with pixels: a record, a file, a PIL image, or a uint8 array (height, width, 3)."""


class VisualInput(Protocol):
    """How images become the tensor that a visual side takes."""

    def stack(self, images: Sequence[Readable]) -> Tensor:
        """One tensor for several images, image first."""

    def check(self, records: Sequence[Picture | Example]) -> None:
        """Refuse a set that some image cannot be read of, before any work starts."""


@dataclass(frozen=True)
class Pixels:
    """Images squeezed to squares of one size."""

    image_px: int

    def stack(self, images: Sequence[Readable]) -> Tensor:
        """uint8 (image, 3, image_px, image_px)."""
        squares = np.stack([self._square(image) for image in images])
        return torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous()

    def check(self, records: Sequence[Picture | Example]) -> None:
        """Pixels need no check: a broken image is reported where it is decoded."""

    def _square(self, image: Readable) -> np.ndarray:
        if isinstance(image, Picture):
            image = image.image
        if isinstance(image, ImageFile):
            return image.pixels(self.image_px)
        drawn = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        size = (self.image_px, self.image_px)
        return np.asarray(drawn.convert("RGB").resize(size, Image.Resampling.BICUBIC))


def visual_input(visual: VisualSettings) -> VisualInput:
    """The input of a visual side: pixels, or the regions of `visual.region_files`.

    Raises
    ------
    DataError
        If the region files are not there.
    """
    if visual.kind.pixels:
        return Pixels(visual.image_px)
    return open_regions(visual.region_files, visual.regions, visual.region_width)


def open_regions(source: str, most: int, width: int) -> RegionFiles:
    """Region files, opened once: a tsv is indexed again only after it was written again."""
    place = Path(source).expanduser()
    stamp = (place.stat().st_mtime_ns, place.stat().st_size) if source and place.exists() else (0, 0)
    return _opened(source, most, width, stamp)


@functools.lru_cache(maxsize=8)
def _opened(source: str, most: int, width: int, stamp: tuple[int, int]) -> RegionFiles:
    return RegionFiles(source, most=most, width=width)


def prepare(
    model: VisualParsingModel,
    images: Sequence[Readable],
    texts: Sequence[str],
    *,
    special_tokens: Literal["language", "exclude"] = "language",
) -> Inputs:
    """Read images and pair image i with text i: `VisualParsingModel.prepare`, from records or files.

    Raises
    ------
    ValueError
        If there are not as many images as texts, or none.
    """
    if len(images) != len(texts) or not texts:
        raise ValueError(f"{len(images)} images and {len(texts)} texts: give one text for each image")
    stacked = visual_input(model.settings.visual).stack(images)
    return model.prepare(stacked, list(texts), special_tokens=special_tokens)


def use_regions(model: VisualParsingModel, source: str) -> None:
    """Read the regions of images from `source` from now on; a saved model remembers it.

    Raises
    ------
    DataError, SettingsError
        If the visual side reads pixels; if `source` holds no regions, or features of another width.
    """
    visual = model.settings.visual
    if visual.kind.pixels:
        raise SettingsError(f"regions {source}: visual family {visual.family!r} reads pixels; leave `regions` empty")
    settings = model.settings.with_overrides({"visual.region_files": source})
    open_regions(source, settings.visual.regions, settings.visual.region_width).check_width()
    model.settings, model.visual.settings = settings, settings.visual
