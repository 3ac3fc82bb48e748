"""A frozen visual side: no gradient, no optimiser state, tokens computed once for a set."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import FEW, narrow_model

from vpworkbench.data.inputs import Pixels
from vpworkbench.errors import SettingsError
from vpworkbench.model.visual import VisualTokens, pack, unpack
from vpworkbench.runs import open_run
from vpworkbench.settings import OptimSettings, pretrain_settings
from vpworkbench.tasks.settings import finetune_settings
from vpworkbench.train import pretrain as pretraining
from vpworkbench.train.engine import build_optimiser
from vpworkbench.train.finetune import finetune, prepare_task
from vpworkbench.train.pretrain import prepare, pretrain

FROZEN = FEW | {"visual.frozen": True, "train.log_every": 1, "train.bf16": False}


def lines_of(name: str, settings) -> list[dict[str, float]]:
    run = open_run("01_pretrain", settings, name=name)
    pretrain(run, prepare(settings), settings)
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_tokens_are_packed_and_unpacked():
    tokens = VisualTokens(torch.randn(2, 9, 5), torch.rand(2, 3, 9, 9).softmax(dim=-1))
    again = unpack(pack(tokens), 5)
    assert torch.equal(again.features, tokens.features.half().float())
    assert torch.equal(again.parsing[:, 0], tokens.parsing.mean(dim=1))  # to the last bit, so that masks are the same
    assert unpack(pack(tokens._replace(parsing=None)), 5).parsing is None


@pytest.mark.parametrize("flip", [False, True])
def test_losses_are_those_of_a_run_that_encodes_at_every_step(scratch, monkeypatch, flip):
    settings = pretrain_settings(steps=6, overrides=FROZEN | {"data.flip": flip})
    cached = lines_of(f"frozen-cached-{flip}", settings)
    monkeypatch.setattr(pretraining, "token_inputs", lambda *_, **__: Pixels(96))
    plain = lines_of(f"frozen-plain-{flip}", settings)
    assert len(cached) == len(plain) == 6
    for ours, theirs in zip(cached, plain, strict=True):
        for loss in ("mlm", "itm", "vla", "mfr"):
            assert ours[loss] == pytest.approx(theirs[loss], rel=2e-3, abs=2e-4)


def test_the_visual_side_stays_as_it_was_and_has_no_optimiser_state(scratch):
    settings = pretrain_settings(steps=2, overrides=FROZEN)
    run, prepared = open_run("01_pretrain", settings, name="frozen"), prepare(settings)
    before = {name: tensor.clone() for name, tensor in prepared.model.visual.state_dict().items()}
    states = build_optimiser(prepared.model, OptimSettings())
    trained = {id(parameter) for group in states.param_groups for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in prepared.model.visual.parameters()}
    pretrain(run, prepared, settings)
    after = prepared.model.visual.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not prepared.model.train().visual.training
    assert list(run.folder.glob("images-*")) == []  # nothing stays of the cache
    again = prepare(settings)
    pretrain(run, again, settings)  # is trained: reads no image
    assert list(run.folder.glob("images-*")) == []


def test_an_interrupted_run_continues_with_the_same_tokens(scratch, monkeypatch):
    settings = pretrain_settings(steps=6, checkpoint_every=2, overrides=FROZEN)
    whole = lines_of("frozen-whole", settings)
    run, prepared = open_run("01_pretrain", settings, name="frozen-stopped"), prepare(settings)

    def stop(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    log = run.log
    monkeypatch.setattr(run, "log", lambda step, **values: (log(step, **values), stop(step)))
    with pytest.raises(KeyboardInterrupt):
        pretrain(run, prepared, settings)
    assert len(list(run.folder.glob("images-*/images.npy"))) == 1
    resumed = lines_of("frozen-stopped", settings)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert {**ours, "step_s": 0} == {**theirs, "step_s": 0}


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "retrieval"])
def test_a_task_trains_on_a_frozen_visual_side(scratch, task):
    few = {"frozen": True, "scenes.images": 60, "scenes.val": 20, "scenes.test": 10, "workers": 0, "train.images": 4}
    settings = finetune_settings(task=task, steps=2, overrides=few | ({"answer_count": 1} if task == "vqa" else {}))
    run, prepared = open_run("04_finetune", settings, name=f"frozen-{task}"), prepare_task(settings)
    before = {name: tensor.clone() for name, tensor in prepared.model.base.visual.state_dict().items()}
    assert finetune(run, prepared, settings) == 2
    after = prepared.model.base.visual.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert prepared.model.base.settings.visual.frozen


def test_a_checkpoint_remembers_and_a_task_may_thaw_it(scenes, tmp_path):
    model = narrow_model(scenes, frozen=True)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.settings.visual.frozen and not any(part.requires_grad for part in again.visual.parameters())
    again.freeze_visual(False)
    assert all(part.requires_grad for part in again.visual.parameters()) and again.train().visual.training


def test_what_cannot_be_frozen_is_refused():
    for overrides, message in (
        ({"visual.family": "regions", "mask.mode": "random"}, "no weights"),
        ({"visual.family": "grid", "visual.dictionary": 16, "mask.mode": "random"}, "a dictionary"),
        ({"mask.where": "pixels"}, "encodes masked images"),
    ):
        with pytest.raises(SettingsError, match=message):
            pretrain_settings(init_visual="", overrides={"visual.frozen": True, **overrides})
