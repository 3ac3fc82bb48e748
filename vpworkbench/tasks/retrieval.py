"""Image-text retrieval (paper Table 4): the ITM head scores pairs; both directions are read from one score matrix.

For the matrix, visual tokens are computed once and kept, captions of one length share a batch, and pairs pass the
fusion in large batches. A stopped matrix continues where it stopped.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from vpworkbench.data.batches import PairBatch
from vpworkbench.data.inputs import Progress, VisualInput, visual_input
from vpworkbench.data.records import Picture
from vpworkbench.data.splits import check_sizes, load_splits
from vpworkbench.data.steps import Sampler
from vpworkbench.errors import DataError
from vpworkbench.losses import Objective
from vpworkbench.metrics import recall_at
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.model.words import Words
from vpworkbench.scenes.texts import pick
from vpworkbench.settings import DataSettings, FinetuneSettings, OptimSettings, RetrievalSettings, TrainSettings
from vpworkbench.stats import Interval, bootstrap_interval, flatten, mean_of_independent
from vpworkbench.system import write_atomically
from vpworkbench.tasks.classification import fixed_labels
from vpworkbench.tasks.task import TINY, Task, TaskModel, texts_of

CUTOFFS = (1, 5, 10)
IMAGES_AT_ONCE = 32
CANDIDATES = 20
WEIGHTS = (0.0, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
"""What `reranked` tries, in units of each score's standard deviation."""
FEWEST_TEXTS, MOST_TEXTS = 16, 64  # captions of one length in a batch

TextBatch = tuple[Tensor, Tensor, Tensor]
"""Columns of the matrix, int64 (text,); token ids, int64 (text, word); real tokens, bool (text, word)."""


class Retrieval(Task):
    """A task whose records are captioned pictures, and whose score is the recall of a search."""

    def load(self, settings: FinetuneSettings) -> tuple[dict[str, list[Picture]], frozenset[str]]:
        """All captioned training images, and the first `search_images` of validation and test."""
        splits = load_splits(DataSettings(sets=(settings.data,), images=settings.images, scenes=settings.scenes))
        check_sizes({"train": splits["train"]}, settings.data, least=settings.train.images)
        most = settings.retrieval.search_images or None
        captioned = {split: [one for one in pictures if one.captions] for split, pictures in splits.items()}
        for split in ("val", "test"):
            captioned[split] = captioned[split][:most]
            if (count := len(captioned[split])) < 2:
                raise DataError(f"{settings.data}: {count} captioned images in {split}; a search needs two")
        return captioned, frozenset()

    def build_head(self, base: VisualParsingModel, labels: int) -> nn.Module:
        """A copy of the ITM head."""
        head = super().build_head(base, labels)
        head.load_state_dict(base.itm.state_dict())
        return head

    def objective(self) -> Matching:
        return Matching()

    def batches(self, examples: Sequence[Picture], model: TaskModel, settings: FinetuneSettings) -> RetrievalBatches:
        inputs, size = visual_input(model.base.settings.visual), settings.train.images
        return RetrievalBatches(examples, model.base.words, settings.retrieval, inputs, size, settings.seed)

    def evaluate(
        self,
        model: TaskModel,
        examples: Sequence[Picture],
        settings: FinetuneSettings,
        *,
        file: Path | None = None,
        progress: Progress | None = None,
    ) -> RetrievalResult:
        """Score all pairs of the pictures and all their captions; `file` keeps the matrix."""
        bf16 = settings.train.bf16 and model.base.device.type == "cuda"
        options = {"pairs": settings.retrieval.pairs, "bf16": bf16}
        scores = score_matrix(model, examples, texts_of(examples), **options, file=file, progress=progress)
        return retrieval_result(scores, examples)


