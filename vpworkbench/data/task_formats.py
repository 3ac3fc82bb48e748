"""Readers of the downstream tasks' original files: VQA v2, NLVR2, NLVR v1, SNLI-VE, easy-VQA; no conversion step.

A set is one split: its annotation file and the images, in a folder or straight from a zip. Faults name the file and
the record.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from vpworkbench.data.formats import read_pictures
from vpworkbench.data.records import DataError, Example, ImageFile, archive, image_file, one_record

M = TypeVar("M", bound=BaseModel)

ENTAILMENT = ("entailment", "neutral", "contradiction")


class ImageIndex:
    """The images of a set by their file names, wherever below a folder or in which zip they lie.

    Parameters
    ----------
    places : sequence of path
        Folders and zips.

    Raises
    ------
    DataError
        If one does not exist, or none holds a file.
    """

    def __init__(self, places: Sequence[Path]) -> None:
        self.places = places
        self._by_name: dict[str, ImageFile] = {}
        for place in places:
            for name in _names(place):
                self._by_name.setdefault(name.rsplit("/", 1)[-1], ImageFile(place, name))
        if not self._by_name:
            raise DataError(f"{', '.join(map(str, places)) or 'no place'}: no images there")

    def find(self, names: Sequence[str], *, record: str) -> ImageFile:
        """The first of `names` that is there; `DataError` names the record where none is."""
        for name in names:
            image_file(Path(), name, source=record)  # refuses names that leave the folder
            if (found := self._by_name.get(name.rsplit("/", 1)[-1])) is not None:
                return found
        raise DataError(
            f"{record}: image {' or '.join(names)} missing in {', '.join(map(str, self.places))}; restore it or drop "
            "the record"
        )


def image_index(annotations: Path, images: str | Path | Sequence[str | Path] | None) -> ImageIndex:
    """Where the images of an annotation file lie: the places given, else every zip and folder beside it."""
    if images is not None:
        given = [images] if isinstance(images, str | Path) else list(images)
        return ImageIndex([Path(place).expanduser() for place in given])
    folder = annotations.parent
    beside = [place for place in sorted(folder.iterdir()) if place.suffix == ".zip" or place.is_dir()]
    return ImageIndex([place for place in beside if place.stem not in ("object_maps", "__MACOSX")])


def _names(place: Path) -> list[str]:
    if place.suffix == ".zip" and place.is_file():
        return [name for name in archive(place).namelist() if not name.endswith("/")]
    if place.is_dir():
        return [path.relative_to(place).as_posix() for path in sorted(place.rglob("*")) if path.is_file()]
    raise DataError(f"{place}: no such folder or zip of images")


# ------------------------------------------------------------------------------------------------------- VQA


class _Question(BaseModel):
    question_id: int
    image_id: int
    question: str = Field(min_length=1)


class _Answer(BaseModel):
    answer: str


class _Annotation(BaseModel):
    question_id: int
    image_id: int
    answers: list[_Answer] = Field(min_length=1)
    question_type: str = ""
    answer_type: str = ""


def read_vqa(questions: str | Path, annotations: str | Path | None, *, split: str, images: Any = None) -> list[Example]:
    """VQA v2: `v2_OpenEnded_mscoco_*_questions.json` and, but for a test set, `v2_mscoco_*_annotations.json`.

    Parameters
    ----------
    images
        Folders or zips; those beside the questions where not given.

    Raises
    ------
    DataError
        For a broken or repeated record, an annotation without its question or the reverse, a missing image.
    """
    questions = Path(questions).expanduser()
    content = _json(questions, "questions")
    found = image_index(questions, images)
    known = {} if annotations is None else _annotations(Path(annotations).expanduser())
    subset = str(content.get("data_subtype", ""))
    examples = []
    for number, raw in enumerate(content["questions"]):
        with one_record():
            record = checked(_Question, raw, questions, f"questions[{number}]")
            where = f"{questions}: questions[{number}] (question_id {record.question_id})"
            annotation = known.pop(record.question_id, None)
            if annotations is not None and annotation is None:
                raise DataError(f"{where}: no annotation of it in {annotations}; take both files of one release")
            if annotation is not None and annotation.image_id != record.image_id:
                raise DataError(f"{where}: image_id {record.image_id}, but {annotation.image_id} in {annotations}")
            examples.append(
                Example(
                    id=str(record.question_id),
                    images=(found.find(_vqa_names(record.image_id, subset), record=where),),
                    text=" ".join(record.question.split()),
                    split=split,
                    answers=() if annotation is None else tuple(answer.answer for answer in annotation.answers),
                    kind="" if annotation is None else annotation.answer_type,
                )
            )
    with one_record():
        if known:
            raise DataError(f"{annotations}: question_id {next(iter(known))} is in no question of {questions}")
    return unique(examples, questions)


def _annotations(file: Path) -> dict[int, _Annotation]:
    known: dict[int, _Annotation] = {}
    for number, raw in enumerate(_json(file, "annotations")["annotations"]):
        with one_record():
            record = checked(_Annotation, raw, file, f"annotations[{number}]")
            if record.question_id in known:
                raise DataError(f"{file}: annotations[{number}]: question_id {record.question_id} a second time")
            known[record.question_id] = record
    return known


def _vqa_names(image_id: int, subset: str) -> list[str]:
    """COCO's names as published, then without their prefix; of generated scenes, split and number."""
    scene = f"{('train', 'val', 'test')[image_id // 10_000_000 % 3]}-{image_id % 10_000_000:06d}.png"
    return [f"COCO_{subset}_{image_id:012d}.jpg", f"{image_id:012d}.jpg", scene, f"{image_id}.jpg", f"{image_id}.png"]


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
    found = ImageIndex([folder / "images"])
    examples = []
    for number, (question, answer, image) in enumerate(json.loads((folder / "questions.json").read_text())):
        where = f"{folder / 'questions.json'}: [{number}]"
        examples.append(
            Example(
                id=f"{split}-{number}",
                images=(found.find([f"{image}.png"], record=where),),
                text=question,
                split=split,
                answers=(answer,) * 10,
            )
        )
    return examples


