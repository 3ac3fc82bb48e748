"""Fine-tuning on a downstream task: its files, the start, training, the official score and simple baselines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from vpworkbench.data.captioned import TABLE
from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import use_regions, visual_input
from vpworkbench.data.readers import open_annotations, unique
from vpworkbench.data.records import Example, Picture
from vpworkbench.data.splits import load_examples
from vpworkbench.data.tables import Row, read_unsplit_rows
from vpworkbench.errors import DataError
from vpworkbench.runs import Run
from vpworkbench.settings import FinetuneSettings
from vpworkbench.subjects import load_run
from vpworkbench.tasks.retrieval import Matching, RetrievalBatches, RetrievalResult, captions_of, evaluate_retrieval
from vpworkbench.tasks.task import Classification, TaskBatches, TaskModel, TaskResult, evaluate_task, task_labels
from vpworkbench.train.dual import near_captions
from vpworkbench.train.engine import fit
from vpworkbench.train.pretrain import build_model, with_words_of
from vpworkbench.train.processes import launch, launched

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedTask:
    """A run's examples (of retrieval its captioned pictures) and model, ready to train.

    Attributes
    ----------
    shared : frozenset of str
        Ids of test examples about an image that the release has in training or validation too.
    """

    splits: dict[str, list[Example]] | dict[str, list[Picture]]
    model: TaskModel
    shared: frozenset[str] = frozenset()

    def preview(self, split: str = "val", count: int = 4) -> list[str]:
        """The first examples in words, each with what is right of it."""
        return [
            f"  {one.text}  ->  {one.label or next(iter(one.answers), 'withheld')}" if isinstance(one, Example)
            else f"  {one.id}  <->  {' | '.join(one.captions)}"
            for one in self.splits[split][:count]
        ]  # fmt: skip

    def is_answered(self, split: str) -> bool:
        """Whether a score can be told there; not where the release withholds all answers, or has no such split."""
        return any(not isinstance(one, Example) or one.label or one.answers for one in self.splits[split])

    def test_summary(self, result: TaskResult | RetrievalResult, *, seed: int = 0) -> dict[str, float]:
        """The test score; where the release shares images between splits, the score without those examples too.

        Nothing where the split is not answered.
        """
        examples = self.splits["test"]
        summary = result.summary(examples, seed=seed)
        if not (summary and self.shared):
            return summary
        kept = [number for number, example in enumerate(examples) if example.id not in self.shared]
        rest = [examples[number] for number in kept]
        unshared = result._replace(scores=result.scores[kept]).summary(rest, seed=seed)
        return summary | {f"{key}_unshared": value for key, value in unshared.items()} | {"shared": len(self.shared)}


def prepare_task(settings: FinetuneSettings) -> PreparedTask:
    """Read the examples, load the start and put the head on; all that can be refused is refused here."""
    splits, shared = load_examples(settings)
    base, trained = load_run(settings.checkpoint)
    if not settings.pretrained:
        base, _ = build_model(trained.model_copy(update={"seed": settings.seed}), base.tokenizer)
    if settings.regions:
        use_regions(base, settings.regions)
    visual_input(base.settings.visual).check([example for part in splits.values() for example in part])
    torch.manual_seed(settings.seed)
    training = splits["train"]
    texts = captions_of(training) if settings.task == "retrieval" else [example.text for example in training]
    if not trained.init_text:  # a BERT's own vocabulary spells every word
        base = with_words_of(base, texts)
    base.words.check(texts, source=settings.data)
    counted = [*training, *splits["val"]]
    labels = task_labels(settings.task, counted, least=settings.answer_count, listed=settings.answer_list)
    return PreparedTask(splits, TaskModel(base, settings.task, labels, pairing=settings.pairing), shared)


def finetune(run: Run, prepared: PreparedTask, settings: FinetuneSettings) -> int:
    """Train to the end, or go on from the run's last checkpoint; the optimiser steps of the whole run."""
    train = settings.train
    if train.processes > 1 and not launched():
        launch(train.processes, run.folder.parent.name, run.folder.name)
    objective, batches = Classification(), None
    if settings.task == "retrieval":
        objective, batches = Matching(), pair_batches(prepared, settings)
        if settings.retrieval.hard:
            batches.near = near_captions(batches, settings, folder=run.folder, progress=run.progress)
    else:
        batches = TaskBatches(prepared.splits["train"], prepared.model, size=train.images, seed=settings.seed)
    return fit(prepared.model, objective, batches, run, optim=settings.optim, train=train, seed=settings.seed,
               workers=settings.workers, what=f"fine-tuning, {settings.task}")  # fmt: skip


