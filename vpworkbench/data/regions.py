"""Features and boxes of regions that a detector has found: a tsv of BUTD or LXMERT, or one npz for each image.

An npz holds `features` (region, channel), `boxes` (region, 4) in pixels as x0 y0 x1 y1, and `size` (width, height); if
a detector named what it found, also `classes` (region,), counted from 0.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vpworkbench.data.images import ImageFile
from vpworkbench.data.records import Picture
from vpworkbench.errors import DataError, RegionsMissing
from vpworkbench.system import draft

TSV_FIELDS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
LXMERT_FIELDS = ("image_id", "image_h", "image_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf")
LAYOUTS = {len(fields): fields for fields in (TSV_FIELDS, (*LXMERT_FIELDS, "num_boxes", "boxes", "features"))}
"""Columns of a tsv, by their number: BUTD's six and LXMERT's ten."""
_PART = re.compile(r"\.tsv(\.\d+)?$")
USUAL_WIDTH = 2048
"""Channels of BUTD's features: they tell float16 from float32 where no model says its width."""
ROUNDING_PX = 1.0
"""Detectors round: a box may leave its image by this much, and is cut at the border."""

IMAGE_SUFFIX = re.compile(r"\.(jpe?g|png|gif|bmp|webp|tiff?)$", re.IGNORECASE)
COCO_NAME = re.compile(r"(?:COCO_\w+_)?(\d{12})")
SCENES = "scenes.json"
"""Beside the regions of generated scenes: the settings of these scenes."""

UNREADABLE = (OSError, KeyError, ValueError, TypeError, EOFError, RuntimeError, MemoryError)
UNREADABLE += (zipfile.BadZipFile, zlib.error, struct.error)
"""What NumPy raises for an npz that is cut, has flipped bytes, or is something else."""


class Regions(NamedTuple):
    """float32 features (region, channel), and boxes (region, 4): x0 y0 x1 y1 as shares of the image."""

    features: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray | None = None  # int64 (region,)


