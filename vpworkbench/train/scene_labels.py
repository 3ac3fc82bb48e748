"""A start for the visual side: trained on the scenes' own labels, colour and shape at each token.

The miniature of the paper's ImageNet start: from scratch, a few minutes of MLM and ITM learn nothing about the image.
Every visual family gets the same budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
from vpworkbench.data.splits import scenes_folder
from vpworkbench.data.steps import Sampler
from vpworkbench.model.visual import build_visual
from vpworkbench.runs import Run
from vpworkbench.scenes.scene import COLOURS, SHAPES
from vpworkbench.scenes.write import write_scenes
from vpworkbench.settings import VisualInitSettings
from vpworkbench.train.engine import fit

BACKGROUND = 0
SMALLEST_SHARE = 0.2
"""A token whose pixels are of an object by less than this share is background."""


class TokenLabels(NamedTuple):
    """int64 (image, vision) each: 0 background, i + 1 the i-th of COLOURS and of SHAPES."""

    colour: Tensor
    shape: Tensor


@dataclass(frozen=True)
class LabelledImages:
    """uint8 (image, 3, height, width) and the labels of their tokens."""

    images: Tensor
    labels: TokenLabels

    def to(self, device: torch.device | str) -> LabelledImages:
        return LabelledImages(self.images.to(device), TokenLabels(*(label.to(device) for label in self.labels)))

    def micro_batches(self, count: int) -> list[LabelledImages]:
        cut = zip(self.images.chunk(count), *(label.chunk(count) for label in self.labels), strict=True)
        return [LabelledImages(images, TokenLabels(*labels)) for images, *labels in cut]


def token_objects(object_map: np.ndarray, grid: int) -> np.ndarray:
    """The object that most of a token's pixels show; int (grid, grid), 0 for background.

    Parameters
    ----------
    object_map : uint8 array, (height, width)
        0 background, i + 1 the i-th object; sides are multiples of `grid`.
    """
    side = object_map.shape[0] // grid
    cells = object_map.reshape(grid, side, grid, side).transpose(0, 2, 1, 3).reshape(grid, grid, -1)
    shares = np.stack([(cells == number).mean(axis=-1) for number in range(1, int(object_map.max()) + 1)] or
                      [np.zeros((grid, grid))])  # fmt: skip
    return np.where(shares.max(axis=0) >= SMALLEST_SHARE, shares.argmax(axis=0) + 1, BACKGROUND)


def token_labels(pictures: Sequence[Picture], grid: int) -> TokenLabels:
    """Colour and shape at each token of generated scenes; a grid that does not divide their pixels is laid over."""
    colours, shapes = list(COLOURS), list(SHAPES)
    rows = []
    for picture in pictures:
        drawn = picture.object_map()
        if drawn.shape[0] % grid:
            side = grid * -(-drawn.shape[0] // grid)
            drawn = np.asarray(Image.fromarray(drawn).resize((side, side), Image.Resampling.NEAREST))
        objects = token_objects(drawn, grid).ravel()
        # Draped things have a shape of their own word: it is not one of SHAPES and stays background.
        colour = [BACKGROUND] + [colours.index(thing.colour) + 1 for thing in picture.scene.things]
        shape = [BACKGROUND] + [shapes.index(thing.shape) + 1 if thing.shape in shapes else BACKGROUND
                                for thing in picture.scene.things]  # fmt: skip
        rows.append((np.array(colour)[objects], np.array(shape)[objects]))
    return TokenLabels(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


class LabelBatches(Dataset):
    """Images and the labels of their tokens by step; mirrored at random."""

    def __init__(self, pictures: Sequence[Picture], *, images: int, image_px: int, grid: int, seed: int) -> None:
        self.sampler = Sampler(pictures, images, seed=(seed,))
        self.image_px, self.grid, self.seed = image_px, grid, seed

    def __getitem__(self, step: int) -> LabelledImages:
        chosen = self.sampler[step]
        images, labels = Pixels(self.image_px).stack(chosen), token_labels(chosen, self.grid)
        mirrored = torch.from_numpy(np.random.default_rng((self.seed, 1, step)).random(len(chosen)) < 0.5)
        images[mirrored] = images[mirrored].flip(-1)
        for label in labels:
            cells = label.unflatten(1, (self.grid, self.grid))
            cells[mirrored] = cells[mirrored].flip(-1)
        return LabelledImages(images, labels)


class TokenClassifier(nn.Module):
    """A visual side with two linear heads, for colour and for shape; the heads are thrown away afterwards."""

    def __init__(self, settings: VisualInitSettings) -> None:
        super().__init__()
        torch.manual_seed(settings.seed)
        self.visual = build_visual(settings.visual)
        self.colour = nn.Linear(self.visual.width, len(COLOURS) + 1)
        self.shape = nn.Linear(self.visual.width, len(SHAPES) + 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (image, 3, height, width) -> logits (image, vision, colours + 1), (image, vision, shapes + 1)."""
        features = self.visual(images).features
        return self.colour(features), self.shape(features)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all weights to `model.safetensors`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous().cpu() for name, value in self.state_dict().items()},
                  Path(folder) / "model.safetensors")  # fmt: skip


