"""The images of a study of arriving classes, in the order of arrival, on the device that trains."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from perennial.incremental.classes import class_order, divided, positions
from perennial.incremental.setting import ArrivingClasses
from perennial.streams.files import images

MEAN = (0.5071, 0.4865, 0.4409)
"""Of each colour of CIFAR-100, from 0 to 1; as published."""
SPREAD = (0.2673, 0.2564, 0.2762)
"""Standard deviation of each colour."""


class ArrivingImages:
    """Images by class. All are uint8 [classes, images of a class, 3, side, side]."""

    def __init__(self, setting: ArrivingClasses, seed: int, device: str = "cpu") -> None:
        """Read and divided by the seed.

        Raises:
            FileNotFoundError: the data set is not there.
            ValueError: it has too few classes, or too few images of one, or images that do not fit.
        """
        train, test = images(setting.data, "train"), images(setting.data, "test")
        there = int(train.classes.max()) + 1
        if there < setting.classes:
            raise ValueError(
                f"{setting.increments} increments of {setting.per_increment} classes are {setting.classes}; "
                f"{setting.data} has {there}"
            )
        height, width = train.pixels.shape[2:]
        if height != width or height % setting.side:
            raise ValueError(f"side is {setting.side}; images of {height} x {width} cannot be averaged to that")
        order = class_order(there, seed)
        parts = divided(train.classes, order, setting.train, setting.validation, seed)
        tested = positions(test.classes, order, setting.test)[:, : setting.test]
        used = setting.classes

        def made(pixels: Tensor, where: Tensor) -> Tensor:
            small = _smaller(pixels[where.flatten()], setting.side)
            return small.reshape(*where.shape, *small.shape[1:]).to(device)

        self.train = made(train.pixels, parts.train[:used])
        self.validation = made(train.pixels, parts.validation[:used])
        self.test = made(test.pixels, tested[:used])
        self.after = made(train.pixels, parts.train[used : used + setting.per_increment])
        """Training images of the classes that would arrive next; fewer, or none, where none are left."""
        mean, spread = torch.tensor(MEAN, device=device), torch.tensor(SPREAD, device=device)
        self._factor, self._shift = (1 / (255 * spread))[:, None, None], (mean / spread)[:, None, None]

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [n, 3, side, side] -> float32 of mean 0 and standard deviation 1 over the data set."""
        return pixels.to(torch.float32) * self._factor - self._shift

    def arriving_next(self, seen: int, arriving: int, count: int) -> Tensor:
        """Training images of the classes that arrive after the first ``seen``, normalised: up to ``count``, as many of
        each class; none if all have arrived."""
        following = self.train[seen : seen + arriving] if seen < len(self.train) else self.after
        if not len(following):
            return self.normalised(following.flatten(0, 1))
        each = -(-count // len(following))
        return self.normalised(following[:, :each].flatten(0, 1)[:count])


def _smaller(pixels: Tensor, side: int) -> Tensor:
    """Squares of pixels averaged, uint8."""
    factor = pixels.shape[-1] // side
    return pixels if factor == 1 else F.avg_pool2d(pixels.to(torch.float32), factor).round().to(torch.uint8)
