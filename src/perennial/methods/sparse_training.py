"""What the methods of dynamic sparse training share: how dense each layer is, the mask, and the exchange of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perennial.methods.base import Context, Intervention, Outcome, Scalar, Tensors, choice, number, whole
from perennial.methods.fresh import falls_due
from perennial.noise import elements
from perennial.units import UnitMap

DISTRIBUTIONS = ("erk", "er", "uniform")
"""How a density is spread over layers; see :func:`densities`."""


class SparseTrainingState(NamedTuple):
    """State of :class:`perennial.methods.set.SET`."""

    mask: dict[str, Tensor]
    """bool, by weight's name, its shape: True where the weight is present."""


@dataclass(frozen=True)
class SparseTraining(Intervention):
    """Base of the methods that train a network of few weights, and now and then exchange some of them for others.

    Parameters of two or more dimensions are masked: the weights of linear and convolutional layers, and embeddings.
    Biases and norms are left alone. Which weights are present at first is drawn before the first step; the others
    become zero, and after every step they are exactly zero again, whatever momentum and weight decay do. As many
    weights of a layer as were present at first are present at any time. A subclass says by :meth:`growth` which come.

    Absent weights keep an optimizer state of their own between two exchanges. No weight that is present has anything of
    it: what comes starts anew.
    """

    density: Scalar = number(0.1, low=0.0, high=1.0, open_low=True)
    """Share of the weights of all masked layers together that are present. Their number is this share rounded to a
    whole number, exactly."""
    distribution: str = choice("erk", *DISTRIBUTIONS)
    """How that is spread over layers; see :func:`perennial.methods.sparse_training.densities`:

    - "erk": Erdos-Renyi-kernel, denser the smaller a layer is, by all dimensions of its weight;
    - "er": Erdos-Renyi, by inputs and outputs alone, which for linear layers is the same;
    - "uniform": every layer alike, the first and the last too.
    """
    drop: Scalar = number(0.3, low=0.0, high=1.0)
    """Share of a layer's present weights that are dropped in an exchange."""
    every: int | None = whole(100, optional=True)
    """Optimizer steps from one exchange to the next; 0: never, the mask stays as it was drawn; None: when a new task
    begins."""

    OFF = {"density": 1.0}
    MEASURES = ("weight_density",)

    def growth(self, name: str, state: Any, context: Context) -> Tensor:
        """How much each weight of a parameter deserves to be present, at least 0, the parameter's shape."""
        raise NotImplementedError(f"{type(self).__name__} does not say which weights to grow")

    def share(self, context: Context) -> Scalar:
        """The share of the present weights to drop in this event."""
        return self.drop

    def init(self, params: Tensors, units: UnitMap) -> Any:
        shapes = {name: params[name].shape for name in self.acts_on(params, units)}
        if not shapes:
            raise ValueError(f"{self.name} found no weight matrix in this network to make sparse")
        empty = [name for name, count in counts(shapes, float(self.density), self.distribution).items() if not count]
        if empty:
            raise ValueError(
                f"{self.name} with density={self.density:g} and distribution={self.distribution!r} leaves no weight in "
                f"{', '.join(empty)}, and nothing would pass: take a higher density or another distribution"
            )
        return SparseTrainingState({name: torch.ones_like(params[name], dtype=torch.bool) for name in shapes})

    def begin(self, params: Tensors, state: Any, context: Context) -> tuple[dict[str, Tensor], Any]:
        """Draw the first mask: in each layer every set of weights of the right number is as likely as any other."""
        present = counts({name: m.shape for name, m in state.mask.items()}, float(self.density), self.distribution)
        mask = {}
        for name, everywhere in state.mask.items():
            drawn = context.noise.uniform(f"{name}/begin", elements(everywhere))
            count = torch.full((), present[name], dtype=torch.int64, device=everywhere.device)
            mask[name] = _largest(drawn, torch.ones_like(everywhere), count, drawn)
        return _masked(params, mask), state._replace(mask=mask)

    def acts_on(self, params: Tensors, units: UnitMap) -> list[str]:
        # In the order of the parameters, not of their use: counts must not depend on whether the network was traced.
        matrices = units.matrices(params)
        return [name for name in params if name in matrices]

    def step(self, params: Tensors, state: Any, context: Context) -> tuple[dict[str, Tensor], Any]:
        return _masked(params, state.mask), state

    def due(self, steps_made: int, task_ended: bool) -> bool:
        return steps_made > 0 and falls_due(self.every, steps_made, task_ended)

    def event(self, params: Tensors, state: Any, context: Context) -> Outcome:
        share = self.share(context)
        changed, mask, touched = {}, {}, {}
        for name, old in state.mask.items():
            w, noise, element = params[name], context.noise, elements(old)
            count = old.sum()
            gone = self._whole(share, count)
            kept = _largest(w.abs(), old, count - gone, noise.uniform(f"{name}/drop", element))
            score = self.growth(name, state, context)
            grown = _largest(score, ~kept, gone, noise.uniform(f"{name}/grow", element))
            mask[name] = kept | grown
            stays = old & mask[name]
            changed[name] = torch.where(stays, w, 0.0)
            touched[name] = {-1: ~stays}  # what comes starts anew; what is absent has nothing to keep
        return Outcome(changed, state._replace(mask=mask), touched)

    def _whole(self, share: Scalar, count: Tensor) -> Tensor:
        """The whole part of a share of a count, int64 []."""
        # A product of rounded numbers may fall just below a whole number.
        eps = torch.finfo(self.drop.dtype if isinstance(self.drop, Tensor) else torch.float64).eps
        part = count.to(torch.float64) * share * (1 + 2 * eps)
        return torch.minimum(part.floor().to(torch.int64), count)

    def measured(self, state: Any) -> dict[str, float]:
        masks = state.mask.values()
        return {"weight_density": float(sum(int(m.sum()) for m in masks)) / sum(m.numel() for m in masks)}


