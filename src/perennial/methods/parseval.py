"""Parseval regularisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perennial.methods.base import Regulariser, Scalar, Tensors, number
from perennial.units import UnitMap


@dataclass(frozen=True)
class Parseval(Regulariser):
    r"""Keep the rows of every hidden matrix orthogonal and of one length.

    .. math:: \Omega(W) = \sum_l \lVert W_l W_l^\top - s I \rVert_F^2

    over the weights of hidden layers, a convolution's as [out, fan in]. More rows than columns cannot all be
    orthogonal; of such a matrix the columns are kept so, by :math:`\lVert W_l^\top W_l - s I \rVert_F^2`, which is less
    by a constant and can reach 0.

    Source: Chung et al., arXiv 2412.07224. Its scaling layers are part of the network, not of the penalty.
    """

    rate: Scalar = number(1e-3, low=0.0)
    """Weight of the penalty in the loss, or step size of its own decoupled step, r."""
    coupled: bool = False
    """The penalty belongs to the loss, instead of a step of its own after the optimizer's."""
    scale: Scalar = number(1.0, low=0.0, open_low=True)
    """The squared length that rows are kept at, s."""

    def init(self, params: Tensors, units: UnitMap) -> tuple[()]:
        if not units.hidden_matrices(params):
            raise ValueError("parseval found no hidden weight matrix in this network to keep orthogonal")
        return ()

    def acts_on(self, params: Tensors, units: UnitMap) -> list[str]:
        return list(units.hidden_matrices(params))

    def penalty(self, params: Tensors, state: tuple[()], units: UnitMap) -> Tensor:
        penalties = []
        for name in units.hidden_matrices(params):
            w = params[name].flatten(1)
            gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
            target = self.scale * torch.eye(gram.shape[0], dtype=w.dtype, device=w.device)
            penalties.append(((gram - target) ** 2).sum())
        return sum(penalties[1:], penalties[0])
