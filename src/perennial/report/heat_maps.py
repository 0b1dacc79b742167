"""Heat maps with their numbers written in: square ones beside each other, and weights of a model by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure

from perennial.report.figures import WIDE, heading
from perennial.report.svg import Drawing, drawing_style, render
from perennial.statistics import Floats

_SMALL = 9.0
"""Points of the names and numbers."""
_TITLE, _LEFT, _GAP = 44.0, 72.0, 28.0
_ROW = 26.0  # of a map by layer
_MANY = 8  # tasks; more stand two beside each other, so that their numbers can be read


def squares(
    name: str,
    title: str,
    panels: Mapping[str, Floats],
    names: Sequence[str],
    colours: str,
    limits: tuple[float, float],
    form: Callable[[float], str],
) -> Drawing:
    """Small multiples with a row and a column a task; what is NaN stays white.

    Args:
        name: of the drawing.
        title: of the drawing.
        panels: [tasks, tasks] by label.
        names: of the tasks.
        colours: matplotlib's name of a colour map.
        limits: the values at its ends.
        form: writes a number.
    """
    columns = 2 if len(names) > _MANY else 3
    across = min(columns, len(panels))
    down = math.ceil(len(panels) / across)
    side = (WIDE[0] - _LEFT - 10) / columns - _GAP
    long = max(map(len, names)) > 2
    step = side + (68 if long else 44)
    height = _TITLE + down * step
    size = min(_SMALL, side / len(names) / (0.64 * (len(form(limits[1])) + 0.2)))
    with drawing_style(name):
        figure = Figure(figsize=(WIDE[0] / 72, height / 72), facecolor="white")
        for at, (label, values) in enumerate(panels.items()):
            left, top = _LEFT + (at % across) * (side + _GAP), _TITLE + (at // across) * step + 18
            axes = figure.add_axes((left / WIDE[0], 1 - (top + side) / height, side / WIDE[0], side / height))
            _fill(axes, values, Normalize(*limits), colormaps[colours], form, size)
            axes.set_xticks(range(len(names)), names, rotation=45 if long else 0, ha="right" if long else "center",
                            rotation_mode="anchor" if long else "default")  # fmt: skip
            axes.set_yticks(range(len(names)), names if at % across == 0 else [""] * len(names))
            axes.set_title(label, fontsize=10, loc="left", color="#2b2b2b")
        heading(figure, title)
        said = "; ".join(f"{label}: {np.nanmean(v):.3g} in the mean" for label, v in panels.items() if _any(v))
        return render(figure, name, title, said, round((_LEFT + across * (side + _GAP)) / WIDE[0], 4))


def by_layer(
    name: str,
    title: str,
    panels: Mapping[str, Mapping[str, float]],
    form: Callable[[float], str],
    *,
    ratios: bool = False,
) -> Drawing | None:
    """A map a panel with a row a layer and a column a kind of matrix, below each other; None without a number.

    Args:
        name: of the drawing.
        title: of the drawing.
        panels: values by the matrix's qualified name, by label; NaN stays white. Columns are in the order of the names.
        form: writes a number.
        ratios: colours are logarithmic from 1; what is below 1 has the colour of 1.
    """
    matrices = list(dict.fromkeys(matrix for values in panels.values() for matrix in values))
    several = len({_stack(matrix) for matrix in matrices} - {""}) > 1
    places = {matrix: _place(matrix, several) for matrix in matrices}
    # the encoder before the decoder, as the data goes; those outside of layers last
    rows = sorted({row for row, _ in places.values()}, key=lambda row: (row[1] < 0, row[0] == "decoder", row[1]))
    order = _order(matrices, places)
    kinds = sorted(order, key=order.__getitem__)
    grids = {label: np.full((len(rows), len(kinds)), np.nan) for label in panels}
    for label, values in panels.items():
        for matrix, value in values.items():
            row, kind = places[matrix]
            grids[label][rows.index(row), kinds.index(kind)] = value
    grids = {label: grid for label, grid in grids.items() if _any(grid)}
    if not grids:
        return None
    top = max(float(np.nanmax(grid)) for grid in grids.values()) or 1.0
    scale = LogNorm(1.0, max(3 * top, 10.0), clip=True) if ratios else Normalize(0.0, 1.2 * top)
    tall, foot, named = _ROW * len(rows), 62.0, 18.0 if any(grids) else 0.0  # room for labels unless all are empty
    height = _TITLE + len(grids) * (tall + 6 + named) + foot
    with drawing_style(name):
        figure = Figure(figsize=(WIDE[0] / 72, height / 72), facecolor="white")
        for at, (label, grid) in enumerate(grids.items()):
            above = _TITLE + at * (tall + 6 + named) + named
            axes = figure.add_axes((0.13, 1 - (above + tall) / height, 0.84, tall / height))
            _fill(axes, grid, scale, colormaps["Blues"], form, _SMALL)
            axes.set_aspect("auto")
            axes.set_yticks(range(len(rows)), [_row_name(row) for row in rows])
            last = at == len(grids) - 1
            axes.set_xticks(range(len(kinds)), kinds if last else [""] * len(kinds), rotation=20, ha="right",
                            rotation_mode="anchor")  # fmt: skip
            if label:
                axes.set_title(label, fontsize=10, loc="left", color="#2b2b2b")
        heading(figure, title)
        said = [f"{label} from {np.nanmin(g):.3g} to {np.nanmax(g):.3g}, in the mean {np.nanmean(g):.3g}".strip()
                for label, g in grids.items()]  # fmt: skip
        return render(figure, name, title, "; ".join(said), 1.0)


def _any(values: Floats) -> bool:
    return bool(np.isfinite(values).any())


def _fill(
    axes: Axes, values: Floats, scale: Normalize, colours: Colormap, form: Callable[[float], str], size: float
) -> None:
    axes.grid(False)
    axes.imshow(np.ma.masked_invalid(values), cmap=colours, norm=scale)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            ground = colours(float(scale(value)))[:3]
            axes.text(column, row, form(value), ha="center", va="center", fontsize=size, color=_ink(ground))
    axes.tick_params(labelsize=_SMALL, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _ink(ground: Sequence[float]) -> str:
    """Dark or white, whichever has the higher contrast (WCAG) with a ground."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in ground]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#2b2b2b" if (light + 0.05) / 0.0745 > 1.05 / (light + 0.05) else "white"  # 0.0745: of #2b2b2b


