"""Run folders hold what they promise, and notebooks run in them, fail in them and resume in them."""

import errno
import json
import os
import re
import time
from pathlib import Path

import nbformat
import papermill
import plotly.graph_objects
import pytest
import torch
from pydantic import Field

from vpworkbench import runs
from vpworkbench.config import Settings, SettingsError
from vpworkbench.runs import RunError, check_parameters, list_runs, open_run, parse_parameters, run_notebook


class MaskSettings(Settings):
    budget: int = Field(7, ge=1)


class SmallSettings(Settings):
    seed: int = 0
    rate: float = 0.1
    words: tuple[str, ...] = ("a", "b")
    mask: MaskSettings = MaskSettings()


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv("VPW_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(Path(runs.__file__).parents[1]))  # kernels, where not installed
    return tmp_path / "runs"


@pytest.fixture
def run():
    return open_run("01_pretrain", SmallSettings(), name="a")


# ------------------------------------------------------------------------------------------------ run folders


def test_config_is_written_first_and_says_what_made_the_run(run, scratch):
    assert run.folder == scratch / "01_pretrain" / "a"
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
    assert again.is_complete and again.summary() == {"loss": 1.5}
    assert (run.folder / "config.json").read_bytes() == before


def test_other_settings_are_refused_and_each_is_named(run):
    other = SmallSettings(seed=3, mask=MaskSettings(budget=9))
    with pytest.raises(SettingsError) as refusal:
        open_run("01_pretrain", other, name="a")
    lines = str(refusal.value).splitlines()
    assert lines[1:3] == ["  mask.budget: 7 there, 9 now", "  seed: 0 there, 3 now"]
    assert "another name" in lines[-1] and len(lines) == 4


def test_many_other_settings_stay_within_twelve_lines(run):
    config = run.folder / "config.json"
    config.write_text(json.dumps({"settings": {f"old_{number}": number for number in range(30)}}))
    with pytest.raises(SettingsError, match="and 26 more") as refusal:
        open_run("01_pretrain", SmallSettings(), name="a")
    assert len(str(refusal.value).splitlines()) <= 12


@pytest.mark.parametrize("content", ["", '{"settings": {', "[]"])
def test_a_truncated_config_is_named(run, content):
    (run.folder / "config.json").write_text(content)
    with pytest.raises(RunError, match="config.json.*delete the run's folder"):
        open_run("01_pretrain", SmallSettings(), name="a")


BAD_NAMES = ["a/b", "..", "../a", ".hidden", "  ", " a", "a..b", "a\\b", "a\n", "x" * 101, "-p", "{a}"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_leave_the_folder_are_refused(name, scratch):
    with pytest.raises(SettingsError, match="cannot name a folder"):
        open_run("01_pretrain", SmallSettings(), name=name)
    assert not scratch.exists()


def test_the_gallery_is_no_notebook():
    with pytest.raises(SettingsError, match="gallery"):
        open_run("gallery", SmallSettings())


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
    assert not run.is_complete and [path.name for path in run.folder.iterdir()] == ["config.json"]
    with pytest.raises(RunError, match="not complete"):
        run.summary()


def test_progress_is_written_once_a_second_and_at_the_end(run, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    file = run.folder / "progress.json"
    run.progress("steps", 50, 100)  # resumed at 50
    assert json.loads(file.read_text()) == {"what": "steps", "done": 50, "total": 100, "left_s": None}
    clock[0] += 0.5
    run.progress("steps", 55, 100)
    assert json.loads(file.read_text())["done"] == 50
    clock[0] += 1.5
    run.progress("steps", 60, 100)
    assert json.loads(file.read_text())["left_s"] == pytest.approx(8)  # 10 in 2 s, 40 to go
    run.progress("steps", 100, 100)
    assert json.loads(file.read_text())["left_s"] == 0
    run.progress("figures", 0, 2)
    assert json.loads(file.read_text())["what"] == "figures"


def test_figures_share_one_script_and_need_no_network(run):
    figure = plotly.graph_objects.Figure(plotly.graph_objects.Scatter(y=[1, 2]))
    pages = [run.save_figure(name, figure) for name in ("loss", "flow")]
    assert sorted(path.name for path in (run.folder / "figures").iterdir()) == [
        "flow.html", "loss.html", "plotly.min.js",
    ]  # fmt: skip
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.findall('<script[^>]*src="([^"]+)"', text) == ["plotly.min.js"]
    with pytest.raises(SettingsError):
        run.save_figure("../loss", figure)


def test_list_runs_reads_summaries_and_skips_the_gallery(run, scratch):
    run.write_summary(steps=10, flow={"first": 0.4})
    open_run("02_probe", SmallSettings(seed=5), name="b")
    spoilt = open_run("02_probe", SmallSettings(), name="c")
    (spoilt.folder / "config.json").write_text("{")
    (scratch / "gallery" / "example").mkdir(parents=True)
    (scratch / "gallery" / "example" / "config.json").write_text("{}")
    table = list_runs()
    assert table["name"].tolist() == ["a", "b", "c"] and table["complete"].tolist() == [True, False, False]
    assert table["seed"].tolist()[:2] == [0, 5] and table["flow.first"][0] == 0.4
    assert "config.json" in table["fault"][2]
    assert list_runs(scratch / "nowhere").empty


def test_runs_lie_in_the_nearest_repository_unless_told(tmp_path, monkeypatch):
    (tmp_path / "mine" / "notebooks").mkdir(parents=True)
    (tmp_path / "mine" / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "mine" / "deep")
    assert runs.runs_root() == tmp_path / "runs"
    monkeypatch.delenv("VPW_RUNS")
    assert runs.runs_root() == tmp_path / "mine" / "papermill_runs"
    monkeypatch.setattr(runs, "_repositories", lambda: iter(()))
    with pytest.raises(FileNotFoundError, match="VPW_RUNS"):
        runs.runs_root()


# ------------------------------------------------------------------------------------------------- parameters

DEFAULTS = {
    "name": "", "data": "scenes", "steps": 200, "rate": 0.1, "widget": True, "ks": [1, 5], "overrides": {},
}  # fmt: skip


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("name", "007", "007"),
        ("data", "scenes", "scenes"),
        ("data", '["scenes", "x"]', ["scenes", "x"]),
        ("data", "[draft] set", "[draft] set"),
        ("steps", "-3", -3),
        ("rate", "1e-3", 1e-3),
        ("rate", "2", 2.0),
        ("widget", "False", False),
        ("widget", "true", True),
        ("ks", "[1, 10]", [1, 10]),
        ("overrides", '{"mask.budget": 14}', {"mask.budget": 14}),
    ],
)
def test_words_become_values_of_the_default_s_type(key, text, value):
    parsed = parse_parameters({key: text}, DEFAULTS)[key]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "key, text, wanted",
    [
        ("steps", "1e1", "a whole number"),
        ("steps", "10.0", "a whole number"),
        ("steps", "true", "a whole number"),
        ("rate", "fast", "a number"),
        ("widget", "1", "true or false"),
        ("ks", "1,10", "a JSON list"),
        ("overrides", "mask.budget=14", "a JSON dict"),
        ("data", '["scenes"]', "a text"),
    ],
)
def test_ill_typed_values_are_refused(key, text, wanted):
    with pytest.raises(SettingsError, match=rf"^{key}: must be {wanted}"):
        check_parameters("no_check", DEFAULTS, parse_parameters({key: text}, DEFAULTS))


