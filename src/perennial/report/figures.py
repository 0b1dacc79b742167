"""The figures. What they draw is in the tables, and nothing else is drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from perennial.report.load import Part
from perennial.report.looks import Look
from perennial.report.series import LOSS, measure
from perennial.report.svg import Drawing, drawing_style, render
from perennial.report.tables import method_of
from perennial.report.words import examples, number, so_far
from perennial.statistics import LEVEL, Floats

WIDE, NARROW = (780, 400), (480, 290)
"""Width and height in points of a figure over the whole page, and of one of two beside each other."""
LABEL = 11.0
"""Size of all text, in points."""
_LEFT, _TOP, _BOTTOM, _GAP = 58.0, 34.0, 46.0, 26.0
_MARKS = 6  # markers on a line


@dataclass(frozen=True)
class Canvas:
    """A figure under way."""

    figure: Figure
    axes: Axes
    plot_share: float
    """The share of the width that a narrow screen shows."""


def curve_figure(
    name: str,
    title: str,
    part: Part,
    frame: pl.DataFrame,
    looks: dict[str, Look],
    wide: bool,
    axis: str | None = None,
    marks: Sequence[float] = (),
    told: str = "",
) -> Drawing | None:
    """One metric against steps, a line with its interval a method. None if there is no number.

    Args:
        name: of the drawing.
        title: of the drawing.
        part: names the methods.
        frame: rows of one metric of :class:`perennial.report.tables.Tables`'s curves or diagnostics.
        looks: by method key.
        wide: over the whole page, or one of two beside each other.
        axis: what the steps are; None: as the part counts them.
        marks: steps to draw a vertical line at.
        told: what the heading says that all lines are of.
    """
    lines = _lines(part, frame, "step")
    if not lines:
        return None
    metric = frame.get_column("metric")[0]
    shown = measure(metric)
    axis = axis or so_far(part)
    with drawing_style(name):
        drawn = canvas(_labels(part), len(lines), WIDE if wide else NARROW)
        axes = drawn.axes
        for mark in marks:
            axes.axvline(mark, color="#9a9a9a", linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
        for at, (key, line) in enumerate(lines.items()):
            draw_line(axes, line, looks[key], at, len(lines), key, reference=method_of(part, key).linear)
            gone = line.only(line.leaves)
            axes.plot(gone.x, gone.mean, "x", color=looks[key].colour, markersize=7, markeredgewidth=1.8, zorder=4)
        vertical(axes, shown.share, list(lines.values()), logarithmic=metric == LOSS)
        axes.set_xlim(0, max(line.x[-1] for line in lines.values()))
        axes.xaxis.set_major_locator(MaxNLocator(5 if wide else 4, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: examples(value)))
        axes.set_xlabel(axis, labelpad=7, fontsize=LABEL)
        if not wide:
            heading(drawn.figure, f"{told}: {shown.label.lower()}" if told else shown.label)
        else:
            better = "higher" if shown.higher_is_better else "lower"
            heading(drawn.figure, f"{shown.label} ({better} is better)")
        label_ends(drawn.figure, drawn.axes, _ends(part, lines, looks))
        ends = "; ".join(
            f"{method_of(part, key).label} {spoken(line.mean[-1], shown.share)}" for key, line in lines.items()
        )
        description = f"{shown.label} against {axis}, {_means(lines)}. At the end: {ends}."
        return render(drawn.figure, name, title, description, drawn.plot_share)


def sensitivity_figure(
    name: str, title: str, part: Part, frame: pl.DataFrame, metric: str, looks: dict[str, Look]
) -> Drawing | None:
    """Average performance against one swept number, a line a method. None if there is no number to draw.

    Args:
        name: of the drawing.
        title: of the drawing.
        part: names the methods.
        frame: rows of one number of :class:`perennial.report.tables.Tables`'s sensitivity.
        metric: that performance is measured by.
        looks: by method key.
    """
    lines = _lines(part, frame, "value")
    if not lines:
        return None
    shown = measure(metric)
    values = sorted(set(frame.get_column("value")))
    place = dict(zip(values, positions(values), strict=True))
    broken = place[values[0]] != values[0] and values[0] == 0
    with drawing_style(name):
        drawn = canvas(_labels(part), len(lines), NARROW)
        axes = drawn.axes
        for at, (key, line) in enumerate(lines.items()):
            zero = line.x == 0 if broken else np.zeros(len(line.x), dtype=bool)
            moved = line.moved(place)
            axes.vlines(moved.x, moved.low, moved.high, color=looks[key].colour, linewidth=1.2, alpha=0.7)
            for kept in filter(np.any, (zero, ~zero)):  # no line across the break
                group = moved.only(kept)
                draw_line(axes, group, looks[key], at, len(lines), key, reference=False, every=True)
        for key, value in frame.filter(pl.col("mean").is_null()).select("method", "value").iter_rows():
            colour, top = looks[key].colour, axes.get_xaxis_transform()
            axes.plot([place[value]], [0.97], "x", color=colour, markersize=7, markeredgewidth=1.8, transform=top)
        vertical(axes, shown.share, list(lines.values()), logarithmic=metric == LOSS)
        _horizontal(axes, place, broken)
        axes.set_xlabel(frame.get_column("number")[0], labelpad=7, fontsize=LABEL)
        heading(drawn.figure, f"Average {shown.label.lower()} over the run")
        moved_lines = {key: line.moved(place) for key, line in lines.items()}
        label_ends(drawn.figure, drawn.axes, _ends(part, moved_lines, looks))
        best = "; ".join(
            f"{method_of(part, key).label} from {spoken(np.nanmin(line.mean), shown.share)} "
            f"to {spoken(np.nanmax(line.mean), shown.share)}"
            for key, line in lines.items()
        )
        description = f"Average {shown.label.lower()} over the run against {title}, {_means(lines)}. {best}."
        return render(drawn.figure, name, title, description, drawn.plot_share)


def choice_figure(
    name: str, title: str, part: Part, frame: pl.DataFrame, metric: str, looks: dict[str, Look]
) -> Drawing | None:
    """Average performance by what was chosen, a row a choice, best on top. None if there is no number to draw.

    Args:
        name: of the drawing.
        title: of the drawing.
        part: names the methods.
        frame: rows of one choice of :class:`perennial.report.tables.Tables`'s choices.
        metric: that performance is measured by.
        looks: by method key.
    """
    known = frame.filter(pl.col("mean").is_not_null())
    if known.is_empty():
        return None
    shown = measure(metric)
    methods = known.get_column("method").unique(maintain_order=True).to_list()
    order = frame.get_column("value").unique(maintain_order=True).to_list()
    left = min(max(_width(text) for text in order) + 24, 0.45 * NARROW[0])
    height = _TOP + _BOTTOM + len(order) * max(20.0, 12.0 * len(methods))
    with drawing_style(name):
        figure = Figure(figsize=(NARROW[0] / 72, height / 72), facecolor="white")
        inner = (1 - (left + 18) / NARROW[0], (height - _TOP - _BOTTOM) / height)
        axes = figure.add_axes((left / NARROW[0], _BOTTOM / height, *inner))
        axes.tick_params(labelsize=LABEL)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x")
        for at, key in enumerate(methods):
            mine = known.filter(method=key)
            rows = np.array([order.index(value) for value in mine.get_column("value")], dtype=float)
            rows += (at - (len(methods) - 1) / 2) * 0.6 / len(methods)
            mean, low, high = (mine.get_column(end).cast(pl.Float64).to_numpy() for end in ("mean", "low", "high"))
            look = looks[key]
            axes.hlines(rows, low, high, color=look.colour, linewidth=1.6, alpha=0.7)
            axes.plot(mean, rows, look.marker or "o", color=look.colour, markersize=6.5, gid=f"choice-{at}")
        gone = frame.filter(pl.col("mean").is_null())
        for key, value in gone.select("method", "value").iter_rows():
            place = axes.get_yaxis_transform()
            axes.plot([0.97], [order.index(value)], "x", color=looks[key].colour, markersize=7, transform=place)
        axes.set_yticks(range(len(order)), order)
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        if shown.share:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
        axes.set_xlabel(f"average {shown.label.lower()} over the run", labelpad=7, fontsize=LABEL)
        heading(figure, f"By {frame.get_column('choice')[0].rpartition('.')[2].replace('_', ' ')}")
        told = "; ".join(
            f"{method_of(part, key).label}, {value} {spoken(mean, shown.share)}"
            for key, value, mean in known.select("method", "value", "mean").iter_rows()
        )
        return render(figure, name, title, f"Average {shown.label.lower()} over the run by {title}. {told}.", 1.0)


def _width(text: str) -> float:
    return float(TextPath((0, 0), text, size=LABEL).vertices[:, 0].max()) if text.strip() else 0.0


@dataclass(frozen=True)
class Line:
    """Means with their intervals along an axis, each [points]."""

    x: Floats
    """Where."""
    mean: Floats
    """NaN where there is no number."""
    low: Floats
    """Of the interval; NaN where there is none."""
    high: Floats
    """Of the interval; NaN where there is none."""
    leaves: NDArray[np.bool_]
    """Whether a lane diverges right after the point, so that the mean goes on with fewer."""

    def only(self, kept: NDArray[np.bool_]) -> Line:
        """Some of the points."""
        return Line(self.x[kept], self.mean[kept], self.low[kept], self.high[kept], self.leaves[kept])

    def moved(self, place: dict[float, float]) -> Line:
        """The same elsewhere on the axis."""
        return replace(self, x=np.array([place[x] for x in self.x]))


def line_of(rows: pl.DataFrame, x: str) -> Line | None:
    """The points of a table of curves in the order of the column ``x``, up to the last number; None without one."""
    at, mean, low, high, lanes = (
        rows.sort(x).get_column(name).cast(pl.Float64).to_numpy() for name in (x, "mean", "low", "high", "lanes")
    )
    known = np.flatnonzero(np.isfinite(mean))
    if not len(known):
        return None
    line = Line(at, mean, low, high, leaves=np.append(np.diff(lanes) < 0, False))
    return line.only(np.arange(len(at)) <= known[-1])


def _lines(part: Part, frame: pl.DataFrame, x: str) -> dict[str, Line]:
    """The lines that have a number, by method; reference lines first, below the others."""
    found = {}
    for method in sorted(part.methods, key=lambda method: not method.linear):
        rows = frame.filter(pl.col("method") == method.key)
        line = line_of(rows, x) if rows.height else None
        if line is not None:
            found[method.key] = line
    return found


def _labels(part: Part) -> list[str]:
    """Of every method, also of those that are not drawn: all figures of a part have one width."""
    return [method.label for method in part.methods]


def canvas(labels: Iterable[str], lines: int, size: tuple[int, int]) -> Canvas:
    """A figure with room for labels at the right end of lines.

    Args:
        labels: all that may stand there in this figure and in those that shall have its width.
        lines: how many will.
        size: width and least height in points.
    """
    width, least = size
    right = min(max(map(_width, labels)) + _GAP + 8, 0.4 * width)
    height = max(float(least), _TOP + _BOTTOM + lines * LABEL * 1.4)
    figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
    inner = (width - _LEFT - right) / width, (height - _TOP - _BOTTOM) / height
    axes = figure.add_axes((_LEFT / width, _BOTTOM / height, *inner))
    axes.tick_params(labelsize=LABEL)
    # A narrow screen cuts the figure off here: past the label of the last tick, before the names of the lines.
    return Canvas(figure, axes, round((width - right + 20) / width, 4))


def draw_line(
    axes: Axes, line: Line, look: Look, at: int, count: int, key: str, *, reference: bool, every: bool = False
) -> None:
    """A line with its interval.

    Args:
        axes: where.
        line: what.
        look: how.
        at: which line of the axes it is.
        count: lines of the axes.
        key: its name in the SVG.
        reference: thinner and behind the others.
        every: whether each point has a marker.
    """
    width = 1.4 if reference else 1.8
    style: Any = (0, tuple(length / width for length in look.dash)) if look.dash else "solid"
    axes.fill_between(line.x, line.low, line.high, color=look.colour, alpha=0.15, linewidth=0)
    step = max(1, len(line.x) // _MARKS)
    axes.plot(
        line.x,
        line.mean,
        color=look.colour,
        linewidth=width,
        linestyle=style,
        marker=look.marker or ("." if every else ""),
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        # Each method's markers stand elsewhere along the line, so that none covers another's.
        markevery=1 if every else (at * step // count, step),
        gid=f"line-{re.sub(r'[^A-Za-z0-9_]+', '-', key)}-{len(axes.lines)}",
        zorder=2 if reference else 3,
    )


def vertical(axes: Axes, share: bool, lines: list[Line], *, logarithmic: bool) -> None:
    """Set up the vertical axis: percent for shares, a logarithm (if allowed) for means over more than 30 times."""
    means = np.concatenate([line.mean[np.isfinite(line.mean)] for line in lines])
    if logarithmic and means.min() > 0 and means.max() / means.min() > 30:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if share:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    if means.min() == means.max():
        margin = abs(means.max()) * 0.5 or 1.0
        axes.set_ylim(means.min() - margin, means.max() + margin)


def positions(values: Sequence[float]) -> list[float]:
    """Where the values of a swept number stand on the axis, in order.

    As they are where they span no more than 10 times; else their base-10 logarithm, and zero, which has none, left of
    a break in the axis. Values below zero are not put on a logarithm.
    """
    positive = [value for value in values if value > 0]
    if min(values) < 0 or not positive or max(positive) <= 10 * min(positive):
        return list(values)
    logs = [math.log10(value) for value in positive]
    gap = max(0.5, 0.16 * (logs[-1] - logs[0]))
    return ([logs[0] - gap] if values[0] == 0 else []) + logs


def _horizontal(axes: Axes, place: dict[float, float], broken: bool) -> None:
    at = list(place.values())
    span = at[-1] - at[0] or 1.0
    axes.set_xlim(at[0] - 0.05 * span, at[-1] + 0.05 * span)
    shown: list[float] = []
    for value in place:  # as many labels as fit beside each other
        if not shown or place[value] - place[shown[-1]] > 0.12 * span:
            shown.append(value)
    axes.set_xticks([place[value] for value in shown], [number(value) for value in shown])
    axes.set_xticks(at, minor=True)
    axes.xaxis.set_minor_formatter(NullFormatter())
    if broken:
        middle = (at[0] + at[1]) / 2
        for side in (-0.012, 0.012):
            centre = middle + side * span
            tilt = 0.008 * span
            axes.plot(
                [centre - tilt, centre + tilt],
                [-0.022, 0.022],
                color="#8a8a8a",
                linewidth=1,
                clip_on=False,
                transform=axes.get_xaxis_transform(),
            )


def heading(figure: Figure, text: str) -> None:
    """A title at the top left."""
    width, height = figure.get_size_inches() * 72
    figure.text(10 / width, 1 - 20 / height, text, fontsize=LABEL, color="#2b2b2b", fontweight="bold")


def label_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Names (label, colour, x, y) at the right end of the lines, moved apart where they would cover each other."""
    axes.autoscale_view()  # else the limits, and with them the ends, move when the figure is drawn
    box = axes.get_window_extent()
    inner, tall = (length / figure.dpi * 72 for length in (box.width, box.height))
    points = axes.transAxes.inverted().transform(axes.transData.transform([end[2:] for end in ends]))
    order = sorted(range(len(ends)), key=lambda at: float(points[at][1]))
    levels = spread([min(1.0, max(0.0, float(points[at][1]))) for at in order], LABEL * 1.35 / tall)
    elbow, start = 1 + 5 / inner, 1 + (_GAP - 8) / inner
    for at, level in zip(order, levels, strict=True):
        (label, colour, *_), (x, y) = ends[at], points[at]
        reaches = x > 0.94  # from a line that ends early, a leader would cross the others
        axes.plot(
            [x if reaches else elbow, elbow, start],
            [y if reaches else level, y if reaches else level, level],
            color=colour,
            linewidth=0.9,
            alpha=0.8,
            transform=axes.transAxes,
            clip_on=False,
        )
        axes.text(1 + (_GAP - 4) / inner, level, label, transform=axes.transAxes, va="center_baseline", fontsize=LABEL)


