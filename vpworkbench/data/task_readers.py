"""Readers of the downstream tasks' files: questions, NLVR2, NLVR v1, SNLI-VE, easy-VQA, custom tables."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field

from vpworkbench.data.captioned import CAPTIONED, NLVR1, TABLE
from vpworkbench.data.files import faults_at, remark
from vpworkbench.data.images import Places, images_below, origins
from vpworkbench.data.questions import (
    EASY_VQA,
    QUESTIONS,
    VQA_ANSWERS,
    VQA_QUESTIONS,
    answers_beside,
    read_easy_vqa,
    scoring_rule,
)
from vpworkbench.data.readers import (
    TRUE_FALSE,
    Annotations,
    AnyText,
    Format,
    Found,
    Groups,
    Name,
    Text,
    Truth,
    convert,
    each_record,
    files_below,
    format_of,
    one_line,
    open_annotations,
    open_set,
    preferred,
    unique,
)
from vpworkbench.data.records import Example
from vpworkbench.data.tables import Row, known_label, read_rows
from vpworkbench.errors import DataError
from vpworkbench.metrics import NLVR2_IDENTIFIER

log = logging.getLogger(__name__)

Splits = dict[str, list[Example]]
"""The examples of `train`, `val` and `test`."""


@dataclass(frozen=True)
class TaskFiles:
    """The files that a downstream task can be read from: published ones, or custom tables.

    Attributes
    ----------
    name : str
        The task's.
    formats : tuple of Format
        Published formats; in a folder, the first of them that is there is the set.
    truth : callable
        The fields of an `Example` that the label of a custom table states; `DataError` for a label that it cannot have.
    images : int
        Images in each row of a custom table.
    """

    name: str
    formats: tuple[Format[Example], ...]
    truth: Callable[[str], dict[str, Any]]
    images: int = 1

    @property
    def table(self) -> Format[Example]:
        """Custom tables for this task."""
        return replace(TABLE, read=lambda table: examples_of(read_rows(table), self))

    def read(self, path: str | Path, images: Places = ()) -> Splits:
        """All examples of a folder or a file; images are beside the file, or in the given places."""
        opened = open_set(path, (self.formats, (self.table,)), images)
        splits = in_splits((example for annotations in opened for example in annotations.read()), path)
        for split, examples in splits.items():
            if not examples:
                log.warning("%s: no examples of %s", path, split)
        return splits


def in_splits(examples: Iterable[Example], path: str | Path) -> Splits:
    """The examples of all files of a set by split; an id twice in one split is a fault, also across files."""
    splits: Splits = {"train": [], "val": [], "test": []}
    for example in examples:
        splits[example.split].append(example)
    splits = {split: unique(some, path) if some else [] for split, some in splits.items()}
    if rule := scoring_rule([example for some in splits.values() for example in some]):
        remark(f"{path}: {rule}")
    return splits


def read_vqa(path: str | Path, *, images: Places = ()) -> Splits:
    """Questions with people's answers, see `questions`. The path `easy-vqa` is the installed package of that name.

    With ten answers they decide the official score; `multiple_choice_answer` represents them in the vocabulary.
    """
    return in_splits(read_easy_vqa(), EASY_VQA) if str(path) == EASY_VQA else VQA.read(path, images)


class _Nlvr2Record(BaseModel):
    """The release's record; `img0`, `img1`, `sent` and `uid` are LXMERT's."""

    identifier: str = Field(validation_alias=AliasChoices("identifier", "uid"))
    sentence: Text = Field(validation_alias=AliasChoices("sentence", "sent"))
    label: Truth | None = None
    img0: str = ""
    img1: str = ""

    def records(self, annotations: Annotations) -> Iterator[Example]:
        """Without other names, images have those of the release: `<identifier without its last part>-img0.png`."""
        if self.label is None and annotations.split != "test":
            raise DataError("no label; only test may lack it")
        if not (self.img0 and self.img1) and not re.search(NLVR2_IDENTIFIER, self.identifier):
            raise DataError("identifier: not split-set-pair-sentence, which names the images; correct the record")
        pair = self.identifier.rsplit("-", 1)[0]
        sides = (self.img0, self.img1) if self.img0 and self.img1 else (f"{pair}-img0", f"{pair}-img1")
        names = (PurePosixPath(side) for side in sides)
        images = tuple(annotations.images.find(str(name if name.suffix else f"{name}.png")) for name in names)
        yield Example(self.identifier, images, one_line(self.sentence), annotations.split, label=self.label)


def read_nlvr2(path: str | Path, *, images: Places = (), subsets: bool = False) -> Splits:
    """NLVR2; with `subsets`, the `kind` of an example is the subset that holds it, `balanced` or `unbalanced`."""
    splits = NLVR2.read(path, images)
    if not subsets:
        return splits
    found = files_below(Path(path), NLVR2.formats).files.get("nlvr2", []) if Path(path).is_dir() else []
    kinds: dict[str, str] = {}
    for file in found:
        if kind := re.search(r"(un)?balanced", file.name):
            items = open_annotations(file, [replace(NLVR2.formats[0], has_images=False)]).items
            kinds |= {str(raw.get("identifier")): kind[0] for _, raw in items if isinstance(raw, dict)}
    if not kinds:
        raise DataError(f"{path}: subsets are asked for, but there is no file balanced_*.json or unbalanced_*.json")
    return {split: [replace(one, kind=kinds.get(one.id, "")) for one in some] for split, some in splits.items()}


def _nlvr1(annotations: Annotations) -> Iterator[Example]:
    """One image each; the id is the name of its file, by which the release's scripts read predictions."""
    for picture in NLVR1.read(annotations):
        for text in picture.captions + picture.foils:
            yield Example(
                id=PurePosixPath(picture.image.name).name,
                images=(picture.image,),
                text=text,
                split=picture.split,
                label=str(bool(picture.captions)),
                boxes=picture.boxes,
            )


