"""The visual families behind one interface: every family with every objective, regions with padding, a fifth one."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import narrow_model
from torch import nn

from vpworkbench.config import SettingsError, VisualSettings, pretrain_settings
from vpworkbench.config.families import FAMILIES
from vpworkbench.data.records import DataError, ImageFile, Picture
from vpworkbench.data.regions import RegionFiles, read_npz, write_regions
from vpworkbench.fusion import box_vector
from vpworkbench.objectives import visual_mask
from vpworkbench.pretrain import Pretraining, group_batches, prepare, pretrain, probe
from vpworkbench.probes.geometry import modality_masks
from vpworkbench.runs import open_run
from vpworkbench.visual import VisualTokens, build_visual

WIDTH = 12


@pytest.fixture(scope="session")
def region_folder(scenes: list[Picture], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The true boxes of the scenes with random features."""
    folder, rng = tmp_path_factory.mktemp("regions"), np.random.default_rng(0)
    for picture in scenes:
        boxes = [thing.box for thing in picture.scene.things]
        side = picture.scene.image_px
        write_regions((folder / picture.image.name).with_suffix(".npz"), rng.normal(size=(len(boxes), WIDTH)), boxes,
                      (side, side))  # fmt: skip
    return folder


def settings_of(family: str, masking: str, folder: Path, **overrides: object):
    regions = {"visual.regions": 8, "visual.region_width": WIDTH, "visual.region_files": str(folder)}
    few = {"data.scenes.images": 60, "data.scenes.val": 20, "data.scenes.test": 10, "data.workers": 0,
           "train.images": 4, "train.log_every": 2, "fusion.width": 32, "fusion.heads": 2, "fusion.layers": 2,
           "fusion.feed_forward": 64, "visual.width": 12, "visual.heads": (1, 2)}  # fmt: skip
    return pretrain_settings(
        visual=family, masking=masking, init_visual="", steps=2, overrides=few | regions | dict(overrides)
    )


OBJECTIVES = list(product(("none", "random", "attention"), (0.0, 0.1), (True, False)))  # MFR, VLA, groups


def test_every_family_trains_with_every_objective_or_says_why_not(region_folder, scenes):
    trained, refused = 0, 0
    for family, (masking, vla, grouped) in product(("swin", "grid", "patch", "regions"), OBJECTIVES):
        extra = {"loss.vla": vla, "data.grouped": grouped}
        if masking == "attention" and not FAMILIES[family].parsing:
            with pytest.raises(SettingsError, match="needs a parsing attention"):
                settings_of(family, masking, region_folder, **extra)
            refused += 1
            continue
        settings = settings_of(family, masking, region_folder, **extra)
        run, prepared = open_run("01_pretrain", settings), prepare(settings)
        assert pretrain(run, prepared, settings) == 2
        metrics = run.metrics()
        assert np.isfinite(metrics.to_numpy(dtype=float)).all()
        assert ("mfr" in metrics) == (masking != "none") and ("vla" in metrics) == (vla > 0)
        trained += 1
    assert (trained, refused) == (4 * 12 - 3 * 4, 3 * 4)


def test_regions_refuse_what_needs_pixels(region_folder):
    for setting in ({"data.flip": True}, {"mask.where": "pixels"}, {"data.cache": True}):
        with pytest.raises(SettingsError, match="no pixels"):
            settings_of("regions", "random", region_folder, **setting)


def test_nothing_else_branches_on_the_name_of_a_family():
    package = Path(__file__).parents[1] / "vpworkbench"
    named = re.compile(r"""(?<!for )family\s*(?:[!=]=|in\b)\s*[("'\[{]|["'](?:swin|grid|patch|regions)["']\s*[!=]=""")
    found = [file.name for file in package.rglob("*.py") if named.search(file.read_text(encoding="utf-8"))]
    assert found == []


# ------------------------------------------------------------------------------------------------------------ regions


