"""Random choices of things and words that captions, questions and statements share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from vpworkbench.scenes.language import plural_of
from vpworkbench.scenes.scene import COLOURS, SHAPES, Scene

Item = TypeVar("Item")


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
