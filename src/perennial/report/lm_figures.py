"""The figures of language-model studies. What they draw is in the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from perennial.report.figures import LABEL, WIDE, heading
from perennial.report.lm_tables import DominantTables, TextTables
from perennial.report.looks import KNOWN, OTHERS, Look
from perennial.report.svg import Drawing, drawing_style, render
from perennial.statistics import Floats

_SMALL = 9.0
"""Points of the numbers in heat maps."""
_FIRST = ("full", "lora", "incremental", "olora", "nlora", "replay")
"""Methods whose accuracy matrices are shown, where the study has them, before others."""
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


def kind_of(row: Mapping[str, Any]) -> str:
    """What a row of scores is, a key of the kinds: a ticket of another task is another kind."""
    return "moved" if row["kind"] == "ticket" and row["source"] != row["task"] else str(row["kind"])


def kind_name(kind: str) -> str:
    """For readers."""
    return _KINDS[kind][0] if kind in _KINDS else {"find": "All matrices, pulled to their start"}.get(kind, kind)


def draw_texts(tables: TextTables, names: Sequence[str]) -> list[Drawing]:
    """The plane, the accuracy matrices, learning along the sequence and collisions, as far as there are any."""
    found = [_plane(tables), _matrices(tables, names), _learning(tables), _collisions(tables)]
    return [drawing for drawing in found if drawing is not None]


def _method_looks(methods: Sequence[str]) -> dict[str, Look]:
    palette = [*KNOWN.values(), *OTHERS]
    markers = "os^vDP<>"
    return {
        m: Look(palette[at % len(palette)].colour, (), markers[(at // len(palette) + at) % len(markers)])
        for at, m in enumerate(methods)
    }


def _plane(tables: TextTables) -> Drawing | None:
    rows = tables.methods.filter(pl.col("forgetting").is_not_null())
    if rows.is_empty():
        return None
    name, title = "plane", "Learning accuracy against forgetting: to the right learns more, further down keeps more"
    looks = _method_looks(rows["method"].to_list())
    with drawing_style(name):
        figure = Figure(figsize=(WIDE[0] / 72, max(400, 110 + 17 * rows.height) / 72), facecolor="white")
        axes = figure.add_axes((0.09, 0.13, 0.52, 0.76))
        axes.grid(True, axis="both")
        for row in rows.iter_rows(named=True):
            look = looks[row["method"]]
            x, y = 100 * row["learning"], 100 * row["forgetting"]
            if row["learning_low"] is not None:
                span = [[x - 100 * row["learning_low"]], [100 * row["learning_high"] - x]]
                rise = [[y - 100 * row["forgetting_low"]], [100 * row["forgetting_high"] - y]]
                axes.errorbar(x, y, yerr=rise, xerr=span, fmt="none", ecolor=look.colour, elinewidth=0.8, alpha=0.5)
            axes.plot(x, y, look.marker, color=look.colour, markersize=7, mec="white", mew=0.6, label=row["label"])
        for reference in tables.methods.filter(
            pl.col("forgetting").is_null() & pl.col("learning").is_not_null()
        ).iter_rows(named=True):
            axes.axvline(100 * reference["learning"], color="#767676", lw=1, ls=(0, (4, 3)), label=reference["label"])
        axes.set_xlabel("learning accuracy, %", fontsize=LABEL)
        axes.set_ylabel("forgetting, points", fontsize=LABEL)
        axes.tick_params(labelsize=LABEL)
        figure.legend(*axes.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(0.63, 0.52),
                      frameon=False, fontsize=10, handletextpad=0.6)  # fmt: skip
        heading(figure, title)
        return render(figure, name, title, _said(rows, ("learning", "forgetting")), 0.62)


def _matrices(tables: TextTables, names: Sequence[str]) -> Drawing | None:
    labels = dict(tables.methods.select("method", "label").iter_rows())
    there = [m for m, a in tables.matrices.items() if np.isfinite(a[-1]).all() and len(a) == len(names)]
    there = sorted(there, key=lambda m: _FIRST.index(m) if m in _FIRST else len(_FIRST))[:6]
    if not there or len(names) < 2:
        return None
    panels = {labels[m]: 100 * tables.matrices[m] for m in there}
    title = "Score on each task (columns) after each task (rows), %"
    return _heat("accuracy-matrix", title, panels, names, "Blues", (0.0, 100.0), "{:.0f}")


def _collisions(tables: TextTables) -> Drawing | None:
    if not tables.ratios:
        return None
    labels = dict(tables.methods.select("method", "label").iter_rows())
    count = len(next(iter(tables.ratios.values())))
    panels = {labels[m]: ratio for m, ratio in tables.ratios.items()}
    title = "Collisions of every two adapters by what chance gives at their densities (1: nothing is avoided)"
    return _heat("collisions", title, panels, [str(i + 1) for i in range(count)], "RdBu_r", (0.5, 1.5), "{:.2f}")


def _heat(
    name: str,
    title: str,
    panels: Mapping[str, Floats],
    names: Sequence[str],
    colours: str,
    limits: tuple[float, float],
    form: str,
) -> Drawing:
    """Small multiples of square heat maps with the numbers written in."""
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    side = (WIDE[0] - 70) / 3 - 28
    long = max(map(len, names)) > 2
    width, height = 70 + across * (side + 28), 44 + down * (side + (64 if long else 44))
    with drawing_style(name):
        figure = Figure(figsize=(WIDE[0] / 72, height / 72), facecolor="white")
        for at, (label, values) in enumerate(panels.items()):
            left = 60 + (at % across) * (side + 28)
            top = 44 + (at // across) * (side + (64 if long else 44)) + 18
            axes = figure.add_axes((left / WIDE[0], 1 - (top + side) / height, side / WIDE[0], side / height))
            axes.grid(False)
            axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=limits[0], vmax=limits[1])
            for (row, column), value in np.ndenumerate(values):
                if np.isfinite(value):
                    dark = abs((value - limits[0]) / (limits[1] - limits[0]) - (0.5 if colours != "Blues" else 0)) > (
                        0.35 if colours != "Blues" else 0.6
                    )
                    axes.text(column, row, form.format(value), ha="center", va="center",
                              fontsize=min(_SMALL, 60 / len(names)), color="white" if dark else "#2b2b2b")  # fmt: skip
            axes.set_xticks(range(len(names)), names, rotation=45 if long else 0, ha="right" if long else "center")
            axes.set_yticks(range(len(names)), names if at % across == 0 else [""] * len(names))
            axes.tick_params(labelsize=_SMALL, length=0)
            axes.set_title(label, fontsize=10, loc="left", color="#2b2b2b")
            for spine in axes.spines.values():
                spine.set_visible(False)
        heading(figure, title)
        shown = "; ".join(f"{label}: {np.nanmean(v):.3g} in the mean" for label, v in panels.items())
        return render(figure, name, title, shown, width / WIDE[0])


def _learning(tables: TextTables) -> Drawing | None:
    rows = tables.tasks.filter(pl.col("against_alone").is_not_null()) if not tables.tasks.is_empty() else tables.tasks
    shown = list(dict.fromkeys(rows["method"].to_list() if not rows.is_empty() else []))
    alone = {m for m in shown if rows.filter(pl.col("method") == m)["against_alone"].abs().max() == 0}
    shown = [m for m in shown if m not in alone]
    if not shown:
        return None
    name, title = "learning", "Score on each task when just learned, less that of a model that learns it alone, points"
    looks = _method_looks(tables.methods["method"].to_list())
    with drawing_style(name):
        figure = Figure(figsize=(WIDE[0] / 72, max(380, 90 + 17 * len(shown)) / 72), facecolor="white")
        axes = figure.add_axes((0.09, 0.16, 0.52, 0.73))
        axes.axhline(0, color="#767676", lw=1)
        for method in shown:
            mine = rows.filter(pl.col("method") == method).sort("position")
            axes.plot(mine["position"], 100 * mine["against_alone"], color=looks[method].colour, lw=1.5,
                      marker=looks[method].marker, markersize=5, mec="white", mew=0.5,
                      label=mine["label"][0])  # fmt: skip
        tasks = rows.unique("position").sort("position")
        axes.set_xticks(tasks["position"].to_list(), tasks["task"].to_list(), rotation=30, ha="right")
        axes.tick_params(labelsize=10)
        figure.legend(*axes.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(0.63, 0.52),
                      frameon=False, fontsize=10)  # fmt: skip
        heading(figure, title)
        return render(figure, name, title, _said(tables.methods, ("against_alone",)), 0.62)


def draw_dominant(tables: DominantTables) -> list[Drawing]:
    """Scores and overlaps, as far as there are any."""
    found = [_scores(tables), _overlap(tables), _moved(tables)]
    return [drawing for drawing in found if drawing is not None]


def _scores(tables: DominantTables) -> Drawing | None:
    rows = tables.scores.filter((pl.col("kind") != "find") & pl.col("score").is_not_null())
    if rows.is_empty():
        return None
    name, title = "scores", "Score by what is trained, mean and interval over seeds"
    tasks = rows["task"].unique(maintain_order=True).to_list()
    with drawing_style(name):
        most = max(rows.filter(pl.col("task") == t).height for t in tasks)
        height = 70 + len(tasks) * (24 * most + 54)
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


def _overlap(tables: DominantTables) -> Drawing | None:
    if tables.overlap.is_empty():
        return None
    rows = tables.overlap.filter((pl.col("relation") == "other task") & (pl.col("matrix") != ""))
    if rows.is_empty():
        return None
    first = rows["selection"][0]
    there = rows.filter((pl.col("selection") == first) & (pl.col("floor") > 0) & pl.col("iou").is_not_null())
    if there.is_empty():
        return None
    values = {r["matrix"]: r["iou"] / r["floor"] for r in there.iter_rows(named=True)}
    title = f"Overlap of the tickets of two tasks by what chance gives, by matrix ({first})"
    return _by_matrix("overlap", title, values, "{:.0f}")


def _moved(tables: DominantTables) -> Drawing | None:
    if tables.kept.is_empty():
        return None
    means = tables.kept.group_by("matrix", maintain_order=True).agg(pl.col("moved").mean())
    title = "Weights of each matrix that did not come back to their start, thousands"
    return _by_matrix("moved", title, {m: v / 1000 for m, v in means.iter_rows()}, "{:.1f}")


def _by_matrix(name: str, title: str, values: Mapping[str, float], form: str) -> Drawing | None:
    """A heat map with a row a layer and a column a kind of matrix."""
    places = {matrix: _place(matrix) for matrix in values}
    layers = sorted({layer for layer, _ in places.values()})
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    grid = np.full((len(layers), len(kinds)), np.nan)
    for matrix, value in values.items():
        layer, kind = places[matrix]
        grid[layers.index(layer), kinds.index(kind)] = value
    with drawing_style(name):
        height = 120 + 26 * len(layers)
        figure = Figure(figsize=(WIDE[0] / 72, height / 72), facecolor="white")
        axes = figure.add_axes((0.1, 70 / height, 0.86, 26 * len(layers) / height))
        axes.grid(False)
        axes.imshow(np.ma.masked_invalid(grid), cmap="Blues", aspect="auto", vmin=0, vmax=float(np.nanmax(grid)) * 1.3)
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                dark = value > 0.8 * float(np.nanmax(grid))
                axes.text(column, row, form.format(value), ha="center", va="center", fontsize=_SMALL,
                          color="white" if dark else "#2b2b2b")  # fmt: skip
        axes.set_yticks(range(len(layers)), [f"layer {i + 1}" if i >= 0 else "others" for i in layers])
        axes.set_xticks(range(len(kinds)), kinds, rotation=20, ha="right")
        axes.tick_params(labelsize=_SMALL, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        heading(figure, title)
        shown = f"From {np.nanmin(grid):.3g} to {np.nanmax(grid):.3g}, in the mean {np.nanmean(grid):.3g}"
        return render(figure, name, title, shown, 1.0)


def _place(matrix: str) -> tuple[int, str]:
    """The layer, -1 for none, and the kind of a matrix, by its qualified name."""
    parts = matrix.removesuffix(".weight").split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return -1, " ".join(parts[-2:])
    inner = [p for p in parts[at + 1 :] if p not in ("self", "dense", "layer") and not p.isdigit()]
    return int(parts[at]), " ".join(inner)


def _said(rows: pl.DataFrame, names: Sequence[str]) -> str:
    """The numbers of a figure in words."""
    found = []
    for row in rows.iter_rows(named=True):
        values = [f"{n.replace('_', ' ')} {row[n]:.3f}" for n in names if row[n] is not None]
        if values:
            found.append(f"{row['label']}: {', '.join(values)}")
    return "; ".join(found)
