"""What a lottery-ticket experiment has found, as tables; the page and its figures show nothing else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from perennial.report.load import NoResultsError
from perennial.storage import read_tensors
from perennial.tickets.control import CONTROLS
from perennial.tickets.experiment import Experiment, Job, rows
from perennial.tickets.masks import Masks
from perennial.tickets.overlap import jaccard, sparsity
from perennial.tickets.prune import shares

TICKET = "ticket"
QUANTITIES = ("early_stop", "early_accuracy", "accuracy")
"""Of one training: an iteration and two shares."""
CHANGES = tuple(f"{name}_change" for name in QUANTITIES)
"""The same against the whole network of the replicate: a share of its early stop, and differences of shares."""
SHOWN_PERCENTAGES = (51.3, 21.1, 13.5, 3.6)
"""Of the weights: at the levels nearest to these the learning curves are shown, as in the paper's Figure 3."""
POINTS = 48
"""At most so many points has a learning curve; more evaluations are averaged, several beside each other."""
ALL = "all"
"""The name of all layers together."""

_ROW: dict[str, type[pl.DataType]] = {
    "kind": pl.String,
    "level": pl.Int64,
    "percent": pl.Float64,
    "seed": pl.Int64,
    **dict.fromkeys((*QUANTITIES, *CHANGES, "training_loss"), pl.Float64),
}
_SPREAD: dict[str, type[pl.DataType]] = dict.fromkeys(("mean", "low", "high"), pl.Float64)
_CURVE = {"kind": pl.String, "level": pl.Int64, "percent": pl.Float64, "iteration": pl.Float64}
_CURVE |= dict.fromkeys(("evaluations", "replicates"), pl.Int64)
_LAYER = {"level": pl.Int64, "percent": pl.Float64, "layer": pl.String, "replicates": pl.Int64}
_COUNT = {**_LAYER, **dict.fromkeys(("total", "scheduled", "kept_low", "kept_high"), pl.Int64)}
_PAIR = {"level": pl.Int64, "percent": pl.Float64, "layer": pl.String, "first": pl.Int64, "second": pl.Int64}
_SHARED = {**_PAIR, **dict.fromkeys(("jaccard", "floor", "floor_low", "floor_high", "excess"), pl.Float64)}


@dataclass(frozen=True)
class TicketTables:
    """Of one experiment, as far as it has come."""

    trainings: pl.DataFrame
    """A row a finished training, with its changes against the whole network of the same replicate; null where a
    validation loss was never a number."""
    levels: pl.DataFrame
    """A row a kind and level: replicates, and the mean, lowest and highest of each quantity and change over them."""
    sparsity: pl.DataFrame
    """A row a level of the ticket and a layer: weights that are not zero after training, over replicates, and by the
    schedule."""
    overlap: pl.DataFrame
    """A row a level of the ticket, a layer and a pair of replicates: what their masks share, and by chance."""
    validation: pl.DataFrame
    """Accuracy on the validation set on the way, at the levels shown: a row a kind, level and group of evaluations,
    with the middle of the group as its iteration."""


def kind_label(kind: str) -> str:
    """``random_reinit`` -> ``Random reinit``."""
    return kind.replace("_", " ").capitalize()


def tabulate_tickets(experiment: Experiment, directory: Path) -> TicketTables:
    """Read a run directory.

    Raises:
        NoResultsError: no training has finished.
    """
    with _random_states_kept():
        found = rows(experiment, directory)
    if not found:
        raise NoResultsError(f"{directory} holds no finished training of this experiment yet; nothing can be reported")
    trainings = _trainings(found)
    levels = _levels(experiment, trainings)
    return TicketTables(
        trainings,
        levels,
        _sparsity(experiment, directory, trainings),
        _overlap(experiment, directory, trainings),
        _validation(experiment, directory, levels),
    )


