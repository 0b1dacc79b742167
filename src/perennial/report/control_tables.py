"""What the report of a study of control says in numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from perennial.compared import Job
from perennial.report.load import RESULTS, NoResultsError
from perennial.rl import Control
from perennial.statistics import Floats, estimate
from perennial.storage import read_json

BINS = 60
"""Points of a curve of returns."""
QUANTITIES = ("whole", "late", "against", "best")
"""Columns of the methods' table, each with ``_low`` and ``_high`` of its interval."""
AT_END = ("policy.rarely_active_units", "policy.rank_99", "policy.weight_magnitude", "value.rank_99")
"""Diagnostics that the table shows, their last ones."""


@dataclass(frozen=True)
class ControlTables:
    """Of a study of control, in its order of methods."""

    methods: pl.DataFrame
    """A row a method: ``method``, ``label``, ``seeds``, ``speed`` (environment steps a second), :data:`QUANTITIES` and
    :data:`AT_END` with intervals over seeds."""
    curves: pl.DataFrame
    """``metric``, ``method``, ``step``, ``mean``, ``low``, ``high``, ``lanes``: returns, means over the episodes that
    end in a bin, and diagnostics."""
    frictions: pl.DataFrame
    """``seed``, ``step``, ``friction``: of every seed's first method that has got farthest."""
    changes: list[float]
    """Steps at which the ground changed, means over seeds and methods."""
    finished: int
    """Runs."""


