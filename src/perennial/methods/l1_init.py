"""L1 regularisation toward the initial weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perennial.methods.base import Context, Regulariser, Scalar, Tensors, number
from perennial.methods.fresh import Initial, remember
from perennial.units import UnitMap


@dataclass(frozen=True)
class L1Init(Regulariser):
    r"""Pull every parameter toward the value it started from, each at the same speed.

    .. math:: \Omega(w) = \sum \lVert w - w_0 \rVert_1

    over all parameters. Decoupled it takes the proximal step, which is exact where the penalty has no gradient: a
    weight comes back to its start and stays there, instead of swinging about it.

    .. math:: w \leftarrow w_0 + \operatorname{sign}(d)\,\max(|d| - r, 0), \qquad d = w - w_0

    Coupled, the loss gets the penalty, whose gradient at :math:`w = w_0` is taken as 0.

    Source: the L1 variant in Kumar, Marklund and Van Roy, "Maintaining Plasticity via Regenerative Regularization",
    CoLLAs 2024 (arXiv 2308.11958), which is coupled.
    """

    rate: Scalar = number(1e-3, low=0.0)
    """Weight of the penalty in the loss, or how far a decoupled step takes every weight back, r."""
    coupled: bool = False
    """The penalty belongs to the loss, instead of a step of its own after the optimizer's."""

    def init(self, params: Tensors, units: UnitMap) -> Initial:
        return remember(params)

    def penalty(self, params: Tensors, state: Initial, units: UnitMap) -> Tensor:
        distances = [(w - state.initial[name]).abs().sum() for name, w in params.items()]
        return sum(distances[1:], distances[0])

    def step(self, params: Tensors, state: Initial, context: Context) -> tuple[dict[str, Tensor], Initial]:
        if self.coupled:
            return {}, state
        return {name: self.nearer(w, state.initial[name]) for name, w in params.items()}, state

    def nearer(self, w: Tensor, start: Tensor) -> Tensor:
        """The proximal step of one parameter, its shape; the rate may be one for each weight."""
        # Not start + sign(d) max(|d| - r, 0): rounding would move the weight even at a rate of 0.
        distance = w - start
        back = self.rate * distance.sign()
        arrived = torch.where(distance.abs() <= self.rate, start, w - back)
        return torch.where(back == 0, w, arrived)
