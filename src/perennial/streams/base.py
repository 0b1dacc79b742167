"""What changes under a network.

A stream is a frozen dataclass; everything it yields is a pure function of a seed and a position, computed on the device
as tensors. Methods never reach it, so every method sees the same tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from perennial.noise import Noise, seed_key


class Examples(NamedTuple):
    """A stretch of the stream for several seeds, which come last, as lanes do."""

    inputs: Tensor
    """float32 [steps, batch, ..., seeds]."""
    targets: Tensor
    """float32 [steps, batch, outputs, seeds] for regression, int64 [steps, batch, seeds] for classes."""


class Feed(Protocol):
    """A stream opened for some seeds on a device."""

    def examples(self, start: int, count: int) -> Examples:
        """The examples of steps ``start`` to ``start + count``."""

    def probe(self, step: int, size: int) -> Tensor:
        """``size`` fresh inputs of the task in force at a step, for measuring: [size, ..., seeds]."""


class HeldOut(Feed, Protocol):
    """A feed whose tasks have examples that are never trained on."""

    def held_out(self, step: int) -> tuple[Tensor, Tensor]:
        """All held-out examples of the task in force at a step: inputs float32 [examples, ..., seeds], classes int64
        [examples, seeds]."""


@dataclass(frozen=True)
class Stream:
    """Base of every stream."""

    name: ClassVar[str]
    """Under which studies know it."""
    task: ClassVar[str]
    """``"regression"`` or ``"classification"``."""
    inputs: ClassVar[int]
    """Numbers in one input."""
    outputs: ClassVar[int]
    """Numbers in one target, or classes."""
    holds_out: ClassVar[bool] = False
    """Whether its feed is a :class:`HeldOut`."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input, without the batch."""
        return (self.inputs,)

    @property
    def batch(self) -> int:
        """Examples a step: the stream's field ``batch_size``, 1 without one. Reports read that field."""
        return int(getattr(self, "batch_size", 1))

    def task_length(self) -> int:
        """Steps between changes."""
        raise NotImplementedError(f"{type(self).__name__} does not say how long a task is")

    def open(self, seeds: Sequence[int], device: torch.device) -> Feed:
        """The stream for these seeds."""
        raise NotImplementedError(f"{type(self).__name__} cannot be opened")

    def check(self, where: str, value: int, low: int, high: int | None = None) -> None:
        """Refuse a whole number out of its range."""
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{self.name}.{where} is {value!r}, which is not a whole number")
        if value < low or (high is not None and value > high):
            upper = "" if high is None else f" and at most {high}"
            raise ValueError(f"{self.name}.{where} is {value}; it must be at least {low}{upper}")


class SeededNoise:
    """The noise of several seeds at several positions at once."""

    def __init__(self, seeds: Sequence[int], purpose: str, positions: Tensor) -> None:
        """``purpose``: see :func:`perennial.noise.seed_key`. ``positions``: int32 [positions], in place of the step."""
        words = torch.tensor([seed_key(seed, purpose) for seed in seeds], dtype=torch.int32, device=positions.device)
        self._noise = Noise(words.T[:, None, None, :], positions[:, None, None])
        self.seeds, self.device = tuple(seeds), positions.device

    def uniform(self, name: str, count: int) -> Tensor:
        """Elements 0 to ``count`` of the named draw: float32 [positions, count, seeds]."""
        element = torch.arange(count, dtype=torch.int32, device=self.device)
        return self._noise.uniform(name, element[:, None])

    def normal(self, name: str, count: int) -> Tensor:
        """The same of standard normal numbers."""
        element = torch.arange(count, dtype=torch.int32, device=self.device)
        return self._noise.normal(name, element[:, None])

    def order(self, name: str, count: int) -> Tensor:
        """A uniformly random order of ``count`` things at the first position: int64 [count, seeds]."""
        return self.uniform(name, count)[0].argsort(dim=0, stable=True)
