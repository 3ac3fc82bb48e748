"""Features and boxes of regions that a detector found before: BUTD's tsv, or one npz for each image.

An npz holds `features` (region, channel), `boxes` (region, 4) in pixels as x0 y0 x1 y1, and `size` (width, height).
"""

from __future__ import annotations

import base64
import binascii
import json
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

from vpworkbench.data.images import ImageFile
from vpworkbench.data.records import Example, Picture
from vpworkbench.errors import DataError, RegionsMissing

TSV_FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
OUTSIDE_PX = 1.0
"""Detectors round: a box may leave its image by so much, and is cut there."""
NUMBERS = "fiu"  # kinds of numpy: no truth values, complex numbers, texts
OF_COCO = re.compile(r"(?:COCO_\w+_)?(\d{12})")
"""A name of COCO's, and the number that detectors know the image by."""
IMAGES = re.compile(r"\.(jpe?g|png|gif|bmp|webp|tiff?)$", re.IGNORECASE)
SCENES = "scenes.json"
"""Beside the regions of generated scenes: the settings of these, as images have the same names whatever their seed."""
DRAWN_BY = ("seed", "image_px", "difficulty", "generator")
UNREADABLE = (OSError, KeyError, ValueError, TypeError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile,
              zlib.error, struct.error)  # fmt: skip
