"""Sets joined into `train`, `val` and `test`, so that no image of an evaluation split is trained on."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm.auto import tqdm

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.files import SPLITS, annotation_files
from vpworkbench.data.images import ImageFile, Places, origins
from vpworkbench.data.readers import UnknownFormatError, open_annotations
from vpworkbench.data.records import Example, Picture, Record, images_of
from vpworkbench.data.task_readers import FORMATS, TASK_READERS, VQA_ANSWERS
from vpworkbench.errors import DataError
from vpworkbench.scenes.write import write_scenes
from vpworkbench.settings import DataSettings, FinetuneSettings
from vpworkbench.settings.scenes import SceneSettings

log = logging.getLogger(__name__)

R = TypeVar("R", Picture, Example)

# ------------------------------------------------------------------------------------------- captioned sets


def load_splits(settings: DataSettings) -> dict[str, list[Picture]]:
    """`train`, `val` and `test` of all configured sets; scenes are generated first where they are not there yet."""
    sets = []
    for name in settings.sets:
        if name == "scenes":
            sets.append(read_pictures(write_scenes(scenes_folder(settings.scenes), settings.scenes)))
        else:
            sets.append(read_pictures(name, images=settings.images))
    excluded = [record for path in settings.exclude for record in evaluation_records(path, images=settings.images)]
    splits = split_pictures(sets, exclude=excluded)
    if not splits["train"]:
        raise DataError(f"{', '.join(settings.sets)}: no training images; the splits are {sorted(SPLITS)}")
    return splits


def load_held_out(settings: DataSettings) -> list[Picture]:
    """The `val` of `load_splits` alone: it does not depend on the scenes of training, of which one is generated."""
    scenes = settings.scenes.model_copy(update={"images": 1, "test": 0})
    return load_splits(settings.model_copy(update={"scenes": scenes}))["val"]


def cache_root() -> Path:
    """Where what can be made again is kept: `$VPW_CACHE`, else the user's cache folder."""
    return Path(os.environ.get("VPW_CACHE") or Path.home() / ".cache" / "vpworkbench")


def scenes_folder(settings: SceneSettings) -> Path:
    """Where generated scenes are kept, by a hash of the settings."""
    digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:10]
    return cache_root() / f"scenes-{settings.image_px}px-{settings.difficulty}-{digest}"


def evaluation_records(path: str | Path, *, images: Places = ()) -> list[Record]:
    """The records of `val` and `test` in an annotation file of any format, or in all that a folder holds.

    Raises
    ------
    DataError
        Where there is none; for a broken file or a missing image.
    """
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

    An image can be in several sets under several names, so copies are found by their ids in COCO and at Flickr, where
    sets tell them, and by content; also round corners: if Visual Genome says that COCO's 5 is Flickr's 7, then COCO's 5
    leaves for Flickr30k's 7. Copies in training become one picture with the texts of all: else one copy's caption could
    serve as unmatched text of the other. How many were dropped and joined is logged.

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
        log.warning("%d training images are copies of others: joined with them", more)
    return splits | {"train": joined}


def _merged(first: Picture, rest: Sequence[Picture]) -> Picture:
    """One picture with the texts of all its copies; the first of them names it."""
    captions = dict.fromkeys(text for picture in (first, *rest) for text in picture.captions)
    foils = dict.fromkeys(text for picture in (first, *rest) for text in picture.foils if text not in captions)
    known = first.origins.union(*(picture.origins for picture in rest))
    return replace(first, captions=tuple(captions), foils=tuple(foils), origins=known)


# --------------------------------------------------------------------------------------------------- tasks


class TaskExamples(NamedTuple):
    """The examples of a task.

    Attributes
    ----------
    splits : dict
        `train`, `val` and `test`; training examples whose image an evaluation split holds are dropped.
    shared : frozenset of str
        Ids of test examples about an image that the release has in training or validation too.
    """

    splits: dict[str, list[Example]] | dict[str, list[Picture]]
    shared: frozenset[str]


