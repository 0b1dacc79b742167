"""The pages of language-model studies: in the report's style, and as self-contained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from perennial.lm import DominantTickets, TextStream
from perennial.report.dominant_figures import draw_dominant, kind_name, kind_of
from perennial.report.lm_figures import RATIO_ENDS, draw_texts, method_looks
from perennial.report.lm_tables import DominantTables, TextTables, tabulate_dominant, tabulate_texts
from perennial.report.lm_words import dominant_notes, text_notes
from perennial.report.sections import printed, section, write_page
from perennial.report.words import number

_SEQUENCES = {
    "average": ("Average at the end, %", 100.0),
    "forgetting": ("Forgetting, points", 100.0),
    "backward_transfer": ("Backward transfer, points", 100.0),
    "learning": ("Learning accuracy, %", 100.0),
    "against_alone": ("Learning accuracy less alone, points", 100.0),
    "loss_against_alone": ("Training loss less alone", 1.0),
}
_ADAPTERS = {
    "collision_rate": ("Collision rate", 1.0),
    "collision_floor": ("By chance", 1.0),
    "collision_ratio": ("Ratio", 1.0),
    "sparsity": ("Below threshold, %", 100.0),
    "zeros": ("Exact zeros, %", 100.0),
    "row_cosine": ("Row cosine", 1.0),
    "update_cosine": ("Cosine of updates", 1.0),
    "nuclear_norm": ("Nuclear norm", 1.0),
    "effective_rank": ("Effective rank", 1.0),
}
_TICKETS = {
    "score": ("Score", 1.0),
    "against_random": ("Less random places", 1.0),
    "against_full": ("Less all weights", 1.0),
}


def write_text_report(stream: TextStream, directory: Path, **about: str) -> Path:
    """Write ``report.html``, ``figures/*.svg`` and ``tables/*.csv`` into the directory of a stream of text tasks.

    The page stands alone and loads nothing; the same results give the same bytes. A run that has not finished is
    reported as far as it has come.

    Args:
        stream: what was run.
        directory: where.
        about: ``title``, ``description``, ``source``, ``command`` and ``study_text`` of the run.

    Returns:
        The path of ``report.html``.

    Raises:
        NoResultsError: nothing has finished.
    """
    tables = tabulate_texts(stream, directory)
    training, adapters = stream.training, stream.adapters
    facts = [
        f"{stream.model}, {len(stream.names)} tasks: {', '.join(stream.names)}",
        f"{training.steps} steps of {training.batch_size * training.accumulate} texts a task, step size "
        f"{number(training.lr)}, {training.max_length} tokens",
        f"LoRA of rank {adapters.rank} on {', '.join(adapters.target_modules)}",
        _seeds(len(stream.seeds), stream.part),
    ]
    sections = [
        section("Sequences", ["plane", "accuracy-matrix"], _SEQUENCE_NOTE, tables.methods, _SEQUENCES, seconds=True)
        | {"key": _key(tables)},
        section("Does it lose plasticity?", ["learning"], _LEARNING_NOTE),
        section("Adapters", ["collisions"], _ADAPTER_NOTE, tables.collisions, _ADAPTERS),
    ]
    frames = {"methods": tables.methods, "collisions": tables.collisions, "tasks": tables.tasks}
    drawings = draw_texts(tables, stream.names)
    progress = (tables.finished, len(stream.jobs()))
    return write_page(directory, facts, text_notes(stream, tables), sections, drawings, frames, progress, about)


def write_dominant_report(experiment: DominantTickets, directory: Path, **about: str) -> Path:
    """The same of a search for dominant tickets; see :func:`write_text_report`."""
    tables = _labelled(tabulate_dominant(experiment, directory))
    facts = [
        f"{experiment.model}, tasks {', '.join(experiment.tasks)}",
        f"found by {experiment.how} steps, strength {number(experiment.strength)}, {experiment.finding.steps} steps",
        f"trained for {experiment.training.steps} steps, step size {number(experiment.training.lr)}",
        _seeds(len(experiment.seeds), experiment.part),
    ]
    overall = tables.overlap
    if not overall.is_empty():
        overall = overall.filter(pl.col("matrix") == "").with_columns(
            (pl.col("selection") + ", " + pl.col("relation")).alias("label")
        )
    sections = [
        section("Tickets and controls", ["scores", "scores-by-count"], _TICKET_NOTE, tables.scores, _TICKETS,
                 weights=True),
        section("Are tickets of different tasks alike?", ["overlap"], _OVERLAP_NOTE, overall,
                 {"iou": ("Intersection by union", 1.0), "floor": ("By chance", 1.0)}),
        section("What moved", ["moved"], ["After the search, mean over tasks and seeds."]),
    ]  # fmt: skip
    frames = {"scores": tables.scores.drop("label"), "moved": tables.kept, "overlap": tables.overlap}
    drawings = draw_dominant(tables)
    progress = (tables.finished, len(experiment.jobs()))
    return write_page(directory, facts, dominant_notes(experiment, tables), sections, drawings, frames, progress, about)


_SEQUENCE_NOTE = [
    "Mean over seeds with its 95% bootstrap interval; of three seeds it is hardly more than their range. Forgetting "
    "is the best score that a task ever had less its score at the end; learning accuracy is the score on each task "
    "when it was just learned. Training loss is without penalties, mean over all steps.",
]
_LEARNING_NOTE = [
    "A model that learns the task alone begins at the pretrained weights, with the same texts in the same order, and "
    "trains all weights or an adapter, as the method does where the study has both. Below "
    "zero, what was learned before makes the task harder to learn. If that grows along the sequence, plasticity is "
    "lost. A difference on the first task, before which nothing was learned, is the method's own.",
]
_ADAPTER_NOTE = [
    "An entry of an update counts as changed above a tenth of the root mean square of all updates of a run. Two "
    "updates collide where both changed. By chance: what independent places would give at the same densities. A "
    "ratio of 1 says that nothing is avoided beyond sparsity. In the figure adapters are numbered in the order of "
    f"their tasks, and colours end at {RATIO_ENDS[0]:g} and {RATIO_ENDS[1]:g}.",
]
_TICKET_NOTE = [
    "Trained weights are without the classifier, which is always trained, and their share is of all others; in the "
    "figure they stand in brackets. Differences are paired by seed. Where a figure has curves, marks of one number of "
    "weights stand a little beside each other.",
]
_OVERLAP_NOTE = [
    "Tickets found on two tasks with one seed, and on one task with two seeds: what two searches have in common at "
    "best. By chance: random masks of the same counts. The figure has the intersection by union divided by what chance "
    "gives, which is coarse where a ticket has few weights of a matrix; a matrix of which a ticket has no weight is "
    "left white.",
]


def text_summary(stream: TextStream, directory: Path) -> pl.DataFrame:
    """The methods as text, to print."""
    rows = tabulate_texts(stream, Path(directory)).methods
    names = ("average", "forgetting", "learning", "against_alone")
    return printed(rows, {n: _SEQUENCES[n] for n in names}, "Method")


def dominant_summary(experiment: DominantTickets, directory: Path) -> pl.DataFrame:
    """What was trained as text, to print."""
    return printed(_labelled(tabulate_dominant(experiment, Path(directory))).scores, _TICKETS, "Trained")


def _seeds(count: int, part: str) -> str:
    return f"{count} seed{'' if count == 1 else 's'}, scores on the {part} part"


def _key(tables: TextTables) -> list[dict[str, Any]]:
    labels = dict(tables.methods.select("method", "label").iter_rows())
    return [
        {"look": look, "dash": " ".join(map(str, look.dash)), "label": labels[method]}
        for method, look in method_looks(tables).items()
    ]


def _labelled(tables: DominantTables) -> DominantTables:
    """With a column ``label`` of scores."""
    labels = [
        f"{r['task']}: {kind_name(kind_of(r))}{', ' + r['selection'] if r['selection'] else ''}"
        for r in tables.scores.iter_rows(named=True)
    ]
    return replace(tables, scores=tables.scores.with_columns(pl.Series("label", labels)))