@dataclass
class RetrievalBatches:
    """Captioned images with one caption each, and unmatched pairs from the same batch; a function of seed and step.

    An unmatched text is never a caption of the same image, nor identical to one; where there is ground truth, it is
    false of the image. An epoch shows each image once.

    If `near` is set, unmatched captions are drawn from these places among all captions, instead of from the batch.
    """

    pictures: Sequence[Picture]
    words: Words
    settings: RetrievalSettings
    inputs: VisualInput
    images: int
    seed: int
    near: np.ndarray | None = None  # int (picture, caption)

    def __post_init__(self) -> None:
        if self.images < 2 or len(self.pictures) < self.images:
            number = len(self.pictures)
            raise DataError(f"{number} captioned images: a batch of {self.images} needs as many, at least two")
        self.sampler = Sampler(self.pictures, self.images, seed=(self.seed, 0))
        self._captions = texts_of(self.pictures)

    def draw(self, step: int) -> tuple[list[int], list[str], np.random.Generator]:
        """Rows of the pictures of a step, a caption of each, and the generator of further draws."""
        rng = np.random.default_rng((self.seed, 1, step))
        rows = self.sampler.rows(step)
        return rows, [pick(rng, self.pictures[row].captions) for row in rows], rng

    def __getitem__(self, step: int) -> PairBatch:
        rows, texts, rng = self.draw(step)
        pairs = []
        for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
            others = texts if self.near is None else [self._captions[other] for other in self.near[row]]
            false = [other for other in dict.fromkeys(others) if self.pictures[row].denies(other)]
            chosen = rng.permutation(len(false))[: self.settings.negatives]
            pairs += [(place, text, True), *((place, false[number], False) for number in chosen)]
        image_index, pair_texts, matched = zip(*pairs, strict=True)
        words, word_tokens = self.words.tensors(pair_texts)
        images = self.stack([self.pictures[row] for row in rows], rng)
        return PairBatch(images, torch.tensor(image_index), words, word_tokens, torch.tensor(matched))

    def stack(self, pictures: Sequence[Picture], rng: np.random.Generator) -> Tensor:
        """uint8 (image, 3, height, width), half of them mirrored if `flip` is set."""
        return self.inputs.stack(pictures, rng.random(len(pictures)) < 0.5 if self.settings.flip else None)


class Matching(Objective):
    """Binary cross entropy of match or no match; matched and unmatched pairs have equal weight."""

    weights = {"matched": 0.5, "unmatched": 0.5}

    def counts(self, batch: PairBatch) -> dict[str, int]:
        matched = int(batch.matched.sum())
        return {"matched": matched, "unmatched": len(batch.matched) - matched}

    def losses(self, model: TaskModel, batch: PairBatch) -> dict[str, Tensor]:
        visual, index = model.base.encode(batch.images), batch.image_index
        vision = model.base.fusion.embed_vision(visual)
        vision_tokens = None if visual.tokens is None else visual.tokens[index]
        logits = model.head(model.base.fusion.cls_output(batch.words, batch.word_tokens, vision[index], vision_tokens))
        each = functional.cross_entropy(logits.float(), batch.matched.long(), reduction="none")
        return {"matched": each[batch.matched].sum(), "unmatched": each[~batch.matched].sum()}


