"""Wasserstein regularisation toward the distribution of the initial weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from perennial.methods.base import Regulariser, Scalar, Tensors, number
from perennial.units import UnitMap


class WassersteinInitState(NamedTuple):
    """State of :class:`WassersteinInit`."""

    ordered: dict[str, Tensor]
    """The numbers that each parameter had at ``init``, ascending, [its number of elements]."""


@dataclass(frozen=True)
class WassersteinInit(Regulariser):
    r"""Pull the distribution of each parameter's numbers toward the one it started from.

    .. math:: \Omega(w) = \tfrac12 \sum_i \left(w_{(i)} - w_{0,(i)}\right)^2

    for every parameter tensor, with :math:`w_{(i)}` its i-th smallest number: up to a factor the squared 2-Wasserstein
    distance between both sets of numbers. The smallest weight is pulled to the smallest initial value and so on, so
    that weights may change places at no cost. Equal weights rank in the order in which they lie in memory.

    Every step sorts every parameter.

    Source: Lewandowski et al., arXiv 2312.00246.
    """

    rate: Scalar = number(1e-3, low=0.0)
    """Weight of the penalty in the loss, or step size of its own decoupled step, r."""
    coupled: bool = False
    """The penalty belongs to the loss, instead of a step of its own after the optimizer's."""

    def init(self, params: Tensors, units: UnitMap) -> WassersteinInitState:
        return WassersteinInitState({name: _ascending(w.detach()) for name, w in params.items()})

    def penalty(self, params: Tensors, state: WassersteinInitState, units: UnitMap) -> Tensor:
        squares = [((_ascending(w) - state.ordered[name]) ** 2).sum() for name, w in params.items()]
        return 0.5 * sum(squares[1:], squares[0])


def _ascending(param: Tensor) -> Tensor:
    return param.flatten().sort(stable=True).values
