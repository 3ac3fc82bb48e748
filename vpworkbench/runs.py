"""Run folders: what a run was made with, what it logs, what came out.

A run is a folder, `papermill_runs/<notebook>/<name>/`: `config.json` is written first, `metrics.jsonl` grows
while it runs, `summary.json` comes last and makes it complete. Everything that must not be half written is
written beside its place and renamed.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import logging
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

logger = logging.getLogger(__name__)

GALLERY = "gallery"  # committed examples lie beside the runs, under a name no notebook may have
PACKAGES = ("vpworkbench", "torch", "torchvision", "timm", "transformers", "tokenizers", "numpy")


class Run:
    """One run: its folder and the settings it was opened with; made by `open_run`."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings
        self.earlier_s = 0.0  # what earlier processes trained
        self._opened_s = time.monotonic()
        self._began: tuple[str, float, int] = ("", 0.0, 0)  # what, when, and at how many it was first seen
        self._shown_s = -math.inf

    def __repr__(self) -> str:
        return f"Run({self.folder}, {'complete' if self.is_complete else 'not complete'})"

    @property
    def is_complete(self) -> bool:
        """True once `summary.json` is there."""
        return (self.folder / "summary.json").exists()

    @property
    def wall_s(self) -> float:
        """Seconds since the run was opened, and what earlier processes trained: `step_s` of their metrics, added up."""
        return round(time.monotonic() - self._opened_s + self.earlier_s, 1)

    def writing(self) -> AbstractContextManager[None]:
        """Be the one writer of the run's metrics and checkpoints; an orphan of a killed job is waited for."""
        return lock(self.folder / ".writer.lock", patience_s=30)

    def log(self, step: int, **values: float) -> None:
        """Append one line to `metrics.jsonl`: the step and any numbers (scalar tensors and arrays too)."""
        line = {"step": step} | {key: _number(value) for key, value in values.items()}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self) -> pd.DataFrame:
        """The lines of `metrics.jsonl`, in order; a half-written last line is left out."""
        lines = _metric_lines(self.folder / "metrics.jsonl")
        return pd.DataFrame([json.loads(line) for line in lines] or {"step": []})

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines after `step`, and a half-written last line: what a resumed run will write again."""
        path = self.folder / "metrics.jsonl"
        lines = [line for line in _metric_lines(path) if json.loads(line)["step"] <= step]
        if path.exists():
            write_atomically(path, "".join(line + "\n" for line in lines))

    def progress(self, what: str, done: int, total: int) -> None:
        """Tell `progress.json` how far `what` is; at most one write a second, and always the last one."""
        now = time.monotonic()
        if what != self._began[0]:
            self._began, self._shown_s = (what, now, done), -math.inf
        if done < total and now - self._shown_s < 1:
            return
        self._shown_s = now
        since_s, new = now - self._began[1], done - self._began[2]
        left_s = since_s / new * (total - done) if new else None
        state = {"what": what, "done": done, "total": total, "left_s": left_s}
        write_atomically(self.folder / "progress.json", json.dumps(state), durable=False)

    def write_summary(self, **values: Any) -> None:
        """Write `summary.json`, which completes the run; nothing of the run may be written after it.

        Raises
        ------
        OSError
            For example on a full disk; no `summary.json` is left, or the earlier one as it was.
        """
        write_atomically(self.folder / "summary.json", json.dumps(values, indent=2, default=_number) + "\n")

    def summary(self) -> dict[str, Any]:
        """What `write_summary` wrote; `RunError` while the run is not complete."""
        if not self.is_complete:
            raise RunError(f"{self.folder}: not complete (no summary.json); call the run again, it resumes")
        return read_json(self.folder / "summary.json")

    def show(self, name: str, figure: Any) -> Any:
        """Save a plotly figure as `figures/<name>.html`, and return it for the notebook to draw.

        The pages share plotly.min.js and need no network.
        """
        figure.write_html(self.page(name), include_plotlyjs="directory")
        return figure

    def page(self, name: str) -> Path:
        """Where the page of a figure is saved; the folder is made."""
        path = self.folder / "figures" / f"{_safe_name(name)}.html"
        path.parent.mkdir(exist_ok=True)
        return path

    def save_page(self, name: str, page: str) -> Path:
        """Save an HTML page as `figures/<name>.html`."""
        write_atomically(self.page(name), page)
        return self.page(name)


def open_run(notebook: str, settings: Settings, *, name: str = "") -> Run:
    """The run folder of these settings: made with its `config.json`, or the one that is there.

    Parameters
    ----------
    notebook : str
        The notebook's name, without its suffix.
    settings : Settings
        Resolved; whatever decides the result, the seed included.
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
    """As `open_run`, in a folder of one's own choice."""
    config = folder / "config.json"
    if config.exists():
        _refuse_other_settings(folder, read_json(config).get("settings", {}), settings)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(config, json.dumps(_config(notebook, settings), indent=2) + "\n")
    run = Run(folder, settings)
    run.earlier_s = _seconds_trained(folder / "metrics.jsonl")
    return run


