"""What readings say in words: which layers, which measure, since when, and what there is against it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from perennial.metrics import METRICS
from perennial.monitor.reading import Reading


@dataclass(frozen=True)
class Threshold:
    """When a metric is worth a word."""

    value: float
    """What it is compared with."""
    kind: Literal["at least", "times the first", "of the first"]
    """``"at least"``: the metric is at or above the value. ``"times the first"``: at or above so many times its first
    reading. ``"of the first"``: at or below that share of its first reading."""
    why: str
    """What it means."""
    remedies: tuple[str, ...]
    """Names of what Perennial has against it."""

    def crossed(self, value: float, first: float) -> bool:
        """Whether a reading is worth a word, given the first of the same layer."""
        if not math.isfinite(value):
            return True
        if self.kind == "at least":
            return value >= self.value
        if self.kind == "times the first":
            return first > 0 and value >= self.value * first
        return first > 0 and value <= self.value * first


_REPLACING = ("ContinualBackprop", "ReDo", "SelfNormalizedResets")
_SHRINKING = ("ShrinkAndPerturb", "L2Init", "WeightClipping")

THRESHOLDS: Mapping[str, Threshold] = {
    "dead_units": Threshold(0.1, "at least", "these units pass on nothing and get no gradient", _REPLACING),
    "rarely_active_units": Threshold(
        0.25, "at least", "these units answer to fewer than 1% of the inputs", (*_REPLACING, "CReLU")
    ),
    "dormant_units": Threshold(0.25, "at least", "these units are silent beside the rest of their layer", _REPLACING),
    "saturated_units": Threshold(
        0.1, "at least", "these units are at a bound, where the gradient vanishes", ("normalize_layers", *_SHRINKING)
    ),
    "duplicate_units": Threshold(
        0.25, "at least", "these units are multiples of others", ("ContinualBackprop", "Parseval", "DeepFourier")
    ),
    "effective_rank_entropy": Threshold(
        0.5,
        "of the first",
        "the features spread over fewer directions than they did",
        ("ContinualBackprop", "Parseval", "SpectralRegularisation"),
    ),
    "rank_99": Threshold(
        0.5,
        "of the first",
        "the features spread over fewer directions than they did",
        ("ContinualBackprop", "Parseval", "SpectralRegularisation"),
    ),
    "weight_magnitude": Threshold(
        2.0, "times the first", "large weights make steps small beside them", (*_SHRINKING, "NormalizeAndProject")
    ),
}
"""For each metric, from where on :meth:`Monitor.findings` names it. They are rules of thumb, looked at layer by layer;
the guide shows where fresh networks and networks that have lost plasticity stand. Give your own to :class:`Monitor`."""


@dataclass(frozen=True)
class Finding:
    """One measure that has crossed its threshold in some layers, as of the last reading."""

    metric: str
    """Its name."""
    layers: tuple[str, ...]
    """The layers in which it has; empty for one that is of the whole network."""
    since: int
    """The step from whose reading on it has been so in one of them without a break."""
    value: float
    """Its worst value among them now; not finite if the network has diverged."""
    first: float
    """The first reading of that layer."""
    threshold: Threshold
    """What it has crossed."""

    def __str__(self) -> str:
        return self.words(f"since step {self.since:,}")

    def words(self, when: str) -> str:
        """The finding as a sentence, with other words for since when; none where they are empty."""
        when = f" {when}" if when else ""
        where = f" in {_listed(self.layers)}" if self.layers else ""
        metric = METRICS[self.metric]
        if not math.isfinite(self.value):
            return f"{metric.title}{where}: {self.value}{when}: activations or weights are not finite, it has diverged."
        amount = f"{self.value:.0%}" if metric.share else f"{self.value:.3g}"
        limit = f"{self.threshold.value:.0%}" if metric.share else f"{self.threshold.value:g}"
        against = {
            "at least": f"threshold {limit}",
            "times the first": f"{self.first:.3g} at first; threshold {self.threshold.value:g} times that",
            "of the first": f"{self.first:.3g} at first; threshold {self.threshold.value:g} of that",
        }[self.threshold.kind]
        return (
            f"{metric.title}{where}: {amount}{when} ({against}): {self.threshold.why}. "
            f"Against it: {', '.join(self.threshold.remedies)}."
        )


def findings(history: Sequence[Reading], thresholds: Mapping[str, Threshold]) -> list[Finding]:
    """What the last of some readings says, with a look back for since when; the measure with most layers first."""
    if not history:
        return []
    found = []
    for name, threshold in thresholds.items():
        whole = METRICS[name].of not in ("units", "features")
        series = _series(history, name, whole)
        since: dict[str, int] = {}
        for layer, values in series.items():
            first = values[0][1]
            for step, value in reversed(values):
                if not threshold.crossed(value, first):
                    break
                since[layer] = step
        since = {layer: step for layer, step in since.items() if series[layer][-1][0] == history[-1].step}
        if since:
            worst = max(since, key=lambda layer: _badness(threshold, series[layer]))
            layers = () if whole else tuple(since)
            value, first = series[worst][-1][1], series[worst][0][1]
            found.append(Finding(name, layers, min(since.values()), value, first, threshold))
    return sorted(found, key=lambda finding: (math.isfinite(finding.value), -len(finding.layers)))


def _series(history: Sequence[Reading], name: str, whole: bool) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every layer, or of the network under the empty name."""
    series: dict[str, list[tuple[int, float]]] = {}
    for reading in history:
        rows = {"": reading.network} if whole else reading.layers
        for layer, values in rows.items():
            if name in values:
                series.setdefault(layer, []).append((reading.step, values[name]))
    return series


def _badness(threshold: Threshold, values: list[tuple[int, float]]) -> float:
    first, last = values[0][1], values[-1][1]
    if not math.isfinite(last):
        return math.inf
    if threshold.kind == "at least":
        return last
    return last / first if threshold.kind == "times the first" else -last / max(first, 1e-30)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more layers" if len(names) > 4 else shown
