"""How much a unit or a weight matters: pure functions of tensors.

Every score is "more is better": the lowest is replaced, pruned or perturbed first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def first_order(weight: Tensor, grad: Tensor) -> Tensor:
    r"""First-order estimate of the loss without a weight, minus the loss with it: :math:`-g w`, element by element.

    Elsayed and Mahmood (ICLR 2024), equation 3; the signed form of the Taylor score of pruning.
    """
    return -grad * weight


def contribution(activation: Tensor, outgoing: Tensor) -> Tensor:
    r"""What a unit sends on: :math:`\overline{|h_j|} \sum_k |w_{jk}|`.

    Dohare et al. (Nature, 2024), equation 1, before its moving average.

    Args:
        activation: [samples, units].
        outgoing: [units, outgoing weights of the unit].

    Returns:
        [units].
    """
    return activation.abs().mean(0) * outgoing.abs().sum(1)


def mean_corrected_contribution(activation: Tensor, mean: Tensor, outgoing: Tensor) -> Tensor:
    r"""What a unit adds beyond its mean, which a bias could carry: :math:`\overline{|h_j - \hat h_j|} \sum_k |w_{jk}|`.

    Dohare, Sutton and Mahmood (arXiv 2108.06325).

    Args:
        activation: [samples, units].
        mean: [units], the running mean of the activation.
        outgoing: [units, outgoing weights of the unit].

    Returns:
        [units].
    """
    return (activation - mean).abs().mean(0) * outgoing.abs().sum(1)


def adaptation(incoming: Tensor) -> Tensor:
    r"""How fast a unit can change: the inverse of its mean incoming magnitude, :math:`1 / \overline{|w_{ij}|}`.

    Dohare, Sutton and Mahmood (arXiv 2108.06325). A unit without incoming weights gets the largest finite number.

    Args:
        incoming: [units, incoming weights of the unit].

    Returns:
        [units].
    """
    magnitude = incoming.abs().mean(1)
    return 1 / magnitude.clamp(min=torch.finfo(magnitude.dtype).tiny * 4)
