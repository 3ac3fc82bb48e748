"""The visual families behind one interface: every family with every objective, regions with padding, a fifth one."""

from __future__ import annotations

import base64
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FEW, narrow_model
from torch import nn
from transformers import ViltConfig, ViltModel

from vpworkbench import figures, subjects
from vpworkbench.data.images import ImageFile
from vpworkbench.data.inputs import prepare as prepare_inputs
from vpworkbench.data.inputs import use_regions
from vpworkbench.data.inputs import visual_input as input_of
from vpworkbench.data.records import Picture
from vpworkbench.data.regions import TSV_FIELDS, RegionFiles, read_npz, write_regions
from vpworkbench.data.scene_cache import scenes_folder
from vpworkbench.errors import DataError, SettingsError
from vpworkbench.explorer import explore
from vpworkbench.losses import visual_mask
from vpworkbench.model.budget import budget
from vpworkbench.model.fusion import Fusion, box_vector
from vpworkbench.model.visual import VisualTokens, build_visual
from vpworkbench.probes.layouts import modality_masks
from vpworkbench.probing import probe
from vpworkbench.runs import open_run
from vpworkbench.settings import (
    PRESETS,
    FusionSettings,
    VisualSettings,
    checked,
    pretrain_settings,
    visual_init_settings,
)
from vpworkbench.settings.families import FAMILIES, Family
from vpworkbench.studies import examples
from vpworkbench.studies.baselines import baselines
from vpworkbench.studies.review import review
from vpworkbench.subjects import load_run, load_task
from vpworkbench.tasks.settings import finetune_settings
from vpworkbench.train.finetune import evaluate_split, finetune, prepare_task
from vpworkbench.train.objective import Pretraining, group_batches
from vpworkbench.train.pretrain import prepare, pretrain

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
    regions = {"visual.regions": 8, "visual.region_width": WIDTH}
    if not FAMILIES[family].pixels:
        regions["visual.region_files"] = str(folder)
    small = {"train.log_every": 2, "fusion.width": 32, "fusion.heads": 2, "fusion.layers": 2, "fusion.feed_forward": 64,
             "visual.width": 12, "visual.heads": (1, 2)}  # fmt: skip
    few = FEW | small | regions | overrides
    return pretrain_settings(visual=family, masking=masking, init_visual="", steps=2, overrides=few)


ARMS = {
    "Swin": ("swin", {}),
    "Pixel-BERT": ("grid", {"visual.sampled": 20}),
    "SOHO": ("grid", {"visual.dictionary": 16}),
    "ViLT": ("patch", {"visual.position": "learned"}),
    "UNITER": ("regions", {}),
}
# MFR or MVM; the weight of VLA; whether an image's texts form a group.
OBJECTIVES = list(product(("none", "random", "attention", "code"), ((0.0, True), (0.1, False), (0.1, True))))
REFUSALS = {"attention": "needs a parsing attention", "code": "set visual.dictionary"}


def test_every_family_trains_with_every_objective_or_says_why_not(region_folder, scenes):
    trained, refused = 0, 0
    for (family, arm), (masking, (vla, grouped)) in product(ARMS.values(), OBJECTIVES):
        extra = arm | {"loss.vla": vla, "data.grouped": grouped}
        able = {"attention": FAMILIES[family].parsing, "code": "visual.dictionary" in arm}
        if not able.get(masking, True):
            with pytest.raises(SettingsError, match=REFUSALS[masking]):
                settings_of(family, masking, region_folder, **extra)
            refused += 1
            continue
        settings = settings_of(family, masking, region_folder, **extra)
        run, prepared = open_run("01_pretrain", settings), prepare(settings)
        assert pretrain(run, prepared, settings) == 2
        metrics = run.metrics()
        assert np.isfinite(metrics.to_numpy(dtype=float)).all()
        assert ("mfr" in metrics) == (masking in ("random", "attention")) and ("vla" in metrics) == (vla > 0)
        assert ("mvm" in metrics) == (masking == "code") and ("dead_codes" in metrics) == ("visual.dictionary" in arm)
        trained += 1
    assert (trained, refused) == (5 * 12 - 8 * 3, 4 * 3 + 4 * 3)


def test_regions_refuse_what_needs_pixels(region_folder):
    for setting in ({"data.flip": True}, {"mask.where": "pixels"}, {"data.cache": True}):
        with pytest.raises(SettingsError, match="not pixels|no grid of squares"):
            settings_of("regions", "random", region_folder, **setting)


