"""How plastic a network is: one definition a name.

Every metric is a pure function of activations or weights, and changes nothing. Where a metric does not apply the caller
gets None and the reason, never a number that means something else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def features(activation: Tensor) -> Tensor:
    """A layer's activation as the metrics take it: every position of a sample counts as a sample of its own.

    Args:
        activation: [samples, units] or [samples, units, positions...].

    Returns:
        [samples x positions, units].
    """
    return activation.movedim(1, -1).flatten(0, -2) if activation.dim() > 2 else activation


def dead_units(activations: Sequence[Tensor]) -> Tensor:
    """Share of hidden units that are exactly zero on every sample, in [0, 1].

    Dohare et al. (Nature, 2024). It means something for units with a rectifier only: a tanh unit is never zero.

    Args:
        activations: [samples, units] of each hidden layer.

    Returns:
        [].
    """
    dead = torch.stack([(h == 0).all(0).sum() for h in activations]).sum()
    return dead / sum(h.shape[1] for h in activations)


def weight_magnitude(weights: Sequence[Tensor]) -> Tensor:
    """Mean absolute value over all weights and biases.

    Dohare et al. (Nature, 2024). Every parameter counts by its number of elements.

    Args:
        weights: parameters of any shapes.

    Returns:
        [].
    """
    return torch.stack([w.abs().sum() for w in weights]).sum() / sum(w.numel() for w in weights)


def effective_rank_entropy(features: Tensor) -> Tensor:
    r"""How many directions the features spread over: :math:`\exp(-\sum_i p_i \ln p_i)`, with
    :math:`p_i = \sigma_i / \sum_k \sigma_k` over the singular values.

    Roy and Vetterli (2007), the "effective rank" of Dohare et al. (Nature, 2024). Computed in float64 through the Gram
    matrix of the shorter side; singular values below :math:`10^{-7}` of the largest count as zero, as does the entropy
    term of zero. Features that are all zero have rank 0.

    Args:
        features: [samples, features].

    Returns:
        [], float64, in [0, min(samples, features)].
    """
    x = features.to(torch.float64)
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    squares = torch.linalg.eigvalsh(gram).clamp(min=0)
    largest = squares.amax()
    singular = torch.where(squares > largest * 1e-14, squares, 0.0).sqrt()
    total = singular.sum()
    share = singular / torch.where(total > 0, total, 1.0)
    entropy = -(share * torch.where(share > 0, share, 1.0).log()).sum()
    return torch.where(total > 0, entropy.exp(), 0.0)


def sample_plasticity(before: Tensor, after: Tensor) -> Tensor:
    r"""How much of a sample's loss one step on it takes away: :math:`\max(0, 1 - L_{t+1} / L_t)`, 1 for all of it.

    Elsayed and Mahmood (ICLR 2024), equation 6: :math:`L_t` is the loss of the weights before the step on the sample
    that the step learns from, :math:`L_{t+1}` that of the weights after it on the same sample. The denominator is at
    least :math:`10^{-8}`. Averaged over a window of samples it is the plasticity in that window, and need not be taken
    at each of them: any share of the samples, chosen without regard to their losses, has the same mean.

    Args:
        before: losses before the step, any shape.
        after: losses after it, the same shape.

    Returns:
        The same shape, in [0, 1].
    """
    return (1 - after / before.clamp(min=1e-8)).clamp(0, 1)


def window_means(values: Tensor, window: int) -> Tensor:
    """The mean of every full window of a stream of values: of accuracies, the average online accuracy of each task.

    Args:
        values: [steps, ...].
        window: steps in a window, a task or several.

    Returns:
        [windows, ...]; an incomplete last window is left out.

    Raises:
        ValueError: fewer steps than a window.
    """
    if not 1 <= window <= len(values):
        raise ValueError(f"window is {window}; it must be at least 1 and at most the {len(values)} steps there are")
    count = len(values) // window
    found: Tensor = values[: count * window].unflatten(0, (count, window)).mean(1)
    return found


def loss_of_plasticity(plasticity: Tensor) -> Tensor:
    r"""How much plasticity was lost over the windows: :math:`\sum_k (p_k - p_{k+1}) = p_1 - p_T`.

    Elsayed and Mahmood (ICLR 2024), equation 7. Positive where plasticity was lost, negative where it grew.

    Args:
        plasticity: the mean sample plasticity of every window, [windows, ...].

    Returns:
        [...], in [-1, 1].
    """
    return plasticity[0] - plasticity[-1]


def online_forgetting(accuracy: Tensor) -> Tensor:
    r"""Forgetting on a stream of one pass: :math:`\sum_k (A_k - A_{k+1}) = A_1 - A_T`.

    Elsayed and Mahmood (ICLR 2024), equation 8. The accuracies are online ones, since no old task is seen again:
    negative where learning later tasks went better.

    Args:
        accuracy: the average online accuracy of every window, [windows, ...].

    Returns:
        [...], in [-1, 1].
    """
    return accuracy[0] - accuracy[-1]
