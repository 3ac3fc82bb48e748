"""Notebooks: parameters read and checked before anything starts; run, failed and resumed in their run folders."""

import json
from pathlib import Path

import papermill
import pytest
from conftest import SmallSettings
from small_notebooks import OPEN, PARAMETERS, STUMBLE, TRAIN, write_notebook

from vpworkbench.errors import RunError, SettingsError
from vpworkbench.jobs import notebooks as execution
from vpworkbench.jobs.notebooks import run_notebook
from vpworkbench.jobs.parameters import CHECKS, check_parameters, find_notebook, notebook_parameters, parse_parameters
from vpworkbench.settings import Settings

pytestmark = pytest.mark.usefixtures("runs_folder")

# ------------------------------------------------------------------------------------------------- parameters

DEFAULTS = {"name": "", "data": "scenes", "steps": 200, "rate": 0.1, "widget": True, "ks": [1, 5], "overrides": {}}


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
    monkeypatch.setitem(CHECKS, "small", f"{__name__}:small_settings")
    return {"name": "", "seed": 0, "rate": 0.1, "words": "a", "shown": 3}


def test_all_faults_are_reported_at_once(checked_notebook):
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
    assert notebook_parameters(path) == {"data": "scenes", "steps": -2, "ks": [1, 2], "overrides": {}}
    epochs = notebook_parameters(write_notebook(tmp_path / "e.ipynb", "epochs: float = 0"))
    assert parse_parameters({"epochs": "0.5"}, epochs) == {"epochs": 0.5}
    with pytest.raises(RunError, match="plain literals"):
        notebook_parameters(write_notebook(tmp_path / "b.ipynb", "steps = 2 * 3"))
    (tmp_path / "c.ipynb").write_text("no json")
    with pytest.raises(RunError, match="c.ipynb: not a notebook"):
        notebook_parameters(tmp_path / "c.ipynb")


def test_a_misspelt_notebook_is_named_with_the_nearest(tmp_path, monkeypatch):
    write_notebook(tmp_path / "notebooks" / "01_pretrain.ipynb", "")
    monkeypatch.chdir(tmp_path)
    for name in ("01_pretrain", "01_pretrain.ipynb", "notebooks/01_pretrain.ipynb"):
        assert find_notebook(name) == tmp_path / "notebooks" / "01_pretrain.ipynb"
    with pytest.raises(FileNotFoundError, match="did you mean '01_pretrain'"):
        find_notebook("01_pretain")


# ----------------------------------------------------------------------------------------- executed notebooks


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
        "the same call resumes from the last checkpoint",
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


FIGURE = """
(run.folder / "figure.txt").write_text("{figure}")
"""


@pytest.fixture
def tagged(tmp_path):
    """A notebook whose cells have tags, and a way to change its figure."""

    def write(figure="first"):
        cells = OPEN.format(notebook="trial"), TRAIN, STUMBLE, FIGURE.format(figure=figure)
        return str(
            write_notebook(tmp_path / "trial.ipynb", PARAMETERS, *cells, tags=("check", "compute", "sum", "show"))
        )

    return write


def test_a_complete_run_is_executed_again_for_a_changed_figure(tagged, runs_folder):
    folder = run_notebook(tagged(), name="a", parameters={"seed": 4}).parent
    assert (folder / "figure.txt").read_text() == "first"
    run_notebook(tagged("second"), name="a", parameters={"seed": 4})
    assert (folder / "figure.txt").read_text() == "first"  # complete: nothing is done
    executed = run_notebook(tagged("second"), name="a", again=True)  # with the seed that it had
    assert executed.parent == folder and (folder / "figure.txt").read_text() == "second"
    record = json.loads(executed.read_text())["metadata"]["papermill"]
    assert record["parameters"] == {"seed": 4, "name": "a"} and not record["exception"]
    with pytest.raises(SettingsError, match="trial/b is no complete run; run it without --again"):
        run_notebook(tagged(), name="b", again=True)
    assert not (runs_folder / "trial" / "b").exists()


def test_a_run_stops_after_the_tagged_cell_and_the_plain_call_completes_it(tagged, runs_folder):
    with pytest.raises(
        SettingsError, match=r"--until compte: .* did you mean 'compute'\? \(tags: parameters, check, comp"
    ):
        run_notebook(tagged(), name="a", until="compte")
    assert not runs_folder.exists()
    executed = run_notebook(tagged(), name="a", until="compute")
    folder = executed.parent
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1 and not (folder / "summary.json").exists()
    assert "figure.txt" not in executed.read_text()
    run_notebook(tagged(), name="a", until="sum")  # the summary is there, but the figure is not
    assert (folder / "summary.json").exists() and not (folder / "figure.txt").exists()
    run_notebook(tagged(), name="a")
    assert (folder / "figure.txt").exists() and "figure.txt" in executed.read_text()


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
    assert not execution._is_finished(run.folder, executed)
    run.write_summary(steps=1)
    assert execution._is_finished(run.folder, executed) == finished


def test_plain_papermill_gives_the_same_run(notebook, tmp_path, monkeypatch):
    path = write_notebook(tmp_path / "small.ipynb", PARAMETERS, OPEN.format(notebook="small"), TRAIN, STUMBLE)
    monkeypatch.setitem(CHECKS, "small", f"{__name__}:seed_settings")
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


def test_wrong_parameters_start_nothing(notebook, runs_folder):
    with pytest.raises(SettingsError, match="stumbel: trial has no such parameter; did you mean 'stumble'"):
        run_notebook(str(notebook), name="a", parameters={"stumbel": "x", "seed": 1})
    assert not runs_folder.exists()


OURS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_our_notebooks_parameters_pass_their_check_and_papermill_sees_them_all(path):
    defaults = notebook_parameters(path)
    assert defaults and defaults.keys() == papermill.inspect_notebook(str(path)).keys()
    assert "name" in defaults and path.stem in CHECKS
    assert isinstance(check_parameters(path.stem, defaults, {}), Settings)