ENTAILMENT = ("entailment", "neutral", "contradiction")
_GOLD = dict(enumerate(ENTAILMENT)) | {-1: "-"}


def _entailment(value: Any) -> Any:
    """A number counts as SNLI's labels do in the hub's data sets; -1 is no gold label."""
    if isinstance(value, str) and value.strip() in ("-1", "0", "1", "2"):
        value = int(value)
    return _GOLD.get(value, value) if type(value) is int else value


class _SnliVeRecord(BaseModel):
    """SNLI-VE's record in all spellings that occur; `premise`, `hypothesis` and `image` are e-SNLI-VE's."""

    sentence1: str = Field("", validation_alias=AliasChoices("sentence1", "premise"))
    sentence2: Text = Field(validation_alias=AliasChoices("sentence2", "hypothesis"))
    gold_label: Annotated[Literal["entailment", "neutral", "contradiction", "-"], BeforeValidator(_entailment)] = Field(
        validation_alias=AliasChoices("gold_label", "label")
    )
    photo: Name = Field(validation_alias=AliasChoices("Flickr30K_ID", "Flikr30kID", "Flickr30kID", "image"))
    pairID: AnyText

    def records(self, annotations: Annotations, premise: bool) -> Iterator[Example]:
        """Without a gold label none; e-SNLI-VE-2.0 names the caption, `1.jpg#2`, of which the premise is taken."""
        if self.gold_label == "-":
            return
        photo = self.photo.partition(".jpg")[0]
        image = annotations.images.find(f"{photo}.jpg", f"{photo}.png")
        known = origins(image, flickr=photo)
        if premise and not self.sentence1:
            raise DataError("no premise (sentence1); leave `premise` off")
        text = one_line(f"{self.sentence1} {self.sentence2}" if premise else self.sentence2)
        yield Example(self.pairID, (image,), text, annotations.split, label=self.gold_label, origins=known)


def _entailments(annotations: Annotations, premise: bool = False) -> Iterator[Example]:
    if str(annotations.first.get("gold_label", annotations.first.get("label"))).lstrip("-").isdigit():
        names = ", ".join(f"{number} {name}" for number, name in enumerate(ENTAILMENT))
        remark(f"{annotations.file}: labels are numbers, read as {names}")
    given = annotations.file, annotations.items, _SnliVeRecord, "pairID"
    return convert(*given, lambda record: record.records(annotations, premise))


def read_snli_ve(path: str | Path, *, images: Places = (), premise: bool = False) -> Splits:
    """SNLI-VE or e-SNLI-VE over Flickr30k's images; records without a gold label ("-") are left out.

    With `premise`, the text premise precedes the hypothesis. It is a Flickr caption of the image and gives much away.
    """
    formats = tuple(replace(one, read=functools.partial(_entailments, premise=premise)) for one in SNLI_VE.formats)
    return replace(SNLI_VE, formats=formats).read(path, images)


def examples_of(rows: Iterable[Row], task: TaskFiles | None = None) -> Iterator[Example]:
    """The rows of a custom table as examples of a task; without one, any label counts, and none is needed."""
    for row in rows:
        with faults_at(row.where):
            if task and len(row.images) != task.images:
                raise DataError(f"{len(row.images)} images; {task.name} takes {task.images} (columns image, image2)")
            if task and not row.label and row.split != "test":
                raise DataError("no label; only rows of the split test may lack it")
            truth = task.truth(row.label) if task and row.label else {"label": row.label or None}
            known = origins(row.images[0]) if len(row.images) == 1 else frozenset()
            yield Example(row.id, row.images, row.text, row.split, origins=known, **truth)


