"""Sweeps: grids become checked jobs, failures stop nobody, the jobs of dead workers continue elsewhere."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest
from conftest import FEW
from small_notebooks import OPEN, PARAMETERS, STUMBLE, TRAIN, write_notebook

from vpworkbench import cli
from vpworkbench.errors import SettingsError
from vpworkbench.jobs.notebooks import run_notebook
from vpworkbench.jobs.sweep import Job, make_jobs, read_jobs, sweep, sweep_notebook

pytestmark = pytest.mark.usefixtures("runs_folder")

DEVICE = """
import os
(run.folder / "device").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
"""
SLOW = """
import os, time
with run.writing():
    for step in range(len(run.metrics()), 20):
        run.log(step + 1, kernel=os.getpid())
        time.sleep(0.3)
"""


def jobs_of(notebook, **plan) -> list[Job]:
    return make_jobs({"notebook": str(notebook), **plan})


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_notebook(tmp_path / "trial.ipynb", PARAMETERS, OPEN.format(notebook="trial"), TRAIN, DEVICE, STUMBLE)


def test_a_grid_is_every_combination_under_a_name_that_tells_it(notebook):
    jobs = jobs_of(str(notebook), name="x", parameters={"stumble": ""}, grid={"seed": [0, 1], "name": ["a b/c"]})
    assert [job.name for job in jobs] == ["x-seed=0,name=a_b_c", "x-seed=1,name=a_b_c"]
    jobs = jobs_of("01_pretrain", grid={"mask.budget": [3, 4]}, parameters={"overrides": {"mask.select": "column"}})
    assert [job.parameters["overrides"] for job in jobs] == [
        {"mask.select": "column", "mask.budget": 3},
        {"mask.select": "column", "mask.budget": 4},
    ]
    assert jobs_of(str(notebook), jobs=[{"seed": 3}]) == [Job(str(notebook), "seed=3", {"seed": 3})]
    assert jobs_of(str(notebook), jobs=[{"name": "../b"}])[0].name == "name=__b"


def test_what_a_job_says_comes_before_what_all_say():
    shared = {"mask.budget": 7, "overrides": {"mask.select": "column", "train.images": 8}}
    jobs = jobs_of("01_pretrain", parameters=shared, jobs=[{"overrides": {"mask.budget": 14}}, {"train.images": 16}])
    assert [job.parameters["overrides"] for job in jobs] == [
        {"mask.select": "column", "train.images": 8, "mask.budget": 14},
        {"mask.select": "column", "train.images": 16, "mask.budget": 7},
    ]


def test_wrong_jobs_are_reported_all_at_once_and_start_nothing(tmp_path, runs_folder):
    with pytest.raises(SettingsError) as refusal:
        jobs_of("01_pretrain", grid={"seed": [-1, 0], "mask.bugdet": [3]}, parameters={"stepz": 1})
    lines = str(refusal.value).splitlines()
    assert any(line.startswith("seed=-1,mask.bugdet=3: ") and "mask.budget" in line for line in lines)
    assert sum("did you mean 'steps'" in line for line in lines) == 2
    for text, message in [
        ("notebook: 01_pretrain\ngird: {seed: [1]}", "did you mean 'grid'"),
        ("notebook: 01_pretrain\ngrid: {seed: 1}", "grid.seed: Input should be a valid list"),
        ("notebook: 01_pretrain", "no jobs"),
        ("notebook: 01_pretrain\njobs: [{seed: 1}, {seed: 1}]", "two jobs of 01_pretrain have this name"),
        ("a: [", "not yaml"),
        ("notebook: 3\ngrid: {seed: [1]}", "^notebook: Input should be a valid string"),
        ("notebook: 01_pretrain\nname: 7\ngrid: {seed: [1]}", "^name: Input should be a valid string"),
        ("notebook: 01_pretrain\nparameters: [1]\ngrid: {seed: [1]}", "^parameters: Input should be a valid dict"),
        ("notebook: 01_pretrain\njobs: {seed: 1}", "^jobs: Input should be a valid list"),
        ("notebook: 01_pretrain\njobs: [{seed: 1}, 2]", r"^jobs.1: Input should be a valid dict.* \(given: 2\)"),
        ("notebook: 01_pretrain\ngrid: [seed]", "^grid: Input should be a valid dict"),
        ("notebook: 01_pretrain\ngrid: {1: [1]}", "grid.1.*: Input should be a valid string"),
        ("notebook: 01_pretrain\nparameters: {overrides: 3}\ngrid: {mask.budget: [3]}", ": overrides: must be a JSON"),
    ]:
        (tmp_path / "grid.yaml").write_text(text)
        with pytest.raises(SettingsError, match=message):
            read_jobs(tmp_path / "grid.yaml")
    with pytest.raises(SettingsError, match="none.yaml: cannot be read"):
        read_jobs(tmp_path / "none.yaml")
    assert not runs_folder.exists()


def test_done_is_skipped_failed_is_reported_and_the_rest_goes_on(notebook, runs_folder, tmp_path, monkeypatch, capsys):
    """Each job on a GPU of its own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    (tmp_path / "stone").touch()
    (tmp_path / "grid.yaml").write_text(
        "notebook: trial.ipynb\nname: t\njobs: [{seed: 1}, {seed: 2, stumble: ./stone}, {seed: 3}]\n"
    )
    with pytest.raises(SystemExit) as stop:
        cli.main(["sweep", "grid.yaml"])
    said = capsys.readouterr()
    assert stop.value.code == 1 and "failed in cell In [6]: AssertionError\ntoo early" in said.err
    folders = sorted((runs_folder / "trial").iterdir())
    assert [(folder / "summary.json").exists() for folder in folders] == [True, False, True]
    assert {(folder / "device").read_text() for folder in folders} == {"4", "7"}

    (tmp_path / "stone").unlink()
    table = sweep(read_jobs("grid.yaml"), workers=1)
    assert table["state"].tolist() == ["done"] * 3
    lines = [json.loads((folder / "summary.json").read_text())["lines"] for folder in folders]
    assert lines == [1, 2, 1]  # the complete ones were not run again