def small_settings(*, seed: int = 0, rate: float = 0.1, words: str | list[str] = "a") -> SmallSettings:
    """The check of a notebook of these tests."""
    if rate > 1:
        raise SettingsError("rate: must be at most 1")
    return SmallSettings(seed=seed, rate=rate, words=(words,) if isinstance(words, str) else tuple(words))


@pytest.fixture
def checked_notebook(monkeypatch):
    monkeypatch.setitem(runs.CHECKS, "small", f"{__name__}:small_settings")
    return {"name": "", "seed": 0, "rate": 0.1, "words": "a", "shown": 3}


def test_all_faults_are_told_at_once(checked_notebook):
    given = {"sead": 1, "seed": "1e1", "rate": 2.0, "words": [1]}
    with pytest.raises(SettingsError) as refusal:
        check_parameters("small", checked_notebook, given)
    lines = str(refusal.value).splitlines()
    assert lines[0] == "sead: small has no such parameter; did you mean 'seed'?"
    assert lines[1] == "seed: must be a whole number, like 0 (given: '1e1')"
    assert any(line.startswith("words") for line in lines[2:])
    with pytest.raises(SettingsError, match="rate: must be at most 1"):
        check_parameters("small", checked_notebook, {"rate": 2.0})


def test_the_check_gets_the_notebook_s_defaults_and_the_given_values(checked_notebook):
    settings = check_parameters("small", checked_notebook | {"rate": 0.5}, {"words": ["x", "y"], "shown": 4})
    assert settings == SmallSettings(rate=0.5, words=("x", "y"))


