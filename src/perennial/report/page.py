"""One self-contained page of a run directory."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup

from perennial.report.figures import choice_figure, curve_figure, sensitivity_figure
from perennial.report.load import Method, Part, Run, load
from perennial.report.looks import Look, looks
from perennial.report.main_figure import draw_main, tabulate_main
from perennial.report.series import measure
from perennial.report.svg import FONTS, Drawing
from perennial.report.tables import QUANTITIES, TOGETHER, Tables, method_of, tabulate
from perennial.report.templates import link, template, write_texts
from perennial.report.words import cost, facts, quantity, readable, so_far
from perennial.statistics import LEVEL, RESAMPLES

SHOWN = 3
"""Settings of a gridded method in the table on the page; the CSV has them all."""

FEW = 5
"""Seeds below which the page warns of intervals that are too narrow."""


@dataclass(frozen=True)
class _Chapter:
    part: Part
    tables: Tables
    slug: str  # begins the ids and file names of the part


def write_report(directory: Path) -> Path:
    """Write ``report.html``, ``figures/*.svg`` and ``tables/*.csv`` into a run directory.

    The page stands alone: figures and tables are inside it, and it loads nothing. The same results give the same bytes.
    A run that has not finished is reported as far as it has come.

    Args:
        directory: made by ``perennial run``.

    Returns:
        The path of ``report.html``.

    Raises:
        NotARunDirectoryError: the directory holds no run.
        NoResultsError: the run has no results yet.
    """
    directory = Path(directory)
    run = load(directory)
    look = looks(run.parts)
    shown = []
    chapters = _chapters(run)
    main = tabulate_main(run, {chapter.part.key: chapter.tables for chapter in chapters})
    drawn = draw_main(run, main, look)
    numbers = main.write_csv()
    if drawn is not None:
        write_texts(directory / "figures", {f"{drawn.name}.svg": drawn.svg})
        write_texts(directory / "tables", {f"{drawn.name}.csv": numbers})
    for chapter in chapters:
        drawings = _drawings(chapter, look)
        frames = _frames(chapter)
        write_texts(directory / "figures", {f"{drawing.name}.svg": drawing.svg for drawing in drawings.values()})
        write_texts(directory / "tables", frames)
        shown.append(_context(run, chapter, drawings, frames, look))
    page = template("template.html.j2").render(
        run=run,
        paragraphs=[p for p in re.split(r"\n\s*\n", run.description.strip()) if p],
        parts=shown,
        figure=drawn and {"svg": Markup(drawn.svg), "plot_share": drawn.plot_share},
        figure_link=drawn and {"name": f"{drawn.name}.csv", "href": link(numbers, "text/csv")},
        intervals=main.get_column("low").is_not_null().any(),
        fonts=Markup(FONTS),
        level=f"{100 * LEVEL:g}%",
        resamples=RESAMPLES,
        together=TOGETHER,
        study_link=link(run.study_text, "text/yaml"),
    )
    write_texts(directory, {"report.html": page + "\n"})
    return directory / "report.html"


def summary_table(directory: Path) -> pl.DataFrame:
    """The table on the page as text, all parts below each other, to print.

    One row a method and setting, best first, at most three settings a method. Columns: ``Part`` (where there are
    several), ``Method``, ``Settings`` (where there is a grid), ``First`` and ``Last`` (mean over the first and the last
    bin), ``Average`` and ``Loss of plasticity``, each as ``mean [low, high]`` with accuracy in percent, ``Cost of a
    step`` (where it was timed) and ``Diverged`` (lanes). As numbers: :func:`summary_numbers`.

    Raises:
        NotARunDirectoryError: the directory holds no run.
        NoResultsError: the run has no results yet.
    """
    run = load(Path(directory))
    chapters = _chapters(run)
    rows = []
    for chapter in chapters:
        for row in _on_page(chapter.tables.summary).iter_rows(named=True):
            cells = (quantity(row, name) for name in QUANTITIES)
            texts = [f"{cell['mean']}{cell['unit']} {cell['interval']}".strip() for cell in cells]
            named = dict(zip(("First", "Last", "Average", "Loss of plasticity"), texts, strict=True))
            rows.append(
                {"Part": chapter.part.title, "Method": row["label"], "Settings": readable(row["settings"])}
                | named
                | {"Cost of a step": cost(row), "Diverged": f"{row['diverged']} of {row['lanes']}"}
            )
    table = pl.DataFrame(rows)
    empty = {
        "Part": len(chapters) == 1,
        "Settings": (table.get_column("Settings") == "").all(),
        "Cost of a step": not run.timings,
    }
    return table.drop(name for name, needless in empty.items() if needless)


def summary_numbers(directory: Path) -> pl.DataFrame:
    """Every method and setting of every part, best setting first, as the ``-summary.csv`` files have them.

    Columns: ``part``, ``method``, ``label``, ``settings``, ``rank`` of the setting within its method (1 is best),
    ``settings_tried``, ``metric``, ``lanes``, ``diverged`` (lanes), ``steps`` (that every method has made),
    ``first_steps`` and ``last_steps`` (length of the first and the last bin); ``first``, ``last``, ``average`` and
    ``loss_of_plasticity``, each with the ends of its interval as ``_low`` and ``_high``, in the metric's unit (shares
    in [0, 1]), null where there is none; ``seconds_per_step`` of one lane, and ``relative_cost`` to plain SGD.

    Raises:
        NotARunDirectoryError: the directory holds no run.
        NoResultsError: the run has no results yet.
    """
    return pl.concat([chapter.tables.summary for chapter in _chapters(load(Path(directory)))])


def _on_page(summary: pl.DataFrame) -> pl.DataFrame:
    return summary.filter(pl.col("rank") <= SHOWN)


def _chapters(run: Run) -> list[_Chapter]:
    chapters: list[_Chapter] = []
    for part in run.parts:
        slug = _slug(part.key) or "part"
        while slug in {chapter.slug for chapter in chapters}:
            slug += "-again"
        chapters.append(_Chapter(part, tabulate(run, part), slug))
    return chapters


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _drawings(chapter: _Chapter, look: dict[str, Look]) -> dict[str, Drawing]:
    """Figures by what they show: ``curves``, ``every `` setting of a method, ``of `` a diagnostic, ``by `` a number."""
    part, tables = chapter.part, chapter.tables
    made: dict[str, Drawing | None] = {
        "curves": curve_figure(
            f"{chapter.slug}-learning-curves", f"Learning curves: {part.title}", part, tables.curves, look, wide=True
        )
    }
    for key in tables.settings.get_column("method").unique(maintain_order=True):
        made[f"every {key}"] = _every_setting(chapter, key)
    for metric in tables.diagnostics.get_column("metric").unique(maintain_order=True):
        frame = tables.diagnostics.filter(pl.col("metric") == metric)
        name = f"{chapter.slug}-{_slug(metric)}"
        made[f"of {metric}"] = curve_figure(
            name, f"{measure(metric).label}: {part.title}", part, frame, look, wide=False
        )
    for swept in tables.sensitivity.get_column("number").unique(maintain_order=True):
        frame = tables.sensitivity.filter(pl.col("number") == swept)
        name = f"{chapter.slug}-by-{_slug(swept)}"
        made[f"by {swept}"] = sensitivity_figure(name, f"{swept}: {part.title}", part, frame, tables.metric, look)
    for chosen in tables.choices.get_column("choice").unique(maintain_order=True):
        frame = tables.choices.filter(pl.col("choice") == chosen)
        name = f"{chapter.slug}-by-{_slug(chosen)}"
        made[f"by {chosen}"] = choice_figure(name, f"{chosen}: {part.title}", part, frame, tables.metric, look)
    return {key: drawing for key, drawing in made.items() if drawing is not None}


def _every_setting(chapter: _Chapter, key: str) -> Drawing | None:
    """The learning curves of all settings of a method, beside the best of the reference lines."""
    part, tables = chapter.part, chapter.tables
    method = method_of(part, key)
    mine = tables.settings.filter(pl.col("method") == key)
    lines = [
        Method(settings, readable(settings), False, False) for settings in mine["settings"].unique(maintain_order=True)
    ]
    references = [other for other in part.methods if other.linear and not method.linear]
    every = replace(part, methods=(*lines, *references))
    named = mine.with_columns(method=pl.col("settings"))
    beside = tables.curves.filter(pl.col("method").is_in([other.key for other in references]))
    name = f"{chapter.slug}-every-{_slug(key)}"
    title = f"{method.label}, every setting: {part.title}"
    look = looks([every])
    drawn = curve_figure(name, title, every, pl.concat([named, beside]), look, wide=False, told=method.label)
    # The key on the page has no entry for a setting, so a narrow screen must not cut the names of the lines off.
    return drawn and replace(drawn, plot_share=1.0)


def _frames(chapter: _Chapter) -> dict[str, str]:
    """CSV texts by file name."""
    tables = chapter.tables
    named = {
        "summary": tables.summary,
        "learning-curves": tables.curves,
        "diagnostics": tables.diagnostics,
        "every-setting": tables.settings,
        "sensitivity": tables.sensitivity,
        "choices": tables.choices,
    }
    return {f"{chapter.slug}-{name}.csv": frame.write_csv() for name, frame in named.items() if not frame.is_empty()}


def _context(
    run: Run, chapter: _Chapter, drawings: dict[str, Drawing], frames: dict[str, str], look: dict[str, Look]
) -> dict[str, Any]:
    part, tables = chapter.part, chapter.tables
    main = measure(tables.metric)
    rows = list(_on_page(tables.summary).iter_rows(named=True))
    first = rows[0] if rows else {"first_steps": 0, "last_steps": 0, "steps": 0}
    return {
        "slug": chapter.slug,
        "title": part.title,
        "facts": facts(part),
        "counted": part.counted,
        "axis": so_far(part),
        "notes": _notes(run, chapter),
        "key": [_key_entry(row, part, look) for row in rows if row["rank"] == 1],
        "curves": _figures(drawings, "curves"),
        "diagnostics": _figures(drawings, "of "),
        "every": _figures(drawings, "every "),
        "sensitivity": _figures(drawings, "by "),
        "metric": main.label.lower(),
        "share": main.share,
        "higher_is_better": main.higher_is_better,
        "bin": first["first_steps"],
        "last_bin": first["last_steps"],
        "steps": first["steps"],
        "two_bins": first["steps"] > first["first_steps"],
        "rows": [_table_row(row) for row in rows],
        "hidden": tables.summary.height - len(rows),
        "gridded": any(row["settings_tried"] > 1 for row in rows),
        "diverged": bool(tables.summary.get_column("diverged").sum()),
        "intervals": bool((tables.summary.get_column("lanes") > 1).any()),
        "relative": any(row["relative_cost"] is not None for row in rows),
        "timed": any(row["seconds_per_step"] is not None for row in rows),
        "links": [{"name": name, "href": link(text, "text/csv")} for name, text in frames.items()],
    }


def _figures(drawings: dict[str, Drawing], kind: str) -> list[dict[str, Any]]:
    found = [drawing for key, drawing in drawings.items() if key.startswith(kind)]
    return [{"svg": Markup(drawing.svg), "plot_share": drawing.plot_share} for drawing in found]


def _key_entry(row: dict[str, Any], part: Part, look: dict[str, Look]) -> dict[str, Any]:
    mine = look[row["method"]]
    best = ""
    if row["settings"]:
        best = readable(row["settings"])
        if row["settings_tried"] > 1:
            best = f"best of {row['settings_tried']}: {best}"
    if method_of(part, row["method"]).linear:
        best = ", ".join(filter(None, ["reference line", best]))
    return {"look": mine, "dash": " ".join(map(str, mine.dash)), "label": row["label"], "best": best}


def _table_row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "label": row["label"],
        "settings": readable(row["settings"]),
        "rank": row["rank"],
        "cells": [quantity(row, name) for name in QUANTITIES],
        "cost": cost(row),
        "lanes": row["lanes"],
        "diverged": row["diverged"],
    }


def _notes(run: Run, chapter: _Chapter) -> list[str]:
    """What a reader must know before the figures."""
    summary, part = chapter.tables.summary, chapter.part
    if summary.is_empty():
        return ["This part has no results yet."]
    notes = []
    absent = [method.label for method in part.methods if method.key not in set(summary.get_column("method"))]
    if absent:
        notes.append(f"No results yet: {', '.join(absent)}.")
    steps = summary.row(0, named=True)["steps"]
    if steps < part.steps and not run.finished:
        notes.append(f"The table compares the methods over the {steps:,} {part.counted} that all of its lanes made.")
    lone = summary.filter(pl.col("lanes") == 1).get_column("label").unique(maintain_order=True).to_list()
    if lone:
        who = "Every method" if len(lone) == summary.get_column("label").n_unique() else ", ".join(lone)
        notes.append(f"{who}: one seed, so no interval can be given, and a difference may be chance.")
    few = summary.get_column("lanes").to_list()
    if 1 < min(few) < FEW:
        notes.append(f"{min(few)} seeds: bootstrap intervals of so few are narrower than they should be.")
    gone = summary.filter((pl.col("diverged") == pl.col("lanes")) & (pl.col("rank") == 1)).get_column("label").to_list()
    if gone:
        notes.append(f"All lanes diverged: {', '.join(gone)}. The curves end where the last of them did.")
    return notes
