"""How fast does `tiny` learn? Minutes from the shipped visual start to held-out ITM 0.95 and masked words 0.60.

make speedrun        or        python -m benchmarks.speedrun --help

Nothing is reused: scenes, vocabulary and fusion are made anew in a folder that is deleted afterwards.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from typing import Annotated, Any

import typer

from benchmarks.measure import device_name, report
from vpworkbench.runs import open_run, read_json
from vpworkbench.settings import pretrain_settings
from vpworkbench.train.evaluate import evaluate
from vpworkbench.train.pretrain import prepare, pretrain

GOALS = {"itm_accuracy": 0.95, "mlm_with_image": 0.60}


def speedrun(*, steps: int, seed: int) -> dict[str, Any]:
    """Train once; minutes of each part, and the held-out results, which are measured after the clock has stopped."""
    settings = pretrain_settings(steps=steps, seed=seed)
    run = open_run("01_pretrain", settings, name="speedrun")
    began = time.perf_counter()
    prepared = prepare(settings)
    loaded = time.perf_counter()
    pretrain(run, prepared, settings)
    trained = time.perf_counter()
    result = evaluate(prepared.model, prepared.splits["val"], settings.data)
    return {
        "minutes": (trained - began) / 60,
        "minutes_of_data": (loaded - began) / 60,
        "minutes_of_training": (trained - loaded) / 60,
        **{name: getattr(result, name).mean for name in GOALS},
        "steps": steps,
        "seed": seed,
        "device": device_name("cpu"),
        "git": read_json(run.folder / "config.json")["git"],
    }


def main(
    steps: Annotated[int, typer.Option(help="optimiser steps of 16 images, each with four texts")] = 1_100,
    seed: Annotated[int, typer.Option(help="of the fusion's weights, the order and the masks")] = 0,
) -> None:
    """Exit code 1 if a goal is missed."""
    kept = os.environ.copy()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"VPW_RUNS": folder, "VPW_CACHE": folder}
        try:
            result = speedrun(steps=steps, seed=seed)
        finally:
            os.environ.clear()
            os.environ.update(kept)
    report("speedrun", result)
    print("{minutes:.1f} minutes: data {minutes_of_data:.1f}, training {minutes_of_training:.1f}".format(**result))
    for name, goal in GOALS.items():
        print(f"{name}: {result[name]:.3f} (goal {goal})")
    sys.exit(int(any(result[name] < goal for name, goal in GOALS.items())))


if __name__ == "__main__":
    typer.run(main)
