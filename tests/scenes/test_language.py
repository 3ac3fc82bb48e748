"""Sentences: true where they are said to be."""

from collections import Counter
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from vpworkbench.scenes.language import decide, decide_pair
from vpworkbench.scenes.layout import scene_of
from vpworkbench.scenes.scene import COLOURS, COVERED, SHAPES, Scene, Thing
from vpworkbench.settings.scenes import SceneSettings


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def some_scenes(difficulty: str, count: int) -> list[Scene]:
    settings = SceneSettings(difficulty=difficulty, seed=2)
    return [scene_of(settings, "train", i) for i in range(count)]


def thing(words: str, x: float, y: float, **other) -> Thing:
    size, material, colour, shape = words.split()
    radius = {"small": 10.0, "medium": 14.0, "large": 18.0}[size]
    return replace(Thing(shape, colour, size, material, x=x, y=y, radius=radius, angle=0.0, depth=0), **other)


SCENE = Scene(
    (
        thing("small matte red star", 20, 20),
        thing("large shiny blue ball", 70, 22),
        thing("small shiny blue heart", 70, 80),
        thing("large matte red ring", 24, 70),
        thing("small matte green moon", 25, 70),
    ),
    image_px=96,
)


@pytest.mark.parametrize(
    "text, truth",
    [
        ("a red star is left of a blue ball", True),
        ("A small red star is to the left of the large blue ball.", True),
        ("a red star is right of a blue ball", False),
        ("a blue heart is left of a blue ball", False),  # same column: the difference is 0
        ("a blue ball is above a blue heart", True),
        ("a blue heart is below the red star", True),
        ("a blue thing is below the red star", True),  # some blue thing is
        ("the blue thing is below the red star", None),  # there are two
        ("the yellow thing is below the red star", False),  # there is none
        ("the blue thing is a ball", None),
        ("the green thing is a moon", True),
        ("the green thing is a star", False),
        ("a green moon is inside a red ring", True),
        ("a red star is inside a red ring", False),
        ("a red ring is inside a green moon", False),
        ("a blue ball is larger than a red star", True),
        ("a red star is smaller than a blue ball", True),
        ("a red star is larger than a blue heart", False),  # equal
        ("a red star is the same colour as a ring", True),
        ("a red star is the same colour as a star", False),  # not of itself
        ("a red star touches a blue ball", False),
        ("there is a red star", True),
        ("there is a large red star", False),
        ("there is a matte red star and a shiny blue ball", True),
        ("there is a star and a star", False),  # two different ones
        ("there is a red thing and a red thing", True),
        ("there are two blue things", True),
        ("there are three blue things", False),
        ("there are no yellow things", True),
        ("there is one red star", True),
        ("there are two blue things and a red star", True),
        ("there are more blue things than green things", True),
        ("there are more blue things than red things", False),
        ("a blorp is left of a red star", None),
        ("red star", None),
        ("there is a red star maybe", None),
        ("", None),
    ],
)
def test_meaning_by_example(text: str, truth: bool | None):
    assert decide(text, SCENE) is truth


@pytest.mark.parametrize("shift, truth", [(15.0, True), (6.0, None), (2.0, False), (-9.0, False)])
def test_direction_has_a_margin(shift: float, truth: bool | None):
    scene = Scene((thing("small matte red star", 40, 20), thing("small matte blue ball", 40 + shift, 70)), 96)
    assert decide("a red star is left of a blue ball", scene) is truth
    assert decide("a blue ball is right of a red star", scene) is truth


@pytest.mark.parametrize(
    "x, y, truth", [(50, 50, True), (50, 60, True), (50, 70, None), (50, 90, False), (14, 50, False)]
)
def test_between_is_the_middle_of_the_line(x: float, y: float, truth: bool | None):
    ends = (thing("small matte red star", 10, 50), thing("small matte blue ball", 90, 50))
    scene = Scene((*ends, thing("small matte pink moon", x, y)), 96)
    assert decide("a pink moon is between a red star and a blue ball", scene) is truth


