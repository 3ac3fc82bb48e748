"""Minimal pairs: two scenes that differ in one property of one thing, and two sentences that differ in one word.

Each sentence is true of one scene and false of the other. A sentence is a caption of one scene; in the other sentence,
the word that names the property is replaced. Both scenes are drawn on the same ground, so that their pixels differ only
where the thing and its shadow are in either of them.

Pair `n` depends only on (seed, n): a larger set begins with the smaller one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vpworkbench.scenes.language import NUMBERS, decide
from vpworkbench.scenes.layout import LEVELS, Level, is_free, sample_scene, with_boxes
from vpworkbench.scenes.scene import COLOURS, MATERIALS, SHAPES, SIZES, SPLITS, Scene, Thing
from vpworkbench.scenes.texts import caption, pick
from vpworkbench.scenes.write import IMAGES, OBJECT_MAPS, Part, SetKind, add_image, spans, write_list, write_set
from vpworkbench.settings.scenes import PairSettings

PROPERTIES = ("colour", "shape", "material", "size", "position", "count")
"""What the scenes of a pair can differ in; each is as frequent as the others."""
PAIR_ENTRIES = "dataset_minimal_pairs.json"

VALUES = {"colour": tuple(COLOURS), "shape": SHAPES, "material": MATERIALS, "size": SIZES}
AXES = {"x": {"left": "right", "right": "left"}, "y": {"above": "below", "below": "above"}}
CHANGES = 30  # tried on a scene before the next one is sampled
SENTENCES = 12  # tried for a change


class MinimalPair(NamedTuple):
    """Two scenes and a sentence for each, true of that scene and false of the other."""

    differs_in: str  # one of PROPERTIES
    thing: int  # index of the thing that differs; for `count` the last thing of the scene that has one more
    scenes: tuple[Scene, Scene]
    texts: tuple[str, str]  # they differ in one word


def minimal_pair(settings: PairSettings, number: int) -> MinimalPair:
    """Pair `number`, which differs in property `number` of `PROPERTIES`, counted round and round; writes no file.

    A thing whose outline changes is clear of all other things in both scenes, so that it touches and hides none.
    """
    rng = _pair_rng(settings, number, stream=0)
    differs_in, level = PROPERTIES[number % len(PROPERTIES)], LEVELS[settings.difficulty]
    while True:
        scene = sample_scene(rng, level, settings.image_px)
        for _ in range(CHANGES):
            change = _more(scene, rng) if differs_in == "count" else _other(scene, differs_in, level, rng)
            texts = change and _texts(change, rng, detail=1.0 if differs_in in ("size", "material") else 0.2)
            if texts:
                order = 1 if rng.random() < 0.5 else -1
                return MinimalPair(differs_in, change.thing, (change.before, change.after)[::order], texts[::order])


def write_pairs(folder: Path, settings: PairSettings, *, processes: int | None = None) -> Path:
    """Write minimal pairs, either complete or not at all; see `write_scenes`.

    `folder` then holds `images.zip`, `object_maps.zip`, `settings.json` and `dataset_minimal_pairs.json`: Karpathy's
    format, two images for each pair, all in the split `test`, with a list `pairs` of what differs.
    """
    kind = SetKind(_make_part, (IMAGES, OBJECT_MAPS), _write_texts)
    return write_set(folder, settings, kind, [(settings, *span) for span in spans(2 * settings.pairs)], processes)


class _Change(NamedTuple):
    before: Scene
    after: Scene
    thing: int
    words: dict[str, str]  # word of a sentence that is true before -> what replaces it after


def _other(scene: Scene, differs_in: str, level: Level, rng: np.random.Generator) -> _Change | None:
    """Another colour, shape, material, size or position of one thing; None if it has no room."""
    thing = pick(rng, scene.uncovered)
    others = [other for other in scene.things if other is not thing]
    if differs_in == "position":  # along one axis, to the other side of another thing
        axis, words = pick(rng, tuple(AXES.items()))
        here, passed = getattr(thing, axis), getattr(pick(rng, others), axis)
        edge = scene.image_px if here < passed else 0
        changed = replace(thing, **{axis: round(passed + float(rng.random()) * (edge - passed), 2)})
    else:
        old = getattr(thing, differs_in)
        new = pick(rng, [value for value in VALUES[differs_in] if value != old])
        changed, words = replace(thing, **{differs_in: new}), {old: new}
        if differs_in == "size":
            ratio = level.radii[SIZES.index(new)] / level.radii[SIZES.index(old)]
            changed = replace(changed, radius=round(thing.radius * ratio, 2))
    has_room = _clear(thing, others, scene) and _clear(changed, others, scene)
    if differs_in not in ("colour", "material") and not has_room:
        return None
    things = [changed if one is thing else one for one in scene.things]
    after = Scene(tuple(with_boxes(things, scene.image_px, level.visible)), scene.image_px)
    return _Change(scene, after, thing.depth, words)


def _more(scene: Scene, rng: np.random.Generator) -> _Change | None:
    """Three or more things get one colour, and the last of them goes away; None if there are too few things."""
    *others, last = scene.things
    if len(others) < 3 or not _clear(last, others, scene):
        return None
    chosen = rng.choice(len(others), size=int(rng.integers(2, len(others))), replace=False)
    alike = [replace(thing, colour=last.colour) if i in chosen else thing for i, thing in enumerate(others)]
    before, after = (Scene(things, scene.image_px) for things in ((*alike, last), tuple(alike)))
    count = sum(thing.colour == last.colour for thing in before.things)
    return _Change(before, after, last.depth, {NUMBERS[count]: NUMBERS[count - 1]}) if before.pairs else None


def _clear(thing: Thing, others: Sequence[Thing], scene: Scene) -> bool:
    return is_free(thing.x, thing.y, thing.radius, others, scene.image_px)


def _texts(change: _Change, rng: np.random.Generator, detail: float) -> tuple[str, str] | None:
    """A caption of the scene before, and the same with one word replaced, each false of the other scene."""
    for _ in range(SENTENCES):
        words = (caption(change.before, rng, detail) or "").split()
        for place, word in enumerate(words):
            if word in change.words:
                texts = " ".join(words), " ".join([*words[:place], change.words[word], *words[place + 1 :]])
                if all(
                    decide(text, scene) is (text_of == scene_of)
                    for text_of, text in enumerate(texts)
                    for scene_of, scene in enumerate((change.before, change.after))
                ):
                    return texts
    return None


def _make_part(settings: PairSettings, start: int, stop: int) -> Part:
    """Images `start` to `stop`; two for each pair."""
    part = Part(defaultdict(list), defaultdict(list))
    for number in range(start // 2, stop // 2):
        pair = minimal_pair(settings, number)
        part.texts["pairs"].append(json.dumps({"differs_in": pair.differs_in, "thing": pair.thing}))
        for side, (scene, text) in enumerate(zip(pair.scenes, pair.texts, strict=True)):
            image, name = 2 * number + side, f"minimal-{number:06d}-{('first', 'second')[side]}.png"
            add_image(part, name, scene, _pair_rng(settings, number, stream=1))
            sentence = {"raw": text, "tokens": text.split(), "imgid": image, "sentid": image}
            entry = {"filename": name, "imgid": image, "split": "test", "sentids": [image], "sentences": [sentence]}
            part.texts["images"].append(json.dumps(entry | scene.to_json()))
    return part


def _write_texts(folder: Path, texts: dict[str, list[str]]) -> None:
    header = {"dataset": "minimal pairs", "pairs": [json.loads(pair) for pair in texts["pairs"]]}
    write_list(folder / PAIR_ENTRIES, "images", header, texts["images"])


def _pair_rng(settings: PairSettings, number: int, stream: int) -> np.random.Generator:
    """Streams: 0 the scenes and their texts, 1 their ground. Those of the splits are others, see `scene_rng`."""
    return np.random.default_rng([settings.seed, len(SPLITS), number, stream])
