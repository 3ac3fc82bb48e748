"""Captions of generated scenes, and questions with their answers as in VQA v2.

Captions are true, all different, and short. For each image, one question is answered with yes and one with no, so
neither the text nor the image decides by itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vpworkbench.scenes.language import (
    DIRECTIONS,
    NUMBERS,
    OPPOSITES,
    RELATIONS,
    decide,
    number_of,
    parse_phrase,
    plural_of,
)
from vpworkbench.scenes.scene import COLOURS, MATERIALS, SHAPES, SIZES, Scene, Thing

PER_IMAGE = 5
LONGEST = 16  # words of a caption

Item = TypeVar("Item")

# ---------------------------------------------------------------------------------------------------- random choices


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    """One of the items, all equally likely."""
    return items[int(rng.integers(len(items)))]


def weighted(rng: np.random.Generator, weights: dict[Item, float]) -> Iterator[Item]:
    """All keys in random order; heavy ones tend to come first."""
    waits = rng.exponential(size=len(weights)) / np.array(list(weights.values()))
    keys = list(weights)
    return (keys[i] for i in np.argsort(waits))


def absent_name(scene: Scene, rng: np.random.Generator) -> str:
    """A colour and a shape that are probably not there together; often each of them is there."""
    things = scene.uncovered
    colour = pick(rng, things).colour if rng.random() < 0.6 else pick(rng, list(COLOURS))
    shape = pick(rng, things).shape if rng.random() < 0.6 else pick(rng, SHAPES)
    return f"{colour} {shape}"


def plural_phrase(scene: Scene, rng: np.random.Generator, *, by_colour: bool) -> str:
    """A phrase such as "red things" or "stars", mostly of a colour or shape that occurs."""
    thing = pick(rng, scene.uncovered)
    if by_colour:
        return f"{thing.colour if rng.random() < 0.8 else pick(rng, list(COLOURS))} things"
    return plural_of(thing.shape if rng.random() < 0.8 else pick(rng, SHAPES))


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """`PER_IMAGE` different sentences of at most `LONGEST` words that are true of a scene.

    Each mentions at least a colour and a shape, none a covered thing.
    """
    texts: list[str] = []
    for attempt in range(60 * PER_IMAGE):
        text = caption(scene, rng, detail=min(1.0, 0.2 + 0.01 * attempt))  # few things: more words, more sentences
        if text and text not in texts:
            texts.append(text)
        if len(texts) == PER_IMAGE:
            return texts
    raise ValueError(f"found only {len(texts)} of {PER_IMAGE} captions: the scene has too few different things")


def caption(scene: Scene, rng: np.random.Generator, detail: float) -> str | None:
    """One caption; None if the sentence drawn is too long, or not clearly true. `detail` as in `_noun`."""
    written = (write(scene, rng, detail) for write in weighted(rng, _CAPTIONS))
    text = next(text for text in written if text is not None)
    return text if len(text.split()) <= LONGEST and decide(text, scene) else None


def _noun(rng: np.random.Generator, thing: Thing, detail: float) -> str:
    """Colour and shape; `detail` is the probability of adding the size, and half of it that of adding the material."""
    size = f"{thing.size} " if rng.random() < detail else ""
    material = f"{thing.material} " if rng.random() < detail / 2 else ""
    return f"{size}{material}{thing.name}"


def _direction(scene: Scene, rng: np.random.Generator, detail: float) -> str:
    """The direction in which two things are further apart."""
    a, b = pick(rng, scene.pairs)
    across, down = b.x - a.x, b.y - a.y
    if abs(across) > abs(down):
        relation = "left of" if across > 0 else "right of"
        relation = f"to the {relation}" if rng.random() < 0.2 else relation
    else:
        relation = "above" if down > 0 else "below"
    return f"a {_noun(rng, a, detail)} is {relation} a {_noun(rng, b, detail)}"


def _relation(scene: Scene, rng: np.random.Generator, detail: float, *, relation: str) -> str | None:
    fitting = [pair for pair in scene.pairs if RELATIONS[relation](scene.image_px, *pair)]
    if not fitting:
        return None
    a, b = pick(rng, fitting)
    verb = "touches" if relation == "touching" and rng.random() < 0.5 else f"is {relation}"
    return f"a {_noun(rng, a, detail)} {verb} a {_noun(rng, b, detail)}"


def _existence(scene: Scene, rng: np.random.Generator, detail: float) -> str:
    a, b = pick(rng, scene.pairs)
    return f"there is a {_noun(rng, a, detail)} and a {_noun(rng, b, detail)}"


def _several(scene: Scene, rng: np.random.Generator, detail: float) -> str | None:
    """Several things of one colour and shape, or else of one colour, and another thing."""
    kinds = Counter((thing.colour, thing.shape) for thing in scene.uncovered)
    colours = Counter(thing.colour for thing in scene.things)
    several = [(f"{colour} {plural_of(shape)}", count) for (colour, shape), count in kinds.items() if count > 1]
    several = several or [(f"{colour} things", count) for colour, count in colours.items() if count > 1]
    if not several:
        return None
    plural, count = pick(rng, several)
    described = parse_phrase(plural)
    others = [thing for thing in scene.uncovered if not described.fits(thing)]
    text = f"there are {NUMBERS[count]} {plural}"
    if not others or ("things" not in plural and rng.random() < 0.3):
        return text if "things" not in plural else None
    return f"{text} and a {_noun(rng, pick(rng, others), detail)}"


def _between(scene: Scene, rng: np.random.Generator, detail: float) -> str | None:
    triples = [
        triple
        for triple in permutations(scene.uncovered, 3)
        if len({thing.name for thing in triple}) == 3 and RELATIONS["between"](scene.image_px, *triple)
    ]
    if not triples:
        return None
    a, b, c = (_noun(rng, thing, detail / 3) for thing in pick(rng, triples))
    return f"a {a} is between a {b} and a {c}"


def _same_colour(scene: Scene, rng: np.random.Generator, detail: float) -> str | None:
    """The second colour is left out, or the sentence would give itself away."""
    pairs = [(a, b) for a, b in scene.pairs if a.colour == b.colour]
    if not pairs:
        return None
    a, b = pick(rng, pairs)
    return f"a {_noun(rng, a, detail)} is the same colour as a {b.shape}"


# Forms are drawn by these weights until one fits; rare situations (inside, touching) are described when they occur.
_CAPTIONS: dict[Callable[[Scene, np.random.Generator, float], str | None], float] = {
    _direction: 0.50,
    partial(_relation, relation="touching"): 0.12,
    partial(_relation, relation="inside"): 0.40,
    partial(_relation, relation="larger than"): 0.07,
    partial(_relation, relation="smaller than"): 0.04,
    _existence: 0.16,
    _several: 0.14,
    _between: 0.10,
    _same_colour: 0.07,
}


class Question(NamedTuple):
    """A question with its true answer; `kind` is VQA's question type, the first words."""

    text: str
    kind: str
    answer_type: str  # "yes/no", "number" or "other"
    answer: str


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One form with the answers yes and no, a count and, mostly, an attribute; cloths hide none of the answers."""
    asked = []
    for true, false in (pair for form in weighted(rng, _YES_NO) for pair in form(scene, rng)):
        if decide(true, scene) is True and decide(false, scene) is False:
            asked = [_as_question(true, "yes"), _as_question(false, "no")]
            break
    attribute = _attribute(scene, rng)
    asked += [_how_many(scene, rng), *([attribute] if attribute else [])]
    return [asked[int(i)] for i in rng.permutation(len(asked))]


def ten_answers(question: Question, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Ten answers as in VQA v2: at most two people are wrong, and then only by a little."""
    chance = rng.random()
    wrong = (chance > 0.6) + (chance > 0.9)
    given = [question.answer] * (10 - wrong)
    given += [_near_miss(question.answer, rng) for _ in range(wrong)]
    answers = []
    for number, i in enumerate(rng.permutation(10), start=1):
        confidence = "yes" if given[int(i)] == question.answer and rng.random() < 0.95 else "maybe"
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
    if match := re.fullmatch(r"there (is|are) (.+)", statement):
        kind = "is there a" if match[1] == "is" else "are there more"
        return Question(f"{match[1]} there {match[2]}?", kind, "yes/no", answer)
    subject, rest = statement.split(" is ", 1)
    return Question(f"is {subject} {rest}?", "is the", "yes/no", answer)


