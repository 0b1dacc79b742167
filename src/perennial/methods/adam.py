"""Adam, with counts that a reset unit can start anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perennial.methods.base import Context, Rule, Scalar, Tensors, number, start_ages, unbiasing
from perennial.units import UnitMap


class AdamState(NamedTuple):
    """State of :class:`Adam`."""

    mean: dict[str, Tensor]
    """Moving average of the gradient by parameter, its shape."""
    square: dict[str, Tensor]
    """Moving average of the squared gradient by parameter, its shape."""
    ages: dict[str, tuple[Tensor, ...]]
    """Steps since the last reset, per dimension; see :func:`perennial.methods.base.start_ages`."""


@dataclass(frozen=True)
class Adam(Rule):
    r"""Adam (Kingma and Ba, ICLR 2015), with L2 or decoupled weight decay.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
        s \leftarrow \beta_2 s + (1 - \beta_2) g^2, \qquad
        w \leftarrow w - \alpha \frac{m / (1 - \beta_1^t)}{\sqrt{s / (1 - \beta_2^t)} + \epsilon}

    The count t belongs to the weight, not to the tensor: a weight whose unit was re-initialised starts again at t = 1
    with empty averages, so that its first updates have the size that a fresh Adam would give them. With no resets the
    update is that of ``torch.optim.Adam`` (``AdamW`` with ``decoupled``).
    """

    lr: Scalar = number(1e-3, low=0.0)
    """Step size, alpha."""
    beta1: Scalar = number(0.9, low=0.0, high=1.0, open_high=True)
    """Decay of the average gradient."""
    beta2: Scalar = number(0.999, low=0.0, high=1.0, open_high=True)
    """Decay of the average squared gradient."""
    eps: Scalar = number(1e-8, low=0.0, open_low=True)
    """Added to the root of the average squared gradient."""
    weight_decay: Scalar = number(0.0, low=0.0)
    """L2 coefficient (added to the gradient), or with ``decoupled`` the share of the weight taken per unit of lr."""
    decoupled: bool = False
    """Decay the weight itself (AdamW; Loshchilov and Hutter, ICLR 2019) instead of the gradient."""

    def init(self, params: Tensors, units: UnitMap) -> AdamState:
        zeros = {name: torch.zeros_like(w) for name, w in params.items()}
        return AdamState(zeros, dict(zeros), {name: start_ages(w) for name, w in params.items()})

    def step(self, params: Tensors, state: AdamState, context: Context) -> tuple[dict[str, Tensor], AdamState]:
        changed: dict[str, Tensor] = {}
        mean, square, ages = {}, {}, {}
        for name, w in params.items():
            g = context.grads[name]
            if self.decoupled:
                w = w - self.lr * self.weight_decay * w
            else:
                g = g + self.weight_decay * w
            m = mean[name] = self.beta1 * state.mean[name] + (1 - self.beta1) * g
            s = square[name] = self.beta2 * state.square[name] + (1 - self.beta2) * g * g
            ages[name] = tuple(age + 1 for age in state.ages[name])
            unbiased = m * unbiasing(ages[name], self.beta1)
            spread = torch.sqrt(s * unbiasing(ages[name], self.beta2))
            changed[name] = w - self.lr * unbiased / (spread + self.eps)
        return changed, AdamState(mean, square, ages)
