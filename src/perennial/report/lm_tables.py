"""What the reports of language-model studies say in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from perennial.lm import DominantTickets, TextStream, continual, overlaps
from perennial.lm.dominant import Job as Training
from perennial.report.load import NoResultsError
from perennial.statistics import Floats, estimate
from perennial.storage import read_tensors

QUANTITIES = ("average", "forgetting", "backward_transfer", "learning", "against_alone", "loss_against_alone")
"""Measures of a sequence, a column each with ``_low`` and ``_high`` of its interval."""
OF_PAIRS = ("collision_rate", "collision_floor", "collision_ratio", "row_cosine", "update_cosine")
"""Measures of every two adapters, means over them."""
_PLACED = ("ticket", "magnitude", "lora")
"""Kinds of training that have a random counterpart of as many weights."""
_NEXT = {
    "adapter_each": ("adapter_each", "adapter_one"),
    "adapter_one": ("adapter_one", "adapter_each"),
    "all": ("all", "osf"),
    "osf": ("osf", "all"),
}
"""What a method is compared with when alone: what trains as it does, else what trains most alike, else any."""
OF_ADAPTERS = ("sparsity", "zeros", "nuclear_norm", "effective_rank")
"""Measures of adapters, means over them."""


@dataclass(frozen=True)
class TextTables:
    """Of a stream of text tasks, in the study's order of methods."""

    methods: pl.DataFrame
    """A row a method: ``method``, ``label``, ``seeds`` (finished), ``seconds`` a step, and :data:`QUANTITIES`."""
    collisions: pl.DataFrame
    """A row a method with several adapters: ``method``, ``label``, :data:`OF_PAIRS` and :data:`OF_ADAPTERS` with
    intervals over seeds."""
    tasks: pl.DataFrame
    """A row a method and task: ``position``, ``task``, ``learning`` with its interval, ``against_alone`` with its."""
    matrices: dict[str, Floats]
    """By method, mean scores over seeds, [times, tasks], NaN where none was taken."""
    ratios: dict[str, Floats]
    """By method, collision ratio of every two adapters, mean over the seeds that have one, [tasks, tasks], NaN on the
    diagonal."""
    baselines: dict[str, str]
    """By method that learns in turn, the method with each task alone that it is compared with, finished or not; empty
    without one in the study."""
    begun: list[tuple[str, int, int]]
    """Sequences that are not finished, which are left out: method, seed, tasks learned."""
    finished: int
    """Sequences."""


