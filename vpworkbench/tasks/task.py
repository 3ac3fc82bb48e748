"""Downstream tasks: a head on the fused [CLS], its loss, its official score (paper Sec. 4.2).

VQA, NLVR2 (`pair`: two passes, both [CLS] concatenated; `pair-attention`: UNITER's), SNLI-VE, NLVR v1 as single-image
true / false, and the decision that retrieval ranks by, match or not: `retrieval` has its batches, loss and metric.
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import visual_input
from vpworkbench.data.records import Example
from vpworkbench.data.steps import ImageBatch, Sampler
from vpworkbench.data.task_readers import answer_vocabulary, read_answer_list
from vpworkbench.errors import CheckpointError, DataError
from vpworkbench.losses import Objective
from vpworkbench.metrics import NLVR2_IDENTIFIER, accuracy, answer_targets, consistency, vqa_score
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.model.words import Words
from vpworkbench.stats import Interval, bootstrap_interval, flatten

log = logging.getLogger(__name__)

TaskName = Literal["vqa", "nlvr2", "nlvr1", "snli-ve", "retrieval"]
TASKS: tuple[TaskName, ...] = ("vqa", "nlvr2", "nlvr1", "snli-ve", "retrieval")
LABELS = {
    "nlvr2": ("False", "True"),
    "nlvr1": ("False", "True"),
    "snli-ve": ("entailment", "neutral", "contradiction"),
    "retrieval": ("unmatched", "matched"),
}
METRICS = {"vqa": "vqa_score", "nlvr2": "accuracy", "nlvr1": "accuracy", "snli-ve": "accuracy",
           "retrieval": "mean_recall"}  # fmt: skip
EVALUATED_AT_ONCE = 32


def task_labels(
    task: TaskName, examples: Sequence[Example], *, least: int = 9, listed: str | Path = ""
) -> tuple[str, ...]:
    """What the head tells apart; of VQA the answers that stand for `least` of these questions (`answer_vocabulary`).

    Parameters
    ----------
    examples
        Of training and validation, as VQA's published vocabulary is counted.
    listed
        Of VQA a file of the answers in their place (`read_answer_list`).

    Raises
    ------
    DataError
        If no answer is that frequent, or the list cannot be read.
    """
    if task != "vqa":
        return LABELS[task]
    if listed:
        return read_answer_list(listed)
    answers = answer_vocabulary(examples, least)
    if not answers:
        raise DataError(f"no answer stands for {least} of {len(examples)} questions; lower `answer_count`")
    return answers


class PairAttention(nn.Module):
    """UNITER's head for two images: each pass attends to the other, and a weighted mean of its tokens stands for it.

    Parameters
    ----------
    width, heads : int
        As in the fusion.
    labels : int
    """

    def __init__(self, width: int, heads: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.across = nn.ModuleList(nn.MultiheadAttention(width, heads, dropout, batch_first=True) for _ in range(2))
        self.join = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Dropout(dropout))
        self.weigh = nn.Linear(width, 1)
        self.out = nn.Linear(2 * width, labels)

    def forward(self, left: Tensor, right: Tensor, tokens: Tensor, right_tokens: Tensor | None = None) -> Tensor:
        """Logits, (example, label).

        Parameters
        ----------
        left, right : Tensor, (example, token, d)
            The fused sequences of the two passes.
        tokens : bool Tensor, (example, token)
            Real positions of the left pass, and of the right one unless `right_tokens` says them.
        """
        real = tokens, tokens if right_tokens is None else right_tokens
        pooled = []
        for attend, own, other, here, there in zip(
            self.across, (left, right), (right, left), real, real[::-1], strict=True
        ):
            seen, _ = attend(own, other, other, key_padding_mask=~there, need_weights=False)
            joined = self.join(torch.cat([seen, own], dim=-1))
            shares = self.weigh(joined).masked_fill(~here[..., None], -torch.inf).softmax(dim=1)
            pooled.append((shares * joined).sum(dim=1))
        return self.out(torch.cat(pooled, dim=-1))


class TaskModel(nn.Module):
    """A pre-trained model and the head of one task.

    Parameters
    ----------
    base
        Its heads of pre-training go unused, but for retrieval, which starts from the ITM head (paper Sec. 4.2).
    labels : tuple of str
        In the order of the logits.
    pairing
        NLVR2: `pair` puts both [CLS] side by side, `pair-attention` is UNITER's `PairAttention`.
    """

    def __init__(
        self,
        base: VisualParsingModel,
        task: TaskName,
        labels: Sequence[str],
        *,
        pairing: Literal["pair", "pair-attention"] = "pair",
    ) -> None:
        super().__init__()
        self.base, self.task, self.labels, self.pairing = base, task, tuple(labels), pairing
        fusion = base.settings.fusion
        width = fusion.width
        self.head: nn.Module
        if task == "vqa":
            self.head = nn.Sequential(
                nn.Linear(width, 2 * width), nn.GELU(), nn.LayerNorm(2 * width), nn.Linear(2 * width, len(labels))
            )
        elif task == "nlvr2" and pairing == "pair-attention":
            self.head = PairAttention(width, fusion.heads, len(labels), fusion.dropout)
        else:
            self.head = nn.Linear(self.sides * width, len(labels))
        if task == "retrieval":
            self.head.load_state_dict(base.itm.state_dict())

    @property
    def words(self) -> Words:
        return self.base.words

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def sides(self) -> int:
        """How many images a text is about."""
        return 2 if self.task == "nlvr2" else 1

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
        sides = [self.base.fuse(visual, words, word_tokens, image_index=side) for side in image_index.unbind(dim=1)]
        if isinstance(self.head, PairAttention):
            left, right = (joint.last_hidden_state for joint in sides)
            real = (torch.cat([word_tokens, visual.not_padding()[side]], dim=1) for side in image_index.unbind(dim=1))
            return self.head(left, right, *real)
        return self.head(torch.cat([joint.cls for joint in sides], dim=-1))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `VisualParsingModel` does, the head among the weights, and `task.json` with `label2ans`."""
        folder = Path(folder)
        self.base.save_pretrained(folder)
        save_file({name: value.contiguous().cpu() for name, value in self.state_dict().items()},
                  folder / "model.safetensors")  # fmt: skip
        content = {"task": self.task, "label2ans": list(self.labels), "pairing": self.pairing}
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
            base = VisualParsingModel.from_config(folder)
            model = cls(base, content["task"], content["label2ans"], pairing=content["pairing"])
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder}: no whole fine-tuned model ({error}); give a checkpoint of 04_finetune"
            ) from None
        return model.to(device).eval()

    def predict(self, images: Any, text: str) -> dict[str, float]:
        """Probability of each label for one text, likeliest first.

        Parameters
        ----------
        images : image file, path, PIL image or uint8 array (height, width, 3); for NLVR2 a pair of them

        Raises
        ------
        DataError
            For an image that is missing or cannot be read, a wrong number of images, an empty text.
        """
        return self.predict_all([images], [text])[0]

    @torch.no_grad()
    def predict_all(self, images: Sequence[Any], texts: Sequence[str]) -> list[dict[str, float]]:
        """As `predict`, of text i and `images[i]`; in batches, of which each encodes an image once."""
        groups = [
            [_as_file(one) for one in (given if isinstance(given, list | tuple) else [given])] for given in images
        ]
        for group, text in zip(groups, texts, strict=True):
            if len(group) != self.sides:
                raise DataError(f"{text!r:.80}: {self.task} takes {self.sides} images a text, not {len(group)}")
            if not text.strip():
                raise DataError(f"an empty text for image {group[0]!s:.80}; give a question, statement or hypothesis")
        found: list[dict[str, float]] = []
        for start in range(0, len(texts), EVALUATED_AT_ONCE):
            part = groups[start : start + EVALUATED_AT_ONCE]
            # Files are equal by their names, other images only to themselves.
            keys = [[one if isinstance(one, ImageFile) else id(one) for one in group] for group in part]
            once = {
                key: one for row, group in zip(keys, part, strict=True) for key, one in zip(row, group, strict=True)
            }
            places = {key: place for place, key in enumerate(once)}
            pixels = visual_input(self.base.settings.visual).stack(list(once.values()))
            index = torch.tensor([[places[key] for key in row] for row in keys])
            inputs = (pixels, index, *self.words.tensors(texts[start : start + EVALUATED_AT_ONCE]))
            logits = self.eval()(*(tensor.to(self.device) for tensor in inputs))
            shares = logits.sigmoid() if self.task == "vqa" else logits.softmax(dim=-1)
            found += [
                dict(sorted(zip(self.labels, row, strict=True), key=lambda pair: -pair[1])) for row in shares.tolist()
            ]
        return found


