"""What the report of a study of arriving classes says in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from perennial.incremental import ArrivingClasses
from perennial.report.load import NoResultsError
from perennial.statistics import Floats, estimate

MEASURED = ("test_accuracy", "dormant", "rank_99", "effective_rank", "weight_magnitude", "training_loss")
"""Of each increment as it was recorded; a column each with ``_low`` and ``_high`` of its interval. ``rank_99`` is a
share of the features here."""
AGAINST = "against_retrained"
"""Test accuracy less that of a network that is trained from scratch on the same classes, paired by seed."""


@dataclass(frozen=True)
class ArrivingTables:
    """Of a study of arriving classes, in the study's order of methods."""

    methods: pl.DataFrame
    """A row a method: ``method``, ``label``, ``seeds`` (finished), ``diverged`` (of these), ``seconds`` a step,
    ``average`` (test accuracy over all increments), ``replaced`` (units, in all) and the values at the last increment
    that has them of :data:`MEASURED` and :data:`AGAINST`, with intervals over seeds."""
    increments: pl.DataFrame
    """A row a method and increment: ``method``, ``label``, ``classes``, and :data:`MEASURED` and :data:`AGAINST` with
    intervals."""
    finished: int
    """Runs."""


def tabulate_arriving(setting: ArrivingClasses, directory: Path) -> ArrivingTables:
    """Read a run's results.

    Raises:
        NoResultsError: no network has seen all its classes.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in setting.methods}
    for job in setting.jobs():
        results = job.results(directory)
        if results is not None and results.get("finished"):
            found[job.method][job.seed] = results
    found = {method: by_seed for method, by_seed in found.items() if by_seed}
    if not found:
        raise NoResultsError(f"{directory} has no finished run yet; run the study again to go on with it")
    values = {m: {s: _values(setting, r) for s, r in by_seed.items()} for m, by_seed in found.items()}
    scratch = next((m for m, recipe in setting.methods.items() if recipe.reset == "all" and m in found), None)
    for method, by_seed in values.items():
        for seed, one in by_seed.items():
            other = values[scratch].get(seed) if scratch is not None and method != scratch else None
            own = one["test_accuracy"]
            one[AGAINST] = own - other["test_accuracy"] if other is not None else np.full(len(own), np.nan)
    methods, increments = [], []
    for method, by_seed in values.items():
        label = setting.methods[method].label or method
        samples = {name: np.array([one[name] for one in by_seed.values()]) for name in (*MEASURED, AGAINST)}
        points = {name: _interval(name, array) for name, array in samples.items()}
        for at in range(setting.increments):
            entry = {"method": method, "label": label, "classes": (at + 1) * setting.per_increment}
            increments.append(entry | {k: v for point in points.values() for k, v in point[at].items()})
        last = {k: v for name, point in points.items() for k, v in point[_last(samples[name])].items()}
        averages = samples["test_accuracy"].mean(1, keepdims=True)
        runs = list(found[method].values())
        replaced = [float(r["increments"][-1]["replaced"]) if r["increments"] else np.nan for r in runs]
        about = {
            "method": method,
            "label": label,
            "seeds": len(runs),
            "diverged": sum(r["diverged"] is not None for r in runs),
            "seconds": float(np.median([_seconds(setting, r) for r in runs])),
            "replaced": float(np.nanmean(replaced)) if np.isfinite(replaced).any() else None,
        }
        methods.append(about | _interval("average", averages)[0] | last)
    return ArrivingTables(pl.DataFrame(methods), pl.DataFrame(increments), sum(map(len, found.values())))


def _values(setting: ArrivingClasses, results: Mapping[str, Any]) -> dict[str, Floats]:
    """Each measure of a run at every increment; NaN where it was not taken, as after a divergence."""
    found = {name: np.full(setting.increments, np.nan) for name in MEASURED}
    for at, record in enumerate(results["increments"]):
        for name in MEASURED:
            found[name][at] = record.get(name, np.nan)
    found["rank_99"] = found["rank_99"] / (8 * setting.width)
    return found


def _seconds(setting: ArrivingClasses, results: Mapping[str, Any]) -> float:
    steps = setting.training.epochs * sum(setting.batches(k) for k in range(len(results["seconds"])))
    return float(sum(results["seconds"])) / steps if steps else float("nan")


def _last(samples: Floats) -> int:
    """The last increment at which a seed has a value."""
    known = np.flatnonzero(np.isfinite(samples).any(0))
    return int(known[-1]) if len(known) else 0


def _interval(name: str, samples: Floats) -> Sequence[dict[str, float | None]]:
    """The mean over seeds and its interval at every point, None where there is none. ``samples``: [seeds, points]."""
    of = estimate(samples)
    ends = {name: of.mean, f"{name}_low": of.low, f"{name}_high": of.high}
    return [
        {key: float(array[at]) if np.isfinite(array[at]) else None for key, array in ends.items()}
        for at in range(samples.shape[1])
    ]
