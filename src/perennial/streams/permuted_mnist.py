"""MNIST, one image at a time: with permuted pixels, or as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perennial.streams.base import SeededNoise
from perennial.streams.files import flat_images
from perennial.streams.online_images import OnlineImages


@dataclass(frozen=True)
class PermutedMNIST(OnlineImages):
    """Online input-permuted MNIST, one image a step: every so many images the pixels are permuted anew.

    The setting of Elsayed and Mahmood (ICLR 2024): every task permutes the *original* pixels, which are scaled to
    [-1, 1]. The 60,000 training images are visited in a random order, once a pass, with a new order every pass; tasks
    begin wherever they fall in it, and nothing announces them. In the published code the permutations come from an
    unseeded generator and differ from method to method; here they are a function of the seed.

    Raises:
        FileNotFoundError: MNIST is not where ``PERENNIAL_DATA`` says, and cannot be fetched.
    """

    name = "permuted_mnist"
    inputs = 784
    outputs = 10

    def data(self) -> tuple[Tensor, Tensor]:
        return flat_images("mnist")

    def pixels(self, noise: SeededNoise, task: int) -> Tensor | None:
        return noise.order("pixels", self.inputs)

    def whole_task(self, seed: int, task: int, part: str = "train") -> tuple[Tensor, Tensor]:
        """All images of the training or the test set under the permutation of one task, float32 [images, 784], and
        their classes, int64 [images], in the files' order."""
        shown, classes = flat_images("mnist", part)
        pixels = self.open([seed], torch.device("cpu")).pixels(task)
        assert pixels is not None
        return self.scaled(shown[:, pixels[:, 0]]), classes


@dataclass(frozen=True)
class NaturePermutedMNIST(PermutedMNIST):
    """Online permuted MNIST as in the Nature paper: one image a step, one pass a task, pixels in [0, 1].

    The setting of Dohare et al. (Nature 2024): a task is the training images in a random order of its own (the first
    ``task_steps`` of it; further passes where a task is longer than the data), under a permutation of the pixels
    that is applied *on top of* the last task's. A product of independent uniform permutations is itself uniform and
    independent of the one before, so in distribution this is the same as permuting the original pixels.

    Raises:
        FileNotFoundError: MNIST is not where ``PERENNIAL_DATA`` says, and cannot be fetched.
    """

    task_steps: int = 60_000
    """Images a task."""

    name = "nature_permuted_mnist"
    low = 0.0
    passes_begin_with_tasks = True

    def pixels(self, noise: SeededNoise, task: int) -> Tensor | None:
        return _product(noise.seeds, str(noise.device), task)


_LATEST: dict[tuple[tuple[int, ...], str], tuple[int, Tensor]] = {}
"""By seeds and device, the task whose product of permutations was asked for last, and the product."""


def _product(seeds: tuple[int, ...], device: str, task: int) -> Tensor:
    """The permutations of tasks 0 to ``task``, one after another: int64 [784, seeds]."""
    known, at = _LATEST.get((seeds, device), (-1, torch.empty(0)))
    if known > task:
        known = -1
    if known < 0:
        at = torch.arange(784, device=device)[:, None].expand(-1, len(seeds))
    for one in range(known + 1, task + 1):
        noise = SeededNoise(seeds, "tasks", torch.tensor([one], dtype=torch.int32, device=device))
        at = at.gather(0, noise.order("pixels", 784))
    _LATEST[seeds, device] = task, at
    return at


@dataclass(frozen=True)
class StationaryMNIST(OnlineImages):
    """MNIST as it is, one image a step: nothing changes. A task is one pass.

    The stationary control of Elsayed and Mahmood (ICLR 2024); pixels in [-1, 1].

    Raises:
        FileNotFoundError: MNIST is not where ``PERENNIAL_DATA`` says, and cannot be fetched.
    """

    task_steps: int = 60_000
    """Images after which a task is said to end; only what acts at the end of tasks notices."""

    name = "stationary_mnist"
    inputs = 784
    outputs = 10

    def data(self) -> tuple[Tensor, Tensor]:
        return flat_images("mnist")
