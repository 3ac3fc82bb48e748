"""README and docs name only what exists: links, commands, settings, functions and tests; their examples run."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from functools import cache, reduce
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import typer
from pydantic import BaseModel

import vpworkbench as vpw
from benchmarks import photographs, recipe, study
from vpworkbench.cli import app
from vpworkbench.jobs.parameters import check_parameters, find_notebook, notebook_parameters, parse_parameters
from vpworkbench.settings import CompareSettings, PretrainSettings, ProbeSettings, VisualInitSettings
from vpworkbench.studies.study import open_study
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


def table_rows(page: str, columns: int = 6) -> list[list[str]]:
    """Cells of the tables with this number of columns, headings too; a page's other tables have two."""
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    assert {len(line) for line in lines} <= {2, columns}, "a table has a row of another length"
    return [[cell.strip() for cell in line] for line in lines if len(line) == columns]


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


def assert_tests_exist(names: list[str]) -> None:
    for name in names:
        file, _, function = name.partition("::")
        assert function in functions_of(file), name


def test_every_test_exists():
    names = all_named("tests")
    assert_tests_exist(names)
    assert len(names) > 50


def test_every_format_has_a_test():
    formats = table_rows("formats.md", columns=6)[2:]
    assert len(formats) >= 20 and all(named(tests) for *_, tests in formats)
    assert_tests_exist([name for *_, tests in formats for name in named(tests)])


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


KINDS_OF_SETTINGS = (PretrainSettings, VisualInitSettings, ProbeSettings, CompareSettings)
KEYS = set().union(*(leaves(kind()) for kind in KINDS_OF_SETTINGS), leaves(finetune_settings(task="retrieval")))


def test_every_config_key_exists():
    assert set(all_named("keys")) <= KEYS


@pytest.mark.parametrize("kind, count", [("Eq.", 10), ("Fig.", 5), ("Table", 6)])
def test_the_paper_is_covered(kind, count):
    for number in range(1, count + 1):
        assert any(re.match(rf"{re.escape(kind)} {number}\b", row.paper) for row in ROWS), f"{kind} {number}"


def test_a_row_says_where_it_lives():
    assert {row.status for row in ROWS} == STATUSES
    for row in ROWS:
        assert named(row.functions), row
        assert named(row.keys) + named(row.tests), row


SYSTEMS = {
    *("SOHO", "UNITER", "ViLT", "Pixel-BERT", "VisualBERT", "LXMERT", "ViLBERT", "VL-BERT", "Unified VLP"),
    *("Unicoder-VL", "BUTD", "MUTAN", "MAC", "MaxEnt", "CNN+RNN", "EVE", "e-SNLI-VE-2.0", "VSE++", "SCAN"),
    *("Text Only", "Image Only", "R50", "R101"),
}
KINDS = {"trained", "probed", "baseline"}


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
    assert {system.name for system in systems()} == SYSTEMS
    assert {system.kind for system in systems()} == KINDS


@pytest.mark.parametrize("system", systems(), ids=lambda system: f"{system.name}, {system.kind}")
def test_what_is_said_of_a_system_runs(system, tmp_path, monkeypatch):
    """Its commands are what `vpw run` and `vpw regions` accept, and its tests are there."""
    commands, tests = named(system.command), named(system.tests)
    assert commands and tests and len(system.says) > 40
    monkeypatch.chdir(tmp_path)
    assert_tests_exist(tests)
    for command in commands:
        program, verb, *arguments = shlex.split(command)
        if verb == "regions":
            given = typer.main.get_command(app).commands["regions"].make_context("regions", arguments).params
            given["folder"].mkdir()
            for file, content in (("config", {"settings": {"width": given["width"]}}), ("summary", {"classes": 9})):
                (given["folder"] / f"{file}.json").write_text(json.dumps(content))
            continue
        notebook, *words = arguments
        assert (program, verb) == ("vpw", "run") and words[::3] == ["-p"] * (len(words) // 3)
        defaults = notebook_parameters(find_notebook(notebook))
        given = parse_parameters(dict(zip(words[1::3], words[2::3], strict=True)), defaults)
        assert check_parameters(notebook, defaults, given) is not None


# --------------------------------------------------------------------------------------- all pages, and their code

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def code(page: Path) -> list[str]:
    """Lines of code blocks, and code in sentences."""
    text = page.read_text(encoding="utf-8")
    inline = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line for block in blocks(page, r"\w*") for line in block.splitlines()]
    return lines + [" ".join(words.split()) for words in inline]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in (link for link in links if not link.startswith("https://")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_every_make_target_and_public_name_exists(page):
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[0].split())
    assert {target for line in code(page) for target in re.findall(r"\bmake ([a-z][\w-]*)", line)} <= targets
    assert {name for line in code(page) for name in re.findall(r"\bvpw\.([a-zA-Z]\w*)", line)} <= set(vpw.__all__)


