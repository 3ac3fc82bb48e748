"""What every reader shares: texts, json and tables with clear faults, formats told by content, images found by name."""

from __future__ import annotations

import csv
import io
import json
import mimetypes
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, StringConstraints, ValidationError

from vpworkbench.data.records import ImageFile, archive, inner_name, one_record
from vpworkbench.errors import DataError

FORMATS = {
    "karpathy": "Karpathy's json (dataset_*.json)",
    "coco": "COCO captions (captions_*.json)",
    "vg": "Visual Genome (region_descriptions.json)",
    "nlvr1": "NLVR v1 json lines",
    "vqa": "VQA v2 questions",
    "vqa-answers": "VQA v2 annotations",
    "nlvr2": "NLVR2 json lines",
    "snli-ve": "SNLI-VE json lines",
    "table": "csv (with a header) or json lines with image and text",
}
"""The annotation files that are read, by what `Annotations.format` calls them."""

M = TypeVar("M", bound=BaseModel)

Places = str | Path | Sequence[str | Path]
"""Folders and zips of images; empty: those beside the annotation file, see `image_index`."""


class UnknownFormatError(DataError):
    """A file whose content is of none of `FORMATS`."""


class Annotations(NamedTuple):
    """An annotation file whose format is told, not yet its records.

    Attributes
    ----------
    format : str
        A key of `FORMATS`.
    content : dict, or iterator of (str, Any)
        A json document, or records one after another, each with its place in the file such as `line 3`.
    """

    file: Path
    format: str
    content: Any


def annotation_files(path: Path) -> list[Path]:
    """The files below a folder that may hold annotations, or the file itself; hidden ones are left out."""
    if not path.is_dir():
        return [path]
    found = [path / name for name in _names_below(path) if name.endswith((".json", ".jsonl", ".csv"))]
    return sorted(file for file in found if file.name != "image_data.json")


def open_annotations(file: str | Path) -> Annotations:
    """Read an annotation file as far as its format asks for, and tell the format by its content.

    Raises
    ------
    DataError
        For a file that is missing, not UTF-8, not json or csv; `UnknownFormatError`, which names the known ones, for
        other content.
    """
    file = Path(file).expanduser()
    text = read_text(file)
    if file.suffix.lower() == ".csv":
        return Annotations(file, "table", _with_columns(file, _csv_rows(file, text)))
    if text.lstrip()[0] == "[":
        items = _list_items(file, text)
        place, first = next(items, ("", None))
        if isinstance(first, dict) and "regions" in first:
            return Annotations(file, "vg", chain([(place, first)], items))
        raise _unknown(file)
    first, end = _decoded(file, text, len(text) - len(text.lstrip()))
    whole = not text[end:].strip()
    if whole and isinstance(first, dict) and (kind := _document_format(first)):
        return Annotations(file, kind, first)
    if isinstance(first, dict) and (kind := _line_format(first)):
        return Annotations(file, kind, _json_lines(file, text))
    raise _unknown(file)


def read_list(file: Path) -> Iterator[tuple[str, Any]]:
    """The items of a json list, each with its place in the file."""
    text = read_text(file)
    if text.lstrip()[0] != "[":
        raise DataError(f"{file}: not a json list; fetch it again")
    return _list_items(file, text)


def open_as(file: str | Path | Annotations, kind: str) -> Annotations:
    """An annotation file, opened or not, which must be of this format.

    Raises
    ------
    DataError
        Naming the format it has.
    """
    opened = file if isinstance(file, Annotations) else open_annotations(file)
    if opened.format != kind:
        raise DataError(f"{opened.file}: is {FORMATS[opened.format]}, {FORMATS[kind]} are wanted here; name that file")
    return opened


def _document_format(content: dict[str, Any]) -> str:
    """A fault inside the first record must not make a format unknown: the outer keys decide."""
    images, labels = (isinstance(content.get(key), list) for key in ("images", "annotations"))
    if images and labels:
        return "" if "categories" in content else "coco"  # else COCO's objects or key points
    if images:
        return "karpathy"
    if isinstance(content.get("questions"), list):
        return "vqa"
    return "vqa-answers" if labels else ""


def _line_format(first: dict[str, Any]) -> str:
    keys = set(first)
    if "structured_rep" in keys:
        return "nlvr1"
    if keys & {"Flickr30K_ID", "Flikr30kID", "gold_label"}:
        return "snli-ve"
    if {"identifier", "sentence"} <= keys or {"identifier", "left_url"} <= keys:
        return "nlvr2"
    return "table" if keys & {"image", "text"} else ""


def _unknown(file: Path) -> DataError:
    return UnknownFormatError(f"{file}: of no known format; known are {'; '.join(FORMATS.values())}")


# ------------------------------------------------------------------------------------------------------ texts


