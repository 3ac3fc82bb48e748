"""Image files, in folders or zips: decoded where they are, and found by the names that annotations give them."""

from __future__ import annotations

import functools
import hashlib
import io
import mimetypes
import os
import re
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from tqdm.auto import tqdm

from vpworkbench.data.files import NO_IMAGES, faults_at, names_below
from vpworkbench.errors import DataError, ImageMissing

UNDECODABLE = (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for files that are cut, too large (over 179 megapixels), or no images."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation in EXIF -> how to turn the image. Pillow's `exif_transpose` writes EXIF too; damaged tags stop it."""


def archive(path: Path) -> zipfile.ZipFile:
    """The zip at `path`, opened once in each process and read in place."""
    return _archive(str(path), os.getpid())


@functools.lru_cache(maxsize=32)
def _archive(path: str, process: int) -> zipfile.ZipFile:
    # One handle for each process: a forked worker that shared its parent's would share the file position too.
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a complete zip file ({error}); fetch it again") from None


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image in a folder or in a zip, which is `folder` then."""

    folder: Path
    name: str

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    @property
    def in_zip(self) -> bool:
        """True if `folder` is a zip."""
        return self.folder.suffix.lower() == ".zip"

    def read(self) -> bytes:
        """The file's bytes; `DataError` if it is missing or cannot be read."""
        try:
            if self.in_zip:
                return archive(self.folder).read(self.name)
            return (self.folder / self.name).read_bytes()
        except (OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:  # as zips fail
            raise ImageMissing(
                f"{self}: image missing or unreadable ({error}); restore it or drop its record"
            ) from None

    def glimpse(self) -> tuple[int, int]:
        """(CRC-32, bytes): equal for two files of the same content, and read from the index of a zip; see `digest`.

        Files of different content can have the same, PNGs above all: each of their chunks ends in its own CRC-32.
        """
        if self.in_zip:
            entry = archive(self.folder).getinfo(self.name)
            return entry.CRC, entry.file_size
        data = self.read()
        return zlib.crc32(data), len(data)

    def digest(self) -> bytes:
        """A hash that only files of the same content share."""
        return hashlib.blake2b(self.read(), digest_size=16).digest()

    def pixels(self, side: int | None = None, *, quick: bool = False) -> np.ndarray:
        """Decode as RGB, uint8 (height, width, 3); with `side`, squeezed to (side, side, 3).

        Upright by the EXIF tag; the first frame of an animation; 16-bit grey scaled to 8 bits; transparency over white.
        `quick`: a JPEG is decoded at an eighth of its size, in a third of the time.
        An `ImageMissing` names a file that is truncated, too large or no image.
        """
        data = self.read()
        try:
            with Image.open(io.BytesIO(data)) as image:
                if quick:
                    image.draft("RGB", (1, 1))
                rgb = _rgb(image)
                if side is not None and rgb.size != (side, side):
                    rgb = rgb.resize((side, side), Image.Resampling.BICUBIC)
                return np.array(rgb)
        except UNDECODABLE as error:
            reason = re.sub(r" <_io.*", "", str(error))  # an address in memory
            raise ImageMissing(f"{self}: cannot be decoded ({reason}); replace it or drop its record") from None


def read_image(image: Any) -> Image.Image:
    """An image as RGB: a path, a PIL image or a uint8 array, (height, width) or (height, width, 3 or 4)."""
    if isinstance(image, str | Path):
        path = Path(image).expanduser()
        return Image.fromarray(ImageFile(path.parent, path.name).pixels())
    is_array = isinstance(image, np.ndarray)
    if is_array and image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
        return _rgb(Image.fromarray(image))
    if not isinstance(image, Image.Image):
        found = f"an array of {image.dtype}, {image.shape}," if is_array else type(image).__name__
        raise DataError(f"{found} is no image: give a path, a PIL image or a uint8 array (height, width, 3)")
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(np.clip(values / 257 if values.max() > 255 else values, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def unreadable(images: Sequence[ImageFile], *, decode: bool = True) -> dict[ImageFile, str]:
    """The images that cannot be read, each with its fault; without `decode`, they are only looked up."""

    def fault(image: ImageFile) -> str:
        try:
            image.pixels(16, quick=True) if decode else image.glimpse()
        except ImageMissing as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        faults = tqdm(pool.map(fault, images), "opening images", len(images), unit=" images", delay=2)
        return {image: message for image, message in zip(images, faults, strict=True) if message}


_COCO_NAME = re.compile(r"(?:train|val|test)20\d\d(?:\.zip)?[_/](\d{12})\.jpg$")
_FLICKR_NAME = re.compile(r"(?:^|/)(\d+)(?:_[0-9a-f]+)?(?:_[a-z])?(?:\.jpg)?$")
_FLICKR_PLACE = re.compile(r"(?:^|/)flicke?r[^/]*/(?:[^/]+/)*(\d+(?:_[0-9a-f]+)?\.jpg)$", re.IGNORECASE)


def origins(image: ImageFile, *, name: str = "", coco: int = 0, flickr: int | str | None = None) -> frozenset[str]:
    """A photograph's ids in COCO and at Flickr, where most sets come from, as far as they are known.

    Only positive ids identify: sets write -1 or 0 where they know none.

    Parameters
    ----------
    name
        As the annotations write it. It states an id too if it is in COCO's style, or in a folder of Flickr's.
    coco
        The id as the set states it.
    flickr
        An id, a file name that begins with one (Flickr30k's, Flickr8k's), or an address (COCO's `flickr_url`).
    """
    names = f"{image.folder.name}/{image.name}", name
    photos = [*(place[1] for one in names if (place := _FLICKR_PLACE.search(one))), str(flickr or "")]
    found = {f"coco:{int(named[1])}" for one in names if (named := _COCO_NAME.search(one))} | {f"coco:{coco}"}
    found |= {f"flickr:{int(photo[1])}" for one in photos if (photo := _FLICKR_NAME.search(one))}
    return frozenset(one for one in found if int(one.partition(":")[2]) > 0)


Places = str | Path | Sequence[str | Path]
"""Folders and zips of images; empty: those beside the annotation file, see `image_index`."""


class ImageIndex:
    """The images of a set by name: in zips, anywhere below folders, and directly in the folder `flat`.

    `wider` makes an index for images that this one lacks.
    """

    def __init__(
        self, places: Sequence[str | Path], *, flat: Path | None = None, wider: Callable[[], ImageIndex] | None = None
    ) -> None:
        self.flat, self.places = flat, [Path(place).expanduser() for place in places]
        self.wider = wider
        self._by_name: dict[str, list[ImageFile]] = defaultdict(list)
        for place in self.places:
            with faults_at():  # where faults are collected, the other places still count
                for name in _names(place):
                    self._by_name[_key(name).rsplit("/", 1)[-1]].append(ImageFile(place, name))
        for name in os.listdir(flat) if flat else ():
            if (mimetypes.guess_type(name)[0] or "").startswith("image/") and name[0] != ".":
                self._by_name[_key(name)].append(ImageFile(flat, name))

    def __bool__(self) -> bool:
        return bool(self._by_name) or (self.wider is not None and bool(self.wider()))

    def find(self, *names: str) -> ImageFile:
        """The image of the first of `names` that exists; folders in a name must match the image's own.

        COCO renamed its images from 2014 to 2017, by the same ids: each name finds the other. An absolute path of
        another machine finds the image that agrees with the end of it, in one folder at least.
        An `ImageMissing` says that none exists, a `DataError` that several different ones do, or that a name leaves the
        folder.
        """
        for path in filter(os.path.isabs, names):
            if os.path.isfile(path):
                return ImageFile(Path(path).parent, Path(path).name)
        for name in chain(*map(_ends, names), *map(_other_coco_names, names)):
            matching = self._matching(_key(inner_name(name)))
            if len(matching) > 1 and len({image.digest() for image in matching}) > 1:
                raise DataError(
                    f"image {name} exists {len(matching)} times, as {matching[0]} and {matching[1]}; write the folder "
                    "before the name, or name the one place in `images`"
                )
            if matching:
                return matching[0]
        if self.wider is not None:
            return self.wider().find(*names)
        raise ImageMissing(f"image {' or '.join(names)} missing in {self}; restore it or drop the record")

    def _matching(self, wanted: str) -> list[ImageFile]:
        """Files of this name: by the path from the annotations, else from the place, else by the end of the path."""
        found = self._by_name.get(wanted.rsplit("/", 1)[-1], [])
        if len(found) == 1 and "/" not in wanted:
            return found
        tops = {image: "" if image.folder == self.flat else f"{_key(image.folder.stem)}/" for image in found}
        paths = {image: _key(image.name) for image in found}
        return (
            [image for image, path in paths.items() if wanted == tops[image] + path]
            or [image for image, path in paths.items() if wanted in (path, path.removeprefix(tops[image]))]
            or [image for image, path in paths.items() if path.endswith(f"/{wanted}")]
        )

    def __str__(self) -> str:
        places = [self.flat, *self.places] if self.flat else self.places
        return ", ".join(map(str, places[:4])) + (f" and {len(places) - 4} more places" if len(places) > 4 else "")


def image_index(file: Path, images: Places = (), wider: Callable[[], ImageIndex] | None = None) -> ImageIndex:
    """The images of an annotation file: those in the places given, else those beside it, else those of `wider`.

    Beside it are the images in its folder, and the folders and zips there. Where its folder is one of annotations only,
    such as COCO's `annotations`, VQA's `Questions` or Flickr8k's `Flickr8k_text`, also those beside that folder.
    """
    if given := [images] if isinstance(images, str | Path) else list(images):
        return ImageIndex(given)
    folder = file.absolute().parent
    beside = _places(folder) + (_places(folder.parent) if OF_TEXTS.search(folder.name) else [])
    return ImageIndex([place for place in beside if place != folder], flat=folder, wider=wider)


def images_below(folder: Path) -> ImageIndex:
    """The images in a folder and anywhere below it, also in zips there."""
    zips = [folder / name for name in names_below(folder) if "/" in name and name.lower().endswith(".zip")]
    return ImageIndex([*_places(folder), *zips], flat=folder)


OF_TEXTS = re.compile(r"(^|_)(annotation|question)s?(_(train|val|test)\w*)?$|_text$", re.IGNORECASE)
"""Names of folders without images: `annotations`, `v2_Questions_Train_mscoco`, `Flickr8k_text`."""
_OF_COCO = re.compile(r"(?:COCO_\w+_)?(\d{12}\.jpg)")
_COCO_PREFIXES = ("", "COCO_train2014_", "COCO_val2014_", "COCO_test2014_", "COCO_test2015_")


def _other_coco_names(name: str) -> list[str]:
    """What else COCO's releases call an image of this name."""
    found = _OF_COCO.fullmatch(name.rsplit("/", 1)[-1])
    return [f"{prefix}{found[1]}" for prefix in _COCO_PREFIXES] if found else []


def _ends(name: str) -> list[str]:
    """A name; of an absolute path its ends, the longest first, each with a folder: those below the image folder."""
    parts = name.split("/")[1:]
    return ["/".join(parts[start:]) for start in range(len(parts) - 1)] if os.path.isabs(name) else [name]


def inner_name(name: str) -> str:
    """The name of an image in normal form; `DataError` if it leaves the image folder."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\\" in name or not name.strip() or not parts:
        raise DataError(f"image name {name!r} leaves the image folder; correct the annotation")
    return "/".join(parts)


def _places(folder: Path) -> list[Path]:
    """Folders and zips in a folder; a folder beside its own zip is an unpacked copy, and no place."""
    shown = [one for one in sorted(folder.iterdir()) if one.stem not in NO_IMAGES and one.name[0] != "."]
    zips = {one.stem: one for one in shown if one.suffix.lower() == ".zip"}
    return [one for one in shown if one in zips.values() or (one.is_dir() and one.name not in zips)]


def _names(place: Path) -> Iterator[str]:
    """The files of a folder or zip, without hidden ones."""
    if not place.exists():
        raise DataError(f"{place}: no such folder or zip of images")
    if place.suffix.lower() != ".zip":
        yield from names_below(place)
        return
    for name in dict.fromkeys(archive(place).namelist()):
        hidden = any(part[:1] == "." or part in NO_IMAGES for part in name.split("/"))
        if not hidden and not name.endswith("/"):
            yield name


def _key(name: str) -> str:
    """A name for comparison: macOS writes é as two characters, some Windows zips use backslashes."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))
