"""Labels of scenes at tokens, their batches, and the accuracy of what is trained on them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.functional import one_hot

from vpworkbench.data.objects import objects_of_pictures
from vpworkbench.scenes.scene import COLOURS, SHAPES
from vpworkbench.train.scene_labels import (
    BACKGROUND,
    LabelBatches,
    Labelling,
    LabelNetwork,
    label_accuracy,
    labelled_images,
    token_labels,
)

read = partial(labelled_images, image_px=96, grid=6)


def test_a_token_has_the_label_of_the_object_on_a_fifth_of_its_pixels(scenes):
    """Counted pixel by pixel: the object on most pixels of the cell, if it has a fifth of them."""
    colours, shapes = list(COLOURS), list(SHAPES)
    labels = token_labels(scenes[:4], 6)
    assert labels.shape == (4, 6, 6, 2)
    for picture, rows in zip(scenes[:4], labels.tolist(), strict=True):
        for row in range(6):
            for column in range(6):
                cell = picture.object_map()[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].ravel().tolist()
                counts = [cell.count(number + 1) for number in range(len(picture.scene.things))]
                expected = [BACKGROUND, BACKGROUND]
                if max(counts) >= 0.2 * 256:
                    thing = picture.scene.things[counts.index(max(counts))]
                    expected[0] = colours.index(thing.colour) + 1
                    expected[1] = shapes.index(thing.shape) + 1 if thing.shape in shapes else BACKGROUND
                assert rows[row][column] == expected


def test_a_grid_that_does_not_divide_the_pixels(scenes):
    """Seven cells on 96 pixels: labels are those of the objects under tokens, except in a few cells at edges."""
    colours = token_labels(scenes[:10], 7)[..., 0].flatten(1)
    objects = objects_of_pictures(scenes[:10], 7)
    assert colours.shape == (10, 49) and colours.any()
    known = [[0, *(list(COLOURS).index(thing.colour) + 1 for thing in picture.scene.things)] for picture in scenes[:10]]
    expected = torch.tensor(
        [[row[number] for number in numbers] for row, numbers in zip(known, objects.tolist(), strict=True)]
    )
    assert (colours == expected).float().mean() > 0.97


def test_labels_are_mirrored_with_their_images(scenes):
    batches = LabelBatches(scenes[:20], read, images=20, seed=3)
    plain, mirrored = read(batches.sampler[0]), batches[0]
    flipped = (plain.images != mirrored.images).flatten(1).any(dim=1)
    assert 3 < flipped.sum() < 17
    assert torch.equal(mirrored.images[flipped], plain.images[flipped].flip(-1))
    assert torch.equal(mirrored.labels[flipped], plain.labels[flipped].flip(2))
    assert torch.equal(mirrored.labels[~flipped], plain.labels[~flipped])


class Oracle(LabelNetwork):
    """Knows the colours of some scenes, and says that all shapes are background."""

    def __init__(self, labels):
        super().__init__()
        self.add_heads(len(COLOURS) + 1, {"colour": len(COLOURS) + 1, "shape": len(SHAPES) + 1})
        self.colours = one_hot(labels[..., 0].flatten(1), len(COLOURS) + 1).float()
        for kind, head in self.heads.items():
            torch.nn.init.zeros_(head.bias)
            (torch.nn.init.eye_ if kind == "colour" else torch.nn.init.zeros_)(head.weight)
        self.heads["shape"].bias.data[BACKGROUND] = 1

    def forward(self, images):
        return self.colours


def test_accuracy_leaves_out_the_background(scenes):
    labels = read(scenes[:8]).labels
    oracle = Oracle(labels)
    share = (labels[..., 1] == BACKGROUND).double().mean().item()
    assert label_accuracy(oracle, scenes[:8], read)["shape_accuracy"] == pytest.approx(share)
    oracle.unscored = BACKGROUND
    assert label_accuracy(oracle, scenes[:8], read) == {"colour_accuracy": 1.0, "shape_accuracy": 0.0}


def test_each_kind_of_label_is_a_mean_over_tokens(scenes):
    batch = read(scenes[:8])
    objective, model = Labelling(("colour", "shape")), Oracle(batch.labels)
    assert objective.counts(batch) == {"colour": 8 * 36, "shape": 8 * 36}
    sums = objective.losses(model, batch)
    classes = len(COLOURS) + 1
    right = torch.log(torch.exp(torch.tensor(1.0)) + classes - 1) - 1  # cross entropy of one logit 1 among zeros
    assert sums["colour"].item() == pytest.approx(8 * 36 * right.item(), rel=1e-5)
