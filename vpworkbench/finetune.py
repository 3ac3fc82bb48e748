"""Fine-tuning on a downstream task: its files, the start, training, the official score and simple baselines."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from vpworkbench.config import FinetuneSettings
from vpworkbench.data.records import Example
from vpworkbench.data.splits import load_examples
from vpworkbench.pretrain import build_model, load_run, with_words_of
from vpworkbench.runs import Run
from vpworkbench.tasks import Classification, TaskBatches, TaskModel, TaskResult, summary_of, task_labels
from vpworkbench.train import fit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedTask:
    """A run's examples and model, ready to train.

    Attributes
    ----------
    shared : frozenset of str
        Ids of test examples about an image that the release has in training or validation too.
    """

    splits: dict[str, list[Example]]
    model: TaskModel
    shared: frozenset[str] = frozenset()

    def test_summary(self, result: TaskResult, *, seed: int = 0) -> dict[str, float]:
        """The test score; where the release shares images between splits, the score without those examples too."""
        examples = self.splits["test"]
        if not examples:
            return {}
        summary = summary_of(result, examples, seed=seed)
        if not self.shared:
            return summary
        kept = [number for number, example in enumerate(examples) if example.id not in self.shared]
        rest = [examples[number] for number in kept]
        unshared = summary_of(result._replace(scores=result.scores[kept]), rest, seed=seed)
        return summary | {f"{key}_unshared": value for key, value in unshared.items()} | {"shared": len(self.shared)}


def prepare_task(settings: FinetuneSettings) -> PreparedTask:
    """Read the examples, load the start and put the head on; all that can be refused is refused here."""
    splits, shared = load_examples(settings)
    base, trained = load_run(settings.checkpoint)
    if not settings.pretrained:
        base, _ = build_model(trained.model_copy(update={"seed": settings.seed}), base.tokenizer)
    torch.manual_seed(settings.seed)
    texts = [example.text for example in splits["train"]]
    if not trained.init_text:  # a BERT's own vocabulary spells every word
        base = with_words_of(base, texts)
    base.words.check(texts, source=settings.data)
    labels = task_labels(settings.task, splits["train"], least=settings.answer_count)
    return PreparedTask(splits, TaskModel(base, settings.task, labels, pairing=settings.pairing), shared)


def finetune(run: Run, prepared: PreparedTask, settings: FinetuneSettings) -> int:
    """Train to the end, or go on from the run's last checkpoint; the optimiser steps of the whole run."""
    train = settings.train
    batches = TaskBatches(prepared.splits["train"], prepared.model, size=train.images, seed=settings.seed)
    return fit(prepared.model, Classification(), batches, run, optim=settings.optim, train=train, seed=settings.seed,
               workers=settings.workers, what=f"fine-tuning, {settings.task}")  # fmt: skip


def load_task(checkpoint: str | Path) -> TaskModel:
    """A fine-tuned model by the folder of its run or of its checkpoint, or the name of a run of `04_finetune`.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    from vpworkbench.runs import runs_root

    place = Path(checkpoint).expanduser()
    for folder in (place, place / "checkpoint", runs_root() / "04_finetune" / str(checkpoint) / "checkpoint"):
        if (folder / "task.json").exists():
            return TaskModel.from_pretrained(folder)
    return TaskModel.from_pretrained(place)
