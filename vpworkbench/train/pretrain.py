"""Pre-training as the paper has it (Sec. 3.3 and 4.1): data, model, the joint objective, held-out evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import BertTokenizerFast

from vpworkbench.data.batches import Batch, GroupBatches
from vpworkbench.data.inputs import PixelCache, VisualInput, visual_input
from vpworkbench.data.records import Picture
from vpworkbench.data.splits import cache_root, load_splits
from vpworkbench.errors import DataError
from vpworkbench.losses import (
    code_mask,
    hide_pixels,
    image_text_matching,
    masked_feature_regression,
    masked_language_modeling,
    masked_visual_modeling,
    token_alignment,
    transport_distance,
    visual_mask,
)
from vpworkbench.model.model import Joint, VisualParsingModel
from vpworkbench.model.visual import VisualTokens, build_visual
from vpworkbench.model.weights import KeyReport, freeze_batch_norm, start_text, start_visual
from vpworkbench.model.words import build_tokenizer, build_vocabulary, wordpiece_tokenizer
from vpworkbench.probing import probe
from vpworkbench.runs import Run
from vpworkbench.scenes.language import ATTRIBUTE_WORDS
from vpworkbench.settings import DataSettings, ModelSettings, PretrainSettings
from vpworkbench.stats import Interval, bootstrap_statistic, flatten
from vpworkbench.train.engine import fit
from vpworkbench.train.processes import launch, launched

log = logging.getLogger(__name__)


def with_words_of(model: VisualParsingModel, texts: Iterable[str]) -> VisualParsingModel:
    """The model with what its vocabulary lacks of `texts` behind it: captions ask no questions, a task has new words.

    New rows of the embedding are drawn as the others once were; all else is kept.
    """
    known = model.tokenizer.get_vocab()
    fresh = [entry for entry in build_vocabulary(texts) if entry not in known]
    if not fresh:
        return model
    grown = VisualParsingModel(
        model.settings, wordpiece_tokenizer(known | {entry: len(known) + number for number, entry in enumerate(fresh)})
    )
    state = grown.state_dict()
    for name, tensor in model.state_dict().items():
        if state[name].shape == tensor.shape:
            state[name] = tensor
        else:
            state[name][: len(known)] = tensor  # the word embedding and the bias over words
    grown.load_state_dict(state)
    return grown.to(model.device).eval()


def build_model(settings: PretrainSettings, tokenizer: BertTokenizerFast) -> tuple[VisualParsingModel, list[KeyReport]]:
    """The model of a run, seeded and started from `init_visual` and `init_text`; with the reports of keys."""
    if not settings.init_visual and settings.optim.lr_visual < 5e-5:
        log.warning(
            "visual side from scratch at optim.lr_visual %g: it will hardly learn; the paper starts from ImageNet "
            "(init_visual), a start from scratch needs a rate of about 2e-4",
            settings.optim.lr_visual,
        )
    torch.manual_seed(settings.seed)
    shape = ModelSettings(visual=settings.visual, fusion=settings.fusion, text_tokens=settings.data.text_tokens)
    model = VisualParsingModel(shape, tokenizer)
    reports = []
    if settings.init_visual:
        reports.append(start_visual(model.visual, settings.init_visual, preset=settings.preset))
        freeze_batch_norm(model)
    if settings.init_text:
        reports.append(start_text(model.fusion, settings.init_text))
    return model, reports


class Pretraining:
    """MLM + lambda1 (ITM + 0.1 VLA) + lambda2 MFR, all from one forward (paper Eq. 10); or MVM for MFR, as in SOHO."""

    def __init__(self, settings: PretrainSettings) -> None:
        self.settings = settings
        loss = settings.loss
        self.weights: Mapping[str, float] = {
            "mlm": 1.0, "itm": loss.itm, "vla": loss.itm * loss.vla, "mfr": loss.mfr, "mvm": loss.mvm,
        }  # fmt: skip
        self.budget = settings.mask.tokens_of(settings.visual)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Hidden words of matched pairs; pairs; matched pairs."""
        pairs, matched = len(batch.matched), int(batch.matched.sum())
        return {"mlm": len(batch.scored[0]), "itm": pairs, "vla": pairs, "mfr": matched, "mvm": matched}

    def losses(self, model: VisualParsingModel, batch: Batch) -> dict[str, Tensor]:
        """Sums over a batch; the image is encoded once for all its texts.

        With masks in the pixels it is parsed twice, whole for the masks and the target of MFR, hidden for the fusion.
        """
        in_pixels = self.settings.mask.mode != "none" and self.settings.mask.where == "pixels"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not in_pixels):
            visual = model.visual(batch.images)
        if self.settings.visual.sampled and model.training:
            visual = visual.subset(self.sampled(batch))
        masked = self.masked(visual, batch)
        seen = visual
        if in_pixels:
            seen = model.visual(hide_pixels(batch.images, masked[_first_texts(batch)]))
        joint = model.fuse(seen, batch.words, batch.word_tokens, image_index=batch.image_index, masked=masked)
        sums = {
            "mlm": masked_language_modeling(model.word_logits(joint.text[batch.scored]), batch.labels[batch.scored]),
            "itm": image_text_matching(model.itm(joint.cls), batch.matched),
        }
        if self.weights["vla"]:
            sums["vla"] = token_alignment(word_distance(model, joint, batch), batch.matched)
        if self.settings.mask.mode == "code":
            rows = batch.matched_rows
            codes = visual.codes[batch.image_index[rows]]
            sums["mvm"] = masked_visual_modeling(model.mvm(joint.vision[rows]), codes, masked[rows])
        elif masked is not None:
            rows = batch.matched_rows[:, None]
            # Each row hides k tokens: their places, in order, without asking a GPU how many there are.
            hidden = masked[batch.matched_rows].byte().topk(self.budget, dim=1).indices.sort(dim=1).values
            target = visual.features[batch.image_index[rows], hidden].flatten(0, 1)
            predicted = model.mfr(joint.vision[rows, hidden].flatten(0, 1))
            if visual.tokens is not None:  # fewer are hidden where an image has few regions: the others have no error
                predicted = torch.where(masked[rows, hidden].flatten()[:, None], predicted, target.to(predicted))
            sums["mfr"] = masked_feature_regression(predicted, target, reduction=self.settings.loss.mfr_reduction)
        return sums

    def sampled(self, batch: Batch) -> Tensor:
        """Places of the tokens that pre-training sees, in order; int64 (image, chosen).

        By the noise of each image's first text. The order inside the chosen ones, which its mask goes by, is as random
        as before.
        """
        return batch.noise[_first_texts(batch)].topk(self.settings.visual.sampled, dim=1).indices.sort(dim=1).values

    def masked(self, visual: VisualTokens, batch: Batch) -> Tensor | None:
        """Visual tokens to hide, bool (text, vision), in matched and unmatched pairs alike; None in mode `none`.

        In the pixels the texts of an image share its mask.
        """
        mask = self.settings.mask
        if mask.mode == "none":
            return None
        noise = batch.noise if visual.positions is None else batch.noise.gather(1, visual.positions[batch.image_index])
        ranked = None
        if mask.mode == "attention":
            ranked = visual.parsing.detach().mean(dim=1)[batch.image_index]
        vision_tokens = None if visual.tokens is None else visual.tokens[batch.image_index]
        if mask.mode == "code":
            masked = code_mask(noise, visual.codes[batch.image_index])
        else:
            masked = visual_mask(noise, self.budget, parsing=ranked, select=mask.select, vision_tokens=vision_tokens)
        if mask.where == "pixels":
            masked = masked[torch.searchsorted(batch.image_index, batch.image_index)]  # that of the first text
        return masked

    @torch.no_grad()
    def watch(self, model: VisualParsingModel, batch: Batch) -> dict[str, float]:
        """Variance and effective rank of the visual features: the target of MFR collapses where they fall.

        Of a visual dictionary also how many codes are dead.
        """
        training = model.training
        visual = model.eval().visual(batch.images[:16])
        features = visual.features.float().flatten(0, 1)
        if visual.tokens is not None:
            features = features[visual.tokens.flatten()]
        model.train(training)
        dictionary = getattr(model.visual, "dictionary", None)
        return {"target_variance": features.var(dim=0).mean().item(), "target_rank": effective_rank(features)} | (
            {} if dictionary is None else {"dead_codes": float(dictionary.dead)}
        )


