"""Pre-training end to end on a few scenes, and what the shipped model has learnt."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import FEW, narrow_model
from safetensors.torch import save_file

from vpworkbench.data.captioned import read_pictures
from vpworkbench.data.scene_cache import scenes_folder
from vpworkbench.errors import CheckpointError, RunError, SettingsError
from vpworkbench.model.model import VisualParsingModel
from vpworkbench.model.visual import VisualTokens
from vpworkbench.model.words import build_tokenizer
from vpworkbench.probing import probe
from vpworkbench.runs import open_run
from vpworkbench.scenes.language import ATTRIBUTE_WORDS
from vpworkbench.scenes.write import write_scenes
from vpworkbench.settings import DataSettings, pretrain_settings, visual_init_settings
from vpworkbench.settings.scenes import SceneSettings
from vpworkbench.subjects import load_run
from vpworkbench.train.evaluate import _hide_one_word, evaluate
from vpworkbench.train.objective import Pretraining, effective_rank, group_batches
from vpworkbench.train.pretrain import build_model, prepare, pretrain, with_words_of
from vpworkbench.train.scene_labels import train_visual


def few(**parameters):
    overrides = FEW | {"train.log_every": 2} | parameters.pop("overrides", {})
    return pretrain_settings(steps=4, overrides=overrides, **parameters)


@pytest.mark.parametrize(
    "parameters",
    [
        {"masking": "none"},
        {"masking": "random"},
        {"masking": "attention"},
        {"visual": "grid", "init_visual": ""},
        {"visual": "patch", "init_visual": ""},
        {"overrides": {"mask.where": "pixels"}},
        {"overrides": {"data.grouped": False}},
        {"overrides": {"loss.vla": 0.0, "mask.select": "symmetric", "fusion.visual_type": True}},
    ],
)
def test_trains_and_is_probed(parameters):
    settings = few(**parameters)
    run, prepared = open_run("01_pretrain", settings), prepare(settings)
    assert pretrain(run, prepared, settings) == 4
    metrics = run.metrics()
    assert list(metrics["step"]) == [2, 4] and np.isfinite(metrics.to_numpy(dtype=float)).all()
    assert ("mfr" in metrics) == (settings.mask.mode != "none") and ("vla" in metrics) == (settings.loss.vla > 0)
    result = evaluate(prepared.model, prepared.splits["val"], settings.data, images=20)
    assert all(interval.low <= interval.mean <= interval.high for interval in result)
    probed = probe(prepared.model, prepared.splits["val"], images=20)
    assert probed.flow.shape == (20, 3, 3) and probed.nmi.shape == (20, 4)
    assert (probed.within_layer > 0).all() and (probed.within_layer < 1).all()


def test_effective_rank_counts_directions():
    """exp of the spectrum's entropy: n equal directions count n, whatever their length."""
    directions = torch.eye(6)[:4] * torch.tensor([1.0, 1.0, 1.0, 1.0])[:, None]
    assert effective_rank(torch.cat([directions, -directions]) * 3) == pytest.approx(4, rel=1e-6)
    assert effective_rank(torch.linspace(-1, 1, 9)[:, None] * torch.ones(6)) == pytest.approx(1, rel=1e-6)


def test_parsing_is_averaged_over_heads_before_it_ranks(scenes):
    settings = few()
    model = narrow_model(scenes)
    batch = group_batches(scenes, model, settings.data, images=4, seed=0)[0]
    parsing = model.visual(batch.images).parsing
    objective = Pretraining(settings)
    averaged = parsing.mean(dim=1, keepdim=True).expand_as(parsing)
    assert parsing.shape[1] > 1 and not torch.allclose(parsing, averaged)
    masks = [objective.masked(VisualTokens(torch.empty(0), one), batch) for one in (parsing, averaged)]
    assert torch.equal(*masks)


def test_mirrored_images_are_about_half(model, scenes):
    settings = few(overrides={"data.flip": True}).data
    plain, mirrored = (
        group_batches(scenes, model, settings.model_copy(update={"flip": flip}), images=20, seed=0)[0].images
        for flip in (False, True)
    )
    flipped = (mirrored == plain.flip(-1)).flatten(1).all(dim=1)
    assert ((mirrored == plain).flatten(1).all(dim=1) | flipped).all() and 3 < flipped.sum() < 17


def test_bfloat16_trains():
    settings = few(overrides={"train.bf16": True})
    run, prepared = open_run("01_pretrain", settings, name="bf16"), prepare(settings)
    assert pretrain(run, prepared, settings) == 4
    assert np.isfinite(run.metrics().to_numpy(dtype=float)).all()
    assert all(p.dtype == torch.float32 for p in prepared.model.parameters())


def test_run_is_found_by_name_and_by_folder():
    settings = few()
    run, prepared = open_run("01_pretrain", settings, name="found"), prepare(settings)
    pretrain(run, prepared, settings)
    for place in ("found", "01_pretrain/found", str(run.folder), str(run.folder / "checkpoint")):
        model, read = load_run(place)
        assert read == settings
        assert torch.equal(model.mlm_bias, prepared.model.mlm_bias)
    with pytest.raises(CheckpointError, match="no finished pre-training run.*nowhere"):
        load_run("nowhere")
    for content, fault in (("{", "cannot be read"), ("{}", "has no settings")):
        (run.folder / "config.json").write_text(content)
        with pytest.raises(RunError, match=f"config.json: {fault}"):
            load_run("found")


