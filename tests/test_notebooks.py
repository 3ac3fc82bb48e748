"""The notebooks: as stored, executed at their defaults and with other parameters, and compared by nbval."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from shutil import which

import nbformat
import papermill
import pytest
from conftest import FEW
from miniatures import lines, picture
from probes.tiny_models import llava_with_processor

from vpworkbench.jobs.notebooks import run_notebook
from vpworkbench.jobs.parameters import CHECKS, find_notebook, notebook_parameters
from vpworkbench.runs import open_run, run_folder
from vpworkbench.scenes.language import ATTRIBUTE_WORDS
from vpworkbench.settings import pretrain_settings
from vpworkbench.train.pretrain import prepare, pretrain

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
REFERENCE = Path(__file__).parent / "notebooks" / "reference.ipynb"
LEFT = {
    "00_tour": {"summary.json", "masks.html", "held-out.html", "flow.html", "nmi.html"},
    "09_visual_init": {"summary.json", "visual.safetensors", "losses.html"},
    "01_pretrain": {"summary.json", "model.safetensors", "losses.html", "held-out.html", "flow.html", "nmi.html"},
    "02_probe": {"summary.json", "probes.parquet", "means.csv", "flow-triangle.html"},
    "03_compare_models": {"summary.json", "table.csv", "probes.parquet"},
    "04_finetune": {"summary.json", "predictions-test.json", "scores.html", "scores-test.html", "answers.html"},
    "05_explore_masks": {"summary.json", "explorer.html", "masks.csv"},
    "06_runs": {"runs.csv", "curves.html"},
    "07_knock_out": {
        "summary.json",
        "effects.csv",
        "patch.csv",
        "effects.html",
        "live.html",
        "lens.html",
        "patch.html",
    },
    "08_families": {
        "calls.sh",
        "runs.csv",
        "budgets.csv",
        "table-5.csv",
        "flow.html",
        "nmi.html",
        "score.html",
        "table-5.html",
    },
    "10_study": {
        "runs.csv",
        "questions.csv",
        "arms.csv",
        "differences.csv",
        "correlations.csv",
        "difference-score.html",
        "difference-excess.html",
        "measures.html",
    },
}
"""What each notebook leaves in its run's folder."""
FIGURES = {
    "00_tour": 8,
    "09_visual_init": 2,
    "01_pretrain": 4,
    "02_probe": 5,
    "03_compare_models": 3,
    "04_finetune": 4,
    "05_explore_masks": 1,
    "06_runs": 1,
    "07_knock_out": 7,
    "08_families": 4,
    "10_study": 3,
}
"""How many each shows, at least."""


def test_there_are_as_many_as_have_a_check():
    assert {path.stem for path in NOTEBOOKS} == set(CHECKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs_and_with_explained_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        assert "  # " in line, f"{line}: a comment tells users what it is"
    for cell in code:
        most = 16 if cell is tagged[0] else 15
        assert len(cell.source.splitlines()) <= most and "def " not in cell.source and "import *" not in cell.source
        assert max(map(len, cell.source.splitlines()), default=0) <= 110
    help_names = set(papermill.inspect_notebook(str(path)))
    assert help_names == set(notebook_parameters(path))


@pytest.mark.parametrize("name", CHECKS)
def test_defaults_are_those_of_the_check(name):
    """The settings of a notebook's defaults and of a bare call are the same."""
    check, defaults = resolve_name(CHECKS[name]), notebook_parameters(find_notebook(name))
    accepted = inspect.signature(check).parameters
    assert check(**{key: value for key, value in defaults.items() if key in accepted}) == check()


def nbval(path: Path, *, strict: bool = False) -> subprocess.CompletedProcess[str]:
    """Every cell executed in a fresh kernel of this Python, in the notebook's folder; outputs compared if strict."""
    mode = "--nbval" if strict else "--nbval-lax"
    quiet = ["-q", "-p", "no:cacheprovider", "--rootdir", str(path.parent)]
    command = [sys.executable, "-m", "pytest", *quiet, mode, "--nbval-current-env", path.name]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True)


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def figures_in(executed: Path) -> int:
    outputs = [output for cell in nbformat.read(executed, as_version=4).cells for output in cell.get("outputs", [])]
    return sum("application/vnd.plotly.v1+json" in output.get("data", {}) for output in outputs)


