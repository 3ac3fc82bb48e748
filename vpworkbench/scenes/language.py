"""Sentences about generated scenes: their meaning, and whether they are true.

The grammar (a sentence may end with a full stop):

    there is THING                                  there are NUMBER THINGS [and THING]
    there is THING and THING                        there are more THINGS than THINGS
    THING is RELATION THING                         THING is between THING and THING
    THING is a SHAPE                                THING touches THING

    THING     a | the [size] [material] [colour] shape, where "thing" is any shape
    NUMBER    no, one, two ... eight: exactly that many
    RELATION  (to the) left of, (to the) right of, above, below, inside, touching,
              larger than, smaller than, the same colour as

"a" means at least one. "the" means exactly one: a sentence about several is undecided. Different THINGs of a sentence
are different things. Between "clearly true" and "clearly false" every relation has a margin in which it is undecided,
so no sentence is called true or false where people would disagree.

A covered thing may have any shape, so a sentence is true only if it is true for every shape under the cloth: some
sentences cannot be decided from the image.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import hypot

from vpworkbench.scenes.drawing import HOLE, gap
from vpworkbench.scenes.scene import COLOURS, MATERIALS, SHAPES, SIZES, Scene, Thing

Truth = bool | None  # None: undecided

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
ATTRIBUTE_WORDS: frozenset[str] = frozenset(COLOURS) | frozenset(SHAPES)


def plural_of(noun: str) -> str:
    """The plural of a shape."""
    return noun + ("es" if noun.endswith("s") else "s")


# --------------------------------------------------------------------------------------------------- relations


def _clear(value: float, *, false_below: float, true_above: float) -> Truth:
    if value >= true_above:
        return True
    return False if value <= false_below else None


def _beyond(image_px: int, distance: float) -> Truth:
    return _clear(distance, false_below=0.03 * image_px, true_above=0.1 * image_px)


def _larger(one: Thing, other: Thing) -> Truth:
    return _clear(one.radius / other.radius, false_below=1.07, true_above=1.15)


def _inside(image_px: int, inner: Thing, outer: Thing) -> Truth:
    """Only a ring can contain something."""
    if outer.shape != "ring":
        return False
    distance = hypot(inner.x - outer.x, inner.y - outer.y)
    if distance + 0.9 * inner.radius <= HOLE * outer.radius:
        return True
    return False if distance >= HOLE * outer.radius else None


def _between(image_px: int, middle: Thing, first: Thing, second: Thing) -> Truth:
    """In the middle half of the line from `first` to `second`, and close to it."""
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
    "touching": lambda px, a, b: _clear(-gap(a, b), false_below=-0.035 * px, true_above=-0.012 * px),
    "larger than": lambda px, a, b: _larger(a, b),
    "smaller than": lambda px, a, b: _larger(b, a),
    "the same colour as": lambda px, a, b: a.colour == b.colour,
    "between": _between,
}
OPPOSITES = {"left of": "right of", "above": "below", "larger than": "smaller than"}
OPPOSITES |= {opposite: relation for relation, opposite in OPPOSITES.items()}
DIRECTIONS = ("left of", "right of", "above", "below")


# ------------------------------------------------------------------------------------------------------ meaning


@dataclass(frozen=True, slots=True)
class Phrase:
    """Which things are meant, and how many: "a small red ball", "the ring", "two blue things"."""

    number: int | None  # exactly that many; None for "a", "the" and bare plurals
    definite: bool
    size: str | None
    material: str | None
    colour: str | None
    shape: str | None  # None: any

    def fits(self, thing: Thing, shape: str | None = None) -> bool:
        """Whether the phrase describes `thing`; where `shape` is given, as if the thing had that shape."""
        return (
            (self.colour is None or self.colour == thing.colour)
            and (self.shape is None or self.shape == (shape or thing.shape))
            and (self.size is None or self.size == thing.size)
            and (self.material is None or self.material == thing.material)
        )


@dataclass(frozen=True, slots=True)
class Program:
    """The meaning of a sentence: a form of the grammar or a key of `RELATIONS`, and the things it is about."""

    form: str
    phrases: tuple[Phrase, ...]


_NOUNS = {shape: shape for shape in SHAPES} | {plural_of(shape): shape for shape in SHAPES}
_NOUNS |= {"thing": None, "things": None}
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


def _plain(text: str) -> str:
    return " ".join(text.lower().replace(",", " ").split()).removesuffix(".").strip()


def parse_phrase(text: str) -> Phrase | None:
    """The meaning of a THING; None outside the grammar."""
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
    """The meaning of a sentence; None outside the grammar."""
    text = _plain(text)
    for pattern, form in _SENTENCES:
        if match := pattern.fullmatch(text):
            phrases = tuple(parse_phrase(group) for group in match.groups())
            if None not in phrases:
                return Program(form, phrases)
    return None


# -------------------------------------------------------------------------------------------------------- truth


def decide(text: str, scene: Scene) -> bool | None:
    """Whether a sentence is true of a scene.

    None if the text is outside the grammar, lies in a relation's margin, mentions "the" thing where there are several,
    or depends on the shape under a cloth.
    """
    program = parse(text)
    truths = possible_truths(program, scene) if program else ()
    return truths.pop() if len(truths) == 1 else None


def possible_truths(program: Program, scene: Scene) -> set[Truth]:
    """The truth for every combination of shapes under the cloths."""
    named = {phrase.shape for phrase in program.phrases if phrase.shape}
    hidden = (*named, next(shape for shape in SHAPES if shape not in named))  # one for all that are not mentioned
    worlds = product(*((hidden if thing.covered else (thing.shape,)) for thing in scene.things))
    return {_truth(program, scene, shapes) for shapes in worlds}


def _truth(program: Program, scene: Scene, shapes: Sequence[str]) -> Truth:
    """The truth of a sentence where the things have these shapes."""
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
    truths = {
        relation(scene.image_px, *(scene.things[i] for i in chosen))
        for chosen in product(*fitting)
        if len(set(chosen)) == len(chosen)
    }
    return True if True in truths else None if None in truths else False


def _there(phrases: Sequence[Phrase], fitting: Sequence[list[int]]) -> Truth:
    """Exact numbers as stated, and a different thing for every "a"."""
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


def number_of(phrase: Phrase, scene: Scene) -> int | None:
    """How many things a phrase describes; None if that depends on the shape under a cloth."""
    if phrase.shape and any(thing.covered and phrase.fits(thing, phrase.shape) for thing in scene.things):
        return None
    return sum(phrase.fits(thing) for thing in scene.things)


# ------------------------------------------------------------------------------------ statements about two images


def decide_pair(text: str, left: Scene, right: Scene) -> bool | None:
    """Whether a statement is true of two images.

    Forms: "the left image has THING", "both images have THING", "exactly one image has THING", "there are NUMBER THINGS
    in total", "the left image has more THINGS than the right image", and "in the left image" followed by a sentence of
    `decide`; None as in `decide`.
    """
    text = _plain(text)
    for pattern, truth_of in _PAIR_SENTENCES.items():
        if match := re.fullmatch(pattern, text):
            return truth_of({"left": left, "right": right}, *match.groups())
    return None


Pair = dict[str, Scene]  # left and right


def _total(pair: Pair, number: str, things: str) -> Truth:
    counts = _counts(pair, things)
    return sum(counts.values()) == NUMBERS.index(number) if counts and number in NUMBERS else None


def _more(pair: Pair, side: str, things: str) -> Truth:
    counts = _counts(pair, things)
    return counts[side] > min(counts.values()) if counts else None


def _counts(pair: Pair, things: str) -> dict[str, int] | None:
    phrase = parse_phrase(things)
    counts = {side: phrase and number_of(phrase, scene) for side, scene in pair.items()}
    return None if None in counts.values() else counts


def _both(pair: Pair, thing: str) -> Truth:
    truths = {decide(f"there is {thing}", scene) for scene in pair.values()}
    return False if False in truths else None if None in truths else True


def _exactly_one(pair: Pair, thing: str) -> Truth:
    truths = [decide(f"there is {thing}", scene) for scene in pair.values()]
    return None if None in truths else truths.count(True) == 1


_PAIR_SENTENCES: dict[str, Callable[..., Truth]] = {
    r"there are (\w+) (.+) in total": _total,
    r"the (left|right) image has more (.+) than the (?:left|right) image": _more,
    r"the (left|right) image has (.+)": lambda pair, side, thing: decide(f"there is {thing}", pair[side]),
    r"both images have (.+)": _both,
    r"exactly one image has (.+)": _exactly_one,
    r"in the (left|right) image (.+)": lambda pair, side, sentence: decide(sentence, pair[side]),
}
