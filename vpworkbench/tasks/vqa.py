"""Visual question answering, VQA v2 (paper Table 1)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vpworkbench.data.questions import answer_vocabulary, read_answer_list
from vpworkbench.data.records import Example
from vpworkbench.data.regions import IMAGE_SUFFIX
from vpworkbench.data.task_readers import read_vqa
from vpworkbench.errors import DataError
from vpworkbench.metrics import answer_targets, vqa_score
from vpworkbench.settings import FinetuneSettings, OptimSettings, TrainSettings
from vpworkbench.tasks.task import TINY, Task


def frequent_answers(examples: Sequence[Example], settings: FinetuneSettings) -> tuple[str, ...]:
    """The answers of `answer_list`, else those that occur in `answer_count` of these questions or more."""
    if settings.answer_list:
        return read_answer_list(settings.answer_list)
    answers = answer_vocabulary(examples, settings.answer_count)
    if not answers:
        least, total = settings.answer_count, len(examples)
        raise DataError(f"no answer occurs in {least} of {total} questions; lower `answer_count`")
    return answers


def answer_head(width: int, labels: int) -> nn.Module:
    """A perceptron with one hidden layer."""
    hidden = 2 * width
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Linear(hidden, labels))


def answer_scores(examples: Sequence[Example], labels: Sequence[str]) -> Tensor:
    """Official score of every answer, (example, label)."""
    numbers = {label: number for number, label in enumerate(labels)}
    targets = torch.zeros(len(examples), len(labels))
    for row, example in zip(targets, examples, strict=True):
        for answer, score in answer_targets(example.answers).items() if example.answers else ():
            if answer in numbers:
                row[numbers[answer]] = score
    return targets


def official_scores(examples: Sequence[Example], predicted: Mapping[str, str]) -> np.ndarray:
    """The official VQA score of each question, nan where its answers are withheld."""
    return np.array([vqa_score(predicted[one.id], one.answers) if one.answers else np.nan for one in examples])


def result_json(predicted: Mapping[str, str]) -> str:
    """The result file of the evaluation server; questions of VizWiz have the name of their image for an id."""
    numbers = {key: int(key) if re.fullmatch(r"0|[1-9]\d*", key) else key for key in predicted}
    names = {key: "image" if IMAGE_SUFFIX.search(key) else "question_id" for key in predicted}
    return json.dumps([{names[key]: numbers[key], "answer": answer} for key, answer in predicted.items()]) + "\n"


VQA = Task(
    name="vqa",
    read=lambda path, settings: read_vqa(path, images=settings.images),
    labels=frequent_answers,
    head=answer_head,
    targets=answer_scores,
    loss=partial(functional.binary_cross_entropy_with_logits, reduction="sum"),
    probabilities=torch.sigmoid,
    metric="vqa_score",
    scores=official_scores,
    submission=result_json,
    suffix="json",
    schedules={
        "tiny": TINY,
        "paper": {
            "optim": OptimSettings(decay_at=(65 / 100, 75 / 100)),
            "train": TrainSettings(epochs=100, images=512, accumulate=64),
        },
    },
    own_settings=("answer_list", "answer_prior", "pool", "head_dropout", "train_on_val"),
)
