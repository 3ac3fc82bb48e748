"""The engine: accumulation, schedule, exact resume, refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import NARROW, narrow_model, without_dropout
from transformers import get_linear_schedule_with_warmup

from vpworkbench.data.captioned import read_pictures
from vpworkbench.errors import DataError, RunError, SettingsError, TrainingError
from vpworkbench.model.visual import VisualTokens
from vpworkbench.runs import open_run
from vpworkbench.settings import OptimSettings, pretrain_settings
from vpworkbench.train.engine import accumulate_gradients, build_optimiser, fit, learning_rate_factor, pick_device
from vpworkbench.train.objective import Pretraining, group_batches


def settings(**train):
    overrides = NARROW | {f"train.{k}": v for k, v in train.items()}
    return pretrain_settings(steps=6, init_visual="", overrides={"train.images": 8, "train.log_every": 4, **overrides})


def gradients(model, objective, batch, count: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    accumulate_gradients(model, objective, batch, count, contextlib.nullcontext)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    # the bias of the keys shifts every score of a row alike: its true gradient is zero, what is left is rounding
    return max(((one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-10)).item() for name in one)


@pytest.fixture
def double_model(scenes):
    """float64, dropout 0."""
    model = without_dropout(narrow_model(scenes).double().train())
    model.fusion.bert.config.attention_probs_dropout_prob = 0.0
    return model


def test_accumulation_changes_nothing(double_model, scenes):
    """8 x 1 and 2 x 4 give one update, with different numbers of masks in the micro-batches."""
    objective = Pretraining(settings())
    batch = group_batches(scenes, double_model, settings().data, images=8, seed=0)[0]
    counts = [objective.counts(part)["mlm"] for part in batch.micro_batches(8)]
    assert len(set(counts)) > 1
    eight, two = (gradients(double_model, objective, batch, count) for count in (8, 2))
    assert eight.keys() == two.keys() and len(eight) > 50
    # float32 inside VLA and the losses would show as 1e-7: they follow the model's precision
    assert largest_difference(eight, two) < 1e-9


def test_mean_of_means_would_be_seen(double_model, scenes):
    """Breaking the weighting on purpose: each micro-batch divided by its own counts."""
    objective = Pretraining(settings())
    batch = group_batches(scenes, double_model, settings().data, images=8, seed=0)[0]
    right = gradients(double_model, objective, batch, 4)
    double_model.zero_grad()
    for part in batch.micro_batches(4):
        accumulate_gradients(double_model, objective, part, 1, contextlib.nullcontext)
    wrong = {name: p.grad / 4 for name, p in double_model.named_parameters() if p.grad is not None}
    assert largest_difference(right, wrong) > 1e-4


def test_image_is_encoded_once_for_its_four_texts(scenes):
    model, seen = narrow_model(scenes), []
    model.visual.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    batch = group_batches(scenes, model, settings().data, images=8, seed=0)[0]
    Pretraining(settings()).losses(model, batch)
    assert seen == [8] and len(batch.matched) == 32


def test_hidden_pixels_reach_no_neighbour(scenes):
    """One mask an image; what it hides changes neither the parsed tokens around it nor the words' losses."""
    model, parsed = narrow_model(scenes), []
    model.visual.register_forward_hook(lambda module, args, output: parsed.append(output.features))
    chosen = settings()
    chosen = chosen.model_copy(update={"mask": chosen.mask.model_copy(update={"where": "pixels", "mode": "random"})})
    objective = Pretraining(chosen)
    batch = group_batches(scenes, model, chosen.data, images=4, seed=0)[0]
    masked = objective.masked(VisualTokens(torch.empty(0), None), batch)
    assert (masked.view(4, 4, -1) == masked.view(4, 4, -1)[:, :1]).all() and (masked.sum(dim=1) == 5).all()
    sums = objective.losses(model, batch)
    whole, hidden = parsed
    assert not torch.equal(whole, hidden)
    hidden.sum().backward(retain_graph=True)
    assert not whole.requires_grad and sums["mfr"] > 0
    squares = masked[::4].view(4, 1, 6, 6).repeat_interleave(16, -1).repeat_interleave(16, -2)
    changed = torch.where(squares, 255 - batch.images, batch.images)
    objective.losses(model, dataclasses.replace(batch, images=changed))
    assert torch.equal(parsed[3], hidden) and not torch.equal(parsed[2], whole)