def _first_texts(batch: Batch) -> Tensor:
    """Row of the first text of each image."""
    return torch.searchsorted(batch.image_index, torch.arange(len(batch.images), device=batch.words.device))


def word_distance(model: VisualParsingModel, joint: Joint, batch: Batch) -> Tensor:
    """OT distance of each pair, [CLS], [SEP] and pads left out; (text,)."""
    tokenizer = model.tokenizer
    words = batch.word_tokens & (batch.words != tokenizer.cls_token_id) & (batch.words != tokenizer.sep_token_id)
    with torch.autocast(batch.words.device.type, enabled=False):  # 50 iterations in bfloat16 would drift
        vision_tokens = joint.visual.for_texts(batch.image_index).not_padding()
        return transport_distance(joint.text, joint.vision, words, vision_tokens)


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the covariance's spectrum; (row, channel) -> [1, channels]."""
    values = torch.linalg.eigvalsh(torch.cov(features.T.double().cpu())).clamp(min=0)
    shares = values / values.sum().clamp(min=1e-12)
    return float(torch.special.entr(shares).sum().exp())


@dataclass(frozen=True)
class Prepared:
    """A run's data and model, ready to train and to look at."""

    splits: dict[str, list[Picture]]
    model: VisualParsingModel
    reports: list[KeyReport]
    scored_words: frozenset[str] | None


