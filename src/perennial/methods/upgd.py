"""Utility-based perturbed gradient descent."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perennial.methods.base import Context, Rule, Scalar, Tensors, choice, number, reached, start_ages, unbiasing
from perennial.noise import once
from perennial.scores import exact_utility, exact_utility_of_units, first_order, second_order
from perennial.units import Slice, UnitLayer, UnitMap


class UPGDState(NamedTuple):
    """State of :class:`UPGD`."""

    utility: dict[str, Tensor]
    """Moving average of the utility, not bias-corrected: by parameter, its shape; feature-wise by unit layer, [units].
    """
    ages: dict[str, tuple[Tensor, ...]]
    """Steps since the last reset, per dimension; see :func:`perennial.methods.base.start_ages`. Feature-wise by unit
    layer."""


@dataclass(frozen=True)
class UPGD(Rule):
    r"""Utility-based perturbed gradient descent (Elsayed and Mahmood, ICLR 2024): useful weights are protected, useless
    ones perturbed.

    .. math::
        U \leftarrow \beta U + (1 - \beta)\,u, \qquad
        \hat U = \frac{U}{1 - \beta^t}, \qquad
        \bar U = \sigma\!\left(\hat U / \max \hat U\right), \qquad
        w \leftarrow (1 - \alpha \lambda) w - \alpha (g + s\,\xi)(1 - \bar U)

    with :math:`\xi` standard normal and the maximum over every weight of the network. The utility u of a weight is the
    loss without it minus the loss with it: :math:`-g w` to first order,
    :math:`-g w + \tfrac12 h w^2` to second, h the diagonal of the Hessian.

    Feature-wise, the utility is that of a unit, and gates all that makes the unit: its incoming weights and bias. It is
    minus the derivative of the loss by a factor on the unit's output, which equals the sum of its outgoing weights'
    utilities, to first order exactly: the network needs no gates, and units of any layer in the unit map have one.
    Whatever makes no hidden unit, the output layer above all, is trained by gradient descent without noise (and not
    doubled). A coupled penalty in the gradient counts as part of the loss, but for ``order="exact"``.

    The maximum is of the bias-corrected utility, as in the paper; the published code takes it of the uncorrected one,
    which saturates the gate for the first :math:`1 / (1 - \beta)` steps. Where no weight has positive utility the
    maximum is taken as the smallest positive number, so that a harmful weight learns at full speed and one of utility
    zero at half speed; nothing is divided by zero and no sign flips.
    """

    lr: Scalar = number(0.01, low=0.0)
    """Step size, alpha."""
    utility_decay: Scalar = number(0.999, low=0.0, high=1.0, open_high=True)
    """Decay of the average utility, beta."""
    noise_std: Scalar = number(0.001, low=0.0)
    """Standard deviation of the perturbation, s."""
    weight_decay: Scalar = number(0.0, low=0.0)
    """Decoupled weight decay, lambda."""
    order: int | str = choice(1, 1, 2, "exact")
    """Of the utility: 1, 2 (needs the diagonal of the Hessian), or "exact", by a forward pass for every weight."""
    scope: str = choice("global", "global", "local")
    """What the utility is scaled by: "global", the maximum over the network; "local", its own norm, over the weights of
    one output of a layer (as the published code, over a parameter's last dimension, for linear layers), of a bias over
    all of it, feature-wise over the units of a layer."""
    granularity: str = choice("weight", "weight", "feature")
    """Whether a weight has a utility, or a unit."""
    protect: bool = True
    """Whether the gate is on the gradient and the noise, or ("non-protecting") on the noise alone."""
    gated: str = choice("all", "all", "output")
    """Which weights have a gate of their own: "all", or "output", those that make no hidden unit. The others are gated
    as if their utility were zero: they learn at half speed, whatever they are worth. Weight-wise only."""
    doubled: bool = False
    """Twice the step size on gradient and noise, so that with ``protect`` a weight of utility zero takes a step of the
    size of plain gradient descent: the one-file optimizer in the authors' README."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity == "feature" and self.gated == "output":
            raise ValueError(
                f"{self.name}.gated is 'output' with granularity 'feature': a unit's utility gates what makes a unit, "
                "which the output layer does not; take granularity='weight'"
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({2: ["curvature"], "exact": ["loss"]}.get(self.order, []))

    # --- state ------------------------------------------------------------------------------------------------------

    def _weights(self, params: Tensors, units: UnitMap) -> list[str]:
        """The parameters whose weights have a utility of their own."""
        if self.granularity == "feature":
            return []
        hidden = _makers(units) if self.gated == "output" else {}
        return [name for name in params if name not in hidden]

    def init(self, params: Tensors, units: UnitMap) -> UPGDState:
        scored = {name: params[name] for name in self._weights(params, units)}
        if self.granularity == "feature":
            if not len(units):
                raise ValueError("feature-wise UPGD gates hidden units, but the unit map has none: trace the network")
            scored = {u.name: params[u.outgoing[0].parameter].new_zeros(u.size) for u in units}
        return UPGDState(
            {name: torch.zeros_like(w) for name, w in scored.items()},
            {name: start_ages(w) for name, w in scored.items()},
        )

    # --- utility ----------------------------------------------------------------------------------------------------

    def _instant(self, name: str, w: Tensor, context: Context) -> Tensor:
        """This step's utility of every weight of a parameter, its shape."""
        if self.order == 2:
            return second_order(w, context.grads[name], context.curvature[name])
        if self.order == "exact":
            assert context.loss is not None, "the loss was asked for by `needs`"
            return exact_utility(context.loss, name, w)
        return first_order(w, context.grads[name])

    def _of_units(self, layer: UnitLayer, params: Tensors, context: Context) -> Tensor:
        """This step's utility of every unit of a layer, [units]."""
        if self.order == "exact":
            assert context.loss is not None, "the loss was asked for by `needs`"
            return exact_utility_of_units(context.loss, layer, params)
        read = [part.gather(self._instant(part.parameter, params[part.parameter], context)) for part in layer.outgoing]
        return functools.reduce(torch.add, [u.sum(1) for u in read])

    def _advanced(self, params: Tensors, state: UPGDState, context: Context) -> UPGDState:
        """The averages after this step."""
        if self.granularity == "feature":
            instant = {layer.name: self._of_units(layer, params, context) for layer in context.units}
        else:
            instant = {n: self._instant(n, params[n], context) for n in self._weights(params, context.units)}
        utility = {n: self.utility_decay * state.utility[n] + (1 - self.utility_decay) * u for n, u in instant.items()}
        return UPGDState(utility, {n: tuple(age + 1 for age in state.ages[n]) for n in utility})

    def shared(self, params: Tensors, state: UPGDState, context: Context) -> dict[str, Tensor]:
        new = self._advanced(params, state, context)
        found = {f"utility {n}": u for n, u in new.utility.items()} if self.granularity == "feature" else {}
        if self.scope == "global" and new.utility:
            corrected = [u * unbiasing(new.ages[n], self.utility_decay) for n, u in new.utility.items()]
            found["maximum"] = functools.reduce(torch.maximum, [u.amax() for u in corrected])
        return found

    def _plasticity(self, utility: Tensor, ages: tuple[Tensor, ...], shared: Tensors) -> Tensor:
        """How freely a weight or unit learns, :math:`1 - \\bar U`, the utility's shape."""
        if self.scope == "local":
            corrected = utility * unbiasing(ages, self.utility_decay)
            dims = tuple(range(min(1, corrected.dim() - 1), corrected.dim()))
            norm = torch.linalg.vector_norm(corrected, dim=dims, keepdim=True)
            return torch.sigmoid(-corrected / norm.clamp(min=torch.finfo(norm.dtype).tiny))
        largest = shared["maximum"].clamp(min=torch.finfo(utility.dtype).tiny)
        # The factors meet in a row and a column; a weight costs one multiplication. Finite, so that zero stays zero.
        most = torch.finfo(utility.dtype).max
        scales = [once((1 / (reached(self.utility_decay, age) * largest)).clamp(max=most)) for age in ages]
        return torch.sigmoid(-utility * functools.reduce(torch.maximum, scales))

    # --- the step ---------------------------------------------------------------------------------------------------

    def plasticity(
        self, params: Tensors, state: UPGDState, context: Context
    ) -> tuple[dict[str, Tensor | float | None], UPGDState]:
        """How freely every parameter's weights learn now, :math:`1 - \\bar U`, and the next state.

        A tensor that broadcasts against the parameter; one number where nothing gates it; None where it is trained by
        plain gradient descent.
        """
        shared = self.shared(params, state, context) if context.shared is None else context.shared
        if self.granularity == "weight":
            new = self._advanced(params, state, context)
            free: dict[str, Tensor | float | None] = dict.fromkeys(params, 0.5)
            free |= {n: self._plasticity(u, new.ages[n], shared) for n, u in new.utility.items()}
            return free, new
        utility = {layer.name: shared[f"utility {layer.name}"] for layer in context.units}
        new = UPGDState(utility, {n: tuple(age + 1 for age in state.ages[n]) for n in utility})
        free = dict.fromkeys(params)
        for layer in context.units:
            of_units = self._plasticity(utility[layer.name], new.ages[layer.name], shared)
            for part in layer.incoming:
                if part.parameter in params:
                    free[part.parameter] = _joined(free[part.parameter], part, of_units, params[part.parameter])
        return free, new

    def step(self, params: Tensors, state: UPGDState, context: Context) -> tuple[dict[str, Tensor], UPGDState]:
        free, new = self.plasticity(params, state, context)
        changed = {}
        for name, w in params.items():
            update = self._update(name, w, context.grads[name], free[name], context)
            changed[name] = (1 - self.lr * self.weight_decay) * w - self.lr * update
        return changed, new

    def _update(self, name: str, w: Tensor, grad: Tensor, free: Tensor | float | None, context: Context) -> Tensor:
        """What is taken off a parameter per unit of step size, from its gradient or what stands for it."""
        factor = 2.0 if self.doubled else 1.0
        if free is None:
            return grad
        noise = self.noise_std * context.noise.normal_like(name, w).to(w.dtype)
        return factor * ((grad + noise) * free if self.protect else grad + noise * free)


def _makers(units: UnitMap) -> dict[str, None]:
    """The parameters that make hidden units."""
    return {part.parameter: None for layer in units for part in (*layer.incoming, *layer.norms)}


def _joined(before: Tensor | float | None, part: Slice, of_units: Tensor, w: Tensor) -> Tensor:
    """The plasticity of a parameter whose rows belong to units, of several layers where its module makes several.

    Rows of no unit keep a plasticity of 1.
    """
    mine = part.mask(of_units, w)
    there = part.mask(torch.ones_like(of_units), w)
    rest = before if isinstance(before, Tensor) else torch.ones_like(mine)
    return torch.where(there > 0, mine, rest)
