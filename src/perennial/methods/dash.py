"""DASH: direction-aware shrinking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perennial.methods.base import Context, Intervention, Outcome, Scalar, Tensors, number, whole
from perennial.methods.fresh import falls_due
from perennial.units import UnitMap


class DASHState(NamedTuple):
    """State of :class:`DASH`."""

    direction: dict[str, Tensor]
    """Moving average of each matrix's negative gradient, its shape, not bias-corrected."""


@dataclass(frozen=True)
class DASH(Intervention):
    r"""Direction-aware shrinking: now and then, shrink the weights that the loss no longer pulls where they point.

    .. math::
        d \leftarrow \beta d - (1 - \beta) g \quad\text{every step}, \qquad
        w_n \leftarrow w_n \operatorname{clamp}\!\left(\frac{w_n^\top d_n}{\lVert w_n \rVert \lVert d_n \rVert},
        \lambda, 1\right) \quad\text{now and then}

    for every row :math:`w_n` of every weight matrix; in a convolution for every kernel, of one output and one input
    channel. Where d is zero the weights stay as they are. Vectors (biases, norms) are left alone and the optimizer's
    state is kept.

    Source: Shin et al., arXiv 2410.23495. There the average is of gradients taken anew at fixed weights over the data
    that are at hand when the shrinking is due; here it is of the gradients of the training steps before, so that no
    data need to be kept.
    """

    floor: Scalar = number(0.3, low=0.0, high=1.0)
    """The factor of weights that point elsewhere, the smallest there is, lambda."""
    decay: Scalar = number(0.9, low=0.0, high=1.0, open_high=True)
    """Decay of the average negative gradient, beta."""
    every: int | None = whole(None)
    """Optimizer steps from one shrinking to the next; 0: never; None: when a new task begins."""

    OFF = {"floor": 1.0}

    def init(self, params: Tensors, units: UnitMap) -> DASHState:
        matrices = units.matrices(params)
        if not matrices:
            raise ValueError("dash found no weight matrix in this network to shrink")
        return DASHState({name: torch.zeros_like(params[name].detach()) for name in matrices})

    def acts_on(self, params: Tensors, units: UnitMap) -> list[str]:
        return list(units.matrices(params))

    def step(self, params: Tensors, state: DASHState, context: Context) -> tuple[dict[str, Tensor], DASHState]:
        return {}, DASHState(
            {
                name: self.decay * direction - (1 - self.decay) * context.grads[name]
                for name, direction in state.direction.items()
            }
        )

    def due(self, steps_made: int, task_ended: bool) -> bool:
        return falls_due(self.every, steps_made, task_ended)

    def event(self, params: Tensors, state: DASHState, context: Context) -> Outcome:
        return Outcome({name: self._shrunk(params[name], d) for name, d in state.direction.items()}, state)

    def _shrunk(self, w: Tensor, direction: Tensor) -> Tensor:
        dims = tuple(range(1 if w.dim() == 2 else 2, w.dim()))
        aim, still = _unit(direction, dims)
        cosine = (_unit(w, dims)[0] * aim).sum(dims, keepdim=True)
        factor = torch.where(still, 1.0, cosine).clamp(max=1.0)
        return w * torch.maximum(factor, factor.new_ones(()) * self.floor)


def _unit(vectors: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The vectors along ``dims`` at length 1, zeros as they are; and which are zero."""
    length = torch.linalg.vector_norm(vectors, dim=dims, keepdim=True)
    return vectors / torch.where(length == 0, 1.0, length), length == 0
