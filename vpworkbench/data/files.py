"""What every reader shares: texts, json and tables with clear faults, formats told by content, images found by name."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, StringConstraints, ValidationError

from vpworkbench.errors import DataError

log = logging.getLogger(__name__)

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
    found = [path / name for name in names_below(path) if name.endswith((".json", ".jsonl", ".csv"))]
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


NO_IMAGES = ("object_maps", "__MACOSX")
"""Beside generated scenes lie maps under the images' names; macOS puts copies of attributes into its zips."""


def names_below(folder: Path | str, prefix: str = "", above: frozenset[str] = frozenset()) -> Iterator[str]:
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
            yield from names_below(entry.path, f"{prefix}{entry.name}/", above | {here})
        elif entry.is_file():  # not a link to nowhere
            yield prefix + entry.name


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


# ---------------------------------------------------------------------------------------------------- findings


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