def prepare(settings: PretrainSettings) -> Prepared:
    """Read the data, build the tokenizer and the model; all that can be refused is refused here.

    Raises
    ------
    DataError, CheckpointError, SettingsError
        Each naming the file or the setting and the remedy.
    """
    build_visual(settings.visual)  # a backbone that timm does not have is told before scenes are drawn
    inputs = visual_input(settings.visual)  # and a folder that is not there
    splits = load_splits(settings.data)
    inputs.check([picture for part in splits.values() for picture in part])
    texts = [text for picture in splits["train"] for text in picture.captions + picture.foils]
    tokenizer = build_tokenizer(texts, settings.init_text)
    model, reports = build_model(settings, tokenizer)
    model.words.check(texts, source=", ".join(settings.data.sets))
    if not splits["val"]:
        raise DataError(f"{', '.join(settings.data.sets)}: no `val` images; held-out figures need some")
    return Prepared(splits, model, reports, scored_words(settings.data))


def scored_words(data: DataSettings) -> frozenset[str] | None:
    """The words that held-out MLM is scored on: colours and shapes in scenes, any word (None) elsewhere."""
    return ATTRIBUTE_WORDS if data.sets == ("scenes",) else None


def group_batches(
    pictures: Sequence[Picture],
    model: VisualParsingModel,
    data: DataSettings,
    *,
    images: int,
    seed: int,
    inputs: VisualInput | None = None,
) -> GroupBatches:
    """Batches of groups that suit a model."""
    visual = model.settings.visual
    return GroupBatches(
        pictures, model.words, data,
        images=images, inputs=inputs or visual_input(visual), vision=visual.tokens, seed=seed,
    )  # fmt: skip


def pretrain(run: Run, prepared: Prepared, settings: PretrainSettings) -> int:
    """Train to the end, or go on from the run's last checkpoint; the optimiser steps of the whole run.

    With `train.processes` it starts so many, which share each step, and loads what they trained.
    """
    train, training = settings.train, prepared.splits["train"]
    inputs = visual_input(settings.visual)
    if settings.data.cache:
        images = [picture.image for picture in training]
        inputs = PixelCache(cache_root(), images, settings.visual.image_px, progress=run.progress)
    if train.processes > 1 and not launched():
        launch(train.processes, run.folder.parent.name, run.folder.name)
    batches = group_batches(
        training, prepared.model, settings.data, images=train.images, seed=settings.seed, inputs=inputs
    )
    return fit(
        prepared.model, Pretraining(settings), batches, run,
        optim=settings.optim, train=train, seed=settings.seed, workers=settings.data.workers, what="pre-training",
        probe=held_out_probe(prepared, settings),
    )  # fmt: skip


def train_run(run: Run, settings: PretrainSettings) -> int:
    """The training of `01_pretrain` alone, as `vpw train` does it."""
    return pretrain(run, prepare(settings), settings)


def held_out_probe(
    prepared: Prepared, settings: PretrainSettings, *, images: int = 32
) -> Callable[[VisualParsingModel], dict[str, float]]:
    """What `train.probe_every` measures on the same held-out pictures each time.

    `flow` and `nmi` at the last layer (paper Fig. 3 and 5), and `held_out_loss`, the sum of Eq. 10 on one batch.
    """
    pictures = prepared.splits["val"]
    count = min(images, len(pictures))
    objective = Pretraining(settings)

    @torch.no_grad()
    def measure(model: VisualParsingModel) -> dict[str, float]:
        training = model.training
        batch = group_batches(pictures, model.eval(), settings.data, images=count, seed=settings.seed)[0]
        counts, sums = objective.counts(batch), objective.losses(model, batch.to(model.device))
        loss = sum(objective.weights[name] * float(value) / max(counts[name], 1) for name, value in sums.items())
        probed = probe(model, pictures, images=count, seed=settings.seed)
        model.train(training)
        return {
            "held_out_loss": loss,
            "flow": float(np.nanmean(probed.from_input[:, -1])),
            "nmi": float(np.nanmean(probed.nmi[:, -1])),
        }

    return measure


class HeldOut(NamedTuple):
    """Held-out figures; each an interval over images.

    Attributes
    ----------
    itm_accuracy : Interval
        Share of right match / no match decisions, on equal numbers of both; chance 0.5.
    itm_other_image : Interval
        The same texts and labels, another image: above 0.5 means that the words alone give the label away.
    mlm_with_image, mlm_other_image : Interval
        Share of single hidden words that are guessed right, with the image and with another one.
    mlm_ratio : Interval
        Of the two.
    """

    itm_accuracy: Interval
    itm_other_image: Interval
    mlm_with_image: Interval
    mlm_other_image: Interval
    mlm_ratio: Interval

    def summary(self) -> dict[str, float]:
        """Flat: each mean under its name, the bounds under `_low` and `_high`."""
        return flatten(self._asdict())


