"""Readers of the downstream tasks' files as published: VQA v2, NLVR2, NLVR v1, SNLI-VE, easy-VQA, one's own table.

A file is one split, or tells the split of each record; images lie beside it in folders or in zips that are read in
place. Faults name the file and the record.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from pydantic import AliasChoices, BaseModel, Field, RootModel, StrictInt

from vpworkbench.data.captioned import READERS, read_captioned, read_pictures
from vpworkbench.data.files import (
    Annotations,
    Text,
    checked,
    one_record,
    open_as,
    read_list,
    read_text,
    split_named,
    unique,
)
from vpworkbench.data.images import ImageIndex, Places, image_index, origins
from vpworkbench.data.records import Example, Picture
from vpworkbench.data.tables import Row, read_rows, true_or_false
from vpworkbench.errors import DataError
from vpworkbench.metrics import NLVR2_IDENTIFIER, most_given, normalised_answer

ENTAILMENT = ("entailment", "neutral", "contradiction")

# ------------------------------------------------------------------------------------------------------- VQA


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
    question_type: str = ""
    answer_type: str = ""


Source = str | Path | Annotations
"""An annotation file, or one that is open."""


def read_vqa(questions: Source, annotations: str | Path | None, *, split: str, images: Places = ()) -> list[Example]:
    """VQA v2: `v2_OpenEnded_mscoco_*_questions.json` and, but for a test set, `v2_mscoco_*_annotations.json`.

    Scores go by the ten people's answers; `multiple_choice_answer` stands for them in the vocabulary of answers.

    Raises
    ------
    DataError
        For a broken or repeated record, an annotation without its question or the reverse, a missing image.
    """
    opened = open_as(questions, "vqa")
    file, content = opened.file, opened.content
    index = image_index(file, images)
    answered = {} if annotations is None else _answers(Path(annotations).expanduser())
    naming = _Naming(str(content.get("data_type", "")), str(content.get("data_subtype", "")))
    asked = set()
    examples = []
    for number, raw in enumerate(content["questions"]):
        with one_record():
            record = checked(_Question, raw, f"{file}: questions[{number}]")
            where = f"{file}: questions[{number}] (question_id {record.question_id})"
            asked.add(record.question_id)
            told = answered.get(record.question_id)
            if annotations is not None and told is None:
                raise DataError(f"{where}: no annotation of it in {annotations}; take both files of one release")
            if told is not None and told.image_id != record.image_id:
                raise DataError(f"{where}: image_id {record.image_id}, but {told.image_id} in {annotations}")
            image = index.find(*naming.names(record.image_id), where=where)
            examples.append(
                Example(
                    id=str(record.question_id),
                    images=(image,),
                    text=" ".join(record.question.split()),
                    split=split,
                    answers=() if told is None else tuple(answer.answer for answer in told.answers),
                    answer="" if told is None else told.multiple_choice_answer,
                    kind="" if told is None else told.answer_type,
                    origins=origins(image, coco=record.image_id if naming.data_type == "mscoco" else None),
                )
            )
    for lonely in answered.keys() - asked:
        with one_record():
            raise DataError(f"{annotations}: question_id {lonely} is in no question of {file}")
    return unique(examples, file)


def _answers(file: Path) -> dict[int, _Answered]:
    known: dict[int, _Answered] = {}
    for number, raw in enumerate(open_as(file, "vqa-answers").content["annotations"]):
        with one_record():
            record = checked(_Answered, raw, f"{file}: annotations[{number}]")
            if record.question_id in known:
                raise DataError(f"{file}: annotations[{number}]: question_id {record.question_id} a second time")
            known[record.question_id] = record
    return known


class _Naming(NamedTuple):
    """What the header of the questions tells of the images' names."""

    data_type: str
    data_subtype: str

    def names(self, image_id: int) -> list[str]:
        if self.data_type == "scenes":
            return [f"{('train', 'val', 'test')[image_id // 10_000_000 % 3]}-{image_id % 10_000_000:06d}.png"]
        subset = self.data_subtype.replace("-dev", "")  # test-dev2015 asks about images of test2015
        coco = [f"COCO_{subset}_{image_id:012d}.jpg", f"{image_id:012d}.jpg"]
        # Plain numbers are Visual Genome's names too: COCO's questions must not find those.
        return coco if self.data_type == "mscoco" else [*coco, f"{image_id}.jpg", f"{image_id}.png"]


def answers_beside(questions: Path) -> Path | None:
    """The annotations of a file of questions by the release's names; None where they are not there, as of test sets."""
    file = _answers_of(questions)
    return file if file and file.exists() else None


