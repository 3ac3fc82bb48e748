"""Notebooks executed in run folders by papermill: parameters are checked first, then the run starts or resumes."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from tqdm import tqdm

from vpworkbench.errors import RunError, SettingsError
from vpworkbench.jobs.parameters import (
    CHECKS,
    cell_tags,
    check_parameters,
    find_notebook,
    notebook_content,
    notebook_parameters,
)
from vpworkbench.runs import digest, open_folder, open_run, read_json, run_folder, saved_settings
from vpworkbench.settings import checked, nearest
from vpworkbench.system import lock, on_signal, write_atomically

logger = logging.getLogger(__name__)

TRAINING = {
    "01_pretrain": ("vpworkbench.train.pretrain:prepare", "vpworkbench.train.pretrain:pretrain"),
    "04_finetune": ("vpworkbench.train.finetune:prepare_task", "vpworkbench.train.finetune:finetune"),
}
"""For each notebook that trains, the functions that prepare data and model for its settings, and train a run."""


def run_notebook(
    notebook: str,
    *,
    name: str = "",
    parameters: dict[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    again: bool = False,
    until: str = "",
) -> Path:
    """Execute a notebook in its run folder and return its path there: start, resume, or find it complete.

    Parameters
    ----------
    notebook : str
        A name (`01_pretrain`, looked up in `notebooks/`) or a path.
    name : str
        The run's name; empty takes a hash of the settings.
    parameters : dict
        Values for the notebook's cell tagged `parameters`. Relative paths start from the current folder.
    again : bool
        Execute a complete run once more, on its checkpoint and results. Without parameters it takes those of the run.
    until : str
        Stop after the first cell with this tag; the run stays incomplete, and the call without `until` completes it.

    Raises
    ------
    SettingsError
        Before anything starts: for all wrong parameters at once, an unknown tag, or no run to execute again.
    RunError
        If a cell fails, the kernel is killed, or another process uses the run.
    KeyboardInterrupt
        After SIGINT or SIGTERM, which are passed on to the kernel: training writes a checkpoint first.
    """
    path = find_notebook(notebook)
    given = dict(parameters or {})
    own_name = given.pop("name", "")
    name = name or str(own_name)
    if again and name and not given:
        given = _recorded_parameters(run_folder(path.stem, name) / path.name)
    defaults = notebook_parameters(path)
    settings = check_parameters(path.stem, defaults, given)
    name = name or digest(settings.model_dump(mode="json") if settings else defaults | given | {"name": ""})
    folder = run_folder(path.stem, name)
    if again and not (folder / "summary.json").exists():
        raise SettingsError(f"{path.stem}/{name} is no complete run; run it without --again")
    executed = folder / path.name
    shortened = _until(path, until) if until else ""
    folder.mkdir(parents=True, exist_ok=True)
    if settings:
        open_folder(folder, path.stem, settings)
    if "name" in defaults:
        given["name"] = name
    with lock(folder / ".execution.lock", patience_s=2):
        if not again and _is_finished(folder, executed):
            logger.info("%s/%s is complete, nothing to do: %s", path.stem, name, folder)
        else:
            if shortened:
                write_atomically(executed, shortened)
            _execute(executed if shortened else path, executed, given, environment or {})
    return executed


def train_run(notebook: str, *, name: str = "", parameters: dict[str, Any] | None = None) -> Path:
    """Train a run without its notebook, as `torchrun` needs it; `run_notebook` continues after training.

    Without parameters, an existing run of this name keeps its settings. Returns the run's folder.
    """
    if notebook not in TRAINING:
        raise SettingsError(f"{notebook}: trains nothing{nearest(notebook, TRAINING)} (known: {', '.join(TRAINING)})")
    folder = run_folder(notebook, name) if name else None
    if not parameters and folder and (folder / "config.json").exists():
        settings = checked(type(resolve_name(CHECKS[notebook])()), saved_settings(folder))
    else:
        settings = check_parameters(notebook, notebook_parameters(find_notebook(notebook)), parameters or {})
    run = open_run(notebook, settings, name=name)
    prepare, train = map(resolve_name, TRAINING[notebook])
    train(run, prepare(settings), settings)
    return run.folder


def _until(path: Path, tag: str) -> str:
    """The notebook up to its first cell with this tag, marked as incomplete."""
    content = notebook_content(path)
    tags = [cell_tags(cell) for cell in content["cells"]]
    last = next((number for number, found in enumerate(tags) if tag in found), None)
    if last is None:
        known = list(dict.fromkeys(sum(tags, [])))
        raise SettingsError(
            f"--until {tag}: {path.stem} has no cell with this tag{nearest(tag, known)} (tags: {', '.join(known)})"
        )
    content["cells"] = content["cells"][: last + 1]
    content.setdefault("metadata", {})["vpworkbench"] = {"until": tag}
    return json.dumps(content, indent=1)


def _recorded_parameters(executed: Path) -> dict[str, Any]:
    """The parameters that a run was started with; none if its notebook is elsewhere."""
    record = read_json(executed)["metadata"].get("papermill", {}) if executed.exists() else {}
    return {key: value for key, value in record.get("parameters", {}).items() if key != "name"}


def _execute(notebook: Path, executed: Path, parameters: dict[str, Any], environment: Mapping[str, str]) -> None:
    import papermill  # late: importing it takes longer than all checks together
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    label = f"{notebook.stem}/{executed.parent.name}"
    logger.info("%s: running in %s", label, executed.parent)
    started_s = time.monotonic()
    kernel = _Kernel(environment)
    RUNNING.add(kernel)
    is_alone = threading.current_thread() is threading.main_thread()  # bars of a sweep would overwrite each other
    try:
        with _progress_bar(executed.parent / "progress.json") if is_alone else nullcontext(), on_signal(kernel.stop):
            papermill.execute_notebook(
                *(str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, executed)),
                parameters=parameters,
                kernel_name="python3",  # ipykernel's own spec: this interpreter
                language="python",
                start_timeout=300,  # for a busy machine
                extra_arguments=["--log-level=ERROR"],  # the kernel warns that localhost is not encrypted
                progress_bar=False,
                kernel_manager_class=kernel.manager(),
            )
    except (PapermillExecutionError, RuntimeError, KeyboardInterrupt) as error:
        if kernel.stopped_by or isinstance(error, KeyboardInterrupt):
            logger.info("%s: interrupted; the same call resumes from the last checkpoint", label)
            raise KeyboardInterrupt(kernel.stopped_by or signal.SIGINT) from None
        if isinstance(error, PapermillExecutionError):
            lines = [f"{label} failed in cell In [{error.exec_count}]: {error.ename}"]
            lines += [line[:200] for line in error.evalue.strip().splitlines()[:7]]
        elif isinstance(error, DeadKernelError):
            lines = [f"{label}: the kernel was stopped (killed, or out of memory)"]
        else:
            raise
        lines += [f"executed notebook: {executed}", "the same call resumes from the last checkpoint"]
        raise RunError("\n".join(lines)) from None
    finally:
        RUNNING.discard(kernel)
    logger.info("%s: done in %s: %s", label, tqdm.format_interval(time.monotonic() - started_s), executed)


class _Kernel:
    """The kernel of one execution: its environment, and the signal that was passed on to it.

    jupyter_client starts it in a session of its own, so neither Ctrl-C nor Slurm's SIGTERM reaches it. After a
    SIGKILL of this process it ends by itself.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment, self.stopped_by = environment, None
        self._process: int | None = None

    def manager(self) -> type:
        """The class of kernel managers for papermill, which starts the kernel itself."""
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
        """Pass a signal on; a kernel that has not started yet ends as soon as it has."""
        self.stopped_by = number
        if self._process is not None:
            os.kill(self._process, number)


