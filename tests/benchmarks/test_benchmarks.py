"""The benchmarks run at small sizes; their claims hold where timing is quiet (slow)."""

from __future__ import annotations

import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from benchmarks import probes, recipe, retrieval, train
from benchmarks.measure import in_own_process, in_turns, ratio

REPOSITORY = Path(__file__).parents[2]


def run(module, *arguments: str):
    """A benchmark's command, in this process."""
    import typer

    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, list(arguments))


def test_turns_go_both_ways_and_ratios_are_within_a_turn():
    order = []
    seconds = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"] and {len(times) for times in seconds.values()} == {3}
    assert ratio({"slow": [4.0, 30.0, 8.0], "fast": [2.0, 10.0, 1.0]}, "slow", "fast") == 3.0


def test_a_measurement_has_a_process_of_its_own():
    assert in_own_process(operator.mul, 6, 7) == 42
    assert in_own_process(os.getpid) != os.getpid()


def test_runs_of_another_machine_keep_their_row(tmp_path, capsys):
    pd.DataFrame({"sweep": "s", "run": ["a", "b"], "score": [0.1, 0.2]}).to_csv(tmp_path / "runs.csv", index=False)
    here = pd.DataFrame({"sweep": "s", "run": ["c", "a"], "score": [0.5, 0.4]})
    recipe.report(tmp_path, lambda: here, lambda runs: [str(runs["score"].tolist())], gather=True)
    assert recipe.saved(tmp_path)["run"].tolist() == ["a", "b", "c"]
    assert capsys.readouterr().out == "[0.4, 0.2, 0.5]\n"


@pytest.mark.slow
def test_probes_are_measured_on_every_route(runs_folder):
    done = run(probes, "--tokens", "64", "--repeats", "2", "--layers", "1", "--longest", "0")
    assert done.exit_code == 0, done.output
    result = json.loads((runs_folder / "bench" / "probes" / "probes.json").read_text())
    assert [part["padded"] for part in result["timed"]] == [False, True]
    assert all(part["ratio"]["plain"] == 1 and {"flow", "maps"} <= set(part["ratio"]) for part in result["timed"])
    assert {part["route"] for part in result["peak_mib"]} == set(result["timed"][0]["ratio"])
    assert result["nmi"]["speedup"] > 1 and (runs_folder / "bench" / "probes" / "probes.html").exists()


@pytest.mark.parametrize("given, message", [("300,many", "whole numbers"), ("10", "at least 40")])
def test_wrong_lengths_are_refused(given, message):
    done = run(probes, "--tokens", given)
    assert done.exit_code == 2 and message in done.output


@pytest.mark.slow
def test_a_flow_pass_costs_at_most_a_tenth():
    """Medians of five turns; memory grows by at most a tenth, NMI is five times as fast as scikit-learn."""
    result = probes.measure_probes(lengths=[600, 1200], repeats=5, longest=0)
    for part in result["timed"]:
        assert part["ratio"]["flow"] <= 1.10, part
    peaks = {(part["tokens"], part["route"]): part["mib"] for part in result["peak_mib"]}
    assert peaks[1200, "flow"] <= 1.10 * peaks[1200, "plain"], peaks
    assert probes.measure_nmi()["speedup"] >= 5


@pytest.mark.slow
def test_maps_fail_before_the_flow_pass():
    fails = {route: probes.failing_length(route, 2, 0.5, 2_400) for route in ("maps", "flow")}
    assert fails["maps"] and (fails["flow"] is None or fails["flow"] > fails["maps"])


def test_retrieval_scores_what_the_plain_loop_scores(runs_folder):
    done = run(retrieval, "--preset", "tiny", "--images", "2", "--captions", "20", "--repeats", "1")
    assert done.exit_code == 0 and "times naive" in done.output, done.output
    result = json.loads((runs_folder / "bench" / "retrieval" / "retrieval.json").read_text())
    assert set(result["pairs_per_s"]) == {"naive", "images once", "ours"} and result["largest_difference"] <= 1e-5


@pytest.mark.slow
def test_retrieval_is_three_times_as_fast_as_the_plain_loop():
    result = retrieval.measure_retrieval(name="ablation-224", images=2, captions=100)
    assert result["ratio"]["ours"] >= 3 and result["largest_difference"] <= 1e-5, result


@pytest.mark.slow
def test_training_phases_fill_a_step(runs_folder):
    done = run(train, "--images", "2", "--repeats", "1")
    assert done.exit_code == 0, done.output
    tiny = json.loads((runs_folder / "bench" / "train" / "train.json").read_text())["presets"]["tiny"]
    assert tiny["pairs"] == 8 and 0 < tiny["mfu"]["step"] < 1 and tiny["ratios"]["grouped"] > 1


@pytest.mark.slow
def test_the_gpu_script_runs_dry(runs_folder, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert done.returncode == 0 and set(parts) == {"flow", "training", "ranking", "nmi", "tests"}
    assert not [name for name, part in parts.items() if "error" in part], parts
    assert all(part["wall_s"] > 0 for part in parts.values())
