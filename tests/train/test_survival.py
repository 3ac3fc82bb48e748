"""Runs survive: killed at any moment, asked to stop, out of memory, with a loss gone wrong; one writer at a time."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import NARROW, narrow_model

from vpworkbench.data.batches import GroupBatches
from vpworkbench.data.captioned import read_pictures
from vpworkbench.errors import RunError, TrainingError
from vpworkbench.runs import open_run
from vpworkbench.settings import pretrain_settings
from vpworkbench.system import lock
from vpworkbench.train.engine import Stopped, accumulate_gradients, build_optimiser, fit
from vpworkbench.train.objective import Pretraining, group_batches

FRESH = multiprocessing.get_context("forkserver")  # torch is imported once, and no thread of ours is copied
FRESH.set_forkserver_preload(["vpworkbench.train.pretrain", "vpworkbench.train.engine"])


def settings(steps: int = 8, **changes):
    few = NARROW | {"train.images": 4, "train.log_every": 3, "optim.warmup": 2}
    return pretrain_settings(steps=steps, init_visual="", overrides=few | changes)


def train(scenes_folder, root, chosen, name="a", memory_mib=0, kind=GroupBatches):
    """In a process of its own: train the run `name` to its end, or as far as it is let."""
    os.environ["VPW_RUNS"] = str(root)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers: else each starts a server of its own
    scenes = read_pictures(scenes_folder)
    run, model = open_run("01_pretrain", chosen, name=name), narrow_model(scenes)
    batches = group_batches(scenes, model, chosen.data, images=chosen.train.images, seed=0)
    batches.__class__ = kind
    if memory_mib:  # beyond what one image takes, with all that torch reserves once
        accumulate_gradients(
            model, Pretraining(chosen), batches[0].micro_batches(chosen.train.images)[0], 1, contextlib.nullcontext
        )
        model.zero_grad()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_mib * 2**20,) * 2)
    try:
        workers = chosen.data.workers
        fit(model, Pretraining(chosen), batches, run, optim=chosen.optim, train=chosen.train, seed=0, workers=workers)
    except (Stopped, TrainingError) as end:
        (run.folder / "end.txt").write_text(f"{type(end).__name__}: {end}")
        raise SystemExit(9) from None


def start(*arguments, context=FRESH, **options):
    process = context.Process(target=train, args=arguments, kwargs=options)
    process.start()
    return process


def finish(*arguments, **options) -> Path:
    process = start(*arguments, **options)
    process.join(300)
    assert process.exitcode == 0
    return Path(arguments[1]) / "01_pretrain" / options.get("name", "a")


def wait_until(condition, process, limit_s=120):
    end = time.monotonic() + limit_s
    while not condition() and process.is_alive():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def outcome(folder: Path) -> tuple[bytes, list]:
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (folder / "checkpoint" / "model.safetensors").read_bytes(), [line | {"step_s": 0} for line in metrics]


def test_two_kills_change_nothing(scenes_folder, tmp_path):
    """One while a checkpoint is written, one later; with a process that prepares batches, and accumulation."""
    chosen = settings(**{"train.checkpoint_every": 1, "train.accumulate": 2, "data.workers": 1})
    whole = finish(scenes_folder, tmp_path / "whole", chosen)
    folder = tmp_path / "killed" / "01_pretrain" / "a" / "checkpoint"
    for moment in (".writing-step-000003*", "step-000005"):
        process = start(scenes_folder, tmp_path / "killed", chosen)
        wait_until(lambda moment=moment: any(folder.glob(moment)), process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert outcome(finish(scenes_folder, tmp_path / "killed", chosen)) == outcome(whole)
    assert not list(folder.glob(".writing-*")) and not list(folder.glob("step-*"))


@pytest.mark.slow
def test_twenty_kills_change_nothing(scenes_folder, tmp_path):
    """At random moments after the first sign of training; every other one while a checkpoint is written."""
    steps = 200
    chosen = settings(steps, **{"train.checkpoint_every": 1, "data.workers": 1, "train.keep_last": 2})
    whole = finish(scenes_folder, tmp_path / "whole", chosen)
    checkpoint = tmp_path / "killed" / "01_pretrain" / "a" / "checkpoint"
    rng, reached, writing = random.Random(0), 0, 0

    def done() -> int:
        return max((int(path.name.removeprefix("step-")) for path in checkpoint.glob("step-*")), default=0)

    for kill in range(20):
        process = start(scenes_folder, tmp_path / "killed", chosen)
        goal = reached + rng.randint(1, 6)
        wait_until(lambda goal=goal: done() >= goal, process)
        if kill % 2:
            wait_until(lambda: any(checkpoint.glob(".writing-*")), process)
        else:
            time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and done() >= goal
        reached, writing = done(), writing + any(checkpoint.glob(".writing-*"))
    assert writing >= 3
    assert outcome(finish(scenes_folder, tmp_path / "killed", chosen)) == outcome(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_stops_and_is_resumed(scenes_folder, tmp_path, number):
    chosen = settings(steps=30)  # no checkpoint but the one of the stop
    folder = tmp_path / "01_pretrain" / "a"
    process = start(scenes_folder, tmp_path, chosen)
    wait_until(lambda: (folder / "metrics.jsonl").exists(), process)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 9
    (saved,) = (folder / "checkpoint").iterdir()
    done = int(saved.name.removeprefix("step-"))
    assert 3 <= done < 30
    end = f"Stopped: training stopped after step {done} of 30; the same call resumes it"
    assert (folder / "end.txt").read_text() == end
    if number is signal.SIGTERM:
        whole = finish(scenes_folder, tmp_path / "whole", chosen)
        assert outcome(finish(scenes_folder, tmp_path, chosen)) == outcome(whole)


# ---------------------------------------------------------------------------------------------- one writer


def hold(path, ready):
    with lock(path, patience_s=0):
        ready.set()
        time.sleep(99)


def test_a_run_has_one_writer_until_it_ends_in_whatever_way(run):
    ready = FRESH.Event()
    process = FRESH.Process(target=hold, args=(run.folder / ".writer.lock", ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(RunError, match=f"in use by process {process.pid} on .*; wait for it or end it"):
        with lock(run.folder / ".writer.lock", patience_s=0.2):
            pass
    process.kill()
    process.join()
    with run.writing():
        assert (run.folder / ".writer.holder").read_text().startswith(f"{os.getpid()} on ")


# --------------------------------------------------------------------------------------------- checkpoints


def run_of(scenes, name, probe=None, batches=None, optim=None, **changes):
    chosen = settings(**changes)
    run, model = open_run("01_pretrain", chosen, name=name), narrow_model(scenes)
    batches = batches or group_batches(scenes, model, chosen.data, images=chosen.train.images, seed=0)
    optim, workers = optim or chosen.optim, chosen.data.workers
    fit(model, Pretraining(chosen, probe), batches, run, optim=optim, train=chosen.train, seed=0, workers=workers)
    return run


@pytest.mark.usefixtures("runs_folder")
def test_the_last_and_the_best_are_kept(scenes):
    losses = iter([3.0, 1.0, 2.0])
    changes = {
        "train.checkpoint_every": 2,
        "train.keep_last": 3,
        "train.log_every": 2,
        "train.probe_every": 2,
        "train.keep_best": True,
    }
    run = run_of(scenes, "kept", lambda model: {"held_out_loss": next(losses), "flow": 0.5}, steps=6, **changes)
    folder = run.folder / "checkpoint"
    assert sorted(path.name for path in folder.glob("*-*")) == ["best-000004", "step-000002", "step-000004"]
    assert json.loads((folder / "best-000004" / "progress.json").read_text()) == {"step": 4, "held_out_loss": 1.0}
    assert run.metrics()["held_out_loss"].tolist() == [3, 1, 2] and "flow" in run.metrics()


@pytest.mark.usefixtures("runs_folder")
def test_a_damaged_checkpoint_falls_back_on_the_one_before(scenes, caplog):
    changes = {"train.checkpoint_every": 2, "train.keep_last": 2}
    whole = run_of(scenes, "whole", **changes)
    model = narrow_model(scenes)
    run = open_run("01_pretrain", settings(**changes), name="damaged")
    batches = group_batches(scenes, model, settings().data, images=4, seed=0)
    get = batches.share
    batches.share = lambda step, *place: get(step, *place) if step < 5 else pytest.fail("cut off")
    with pytest.raises(pytest.fail.Exception):
        run_of(scenes, "damaged", batches=batches, **changes)
    weights = run.folder / "checkpoint" / "step-000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert outcome(run_of(scenes, "damaged", **changes).folder) == outcome(whole.folder)
    assert "step-000004: cannot be read" in caplog.text


@pytest.mark.usefixtures("runs_folder")
def test_damaged_final_weights_are_made_again_or_refused_in_one_line(scenes, caplog):
    changes = {"train.checkpoint_every": 4, "train.keep_last": 2}
    run = run_of(scenes, "final", **changes)
    whole, folder = outcome(run.folder), run.folder / "checkpoint"
    (folder / "step-old").mkdir()  # of somebody who put a copy there
    for left in (9, 0):
        (folder / "model.safetensors").write_bytes(whole[0][: len(whole[0]) // 10 * left])
        assert outcome(run_of(scenes, "final", **changes).folder) == whole
    assert f"{folder}: cannot be read" in caplog.text and (folder / "step-old").is_dir()

    alone = run_of(scenes, "alone", steps=2)
    (alone.folder / "checkpoint" / "progress.json").write_text("[")
    with pytest.raises(RunError, match="no checkpoint can be read; delete that folder to train from the start"):
        run_of(scenes, "alone", steps=2)


@pytest.mark.usefixtures("runs_folder")
def test_training_does_not_silently_begin_anew_where_no_checkpoint_can_be_read(scenes):
    """And nothing of a checkpoint, the optimiser's state included, is a pickle."""
    run = run_of(scenes, "spoilt", steps=4, **{"train.checkpoint_every": 2, "train.keep_last": 2})
    folder = run.folder / "checkpoint"
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"} and (folder / "step-000002" / "optimiser.safetensors").exists()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    optimiser = folder / "step-000002" / "optimiser.safetensors"
    optimiser.write_bytes(optimiser.read_bytes()[:-9])
    with pytest.raises(RunError, match="no checkpoint can be read; delete that folder to train from the start"):
        run_of(scenes, "spoilt", steps=4, **{"train.checkpoint_every": 2, "train.keep_last": 2})


