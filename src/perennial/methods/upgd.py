"""Utility-based perturbed gradient descent."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perennial.methods.base import Context, Rule, Scalar, Tensors, correction, number, start_ages
from perennial.noise import elements
from perennial.scores import first_order
from perennial.units import UnitMap


class UPGDState(NamedTuple):
    """State of :class:`UPGD`."""

    utility: dict[str, Tensor]
    """Moving average of each weight's utility, the parameter's shape, not bias-corrected."""
    ages: dict[str, tuple[Tensor, ...]]
    """Steps since the last reset, per dimension; see :func:`perennial.methods.base.start_ages`."""


@dataclass(frozen=True)
class UPGD(Rule):
    r"""Utility-based perturbed gradient descent (Elsayed and Mahmood, ICLR 2024): useful weights are protected, useless
    ones perturbed. First order, weight-wise, global scaling.

    .. math::
        U \leftarrow \beta U + (1 - \beta)(-g w), \qquad
        \hat U = \frac{U}{1 - \beta^t}, \qquad
        \bar U = \sigma\!\left(\hat U / \max \hat U\right), \qquad
        w \leftarrow (1 - \alpha \lambda) w - \alpha (g + s\,\xi)(1 - \bar U)

    with :math:`\xi` standard normal and the maximum over every weight of the network. The maximum is of the
    bias-corrected utility, as in the paper; the published code takes it of the uncorrected one, which saturates the
    gate for the first :math:`1 / (1 - \beta)` steps. Where no weight has positive utility the maximum is taken as the
    smallest positive number, so that a harmful weight learns at full speed and one of utility zero at half speed;
    nothing is divided by zero and no sign flips.
    """

    lr: Scalar = number(0.01, low=0.0)
    """Step size, alpha."""
    utility_decay: Scalar = number(0.999, low=0.0, high=1.0, open_high=True)
    """Decay of the average utility, beta."""
    noise_std: Scalar = number(0.001, low=0.0)
    """Standard deviation of the perturbation, s."""
    weight_decay: Scalar = number(0.0, low=0.0)
    """Decoupled weight decay, lambda."""

    def init(self, params: Tensors, units: UnitMap) -> UPGDState:
        return UPGDState(
            {name: torch.zeros_like(w) for name, w in params.items()},
            {name: start_ages(w) for name, w in params.items()},
        )

    def step(self, params: Tensors, state: UPGDState, context: Context) -> tuple[dict[str, Tensor], UPGDState]:
        utility, ages, corrected = {}, {}, {}
        for name, w in params.items():
            instant = first_order(w, context.grads[name])
            utility[name] = self.utility_decay * state.utility[name] + (1 - self.utility_decay) * instant
            ages[name] = tuple(age + 1 for age in state.ages[name])
            corrected[name] = utility[name] / correction(ages[name], self.utility_decay)
        largest = functools.reduce(torch.maximum, [u.amax() for u in corrected.values()])
        largest = largest.clamp(min=torch.finfo(largest.dtype).tiny)
        changed = {}
        for name, w in params.items():
            plastic = torch.sigmoid(-corrected[name] / largest)  # 1 - gate
            noise = self.noise_std * context.noise.normal(name, elements(w)).to(w.dtype)
            changed[name] = (1 - self.lr * self.weight_decay) * w - self.lr * (context.grads[name] + noise) * plastic
        return changed, UPGDState(utility, ages)
