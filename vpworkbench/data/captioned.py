"""Readers of captioned sets as published: Karpathy's splits, COCO, Visual Genome, NLVR v1, Flickr, a custom table.

A set is named by its folder or its annotation file. Images are beside it, in folders or zips that are read in place.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field

from vpworkbench.data.files import SPLITS, faults_at, json_list, read_text, remark, split_word
from vpworkbench.data.images import ImageFile, Places, origins
from vpworkbench.data.instances import InstanceMasks, instances_beside
from vpworkbench.data.nlvr1 import Box
from vpworkbench.data.readers import (
    TRUE_FALSE,
    Annotations,
    AnyText,
    Format,
    Groups,
    Id,
    Name,
    Text,
    Truth,
    convert,
    each_record,
    numbered,
    one_line,
    open_set,
)
from vpworkbench.data.records import Picture
from vpworkbench.data.tables import Row, known_label, read_rows, split_rows
from vpworkbench.errors import DataError
from vpworkbench.scenes.scene import Scene


def read_pictures(path: str | Path, *, images: Places = ()) -> list[Picture]:
    """Read a set of captioned images: all splits, in the order of its files.

    Parameters
    ----------
    path
        An annotation file, or the folder of a set, see `CAPTIONED`.
    images
        Folders and zips of images; empty: those beside the annotation file, or in the folder.
    """
    hint = ". 04_finetune reads the files of downstream tasks"
    return [picture for file in open_set(path, CAPTIONED, images, hint=hint) for picture in file.read()]


KnownId = Annotated[Id, BeforeValidator(lambda value: 0 if str(value) in NO_ID else value)]
"""An id, 0 where it is not known. Only positive ones identify, see `origins`."""
NO_ID = ("", "-1", "None", "null", "nan")


class _Sentence(BaseModel):
    raw: Text


class _KarpathyImage(BaseModel):
    filename: AnyText
    split: str = Field(pattern=f"^({'|'.join(SPLITS)})$")
    sentences: list[_Sentence] = Field(min_length=1)
    filepath: AnyText = ""
    cocoid: KnownId = 0
    things: list[dict[str, Any]] | None = None  # of a generated scene
    image_px: int = 0

    def records(self, annotations: Annotations) -> Iterator[Picture]:
        split = SPLITS[self.split]
        captions = [one_line(sentence.raw) for sentence in self.sentences]
        if split == "train":  # in the other splits each caption is a query, also one that an image has twice
            captions = list(dict.fromkeys(captions))
        with_folder = [f"{self.filepath}/{self.filename}"] if self.filepath else []
        image = annotations.images.find(*with_folder, self.filename)
        flickr = str(annotations.first.get("dataset", "")).startswith("flickr")  # their names begin with its ids
        try:
            drawn = {"things": self.things, "image_px": self.image_px}
            scene = None if self.things is None else Scene.from_json(drawn)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"things: {error}; correct them or drop the record") from None
        yield Picture(
            id=self.filename,
            image=image,
            split=split,
            captions=tuple(captions),
            scene=scene,
            origins=origins(image, name=self.filename, coco=self.cocoid, flickr=self.filename if flickr else None),
        )


class _CocoImage(BaseModel):
    id: Id
    file_name: AnyText = Field(min_length=1)
    flickr_url: AnyText | None = None


class _CocoCaption(BaseModel):
    id: Id
    image_id: Id
    caption: AnyText


def _coco(annotations: Annotations) -> list[Picture]:
    subset = annotations.file.stem.removeprefix("captions_")
    outlines = instances_beside(annotations.file)
    listed = annotations.first.get("images")
    if not isinstance(listed, list):
        raise DataError(f"{annotations.file}: captions without a list of images; take the file as published")
    images = {str(raw.get("id")) for raw in listed if isinstance(raw, dict)}
    captions: dict[int, dict[str, None]] = defaultdict(dict)  # by image, each text once

    def picture(record: _CocoImage) -> Iterator[tuple[int, Picture]]:
        image = annotations.images.find(f"{subset}/{record.file_name}", record.file_name)
        known = origins(image, coco=record.id, flickr=record.flickr_url)
        instances = outlines and InstanceMasks(outlines, record.id)
        options = {"captions": (), "instances": instances, "origins": known}
        yield record.id, Picture(record.file_name, image, annotations.split, **options)

    def caption(record: _CocoCaption) -> Iterator[tuple[int, str]]:
        if str(record.image_id) not in images:
            raise DataError(f"image_id {record.image_id} is none of the images; correct it or drop the caption")
        yield record.image_id, one_line(record.caption)

    pictures = list(convert(annotations.file, numbered("images", listed), _CocoImage, "id", picture))
    for image_id, text in convert(annotations.file, annotations.items, _CocoCaption, "id", caption):
        captions[image_id][text] = None
    captioned = (replace(one, captions=tuple(filter(None, captions[number]))) for number, one in pictures)
    return _with_captions(annotations.file, captioned)


def _with_captions(file: Path, pictures: Iterable[Picture]) -> list[Picture]:
    """The pictures that have a caption; the others are counted."""
    pictures = list(pictures)
    captioned = [picture for picture in pictures if picture.captions]
    if left_out := len(pictures) - len(captioned):
        remark(f"{file}: {left_out} images without a caption are left out")
    return captioned


class _Region(BaseModel):
    phrase: AnyText


ImageId = Annotated[Id, Field(validation_alias=AliasChoices("id", "image_id"))]
"""An image of Visual Genome, by its own number."""


def image_of(annotations: Annotations, number: int) -> ImageFile:
    """Visual Genome's image, which is in one of its two folders."""
    return annotations.images.find(*(f"{folder}{number}.jpg" for folder in ("VG_100K/", "VG_100K_2/", "")))


