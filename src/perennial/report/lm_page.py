"""The pages of language-model studies: in the report's style, and as self-contained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup

from perennial.lm import DominantTickets, TextStream
from perennial.report.lm_figures import draw_dominant, draw_texts, kind_name, kind_of
from perennial.report.lm_tables import DominantTables, tabulate_dominant, tabulate_texts
from perennial.report.svg import FONTS, Drawing
from perennial.report.templates import link, template, write_texts
from perennial.report.words import interval_text, mean_text, number

_NONE = {"mean": "\N{EN DASH}", "interval": ""}
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
        section("Sequences", ["plane", "accuracy-matrix"], _SEQUENCE_NOTE, tables.methods, _SEQUENCES, seconds=True),
        section("Does it lose plasticity?", ["learning"], _LEARNING_NOTE),
        section("Adapters", ["collisions"], _ADAPTER_NOTE, tables.collisions, _ADAPTERS),
    ]
    frames = {"methods": tables.methods, "collisions": tables.collisions, "tasks": tables.tasks}
    drawings = draw_texts(tables, stream.names)
    return write_page(directory, facts, sections, drawings, frames, tables.finished, len(stream.jobs()), about)


def write_dominant_report(experiment: DominantTickets, directory: Path, **about: str) -> Path:
    """The same of a search for dominant tickets; see :func:`write_text_report`."""
    tables = tabulate_dominant(experiment, directory)
    labelled = _labelled(tables)
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
        section("Tickets and controls", ["scores"], _TICKET_NOTE, labelled, _TICKETS, extra="trained"),
        section("Are tickets of different tasks alike?", ["overlap"], _OVERLAP_NOTE, overall,
                 {"iou": ("Intersection by union", 1.0), "floor": ("By chance", 1.0)}),
        section("What moved", ["moved"], ["After the search, mean over tasks and seeds."]),
    ]  # fmt: skip
    frames = {"scores": tables.scores, "moved": tables.kept, "overlap": tables.overlap}
    drawings = draw_dominant(tables)
    return write_page(directory, facts, sections, drawings, frames, tables.finished, len(experiment.jobs()), about)


_SEQUENCE_NOTE = [
    "Mean over seeds with its 95% bootstrap interval; of three seeds it is hardly more than their range. Forgetting "
    "is the best score that a task ever had less its score at the end; learning accuracy is the score on each task "
    "when it was just learned. Training loss is without penalties, mean over all steps.",
]
_LEARNING_NOTE = [
    "A model that learns the task alone begins at the pretrained weights, with the same texts in the same order, and "
    "trains all weights or an adapter, as the method does (an adapter where the study has no other). Below "
    "zero, what was learned before makes the task harder to learn. If that grows along the sequence, plasticity is "
    "lost.",
]
_ADAPTER_NOTE = [
    "An entry of an update counts as changed above a tenth of the root mean square of all updates of a run. Two "
    "updates collide where both changed. By chance: what independent places would give at the same densities. A "
    "ratio of 1 says that nothing is avoided beyond sparsity.",
]
_TICKET_NOTE = [
    "In brackets the trained weights, without the classifier, which is always trained. Differences are paired by seed.",
]
_OVERLAP_NOTE = [
    "Tickets found on two tasks with one seed, and on one task with two seeds. By chance: random masks of the same "
    "counts.",
]


def text_summary(stream: TextStream, directory: Path) -> pl.DataFrame:
    """The methods as text, to print."""
    rows = tabulate_texts(stream, Path(directory)).methods
    names = ("average", "forgetting", "learning", "against_alone")
    return printed(rows, {n: _SEQUENCES[n] for n in names}, "Method")


def dominant_summary(experiment: DominantTickets, directory: Path) -> pl.DataFrame:
    """What was trained as text, to print."""
    return printed(_labelled(tabulate_dominant(experiment, Path(directory))), _TICKETS, "Trained")


def _seeds(count: int, part: str) -> str:
    return f"{count} seed{'' if count == 1 else 's'}, scores on the {part} part"


def _labelled(tables: DominantTables) -> pl.DataFrame:
    labels = [
        f"{r['task']}: {kind_name(kind_of(r))}{', ' + r['selection'] if r['selection'] else ''}"
        for r in tables.scores.iter_rows(named=True)
    ]
    return tables.scores.with_columns(pl.Series("label", labels))


def printed(rows: pl.DataFrame, columns: dict[str, tuple[str, float]], first: str) -> pl.DataFrame:
    """A table as text: its columns under their titles, the rows' labels under ``first``."""
    found = []
    for row in rows.iter_rows(named=True):
        cells = {title: _cell(row, name, scale) for name, (title, scale) in columns.items()}
        found.append({first: row["label"]} | {t: f"{c['mean']} {c['interval']}".strip() for t, c in cells.items()})
    return pl.DataFrame(found)


