"""What one lane is, and what it carries from step to step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perennial.methods import Intervention, Method, Rule


@dataclass(frozen=True)
class Lane:
    """One run: a seed, an optimizer rule, and what keeps the network plastic."""

    seed: int
    """Fixes data, tasks, initial weights and noise, each as a stream of its own."""
    rule: Rule
    """Turns gradients into an update."""
    interventions: tuple[Intervention, ...] = ()
    """Change parameters after the rule, in this order."""

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise TypeError(f"{self.rule!r} is not an optimizer rule; interventions go into Lane(seed, rule, (...,))")
        for method in self.interventions:
            if not isinstance(method, Intervention):
                raise TypeError(f"{method!r} is not an intervention")

    @property
    def methods(self) -> tuple[Method, ...]:
        """The rule, then the interventions."""
        return (self.rule, *self.interventions)


class LaneState(NamedTuple):
    """Everything that a lane carries from step to step. With several lanes every tensor has a lane dimension."""

    params: dict[str, Tensor]
    """Parameters by name."""
    buffers: dict[str, Tensor]
    """The network's buffers by name, such as running statistics."""
    methods: tuple[Any, ...]
    """The state of the rule and of each intervention."""
    step: Tensor
    """int32 []: steps made."""
    diverged: Tensor
    """int32 []: the step whose loss or updated weights were not finite; the lane keeps what it held before that step.
    -1 while there is none."""
    replaced: Tensor
    """int32 []: units that interventions have re-initialised so far."""
    loss: Tensor
    """float64 []: sum of the online loss since the sums were last emptied."""
    correct: Tensor
    """float64 []: sum of the online accuracy since then; stays 0 for regression."""
    plasticity: Tensor
    """float64 []: sum since then of the sample plasticity, of the samples at which it was taken."""
    held_out: Tensor
    """float64 []: sum since then of the held-out accuracy at the ends of tasks; stays 0 where nothing is held out."""


def structure(method: Method) -> tuple[Any, ...]:
    """What must be equal for two methods to share a program: the class and every setting that is not a number."""
    scalars = method.scalars()
    return (
        type(method).name,
        *(
            (f.name, getattr(method, f.name) is None if f.name in scalars else getattr(method, f.name))
            for f in dataclasses.fields(method)
        ),
    )


def hyper_parameters(lanes: Sequence[Lane], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The numbers of all lanes' methods as one vector a number: {"0.lr": [lanes], "1.replacement_rate": ...}."""
    found = {}
    for position, method in enumerate(lanes[0].methods):
        for name in method.scalars():
            if getattr(method, name) is not None:
                values = [getattr(lane.methods[position], name) for lane in lanes]
                found[f"{position}.{name}"] = torch.tensor(values, dtype=dtype, device=device)
    return found


def bind(methods: Sequence[Method], numbers: dict[str, Tensor]) -> list[Method]:
    """The methods with one lane's numbers in place of their own."""
    bound = []
    for position, method in enumerate(methods):
        mine = {k.partition(".")[2]: v for k, v in numbers.items() if k.partition(".")[0] == str(position)}
        bound.append(method.bound(mine))
    return bound
