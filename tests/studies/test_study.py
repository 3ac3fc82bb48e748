"""The study's statistics against scipy and scikit-learn, its verdicts, and a chain of real runs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict

from benchmarks import study as chains
from vpworkbench import figures
from vpworkbench.errors import SettingsError
from vpworkbench.jobs.sweep import make_jobs, sweep
from vpworkbench.runs import read_json, runs_root
from vpworkbench.stats import Interval, student_interval
from vpworkbench.studies import study

SEEDS = 8


@pytest.fixture(scope="module")
def drawn() -> study.Study:
    """32 chains with random measures; `live` follows the VQA score."""
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([study.ARMS, range(SEEDS)], names=["arm", "seed"])
    runs = pd.DataFrame(rng.normal(0.5, 0.02, (32, 7)), index, columns=["score", *study.MEASURES])
    runs["live"] = 2 * runs["score"] + rng.normal(0, 0.004, 32)
    ids = [f"{image}{number:03d}" for image in range(1, 76) for number in range(4)]
    questions = pd.DataFrame(rng.integers(0, 2, (300, 32)), ids, columns=index).astype(float)
    return study.Study(runs, questions)


@pytest.fixture(scope="module")
def differ(drawn) -> pd.DataFrame:
    return study.differences(drawn)


def test_paired_differences_are_those_of_scipy(drawn, differ):
    assert len(differ) == len(study.OUTCOMES) * len(study.COMPARED)
    for row in differ.itertuples():
        by_arm = drawn.runs[row.outcome].unstack("arm")
        test = stats.ttest_rel(by_arm[row.better], by_arm[row.other])
        plain, corrected = test.confidence_interval(0.95), test.confidence_interval(0.995)
        assert [row.low, row.high, row.low_all, row.high_all] == pytest.approx([*plain, *corrected])
        assert row.mean == pytest.approx((plain.low + plain.high) / 2) and row.seeds == SEEDS
        gains = by_arm[row.better] - by_arm[row.other]
        for smallest, level in ((row.smallest, 0.95), (row.smallest_all, 0.995)):
            bound, shifted = stats.t.ppf((1 + level) / 2, SEEDS - 1), smallest / gains.std() * np.sqrt(SEEDS)
            assert stats.nct.sf(bound, SEEDS - 1, shifted) == pytest.approx(study.POWER, abs=1e-6)
        flipped = [
            abs(np.mean(np.array(signs) * gains)) >= abs(gains.mean()) - 1e-12
            for signs in product((1, -1), repeat=SEEDS)
        ]
        assert row.sign_flips == pytest.approx(np.mean(flipped))


def test_the_share_of_questions_in_the_spread(drawn, differ):
    """A difference of two coins has the variance 0.5; four questions of an image with one coin count as one."""
    by_arm = drawn.runs["score"].unstack("arm")
    row = differ.iloc[0]
    spread = (by_arm[row["better"]] - by_arm[row["other"]]).var()
    assert row["by_questions"] == pytest.approx(0.5 / 300 / spread, rel=0.1)
    repeated = drawn.questions[::4].loc[lambda some: some.index.repeat(4)].set_axis(drawn.questions.index)
    row = study.differences(drawn._replace(questions=repeated)).iloc[0]
    assert row["by_questions"] == pytest.approx(0.5 / 75 / spread, rel=0.2)


def test_what_counts_as_an_answer():
    def answered(low: float, high: float, wider: float) -> str:
        middle = (low + high) / 2
        return study.answer(Interval(middle, low, high, 8), Interval(middle, low - wider, high + wider, 8))

    assert answered(0.01, 0.03, wider=0.008) == "yes" and answered(-0.03, -0.01, wider=0.008) == "reversed"
    assert answered(-0.009, 0.008, wider=0.02) == "no"
    assert answered(0.001, 0.03, wider=0.002) == answered(-0.03, -0.01, wider=0.02) == "undecided"


def test_correlations_are_those_of_scipy_and_errors_those_of_scikit_learn(drawn):
    found = study.correlations(drawn.runs)
    centred = drawn.runs - drawn.runs.groupby("arm").transform("mean")
    groups = drawn.runs.index.get_level_values("seed")
    for name, row in found.iterrows():
        for values, where in ((drawn.runs, ""), (centred, "_within")):
            both = values[name], values["score"]
            assert row[f"pearson{where}"] == pytest.approx(stats.pearsonr(*both).statistic)
            assert row[f"spearman{where}"] == pytest.approx(stats.spearmanr(*both).statistic)
            assert row[f"pearson{where}_low"] < row[f"pearson{where}"] < row[f"pearson{where}_high"]
        given = drawn.runs[[name]].to_numpy(), drawn.runs["score"].to_numpy()
        predicted = cross_val_predict(LinearRegression(), *given, groups=groups, cv=LeaveOneGroupOut())
        assert row["error"] == pytest.approx(np.abs(predicted - given[1]).mean())
        others = [given[1][groups != seed].mean() for seed in groups]
        assert row["error_of_mean"] == pytest.approx(np.abs(others - given[1]).mean())
        of_arms = drawn.runs["score"].groupby("arm").transform(lambda own: (own.sum() - own) / (SEEDS - 1))
        assert row["error_of_arms"] == pytest.approx(np.abs(of_arms - drawn.runs["score"]).mean())
        left_out = [stats.pearsonr(*centred_without(drawn.runs, seed, name)).statistic for seed in range(SEEDS)]
        assert [row["without_least"], row["without_most"]] == pytest.approx([min(left_out), max(left_out)])
    assert found["tells"].to_dict() == {name: name == "live" for name in study.MEASURES}


def centred_without(runs: pd.DataFrame, seed: int, name: str) -> tuple[pd.Series, pd.Series]:
    rest = runs.drop(seed, level="seed")
    centred = rest - rest.groupby("arm").transform("mean")
    return centred[name], centred["score"]


def test_within_arms_the_level_of_an_arm_does_not_matter(drawn):
    """With three seeds one resample in nine draws a single seed: it has no spread, not one that rounding makes."""
    few = drawn.runs[drawn.runs.index.get_level_values("seed") < 3]
    shifted = (
        few
        + pd.Series({"none": 0.1, "random": 1 / 3, "attention": 0.0, "object": 0.7})[
            few.index.get_level_values("arm")
        ].to_numpy()[:, None]
    )
    columns = [f"{kind}_within{bound}" for kind in study.CORRELATIONS for bound in ("", "_low", "_high")]
    pd.testing.assert_frame_equal(study.correlations(few)[columns], study.correlations(shifted)[columns])


def test_a_missing_measure_leaves_out_its_seed_for_all(drawn):
    runs = drawn.runs.copy()
    runs.loc[("random", 2), "flow"] = runs.loc[("none", 5), "score"] = np.nan
    whole = runs[~runs.index.get_level_values("seed").isin([2, 5])]
    pd.testing.assert_frame_equal(study.correlations(runs, ["flow"]), study.correlations(whole, ["flow"]))


@pytest.mark.parametrize(("seeds", "covered", "told"), [(3, (0.5, 0.8), (0.3, 0.8)), (8, (0.82, 0.97), (0.3, 0.75))])
def test_how_often_the_interval_of_a_correlation_covers_the_truth_and_is_above_the_bound(seeds, covered, told):
    """Of 80 studies with a true correlation of 0.6. With few seeds intervals are too short (docs/study.md)."""
    rng, held, above = np.random.default_rng(1), [], []
    index = pd.MultiIndex.from_product([study.ARMS, range(seeds)], names=["arm", "seed"])
    for _ in range(80):
        values = rng.normal(size=4 * seeds)
        runs = pd.DataFrame({"flow": values, "score": 0.6 * values + 0.8 * rng.normal(size=4 * seeds)}, index)
        row = study.correlations(runs, ["flow"]).iloc[0]
        held.append(row["pearson_within_low"] <= 0.6 <= row["pearson_within_high"])
        above.append(row["pearson_within_low"] > study.STRONG)
    assert covered[0] <= np.mean(held) <= covered[1] and told[0] <= np.mean(above) <= told[1], (
        np.mean(held),
        np.mean(above),
    )


def test_sentences_and_figures_say_what_the_tables_hold(drawn, differ):
    told = study.correlations(drawn.runs)
    said = study.conclusions(differ, told)
    assert len(said) == len(differ) + len(told) and f"random: {differ['mean'][0]:+.3f} [" in said[0]
    assert [line for line in said if "seeds" in line and " tells the VQA score" in line][0].startswith("Live flow")
    rows = study.intervals(differ, "score")
    assert list(rows)[0] == "attention - random" and len(rows) == len(study.COMPARED)
    drawing = figures.forest(rows, no_matter=0.01, title="VQA", axis="difference")
    np.testing.assert_allclose(drawing.data[1].x, [plain.mean for plain, _ in rows.values()])
    np.testing.assert_allclose(drawing.data[0].error_x.array, [wide.high - wide.mean for _, wide in rows.values()])
    panels = figures.scores_against(study.by_arm(drawn.runs), title="t", score="VQA")
    assert len(panels.data) == 4 * len(study.MEASURES) and list(panels.data[0].y) == list(
        drawn.runs.loc["none", "score"]
    )


def test_a_study_is_saved_and_read(drawn, tmp_path):
    drawn.save(tmp_path)
    again = study.open_study(str(tmp_path))
    pd.testing.assert_frame_equal(again.runs, drawn.runs, rtol=1e-4)
    assert (again.questions.to_numpy() == drawn.questions.to_numpy()).all()
    assert list(again.questions) == list(drawn.questions) and list(again.questions.index) == list(drawn.questions.index)
    assert len(chains.renewed(again, drawn).questions) == 300  # the same questions, not twice as many
    with pytest.raises(SettingsError, match="holds no runs.csv"):
        study.open_study(str(tmp_path / "none"))


def test_a_study_made_on_two_machines_is_one(drawn):
    """Chains of the second machine are added, and replace those that the first has too."""
    keys = drawn.runs.index
    first = study.Study(drawn.runs.loc[keys[:20]] + 1, drawn.questions[keys[:20]] + 1)
    whole = chains.renewed(first, study.Study(drawn.runs.loc[keys[5:]], drawn.questions[keys[5:]]))
    assert list(whole.runs.index[:5]) == [*((arm, 0) for arm in study.ARMS), ("none", 1)]
    assert list(whole.questions) == list(whole.runs.index)
    for key in keys:
        more = int(key in keys[:5])
        pd.testing.assert_series_equal(whole.runs.loc[key], drawn.runs.loc[key] + more)
        pd.testing.assert_series_equal(whole.questions[key], drawn.questions[key] + more)


def test_families_are_added_for_the_seeds_that_all_arms_have(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(chains, "FOLDER", tmp_path)
    families = drawn.runs.loc[["none", "random"]].rename({"none": "grid-none", "random": "grid-random"}, level="arm")
    families[families.index.get_level_values("seed") < 3].to_csv(tmp_path / chains.FAMILIES)
    both = chains.with_families(drawn.runs)
    assert sorted(both.index.unique("arm")) == sorted([*study.ARMS, "grid-none", "grid-random"])
    assert len(both) == 6 * 3 and set(both.index.get_level_values("seed")) == {0, 1, 2}
    assert chains.tells(both) != chains.tells(drawn.runs)


def test_what_blocking_costs_is_what_the_runs_measured():
    """The span of all layers is in runs.csv too."""
    runs = study.open_study().runs
    row = [line for line in chains.blocking(runs).splitlines() if line.startswith("| words read no image | 1 to 3 |")]
    costs = [student_interval(runs[name].groupby("seed").mean()) for name in ("match", "word", "answer")]
    assert row == [f"| words read no image | 1 to 3 | {' | '.join(f'{one:+.3f}' for one in costs)} |"]


def test_a_study_that_cannot_be_compared_is_refused(drawn, tmp_path):
    """Differences need two arms with the same two seeds; the four arms need not be complete."""
    few = study.Study(drawn.runs.loc[[("none", 0), ("random", 0), ("random", 1)]], drawn.questions)
    few.save(tmp_path)
    with pytest.raises(SettingsError, match="it has none with seed 0, random with seed 0, random with seed 1"):
        study.open_study(str(tmp_path))
    study.Study(drawn.runs.loc[["attention", "object"]], drawn.questions).save(tmp_path)
    with pytest.raises(SettingsError, match="two arms that are compared .attention - random, random - none"):
        study.open_study(str(tmp_path))
    two = study.Study(drawn.runs.loc[["none", "random"]], drawn.questions)
    two.save(tmp_path)
    differ = study.differences(study.open_study(str(tmp_path)))
    assert set(differ["better"]) == {"random"} and len(study.correlations(two.runs)) == len(study.MEASURES)
    with pytest.raises(SettingsError, match="a study's job gives masking and seed, and runs 01_pretrain, 02_probe"):
        study.collect(make_jobs({"notebook": "01_pretrain", "name": "a", "grid": {"seed": [0, 1]}}))


@pytest.mark.slow
def test_a_chain_of_real_runs_is_collected(runs_folder):
    """Two arms, two steps: every measure is a finite number of the runs' own files."""
    few = {"data.scenes.images": 80, "data.scenes.val": 20, "data.scenes.test": 8}
    asked = {key.removeprefix("data."): value for key, value in few.items()}
    jobs = make_jobs(
        {
            "notebook": "01_pretrain",
            "name": "study",
            "parameters": {"steps": 2, **few},
            "grid": {"seed": [0], "masking": ["none", "attention"]},
            "then": [
                {"notebook": "02_probe", "parameters": {"images": 4}},
                {"notebook": "07_knock_out", "parameters": {"images": 4}},
                {"notebook": "04_finetune", "parameters": {"steps": 2, **asked}},
                {"notebook": "07_knock_out", "suffix": "score", "parameters": {"images": 4}},
            ],
        }
    )
    with pytest.raises(SettingsError, match="none of the 2 chains is complete"):
        study.collect(jobs)
    assert set(sweep(jobs)["state"]) == {"done"}
    found = study.collect(jobs)
    assert list(found.runs.index) == [("none", 0), ("attention", 0)]
    assert found.runs.drop(columns="target_rank").notna().all(axis=None)
    name = jobs[1].name
    tuned = read_json(runs_root() / "04_finetune" / name / "summary.json")
    assert found.questions["attention", 0].mean() == pytest.approx(tuned["test"]["vqa_score"])
    blocked = read_json(runs_root() / "07_knock_out" / f"{name}-vqa" / "summary.json")
    lost = blocked["answer_before"] - blocked["answer_blocked"]
    assert found.runs.loc[("attention", 0), "answer"] == pytest.approx(lost)
