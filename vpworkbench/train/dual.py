"""Dual encoders, what retrieval is compared with: image and text become one vector each, and a cosine compares them.

Two of them: linear projections of frozen features under a contrastive loss, and a dual encoder that is trained as a
whole with the hardest negative of its batch (VSE++, Faghri et al. 2018, a row of the paper's Table 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import BertModel

from vpworkbench.data.inputs import visual_input
from vpworkbench.data.records import Picture
from vpworkbench.data.steps import TensorBatch
from vpworkbench.losses import Objective
from vpworkbench.model.visual import build_visual
from vpworkbench.model.weights import start_visual
from vpworkbench.model.words import Words, bert_folder
from vpworkbench.runs import Run
from vpworkbench.settings import FinetuneSettings, OptimSettings, TrainSettings
from vpworkbench.subjects import load_run
from vpworkbench.tasks.retrieval import RetrievalBatches, captions_of, owners_of
from vpworkbench.train.checkpoints import save_weights
from vpworkbench.train.engine import fit

Progress = Callable[[str, int, int], None]
FROZEN_OPTIM = OptimSettings(lr_fusion=1e-3, weight_decay=0.1, warmup=10, decay_at=(0.5, 0.75), decay=0.3)
FROZEN_TRAIN = TrainSettings(epochs=30, images=128, log_every=10)
"""Of the projections of frozen features: seconds. More epochs overfit 800 photographs."""


def dual_scores(
    batches: RetrievalBatches,
    pictures: Sequence[Picture],
    settings: FinetuneSettings,
    *,
    folder: Path,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Cosines of every image with every caption, float32 (image, caption), by the frozen and by the trained one.

    Parameters
    ----------
    batches
        The training pairs; the trained one takes its images and captions, as many steps and the rates of `settings`.
    folder : Path
        Keeps what is trained, `dual-frozen/` and `dual-trained/`: another call goes on there, or only scores.
    """
    dual = build_dual(settings)
    train_projection(dual, batches, folder, settings, progress=progress)
    found = {"frozen dual projection": dual.features(pictures, progress=progress).scores(dual.projection)}
    run = Run(folder / "dual-trained")
    run.folder.mkdir(parents=True, exist_ok=True)
    fit(dual, HardestNegative(), DualBatches(batches), run, optim=settings.optim, train=settings.train,
        seed=settings.seed, workers=settings.workers, what="dual encoder, hardest negatives")  # fmt: skip
    return found | {"trained dual encoder": dual.features(pictures, progress=progress).scores(dual.projection)}


def build_dual(settings: FinetuneSettings) -> DualEncoder:
    """The visual side and the text encoder that the checkpoint's pre-training began with.

    Where it began with none (from scratch), the checkpoint's own: its visual side, its fusion on words alone.
    """
    base, start = load_run(settings.checkpoint)
    visual, text = base.visual, base.fusion.bert
    if start.init_visual:
        visual = build_visual(start.visual)
        start_visual(visual, start.init_visual, preset=start.preset)
    if start.init_text:
        text = BertModel.from_pretrained(bert_folder(start.init_text), local_files_only=True, add_pooling_layer=False)
    torch.manual_seed(settings.seed)
    return DualEncoder(visual, text, base.words)


def train_projection(
    dual: DualEncoder,
    batches: RetrievalBatches,
    folder: Path,
    settings: FinetuneSettings,
    *,
    features: Features | None = None,
    progress: Progress | None = None,
) -> None:
    """Fit the projections to frozen features of the training pairs; what `folder` holds of it is taken from there."""
    run = Run(folder / "dual-frozen")
    run.folder.mkdir(parents=True, exist_ok=True)
    if features is None and not (run.folder / "checkpoint" / "progress.json").exists():
        features = dual.features(batches.pictures, progress=progress)
    many = batches.of(min(FROZEN_TRAIN.images, len(batches.pictures)))
    fit(dual.projection, Contrastive(), DualBatches(many, features), run, optim=FROZEN_OPTIM, train=FROZEN_TRAIN,
        seed=settings.seed, what="frozen dual projection")  # fmt: skip