@torch.no_grad()
def evaluate(
    model: VisualParsingModel,
    pictures: Sequence[Picture],
    data: DataSettings,
    *,
    scored: frozenset[str] | None = None,
    images: int = 500,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> HeldOut:
    """Match decisions and masked words on held-out images; nothing is masked but the one word asked for.

    Parameters
    ----------
    scored
        Words that are hidden and asked for, one at a time; None takes any word.
    images : int
        At most so many images.
    """
    model.eval()
    size = min(32, len(pictures))
    texts = min(5, max(len(picture.captions) for picture in pictures))  # as many as there are: narrower intervals
    groups = data.with_overrides({"grouped": True, "matched_per_image": texts, "unmatched_per_image": texts})
    batches = group_batches(pictures, model, groups, images=size, seed=seed + 1)
    steps = max(1, min(images, len(pictures)) // size)
    right: dict[str, list[Tensor]] = {name: [] for name in HeldOut._fields[:4]}
    scored_ids = None if scored is None else torch.tensor(model.tokenizer.convert_tokens_to_ids(sorted(scored)))
    for step in range(steps):
        batch = batches[step]
        original = torch.where(batch.labels >= 0, batch.labels, batch.words)
        hidden, labels = _hide_one(model, original, batch.noise[:, 0], scored_ids)
        visual = model.visual(batch.images.to(model.device))
        other = batch.image_index.roll(-int((batch.image_index == 0).sum()))
        true = batch.matched.nonzero()[:, 0]  # words are asked for in these texts alone, as many of each image
        original, hidden, tokens = (part.to(model.device) for part in (original, hidden[true], batch.word_tokens))
        labels, asked = labels[true], labels[true] >= 0
        for image, itm, mlm in (
            (batch.image_index, "itm_accuracy", "mlm_with_image"),
            (other, "itm_other_image", "mlm_other_image"),
        ):
            image = image.to(model.device)
            matches = model.itm(model.fuse(visual, original, tokens, image_index=image).cls).argmax(dim=-1).cpu()
            right[itm].append((matches.bool() == batch.matched).float().view(size, -1).mean(dim=1))
            fused = model.fuse(visual, hidden, tokens[true], image_index=image[true])
            words = model.word_logits(fused.text).argmax(dim=-1).cpu()
            hits = ((words == labels) & asked).sum(dim=1).view(size, -1).sum(dim=1)
            right[mlm].append(torch.stack([hits, asked.sum(dim=1).view(size, -1).sum(dim=1)], dim=1))
        if progress:
            progress("evaluating", step + 1, steps)
    values = {name: torch.cat(parts).double().numpy() for name, parts in right.items()}
    return _intervals(values, seed)


def _hide_one(model: VisualParsingModel, words: Tensor, noise: Tensor, scored: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hide one word of each text: one of `scored`, else any; ids with [MASK], and labels (-100 elsewhere)."""
    fits = torch.from_numpy(model.words.maskable(words.numpy()))
    if scored is not None:
        fits &= torch.isin(words, scored)
    place = torch.where(fits, (torch.arange(words.shape[1]) * 0.618 + noise[:, None]) % 1, -1).argmax(dim=1)
    chosen = torch.zeros_like(fits).scatter_(1, place[:, None], True) & fits
    return torch.where(chosen, model.tokenizer.mask_token_id, words), torch.where(chosen, words, -100)


def _intervals(values: dict[str, np.ndarray], seed: int) -> HeldOut:
    """Means and 95% intervals by a bootstrap over images."""
    count = len(values["itm_accuracy"])

    def accuracy(name: str, index: np.ndarray) -> np.ndarray:
        return values[name][index].mean(axis=-1)

    def share(name: str, index: np.ndarray) -> np.ndarray:
        hits_and_asked = values[name][index].sum(axis=-2)
        return hits_and_asked[..., 0] / np.maximum(hits_and_asked[..., 1], 1)

    def ratio(index: np.ndarray) -> np.ndarray:
        return share("mlm_with_image", index) / np.maximum(share("mlm_other_image", index), 1e-9)

    statistics = {
        "itm_accuracy": partial(accuracy, "itm_accuracy"),
        "itm_other_image": partial(accuracy, "itm_other_image"),
        "mlm_with_image": partial(share, "mlm_with_image"),
        "mlm_other_image": partial(share, "mlm_other_image"),
        "mlm_ratio": ratio,
    }
    return HeldOut(**{name: bootstrap_statistic(statistic, count, seed) for name, statistic in statistics.items()})