def tabulate_texts(stream: TextStream, directory: Path) -> TextTables:
    """Read a run's results.

    Raises:
        NoResultsError: no sequence has finished.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    begun = []
    for job in stream.jobs():
        results = job.results(directory)
        if results is not None and results.get("finished"):
            found.setdefault(job.method, {})[job.seed] = results
        elif results is not None:
            begun.append((job.method, job.seed, len(results["losses"])))
    if not found:
        raise NoResultsError(f"{directory} has no finished sequence of tasks yet; run the study again to go on with it")
    found = {method: found[method] for method in stream.methods if method in found}
    baselines = _baselines(stream)
    methods, collisions, tasks = [], [], []
    matrices, ratios = {}, {}
    for method, by_seed in found.items():
        kind, label = stream.methods[method].tasks, stream.methods[method].label or method
        alone = found.get(baselines[method], {}) if method in baselines else {}
        scores = {s: np.array(r["scores"], dtype=np.float64) for s, r in by_seed.items()}
        matrices[method] = np.mean(list(scores.values()), axis=0)
        rows = [_sequence(kind, scores[s], r, alone.get(s)) for s, r in by_seed.items()]
        seconds = [sum(r["seconds"]) / sum(map(len, r["losses"])) for r in by_seed.values()]
        about = {"method": method, "label": label, "seeds": len(by_seed), "seconds": float(np.median(seconds))}
        methods.append(about | _intervals(rows, QUANTITIES))
        if all("pairs" in r for r in by_seed.values()):
            several = [_collisions(r) for r in by_seed.values()]
            collisions.append({"method": method, "label": label} | _intervals(several, (*OF_PAIRS, *OF_ADAPTERS)))
            ratios[method] = _mean([_ratios(r, len(stream.names)) for r in by_seed.values()])
        if kind != "together":
            for at, name in enumerate(stream.names):
                learned = [
                    {"learning": a[at, at], "against_alone": _less(a[at, at], alone.get(s), at)}
                    for s, a in scores.items()
                ]
                entry = {"method": method, "label": label, "position": at + 1, "task": name}
                tasks.append(entry | _intervals(learned, ("learning", "against_alone")))
    return TextTables(
        pl.DataFrame(methods, infer_schema_length=None),
        pl.DataFrame(collisions, infer_schema_length=None),
        pl.DataFrame(tasks, infer_schema_length=None),
        matrices,
        ratios,
        baselines,
        begun,
        sum(map(len, found.values())),
    )


def _baselines(stream: TextStream) -> dict[str, str]:
    """By the study and not by what has finished, so that a number does not come to mean something else."""
    singles: dict[str, str] = {}
    for method, recipe in stream.methods.items():
        if recipe.tasks == "alone":
            singles.setdefault(recipe.trains, method)
    compared = [method for method, recipe in stream.methods.items() if recipe.tasks == "in_turn"] if singles else []
    return {
        method: next(singles[kind] for kind in (*_NEXT[stream.methods[method].trains], *singles) if kind in singles)
        for method in compared
    }


def _mean(several: Sequence[Floats]) -> Floats:
    """Of what is there: a pair with an adapter that is all zero under one seed has a ratio under the others."""
    values = np.stack(several)
    there = np.isfinite(values)
    total, count = np.where(there, values, 0.0).sum(0), there.sum(0)
    found: Floats = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return found


def _less(score: float, alone: Mapping[str, Any] | None, at: int) -> float:
    return float("nan") if alone is None else score - float(alone["scores"][at][at])


def _sequence(
    kind: str, scores: Floats, results: Mapping[str, Any], alone: Mapping[str, Any] | None
) -> dict[str, float]:
    if kind == "together":
        return {"average": float(scores[0].mean())}
    learned = float(np.diag(scores).mean())
    if kind == "alone":
        return {"learning": learned}
    whole = continual(scores)
    found = {name: getattr(whole, name) for name in ("average", "forgetting", "backward_transfer", "learning")}
    if alone is not None:
        found["against_alone"] = learned - float(np.mean([alone["scores"][i][i] for i in range(len(scores))]))
        found["loss_against_alone"] = float(np.mean(results["losses"]) - np.mean(alone["losses"]))
    return found


def _collisions(results: Mapping[str, Any]) -> dict[str, float]:
    pairs, adapters = results["pairs"], results["adapters"]
    found = {n: float(np.mean([p[n] for p in pairs])) for n in OF_PAIRS if n != "collision_ratio"}
    # of the sums: an adapter that is all zero has no ratio of its own
    floor = found["collision_floor"]
    found["collision_ratio"] = found["collision_rate"] / floor if floor else np.nan
    return found | {n: float(np.mean([a[n] for a in adapters])) for n in OF_ADAPTERS}


def _ratios(results: Mapping[str, Any], count: int) -> Floats:
    found = np.full((count, count), np.nan)
    for pair in results["pairs"]:
        if pair["collision_floor"]:
            ratio = pair["collision_rate"] / pair["collision_floor"]
            found[pair["first"], pair["second"]] = found[pair["second"], pair["first"]] = ratio
    return found


def _intervals(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float | None]:
    """Means over seeds and their intervals, None where there are none."""
    samples = np.array([[row.get(name, np.nan) for name in names] for row in rows], dtype=np.float64)
    of = estimate(samples)
    found: dict[str, float | None] = {}
    for at, name in enumerate(names):
        for end, values in (("", of.mean), ("_low", of.low), ("_high", of.high)):
            value = float(values[at])
            found[name + end] = value if np.isfinite(value) else None
    return found


@dataclass(frozen=True)
class DominantTables:
    """Of a search for dominant tickets."""

    scores: pl.DataFrame
    """A row a task, kind, source and selection: ``task``, ``kind``, ``source``, ``selection``, ``whole`` (``rows`` or
    ``columns`` where it takes those), ``trained`` (weights, without the classifier), ``share`` (of what ``full``
    trains; None without one), ``score``, ``against_random`` and ``against_full`` (paired by seed) with intervals,
    ``seeds``."""
    kept: pl.DataFrame
    """A row a task and matrix: ``task``, ``matrix``, ``moved`` (how many of its weights did, mean over seeds), ``size``
    (its weights) and ``share`` (of them that moved)."""
    overlap: pl.DataFrame
    """A row a selection, relation (``other task`` or ``other seed``) and matrix (empty: all): means of ``iou`` and
    ``floor``."""
    finished: int
    """Trainings."""


def tabulate_dominant(experiment: DominantTickets, directory: Path) -> DominantTables:
    """Read a run's results.

    Raises:
        NoResultsError: no training has finished.
    """
    found = {job: results for job in experiment.jobs() if (results := job.results(directory)) is not None}
    if not found:
        raise NoResultsError(f"{directory} has no finished training yet; run the study again to go on with it")
    groups: dict[tuple[str, str, str, int], dict[int, dict[str, Any]]] = {}
    for job, results in found.items():
        groups.setdefault((job.task, job.kind, job.source, job.selection), {})[job.seed] = results
    sizes = _sizes(found, directory)
    whole = next((r["trained"] for job, r in found.items() if job.kind == "full"), None)
    rows, kept = [], []
    for (task, kind, source, number), by_seed in groups.items():
        random = groups.get((task, "random", task, number), {}) if kind in _PLACED else {}
        full = groups.get((task, "full", "", 0), {}) if kind != "full" else {}
        samples = [
            {
                "score": r["score"],
                "against_random": r["score"] - random[s]["score"] if s in random else np.nan,
                "against_full": r["score"] - full[s]["score"] if s in full else np.nan,
            }
            for s, r in by_seed.items()
        ]
        trained = float(np.mean([r["trained"] for r in by_seed.values()]))
        selection = experiment.selections[number] if source and kind != "find" else None
        about = {
            "task": task,
            "kind": kind,
            "source": source,
            "selection": "" if selection is None else str(selection),
            "whole": "" if selection is None or selection.dimensions is None else selection.dims,
            "trained": int(trained),
            "share": trained / whole if whole else None,
            "seeds": len(by_seed),
        }
        rows.append(about | _intervals(samples, ("score", "against_random", "against_full")))
        if kind == "find":
            for matrix in next(iter(by_seed.values()))["kept"]:
                moved = float(np.mean([r["kept"][matrix] for r in by_seed.values()]))
                size = sizes.get(matrix)
                share = moved / size if size else None
                kept.append({"task": task, "matrix": matrix, "moved": moved, "size": size, "share": share})
    pairs = pl.DataFrame(overlaps(experiment, directory))
    if not pairs.is_empty():
        other = pl.when(pl.col("first") == pl.col("second")).then(pl.lit("other seed")).otherwise(pl.lit("other task"))
        pairs = (
            pairs.with_columns(other.alias("relation"))
            .group_by("selection", "relation", "matrix", maintain_order=True)
            .agg(pl.col("iou", "floor").fill_nan(None).mean())  # of matrices where neither ticket has a weight
        )
    return DominantTables(pl.DataFrame(rows, infer_schema_length=None), pl.DataFrame(kept), pairs, len(found))


def _sizes(found: Mapping[Training, Any], directory: Path) -> dict[str, int]:
    """Weights of each matrix, which the distances alone tell; empty where none are saved."""
    for job in found:
        if job.kind == "find" and job.distances(directory).exists():
            return {name: value.numel() for name, value in read_tensors(job.distances(directory)).items()}
    return {}
