"""Hypotheses about generated scenes, as SNLI-VE has them: entailed, neutral or contradicted.

A sentence about what a cloth hides cannot be known from the image: it is neutral. Hypotheses are
balanced: they are asked only about scenes with a covered thing, always as three of the same form and
relation word, one of each label. So the image alone decides nothing (each label is there once), and
the text alone decides nothing, because colours, shapes and directions are exchangeable: "there is a
red star" is entailed where a red star is seen, unknown where the cloth is red, and false elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vpworkbench.scenes.language import DIRECTIONS, parse, possible_truths
from vpworkbench.scenes.scene import SHAPES, Scene, Thing
from vpworkbench.scenes.wording import absent_kind, kind_of, pick, seen_things, weighted

LABELS = {"entailment": {True}, "neutral": {True, False}, "contradiction": {False}}


def hypotheses(scene: Scene, caption: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Hypotheses with their labels, six for a scene with a covered thing and none otherwise.

    Parameters
    ----------
    scene : Scene
    caption : str
        The premise; no hypothesis repeats it.
    rng : numpy.random.Generator

    Returns
    -------
    list of (text, label)
        Twice three of one form, with the labels entailment, neutral and contradiction. Fewer if
        a form did not fit the scene; always as many of each label.
    """
    covered = [thing for thing in scene.things if thing.covered]
    if not covered:
        return []
    told: list[tuple[str, str]] = []
    for form in list(weighted(rng, _HYPOTHESES)) * 2:
        three = _three_labels(form, scene, covered[0], {caption, *(text for text, _ in told)}, rng)
        told += three
        if len(told) == 6:
            break
    return [told[int(i)] for i in rng.permutation(len(told))]


def _three_labels(
    form: Callable[..., str], scene: Scene, covered: Thing, taken: set[str], rng: np.random.Generator
) -> list[tuple[str, str]]:
    relation = pick(rng, DIRECTIONS)  # one word for all three, or it would tell the label
    found = []
    for label, truths in LABELS.items():
        for _ in range(30):
            text = form(scene, covered, label, relation, rng)
            program = parse(text)
            if program and text not in taken and possible_truths(program, scene) == truths:
                found.append((text, label))
                break
        else:
            return []
    return found


def _described(scene: Scene, covered: Thing, label: str, rng: np.random.Generator) -> tuple[str, str]:
    """Colour and shape that suit a label: of a visible thing, of the cloth, or of nothing there."""
    things = seen_things(scene)
    if label == "entailment":
        return kind_of(pick(rng, things))
    return (covered.colour, pick(rng, SHAPES)) if label == "neutral" else absent_kind(things, rng)


def _there_hypothesis(scene: Scene, covered: Thing, label: str, relation: str, rng: np.random.Generator) -> str:
    return "there is a {} {}".format(*_described(scene, covered, label, rng))


def _two_descriptions(scene: Scene, covered: Thing, label: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """One that suits the label and one that is visible, in random order.

    Always of two colours and two shapes: a repeated word must not tell the label.
    """
    while True:
        two = [_described(scene, covered, label, rng), kind_of(pick(rng, seen_things(scene)))]
        if two[0][0] != two[1][0] and two[0][1] != two[1][1]:
            return two if rng.random() < 0.5 else two[::-1]
        if rng.random() < 0.05:
            return two  # hardly ever: a scene in which everything has one colour or one shape


def _and_hypothesis(scene: Scene, covered: Thing, label: str, relation: str, rng: np.random.Generator) -> str:
    (c, s), (d, t) = _two_descriptions(scene, covered, label, rng)
    return f"there is a {c} {s} and a {d} {t}"


def _direction_hypothesis(scene: Scene, covered: Thing, label: str, relation: str, rng: np.random.Generator) -> str:
    """A contradiction is as often the wrong direction as a thing that is not there."""
    source = "entailment" if label == "contradiction" and rng.random() < 0.5 else label
    (c, s), (d, t) = _two_descriptions(scene, covered, source, rng)
    return f"a {c} {s} is {relation} a {d} {t}"


def _shape_hypothesis(scene: Scene, covered: Thing, label: str, relation: str, rng: np.random.Generator) -> str:
    """Say "the red thing is a star", of a colour that occurs, whatever the label."""
    if label == "neutral":
        return f"the {covered.colour} thing is a {pick(rng, SHAPES)}"
    thing = pick(rng, seen_things(scene))
    shape = thing.shape if label == "entailment" else pick(rng, SHAPES)
    return f"the {thing.colour} thing is a {shape}"


_HYPOTHESES: dict[Callable[..., str], float] = {
    _there_hypothesis: 0.35,
    _direction_hypothesis: 0.30,
    _and_hypothesis: 0.15,
    _shape_hypothesis: 0.20,
}