class RegionFiles:
    """The regions of images, by the name of the image: a visual input that replaces pixels.

    Parameters
    ----------
    source : str or Path
        A folder of `<name of the image>.npz`, or a tsv whose `image_id` is that name (in COCO, its number), or a folder
        of its parts, `*.tsv` or `*.tsv.0` and so on. Features can be float32 or float16.
    most : int
        Regions of an image: the first ones in its file.
    width : int
        Channels of a feature. Only `read` needs neither `most` nor `width`.
    classes : int
        Number of classes, which all files must carry then; 0: they are not read.
    """

    def __init__(self, source: str | Path, *, most: int = 0, width: int = 0, classes: int = 0) -> None:
        self.source, self.most, self.width, self.classes = Path(source).expanduser(), most, width, classes
        if not str(source) or not self.source.exists():
            raise DataError(
                f"visual.region_files {str(source)!r}: no such folder or tsv; give BUTD's tsv or a folder with one npz "
                "for each image (docs/families.md); `vpw regions` makes them"
            )
        parts = [file for file in self.source.iterdir() if _PART.search(file.name)] if self.source.is_dir() else []
        self._lines = _line_starts([self.source] if self.source.is_file() else sorted(parts))
        self._scenes = _scene_settings(self.source / SCENES)
        self._same_scenes: set[Path] = set()  # folders and zips of images that were compared before

    def stack(self, images: Sequence[Any], mirrored: None = None) -> Tensor:
        """float32 (image, region, width + 5): features, relative box, 1 + class. Rows of 0 are padding."""
        packed = torch.zeros(len(images), self.most, self.width + 5)
        for row, one in zip(packed, images, strict=True):
            image = one.image if isinstance(one, Picture) else one
            if not isinstance(image, ImageFile):
                raise DataError("regions are found by the name of an image file; give its path, not its pixels")
            features, boxes, classes = self.regions(image)
            kinds = np.ones(len(boxes)) if classes is None else 1 + classes
            row[: len(boxes)] = torch.from_numpy(np.column_stack([features, boxes, kinds.astype(np.float32)]))
        return packed

    def regions(self, image: ImageFile) -> Regions:
        """The first `most` regions of an image; `DataError` if they have another width, and as in `read`."""
        features, boxes, classes = self.read(image)
        if features.shape[1] != self.width:
            raise DataError(
                f"{self.source}: image {image.name}: features of {features.shape[1]} channels where the model takes "
                f"{self.width}; set visual.region_width for a model of ours; for another make regions with "
                f"`vpw regions --width {self.width}`"
            )
        if not self.classes:
            return Regions(features[: self.most], boxes[: self.most])
        if classes is None or classes.max() >= self.classes:
            found = "no classes" if classes is None else f"class {classes.max()}"
            raise DataError(
                f"{self.source}: image {image.name}: {found}, and visual.classes is {self.classes}: npz files need an "
                "array `classes` with a number below it for each region; `vpw regions` writes them into a new folder"
            )
        return Regions(features[: self.most], boxes[: self.most], classes[: self.most])

    def read(self, image: ImageFile) -> Regions:
        """All regions of an image; `DataError` if there are none, or if they are broken or of other scenes."""
        place = self._place(image)
        if place is None:
            raise RegionsMissing(
                f"{image}: no features of this image in {self.source}; extract them or drop its record"
            )
        self._check_scenes(image)
        return read_npz(place) if isinstance(place, Path) else self._read_line(*place, _tsv_name(image.name))

    def check(self, images: Sequence[ImageFile]) -> None:
        """`DataError` if an image has no regions or shares another's, or if the first one's width is wrong."""
        places = {image: self._place(image) for image in images}
        if missing := [image.name for image, place in places.items() if place is None]:
            names = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
            example = f"; it has {next(iter(self._lines))!r} and so on" if self._lines else ""
            raise DataError(
                f"{self.source}: no features of {len(missing)} of {len(places)} images ({names}); extract them or drop "
                f"their records{example}"
            )
        first: dict[Path | tuple[Path, int] | None, ImageFile] = {}
        for image, place in places.items():
            other, is_of_coco = first.setdefault(place, image), COCO_NAME.fullmatch(Path(image.name).stem)
            if other.name != image.name and not is_of_coco and other.glimpse() != image.glimpse():
                raise DataError(
                    f"{self.source}: {other} and {image} would share one image's regions; put them into folders as the "
                    "images are, or give the images different names"
                )
            self._check_scenes(image)
        if images:
            self.regions(images[0])

    def check_width(self) -> None:
        """`DataError` if the first image has features of another width, or if there is none."""
        names = [f"{name}.jpg" for name in self._lines]
        if self.source.is_dir() and not self._lines:
            names = (file.relative_to(self.source).as_posix() for file in self.source.rglob("[!.]*.npz"))
        if (first := next(iter(names), None)) is None:
            raise DataError(f"{self.source}: holds no regions; give BUTD's tsv or a folder with one npz for each image")
        self.regions(ImageFile(self.source, first))

    def _place(self, image: ImageFile) -> Path | tuple[Path, int] | None:
        """The npz of an image, or its tsv and the position of its line there."""
        if self._lines:
            return self._lines.get(_tsv_name(image.name))
        name = Path(image.name).with_suffix(".npz")
        return next((file for file in (self.source / name, self.source / name.name) if file.exists()), None)

    def _read_line(self, file: Path, position: int, name: str) -> Regions:
        with file.open("rb") as lines:
            lines.seek(position)
            cells = _text(lines.readline()).rstrip("\r\n").split("\t")
        if _tsv_name(cells[0]) != name:
            raise DataError(f"{file}: image {name}: its line is broken, or the file was changed; start again")
        if len(cells) not in LAYOUTS:
            known = " or ".join(map(str, LAYOUTS))
            raise DataError(f"{file}: image {name}: {len(cells)} cells in its line, not {known}; fetch the file again")
        return read_tsv_row(dict(zip(LAYOUTS[len(cells)], cells, strict=True)), file, self.width)

    def _check_scenes(self, image: ImageFile) -> None:
        """`DataError` if image and regions are of different scenes, whose images have the same names."""
        if self._scenes is None or image.folder in self._same_scenes:
            return
        for place in (image.folder, *image.folder.parents[:2]):  # images.zip, nlvr2/images.zip
            theirs = _scene_settings(place / "settings.json")
            if theirs not in (None, self._scenes):
                raise DataError(
                    f"{self.source}: regions of other scenes ({self._scenes}) than {image} ({theirs}); make them with "
                    "`vpw regions` from the same preset, or from the folder of this set"
                )
        self._same_scenes.add(image.folder)


def checked_regions(
    features: np.ndarray, boxes: np.ndarray, size: np.ndarray, classes: np.ndarray | None = None, *, source: str
) -> Regions:
    """Regions with relative boxes; a `DataError` begins with `source`, which names the file and the image.

    Parameters
    ----------
    features, boxes : float array, (region, channel), (region, 4)
        Boxes in pixels.
    size : float array, (2,)
        Width and height of the image in pixels.
    classes : float array or None, (region,)
    """

    def fault(message: str) -> DataError:
        return DataError(f"{source}: {message}; extract this image again")

    if size.shape != (2,) or not np.isfinite(size).all() or not size.min() > 0:
        raise fault(f"an image of size {size.tolist()}, not of two positive numbers")
    if features.ndim != 2 or boxes.shape != (len(features), 4) or not len(features):
        raise fault(f"features {features.shape} and boxes {boxes.shape}, not one box x0 y0 x1 y1 for each feature")
    with np.errstate(over="ignore"):
        features = features.astype(np.float32)  # before the check: 1e300 is not finite in float32
    if not (np.isfinite(features).all() and np.isfinite(boxes).all()):
        raise fault("numbers that are not finite in float32")
    limits = np.array([*size, *size], dtype=np.float64)
    image = f"the image of {size[0]:g} x {size[1]:g} px"
    for wrong, message in (
        ((boxes < -ROUNDING_PX).any(1) | (boxes > limits + ROUNDING_PX).any(1), f"is outside {image}"),
        ((boxes[:, :2] > boxes[:, 2:]).any(1), "ends before it begins"),
        (np.full(len(boxes), boxes.max() <= 1 and limits.min() > 2), f"is in shares of {image}, not in pixels"),
    ):
        if wrong.any():
            place = int(wrong.argmax())
            raise fault(f"box {place} {np.round(boxes[place], 1).tolist()} {message}")
    if classes is not None:
        if classes.shape != (len(features),) or not (np.isfinite(classes).all() and (classes >= 0).all()):
            raise fault(f"classes {classes.shape}, not one number from 0 for each of {len(features)} regions")
        classes = classes.astype(np.int64)
    return Regions(features, (boxes.clip(0, limits) / limits).astype(np.float32), classes)