class TokenLabelling:
    """Cross entropy of colour and shape at each token."""

    weights = {"colour": 1.0, "shape": 1.0}

    def counts(self, batch: LabelledImages) -> dict[str, int]:
        return {name: label.numel() for name, label in batch.labels._asdict().items()}

    def losses(self, model: TokenClassifier, batch: LabelledImages) -> dict[str, Tensor]:
        logits = zip(("colour", "shape"), model(batch.images), batch.labels, strict=True)
        return {name: functional.cross_entropy(scores.flatten(0, 1), label.flatten(), reduction="sum")
                for name, scores, label in logits}  # fmt: skip

    def watch(self, model: TokenClassifier, batch: LabelledImages) -> dict[str, float]:
        return {}


@torch.no_grad()
def token_accuracy(
    model: TokenClassifier, pictures: Sequence[Picture], settings: VisualInitSettings
) -> dict[str, float]:
    """Share of object tokens whose colour, and whose shape, is right; background tokens do not count."""
    model.eval()
    visual, hits, seen = settings.visual, np.zeros(2), np.zeros(2)
    device = next(model.parameters()).device
    for start in range(0, len(pictures), 100):
        some = pictures[start : start + 100]
        labels = token_labels(some, visual.grid)
        for index, (scores, label) in enumerate(
            zip(model(Pixels(visual.image_px).stack(some).to(device)), labels, strict=True)
        ):
            asked = label != BACKGROUND
            hits[index] += (scores.argmax(-1).cpu()[asked] == label[asked]).sum().item()
            seen[index] += asked.sum().item()
    return dict(zip(("colour_accuracy", "shape_accuracy"), (hits / seen).tolist(), strict=True))


def train_visual(run: Run, settings: VisualInitSettings) -> tuple[TokenClassifier, dict[str, float]]:
    """Train, or resume; the classifier and its accuracy on held-out scenes.

    `checkpoint/visual.safetensors` is what `init_visual` takes.
    """
    model = TokenClassifier(settings)  # first: a backbone that timm does not have is told before scenes are drawn
    pictures = read_pictures(write_scenes(scenes_folder(settings.scenes), settings.scenes))
    training = [picture for picture in pictures if picture.split == "train"]
    batches = LabelBatches(training, images=settings.train.images, image_px=settings.visual.image_px,
                           grid=settings.visual.grid, seed=settings.seed)  # fmt: skip
    fit(model, TokenLabelling(), batches, run, optim=settings.optim, train=settings.train, seed=settings.seed,
        workers=settings.workers, what="training the visual side")  # fmt: skip
    weights = {name: value.contiguous().cpu() for name, value in model.visual.state_dict().items()}
    save_file(weights, run.folder / "checkpoint" / "visual.safetensors")
    return model, token_accuracy(model, [picture for picture in pictures if picture.split == "val"], settings)
