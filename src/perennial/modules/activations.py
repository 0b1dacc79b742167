"""Activation functions that give two units for one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Doubling(nn.Module):
    """An activation function whose output has twice the units of its input."""

    def __init__(self, dim: int = 1) -> None:
        """``dim`` is the dimension that units lie along."""
        super().__init__()
        self.dim = dim

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class CReLU(_Doubling):
    r"""Concatenated rectifiers: of every unit its positive and its negative part.

    .. math:: \mathrm{CReLU}(z) = [\max(z, 0), \max(-z, 0)]

    One of the two passes the gradient on whatever the sign of z, so that no unit can die. The output has twice the
    units along ``dim``, the positive parts first, and the layer that reads it needs twice the inputs:
    ``nn.Linear(8, 16), CReLU(), nn.Linear(32, 4)``.

    Sources: Shang et al., ICML 2016; against loss of plasticity: Abbas et al., CoLLAs 2023 (arXiv 2303.07507).

    Args:
        dim: the dimension that units lie along: 1 for [batch, units] and for convolutions, -1 for [batch, tokens,
            units].
    """

    def forward(self, z: Tensor) -> Tensor:
        """[..., units, ...] -> [..., 2 units, ...]."""
        return torch.cat([torch.relu(z), torch.relu(-z)], self.dim)


class DeepFourier(_Doubling):
    r"""Deep Fourier features: of every unit its sine and its cosine.

    .. math:: F(z) = [\sin z, \cos z]

    Where one of the two is flat the other is close to linear, so that every unit always passes a gradient on. The
    output has twice the units along ``dim``, the sines first, and the layer that reads it needs twice the inputs.

    Source: Lewandowski et al., arXiv 2410.20634.

    Args:
        dim: the dimension that units lie along: 1 for [batch, units] and for convolutions, -1 for [batch, tokens,
            units].
    """

    def forward(self, z: Tensor) -> Tensor:
        """[..., units, ...] -> [..., 2 units, ...]."""
        return torch.cat([torch.sin(z), torch.cos(z)], self.dim)
