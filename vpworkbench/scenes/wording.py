"""What captions, questions, statements and hypotheses share: how to draw what they speak of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import TypeVar

import numpy as np

from vpworkbench.scenes.language import plural_of
from vpworkbench.scenes.scene import COLOURS, SHAPES, Scene, Thing

Item = TypeVar("Item")


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    """One of the items, each as likely."""
    return items[int(rng.integers(len(items)))]


def weighted(rng: np.random.Generator, weights: dict[Item, float]) -> Iterator[Item]:
    """All keys in random order, heavy ones tend to come first."""
    waits = rng.exponential(size=len(weights)) / np.array(list(weights.values()))
    names = list(weights)
    return (names[i] for i in np.argsort(waits))


def kind_of(thing: Thing) -> tuple[str, str]:
    """What a thing is named by: colour and shape."""
    return thing.colour, thing.shape


def seen_things(scene: Scene) -> list[Thing]:
    """All but the covered ones."""
    return [thing for thing in scene.things if not thing.covered]


def different_pairs(things: Sequence[Thing]) -> list[tuple[Thing, Thing]]:
    """Ordered pairs of things that differ in colour or shape."""
    return [(a, b) for a, b in permutations(things, 2) if kind_of(a) != kind_of(b)]


def absent_kind(things: Sequence[Thing], rng: np.random.Generator) -> tuple[str, str]:
    """Probably not there; often the colour of one thing and the shape of another."""
    colour = pick(rng, things).colour if rng.random() < 0.6 else pick(rng, list(COLOURS))
    shape = pick(rng, things).shape if rng.random() < 0.6 else pick(rng, SHAPES)
    return colour, shape


def plural_phrase(scene: Scene, rng: np.random.Generator, by_colour: bool) -> str:
    """Name "red things" or "stars", mostly of what is there."""
    thing = pick(rng, seen_things(scene))
    if by_colour:
        return f"{thing.colour if rng.random() < 0.8 else pick(rng, list(COLOURS))} things"
    return plural_of(thing.shape if rng.random() < 0.8 else pick(rng, SHAPES))
