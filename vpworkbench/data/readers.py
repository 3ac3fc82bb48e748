"""How annotation files are read: which format a file has, and the one loop that turns its records into ours.

A format is a value, see `Format`; `captioned` and `task_readers` list all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, StringConstraints, ValidationError

from vpworkbench.data.files import (
    Item,
    csv_rows,
    decode_json,
    json_lines,
    json_list,
    read_text,
    report_fault,
    split_named,
)
from vpworkbench.data.images import ImageIndex, Places, image_index
from vpworkbench.errors import DataError

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
"""A text in a record; a blank one is refused."""

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
    layout : str
        Where the records are. `lines`: JSON lines, or a CSV with a header. `list`: a JSON list. Any other word is the
        key of a list in a JSON object.
    read : callable
        The records of an opened file; see `each_record`.
    recognises : callable
        Whether a file of this layout has the format, by the outermost keys of its object or of its first record: a
        fault inside a record must not make the format unknown.
    """

    name: str
    title: str
    layout: str
    read: Callable[[Annotations], Iterable[R]]
    recognises: Callable[[Mapping[str, Any]], bool] = lambda keys: True
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
        """All records; `DataError` if an id occurs twice, or if there is none."""
        return unique(self.format.read(self), self.file)


def open_annotations(
    file: str | Path, formats: Iterable[Format[R]], images: Places = (), *, hint: str = ""
) -> Annotations[R]:
    """Recognise the format of a file by its content; `hint` adds to the message if it has none of `formats`."""
    file, formats = Path(file).expanduser(), list(formats)
    text = read_text(file)
    if file.suffix.lower() == ".csv":
        rows = csv_rows(file, text)
        (_, first), contents = next(rows), {"lines": rows}
    elif text.lstrip()[0] == "[":
        (_, first), contents = next(json_list(file, text), ("", None)), {"list": json_list(file, text)}
    else:
        first, end = decode_json(text, str(file), len(text) - len(text.lstrip()))
        contents = {"lines": json_lines(file, text)}
        if isinstance(first, dict) and not text[end:].strip():
            contents |= {key: numbered(key, value) for key, value in first.items() if isinstance(value, list)}
    if isinstance(first, dict):
        for form in formats:
            if form.layout in contents and form.recognises(first):
                index = image_index(file, images) if form.has_images else ImageIndex(())
                return Annotations(file, form, contents[form.layout], first, index)
    keys = f" (its keys are {', '.join(first)})" if isinstance(first, dict) and first else ""
    titles = "; ".join(form.title for form in formats)
    raise UnknownFormatError(f"{file}: unknown format{keys}; known here: {titles}{hint}")


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
            report_fault(f"{where}: {error}")


def checked(schema: type[M], raw: Any) -> M:
    """A record as its model; `DataError` names the field that is wrong."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(str(part) for part in fault["loc"])
        raise DataError(f"{field and f'{field}: '}{fault['msg']}; correct the record") from None


def unique(records: Iterable[R], file: Path) -> list[R]:
    """The records; `DataError` if an id occurs twice, or if there is none."""
    found: dict[str, R] = {}
    for record in records:
        if record.id in found:
            report_fault(f"{file}: {record.id}: a second record of this id; drop one of them")
        else:
            found[record.id] = record
    if not found:
        report_fault(f"{file}: holds no record that can be used")
    return list(found.values())


def one_line(text: str) -> str:
    """A text with single spaces and without line breaks."""
    return " ".join(text.split())
