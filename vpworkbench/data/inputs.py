"""What a visual side reads of an image: its pixels, or the features of regions."""

from __future__ import annotations

import functools
import hashlib
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vpworkbench.data.images import ImageFile
from vpworkbench.data.records import Picture
from vpworkbench.data.regions import RegionFiles
from vpworkbench.errors import DataError, SettingsError
from vpworkbench.model.model import Inputs, VisualParsingModel
from vpworkbench.settings import VisualSettings
from vpworkbench.system import draft, lock

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and of how much."""

Readable = Picture | ImageFile | Image.Image | np.ndarray
"""Anything with pixels: a record, a file, a PIL image, or a uint8 array (height, width, 3)."""


class VisualInput(Protocol):
    """How images become the tensor that a visual side takes."""

    def stack(self, images: Sequence[Readable]) -> Tensor:
        """One tensor for several images, image first."""

    def check(self, images: Sequence[ImageFile]) -> None:
        """Refuse images without regions before any work starts; a broken image is reported when it is decoded."""


@dataclass(frozen=True)
class Pixels(VisualInput):
    """Images squeezed to squares of one size."""

    image_px: int

    def stack(self, images: Sequence[Readable]) -> Tensor:
        """uint8 (image, 3, image_px, image_px)."""
        return channels_first(np.stack([self._square(image) for image in images]))

    def _square(self, image: Readable) -> np.ndarray:
        if isinstance(image, Picture):
            image = image.image
        if isinstance(image, ImageFile):
            return image.pixels(self.image_px)
        drawn = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        size = (self.image_px, self.image_px)
        return np.asarray(drawn.convert("RGB").resize(size, Image.Resampling.BICUBIC))


class PixelCache(VisualInput):
    """The same for image files that are decoded once, into one memory-mapped file that all processes share.

    The cache is a folder named by a hash of the images' names, contents and size, so that a changed image makes another
    cache. Each image is compared with its checksum when it is read.
    """

    def __init__(
        self, folder: Path, images: Sequence[ImageFile], image_px: int, *, progress: Progress | None = None
    ) -> None:
        files = list(dict.fromkeys(images))
        self.rows = {file: row for row, file in enumerate(files)}
        contents = [(str(file), *file.glimpse()) for file in files]
        self.path = folder / f"pixels-{hashlib.sha256(repr((image_px, contents)).encode()).hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        with lock(self.path.with_suffix(".lock"), patience_s=math.inf):  # one process of a run builds it
            if not self.path.exists():
                _decode_all(self.path, files, image_px, progress)
        try:
            self.pixels = np.load(self.path / "pixels.npy", mmap_mode="r")
            self.checksums = np.load(self.path / "checksums.npy")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{self.path}: not complete ({error}); delete this folder, and it is built again") from None

    def stack(self, images: Sequence[Picture | ImageFile]) -> Tensor:
        """uint8 (image, 3, image_px, image_px); `DataError` if the cache was damaged."""
        rows = [self.rows[image.image if isinstance(image, Picture) else image] for image in images]
        pixels = self.pixels[rows]
        for row, image in zip(rows, pixels, strict=True):
            if zlib.crc32(image) != self.checksums[row]:
                raise DataError(f"{self.path}: image {row} was damaged; delete this folder, and it is built again")
        return channels_first(pixels)


def _decode_all(cache: Path, files: Sequence[ImageFile], image_px: int, progress: Progress | None) -> None:
    """Write the pixels and checksums of all files."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), image_px, image_px, 3)}
    checksums = np.zeros(len(files), dtype=np.uint32)
    with draft(cache, durable=False) as folder:
        folder.mkdir()
        with open(folder / "pixels.npy", "wb") as out:  # a memory map would end the process where the disk is full
            np.lib.format.write_array_header_1_0(out, header)
            for row, file in enumerate(files):
                pixels = file.pixels(image_px).tobytes()
                checksums[row] = zlib.crc32(pixels)
                out.write(pixels)
                if progress:
                    progress("decoding images", row + 1, len(files))
        np.save(folder / "checksums.npy", checksums)


def channels_first(squares: np.ndarray) -> Tensor:
    """(image, height, width, channel) -> (image, channel, height, width)."""
    return torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous()


def visual_input(visual: VisualSettings) -> VisualInput:
    """The input of a visual side: pixels, or the region files, which stay open until they change."""
    if visual.kind.pixels:
        return Pixels(visual.image_px)
    place = Path(visual.region_files).expanduser()
    changed = (place.stat().st_mtime_ns, place.stat().st_size) if place.exists() else None
    return _opened(visual.region_files, visual.regions, visual.region_width, changed)


@functools.lru_cache(maxsize=8)
def _opened(source: str, most: int, width: int, changed: tuple[int, int] | None) -> RegionFiles:
    return RegionFiles(source, most=most, width=width)


def prepare(
    model: VisualParsingModel,
    images: Sequence[Readable],
    texts: Sequence[str],
    *,
    special_tokens: Literal["language", "exclude"] = "language",
) -> Inputs:
    """Read images and pair image i with text i: `VisualParsingModel.prepare`, from records or files."""
    stacked = visual_input(model.settings.visual).stack(images)
    return model.prepare(stacked, list(texts), special_tokens=special_tokens)


def use_regions(model: VisualParsingModel, source: str) -> None:
    """Read the regions of images from `source` from now on; a saved model remembers it.

    Refused if the visual side reads pixels, or if `source` holds no regions or features of another width.
    """
    visual = model.settings.visual
    if visual.kind.pixels:
        raise SettingsError(f"regions {source}: visual family {visual.family!r} reads pixels; leave `regions` empty")
    settings = model.settings.with_overrides({"visual.region_files": source})
    visual_input(settings.visual).check_width()
    model.visual.settings = settings.visual
