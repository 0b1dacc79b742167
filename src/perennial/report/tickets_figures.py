"""The figures of a lottery-ticket experiment. What they draw is in the tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from perennial.report.figures import LABEL, NARROW, WIDE, canvas, heading, label_ends
from perennial.report.looks import KNOWN, OTHERS, Dash, Look
from perennial.report.svg import Drawing, drawing_style, render
from perennial.report.tickets_tables import ALL, TICKET, TicketTables, kind_label, shown_levels
from perennial.report.words import examples
from perennial.statistics import Floats
from perennial.tickets.control import CONTROLS

_RANGES = "mean over replicates, bars from the lowest to the highest"
_HEADINGS = {
    "early_stop": "Iteration of the early stop (lower is faster)",
    "early_accuracy": "Test accuracy at the early stop (higher is better)",
    "accuracy": "Test accuracy at the end of training (higher is better)",
}
FIGURES = (
    "tickets-early-stop",
    "tickets-early-accuracy",
    "tickets-accuracy",
    "tickets-learning-curves",
    "tickets-reinit-learning-curves",
    "tickets-mask-overlap",
    "tickets-mask-excess",
)
"""Names of all drawings."""
_DASHED: Dash = (4, 2.2)


def kind_looks() -> dict[str, Look]:
    """A look for the ticket and every control."""
    first = {TICKET: "continual_backprop", "random_reinit": "adam", "random_mask": "upgd"}
    found = {kind: KNOWN[name] for kind, name in first.items()}
    return found | dict(zip((kind for kind in CONTROLS if kind not in found), OTHERS, strict=True))


def level_looks(levels: Sequence[int]) -> dict[int, Look]:
    """A look for each of the levels that learning curves are shown of, the whole network first."""
    order = ("backprop", "continual_backprop", "upgd", "l2", "shrink_and_perturb", "adam")
    return dict(zip(levels, (Look(KNOWN[name].colour, (), KNOWN[name].marker) for name in order), strict=False))


def layer_looks(layers: Sequence[str]) -> dict[str, Look]:
    """A look for each layer; all together are black."""
    palette = itertools.cycle(Look(look.colour, (), look.marker) for look in OTHERS)
    found = dict(zip((x for x in layers if x != ALL), palette, strict=False))
    return found | {ALL: Look(KNOWN["backprop"].colour, (), KNOWN["backprop"].marker)}


def percent_text(percent: float) -> str:
    """100, 51.3, 7.0, 0.59."""
    if percent >= 99.95:
        return f"{percent:.0f}"
    return f"{percent:.1f}" if percent >= 1 else f"{percent:.2g}"


def draw_tickets(tables: TicketTables, replicates: int) -> list[Drawing]:
    """Those of :data:`FIGURES` that have something to draw, in their order.

    Args:
        tables: what to draw.
        replicates: planned; the mean over fewer has a hollow mark.
    """
    found = [_by_level(tables.levels, quantity, replicates) for quantity in _HEADINGS]
    found += [_curves(tables, kind) for kind in (TICKET, "random_reinit")]
    found += [_overlap(tables.overlap, quantity) for quantity in ("jaccard", "excess")]
    return [drawing for drawing in found if drawing is not None]


@dataclass(frozen=True)
class _Line:
    key: str
    label: str
    look: Look
    x: Floats
    mean: Floats
    low: Floats
    high: Floats
    hollow: Floats  # 1 where a replicate is missing


def _by_level(levels: pl.DataFrame, quantity: str, replicates: int) -> Drawing | None:
    known = levels.drop_nulls(f"{quantity}_mean")
    if known.get_column("level").max() in (None, 0):
        return None
    name = f"tickets-{quantity.replace('_', '-')}"
    share = quantity != "early_stop"
    lines = []
    for kind, look in kind_looks().items():
        mine = known.filter(pl.col("kind") == kind).sort("level")
        if mine.height:
            x, mean, low, high = (_floats(mine, c) for c in ("percent", *(f"{quantity}_{part}" for part in _SPREAD)))
            there = _floats(mine, "replicates") - _floats(mine, "diverged")
            hollow = (there < replicates).astype(float)
            lines.append(_Line(kind, kind_label(kind), look, x, mean, low, high, hollow))
    whole = known.filter((pl.col("kind") == TICKET) & (pl.col("level") == 0))
    with drawing_style(name):
        names = [*(line.label for line in lines), "Whole network"]
        drawn = canvas(names, len(names), WIDE)
        figure, axes = drawn.figure, drawn.axes
        if whole.height:
            axes.axhline(whole[f"{quantity}_mean"][0], color=KNOWN["linear"].colour, linewidth=0.9, zorder=1.5)
        for line in lines:
            axes.vlines(line.x, line.low, line.high, color=line.look.colour, linewidth=1.4, alpha=0.6, zorder=2.5)
            _draw(axes, line)
        _percentages(axes, sorted(set(known.get_column("percent")), reverse=True), 6)
        _vertical(axes, share, [line.mean for line in lines])
        if not share:
            axes.set_ylim(bottom=0)
        heading(figure, _HEADINGS[quantity])
        ends = [(line.label, line.look.colour, line.x[-1], line.mean[-1]) for line in lines]
        if whole.height:
            ends.append(("Whole network", KNOWN["linear"].colour, axes.get_xlim()[1], whole[f"{quantity}_mean"][0]))
        label_ends(figure, axes, ends)
        head = _HEADINGS[quantity].partition(" (")[0]
        spoken = "; ".join(
            f"{line.label} from {_spoken(line.mean[0], share)} at {percent_text(line.x[0])}% to "
            f"{_spoken(line.mean[-1], share)} at {percent_text(line.x[-1])}%"
            for line in lines
        )
        description = f"{head} against the percentage of weights remaining, {_RANGES}. {spoken}."
        return render(figure, name, head, description, drawn.plot_share)


_SPREAD = ("mean", "low", "high")


def _curves(tables: TicketTables, kind: str) -> Drawing | None:
    """Accuracy on the way, a line a level; the whole network is in both figures, for comparison."""
    shown = shown_levels(tables.levels)
    looks = level_looks(shown)
    frame = tables.validation
    lines = []
    for level in shown:
        of = TICKET if level == 0 else kind
        mine = frame.filter((pl.col("kind") == of) & (pl.col("level") == level)).sort("iteration")
        if mine.height:
            look = looks[level] if of == TICKET else Look(looks[level].colour, _DASHED, looks[level].marker)
            x, mean, low, high = (_floats(mine, column) for column in ("iteration", *_SPREAD))
            label = f"{percent_text(mine['percent'][0])}%"
            lines.append(_Line(str(level), label, look, x, mean, low, high, np.zeros(mine.height)))
    if not any(line.key != "0" for line in lines):
        return None
    name = "tickets-learning-curves" if kind == TICKET else "tickets-reinit-learning-curves"
    head = f"Validation accuracy: {'tickets' if kind == TICKET else 'random reinit'}"
    with drawing_style(name):
        names = [line.label for line in lines]
        drawn = canvas(names, len(names), NARROW)
        figure, axes = drawn.figure, drawn.axes
        for at, line in enumerate(lines):
            step = max(1, len(line.x) // 6)
            marked = slice(at * step // len(lines), None, step)
            axes.vlines(line.x[marked], line.low[marked], line.high[marked], color=line.look.colour, linewidth=1.2,
                        alpha=0.6, zorder=2.5)  # fmt: skip
            _draw(axes, line, every=(marked.start, step), width=1.4)
        axes.set_xlim(0, max(line.x[-1] for line in lines))
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: examples(value)))
        axes.set_xlabel("iterations", labelpad=7, fontsize=LABEL)
        _vertical(axes, True, [line.mean for line in lines])
        # Both figures have one scale, and the first steps, which climb from chance, do not set it.
        bottom, top = float(np.quantile(_floats(frame, "mean"), 0.08)), float(_floats(frame, "high").max())
        margin = 0.06 * (top - bottom) or 0.01
        axes.set_ylim(bottom - margin, top + margin)
        heading(figure, head)
        label_ends(figure, axes, [(line.label, line.look.colour, line.x[-1], line.mean[-1]) for line in lines])
        ends = "; ".join(f"{line.label} of the weights {_spoken(line.mean[-1], True)}" for line in lines)
        description = (
            f"Accuracy on the validation set against iterations, a line a percentage of weights remaining, mean over "
            f"replicates with bars from the lowest to the highest. At iteration {lines[0].x[-1]:,.0f}: {ends}."
        )
        return render(figure, name, head, description, drawn.plot_share)


def _overlap(overlap: pl.DataFrame, quantity: str) -> Drawing | None:
    """What two replicates' masks share, a line a layer: the Jaccard index with its floor, or the excess over it."""
    means = overlap.group_by("layer", "percent", maintain_order=True).agg(
        pl.col("jaccard", "floor", "excess").drop_nulls().mean()
    )
    if means.is_empty():
        return None
    looks = layer_looks(means.get_column("layer").unique(maintain_order=True).to_list())
    index = quantity == "jaccard"
    lines, floors = [], []
    for layer, look in looks.items():
        mine = means.filter(pl.col("layer") == layer).drop_nulls(quantity).sort("percent", descending=True)
        if mine.height:
            x, y = _floats(mine, "percent"), _floats(mine, quantity)
            lines.append(_Line(layer, layer_label(layer), look, x, y, y, y, np.zeros(len(x))))
            floors.append(_floats(mine, "floor") if index else np.zeros(len(x)))
    if not lines:
        return None
    name = "tickets-mask-overlap" if index else "tickets-mask-excess"
    head = "Jaccard index of masks (dashed: by chance)" if index else "Overlap beyond chance (0: chance, 1: equal)"
    with drawing_style(name):
        names = [line.label for line in lines]
        drawn = canvas(names, len(names), NARROW)
        figure, axes = drawn.figure, drawn.axes
        for line, floor in zip(lines, floors, strict=True):
            _draw(axes, line, width=1.4)
            if index:
                axes.plot(line.x, floor, color=line.look.colour, linewidth=1.0, linestyle=(0, (3, 2.5)), zorder=2)
        if not index:
            axes.axhline(0, color=KNOWN["linear"].colour, linewidth=0.9, zorder=1.5)
        # From the whole network on, as in the other figures, though whole masks are equal and say nothing.
        _percentages(axes, [100.0, *sorted(set(means.get_column("percent")), reverse=True)], 6)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        if index:
            axes.set_ylim(0, 1)
        heading(figure, head)
        label_ends(figure, axes, [(line.label, line.look.colour, line.x[-1], line.mean[-1]) for line in lines])
        last = percent_text(min(line.x[-1] for line in lines))
        ends = "; ".join(
            f"{line.label} {line.mean[-1]:.3f}" + (f" against {floor[-1]:.3f} by chance" if index else "")
            for line, floor in zip(lines, floors, strict=True)
        )
        what = "Jaccard index" if index else "Jaccard index less that of chance, by one less that of chance,"
        description = f"{what} of two replicates' masks by layer, mean over pairs. At {last}% of the weights: {ends}."
        title = "Mask overlap between replicates" if index else "Mask overlap between replicates beyond chance"
        return render(figure, name, title, description, drawn.plot_share)