def load_examples(settings: FinetuneSettings) -> TaskExamples:
    """Read the files of a task and keep the images of evaluation splits out of training.

    `data` is `scenes` or what the task's reader takes (see `task_readers`); for retrieval, any captioned set.

    Raises
    ------
    DataError
        For files that are missing or broken, or a split without examples that training needs.
    """
    if settings.task == "retrieval":
        return TaskExamples(_captioned(settings), frozenset())
    data = settings.data
    if data == "scenes":
        data = str(write_scenes(scenes_folder(settings.scenes), settings.scenes))
    reader = TASK_READERS[settings.task]
    splits = reader(data, images=settings.images, **({"premise": True} if settings.premise else {}))
    for split in ("train", "val"):
        if not splits[split]:
            raise DataError(f"{settings.data}: no examples of {settings.task} in {split}; it needs some")
    held_out = [*splits["val"], *splits["test"]]
    kept, marks = without_leaks(splits["train"], held_out, "training examples are about images of val or test")
    if not kept:
        raise DataError(f"{settings.data}: every image of train is in val or test too; split by image")
    elsewhere = {marks[image] for split in ("train", "val") for example in splits[split] for image in example.images}
    shared = {example.id for example in splits["test"] if any(marks[image] in elsewhere for image in example.images)}
    return TaskExamples(splits | {"train": kept}, frozenset(shared))


def _captioned(settings: FinetuneSettings) -> dict[str, list[Picture]]:
    """All captioned training images, and the first ones of the other splits."""
    splits = load_splits(DataSettings(sets=(settings.data,), images=settings.images, scenes=settings.scenes))
    most = {"train": None, "val": settings.retrieval.search_images or None}
    splits = {
        split: [picture for picture in pictures if picture.captions][: most.get(split, most["val"])]
        for split, pictures in splits.items()
    }
    for split in ("val", "test"):
        if len(splits[split]) < 2:
            raise DataError(f"{settings.data}: {len(splits[split])} captioned images in {split}; a search needs two")
    return splits


# --------------------------------------------------------------------------------------------------- leaks


def without_leaks(
    training: Sequence[R], held_out: Sequence[Record], what: str
) -> tuple[list[R], dict[ImageFile, Hashable]]:
    """The training records none of whose images is held out, and the mark of every image (see `photographs`).

    How many are dropped is logged with the words of `what`: by the ids that the sets tell, and more by content.
    """
    records = [*training, *held_out]
    content = image_contents(image for record in records for image in images_of(record))
    dropped: list[set[int]] = []
    for contents in ({}, content):
        marks = photographs(records, contents)
        held = {marks[image] for record in held_out for image in images_of(record)}
        dropped.append(
            {place for place, record in enumerate(training) if any(marks[image] in held for image in images_of(record))}
        )
    by_id, by_any = dropped
    if by_id:
        log.warning("%d %s, by their ids: dropped", len(by_id), what)
    if by_any - by_id:
        log.warning("%d %s, by content: dropped", len(by_any - by_id), what)
    return [record for place, record in enumerate(training) if place not in by_any], marks


def photographs(records: Iterable[Record], content: Mapping[ImageFile, Hashable]) -> dict[ImageFile, Hashable]:
    """Marks that are equal for images of one photograph: with an id or the content in common, directly or by others.

    Parameters
    ----------
    content
        What tells contents apart, see `image_contents`; images that it lacks are compared by their ids alone.
    """
    parent: dict[Hashable, Hashable] = {}

    def root(key: Hashable) -> Hashable:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    images: dict[ImageFile, None] = {}
    for record in records:
        pair = len(images_of(record)) > 1  # of a pair only the names tell which id is whose
        for image in images_of(record):
            images[image] = None
            for key in (*(origins(image) if pair else record.origins), *([content[image]] if image in content else ())):
                parent[root(key)] = root(image)
    return {image: root(image) for image in images}


def image_contents(images: Iterable[ImageFile]) -> dict[ImageFile, Hashable]:
    """What tells the contents of images apart; only files that look alike at a glimpse are read twice."""
    files = list(dict.fromkeys(images))
    bar = tqdm(files, "comparing images", unit=" images", delay=2)
    glimpses = {image: image.glimpse() for image in bar}
    alike = Counter(glimpses.values())
    return {image: (glimpse, image.digest() if alike[glimpse] > 1 else b"") for image, glimpse in glimpses.items()}
