"""The figure at the top of a report: of a paper's experiment, the paper's own panels from this run's numbers."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from perennial.report.figures import LABEL, WIDE, Line, draw_line, heading, line_of, spoken, vertical
from perennial.report.load import Panel, Part, Run
from perennial.report.looks import Look, other
from perennial.report.series import LOSS, Series, measure, series_of, swept
from perennial.report.svg import Drawing, drawing_style, render
from perennial.report.tables import Tables, method_of
from perennial.report.words import examples, readable, so_far
from perennial.statistics import estimate

NAME = "main-figure"
"""Of the drawing, and of its table."""

_COLUMNS: dict[str, Any] = {
    "panel": pl.Int64,
    "title": pl.String,
    "metric": pl.String,
    "part": pl.String,
    "method": pl.String,
    "settings": pl.String,
    "line": pl.String,
    "step": pl.Int64,
    "time": pl.Float64,
    "mean": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "lanes": pl.Int64,
}
_SMALL = 9.5  # points of ticks and keys
_TOP, _LEFT, _GAP, _TITLE, _FOOT, _ROW = 40.0, 50.0, 52.0, 22.0, 40.0, 15.0


def tabulate_main(run: Run, tables: Mapping[str, Tables]) -> pl.DataFrame:
    """What the main figure shows: a row a point of a line of a panel; empty without a figure or results.

    Columns: ``panel`` (from 1), its ``title`` and ``metric``; ``part``, ``method``, ``settings`` and ``line`` (its name
    for readers); ``step`` and ``time`` (the same, or the number of tasks); ``mean``, ``low``, ``high`` and ``lanes``.

    Args:
        run: the results.
        tables: of each part, by its key.
    """
    rows: list[dict[str, Any]] = []
    lengths = _task_steps(run)
    for at, panel in enumerate(run.figure.panels if run.figure else (), 1):
        for part in _parts(run, panel):
            metric = panel.metric or tables[part.key].metric
            for series in _shown(run, part, panel, metric, tables[part.key]):
                known = {
                    "panel": at,
                    "title": panel.title or measure(metric).label,
                    "metric": metric,
                    "part": part.key,
                    "method": series.method.key,
                    "settings": series.settings,
                    "line": _name(run, part, panel, series),
                }
                made = estimate(series.values)
                for step, mean, low, high, lanes in zip(series.steps, *made, strict=True):
                    point = {"mean": mean, "low": low, "high": high, "lanes": lanes, "step": step}
                    rows.append(known | point | {"time": step / lengths.get(part.key, 1)})
    frame = pl.DataFrame({name: [row[name] for row in rows] for name in _COLUMNS}, schema=_COLUMNS)
    # Numbers so close that readers see the same are told apart by all their digits.
    alike = pl.struct("part", "method", "settings").n_unique().over("panel", "line") > 1
    told = pl.format("{} ({})", "line", "settings")
    return frame.with_columns(pl.col(pl.Float64).fill_nan(None), line=pl.when(alike).then(told).otherwise("line"))


def draw_main(run: Run, frame: pl.DataFrame, looks: Mapping[str, Look]) -> Drawing | None:
    """The main figure; None without a number.

    Args:
        run: the results.
        frame: made by :func:`tabulate_main`.
        looks: by method key.
    """
    known = frame.filter(pl.col("mean").is_not_null())
    if run.figure is None or known.is_empty():
        return None
    names = [
        tuple(g.get_column("line").unique(maintain_order=True)) for _, g in known.group_by("panel", maintain_order=True)
    ]
    panels = [frame.filter(panel=at) for at in known.get_column("panel").unique(maintain_order=True)]
    shared = len({frozenset(name) for name in names}) == 1
    shown = _looks(run, known, looks)
    across = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    width = (WIDE[0] - _LEFT - 14 - (across - 1) * _GAP) / across
    tall = 0.5 * width if across == 1 else 0.62 * width
    rows = [names[at : at + across] for at in range(0, len(names), across)]
    steps = [_TITLE + tall + _FOOT + (0.0 if shared else _ROW * max(map(len, row)) + 4) for row in rows]
    columns = 4 if max(map(len, names[0])) <= 20 else 3
    foot = _ROW * math.ceil(len(names[0]) / columns) + 12 if shared else 6.0
    height = _TOP + sum(steps) + foot
    by_tasks = bool(_task_steps(run))
    linear = {method.key for part in run.parts for method in part.methods if method.linear}
    unit = {part.key: "task number" if by_tasks else so_far(part) for part in run.parts}
    with drawing_style(NAME):
        figure = Figure(figsize=(WIDE[0] / 72, height / 72), facecolor="white")
        said = []
        for at, panel in enumerate(panels):
            left, top = _LEFT + (at % across) * (width + _GAP), _TOP + sum(steps[: at // across]) + _TITLE
            axes = figure.add_axes((left / WIDE[0], 1 - (top + tall) / height, width / WIDE[0], tall / height))
            lines = _draw(axes, panel, shown, linear, by_tasks)
            axes.set_xlabel(unit[panel.row(0, named=True)["part"]], fontsize=_SMALL, labelpad=4)
            title, metric = panel.row(0, named=True)["title"], measure(panel.row(0, named=True)["metric"])
            axes.set_title(title, fontsize=LABEL, loc="left", color="#2b2b2b")
            if title != metric.label:
                axes.set_ylabel(metric.label.lower(), fontsize=_SMALL)
            if not shared:
                axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -(_FOOT - 4) / tall), frameon=False,
                            fontsize=_SMALL, borderpad=0, labelspacing=0.2)  # fmt: skip
            ends = ", ".join(f"{name} {spoken(line.mean[-1], metric.share)}" for name, line in lines.items())
            said.append(f"{title}: {ends}")
        if shared:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=_SMALL)
        heading(figure, run.figure.title)
        description = f"Panels against {' or '.join(dict.fromkeys(unit.values()))}. At the end: {'; '.join(said)}."
        return render(figure, NAME, f"{run.figure.title}: {run.title}", description, 1.0)


def _task_steps(run: Run) -> dict[str, int]:
    """Steps of a task by part, if the figure counts in tasks and all parts know theirs; else empty."""
    if run.figure is None or run.figure.axis != "tasks":
        return {}
    found = {part.key: part.task_steps() for part in run.parts}
    return {key: steps for key, steps in found.items() if steps} if all(found.values()) else {}


def _parts(run: Run, panel: Panel) -> list[Part]:
    if panel.lines == "parts":
        return list(run.parts)
    return [next(part for part in run.parts if panel.part in (None, part.key))]


def _shown(run: Run, part: Part, panel: Panel, metric: str, tables: Tables) -> Iterator[Series]:
    """The lines of a panel that are of one part."""
    best = {(row["method"], row["settings"]) for row in tables.summary.iter_rows(named=True) if row["rank"] == 1}
    order = [method.key for method in part.methods]
    for series in sorted(series_of(run, part, metric), key=lambda one: (order.index(one.method.key), _values(one))):
        chosen = panel.methods is None or series.method.key in panel.methods
        every = panel.lines == "settings" and not series.method.linear
        if chosen and (every or (series.method.key, series.settings) in best):
            yield series


def _values(series: Series) -> list[tuple[list[float], str]]:
    """What a method's settings are ordered by: their values, several numbers one by one."""
    values = swept(series.settings).values()
    return [
        ([float(one) for one in re.findall(r"[\d.]+(?:e[+-]?\d+)?", value)], value)
        if isinstance(value, str)
        else ([value], "")
        for value in values
    ]