RUNNING: set[_Kernel] = set()
"""The kernels of this process; a sweep has several."""


def stop_all(number: signal.Signals) -> None:
    """Pass a signal on to all kernels of this process."""
    for kernel in list(RUNNING):
        kernel.stop(number)


def _is_finished(folder: Path, executed: Path) -> bool:
    """True for a complete run whose notebook ran to its end: cells after the summary may draw or assert."""
    if not (folder / "summary.json").exists():
        return False
    if not executed.exists():
        return True  # plain papermill wrote its notebook elsewhere
    try:
        metadata = read_json(executed)["metadata"]
        record = metadata["papermill"]
    except (RunError, KeyError):
        return False
    return bool(record.get("end_time")) and not record.get("exception") and "vpworkbench" not in metadata


@contextmanager
def _progress_bar(file: Path) -> Iterator[None]:
    """Show what the kernel reports with `Run.progress` as a bar with the time left."""
    file.unlink(missing_ok=True)  # left by a killed process
    ended = threading.Event()
    thread = threading.Thread(target=_follow, args=(file, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        file.unlink(missing_ok=True)


def _follow(file: Path, ended: threading.Event) -> None:
    pause_s = 0.5 if sys.stderr.isatty() else 10  # a log file needs fewer lines
    bar, is_last = None, False
    while not is_last:
        is_last = ended.wait(pause_s)  # then look once more
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except OSError:
            continue  # nothing reported yet
        if bar is None or bar.desc != state["what"]:
            if bar:
                bar.close()
            bar = tqdm(desc=state["what"], initial=state["done"], total=state["total"], dynamic_ncols=True)
        bar.n = state["done"]
        bar.refresh()
    if bar:
        bar.close()
