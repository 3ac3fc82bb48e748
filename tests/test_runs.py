"""Run folders hold what they promise, and notebooks run in them, fail in them and resume in them."""

import errno
import json
import os
import re
import time

import plotly.graph_objects
import pytest
import torch
from conftest import SmallMask, SmallSettings

from vpworkbench import runs
from vpworkbench.errors import RunError, SettingsError
from vpworkbench.runs import open_run

pytestmark = pytest.mark.usefixtures("runs_folder")

# ------------------------------------------------------------------------------------------------ run folders


def test_config_is_written_first_and_says_what_made_the_run(run, runs_folder):
    assert run.folder == runs_folder / "01_pretrain" / "a"
    assert [path.name for path in run.folder.iterdir()] == ["config.json"]
    config = json.loads((run.folder / "config.json").read_text())
    assert config["settings"] == {"seed": 0, "rate": 0.1, "words": ["a", "b"], "mask": {"budget": 7}}
    assert config["notebook"] == "01_pretrain" and config["seed"] == 0 and config["created"]
    assert config["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(config["versions"]) >= {"python", "torch", "transformers", "timm", "numpy", "vpworkbench"}
    assert config["git"] is None or re.fullmatch("[0-9a-f]{40}", config["git"]["revision"])


def test_without_a_name_the_settings_name_the_run():
    names = [open_run("01_pretrain", SmallSettings(seed=seed)).folder.name for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert all(re.fullmatch("[0-9a-f]{10}", name) for name in names)


def test_equal_settings_open_the_same_run_again_and_leave_its_config(run):
    before = (run.folder / "config.json").read_bytes()
    run.write_summary(loss=1.5)
    again = open_run("01_pretrain", SmallSettings(), name="a")
    assert again.summary() == {"loss": 1.5}
    assert (run.folder / "config.json").read_bytes() == before


def test_other_settings_are_refused_and_each_is_named(run):
    other = SmallSettings(seed=3, mask=SmallMask(budget=9))
    with pytest.raises(SettingsError) as refusal:
        open_run("01_pretrain", other, name="a")
    lines = str(refusal.value).splitlines()
    assert lines[1:] == ["  mask.budget: 7 there, 9 now", "  seed: 0 there, 3 now"]
    assert "another name" in lines[0]


@pytest.mark.parametrize("content", ["", '{"settings": {', "[]"])
def test_a_truncated_config_is_named(run, content):
    (run.folder / "config.json").write_text(content)
    with pytest.raises(RunError, match="config.json.*delete the run's folder"):
        open_run("01_pretrain", SmallSettings(), name="a")


BAD_NAMES = ["a/b", "..", "../a", ".hidden", "  ", " a", "a..b", "a\\b", "a\n", "x" * 101, "-p", "{a}"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_leave_the_folder_are_refused(name, runs_folder):
    with pytest.raises(SettingsError, match="cannot name a folder"):
        open_run("01_pretrain", SmallSettings(), name=name)
    assert not runs_folder.exists()


def test_metrics_come_back_as_a_table(run):
    assert run.metrics().empty
    run.log(20, loss=torch.tensor(1.5), pairs=64)
    run.log(40, loss=float("nan"), itm=0.5)
    table = run.metrics()
    assert table["step"].tolist() == [20, 40] and table["loss"][0] == 1.5 and table["itm"][1] == 0.5
    assert table.isna().sum().to_dict() == {"step": 0, "loss": 1, "pairs": 1, "itm": 1}
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # nan is not JSON
    with pytest.raises(TypeError, match="number"):
        run.log(60, loss="low")


def test_after_truncation_a_killed_run_writes_what_an_undisturbed_one_writes(run):
    undisturbed = open_run("01_pretrain", SmallSettings(), name="b")
    for step in (20, 40, 60):
        undisturbed.log(step, loss=1 / step)
        run.log(step, loss=1 / step if step <= 40 else -1.0)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 80, "lo')
    assert run.metrics()["step"].tolist() == [20, 40, 60]
    run.truncate_metrics(40)
    run.log(60, loss=1 / 60)
    files = [(each.folder / "metrics.jsonl").read_bytes() for each in (run, undisturbed)]
    assert files[0] == files[1]


def test_a_spoilt_line_of_metrics_is_named(run):
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(RunError, match="line 2"):
        run.metrics()


def test_a_full_disk_leaves_no_half_summary(run, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run.write_summary(loss=1.0)
    assert [path.name for path in run.folder.iterdir()] == ["config.json"]
    with pytest.raises(RunError, match="not complete"):
        run.summary()


def test_progress_is_written_once_a_second_and_at_the_end(run, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    file = run.folder / "progress.json"
    run.progress("steps", 50, 100)  # resumed at 50
    assert json.loads(file.read_text()) == {"what": "steps", "done": 50, "total": 100}
    clock[0] += 0.5
    run.progress("steps", 55, 100)
    assert json.loads(file.read_text())["done"] == 50
    clock[0] += 1.5
    run.progress("steps", 60, 100)
    assert json.loads(file.read_text())["done"] == 60
    run.progress("steps", 100, 100)
    assert json.loads(file.read_text())["done"] == 100
    run.progress("figures", 0, 2)
    assert json.loads(file.read_text())["what"] == "figures"


def test_figures_share_one_script_and_need_no_network(run):
    figure = plotly.graph_objects.Figure(plotly.graph_objects.Scatter(y=[1, 2]))
    pages = [run.show(name, figure) and run.page(name) for name in ("loss", "flow")]
    files = sorted(path.name for path in (run.folder / "figures").iterdir())
    assert files == ["flow.html", "loss.html", "plotly.min.js"]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.findall('<script[^>]*src="([^"]+)"', text) == ["plotly.min.js"]
    with pytest.raises(SettingsError):
        run.show("../loss", figure)


def test_runs_lie_in_the_nearest_repository_unless_told(tmp_path, monkeypatch):
    (tmp_path / "mine" / "notebooks").mkdir(parents=True)
    (tmp_path / "mine" / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "mine" / "deep")
    assert runs.runs_root() == tmp_path / "runs"
    monkeypatch.delenv("VPW_RUNS")
    assert runs.runs_root() == tmp_path / "mine" / "papermill_runs"
    monkeypatch.setattr(runs, "repositories", lambda: iter(()))
    with pytest.raises(FileNotFoundError, match="VPW_RUNS"):
        runs.runs_root()