def likely_task(rows: Sequence[Row]) -> TaskFiles | None:
    """The task that a custom table is for, by its images and most of its labels.

    None: captions, which have no label, or true and false.
    """
    if any(len(row.images) > 1 for row in rows):
        return NLVR2
    labels = [row.label.lower() for row in rows if row.label]
    if 2 * sum(label in TRUE_FALSE for label in labels) >= len(labels):
        return None
    return SNLI_VE if 2 * sum(label in ENTAILMENT for label in labels) > len(labels) else VQA


VQA = TaskFiles("vqa", QUESTIONS, truth=lambda label: {"answers": (label,)})
NLVR2 = TaskFiles(
    "nlvr2",
    (
        Format(
            "nlvr2",
            "NLVR2 JSON lines",
            layouts=("lines", "list"),
            read=each_record(_Nlvr2Record, "identifier"),
            recognises=lambda keys: (
                {"identifier", "uid"} & keys
                and {"sentence", "sent", "left_url"} & keys
                and "structured_rep" not in keys
            ),
            aside=r"(^|/)(un)?balanced|(^|/)test2",  # subsets; the hidden test set, published later
        ),
    ),
    truth=lambda label: {"label": known_label(label, TRUE_FALSE)},
    images=2,
)
NLVR1_TASK = TaskFiles(
    "nlvr1", (replace(NLVR1, read=_nlvr1),), truth=lambda label: {"label": known_label(label, TRUE_FALSE)}
)
_PHOTO = {"Flickr30K_ID", "Flikr30kID"}
_SNLI_VE = Format(
    "snli-ve",
    "SNLI-VE JSON lines",
    layouts=("lines", "list"),
    read=_entailments,
    recognises=lambda keys: (
        "hypothesis" not in keys and (_PHOTO & keys or ("gold_label" in keys and "image" not in keys))
    ),
)
_E_SNLI_VE = replace(
    _SNLI_VE,
    name="e-snli-ve",
    title="e-SNLI-VE (csv, tsv)",
    recognises=lambda keys: (
        {"hypothesis", "Flickr30kID"} <= keys or ({"sentence2", "gold_label", "image"} <= keys and not _PHOTO & keys)
    ),
)
SNLI_VE = TaskFiles(
    "snli-ve",
    (_SNLI_VE, _E_SNLI_VE),
    truth=lambda label: {"label": known_label(label, {name: name for name in ENTAILMENT})},
)
TASK_FILES = {task.name: task for task in (NLVR1_TASK, SNLI_VE, NLVR2, VQA)}

FORMATS = (*chain(*CAPTIONED), *SNLI_VE.formats, *NLVR2.formats, *QUESTIONS, VQA_ANSWERS)
"""All formats, of captioned sets and of tasks; no file has two of them."""

ANY_TABLE = replace(TABLE, read=lambda table: examples_of(read_rows(table)))
CAPTIONS = "captions"
USES: Mapping[str, Groups] = {CAPTIONS: CAPTIONED} | {
    name: (task.formats, (TABLE,)) for name, task in TASK_FILES.items()
}
"""What a set can be read for, and the formats of its files."""


class Opened(NamedTuple):
    """An annotation file, and what it would be read for."""

    annotations: Annotations
    uses: frozenset[str]


def open_all(path: str | Path, images: Places = (), unread: list[str] | None = None) -> Iterator[Opened]:
    """Every annotation file that a run of some kind would read: the file itself, or those of a folder.

    Tables are opened as `ANY_TABLE`. A file that cannot be opened is a fault. `unread` gets the other files.
    """
    path, unread = Path(path).expanduser(), [] if unread is None else unread
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_file():
        found, folder, wider = Found({format_of(path, FORMATS).name: [path]}, []), path.parent, None
    else:
        found, folder, wider = files_below(path, FORMATS), path, functools.cache(lambda: images_below(path))
    chosen: dict[Path, tuple[Format, set[str]]] = {}
    for use, groups in USES.items():
        for file, form in preferred(found, groups, folder).items():
            chosen.setdefault(file, (ANY_TABLE if form is TABLE else form, set()))[1].add(use)
    read = {answers_beside(file).absolute() for file, (form, _) in chosen.items() if form is VQA_QUESTIONS}
    unread += found.unread
    for name, files in found.files.items():
        answers = ": annotations without their questions beside them" if name == VQA_ANSWERS.name else ""
        unread += [f"{file}{answers}" for file in files if file not in chosen and file.absolute() not in read]
    for file, (form, uses) in chosen.items():
        with faults_at():
            yield Opened(open_annotations(file, [form], images, wider=wider), frozenset(uses))
