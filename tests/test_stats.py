"""Intervals: they cover the truth as often as they say, and equal the formulas of the textbook."""

import numpy as np
import pytest
from scipy import stats

from vpworkbench.stats import (
    Interval,
    bootstrap_interval,
    bootstrap_statistic,
    flatten,
    mean_of_independent,
    over_seeds,
    paired_interval,
    student_interval,
)


def test_intervals_cover_the_mean_and_repeat():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        low, high = bootstrap_interval(generator.normal(1.0, 2.0, 60))[1:3]
        covered += low <= 1.0 <= high
    assert 88 <= covered <= 99
    values = generator.normal(size=(30, 2, 3))
    values[:, 0, 0] = np.nan
    values[3, 1, 1] = np.nan
    interval = bootstrap_interval(values, seed=5)
    assert interval.mean.shape == (2, 3) and np.isnan(interval.low[0, 0])
    assert interval.count.tolist() == [[0, 30, 30], [30, 29, 30]]
    np.testing.assert_allclose(interval.mean[1, 1], np.nanmean(values[:, 1, 1]))
    np.testing.assert_array_equal(interval.low, bootstrap_interval(values, seed=5).low)
    assert np.isnan(bootstrap_interval([np.nan, np.nan])[:3]).all()
    with pytest.raises(ValueError, match="at least one sample"):
        bootstrap_interval([])


def test_samples_can_have_weights():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(1, 2, size=400), rng.uniform(0, 3, size=400)
    values[:3] = np.nan
    found = bootstrap_interval(values, weights=weights)
    kept = slice(3, None)
    mean = (values[kept] * weights[kept]).sum() / weights[kept].sum()
    half = 1.96 * (weights * (values - mean))[kept].std(ddof=1) / weights[kept].mean() / np.sqrt(397)
    assert found.mean == pytest.approx(mean) and found.count == 397
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    alike = bootstrap_interval(values, weights=np.full(400, 2.0))
    np.testing.assert_allclose(alike[:3], bootstrap_interval(values)[:3])


def test_the_interval_of_a_paired_difference_has_the_width_of_the_differences():
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 5, size=400)
    first, second = shared + rng.normal(0.3, 0.1, size=400), shared + rng.normal(0, 0.1, size=400)
    found = paired_interval(first, second)
    half = 1.96 * (first - second).std(ddof=1) / 20
    assert found.mean == pytest.approx(0.3, abs=0.03)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_the_interval_of_a_ratio_agrees_with_the_delta_method():
    rng = np.random.default_rng(0)
    first, second = rng.uniform(1, 2, size=1_000), rng.uniform(2, 3, size=1_000)
    found = bootstrap_statistic(lambda rows: first[rows].sum(axis=-1) / second[rows].sum(axis=-1), 1_000)
    ratio = first.mean() / second.mean()
    half = 1.96 * (first - ratio * second).std(ddof=1) / second.mean() / np.sqrt(1_000)
    assert found.mean == pytest.approx(ratio) and found.count == 1_000
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_the_mean_of_independent_means_has_the_textbooks_interval():
    rng = np.random.default_rng(0)
    samples = [rng.normal(0.4, 0.1, size=300), rng.normal(0.6, 0.3, size=500)]
    found = mean_of_independent([bootstrap_interval(one) for one in samples])
    half = 1.96 * np.sqrt(sum(one.var(ddof=1) / len(one) for one in samples)) / 2
    assert found.mean == pytest.approx(np.mean([one.mean() for one in samples])) and found.count == 300
    assert [found.mean - found.low, found.high - found.mean] == pytest.approx([half, half], rel=0.1)


def test_students_interval_is_scipys():
    values = [0.7, 0.8, 0.95]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert [*map(float, student_interval(values))] == pytest.approx([np.mean(values), low, high, 3])
    alone = student_interval([0.7])
    assert alone.mean == 0.7 and np.isnan([alone.low, alone.high]).all()


def test_intervals_over_seeds_and_images():
    rng = np.random.default_rng(0)
    parts = [rng.uniform(0.3, 0.6, size=(50, 3)) + shift for shift in (0.0, 0.01, 0.03)]
    parts[0][4, 1] = np.nan
    found = over_seeds(parts)
    seeds = np.array([np.nanmean(part[:, 1]) for part in parts])
    images = np.nanmean([part[:, 1] for part in parts], axis=0)
    one, other = seeds.var(ddof=1) / 3, images.var(ddof=1) / 50
    half = stats.t.ppf(0.975, (one + other) ** 2 / (one**2 / 2)) * np.sqrt(one + other)
    assert [float(part[1]) for part in found] == pytest.approx(
        [seeds.mean(), seeds.mean() - half, seeds.mean() + half, 3]
    )
    one = over_seeds(parts[1:2])
    half = stats.norm.ppf(0.975) * parts[1][:, 0].std(ddof=1) / np.sqrt(50)
    assert float(one.high[0] - one.mean[0]) == pytest.approx(half)
    apart = over_seeds([np.full((50, 1), share) for share in (0.2, 0.9)])  # half: 12.7 times 0.35
    assert (apart.low, apart.high) == (0, 1)
    same = over_seeds([np.full((50, 1), 0.3)] * 3)
    assert (same.low, same.high) == (pytest.approx(0.3), pytest.approx(0.3))


@pytest.mark.parametrize("seed, image", [(0.02, 0.02), (0.02, 0.2), (0.002, 0.2)])
def test_nineteen_of_twenty_intervals_hold_the_truth(seed, image):
    """Three seeds and 100 images; `seed` and `image` are the standard deviations between them."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(2_000):
        of_seed, of_image = rng.normal(0, seed, size=(3, 1)), rng.normal(0, image, size=100)
        found = over_seeds(list(0.5 + of_seed + of_image))
        held += bool(found.low <= 0.5 <= found.high)
    assert 0.93 <= held / 2_000 <= 0.97


def test_intervals_become_three_columns_each():
    one, two = Interval(0.5, 0.4, 0.6, 10), Interval(np.array(2.0), np.array(1.0), np.array(3.0), np.array(9))
    assert flatten({"a": one, "b": two}) == {
        "a": 0.5,
        "a_low": 0.4,
        "a_high": 0.6,
        "b": 2.0,
        "b_low": 1.0,
        "b_high": 3.0,
    }


def test_intervals_are_written_with_their_bounds():
    layers = Interval(*(np.array(values) for values in ([0.2, 0.54], [0.1, 0.5], [0.3, 0.58], [3, 3])))
    assert f"{layers.at(1):.1%}" == "54.0% [50.0%, 58.0%]"
