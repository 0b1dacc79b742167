"""Rank correlations over lives, with intervals that resample whole seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import rankdata

from perennial.statistics import LEVEL, RESAMPLES, SEED, Floats

LEAST = 3
"""Points below which there is no rank correlation."""

_PAIR: dict[str, type[pl.DataType]] = {
    "version": pl.String,
    "start": pl.Boolean,
    **dict.fromkeys(("first", "second"), pl.String),
    **dict.fromkeys(("spearman", "low", "high"), pl.Float64),
    **dict.fromkeys(("points", "lives", "constant", "short"), pl.Int64),
}


def correlations(points: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """Spearman's rank correlation of every pair of quantities.

    ``pooled``: over all points. ``within``: over the times of each life, then the mean over lives; a life in which one
    of the two is constant has none. Intervals are percentile bootstrap intervals over seeds: a draw takes all lives of
    a seed together, whatever their method, since they share data and first weights.

    Args:
        points: columns ``method``, ``seed``, ``step`` and the quantities; those with a null are left out.
        names: of the quantities.
    """
    rows: list[dict[str, Any]] = []
    points = points.drop_nulls(names)
    for start in (True, False):
        kept = points if start else points.filter(pl.col("step") > 0)
        seeds = sorted(set(kept.get_column("seed")))
        if not seeds:
            continue
        by_seed = [
            [life.sort("step").select(names).to_numpy() for _, life in mine.group_by("method", maintain_order=True)]
            for seed in seeds
            for mine in [kept.filter(pl.col("seed") == seed)]
        ]
        lives = [life for mine in by_seed for life in mine]
        owner = np.repeat(np.arange(len(seeds)), [len(mine) for mine in by_seed])
        times = np.zeros((RESAMPLES, len(seeds)), dtype=np.int64)  # how often each draw takes each seed
        drawn = np.random.default_rng(SEED).integers(0, len(seeds), (RESAMPLES, len(seeds)))
        np.add.at(times, (np.arange(RESAMPLES)[:, None], drawn), 1)
        each = np.stack([spearman(life) for life in lives])
        pooled = _pooled([np.concatenate(mine) for mine in by_seed], times)
        short = np.array([len(life) < LEAST for life in lives])
        known = np.isfinite(each)
        for a, b in itertools.combinations(range(len(names)), 2):
            here = known[:, a, b]
            count = np.bincount(owner[here], minlength=len(seeds))
            total = np.bincount(owner[here], each[here, a, b], minlength=len(seeds))
            with np.errstate(invalid="ignore"):
                means = (times @ total) / (times @ count)
            pair = {"start": start, "first": names[a], "second": names[b], "short": int(short.sum())}
            pair["constant"] = int((~here & ~short).sum())
            whole = float(spearman(np.concatenate(lives))[a, b])
            low, high = _interval(pooled[:, a, b], len(seeds))
            rows.append(
                {**pair, "version": "pooled", "spearman": whole, "low": low, "high": high, "points": kept.height}
                | {"lives": len(lives), "constant": 0, "short": 0}
            )
            low, high = _interval(means, int((count > 0).sum()))
            mean = float(total.sum() / count.sum()) if here.any() else math.nan
            many = sum(len(life) for life, counted in zip(lives, here, strict=True) if counted)
            rows.append(
                {**pair, "version": "within", "spearman": mean, "low": low, "high": high, "points": many}
                | {"lives": int(here.sum())}
            )
    return pl.DataFrame(rows, schema=_PAIR).with_columns(pl.col("spearman", "low", "high").fill_nan(None))


def spearman(table: Floats) -> Floats:
    """Spearman's rank correlation of every pair of columns, [points, columns] -> [columns, columns]; equal values share
    their mean rank. NaN for a column without two different values, and for fewer than three points."""
    points, columns = table.shape
    if points < LEAST:
        return np.full((columns, columns), np.nan)
    ranks = rankdata(table, axis=0) - (points + 1) / 2
    size = np.sqrt((ranks**2).sum(0))
    scale = np.outer(size, size)
    found = np.divide(ranks.T @ ranks, scale, out=np.full(scale.shape, np.nan), where=scale > 0)
    return np.asarray(np.clip(found, -1, 1), dtype=np.float64)


def _pooled(tables: Sequence[Floats], times: NDArray[np.int64]) -> Floats:
    """The correlations of every draw, [draws, columns, columns]. Few seeds make few different draws."""
    different, which = np.unique(times, axis=0, return_inverse=True)
    found = [
        spearman(np.concatenate([table for table, n in zip(tables, row, strict=True) for _ in range(n)]))
        for row in different
    ]
    return np.stack(found)[which.reshape(-1)]


def _interval(draws: Floats, seeds: int) -> tuple[float, float]:
    known = draws[np.isfinite(draws)]
    if seeds < 2 or not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
