"""The results of runs: a table of all run folders, the settings in which runs differ, their curves and notebooks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from vpworkbench.errors import RunError, SettingsError
from vpworkbench.runs import GALLERY, Run, flat, read_json, runs_root, saved_settings, shipped_run

COLUMNS = ["notebook", "name", "complete", "seed", "folder"]


def find_runs(notebook: str = "", where: str = "", *, gallery: bool = False) -> pd.DataFrame:
    """All runs, one row each, indexed by name: `notebook`, `complete`, `seed`, the summary's values, `folder`.

    A run that cannot be read keeps its row, with the reason in the column `fault`. `where` is a condition on results
    and settings in the syntax of `DataFrame.eval`; in the names of settings underscores replace dots, such as
    `itm_accuracy > 0.9 and mask_mode == "attention"`. `gallery` includes the committed examples.
    """
    folders = [config.parent for config in sorted(runs_root().glob("*/*/config.json"))]
    folders = [folder for folder in folders if folder.parent.name != GALLERY]
    if gallery:
        folders += [config.parent for config in sorted(shipped_run().parent.glob("*/config.json"))]
    rows, settings = [], []
    for folder in folders:
        row, values = _read(folder)
        if notebook in ("", row["notebook"]):
            rows.append(row)
            settings.append(values)
    table = pd.DataFrame(rows, columns=None if rows else COLUMNS)
    if where and rows:
        both = pd.concat([table, pd.DataFrame(settings).drop(columns=table.columns, errors="ignore")], axis=1)
        try:
            table = table[both.eval(where).fillna(False).astype(bool)]  # a run without the setting is none of them
        except Exception as error:  # pandas raises many types for a wrong expression
            known = ", ".join(map(str, both.columns))
            raise SettingsError(f"where: {where!r} cannot be evaluated ({error}); columns: {known:.600}") from None
    return table.set_index("name", drop=False)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's row in the table, and its settings."""
    row = {"notebook": folder.parent.name, "name": folder.name, "complete": (folder / "summary.json").exists()}
    try:
        config = read_json(folder / "config.json")
        summary = read_json(folder / "summary.json") if row["complete"] else {}
    except RunError as error:
        return row | {"fault": str(error), "folder": str(folder)}, {}
    row |= {"notebook": config.get("notebook", folder.parent.name), "seed": config.get("seed")}
    row |= {key: value for key, value in flat(summary) if key not in row}
    settings = {key.replace(".", "_"): value for key, value in flat(config.get("settings", {}))}
    return row | {"folder": str(folder)}, settings


def differences(folders: Sequence[str | Path]) -> pd.DataFrame:
    """The settings in which runs differ: one row per setting, one column per run; nan if a run lacks a setting.

    Runs that cannot be read are left out; `find_runs` says why.
    """
    settings = {}
    for name, folder in _named(folders).items():
        with suppress(RunError):
            settings[name] = dict(flat(saved_settings(folder)))
    table = pd.DataFrame(settings, dtype=object)
    return table[table.map(repr).nunique(axis=1) > 1]


def curves(folders: Sequence[str | Path], quantity: str) -> dict[str, pd.DataFrame]:
    """By name of the run: the columns `step` and `quantity` of its metrics, for every run that logged the quantity.

    If none did, a `SettingsError` lists the quantities that there are.
    """
    found, known = {}, set()
    for name, folder in _named(folders).items():
        metrics = Run(folder).metrics()
        known |= set(metrics.columns) - {"step"}
        if quantity in metrics:
            found[name] = metrics[["step", quantity]].dropna()
    if known and not found:
        raise SettingsError(f"quantity: no run logged {quantity!r} (known: {', '.join(sorted(known))})")
    return found


def _named(folders: Sequence[str | Path]) -> dict[str, Path]:
    """Folders of runs by their names, or NOTEBOOK/NAME where a name repeats."""
    paths = [Path(folder) for folder in folders]
    names = [path.name for path in paths]
    return {path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}": path for path in paths}


def links(folders: Sequence[str | Path], *, beside: Path) -> str:
    """A Markdown list of links to the runs' executed notebooks, relative to `beside`."""
    lines = []
    for folder in map(Path, folders):
        for executed in sorted(folder.glob("*.ipynb")):
            lines.append(f"* [{folder.name}: {executed.name}]({quote(os.path.relpath(executed, beside))})")
    return "\n".join(lines) or "No executed notebook."
