"""Run folders, and notebooks executed in them.

A run is a folder, `papermill_runs/<notebook>/<name>/`: `config.json` is written first, `metrics.jsonl` grows
while it runs, `summary.json` comes last and makes it complete. Everything that must not be half written is
written beside its place and renamed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import ValidationError, validate_call
from tqdm import tqdm

from vpworkbench.config import Settings, SettingsError, _nearest, fault_lines

if TYPE_CHECKING:
    import plotly.graph_objects

logger = logging.getLogger(__name__)

CHECKS = {
    "00_visual_init": "vpworkbench.config:visual_init_settings",
    "01_pretrain": "vpworkbench.config:pretrain_settings",
    "02_probe": "vpworkbench.config:probe_settings",
    "00_tour": "vpworkbench.config:probe_settings",
    "03_compare_models": "vpworkbench.config:compare_settings",
}
"""For each notebook the function that turns its parameters into settings, or refuses them."""

GALLERY = "gallery"  # committed examples lie beside the runs, under a name no notebook may have
PACKAGES = ("vpworkbench", "torch", "torchvision", "timm", "transformers", "tokenizers", "numpy")


class RunError(RuntimeError):
    """A run that failed, or a run folder that cannot be used."""


# ---------------------------------------------------------------------------------------------- run folders


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
        return _read_json(self.folder / "summary.json")

    def show(self, name: str, figure: plotly.graph_objects.Figure) -> plotly.graph_objects.Figure:
        """Save a figure as a page of the run, and give it back for the notebook to draw."""
        self.save_figure(name, figure)
        return figure

    def export(self, name: str, figure: plotly.graph_objects.Figure) -> plotly.graph_objects.Figure:
        """As `show`, and as PNG and SVG beside the page where kaleido finds a browser; else say why not."""
        from vpworkbench.figures import ExportError, to_image

        try:
            for kind in ("png", "svg"):
                to_image(figure, self.save_figure(name, figure).with_suffix(f".{kind}"))
        except ExportError as error:
            logger.warning("%s: %s", name, error)
        return figure

    def save_figure(self, name: str, figure: plotly.graph_objects.Figure) -> Path:
        """Save a plotly figure as `figures/<name>.html`; the pages share plotly.min.js, no network needed."""
        path = self.folder / "figures" / f"{_safe_name(name)}.html"
        path.parent.mkdir(exist_ok=True)
        figure.write_html(path, include_plotlyjs="directory")
        return path


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
    folder = run_folder(notebook, name or settings_hash(settings))
    config = folder / "config.json"
    if config.exists():
        _refuse_other_settings(folder, _read_json(config).get("settings", {}), settings)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(config, json.dumps(_config(notebook, settings), indent=2) + "\n")
    run = Run(folder, settings)
    run.earlier_s = _seconds_trained(folder / "metrics.jsonl")
    return run


def settings_hash(settings: Settings) -> str:
    """Ten hexadecimal digits that equal settings share."""
    return _hash(settings.model_dump(mode="json"))


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
    for root in _repositories():
        return root / "papermill_runs"
    raise FileNotFoundError(
        f"no folder for runs: neither {Path.cwd()} nor the package lies in a repository with notebooks/; "
        "set VPW_RUNS to the folder that shall hold them"
    )


def shipped_run() -> Path:
    """The run of the tiny model that ships with the repository, in `papermill_runs/gallery/`."""
    for root in _repositories():
        return root / "papermill_runs" / GALLERY / "01_pretrain-tiny"
    raise FileNotFoundError("the tiny model ships with the repository: work in a clone of it, or name a checkpoint")


def list_runs(root: Path | None = None) -> pd.DataFrame:
    """All runs, one row each: notebook, name, complete, seed, and what their summaries say.

    A folder that cannot be read keeps its row; the column `fault` then tells why.
    """
    root = Path(root) if root else runs_root()
    rows = [
        _row(config.parent) for config in sorted(root.glob("*/*/config.json")) if config.parent.parent.name != GALLERY
    ]
    return pd.DataFrame(rows, columns=None if rows else ["notebook", "name", "complete", "seed"])


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a file as a whole or not at all; `durable` also waits until the disk has it."""
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.chmod(draft, 0o644)  # mkstemp made it private
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def _repositories() -> Iterator[Path]:
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


def _hash(values: dict[str, Any]) -> str:
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
    before = dict(_flat(recorded))
    now = dict(_flat(json.loads(json.dumps(settings.model_dump(mode="json")))))
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


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); delete the run's folder to start anew") from None
    if not isinstance(values, dict):
        raise RunError(f"{path}: holds no JSON object; delete the run's folder to start anew")
    return values