def _cell(row: dict[str, Any], name: str, scale: float) -> dict[str, str]:
    if row[name] is None:
        return _NONE
    value, low, high = scale * row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    low, high = (None if end is None else scale * end for end in (low, high))
    return {"mean": mean_text(value, low, high), "interval": interval_text(value, low, high)}


def section(
    title: str,
    figures: Sequence[str],
    notes: Sequence[str],
    rows: pl.DataFrame | None = None,
    columns: dict[str, tuple[str, float]] | None = None,
    *,
    seconds: bool = False,
    extra: str = "",
) -> dict[str, Any]:
    """What the page shows under one heading: figures by name, a table, notes.

    Args:
        title: of it.
        figures: names of drawings; those that there are stand in this order.
        notes: paragraphs below.
        rows: of the table, a row a line, with ``label``.
        columns: its columns: their title and by what their numbers are multiplied.
        seconds: whether the seconds of a step are a column.
        extra: the name of one more column, of weights.
    """
    body, heads = [], [title for title, _ in (columns or {}).values()]
    heads += ["Seconds a step"] if seconds else ["Weights"] if extra else []
    for row in rows.iter_rows(named=True) if rows is not None else ():
        cells = [_cell(row, name, scale) for name, (_, scale) in (columns or {}).items()]
        if seconds:
            cells.append({"mean": f"{row['seconds']:.3g}", "interval": ""})
        elif extra:
            cells.append({"mean": f"{row[extra]:,}", "interval": ""})
        body.append({"label": row["label"], "cells": cells})
    return {"title": title, "figures": figures, "notes": notes, "heads": heads, "rows": body}


def write_page(
    directory: Path,
    facts: Sequence[str],
    sections: Sequence[dict[str, Any]],
    drawings: Sequence[Drawing],
    frames: dict[str, pl.DataFrame],
    finished: int,
    planned: int,
    about: dict[str, str],
) -> Path:
    """Write page, figures and tables; the path of the page.

    Args:
        directory: where.
        facts: what was run, in a few words each.
        sections: made by :func:`section`.
        drawings: all figures.
        frames: tables by the name of their file.
        finished: jobs that are.
        planned: jobs in all.
        about: ``title``, ``description``, ``source``, ``command`` and ``study_text``.
    """
    texts = {f"{name}.csv": frame.write_csv() for name, frame in frames.items() if not frame.is_empty()}
    page = template("lm.html.j2").render(
        fonts=Markup(FONTS),
        title=about["title"],
        paragraphs=[p for p in re.split(r"\n\s*\n", about["description"].strip()) if p],
        source=about["source"],
        command=about.get("command", ""),
        study_text=(text := about.get("study_text", "")),
        study_link=link(text, "text/yaml") if text else "",
        facts=facts,
        sections=sections,
        drawn={d.name: {"svg": Markup(d.svg), "plot_share": d.plot_share} for d in drawings},
        finished=finished,
        planned=planned,
        links=[{"name": name, "href": link(text, "text/csv")} for name, text in texts.items()],
    )
    write_texts(directory / "figures", {f"{drawing.name}.svg": drawing.svg for drawing in drawings})
    write_texts(directory / "tables", texts)
    write_texts(directory, {"report.html": page + "\n"})
    return directory / "report.html"
