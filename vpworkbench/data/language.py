"""Sentences about generated scenes: what they mean, whether they hold, and how to make them.

The grammar (each form also ends well with a full stop):

    there is THING                                  there are NUMBER THINGS [and THING]
    there is THING and THING                        there are more THINGS than THINGS
    THING is RELATION THING                         THING is between THING and THING
    THING is a SHAPE                                THING touches THING

    THING     a | the [size] [material] [colour] shape, where "thing" is any shape
    NUMBER    no, one, two ... eight: exactly so many
    RELATION  (to the) left of, (to the) right of, above, below, inside, touching,
              larger than, smaller than, the same colour as

"a" says that there is at least one; "the" that there is exactly one, and a sentence about several
is undecided. Different THINGs of a sentence are different things. Between "clearly true" and
"clearly false" every relation has a margin in which it is undecided, so that no text is called true
or false where people would disagree.

A covered thing may have any shape, so a sentence holds only if it holds for every shape under the
cloth. That makes hypotheses that cannot be known from the image. They are balanced: they are asked
only about scenes with a covered thing, always as three of the same form and relation word, one of
each label. So the image alone decides nothing (each label is there once), and the text alone
decides nothing, because colours, shapes and directions are exchangeable: "there is a red star" is
entailed where a red star is seen, unknown where the cloth is red, and false elsewhere. In the same
way each image has one question answered with yes for each answered with no, and each statement
about two images is true of one pair and false of another, each pair having one of both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from math import hypot
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vpworkbench.data.scenes import COLOURS, HOLE, MATERIALS, SHAPES, SIZES, Scene, Thing, gap

Truth = bool | None  # None: undecided
Item = TypeVar("Item")

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
ATTRIBUTE_WORDS: frozenset[str] = frozenset(COLOURS) | frozenset(SHAPES)


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


# Every word of captions, questions, statements and hypotheses.
VOCABULARY: frozenset[str] = frozenset(
    (*SHAPES, *COLOURS, *SIZES, *MATERIALS, *NUMBERS, *map(_plural, SHAPES), "thing", "things")
) | frozenset(
    "a the and there is are in to of left right above below inside touching touches between larger "
    "smaller than same colour as more how many what shape size material both images image exactly "
    "has have total".split()
)

# What is true of things -----------------------------------------------------------------------


def _clear(value: float, *, false_below: float, true_above: float) -> Truth:
    if value >= true_above:
        return True
    return False if value <= false_below else None


def _beyond(image_px: int, distance: float) -> Truth:
    return _clear(distance, false_below=0.03 * image_px, true_above=0.1 * image_px)


def _inside(image_px: int, inner: Thing, outer: Thing) -> Truth:
    """Only a ring can hold something."""
    if outer.shape != "ring":
        return False
    distance = hypot(inner.x - outer.x, inner.y - outer.y)
    if distance + 0.9 * inner.radius <= HOLE * outer.radius:
        return True
    return False if distance >= HOLE * outer.radius else None


def _touching(image_px: int, first: Thing, second: Thing) -> Truth:
    closeness = -gap(first, second)
    return _clear(closeness, false_below=-0.035 * image_px, true_above=-0.012 * image_px)


def _between(image_px: int, middle: Thing, first: Thing, second: Thing) -> Truth:
    """In the middle half of the line from `first` to `second`, and near to it."""
    along_x, along_y = second.x - first.x, second.y - first.y
    x, y = middle.x - first.x, middle.y - first.y
    length = hypot(along_x, along_y)
    if length < 0.1 * image_px:
        return False
    share = (x * along_x + y * along_y) / length**2
    aside = abs(x * along_y - y * along_x) / length**2
    if 0.25 <= share <= 0.75 and aside <= 0.2:
        return True
    return False if not 0.1 <= share <= 0.9 or aside >= 0.4 else None


RELATIONS: dict[str, Callable[..., Truth]] = {
    "left of": lambda px, a, b: _beyond(px, b.x - a.x),
    "right of": lambda px, a, b: _beyond(px, a.x - b.x),
    "above": lambda px, a, b: _beyond(px, b.y - a.y),
    "below": lambda px, a, b: _beyond(px, a.y - b.y),
    "inside": _inside,
    "touching": _touching,
    "larger than": lambda px, a, b: _clear(a.radius / b.radius, false_below=1.07, true_above=1.15),
    "smaller than": lambda px, a, b: _clear(b.radius / a.radius, false_below=1.07, true_above=1.15),
    "the same colour as": lambda px, a, b: a.colour == b.colour,
    "between": _between,
}
OPPOSITE = {
    "left of": "right of", "right of": "left of", "above": "below", "below": "above",
    "larger than": "smaller than", "smaller than": "larger than",
}  # fmt: skip
DIRECTIONS = ("left of", "right of", "above", "below")

# From text to meaning -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Phrase:
    """Which things are meant, and how many: "a small red ball", "the ring", "two blue things"."""

    number: int | None  # exactly so many; None for "a", "the" and bare plurals
    definite: bool
    size: str | None
    material: str | None
    colour: str | None
    shape: str | None  # None: any

    def fits(self, thing: Thing, shape: str) -> bool:
        """Whether the phrase describes `thing`, if that has this shape."""
        return (
            (self.colour is None or self.colour == thing.colour)
            and (self.shape is None or self.shape == shape)
            and (self.size is None or self.size == thing.size)
            and (self.material is None or self.material == thing.material)
        )


@dataclass(frozen=True, slots=True)
class Program:
    """What a sentence says: a form of the grammar or a key of `RELATIONS`, and of what."""

    form: str
    phrases: tuple[Phrase, ...]


_SHAPE_OF = {shape: shape for shape in SHAPES} | {_plural(shape): shape for shape in SHAPES}
_NOUNS: dict[str, str | None] = {**_SHAPE_OF, "thing": None, "things": None}
_PHRASE = re.compile(
    rf"(?:(?P<article>a|an|the|{'|'.join(NUMBERS)}) )?"
    rf"(?:(?P<size>{'|'.join(SIZES)}) )?"
    rf"(?:(?P<material>{'|'.join(MATERIALS)}) )?"
    rf"(?:(?P<colour>{'|'.join(COLOURS)}) )?"
    rf"(?P<noun>{'|'.join(_NOUNS)})"
)
_SENTENCES = (
    (re.compile(r"there are more (.+) than (.+)"), "more"),
    (re.compile(r"there (?:is|are) (.+) and (.+)"), "there"),
    (re.compile(r"there (?:is|are) (.+)"), "there"),
    (re.compile(r"(.+) is between (.+) and (.+)"), "between"),
    (re.compile(r"(.+) touches (.+)"), "touching"),
    *(
        (re.compile(rf"(.+) is {'(?:to the )?' if ' of' in name else ''}{name} (.+)"), name)
        for name in RELATIONS
        if name != "between"
    ),
    (re.compile(r"(.+) is (an? [a-z]+)"), "is a"),
)


def _parse_phrase(text: str) -> Phrase | None:
    match = _PHRASE.fullmatch(text)
    if match is None:
        return None
    article = match["article"]
    return Phrase(
        number=NUMBERS.index(article) if article in NUMBERS else None,
        definite=article == "the",
        size=match["size"],
        material=match["material"],
        colour=match["colour"],
        shape=_NOUNS[match["noun"]],
    )


@lru_cache(maxsize=262144)
def parse(text: str) -> Program | None:
    """The meaning of a sentence; None if it is not of the grammar."""
    text = " ".join(text.lower().replace(",", " ").split()).removesuffix(".").strip()
    for pattern, form in _SENTENCES:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        phrases = tuple(_parse_phrase(group) for group in match.groups())
        if all(phrase is not None for phrase in phrases):
            return Program(form, phrases)
    return None


# Whether it holds -----------------------------------------------------------------------------


def decide(text: str, scene: Scene) -> bool | None:
    """Whether a sentence holds of a scene.

    Parameters
    ----------
    text : str
        A sentence of the grammar above, from `captions` or typed by a person.
    scene : Scene

    Returns
    -------
    bool or None
        None if the text is not of the grammar, lies in a relation's margin, speaks of "the" thing
        where there are several, or depends on what a cloth hides.
    """
    program = parse(text)
    if program is None:
        return None
    truths = _possible(program, scene)
    return truths.pop() if len(truths) == 1 else None


def _possible(program: Program, scene: Scene) -> set[Truth]:
    """The truth for every combination of shapes under the cloths.

    Of the shapes that the sentence does not name, one stands for all.
    """
    named = {phrase.shape for phrase in program.phrases if phrase.shape}
    hidden = (*named, next(shape for shape in SHAPES if shape not in named))
    worlds = product(*((hidden if thing.covered else (thing.shape,)) for thing in scene.things))
    return {_holds(program, scene, shapes) for shapes in worlds}


def _holds(program: Program, scene: Scene, shapes: Sequence[str]) -> Truth:
    fitting = [
        [i for i, thing in enumerate(scene.things) if phrase.fits(thing, shapes[i])]
        for phrase in program.phrases
    ]
    if program.form == "there":
        return _there(program.phrases, fitting)
    if program.form == "more":
        return len(fitting[0]) > len(fitting[1])
    for phrase, found in zip(program.phrases, fitting, strict=True):
        if not found:
            return False
        if phrase.definite and len(found) > 1:
            return None
    if program.form == "is a":
        return any(i in fitting[1] for i in fitting[0])
    relation = RELATIONS[program.form]
    return _any(
        relation(scene.image_px, *(scene.things[i] for i in chosen))
        for chosen in product(*fitting)
        if len(set(chosen)) == len(chosen)
    )


def _there(phrases: Sequence[Phrase], fitting: Sequence[list[int]]) -> Truth:
    """Exact numbers as stated, and distinct things for every "a"."""
    counted: set[int] = set()
    singles = []
    for phrase, found in zip(phrases, fitting, strict=True):
        if phrase.number is None:
            singles.append(found)
        elif len(found) == phrase.number:
            counted.update(found)
        else:
            return False
        if phrase.definite and len(found) > 1:
            return None
    return any(
        len(set(chosen)) == len(chosen) and not counted.intersection(chosen)
        for chosen in product(*singles)
    )


def _any(truths: Iterable[Truth]) -> Truth:
    found: Truth = False
    for truth in truths:
        if truth:
            return True
        if truth is None:
            found = None
    return found


def mislabelled_share(
    scenes: Sequence[Scene], texts: Sequence[Sequence[str]], pairs: int = 20_000, seed: int = 0
) -> float:
    """Share of captions of another image that are true of an image all the same.

    Image-text matching that takes any other image's caption as unmatched would label these wrongly.

    Parameters
    ----------
    scenes : sequence of Scene
    texts : sequence of sequences of str
        The captions of each scene.
    pairs : int
        How many (image, caption of another image) to draw.
    seed : int

    Returns
    -------
    float
        In [0, 1].
    """
    if len(scenes) < 2 or len(scenes) != len(texts):
        raise ValueError("mislabelled_share needs the captions of each of at least two scenes")
    rng = np.random.default_rng(seed)
    image, shift = rng.integers(len(scenes), size=pairs), rng.integers(1, len(scenes), size=pairs)
    other = (image + shift) % len(scenes)
    wrong = sum(
        decide(_pick(rng, texts[j]), scenes[i]) is True for i, j in zip(image, other, strict=True)
    )
    return wrong / pairs


# Captions -------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.integers(len(items)))]


def _weighted(rng: np.random.Generator, weights: dict[Item, float]) -> Iterator[Item]:
    """All keys in random order, heavy ones tend to come first."""
    waits = rng.exponential(size=len(weights)) / np.array(list(weights.values()))
    names = list(weights)
    return (names[i] for i in np.argsort(waits))


def _noun(rng: np.random.Generator, thing: Thing, detail: float) -> str:
    """Colour and shape, with `detail` as the chance that the size is told, and half of it for the
    material."""
    size = f"{thing.size} " if rng.random() < detail else ""
    material = f"{thing.material} " if rng.random() < detail / 2 else ""
    return f"{size}{material}{thing.colour} {thing.shape}"


def _kind(thing: Thing) -> tuple[str, str]:
    return thing.colour, thing.shape


def _seen(scene: Scene) -> list[Thing]:
    return [thing for thing in scene.things if not thing.covered]


def _different_pairs(things: Sequence[Thing]) -> list[tuple[Thing, Thing]]:
    return [(a, b) for a, b in permutations(things, 2) if _kind(a) != _kind(b)]


class _Writer(NamedTuple):
    """What a caption's maker draws from."""

    scene: Scene
    rng: np.random.Generator
    things: list[Thing]  # uncovered
    pairs: list[tuple[Thing, Thing]]  # ordered, of different colour or shape


