"""Do masks by attention help, and does flow tell what a model can do? The chains of docs/study.md, as its tables.

    vpw sweep papermill_runs/gallery/study/study.yaml --workers 2
    python -m benchmarks.study --collect       the complete chains -> runs.csv, questions.csv, summaries and metrics
    python -m benchmarks.study                 the saved measures -> the tables

Chains may be made on several machines: those that are not on this one stay as they were saved. The runs of
`08_families` with other visual sides are a second analysis. They need the effects of blocking too, for each run NAME:

    vpw run 07_knock_out --name NAME -p checkpoint 01_pretrain/NAME -p images 64
    vpw run 07_knock_out --name NAME-vqa -p checkpoint 04_finetune/NAME -p images 64
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import typer

from benchmarks.recipe import Gather, markdown
from vpworkbench.jobs.sweep import Job, read_jobs
from vpworkbench.runs import run_folder, runs_root
from vpworkbench.stats import Interval, student_interval
from vpworkbench.studies import study
from vpworkbench.studies.families import ARMS, found_runs

FOLDER = Path(__file__).parents[1] / "papermill_runs" / "gallery" / "study"
KEPT = ("config.json", "summary.json", "metrics.jsonl", "effects.csv")
"""Files of a run that stay in the repository; checkpoints do not."""
FAMILIES = "families.csv"
REACHED = {
    "ITM": ("itm",),
    "words (another image)": ("words", "words_other"),
    "VQA, validation": ("score_val",),
    "VQA, test (another image; text only)": ("score", "score_other", "score_text_only"),
}
MEASURED = {
    "flow (uniform attention)": ("flow", "null"),
    "flow above its null": ("excess",),
    "live flow": ("live",),
    "cost to matches": ("match",),
    "cost to words": ("word",),
    "cost to answers": ("answer",),
    "NMI": ("nmi",),
}
"""Columns of the tables of arms: a measure, and the means of what it is compared with."""
DIGITS = {"live": 5}  # of a measure that is too small for three
BLOCKED = {
    "effect": "words read no image",
    "effect of the reverse": "the image reads no words",
    "effect of mean values": "words read the mean image token",
    "effect of random pairs": "as many random pairs",
}
"""Quantities of the tables of `07_knock_out`, in the words of the table here."""
LEAST = "patch-random"  # this arm answers far worse than all others, so correlations over arms are given without it too


def collect(jobs: list[Job]) -> None:
    """Add the chains that are complete on this machine to the saved ones, and keep the files of their runs."""
    found = study.collect(jobs)
    if (FOLDER / "runs.csv").exists():
        found = renewed(study.Study.load(FOLDER), found)
    found.save(FOLDER)
    if rows := family_rows(runs_root()):
        index = pd.MultiIndex.from_tuples(rows, names=["arm", "seed"])
        pd.DataFrame(rows.values(), index).to_csv(FOLDER / FAMILIES, float_format="%.6g")
    for one in (one for job in jobs for one in (job, *job.then)):
        folder = run_folder(Path(one.notebook).stem, one.name)
        for file in (folder / name for name in KEPT if (folder / "summary.json").exists()):
            if file.exists():
                target = FOLDER / "runs" / folder.parent.name / folder.name / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def family_rows(root: Path) -> dict[tuple[str, int], dict[str, float]]:
    """The measures of the families' runs that have the effects of blocking. The Swin arms are chains of the study."""
    rows = {}
    for one in (one for one in found_runs("families", root) if ARMS[one.arm].visual != "swin"):
        folders = [root / notebook / one.folder.name for notebook in study.CHAIN]
        folders[-1] = folders[-1].with_name(f"{one.folder.name}-vqa")
        if all((folder / "effects.csv").exists() for folder in folders if folder.parent.name == "07_knock_out"):
            rows[one.arm, one.seed] = study.row(*folders)
    return rows


def with_families(runs: pd.DataFrame) -> pd.DataFrame:
    """The chains of the study and the families' runs, of the seeds that all arms have."""
    families = pd.read_csv(FOLDER / FAMILIES, index_col=["arm", "seed"])
    runs = pd.concat([runs, families])
    seeds = runs["score"].unstack("arm").dropna().index
    return runs[runs.index.get_level_values("seed").isin(seeds)]


def renewed(saved: study.Study, found: study.Study) -> study.Study:
    """The saved chains, those that were found again in their new state, and the others found; in order of seeds."""
    older = saved.runs.index.difference(found.runs.index)
    runs = pd.concat([saved.runs.loc[older], found.runs])
    questions = pd.concat([saved.questions[older], found.questions], axis=1)
    order = sorted(runs.index, key=lambda chain: (chain[1], study.ARMS.index(chain[0])))
    return study.Study(runs.loc[order], questions[order])


