"""How the settings of `tiny` were chosen, and what they give on every task: all runs, as the tables of docs/results.md.

    vpw sweep papermill_runs/gallery/recipe/pretrain.yaml --workers 2       and the other files there
    python -m benchmarks.recipe --collect       the results of these runs -> runs.csv
    python -m benchmarks.recipe                 runs.csv -> the tables

Settings are chosen on validation scenes. Runs that name a seed are finalists: only they are scored on test scenes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from vpworkbench import load
from vpworkbench.data.splits import load_splits
from vpworkbench.jobs.results import find_runs
from vpworkbench.jobs.sweep import read_jobs
from vpworkbench.runs import Run, read_json
from vpworkbench.settings import DataSettings
from vpworkbench.stats import Interval, student_interval
from vpworkbench.tasks import TASKS
from vpworkbench.train.evaluate import evaluate

FOLDER = Path(__file__).parents[1] / "papermill_runs" / "gallery" / "recipe"
COMPARED = ("systems",)
"""Comparisons of arms in the gallery, `08_families-NAME`; their runs.csv is written by the notebook."""
ARM_COLUMNS = {
    "ITM": ("itm_accuracy",),
    "words (another image)": ("mlm_with_image", "mlm_other_image"),
    "VQA (text only)": ("vqa", "text_only"),
    "flow to the last layer (uniform attention)": ("flow", "null"),
}
"""Columns of such a table: what a run reached, and the mean of what it is compared with."""
SWEEPS = ("pretrain", "finetune", "tasks", "families")
"""The yaml files there, in the order in which they were run."""
COLUMNS = {
    "itm_accuracy": "ITM",
    "mlm_with_image": "words",
    "objects_rows_end": "rows",
    "objects_columns_end": "columns",
    "objects_features_end": "features",
    "score": "score",
}
"""Validation results: in a summary (`score`: a task's metric), and as the tables name them."""


def collect() -> pd.DataFrame:
    """One row for each complete run of the sweeps, in their order."""
    rows = []
    for sweep in SWEEPS:
        path = FOLDER / f"{sweep}.yaml"
        for job in read_jobs(path) if path.exists() else ():
            runs = find_runs(Path(job.notebook).stem)
            if job.name in runs.index and runs.loc[job.name, "complete"]:
                rows.append({"sweep": sweep, **result(job.name, Path(runs.loc[job.name, "folder"]))})
    return pd.DataFrame(rows)


def result(name: str, folder: Path) -> dict[str, Any]:
    """What a run was, and what it reached on validation scenes; a finalist on test scenes too."""
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    values = scores(summary, config["settings"])
    row = {"run": name.partition("-")[2], "seed": config["seed"], "steps": summary["steps"], **values}
    if "seed=" in name:
        tested = scores(summary["test"], config["settings"]) if "test" in summary else test_results(name, config)
        row |= {f"test_{key}": value for key, value in tested.items()}
        row |= beside(summary.get("test", {}), config["settings"])
    row["step_s"] = float(Run(folder).metrics()["step_s"].median())
    return row | {"git": config["git"]["revision"][:8]}


def scores(summary: dict[str, Any], settings: dict[str, Any]) -> dict[str, float]:
    """The values of `COLUMNS` that a summary has."""
    if "task" in settings:
        return {"score": summary[TASKS[settings["task"]].metric]}
    return {key: summary[key] for key in COLUMNS if key in summary}


def beside(tested: dict[str, Any], settings: dict[str, Any]) -> dict[str, float]:
    """Test scores of the baselines of a task, by name."""
    names = [name for name in tested if name.startswith("baseline ")]
    return {name: tested[name][TASKS[settings["task"]].metric] for name in names}


def test_results(name: str, config: dict[str, Any]) -> dict[str, float]:
    """Held-out results of a pre-trained model on test scenes."""
    data = DataSettings(**config["settings"]["data"])
    held_out = evaluate(load(name).base, load_splits(data)["test"], data)
    return {key: getattr(held_out, key).mean for key in COLUMNS if key in held_out._fields}


def saved(folder: Path = FOLDER) -> pd.DataFrame:
    """What `collect` found, from runs.csv."""
    return pd.read_csv(folder / "runs.csv", keep_default_na=False, na_values=[""])


def tables(runs: pd.DataFrame) -> list[str]:
    """For each sweep its runs on validation scenes, and finalists with three seeds on test scenes, in Markdown.

    Tasks have three seeds of everything, so they have only a table of test scores.
    """
    runs, parts = runs.reindex(columns=runs.columns.union(COLUMNS)), []
    for sweep, own in runs.groupby("sweep", sort=False):
        if sweep == "tasks":
            parts.append(task_table(own))
            continue
        names = [name for name in COLUMNS if own[name].notna().any()]
        lines = [[words(row["run"]), *(f"{row[name]:.3f}" for name in names)] for _, row in own.iterrows()]
        parts.append(markdown([f"{sweep}, validation", *(COLUMNS[name] for name in names)], lines))
        names = [name for name in names if f"test_{name}" in own and own[f"test_{name}"].notna().any()]
        lines = [[words(name), *(over(group[f"test_{key}"]) for key in names)] for name, group in of_seeds(own)]
        if lines:
            parts.append(markdown([f"{sweep}, test", *(COLUMNS[name] for name in names)], lines))
    return parts + [arm_table(name) for name in COMPARED]


def of_seeds(runs: pd.DataFrame, least: int = 3) -> Iterator[tuple[str, pd.DataFrame]]:
    """Runs that differ in nothing but their seed, by their name without it."""
    named = runs[runs["run"].str.contains("seed=")]
    for name, group in named.groupby(named["run"].str.replace(r",?seed=\d+", "", regex=True), sort=False):
        if len(group) >= least:
            yield name, group


def task_table(runs: pd.DataFrame) -> str:
    """Each task: the model fine-tuned after pre-training and from scratch, and the baselines beside the former."""
    lines = []
    for name, group in of_seeds(runs, least=1):
        task, pretrained = re.fullmatch(r"task=([\w-]+),pretrained=(True|False)", name).groups()
        found = {"pre-trained" if pretrained == "True" else "from scratch": group["test_score"]}
        if pretrained == "True":
            found |= {key.removeprefix("baseline "): group[key] for key in group if key.startswith("baseline ")}
        lines += [[task, key, over(values)] for key, values in found.items() if values.notna().any()]
    order = list(dict.fromkeys(task for task, *_ in lines))
    return markdown(["task, test", "model", "score"], sorted(lines, key=lambda line: order.index(line[0])))


def arm_table(name: str) -> str:
    """Each arm of a comparison over its seeds."""
    runs = pd.read_csv(FOLDER.with_name(f"08_families-{name}") / "runs.csv")
    lines = [
        [arm, *(beside_mean(group, *keys) for keys in ARM_COLUMNS.values())]
        for arm, group in runs.groupby("arm", sort=False)
    ]
    return markdown([name, *ARM_COLUMNS], lines)


def beside_mean(runs: pd.DataFrame, key: str, other: str = "") -> str:
    """A result over seeds, and in brackets the mean of what it is compared with."""
    return over(runs[key]) + (f" ({runs[other].mean():.3f})" if other else "")


def words(run: str) -> str:
    """The settings in a run's name, as code."""
    return f"`{run}`" if run else "preset"


def over(values: pd.Series, *, share: bool = True) -> str:
    """Each seed's result, and the mean with its t interval; an interval of shares ends at 0 and 1."""
    single = ", ".join(f"{value:.3f}" for value in values)
    if values.nunique() == 1:
        return f"{values.iloc[0]:.3f} ({len(values)} seed{'s' * (len(values) > 1)})"
    interval = student_interval(values)
    return f"{single}: {Interval(*np.clip(interval, 0, [1, 1, 1, np.inf])) if share else interval:.3f}"


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


Gather = Annotated[bool, typer.Option("--collect", help="read the runs of the sweeps, and write runs.csv")]


def main(gather: Gather = False) -> None:
    """Print the tables."""
    report(FOLDER, collect, tables, gather)


def report(
    folder: Path,
    collect: Callable[[], pd.DataFrame],
    tables: Callable[[pd.DataFrame], list[str]],
    gather: bool,
    key: Sequence[str] = ("sweep", "run"),
) -> None:
    """Print the tables of a folder's runs.csv; with `gather`, after the rows of the runs that are here were renewed.

    Runs may be made on several machines: a row stays as it is where its run is not. `key` names a row.
    """
    if gather:
        rows = pd.concat([saved(folder), collect()], ignore_index=True)
        rows["place"] = rows.groupby(list(key), sort=False, dropna=False).ngroup()
        rows = rows.drop_duplicates("place", keep="last").sort_values("place").drop(columns="place")
        rows.to_csv(folder / "runs.csv", index=False, float_format="%.5g")
    print("\n\n".join(tables(saved(folder))))


if __name__ == "__main__":
    typer.run(main)
