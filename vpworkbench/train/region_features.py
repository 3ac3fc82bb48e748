"""Regions without a detector: the true boxes of generated scenes and of NLVR v1, with features of a small CNN.

The CNN learns the scenes' labels (colour, shape, material) at the crop of each box, on the scenes and for the epochs
that a parser is given by `visual_init`; its last map, averaged over the crop, is the feature.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.nlvr1 import drawn_at
from vpworkbench.data.records import Picture
from vpworkbench.data.regions import SCENES, write_regions
from vpworkbench.data.splits import scenes_folder
from vpworkbench.data.steps import Sampler
from vpworkbench.errors import DataError
from vpworkbench.runs import Run, open_folder
from vpworkbench.scenes.scene import COLOURS, COVERED, MATERIALS, SHAPES
from vpworkbench.scenes.write import pair_sources, write_scenes
from vpworkbench.settings import RegionSettings
from vpworkbench.train.checkpoints import save_weights
from vpworkbench.train.engine import fit

AROUND = 0.1
"""A crop shows so much of the box's sides around it: an outline needs what lies outside."""
AT_ONCE = 64
LABELS = {"colour": tuple(COLOURS), "shape": (*SHAPES, COVERED), "material": MATERIALS}


def true_boxes(picture: Picture) -> list[tuple[float, float, float, float]]:
    """x0 y0 x1 y1 in pixels of what is drawn; `DataError` for a picture of which nobody knows."""
    boxes = None
    if picture.scene:
        boxes = [thing.box for thing in picture.scene.things]
    elif picture.boxes:
        order = re.search(r"-(\d)\.png$", picture.image.name)
        boxes = drawn_at(picture.boxes, int(order[1])) if order else None
    if boxes:
        return boxes
    if boxes is not None:
        raise DataError(f"{picture.image}: nothing is drawn there, so there is no region; drop its record")
    raise DataError(
        f"{picture.image}: its true boxes are not known; `vpw regions` takes generated scenes and NLVR v1. Of "
        "photographs give the regions of a detector, as docs/families.md describes"
    )


def crops(picture: Picture, boxes: Sequence[Sequence[float]], crop_px: int) -> np.ndarray:
    """What lies in each box and a little around it, squeezed to a square; uint8 (region, crop_px, crop_px, 3)."""
    image = Image.fromarray(picture.image.pixels())
    if beyond := [box for box in boxes if box[0] >= image.width or box[1] >= image.height]:
        raise DataError(
            f"{picture.image}: {image.width} x {image.height} px, but something is drawn at {list(beyond[0])}; not the "
            "image that its record describes: restore it"
        )
    found = []
    for x0, y0, x1, y1 in boxes:
        wide, high = AROUND * (x1 - x0), AROUND * (y1 - y0)
        window = max(0, x0 - wide), max(0, y0 - high), min(image.width, x1 + wide), min(image.height, y1 + high)
        found.append(np.asarray(image.resize((crop_px, crop_px), Image.Resampling.BICUBIC, box=window)))
    return np.stack(found)


class CropLabels(NamedTuple):
    """int64 (region,) each: places in `LABELS`."""

    colour: Tensor
    shape: Tensor
    material: Tensor


@dataclass(frozen=True)
class LabelledCrops:
    """uint8 (region, 3, height, width) and what each shows."""

    images: Tensor
    labels: CropLabels

    def to(self, device: torch.device | str) -> LabelledCrops:
        return LabelledCrops(self.images.to(device), CropLabels(*(label.to(device) for label in self.labels)))

    def micro_batches(self, count: int) -> list[LabelledCrops]:
        cut = zip(self.images.chunk(count), *(label.chunk(count) for label in self.labels), strict=True)
        return [LabelledCrops(images, CropLabels(*labels)) for images, *labels in cut]


def labelled_crops(pictures: Sequence[Picture], crop_px: int) -> LabelledCrops:
    """Every thing of some generated scenes."""
    things = [thing for picture in pictures for thing in picture.scene.things]
    pixels = np.concatenate([crops(picture, true_boxes(picture), crop_px) for picture in pictures])
    labels = ([known.index(getattr(thing, name)) for thing in things] for name, known in LABELS.items())
    return LabelledCrops(_as_images(pixels), CropLabels(*map(torch.tensor, labels)))


def _as_images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


class CropBatches(Dataset):
    """The things of some scenes by step; mirrored at random."""

    def __init__(self, pictures: Sequence[Picture], *, images: int, crop_px: int, seed: int) -> None:
        self.sampler = Sampler(pictures, images, seed=(seed,))
        self.crop_px, self.seed = crop_px, seed

    def __getitem__(self, step: int) -> LabelledCrops:
        batch = labelled_crops(self.sampler[step], self.crop_px)
        mirrored = torch.from_numpy(np.random.default_rng((self.seed, 1, step)).random(len(batch.images)) < 0.5)
        batch.images[mirrored] = batch.images[mirrored].flip(-1)
        return batch


class RegionNetwork(nn.Module):
    """Four convolutions, the last map averaged, and a linear head for each label.

    Group norm, not batch norm: a crop's feature does not depend on the others of its batch.
    """

    def __init__(self, settings: RegionSettings) -> None:
        super().__init__()
        torch.manual_seed(settings.seed)
        widths = (3, 32, 64, 128, settings.width)
        layers: list[nn.Module] = []
        for stage, (narrow, wide) in enumerate(zip(widths, widths[1:], strict=False)):
            convolution = nn.Conv2d(narrow, wide, 3, stride=2 if stage else 1, padding=1, bias=False)
            layers += [convolution, nn.GroupNorm(math.gcd(8, wide), wide), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(settings.width, len(known)) for name, known in LABELS.items()})

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (region, 3, height, width) -> features (region, width)."""
        return self.layers(images.to(self.layers[0].weight.dtype) / 127.5 - 1).mean(dim=(2, 3))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model.safetensors`."""
        save_weights(self, folder)


