"""The figures of streams of text tasks. What they draw is in the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from perennial.report.figures import LABEL, WIDE, canvas, heading, label_ends
from perennial.report.heat_maps import squares
from perennial.report.lm_tables import TextTables
from perennial.report.looks import KNOWN, OTHERS, Look
from perennial.report.svg import Drawing, drawing_style, render

RATIO_ENDS = (0.5, 1.5)
"""Collision ratios at the ends of the colour map; beyond them only the number differs."""
_FIRST = ("lora", "full", "incremental", "olora", "nlora", "replay")
"""Methods whose accuracy matrices are shown, where the study has them, before others."""
_PALETTE = (*(look for key, look in KNOWN.items() if key != "linear"), *OTHERS)
_ALONE = KNOWN["linear"]


def method_looks(tables: TextTables) -> dict[str, Look]:
    """A look for each method that learns one task after another, the same in every figure: the palette, then the
    palette again with dashed lines, other markers and hollow ones."""
    found = {}
    for at, method in enumerate(_in_turn(tables)["method"]):
        again, place = divmod(at, len(_PALETTE))
        marker = _PALETTE[(place + again * 5) % len(_PALETTE)].marker
        found[method] = Look(_PALETTE[place].colour, (4, 2) if again else (), marker)
    return found


def draw_texts(tables: TextTables, names: Sequence[str]) -> list[Drawing]:
    """The plane, the accuracy matrices, learning along the sequence and collisions, as far as there are any."""
    found = [_plane(tables), _matrices(tables, names), _learning(tables, names), _collisions(tables)]
    return [drawing for drawing in found if drawing is not None]


def _in_turn(tables: TextTables) -> pl.DataFrame:
    return tables.methods.filter(pl.col("forgetting").is_not_null())


def _plane(tables: TextTables) -> Drawing | None:
    rows, looks = _in_turn(tables), method_looks(tables)
    if rows.is_empty():
        return None
    name, title = "plane", "Learning accuracy against forgetting"
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
            axes.plot(x, y, look.marker, color=look.colour, markersize=7, label=row["label"], zorder=3,
                      mfc="white" if look.dash else look.colour, mec=look.colour if look.dash else "white",
                      mew=1.4 if look.dash else 0.6)  # fmt: skip
        alone = tables.methods.filter(pl.col("forgetting").is_null() & pl.col("learning").is_not_null())
        for at, reference in enumerate(alone.iter_rows(named=True)):
            axes.axvline(100 * reference["learning"], color=_ALONE.colour, lw=1, ls=(0, (4 + 4 * at, 3)),
                         label=reference["label"])  # fmt: skip
        axes.set_xlabel("learning accuracy, % (to the right learns more)", fontsize=LABEL)
        axes.set_ylabel("forgetting, points (further down keeps more)", fontsize=LABEL)
        axes.tick_params(labelsize=LABEL)
        figure.legend(*axes.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(0.63, 0.52),
                      frameon=False, fontsize=10, handletextpad=0.6)  # fmt: skip
        heading(figure, title)
        return render(figure, name, title, _said(rows.iter_rows(named=True), ("learning", "forgetting")), 0.62)


def _matrices(tables: TextTables, names: Sequence[str]) -> Drawing | None:
    labels = dict(tables.methods.select("method", "label").iter_rows())
    there = [m for m, a in tables.matrices.items() if np.isfinite(a[-1]).all() and len(a) == len(names)]
    there = sorted(there, key=lambda m: _FIRST.index(m) if m in _FIRST else len(_FIRST))[:6]
    if not there or len(names) < 2:
        return None
    panels = {labels[m]: 100 * tables.matrices[m] for m in there}
    title = "Score on each task (columns) after each task (rows), %"
    return squares("accuracy-matrix", title, panels, names, "Blues", (0.0, 100.0), "{:.0f}".format)


def _collisions(tables: TextTables) -> Drawing | None:
    if not tables.ratios:
        return None
    labels = dict(tables.methods.select("method", "label").iter_rows())
    count = len(next(iter(tables.ratios.values())))
    panels = {labels[m]: ratio for m, ratio in tables.ratios.items()}
    title = "Collisions of every two adapters by what chance gives at their densities (1: nothing is avoided)"
    return squares(
        "collisions", title, panels, [str(i + 1) for i in range(count)], "RdBu_r", RATIO_ENDS, "{:.2f}".format
    )


def _learning(tables: TextTables, names: Sequence[str]) -> Drawing | None:
    looks = method_looks(tables)
    lines = {}
    for method in looks:
        mine = tables.tasks.filter((pl.col("method") == method) & pl.col("against_alone").is_not_null())
        if mine.height:
            lines[method] = mine.sort("position")
    if not lines or len(names) < 2:
        return None
    name, title = "learning", "Score on each task when just learned, less that of a model that learns it alone, points"
    labels = {method: str(line["label"][0]) for method, line in lines.items()}
    with drawing_style(name):
        drawn = canvas(labels.values(), len(lines), (WIDE[0], 430))
        axes = drawn.axes
        axes.axhline(0, color=_ALONE.colour, lw=1)
        ends = []
        for method, line in lines.items():
            look = looks[method]
            x, y = line["position"].to_numpy(), 100 * line["against_alone"].to_numpy()
            axes.plot(x, y, color=look.colour, lw=1.6, ls=(0, look.dash) if look.dash else "solid",
                      marker=look.marker, markersize=5.5, mfc="white" if look.dash else look.colour,
                      mec=look.colour if look.dash else "white", mew=1.2 if look.dash else 0.6)  # fmt: skip
            ends.append((labels[method], look.colour, float(x[-1]), float(y[-1])))
        axes.set_xticks(range(1, len(names) + 1), names, rotation=30, ha="right", rotation_mode="anchor")
        axes.tick_params(labelsize=10)
        axes.margins(x=0.02)
        box = axes.get_position()
        axes.set_position((box.x0, box.y0 + 0.06, box.width, box.height - 0.06))  # for names that are turned
        label_ends(drawn.figure, axes, ends)
        heading(drawn.figure, title)
        compared = (row for row in tables.methods.iter_rows(named=True) if row["method"] in lines)
        return render(drawn.figure, name, title, _said(compared, ("against_alone",)), drawn.plot_share)


def _said(rows: Iterable[Mapping[str, object]], names: Sequence[str]) -> str:
    """The numbers of a figure in words."""
    found = []
    for row in rows:
        values = [f"{n.replace('_', ' ')} {row[n]:.3f}" for n in names if row[n] is not None]
        if values:
            found.append(f"{row['label']}: {', '.join(values)}")
    return "; ".join(found)
