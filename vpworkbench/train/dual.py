"""Dual encoders, the baseline of retrieval: an image and a text become one vector each, compared by their cosine.

The frozen one projects the features of the start linearly, under a contrastive loss. The trained one fine-tunes all
weights (with `frozen`, all but those of the visual side) with the hardest negative of its batch (VSE++, Faghri et al.
2018; a row of the paper's Table 4). SCAN, another row, is no dual encoder: it compares every word with every visual
token of the frozen start, under the same loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel

from vpworkbench.data.inputs import visual_input
from vpworkbench.data.records import Picture
from vpworkbench.data.steps import TensorBatch
from vpworkbench.errors import SettingsError
from vpworkbench.model.attentive import Scan
from vpworkbench.model.visual import build_visual, encode
from vpworkbench.model.weights import start_visual
from vpworkbench.model.words import Words, bert_folder
from vpworkbench.runs import Run
from vpworkbench.settings import FinetuneSettings, OptimSettings, TrainSettings
from vpworkbench.subjects import load_run
from vpworkbench.system import draft
from vpworkbench.tasks.classification import OneLoss
from vpworkbench.tasks.retrieval import RetrievalBatches, owners_of
from vpworkbench.tasks.task import Progress, texts_of
from vpworkbench.train.checkpoints import is_trained
from vpworkbench.train.engine import fit, pick_device
from vpworkbench.train.frozen import forget_tokens, token_inputs
from vpworkbench.train.processes import launched

DUAL = ("frozen dual projection", "trained dual encoder")
FROZEN_OPTIM = OptimSettings(lr_fusion=1e-3, weight_decay=0.1, warmup=10, decay_at=(0.5, 0.75), decay=0.3)
FROZEN_TRAIN = TrainSettings(epochs=30, images=128, log_every=10)
"""Schedule of the projections of frozen features: seconds. More epochs overfit 800 photographs."""
LARGEST_SCALE, MARGIN = 100, 0.2  # of the contrastive loss; of VSE++


def dual_scores(
    batches: RetrievalBatches,
    pictures: Sequence[Picture],
    settings: FinetuneSettings,
    *,
    folder: Path,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Similarity of every image with every caption, float32 (image, caption), by both dual encoders and by SCAN.

    `batches` are the training pairs. `folder` keeps what is trained: another call continues there, or only scores.
    """
    dual = build_dual(settings)
    train_projection(dual, batches, settings, folder=folder, progress=progress)
    frozen = dual.projection.scores(dual.features(pictures, progress=progress))
    start = build_dual(settings)
    scan = TokenMatcher(start.visual, start.words)
    kept = DualBatches(_with_tokens(batches, start.visual, _run(folder / "scan"), settings))
    dual.visual.requires_grad_(not settings.frozen)
    options = {"optim": settings.optim, "train": settings.train, "seed": settings.seed, "workers": settings.workers}
    run, seen = _run(folder / "dual-trained"), kept if settings.frozen else DualBatches(batches)
    fit(dual, OneLoss(max_of_hinges), seen, run, **options, what="dual encoder, hardest negatives")
    trained = dual.projection.scores(dual.features(pictures, progress=progress))
    fit(scan, OneLoss(max_of_hinges), kept, _run(folder / "scan"), **options, what="SCAN")
    forget_tokens(_run(folder / "scan"))
    return {**dict(zip(DUAL, (frozen, trained), strict=True)), "SCAN": scan.scores(pictures)}


def near_captions(
    batches: RetrievalBatches, settings: FinetuneSettings, *, folder: Path, progress: Progress | None = None
) -> np.ndarray:
    """The share `retrieval.hard` of all training captions that is nearest to each image, by the frozen projections.

    Places of captions, nearest first and never an image's own, int64 (picture, caption). `folder` keeps them as
    `near.npy`, and the projections. A `SettingsError` where `torchrun` started several processes without it: a
    contrastive loss compares a whole step, which they cannot share.
    """
    file = folder / "near.npy"
    if not file.exists():
        if launched():
            raise SettingsError(
                "retrieval.hard needs one process to find hard negatives: use train.processes, not torchrun"
            )
        dual = build_dual(settings)
        features = dual.features(batches.pictures, progress=progress)
        train_projection(dual, batches, settings, folder=folder, features=features)
        near = dual.projection.nearest(features, owners_of(batches.pictures), settings.retrieval.hard)
        with draft(file) as written:
            np.save(written, near)
    return np.load(file)