# -------------------------------------------------------------------------------------------------- guards


class Infinite(Pretraining):
    """From the fifth step on a loss is not a number."""

    def losses(self, model, batch):
        sums = super().losses(model, batch)
        self.seen = getattr(self, "seen", 0) + 1
        return sums | {"mlm": sums["mlm"] * (torch.nan if self.seen >= 5 else 1)}


@pytest.mark.usefixtures("runs_folder")
def test_a_loss_that_is_not_finite_is_told_with_its_records_and_spoils_no_checkpoint(scenes):
    chosen = settings(**{"train.checkpoint_every": 2, "train.log_every": 8})
    run, model = open_run("01_pretrain", chosen, name="nan"), narrow_model(scenes)
    batches = group_batches(scenes, model, chosen.data, images=4, seed=0)
    with pytest.raises(TrainingError, match=r"not finite at step 4 \(noticed at 6\).*bad_batch.json"):
        fit(model, Infinite(chosen), batches, run, optim=chosen.optim, train=chosen.train, seed=0)
    bad = json.loads((run.folder / "bad_batch.json").read_text())
    shown = batches.sampler.ids(4)
    assert bad["step"] == 4 and bad["records"] == shown and len(shown) == 4
    assert [path.name for path in (run.folder / "checkpoint").iterdir()] == ["step-000004"]


