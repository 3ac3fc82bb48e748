"""Fine-tuning on a downstream task: its files, the start, training, the official score and simple baselines."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from vpworkbench.config import DataSettings, FinetuneSettings
from vpworkbench.data.formats import image_contents, load_splits, scenes_folder
from vpworkbench.data.records import DataError, Example, Picture
from vpworkbench.data.scene_files import write_scenes
from vpworkbench.data.task_formats import read_easy_vqa, read_nlvr1, read_nlvr2, read_snli_ve, read_vqa
from vpworkbench.dual import near_captions
from vpworkbench.pretrain import build_model, load_run, with_words_of
from vpworkbench.retrieval import Matching, RetrievalBatches, RetrievalResult, captions_of, evaluate_retrieval
from vpworkbench.runs import Run
from vpworkbench.tasks import Classification, TaskBatches, TaskModel, TaskResult, evaluate_task, task_labels
from vpworkbench.train import fit

log = logging.getLogger(__name__)

FILES = {
    "nlvr2": {"train": "train.json", "val": "dev.json", "test": "test1.json"},
    "snli-ve": {"train": "snli_ve_train.jsonl", "val": "snli_ve_dev.jsonl", "test": "snli_ve_test.jsonl"},
}


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
            f"  {one.text}  ->  {one.label or one.answers[0]}" if isinstance(one, Example)
            else f"  {one.id}  <->  {' | '.join(one.captions)}"
            for one in self.splits[split][:count]
        ]  # fmt: skip

    def test_summary(self, result: TaskResult | RetrievalResult, *, seed: int = 0) -> dict[str, float]:
        """The test score; where the release shares images between splits, the score without those examples too."""
        examples = self.splits["test"]
        if not examples:
            return {}
        summary = result.summary(examples, seed=seed)
        if not self.shared:
            return summary
        kept = [number for number, example in enumerate(examples) if example.id not in self.shared]
        rest = [examples[number] for number in kept]
        unshared = result._replace(scores=result.scores[kept]).summary(rest, seed=seed)
        return summary | {f"{key}_unshared": value for key, value in unshared.items()} | {"shared": len(self.shared)}


class TaskExamples(NamedTuple):
    """The splits of a task.

    Attributes
    ----------
    splits : dict
        `train`, `val`, `test`; training examples whose image an evaluation split holds are dropped.
    shared : frozenset of str
        As of `PreparedTask`.
    """

    splits: dict[str, list[Example]] | dict[str, list[Picture]]
    shared: frozenset[str]


def load_examples(settings: FinetuneSettings) -> TaskExamples:
    """Read the files of a task and keep images of evaluation splits out of training.

    `data` is `scenes`, `easy-vqa`, or the folder of the original files: VQA v2's questions and annotations,
    `train.json` / `dev.json` / `test1.json` of NLVR2, `dev.json` / `test.json` of NLVR v1, `snli_ve_*.jsonl`. Of
    retrieval it is any captioned set, such as a Karpathy json.

    Raises
    ------
    DataError
        For files that are missing or broken, or a split without examples that training needs.
    """
    if settings.task == "retrieval":
        return TaskExamples(_captioned(settings), frozenset())
    splits = _read_splits(settings)
    content = image_contents(image for examples in splits.values() for example in examples for image in example.images)

    def contents(*names: str) -> set[Hashable]:
        return {content[image] for name in names for example in splits[name] for image in example.images}

    def about(examples: Sequence[Example], images: set[Hashable]) -> list[Example]:
        return [example for example in examples if any(content[image] in images for image in example.images)]

    shared = about(splits["test"], contents("train", "val"))
    leaking = {example.id for example in about(splits["train"], contents("val", "test"))}
    if leaking:
        log.warning("%d training examples are about images of val or test: dropped", len(leaking))
    splits["train"] = [example for example in splits["train"] if example.id not in leaking]
    for split in ("train", "val"):
        if not splits[split]:
            raise DataError(f"{settings.data}: no examples of {settings.task} in {split}; it needs some")
    return TaskExamples(splits, frozenset(example.id for example in shared))


def _captioned(settings: FinetuneSettings) -> dict[str, list[Picture]]:
    """All captioned training images, and the first ones of the other splits."""
    splits = load_splits(DataSettings(sets=(settings.data,), scenes=settings.scenes))
    most = {"train": None, "val": settings.retrieval.search_images or None}
    splits = {
        split: [picture for picture in pictures if picture.captions][: most.get(split, most["val"])]
        for split, pictures in splits.items()
    }
    for split in ("val", "test"):
        if len(splits[split]) < 2:
            raise DataError(f"{settings.data}: {len(splits[split])} captioned images in {split}; a search needs two")
    return splits


def _read_splits(settings: FinetuneSettings) -> dict[str, list[Example]]:
    if settings.data == "easy-vqa":
        return _easy_vqa()
    folder = Path(settings.data).expanduser()
    if settings.data == "scenes":
        folder = write_scenes(scenes_folder(settings.scenes), settings.scenes)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; `data` takes 'scenes', 'easy-vqa' or the folder of a task's files")
    splits: dict[str, list[Example]] = {"train": [], "val": [], "test": []}
    if settings.task == "nlvr1":
        for example in read_nlvr1(folder):
            splits[example.split].append(example)
    elif settings.task == "vqa":
        for split in splits:
            splits[split] = _vqa(folder, split)
    else:
        inner = folder / "nlvr2" if settings.task == "nlvr2" and (folder / "nlvr2").is_dir() else folder
        for split, name in FILES[settings.task].items():
            if not (inner / name).exists():
                log.warning("%s: not there, so no %s", inner / name, split)
            elif settings.task == "nlvr2":
                splits[split] = read_nlvr2(inner / name, split=split)
            else:
                splits[split] = read_snli_ve(inner / name, split=split, premise=settings.premise)
    return splits


def _vqa(folder: Path, split: str) -> list[Example]:
    found = sorted(folder.glob(f"v2_OpenEnded_*_{split}*_questions.json"))
    if not found:
        return []
    annotations = folder / found[0].name.replace("OpenEnded_", "").replace("_questions", "_annotations")
    return read_vqa(found[0], annotations if annotations.exists() else None, split=split)


def _easy_vqa() -> dict[str, list[Example]]:
    """A tenth of the training images, by their number, validates: the package has no such split."""
    training = read_easy_vqa("train")
    held = [int(Path(example.images[0].name).stem) % 10 == 0 for example in training]
    return {
        "train": [example for example, out in zip(training, held, strict=True) if not out],
        "val": [example for example, out in zip(training, held, strict=True) if out],
        "test": read_easy_vqa("test"),
    }


def prepare_task(settings: FinetuneSettings) -> PreparedTask:
    """Read the examples, load the start and put the head on; all that can be refused is refused here."""
    splits, shared = load_examples(settings)
    base, trained = load_run(settings.checkpoint)
    if not settings.pretrained:
        base, _ = build_model(trained.model_copy(update={"seed": settings.seed}), base.tokenizer)
    torch.manual_seed(settings.seed)
    training = splits["train"]
    texts = captions_of(training) if settings.task == "retrieval" else [example.text for example in training]
    if not trained.init_text:  # a BERT's own vocabulary spells every word
        base = with_words_of(base, texts)
    base.words.check(texts, source=settings.data)
    labels = task_labels(settings.task, splits["train"], least=settings.answer_count)
    return PreparedTask(splits, TaskModel(base, settings.task, labels, pairing=settings.pairing), shared)


def finetune(run: Run, prepared: PreparedTask, settings: FinetuneSettings) -> int:
    """Train to the end, or go on from the run's last checkpoint; the optimiser steps of the whole run."""
    train = settings.train
    objective, batches = Classification(), None
    if settings.task == "retrieval":
        objective, batches = Matching(), pair_batches(prepared, settings)
        if settings.retrieval.hard:
            batches.near = near_captions(batches, settings, folder=run.folder, progress=run.progress)
    else:
        batches = TaskBatches(prepared.splits["train"], prepared.model, size=train.images, seed=settings.seed)
    return fit(prepared.model, objective, batches, run, optim=settings.optim, train=train, seed=settings.seed,
               workers=settings.workers, what=f"fine-tuning, {settings.task}")  # fmt: skip


def pair_batches(prepared: PreparedTask, settings: FinetuneSettings) -> RetrievalBatches:
    """The training pairs of retrieval."""
    return RetrievalBatches(
        prepared.splits["train"], prepared.model.words, images=settings.train.images, seed=settings.seed,
        image_px=prepared.model.base.settings.visual.image_px, negatives=settings.retrieval.negatives,
        flip=settings.retrieval.flip,
    )  # fmt: skip


def evaluate_split(
    run: Run, prepared: PreparedTask, settings: FinetuneSettings, split: str
) -> TaskResult | RetrievalResult:
    """The official score of a split; its predictions are left in the run's folder.

    Of retrieval the score matrix is kept there too: where it was stopped, it goes on.
    """
    model, examples = prepared.model, prepared.splits[split]
    if settings.task == "retrieval":
        result = evaluate_retrieval(model, examples, pairs=settings.retrieval.pairs, bf16=settings.train.bf16,
                                    file=run.folder / f"scores-{split}.npy", progress=run.progress)  # fmt: skip
    else:
        result = evaluate_task(model, examples, progress=run.progress)
    result.save(run.folder / f"predictions-{split}.{'json' if settings.task == 'vqa' else 'csv'}")
    return result


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