def test_total_is_eq_10(scenes):
    """MLM + lambda1 (ITM + 0.1 VLA) + lambda2 MFR, each a mean: the gradient of the sum written out."""
    model = narrow_model(scenes)
    batch = group_batches(scenes, model, settings().data, images=4, seed=0)[0]
    objective = Pretraining(settings())
    ours = gradients(model, objective, batch, 1)
    model.zero_grad()
    sums, counts = objective.losses(model, batch), objective.counts(batch)
    mlm, itm, vla, mfr = (sums[name] / counts[name] for name in ("mlm", "itm", "vla", "mfr"))
    (mlm + 1 * (itm + 0.1 * vla) + 0.01 * mfr).backward()
    written = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert largest_difference(ours, written) < 1e-4
    assert counts["itm"] == counts["vla"] == 16 and counts["mfr"] == 8


def test_alignment_stays_in_float32_under_autocast(scenes):
    model = narrow_model(scenes)
    batch = group_batches(scenes, model, settings().data, images=4, seed=0)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Pretraining(settings()).losses(model, batch)["vla"].dtype == torch.float32


def test_pretrained_batch_norm_is_frozen_and_then_accumulation_is_exact(scenes):
    model = without_dropout(narrow_model(scenes, family="grid", frozen_norm=True).double().train())
    batch = group_batches(scenes, model, settings().data, images=4, seed=0)[0]
    objective = Pretraining(pretrain_settings(visual="grid", init_visual=""))
    before = model.visual.network.bn1.running_mean.clone()
    four, one = (gradients(model, objective, batch, count) for count in (4, 1))
    assert largest_difference(four, one) < 1e-9
    assert torch.equal(model.visual.network.bn1.running_mean, before)


def test_every_objective_reaches_the_visual_side(double_model, scenes):
    batch = group_batches(scenes, double_model, settings().data, images=4, seed=0)[0]
    sums = Pretraining(settings()).losses(double_model, batch)
    assert set(sums) == {"mlm", "itm", "vla", "mfr"}
    for name, value in sums.items():
        double_model.zero_grad()
        value.backward(retain_graph=True)
        reached = sum(p.grad.abs().sum() for p in double_model.visual.parameters() if p.grad is not None)
        assert reached > 0, name


def run_of(scenes, name: str, stop_after: int | None = None, **train):
    """Train the narrow model in the run `name`; `stop_after` steps it is killed, as a power cut would."""
    chosen = settings(checkpoint_every=2, **train)
    run, model = open_run("01_pretrain", chosen, name=name), narrow_model(scenes)
    batches = group_batches(scenes, model, chosen.data, images=8, seed=0)
    if stop_after is not None:
        log, original = [], batches.inputs.stack

        def pixels(*arguments):
            log.append(1)
            if len(log) > stop_after:
                raise KeyboardInterrupt
            return original(*arguments)

        batches.inputs = SimpleNamespace(stack=pixels)
        with pytest.raises(KeyboardInterrupt):
            fit(model, Pretraining(chosen), batches, run, optim=chosen.optim, train=chosen.train, seed=0)
    else:
        fit(model, Pretraining(chosen), batches, run, optim=chosen.optim, train=chosen.train, seed=0)
    return run


def test_resume_is_exact(scenes):
    """Only the last checkpoint is kept; a run that is called again after its training takes the final weights."""
    whole = run_of(scenes, "whole")
    stopped = run_of(scenes, "halved", stop_after=5)
    assert [folder.name for folder in (stopped.folder / "checkpoint").iterdir()] == ["step-000004"]
    halved = run_of(scenes, "halved")
    halved = run_of(scenes, "halved", stop_after=None)
    one, other = (run.folder / "checkpoint" / "model.safetensors" for run in (whole, halved))
    assert one.read_bytes() == other.read_bytes()
    times = ["step_s"]
    metrics = [run.metrics().drop(columns=times) for run in (whole, halved)]
    assert metrics[0].equals(metrics[1]) and list(metrics[0]["step"]) == [4, 6]
    assert not list((halved.folder / "checkpoint").glob("step-*"))


def test_loss_that_is_not_finite_stops_the_run(scenes):
    chosen = settings()
    run, model = open_run("01_pretrain", chosen, name="nan"), narrow_model(scenes)
    torch.nn.init.constant_(model.itm.bias, torch.nan)
    batches = group_batches(scenes, model, chosen.data, images=8, seed=0)
    with pytest.raises(TrainingError, match="itm.*not finite"):
        fit(model, Pretraining(chosen), batches, run, optim=chosen.optim, train=chosen.train, seed=0)


