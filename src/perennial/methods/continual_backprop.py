"""Continual backpropagation."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from perennial import scores
from perennial.methods.base import Context, Scalar, Tensors, choice, number, reached
from perennial.methods.replace import Chosen, ReplacesUnits, changes, on_host, replace_units, working_copy
from perennial.noise import Noise
from perennial.units import UnitLayer, UnitMap

_READS_MEAN = ("mean_corrected_contribution", "adaptable_contribution")
_READS_ACTIVATIONS = ("contribution", *_READS_MEAN, "activation", "taylor", "fisher")


class ContinualBackpropState(NamedTuple):
    """State of :class:`ContinualBackprop`, by layer name."""

    utility: dict[str, Tensor]
    """[units]: moving average of the score, not bias-corrected."""
    mean: dict[str, Tensor]
    """[units]: moving average of the activation, not bias-corrected; empty where nothing reads it."""
    age: dict[str, Tensor]
    """int32 [units]: steps since the unit was made."""
    quota: dict[str, Tensor]
    """float64 []: units due for replacement, the fraction left over from earlier steps included."""
    replaced: dict[str, Tensor]
    """bool [units]: which units the last step replaced."""
    kept: dict[str, Tensor]
    """By parameter name, its shape: what "rewind" goes back to; empty for the other ways to re-initialise."""


@dataclass(frozen=True)
class ContinualBackprop(ReplacesUnits):
    r"""Continual backpropagation (Dohare et al., Nature 2024): re-initialise a few of the least useful mature units all
    the time, so that the network never runs out of fresh ones.

    After the optimizer's step, in every layer of hidden units:

    .. math::
        u_j \leftarrow \eta u_j + (1 - \eta)\,\overline{|h_j|} \sum_k |w_{jk}|, \qquad
        a_j \leftarrow a_j + 1, \qquad
        c \leftarrow c + \rho \cdot \#\{j : a_j > m\}

    While :math:`c \ge 1`, the mature unit of lowest utility is replaced and c falls by 1: its incoming weights are
    drawn anew from the distribution that they were first drawn from, its outgoing weights, utility and age become 0.
    The optimizer's state of all those weights starts anew as well.

    The defaults are equation 1 and Algorithm 1 of the Nature paper. Its predecessor (Dohare, Sutton and Mahmood, arXiv
    2108.06325) is ``utility="adaptable_contribution", bias_correction=True, bias_transfer=True``.

    Unlike the published code: the mean activation is used for the bias transfer *before* it is cleared (there it is
    zero, so nothing is transferred); the quota never grows while no unit is mature, nor beyond the number of mature
    units, so a drought is not followed by a burst; in Bernoulli mode a quota above 1 is rounded at random, not cut.
    """

    replacement_rate: Scalar = number(1e-4, low=0.0, high=1.0)
    """Share of a layer's mature units replaced a step, rho."""
    maturity_threshold: Scalar = number(100, low=0.0)
    """Steps for which a new unit is left alone, m."""
    utility_decay: Scalar = number(0.99, low=0.0, high=1.0, open_high=True)
    """Decay of the average utility and of the average activation, eta."""
    utility: str = choice(
        "contribution", "contribution", *_READS_MEAN, "outgoing_magnitude", "incoming_magnitude", "activation",
        "taylor", "fisher", "random", "exact",
    )  # fmt: skip
    """The score of a unit before averaging; see :mod:`perennial.scores`. Beside those: "random", a uniform number drawn
    at every step and neither averaged nor corrected, a control; and "exact", the loss on the step's examples with the
    unit's outgoing weights at zero, minus the loss: a forward pass for every unit at every step."""
    bias_correction: bool = False
    """Rank by :math:`u_j / (1 - \\eta^{a_j})`, so that young units are not replaced for being young."""
    accumulate: bool = True
    """Carry fractions of a unit over to later steps (Algorithm 1); False replaces one with that probability."""
    per_step: int | None = None
    """The most units replaced in one layer in one step; None: what the rate can make due at once."""

    OFF = {"replacement_rate": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_step is not None and (type(self.per_step) is not int or self.per_step < 1):
            raise ValueError(
                f"continual_backprop.per_step is {self.per_step!r}; it is empty or a whole number, at least 1"
            )

    @classmethod
    def settled(cls, methods: Sequence[Self], units: UnitMap) -> Sequence[Self]:
        """Room for as many replacements in one step as any lane's rate can make due."""
        fastest = max(float(method.replacement_rate) for method in methods)
        most = math.floor(fastest * max((layer.size for layer in units), default=1)) + 1
        return [dataclasses.replace(m, per_step=most) if m.per_step is None else m for m in methods]

    @property
    def needs(self) -> frozenset[str]:
        found = set()
        if self.utility in _READS_ACTIVATIONS or self.bias_transfer:
            found.add("activations")
        if self.utility in ("taylor", "fisher"):
            found.add("signals")
        if self.utility == "exact":
            found.add("loss")
        return frozenset(found)

    def init(self, params: Tensors, units: UnitMap) -> ContinualBackpropState:
        self.check(params, units)
        zeros = self.zeros(params, units)
        return ContinualBackpropState(
            utility=zeros,
            mean=dict(zeros) if self._uses_mean else {},
            age={name: z.to(torch.int32) for name, z in zeros.items()},
            quota={name: z.new_zeros((), dtype=torch.float64) for name, z in zeros.items()},
            replaced={name: z.to(torch.bool) for name, z in zeros.items()},
            kept=self.start(params, units),
        )

    @property
    def _uses_mean(self) -> bool:
        return self.bias_transfer or self.utility in _READS_MEAN

    def replaced(self, state: ContinualBackpropState) -> dict[str, Tensor]:
        return state.replaced

    def step(
        self, params: Tensors, state: ContinualBackpropState, context: Context
    ) -> tuple[dict[str, Tensor], ContinualBackpropState]:
        kept = self.keep(params, state.kept, context)
        current = working_copy(params, context)
        utility, mean, age, quota, replaced = {}, {}, {}, {}, {}
        for layer in context.units:
            key = layer.name
            u, a = state.utility[key], state.age[key] + 1
            grown = reached(self.utility_decay, a.to(u.dtype))  # what an average of ones would have reached
            running = None
            if self._uses_mean:
                now = context.reduce(scores.mean_activation(context.activations[key]))
                running = self.utility_decay * state.mean[key] + (1 - self.utility_decay) * now
            corrected = None if running is None else running / grown
            instant = self._score(layer, params, current, context, corrected)
            if self.utility == "random":
                u = rank = instant.to(u.dtype)
            else:
                u = self.utility_decay * u + (1 - self.utility_decay) * instant
                rank = u / grown if self.bias_correction else u
            mature = a > self.maturity_threshold
            due, quota[key] = self._due(layer, state.quota[key], mature, context.noise)
            chosen = self._lowest(layer, rank, mature, due, context)
            if chosen is None:
                gone = torch.zeros_like(mature)
            else:
                gone = chosen.mark > 0
                replace_units(
                    layer, current, chosen, context, reinitialise=self.reinitialise,
                    mean=corrected if self.bias_transfer else None, useful=self._useful(rank, mature, gone), kept=kept,
                )  # fmt: skip
                u, a = torch.where(gone, 0.0, u), torch.where(gone, 0, a)
                running = None if running is None else torch.where(gone, 0.0, running)
            utility[key], age[key], replaced[key] = u, a, gone
            if running is not None:
                mean[key] = running
        return changes(current, params, context), ContinualBackpropState(utility, mean, age, quota, replaced, kept)

    def _score(
        self, layer: UnitLayer, params: Tensors, current: Tensors, context: Context, mean: Tensor | None
    ) -> Tensor:
        """The score of this step, [units], the same in all processes."""
        if self.utility == "random":
            element = torch.arange(layer.size, dtype=torch.int32, device=context.noise.key.device)
            return context.noise.uniform(f"{layer.name}.utility", element)
        if self.utility == "exact":
            return context.reduce(_loss_without(layer, params, current, context))
        if self.utility == "outgoing_magnitude":
            return scores.outgoing_magnitude(*_readers(layer, current))
        if self.utility == "incoming_magnitude":
            return scores.incoming_magnitude(*_producers(layer, current))
        h = context.activations[layer.name]
        if self.utility == "activation":
            return context.reduce(scores.activation_magnitude(h, look=context.look))
        if self.utility == "taylor":
            return context.reduce(scores.taylor(h, context.signals[layer.name]))
        if self.utility == "fisher":
            return context.reduce(scores.fisher(h, context.signals[layer.name]))
        if self.utility == "contribution" or mean is None:
            return context.reduce(scores.contribution(h, *_readers(layer, current), look=context.look))
        score = context.reduce(scores.mean_corrected_contribution(h, mean, *_readers(layer, current)))
        if self.utility == "adaptable_contribution":
            score = score * scores.adaptation(*_producers(layer, current))
        return score

    def _due(self, layer: UnitLayer, quota: Tensor, mature: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """How many units to replace now, float64 [], and the quota that is left."""
        eligible = mature.to(torch.float64).sum()
        quota = quota + self.replacement_rate * eligible
        if not self.accumulate:
            chance = noise.uniform(layer.name, eligible.to(torch.int32) * 0).to(torch.float64)
            quota = torch.floor(quota) + (chance < quota - torch.floor(quota))
        due = torch.minimum(torch.floor(quota), eligible).clamp(max=self._most(layer))
        left = torch.minimum(quota - due, eligible.clamp(min=1))  # more would return as a burst
        return due, left if self.accumulate else left * 0

    def _most(self, layer: UnitLayer) -> int:
        return layer.size if self.per_step is None else min(self.per_step, layer.size)

    def _lowest(
        self, layer: UnitLayer, utility: Tensor, mature: Tensor, due: Tensor, context: Context
    ) -> Chosen | None:
        """The mature units of lowest utility, the first of equals first, as many as are due; None where it is known
        that none is."""
        open_ = torch.where(mature, utility, math.inf)
        if context.in_place:
            most = int(due) if on_host(due) else self._most(layer)
            if most == 0:
                return None
            index = open_.argsort(stable=True)[:most]
            hit = (torch.arange(most, device=due.device) < due).to(utility.dtype)
            return Chosen(torch.zeros_like(utility).index_copy(0, index, hit), index)
        unit = torch.arange(layer.size, device=utility.device)
        found, marks = [], []
        for rank in range(self._most(layer)):
            lowest = open_.argmin(0)
            hit = (unit == lowest).to(utility.dtype) * mature.to(utility.dtype) * (due > rank).to(utility.dtype)
            open_ = torch.where(hit > 0, math.inf, open_)
            found.append(lowest)
            marks.append(hit)
        return Chosen(functools.reduce(torch.add, marks), torch.stack(found))

    def _useful(self, utility: Tensor, mature: Tensor, gone: Tensor) -> Tensor | None:
        """How useful each unit is that may be split: a mature one, if one is left."""
        if self.reinitialise != "split":
            return None
        grown_up = mature & ~gone
        return torch.where(grown_up | ~grown_up.any(), utility, -math.inf)


def _readers(layer: UnitLayer, params: Tensors) -> list[Tensor]:
    return [part.gather(params[part.parameter]) for part in layer.outgoing]


def _producers(layer: UnitLayer, params: Tensors) -> list[Tensor]:
    """The incoming weights, without biases."""
    weights = [part for part in layer.incoming if params[part.parameter].dim() > 1]
    return [part.gather(params[part.parameter]) for part in weights]


def _loss_without(layer: UnitLayer, params: Tensors, current: Tensors, context: Context) -> Tensor:
    """The loss without each unit, minus the loss, [units]."""
    loss = context.loss
    assert loss is not None, "the loss was asked for by `needs`"
    changed = changes(current, params, context)

    def without(unit: Tensor) -> Tensor:
        tried = dict(changed)
        for part in layer.outgoing:
            w = tried.get(part.parameter, current[part.parameter])
            tried[part.parameter] = torch.where(part.mask(unit, w) > 0, 0.0, w)
        return loss(tried)

    each = torch.eye(layer.size, device=current[layer.tap].device)
    # In place one after the other: a user's model need not work under vmap, nor fit into memory several times.
    found = torch.stack([without(unit) for unit in each]) if context.in_place else torch.vmap(without)(each)
    return found - loss(changed)