def _as_file(image: Any) -> Any:
    if isinstance(image, str | Path):
        path = Path(image).expanduser()
        return ImageFile(path.parent, path.name)
    return image


@dataclass(frozen=True)
class TaskBatch(ImageBatch):
    """Examples as tensors; `targets` (example, label) of VQA scores in [0, 1], else (example,) of labels."""

    words: Tensor
    word_tokens: Tensor
    targets: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `TaskModel` takes."""
        return self.images, self.image_index, self.words, self.word_tokens

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
        self.sampler = Sampler(examples, size, seed=(seed,))
        self.words, self.inputs = model.words, visual_input(model.base.settings.visual)
        self.task, self.labels = model.task, model.labels
        self._numbers = {label: number for number, label in enumerate(self.labels)}

    def __getitem__(self, step: int) -> TaskBatch:
        return self.batch(self.sampler[step])

    def batch(self, examples: Sequence[Example]) -> TaskBatch:
        """These examples."""
        files = list(dict.fromkeys(image for example in examples for image in example.images))
        rows = {image: row for row, image in enumerate(files)}
        words, word_tokens = self.words.tensors([example.text for example in examples])
        return TaskBatch(
            images=self.inputs.stack(files),
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


class Classification(Objective):
    """Cross entropy of the label; of VQA binary cross entropy, summed over the answers."""

    weights = {"loss": 1.0}

    def counts(self, batch: TaskBatch) -> dict[str, int]:
        return {"loss": len(batch.words)}

    def losses(self, model: TaskModel, batch: TaskBatch) -> dict[str, Tensor]:
        logits = model(*batch.inputs).float()
        if model.task == "vqa":
            loss = functional.binary_cross_entropy_with_logits(logits, batch.targets.to(logits), reduction="sum")
        else:
            loss = functional.cross_entropy(logits, batch.targets, reduction="sum")
        return {"loss": loss}

    @torch.no_grad()
    def watch(self, model: TaskModel, batch: TaskBatch) -> dict[str, float]:
        """Score of the first examples of the step, for the learning curve."""
        training = model.training
        few = batch.micro_batches(max(1, len(batch.words) // EVALUATED_AT_ONCE))[0]
        best = model.eval()(*few.inputs).argmax(dim=-1)
        model.train(training)
        right = few.targets.gather(1, best[:, None]) if model.task == "vqa" else best == few.targets
        return {"training_score": right.float().mean().item()}


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

    def summary(self, examples: Sequence[Example], *, seed: int = 0) -> dict[str, float]:
        """The task's score with its interval; nothing where the release withholds all answers.

        Of NLVR2 the consistency too, over the identifiers that tell which examples share a statement.
        """
        if np.isnan(self.scores).all():  # as of no examples
            return {}
        summary = flatten({METRICS[self.task]: self.interval(seed=seed)})
        if self.task == "nlvr2":
            labels = {
                example.id: example.label
                for example in examples
                if example.label and re.search(NLVR2_IDENTIFIER, example.id)
            }
            if labels:  # one's own table has ids of another form
                summary["consistency"] = consistency(self.predicted, labels)
        return summary

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
        best = model(*batch.inputs).argmax(dim=-1)
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
