"""In which order classes arrive, and which of their images are for what: pure functions of a seed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from perennial.noise import torch_seed


def class_order(count: int, seed: int) -> Tensor:
    """A permutation of ``count`` classes, int64 [count]: the class that arrives first, second, ..."""
    return torch.randperm(count, generator=_generator(seed, "class order"))


class Parts(NamedTuple):
    """Images by class, in the order of arrival; none is in two parts."""

    train: Tensor
    """int64 [classes, images]: positions in the data set."""
    validation: Tensor
    """int64 [classes, images]."""


def divided(classes: Tensor, order: Tensor, train: int, validation: int, seed: int) -> Parts:
    """As many images of every class to train on and to validate on, drawn by the seed.

    Args:
        classes: int64 [n]: of each image.
        order: int64 [classes]: as they arrive.
        train: images of each class.
        validation: images of each class; may be 0.
        seed: of the draw.

    Raises:
        ValueError: a class has too few images.
    """
    generator = _generator(seed, "division")
    each = positions(classes, order, train + validation)
    keys = torch.rand(len(order), each.shape[1], generator=generator)
    mixed = each.gather(1, keys.argsort(1))
    return Parts(mixed[:, :train], mixed[:, train : train + validation])


def positions(classes: Tensor, order: Tensor, least: int) -> Tensor:
    """Where the images of each class stand, int64 [classes, images]: as many as the rarest class has.

    Raises:
        ValueError: a class has fewer than ``least``.
    """
    found = [(classes == one).nonzero()[:, 0] for one in order.tolist()]
    fewest = min(map(len, found))
    if fewest < least:
        rare = int(order[[len(f) for f in found].index(fewest)])
        raise ValueError(f"class {rare} has {fewest} images, and {least} are asked for; ask for fewer of each class")
    return torch.stack([each[:fewest] for each in found])


def _generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(torch_seed(seed, purpose))
