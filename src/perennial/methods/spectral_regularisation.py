"""Spectral regularisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perennial.methods.base import Regulariser, Scalar, Tensors, number, whole
from perennial.units import UnitMap, fan_in


class SpectralRegularisationState(NamedTuple):
    """State of :class:`SpectralRegularisation`."""

    direction: dict[str, Tensor]
    """The input direction that each matrix stretches most, as far as the power iteration has found it: [fan in], of
    length 1."""


@dataclass(frozen=True)
class SpectralRegularisation(Regulariser):
    r"""Keep the largest singular value of every weight matrix near 1, and biases near 0.

    .. math:: \Omega(W, b) = \sum_l \left(\sigma_{\max}(W_l)^k - 1\right)^2 + \sum_l \lVert b_l \rVert^2

    over all weights of linear and convolutional layers, a convolution's as [out, fan in], and all vectors whose name
    ends in "bias". One power iteration a step follows the largest singular value,

    .. math:: u = \frac{W v}{\lVert W v \rVert}, \qquad v \leftarrow \frac{W^\top u}{\lVert W^\top u \rVert}, \qquad
        \sigma = \lVert W v \rVert,

    and its gradient is that with u and v held fixed, :math:`u v^\top`. It starts from the same vector for everybody,
    :math:`v_i \propto \cos i`, and so its first steps take :math:`\sigma` for smaller than it is. A matrix of zeros has
    :math:`\sigma = 0` and no gradient.

    Source: Lewandowski et al., arXiv 2406.06811.
    """

    rate: Scalar = number(1e-3, low=0.0)
    """Weight of the penalty in the loss, or step size of its own decoupled step, r."""
    coupled: bool = False
    """The penalty belongs to the loss, instead of a step of its own after the optimizer's."""
    power: int = whole(2, low=1)
    """Exponent of the largest singular value, k."""

    def init(self, params: Tensors, units: UnitMap) -> SpectralRegularisationState:
        matrices = units.matrices(params)
        if not matrices:
            raise ValueError("spectral_regularisation found no weight matrix in this network")
        start = {}
        for name in matrices:
            w = params[name]
            wave = torch.cos(torch.arange(fan_in(w), dtype=torch.float64, device=w.device))
            start[name] = (wave / torch.linalg.vector_norm(wave)).to(w.dtype)
        return SpectralRegularisationState(start)

    def acts_on(self, params: Tensors, units: UnitMap) -> list[str]:
        return [*units.matrices(params), *_biases(params)]

    def advance(
        self, params: Tensors, state: SpectralRegularisationState, units: UnitMap
    ) -> SpectralRegularisationState:
        return SpectralRegularisationState(
            {name: _stretched(params[name].flatten(1), v) for name, v in state.direction.items()}
        )

    def penalty(self, params: Tensors, state: SpectralRegularisationState, units: UnitMap) -> Tensor:
        penalties = [(params[name] ** 2).sum() for name in _biases(params)]
        for name, v in state.direction.items():
            w = params[name].flatten(1)
            u = _unit(w.detach() @ v)
            sigma = (u * (w @ v)).sum()
            penalties.append((sigma**self.power - 1) ** 2)
        return sum(penalties[1:], penalties[0])


def _biases(params: Tensors) -> list[str]:
    return [name for name, w in params.items() if w.dim() == 1 and name.endswith("bias")]


def _unit(vector: Tensor) -> Tensor:
    """The vector at length 1; zeros stay."""
    length = torch.linalg.vector_norm(vector)
    return vector / torch.where(length == 0, 1.0, length)


def _stretched(w: Tensor, v: Tensor) -> Tensor:
    """One power iteration from v. Where w takes v to zero it stays: from zero there would be no way back."""
    onward = w.T @ _unit(w @ v)
    return torch.where(torch.linalg.vector_norm(onward) == 0, v, _unit(onward))
