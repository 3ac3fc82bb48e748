"""What all benchmarks share: turns, medians, memory, a process for each measurement, one report.

Times are ratios of routes that take turns in one process: other work on the machine then slows all of them alike.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch

from vpworkbench.runs import runs_root

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16, as the maker states it."""


def in_turns(routes: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each route; every turn goes in the other direction than the one before."""
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for turn in range(repeats):
        for name in list(routes)[:: 1 if turn % 2 == 0 else -1]:
            synchronise()
            began = time.perf_counter()
            routes[name]()
            synchronise()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds of each route."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def ratio(seconds: dict[str, list[float]], route: str, base: str) -> float:
    """Median over turns of one route's time over another's."""
    return statistics.median(one / other for one, other in zip(seconds[route], seconds[base], strict=True))


def synchronise() -> None:
    """Wait until a GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """The device as reports name it."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def autocast(device: str) -> Any:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device == "cuda" else nullcontext()


def peak_flops(device: str) -> float:
    """Highest FLOPs per second of the device: the maker's figure, else the best rate of a large matrix product."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        if known := [flops for part, flops in PEAK_FLOPS.items() if part in name]:
            return known[0]
    side = 8192 if device == "cuda" else 1024
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    one, other = torch.randn(2, side, side, device=device).to(dtype)
    return 2 * side**3 / min(in_turns({"product": lambda: one @ other}, 5)["product"])


def start_peak(device: str) -> None:
    """Count the peak of memory from here; `peak_mib` reads it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: str) -> float:
    """Peak memory since `start_peak`, in MiB: allocated on a GPU, resident on a CPU (Linux)."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else process_kib("VmHWM") / 2**10


def process_kib(name: str) -> int:
    """A size of this process in KiB, by its name in /proc/self/status; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def in_own_process(task: Callable[..., Any], *arguments: Any) -> Any:
    """The task's result, from a fresh process; None if it was killed.

    Memory that one route has freed must not serve the next. glibc keeps freed blocks of up to 32 MiB, which changed
    the peak at 1,200 tokens by 20%; with a fixed threshold it returns them.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(send, task, arguments))
    with _environment(MALLOC_MMAP_THRESHOLD_="131072"):
        process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return None
    finally:
        process.join()


def _send_result(send: Any, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    send.send(task(*arguments))


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def report(name: str, result: dict[str, Any], figure: go.Figure | None = None) -> Path:
    """Write `<name>.json`, and the figure as `<name>.html`, to `papermill_runs/bench/`; print and return the folder."""
    folder = runs_root() / "bench" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if figure is not None:
        figure.write_html(folder / f"{name}.html", include_plotlyjs="directory")
    print(f"numbers and figure: {folder}")
    return folder
