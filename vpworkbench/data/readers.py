"""How annotation files are read: which format a file has, which files make a set, and the loop over their records.

A format is a value, see `Format`; `captioned`, `task_readers` and `questions` list them. The reader of a run and the
doctor find files in one way, `files_below` and `preferred`: what one of them reads, the other reads too.
"""

from __future__ import annotations

import functools
import os
import re
from collections import ChainMap, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, StrictInt, StringConstraints, ValidationError

from vpworkbench.data.files import (
    SKIPPED,
    Item,
    Skipped,
    csv_rows,
    decode_json,
    faults_at,
    json_lines,
    json_list,
    json_members,
    names_below,
    read_text,
    remark,
    report_fault,
    split_named,
    token_lines,
)
from vpworkbench.data.images import ImageIndex, Places, image_index, images_below, unreadable
from vpworkbench.errors import DataError

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
"""A text in a record; a blank one is refused."""
AnyText = Annotated[str, StringConstraints(min_length=0)]
"""A text as it is, also an empty one. The constraint makes pydantic refuse half a character of UTF-16, as in `Text`."""
Id = Annotated[StrictInt, BeforeValidator(lambda value: int(value) if re.fullmatch(r"\d+", str(value)) else value)]
"""A whole number, also as digits in quotes."""
Name = Annotated[AnyText, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""A text, also written as a whole number."""
TRUE_FALSE = {"true": "True", "false": "False", "1": "True", "0": "False"}
Truth = Annotated[
    Literal["True", "False"], BeforeValidator(lambda value: TRUE_FALSE.get(str(value).strip().lower(), value))
]
"""True or false: a boolean of JSON, 0 or 1, or the word in any case."""

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
R = TypeVar("R")


class UnknownFormatError(DataError):
    """A file whose content has none of the formats that are expected."""


@dataclass(frozen=True)
class Format(Generic[R]):
    """A published annotation format: how a file of it is recognised, and how its records are read.

    Attributes
    ----------
    name, title : str
        Short, for tables; and long, for messages.
    layouts : tuple of str
        Where the records can be. `lines`: JSON lines, or a CSV with a header. `list`: a JSON list. `values`: a JSON
        object of records by their ids. `tokens`: lines `name.jpg#0`, a tab, a caption. Any other word is the key of a
        list in a JSON object.
    read : callable
        The records of an opened file; see `each_record`.
    recognises : callable
        Whether the keys of the first record (of a CSV, its header) are those of this format.
    aside : str
        Names, as a pattern: in a folder these files are not read where others of their split are. They are subsets,
        or the same records in another form.
    """

    name: str
    title: str
    layouts: tuple[str, ...]
    read: Callable[[Annotations], Iterable[R]]
    recognises: Callable[[Set[str]], bool] = lambda keys: True
    aside: str = r"(?!)"
    has_images: bool = True


@dataclass(frozen=True)
class Annotations(Generic[R]):
    """An annotation file whose format is known, and the images it refers to.

    Attributes
    ----------
    items
        The records as parsed, one after another, each with its place.
    first : mapping
        The JSON object that holds the records; of a list or of lines the first record, of a CSV the header.
    """

    file: Path
    format: Format[R]
    items: Iterable[Item]
    first: Mapping[str, Any]
    images: ImageIndex

    @property
    def split(self) -> str:
        """The split that the file's name states, else `train`."""
        return split_named(self.file, "train")

    def read(self) -> list[R]:
        """All records; `DataError` if an id occurs twice, or if there is none.

        Inside `skipping_missing`, those without a readable image are left out and counted.
        """
        if (skipping := SKIPPED.get()) is None:
            return unique(self.format.read(self), self.file)
        skipped, most = skipping
        before, records = len(skipped), list(self.format.read(self))
        broken = unreadable(list(dict.fromkeys(image for record in records for image in record.images)))
        kept = []
        for record in records:
            if fault := next((broken[image] for image in record.images if image in broken), ""):
                skipped.append(Skipped(f"{self.file}: {record.id}", fault))
            else:
                kept.append(record)
        if lost := skipped[before:]:
            count = len({one.reason for one in lost})  # of images: a record may be one of its captions, or all of them
            total = count + len({image for record in kept for image in record.images})
            what = f"{self.file}: {count} of {total} images are missing or unreadable"
            if count > most * total:
                raise DataError(f"{what}, more than the share missing_most = {most:g}: {lost[0].reason}")
            names = [one.record.removeprefix(f"{self.file}: ") for one in lost[:5]] + ["..."] * (len(lost) > 5)
            remark(f"{what}; left out: {', '.join(names)}")
        return unique(kept, self.file)


def open_annotations(
    file: str | Path,
    formats: Iterable[Format[R]],
    images: Places = (),
    *,
    hint: str = "",
    wider: Callable[[], ImageIndex] | None = None,
) -> Annotations[R]:
    """Open a file of one of `formats`, recognised by its content; else an `UnknownFormatError`, which `hint` ends."""
    file, formats = Path(file).expanduser(), list(formats)
    text = read_text(file)
    form, layout, first = _recognised(file, text, formats, hint)
    rows = csv_rows if _is_csv(file, text) else json_lines
    if reader := {"lines": rows, "list": json_list, "tokens": token_lines}.get(layout):
        items = reader(file, text)
    else:
        first, end = decode_json(text, str(file), len(text) - len(text.lstrip()))
        if text[end:].strip():
            raise DataError(f"{file}: more text after the end of its object; is it one JSON file?")
        if layout == "values":  # records by their ids
            items = (
                (f'"{key}"', {"question_id": key} | one if type(one) is dict else one) for key, one in first.items()
            )
        elif isinstance(first[layout], list):
            items = numbered(layout, first[layout])
        else:
            raise DataError(f"{file}: the key {layout} twice; drop one")
    if _is_csv(file, text):
        next(items)  # the header
    index = image_index(file, images, wider) if form.has_images else ImageIndex(())
    if form.has_images and not index and not os.path.isabs(str(first.get("image"))):
        raise DataError(f"{file}: no images beside it; put their folder or zip there, or name it in `images`")
    return Annotations(file, form, items, first, index)


def format_of(file: Path, formats: Sequence[Format]) -> Format:
    """The format of a file; an `UnknownFormatError` if it has none of `formats`."""
    return _recognised(file, read_text(file), formats)[0]


def _is_csv(file: Path, text: str) -> bool:
    return file.suffix.lower() in (".csv", ".tsv") or text.lstrip().startswith("image,caption")  # Flickr8k's at Kaggle


def _recognised(
    file: Path, text: str, formats: Sequence[Format], hint: str = ""
) -> tuple[Format, str, Mapping[str, Any]]:
    """The format of a file, where in it the records are, and the first of them."""
    start = len(text) - len(text.lstrip())
    places: Iterable[tuple[str, Any]]
    if _is_csv(file, text):
        places = [("lines", next(csv_rows(file, text))[1])]
    elif text[start] == "[":
        some = [record for _, record in islice(json_list(file, text), 3) if isinstance(record, dict)]
        places = [("list", dict(ChainMap(*some)))]  # a key that only the first lacks is a fault of that record
    elif text[start] == "{":
        places = json_members(text, str(file))
    elif next(token_lines(file, text), None):
        places = [("tokens", {})]
    else:
        places = [("lines", decode_json(text, str(file), start)[0])]
    first: Any = {}
    for layout, first in places:
        for form in formats:
            if isinstance(first, dict) and layout in form.layouts and form.recognises(first.keys()):
                return form, layout, first
    keys = f" (its keys are {', '.join(list(first)[:12])})" if isinstance(first, dict) and first else ""
    titles = "; ".join(form.title for form in formats)
    raise UnknownFormatError(f"{file}: unknown format{keys}; known here: {titles}{hint}")


# ------------------------------------------------------------------------------------------- the files of a set

_OF_TEXTS = re.compile(r".*\.(jsonl?|csv|token|token\.txt)|captions\.txt|esnli.*\.tsv", re.IGNORECASE)
"""Other tsv are regions, too large to be opened for a look."""
_OF_OTHER_THINGS = re.compile(
    r"(instances|person_keypoints|stuff|panoptic|image_info)_.*|.*scene_?graphs?\.json|"
    r"(image_data|objects|attributes|relationships|region_graphs|question_to_region\w*|\w+_(aliases|synsets))\.json",
    re.IGNORECASE,
)
"""Files of COCO, Visual Genome and GQA without texts; they are too large to be opened for a look."""


Groups = tuple[tuple[Format, ...], ...]
"""Formats that a set can have. Those of one group tell the same in different forms; the last group is custom tables."""


class Found(NamedTuple):
    """The annotation files below a folder: by the name of their format, and the others, each with the reason."""

    files: dict[str, list[Path]]
    unread: list[str]


def files_below(folder: Path, formats: Sequence[Format]) -> Found:
    """Look at every file below a folder; one that cannot be parsed is a fault."""
    found = Found(defaultdict(list), [])
    for name in names_below(folder):
        file = folder / name
        if not _OF_TEXTS.fullmatch(file.name) or file.name == "image_data.json":  # read with Visual Genome's regions
            continue
        if _OF_OTHER_THINGS.fullmatch(file.name):
            found.unread.append(f"{file}: by its name without texts")
            continue
        if not file.stat().st_size:  # few scenes can have no statement
            found.unread.append(f"{file}: the file is empty")
            continue
        with faults_at():
            try:
                found.files[format_of(file, formats).name].append(file)
            except UnknownFormatError as error:
                found.unread.append(str(error).partition("; known here")[0])
    return found


def preferred(found: Found, groups: Groups, folder: Path) -> dict[Path, Format]:
    """The files of the set in a folder, and their formats; without those put aside, see `Format`.

    Each group contributes those of its first format that any file has, the last group only if the others have none.
    """
    chosen: dict[Path, Format] = {}
    for group in groups[:-1] + (() if any(found.files.get(one.name) for one in chain(*groups[:-1])) else groups[-1:]):
        form = next((one for one in group if found.files.get(one.name)), None)
        files = found.files[form.name] if form else []
        first = [file for file in files if not re.search(form.aside, file.relative_to(folder).as_posix())]
        splits = {split_named(file) for file in first}
        chosen |= {file: form for file in files if file in first or split_named(file) not in splits}
    return chosen


def open_set(path: str | Path, groups: Groups, images: Places = (), *, hint: str = "") -> Iterator[Annotations]:
    """Open the annotation files of a set, by its folder, see `preferred`, or by one file.

    Images are in the places given, else beside each file, else anywhere below the folder.
    """
    path, formats = Path(path).expanduser(), list(chain(*groups))
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; `data` takes 'scenes', or the folder or file of a set")
    if path.is_file():
        yield open_annotations(path, formats, images, hint=hint)
        return
    found = files_below(path, formats)
    chosen = preferred(found, groups, path)
    if not chosen:
        known, unread = "; ".join(one.title for one in formats), found.unread
        others = f" (not read: {'; '.join(unread[:3])}{'; ...' * (len(unread) > 3)})" if unread else ""
        raise DataError(f"{path}: holds no annotation file of a known format{others}; known here: {known}{hint}")
    if more := [file for files in found.files.values() for file in files if file not in chosen]:
        names = ", ".join(str(file.relative_to(path)) for file in more[:3]) + (", ..." if more[3:] else "")
        read = ", ".join(dict.fromkeys(form.title for form in chosen.values()))
        remark(f"{path}: read as {read}; {len(more)} other annotation files are not read: {names}")
    wider = functools.cache(lambda: images_below(path))
    for file, form in chosen.items():
        yield open_annotations(file, [form], images, wider=wider)


# ------------------------------------------------------------------------------------------- the records of a file


def numbered(key: str, values: Iterable[Any]) -> Iterator[Item]:
    """The values of a list in a JSON object, each with its place."""
    return ((f"{key}[{number}]", value) for number, value in enumerate(values))


def each_record(schema: type[M], name: str) -> Callable[[Annotations[R]], Iterator[R]]:
    """For `Format.read`: every record is checked by a schema, and becomes what its method `records` yields."""
    return lambda annotations: convert(
        annotations.file, annotations.items, schema, name, lambda record: record.records(annotations)
    )


def convert(
    file: Path, items: Iterable[Item], schema: type[M], name: str, use: Callable[[M], Iterable[T]]
) -> Iterator[T]:
    """Check each record of a file by a schema, and yield what `use` makes of it; `name` is the field of its id.

    A fault names the file, the place and the record; a second record of the same id is one.
    """
    known: set[str] = set()
    for place, raw in items:
        where = f"{file}: {place}"
        try:
            record = checked(schema, raw)
            key = str(getattr(record, name))
            where = f"{where} ({key})"
            if key in known:
                raise DataError("a second record of this id; drop one of them")
            known.add(key)
            yield from use(record)
        except DataError as error:
            report_fault(where, error)


def checked(schema: type[M], raw: Any) -> M:
    """A record as its model; `DataError` names the field that is wrong."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(str(part) for part in fault["loc"])
        raise DataError(f"{field and f'{field}: '}{fault['msg']}; correct the record") from None


def unique(records: Iterable[R], file: str | Path) -> list[R]:
    """The records; `DataError` if an id occurs twice, or if there is none."""
    found: dict[str, R] = {}
    for record in records:
        if record.id in found:
            where = ", in two files of this folder" if Path(file).is_dir() else ""
            report_fault(f"{file}: {record.id}: a second record of this id{where}; drop one of them")
        else:
            found[record.id] = record
    if not found:
        report_fault(f"{file}: holds no record that can be used")
    return list(found.values())


def one_line(text: str) -> str:
    """A text with single spaces and without line breaks."""
    return " ".join(text.split())
