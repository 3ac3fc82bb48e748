"""Questions about images as published: VQA v1 and v2, OK-VQA, A-OKVQA, VQA-CP, GQA, Visual Genome, VizWiz, lists."""

from __future__ import annotations

import glob
import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field

from vpworkbench.data.captioned import ImageId, image_of
from vpworkbench.data.files import json_list, read_text, report_fault
from vpworkbench.data.images import OF_TEXTS, ImageIndex, origins
from vpworkbench.data.readers import (
    Annotations,
    AnyText,
    Format,
    Id,
    Name,
    Text,
    convert,
    each_record,
    one_line,
    open_annotations,
)
from vpworkbench.data.records import Example
from vpworkbench.errors import DataError
from vpworkbench.metrics import FEWEST_ANSWERS, most_given, normalised_answer

EASY_VQA = "easy-vqa"


class _Answer(BaseModel):
    answer: Name


def _as_answers(given: Any) -> Any:
    """Converted sets also write an answer as a text, and one answer without its list; nothing but blanks is none."""
    given = [given] if isinstance(given, str | int) else given
    if type(given) is not list:
        return given
    answers = [{"answer": one} if isinstance(one, str | int) else one for one in given]
    blank = [one for one in answers if isinstance(one, dict) and not str(one.get("answer", "?")).strip()]
    return [] if blank == answers else answers


Answers = Annotated[list[_Answer], BeforeValidator(_as_answers)]


class _Question(BaseModel):
    question_id: Id
    image_id: Id
    question: Text
    coco_split: AnyText = ""  # VQA-CP's, whose splits are not COCO's


class _Answered(BaseModel):
    question_id: Id
    image_id: Id
    answers: Answers = Field(min_length=1)
    multiple_choice_answer: Name = ""
    answer_type: AnyText = ""


_WITHHELD = _Answered.model_construct(answers=[])


def _vqa(annotations: Annotations) -> Iterator[Example]:
    """Questions, with the answers of the file that belongs to them; only a test set may lack it."""
    file, split = annotations.file, annotations.split
    answers_file = answers_beside(file)
    is_answered = answers_file.exists()
    if not is_answered and split != "test":
        raise DataError(f"{file}: questions of {split} without annotations; put {answers_file.name} beside it")
    items = open_annotations(answers_file, (VQA_ANSWERS,)).items if is_answered else ()
    records = convert(answers_file, items, _Answered, "question_id", lambda record: [record])
    answered = {record.question_id: record for record in records}
    data_type, subset = (str(annotations.first.get(key, "")) for key in ("data_type", "data_subtype"))
    asked: set[int] = set()

    def example(record: _Question) -> Iterator[Example]:
        asked.add(record.question_id)
        answer = answered.get(record.question_id, _WITHHELD)
        if is_answered and answer is _WITHHELD:
            raise DataError(f"no annotation of it in {answers_file}; take both files from one release")
        if is_answered and answer.image_id != record.image_id:
            raise DataError(f"image_id {record.image_id}, but {answer.image_id} in {answers_file}; correct one of them")
        of_coco = data_type == "mscoco" or bool(record.coco_split)
        names = _image_names(record.image_id, "mscoco" if of_coco else data_type, record.coco_split or subset)
        image = annotations.images.find(*names)
        yield Example(
            id=str(record.question_id),
            images=(image,),
            text=one_line(record.question),
            split=split,
            answers=tuple(one.answer for one in answer.answers),
            answer=answer.multiple_choice_answer,
            kind=answer.answer_type,
            origins=origins(image, coco=record.image_id if of_coco else 0),
        )

    yield from convert(file, annotations.items, _Question, "question_id", example)
    for question_id in answered.keys() - asked:
        report_fault(f"{answers_file}: question_id {question_id} is none of the questions of {file}; drop it")


def _image_names(image_id: int, data_type: str, subset: str) -> list[str]:
    """The names that an image may have, by the header of the questions."""
    if data_type == "scenes":
        return [f"{('train', 'val', 'test')[image_id // 10_000_000 % 3]}-{image_id % 10_000_000:06d}.png"]
    subset = subset.replace("-dev", "")  # test-dev2015 asks about images of test2015
    coco = [f"COCO_{subset}_{image_id:012d}.jpg", f"{image_id:012d}.jpg"]
    # Plain numbers are Visual Genome's names too: COCO's questions must not find those.
    return coco if data_type == "mscoco" else [*coco, f"{image_id}.jpg", f"{image_id}.png"]


def answers_beside(questions: Path) -> Path:
    """Where the annotations of a file of questions are, by the names of the release.

    They are beside it, or in a folder beside its own: VQA's site has `Questions` and `Annotations`, its zips unpack to
    `v2_Questions_Train_mscoco` and `v2_Annotations_Train_mscoco`.
    """
    name = questions.name.replace("OpenEnded_", "").replace("MultipleChoice_", "").replace("questions", "annotations")
    beside = questions.with_name(name if name != questions.name else f"{questions.stem}_annotations.json")
    folder = questions.absolute().parent
    others = folder.parent.glob(f"*/{glob.escape(beside.name)}") if OF_TEXTS.search(folder.name) else ()
    return beside if beside.exists() else min(others, default=beside)


