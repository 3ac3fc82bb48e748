"""Features and boxes of regions that a detector found before: BUTD's tsv, or one npz for each image.

An npz holds `features` (region, channel), `boxes` (region, 4) in pixels as x0 y0 x1 y1, and `size` (width, height).
"""

from __future__ import annotations

import base64
import binascii
import functools
import os
import re
import zipfile
from collections.abc import Sequence
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


class RegionsMissing(DataError):
    """An image without features; everything else about it may be right."""


class Regions(NamedTuple):
    """float32 features (region, channel), and boxes (region, 4), x0 y0 x1 y1 as shares of the image."""

    features: np.ndarray
    boxes: np.ndarray


def checked_regions(features: np.ndarray, boxes: np.ndarray, size: Sequence[float], *, source: str) -> Regions:
    """Regions with relative boxes; `DataError` naming `source`, the file and the image, where they are wrong.

    Parameters
    ----------
    features, boxes : array, (region, channel), (region, 4)
        Boxes in pixels.
    size : width and height of the image
    """
    if features.ndim != 2 or boxes.shape != (len(features), 4) or not len(features):
        raise DataError(
            f"{source}: features {features.shape} and boxes {boxes.shape} do not belong together; there must be one "
            "box x0 y0 x1 y1 for each feature, and at least one; extract this image again"
        )
    if not (np.isfinite(features).all() and np.isfinite(boxes).all()):
        raise DataError(f"{source}: numbers that are not finite; extract this image again")
    if len(size) != 2 or not min(size) > 0:
        raise DataError(f"{source}: an image of size {tuple(size)}; width and height must be positive")
    limits = np.array([*size, *size], dtype=np.float64)
    wrong = (boxes < -OUTSIDE_PX).any(1) | (boxes > limits + OUTSIDE_PX).any(1) | (boxes[:, :2] > boxes[:, 2:]).any(1)
    if wrong.any():
        place = int(wrong.argmax())
        raise DataError(
            f"{source}: box {place} {np.round(boxes[place], 1).tolist()} is outside the image of "
            f"{size[0]:g} x {size[1]:g} px; boxes are x0 y0 x1 y1 in pixels of that size"
        )
    return Regions(features.astype(np.float32), (boxes.clip(0, limits) / limits).astype(np.float32))


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
            parts = content["features"], content["boxes"], content["size"].tolist()
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
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
        A folder of npz, `<name of the image>.npz`, or a tsv, whose `image_id` is that name or the number it ends in.
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

    def regions(self, image: ImageFile) -> Regions:
        """Of one image; `DataError` where there are none, or of another width."""
        found = self._from_folder(image) if self.source.is_dir() else self._from_tsv(image)
        if found.features.shape[1] != self.width:
            raise DataError(
                f"{self.source}: image {image.name}: features of {found.features.shape[1]} channels; set "
                f"visual.region_width, which is {self.width}"
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

    def _from_folder(self, image: ImageFile) -> Regions:
        names = Path(image.name).with_suffix(".npz"), Path(image.name).with_suffix(".npz").name
        for name in names:
            if (self.source / name).exists():
                return read_npz(self.source / name)
        raise RegionsMissing(
            f"{image}: no features of this image ({self.source / names[0]}); extract them or drop its record"
        )

    def _from_tsv(self, image: ImageFile) -> Regions:
        stem = Path(image.name).stem
        number = re.search(r"\d+$", stem)
        for name in (stem, str(int(number[0])) if number else stem):
            if name in self._lines:
                with self.source.open("rb") as file:
                    file.seek(self._lines[name])
                    values = file.readline().decode().rstrip("\r\n").split("\t")
                return read_tsv_row(dict(zip(TSV_FIELDS, values, strict=True)), self.source)
        raise RegionsMissing(f"{image}: no features of this image in {self.source}; extract them or drop its record")


def _index(file: Path) -> dict[str, int]:
    """Where the line of each image begins, in bytes."""
    places, place = {}, 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            name = line.split(b"\t", 1)[0].decode(errors="replace")
            if line.count(b"\t") != len(TSV_FIELDS) - 1:
                raise DataError(
                    f"{file}: line {number} (image {name:.40}) has {line.count(b'	') + 1} fields; BUTD's are "
                    f"{', '.join(TSV_FIELDS)}"
                )
            places[name] = place
            place += len(line)
    return places


@functools.lru_cache(maxsize=8)
def _opened(source: str, most: int, width: int) -> RegionFiles:
    return RegionFiles(source, most=most, width=width)


def input_of(visual: VisualSettings) -> int | RegionFiles:
    """What a visual side reads of an image: its pixels, squeezed to this side, or its regions."""
    if visual.kind.on_grid:
        return visual.image_px
    return _opened(visual.region_files, visual.regions, visual.region_width)


def real_tokens(images: Tensor, visual: VisualSettings) -> Tensor:
    """bool (image, vision) of a batch: the visual tokens that are no padding."""
    if visual.kind.on_grid:
        return torch.ones(len(images), visual.tokens, dtype=torch.bool)
    return images[..., -1] > 0
