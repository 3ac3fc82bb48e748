"""Regions without a detector: the true boxes of generated scenes and of NLVR v1, with features of a small CNN.

The CNN learns the scenes' labels (colour, shape, material) from a crop of each box; its last map, averaged over the
crop, is the feature.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.inputs import channels_first
from vpworkbench.data.nlvr1 import drawn_at
from vpworkbench.data.records import Picture
from vpworkbench.data.regions import SCENES, write_regions
from vpworkbench.data.scene_cache import cached_scenes
from vpworkbench.errors import DataError
from vpworkbench.runs import open_folder
from vpworkbench.scenes.scene import COLOURS, COVERED, MATERIALS, SHAPES
from vpworkbench.scenes.write import pair_sources
from vpworkbench.settings import RegionSettings
from vpworkbench.system import draft
from vpworkbench.train.scene_labels import AT_ONCE, LabelledBatch, LabelNetwork, train_labels

MARGIN = 0.1  # share of the box's sides that a crop shows around it: an outline needs what lies outside
KINDS = {"colour": tuple(COLOURS), "shape": (*SHAPES, COVERED), "material": MATERIALS}


def make_regions(folder: Path, settings: RegionSettings) -> dict[str, float]:
    """Train the CNN and write one npz for each image; a repeated call keeps existing files and makes the others.

    `folder` is a run folder: `config.json` comes first, then `checkpoint/`, and `summary.json` last. Give its path to
    `visual.region_files`. Returns `images`, `regions` (mean number per image) and the accuracy on held-out scenes.
    """
    given = [] if settings.source == "scenes" else read_pictures(settings.source)
    for picture in given:
        true_boxes(picture)  # a set without boxes fails before scenes are drawn
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise FileExistsError(f"{folder} exists and holds no regions; choose another folder")
    run = open_folder(folder, "regions", settings)
    written = cached_scenes(settings.scenes)
    scenes = read_pictures(written)
    place, pictures = (Path(settings.source), given) if given else (written, scenes)
    if (place / "settings.json").exists():
        shutil.copyfile(place / "settings.json", folder / SCENES)
    model, read = RegionNetwork(settings), partial(labelled_crops, crop_px=settings.crop_px)
    accuracy = train_labels(model, scenes, read, run, settings, what="training the region network")
    write_features(folder, model, pictures, settings.crop_px)
    for copy, original in pair_sources(place).items():  # images of statements on pairs have names of their own
        if not (target := _npz(folder, copy)).exists():
            with draft(target, durable=False) as file:
                shutil.copyfile(_npz(folder, original), file)
    regions = sum(len(true_boxes(picture)) for picture in pictures)
    classes = math.prod(map(len, KINDS.values()))
    summary = {"images": len(pictures), "regions": regions / len(pictures), "classes": classes, **accuracy}
    run.write_summary(**summary, seed=settings.seed, wall_s=run.wall_s)
    return summary


@torch.no_grad()
def write_features(folder: Path, model: RegionNetwork, pictures: Sequence[Picture], crop_px: int) -> None:
    """Write one npz for each image that has none; in fixed parts, so that a repeated call writes equal bytes."""
    device = next(model.eval().parameters()).device
    starts = range(0, len(pictures), AT_ONCE)
    for start in tqdm(starts, desc="writing regions", unit=f"{AT_ONCE} images"):
        part = pictures[start : start + AT_ONCE]
        files = [_npz(folder, picture.image.name) for picture in part]
        if all(file.exists() for file in files):
            continue
        boxes = [true_boxes(picture) for picture in part]
        pixels = np.concatenate([crops(*one, crop_px) for one in zip(part, boxes, strict=True)])
        features = model(channels_first(pixels).to(device))
        named, counts = model.named(features), [len(own) for own in boxes]
        found = zip(part, files, boxes, features.cpu().split(counts), named.split(counts), strict=True)
        for picture, file, own_boxes, own_features, own_classes in found:
            if not file.exists():
                height, width = picture.image.pixels().shape[:2]
                size = width, height
                write_regions(file, own_features.numpy(), np.array(own_boxes), size, classes=own_classes.numpy())


def _npz(folder: Path, image: str) -> Path:
    return (folder / image).with_suffix(".npz")


def true_boxes(picture: Picture) -> list[tuple[float, float, float, float]]:
    """x0 y0 x1 y1 in pixels of each thing that is drawn; a `DataError` if they are not known."""
    if picture.scene:
        boxes = [thing.box for thing in picture.scene.things]
    elif picture.boxes and (order := re.search(r"-(\d)\.png$", picture.image.name)):
        boxes = drawn_at(picture.boxes, int(order[1]))
    else:
        raise DataError(
            f"{picture.image}: its true boxes are not known; `vpw regions` takes generated scenes and NLVR v1. For "
            "photographs use the regions of a detector, as docs/families.md describes"
        )
    if not boxes:
        raise DataError(f"{picture.image}: nothing is drawn there, so there is no region; drop its record")
    return boxes


def crops(picture: Picture, boxes: Sequence[Sequence[float]], crop_px: int) -> np.ndarray:
    """Each box with a small margin, resized to a square; uint8 (region, crop_px, crop_px, 3)."""
    image = Image.fromarray(picture.image.pixels())
    if beyond := [box for box in boxes if box[0] >= image.width or box[1] >= image.height]:
        raise DataError(
            f"{picture.image}: {image.width} x {image.height} px, but something is drawn at {list(beyond[0])}: this "
            "is not the image that its record describes; restore it"
        )
    found = []
    for x0, y0, x1, y1 in boxes:
        wide, high = MARGIN * (x1 - x0), MARGIN * (y1 - y0)
        window = max(0, x0 - wide), max(0, y0 - high), min(image.width, x1 + wide), min(image.height, y1 + high)
        found.append(np.asarray(image.resize((crop_px, crop_px), Image.Resampling.BICUBIC, box=window)))
    return np.stack(found)


def labelled_crops(pictures: Sequence[Picture], crop_px: int) -> LabelledBatch:
    """Every thing of some generated scenes, with its place in each of `KINDS`."""
    things = [thing for picture in pictures for thing in picture.scene.things]
    pixels = np.concatenate([crops(picture, true_boxes(picture), crop_px) for picture in pictures])
    labels = [[names.index(getattr(thing, kind)) for kind, names in KINDS.items()] for thing in things]
    return LabelledBatch(channels_first(pixels), torch.tensor(labels))


class RegionNetwork(LabelNetwork):
    """Four convolutions, the last map averaged, and heads for colour, shape and material.

    Group norm, not batch norm: a crop's feature does not depend on the other crops of its batch.
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
        self.add_heads(settings.width, {kind: len(names) for kind, names in KINDS.items()})

    def named(self, features: Tensor) -> Tensor:
        """The class of each region, as a detector names it: the most probable label of each kind, as one number."""
        number = torch.zeros(len(features), dtype=torch.long)
        for head in self.heads.values():
            number = number * head.out_features + head(features).argmax(dim=1).cpu()
        return number

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (region, 3, height, width) -> features (region, width)."""
        return self.layers(images.to(self.layers[0].weight.dtype) / 127.5 - 1).mean(dim=(2, 3))
