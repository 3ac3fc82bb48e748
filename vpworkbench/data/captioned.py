"""Readers of captioned sets as published: Karpathy's json, COCO captions, Visual Genome, NLVR v1, one's own table.

A set is named by its folder or its annotation file; images lie beside it in folders or in zips that are read in place.
Faults name the file and the record.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, Field, StrictInt

from vpworkbench.data import nlvr1
from vpworkbench.data.files import (
    FORMATS,
    SPLITS,
    Annotations,
    Text,
    checked,
    one_record,
    open_annotations,
    read_list,
    remark,
    split_named,
    unique,
)
from vpworkbench.data.images import ImageFile, ImageIndex, Places, image_index, origins
from vpworkbench.data.records import Picture
from vpworkbench.data.tables import read_rows, true_or_false
from vpworkbench.errors import DataError
from vpworkbench.scenes.scene import Scene

NLVR1_VAL_DIRECTORY = "5"
"""NLVR v1's `dev` is split by `directory`, as its README advises: this one validates, the others train."""

NLVR1_FILES = ("train.json", "dev.json", "test.json", "train/train.json", "dev/dev.json", "test/test.json")
TABLE_FILES = ("*.csv", "*.jsonl")
FOLDERS = (
    ("dataset_*.json",),
    ("captions_*.json", "annotations/captions_*.json"),
    ("region_descriptions.json", "annotations/region_descriptions.json"),
    NLVR1_FILES,
    TABLE_FILES,
)
"""What a folder is searched for; the first line that finds a file makes the set."""


