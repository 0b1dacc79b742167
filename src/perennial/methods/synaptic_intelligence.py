"""Streaming synaptic intelligence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perennial.methods.anchored import Travel, TravelState, moving
from perennial.methods.base import Context, Scalar, Tensors, number, unbiasing


@dataclass(frozen=True)
class SynapticIntelligence(Travel):
    r"""Synaptic intelligence (Zenke, Poole and Ganguli, ICML 2017), in a streaming form after Elsayed and Mahmood (ICLR
    2024, "S-SI").

    A weight is important if its own movements lowered the loss, by the distance that it came:

    .. math::
        \omega \leftarrow \beta_I \omega + (1 - \beta_I)(-g\,\Delta w), \qquad
        \delta \leftarrow \beta_I \delta + (1 - \beta_I)\,\Delta w, \qquad
        \Omega = \hat\omega / (\hat\delta^2 + \epsilon),

    .. math:: w \leftarrow w - \alpha \left( g + \kappa\,\Omega (w - \hat w) \right)

    with the averages bias-corrected, the anchor :math:`\bar w \leftarrow \beta_w \bar w + (1 - \beta_w)\, w` of the
    weights before the step, and :math:`\Omega` as it was before the step. Each gradient meets the movement
    that it caused, as in the path integral of Zenke et al. The published streaming code pairs a gradient with the
    movement before it and takes the first weights for a movement from zero. :math:`\Omega` can be negative, as there.
    """

    strength: Scalar = number(0.1, low=0.0)
    """How strongly important weights are held, kappa."""
    eps: Scalar = number(1e-3, low=0.0, open_low=True)
    """Added to the squared movement, epsilon (the paper's xi)."""

    def step(self, params: Tensors, state: TravelState, context: Context) -> tuple[dict[str, Tensor], TravelState]:
        changed, anchor, path, travelled, ages = {}, {}, {}, {}, self.aged(params, state)
        for name, w in params.items():
            grad = context.grads[name]
            anchor[name] = moving(state.anchor[name], w, self.anchor_decay)
            # One movement fewer than steps; before the first, zero times a finite factor.
            factor = unbiasing(tuple((age - 1).clamp(min=1) for age in ages[name]), self.importance_decay)
            importance = state.first[name] * factor / (torch.square(state.second[name] * factor) + self.eps)
            changed[name] = self.moved(w, grad, importance, anchor[name], ages[name])
            step = changed[name] - w
            path[name] = moving(state.first[name], -grad * step, self.importance_decay)
            travelled[name] = moving(state.second[name], step, self.importance_decay)
        return changed, TravelState(anchor, path, travelled, ages)
