"""Slowly-changing regression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from perennial.streams.base import Examples, SeededNoise, Stream


@dataclass(frozen=True)
class SlowlyChangingRegression(Stream):
    r"""Slowly-changing regression (Dohare et al., Nature 2024): bits in, a number out, and now and then a bit flips.

    The input has ``slow_bits`` bits that stay for ``flip_after`` examples and ``fast_bits`` that are drawn anew for
    each example; a constant 1 is the 21st input, in target and learner alike their bias. The target is a fixed network
    of ``target_units`` linear threshold units, all of whose weights are -1 or 1: unit i is on if
    :math:`\sum_j w_{ij} x_j > \beta (m + 1) - S_i`, where m + 1 is the number of inputs with the constant and
    :math:`S_i` how many of the unit's weights are -1; the target is the signed sum of the units and an output bias.
    (In the published code the sign of the bias weight is taken the wrong way round in :math:`S_i`; here it is as
    defined.)
    """

    name = "slowly_changing_regression"
    task = "regression"
    outputs = 1

    slow_bits: int = 15
    """Bits that change only between tasks."""
    fast_bits: int = 5
    """Bits drawn anew for every example; at most 12, since a task's targets are tabulated over them."""
    flip_after: int = 10_000
    """Examples in a task."""
    flip: str = "one"
    """``"one"``: one slow bit, chosen at random, flips after each task (the paper). ``"all"``: all are drawn anew
    (the default of the published code, another experiment)."""
    target_units: int = 100
    """Linear threshold units of the target."""
    beta: float = 0.7
    """How many of a unit's inputs must agree with its weights, as a share."""

    def __post_init__(self) -> None:
        self.check("slow_bits", self.slow_bits, 1)
        self.check("fast_bits", self.fast_bits, 0, 12)
        self.check("flip_after", self.flip_after, 1)
        self.check("target_units", self.target_units, 1)
        if type(self.beta) not in (int, float) or not math.isfinite(self.beta):
            raise ValueError(f"slowly_changing_regression.beta is {self.beta!r}; it must be a finite number")
        if self.flip not in ("one", "all"):
            raise ValueError(f"slowly_changing_regression.flip is {self.flip!r}; it is one of one, all")

    @property
    def inputs(self) -> int:  # type: ignore[override]
        """Numbers in one input, the constant left to the learner's bias."""
        return self.slow_bits + self.fast_bits

    def task_length(self) -> int:
        return self.flip_after

    def open(self, seeds: Sequence[int], device: torch.device) -> _Feed:
        return _Feed(self, tuple(seeds), device)


class _Feed:
    def __init__(self, stream: SlowlyChangingRegression, seeds: tuple[int, ...], device: torch.device):
        self.stream, self.seeds, self.device = stream, seeds, device
        units, bits = stream.target_units, stream.inputs
        target = SeededNoise(seeds, "tasks", torch.zeros(1, dtype=torch.int32, device=device))

        def signs(name: str, count: int) -> Tensor:  # [seeds, count] of -1 and 1
            return torch.where(target.uniform(name, count)[0].T < 0.5, -1.0, 1.0)

        weight = signs("weight", units * (bits + 1)).reshape(len(seeds), units, bits + 1)
        negative = (weight < 0).sum(2)
        self.weight, self.constant = weight[..., :bits], weight[..., bits]  # [seeds, units, bits], [seeds, units]
        self.threshold = stream.beta * (bits + 1) - negative
        self.readout, self.offset = signs("readout", units), signs("offset", 1)

        self._drawn = self._slow_bits(128)
        self.table = lru_cache(maxsize=4)(self._table)

    def _slow_bits(self, tasks: int) -> Tensor:
        """The slow bits of the first tasks: float32 [tasks, slow, seeds]."""
        each = SeededNoise(self.seeds, "tasks", torch.arange(tasks, dtype=torch.int32, device=self.device))
        bits = each.uniform("slow", self.stream.slow_bits) < 0.5
        if self.stream.flip == "one":
            chosen = (each.uniform("flip", 1) * self.stream.slow_bits).long()  # [tasks, 1, seeds]
            flipped = torch.zeros_like(bits, dtype=torch.int32).scatter_(1, chosen, 1)
            flipped[0] = 0
            bits = (bits[:1].to(torch.int32) + flipped.cumsum(0)) % 2 == 1
        return bits.to(torch.float32)

    def slow(self, task: int) -> Tensor:
        """The slow bits of a task: float32 [slow, seeds]."""
        if task >= len(self._drawn):
            self._drawn = self._slow_bits(2 * task)
        return self._drawn[task]

    def _fast(self, code: Tensor) -> Tensor:
        """The fast bits as numbers: int [n, seeds] -> float32 [n, fast, seeds]."""
        shift = torch.arange(self.stream.fast_bits, dtype=code.dtype, device=self.device)
        return ((code[:, None] >> shift[:, None]) & 1).to(torch.float32)

    def _with_slow(self, task: int, code: Tensor) -> Tensor:
        """The inputs of a task for each code [n, seeds]: float32 [n, bits, seeds]."""
        return torch.cat([self.slow(task).expand(len(code), -1, -1), self._fast(code)], 1)

    def _table(self, task: int) -> Tensor:
        """The target of every setting of the fast bits: [2**fast, seeds]."""
        codes = torch.arange(2**self.stream.fast_bits, device=self.device)
        x = self._with_slow(task, codes[:, None].expand(-1, len(self.seeds))).permute(2, 0, 1)  # [seeds, codes, bits]
        total = x @ self.weight.transpose(1, 2) + self.constant[:, None]
        on = (total > self.threshold[:, None]).to(torch.float32)
        values: Tensor = (on * self.readout[:, None]).sum(2) + self.offset
        return values.T.contiguous()

    def _code(self, uniform: Tensor) -> Tensor:
        code: Tensor = uniform * 2**self.stream.fast_bits
        return code.to(torch.int32)

    def examples(self, start: int, count: int) -> Examples:
        steps = torch.arange(start, start + count, dtype=torch.int32, device=self.device)
        codes = self._code(SeededNoise(self.seeds, "data", steps).uniform("fast", 1)[:, 0])
        inputs, targets = [], []
        at = start
        while at < start + count:
            task = at // self.stream.flip_after
            end = min(start + count, (task + 1) * self.stream.flip_after)
            code = codes[at - start : end - start]
            inputs.append(self._with_slow(task, code))
            targets.append(self.table(task).gather(0, code.long()))
            at = end
        return Examples(torch.cat(inputs)[:, None], torch.cat(targets)[:, None, None])

    def probe(self, step: int, size: int) -> Tensor:
        at = torch.tensor([step], dtype=torch.int32, device=self.device)
        code = self._code(SeededNoise(self.seeds, "probe", at).uniform("fast", size)[0])
        return self._with_slow(step // self.stream.flip_after, code)
