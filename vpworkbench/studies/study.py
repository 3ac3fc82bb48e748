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
from scipy.special import nctdtrinc, stdtrit
from scipy.stats import permutation_test, rankdata

from vpworkbench.errors import SettingsError
from vpworkbench.jobs.sweep import Job, read_jobs
from vpworkbench.runs import Run, read_json, runs_root, saved_settings, shipped_run
from vpworkbench.settings import FinetuneSettings, checked
from vpworkbench.stats import Interval, bootstrap_interval, bootstrap_statistic, flatten, student_interval
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
CORRECTED = 1 - 0.05 / (len(OUTCOMES) * len(COMPARED))
"""Level of an interval that is corrected for the number of comparisons (Bonferroni)."""
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
    cells = {arm: {name: f"{student_interval(own[name]):.3g}" for name in own} for arm, own in arms.items()}
    return pd.DataFrame(cells)


def differences(study: Study) -> pd.DataFrame:
    """Paired differences over seeds, one row for each outcome and pair of arms.

    `mean`, `low`, `high` with Student's 95% interval, `low_all`, `high_all` corrected for the number of rows
    (Bonferroni); `smallest` and `smallest_all` are the true differences that each interval finds with a power of 80%.
    `sign_flips` is the p-value of the mean among all flips of the seeds' signs, not corrected. `by_questions` is the
    variance that the choice of test questions gives a difference, as a share of that between seeds; above 1 where
    seeds differ less than questions allow. `answer` is what the plan calls it.
    """
    rows = []
    for outcome in OUTCOMES:
        for (better, other), gains in paired(study.runs, outcome).items():
            plain, corrected = student_interval(gains), student_interval(gains, level=CORRECTED)
            found = {"outcome": outcome, "better": better, "other": other, "seeds": len(gains)}
            found |= {"mean": plain.mean, "low": plain.low, "high": plain.high}
            found |= {"low_all": corrected.low, "high_all": corrected.high, "sign_flips": sign_flips(gains)}
            found |= {"smallest": smallest_found(gains, 0.95), "smallest_all": smallest_found(gains, CORRECTED)}
            if outcome == "score":
                answered = (study.questions[better, seed] - study.questions[other, seed] for seed in gains.index)
                found["by_questions"] = np.mean([variance_by_questions(one) for one in answered]) / gains.var(ddof=1)
            rows.append(found | {"answer": answer(plain, corrected)})
    return pd.DataFrame(rows)


def paired(runs: pd.DataFrame, measure: str) -> dict[tuple[str, str], pd.Series]:
    """For each pair of `COMPARED` that ran: the difference of a measure in each seed that both arms have."""
    by_seed = runs[measure].unstack("arm")
    pairs = (pair for pair in COMPARED if set(pair) <= set(by_seed))
    return {(better, other): (by_seed[better] - by_seed[other]).dropna() for better, other in pairs}


def variance_by_questions(gains: pd.Series) -> float:
    """Variance of the mean of one seed's questions, by a bootstrap over images; ids end in three digits for each."""
    images = gains.groupby(gains.index.str[:-3])
    interval = bootstrap_interval(images.mean(), weights=images.size())
    return float((interval.high - interval.low) / (2 * stdtrit(np.inf, 0.975))) ** 2