"""What numpy raises at an npz that is cut, has flipped bytes, or is none."""


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
    outside = (boxes < -OUTSIDE_PX).any(1) | (boxes > limits + OUTSIDE_PX).any(1)
    shares = np.full(len(boxes), boxes.max() <= 1 and limits.min() > 2)
    for wrong, what in (
        (outside, f"is outside the image of {size[0]:g} x {size[1]:g} px"),
        ((boxes[:, :2] > boxes[:, 2:]).any(1), "ends before it begins"),
        (shares, f"and all others lie in the first pixel of {size[0]:g} x {size[1]:g}, as shares of the image would"),
    ):
        if wrong.any():
            place = int(wrong.argmax())
            raise DataError(
                f"{source}: box {place} {np.round(boxes[place], 1).tolist()} {what}; boxes are x0 y0 x1 y1 in pixels "
                "of the image's size"
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
    if count < 1:
        raise DataError(f"{source}: num_boxes is {count}; an image needs a region at least; drop its line")
    if boxes.size != 4 * count or features.size % count:
        raise DataError(
            f"{source}: num_boxes is {count}, but {boxes.size / 4:g} boxes and {features.size} numbers of features "
            "are there, read as float32; fetch the file again"
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
        Regions of an image, the first ones of its file; channels of a feature. Only `read` does without.
    """

    def __init__(self, source: str | Path, *, most: int = 0, width: int = 0) -> None:
        self.source, self.most, self.width = Path(source).expanduser(), most, width
        if not str(source) or not self.source.exists():
            raise DataError(
                f"visual.region_files {str(source)!r}: no such folder or tsv; give BUTD's tsv or a folder with "
                "one npz for each image, as docs/families.md describes; of scenes and NLVR v1 `vpw regions` makes them"
            )
        self._lines = {} if self.source.is_dir() else _index(self.source)
        self._drawn = _drawn_by(_read_json(self.source / SCENES)) or _drawn_in(_read_json(self.source / "config.json"))
        self._alike = {self.source}  # folders and zips of images that are known to be of these scenes

    def check(self, records: Sequence[Picture | Example]) -> None:
        """`DataError` where an image has no regions or shares another's, or where the first one's width is wrong."""
        images = [image for one in records for image in (one.images if isinstance(one, Example) else (one.image,))]
        self.check_images(images)
        if images:
            self.regions(images[0])

    def check_images(self, images: Iterable[ImageFile]) -> None:
        """`DataError` where some images have no regions, or two names the same file; no regions are read."""
        known = {image: self._place(image) for image in dict.fromkeys(images)}
        missing = [image.name for image, place in known.items() if place is None]
        if missing:
            there = f"; it has {next(iter(self._lines))!r} and so on" if self._lines else ""
            raise DataError(
                f"{self.source}: no features of {len(missing)} of {len(known)} images ({', '.join(missing[:3])}"
                f"{', ...' if missing[3:] else ''}); extract them or drop their records{there}"
            )
        sharing: dict[Path | int | None, ImageFile] = {}
        for image, place in known.items():
            other = sharing.setdefault(place, image)
            if other.name != image.name and not _are_same(other, image):
                raise DataError(
                    f"{self.source}: {other} and {image} would share one image's regions; lay them in folders as the "
                    "images lie, or give the images names of their own"
                )
        for image in known:
            self._check_scenes(image)

    def check_width(self) -> None:
        """`DataError` where the first image that comes has features of another width, or none is there."""
        if self.source.is_dir():
            names = (file.relative_to(self.source).as_posix() for file in self.source.rglob("[!.]*.npz"))
        else:
            names = (f"{name}.jpg" for name in self._lines)
        first = next(iter(names), None)
        if first is None:
            raise DataError(f"{self.source}: holds no regions; give BUTD's tsv or a folder with one npz for each image")
        self.regions(ImageFile(self.source, first))

    def read(self, image: ImageFile) -> Regions:
        """All of one image; `DataError` where there are none, where they are broken, or of another image."""
        place = self._place(image)
        if place is None:
            raise RegionsMissing(
                f"{image}: no features of this image in {self.source}; extract them or drop its record"
            )
        self._check_scenes(image)
        return read_npz(place) if isinstance(place, Path) else self._line(place, _known_as(image.name))

    def regions(self, image: ImageFile) -> Regions:
        """The first ones of an image; `DataError` as of `read`, and where they are of another width."""
        found = self.read(image)
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
        for row, one in zip(packed, images, strict=True):
            image = one.image if isinstance(one, Picture) else one
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
        return self._lines.get(_known_as(image.name))

    def _line(self, place: int, name: str) -> Regions:
        with self.source.open("rb") as file:
            file.seek(place)
            values = _text(file.readline()).rstrip("\r\n").split("\t")
        if len(values) != len(TSV_FIELDS) or _known_as(values[0]) != name:
            raise DataError(f"{self.source}: no longer what it was when it was opened, at image {name}; start again")
        return read_tsv_row(dict(zip(TSV_FIELDS, values, strict=True)), self.source)

    def _check_scenes(self, image: ImageFile) -> None:
        """`DataError` where image and regions are of different scenes, which have the same names."""
        if self._drawn is None or image.folder in self._alike:
            return
        around = (image.folder, *image.folder.parents[:2])  # images.zip, nlvr2/images.zip
        told = (_drawn_by(_read_json(place / "settings.json")) for place in around)
        theirs = next(filter(None, told), None)
        if theirs not in (None, self._drawn):
            other = ", ".join(f"{key} {self._drawn[key]}, not {theirs[key]}" for key in DRAWN_BY
                              if self._drawn[key] != theirs[key])  # fmt: skip
            raise DataError(
                f"{self.source}: regions of other scenes ({other}) than {image}; make those of this set by `vpw "
                "regions`, with the same preset, or its folder"
            )
        self._alike.add(image.folder)


def _known_as(name: str) -> str:
    """An image by the name that a tsv has: no folder, no ending; of COCO's the number."""
    stem = IMAGES.sub("", Path(name).name)
    number = OF_COCO.fullmatch(stem)
    return str(int(number[1])) if number else stem


def _are_same(one: ImageFile, other: ImageFile) -> bool:
    """Whether two sets have the same image in different folders: by its number in COCO, else by its content."""
    if OF_COCO.fullmatch(Path(one.name).stem):
        return True
    try:
        return one.glimpse() == other.glimpse()
    except (DataError, KeyError, OSError):
        return True  # without pixels nobody can tell


def _drawn_by(settings: Any) -> dict[str, Any] | None:
    """What generated scenes depend on, image by image, of their settings; None where these are of something else."""
    try:
        return {key: settings[key] for key in DRAWN_BY}
    except (KeyError, TypeError):
        return None


def _drawn_in(config: Any) -> dict[str, Any] | None:
    """The same of a run of `vpw regions` before it wrote `SCENES`: where it made the regions of its own scenes."""
    try:
        return _drawn_by(config["settings"]["scenes"]) if config["settings"]["source"] == "scenes" else None
    except (KeyError, TypeError):
        return None


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _text(line: bytes) -> str:
    return line.decode(errors="replace").removeprefix("\ufeff")


def _index(file: Path) -> dict[str, int]:
    """Where the line of each image begins, in bytes; a line of field names and blank ones are passed over."""
    places, place = {}, 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            begin, place = place, place + len(line)
            name = _known_as(_text(line).split("\t", 1)[0])
            if not line.strip() or name == TSV_FIELDS[0]:
                continue
            if line.count(b"\t") != len(TSV_FIELDS) - 1:
                raise DataError(
                    f"{file}: line {number} (image {name.strip():.40}) has {line.count(b'	') + 1} fields; BUTD's are "
                    f"{', '.join(TSV_FIELDS)}"
                )
            if name in places:
                raise DataError(f"{file}: line {number}: image {name} for the second time; drop one of its lines")
            places[name] = begin
    if not places:
        raise DataError(f"{file}: holds no regions; a tsv has a line of {', '.join(TSV_FIELDS)} for each image")
    return places
