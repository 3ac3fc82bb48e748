"""Readers of the downstream tasks' files: VQA v2, NLVR2, NLVR v1, SNLI-VE, easy-VQA, custom tables."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

from pydantic import AliasChoices, BaseModel, Field, StrictInt

from vpworkbench.data.captioned import COCO, KARPATHY, NLVR1, NLVR1_FILES, TABLE, VISUAL_GENOME
from vpworkbench.data.files import annotation_files, faults_at, files_of_set, json_list, read_text, report_fault
from vpworkbench.data.images import ImageIndex, Places, origins
from vpworkbench.data.readers import (
    Annotations,
    Format,
    Text,
    UnknownFormatError,
    convert,
    each_record,
    one_line,
    open_annotations,
    unique,
)
from vpworkbench.data.records import Example
from vpworkbench.data.tables import TABLE_FILES, TRUE_FALSE, Row, known_label, read_rows
from vpworkbench.errors import DataError
from vpworkbench.metrics import NLVR2_IDENTIFIER, most_given, normalised_answer

log = logging.getLogger(__name__)

Splits = dict[str, list[Example]]
"""The examples of `train`, `val` and `test`."""


@dataclass(frozen=True)
class TaskFiles:
    """The files that a downstream task can be read from: its release, or custom tables.

    Attributes
    ----------
    published : Format
        The format of its release.
    names : tuple of tuple of str
        The files of a release in its folder, see `files_of_set`.
    truth : callable
        The fields of an `Example` that the label of a custom table states; `DataError` for a label that it cannot have.
    images : int
        Images in each row of a custom table.
    """

    published: Format[Example]
    names: tuple[tuple[str, ...], ...]
    truth: Callable[[str], dict[str, Any]]
    images: int = 1

    @property
    def name(self) -> str:
        """The name of the published format, which is the task's."""
        return self.published.name

    def read(self, path: str | Path, images: Places = ()) -> Splits:
        """All examples of a folder or a file; images are beside the file, or in the given places."""
        table = replace(TABLE, read=lambda table: examples_of(read_rows(table), self))
        files = files_of_set(path, (*self.names, TABLE_FILES))
        splits: Splits = {"train": [], "val": [], "test": []}
        for file in files:
            if "test-dev" in file.name and file.with_name(file.name.replace("-dev", "")) in files:
                continue  # VQA's test2015 contains its test-dev
            for example in open_annotations(file, (self.published, table), images).read():
                splits[example.split].append(example)
        for split, examples in splits.items():
            if examples:
                unique(examples, path)  # across files
            else:
                log.warning("%s: no examples of %s", path, split)
        return splits


class _Question(BaseModel):
    question_id: StrictInt
    image_id: StrictInt
    question: Text


class _Answer(BaseModel):
    answer: str


class _Answered(BaseModel):
    question_id: StrictInt
    image_id: StrictInt
    answers: list[_Answer] = Field(min_length=1)
    multiple_choice_answer: str = ""
    answer_type: str = ""


_WITHHELD = _Answered.model_construct(answers=[])
EASY_VQA = "easy-vqa"


def read_vqa(path: str | Path, *, images: Places = ()) -> Splits:
    """VQA v2: `v2_OpenEnded_mscoco_*_questions.json` and, except for a test set, `v2_mscoco_*_annotations.json`.

    The ten people's answers decide scores; `multiple_choice_answer` represents them in the vocabulary of answers. The
    path `easy-vqa` is the installed package of that name.
    """
    return read_easy_vqa() if str(path) == EASY_VQA else VQA.read(path, images)


def _vqa(annotations: Annotations) -> Iterator[Example]:
    file, split = annotations.file, annotations.split
    answers_file = answers_beside(file)
    is_answered = answers_file.exists()
    if not is_answered and split != "test":
        raise DataError(f"{file}: questions of {split} without annotations; put {answers_file.name} beside it")
    answered = _answers(answers_file) if is_answered else {}
    data_type, subset = (str(annotations.first.get(key, "")) for key in ("data_type", "data_subtype"))
    asked: set[int] = set()

    def example(record: _Question) -> Iterator[Example]:
        asked.add(record.question_id)
        answer = answered.get(record.question_id, _WITHHELD)
        if is_answered and answer is _WITHHELD:
            raise DataError(f"no annotation of it in {answers_file}; take both files from one release")
        if is_answered and answer.image_id != record.image_id:
            raise DataError(f"image_id {record.image_id}, but {answer.image_id} in {answers_file}; correct one of them")
        image = annotations.images.find(*_image_names(record.image_id, data_type, subset))
        yield Example(
            id=str(record.question_id),
            images=(image,),
            text=one_line(record.question),
            split=split,
            answers=tuple(one.answer for one in answer.answers),
            answer=answer.multiple_choice_answer,
            kind=answer.answer_type,
            origins=origins(image, coco=record.image_id if data_type == "mscoco" else None),
        )

    yield from convert(file, annotations.items, _Question, "question_id", example)
    for question_id in answered.keys() - asked:
        report_fault(f"{answers_file}: question_id {question_id} is none of the questions of {file}; drop it")


