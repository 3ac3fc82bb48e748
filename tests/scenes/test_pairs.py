"""Minimal pairs: one property of one thing, one word, and no other pixel."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from vpworkbench import cli
from vpworkbench.data.minimal_pairs import load_pairs, read_pairs
from vpworkbench.errors import DataError
from vpworkbench.scenes.drawing import _window, render
from vpworkbench.scenes.language import NUMBERS, decide
from vpworkbench.scenes.pairs import PROPERTIES, MinimalPair, minimal_pair, write_pairs
from vpworkbench.scenes.scene import Thing
from vpworkbench.settings.scenes import PairSettings

SMALL = PairSettings(pairs=18, image_px=64, seed=3)
ALLOWED = {"colour": {"colour"}, "shape": {"shape", "box"}, "material": {"material"}, "size": {"size", "radius", "box"}}


@pytest.fixture(scope="module", params=["easy", "medium", "hard"])
def pairs(request) -> list[MinimalPair]:
    settings = PairSettings(difficulty=request.param, seed=4)
    return [minimal_pair(settings, number) for number in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs", SMALL, processes=1)


def versions(pair: MinimalPair) -> list[Thing]:
    """The thing that differs, as it is in either scene that has it."""
    return [scene.things[pair.thing] for scene in pair.scenes if pair.thing < len(scene.things)]


def test_one_property_of_one_thing_differs(pairs):
    assert [pair.differs_in for pair in pairs] == list(PROPERTIES) * 4
    for pair in pairs:
        first, second = (list(map(asdict, scene.things)) for scene in pair.scenes)
        if pair.differs_in == "count":
            assert abs(len(first) - len(second)) == 1 and len(versions(pair)) == 1
            assert pair.thing == min(len(first), len(second))  # the last of the larger scene
            assert first[: pair.thing] == second[: pair.thing]
            continue
        differing = [i for i, (one, other) in enumerate(zip(first, second, strict=True)) if one != other]
        assert differing == [pair.thing]
        one, other = first[pair.thing], second[pair.thing]
        keys = {key for key in one if one[key] != other[key]}
        if pair.differs_in == "position":
            assert keys - {"box"} in ({"x"}, {"y"})
        else:
            assert pair.differs_in in keys <= ALLOWED[pair.differs_in]


def test_each_text_is_true_of_one_scene_and_one_word_says_what_differs(pairs):
    for pair in pairs:
        assert [[decide(text, scene) for scene in pair.scenes] for text in pair.texts] == [[True, False], [False, True]]
        split = [text.split() for text in pair.texts]
        words = [(one, other) for one, other in zip(*split, strict=True) if one != other]
        assert len(words) == 1
        if pair.differs_in == "position":
            assert set(words[0]) in ({"left", "right"}, {"above", "below"})
        elif pair.differs_in == "count":
            colour = versions(pair)[0].colour
            counts = [sum(thing.colour == colour for thing in scene.things) for scene in pair.scenes]
            assert [NUMBERS[count] for count in counts] == list(words[0])
        else:
            assert words[0] == tuple(getattr(thing, pair.differs_in) for thing in versions(pair))


def within(thing: Thing, image_px: int, beyond_px: float, shift: int = 0) -> np.ndarray:
    """Pixels less than this far outside the outline of a thing, or of the thing moved down and to the right."""
    found = np.zeros((image_px, image_px), dtype=bool)
    moved = replace(thing, x=thing.x + shift, y=thing.y + shift)
    window, inward, _, _ = _window(moved, image_px, border=max(1, shift))
    found[window] = inward > -beyond_px
    return found


def may_differ(pair: MinimalPair) -> np.ndarray:
    """Pixels that the thing and its shadow reach in either scene."""
    things, image_px = versions(pair), pair.scenes[0].image_px
    parts = [within(thing, image_px, 0.5) for thing in things]  # antialiased
    if pair.differs_in not in ("colour", "material"):
        shift = max(1, round(0.018 * image_px))  # the shadow is blurred by one and a half shifts
        parts += [within(thing, image_px, 1.5 * shift, shift) for thing in things]
    return np.logical_or.reduce(parts)


def test_pixels_differ_only_where_the_thing_and_its_shadow_are(pairs):
    for pair in pairs:
        (first, first_map), (second, second_map) = (render(scene, 7) for scene in pair.scenes)
        masks = np.logical_or.reduce([within(thing, len(first), 0) for thing in versions(pair)])
        assert not ((first_map != second_map) & ~masks).any()
        if pair.differs_in in ("colour", "material"):
            assert np.array_equal(first_map, second_map)
        differing = (first != second).any(axis=2)
        assert not (differing & ~may_differ(pair)).any(), (pair.differs_in, versions(pair))
        visible = (first_map == pair.thing + 1) | (second_map == pair.thing + 1)
        assert (differing & visible).sum() > 0.2 * visible.sum()


def test_a_pair_depends_on_its_seed_and_number_only(folder: Path, tmp_path: Path):
    names = sorted(path.name for path in folder.iterdir())
    again = write_pairs(tmp_path / "again", SMALL, processes=2)
    assert all((again / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert [pair.texts for pair in read_pairs(folder)] == [minimal_pair(SMALL, number).texts for number in range(18)]
    other = SMALL.model_copy(update={"seed": 4})
    assert minimal_pair(other, 2) != minimal_pair(SMALL, 2)


def test_pairs_are_read_as_pictures(folder: Path):
    for number, pair in enumerate(read_pairs(folder)):
        made = minimal_pair(SMALL, number)
        assert (pair.differs_in, pair.thing, pair.texts) == (made.differs_in, made.thing, made.texts)
        for picture, scene, true, false in zip(pair.pictures, made.scenes, made.texts, made.texts[::-1], strict=True):
            assert picture.scene == scene and picture.captions == (true,) and picture.foils == (false,)
            assert picture.split == "test" and picture.affirms(true) and picture.denies(false)
            assert set(np.unique(picture.object_map())) == set(range(len(scene.things) + 1))
        first, second = (picture.image.pixels() for picture in pair.pictures)
        differing = (first != second).any(axis=2)
        assert differing.any() and not (differing & ~may_differ(made)).any()  # one ground


def test_pairs_are_kept_in_the_cache():
    made = load_pairs(PairSettings(pairs=6, image_px=48))
    assert len(made) == 6 and made == load_pairs(PairSettings(pairs=6, image_px=48))


def test_what_holds_no_pairs_is_refused(tmp_path: Path, folder: Path, scenes_folder: Path):
    with pytest.raises(DataError, match="no minimal pairs there"):
        read_pairs(scenes_folder)
    with pytest.raises(FileExistsError, match="other settings.*pairs: 18 there, 6 requested"):
        write_pairs(folder, PairSettings(pairs=6))


@pytest.mark.parametrize(
    "arguments, code, message",
    [(["--images", "6"], 0, ""), (["--val", "3"], 2, "val"), (["--images", "0"], 2, "pairs")],
)
def test_the_command_writes_pairs(tmp_path: Path, capsys, arguments: list[str], code: int, message: str):
    with pytest.raises(SystemExit) as end:
        cli.main(["scenes", str(tmp_path / "made"), "--pairs", "--image-px", "48", *arguments])
    assert end.value.code == code and message in capsys.readouterr().err
    assert (tmp_path / "made").exists() is (code == 0)
    if code == 0:
        assert len(read_pairs(tmp_path / "made")) == 6