@every_page
def test_every_command_is_accepted(page):
    """Verbs and options exist; the parameters of a run are those of its notebook."""
    verbs = typer.main.get_command(app).commands
    for line in code(page):
        for command in re.findall(r"^vpw [a-z].*", line.replace("[", "").replace("]", "").replace("&&", "#")):
            _, verb, *words = shlex.split(command, comments=True)
            options = {option for parameter in verbs[verb].params for option in parameter.opts}
            assert {word for word in words if re.match(r"--?[a-z]", word)} <= options, command
            if verb == "run" and words and words[0] != "NAME":
                known = notebook_parameters(find_notebook(words[0]))
                assert {name for flag, name in zip(words, words[1:], strict=False) if flag == "-p"} <= known.keys()


@every_page
def test_every_setting_exists(page):
    """Dotted names in backticks, and the keys of overrides."""
    dotted = re.compile(r"^[a-z_]+\.[a-z_]+$|(?<=\")[a-z_]+\.[a-z_]+(?=\":)")
    names = {name for line in code(page) for name in dotted.findall(line)} - {"train.json", "model.budget"}
    sections = {key.partition(".")[0] for key in KEYS if "." in key}
    assert {name for name in names if name.partition(".")[0] in sections} <= KEYS


@every_page
def test_python_examples_import_names_that_exist(page):
    for block in blocks(page, "python"):
        imports = [node for node in ast.parse(block).body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), str(page), "exec"), {})


def run_example(example: str, capsys: pytest.CaptureFixture[str]) -> str:
    exec(compile(example, "example", "exec"), {})
    return capsys.readouterr().out


def test_the_first_example_of_the_readme_runs(capsys):
    """It prints the flow of the shipped model and that of uniform attention."""
    flow, null = re.findall(r"\[([\d. ]+)\]", run_example(blocks(REPOSITORY / "README.md", "python")[0], capsys))
    assert all(float(one) > float(other) > 0 for one, other in zip(flow.split(), null.split(), strict=True))


def test_the_example_of_knock_out_runs(capsys):
    """The first layer of the shipped model reads the image for ITM; the last one hardly does."""
    (example,) = (block for block in blocks(REPOSITORY / "docs" / "probes.md", "python") if "knock_out" in block)
    assert len(example.splitlines()) <= 8
    effect, beyond_random = re.findall(r"\[([-\d. ]+)\]", run_example(example, capsys))
    first, _, last = map(float, effect.split())
    assert first > 3 > last and float(beyond_random.split()[0]) > 3


def test_the_example_of_patching_runs(capsys):
    """The difference is in the object that differs at first, and in the word at last."""
    (example,) = (block for block in blocks(REPOSITORY / "docs" / "probes.md", "python") if "patch_inputs" in block)
    assert len(example.splitlines()) <= 8
    first, *_, last = re.findall(r"\[([-\d. ]+)\]", run_example(example, capsys))
    thing, others, word, *rest = map(float, first.split())
    assert thing > 0.8 > others and word == 0 and rest == [0, 0]
    thing, others, word, *_ = map(float, last.split())
    assert word > 0.4 > thing


