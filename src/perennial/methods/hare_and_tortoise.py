"""Hare and tortoise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from perennial.methods.base import Context, Intervention, Outcome, Scalar, Tensors, number, whole
from perennial.methods.fresh import falls_due
from perennial.units import UnitMap


class HareAndTortoiseState(NamedTuple):
    """State of :class:`HareAndTortoise`."""

    slow: dict[str, Tensor]
    """Moving average of each parameter from its initial value on, its shape: the tortoise."""


@dataclass(frozen=True)
class HareAndTortoise(Intervention):
    r"""Let slow weights follow the trained ones, and now and then start these anew from there.

    .. math:: \bar w \leftarrow \beta \bar w + (1 - \beta) w \quad\text{every step}, \qquad
        w \leftarrow \bar w \quad\text{now and then}

    The weights in training, the hare, adapt fast and lose their plasticity; the tortoise keeps what lasts. The
    optimizer's state is kept.

    Source: Lee et al., arXiv 2406.02596.
    """

    decay: Scalar = number(0.999, low=0.0, high=1.0)
    """Decay of the moving average, beta."""
    every: int | None = whole(1000, optional=True)
    """Optimizer steps from one fresh start to the next; 0: never; None: when a new task begins."""

    OFF = {"every": 0}

    def init(self, params: Tensors, units: UnitMap) -> HareAndTortoiseState:
        return HareAndTortoiseState({name: w.detach().clone() for name, w in params.items()})

    def step(
        self, params: Tensors, state: HareAndTortoiseState, context: Context
    ) -> tuple[dict[str, Tensor], HareAndTortoiseState]:
        slow = {name: self.decay * state.slow[name] + (1 - self.decay) * w for name, w in params.items()}
        return {}, HareAndTortoiseState(slow)

    def due(self, steps_made: int, task_ended: bool) -> bool:
        return falls_due(self.every, steps_made, task_ended)

    def event(self, params: Tensors, state: HareAndTortoiseState, context: Context) -> Outcome:
        # Copies: weights and average must not share memory, where a caller goes on in place.
        return Outcome({name: slow.clone() for name, slow in state.slow.items()}, state)
