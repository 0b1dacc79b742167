"""An average of two inputs that changes its sign, or its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perennial.streams.base import Examples, SeededNoise, Stream


@dataclass(frozen=True)
class ChangingAverage(Stream):
    r"""The mean of two of many inputs, which changes now and then: the two toy problems of Elsayed and Mahmood (2024).

    Inputs are standard normal. With ``change="sign"`` the target is :math:`\pm (x_i + x_j) / 2`: the same two inputs
    for good, drawn by the seed with replacement, and another sign in every task, so that what was learned is useful and
    only its sign is wrong: forgetting it costs. With ``change="inputs"`` it is the mean of inputs 0 and 1, in the next
    task of 2 and 3, and so on round the inputs, so that what was learned is in the way: not being able to learn costs.

    Source: Elsayed and Mahmood, ICLR 2024, the problems with changing outputs and changing inputs; their repository's
    ``changing_average`` and ``permuted_average``, before commit edcbaaa.
    """

    name = "changing_average"
    task = "regression"
    outputs = 1

    change: str = "sign"
    """What changes between tasks: ``"sign"`` or ``"inputs"``."""
    width: int = 16
    """Numbers in one input; even."""
    task_steps: int = 200
    """Examples in a task."""

    def __post_init__(self) -> None:
        if self.change not in ("sign", "inputs"):
            raise ValueError(f"changing_average.change is {self.change!r}; it is one of sign, inputs")
        self.check("width", self.width, 2)
        self.check("task_steps", self.task_steps, 1)
        if self.width % 2:
            raise ValueError(f"changing_average.width is {self.width}; it must be even")

    @property
    def inputs(self) -> int:  # type: ignore[override]
        """Numbers in one input."""
        return self.width

    def task_length(self) -> int:
        return self.task_steps

    def open(self, seeds: Sequence[int], device: torch.device) -> _Feed:
        return _Feed(self, tuple(seeds), device)


class _Feed:
    def __init__(self, stream: ChangingAverage, seeds: tuple[int, ...], device: torch.device):
        self.stream, self.seeds, self.device = stream, seeds, device
        once = SeededNoise(seeds, "tasks", torch.zeros(1, dtype=torch.int32, device=device))
        self.drawn = (once.uniform("averaged", 2)[0] * stream.width).long()  # [2, seeds]

    def _inputs(self, purpose: str, positions: Tensor, rows: int) -> Tensor:
        """[positions, rows, width, seeds]."""
        flat = SeededNoise(self.seeds, purpose, positions).normal("inputs", rows * self.stream.width)
        shaped: Tensor = flat.unflatten(1, (rows, self.stream.width))
        return shaped

    def examples(self, start: int, count: int) -> Examples:
        steps = torch.arange(start, start + count, dtype=torch.int32, device=self.device)
        inputs, task = self._inputs("data", steps, 1), steps.long() // self.stream.task_steps
        if self.stream.change == "sign":
            averaged, sign = self.drawn.expand(count, 2, -1), 1 - 2 * (task % 2)
        else:
            first = 2 * task % self.stream.width
            averaged = torch.stack((first, first + 1), 1)[..., None].expand(-1, -1, len(self.seeds))
            sign = torch.ones_like(task)
        mean = inputs.gather(2, averaged[:, None]).mean(2, keepdim=True)
        return Examples(inputs, sign[:, None, None, None] * mean)

    def probe(self, step: int, size: int) -> Tensor:
        return self._inputs("probe", torch.tensor([step], dtype=torch.int32, device=self.device), size)[0]