def build_dual(settings: FinetuneSettings) -> DualEncoder:
    """The visual side and the text encoder that the checkpoint's pre-training started from.

    If it started from scratch: the checkpoint's own visual side, and its fusion applied to words only.
    """
    base, start = load_run(settings.checkpoint)
    visual, text = base.visual, base.fusion.bert
    if start.init_visual:
        visual = build_visual(start.visual)
        start_visual(visual, start.init_visual, preset=start.preset)
    if start.init_text:
        text = BertModel.from_pretrained(bert_folder(start.init_text), local_files_only=True)
        text.pooler = None  # its words are averaged
    torch.manual_seed(settings.seed)
    return DualEncoder(visual, text, base.words)


def train_projection(
    dual: DualEncoder,
    batches: RetrievalBatches,
    settings: FinetuneSettings,
    *,
    folder: Path,
    features: Features | None = None,
    progress: Progress | None = None,
) -> None:
    """Fit the projections to frozen features of the training pairs, or load what `folder` has of it."""
    run = _run(folder / "dual-frozen")
    if features is None and not is_trained(run.folder):
        features = dual.features(batches.pictures, progress=progress)
    pairs = DualBatches(replace(batches, images=min(FROZEN_TRAIN.images, len(batches.pictures))), features)
    options = {"optim": FROZEN_OPTIM, "train": FROZEN_TRAIN, "seed": settings.seed}
    fit(dual.projection, OneLoss(dual.projection.contrast), pairs, run, **options, what="frozen dual projection")


def _with_tokens(
    batches: RetrievalBatches, visual: nn.Module, run: Run, settings: FinetuneSettings
) -> RetrievalBatches:
    """The same pairs, with the tokens of a frozen visual side instead of images; a `run` keeps them."""
    if not visual.settings.kind.pixels:
        return batches
    images, device = [picture.image for picture in batches.pictures], pick_device(settings.train.device)
    return replace(batches, inputs=token_inputs(visual, images, run, device, flip=settings.retrieval.flip))


def _run(folder: Path) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder)


class Features(NamedTuple):
    """Pooled images (image, c) and their captions (caption, d), in the order of the pictures."""

    images: Tensor
    texts: Tensor


class Projection(nn.Module):
    """A linear layer for each side into one space of `width` channels, and the scale of the cosines there."""

    def __init__(self, vision_width: int, text_width: int, width: int = 256, dropout: float = 0.5) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(vision_width, width), nn.Linear(text_width, width)
        self.dropout = nn.Dropout(dropout)
        self.log_scale = nn.Parameter(torch.tensor(log(1 / 0.05)))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosines in [-1, 1], (image, text), of pooled features (image, c) and (text, d)."""
        vision = functional.normalize(self.image(self.dropout(images)).float(), dim=-1)
        language = functional.normalize(self.text(self.dropout(texts)).float(), dim=-1)
        return vision @ language.T

    def contrast(self, cosine: Tensor, negative: Tensor) -> Tensor:
        """`symmetric_contrastive` at the learned scale."""
        return symmetric_contrastive(cosine, self.log_scale.exp().clamp(max=LARGEST_SCALE), negative)

    @torch.no_grad()
    def scores(self, features: Features) -> np.ndarray:
        """Cosines of all pairs, float32 (image, caption)."""
        device = self.log_scale.device
        return self.eval()(features.images.to(device), features.texts.to(device)).cpu().numpy()

    def nearest(self, features: Features, owner: np.ndarray, share: float) -> np.ndarray:
        """Places of the share of captions that is nearest to each image, without its own; int64 (image, caption).

        `owner` is the image of each caption, int (caption,).
        """
        most = max(1, min(round(share * len(owner)), len(owner) - int(np.bincount(owner).max())))
        found = []
        for start in range(0, len(features.images), 256):
            scores = self.scores(Features(features.images[start : start + 256], features.texts))
            scores[owner == np.arange(start, start + len(scores))[:, None]] = -np.inf
            found.append(torch.from_numpy(scores).topk(most, dim=1).indices.numpy())
        return np.concatenate(found)


class DualEncoder(nn.Module):
    """A visual side of any family and a BERT, each pooled by the mean over its tokens, and projected."""

    def __init__(self, visual: nn.Module, text: BertModel, words: Words) -> None:
        super().__init__()
        self.visual, self.text, self.words = visual, text, words
        self.projection = Projection(visual.width, text.config.hidden_size)

    def forward(self, images: Tensor, words: Tensor, word_tokens: Tensor) -> Tensor:
        """Cosines, (image, text); images as in `VisualParsingModel`, `words` and `word_tokens` (text, word)."""
        return self.projection(encode(self.visual, images).mean(), self.pooled_texts(words, word_tokens))

    def pooled_texts(self, words: Tensor, word_tokens: Tensor) -> Tensor:
        """Mean of the words' outputs without padding, (text, d)."""
        states = self.text(input_ids=words, attention_mask=word_tokens.long()).last_hidden_state
        weights = word_tokens[..., None].to(states)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)

    @torch.no_grad()
    def features(self, pictures: Sequence[Picture], *, progress: Progress | None = None) -> Features:
        """Pooled images and captions."""
        self.to(self.projection.log_scale.device).eval()  # where only the projection was trained, on a GPU
        device, captions = self.projection.log_scale.device, texts_of(pictures)
        images, texts = [], []
        for start in range(0, len(pictures), 64):
            pixels = visual_input(self.visual.settings).stack(pictures[start : start + 64])
            images.append(self.visual(pixels.to(device)).mean().cpu())
            if progress:
                progress(f"reading {len(pictures)} images", min(start + 64, len(pictures)), len(pictures))
        for start in range(0, len(captions), 128):
            words = self.words.tensors(captions[start : start + 128])
            texts.append(self.pooled_texts(*(part.to(device) for part in words)).cpu())
        return Features(torch.cat(images), torch.cat(texts))


