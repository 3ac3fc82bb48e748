"""Hidden tokens guessed from their neighbours: smooth images can be copied, noise cannot, and masks decide how well."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import narrow_model
from sklearn.linear_model import Ridge

from vpworkbench.boxes import grid_boxes
from vpworkbench.data.objects import noise_on_objects
from vpworkbench.losses import visual_mask
from vpworkbench.probes.masks import nearest_by_position
from vpworkbench.studies.copying import MODES, PENALTY, copied, copy_errors

GRID, IMAGES = 5, 60


def masks(kinds=("random", "block")) -> dict[str, torch.Tensor]:
    noise = torch.rand(IMAGES, GRID**2, generator=torch.Generator().manual_seed(1))
    position = nearest_by_position(grid_boxes(GRID, GRID)).expand(IMAGES, -1, -1)
    return {kind: visual_mask(noise, 5, parsing=position if kind == "block" else None) for kind in kinds}


def surroundings(values: np.ndarray, masked: np.ndarray, token: int) -> list[float]:
    """Visible neighbours of one token of one image, row by row, each with a flag; the mean of all; a constant."""
    row, column, parts = token // GRID, token % GRID, []
    for y, x in ((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if x or y):
        inside = 0 <= row + y < GRID and 0 <= column + x < GRID
        other = (row + y) * GRID + column + x
        seen = inside and not masked[other]
        parts += [*(values[other] if seen else np.zeros(values.shape[1])), float(seen)]
    return [*parts, *values[~masked].mean(axis=0), 1.0]


def test_it_is_a_ridge_regression_on_the_neighbours():
    """Against scikit-learn; the three channels are all directions, so their rotation changes nothing."""
    torch.manual_seed(0)
    features, masked = torch.randn(IMAGES, GRID**2, 3).double(), masks(("random",))["random"].numpy()
    found = copy_errors(features, {"random": torch.from_numpy(masked)}, GRID).errors["random"]
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))
    for fold in (0, 1):
        test = set(order[fold::2].tolist())
        train = [image for image in range(IMAGES) if image not in test]
        known = features[train].flatten(0, 1)
        centred = (features - known.mean(dim=0)).numpy()
        values = centred / centred[train].std(ddof=1)
        given, wanted = {}, {}
        for image in range(IMAGES):
            tokens = masked[image].nonzero()[0]
            given[image] = np.array([surroundings(values[image], masked[image], token) for token in tokens])
            wanted[image] = centred[image, tokens]
        ridge = Ridge(alpha=PENALTY, fit_intercept=False)  # the constant is penalised too
        ridge.fit(np.concatenate([given[one] for one in train]), np.concatenate([wanted[one] for one in train]))
        variance = (centred[train] ** 2).sum(axis=2).mean()
        for image in test:
            error = ((ridge.predict(given[image]) - wanted[image]) ** 2).sum(axis=1).mean() / variance
            np.testing.assert_allclose(found[image], error, rtol=1e-6)


def test_smooth_features_are_copied_where_neighbours_stay_and_noise_is_not():
    torch.manual_seed(0)
    coarse = torch.nn.functional.interpolate(torch.randn(IMAGES, 4, 2, 2), size=GRID, mode="bilinear")
    found = copy_errors(coarse.flatten(2).transpose(1, 2), masks(), GRID)
    means = {kind: interval.mean for kind, interval in found.intervals().items()}
    assert means["random"] < 0.2 < means["block"] and found.difference("block", "random").low > 0.05
    noise = copy_errors(torch.randn(IMAGES, GRID**2, 4), masks(), GRID)
    assert all(interval.mean > 0.9 for interval in noise.intervals().values())


def test_one_image_has_nothing_to_be_fitted_on():
    with pytest.raises(ValueError, match="1 images: give at least 2"):
        copy_errors(torch.randn(1, GRID**2, 4), {"random": masks()["random"][:1]}, GRID)


def test_every_kind_of_mask_on_scenes(scenes):
    found = copied(narrow_model(scenes).visual, scenes[:24], budget=5)
    assert list(found.errors) == list(MODES) and all(len(errors) == 24 for errors in found.errors.values())
    patches = copied(narrow_model(scenes, family="patch", patch_width=12).visual, scenes[:24], budget=5)
    assert [kind for kind in MODES if kind not in patches.errors] == ["attention, rows", "attention, columns"]


def test_a_random_mask_falls_anywhere_though_its_pick_is_on_an_object():
    """Of the tokens beside the pick, as many lie on objects as chance puts there: 5 of 35 if 6 of 36 are on one."""
    objects = torch.zeros(4000, 36, dtype=torch.long)
    objects[:, [0, 5, 14, 20, 21, 35]] = torch.arange(1, 7)
    noise = noise_on_objects(objects)
    hidden = visual_mask(noise, 5)
    assert (objects.gather(1, noise.argmax(dim=1, keepdim=True)) > 0).all() and (hidden.sum(dim=1) == 5).all()
    beside = ((objects > 0) & hidden).sum(dim=1).double() - 1
    error = beside.std() / 4000**0.5
    assert beside.mean() == pytest.approx(4 * 5 / 35, abs=4 * float(error))
    nothing = noise_on_objects(torch.zeros_like(objects))
    assert torch.bincount(nothing.argmax(dim=1), minlength=36).min() > 60  # without objects any token is picked
