"""Regions by a detector of torchvision: random weights, a hand-made box, and what is refused."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from vpworkbench.data.detected import MOST_REGIONS, detect, detect_regions, open_detector, photographs
from vpworkbench.data.regions import RegionFiles
from vpworkbench.errors import CheckpointError, DataError, SettingsError
from vpworkbench.settings import pretrain_settings

NAME = "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = models.get_model(NAME, weights=None, weights_backbone=None, num_classes=4)
    file = tmp_path_factory.mktemp("weights") / "detector.safetensors"
    save_file(model.state_dict(), file)
    return file


def test_a_folder_of_photographs_becomes_region_files(tmp_path, weights):
    """Run twice: existing files are kept. The folder is what `visual regions` takes."""
    for number in (1, 2):
        miniatures.picture(tmp_path / "photos" / "inner" / f"{number}.jpg", (40 * number, 0, 90))
    made, options = tmp_path / "made", {"detector": NAME, "weights": str(weights)}
    found = detect_regions(str(tmp_path / "photos"), made, **options)
    assert found["images"] == 2 and 1 <= found["regions"] <= MOST_REGIONS
    first = (made / "inner" / "1.npz").read_bytes()
    assert detect_regions(str(tmp_path / "photos"), made, **options) == found
    assert (made / "inner" / "1.npz").read_bytes() == first
    (made / "inner" / "2.npz").write_bytes(first[: len(first) // 2])
    with pytest.raises(DataError, match=r"2.npz: not a complete npz .* extract this image again"):
        detect_regions(str(tmp_path / "photos"), made, **options)
    (made / "inner" / "2.npz").unlink()
    assert detect_regions(str(tmp_path / "photos"), made, **options) == found
    images = photographs(str(tmp_path / "photos"))
    packed = RegionFiles(made, most=5, width=1024).stack(images)
    assert packed.shape == (2, 5, 1029) and (packed[:, 0, -1] == 1).all()
    with np.load(made / "inner" / "2.npz") as content:
        assert len(content["classes"]) == len(content["scores"]) == len(content["boxes"])
        assert (np.diff(content["scores"]) <= 0).all()
    settings = pretrain_settings(visual="regions", regions=str(made))
    assert settings.visual.region_width == 1024
    for other in (json.dumps({"settings": {}}), "{}", "no JSON"):
        (made / "config.json").write_text(other)
        with pytest.raises(DataError, match="holds other regions"):
            detect_regions(str(tmp_path / "photos"), made, **options)
    miniatures.picture(tmp_path / "photos" / "inner" / "1.png", (0, 0, 90))
    with pytest.raises(DataError, match=r"1\.png and .*1\.jpg: their regions would share 1\.npz|1\.jpg and .*1\.png"):
        detect_regions(str(tmp_path / "photos"), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_hand_made_box_is_pooled_and_placed(weights, monkeypatch):
    """Maps that hold the x of each place in pixels: the mean of a pooled box is the x of its middle."""
    model = open_detector(NAME, str(weights))
    shown, _ = model.transform([torch.zeros(3, 40, 60)])
    height, width = shown.tensors.shape[-2:]
    maps = OrderedDict()
    for name, stride in (("0", 16), ("1", 32), ("pool", 64)):
        x = torch.arange(width // stride).float() * stride
        maps[name] = x.expand(1, 1, height // stride, -1)
    boxes = torch.tensor([[80.0, 40.0, 200.0, 120.0], [32.0, 64.0, 96.0, 128.0]])
    given = {"boxes": boxes, "labels": torch.tensor([3, 1]), "scores": torch.tensor([0.9, 0.4])}
    monkeypatch.setattr(model.backbone, "forward", lambda images: maps)
    monkeypatch.setattr(model.rpn, "forward", lambda images, maps: ([boxes], {}))
    monkeypatch.setattr(model.roi_heads, "forward", lambda maps, proposals, sizes: ([given], {}))
    monkeypatch.setattr(model.roi_heads, "box_head", nn.Flatten())
    found = detect(model, np.zeros((40, 60, 3), np.uint8))
    torch.testing.assert_close(found.features.mean(dim=1), boxes[:, [0, 2]].mean(dim=1), rtol=0, atol=0.5)
    ratio = torch.tensor([60 / shown.image_sizes[0][1], 40 / shown.image_sizes[0][0]]).repeat(2)
    torch.testing.assert_close(found.boxes, boxes * ratio)
    assert found.classes.tolist() == [3, 1] and found.scores.tolist() == pytest.approx([0.9, 0.4])
    given.update(boxes=boxes[:0], labels=given["labels"][:0], scores=given["scores"][:0])
    nothing = detect(model, np.zeros((40, 60, 3), np.uint8))  # all of the image
    torch.testing.assert_close(nothing.boxes, torch.tensor([[0.0, 0.0, 60.0, 40.0]]))
    assert nothing.classes.tolist() == [0] and nothing.scores.tolist() == [0]


def test_what_is_no_detector_is_refused(tmp_path, weights, monkeypatch):
    with pytest.raises(SettingsError, match=f"no Faster R-CNN of torchvision; did you mean '{NAME}'"):
        open_detector(NAME.replace("320", "32"))
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="other.safetensors: not the weights of " + NAME):
        open_detector(NAME, str(tmp_path / "other.safetensors"))
    with pytest.raises(DataError, match="holds no annotation file"):
        photographs(str(tmp_path))

    def no_network(name: str, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(models, "get_model", no_network)
    with pytest.raises(CheckpointError, match=re.escape("(no network); fetch https://") + ".*as --weights"):
        open_detector(NAME)
