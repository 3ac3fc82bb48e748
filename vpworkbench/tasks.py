"""Downstream tasks: a head on the fused [CLS], its loss, its official score (paper Sec. 4.2).

VQA, NLVR2 (`pair`: two passes, both [CLS] concatenated), SNLI-VE, NLVR v1 as single-image true / false, and the
decision that retrieval ranks by, match or not; how that is trained and scored stands in `retrieval`.
"""

from __future__ import annotations

import csv
import json
import logging
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from vpworkbench.data.batches import Words, stack_files
from vpworkbench.data.records import DataError, Example, ImageFile
from vpworkbench.metrics import accuracy, answer_targets, consistency, vqa_score
from vpworkbench.model import CheckpointError, VisualParsingModel
from vpworkbench.probes.intervals import Interval, bootstrap_interval

log = logging.getLogger(__name__)

TaskName = Literal["vqa", "nlvr2", "nlvr1", "snli-ve", "retrieval"]
TASKS: tuple[TaskName, ...] = ("vqa", "nlvr2", "nlvr1", "snli-ve", "retrieval")
LABELS = {
    "nlvr2": ("False", "True"),
    "nlvr1": ("False", "True"),
    "snli-ve": ("entailment", "neutral", "contradiction"),
    "retrieval": ("unmatched", "matched"),
}
EVALUATED_AT_ONCE = 32


def task_labels(task: TaskName, training: Sequence[Example], *, least: int = 9) -> tuple[str, ...]:
    """What the head tells apart; of VQA the normalised answers seen at least `least` times in training.

    Raises
    ------
    DataError
        If no answer is seen as often.
    """
    if task != "vqa":
        return LABELS[task]
    counts = Counter(answer for example in training for answer in answer_targets(example.answers))
    answers = tuple(sorted(answer for answer, count in counts.items() if count >= least))
    if not answers:
        raise DataError(f"no answer is seen {least} times in {len(training)} training questions; lower `answer_count`")
    return answers