@contextlib.contextmanager
def files_limited_to(size: int):
    """Writing beyond `size` bytes fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_keeps_the_last_checkpoint(scenes):
    run = run_of(scenes, "full", stop_after=3)
    before = (run.folder / "checkpoint" / "step-000002" / "progress.json").read_text()
    with files_limited_to(50_000), pytest.raises(RunError, match="checkpoint not written.*free space"):
        run_of(scenes, "full")
    assert [folder.name for folder in (run.folder / "checkpoint").iterdir()] == ["step-000002"]
    assert (run.folder / "checkpoint" / "step-000002" / "progress.json").read_text() == before


def test_schedule_warms_up_and_decays_at_25_and_35_of_40():
    optim = OptimSettings(warmup=500)
    factors = [learning_rate_factor(step, 40_000, optim) for step in (0, 249, 499, 24_999, 25_000, 34_999, 35_000)]
    assert factors == pytest.approx([1 / 500, 0.5, 1, 1, 0.1, 0.1, 0.01])


def test_linear_schedule_falls_as_that_of_transformers():
    optim = OptimSettings(warmup=20, decay_at="linear")
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimiser, 20, 100)
    for step in range(100):
        factor = learning_rate_factor(step, 100, optim)
        assert factor == pytest.approx((step + 1) / 20 if step < 20 else theirs.get_last_lr()[0])
        optimiser.step()
        theirs.step()


def recorded_steps(scenes, monkeypatch, name: str, **optim) -> list[tuple[list[dict], list[list[torch.Tensor]]]]:
    """A fit of twelve steps: for each step the groups of the optimiser, and the gradients, as AdamW gets them."""
    steps, update = [], torch.optim.AdamW.step

    def step(self, *arguments, **options):
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        gradients = [[p.grad.clone() for p in group["params"] if p.grad is not None] for group in self.param_groups]
        steps.append((groups, gradients))
        return update(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    chosen = settings().with_overrides({"train.steps": 12} | {f"optim.{key}": value for key, value in optim.items()})
    run, model = open_run("01_pretrain", chosen, name=name), narrow_model(scenes)
    batches = group_batches(scenes, model, chosen.data, images=2, seed=0)
    fit(model, Pretraining(chosen), batches, run, optim=chosen.optim, train=chosen.train, seed=0)
    assert len(steps) == 12
    return steps


def test_every_step_has_the_rate_of_the_schedule(scenes, monkeypatch):
    """Three steps of warm-up, a tenth from half of the run, a hundredth from three quarters; written out."""
    factors = [1 / 3, 2 / 3, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]
    rates = {"lr_visual": 3e-5, "lr_fusion": 2e-4, "warmup": 3, "decay": 0.1, "decay_at": (0.5, 0.75)}
    steps = recorded_steps(scenes, monkeypatch, "rates", **rates)
    for factor, (groups, _) in zip(factors, steps, strict=True):
        assert sorted({group["lr"] for group in groups}) == pytest.approx([3e-5 * factor, 2e-4 * factor])


def test_gradients_are_clipped_to_the_norm(scenes, monkeypatch):
    """Over all parameters together; gradients of a smaller norm are left as they are."""

    def norms(name: str, clip: float) -> list[float]:
        steps = recorded_steps(scenes, monkeypatch, name, clip=clip)
        return [
            torch.stack([g.square().sum() for group in grads for g in group]).sum().sqrt().item() for _, grads in steps
        ]

    assert norms("clipped", 1e-3) == pytest.approx([1e-3] * 12, rel=1e-3)
    assert min(norms("free", 1e6)) > 0.1


def test_decay_leaves_out_biases_norms_and_position_tables(model):
    groups = build_optimiser(model, OptimSettings()).param_groups
    rates = {(group["rate"], group["weight_decay"]) for group in groups}
    assert rates == {(5e-6, 0.01), (5e-6, 0.0), (5e-5, 0.01), (5e-5, 0.0)}
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert any("relative_position_bias_table" in name for name in kept)
    assert {name for name in names.values() if name.endswith("bias")} <= kept


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(SettingsError, match="no CUDA device; use 'auto' or 'cpu'"):
        pick_device("cuda")


def test_what_a_worker_cannot_read_is_named(scenes_folder, tmp_path):
    """Broken images, in the process that prepares batches: one line, without torch's traceback around it."""
    folder = shutil.copytree(scenes_folder, tmp_path / "scenes")
    scenes = [picture for picture in read_pictures(folder) if picture.split == "train"]
    for picture in scenes:
        cut = picture.image.read()[:200]
        (tmp_path / "cut" / picture.image.name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cut" / picture.image.name).write_bytes(cut)
    broken = [dataclasses.replace(one, image=dataclasses.replace(one.image, folder=tmp_path / "cut")) for one in scenes]
    chosen, model = settings(), narrow_model(scenes)
    batches = group_batches(broken, model, chosen.data, images=8, seed=0)
    with pytest.raises(DataError, match=r"\A\S*cut/\S+\.(png|jpg): cannot be decoded \(.*\); replace it[^\n]*\Z"):
        fit(
            model,
            Pretraining(chosen),
            batches,
            open_run("01_pretrain", chosen, name="broken"),
            optim=chosen.optim,
            train=chosen.train,
            seed=0,
            workers=1,
        )
