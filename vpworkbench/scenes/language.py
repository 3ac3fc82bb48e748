"""Sentences about generated scenes: what they mean, and whether they hold.

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
cloth: some sentences cannot be known from the image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import hypot

from vpworkbench.scenes.scene import COLOURS, MATERIALS, SHAPES, SIZES, Scene, Thing
from vpworkbench.scenes.shapes import HOLE, gap

Truth = bool | None  # None: undecided

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
ATTRIBUTE_WORDS: frozenset[str] = frozenset(COLOURS) | frozenset(SHAPES)


def plural_of(noun: str) -> str:
    """The plural of a shape."""
    return noun + ("es" if noun.endswith("s") else "s")


# Every word of captions, questions, statements and hypotheses.
VOCABULARY: frozenset[str] = frozenset(
    (*SHAPES, *COLOURS, *SIZES, *MATERIALS, *NUMBERS, *map(plural_of, SHAPES), "thing", "things")
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


_SHAPE_OF = {shape: shape for shape in SHAPES} | {plural_of(shape): shape for shape in SHAPES}
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


def parse_phrase(text: str) -> Phrase | None:
    """The meaning of a THING; None if it is not of the grammar."""
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
        phrases = tuple(parse_phrase(group) for group in match.groups())
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
    truths = possible_truths(program, scene)
    return truths.pop() if len(truths) == 1 else None


def possible_truths(program: Program, scene: Scene) -> set[Truth]:
    """The truth for every combination of shapes under the cloths.

    Of the shapes that the sentence does not name, one stands for all.
    """
    named = {phrase.shape for phrase in program.phrases if phrase.shape}
    hidden = (*named, next(shape for shape in SHAPES if shape not in named))
    worlds = product(*((hidden if thing.covered else (thing.shape,)) for thing in scene.things))
    return {_holds(program, scene, shapes) for shapes in worlds}


def _holds(program: Program, scene: Scene, shapes: Sequence[str]) -> Truth:
    fitting = [
        [i for i, thing in enumerate(scene.things) if phrase.fits(thing, shapes[i])] for phrase in program.phrases
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
    return any(len(set(chosen)) == len(chosen) and not counted.intersection(chosen) for chosen in product(*singles))


def _any(truths: Iterable[Truth]) -> Truth:
    found: Truth = False
    for truth in truths:
        if truth:
            return True
        if truth is None:
            found = None
    return found


def number_of(phrase: Phrase, scene: Scene) -> int | None:
    """How many things a phrase describes; None if a cloth decides."""
    certain = sum(phrase.fits(t, t.shape) for t in scene.things)
    if phrase.shape and any(t.covered and phrase.fits(t, phrase.shape) for t in scene.things):
        return None
    return certain


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
    phrase = parse_phrase(groups[1])
    if phrase is None or (form == "total" and groups[0] not in NUMBERS):
        return None
    numbers = {side: number_of(phrase, scene) for side, scene in scenes.items()}
    if None in numbers.values():
        return None
    if form == "total":
        return sum(numbers.values()) == NUMBERS.index(groups[0])
    other = {"left": "right", "right": "left"}[groups[0]]
    return numbers[groups[0]] > numbers[other]