def test_box_vector_is_the_seven_numbers_of_uniter():
    found = box_vector(torch.tensor([[0.1, 0.2, 0.5, 0.9]]))
    torch.testing.assert_close(found, torch.tensor([[0.1, 0.2, 0.5, 0.9, 0.4, 0.7, 0.28]]))


def region_model(scenes, folder, most=8):
    return narrow_model(scenes, family="regions", regions=most, region_width=WIDTH, region_files=str(folder))


def test_region_embedding_is_uniters_formula(scenes, region_folder):
    model = region_model(scenes, region_folder)
    fusion, features, boxes = model.fusion, torch.randn(2, 3, WIDTH), torch.rand(2, 3, 4)
    for norm in (fusion.feature_norm, fusion.box_norm, fusion.vision_norm):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)

    def normed(norm, values):
        centred = values - values.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias

    seven = torch.stack([*boxes.unbind(-1), boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1],
                         (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])], dim=-1)  # fmt: skip
    looks = features @ fusion.vision_in.weight.T + fusion.vision_in.bias
    places = seven @ fusion.box_in.weight.T + fusion.box_in.bias
    expected = normed(fusion.vision_norm, normed(fusion.feature_norm, looks) + normed(fusion.box_norm, places))
    found = fusion.embed_vision(VisualTokens(features, None, None, boxes))
    assert (found - expected).abs().max() < 1e-5


@torch.no_grad()
def test_padding_changes_nothing(scenes, region_folder):
    """The same image with three and with eleven places of padding: equal outputs, losses and probes."""
    few, many = region_model(scenes, region_folder, 5), region_model(scenes, region_folder, 13)
    many.load_state_dict(few.state_dict())
    pictures = scenes[:6]
    texts = [picture.captions[0] for picture in pictures]
    short, long = few.prepare(pictures, texts), many.prepare(pictures, texts)
    assert not (long.vision & ~long.tokens)[:, : short.forward["words"].shape[1]].any()
    torch.testing.assert_close(few(**short.forward).cls, many(**long.forward).cls, rtol=0, atol=1e-5)
    counts = torch.tensor([len(picture.scene.things) for picture in pictures])
    assert (long.tokens & long.vision).sum(1).tolist() == counts.tolist()
    one, other = probe(few, pictures, images=6), probe(many, pictures, images=6)
    np.testing.assert_allclose(one.flow, other.flow, atol=1e-5)
    np.testing.assert_allclose(one.nmi, other.nmi, atol=1e-6)


@torch.no_grad()
def test_losses_leave_padding_out(scenes, region_folder):
    settings = settings_of("regions", "random", region_folder, **{"mask.budget": 3})
    model = region_model(scenes, region_folder)
    batch = group_batches(scenes, model, settings.data, images=4, seed=0)[0]
    noisy = batch.images.clone()
    noisy[..., :-1] += torch.where(batch.images[..., -1:] > 0, 0.0, 5.0)
    one, other = (Pretraining(settings).losses(model, part) for part in (batch, batch.of_images(range(4))))
    changed = Pretraining(settings).losses(model, replace(batch, images=noisy))
    for name in one:
        torch.testing.assert_close(one[name], other[name])
        torch.testing.assert_close(one[name], changed[name], rtol=1e-5, atol=1e-5)


def test_masks_hide_a_share_of_the_real_regions():
    noise = torch.rand(4, 20, generator=torch.Generator().manual_seed(0))
    seen = torch.arange(20) < torch.tensor([[20], [10], [4], [1]])
    masked = visual_mask(noise, 5, seen=seen)
    assert masked.sum(1).tolist() == [5, 2, 1, 1] and not (masked & ~seen).any()


@torch.no_grad()
def test_the_geometry_of_regions_is_their_boxes(scenes, region_folder):
    model = region_model(scenes, region_folder)
    inputs = model.prepare(scenes[:2], [picture.captions[0] for picture in scenes[:2]])
    found = modality_masks(model, inputs.forward)
    assert torch.equal(found.vision & found.tokens, inputs.vision & inputs.tokens)
    boxes = found.boxes[0][found.vision[0] & found.tokens[0]]
    true = torch.tensor([thing.box for thing in scenes[0].scene.things]) / scenes[0].scene.image_px
    torch.testing.assert_close(boxes.float(), true.float())