def _direction_caption(writer: _Writer, detail: float) -> str | None:
    """The direction in which two things are further apart."""
    a, b = _pick(writer.rng, writer.pairs)
    across, down = b.x - a.x, b.y - a.y
    if abs(across) > abs(down):
        relation = "left of" if across > 0 else "right of"
        relation = f"to the {relation}" if writer.rng.random() < 0.2 else relation
    else:
        relation = "above" if down > 0 else "below"
    return f"a {_noun(writer.rng, a, detail)} is {relation} a {_noun(writer.rng, b, detail)}"


def _relation_caption(relation: str) -> Callable[[_Writer, float], str | None]:
    def write(writer: _Writer, detail: float) -> str | None:
        related = RELATIONS[relation]
        fitting = [pair for pair in writer.pairs if related(writer.scene.image_px, *pair)]
        if not fitting:
            return None
        a, b = _pick(writer.rng, fitting)
        verb = f"is {relation}"
        if relation == "touching" and writer.rng.random() < 0.5:
            verb = "touches"
        return f"a {_noun(writer.rng, a, detail)} {verb} a {_noun(writer.rng, b, detail)}"

    return write


def _existence_caption(writer: _Writer, detail: float) -> str | None:
    a, b = _pick(writer.rng, writer.pairs)
    return f"there is a {_noun(writer.rng, a, detail)} and a {_noun(writer.rng, b, detail)}"


