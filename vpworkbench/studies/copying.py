"""What MFR lets a model copy: how well a hidden visual token is guessed from its visible neighbours alone.

The paper masks by attention so that a hidden token cannot be copied from tokens like it beside it. Here no fusion is
trained: a ridge regression, fitted on other images, guesses the features of the tokens that each kind of mask hides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vpworkbench.boxes import grid_boxes
from vpworkbench.data.objects import noise_on_objects, objects_of_pictures
from vpworkbench.data.records import Picture
from vpworkbench.losses import Select, visual_mask
from vpworkbench.probes.masks import mask_scores
from vpworkbench.stats import Interval, bootstrap_interval, paired_interval
from vpworkbench.studies.examples import encoded

DIRECTIONS = 64
"""Principal directions of the features that the regression sees of each token."""
PENALTY = 10.0
FOLDS = 2
MODES: dict[str, tuple[str, Select]] = {
    "random": ("random", "row"),
    "block": ("block", "row"),
    "attention, rows": ("attention", "row"),
    "attention, columns": ("attention", "column"),
    "similar": ("similar", "row"),
    "object": ("object", "row"),
}
"""Kinds of masks: a value of `mask.mode`, and one of `mask.select`."""


class Copied(NamedTuple):
    """Squared error of guessed hidden tokens, as a share of their variance over all images; by kind of mask, (image,).

    1 is a guess no better than the mean token, 0 a perfect copy.
    """

    errors: dict[str, np.ndarray]

    def intervals(self) -> dict[str, Interval]:
        """Mean error of each kind with its bootstrap interval over images."""
        return {kind: bootstrap_interval(errors) for kind, errors in self.errors.items()}

    def difference(self, first: str, second: str) -> Interval:
        """Mean difference between two kinds on the same images and picks."""
        return paired_interval(self.errors[first], self.errors[second])


def copied(visual: nn.Module, pictures: Sequence[Picture], *, budget: int, seed: int = 0) -> Copied:
    """Guess hidden tokens of pictures behind every kind of mask that they allow, around the same picks.

    `visual` is a visual side on a grid, such as `examples.starting_visual` returns; `budget` is k, the hidden tokens of
    each image, the pick included.
    """
    settings = visual.settings
    _, features, parsing = zip(*encoded(visual, pictures), strict=True)
    objects = objects_of_pictures(pictures, settings.grid)
    noise, boxes = noise_on_objects(objects, seed=seed), grid_boxes(settings.grid, settings.grid)
    tokens, attention, masks = torch.cat(features), torch.cat(parsing) if settings.kind.parsing else None, {}
    for kind, (mode, select) in MODES.items():
        if (mode == "attention" and attention is None) or (mode == "object" and not objects.any()):
            continue
        scores = mask_scores(mode, tokens, attention, boxes.expand(len(tokens), -1, -1), objects)
        masks[kind] = visual_mask(noise, budget, parsing=scores, select=select)
    return copy_errors(tokens, masks, settings.grid, seed=seed)


def copy_errors(features: Tensor, masks: Mapping[str, Tensor], grid: int, *, seed: int = 0) -> Copied:
    """Errors of a ridge regression for each kind of mask, fitted on the other half of the images.

    It sees the visible ones of a token's eight neighbours, which of them are visible, and the mean of all visible
    tokens. Features are (image, vision, channel), masks bool (image, vision), tokens of a grid row by row. A ValueError
    for a single image: there is none to fit on.
    """
    if len(features) < FOLDS:
        raise ValueError(
            f"{len(features)} images: give at least {FOLDS}, since the others are what a guess is fitted on"
        )
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    errors = {kind: np.empty(len(features)) for kind in masks}
    for fold in range(FOLDS):
        held = torch.zeros(len(features), dtype=torch.bool)
        held[order[fold::FOLDS]] = True
        known = features[~held].double().flatten(0, 1)
        mean = known.mean(dim=0)
        variance = (known - mean).square().sum(dim=1).mean()
        directions = torch.linalg.svd(known - mean, full_matrices=False).Vh[:DIRECTIONS].T
        centred = features.double() - mean
        seen = centred @ directions
        seen = seen / seen[~held].std()
        for kind, masked in masks.items():
            inputs = _context(seen, masked, grid)
            rows = masked & ~held[:, None]
            given = torch.cat([inputs[rows], torch.ones(int(rows.sum()), 1)], dim=1)
            normal = given.T @ given + PENALTY * torch.eye(given.shape[1], dtype=torch.float64)
            weights = torch.linalg.solve(normal, given.T @ centred[rows])
            for image in held.nonzero()[:, 0].tolist():
                hidden = masked[image]
                guessed = inputs[image, hidden] @ weights[:-1] + weights[-1]
                errors[kind][image] = (guessed - centred[image, hidden]).square().sum(dim=1).mean() / variance
    return Copied(errors)


def _context(seen: Tensor, masked: Tensor, grid: int) -> Tensor:
    """What surrounds each token, (image, vision, input): visible neighbours, which are visible, and the mean of all."""
    visible = (~masked).to(seen)[..., None]
    shown = torch.cat([seen * visible, visible], dim=2).unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    squares = functional.unfold(shown, kernel_size=3, padding=1)  # image (channel place) vision; zero outside
    squares = squares.unflatten(1, (shown.shape[1], 9))[:, :, [0, 1, 2, 3, 5, 6, 7, 8]].flatten(1, 2).transpose(1, 2)
    mean = (seen * visible).sum(dim=1, keepdim=True) / visible.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.cat([squares, mean.expand_as(seen)], dim=2)
