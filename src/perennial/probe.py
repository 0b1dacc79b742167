"""The health of saved networks: one reading a checkpoint, all on the same data, and what they say in words."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from perennial.attach.arguments import described
from perennial.checkpoints import (
    Checkpoint,
    in_order,
    load_into,
    open_checkpoint,
    sha256,
)
from perennial.metrics import METRICS
from perennial.metrics.registry import AMBIGUOUS
from perennial.monitor import DEFAULT, THRESHOLDS, Finding, Reading
from perennial.monitor.findings import findings
from perennial.monitor.reading import read
from perennial.units import UnitMap

FEW = 100
"""Samples below which shares of units say little."""


class ProbeError(ValueError):
    """What was asked for cannot be read; the text says why."""


@dataclass(frozen=True)
class Data:
    """What the networks are read on."""

    given: str
    """As it was given."""
    kind: Literal["random", "function", "file"]
    """What that is."""
    args: tuple[Any, ...]
    """The positional arguments of the network."""
    kwargs: dict[str, Any]
    """Its keywords."""
    samples: int
    """How many are used."""
    of: int
    """How many there were."""
    sha256: str = ""
    """Of the file, if it is one."""

    def __str__(self) -> str:
        inside = self.kwargs or (self.args if len(self.args) != 1 else self.args[0])
        what = described(inside).replace(" on cpu", "")
        return f"{what}, {'random numbers' if self.kind == 'random' else self.given}"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read."""

    path: str
    """As it was given."""
    label: str
    """What it is called in tables: ``step 500``, ``epoch 3``, or its name."""
    step: int | None
    """When it was saved, if that is known."""
    key: str
    """Where in the file the state dict was."""
    files: dict[str, str]
    """SHA-256 by file name."""


