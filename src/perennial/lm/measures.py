"""What a sequence of tasks and a stack of adapters are measured by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from perennial.lm.factors import Factors
from perennial.metrics.ranks import rank_of_shares

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Continual:
    r"""What the scores :math:`a_{t,i}` on task i after task t tell, i and t from 1 to T."""

    average: float
    r"""At the end: :math:`\frac{1}{T} \sum_i a_{T,i}`."""
    forgetting: float
    r"""Lost since the best: :math:`\frac{1}{T-1} \sum_{i<T} (\max_t a_{t,i} - a_{T,i})` (Chaudhry et al., 2018)."""
    backward_transfer: float
    r"""Changed since learned: :math:`\frac{1}{T-1} \sum_{i<T} (a_{T,i} - a_{i,i})` (Lopez-Paz and Ranzato, 2017)."""
    learning: float
    r"""When just learned: :math:`\frac{1}{T} \sum_i a_{i,i}`, the side of plasticity (Riemer et al., 2019)."""


def continual(scores: ArrayLike) -> Continual:
    """Measures of a whole sequence.

    Args:
        scores: [tasks, tasks], a row for each time and a column for each task; entries above the diagonal, before a
            task was learned, are not looked at.

    Raises:
        ValueError: not square, or a score on or below the diagonal is missing.
    """
    a = np.asarray(scores, dtype=np.float64)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not len(a):
        raise ValueError(f"scores are {list(a.shape)}; they have a row and a column for each task")
    below = np.tril(np.ones_like(a, dtype=bool))
    if not np.isfinite(a[below]).all():
        raise ValueError("a score on or below the diagonal is missing: the sequence is not finished")
    known = np.where(below, a, -np.inf)
    last, learned = a[-1], np.diag(a)
    lost = (known.max(0) - last)[:-1]
    return Continual(
        float(last.mean()),
        float(lost.mean()) if len(lost) else 0.0,
        float((last - learned)[:-1].mean()) if len(lost) else 0.0,
        float(learned.mean()),
    )


@dataclass(frozen=True)
class Collision:
    """How often two updates change the same weights."""

    rate: float
    r"""Share of the weights that both change, :math:`\#(|\Delta W_i| > \tau \wedge |\Delta W_j| > \tau) / nm`."""
    floor: float
    r"""What independent places would give at the same densities, matrix by matrix: :math:`\sum_m N_m s_{i,m} s_{j,m} /
    \sum_m N_m`. The rate falls with the square of the density, whether or not anything is avoided."""

    @property
    def ratio(self) -> float:
        """Rate by floor: 1 is no avoidance beyond sparsity, below 1 is avoidance; NaN where one changes nothing."""
        return self.rate / self.floor if self.floor else float("nan")


def collision(one: Mapping[str, Tensor], other: Mapping[str, Tensor], threshold: float = 0.0) -> Collision:
    """The collisions of two updates by matrix.

    Args:
        one: updates by module, any shapes; or masks.
        other: of the same modules.
        threshold: what an entry must exceed to count as changed. Trained with an adaptive optimizer hardly any is
            exactly 0, so that a threshold must be chosen; :func:`relative_threshold` makes one.

    Raises:
        ValueError: other modules or shapes, or none.
    """
    _same(one, other)
    both, expected, total = 0, 0.0, 0
    for module, update in one.items():
        first, second = (t if t.dtype == torch.bool else t.abs() > threshold for t in (update, other[module]))
        both += int((first & second).sum())
        expected += int(first.sum()) * int(second.sum()) / first.numel()
        total += first.numel()
    return Collision(both / total, expected / total)


def relative_threshold(updates: Sequence[Mapping[str, Tensor]], share: float = 0.1) -> float:
    """A threshold for :func:`collision`: a share of the root mean square entry of all updates together."""
    squares = sum(float(t.double().square().sum()) for update in updates for t in update.values())
    return share * math.sqrt(squares / max(1, sum(t.numel() for update in updates for t in update.values())))


def row_overlap(one: Factors, other: Factors, *, normalize: bool = False) -> float:
    r"""How far two adapters' row spaces are from orthogonal, :math:`\sum_{ij} |A_1 A_2^\top|_{ij}`, O-LoRA's measure;
    the mean absolute cosine of the rows with ``normalize``, which does not shrink with them."""
    a, b = one.down.detach().float(), other.down.detach().float()
    if normalize:
        a, b = (torch.nn.functional.normalize(t, dim=1) for t in (a, b))
        return float((a @ b.T).abs().mean())
    return float((a @ b.T).abs().sum())


def update_cosine(one: Mapping[str, Factors], other: Mapping[str, Factors]) -> float:
    r"""The cosine of two updates as one long vector each, :math:`\langle \Delta W_1, \Delta W_2 \rangle /
    (\lVert \Delta W_1 \rVert \lVert \Delta W_2 \rVert)`, from products of rank by rank; NaN where one is 0."""
    _same({k: f.down[0] for k, f in one.items()}, {k: f.down[0] for k, f in other.items()})

    def inner(a: Factors, b: Factors) -> float:
        up = b.up.detach().double().T @ a.up.detach().double()
        down = b.down.detach().double() @ a.down.detach().double().T
        return float(a.scaling * b.scaling * (up * down).sum())

    cross, first, second = (
        sum(inner(f, g) for f, g in zip(x.values(), y.values(), strict=True))
        for x, y in ((one, other), (one, one), (other, other))
    )
    return cross / math.sqrt(first * second) if first > 0 and second > 0 else float("nan")


def singular_values(factors: Factors) -> Tensor:
    """Of an update, in descending order, float64, [rank]: from the factors' QR decompositions."""
    r_b = torch.linalg.qr(factors.up.detach().double()).R
    r_a = torch.linalg.qr(factors.down.detach().double().T).R
    found: Tensor = torch.linalg.svdvals(factors.scaling * r_b @ r_a.T)
    return found


def adapter_measures(adapter: Mapping[str, Factors], threshold: float) -> dict[str, float]:
    """Measures of one adapter, means over its matrices: ``nuclear_norm``, ``frobenius_norm``, ``effective_rank``
    (entropy of the singular values), ``sparsity`` (share of entries up to the threshold), ``zeros`` (share of exact
    zeros)."""
    values = [singular_values(f) for f in adapter.values()]
    updates = [f.update for f in adapter.values()]
    count = sum(u.numel() for u in updates)
    return {
        "nuclear_norm": float(np.mean([float(s.sum()) for s in values])),
        "frobenius_norm": float(np.mean([float(s.norm()) for s in values])),
        "effective_rank": float(np.mean([float(rank_of_shares(s)) for s in values])),
        "sparsity": sum(int((u.abs() <= threshold).sum()) for u in updates) / count,
        "zeros": sum(int((u == 0).sum()) for u in updates) / count,
    }


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    if not one or one.keys() != other.keys():
        raise ValueError("the updates are of different modules, or of none; compare adapters of one stack")
    for module, tensor in one.items():
        if tensor.shape != other[module].shape:
            raise ValueError(f"the updates of {module} are {list(tensor.shape)} and {list(other[module].shape)}")