def test_masks_on_objects_are_measured_as_the_results_say(capsys):
    """Fewer scenes than there; the shares of both visual sides are printed in the order of the table."""
    (example,) = (block for block in blocks(REPOSITORY / "docs" / "results.md", "python") if "mask_shares" in block)
    shares = re.findall(
        r"^rows: ([\d.]+)%", run_example(example.replace("val=400", "val=12"), capsys), flags=re.MULTILINE
    )
    assert len(shares) == 2 and float(shares[0]) > float(shares[1])


def test_what_visual_sides_were_taught_is_what_their_runs_say():
    text = (REPOSITORY / "docs" / "families.md").read_text(encoding="utf-8")
    row = r"^\| \[`(\w+)`\]\(\.\./(.+)/09_visual_init\.ipynb\) .* \| ([\d.]+)% \| ([\d.]+)% \|$"
    rows = re.findall(row, text, flags=re.MULTILINE)
    assert [row[0] for row in rows] == ["swin", "grid", "patch"]
    for _, folder, colours, shapes in rows:
        summary = json.loads((REPOSITORY / folder / "summary.json").read_text(encoding="utf-8"))
        measured = [f"{summary[f'{name}_accuracy']:.1%}" for name in ("colour", "shape")]
        assert measured == [f"{colours}%", f"{shapes}%"], folder


def test_tables_are_those_of_their_runs():
    text = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    tables = [*recipe.tables(recipe.saved()), *photographs.tables(recipe.saved(photographs.FOLDER))]
    assert all(table in text for table in tables)
    text = (REPOSITORY / "docs" / "study.md").read_text(encoding="utf-8")
    assert all(table in text for table in study.tables(open_study()))


def test_what_blocking_two_streams_costs_is_what_its_runs_say():
    text = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    effects = pd.read_csv(REPOSITORY / "papermill_runs" / "gallery" / "08_families-systems" / "knock-out.csv")
    match = effects[effects["read_out"] == "match"].set_index(["start", "stop"])
    for name, span in {"the first cross layer": (1, 1), "the second": (3, 3), "both": (1, 4)}.items():
        found = match.loc[[span]].sort_values("seed")
        cells = [f"{row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for _, row in found.iterrows()]
        assert f"| {name} | {' | '.join(cells)} |" in text and len(cells) == 3


def test_pretraining_is_what_its_run_says():
    text = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*\]\(\.\./(.+)/01_pretrain\.ipynb\)\) \| (0\.9.+) \|$", text, flags=re.MULTILINE)
    assert len(rows) == 1
    for folder, printed in rows:
        summary = json.loads((REPOSITORY / folder / "summary.json").read_text(encoding="utf-8"))
        cells = []
        for name in ("itm_accuracy", "mlm_with_image", "mlm_other_image", "mlm_ratio"):
            digits = 1 if name == "mlm_ratio" else 3
            mean, low, high = (f"{summary[name + bound]:.{digits}f}" for bound in ("", "_low", "_high"))
            cells.append(f"{mean} [{low}, {high}]")
        assert printed == " | ".join(cells), folder


def test_scores_of_tasks_are_those_of_their_runs():
    """Intervals on validation and test, from the summaries in the gallery."""
    text = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    row = r"^\| .*\]\(\.\./(papermill_runs/gallery/04_finetune-[\w-]+)/04_finetune\.ipynb\)\) \| ([^|]+) \| ([^|]+) \|"
    rows = re.findall(row, text, flags=re.MULTILINE)
    assert len(rows) == 6
    for folder, *printed in rows:
        summary = json.loads((REPOSITORY / folder / "summary.json").read_text(encoding="utf-8"))
        (metric,) = {"vqa_score", "accuracy", "mean_recall"} & summary.keys()
        for part, interval in zip((summary, summary["test"]), printed, strict=True):
            mean, low, high = (f"{part[name]:.3f}" for name in (metric, f"{metric}_low", f"{metric}_high"))
            assert interval == f"{mean} [{low}, {high}]", folder