def tables(found: study.Study) -> list[str]:
    """What the arms reached and measured, paired differences, effects of blocking, and what tells the score: Markdown.

    The last two tables add the families' runs, if any are saved: with and without `LEAST`.
    """
    parts = [arms(found.runs, REACHED), arms(found.runs, MEASURED)]
    lines = []
    for one in study.differences(found).itertuples():
        gains = [
            f"{Interval(one.mean, one.low, one.high, one.seeds):+.3f}",
            f"[{one.low_all:+.3f}, {one.high_all:+.3f}]",
        ]
        power = [f"{one.smallest:.3f} ({one.smallest_all:.3f})", f"{one.sign_flips:.3f}", share(one.by_questions)]
        lines.append([study.OUTCOMES[one.outcome], f"{one.better} - {one.other}", *gains, *power, one.answer])
    found_with = "smallest found (corrected)"
    header = ["outcome", "masks", "difference", "corrected", found_with, "sign flips", "by questions", "answer"]
    parts += [markdown(header, lines), each_seed(found.runs), blocking(found.runs), tells(found.runs)]
    if (FOLDER / FAMILIES).exists():
        together = with_families(found.runs)
        parts += [tells(together), tells(together.drop(LEAST, level="arm"))]
    return parts


def each_seed(runs: pd.DataFrame) -> str:
    """The paired differences seed by seed, and those of masked words, which the plan does not ask for."""
    lines, seeds = [], runs.index.unique("seed")
    for outcome, words in (study.OUTCOMES | {"words": "masked words"}).items():
        for (better, other), gains in study.paired(runs, outcome).items():
            cells = (f"{gains[seed]:+.3f}" if seed in gains else "–" for seed in seeds)
            lines.append([words, f"{better} - {other}", *cells])
    return markdown(["outcome", "masks", *(f"seed {seed}" for seed in seeds)], lines)


def blocking(runs: pd.DataFrame) -> str:
    """A row for each kind of blocking and span: what it costs, over the seeds' means of all arms."""
    tables = []
    for arm, seed in runs.index:
        for tuned in (False, True):  # a fine-tuned model answers, and matches no longer
            name = f"study-seed={seed},masking={arm}{'-vqa' * tuned}"
            own = pd.read_csv(FOLDER / "runs" / "07_knock_out" / name / "effects.csv")
            tables.append(own[own["read_out"].eq("answer") == tuned].assign(seed=seed))
    rows = pd.concat(tables)
    cells = rows.groupby(["quantity", "start", "stop", "read_out", "seed"])["mean"].mean().unstack("read_out")
    lines = []
    for quantity, words in BLOCKED.items():
        for (start, stop), own in cells.loc[quantity].groupby(["start", "stop"]):
            span = f"{start}" if start == stop else f"{start} to {stop}"
            lines.append([words, span, *(cell(own[one], "+.3f") for one in ("match", "word", "answer"))])
    return markdown(["blocked", "layers", "cost to matches", "cost to words", "cost to answers"], lines)


def tells(runs: pd.DataFrame) -> str:
    """A row for each measure: how well it tells the VQA score."""
    lines = []
    for name, one in study.correlations(runs).iterrows():
        kinds = [correlation(one, kind) for kind in ("pearson_within", "spearman_within", "pearson", "spearman")]
        without = f"{one['without_least']:.2f} to {one['without_most']:.2f}"
        errors = [f"{100 * one[error]:.2f}" for error in ("error", "error_of_mean", "error_of_arms")]
        errors = f"{errors[0]} ({errors[1]}; {errors[2]})"
        lines.append([study.MEASURES[name], kinds[0], without, *kinds[1:], errors, "yes" if one["tells"] else "no"])
    within = ["r within arms", "with any one seed left out", "rank r within arms"]
    return markdown(["measure", *within, "r", "rank r", "error (of the mean; of arms)", "tells"], lines)


def arms(runs: pd.DataFrame, columns: dict[str, tuple[str, ...]]) -> str:
    """A row for each arm: means with Student's intervals over seeds, in brackets the means of what they are beside."""
    lines = []
    for arm in (arm for arm in study.ARMS if arm in runs.index.levels[0]):
        own, cells = runs.loc[arm], []
        for name, *others in columns.values():
            beside = "; ".join(f"{own[other].mean():.3f}" for other in others)
            if name == "nmi":  # Student's interval would leave [0, 1]
                cells.append(f"{own[name].mean():.3f} ({own[name].min():.3f} to {own[name].max():.3f})")
            else:
                cells.append(cell(own[name], f".{DIGITS.get(name, 3)}f") + (f" ({beside})" if beside else ""))
        lines.append([arm, str(len(own)), *cells])
    return markdown(["masks", "seeds", *columns], lines)


def cell(values: pd.Series, spec: str = ".3f") -> str:
    """A mean with its interval; nothing where there is no such measure, no interval where all seeds are equal."""
    values = values.dropna()
    if values.empty:
        return "–"
    return f"{values.iloc[0]:{spec}}" if values.nunique() == 1 else f"{student_interval(values):{spec}}"


def correlation(row: pd.Series, kind: str) -> str:
    return f"{Interval(row[kind], row[f'{kind}_low'], row[f'{kind}_high'], 0):.2f}"


def share(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.0%}"


def main(gather: Gather = False) -> None:
    """Print the tables."""
    if gather:
        collect(read_jobs(FOLDER / "study.yaml"))
    print("\n\n".join(tables(study.open_study(str(FOLDER)))))


if __name__ == "__main__":
    typer.run(main)
