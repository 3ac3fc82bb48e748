"""Text files with records: JSON, JSON lines and CSV, read with clear faults."""

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
from pathlib import Path
from typing import Any

from vpworkbench.errors import DataError

log = logging.getLogger(__name__)

Item = tuple[str, Any]
"""The place of a record in its file, and the record as parsed; the place reads `line 3` or `images[2]`."""

# ---------------------------------------------------------------------------------------------------- findings


@dataclass
class Findings:
    """What readers report about a set: faults of records that they left out, and remarks about how they read others."""

    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


_FINDINGS: ContextVar[Findings | None] = ContextVar("findings", default=None)


@contextmanager
def collected_findings() -> Iterator[Findings]:
    """Within the block, a broken record does not stop its reader: the fault is collected, the record left out."""
    findings = Findings()
    token = _FINDINGS.set(findings)
    try:
        yield findings
    finally:
        _FINDINGS.reset(token)


def report_fault(message: str) -> None:
    """Report a broken record: as a `DataError`, unless findings are being collected."""
    if (findings := _FINDINGS.get()) is None:
        raise DataError(message) from None
    findings.faults.append(message)


def remark(message: str) -> None:
    """Report how a set was read: as a warning, unless findings are being collected."""
    if (findings := _FINDINGS.get()) is None:
        log.warning("%s", message)
    else:
        findings.remarks.append(message)


# ----------------------------------------------------------------------------------------------------- folders

NO_IMAGES = ("object_maps", "__MACOSX")
"""Folders that hold no images of a set: object maps of generated scenes, attributes that macOS puts into zips."""


def names_below(folder: Path | str, prefix: str = "", above: frozenset[str] = frozenset()) -> Iterator[str]:
    """The files below a folder, sorted, without hidden ones. Links are followed, but not in circles."""
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


def annotation_files(path: Path) -> list[Path]:
    """The files below a folder that may hold annotations, without hidden ones; or the file itself."""
    if not path.is_dir():
        return [path]
    found = [path / name for name in names_below(path) if name.endswith((".json", ".jsonl", ".csv"))]
    return sorted(file for file in found if file.name != "image_data.json")  # read with Visual Genome's regions


SPLITS = {
    "train": "train",
    "restval": "train",  # Karpathy's; it trains, as in the paper's Table 6
    "val": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "test1": "test",
}
"""The name of a split in a release -> ours."""


def split_named(file: Path, otherwise: str = "") -> str:
    """The split that a file's name states, such as `captions_val2014.json`, `snli_ve_dev.jsonl`, `test1.json`."""
    found = re.search(r"(?<![a-z])(train|validation|val|dev|test)(?![a-z])", file.stem.lower())
    return SPLITS[found[1]] if found else otherwise


# ------------------------------------------------------------------------------------------------ text and JSON


def read_text(file: Path) -> str:
    """The text of a file, without its byte order mark; `DataError` if it is missing, empty or not UTF-8."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
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


def decode_json(text: str, where: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and the position after it; `where` names it in the message of a fault."""
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:  # a ValueError also for a number of too many digits
        raise DataError(f"{where}: not JSON ({error}); is the file complete?") from None


def json_lines(file: Path, text: str) -> Iterator[Item]:
    """The values of JSON lines; blank lines are skipped. Only \\n ends a line: U+2028 may be part of a text."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not (line := line.strip()):
            continue
        try:
            value, end = decode_json(line, f"{file}: line {number}")
            if line[end:]:
                raise DataError(f"{file}: line {number}: not JSON (more text after its end); is the file complete?")
            yield f"line {number}", value
        except DataError as error:
            report_fault(str(error))


def json_list(file: Path, text: str) -> Iterator[Item]:
    """The items of a JSON list, one by one: all 5.4 million regions of Visual Genome at once would take gigabytes."""
    position, number = _GAP.match(text, text.index("[") + 1).end(), 0
    while text[position : position + 1] != "]":
        value, position = decode_json(text, f"{file}: [{number}]", position)
        yield f"[{number}]", value
        position, number = _GAP.match(text, position).end(), number + 1
    if text[position + 1 :].strip():
        raise DataError(f"{file}: more text after the end of its list; is it one JSON file?")


def read_list(file: Path) -> Iterable[Item]:
    """The items of a JSON list in a file."""
    text = read_text(file)
    if text.lstrip()[0] != "[":
        raise DataError(f"{file}: not a JSON list; fetch it again")
    return json_list(file, text)


# --------------------------------------------------------------------------------------------------------- CSV


def csv_header(file: Path, text: str) -> list[str]:
    """The names of the columns."""
    names = [name.strip() for name in next(_csv_cells(file, text))[1]]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{file}: column {repeated.pop()!r} twice in the header; rename one")
    return names


def csv_rows(file: Path, text: str) -> Iterator[Item]:
    """The rows below the header, each as a dict."""
    header = csv_header(file, text)
    cells = _csv_cells(file, text)
    next(cells)
    for number, row in cells:
        if len(row) == len(header):
            yield f"line {number}", dict(zip(header, row, strict=True))
        else:
            report_fault(
                f"{file}: line {number}: {len(row)} cells, but the header has {len(header)}; quote texts with commas"
            )


def _csv_cells(file: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells; strict, because a quote that is never closed would swallow all rows after it."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        yield from ((reader.line_num, row) for row in reader if row)
    except csv.Error as error:
        raise DataError(f"{file}: line {reader.line_num}: not CSV ({error}); correct the quotes") from None
