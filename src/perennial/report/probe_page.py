"""The page of ``perennial probe``: in the report's style, and as self-contained."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from perennial.metrics import METRICS
from perennial.monitor.figure import NETWORK, colours, in_legend, metrics_of, panel
from perennial.probe import Probe, cell, counted_in
from perennial.report.svg import FONTS, Drawing, drawing_style, render
from perennial.report.templates import template
from perennial.report.words import examples

_SIZE = (4.6, 2.7)  # inches, of one of two or more figures beside each other
_NAMED = 5  # checkpoints whose names have room below an axis


def page(found: Probe) -> str:
    """The page as HTML: findings, tables, and for several checkpoints a figure a metric. It loads nothing."""
    last = found.readings[-1]
    layers = list(dict.fromkeys(name for values in last.layers.values() for name in values))
    whole = list(dict.fromkeys(name for reading in found.readings for name in reading.network))
    several = len(found.readings) > 1
    facts = found.as_json()
    return (
        template("probe.html.j2").render(
            fonts=Markup(FONTS),
            found=found,
            last=found.checkpoints[-1],
            findings=found.words(),
            left_out=found.left_out(),
            network=_rows(
                [(s.label, r.network) for s, r in zip(found.checkpoints, found.readings, strict=True)], whole
            ),
            network_titles=[METRICS[name].title for name in whole],
            layers=_rows(list(last.layers.items()), layers),
            layer_titles=[METRICS[name].title for name in layers],
            figures=[Markup(drawing.svg) for drawing in drawings(found)] if several else [],
            key=_key(found) if several else [],
            several=several,
            versions={name: facts[name] for name in ("perennial", "torch")},
        )
        + "\n"
    )


def drawings(found: Probe) -> list[Drawing]:
    """A figure a metric: its value over checkpoints, every layer a line, the network a thick one."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    drawn = []
    label = found.axis and counted_in(found.axis)
    for metric in metrics_of(found.readings):
        name = f"probe-{metric.replace('_', '-')}"
        with drawing_style(name):
            figure = Figure(figsize=_SIZE, layout="constrained")
            axis = figure.subplots()
            panel(axis, found.readings, metric, size=11.0)
            if label:
                axis.set_xlabel(label)
                axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: examples(value)))
            elif len(found.checkpoints) > _NAMED:
                axis.set_xlabel("checkpoint, in the order given")
            else:
                axis.set_xticks(
                    [reading.step for reading in found.readings],
                    [_short(saved.label) for saved in found.checkpoints],
                )
            title = METRICS[metric].title
            values = [r.network[metric] for r in found.readings if metric in r.network]
            ends = (
                f" The network: {cell(metric, values[0])} at first, {cell(metric, values[-1])} at last."
                if values
                else ""
            )
            drawn.append(render(figure, name, title, f"{title} by checkpoint, a line a layer.{ends}", 1.0))
    return drawn


def _key(found: Probe) -> list[dict[str, Any]]:
    by_layer = colours(found.readings)
    shown = in_legend(found.readings)
    key: list[dict[str, Any]] = [{"label": "network", "colour": NETWORK, "width": 3}]
    key += [{"label": layer, "colour": by_layer[layer], "width": 1.5} for layer in shown]
    if len(shown) < len(by_layer):
        key.append({"label": f"and {len(by_layer) - len(shown)} layers between them", "colour": "", "width": 0})
    return key


def _rows(groups: list[tuple[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    return [{"label": label, "cells": [cell(n, values.get(n)) for n in names]} for label, values in groups]


def _short(text: str) -> str:
    return text if len(text) <= 12 else f"{text[:5]}…{text[-6:]}"