def _count_caption(writer: _Writer, detail: float) -> str | None:
    """Several things of one colour and shape, or else of one colour, and another thing."""
    rng, kinds = writer.rng, Counter(map(_kind, writer.things))
    several = [(f"{c} {_plural(s)}", n) for (c, s), n in kinds.items() if n > 1]
    if not several:
        colours = Counter(thing.colour for thing in writer.scene.things)
        several = [(f"{colour} things", n) for colour, n in colours.items() if n > 1]
    if not several:
        return None
    plural, count = _pick(rng, several)
    described = _parse_phrase(plural)
    others = [t for t in writer.things if described and not described.fits(t, t.shape)]
    text = f"there are {NUMBERS[count]} {plural}"
    if not others or ("things" not in plural and rng.random() < 0.3):
        return text if "things" not in plural else None
    return f"{text} and a {_noun(rng, _pick(rng, others), detail)}"


def _between_caption(writer: _Writer, detail: float) -> str | None:
    triples = [
        triple
        for triple in permutations(writer.things, 3)
        if len({_kind(thing) for thing in triple}) == 3 and _between(writer.scene.image_px, *triple)
    ]
    if not triples:
        return None
    a, b, c = (_noun(writer.rng, thing, detail / 3) for thing in _pick(writer.rng, triples))
    return f"a {a} is between a {b} and a {c}"


