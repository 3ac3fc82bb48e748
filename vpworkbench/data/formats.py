"""Readers of the original annotation files: Karpathy json, NLVR v1, and our scenes in those same formats.

A set is named by its folder or its annotation file; images lie beside it in a folder or in a zip that is read in
place. Faults name the file and the record.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from vpworkbench.config import DataSettings
from vpworkbench.data import language, nlvr1
from vpworkbench.data.records import DataError, ImageFile, Picture, archive, image_file, one_record
from vpworkbench.data.scene_files import write_scenes
from vpworkbench.data.scenes import Scene, SceneSettings

log = logging.getLogger(__name__)

SPLITS = {"train": "train", "restval": "train", "val": "val", "dev": "val", "test": "test", "test1": "test"}
"""Karpathy's `restval` trains, as the paper's Table 6 has it."""

NLVR1_VAL_DIRECTORY = "5"
"""NLVR v1's `dev` is split by `directory`, as its README advises: this one validates, the others train."""

M = TypeVar("M", bound=BaseModel)


class _Sentence(BaseModel):
    raw: str = Field(min_length=1)


class _KarpathyImage(BaseModel):
    filename: str
    split: str = Field(pattern=f"^({'|'.join(SPLITS)})$")
    sentences: list[_Sentence] = Field(min_length=1)
    filepath: str = ""
    things: list[dict[str, Any]] | None = None


class _Nlvr1Record(BaseModel):
    sentence: str = Field(min_length=1)
    label: Literal["true", "false"]
    identifier: str
    directory: str
    structured_rep: list[list[dict[str, Any]]]


def read_pictures(path: str | Path) -> list[Picture]:
    """Read a set of captioned images.

    Parameters
    ----------
    path
        The set's folder, or its annotation file: `dataset_*.json` (Karpathy), or the `dev.json` / `test.json`
        json lines of NLVR v1.

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
    pictures = [picture for file in files for picture in _read_file(file)]
    _refuse_duplicates(pictures, path)
    return pictures


def _annotation_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("dataset_*.json")) or [
        file for file in (folder / f"{name}.json" for name in ("train", "dev", "test")) if file.exists()
    ]
    if not files:
        raise DataError(f"{folder}: holds no dataset_*.json (Karpathy) and no dev.json (NLVR v1); name the file itself")
    return files


def _read_file(file: Path) -> list[Picture]:
    """Tell the format by its content, then read it."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    try:
        return list(_karpathy(file, json.loads(text)))
    except json.JSONDecodeError:
        return list(_nlvr1(file, text))


def _karpathy(file: Path, content: Any) -> Iterator[Picture]:
    if isinstance(content, dict) and "structured_rep" in content:
        raise json.JSONDecodeError("one json line", "", 0)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise DataError(
            f"{file}: a Karpathy json has a list `images`; this one has not (other formats: see the README)"
        )
    folder, names = _image_folder(file)
    prefix = "images/" if folder.suffix == ".zip" and any(name.startswith("images/") for name in names) else ""
    for number, raw in enumerate(images):
        with one_record():
            record = _checked(_KarpathyImage, raw, file, f"images[{number}]")
            where = f"{file}: images[{number}] ({record.filename})"
            captions = tuple(dict.fromkeys(" ".join(sentence.raw.split()) for sentence in record.sentences))
            if "" in captions:
                raise DataError(f"{where}: an empty caption; remove it or give its text")
            name = prefix + (f"{record.filepath}/" if record.filepath else "") + record.filename
            image = image_file(folder, name, source=where)
            if name not in names:
                raise DataError(f"{where}: image missing in {folder}; restore it or drop the record")
            scene = Scene.from_json(raw) if record.things is not None else None
            yield Picture(
                id=record.filename,
                image=image,
                split=SPLITS[record.split],
                captions=captions,
                truth=partial(language.decide, scene=scene) if scene else None,
                scene=scene,
            )


def _nlvr1(file: Path, text: str) -> Iterator[Picture]:
    """One picture for each of the six box permutations; `dev` trains and validates, by directory."""
    folder, names = _image_folder(file, file.stem)
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}: line {number} is not json ({error}); is the file whole?") from None
        with one_record():
            record = _checked(_Nlvr1Record, raw, file, f"line {number}")
            split = SPLITS.get(file.stem, "train")
            if split == "val" and record.directory != NLVR1_VAL_DIRECTORY:
                split = "train"
            sentence = " ".join(record.sentence.split())
            try:
                boxes = nlvr1.read_boxes(record.structured_rep)
            except ValueError as error:
                raise DataError(f"{file}: line {number} ({record.identifier}): {error}") from None
            truth = partial(nlvr1.decide, boxes=boxes)  # one for all six: no statement asks for the order of the boxes
            for order in range(6 if split == "train" else 1):
                name = f"images/{record.directory}/{file.stem}-{record.identifier}-{order}.png"
                if folder.suffix != ".zip":
                    name = name.removeprefix("images/")
                where = f"{file}: line {number} ({record.identifier})"
                image = image_file(folder, name, source=where)
                if name not in names:
                    raise DataError(f"{where}: image {name} missing in {folder}; restore it or drop the record")
                yield Picture(
                    id=f"{record.identifier}-{order}",
                    image=image,
                    split=split,
                    captions=(sentence,) if record.label == "true" else (),
                    foils=(sentence,) if record.label == "false" else (),
                    truth=truth,
                )


