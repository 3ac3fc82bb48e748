"""`vpw bench explorer` at its smallest: one command that ends with numbers and a figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import NAMES, chromium

from vpworkbench import bench_explorer
from vpworkbench.cli import main


@pytest.mark.slow
@pytest.mark.browser
def test_one_command_measures_all(runs_folder: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    if not chromium():
        pytest.skip(f"needs one of {', '.join(NAMES)} on PATH, or VPW_CHROMIUM")
    monkeypatch.setattr(bench_explorer, "PEERS", {})  # they draw for minutes, and from a network
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "explorer", "--events", "3", "--tokens", "64"])
    folder = runs_folder / "bench" / "explorer"
    told = json.loads((folder / "bench.json").read_text())
    assert set(told["events"]) == {*bench_explorer.TARGETS_MS, "floor: slider to label"}
    assert all(len(part["ms"]) >= 1 and 0 < part["median"] < 60_000 for part in told["events"].values())
    ours = told["pages"]["ours"]["64"]
    assert 1e6 < ours["bytes"] < 8e6 and ours["build_s"] > 0 and ours["first_drawing_s"] > 0
    assert told["first_view_s"] > 0 and "<html" in (folder / "explorer.html").read_text()
    assert "ours         N 64" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bertviz", "circuitsvis"])
def test_pages_of_the_peers(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    view = bench_explorer.wide(layers=2, grid=4, words=10)
    bench_explorer.PEERS[name](view, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    weight = float(view.readings[0].attention[0, 0, 0, 1])
    assert f"{weight:.4f}"[:6] in text and "t25" in text
    view.close()
