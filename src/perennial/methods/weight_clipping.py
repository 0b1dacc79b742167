"""Weight clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from perennial.methods.base import Context, Intervention, Scalar, Tensors, number
from perennial.units import UnitMap, bias_beside, fan_in


@dataclass(frozen=True)
class WeightClipping(Intervention):
    r"""Keep every weight, and its bias, within a bound that layers draw their first weights in.

    .. math:: w \leftarrow \operatorname{clamp}\!\left(w, -\frac{\kappa}{\sqrt n}, \frac{\kappa}{\sqrt n}\right)

    with n the weight's fan-in, for the bias the fan-in of the weight beside it. Vectors that are no bias of a matrix,
    such as the scales and offsets of norms, are left alone.

    Source: Elsayed et al., arXiv 2407.01704. The published code can leave the last layer out; here it is clipped as the
    others are.
    """

    kappa: Scalar = number(2.0, low=0.0, open_low=True, infinite=True)
    """The bound as a multiple of :math:`1 / \\sqrt n`; infinity is no bound."""

    OFF = {"kappa": math.inf}

    def acts_on(self, params: Tensors, units: UnitMap) -> list[str]:
        return [name for weight in _bounded(params) for name in weight]

    def step(self, params: Tensors, state: tuple[()], context: Context) -> tuple[dict[str, Tensor], tuple[()]]:
        changed = {}
        for names in _bounded(params):
            w = params[names[0]]
            bound = w.new_ones(()) * self.kappa / math.sqrt(fan_in(w))
            for each in names:
                changed[each] = params[each].clamp(-bound, bound)
        return changed, state


def _bounded(params: Tensors) -> list[tuple[str, ...]]:
    """Every weight, with the bias beside it if there is one."""
    weights = [name for name, w in params.items() if w.dim() >= 2]
    return [(name, bias_beside(name)) if bias_beside(name) in params else (name,) for name in weights]