def test_nothing_else_branches_on_the_name_of_a_family():
    package = Path(__file__).parents[1] / "vpworkbench"
    name = """["'](?:swin|grid|patch|regions)["']"""  # (a sweep has a place of the name `grid`)
    named = re.compile(rf"""(?<!for )family\s*(?:[!=]=|in\b)\s*[("'\[{{]|{name}\s*[!=]=|(?<!place )[!=]=\s*{name}""")
    files = [*package.rglob("*.py"), *(package.parent / "notebooks").glob("*.ipynb")]
    texts = {file.name: file.read_text(encoding="utf-8").replace('\\"', '"') for file in files}
    assert [name for name, text in texts.items() if named.search(text)] == []


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
    short, long = prepare_inputs(few, pictures, texts), prepare_inputs(many, pictures, texts)
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
    one, other = (Pretraining(settings).losses(model, part) for part in (batch, batch.of_images(0, 4)))
    changed = Pretraining(settings).losses(model, replace(batch, images=noisy))
    for name in one:
        torch.testing.assert_close(one[name], other[name])
        torch.testing.assert_close(one[name], changed[name], rtol=1e-5, atol=1e-5)


def test_masks_hide_a_share_of_the_real_regions():
    noise = torch.rand(4, 20, generator=torch.Generator().manual_seed(0))
    seen = torch.arange(20) < torch.tensor([[20], [10], [4], [1]])
    masked = visual_mask(noise, 5, vision_tokens=seen)
    assert masked.sum(1).tolist() == [5, 2, 1, 1] and not (masked & ~seen).any()


@torch.no_grad()
def test_the_geometry_of_regions_is_their_boxes(scenes, region_folder):
    model = region_model(scenes, region_folder)
    inputs = prepare_inputs(model, scenes[:2], [picture.captions[0] for picture in scenes[:2]])
    found = modality_masks(model, inputs.forward)
    assert torch.equal(found.vision & found.tokens, inputs.vision & inputs.tokens)
    boxes = found.boxes[0][found.vision[0] & found.tokens[0]]
    true = torch.tensor([thing.box for thing in scenes[0].scene.things]) / scenes[0].scene.image_px
    torch.testing.assert_close(boxes.float(), true.float())


# ------------------------------------------------------------------------------------------------------- tokens alike


@pytest.mark.parametrize("preset", PRESETS)
def test_so_many_visual_tokens_in_every_family(preset):
    for family, side in product(("swin", "grid", "patch"), (5, 7, 12)):
        visual = pretrain_settings(preset=preset, visual=family, visual_tokens=side**2).visual
        assert (visual.tokens, visual.grid) == (side**2, side)
    assert pretrain_settings(preset=preset, visual="regions", visual_tokens=50).visual.tokens == 50
    native = pretrain_settings(preset=preset)
    assert pretrain_settings(preset=preset, visual_tokens=native.visual.tokens) == native


@torch.no_grad()
def test_forty_nine_tokens_are_seven_by_seven(scenes, region_folder):
    for family in ("swin", "grid", "patch"):
        visual = pretrain_settings(visual=family, visual_tokens=49, init_visual="").visual
        pixels = torch.zeros(1, 3, visual.image_px, visual.image_px, dtype=torch.uint8)
        network = build_visual(visual).eval()
        assert network(pixels).features.shape == (1, 49, network.width)
    many = prepare_inputs(region_model(scenes, region_folder, 49), scenes[:1], ["a ball"])
    assert many.vision.sum() <= 49 == many.forward["images"].shape[1]


def test_a_visual_start_may_have_another_grid():
    assert visual_init_settings(visual="grid", visual_tokens=49).visual.grid == 7


@pytest.mark.parametrize("family, tokens", [("swin", 50), ("grid", 1), ("patch", 70_000), ("swin", -4)])
def test_an_impossible_number_names_the_possible_ones(family, tokens):
    with pytest.raises(
        SettingsError, match=rf"visual_tokens: {tokens} is not possible.*possible are 4, 9, 16, .*up to 65536"
    ):
        pretrain_settings(visual=family, visual_tokens=tokens)


def test_limits_by_the_number_of_tokens_wait_for_it():
    with pytest.raises(SettingsError, match="sampled 40 is larger than the 36"):
        pretrain_settings(visual="grid", overrides={"visual.sampled": 40})
    chosen = pretrain_settings(visual="grid", visual_tokens=49, overrides={"visual.sampled": 40})
    assert (chosen.visual.sampled, chosen.mask.tokens_of(chosen.visual)) == (40, 6)


