"""Streaming Riemannian walk."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from perennial.methods.anchored import Travel, TravelState, moving
from perennial.methods.base import Context, Scalar, Tensors, number, unbiasing


@dataclass(frozen=True)
class RWalk(Travel):
    r"""Riemannian walk (Chaudhry et al., ECCV 2018), in a streaming form after Elsayed and Mahmood (ICLR 2024,
    "S-RWalk").

    Importance is the Fisher information and a score: how much the loss fell by a weight's own movement, by the
    distance that it came on the manifold of the outputs.

    .. math::
        F \leftarrow \beta_I F + (1 - \beta_I)\, g^2, \qquad
        w' = w - \alpha \left( g + \kappa (\hat F + s)(w - \hat w) \right),

    .. math:: s \leftarrow \tfrac12 s + \tfrac12
        \max\!\left(0, \frac{-g\,(w' - w)}{\tfrac12 \hat F (w' - w)^2 + \epsilon}\right)

    with F and the anchor, :math:`\bar w \leftarrow \beta_w \bar w + (1 - \beta_w)\, w` of the weights before the step,
    bias-corrected. The published streaming code fills F with squared weights in place of squared
    gradients, drops the score's average, and pairs a gradient with the movement before it: hyper-parameters tuned for
    it need not suit this one.
    """

    eps: Scalar = number(1e-3, low=0.0, open_low=True)
    """Added to the distance, epsilon."""

    def step(self, params: Tensors, state: TravelState, context: Context) -> tuple[dict[str, Tensor], TravelState]:
        changed, anchor, fisher, score, ages = {}, {}, {}, {}, self.aged(params, state)
        for name, w in params.items():
            grad = context.grads[name]
            anchor[name] = moving(state.anchor[name], w, self.anchor_decay)
            fisher[name] = moving(state.first[name], grad * grad, self.importance_decay)
            unbiased = fisher[name] * unbiasing(ages[name], self.importance_decay)
            changed[name] = self.moved(w, grad, unbiased + state.second[name], anchor[name], ages[name])
            step = changed[name] - w
            gained = -grad * step / (0.5 * unbiased * step * step + self.eps)
            score[name] = moving(state.second[name], gained.clamp(min=0), 0.5)
        return changed, TravelState(anchor, fisher, score, ages)
