"""Statements about two images, as NLVR2 has them.

Each statement is true of one pair of images and false of another, each pair having one of both.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vpworkbench.scenes.language import DIRECTIONS, NUMBERS, decide_pair
from vpworkbench.scenes.scene import Scene
from vpworkbench.scenes.wording import different_pairs, kind_of, pick, plural_phrase, seen_things, weighted


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


def _telling_apart(true_of: tuple[Scene, Scene], false_of: tuple[Scene, Scene], rng: np.random.Generator) -> str | None:
    for _ in range(200):
        make = next(weighted(rng, _STATEMENTS))
        text = make((true_of, false_of)[int(rng.integers(2))], rng)
        if decide_pair(text, *true_of) is True and decide_pair(text, *false_of) is False:
            return text
    return None


def _side_statement(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> str:
    return f"the {pick(rng, ('left', 'right'))} image has a {_loose_noun(scenes, rng)}"


def _both_statement(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> str:
    return f"both images have a {_loose_noun(scenes, rng)}"


def _one_statement(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> str:
    return f"exactly one image has a {_loose_noun(scenes, rng)}"


def _total_statement(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> str:
    number = NUMBERS[int(rng.integers(2, 5))]
    return f"there are {number} {plural_phrase(pick(rng, scenes), rng, rng.random() < 0.5)} in total"


def _more_statement(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> str:
    side, other = pick(rng, (("left", "right"), ("right", "left")))
    plural = plural_phrase(pick(rng, scenes), rng, rng.random() < 0.5)
    return f"the {side} image has more {plural} than the {other} image"


def _direction_statement(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> str:
    side = int(rng.integers(2))
    a, b = pick(rng, different_pairs(seen_things(scenes[side])))
    names = ["{} {}".format(*kind_of(thing)) for thing in (a, b)]
    relation = pick(rng, DIRECTIONS)
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
    thing = pick(rng, seen_things(pick(rng, scenes)))
    return pick(rng, (f"{thing.colour} {thing.shape}", f"{thing.colour} thing", thing.shape))