def near_captions(
    batches: RetrievalBatches, settings: FinetuneSettings, *, folder: Path, progress: Progress | None = None
) -> np.ndarray:
    """The share `retrieval.hard` of all captions that comes nearest to each image, by the frozen projections.

    Parameters
    ----------
    folder : Path
        Keeps them as `near.npy`, and the projections.

    Returns
    -------
    int64 array, (picture, caption)
        Places of captions in training, nearest first; never an image's own.
    """
    file = folder / "near.npy"
    if not file.exists():
        dual = build_dual(settings)
        features = dual.features(batches.pictures, progress=progress)
        train_projection(dual, batches, folder, settings, features=features)
        np.save(file, features.nearest(dual.projection, owners_of(batches.pictures), settings.retrieval.hard))
    return np.load(file)


class Projection(nn.Module):
    """A linear layer for each side into one space, and the scale of the cosines there.

    Parameters
    ----------
    vision_width, text_width, width : int
        Channels of pooled images, of pooled texts, and of the common space.
    dropout : float
        Of the features, in training.
    """

    def __init__(self, vision_width: int, text_width: int, width: int = 256, dropout: float = 0.5) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(vision_width, width), nn.Linear(text_width, width)
        self.dropout = nn.Dropout(dropout)
        self.log_scale = nn.Parameter(torch.tensor(log(1 / 0.05)))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosines in [-1, 1], (image, text), of pooled features (image, c) and (text, d)."""
        seen = functional.normalize(self.image(self.dropout(images)).float(), dim=-1)
        said = functional.normalize(self.text(self.dropout(texts)).float(), dim=-1)
        return seen @ said.T

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model.safetensors`."""
        save_weights(self, folder)


