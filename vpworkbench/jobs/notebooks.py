"""Notebooks executed in run folders, on top of papermill: parameters checked first, then run, resumed or complete."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError, validate_call
from tqdm import tqdm

from vpworkbench.errors import RunError, SettingsError
from vpworkbench.runs import digest, open_run, read_json, repositories, run_folder
from vpworkbench.settings import Settings, checked, fault_lines, nearest
from vpworkbench.system import lock, on_signal

logger = logging.getLogger(__name__)

CHECKS = {
    "00_visual_init": "vpworkbench.settings:visual_init_settings",
    "01_pretrain": "vpworkbench.settings:pretrain_settings",
    "02_probe": "vpworkbench.settings:probe_settings",
    "00_tour": "vpworkbench.settings:probe_settings",
    "03_compare_models": "vpworkbench.settings:compare_settings",
    "04_finetune": "vpworkbench.settings:finetune_settings",
    "05_explore_masks": "vpworkbench.settings:explore_settings",
    "06_runs": "vpworkbench.settings:runs_settings",
    "08_families": "vpworkbench.settings:family_runs_settings",
}
"""For each notebook the function that turns its parameters into settings, or refuses them."""


TRAINING = {
    "01_pretrain": "vpworkbench.train.pretrain:train_run",
    "04_finetune": "vpworkbench.train.finetune:train_run",
}
"""For each notebook that trains: the function that does only that, from a run and its settings."""


def train_run(notebook: str, *, name: str = "", parameters: dict[str, Any] | None = None) -> Path:
    """Train a run without its notebook, as `torchrun` needs it; `run_notebook` then goes on behind the training.

    Parameters
    ----------
    parameters : dict
        As of `run_notebook`; None takes the settings of the run of this name.

    Returns
    -------
    Path
        The run's folder.
    """
    if notebook not in TRAINING:
        raise SettingsError(f"{notebook}: trains nothing{nearest(notebook, TRAINING)} (known: {', '.join(TRAINING)})")
    config = run_folder(notebook, name) / "config.json" if name else None
    if not parameters and config and config.exists():
        settings = checked(type(_imported(CHECKS[notebook])()), read_json(config)["settings"])
    else:
        settings = check_parameters(notebook, notebook_parameters(find_notebook(notebook)), parameters or {})
    run = open_run(notebook, settings, name=name)
    _imported(TRAINING[notebook])(run, settings)
    return run.folder


def run_notebook(
    notebook: str,
    *,
    name: str = "",
    parameters: dict[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Path:
    """Execute a notebook in its run folder: start it, resume it, or say that it is complete.

    Parameters
    ----------
    notebook : str
        A name (`01_pretrain`, looked for in `notebooks/`) or a path.
    name : str
        The run's name; empty takes a hash of the settings.
    parameters : dict
        Values for the notebook's cell tagged `parameters`. Relative paths are taken from the current folder.
    environment : mapping
        Variables that the kernel gets beside this process's own.

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
        If a cell fails, the kernel is stopped, or another process works on the run.
    KeyboardInterrupt
        If SIGINT or SIGTERM came: they are passed on to the kernel, where training writes a checkpoint first.
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
    with lock(folder / ".execution.lock", patience_s=2):
        return _execute(path, folder, given, environment or {})


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


def _execute(notebook: Path, folder: Path, parameters: dict[str, Any], environment: Mapping[str, str]) -> Path:
    import papermill  # late: it takes longer than all checks together
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    label, executed = f"{notebook.stem}/{folder.name}", folder / notebook.name
    if _is_finished(folder, executed):
        logger.info("%s is complete, nothing to do: %s", label, executed if executed.exists() else folder)
        return executed
    logger.info("%s: running in %s", label, folder)
    began = time.monotonic()
    kernel = _Kernel(environment)
    try:
        RUNNING.add(kernel)
        with _terminal_bar(folder / "progress.json"), on_signal(kernel.stop):
            papermill.execute_notebook(
                *(str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, executed)),
                parameters=parameters,
                kernel_name="python3",  # ipykernel's own spec: this interpreter
                language="python",
                start_timeout=300,  # a busy machine takes its time
                extra_arguments=["--log-level=ERROR"],  # the kernel warns that localhost is unencrypted
                progress_bar=False,
                kernel_manager_class=kernel.manager(),
            )
    except (PapermillExecutionError, RuntimeError, KeyboardInterrupt) as error:
        if kernel.stopped_by or isinstance(error, KeyboardInterrupt):
            logger.info("%s: interrupted; the same call resumes from the last checkpoint", label)
            raise KeyboardInterrupt(kernel.stopped_by or signal.SIGINT) from None
        if isinstance(error, DeadKernelError):
            raise RunError(
                f"{label}: the kernel was stopped (killed, or out of memory)\n"
                f"executed notebook: {executed}\nthe same call resumes from the last checkpoint"
            ) from None
        if not isinstance(error, PapermillExecutionError):
            raise
        message = "\n".join(line[:200] for line in error.evalue.strip().splitlines()[:7])
        raise RunError(
            f"{label} failed in cell In [{error.exec_count}]: {error.ename}\n{message}\n"
            f"executed notebook: {executed}\nthe same call runs it again, from its last checkpoint"
        ) from None
    finally:
        RUNNING.discard(kernel)
    logger.info("%s: done in %s: %s", label, _duration(time.monotonic() - began), executed)
    return executed


class _Kernel:
    """The kernel of one execution: its environment, and the signal that was passed on to it.

    jupyter_client starts it in a session of its own, so neither Ctrl-C nor Slurm's SIGTERM would reach it. After a
    SIGKILL of this process it ends by itself: ipykernel looks every second whether its parent is still there.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment, self.stopped_by = environment, None
        self._process: int | None = None

    def manager(self) -> type:
        from jupyter_client import AsyncKernelManager

        kernel = self

        class Manager(AsyncKernelManager):
            async def start_kernel(self, **options: Any) -> None:
                options["env"] = {**os.environ, **options.get("env", {}), **kernel.environment}
                await self._async_start_kernel(**options)
                kernel._process = self.provisioner.pid
                if kernel.stopped_by:
                    raise KeyboardInterrupt

        return Manager

    def stop(self, number: signal.Signals) -> None:
        """Pass a signal on; a kernel that is not there yet is ended as soon as it is."""
        self.stopped_by = number
        if self._process is not None:
            os.kill(self._process, number)


RUNNING: set[_Kernel] = set()
"""The kernels of this process: several in a sweep."""


def stop_all(number: signal.Signals) -> None:
    """Pass a signal on to all kernels of this process."""
    for kernel in list(RUNNING):
        kernel.stop(number)


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
    """While a kernel works, show what it writes with `Run.progress` as a bar with the time left.

    Not in the threads of a sweep, whose bars would write over each other.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
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
