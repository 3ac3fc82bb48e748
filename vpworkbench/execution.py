"""Notebooks executed in run folders, on top of papermill: parameters checked first, then run, resumed or complete."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError, validate_call
from tqdm import tqdm

from vpworkbench.config import Settings, SettingsError, fault_lines, nearest
from vpworkbench.runs import RunError, digest, open_run, read_json, repositories, run_folder

logger = logging.getLogger(__name__)

CHECKS = {
    "00_visual_init": "vpworkbench.config:visual_init_settings",
    "01_pretrain": "vpworkbench.config:pretrain_settings",
    "02_probe": "vpworkbench.config:probe_settings",
    "00_tour": "vpworkbench.config:probe_settings",
    "03_compare_models": "vpworkbench.config:compare_settings",
    "04_finetune": "vpworkbench.config:finetune_settings",
}
"""For each notebook the function that turns its parameters into settings, or refuses them."""


def run_notebook(notebook: str, *, name: str = "", parameters: dict[str, Any] | None = None) -> Path:
    """Execute a notebook in its run folder: start it, resume it, or say that it is complete.

    Parameters
    ----------
    notebook : str
        A name (`01_pretrain`, looked for in `notebooks/`) or a path.
    name : str
        The run's name; empty takes a hash of the settings.
    parameters : dict
        Values for the notebook's cell tagged `parameters`. Relative paths are taken from the current folder.

    Returns
    -------
    Path
        The executed notebook, in the run's folder.

    Raises
    ------
    FileNotFoundError
        If there is no such notebook.
    SettingsError
        For unknown parameters and wrong values, all at once, before anything starts.
    RunError
        If a cell fails, or the kernel is stopped.
    """
    path = find_notebook(notebook)
    given = dict(parameters or {})
    if "name" in given:
        name = name or str(given.pop("name"))
    defaults = notebook_parameters(path)
    settings = check_parameters(path.stem, defaults, given)
    if settings is None:  # a notebook without a check of its own
        folder = run_folder(path.stem, name or digest({**defaults, **given, "name": ""}))
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = open_run(path.stem, settings, name=name).folder
    if "name" in defaults:
        given["name"] = folder.name
    return _execute(path, folder, given)


def find_notebook(notebook: str) -> Path:
    """The file of a notebook given by name or path; `FileNotFoundError` names the nearest one there is."""
    given = Path(notebook)
    if given.suffix == ".ipynb" and given.is_file():
        return given.absolute()
    known = {path.stem: path for root in reversed(list(repositories())) for path in _notebooks(root)}
    stem = notebook.removesuffix(".ipynb")
    if stem not in known:
        raise FileNotFoundError(
            f"{notebook}: no such notebook{nearest(stem, known)} (known: {', '.join(known) or 'none'})"
        )
    return known[stem]


def notebook_parameters(path: Path) -> dict[str, Any]:
    """A notebook's parameters with their defaults: the literals assigned in its cell tagged `parameters`.

    papermill's own reader works line by line and misses a parameter annotated `str | list`.

    Raises
    ------
    RunError
        If the file is no notebook, or a default no literal.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not a notebook ({type(error).__name__}: {error})") from None
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    values = {}
    for cell in tagged[:1]:
        try:
            for statement in ast.parse("".join(cell["source"])).body:
                if isinstance(statement, ast.AnnAssign) and statement.value:
                    value = ast.literal_eval(statement.value)
                    a_float = ast.unparse(statement.annotation) == "float"  # `epochs: float = 0` takes 0.5 too
                    values[ast.unparse(statement.target)] = float(value) if a_float else value
                elif isinstance(statement, ast.Assign):
                    values[ast.unparse(statement.targets[0])] = ast.literal_eval(statement.value)
        except (SyntaxError, ValueError) as error:
            raise RunError(f"{path}: the parameters cell must assign plain literals ({error})") from None
    return values


def parse_parameters(texts: dict[str, str], defaults: dict[str, Any]) -> dict[str, Any]:
    """Values of the types of the notebook's defaults from words of a command line.

    Lists and dicts are JSON, a list also where the default is a text (`-p data '["scenes", "mine"]'`); a text
    stays as it is (papermill would make a number of the name `007`). What does not parse stays a text, and
    `check_parameters` refuses it.
    """
    return {key: _parsed(text, defaults.get(key)) for key, text in texts.items()}


