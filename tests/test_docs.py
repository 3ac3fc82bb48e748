"""`docs/paper_to_code.md`, `docs/systems.md` and the README name only what is there, and the paper is covered."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from functools import cache, reduce
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from pydantic import BaseModel

from vpworkbench.cli import app
from vpworkbench.jobs.parameters import check_parameters, find_notebook, notebook_parameters, parse_parameters
from vpworkbench.settings import CompareSettings, PretrainSettings, ProbeSettings, VisualInitSettings
from vpworkbench.tasks.settings import finetune_settings

REPOSITORY = Path(__file__).parents[1]
STATUSES = {"stated", "inferred", "ours"}
NOTHING = "–"


class Row(NamedTuple):
    """One line of one table."""

    paper: str
    says: str
    status: str
    keys: str
    functions: str
    tests: str


def table_rows(page: str) -> list[list[str]]:
    """Cells of the tables with six columns, headings too; a page's other tables have two."""
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    assert {len(line) for line in lines} == {2, 6}, "a table has a row of another length"
    return [[cell.strip() for cell in line] for line in lines if len(line) == 6]


def rows() -> list[Row]:
    return [Row(*line) for line in table_rows("paper_to_code.md") if line[2] not in ("status", "---")]


ROWS = rows()


def named(cell: str) -> list[str]:
    """The names in backticks, of which a cell must consist, or of a dash."""
    names = re.findall(r"`([^`]+)`", cell)
    assert cell == (", ".join(f"`{name}`" for name in names) or NOTHING), cell
    return names


def all_named(column: str) -> list[str]:
    return sorted({name for row in ROWS for name in named(getattr(row, column))})


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((REPOSITORY / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def leaves(settings: BaseModel, prefix: str = "") -> set[str]:
    found = set()
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {prefix + name}
    return found


def test_every_test_exists():
    names = all_named("tests")
    for name in names:
        file, _, function = name.partition("::")
        assert function in functions_of(file), name
    assert len(names) > 50


def test_every_function_exists():
    names = all_named("functions")
    for name in names:
        parts = name.split(".")
        places = [REPOSITORY.joinpath("vpworkbench", *parts[:depth]) for depth in range(1, len(parts) + 1)]
        depth = sum(place.is_dir() or place.with_suffix(".py").is_file() for place in places)
        module = importlib.import_module(".".join(["vpworkbench", *parts[:depth]]))
        assert parts[depth:], f"{name} is a module"
        assert reduce(getattr, parts[depth:], module) is not None, name
    assert len(names) > 50


def test_every_config_key_exists():
    kinds = (PretrainSettings, VisualInitSettings, ProbeSettings, CompareSettings)
    valid = set().union(*(leaves(kind()) for kind in kinds), leaves(finetune_settings(task="retrieval")))
    unknown = set(all_named("keys")) - valid
    assert not unknown


@pytest.mark.parametrize("kind, count", [("Eq.", 10), ("Fig.", 5), ("Table", 6)])
def test_the_paper_is_covered(kind, count):
    for number in range(1, count + 1):
        assert any(re.match(rf"{re.escape(kind)} {number}\b", row.paper) for row in ROWS), f"{kind} {number}"


def test_a_row_says_where_it_lives():
    assert {row.status for row in ROWS} == STATUSES
    for row in ROWS:
        assert named(row.functions), row
        assert named(row.keys) + named(row.tests), row


SYSTEMS = (
    "SOHO", "UNITER", "ViLT", "Pixel-BERT", "VisualBERT", "LXMERT", "ViLBERT", "VL-BERT", "Unified VLP", "Unicoder-VL",
    "BUTD", "MUTAN", "MAC", "MaxEnt", "CNN+RNN", "EVE", "e-SNLI-VE-2.0", "VSE++", "SCAN", "Text Only", "Image Only",
    "R50", "R101",
)  # fmt: skip
KINDS = {"trained", "probed", "baseline", "not available"}


class System(NamedTuple):
    """One line of the table of systems."""

    name: str
    where: str
    kind: str
    says: str
    command: str
    tests: str


def systems() -> list[System]:
    return [System(*line) for line in table_rows("systems.md") if line[0] not in ("system", "---")]


def test_every_system_of_the_paper_has_a_row():
    assert {system.name for system in systems()} == set(SYSTEMS)
    assert {system.kind for system in systems()} == KINDS


@pytest.mark.parametrize("system", systems(), ids=lambda system: f"{system.name}, {system.kind}")
def test_what_is_said_of_a_system_runs(system):
    """Its commands are what `vpw run` and `vpw regions` accept, its tests are there; what is not available says why."""
    commands, tests = named(system.command), named(system.tests)
    assert bool(commands) == bool(tests) == (system.kind != "not available") and len(system.says) > 40
    for name in tests:
        file, _, function = name.partition("::")
        assert function in functions_of(file), name
    for command in commands:
        program, verb, *arguments = shlex.split(command)
        if verb == "regions":
            assert typer.main.get_command(app).commands["regions"].make_context("regions", arguments).params["folder"]
            continue
        notebook, *words = arguments
        assert (program, verb) == ("vpw", "run") and words[::3] == ["-p"] * (len(words) // 3)
        defaults = notebook_parameters(find_notebook(notebook))
        given = parse_parameters(dict(zip(words[1::3], words[2::3], strict=True)), defaults)
        assert check_parameters(notebook, defaults, given) is not None


def test_the_readme_names_make_targets_that_are_there():
    readme = REPOSITORY / "README.md"
    if not readme.exists():
        pytest.skip("no README.md")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, flags=re.MULTILINE))
    text = readme.read_text(encoding="utf-8")
    code = re.findall(r"^```.*?^```", text, flags=re.MULTILINE | re.DOTALL) + re.findall(r"`[^`\n]+`", text)
    named_there = {target for part in code for target in re.findall(r"\bmake ([a-z][\w-]*)", part)}
    assert named_there <= targets


def test_what_visual_sides_were_taught_is_what_their_runs_say():
    text = (REPOSITORY / "docs" / "families.md").read_text(encoding="utf-8")
    row = r"^\| \[`(\w+)`\]\(\.\./(.+)/09_visual_init\.ipynb\) .* \| ([\d.]+)% \| ([\d.]+)% \|$"
    rows = re.findall(row, text, flags=re.MULTILINE)
    assert [row[0] for row in rows] == ["swin", "grid", "patch"]
    for _, folder, colours, shapes in rows:
        summary = json.loads((REPOSITORY / folder / "summary.json").read_text(encoding="utf-8"))
        told = [f"{summary[f'{name}_accuracy']:.1%}" for name in ("colour", "shape")]
        assert told == [f"{colours}%", f"{shapes}%"], folder