def _image_folder(file: Path, split: str = "") -> tuple[Path, frozenset[str]]:
    """Where the images of an annotation file lie, and the names there."""
    candidates = [file.parent / name for name in (f"{split}_images.zip", "images.zip", "images") if name[0] != "_"]
    for candidate in candidates:
        if candidate.suffix == ".zip" and candidate.is_file():
            return candidate, frozenset(archive(candidate).namelist())
        if candidate.is_dir():
            found = (path for path in candidate.rglob("*") if path.is_file())
            return candidate, frozenset(path.relative_to(candidate).as_posix() for path in found)
    raise DataError(f"{file}: no images beside it (looked for {', '.join(path.name for path in candidates)})")


def _checked(kind: type[M], raw: Any, file: Path, record: str) -> M:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        path = ".".join(str(part) for part in fault["loc"])
        raise DataError(f"{file}: {record}: {path}: {fault['msg']}; correct the record") from None


def _refuse_duplicates(pictures: Sequence[Picture], path: Path) -> None:
    seen: set[str] = set()
    for picture in pictures:
        with one_record():
            if picture.id in seen:
                raise DataError(f"{path}: {picture.id}: a second record of this image; merge their captions")
            seen.add(picture.id)


def split_pictures(sets: Iterable[Sequence[Picture]]) -> dict[str, list[Picture]]:
    """Join sets into `train`, `val` and `test`; training images that an evaluation split holds are dropped.

    An image can be in several sets under several names, so copies are found by content. Copies
    in training become one picture with the texts of all: else one copy's caption could serve as unmatched text of the
    other. How many were dropped and joined is logged.
    """
    splits: dict[str, list[Picture]] = {"train": [], "val": [], "test": []}
    for pictures in sets:
        for picture in pictures:
            splits[picture.split].append(picture)
    content = image_contents(picture.image for split in splits.values() for picture in split)
    held_out = {content[picture.image] for split in ("val", "test") for picture in splits[split]}
    kept = [picture for picture in splits["train"] if content[picture.image] not in held_out]
    if dropped := len(splits["train"]) - len(kept):
        log.warning("%d training images are also in val or test: dropped from training", dropped)
    joined = _joined(kept, content)
    if copies := len(kept) - len(joined):
        log.warning("%d training images are copies of others: joined with them", copies)
    return splits | {"train": joined}


def image_contents(images: Iterable[ImageFile]) -> dict[ImageFile, Hashable]:
    """What tells the contents of images apart; only files that look alike at a glimpse are read as a whole."""
    glimpses = {image: image.glimpse() for image in dict.fromkeys(images)}
    alike = Counter(glimpses.values())
    return {image: (glimpse, image.digest() if alike[glimpse] > 1 else b"") for image, glimpse in glimpses.items()}


def _joined(pictures: Sequence[Picture], content: Mapping[ImageFile, Hashable]) -> list[Picture]:
    """One picture for each content; the first of its copies names it."""
    by_content: dict[Hashable, list[Picture]] = {}
    for picture in pictures:
        by_content.setdefault(content[picture.image], []).append(picture)
    return [first if not rest else _merged(first, rest) for first, *rest in by_content.values()]


def _merged(first: Picture, rest: Sequence[Picture]) -> Picture:
    captions = dict.fromkeys(text for picture in (first, *rest) for text in picture.captions)
    foils = dict.fromkeys(text for picture in (first, *rest) for text in picture.foils if text not in captions)
    return replace(first, captions=tuple(captions), foils=tuple(foils))


def cache_root() -> Path:
    """Where what can be made again is kept: `$VPW_CACHE`, else the user's cache folder."""
    return Path(os.environ.get("VPW_CACHE") or Path.home() / ".cache" / "vpworkbench")


def scenes_folder(settings: SceneSettings) -> Path:
    """Where generated scenes are kept, by a hash of the settings."""
    digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:10]
    return cache_root() / f"scenes-{settings.image_px}px-{settings.difficulty}-{digest}"


def load_splits(settings: DataSettings) -> dict[str, list[Picture]]:
    """`train`, `val` and `test` of all configured sets; scenes are generated first where they are not there yet."""
    sets = []
    for name in settings.sets:
        path = write_scenes(scenes_folder(settings.scenes), settings.scenes) if name == "scenes" else name
        sets.append(read_pictures(path))
    splits = split_pictures(sets)
    if not splits["train"]:
        raise DataError(f"{', '.join(settings.sets)}: no training images; the splits are {sorted(SPLITS)}")
    return splits
