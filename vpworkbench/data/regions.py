"""Features and boxes of regions that a detector found before: BUTD's tsv, or one npz for each image.

An npz holds `features` (region, channel), `boxes` (region, 4) in pixels as x0 y0 x1 y1, and `size` (width, height).
"""

from __future__ import annotations

import base64
import binascii
import functools
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vpworkbench.config import VisualSettings
from vpworkbench.data.records import DataError, ImageFile

TSV_FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
OUTSIDE_PX = 1.0
"""Detectors round: a box may leave its image by so much, and is cut there."""
NUMBERS = "fiu"  # kinds of numpy: no truth values, complex numbers, texts
OF_COCO = re.compile(r"(?:COCO_\w+_)?(\d{12})")
"""A name of COCO's, and the number that detectors know the image by."""
UNREADABLE = (OSError, KeyError, ValueError, TypeError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile,
              zlib.error, struct.error)  # fmt: skip
"""What numpy raises at an npz that is cut, has flipped bytes, or is none."""


class RegionsMissing(DataError):
    """An image without features; everything else about it may be right."""


class Regions(NamedTuple):
    """float32 features (region, channel), and boxes (region, 4), x0 y0 x1 y1 as shares of the image."""

    features: np.ndarray
    boxes: np.ndarray


def checked_regions(features: np.ndarray, boxes: np.ndarray, size: Any, *, source: str) -> Regions:
    """Regions with relative boxes; `DataError` naming `source`, the file and the image, where they are wrong.

    Parameters
    ----------
    features, boxes : array, (region, channel), (region, 4)
        Boxes in pixels.
    size : width and height of the image, as a file has them
    """
    size = np.asarray(size)
    if size.shape != (2,) or size.dtype.kind not in NUMBERS or not np.isfinite(size).all() or not size.min() > 0:
        raise DataError(f"{source}: an image of size {size.tolist()}; width and height must be positive numbers")
    if features.ndim != 2 or boxes.shape != (len(features), 4) or not len(features):
        raise DataError(
            f"{source}: features {features.shape} and boxes {boxes.shape} do not belong together; there must be one "
            "box x0 y0 x1 y1 for each feature, and at least one; extract this image again"
        )
    if features.dtype.kind not in NUMBERS or boxes.dtype.kind not in NUMBERS:
        raise DataError(
            f"{source}: features of {features.dtype} and boxes of {boxes.dtype}; both must be real numbers; extract "
            "this image again"
        )
    with np.errstate(over="ignore"):
        features = features.astype(np.float32)  # before it is asked whether they are finite: 1e300 is not
    if not (np.isfinite(features).all() and np.isfinite(boxes).all()):
        raise DataError(f"{source}: numbers that are not finite in float32; extract this image again")
    limits = np.array([*size, *size], dtype=np.float64)
    wrong = (boxes < -OUTSIDE_PX).any(1) | (boxes > limits + OUTSIDE_PX).any(1) | (boxes[:, :2] > boxes[:, 2:]).any(1)
    if wrong.any():
        place = int(wrong.argmax())
        raise DataError(
            f"{source}: box {place} {np.round(boxes[place], 1).tolist()} is outside the image of "
            f"{size[0]:g} x {size[1]:g} px; boxes are x0 y0 x1 y1 in pixels of that size"
        )
    return Regions(features, (boxes.clip(0, limits) / limits).astype(np.float32))


def write_regions(file: Path, features: np.ndarray, boxes: np.ndarray, size: Sequence[float]) -> None:
    """One image's npz, as a whole or not at all; boxes in pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}")
    with open(draft, "wb") as out:
        np.savez(out, features=features.astype(np.float32), boxes=np.asarray(boxes, np.float32), size=np.asarray(size))
    os.replace(draft, file)


def read_npz(file: Path) -> Regions:
    """The regions of one image."""
    try:
        with np.load(file, allow_pickle=False) as content:
            parts = content["features"], content["boxes"], content["size"]
    except UNREADABLE as error:
        raise DataError(
            f"{file}: no whole npz with features, boxes and size ({error}); "
            "write it again by `data.regions.write_regions`"
        ) from None
    return checked_regions(*parts, source=str(file))


def read_tsv_row(row: dict[str, str | None], file: Path) -> Regions:
    """The regions of one line of BUTD's tsv; features and boxes are base64 of float32."""
    source = f"{file}: image {row['image_id']}"
    try:
        count, size = int(row["num_boxes"] or ""), (float(row["image_w"] or ""), float(row["image_h"] or ""))
    except ValueError as error:
        raise DataError(
            f"{source}: image_w, image_h or num_boxes is no number ({error}); fetch the file again"
        ) from None
    boxes, features = (_decoded(row[name] or "", name, source) for name in ("boxes", "features"))
    if count < 1 or boxes.size != 4 * count or features.size % count:
        raise DataError(
            f"{source}: num_boxes is {count}, but {boxes.size / 4:g} boxes and {features.size} numbers of features are "
            "there; fetch the file again"
        )
    return checked_regions(features.reshape(count, -1), boxes.reshape(count, 4), size, source=source)


