"""What hidden units do, over all of the layers given. An activation that is not finite makes the result NaN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perennial import scores
from perennial.metrics.statistics import UnitStatistics, statistics_of

_ROUNDING = 1e-12
"""By how much, as a share, products in float64 may be off."""

Layers = Sequence[Tensor | UnitStatistics] | Tensor | UnitStatistics


def dead_units(layers: Layers) -> Tensor:
    r"""Share of hidden units that are exactly zero on every sample, in [0, 1].

    .. math:: \frac{1}{m} \sum_j \mathbf{1}\left[\textstyle\max_n |h_{nj}| = 0\right]

    It applies where units can be exactly zero, as behind a rectifier: a tanh unit never is. It falls with the number of
    samples. A sum of activations, by which the published code judges, can cancel and is not used.

    Source: Dohare et al. (Nature, 2024). "Dead" also stands for :func:`rarely_active_units` and for
    :func:`dormant_units` in the literature.

    Args:
        layers: [samples, units, ...] of each hidden layer, or its :class:`UnitStatistics`.

    Returns:
        [].
    """
    found = statistics_of(layers)
    return _share([s.active == 0 for s in found], found)


def rarely_active_units(layers: Layers, *, share: float = 0.01) -> Tensor:
    r"""Share of hidden units that are other than zero on fewer than 1% of the samples, in [0, 1].

    .. math:: \frac{1}{m} \sum_j \mathbf{1}\left[\frac{1}{N} \sum_n \mathbf{1}[h_{nj} \ne 0] < 0.01\right]

    It applies where units can be exactly zero. Unlike :func:`dead_units` it does not fall as samples are added.

    Source: Dohare et al. (Nature, 2024), "dormant units" of the experiments on CIFAR-100 and on reinforcement learning.

    Args:
        layers: [samples, units, ...] of each hidden layer, or its :class:`UnitStatistics`.
        share: of the samples.

    Returns:
        [].
    """
    found = statistics_of(layers)
    return _share([s.active < share * s.samples * (1 - _ROUNDING) for s in found], found)


def dormant_units(layers: Layers, *, threshold: float = 0.025) -> Tensor:
    r"""Share of hidden units whose mean magnitude is small beside their layer's, in [0, 1].

    .. math::
        \frac{1}{m} \sum_j \mathbf{1}[s_j \le \tau], \qquad
        s_j = \frac{\overline{|h_j|}}{\frac{1}{m} \sum_k \overline{|h_k|}}

    It applies behind any activation function. A layer in which every unit is silent is dormant as a whole. The score
    does not depend on the layer's scale, and 1 is average.

    Source: Sokar et al. (ICML 2023, arXiv 2302.12902), equation 1, by the scaling of its formula. Its text says that
    scores add up to 1, which is :func:`dormant_units_of_sum`.

    Args:
        layers: [samples, units, ...] of each hidden layer, or its :class:`UnitStatistics`.
        threshold: :math:`\tau`; at 0 only units that are exactly silent.

    Returns:
        [].
    """
    found = statistics_of(layers)
    return _share([scores.normalised(s.magnitude) <= threshold for s in found], found)


def dormant_units_of_sum(layers: Layers, *, threshold: float = 0.025) -> Tensor:
    r"""Share of hidden units whose share of their layer's magnitude is small, in [0, 1].

    .. math::
        \frac{1}{m} \sum_j \mathbf{1}[s_j \le \tau], \qquad
        s_j = \frac{\overline{|h_j|}}{\sum_k \overline{|h_k|}}

    Scores add up to 1, so that the same threshold is m times as high for a layer of m units, and in a layer of 40 the
    average unit is dormant at 0.025. Use :func:`dormant_units`; this is for comparison with figures made so.

    Source: the text of Sokar et al. (ICML 2023, arXiv 2302.12902).

    Args:
        layers: [samples, units, ...] of each hidden layer, or its :class:`UnitStatistics`.
        threshold: :math:`\tau`.

    Returns:
        [].
    """
    found = statistics_of(layers)
    return _share([scores.normalised(s.magnitude) / len(s.magnitude) <= threshold for s in found], found)


def saturated_units(layers: Layers, *, low: float = -1.0, high: float = 1.0, share: float = 0.99) -> Tensor:
    r"""Share of hidden units that are at a bound of their activation function on 99% of the samples, in [0, 1].

    .. math::
        \frac{1}{m} \sum_j \mathbf{1}\left[\frac{1}{N} \sum_n
        \mathbf{1}[h_{nj} \le a + 0.01 \text{ or } h_{nj} \ge b - 0.01] \ge 0.99\right]

    The gradient of such a unit is close to zero, as that of a dead one is exactly. It applies to activation functions
    with two bounds a and b: tanh, sigmoid, ReLU6.

    Source: the counterpart of :func:`rarely_active_units`; by entry in place of by unit it is the complement of
    :func:`feature_activity`.

    Args:
        layers: [samples, units, ...] of each hidden layer, or its :class:`UnitStatistics`, taken with the bounds.
        low: a; for activations only.
        high: b; for activations only.
        share: of the samples.

    Returns:
        [].
    """
    found = _with_bounds(layers, low, high)
    marks = [s.saturated >= share * s.samples * (1 - _ROUNDING) for s in found]
    return _share(marks, found) + 0 * sum(s.saturated.sum() for s in found)


def feature_activity(layers: Layers, *, low: float | None = None, high: float | None = None) -> Tensor:
    r"""Share of entries at which a unit passes a gradient on, in [0, 1]: not zero, or not at a bound.

    .. math:: \frac{1}{N m} \sum_{n, j} \mathbf{1}[h_{nj} \ne 0], \quad\text{or}\quad
        \frac{1}{N m} \sum_{n, j} \mathbf{1}[a + 0.01 < h_{nj} < b - 0.01]

    It applies to rectifiers, and to activation functions with two bounds.

    Source: "fraction of active units" of Ma et al. (ICLR 2024, arXiv 2310.07418) and of Plasticine.

    Args:
        layers: [samples, units, ...] of each hidden layer, or its :class:`UnitStatistics`; taken with bounds, these
            count.
        low: a; None: a rectifier.
        high: b.

    Returns:
        [].
    """
    if (low is None) != (high is None):
        raise ValueError(f"low is {low} and high is {high}; give both bounds, or neither for a rectifier")
    bounded = low is not None and high is not None
    found = _with_bounds(layers, low, high) if low is not None and high is not None else statistics_of(layers)
    passed = total = torch.zeros((), dtype=found[0].active.dtype, device=found[0].active.device)
    for s in found:
        inside = s.samples - s.saturated
        active = inside if bounded else torch.where(torch.isnan(inside), s.active, inside)
        active = active + 0 * s.magnitude
        passed, total = passed + active.sum(), total + s.samples * len(s.active)
    return passed / total


def duplicate_units(layers: Layers, *, similarity: float = 0.99) -> Tensor:
    r"""Share of hidden units that are a multiple of another unit of their layer, in [0, 1].

    .. math::
        \frac{1}{m} \sum_j \mathbf{1}\left[\max_{k \ne j} \frac{|\sum_n h_{nj} h_{nk}|}
        {\sqrt{\sum_n h_{nj}^2 \sum_n h_{nk}^2}} \ge 0.99\right]

    The features of such a unit are already there. A unit that is always zero is a multiple of none (it is dead).
    It applies behind any activation function.

    Source: after the cloned units of Joudaki et al. (arXiv 2510.00304), without subtraction of the mean.

    Args:
        layers: [samples, units, ...] of each hidden layer, or its :class:`UnitStatistics` with the Gram matrix.
        similarity: smallest magnitude of the cosine.

    Returns:
        [].
    """
    marks, found = [], statistics_of(layers, gram=True)
    for s in found:
        size = torch.diagonal(s.gram).clamp(min=0).sqrt()
        cosine = s.gram.abs() / torch.where(size > 0, size, torch.inf) / torch.where(size > 0, size, torch.inf)[:, None]
        itself = torch.eye(len(size), dtype=torch.bool, device=size.device)
        marks.append((torch.where(itself, 0.0, cosine) >= similarity * (1 - _ROUNDING)).any(1))
    return _share(marks, found)


def feature_norm(layers: Layers) -> Tensor:
    r"""Mean Euclidean norm of a sample's features, :math:`\frac{1}{N} \sum_n \lVert \phi(x_n) \rVert_2`.

    Of several layers, the mean over them. It applies behind any activation function.

    Source: Lyle et al. (arXiv 2402.18762); Plasticine.

    Args:
        layers: [samples, units, ...] of each hidden layer, or its :class:`UnitStatistics`.

    Returns:
        [].
    """
    return torch.stack([s.length / s.samples for s in statistics_of(layers)]).mean()


def _share(marks: Sequence[Tensor], found: Sequence[UnitStatistics]) -> Tensor:
    counts = [mark.sum(dtype=s.magnitude.dtype) + 0 * s.magnitude.sum() for mark, s in zip(marks, found, strict=True)]
    return torch.stack(counts).sum() / sum(len(mark) for mark in marks)


def _with_bounds(layers: Layers, low: float, high: float) -> list[UnitStatistics]:
    if not low < high:
        raise ValueError(f"the bounds are {low} and {high}; the first must lie below the second")
    given = [layers] if isinstance(layers, (Tensor, UnitStatistics)) else layers
    return statistics_of(
        [h if isinstance(h, UnitStatistics) else UnitStatistics.of(h, low=low, high=high, gram=False) for h in given]
    )
