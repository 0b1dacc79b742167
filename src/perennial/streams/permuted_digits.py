"""Online permuted digits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from perennial.streams.base import SeededNoise
from perennial.streams.online_images import OnlineImages


@dataclass(frozen=True)
class PermutedDigits(OnlineImages):
    """Online permuted digits: scikit-learn's 1,797 real 8x8 images, one pass a task, a new permutation of the pixels
    each task.

    The small sibling of online permuted MNIST (Dohare et al., Nature 2024). Pixels are scaled to [0, 1]. Every task
    permutes the *original* pixels and visits the images in an order of its own; nothing announces the change.
    """

    task_steps: int = 1797
    """Images a task: a pass."""

    name = "permuted_digits"
    inputs = 64
    outputs = 10
    passes_begin_with_tasks = True

    def data(self) -> tuple[Tensor, Tensor]:
        return _digits()

    def pixels(self, noise: SeededNoise, task: int) -> Tensor | None:
        return noise.order("pixels", self.inputs)


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    """Images float32 [1797, 64] in [0, 1], and classes int64 [1797]."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(classes)