# ---------------------------------------------------------------------------------- sampled tokens, learned positions


def test_sampled_tokens_keep_their_features_and_places(model, scenes):
    pixels = prepare_inputs(model, scenes[:2], ["a ball"] * 2).forward["images"]
    whole = model.visual(pixels)
    places = torch.tensor([[0, 7, 35], [3, 4, 11]])
    some = whole.subset(places)
    for image, row in enumerate(places):
        assert torch.equal(some.features[image], whole.features[image, row])
        part = whole.parsing[image][:, row][:, :, row]
        torch.testing.assert_close(some.parsing[image], part / part.sum(-1, keepdim=True))
        torch.testing.assert_close(model.fusion.embed_vision(some)[image], model.fusion.embed_vision(whole)[image, row])
    twice = some.for_texts(torch.tensor([1, 1, 0]))
    assert torch.equal(twice.positions, places[[1, 1, 0]]) and twice.parsing is None


@pytest.mark.parametrize("masking", ["random", "attention"])
def test_pre_training_sees_the_sample_and_evaluation_everything(scenes, masking):
    settings = settings_of("swin", masking, Path(), **{"visual.sampled": 20, "mask.budget": 4})
    model = narrow_model(scenes, sampled=20)
    objective, batch = Pretraining(settings), group_batches(scenes, model, settings.data, images=4, seed=0)[0]
    places = objective.sampled(batch)
    assert places.shape == (4, 20) and (places.diff(dim=1) > 0).all()
    seen: list[int] = []
    fuse = model.fuse
    model.fuse = lambda visual, *args, **kwargs: (seen.append(visual.features.shape[1]), fuse(visual, *args, **kwargs))[
        1
    ]
    for mode in (True, False):
        objective.losses(model.train(mode), batch)
    assert seen == [20, 36]
    masked = objective.masked(model.visual(batch.images).subset(places), batch)
    assert masked.shape == (len(batch.words), 20) and (masked.sum(1) == 4).all()


def test_samples_and_masks_inside_them_are_even():
    settings = settings_of("patch", "random", Path(), **{"visual.sampled": 9, "mask.budget": 1})
    objective, generator = Pretraining(settings), torch.Generator().manual_seed(0)

    class Groups:
        noise, scores = torch.rand(8_000, 36, generator=generator), torch.zeros(8_000, 0)
        image_index, images, words = torch.arange(8_000), torch.zeros(8_000), torch.zeros(8_000)

    places = objective.sampled(Groups)
    shares = torch.bincount(places.flatten(), minlength=36) / 8_000
    assert (shares - 9 / 36).abs().max() < 0.03
    masked = objective.masked(VisualTokens(torch.zeros(8_000, 9, 1), None, positions=places), Groups)
    assert (masked.float().mean(dim=0) - 1 / 9).abs().max() < 0.02


@torch.no_grad()
def test_patch_embeddings_are_vilts():
    """Patch projection, position and type, on shared random weights; ViLT shuffles its patches and tells how."""
    torch.manual_seed(0)
    config = ViltConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=96,
                        patch_size=16, vocab_size=40, hidden_dropout_prob=0.0)  # fmt: skip
    theirs = ViltModel(config).eval()
    embeddings = theirs.embeddings
    nn.init.normal_(embeddings.position_embeddings), nn.init.normal_(embeddings.patch_embeddings.projection.bias)
    visual = VisualSettings(family="patch", stride=16, patch_width=32, position="learned")
    patches = build_visual(visual)
    patches.projection.load_state_dict(embeddings.patch_embeddings.projection.state_dict())
    ours = Fusion(FusionSettings(layers=1, width=32, heads=2, feed_forward=32, visual_type=True), vocabulary=40,
                  vision_width=32, grid=visual.grid, learned_position=True).eval()  # fmt: skip
    ours.position.copy_(embeddings.position_embeddings[0, 1:])
    ours.vision_type.copy_(embeddings.token_type_embeddings.weight[1])
    ours.vision_in.weight.copy_(torch.eye(32)), ours.vision_in.bias.zero_()
    ours.vision_norm = nn.Identity()  # the paper's Linear and LayerNorm come on top of ViLT's
    pixels = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8)
    words = torch.zeros(3, 4, dtype=torch.int64)
    found, _ = embeddings(words, torch.ones_like(words), torch.zeros_like(words), patches.normalise(pixels),
                          torch.ones(3, 96, 96, dtype=torch.int64), None, None)  # fmt: skip
    torch.manual_seed(1)
    shuffled, _, (index, _) = embeddings.visual_embed(patches.normalise(pixels), torch.ones(3, 96, 96), -1)
    places = index[..., 0] * visual.grid + index[..., 1]
    assert not torch.equal(places[0], torch.arange(36))
    theirs_in_order = torch.empty(3, 36, 32)
    rows = torch.arange(3)[:, None]
    theirs_in_order[rows, places] = shuffled[:, 1:] + embeddings.token_type_embeddings.weight[1]
    mine = ours.embed_vision(patches(pixels))
    assert (mine - theirs_in_order).abs().max() < 1e-5
    as_a_set = [sorted(tokens.sum(1).tolist()) for tokens in (mine[0], found[0, 5:])]
    assert as_a_set[0] == pytest.approx(as_a_set[1], abs=1e-4)


