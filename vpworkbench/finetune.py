"""Fine-tuning on a downstream task: its files, the start, training, the official score and simple baselines."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vpworkbench import tasks
from vpworkbench.config import DataSettings, FinetuneSettings
from vpworkbench.data.batches import stack_files
from vpworkbench.data.formats import image_contents, load_splits, scenes_folder
from vpworkbench.data.records import DataError, Example, ImageFile, Picture
from vpworkbench.data.scene_files import write_scenes
from vpworkbench.data.task_formats import read_easy_vqa, read_nlvr1, read_nlvr2, read_snli_ve, read_vqa
from vpworkbench.dual import dual_scores
from vpworkbench.metrics import normalised_answer
from vpworkbench.model import VisualParsingModel
from vpworkbench.pretrain import build_model, load_run
from vpworkbench.retrieval import (
    Matching,
    RetrievalBatches,
    RetrievalResult,
    captions_of,
    chance,
    retrieval_result,
    score_matrix,
)
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

FILES = {
    "nlvr2": {"train": "train.json", "val": "dev.json", "test": "test1.json"},
    "snli-ve": {"train": "snli_ve_train.jsonl", "val": "snli_ve_dev.jsonl", "test": "snli_ve_test.jsonl"},
}


@dataclass(frozen=True)
class PreparedTask:
    """A run's examples (captioned pictures for retrieval) and model, ready to train."""

    splits: dict[str, list[Example]] | dict[str, list[Picture]]
    model: TaskModel

    def preview(self, split: str = "val", count: int = 4) -> list[str]:
        """The first examples in words, each with what is right."""
        return [
            f"{one.id}: {' | '.join(one.captions)}" if isinstance(one, Picture)
            else f"{one.text}  ->  {one.label or one.answers[0]}"
            for one in self.splits[split][:count]
        ]  # fmt: skip


def load_examples(settings: FinetuneSettings) -> dict[str, list[Example]] | dict[str, list[Picture]]:
    """`train`, `val` and `test` of a task; training examples whose image an evaluation split holds are dropped.

    `data` is `scenes`, `easy-vqa`, or the folder of the original files: VQA v2's questions and annotations,
    `train.json` / `dev.json` / `test1.json` of NLVR2, `dev.json` / `test.json` of NLVR v1, `snli_ve_*.jsonl`; for
    retrieval any captioned set (`data.formats.read_pictures`).

    Raises
    ------
    DataError
        For files that are missing or broken, or a split without examples that training needs.
    """
    if settings.task == "retrieval":
        return _captioned(settings)
    splits = _read_splits(settings)
    content = image_contents(image for examples in splits.values() for example in examples for image in example.images)
    held_out = {content[image] for split in ("val", "test") for example in splits[split] for image in example.images}
    kept = [example for example in splits["train"] if not any(content[image] in held_out for image in example.images)]
    if dropped := len(splits["train"]) - len(kept):
        log.warning("%d training examples are about images of val or test: dropped", dropped)
    splits["train"] = kept
    for split in ("train", "val"):
        if not splits[split]:
            raise DataError(f"{settings.data}: no examples of {settings.task} in {split}; it needs some")
    return splits


def _captioned(settings: FinetuneSettings) -> dict[str, list[Picture]]:
    """All training images, and the first of each evaluation split."""
    most = settings.retrieval.search_images or None
    splits = load_splits(DataSettings(sets=(settings.data,), scenes=settings.scenes))
    splits = {split: [picture for picture in pictures if picture.captions] for split, pictures in splits.items()}
    for split in ("val", "test"):
        splits[split] = splits[split][:most]
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
    splits = load_examples(settings)
    base, trained = load_run(settings.checkpoint)
    if not settings.pretrained:
        base, _ = build_model(trained.model_copy(update={"seed": settings.seed}), base.tokenizer)
    torch.manual_seed(settings.seed)
    labels = task_labels(settings.task, splits["train"], least=settings.answer_count)
    model = TaskModel(base, settings.task, labels)
    lacking = model.lacking()
    texts = [without(example.text, lacking) for example in splits["train"]] if settings.task != "retrieval" else (
        captions_of(splits["train"])
    )  # fmt: skip
    try:
        model.words.check(texts, source=settings.data)
    except DataError as error:  # the vocabulary came with the checkpoint: say so, and go on
        log.warning("%s", str(error).split(";")[0])
    return PreparedTask(splits, model)


