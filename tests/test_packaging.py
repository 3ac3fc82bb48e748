"""pyproject.toml and environment.yml ask for the same things, and what is installed is new enough."""

import ast
import gc
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from vpworkbench.system import collector_off

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA_NAMES = {"torch": "pytorch", "huggingface-hub": "huggingface_hub", "kaleido": "python-kaleido"}


def floors(requirements: list[str]) -> dict[str, str]:
    pairs = [re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement) for requirement in requirements]
    assert all(pairs), f"not every one of {requirements} is written as name>=version"
    return {pair[1]: pair[2] for pair in pairs}


def test_environment_and_project_have_the_same_floors():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert environment[-2:] == ["pip", {"pip": ["-e .[photos,weights]"]}]
    wanted = floors(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
    wanted = {CONDA_NAMES.get(name, name): floor for name, floor in wanted.items()}
    assert floors(environment[:-2]) == wanted | {"python": PROJECT["requires-python"].removeprefix(">=")}
    assert len(wanted) >= 25


@pytest.mark.parametrize("name, floor", floors(PROJECT["dependencies"]).items())
def test_installed_packages_reach_the_floors(name, floor):
    def numbers(version):
        return [int(part) for part in re.findall(r"\d+", version)]

    assert numbers(importlib.metadata.version(name)) >= numbers(floor)


NOT_IMPORTED = {"ipykernel": "papermill starts its kernels"}
IMPORT_NAMES = {
    "huggingface-hub": "huggingface_hub",
    "pillow": "PIL",
    "pot": "ot",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}


def test_the_package_imports_what_it_depends_on():
    imported = set()
    for file in (REPOSITORY / "vpworkbench").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    dependencies = set(floors(PROJECT["dependencies"]))
    assert {name for name in dependencies if IMPORT_NAMES.get(name, name) not in imported} == set(NOT_IMPORTED)


def test_each_room_imports_only_from_the_floors_below():
    """The contracts in pyproject.toml, which `make lint` runs too."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and " 0 broken" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("goal", ["bench-probes", "bench-train", "bench-retrieval", "bench-explorer", "speedrun"])
def test_make_runs_the_benchmarks_that_its_help_names(goal):
    shown = subprocess.run(["make", "-n", goal], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert f"python -m benchmarks.{goal.removeprefix('bench-')}" in shown
    assert (REPOSITORY / "benchmarks" / f"{goal.removeprefix('bench-')}.py").exists()


def test_the_package_says_that_it_is_typed():
    assert (REPOSITORY / "vpworkbench" / "py.typed").exists()


def test_the_command_is_there():
    module, function = PROJECT["scripts"]["vpw"].split(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_modules_are_imported_without_the_collector():
    with pytest.raises(ImportError), collector_off():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
