"""Readers of captioned sets as published: Karpathy's JSON, COCO captions, Visual Genome, NLVR v1, a custom table.

A set is named by its folder or its annotation file. Images are beside it, in folders or zips that are read in place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, Field, StrictInt

from vpworkbench.data.files import SPLITS, faults_at, files_of_set, json_list, read_text, remark
from vpworkbench.data.images import ImageFile, Places, origins
from vpworkbench.data.instances import InstanceMasks, instances_beside
from vpworkbench.data.nlvr1 import Box
from vpworkbench.data.readers import (
    Annotations,
    Format,
    Text,
    convert,
    each_record,
    numbered,
    one_line,
    open_annotations,
)
from vpworkbench.data.records import Picture
from vpworkbench.data.tables import TABLE_FILES, TRUE_FALSE, Row, known_label, read_rows
from vpworkbench.errors import DataError
from vpworkbench.scenes.scene import Scene

NLVR1_FILES = ("train.json", "dev.json", "test.json", "train/train.json", "dev/dev.json", "test/test.json")
FILES = (
    ("dataset_*.json",),  # Karpathy
    ("captions_*.json", "annotations/captions_*.json"),  # COCO
    ("region_descriptions.json", "annotations/region_descriptions.json"),  # Visual Genome
    NLVR1_FILES,
    TABLE_FILES,
)
"""The files of a captioned set in its folder: the first line that is there, see `files_of_set`."""


def read_pictures(path: str | Path, *, images: Places = ()) -> list[Picture]:
    """Read a set of captioned images: all splits, in the order of its files.

    Parameters
    ----------
    path
        An annotation file, whose format is recognised by its content, or a folder, see `FILES`.
    images
        Folders and zips of images; empty: those beside the annotation file.
    """
    hint = ". 04_finetune reads the files of downstream tasks"
    opened = (open_annotations(file, CAPTIONED, images, hint=hint) for file in files_of_set(path, FILES))
    return [picture for annotations in opened for picture in annotations.read()]


class _Sentence(BaseModel):
    raw: Text


class _KarpathyImage(BaseModel):
    filename: str
    split: str = Field(pattern=f"^({'|'.join(SPLITS)})$")
    sentences: list[_Sentence] = Field(min_length=1)
    filepath: str = ""
    cocoid: StrictInt | None = None
    things: list[dict[str, Any]] | None = None  # of a generated scene
    image_px: int = 0

    def records(self, annotations: Annotations) -> Iterator[Picture]:
        split = SPLITS[self.split]
        captions = [one_line(sentence.raw) for sentence in self.sentences]
        if split == "train":  # in the other splits each caption is a query, also one that an image has twice
            captions = list(dict.fromkeys(captions))
        with_folder = [f"{self.filepath}/{self.filename}"] if self.filepath else []
        image = annotations.images.find(*with_folder, self.filename)
        names_are_flickr_ids = str(annotations.first.get("dataset", "")).startswith("flickr")
        scene = {"things": self.things, "image_px": self.image_px}
        yield Picture(
            id=self.filename,
            image=image,
            split=split,
            captions=tuple(captions),
            scene=None if self.things is None else Scene.from_json(scene),
            origins=origins(image, coco=self.cocoid, flickr=self.filename if names_are_flickr_ids else None),
        )


class _CocoImage(BaseModel):
    id: StrictInt
    file_name: str = Field(min_length=1)
    flickr_url: str | None = None


class _CocoCaption(BaseModel):
    id: StrictInt
    image_id: StrictInt
    caption: str


def _coco(annotations: Annotations) -> list[Picture]:
    subset = annotations.file.stem.removeprefix("captions_")
    outlines = instances_beside(annotations.file)
    images = {str(raw.get("id")) for raw in annotations.first["images"] if isinstance(raw, dict)}
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

    pictures = list(convert(annotations.file, annotations.items, _CocoImage, "id", picture))
    captioned = numbered("annotations", annotations.first["annotations"])
    for image_id, text in convert(annotations.file, captioned, _CocoCaption, "id", caption):
        captions[image_id][text] = None
    return _with_captions(
        annotations.file, (replace(one, captions=tuple(filter(None, captions[number]))) for number, one in pictures)
    )


def _with_captions(file: Path, pictures: Iterable[Picture]) -> list[Picture]:
    """The pictures that have a caption; the others are counted."""
    pictures = list(pictures)
    captioned = [picture for picture in pictures if picture.captions]
    if left_out := len(pictures) - len(captioned):
        remark(f"{file}: {left_out} images without a caption are left out")
    return captioned


class _Region(BaseModel):
    phrase: str


class _RegionImage(BaseModel):
    id: StrictInt = Field(validation_alias=AliasChoices("id", "image_id"))
    regions: list[_Region]


class _ImageData(BaseModel):
    image_id: StrictInt
    coco_id: StrictInt | None = None
    flickr_id: StrictInt | None = None


def _visual_genome(annotations: Annotations) -> list[Picture]:
    """The phrases of an image's regions are its captions; all images train."""
    known = _image_data(annotations.file.with_name("image_data.json"))

    def picture(record: _RegionImage) -> Iterator[Picture]:
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
    label: Literal["true", "false"]
    identifier: str
    directory: str
    structured_rep: tuple[Box, Box, Box]

    def records(self, annotations: Annotations) -> Iterator[Picture]:
        """A picture for each of the six permutations of the boxes in training; elsewhere the first one only."""
        name = annotations.file.stem
        split = SPLITS.get(name, "train")
        if split == "val" and self.directory != NLVR1_VAL_DIRECTORY:
            split = "train"
        statement = (one_line(self.sentence),)
        for order in range(6 if split == "train" else 1):
            yield Picture(
                id=f"{self.identifier}-{order}",
                image=annotations.images.find(f"{self.directory}/{name}-{self.identifier}-{order}.png"),
                split=split,
                captions=statement if self.label == "true" else (),
                foils=statement if self.label == "false" else (),
                boxes=self.structured_rep,
            )


