"""What metrics of hidden units need of their activations: sums over samples, which can be taken batch by batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def features(activation: Tensor) -> Tensor:
    """A layer's activation as the metrics take it: every position of a sample counts as a sample of its own.

    Args:
        activation: [samples, units] or [samples, units, positions...].

    Returns:
        [samples x positions, units].

    Raises:
        ValueError: there is no dimension of units, or no sample.
    """
    if activation.dim() < 2 or activation.shape[0] == 0:
        raise ValueError(f"activations are [samples, units, ...] of at least one sample, not {list(activation.shape)}")
    return activation.movedim(1, -1).flatten(0, -2) if activation.dim() > 2 else activation


class UnitStatistics(NamedTuple):
    """Sums over samples of a layer's activation; ``a + b`` is that of both batches.

    Every metric of units takes it in place of the activation itself, and gives the same.
    """

    samples: Tensor
    """float64 []: how many."""
    active: Tensor
    """float64 [units]: samples on which the unit is not exactly zero."""
    saturated: Tensor
    """float64 [units]: samples on which it is at a bound; NaN if the bounds were not given. Bounds are the caller's to
    keep the same when statistics are added."""
    magnitude: Tensor
    """float64 [units]: the sum of its magnitudes."""
    length: Tensor
    """float64 []: the sum of the Euclidean norms of the samples' features."""
    gram: Tensor
    """float64 [units, units]: the sum of products of two units; empty if it was not asked for."""

    @classmethod
    def of(
        cls,
        activation: Tensor,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        margin: float = 0.01,
        gram: bool = True,
    ) -> UnitStatistics:
        """The sums over one batch.

        Args:
            activation: [samples, units] or [samples, units, positions...].
            low: bound of the activation function from below, for saturation.
            high: from above.
            margin: how far from a bound a value counts as at it.
            gram: take the Gram matrix too, for ranks and for duplicate units.
        """
        h = features(activation.detach())
        wide = wide_dtype(h)
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        if math.isfinite(low) or math.isfinite(high):
            saturated = ((h <= low + margin) | (h >= high - margin)).sum(0, dtype=wide)
        else:
            saturated = torch.full_like(h[0], torch.nan, dtype=wide)
        return cls(
            torch.tensor(h.shape[0], dtype=wide, device=h.device),
            (h != 0).sum(0, dtype=wide),
            saturated,
            h.abs().sum(0, dtype=wide),
            torch.linalg.vector_norm(h, dim=1, dtype=wide).sum(),
            h.to(wide).T @ h.to(wide) if gram else h.new_zeros(0, 0, dtype=wide),
        )

    def __add__(self, other: object) -> UnitStatistics:
        if not isinstance(other, UnitStatistics):
            return NotImplemented
        if self.active.shape != other.active.shape or self.gram.shape != other.gram.shape:
            raise ValueError(
                f"statistics of {len(self.active)} units with a Gram matrix {list(self.gram.shape)} and of "
                f"{len(other.active)} units with one {list(other.gram.shape)} are not of the same layer"
            )
        return UnitStatistics(*(a + b for a, b in zip(self, other, strict=True)))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """float64, or float32 on a device that has none."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def statistics_of(
    layers: Sequence[Tensor | UnitStatistics] | Tensor | UnitStatistics, *, gram: bool = False
) -> list[UnitStatistics]:
    """The statistics of each layer; a single layer counts as a list of one.

    Raises:
        ValueError: there is no layer, or a Gram matrix is wanted that was not taken.
    """
    given = [layers] if isinstance(layers, (Tensor, UnitStatistics)) else list(layers)
    if not given:
        raise ValueError("there is no layer of hidden units; give at least one activation [samples, units]")
    found = [one if isinstance(one, UnitStatistics) else UnitStatistics.of(one, gram=gram) for one in given]
    if gram and any(len(one.gram) != len(one.active) for one in found):
        raise ValueError("these statistics were taken without the Gram matrix: UnitStatistics.of(h, gram=True)")
    return found