def _decoded(text: str, field: str, source: str) -> np.ndarray:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{source}: {field} is no base64 of float32 ({error}); fetch the file again") from None


class RegionFiles:
    """The regions of images, by the image's name; what stands in the place of pixels.

    Parameters
    ----------
    source : str or Path
        A folder of npz, `<name of the image>.npz`, or a tsv, whose `image_id` is that name; of COCO's, its number.
    most, width : int
        Regions of an image, the first ones of its file; channels of a feature.
    """

    def __init__(self, source: str | Path, *, most: int, width: int) -> None:
        self.source, self.most, self.width = Path(source).expanduser(), most, width
        if not str(source) or not self.source.exists():
            raise DataError(
                f"visual.region_files {str(source)!r}: no such folder or tsv; give BUTD's tsv or a folder with "
                "one npz for each image, as docs/families.md describes; of scenes and NLVR v1 `vpw regions` makes them"
            )
        self._lines = {} if self.source.is_dir() else _index(self.source)

    def check(self, images: Iterable[ImageFile]) -> None:
        """`DataError` where some images have no regions; nothing is read."""
        known = dict.fromkeys(images)
        missing = [image.name for image in known if self._place(image) is None]
        if missing:
            raise DataError(
                f"{self.source}: no features of {len(missing)} of {len(known)} images ({', '.join(missing[:3])}"
                f"{', ...' if missing[3:] else ''}); extract them or drop their records"
            )

    def check_width(self) -> None:
        """`DataError` where the first image that comes has features of another width."""
        if self.source.is_dir():
            names = (file.relative_to(self.source).as_posix() for file in self.source.rglob("[!.]*.npz"))
        else:
            names = (f"{name}.jpg" for name in self._lines)
        for name in names:
            self.regions(ImageFile(self.source, name))
            return

    def regions(self, image: ImageFile) -> Regions:
        """Of one image; `DataError` where there are none, or of another width."""
        place = self._place(image)
        if place is None:
            raise RegionsMissing(
                f"{image}: no features of this image in {self.source}; extract them or drop its record"
            )
        found = read_npz(place) if isinstance(place, Path) else self._line(place)
        if found.features.shape[1] != self.width:
            raise DataError(
                f"{self.source}: image {image.name}: features of {found.features.shape[1]} channels where the model "
                f"takes {self.width}; of a model of ours set visual.region_width, for others make them by "
                f"`vpw regions --width {self.width}`"
            )
        return Regions(found.features[: self.most], found.boxes[: self.most])

    def stack(self, images: Sequence[Any]) -> Tensor:
        """float32 (image, region, width + 5): features, relative box, 1; rows of 0 are padding."""
        packed = torch.zeros(len(images), self.most, self.width + 5)
        for row, image in zip(packed, images, strict=True):
            if not isinstance(image, ImageFile):
                raise DataError("regions are found by an image's file; give its path, not its pixels")
            features, boxes = (torch.from_numpy(part) for part in self.regions(image))
            row[: len(features)] = torch.cat([features, boxes, torch.ones(len(features), 1)], dim=1)
        return packed

    def _place(self, image: ImageFile) -> Path | int | None:
        """The npz of an image, or where its line begins in the tsv; None where there is neither."""
        if self.source.is_dir():
            name = Path(image.name).with_suffix(".npz")
            return next((file for file in (self.source / name, self.source / name.name) if file.exists()), None)
        stem = Path(image.name).stem
        number = OF_COCO.fullmatch(stem)
        return self._lines.get(stem, self._lines.get(str(int(number[1]))) if number else None)

    def _line(self, place: int) -> Regions:
        with self.source.open("rb") as file:
            file.seek(place)
            values = file.readline().decode(errors="replace").rstrip("\r\n").split("\t")
        return read_tsv_row(dict(zip(TSV_FIELDS, values, strict=True)), self.source)


def _index(file: Path) -> dict[str, int]:
    """Where the line of each image begins, in bytes."""
    places, place = {}, 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            name = line.split(b"\t", 1)[0].decode(errors="replace")
            if line.count(b"\t") != len(TSV_FIELDS) - 1:
                raise DataError(
                    f"{file}: line {number} (image {name.strip():.40}) has {line.count(b'	') + 1} fields; BUTD's are "
                    f"{', '.join(TSV_FIELDS)}"
                )
            if name in places:
                raise DataError(f"{file}: line {number}: image {name} for the second time; drop one of its lines")
            places[name] = place
            place += len(line)
    return places


@functools.lru_cache(maxsize=8)
def _opened(source: str, most: int, width: int) -> RegionFiles:
    return RegionFiles(source, most=most, width=width)


def input_of(visual: VisualSettings) -> int | RegionFiles:
    """What a visual side reads of an image: its pixels, squeezed to this side, or its regions."""
    if visual.kind.pixels:
        return visual.image_px
    return _opened(visual.region_files, visual.regions, visual.region_width)


def real_tokens(images: Tensor, visual: VisualSettings) -> Tensor:
    """bool (image, vision) of a batch: the visual tokens that are no padding."""
    if visual.kind.pixels:
        return torch.ones(len(images), visual.tokens, dtype=torch.bool)
    return images[..., -1] > 0