def shown_levels(levels: pl.DataFrame) -> list[int]:
    """The ticket's levels whose learning curves are shown: the whole network, and those near the paper's percentages;
    where the schedule is another, some evenly spaced."""
    rows = levels.filter((pl.col("kind") == TICKET) & (pl.col("level") > 0)).select("level", "percent").rows()
    near = []
    for percent in SHOWN_PERCENTAGES:
        distance, level = min(((abs(math.log(p / percent)), n) for n, p in rows), default=(math.inf, 0))
        if distance < 0.15:
            near.append(level)
    if len(near) < min(2, len(rows)):
        count = min(4, len(rows))
        near = [rows[round((at + 1) * len(rows) / count) - 1][0] for at in range(count)]
    return [0, *sorted(set(near))]


def summarise(values: Sequence[float | None]) -> tuple[float | None, float | None, float | None]:
    """Mean, lowest and highest of those that are there."""
    known = [value for value in values if value is not None]
    return (math.fsum(known) / len(known), min(known), max(known)) if known else (None, None, None)


def _trainings(found: list[dict[str, Any]]) -> pl.DataFrame:
    cleaned = []
    for row in found:
        diverged = row["early_stop"] < 0  # what fit says of a validation loss that was never finite
        early = {name: None if diverged else row[name] for name in ("early_stop", "early_accuracy")}
        kept = {name: row[name] for name in ("kind", "level", "percent", "seed", "accuracy")}
        cleaned.append(kept | early | {"training_loss": _finite(row["training_loss"])})
    whole = {row["seed"]: row for row in cleaned if row["level"] == 0}
    for row in cleaned:
        first = whole.get(row["seed"]) if row["level"] else None
        for name, change in zip(QUANTITIES, CHANGES, strict=True):
            value = row[name]
            if first is None or value is None or first[name] is None:
                row[change] = None
            else:
                row[change] = (value - first[name]) / (first[name] if name == "early_stop" else 1.0)
    return pl.DataFrame([{name: row[name] for name in _ROW} for row in cleaned], schema=_ROW)


def _levels(experiment: Experiment, trainings: pl.DataFrame) -> pl.DataFrame:
    found = []
    for kind in (TICKET, *(name for name in CONTROLS if name in experiment.controls)):
        mine = trainings.filter(pl.col("kind") == kind).sort("level", "seed")
        for (level, percent), group in mine.group_by("level", "percent", maintain_order=True):
            row: dict[str, Any] = {"kind": kind, "level": level, "percent": percent}
            row |= {"replicates": group.height, "diverged": group.get_column("early_stop").null_count()}
            for name in (*QUANTITIES, *CHANGES):
                spread = summarise(group.get_column(name).to_list())
                row |= dict(zip((f"{name}_mean", f"{name}_low", f"{name}_high"), spread, strict=True))
            found.append(row)
    numbers = [f"{name}_{what}" for name in (*QUANTITIES, *CHANGES) for what in _SPREAD]
    whole = dict.fromkeys(("level", "replicates", "diverged"), pl.Int64)
    schema = {"kind": pl.String, "percent": pl.Float64, **whole, **dict.fromkeys(numbers, pl.Float64)}
    return pl.DataFrame(found, schema_overrides=schema)


def _each_level(experiment: Experiment, trainings: pl.DataFrame) -> Iterator[tuple[int, float, list[Job]]]:
    """The ticket's levels with the replicates that have finished them."""
    for level in range(experiment.rounds + 1):
        mine = trainings.filter((pl.col("kind") == TICKET) & (pl.col("level") == level))
        if not mine.is_empty():
            done = set(mine.get_column("seed"))
            yield level, mine["percent"][0], [Job(seed, TICKET, level) for seed in experiment.seeds if seed in done]


def _sparsity(experiment: Experiment, directory: Path, trainings: pl.DataFrame) -> pl.DataFrame:
    schedule = _schedule(experiment)
    found = []
    for level, percent, jobs in _each_level(experiment, trainings):
        counts: dict[str, list[tuple[int, int]]] = {}
        for job in jobs:
            masks, trained = (read_tensors(job.folder(directory) / name) for name in ("masks.pt", "trained.pt"))
            if masks is None or trained is None:
                continue
            counted = sparsity({name: trained[name] for name in masks})
            for name, zeros in (*counted.layers.items(), (ALL, counted.overall)):
                counts.setdefault(name, []).append((zeros.kept, zeros.total))
        for name, pairs in counts.items():
            kept = [one for one, _ in pairs]
            row = {"level": level, "percent": percent, "layer": name, "replicates": len(pairs), "total": pairs[0][1]}
            found.append(row | {"scheduled": schedule(level, name), "kept_low": min(kept), "kept_high": max(kept)})
    return pl.DataFrame(found, schema=_COUNT)