Pairs = Iterator[tuple[str, str]]  # attempts at a true and a false statement of one form


def _exists(scene: Scene, rng: np.random.Generator) -> Pairs:
    true = f"there is a {pick(rng, scene.uncovered).name}"
    for _ in range(10):
        yield true, f"there is a {absent_name(scene, rng)}"


def _related(scene: Scene, rng: np.random.Generator, *, relations: Sequence[str]) -> Pairs:
    """Such as "the red star is left of the blue ball", and the opposite of the same two things."""
    for _ in range(8):
        a, b = pick(rng, scene.pairs)
        relation = pick(rng, relations)
        false = f"the {a.name} is {OPPOSITES[relation]} the {b.name}"
        if rng.random() < 0.5:
            false = f"the {b.name} is {relation} the {a.name}"
        yield f"the {a.name} is {relation} the {b.name}", false


def _symmetric(scene: Scene, rng: np.random.Generator, *, relation: str) -> Pairs:
    """A symmetric relation that is true of one pair of things and false of another."""
    by_colour = relation == "the same colour as"
    texts: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for a, b in scene.pairs:
        if a.shape != b.shape and (by_colour or a.colour != b.colour):
            one, other = (thing.shape if by_colour else thing.name for thing in (a, b))
            text = f"the {one} is {relation} the {other}"
            texts[decide(text, scene)].append(text)
    if texts[True] and texts[False]:
        yield pick(rng, texts[True]), pick(rng, texts[False])


def _more(scene: Scene, rng: np.random.Generator) -> Pairs:
    """Compare two colours or two shapes; never one of each, because a cloth hides only the shape."""
    by_colour = rng.random() < 0.5
    for _ in range(8):
        first, second = (plural_phrase(scene, rng, by_colour=by_colour) for _ in range(2))
        yield f"there are more {first} than {second}", f"there are more {second} than {first}"


_YES_NO: dict[Callable[[Scene, np.random.Generator], Pairs], float] = {
    _exists: 0.35,
    partial(_related, relations=DIRECTIONS): 0.30,
    partial(_related, relations=("larger than", "smaller than")): 0.12,
    _more: 0.12,
    partial(_symmetric, relation="the same colour as"): 0.10,
    partial(_symmetric, relation="touching"): 0.10,
}


# ------------------------------------------------------------------------------------------- counts and attributes


def _how_many(scene: Scene, rng: np.random.Generator) -> Question:
    """The number is drawn before the words, so 0, 1 and 2 are about equally frequent."""
    if rng.random() < 0.15:
        return Question("how many things are there?", "how many things are", "number", str(len(scene.things)))
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
