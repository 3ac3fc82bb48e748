"""Readers of captioned sets as published: Karpathy's JSON, COCO captions, Visual Genome, NLVR v1, a custom table.

A set is named by its folder or its annotation file. Images are beside it, in folders or zips that are read in place.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, Field, StrictInt

from vpworkbench.data import nlvr1
from vpworkbench.data.files import SPLITS, read_list, remark, report_fault
from vpworkbench.data.images import ImageFile, Places, origins
from vpworkbench.data.readers import Annotations, Format, Text, convert, has_lists, one_line, open_annotations
from vpworkbench.data.records import Picture
from vpworkbench.data.tables import TABLE_TITLE, Row, is_table, read_rows, true_or_false
from vpworkbench.errors import DataError
from vpworkbench.scenes.scene import Scene


def read_pictures(path: str | Path, *, images: Places = ()) -> list[Picture]:
    """Read a set of captioned images: all splits, in the order of its files.

    Parameters
    ----------
    path
        An annotation file, whose format is recognised by its content, or a folder. In a folder the first of these is
        read: `dataset_*.json` (Karpathy), `captions_*.json` (COCO), `region_descriptions.json` (Visual Genome),
        `dev.json` and `test.json` (NLVR v1), a custom CSV or JSON lines of `image,text[,label,split]`, whose labels are
        `true` and `false`.
    images
        Folders and zips of images; empty: those beside the annotation file (see `images.image_index`).
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; `data` takes 'scenes' or a set's folder or annotation file")
    files = _annotation_files(path) if path.is_dir() else [path]
    hint = ". 04_finetune reads the files of downstream tasks"
    opened = (open_annotations(file, CAPTIONED, images, hint=hint) for file in files)
    return [picture for annotations in opened for picture in annotations.read()]


NLVR1_FILES = ("train.json", "dev.json", "test.json", "train/train.json", "dev/dev.json", "test/test.json")
TABLE_FILES = ("*.csv", "*.jsonl")
FILES = (
    ("dataset_*.json",),
    ("captions_*.json", "annotations/captions_*.json"),
    ("region_descriptions.json", "annotations/region_descriptions.json"),
    NLVR1_FILES,
    TABLE_FILES,
)
"""The names that are looked for in a folder; the first line with a file makes the set."""


def _annotation_files(folder: Path) -> list[Path]:
    for patterns in FILES:
        if files := matching_files(folder, patterns):
            return files
    searched = ", ".join(patterns[0] for patterns in FILES)
    raise DataError(f"{folder}: holds none of {searched}; name the annotation file itself")


