"""Decoded and resized images in one memory-mapped file: built once, then read as fast as memory.

Worker processes and runs share its pages; the plain files stay where they are and are read no more.
"""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vpworkbench.data.records import ImageFile
from vpworkbench.errors import DataError
from vpworkbench.system import held


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
        with held(self.path.with_suffix(".lock"), patience_s=math.inf):  # one of the processes of a run builds it
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