class _ListedQuestion(BaseModel):
    """A question with its answers and its image: VizWiz has no other id; BLIP's lists have one, GQA's key is one."""

    image: Name = Field(validation_alias=AliasChoices("image", "imageId"))
    question: Text
    question_id: Name = ""
    answers: Answers = Field([], validation_alias=AliasChoices("answers", "answer"))
    answer_type: AnyText = ""

    @property
    def id(self) -> str:
        return self.question_id or self.image

    def records(self, annotations: Annotations) -> Iterator[Example]:
        if not self.answers and annotations.split != "test":
            raise DataError("no answer; only test may lack it")
        image = annotations.images.find(self.image if Path(self.image).suffix else f"{self.image}.jpg")
        answers, known = tuple(one.answer for one in self.answers), origins(image, name=self.image)
        text, split = one_line(self.question), annotations.split
        yield Example(self.id, (image,), text, split, answers=answers, kind=self.answer_type, origins=known)


class _DirectQuestion(BaseModel):
    """A-OKVQA's, about an image of COCO 2017; its server leaves out direct answers to questions marked difficult."""

    question_id: Name
    image_id: Id
    question: Text
    direct_answers: Answers = []
    difficult_direct_answer: bool = False

    def records(self, annotations: Annotations) -> Iterator[Example]:
        if not self.direct_answers and annotations.split != "test":
            raise DataError("no direct_answers; only test may lack them")
        if not self.difficult_direct_answer:
            names = [f"{prefix}{self.image_id:012d}.jpg" for prefix in ("", "COCO_train2014_", "COCO_val2014_")]
            image, text = annotations.images.find(*names), one_line(self.question)
            answers, known = tuple(one.answer for one in self.direct_answers), origins(image, coco=self.image_id)
            yield Example(self.question_id, (image,), text, annotations.split, answers=answers, origins=known)


class _RegionQuestion(BaseModel):
    id: Id = Field(validation_alias="qa_id")
    question: Text
    answer: Name


class _QuestionsOfImage(BaseModel):
    """Visual Genome's questions; all of them train."""

    id: ImageId
    qas: list[_RegionQuestion]

    def records(self, annotations: Annotations) -> Iterator[Example]:
        image = image_of(annotations, self.id)
        for one in self.qas:
            yield Example(str(one.id), (image,), one_line(one.question), "train", answers=(one.answer,))


VQA_QUESTIONS = Format(
    "vqa",
    "VQA v2 questions",
    layouts=("questions", "list"),
    read=_vqa,
    recognises=lambda keys: (
        "question_id" in keys and keys.isdisjoint({"answers", "image", "answer", "label", "choices"})
    ),
    aside=r"test-dev|MultipleChoice_",  # test2015 contains test-dev; the other task has the same questions
)
VQA_ANSWERS = Format(
    "vqa-answers",
    "VQA v2 annotations",
    layouts=("annotations", "list"),
    read=lambda annotations: (),  # they are read with their questions
    recognises=lambda keys: {"question_id", "answers"} <= keys and keys.isdisjoint({"question", "image"}),
    has_images=False,
)
A_OKVQA = Format(
    "a-okvqa",
    "A-OKVQA's questions with direct answers (aokvqa_*.json)",
    layouts=("list",),
    read=each_record(_DirectQuestion, "question_id"),
    recognises=lambda keys: {"question_id", "choices"} <= keys,
)
LISTED = Format(
    "vqa-list",
    "questions with the names of their images (VizWiz, BLIP)",
    layouts=("list", "lines"),
    read=each_record(_ListedQuestion, "id"),
    recognises=lambda keys: {"image", "question"} <= keys and "text" not in keys,
)
GQA = replace(
    LISTED,
    name="gqa",
    title="GQA questions",
    layouts=("values",),
    recognises=lambda keys: {"imageId", "question"} <= keys,
    aside=r"_all_questions",  # the balanced ones, which they contain, are what the field trains on
)
VG_QUESTIONS = Format(
    "vg-qa",
    "Visual Genome's question_answers.json",
    layouts=("list",),
    read=each_record(_QuestionsOfImage, "id"),
    recognises=lambda keys: "qas" in keys,
)
QUESTIONS: tuple[Format[Example], ...] = (VQA_QUESTIONS, A_OKVQA, GQA, LISTED, VG_QUESTIONS)
"""In a folder, the first of them that is there is the set."""


def scoring_rule(questions: Sequence[Example]) -> str:
    """How these questions are scored, as far as that is not the official rule; empty if it is."""
    few = sum(0 < len(one.answers) < FEWEST_ANSWERS for one in questions)
    if not few:
        return ""
    return (
        f"{few} of {len(questions)} questions have one to three answers: their targets and scores are exact matches of "
        "any of them, because the official VQA score leaves one person out"
    )


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


def read_easy_vqa() -> list[Example]:
    """easy-VQA, from its installed package: 64 x 64 drawings, 13 answers, one answer for each question.

    A tenth of the training images, by their number, validates: the package has no such split.
    """
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise DataError(f"{EASY_VQA}: the package is not installed; pip install easy-vqa")
    examples = []
    for part in ("train", "test"):
        folder = Path(spec.origin).parent / "data" / part
        images = ImageIndex([folder / "images"])
        questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
        for number, (question, answer, image) in enumerate(questions):
            split = "val" if part == "train" and int(image) % 10 == 0 else part
            file = images.find(f"{image}.png")
            examples.append(Example(f"{part}-{number}", (file,), question, split, answers=(answer,)))
    return examples