class _RegionImage(BaseModel):
    id: ImageId
    regions: list[_Region]


class _ImageData(BaseModel):
    image_id: Id
    coco_id: KnownId = 0
    flickr_id: KnownId = 0


def _visual_genome(annotations: Annotations) -> list[Picture]:
    """The phrases of an image's regions are its captions; all images train."""
    known = _image_data(annotations.file.with_name("image_data.json"))

    def picture(record: _RegionImage) -> Iterator[Picture]:
        image = image_of(annotations, record.id)
        phrases = dict.fromkeys(one_line(region.phrase) for region in record.regions)
        ids = known.get(record.id, _ImageData(image_id=record.id))
        yield Picture(
            id=str(record.id),
            image=image,
            split="train",
            captions=tuple(phrase for phrase in phrases if phrase),
            origins=origins(image, coco=ids.coco_id, flickr=ids.flickr_id),
        )

    pictures = convert(annotations.file, annotations.items, _RegionImage, "id", picture)
    return _with_captions(annotations.file, pictures)


def _image_data(file: Path) -> dict[int, _ImageData]:
    """The ids of Visual Genome's images in COCO and at Flickr."""
    if not file.exists():
        remark(f"{file}: missing, so that copies in COCO and Flickr30k are found by their content only")
        return {}
    records = convert(file, json_list(file, read_text(file)), _ImageData, "image_id", lambda record: [record])
    return {record.image_id: record for record in records}


NLVR1_VAL_DIRECTORY = "5"
"""NLVR v1's `dev` is split by `directory`, as its README advises: this one validates, the others train."""


class _Nlvr1Record(BaseModel):
    sentence: Text
    label: Truth
    identifier: AnyText
    directory: Name
    structured_rep: tuple[Box, Box, Box]

    def records(self, annotations: Annotations) -> Iterator[Picture]:
        """A picture for each of the six permutations of the boxes in training; elsewhere the first one only."""
        name = split_word(annotations.file) or annotations.file.stem
        split = annotations.split
        if split == "val" and self.directory != NLVR1_VAL_DIRECTORY:
            split = "train"
        statement = (one_line(self.sentence),)
        for order in range(6 if split == "train" else 1):
            yield Picture(
                id=f"{self.identifier}-{order}",
                image=annotations.images.find(f"{self.directory}/{name}-{self.identifier}-{order}.png"),
                split=split,
                captions=statement if self.label == "True" else (),
                foils=statement if self.label == "False" else (),
                boxes=self.structured_rep,
            )


