"""One's own data: a csv with a header, or json lines, of `image`, `text` and, if wanted, `label`, `split`, `image2`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from pydantic import BaseModel, Field

from vpworkbench.data.files import SPLITS, Annotations, checked, one_record, remark, split_named
from vpworkbench.data.images import ImageFile, ImageIndex
from vpworkbench.errors import DataError

HELD_OUT_SHARE = 0.1
TRUE_FALSE = {"true": "True", "false": "False", "1": "True", "0": "False"}


class Row(NamedTuple):
    """A row whose images are found; `label`, as written, and `split` are empty where nothing tells them."""

    where: str
    id: str
    image: str
    images: tuple[ImageFile, ...]
    text: str
    label: str
    split: str


class _Row(BaseModel):
    image: str = Field(min_length=1)
    text: str = Field(min_length=1)
    image2: str | None = None
    label: bool | int | str | None = None
    split: str | None = None
    id: int | str | None = None


def read_rows(table: Annotations, images: ImageIndex) -> list[Row]:
    """The rows of a table, in order, each in a split.

    `split` is `train`, `val` or `test`; an empty cell trains. Without such a column the file's name decides
    (`val.csv`); where that tells nothing either, a tenth of the images validates, chosen by a hash of their names: the
    same images in every run, also when rows are added.

    Raises
    ------
    DataError
        For a broken row, an unknown split, a missing image.
    """
    rows = read_unsplit_rows(table, images)
    if not rows or any(row.split for row in rows):
        return [row._replace(split=row.split or "train") for row in rows]
    held_out = _tenth(row.image for row in rows)
    remark(f"{table.file}: no column split: {len(held_out)} images, chosen by their names, validate, the others train")
    return [row._replace(split="val" if row.image in held_out else "train") for row in rows]


def read_unsplit_rows(table: Annotations, images: ImageIndex) -> list[Row]:
    """As `read_rows`, but `split` is empty where neither a column nor the file's name tells it."""
    rows: list[Row] = []
    unread: set[str] = set()
    for place, raw in table.content:
        if isinstance(raw, dict):
            unread |= set(raw) - set(_Row.model_fields)
        with one_record():
            rows.append(_row(table, place, raw, images))
    if unread:
        remark(f"{table.file}: columns that are not read: {', '.join(sorted(unread))}")
    return rows


def _row(table: Annotations, place: str, raw: Any, images: ImageIndex) -> Row:
    record = checked(_Row, raw, f"{table.file}: {place}")
    where = f"{table.file}: {place} ({record.image})"
    split = (record.split or "").strip().lower()
    if split and split not in SPLITS:
        raise DataError(f"{where}: unknown split {record.split!r}; known are {', '.join(SPLITS)}")
    otherwise = "train" if "split" in record.model_fields_set else ""
    text = " ".join(record.text.split())
    if not text:
        raise DataError(f"{where}: an empty text; remove the row or give its text")
    return Row(
        where=where,
        id=str(record.id) if record.id not in (None, "") else f"{table.file.stem}, {place}",
        image=record.image,
        images=tuple(images.find(name, where=where) for name in (record.image, record.image2) if name),
        text=text,
        label="" if record.label is None else str(record.label).strip(),
        split=SPLITS.get(split) or split_named(table.file, otherwise),
    )


def _tenth(names: Iterable[str]) -> set[str]:
    """A tenth of the names by their hashes, at least one."""
    hashes = {name: int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64 for name in names}
    least = min(hashes.values(), default=0)
    return {name for name, value in hashes.items() if value < HELD_OUT_SHARE or value == least}


def true_or_false(row: Row) -> str:
    """The label as `True` or `False`.

    Raises
    ------
    DataError
        For another label.
    """
    if row.label.lower() not in TRUE_FALSE:
        raise DataError(f"{row.where}: label {row.label!r}; true or false is wanted here")
    return TRUE_FALSE[row.label.lower()]
