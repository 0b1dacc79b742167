"""Weight clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from perennial.methods.base import Context, Intervention, Scalar, Tensors, number
from perennial.units import bias_beside, fan_in


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

    def step(self, params: Tensors, state: tuple[()], context: Context) -> tuple[dict[str, Tensor], tuple[()]]:
        changed = {}
        for name, w in params.items():
            if w.dim() < 2:
                continue
            bound = w.new_ones(()) * self.kappa / math.sqrt(fan_in(w))
            bias = bias_beside(name)
            for each in (name, bias) if bias in params else (name,):
                changed[each] = params[each].clamp(-bound, bound)
        return changed, state