class TokenMatcher(nn.Module):
    """SCAN on the tokens of a frozen visual side of any family."""

    def __init__(self, visual: nn.Module, words: Words) -> None:
        super().__init__()
        self.visual, self.words = visual.requires_grad_(False), words
        self.scan = Scan(visual.width, len(words.tokenizer))

    def forward(self, images: Tensor, words: Tensor, word_tokens: Tensor) -> Tensor:
        """Similarities, (image, text); images as in `VisualParsingModel`, `words` and `word_tokens` (text, word)."""
        with torch.no_grad():
            visual = encode(self.visual.eval(), images)
        return self.scan(visual.features, visual.not_padding(), words, word_tokens)

    @torch.no_grad()
    def scores(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Similarities of all pictures and all their captions, float32 (image, caption)."""
        self.eval()
        device, inputs = self.scan.image.weight.device, visual_input(self.visual.settings)
        words, word_tokens = (part.to(device) for part in self.words.tensors(texts_of(pictures)))
        rows = []
        for start in range(0, len(pictures), 16):
            images = inputs.stack(pictures[start : start + 16]).to(device)
            parts = zip(words.split(128), word_tokens.split(128), strict=True)
            rows.append(torch.cat([self(images, *part) for part in parts], dim=1).float().cpu())
        return torch.cat(rows).numpy()


def symmetric_contrastive(cosine: Tensor, scale: Tensor, negative: Tensor) -> Tensor:
    """InfoNCE in both directions, summed: cross entropy of the own text among all texts, and of the own image.

    `cosine` is (image, text) with the own pairs on its diagonal, `scale` is 1 / temperature. `negative`, bool (image,
    text), is True where a text is known to be false of an image; its diagonal is ignored.
    """
    own = torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)
    logits = (scale * cosine).masked_fill(~(negative | own), -torch.inf)
    target = torch.arange(len(cosine), device=cosine.device)
    both = functional.cross_entropy(logits, target, reduction="sum")
    return (both + functional.cross_entropy(logits.T, target, reduction="sum")) / 2


def max_of_hinges(cosine: Tensor, negative: Tensor) -> Tensor:
    """VSE++: how far the hardest negative comes within the margin of the own pair, in both directions; summed."""
    own = cosine.diagonal()
    others = cosine.masked_fill(~negative | torch.eye(len(cosine), dtype=torch.bool, device=cosine.device), -torch.inf)
    texts = (MARGIN + others.amax(dim=1) - own).clamp(min=0)
    images = (MARGIN + others.amax(dim=0) - own).clamp(min=0)
    return (texts + images).sum()


@dataclass(frozen=True)
class DualBatch(TensorBatch):
    """As many images as texts; pair i is image i and text i."""

    inputs: tuple[Tensor, ...]  # of the model
    targets: Tensor  # bool (image, text): True where the text is known to be false of the image

    def micro_batches(self, count: int) -> list[DualBatch]:
        """The whole batch, because each pair is compared with all others."""
        return [self]


class DualBatches:
    """The images and captions of `RetrievalBatches`, each pair once: as pixels and words, or as given features."""

    def __init__(self, batches: RetrievalBatches, features: Features | None = None) -> None:
        self.batches, self.features, self.sampler = batches, features, batches.sampler
        counts = [len(picture.captions) for picture in batches.pictures]
        self._first_caption = np.cumsum([0, *counts])

    def __getitem__(self, step: int) -> DualBatch:
        rows, texts, rng = self.batches.draw(step)
        pictures = [self.batches.pictures[row] for row in rows]
        negative = torch.tensor([[picture.denies(text) for text in texts] for picture in pictures])
        if self.features is None:
            return DualBatch((self.batches.stack(pictures, rng), *self.batches.words.tensors(texts)), negative)
        captions = [picture.captions.index(text) for picture, text in zip(pictures, texts, strict=True)]
        images, texts = self.features.images[rows], self.features.texts[self._first_caption[rows] + captions]
        return DualBatch((images, texts), negative)