def matching_files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files in a folder by their names, without hidden ones."""
    return [file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.name[0] != "."]


# --------------------------------------------------------------------------------------------------- Karpathy


class _Sentence(BaseModel):
    raw: Text


class _KarpathyImage(BaseModel):
    filename: str
    split: str = Field(pattern=f"^({'|'.join(SPLITS)})$")
    sentences: list[_Sentence] = Field(min_length=1)
    filepath: str = ""
    cocoid: StrictInt | None = None
    things: list[dict[str, Any]] | None = None
    image_px: int = 0

    def scene(self) -> Scene | None:
        """The ground truth of a generated scene."""
        return None if self.things is None else Scene.from_json({"things": self.things, "image_px": self.image_px})


def _karpathy(annotations: Annotations) -> Iterator[Picture]:
    names_are_flickr_ids = str(annotations.content.get("dataset", "")).startswith("flickr")

    def picture(record: _KarpathyImage) -> Iterator[Picture]:
        split = SPLITS[record.split]
        captions = [one_line(sentence.raw) for sentence in record.sentences]
        if split == "train":  # in the other splits each caption is a query, also one that an image has twice
            captions = list(dict.fromkeys(captions))
        with_folder = [f"{record.filepath}/{record.filename}"] if record.filepath else []
        image = annotations.images.find(*with_folder, record.filename)
        yield Picture(
            id=record.filename,
            image=image,
            split=split,
            captions=tuple(captions),
            scene=record.scene(),
            origins=origins(image, coco=record.cocoid, flickr=record.filename if names_are_flickr_ids else None),
        )

    return convert(annotations.file, annotations.listed("images"), _KarpathyImage, "filename", picture)


# ------------------------------------------------------------------------------------------------------- COCO


class _CocoImage(BaseModel):
    id: StrictInt
    file_name: str = Field(min_length=1)
    flickr_url: str | None = None


class _CocoCaption(BaseModel):
    id: StrictInt
    image_id: StrictInt
    caption: str


def _coco(annotations: Annotations) -> Iterator[Picture]:
    subset = annotations.file.stem.removeprefix("captions_")

    def picture(record: _CocoImage) -> Iterator[tuple[int, Picture]]:
        image = annotations.images.find(f"{subset}/{record.file_name}", record.file_name)
        known = origins(image, coco=record.id, flickr=record.flickr_url)
        yield record.id, Picture(record.file_name, image, annotations.split, captions=(), origins=known)

    pictures = list(convert(annotations.file, annotations.listed("images"), _CocoImage, "id", picture))
    captions = _coco_captions(annotations)
    captioned = (replace(picture, captions=tuple(captions.get(number, ()))) for number, picture in pictures)
    return _with_captions(annotations.file, captioned)


def _coco_captions(annotations: Annotations) -> dict[int, dict[str, None]]:
    """Captions by the id of their image: each text once, in order, without empty ones."""
    images = {str(raw.get("id")) for _, raw in annotations.listed("images") if isinstance(raw, dict)}
    captions: dict[int, dict[str, None]] = defaultdict(dict)

    def caption(record: _CocoCaption) -> Iterator[tuple[int, str]]:
        if str(record.image_id) not in images:
            raise DataError(f"image_id {record.image_id} is none of the images; correct it or drop the caption")
        yield record.image_id, one_line(record.caption)

    listed = annotations.listed("annotations")
    for image_id, text in convert(annotations.file, listed, _CocoCaption, "id", caption):
        if text:
            captions[image_id][text] = None
    return captions


def _with_captions(file: Path, pictures: Iterator[Picture]) -> Iterator[Picture]:
    """The pictures that have a caption; the others are counted."""
    left_out = 0
    for picture in pictures:
        if picture.captions:
            yield picture
        else:
            left_out += 1
    if left_out:
        remark(f"{file}: {left_out} images without a caption are left out")


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


def _visual_genome(annotations: Annotations) -> Iterator[Picture]:
    """The phrases of an image's regions are its captions; all images train."""
    known = _image_data(annotations.file.with_name("image_data.json"))

    def picture(record: _RegionImage) -> Iterator[Picture]:
        if others := [region for region in record.regions if region.image_id not in (None, record.id)]:
            raise DataError(f"region {others[0].region_id} is of image_id {others[0].image_id}; correct or drop it")
        counts = Counter(region.region_id for region in record.regions)
        if repeated := [number for number, count in counts.items() if count > 1]:
            raise DataError(f"region_id {repeated[0]} a second time; drop one of them")
        image = annotations.images.find(*(f"{folder}{record.id}.jpg" for folder in ("VG_100K/", "VG_100K_2/", "")))
        phrases = dict.fromkeys(one_line(region.phrase) for region in record.regions)
        ids = known.get(record.id, _ImageData(image_id=record.id))
        yield Picture(
            id=str(record.id),
            image=image,
            split="train",
            captions=tuple(phrase for phrase in phrases if phrase),
            origins=origins(image, coco=ids.coco_id, flickr=ids.flickr_id),
        )

    pictures = convert(annotations.file, annotations.content, _RegionImage, "id", picture)
    return _with_captions(annotations.file, pictures)


def _image_data(file: Path) -> dict[int, _ImageData]:
    """The ids of Visual Genome's images in COCO and at Flickr."""
    if not file.exists():
        remark(f"{file}: missing, so that copies in COCO and Flickr30k are found by their content only")
        return {}
    records = convert(file, read_list(file), _ImageData, "image_id", lambda record: [record])
    return {record.image_id: record for record in records}