def tabulate_control(control: Control, directory: Path) -> ControlTables:
    """Read a run's results, finished or not.

    Raises:
        NoResultsError: there are none yet.
    """
    whole = directory / "results.parquet"
    files = [whole] if whole.is_file() else sorted(directory.glob("jobs/*/segment-*.parquet"))
    frames = [pl.read_parquet(file).select(pl.col(n).cast(kind) for n, kind in RESULTS.items()) for file in files]
    results = pl.concat(frames) if frames else pl.DataFrame(schema=RESULTS)
    if results.is_empty():
        raise NoResultsError(f"{directory} has no results yet; run the study again to go on with it")
    manifests = {job: read_json(directory / "jobs" / job.name / "manifest.json") or {} for job in control.jobs()}
    width = -(-control.steps // BINS)
    binned = results.filter(pl.col("metric") == "return").with_columns(
        (((pl.col("step") - 1) // width + 1) * width).alias("step")
    )
    binned = binned.group_by("metric", "method", "seed", "step").agg(pl.col("value").mean())
    kept = ["metric", "method", "seed", "step", "value"]
    others = results.filter(~pl.col("metric").is_in(["return", "episode_steps", "friction"])).select(kept)
    curves: list[dict[str, object]] = []
    rows: list[dict[str, object]] = []
    returns: dict[str, dict[int, Floats]] = {}
    for method, learner in control.methods.items():
        mine = {job: manifests[job] for job in manifests if job.method == method and manifests[job]}
        if not mine:
            continue
        reached = [m["step"] for m in mine.values() if _diverged(m) < 0]
        until = min(reached) if reached else max(m["step"] for m in mine.values())
        for frame in (binned.select(kept), others):
            of_method = frame.filter(pl.col("method") == method)
            for metric in of_method["metric"].unique().sort():
                curves += _curve(metric, method, of_method.filter(pl.col("metric") == metric), until)
        steps = np.arange(1, until // width + 1) * width
        returns[method] = {
            job.seed: _lane(binned, method, job.seed, steps) for job in mine if len(steps) and _diverged(mine[job]) < 0
        }
        seconds = sum(m["train_seconds"] for m in mine.values())
        about = {"method": method, "label": learner.label or method, "seeds": len(mine)}
        about["speed"] = sum(m["step"] for m in mine.values()) / seconds if seconds else float("nan")
        rows.append(about | _quantities(returns, method, next(iter(control.methods))) | _at_end(others, method, mine))
    if not rows:
        raise NoResultsError(f"{directory} has no results yet; run the study again to go on with it")
    ground = results.filter(pl.col("metric") == "friction")
    return ControlTables(
        pl.DataFrame(rows, infer_schema_length=None),
        pl.DataFrame(curves, infer_schema_length=None),
        _frictions(ground),
        _changes(ground),
        sum(bool(m.get("finished")) for m in manifests.values()),
    )


def _diverged(manifest: dict[str, list[int]]) -> int:
    return int(next(iter(manifest["diverged"]), -1))


def _lane(binned: pl.DataFrame, method: str, seed: int, steps: Sequence[int] | Floats) -> Floats:
    """The returns of one run by bin, NaN where no episode ended."""
    found = dict(
        binned.filter((pl.col("method") == method) & (pl.col("seed") == seed)).select("step", "value").iter_rows()
    )
    return np.array([found.get(int(step), np.nan) for step in steps])


def _curve(metric: str, method: str, frame: pl.DataFrame, until: int) -> list[dict[str, object]]:
    frame = frame.filter(pl.col("step") <= max(until, frame["step"].to_numpy().min(initial=0)))
    seeds, steps = sorted(set(frame["seed"])), sorted(set(frame["step"]))
    values = np.full((len(seeds), len(steps)), np.nan)
    for seed, step, value in frame.select("seed", "step", "value").iter_rows():
        values[seeds.index(seed), steps.index(step)] = value
    found = estimate(values)
    return [
        {
            "metric": metric, "method": method, "step": step, "mean": float(found.mean[at]),
            "low": float(found.low[at]), "high": float(found.high[at]), "lanes": int(found.lanes[at]),
        }
        for at, step in enumerate(steps)
    ]  # fmt: skip


def _quantities(returns: dict[str, dict[int, Floats]], method: str, first: str) -> dict[str, float | None]:
    samples = []
    for seed, lane in returns[method].items():
        known = lane[np.isfinite(lane)]
        late = lane[-max(1, len(lane) // 10) :]
        late = late[np.isfinite(late)]
        other = returns.get(first, {}).get(seed, np.full(0, np.nan))
        both = min(len(lane), len(other))
        apart = lane[:both] - other[:both]
        apart = apart[np.isfinite(apart)]
        samples.append([values.mean() if len(values) else np.nan for values in (known, late, apart)])
        samples[-1].append(known.max() if len(known) else np.nan)
    return _with_intervals(QUANTITIES, samples)


def _at_end(others: pl.DataFrame, method: str, jobs: Iterable[Job]) -> dict[str, float | None]:
    samples = []
    for seed in sorted({job.seed for job in jobs}):
        row = []
        for metric in AT_END:
            mine = others.filter(
                (pl.col("metric") == metric) & (pl.col("method") == method) & (pl.col("seed") == seed)
            ).sort("step")
            row.append(mine["value"][-1] if mine.height else np.nan)
        samples.append(row)
    return _with_intervals(AT_END, samples)


def _with_intervals(names: Sequence[str], samples: Sequence[Sequence[float]]) -> dict[str, float | None]:
    found = estimate(np.array(samples, dtype=np.float64).reshape(-1, len(names)))
    cells: dict[str, float | None] = {}
    for at, name in enumerate(names):
        for key, value in ((name, found.mean), (f"{name}_low", found.low), (f"{name}_high", found.high)):
            cells[key] = float(value[at]) if np.isfinite(value[at]) else None
    return cells


def _frictions(ground: pl.DataFrame) -> pl.DataFrame:
    """Of each seed: methods change at their own ends of episodes, and the frictions are the same."""
    found = []
    for seed in sorted(set(ground["seed"])):
        mine = ground.filter(pl.col("seed") == seed)
        counts = {m: mine.filter(pl.col("method") == m).height for m in mine["method"].unique(maintain_order=True)}
        chosen = max(counts, key=lambda m: counts[m])
        found.append(
            mine.filter(pl.col("method") == chosen)
            .sort("step")
            .select("seed", "step", pl.col("value").alias("friction"))
        )
    empty = pl.DataFrame(schema={"seed": pl.Int64, "step": pl.Int64, "friction": pl.Float64})
    return pl.concat(found) if found else empty


def _changes(ground: pl.DataFrame) -> list[float]:
    ranked = ground.sort("step").with_columns(pl.int_range(pl.len()).over("method", "seed").alias("number"))
    means = ranked.filter(pl.col("number") > 0).group_by("number").agg(pl.col("step").mean()).sort("number")
    return [float(step) for step in means["step"]]
