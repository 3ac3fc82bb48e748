"""A task is a value: the page about a new one works as printed, and no other file asks for a task's name."""

from __future__ import annotations

import ast
import csv
import itertools
import re
from pathlib import Path

import pytest

from vpworkbench.runs import open_run
from vpworkbench.studies.baselines import baselines
from vpworkbench.subjects import load_task
from vpworkbench.tasks import TASKS
from vpworkbench.tasks.settings import finetune_settings
from vpworkbench.train.finetune import evaluate_split, finetune, prepare_task

ROOT = Path(__file__).parents[2]


@pytest.fixture
def size_task():
    """The task of docs/new_task.md, for one test."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs/new_task.md").read_text(), re.DOTALL)[1]
    exec(compile(block, "docs/new_task.md", "exec"), {})
    yield TASKS["size"]
    del TASKS["size"]


def test_the_page_about_a_new_task_works(size_task, scenes, scenes_folder, tmp_path, runs_folder):
    sizes = itertools.cycle(("small", "medium", "large"))
    with open(tmp_path / "sizes.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "text", "label", "split"))
        table.writerows((one.image.name, one.captions[0], next(sizes), one.split) for one in scenes)
    images = {"images": [str(scenes[0].image.folder)], "train.images": 8, "train.log_every": 1, "workers": 0}
    settings = finetune_settings(task="size", data=str(tmp_path / "sizes.csv"), steps=2, overrides=images)
    run, prepared = open_run("04_finetune", settings, name="sizes"), prepare_task(settings)
    assert finetune(run, prepared, settings) == 2
    result, val = evaluate_split(run, prepared, settings, "val"), prepared.splits["val"]
    closeness = {0: 1.0, 1: 0.5, 2: 0.0}
    order = size_task.labels(val, settings)
    steps = [abs(order.index(one.label) - order.index(result.predicted[one.id])) for one in val]
    assert result.scores.tolist() == [closeness[step] for step in steps] and len(val) == 20
    assert {"closeness", "closeness_low", "closeness_high"} == set(result.summary(val))
    assert set(load_task("sizes").predict(val[0].images, "how large?")) == set(order)
    assert baselines(prepared, settings, most=20)["val"]["most frequent"].scores.shape == (20,)


def names_asked_for(file: Path) -> list[str]:
    """Names of tasks that a file compares something with."""
    compared = (
        node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Compare | ast.MatchValue)
    )
    constants = (inner for node in compared for inner in ast.walk(node) if isinstance(inner, ast.Constant))
    return [one.value for one in constants if one.value in tuple(TASKS)]


def test_nothing_asks_for_the_name_of_a_task(tmp_path):
    (tmp_path / "asks.py").write_text('if settings.task in ("vqa", "other") or task.name == "nlvr2":\n    pass\n')
    assert names_asked_for(tmp_path / "asks.py") == ["vqa", "nlvr2"]
    files = sorted((ROOT / "vpworkbench").rglob("*.py"))
    asking = {str(file.relative_to(ROOT)): names for file in files if (names := names_asked_for(file))}
    assert len(files) > 60 and not asking