def read_pictures(path: str | Path, *, images: Places = ()) -> list[Picture]:
    """Read a set of captioned images.

    Parameters
    ----------
    path
        The set's annotation file, whose format its content tells, or the folder that holds it: `dataset_*.json`
        (Karpathy), `captions_*.json` (COCO), `region_descriptions.json` (Visual Genome), `dev.json` and `test.json`
        (NLVR v1), or one's own csv or jsonl of `image,text[,label,split]`, whose labels are `true` and `false`.
    images
        Folders and zips of images; empty: those beside the annotation file (see `files.image_index`).

    Returns
    -------
    list of Picture
        Every split, in file order; only images that are there.

    Raises
    ------
    DataError
        For a path that does not exist, a file of no known format, a broken record, a missing image.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; `data` takes 'scenes' or a set's folder or annotation file")
    files = _annotation_files(path) if path.is_dir() else [path]
    return [picture for file in files for picture in read_captioned(open_annotations(file), images)]


def read_captioned(annotations: Annotations, images: Places = ()) -> list[Picture]:
    """As `read_pictures`, of one opened file."""
    if annotations.format not in READERS:
        raise DataError(
            f"{annotations.file}: is {FORMATS[annotations.format]}, of a downstream task (04_finetune reads it); "
            f"captioned sets are {'; '.join(FORMATS[name] for name in READERS)}"
        )
    index = image_index(annotations.file, images)
    return unique(READERS[annotations.format](annotations, index), annotations.file)


def _annotation_files(folder: Path) -> list[Path]:
    for patterns in FOLDERS:
        files = [file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.name[0] != "."]
        if files:
            return files
    searched = ", ".join(patterns[0] for patterns in FOLDERS)
    raise DataError(f"{folder}: holds none of {searched}; name the annotation file itself")


# --------------------------------------------------------------------------------------------------- Karpathy


class _Sentence(BaseModel):
    raw: str = Field(min_length=1)


class _KarpathyImage(BaseModel):
    filename: str
    split: str = Field(pattern=f"^({'|'.join(SPLITS)})$")
    sentences: list[_Sentence] = Field(min_length=1)
    filepath: str = ""
    cocoid: StrictInt | None = None
    things: list[dict[str, Any]] | None = None


def _karpathy(annotations: Annotations, images: ImageIndex) -> Iterator[Picture]:
    file, content = annotations.file, annotations.content
    from_flickr = str(content.get("dataset", "")).startswith("flickr")  # flickr8k and flickr30k name files by photo id
    for number, raw in enumerate(content["images"]):
        with one_record():
            record = checked(_KarpathyImage, raw, f"{file}: images[{number}]")
            where = f"{file}: images[{number}] ({record.filename})"
            split = SPLITS[record.split]
            captions = [_caption(sentence.raw, where) for sentence in record.sentences]
            if split == "train":  # of the other splits every one is a query, as published
                captions = list(dict.fromkeys(captions))
            names = (f"{record.filepath}/{record.filename}", record.filename) if record.filepath else (record.filename,)
            image = images.find(*names, where=where)
            yield Picture(
                id=record.filename,
                image=image,
                split=split,
                captions=tuple(captions),
                scene=Scene.from_json(raw) if record.things is not None else None,
                origins=origins(image, coco=record.cocoid, flickr=record.filename if from_flickr else None),
            )


def _caption(raw: str, where: str) -> str:
    text = " ".join(raw.split())
    if not text:
        raise DataError(f"{where}: an empty caption; remove it or give its text")
    return text


# ------------------------------------------------------------------------------------------------------- COCO


class _CocoImage(BaseModel):
    id: StrictInt
    file_name: str = Field(min_length=1)
    flickr_url: str | None = None


class _CocoCaption(BaseModel):
    id: StrictInt
    image_id: StrictInt
    caption: str


def _coco(annotations: Annotations, images: ImageIndex) -> Iterator[Picture]:
    """The file's name tells the split; `flickr_url` tells the photo's id at Flickr."""
    file, content = annotations.file, annotations.content
    records: dict[int, tuple[str, _CocoImage]] = {}
    for number, raw in enumerate(content["images"]):
        with one_record():
            record = checked(_CocoImage, raw, f"{file}: images[{number}]")
            where = f"{file}: images[{number}] ({record.file_name})"
            if record.id in records:
                raise DataError(f"{where}: id {record.id} a second time; drop one of them")
            records[record.id] = where, record
    captions = _coco_captions(file, content)
    subset = file.stem.removeprefix("captions_")
    for where, record in records.values():
        with one_record():
            image = images.find(f"{subset}/{record.file_name}", record.file_name, where=where)
            if not captions[record.id]:
                continue
            yield Picture(
                id=record.file_name,
                image=image,
                split=split_named(file, "train"),
                captions=tuple(captions[record.id]),
                origins=origins(image, coco=record.id, flickr=record.flickr_url),
            )
    if silent := sum(not captions[number] for number in records):
        remark(f"{file}: {silent} images without a caption are left out")


def _coco_captions(file: Path, content: dict[str, Any]) -> dict[int, dict[str, None]]:
    """Captions by the id of their image, each text once, empty ones left out."""
    known = {str(raw.get("id")) for raw in content["images"] if isinstance(raw, dict)}
    captions: dict[int, dict[str, None]] = defaultdict(dict)
    seen: set[int] = set()
    for number, raw in enumerate(content["annotations"]):
        with one_record():
            record = checked(_CocoCaption, raw, f"{file}: annotations[{number}]")
            where = f"{file}: annotations[{number}] (id {record.id})"
            if record.id in seen:
                raise DataError(f"{where}: this id a second time; drop one of them")
            seen.add(record.id)
            if str(record.image_id) not in known:
                raise DataError(f"{where}: image_id {record.image_id} is none of the images; correct or drop it")
            if text := " ".join(record.caption.split()):
                captions[record.image_id][text] = None
    return captions


# ---------------------------------------------------------------------------------------------- Visual Genome


class _Region(BaseModel):
    region_id: StrictInt
    phrase: str
    image_id: StrictInt | None = None


class _RegionImage(BaseModel):
    id: StrictInt = Field(validation_alias=AliasChoices("id", "image_id"))
    regions: list[_Region]


class _ImageData(BaseModel):
    image_id: StrictInt
    coco_id: StrictInt | None = None
    flickr_id: StrictInt | None = None


def _visual_genome(annotations: Annotations, images: ImageIndex) -> Iterator[Picture]:
    """All of it trains; the phrases of an image's regions are its captions."""
    file, silent = annotations.file, 0
    known = _image_data(beside := file.with_name("image_data.json"))
    if not beside.exists():
        remark(f"{file}: no image_data.json beside it: copies in COCO and Flickr30k can be told by content alone")
    for place, raw in annotations.content:
        with one_record():
            record = checked(_RegionImage, raw, f"{file}: {place}")
            where = f"{file}: {place} (id {record.id})"
            if strange := [region for region in record.regions if region.image_id not in (None, record.id)]:
                raise DataError(f"{where}: region {strange[0].region_id} is of image_id {strange[0].image_id}")
            numbers = Counter(region.region_id for region in record.regions)
            if again := [number for number, count in numbers.items() if count > 1]:
                raise DataError(f"{where}: region_id {again[0]} a second time; drop one of them")
            names = (f"{folder}{record.id}.jpg" for folder in ("VG_100K/", "VG_100K_2/", ""))
            image = images.find(*names, where=where)
            phrases = dict.fromkeys(" ".join(region.phrase.split()) for region in record.regions)
            captions = tuple(phrase for phrase in phrases if phrase)
            if not captions:
                silent += 1
                continue
            ids = known.get(record.id, _ImageData(image_id=record.id))
            where_else = origins(image, coco=ids.coco_id, flickr=ids.flickr_id)
            yield Picture(id=str(record.id), image=image, split="train", captions=captions, origins=where_else)
    if silent:
        remark(f"{file}: {silent} images without a region phrase are left out")


