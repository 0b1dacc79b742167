"""The figures of a study of arriving classes: the paper's panels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from perennial.report.figures import LABEL, WIDE, canvas, heading, label_ends
from perennial.report.incremental_tables import AGAINST, ArrivingTables
from perennial.report.looks import KNOWN, Look, other
from perennial.report.svg import Drawing, drawing_style, render

_RETRAINED = Look(KNOWN["linear"].colour, KNOWN["linear"].dash, "o")
_PANELS = (
    ("dormant", "dormant units, %", 100.0),
    ("rank_99", "rank of the features, % of all", 100.0),
    ("effective_rank", "effective rank of the features", 1.0),
    ("weight_magnitude", "mean weight magnitude", 1.0),
)


def draw_arriving(tables: ArrivingTables, scratch: str | None) -> list[Drawing]:
    """Accuracy, its difference from a network trained from scratch, and what becomes of the units, as far as there are
    any.

    Args:
        tables: the numbers.
        scratch: the method that is trained from scratch.
    """
    looks = _looks(tables.methods["method"].to_list(), scratch)
    found = [
        _curves(tables, looks, "accuracy", "test_accuracy", "Test accuracy on the classes so far, %"),
        _curves(
            tables, looks, "difference", AGAINST, "Test accuracy less that of a network trained from scratch, points"
        ),
        _units(tables, looks),
    ]
    return [drawing for drawing in found if drawing is not None]


def _looks(methods: Sequence[str], scratch: str | None) -> dict[str, Look]:
    found, others = {}, 0
    for method in methods:
        if method == scratch:
            found[method] = _RETRAINED
        elif method in KNOWN:
            found[method] = KNOWN[method]
        else:
            found[method] = other(others)
            others += 1
    return found


def _known(tables: ArrivingTables, name: str) -> pl.DataFrame:
    return tables.increments.filter(pl.col(name).is_not_null())


def _curves(tables: ArrivingTables, looks: dict[str, Look], name: str, of: str, title: str) -> Drawing | None:
    """One measure by the number of classes, with names at the ends of the lines."""
    rows = _known(tables, of)
    if rows.is_empty():
        return None
    labels = dict(tables.methods.select("method", "label").iter_rows())
    with drawing_style(name):
        drawn = canvas(labels.values(), len(labels), WIDE)
        if of == AGAINST:
            drawn.axes.axhline(0, color=_RETRAINED.colour, lw=1)
        ends = []
        for (method,), mine in rows.group_by("method", maintain_order=True):
            _line(drawn.axes, mine, of, 100.0, looks[str(method)])
            ends.append(
                (labels[str(method)], looks[str(method)].colour, float(mine["classes"][-1]), 100.0 * mine[of][-1])
            )
        drawn.axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        drawn.axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        drawn.axes.set_xlabel("classes", labelpad=7, fontsize=LABEL)
        heading(drawn.figure, title)
        label_ends(drawn.figure, drawn.axes, ends)
        said = "; ".join(f"{label} {value:.3g}" for label, _, _, value in ends)
        return render(
            drawn.figure, name, title, f"{title}, by the number of classes. At the end: {said}.", drawn.plot_share
        )


def _units(tables: ArrivingTables, looks: dict[str, Look]) -> Drawing | None:
    """Four small panels side by side in two rows, with one key."""
    name, title = "units", "Hidden units, features and weights, on images of the classes that arrive next"
    if _known(tables, "dormant").is_empty():
        return None
    labels = dict(tables.methods.select("method", "label").iter_rows())
    with drawing_style(name):
        height = 520
        figure = Figure(figsize=(WIDE[0] / 72, height / 72), facecolor="white")
        panels = [
            figure.add_axes((0.075 + 0.49 * (at % 2), 0.60 - 0.41 * (at // 2), 0.41, 0.29))
            for at in range(len(_PANELS))
        ]
        for axes, (of, label, factor) in zip(panels, _PANELS, strict=True):
            for (method,), mine in _known(tables, of).group_by("method", maintain_order=True):
                _line(axes, mine, of, factor, looks[str(method)], labels[str(method)])
            axes.set_title(label, fontsize=LABEL, loc="left", color="#2b2b2b")
            axes.tick_params(labelsize=10)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for axes in panels[2:]:
            axes.set_xlabel("classes", fontsize=10)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False, fontsize=10)
        heading(figure, title)
        said = []
        for of, label, factor in _PANELS:
            last = _known(tables, of).group_by("method", maintain_order=True).last()
            values = ", ".join(f"{labels[m]} {factor * v:.3g}" for m, v in last.select("method", of).iter_rows())
            said.append(f"{label}: {values}")
        return render(figure, name, title, f"By the number of classes. At the end: {'; '.join(said)}.", 1.0)


def _line(axes: Axes, rows: pl.DataFrame, of: str, factor: float, look: Look, label: str = "") -> None:
    x = rows["classes"].to_numpy()
    mean, low, high = (
        factor * rows[column].cast(pl.Float64).fill_null(np.nan).to_numpy()
        for column in (of, f"{of}_low", f"{of}_high")
    )
    axes.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0)
    style = (0, tuple(length / 1.8 for length in look.dash)) if look.dash else "solid"
    axes.plot(x, mean, color=look.colour, linewidth=1.8, linestyle=style, marker=look.marker or ".", markersize=5,
              markeredgecolor="white", markeredgewidth=0.5, label=label)  # fmt: skip
