"""Training a network on the scenes' own labels: a start for the visual side, from colour and shape at each token.

It replaces the paper's ImageNet start at small size: from scratch, a few minutes of MLM and ITM learn nothing about
the image. `region_features` trains its network on crops of the same scenes, with the same batches and objective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.inputs import Pixels
from vpworkbench.data.records import Picture
from vpworkbench.data.scene_cache import cached_scenes
from vpworkbench.data.steps import Sampler, TensorBatch
from vpworkbench.losses import Objective
from vpworkbench.model.visual import build_visual
from vpworkbench.probes.masks import objects_of_tokens
from vpworkbench.runs import Run
from vpworkbench.scenes.scene import COLOURS, SHAPES
from vpworkbench.settings import RegionSettings, VisualInitSettings
from vpworkbench.train.checkpoints import save_weights
from vpworkbench.train.engine import fit

BACKGROUND = 0
AT_ONCE = 64  # pictures, where nothing is trained


# ------------------------------------------------------------------------- what both networks share


@dataclass(frozen=True)
class LabelledBatch(TensorBatch):
    """Images and what they show.

    Attributes
    ----------
    images : uint8 Tensor, (image, 3, height, width)
    labels : int64 Tensor, (image, kind) or (image, row, column, kind)
        Numbers of classes, in the order of the network's heads; of an image, or of each token on its grid.
    """

    images: Tensor
    labels: Tensor


class LabelNetwork(nn.Module):
    """A network whose features feed a linear head for each kind of label.

    Subclasses call `add_heads` last, and their `forward` returns the features of uint8 images, (image, width) or
    (image, token, width).
    """

    heads: nn.ModuleDict

    def add_heads(self, width: int, classes: Mapping[str, int]) -> None:
        self.heads = nn.ModuleDict({kind: nn.Linear(width, count) for kind, count in classes.items()})

    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """For each kind of label, (image[, token], class)."""
        features = self(images)
        return {kind: head(features) for kind, head in self.heads.items()}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model.safetensors`."""
        save_weights(self, folder)


class LabelBatches(Dataset):
    """Labelled scenes by step, mirrored at random."""

    def __init__(
        self, pictures: Sequence[Picture], read: Callable[[Sequence[Picture]], LabelledBatch], *, images: int, seed: int
    ) -> None:
        self.sampler, self.read, self.seed = Sampler(pictures, images, seed=(seed,)), read, seed

    def __getitem__(self, step: int) -> LabelledBatch:
        batch = self.read(self.sampler[step])
        mirrored = torch.from_numpy(np.random.default_rng((self.seed, 1, step)).random(len(batch.images)) < 0.5)
        batch.images[mirrored] = batch.images[mirrored].flip(-1)
        if batch.labels.ndim == 4:
            batch.labels[mirrored] = batch.labels[mirrored].flip(2)  # image row column kind
        return batch


class Labelling(Objective):
    """Cross entropy of each kind of label, a mean over images or tokens."""

    def __init__(self, kinds: Iterable[str]) -> None:
        self.weights = dict.fromkeys(kinds, 1.0)

    def counts(self, batch: LabelledBatch) -> dict[str, int]:
        return dict.fromkeys(self.weights, batch.labels[..., 0].numel())

    def losses(self, model: LabelNetwork, batch: LabelledBatch) -> dict[str, Tensor]:
        labels = batch.labels.flatten(0, -2).unbind(dim=1)
        return {
            kind: functional.cross_entropy(scores.flatten(0, -2), label, reduction="sum")
            for (kind, scores), label in zip(model.logits(batch.images).items(), labels, strict=True)
        }


def train_labels(
    model: LabelNetwork,
    pictures: Sequence[Picture],
    read: Callable[[Sequence[Picture]], LabelledBatch],
    run: Run,
    settings: VisualInitSettings | RegionSettings,
    *,
    what: str,
) -> None:
    """Train a network on labelled scenes, from the run's last checkpoint if there is one."""
    batches = LabelBatches(pictures, read, images=settings.train.images, seed=settings.seed)
    fit(
        model,
        Labelling(model.heads),
        batches,
        run,
        optim=settings.optim,
        train=settings.train,
        seed=settings.seed,
        workers=settings.workers,
        what=what,
    )


