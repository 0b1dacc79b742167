"""Readings as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perennial.metrics import METRICS
from perennial.monitor.reading import Reading

NETWORK = "#1f1f1f"
"""Colour of the line of the whole network."""

IN_LEGEND = 8
"""Layers that a legend names; of more, as many that lie evenly between the first and the last."""

_FEW = 12


def draw(history: Sequence[Reading], path: Path) -> None:
    """A panel a metric: every layer a line, the network a thick one.

    Raises:
        ValueError: there is no reading.
    """
    from matplotlib.figure import Figure

    from perennial.report.svg import drawing_style

    if not history:
        raise ValueError("there is no reading to draw; take one with monitor.read()")
    names = metrics_of(history)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    with drawing_style("readings"):
        figure = Figure(figsize=(3.4 * columns, 2.4 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        handles: dict[str, Any] = {}
        for axis, name in zip(axes, names, strict=False):
            handles |= panel(axis, history, name)
        for axis in axes[len(names) :]:
            axis.set_visible(False)
        for axis in axes[max(0, len(names) - columns) : len(names)]:
            axis.set_xlabel("optimizer steps")
        shown = {k: handles[k] for k in ("network", *in_legend(history)) if k in handles}
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(5, len(shown)), fontsize=8)
        figure.savefig(path)


def panel(axis: Any, history: Sequence[Reading], name: str, size: float = 9.0) -> dict[str, Any]:
    """One metric over steps into a matplotlib axis: every layer a line, the network a thick one.

    Returns:
        The lines, by layer; that of the network as ``"network"``.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    handles = {}
    for layer, colour in colours(history).items():
        steps, values = _line([(r.step, r.layers.get(layer, {})) for r in history], name)
        if steps:
            (handles[layer],) = axis.plot(steps, values, color=colour, linewidth=1, **_marked(steps))
    steps, values = _line([(r.step, r.network) for r in history], name)
    if steps:
        (handles["network"],) = axis.plot(steps, values, color=NETWORK, linewidth=1.8, **_marked(steps))
    axis.set_title(METRICS[name].title, loc="left", fontsize=size)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    if METRICS[name].share:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_ylim(bottom=0)
    return handles


def metrics_of(history: Sequence[Reading]) -> list[str]:
    """Names of all metrics that some reading has."""
    return list(dict.fromkeys(name for r in history for by in (r.network, *r.layers.values()) for name in by))


def colours(history: Sequence[Reading]) -> dict[str, str]:
    """A colour a layer, from the first, dark, to the last, light."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    layers = list(dict.fromkeys(layer for r in history for layer in r.layers))
    shades = [0.25 + 0.6 * number / max(1, len(layers) - 1) for number in range(len(layers))]
    return {layer: to_hex(colormaps["viridis"](shade)) for layer, shade in zip(layers, shades, strict=True)}


def in_legend(history: Sequence[Reading]) -> list[str]:
    """The layers that a legend names."""
    layers = list(colours(history))
    if len(layers) <= IN_LEGEND:
        return layers
    return [layers[round(at * (len(layers) - 1) / (IN_LEGEND - 1))] for at in range(IN_LEGEND)]


def _marked(steps: Sequence[int]) -> dict[str, Any]:
    """Few readings are dots, so that what is between them is not taken for more."""
    return {"marker": "o", "markersize": 6 if len(steps) == 1 else 3} if len(steps) <= _FEW else {}


def _line(values: Sequence[tuple[int, Mapping[str, float]]], name: str) -> tuple[list[int], list[float]]:
    kept = [(step, found[name]) for step, found in values if name in found]
    return [step for step, _ in kept], [value for _, value in kept]
