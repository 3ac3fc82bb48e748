"""Fine-tuning on a downstream task: the start, the training, the official score."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import torch
from torch import nn

from vpworkbench.data.files import Skipped, skipping_missing, write_skipped
from vpworkbench.data.inputs import use_regions, visual_input
from vpworkbench.data.records import Example, Picture
from vpworkbench.runs import Run
from vpworkbench.settings import FinetuneSettings
from vpworkbench.subjects import load_run
from vpworkbench.tasks import TASKS
from vpworkbench.tasks.retrieval import RetrievalBatches, RetrievalResult
from vpworkbench.tasks.task import TaskModel, TaskResult, right_answer, texts_of
from vpworkbench.train.dual import near_captions
from vpworkbench.train.engine import fit, pick_device
from vpworkbench.train.frozen import forget_tokens, token_inputs
from vpworkbench.train.pretrain import build_model, with_words_of
from vpworkbench.train.processes import launch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedTask:
    """The records of a run (examples; captioned pictures for retrieval) and its model, ready to train."""

    splits: dict[str, list[Example]] | dict[str, list[Picture]]
    model: TaskModel
    shared: frozenset[str] = frozenset()  # ids of test examples whose image is also in training or validation
    skipped: list[Skipped] = field(default_factory=list)  # records without a readable image

    def preview(self, split: str = "val", count: int = 4) -> list[str]:
        """The first records, each with its right answer."""
        records = self.splits[split][:count]
        return [f"  {getattr(one, 'text', one.id)}  ->  {right_answer(one) or 'withheld'}" for one in records]

    def is_answered(self, split: str) -> bool:
        """Whether the split can be scored: False if the release withholds all answers, or has no such split."""
        return any(map(right_answer, self.splits[split]))

    def test_summary(self, result: TaskResult | RetrievalResult, *, seed: int = 0) -> dict[str, float]:
        """The test score, empty if answers are withheld; also without the examples whose images are `shared`."""
        examples = self.splits["test"]
        summary = result.summary(examples, seed=seed)
        if not (summary and self.shared):
            return summary
        kept = [number for number, example in enumerate(examples) if example.id not in self.shared]
        rest = [examples[number] for number in kept]
        unshared = result._replace(scores=result.scores[kept]).summary(rest, seed=seed)
        return summary | {f"{key}_unshared": value for key, value in unshared.items()} | {"shared": len(self.shared)}


def prepare_task(settings: FinetuneSettings) -> PreparedTask:
    """Read the records, load the start and add the head; every fault of the data or the start is reported here."""
    task = TASKS[settings.task]
    with skipping_missing(settings.missing, settings.missing_most) as skipped:
        splits, shared = task.load(settings)
    base, pretraining = load_run(settings.checkpoint)
    if not settings.pretrained:
        base, _ = build_model(pretraining.model_copy(update={"seed": settings.seed}), base.tokenizer)
    if settings.regions:
        use_regions(base, settings.regions)
    if settings.frozen is not None:
        base.freeze_visual(settings.frozen)
    records = [record for split in splits.values() for record in split]
    visual_input(base.settings.visual).check([image for record in records for image in record.images])
    torch.manual_seed(settings.seed)
    texts = texts_of(splits["train"])
    if not pretraining.init_text:  # a BERT's own vocabulary spells every word
        base = with_words_of(base, texts)
    base.words.check(texts, source=settings.data)
    labels = task.labels([*splits["train"], *splits["val"]], settings)
    kind = {"pairing": settings.pairing, "pool": settings.pool, "dropout": settings.head_dropout}
    model = TaskModel(base, task, labels, **kind)
    if settings.answer_prior:
        nn.init.constant_(model.head[-1].bias, -math.log(len(labels)))
    return PreparedTask(splits, model, shared, skipped)


def finetune(run: Run, prepared: PreparedTask, settings: FinetuneSettings) -> int:
    """Train to the end, or continue from the run's last checkpoint; returns the optimiser steps of the whole run."""
    train, model = settings.train, prepared.model
    write_skipped(prepared.skipped, run.folder)
    batches = model.task.batches(prepared.splits["train"], model, settings)
    if isinstance(batches, RetrievalBatches) and settings.retrieval.hard:  # before the processes, which read the file
        batches.near = near_captions(batches, settings, folder=run.folder, progress=run.progress)
    launch(train.processes, run.folder)
    if model.base.settings.visual.frozen:
        images = [image for record in prepared.splits["train"] for image in record.images]
        device, flip = pick_device(train.device), settings.retrieval.flip
        batches.inputs = token_inputs(model.base.visual, images, run, device, flip=flip)
    options = {"optim": settings.optim, "train": train, "seed": settings.seed, "workers": settings.workers}
    steps = fit(model, model.task.objective(), batches, run, **options, what=f"fine-tuning, {settings.task}")
    forget_tokens(run)
    return steps


def evaluate_split(
    run: Run, prepared: PreparedTask, settings: FinetuneSettings, split: str
) -> TaskResult | RetrievalResult:
    """The official score of a split. The predictions are saved in the run's folder, also if answers are withheld.

    Retrieval keeps its score matrix there, and continues a matrix that was stopped.
    """
    model, records = prepared.model, prepared.splits[split]
    matrix = run.folder / f"scores-{split}.npy"
    result = model.task.evaluate(model, records, settings, file=matrix, progress=run.progress)
    predictions = run.folder / f"predictions-{split}.{model.task.suffix}"
    if records:
        result.save(predictions)
        if not prepared.is_answered(split):
            log.warning("the answers of %s are withheld: no score; the predictions are in %s", split, predictions)
    return result
