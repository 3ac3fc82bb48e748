"""Means with 95% intervals: by bootstrap over samples, and by Student's t over training runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

RESAMPLES = 2_000


class Interval(NamedTuple):
    """A mean and its 95% interval, in the shape of one sample; nan where `count` is 0."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    count: np.ndarray  # samples that are not nan

    def __format__(self, spec: str) -> str:
        """`f"{interval:.1%}"` is such as `54.0% [50.1%, 58.0%]`."""
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def at(self, place: int) -> Interval:
        """One of several intervals."""
        return Interval(*(part[place] for part in self))


def flatten(intervals: Mapping[str, Interval]) -> dict[str, float]:
    """Each mean under its name `x`, its bounds under `x_low` and `x_high`."""
    flat = {}
    for name, (mean, low, high, _) in intervals.items():
        flat |= {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}
    return flat


def bootstrap_interval(values: ArrayLike, seed: int = 0, *, weights: ArrayLike | None = None) -> Interval:
    """Percentile bootstrap of the mean over samples; `values` are (sample, ...).

    nan entries are left out, at each position separately. All positions share the same resamples, drawn by `seed`.
    `weights`, (sample,), default to equal ones.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 0 or len(values) == 0:
        raise ValueError("bootstrap_interval needs at least one sample along the first axis")
    flat = values.reshape(len(values), -1)
    present = ~np.isnan(flat)
    weighed = present * (1.0 if weights is None else np.asarray(weights, dtype=np.float64)[:, None])
    filled = np.where(present, flat, 0.0) * weighed
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(flat), np.full(len(flat), 1 / len(flat)), size=RESAMPLES)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (counts @ filled) / (counts @ weighed)  # resample position
        mean = filled.sum(axis=0) / weighed.sum(axis=0)
    tail = (1 - 0.95) / 2
    low, high = np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    known = present.any(axis=0)
    if known.any():
        low[known], high[known] = np.nanquantile(means[:, known], [tail, 1 - tail], axis=0)
    shape = values.shape[1:]
    return Interval(*(part.reshape(shape) for part in (mean, low, high, present.sum(axis=0))))


def paired_interval(first: ArrayLike, second: ArrayLike, seed: int = 0) -> Interval:
    """Bootstrap interval of the mean difference `first - second`, both of the same samples."""
    return bootstrap_interval(np.asarray(first) - np.asarray(second), seed)


def bootstrap_statistic(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> Interval:
    """Percentile bootstrap of any statistic of `count` samples, such as a ratio of sums.

    It takes rows of sample numbers, (..., sample), and returns the statistic of each row, (...); nan does not count.
    """
    resampled = statistic(np.random.default_rng(0).integers(0, count, (RESAMPLES, count)))
    low, high = np.nanquantile(resampled, (0.025, 0.975))
    return Interval(float(statistic(np.arange(count))), float(low), float(high), count)


def mean_of_independent(intervals: Sequence[Interval]) -> Interval:
    """Unweighted mean of means over independent samples; the squares of their half widths add up."""
    half = reduce(np.hypot, ((one.high - one.low) / 2 for one in intervals)) / len(intervals)
    mean = np.mean([one.mean for one in intervals])
    return Interval(mean, mean - half, mean + half, min(one.count for one in intervals))


def student_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Mean of independent runs with Student's interval; bounds are nan for fewer than two."""
    values = np.asarray(values, dtype=np.float64)
    mean, count, half = values.mean(), len(values), np.nan
    if count > 1:
        half = stdtrit(count - 1, (1 + level) / 2) * values.std(ddof=1) / np.sqrt(count)
    return Interval(mean, mean - half, mean + half, np.array(count))


def seeds_and_samples_interval(seeds: np.ndarray, sample_variance: ArrayLike) -> Interval:
    """Mean share over seeds, with an interval that covers other seeds and other samples.

    `seeds` are the means of each seed, shares in [0, 1], (seed, ...); `sample_variance` is that of the mean over
    samples, (...). The variances of the two means add up. The quantile is Student's, with the degrees of freedom of
    Welch and Satterthwaite: those of the seeds where seeds differ much more than samples, more where they do not. With
    one seed the interval covers other samples only. Bounds are cut at 0 and 1.
    """
    variance, freedom = np.asarray(sample_variance), np.inf
    if len(seeds) > 1:
        between = seeds.var(axis=0, ddof=1) / len(seeds)
        with np.errstate(divide="ignore", invalid="ignore"):
            freedom = np.where(between > 0, (len(seeds) - 1) * (1 + variance / between) ** 2, np.inf)
        variance = variance + between
    mean, half = seeds.mean(axis=0), stdtrit(freedom, 0.975) * np.sqrt(variance)
    return Interval(mean, np.maximum(mean - half, 0), np.minimum(mean + half, 1), np.full(np.shape(mean), len(seeds)))


def over_seeds(parts: Sequence[np.ndarray]) -> Interval:
    """`seeds_and_samples_interval` of each seed's measurements of the same samples, shares in [0, 1], (sample, ...).

    nan entries are left out.
    """
    seeds = np.stack([np.nanmean(part, axis=0) for part in parts])
    samples = np.nanmean(np.stack(parts), axis=0)
    count = np.isfinite(samples).sum(axis=0)
    return seeds_and_samples_interval(seeds, np.nanvar(samples, axis=0, ddof=1) / count)
