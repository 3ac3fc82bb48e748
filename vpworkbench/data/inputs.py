"""What a visual side reads of an image: its pixels, or the features of regions. One object, `stack`, serves both."""

from __future__ import annotations

import functools
import hashlib
import math
import os
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
from vpworkbench.data.records import Example, Picture
from vpworkbench.data.regions import RegionFiles
from vpworkbench.errors import DataError, SettingsError
from vpworkbench.model.model import Inputs, VisualParsingModel
from vpworkbench.settings import VisualSettings
from vpworkbench.system import lock

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


class PixelCache:
    """Pixels of image files, uint8 (image, side, side, 3) on disk.

    The file's name is a hash of the images' names, contents and size, so that a changed image makes another file;
    each image that is read is compared with its checksum.

    Parameters
    ----------
    folder : Path
        Holds the caches.
    side : int
        Pixels.
    progress
        Told how far the building is.

    Raises
    ------
    DataError
        For an image that cannot be decoded.
    OSError
        On a full disk; nothing half built is left.
    """

    def __init__(
        self,
        folder: Path,
        images: Sequence[ImageFile],
        side: int,
        *,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        files = list(dict.fromkeys(images))
        self.rows = {file: row for row, file in enumerate(files)}
        contents = [(str(file), *file.glimpse()) for file in files]
        name = hashlib.sha256(repr((side, contents)).encode()).hexdigest()[:16]
        self.path = folder / f"pixels-{name}.npy"
        self._sums = self.path.with_suffix(".crc.npy")
        folder.mkdir(parents=True, exist_ok=True)
        with lock(self.path.with_suffix(".lock"), patience_s=math.inf):  # one of the processes of a run builds it
            if not (self.path.exists() and self._sums.exists()):
                self._build(files, side, progress)
        try:
            self.pixels, self.sums = np.load(self.path, mmap_mode="r"), np.load(self._sums)
        except (ValueError, EOFError) as error:
            raise DataError(f"{self.path}: not whole ({error}); delete it, and it is built again") from None
        if self.pixels.shape != (len(files), side, side, 3) or len(self.sums) != len(files):
            raise DataError(f"{self.path}: not whole; delete it, and it is built again")

    def _build(self, files: list[ImageFile], side: int, progress: Callable[[str, int, int], None] | None) -> None:
        draft, sums_draft = (self.path.with_suffix(f".{os.getpid()}.{kind}part") for kind in ("", "crc."))
        sums = np.zeros(len(files), dtype=np.uint32)
        try:
            with open(draft, "wb") as out:
                shape = {"descr": "|u1", "fortran_order": False, "shape": (len(files), side, side, 3)}
                np.lib.format.write_array_header_1_0(out, shape)
                for row, file in enumerate(files):
                    pixels = file.pixels(side).tobytes()
                    sums[row] = zlib.crc32(pixels)
                    out.write(pixels)
                    if progress:
                        progress("decoding images", row + 1, len(files))
            with open(sums_draft, "wb") as out:
                np.save(out, sums)
            os.replace(sums_draft, self._sums)  # another process may read, or build, the same
            os.replace(draft, self.path)
        finally:
            draft.unlink(missing_ok=True)
            sums_draft.unlink(missing_ok=True)

    def stack(self, images: Sequence[ImageFile]) -> Tensor:
        """As `stack_files`: uint8 (image, 3, side, side).

        Raises
        ------
        DataError
            Where the file no longer holds what was written.
        """
        rows = [self.rows[image] for image in images]
        pixels = self.pixels[rows]
        for row, image in zip(rows, pixels, strict=True):
            if zlib.crc32(image) != self.sums[row]:
                raise DataError(f"{self.path}: image {row} was damaged; delete that file, and it is built again")
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


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
