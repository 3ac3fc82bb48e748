"""Image-text retrieval (paper Sec. 4.2, Table 4): the ITM head scores every image with every caption.

Visual tokens are computed once and kept, captions of like length go together, and pairs stream through the fusion in
large batches; both directions are read off one score matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from vpworkbench.data.batches import Words, stack_images
from vpworkbench.data.records import DataError, Picture
from vpworkbench.metrics import recall_at
from vpworkbench.model import VisualParsingModel
from vpworkbench.probes.intervals import Interval, bootstrap_interval
from vpworkbench.visual import VisualTokens

DRAWS = 100
IMAGES_AT_ONCE = 32


@dataclass(frozen=True)
class PairBatch:
    """Images, texts, and which pairs of them are scored.

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

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch on a device."""
        return PairBatch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def micro_batches(self, count: int) -> list[PairBatch]:
        """Split by pairs; images that no pair of a part shows are left out of it."""
        parts = []
        for rows in torch.arange(len(self.matched)).chunk(count):
            used, image_index = self.image_index[rows].unique(return_inverse=True)
            said, text_index = self.text_index[rows].unique(return_inverse=True)
            parts.append(
                PairBatch(self.images[used], self.words[said], self.word_tokens[said], image_index, text_index,
                          self.matched[rows])
            )  # fmt: skip
        return parts


class RetrievalBatches(Dataset):
    """Images with one caption each, and as many unmatched pairs from the batch; a pure function of seed and step.

    A negative is never a caption of the same image, nor one that is said of it in the same words.
    """

    def __init__(
        self, pictures: Sequence[Picture], words: Words, *, images: int, image_px: int, negatives: int, seed: int
    ) -> None:
        self.pictures = [picture for picture in pictures if picture.captions]
        if images < 2 or len(self.pictures) < images:
            raise DataError(
                f"{len(self.pictures)} captioned images: a batch of {images} needs as many, and at least two"
            )
        self.words, self.images, self.image_px = words, images, image_px
        self.negatives, self.seed = negatives, seed
        self.steps_per_epoch = len(self.pictures) / images

    def __getitem__(self, step: int) -> PairBatch:
        rng = np.random.default_rng((self.seed, 1, step))
        epoch, start = divmod(step * self.images, len(self.pictures))
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.pictures))
        chosen = [self.pictures[n] for n in order.take(range(start, start + self.images), mode="wrap")]
        texts = [picture.captions[int(rng.integers(len(picture.captions)))] for picture in chosen]
        pairs = [(row, row, True) for row in range(len(chosen))]
        pairs += [(row, other, False) for row in range(len(chosen)) for other in self._others(chosen, texts, row, rng)]
        words, word_tokens = self.words.tensors(texts)
        image_index, text_index, matched = zip(*pairs, strict=True)
        return PairBatch(stack_images(chosen, self.image_px), words, word_tokens, torch.tensor(image_index),
                         torch.tensor(text_index), torch.tensor(matched))  # fmt: skip

    def _others(self, chosen: Sequence[Picture], texts: Sequence[str], row: int, rng: np.random.Generator) -> list[int]:
        fitting = [other for other, text in enumerate(texts) if other != row and chosen[row].denies(text)]
        if not fitting:
            return []
        return [int(other) for other in rng.choice(fitting, min(self.negatives, len(fitting)), replace=False)]


class Matching:
    """Binary cross entropy of match or not by the ITM head, matched and unmatched pairs weighing the same."""

    weights = {"matched": 0.5, "unmatched": 0.5}

    def counts(self, batch: PairBatch) -> dict[str, int]:
        matched = int(batch.matched.sum())
        return {"matched": matched, "unmatched": len(batch.matched) - matched}

    def losses(self, model: VisualParsingModel, batch: PairBatch) -> dict[str, Tensor]:
        visual = model.visual(batch.images)
        words, word_tokens = batch.words[batch.text_index], batch.word_tokens[batch.text_index]
        joint = model.fuse(visual, words, word_tokens, image_index=batch.image_index)
        each = functional.cross_entropy(model.itm(joint.cls).float(), batch.matched.long(), reduction="none")
        return {"matched": each[batch.matched].sum(), "unmatched": each[~batch.matched].sum()}

    def watch(self, model: VisualParsingModel, batch: PairBatch) -> dict[str, float]:
        return {}


@torch.no_grad()
def score_matrix(
    model: VisualParsingModel,
    pictures: Sequence[Picture],
    captions: Sequence[str],
    *,
    pairs: int = 512,
    file: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> np.ndarray:
    """Match score of every image with every caption, float32 (image, caption): logit of match less that of not.

    Parameters
    ----------
    pairs : int
        In one pass of the fusion.
    file : Path or None
        Keeps the rows that are done (`.npy`, nan elsewhere): a stopped call goes on there.

    Raises
    ------
    ValueError
        If the file holds the scores of other numbers of images or captions.
    """
    model.eval()
    scores = _kept(file, (len(pictures), len(captions)))
    todo = [row for row in range(len(pictures)) if np.isnan(scores[row]).any()]
    buckets = _buckets(model.words, captions, pairs)
    for start in range(0, len(todo), IMAGES_AT_ONCE):
        rows = todo[start : start + IMAGES_AT_ONCE]
        pixels = stack_images([pictures[row] for row in rows], model.settings.visual.image_px)
        visual = model.visual(pixels.to(model.device))
        for columns, words, word_tokens in buckets:
            scores[np.ix_(rows, columns)] = _scores(model, visual, words, word_tokens, pairs)
        if isinstance(scores, np.memmap):
            scores.flush()
        if progress:
            progress("scoring images", len(pictures) - len(todo) + start + len(rows), len(pictures))
    return np.array(scores)


def _scores(
    model: VisualParsingModel, visual: VisualTokens, words: Tensor, word_tokens: Tensor, pairs: int
) -> np.ndarray:
    """(image, text) of some images and the texts of one bucket."""
    texts, images = len(words), len(visual.features)
    at_once = max(1, pairs // texts)
    found = []
    for some in torch.arange(images, device=words.device).split(at_once):
        image_index = some.repeat_interleave(texts)
        joint = model.fuse(
            visual, words.repeat(len(some), 1), word_tokens.repeat(len(some), 1), image_index=image_index
        )
        logits = model.itm(joint.cls).float()
        found.append((logits[:, 1] - logits[:, 0]).view(len(some), texts))
    return torch.cat(found).cpu().numpy()


def _buckets(words: Words, captions: Sequence[str], pairs: int) -> list[tuple[list[int], Tensor, Tensor]]:
    """Captions of like length together, at most `pairs` in each: places, ids, real tokens."""
    order = sorted(range(len(captions)), key=lambda place: len(words.ids(captions[place])))
    size = max(1, min(pairs, 64))
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return [(part, *words.tensors([captions[place] for place in part])) for part in parts]


def _kept(file: Path | None, shape: tuple[int, int]) -> np.ndarray:
    if file is None:
        return np.full(shape, np.nan, dtype=np.float32)
    if file.exists():
        found = np.load(file, mmap_mode="r+")
        if found.shape != shape:
            raise ValueError(f"{file}: scores of {found.shape}, now {shape} images and captions; take another file")
        return found
    kept = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    kept[:] = np.nan
    return kept


class RetrievalResult(NamedTuple):
    """Recall of both directions, by query: 1 where one of the K best is right.

    Attributes
    ----------
    text : dict
        K -> array, (image,): the texts of an image are looked for (TR).
    image : dict
        K -> array, (caption,): the image of a text is looked for (IR).
    """

    text: dict[int, np.ndarray]
    image: dict[int, np.ndarray]

    def intervals(self, *, seed: int = 0) -> dict[str, Interval]:
        """`TR R@1` and so on, means with bootstrap 95% intervals over queries."""
        both = {"TR": self.text, "IR": self.image}
        return {
            f"{way} R@{cutoff}": bootstrap_interval(found, seed)
            for way, recalls in both.items() for cutoff, found in recalls.items()
        }  # fmt: skip


def retrieval_result(
    scores: np.ndarray, pictures: Sequence[Picture], cutoffs: Sequence[int] = (1, 5, 10)
) -> RetrievalResult:
    """Recall from a score matrix whose captions are those of the pictures, in their order.

    Parameters
    ----------
    scores : array, (image, caption)
    """
    owner = np.repeat(np.arange(len(pictures)), [len(picture.captions) for picture in pictures])
    if scores.shape != (len(pictures), len(owner)):
        raise ValueError(f"scores are {scores.shape}, but the pictures have {len(owner)} captions")
    own = owner == np.arange(len(pictures))[:, None]
    return RetrievalResult(recall_at(scores, own, cutoffs), recall_at(scores.T, own.T, cutoffs))


def captions_of(pictures: Sequence[Picture]) -> list[str]:
    """All captions, in the order of their pictures."""
    return [text for picture in pictures for text in picture.captions]
