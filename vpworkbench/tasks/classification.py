"""The parts of a task that gives each example one of a few labels: targets, loss, score, file of predictions."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vpworkbench.data.records import Example
from vpworkbench.metrics import accuracy

WITHHELD = -100
"""Number of a label that is not published: PyTorch's cross entropy ignores it."""


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