def _name(run: Run, part: Part, panel: Panel, series: Series) -> str:
    """A line's name for readers: no two of a panel are the same."""
    label, several = series.method.label, len(panel.methods or part.methods) > 1
    if sum(method.label == label for method in part.methods) > 1:
        label = f"{label} ({series.method.key})"
    if panel.lines == "parts":
        alike = sum(one.title == part.title for one in run.parts) > 1
        title = f"{part.title} ({part.key})" if alike else part.title
        return f"{title}, {label}" if several else title
    if panel.lines == "methods" or not series.settings or series.method.linear:
        return label
    alone = sum(not method_of(part, key).linear for key in panel.methods or [m.key for m in part.methods]) == 1
    return readable(series.settings) if alone else f"{label}, {readable(series.settings)}"


def _looks(run: Run, known: pl.DataFrame, looks: Mapping[str, Look]) -> dict[str, Look]:
    """By the names of the lines; methods have the colours that they have on the whole page."""
    labels = {method.label for part in run.parts for method in part.methods}
    found: dict[str, Look] = {}
    free = (look for at in itertools.count() if (look := other(at)) not in looks.values())
    for name, method in known.group_by("line", maintain_order=True).agg(pl.col("method").first()).iter_rows():
        if name in labels or name.endswith(f" ({method})"):
            found[name] = looks[method]
        else:
            found[name] = next(free)
    return found


def _draw(
    axes: Axes, panel: pl.DataFrame, looks: Mapping[str, Look], linear: Collection[str], by_tasks: bool
) -> dict[str, Line]:
    """The lines of a panel, by name; those of the methods in ``linear`` as references."""
    found = {str(name): line_of(rows, "time") for (name,), rows in panel.group_by("line", maintain_order=True)}
    lines = {name: line for name, line in found.items() if line is not None}
    metric = panel.row(0, named=True)["metric"]
    for at, (name, line) in enumerate(lines.items()):
        reference = panel.filter(line=name).get_column("method")[0] in linear
        draw_line(
            axes,
            line,
            looks[name],
            at,
            len(lines),
            f"panel-{panel.row(0, named=True)['panel']}-{name}",
            reference=reference,
        )
        axes.lines[-1].set_label(name)
        gone = line.only(line.leaves)
        axes.plot(gone.x, gone.mean, "x", color=looks[name].colour, markersize=6, markeredgewidth=1.6, zorder=4)
    vertical(axes, measure(metric).share, list(lines.values()), logarithmic=metric == LOSS)
    axes.set_xlim(0, max(line.x[-1] for line in lines.values()))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=by_tasks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: examples(value)))
    axes.tick_params(labelsize=_SMALL)
    return lines
