"""The parameters of notebooks: read from their tagged cell, parsed from a command line, and checked."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from pydantic import ValidationError, validate_call

from vpworkbench.errors import RunError, SettingsError
from vpworkbench.runs import repositories
from vpworkbench.settings import Settings, fault_lines, nearest

CHECKS = {
    "00_tour": "vpworkbench.settings:TourSettings",
    "09_visual_init": "vpworkbench.settings:visual_init_settings",
    "01_pretrain": "vpworkbench.settings:pretrain_settings",
    "02_probe": "vpworkbench.settings:ProbeSettings",
    "03_compare_models": "vpworkbench.settings:CompareSettings",
    "04_finetune": "vpworkbench.tasks.settings:finetune_settings",
    "05_explore_masks": "vpworkbench.settings:ExploreSettings",
    "06_runs": "vpworkbench.settings:RunsSettings",
    "07_knock_out": "vpworkbench.settings:ProbeSettings",
    "08_families": "vpworkbench.settings:FamilyRunsSettings",
    "10_study": "vpworkbench.settings:StudySettings",
}
"""For each notebook the class or function that makes settings of its parameters, or refuses them."""


def find_notebook(notebook: str) -> Path:
    """The file of a notebook given by name or path; `FileNotFoundError` suggests the most similar name."""
    given = Path(notebook)
    if given.suffix == ".ipynb" and given.is_file():
        return given.absolute()
    roots = reversed(list(repositories()))
    known = {path.stem: path for root in roots for path in sorted((root / "notebooks").glob("*.ipynb"))}
    stem = notebook.removesuffix(".ipynb")
    if stem not in known:
        names = ", ".join(known) or "none"
        raise FileNotFoundError(f"{notebook}: no such notebook{nearest(stem, known)} (known: {names})")
    return known[stem]


def notebook_parameters(path: Path) -> dict[str, Any]:
    """A notebook's parameters with their defaults: the literals assigned in its cell tagged `parameters`.

    papermill's own reader works line by line and misses a parameter annotated `str | list`.
    """
    cells = notebook_content(path)["cells"]
    tagged = [cell for cell in cells if "parameters" in cell_tags(cell)]
    values = {}
    try:
        for statement in ast.parse("".join(tagged[0]["source"])).body if tagged else ():
            if isinstance(statement, ast.AnnAssign) and statement.value:
                value = ast.literal_eval(statement.value)
                is_float = ast.unparse(statement.annotation) == "float"  # `epochs: float = 0` takes 0.5 too
                values[ast.unparse(statement.target)] = float(value) if is_float else value
            elif isinstance(statement, ast.Assign):
                values[ast.unparse(statement.targets[0])] = ast.literal_eval(statement.value)
    except (SyntaxError, ValueError) as error:
        raise RunError(f"{path}: the parameters cell must assign plain literals ({error})") from None
    return values


def parse_parameters(texts: dict[str, str], defaults: dict[str, Any]) -> dict[str, Any]:
    """Words of a command line as values of the types of the notebook's defaults.

    Lists and dicts are JSON, a list also where the default is a text (`-p data '["scenes", "mine"]'`). A text stays as
    it is, and so does what cannot be parsed, which `check_parameters` refuses.
    """
    return {key: _parsed(text, defaults.get(key)) for key, text in texts.items()}


def check_parameters(notebook: str, defaults: dict[str, Any], given: dict[str, Any]) -> Settings | None:
    """Settings from a notebook's parameters; None if `CHECKS` has no entry for it.

    A `SettingsError` lists all faults at once: unknown names, wrong types, and what the settings refuse.
    """
    faults, sound, settings = [], dict(defaults), None
    for key, value in given.items():
        if key not in defaults:
            hint = nearest(key, defaults) or f" (known: {', '.join(defaults) or 'none'})"
            faults.append(f"{key}: {notebook} has no such parameter{hint}")
        elif wanted := _type_fault(value, defaults[key], one_or_many=notebook in CHECKS):
            faults.append(f"{key}: {wanted} (given: {value!r:.60})")
        else:
            sound[key] = value
    if notebook in CHECKS:
        check = resolve_name(CHECKS[notebook])
        accepted = inspect.signature(check).parameters
        build = check if isinstance(check, type) else validate_call(check)
        try:
            settings = build(**{key: sound[key] for key in accepted if key in sound})
        except ValidationError as error:
            faults += fault_lines(error, accepted).splitlines()
        except SettingsError as error:
            faults += str(error).splitlines()
    if faults:
        raise SettingsError("\n".join(faults))
    return settings


def notebook_content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["cells"][:0]  # a list
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not a notebook ({type(error).__name__}: {error})") from None
    return content


def cell_tags(cell: dict[str, Any]) -> list[str]:
    return cell.get("metadata", {}).get("tags", [])


def _parsed(text: str, default: Any) -> Any:
    kind = type(default)
    if kind is str and not text.startswith("["):
        return text
    try:
        value = json.loads(text.lower() if kind is bool else text)
    except ValueError:
        return text
    if kind is float and type(value) is int:
        return float(value)
    return value if default is None or type(value) in (kind, list) else text


def _type_fault(value: Any, default: Any, *, one_or_many: bool) -> str:
    """The message about a value whose type differs from the default's; empty if it fits."""
    kind = type(default)
    if default is None or type(value) is kind or (kind is float and type(value) is int):
        return ""
    if kind is str and type(value) is list and one_or_many:
        return ""  # the settings decide whether a list is allowed
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return f"must be {names.get(kind, f'a JSON {kind.__name__}')}, like {default!r:.40}"
