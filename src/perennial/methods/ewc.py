"""Streaming elastic weight consolidation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from perennial.methods.anchored import Importance


@dataclass(frozen=True)
class EWC(Importance):
    r"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017), in the streaming form of Elsayed and Mahmood (ICLR
    2024, "S-EWC").

    .. math::
        F \leftarrow \beta_I F + (1 - \beta_I)\, g^2, \qquad
        \bar w \leftarrow \beta_w \bar w + (1 - \beta_w)\, w, \qquad
        w \leftarrow w - \alpha \left( g + \kappa \hat F (w - \hat w) \right)

    with both averages bias-corrected. The squared gradient of the loss stands for the diagonal of the Fisher
    information, and with one sample a step equals the empirical one.
    """

    def instant(self, grad: Tensor) -> Tensor:
        return grad * grad
