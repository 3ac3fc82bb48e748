"""COCO's instance masks: polygons, both codes of runs, crowds; what lies outside the image is told."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.objects import objects_of_pictures
from vpworkbench.errors import DataError

pytest.importorskip("pycocotools")
HEIGHT, WIDTH = 4, 6
SQUARE = [0.0, 0.0, 3.0, 0.0, 3.0, 4.0, 0.0, 4.0]  # the left half
RUNS = {"size": [HEIGHT, WIDTH], "counts": [16, 8]}  # column by column: the two right ones


def written(folder: Path, **change: object) -> list:
    """The miniature of COCO with two objects in its second photograph, the last of them changed."""
    captions = miniatures.coco(folder)
    images = [{"id": number, "height": HEIGHT, "width": WIDTH} for number in (9, 25)]
    first = {"id": 1, "image_id": 25, "category_id": 3, "segmentation": [SQUARE], "iscrowd": 0}
    second = {"id": 2, "image_id": 25, "category_id": 7, "segmentation": RUNS, "iscrowd": 0} | change
    categories = [{"id": 3, "name": "car"}, {"id": 7, "name": "train"}]
    content = {"images": images, "annotations": [first, second], "categories": categories}
    captions.with_name("instances_train2014.json").write_text(json.dumps(content))
    return read_pictures(folder)


def test_polygons_and_runs(tmp_path):
    bare, picture = written(tmp_path)
    assert picture.has_objects and picture.instances.names() == ["car", "train"]
    wanted = np.zeros((HEIGHT, WIDTH), dtype=int)
    wanted[:, :3], wanted[:, 4:] = 1, 2
    np.testing.assert_array_equal(picture.object_map(), wanted)
    assert not bare.object_map().any() and bare.instances.names() == []
    tokens = objects_of_pictures([picture], 2)
    assert tokens.tolist() == [[1, 2, 1, 2]]  # the right tokens: two of three columns
    assert objects_of_pictures([picture], 2, share=0.7).tolist() == [[1, 0, 1, 0]]


def test_ids_may_be_digits_in_quotes(tmp_path):
    _, picture = written(tmp_path, id="2", image_id="25", category_id="7")
    assert picture.instances.names() == ["car", "train"] and (picture.object_map()[:, 4:] == 2).all()


def test_small_objects_lie_on_large_ones_and_crowds_are_background(tmp_path):
    from pycocotools import mask

    encoded = mask.encode(np.asfortranarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8)))
    packed = {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}
    _, picture = written(tmp_path, segmentation=packed)
    assert (np.diag(picture.object_map()) == 2).all() and picture.object_map()[1, 0] == 1
    _, picture = written(tmp_path / "crowd", iscrowd=1)
    assert set(np.unique(picture.object_map())) == {0, 1}


@pytest.mark.parametrize(
    "change, told",
    [
        ({"segmentation": [[0, 0, 9, 0, 9, 9, 0, 9]]}, "annotation 2: a polygon leaves the image of 6 x 4 pixels"),
        ({"segmentation": RUNS | {"size": [6, 4]}}, r"annotation 2: a mask of \[6, 4\] for an image of \[4, 6\]"),
        ({"segmentation": "x"}, "annotation 2: .*segmentation"),
        ({"segmentation": []}, "annotation 2: .*correct or drop it"),
    ],
)
def test_a_broken_mask_names_its_annotation(tmp_path, change, told):
    _, picture = written(tmp_path, **change)
    with pytest.raises(DataError, match=re.escape(str(tmp_path)) + ".*instances_train2014.json: " + told):
        picture.object_map()


def test_files_of_another_release(tmp_path):
    _, picture = written(tmp_path)
    with pytest.raises(DataError, match="no image 26, which has captions"):
        replace(picture.instances, image_id=26).object_map()
    picture.instances.file.with_name("instances_b.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="instances_b.json: not COCO's instances"):
        replace(picture.instances, file=picture.instances.file.with_name("instances_b.json")).object_map()


def test_coco_mini_has_objects(real_data):
    pictures = [picture for picture in read_pictures(real_data / "coco_mini") if picture.split == "val"][:12]
    maps = [picture.object_map() for picture in pictures]
    assert all(one.shape == picture.image.pixels().shape[:2] for one, picture in zip(maps, pictures, strict=True))
    objects = objects_of_pictures(pictures, 8)
    assert 0.1 < (objects > 0).float().mean() < 0.7
    assert torch.equal(objects, objects_of_pictures(pictures, 8, share=0.5))
