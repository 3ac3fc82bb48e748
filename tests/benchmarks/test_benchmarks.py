"""What a probe costs: the measure works, and holds where timing is quiet."""

from __future__ import annotations

import json

import pytest

from vpworkbench.bench import _deaths, _installed, nmi_bench, probe_bench, write_report
from vpworkbench.bench_retrieval import partial_run, retrieval_bench
from vpworkbench.cli import main


@pytest.mark.slow
def test_bench_reports_every_route(tmp_path):
    shown = []
    result = probe_bench(lengths=[64], repeats=2, layers=1, longest=0, nmi=False, progress=lambda *s: shown.append(s))
    assert [part["padded"] for part in result["timed"]] == [False, True]
    assert all(
        part["ratio"]["plain"] == 1 and set(part["ratio"]) >= {"plain", "flow", "maps"} for part in result["timed"]
    )
    assert {part["route"] for part in result["peak_mib"]} == set(_installed())
    assert all(part["mib"] >= 0 for part in result["peak_mib"])
    assert ("timing", 2, 2) in shown
    page = write_report(result | {"nmi": {}}, tmp_path)
    assert page.exists() and json.loads((tmp_path / "probes.json").read_text())["timed"] == result["timed"]


def test_nmi_is_timed_against_scikit_learn():
    found = nmi_bench(layers=2, samples=3, tokens=20, channels=16, repeats=1)
    assert set(found) == {"ours", "scikit_learn", "speedup"} and min(found.values()) > 0


@pytest.mark.parametrize("given, message", [("300,many", "whole numbers"), ("10", "at least 40")])
def test_wrong_lengths_are_refused(given, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "probes", "--tokens", given])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_flow_pass_costs_a_tenth_at_most():
    """Medians of five turns in one process; memory grows by a tenth at most, NMI is five times scikit-learn."""
    result = probe_bench(lengths=[600, 1200], repeats=5, longest=0)
    for part in result["timed"]:
        assert part["ratio"]["flow"] <= 1.10, part
    peaks = {(part["tokens"], part["route"]): part["mib"] for part in result["peak_mib"]}
    assert peaks[1200, "flow"] <= 1.10 * peaks[1200, "plain"], peaks
    assert result["nmi"]["speedup"] >= 5, result["nmi"]


@pytest.mark.slow
def test_maps_die_before_the_flow_pass():
    deaths = _deaths(2, 0.5, 2_400, None)
    assert deaths["maps"] and (deaths["flow"] is None or deaths["flow"] > deaths["maps"])


def test_retrieval_is_timed_against_the_plain_loop_and_scores_the_same(runs_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "retrieval", "--preset", "tiny", "--images", "2", "--captions", "20", "--repeats", "2"])
    assert stop.value.code == 0 and "times naive" in capsys.readouterr().out
    result = json.loads((runs_folder / "bench" / "retrieval" / "retrieval.json").read_text())
    assert set(result["pairs_per_s"]) == set(result["ratio"]) == {"naive", "images once", "ours"}
    assert result["ratio"]["naive"] == 1 and result["largest_difference"] <= 1e-5
    assert (runs_folder / "bench" / "retrieval" / "retrieval.html").exists()


def test_a_part_of_a_large_matrix_tells_how_long_the_whole_takes():
    part = partial_run("tiny", 2, 30, device="cpu")
    assert part["pairs_per_s"] == pytest.approx(60 / part["seconds"])
    assert part["extrapolated_minutes"] == pytest.approx(5e6 / part["pairs_per_s"] / 60)


@pytest.mark.slow
def test_retrieval_is_three_times_as_fast_as_the_plain_loop():
    result = retrieval_bench(name="ablation-224", images=2, captions=100)
    assert result["ratio"]["ours"] >= 3 and result["largest_difference"] <= 1e-5, result