def test_parameters_are_read_from_the_tagged_cell(tmp_path):
    source = 'data: str | list = "scenes"  # a == b\nsteps: int = -2\n\nks = [1,\n  2]\noverrides: dict = {}'
    path = write_notebook(tmp_path / "a.ipynb", source)
    assert runs.notebook_parameters(path) == {"data": "scenes", "steps": -2, "ks": [1, 2], "overrides": {}}
    epochs = runs.notebook_parameters(write_notebook(tmp_path / "e.ipynb", "epochs: float = 0"))
    assert parse_parameters({"epochs": "0.5"}, epochs) == {"epochs": 0.5}
    with pytest.raises(RunError, match="plain literals"):
        runs.notebook_parameters(write_notebook(tmp_path / "b.ipynb", "steps = 2 * 3"))
    (tmp_path / "c.ipynb").write_text("no json")
    with pytest.raises(RunError, match="c.ipynb: not a notebook"):
        runs.notebook_parameters(tmp_path / "c.ipynb")


def test_a_misspelt_notebook_is_named_with_the_nearest(tmp_path, monkeypatch):
    write_notebook(tmp_path / "notebooks" / "01_pretrain.ipynb", "")
    monkeypatch.chdir(tmp_path)
    for name in ("01_pretrain", "01_pretrain.ipynb", "notebooks/01_pretrain.ipynb"):
        assert runs.find_notebook(name) == tmp_path / "notebooks" / "01_pretrain.ipynb"
    with pytest.raises(FileNotFoundError, match="did you mean '01_pretrain'"):
        runs.find_notebook("01_pretain")


# ----------------------------------------------------------------------------------------- executed notebooks

PARAMETERS = """
name: str = ""
seed: int = 0  # any
stumble: str = ""  # while this file exists, the last cell fails
"""
OPEN = """
from pathlib import Path
from vpworkbench.config import Settings
from vpworkbench.runs import open_run
class Small(Settings):
    seed: int = 0
run = open_run("{notebook}", Small(seed=seed), name=name)
"""
TRAIN = """
run.progress("steps", 2, 2)
run.log(1 + len(run.metrics()), loss=0.5)
"""
STUMBLE = """
if stumble:
    assert not Path(stumble).exists(), "too early"
run.write_summary(seed=seed, lines=len(run.metrics()))
"""


