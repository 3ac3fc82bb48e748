"""Bootstrap intervals of a mean."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Interval(NamedTuple):
    """A mean and its bootstrap interval, in the shape of one sample; nan where count is 0."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    count: np.ndarray  # samples that were not nan


def bootstrap_interval(values: ArrayLike, seed: int = 0, *, level: float = 0.95, resamples: int = 2000) -> Interval:
    """Percentile bootstrap of the mean over samples.

    Parameters
    ----------
    values : array, shape (sample, ...)
        nan entries are left out, each position for itself. All positions share the same resamples,
        so differences between positions can be read off the bounds' joint order.
    seed : int
        Of the resampling; the same seed gives the same interval.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 0 or len(values) == 0:
        raise ValueError("bootstrap_interval needs at least one sample along the first axis")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    flat = values.reshape(len(values), -1)
    present = ~np.isnan(flat)
    filled = np.where(present, flat, 0.0)
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(flat), np.full(len(flat), 1 / len(flat)), size=resamples)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (counts @ filled) / (counts @ present)  # resample position
        mean = filled.sum(axis=0) / present.sum(axis=0)
    tail = (1 - level) / 2
    low, high = np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    known = present.any(axis=0)
    low[known], high[known] = np.nanquantile(means[:, known], [tail, 1 - tail], axis=0)
    shape = values.shape[1:]
    return Interval(*(part.reshape(shape) for part in (mean, low, high, present.sum(axis=0))))
