"""Every number that the page shows, as data frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from perennial.report.load import Method, Part, Run
from perennial.report.series import Series, diagnostics, main_metric, measure, series_of, swept
from perennial.statistics import Estimate, estimate, run_average

_CURVE = {
    "metric": pl.String,
    "method": pl.String,
    "settings": pl.String,
    "step": pl.Int64,
    "mean": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "lanes": pl.Int64,
}
_SENSITIVITY: dict[str, Any] = {
    "number": pl.String,
    "method": pl.String,
    "value": pl.Float64,
    "settings": pl.String,
    "mean": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "lanes": pl.Int64,
    "diverged": pl.Int64,
}
_CHOICES = {"choice" if name == "number" else name: kind for name, kind in _SENSITIVITY.items()} | {"value": pl.String}
QUANTITIES = ("first", "last", "average", "loss_of_plasticity")
"""Columns of the summary that are means over lanes, each with ``_low`` and ``_high`` beside it."""
TOGETHER = 7
"""Settings of one method that are drawn together."""
_SUMMARY: dict[str, Any] = {
    "part": pl.String,
    "method": pl.String,
    "label": pl.String,
    "settings": pl.String,
    "rank": pl.Int64,
    "settings_tried": pl.Int64,
    "metric": pl.String,
    "lanes": pl.Int64,
    "diverged": pl.Int64,
    "steps": pl.Int64,
    "first_steps": pl.Int64,
    "last_steps": pl.Int64,
    **{name + end: pl.Float64 for name in QUANTITIES for end in ("", "_low", "_high")},
    "seconds_per_step": pl.Float64,
    "relative_cost": pl.Float64,
}


@dataclass(frozen=True)
class Tables:
    """The numbers of one part."""

    metric: str
    """What the part is judged by."""
    summary: pl.DataFrame
    """One row a method and setting, best first within a method."""
    curves: pl.DataFrame
    """The main metric by bin, each method at its best setting."""
    diagnostics: pl.DataFrame
    """The other metrics by step, each method at its best setting."""
    settings: pl.DataFrame
    """The main metric by bin at every setting of the methods that have from two to :data:`TOGETHER` of them."""
    sensitivity: pl.DataFrame
    """Average performance against each swept number, the best choice of the others."""
    choices: pl.DataFrame
    """The same for what was swept and is not a number, best first within a method."""


def tabulate(run: Run, part: Part) -> Tables:
    """All numbers of a part. Frames are empty where there are no results yet, or nothing is swept."""
    metric = main_metric(run, part)
    found = series_of(run, part, metric)
    summary = _summary(run, part, metric, found)
    every = [swept(settings) for settings in summary.get_column("settings")]
    choices = list(dict.fromkeys(name for one in every for name, value in one.items() if isinstance(value, str)))
    best = {(row["method"], row["settings"]) for row in summary.iter_rows(named=True) if row["rank"] == 1}
    tried = Counter(series.method.key for series in found)
    together = {(s.method.key, s.settings) for s in found if 2 <= tried[s.method.key] <= TOGETHER}
    return Tables(
        metric=metric,
        summary=summary,
        curves=_curves({metric: found}, best),
        diagnostics=_curves({name: series_of(run, part, name) for name in diagnostics(run, part)}, best),
        settings=_curves({metric: found}, together),
        sensitivity=_sensitivity(part, summary, choices),
        choices=_choices(part, summary, choices),
    )


def _summary(run: Run, part: Part, metric: str, found: list[Series]) -> pl.DataFrame:
    if not found:
        return pl.DataFrame(schema=_SUMMARY)
    # Only as far as every method has come are their averages of the same thing.
    horizon = min(int(series.steps[-1]) for series in found)
    cost = _seconds_per_step(run, part)
    plain = next((cost[m.key] for m in part.methods if m.plain and m.key in cost), None)
    rows = []
    higher = measure(metric).higher_is_better
    for method in part.methods:
        mine = [_row(s, horizon, higher) for s in found if s.method.key == method.key]
        mine.sort(key=lambda row: _badness(row, higher))
        seconds = cost.get(method.key)
        for rank, row in enumerate(mine, 1):
            rows.append(
                row
                | {"part": part.key, "metric": metric, "rank": rank, "settings_tried": len(mine)}
                | {"seconds_per_step": seconds}
                | {"relative_cost": seconds / plain if seconds is not None and plain else None}
            )
    return _frame(rows, _SUMMARY)


def _row(series: Series, horizon: int, higher_is_better: bool) -> dict[str, Any]:
    kept = series.steps <= horizon
    steps, values = series.steps[kept], series.values[:, kept]
    first, last, average = values[:, 0], values[:, -1], run_average(values, steps)
    lost = first - last if higher_is_better else last - first
    if len(steps) == 1:
        lost = np.full(len(values), np.nan)  # one bin is its own last: nothing can have been lost yet
    ends = np.stack([first, last, average, lost], 1)
    row: dict[str, Any] = {
        "method": series.method.key,
        "label": series.method.label,
        "settings": series.settings,
        "lanes": len(values),
        "diverged": int(series.diverged.sum()),
        "steps": int(steps[-1]),
        "first_steps": int(steps[0]),
        "last_steps": int(steps[-1] - steps[-2]) if len(steps) > 1 else int(steps[0]),
    }
    made = estimate(ends)
    for at, name in enumerate(QUANTITIES):
        row |= {name: made.mean[at], f"{name}_low": made.low[at], f"{name}_high": made.high[at]}
    return row


def _badness(row: dict[str, Any], higher_is_better: bool) -> tuple[float, float, str]:
    """Settings in order: a lane that diverged is worse than any number, so fewest of these, then the best average."""
    average = -row["average"] if higher_is_better else row["average"]
    return row["diverged"] / row["lanes"], float("inf") if np.isnan(average) else average, row["settings"]


def _seconds_per_step(run: Run, part: Part) -> dict[str, float]:
    """Training seconds of one step of one lane, by method, over all programs that ran it."""
    seconds: dict[str, float] = {}
    steps: dict[str, float] = {}
    for program in run.timings:
        if program["part"] == part.key:
            for method in program["methods"]:
                seconds[method] = seconds.get(method, 0.0) + program["train_seconds"]
                steps[method] = steps.get(method, 0.0) + program["lane_steps"]
    return {method: seconds[method] / steps[method] for method in seconds if steps[method]}


def _curves(found: dict[str, list[Series]], chosen: set[tuple[str, str]]) -> pl.DataFrame:
    rows: list[dict[str, Any]] = []
    for metric, every in found.items():
        for series in every:
            if (series.method.key, series.settings) in chosen:
                made = estimate(series.values)
                name = {"metric": metric, "method": series.method.key, "settings": series.settings}
                rows += [name | {"step": step} | point for step, point in zip(series.steps, _points(made), strict=True)]
    return _frame(rows, _CURVE)


def _points(made: Estimate) -> Iterable[dict[str, Any]]:
    for mean, low, high, lanes in zip(*made, strict=True):
        yield {"mean": mean, "low": low, "high": high, "lanes": lanes}


def _sensitivity(part: Part, summary: pl.DataFrame, choices: list[str]) -> pl.DataFrame:
    rows = [row for row in _best_of_each(part, summary, "number") if row["number"] not in choices]
    # In the order of the axis; methods and numbers stay in theirs.
    blocks = {key: at for at, key in enumerate(dict.fromkeys((row["method"], row["number"]) for row in rows))}
    rows = [row | {"value": float(row["value"])} for row in rows]
    rows.sort(key=lambda row: (blocks[row["method"], row["number"]], row["value"]))
    return _frame(rows, _SENSITIVITY)


def _choices(part: Part, summary: pl.DataFrame, choices: list[str]) -> pl.DataFrame:
    rows = [row for row in _best_of_each(part, summary, "choice") if row["choice"] in choices]
    return _frame([row | {"value": _named(row["value"])} for row in rows], _CHOICES)


def _best_of_each(part: Part, summary: pl.DataFrame, kind: str) -> Iterator[dict[str, Any]]:
    """The best setting at each value of everything that a method swept, best value first."""
    for method in part.methods:
        mine = [(row, swept(row["settings"])) for row in summary.filter(method=method.key).iter_rows(named=True)]
        for name in dict.fromkeys(name for _, values in mine for name in values):
            best: dict[float | str, dict[str, Any]] = {}
            for row, values in mine:  # best first, so the first of each value stays
                best.setdefault(values[name], row)
            for value, row in best.items() if len(best) > 1 else ():
                point = {"mean": row["average"], "low": row["average_low"], "high": row["average_high"]}
                yield (
                    {kind: name, "method": method.key, "value": value, "settings": row["settings"]}
                    | point
                    | {"lanes": row["lanes"], "diverged": row["diverged"]}
                )


def _named(value: float | str) -> str:
    return f"{value:g}" if isinstance(value, float) else value


def _frame(rows: list[dict[str, Any]], schema: dict[str, Any]) -> pl.DataFrame:
    frame = pl.DataFrame({name: [_plain(row[name]) for row in rows] for name in schema}, schema=schema)
    return frame.with_columns(pl.col(pl.Float64).fill_nan(None))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def method_of(part: Part, key: str) -> Method:
    """The method of a part by its key."""
    return next(method for method in part.methods if method.key == key)
