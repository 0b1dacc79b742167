"""How much two masks share, against what chance alone would have them share, and how sparse weights really are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perennial.tickets.masks import prunable

Floats = NDArray[np.float64]

_NEGLIGIBLE = 1e-25
"""Probabilities below this share of the largest are left out of a sum; they fall faster than geometrically."""


@dataclass(frozen=True)
class Shared:
    """What two masks share, in one layer or in all."""

    both: int
    r"""Weights that both keep, :math:`|A \cap B|`."""
    either: int
    r"""Weights that one of them keeps at least, :math:`|A \cup B|`."""
    jaccard: float
    r""":math:`J = |A \cap B| / |A \cup B|`; NaN where neither keeps a weight."""
    floor: float
    """The mean of J over independent, uniformly random masks that keep as many weights of every layer."""
    interval: tuple[float, float]
    """The 2.5% and the 97.5% quantile of J over such masks."""

    @property
    def excess(self) -> float:
        r""":math:`(J - \text{floor}) / (1 - \text{floor})`: 0 by chance, 1 for equal masks; NaN where chance makes
        them equal."""
        return (self.jaccard - self.floor) / (1 - self.floor) if self.floor < 1 else float("nan")


@dataclass(frozen=True)
class Overlap:
    """Of :func:`jaccard`."""

    layers: dict[str, Shared]
    """By parameter name."""
    overall: Shared
    """Of all layers together: intersections and unions added up."""

    def __str__(self) -> str:
        rows = [*self.layers.items(), ("all", self.overall)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(
            f"{name:<{width}}  J {one.jaccard:.3f}, by chance {one.floor:.3f} "
            f"[{one.interval[0]:.3f}, {one.interval[1]:.3f}], excess {one.excess:.3f}"
            for name, one in rows
        )


def jaccard(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Overlap:
    r"""How similar two masks are, layer by layer and overall, :math:`|A \cap B| / |A \cup B|`, and what chance makes.

    Of two independent, uniformly random masks that keep a and b of a layer's N weights, the intersection K is
    hypergeometric, and the Jaccard index is expected to be

    .. math:: E\left[\frac{K}{a + b - K}\right], \qquad
        P(K = k) = \binom{a}{k} \binom{N - a}{b - k} \Big/ \binom{N}{b}

    which is summed over k. Overall, the intersection is the sum of the layers' independent ones. Terms below
    :math:`10^{-25}` of the largest are left out; otherwise it is exact up to rounding, about 1e-12.

    Args:
        a: bool of the parameter's shape, by name; True is kept.
        b: of the same names and shapes.

    Raises:
        ValueError: no layers, other names or shapes, tensors that are not bool.
    """
    _check(a, b)
    layers, counts, chances = {}, [], []
    for name, mask in a.items():
        other = b[name].to(mask.device)
        both, total = int((mask & other).sum()), int(mask.sum()) + int(other.sum())
        first, chance = _hypergeometric(mask.numel(), int(mask.sum()), int(other.sum()))
        layers[name] = _shared(both, total, first, chance)
        counts.append((both, total, first))
        chances.append(chance)
    both, total, first = (sum(column) for column in zip(*counts, strict=True))
    together = chances[0]
    for chance in chances[1:]:
        together = _convolved(together, chance)
    return Overlap(layers, _shared(both, total, first, together))


@dataclass(frozen=True)
class Zeros:
    """How many weights are zero."""

    zeros: int
    """Weights that are exactly 0."""
    total: int
    """Weights."""

    @property
    def kept(self) -> int:
        """Weights that are not 0."""
        return self.total - self.zeros

    @property
    def sparsity(self) -> float:
        """Share of weights that are 0."""
        return self.zeros / self.total if self.total else float("nan")

    @property
    def density(self) -> float:
        """Share of weights that are not 0."""
        return self.kept / self.total if self.total else float("nan")


@dataclass(frozen=True)
class Sparsity:
    """Of :func:`sparsity`."""

    layers: dict[str, Zeros]
    """By parameter name."""
    overall: Zeros
    """Of all layers together."""


def sparsity(of: nn.Module | Mapping[str, Tensor]) -> Sparsity:
    """The zeros that are there, counted: what a mask has become after training, saving or loading.

    Args:
        of: a model, of which those of :func:`perennial.tickets.prunable` are counted; or masks, or weights, by
            name, all of which are.

    Raises:
        ValueError: nothing to count.
    """
    if isinstance(of, nn.Module):
        named = dict(of.named_parameters())
        of = {name: named[name] for name in prunable(of)}
    if not of:
        raise ValueError("there are no weights to count; give a model with weights of two dimensions, or tensors")
    layers = {name: Zeros(int((t == 0).sum()), t.numel()) for name, t in of.items()}
    return Sparsity(layers, Zeros(sum(z.zeros for z in layers.values()), sum(z.total for z in layers.values())))


def _check(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    if not a:
        raise ValueError("the masks have no layers, so that there is nothing to compare")
    if a.keys() != b.keys():
        one, other = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
        raise ValueError(
            f"the masks name different layers: only the first has {', '.join(one) or 'none'}, only the second "
            f"{', '.join(other) or 'none'}; compare masks of one architecture"
        )
    for name, mask in a.items():
        if mask.shape != b[name].shape:
            raise ValueError(
                f"the masks of {name} are {list(mask.shape)} and {list(b[name].shape)}; compare masks of one "
                "architecture"
            )
        for given in (mask, b[name]):
            if given.dtype != torch.bool:
                raise ValueError(f"a mask of {name} is {given.dtype}; masks are bool, True where a weight is kept")


def _shared(both: int, total: int, first: int, chance: Floats) -> Shared:
    """Of the intersection and of the sum of both counts; ``chance`` are the probabilities of the intersections
    ``first``, ``first + 1``, ..."""
    either = total - both
    if either == 0:
        return Shared(0, 0, float("nan"), float("nan"), (float("nan"), float("nan")))
    k = first + np.arange(len(chance), dtype=np.float64)
    index = k / (total - k)
    below = np.cumsum(chance)
    low, high = (float(index[min(int(np.searchsorted(below, p)), len(index) - 1)]) for p in (0.025, 0.975))
    return Shared(both, either, both / either, float(chance @ index), (low, high))


def _hypergeometric(population: int, a: int, b: int) -> tuple[int, Floats]:
    """The least intersection of two random subsets that is not negligible, and the probabilities from there on."""
    least, most = max(0, a + b - population), min(a, b)
    peak = min(most, max(least, (a + 1) * (b + 1) // (population + 2)))
    spread = (a * b * (1 - a / population) * (1 - b / population) / population) ** 0.5 if population else 0.0
    reach = int(12 * spread) + 32
    while True:
        first, last = max(least, peak - reach), min(most, peak + reach)
        k = np.arange(first, last, dtype=np.float64)
        # log P(k + 1) - log P(k): sums of these lose less than logarithms of factorials, which are large
        steps = np.log((a - k) * (b - k)) - np.log((k + 1) * (population - a - b + k + 1))
        logs = np.concatenate(([0.0], np.cumsum(steps)))
        chance = np.exp(logs - logs.max())
        cut_low = first > least and chance[0] > _NEGLIGIBLE
        cut_high = last < most and chance[-1] > _NEGLIGIBLE
        if not (cut_low or cut_high):
            return first, np.asarray(chance / chance.sum(), dtype=np.float64)
        reach *= 2


def _convolved(one: Floats, other: Floats) -> Floats:
    """The distribution of a sum."""
    if min(len(one), len(other)) <= 256:
        return np.asarray(np.convolve(one, other), dtype=np.float64)
    length = len(one) + len(other) - 1
    found = np.fft.irfft(np.fft.rfft(one, length) * np.fft.rfft(other, length), length).clip(min=0)
    return np.asarray(found / found.sum(), dtype=np.float64)