def _same_colour_caption(writer: _Writer, detail: float) -> str | None:
    """The second colour is left to be found, or the sentence would say nothing."""
    pairs = [(a, b) for a, b in writer.pairs if a.colour == b.colour]
    if not pairs:
        return None
    a, b = _pick(writer.rng, pairs)
    return f"a {_noun(writer.rng, a, detail)} is the same colour as a {b.shape}"


# Weights are drawn until a form fits; rare situations (inside, touching) are told when they occur.
_CAPTIONS: dict[Callable[[_Writer, float], str | None], float] = {
    _direction_caption: 0.50,
    _relation_caption("touching"): 0.12,
    _relation_caption("inside"): 0.40,
    _relation_caption("larger than"): 0.07,
    _relation_caption("smaller than"): 0.04,
    _existence_caption: 0.16,
    _count_caption: 0.14,
    _between_caption: 0.10,
    _same_colour_caption: 0.07,
}
LONGEST = 16  # words of a caption


def captions(scene: Scene, rng: np.random.Generator, count: int = 5) -> list[str]:
    """Different true sentences; each names at least a colour and a shape, none a covered thing.

    Parameters
    ----------
    scene : Scene
        From `sample_scene`: at least two uncovered things of different colour or shape.
    rng : numpy.random.Generator
    count : int

    Returns
    -------
    list of str
        `count` sentences of at most `LONGEST` words for which `decide` is True.
    """
    things = _seen(scene)
    writer = _Writer(scene, rng, things, _different_pairs(things))
    if not writer.pairs:
        raise ValueError("captions needs two uncovered things of different colour or shape")
    texts: list[str] = []
    for attempt in range(60 * count):
        detail = min(1.0, 0.2 + 0.01 * attempt)  # few things: more words make more sentences
        written = (write(writer, detail) for write in _weighted(rng, _CAPTIONS))
        text = next(text for text in written if text is not None)
        if text not in texts and len(text.split()) <= LONGEST and decide(text, scene):
            texts.append(text)
        if len(texts) == count:
            return texts
    raise ValueError(f"found only {len(texts)} of {count} captions; ask for fewer")