def settings_hash(settings: Settings) -> str:
    """Ten hexadecimal digits that equal settings share."""
    return digest(settings.model_dump(mode="json"))


def run_folder(notebook: str, name: str) -> Path:
    """Where the run of this name lies, whether it exists or not; `SettingsError` for an unusable name."""
    if _safe_name(notebook) == GALLERY:
        raise SettingsError(f"{GALLERY!r} holds the committed examples; give the notebook another name")
    return runs_root() / notebook / _safe_name(name)


def runs_root() -> Path:
    """`$VPW_RUNS` where set, else `papermill_runs/` in the repository of the current folder or the package.

    Raises
    ------
    FileNotFoundError
        If there is neither: the remedy is to set `VPW_RUNS`.
    """
    if chosen := os.environ.get("VPW_RUNS"):
        return Path(chosen).absolute()
    for root in repositories():
        return root / "papermill_runs"
    raise FileNotFoundError(
        f"no folder for runs: neither {Path.cwd()} nor the package lies in a repository with notebooks/; "
        "set VPW_RUNS to the folder that shall hold them"
    )


def shipped_run() -> Path:
    """The run of the tiny model that ships with the repository, in `papermill_runs/gallery/`."""
    for root in repositories():
        if (folder := root / "papermill_runs" / GALLERY / "01_pretrain-tiny").is_dir():
            return folder
    raise FileNotFoundError("the tiny model ships with the repository: work in a clone of it, or name a checkpoint")


def list_runs(root: Path | None = None) -> pd.DataFrame:
    """All runs, one row each: notebook, name, complete, seed, and what their summaries say.

    A folder that cannot be read keeps its row; the column `fault` then tells why.
    """
    root = Path(root) if root else runs_root()
    folders = [config.parent for config in sorted(root.glob("*/*/config.json"))]
    rows = [summary_row(folder) for folder in folders if folder.parent.name != GALLERY]
    return pd.DataFrame(rows, columns=None if rows else ["notebook", "name", "complete", "seed"])


def repositories() -> Iterator[Path]:
    for start in (Path.cwd(), Path(__file__).parent):
        for folder in (start, *start.parents):
            if (folder / "notebooks").is_dir():
                yield folder
                break


def _safe_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.+=,@ -]{0,99}", name) or name != name.strip() or ".." in name:
        raise SettingsError(
            f"name: {name!r:.60} cannot name a folder of its own; use letters, digits and . _ + = , @ - "
            "(at most 100, a letter or digit first)"
        )
    return name


def digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


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
    """Revision of the package's own repository, and whether its files changed since; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if not git("ls-files", "."):
            return None  # an environment inside somebody else's repository
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "."))}
    except (OSError, subprocess.SubprocessError):
        return None


def _refuse_other_settings(folder: Path, recorded: dict[str, Any], settings: Settings) -> None:
    before = dict(flat(recorded))
    now = dict(flat(json.loads(json.dumps(settings.model_dump(mode="json")))))
    absent = "(absent)"
    lines = [
        f"  {key}: {before.get(key, absent)!r:.60} there, {now.get(key, absent)!r:.60} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, absent) != now.get(key, absent)
    ]
    if not lines:
        return
    more = [f"  and {len(lines) - 8} more"] if len(lines) > 8 else []
    raise SettingsError(
        "\n".join(
            [f"{folder} holds a run with other settings:", *lines[:8], *more]
            + ["take another name, or delete that folder to start anew"]
        )
    )


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted path."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); delete the run's folder to start anew") from None
    if not isinstance(values, dict):
        raise RunError(f"{path}: holds no JSON object; delete the run's folder to start anew")
    return values


def summary_row(folder: Path) -> dict[str, Any]:
    """One run as a row of `list_runs`."""
    run = Run(folder, Settings())
    row = {"notebook": folder.parent.name, "name": folder.name, "complete": run.is_complete}
    try:
        seed = read_json(folder / "config.json").get("seed")
        summary = dict(flat(run.summary())) if run.is_complete else {}
    except RunError as error:
        return row | {"fault": str(error)}
    return row | {"seed": seed} | {key: value for key, value in summary.items() if key not in row}


def _number(value: Any) -> float | None:
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, (bool, int, float)):
        raise TypeError(f"a number is wanted, not {value!r:.60}")
    return value if math.isfinite(value) else None  # JSON has neither nan nor inf


def _seconds_trained(path: Path) -> float:
    seconds, before = 0.0, 0
    for line in map(json.loads, _metric_lines(path)):
        seconds += (line.get("step_s") or 0.0) * (line["step"] - before)
        before = line["step"]
    return seconds


def _metric_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    *whole, _ = path.read_text(encoding="utf-8").split("\n")  # the rest was cut off when the run was killed
    for number, line in enumerate(whole, start=1):
        try:
            json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{path}, line {number}: not a line of metrics; mend or delete it") from None
    return whole
