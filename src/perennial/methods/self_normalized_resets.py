"""Self-normalized resets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perennial import scores
from perennial.methods.base import Context, Scalar, Tensors, number, whole
from perennial.methods.replace import Chosen, ReplacesUnits, changes, replace_units, working_copy
from perennial.units import UnitMap

_GROWTH = 1.2
"""How much longer the gaps of a bucket are than those of the one before."""


class SelfNormalizedResetsState(NamedTuple):
    """State of :class:`SelfNormalizedResets`, by layer name."""

    age: dict[str, Tensor]
    """int32 [units]: steps since the unit last fired, or was made."""
    gaps: dict[str, Tensor]
    """int32 [units, edges]: how many gaps between firings were at most as long as each edge, since the unit was new."""
    replaced: dict[str, Tensor]
    """bool [units]: which units the last step replaced."""
    kept: dict[str, Tensor]
    """By parameter name, its shape: what "rewind" goes back to; empty for the other ways to re-initialise."""


@dataclass(frozen=True)
class SelfNormalizedResets(ReplacesUnits):
    r"""Replace a unit that has been silent for longer than it almost ever was (self-normalized resets, SNR).

    A unit fires on a step where its activation is above zero for any sample, at any position. Every unit has its own
    distribution of gaps, the steps without firing between two steps with:

    .. math::
        \text{replace } j \text{ where } a_j > \min\{e : P(\text{gap}_j \le e) \ge q\}

    with :math:`a_j` the steps since it last fired. Gaps are counted in buckets whose upper edges e are the whole
    numbers next to powers of 1.2, so that a unit's memory is some fifty counts whatever the length of its gaps. A unit
    with few gaps so far is replaced after ``max_age`` steps of silence, and no unit is silent for longer. A replaced
    unit starts without gaps, the optimizer's state of its weights anew.

    Source: Farias and Jozefiak, arXiv 2410.20098.
    """

    quantile: Scalar = number(0.98, low=0.0, high=1.0, open_low=True, open_high=True)
    """Share of a unit's gaps that its silence must outlast, q."""
    max_age: int = whole(20000)
    """Steps of silence after which any unit is replaced; 0: nothing ever is."""
    minimum: Scalar = number(16, low=1.0)
    """Gaps that must have been counted before their distribution is looked at."""

    OFF = {"max_age": 0}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"activations"}) if self.max_age else frozenset()

    def edges(self) -> tuple[int, ...]:
        """The upper edges of the buckets: the distinct whole numbers next to 1, 1.2, 1.44, ..., then ``max_age``."""
        found: list[int] = []
        power = 0
        while (edge := round(_GROWTH**power)) <= self.max_age:
            if not found or edge > found[-1]:
                found.append(edge)
            power += 1
        return (*found, self.max_age) if found and found[-1] < self.max_age else tuple(found)

    def init(self, params: Tensors, units: UnitMap) -> SelfNormalizedResetsState:
        self.check(params, units)
        zeros = self.zeros(params, units)
        edges = len(self.edges())
        return SelfNormalizedResetsState(
            age={name: z.to(torch.int32) for name, z in zeros.items()},
            gaps={name: z.new_zeros((len(z), edges), dtype=torch.int32) for name, z in zeros.items()},
            replaced={name: z.to(torch.bool) for name, z in zeros.items()},
            kept=self.start(params, units),
        )

    def replaced(self, state: SelfNormalizedResetsState) -> dict[str, Tensor]:
        return state.replaced

    def step(
        self, params: Tensors, state: SelfNormalizedResetsState, context: Context
    ) -> tuple[dict[str, Tensor], SelfNormalizedResetsState]:
        if self.max_age == 0:
            return {}, state
        kept = self.keep(params, state.kept, context)
        current = working_copy(params, context)
        age, gaps, replaced = {}, {}, {}
        for layer in context.units:
            key = layer.name
            h = context.activations[key]
            firing = h.amax((0, *range(2, h.dim()))) > 0
            fired = context.reduce(firing.to(torch.float32)) > 0
            edge = torch.tensor(self.edges(), dtype=torch.int32, device=h.device)
            ended = fired.unsqueeze(1) & (state.age[key].unsqueeze(1) <= edge)
            seen = state.gaps[key] + ended.to(torch.int32)
            a = torch.where(fired, 0, state.age[key] + 1)
            gone = a > self._threshold(seen, edge)
            replace_units(
                layer, current, Chosen(gone.to(h.dtype)), context, reinitialise=self.reinitialise,
                mean=context.reduce(scores.mean_activation(h)) if self.bias_transfer else None,
                useful=context.reduce(scores.activation_magnitude(h)) if self.reinitialise == "split" else None,
                kept=kept,
            )  # fmt: skip
            age[key] = torch.where(gone, 0, a)
            gaps[key] = torch.where(gone.unsqueeze(1), 0, seen)
            replaced[key] = gone
        return changes(current, params, context), SelfNormalizedResetsState(age, gaps, replaced, kept)

    def _threshold(self, gaps: Tensor, edge: Tensor) -> Tensor:
        """The age above which each unit is replaced, int32 [units]."""
        count = gaps[:, -1]  # the last edge is the longest gap that there can be
        # A lane's quantile is rounded to the lane's dtype: 0.98 in float32 would not be reached by 49 gaps of 50.
        reached = (self.quantile * count.to(torch.float64) * (1 - 1e-6)).unsqueeze(1)
        within = gaps.to(torch.float64) >= reached
        quantile = torch.where(within, edge, self.max_age).amin(1)
        return torch.where(count < self.minimum, self.max_age, quantile)
