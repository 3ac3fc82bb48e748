"""What is learned on photographs: the runs of papermill_runs/gallery/photographs, as the tables of docs/results.md.

    vpw sweep papermill_runs/gallery/photographs/pretrain.yaml      then retrieval.yaml and daquar.yaml
    python -m benchmarks.photographs --collect       the results of these runs -> runs.csv
    python -m benchmarks.photographs                 runs.csv -> the tables

Each command runs in the folder that has flickr1k/ and daquar/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import typer

from benchmarks.recipe import Gather, beside, beside_mean, markdown, over, report
from vpworkbench.jobs.sweep import Job, read_jobs
from vpworkbench.runs import read_json, run_folder
from vpworkbench.tasks import TASKS

FOLDER = Path(__file__).parents[1] / "papermill_runs" / "gallery" / "photographs"
SWEEPS = ("pretrain", "retrieval", "daquar")
LEARNT = {
    "ITM (another image)": ("itm_accuracy", "itm_other_image"),
    "words (another image)": ("mlm_with_image", "mlm_other_image"),
    "flow to the last layer (uniform attention)": ("flow_from_input_last_layer", "null_from_input_last_layer"),
}
"""Columns of the table of pre-training: shares on validation, and the mean of what each is compared with."""
EFFECTS = {"match, blocked": "match_effect", "word, blocked": "word_effect"}
"""Further columns: what log odds and log probability lose when no word reads the image."""


def collect() -> pd.DataFrame:
    """One row for each complete run of the sweeps, in their order."""
    rows = []
    for sweep in SWEEPS:
        for job in read_jobs(FOLDER / f"{sweep}.yaml"):
            found = [summary_of(one) for one in (job, *job.then)]
            if all(found):
                measured = tested(*found, job.parameters["task"]) if "task" in job.parameters else learnt(*found)
                masking = job.parameters.get("masking")
                rows.append({"sweep": sweep, "masking": masking, "seed": job.parameters["seed"], **measured})
    return pd.DataFrame(rows)


def summary_of(job: Job) -> dict[str, Any]:
    """The summary of a complete run, else nothing."""
    file = run_folder(Path(job.notebook).stem, job.name) / "summary.json"
    return read_json(file) if file.exists() else {}


def learnt(pretrained: dict[str, Any], knocked_out: dict[str, Any]) -> dict[str, float]:
    """What `LEARNT` and `EFFECTS` name."""
    values = {key: pretrained[key] for keys in LEARNT.values() for key in keys}
    effects = {
        f"{name}_effect": knocked_out[f"{name}_before"] - knocked_out[f"{name}_blocked"] for name in ("match", "word")
    }
    return values | effects


def tested(summary: dict[str, Any], task: str) -> dict[str, float]:
    """Validation score (if there is a validation) and test score of a task, beside the test scores of baselines."""
    metric, settings = TASKS[task].metric, {"task": task}
    return {"score": summary.get(metric), "test_score": summary["test"][metric], **beside(summary["test"], settings)}


def tables(runs: pd.DataFrame) -> list[str]:
    """Pre-training by the kind of masks, then each task: test scores of the model and of what it is compared with."""
    parts = []
    for sweep, own in runs.groupby("sweep", sort=False):
        if sweep == "pretrain":
            groups = own.groupby("masking", sort=False)
            lines = [
                [name, *(beside_mean(group, *keys) for keys in LEARNT.values())]
                + [over(group[key], share=False) for key in EFFECTS.values()]
                for name, group in groups
            ]
            parts.append(markdown(["masks", *LEARNT, *EFFECTS], lines))
        else:
            scores = {"fine-tuned": own["test_score"]}
            scores |= {key.removeprefix("baseline "): own[key] for key in own if key.startswith("baseline ")}
            lines = [[name, over(values)] for name, values in scores.items() if values.notna().all()]
            parts.append(markdown([f"{sweep}, test", "score"], lines))
    return parts


def main(gather: Gather = False) -> None:
    """Print the tables."""
    report(FOLDER, collect, tables, gather, key=("sweep", "masking", "seed"))


if __name__ == "__main__":
    typer.run(main)