# Questions ------------------------------------------------------------------------------------


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
    for make in _weighted(rng, _YES_NO):
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
            return _pick(rng, [word for word in family if word != answer])
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
    things = _seen(scene)
    true = "there is a {} {}".format(*_kind(_pick(rng, things)))
    for _ in range(10):
        pair = _true_and_false(scene, true, "there is a {} {}".format(*_absent(things, rng)))
        if pair:
            return pair
    return None


def _absent(things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, str]:
    """Probably not there; often the colour of one thing and the shape of another."""
    colour = _pick(rng, things).colour if rng.random() < 0.6 else _pick(rng, list(COLOURS))
    shape = _pick(rng, things).shape if rng.random() < 0.6 else _pick(rng, SHAPES)
    return colour, shape


def _related(relations: Sequence[str]) -> Callable[[Scene, np.random.Generator], Pair | None]:
    """Say "the red star is left of the blue ball" and its opposite of the same two things."""

    def make(scene: Scene, rng: np.random.Generator) -> Pair | None:
        pairs = _different_pairs(_seen(scene))
        for _ in range(8):
            a, b = _pick(rng, pairs)
            relation = _pick(rng, relations)
            names = ["the {} {}".format(*_kind(thing)) for thing in (a, b)]
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
        for a, b in _different_pairs(_seen(scene)):
            if a.shape != b.shape and (by_colour or a.colour != b.colour):
                names = [t.shape if by_colour else f"{t.colour} {t.shape}" for t in (a, b)]
                texts.append(f"the {names[0]} is {relation} the {names[1]}")
        truths = [decide(text, scene) for text in texts]
        yes = [text for text, truth in zip(texts, truths, strict=True) if truth is True]
        no = [text for text, truth in zip(texts, truths, strict=True) if truth is False]
        return (_pick(rng, yes), _pick(rng, no)) if yes and no else None

    return make