def _row(folder: Path) -> dict[str, Any]:
    run = Run(folder, Settings())
    row = {"notebook": folder.parent.name, "name": folder.name, "complete": run.is_complete}
    try:
        seed = _read_json(folder / "config.json").get("seed")
        summary = dict(_flat(run.summary())) if run.is_complete else {}
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


# -------------------------------------------------------------------------------------- executed notebooks


def run_notebook(notebook: str, *, name: str = "", parameters: dict[str, Any] | None = None) -> Path:
    """Execute a notebook in its run folder: start it, resume it, or say that it is complete.

    Parameters
    ----------
    notebook : str
        A name (`01_pretrain`, looked for in `notebooks/`) or a path.
    name : str
        The run's name; empty takes a hash of the settings.
    parameters : dict
        Values for the notebook's cell tagged `parameters`. Relative paths are taken from the current folder.

    Returns
    -------
    Path
        The executed notebook, in the run's folder.

    Raises
    ------
    FileNotFoundError
        If there is no such notebook.
    SettingsError
        For unknown parameters and wrong values, all at once, before anything starts.
    RunError
        If a cell fails, or the kernel is stopped.
    """
    path = find_notebook(notebook)
    given = dict(parameters or {})
    if "name" in given:
        name = name or str(given.pop("name"))
    defaults = notebook_parameters(path)
    settings = check_parameters(path.stem, defaults, given)
    if settings is None:  # a notebook without a check of its own
        folder = run_folder(path.stem, name or _hash({**defaults, **given, "name": ""}))
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = open_run(path.stem, settings, name=name).folder
    if "name" in defaults:
        given["name"] = folder.name
    return _execute(path, folder, given)


def find_notebook(notebook: str) -> Path:
    """The file of a notebook given by name or path; `FileNotFoundError` names the nearest one there is."""
    given = Path(notebook)
    if given.suffix == ".ipynb" and given.is_file():
        return given.absolute()
    known = {path.stem: path for root in reversed(list(_repositories())) for path in _notebooks(root)}
    stem = notebook.removesuffix(".ipynb")
    if stem not in known:
        raise FileNotFoundError(
            f"{notebook}: no such notebook{_nearest(stem, known)} (known: {', '.join(known) or 'none'})"
        )
    return known[stem]


def notebook_parameters(path: Path) -> dict[str, Any]:
    """A notebook's parameters with their defaults: the literals assigned in its cell tagged `parameters`.

    papermill's own reader works line by line and misses a parameter annotated `str | list`.

    Raises
    ------
    RunError
        If the file is no notebook, or a default no literal.
    """
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not a notebook ({type(error).__name__}: {error})") from None
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    values = {}
    for cell in tagged[:1]:
        try:
            for statement in ast.parse("".join(cell["source"])).body:
                if isinstance(statement, ast.AnnAssign) and statement.value:
                    value = ast.literal_eval(statement.value)
                    a_float = ast.unparse(statement.annotation) == "float"  # `epochs: float = 0` takes 0.5 too
                    values[ast.unparse(statement.target)] = float(value) if a_float else value
                elif isinstance(statement, ast.Assign):
                    values[ast.unparse(statement.targets[0])] = ast.literal_eval(statement.value)
        except (SyntaxError, ValueError) as error:
            raise RunError(f"{path}: the parameters cell must assign plain literals ({error})") from None
    return values


def parse_parameters(texts: dict[str, str], defaults: dict[str, Any]) -> dict[str, Any]:
    """Values of the types of the notebook's defaults from words of a command line.

    Lists and dicts are JSON, a list also where the default is a text (`-p data '["scenes", "mine"]'`); a text
    stays as it is (papermill would make a number of the name `007`). What does not parse stays a text, and
    `check_parameters` refuses it.
    """
    return {key: _parsed(text, defaults.get(key)) for key, text in texts.items()}


def check_parameters(notebook: str, defaults: dict[str, Any], given: dict[str, Any]) -> Settings | None:
    """Settings from a notebook's parameters; None where `CHECKS` has no entry for it.

    Raises
    ------
    SettingsError
        All faults at once: unknown names (with the nearest valid one), wrong types, what the check refuses.
    """
    faults, sound = [], dict(defaults)
    for key, value in given.items():
        if key not in defaults:
            hint = _nearest(key, defaults) or f" (known: {', '.join(defaults) or 'none'})"
            faults.append(f"{key}: {notebook} has no such parameter{hint}")
        elif wanted := _type_fault(value, defaults[key], one_or_many=notebook in CHECKS):
            faults.append(f"{key}: {wanted} (given: {value!r:.60})")
        else:
            sound[key] = value
    settings = None
    if notebook in CHECKS:
        check = _imported(CHECKS[notebook])
        accepted = inspect.signature(check).parameters
        try:
            settings = validate_call(check)(**{key: sound[key] for key in accepted if key in sound})
        except ValidationError as error:
            faults += fault_lines(error, accepted).splitlines()
        except SettingsError as error:
            faults += str(error).splitlines()
    if faults:
        raise SettingsError("\n".join(faults))
    return settings