def sign_flips(gains: pd.Series) -> float:
    """Exact p-value, two-sided, of the mean of paired differences whose signs could as well be the other way."""
    return float(permutation_test((gains,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue)


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


def smallest_found(gains: pd.Series, level: float) -> float:
    """The true difference whose interval of this level is above zero with a power of 80%, by the spread of the gains.

    Student's t is then noncentral; its noncentrality is the difference over its standard error.
    """
    freedom = len(gains) - 1
    bound = stdtrit(freedom, (1 + level) / 2)
    return float(nctdtrinc(freedom, 1 - POWER, bound) * gains.std(ddof=1) / np.sqrt(len(gains)))


def correlations(runs: pd.DataFrame, measures: Sequence[str] = tuple(MEASURES), score: str = "score") -> pd.DataFrame:
    """How well each measure tells the score, one row each; intervals by a bootstrap over seeds, all arms together.

    `pearson` and `spearman` over all runs, and `within` arms: both quantities centred in each. `without_least` and
    `without_most` bound `pearson_within` when any one seed is left out. `error` is the mean absolute error of a line
    fitted on all other seeds, `error_of_mean` that of their mean, `error_of_arms` that of their mean in the same arm.
    `tells` is the plan's rule.
    """
    rows = {}
    for name in measures:
        (values, scores), found = _tables(runs, name, score), {}
        for (kind, ranked), (where, centred) in product(CORRELATIONS.items(), {"": False, "_within": True}.items()):
            statistic = _correlation(values, scores, ranked=ranked, centred=centred)
            found |= flatten({f"{kind}{where}": bootstrap_statistic(statistic, len(scores))})
        seeds = range(len(scores))
        without = _correlation(values, scores, ranked=False, centred=True)(
            np.array([np.delete(seeds, one) for one in seeds])
        )
        found |= {"without_least": without.min(), "without_most": without.max()} | held_out_errors(values, scores)
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
    """A statistic for `bootstrap_statistic`: of numbers of seeds, (..., seed), the correlation over their runs.

    nan where there is no spread: centred in each arm, one seed drawn again and again has none.
    """

    def statistic(seeds: np.ndarray) -> np.ndarray:
        sides = []
        for table in (values, scores):
            drawn = table[seeds]  # ... seed arm
            drawn = (drawn - drawn.mean(axis=-2, keepdims=True) * centred).reshape(*seeds.shape[:-1], -1)
            drawn = drawn.round(12)  # what is equal but for rounding has equal ranks, and no spread
            drawn = rankdata(drawn, axis=-1) if ranked else drawn
            sides.append(drawn - drawn.mean(axis=-1, keepdims=True))
        one, other = sides
        with np.errstate(invalid="ignore"):
            return (one * other).sum(axis=-1) / np.sqrt((one**2).sum(axis=-1) * (other**2).sum(axis=-1))

    return statistic


def held_out_errors(values: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Mean absolute error on each seed of what all others say; both are (seed, arm).

    That is a line through their runs, their mean, and the mean of those in the same arm.
    """
    errors = []
    for seed, held_out in enumerate(scores):
        known, others = np.delete(values, seed, axis=0), np.delete(scores, seed, axis=0)
        line = np.polyval(np.polyfit(known.ravel(), others.ravel(), 1), values[seed])
        errors.append([np.abs(held_out - expected).mean() for expected in (line, others.mean(), others.mean(axis=0))])
    return dict(zip(("error", "error_of_mean", "error_of_arms"), np.mean(errors, axis=0), strict=True))


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
    for one in differ.itertuples():
        words = OUTCOMES[one.outcome][0].upper() + OUTCOMES[one.outcome][1:]
        gain = f"{Interval(one.mean, one.low, one.high, one.seeds):+.3f}"
        said.append(
            f"{words}, masks {one.better} against {one.other}: {gain} over {one.seeds} seeds, {one.answer}. "
            f"A true difference of {one.smallest:.3f} is found in 80% of such studies, one of {one.smallest_all:.3f} "
            "after the correction for all comparisons."
        )
    for name, one in told.iterrows():
        within = Interval(*one[["pearson_within", "pearson_within_low", "pearson_within_high"]], count=0)
        tells = "tells" if one["tells"] else "does not tell"
        said.append(
            f"{MEASURES[name].capitalize()} {tells} the VQA score: correlation within arms {within:.2f}; "
            f"error on held-out seeds {100 * one['error']:.2f} points, of the mean {100 * one['error_of_mean']:.2f}, "
            f"of the mean of the same arm {100 * one['error_of_arms']:.2f}."
        )
    return said