def layer_label(layer: str) -> str:
    """``features.0.weight`` -> ``features.0``."""
    return "All layers" if layer == ALL else layer.removesuffix(".weight")


def _floats(frame: pl.DataFrame, column: str) -> Floats:
    values: Floats = frame.get_column(column).cast(pl.Float64).to_numpy()
    return values


def _draw(axes: Axes, line: _Line, *, every: tuple[int, int] = (0, 1), width: float = 1.8) -> None:
    look = line.look
    style: Any = (0, tuple(length / width for length in look.dash)) if look.dash else "solid"
    marks: dict[str, Any] = {"markersize": 5.5, "markeredgewidth": 0.6, "markeredgecolor": "white"}
    axes.plot(line.x, line.mean, color=look.colour, linewidth=width, linestyle=style, marker=look.marker,
              markevery=every, gid=f"line-{line.key}", zorder=3, **marks)  # fmt: skip
    if line.hollow.any():
        there = line.hollow > 0
        axes.plot(line.x[there], line.mean[there], look.marker, markersize=5.0, markeredgewidth=1.2,
                  markerfacecolor="white", markeredgecolor=look.colour, zorder=3.5)  # fmt: skip


def _percentages(axes: Axes, percents: Sequence[float], most: int) -> None:
    """Weights remaining, falling to the right on a logarithm; every level has a tick, at most ``most`` a number."""
    first, last = percents[0], percents[-1]
    edge = max(first / last, 1.2) ** 0.025
    axes.set_xscale("log")
    axes.set_xlim(first * edge, last / edge)
    steps = len(percents) - 1
    least = max(1, -(-steps // (most - 1)))
    by = next((n for n in range(least, 2 * least + 1) if steps % n == 0), least)
    named = list(percents[::by])
    if named[-1] != last:
        named[-1] = last
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(named, [percent_text(p) for p in named])
    axes.set_xticks(percents, minor=True)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("weights remaining, %", labelpad=7, fontsize=LABEL)


def _vertical(axes: Axes, share: bool, means: Sequence[Floats]) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    form = (lambda value, _: f"{100 * value:.4g}%") if share else (lambda value, _: examples(value))
    axes.yaxis.set_major_formatter(FuncFormatter(form))
    every = np.concatenate(list(means))
    if every.min() == every.max():
        margin = abs(every.max()) * 0.5 or 1.0
        axes.set_ylim(every.min() - margin, every.max() + margin)


def _spoken(value: float, share: bool) -> str:
    return f"{100 * value:.2f}%" if share else f"{value:,.0f}"
