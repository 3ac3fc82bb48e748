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
from typing import Any, NamedTuple

from vpworkbench.errors import DataError, ImageMissing
from vpworkbench.system import write_atomically

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


class Skipped(NamedTuple):
    """A record that is left out, because its image is missing or cannot be read."""

    record: str  # its file and its place
    reason: str


SKIPPED: ContextVar[tuple[list[Skipped], float] | None] = ContextVar("skipped", default=None)
"""Within `skipping_missing`: what was left out so far, and the largest share."""


@contextmanager
def skipping_missing(missing: str, most: float) -> Iterator[list[Skipped]]:
    """Within the block, if `missing` is "skip", records without a readable image are left out, and the list names them.

    A reader stops where it loses more than the share `most` of a file. Inside another such block, the outer one counts.
    """
    outer = SKIPPED.get()
    if outer or missing != "skip":
        yield outer[0] if outer else []
        return
    skipped: list[Skipped] = []
    token = SKIPPED.set((skipped, most))
    try:
        yield skipped
    finally:
        SKIPPED.reset(token)


def write_skipped(skipped: Sequence[Skipped], folder: Path) -> None:
    """All records that were left out, in `skipped.csv` of a run's folder; nothing if there are none."""
    if skipped:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([Skipped._fields, *skipped])
        write_atomically(folder / "skipped.csv", text.getvalue())


def report_fault(message: str, error: DataError | None = None) -> None:
    """Report a broken record: as a `DataError`, unless findings are being collected, or the record is to be skipped.

    `message` names the file and the record, and if `error` is given, its message follows.
    """
    if isinstance(error, ImageMissing) and (skipping := SKIPPED.get()):
        skipping[0].append(Skipped(message, str(error)))
        return
    message = f"{message}: {error}" if error and message else message or str(error)
    if (findings := _FINDINGS.get()) is None:
        raise DataError(message) from None
    findings.faults.append(message)


@contextmanager
def faults_at(where: str = "") -> Iterator[None]:
    """Report a `DataError` in the block as a fault of the record at `where`, unless its message names the place."""
    try:
        yield
    except DataError as error:
        report_fault(where, error)


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


SPLITS = {
    "train": "train",
    "restval": "train",  # Karpathy's; it trains, as in the paper's Table 6
    "val": "val",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "test": "test",
    "test1": "test",
    "testdev": "test",  # GQA's
    "challenge": "test",
    "submission": "test",
    "hidden": "test",  # NLVR v1's
}
"""The name of a split in a release -> ours."""


_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?![a-z])")


def split_word(file: Path) -> str:
    """The split in a file's name as the release writes it: `val` in `captions_val2014.json`, `dev` in `dev.json`."""
    found = _SPLIT_WORD.search(file.stem.lower())
    return found[1] if found else ""


def split_named(file: Path, otherwise: str = "") -> str:
    """The split that a file's name states, such as `captions_val2014.json`, `snli_ve_dev.jsonl`, `test1.json`."""
    return SPLITS.get(split_word(file), otherwise)


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
_GAP, _AFTER_KEY = re.compile(r"[\s,]*"), re.compile(r"\s*:\s*")


def decode_json(text: str, where: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and the position after it; `where` names it in the message of a fault."""
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:  # a ValueError also for a number of too many digits
        raise DataError(f"{where}: not JSON ({error}); is the file complete?") from None


def json_members(text: str, where: str) -> Iterator[tuple[str, Any]]:
    """Where a JSON object may hold records, with the first of them: lists by their key, `values`, and `lines`.

    `lines` has the object itself, which may be the first of JSON lines. Only what is asked for is parsed.
    """
    position, whole = _GAP.match(text, text.index("{") + 1).end(), {}
    while text[position : position + 1] != "}":
        key, position = decode_json(text, where, position)
        colon = _AFTER_KEY.match(text, position)
        if not colon or not isinstance(key, str):
            raise DataError(f"{where}: not JSON (no key and colon at char {position}); is the file complete?")
        position = colon.end()
        start = _GAP.match(text, position + 1).end()
        if text[position : position + 1] == "[" and text[start : start + 1] != "]":
            yield key, decode_json(text, where, start)[0]
        whole[key], position = decode_json(text, where, position)
        if isinstance(whole[key], dict):
            yield "values", whole[key]
        position = _GAP.match(text, position).end()
    yield "lines", whole


_TOKEN = re.compile(r"(\S+?\.\w+)#\d+\t(.*)")


def token_lines(file: Path, text: str) -> Iterator[Item]:
    """Lines of Flickr8k and Flickr30k, an image, a number and a caption; none if the first line has another form."""
    for number, line in enumerate(text.lstrip().split("\n"), start=1):
        if found := _TOKEN.fullmatch(line.rstrip("\r")):
            yield f"line {number}", {"image": found[1], "text": found[2]}
        elif number == 1:
            return
        elif line.strip():
            report_fault(f"{file}: line {number}: not an image, #, a number, a tab and a caption; correct the line")


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
    between = max(",\t;|", key=text.lstrip().partition("\n")[0].count)
    options = {"delimiter": between, "skipinitialspace": True, "strict": True}  # strict: an open quote is a fault
    reader = csv.DictReader(io.StringIO(text, newline=""), **options)
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
