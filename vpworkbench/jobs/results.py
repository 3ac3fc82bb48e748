"""What came of the runs: every run folder as a row, what their settings differ in, their curves, their notebooks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from vpworkbench.errors import SettingsError
from vpworkbench.runs import GALLERY, Run, flat, read_json, runs_root, shipped_run, summary_row
from vpworkbench.settings import Settings


def find_runs(notebook: str = "", where: str = "", *, gallery: bool = False) -> pd.DataFrame:
    """One row each, by name: `notebook`, `complete`, `seed`, what the summary says, `folder`.

    Parameters
    ----------
    notebook : str
        Its runs alone; empty: all.
    where : str
        A condition as `DataFrame.query` takes it, on what the table and the settings say: a setting's name has
        underscores for dots, e.g. `itm_accuracy > 0.9 and mask_mode == "attention"`.
    gallery : bool
        The committed examples too.

    Raises
    ------
    SettingsError
        For a condition that cannot be evaluated.
    """
    folders = [config.parent for config in sorted(runs_root().glob("*/*/config.json"))]
    folders = [folder for folder in folders if folder.parent.name != GALLERY]
    if gallery:
        folders += [config.parent for config in sorted(shipped_run().parent.glob("*/config.json"))]
    rows, settings = [], []
    for folder in folders:
        row = summary_row(folder)
        config = {} if "fault" in row else read_json(folder / "config.json")
        row["notebook"] = config.get("notebook", row["notebook"])
        if notebook in ("", row["notebook"]):
            rows.append(row | {"folder": str(folder)})
            settings.append({key.replace(".", "_"): value for key, value in flat(config.get("settings", {}))})
    if not rows:
        return pd.DataFrame(columns=["notebook", "name", "complete", "seed", "folder"]).set_index("name", drop=False)
    table = pd.DataFrame(rows)
    if where:
        more = pd.DataFrame(settings)
        both = pd.concat([table, more[[key for key in more if key not in table]]], axis=1)
        try:
            table = table[both.eval(where).astype(bool)]
        except Exception as error:  # whatever pandas makes of a text
            known = ", ".join(map(str, both.columns))
            raise SettingsError(f"where: {where!r} cannot be evaluated ({error}); columns: {known:.600}") from None
    return table.set_index("name", drop=False)


def differences(folders: Sequence[str | Path]) -> pd.DataFrame:
    """The settings in which runs differ, and only these: a row each, a column for every run; nan where one has none."""
    settings = {
        Path(folder).name: dict(flat(read_json(Path(folder) / "config.json")["settings"])) for folder in folders
    }
    keys = list(dict.fromkeys(key for values in settings.values() for key in values))
    table = pd.DataFrame(
        {name: [values.get(key) for key in keys] for name, values in settings.items()}, index=keys, dtype=object
    )
    differ = [len({repr(value) for value in row}) > 1 for row in table.to_numpy()]
    return table[differ]


def curves(folders: Sequence[str | Path], quantity: str) -> dict[str, pd.DataFrame]:
    """Columns `step` and `quantity` of the metrics of every run that logged it, by the run's name.

    Raises
    ------
    SettingsError
        If runs have metrics, and none has this quantity; those there are get named.
    """
    found, known = {}, set()
    for folder in map(Path, folders):
        metrics = Run(folder, Settings()).metrics()
        known |= set(metrics.columns) - {"step"}
        if quantity in metrics:
            found[folder.name] = metrics[["step", quantity]].dropna()
    if known and not found:
        raise SettingsError(f"quantity: no run logged {quantity!r} (known: {', '.join(sorted(known))})")
    return found


def links(folders: Sequence[str | Path], *, beside: Path) -> str:
    """Markdown: a list of links to the runs' executed notebooks, relative to `beside`."""
    lines = []
    for folder in map(Path, folders):
        for executed in sorted(folder.glob("*.ipynb")):
            lines.append(f"* [{folder.name}: {executed.name}]({quote(os.path.relpath(executed, beside))})")
    return "\n".join(lines) or "No executed notebook."