def write_notebook(path, parameters, *cells):
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in (parameters, *cells)]
    cells[0].metadata["tags"] = ["parameters"]
    path.parent.mkdir(exist_ok=True)
    metadata = {"language_info": {"name": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.fixture
def notebook(tmp_path):
    path = tmp_path / "trial.ipynb"
    return write_notebook(path, PARAMETERS, OPEN.format(notebook="trial"), TRAIN, STUMBLE)


def test_a_failed_run_says_where_and_the_same_call_resumes_it(notebook, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="vpworkbench")
    monkeypatch.chdir(tmp_path)
    stone = tmp_path / "stone"
    stone.touch()
    call = {"name": "a", "parameters": {"seed": 4, "stumble": "./stone"}}
    with pytest.raises(RunError) as failure:
        run_notebook(str(notebook), **call)
    folder = tmp_path / "runs" / "trial" / "a"
    assert str(failure.value).splitlines() == [
        "trial/a failed in cell In [5]: AssertionError",
        "too early",
        f"executed notebook: {folder / 'trial.ipynb'}",
        "the same call runs it again, from its last checkpoint",
    ]
    record = json.loads((folder / "trial.ipynb").read_text())["metadata"]["papermill"]
    assert record["exception"] is True and not (folder / "summary.json").exists()
    assert record["parameters"] == {"seed": 4, "stumble": "./stone", "name": "a"}

    stone.unlink()
    executed = run_notebook(str(notebook), **call)
    assert executed == folder / "trial.ipynb"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == {"seed": 4, "lines": 2}  # the first try's line stayed
    assert not (folder / "progress.json").exists()

    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))
    assert run_notebook(str(notebook), **call) == executed
    assert "trial/a is complete, nothing to do" in caplog.text


@pytest.mark.parametrize(
    "record, finished",
    [
        (None, True),  # plain papermill, its notebook elsewhere
        ({"end_time": "12:00", "exception": None}, True),
        ({"end_time": "12:00", "exception": True}, False),  # a cell after the summary failed
        ({"end_time": None, "exception": None}, False),  # killed after the summary
    ],
)
def test_a_complete_run_is_executed_again_only_if_its_notebook_broke_off(run, record, finished):
    executed = run.folder / "01_pretrain.ipynb"
    if record:
        executed.write_text(json.dumps({"metadata": {"papermill": record}}))
    assert not runs._is_finished(run.folder, executed)
    run.write_summary(steps=1)
    assert runs._is_finished(run.folder, executed) == finished


def test_plain_papermill_gives_the_same_run(notebook, tmp_path, monkeypatch):
    path = write_notebook(tmp_path / "small.ipynb", PARAMETERS, OPEN.format(notebook="small"), TRAIN, STUMBLE)
    monkeypatch.setitem(runs.CHECKS, "small", f"{__name__}:seed_settings")
    papermill.execute_notebook(
        str(path), str(tmp_path / "out.ipynb"), {"seed": 3}, kernel_name="python3", progress_bar=False
    )
    (plain,) = (tmp_path / "runs" / "small").iterdir()
    assert run_notebook(str(path), parameters={"seed": 3}).parent == plain  # found complete, by its settings
    executed = run_notebook(str(path), parameters={"seed": 3, "name": "b"})
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (plain, executed.parent))
    assert first == second


class SeedSettings(Settings):
    seed: int = 0


def seed_settings(*, seed: int = 0) -> SeedSettings:
    """The check of `small.ipynb` above."""
    return SeedSettings(seed=seed)


def test_wrong_parameters_start_nothing(notebook, scratch):
    with pytest.raises(SettingsError, match="stumbel: trial has no such parameter; did you mean 'stumble'"):
        run_notebook(str(notebook), name="a", parameters={"stumbel": "x", "seed": 1})
    assert not scratch.exists()


OURS = sorted((Path(runs.__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_our_notebooks_parameters_pass_their_check_and_papermill_sees_them_all(path):
    defaults = runs.notebook_parameters(path)
    assert defaults and defaults.keys() == papermill.inspect_notebook(str(path)).keys()
    assert "name" in defaults and path.stem in runs.CHECKS
    assert isinstance(check_parameters(path.stem, defaults, {}), Settings)