# ------------------------------------------------------------------------------------------------ statements


class _Nlvr2(BaseModel):
    identifier: str = Field(min_length=5)
    sentence: str = Field(min_length=1)
    label: Literal["True", "False"] | None = None


def read_nlvr2(file: str | Path, *, split: str, images: Any = None) -> list[Example]:
    """NLVR2's json lines; images by the naming of its release, `<identifier without its last part>-img0.png`."""
    file = Path(file).expanduser()
    found = image_index(file, images)
    examples = []
    for number, raw in json_lines(file):
        with one_record():
            record = checked(_Nlvr2, raw, file, f"line {number}")
            where = f"{file}: line {number} ({record.identifier})"
            pair = record.identifier.rsplit("-", 1)[0]
            sides = (found.find([f"{pair}-img{side}.png"], record=where) for side in (0, 1))
            examples.append(
                Example(record.identifier, tuple(sides), " ".join(record.sentence.split()), split, label=record.label)
            )
    return unique(examples, file)


def read_nlvr1(path: str | Path) -> list[Example]:
    """NLVR v1 as single-image true / false, split as `read_pictures` does; the six orders of training boxes apart."""
    return [
        Example(
            id=picture.id,
            images=(picture.image,),
            text=text,
            split=picture.split,
            label=str(bool(picture.captions)),
            boxes=picture.truth.keywords["boxes"] if isinstance(picture.truth, partial) else (),
        )
        for picture in read_pictures(path)
        for text in picture.captions + picture.foils
    ]


class _SnliVe(BaseModel):
    sentence1: str
    sentence2: str = Field(min_length=1)
    gold_label: Literal["entailment", "neutral", "contradiction", "-"]
    Flickr30K_ID: str
    pairID: str


def read_snli_ve(file: str | Path, *, split: str, images: Any = None, premise: bool = False) -> list[Example]:
    """SNLI-VE's json lines over Flickr30k's images; records without a gold label ("-") are left out.

    Parameters
    ----------
    premise : bool
        Put the text premise before the hypothesis. It is the image's own Flickr caption and leaks: off unless asked.
    """
    file = Path(file).expanduser()
    found = image_index(file, images)
    examples = []
    for number, raw in json_lines(file):
        with one_record():
            record = checked(_SnliVe, raw, file, f"line {number}")
            if record.gold_label == "-":
                continue
            where = f"{file}: line {number} ({record.pairID})"
            image = found.find([f"{record.Flickr30K_ID}.jpg", f"{record.Flickr30K_ID}.png"], record=where)
            text = f"{record.sentence1} {record.sentence2}" if premise else record.sentence2
            examples.append(Example(record.pairID, (image,), " ".join(text.split()), split, label=record.gold_label))
    return unique(examples, file)


# ---------------------------------------------------------------------------------------------------- common


def checked(kind: type[M], raw: Any, file: Path, record: str) -> M:
    """One record of a file as its model; `DataError` names file, record and key."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise DataError(f"{file}: {record}: {key}: {fault['msg']}; correct the record") from None


def json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of a file of json lines; blank lines are skipped."""
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}: line {number} is not json ({error}); is the file whole?") from None


def unique(examples: Iterable[Example], file: Path) -> list[Example]:
    """The examples; `DataError` where an id comes twice, or there is none."""
    found: dict[str, Example] = {}
    for example in examples:
        with one_record():
            if example.id in found:
                raise DataError(f"{file}: {example.id}: a second record of this id; drop one of them")
            found[example.id] = example
    if not found:
        raise DataError(f"{file}: holds no record")
    return list(found.values())


def _json(file: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: not json ({error}); is the file whole?") from None
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise DataError(f"{file}: has no list {key!r}; is it the file that is meant?")
    return content


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error})") from None
