"""Sets joined into `train`, `val` and `test`, so that no image of an evaluation split is trained on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tqdm.auto import tqdm

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.files import annotation_files
from vpworkbench.data.images import ImageFile, Places, origins
from vpworkbench.data.readers import UnknownFormatError, open_annotations
from vpworkbench.data.records import Example, Picture, Record, images_of
from vpworkbench.data.scene_cache import cached_scenes
from vpworkbench.data.task_readers import FORMATS, VQA_ANSWERS
from vpworkbench.errors import DataError
from vpworkbench.settings import DataSettings

log = logging.getLogger(__name__)

R = TypeVar("R", Picture, Example)

# ------------------------------------------------------------------------------------------- captioned sets


def load_splits(settings: DataSettings) -> dict[str, list[Picture]]:
    """`train`, `val` and `test` of all configured sets; scenes are generated first if they are not there yet."""
    sets = []
    for name in settings.sets:
        if name == "scenes":
            sets.append(read_pictures(cached_scenes(settings.scenes)))
        else:
            sets.append(read_pictures(name, images=settings.images))
    excluded = [record for path in settings.exclude for record in evaluation_records(path, images=settings.images)]
    splits = split_pictures(sets, exclude=excluded)
    if not splits["train"]:
        raise DataError(f"{', '.join(settings.sets)}: no training images; name a set, or a file, that has some")
    return splits


def load_held_out(settings: DataSettings, *, images: int | None = None) -> list[Picture]:
    """The `val` of `load_splits`, or its first pictures. Of generated scenes only these are made, and one to train."""
    count = settings.scenes.val if images is None else min(images, settings.scenes.val)
    scenes = settings.scenes.model_copy(update={"images": 1, "val": count, "test": 0})
    return load_splits(settings.model_copy(update={"scenes": scenes}))["val"][:images]


def evaluation_records(path: str | Path, *, images: Places = ()) -> list[Record]:
    """The records of `val` and `test` in an annotation file of any format, or in all files below a folder."""
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"{place}: no such file or folder; `exclude` takes sets whose val and test are not trained on")
    held_out: list[Record] = []
    for file in annotation_files(place):
        try:
            opened = open_annotations(file, FORMATS, images)
        except UnknownFormatError:
            if file == place:
                raise
            continue  # a folder holds other files too
        if opened.format is not VQA_ANSWERS:
            held_out += [record for record in opened.read() if record.split != "train"]
    if not held_out:
        raise DataError(f"{place}: no records of val or test to exclude; name the file that holds them")
    return held_out


def split_pictures(sets: Iterable[Sequence[Picture]], *, exclude: Sequence[Record] = ()) -> dict[str, list[Picture]]:
    """Join sets into `train`, `val` and `test`; training images that an evaluation split holds are dropped.

    An image can be in several sets under several names. Copies are found by their ids in COCO and at Flickr and by
    content, also by way of a third set: if Visual Genome says that COCO's 5 is Flickr's 7, and Flickr30k tests on 7,
    then COCO's 5 does not train. Copies in training become one picture with the texts of all: otherwise the caption of
    one could serve as an unmatched text of the other. How many were dropped and joined is logged.

    Parameters
    ----------
    exclude
        More records whose images are not trained on, see `evaluation_records`.
    """
    splits: dict[str, list[Picture]] = {"train": [], "val": [], "test": []}
    for pictures in sets:
        for picture in pictures:
            splits[picture.split].append(picture)
    held_out = [*splits["val"], *splits["test"], *exclude]
    kept, photograph = without_leaks(splits["train"], held_out, "training images are also in val or test")
    copies: dict[Hashable, list[Picture]] = {}
    for picture in kept:
        copies.setdefault(photograph[picture.image], []).append(picture)
    joined = [first if not rest else _merged(first, rest) for first, *rest in copies.values()]
    if more := len(kept) - len(joined):
        log.warning("%d training images are copies, joined with their originals", more)
    return splits | {"train": joined}


def _merged(first: Picture, rest: Sequence[Picture]) -> Picture:
    """One picture with the texts of all its copies; the first of them names it."""
    captions = dict.fromkeys(text for picture in (first, *rest) for text in picture.captions)
    foils = dict.fromkeys(text for picture in (first, *rest) for text in picture.foils if text not in captions)
    known = first.origins.union(*(picture.origins for picture in rest))
    return replace(first, captions=tuple(captions), foils=tuple(foils), origins=known)


# --------------------------------------------------------------------------------------------------- leaks


def without_leaks(
    training: Sequence[R], held_out: Sequence[Record], what: str
) -> tuple[list[R], dict[ImageFile, Hashable]]:
    """The training records without an image that is held out, and the mark of every image (see `photographs`).

    Logs how many are dropped, described as `what`: first those found by ids, then those found by content too.
    """
    content = image_contents(image for record in (*training, *held_out) for image in images_of(record))
    by_id, _ = _leaks(training, held_out, {})
    all_leaks, marks = _leaks(training, held_out, content)
    if by_id:
        log.warning("%d %s, by their ids: dropped", len(by_id), what)
    if by_content := all_leaks - by_id:
        log.warning("%d %s, by content: dropped", len(by_content), what)
    return [record for row, record in enumerate(training) if row not in all_leaks], marks


def _leaks(
    training: Sequence[Record], held_out: Sequence[Record], content: Mapping[ImageFile, Hashable]
) -> tuple[set[int], dict[ImageFile, Hashable]]:
    """Rows of the training records that have an image of a held-out record; the marks of all images."""
    marks = photographs([*training, *held_out], content)
    held = {marks[image] for record in held_out for image in images_of(record)}
    return {row for row, one in enumerate(training) if any(marks[image] in held for image in images_of(one))}, marks


def photographs(records: Iterable[Record], content: Mapping[ImageFile, Hashable]) -> dict[ImageFile, Hashable]:
    """Marks that are equal for images of one photograph: with the same id or content, directly or through others.

    Parameters
    ----------
    content
        See `image_contents`; images that it lacks are compared by their ids only.
    """
    parent: dict[Hashable, Hashable] = {}  # a forest of images, ids and contents: what is connected is one photograph

    def root(key: Hashable) -> Hashable:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    images: dict[ImageFile, None] = {}
    for record in records:
        is_pair = len(images_of(record)) > 1  # then only the names state which id belongs to which image
        for image in images_of(record):
            images[image] = None
            keys = [*(origins(image) if is_pair else record.origins)]
            for key in keys + [content[image]] if image in content else keys:
                parent[root(key)] = root(image)
    return {image: root(image) for image in images}


def image_contents(images: Iterable[ImageFile]) -> dict[ImageFile, Hashable]:
    """A value for each image that images of the same content share; only files that may be equal are read twice."""
    files = list(dict.fromkeys(images))
    bar = tqdm(files, "comparing images", unit=" images", delay=2)
    glimpses = {image: image.glimpse() for image in bar}
    count = Counter(glimpses.values())
    return {image: (glimpse, image.digest() if count[glimpse] > 1 else b"") for image, glimpse in glimpses.items()}