def _stack(matrix: str) -> str:
    """``encoder`` or ``decoder``, if the name says one of them."""
    return next((part for part in matrix.split(".") if part in ("encoder", "decoder")), "")


def _place(matrix: str, several: bool) -> tuple[tuple[str, int], str]:
    """The layer (stack, empty if there is but one, and number, -1 for none) and the kind of a matrix by its name."""
    parts = matrix.removesuffix(".weight").split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return ("", -1), " ".join(parts[-2:])
    # T5 numbers the parts of a block, whose names differ anyway; other numbers, as of experts, tell matrices apart
    inner = [
        part
        for before, part in pairwise(parts[at:])
        if part not in ("self", "dense", "layer") and not (before == "layer" and part.isdigit())
    ]
    return (_stack(matrix) if several else "", int(parts[at])), " ".join(inner)


def _order(matrices: Sequence[str], places: Mapping[str, tuple[tuple[str, int], str]]) -> dict[str, int]:
    """Of each kind, where it first stands among the matrices; those outside of layers last."""
    found: dict[str, int] = {}
    for at, matrix in enumerate(matrices):
        (_, layer), kind = places[matrix]
        found.setdefault(kind, at if layer >= 0 else len(matrices) + at)
    return found


def _row_name(row: tuple[str, int]) -> str:
    stack, layer = row
    return f"{stack} layer {layer + 1}".strip() if layer >= 0 else "others"
