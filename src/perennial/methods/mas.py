"""Streaming memory-aware synapses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from perennial.methods.anchored import Importance


@dataclass(frozen=True)
class MAS(Importance):
    r"""Memory-aware synapses (Aljundi et al., ECCV 2018), in the streaming form of Elsayed and Mahmood (ICLR 2024,
    "S-MAS").

    .. math::
        M \leftarrow \beta_I M + (1 - \beta_I)\, |g|, \qquad
        \bar w \leftarrow \beta_w \bar w + (1 - \beta_w)\, w, \qquad
        w \leftarrow w - \alpha \left( g + \kappa \hat M (w - \hat w) \right)

    with both averages bias-corrected. Aljundi et al. take the gradient of the squared norm of the outputs, which needs
    no labels; the streaming form takes that of the loss, which is there anyway.
    """

    def instant(self, grad: Tensor) -> Tensor:
        return grad.abs()
