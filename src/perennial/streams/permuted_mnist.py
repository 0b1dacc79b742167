"""Input-permuted MNIST."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from perennial.streams.base import Examples, SeededNoise, Stream
from perennial.streams.files import mnist


@dataclass(frozen=True)
class PermutedMNIST(Stream):
    """Online input-permuted MNIST, one image a step: every so many images the pixels are permuted anew.

    The setting of Elsayed and Mahmood (ICLR 2024): every task permutes the *original* pixels, which are scaled to
    [-1, 1]. The 60,000 training images are visited in a random order, once a pass, with a new order every pass; tasks
    begin wherever they fall in it, and nothing announces them. In the published code the permutations come from an
    unseeded generator and differ from method to method; here they are a function of the seed.

    Raises:
        FileNotFoundError: MNIST is not where ``PERENNIAL_DATA`` says.
    """

    task_steps: int = 5000
    """Images a task."""

    name = "permuted_mnist"
    task = "classification"
    inputs = 784
    outputs = 10

    def __post_init__(self) -> None:
        self.check("task_steps", self.task_steps, 1)

    def task_length(self) -> int:
        return self.task_steps

    def whole_task(self, seed: int, task: int, part: str = "train") -> tuple[Tensor, Tensor]:
        """All images of the training or the test set under the permutation of one task, float32 [images, 784] in
        [-1, 1], and their classes, int64 [images], in the files' order."""
        images, classes = mnist(part)
        pixels = self.open([seed], torch.device("cpu")).pixels(task)[:, 0]
        return images[:, pixels].to(torch.float32) / 127.5 - 1, classes

    def open(self, seeds: Sequence[int], device: torch.device) -> _Feed:
        return _Feed(self, tuple(seeds), device)


class _Feed:
    def __init__(self, stream: PermutedMNIST, seeds: tuple[int, ...], device: torch.device):
        self.seeds, self.device, self.length = seeds, device, stream.task_steps
        images, classes = mnist()
        self.images, self.classes = images.to(device), classes.to(device)
        self.pixels = lru_cache(maxsize=4)(self._pixels)
        self.order = lru_cache(maxsize=4)(self._order)

    def _noise(self, position: int) -> SeededNoise:
        return SeededNoise(self.seeds, "tasks", torch.tensor([position], dtype=torch.int32, device=self.device))

    def _pixels(self, task: int) -> Tensor:
        """The permutation of a task, int64 [784, seeds]."""
        return self._noise(task).uniform("pixels", self.images.shape[1])[0].argsort(dim=0, stable=True)

    def _order(self, epoch: int) -> Tensor:
        """The order of the images in a pass, int64 [60000, seeds]."""
        return self._noise(epoch).uniform("order", len(self.classes))[0].argsort(dim=0, stable=True)

    def _permuted(self, rows: Tensor, pixels: Tensor) -> Tensor:
        """Image rows [n, seeds] under each seed's permutation, in [-1, 1]: float32 [n, 784, seeds]."""
        seen = self.images[rows].transpose(1, 2).gather(1, pixels.expand(len(rows), -1, -1))
        return seen.to(torch.float32) / 127.5 - 1

    def examples(self, start: int, count: int) -> Examples:
        inputs, targets = [], []
        at, total = start, len(self.classes)
        while at < start + count:
            task, epoch = at // self.length, at // total
            end = min(start + count, (task + 1) * self.length, (epoch + 1) * total)
            rows = self.order(epoch)[at - epoch * total : end - epoch * total]
            inputs.append(self._permuted(rows, self.pixels(task)))
            targets.append(self.classes[rows])
            at = end
        return Examples(torch.cat(inputs)[:, None], torch.cat(targets)[:, None])

    def probe(self, step: int, size: int) -> Tensor:
        rows = self.order(step // len(self.classes))[torch.arange(size, device=self.device) % len(self.classes)]
        return self._permuted(rows, self.pixels(step // self.length))