def test_notebooks_follow_a_run_with_its_name_seed_and_model(tmp_path, runs_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reads = 'checkpoint: str = ""\n' + PARAMETERS
    checks = "assert checkpoint in ('trial/t-seed=2', 'reads/t-seed=2')"
    write_notebook(tmp_path / "trial.ipynb", PARAMETERS, OPEN.format(notebook="trial"), TRAIN, STUMBLE)
    write_notebook(tmp_path / "reads.ipynb", reads, OPEN.format(notebook="reads"), checks, TRAIN, STUMBLE)
    more = {"notebook": "reads.ipynb", "suffix": "more", "of": "reads", "parameters": {"seed": 5}}
    then = [{"notebook": "reads.ipynb"}, more]
    (job,) = jobs = jobs_of("trial.ipynb", name="t", grid={"seed": [2]}, then=then)
    assert [(one.name, one.parameters) for one in job.then] == [
        ("t-seed=2", {"checkpoint": "trial/t-seed=2", "seed": 2}),
        ("t-seed=2-more", {"checkpoint": "reads/t-seed=2", "seed": 5}),
    ]
    assert sweep(jobs)["state"].tolist() == ["done"]
    summaries = runs_folder.glob("reads/*/summary.json")
    assert sorted(path.parent.name for path in summaries) == ["t-seed=2", "t-seed=2-more"]
    for follower, message in [
        ({"notebook": "reads.ipynb"}, "t-seed=2: two jobs of reads have this name"),
        ({"notebook": "reads.ipynb", "suffix": "x", "parameters": {"sead": 1}}, "t-seed=2-x: .*did you mean 'seed'"),
        ({"notebook": "trial.ipynb", "suffix": "x"}, "t-seed=2-x: .*checkpoint"),
        ({"notebook": "reads.ipynb", "suffix": "x", "of": "raeds"}, "t-seed=2-x: of 'raeds', but no earlier notebook"),
        ({"notebook": "reads.ipynb", "sufix": "x"}, "then.1.sufix: no such setting; did you mean 'then.suffix'"),
    ]:
        with pytest.raises(SettingsError, match=message):
            jobs_of("trial.ipynb", name="t", grid={"seed": [2]}, then=[then[0], follower])


def test_a_sweep_is_one_call_in_python(notebook, runs_folder):
    table = sweep_notebook(str(notebook), name="p", grid={"seed": [1, 2]}, workers=2)
    assert table["name"].tolist() == ["p-seed=1", "p-seed=2"] and table["state"].tolist() == ["done", "done"]
    assert all((runs_folder / "trial" / name / "summary.json").exists() for name in table["name"])


def test_a_signal_stops_every_job(tmp_path, runs_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = write_notebook(
        tmp_path / "trial.ipynb", PARAMETERS, OPEN.format(notebook="trial"), SLOW, "import time; time.sleep(99)"
    )
    jobs = jobs_of(str(notebook), grid={"seed": [1, 2, 3]})

    def interrupt():
        while not list(runs_folder.glob("*/*/metrics.jsonl")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        sweep(jobs, workers=2)
    assert not (runs_folder / "trial" / "seed=3").exists()


def test_the_job_of_a_dead_worker_goes_on_at_another(tmp_path, runs_folder, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="needs the extra `cluster`")
    monkeypatch.chdir(tmp_path)
    notebook = write_notebook(tmp_path / "trial.ipynb", PARAMETERS, OPEN.format(notebook="trial"), SLOW, STUMBLE)
    jobs = jobs_of(str(notebook), grid={"seed": [1, 2]})
    folder = runs_folder / "trial" / "seed=1"
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            workers = client.run(os.getpid).values()
        killed = []

        def kill():
            while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text()) < 60:
                time.sleep(0.05)
            killed.append(int((folder / ".execution.holder").read_text().split()[0]))
            os.kill(killed[0], signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()
        table = sweep(jobs, scheduler=cluster.scheduler_address)
    assert killed[0] in workers and table["state"].tolist() == ["done", "done"], table["error"].tolist()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert len({line["kernel"] for line in lines}) == 2  # the second went on where the first was


@pytest.mark.slow
def test_training_that_its_worker_s_death_cut_off_resumes_from_the_checkpoint(runs_folder):
    """Pre-training on a cluster of two workers: the weights are those of a run that nobody disturbed."""
    distributed = pytest.importorskip("distributed", reason="needs the extra `cluster`")
    parameters = {"steps": 12, "checkpoint_every": 2, "overrides": FEW | {"train.log_every": 1}}
    jobs = jobs_of("01_pretrain", parameters=parameters, jobs=[{"seed": 1}])
    folder = runs_folder / "01_pretrain" / "seed=1"
    killed, before = [], []

    def kill():
        while not (folder / "checkpoint" / "step-000004").exists():
            time.sleep(0.02)
        before.extend((folder / "metrics.jsonl").read_text().splitlines()[:4])
        killed.append(int((folder / ".execution.holder").read_text().split()[0]))
        os.kill(killed[0], signal.SIGKILL)

    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        threading.Thread(target=kill, daemon=True).start()
        table = sweep(jobs, scheduler=cluster.scheduler_address)
    assert killed and table["state"].tolist() == ["done"], table["error"].tolist()
    after = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(before) == 4 and after[:4] == before and len(after) == 12  # with their seconds: not trained again
    whole = run_notebook("01_pretrain", name="whole", parameters=jobs[0].parameters).parent
    one, other = (each / "checkpoint" / "model.safetensors" for each in (folder, whole))
    assert one.read_bytes() == other.read_bytes()