class CropLabelling:
    """Cross entropy of colour, shape and material at each crop."""

    weights = dict.fromkeys(LABELS, 1.0)

    def counts(self, batch: LabelledCrops) -> dict[str, int]:
        return dict.fromkeys(LABELS, len(batch.images))

    def losses(self, model: RegionNetwork, batch: LabelledCrops) -> dict[str, Tensor]:
        features = model(batch.images)
        return {name: functional.cross_entropy(model.heads[name](features), label, reduction="sum")
                for name, label in batch.labels._asdict().items()}  # fmt: skip

    def watch(self, model: RegionNetwork, batch: LabelledCrops) -> dict[str, float]:
        return {}


@torch.no_grad()
def crop_accuracy(model: RegionNetwork, pictures: Sequence[Picture], crop_px: int) -> dict[str, float]:
    """Share of things whose colour, shape and material are right."""
    hits, seen = dict.fromkeys(LABELS, 0), 0
    device = next(model.parameters()).device
    for start in range(0, len(pictures), AT_ONCE):
        batch = labelled_crops(pictures[start : start + AT_ONCE], crop_px).to(device)
        features = model.eval()(batch.images)
        seen += len(features)
        for name, label in batch.labels._asdict().items():
            hits[name] += int((model.heads[name](features).argmax(dim=-1) == label).sum())
    return {f"{name}_accuracy": count / max(seen, 1) for name, count in hits.items()}


def make_regions(folder: Path, settings: RegionSettings, *, progress: bool = True) -> dict[str, float]:
    """Train the CNN and write one npz for each image; what is there already is kept, the same call goes on.

    `folder` is a run's: `config.json` first, `checkpoint/`, `summary.json` last. Its name is what
    `visual.region_files` takes.

    Returns
    -------
    dict
        `images`, `regions` (their mean number in an image) and the accuracy on held-out scenes.

    Raises
    ------
    DataError, SettingsError, FileExistsError
        For a set without true boxes; for a folder that holds regions of other settings, or something else.
    """
    given = [] if settings.source == "scenes" else read_pictures(settings.source)
    counts = [len(true_boxes(picture)) for picture in given]  # before scenes are generated: there may be none
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise FileExistsError(f"{folder} exists and holds no regions; choose another folder")
    run = open_folder(folder, "regions", settings)
    written = write_scenes(scenes_folder(settings.scenes), settings.scenes, progress=progress)
    scenes = read_pictures(written)
    place, pictures = (Path(settings.source), given) if given else (written, scenes)
    counts = counts or [len(true_boxes(picture)) for picture in scenes]
    if (place / "settings.json").exists():
        shutil.copyfile(place / "settings.json", folder / SCENES)
    model = train_region_network(run, settings, [picture for picture in scenes if picture.split == "train"])
    write_features(folder, model, pictures, settings.crop_px, progress=progress)
    for copy, original in pair_sources(place).items():  # images of statements on pairs, under names of their own
        if not (target := _npz(folder, copy)).exists():
            draft = target.with_name(f".{target.name}")
            shutil.copyfile(_npz(folder, original), draft)
            draft.replace(target)
    accuracy = crop_accuracy(model, [picture for picture in scenes if picture.split == "val"], settings.crop_px)
    summary = {"images": len(pictures), "regions": sum(counts) / len(counts)} | accuracy
    run.write_summary(**summary, seed=settings.seed, wall_s=run.wall_s)
    return summary


def train_region_network(run: Run, settings: RegionSettings, pictures: Sequence[Picture]) -> RegionNetwork:
    """The CNN, trained or resumed."""
    model = RegionNetwork(settings)
    batches = CropBatches(pictures, images=settings.train.images, crop_px=settings.crop_px, seed=settings.seed)
    fit(model, CropLabelling(), batches, run, optim=settings.optim, train=settings.train, seed=settings.seed,
        workers=settings.workers, what="training the region network")  # fmt: skip
    return model


@torch.no_grad()
def write_features(
    folder: Path, model: RegionNetwork, pictures: Sequence[Picture], crop_px: int, *, progress: bool = True
) -> None:
    """One npz for each image that has none; always in the same parts, so that a resumed call writes equal bytes."""
    device = next(model.eval().parameters()).device
    with tqdm(total=len(pictures), desc="writing regions", unit="image", disable=not progress) as bar:
        for start in range(0, len(pictures), AT_ONCE):
            part = pictures[start : start + AT_ONCE]
            bar.update(len(part))
            files = [_npz(folder, picture.image.name) for picture in part]
            if all(file.exists() for file in files):
                continue
            boxes = [true_boxes(picture) for picture in part]
            pixels = np.concatenate([crops(*one, crop_px) for one in zip(part, boxes, strict=True)])
            features = model(_as_images(pixels).to(device)).cpu().split([len(some) for some in boxes])
            for picture, file, some, of_boxes in zip(part, files, boxes, features, strict=True):
                if not file.exists():
                    height, width = picture.image.pixels().shape[:2]
                    write_regions(file, of_boxes.numpy(), np.array(some), (width, height))


def _npz(folder: Path, image: str) -> Path:
    return (folder / image).with_suffix(".npz")
