"""L2 regularisation toward the initial weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from perennial.methods.base import Regulariser, Scalar, Tensors, number
from perennial.methods.fresh import Initial, remember
from perennial.units import UnitMap


@dataclass(frozen=True)
class L2Init(Regulariser):
    r"""Regenerative regularisation: pull every parameter toward the value it started from.

    .. math:: \Omega(w) = \tfrac12 \sum \lVert w - w_0 \rVert^2

    over all parameters, biases and norms included. Weights that the loss no longer moves go back to where they could
    learn; plain weight decay would take them to zero instead.

    Source: Kumar, Marklund and Van Roy, "Maintaining Plasticity via Regenerative Regularization", CoLLAs 2024 (arXiv
    2308.11958). There the penalty is part of the loss (``coupled=True``); under plain SGD of step size :math:`\alpha`
    that is the decoupled step of rate :math:`\alpha r`.
    """

    rate: Scalar = number(1e-3, low=0.0)
    """Weight of the penalty in the loss, or step size of its own decoupled step, r."""
    coupled: bool = False
    """The penalty belongs to the loss, instead of a step of its own after the optimizer's."""

    def init(self, params: Tensors, units: UnitMap) -> Initial:
        return remember(params)

    def penalty(self, params: Tensors, state: Initial, units: UnitMap) -> Tensor:
        squares = [((w - state.initial[name]) ** 2).sum() for name, w in params.items()]
        return 0.5 * sum(squares[1:], squares[0])
