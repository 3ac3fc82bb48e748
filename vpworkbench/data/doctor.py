"""Everything that is wrong with a set, before a run starts.

Broken records and unreadable images are errors. Overlaps of splits, duplicates and texts that will be cut are warnings,
because published sets have them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from vpworkbench.data.captioned import pictures_of
from vpworkbench.data.files import annotation_files, collected_findings
from vpworkbench.data.images import ImageFile, Places
from vpworkbench.data.readers import Annotations, UnknownFormatError, open_annotations, unique
from vpworkbench.data.records import Picture, Record, images_of
from vpworkbench.data.splits import image_contents, photographs
from vpworkbench.data.tables import read_rows
from vpworkbench.data.task_readers import (
    ANY_TABLE,
    EASY_VQA,
    FORMATS,
    TASK_FILES,
    VQA,
    VQA_ANSWERS,
    answer_vocabulary,
    answers_beside,
    examples_of,
    likely_task,
    read_easy_vqa,
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
            columns = list(dict.fromkeys(column for row in splits.values() for column in row))
            lines.append(f"\n{kind:20}" + "".join(f"{column.replace('_', ' '):>16}" for column in columns))
            for split, row in splits.items():
                cells = (f"{row[column]:,}" if column in row else "" for column in columns)
                lines.append(f"  {split:18}" + "".join(f"{cell:>16}" for cell in cells))
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
    records = chain.from_iterable(chain.from_iterable(splits.values()) for splits in kinds.values())
    files = list(dict.fromkeys(image for record in records for image in images_of(record)))
    if regions:
        found.errors += _region_faults(files, regions)
    unreadable = _unreadable(files, decode=images)
    found.errors += unreadable.values()
    content = {image: image for image in files} | image_contents(image for image in files if image not in unreadable)
    for kind, splits in kinds.items():
        table = found.tables[kind] = _counts(splits)
        found.warnings += [f"{kind}: {warning}" for warning in _cut_texts(splits, table, text_tokens, tokenizer)]
        found.warnings += [f"{kind}: {warning}" for warning in _repetitions(splits, content)]
        if any(getattr(record, "answers", ()) for records in splits.values() for record in records):
            found.warnings += [f"{kind}: {warning}" for warning in _unanswerable(splits, table, answer_count)]
    found.warnings += _overlaps_of_captioned_sets(kinds, content)
    return found


# ---------------------------------------------------------------------------------------------------- reading


def _read(path: str | Path, places: Places, task: str, found: Diagnosis) -> dict[str, Splits]:
    """The records of every file, by the name of their format and by split."""
    if str(path) == EASY_VQA:
        return {VQA.name: read_easy_vqa()}
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"{place}: no such file or folder")
    kinds: dict[str, dict[str, list[Record]]] = defaultdict(lambda: {split: [] for split in SPLIT_NAMES})
    files, answers = annotation_files(place), set()
    for file in tqdm(files, "reading records", unit=" files", delay=2):
        with collected_findings() as findings:
            try:
                opened = open_annotations(file, FORMATS, places)
                if opened.format is VQA_ANSWERS:
                    answers.add(file)
                    continue
                kind, records = _records_of(opened, task)
                for record in records:
                    kinds[kind][record.split].append(record)
            except UnknownFormatError:
                if file == place:
                    raise
                found.unread.append(str(file))
            except DataError as error:
                findings.faults.append(str(error))
        found.errors += findings.faults
        found.warnings += findings.remarks
    lonely = answers - {answers_beside(file) for file in files}
    found.unread += [f"{file}: annotations without their questions beside them" for file in sorted(lonely)]
    found.errors[:] = dict.fromkeys(found.errors)  # a damaged zip may be beside several files
    return dict(kinds)


def _records_of(opened: Annotations, task: str) -> tuple[str, Sequence[Record]]:
    """The records of a file, and what they are; a table is read for `task`, or for the one that its labels suggest."""
    if opened.format is not ANY_TABLE:
        return opened.format.name, opened.read()
    rows = read_rows(opened)
    files = TASK_FILES[task] if task else likely_task(rows)
    records = examples_of(rows, files) if files else pictures_of(rows)
    return f"table ({files.name if files else 'captions'})", unique(records, opened.file)


# ----------------------------------------------------------------------------------------------------- images


def _unreadable(files: Sequence[ImageFile], *, decode: bool) -> dict[ImageFile, str]:
    """The images that cannot be read, each with its fault."""

    def fault(image: ImageFile) -> str:
        try:
            image.pixels() if decode else image.glimpse()
        except DataError as error:
            return str(error)
        return ""

    faults: dict[ImageFile, str] = {}
    with ThreadPoolExecutor() as pool, tqdm(total=len(files), desc="opening images", unit=" images", delay=2) as bar:
        waiting = iter(files)
        while part := list(islice(waiting, 1_000)):
            faults |= zip(part, pool.map(fault, part), strict=True)
            bar.update(len(part))
    return {image: message for image, message in faults.items() if message}


def _region_faults(images: Sequence[ImageFile], place: str) -> list[str]:
    """Images without regions, with broken ones, or with features of another width."""
    from vpworkbench.data.regions import RegionFiles  # imports torch

    faults: list[str] = []
    widths: dict[int, ImageFile] = {}
    try:
        files = RegionFiles(place)
    except DataError as error:
        return [str(error)]
    for image in tqdm(images, "reading regions", unit=" images", delay=2):
        try:
            widths.setdefault(files.read(image).features.shape[1], image)
        except DataError as error:
            faults.append(str(error))
    if len(widths) > 1:
        examples = ", ".join(f"{width} of {image.name}" for width, image in widths.items())
        faults.append(f"{place}: features of different widths, {examples}; a model takes one")
    return faults


# ------------------------------------------------------------------------------------------------------ counts


def _texts(record: Record) -> tuple[str, ...]:
    return record.captions + record.foils if isinstance(record, Picture) else (record.text,)


def _texts_of(records: Iterable[Record]) -> list[str]:
    return [text for record in records for text in _texts(record)]


def _counts(splits: Splits) -> dict[str, dict[str, int]]:
    return {
        split: {
            "records": len(records),
            "images": len({image for record in records for image in images_of(record)}),
            "texts": len(_texts_of(records)),
        }
        for split, records in splits.items()
        if records
    }


def _cut_texts(splits: Splits, table: dict[str, dict[str, int]], text_tokens: int, tokenizer: str) -> list[str]:
    """Count the texts that are too long."""
    from vpworkbench.model.words import build_tokenizer  # imports torch

    texts = {split: _texts_of(splits[split]) for split in table}
    every = list(chain.from_iterable(texts.values()))
    encode = build_tokenizer(texts.get("train", every), tokenizer)._tokenizer
    # A token has at least one letter, so short texts need no tokenizer.
    long = sorted({text for text in every if len(text) + 2 > text_tokens})
    cut: set[str] = set()
    for start in tqdm(range(0, len(long), 10_000), "tokenising", unit=" x 10,000 texts", delay=2):
        part = long[start : start + 10_000]
        cut |= {text for text, tokens in zip(part, encode.encode_batch(part), strict=True) if len(tokens) > text_tokens}
    warnings = []
    for split, row in table.items():
        row["too_long"] = sum(text in cut for text in texts[split])
        if row["too_long"]:
            warnings.append(f"{row['too_long']} texts of {split} are longer than {text_tokens} tokens and will be cut")
    return warnings


def _unanswerable(splits: Splits, table: dict[str, dict[str, int]], least: int) -> list[str]:
    """Count the questions without an answer in the vocabulary that training would have."""
    if not any(record.answers for record in splits["train"]):
        return ["no training questions, so no vocabulary of answers to compare with"]
    known = set(answer_vocabulary([*splits["train"], *splits["val"]], least))
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


# ---------------------------------------------------------------------------------------------------- overlaps


def _repetitions(splits: Splits, content: Mapping[ImageFile, Hashable]) -> list[str]:
    """Images in two splits, copies of images, texts twice for one image."""
    records = list(chain.from_iterable(splits.values()))
    marks = photographs(records, content)
    shown = {split: _shown(splits[split], marks) for split in SPLIT_NAMES}
    warnings = [
        f"{len(shared)} images are in {one} and in {other}"
        for one, other in combinations(SPLIT_NAMES, 2)
        if (shared := shown[one] & shown[other])
    ]
    files = {image for record in records for image in images_of(record)}
    if copies := len(files) - len({marks[image] for image in files}):
        warnings.append(f"{copies} image files are copies of other files")
    said = Counter(
        (tuple(marks[image] for image in images_of(record)), text) for record in records for text in _texts(record)
    )
    if repeated := said.total() - len(said):
        warnings.append(f"{repeated} texts are said of the same image again")
    return warnings


def _overlaps_of_captioned_sets(kinds: Mapping[str, Splits], content: Mapping[ImageFile, Hashable]) -> list[str]:
    """Images in different splits of two captioned sets, which a run may join, as the paper does."""
    records = {(kind, split): kinds[kind][split] for split in SPLIT_NAMES for kind in kinds}
    captioned = {key: part for key, part in records.items() if part and isinstance(part[0], Picture)}
    marks = photographs(chain.from_iterable(captioned.values()), content)
    shown = {key: _shown(part, marks) for key, part in captioned.items()}
    return [
        f"{len(shared)} images are in {split} of {kind} and in {other} of {other_kind}"
        for (kind, split), (other_kind, other) in combinations(shown, 2)
        if kind != other_kind and split != other and (shared := shown[kind, split] & shown[other_kind, other])
    ]


def _shown(records: Iterable[Record], marks: Mapping[ImageFile, Hashable]) -> set[Hashable]:
    """The photographs of a split."""
    return {marks[image] for record in records for image in images_of(record)}