def pictures_of(rows: Iterable[Row]) -> Iterator[Picture]:
    """The rows of one image are one picture; a text without a label, or with `true`, is true of its image."""
    groups: dict[tuple[ImageFile, str], list[tuple[bool, Row]]] = defaultdict(list)
    said: dict[tuple[ImageFile, str, str], tuple[bool, Row]] = {}
    for row in rows:
        with faults_at(row.where):
            is_true = known_label(row.label or "true", TRUE_FALSE) == "True"
            if len(row.images) > 1:
                raise DataError("has image2; a captioned set has one image in each row")
            key = row.images[0], row.split
            was_true, first = said.setdefault((*key, row.text), (is_true, row))
            if was_true != is_true:
                raise DataError(f"this text has the opposite label in {first.where}; correct one of them")
            if first is row or row.split != "train":  # in the other splits each caption is a query, see Karpathy's
                groups[key].append((is_true, row))
    named: set[str] = set()
    for (image, split), texts in groups.items():
        _, first = texts[0]
        yield Picture(
            id=first.image if first.image not in named else f"{first.image} ({split})",  # has rows in several splits
            image=image,
            split=split,
            captions=tuple(row.text for is_true, row in texts if is_true),
            foils=tuple(row.text for is_true, row in texts if not is_true),
            origins=origins(image, name=first.image),
        )
        named.add(first.image)


_SPLIT_LIST = re.compile(r"(?:^|[._])(train|dev|val|test)(?:Images)?\.txt$")


def _tokens(annotations: Annotations) -> Iterator[Picture]:
    """Flickr's captions with a number for each; lists of image names beside the file, if there are any, split them."""
    listed: dict[str, str] = {}  # name without suffix -> split
    for file in sorted(annotations.file.parent.glob("*.txt")):
        if found := _SPLIT_LIST.search(file.name):
            names = read_text(file).split()
            listed |= {name.removesuffix(".jpg"): SPLITS[found[1]] for name in names}
    rows, unlisted = [], set()
    for place, raw in annotations.items:
        name, where = raw["image"], f"{annotations.file}: {place}"
        split = listed.get(name.removesuffix(".jpg"), "")
        if listed and not split:
            unlisted.add(name)
        elif text := one_line(raw["text"]):
            with faults_at(where):
                rows.append(Row(where, where, name, (annotations.images.find(name),), text, "", split))
    if unlisted:
        remark(f"{annotations.file}: {len(unlisted)} images are in no list of a split and left out")
    for picture in pictures_of(split_rows(rows, annotations.file)):
        yield replace(picture, origins=origins(picture.image, flickr=picture.id))


KARPATHY = Format(
    "karpathy",
    "Karpathy's JSON (dataset_*.json)",
    layouts=("images",),
    read=each_record(_KarpathyImage, "filename"),
    recognises=lambda keys: not keys.isdisjoint({"sentences", "sentids"}),
)
COCO = Format(
    "coco",
    "COCO captions (captions_*.json)",
    layouts=("annotations",),
    read=_coco,
    recognises=lambda keys: "caption" in keys,
)
VISUAL_GENOME = Format(
    "vg",
    "Visual Genome (region_descriptions.json)",
    layouts=("list",),
    read=_visual_genome,
    recognises=lambda keys: "regions" in keys,
)
NLVR1 = Format(
    "nlvr1",
    "NLVR v1 JSON lines",
    layouts=("lines",),
    read=each_record(_Nlvr1Record, "identifier"),
    recognises=lambda keys: "structured_rep" in keys,
)
TOKENS = Format(
    "tokens", "Flickr8k's and Flickr30k's captions (*.token)", layouts=("tokens",), read=_tokens, aside=r"lemma"
)
KARPATHY_LIST = Format(
    "karpathy-list",
    "Karpathy's split as lists of image and caption (BLIP, ALBEF)",
    layouts=("list", "lines"),
    read=lambda table: pictures_of(read_rows(table)),
    recognises=lambda keys: {"image", "caption"} <= keys and "text" not in keys,
)
TABLE = Format(
    "table",
    "CSV (with a header) or JSON lines with image and text",
    layouts=("lines", "list"),
    read=lambda table: pictures_of(read_rows(table)),
    recognises=lambda keys: (
        "text" in keys or ("image" in keys and keys.isdisjoint({"caption", "question", "gold_label"}))
    ),
)

CAPTIONED: Groups = ((KARPATHY, KARPATHY_LIST, COCO, TOKENS), (VISUAL_GENOME,), (NLVR1,), (TABLE,))
"""In a folder, Karpathy's split replaces COCO's and Flickr's own; Visual Genome and NLVR v1 are read beside it."""
