"""Two processes (gloo) do what one does: the same gradients, the same run, whoever resumes it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FEW, NARROW, narrow_model, without_dropout

from vpworkbench.data.captioned import read_pictures
from vpworkbench.runs import Run, open_run
from vpworkbench.settings import pretrain_settings
from vpworkbench.train.engine import accumulate_gradients, fit
from vpworkbench.train.objective import Pretraining, group_batches
from vpworkbench.train.pretrain import prepare, pretrain
from vpworkbench.train.processes import _first_error, join

REPOSITORY = Path(__file__).parents[2]
# accelerate needs --multi_gpu, as it starts one process on CPUs without MPI; ours stay on CPUs all the same
ACCELERATE = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
LAUNCHERS = {
    "train.processes": [],
    "torchrun": "-m torch.distributed.run --standalone --nproc-per-node 2".split(),
    "accelerate launch": f"-m accelerate.commands.launch {ACCELERATE} --main_process_port 0".split(),
}


def settings(**changes):
    few = NARROW | {"train.images": 8, "train.accumulate": 4, "train.log_every": 2, "optim.warmup": 2}
    return pretrain_settings(steps=6, init_visual="", overrides=few | changes)


def gradients(scenes, device="cpu") -> dict[str, torch.Tensor]:
    """Of one step, in double precision; of this process's share where there are several."""
    processes = join(torch.device(device))
    model, objective = narrow_model(scenes).double(), Pretraining(settings())
    batches = group_batches(scenes, model, settings().data, images=8, seed=0)
    batch = batches.share(0, processes.index, processes.count)
    count = max(1, 4 // processes.count)
    accumulate_gradients(model, objective, batch, count, contextlib.nullcontext, processes)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def dictionary(scenes) -> dict[str, torch.Tensor]:
    """Codes and gradients of the grid CNN with a visual dictionary after two steps, in double precision.

    Batch norm is frozen, as where weights are taken over: from scratch it follows the batches of each process.
    """
    processes = join(torch.device("cpu"))
    model = without_dropout(narrow_model(scenes, family="grid", dictionary=24, frozen_norm=True).double().train())
    chosen = settings(**{"visual.family": "grid", "visual.dictionary": 24, "mask.mode": "code"})
    batches = group_batches(scenes, model, chosen.data, images=8, seed=0)
    for step in range(2):
        batch = batches.share(step, processes.index, processes.count)
        model.zero_grad()
        accumulate_gradients(model, Pretraining(chosen), batch, 2, contextlib.nullcontext, processes)
    state = {name: value for name, value in model.state_dict().items() if "dictionary" in name}
    return state | {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def launched(out: Path) -> None:
    """What `torchrun` starts: save the gradients, train one run to its end and another to its third step."""
    torch.set_num_threads(1)
    scenes = read_pictures(os.environ["TEST_SCENES"])
    torch.save(gradients(scenes), out / f"gradients-{os.environ['RANK']}.pt")
    torch.save(dictionary(scenes), out / f"dictionary-{os.environ['RANK']}.pt")
    train(scenes)
    with pytest.raises(pytest.fail.Exception):
        train(scenes, steps=3, name="left")


def train(scenes, steps: int = 6, name: str = "shared") -> Run:
    """The run to its end, or as far as `steps`."""
    chosen = settings(**{"train.checkpoint_every": 2})
    run, model = open_run("01_pretrain", chosen, name=name), narrow_model(scenes)
    without_dropout(model)  # each process draws its own
    batches = group_batches(scenes, model, chosen.data, images=8, seed=0)
    share = batches.share
    batches.share = lambda step, *place: share(step, *place) if step < steps else pytest.fail("cut off")
    fit(model, Pretraining(chosen), batches, run, optim=chosen.optim, train=chosen.train, seed=0)
    return run


def test_two_processes_are_as_one(scenes, scenes_folder, tmp_path, monkeypatch):
    """Gradients of a step within 1e-5; a run that one process begins and two end, or the reverse, ends as one's."""
    monkeypatch.setenv("VPW_RUNS", str(tmp_path / "one"))
    whole = train(scenes)
    monkeypatch.setenv("VPW_RUNS", str(tmp_path / "two"))
    with pytest.raises(pytest.fail.Exception):
        train(scenes, steps=3)
    code = "import sys, pathlib, test_processes; test_processes.launched(pathlib.Path(sys.argv[1]))"
    (tmp_path / "job.py").write_text(code)
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests" / "train")))
    command = [sys.executable, *LAUNCHERS["torchrun"], str(tmp_path / "job.py"), str(tmp_path)]
    environment = os.environ | {"TEST_SCENES": str(scenes_folder), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[:6000]

    alone = gradients(scenes)
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"gradients-{rank}.pt", weights_only=True)
        assert shared.keys() == alone.keys() and len(alone) > 50
        for name, gradient in alone.items():
            assert (shared[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp(min=1e-8), name

    codes = dictionary(scenes)
    assert codes["visual.dictionary.steps"] == 2 and len(codes) > 50
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"dictionary-{rank}.pt", weights_only=True)
        assert shared.keys() == codes.keys()
        for name, value in codes.items():
            assert (shared[name] - value).double().norm() <= 1e-5 * value.double().norm().clamp(min=1e-8), name

    run = open_run("01_pretrain", settings(**{"train.checkpoint_every": 2}), name="shared")
    assert json.loads((run.folder / "checkpoint" / "progress.json").read_text()) == {"step": 6}
    assert (run.folder.parent / "left" / "checkpoint" / "step-000002").exists()
    alone_again = train(scenes, name="left")
    ours, *others = (each.metrics().drop(columns="step_s") for each in (whole, run, alone_again))
    for theirs in others:
        assert ours["step"].tolist() == theirs["step"].tolist() == [2, 4, 6]
        for name in ("mlm", "itm", "vla", "mfr", "gradient_norm"):
            assert ours[name].to_numpy() == pytest.approx(theirs[name].to_numpy(), rel=1e-4), name


def test_shares_are_the_parts_of_a_step_without_overlap(scenes):
    model = narrow_model(scenes)
    batches = group_batches(scenes, model, settings(**{"data.flip": True}).data, images=8, seed=0)
    whole = batches[5]
    parts = [batches.share(5, index, 4) for index in range(4)]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    for name in ("words", "labels", "matched", "noise"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    index = torch.cat([part.image_index + 2 * number for number, part in enumerate(parts)])
    assert torch.equal(index, whole.image_index)


def test_processes_do_not_name_a_run():
    two = settings(**{"train.processes": 2})
    assert two.train.processes == 2 and two.with_overrides({"seed": 1}).train.processes == 2
    assert two.model_dump(mode="json") == settings().model_dump(mode="json")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_vpw_train_in_two_processes_by_every_launcher(scenes_folder, tmp_path, launcher):
    """The first as the notebook does it."""
    few = FEW | {"train.device": "cpu"}
    if launcher == "train.processes":
        few |= {"train.processes": 2}
    train_run = "-m vpworkbench.cli train 01_pretrain --name a -p steps=2 -p".split()
    command = [sys.executable, *LAUNCHERS[launcher], *train_run, f"overrides={json.dumps(few)}"]
    environment = os.environ | {"VPW_RUNS": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[:6000]
    assert json.loads((tmp_path / "01_pretrain/a/checkpoint/progress.json").read_text()) == {"step": 2}
    named = 3 if launcher == "train.processes" else 2  # each process names the folder, and the one that started them
    assert done.stdout.count(str(tmp_path / "01_pretrain" / "a")) == named


@pytest.mark.slow
def test_two_processes_share_the_tokens_of_a_frozen_visual_side(scratch, tmp_path, monkeypatch):
    few = FEW | {"train.log_every": 1, "train.device": "cpu", "visual.frozen": True}
    chosen = pretrain_settings(steps=3, overrides=few)
    alone = open_run("01_pretrain", chosen, name="frozen-alone")
    pretrain(alone, prepare(chosen), chosen)
    train_run = "-m vpworkbench.cli train 01_pretrain --name a -p steps=3 -p".split()
    command = [sys.executable, *LAUNCHERS["torchrun"], *train_run, f"overrides={json.dumps(few)}"]
    environment = os.environ | {"VPW_RUNS": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[:6000]
    monkeypatch.setenv("VPW_RUNS", str(tmp_path))
    together = open_run("01_pretrain", chosen, name="a")
    for name in ("mlm", "itm", "vla", "mfr"):
        assert together.metrics()[name].to_numpy() == pytest.approx(alone.metrics()[name].to_numpy(), rel=1e-3), name
    assert list(together.folder.glob("images-*")) == []


def test_the_first_error_of_several_processes_is_the_one_that_is_reported(capfd):
    """Torchrun writes its own pages after it, and another process that the first one left alone."""
    said = [b"step:  0%|   | 0/8\rstep: 12%|# | 1/8, 3s/step]err", b"or: a.jpg: cannot be decoded\n[rank0]: Runtime"]
    said += [b"Error: Connection reset\n", b"error: another one\n", b""]
    assert _first_error(SimpleNamespace(read=lambda size: said.pop(0))) == "a.jpg: cannot be decoded"
    assert "Connection reset" in capfd.readouterr().err