@pytest.mark.usefixtures("runs_folder")
def test_a_loss_that_explodes_stops_the_run(scenes):
    optim = settings().optim.model_copy(update={"lr_fusion": 3.0, "lr_visual": 3.0, "warmup": 20})
    with pytest.raises(TrainingError, match=r"the loss exploded: .* times the first, at step \d+ .*lower optim"):
        run_of(scenes, "wild", optim=optim, steps=30)


def test_out_of_memory_names_the_accumulation_that_fits(scenes_folder, tmp_path, monkeypatch):
    """And the run trains with it in that memory.

    The limit counts addresses, and glibc keeps freed ones; these settings, read when a process starts, make it return
    them.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    limited = {"memory_mib": 200, "context": multiprocessing.get_context("spawn")}
    start(scenes_folder, tmp_path, settings(2, **{"train.images": 48}), **limited).join(120)
    end = (tmp_path / "01_pretrain" / "a" / "end.txt").read_text()
    assert end.startswith("TrainingError: out of memory with 48 images at once: train.accumulate "), end
    named = int(end.split("train.accumulate ")[1].split()[0])
    assert 48 % named == 0 and named < 48
    finish(scenes_folder, tmp_path, settings(2, **{"train.images": 48, "train.accumulate": named}), name="b", **limited)


class Dying(GroupBatches):
    """Its worker is killed at the third step, as the system does where memory ends."""

    def share(self, step, index, count):
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().share(step, index, count)


def test_a_killed_worker_is_reported_as_such(scenes_folder, tmp_path):
    process = start(scenes_folder, tmp_path, settings(**{"data.workers": 1}), kind=Dying)
    process.join(120)
    end = (tmp_path / "01_pretrain" / "a" / "end.txt").read_text()
    assert "DataLoader worker" in end and "The system ended a process" in end and "lower data.workers" in end


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adamw_is_fused_on_a_gpu(scenes):
    assert all(group["fused"] for group in build_optimiser(narrow_model(scenes).cuda(), settings().optim).param_groups)
