"""Classification: examples as tensors, and a task's labels, targets, loss, score and file of predictions."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import VisualInput
from vpworkbench.data.records import Example
from vpworkbench.data.steps import Sampler, TensorBatch
from vpworkbench.losses import Objective
from vpworkbench.metrics import accuracy
from vpworkbench.model.words import Words

WITHHELD = -100
"""Number of a label that is not published: PyTorch's cross entropy ignores it."""
WATCHED = 32  # training examples whose score is logged


@dataclass(frozen=True)
class TaskBatch(TensorBatch):
    """Examples as tensors."""

    images: Tensor  # uint8 (image, 3, height, width)
    image_index: Tensor  # int64 (example, side): the rows of `images` that each example is about
    words: Tensor  # int64 (example, word)
    word_tokens: Tensor  # bool (example, word)
    targets: Tensor  # (example,) or (example, label), see `Task.targets`

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments of `TaskModel`."""
        return self.images, self.image_index, self.words, self.word_tokens

    def micro_batches(self, count: int) -> list[TaskBatch]:
        """Split by examples; each part holds only the images of its examples."""
        parts = []
        for rows in torch.arange(len(self.words)).chunk(count):
            used, index = self.image_index[rows].unique(return_inverse=True)
            texts = self.words[rows], self.word_tokens[rows]
            parts.append(TaskBatch(self.images[used], index, *texts, self.targets[rows]))
        return parts


@dataclass
class TaskBatches:
    """Batches of examples by step; for `targets` see `Task.targets`."""

    sampler: Sampler
    words: Words
    inputs: VisualInput
    targets: Callable[[Sequence[Example]], Tensor]

    def __getitem__(self, step: int) -> TaskBatch:
        return self.batch(self.sampler[step])

    def batch(self, examples: Sequence[Example]) -> TaskBatch:
        """These examples as one batch."""
        images, image_index = each_image_once([example.images for example in examples], self.inputs)
        words, word_tokens = self.words.tensors([example.text for example in examples])
        return TaskBatch(images, image_index, words, word_tokens, self.targets(examples))


def each_image_once(groups: Sequence[Sequence[Any]], inputs: VisualInput) -> tuple[Tensor, Tensor]:
    """The different images of all groups, and the row of each group's images among them, int64 (group, side).

    Files are equal if their names are; any other image is equal only to itself.
    """
    keys = [[image if isinstance(image, ImageFile) else id(image) for image in group] for group in groups]
    pairs = zip(keys, groups, strict=True)
    images = {key: image for row, group in pairs for key, image in zip(row, group, strict=True)}
    rows = {key: row for row, key in enumerate(images)}
    return inputs.stack(list(images.values())), torch.tensor([[rows[key] for key in row] for row in keys])


class OneLoss(Objective):
    """A loss of what a model makes of `batch.inputs`, given `batch.targets`; summed over the batch."""

    weights = {"loss": 1.0}

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.loss = loss

    def counts(self, batch: Any) -> dict[str, int]:
        return {"loss": len(batch.targets)}

    def losses(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"loss": self.loss(model(*batch.inputs), batch.targets)}


class Classification(OneLoss):
    """A task's loss per example, and its score on the first examples of a step."""

    def watch(self, model: nn.Module, batch: TaskBatch) -> dict[str, float]:
        few = batch.micro_batches(max(1, len(batch.words) // WATCHED))[0]
        best = model(*few.inputs).argmax(dim=-1)
        right = few.targets.gather(1, best[:, None]) if few.targets.ndim == 2 else best == few.targets
        return {"training_score": right.float().mean().item()}


def fixed_labels(*labels: str) -> Callable[[Sequence[Example], Any], tuple[str, ...]]:
    """For `Task.labels`: these labels, whatever the examples are."""
    return lambda examples, settings: labels


def label_numbers(examples: Sequence[Example], labels: Sequence[str]) -> Tensor:
    """Place of each example's label among the labels, int64 (example,)."""
    numbers = {label: number for number, label in enumerate(labels)}
    return torch.tensor([numbers[example.label] if example.label else WITHHELD for example in examples])


def accuracies(examples: Sequence[Example], predicted: Mapping[str, str]) -> np.ndarray:
    """1 where the label is right, 0 elsewhere, nan where it is withheld; (example,)."""
    right = accuracy([predicted[example.id] for example in examples], [example.label or "" for example in examples])
    return np.where([example.label is None for example in examples], np.nan, right)


def csv_lines(predicted: Mapping[str, str]) -> str:
    """One line of id and label for each prediction."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(predicted.items())
    return text.getvalue()
