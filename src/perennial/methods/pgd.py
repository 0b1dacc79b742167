"""Perturbed gradient descent."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from perennial.methods.base import Context, Rule, Scalar, Tensors, number


@dataclass(frozen=True)
class PGD(Rule):
    r"""Perturbed gradient descent: noise on every gradient.

    .. math:: w \leftarrow (1 - \alpha \lambda) w - \alpha (g + s\,\xi)

    with :math:`\xi` standard normal. Without decay this is the perturbed gradient descent of Zhou et al. (2019); with
    decay it is what Elsayed and Mahmood (ICLR 2024) compare UPGD with under the name of shrink and perturb. Its noise
    is scaled by the step size; that of :class:`~perennial.methods.shrink_and_perturb.ShrinkAndPerturb`, after Ash and
    Adams and Dohare et al., is not.
    """

    lr: Scalar = number(0.01, low=0.0)
    """Step size, alpha."""
    noise_std: Scalar = number(0.01, low=0.0)
    """Standard deviation of the perturbation, s."""
    weight_decay: Scalar = number(0.0, low=0.0)
    """Decoupled weight decay, lambda: the shrinking."""

    def step(self, params: Tensors, state: tuple[()], context: Context) -> tuple[dict[str, Tensor], tuple[()]]:
        changed = {}
        for name, w in params.items():
            noise = self.noise_std * context.noise.normal_like(name, w).to(w.dtype)
            changed[name] = (1 - self.lr * self.weight_decay) * w - self.lr * (context.grads[name] + noise)
        return changed, state