def finetune(run: Run, prepared: PreparedTask, settings: FinetuneSettings) -> int:
    """Train to the end, or go on from the run's last checkpoint; the optimiser steps of the whole run."""
    train = settings.train
    objective, batches = Classification(), None
    if settings.task == "retrieval":
        objective, batches = Matching(), _pair_batches(prepared, settings)
    else:
        batches = TaskBatches(prepared.splits["train"], prepared.model, size=train.images, seed=settings.seed)
    return fit(prepared.model, objective, batches, run, optim=settings.optim, train=train, seed=settings.seed,
               workers=settings.workers, what=f"fine-tuning, {settings.task}")  # fmt: skip


def _pair_batches(prepared: PreparedTask, settings: FinetuneSettings) -> RetrievalBatches:
    return RetrievalBatches(
        prepared.splits["train"], prepared.model.words, images=settings.train.images, seed=settings.seed,
        image_px=prepared.model.base.settings.visual.image_px, negatives=settings.retrieval.negatives,
        flip=settings.retrieval.flip,
    )  # fmt: skip


def evaluate_split(
    run: Run, prepared: PreparedTask, settings: FinetuneSettings, split: str
) -> TaskResult | RetrievalResult:
    """The official score of a split; its predictions, or score matrix, are kept in the run's folder.

    A score matrix that was stopped goes on where it was.
    """
    examples = prepared.splits[split]
    if settings.task == "retrieval":
        scores = score_matrix(
            prepared.model, examples, captions_of(examples), pairs=settings.retrieval.pairs, bf16=settings.train.bf16,
            file=run.folder / f"scores-{split}.npy", progress=run.progress,
        )  # fmt: skip
        return retrieval_result(scores, examples)
    result = evaluate_task(prepared.model, examples, progress=run.progress)
    result.save(run.folder / f"predictions-{split}.{'json' if settings.task == 'vqa' else 'csv'}")
    return result


def summary_of(
    result: TaskResult | RetrievalResult, examples: Sequence[Example] | Sequence[Picture], *, seed: int = 0
) -> dict[str, float]:
    """The official score with its interval, flat, for `summary.json`."""
    if isinstance(result, RetrievalResult):
        return result.summary(seed=seed)
    return tasks.summary_of(result, examples, seed=seed)


def report(
    result: TaskResult | RetrievalResult,
    others: Mapping[str, TaskResult | RetrievalResult],
    examples: Sequence[Example] | Sequence[Picture],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """`summary_of` a result, and of each baseline under `baselines`."""
    beside = {name: summary_of(other, examples, seed=seed) for name, other in others.items()}
    return summary_of(result, examples, seed=seed) | {"baselines": beside}


def baselines(
    prepared: PreparedTask,
    settings: FinetuneSettings,
    split: str,
    *,
    most: int = 4_000,
    folder: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Mapping[str, TaskResult | RetrievalResult]:
    """The most frequent label, and logistic regressions on the text alone and on the image alone.

    For retrieval chance, linear projections of frozen features, and a dual encoder trained as a whole in as many
    steps and the same batches as the model (`dual`).

    Parameters
    ----------
    most : int
        Training examples that the regressions see, at most.
    folder : Path or None
        Keeps the dual encoders: a second call does not train them again.
    """
    if settings.task == "retrieval":
        return _retrieval_baselines(prepared, settings, split, folder=folder, progress=progress)
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


def _retrieval_baselines(
    prepared: PreparedTask,
    settings: FinetuneSettings,
    split: str,
    *,
    folder: Path | None,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, RetrievalResult]:
    pictures = prepared.splits[split]
    with tempfile.TemporaryDirectory() as scratch:
        found = dual_scores(
            _pair_batches(prepared, settings), pictures, settings, folder=folder or Path(scratch), progress=progress
        )
    return {"chance": chance(pictures)} | {
        name: retrieval_result(scores, pictures) for name, scores in found.items()
    }  # fmt: skip


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
    "evaluate_split",
    "evaluate_task",
    "finetune",
    "image_features",
    "load_examples",
    "load_task",
    "prepare_task",
    "report",
    "summary_of",
]
