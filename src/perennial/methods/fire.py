"""FIRE: orthogonal restarts of the hidden weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perennial.methods.base import Context, Intervention, Outcome, Tensors, whole, whole_parameter
from perennial.methods.fresh import falls_due
from perennial.units import UnitMap


@dataclass(frozen=True)
class FIRE(Intervention):
    r"""Now and then, replace every hidden matrix by the orthogonal one that is nearest to it, scaled.

    .. math::
        X \leftarrow W / \lVert W \rVert_F, \qquad
        X \leftarrow \tfrac32 X - \tfrac12 X X^\top X \;\text{(n times)}, \qquad
        W \leftarrow \sqrt{d_{\text{out}} / d_{\text{in}}}\; X

    The Newton-Schulz iteration takes all singular values toward 1 and keeps the singular vectors: what was learned is
    changed as little as an orthogonal matrix allows. A singular value grows by at most one half an iteration, so that
    those below about :math:`(2/3)^n` of the norm do not get to 1. In a convolution each position of the kernel has an
    [out, in] matrix of its own, divided by the number of positions as well. A matrix of zeros stays; vectors and output
    layers are left alone.

    The weights are all new, so the optimizer's state of them starts anew.

    Source: FIRE, arXiv 2602.08040.
    """

    iterations: int = whole(10, low=1)
    """Newton-Schulz iterations, n."""
    every: int | None = whole(None)
    """Optimizer steps from one restart to the next; 0: never; None: when a new task begins."""

    OFF = {"every": 0}

    def init(self, params: Tensors, units: UnitMap) -> tuple[()]:
        if not units.hidden_matrices(params):
            raise ValueError("fire found no hidden weight matrix in this network to make orthogonal")
        return ()

    def acts_on(self, params: Tensors, units: UnitMap) -> list[str]:
        return list(units.hidden_matrices(params))

    def due(self, steps_made: int, task_ended: bool) -> bool:
        return falls_due(self.every, steps_made, task_ended)

    def event(self, params: Tensors, state: tuple[()], context: Context) -> Outcome:
        chosen = context.units.hidden_matrices(params)
        return Outcome(
            {name: self._orthogonal(params[name]) for name in chosen},
            state,
            {name: whole_parameter(params[name]) for name in chosen},
        )

    def _orthogonal(self, w: Tensor) -> Tensor:
        out, into = w.shape[:2]
        positions = math.prod(w.shape[2:])
        x = w.flatten(2).movedim(2, 0) if w.dim() > 2 else w  # [positions, out, in] or [out, in]
        length = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        x = x / torch.where(length == 0, 1.0, length)
        for _ in range(self.iterations):
            # The smaller of the two squares; both orders of the product are the same.
            cube = (x @ x.mT) @ x if out <= into else x @ (x.mT @ x)
            x = 1.5 * x - 0.5 * cube
        x = math.sqrt(out / into) / positions * x
        return x.movedim(0, 2).unflatten(2, w.shape[2:]) if w.dim() > 2 else x
