"""Text files with records: JSON, JSON lines and CSV, read with clear faults."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vpworkbench.errors import DataError

log = logging.getLogger(__name__)

Item = tuple[str, Any]
"""The place of a record in its file, and the record as parsed; the place reads `line 3` or `images[2]`."""


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


@contextmanager
def faults_at(where: str = "") -> Iterator[None]:
    """Report a `DataError` in the block as a fault of the record at `where`, unless its message names the place."""
    try:
        yield
    except DataError as error:
        report_fault(f"{where}: {error}" if where else str(error))


def remark(message: str) -> None:
    """Report how a set was read: as a warning, unless findings are being collected."""
    if (findings := _FINDINGS.get()) is None:
        log.warning("%s", message)
    else:
        findings.remarks.append(message)


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


def files_of_set(path: str | Path, alternatives: Sequence[Sequence[str]]) -> list[Path]:
    """The annotation files of one set: `path` itself, or in a folder those of the first alternative that has any.

    An alternative is some patterns of names, whose files belong together.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; `data` takes 'scenes', or the folder or file of a set")
    if path.is_file():
        return [path]
    for names in alternatives:
        if found := [file for name in names for file in sorted(path.glob(name)) if file.name[0] != "."]:
            return found
    searched = ", ".join(dict.fromkeys(name for names in alternatives for name in names))
    raise DataError(f"{path}: holds none of {searched}; name the annotation file itself")


SPLITS = {
    "train": "train",
    "restval": "train",  # Karpathy's; it trains, as in the paper's Table 6
    "val": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "test1": "test",
    "hidden": "test",  # NLVR v1's
}
"""The name of a split in a release -> ours."""


def split_named(file: Path, otherwise: str = "") -> str:
    """The split that a file's name states, such as `captions_val2014.json`, `snli_ve_dev.jsonl`, `test1.json`."""
    found = re.search(r"(?<![a-z])(train|validation|val|dev|test)(?![a-z])", file.stem.lower())
    return SPLITS[found[1]] if found else otherwise


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


_DECODER = json.JSONDecoder()
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
        if not line.strip():
            continue
        try:
            yield f"line {number}", _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            report_fault(f"{file}: line {number}: not JSON ({error}); is the file complete?")


def json_list(file: Path, text: str) -> Iterator[Item]:
    """The items of a JSON list, one by one: all 5.4 million regions of Visual Genome at once would take gigabytes."""
    if text.lstrip()[0] != "[":
        raise DataError(f"{file}: not a JSON list; fetch it again")
    position, number = _GAP.match(text, text.index("[") + 1).end(), 0
    while text[position : position + 1] != "]":
        value, position = decode_json(text, f"{file}: [{number}]", position)
        yield f"[{number}]", value
        position, number = _GAP.match(text, position).end(), number + 1
    if text[position + 1 :].strip():
        raise DataError(f"{file}: more text after the end of its list; is it one JSON file?")


def csv_rows(file: Path, text: str) -> Iterator[Item]:
    """The header as a dict without values, then the rows, each as a dict."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)  # an open quote would swallow all rows after it
    try:
        names = reader.fieldnames = [name.strip() for name in reader.fieldnames]
        if len(set(names)) < len(names):
            raise DataError(f"{file}: a column twice in the header ({', '.join(names)}); rename one")
        yield "header", dict.fromkeys(names)
        for row in reader:
            if None in row or None in row.values():
                report_fault(f"{file}: line {reader.line_num}: not {len(names)} cells; quote texts that have commas")
            else:
                yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{file}: line {reader.reader.line_num}: not CSV ({error}); correct the quotes") from None
