"""Image-text retrieval (paper Sec. 4.2, Table 4): the ITM head scores every image with every caption.

Visual tokens are computed once and kept, captions of one length go together, and pairs stream through the fusion in
large batches; both directions are read off one score matrix.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vpworkbench.data.inputs import VisualInput, visual_input
from vpworkbench.data.records import Picture
from vpworkbench.data.steps import Sampler, TensorBatch
from vpworkbench.errors import DataError
from vpworkbench.losses import Objective
from vpworkbench.metrics import recall_at
from vpworkbench.model.words import Words
from vpworkbench.stats import Interval, bootstrap_interval, flatten, mean_of_independent
from vpworkbench.system import write_atomically
from vpworkbench.tasks.task import TaskModel

CUTOFFS = (1, 5, 10)
IMAGES_AT_ONCE = 32
FEWEST_TEXTS = 16


@dataclass(frozen=True)
class PairBatch(TensorBatch):
    """Images, texts, and which pairs of them are scored, in the order of the images.

    Attributes
    ----------
    images : uint8 Tensor, (image, 3, height, width)
    words, word_tokens : Tensor, (text, word)
    image_index, text_index : int64 Tensor, (pair,)
    matched : bool Tensor, (pair,)
    """

    images: Tensor
    words: Tensor
    word_tokens: Tensor
    image_index: Tensor
    text_index: Tensor
    matched: Tensor

    def micro_batches(self, count: int) -> list[PairBatch]:
        """Split by images, each with its pairs: no image is encoded twice."""
        parts = []
        for rows in torch.arange(len(self.images)).chunk(count):
            first, last = int(rows[0]), int(rows[-1])
            pairs = (self.image_index >= first) & (self.image_index <= last)
            said, text_index = self.text_index[pairs].unique(return_inverse=True)
            parts.append(
                PairBatch(self.images[first : last + 1], self.words[said], self.word_tokens[said],
                          self.image_index[pairs] - first, text_index, self.matched[pairs])
            )  # fmt: skip
        return parts


class RetrievalBatches(Dataset):
    """Images with one caption each, and unmatched pairs from the same batch; a pure function of seed and step.

    A negative is never a caption of the same image, nor one that is said of it in the same words; where there is
    ground truth it is false of the image. An epoch shows each image once.

    Attributes
    ----------
    pictures : list of Picture
        Those that have captions.
    near : int array or None, (picture, caption)
        Set from outside (`dual.near_captions`): unmatched captions are drawn from these, places among all captions of
        the pictures, and not from the batch.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        words: Words,
        *,
        images: int,
        inputs: VisualInput,
        negatives: int,
        seed: int,
        flip: bool = False,
    ) -> None:
        self.pictures = [picture for picture in pictures if picture.captions]
        if images < 2 or len(self.pictures) < images:
            raise DataError(
                f"{len(self.pictures)} captioned images: a batch of {images} needs as many, and at least two"
            )
        self.sampler = Sampler(self.pictures, images, seed=(seed, 0))
        self.words, self.inputs = words, inputs
        self.negatives, self.seed, self.flip = negatives, seed, flip
        self.near: np.ndarray | None = None
        self._captions = captions_of(self.pictures)

    def of(self, images: int) -> RetrievalBatches:
        """The same pairs in batches of another size."""
        return RetrievalBatches(self.pictures, self.words, images=images, inputs=self.inputs,
                                negatives=self.negatives, seed=self.seed, flip=self.flip)  # fmt: skip

    def chosen(self, step: int) -> tuple[list[int], list[str], np.random.Generator]:
        """Rows of the pictures of a step, a caption of each, and what further draws are made from."""
        rng = np.random.default_rng((self.seed, 1, step))
        rows = self.sampler.rows(step)
        captions = [self.pictures[row].captions for row in rows]
        return rows, [texts[int(rng.integers(len(texts)))] for texts in captions], rng

    def __getitem__(self, step: int) -> PairBatch:
        rows, texts, rng = self.chosen(step)
        pairs = []
        for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
            pairs.append((place, text, True))
            others = texts if self.near is None else [self._captions[other] for other in self.near[row]]
            pairs += [(place, other, False) for other in self._unmatched(self.pictures[row], others, rng)]
        image_index, said, matched = zip(*pairs, strict=True)
        places = {text: place for place, text in enumerate(dict.fromkeys(said))}
        words, word_tokens = self.words.tensors(list(places))
        return PairBatch(
            images=self.pixels([self.pictures[row] for row in rows], rng),
            words=words,
            word_tokens=word_tokens,
            image_index=torch.tensor(image_index),
            text_index=torch.tensor([places[text] for text in said]),
            matched=torch.tensor(matched),
        )

    def _unmatched(self, picture: Picture, texts: Sequence[str], rng: np.random.Generator) -> list[str]:
        """Of these texts some that are false of a picture."""
        fitting = [text for text in dict.fromkeys(texts) if picture.denies(text)]
        return [fitting[place] for place in rng.permutation(len(fitting))[: self.negatives]]

    def pixels(self, pictures: Sequence[Picture], rng: np.random.Generator) -> Tensor:
        """uint8 (image, 3, height, width), half of them mirrored where that is asked for."""
        images = self.inputs.stack(pictures)
        if self.flip:
            mirrored = torch.from_numpy(rng.random(len(images)) < 0.5)
            images[mirrored] = images[mirrored].flip(-1)
        return images


