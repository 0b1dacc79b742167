"""How well a cheap utility orders weights or units, against the exact one."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from perennial import scores
from perennial.methods.base import Context, Intervention, Tensors, choice
from perennial.noise import elements
from perennial.units import UnitLayer, UnitMap


class UtilityQualityState(NamedTuple):
    """State of :class:`UtilityQuality`."""

    before: dict[str, Tensor]
    """The parameters before the next step."""
    score: dict[str, Tensor]
    """The score at the last step, by parameter, its shape, or by unit layer, [units]."""
    exact: dict[str, Tensor]
    """The exact utility at the last step, alike."""


@dataclass(frozen=True)
class UtilityQuality(Intervention):
    r"""A probe: how well a cheap score orders a network's weights or units, against the exact utility
    (after Figure 2 of Elsayed and Mahmood, ICLR 2024). It changes nothing.

    The exact utility of a weight or unit is the loss of a step's examples without it minus the loss with it, both by
    the weights from before the step, from which the gradient comes too. ``utility_spearman`` and ``utility_kendall``
    are the rank correlations of score and exact utility over all weights, or all units, of the network at one step,
    Spearman's :math:`\rho` and Kendall's :math:`\tau_b`, in [-1, 1] and right in the presence of ties; where either
    says the same of all weights there is no order to agree with, and they are 0. (The published code correlates what
    one ``argsort`` gives, which are positions and no ranks, and takes the exact utility after the step.)

    Differences of losses that are within rounding, 64 units in the last place of the larger of 1 and the loss, count
    as none. A population in float64 resolves all others.

    It belongs after all other interventions, and costs a forward pass for every weight or unit: for study.
    """

    MEASURES: ClassVar[tuple[str, ...]] = ("utility_spearman", "utility_kendall")

    score: str = choice(
        "first_order",
        "first_order",
        "second_order",
        "magnitude",
        "squared_gradient",
        "snip",
        "fisher",
        "movement",
        "contribution",
        "random",
    )
    """With g the gradient and w the weight: "first_order", -g w; "second_order", -g w + h w^2 / 2 with h the diagonal
    of the Hessian by HesScale; "magnitude", ``|w|``; "squared_gradient", g^2; "snip" (Lee, Ajanthan and Torr, ICLR
    2019), ``|g w|``; "fisher", (g w)^2 / 2, the Fisher information g^2 in place of h; "movement" (Sanh, Wolf and Rush,
    NeurIPS 2020), the sum of -g w over all steps so far; "random". Of a unit, w are its outgoing weights: sums over
    them, before the magnitude of "snip" and the square of "fisher" are taken. "contribution" (Dohare et al., Nature
    2024), of units alone, is the magnitude of the activation times that of the outgoing weights."""
    granularity: str = choice("weight", "weight", "feature")
    """Whether weights are ordered, biases among them, or hidden units."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score == "contribution" and self.granularity == "weight":
            raise ValueError(f"{self.name}.score is 'contribution', which is of units: take granularity='feature'")

    @property
    def needs(self) -> frozenset[str]:
        more = {"second_order": "curvature", "contribution": "activations"}.get(self.score)
        return frozenset({"loss", more} if more else {"loss"})

    def init(self, params: Tensors, units: UnitMap) -> UtilityQualityState:
        if self.granularity == "feature" and not len(units):
            raise ValueError(f"{self.name} with granularity='feature' orders hidden units, and the network has none")
        if self.granularity == "feature":
            zero = {layer.name: params[layer.outgoing[0].parameter].new_zeros(layer.size) for layer in units}
        else:
            zero = {n: torch.zeros_like(w) for n, w in params.items()}
        before = {n: w.clone() for n, w in params.items()}
        return UtilityQualityState(before, zero, {n: z.clone() for n, z in zero.items()})

    def acts_on(self, params: Tensors, units: UnitMap) -> list[str]:
        return []

    def step(
        self, params: Tensors, state: UtilityQualityState, context: Context
    ) -> tuple[dict[str, Tensor], UtilityQualityState]:
        before, loss = state.before, context.loss
        assert loss is not None, "the loss was asked for by `needs`"

        def at_start(changed: Tensors) -> Tensor:
            return loss(before | dict(changed))

        exact: dict[str, Tensor] = {}
        score: dict[str, Tensor] = {}
        if self.granularity == "weight":
            for name, w in before.items():
                exact[name] = scores.exact_utility(at_start, name, w)
                score[name] = self._of_weights(name, w, context)
        else:
            for layer in context.units:
                exact[layer.name] = scores.exact_utility_of_units(at_start, layer, before)
                score[layer.name] = self._of_units(layer, before, context)
        if self.score == "movement":
            score = {name: state.score[name] + s for name, s in score.items()}
        smallest = 64 * torch.finfo(next(iter(before.values())).dtype).eps * at_start({}).abs().clamp(min=1)
        exact = {name: torch.where(u.abs() <= smallest, 0.0, u) for name, u in exact.items()}
        return {}, UtilityQualityState({n: w.clone() for n, w in params.items()}, score, exact)

    def _of_weights(self, name: str, w: Tensor, context: Context) -> Tensor:
        if self.score == "random":
            return context.noise.uniform(name, elements(w)).to(w.dtype)
        return self._whole(self._part(w, name, context))

    def _of_units(self, layer: UnitLayer, params: Tensors, context: Context) -> Tensor:
        read = [(part, params[part.parameter]) for part in layer.outgoing]
        if self.score == "random":
            units = torch.arange(layer.size, dtype=torch.int32, device=read[0][1].device)
            return context.noise.uniform(layer.name, units).to(read[0][1].dtype)
        if self.score == "contribution":
            return scores.contribution(context.activations[layer.name], *(part.gather(w) for part, w in read))
        totals = [part.gather(self._part(w, part.parameter, context)).sum(1) for part, w in read]
        return self._whole(functools.reduce(torch.add, totals))

    def _part(self, w: Tensor, name: str, context: Context) -> Tensor:
        """What is summed over the weights of a unit, by weight."""
        if self.score == "magnitude":
            return w.abs()
        grad = context.grads[name]
        if self.score == "squared_gradient":
            return grad.square()
        if self.score == "second_order":
            return scores.second_order(w, grad, context.curvature[name])
        return scores.first_order(w, grad)

    def _whole(self, total: Tensor) -> Tensor:
        """The score of what was summed up, or of a weight's own part."""
        if self.score == "snip":
            return total.abs()
        return total.square() / 2 if self.score == "fisher" else total

    def measured(self, state: UtilityQualityState) -> dict[str, float]:
        from scipy import stats

        score, exact = (
            torch.cat([value.flatten() for value in found.values()]).double().cpu().numpy()
            for found in (state.score, state.exact)
        )
        if score.min() == score.max() or exact.min() == exact.max():
            return dict.fromkeys(self.MEASURES, 0.0)
        return {
            "utility_spearman": float(stats.spearmanr(score, exact).statistic),
            "utility_kendall": float(stats.kendalltau(score, exact).statistic),
        }