def _image_data(file: Path) -> dict[int, _ImageData]:
    if not file.exists():
        return {}
    found: dict[int, _ImageData] = {}
    for place, raw in read_list(file):
        with one_record():
            record = checked(_ImageData, raw, f"{file}: {place}")
            if record.image_id in found:
                raise DataError(f"{file}: {place}: image_id {record.image_id} a second time; drop one of them")
            found[record.image_id] = record
    return found


# ---------------------------------------------------------------------------------------------------- NLVR v1


class _Nlvr1Record(BaseModel):
    sentence: Text
    label: Literal["true", "false"]
    identifier: str
    directory: str
    structured_rep: list[list[dict[str, Any]]]


def _nlvr1(annotations: Annotations, images: ImageIndex) -> Iterator[Picture]:
    """One picture for each of the six box permutations; `dev` trains and validates, by directory."""
    file = annotations.file
    for place, raw in annotations.content:
        with one_record():
            record = checked(_Nlvr1Record, raw, f"{file}: {place}")
            where = f"{file}: {place} ({record.identifier})"
            split = "test" if file.stem == "hidden" else SPLITS.get(file.stem, "train")
            if split == "val" and record.directory != NLVR1_VAL_DIRECTORY:
                split = "train"
            sentence = " ".join(record.sentence.split())
            try:
                boxes = nlvr1.read_boxes(record.structured_rep)
            except ValueError as error:
                raise DataError(f"{where}: {error}") from None
            for order in range(6 if split == "train" else 1):
                name = f"{record.directory}/{file.stem}-{record.identifier}-{order}.png"
                yield Picture(
                    id=f"{record.identifier}-{order}",
                    image=images.find(name, where=where),
                    split=split,
                    captions=(sentence,) if record.label == "true" else (),
                    foils=(sentence,) if record.label == "false" else (),
                    boxes=boxes,
                )


# ------------------------------------------------------------------------------------------------ one's own table


@dataclass
class _Group:
    """The rows of one image; texts with where they stand."""

    name: str
    captions: dict[str, str] = field(default_factory=dict)
    foils: dict[str, str] = field(default_factory=dict)


def _table(annotations: Annotations, images: ImageIndex) -> Iterator[Picture]:
    """The rows of one image are one picture; without a label, or with `true`, a text is true of its image."""
    groups: dict[tuple[ImageFile, str], _Group] = {}
    for row in read_rows(annotations, images):
        with one_record():
            if len(row.images) > 1:
                raise DataError(f"{row.where}: has image2; a captioned set has one image a row")
            is_true = not row.label or true_or_false(row) == "True"
            group = groups.setdefault((row.images[0], row.split), _Group(row.image))
            mine, others = (group.captions, group.foils) if is_true else (group.foils, group.captions)
            if row.text in others:
                raise DataError(f"{row.where}: this text is said to be true and, in {others[row.text]}, to be false")
            mine.setdefault(row.text, row.where)
    named: set[str] = set()
    for (image, split), group in groups.items():
        yield Picture(
            id=group.name if group.name not in named else f"{group.name} ({split})",  # some of its rows are elsewhere
            image=image,
            split=split,
            captions=tuple(group.captions),
            foils=tuple(group.foils),
            origins=origins(image),
        )
        named.add(group.name)


READERS = {"karpathy": _karpathy, "coco": _coco, "vg": _visual_genome, "nlvr1": _nlvr1, "table": _table}
