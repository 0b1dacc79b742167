"""What is known of every metric besides its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from perennial.metrics import curvature, learning, ranks, units, weights
from perennial.units import Nonlinearity


@dataclass(frozen=True)
class Metric:
    """An entry of :data:`perennial.metrics.METRICS`."""

    name: str
    """As in a study, a table or a tracker."""
    title: str
    """For readers."""
    function: Callable[..., Tensor]
    """Its definition."""
    of: Literal["units", "features", "weights", "change", "gradients", "two changes", "loss", "outputs", "two losses"]
    """What it is taken of: the activations of hidden layers together; of one layer; parameters; these and earlier ones;
    gradients; two updates; the loss or the outputs as a function of the parameters; losses before and after a step."""
    low: float
    """The smallest value it can take."""
    high: float
    """The largest."""
    better: Literal["lower", "higher", "neither"]
    """Which way a network that keeps learning goes."""
    needs: Literal["", "rectified", "bounded", "rectified or bounded"] = ""
    """What the activation function must be."""

    @property
    def share(self) -> bool:
        """Whether it is a share, in [0, 1]."""
        return (self.low, self.high) == (0.0, 1.0)


def _all() -> tuple[Metric, ...]:
    inf = math.inf
    return (
        Metric("dead_units", "Dead units", units.dead_units, "units", 0, 1, "lower", "rectified"),
        Metric(
            "rarely_active_units",
            "Units active on fewer than 1% of samples",
            units.rarely_active_units,
            "units",
            0,
            1,
            "lower",
            "rectified",
        ),
        Metric("dormant_units", "Dormant units", units.dormant_units, "units", 0, 1, "lower"),
        Metric(
            "dormant_units_of_sum",
            "Dormant units, scores adding up to 1",
            units.dormant_units_of_sum,
            "units",
            0,
            1,
            "lower",
        ),
        Metric("saturated_units", "Saturated units", units.saturated_units, "units", 0, 1, "lower", "bounded"),
        Metric(
            "feature_activity",
            "Feature activity",
            units.feature_activity,
            "units",
            0,
            1,
            "higher",
            "rectified or bounded",
        ),
        Metric("duplicate_units", "Duplicate units", units.duplicate_units, "units", 0, 1, "lower"),
        Metric("feature_norm", "Feature norm", units.feature_norm, "units", 0, inf, "neither"),
        Metric(
            "effective_rank_entropy",
            "Effective rank (entropy)",
            ranks.effective_rank_entropy,
            "features",
            0,
            inf,
            "higher",
        ),
        Metric("stable_rank_fro", "Stable rank (Frobenius)", ranks.stable_rank_fro, "features", 0, inf, "higher"),
        Metric("rank_99", "Rank, 99% of singular values", ranks.rank_99, "features", 0, inf, "higher"),
        Metric("rank_99_energy", "Rank, 99% of their squares", ranks.rank_99_energy, "features", 0, inf, "higher"),
        Metric("numerical_rank", "Numerical rank", ranks.numerical_rank, "features", 0, inf, "higher"),
        Metric("weight_magnitude", "Mean weight magnitude", weights.weight_magnitude, "weights", 0, inf, "lower"),
        Metric("weight_norm_l2", "Weight norm, L2", weights.weight_norm_l2, "weights", 0, inf, "lower"),
        Metric("distance_l2", "L2 distance", weights.distance_l2, "change", 0, inf, "neither"),
        Metric("distance_l1", "L1 distance", weights.distance_l1, "change", 0, inf, "neither"),
        Metric("gradient_norm_l0", "Gradient entries not zero", weights.gradient_norm_l0, "gradients", 0, 1, "higher"),
        Metric("gradient_norm_l1", "Gradient norm, L1", weights.gradient_norm_l1, "gradients", 0, inf, "neither"),
        Metric("gradient_norm_l2", "Gradient norm, L2", weights.gradient_norm_l2, "gradients", 0, inf, "neither"),
        Metric("collision_rate", "Collision rate", weights.collision_rate, "two changes", 0, 1, "lower"),
        Metric("collision_ratio", "Collisions by chance", weights.collision_ratio, "two changes", 0, inf, "lower"),
        Metric("sharpness", "Sharpness", curvature.sharpness, "loss", -inf, inf, "lower"),
        Metric(
            "hessian_effective_rank",
            "Effective rank of the Hessian",
            curvature.hessian_effective_rank,
            "loss",
            0,
            inf,
            "higher",
        ),
        Metric(
            "ntk_effective_rank",
            "Effective rank of the tangent kernel",
            curvature.ntk_effective_rank,
            "outputs",
            0,
            inf,
            "higher",
        ),
        Metric("sample_plasticity", "Sample plasticity", learning.sample_plasticity, "two losses", 0, 1, "higher"),
    )


METRICS: dict[str, Metric] = {metric.name: metric for metric in _all()}
"""Every metric of a network at one time, by name."""

AMBIGUOUS = {
    "stable_rank": "stable_rank_fro is the squared Frobenius norm by the squared largest singular value; what Dohare "
    "et al. and Plasticine call stable rank is rank_99",
    "effective_rank": "effective_rank_entropy is that of Roy and Vetterli; Kumar et al. use the words for rank_99",
    "srank": "rank_99 is that of Kumar et al.; stable_rank_fro is the stable rank of numerical mathematics",
    "approximate_rank": "rank_99_energy is that of the squares of singular values, rank_99 the absolute one",
    "rank": "numerical_rank counts all directions; effective_rank_entropy, stable_rank_fro, rank_99 and rank_99_energy "
    "count weak ones for less",
    "dead": "dead_units are exactly zero on every sample, rarely_active_units other than zero on fewer than 1%, "
    "dormant_units small beside their layer",
    "dormant": "dormant_units divides by the layer's mean, dormant_units_of_sum by its sum; units active on fewer than "
    "1% of samples, which Dohare et al. call dormant, are rarely_active_units",
    "fraction_of_active_units": "it is feature_activity",
    "gradient_norm": "there are gradient_norm_l0, gradient_norm_l1 and gradient_norm_l2",
    "l2_distance": "it is distance_l2",
    "weight_norm": "weight_magnitude is the mean absolute value, weight_norm_l2 the Euclidean norm",
    "collisions": "collision_rate is the share of parameters, collision_ratio that by its value for chance",
}
"""Words that the literature uses for several metrics or for one under another name, and where they lead."""


def inapplicable(name: str, nonlinearity: Nonlinearity) -> str:
    """Why a metric says nothing of units behind an activation function; empty if it applies.

    Args:
        name: of the metric.
        nonlinearity: what stands between the units and their readers (:func:`perennial.units.observe`).

    Raises:
        ValueError: there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; there are {', '.join(METRICS)}")
    needs = METRICS[name].needs
    rectified, bounded = nonlinearity.rectified, nonlinearity.bounded
    if not needs or (rectified and "rectified" in needs) or (bounded and "bounded" in needs):
        return ""
    if not nonlinearity.function:
        return f"no nonlinearity that is known stands right before the reader, and {name} depends on which it is"
    if needs == "rectified":
        return f"units behind {nonlinearity} are never exactly zero: {name} is of rectifiers"
    if needs == "bounded":
        return f"units behind {nonlinearity} have no two bounds to be at: {name} is of tanh, sigmoid and the like"
    return f"units behind {nonlinearity} are neither exactly zero nor at a bound, which {name} counts"