def train_run(run: Run, settings: FinetuneSettings) -> int:
    """The training of `04_finetune` alone, as `vpw train` does it."""
    return finetune(run, prepare_task(settings), settings)


def pair_batches(prepared: PreparedTask, settings: FinetuneSettings) -> RetrievalBatches:
    """The training pairs of retrieval."""
    return RetrievalBatches(
        prepared.splits["train"], prepared.model.words, images=settings.train.images, seed=settings.seed,
        inputs=visual_input(prepared.model.base.settings.visual), negatives=settings.retrieval.negatives,
        flip=settings.retrieval.flip,
    )  # fmt: skip


def evaluate_split(
    run: Run, prepared: PreparedTask, settings: FinetuneSettings, split: str
) -> TaskResult | RetrievalResult:
    """The official score of a split; its predictions are left in the run's folder, also where answers are withheld.

    Of retrieval the score matrix is kept there too: where it was stopped, it goes on.
    """
    model, examples = prepared.model, prepared.splits[split]
    if settings.task == "retrieval":
        result = evaluate_retrieval(model, examples, pairs=settings.retrieval.pairs, bf16=settings.train.bf16,
                                    file=run.folder / f"scores-{split}.npy", progress=run.progress)  # fmt: skip
    else:
        result = evaluate_task(model, examples, progress=run.progress)
    file = run.folder / f"predictions-{split}.{'json' if settings.task == 'vqa' else 'csv'}"
    if examples:
        result.save(file)
        if not prepared.is_answered(split):
            log.warning("the answers of %s are withheld: no score; the predictions are in %s", split, file)
    return result


def predict_table(model: TaskModel, table: str | Path, *, images: Sequence[str | Path] = ()) -> pd.DataFrame:
    """The likeliest label of each row of a csv or json lines of `image`, `text` and, for NLVR2, `image2`.

    Parameters
    ----------
    images : sequence of path
        Folders and zips of the images; empty: beside the table.

    Returns
    -------
    DataFrame
        `id`, `image`, `text`, `prediction`, `probability`, in the order of the table.

    Raises
    ------
    DataError
        For a broken row, an image that is missing or cannot be read, a wrong number of images in a row; before anything
        is predicted.
    """
    opened = open_annotations(table, [TABLE], images)
    rows = unique(read_unsplit_rows(opened), opened.file)
    _check_images(rows, model)
    likeliest = [next(iter(one.items())) for one in model.predict_all([row.images for row in rows],
                                                                      [row.text for row in rows])]  # fmt: skip
    return pd.DataFrame({
        "id": [row.id for row in rows],
        "image": [" ".join(image.name for image in row.images) for row in rows],
        "text": [row.text for row in rows],
        "prediction": [label for label, _ in likeliest],
        "probability": [round(share, 4) for _, share in likeliest],
    })  # fmt: skip


def _check_images(rows: Sequence[Row], model: TaskModel) -> None:
    """`DataError` for the first row whose images are too few, too many or cannot be decoded."""
    wanted = "two images: fill image and image2" if model.sides == 2 else "one image: leave image2 empty"
    decoded: set[ImageFile] = set()
    for row in rows:
        if len(row.images) != model.sides:
            raise DataError(f"{row.where}: {len(row.images)} images, but {model.task} takes {wanted}")
        for image in (one for one in row.images if one not in decoded):
            try:
                image.pixels()
            except DataError as error:
                raise DataError(f"{row.where}: {error}") from None
            decoded.add(image)
