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

from perennial.methods.base import Context, Intervention, Scalar, Tensors, choice, number, reached
from perennial.noise import Noise, elements
from perennial.scores import adaptation, contribution, mean_corrected_contribution
from perennial.units import UnitLayer, UnitMap, bias_beside


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


@dataclass(frozen=True)
class ContinualBackprop(Intervention):
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
    utility: str = choice("contribution", "contribution", "mean_corrected_contribution", "adaptable_contribution")
    """The score of a unit; see :mod:`perennial.scores`."""
    bias_correction: bool = False
    """Rank by :math:`u_j / (1 - \\eta^{a_j})`, so that young units are not replaced for being young."""
    bias_transfer: bool = False
    """Add a replaced unit's mean contribution to the biases of its readers."""
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

    def init(self, params: Tensors, units: UnitMap) -> ContinualBackpropState:
        if not len(units):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in units.refused) or "it has no hidden layer"
            raise ValueError(f"continual_backprop found no hidden units to keep in this network ({reasons})")
        for layer in units:
            for part in layer.incoming:
                if part.parameter not in units.initial:
                    raise ValueError(
                        f"continual_backprop cannot redraw {part.parameter}: how it was first drawn is not known. Fill "
                        "it with torch.nn.init's uniform, normal, kaiming, xavier or constant functions in the factory"
                    )
            if self.bias_transfer:
                for part in layer.outgoing:
                    if bias_beside(part.parameter) not in params:
                        raise ValueError(f"bias_transfer needs a bias beside {part.parameter}, and there is none")
        like = {layer.name: params[layer.incoming[0].parameter] for layer in units}
        zeros = {layer.name: like[layer.name].new_zeros(layer.size) for layer in units}
        return ContinualBackpropState(
            utility=zeros,
            mean=dict(zeros) if self._uses_mean else {},
            age={name: z.to(torch.int32) for name, z in zeros.items()},
            quota={name: z.new_zeros((), dtype=torch.float64) for name, z in zeros.items()},
            replaced={name: z.to(torch.bool) for name, z in zeros.items()},
        )

    @property
    def _uses_mean(self) -> bool:
        return self.bias_transfer or self.utility != "contribution"

    def replaced(self, state: ContinualBackpropState) -> dict[str, Tensor]:
        return state.replaced

    def step(
        self, params: Tensors, state: ContinualBackpropState, context: Context
    ) -> tuple[dict[str, Tensor], ContinualBackpropState]:
        current = dict(params)
        utility, mean, age, quota, replaced = {}, {}, {}, {}, {}
        for layer in context.units:
            key = layer.name
            h = context.activations[key]
            a = state.age[key] + 1
            grown = reached(self.utility_decay, a.to(h.dtype))  # what an average of ones would have reached
            running = None
            if self._uses_mean:
                running = self.utility_decay * state.mean[key] + (1 - self.utility_decay) * h.mean(0)
            instant = self._score(layer, current, h, None if running is None else running / grown)
            u = self.utility_decay * state.utility[key] + (1 - self.utility_decay) * instant
            mature = a > self.maturity_threshold
            due, quota[key] = self._due(layer, state.quota[key], mature, context.noise)
            hits = self._lowest(u / grown if self.bias_correction else u, mature, due)
            mark = functools.reduce(torch.add, [hit for _, hit in hits])
            gone = mark > 0
            if self.bias_transfer and running is not None:
                _transfer_bias(layer, current, torch.where(gone, running / grown, 0.0))
            _redraw(layer, current, hits, mark, context)
            utility[key] = torch.where(gone, 0.0, u)
            age[key] = torch.where(gone, 0, a)
            replaced[key] = gone
            if running is not None:
                mean[key] = torch.where(gone, 0.0, running)
        changed = {name: w for name, w in current.items() if w is not params[name]}
        return changed, ContinualBackpropState(utility, mean, age, quota, replaced)

    def _score(self, layer: UnitLayer, params: Tensors, h: Tensor, mean: Tensor | None) -> Tensor:
        readers = [part.gather(params[part.parameter]) for part in layer.outgoing]
        outgoing = readers[0] if len(readers) == 1 else torch.cat(readers, 1)
        if self.utility == "contribution" or mean is None:
            return contribution(h, outgoing)
        score = mean_corrected_contribution(h, mean, outgoing)
        if self.utility == "adaptable_contribution":
            score = score * adaptation(layer.incoming[0].gather(params[layer.incoming[0].parameter]))
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

    def _lowest(self, utility: Tensor, mature: Tensor, due: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The mature units of lowest utility, the first of equals first: for each replacement that the program has room
        for, the unit's number, int64 [], and a mask [units] of zeros and, if the unit is due, a one at its place.

        A mask of numbers, because compiled loops read floats at once and booleans one by one.
        """
        number = torch.arange(utility.shape[0], device=utility.device)
        open_ = torch.where(mature, utility, math.inf)
        hits = []
        for rank in range(1 if self.per_step is None else min(self.per_step, utility.shape[0])):
            lowest = open_.argmin(0)
            hit = (number == lowest).to(utility.dtype) * mature.to(utility.dtype) * (due > rank).to(utility.dtype)
            open_ = torch.where(hit > 0, math.inf, open_)
            hits.append((lowest, hit))
        return hits


def _transfer_bias(layer: UnitLayer, params: dict[str, Tensor], mean: Tensor) -> None:
    for part in layer.outgoing:
        w = params[part.parameter]
        moved = (part.gather(w) * mean[:, None]).sum(0)
        bias = params[bias_beside(part.parameter)]
        params[bias_beside(part.parameter)] = bias + moved.reshape(part.index.shape[1], bias.shape[0], -1).sum((0, 2))


def _redraw(
    layer: UnitLayer, params: dict[str, Tensor], hits: list[tuple[Tensor, Tensor]], mark: Tensor, context: Context
) -> None:
    for part in layer.outgoing:
        w = params[part.parameter]
        params[part.parameter] = torch.where(part.mask(mark, w) > 0, 0.0, w)
    for part in layer.incoming:
        w = params[part.parameter]
        source = context.units.initial[part.parameter]
        if source.kind == "constant" or w.dim() == 1:
            fresh = source.draw(context.noise, part.parameter, elements(w)).to(w.dtype)
            params[part.parameter] = torch.where(part.mask(mark, w) > 0, fresh, w)
            continue
        # One row a replacement instead of the whole matrix: the numbers are those of the rows' own elements.
        width = w[0].numel()
        column = torch.arange(width, dtype=torch.int32, device=w.device)
        for lowest, hit in hits:
            row = lowest.to(torch.int32) * width
            fresh = source.draw(context.noise, part.parameter, row + column).to(w.dtype)
            row_shaped = fresh.unflatten(0, w.shape[1:]) if w.dim() > 2 else fresh
            w = torch.where(part.mask(hit, w) > 0, row_shaped.unsqueeze(0), w)
        params[part.parameter] = w
