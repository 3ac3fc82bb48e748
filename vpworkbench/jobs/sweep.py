"""Many runs at once: a grid or a list of notebook jobs, each a run folder, on this machine or on a Dask cluster.

A job that is complete is skipped, one that was cut off resumes, and a failed one stops no other.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from vpworkbench.errors import SettingsError
from vpworkbench.jobs import notebooks as execution
from vpworkbench.jobs.notebooks import run_notebook
from vpworkbench.jobs.parameters import check_parameters, find_notebook, notebook_parameters
from vpworkbench.runs import digest, run_folder, runs_root
from vpworkbench.settings import nearest
from vpworkbench.system import on_signal

logger = logging.getLogger(__name__)

KEYS = ("notebook", "name", "parameters", "grid", "jobs")


class Job(NamedTuple):
    """One run: its notebook, its name and its parameters."""

    notebook: str
    name: str
    parameters: dict[str, Any]


def read_jobs(path: str | Path) -> list[Job]:
    """The jobs of a yaml file; its keys are the arguments of `make_jobs`.

    Raises
    ------
    SettingsError
        For a file that is no such yaml.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not yaml ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or "notebook" not in content:
        raise SettingsError(f"{path}: needs a notebook, and a grid or jobs (keys: {', '.join(KEYS)})")
    if unknown := [key for key in content if key not in KEYS]:
        raise SettingsError(f"{path}: no such key {unknown[0]!r}{nearest(str(unknown[0]), KEYS)}")
    if missing := [key for key in ("notebook", "name") if not isinstance(content.get(key, ""), str)]:
        raise SettingsError(f"{path}: {missing[0]}: must be a text (given: {content[missing[0]]!r:.40})")
    return make_jobs(**content)


