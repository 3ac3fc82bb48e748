"""Right and wrong answers of a fine-tuned model, each with where the model looked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import visual_input
from vpworkbench.data.records import Example, Picture
from vpworkbench.metrics import most_given
from vpworkbench.probes import inter_modality_flow, modality_masks
from vpworkbench.probes.layouts import REGIONS_SIDE, painted
from vpworkbench.tasks.retrieval import RetrievalResult, captions_of, owners_of
from vpworkbench.tasks.task import TaskModel, TaskResult

PREVIEW_PX = 160


class Reviewed(NamedTuple):
    """One example as a person looks at it.

    Attributes
    ----------
    wanted : str
        The label, or what most people answered; empty where the release withholds it.
    score : float
        Official score in [0, 1]; nan where the answer is withheld.
    images : tuple of uint8 array, (height, width, 3)
    attention : tuple of array, (row, column)
        What of [CLS]'s attention, rolled out from the input to the last layer (paper Eq. 4), falls on each visual
        token, for each image.
    """

    text: str
    wanted: str
    predicted: str
    score: float
    images: tuple[np.ndarray, ...]
    attention: tuple[np.ndarray, ...]

    @property
    def right(self) -> bool:
        """At least half of the official score."""
        return self.score >= 0.5


def review(
    model: TaskModel,
    examples: Sequence[Example] | Sequence[Picture],
    result: TaskResult | RetrievalResult,
    *,
    count: int = 48,
) -> list[Reviewed]:
    """As many right as wrong examples, in file order; fewer where there are not as many.

    Of retrieval they are captions: each with the image that was found first, and its own behind that.

    Parameters
    ----------
    result
        Of the model on the same examples.
    count : int
        Right and wrong ones together, at most.
    """
    if isinstance(result, RetrievalResult):
        examples, result = _searches(examples, result)
    if len(examples) != len(result.scores):
        raise ValueError(f"{len(result.scores)} scores for {len(examples)} examples")
    right = [example for example, score in zip(examples, result.scores, strict=True) if score >= 0.5]
    wrong = [example for example, score in zip(examples, result.scores, strict=True) if score < 0.5]
    scores = dict(zip((example.id for example in examples), result.scores, strict=True))
    chosen = [*right[: count // 2], *wrong[: count // 2]]
    sides = len(chosen[0].images) if chosen else 0
    attention = [_looked_at(model, chosen, side) for side in range(sides)]
    return [
        Reviewed(
            text=example.text,
            wanted=example.label or most_given(example.answers),
            predicted=result.predicted[example.id],
            score=float(scores[example.id]),
            images=tuple(_preview(image) for image in example.images),
            attention=tuple(maps[number] for maps in attention),
        )
        for number, example in enumerate(chosen)
    ]


def _searches(pictures: Sequence[Picture], result: RetrievalResult) -> tuple[list[Example], TaskResult]:
    """Each caption as an example about the image that is found first and about its own."""
    owners, found = owners_of(pictures), result.scores.argmax(axis=0)
    searches = [
        Example(f"{pictures[own].id} {number}", (pictures[best].image, pictures[own].image), text, pictures[own].split,
                label=pictures[own].id)
        for number, (text, own, best) in enumerate(zip(captions_of(pictures), owners, found, strict=True))
    ]  # fmt: skip
    told = {search.id: pictures[best].id for search, best in zip(searches, found, strict=True)}
    return searches, TaskResult("retrieval", (owners == found).astype(float), told)


def _looked_at(model: TaskModel, examples: Sequence[Example], side: int) -> np.ndarray:
    """(example, row, column) of one image of each example; regions are drawn into their boxes."""
    visual, found = model.base.settings.visual, []
    side_tokens = visual.grid if visual.kind.on_grid else REGIONS_SIDE
    for start in range(0, len(examples), 16):
        part = examples[start : start + 16]
        pixels = visual_input(visual).stack([example.images[side] for example in part])
        inputs = model.base.eval().prepare(pixels, [example.text for example in part])
        flow = inter_modality_flow(model.base, inputs.forward, inputs.vision, inputs.tokens, rows=[0], starts=[0])
        masks = modality_masks(model.base, inputs.forward)
        boxes = masks.boxes.masked_fill(~(masks.vision & masks.tokens)[..., None], torch.nan)
        found.append(painted(flow.rows_from_input[:, -1, 0], boxes, side_tokens).float().cpu())
    return torch.cat(found).numpy()


def _preview(image: ImageFile) -> np.ndarray:
    """Small enough for a page, its sides in proportion."""
    small = Image.fromarray(image.pixels())
    small.thumbnail((PREVIEW_PX, PREVIEW_PX))
    return np.array(small)