def _answers(file: Path) -> dict[int, _Answered]:
    """The annotations by the id of their question."""
    items = open_annotations(file, (VQA_ANSWERS,)).items
    records = convert(file, items, _Answered, "question_id", lambda record: [record])
    return {record.question_id: record for record in records}


def _image_names(image_id: int, data_type: str, subset: str) -> list[str]:
    """The names that an image may have, by the header of the questions."""
    if data_type == "scenes":
        return [f"{('train', 'val', 'test')[image_id // 10_000_000 % 3]}-{image_id % 10_000_000:06d}.png"]
    subset = subset.replace("-dev", "")  # test-dev2015 asks about images of test2015
    coco = [f"COCO_{subset}_{image_id:012d}.jpg", f"{image_id:012d}.jpg"]
    # Plain numbers are Visual Genome's names too: COCO's questions must not find those.
    return coco if data_type == "mscoco" else [*coco, f"{image_id}.jpg", f"{image_id}.png"]


def answers_beside(questions: Path) -> Path:
    """Where the annotations that belong to a file of questions are, by the names of the release."""
    name = questions.name.replace("OpenEnded_", "").replace("questions", "annotations")
    return questions.with_name(name if name != questions.name else f"{questions.stem}_annotations.json")


def answer_vocabulary(questions: Iterable[Example], least: int) -> tuple[str, ...]:
    """The normalised answers, sorted, that are the answer to at least `least` of these questions.

    The answer to a question is its `multiple_choice_answer`, else the most frequent one. With 9, and the questions of
    VQA v2 for training and validation, that is the published rule, which gives 3,129 answers.
    """
    counts = Counter(
        normalised_answer(one.answer) if one.answer else most_given(one.answers) for one in questions if one.answers
    )
    return tuple(sorted(answer for answer, count in counts.items() if count >= least))


def read_answer_list(file: str | Path) -> tuple[str, ...]:
    """Answers to choose among, normalised, in their order: a JSON list, or a text file with one in each line."""
    file = Path(file).expanduser()
    text = read_text(file)
    is_json = text.lstrip()[0] == "["
    answers = [answer for _, answer in json_list(file, text)] if is_json else list(filter(str.strip, text.splitlines()))
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise DataError(f"{file}: no list of answers; write a JSON list of texts, or one answer in each line")
    return tuple(dict.fromkeys(map(normalised_answer, answers)))


def read_easy_vqa() -> Splits:
    """easy-VQA, from its installed package: 64 x 64 drawings, 13 answers, one answer for each question.

    A tenth of the training images, by their number, validates: the package has no such split.
    """
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise DataError(f"{EASY_VQA}: the package is not installed; pip install easy-vqa")
    splits: Splits = {"train": [], "val": [], "test": []}
    for part in ("train", "test"):
        folder = Path(spec.origin).parent / "data" / part
        images = ImageIndex([folder / "images"])
        questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
        for number, (question, answer, image) in enumerate(questions):
            split = "val" if part == "train" and int(image) % 10 == 0 else part
            file = images.find(f"{image}.png")
            splits[split].append(Example(f"{part}-{number}", (file,), question, split, answers=(answer,) * 10))
    return splits


class _Nlvr2Record(BaseModel):
    identifier: str = Field(pattern=NLVR2_IDENTIFIER)
    sentence: Text
    label: Literal["True", "False"] | None = None

    def records(self, annotations: Annotations) -> Iterator[Example]:
        """Images have the names of the release: `<identifier without its last part>-img0.png`."""
        if self.label is None and annotations.split != "test":
            raise DataError("no label; only test may lack it")
        pair = self.identifier.rsplit("-", 1)[0]
        images = tuple(annotations.images.find(f"{pair}-img{side}.png") for side in (0, 1))
        yield Example(self.identifier, images, one_line(self.sentence), annotations.split, label=self.label)


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


