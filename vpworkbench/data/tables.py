"""Custom tables: CSV or JSON lines of `image` and `text`, with `label`, `split`, `image2` and `id` if wanted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from vpworkbench.data.files import SPLITS, faults_at, remark, split_named
from vpworkbench.data.images import ImageFile
from vpworkbench.data.readers import Annotations, AnyText, Text, checked, one_line
from vpworkbench.errors import DataError

VAL_SHARE = 0.1


class Row(NamedTuple):
    """A text whose images exist; `label` as written. `label` and `split` are empty where nothing states them."""

    where: str
    id: str
    image: str
    images: tuple[ImageFile, ...]
    text: str
    label: str
    split: str


class _Row(BaseModel):
    model_config = ConfigDict(extra="allow")

    image: str = Field(min_length=1)
    text: Text = Field(validation_alias=AliasChoices("text", "caption"))
    image2: str | None = None
    label: bool | int | str | None = None
    split: str | None = None
    id: int | AnyText | None = None


def read_rows(table: Annotations) -> list[Row]:
    """The rows of a table, in order, each in a split.

    The column `split` is `train`, `val` or `test`; an empty cell trains. Without that column the file's name decides
    (`val.csv`). If the name states no split, a tenth of the images validates, chosen by a hash of their names: the same
    images in every run, also after rows were added.
    """
    return split_rows(read_unsplit_rows(table), table.file)


def split_rows(rows: list[Row], file: Path) -> list[Row]:
    """Rows in splits: those without one train; if none has one, a tenth of the images validates."""
    if not rows or any(row.split for row in rows):
        return [row._replace(split=row.split or "train") for row in rows]
    val = validating({row.image for row in rows})
    remark(f"{file}: no split is stated: {len(val)} images, chosen by their names, validate, the others train")
    return [row._replace(split="val" if row.image in val else "train") for row in rows]


def validating(names: Iterable[str]) -> set[str]:
    """A tenth of these names, at least one, by a hash: the same in every run, also after others were added."""
    digests = {name: hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names}
    hashes = {name: int.from_bytes(digest) / 2**64 for name, digest in digests.items()}
    least = min(hashes.values())
    return {name for name, value in hashes.items() if value < VAL_SHARE or value == least}


def read_unsplit_rows(table: Annotations) -> list[Row]:
    """The texts of a table, in order; `split` is empty where neither a column nor the file's name states it."""
    if "image" not in table.first or {"text", "caption"}.isdisjoint(table.first):
        raise DataError(f"{table.file}: needs columns image and text; it has {', '.join(table.first)}")
    rows: list[Row] = []
    ignored: set[str] = set()
    for place, raw in ((place, one) for place, given in table.items for one in _each_text(given)):
        where = f"{table.file}: {place}"
        with faults_at(where):
            record = checked(_Row, raw)
            ignored |= set(record.model_extra or ())
            split = (record.split or "").strip().lower()
            if split and split not in SPLITS:
                raise DataError(f"unknown split {record.split!r}; known are {', '.join(SPLITS)}")
            rows.append(
                Row(
                    where=where,
                    id=str(record.id) if record.id not in (None, "") else f"{table.file.stem}, {place}",
                    image=record.image,
                    images=tuple(table.images.find(name) for name in (record.image, record.image2) if name),
                    text=one_line(record.text),
                    label="" if record.label is None else str(record.label).strip(),
                    split=SPLITS.get(split) or split_named(table.file, "train" if "split" in table.first else ""),
                )
            )
    if ignored:
        remark(f"{table.file}: columns that are not read: {', '.join(sorted(ignored))}")
    return rows


def _each_text(raw: Any) -> list[Any]:
    """A record with a list of captions as one record for each; any other one as it is."""
    captions = raw.get("caption") if isinstance(raw, dict) else None
    return [raw | {"caption": caption} for caption in captions] if captions and isinstance(captions, list) else [raw]


def known_label(label: str, labels: Mapping[str, str]) -> str:
    """One of `labels`, whose keys are in small letters; `DataError` for another one."""
    if label.lower() not in labels:
        raise DataError(f"label {label!r}; expected one of {', '.join(labels)}")
    return labels[label.lower()]
