"""Watching a network while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.attach.arguments import as_call, bare_model, bare_optimizer, running_on
from perennial.attach.optimizer_state import skipped
from perennial.metrics import METRICS
from perennial.monitor.findings import THRESHOLDS, Finding, Threshold, findings
from perennial.monitor.reading import Reading, read
from perennial.units import UnitMap, trace

DEFAULT = (
    "dead_units",
    "dormant_units",
    "saturated_units",
    "duplicate_units",
    "effective_rank_entropy",
    "weight_magnitude",
    "gradient_norm_l2",
)
"""Metrics that a monitor takes unless told otherwise."""

_READABLE = ("units", "features", "weights", "change", "gradients")


class Monitor:
    """Reads a network's health on a fixed input, on demand or every so many optimizer steps, and says what is wrong.

    Example::

        monitor = perennial.Monitor(model, batch, optimizer=optimizer)
        ...                                   # the loop stays as it is
        print(monitor.history[-1])            # a table, layer by layer
        for finding in monitor.findings():    # what is wrong, since when, and what there is against it
            print(finding)

    A reading is one forward pass in evaluation mode on the example, and the metrics of what the readers of hidden units
    were given. Training is not changed by a bit: modes, buffers, gradients and random states are put back, and no
    module gets a hook.

    Args:
        model: any module; inside DDP or ``torch.compile`` too.
        example: the input to read on: a tensor, a tuple of positional arguments, or a mapping of keywords. A few
            hundred samples that stay the same let readings be compared; ranks cannot exceed their number. It may be
            exchanged, ``monitor.example = ...``.
        optimizer: if given, a reading is taken after every ``every`` of its steps, with the gradients that it saw.
        every: optimizer steps from one reading to the next. The cost is one forward pass and the metrics.
        metrics: names of :data:`~perennial.metrics.METRICS` that are taken of units, features, weights, change (from
            the weights when the monitor was made, of which a copy is kept) or gradients. None: ``DEFAULT``.
        units: a map made by hand, in place of tracing.
        to: what is given each reading (see :mod:`perennial.monitor.trackers`).
        thresholds: when a metric is worth a word, in place of ``THRESHOLDS``.

    Raises:
        TypeError: not a module or an optimizer.
        ValueError: a metric that cannot be read so; an interval below 1; a network without hidden units that can be
            found, with the reasons.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        optimizer: Optimizer | None = None,
        every: int = 1000,
        metrics: Sequence[str] | None = None,
        units: UnitMap | None = None,
        to: Iterable[Callable[[Reading], None]] = (),
        thresholds: Mapping[str, Threshold] = THRESHOLDS,
    ) -> None:
        self._model = bare_model(model)
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every}; it is a whole number of optimizer steps, at least 1")
        self.metrics = tuple(DEFAULT if metrics is None else metrics)
        """Names of the metrics taken."""
        for name in (*self.metrics, *thresholds):
            if name not in METRICS or METRICS[name].of not in _READABLE:
                known = ", ".join(n for n, m in METRICS.items() if m.of in _READABLE)
                raise ValueError(f"a monitor cannot read {name!r}; it reads {known}")
        self.example = example
        """The input that readings are taken on."""
        self.every = every
        """Optimizer steps from one reading to the next."""
        self.steps = 0
        """Optimizer steps seen."""
        self.history: list[Reading] = []
        """Every reading so far."""
        self._to, self._thresholds = list(to), dict(thresholds)
        args, kwargs = as_call(example)
        with running_on(example, self._model):
            self.units = trace(self._model, *args, **kwargs) if units is None else units
            """The layers that are read."""
        if not len(self.units):
            reasons = "\n".join(f"  {name}: {why}" for name, why in self.units.refused) or "  it has no hidden layer"
            raise ValueError(f"no hidden units were found in this network:\n{reasons}")
        changing = any(METRICS[name].of == "change" for name in self.metrics)
        params = dict(self._model.named_parameters()) if changing else {}
        self._start = {n: p.detach().clone() for n, p in params.items() if p.is_floating_point()}
        self._handle: Any = None
        if optimizer is not None:
            self._optimizer = bare_optimizer(optimizer)
            self._handle = self._optimizer.register_step_post_hook(self._after_step)

    def read(self) -> Reading:
        """Take a reading now, keep it in the history, and give it to the trackers."""
        args, kwargs = as_call(self.example)
        with running_on(self.example, self._model):
            reading = read(
                self._model,
                self.units,
                args,
                kwargs,
                self.metrics,
                step=self.steps,
                start=self._start or None,
                gradients=self._gradients(),
            )
        self.history.append(reading)
        for tell in self._to:
            tell(reading)
        return reading

    def step(self) -> Reading | None:
        """Count an optimizer step, for loops without an optimizer that was given; a reading if one was due."""
        self.steps += 1
        return self.read() if self.steps % self.every == 0 else None

    def findings(self) -> list[Finding]:
        """What the last reading says is wrong, and since when; empty if nothing has crossed its threshold."""
        return findings(self.history, self._thresholds)

    def remove(self) -> None:
        """Stop reading; the history stays."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def table(self) -> Any:
        """Every reading as a tidy polars table: ``step``, ``layer`` (empty for the network), ``metric``, ``value``."""
        import polars

        schema = {"step": polars.Int64, "layer": polars.String, "metric": polars.String, "value": polars.Float64}
        return polars.DataFrame([row for reading in self.history for row in reading.rows()], schema=schema)

    def plot(self, path: str | Path) -> None:
        """Draw every metric over steps, a line a layer, as SVG, PNG or PDF by the path's ending."""
        from perennial.monitor.figure import draw

        draw(self.history, Path(path))

    def __str__(self) -> str:
        if not self.history:
            return f"Monitor of {len(self.units)} layers: no reading yet"
        said = [str(finding) for finding in self.findings()] or ["Nothing has crossed a threshold."]
        return "\n".join([str(self.history[-1]), *said])

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not skipped(self._optimizer):
            self.step()

    def _gradients(self) -> dict[str, Tensor]:
        if not any(METRICS[name].of == "gradients" for name in self.metrics):
            return {}
        return {n: p.grad for n, p in self._model.named_parameters() if p.grad is not None and not p.grad.is_sparse}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: steps, the first weights, the history; numbers, text and tensors alone."""
        return {
            "steps": self.steps,
            "start": {name: w.clone() for name, w in self._start.items()},
            "history": [
                {
                    "step": r.step,
                    "network": dict(r.network),
                    "layers": {n: dict(v) for n, v in r.layers.items()},
                    "units": dict(r.units),
                    "inapplicable": {n: dict(v) for n, v in r.inapplicable.items()},
                }
                for r in self.history
            ],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take up a saved state."""
        if saved["start"].keys() != self._start.keys():
            names = ", ".join(sorted(saved["start"].keys() ^ self._start.keys())[:5])
            raise ValueError(f"the saved state is of another network or other metrics: {names} is in one alone")
        for name, w in self._start.items():
            if saved["start"][name].shape != w.shape:
                there = list(saved["start"][name].shape)
                raise ValueError(
                    f"the saved state is of another network: {name} is {there} there, {list(w.shape)} here"
                )
        self.steps = int(saved["steps"])
        with torch.no_grad():
            for name, w in self._start.items():
                w.copy_(saved["start"][name])
        self.history = [Reading(**entry) for entry in saved["history"]]
