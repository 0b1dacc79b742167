"""Shrink and perturb."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from perennial.methods.base import Context, Intervention, Outcome, Scalar, Tensors, choice, number
from perennial.methods.fresh import Initial, drawn, remember, require_known
from perennial.units import UnitMap


@dataclass(frozen=True)
class ShrinkAndPerturb(Intervention):
    r"""Shrink every parameter and add a little of something fresh, at every step or when a new task begins.

    .. math:: w \leftarrow (1 - s) w + \sigma x

    with x standard normal noise, a draw from the distribution that the parameter was first drawn from, or the value it
    started from.

    Ash and Adams (NeurIPS 2020, arXiv 1910.08475) do it once, when new data arrive, with fresh weights:
    ``perturb="fresh", when="task"``. Dohare et al. (Nature, 2024) do it at every step: they shrink by the L2 term of
    the optimizer (``weight_decay`` of the rule, with ``shrink`` 0 here) and add normal noise to every weight and bias
    after the step, not scaled by the step size; these are the defaults. A soft reset, part of the way toward fresh or
    initial weights, has ``shrink`` and ``noise_std`` equal.

    The optimizer's state is kept. A network with a parameter of which it is not known how it was drawn is refused if
    ``perturb`` is "fresh".
    """

    shrink: Scalar = number(0.0, low=0.0, high=1.0)
    """Share of every parameter taken away each time, s."""
    noise_std: Scalar = number(1e-5, low=0.0)
    """Factor of what is added each time, sigma; of normal noise its standard deviation."""
    perturb: str = choice("normal", "normal", "fresh", "initial")
    """What is added, x: standard normal noise, a fresh draw of the parameter, or its initial value."""
    when: str = choice("step", "step", "task")
    """At every step, or each time a new task begins."""

    OFF = {"shrink": 0.0, "noise_std": 0.0}

    def init(self, params: Tensors, units: UnitMap) -> Initial | tuple[()]:
        if self.perturb == "fresh":
            require_known(self.name, params, units)
        return remember(params) if self.perturb == "initial" else ()

    def step(
        self, params: Tensors, state: Initial | tuple[()], context: Context
    ) -> tuple[dict[str, Tensor], Initial | tuple[()]]:
        return self._changed(params, state, context) if self.when == "step" else {}, state

    def due(self, steps_made: int, task_ended: bool) -> bool:
        return self.when == "task" and task_ended

    def event(self, params: Tensors, state: Initial | tuple[()], context: Context) -> Outcome:
        return Outcome(self._changed(params, state, context), state)

    def _changed(self, params: Tensors, state: Initial | tuple[()], context: Context) -> dict[str, Tensor]:
        return {
            name: (1 - self.shrink) * w + self.noise_std * self._added(name, w, state, context)
            for name, w in params.items()
        }

    def _added(self, name: str, w: Tensor, state: Initial | tuple[()], context: Context) -> Tensor:
        if isinstance(state, Initial):
            return state.initial[name]
        if self.perturb == "fresh":
            return drawn(name, w, context)
        return context.noise.normal_like(name, w).to(w.dtype)
