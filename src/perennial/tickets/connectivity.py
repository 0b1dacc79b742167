"""Whether two trained networks lie in one valley: the error along the straight line between their weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perennial.trainability.lanes import copied, device_of, left_alone, made, seed_globally, tensors

Tensors: TypeAlias = Mapping[str, Tensor]
Evaluate: TypeAlias = Callable[[nn.Module], float]

STABLE = 0.02
"""Barrier of the error, as a share, below which Frankle et al. (2020) call a network stable."""
_BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class ConnectivityResult:
    """The error on the line between two networks."""

    alphas: NDArray[np.float64]
    """[points], how far from the first network to the second, 0 to 1."""
    errors: NDArray[np.float64]
    """[points], in the unit of what evaluated them."""

    @property
    def barrier(self) -> float:
        r"""The highest error on the line above the mean of its ends:
        :math:`\max_\alpha E(\alpha) - \tfrac12 (E(0) + E(1))`; NaN where an error is."""
        return float(self.errors.max() - (self.errors[0] + self.errors[-1]) / 2)

    def stable(self, threshold: float = STABLE) -> bool:
        """Whether the barrier is below a threshold; that of the paper is for errors that are shares of samples."""
        return self.barrier < threshold

    def __str__(self) -> str:
        at = self.alphas[self.errors.argmax()]
        return (
            f"barrier {self.barrier:.4g}: error {self.errors[0]:.4g} and {self.errors[-1]:.4g} at the ends, at most "
            f"{self.errors.max():.4g}, {at:.2f} of the way"
        )


def linear_path(
    model: nn.Module,
    first: Tensors,
    second: Tensors,
    evaluate: Evaluate,
    points: int = 30,
    recalibrate: Iterable[Tensor] | None = None,
) -> ConnectivityResult:
    r"""The error of the networks :math:`(1 - \alpha)\,W_1 + \alpha\,W_2`, for evenly spaced :math:`\alpha`.

    Linear mode connectivity: Frankle et al. (ICML 2020, arXiv 1912.05671). They subtract the mean of the two ends from
    the highest error, which is :attr:`ConnectivityResult.barrier`, with 30 points from 0 to 1.

    The running statistics of batch norms do not lie on a line: those between two networks' belong to neither. They are
    measured anew at every point, the ends too, in one pass over ``recalibrate``: the mean over batches of each batch's
    mean and unbiased variance, with all other modules in evaluation mode. Other buffers are interpolated if they are
    floats, and taken from the first network if they are not.

    The model is left as it was; a copy of it is evaluated, without its hooks.

    Args:
        model: any network of the architecture.
        first: of the network at 0: all parameters, and buffers, by name. Buffers that it lacks, and ``second`` too, are
            the model's.
        second: of the network at 1: the same names and shapes.
        evaluate: takes a network in evaluation mode, and gives its error, or loss.
        points: at least 2, the ends included.
        recalibrate: batches of inputs, for networks with batch norms, all on one device; a list or a loader that can be
            gone through more than once.

    Raises:
        ValueError: names or shapes that differ, too few points, batch norms and nothing to measure their statistics on.
        TypeError: a batch that is not a tensor.
    """
    if points < 2:
        raise ValueError(f"points is {points}; it must be at least 2, the two ends")
    names = _check(model, first, second)
    alphas = np.linspace(0, 1, points)
    errors = np.empty(points)
    with left_alone(model):
        network = copied(model)
        norms = _norms(network)
        if norms and recalibrate is None:
            raise ValueError(
                f"the model has batch norms ({', '.join(norms)}), whose running statistics between two networks belong "
                "to neither; give recalibrate=, batches of training inputs to measure them on"
            )
        # An iterator is used up after the first point.
        batches = tuple(recalibrate) if isinstance(recalibrate, Iterator) else recalibrate
        held = dict(itertools.chain(network.named_parameters(), network.named_buffers()))
        for number, alpha in enumerate(alphas):
            for name in names:
                one, other = first[name].to(held[name]), second[name].to(held[name])
                held[name].copy_(_between(one, other, float(alpha)))
            if norms and batches is not None:
                _recalibrate(network, norms, batches)
            network.eval()
            errors[number] = float(evaluate(network))
    return ConnectivityResult(alphas, errors)


def instability(
    make_model: Callable[[], nn.Module],
    train: Callable[[nn.Module, int], object],
    start: Tensors,
    evaluate: Evaluate,
    *,
    seeds: tuple[int, int] = (0, 1),
    points: int = 30,
    recalibrate: Iterable[Tensor] | None = None,
) -> ConnectivityResult:
    """How far apart the noise of training drives two copies of a network: the line between them.

    Two networks start from the same weights, are trained with different orders of the data, and are joined by
    :func:`linear_path`. The network is stable to the noise if there is no barrier: Frankle et al. (2020), who find that
    a pruned network can reach the accuracy of the full one if, and only if, it is stable. Example::

        def train(model, seed):
            for inputs, targets in batches_in_order_of(seed):
                ...

        found = instability(make_model, train, rewound, error_on(test))
        print(found.barrier)

    The global random states are left as they were.

    Args:
        make_model: makes a network of the architecture.
        train: trains a network in place, to the end, with the order of data, augmentation and dropout of a seed. The
            global generators are seeded before, so that what draws from them alone differs between the seeds too.
        start: parameters and buffers that both start from, by name; what it lacks is what make_model() made for the
            first.
        evaluate: as in :func:`linear_path`, as are the arguments that are not listed here.
        seeds: of the two trainings.

    Raises:
        ValueError: two equal seeds; what :func:`linear_path` raises.
    """
    if seeds[0] == seeds[1]:
        raise ValueError(f"seeds are {seeds}; they must differ, or both networks are trained in the same way")
    ends = []
    with left_alone(nn.Identity()):
        network = made(make_model, seeds[0], "init")
        unknown = [name for name in start if name not in tensors(network)]
        if unknown:
            raise ValueError(f"start has {', '.join(unknown)}, which a network of make_model() lacks")
        begin = {name: t.clone() for name, t in tensors(network).items()}
        begin |= {name: t.detach().clone() for name, t in start.items()}
        for seed in seeds:
            # A network of its own: what a training leaves behind in it, such as hooks, is not the other's.
            trained = made(make_model, seeds[0], "init")
            mine = tensors(trained)
            _check(trained, begin, mine)
            for name, t in begin.items():
                mine[name].copy_(t)
            seed_globally(seed, "instability")
            with torch.enable_grad():
                train(trained, seed)
            ends.append({name: t.clone() for name, t in tensors(trained).items()})
    return linear_path(network, ends[0], ends[1], evaluate, points, recalibrate)


def _check(model: nn.Module, first: Tensors, second: Tensors) -> list[str]:
    """The names to interpolate."""
    mine = tensors(model)
    for name in (*first, *second):
        found = [list(given[name].shape) if name in given else "missing" for given in (first, second, mine)]
        if any(shape != found[2] for shape in found) or found[2] == "missing":
            raise ValueError(
                f"{name} is {found[0]} in the first network, {found[1]} in the second and {found[2]} in the model; a "
                "line joins networks of one architecture"
            )
    missing = [name for name, _ in model.named_parameters() if name not in first]
    if missing:
        raise ValueError(f"the networks lack {', '.join(missing)}; give all parameters of both")
    return list(first)


def _between(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    if not first.is_floating_point():
        return first
    # The ends to the bit, which (1 - a) w + a v gives, and lerp does not in all types.
    return (1 - alpha) * first + alpha * second


def _norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms that keep running statistics."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None
    }


def _recalibrate(network: nn.Module, norms: Mapping[str, _BatchNorm], batches: Iterable[Tensor]) -> None:
    """Running statistics from one pass, all batches alike."""
    network.eval()
    momenta = {}
    for name, norm in norms.items():
        norm.reset_running_stats()
        norm.train()
        momenta[name] = norm.momentum
        norm.momentum = None  # the mean of all batches so far
    seen = 0
    for batch in batches:
        if not isinstance(batch, Tensor):
            raise TypeError(
                f"recalibrate gives a {type(batch).__name__}; it must give tensors, batches of inputs without targets"
            )
        network(batch.to(device_of(network)))
        seen += 1
    if not seen:
        raise ValueError("recalibrate gives no batches, so that the batch norms would have no statistics")
    for name, norm in norms.items():
        norm.momentum = momenta[name]
