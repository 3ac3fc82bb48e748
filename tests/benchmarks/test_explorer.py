"""The benchmark of the explorer at its smallest: one command that ends with numbers and a figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from explorer.browser import NAMES, chromium

from benchmarks import explorer


@pytest.mark.slow
@pytest.mark.browser
def test_one_command_measures_all(runs_folder: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    if not chromium():
        pytest.skip(f"needs one of {', '.join(NAMES)} on PATH, or VPW_CHROMIUM")
    monkeypatch.setattr(explorer, "PEERS", {})  # they draw for minutes, and load scripts from a network
    explorer.main(events=3, tokens="64")
    folder = runs_folder / "bench" / "explorer"
    result = json.loads((folder / "explorer.json").read_text())
    assert set(result["events"]) == {*explorer.TARGETS_MS, "floor: slider to label"}
    assert all(len(part["ms"]) >= 1 and 0 < part["median"] < 60_000 for part in result["events"].values())
    ours = result["pages"]["ours"]["64"]
    assert 1e6 < ours["bytes"] < 8e6 and ours["build_s"] > 0 and ours["first_drawing_s"] > 0
    assert result["first_view_s"] > 0 and "<html" in (folder / "explorer.html").read_text()
    assert "ours         N 64" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bertviz", "circuitsvis"])
def test_pages_of_the_peers(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    view = explorer.wide(layers=2, grid=4, words=10)
    explorer.PEERS[name](view, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    weight = float(view.readings[0].attention[0, 0, 0, 1])
    assert f"{weight:.4f}"[:6] in text and "t25" in text
    view.close()
