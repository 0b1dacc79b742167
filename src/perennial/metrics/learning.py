"""How fast a network learns along a stream."""

from __future__ import annotations

import torch
from torch import Tensor


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
    wide = torch.promote_types(before.dtype, torch.float32)  # 1e-8 is zero in half precision
    return (1 - after.to(wide) / before.to(wide).clamp(min=1e-8)).clamp(0, 1)


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