TWICE = "03_compare_models"  # with two models below


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.stem == TWICE else path for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_every_cell_runs_at_its_defaults(path, tmp_path, monkeypatch):
    """And the notebook asserts what it claims."""
    monkeypatch.setenv("VPW_RUNS", str(tmp_path))
    before = files(path.parent)
    executed = run_notebook(path.stem)
    assert files(path.parent) == before
    assert {"config.json"} | LEFT[path.stem] <= {file.name for file in files(executed.parent)}
    assert figures_in(executed) >= FIGURES[path.stem] and executed.stat().st_size < 2e6


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nbval_runs_it_too(path, tmp_path, monkeypatch):
    monkeypatch.setenv("VPW_RUNS", str(tmp_path))
    done = nbval(path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", ["02_probe", "03_compare_models", "05_explore_masks", "07_knock_out"])
def test_a_folder_of_a_decoder_and_its_processor(notebook, tmp_path, monkeypatch):
    """As docs/your_model.md promises, for a tiny LLaVA with a chat template."""
    monkeypatch.setenv("VPW_RUNS", str(tmp_path / "runs"))
    for part in llava_with_processor(" ".join(sorted(ATTRIBUTE_WORDS - {"red", "ball"}))):
        part.save_pretrained(tmp_path / "model")
    model = "models" if notebook == "03_compare_models" else "checkpoint"
    few = {} if notebook == "05_explore_masks" else {"images": 4}
    folder = run_notebook(notebook, parameters={model: str(tmp_path / "model"), **few}).parent
    left = LEFT[notebook] - {"masks.csv", "patch.csv", "patch.html"}  # of masks and pairs for our models
    assert left <= {file.name for file in files(folder)}


def test_nbval_notices_a_cell_that_fails(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    nbformat.write(notebook, tmp_path / "fails.ipynb")
    assert nbval(tmp_path / "fails.ipynb").returncode == 1


def test_the_reference_is_reproduced():
    """Its stored outputs are compared strictly: numbers and representations of a small, seeded model."""
    done = nbval(REFERENCE, strict=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_reference_notices_every_number_that_changes(tmp_path):
    """One digit of each stored output is changed: each of these cells fails, and no other."""
    notebook = nbformat.read(REFERENCE, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    for output in outputs:
        place, key = (output, "text") if output.output_type == "stream" else (output.data, "text/plain")
        place[key], changes = re.subn(r"\d(?!.*\d)", lambda digit: str(9 - int(digit[0])), place[key], flags=re.DOTALL)
        assert changes == 1
    nbformat.write(notebook, tmp_path / "changed.ipynb")
    done = nbval(tmp_path / "changed.ipynb", strict=True)
    assert len(outputs) >= 4 and f"{len(outputs)} failed" in done.stdout, done.stdout[-3000:]
    assert "caused an exception" not in done.stdout


SHORT = {"steps": 2, "overrides": FEW}


@pytest.fixture(scope="session")  # a worker may come back to this module, where its run is then
def pretrained(scratch) -> Path:
    """A notebook executed by plain papermill into the folder of its run."""
    executed = run_folder("01_pretrain", "short") / "01_pretrain.ipynb"
    executed.parent.mkdir(parents=True)
    path, parameters = str(find_notebook("01_pretrain")), {"name": "short", **SHORT, "examples": 2}
    papermill.execute_notebook(path, str(executed), parameters, kernel_name="python3", progress_bar=False)
    return executed


def test_pretraining_writes_its_run_folder(pretrained):
    folder = run_folder("01_pretrain", "short")
    assert {"config.json", "metrics.jsonl", "summary.json", "checkpoint"} <= {path.name for path in folder.iterdir()}
    summary = json.loads((folder / "summary.json").read_text())
    assert {"itm_accuracy", "mlm_with_image", "mlm_other_image", "steps", "seed", "wall_s"} <= set(summary)
    assert summary["steps"] == 2 and figures_in(pretrained) >= FIGURES["01_pretrain"]


def test_papermill_vpw_and_python_train_the_same(pretrained, monkeypatch):
    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: pytest.fail("`vpw run` found another run"))
    run_notebook("01_pretrain", name="short", parameters={**SHORT, "examples": 2})
    settings = pretrain_settings(**SHORT)
    run = open_run("01_pretrain", settings, name="in Python")
    pretrain(run, prepare(settings), settings)
    folders = run.folder, run_folder("01_pretrain", "short")
    ours, theirs = ((folder / "checkpoint" / "model.safetensors").read_bytes() for folder in folders)
    assert ours == theirs


def test_comparison_of_two_models(pretrained):
    parameters = {"models": ["short", ""], "images": 8}
    executed = run_notebook("03_compare_models", name="tested", parameters=parameters)
    folder = executed.parent
    assert figures_in(executed) >= 4 and executed.stat().st_size < 2e6
    assert {"table.csv", "means.csv", "summary.json", "model-0", "model-1"} <= {path.name for path in folder.iterdir()}
    if which("chromium") or which("google-chrome"):
        assert {"flow.png", "flow.svg", "nmi.svg"} <= {path.name for path in (folder / "figures").iterdir()}


def test_runs_are_read_anew(pretrained):
    """The call is never complete: new runs are seen."""
    parameters = {"gallery": False, "where": "steps == 2"}
    executed = [run_notebook("06_runs", name="tested", parameters=parameters) for _ in range(2)][-1]
    assert figures_in(executed) == 1 and not (executed.parent / "summary.json").exists()
    assert "short" in (executed.parent / "runs.csv").read_text()
    assert "../../01_pretrain/short/01_pretrain.ipynb" in executed.read_text()


FEW = {"scenes.images": 80, "scenes.val": 20, "scenes.test": 8, "train.images": 8, "workers": 0, "answer_count": 2}


@pytest.mark.parametrize("task", ["retrieval", pytest.param("nlvr2", marks=pytest.mark.slow)])
def test_finetuning(scratch, task):
    executed = run_notebook(
        "04_finetune", name=f"notebook-{task}", parameters={"task": task, "steps": 2, "overrides": FEW}
    )
    folder = executed.parent
    assert figures_in(executed) == 4 and executed.stat().st_size < 2e6
    assert {"scores.html", "answers.html"} <= {path.name for path in (folder / "figures").iterdir()}
    assert (folder / "predictions-test.csv").stat().st_size > 0
    summary = json.loads((folder / "summary.json").read_text())
    others = ["chance", "frozen dual projection"] if task == "retrieval" else [
        "text only", "image only", "text x pooled features"]  # fmt: skip
    assert {*(f"baseline {name}" for name in others), "test", "steps", "seed"} <= set(summary)
    assert {f"baseline {name}" for name in others} <= set(summary["test"])


def test_finetuning_on_validation_too_is_scored_on_test(scratch):
    parameters = {"steps": 2, "overrides": {**FEW, "train_on_val": True}}
    folder = run_notebook("04_finetune", name="on-validation", parameters=parameters).parent
    summary = json.loads((folder / "summary.json").read_text())
    assert "vqa_score" in summary["test"] and not {"vqa_score", "baseline text only"} & set(summary)
    assert not (folder / "figures" / "scores.html").exists() and (folder / "figures" / "scores-test.html").exists()


def test_finetuning_where_the_answers_of_test_are_withheld(scratch, tmp_path):
    rows = []
    for number in range(24):
        picture(tmp_path / f"{number}.png", (10 * number, 0, 0))
        split = {22: "val", 23: "test"}.get(number, "train")
        label = "" if split == "test" else ("entailment", "neutral")[number % 2]
        rows.append({"image": f"{number}.png", "text": "is it red ?", "label": label, "split": split})
    data = str(lines(tmp_path / "mine.jsonl", *rows))
    overrides = {"train.images": 8, "workers": 0}
    parameters = {"task": "snli-ve", "steps": 2, "data": data, "overrides": overrides}
    folder = run_notebook("04_finetune", name="withheld", parameters=parameters).parent
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test"] == {} and {"baseline text only", "baseline image only", "steps"} <= set(summary)
    assert not (folder / "figures" / "scores-test.html").exists()
    assert (folder / "predictions-test.csv").exists()
