"""RigL: the rigged lottery."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perennial.methods.base import Context, Scalar, Tensors, whole
from perennial.methods.replace import on_host
from perennial.methods.sparse_training import SparseTraining
from perennial.units import UnitMap


class RigLState(NamedTuple):
    """State of :class:`RigL`."""

    mask: dict[str, Tensor]
    """bool, by weight's name, its shape: True where the weight is present."""
    gradient: dict[str, Tensor]
    """By weight's name, its shape: the magnitude of the loss's gradient in the last step, of absent weights too. On a
    user's own model in the processor's memory: in the last step that had an exchange. Stays zero where ``every`` is 0.
    """


@dataclass(frozen=True)
class RigL(SparseTraining):
    r"""RigL: train few weights, and now and then exchange the smallest for absent ones of large gradient.

    Of all parameters of two or more dimensions together the share ``density`` is present, drawn at random before the
    first step. Absent weights are exactly zero after every step; biases and norms are left alone.

    In an exchange after t steps, in every layer, of whose n present weights k go,

    .. math::
        k = \left\lfloor n \frac{\alpha}{2}\left(1 + \cos\frac{\pi t}{T}\right) \right\rfloor, \qquad
        \text{drop the } k \text{ of smallest } |w|, \qquad
        \text{grow the } k \text{ absent ones of largest } \left|\frac{\partial L}{\partial w}\right|

    until t reaches T. Those just dropped are among the candidates; one that is grown again keeps its value and its
    optimizer's state. All others that are grown start at zero with fresh optimizer state, so that an exchange takes
    away the dropped weights and changes nothing else. Between equals chance decides. An absent weight is a plain zero
    in a dense tensor, and its gradient is there without a further backward pass.

    Adam's step count stays, since it is kept by row and by column: its first updates of a weight grown late are up to
    three times the step size.

    Put it last: what an intervention after it adds to absent weights stays until the next step.

    Source: Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020 (arXiv 1911.11134). There an
    exchange replaces the optimizer's step. Here it comes after it: by the weights as that step has left them, and by
    the gradient that it was taken along. Their uniform distribution keeps the first layer dense; here none is kept.
    """

    name = "rigl"

    until: int | None = whole(25_000, low=1, optional=True)
    """Optimizer steps after which the mask stays, T: about three quarters of the training; the default is that of the
    paper's 32,000 steps on ImageNet. None: exchanges go on for ever, and their share stays at ``drop``, alpha."""

    def init(self, params: Tensors, units: UnitMap) -> RigLState:
        mask = super().init(params, units).mask
        return RigLState(mask, {name: torch.zeros_like(params[name].detach()) for name in mask})

    def step(self, params: Tensors, state: RigLState, context: Context) -> tuple[dict[str, Tensor], RigLState]:
        changed, _ = super().step(params, state, context)
        if self.every == 0 or self._idle(context):
            return changed, state
        gradient = {name: context.grads[name].abs().to(old.dtype) for name, old in state.gradient.items()}
        return changed, state._replace(gradient=gradient)

    def _idle(self, context: Context) -> bool:
        """Whether no exchange follows, as far as is known without waiting for a device: no pass over gradients then."""
        known = context.in_place and self.every is not None and on_host(context.noise.step)
        return known and not self.due(int(context.noise.step) + 1, False)

    def due(self, steps_made: int, task_ended: bool) -> bool:
        return super().due(steps_made, task_ended) and (self.until is None or steps_made < self.until)

    def share(self, context: Context) -> Scalar:
        if self.until is None:
            return self.drop
        done = (context.noise.step + 1).to(torch.float64) / self.until
        return self.drop * 0.5 * (1 + torch.cos(math.pi * done))

    def growth(self, name: str, state: RigLState, context: Context) -> Tensor:
        return state.gradient[name]
