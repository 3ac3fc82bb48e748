"""Held-out evaluation of a pre-trained model: match decisions and hidden words, with and without the right image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vpworkbench.data.batches import IGNORE, Batch, Guide
from vpworkbench.data.inputs import Progress
from vpworkbench.data.records import Picture
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.probing import probe
from vpworkbench.scenes.language import ATTRIBUTE_WORDS
from vpworkbench.settings import DataSettings, PretrainSettings
from vpworkbench.stats import Interval, bootstrap_statistic, flatten
from vpworkbench.train.objective import Pretraining, group_batches


class HeldOut(NamedTuple):
    """Held-out results; each an interval over images."""

    itm_accuracy: Interval  # share of right match / no match decisions, on equal numbers of both; chance 0.5
    itm_other_image: Interval  # the same with another image: above 0.5, the label can be read off the text
    mlm_with_image: Interval  # share of single hidden words that are predicted right
    mlm_other_image: Interval  # the same with another image
    mlm_ratio: Interval  # of these two; of no meaning if no word is right with another image

    def summary(self) -> dict[str, float]:
        """Each mean under its name, its bounds under `_low` and `_high`."""
        return flatten(self._asdict())


@torch.no_grad()
def evaluate(
    model: VisualParsingModel,
    pictures: Sequence[Picture],
    data: DataSettings,
    *,
    images: int = 500,
    progress: Progress | None = None,
) -> HeldOut:
    """Match decisions and hidden words on held-out images that have a caption, at most `images` of them, not mirrored.

    One word of each text is hidden and predicted: in scenes a colour or a shape, in other sets any word. Nothing else
    is masked.
    """
    model.eval()
    pictures = [picture for picture in pictures if picture.captions]
    size = min(32, len(pictures))
    texts = min(5, max(len(picture.captions) for picture in pictures))  # more texts give narrower intervals
    groups = {"grouped": True, "flip": False, "matched_per_image": texts, "unmatched_per_image": texts}
    batches = group_batches(pictures, model, data.with_overrides(groups), images=size, seed=1)
    steps = max(1, min(images, len(pictures)) // size)
    scored = None
    if data.sets == ("scenes",):
        scored = torch.tensor(model.tokenizer.convert_tokens_to_ids(sorted(ATTRIBUTE_WORDS)))
    parts = []
    for step in range(steps):
        parts.append(_hits(model, batches[step], scored))
        if progress:
            progress("evaluating", step + 1, steps)
    return _intervals({name: torch.cat([hits[name] for hits in parts]).double().numpy() for name in parts[0]})


def _hits(model: VisualParsingModel, batch: Batch, scored: Tensor | None) -> dict[str, Tensor]:
    """Share of right match decisions, (image,); words predicted right and words hidden, (image, 2)."""
    images = len(batch.images)
    original = torch.where(batch.labels >= 0, batch.labels, batch.words)
    hidden, labels = _hide_one_word(model, original, batch.noise[:, 0], scored)
    visual = model.visual(batch.images.to(model.device))
    true = batch.matched_rows  # words are hidden in these texts only, equally many of each image
    labels, asked = labels[true], labels[true] >= 0
    original, hidden, tokens = (part.to(model.device) for part in (original, hidden[true], batch.word_tokens))
    own = batch.image_index.to(model.device)
    other = own.roll(-int((own == 0).sum()))
    hits = {}
    for itm, mlm, index in (("itm_accuracy", "mlm_with_image", own), ("itm_other_image", "mlm_other_image", other)):
        matches = model.itm(model.fuse(visual, original, tokens, image_index=index).cls).argmax(dim=-1).cpu()
        hits[itm] = (matches.bool() == batch.matched).float().view(images, -1).mean(dim=1)
        fused = model.fuse(visual, hidden, tokens[true], image_index=index[true])
        predicted = model.word_logits(fused.text).argmax(dim=-1).cpu()
        right = (predicted == labels) & asked
        hits[mlm] = torch.stack([part.sum(dim=1).view(images, -1).sum(dim=1) for part in (right, asked)], dim=1)
    return hits


def _hide_one_word(
    model: VisualParsingModel, words: Tensor, noise: Tensor, scored: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Hide one word of each text: one of `scored`, else any; ids with [MASK], and labels (`IGNORE` elsewhere)."""
    candidates = torch.from_numpy(model.words.maskable(words.numpy()))
    if scored is not None:
        candidates &= torch.isin(words, scored)
    # Multiples of the golden ratio, shifted by the noise of a text, put its words in a random order.
    order = (torch.arange(words.shape[1]) * 0.618 + noise[:, None]) % 1
    place = torch.where(candidates, order, -1).argmax(dim=1)
    chosen = torch.zeros_like(candidates).scatter_(1, place[:, None], True) & candidates
    return torch.where(chosen, model.tokenizer.mask_token_id, words), torch.where(chosen, words, IGNORE)


def _intervals(values: dict[str, np.ndarray]) -> HeldOut:
    """Means and 95% intervals by a bootstrap over images; `values` as `_hits` returns them."""

    def accuracy(name: str, images: np.ndarray) -> np.ndarray:
        return values[name][images].mean(axis=-1)

    def share(name: str, images: np.ndarray) -> np.ndarray:
        right_and_asked = values[name][images].sum(axis=-2)
        return right_and_asked[..., 0] / np.maximum(right_and_asked[..., 1], 1)

    def ratio(images: np.ndarray) -> np.ndarray:
        return share("mlm_with_image", images) / np.maximum(share("mlm_other_image", images), 1e-9)

    statistics = [partial(accuracy if name.startswith("itm") else share, name) for name in HeldOut._fields[:4]]
    count = len(values["itm_accuracy"])
    return HeldOut(*(bootstrap_statistic(statistic, count) for statistic in (*statistics, ratio)))


def held_out_probe(
    model: VisualParsingModel,
    pictures: Sequence[Picture],
    settings: PretrainSettings,
    *,
    images: int = 32,
    guide: Guide | None = None,
) -> dict[str, float]:
    """The numbers of `train.probe_every`, on the same held-out pictures each time.

    `flow` and `nmi` at the last layer (paper Fig. 3 and 5), and `held_out_loss`, the sum of Eq. 10 on one batch.
    """
    pictures = [picture for picture in pictures if picture.captions]
    count, objective, data = (
        min(images, len(pictures)),
        Pretraining(settings),
        settings.data.with_overrides({"flip": False}),
    )
    batch = group_batches(pictures, model, data, images=count, seed=settings.seed, guide=guide)[0]
    counts, sums = objective.counts(batch), objective.losses(model, batch.to(model.device))
    probed = probe(model, pictures, images=count, seed=settings.seed)
    return {
        "held_out_loss": sum(objective.weights[name] * float(sums[name]) / max(counts[name], 1) for name in sums),
        "flow": float(np.nanmean(probed.from_input[:, -1])),
        "nmi": float(np.nanmean(probed.nmi[:, -1])),
    }