def test_a_learned_position_is_trained_and_saved(scenes, tmp_path):
    model = narrow_model(scenes, family="patch", position="learned").train()
    settings = settings_of("patch", "random", Path(), **{"visual.position": "learned"})
    batch = group_batches(scenes, model, settings.data, images=4, seed=0)[0]
    sum(Pretraining(settings).losses(model, batch).values()).backward()
    assert model.fusion.position.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.fusion.position, model.fusion.position)


def test_regions_have_boxes_in_the_place_of_positions():
    for setting in ({"sampled": 4}, {"position": "learned"}):
        with pytest.raises(SettingsError, match="embeds boxes: sampled must be 0"):
            checked(VisualSettings, {"family": "regions"} | setting)


# -------------------------------------------------------------------------------------------------- the same commands


@pytest.mark.parametrize("arm", ARMS)
def test_every_family_is_saved_probed_explored_fine_tuned_and_reviewed(arm, region_folder, scenes, tmp_path):
    """By what the notebooks call: 01, 02, 03, 05, 00_tour, and 04 with questions and with retrieval."""
    family, extra = ARMS[arm]
    settings = settings_of(family, "random", region_folder, **extra)
    run, prepared = open_run("01_pretrain", settings, name=f"same-{arm}"), prepare(settings)
    pretrain(run, prepared, settings)
    model, trained = load_run(f"same-{arm}")
    for name, value in prepared.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    pictures = [picture for picture in scenes if picture.split == "val"][:6]
    assert np.isfinite(probe(model, pictures, images=6).from_input).all()
    assert subjects.load(f"same-{arm}").prepare(pictures, ["a ball"] * 6).vision.any()

    view = explore(f"same-{arm}", pictures)
    reading = view.readings[0]
    assert reading.on_grid == FAMILIES[family].on_grid and len(reading.boxes) == len(reading.vision)
    np.testing.assert_allclose(reading.attention.sum(dim=-1), 1, atol=1e-5)
    view.pick(1, k=2)
    assert view.masks.values
    view.close()

    example = examples.take_apart(model, pictures[0], trained)
    assert (
        ("attention" in example.masks)
        == FAMILIES[family].parsing
        == bool(examples.mask_errors(model, pictures, trained))
    )
    if FAMILIES[family].on_grid:
        assert ("rows" in examples.mask_shares(model.visual, pictures).shares) == FAMILIES[family].parsing
    else:
        with pytest.raises(ValueError, match="has no grid"):
            examples.mask_shares(model.visual, pictures)
    for drawn in (*example.masks.values(), *example.word_attention):
        assert drawn.shape == (example.grid**2,) and drawn.any()
    assert all(mask[example.pick] for mask in example.masks.values())
    assert len(example.boxes) == (36 if FAMILIES[family].on_grid else len(pictures[0].scene.things))
    figures.regions(example.image, example.boxes)

    few = {"scenes.images": 60, "scenes.val": 20, "scenes.test": 10, "workers": 0, "answer_count": 2,
           "train.images": 4, "train.log_every": 2, "retrieval.search_images": 4}  # fmt: skip
    for task in ("vqa", "retrieval"):
        chosen = finetune_settings(task=task, checkpoint=f"same-{arm}", steps=2, overrides=few)
        ready = prepare_task(chosen)
        task_run = open_run("04_finetune", chosen, name=f"same-{arm}-{task}")
        finetune(task_run, ready, chosen)
        held_out = ready.splits["val"]
        result = evaluate_split(task_run, ready, chosen, "val")
        assert set(baselines(ready, chosen, folder=task_run.folder)["val"])
        reviewed = review(ready.model, held_out, result, count=4)
        assert all(one.attention[0].sum() > 0 for one in reviewed) and len(reviewed) > 1
    again = load_task(f"same-{arm}-vqa")
    assert sum(again.predict(pictures[0].image, "what colour is the ball?").values()) > 0


