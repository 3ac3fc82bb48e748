"""Captions of generated scenes: true, different and short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np

from vpworkbench.scenes.language import NUMBERS, RELATIONS, decide, parse_phrase, plural_of
from vpworkbench.scenes.scene import Scene, Thing
from vpworkbench.scenes.wording import different_pairs, kind_of, pick, seen_things, weighted


class _Writer(NamedTuple):
    """What a caption's maker draws from."""

    scene: Scene
    rng: np.random.Generator
    things: list[Thing]  # uncovered
    pairs: list[tuple[Thing, Thing]]  # ordered, of different colour or shape


def _noun(rng: np.random.Generator, thing: Thing, detail: float) -> str:
    """Colour and shape, with `detail` as the chance that the size is told, and half of it for the
    material."""
    size = f"{thing.size} " if rng.random() < detail else ""
    material = f"{thing.material} " if rng.random() < detail / 2 else ""
    return f"{size}{material}{thing.colour} {thing.shape}"


def _direction_caption(writer: _Writer, detail: float) -> str | None:
    """The direction in which two things are further apart."""
    a, b = pick(writer.rng, writer.pairs)
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
        a, b = pick(writer.rng, fitting)
        verb = f"is {relation}"
        if relation == "touching" and writer.rng.random() < 0.5:
            verb = "touches"
        return f"a {_noun(writer.rng, a, detail)} {verb} a {_noun(writer.rng, b, detail)}"

    return write


def _existence_caption(writer: _Writer, detail: float) -> str | None:
    a, b = pick(writer.rng, writer.pairs)
    return f"there is a {_noun(writer.rng, a, detail)} and a {_noun(writer.rng, b, detail)}"


def _count_caption(writer: _Writer, detail: float) -> str | None:
    """Several things of one colour and shape, or else of one colour, and another thing."""
    rng, kinds = writer.rng, Counter(map(kind_of, writer.things))
    several = [(f"{c} {plural_of(s)}", n) for (c, s), n in kinds.items() if n > 1]
    if not several:
        colours = Counter(thing.colour for thing in writer.scene.things)
        several = [(f"{colour} things", n) for colour, n in colours.items() if n > 1]
    if not several:
        return None
    plural, count = pick(rng, several)
    described = parse_phrase(plural)
    others = [t for t in writer.things if described and not described.fits(t, t.shape)]
    text = f"there are {NUMBERS[count]} {plural}"
    if not others or ("things" not in plural and rng.random() < 0.3):
        return text if "things" not in plural else None
    return f"{text} and a {_noun(rng, pick(rng, others), detail)}"


def _between_caption(writer: _Writer, detail: float) -> str | None:
    triples = [
        triple
        for triple in permutations(writer.things, 3)
        if len({kind_of(thing) for thing in triple}) == 3 and RELATIONS["between"](writer.scene.image_px, *triple)
    ]
    if not triples:
        return None
    a, b, c = (_noun(writer.rng, thing, detail / 3) for thing in pick(writer.rng, triples))
    return f"a {a} is between a {b} and a {c}"


def _same_colour_caption(writer: _Writer, detail: float) -> str | None:
    """The second colour is left to be found, or the sentence would say nothing."""
    pairs = [(a, b) for a, b in writer.pairs if a.colour == b.colour]
    if not pairs:
        return None
    a, b = pick(writer.rng, pairs)
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
    things = seen_things(scene)
    writer = _Writer(scene, rng, things, different_pairs(things))
    if not writer.pairs:
        raise ValueError("captions needs two uncovered things of different colour or shape")
    texts: list[str] = []
    for attempt in range(60 * count):
        detail = min(1.0, 0.2 + 0.01 * attempt)  # few things: more words make more sentences
        written = (write(writer, detail) for write in weighted(rng, _CAPTIONS))
        text = next(text for text in written if text is not None)
        if text not in texts and len(text.split()) <= LONGEST and decide(text, scene):
            texts.append(text)
        if len(texts) == count:
            return texts
    raise ValueError(f"found only {len(texts)} of {count} captions; ask for fewer")


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
    wrong = sum(decide(pick(rng, texts[j]), scenes[i]) is True for i, j in zip(image, other, strict=True))
    return wrong / pairs
