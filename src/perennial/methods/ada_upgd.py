"""UPGD with Adam's moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perennial.methods.base import Context, Scalar, Tensors, number, start_ages, unbiasing
from perennial.methods.upgd import UPGD, UPGDState
from perennial.units import UnitMap


class AdaUPGDState(NamedTuple):
    """State of :class:`AdaUPGD`."""

    utility: dict[str, Tensor]
    """As in :class:`~perennial.methods.upgd.UPGDState`."""
    ages: dict[str, tuple[Tensor, ...]]
    """As in :class:`~perennial.methods.upgd.UPGDState`."""
    mean: dict[str, Tensor]
    """Moving average of the gradient by parameter, its shape."""
    square: dict[str, Tensor]
    """Moving average of the squared gradient by parameter, its shape."""
    moment_ages: dict[str, tuple[Tensor, ...]]
    """Steps since the last reset, per dimension, by parameter; see :func:`perennial.methods.base.start_ages`."""


@dataclass(frozen=True)
class AdaUPGD(UPGD):
    r"""UPGD with Adam's moments in the gradient's place (Elsayed and Mahmood, ICLR 2024, for reinforcement learning).

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
        w \leftarrow (1 - \alpha \lambda) w - 2 \alpha
            \left(\frac{\hat m}{\sqrt{\hat v} + \epsilon} + s\,\xi\right)(1 - \bar U)

    with the gate of :class:`~perennial.methods.upgd.UPGD`, of the gradient itself. The factor 2 makes a weight of
    utility zero take Adam's step; ``doubled=False`` leaves it out.
    """

    lr: Scalar = number(1e-3, low=0.0)
    """Step size, alpha."""
    beta1: Scalar = number(0.9, low=0.0, high=1.0, open_high=True)
    """Decay of the average gradient."""
    beta2: Scalar = number(0.999, low=0.0, high=1.0, open_high=True)
    """Decay of the average squared gradient."""
    eps: Scalar = number(1e-8, low=0.0, open_low=True)
    """Added to the root of the average squared gradient."""
    doubled: bool = True
    """Twice the step size on moments and noise, so that a weight of utility zero takes a step of the size of Adam's."""

    name = "ada_upgd"

    def init(self, params: Tensors, units: UnitMap) -> AdaUPGDState:  # type: ignore[override]
        zeros = {name: torch.zeros_like(w) for name, w in params.items()}
        ages = {name: start_ages(w) for name, w in params.items()}
        return AdaUPGDState(*super().init(params, units), zeros, dict(zeros), ages)

    def step(self, params: Tensors, state: AdaUPGDState, context: Context) -> tuple[dict[str, Tensor], AdaUPGDState]:  # type: ignore[override]
        free, gate = self.plasticity(params, UPGDState(state.utility, state.ages), context)
        changed, mean, square, ages = {}, {}, {}, {}
        for name, w in params.items():
            g = context.grads[name]
            m = mean[name] = self.beta1 * state.mean[name] + (1 - self.beta1) * g
            v = square[name] = self.beta2 * state.square[name] + (1 - self.beta2) * g * g
            ages[name] = tuple(age + 1 for age in state.moment_ages[name])
            spread = torch.sqrt(v * unbiasing(ages[name], self.beta2)) + self.eps
            update = self._update(name, w, m * unbiasing(ages[name], self.beta1) / spread, free[name], context)
            changed[name] = (1 - self.lr * self.weight_decay) * w - self.lr * update
        return changed, AdaUPGDState(gate.utility, gate.ages, mean, square, ages)
