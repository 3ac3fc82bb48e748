"""What is wrong with a set, all of it at once, before a run starts.

Broken records and unreadable images are errors; overlaps of splits, duplicates and texts that will be cut are warnings:
sets as published have them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vpworkbench.data.formats import image_contents, read_pictures
from vpworkbench.data.records import DataError, Example, ImageFile, Picture, collected_faults
from vpworkbench.data.task_formats import read_easy_vqa, read_nlvr2, read_snli_ve, read_vqa
from vpworkbench.metrics import answer_targets

SHOWN = 20
SPLIT_OF = {"train": "train", "val": "val", "dev": "val", "test": "test", "test1": "test", "test2": "test"}


class _Record(NamedTuple):
    """What every kind of record has."""

    split: str
    images: tuple[ImageFile, ...]
    texts: tuple[str, ...]
    answers: tuple[str, ...] = ()


@dataclass
class Diagnosis:
    """What `diagnose` found.

    Attributes
    ----------
    tables : dict
        For each kind of record (captions, vqa, nlvr2, snli-ve) and split: counts.
    errors, warnings : list of str
        Each names the file and the record.
    """

    path: str
    tables: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """No error."""
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"sound": self.is_sound}

    def __str__(self) -> str:
        lines = [f"{self.path}: {'sound' if self.is_sound else f'{len(self.errors)} errors'}"]
        for kind, splits in self.tables.items():
            columns = list(next(iter(splits.values()), {}))
            lines.append(f"\n{kind:10}" + "".join(f"{column:>20}" for column in columns))
            lines += [
                f"  {split:8}" + "".join(f"{row[column]:>20,}" for column in columns) for split, row in splits.items()
            ]
        for name, found in (("errors", self.errors), ("warnings", self.warnings)):
            lines += [f"\n{len(found)} {name}"] if found else []
            lines += [f"  {text}" for text in found[:SHOWN]]
            lines += [f"  ... and {len(found) - SHOWN} more (--json lists all)"] if len(found) > SHOWN else []
        return "\n".join(lines)


def diagnose(
    path: str | Path,
    *,
    text_tokens: int = 40,
    answer_count: int = 9,
    images: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Diagnosis:
    """Examine a set: every record, every image, the splits against each other.

    Parameters
    ----------
    path
        A set's folder, one of its annotation files, or `easy-vqa`.
    text_tokens : int
        Longest text; words and punctuation are counted, of which a tokenizer makes at least as many tokens.
    answer_count : int
        VQA: how often an answer must be seen in training to be in the vocabulary.
    images : bool
        Decode every image; else only see that it is there.

    Raises
    ------
    DataError
        Only if there is nothing to examine.
    """
    found = Diagnosis(str(path))
    with collected_faults() as faults:
        kinds = _read(path, found)
    found.errors += faults
    if not kinds and not found.errors:
        raise DataError(f"{path}: no set of a known format there; name an annotation file")
    for kind, records in kinds.items():
        found.tables[kind] = _table(records, text_tokens)
        _compare_splits(kind, records, found)
        if kind == "vqa":
            _look_at_answers(records, answer_count, found)
    if images:
        _open_all([record for records in kinds.values() for record in records], found, progress)
    return found


def _read(path: str | Path, found: Diagnosis) -> dict[str, list[_Record]]:
    if str(path) == "easy-vqa":
        examples = read_easy_vqa("train") + read_easy_vqa("test")
        return {"vqa": [_of_example(example) for example in examples]}
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"{place}: no such file or folder")
    files = sorted(place.rglob("*.json*")) if place.is_dir() else [place]
    kinds: dict[str, list[_Record]] = defaultdict(list)
    for file in files:
        try:
            for kind, records in _read_file(file):
                kinds[kind] += records
        except DataError as error:
            found.errors.append(str(error))
    return dict(kinds)


def _read_file(file: Path) -> list[tuple[str, list[_Record]]]:
    split = next((SPLIT_OF[part] for part in reversed(file.stem.replace("2014", "").replace("2015", "").split("_"))
                  if part in SPLIT_OF), "")  # fmt: skip
    if file.name.startswith("v2_OpenEnded"):
        annotations = file.with_name(file.name.replace("OpenEnded_", "").replace("_questions", "_annotations"))
        examples = read_vqa(file, annotations if annotations.exists() else None, split=split)
        return [("vqa", [_of_example(example) for example in examples])]
    if file.name.startswith("snli_ve_"):
        return [("snli-ve", [_of_example(example) for example in read_snli_ve(file, split=split)])]
    if file.stem in SPLIT_OF and '"identifier"' in _beginning(file) and '"structured_rep"' not in _beginning(file):
        return [("nlvr2", [_of_example(example) for example in read_nlvr2(file, split=split)])]
    if file.name.startswith("dataset_") or file.stem in SPLIT_OF:
        return [("captions", [_of_picture(picture) for picture in read_pictures(file)])]
    return []


def _beginning(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as handle:
        return handle.readline(1_000_000)


def _of_example(example: Example) -> _Record:
    return _Record(example.split, example.images, (example.text,), example.answers)


def _of_picture(picture: Picture) -> _Record:
    return _Record(picture.split, (picture.image,), picture.captions + picture.foils)


def _table(records: Sequence[_Record], text_tokens: int) -> dict[str, dict[str, int]]:
    table = {}
    for split in ("train", "val", "test"):
        chosen = [record for record in records if record.split == split]
        texts = [text for record in chosen for text in record.texts]
        if chosen:
            table[split] = {
                "records": len(chosen),
                "images": len({image for record in chosen for image in record.images}),
                "texts": len(texts),
                "longer_texts": sum(_length(text) > text_tokens for text in texts),
            }
    return table


def _length(text: str) -> int:
    """Words and marks, with [CLS] and [SEP]."""
    words = "".join(letter if letter.isalnum() or letter.isspace() else f" {letter} " for letter in text)
    return len(words.split()) + 2


def _compare_splits(kind: str, records: Sequence[_Record], found: Diagnosis) -> None:
    files = [image for record in records for image in record.images]
    try:
        content = image_contents(files)
    except DataError as error:
        found.errors.append(str(error))
        return
    by_split: dict[str, set[Any]] = defaultdict(set)
    for record in records:
        by_split[record.split] |= {content[image] for image in record.images}
    names = sorted(by_split)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            if shared := by_split[one] & by_split[other]:
                found.warnings.append(f"{kind}: {len(shared)} images are in {one} and in {other}")
    copies = Counter(content[image] for image in dict.fromkeys(files))
    if twice := sum(count - 1 for count in copies.values()):
        found.warnings.append(f"{kind}: {twice} image files are copies of others")
    longer = {split: row["longer_texts"] for split, row in found.tables[kind].items() if row["longer_texts"]}
    for split, count in longer.items():
        found.warnings.append(f"{kind}: {count} texts of {split} are longer than the configured length and will be cut")


def _look_at_answers(records: Sequence[_Record], least: int, found: Diagnosis) -> None:
    seen = Counter(
        answer for record in records if record.split == "train" for answer in answer_targets(record.answers or ("",))
    )
    known = {answer for answer, count in seen.items() if count >= least and answer}
    for split, row in found.tables["vqa"].items():
        asked = [record for record in records if record.split == split and record.answers]
        row["unanswerable"] = sum(known.isdisjoint(answer_targets(record.answers)) for record in asked)


def _open_all(records: Sequence[_Record], found: Diagnosis, progress: Callable[[str, int, int], None] | None) -> None:
    files = list(dict.fromkeys(image for record in records for image in record.images))
    for number, image in enumerate(files):
        try:
            image.pixels()
        except DataError as error:
            found.errors.append(str(error))
        if progress and (number % 200 == 0 or number + 1 == len(files)):
            progress("opening images", number + 1, len(files))