def read_text(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8-sig")  # with or without a byte order mark
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    if not text.strip():
        raise DataError(f"{file}: the file is empty; fetch it again")
    return text


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)
_GAP = re.compile(r"[\s,]*")


def _decoded(file: Path, text: str, start: int, place: str = "") -> tuple[Any, int]:
    """The json value that starts there, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:  # json's own error is a ValueError; so are numbers without end
        reason = f"{error.msg}, column {error.colno}" if place and isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{file}: {place and f'{place} is '}not json ({reason}); is the file whole?") from None


def _json_lines(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Blank lines are skipped. Only \\n ends a line: U+2028 and its like may stand inside a json text."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line := line.strip():
            with one_record():
                value, end = _decoded(file, line, 0, f"line {number}")
                if end < len(line):
                    raise DataError(f"{file}: line {number} is not json (more after its end); is the file whole?")
                yield f"line {number}", value


def _list_items(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The items of a json list one by one: as a whole, Visual Genome's 5.4 million regions would take gigabytes."""
    place, number = _GAP.match(text, text.index("[") + 1).end(), 0
    while text[place : place + 1] != "]":
        value, place = _decoded(file, text, place, f"[{number}]")
        yield f"[{number}]", value
        place, number = _GAP.match(text, place).end(), number + 1
    if text[place + 1 :].strip():
        raise DataError(f"{file}: more after the end of its list; is it one json file?")


def _csv_rows(file: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows by the names of the header; strict, as a quote that is never closed would swallow all rows behind it."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    try:
        for row in reader:
            if not header:
                header = [name.strip() for name in row]
                if twice := {name for name in header if header.count(name) > 1}:
                    raise DataError(f"{file}: line 1: column {twice.pop()!r} twice; rename one")
            elif row:
                with one_record():
                    if len(row) != len(header):
                        raise DataError(
                            f"{file}: line {reader.line_num}: {len(row)} cells, but the header has {len(header)}; "
                            "quote texts that hold commas"
                        )
                    yield f"line {reader.line_num}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{file}: line {reader.line_num}: not csv ({error}); correct the quotes") from None


def _with_columns(file: Path, rows: Iterator[tuple[str, dict[str, str]]]) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a table; a csv with neither of the two columns that it needs is something else."""
    place, first = next(rows, ("", {}))
    if first and not {"image", "text"} <= set(first):
        kind = DataError if {"image", "text"} & set(first) else UnknownFormatError
        raise kind(f"{file}: needs columns image and text; its header has {', '.join(first)}")
    return chain([(place, first)] if first else [], rows)


# ---------------------------------------------------------------------------------------------------- records


class _WithId(Protocol):
    id: str


R = TypeVar("R", bound=_WithId)


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
"""A text of a record, which says something: a blank one is refused."""


def checked(kind: type[M], raw: Any, where: str) -> M:
    """One record of a file as its model; `DataError` names its place and the key."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise DataError(f"{where}: {key and f'{key}: '}{fault['msg']}; correct the record") from None


def unique(records: Iterable[R], file: Path) -> list[R]:
    """The records; `DataError` where an id comes twice, or there is none."""
    found: dict[str, R] = {}
    for record in records:
        with one_record():
            if record.id in found:
                raise DataError(f"{file}: {record.id}: a second record of this id; drop one of them")
            found[record.id] = record
    with one_record():
        if not found:
            raise DataError(f"{file}: holds no record that can be used")
    return list(found.values())


SPLITS = {
    "train": "train", "restval": "train", "val": "val", "validation": "val", "dev": "val",
    "test": "test", "test1": "test",
}  # fmt: skip
"""What the releases call our three splits; Karpathy's `restval` trains, as the paper's Table 6 has it."""


def split_named(file: Path, otherwise: str = "") -> str:
    """The split that a file's name tells, such as `captions_val2014.json`, `snli_ve_dev.jsonl`, `test1.json`."""
    found = re.search(r"(?<![a-z])(train|validation|val|dev|test)(?![a-z])", file.stem.lower())
    return SPLITS[found[1]] if found else otherwise


_COCO_NAME = re.compile(r"(?:train|val|test)20\d\d(?:\.zip)?[_/](\d{12})\.jpg$")
_FLICKR_NAME = re.compile(r"(?:^|/)(\d+)(?:_[0-9a-f]+)?(?:_[a-z])?(?:\.jpg)?$")


def origins(image: ImageFile, *, coco: int | None = None, flickr: int | str | None = None) -> frozenset[str]:
    """A photograph's ids in COCO and at Flickr, of which most sets are made, as far as they are told.

    Parameters
    ----------
    image
        COCO's file names tell the id, wherever they come from.
    flickr
        An id, a file name that begins with one (Flickr30k's, Flickr8k's), or an address (COCO's `flickr_url`).
    """
    named, photo = _COCO_NAME.search(str(image)), _FLICKR_NAME.search(str(flickr or ""))
    found = {f"coco:{coco}" if coco is not None else "", f"coco:{int(named[1])}" if named else ""}
    return frozenset(found | {f"flickr:{photo[1]}" if photo else ""}) - {""}