# ---------------------------------------------------------------------------------------------------- NLVR v1

NLVR1_VAL_DIRECTORY = "5"
"""NLVR v1's `dev` is split by `directory`, as its README advises: this one validates, the others train."""


class _Nlvr1Record(BaseModel):
    sentence: Text
    label: Literal["true", "false"]
    identifier: str
    directory: str
    structured_rep: list[list[dict[str, Any]]]


def _nlvr1(annotations: Annotations) -> Iterator[Picture]:
    """A picture for each of the six permutations of a record's boxes in training; elsewhere the first one only."""
    name = annotations.file.stem

    def pictures(record: _Nlvr1Record) -> Iterator[Picture]:
        split = "test" if name == "hidden" else SPLITS.get(name, "train")
        if split == "val" and record.directory != NLVR1_VAL_DIRECTORY:
            split = "train"
        try:
            boxes = nlvr1.read_boxes(record.structured_rep)
        except ValueError as error:
            raise DataError(str(error)) from None
        statement = (one_line(record.sentence),)
        for order in range(6 if split == "train" else 1):
            image = f"{record.directory}/{name}-{record.identifier}-{order}.png"
            yield Picture(
                id=f"{record.identifier}-{order}",
                image=annotations.images.find(image),
                split=split,
                captions=statement if record.label == "true" else (),
                foils=statement if record.label == "false" else (),
                boxes=boxes,
            )

    return convert(annotations.file, annotations.content, _Nlvr1Record, "identifier", pictures)


# ------------------------------------------------------------------------------------------------ custom table


@dataclass
class _Group:
    """The rows of one image in one split: each text with the place of its row."""

    name: str
    captions: dict[str, str] = field(default_factory=dict)
    foils: dict[str, str] = field(default_factory=dict)


def pictures_of(rows: Iterable[Row]) -> Iterator[Picture]:
    """The rows of one image are one picture; a text without a label, or with `true`, is true of its image."""
    groups: dict[tuple[ImageFile, str], _Group] = {}
    for row in rows:
        try:
            is_true = not row.label or true_or_false(row.label) == "True"
            if len(row.images) > 1:
                raise DataError("has image2; a captioned set has one image in each row")
            group = groups.setdefault((row.images[0], row.split), _Group(row.image))
            same, opposite = (group.captions, group.foils) if is_true else (group.foils, group.captions)
            if row.text in opposite:
                raise DataError(f"this text has the opposite label in {opposite[row.text]}; correct one of them")
            same.setdefault(row.text, row.where)
        except DataError as error:
            report_fault(f"{row.where}: {error}")
    named: set[str] = set()
    for (image, split), group in groups.items():
        yield Picture(
            id=group.name if group.name not in named else f"{group.name} ({split})",  # its rows are in several splits
            image=image,
            split=split,
            captions=tuple(group.captions),
            foils=tuple(group.foils),
            origins=origins(image),
        )
        named.add(group.name)


# ------------------------------------------------------------------------------------------------- the formats


KARPATHY = Format(
    "karpathy",
    "Karpathy's JSON (dataset_*.json)",
    layout="document",
    recognises=lambda keys: has_lists(keys, "images") and not has_lists(keys, "annotations"),
    read=_karpathy,
)
COCO = Format(
    "coco",
    "COCO captions (captions_*.json)",
    layout="document",
    recognises=lambda keys: has_lists(keys, "images", "annotations") and "categories" not in keys,  # no boxes
    read=_coco,
)
VISUAL_GENOME = Format(
    "vg", "Visual Genome (region_descriptions.json)", "list", lambda keys: "regions" in keys, read=_visual_genome
)
NLVR1 = Format("nlvr1", "NLVR v1 JSON lines", "lines", lambda keys: "structured_rep" in keys, read=_nlvr1)
TABLE = Format("table", TABLE_TITLE, "lines", is_table, read=lambda table: pictures_of(read_rows(table)))

CAPTIONED: tuple[Format[Picture], ...] = (KARPATHY, COCO, VISUAL_GENOME, NLVR1, TABLE)
