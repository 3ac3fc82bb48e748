"""Many runs at once: a grid or a list of notebook jobs, each in a run folder, on this machine or on a Dask cluster.

Complete jobs are skipped, interrupted ones resume, and a failed one does not stop the others.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import re
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml
from pydantic import Field

from vpworkbench.errors import SettingsError, first_line
from vpworkbench.jobs import notebooks as execution
from vpworkbench.jobs.notebooks import run_notebook
from vpworkbench.jobs.parameters import check_parameters, find_notebook, notebook_parameters
from vpworkbench.runs import digest, run_folder, runs_root
from vpworkbench.settings import Settings, checked
from vpworkbench.system import on_signal

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """One run: its notebook, its name and its parameters; and the runs that read its model afterwards."""

    notebook: str
    name: str
    parameters: dict[str, Any]
    then: tuple[Job, ...] = ()


class Follower(Settings):
    """A notebook that reads the model of a run as its `checkpoint`, and has the run's name and seed."""

    notebook: str
    of: str = Field("", description="an earlier notebook of `then` whose model it reads; empty: that of the run itself")
    suffix: str = Field("", description="at the end of its run's name; two followers of one notebook need it")
    parameters: dict[str, Any] = {}


class Plan(Settings):
    """The jobs of a sweep, as its yaml file states them."""

    notebook: str
    name: str = Field("", description="the names of the runs begin with it: `masks-masking=random,seed=1`")
    parameters: dict[str, Any] = Field({}, description="parameters that all jobs share")
    grid: dict[str, list[Any]] | None = Field(
        None, description="values to try by parameter; a dotted key is a setting, e.g. `mask.budget: [7, 14]`"
    )
    jobs: list[dict[str, Any]] | None = Field(None, description="parameters of single jobs, with keys as in `grid`")
    then: list[Follower] = Field([], description="what follows each run, in this order")


def read_jobs(path: str | Path) -> list[Job]:
    """The jobs of a yaml file, whose keys are those of `Plan`; a `SettingsError` names all faults."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not yaml ({' '.join(str(error).split())})") from None
    return make_jobs(content)


def make_jobs(content: Any) -> list[Job]:
    """Every job of a list and every combination of a grid, all checked; `content` has the keys of `Plan`."""
    plan = checked(Plan, content)
    changes = list(plan.jobs or ())
    if plan.grid:
        changes += [dict(zip(plan.grid, values, strict=True)) for values in itertools.product(*plan.grid.values())]
    if not changes:
        raise SettingsError("no jobs: give a grid, or jobs")
    jobs, faults = [], []
    for change in changes:
        job = _job(plan.notebook, _name(plan.name, change), _merged(plan.parameters, change), faults)
        jobs.append(job._replace(then=_following(job, plan.then, faults)))
    names = [(Path(one.notebook).stem, one.name) for job in jobs for one in (job, *job.then)]
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    faults += [f"{name}: two jobs of {notebook} have this name" for notebook, name in repeated]
    if faults:
        raise SettingsError("\n".join(faults))
    return jobs


def _job(notebook: str, name: str, parameters: dict[str, Any], faults: list[str]) -> Job:
    """A job whose faults are added to the list."""
    path = find_notebook(notebook)
    try:
        check_parameters(path.stem, notebook_parameters(path), parameters)
        run_folder(path.stem, name)
    except SettingsError as error:
        faults += [f"{name}: {line}" for line in str(error).splitlines()]
    return Job(str(path), name, parameters)


def _following(job: Job, followers: Sequence[Follower], faults: list[str]) -> tuple[Job, ...]:
    """The jobs that follow one, each with the checkpoint NOTEBOOK/NAME of the job that it is `of`."""
    models = {"": f"{Path(job.notebook).stem}/{job.name}"}
    jobs = []
    for follower in followers:
        name = "-".join(filter(None, (job.name, follower.suffix)))
        if follower.of not in models:
            faults.append(f"{name}: of {follower.of!r}, but no earlier notebook of `then` has this name")
            continue
        inherited = {"checkpoint": models[follower.of]} | {k: v for k, v in job.parameters.items() if k == "seed"}
        jobs.append(_job(follower.notebook, name, _merged(inherited, follower.parameters), faults))
        notebook = Path(jobs[-1].notebook).stem
        models[notebook] = f"{notebook}/{name}"
    return tuple(jobs)


def _name(prefix: str, change: dict[str, Any]) -> str:
    values = {key: re.sub(r"[^\w.+@-]+|\.{2,}", "_", str(value)) for key, value in change.items()}
    name = "-".join(filter(None, (prefix, ",".join(f"{key}={value}" for key, value in values.items()))))
    return name if len(name) <= 100 else f"{prefix}-{digest(change)}".lstrip("-")


def _merged(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A job's parameters: its own before the shared ones, setting by setting."""
    shared, own = _with_overrides(shared), _with_overrides(own)
    overrides = [given["overrides"] for given in (shared, own) if "overrides" in given]
    if len(overrides) == 2:
        wrong = [one for one in overrides if not isinstance(one, dict)]  # the check of parameters reports it
        own["overrides"] = wrong[0] if wrong else overrides[0] | overrides[1]
    return shared | own