def _answers_of(questions: Path) -> Path | None:
    """Where a release puts them; None for a name that is none of a file of questions."""
    file = questions.with_name(questions.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    return file if file != questions else None


def answer_vocabulary(questions: Iterable[Example], least: int) -> tuple[str, ...]:
    """The normalised answers, sorted, that stand for `least` of these questions or more.

    `multiple_choice_answer`, else the most given answer, once a question: of VQA v2's training and validation questions
    and 9 that is the published rule, of which others get 3,129.
    """
    counts = Counter(
        normalised_answer(one.answer) if one.answer else most_given(one.answers) for one in questions if one.answers
    )
    return tuple(sorted(answer for answer, count in counts.items() if count >= least))


class _ListedAnswer(RootModel[Text]):
    pass


def read_answer_list(file: str | Path) -> tuple[str, ...]:
    """Answers to choose among, normalised, in their order: a json list, or a text with one a line.

    Raises
    ------
    DataError
        For a file that is missing or holds none, a list with something other than texts.
    """
    file = Path(file).expanduser()
    text = read_text(file)
    listed = text.splitlines()
    if text.lstrip().startswith("["):
        listed = [checked(_ListedAnswer, raw, f"{file}: {place}").root for place, raw in read_list(file)]
    if not listed:
        raise DataError(f"{file}: no answer in it; write a json list of answers, or one a line")
    return tuple(dict.fromkeys(normalised_answer(answer) for answer in listed if answer.strip()))


def read_easy_vqa(split: Literal["train", "test"]) -> list[Example]:
    """easy-VQA, from its installed package: 64 x 64 drawings, 13 answers, one answer a question.

    Raises
    ------
    DataError
        If the package is not installed.
    """
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise DataError("easy-vqa: the package is not installed; pip install easy-vqa")
    folder = Path(spec.origin).parent / "data" / split
    index = ImageIndex([folder / "images"])
    file = folder / "questions.json"
    return [
        Example(
            id=f"{split}-{number}",
            images=(index.find(f"{image}.png", where=f"{file}: [{number}]"),),
            text=question,
            split=split,
            answers=(answer,) * 10,
        )
        for number, (question, answer, image) in enumerate(json.loads(file.read_text(encoding="utf-8")))
    ]


# ------------------------------------------------------------------------------------------------ statements


class _Nlvr2(BaseModel):
    identifier: str = Field(pattern=NLVR2_IDENTIFIER)
    sentence: Text
    label: Literal["True", "False"] | None = None


def read_nlvr2(file: Source, *, split: str, images: Places = ()) -> list[Example]:
    """NLVR2's json lines; images by the naming of its release, `<identifier without its last part>-img0.png`."""
    opened = open_as(file, "nlvr2")
    index = image_index(opened.file, images)
    examples = []
    for place, raw in opened.content:
        with one_record():
            record = checked(_Nlvr2, raw, f"{opened.file}: {place}")
            where = f"{opened.file}: {place} ({record.identifier})"
            if record.label is None and split != "test":
                raise DataError(f"{where}: no label; only test may lack it")
            pair = record.identifier.rsplit("-", 1)[0]
            sides = tuple(index.find(f"{pair}-img{side}.png", where=where) for side in (0, 1))
            examples.append(
                Example(record.identifier, sides, " ".join(record.sentence.split()), split, label=record.label)
            )
    return unique(examples, opened.file)


def read_nlvr1(path: Source, *, images: Places = ()) -> list[Example]:
    """NLVR v1 as single-image true / false, split as `read_pictures` does; the six orders of training boxes apart.

    The id is the image file's name: its scripts read predictions by that.
    """
    pictures = read_captioned(path, images) if isinstance(path, Annotations) else read_pictures(path, images=images)
    return [
        Example(
            id=PurePosixPath(picture.image.name).name,
            images=(picture.image,),
            text=text,
            split=picture.split,
            label=str(bool(picture.captions)),
            boxes=picture.boxes,
        )
        for picture in pictures
        for text in picture.captions + picture.foils
    ]


class _SnliVe(BaseModel):
    sentence1: str
    sentence2: Text
    gold_label: Literal["entailment", "neutral", "contradiction", "-"]
    photo: str = Field(validation_alias=AliasChoices("Flickr30K_ID", "Flikr30kID"))  # both are in use
    pairID: str


def read_snli_ve(file: Source, *, split: str, images: Places = (), premise: bool = False) -> list[Example]:
    """SNLI-VE's json lines over Flickr30k's images; records without a gold label ("-") are left out.

    Parameters
    ----------
    premise : bool
        Put the text premise before the hypothesis. It is the image's own Flickr caption and leaks: off unless asked.
    """
    opened = open_as(file, "snli-ve")
    index = image_index(opened.file, images)
    examples = []
    for place, raw in opened.content:
        with one_record():
            record = checked(_SnliVe, raw, f"{opened.file}: {place}")
            if record.gold_label == "-":
                continue
            where = f"{opened.file}: {place} ({record.pairID})"
            photo = record.photo.removesuffix(".jpg")
            image = index.find(f"{photo}.jpg", f"{photo}.png", where=where)
            text = f"{record.sentence1} {record.sentence2}" if premise else record.sentence2
            examples.append(
                Example(
                    id=record.pairID,
                    images=(image,),
                    text=" ".join(text.split()),
                    split=split,
                    label=record.gold_label,
                    origins=origins(image, flickr=photo),
                )
            )
    return unique(examples, opened.file)


# --------------------------------------------------------------------------------------------- one's own table


def read_table(file: Source, task: str = "", *, images: Places = ()) -> list[Example]:
    """A csv or json lines of `image`, `text`, `label`, for NLVR2 also `image2`, and, where wanted, `split` and `id`.

    Parameters
    ----------
    task : str
        The label of `vqa` is the answer, that of `nlvr1` and `nlvr2` true or false, that of `snli-ve` one of
        `ENTAILMENT`; only a test record may lack it. Empty: any label, and none. For the split see `tables.read_rows`.

    Raises
    ------
    DataError
        For a broken row, a label that the task does not know, a missing image, an id that comes twice.
    """
    opened = open_as(file, "table")
    return unique(_of_rows(read_rows(opened, image_index(opened.file, images)), task), opened.file)


def _of_rows(rows: Sequence[Row], task: str) -> Iterator[Example]:
    wanted = 2 if task == "nlvr2" else 1
    for row in rows:
        with one_record():
            if task and len(row.images) != wanted:
                raise DataError(f"{row.where}: {len(row.images)} images; {task} takes {wanted} (columns image, image2)")
            if task and not row.label and row.split != "test":
                raise DataError(f"{row.where}: no label; only rows of the split test may lack it")
            label = LABELS[task](row) if task and row.label else row.label or None
            yield Example(
                id=row.id,
                images=row.images,
                text=row.text,
                split=row.split,
                label=None if task == "vqa" else label,
                answers=(label,) * 10 if task == "vqa" and label else (),
                origins=origins(row.images[0]) if len(row.images) == 1 else frozenset(),
            )


def _relation(row: Row) -> str:
    if row.label.lower() not in ENTAILMENT:
        raise DataError(f"{row.where}: label {row.label!r}; one of {', '.join(ENTAILMENT)} is wanted here")
    return row.label.lower()


LABELS: dict[str, Callable[[Row], str]] = {
    "vqa": lambda row: row.label, "nlvr1": true_or_false, "nlvr2": true_or_false, "snli-ve": _relation,
}  # fmt: skip
"""How a table's label is read, for each task."""

# -------------------------------------------------------------------------------------------------- any file


def read_examples(opened: Annotations, task: str, *, images: Places = (), premise: bool = False) -> list[Example]:
    """The examples of an open file, of the task's own format or a table; its name tells the split if nothing else does.

    Raises
    ------
    DataError
        For a file of another format, and all that its reader refuses.
    """
    split = split_named(opened.file, "train")
    if opened.format == "table":
        return read_table(opened, task, images=images)
    if task == "vqa":
        answers = answers_beside(opened.file)
        if answers is None and split != "test":
            expected = _answers_of(opened.file)
            remedy = (
                f"put {expected.name} beside it" if expected else "name it *_questions.json, them *_annotations.json"
            )
            raise DataError(f"{opened.file}: questions of {split} without annotations; {remedy}")
        return read_vqa(opened, answers, split=split, images=images)
    if task == "nlvr1":
        return read_nlvr1(open_as(opened, "nlvr1"), images=images)
    if task == "nlvr2":
        return read_nlvr2(opened, split=split, images=images)
    return read_snli_ve(opened, split=split, images=images, premise=premise)


def read_any(opened: Annotations, *, images: Places = ()) -> list[Picture] | list[Example]:
    """The records of an open file of whatever format; none of VQA's annotations, which come with their questions."""
    if opened.format == "vqa-answers":
        return []
    if opened.format == "table":
        return read_table(opened, images=images)
    if opened.format in READERS:
        return read_captioned(opened, images)
    return read_examples(opened, opened.format, images=images)
