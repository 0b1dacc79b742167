"""What a study of tickets along a stream has found, as tables; the page and its figures show nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from perennial.report.load import NoResultsError
from perennial.report.supply_correlations import correlations
from perennial.runs.supply import FRESH, lives_of, looks_of, variants
from perennial.statistics import estimate
from perennial.storage import read_json
from perennial.studies import SupplyStudy, seeds_of


class Quantity(NamedTuple):
    """How a measurement is called and shown."""

    label: str
    """In figures and tables."""
    said: str
    """In a sentence."""
    share: bool = False
    """Whether it is a share or a difference of shares, shown in percent or in points."""
    difference: bool = False
    """Whether it is a difference."""


ONLINE = "online_accuracy"
QUANTITIES = {
    ONLINE: Quantity("Online accuracy", "the online accuracy", share=True),
    "accuracy": Quantity("Next task: whole network", "the accuracy on the next task", share=True),
    "effective_rank": Quantity("Effective rank", "the effective rank"),
    "dead_units": Quantity("Dead units", "the share of dead units", share=True),
    "best_ticket": Quantity("Next task: best ticket", "the best ticket's accuracy", share=True),
    "advantage": Quantity("Ticket less control", "ticket less control", share=True, difference=True),
    "overlap": Quantity("Overlap of two tasks' tickets", "the overlap of the tickets"),
    "overlap_deep": Quantity("Overlap without the first layer", "the overlap without the first layer"),
    "accuracy_gap": Quantity(
        "Next task, less fresh's",
        "the accuracy on the next task relative to fresh weights",
        share=True,
        difference=True,
    ),
    "best_ticket_gap": Quantity(
        "Best ticket, less fresh's",
        "the best ticket's accuracy relative to fresh weights' best",
        share=True,
        difference=True,
    ),
}
"""By name. The first eight are drawn over life, in this order; the gaps are to the fresh weights on the same task."""
DRAWN = tuple(QUANTITIES)[:8]
CORRELATED = (
    "effective_rank", "dead_units", "accuracy_gap", "best_ticket_gap", "advantage", "overlap", "overlap_deep",
)  # fmt: skip
"""What is correlated with each other, and whose change over life is taken."""
_MEASURED = (*DRAWN[1:], "speed")
_POINT: dict[str, type[pl.DataType]] = {
    "method": pl.String,
    "seed": pl.Int64,
    "step": pl.Int64,
    **dict.fromkeys((*_MEASURED, "accuracy_gap", "best_ticket_gap"), pl.Float64),
}
_MEAN: dict[str, type[pl.DataType]] = {**dict.fromkeys(("mean", "low", "high"), pl.Float64), "seeds": pl.Int64}
_OVER_LIFE: dict[str, type[pl.DataType]] = {"quantity": pl.String, "method": pl.String, "step": pl.Int64, **_MEAN}
_LEVEL: dict[str, type[pl.DataType]] = {
    "method": pl.String,
    "step": pl.Int64,
    "level": pl.Int64,
    "percent": pl.Float64,
    "of": pl.String,
    **_MEAN,
}
_CHANGE: dict[str, type[pl.DataType]] = {
    "quantity": pl.String,
    "method": pl.String,
    "since": pl.Int64,
    "until": pl.Int64,
    **_MEAN,
}


@dataclass(frozen=True)
class SupplyTables:
    """Of one study, as far as it has come."""

    labels: dict[str, str]
    """Method -> its name for readers, the fresh weights last."""
    points: pl.DataFrame
    """A row a network and time. At the start every method has the values of the weights as they were drawn. Null: not a
    number, or, of gaps, no fresh network to compare with yet."""
    over_life: pl.DataFrame
    """A row a quantity, method and step: mean over seeds, its interval, and the seeds behind it."""
    levels: pl.DataFrame
    """A row a method, step, level and kind (``ticket``, ``control``, ``overlap``, ``overlap_deep``), likewise."""
    changes: pl.DataFrame
    """A row a quantity, method and first step: mean over seeds of the differences between two times of one life."""
    correlations: pl.DataFrame
    """A row a pair of quantities, version (``pooled``, ``within``) and whether the start is among the points. ``lives``
    are those behind the number; ``constant`` have a quantity that never changes, ``short`` fewer than three points."""
    finished: tuple[int, int, int, int]
    """Lives that are finished, and all; networks that are measured, and all."""

    @property
    def steps(self) -> list[int]:
        """The checkpoints at which a method has been measured."""
        aged = self.points.filter(pl.col("method") != FRESH)
        return sorted(set(aged.get_column("step")))


def tabulate_supply(study: SupplyStudy, directory: Path) -> SupplyTables:
    """Read a run directory.

    Raises:
        NoResultsError: no network has been measured, nor has one lived for a bin.
    """
    names = [variant.method for variant in variants(study)]
    labels = {name: study.life.methods[name].label or name for name in names} | {FRESH: "Fresh weights"}
    found = [look for one in looks_of(study) if (look := read_json(one.path(directory))) is not None]
    online = {
        (life.method, life.seed): [float(value) for value in read_json(path) or []]
        for life in lives_of(study)
        if (path := directory / "lives" / f"{life.method}-{life.seed}" / "online.json").exists()
    }
    if not found and not any(online.values()):
        raise NoResultsError(f"{directory} holds no measurements of this study yet; nothing can be reported")
    points = _points(found, names)
    seeds = seeds_of(study.life, "life")
    bins = study.life.steps // study.life.bin
    lived = sum(len(values) >= bins for values in online.values())
    return SupplyTables(
        labels,
        points,
        pl.concat([_online(online, names, study.life.bin), _over_life(points, list(labels), seeds)]),
        _levels(found, list(labels), seeds),
        _changes(points, names, seeds),
        correlations(points.filter(pl.col("method") != FRESH), CORRELATED),
        (lived, len(names) * len(seeds), len(found), len(looks_of(study))),
    )


def _points(found: Iterable[dict[str, Any]], names: Sequence[str]) -> pl.DataFrame:
    rows = [{name: _number(look[name]) for name in (*list(_POINT)[:3], *_MEASURED)} for look in found]
    starts = [row for row in rows if row["method"] == FRESH and row["step"] == 0]
    rows += [row | {"method": name} for row in starts for name in names]
    frame = pl.DataFrame(rows, schema={name: kind for name, kind in _POINT.items() if not name.endswith("_gap")})
    frame = frame.with_columns(pl.when(pl.col(name).is_finite()).then(pl.col(name)).alias(name) for name in _MEASURED)
    fresh = frame.filter(pl.col("method") == FRESH).select("seed", "step", "accuracy", "best_ticket")
    order = pl.col("method").replace_strict(
        {name: at for at, name in enumerate((*names, FRESH))}, return_dtype=pl.Int64
    )
    return (
        frame.join(fresh, on=["seed", "step"], how="left", suffix="_fresh")
        .with_columns(
            accuracy_gap=pl.col("accuracy") - pl.col("accuracy_fresh"),
            best_ticket_gap=pl.col("best_ticket") - pl.col("best_ticket_fresh"),
        )
        .sort(order, "seed", "step")
        .select(list(_POINT))
    )


def _number(value: Any) -> Any:
    """A measurement as it is; of one that has a value a level, the mean."""
    return math.fsum(value) / len(value) if isinstance(value, list) else value


def _online(online: dict[tuple[str, int], list[float]], names: Sequence[str], length: int) -> pl.DataFrame:
    rows = []
    for name in names:
        lives = [values for (method, _), values in online.items() if method == name and values]
        bins = min(map(len, lives), default=0)  # as far as all that have begun have come
        if bins:
            rows += _means([values[:bins] for values in lives], [(at + 1) * length for at in range(bins)], method=name)
    return pl.DataFrame([{"quantity": ONLINE} | row for row in rows], schema=_OVER_LIFE)


def _over_life(points: pl.DataFrame, names: Sequence[str], seeds: Sequence[int]) -> pl.DataFrame:
    rows = []
    steps = sorted(set(points.get_column("step")))
    for quantity in (*DRAWN[1:], "accuracy_gap", "best_ticket_gap"):
        for name in names:
            if name != FRESH or not quantity.endswith("_gap"):
                values = _by_seed(points.filter(pl.col("method") == name), quantity)
                table = [[values.get((seed, step), math.nan) for step in steps] for seed in seeds]
                rows += [{"quantity": quantity} | row for row in _means(table, steps, method=name)]
    return pl.DataFrame(rows, schema=_OVER_LIFE)


def _levels(found: Sequence[dict[str, Any]], names: Sequence[str], seeds: Sequence[int]) -> pl.DataFrame:
    rows: list[dict[str, Any]] = []
    for name in names:
        for step in sorted({look["step"] for look in found if look["method"] == name}):
            here = {look["seed"]: look for look in found if look["method"] == name and look["step"] == step}
            percents = next(iter(here.values()))["percent"]
            for kind in ("ticket", "control", "overlap", "overlap_deep"):
                first = len(percents) - len(next(iter(here.values()))[kind])  # the whole network has a ticket only
                table = [here[seed][kind] for seed in seeds if seed in here]
                means = _means(table, range(first, len(percents)), method=name)
                rows += [
                    row | {"level": row["step"], "percent": percents[row["step"]], "step": step, "of": kind}
                    for row in means
                ]
    return pl.DataFrame(rows, schema=_LEVEL)


def _changes(points: pl.DataFrame, names: Sequence[str], seeds: Sequence[int]) -> pl.DataFrame:
    """From the start, and from the first checkpoint after it, to the last."""
    rows = []
    steps = sorted(set(points.filter(pl.col("method") != FRESH).get_column("step")))
    aged = [step for step in steps if step]
    since = [step for step in dict.fromkeys((*steps[:1], *aged[:1])) if aged and step != aged[-1]]
    for quantity in CORRELATED:
        for name in names:
            values = _by_seed(points.filter(pl.col("method") == name), quantity)
            for step in since:
                pairs = [[values.get((s, aged[-1]), math.nan) - values.get((s, step), math.nan)] for s in seeds]
                means = _means(pairs, [aged[-1]], method=name)
                rows += [row | {"quantity": quantity, "since": step, "until": row["step"]} for row in means]
    return pl.DataFrame([{name: row[name] for name in _CHANGE} for row in rows], schema=_CHANGE)


def _by_seed(frame: pl.DataFrame, quantity: str) -> dict[tuple[int, int], float]:
    rows = frame.select("seed", "step", quantity).iter_rows()
    return {(seed, step): value for seed, step, value in rows if value is not None}


def _means(table: Sequence[Sequence[float]], steps: Iterable[int], *, method: str) -> list[dict[str, Any]]:
    """A row a step of which any seed has a number; [seeds, steps]."""
    found = estimate(np.array(table, dtype=np.float64))
    rows = []
    for step, mean, low, high, lanes in zip(steps, *found, strict=True):
        if lanes:
            ends = (None, None) if math.isnan(low) else (float(low), float(high))
            row = dict(zip(("mean", "low", "high", "seeds"), (float(mean), *ends, int(lanes)), strict=True))
            rows.append({"method": method, "step": step} | row)
    return rows
