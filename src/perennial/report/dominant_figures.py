"""The figures of a search for dominant tickets. What they draw is in the tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import polars as pl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from perennial.report.figures import LABEL, WIDE, heading
from perennial.report.heat_maps import by_layer
from perennial.report.lm_tables import DominantTables
from perennial.report.looks import KNOWN, OTHERS
from perennial.report.svg import Drawing, drawing_style, render
from perennial.report.words import examples

_KINDS = {
    "ticket": ("Ticket of this task", KNOWN["continual_backprop"]),
    "moved": ("Ticket of another task", KNOWN["upgd"]),
    "random": ("Random places", KNOWN["adam"]),
    "magnitude": ("Largest weights", KNOWN["l2"]),
    "lora": ("LoRA", KNOWN["shrink_and_perturb"]),
    "full": ("All weights", KNOWN["backprop"]),
    "bitfit": ("All biases", OTHERS[0]),
    "head": ("Classifier alone", KNOWN["linear"]),
}
"""How a ticket and its controls are called and drawn."""


_FILLS: dict[str, Literal["full", "top", "left"]] = {"": "full", "rows": "top", "columns": "left"}
"""Markers of single weights, and of those that are chosen by whole rows or columns."""


def kind_of(row: Mapping[str, Any]) -> str:
    """What a row of scores is, a key of the kinds: a ticket of another task is another kind."""
    return "moved" if row["kind"] == "ticket" and row["source"] != row["task"] else str(row["kind"])


def kind_name(kind: str) -> str:
    """For readers."""
    return _KINDS[kind][0] if kind in _KINDS else {"find": "All matrices, pulled to their start"}.get(kind, kind)


def draw_dominant(tables: DominantTables) -> list[Drawing]:
    """Scores, overlaps and what moved, as far as there are any."""
    found = [_scores(tables), _by_count(tables), _overlap(tables), _moved(tables)]
    return [drawing for drawing in found if drawing is not None]


def _scores(tables: DominantTables) -> Drawing | None:
    rows = tables.scores.filter((pl.col("kind") != "find") & pl.col("score").is_not_null())
    if rows.is_empty():
        return None
    name, title = "scores", "Score by what is trained, mean and interval over seeds"
    tasks = rows["task"].unique(maintain_order=True).to_list()
    with drawing_style(name):
        most = max(rows.filter(pl.col("task") == t).height for t in tasks)
        height = 26 + len(tasks) * (24 * most + 54)
        figure = Figure(figsize=(WIDE[0] / 72, height / 72), facecolor="white")
        for at, task in enumerate(tasks):
            mine = rows.filter(pl.col("task") == task).sort("score")
            tall = 24 * mine.height
            top = 56 + at * (24 * most + 54)
            axes = figure.add_axes((0.4, 1 - (top + tall) / height, 0.56, tall / height))
            axes.grid(True, axis="x")
            axes.grid(False, axis="y")
            for y, row in enumerate(mine.iter_rows(named=True)):
                look = _KINDS[kind_of(row)][1]
                if row["score_low"] is not None:
                    axes.plot([row["score_low"], row["score_high"]], [y, y], color=look.colour, lw=2, alpha=0.6)
                axes.plot(row["score"], y, look.marker or "o", color=look.colour, markersize=7)
            names = [
                f"{kind_name(kind_of(r))}{', ' + r['selection'] if r['selection'] else ''} ({r['trained']:,})"
                for r in mine.iter_rows(named=True)
            ]
            axes.set_yticks(range(mine.height), names)
            axes.set_ylim(-0.6, mine.height - 0.4)
            axes.tick_params(labelsize=10)
            axes.set_title(task, fontsize=LABEL, loc="left", color="#2b2b2b")
        heading(figure, title)
        shown = "; ".join(f"{r['task']}, {kind_name(kind_of(r))}: {r['score']:.3f}" for r in rows.iter_rows(named=True))
        return render(figure, name, title, shown, 1.0)


def _by_count(tables: DominantTables) -> Drawing | None:
    """Curves, where more than one selection makes them."""
    rows = tables.scores.filter((pl.col("kind") != "find") & pl.col("score").is_not_null())
    chosen = rows.filter((pl.col("selection") != "") & (pl.col("trained") > 0))  # the axis is logarithmic
    if chosen["selection"].n_unique() < 2:
        return None
    name, title = "scores-by-count", "Score against the number of weights that are trained"
    tasks = rows["task"].unique(maintain_order=True).to_list()
    counts = chosen["trained"].to_numpy()
    marks = (1.0, 3.0) if counts.max() > 30 * counts.min() else (1.0, 2.0, 5.0)  # as many as have room
    width, tall, foot = (WIDE[0] - 60) / 2, 250.0, 50.0
    down = (len(tasks) + 1) // 2
    height = 44 + down * (tall + 48) + foot
    handles: dict[str, Any] = {}
    with drawing_style(name):
        figure = Figure(figsize=(WIDE[0] / 72, height / 72), facecolor="white")
        for at, task in enumerate(tasks):
            left, top = 60 + (at % 2) * width, 44 + (at // 2) * (tall + 48) + 18
            box = (left / WIDE[0], 1 - (top + tall) / height, (width - 50) / WIDE[0], tall / height)
            axes = figure.add_axes(box)
            axes.set_xscale("log")
            mine = rows.filter(pl.col("task") == task)
            for row in mine.filter(pl.col("selection") == "").iter_rows(named=True):
                label, look = _KINDS[row["kind"]]
                dash: Any = (0, look.dash) if look.dash else "solid"
                handles.setdefault(label, axes.axhline(row["score"], color=look.colour, lw=1.1, ls=dash))
            curves = chosen.filter(pl.col("task") == task)
            parts = curves.group_by("kind", "source", "whole", maintain_order=True)
            groups = [group.sort("trained") for _, group in parts]
            for number, curve in enumerate(groups):
                label, look = _KINDS[kind_of(curve.row(0, named=True))]
                x = curve["trained"].to_numpy() * 10 ** (0.012 * (number - (len(groups) - 1) / 2))
                if curve["score_low"].null_count() < curve.height:
                    low, high = (curve[f"score_{end}"].to_numpy().astype(float) for end in ("low", "high"))
                    axes.vlines(x, low, high, color=look.colour, lw=1, alpha=0.5)
                whole = curve["whole"][0]
                kind: dict[str, Any] = {"color": look.colour, "marker": look.marker, "lw": 1.7, "markersize": 6}
                axes.plot(x, curve["score"].to_numpy(), fillstyle=_FILLS[whole], mew=0.6,
                          mec=look.colour if whole else "white", **kind)  # fmt: skip
                handles.setdefault(label, Line2D([], [], mec="white", mew=0.6, **kind))
                if whole:
                    shape = Line2D([], [], color="#6b6b6b", marker="o", ls="", markersize=6, fillstyle=_FILLS[whole])
                    handles.setdefault(f"Whole {whole}", shape)
            axes.xaxis.set_major_locator(LogLocator(10, subs=marks, numticks=12))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: examples(value)))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(labelsize=10)
            axes.set_title(task, fontsize=LABEL, loc="left", color="#2b2b2b")
        figure.legend(handles.values(), handles.keys(), loc="lower left", bbox_to_anchor=(40 / WIDE[0], 0.0), ncols=4,
                      frameon=False, fontsize=10)  # fmt: skip
        heading(figure, title)
        said = "; ".join(
            f"{r['task']}, {kind_name(kind_of(r))}, {r['selection']}: {r['score']:.3f}"
            for r in chosen.iter_rows(named=True)
        )
        return render(figure, name, title, said, 1.0)


def _overlap(tables: DominantTables) -> Drawing | None:
    if tables.overlap.is_empty():
        return None
    rows = tables.overlap.filter((pl.col("relation") == "other task") & (pl.col("matrix") != ""))
    panels = {
        f"Ticket of {selection}": {
            r["matrix"]: r["iou"] / r["floor"] if r["floor"] and r["iou"] is not None else float("nan")
            for r in mine.iter_rows(named=True)
        }
        for (selection,), mine in rows.group_by("selection", maintain_order=True)
    }
    title = "Overlap of the tickets of two tasks by what chance gives, by matrix"
    return by_layer("overlap", title, panels, _ratio_text, ratios=True) if panels else None


def _ratio_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 9.95 or value == 0 else f"{value:.1f}"


def _moved(tables: DominantTables) -> Drawing | None:
    if tables.kept.is_empty():
        return None
    means = tables.kept.group_by("matrix", maintain_order=True).agg(pl.col("moved", "share").mean())
    if means["share"].null_count():
        values = {r["matrix"]: r["moved"] / 1000 for r in means.iter_rows(named=True)}
        return by_layer("moved", "Weights of each matrix that did not come back to their start, thousands",
                        {"": values}, "{:.1f}".format)  # fmt: skip
    values = {r["matrix"]: 100 * r["share"] for r in means.iter_rows(named=True)}
    return by_layer(
        "moved", "Share of each matrix that did not come back to its start, %", {"": values}, "{:.1f}".format
    )
