"""Captions of generated scenes: true, all different, and short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import permutations

import numpy as np

from vpworkbench.scenes.language import NUMBERS, RELATIONS, decide, parse_phrase, plural_of
from vpworkbench.scenes.scene import Scene, Thing
from vpworkbench.scenes.wording import pick, weighted

PER_IMAGE = 5
LONGEST = 16  # words of a caption


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """`PER_IMAGE` different sentences of at most `LONGEST` words that are true of a scene.

    Each mentions at least a colour and a shape, none a covered thing. The scene, as from `sample_scene`, has at least
    two uncovered things of different colour or shape.
    """
    if not scene.pairs:
        raise ValueError("captions needs two uncovered things of different colour or shape")
    texts: list[str] = []
    for attempt in range(60 * PER_IMAGE):
        detail = min(1.0, 0.2 + 0.01 * attempt)  # few things: more words make more sentences
        written = (write(scene, rng, detail) for write in weighted(rng, _CAPTIONS))
        text = next(text for text in written if text is not None)
        if text not in texts and len(text.split()) <= LONGEST and decide(text, scene):
            texts.append(text)
        if len(texts) == PER_IMAGE:
            return texts
    raise ValueError(f"found only {len(texts)} of {PER_IMAGE} captions: the scene has too few different things")


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
    verb = f"is {relation}"
    if relation == "touching" and rng.random() < 0.5:
        verb = "touches"
    return f"a {_noun(rng, a, detail)} {verb} a {_noun(rng, b, detail)}"


def _existence(scene: Scene, rng: np.random.Generator, detail: float) -> str:
    a, b = pick(rng, scene.pairs)
    return f"there is a {_noun(rng, a, detail)} and a {_noun(rng, b, detail)}"


def _count(scene: Scene, rng: np.random.Generator, detail: float) -> str | None:
    """Several things of one colour and shape, or else of one colour, and another thing."""
    kinds = Counter((thing.colour, thing.shape) for thing in scene.uncovered)
    several = [(f"{colour} {plural_of(shape)}", count) for (colour, shape), count in kinds.items() if count > 1]
    if not several:
        colours = Counter(thing.colour for thing in scene.things)
        several = [(f"{colour} things", count) for colour, count in colours.items() if count > 1]
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
    _count: 0.14,
    _between: 0.10,
    _same_colour: 0.07,
}
