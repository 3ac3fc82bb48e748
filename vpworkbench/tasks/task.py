"""A downstream task as a value, the model that is trained on it, and its result (paper Sec. 4.2).

`TASKS` (in `vpworkbench.tasks`) lists all tasks; docs/new_task.md adds one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import Progress, visual_input
from vpworkbench.data.records import Example, Picture
from vpworkbench.data.scene_cache import cached_scenes
from vpworkbench.data.splits import with_validation, without_leaks
from vpworkbench.data.steps import Sampler
from vpworkbench.data.task_readers import ANY_TABLE, Splits, TaskFiles
from vpworkbench.errors import DataError
from vpworkbench.metrics import most_given
from vpworkbench.model.model import Joint, VisualParsingModel, save_tensors
from vpworkbench.settings import FinetuneSettings, OptimSettings, Settings, TrainSettings
from vpworkbench.settings.training import Pairing, Pool
from vpworkbench.stats import Interval, bootstrap_interval, flatten
from vpworkbench.tasks.classification import (
    Classification,
    TaskBatches,
    accuracies,
    csv_lines,
    each_image_once,
    label_numbers,
)

EVALUATED_AT_ONCE = 32
TABLES = TaskFiles("table", (ANY_TABLE,), truth=lambda label: {"label": label})
"""Custom tables, with any labels."""

TINY: Mapping[str, Settings] = {
    # A frozen visual side takes a third of the time, so 2.5 times the steps fit into it (docs/results.md, the recipe).
    "optim": OptimSettings(lr_visual=1e-5, lr_fusion=5e-4, warmup=50, decay_at="linear"),
    "train": TrainSettings(steps=2_500, images=32),
}
"""The schedule for generated scenes: minutes on two CPU cores."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that distinguishes one task from the others; the defaults classify: one label per example, accuracy."""

    name: str  # value of the setting `task`
    # Examples of training and validation -> labels, in the order of the logits.
    labels: Callable[[Sequence[Example], FinetuneSettings], tuple[str, ...]]
    # Folder or file -> examples of `train`, `val` and `test`; by default from custom tables.
    read: Callable[[str, FinetuneSettings], Splits] = lambda path, settings: TABLES.read(path, settings.images)
    images: int = 1  # per text
    head: Callable[[int, int], nn.Module] = nn.Linear  # width of the concatenated [CLS], number of labels -> module
    # Examples, labels -> int64 (example,), -100 where withheld; or scores in [0, 1], (example, label).
    targets: Callable[[Sequence[Example], Sequence[str]], Tensor] = label_numbers
    # Logits (example, label), targets -> sum over examples.
    loss: Callable[[Tensor, Tensor], Tensor] = partial(functional.cross_entropy, reduction="sum")
    probabilities: Callable[[Tensor], Tensor] = partial(torch.softmax, dim=-1)  # of logits, (example, label)
    metric: str = "accuracy"  # name of the official score
    # Examples, predictions by id -> official score of each example in [0, 1], nan where the answer is withheld.
    scores: Callable[[Sequence[Example], Mapping[str, str]], np.ndarray] = accuracies
    # Examples, predictions by id -> scores of the whole split, by name.
    more_scores: Callable[[Sequence[Example], Mapping[str, str]], dict[str, float]] = lambda examples, predicted: {}
    submission: Callable[[Mapping[str, str]], str] = csv_lines  # predictions by id -> text of the submission file
    suffix: str = "csv"  # of that file
    # Preset -> the parts of `FinetuneSettings` that it sets. An epoch counts examples.
    schedules: Mapping[str, Mapping[str, Settings]] = field(default_factory=lambda: {"tiny": TINY})
    own_settings: tuple[str, ...] = ()  # other tasks refuse these settings, because to ignore them would mislead

    def load(self, settings: FinetuneSettings) -> tuple[Splits | dict[str, list[Picture]], frozenset[str]]:
        """The examples of `settings.data` by split, and ids of test examples whose image is in another split too.

        Training leaves out examples whose image is in validation or test. Retrieval has captioned pictures.
        Without validation, a tenth of the training images validates; with `train_on_val` those of validation train.
        A `DataError` if training has no examples.
        """
        place = str(cached_scenes(settings.scenes)) if settings.data == "scenes" else settings.data
        splits = self.read(place, settings)
        if not splits["val"]:
            both = with_validation(splits["train"], settings.data)
            splits |= {split: [one for one in both if one.split == split] for split in ("train", "val")}
        for split in ("train", "val"):
            if not splits[split]:
                raise DataError(f"{settings.data}: no examples of {self.name} in {split}; it needs one at least")
        held_out = [*splits["val"], *splits["test"]]
        kept, marks = without_leaks(splits["train"], held_out, "training examples are about images of val or test")
        if not kept:
            raise DataError(f"{settings.data}: every image of train is in val or test too; split by image")
        elsewhere = {marks[image] for split in ("train", "val") for one in splits[split] for image in one.images}
        shared = {one.id for one in splits["test"] if any(marks[image] in elsewhere for image in one.images)}
        if settings.train_on_val:
            return splits | {"train": [*kept, *splits["val"]], "val": []}, frozenset(shared)
        return splits | {"train": kept}, frozenset(shared)

    def build_head(self, base: VisualParsingModel, labels: int) -> nn.Module:
        """A head for the fused [CLS] of a pre-trained model."""
        return self.head(self.images * base.settings.fusion.width, labels)

    def objective(self) -> Classification:
        """The loss, and the score on training examples that is logged."""
        return Classification(self.loss)

    def batches(self, examples: Sequence[Example], model: TaskModel, settings: FinetuneSettings) -> TaskBatches:
        """The training batches."""
        sampler = Sampler(examples, settings.train.images, seed=(settings.seed,))
        inputs, targets = visual_input(model.base.settings.visual), partial(self.targets, labels=model.labels)
        return TaskBatches(sampler, model.base.words, inputs, targets)

    def evaluate(
        self,
        model: TaskModel,
        examples: Sequence[Example],
        settings: FinetuneSettings,
        *,
        file: Path | None = None,
        progress: Progress | None = None,
    ) -> TaskResult:
        """Predict and score every example, in order; a task whose evaluation takes long keeps its state in `file`."""
        best: list[int] = []
        for logits in model.logits([one.images for one in examples], [one.text for one in examples]):
            best += logits.argmax(dim=-1).tolist()
            if progress:
                progress("evaluating", len(best), len(examples))
        predicted = {one.id: model.labels[label] for one, label in zip(examples, best, strict=True)}
        return TaskResult(self, self.scores(examples, predicted), predicted)