@torch.no_grad()
def label_accuracy(
    model: LabelNetwork,
    pictures: Sequence[Picture],
    read: Callable[[Sequence[Picture]], LabelledBatch],
    *,
    unscored: int | None = None,
) -> dict[str, float]:
    """Share of right labels of each kind, as `<kind>_accuracy`; where the true label is `unscored`, none is scored."""
    hits, scored = dict.fromkeys(model.heads, 0), dict.fromkeys(model.heads, 0)
    device = next(model.eval().parameters()).device
    for start in range(0, len(pictures), AT_ONCE):
        batch = read(pictures[start : start + AT_ONCE]).to(device)
        labels = batch.labels.flatten(0, -2).unbind(dim=1)
        for (kind, scores), label in zip(model.logits(batch.images).items(), labels, strict=True):
            is_scored = torch.ones_like(label, dtype=torch.bool) if unscored is None else label != unscored
            right = scores.flatten(0, -2).argmax(dim=-1) == label
            hits[kind] += int((right & is_scored).sum())
            scored[kind] += int(is_scored.sum())
    return {f"{kind}_accuracy": hits[kind] / max(scored[kind], 1) for kind in hits}


# ------------------------------------------------------------------------- a start for the visual side


def token_labels(pictures: Sequence[Picture], grid: int) -> Tensor:
    """Colour and shape at each token of generated scenes; int64 (image, row, column, 2).

    0 is background, i + 1 the i-th of COLOURS and of SHAPES. If `grid` does not divide an image, the map of its objects
    is enlarged first.
    """
    colours, shapes = list(COLOURS), list(SHAPES)
    labels = []
    for picture in pictures:
        drawn = picture.object_map()
        if drawn.shape[0] % grid:
            side = grid * -(-drawn.shape[0] // grid)
            drawn = np.array(Image.fromarray(drawn).resize((side, side), Image.Resampling.NEAREST))
        # Draped things have a word of their own for their shape: it is not one of SHAPES and stays background.
        known = [
            (colours.index(thing.colour) + 1, shapes.index(thing.shape) + 1 if thing.shape in shapes else BACKGROUND)
            for thing in picture.scene.things
        ]
        objects = objects_of_tokens(torch.from_numpy(drawn), grid).view(grid, grid).numpy()
        labels.append(np.array([(BACKGROUND, BACKGROUND), *known])[objects])
    return torch.from_numpy(np.stack(labels))


def labelled_images(pictures: Sequence[Picture], *, image_px: int, grid: int) -> LabelledBatch:
    """Whole scenes, with the labels of their tokens."""
    return LabelledBatch(Pixels(image_px).stack(pictures), token_labels(pictures, grid))


class TokenClassifier(LabelNetwork):
    """A visual side with heads for colour and shape, which are dropped after training."""

    def __init__(self, settings: VisualInitSettings) -> None:
        super().__init__()
        torch.manual_seed(settings.seed)
        self.visual = build_visual(settings.visual)
        self.add_heads(self.visual.width, {"colour": len(COLOURS) + 1, "shape": len(SHAPES) + 1})

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images).features


def train_visual(run: Run, settings: VisualInitSettings) -> tuple[TokenClassifier, dict[str, float]]:
    """Train or resume a visual side; returns the classifier and its accuracy at object tokens of held-out scenes.

    `checkpoint/visual.safetensors` is a file for `init_visual`.
    """
    model = TokenClassifier(settings)  # an unknown backbone is reported before scenes are drawn
    pictures = read_pictures(cached_scenes(settings.scenes))
    training, held_out = ([one for one in pictures if one.split == split] for split in ("train", "val"))
    read = partial(labelled_images, image_px=settings.visual.image_px, grid=settings.visual.grid)
    train_labels(model, training, read, run, settings, what="training the visual side")
    weights = {name: value.contiguous().cpu() for name, value in model.visual.state_dict().items()}
    save_file(weights, run.folder / "checkpoint" / "visual.safetensors")
    return model, label_accuracy(model, held_out, read, unscored=BACKGROUND)
