"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perennial.methods.base import Context, Rule, Scalar, Tensors, number
from perennial.units import UnitMap


class SGDState(NamedTuple):
    """State of :class:`SGD`."""

    velocity: dict[str, Tensor]
    """Running sum of gradients by parameter, its shape; empty without momentum."""


@dataclass(frozen=True)
class SGD(Rule):
    r"""Gradient descent, with momentum and L2 regularisation.

    .. math:: v \leftarrow \mu v + g + \lambda w, \qquad w \leftarrow w - \alpha v

    Without momentum, :math:`v = g + \lambda w`. The L2 term is the gradient of :math:`\tfrac{\lambda}{2} \|w\|^2`, on
    every weight and bias, as in the "L2" baseline of Dohare et al. (Nature, 2024). The same update as
    ``torch.optim.SGD``.
    """

    lr: Scalar = number(0.01, low=0.0)
    """Step size, alpha."""
    momentum: Scalar | None = number(None, low=0.0, high=1.0)
    """Decay of the running sum of gradients, mu; None keeps no such sum."""
    weight_decay: Scalar = number(0.0, low=0.0)
    """L2 coefficient, lambda, added to the gradient."""

    def init(self, params: Tensors, units: UnitMap) -> SGDState:
        if self.momentum is None:
            return SGDState({})
        return SGDState({name: torch.zeros_like(w) for name, w in params.items()})

    def step(self, params: Tensors, state: SGDState, context: Context) -> tuple[dict[str, Tensor], SGDState]:
        changed, velocity = {}, {}
        for name, w in params.items():
            v = context.grads[name] + self.weight_decay * w
            if self.momentum is not None:
                v = velocity[name] = self.momentum * state.velocity[name] + v
            changed[name] = w - self.lr * v
        return changed, SGDState(velocity)
