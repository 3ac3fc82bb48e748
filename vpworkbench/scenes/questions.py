"""Questions about generated scenes with their answers, as VQA v2 has them.

Each image has one question answered with yes for each answered with no, so neither the text nor the
image alone decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np

from vpworkbench.scenes.language import DIRECTIONS, OPPOSITE, decide, number_of, parse_phrase, plural_of
from vpworkbench.scenes.scene import COLOURS, MATERIALS, SHAPES, SIZES, Scene
from vpworkbench.scenes.wording import absent_kind, different_pairs, kind_of, pick, plural_phrase, seen_things, weighted


class Question(NamedTuple):
    """A question with its true answer; `kind` is VQA's question type, the first words."""

    text: str
    kind: str
    answer_type: str  # "yes/no", "number" or "other"
    answer: str


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """A form once with the answer yes and once with no, a count and, mostly, an attribute.

    All are decided by the visible things, whatever a cloth hides.
    """
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
    """Ten answers as in VQA v2: at most two people erred, and then nearly."""
    chance = rng.random()
    wrong = int(chance > 0.6) + int(chance > 0.9)
    given = [question.answer] * (10 - wrong)
    given += [_near_miss(question.answer, rng) for _ in range(wrong)]
    answers = []
    for number, i in enumerate(rng.permutation(10), start=1):
        certain = given[int(i)] == question.answer and rng.random() < 0.95
        confidence = "yes" if certain else "maybe"
        entry = {"answer": given[int(i)], "answer_confidence": confidence, "answer_id": number}
        answers.append(entry)
    return answers


def _near_miss(answer: str, rng: np.random.Generator) -> str:
    if answer.isdigit():
        return str(max(0, int(answer) - 1) if rng.random() < 0.5 else int(answer) + 1)
    for family in (("yes", "no"), SIZES, MATERIALS, tuple(COLOURS), SHAPES):
        if answer in family:
            return pick(rng, [word for word in family if word != answer])
    raise ValueError(f"no near miss is known for the answer {answer!r}")


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
    things = seen_things(scene)
    true = "there is a {} {}".format(*kind_of(pick(rng, things)))
    for _ in range(10):
        pair = _true_and_false(scene, true, "there is a {} {}".format(*absent_kind(things, rng)))
        if pair:
            return pair
    return None


def _related(relations: Sequence[str]) -> Callable[[Scene, np.random.Generator], Pair | None]:
    """Say "the red star is left of the blue ball" and its opposite of the same two things."""

    def make(scene: Scene, rng: np.random.Generator) -> Pair | None:
        pairs = different_pairs(seen_things(scene))
        for _ in range(8):
            a, b = pick(rng, pairs)
            relation = pick(rng, relations)
            names = ["the {} {}".format(*kind_of(thing)) for thing in (a, b)]
            true = f"{names[0]} is {relation} {names[1]}"
            false = f"{names[0]} is {OPPOSITE[relation]} {names[1]}"
            if rng.random() < 0.5:
                false = f"{names[1]} is {relation} {names[0]}"
            pair = _true_and_false(scene, true, false)
            if pair:
                return pair
        return None

    return make


def _pairwise(relation: str) -> Callable[[Scene, np.random.Generator], Pair | None]:
    """A symmetric relation that holds of one pair of things and not of another."""

    def make(scene: Scene, rng: np.random.Generator) -> Pair | None:
        by_colour = relation == "the same colour as"
        texts = []
        for a, b in different_pairs(seen_things(scene)):
            if a.shape != b.shape and (by_colour or a.colour != b.colour):
                names = [t.shape if by_colour else f"{t.colour} {t.shape}" for t in (a, b)]
                texts.append(f"the {names[0]} is {relation} the {names[1]}")
        truths = [decide(text, scene) for text in texts]
        yes = [text for text, truth in zip(texts, truths, strict=True) if truth is True]
        no = [text for text, truth in zip(texts, truths, strict=True) if truth is False]
        return (pick(rng, yes), pick(rng, no)) if yes and no else None

    return make


def _more(scene: Scene, rng: np.random.Generator) -> Pair | None:
    """Two colours or two shapes: a cloth counts for its colour only, so a mixture would tell."""
    by_colour = rng.random() < 0.5
    for _ in range(8):
        first, second = (plural_phrase(scene, rng, by_colour) for _ in range(2))
        true, false = (f"there are more {a} than {b}" for a, b in permutations((first, second)))
        pair = _true_and_false(scene, true, false)
        if pair:
            return pair
    return None


_YES_NO: dict[Callable[[Scene, np.random.Generator], Pair | None], float] = {
    _exists: 0.35,
    _related(DIRECTIONS): 0.30,
    _related(("larger than", "smaller than")): 0.12,
    _more: 0.12,
    _pairwise("the same colour as"): 0.10,
    _pairwise("touching"): 0.10,
}


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    """The number is drawn before the words, so that 0, 1 and 2 are about equally frequent."""
    if rng.random() < 0.15:
        answer = str(len(scene.things))
        return Question("how many things are there?", "how many things are", "number", answer)
    hidden = any(thing.covered for thing in scene.things)  # then shapes cannot be counted
    by_colour = hidden or rng.random() < 0.5
    plurals = [f"{colour} things" for colour in COLOURS] if by_colour else map(plural_of, SHAPES)
    counted: dict[int, list[str]] = {}
    for plural in plurals:
        number = number_of(parse_phrase(plural), scene)
        counted.setdefault(number, []).append(plural)
    number = pick(rng, sorted(counted))
    text = f"how many {pick(rng, counted[number])} are there?"
    return Question(text, "how many", "number", str(number))


def _attribute(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Asked of the one thing that the other attributes describe."""
    for attribute in weighted(rng, {"colour": 4, "shape": 4, "size": 1.5, "material": 1}):
        for i in rng.permutation(len(scene.things)):
            thing = scene.things[int(i)]
            noun = {"colour": thing.shape, "shape": f"{thing.colour} thing"}.get(
                attribute, f"{thing.colour} {thing.shape}"
            )
            if thing.covered or number_of(parse_phrase(noun), scene) != 1:
                continue
            if attribute == "size" and thing.shape == "ring":
                continue  # rings are large too often: they hold things
            kind = f"what {attribute} is the"
            return Question(f"{kind} {noun}?", kind, "other", getattr(thing, attribute))
    return None
