"""The page of a study of tickets along a stream: in the report's style, and as self-contained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup

from perennial.report.supply_figures import FIGURES, draw_supply, shown_steps
from perennial.report.supply_tables import CORRELATED, DRAWN, ONLINE, QUANTITIES, SupplyTables, tabulate_supply
from perennial.report.supply_words import amount, coefficient, direction, findings
from perennial.report.svg import FONTS, Drawing
from perennial.report.templates import link, template, write_texts
from perennial.report.words import examples, thing
from perennial.runs.supply import FRESH
from perennial.statistics import LEVEL, RESAMPLES
from perennial.studies import SupplyStudy, seeds_of

FEW = 5
"""Seeds below which the page warns of intervals that are too narrow."""
_VERSIONS = {
    "pooled": "Over all points",
    "within": "Within lives, over time",
}
_POSITIVE, _NEGATIVE = (26, 128, 230), (217, 110, 20)
_DEPTH = 0.5  # share of the colour in a cell of correlation 1; black on it has a contrast of 7:1 or more


def write_supply_report(study: SupplyStudy, directory: Path, *, command: str = "", study_text: str = "") -> Path:
    """Write ``report.html``, ``figures/*.svg`` and ``tables/*.csv`` into the directory of a study.

    The page stands alone: figures and tables are inside it, and it loads nothing. The same results give the same bytes.
    A run that has not finished is reported as far as it has come.

    Args:
        study: what was run.
        directory: where.
        command: that made the results; empty if unknown.
        study_text: the study with every setting, as YAML; empty if there is none.

    Returns:
        The path of ``report.html``.

    Raises:
        NoResultsError: no network has been measured, nor has one lived for a bin.
    """
    directory = Path(directory)
    tables = tabulate_supply(study, directory)
    drawings = {drawing.name: drawing for drawing in draw_supply(tables)}
    frames = {
        f"supply-{name}.csv": frame.write_csv()
        for name, frame in {
            "points": tables.points,
            "over-life": tables.over_life,
            "levels": tables.levels,
            "changes": tables.changes,
            "correlations": tables.correlations,
        }.items()
        if not frame.is_empty()
    }
    drawn: dict[str, dict[str, Any] | None] = dict.fromkeys(FIGURES)
    drawn |= {name: {"svg": Markup(d.svg), "plot_share": d.plot_share} for name, d in drawings.items()}
    page = template("supply.html.j2").render(
        title=study.title or study.name,
        paragraphs=[p for p in re.split(r"\n\s*\n", study.description.strip()) if p],
        source=study.source,
        fonts=Markup(FONTS),
        facts=_facts(study),
        notes=_notes(study, tables),
        finished=tables.finished,
        findings=findings(tables),
        drawn=drawn,
        numbers=_numbers(tables, len(seeds_of(study.life, "life"))),
        number_headings=_headings(),
        changes=_changes(tables),
        matrices=[matrix for version in _VERSIONS if (matrix := _matrix(tables, version))],
        headings=[QUANTITIES[name].label for name in CORRELATED[:-1]],
        control=study.supply.control.replace("_", " "),
        level=f"{100 * LEVEL:g}%",
        resamples=RESAMPLES,
        seeds=len(seeds_of(study.life, "life")),
        pairs=len(CORRELATED) * (len(CORRELATED) - 1) // 2,
        links=[{"name": name, "href": link(text, "text/csv")} for name, text in frames.items()],
        command=command,
        study_text=study_text,
        study_link=link(study_text, "text/yaml") if study_text else "",
    )
    write_texts(directory / "figures", {f"{drawing.name}.svg": drawing.svg for drawing in drawings.values()})
    write_texts(directory / "tables", frames)
    write_texts(directory, {"report.html": page + "\n"})
    return directory / "report.html"


def supply_summary(study: SupplyStudy, directory: Path) -> pl.DataFrame:
    """The means at the start, at the first checkpoint after it and at the last, as text, to print.

    One row a method and time. Columns: ``Examples``, ``Method``, and one a quantity, as ``mean [low, high]``, shares in
    percent; with the number of seeds where not all have come so far.

    Raises:
        NoResultsError: no network has been measured, nor has one lived for a bin.
    """
    tables = tabulate_supply(study, Path(directory))
    rows = []
    for row in _numbers(tables, len(seeds_of(study.life, "life"))):
        texts = (f"{cell['mean']} {cell['interval']} {cell['seeds']}".strip() for cell in row["cells"])
        rows.append({"Examples": row["step"], "Method": row["label"]} | dict(zip(_headings(), texts, strict=True)))
    return pl.DataFrame(rows, schema=dict.fromkeys(("Examples", "Method", *_headings()), pl.String))


def supply_drawings(study: SupplyStudy, directory: Path) -> list[Drawing]:
    """The figures alone, see :func:`perennial.report.supply_figures.draw_supply`.

    Raises:
        NoResultsError: no network has been measured, nor has one lived for a bin.
    """
    return draw_supply(tabulate_supply(study, Path(directory)))


def _headings() -> list[str]:
    return [_with_unit(name) for name in DRAWN]


def _with_unit(name: str, *, change: bool = False) -> str:
    what = QUANTITIES[name]
    unit = ", points" if what.share and (change or what.difference) else ", %" if what.share else ""
    return what.label + unit


def _numbers(tables: SupplyTables, seeds: int) -> list[dict[str, Any]]:
    """A row a time and method: at the start, at the first checkpoint after it, and at the last."""
    frame = tables.over_life
    steps = shown_steps(tables)
    if not steps:  # no method has been measured yet
        steps = sorted(set(frame.filter(pl.col("quantity") == ONLINE).get_column("step")))[-1:]
    rows = []
    for step in dict.fromkeys((0, *steps)):
        for method, label in tables.labels.items():
            if step == 0 and method != FRESH:  # the same
                continue
            here = frame.filter((pl.col("method") == method) & (pl.col("step") == step))
            by_quantity = {row["quantity"]: row for row in here.iter_rows(named=True)}
            if by_quantity:
                cells = [_cell(name, by_quantity.get(name), seeds) for name in DRAWN]
                rows.append({"step": examples(step), "label": label, "cells": cells})
    return rows


def _changes(tables: SupplyTables) -> list[dict[str, Any]]:
    """A row a quantity and first time, a cell a method."""
    rows = []
    for (quantity, since, until), group in tables.changes.group_by("quantity", "since", "until", maintain_order=True):
        by_method = {row["method"]: row for row in group.iter_rows(named=True)}
        methods = [name for name in tables.labels if name != FRESH]
        cells = [_cell(str(quantity), by_method.get(name), None) for name in methods]
        rows.append(
            {
                "label": _with_unit(str(quantity), change=True),
                "when": f"{examples(float(str(since)))} to {examples(float(str(until)))}",
                "methods": [tables.labels[name] for name in methods],
                "cells": cells,
            }
        )
    return rows


def _cell(quantity: str, row: dict[str, Any] | None, seeds: int | None) -> dict[str, Any]:
    if row is None:
        return {"mean": "\N{EN DASH}", "interval": "", "seeds": "", "clear": False, "kind": "none"}
    mean, interval = amount(quantity, row)
    few = "" if seeds is None or row["seeds"] == seeds else f"({row['seeds']} of {seeds})"
    return {"mean": mean, "interval": interval, "seeds": few, "clear": direction(row) != 0, "kind": "number"}


def _matrix(tables: SupplyTables, version: str) -> dict[str, Any] | None:
    """The lower triangle: a row a quantity from the second on, a cell for each before it."""
    here = tables.correlations.filter((pl.col("version") == version) & pl.col("start"))
    pairs = {(row["first"], row["second"]): row for row in here.iter_rows(named=True)}
    if not any(row["spearman"] is not None for row in pairs.values()):
        return None
    rows = []
    for at, second in enumerate(CORRELATED[1:], start=1):
        cells = [_coloured(pairs[first, second], version) for first in CORRELATED[:at]]
        rows.append({"label": QUANTITIES[second].label, "cells": cells, "empty": len(CORRELATED) - 1 - at})
    one = here.row(0, named=True)
    constant = {
        QUANTITIES[name].label: least
        for name in CORRELATED
        if (least := min(row["constant"] for pair, row in pairs.items() if name in pair))
    }
    return {
        "title": _VERSIONS[version],
        "version": version,
        "rows": rows,
        "constant": [f"{label} in {_count(count, 'life', 'lives')}" for label, count in constant.items()],
        "short": one["short"],
        "points": max(row["points"] for row in pairs.values()),
        "lives": max(row["lives"] for row in pairs.values()),
    }


def _coloured(row: dict[str, Any], version: str) -> dict[str, Any]:
    value = row["spearman"]
    interval = "" if row["low"] is None else f"[{coefficient(row['low'])}, {coefficient(row['high'])}]"
    lives = f"{row['lives']} of {row['lives'] + row['constant'] + row['short']} lives"
    return {
        "value": coefficient(value),
        "interval": interval,
        "lives": lives if version == "within" and row["constant"] + row["short"] else "",
        "colour": _colour(value or 0.0),
        "clear": direction(row) != 0,
    }


def _colour(value: float) -> str:
    """Towards blue for a positive correlation and orange for a negative one, from white at 0."""
    end = _POSITIVE if value > 0 else _NEGATIVE
    share = _DEPTH * abs(value)
    return "#" + "".join(f"{round(255 + share * (part - 255)):02x}" for part in end)


def _facts(study: SupplyStudy) -> list[str]:
    life, supply = study.life, study.supply
    training = supply.training
    share = ", ".join(f"{100 * rate:g}%" for rate in dict.fromkeys(supply.pruning.rates.values()))
    return [
        thing(life.stream),
        thing(life.network),
        f"{life.steps:,} examples",
        _count(len(seeds_of(life, "life")), "seed", "seeds"),
        f"next task: {supply.examples:,} images, {training.iterations:,} iterations of {training.batch_size}",
        f"tickets: {_count(supply.rounds, 'round', 'rounds')}, each prunes {share}",
    ]


def _notes(study: SupplyStudy, tables: SupplyTables) -> list[str]:
    """What a reader must know before the figures."""
    notes = []
    seeds = seeds_of(study.life, "life")
    if len(seeds) == 1:
        notes.append("One seed, so no interval can be given, no direction is said, and a difference may be chance.")
    elif len(seeds) < FEW:
        notes.append(f"{len(seeds)} seeds: bootstrap intervals of so few are narrower than they should be.")
    if tables.points.is_empty():
        notes.append("No network has been measured yet; there is the online accuracy alone.")
    lost = [
        f"{tables.labels[row['method']]}, seed {row['seed']}, after {examples(row['step'])}"
        for row in tables.points.iter_rows(named=True)
        if any(row[name] is None for name in DRAWN[1:])
    ]
    if lost:
        notes.append(f"Not a number, and left out of means and correlations: {'; '.join(lost)}.")
    absent = [label for name, label in tables.labels.items() if name not in set(tables.over_life.get_column("method"))]
    if absent:
        notes.append(f"No results yet: {', '.join(absent)}.")
    return notes


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"
