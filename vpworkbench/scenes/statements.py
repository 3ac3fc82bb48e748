"""Labelled statements about generated scenes: hypotheses as in SNLI-VE, and statements about two images as in NLVR2.

Hypotheses are balanced: they exist only for scenes with a covered thing, always three of the same form and relation
word, one of each label. The image decides nothing by itself, because it comes with each label once. Neither does the
text, because colours, shapes and directions are exchangeable: "there is a red star" is entailed where a red star is
visible, unknown where the cloth is red, and false elsewhere.

Each statement about two images is true of one pair of images and false of another, and each pair has one of both.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vpworkbench.scenes.language import DIRECTIONS, decide_pair, parse, possible_truths
from vpworkbench.scenes.scene import SHAPES, Scene, Thing
from vpworkbench.scenes.texts import absent_name, pick, plural_phrase, weighted

TRUTHS_OF_LABEL = {"entailment": {True}, "neutral": {True, False}, "contradiction": {False}}


def hypotheses(scene: Scene, caption: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Six hypotheses with their labels for a scene with a covered thing, and none otherwise.

    They are twice three of one form, with the labels entailment, neutral and contradiction; fewer if few forms fit the
    scene. None repeats the caption, which is the premise.
    """
    covered = [thing for thing in scene.things if thing.covered]
    if not covered:
        return []
    found: list[tuple[str, str]] = []
    for form in list(weighted(rng, _HYPOTHESES)) * 2:
        found += _three_labels(form, scene, covered[0], {caption, *(text for text, _ in found)}, rng)
        if len(found) == 6:
            break
    return [found[int(i)] for i in rng.permutation(len(found))]


def _three_labels(
    form: Callable[..., str], scene: Scene, covered: Thing, taken: set[str], rng: np.random.Generator
) -> list[tuple[str, str]]:
    relation = pick(rng, DIRECTIONS)  # the same word for all three, or it would give the label away
    found = []
    for label, truths in TRUTHS_OF_LABEL.items():
        for _ in range(30):
            text = form(scene, covered, label, relation, rng)
            program = parse(text)
            if program and text not in taken and possible_truths(program, scene) == truths:
                found.append((text, label))
                break
        else:
            return []
    return found


def _name(scene: Scene, covered: Thing, label: str, rng: np.random.Generator) -> str:
    """Colour and shape that suit a label: of a visible thing, of the cloth, or of nothing in the scene."""
    if label == "entailment":
        return pick(rng, scene.uncovered).name
    return f"{covered.colour} {pick(rng, SHAPES)}" if label == "neutral" else absent_name(scene, rng)


def _two_names(scene: Scene, covered: Thing, label: str, rng: np.random.Generator) -> list[str]:
    """One name that suits the label and one of a visible thing, in random order.

    Two colours and two shapes: a repeated word must not give the label away. Very rarely they repeat one all the same,
    or scenes in which everything has one colour or one shape would end in an endless loop.
    """
    while True:
        two = [_name(scene, covered, label, rng), pick(rng, scene.uncovered).name]
        if not set(two[0].split()) & set(two[1].split()):
            return two if rng.random() < 0.5 else two[::-1]
        if rng.random() < 0.05:
            return two


def _there_are_two(scene: Scene, covered: Thing, label: str, relation: str, rng: np.random.Generator) -> str:
    one, other = _two_names(scene, covered, label, rng)
    return f"there is a {one} and a {other}"


def _direction(scene: Scene, covered: Thing, label: str, relation: str, rng: np.random.Generator) -> str:
    """A contradiction is equally often a wrong direction and a thing that does not exist."""
    suited = "entailment" if label == "contradiction" and rng.random() < 0.5 else label
    one, other = _two_names(scene, covered, suited, rng)
    return f"a {one} is {relation} a {other}"


def _shape(scene: Scene, covered: Thing, label: str, relation: str, rng: np.random.Generator) -> str:
    """Such as "the red thing is a star", of a colour that occurs, whatever the label."""
    if label == "neutral":
        return f"the {covered.colour} thing is a {pick(rng, SHAPES)}"
    thing = pick(rng, scene.uncovered)
    shape = thing.shape if label == "entailment" else pick(rng, SHAPES)
    return f"the {thing.colour} thing is a {shape}"


_HYPOTHESES: dict[Callable[..., str], float] = {
    lambda scene, covered, label, relation, rng: f"there is a {_name(scene, covered, label, rng)}": 0.35,
    _direction: 0.30,
    _there_are_two: 0.15,
    _shape: 0.20,
}


# ------------------------------------------------------------------------------------ statements about two images

ScenePair = tuple[Scene, Scene]  # left, right


def pair_statements(first: ScenePair, second: ScenePair, rng: np.random.Generator) -> tuple[str, str] | None:
    """A statement that is true of `first` and false of `second`, and one the other way round; None if none is found."""
    one = _statement(first, second, rng)
    other = _statement(second, first, rng)
    return (one, other) if one and other else None


def _statement(true_of: ScenePair, false_of: ScenePair, rng: np.random.Generator) -> str | None:
    for _ in range(200):
        write = next(weighted(rng, _STATEMENTS))
        text = write((true_of, false_of)[int(rng.integers(2))], rng)
        if decide_pair(text, *true_of) is True and decide_pair(text, *false_of) is False:
            return text
    return None


def _noun(scenes: ScenePair, rng: np.random.Generator) -> str:
    """Colour, shape, or both, of a thing in one of the images."""
    thing = pick(rng, pick(rng, scenes).uncovered)
    return pick(rng, (thing.name, f"{thing.colour} thing", thing.shape))


def _plural(scenes: ScenePair, rng: np.random.Generator) -> str:
    return plural_phrase(pick(rng, scenes), rng, by_colour=rng.random() < 0.5)


def _more(scenes: ScenePair, rng: np.random.Generator) -> str:
    side, other = pick(rng, (("left", "right"), ("right", "left")))
    return f"the {side} image has more {_plural(scenes, rng)} than the {other} image"


def _direction_on_one_side(scenes: ScenePair, rng: np.random.Generator) -> str:
    side = int(rng.integers(2))
    a, b = pick(rng, scenes[side].pairs)
    return f"in the {('left', 'right')[side]} image a {a.name} is {pick(rng, DIRECTIONS)} a {b.name}"


_STATEMENTS: dict[Callable[[ScenePair, np.random.Generator], str], float] = {
    lambda scenes, rng: f"the {pick(rng, ('left', 'right'))} image has a {_noun(scenes, rng)}": 0.15,
    lambda scenes, rng: f"both images have a {_noun(scenes, rng)}": 0.25,
    lambda scenes, rng: f"exactly one image has a {_noun(scenes, rng)}": 0.2,
    lambda scenes, rng: f"there are {pick(rng, ('two', 'three', 'four'))} {_plural(scenes, rng)} in total": 0.2,
    _more: 0.2,
    _direction_on_one_side: 0.2,
}
