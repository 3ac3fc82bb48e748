"""Everything that is wrong with a set, before a run starts.

Broken records and unreadable images are errors. Overlaps of splits, duplicates and texts that will be cut are warnings,
because published sets have them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from vpworkbench.data.captioned import pictures_of
from vpworkbench.data.files import collected_findings, faults_at
from vpworkbench.data.images import ImageFile, Places, unreadable
from vpworkbench.data.questions import EASY_VQA, answer_vocabulary, read_easy_vqa
from vpworkbench.data.readers import unique
from vpworkbench.data.records import Picture, Record
from vpworkbench.data.splits import image_contents, photographs
from vpworkbench.data.tables import read_rows
from vpworkbench.data.task_readers import (
    ANY_TABLE,
    CAPTIONS,
    TASK_FILES,
    VQA,
    Opened,
    examples_of,
    in_splits,
    likely_task,
    open_all,
)
from vpworkbench.errors import DataError
from vpworkbench.metrics import normalised_answer

SPLIT_NAMES = ("train", "val", "test")
Splits = Mapping[str, Sequence[Record]]


@dataclass
class Diagnosis:
    """What `diagnose` found.

    Attributes
    ----------
    tables : dict
        Counts by format (for a custom table, with its task), split and column.
    errors, warnings : list of str
        Each error names the file and the record.
    unread : list of str
        Files without annotations of a known format.
    """

    path: str
    tables: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """True without errors."""
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"sound": self.is_sound}

    def __str__(self) -> str:
        """The findings, then the counts, then a summary, which stays visible below a long list."""
        lines = []
        for name, found in (("error", self.errors), ("warning", self.warnings), ("not read", self.unread)):
            lines += [f"{name}: {text}" for text in found]
        for kind, splits in self.tables.items():
            table = pd.DataFrame(splits).T.map("{:,}".format).rename_axis(columns=kind)
            lines.append("\n" + table.rename(columns=lambda column: column.replace("_", " ")).to_string())
        counts = f"{len(self.errors)} errors, {len(self.warnings)} warnings"
        return "\n".join([*lines, f"\n{self.path}: {'sound' if self.is_sound else 'not sound'}, {counts}"])


def diagnose(
    path: str | Path,
    *,
    images: bool = True,
    places: Places = (),
    task: str = "",
    text_tokens: int = 40,
    tokenizer: str = "",
    answer_count: int = 9,
    regions: str = "",
) -> Diagnosis:
    """Examine a set: every record, every image, the splits against each other.

    Parameters
    ----------
    path
        An annotation file, a folder with any number of them, or `easy-vqa`.
    images : bool
        Decode every image, instead of only finding it.
    places
        Folders and zips of images; empty: those beside each annotation file.
    task : str
        The task of custom tables; empty: the one that their labels suggest.
    text_tokens : int
        Longest text in tokens, [CLS] and [SEP] included.
    tokenizer : str
        `minilm`, or the folder of a BERT or of a checkpoint; empty: a vocabulary of the training texts, as a run
        without `init_text` builds it.
    answer_count : int
        VQA: keep answers that are given for at least this many questions of training and validation.
    regions : str
        Region files of the images, a folder of npz or a BUTD tsv; all of them are read.
    """
    found = Diagnosis(str(path))
    kinds = _read(path, places, task, found)
    if not kinds and not found.errors:
        unread = f"; not read: {', '.join(found.unread)}" if found.unread else ""
        raise DataError(f"{path}: no set of a known format there; name an annotation file{unread}")
    every = list(chain.from_iterable(kinds.values()))
    files = list(dict.fromkeys(image for record in every for image in record.images))
    if regions:
        found.errors += _region_faults(files, regions)
    broken = unreadable(files, decode=images)
    found.errors += broken.values()
    photograph = photographs(every, image_contents(image for image in files if image not in broken))
    for kind, records in kinds.items():
        splits = {split: part for split in SPLIT_NAMES if (part := [one for one in records if one.split == split])}
        table = found.tables[kind] = {split: _counts(part) for split, part in splits.items()}
        warnings = [*_cut_texts(splits, table, text_tokens, tokenizer), *_repetitions(records, photograph)]
        if any(getattr(record, "answers", ()) for record in records):
            warnings += _unanswerable(splits, table, answer_count)
        found.warnings += [f"{kind}: {warning}" for warning in warnings]
    found.warnings += [*_overlaps(kinds, photograph), *_lacking(kinds)]
    if len(tables := [kind for kind in kinds if kind.startswith("table")]) > 1:
        found.errors.append(f"{path}: {' and '.join(tables)}, which a run reads as one; name a file")
    return found


def _read(path: str | Path, places: Places, task: str, found: Diagnosis) -> dict[str, list[Record]]:
    """The records of every file that a run would read, by the name of their format."""
    kinds: dict[str, list[Record]] = defaultdict(list)
    with collected_findings() as findings:
        if str(path) == EASY_VQA:
            kinds[VQA.name] += read_easy_vqa()
        else:
            for opened in tqdm(open_all(path, places, found.unread), "reading records", unit=" files", delay=2):
                with faults_at():
                    for kind, records in _records_of(opened, task, found.unread):
                        kinds[kind] += records
        for kind, records in kinds.items():
            if records and not isinstance(records[0], Picture):
                kinds[kind] = list(chain.from_iterable(in_splits(records, path).values()))
    found.errors += dict.fromkeys(findings.faults)  # a damaged zip may be beside several files
    found.warnings += findings.remarks
    return {kind: records for kind, records in kinds.items() if records}


def _records_of(opened: Opened, task: str, unread: list[str]) -> Iterator[tuple[str, Sequence[Record]]]:
    """The records of a file, and what they are; a table is read for `task`, or for the one that its labels suggest."""
    annotations = opened.annotations
    if annotations.format is not ANY_TABLE:
        yield annotations.format.name, annotations.read()
        return
    rows = read_rows(annotations)
    files = TASK_FILES[task] if task else likely_task(rows)
    use = files.name if files else CAPTIONS
    if use in opened.uses:
        records = examples_of(rows, files) if files else pictures_of(rows)
        yield f"table ({use})", unique(records, annotations.file)
    else:
        unread.append(f"{annotations.file}: a table for {use}, which the other files are read for")


def _region_faults(images: Sequence[ImageFile], place: str) -> list[str]:
    """Images without regions, with broken ones, or with features of another width."""
    from vpworkbench.data.regions import RegionFiles  # imports torch

    widths: dict[int, ImageFile] = {}
    with collected_findings() as findings, faults_at():
        files = RegionFiles(place)
        for image in tqdm(images, "reading regions", unit=" images", delay=2):
            with faults_at():
                widths.setdefault(files.read(image).features.shape[1], image)
    if len(widths) > 1:
        examples = ", ".join(f"{width} of {image.name}" for width, image in widths.items())
        findings.faults.append(f"{place}: features of different widths, {examples}; a model takes one")
    return findings.faults


def _texts(records: Iterable[Record]) -> list[str]:
    texts = (one.captions + one.foils if isinstance(one, Picture) else (one.text,) for one in records)
    return list(chain.from_iterable(texts))


def _counts(records: Sequence[Record]) -> dict[str, int]:
    images = {image for record in records for image in record.images}
    return {"records": len(records), "images": len(images), "texts": len(_texts(records))}


def _cut_texts(splits: Splits, table: dict[str, dict[str, int]], text_tokens: int, tokenizer: str) -> list[str]:
    """Count the texts that are too long."""
    from vpworkbench.model.words import build_tokenizer  # imports torch

    texts = {split: _texts(records) for split, records in splits.items()}
    every = list(chain.from_iterable(texts.values()))
    encode = build_tokenizer(texts.get("train", every), tokenizer)._tokenizer.encode_batch
    # A token has at least one letter, so short texts need no tokenizer.
    long = sorted({text for text in every if len(text) + 2 > text_tokens})
    parts = [long[start : start + 10_000] for start in range(0, len(long), 10_000)]
    tokens = chain.from_iterable(map(encode, tqdm(parts, "tokenising", unit=" x 10,000 texts", delay=2)))
    cut = {text for text, ids in zip(long, tokens, strict=True) if len(ids) > text_tokens}
    for split, row in table.items():
        row["too_long"] = sum(text in cut for text in texts[split])
    return [
        f"{row['too_long']} texts of {split} are longer than {text_tokens} tokens and will be cut"
        for split, row in table.items()
        if row["too_long"]
    ]


def _unanswerable(splits: Splits, table: dict[str, dict[str, int]], least: int) -> list[str]:
    """Count the questions without an answer in the vocabulary that training would have."""
    training, held_out = (splits.get(split, []) for split in ("train", "val"))
    if not any(record.answers for record in training):
        return ["no training questions, so no vocabulary of answers to compare with"]
    known = set(answer_vocabulary([*training, *held_out], least))
    answers = {answer for records in splits.values() for record in records for answer in record.answers}
    normalised = {answer: normalised_answer(answer) for answer in answers}
    warnings = []
    for split, row in table.items():
        asked = [record for record in splits[split] if record.answers]
        row["unanswerable"] = sum(known.isdisjoint(map(normalised.get, record.answers)) for record in asked)
        if row["unanswerable"]:
            warnings.append(
                f"{row['unanswerable']} of {len(asked)} questions of {split} have none of the {len(known)} answers "
                f"that are given for at least {least} questions of training and validation: they count as 0"
            )
    return warnings


def _repetitions(records: Sequence[Record], photograph: Mapping[ImageFile, Hashable]) -> list[str]:
    """Copies of images, and texts twice for one image."""
    warnings = []
    files = {image for record in records for image in record.images}
    if copies := len(files) - len({photograph[image] for image in files}):
        warnings.append(f"{copies} image files are copies of other files")
    said = Counter(
        (*(photograph[image] for image in record.images), text) for record in records for text in _texts([record])
    )
    if repeated := said.total() - len(said):
        warnings.append(f"{repeated} texts are said of the same image again")
    return warnings


def _lacking(kinds: Mapping[str, Sequence[Record]]) -> list[str]:
    """Sets that do not train: a run needs another one beside them."""
    trained: dict[str, bool] = defaultdict(bool)
    for kind, records in kinds.items():
        use = CAPTIONS if isinstance(records[0], Picture) else kind
        trained[use] |= any(record.split == "train" for record in records)
    lacking = [use for use, has_some in trained.items() if not has_some]
    return [f"{use}: no training records; a run needs some, of this set or another" for use in lacking]


def _overlaps(kinds: Mapping[str, Sequence[Record]], photograph: Mapping[ImageFile, Hashable]) -> list[str]:
    """Images in two splits: of one set, or of two captioned sets, which a run may join, as the paper does."""
    captioned = {kind for kind, records in kinds.items() if isinstance(records[0], Picture)}
    shown: dict[tuple[str, str], set[Hashable]] = {(split, kind): set() for split in SPLIT_NAMES for kind in kinds}
    for kind, records in kinds.items():
        for record in records:
            shown[record.split, kind].update(photograph[image] for image in record.images)
    return [
        f"{len(shared)} images are in {split} of {kind} and in {other_split} of {other}"
        for (split, kind), (other_split, other) in combinations(shown, 2)
        if split != other_split and (kind == other or {kind, other} <= captioned)
        if (shared := shown[split, kind] & shown[other_split, other])
    ]