def test_a_task_can_bring_its_own_regions(region_folder, scenes, tmp_path):
    shutil.copytree(region_folder, tmp_path / "moved")
    model = region_model(scenes, region_folder)
    use_regions(model, str(tmp_path / "moved"))
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert again.settings.visual.region_files == again.visual.settings.region_files == str(tmp_path / "moved")
    with pytest.raises(SettingsError, match="'grid' reads pixels"):
        use_regions(narrow_model(scenes, family="grid"), str(tmp_path))


# ------------------------------------------------------------------------------------------------------------- readers


def coded(values: object) -> str:
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def tsv(file: Path, **changes: str) -> Path:
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
    [({"features": "AAA*"}, "391895: .*float32 .*base64"), ({"boxes": "AAAA"}, "391895: .*float32 .*buffer size"),
     ({"num_boxes": "3"}, "391895: num_boxes is 3, but there are 2"), ({"num_boxes": "two"}, "391895: no numbers"),
     ({"image_w": "60"}, r"391895: box 1 .* is outside the image of 60 x 50 px"),
     ({"image_h": "nan"}, r"391895: an image of size \[100.0, nan\]"), ({"image_h": "inf"}, "391895: an image of size"),
     ({"image_id": "7"}, "391895.jpg: no features of this image"),
     ({"num_boxes": "0", "boxes": "", "features": ""}, "391895: num_boxes is 0, but there are 0 boxes"),
     ({"boxes": coded([[50, 0, 10, 25], [10, 10, 100, 50]])}, r"391895: box 0 \[50.0, .* ends before it begins"),
     ({"boxes": coded([[0, 0, 0.5, 0.5], [0.1, 0.2, 1, 1]])}, "391895: box 0 .* is in shares of the image")],
)  # fmt: skip
def test_a_broken_tsv_names_the_image(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        RegionFiles(tsv(tmp_path / "a.tsv", **change), most=3, width=WIDTH).regions(PHOTO)


def test_float32_of_half_the_width_is_not_taken_for_float16(tmp_path):
    """1,024 numbers of float32 have as many bytes as the usual 2,048 of float16."""
    features = np.random.default_rng(0).random((2, 1024))
    file = tsv(tmp_path / "a.tsv", features=coded(features))
    for width in (0, 1024):
        np.testing.assert_array_equal(
            RegionFiles(file, most=3, width=width).read(PHOTO).features, features.astype("f4")
        )
    with pytest.raises(DataError, match="1,?024"):
        RegionFiles(file, most=3, width=2048).regions(PHOTO)


def test_a_number_is_an_image_of_coco_alone(tmp_path):
    """`dog-7.png` is not COCO's 7."""
    files = RegionFiles(tsv(tmp_path / "a.tsv", image_id="7"), most=3, width=WIDTH)
    for name in ("7.jpg", "000000000007.jpg", "train2014/COCO_train2014_000000000007.jpg"):
        assert len(files.regions(ImageFile(Path("images"), name)).boxes) == 2
    others = [ImageFile(Path("images"), name) for name in ("dog-7.png", "COCO_7.jpg", "0007.jpg", "b/17.jpg")]
    for image in others:
        with pytest.raises(DataError, match=f"{image.name}: no features of this image"):
            files.regions(image)
    with pytest.raises(DataError, match=r"a.tsv: no features of 4 of 5 images \(dog-7.png, .*0007.jpg, \.\.\.\)"):
        files.check([ImageFile(Path("images"), "7.jpg"), *others])


@pytest.mark.parametrize("written", ["391895", "000000391895", "COCO_val2014_000000391895.jpg", "\ufeff391895"])
def test_a_name_is_found_however_it_is_written(tmp_path, written):
    file = tsv(tmp_path / "a.tsv", image_id=written)
    assert len(RegionFiles(file, most=3, width=WIDTH).regions(PHOTO).boxes) == 2
    dog = tsv(tmp_path / "dog.tsv", image_id="dog.v2.jpg")
    assert len(RegionFiles(dog, most=3, width=WIDTH).regions(ImageFile(Path("images"), "a/dog.v2.jpg")).boxes) == 2


def test_field_names_and_blank_lines_are_no_images(tmp_path):
    file = tsv(tmp_path / "a.tsv")
    file.write_text("\t".join(TSV_FIELDS) + "\n" + file.read_text() + "\n")
    files = RegionFiles(file, most=3, width=WIDTH)
    files.check_width()
    assert len(files.regions(PHOTO).boxes) == 2
    with pytest.raises(DataError, match=r"no features of 1 of 1 images \(b.jpg\); .*; it has '391895' and so on"):
        files.check([ImageFile(Path("images"), "b.jpg")])
    (tmp_path / "none.tsv").write_text("\n")
    with pytest.raises(DataError, match="none.tsv: holds no regions; a tsv has a line"):
        RegionFiles(tmp_path / "none.tsv", most=3, width=WIDTH)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: holds no regions"):
        RegionFiles(tmp_path / "empty", most=3, width=WIDTH).check_width()


def halves(values: object) -> str:
    return base64.b64encode(np.asarray(values, "<f2").tobytes()).decode()


def test_a_tsv_of_lxmert_has_ten_columns(tmp_path):
    """Its height comes before its width; names of COCO and of NLVR2 identify images."""
    boxes, features = [[0, 0, 50, 25], [10, 10, 100, 50]], np.arange(2 * WIDTH)
    cells = ["train-1-0-img0", "50", "100", "QUFB", "QUFB", "QUFB", "QUFB", "2", coded(boxes), coded(features)]
    (tmp_path / "obj36.tsv").write_text("\t".join(cells) + "\n")
    found = RegionFiles(tmp_path / "obj36.tsv", most=3, width=WIDTH).regions(ImageFile(Path("x"), "train-1-0-img0.png"))
    np.testing.assert_allclose(found.boxes, [[0, 0, 0.5, 0.5], [0.1, 0.2, 1, 1]])
    (tmp_path / "nine.tsv").write_text("\t".join(cells[:9]) + "\n")
    with pytest.raises(DataError, match="nine.tsv: image train-1-0-img0: 9 cells in its line, not 6 or 10"):
        RegionFiles(tmp_path / "nine.tsv", most=3, width=WIDTH).regions(ImageFile(Path("x"), "train-1-0-img0.png"))


def test_a_tsv_in_parts_is_one(tmp_path):
    for number in (0, 1):
        tsv(tmp_path / f"trainval.tsv.{number}", image_id=str(number + 1), features=coded(np.full(2 * WIDTH, number)))
    files = RegionFiles(tmp_path, most=3, width=WIDTH)
    files.check_width()
    assert [files.regions(ImageFile(Path("images"), f"{k}.jpg")).features[0, 0] for k in (1, 2)] == [0, 1]
    tsv(tmp_path / "more.tsv", image_id="1")
    with pytest.raises(DataError, match="trainval.tsv.0: line 1: image 1 for the second time"):
        RegionFiles(tmp_path, most=3, width=WIDTH)


def test_float16_and_the_text_of_python_bytes_are_read(tmp_path):
    boxes = [[0, 0, 50, 25], [10, 10, 100, 50]]
    expected = RegionFiles(tsv(tmp_path / "a.tsv"), most=3, width=WIDTH).regions(PHOTO)
    for change in (
        {"features": halves(np.arange(2 * WIDTH))},
        {"features": halves(np.arange(2 * WIDTH)), "boxes": halves(boxes)},
        {"features": f"b'{coded(np.arange(2 * WIDTH))}'", "boxes": f"b'{coded(boxes)}'"},
    ):
        found = RegionFiles(tsv(tmp_path / "b.tsv", **change), most=3, width=WIDTH).regions(PHOTO)
        np.testing.assert_array_equal(found.features, expected.features)
        np.testing.assert_array_equal(found.boxes, expected.boxes)
    wide = {"features": halves(np.ones(2 * 2048))}  # as published; nothing says the width
    assert RegionFiles(tsv(tmp_path / "c.tsv", **wide)).read(PHOTO).features.shape == (2, 2048)


def test_an_image_twice_in_a_tsv_is_refused(tmp_path):
    file = tsv(tmp_path / "a.tsv")
    file.write_text(2 * file.read_text())
    with pytest.raises(DataError, match="a.tsv: line 2: image 391895 for the second time"):
        RegionFiles(file, most=3, width=WIDTH)


def test_a_tsv_that_is_written_again_gives_no_other_images_features(tmp_path):
    """Where lines begin is kept while a file is open."""
    one = tsv(tmp_path / "a.tsv", image_id="1", features=coded(np.full(2 * WIDTH, 1))).read_text()
    two = tsv(tmp_path / "a.tsv", image_id="2", features=coded(np.full(2 * WIDTH, 2))).read_text()
    file, images = tmp_path / "a.tsv", [ImageFile(Path("images"), f"{number}.jpg") for number in (1, 2)]
    visual = VisualSettings(family="regions", region_files=str(file), region_width=WIDTH)
    file.write_text(one + two)
    opened = input_of(visual)
    assert [opened.regions(image).features[0, 0] for image in images] == [1, 2]
    file.write_text(two + one + "\n")
    with pytest.raises(DataError, match="a.tsv: image 1: its line is broken, or the file was changed; start again"):
        opened.regions(images[0])
    assert [input_of(visual).regions(image).features[0, 0] for image in images] == [1, 2]


def test_two_images_that_would_share_a_file_are_refused(tmp_path):
    write_regions(tmp_path / "1.npz", np.zeros((1, WIDTH)), np.array([[0, 0, 5, 5]]), (9, 9))
    files = RegionFiles(tmp_path, most=3, width=WIDTH)
    images = [ImageFile(tmp_path / "images", name) for name in ("train/1.jpg", "val/1.jpg")]
    for image in images:
        (image.folder / image.name).parent.mkdir(parents=True)
        (image.folder / image.name).write_bytes(b"one")
    files.check(images)  # two sets that have the same image
    (image.folder / image.name).write_bytes(b"another")
    with pytest.raises(DataError, match="train/1.jpg and .*val/1.jpg would share one image's regions"):
        files.check(images)
    coco = RegionFiles(tsv(tmp_path / "a.tsv"), most=3, width=WIDTH)
    coco.check([PHOTO, ImageFile(Path("images"), f"val2014/{PHOTO.name}")])


@pytest.mark.parametrize("change, message",
    [({"size": 10}, "an image of size 10"), ({"size": [10, np.nan]}, "an image of size"),
     ({"features": np.full((2, WIDTH), 1e300)}, "not finite"),
     ({"features": [["a"] * WIDTH] * 2}, "not a complete npz of numbers"),
     ({"boxes": [["a"] * 4] * 2}, "not a complete npz of numbers")],
)  # fmt: skip
def test_npz_of_something_else_name_the_file(tmp_path, change, message):
    good = {"features": np.zeros((2, WIDTH)), "boxes": [[0, 0, 5, 5], [1, 1, 9, 9]], "size": [10, 10]}
    np.savez(tmp_path / "7.npz", **(good | change))
    with pytest.raises(DataError, match=f"7.npz: .*{message}"):
        read_npz(tmp_path / "7.npz")


def test_no_flipped_byte_ends_in_another_error(tmp_path):
    good = {"features": np.arange(2.0 * WIDTH).reshape(2, -1), "boxes": [[0, 0, 5, 5], [1, 1, 9, 9]], "size": [9, 9]}
    np.savez_compressed(tmp_path / "7.npz", **good)
    content, refused = (tmp_path / "7.npz").read_bytes(), 0
    for place in range(len(content)):
        (tmp_path / "7.npz").write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            read_npz(tmp_path / "7.npz")
        except DataError as error:
            assert "7.npz" in str(error)
            refused += 1
    assert refused > len(content) / 2
    with (tmp_path / "7.npz").open("wb") as file:
        np.save(file, good["features"])  # an array under the name of an archive
    with pytest.raises(DataError, match="7.npz: not a complete npz"):
        read_npz(tmp_path / "7.npz")


def test_broken_npz_name_the_image(tmp_path):
    image = ImageFile(Path("images"), "b/7.png")
    files = RegionFiles(tmp_path, most=3, width=WIDTH)
    with pytest.raises(DataError, match="7.png: no features of this image"):
        files.regions(image)
    good = np.zeros((2, WIDTH)), np.array([[0, 0, 5, 5], [1, 1, 9, 9]])
    write_regions(tmp_path / "b" / "7.npz", *good, (10, 10))
    assert files.regions(image).boxes.max() == np.float32(0.9)
    for features, boxes, size, message in (
        (good[0], good[1][:1], (10, 10), "not one box x0"),
        (*good, (7, 7), "box 1 .* outside the image"),
        (good[0] + np.nan, good[1], (10, 10), "not finite"),
        (good[0][:, 1:], good[1], (10, 10), "set visual.region_width"),
    ):
        write_regions(tmp_path / "b" / "7.npz", features, boxes, size)
        with pytest.raises(DataError, match=f"7.*{message}"):
            files.regions(image)
    (tmp_path / "b" / "7.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match="7.npz: not a complete npz"):
        read_npz(tmp_path / "b" / "7.npz")


def test_what_regions_need_is_asked_before_any_work(tmp_path):
    for regions in ("", str(tmp_path / "nowhere")):
        settings = pretrain_settings(visual="regions", regions=regions, overrides={"data.scenes.seed": 77})
        with pytest.raises(DataError, match=r"^visual.region_files '.*': no such folder or tsv; give"):
            prepare(settings)
        assert not scenes_folder(settings.data.scenes).exists()
    with pytest.raises(SettingsError, match="^init_visual: visual 'regions' reads given features"):
        pretrain_settings(visual="regions", regions=str(tmp_path), init_visual="scenes")
    for given in ({"regions": str(tmp_path)}, {"overrides": {"visual.region_files": str(tmp_path)}}):
        with pytest.raises(SettingsError, match="^regions: visual 'swin' reads pixels"):
            pretrain_settings(**given)
    with pytest.raises(SettingsError, match="^visual_tokens 49 also decides visual.image_px"):
        pretrain_settings(visual_tokens=49, overrides={"visual.image_px": 224})
    (tmp_path / "config.json").write_text("[1]")  # of something else
    assert pretrain_settings(visual="regions", regions=str(tmp_path)).visual.region_width == 2048
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SettingsError, match=r"^regions: .*config.json cannot be read"):
        pretrain_settings(visual="regions", regions=str(tmp_path))


def test_regions_without_files_say_how_to_make_them():
    with pytest.raises(DataError, match="one npz for each image"):
        RegionFiles("", most=3, width=WIDTH)


# ------------------------------------------------------------------------------------------------------------- a fifth


def test_the_fifth_family_of_the_docs(scenes):
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert len(example.strip().splitlines()) <= 15
    before = set(FAMILIES)
    exec(example, {})
    (name,) = set(FAMILIES) - before
    try:
        settings = settings_of(name, "random", Path())
        assert isinstance(build_visual(VisualSettings(family=name)), nn.Module)
        run, prepared = open_run("01_pretrain", settings, name="fifth"), prepare(settings)
        assert pretrain(run, prepared, settings) == 2 and budget(prepared.model).visual_tokens == 36
        assert np.isfinite(probe(load_run("fifth")[0], scenes[-4:], images=4).from_input).all()
    finally:
        del FAMILIES[name]


class Slots(nn.Module):
    """A few tokens of the whole image, which lie nowhere."""

    def __init__(self, settings: VisualSettings) -> None:
        super().__init__()
        self.settings, self.width = settings, 16
        self.read = nn.Linear(3 * 12 * 12, settings.regions * self.width)

    def forward(self, images: torch.Tensor) -> VisualTokens:
        small = nn.functional.adaptive_avg_pool2d(images / 255.0, 12).flatten(1)
        features = self.read(small).unflatten(1, (self.settings.regions, self.width))
        everywhere = torch.tensor([0.0, 0, 1, 1]).expand(*features.shape[:2], 4)
        return VisualTokens(features, None, boxes=everywhere)


def test_a_family_without_a_grid_may_read_pixels(scenes, monkeypatch):
    monkeypatch.setitem(FAMILIES, "slots", Family(Slots, step=None))
    settings = settings_of("slots", "random", Path(), **{"visual.regions": 5, "data.flip": True})
    assert settings.visual.tokens == 5
    run, prepared = open_run("01_pretrain", settings, name="slots"), prepare(settings)
    assert pretrain(run, prepared, settings) == 2 and np.isfinite(run.metrics().to_numpy(dtype=float)).all()
    assert budget(prepared.model).visual_tokens == 5
    assert np.isfinite(probe(load_run("slots")[0], scenes[-4:], images=4).from_input).all()
    example = examples.take_apart(prepared.model, scenes[0], settings)
    assert example.boxes.tolist() == [[0, 0, 1, 1]] * 5 and example.image.shape == (96, 96, 3)
    for setting in ({"mask.where": "pixels"}, {"visual.sampled": 2}):
        with pytest.raises(SettingsError, match="no grid of squares|embeds boxes"):
            settings_of("slots", "random", Path(), **setting)