# ------------------------------------------------------------------------------------------------------------- readers


def tsv(file: Path, **changes: str) -> Path:
    def coded(values):
        return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()

    row = {"image_id": "391895", "image_w": "100", "image_h": "50", "num_boxes": "2",
           "boxes": coded([[0, 0, 50, 25], [10, 10, 100, 50]]), "features": coded(np.arange(2 * WIDTH))}  # fmt: skip
    file.write_text("\t".join((row | changes).values()) + "\n")
    return file


PHOTO = ImageFile(Path("images"), "COCO_val2014_000000391895.jpg")


def test_a_tsv_of_butd_is_read(tmp_path):
    files = RegionFiles(tsv(tmp_path / "a.tsv"), most=3, width=WIDTH)
    found = files.regions(PHOTO)
    np.testing.assert_array_equal(found.features, np.arange(2 * WIDTH).reshape(2, WIDTH))
    np.testing.assert_allclose(found.boxes, [[0, 0, 0.5, 0.5], [0.1, 0.2, 1, 1]])
    packed = files.stack([PHOTO])
    assert packed.shape == (1, 3, WIDTH + 5) and packed[0, :, -1].tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    "change, message",
    [({"features": "AAA*"}, "391895: features is no base64"), ({"boxes": "AAAA"}, "391895: boxes is no base64"),
     ({"num_boxes": "3"}, "391895: num_boxes is 3, but 2 boxes"), ({"num_boxes": "two"}, "391895: .* is no number"),
     ({"image_w": "60"}, r"391895: box 1 .* is outside the image of 60 x 50 px"),
     ({"image_id": "7"}, "391895.jpg: no features of this image")],
)  # fmt: skip
def test_a_broken_tsv_names_the_image(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        RegionFiles(tsv(tmp_path / "a.tsv", **change), most=3, width=WIDTH).regions(PHOTO)


def test_broken_npz_name_the_image(tmp_path):
    image = ImageFile(Path("images"), "b/7.png")
    files = RegionFiles(tmp_path, most=3, width=WIDTH)
    with pytest.raises(DataError, match="7.png: no features of this image"):
        files.regions(image)
    good = np.zeros((2, WIDTH)), np.array([[0, 0, 5, 5], [1, 1, 9, 9]])
    write_regions(tmp_path / "b" / "7.npz", *good, (10, 10))
    assert files.regions(image).boxes.max() == np.float32(0.9)
    for features, boxes, size, message in (
        (good[0], good[1][:1], (10, 10), "do not belong together"),
        (*good, (7, 7), "box 1 .* outside the image"),
        (good[0] + np.nan, good[1], (10, 10), "not finite"),
        (good[0][:, 1:], good[1], (10, 10), "set visual.region_width"),
    ):
        write_regions(tmp_path / "b" / "7.npz", features, boxes, size)
        with pytest.raises(DataError, match=f"7.*{message}"):
            files.regions(image)
    (tmp_path / "b" / "7.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match="7.npz: no whole npz"):
        read_npz(tmp_path / "b" / "7.npz")


def test_regions_without_files_say_how_to_make_them():
    with pytest.raises(DataError, match="one npz for each image"):
        RegionFiles("", most=3, width=WIDTH)


# ------------------------------------------------------------------------------------------------------------- a fifth


def test_the_fifth_family_of_the_docs(scenes, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert len(example.strip().splitlines()) <= 15
    with monkeypatch.context() as patch:
        patch.setattr("vpworkbench.config.families.FAMILIES", FAMILIES)
        before = set(FAMILIES)
        exec(example, {})
        (name,) = set(FAMILIES) - before
        try:
            settings = settings_of(name, "random", Path())
            assert isinstance(build_visual(VisualSettings(family=name)), nn.Module)
            assert pretrain(open_run("01_pretrain", settings), prepare(settings), settings) == 2
        finally:
            del FAMILIES[name]
