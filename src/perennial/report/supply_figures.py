"""The figures of a study of tickets along a stream. What they draw is in the tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from perennial.report.figures import LABEL, positions
from perennial.report.looks import KNOWN, Look, other
from perennial.report.supply_tables import DRAWN, ONLINE, QUANTITIES, SupplyTables
from perennial.report.svg import Drawing, drawing_style, render
from perennial.report.words import examples
from perennial.runs.supply import FRESH
from perennial.statistics import LEVEL, Floats

FIGURES = ("supply-over-life", "supply-tickets")
"""All that there may be, in order."""
_WIDTH = 780.0
_LEFT, _RIGHT, _BETWEEN, _KEY, _HEAD, _PLOT, _AXIS, _BOTTOM = 52.0, 18.0, 56.0, 20.0, 30.0, 142.0, 26.0, 20.0
_KEYS = 4  # beside each other
_GREY = Look("#767676", (4, 3), ".")
_DASHED = (0, (3, 2.2))


def method_looks(names: Sequence[str]) -> dict[str, Look]:
    """By method; the fresh weights are grey and dashed."""
    others = iter(range(len(names)))
    return {name: _GREY if name == FRESH else KNOWN.get(name) or other(next(others)) for name in names}


def draw_supply(tables: SupplyTables) -> list[Drawing]:
    """Every figure for which there is a number, of :data:`FIGURES`."""
    return [drawing for drawing in (_over_life(tables), _tickets(tables)) if drawing]


def shown_steps(tables: SupplyTables) -> list[int]:
    """The first and the last checkpoint at which the methods differ."""
    aged = [step for step in tables.steps if step]
    return sorted({aged[0], aged[-1]}) if aged else []


def _over_life(tables: SupplyTables) -> Drawing | None:
    """A panel a quantity, a line a method."""
    frame = tables.over_life
    shown = [name for name in DRAWN if frame.filter(pl.col("quantity") == name).height]
    if not shown:
        return None
    steps = sorted({0, *frame.get_column("step")})
    place = dict(zip(steps, positions(steps), strict=True))
    broken = place[0] != 0
    looks = method_looks(list(tables.labels))
    name = FIGURES[0]
    with drawing_style(name):
        drawn = [m for m in tables.labels if frame.filter(pl.col("method") == m).height]
        figure, panels = _canvas(len(shown), 2, len(drawn))
        for axes, quantity in zip(panels, shown, strict=False):
            what = QUANTITIES[quantity]
            mine = frame.filter(pl.col("quantity") == quantity)
            for at, method in enumerate(sorted(tables.labels, key=lambda method: method != FRESH)):
                rows = mine.filter(pl.col("method") == method).sort("step")
                if broken:  # the start is the same for all, and no line leads over the break
                    first, rows = rows.filter(pl.col("step") == 0), rows.filter(pl.col("step") > 0)
                    if method == FRESH:
                        _line(axes, first, looks[method], place, every=(0, 1), bars=True)
                many = 1 if quantity != ONLINE else max(1, rows.height // 6)
                _line(axes, rows, looks[method], place, every=(at * many // len(tables.labels), many))
            low, high = axes.get_ylim()
            if low < 0 < high:
                axes.axhline(0, color="#8a8a8a", linewidth=0.8, zorder=1.5)
            _vertical(axes, what.share)
            _steps(axes, place, tables.steps or steps, broken)
            axes.set_title(_heading(quantity), loc="left", fontsize=LABEL, fontweight="bold", pad=9, x=-0.13)
        for axes in panels[-2:]:
            axes.set_xlabel("examples seen", labelpad=4, fontsize=LABEL)
        _key(figure, [_handle(tables.labels[m], looks[m]) for m in drawn])
        ends = "; ".join(_spoken_ends(tables, quantity) for quantity in shown)
        description = f"A panel a measurement, against examples seen, {_means(frame)}. At the end: {ends}."
        return render(figure, name, "Networks and their tickets over life", description, 1.0)


def _tickets(tables: SupplyTables) -> Drawing | None:
    """Tickets and controls by weights remaining, a row of panels a method, the fresh weights in each."""
    steps = shown_steps(tables)
    frame = tables.levels.filter(pl.col("of").is_in(["ticket", "control"]) & pl.col("step").is_in(steps))
    methods = [m for m in tables.labels if m != FRESH and frame.filter(pl.col("method") == m).height]
    if not methods:
        return None
    looks = method_looks(list(tables.labels))
    percents = sorted(set(frame.get_column("percent")), reverse=True)
    name = FIGURES[1]
    with drawing_style(name):
        figure, panels = _canvas(len(methods) * len(steps), len(steps), 4)
        bottom = min(frame.select(pl.min_horizontal("mean", "low")).to_series())
        top = max(frame.select(pl.max_horizontal("mean", "high")).to_series())
        margin = 0.06 * (top - bottom) or 0.01
        said = []
        for axes, (method, step) in zip(panels, ((m, s) for m in methods for s in steps), strict=True):
            for of in (FRESH, method):
                look = looks[of]
                for kind in ("control", "ticket"):
                    rows = frame.filter(
                        (pl.col("method") == of) & (pl.col("step") == step) & (pl.col("of") == kind)
                    ).sort("level")
                    _by_percent(axes, rows, look, control=kind == "control")
                    if rows.height:
                        last = rows.row(-1, named=True)
                        said.append(
                            f"{tables.labels[of]} after {examples(step)}: {kind} {100 * last['mean']:.3g}% with "
                            f"{last['percent']:.3g}% of the weights"
                        )
            axes.set_ylim(bottom - margin, top + margin)
            _vertical(axes, True)
            _percents(axes, percents)
            title = f"{tables.labels[method]}, after {examples(step)} examples"
            axes.set_title(title, loc="left", fontsize=LABEL, fontweight="bold", pad=9, x=-0.13)
        for axes in panels[-len(steps) :]:
            axes.set_xlabel("weights remaining, %", labelpad=4, fontsize=LABEL)
        ink = "#2b2b2b"
        _key(
            figure,
            [
                Line2D([], [], color=ink, linewidth=1.6, marker="o", markersize=5, label="ticket"),
                Line2D([], [], color=ink, linewidth=1.2, linestyle=_DASHED, marker="o", markersize=5,
                       markerfacecolor="white", label="control: random places"),
                Line2D([], [], color=_GREY.colour, linewidth=1.6, marker=".", label="ticket of fresh weights"),
                Line2D([], [], color=_GREY.colour, linewidth=1.2, linestyle=_DASHED, marker=".",
                       markerfacecolor="white", label="their control"),
            ],
        )  # fmt: skip
        description = (
            f"Test accuracy on the next task by weights remaining, {_means(frame)}. {'; '.join(dict.fromkeys(said))}."
        )
        return render(figure, name, "Tickets and controls", description, 1.0)


def _canvas(panels: int, columns: int, keys: int) -> tuple[Figure, list[Axes]]:
    """A figure with panels in rows of so many, laid out in points."""
    rows = math.ceil(panels / columns)
    row = _HEAD + _PLOT + _AXIS
    key = _KEY * math.ceil(keys / _KEYS) + 8
    height = key + rows * row + _BOTTOM
    figure = Figure(figsize=(_WIDTH / 72, height / 72), facecolor="white")
    width = (_WIDTH - _LEFT - _RIGHT - _BETWEEN) / 2
    found = []
    for at in range(panels):
        left = _LEFT + (at % columns) * (width + _BETWEEN)
        bottom = height - key - (at // columns) * row - _HEAD - _PLOT
        axes = figure.add_axes((left / _WIDTH, bottom / height, width / _WIDTH, _PLOT / height))
        axes.tick_params(labelsize=LABEL - 1)
        found.append(axes)
    return figure, found


def _line(
    axes: Axes, rows: pl.DataFrame, look: Look, place: dict[int, float], *, every: tuple[int, int], bars: bool = False
) -> None:
    if rows.is_empty():
        return
    x = np.array([place[step] for step in rows.get_column("step")])
    mean, low, high = (_floats(rows, column) for column in ("mean", "low", "high"))
    if bars:
        axes.vlines(x, low, high, color=look.colour, linewidth=1.4, alpha=0.6)
    else:
        axes.fill_between(x, low, high, color=look.colour, alpha=0.14, linewidth=0)
    style: Any = (0, tuple(length / 1.6 for length in look.dash)) if look.dash else "solid"
    axes.plot(x, mean, color=look.colour, linewidth=1.6, linestyle=style, markevery=every, **_mark(look))


def _by_percent(axes: Axes, rows: pl.DataFrame, look: Look, *, control: bool) -> None:
    if rows.is_empty():
        return
    x, mean, low, high = (_floats(rows, column) for column in ("percent", "mean", "low", "high"))
    axes.vlines(x, low, high, color=look.colour, linewidth=1.2, alpha=0.6)
    style: Any = _DASHED if control else "solid"
    mark = _mark(look)
    if control:
        mark |= {"markerfacecolor": "white", "markeredgecolor": look.colour, "markeredgewidth": 1.1, "markersize": 4.6}
    axes.plot(x, mean, color=look.colour, linewidth=1.2 if control else 1.6, linestyle=style, **mark)


def _mark(look: Look) -> dict[str, Any]:
    dot = look.marker == "."
    return {
        "marker": look.marker,
        "markersize": 7 if dot else 5.2,
        "markeredgecolor": "white",
        "markeredgewidth": 0.0 if dot else 0.6,
    }


def _handle(label: str, look: Look) -> Line2D:
    style: Any = (0, tuple(length / 1.6 for length in look.dash)) if look.dash else "solid"
    return Line2D([], [], color=look.colour, linewidth=1.6, linestyle=style, label=label, **_mark(look))


def _key(figure: Figure, handles: list[Line2D]) -> None:
    width, height = figure.get_size_inches() * 72
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(8 / width, 1 - 6 / height), ncols=_KEYS, frameon=False,
        fontsize=LABEL, handlelength=3.0, columnspacing=1.6, borderaxespad=0.0,
    )  # fmt: skip


def _vertical(axes: Axes, share: bool) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    low, high = axes.get_ylim()
    if high - low < 1e-9:
        axes.set_ylim(low - 0.01, high + 0.01)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value if share else value:.4g}"))


def _steps(axes: Axes, place: dict[int, float], named: Sequence[int], broken: bool) -> None:
    at = list(place.values())
    span = at[-1] - at[0] or 1.0
    axes.set_xlim(at[0] - 0.04 * span, at[-1] + 0.04 * span)
    shown: list[int] = []
    for step in sorted({0, *named}, reverse=True):  # as many as fit, the last among them
        if not shown or place[shown[-1]] - place[step] > 0.11 * span:
            shown.append(step)
    axes.set_xticks([place[step] for step in shown], [examples(step) for step in shown])
    if broken:
        middle = (at[0] + at[1]) / 2
        for side in (-0.014, 0.014):
            centre, tilt = middle + side * span, 0.01 * span
            axes.plot([centre - tilt, centre + tilt], [-0.035, 0.035], color="#8a8a8a", linewidth=1, clip_on=False,
                      transform=axes.get_xaxis_transform())  # fmt: skip


def _percents(axes: Axes, percents: Sequence[float]) -> None:
    edge = max(percents[0] / percents[-1], 1.2) ** 0.03
    axes.set_xscale("log")
    axes.set_xlim(percents[0] * edge, percents[-1] / edge)
    by = max(1, math.ceil(len(percents) / 7))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(percents[::by], [f"{percent:.3g}" for percent in percents[::by]])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _heading(quantity: str) -> str:
    what = QUANTITIES[quantity]
    unit = ", points" if what.difference else ", %" if what.share else ""
    return what.label + unit


def _spoken_ends(tables: SupplyTables, quantity: str) -> str:
    what = QUANTITIES[quantity]
    rows = tables.over_life.filter(pl.col("quantity") == quantity).sort("step").group_by("method", maintain_order=True)
    last = {method[0]: group.row(-1, named=True)["mean"] for method, group in rows}
    values = (
        f"{label} {100 * last[m]:.3g}%" if what.share else f"{label} {last[m]:.3g}"
        for m, label in tables.labels.items()
        if m in last
    )
    return f"{what.label.lower()}: {', '.join(values)}"


def _means(frame: pl.DataFrame) -> str:
    known = frame.get_column("low").null_count() < frame.height
    return f"mean over seeds with {100 * LEVEL:g}% intervals" if known else "of one seed"


def _floats(frame: pl.DataFrame, column: str) -> Floats:
    values: Floats = frame.get_column(column).cast(pl.Float64).to_numpy()
    return values