def check_parameters(notebook: str, defaults: dict[str, Any], given: dict[str, Any]) -> Settings | None:
    """Settings from a notebook's parameters; None where `CHECKS` has no entry for it.

    Raises
    ------
    SettingsError
        All faults at once: unknown names (with the nearest valid one), wrong types, what the check refuses.
    """
    faults, sound = [], dict(defaults)
    for key, value in given.items():
        if key not in defaults:
            hint = nearest(key, defaults) or f" (known: {', '.join(defaults) or 'none'})"
            faults.append(f"{key}: {notebook} has no such parameter{hint}")
        elif wanted := _type_fault(value, defaults[key], one_or_many=notebook in CHECKS):
            faults.append(f"{key}: {wanted} (given: {value!r:.60})")
        else:
            sound[key] = value
    settings = None
    if notebook in CHECKS:
        check = _imported(CHECKS[notebook])
        accepted = inspect.signature(check).parameters
        try:
            settings = validate_call(check)(**{key: sound[key] for key in accepted if key in sound})
        except ValidationError as error:
            faults += fault_lines(error, accepted).splitlines()
        except SettingsError as error:
            faults += str(error).splitlines()
    if faults:
        raise SettingsError("\n".join(faults))
    return settings


def _notebooks(root: Path) -> Iterable[Path]:
    return sorted((root / "notebooks").glob("*.ipynb"))


def _imported(place: str) -> Callable[..., Settings]:
    module, function = place.split(":")
    return getattr(importlib.import_module(module), function)


def _parsed(text: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}.get(text.lower(), text)
        if isinstance(default, (int, float)):
            return type(default)(text)
        if isinstance(default, (list, dict)) or text.startswith("["):
            return json.loads(text)
        if default is None:
            return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    return text


def _type_fault(value: Any, default: Any, *, one_or_many: bool) -> str:
    """What is wrong with the type of a value, by the type of the default; empty if nothing."""
    kind = type(default)
    if default is None or type(value) is kind:
        return ""
    if kind is float and type(value) is int:
        return ""
    if kind is str and type(value) is list and one_or_many:
        return ""  # the notebook's check decides
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return f"must be {names.get(kind, f'a JSON {kind.__name__}')}, like {default!r:.40}"


def _execute(notebook: Path, folder: Path, parameters: dict[str, Any]) -> Path:
    import papermill  # late: it takes longer than all checks together
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    label, executed = f"{notebook.stem}/{folder.name}", folder / notebook.name
    if _is_finished(folder, executed):
        logger.info("%s is complete, nothing to do: %s", label, executed if executed.exists() else folder)
        return executed
    logger.info("%s: running in %s", label, folder)
    began = time.monotonic()
    try:
        with _terminal_bar(folder / "progress.json"):
            papermill.execute_notebook(
                *(str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, executed)),
                parameters=parameters,
                kernel_name="python3",  # ipykernel's own spec: this interpreter
                language="python",
                start_timeout=300,  # a busy machine takes its time
                extra_arguments=["--log-level=ERROR"],  # the kernel warns that localhost is unencrypted
                progress_bar=False,
            )
    except PapermillExecutionError as error:
        message = "\n".join(line[:200] for line in error.evalue.strip().splitlines()[:7])
        raise RunError(
            f"{label} failed in cell In [{error.exec_count}]: {error.ename}\n{message}\n"
            f"executed notebook: {executed}\nthe same call runs it again, from its last checkpoint"
        ) from None
    except DeadKernelError:
        raise RunError(
            f"{label}: the kernel was stopped (interrupted, killed, or out of memory)\n"
            f"executed notebook: {executed}\nthe same call resumes from the last checkpoint"
        ) from None
    except KeyboardInterrupt:
        logger.info("%s: interrupted; the same call resumes from the last checkpoint", label)
        raise
    logger.info("%s: done in %s: %s", label, _duration(time.monotonic() - began), executed)
    return executed


def _is_finished(folder: Path, executed: Path) -> bool:
    """Complete, and no later cell failed or was cut off: a cell may draw, or assert, after the summary."""
    if not (folder / "summary.json").exists():
        return False
    if not executed.exists():
        return True  # plain papermill wrote its notebook elsewhere
    try:
        record = read_json(executed)["metadata"]["papermill"]
    except (RunError, KeyError):
        return False
    return bool(record.get("end_time")) and not record.get("exception")


@contextmanager
def _terminal_bar(progress: Path) -> Iterator[None]:
    """While a kernel works, show what it writes with `Run.progress` as a bar with the time left."""
    progress.unlink(missing_ok=True)  # of an earlier, killed try
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(progress, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        progress.unlink(missing_ok=True)


def _follow(progress: Path, stop: threading.Event) -> None:
    pause_s = 0.5 if sys.stderr.isatty() else 10  # a log file needs fewer lines
    form = "{desc}: {percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    bar, stopped = None, False
    while not stopped:
        stopped = stop.wait(pause_s)  # and look once more after the end
        try:
            state = json.loads(progress.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not written yet
        if bar is None or bar.desc != state["what"]:
            if bar is not None:
                bar.close()
            sizes = {"initial": state["done"], "total": state["total"]}
            bar = tqdm(desc=state["what"], **sizes, bar_format=form, dynamic_ncols=True)
        bar.n, left_s = state["done"], state["left_s"]
        bar.set_postfix_str("" if left_s is None else f"{_duration(left_s)} left")
    if bar is not None:
        bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes}:{seconds:02} min"
