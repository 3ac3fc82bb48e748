"""Fine-tuning on a downstream task: its files, the start, training, the official score and simple baselines."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vpworkbench.config import FinetuneSettings
from vpworkbench.data.batches import stack_files
from vpworkbench.data.records import DataError, Example, ImageFile
from vpworkbench.data.splits import load_examples
from vpworkbench.metrics import normalised_answer
from vpworkbench.model import VisualParsingModel
from vpworkbench.pretrain import build_model, load_run
from vpworkbench.runs import Run
from vpworkbench.tasks import (
    Classification,
    TaskBatches,
    TaskModel,
    TaskResult,
    evaluate_task,
    score,
    task_labels,
    without,
)
from vpworkbench.train import fit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedTask:
    """A run's examples and model, ready to train."""

    splits: dict[str, list[Example]]
    model: TaskModel


def prepare_task(settings: FinetuneSettings) -> PreparedTask:
    """Read the examples, load the start and put the head on; all that can be refused is refused here."""
    splits = load_examples(settings)
    base, trained = load_run(settings.checkpoint)
    if not settings.pretrained:
        base, _ = build_model(trained.model_copy(update={"seed": settings.seed}), base.tokenizer)
    torch.manual_seed(settings.seed)
    labels = task_labels(settings.task, splits["train"], least=settings.answer_count)
    model = TaskModel(base, settings.task, labels)
    lacking = model.lacking()
    try:
        model.words.check([without(example.text, lacking) for example in splits["train"]], source=settings.data)
    except DataError as error:  # the vocabulary came with the checkpoint: say so, and go on
        log.warning("%s", str(error).split(";")[0])
    return PreparedTask(splits, model)


def finetune(run: Run, prepared: PreparedTask, settings: FinetuneSettings) -> int:
    """Train to the end, or go on from the run's last checkpoint; the optimiser steps of the whole run."""
    train = settings.train
    batches = TaskBatches(prepared.splits["train"], prepared.model, size=train.images, seed=settings.seed)
    return fit(prepared.model, Classification(), batches, run, optim=settings.optim, train=train, seed=settings.seed,
               workers=settings.workers, what=f"fine-tuning, {settings.task}")  # fmt: skip


def baselines(
    prepared: PreparedTask,
    settings: FinetuneSettings,
    split: str,
    *,
    most: int = 4_000,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, TaskResult]:
    """The most frequent label, and logistic regressions on the text alone and on the image alone.

    Parameters
    ----------
    most : int
        Training examples that the regressions see, at most.
    """
    task, examples = settings.task, prepared.splits[split]
    rng = np.random.default_rng(settings.seed)
    training = prepared.splits["train"]
    training = [training[number] for number in rng.permutation(len(training))[:most]]
    labels = [_label(example) for example in training]
    frequent = Counter(map(_label, prepared.splits["train"])).most_common(1)[0][0]
    text = make_pipeline(
        CountVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b"), LogisticRegression(max_iter=500)
    )
    text.fit([example.text for example in training], labels)
    base = prepared.model.base
    features = image_features(base, [example.images for example in [*training, *examples]], progress=progress)
    image = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    image.fit(features[: len(training)], labels)
    told = {
        "most frequent": [frequent] * len(examples),
        "text only": list(text.predict([example.text for example in examples])),
        "image only": list(image.predict(features[len(training) :])),
    }
    found = {}
    for name, predictions in told.items():
        predicted = {example.id: str(label) for example, label in zip(examples, predictions, strict=True)}
        found[name] = TaskResult(task, score(task, examples, predicted), predicted)
    return found


def _label(example: Example) -> str:
    """The label, or what most people answered."""
    if example.label is not None:
        return example.label
    return Counter(map(normalised_answer, example.answers)).most_common(1)[0][0]


@torch.no_grad()
def image_features(
    model: VisualParsingModel,
    images: Sequence[tuple[ImageFile, ...]],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> np.ndarray:
    """Mean and largest visual features of each example's images, side by side; (example, feature)."""
    files = list(dict.fromkeys(image for group in images for image in group))
    pooled: dict[ImageFile, np.ndarray] = {}
    for start in range(0, len(files), 64):
        part = files[start : start + 64]
        pixels = stack_files(part, model.settings.visual.image_px).to(model.device)
        features = model.eval().visual(pixels).features
        both = torch.cat([features.mean(dim=1), features.amax(dim=1)], dim=1).cpu().numpy()
        pooled |= dict(zip(part, both, strict=True))
        if progress:
            progress("reading images", min(start + 64, len(files)), len(files))
    return np.stack([np.concatenate([pooled[image] for image in group]) for group in images])


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


__all__ = [
    "PreparedTask",
    "baselines",
    "evaluate_task",
    "finetune",
    "image_features",
    "load_examples",
    "load_task",
    "prepare_task",
]
