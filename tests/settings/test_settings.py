"""Settings are refused as a whole, before any work, with the nearest valid name."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from vpworkbench.errors import SettingsError
from vpworkbench.runs import shipped_run
from vpworkbench.settings import (
    PRESETS,
    CompareSettings,
    FamilyRunsSettings,
    FinetuneSettings,
    PretrainSettings,
    ProbeSettings,
    VisualInitSettings,
    checked,
    pretrain_settings,
    visual_init_settings,
)
from vpworkbench.tasks.settings import finetune_settings


def test_presets_state_the_paper():
    paper = PRESETS["paper-384"]
    assert paper.visual.image_px == 384 and paper.visual.tokens == 144 and paper.visual.window == 12
    assert paper.fusion.layers == 12 and paper.fusion.width == 768
    assert paper.optim.lr_visual == 5e-6 and paper.optim.lr_fusion == 5e-5 and paper.optim.warmup == 500
    assert paper.train.epochs == 40 and paper.optim.decay_at == (0.625, 0.875) and paper.optim.decay == 0.1
    assert paper.mask.budget == 7 and paper.loss.itm == 1 and paper.loss.mfr == 0.01 and paper.loss.vla == 0.1
    assert (paper.data.matched_per_image, paper.data.unmatched_per_image) == (2, 2)
    assert paper.train.images * 4 == 2048  # Sec. 4.1: batch size 2048, in pairs
    assert list(paper.step_size().values()) == [512, 2048, 2048 * (40 + 144)]  # images, pairs, tokens
    ablation = PRESETS["ablation-224"]
    assert ablation.visual.tokens == 49 and ablation.fusion.layers == 3
    assert ablation.mask.tokens_of(ablation.visual) == 7


def test_mask_budget_is_fifteen_percent():
    tiny = PRESETS["tiny"]
    assert tiny.visual.tokens == 36 and tiny.mask.tokens_of(tiny.visual) == 5
    assert PRESETS["small"].visual.tokens == 64


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"preset": "tinny"}, "no preset 'tinny'; did you mean 'tiny'"),
        ({"visual": "swim"}, "visual.family.*'swim'"),
        ({"visual": "grid", "masking": "attention"}, "needs a parsing attention.*masking='random'"),
        ({"overrides": {"mask.budgt": 3}}, "mask.budgt: no such setting; did you mean 'mask.budget'"),
        ({"overrides": {"mask.budget": 99}}, "mask.budget 99 is larger than the 36 visual tokens"),
        ({"overrides": {"fusion.width": 190}}, "width 190 must be a multiple of heads 6"),
        ({"overrides": {"visual.image_px": 100}}, "image_px 100 must be a multiple of 16"),
        ({"overrides": {"optim.lr_fusion": "fast"}}, "optim.lr_fusion.*'fast'"),
        ({"steps": -1}, "train.steps.*-1"),
        ({"overrides": {"train.images": 6, "train.accumulate": 4}}, "accumulate 4 must divide images 6"),
        ({"overrides": {"train.images": 8, "train.processes": 3}}, "processes 3 must divide images 8"),
        ({"overrides": {"train.epochs": 1}}, "steps or epochs"),
        ({"overrides": {"train.keep_best": True}}, "keep_best compares held-out losses"),
        ({"overrides": {"train.probe_every": 30}}, "probe_every 30 must be a multiple of log_every 20"),
    ],
)
def test_wrong_values_name_the_setting(parameters, message):
    with pytest.raises(SettingsError, match=message):
        pretrain_settings(**parameters)


def test_what_would_be_ignored_is_refused():
    probes = {"train.probe_every": 20, "train.keep_best": True}
    for make in (finetune_settings, visual_init_settings):
        with pytest.raises(SettingsError, match="only 01_pretrain probes a held-out batch"):
            make(overrides=probes)
    with pytest.raises(SettingsError, match="training on labels takes one process"):
        visual_init_settings(overrides={"train.processes": 2})
    with pytest.raises(SettingsError, match="visual_tokens 49 also decides visual.image_px"):
        visual_init_settings(visual_tokens=49, overrides={"visual.image_px": 128})


def test_lengths_small_by_default_and_the_presets_at_0():
    assert (pretrain_settings().train.steps, finetune_settings().train.steps) == (40, 20)
    assert visual_init_settings().scenes.images == 320
    assert pretrain_settings(steps=0, overrides={"train.bf16": False}) == PRESETS["tiny"]
    long = pretrain_settings(epochs=2).train
    assert (long.steps, long.epochs) == (0, 2)
    assert finetune_settings(steps=0).train.steps == 2_500
    assert visual_init_settings(images=0, epochs=0).scenes.images == 12_000


def test_tiny_freezes_a_visual_side_that_starts_trained():
    assert pretrain_settings().visual.frozen and pretrain_settings(visual="grid").visual.frozen
    assert not pretrain_settings(init_visual="").visual.frozen
    assert not pretrain_settings(visual="grid", overrides={"visual.dictionary": 64}).visual.frozen
    assert not pretrain_settings(overrides={"mask.where": "pixels"}).visual.frozen
    assert not pretrain_settings(overrides={"visual.frozen": False}).visual.frozen
    assert not visual_init_settings().visual.frozen


def test_a_short_run_generates_no_more_scenes_than_it_sees():
    assert pretrain_settings(steps=40).data.scenes.images == 1_000  # 640 are seen
    assert finetune_settings(steps=40).scenes.images == 2_000
    assert pretrain_settings(steps=40, overrides={"data.scenes.images": 7}).data.scenes.images == 7
    assert pretrain_settings(steps=40).data.scenes.val == finetune_settings(steps=40).scenes.test == 100
    assert pretrain_settings(steps=40, overrides={"data.scenes.val": 300}).data.scenes.val == 300
    assert pretrain_settings(steps=100).data.scenes.val == finetune_settings(epochs=1).scenes.val == 500
    assert pretrain_settings(steps=40, data="elsewhere").data == pretrain_settings(steps=0, data="elsewhere").data


def test_all_faults_at_once():
    with pytest.raises(SettingsError) as error:
        pretrain_settings(overrides={"optim.lr_fusion": -1, "train.images": 0, "seed": "x"})
    assert len(str(error.value).splitlines()) == 3


def test_settings_are_frozen_and_written_back():
    settings = pretrain_settings(data=["scenes", "elsewhere"], seed=4)
    with pytest.raises(ValidationError):
        settings.seed = 5
    assert PretrainSettings.model_validate(settings.model_dump(mode="json")) == settings


def test_only_paths_are_made_absolute(tmp_path, monkeypatch):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "sets" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    settings = pretrain_settings(data=["scenes", "sets/mine", "sets/other"], init_text="./sets", init_visual="scenes")
    assert settings.data.sets == ("scenes", str(tmp_path / "sets" / "mine"), "sets/other")
    assert settings.init_text == str(tmp_path / "sets") and settings.init_visual == "scenes"
    assert ProbeSettings(checkpoint="sets/mine").checkpoint == str(tmp_path / "sets" / "mine")


def test_settings_of_other_notebooks():
    small = visual_init_settings(preset="small")
    assert small.visual.image_px == small.scenes.image_px == 128
    assert ProbeSettings(data="").data == () and ProbeSettings(data=["a", "b"]).data == ("a", "b")
    assert CompareSettings(data="a").data.sets == CompareSettings(data=["a"]).data.sets == ("a",)
    with pytest.raises(ValidationError, match="images"):
        ProbeSettings(images=1)


KINDS = {
    "09_visual_init": VisualInitSettings,
    "01_pretrain": PretrainSettings,
    "04_finetune": FinetuneSettings,
    "08_families": FamilyRunsSettings,
}


def test_committed_runs_load():
    """Settings that came later take their defaults."""
    loaded = 0
    for config in shipped_run().parent.glob("*/config.json"):
        content = json.loads(config.read_text())
        assert checked(KINDS[content["notebook"]], content["settings"])
        loaded += 1
    assert loaded >= 10
