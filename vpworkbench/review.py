"""Right and wrong answers of a fine-tuned model, each with where the model looked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from vpworkbench.data.batches import stack_files
from vpworkbench.data.records import Example, ImageFile
from vpworkbench.metrics import most_given
from vpworkbench.probes import inter_modality_flow
from vpworkbench.tasks import TaskModel, TaskResult

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


def review(model: TaskModel, examples: Sequence[Example], result: TaskResult, *, count: int = 48) -> list[Reviewed]:
    """As many right as wrong examples, in file order; fewer where there are not as many.

    Parameters
    ----------
    result
        Of `evaluate_task` on the same examples.
    count : int
        Right and wrong ones together, at most.
    """
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


def _looked_at(model: TaskModel, examples: Sequence[Example], side: int) -> np.ndarray:
    """(example, row, column) of one image of each example."""
    grid, found = model.base.settings.visual.grid, []
    for start in range(0, len(examples), 16):
        part = examples[start : start + 16]
        pixels = stack_files([example.images[side] for example in part], model.base.settings.visual.image_px)
        inputs = model.base.eval().prepare(pixels, [example.text for example in part])
        flow = inter_modality_flow(model.base, inputs.forward, inputs.vision, inputs.tokens, rows=[0], starts=[0])
        rows = flow.rows_from_input[:, -1, 0][inputs.vision]
        found.append(rows.view(len(part), grid, grid).float().cpu())
    return torch.cat(found).numpy()


def _preview(image: ImageFile) -> np.ndarray:
    """Small enough for a page, its sides in proportion."""
    small = Image.fromarray(image.pixels())
    small.thumbnail((PREVIEW_PX, PREVIEW_PX))
    return np.array(small)
