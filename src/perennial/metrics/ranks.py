"""How many directions the features of a layer spread over.

Computed in float64 from the Gram matrix of the shorter side, which costs a product and the eigenvalues of a matrix of
that side, where it lies. Singular values below :math:`10^{-7}` of the largest are rounding, and count as zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perennial.metrics.statistics import UnitStatistics, statistics_of, wide_dtype
from perennial.metrics.statistics import features as as_matrix

_TIES = 1e-9
"""By how much, as a share, a cumulative sum may fall short of its share by rounding."""


def singular_values(matrix: Tensor | UnitStatistics) -> Tensor:
    r"""Singular values, largest first, of [samples, units], or of all samples that statistics were taken of.

    Args:
        matrix: [samples, units, ...], or statistics with the Gram matrix.

    Returns:
        float64 [min(samples, units)], or [units] of statistics; NaN if an activation is not finite, as are all ranks.
    """
    if isinstance(matrix, UnitStatistics):
        (found,) = statistics_of(matrix, gram=True)
        gram = found.gram
    else:
        x = as_matrix(matrix.detach())
        x = x.to(wide_dtype(x))
        gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    squares = eigenvalues(gram).clamp(min=0).flip(-1)
    return torch.where(squares <= squares[:1] * 1e-14, 0.0, squares).sqrt()


def eigenvalues(symmetric: Tensor) -> Tensor:
    """Of a symmetric matrix, ascending; NaN if an entry is not finite, at which the decomposition itself would stop."""
    finite = torch.isfinite(symmetric).all()
    return torch.where(finite, torch.linalg.eigvalsh(torch.where(finite, symmetric, 0.0)), torch.nan)


def effective_rank_entropy(features: Tensor | UnitStatistics) -> Tensor:
    r"""The exponential of the entropy of the singular values: :math:`\exp(-\sum_i p_i \ln p_i)`, with
    :math:`p_i = \sigma_i / \sum_k \sigma_k`.

    It is k for k equal directions, does not depend on scale, and counts weak directions for less. Features that are all
    zero have rank 0.

    Source: Roy and Vetterli (EUSIPCO 2007); the "effective rank" of Dohare et al. (Nature, 2024).

    Args:
        features: [samples, units, ...], or the layer's :class:`UnitStatistics`.

    Returns:
        [], float64, in [0, min(samples, units)].
    """
    return rank_of_shares(singular_values(features))


def rank_of_shares(values: Tensor) -> Tensor:
    r""":math:`\exp(-\sum_i p_i \ln p_i)` with :math:`p_i = v_i / \sum_k v_k`; 0 if all are zero.

    Args:
        values: [n], none negative.
    """
    total = values.sum()
    share = values / torch.where(total > 0, total, 1.0)
    entropy = -(share * torch.where(share > 0, share, 1.0).log()).sum()
    return torch.where(total > 0, entropy.exp(), 0.0 * total)


def stable_rank_fro(features: Tensor | UnitStatistics) -> Tensor:
    r"""The squared Frobenius norm by the squared largest singular value:
    :math:`\lVert A \rVert_F^2 / \lVert A \rVert_2^2 = \sum_i \sigma_i^2 / \sigma_1^2`.

    It moves little when the matrix does, and one strong direction (a common mean, say) brings it close to 1. Features
    that are all zero have rank 0.

    Source: Rudelson and Vershynin (2007), the "stable rank" of numerical mathematics. What Dohare et al. and Plasticine
    call stable rank is :func:`rank_99`.

    Args:
        features: [samples, units, ...], or the layer's :class:`UnitStatistics`.

    Returns:
        [], float64, in [0, min(samples, units)].
    """
    squares = singular_values(features).square()
    return squares.sum() / torch.where(squares[0] > 0, squares[0], 1.0)


def rank_99(features: Tensor | UnitStatistics) -> Tensor:
    r"""How many of the largest singular values make up 99% of their sum:
    :math:`\min\{k : \sum_{i \le k} \sigma_i \ge 0.99 \sum_i \sigma_i\}`.

    Features that are all zero have rank 0.

    Source: Kumar et al. (ICLR 2021, arXiv 2010.14498), srank with :math:`\delta = 0.01`; called "stable rank" and
    "absolute approximate rank" in the code of Dohare et al.

    Args:
        features: [samples, units, ...], or the layer's :class:`UnitStatistics`.

    Returns:
        [], float64, a whole number in [0, min(samples, units)].
    """
    return _reaching(singular_values(features))


def rank_99_energy(features: Tensor | UnitStatistics) -> Tensor:
    r"""How many of the largest singular values make up 99% of the sum of squares:
    :math:`\min\{k : \sum_{i \le k} \sigma_i^2 \ge 0.99 \sum_i \sigma_i^2\}`.

    Features that are all zero have rank 0. It is never above :func:`rank_99`.

    Source: Yang et al. (arXiv 1909.12255); "approximate rank" in the code of Dohare et al.

    Args:
        features: [samples, units, ...], or the layer's :class:`UnitStatistics`.

    Returns:
        [], float64, a whole number in [0, min(samples, units)].
    """
    return _reaching(singular_values(features).square())


def numerical_rank(features: Tensor) -> Tensor:
    r"""How many singular values are above rounding:
    :math:`\#\{i : \sigma_i > \varepsilon \max(N, m)\, \sigma_1\}`, :math:`\varepsilon` that of the given dtype.

    The singular values come from a decomposition of the matrix itself, in float64: the Gram matrix would lose the small
    ones.

    Source: the rule of NumPy's and of LAPACK's users, for the dtype in which the features were computed.

    Args:
        features: [samples, units, ...].

    Returns:
        [], float64, a whole number in [0, min(samples, units)].
    """
    if isinstance(features, UnitStatistics):
        raise TypeError("numerical_rank needs the activations themselves: the Gram matrix has lost the small values")
    x = as_matrix(features.detach())
    x = x if x.is_floating_point() else x.to(wide_dtype(x))
    tolerance = max(x.shape) * torch.finfo(x.dtype).eps
    finite = torch.isfinite(x).all()
    values = torch.linalg.svdvals(torch.where(finite, x, 0.0).to(wide_dtype(x)))
    return torch.where(finite, (values > tolerance * values[:1]).sum().to(values.dtype), torch.nan)


def _reaching(values: Tensor) -> Tensor:
    total = values.sum()
    short = values.cumsum(0) < 0.99 * total * (1 - _TIES)
    return torch.where(total > 0, short.sum() + 1.0, 0.0 * total)