def test_vocabulary_is_the_same_in_another_process(scenes, scenes_folder):
    script = (
        "import sys; from vpworkbench.data.captioned import read_pictures;"
        "from vpworkbench.model.words import build_tokenizer;"
        "t = build_tokenizer([x for p in read_pictures(sys.argv[1]) for x in p.captions]);"
        "print(sorted(t.get_vocab().items()))"
    )
    other = subprocess.run(
        [sys.executable, "-c", script, str(scenes_folder)], capture_output=True, text=True, check=True
    ).stdout
    texts = [text for picture in reversed(scenes) for text in picture.captions]
    vocabulary = build_tokenizer(texts).get_vocab()
    assert other.strip() == str(sorted(vocabulary.items()))
    assert {"red", "square", "[MASK]", "[CLS]"} <= set(vocabulary) and len(vocabulary) < 400


def test_held_out_words_are_colours_and_shapes(model, scenes):
    """One word of each text is hidden, and it is asked for."""
    words, _ = model.words.tensors([picture.captions[0] for picture in scenes[:20]])
    scored = torch.tensor(model.tokenizer.convert_tokens_to_ids(sorted(ATTRIBUTE_WORDS)))
    hidden, labels = _hide_one_word(model, words, torch.rand(20), scored)
    assert ((labels >= 0).sum(dim=1) == 1).all() and ((hidden == model.tokenizer.mask_token_id).sum(dim=1) == 1).all()
    asked = model.tokenizer.convert_ids_to_tokens(labels[labels >= 0].tolist())
    assert set(asked) <= ATTRIBUTE_WORDS and len(set(asked)) > 5


def test_held_out_images_are_those_with_a_caption_as_they_are(model, scenes):
    """No picture counts twice, and none is mirrored."""
    data, foils = DataSettings(flip=True), [replace(scene, captions=()) for scene in scenes[4:60]]
    found = evaluate(model, [*scenes[:4], *foils], data)
    assert found.itm_accuracy.count == 4
    plain = evaluate(model, scenes[:4], data.with_overrides({"flip": False}))
    np.testing.assert_array_equal(np.array(found), np.array(plain))


def test_the_shipped_model_has_learnt_to_look():
    """Fresh held-out scenes: lower 95% bounds of ITM accuracy >= 0.90 and of the MLM ratio >= 4."""
    model, settings = load_run()
    scenes = SceneSettings(**settings.data.scenes.model_dump() | {"images": 2, "val": 192, "test": 2, "seed": 1_000})
    pictures = [p for p in read_pictures(write_scenes(scenes_folder(scenes), scenes)) if p.split == "val"]
    result = evaluate(model, pictures, settings.data)
    print(result)
    assert result.itm_accuracy.low >= 0.90 and result.mlm_ratio.low >= 4
    assert abs(result.itm_other_image.mean - 0.5) < 0.05, "the label can be read off the text"


def test_without_held_out_images_a_tenth_of_training_validates(tmp_path, scenes):
    import json

    source = scenes[0].image.folder.parent
    content = json.loads((source / "dataset_scenes.json").read_text())
    content["images"] = [image for image in content["images"] if image["split"] == "train"]
    (tmp_path / "dataset_mine.json").write_text(json.dumps(content))
    (tmp_path / "images.zip").symlink_to(source / "images.zip")
    splits = prepare(few(data=str(tmp_path))).splits
    assert splits["val"] and len(splits["train"]) + len(splits["val"]) == 60


def test_unknown_start_is_refused_before_training():
    with pytest.raises((SettingsError, CheckpointError), match="nowhere"):
        prepare(few(init_visual="/nowhere/swin.safetensors"))


def test_batch_norm_of_weights_that_were_taken_over_stays_frozen(tmp_path):
    """Also in what is saved, and with words that came later; from scratch it follows its batches."""
    settings = pretrain_settings(visual="grid", init_visual="")
    scratch, _ = build_model(settings, build_tokenizer(["a red ball"]))
    save_file(scratch.visual.state_dict(), tmp_path / "visual.safetensors")
    taken = settings.with_overrides({"init_visual": str(tmp_path / "visual.safetensors")})
    model, _ = build_model(taken, build_tokenizer(["a red ball"]))
    model.save_pretrained(tmp_path / "saved")
    saved = VisualParsingModel.from_pretrained(tmp_path / "saved")
    for one in (model, saved, with_words_of(saved, ["a blue ring"])):
        assert not one.train().visual.network.bn1.training
    assert scratch.train().visual.network.bn1.training and not scratch.visual.settings.frozen_norm


@pytest.mark.parametrize(
    "make",
    [
        lambda given: prepare(pretrain_settings(init_visual="", **given)),
        lambda given: train_visual(None, visual_init_settings(**given)),
    ],
)
def test_a_wrong_backbone_is_told_before_scenes_are_drawn(tmp_path, monkeypatch, make):
    monkeypatch.setenv("VPW_CACHE", str(tmp_path))
    with pytest.raises(SettingsError, match="visual.backbone 'resnet5000'.*did you mean"):
        make({"visual": "grid", "overrides": {"visual.backbone": "resnet5000"}})
    assert not list(tmp_path.iterdir())