def _more(scene: Scene, rng: np.random.Generator) -> Pair | None:
    """Two colours or two shapes: a cloth counts for its colour only, so a mixture would tell."""
    by_colour = rng.random() < 0.5
    for _ in range(8):
        first, second = (_plural_phrase(scene, rng, by_colour) for _ in range(2))
        true, false = (f"there are more {a} than {b}" for a, b in permutations((first, second)))
        pair = _true_and_false(scene, true, false)
        if pair:
            return pair
    return None


def _plural_phrase(scene: Scene, rng: np.random.Generator, by_colour: bool) -> str:
    """Name "red things" or "stars", mostly of what is there."""
    thing = _pick(rng, _seen(scene))
    if by_colour:
        return f"{thing.colour if rng.random() < 0.8 else _pick(rng, list(COLOURS))} things"
    return _plural(thing.shape if rng.random() < 0.8 else _pick(rng, SHAPES))


_YES_NO: dict[Callable[[Scene, np.random.Generator], Pair | None], float] = {
    _exists: 0.35,
    _related(DIRECTIONS): 0.30,
    _related(("larger than", "smaller than")): 0.12,
    _more: 0.12,
    _pairwise("the same colour as"): 0.10,
    _pairwise("touching"): 0.10,
}


def _number_of(phrase: Phrase, scene: Scene) -> int | None:
    """How many things a phrase describes; None if a cloth decides."""
    certain = sum(phrase.fits(t, t.shape) for t in scene.things)
    if phrase.shape and any(t.covered and phrase.fits(t, phrase.shape) for t in scene.things):
        return None
    return certain


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    """The number is drawn before the words, so that 0, 1 and 2 are about equally frequent."""
    if rng.random() < 0.15:
        answer = str(len(scene.things))
        return Question("how many things are there?", "how many things are", "number", answer)
    hidden = any(thing.covered for thing in scene.things)  # then shapes cannot be counted
    by_colour = hidden or rng.random() < 0.5
    plurals = [f"{colour} things" for colour in COLOURS] if by_colour else map(_plural, SHAPES)
    counted: dict[int, list[str]] = {}
    for plural in plurals:
        number = _number_of(_parse_phrase(plural), scene)
        counted.setdefault(number, []).append(plural)
    number = _pick(rng, sorted(counted))
    text = f"how many {_pick(rng, counted[number])} are there?"
    return Question(text, "how many", "number", str(number))


