"""What the streaming methods against forgetting share: important weights are held near their own average.

The papers keep the weights at the end of a task. Where nothing announces a task there is no such moment; Elsayed and
Mahmood (ICLR 2024) put a moving average in its place, and a moving average of the importance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perennial.methods.base import Context, Rule, Scalar, Tensors, number, start_ages, unbiasing
from perennial.units import UnitMap


class AnchoredState(NamedTuple):
    """State of :class:`~perennial.methods.ewc.EWC` and :class:`~perennial.methods.mas.MAS`."""

    anchor: dict[str, Tensor]
    """Moving average of each weight, the parameter's shape, not bias-corrected."""
    importance: dict[str, Tensor]
    """Moving average of what makes a weight important, the parameter's shape, not bias-corrected."""
    ages: dict[str, tuple[Tensor, ...]]
    """Steps since the last reset, per dimension; see :func:`perennial.methods.base.start_ages`."""


class TravelState(NamedTuple):
    """State of :class:`~perennial.methods.synaptic_intelligence.SynapticIntelligence` and
    :class:`~perennial.methods.rwalk.RWalk`, which go by what a weight did on its way."""

    anchor: dict[str, Tensor]
    """Moving average of each weight, the parameter's shape, not bias-corrected."""
    first: dict[str, Tensor]
    """Of synaptic intelligence, the average decrease of the loss by the weight's own movements; of RWalk, the average
    squared gradient. The parameter's shape, not bias-corrected."""
    second: dict[str, Tensor]
    """Of synaptic intelligence, the average movement, not bias-corrected; of RWalk, the score. The parameter's shape.
    """
    ages: dict[str, tuple[Tensor, ...]]
    """Steps since the last reset, per dimension; see :func:`perennial.methods.base.start_ages`."""


@dataclass(frozen=True)
class Anchored(Rule):
    """Base of these rules: the hyper-parameters, and the pull."""

    lr: Scalar = number(0.01, low=0.0)
    """Step size, alpha."""
    strength: Scalar = number(1.0, low=0.0)
    """How strongly important weights are held, kappa."""
    importance_decay: Scalar = number(0.999, low=0.0, high=1.0, open_high=True)
    """Decay of the average importance."""
    anchor_decay: Scalar = number(0.999, low=0.0, high=1.0, open_high=True)
    """Decay of the average weight."""

    def moved(self, w: Tensor, grad: Tensor, importance: Tensor, anchor: Tensor, ages: tuple[Tensor, ...]) -> Tensor:
        """The weight after the step, its shape."""
        away = w - anchor * unbiasing(ages, self.anchor_decay)
        return w - self.lr * (grad + self.strength * importance * away)

    def aged(self, params: Tensors, state: AnchoredState | TravelState) -> dict[str, tuple[Tensor, ...]]:
        """The ages after this step."""
        return {name: tuple(age + 1 for age in state.ages[name]) for name in params}


def moving(old: Tensor, new: Tensor, decay: Scalar) -> Tensor:
    """The next value of a moving average."""
    return decay * old + (1 - decay) * new


class Importance(Anchored):
    """Base of the two whose importance is an average of the gradients' size."""

    def instant(self, grad: Tensor) -> Tensor:
        """This step's importance, the gradient's shape."""
        raise NotImplementedError(f"{type(self).__name__} defines no importance")

    def init(self, params: Tensors, units: UnitMap) -> AnchoredState:
        zeros = {name: torch.zeros_like(w) for name, w in params.items()}
        return AnchoredState(zeros, dict(zeros), {name: start_ages(w) for name, w in params.items()})

    def step(self, params: Tensors, state: AnchoredState, context: Context) -> tuple[dict[str, Tensor], AnchoredState]:
        changed, anchor, importance, ages = {}, {}, {}, self.aged(params, state)
        for name, w in params.items():
            grad = context.grads[name]
            anchor[name] = moving(state.anchor[name], w, self.anchor_decay)
            importance[name] = moving(state.importance[name], self.instant(grad), self.importance_decay)
            unbiased = importance[name] * unbiasing(ages[name], self.importance_decay)
            changed[name] = self.moved(w, grad, unbiased, anchor[name], ages[name])
        return changed, AnchoredState(anchor, importance, ages)


class Travel(Anchored):
    """Base of the two whose importance is about the way that a weight went."""

    def init(self, params: Tensors, units: UnitMap) -> TravelState:
        def zeros() -> dict[str, Tensor]:
            return {name: torch.zeros_like(w) for name, w in params.items()}

        return TravelState(zeros(), zeros(), zeros(), {name: start_ages(w) for name, w in params.items()})
