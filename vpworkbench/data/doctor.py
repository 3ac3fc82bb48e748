"""What is wrong with a set, all of it at once, before a run starts.

Broken records and unreadable images are errors; overlaps of splits, duplicates and texts that will be cut are warnings:
sets as published have them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
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


@dataclass
class Diagnosis:
    """What `diagnose` found.

    Attributes
    ----------
    tables : dict
        For each format (a table of one's own: with its task) and split: counts.
    errors, warnings : list of str
        Each error names the file and the record.
    unread : list of str
        Files that are no annotations of a known format.
    """

    path: str
    tables: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """No error."""
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"sound": self.is_sound}

    def __str__(self) -> str:
        """Everything, the summary last: it stays in sight where the list is long."""
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
        Decode every image; else only see that it is there.
    places
        Folders and zips of images; empty: those beside each annotation file.
    task : str
        What a table of one's own is for; empty: told by its labels.
    text_tokens : int
        Longest text in tokens, [CLS] and [SEP] included.
    tokenizer : str
        `minilm`, or the folder of a BERT or of a checkpoint; empty: a vocabulary of the training texts, as a run
        without `init_text` builds it.
    answer_count : int
        VQA: of how many questions of training and validation an answer must be the one to be in the vocabulary.
    regions : str
        Region files of these images, a folder of npz or a BUTD tsv: every image's are read.

    Raises
    ------
    DataError
        Only if there is nothing to examine.
    """
    found = Diagnosis(str(path))
    kinds = _read(path, places, task, found)
    if not kinds and not found.errors:
        unread = f"; not read: {', '.join(found.unread)}" if found.unread else ""
        raise DataError(f"{path}: no set of a known format there; name an annotation file{unread}")
    files = dict.fromkeys(image for records in kinds.values() for record in records for image in images_of(record))
    if regions:
        _read_regions(list(files), regions, found)
    readable = _readable(list(files), images, found)
    content = {image: image for image in files} | image_contents(readable)
    for kind, records in kinds.items():
        table = found.tables[kind] = _table(records)
        _count_longer(records, table, kind, text_tokens, tokenizer, found)
        _compare(records, kind, content, found)
        if any(getattr(record, "answers", ()) for record in records):
            _count_unanswerable(records, table, kind, answer_count, found)
    _compare_captioned(kinds, content, found)
    return found


# ---------------------------------------------------------------------------------------------------- reading


def _read(path: str | Path, places: Places, task: str, found: Diagnosis) -> dict[str, list[Record]]:
    """The records of every file, by the name of their format."""
    if str(path) == EASY_VQA:
        return {VQA.name: list(chain.from_iterable(read_easy_vqa().values()))}
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"{place}: no such file or folder")
    kinds: dict[str, list[Record]] = defaultdict(list)
    files, answers = annotation_files(place), set()
    for file in tqdm(files, "reading records", unit=" files", delay=2):
        with collected_findings() as findings:
            try:
                opened = open_annotations(file, FORMATS, places)
                if opened.format is VQA_ANSWERS:
                    answers.add(file)
                    continue
                kind, records = _records_of(opened, task)
                kinds[kind] += records
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
    return {kind: records for kind, records in kinds.items() if records}


def _records_of(opened: Annotations, task: str) -> tuple[str, Sequence[Record]]:
    """The records of a file, and what they are; a table is read for `task`, or for the one that its labels suggest."""
    if opened.format is not ANY_TABLE:
        return opened.format.name, opened.read()
    rows = read_rows(opened)
    task_files = TASK_FILES[task] if task else likely_task(rows)
    records = examples_of(rows, task_files) if task_files else pictures_of(rows)
    return f"table ({task_files.name if task_files else 'captions'})", unique(records, opened.file)


# ----------------------------------------------------------------------------------------------------- images


def _readable(files: Sequence[ImageFile], decode: bool, found: Diagnosis) -> list[ImageFile]:
    """The images that can be read; the others are errors."""
    good = []
    with ThreadPoolExecutor() as pool, tqdm(total=len(files), desc="opening images", unit=" images", delay=2) as bar:
        waiting = iter(files)
        while part := list(islice(waiting, 1_000)):
            for image, fault in zip(part, pool.map(_decode if decode else _glimpse, part), strict=True):
                if fault:
                    found.errors.append(fault)
                else:
                    good.append(image)
                bar.update()
    return good


def _read_regions(images: Sequence[ImageFile], place: str, found: Diagnosis) -> None:
    """Images without regions, those that are broken, and features of several widths are errors."""
    from vpworkbench.data.regions import RegionFiles  # torch comes with it

    try:
        files = RegionFiles(place)
    except DataError as error:
        found.errors.append(str(error))
        return
    widths: dict[int, ImageFile] = {}
    for image in tqdm(images, "reading regions", unit=" images", delay=2):
        try:
            widths.setdefault(files.read(image).features.shape[1], image)
        except DataError as error:
            found.errors.append(str(error))
    if len(widths) > 1:
        told = ", ".join(f"{width} of {image.name}" for width, image in widths.items())
        found.errors.append(f"{place}: features of different widths, {told}; a model takes one")


