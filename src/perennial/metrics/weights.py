"""How large the weights, their gradients and their changes are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from perennial.metrics.statistics import wide_dtype

Tensors = Sequence[Tensor] | Mapping[str, Tensor]


def weight_magnitude(weights: Tensors) -> Tensor:
    r"""Mean absolute value over all weights and biases, :math:`\frac{1}{n} \sum_i |w_i|`.

    Every parameter counts by its number of elements.

    Source: Dohare et al. (Nature, 2024).

    Args:
        weights: parameters of any shapes, in order or by name.

    Returns:
        [], float64.
    """
    given = _listed(weights, "weights")
    return _total([w.abs().sum(dtype=wide_dtype(w)) for w in given]) / sum(w.numel() for w in given)


def weight_norm_l2(weights: Tensors) -> Tensor:
    r"""Euclidean norm of all weights and biases, :math:`\sqrt{\sum_i w_i^2}`.

    Source: Elsayed and Mahmood (ICLR 2024), figure of diagnostics. Their L1 norm is :func:`weight_magnitude` times the
    number of parameters.

    Args:
        weights: parameters of any shapes, in order or by name.

    Returns:
        [], float64.
    """
    return _total([w.to(wide_dtype(w)).square().sum() for w in _listed(weights, "weights")]).sqrt()


def distance_l2(weights: Tensors, start: Tensors) -> Tensor:
    r"""Euclidean distance from other weights, as the start: :math:`\sqrt{\sum_i (w_i - w_i^0)^2}`.

    Source: Lyle et al. (arXiv 2303.01486); Kumar et al. (arXiv 2308.11958). Plasticine divides by :math:`\sqrt n`.

    Args:
        weights: parameters, in order or by name.
        start: as many, of the same shapes.

    Returns:
        [], float64.
    """
    return _total([d.square().sum() for d in _differences(weights, start)]).sqrt()


def distance_l1(weights: Tensors, start: Tensors) -> Tensor:
    r"""Sum of absolute differences from other weights, as the start: :math:`\sum_i |w_i - w_i^0|`.

    Source: Gong et al. (Findings of ACL 2022), the distance from the pretrained weights.

    Args:
        weights: parameters, in order or by name.
        start: as many, of the same shapes.

    Returns:
        [], float64.
    """
    return _total([d.abs().sum() for d in _differences(weights, start)])


def gradient_norm_l0(gradients: Tensors) -> Tensor:
    r"""Share of entries of the gradient that are not zero, :math:`\lVert g \rVert_0 / n`, in [0, 1].

    Source: Elsayed and Mahmood (ICLR 2024), figure of diagnostics, there without the division.

    Args:
        gradients: of any shapes, in order or by name.

    Returns:
        [], float64.
    """
    given = _listed(gradients, "gradients")
    return _total([(g != 0).sum(dtype=wide_dtype(g)) for g in given]) / sum(g.numel() for g in given)


def gradient_norm_l1(gradients: Tensors) -> Tensor:
    r"""Sum of the magnitudes of the gradient's entries, :math:`\lVert g \rVert_1`.

    Source: Elsayed and Mahmood (ICLR 2024), figure of diagnostics.

    Args:
        gradients: of any shapes, in order or by name.

    Returns:
        [], float64.
    """
    return _total([g.abs().sum(dtype=wide_dtype(g)) for g in _listed(gradients, "gradients")])


def gradient_norm_l2(gradients: Tensors) -> Tensor:
    r"""Euclidean norm of the gradient over all parameters, :math:`\lVert g \rVert_2`.

    Args:
        gradients: of any shapes, in order or by name.

    Returns:
        [], float64.
    """
    return _total([g.to(wide_dtype(g)).square().sum() for g in _listed(gradients, "gradients")]).sqrt()


def collision_rate(first: Tensors, second: Tensors, *, threshold: float = 0.0) -> Tensor:
    r"""Share of parameters that two updates both change: :math:`\frac{1}{n} \sum_i \mathbf{1}[|\Delta_i^a| > \tau]\,
    \mathbf{1}[|\Delta_i^b| > \tau]`, in [0, 1].

    Sparse updates collide rarely by chance alone: :func:`collision_ratio` compares with that.

    Source: N-LoRA (Yang et al., COLING 2025).

    Args:
        first: the change of every parameter by one task, in order or by name.
        second: by another, of the same shapes.
        threshold: :math:`\tau`: magnitude up to which a change counts as none.

    Returns:
        [], float64.
    """
    a, b = _changed(first, second, threshold)
    return (a & b).sum(dtype=wide_dtype(a)) / a.numel()


def collision_ratio(first: Tensors, second: Tensors, *, threshold: float = 0.0) -> Tensor:
    r"""The collision rate by that of independent updates of the same sparsity: :math:`c / (p_a p_b)`.

    1 where two updates avoid each other no more than their sparsity does by chance, 0 where they never meet; NaN where
    one of them changes nothing.

    Args:
        first: the change of every parameter by one task, in order or by name.
        second: by another, of the same shapes.
        threshold: magnitude up to which a change counts as none.

    Returns:
        [], float64, at least 0.
    """
    a, b = _changed(first, second, threshold)
    wide = wide_dtype(a)
    both, one, other = ((a & b).sum(dtype=wide), a.sum(dtype=wide), b.sum(dtype=wide))
    return both * a.numel() / (one * other)


def _listed(given: Tensors, what: str) -> list[Tensor]:
    found = [w.detach() for w in (given.values() if isinstance(given, Mapping) else given)]
    if not found:
        raise ValueError(f"there are no {what}; give at least one tensor")
    return found


def _paired(first: Tensors, second: Tensors) -> list[tuple[Tensor, Tensor]]:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        if first.keys() != second.keys():
            names = ", ".join(sorted(first.keys() ^ second.keys())[:5])
            raise ValueError(f"the two are not of the same parameters: {names} is in one alone")
        second = {name: second[name] for name in first}
    ours, theirs = _listed(first, "weights"), _listed(second, "weights")
    if len(ours) != len(theirs):
        raise ValueError(f"the two are not of the same parameters: there are {len(ours)} and {len(theirs)}")
    pairs = list(zip(ours, theirs, strict=True))
    for number, (a, b) in enumerate(pairs):
        if a.shape != b.shape:
            name = list(first)[number] if isinstance(first, Mapping) else f"number {number}"
            raise ValueError(f"{name} is {list(a.shape)} in the one and {list(b.shape)} in the other")
    return pairs


def _differences(weights: Tensors, start: Tensors) -> list[Tensor]:
    return [a.to(wide_dtype(a)) - b.to(a.device, wide_dtype(a)) for a, b in _paired(weights, start)]


def _changed(first: Tensors, second: Tensors, threshold: float) -> tuple[Tensor, Tensor]:
    pairs = _paired(first, second)
    a = torch.cat([(x.abs() > threshold).flatten() for x, _ in pairs])
    return a, torch.cat([(y.abs() > threshold).flatten().to(a.device) for _, y in pairs])


def _total(parts: list[Tensor]) -> Tensor:
    device = parts[0].device
    return torch.stack([part.to(device) for part in parts]).sum()