class TaskModel(nn.Module):
    """A pre-trained model and the head of one task; `labels` are in the order of the logits.

    The pre-training heads of `base` are unused, except that retrieval starts from the ITM head (paper Sec. 4.2). For
    two images per text `pairing` `pair` concatenates both [CLS]; `pair-attention` is UNITER's `PairAttention`, which
    reads all tokens. For `pool` see `Joint.pooled`; `dropout` of what the head reads acts in training.
    """

    def __init__(
        self,
        base: VisualParsingModel,
        task: Task,
        labels: Sequence[str],
        *,
        pairing: Pairing = "pair",
        pool: Pool = "cls",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base, self.task, self.labels, self.pairing, self.pool = base, task, tuple(labels), pairing, pool
        self.dropout = nn.Dropout(dropout)
        if pairing == "pair-attention":
            fusion = base.settings.fusion
            self.head: nn.Module = PairAttention(fusion.width, fusion.heads, len(labels), fusion.dropout)
        else:
            self.head = task.build_head(base, len(labels))

    def forward(self, images: Tensor, image_index: Tensor, words: Tensor, word_tokens: Tensor) -> Tensor:
        """Logits, float32 (example, label); every image is encoded once. The arguments are those of `TaskBatch`."""
        visual = self.base.encode(images)
        sides = image_index.unbind(dim=1)
        passes = [self.base.fuse(visual, words, word_tokens, image_index=side) for side in sides]
        if isinstance(self.head, PairAttention):
            left, right = (joint.hidden[-1] for joint in passes)
            tokens = (torch.cat([word_tokens, visual.not_padding()[side]], dim=1) for side in sides)
            return self.head(left, right, *tokens).float()
        return self.read(passes)

    def read(self, passes: Sequence[Joint]) -> Tensor:
        """Logits, float32 (example, label), from the pass with each image."""
        pooled = torch.cat([joint.pooled(self.pool) for joint in passes], dim=-1)
        return self.head(self.dropout(pooled)).float()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `VisualParsingModel` writes, the head among the weights, and `task.json` with the labels."""
        folder = Path(folder)
        self.base.save_pretrained(folder)
        save_tensors(self.state_dict(), folder / "model.safetensors")
        content = {"task": self.task.name, "label2ans": list(self.labels), "pairing": self.pairing, "pool": self.pool}
        (folder / "task.json").write_text(json.dumps(content, indent=2) + "\n")

    def predict(self, images: Any, text: str) -> dict[str, float]:
        """Probability of each label for one text, most likely first.

        `images` is an image file, path, PIL image or uint8 array (height, width, 3), for NLVR2 a pair of them.
        A `DataError` for an image that is missing or cannot be read, a wrong number of images, or an empty text.
        """
        return self.predict_all([images], [text])[0]

    def predict_all(self, images: Sequence[Any], texts: Sequence[str]) -> list[dict[str, float]]:
        """`predict` for each text i and `images[i]`, in batches that encode each image once."""
        groups = [list(group) if isinstance(group, list | tuple) else [group] for group in images]
        for group, text in zip(groups, texts, strict=True):
            if len(group) != self.task.images:
                wanted = f"{self.task.name} takes {self.task.images} images a text"
                raise DataError(f"{text!r:.80}: {wanted}, not {len(group)}")
            if not text.strip():
                raise DataError(f"an empty text for image {group[0]!s:.80}; give a question, statement or hypothesis")
            paths = (Path(one).expanduser() if isinstance(one, str | Path) else one for one in group)
            group[:] = [ImageFile(one.parent, one.name) if isinstance(one, Path) else one for one in paths]
        predictions = []
        for logits in self.logits(groups, texts):
            for row in self.task.probabilities(logits).tolist():
                pairs = zip(self.labels, row, strict=True)
                predictions.append(dict(sorted(pairs, key=lambda pair: -pair[1])))
        return predictions

    @torch.no_grad()
    def logits(self, images: Sequence[Sequence[Any]], texts: Sequence[str]) -> Iterator[Tensor]:
        """(text, label) for each text i and its `images[i]`, in batches, in evaluation mode."""
        inputs = visual_input(self.base.settings.visual)
        for start in range(0, len(texts), EVALUATED_AT_ONCE):
            some = slice(start, start + EVALUATED_AT_ONCE)
            tensors = (*each_image_once(images[some], inputs), *self.base.words.tensors(texts[some]))
            yield self.eval()(*(tensor.to(self.base.device) for tensor in tensors))


class PairAttention(nn.Module):
    """UNITER's head for two images: each pass attends to the other, then is pooled by learned weights."""

    def __init__(self, width: int, heads: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.across = nn.ModuleList(nn.MultiheadAttention(width, heads, dropout, batch_first=True) for _ in range(2))
        self.join = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Dropout(dropout))
        self.weigh = nn.Linear(width, 1)
        self.out = nn.Linear(2 * width, labels)

    def forward(self, left: Tensor, right: Tensor, left_tokens: Tensor, right_tokens: Tensor) -> Tensor:
        """Logits, (example, label), of the fused tokens of both passes, (example, token, d); `*_tokens` are real."""
        passes = (left, right, left_tokens, right_tokens), (right, left, right_tokens, left_tokens)
        pooled = []
        for attend, (own, other, own_tokens, other_tokens) in zip(self.across, passes, strict=True):
            attended, _ = attend(own, other, other, key_padding_mask=~other_tokens, need_weights=False)
            joined = self.join(torch.cat([attended, own], dim=-1))
            weights = self.weigh(joined).masked_fill(~own_tokens[..., None], -torch.inf).softmax(dim=1)
            pooled.append((weights * joined).sum(dim=1))
        return self.out(torch.cat(pooled, dim=-1))


class TaskResult(NamedTuple):
    """Predictions for a split, scored."""

    task: Task
    scores: np.ndarray  # official score of each example in [0, 1]; nan where the release withholds the answer
    predicted: dict[str, str]  # id of each example -> label or answer

    def intervals(self, *, seed: int = 0) -> dict[str, Interval]:
        """Mean score with its bootstrap 95% interval, by the name of the task's metric."""
        return {self.task.metric: bootstrap_interval(self.scores, seed)}

    def summary(self, examples: Sequence[Example], *, seed: int = 0) -> dict[str, float]:
        """The official scores with intervals; empty where there are no examples or all answers are withheld."""
        if np.isnan(self.scores).all():
            return {}
        return flatten(self.intervals(seed=seed)) | self.task.more_scores(examples, self.predicted)

    def save(self, path: str | Path) -> None:
        """Write the predictions in the task's submission format."""
        Path(path).write_text(self.task.submission(self.predicted), encoding="utf-8")


def right_answer(record: Example | Picture) -> str:
    """The label of an example, else the answer that most people gave; the captions of a picture; empty if withheld."""
    if isinstance(record, Picture):
        return " | ".join(record.captions)
    return record.label or most_given(record.answers)


def texts_of(records: Sequence[Example | Picture]) -> list[str]:
    """The text of each example, or all captions of each picture, in order."""
    texts = (one.captions if isinstance(one, Picture) else (one.text,) for one in records)
    return [text for some in texts for text in some]
