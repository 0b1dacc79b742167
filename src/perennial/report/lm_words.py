"""What a reader of a language-model report must know before its numbers."""

from __future__ import annotations

from collections.abc import Iterable

from perennial.lm import DominantTickets, TextStream
from perennial.report.lm_tables import DominantTables, TextTables

_ONE_SEED = "One seed: there is no interval, and a difference may be chance."
_FEWER = (
    "Not all seeds have finished: {}. These means are of fewer seeds than the rest; differences that are paired by "
    "seed can still be compared."
)


def text_notes(stream: TextStream, tables: TextTables) -> list[str]:
    """Of a stream of text tasks: what is missing, and what methods are compared with."""
    labels = {method: recipe.label or method for method, recipe in stream.methods.items()}
    rows = list(tables.methods.select("method", "seeds").iter_rows())
    notes = [_absent(labels[m] for m in stream.methods if m not in dict(rows))]
    notes += _seeds(((labels[method], seeds) for method, seeds in rows), len(stream.seeds))
    count = len(stream.names)
    begun = [f"{labels[m]}, seed {seed} ({done} of {count} tasks)" for m, seed, done in tables.begun]
    notes.append(f"Begun and left out of every number: {'; '.join(begun)}." if begun else "")
    in_turn = [method for method, recipe in stream.methods.items() if recipe.tasks == "in_turn"]
    if not any(recipe.tasks == "alone" for recipe in stream.methods.values()) and in_turn:
        notes.append(
            "No method of this study learns each task alone, so that nothing is said of the plasticity that the "
            "sequence costs. To have it, add a method with tasks: alone."
        )
    other: dict[str, list[str]] = {}
    for method, alone in tables.baselines.items():
        if _trains(stream, method) != _trains(stream, alone):
            other.setdefault(labels[alone], []).append(labels[method])
    notes += [
        f"Compared with {alone}, as nothing that trains as they do learns alone: {', '.join(methods)}. "
        "Their differences hold that of the two ways of training, too."
        for alone, methods in other.items()
    ]
    return [note for note in notes if note]


def _trains(stream: TextStream, method: str) -> str:
    """What it trains; one adapter and a new one each are the same for one task."""
    return stream.methods[method].trains.partition("_")[0]


def dominant_notes(experiment: DominantTickets, tables: DominantTables) -> list[str]:
    """Of a search for dominant tickets: what is missing."""
    many = len(experiment.seeds)
    labelled = ((r["label"], r["seeds"]) for r in tables.scores.iter_rows(named=True))
    notes = _seeds(labelled, many)
    there = set() if tables.overlap.is_empty() else set(tables.overlap["relation"])
    if len(experiment.tasks) > 1 and "other task" not in there:
        notes.append("No overlap of two tasks' tickets yet: it needs their distances with one seed.")
    return notes


def _absent(labels: Iterable[str]) -> str:
    names = list(labels)
    return f"No results yet: {', '.join(names)}." if names else ""


def _seeds(rows: Iterable[tuple[str, int]], many: int) -> list[str]:
    if many == 1:
        return [_ONE_SEED]
    fewer = [f"{label} ({seeds} of {many})" for label, seeds in rows if seeds < many]
    return [_FEWER.format("; ".join(fewer))] if fewer else []
