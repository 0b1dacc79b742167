"""Images one at a time, from a data set that is visited pass after pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from perennial.streams.base import Examples, SeededNoise, Stream


@dataclass(frozen=True)
class OnlineImages(Stream):
    """Base of the streams that show a data set's training images one a step, in a new random order every pass."""

    task = "classification"

    low: ClassVar[float] = -1.0
    """What a black pixel becomes; a white one is 1."""
    passes_begin_with_tasks: ClassVar[bool] = False
    """Whether every task begins a pass of its own."""
    task_steps: int = 5000
    """Images a task."""

    def __post_init__(self) -> None:
        self.check("task_steps", self.task_steps, 1)

    def task_length(self) -> int:
        return self.task_steps

    def data(self) -> tuple[Tensor, Tensor]:
        """The images, uint8 or float32 [images, inputs], and their classes, int64 [images]."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it shows")

    def pixels(self, noise: SeededNoise, task: int) -> Tensor | None:
        """Where each input of a task comes from, int64 [inputs, seeds]; None: inputs stay where they are."""
        return None

    def labels(self, noise: SeededNoise, task: int) -> Tensor | None:
        """The label that each class has in a task, int64 [outputs, seeds]; None: its own."""
        return None

    def scaled(self, values: Tensor) -> Tensor:
        """Bytes as float32 from :attr:`low` to 1; numbers that are no bytes as they are."""
        if values.dtype != torch.uint8:
            return values
        return values.to(torch.float32) / (255 / (1 - self.low)) + self.low

    def open(self, seeds: Sequence[int], device: torch.device) -> OnlineImagesFeed:
        return OnlineImagesFeed(self, tuple(seeds), device)


class OnlineImagesFeed:
    """An :class:`OnlineImages` opened for some seeds on a device."""

    def __init__(self, stream: OnlineImages, seeds: tuple[int, ...], device: torch.device):
        self.stream, self.seeds, self.device, self.length = stream, seeds, device, stream.task_steps
        shown, classes = stream.data()
        self.images, self.classes = shown.to(device), classes.to(device)
        self.pixels = lru_cache(maxsize=4)(self._pixels)
        self.labels = lru_cache(maxsize=4)(self._labels)
        self.order = lru_cache(maxsize=4)(self._order)

    def noise(self, position: int) -> SeededNoise:
        """The draws of a task or of a pass."""
        return SeededNoise(self.seeds, "tasks", torch.tensor([position], dtype=torch.int32, device=self.device))

    def _pixels(self, task: int) -> Tensor | None:
        return self.stream.pixels(self.noise(task), task)

    def _labels(self, task: int) -> Tensor | None:
        return self.stream.labels(self.noise(task), task)

    def _order(self, epoch: int) -> Tensor:
        """The order of the images in a pass, int64 [images, seeds]."""
        return self.noise(epoch).order("order", len(self.classes))

    def _place(self, step: int) -> tuple[int, int]:
        """The pass that a step is in, and how far."""
        total = len(self.classes)
        if not self.stream.passes_begin_with_tasks:
            return divmod(step, total)
        task, done = divmod(step, self.length)
        within, at = divmod(done, total)
        return task * -(-self.length // total) + within, at

    def _shown(self, rows: Tensor, task: int) -> Tensor:
        """Image rows [n, seeds] as the task shows them: float32 [n, ..., seeds]."""
        seen, pixels = self.images[rows].transpose(1, 2), self.pixels(task)
        if pixels is not None:
            seen = seen.gather(1, pixels.expand(len(rows), -1, -1))
        return self.stream.scaled(seen).reshape(len(rows), *self.stream.input_shape, -1)

    def examples(self, start: int, count: int) -> Examples:
        """The examples of steps ``start`` to ``start + count``."""
        inputs, targets = [], []
        at, total = start, len(self.classes)
        while at < start + count:
            task, (epoch, done) = at // self.length, self._place(at)
            end = min(start + count, (task + 1) * self.length, at + total - done)
            rows = self.order(epoch)[done : done + end - at]
            inputs.append(self._shown(rows, task))
            labels = self.labels(task)
            classes = self.classes[rows]
            targets.append(classes if labels is None else labels.gather(0, classes))
            at = end
        return Examples(torch.cat(inputs)[:, None], torch.cat(targets)[:, None])

    def probe(self, step: int, size: int) -> Tensor:
        """``size`` images of the pass in force as the task in force shows them: [size, inputs, seeds]."""
        rows = self.order(self._place(step)[0])[torch.arange(size, device=self.device) % len(self.classes)]
        return self._shown(rows, step // self.length)