def _decode(image: ImageFile) -> str:
    """What is wrong with it."""
    return _fault(image.pixels)


def _glimpse(image: ImageFile) -> str:
    return _fault(image.glimpse)


def _fault(read: Callable[[], Any]) -> str:
    try:
        read()
    except DataError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------------------ counts


def _of(records: Iterable[Record], split: str) -> list[Record]:
    return [record for record in records if record.split == split]


def _texts(record: Record) -> tuple[str, ...]:
    return record.captions + record.foils if isinstance(record, Picture) else (record.text,)


def _table(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    return {
        split: {
            "records": len(chosen),
            "images": len({image for record in chosen for image in images_of(record)}),
            "texts": sum(len(_texts(record)) for record in chosen),
        }
        for split in SPLIT_NAMES
        if (chosen := _of(records, split))
    }


def _count_longer(
    records: Sequence[Record],
    table: dict[str, dict[str, int]],
    kind: str,
    text_tokens: int,
    tokenizer: str,
    found: Diagnosis,
) -> None:
    """Texts that will be cut."""
    from vpworkbench.model.words import build_tokenizer  # torch comes with it

    training = [text for record in _of(records, "train") or records for text in _texts(record)]
    encode = build_tokenizer(training, tokenizer)._tokenizer
    # A token has a letter at least: short texts need not be looked at.
    long = sorted({text for record in records for text in _texts(record) if len(text) + 2 > text_tokens})
    cut: set[str] = set()
    for start in tqdm(range(0, len(long), 10_000), "tokenising", unit=" x 10,000 texts", delay=2):
        part = long[start : start + 10_000]
        cut |= {text for text, tokens in zip(part, encode.encode_batch(part), strict=True) if len(tokens) > text_tokens}
    for split, row in table.items():
        row["too_long"] = sum(text in cut for record in _of(records, split) for text in _texts(record))
        if row["too_long"]:
            found.warnings.append(
                f"{kind}: {row['too_long']} texts of {split} are longer than {text_tokens} tokens and will be cut"
            )


def _compare(records: Sequence[Record], kind: str, content: dict[ImageFile, Any], found: Diagnosis) -> None:
    """Splits against each other, images and records among each other."""
    marks = photographs(records, content)
    shown = {split: _shown(records, split, marks) for split in SPLIT_NAMES}
    for one, other in combinations(SPLIT_NAMES, 2):
        if shared := shown[one] & shown[other]:
            found.warnings.append(f"{kind}: {len(shared)} images are in {one} and in {other}")
    files = {image for record in records for image in images_of(record)}
    if copies := len(files) - len({marks[image] for image in files}):
        found.warnings.append(f"{kind}: {copies} image files are copies of others")
    said = Counter(
        (tuple(marks[image] for image in images_of(record)), text) for record in records for text in _texts(record)
    )
    if twice := said.total() - len(said):
        found.warnings.append(f"{kind}: {twice} texts are said of the same image again")


def _compare_captioned(kinds: dict[str, list[Record]], content: dict[ImageFile, Any], found: Diagnosis) -> None:
    """Splits of each captioned set against those of the others: a run may join them, as the paper does."""
    captioned = {kind: records for kind, records in kinds.items() if isinstance(records[0], Picture)}
    marks = photographs(chain.from_iterable(captioned.values()), content)
    shown = {
        (kind, split): _shown(records, split, marks) for split in SPLIT_NAMES for kind, records in captioned.items()
    }
    for (kind, split), (other_kind, other) in combinations(shown, 2):
        shared = shown[kind, split] & shown[other_kind, other]
        if shared and kind != other_kind and split != other:
            found.warnings.append(f"{len(shared)} images are in {split} of {kind} and in {other} of {other_kind}")


def _shown(records: Iterable[Record], split: str, marks: dict[ImageFile, Hashable]) -> set[Hashable]:
    """The photographs of a split."""
    return {marks[image] for record in _of(records, split) for image in images_of(record)}


def _count_unanswerable(
    records: Sequence[Record], table: dict[str, dict[str, int]], kind: str, least: int, found: Diagnosis
) -> None:
    """Questions none of whose answers is in the vocabulary that training would have (as `tasks.task_labels`)."""
    tidy = {answer: normalised_answer(answer) for record in records for answer in record.answers}
    training = _of(records, "train")
    known = set(answer_vocabulary([*training, *_of(records, "val")], least))
    if not any(record.answers for record in training):
        found.warnings.append(f"{kind}: no training questions there, so no vocabulary of answers to compare with")
        return
    for split, row in table.items():
        asked = [record for record in _of(records, split) if record.answers]
        row["unanswerable"] = sum(known.isdisjoint(map(tidy.get, record.answers)) for record in asked)
        if row["unanswerable"]:
            found.warnings.append(
                f"{kind}: {row['unanswerable']} of {len(asked)} questions of {split} have no answer among the "
                f"{len(known)} that stand for {least} questions or more of training and validation: they count as 0"
            )
