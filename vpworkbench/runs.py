"""Run folders: what a run was made with, what it logs, and its results.

A run is a folder, `papermill_runs/<notebook>/<name>/`: `config.json` is written first, `metrics.jsonl` grows
while it runs, and `summary.json` completes it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
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
from pathlib import Path
from typing import Any

import pandas as pd

from vpworkbench.errors import RunError, SettingsError
from vpworkbench.settings import Settings
from vpworkbench.system import lock, write_atomically

GALLERY = "gallery"  # the folder of committed examples; no notebook may have this name
PACKAGES = ("vpworkbench", "torch", "torchvision", "timm", "transformers", "tokenizers", "numpy")
MOST_DIFFERENCES = 8  # shown when a run folder has other settings


class Run:
    """One run, by its folder; `open_run` creates it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trained_s = _seconds_trained(folder / "metrics.jsonl")
        self._opened_s = time.monotonic()
        self._task: tuple[str, float, int] = ("", 0.0, 0)  # name, start, and count at the start
        self._reported_s = -math.inf

    def __repr__(self) -> str:
        return f"Run({self.folder}, {'complete' if self.is_complete else 'not complete'})"

    @property
    def is_complete(self) -> bool:
        """True once `summary.json` exists."""
        return (self.folder / "summary.json").exists()

    @property
    def wall_s(self) -> float:
        """Seconds since the run was opened, plus the training time in the metrics of earlier processes."""
        return round(time.monotonic() - self._opened_s + self.trained_s, 1)

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
        lines = _metric_lines(self.folder / "metrics.jsonl")
        return pd.DataFrame([json.loads(line) for line in lines] or {"step": []})

    def truncate_metrics(self, step: int) -> None:
        """Drop all lines after `step` and a half-written last line, before a resumed run writes them again."""
        path = self.folder / "metrics.jsonl"
        lines = [line for line in _metric_lines(path) if json.loads(line)["step"] <= step]
        if path.exists():
            write_atomically(path, "".join(line + "\n" for line in lines))

    def progress(self, task: str, done: int, total: int) -> None:
        """Report progress in `progress.json`, at most once a second, and always at the end."""
        now = time.monotonic()
        if task != self._task[0]:
            self._task, self._reported_s = (task, now, done), -math.inf
        if done < total and now - self._reported_s < 1:
            return
        self._reported_s = now
        _, start_s, first = self._task
        left_s = (now - start_s) / (done - first) * (total - done) if done > first else None
        state = {"what": task, "done": done, "total": total, "left_s": left_s}
        write_atomically(self.folder / "progress.json", json.dumps(state), durable=False)

    def write_summary(self, **values: Any) -> None:
        """Write `summary.json`, which completes the run: all other files of the run must be written before."""
        write_atomically(self.folder / "summary.json", json.dumps(values, indent=2, default=_number) + "\n")

    def summary(self) -> dict[str, Any]:
        """The values of `write_summary`; a `RunError` while the run is not complete."""
        if not self.is_complete:
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

    def save_page(self, name: str, page: str) -> Path:
        """Save an HTML page as `figures/<name>.html`."""
        write_atomically(self.page(name), page)
        return self.page(name)


def open_run(notebook: str, settings: Settings, *, name: str = "") -> Run:
    """Create the run folder of these settings with its `config.json`, or open the existing one.

    Parameters
    ----------
    notebook : str
        The notebook's name, without its suffix.
    settings : Settings
        Resolved: everything that decides the result, the seed included.
    name : str
        The run's name; empty takes a hash of the settings.

    Raises
    ------
    SettingsError
        If the name cannot be a folder's, or the folder holds a run with other settings: each is named.
    RunError
        If the folder's `config.json` cannot be read.
    """
    return open_folder(run_folder(notebook, name or settings_hash(settings)), notebook, settings)


def open_folder(folder: Path, notebook: str, settings: Settings) -> Run:
    """As `open_run`, in any folder."""
    config = folder / "config.json"
    if config.exists():
        _refuse_other_settings(folder, read_json(config).get("settings", {}), settings)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(config, json.dumps(_config(notebook, settings), indent=2) + "\n")
    return Run(folder)


def settings_hash(settings: Settings) -> str:
    """Ten hexadecimal digits that equal settings share."""
    return digest(settings.model_dump(mode="json"))


def digest(values: dict[str, Any]) -> str:
    """Ten hexadecimal digits that equal values share."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def run_folder(notebook: str, name: str) -> Path:
    """The folder of the run of this name, whether it exists or not; a `SettingsError` for an unusable name."""
    if _safe_name(notebook) == GALLERY:
        raise SettingsError(f"{GALLERY!r} holds the committed examples; give the notebook another name")
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
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); delete the run's folder to start again") from None
    if not isinstance(values, dict):
        raise RunError(f"{path}: holds no JSON object; delete the run's folder to start again")
    return values


def _safe_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.+=,@ -]{0,99}", name) or name != name.strip() or ".." in name:
        raise SettingsError(
            f"name: {name!r:.60} cannot name a folder; use letters, digits and . _ + = , @ - "
            "(at most 100, a letter or digit first)"
        )
    return name


def _config(notebook: str, settings: Settings) -> dict[str, Any]:
    return {
        "notebook": notebook,
        "settings": settings.model_dump(mode="json"),
        "seed": getattr(settings, "seed", None),
        "versions": {"python": sys.version.split()[0]} | {name: _version(name) for name in PACKAGES},
        "git": _git_revision(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> dict[str, Any] | None:
    """The revision of the package's own repository, and whether its files have changed; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if not git("ls-files", "."):
            return None  # an environment inside another project's repository
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
        more = [f"  and {len(lines) - MOST_DIFFERENCES} more"] if len(lines) > MOST_DIFFERENCES else []
        raise SettingsError(
            "\n".join(
                [f"{folder} holds a run with other settings:", *lines[:MOST_DIFFERENCES], *more]
                + ["take another name, or delete that folder to start again"]
            )
        )


def _number(value: Any) -> float | None:
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, (bool, int, float)):
        raise TypeError(f"expected a number, not {value!r:.60}")
    return value if math.isfinite(value) else None  # JSON has neither nan nor inf


def _seconds_trained(metrics: Path) -> float:
    seconds, before = 0.0, 0
    for line in map(json.loads, _metric_lines(metrics)):
        seconds += (line.get("step_s") or 0.0) * (line["step"] - before)
        before = line["step"]
    return seconds


def _metric_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    *complete, _ = path.read_text(encoding="utf-8").split("\n")  # a kill may have cut the last line off
    for number, line in enumerate(complete, start=1):
        try:
            json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{path}, line {number}: not a line of metrics; mend or delete it") from None
    return complete