class _SnliVeRecord(BaseModel):
    sentence1: str
    sentence2: Text
    gold_label: Literal["entailment", "neutral", "contradiction", "-"]
    photo: str = Field(validation_alias=AliasChoices("Flickr30K_ID", "Flikr30kID"))  # both occur
    pairID: str
    with_premise: ClassVar[bool] = False

    def records(self, annotations: Annotations) -> Iterator[Example]:
        if self.gold_label == "-":
            return
        photo = self.photo.removesuffix(".jpg")
        image = annotations.images.find(f"{photo}.jpg", f"{photo}.png")
        known = origins(image, flickr=photo)
        text = one_line(f"{self.sentence1} {self.sentence2}" if self.with_premise else self.sentence2)
        yield Example(self.pairID, (image,), text, annotations.split, label=self.gold_label, origins=known)


class _SnliVeWithPremise(_SnliVeRecord):
    with_premise: ClassVar[bool] = True


def read_snli_ve(path: str | Path, *, images: Places = (), premise: bool = False) -> Splits:
    """SNLI-VE's JSON lines over Flickr30k's images; records without a gold label ("-") are left out.

    With `premise`, the text premise precedes the hypothesis. It is a Flickr caption of the image and gives much away.
    """
    schema = _SnliVeWithPremise if premise else _SnliVeRecord
    published = replace(SNLI_VE.published, read=each_record(schema, "pairID"))
    return replace(SNLI_VE, published=published).read(path, images)


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


VQA_ANSWERS = Format(
    "vqa-answers",
    "VQA v2 annotations",
    layout="annotations",
    read=lambda annotations: (),  # they are read with their questions
    recognises=lambda keys: "images" not in keys,
    has_images=False,
)
VQA = TaskFiles(
    Format("vqa", "VQA v2 questions", layout="questions", read=_vqa),
    names=(("v2_OpenEnded_*_questions.json",),),
    truth=lambda label: {"answers": (label,) * 10},
)
NLVR2_FILES = ("train.json", "dev.json", "test1.json")
NLVR2 = TaskFiles(
    Format(
        "nlvr2",
        "NLVR2 JSON lines",
        layout="lines",
        read=each_record(_Nlvr2Record, "identifier"),
        recognises=lambda keys: "identifier" in keys and ("sentence" in keys or "left_url" in keys),
    ),
    names=(tuple(f"nlvr2/{name}" for name in NLVR2_FILES), NLVR2_FILES),
    truth=lambda label: {"label": known_label(label, TRUE_FALSE)},
    images=2,
)
NLVR1_TASK = TaskFiles(
    replace(NLVR1, read=_nlvr1), (NLVR1_FILES,), truth=lambda label: {"label": known_label(label, TRUE_FALSE)}
)
SNLI_VE = TaskFiles(
    Format(
        "snli-ve",
        "SNLI-VE JSON lines",
        layout="lines",
        read=each_record(_SnliVeRecord, "pairID"),
        recognises=lambda keys: not {"Flickr30K_ID", "Flikr30kID", "gold_label"}.isdisjoint(keys),
    ),
    names=(("snli_ve_train.jsonl", "snli_ve_dev.jsonl", "snli_ve_test.jsonl"),),
    truth=lambda label: {"label": known_label(label, {name: name for name in ENTAILMENT})},
)
TASK_FILES = {task.name: task for task in (NLVR1_TASK, SNLI_VE, NLVR2, VQA)}

ANY_TABLE = replace(TABLE, read=lambda annotations: examples_of(read_rows(annotations)))
FORMATS = (
    KARPATHY,
    COCO,
    VISUAL_GENOME,
    NLVR1,
    SNLI_VE.published,
    NLVR2.published,
    VQA.published,
    VQA_ANSWERS,
    ANY_TABLE,
)
"""All formats, of captioned sets and of tasks."""


def open_all(path: str | Path, images: Places = (), unread: list[str] | None = None) -> Iterator[Annotations]:
    """Every annotation file of a known format: the file itself, or all below a folder.

    VQA's annotations are left out, because they are read with their questions. A file that cannot be opened is a fault.
    `unread` gets the files of a folder that are in no known format, and annotations without their questions.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    files, unread = annotation_files(path), [] if unread is None else unread
    for file in files:
        try:
            opened = open_annotations(file, FORMATS, images)
        except UnknownFormatError:
            if file == path:
                raise
            unread.append(str(file))
        except DataError as error:
            report_fault(str(error))
        else:
            if opened.format is not VQA_ANSWERS:
                yield opened
            elif file not in map(answers_beside, files):
                unread.append(f"{file}: annotations without their questions beside them")
