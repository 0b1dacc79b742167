"""The page of a lottery-ticket experiment: in the report's style, and as self-contained."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup

from perennial.report.svg import FONTS, Drawing
from perennial.report.templates import link, template, write_texts
from perennial.report.tickets_figures import (
    FIGURES,
    draw_tickets,
    kind_looks,
    layer_label,
    layer_looks,
    level_looks,
    percent_text,
)
from perennial.report.tickets_tables import TicketTables, kind_label, shown_levels, tabulate_tickets
from perennial.report.tickets_words import findings
from perennial.report.words import MINUS, number
from perennial.tickets.experiment import Experiment

_NONE = {"mean": "\N{EN DASH}", "range": "", "counted": "", "kind": "none"}


def write_ticket_report(
    experiment: Experiment,
    directory: Path,
    *,
    title: str,
    description: str,
    source: str,
    command: str = "",
    study_text: str = "",
) -> Path:
    """Write ``report.html``, ``figures/*.svg`` and ``tables/*.csv`` into the directory of an experiment.

    The page stands alone: figures and tables are inside it, and it loads nothing. The same results give the same bytes.
    A run that has not finished is reported as far as it has come.

    Args:
        experiment: what was run.
        directory: where.
        title: of the page.
        description: paragraphs, with empty lines between them.
        source: where the experiment comes from.
        command: that made the results; empty if unknown.
        study_text: the study with every setting, as YAML; empty if there is none.

    Returns:
        The path of ``report.html``.

    Raises:
        NoResultsError: no training has finished.
    """
    directory = Path(directory)
    tables = tabulate_tickets(experiment, directory)
    drawings = {drawing.name: drawing for drawing in draw_tickets(tables, len(experiment.seeds))}
    frames = {
        f"tickets-{name}.csv": frame.write_csv()
        for name, frame in {
            "trainings": tables.trainings,
            "levels": tables.levels,
            "validation": tables.validation,
            "sparsity": tables.sparsity,
            "mask-overlap": tables.overlap,
        }.items()
        if not frame.is_empty()
    }
    kinds = tables.levels.get_column("kind").unique(maintain_order=True).to_list()
    drawn: dict[str, dict[str, Any] | None] = dict.fromkeys(FIGURES)
    drawn |= {name: {"svg": Markup(d.svg), "plot_share": d.plot_share} for name, d in drawings.items()}
    page = template("tickets.html.j2").render(
        fonts=Markup(FONTS),
        title=title,
        paragraphs=[p for p in re.split(r"\n\s*\n", description.strip()) if p],
        source=source,
        facts=_facts(experiment),
        finished=tables.trainings.height,
        planned=len(experiment.jobs()),
        notes=_notes(experiment, tables),
        findings=findings(tables),
        key=_key(kinds),
        kinds=[kind_label(kind) for kind in kinds],
        replicates=len(experiment.seeds),
        every=experiment.training.evaluate_every,
        iterations=experiment.training.iterations,
        by_level=_by_level(tables.levels, kinds),
        compared=_compared(tables.trainings, tables.levels, kinds),
        sparsity=_sparsity(tables.sparsity),
        overlap=_overlap(tables.overlap),
        drawn=drawn,
        level_key=_level_key(tables),
        layer_key=_layer_key(tables),
        together=tables.validation.select(pl.col("evaluations").max()).item() or 1,
        minus=MINUS,
        links=[{"name": name, "href": link(text, "text/csv")} for name, text in frames.items()],
        command=command,
        study_text=study_text,
        study_link=link(study_text, "text/yaml") if study_text else "",
    )
    write_texts(directory / "figures", {f"{drawing.name}.svg": drawing.svg for drawing in drawings.values()})
    write_texts(directory / "tables", frames)
    write_texts(directory, {"report.html": page + "\n"})
    return directory / "report.html"


def ticket_summary(experiment: Experiment, directory: Path) -> pl.DataFrame:
    """The levels as text, to print: one row each.

    Columns: ``Weights %``, and for the ticket and each control ``... accuracy %`` (test accuracy at the early stop) and
    ``... early stop`` (iteration), both means over the replicates that are finished, with their number where that is
    not all.

    Raises:
        NoResultsError: no training has finished.
    """
    levels = tabulate_tickets(experiment, Path(directory)).levels
    table = []
    for (_, percent), group in levels.sort("level").group_by("level", "percent", maintain_order=True):
        row = {"Weights %": percent_text(float(str(percent)))}
        by_kind = {one["kind"]: one for one in group.iter_rows(named=True)}
        for kind in levels.get_column("kind").unique(maintain_order=True):
            one = by_kind.get(kind)
            for name, what, write in (("early_accuracy", "accuracy %", _share), ("early_stop", "early stop", _count)):
                text = "" if one is None or one[f"{name}_mean"] is None else write(one[f"{name}_mean"])
                if text and one is not None and (there := one["replicates"] - one["diverged"]) < len(experiment.seeds):
                    text += f" ({there} of {len(experiment.seeds)})"
                row[f"{kind_label(kind)} {what}"] = text
        table.append(row)
    return pl.DataFrame(table)


def ticket_drawings(experiment: Experiment, directory: Path) -> list[Drawing]:
    """The figures alone, see :func:`perennial.report.tickets_figures.draw_tickets`.

    Raises:
        NoResultsError: no training has finished.
    """
    return draw_tickets(tabulate_tickets(experiment, Path(directory)), len(experiment.seeds))


def _facts(experiment: Experiment) -> list[str]:
    training, pruning = experiment.training, experiment.pruning
    rates = ", ".join(f"{100 * rate:g}% of {'*' if name == '*' else name}" for name, rate in pruning.rates.items())
    only = len(pruning.rates) == 1
    rate = f"{100 * next(iter(pruning.rates.values())):g}%" if only else rates.replace("of *", "of the others")
    where = "in each layer" if pruning.scope == "layer" else "over all layers"
    score = pruning.score if isinstance(pruning.score, str) else getattr(pruning.score, "__name__", "a function")
    score = "magnitude after training" if score == "large_final" else score.replace("_", " ")
    after = {
        "reset": f"reset to iteration {experiment.rewind:,}" if experiment.rewind else "reset to the start",
        "continue": "training continues",
        "rewind_learning_rate": f"learning rate rewound to iteration {experiment.rewind:,}",
    }
    many = len(experiment.seeds)
    return [
        f"{experiment.network.replace('_', '-')} on {experiment.data}",
        f"{training.iterations:,} iterations of {training.batch_size} examples",
        f"{training.optimizer}, step size {number(training.lr)}",
        f"{experiment.rounds} rounds, pruned in each: {rate}, {where}, by {score}",
        after.get(experiment.after, experiment.after.replace("_", " ")),
        f"{many} replicate{'' if many == 1 else 's'}",
    ]


def _notes(experiment: Experiment, tables: TicketTables) -> list[str]:
    """What a reader must know before the figures."""
    levels, many = tables.levels, len(experiment.seeds)
    notes = []
    absent = [kind for kind in experiment.controls if kind not in set(levels.get_column("kind"))]
    if absent:
        notes.append(f"No results yet: {', '.join(map(kind_label, absent))}.")
    if many == 1:
        notes.append("One replicate: there is no range, and a difference may be chance.")
    fewer = []
    for kind in levels.get_column("kind").unique(maintain_order=True):
        mine = levels.filter((pl.col("kind") == kind) & (pl.col("replicates") < many)).get_column("percent")
        if mine.len():
            fewer.append(f"{kind_label(kind)} at {', '.join(map(percent_text, mine))}%")
    if fewer:
        notes.append(
            f"Not all replicates have finished, and marks are hollow: {'; '.join(fewer)}. These means are of other "
            "replicates than the rest; the differences to the whole network, by replicate, can be compared."
        )
    gone = tables.trainings.filter(pl.col("early_stop").is_null())
    if gone.height:
        which = ", ".join(
            f"{kind_label(kind)} at {percent_text(percent)}%, replicate {seed}"
            for kind, percent, seed in gone.select("kind", "percent", "seed").iter_rows()
        )
        notes.append(f"Diverged, so that there is no early stop; left out of its means: {which}.")
    return notes


def _key(kinds: Sequence[str]) -> list[dict[str, Any]]:
    looks = kind_looks()
    return [
        {"look": looks[kind], "dash": " ".join(map(str, looks[kind].dash)), "label": kind_label(kind)} for kind in kinds
    ]


def _level_key(tables: TicketTables) -> list[dict[str, Any]]:
    shown = shown_levels(tables.levels)
    percent = dict(tables.levels.select("level", "percent").iter_rows())
    looks = level_looks(shown)
    return [{"look": looks[n], "label": f"{percent_text(percent.get(n, 100.0))}%"} for n in shown]


def _layer_key(tables: TicketTables) -> list[dict[str, Any]]:
    looks = layer_looks(tables.overlap.get_column("layer").unique(maintain_order=True).to_list())
    return [{"look": look, "label": layer_label(layer)} for layer, look in looks.items()]


def _by_level(levels: pl.DataFrame, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """A row a level: for each kind accuracy at the early stop and the early stop."""
    return [
        {
            "percent": percent_text(percent),
            "cells": [
                _cell(by_kind.get(kind), name, write)
                for kind in kinds
                for name, write in (("early_accuracy", _share), ("early_stop", _count))
            ],
        }
        for percent, by_kind in _grouped(levels)
    ]


def _compared(trainings: pl.DataFrame, levels: pl.DataFrame, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """A row a level: for each kind its changes against the whole network, replicate by replicate."""
    table = []
    for percent, by_kind in _grouped(levels.filter(pl.col("level") > 0)):
        cells = []
        for kind in kinds:
            for name, write, word in (
                ("early_stop_change", _signed_percent, "earlier"),
                ("early_accuracy_change", _signed_points, "higher"),
            ):
                one = by_kind.get(kind)
                cell = _cell(one, name, write)
                if one is not None and cell["kind"] == "number":
                    mine = trainings.filter((pl.col("kind") == kind) & (pl.col("level") == one["level"]))
                    values = mine.get_column(name).drop_nulls()
                    better = (values < 0).sum() if word == "earlier" else (values > 0).sum()
                    cell["counted"] = f"{word} in {better} of {values.len()}"
                cells.append(cell)
        if any(cell["kind"] == "number" for cell in cells):
            table.append({"percent": percent_text(percent), "cells": cells})
    return table


def _grouped(levels: pl.DataFrame) -> list[tuple[float, dict[str, dict[str, Any]]]]:
    found: dict[int, tuple[float, dict[str, dict[str, Any]]]] = {}
    for row in levels.sort("level").iter_rows(named=True):
        found.setdefault(row["level"], (row["percent"], {}))[1][row["kind"]] = row
    return list(found.values())


def _cell(row: dict[str, Any] | None, name: str, write: Callable[[float], str]) -> dict[str, str]:
    if row is None or row[f"{name}_mean"] is None:
        return dict(_NONE)
    mean, low, high = (write(row[f"{name}_{what}"]) for what in ("mean", "low", "high"))
    several = row["replicates"] - row["diverged"] > 1
    return {"mean": mean, "range": f"[{low}, {high}]" if several else "", "counted": "", "kind": "number"}


def _sparsity(frame: pl.DataFrame) -> dict[str, Any]:
    layers = frame.get_column("layer").unique(maintain_order=True).to_list()
    rows, differ, counted = [], 0, 0
    for (_, percent), group in frame.group_by("level", "percent", maintain_order=True):
        cells = []
        for one in group.iter_rows(named=True):
            low, high, planned = one["kept_low"], one["kept_high"], one["scheduled"]
            as_planned = planned is None or low == high == planned
            counted += planned is not None
            differ += not as_planned
            kept = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            share = f"{percent_text(100 * low / one['total'])}%"
            cells.append({"mean": kept, "range": share, "planned": "" if as_planned else f"{planned:,}"})
        rows.append({"percent": percent_text(float(str(percent))), "cells": cells})
    return {"layers": [layer_label(layer) for layer in layers], "rows": rows, "differ": differ, "counted": counted}


def _overlap(frame: pl.DataFrame) -> dict[str, Any]:
    layers = frame.get_column("layer").unique(maintain_order=True).to_list()
    means = frame.group_by("level", "percent", "layer", maintain_order=True).agg(pl.col("jaccard", "floor").mean())
    rows = []
    for (_, percent), group in means.group_by("level", "percent", maintain_order=True):
        cells = [
            {"mean": _decimal(one["jaccard"]), "range": _decimal(one["floor"])} for one in group.iter_rows(named=True)
        ]
        rows.append({"percent": percent_text(float(str(percent))), "cells": cells})
    return {"layers": [layer_label(layer) for layer in layers], "rows": rows}


def _share(value: float) -> str:
    return f"{100 * value:.2f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _signed_percent(value: float) -> str:
    return _signed(f"{100 * value:+.1f}")


def _signed_points(value: float) -> str:
    return _signed(f"{100 * value:+.2f}")


def _signed(text: str) -> str:
    return text[1:] if not text.strip("+-0.") else text.replace("-", MINUS)


def _decimal(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.3f}"
