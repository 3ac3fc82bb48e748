"""The paper's two claims over many runs: do masks by attention help, and does flow tell what a model can do?

docs/study.md is the plan: what is measured and compared, and what counts as an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import stdtrit
from scipy.stats import rankdata

from vpworkbench.errors import SettingsError
from vpworkbench.jobs.sweep import Job, read_jobs
from vpworkbench.runs import Run, read_json, runs_root, saved_settings, shipped_run
from vpworkbench.settings import FinetuneSettings, checked
from vpworkbench.stats import Interval, bootstrap_statistic, flatten, paired_interval, student_interval
from vpworkbench.tasks import TASKS

CHAIN = ("01_pretrain", "02_probe", "07_knock_out", "04_finetune", "07_knock_out")
"""The notebooks of each chain; the last one blocks words of the fine-tuned model."""
SWEEP = "papermill_runs/gallery/study/study.yaml"
ARMS = ("none", "random", "attention", "object")
COMPARED = (
    ("attention", "random"),
    ("random", "none"),
    ("attention", "none"),
    ("object", "random"),
    ("object", "none"),
)
"""Arms whose difference is asked for; the first is expected to be better."""
OUTCOMES = {"score": "VQA score", "excess": "flow above its null"}
MEASURES = {
    "flow": "flow from the input to the last layer",
    "excess": "flow above its null",
    "live": "live flow",
    "match": "effect of blocking on matches",
    "word": "effect of blocking on words",
    "answer": "effect of blocking on answers",
}
"""Columns that may tell the VQA score."""
CORRELATIONS = {"pearson": False, "spearman": True}  # kind -> of ranks
NO_MATTER = 0.01  # a difference of scores or of flow as small as this would not matter to anyone
STRONG = 0.3  # a correlation above it tells something
POWER = 0.8


class Study(NamedTuple):
    """What was measured: `runs` has a row for each chain, `questions` the test score of each question in each chain.

    The index of `runs`, and the columns of `questions`, are (arm, seed).
    """

    runs: pd.DataFrame
    questions: pd.DataFrame

    def save(self, folder: Path) -> None:
        """Write `runs.csv` and `questions.csv`."""
        self.runs.to_csv(folder / "runs.csv", float_format="%.6g")
        self.questions.to_csv(folder / "questions.csv", float_format="%.3g")

    @classmethod
    def load(cls, folder: Path) -> Study:
        """Read what `save` wrote."""
        runs = pd.read_csv(folder / "runs.csv", index_col=["arm", "seed"], keep_default_na=False, na_values=[""])
        questions = pd.read_csv(folder / "questions.csv", index_col=0, header=[0, 1]).rename(columns=int, level=1)
        return cls(runs, questions.rename(index=str))


def open_study(source: str = "") -> Study:
    """A saved folder, or the complete chains of a sweep file; empty: the study that ships.

    A `SettingsError` says what is missing: there must be a pair of `COMPARED`, and two seeds that all arms have.
    """
    folder = Path(source).expanduser() if source else shipped_run().with_name("study")
    if folder.suffix in (".yaml", ".yml"):
        study = collect(read_jobs(folder))
    elif (folder / "runs.csv").exists():
        study = Study.load(folder)
    else:
        raise SettingsError(f"source: {folder} holds no runs.csv of a study; name a folder of one, or a sweep file")
    by_seed = study.runs["score"].unstack("arm").dropna()
    if len(by_seed) < 2 or not any(set(pair) <= set(by_seed) for pair in COMPARED):
        pairs = ", ".join(" - ".join(pair) for pair in COMPARED)
        chains = ", ".join(f"{arm} with seed {seed}" for arm, seed in study.runs.index)
        raise SettingsError(
            f"source: {folder}: two seeds that all arms have are needed, and two arms that are compared ({pairs}); "
            f"it has {chains}"
        )
    return study


def collect(jobs: Sequence[Job]) -> Study:
    """The complete chains of a sweep such as the gallery's study.yaml; a `SettingsError` if there are none."""
    rows, questions = {}, {}
    for job in jobs:
        chain = tuple(Path(one.notebook).stem for one in (job, *job.then))
        if chain != CHAIN or not {"masking", "seed"} <= set(job.parameters):
            raise SettingsError(
                f"{job.name}: a study's job gives masking and seed, and runs {', '.join(CHAIN)}, as in {SWEEP}"
            )
        folders = [runs_root() / Path(one.notebook).stem / one.name for one in (job, *job.then)]
        if all((folder / "summary.json").exists() for folder in folders):
            key = job.parameters["masking"], job.parameters["seed"]
            rows[key], questions[key] = row(*folders), question_scores(folders[3])
    if not rows:
        raise SettingsError(
            f"none of the {len(jobs)} chains is complete in {runs_root()}: run `vpw sweep` on their file"
        )
    index = pd.MultiIndex.from_tuples(rows, names=["arm", "seed"])
    return Study(pd.DataFrame(rows.values(), index), pd.DataFrame(questions))