def densities(shapes: Mapping[str, Sequence[int]], density: float, distribution: str = "erk") -> dict[str, float]:
    r"""The density of each layer when a share of all weights is present.

    Erdos-Renyi-kernel ("erk"): with N the number of a layer's weights and n its dimensions,

    .. math:: d_l = \min\!\left(1, \epsilon \frac{\sum_i n_{l,i}}{\prod_i n_{l,i}}\right), \qquad
        \sum_l d_l N_l = d \sum_l N_l

    Layers that would be denser than 1 are dense, and the others share what is left. "er" has only inputs and outputs in
    the fraction, :math:`(n_{in} + n_{out}) / (n_{in} n_{out})`; "uniform" gives every layer the same.

    Sources: Mocanu et al., Nature Communications 2018 ("er"); Evci et al., ICML 2020 ("erk").

    Args:
        shapes: of the weights [out, in, ...] by name.
        density: share of all weights, above 0 and at most 1.
        distribution: one of "erk", "er", "uniform".

    Returns:
        The density of each layer, by name, in the order of ``shapes``.

    Raises:
        ValueError: a density out of range, an unknown distribution, or a weight of fewer than two dimensions.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density:g}; it must be above 0 and at most 1")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution is {distribution!r}; it is one of {', '.join(DISTRIBUTIONS)}")
    flat = [name for name, shape in shapes.items() if len(shape) < 2]
    if flat:
        raise ValueError(f"{', '.join(flat)} has fewer than two dimensions and is no weight of a layer")
    if distribution == "uniform":
        return dict.fromkeys(shapes, float(density))
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    read = {name: shape if distribution == "erk" else shape[:2] for name, shape in shapes.items()}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in read.items()}
    found = dict.fromkeys(shapes, 1.0)
    free = list(shapes)
    while free:
        left = density * sum(sizes.values()) - sum(size for name, size in sizes.items() if name not in free)
        epsilon = left / sum(raw[name] * sizes[name] for name in free)
        # To make one layer dense leaves more for the others, so that all that are too dense now will be in the end.
        sparse = [name for name in free if epsilon * raw[name] <= 1]
        if sparse == free:
            return found | {name: epsilon * raw[name] for name in free}
        free = sparse
    return found


def counts(shapes: Mapping[str, Sequence[int]], density: float, distribution: str = "erk") -> dict[str, int]:
    """How many weights of each layer are present: :func:`densities` in whole numbers.

    Their sum is ``round(density * weights)`` exactly: every layer has the whole part of its share, and what is missing
    goes, one weight each, to the layers with the largest remainders, of equals to the first.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    exact = {name: share * sizes[name] for name, share in densities(shapes, density, distribution).items()}
    found = {name: math.floor(value) for name, value in exact.items()}
    missing = round(density * sum(sizes.values())) - sum(found.values())
    for name in sorted(exact, key=lambda name: found[name] - exact[name])[:missing]:
        found[name] += 1
    return found


def _masked(params: Tensors, mask: Tensors) -> dict[str, Tensor]:
    return {name: torch.where(m, params[name], 0.0) for name, m in mask.items()}


def _largest(score: Tensor, among: Tensor, count: Tensor, ties: Tensor) -> Tensor:
    """Which are the ``count`` of largest score among some: bool, the shape of ``among``.

    Args:
        score: at least 0, the shape of ``among``.
        among: bool, at least ``count`` of them.
        count: int64 [].
        ties: random numbers that decide between equals, the shape of ``among``.
    """
    score = torch.where(among, score, -1.0).flatten()
    shuffled = ties.flatten().argsort()
    order = shuffled.gather(0, torch.sort(score.gather(0, shuffled), stable=True, descending=True).indices)
    rank = torch.zeros_like(order).scatter(0, order, torch.arange(len(score), device=score.device))
    return (rank < count).reshape(among.shape) & among
