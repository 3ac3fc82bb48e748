"""Run folders: what a run was made with, what it logs, and its results.

A run is a folder, `papermill_runs/<notebook>/<name>/`: `config.json` is written first, `metrics.jsonl` grows
while it runs, and `summary.json` completes it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from vpworkbench import __version__
from vpworkbench.errors import RunError, SettingsError
from vpworkbench.settings import Settings
from vpworkbench.system import lock, write_atomically

GALLERY = "gallery"  # the folder of committed examples
PACKAGES = ("torch", "torchvision", "timm", "transformers", "tokenizers", "numpy")


class Run:
    """One run, by its folder; `open_run` creates it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened_s = time.monotonic()
        self._trained_s, step = 0.0, 0
        for line in self._metric_lines():
            self._trained_s += (line.get("step_s") or 0.0) * (line["step"] - step)
            step = line["step"]
        self._reported: tuple[str, float] = ("", -math.inf)  # task and time

    @property
    def wall_s(self) -> float:
        """Seconds since the run was opened, plus the training time in the metrics of earlier processes."""
        return round(time.monotonic() - self._opened_s + self._trained_s, 1)

    def writing(self) -> AbstractContextManager[None]:
        """Be the only writer of metrics and checkpoints; waits for the orphan of a killed job to end."""
        return lock(self.folder / ".writer.lock", patience_s=30)

    def log(self, step: int, **values: float) -> None:
        """Append one line to `metrics.jsonl`: the step and any numbers (also scalar tensors and arrays)."""
        line = {"step": step} | {key: _number(value) for key, value in values.items()}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self) -> pd.DataFrame:
        """The lines of `metrics.jsonl`, in order, without a half-written last line."""
        return pd.DataFrame(self._metric_lines() or {"step": []})

    def truncate_metrics(self, step: int) -> None:
        """Drop all lines after `step` and a half-written last line, before a resumed run writes them again."""
        lines = [json.dumps(line) + "\n" for line in self._metric_lines() if line["step"] <= step]
        if (path := self.folder / "metrics.jsonl").exists():
            write_atomically(path, "".join(lines))

    def _metric_lines(self) -> list[dict[str, Any]]:
        path, found = self.folder / "metrics.jsonl", []
        complete = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # a kill may cut the last
        for number, line in enumerate(complete, start=1):
            try:
                found.append(json.loads(line))
                found[-1]["step"]
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{path}, line {number}: not a line of metrics; mend or delete it") from None
        return found

    def progress(self, task: str, done: int, total: int) -> None:
        """Report progress in `progress.json`, at most once a second, and always at the start and the end of a task."""
        now, (before, reported_s) = time.monotonic(), self._reported
        if task == before and done < total and now - reported_s < 1:
            return
        self._reported = task, now
        state = {"what": task, "done": done, "total": total}
        write_atomically(self.folder / "progress.json", json.dumps(state), durable=False)

    def write_summary(self, **values: Any) -> None:
        """Write `summary.json`, which completes the run: all other files of the run must be written before."""
        write_atomically(self.folder / "summary.json", json.dumps(values, indent=2, default=_number) + "\n")

    def summary(self) -> dict[str, Any]:
        """The values of `write_summary`; a `RunError` while the run is not complete."""
        if not (self.folder / "summary.json").exists():
            raise RunError(f"{self.folder}: not complete (no summary.json); the same call resumes it")
        return read_json(self.folder / "summary.json")

    def show(self, name: str, figure: Any) -> Any:
        """Save a plotly figure as `figures/<name>.html` and return it for the notebook to draw.

        The pages share plotly.min.js and need no network.
        """
        figure.write_html(self.page(name), include_plotlyjs="directory")
        return figure

    def page(self, name: str) -> Path:
        """The path of a figure's page, `figures/<name>.html`; the folder is created."""
        path = self.folder / "figures" / f"{_safe_name(name)}.html"
        path.parent.mkdir(exist_ok=True)
        return path


