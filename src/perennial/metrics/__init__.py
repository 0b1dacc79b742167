"""How plastic a network is: one definition a name.

Every metric is a pure function of activations, weights or gradients, and changes nothing. The name carries the
definition, since the literature uses some words for several. :data:`perennial.metrics.METRICS` says of each what it is
taken of, in which range it lies, which way is better and where it applies; where it does not, :func:`inapplicable`
gives the reason, and no number that means something else is shown.
"""

from __future__ import annotations

import difflib

from perennial.metrics.curvature import hessian_effective_rank, ntk_effective_rank, sharpness
from perennial.metrics.learning import (
    loss_of_plasticity,
    online_forgetting,
    sample_plasticity,
    window_means,
)
from perennial.metrics.ranks import (
    effective_rank_entropy,
    numerical_rank,
    rank_99,
    rank_99_energy,
    singular_values,
    stable_rank_fro,
)
from perennial.metrics.registry import AMBIGUOUS, METRICS, Metric, inapplicable
from perennial.metrics.statistics import UnitStatistics, features
from perennial.metrics.units import (
    dead_units,
    dormant_units,
    dormant_units_of_sum,
    duplicate_units,
    feature_activity,
    feature_norm,
    rarely_active_units,
    saturated_units,
)
from perennial.metrics.weights import (
    collision_rate,
    collision_ratio,
    distance_l1,
    distance_l2,
    gradient_norm_l0,
    gradient_norm_l1,
    gradient_norm_l2,
    weight_magnitude,
    weight_norm_l2,
)

__all__ = [
    "AMBIGUOUS",
    "METRICS",
    "Metric",
    "UnitStatistics",
    "collision_rate",
    "collision_ratio",
    "dead_units",
    "distance_l1",
    "distance_l2",
    "dormant_units",
    "dormant_units_of_sum",
    "duplicate_units",
    "effective_rank_entropy",
    "feature_activity",
    "feature_norm",
    "features",
    "gradient_norm_l0",
    "gradient_norm_l1",
    "gradient_norm_l2",
    "hessian_effective_rank",
    "inapplicable",
    "loss_of_plasticity",
    "ntk_effective_rank",
    "numerical_rank",
    "online_forgetting",
    "rank_99",
    "rank_99_energy",
    "rarely_active_units",
    "sample_plasticity",
    "saturated_units",
    "sharpness",
    "singular_values",
    "stable_rank_fro",
    "weight_magnitude",
    "weight_norm_l2",
    "window_means",
]


def __getattr__(name: str) -> object:
    if name in AMBIGUOUS:
        raise AttributeError(f"perennial.metrics.{name} would be ambiguous: {AMBIGUOUS[name]}")
    near = difflib.get_close_matches(name, __all__, 1)
    raise AttributeError(f"perennial.metrics has no {name}" + (f"; there is {near[0]}" if near else ""))
