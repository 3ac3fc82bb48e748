"""Minimal pairs on disk, as pairs of pictures: made once for each setting, then read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.records import Picture
from vpworkbench.data.scene_cache import scenes_folder
from vpworkbench.errors import DataError
from vpworkbench.scenes.pairs import PAIR_ENTRIES, write_pairs
from vpworkbench.settings.scenes import PairSettings


class PicturePair(NamedTuple):
    """Two pictures that differ in one property of one thing.

    Each has one caption, which is true of it, and one foil, the caption of the other picture.
    """

    differs_in: str  # one of scenes.pairs.PROPERTIES
    thing: int  # number of the thing in both scenes; for `count`, one scene does not have it
    pictures: tuple[Picture, Picture]

    @property
    def texts(self) -> tuple[str, str]:
        """The caption of each picture; they differ in one word."""
        return tuple(picture.captions[0] for picture in self.pictures)


def load_pairs(settings: PairSettings) -> list[PicturePair]:
    """Generated minimal pairs; they are made first if they are not there yet."""
    return read_pairs(write_pairs(scenes_folder(settings), settings))


def read_pairs(folder: str | Path) -> list[PicturePair]:
    """The minimal pairs in a folder that `vpw scenes FOLDER --pairs` wrote; `DataError` if it holds none."""
    file = Path(folder).expanduser() / PAIR_ENTRIES
    if not file.exists():
        raise DataError(f"{folder}: no minimal pairs there ({PAIR_ENTRIES}); `vpw scenes FOLDER --pairs` writes them")
    pictures = read_pictures(file)
    differing = json.loads(file.read_text(encoding="utf-8"))["pairs"]
    found = []
    for pair, first, second in zip(differing, pictures[::2], pictures[1::2], strict=True):
        sides = replace(first, foils=second.captions), replace(second, foils=first.captions)
        found.append(PicturePair(pair["differs_in"], pair["thing"], sides))
    return found