def row(pretrained: Path, probed: Path, blocked: Path, tuned: Path, answering: Path) -> dict[str, float]:
    """The measures of one chain, from the folders of its runs."""
    learnt, flow, vqa = (read_json(folder / "summary.json") for folder in (pretrained, probed, tuned))
    effects, answers = (pd.read_csv(folder / "effects.csv") for folder in (blocked, answering))
    metrics = Run(pretrained).metrics()
    return {
        "itm": learnt["itm_accuracy"],
        "words": learnt["mlm_with_image"],
        "words_other": learnt["mlm_other_image"],
        "score_val": vqa["vqa_score"],
        "score": vqa["test"]["vqa_score"],
        "score_other": vqa["test"]["baseline another image"]["vqa_score"],
        "score_text_only": vqa["test"]["baseline text only"]["vqa_score"],
        "flow": flow["flow_from_input_last_layer"],
        "null": flow["null_from_input_last_layer"],
        "excess": flow["flow_from_input_last_layer"] - flow["null_from_input_last_layer"],
        "live": over_all_layers(effects, "match", "live flow"),
        "match": over_all_layers(effects, "match", "effect"),
        "word": over_all_layers(effects, "word", "effect"),
        "answer": over_all_layers(answers, "answer", "effect"),
        "nmi": flow["nmi_last_layer"],
        "target_rank": metrics["target_rank"].iloc[-1] if "target_rank" in metrics else np.nan,
        "on_object": flow.get("mask_on_object rows", np.nan),  # only a parser has attention for masks
        "on_object_random": flow.get("mask_on_object random", np.nan),
    }


def over_all_layers(effects: pd.DataFrame, read_out: str, quantity: str) -> float:
    """A quantity of the table of `07_knock_out` for the span of all layers."""
    rows = effects[(effects["read_out"] == read_out) & (effects["quantity"] == quantity) & (effects["start"] == 1)]
    return float(rows.loc[rows["stop"].idxmax(), "mean"])


def question_scores(tuned: Path) -> pd.Series:
    """The score of each test question, from the predictions of a run of `04_finetune`."""
    settings = checked(FinetuneSettings, saved_settings(tuned))
    tested = TASKS[settings.task].load(settings)[0]["test"]
    predicted = {
        str(one["question_id"]): one["answer"] for one in json.loads((tuned / "predictions-test.json").read_text())
    }
    ids = [one.id for one in tested]
    return pd.Series(TASKS[settings.task].scores(tested, predicted), index=pd.Index(ids, name="question"))


def means(runs: pd.DataFrame) -> pd.DataFrame:
    """Each measure of each arm, mean with Student's 95% interval over seeds as text."""
    arms = {arm: runs.loc[arm] for arm in ARMS if arm in runs.index.levels[0]}
    cells = {arm: {name: f"{student_interval(own[name]):.3f}" for name in own} for arm, own in arms.items()}
    return pd.DataFrame(cells)


def differences(study: Study) -> pd.DataFrame:
    """Paired differences over seeds, one row for each outcome and pair of arms.

    `mean`, `low`, `high` with Student's 95% interval, `low_all`, `high_all` corrected for the number of rows
    (Bonferroni); `smallest` is the true difference that is found with a power of 80% by the uncorrected interval,
    `by_questions` the share of the variance between seeds that the choice of test questions explains, `answer` what
    the plan calls it.
    """
    rows = []
    for outcome in OUTCOMES:
        by_seed = study.runs[outcome].unstack("arm")
        for better, other in (pair for pair in COMPARED if set(pair) <= set(by_seed)):
            both = by_seed[[better, other]].dropna()
            gains = (both[better] - both[other]).to_numpy()
            plain = student_interval(gains)
            corrected = student_interval(gains, level=1 - 0.05 / (len(OUTCOMES) * len(COMPARED)))
            found = {"outcome": outcome, "better": better, "other": other, "seeds": len(gains)}
            found |= {"mean": plain.mean, "low": plain.low, "high": plain.high}
            found |= {"low_all": corrected.low, "high_all": corrected.high, "smallest": smallest_found(gains)}
            if outcome == "score":
                seeds = [(study.questions[better, seed], study.questions[other, seed]) for seed in both.index]
                within = [((one.high - one.low) / 3.92) ** 2 for one in (paired_interval(*pair) for pair in seeds)]
                found["by_questions"] = np.mean(within) / gains.var(ddof=1)
            rows.append(found | {"answer": answer(plain, corrected)})
    return pd.DataFrame(rows)


def intervals(differ: pd.DataFrame, outcome: str) -> dict[str, tuple[Interval, Interval]]:
    """Of one outcome's `differences`: the pair's name -> its interval, and the corrected one."""
    return {
        f"{row.better} - {row.other}": (
            Interval(row.mean, row.low, row.high, row.seeds),
            Interval(row.mean, row.low_all, row.high_all, row.seeds),
        )
        for row in differ[differ["outcome"] == outcome].itertuples()
    }


