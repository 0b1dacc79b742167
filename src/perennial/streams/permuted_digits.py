"""Online permuted digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from perennial.streams.base import Examples, SeededNoise, Stream


@dataclass(frozen=True)
class PermutedDigits(Stream):
    """Online permuted digits: scikit-learn's 1,797 real 8x8 images, one pass a task, a new permutation of the pixels
    each task.

    The small sibling of online permuted MNIST (Dohare et al., Nature 2024). Pixels are scaled to [0, 1]. Every task
    permutes the *original* pixels and visits the images in an order of its own; nothing announces the change.
    """

    name = "permuted_digits"
    task = "classification"
    inputs = 64
    outputs = 10

    def task_length(self) -> int:
        return len(_digits()[1])

    def open(self, seeds: Sequence[int], device: torch.device) -> _Feed:
        return _Feed(self, tuple(seeds), device)


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    """Images float32 [1797, 64] in [0, 1], and classes int64 [1797]."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(classes)


class _Feed:
    def __init__(self, stream: PermutedDigits, seeds: tuple[int, ...], device: torch.device):
        self.seeds, self.device, self.length = seeds, device, stream.task_length()
        images, classes = _digits()
        self.images, self.classes = images.to(device), classes.to(device)
        self.task = lru_cache(maxsize=4)(self._task)

    def _task(self, task: int) -> tuple[Tensor, Tensor]:
        """The pixel permutation [64, seeds] and the order of the images [1797, seeds]."""
        noise = SeededNoise(self.seeds, "tasks", torch.tensor([task], dtype=torch.int32, device=self.device))
        pixels = noise.uniform("pixels", self.images.shape[1])[0].argsort(dim=0, stable=True)
        return pixels, noise.uniform("order", self.length)[0].argsort(dim=0, stable=True)

    def _permuted(self, rows: Tensor, pixels: Tensor) -> Tensor:
        """Image rows [n, seeds] under each seed's permutation: [n, 64, seeds]."""
        return self.images[rows].transpose(1, 2).gather(1, pixels.expand(len(rows), -1, -1))

    def examples(self, start: int, count: int) -> Examples:
        inputs, targets = [], []
        at = start
        while at < start + count:
            task = at // self.length
            end = min(start + count, (task + 1) * self.length)
            pixels, order = self.task(task)
            rows = order[at - task * self.length : end - task * self.length]
            inputs.append(self._permuted(rows, pixels))
            targets.append(self.classes[rows])
            at = end
        return Examples(torch.cat(inputs)[:, None], torch.cat(targets)[:, None])

    def probe(self, step: int, size: int) -> Tensor:
        pixels, order = self.task(step // self.length)
        return self._permuted(order[torch.arange(size, device=self.device) % self.length], pixels)