class Matching(Objective):
    """Binary cross entropy of match or not by the ITM head, matched and unmatched pairs weighing the same."""

    weights = {"matched": 0.5, "unmatched": 0.5}

    def counts(self, batch: PairBatch) -> dict[str, int]:
        matched = int(batch.matched.sum())
        return {"matched": matched, "unmatched": len(batch.matched) - matched}

    def losses(self, model: TaskModel, batch: PairBatch) -> dict[str, Tensor]:
        visual, index = model.base.visual(batch.images), batch.image_index
        vision = model.base.fusion.embed_vision(visual)
        seen = None if visual.tokens is None else visual.tokens[index]
        words, word_tokens = batch.words[batch.text_index], batch.word_tokens[batch.text_index]
        logits = model.head(model.base.fusion.cls_output(words, word_tokens, vision[index], seen))
        each = functional.cross_entropy(logits.float(), batch.matched.long(), reduction="none")
        return {"matched": each[batch.matched].sum(), "unmatched": each[~batch.matched].sum()}


# ---------------------------------------------------------------------------------------------- the score matrix


@torch.no_grad()
def score_matrix(
    model: TaskModel,
    pictures: Sequence[Picture],
    captions: Sequence[str],
    *,
    pairs: int = 512,
    bf16: bool = False,
    file: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> np.ndarray:
    """Match score of every image with every caption, float32 (image, caption): logit of match less that of not.

    Parameters
    ----------
    pairs : int
        In one pass of the fusion, about.
    bf16 : bool
        bfloat16 autocast, on a GPU only: scores then agree to two or three digits.
    file : Path or None
        `.npy` that keeps the rows that are done (nan elsewhere): a stopped call goes on there. The `.json` beside it
        says of which weights, images and captions.

    Raises
    ------
    ValueError
        If the file holds the scores of other weights, images or captions, or bf16 is asked for on a CPU.
    """
    if bf16 and model.device.type != "cuda":
        raise ValueError("bf16 scores are for a GPU; leave it off on a CPU")
    model.eval()
    scores = _kept(file, (len(pictures), len(captions)), model, pictures, captions)
    todo = [row for row in range(len(pictures)) if np.isnan(scores[row]).any()]
    groups = [[part.to(model.device) for part in group] for group in _alike(model.words, captions)]
    autocast = torch.autocast("cuda", dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()
    done = len(pictures) - len(todo)
    with autocast, tqdm(total=scores.size, initial=done * len(captions), desc="scoring", unit="pair", unit_scale=True,
                        smoothing=0) as bar:  # fmt: skip
        for start in range(0, len(todo), IMAGES_AT_ONCE):
            rows = todo[start : start + IMAGES_AT_ONCE]
            pixels = visual_input(model.base.settings.visual).stack([pictures[row] for row in rows])
            visual = model.base.visual(pixels.to(model.device))
            vision, seen = model.base.fusion.embed_vision(visual), visual.not_padding()
            block = vision.new_empty(len(rows), len(captions), dtype=torch.float32)
            for columns, words, word_tokens in groups:
                for some in torch.arange(len(rows), device=model.device).split(max(1, pairs // len(words))):
                    block[some[:, None], columns] = _scores(model, vision[some], seen[some], words, word_tokens)
                    bar.update(len(some) * len(words))
            scores[rows] = block.cpu().numpy()
            done += len(rows)
            if isinstance(scores, np.memmap):
                scores.flush()
            if progress:
                progress("scoring images", done, len(pictures))
    return np.array(scores)


def _scores(model: TaskModel, vision: Tensor, seen: Tensor, words: Tensor, word_tokens: Tensor) -> Tensor:
    """(image, text) of all pairs of some images and some texts."""
    images, texts = len(vision), len(words)
    cls = model.base.fusion.cls_output(
        words.repeat(images, 1),
        word_tokens.repeat(images, 1),
        vision.repeat_interleave(texts, dim=0),
        seen.repeat_interleave(texts, dim=0),
    )
    logits = model.head(cls).float()
    return (logits[:, 1] - logits[:, 0]).view(images, texts)


def _alike(words: Words, captions: Sequence[str], most: int = 64) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Captions of one length together: places, ids, real tokens. Lengths that few have share a group, padded."""
    order = sorted(range(len(captions)), key=lambda place: len(words.ids(captions[place])))
    group: list[int] = []
    for place, following in zip(order, [*order[1:], None], strict=True):
        group.append(place)
        ends = following is None or len(words.ids(captions[following])) > len(words.ids(captions[place]))
        if following is None or len(group) == most or (ends and len(group) >= FEWEST_TEXTS):
            yield torch.tensor(group), *words.tensors([captions[place] for place in group])
            group = []


def _kept(
    file: Path | None, shape: tuple[int, int], model: TaskModel, pictures: Sequence[Picture], captions: Sequence[str]
) -> np.ndarray:
    if file is None:
        return np.full(shape, np.nan, dtype=np.float32)
    told, about = file.with_suffix(".json"), _about(model, pictures, captions)
    if file.exists() and told.exists():
        before = json.loads(told.read_text())
        if other := [name for name in about if before.get(name) != about[name]]:
            raise ValueError(f"{file}: scores of other {', '.join(other)}; delete it, or take another file")
        return np.load(file, mmap_mode="r+")
    kept = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    kept[:] = np.nan
    write_atomically(told, json.dumps(about, indent=2) + "\n")
    return kept


def _about(model: TaskModel, pictures: Sequence[Picture], captions: Sequence[str]) -> dict[str, str]:
    """Hashes of all that the scores depend on."""
    weights = hashlib.blake2b(digest_size=8)
    for tensor in model.state_dict().values():
        weights.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())

    def digest(lines: Sequence[str]) -> str:
        return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()

    return {
        "weights": weights.hexdigest(),
        "images": digest([picture.image.name for picture in pictures]),
        "captions": digest(captions),
    }


# ------------------------------------------------------------------------------------------------------- recall


class RetrievalResult(NamedTuple):
    """Recall of both directions, by query: 1 where one of the K best is right.

    Attributes
    ----------
    text : dict
        K -> array, (image,): the texts of an image are looked for (TR).
    image : dict
        K -> array, (caption,): the image of a text is looked for (IR).
    by_truth : RetrievalResult or None
        The same where a caption is right for every image that it is known to be true of: the official metric counts a
        caption's own image alone, so a scene's "there is a red square", found in another scene that has one, is an
        error to it. On generated scenes alone the two can be told apart.
    scores : array or None, (image, caption)
        What it was made from.
    pictures : tuple of Picture
    """

    text: dict[int, np.ndarray]
    image: dict[int, np.ndarray]
    by_truth: RetrievalResult | None = None
    scores: np.ndarray | None = None
    pictures: tuple[Picture, ...] = ()

    def intervals(self, *, seed: int = 0) -> dict[str, Interval]:
        """`TR R@1` and so on, means with bootstrap 95% intervals over queries."""
        both = {"TR": self.text, "IR": self.image}
        return {
            f"{way} R@{cutoff}": bootstrap_interval(found, seed)
            for way, recalls in both.items() for cutoff, found in recalls.items()
        }  # fmt: skip

    def interval(self, *, seed: int = 0) -> Interval:
        """Mean of the recalls, each direction and cutoff weighing the same, with its 95% interval."""
        ways = [bootstrap_interval(np.mean(list(found.values()), axis=0), seed) for found in (self.text, self.image)]
        return mean_of_independent(ways)  # images and texts as if drawn independently

    def summary(self, examples: Sequence[Picture] = (), *, seed: int = 0) -> dict[str, float]:
        """Flat: `mean_recall`, `tr_r1` and so on, bounds under `_low` and `_high`; `tr_r1_by_truth` where it is known.

        Parameters
        ----------
        examples
            Not needed, as they are at hand; `TaskResult` wants them.
        """
        intervals = {"mean_recall": self.interval(seed=seed), **self.intervals(seed=seed)}
        flat = flatten({name.lower().replace(" r@", "_r"): interval for name, interval in intervals.items()})
        if self.by_truth is not None:
            for way, found in (("tr", self.by_truth.text), ("ir", self.by_truth.image)):
                flat |= {f"{way}_r{cutoff}_by_truth": float(right.mean()) for cutoff, right in found.items()}
        return flat

    def save(self, path: str | Path) -> None:
        """Write the ten best of every query, as csv: `TR`, an image's id and texts, or `IR`, a text and images' ids."""
        captions, names = captions_of(self.pictures), [picture.id for picture in self.pictures]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            for way, queries, candidates, scores in (
                ("TR", names, captions, self.scores),
                ("IR", captions, names, self.scores.T),
            ):
                best = np.argsort(-scores, axis=1, kind="stable")[:, : max(CUTOFFS)]
                for query, row in zip(queries, best, strict=True):
                    table.writerow([way, query, *(candidates[place] for place in row)])


def retrieval_result(
    scores: np.ndarray, pictures: Sequence[Picture], cutoffs: Sequence[int] = CUTOFFS
) -> RetrievalResult:
    """Recall from a score matrix whose captions are those of the pictures, in their order.

    Parameters
    ----------
    scores : array, (image, caption)
    """
    owner = owners_of(pictures)
    if scores.shape != (len(pictures), len(owner)):
        raise ValueError(f"scores are {scores.shape}, but the pictures have {len(owner)} captions")
    own = owner == np.arange(len(pictures))[:, None]

    def recall(right: np.ndarray) -> RetrievalResult:
        return RetrievalResult(recall_at(scores, right, cutoffs), recall_at(scores.T, right.T, cutoffs))

    by_truth = None
    if any(picture.scene is not None for picture in pictures):
        captions = captions_of(pictures)
        by_truth = recall(own | np.array([[picture.affirms(text) for text in captions] for picture in pictures]))
    return recall(own)._replace(by_truth=by_truth, scores=np.asarray(scores), pictures=tuple(pictures))


def evaluate_retrieval(model: TaskModel, pictures: Sequence[Picture], **options: Any) -> RetrievalResult:
    """Score all pairs of the pictures and all their captions; `options` are those of `score_matrix`."""
    return retrieval_result(score_matrix(model, pictures, captions_of(pictures), **options), pictures)


def chance(pictures: Sequence[Picture], cutoffs: Sequence[int] = CUTOFFS) -> RetrievalResult:
    """The recall that is expected of a random order; each query's is a probability."""
    images, captions = len(pictures), sum(len(picture.captions) for picture in pictures)
    text, image = {}, {}
    for cutoff in cutoffs:
        shown = min(cutoff, captions)
        missed = [comb(captions - len(picture.captions), shown) / comb(captions, shown) for picture in pictures]
        text[cutoff] = 1 - np.array(missed)
        image[cutoff] = np.full(captions, min(1.0, cutoff / images))
    return RetrievalResult(text, image)


def owners_of(pictures: Sequence[Picture]) -> np.ndarray:
    """Row of the picture of each caption, (caption,)."""
    return np.repeat(np.arange(len(pictures)), [len(picture.captions) for picture in pictures])


def captions_of(pictures: Sequence[Picture]) -> list[str]:
    """All captions, in the order of their pictures."""
    return [text for picture in pictures for text in picture.captions]