def answer(plain: Interval, corrected: Interval) -> str:
    """What counts as yes, no and undecided; `reversed` where the other arm is better by the rule of yes."""
    if corrected.low > 0:
        return "yes"
    if corrected.high < 0:
        return "reversed"
    return "no" if -NO_MATTER <= plain.low and plain.high <= NO_MATTER else "undecided"


def smallest_found(gains: np.ndarray) -> float:
    """The true difference whose 95% interval excludes zero with a power of 80%, by the spread of these gains."""
    freedom = len(gains) - 1
    return (stdtrit(freedom, 0.975) + stdtrit(freedom, POWER)) * gains.std(ddof=1) / np.sqrt(len(gains))


def correlations(runs: pd.DataFrame, measures: Sequence[str] = tuple(MEASURES), score: str = "score") -> pd.DataFrame:
    """How well each measure tells the score, one row each; intervals by a bootstrap over seeds, all arms together.

    `pearson` and `spearman` over all runs, and `within` arms: both quantities centred in each. `error` is the mean
    absolute error of a line fitted on all other seeds, `error_of_mean` that of their mean. `tells` is the plan's rule.
    """
    rows = {}
    for name in measures:
        (values, scores), found = _tables(runs, name, score), {}
        for (kind, ranked), (where, centred) in product(CORRELATIONS.items(), {"": False, "_within": True}.items()):
            statistic = _correlation(values, scores, ranked=ranked, centred=centred)
            found |= flatten({f"{kind}{where}": bootstrap_statistic(statistic, len(scores))})
        found |= {"error": held_out_error(values, scores), "error_of_mean": held_out_error(None, scores)}
        found["tells"] = found["pearson_within_low"] > STRONG and found["error"] < found["error_of_mean"]
        rows[name] = found
    return pd.DataFrame.from_dict(rows, orient="index")


def _tables(runs: pd.DataFrame, *names: str) -> list[np.ndarray]:
    """Columns as (seed, arm), of the seeds for which all arms have all of them."""
    whole = runs[list(names)].unstack("arm").dropna()
    return [whole[name].to_numpy() for name in names]


def _correlation(
    values: np.ndarray, scores: np.ndarray, *, ranked: bool, centred: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """A statistic for `bootstrap_statistic`: of numbers of seeds, (..., seed), the correlation over their runs."""

    def statistic(seeds: np.ndarray) -> np.ndarray:
        sides = []
        for table in (values, scores):
            drawn = table[seeds]  # ... seed arm
            drawn = (drawn - drawn.mean(axis=-2, keepdims=True) * centred).reshape(*seeds.shape[:-1], -1)
            drawn = rankdata(drawn, axis=-1) if ranked else drawn
            sides.append(drawn - drawn.mean(axis=-1, keepdims=True))
        one, other = sides
        with np.errstate(invalid="ignore"):  # no spread: nan
            return (one * other).sum(axis=-1) / np.sqrt((one**2).sum(axis=-1) * (other**2).sum(axis=-1))

    return statistic


def held_out_error(values: np.ndarray | None, scores: np.ndarray) -> float:
    """Mean absolute error of a line through the runs of all other seeds, or of their mean; both are (seed, arm)."""
    errors = []
    for seed, held_out in enumerate(scores):
        others = np.delete(scores, seed, axis=0)
        expected: ArrayLike = others.mean()
        if values is not None:
            expected = np.polyval(np.polyfit(np.delete(values, seed, axis=0).ravel(), others.ravel(), 1), values[seed])
        errors.append(np.abs(held_out - expected))
    return float(np.mean(errors))


def by_arm(runs: pd.DataFrame) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """For each of `MEASURES`, by its words: arm -> its values and the VQA scores, (seed,)."""
    arms = {arm: runs.loc[arm] for arm in ARMS if arm in runs.index.levels[0]}
    return {
        words: {arm: (own[name].to_numpy(), own["score"].to_numpy()) for arm, own in arms.items()}
        for name, words in MEASURES.items()
    }


def conclusions(differ: pd.DataFrame, told: pd.DataFrame) -> list[str]:
    """What the runs say, one sentence each, whichever way it falls; the tables are those of the two functions above."""
    said = []
    for outcome, rows in differ.groupby("outcome", sort=False):
        for one in rows.itertuples():
            words = OUTCOMES[outcome][0].upper() + OUTCOMES[outcome][1:]
            gain = f"{100 * one.mean:+.1f} points [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
            said.append(
                f"{words}, masks {one.better} against {one.other}: {gain} over {one.seeds} seeds, "
                f"{one.answer}; a true difference of {100 * one.smallest:.1f} is found in 80% of such studies."
            )
    for name, one in told.iterrows():
        within = f"{one['pearson_within']:.2f} [{one['pearson_within_low']:.2f}, {one['pearson_within_high']:.2f}]"
        tells = "tells" if one["tells"] else "does not tell"
        said.append(
            f"{MEASURES[name].capitalize()} {tells} the VQA score: correlation within arms {within}, error on held-out "
            f"seeds {100 * one['error']:.2f} points, of the mean {100 * one['error_of_mean']:.2f}."
        )
    return said