class TaskModel(nn.Module):
    """A pre-trained model and the head of one task.

    Parameters
    ----------
    base
        Its heads of pre-training go unused, but for retrieval: that starts from the ITM head (paper Sec. 4.2).
    labels : tuple of str
        In the order of the logits.
    """

    def __init__(self, base: VisualParsingModel, task: TaskName, labels: Sequence[str]) -> None:
        super().__init__()
        self.base, self.task, self.labels = base, task, tuple(labels)
        width, sides = base.settings.fusion.width, 2 if task == "nlvr2" else 1
        if task == "vqa":
            self.head = nn.Sequential(
                nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width), nn.Linear(2 * width, len(labels))
            )
        else:
            self.head = nn.Linear(sides * width, len(labels))
        if task == "retrieval":
            self.head.load_state_dict(base.itm.state_dict())

    @property
    def words(self) -> Words:
        return self.base.words

    @property
    def device(self) -> torch.device:
        return self.base.device

    def forward(self, images: Tensor, image_index: Tensor, words: Tensor, word_tokens: Tensor) -> Tensor:
        """Logits, (example, label); every image is encoded once.

        Parameters
        ----------
        images : uint8 Tensor, (image, 3, height, width)
        image_index : int64 Tensor, (example, side)
            Rows of `images` that each example is about.
        words : int64 Tensor, (example, word)
        word_tokens : bool Tensor, (example, word)
        """
        visual = self.base.visual(images)
        sides = [self.base.fuse(visual, words, word_tokens, image_index=side).cls for side in image_index.unbind(dim=1)]
        return self.head(torch.cat(sides, dim=-1))

    def lacking(self) -> frozenset[str]:
        """Marks that the vocabulary lacks: captions, of which it was built, ask no questions."""
        vocabulary = self.base.tokenizer.get_vocab()
        return frozenset(mark for mark in string.punctuation if mark not in vocabulary)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the base as `VisualParsingModel` does, the head beside it, and `task.json` with `label2ans`."""
        folder = Path(folder)
        self.base.save_pretrained(folder)
        save_file({name: value.contiguous().cpu() for name, value in self.head.state_dict().items()},
                  folder / "head.safetensors")  # fmt: skip
        content = {"task": self.task, "label2ans": list(self.labels)}
        (folder / "task.json").write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> TaskModel:
        """Load a folder that `save_pretrained` wrote, offline, in evaluation mode.

        Raises
        ------
        CheckpointError
            If it holds no fine-tuned model, or one that is not whole.
        """
        folder = Path(folder)
        try:
            content = json.loads((folder / "task.json").read_text())
            model = cls(VisualParsingModel.from_pretrained(folder), content["task"], content["label2ans"])
            model.head.load_state_dict(load_file(folder / "head.safetensors"))
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder}: no whole fine-tuned model ({error}); give a checkpoint of 04_finetune"
            ) from None
        return model.to(device).eval()

    @torch.no_grad()
    def predict(self, images: Any, text: str) -> dict[str, float]:
        """Probability of each label for one text, likeliest first.

        Parameters
        ----------
        images : image file, path, PIL image or uint8 array (height, width, 3); for NLVR2 a pair of them
        """
        given = list(images) if isinstance(images, list | tuple) else [images]
        sides = 2 if self.task == "nlvr2" else 1
        if len(given) != sides:
            raise ValueError(f"{self.task} takes {sides} images, not {len(given)}")
        pixels = stack_files([_as_file(image) for image in given], self.base.settings.visual.image_px)
        words, word_tokens = self.words.tensors([without(text, self.lacking())])
        index = torch.arange(sides)[None]
        logits = self.eval()(*(part.to(self.device) for part in (pixels, index, words, word_tokens)))[0]
        shares = (logits.sigmoid() if self.task == "vqa" else logits.softmax(dim=-1)).tolist()
        return dict(sorted(zip(self.labels, shares, strict=True), key=lambda pair: -pair[1]))


def without(text: str, marks: frozenset[str]) -> str:
    """The text with these marks left out."""
    return "".join(letter for letter in text if letter not in marks)


def _as_file(image: Any) -> Any:
    if isinstance(image, str | Path):
        path = Path(image).expanduser()
        return ImageFile(path.parent, path.name)
    return image


@dataclass(frozen=True)
class TaskBatch:
    """Examples as tensors; `targets` (example, label) of VQA scores in [0, 1], else (example,) of labels."""

    images: Tensor
    image_index: Tensor
    words: Tensor
    word_tokens: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> TaskBatch:
        """The same batch on a device."""
        return TaskBatch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def micro_batches(self, count: int) -> list[TaskBatch]:
        """Split by examples; images that no example of a part shows are left out of it."""
        parts = []
        for rows in torch.arange(len(self.words)).chunk(count):
            used, index = self.image_index[rows].unique(return_inverse=True)
            parts.append(
                TaskBatch(self.images[used], index, self.words[rows], self.word_tokens[rows], self.targets[rows])
            )
        return parts


class TaskBatches(Dataset):
    """Batches of examples by step, in the order of one permutation for each epoch; a pure function of seed and step."""

    def __init__(self, examples: Sequence[Example], model: TaskModel, *, size: int, seed: int) -> None:
        self.examples, self.size, self.seed = examples, size, seed
        self.words, self.image_px = model.words, model.base.settings.visual.image_px
        self.task, self.labels = model.task, model.labels
        self.steps_per_epoch = len(examples) / size
        self._lacking = model.lacking()
        self._numbers = {label: number for number, label in enumerate(self.labels)}

    def __getitem__(self, step: int) -> TaskBatch:
        epoch, start = divmod(step * self.size, len(self.examples))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.examples))
        chosen = order.take(range(start, start + self.size), mode="wrap")
        return self.batch([self.examples[number] for number in chosen])

    def batch(self, examples: Sequence[Example]) -> TaskBatch:
        """These examples."""
        files = list(dict.fromkeys(image for example in examples for image in example.images))
        rows = {image: row for row, image in enumerate(files)}
        words, word_tokens = self.words.tensors([without(example.text, self._lacking) for example in examples])
        return TaskBatch(
            images=stack_files(files, self.image_px),
            image_index=torch.tensor([[rows[image] for image in example.images] for example in examples]),
            words=words,
            word_tokens=word_tokens,
            targets=self._targets(examples),
        )

    def _targets(self, examples: Sequence[Example]) -> Tensor:
        if self.task != "vqa":
            return torch.tensor([self._numbers[example.label] if example.label else -100 for example in examples])
        targets = torch.zeros(len(examples), len(self.labels))
        for row, example in zip(targets, examples, strict=True):
            for answer, score in answer_targets(example.answers).items() if example.answers else ():
                if answer in self._numbers:
                    row[self._numbers[answer]] = score
        return targets


class Classification:
    """Cross entropy of the label; of VQA binary cross entropy, summed over the answers."""

    weights = {"loss": 1.0}

    def counts(self, batch: TaskBatch) -> dict[str, int]:
        return {"loss": len(batch.words)}

    def losses(self, model: TaskModel, batch: TaskBatch) -> dict[str, Tensor]:
        logits = model(batch.images, batch.image_index, batch.words, batch.word_tokens).float()
        if model.task == "vqa":
            loss = functional.binary_cross_entropy_with_logits(logits, batch.targets.to(logits), reduction="sum")
        else:
            loss = functional.cross_entropy(logits, batch.targets, reduction="sum")
        return {"loss": loss}

    def watch(self, model: TaskModel, batch: TaskBatch) -> dict[str, float]:
        return {}


class TaskResult(NamedTuple):
    """What a model reaches on a split.

    Attributes
    ----------
    scores : array, (example,)
        Official score of each example, in [0, 1]; nan where the release withholds the answer.
    predicted : dict
        Id of each example -> label or answer.
    """

    task: TaskName
    scores: np.ndarray
    predicted: dict[str, str]

    def interval(self, *, seed: int = 0) -> Interval:
        """Mean score with its bootstrap 95% interval."""
        return bootstrap_interval(self.scores, seed)

    def save(self, path: str | Path) -> None:
        """Write the predictions in the task's submission format: VQA's result json, else csv of id and label."""
        path = Path(path)
        if self.task == "vqa":
            rows = [{"question_id": _number(key), "answer": answer} for key, answer in self.predicted.items()]
            path.write_text(json.dumps(rows) + "\n")
            return
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(self.predicted.items())


def _number(identifier: str) -> int | str:
    return int(identifier) if identifier.isdigit() else identifier


@torch.no_grad()
def evaluate_task(
    model: TaskModel, examples: Sequence[Example], *, progress: Callable[[str, int, int], None] | None = None
) -> TaskResult:
    """Predict and score every example, in their order."""
    model.eval()
    batches = TaskBatches(examples, model, size=EVALUATED_AT_ONCE, seed=0)
    predicted: dict[str, str] = {}
    for start in range(0, len(examples), EVALUATED_AT_ONCE):
        part = examples[start : start + EVALUATED_AT_ONCE]
        batch = batches.batch(part).to(model.device)
        best = model(batch.images, batch.image_index, batch.words, batch.word_tokens).argmax(dim=-1)
        predicted |= {example.id: model.labels[label] for example, label in zip(part, best.tolist(), strict=True)}
        if progress:
            progress("evaluating", min(start + EVALUATED_AT_ONCE, len(examples)), len(examples))
    return TaskResult(model.task, score(model.task, examples, predicted), predicted)


def score(task: TaskName, examples: Sequence[Example], predicted: dict[str, str]) -> np.ndarray:
    """Official score of each example, (example,); nan where the release withholds the answer."""
    if task == "vqa":
        return np.array([
            vqa_score(predicted[example.id], example.answers) if example.answers else np.nan for example in examples
        ])  # fmt: skip
    right = accuracy([predicted[example.id] for example in examples], [example.label or "" for example in examples])
    return np.where([example.label is None for example in examples], np.nan, right)


def summary_of(result: TaskResult, examples: Sequence[Example], *, seed: int = 0) -> dict[str, float]:
    """The task's score with its interval; of NLVR2 the consistency too."""
    mean, low, high, _ = (float(part) for part in result.interval(seed=seed))
    name = "vqa_score" if result.task == "vqa" else "accuracy"
    summary = {name: mean, f"{name}_low": low, f"{name}_high": high}
    if result.task == "nlvr2":
        labels = {example.id: example.label for example in examples if example.label}
        summary["consistency"] = consistency(result.predicted, labels)
    return summary