def _with_overrides(given: dict[str, Any]) -> dict[str, Any]:
    """Parameters with dotted keys moved into `overrides`."""
    plain = {key: value for key, value in given.items() if "." not in key}
    dotted = {key: value for key, value in given.items() if "." in key}
    if dotted and isinstance(plain.setdefault("overrides", {}), dict):  # else the check of parameters reports it
        plain["overrides"] = plain["overrides"] | dotted
    return plain


def sweep(jobs: Sequence[Job], *, workers: int = 0, scheduler: str = "") -> pd.DataFrame:
    """Run all jobs; one row each: `notebook`, `name`, `state` (done or failed) and the first lines of the `error`.

    `workers` jobs run at once on this machine; 0: one for each GPU, or one. Each job sees one GPU. Or `scheduler` is
    the address of a Dask scheduler. Each of its workers should have one thread and one GPU; all share the disk of the
    run folders. If a worker dies, another one resumes its jobs from their last checkpoint.

    SIGINT and SIGTERM become a `KeyboardInterrupt` after every running job has written a checkpoint.
    """
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
    """Run jobs in threads, each of which waits for a kernel, a process of its own."""
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
            return _run(job, environment, stopped)
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
                yield futures.pop(future), ("failed", first_line(error)) if error else future.result()
            time.sleep(0 if done else 0.2)
        if stopped:
            client.cancel(list(futures))
            client.run(execution.stop_all, stopped[0])


def _run(job: Job, environment: dict[str, str], stopped: Sequence[signal.Signals] = ()) -> tuple[str, str]:
    """Run one job and what follows it, on a worker of a cluster or in a thread here; returns its state and error.

    Nothing more starts once there is a signal in `stopped`.
    """
    if root := environment.get("VPW_RUNS"):
        os.environ["VPW_RUNS"] = root
    try:
        for one in (job, *job.then):
            if stopped:
                return "stopped", ""
            run_notebook(one.notebook, name=one.name, parameters=one.parameters, environment=environment)
    except KeyboardInterrupt:
        return "stopped", ""
    except Exception as error:  # any type: it is reported, and the other jobs continue
        return "failed", "\n".join(str(error).splitlines()[:3]) or type(error).__name__
    return "done", ""


def _devices() -> list[str]:
    """The GPUs that jobs may have."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [device for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if device]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def sweep_notebook(notebook: str, *, workers: int = 0, scheduler: str = "", **plan: Any) -> pd.DataFrame:
    """Run a grid or a list of jobs of a notebook, as `vpw sweep` does; `plan` has the other keys of `Plan`."""
    return sweep(make_jobs({"notebook": notebook, **plan}), workers=workers, scheduler=scheduler)