def _attribute(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Asked of the one thing that the other attributes describe."""
    for attribute in _weighted(rng, {"colour": 4, "shape": 4, "size": 1.5, "material": 1}):
        for i in rng.permutation(len(scene.things)):
            thing = scene.things[int(i)]
            noun = {"colour": thing.shape, "shape": f"{thing.colour} thing"}.get(
                attribute, f"{thing.colour} {thing.shape}"
            )
            if thing.covered or _number_of(_parse_phrase(noun), scene) != 1:
                continue
            if attribute == "size" and thing.shape == "ring":
                continue  # rings are large too often: they hold things
            kind = f"what {attribute} is the"
            return Question(f"{kind} {noun}?", kind, "other", getattr(thing, attribute))
    return None


# Statements about two images ------------------------------------------------------------------

_PAIR_SENTENCES = (
    (re.compile(r"there are (\w+) (.+) in total"), "total"),
    (re.compile(r"the (left|right) image has more (.+) than the (?:left|right) image"), "more"),
    (re.compile(r"the (left|right) image has (.+)"), "side"),
    (re.compile(r"both images have (.+)"), "both"),
    (re.compile(r"exactly one image has (.+)"), "one"),
    (re.compile(r"in the (left|right) image (.+)"), "sentence"),
)


def decide_pair(text: str, left: Scene, right: Scene) -> bool | None:
    """Whether a statement holds of two images.

    Forms: "the left image has THING", "both images have THING", "exactly one image has THING",
    "there are NUMBER THINGS in total", "the left image has more THINGS than the right image", and
    "in the left image" followed by a sentence of `decide`; None as in `decide`.
    """
    text = " ".join(text.lower().replace(",", " ").split()).removesuffix(".").strip()
    scenes = {"left": left, "right": right}
    for pattern, form in _PAIR_SENTENCES:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        groups = match.groups()
        if form == "sentence":
            return decide(groups[1], scenes[groups[0]])
        if form == "side":
            return decide(f"there is {groups[1]}", scenes[groups[0]])
        if form in ("total", "more"):
            return _compare(form, groups, scenes)
        truths = [decide(f"there is {groups[0]}", scene) for scene in (left, right)]
        if form == "both":
            return False if False in truths else None if None in truths else True
        return None if None in truths else truths.count(True) == 1
    return None


def _compare(form: str, groups: Sequence[str], scenes: dict[str, Scene]) -> Truth:
    phrase = _parse_phrase(groups[1])
    if phrase is None or (form == "total" and groups[0] not in NUMBERS):
        return None
    numbers = {side: _number_of(phrase, scene) for side, scene in scenes.items()}
    if None in numbers.values():
        return None
    if form == "total":
        return sum(numbers.values()) == NUMBERS.index(groups[0])
    other = {"left": "right", "right": "left"}[groups[0]]
    return numbers[groups[0]] > numbers[other]


def pair_statements(
    first: tuple[Scene, Scene], second: tuple[Scene, Scene], rng: np.random.Generator
) -> tuple[str, str] | None:
    """Two statements about two pairs of images, as NLVR2 balances them.

    Parameters
    ----------
    first, second : tuple of Scene
        Left and right image of either pair.
    rng : numpy.random.Generator

    Returns
    -------
    tuple of str or None
        A statement that is true of `first` and false of `second`, and one the other way round;
        None if none was found.
    """
    one = _telling_apart(first, second, rng)
    other = _telling_apart(second, first, rng)
    return (one, other) if one and other else None


def _telling_apart(
    true_of: tuple[Scene, Scene], false_of: tuple[Scene, Scene], rng: np.random.Generator
) -> str | None:
    for _ in range(200):
        make = next(_weighted(rng, _STATEMENTS))
        text = make((true_of, false_of)[int(rng.integers(2))], rng)
        if decide_pair(text, *true_of) is True and decide_pair(text, *false_of) is False:
            return text
    return None


def _side_statement(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> str:
    return f"the {_pick(rng, ('left', 'right'))} image has a {_loose_noun(scenes, rng)}"


def _both_statement(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> str:
    return f"both images have a {_loose_noun(scenes, rng)}"


def _one_statement(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> str:
    return f"exactly one image has a {_loose_noun(scenes, rng)}"


def _total_statement(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> str:
    number = NUMBERS[int(rng.integers(2, 5))]
    return (
        f"there are {number} {_plural_phrase(_pick(rng, scenes), rng, rng.random() < 0.5)} in total"
    )


def _more_statement(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> str:
    side, other = _pick(rng, (("left", "right"), ("right", "left")))
    plural = _plural_phrase(_pick(rng, scenes), rng, rng.random() < 0.5)
    return f"the {side} image has more {plural} than the {other} image"


def _direction_statement(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> str:
    side = int(rng.integers(2))
    a, b = _pick(rng, _different_pairs(_seen(scenes[side])))
    names = ["{} {}".format(*_kind(thing)) for thing in (a, b)]
    relation = _pick(rng, DIRECTIONS)
    return f"in the {('left', 'right')[side]} image a {names[0]} is {relation} a {names[1]}"


_STATEMENTS: dict[Callable[[tuple[Scene, Scene], np.random.Generator], str], float] = {
    _side_statement: 0.15,
    _both_statement: 0.25,
    _one_statement: 0.2,
    _total_statement: 0.2,
    _more_statement: 0.2,
    _direction_statement: 0.2,
}


def _loose_noun(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> str:
    """Colour, shape, or both, of something in one of the images."""
    thing = _pick(rng, _seen(_pick(rng, scenes)))
    return _pick(rng, (f"{thing.colour} {thing.shape}", f"{thing.colour} thing", thing.shape))


# Hypotheses -----------------------------------------------------------------------------------

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
    for form in list(_weighted(rng, _HYPOTHESES)) * 2:
        three = _three_labels(form, scene, covered[0], {caption, *(text for text, _ in told)}, rng)
        told += three
        if len(told) == 6:
            break
    return [told[int(i)] for i in rng.permutation(len(told))]


def _three_labels(
    form: Callable[..., str],
    scene: Scene,
    covered: Thing,
    taken: set[str],
    rng: np.random.Generator,
) -> list[tuple[str, str]]:
    relation = _pick(rng, DIRECTIONS)  # one word for all three, or it would tell the label
    found = []
    for label, truths in LABELS.items():
        for _ in range(30):
            text = form(scene, covered, label, relation, rng)
            program = parse(text)
            if program and text not in taken and _possible(program, scene) == truths:
                found.append((text, label))
                break
        else:
            return []
    return found


def _described(
    scene: Scene, covered: Thing, label: str, rng: np.random.Generator
) -> tuple[str, str]:
    """Colour and shape that suit a label: of a visible thing, of the cloth, or of nothing there."""
    things = _seen(scene)
    if label == "entailment":
        return _kind(_pick(rng, things))
    return (covered.colour, _pick(rng, SHAPES)) if label == "neutral" else _absent(things, rng)


def _there_hypothesis(
    scene: Scene, covered: Thing, label: str, relation: str, rng: np.random.Generator
) -> str:
    return "there is a {} {}".format(*_described(scene, covered, label, rng))


def _two_descriptions(
    scene: Scene, covered: Thing, label: str, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """One that suits the label and one that is visible, in random order.

    Always of two colours and two shapes: a repeated word must not tell the label.
    """
    while True:
        two = [_described(scene, covered, label, rng), _kind(_pick(rng, _seen(scene)))]
        if two[0][0] != two[1][0] and two[0][1] != two[1][1]:
            return two if rng.random() < 0.5 else two[::-1]
        if rng.random() < 0.05:
            return two  # hardly ever: a scene in which everything has one colour or one shape


def _and_hypothesis(
    scene: Scene, covered: Thing, label: str, relation: str, rng: np.random.Generator
) -> str:
    (c, s), (d, t) = _two_descriptions(scene, covered, label, rng)
    return f"there is a {c} {s} and a {d} {t}"


def _direction_hypothesis(
    scene: Scene, covered: Thing, label: str, relation: str, rng: np.random.Generator
) -> str:
    """A contradiction is as often the wrong direction as a thing that is not there."""
    source = "entailment" if label == "contradiction" and rng.random() < 0.5 else label
    (c, s), (d, t) = _two_descriptions(scene, covered, source, rng)
    return f"a {c} {s} is {relation} a {d} {t}"


def _shape_hypothesis(
    scene: Scene, covered: Thing, label: str, relation: str, rng: np.random.Generator
) -> str:
    """Say "the red thing is a star", of a colour that occurs, whatever the label."""
    if label == "neutral":
        return f"the {covered.colour} thing is a {_pick(rng, SHAPES)}"
    thing = _pick(rng, _seen(scene))
    shape = thing.shape if label == "entailment" else _pick(rng, SHAPES)
    return f"the {thing.colour} thing is a {shape}"


_HYPOTHESES: dict[Callable[..., str], float] = {
    _there_hypothesis: 0.35,
    _direction_hypothesis: 0.30,
    _and_hypothesis: 0.15,
    _shape_hypothesis: 0.20,
}