@pytest.mark.parametrize("apart, truth", [(18.0, True), (19.0, True), (20.7, None), (24.0, False)])
def test_touching_depends_on_the_gap(apart: float, truth: bool | None):
    """Balls of radius 10 have outlines of 9.2."""
    balls = (thing("small matte red ball", 40, 40), thing("small matte blue ball", 40 + apart, 40))
    assert decide("a red ball touches a blue ball", Scene(balls, 96)) is truth


def test_a_cloth_leaves_open_what_it_hides():
    covered = replace(thing("small matte pink star", 70, 60), shape=COVERED)
    scene = Scene((thing("small matte red star", 20, 20), covered), 96)
    assert decide("there is a pink moon", scene) is None
    assert decide("there is a pink thing", scene) is True
    assert decide("there is a red moon", scene) is False
    assert decide("a red star is above a pink moon", scene) is None
    assert decide("a red star is below a pink moon", scene) is False
    assert decide("there are two stars", scene) is None
    assert decide("there are three stars", scene) is False
    assert decide("the star is red", scene) is None  # not of the grammar
    assert decide("the pink thing is a ball", scene) is None


def naive(text: str, scene: Scene) -> bool | None:
    """Two forms, straight from the module's description, with every shape under every cloth."""
    hidden = [i for i, thing in enumerate(scene.things) if thing.covered]
    worlds = [scene.things]
    for i in hidden:
        worlds = [(*w[:i], replace(w[i], shape=shape), *w[i + 1 :]) for w in worlds for shape in SHAPES]
    verdicts = [naive_in_world(text.split(), world, scene.image_px) for world in worlds]
    return verdicts[0] if all(verdict is verdicts[0] for verdict in verdicts) else None


def naive_in_world(words: list[str], things, image_px: int) -> bool | None:
    if words[0] == "there":  # there is a C S and a C S
        one, two = words[3:5], words[7:9]
        for a, b in permutations(things, 2):
            if [a.colour, a.shape] == one and [b.colour, b.shape] == two:
                return True
        return False
    one, two = words[1:3], words[-2:]  # a C S is left of a C S
    ahead = {"left": lambda a, b: b.x - a.x, "right": lambda a, b: a.x - b.x}
    ahead |= {"above": lambda a, b: b.y - a.y, "below": lambda a, b: a.y - b.y}
    shares = [
        ahead[words[4]](a, b) / image_px
        for a, b in permutations(things, 2)
        if [a.colour, a.shape] == one and [b.colour, b.shape] == two
    ]
    if any(share >= 0.1 for share in shares):
        return True
    return False if all(share <= 0.03 for share in shares) else None


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_decide_equals_a_naive_evaluation(difficulty: str):
    rng = rng_of(0)
    verdicts: Counter = Counter()
    for scene in some_scenes(difficulty, 60):
        names = [(t.colour, str(rng.choice(SHAPES)) if t.covered else t.shape) for t in scene.things]
        names.append((str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))))
        for (c, s), (d, t) in permutations(names, 2):
            relation = ("left of", "right of", "above", "below")[rng.integers(4)]
            for text in (f"a {c} {s} is {relation} a {d} {t}", f"there is a {c} {s} and a {d} {t}"):
                assert decide(text, scene) is naive(text, scene), (text, scene)
                verdicts[decide(text, scene)] += 1
    assert min(verdicts[truth] for truth in (True, False, None)) > 20


@pytest.mark.parametrize(
    "text, truth",
    [
        ("the left image has a red star", True),
        ("the right image has a red star", False),
        ("both images have a blue thing", True),
        ("both images have a star", False),
        ("exactly one image has a star", True),
        ("exactly one image has a blue thing", False),
        ("there are three blue things in total", True),
        ("there are two blue things in total", False),
        ("the left image has more blue things than the right image", True),
        ("the right image has more blue things than the left image", False),
        ("in the left image a red star is left of a blue ball", True),
        ("in the right image a red star is left of a blue ball", False),
        ("both images are nice", None),
        ("there are many stars in total", None),
    ],
)
def test_meaning_of_statements_about_two_images(text: str, truth: bool | None):
    right = Scene((thing("small matte blue moon", 20, 20), thing("small matte pink ring", 70, 70)), 96)
    assert decide_pair(text, SCENE, right) is truth
