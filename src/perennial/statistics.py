"""Means over seeds and how well they are known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 5000
"""Bootstrap samples of an interval."""
LEVEL = 0.95
"""Share of bootstrap means inside an interval."""
SEED = 20240821
"""Of the resampling: the same results give the same interval, to the last digit."""
_BLOCK = 256  # points at once: 5000 x 256 float64 is 10 MB, whatever the length of the run

Floats = NDArray[np.float64]


class Estimate(NamedTuple):
    """Means of several quantities over lanes, each array [points]."""

    mean: Floats
    """NaN where no lane is left."""
    low: Floats
    """Lower end of the interval; NaN where fewer than two lanes are left."""
    high: Floats
    """Upper end of the interval; NaN where fewer than two lanes are left."""
    lanes: NDArray[np.int64]
    """Lanes behind the mean."""


def estimate(samples: ArrayLike, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = SEED) -> Estimate:
    r"""Mean over lanes with a percentile bootstrap interval (Efron, 1979).

    Lanes are drawn with replacement ``resamples`` times, and the interval runs from the :math:`(1 - level) / 2` to the
    :math:`(1 + level) / 2` quantile (linear interpolation) of the means of the draws. A draw takes whole lanes, all
    points together, which keeps paired what belongs to one seed. A lane that is NaN at a point is left out of that
    point's means.

    Args:
        samples: [lanes, points]; NaN where a lane has diverged.
        resamples: bootstrap samples.
        level: share of the bootstrap means inside the interval, in (0, 1).
        seed: of the resampling.

    Returns:
        In the samples' unit.
    """
    values = np.asarray(samples, dtype=np.float64)
    lanes, points = values.shape
    present = np.isfinite(values)
    known, filled = present.astype(np.float64), np.where(present, values, 0.0)
    count = present.sum(0)
    mean = _ratio(filled.sum(0), count)
    low, high = np.full(points, np.nan), np.full(points, np.nan)
    if lanes > 1:
        drawn = np.random.default_rng(seed).integers(0, lanes, (resamples, lanes))
        times = np.zeros((resamples, lanes))  # how often each draw takes each lane
        np.add.at(times, (np.arange(resamples)[:, None], drawn), 1.0)
        for start in range(0, points, _BLOCK):
            block = slice(start, start + _BLOCK)
            means = np.sort(_ratio(times @ filled[:, block], times @ known[:, block]), axis=0)  # NaN sorts last
            low[block] = _quantile(means, (1 - level) / 2)
            high[block] = _quantile(means, (1 + level) / 2)
        low[count < 2], high[count < 2] = np.nan, np.nan
    return Estimate(mean, low, high, count.astype(np.int64))


def run_average(values: Floats, steps: NDArray[np.int64]) -> Floats:
    """Average of each lane over its run, each bin counted by the examples in it.

    Args:
        values: [lanes, bins], means over bins.
        steps: [bins], the step at which each bin ends.

    Returns:
        [lanes]; NaN for a lane with a NaN in any bin, since an average over part of a run is of another quantity.
    """
    length = np.diff(steps, prepend=0)
    return np.asarray(values @ (length / length.sum()), dtype=np.float64)


def _ratio(total: Floats, count: ArrayLike) -> Floats:
    divisor = np.asarray(count, dtype=np.float64)
    ratio: Floats = np.divide(total, divisor, out=np.full(total.shape, np.nan), where=divisor > 0)
    return ratio


def _quantile(ordered: Floats, share: float) -> Floats:
    """Quantile of each column's finite entries, which come first and in order: [draws, points] -> [points]."""
    last = np.isfinite(ordered).sum(0) - 1
    position = np.maximum(last, 0) * share
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, np.maximum(last, 0))
    columns = np.arange(ordered.shape[1])
    lower, upper = ordered[below, columns], ordered[above, columns]
    return np.asarray(lower + (position - below) * (upper - lower), dtype=np.float64)
