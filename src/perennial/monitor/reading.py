"""One look at a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from perennial import metrics
from perennial.metrics import METRICS, UnitStatistics
from perennial.units import Nonlinearity, UnitMap, observe
from perennial.units.trace import undisturbed


@dataclass(frozen=True)
class Reading:
    """The health of a network at one step. Printed, it is a table."""

    step: int
    """Optimizer steps made."""
    network: Mapping[str, float]
    """Metrics of the whole: of units over all layers to which they apply, of features the last layer's."""
    layers: Mapping[str, Mapping[str, float]]
    """By layer name, metrics of its units and features."""
    units: Mapping[str, int] = field(default_factory=dict)
    """By layer name, how many units it has."""
    inapplicable: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By layer name, metrics that say nothing of it, with the reason."""

    def flat(self, prefix: str = "plasticity") -> dict[str, float]:
        """One number a name, for trackers: ``plasticity/dead_units`` of the network, ``plasticity/fc1/dead_units`` of a
        layer. Of layer names, letters, digits and ``_ - .`` are kept."""
        found = {f"{prefix}/{name}": value for name, value in self.network.items()}
        for layer, values in self.layers.items():
            plain = "".join(c if c.isalnum() or c in "_-." else "_" for c in layer)
            found |= {f"{prefix}/{plain}/{name}": value for name, value in values.items()}
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One row a number: ``step``, ``layer`` (empty for the network), ``metric``, ``value``."""
        groups = {"": self.network, **self.layers}
        return [
            {"step": self.step, "layer": layer, "metric": name, "value": value}
            for layer, values in groups.items()
            for name, value in values.items()
        ]

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for values in (*self.layers.values(), self.network) for name in values))
        head = ["layer", "units", *names]
        lines = [head]
        for layer, values in self.layers.items():
            lines.append([layer, str(self.units.get(layer, "")), *(_cell(values.get(name)) for name in names)])
        lines.append(["network", str(sum(self.units.values())), *(_cell(self.network.get(name)) for name in names)])
        widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
        text = [
            "  ".join(
                cell.ljust(w) if at == 0 else cell.rjust(w)
                for at, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        reasons = dict.fromkeys(reason for by_name in self.inapplicable.values() for reason in by_name.values())
        return "\n".join([f"step {self.step:,}", *text, *(f"left out: {reason}" for reason in reasons)])


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def read(
    model: nn.Module,
    units: UnitMap,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: Sequence[str],
    *,
    step: int = 0,
    start: Mapping[str, Tensor] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
) -> Reading:
    """Take metrics of a network on one input, in evaluation mode. The network is left as it was.

    Args:
        model: the network.
        units: its map.
        args: the input's positional arguments.
        kwargs: its keywords.
        names: of metrics of units, features, weights, change and gradients.
        step: what to call it.
        start: earlier parameters by name, for metrics of change.
        gradients: by name; without them, metrics of gradients are left out.
    """
    with undisturbed(model), torch.no_grad():
        for module in model.modules():
            module.training = False  # not by eval(), in which some modules merge weights
        seen = observe(model, units, *args, **kwargs)
        if not seen.activations:
            raise ValueError(
                "in evaluation mode nothing reads the hidden units of this network on this example; it must be a batch "
                "[samples, ...] that goes through the layers"
            )
        layers: dict[str, dict[str, float]] = {}
        taken: dict[str, list[UnitStatistics]] = {}
        reasons: dict[str, dict[str, str]] = {}
        of_units = [name for name in names if METRICS[name].of in ("units", "features")]
        last: dict[str, float] = {}
        for layer, h in seen.activations.items():
            kind = seen.nonlinearities[layer]
            reasons[layer] = {n: why for n in of_units if (why := metrics.inapplicable(n, kind))}
            values = _of_layer(h, kind, [n for n in of_units if n not in reasons[layer]], taken)
            layers[layer] = {name: float(value) for name, value in values.items()}
            last = layers[layer]
        for layer in (layer.name for layer in units if layer.name not in seen.activations):
            reasons[layer] = dict.fromkeys(of_units, "nothing reads these units in evaluation mode on this example")
        network: dict[str, float] = {}
        for name in names:
            metric = METRICS[name]
            params = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
            if metric.of == "units" and taken.get(name):
                network[name] = float(metric.function(taken[name]))
            elif metric.of == "features" and name in last:
                network[name] = last[name]
            elif metric.of == "weights":
                network[name] = float(metric.function(params))
            elif metric.of == "change" and start is not None:
                network[name] = float(metric.function({n: params[n] for n in start if n in params}, start))
            elif metric.of == "gradients" and gradients:
                network[name] = float(metric.function(gradients))
    sizes = {layer.name: layer.size for layer in units if layer.name in layers}
    return Reading(step, network, layers, sizes, {n: by for n, by in reasons.items() if by})


def _of_layer(
    h: Tensor, kind: Nonlinearity, names: Sequence[str], taken: dict[str, list[UnitStatistics]]
) -> dict[str, Tensor]:
    """Metrics of one layer; the sums that those of units are made of are added to ``taken``."""
    h = metrics.features(h)
    by_units = h.shape[1] <= h.shape[0]  # else the Gram matrix of samples is the smaller one
    ranks = [name for name in names if METRICS[name].of == "features"]
    bounds = {"low": kind.low, "high": kind.high} if kind.bounded else {}
    sums = UnitStatistics.of(h, gram="duplicate_units" in names or (bool(ranks) and by_units), **bounds)
    found = {}
    for name in names:
        if name in ranks:
            found[name] = METRICS[name].function(sums if by_units and name != "numerical_rank" else h)
        else:
            found[name] = METRICS[name].function(sums)
            taken.setdefault(name, []).append(sums)
    return found
