"""Training a network on the scenes' own labels: a start for the visual side, from colour and shape at each token.

It replaces the paper's ImageNet start at small size: from scratch, a few minutes of MLM and ITM learn nothing about
the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.inputs import Pixels
from vpworkbench.data.records import Picture
from vpworkbench.data.scene_cache import cached_scenes
from vpworkbench.data.steps import Sampler, TensorBatch
from vpworkbench.losses import Objective
from vpworkbench.model.model import save_tensors
from vpworkbench.model.visual import build_visual
from vpworkbench.probes.masks import objects_of_tokens
from vpworkbench.runs import Run
from vpworkbench.scenes.scene import COLOURS, SHAPES
from vpworkbench.settings import LabelSettings, VisualInitSettings
from vpworkbench.train.engine import fit

BACKGROUND = 0
AT_ONCE = 64  # pictures, where nothing is trained


@dataclass(frozen=True)
class LabelledBatch(TensorBatch):
    """Images and the classes of what they show, of an image or of each token; kinds in the order of the heads."""

    images: Tensor  # uint8 (image, 3, height, width)
    labels: Tensor  # int64 (image, kind) or (image, row, column, kind)


Read = Callable[[Sequence[Picture]], LabelledBatch]


class LabelNetwork(nn.Module):
    """A network whose features feed a linear head for each kind of label.

    Subclasses call `add_heads` last, and their `forward` returns the features of uint8 images, (image, width) or
    (image, token, width).
    """

    heads: nn.ModuleDict
    unscored = -1  # a class that does not count in the accuracy

    def add_heads(self, width: int, classes: Mapping[str, int]) -> None:
        self.heads = nn.ModuleDict({kind: nn.Linear(width, count) for kind, count in classes.items()})

    def answers(self, batch: LabelledBatch) -> Iterator[tuple[str, Tensor, Tensor]]:
        """For each kind of label its name, the logits (label, class) and the true classes (label,)."""
        features, labels = self(batch.images), batch.labels.flatten(0, -2).unbind(dim=1)
        for (kind, head), label in zip(self.heads.items(), labels, strict=True):
            yield kind, head(features).flatten(0, -2), label


class LabelBatches:
    """Labelled scenes by step, mirrored at random."""

    def __init__(self, pictures: Sequence[Picture], read: Read, *, images: int, seed: int) -> None:
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
        return {
            kind: functional.cross_entropy(logits, label, reduction="sum")
            for kind, logits, label in model.answers(batch)
        }


def train_labels(
    model: LabelNetwork, scenes: Sequence[Picture], read: Read, run: Run, settings: LabelSettings, *, what: str
) -> dict[str, float]:
    """Train on labelled scenes, from the run's last checkpoint if there is one; returns the held-out accuracy."""
    training, held_out = ([one for one in scenes if one.split == split] for split in ("train", "val"))
    batches = LabelBatches(training, read, images=settings.train.images, seed=settings.seed)
    options = {"optim": settings.optim, "train": settings.train, "seed": settings.seed, "workers": settings.workers}
    fit(model, Labelling(model.heads), batches, run, **options, what=what)
    return label_accuracy(model, held_out, read)


@torch.no_grad()
def label_accuracy(model: LabelNetwork, pictures: Sequence[Picture], read: Read) -> dict[str, float]:
    """Share of right labels of each kind, as `<kind>_accuracy`, where the true label is not `model.unscored`."""
    hits, scored = dict.fromkeys(model.heads, 0), dict.fromkeys(model.heads, 0)
    device = next(model.eval().parameters()).device
    for start in range(0, len(pictures), AT_ONCE):
        for kind, logits, label in model.answers(read(pictures[start : start + AT_ONCE]).to(device)):
            is_scored = label != model.unscored
            hits[kind] += int(((logits.argmax(dim=-1) == label) & is_scored).sum())
            scored[kind] += int(is_scored.sum())
    return {f"{kind}_accuracy": hits[kind] / max(scored[kind], 1) for kind in hits}


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

    unscored = BACKGROUND

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
    scenes = read_pictures(cached_scenes(settings.scenes))
    read = partial(labelled_images, image_px=settings.visual.image_px, grid=settings.visual.grid)
    accuracy = train_labels(model, scenes, read, run, settings, what="training the visual side")
    save_tensors(model.visual.state_dict(), run.folder / "checkpoint" / "visual.safetensors")
    return model, accuracy