@torch.no_grad()
def score_matrix(
    model: TaskModel,
    pictures: Sequence[Picture],
    captions: Sequence[str],
    *,
    pairs: int = 512,
    bf16: bool = False,
    file: Path | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Match score of every image with every caption, float32 (image, caption): logit of match minus logit of no match.

    One pass of the fusion takes about `pairs` pairs. `bf16` is for a GPU only (else a `ValueError`): scores then agree
    to two or three digits. `file`, an `.npy`, keeps finished rows (nan elsewhere), so that a stopped call can continue;
    the `.json` beside it identifies the model, images, captions and precision, and others are a `ValueError`.
    """
    device = model.base.device
    if bf16 and device.type != "cuda":
        raise ValueError("bf16 scores need a GPU; leave it off on a CPU")
    model.eval()
    scores = _open_scores(file, model, pictures, captions, bf16)
    missing = [row for row in range(len(pictures)) if np.isnan(scores[row]).any()]
    batches = [tuple(part.to(device) for part in batch) for batch in _batches_by_length(model.base.words, captions)]
    starts = tqdm(range(0, len(missing), IMAGES_AT_ONCE), desc="scoring", unit=f"{IMAGES_AT_ONCE} images")
    with torch.autocast("cuda", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext():
        for start in starts:
            rows = missing[start : start + IMAGES_AT_ONCE]
            scores[rows] = _score_rows(model, [pictures[row] for row in rows], batches, pairs).cpu().numpy()
            if isinstance(scores, np.memmap):
                scores.flush()
            if progress:
                progress("scoring images", len(pictures) - len(missing) + start + len(rows), len(pictures))
    return np.array(scores)


def _score_rows(model: TaskModel, pictures: Sequence[Picture], batches: Sequence[TextBatch], pairs: int) -> Tensor:
    """Rows of the matrix for some images, which are encoded once; float32 (image, caption)."""
    pixels = visual_input(model.base.settings.visual).stack(pictures).to(model.base.device)
    visual = model.base.visual(pixels)
    vision, vision_tokens = model.base.fusion.embed_vision(visual), visual.not_padding()
    captions = sum(len(columns) for columns, _, _ in batches)
    scores = vision.new_empty(len(pictures), captions, dtype=torch.float32)
    for columns, words, word_tokens in batches:
        for some in torch.arange(len(pictures), device=pixels.device).split(max(1, pairs // len(words))):
            texts = [part.repeat(len(some), 1) for part in (words, word_tokens)]
            images = [part[some].repeat_interleave(len(words), dim=0) for part in (vision, vision_tokens)]
            logits = model.head(model.base.fusion.cls_output(*texts, *images)).float()
            scores[some[:, None], columns] = (logits[:, 1] - logits[:, 0]).view(len(some), len(words))
    return scores


def _batches_by_length(words: Words, captions: Sequence[str]) -> Iterator[TextBatch]:
    """Captions of one length together. Rare lengths share a batch, padded."""
    lengths = [len(words.ids(caption)) for caption in captions]
    order = sorted(range(len(captions)), key=lengths.__getitem__)
    batch: list[int] = []
    for place, following in zip(order, [*order[1:], None], strict=True):
        batch.append(place)
        last_of_length = following is None or lengths[following] > lengths[place]
        if following is None or len(batch) == MOST_TEXTS or (last_of_length and len(batch) >= FEWEST_TEXTS):
            yield torch.tensor(batch), *words.tensors([captions[place] for place in batch])
            batch = []


def _open_scores(
    file: Path | None, model: TaskModel, pictures: Sequence[Picture], captions: Sequence[str], bf16: bool
) -> np.ndarray:
    """The scores that the file holds, else nan everywhere."""
    shape = len(pictures), len(captions)
    if file is None:
        return np.full(shape, np.nan, dtype=np.float32)
    identity_file, identity = file.with_suffix(".json"), _identity(model, pictures, captions, bf16)
    if file.exists() and identity_file.exists():
        if json.loads(identity_file.read_text()) != identity:
            raise ValueError(
                f"{file}: scores of other weights, images or captions, or of other settings or precision; "
                "delete it, or take another file"
            )
        return np.load(file, mmap_mode="r+")
    scores = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    scores[:] = np.nan
    write_atomically(identity_file, json.dumps(identity) + "\n")
    return scores


def _identity(model: TaskModel, pictures: Sequence[Picture], captions: Sequence[str], bf16: bool) -> str:
    """A hash of all that the scores depend on; images count by their names."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    images = [picture.image.name for picture in pictures]
    digest.update(json.dumps([model.base.settings.model_dump(), images, list(captions), bf16]).encode())
    return digest.hexdigest()


class RetrievalResult(NamedTuple):
    """Recall in both directions, for each query: 1 where one of the K best is right.

    In `by_truth` a caption is right for every image that it is known to be true of. The official metric accepts only
    its own image, so "there is a red square", found for another scene that has one, is an error. Only generated scenes
    can tell the two apart.
    """

    text: dict[int, np.ndarray]  # K -> (image,): text retrieval (TR), the queries are images
    image: dict[int, np.ndarray]  # K -> (caption,): image retrieval (IR), the queries are captions
    by_truth: RetrievalResult | None = None
    scores: np.ndarray | None = None  # (image, caption)
    pictures: tuple[Picture, ...] = ()
    weight: float | None = None  # of the fusion's score, see `reranked`

    @property
    def mean(self) -> float:
        """Mean recall, with equal weight for each direction and cutoff."""
        return float(np.mean([found.mean() for found in (*self.text.values(), *self.image.values())]))

    def intervals(self, *, seed: int = 0) -> dict[str, Interval]:
        """`TR R@1` and so on: means with bootstrap 95% intervals over queries."""
        return {
            f"{way} R@{cutoff}": bootstrap_interval(found, seed)
            for way, recalls in (("TR", self.text), ("IR", self.image))
            for cutoff, found in recalls.items()
        }

    def summary(self, examples: Sequence[Picture] = (), *, seed: int = 0) -> dict[str, float]:
        """`mean_recall`, `tr_r1` and so on, with `_low` and `_high`; `tr_r1_by_truth` where it is known.

        The mean gives equal weight to each direction and cutoff. `examples` is unused: `TaskResult` needs it here.
        """
        ways = [bootstrap_interval(np.mean(list(found.values()), axis=0), seed) for found in (self.text, self.image)]
        mean = mean_of_independent(ways)  # images and texts as if drawn independently
        intervals = {RETRIEVAL.metric: mean, **self.intervals(seed=seed)}
        flat = flatten({name.lower().replace(" r@", "_r"): interval for name, interval in intervals.items()})
        if self.by_truth is not None:
            for way, found in (("tr", self.by_truth.text), ("ir", self.by_truth.image)):
                flat |= {f"{way}_r{cutoff}_by_truth": float(right.mean()) for cutoff, right in found.items()}
        return flat if self.weight is None else flat | {"weight": self.weight}

    def save(self, path: str | Path) -> None:
        """Write the ten best of every query as csv: `TR`, an image's id, texts; or `IR`, a text, images' ids."""
        captions, names = texts_of(self.pictures), [picture.id for picture in self.pictures]
        ways = ("TR", names, captions, self.scores), ("IR", captions, names, self.scores.T)
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            for way, queries, candidates, scores in ways:
                best = np.argsort(-scores, axis=1, kind="stable")[:, : max(CUTOFFS)]
                for query, row in zip(queries, best, strict=True):
                    table.writerow([way, query, *(candidates[place] for place in row)])


def retrieval_result(scores: np.ndarray, pictures: Sequence[Picture]) -> RetrievalResult:
    """Recall from match scores, (image, caption), whose columns are the captions of the pictures in order."""
    owner = owners_of(pictures)
    if scores.shape != (len(pictures), len(owner)):
        raise ValueError(f"scores are {scores.shape}, but the pictures have {len(owner)} captions")
    own = owner == np.arange(len(pictures))[:, None]

    def recall(right: np.ndarray) -> RetrievalResult:
        return RetrievalResult(recall_at(scores, right, CUTOFFS), recall_at(scores.T, right.T, CUTOFFS))

    by_truth = None
    if any(picture.scene is not None for picture in pictures):
        captions = texts_of(pictures)
        by_truth = recall(own | np.array([[picture.affirms(text) for text in captions] for picture in pictures]))
    return recall(own)._replace(by_truth=by_truth, scores=np.asarray(scores), pictures=tuple(pictures))


def reranked(first: Mapping[str, RetrievalResult], fusion: Mapping[str, RetrievalResult]) -> dict[str, RetrievalResult]:
    """Each query's `CANDIDATES` by a dual encoder, ranked anew by the sum of its score and the weighted fusion's.

    `first` and `fusion` hold the results of both by split, among them `val`, which chooses one of `WEIGHTS`.
    """
    scale = np.std(first["val"].scores) / (np.std(fusion["val"].scores) or 1.0)
    candidates = {split: _candidates(first[split], fusion[split]) for split in fusion}

    def ranked(split: str, weight: float) -> RetrievalResult:
        ways = candidates[split]
        return RetrievalResult(
            *(recall_at(dual + weight * scale * joint, own, CUTOFFS) for dual, joint, own in ways), weight=weight
        )

    best = max(WEIGHTS, key=lambda weight: ranked("val", weight).mean)
    return {split: ranked(split, best) for split in fusion}


def _candidates(first: RetrievalResult, fusion: RetrievalResult) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For images that search texts, and for texts that search images: both scores and which are right.

    Each is (query, candidate). All other texts or images rank behind them, further than any cutoff looks.
    """
    own = owners_of(fusion.pictures) == np.arange(len(fusion.pictures))[:, None]
    matrices, ways = (first.scores, fusion.scores, own), []
    for way in (matrices, tuple(matrix.T for matrix in matrices)):
        most = min(CANDIDATES, way[0].shape[1])
        best = np.argpartition(-way[0], most - 1, axis=1)[:, :most]
        ways.append(tuple(np.take_along_axis(matrix, best, axis=1) for matrix in way))
    return ways


def chance(pictures: Sequence[Picture]) -> RetrievalResult:
    """The expected recall of a random order; each query has a probability."""
    images, captions = len(pictures), len(texts_of(pictures))
    text, image = {}, {}
    for cutoff in CUTOFFS:
        shown = min(cutoff, captions)
        missed = [comb(captions - len(picture.captions), shown) / comb(captions, shown) for picture in pictures]
        text[cutoff] = 1 - np.array(missed)
        image[cutoff] = np.full(captions, min(1.0, cutoff / images))
    return RetrievalResult(text, image)


def owners_of(pictures: Sequence[Picture]) -> np.ndarray:
    """Row of the picture that each caption belongs to, (caption,)."""
    return np.repeat(np.arange(len(pictures)), [len(picture.captions) for picture in pictures])


RETRIEVAL = Retrieval(
    name="retrieval",
    labels=fixed_labels("unmatched", "matched"),
    metric="mean_recall",
    schedules={
        "tiny": TINY | {"retrieval": RetrievalSettings(search_images=100)},
        "paper": {
            "optim": OptimSettings(lr_visual=5e-5, decay_at=(5 / 10,), decay=0.5),
            "train": TrainSettings(epochs=10, images=32, accumulate=4),
        },
    },
)