def open_run(notebook: str, settings: Settings, *, name: str = "") -> Run:
    """Create the run folder of these settings with its `config.json`, or open the existing one.

    The settings are everything that decides the result, the seed included. An empty name takes a hash of them. A
    `SettingsError` if the name cannot be a folder's, or the folder holds a run with other settings: each is named. A
    `RunError` if its `config.json` cannot be read.
    """
    return open_folder(run_folder(notebook, name or digest(settings.model_dump(mode="json"))), notebook, settings)


def open_folder(folder: Path, notebook: str, settings: Settings) -> Run:
    """As `open_run`, in any folder."""
    config = folder / "config.json"
    if config.exists():
        _refuse_other_settings(folder, read_json(config).get("settings", {}), settings)
    else:
        versions = {"python": sys.version.split()[0], "vpworkbench": __version__}
        content = {
            "notebook": notebook,
            "settings": settings.model_dump(mode="json"),
            "seed": getattr(settings, "seed", None),
            "versions": versions | {name: version(name) for name in PACKAGES},
            "git": _git_revision(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(config, json.dumps(content, indent=2) + "\n")
    return Run(folder)


def digest(values: dict[str, Any]) -> str:
    """Ten hexadecimal digits that equal values share."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def run_folder(notebook: str, name: str) -> Path:
    """The folder of the run of this name, whether it exists or not; a `SettingsError` for an unusable name."""
    return runs_root() / notebook / _safe_name(name)


def runs_root() -> Path:
    """`$VPW_RUNS` if set, else `papermill_runs/` in the repository of the current folder or of the package."""
    if chosen := os.environ.get("VPW_RUNS"):
        return Path(chosen).absolute()
    for root in repositories():
        return root / "papermill_runs"
    raise FileNotFoundError(
        f"no folder for runs: neither {Path.cwd()} nor the package is in a repository with notebooks/; "
        "set VPW_RUNS to a folder for runs"
    )


def shipped_run() -> Path:
    """The run of the tiny model that ships with the repository, in `papermill_runs/gallery/`."""
    for root in repositories():
        if (folder := root / "papermill_runs" / GALLERY / "01_pretrain-tiny").is_dir():
            return folder
    raise FileNotFoundError("the tiny model ships with the repository: work in a clone of it, or name a checkpoint")


def repositories() -> Iterator[Path]:
    """The folders with `notebooks/` that enclose the current folder, and the package."""
    for start in (Path.cwd(), Path(__file__).parent):
        for folder in (start, *start.parents):
            if (folder / "notebooks").is_dir():
                yield folder
                break


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted path."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run; a `RunError` if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); delete the run's folder to start again") from None
    return values


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings in the `config.json` of a run; a `RunError` if there are none."""
    file = folder / "config.json"
    content = read_json(file)
    if not isinstance(content.get("settings"), dict):
        raise RunError(f"{file}: has no settings, so this is not the folder of a run; `vpw runs` lists them")
    return content["settings"]


def _safe_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.+=,@ -]{0,99}", name) or name != name.strip() or ".." in name:
        raise SettingsError(
            f"name: {name!r:.60} cannot name a folder; use letters, digits and . _ + = , @ - "
            "(at most 100, a letter or digit first)"
        )
    return name


def _git_revision() -> dict[str, Any] | None:
    """The revision of the package's own repository, and whether its files have changed; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # fails for an environment inside another project's repository
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "."))}
    except (OSError, subprocess.SubprocessError):
        return None


def _refuse_other_settings(folder: Path, recorded: dict[str, Any], settings: Settings) -> None:
    before, now = dict(flat(recorded)), dict(flat(settings.model_dump(mode="json")))
    lines = [
        f"  {key}: {before.get(key, '(absent)')!r:.60} there, {now.get(key, '(absent)')!r:.60} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, "(absent)") != now.get(key, "(absent)")
    ]
    if lines:
        remedy = "take another name, or delete that folder to start again"
        raise SettingsError("\n".join([f"{folder} holds a run with other settings; {remedy}", *lines]))


def _number(value: Any) -> float | None:
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, (bool, int, float)):
        raise TypeError(f"expected a number, not {value!r:.60}")
    return value if math.isfinite(value) else None  # JSON has neither nan nor inf
