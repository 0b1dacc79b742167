"""Shrink and perturb."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from perennial.methods.base import Context, Intervention, Scalar, Tensors, number
from perennial.noise import elements


@dataclass(frozen=True)
class ShrinkAndPerturb(Intervention):
    r"""Shrink every weight a little and add a little noise, at every step.

    .. math:: w \leftarrow (1 - s) w + \sigma\,\xi, \qquad \xi \sim N(0, 1)

    The idea is of Ash and Adams (NeurIPS 2020), who do it once, when new data arrive. Dohare et al. (Nature, 2024) do
    it at every step: they shrink by the L2 term of the optimizer (``weight_decay`` of the rule, with ``shrink`` 0 here)
    and add the noise to every weight and bias after the step, not scaled by the step size.
    """

    shrink: Scalar = number(0.0, low=0.0, high=1.0)
    """Share of every weight and bias taken away a step, s."""
    noise_std: Scalar = number(1e-5, low=0.0)
    """Standard deviation of the noise added a step, sigma."""

    OFF = {"shrink": 0.0, "noise_std": 0.0}

    def step(self, params: Tensors, state: tuple[()], context: Context) -> tuple[dict[str, Tensor], tuple[()]]:
        return {
            name: (1 - self.shrink) * w + self.noise_std * context.noise.normal(name, elements(w)).to(w.dtype)
            for name, w in params.items()
        }, state