@dataclass(frozen=True)
class Probe:
    """Everything that ``perennial probe`` has found."""

    model: str
    """What the network is called."""
    data: Data
    """What it was read on."""
    metrics: tuple[str, ...]
    """Which metrics were asked for."""
    axis: str
    """By what the checkpoints are told apart; empty if only by the order in which they were given."""
    start: bool
    """Whether the first checkpoint is the start that was given for comparison."""
    checkpoints: tuple[Saved, ...]
    """In their order."""
    readings: tuple[Reading, ...]
    """One a checkpoint."""
    units: UnitMap
    """The layers, and what was refused."""
    findings: tuple[Finding, ...]
    """What is wrong as of the last checkpoint."""
    notes: tuple[str, ...]
    """What a reader of the numbers should know."""

    def words(self) -> list[str]:
        """The findings in words."""
        labels = {reading.step: saved.label for saved, reading in zip(self.checkpoints, self.readings, strict=True)}
        found = []
        for finding in self.findings:
            found.append(finding.words(f"since {labels[finding.since]}" if len(self.readings) > 1 else ""))
        return found

    def left_out(self) -> list[tuple[str, str]]:
        """(layers, why) of what is not in the last reading; layers with the same reason together."""
        last = self.readings[-1]
        reasons: dict[str, list[str]] = {}
        for layer, by_name in last.inapplicable.items():
            for why in by_name.values():
                reasons.setdefault(why, []).append(layer)
        for name, why in self.units.refused:
            reasons.setdefault(why, []).append(name)
        return [(_listed(list(dict.fromkeys(names))), why) for why, names in reasons.items()]

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values; a number that is not finite is None."""
        from perennial import __version__

        return {
            "perennial": __version__,
            "torch": torch.__version__,
            "model": self.model,
            "data": {
                "given": self.data.given,
                "kind": self.data.kind,
                "described": described(self.data.kwargs or self.data.args),
                "samples": self.data.samples,
                "of": self.data.of,
                "sha256": self.data.sha256 or None,
            },
            "metrics": list(self.metrics),
            "axis": self.axis or "the order given",
            "checkpoints": [
                {
                    "path": saved.path,
                    "label": saved.label,
                    "step": saved.step,
                    "start": self.start and at == 0,
                    "key": saved.key or None,
                    "sha256": saved.files,
                    "network": _finite(reading.network),
                    "layers": {
                        layer: {"units": reading.units[layer], **_finite(values)}
                        for layer, values in reading.layers.items()
                    },
                    "inapplicable": {layer: dict(by) for layer, by in reading.inapplicable.items()},
                }
                for at, (saved, reading) in enumerate(zip(self.checkpoints, self.readings, strict=True))
            ],
            "refused": [{"layer": name, "reason": why} for name, why in self.units.refused],
            "findings": [
                {
                    "metric": finding.metric,
                    "layers": list(finding.layers),
                    "since": finding.since if len(self.readings) > 1 else None,
                    **_finite({"value": finding.value, "first": finding.first}),
                    "threshold": finding.threshold.value,
                    "kind": finding.threshold.kind,
                    "remedies": list(finding.threshold.remedies),
                    "text": text,
                }
                for finding, text in zip(self.findings, self.words(), strict=True)
            ],
            "notes": list(self.notes),
        }


def probe(
    model: nn.Module,
    units: UnitMap,
    data: Data,
    paths: Sequence[Path],
    *,
    name: str = "",
    start: Path | None = None,
    metrics: Sequence[str] = (),
    key: str | None = None,
    watched: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Probe:
    """Read saved networks, one after another in the memory of one.

    Args:
        model: what the checkpoints are of; their weights are loaded into it.
        units: its map.
        data: what to read it on.
        paths: of the checkpoints.
        name: what to call the network. Empty: its class.
        start: the checkpoint that the others are compared with. None: the first of several.
        metrics: names. None: those of a monitor that need no gradient, and a few more.
        key: where in the files the state dict is.
        watched: goes through the places of the checkpoints, to show progress.

    Raises:
        CheckpointError: a checkpoint cannot be loaded into the network.
        ProbeError: a metric cannot be taken; a network cannot be read.
    """
    names = _chosen(metrics, changing=start is not None or len(paths) > 1)
    if not len(units):
        reasons = "; ".join(f"{name}: {why}" for name, why in units.refused[:5]) or "it has no hidden layer"
        raise ProbeError(f"no hidden units were found in this network: {reasons}")
    plan = _planned(paths, start, key)
    readings, saved, notes = [], [], []
    first: dict[str, Tensor] | None = None
    for at in watched(range(len(plan.paths))):
        path = plan.paths[at]
        checkpoint = plan.opened or open_checkpoint(path, key)
        notes += load_into(model, checkpoint)
        if at == 0 and any(METRICS[name].of == "change" for name in names):
            params = model.named_parameters()
            first = {name: p.detach().clone() for name, p in params if p.is_floating_point()}
        try:
            reading = read(model, units, data.args, data.kwargs, names, step=plan.steps[at] or 0, start=first)
        except Exception as error:
            what = " ".join(str(error).split())
            raise ProbeError(f"{path} cannot be read: {type(error).__name__}: {what}") from None
        readings.append(reading)
        known = plan.steps[at] if plan.axis and plan.labels[at] != "start" else None
        files = {file.name: sha256(file) for file in checkpoint.files}
        saved.append(Saved(str(path), plan.labels[at], known, checkpoint.key, files))
    thresholds = {n: t for n, t in THRESHOLDS.items() if n in names and (t.kind == "at least" or len(readings) > 1)}
    return Probe(
        name or type(model).__name__,
        data,
        names,
        plan.axis,
        start is not None,
        tuple(saved),
        tuple(readings),
        units,
        tuple(findings(readings, thresholds)),
        (*_notes(data, plan.axis, len(paths)), *dict.fromkeys(notes)),
    )


def _chosen(names: Sequence[str], changing: bool) -> tuple[str, ...]:
    """The metrics to take, checked."""
    if not names:
        default = tuple(name for name in DEFAULT if METRICS[name].of != "gradients")
        return (*default, "rank_99", "feature_activity", *(("distance_l2",) if changing else ()))
    for name in names:
        if name in AMBIGUOUS:
            raise ProbeError(f"--metric {name} is ambiguous or has another name here: {AMBIGUOUS[name]}")
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, 1)
            there = [n for n, m in METRICS.items() if m.of in ("units", "features", "weights", "change")]
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(there)}"
            raise ProbeError(f"there is no metric {name}: {hint}")
        of = METRICS[name].of
        if of == "change" and not changing:
            raise ProbeError(f"--metric {name} compares with earlier weights: give --start FILE or several checkpoints")
        if of not in ("units", "features", "weights", "change"):
            raise ProbeError(f"--metric {name} is taken of {of}, which a checkpoint does not have")
    return tuple(dict.fromkeys(names))


class _Plan(NamedTuple):
    axis: str  # by what checkpoints are told apart, as in Probe
    paths: list[Path]  # in their order, the start first
    steps: list[int]
    labels: list[str]
    opened: Checkpoint | None  # the only one


def _planned(paths: Sequence[Path], start: Path | None, key: str | None) -> _Plan:
    """Which checkpoint is read when. Several are opened once only for this, so that one at a time is in memory."""
    opened = [open_checkpoint(path, key) for path in paths[:1]]
    only = opened[0] if len(paths) == 1 and start is None else None
    stamps = [replace(c, state={}) for c in opened]
    del opened
    stamps += [replace(open_checkpoint(path, key), state={}) for path in paths[1:]]
    axis, numbers = in_order(stamps)
    order = sorted(range(len(paths)), key=lambda at: numbers[at])
    ordered, steps = [paths[at] for at in order], [numbers[at] for at in order]
    names = [path.name for path in ordered]
    if len(set(names)) < len(names):
        names = [str(path) for path in ordered]
    labels = [f"{counted_in(axis)} {step:,}" for step in steps] if axis else names
    if start is not None:
        begun = open_checkpoint(start, key).steps.get(axis)
        if begun is not None and begun > steps[0]:
            raise ProbeError(f"--start {start} was saved at {counted_in(axis)} {begun:,}, later than {labels[0]}")
        ordered, steps = [start, *ordered], [begun or 0, *steps]
        labels = ["start" if begun is None else f"{counted_in(axis)} {begun:,}", *labels]
    return _Plan(axis, ordered, steps, labels, only)


def counted_in(axis: str) -> str:
    """The word for what an entry of a checkpoint counts."""
    return next((word for word in ("epoch", "iteration") if word in axis), "step")


def _notes(data: Data, axis: str, checkpoints: int) -> list[str]:
    found = []
    if data.kind == "random":
        found.append(
            "Random inputs say less than real ones: units may be silent on noise alone, and ranks are those of noise. "
            "Give --data a file or a function with inputs that the network was made for."
        )
    if data.samples < FEW:
        found.append(
            f"Only {data.samples} samples: units that answer to rare inputs count as dead, and ranks cannot exceed "
            "their number (times positions, where a layer has some). A few hundred say more."
        )
    if data.samples < data.of:
        found.append(f"Read on the first {data.samples:,} of {data.of:,} samples; --samples changes that.")
    if not axis and checkpoints > 1:
        found.append("The checkpoints do not say at which step they were saved: they are in the order given.")
    return found


def cell(name: str, value: float | None) -> str:
    """A metric's value for readers: shares in percent, others to three digits."""
    if value is None:
        return ""
    return f"{value:.1%}" if METRICS[name].share else f"{value:.3g}"


def _finite(values: Any) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
