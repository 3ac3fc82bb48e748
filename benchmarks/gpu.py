"""Everything that this project claims about a GPU, in one run of at most eight minutes.

    python -m benchmarks.gpu            on a GPU
    python -m benchmarks.gpu --dry      all parts at small sizes on a CPU, a test of the script itself

Each part runs in a process of its own with a time limit; one that fails or takes too long is reported and the next one
starts. All results go into one JSON file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from benchmarks.measure import device_name, in_turns, medians, peak_mib, ratio, report, start_peak
from benchmarks.probes import measure_nmi, random_bert, routes_of
from benchmarks.retrieval import score_part
from benchmarks.train import measure_training


def test_suite(device: str) -> dict[str, Any]:
    """The tests marked `gpu`; on a CPU they skip."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, capture_output=True, text=True)
    return {"exit_code": done.returncode, "last_lines": done.stdout.splitlines()[-3:]}


def flow(device: str) -> dict[str, Any]:
    """Inter-Modality Flow at 32,768 tokens: time over the plain forward, peak memory of each."""
    length, layers = (32_768, 12) if device == "cuda" else (256, 2)
    routes = routes_of(random_bert(layers, length, device), length, False)
    routes = {name: routes[name] for name in ("plain", "flow")}
    peaks = {}
    for name, route in routes.items():
        start_peak(device)
        route()
        peaks[name] = peak_mib(device)
    seconds = in_turns(routes, 3)
    return {"tokens": length, "seconds": medians(seconds), "ratio": ratio(seconds, "flow", "plain"), "peak_mib": peaks}


def training(device: str) -> dict[str, Any]:
    """A pre-training step of `paper-384`: pairs per second, MFU, data wait, against Hugging Face's ViLT."""
    name, images = ("paper-384", 16) if device == "cuda" else ("tiny", 2)
    return measure_training([name], images=images, repeats=3, device=device, vilt=device == "cuda")


def ranking(device: str) -> dict[str, Any]:
    """Some images of a Flickr 1K ranking, scored with all 5,000 captions; extrapolated to 1,000 images."""
    name, images, captions = ("paper-384", 32, 5_000) if device == "cuda" else ("tiny", 2, 20)
    return score_part(name, images, captions, device=device)


def nmi(device: str) -> dict[str, Any]:
    """NMI of 13 layers against a loop over scikit-learn."""
    sizes = {} if device == "cuda" else {"layers": 2, "samples": 2, "tokens": 20, "channels": 16}
    return measure_nmi(device=device, repeats=1, **sizes)


class Part(NamedTuple):
    """One measurement and the seconds that it may take."""

    measure: Callable[[str], dict[str, Any]]
    limit_s: int


PARTS = {
    "flow": Part(flow, 60),
    "training": Part(training, 120),
    "ranking": Part(ranking, 90),
    "nmi": Part(nmi, 60),
    "tests": Part(test_suite, 150),
}


def run_part(name: str, device: str) -> dict[str, Any]:
    """The part's result from a process of its own, or the reason why there is none; with its seconds."""
    began = time.monotonic()
    limit_s = PARTS[name].limit_s * (1 if device == "cuda" else 4)  # a dry run may share its cores with other work
    command = [sys.executable, "-m", "benchmarks.gpu", "--only", name, "--device", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-2_000:]}
    except subprocess.TimeoutExpired:
        result = {"error": f"no result within {limit_s} s"}
    return result | {"wall_s": round(time.monotonic() - began, 1)}


def main(
    dry: Annotated[bool, typer.Option("--dry", help="small sizes on a CPU")] = False,
    only: Annotated[str, typer.Option(help="print the JSON of one part, in this process")] = "",
    device: Annotated[str, typer.Option(help="device of --only")] = "cuda",
    out: Annotated[str, typer.Option(help="also write the JSON to this file")] = "",
) -> None:
    """Measure every GPU claim of the project."""
    if only:
        print(json.dumps(PARTS[only].measure(device)))
        return
    device = "cpu" if dry else "cuda"
    if not dry and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no CUDA device; try the script itself with --dry")
    result: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "dry": dry, "parts": {}}
    for name in PARTS:
        result["parts"][name] = run_part(name, device)
        print(f"{name}: {json.dumps(result['parts'][name])[:300]}", flush=True)
        if out:  # after each part: what is measured is kept if the machine goes away
            Path(out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    report("gpu", result)


if __name__ == "__main__":
    typer.run(main)
