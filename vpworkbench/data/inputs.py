"""What a visual side reads of an image: its pixels, or the features of regions."""

from __future__ import annotations

import functools
import hashlib
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
from vpworkbench.settings.model import SpecialTokens
from vpworkbench.system import draft, lock

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and of how much."""

Readable = Picture | ImageFile | Image.Image | np.ndarray
"""Anything with pixels: a record, a file, a PIL image, or a uint8 array (height, width, 3)."""


class VisualInput(Protocol):
    """How images become the tensor that a visual side takes."""

    def stack(self, images: Sequence[Readable], mirrored: np.ndarray | None = None) -> Tensor:
        """One tensor for several images, image first; those of `mirrored`, bool (image,), with left and right swapped.

        Regions are never mirrored.
        """

    def check(self, images: Sequence[ImageFile]) -> None:
        """Refuse images without regions before any work starts; a broken image is reported when it is decoded."""


@dataclass(frozen=True)
class Pixels(VisualInput):
    """Images squeezed to squares of one size."""

    image_px: int

    def stack(self, images: Sequence[Readable], mirrored: np.ndarray | None = None) -> Tensor:
        """uint8 (image, 3, image_px, image_px)."""
        return _flipped(channels_first(np.stack([self._square(image) for image in images])), mirrored)

    def _square(self, image: Readable) -> np.ndarray:
        if isinstance(image, Picture):
            image = image.image
        if isinstance(image, ImageFile):
            return image.pixels(self.image_px)
        drawn = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        size = (self.image_px, self.image_px)
        return np.asarray(drawn.convert("RGB").resize(size, Image.Resampling.BICUBIC))


class ImageCache(VisualInput):
    """What a visual input makes of image files, computed once into one memory-mapped file that all processes share.

    The cache is a folder named by a hash of its key and of the images' names and contents, so that a changed image
    makes another cache. It appears when it is complete. Each row is compared with its checksum when it is read.

    Parameters
    ----------
    folder : Path
        Where caches are kept.
    images
        All images that will be read.
    read
        Makes a tensor of some files, as `VisualInput.stack` does.
    key : str
        Everything besides the images that decides what `read` returns.
    both_ways : bool
        Keep a mirrored copy of each image too, where `read` makes something that cannot be mirrored afterwards.
    """

    def __init__(
        self,
        folder: Path,
        images: Sequence[ImageFile],
        read: Callable[[Sequence[ImageFile], np.ndarray], Tensor],
        key: str,
        *,
        both_ways: bool = False,
        what: str = "decoding images",
        progress: Progress | None = None,
    ) -> None:
        files = list(dict.fromkeys(images))
        self.rows = {file: row for row, file in enumerate(files)}
        self.both_ways = both_ways
        contents = [(str(file), *file.glimpse()) for file in files]
        digest = hashlib.sha256(repr((key, both_ways, contents)).encode()).hexdigest()[:16]
        self.path = folder / f"images-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        with lock(self.path.with_suffix(".lock"), patience_s=math.inf):  # one process of a run builds it
            if not self.path.exists():
                ways = (False, True) if both_ways else (False,)
                parts = [(files[start : start + 64], way) for way in ways for start in range(0, len(files), 64)]
                _fill(self.path, parts, read, len(ways) * len(files), what, progress)
        try:
            self.kept = np.load(self.path / "images.npy", mmap_mode="r")
            self.checksums = np.load(self.path / "checksums.npy")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{self.path}: not complete ({error}); delete this folder, and it is built again") from None

    def stack(self, images: Sequence[Picture | ImageFile], mirrored: np.ndarray | None = None) -> Tensor:
        """What `read` made of these images; `DataError` if the cache was damaged."""
        files = [image.image if isinstance(image, Picture) else image for image in images]
        rows = np.array([self.rows[file] for file in files])
        if self.both_ways and mirrored is not None:
            rows, mirrored = rows + len(self.rows) * mirrored, None
        kept = self.kept[rows]
        for row, image in zip(rows, kept, strict=True):
            if zlib.crc32(image) != self.checksums[row]:
                raise DataError(f"{self.path}: image {row} was damaged; delete this folder, and it is built again")
        return _flipped(torch.from_numpy(kept), mirrored)


def pixel_cache(
    folder: Path, images: Sequence[ImageFile], image_px: int, *, progress: Progress | None = None
) -> ImageCache:
    """The pixels of image files, each decoded and resized once."""
    return ImageCache(folder, images, Pixels(image_px).stack, f"{image_px} px", progress=progress)


def _fill(
    cache: Path,
    parts: Sequence[tuple[Sequence[ImageFile], bool]],
    read: Callable[[Sequence[ImageFile], np.ndarray], Tensor],
    count: int,
    what: str,
    progress: Progress | None,
) -> None:
    """Write what `read` makes of each part, some files and whether they are mirrored, and checksums."""
    checksums: list[int] = []
    with draft(cache, durable=False) as folder:
        folder.mkdir()
        with open(folder / "images.npy", "wb") as out:  # a memory map would end the process where the disk is full
            for files, is_mirrored in parts:
                rows = read(files, np.full(len(files), is_mirrored)).numpy()
                if not checksums:
                    shape = (count, *rows.shape[1:])
                    header = {"descr": rows.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(out, header)
                for row in np.ascontiguousarray(rows):
                    checksums.append(zlib.crc32(row))
                    out.write(row)
                if progress:
                    progress(what, len(checksums), count)
        np.save(folder / "checksums.npy", np.array(checksums, dtype=np.uint32))


def channels_first(squares: np.ndarray) -> Tensor:
    """(image, height, width, channel) -> (image, channel, height, width)."""
    return torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous()


def _flipped(images: Tensor, mirrored: np.ndarray | None) -> Tensor:
    """Pixels (image, 3, height, width), changed in place."""
    if mirrored is not None:
        chosen = torch.from_numpy(mirrored)
        images[chosen] = images[chosen].flip(-1)
    return images


def visual_input(visual: VisualSettings) -> VisualInput:
    """The input of a visual side: pixels, or the region files, which stay open until they change."""
    if visual.kind.pixels:
        return Pixels(visual.image_px)
    place = Path(visual.region_files).expanduser()
    changed = (place.stat().st_mtime_ns, place.stat().st_size) if place.exists() else None
    return _opened(visual.region_files, visual.regions, visual.region_width, visual.classes, changed)


@functools.lru_cache(maxsize=8)
def _opened(source: str, most: int, width: int, classes: int, changed: tuple[int, int] | None) -> RegionFiles:
    return RegionFiles(source, most=most, width=width, classes=classes)


def prepare(
    model: VisualParsingModel,
    images: Sequence[Readable],
    texts: Sequence[str],
    *,
    special_tokens: SpecialTokens = "language",
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