def pictures_of(rows: Iterable[Row]) -> Iterator[Picture]:
    """The rows of one image are one picture; a text without a label, or with `true`, is true of its image."""
    groups: dict[tuple[ImageFile, str], dict[str, tuple[bool, Row]]] = defaultdict(dict)  # each text once
    for row in rows:
        with faults_at(row.where):
            is_true = known_label(row.label or "true", TRUE_FALSE) == "True"
            if len(row.images) > 1:
                raise DataError("has image2; a captioned set has one image in each row")
            was_true, first = groups[row.images[0], row.split].setdefault(row.text, (is_true, row))
            if was_true != is_true:
                raise DataError(f"this text has the opposite label in {first.where}; correct one of them")
    named: set[str] = set()
    for (image, split), texts in groups.items():
        _, first = next(iter(texts.values()))
        yield Picture(
            id=first.image if first.image not in named else f"{first.image} ({split})",  # has rows in several splits
            image=image,
            split=split,
            captions=tuple(text for text, (is_true, _) in texts.items() if is_true),
            foils=tuple(text for text, (is_true, _) in texts.items() if not is_true),
            origins=origins(image),
        )
        named.add(first.image)


KARPATHY = Format(
    "karpathy",
    "Karpathy's JSON (dataset_*.json)",
    layout="images",
    read=each_record(_KarpathyImage, "filename"),
    recognises=lambda keys: "annotations" not in keys,
)
COCO = Format(
    "coco",
    "COCO captions (captions_*.json)",
    layout="images",
    read=_coco,
    recognises=lambda keys: "annotations" in keys and "categories" not in keys,  # no boxes
)
VISUAL_GENOME = Format(
    "vg",
    "Visual Genome (region_descriptions.json)",
    layout="list",
    read=_visual_genome,
    recognises=lambda keys: "regions" in keys,
)
NLVR1 = Format(
    "nlvr1",
    "NLVR v1 JSON lines",
    layout="lines",
    read=each_record(_Nlvr1Record, "identifier"),
    recognises=lambda keys: "structured_rep" in keys,
)
TABLE = Format(
    "table",
    "CSV (with a header) or JSON lines with image and text",
    layout="lines",
    read=lambda table: pictures_of(read_rows(table)),
    recognises=lambda keys: "image" in keys or "text" in keys,
)

CAPTIONED: tuple[Format[Picture], ...] = (KARPATHY, COCO, VISUAL_GENOME, NLVR1, TABLE)