def make_jobs(
    notebook: str,
    *,
    name: str = "",
    parameters: Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    jobs: Sequence[Mapping[str, Any]] | None = None,
) -> list[Job]:
    """Every combination of a grid, and every job of a list; all checked.

    Parameters
    ----------
    name : str
        What the runs' names begin with; what a job varies is added: `masks-masking=random,seed=1`.
    parameters
        Shared by all jobs.
    grid
        Values to try, by parameter. A dotted key is a setting, and goes into `overrides`: `mask.budget: [7, 14]`.
    jobs
        Parameters of single jobs, dotted keys as in `grid`.

    Raises
    ------
    SettingsError
        For wrong parameters, those of all jobs at once; nothing was started.
    """
    for key, given in {"parameters": parameters, "grid": grid, **_numbered(jobs)}.items():
        if given is not None:
            _check_keys(key, given)
    if wrong := [key for key, values in (grid or {}).items() if not isinstance(values, (list, tuple))]:
        raise SettingsError(f"grid.{wrong[0]}: a list of values is wanted")
    varied = [dict(one) for one in jobs or ()]
    if grid:
        varied += [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if not varied:
        raise SettingsError("no jobs: give a grid, or jobs")
    path = find_notebook(notebook)
    defaults = notebook_parameters(path)
    made, faults = [], []
    for change in varied:
        job = Job(str(path), _name(name, change), _with_overrides(parameters or {}, change))
        try:
            check_parameters(path.stem, defaults, job.parameters)
            run_folder(path.stem, job.name)
        except SettingsError as error:
            faults += [f"{job.name}: {line}" for line in str(error).splitlines()]
        made.append(job)
    names = [job.name for job in made]
    faults += [f"{name}: two jobs of this name" for name in dict.fromkeys(names) if names.count(name) > 1]
    if faults:
        raise SettingsError("\n".join(faults))
    return made


def sweep(jobs: Sequence[Job], *, workers: int = 0, scheduler: str = "") -> pd.DataFrame:
    """Run all jobs; one row each: `notebook`, `name`, `state` (done or failed) and the first lines of the `error`.

    Parameters
    ----------
    workers : int
        Jobs at once on this machine; 0: one for each GPU, or one. Each job sees one GPU.
    scheduler : str
        Address of a Dask scheduler. Its workers should have one thread, and one GPU, each; they need the run folders
        on a shared disk. The jobs of a worker that dies are run by another, from their last checkpoint.

    Raises
    ------
    SettingsError
        For a negative number of workers, or a scheduler that cannot be reached.
    KeyboardInterrupt
        If SIGINT or SIGTERM came: every running job writes a checkpoint first.
    """
    if workers < 0:
        raise SettingsError(f"workers: must be at least 0 (given: {workers})")
    stopped: list[signal.Signals] = []
    results: dict[int, tuple[str, str]] = {}
    run = _on_cluster if scheduler else _here
    for number, result in run(jobs, scheduler or workers, stopped):
        results[number] = result
        logger.info("%s: %s (%d of %d)", jobs[number].name, result[0], len(results), len(jobs))
    if stopped:
        raise KeyboardInterrupt(stopped[0])
    rows = [(Path(job.notebook).stem, job.name, *results[number]) for number, job in enumerate(jobs)]
    return pd.DataFrame(rows, columns=["notebook", "name", "state", "error"])


Results = Iterator[tuple[int, tuple[str, str]]]


def _here(jobs: Sequence[Job], workers: int, stopped: list[signal.Signals]) -> Results:
    """A thread for each job at a time; the work is done in their kernels, which are processes."""
    devices = _devices()
    workers = workers or len(devices) or 1
    slots: queue.Queue[dict[str, str]] = queue.Queue()
    for slot in range(workers):
        environment = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
        if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
        slots.put(environment)

    def work(job: Job) -> tuple[str, str]:
        if stopped:
            return "stopped", ""
        environment = slots.get()
        try:
            return _run(job, environment)
        finally:
            slots.put(environment)

    def stop(number: signal.Signals) -> None:
        stopped.append(number)
        execution.stop_all(number)

    with ThreadPoolExecutor(workers) as pool, on_signal(stop):
        futures = {pool.submit(work, job): number for number, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _on_cluster(jobs: Sequence[Job], scheduler: str, stopped: list[signal.Signals]) -> Results:
    try:
        from distributed import Client
    except ImportError:
        raise SettingsError("a scheduler needs Dask: pip install 'vpworkbench[cluster]'") from None
    try:
        client = Client(scheduler, timeout="20s")
    except (OSError, ValueError) as error:
        raise SettingsError(f"scheduler {scheduler}: cannot be reached ({error})") from None
    with client, on_signal(stopped.append):
        environment = {"VPW_RUNS": str(runs_root())}
        futures = {client.submit(_run, job, environment, pure=False): number for number, job in enumerate(jobs)}
        while futures and not stopped:
            done = [future for future in futures if future.done()]
            for future in done:
                error = future.exception()
                yield futures.pop(future), ("failed", _first_lines(error)) if error else future.result()
            time.sleep(0 if done else 0.2)
        if stopped:
            client.cancel(list(futures))
            client.run(execution.stop_all, stopped[0])


def _run(job: Job, environment: dict[str, str]) -> tuple[str, str]:
    """State and error of one job; on a worker of a cluster, or in a thread here."""
    if root := environment.get("VPW_RUNS"):
        os.environ["VPW_RUNS"] = root
    try:
        run_notebook(job.notebook, name=job.name, parameters=job.parameters, environment=environment)
    except KeyboardInterrupt:
        return "stopped", ""
    except Exception as error:  # whatever it is: the other jobs go on, and the report tells it
        return "failed", _first_lines(error)
    return "done", ""


def _first_lines(error: BaseException) -> str:
    return "\n".join(str(error).splitlines()[:3]) or type(error).__name__


def _devices() -> list[str]:
    """The GPUs that jobs may have."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [device for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if device]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _name(prefix: str, change: Mapping[str, Any]) -> str:
    plain = {key: re.sub(r"[^\w.+@-]+", "_", str(value)) for key, value in change.items()}
    name = "-".join(part for part in (prefix, ",".join(f"{key}={value}" for key, value in plain.items())) if part)
    return name if len(name) <= 100 else f"{prefix}-{digest(dict(change))}".lstrip("-")


def _numbered(jobs: Any) -> dict[str, Any]:
    """Single jobs by a name that tells their place in the list."""
    if not isinstance(jobs, (list, tuple, type(None))):
        raise SettingsError("jobs: a list is wanted, of a mapping of parameters for each job")
    return {f"jobs[{number}]": job for number, job in enumerate(jobs or ())}


def _check_keys(place: str, given: Any) -> None:
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise SettingsError(f"{place}: a mapping from names of parameters is wanted (given: {given!r:.60})")
    if not isinstance(given.get("overrides", {}), Mapping) and place != "grid":
        raise SettingsError(f"{place}.overrides: a mapping from settings is wanted (given: {given['overrides']!r:.60})")


def _with_overrides(shared: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    given = {**shared, **change}
    plain = {key: value for key, value in given.items() if "." not in key}
    dotted = {key: value for key, value in given.items() if "." in key}
    return plain | ({"overrides": {**plain.get("overrides", {}), **dotted}} if dotted else {})


def sweep_notebook(notebook: str, *, workers: int = 0, scheduler: str = "", **jobs: Any) -> pd.DataFrame:
    """Run a grid or a list of jobs of a notebook, each in a run folder: what `vpw sweep` does, from Python.

    Parameters
    ----------
    workers, scheduler
        Where the jobs run: see `vpworkbench.jobs.sweep.sweep`, which also says what comes back.
    **jobs
        `grid` or `jobs`, `name`, `parameters`: see `vpworkbench.jobs.sweep.make_jobs`.
    """
    return sweep(make_jobs(notebook, **jobs), workers=workers, scheduler=scheduler)