def _ends(part: Part, lines: dict[str, Line], looks: dict[str, Look]) -> list[tuple[str, str, float, float]]:
    return [
        (method_of(part, key).label, looks[key].colour, float(line.x[-1]), float(line.mean[-1]))
        for key, line in lines.items()
    ]


def spread(levels: Sequence[float], distance: float) -> list[float]:
    """Levels in ascending order moved apart to at least ``distance`` within [0, 1], as little as may be."""
    groups: list[tuple[float, int]] = []  # centre and number of labels that touch
    for level in levels:
        centre, count = _within(level, 1, distance), 1
        while groups and centre - count * distance / 2 < groups[-1][0] + groups[-1][1] * distance / 2:
            below, many = groups.pop()
            count += many
            centre = _within((centre * (count - many) + below * many) / count, count, distance)
        groups.append((centre, count))
    return [centre + (i - (count - 1) / 2) * distance for centre, count in groups for i in range(count)]


def _within(centre: float, count: int, distance: float) -> float:
    """The centre of a group moved so that the group lies in [0, 1]; from 0 upwards if it is too large."""
    half = count * distance / 2
    return max(min(centre, 1 - half), half)


def _means(lines: dict[str, Line]) -> str:
    known = any(np.isfinite(line.low).any() for line in lines.values())
    return f"mean over seeds with {100 * LEVEL:g}% intervals" if known else "of one seed"


def spoken(value: float, share: bool) -> str:
    """A number in words of a figure's description."""
    return f"{100 * value:.3g}%" if share else f"{value:.3g}"
