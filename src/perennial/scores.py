"""How much a unit or a weight matters: pure functions of tensors.

Every score is "more is better": the lowest is replaced, pruned or perturbed first. Activations, and their gradients
("signals"), are [samples, units], or [samples, units, positions...] where a unit stands at several places of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from perennial.units import UnitLayer


def first_order(weight: Tensor, grad: Tensor) -> Tensor:
    r"""First-order estimate of the loss without a weight, minus the loss with it: :math:`-g w`, element by element.

    Elsayed and Mahmood (ICLR 2024), equation 3; the signed form of the Taylor score of pruning.
    """
    return -grad * weight


def second_order(weight: Tensor, grad: Tensor, curvature: Tensor) -> Tensor:
    r"""The same to second order, with the diagonal of the Hessian: :math:`-g w + \tfrac12 h w^2`, element by element.

    Elsayed and Mahmood (ICLR 2024), equation 3; without the first term, the saliency of optimal brain damage (LeCun,
    Denker and Solla, 1989).
    """
    return (0.5 * curvature * weight - grad) * weight


def exact_utility(loss: Callable[[Mapping[str, Tensor]], Tensor], name: str, weight: Tensor) -> Tensor:
    r"""The loss without a weight, minus the loss with it, for every weight: :math:`L(w : w_i = 0) - L(w)`.

    One forward pass a weight, side by side: for study, not for training.

    Args:
        loss: the loss [] as a function of the parameters that change, by name.
        name: the parameter.
        weight: its value.

    Returns:
        The parameter's shape.
    """
    element = torch.arange(weight.numel(), device=weight.device).reshape(weight.shape)

    def without(gone: Tensor) -> Tensor:
        return loss({name: torch.where(element == gone, 0.0, weight)})

    return torch.vmap(without, chunk_size=1024)(element.flatten()).reshape(weight.shape) - loss({})


def exact_utility_of_units(
    loss: Callable[[Mapping[str, Tensor]], Tensor], layer: UnitLayer, params: Mapping[str, Tensor]
) -> Tensor:
    r"""The loss without a unit's output, minus the loss with it, for every unit of a layer.

    One forward pass a unit, side by side: for study, not for training.

    Args:
        loss: the loss [] as a function of the parameters that change, by name.
        layer: of the unit map.
        params: by name, those that read the layer at least.

    Returns:
        [units].
    """

    def without(unit: Tensor) -> Tensor:
        parts = {part.parameter: part for part in layer.outgoing}
        return loss({n: torch.where(part.mask(unit, params[n]) > 0, 0.0, params[n]) for n, part in parts.items()})

    each = torch.eye(layer.size, device=params[layer.outgoing[0].parameter].device)
    return torch.vmap(without)(each) - loss({})


def mean_activation(activation: Tensor) -> Tensor:
    r"""The mean of each unit over samples and positions, :math:`\overline{h_j}`.

    Args:
        activation: [samples, units, ...].

    Returns:
        [units].
    """
    return activation.mean(0) if activation.dim() == 2 else activation.mean(_all_but_units(activation))


def activation_magnitude(activation: Tensor, *, look: bool = False) -> Tensor:
    r"""The mean magnitude of each unit over samples and positions, :math:`\overline{|h_j|}`.

    Of signals in place of activations it is the score of ReGraMa (Liu et al., arXiv 2505.24061).

    Args:
        activation: [samples, units, ...].
        look: see whether all are at or above zero, as behind a rectifier, and if so sum them as they are: four times as
            fast on a CPU. The values must be there to be looked at: not in a graph, and not behind a device's queue.

    Returns:
        [units]; at least float32 where there are positions.
    """
    if activation.dim() == 2:
        return activation.abs().mean(0)
    # A norm passes over a convolution's activation once, where abs and mean write another of its size in between. In
    # float32, because the sum over an image may leave the range of float16.
    wide = torch.promote_types(activation.dtype, torch.float32)
    dims = _all_but_units(activation)
    if look and activation.numel() and bool(activation.amin() >= 0):
        total = activation.sum(dims, dtype=wide)
    else:
        total = torch.linalg.vector_norm(activation, 1, dims, dtype=wide)
    return total / (activation.numel() // activation.shape[1])


def outgoing_magnitude(*outgoing: Tensor) -> Tensor:
    r"""How strongly a unit is listened to, :math:`\sum_k |w_{jk}|`.

    Args:
        outgoing: of every reader, [units, outgoing weights of the unit].

    Returns:
        [units].
    """
    return _magnitude(outgoing)


def incoming_magnitude(*incoming: Tensor) -> Tensor:
    r"""How strongly a unit listens, :math:`\sum_i |w_{ij}|`.

    Args:
        incoming: of every producer, [units, incoming weights of the unit].

    Returns:
        [units].
    """
    return _magnitude(incoming)


def contribution(activation: Tensor, *outgoing: Tensor, look: bool = False) -> Tensor:
    r"""What a unit sends on: :math:`\overline{|h_j|} \sum_k |w_{jk}|`.

    Dohare et al. (Nature, 2024), equation 1, before its moving average.

    Args:
        activation: [samples, units, ...].
        outgoing: of every reader, [units, outgoing weights of the unit].
        look: see :func:`activation_magnitude`.

    Returns:
        [units].
    """
    return activation_magnitude(activation, look=look) * outgoing_magnitude(*outgoing)


def mean_corrected_contribution(activation: Tensor, mean: Tensor, *outgoing: Tensor) -> Tensor:
    r"""What a unit adds beyond its mean, which a bias could carry: :math:`\overline{|h_j - \hat h_j|} \sum_k |w_{jk}|`.

    Dohare, Sutton and Mahmood (arXiv 2108.06325).

    Args:
        activation: [samples, units, ...].
        mean: [units], the running mean of the activation.
        outgoing: of every reader, [units, outgoing weights of the unit].

    Returns:
        [units].
    """
    for _ in range(activation.dim() - 2):
        mean = mean.unsqueeze(-1)
    return activation_magnitude(activation - mean) * outgoing_magnitude(*outgoing)


def adaptation(*incoming: Tensor) -> Tensor:
    r"""How fast a unit can change: the inverse of its mean incoming magnitude, :math:`1 / \overline{|w_{ij}|}`.

    Dohare, Sutton and Mahmood (arXiv 2108.06325). A unit without incoming weights gets the largest finite number.

    Args:
        incoming: of every producer, [units, incoming weights of the unit].

    Returns:
        [units].
    """
    if len(incoming) == 1:
        magnitude = incoming[0].abs().mean(1)
    else:
        magnitude = incoming_magnitude(*incoming) / sum(weights.shape[1] for weights in incoming)
    return 1 / magnitude.clamp(min=torch.finfo(magnitude.dtype).tiny * 4)


def taylor(activation: Tensor, signal: Tensor) -> Tensor:
    r"""First-order estimate of how far the loss moves without the unit, sample by sample:
    :math:`\sum_n \bigl|\sum_p h_{njp}\, g_{njp}\bigr|`, p the positions.

    Molchanov et al. (ICLR 2017, arXiv 1611.06440). The signal g is the gradient of the mean loss, so the sum over
    samples is a mean over them.

    Args:
        activation: [samples, units, ...].
        signal: the gradient of the loss by the activation, its shape.

    Returns:
        [units].
    """
    return _by_sample(activation, signal).abs().sum(0)


def fisher(activation: Tensor, signal: Tensor) -> Tensor:
    r"""Second-order estimate of the loss without the unit, minus the loss with it, the Hessian taken for the Fisher
    information: :math:`\frac{N}{2} \sum_n \bigl(\sum_p h_{njp}\, g_{njp}\bigr)^2`, N samples, p the positions.

    Theis et al. (arXiv 1801.05787, 2018), for a signal g that is the gradient of the mean loss.

    Args:
        activation: [samples, units, ...].
        signal: the gradient of the loss by the activation, its shape.

    Returns:
        [units].
    """
    return activation.shape[0] / 2 * _by_sample(activation, signal).square().sum(0)


def normalised(score: Tensor) -> Tensor:
    r"""A score by its mean over the layer, :math:`s_j / \overline{s}`: 1 is average, whatever the layer's scale.

    Sokar et al. (arXiv 2302.12902), equation 1. A layer of zeros keeps its zeros.

    Args:
        score: [units], none negative.

    Returns:
        [units].
    """
    mean = score.mean(0)
    return score / torch.where(mean == 0, 1.0, mean)


def _all_but_units(activation: Tensor) -> tuple[int, ...]:
    return (0, *range(2, activation.dim()))


def _magnitude(weights: tuple[Tensor, ...]) -> Tensor:
    total = weights[0].abs().sum(1)
    for more in weights[1:]:
        total = total + more.abs().sum(1)
    return total


def _by_sample(activation: Tensor, signal: Tensor) -> Tensor:
    """[samples, units]."""
    product = activation * signal
    return product if product.dim() == 2 else product.flatten(2).sum(2)