# ----------------------------------------------------------------------------------------------------- images


class ImageIndex:
    """The images of a set by their names, wherever below a folder or in which zip they lie.

    Parameters
    ----------
    places : sequence of path
        Folders, with all below them, and zips.
    flat : path, optional
        One more folder, of which only the images right in it count.

    Raises
    ------
    DataError
        If a place does not exist or is not a whole zip.
    """

    def __init__(self, places: Sequence[str | Path], *, flat: Path | None = None) -> None:
        self.flat, self.places = flat, [Path(place).expanduser() for place in places]
        self._by_name: dict[str, list[ImageFile]] = defaultdict(list)
        for place in self.places:
            with one_record():  # where faults are collected, the other places are still looked into
                for name in _names(place):
                    self._by_name[_key(name).rsplit("/", 1)[-1]].append(ImageFile(place, name))
        for name in os.listdir(flat) if flat else ():
            if (mimetypes.guess_type(name)[0] or "").startswith("image/") and name[0] != ".":
                self._by_name[_key(name)].append(ImageFile(flat, name))

    def __bool__(self) -> bool:
        return bool(self._by_name)

    def find(self, *names: str, where: str) -> ImageFile:
        """The image of the first of `names` that is there; a name may begin with folders, which then must fit.

        Raises
        ------
        DataError
            Where none is there, several different ones are, or a name leaves the folder; it begins with `where`.
        """
        for name in names:
            fitting = self._fitting(_key(inner_name(name, source=where)))
            if len(fitting) > 1 and len({image.digest() for image in fitting}) > 1:
                raise DataError(
                    f"{where}: image {name} is there {len(fitting)} times, as {fitting[0]} and {fitting[1]}; write the "
                    "folder before the name, or name the one place in `images`"
                )
            if fitting:
                return fitting[0]
        raise DataError(f"{where}: image {' or '.join(names)} missing in {self}; restore it or drop the record")

    def _fitting(self, wanted: str) -> list[ImageFile]:
        """Files of this name: by the whole path from the annotations, else that in their place, else its end."""
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


def image_index(file: Path, images: Places = ()) -> ImageIndex:
    """Where the images of an annotation file lie: in the places given, else beside it.

    Beside it are the images in its folder, and the folders and zips there; where it lies in a folder `annotations`, as
    COCO has it, also those beside that folder.

    Raises
    ------
    DataError
        If no image is there.
    """
    if given := [images] if isinstance(images, str | Path) else list(images):
        index = ImageIndex(given)
    else:
        folder = file.absolute().parent
        beside = _places(folder) + (_places(folder.parent) if folder.name == "annotations" else [])
        index = ImageIndex([place for place in beside if place != folder], flat=folder)
    if not index:
        raise DataError(f"{file}: no images beside it; put their folder or zip there, or name it in `images`")
    return index


NO_IMAGES = ("object_maps", "__MACOSX")
"""Beside generated scenes lie maps under the images' names; macOS puts copies of attributes into its zips."""


def _places(folder: Path) -> list[Path]:
    """Zips before folders, so that an unpacked copy of a zip is not taken for another set."""
    found = [
        place
        for place in sorted(folder.iterdir())
        if (place.suffix.lower() == ".zip" or place.is_dir())
        and place.stem not in NO_IMAGES
        and not place.name.startswith(".")
    ]
    zipped = {place.stem for place in found if place.is_file()}
    return [place for place in found if place.is_file() or place.name not in zipped]


def _names(place: Path) -> list[str]:
    if place.suffix.lower() == ".zip" and place.is_file():
        names = (name for name in dict.fromkeys(archive(place).namelist()) if not name.endswith("/"))
        return [name for name in names if not any(part[:1] == "." or part in NO_IMAGES for part in name.split("/"))]
    if place.is_dir() and place.suffix.lower() != ".zip":
        return list(_names_below(place))
    if place.is_dir():
        raise DataError(f"{place}: is a folder with the name of a zip; rename it")
    raise DataError(f"{place}: no such folder or zip of images")


def _names_below(folder: Path | str, prefix: str = "", above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Files below a folder, sorted, hidden ones left out; links are followed, but not round in circles."""
    here = os.path.realpath(folder)
    if here in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror or error}); check its rights") from None
    for entry in entries:
        if entry.name[0] == "." or entry.name in NO_IMAGES:
            continue
        if entry.is_dir():
            yield from _names_below(entry.path, f"{prefix}{entry.name}/", above | {here})
        elif entry.is_file():  # not a link to nowhere
            yield prefix + entry.name


def _key(name: str) -> str:
    """Names as they are compared: macOS writes é as two characters, some Windows zips have backslashes."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))
