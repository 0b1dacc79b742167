"""Pages made of sections: figures, a table with intervals, notes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup

from perennial.report.svg import FONTS, Drawing
from perennial.report.templates import link, template, write_texts
from perennial.report.words import interval_text, mean_text

_NONE = {"mean": "\N{EN DASH}", "interval": ""}


def cell(row: dict[str, Any], name: str, scale: float) -> dict[str, str]:
    """A value of a row and its interval, ``NAME_low`` to ``NAME_high`` where there is one, as text."""
    if row[name] is None:
        return _NONE
    value, low, high = scale * row[name], row.get(f"{name}_low"), row.get(f"{name}_high")
    low, high = (None if end is None else scale * end for end in (low, high))
    return {"mean": mean_text(value, low, high), "interval": interval_text(value, low, high)}


def printed(rows: pl.DataFrame, columns: dict[str, tuple[str, float]], first: str) -> pl.DataFrame:
    """A table as text: its columns under their headings, the rows' labels under ``first``."""
    found = []
    for row in rows.iter_rows(named=True):
        cells = {title: cell(row, name, scale) for name, (title, scale) in columns.items()}
        found.append({first: row["label"]} | {t: f"{c['mean']} {c['interval']}".strip() for t, c in cells.items()})
    return pl.DataFrame(found)


def section(
    title: str,
    figures: Sequence[str],
    notes: Sequence[str],
    rows: pl.DataFrame | None = None,
    columns: dict[str, tuple[str, float]] | None = None,
    *,
    seconds: bool = False,
    weights: bool = False,
) -> dict[str, Any]:
    """A section of a page.

    Args:
        title: its heading.
        figures: names of drawings; those that were not drawn are left out.
        notes: paragraphs below.
        rows: of its table, with ``label``.
        columns: of the table: name -> heading and factor.
        seconds: add the column ``seconds``, of a step.
        weights: add the column ``trained``, a count of weights, with their ``share``.
    """
    body, heads = [], [title for title, _ in (columns or {}).values()]
    heads += ["Seconds a step"] if seconds else ["Weights"] if weights else []
    for row in rows.iter_rows(named=True) if rows is not None else ():
        cells = [cell(row, name, scale) for name, (_, scale) in (columns or {}).items()]
        if seconds:
            cells.append({"mean": f"{row['seconds']:.3g}", "interval": ""})
        elif weights:
            share = "" if row["share"] is None else f"{100 * row['share']:.3g}%"
            cells.append({"mean": f"{row['trained']:,}", "interval": share})
        body.append({"label": row["label"], "cells": cells})
    return {"title": title, "figures": figures, "notes": notes, "heads": heads, "rows": body, "key": []}


def write_page(
    directory: Path,
    facts: Sequence[str],
    notes: Sequence[str],
    sections: Sequence[dict[str, Any]],
    drawings: Sequence[Drawing],
    frames: dict[str, pl.DataFrame],
    progress: tuple[int, int],
    about: dict[str, str],
) -> Path:
    """Write ``report.html``, ``figures/*.svg`` and ``tables/*.csv`` into a run directory; the page's path.

    Args:
        directory: of the run.
        facts: short, in one line.
        notes: what is to be known of the whole run.
        sections: made by :func:`section`.
        drawings: whatever sections name.
        frames: tables to be downloaded.
        progress: runs that have finished, and runs in all.
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
        notes=notes,
        sections=sections,
        drawn={d.name: Markup(d.svg) for d in drawings},
        finished=progress[0],
        planned=progress[1],
        links=[{"name": name, "href": link(text, "text/csv")} for name, text in texts.items()],
    )
    write_texts(directory / "figures", {f"{drawing.name}.svg": drawing.svg for drawing in drawings})
    write_texts(directory / "tables", texts)
    write_texts(directory, {"report.html": page + "\n"})
    return directory / "report.html"
