"""Right and wrong answers of a fine-tuned model, each with where the model looked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import visual_input
from vpworkbench.data.records import Example, Picture
from vpworkbench.figures import Reviewed
from vpworkbench.probes import inter_modality_flow, modality_masks
from vpworkbench.probes.layouts import REGIONS_SIDE, painted
from vpworkbench.tasks.retrieval import RetrievalResult, owners_of
from vpworkbench.tasks.task import TaskModel, TaskResult, right_answer, texts_of

PREVIEW_PX = 160


def review(
    model: TaskModel,
    examples: Sequence[Example] | Sequence[Picture],
    result: TaskResult | RetrievalResult,
    *,
    count: int = 48,
) -> list[Reviewed]:
    """The first right and the first wrong examples, half of `count` each, or fewer where there are fewer.

    `result` has the model's scores of these examples. For retrieval, each caption comes with the image that was found
    first and, after it, its own.
    """
    if isinstance(result, RetrievalResult):
        examples, predicted, scores = _searches(examples, result)
    else:
        predicted, scores = result.predicted, result.scores
    scored = list(zip(examples, map(float, scores), strict=True))
    right = [(example, score) for example, score in scored if score >= 0.5]
    wrong = [(example, score) for example, score in scored if score < 0.5]
    chosen = [*right[: count // 2], *wrong[: count // 2]]
    sides = len(chosen[0][0].images) if chosen else 0
    attention = [_attention(model, [example for example, _ in chosen], side) for side in range(sides)]
    return [
        Reviewed(
            text=example.text,
            wanted=right_answer(example),
            predicted=predicted[example.id],
            score=score,
            images=tuple(_preview(image) for image in example.images),
            attention=tuple(maps[number] for maps in attention),
        )
        for number, (example, score) in enumerate(chosen)
    ]


def _searches(pictures: Sequence[Picture], result: RetrievalResult) -> tuple[list[Example], dict[str, str], np.ndarray]:
    """Each caption as an example about the image found first and its own; the ids found; 1 where they are the same."""
    owners, found = owners_of(pictures), result.scores.argmax(axis=0)
    examples, predicted = [], {}
    for number, (text, own, best) in enumerate(zip(texts_of(pictures), owners, found, strict=True)):
        picture, images = pictures[own], (pictures[best].image, pictures[own].image)
        example = Example(f"{picture.id} {number}", images, text, picture.split, label=picture.id)
        examples.append(example)
        predicted[example.id] = pictures[best].id
    return examples, predicted, owners == found


def _attention(model: TaskModel, examples: Sequence[Example], side: int) -> np.ndarray:
    """The map of one image of each example, (example, row, column); regions are drawn into their boxes."""
    visual, found = model.base.settings.visual, []
    tokens_per_side = visual.grid if visual.kind.on_grid else REGIONS_SIDE
    for start in range(0, len(examples), 16):
        part = examples[start : start + 16]
        pixels = visual_input(visual).stack([example.images[side] for example in part])
        inputs = model.base.eval().prepare(pixels, [example.text for example in part])
        flow = inter_modality_flow(model.base, inputs.forward, inputs.vision, inputs.tokens, rows=[0], starts=[0])
        masks = modality_masks(model.base, inputs.forward)
        boxes = masks.boxes.masked_fill(~(masks.vision & masks.tokens)[..., None], torch.nan)
        found.append(painted(flow.rows_from_input[:, -1, 0], boxes, tokens_per_side).float().cpu())
    return torch.cat(found).numpy()


def _preview(image: ImageFile) -> np.ndarray:
    """Small enough for a page, its sides in proportion."""
    small = Image.fromarray(image.pixels())
    small.thumbnail((PREVIEW_PX, PREVIEW_PX))
    return np.array(small)