def write_regions(
    file: Path, features: np.ndarray, boxes: np.ndarray, size: Sequence[float], **more: np.ndarray
) -> None:
    """Write the npz of one image; boxes in pixels. What a detector knows `more` is kept; `classes` may be read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    given = {"features": features.astype(np.float32), "boxes": np.asarray(boxes, np.float32), "size": np.asarray(size)}
    with draft(file, durable=False) as written, open(written, "wb") as out:
        np.savez(out, **given, **more)


def read_npz(file: Path) -> Regions:
    """The regions of one image."""
    try:
        with np.load(file, allow_pickle=False) as content:
            names = ["features", "boxes", "size", *(("classes",) if "classes" in content else ())]
            parts = [np.asarray(content[name], np.float64) for name in names]
    except UNREADABLE as error:
        raise DataError(
            f"{file}: not a complete npz of numbers: features, boxes and size ({error}); extract this image again"
        ) from None
    return checked_regions(*parts, source=str(file))


def read_tsv_row(row: dict[str, str], file: Path, width: int = 0) -> Regions:
    """The regions in one line of a tsv; features and boxes are base64 of float32, or of float16.

    `width` is that of a feature, if it is known: half as many bytes are float16.
    """
    source = f"{file}: image {row['image_id']}"
    try:
        count, size = int(row["num_boxes"]), np.array([float(row["image_w"]), float(row["image_h"])])
        boxes = _numbers(row["boxes"], 4 * count)
        features = _numbers(row["features"], (width or USUAL_WIDTH) * count)
    except ValueError as error:
        raise DataError(f"{source}: no numbers, or no base64 of float32 ({error}); fetch the file again") from None
    if count < 1 or boxes.size != 4 * count or features.size % count:
        raise DataError(
            f"{source}: num_boxes is {count}, but there are {boxes.size / 4:g} boxes and {features.size} numbers of "
            "features, read as float32; fetch the file again, or drop a line without boxes"
        )
    return checked_regions(features.reshape(count, -1), boxes.reshape(count, 4), size, source=source)


def _numbers(cell: str, count: int) -> np.ndarray:
    """The numbers in a cell, float16 if half as many bytes are finite so; Python 3 wrote some files as `b'...'`."""
    data = base64.b64decode(re.sub(r"^b'(.*)'$", r"\1", cell), validate=True)
    half = np.frombuffer(data, "<f2") if count and len(data) == 2 * count else None
    return np.frombuffer(data, "<f4") if half is None or not np.isfinite(half).all() else half


def _text(line: bytes) -> str:
    return line.decode(errors="replace").removeprefix("\ufeff")


def _line_starts(files: Sequence[Path]) -> dict[str, tuple[Path, int]]:
    """The file and the position, in bytes, of each image's line; lines of field names and blank ones are left out."""
    starts: dict[str, tuple[Path, int]] = {}
    for file in files:
        position = 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                start, position = position, position + len(line)
                name = _tsv_name(_text(line).split("\t", 1)[0])
                if not line.strip() or name in ("image_id", "img_id"):
                    continue
                if name in starts:
                    raise DataError(f"{file}: line {number}: image {name} for the second time; drop one of its lines")
                starts[name] = file, start
    if files and not starts:
        raise DataError(f"{files[0]}: holds no regions; a tsv has a line of {', '.join(TSV_FIELDS)} for each image")
    return starts


def _tsv_name(name: str) -> str:
    """The name of an image in a tsv: without folder and suffix; for COCO's images the number."""
    stem = IMAGE_SUFFIX.sub("", Path(name).name)
    number = COCO_NAME.fullmatch(stem)
    return str(int(number[1])) if number else stem


def _scene_settings(file: Path) -> dict[str, Any] | None:
    """The settings that decide what each generated image shows; None without the file."""
    if not file.exists():
        return None
    settings = json.loads(file.read_text(encoding="utf-8"))
    return {key: settings.get(key) for key in ("seed", "image_px", "difficulty", "generator")}
