"""Resetting units by the magnitude of their gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from perennial import scores
from perennial.methods.base import Context, Scalar, number
from perennial.methods.redo import ReDo
from perennial.units import UnitLayer


@dataclass(frozen=True)
class ReGraMa(ReDo):
    r"""Replace units that have stopped learning (ReGraMa): those whose gradient is small beside their layer's.

    As :class:`~perennial.methods.redo.ReDo`, with the magnitude of the gradient of the loss by the unit's activation in
    place of that of the activation:

    .. math::
        s_j \leftarrow \beta s_j + (1 - \beta)\,\overline{\left|\frac{\partial L}{\partial h_j}\right|}, \qquad
        \text{replace } j \text{ where } \frac{\hat s_j}{\overline{\hat s}} \le \tau

    The gradient is that by what the unit's readers are given, after the activation function: a rectified unit that is
    silent but would be listened to is not replaced, unlike by ReDo.

    Source: Liu et al., arXiv 2505.24061.
    """

    name = "regrama"

    threshold: Scalar = number(0.01, low=0.0)
    """Normalised gradient magnitude up to which a unit is replaced, tau; at 0 only units without any gradient."""

    @property
    def _scored(self) -> str:
        return "signals"

    def _score(self, layer: UnitLayer, context: Context) -> Tensor:
        return scores.activation_magnitude(context.signals[layer.name])
