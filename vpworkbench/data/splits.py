"""Sets joined into `train`, `val` and `test`, so that no image of an evaluation split is trained on."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm.auto import tqdm

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.files import skipping_missing
from vpworkbench.data.images import ImageFile, Places, origins
from vpworkbench.data.records import Example, Picture, Record
from vpworkbench.data.scene_cache import cached_scenes
from vpworkbench.data.tables import validating
from vpworkbench.data.task_readers import open_all
from vpworkbench.errors import DataError
from vpworkbench.settings import DataSettings

log = logging.getLogger(__name__)

R = TypeVar("R", Picture, Example)


def load_splits(settings: DataSettings) -> dict[str, list[Picture]]:
    """`train`, `val` and `test` of all configured sets; scenes are generated first if they are not there yet."""
    folders = [cached_scenes(settings.scenes) if name == "scenes" else name for name in settings.sets]
    with skipping_missing(settings.missing, settings.missing_most):
        sets = [read_pictures(folder, images=settings.images) for folder in folders]
        excluded = [record for path in settings.exclude for record in evaluation_records(path, images=settings.images)]
    if not any(picture.split == "val" for picture in chain.from_iterable(sets)):
        sets = [with_validation(list(chain.from_iterable(sets)), ", ".join(settings.sets))]
    splits = split_pictures(sets, exclude=excluded)
    if not splits["train"]:
        raise DataError(f"{', '.join(settings.sets)}: no training images; name a set, or a file, that has some")
    return splits


def load_held_out(settings: DataSettings, *, images: int | None = None) -> list[Picture]:
    """The `val` of `load_splits`, or its first pictures. Of generated scenes only these are made, and one to train."""
    count = settings.scenes.val if images is None else min(images, settings.scenes.val)
    scenes = settings.scenes.model_copy(update={"images": 1, "val": count, "test": 0})
    return load_splits(settings.model_copy(update={"scenes": scenes}))["val"][:images]


def check_sizes(splits: Mapping[str, Sequence[Picture]], name: str, *, least: int = 2) -> None:
    """Refuse a set that is too small to draw unmatched texts from, before anything is trained on it.

    Training and validation need `least` images with a caption, two of which do not share all their captions.
    """
    for split in ("train", "val"):
        captioned = [picture for picture in splits.get(split, ()) if picture.captions]
        if split in splits and len(captioned) < least:
            raise DataError(
                f"{name}: {len(captioned)} images with a true text in {split}; it needs {least}, as the texts of other "
                "images are an image's unmatched ones"
            )
        texts = {text.lower() for picture in captioned for text in picture.captions + picture.foils}
        for picture in captioned:
            if not picture.foils and texts == {text.lower() for text in picture.captions}:
                raise DataError(
                    f"{name}: no text of {split} is false of {picture.image}; it needs an image with other texts"
                )


def with_validation(records: Sequence[R], name: str) -> list[R]:
    """Records none of which validates: those of a tenth of the training images do from now on."""
    training = {one.images[0].name for one in records if one.split == "train"}
    val = validating(training) if len(training) > 1 else set()
    log.warning("%s: no records of val: %d training images, chosen by their names, validate", name, len(val))
    return [replace(one, split="val") if one.split == "train" and one.images[0].name in val else one for one in records]


def evaluation_records(path: str | Path, *, images: Places = ()) -> list[Record]:
    """The records of `val` and `test` in an annotation file of any format, or in those of a folder, see `open_all`."""
    opened = open_all(path, images)
    held_out = [record for one in opened for record in one.annotations.read() if record.split != "train"]
    if not held_out:
        raise DataError(f"{path}: no records of val or test to exclude; name the file that holds them")
    return held_out


def split_pictures(sets: Iterable[Sequence[Picture]], *, exclude: Sequence[Record] = ()) -> dict[str, list[Picture]]:
    """Join sets into `train`, `val` and `test`; training images that an evaluation split holds are dropped.

    An image can be in several sets under several names. Copies are found by content and by their ids in COCO and at
    Flickr, see `photographs`, also by way of a third set: if Visual Genome says that COCO's 5 is Flickr's 7, and
    Flickr30k tests on 7, then COCO's 5 does not train. Copies in training become one picture with the texts of all:
    otherwise the caption of one could serve as an unmatched text of the other. How many were dropped and joined is
    logged. Images of `exclude` are not trained on either.
    """
    splits: dict[str, list[Picture]] = {"train": [], "val": [], "test": []}
    for picture in chain.from_iterable(sets):
        splits[picture.split].append(picture)
    held_out = [*splits["val"], *splits["test"], *exclude]
    kept, photograph = without_leaks(splits["train"], held_out, "training images are also in val or test")
    copies: dict[Hashable, list[Picture]] = defaultdict(list)
    for picture in kept:
        copies[photograph[picture.image]].append(picture)
    if more := len(kept) - len(copies):
        log.warning("%d training images are copies, joined with their originals", more)
    return splits | {"train": [same[0] if len(same) == 1 else _merged(same) for same in copies.values()]}


def _merged(copies: Sequence[Picture]) -> Picture:
    """One picture with the texts of all its copies; the first of them names it."""
    captions = dict.fromkeys(text for picture in copies for text in picture.captions)
    foils = dict.fromkeys(text for picture in copies for text in picture.foils if text not in captions)
    known = frozenset().union(*(picture.origins for picture in copies))
    return replace(copies[0], captions=tuple(captions), foils=tuple(foils), origins=known)


def without_leaks(
    training: Sequence[R], held_out: Sequence[Record], what: str
) -> tuple[list[R], dict[ImageFile, Hashable]]:
    """The training records without an image that is held out, and the mark of every image (see `photographs`).

    Logs how many are dropped, described as `what`.
    """
    records = [*training, *held_out]
    marks = photographs(records, image_contents(image for record in records for image in record.images))
    leaked = {marks[image] for record in held_out for image in record.images}
    kept = [record for record in training if leaked.isdisjoint(marks[image] for image in record.images)]
    if dropped := len(training) - len(kept):
        log.warning("%d %s: dropped", dropped, what)
    return kept, marks


def photographs(records: Iterable[Record], content: Mapping[ImageFile, Hashable]) -> dict[ImageFile, Hashable]:
    """Marks that are equal for images of one photograph: with the same content or id, directly or through others.

    An id alone is not trusted: images of different content are one photograph by their id only if they look alike, see
    `_alike`. Others are kept apart, and a warning names them. Images that `content` lacks, see `image_contents`, have
    no mate.
    """
    parent: dict[Hashable, Hashable] = {}  # a forest of images and contents: what is connected is one photograph

    def root(key: Hashable) -> Hashable:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    images: set[ImageFile] = set()
    named: dict[str, dict[Hashable, ImageFile]] = defaultdict(dict)  # id -> one image of each content
    for record in records:
        for image in record.images:
            images.add(image)
            parent[root(content.get(image, image))] = root(image)
            # Of a pair, only the names state which id belongs to which image.
            for key in record.origins if len(record.images) == 1 else origins(image):
                named[key].setdefault(content.get(image, image), image)
    doubtful = []
    for key, different in named.items():
        if len(different) > 1:
            groups = _alike(list(different.values())[:MOST_COPIES])
            for first, *others in groups:
                for other in others:
                    parent[root(other)] = root(first)
            if len(groups) > 1:
                doubtful.append(f"{key} ({groups[0][0]} and {groups[1][0]})")
    if doubtful:
        names = ", ".join(doubtful[:3]) + (", ..." if doubtful[3:] else "")
        log.warning("%d ids are given to images that do not look alike, which are kept apart: %s", len(doubtful), names)
    return {image: root(image) for image in images}


MOST_COPIES = 20
"""Images of one id and different content that are compared; more of them are a placeholder in place of an id."""
ALIKE = 16.0
"""Mean difference of the pixels, of 255, at 16 x 16: below it for a photograph in two sizes or qualities."""


def _alike(images: Sequence[ImageFile]) -> list[list[ImageFile]]:
    """Groups of images that look alike at 16 x 16 pixels; one that cannot be read is alone."""
    groups: list[tuple[np.ndarray | None, list[ImageFile]]] = []
    for image in images:
        try:
            small = image.pixels(16, quick=True).astype(np.float32)
        except DataError:
            small = None
        for other, group in groups:
            if small is not None and other is not None and np.abs(small - other).mean() < ALIKE:
                group.append(image)
                break
        else:
            groups.append((small, [image]))
    return [group for _, group in groups]


def image_contents(images: Iterable[ImageFile]) -> dict[ImageFile, Hashable]:
    """A value for each image that images of the same content share; only files that may be equal are read twice."""
    files = list(dict.fromkeys(images))
    glimpses = {image: image.glimpse() for image in tqdm(files, "comparing images", unit=" images", delay=2)}
    count = Counter(glimpses.values())
    return {image: (glimpse, image.digest() if count[glimpse] > 1 else b"") for image, glimpse in glimpses.items()}