def _schedule(experiment: Experiment) -> Callable[[int, str], int | None]:
    """Weights that the schedule keeps of a layer at a level; where layers compete, it fixes only all together."""
    with _random_states_kept():
        model = experiment.make_model()
    held = dict(model.named_parameters())
    share = shares(model, experiment.pruning.rates)
    by_layer = experiment.pruning.scope == "layer"
    pools: dict[str | float, int] = {}
    for name, part in share.items():
        pool = name if by_layer else part
        pools[pool] = pools.get(pool, 0) + held[name].numel()
    counts = [pools]
    for _ in range(experiment.rounds):
        counts.append({k: n - round((share[k] if isinstance(k, str) else k) * n) for k, n in counts[-1].items()})
    return lambda level, name: sum(counts[level].values()) if name == ALL else counts[level].get(name)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Networks are made for their shapes; drawing their weights must not move the caller's generator."""
    with torch.random.fork_rng(devices=[]):
        yield


def _overlap(experiment: Experiment, directory: Path, trainings: pl.DataFrame) -> pl.DataFrame:
    found = []
    for level, percent, jobs in _each_level(experiment, trainings):
        if level == 0:
            continue  # whole masks are equal, and so are random ones
        masks: dict[int, Masks] = {}
        for job in jobs:
            held = read_tensors(job.folder(directory) / "masks.pt")
            if held is not None:
                masks[job.seed] = held
        for first, second in itertools.combinations(masks, 2):
            shared = jaccard(masks[first], masks[second])
            for name, one in (*shared.layers.items(), (ALL, shared.overall)):
                row = {"level": level, "percent": percent, "layer": name, "first": first, "second": second}
                row |= {"jaccard": _finite(one.jaccard), "floor": _finite(one.floor), "excess": _finite(one.excess)}
                found.append(row | {"floor_low": _finite(one.interval[0]), "floor_high": _finite(one.interval[1])})
    return pl.DataFrame([{name: row[name] for name in _SHARED} for row in found], schema=_SHARED)


def _validation(experiment: Experiment, directory: Path, levels: pl.DataFrame) -> pl.DataFrame:
    every, end = experiment.training.evaluate_every, experiment.training.iterations
    whole = levels.filter((pl.col("kind") == TICKET) & (pl.col("level") == 0))
    stop = whole["early_stop_mean"][0] if whole.height else None
    # Up to where something happens: the rest is flat. Rounded up to whole evaluations.
    last = end if stop is None else min(end, every * max(10, math.ceil(3 * stop / every)))
    together = math.ceil(last / every / POINTS)
    found = []
    shown = shown_levels(levels)
    kinds = [TICKET] + ["random_reinit"] * ("random_reinit" in experiment.controls)
    present = levels.filter(pl.col("kind").is_in(kinds) & pl.col("level").is_in(shown))
    for kind, level, percent in present.select("kind", "level", "percent").iter_rows():
        points: dict[tuple[float, int], list[float]] = {}
        for seed in experiment.seeds:
            results = Job(seed, kind, level).results(directory)
            curve = [] if results is None else results["validation_accuracy"]
            begin = end // every - len(curve)  # evaluations that a late start has left out
            for first in range(begin - begin % together, last // every, together):
                taken = range(max(first, begin), min(first + together, last // every))
                if taken:
                    at = every * (1 + (taken[0] + taken[-1]) / 2)
                    mean = math.fsum(curve[number - begin] for number in taken) / len(taken)
                    points.setdefault((at, len(taken)), []).append(mean)
        for (iteration, evaluations), values in sorted(points.items()):
            row = {"kind": kind, "level": level, "percent": percent, "iteration": iteration}
            row |= {"evaluations": evaluations, "replicates": len(values)}
            found.append(row | dict(zip(_SPREAD, summarise(values), strict=True)))
    return pl.DataFrame(found, schema={**_CURVE, **_SPREAD})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
