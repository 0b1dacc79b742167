"""Results as arrays: lanes by bins."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from perennial.metrics import METRICS
from perennial.report.load import Method, Part, Run
from perennial.statistics import Floats


@dataclass(frozen=True)
class Measure:
    """How a metric is shown."""

    label: str
    """Name for readers, with what it is a mean of."""
    share: bool = False
    """Whether it is a share, shown in percent."""
    higher_is_better: bool = False
    """Whether loss of plasticity shows as a fall."""


ACCURACY, LOSS = "online_accuracy", "online_loss"

MEASURES = {
    ACCURACY: Measure("Online accuracy", share=True, higher_is_better=True),
    LOSS: Measure("Online loss"),
    "test_accuracy": Measure("Held-out accuracy at the ends of tasks", share=True, higher_is_better=True),
    **{m.name: Measure(m.title, m.share, m.better == "higher") for m in METRICS.values()},
    **{
        f"{net}.{m.name}": Measure(f"{m.title}, {net}", m.share, m.better == "higher")
        for m in METRICS.values()
        for net in ("policy", "value")
    },
    "return": Measure("Return of an episode", higher_is_better=True),
    "replaced_units": Measure("Units replaced so far"),
    "units_replaced": Measure("Replacements per unit so far"),
    "utility_spearman": Measure("Spearman correlation with the exact utility", higher_is_better=True),
    "utility_kendall": Measure("Kendall correlation with the exact utility", higher_is_better=True),
}
"""The metrics that have a name for readers; those after the first two are diagnostics, shown in this order."""


def measure(metric: str) -> Measure:
    """How a metric is shown; one that is not known here goes by its own name."""
    return MEASURES.get(metric) or Measure(metric.replace("_", " ").capitalize())


@dataclass(frozen=True)
class Series:
    """One metric of one method with one choice of its swept numbers."""

    method: Method
    """The method."""
    settings: str
    """The swept numbers as text; empty where nothing is swept."""
    steps: NDArray[np.int64]
    """[bins]: the step at which each ends, as far as every lane that has not diverged has come."""
    values: Floats
    """[lanes, bins]; NaN from the bin in which a lane diverged."""
    diverged: NDArray[np.bool_]
    """[lanes]."""


def main_metric(run: Run, part: Part) -> str:
    """What the part is judged by: what the study says, or else accuracy where there is one, or the loss."""
    if part.judged_by:
        return part.judged_by
    found = run.results.filter(pl.col("part") == part.key).get_column("metric").unique()
    return ACCURACY if ACCURACY in found else LOSS


def diagnostics(run: Run, part: Part) -> list[str]:
    """The metrics of a part besides what it is judged by: the known ones in their order, then any others by name."""
    found = set(run.results.filter(pl.col("part") == part.key).get_column("metric").unique())
    known = [name for name in MEASURES if name in found]
    main = {ACCURACY, LOSS} if part.judged_by is None else {part.judged_by}
    return [name for name in known + sorted(found - set(known)) if name not in main]


def series_of(run: Run, part: Part, metric: str) -> list[Series]:
    """Every method and setting of a part that has results of a metric, methods in the study's order."""
    frame = run.results.filter((pl.col("part") == part.key) & (pl.col("metric") == metric))
    found = []
    for method in part.methods:
        rows = frame.filter(pl.col("method") == method.key)
        for settings in rows.get_column("settings").unique().sort():
            found.append(_series(run, part, method, settings, rows.filter(pl.col("settings") == settings)))
    return found


def _series(run: Run, part: Part, method: Method, settings: str, rows: pl.DataFrame) -> Series:
    seeds, lane = np.unique(rows.get_column("seed").to_numpy(), return_inverse=True)
    steps, bin_ = np.unique(rows.get_column("step").to_numpy(), return_inverse=True)
    value = rows.get_column("value").fill_null(float("nan")).to_numpy()
    values = np.full((len(seeds), len(steps)), np.nan)
    values[lane, bin_] = value
    never = np.iinfo(np.int64).max
    # The lane's own record and the first value that is not a number agree in a finished run; an unfinished one may
    # have only the values.
    end = np.array([run.diverged.get((part.key, method.key, settings, int(seed)), never) for seed in seeds])
    bad = ~np.isfinite(value)
    np.minimum.at(end, lane[bad], steps[bin_[bad]] - 1)
    values[steps[None] > end[:, None]] = np.nan
    diverged = end < never
    reached = np.zeros(len(seeds), dtype=np.int64)
    np.maximum.at(reached, lane, steps[bin_])
    horizon = reached[~diverged].min() if not diverged.all() else reached.max()
    kept = steps <= horizon
    return Series(method, settings, steps[kept], values[:, kept], diverged)


def swept(settings: str) -> dict[str, float | str]:
    """The swept settings of a settings text by dotted name, as numbers where they are.

    ``"rule.lr=0.01, network.hidden=(5, 5)"`` -> ``{"rule.lr": 0.01, "network.hidden": "(5, 5)"}``
    """
    found: dict[str, float | str] = {}
    for item in filter(None, re.split(r", (?=[A-Za-z_][\w.]*=)", settings)):
        name, _, value = item.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = value
    return found
