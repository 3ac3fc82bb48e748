"""The world: what is drawn is what is stated."""

import json
import time
from collections import Counter
from math import hypot

import numpy as np
import pytest
from pydantic import ValidationError

from vpworkbench.scenes.drawing import gap, render
from vpworkbench.scenes.layout import LEVELS, scene_of
from vpworkbench.scenes.scene import COLOURS, COVERED, MATERIALS, SHAPES, SIZES, Scene, Thing
from vpworkbench.scenes.texts import captions
from vpworkbench.settings.scenes import SceneSettings

LEVEL_NAMES = ("easy", "medium", "hard")


def some_scenes(difficulty: str, count: int, image_px: int = 96) -> list[Scene]:
    settings = SceneSettings(difficulty=difficulty, image_px=image_px, seed=1)
    return [scene_of(settings, "train", i) for i in range(count)]


def test_words_are_enough_and_single():
    assert len(SHAPES) >= 8 and len(COLOURS) >= 8 and len(SIZES) == 3 and len(MATERIALS) == 2
    for word in (*SHAPES, *COLOURS, *SIZES, *MATERIALS):
        assert word.isalpha() and word.islower()
    assert COVERED not in SHAPES


@pytest.mark.parametrize("difficulty", LEVEL_NAMES)
def test_counts_and_attributes_follow_the_difficulty(difficulty: str):
    sample = some_scenes(difficulty, 300)
    counts = Counter(len(scene.things) for scene in sample)
    low, high = LEVELS[difficulty].things
    assert set(counts) == set(range(low, high + 1))
    things = [thing for scene in sample for thing in scene.things]
    shapes = Counter(thing.shape for thing in things if not thing.covered)
    colours = Counter(thing.colour for thing in things)
    for frequencies in (shapes, colours):
        assert len(frequencies) == 8
        assert max(frequencies.values()) < 1.6 * min(frequencies.values())
    assert {thing.size for thing in things} == set(SIZES)
    assert 0.2 < np.mean([any(t.covered for t in scene.things) for scene in sample]) < 0.4
    for scene in sample:
        assert [thing.depth for thing in scene.things] == list(range(len(scene.things)))


@pytest.mark.parametrize("difficulty", LEVEL_NAMES)
def test_every_thing_is_in_the_picture_and_visible_enough(difficulty: str):
    for seed, scene in enumerate(some_scenes(difficulty, 60)):
        _, object_map = render(scene, seed)
        for number, thing in enumerate(scene.things, start=1):
            visible = object_map == number
            _, alone = render(Scene((thing,), scene.image_px), seed)
            assert visible.sum() >= LEVELS[difficulty].visible * (alone == 1).sum()
            rows, columns = np.nonzero(visible)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert thing.box == box
            assert 0 <= box[0] and 0 <= box[1] and max(box[2:]) <= scene.image_px
            assert not alone[0].any() and not alone[-1].any()  # nothing is cut by the edge


def test_pixels_have_the_colour_of_their_thing():
    names = list(COLOURS)
    palette = np.array(list(COLOURS.values()), dtype=float)
    for seed, scene in enumerate(some_scenes("easy", 60)):
        image, object_map = render(scene, seed)
        for number, thing in enumerate(scene.things, start=1):
            middle = np.median(image[object_map == number].astype(float), axis=0)
            nearest = names[np.linalg.norm(palette - middle, axis=1).argmin()]
            assert nearest == thing.colour


def test_grounds_are_far_from_all_colours():
    palette = np.array(list(COLOURS.values()), dtype=float)
    for seed, scene in enumerate(some_scenes("easy", 60)):
        image, object_map = render(scene, seed)
        ground = np.median(image[object_map == 0].astype(float), axis=0)
        assert np.linalg.norm(palette - ground, axis=1).min() > 60


def test_gap_agrees_with_the_drawn_pixels():
    """Pixel masks know the distance to about one pixel."""
    checked = 0
    for scene in some_scenes("hard", 10, image_px=128):
        masks = [render(Scene((thing,), 128), 0)[1] == 1 for thing in scene.things]
        points = [np.argwhere(mask) for mask in masks]
        for i in range(len(points)):
            for j in range(i):
                drawn = min(np.hypot(*(points[j] - point).T).min() for point in points[i])
                stated = gap(scene.things[i], scene.things[j])
                if drawn == 0:
                    assert stated < 0.5
                elif stated < 5:
                    assert abs(drawn - 1 - max(stated, 0)) < 2.0
                    checked += 1
                else:
                    assert stated < drawn + 1
    assert checked > 10


def test_gap_of_two_balls_in_closed_form():
    for distance in (18.0, 20.0, 23.0, 60.0):
        left, right = (Thing("ball", "red", "small", "matte", x, 40.3, 10.0, 0.0, 0) for x in (20, 20 + distance))
        outline = 0.92 if distance < 60 else 1.0  # far away the enclosing circle is enough
        assert gap(left, right) == pytest.approx(distance - 20 * outline, abs=0.6)


def test_touching_and_inside_occur():
    sample = some_scenes("easy", 400)
    closest = [min(gap(a, b) for a in scene.things for b in scene.things if a is not b) for scene in sample]
    assert 0.1 < np.mean([value < 1.2 for value in closest]) < 0.5
    inside = [
        scene
        for scene in sample
        if any(
            a.shape == "ring" and a is not b and hypot(a.x - b.x, a.y - b.y) < 3
            for a in scene.things
            for b in scene.things
        )
    ]
    assert len(inside) > 12


def test_scene_survives_json():
    for scene in some_scenes("hard", 20):
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene
        assert hash(scene) == hash(Scene.from_json(scene.to_json()))


def test_scenes_are_a_function_of_the_seed():
    for difficulty in LEVEL_NAMES:
        first, second, other = (
            scene_of(SceneSettings(image_px=64, difficulty=difficulty, seed=seed), "train", 0) for seed in (3, 3, 4)
        )
        assert first == second != other
        for one, two in zip(render(first, 9), render(second, 9), strict=True):
            np.testing.assert_array_equal(one, two)
    settings = SceneSettings()
    assert scene_of(settings, "train", 0) != scene_of(settings, "val", 0)
    assert scene_of(settings, "train", 0) == scene_of(SceneSettings(images=7), "train", 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": 0},
        {"images": -1},
        {"val": -1},
        {"image_px": 31},
        {"difficulty": "impossible"},
        {"seed": -1},
        {"imags": 10},
    ],
)
def test_wrong_settings_are_refused(wrong: dict):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        SceneSettings(**wrong)


def test_captions_cost_little():
    """CPU time, so that other work does not matter: a generous bound of 10 ms an image."""
    sample = some_scenes("medium", 50)
    start = time.process_time()
    for seed, scene in enumerate(sample):
        captions(scene, np.random.default_rng(seed))
        render(scene, seed)
    assert time.process_time() - start < 0.01 * len(sample)