def _notebooks(root: Path) -> Iterable[Path]:
    return sorted((root / "notebooks").glob("*.ipynb"))


def _imported(place: str) -> Callable[..., Settings]:
    module, function = place.split(":")
    return getattr(importlib.import_module(module), function)


def _parsed(text: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}.get(text.lower(), text)
        if isinstance(default, (int, float)):
            return type(default)(text)
        if isinstance(default, (list, dict)) or text.startswith("["):
            return json.loads(text)
        if default is None:
            return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    return text


def _type_fault(value: Any, default: Any, *, one_or_many: bool) -> str:
    """What is wrong with the type of a value, by the type of the default; empty if nothing."""
    kind = type(default)
    if default is None or type(value) is kind:
        return ""
    if kind is float and type(value) is int:
        return ""
    if kind is str and type(value) is list and one_or_many:
        return ""  # the notebook's check decides
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return f"must be {names.get(kind, f'a JSON {kind.__name__}')}, like {default!r:.40}"


def _execute(notebook: Path, folder: Path, parameters: dict[str, Any]) -> Path:
    import papermill  # late: it takes longer than all checks together
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    label, executed = f"{notebook.stem}/{folder.name}", folder / notebook.name
    if _is_finished(folder, executed):
        logger.info("%s is complete, nothing to do: %s", label, executed if executed.exists() else folder)
        return executed
    logger.info("%s: running in %s", label, folder)
    began = time.monotonic()
    try:
        with _terminal_bar(folder / "progress.json"):
            papermill.execute_notebook(
                *(str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, executed)),
                parameters=parameters,
                kernel_name="python3",  # ipykernel's own spec: this interpreter
                language="python",
                start_timeout=300,  # a busy machine takes its time
                extra_arguments=["--log-level=ERROR"],  # the kernel warns that localhost is unencrypted
                progress_bar=False,
            )
    except PapermillExecutionError as error:
        message = "\n".join(line[:200] for line in error.evalue.strip().splitlines()[:7])
        raise RunError(
            f"{label} failed in cell In [{error.exec_count}]: {error.ename}\n{message}\n"
            f"executed notebook: {executed}\nthe same call runs it again, from its last checkpoint"
        ) from None
    except DeadKernelError:
        raise RunError(
            f"{label}: the kernel was stopped (interrupted, killed, or out of memory)\n"
            f"executed notebook: {executed}\nthe same call resumes from the last checkpoint"
        ) from None
    except KeyboardInterrupt:
        logger.info("%s: interrupted; the same call resumes from the last checkpoint", label)
        raise
    logger.info("%s: done in %s: %s", label, _duration(time.monotonic() - began), executed)
    return executed


def _is_finished(folder: Path, executed: Path) -> bool:
    """Complete, and no later cell failed or was cut off: a cell may draw, or assert, after the summary."""
    if not (folder / "summary.json").exists():
        return False
    if not executed.exists():
        return True  # plain papermill wrote its notebook elsewhere
    try:
        record = _read_json(executed)["metadata"]["papermill"]
    except (RunError, KeyError):
        return False
    return bool(record.get("end_time")) and not record.get("exception")


@contextmanager
def _terminal_bar(progress: Path) -> Iterator[None]:
    """While a kernel works, show what it writes with `Run.progress` as a bar with the time left."""
    progress.unlink(missing_ok=True)  # of an earlier, killed try
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(progress, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        progress.unlink(missing_ok=True)


def _follow(progress: Path, stop: threading.Event) -> None:
    pause_s = 0.5 if sys.stderr.isatty() else 10  # a log file needs fewer lines
    form = "{desc}: {percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    bar, stopped = None, False
    while not stopped:
        stopped = stop.wait(pause_s)  # and look once more after the end
        try:
            state = json.loads(progress.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not written yet
        if bar is None or bar.desc != state["what"]:
            if bar is not None:
                bar.close()
            sizes = {"initial": state["done"], "total": state["total"]}
            bar = tqdm(desc=state["what"], **sizes, bar_format=form, dynamic_ncols=True)
        bar.n, left_s = state["done"], state["left_s"]
        bar.set_postfix_str("" if left_s is None else f"{_duration(left_s)} left")
    if bar is not None:
        bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes}:{seconds:02} min"