class DualEncoder(nn.Module):
    """A visual side and a text encoder, each pooled to one vector by the mean over its tokens, and projected.

    Parameters
    ----------
    visual
        Of any family (`visual.build_visual`).
    text
        A BERT: what it makes of words alone is averaged.
    """

    def __init__(self, visual: nn.Module, text: BertModel, words: Words) -> None:
        super().__init__()
        self.visual, self.text, self.words = visual, text, words
        self.projection = Projection(visual.width, text.config.hidden_size)

    def forward(self, images: Tensor, words: Tensor, word_tokens: Tensor) -> Tensor:
        """Cosines, (image, text); images as of `VisualParsingModel`, `words` and `word_tokens` (text, word)."""
        return self.projection(self.pooled_images(images), self.pooled_texts(words, word_tokens))

    def pooled_images(self, images: Tensor) -> Tensor:
        """Mean of the visual tokens, (image, c)."""
        return self.visual(images).mean()

    def pooled_texts(self, words: Tensor, word_tokens: Tensor) -> Tensor:
        """Mean of the words' outputs, padding left out, (text, d)."""
        states = self.text(input_ids=words, attention_mask=word_tokens.long()).last_hidden_state
        weights = word_tokens[..., None].to(states)
        return (states * weights).sum(dim=1) / weights.sum(dim=1)

    @torch.no_grad()
    def features(self, pictures: Sequence[Picture], *, progress: Progress | None = None) -> Features:
        """Pooled images and captions, computed once."""
        self.eval()
        device, captions = self.projection.log_scale.device, captions_of(pictures)
        images = []
        for start in range(0, len(pictures), 64):
            pixels = visual_input(self.visual.settings).stack(pictures[start : start + 64])
            images.append(self.pooled_images(pixels.to(device)).cpu())
            if progress:
                progress(f"reading {len(pictures)} images", min(start + 64, len(pictures)), len(pictures))
        texts = []
        for start in range(0, len(captions), 128):
            words = self.words.tensors(captions[start : start + 128])
            texts.append(self.pooled_texts(*(part.to(device) for part in words)).cpu())
        return Features(torch.cat(images), torch.cat(texts))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model.safetensors`."""
        save_weights(self, folder)


@dataclass(frozen=True)
class Features:
    """Pooled images (image, c) and their captions (caption, d), in the order of the pictures."""

    images: Tensor
    texts: Tensor

    def scores(self, projection: Projection) -> np.ndarray:
        """Cosines of all pairs, float32 (image, caption)."""
        device = projection.log_scale.device
        with torch.no_grad():
            return projection.eval()(self.images.to(device), self.texts.to(device)).cpu().numpy()

    def nearest(self, projection: Projection, owner: np.ndarray, share: float) -> np.ndarray:
        """Places of the share of captions that comes nearest to each image, its own left out; (image, caption).

        Parameters
        ----------
        owner : int array, (caption,)
            Image of each caption.
        """
        most = max(1, min(round(share * len(owner)), len(owner) - int(np.bincount(owner).max())))
        found = []
        for start in range(0, len(self.images), 256):
            scores = Features(self.images[start : start + 256], self.texts).scores(projection)
            scores[owner == np.arange(start, start + len(scores))[:, None]] = -np.inf
            found.append(torch.from_numpy(scores).topk(most, dim=1).indices.numpy())
        return np.concatenate(found)


# -------------------------------------------------------------------------------------------------------- losses


def symmetric_contrastive(cosine: Tensor, scale: Tensor, negative: Tensor) -> Tensor:
    """InfoNCE in both directions: cross entropy of the own text among all texts, and of the own image; summed.

    Parameters
    ----------
    cosine : Tensor, (pair, pair)
        Of image and text; a pair's own on the diagonal.
    scale : Tensor, ()
        1 / temperature.
    negative : bool Tensor, (pair, pair)
        Which texts may count against an image; the diagonal does not matter.
    """
    own = torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)
    logits = (scale * cosine).masked_fill(~(negative | own), -torch.inf)
    target = torch.arange(len(cosine), device=cosine.device)
    both = functional.cross_entropy(logits, target, reduction="sum")
    return (both + functional.cross_entropy(logits.T, target, reduction="sum")) / 2


def max_of_hinges(cosine: Tensor, negative: Tensor, *, margin: float = 0.2) -> Tensor:
    """VSE++: how far the hardest negative comes within the margin of the own pair, in both directions; summed.

    Parameters as of `symmetric_contrastive`.
    """
    own = cosine.diagonal()
    others = cosine.masked_fill(~negative | torch.eye(len(cosine), dtype=torch.bool, device=cosine.device), -torch.inf)
    texts = (margin + others.amax(dim=1) - own).clamp(min=0)
    images = (margin + others.amax(dim=0) - own).clamp(min=0)
    return (texts + images).sum()


class Contrastive(Objective):
    """`symmetric_contrastive` of a batch."""

    weights = {"loss": 1.0}

    def counts(self, batch: DualBatch) -> dict[str, int]:
        return {"loss": len(batch.negative)}

    def losses(self, model: Projection, batch: DualBatch) -> dict[str, Tensor]:
        scale = model.log_scale.exp().clamp(max=100)
        return {"loss": symmetric_contrastive(model(*batch.inputs), scale, batch.negative)}


class HardestNegative(Contrastive):
    """`max_of_hinges` of a batch."""

    def losses(self, model: DualEncoder, batch: DualBatch) -> dict[str, Tensor]:
        return {"loss": max_of_hinges(model(*batch.inputs), batch.negative)}


# ------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class DualBatch(TensorBatch):
    """As many images as texts, pair i in row i of both, and which text may count against which image.

    Attributes
    ----------
    inputs : tuple of Tensor
        Of the model's forward.
    negative : bool Tensor, (image, text)
        False for a caption of the same image, or one that is, or may be, true of it.
    """

    inputs: tuple[Tensor, ...]
    negative: Tensor

    def micro_batches(self, count: int) -> list[DualBatch]:
        """The batch as a whole: every pair is held against all others."""
        return [self]


class DualBatches(Dataset):
    """The images and captions of `RetrievalBatches`, each pair once: pixels, or features where those are given."""

    def __init__(self, batches: RetrievalBatches, features: Features | None = None) -> None:
        self.batches, self.features = batches, features
        self.sampler = batches.sampler
        self._first = np.cumsum([0, *(len(picture.captions) for picture in batches.pictures)])  # caption of a picture

    def __getitem__(self, step: int) -> DualBatch:
        rows, texts, rng = self.batches.chosen(step)
        pictures = [self.batches.pictures[row] for row in rows]
        negative = torch.tensor([[picture.denies(text) for text in texts] for picture in pictures])
        if self.features is None:
            return DualBatch((self.batches.pixels(pictures, rng), *self.batches.words.tensors(texts)), negative)
        places = [
            self._first[row] + picture.captions.index(text)
            for row, picture, text in zip(rows, pictures, texts, strict=True)
        ]
        return DualBatch((self.features.images[rows], self.features.texts[places]), negative)


__all__ = [
    "Contrastive",
    "DualBatches",
    "DualEncoder",
    "Features",
    "HardestNegative",
    "Projection",
    "build_dual",
    "dual_scores",
    "max_of_hinges",
    "near_captions",
    "symmetric_contrastive",
    "train_projection",
]
