"""A sum of two inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perennial.streams.base import Examples, SeededNoise, Stream


@dataclass(frozen=True)
class SumOfTwo(Stream):
    """The sum of two of the inputs: the problem on which Elsayed and Mahmood (ICLR 2024) compare utilities.

    Inputs are uniform on (-1/2, 1/2). Which two are summed is drawn anew for each task, with replacement, so that it
    may be one of them twice. The paper has a single task.
    """

    name = "sum_of_two"
    task = "regression"
    outputs = 1

    width: int = 5
    """Numbers in one input."""
    task_steps: int = 2000
    """Examples in a task."""

    def __post_init__(self) -> None:
        self.check("width", self.width, 1)
        self.check("task_steps", self.task_steps, 1)

    @property
    def inputs(self) -> int:  # type: ignore[override]
        """Numbers in one input."""
        return self.width

    def task_length(self) -> int:
        return self.task_steps

    def open(self, seeds: Sequence[int], device: torch.device) -> _Feed:
        return _Feed(self, tuple(seeds), device)


class _Feed:
    def __init__(self, stream: SumOfTwo, seeds: tuple[int, ...], device: torch.device):
        self.stream, self.seeds, self.device = stream, seeds, device

    def _inputs(self, purpose: str, positions: Tensor, rows: int) -> Tensor:
        """[positions, rows, width, seeds]."""
        flat = SeededNoise(self.seeds, purpose, positions).uniform("inputs", rows * self.stream.width)
        shaped: Tensor = flat.unflatten(1, (rows, self.stream.width))
        return shaped - 0.5

    def examples(self, start: int, count: int) -> Examples:
        steps = torch.arange(start, start + count, dtype=torch.int32, device=self.device)
        inputs = self._inputs("data", steps, 1)
        tasks = torch.arange(
            start // self.stream.task_steps,
            (start + count - 1) // self.stream.task_steps + 1,
            dtype=torch.int32,
            device=self.device,
        )
        summed = (SeededNoise(self.seeds, "tasks", tasks).uniform("summed", 2) * self.stream.width).long()
        read = inputs.gather(2, summed[steps // self.stream.task_steps - tasks[0]][:, None])
        return Examples(inputs, read.sum(2, keepdim=True))

    def probe(self, step: int, size: int) -> Tensor:
        return self._inputs("probe", torch.tensor([step], dtype=torch.int32, device=self.device), size)[0]
