"""Groups of one image and several texts, as tensors: sampling, tokenising, word masks.

A batch is a pure function of seed and step: any number of workers prepares the same batches, and a resumed run
continues exactly where it stopped.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vpworkbench.data.inputs import VisualInput
from vpworkbench.data.records import Picture
from vpworkbench.data.steps import ImageBatch, Sampler
from vpworkbench.errors import DataError
from vpworkbench.losses import Select, scores_of_pick
from vpworkbench.model.words import Words
from vpworkbench.scenes.texts import pick
from vpworkbench.settings import DataSettings

log = logging.getLogger(__name__)

IGNORE = -100
"""Label of a word without a loss, as in PyTorch's cross entropy."""

DRAWS = 500
"""Pictures drawn in search of an unmatched text before the set is refused."""


@dataclass(frozen=True)
class PairBatch(ImageBatch):
    """Images, and pairs of them with texts, in image order; each pair is a row.

    Attributes
    ----------
    words : int64 Tensor, (text, word)
        Token ids: `[CLS] words [SEP] pads`.
    word_tokens : bool Tensor, (text, word)
        True at real positions, padding excluded.
    matched : bool Tensor, (text,)
    """

    words: Tensor
    word_tokens: Tensor
    matched: Tensor


@dataclass(frozen=True)
class Batch(PairBatch):
    """Groups of one image and its texts, with some words hidden.

    Attributes
    ----------
    labels : int64 Tensor, (text, word)
        The original id where a word is masked, `IGNORE` elsewhere.
    noise : float Tensor, (text, vision)
        Uniform numbers that decide the visual mask: the largest marks the pick.
    scores : float Tensor, (text, vision)
        How a `Guide` ranks the tokens for this pick; (text, 0) without one.
    """

    labels: Tensor
    noise: Tensor
    scores: Tensor

    @cached_property
    def scored(self) -> tuple[Tensor, Tensor]:
        """Rows and places of the words that MLM is scored on: hidden, in matched pairs."""
        return ((self.labels != IGNORE) & self.matched[:, None]).nonzero(as_tuple=True)

    @cached_property
    def matched_rows(self) -> Tensor:
        """Rows of the matched pairs."""
        return self.matched.nonzero()[:, 0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device; words and pairs are counted before, as a GPU would make the host wait."""
        moved = super().to(device)
        rows, places = (part.to(device, non_blocking=True) for part in self.scored)
        moved.__dict__.update(scored=(rows, places), matched_rows=self.matched_rows.to(device, non_blocking=True))
        return moved


class Guide(Protocol):
    """Ranks visual tokens for masks by what the model does not see: true objects, or another model."""

    select: Select

    def stack(self, images: Sequence[Picture], mirrored: np.ndarray | None = None) -> Tensor:
        """Scores of tokens (last axis) for each pick, (image, vision, vision); -inf between padding and anything."""


class MaskedWords(NamedTuple):
    """Token ids with some words hidden, and the labels of those; both int64 (text, word)."""

    words: np.ndarray
    labels: np.ndarray


def mask_words(
    words: np.ndarray, maskable: np.ndarray, rng: np.random.Generator, *, share: float, mask_id: int, vocabulary: int
) -> MaskedWords:
    """BERT's masking for MLM (paper Eq. 7): 15% of the words; of these 80% [MASK], 10% random, 10% kept.

    Parameters
    ----------
    words : int array, (text, word)
    maskable : bool array, (text, word)
        False at special tokens and pads. A text with a maskable word has at least one masked.
    """
    draw = rng.random(words.shape)
    hidden = (draw < share) & maskable
    first = np.where(maskable, draw, np.inf).argmin(axis=1)  # the word nearest to being masked, if none was
    forced = ~hidden.any(axis=1) & maskable.any(axis=1)
    hidden[forced, first[forced]] = True
    labels = np.where(hidden, words, IGNORE)
    kind = rng.random(words.shape)
    masked = np.where(hidden & (kind < 0.8), mask_id, words)
    masked = np.where(hidden & (kind >= 0.9), rng.integers(0, vocabulary, words.shape), masked)
    return MaskedWords(masked, labels)


class GroupBatches(Dataset):
    """Batches of groups by step: one image, its matched and its unmatched texts (paper Sec. 4.1).

    Parameters
    ----------
    pictures
        One split. Images come in the order of a permutation for each epoch. A picture that has only false statements
        starts no group; without `grouped` it may still replace the image of one of these statements.
    vision : int
        m, the number of visual tokens.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        words: Words,
        settings: DataSettings,
        *,
        images: int,
        inputs: VisualInput,
        vision: int,
        seed: int,
        guide: Guide | None = None,
    ) -> None:
        self.pictures = [picture for picture in pictures if picture.captions]
        if len(self.pictures) < 2:
            raise DataError(f"{len(self.pictures)} pictures with a true text: unmatched texts need at least two")
        self.stated_false = defaultdict(list)  # text -> the pictures that it is stated to be false of
        for picture in pictures:
            for text in picture.foils:
                self.stated_false[text].append(picture)
        if dropped := len(pictures) - len(self.pictures):
            log.warning("%d of %d pictures have no true text, so they start no group", dropped, len(pictures))
        self.words, self.settings = words, settings
        self.sampler = Sampler(self.pictures, images, seed=(seed, 1), distinct=False)
        self.inputs, self.vision, self.seed, self.guide = inputs, vision, seed, guide

    def __getitem__(self, step: int) -> Batch:
        return self.share(step, 0, 1)

    def share(self, step: int, index: int, count: int) -> Batch:
        """One of `count` equal parts of a step; the images of the others are not decoded."""
        rng = np.random.default_rng((self.seed, 0, step))
        groups = [self._group(picture, rng) for picture in self.sampler[step]]
        pairs = [(row, text, match) for row, (_, texts) in enumerate(groups) for text, match in texts]
        words = self.words.pad([text for _, text, _ in pairs])
        tokenizer, share = self.words.tokenizer, self.settings.word_share
        options = {"share": share, "mask_id": tokenizer.mask_token_id, "vocabulary": len(tokenizer)}
        # Unmatched texts are masked too: a [MASK] in the matched ones only would give the ITM label away.
        masked = mask_words(words, self.words.maskable(words, ends=self.settings.mask_end), rng, **options)
        start, stop = (len(groups) * part // count for part in (index, index + 1))
        mirrored = rng.random(len(groups))[start:stop] < 0.5 if self.settings.flip else None
        shown = [picture for picture, _ in groups[start:stop]]
        images = self.inputs.stack([picture.image for picture in shown], mirrored)
        noise = torch.from_numpy(rng.random((len(pairs), self.vision), dtype=np.float32))
        image_index = torch.tensor([row for row, _, _ in pairs])
        rows = (image_index >= start) & (image_index < stop)
        noise = noise[rows]
        if self.guide is None:
            scores = noise[:, :0]
        else:
            between = self.guide.stack(shown, mirrored)[image_index[rows] - start]
            padding = between.diagonal(dim1=1, dim2=2) == -torch.inf
            scores = scores_of_pick(between, noise.masked_fill(padding, -1).argmax(dim=1), self.guide.select)
        return Batch(
            images=images,
            image_index=image_index[rows] - start,
            words=torch.from_numpy(masked.words)[rows],
            word_tokens=torch.from_numpy(words != tokenizer.pad_token_id)[rows],
            labels=torch.from_numpy(masked.labels)[rows],
            matched=torch.tensor([match for _, _, match in pairs])[rows],
            noise=noise,
            scores=scores,
        )

    def _group(self, picture: Picture, rng: np.random.Generator) -> tuple[Picture, list[tuple[str, bool]]]:
        """The image that is shown and its texts, each with whether it matches."""
        if self.settings.grouped:
            matched = self._matched(picture, rng, self.settings.matched_per_image)
            unmatched = [self._unmatched(picture, rng) for _ in range(self.settings.unmatched_per_image)]
            return picture, [(text, True) for text in matched] + [(text, False) for text in unmatched]
        text = self._matched(picture, rng, 1)[0]
        if rng.random() < 0.5:  # paper Sec. 3.3: replace the image
            return self._replacement(text, rng), [(text, False)]
        return picture, [(text, True)]

    def _matched(self, picture: Picture, rng: np.random.Generator, count: int) -> list[str]:
        texts = picture.captions
        return [texts[i] for i in rng.choice(len(texts), count, replace=len(texts) < count)]

    def _unmatched(self, picture: Picture, rng: np.random.Generator) -> str:
        """A text that is stated to be false of a picture; if there is none, one of another picture."""
        if picture.foils:
            return pick(rng, picture.foils)
        for _ in range(DRAWS):
            other = pick(rng, self.pictures)
            text = pick(rng, other.captions + other.foils)
            if picture.denies(text):
                return text
        raise DataError(f"no text false of {picture.image} in {DRAWS} draws: the set needs more varied texts")

    def _replacement(self, text: str, rng: np.random.Generator) -> Picture:
        """A picture that `text` is stated to be false of; if there is none, any that it does not belong to."""
        if stated := self.stated_false.get(text):
            return pick(rng, stated)
        for _ in range(DRAWS):
            other = pick(rng, self.pictures)
            if other.denies(text):
                return other
        raise DataError(f"no image that {text!r} is false of in {DRAWS} draws: the set needs more varied texts")


def contact_sheet(pictures: Sequence[Picture], count: int) -> tuple[np.ndarray, list[str]]:
    """The first pictures that have a caption: uint8 (image, 128, 128, 3), and one caption each."""
    chosen = [picture for picture in pictures if picture.captions][:count]
    return np.stack([picture.image.pixels(128) for picture in chosen]), [picture.captions[0] for picture in chosen]
