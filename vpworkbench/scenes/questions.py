"""Questions about generated scenes with their answers, as in VQA v2.

For each image, one question is answered with yes and one with no, so neither the text nor the image decides by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from vpworkbench.scenes.language import DIRECTIONS, OPPOSITES, decide, number_of, parse_phrase, plural_of
from vpworkbench.scenes.scene import COLOURS, MATERIALS, SHAPES, SIZES, Scene
from vpworkbench.scenes.wording import absent_name, pick, plural_phrase, weighted


class Question(NamedTuple):
    """A question with its true answer; `kind` is VQA's question type, the first words."""

    text: str
    kind: str
    answer_type: str  # "yes/no", "number" or "other"
    answer: str


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One form with the answers yes and no, a count and, mostly, an attribute; cloths hide none of the answers."""
    asked = []
    for make in weighted(rng, _YES_NO):
        pair = make(scene, rng)
        if pair is not None:
            asked = [_as_question(pair[0], "yes"), _as_question(pair[1], "no")]
            break
    attribute = _attribute(scene, rng)
    asked += [_count(scene, rng), *([attribute] if attribute else [])]
    return [asked[int(i)] for i in rng.permutation(len(asked))]


def ten_answers(question: Question, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Ten answers as in VQA v2: at most two people are wrong, and then only by a little."""
    chance = rng.random()
    wrong = int(chance > 0.6) + int(chance > 0.9)
    given = [question.answer] * (10 - wrong)
    given += [_near_miss(question.answer, rng) for _ in range(wrong)]
    answers = []
    for number, i in enumerate(rng.permutation(10), start=1):
        certain = given[int(i)] == question.answer and rng.random() < 0.95
        confidence = "yes" if certain else "maybe"
        answers.append({"answer": given[int(i)], "answer_confidence": confidence, "answer_id": number})
    return answers


def _near_miss(answer: str, rng: np.random.Generator) -> str:
    if answer.isdigit():
        return str(max(0, int(answer) - 1) if rng.random() < 0.5 else int(answer) + 1)
    alike = next(words for words in (("yes", "no"), SIZES, MATERIALS, tuple(COLOURS), SHAPES) if answer in words)
    return pick(rng, [word for word in alike if word != answer])


# ------------------------------------------------------------------------------------------------------- yes or no


def _as_question(statement: str, answer: str) -> Question:
    """Move the verb: "there is a star" -> "is there a star?"."""
    match = re.fullmatch(r"there (is|are) (.+)", statement)
    if match:
        kind = "is there a" if match[1] == "is" else "are there more"
        return Question(f"{match[1]} there {match[2]}?", kind, "yes/no", answer)
    subject, rest = statement.split(" is ", 1)
    return Question(f"is {subject} {rest}?", "is the", "yes/no", answer)


Pair = tuple[str, str]  # a true and a false statement of one form


def _true_and_false(scene: Scene, true: str, false: str) -> Pair | None:
    return (true, false) if decide(true, scene) is True and decide(false, scene) is False else None


def _exists(scene: Scene, rng: np.random.Generator) -> Pair | None:
    true = f"there is a {pick(rng, scene.uncovered).name}"
    for _ in range(10):
        if pair := _true_and_false(scene, true, f"there is a {absent_name(scene, rng)}"):
            return pair
    return None


def _related(scene: Scene, rng: np.random.Generator, *, relations: Sequence[str]) -> Pair | None:
    """Such as "the red star is left of the blue ball", and the opposite of the same two things."""
    pairs = scene.pairs
    for _ in range(8):
        a, b = pick(rng, pairs)
        relation = pick(rng, relations)
        true = f"the {a.name} is {relation} the {b.name}"
        false = f"the {a.name} is {OPPOSITES[relation]} the {b.name}"
        if rng.random() < 0.5:
            false = f"the {b.name} is {relation} the {a.name}"
        if pair := _true_and_false(scene, true, false):
            return pair
    return None


def _symmetric(scene: Scene, rng: np.random.Generator, *, relation: str) -> Pair | None:
    """A symmetric relation that is true of one pair of things and false of another."""
    by_colour = relation == "the same colour as"
    true, false = [], []
    for a, b in scene.pairs:
        if a.shape != b.shape and (by_colour or a.colour != b.colour):
            names = [thing.shape if by_colour else thing.name for thing in (a, b)]
            text = f"the {names[0]} is {relation} the {names[1]}"
            truth = decide(text, scene)
            if truth is not None:
                (true if truth else false).append(text)
    return (pick(rng, true), pick(rng, false)) if true and false else None


def _more(scene: Scene, rng: np.random.Generator) -> Pair | None:
    """Compare two colours or two shapes; never one of each, because a cloth hides only the shape."""
    by_colour = rng.random() < 0.5
    for _ in range(8):
        first, second = (plural_phrase(scene, rng, by_colour=by_colour) for _ in range(2))
        true, false = f"there are more {first} than {second}", f"there are more {second} than {first}"
        if pair := _true_and_false(scene, true, false):
            return pair
    return None


_YES_NO: dict[Callable[[Scene, np.random.Generator], Pair | None], float] = {
    _exists: 0.35,
    partial(_related, relations=DIRECTIONS): 0.30,
    partial(_related, relations=("larger than", "smaller than")): 0.12,
    _more: 0.12,
    partial(_symmetric, relation="the same colour as"): 0.10,
    partial(_symmetric, relation="touching"): 0.10,
}


# ------------------------------------------------------------------------------------------- counts and attributes


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    """The number is drawn before the words, so 0, 1 and 2 are about equally frequent."""
    if rng.random() < 0.15:
        answer = str(len(scene.things))
        return Question("how many things are there?", "how many things are", "number", answer)
    hidden = any(thing.covered for thing in scene.things)  # then shapes cannot be counted
    by_colour = hidden or rng.random() < 0.5
    plurals = [f"{colour} things" for colour in COLOURS] if by_colour else map(plural_of, SHAPES)
    counted: dict[int, list[str]] = {}
    for plural in plurals:
        counted.setdefault(number_of(parse_phrase(plural), scene), []).append(plural)
    number = pick(rng, sorted(counted))
    return Question(f"how many {pick(rng, counted[number])} are there?", "how many", "number", str(number))


def _attribute(scene: Scene, rng: np.random.Generator) -> Question | None:
    """An attribute of a thing that is identified by its other attributes."""
    for attribute in weighted(rng, {"colour": 4, "shape": 4, "size": 1.5, "material": 1}):
        for i in rng.permutation(len(scene.things)):
            thing = scene.things[int(i)]
            noun = {"colour": thing.shape, "shape": f"{thing.colour} thing"}.get(attribute, thing.name)
            if thing.covered or number_of(parse_phrase(noun), scene) != 1:
                continue
            if attribute == "size" and thing.shape == "ring":
                continue  # rings are large too often: they contain things
            kind = f"what {attribute} is the"
            return Question(f"{kind} {noun}?", kind, "other", getattr(thing, attribute))
    return None
