"""Normalize and project."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perennial.methods.base import Context, Intervention, Scalar, Tensors, number
from perennial.units import UnitMap, bias_beside


class NormalizeAndProjectState(NamedTuple):
    """State of :class:`NormalizeAndProject`."""

    norms: dict[str, Tensor]
    """[]: the norm at ``init`` of each hidden matrix, and of each norm layer's scale and offset together under the name
    of the scale."""


@dataclass(frozen=True)
class NormalizeAndProject(Intervention):
    r"""Scale every hidden matrix back to the norm it started with, at every step.

    .. math:: W \leftarrow W \left(1 + s \left(\frac{\lVert W_0 \rVert_F}{\lVert W \rVert_F} - 1\right)\right)

    A network whose layers are normalised computes the same at any scale of its weights, but learns the more slowly the
    larger they have grown; held at its norm a weight keeps its effective step size. The scale and offset of a norm
    layer (a vector named "weight" and the "bias" beside it) are scaled together to their joint initial norm. Output
    layers and the biases of matrices are left alone, and so is what is zero, or was at the start.

    This is the projection alone. The norms before every non-linearity that go with it are part of the network; without
    them the projection changes what it computes.

    Source: Lyle et al., "Normalization and effective learning rates in reinforcement learning", arXiv 2407.01800.
    """

    strength: Scalar = number(1.0, low=0.0, high=1.0)
    """Share of the way to the initial norm taken each step, s."""

    OFF = {"strength": 0.0}

    def init(self, params: Tensors, units: UnitMap) -> NormalizeAndProjectState:
        groups = _groups(params, units)
        if not groups:
            raise ValueError("normalize_and_project found neither a hidden weight matrix nor a norm in this network")
        return NormalizeAndProjectState({names[0]: _norm([params[n].detach() for n in names]) for names in groups})

    def acts_on(self, params: Tensors, units: UnitMap) -> list[str]:
        return [name for names in _groups(params, units) for name in names]

    def step(
        self, params: Tensors, state: NormalizeAndProjectState, context: Context
    ) -> tuple[dict[str, Tensor], NormalizeAndProjectState]:
        changed = {}
        for names in _groups(params, context.units):
            start, now = state.norms[names[0]], _norm([params[name] for name in names])
            nothing = (start == 0) | (now == 0)
            ratio = torch.where(nothing, 1.0, start / torch.where(nothing, 1.0, now))
            for name in names:
                changed[name] = params[name] * (1 + self.strength * (ratio - 1))
        return changed, state


def _groups(params: Tensors, units: UnitMap) -> list[tuple[str, ...]]:
    """The parameters of which each tuple shares one norm."""
    groups: list[tuple[str, ...]] = [(name,) for name in units.hidden_matrices(params)]
    for name, w in params.items():
        if w.dim() == 1 and name.endswith("weight"):
            bias = bias_beside(name)
            groups.append((name, bias) if bias in params else (name,))
    return groups


def _norm(parts: list[Tensor]) -> Tensor:
    norms: Tensor = torch.stack([torch.linalg.vector_norm(part) for part in parts])
    return norms[0] if len(parts) == 1 else norms.square().sum().sqrt()
