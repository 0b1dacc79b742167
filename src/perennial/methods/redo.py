"""Recycling dormant neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perennial import scores
from perennial.methods.base import Context, Outcome, Scalar, Tensors, number, reached, whole
from perennial.methods.fresh import falls_due
from perennial.methods.replace import Chosen, ReplacesUnits, changes, replace_units, working_copy
from perennial.units import UnitLayer, UnitMap


class ReDoState(NamedTuple):
    """State of :class:`ReDo` and :class:`perennial.methods.regrama.ReGraMa`, by layer name."""

    score: dict[str, Tensor]
    """[units]: moving average of the score, not bias-corrected."""
    mean: dict[str, Tensor]
    """[units]: moving average of the activation, not bias-corrected; empty without bias transfer."""
    age: dict[str, Tensor]
    """int32 [units]: steps since the unit was made, as many as are in the averages."""
    kept: dict[str, Tensor]
    """By parameter name, its shape: what "rewind" goes back to; empty for the other ways to re-initialise."""


@dataclass(frozen=True)
class ReDo(ReplacesUnits):
    r"""Recycle dormant neurons (ReDo): now and then replace every unit whose activation is small beside its layer's.

    At every step the score of a unit follows its mean magnitude; at an event the units of low normalised score are
    replaced:

    .. math::
        s_j \leftarrow \beta s_j + (1 - \beta)\,\overline{|h_j|} \quad\text{every step}, \qquad
        \text{replace } j \text{ where } \frac{\hat s_j}{\overline{\hat s}} \le \tau \quad\text{now and then}

    with :math:`\hat s_j = s_j / (1 - \beta^{t_j})`, the mean over the units of the layer. At :math:`\beta = 0` the
    score is that of the event's own step. In a layer in which every unit is silent all are dormant, and all are
    replaced. The optimizer's state of a replaced unit's weights starts anew, and so does its score.

    Source: Sokar et al., arXiv 2302.12902.
    """

    name = "redo"

    threshold: Scalar = number(0.025, low=0.0)
    """Normalised score up to which a unit is dormant, tau; at 0 only units that are exactly silent."""
    every: int | None = whole(1000, optional=True)
    """Optimizer steps from one event to the next; 0: never; None: when a new task begins."""
    score_decay: Scalar = number(0.0, low=0.0, high=1.0, open_high=True)
    """Decay of the moving averages, beta."""

    OFF = {"every": 0}

    @property
    def needs(self) -> frozenset[str]:
        if self.every == 0:
            return frozenset()
        return frozenset({self._scored, "activations"} if self.bias_transfer else {self._scored})

    @property
    def _scored(self) -> str:
        return "activations"

    def _score(self, layer: UnitLayer, context: Context) -> Tensor:
        """This step's score, [units]."""
        return scores.activation_magnitude(context.activations[layer.name], look=context.look)

    def init(self, params: Tensors, units: UnitMap) -> ReDoState:
        self.check(params, units)
        zeros = self.zeros(params, units)
        return ReDoState(
            score=zeros,
            mean=dict(zeros) if self.bias_transfer else {},
            age={name: z.to(torch.int32) for name, z in zeros.items()},
            kept=self.start(params, units),
        )

    def step(self, params: Tensors, state: ReDoState, context: Context) -> tuple[dict[str, Tensor], ReDoState]:
        if self.every == 0:
            return {}, state
        score, mean, age = {}, {}, {}
        for layer in context.units:
            key = layer.name
            now = context.reduce(self._score(layer, context))
            score[key] = self.score_decay * state.score[key] + (1 - self.score_decay) * now
            age[key] = state.age[key] + 1
            if self.bias_transfer:
                now = context.reduce(scores.mean_activation(context.activations[key]))
                mean[key] = self.score_decay * state.mean[key] + (1 - self.score_decay) * now
        return {}, ReDoState(score, mean, age, self.keep(params, state.kept, context))

    def due(self, steps_made: int, task_ended: bool) -> bool:
        return falls_due(self.every, steps_made, task_ended)

    def event(self, params: Tensors, state: ReDoState, context: Context) -> Outcome:
        current = working_copy(params, context)
        score, mean, age, replaced = {}, {}, {}, {}
        for layer in context.units:
            key = layer.name
            grown = reached(self.score_decay, state.age[key].to(state.score[key].dtype))
            hat = state.score[key] / grown
            # A task that ends before a unit was seen: its score is not a number, and nothing is below the threshold.
            gone = scores.normalised(hat) <= self.threshold
            replace_units(
                layer, current, Chosen(gone.to(hat.dtype)), context, reinitialise=self.reinitialise,
                mean=state.mean[key] / grown if self.bias_transfer else None, useful=hat, kept=state.kept,
            )  # fmt: skip
            score[key] = torch.where(gone, 0.0, state.score[key])
            age[key] = torch.where(gone, 0, state.age[key])
            replaced[key] = gone
            if self.bias_transfer:
                mean[key] = torch.where(gone, 0.0, state.mean[key])
        shapes = {name: w.shape for name, w in params.items()}
        return Outcome(
            changes(current, params, context),
            ReDoState(score, mean, age, state.kept),
            context.units.touched(replaced, shapes),
            replaced,
        )
