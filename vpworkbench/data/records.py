"""What one example is: an image on disk, and the texts true of it."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vpworkbench.data.nlvr1 import Box
from vpworkbench.errors import DataError
from vpworkbench.scenes.language import decide
from vpworkbench.scenes.scene import Scene

log = logging.getLogger(__name__)

LARGEST_MEGAPIXELS = 100


@dataclass
class Findings:
    """What readers tell of a set: faults of records that were left out, and remarks on what they did with others."""

    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


_FINDINGS: ContextVar[Findings | None] = ContextVar("findings", default=None)


@contextmanager
def collected_findings() -> Iterator[Findings]:
    """In the block a broken record does not stop its reader: its message is kept and it is left out."""
    findings = Findings()
    token = _FINDINGS.set(findings)
    try:
        yield findings
    finally:
        _FINDINGS.reset(token)


@contextmanager
def one_record() -> Iterator[None]:
    """Around the reading of one record: a `DataError` stops the reader, unless faults are being collected."""
    try:
        yield
    except DataError as error:
        findings = _FINDINGS.get()
        if findings is None:
            raise
        findings.faults.append(str(error))


def remark(text: str) -> None:
    """Tell what a reader did on its own account: as a warning, unless findings are being collected."""
    findings = _FINDINGS.get()
    if findings is None:
        log.warning("%s", text)
    else:
        findings.remarks.append(text)


@functools.lru_cache(maxsize=32)
def _archive(path: str, process: int) -> zipfile.ZipFile:
    # One handle for each process: a forked worker that shared its parent's would share the file position too.
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a whole zip file ({error}); fetch it again") from None


def archive(path: Path) -> zipfile.ZipFile:
    """The zip at `path`, opened once in each process and read in place."""
    return _archive(str(path), os.getpid())


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image in a folder or, in place, in a zip."""

    folder: Path
    name: str

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    @property
    def in_zip(self) -> bool:
        """Whether `folder` is a zip."""
        return self.folder.suffix.lower() == ".zip"

    def read(self) -> bytes:
        """The file's bytes; `DataError` where it is missing or cannot be read."""
        try:
            if self.in_zip:
                return archive(self.folder).read(self.name)
            return (self.folder / self.name).read_bytes()
        except (OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:  # zips: many ways
            raise DataError(f"{self}: image missing or unreadable ({error}); restore it or drop its record") from None

    def glimpse(self) -> tuple[int, int]:
        """(CRC-32, bytes): equal for two files of the same content, and free of cost in a zip; see `digest`.

        Files of another content share it now and then, PNGs above all: each of their chunks ends in its own CRC-32.
        """
        if self.in_zip:
            entry = archive(self.folder).getinfo(self.name)
            return entry.CRC, entry.file_size
        data = self.read()
        return zlib.crc32(data), len(data)

    def digest(self) -> bytes:
        """A hash that only files of the same content share."""
        return hashlib.blake2b(self.read(), digest_size=16).digest()

    def pixels(self, side: int | None = None) -> np.ndarray:
        """Decode as RGB, uint8 [height, width, 3]; squeezed to [side, side, 3] where `side` is given.

        Upright by its EXIF tag; the first frame of an animation; 16-bit grey scaled to 8; transparency over white.

        Raises
        ------
        DataError
            For an empty, truncated, unknown or oversized file; the message names it.
        """
        data = self.read()
        if not data:
            raise DataError(f"{self}: the image file is empty; restore it or drop its record")
        try:
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > LARGEST_MEGAPIXELS * 1e6:
                    raise DataError(
                        f"{self}: {image.width} x {image.height} px is over {LARGEST_MEGAPIXELS} megapixels; "
                        "store a smaller copy"
                    )
                rgb = _rgb(image)
                if side is not None and rgb.size != (side, side):
                    rgb = rgb.resize((side, side), Image.Resampling.BICUBIC)
                return np.array(rgb)
        except DataError:
            raise
        except UnidentifiedImageError:  # its message is an address in memory
            raise DataError(
                f"{self}: cannot be decoded (no known image format); restore it or drop its record"
            ) from None
        except (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # by format
            raise DataError(f"{self}: cannot be decoded ({error}); restore it or drop its record") from None


def _rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray(np.clip(values / 257 if values.max() > 255 else values, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def inner_name(name: str, *, source: str) -> str:
    """The name of an image as an annotation has it, made plain; `DataError` where it leaves the image folder."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\\" in name or not name.strip() or not parts:
        raise DataError(f"{source}: image name {name!r} leaves the image folder; correct the annotation")
    return "/".join(parts)


@dataclass(frozen=True, slots=True)
class Picture:
    """One image and what is said of it.

    Attributes
    ----------
    id : str
        Unique within its set.
    split : str
        `train`, `val` or `test`.
    captions, foils : tuple of str
        Texts stated as true, and as false, of the image.
    scene : Scene or None
        The ground truth of a generated image; None elsewhere.
    boxes : tuple of Box
        The ground truth of an NLVR v1 image, its structured representation; empty elsewhere.
    origins : frozenset of str
        The photograph's ids in the collections that sets draw from: `coco:391895`, `flickr:8119368305`.
    """

    id: str
    image: ImageFile
    split: str
    captions: tuple[str, ...]
    foils: tuple[str, ...] = ()
    scene: Scene | None = None
    boxes: tuple[Box, ...] = ()
    origins: frozenset[str] = frozenset()

    def object_map(self) -> np.ndarray:
        """uint8 (height, width) of a generated image: 0 background, i + 1 where `scene.things[i]` is seen."""
        folder = self.image.folder.with_name("object_maps.zip")
        data = ImageFile(folder, self.image.name.replace("images/", "object_maps/", 1)).read()
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image)

    def denies(self, text: str) -> bool:
        """Whether `text` may serve as an unmatched text of this image.

        In generated scenes the text must be false. Elsewhere any text will do that is not one of the image's captions,
        as is usual in the field.
        """
        if _is_among(text, self.captions):
            return False
        if _is_among(text, self.foils):
            return True
        return self.scene is None or decide(text, self.scene) is False

    def affirms(self, text: str) -> bool:
        """Whether `text` is known to be true of this image."""
        return _is_among(text, self.captions) or (self.scene is not None and decide(text, self.scene) is True)


@dataclass(frozen=True, slots=True)
class Example:
    """One example of a downstream task.

    Attributes
    ----------
    id : str
        As the release numbers it; unique within its file.
    images : tuple of ImageFile
        One, or two for a statement about a pair.
    text : str
        Question, statement or hypothesis.
    split : str
        `train`, `val` or `test`.
    label : str or None
        `True` / `False`, `entailment` and so on; None where the release withholds it, and for questions.
    answers : tuple of str
        People's answers to a question, as they wrote them; empty where the release withholds them.
    answer : str
        The one that stands for them, as the release tells it; empty: the most given one.
    kind : str
        VQA's answer type.
    boxes : tuple of Box
        What NLVR v1's structured representation draws; empty elsewhere.
    origins : frozenset of str
        As a picture's; none where there are two images.
    """

    id: str
    images: tuple[ImageFile, ...]
    text: str
    split: str
    label: str | None = None
    answers: tuple[str, ...] = ()
    answer: str = ""
    kind: str = ""
    boxes: tuple[Box, ...] = ()
    origins: frozenset[str] = frozenset()


def _is_among(text: str, texts: tuple[str, ...]) -> bool:
    """Case does not count: the tokenizer would make the same words of both."""
    return text.lower() in (other.lower() for other in texts)
