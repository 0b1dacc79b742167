"""One training of all networks under test."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from perennial.trainability.lanes import TOGETHER, Lanes, generator
from perennial.trainability.results import Learning

_POINTS, _LEAST = 50, 10  # of a curve, and steps in a window of it, unless told otherwise
_PATIENCE = 2.0  # seconds before a progress bar appears


def batches(seed: int, purpose: str, pool: Tensor, size: int) -> Iterator[Tensor]:
    """Batches [size] of what is in the pool, cut from one permutation of it after another."""
    rng, left = generator(seed, purpose), pool[:0]
    while True:
        while len(left) < size:
            left = torch.cat((left, pool[torch.randperm(len(pool), generator=rng)]))
        yield left[:size]
        left = left[size:]


def learn(
    lanes: Lanes,
    inputs: Tensor,
    targets: Tensor,
    pools: Sequence[Tensor],
    purpose: str,
    steps: int,
    every: int | None,
    batch_size: int,
    advance: Callable[[], None],
) -> list[Learning]:
    """Train; how each side learnt. ``pools``: each seed's samples, by number."""
    streams = [batches(seed, purpose, pool, batch_size) for seed, pool in zip(lanes.seeds, pools, strict=True)]
    rows = torch.arange(len(streams), device=inputs.device)[:, None]
    window = every or max(_LEAST, steps // _POINTS)
    ends: list[int] = []
    points: list[Tensor] = []
    total = torch.zeros((), dtype=torch.float64, device=lanes.device)
    for number in range(steps):
        index = torch.stack([next(stream) for stream in streams]).to(inputs.device)
        x, y = inputs[index].to(lanes.device), targets[rows, index].to(lanes.device)
        total = total + lanes.step(number, x, y)
        if (number + 1) % window == 0 or number + 1 == steps:
            points.append(total / (number + 1 - (ends[-1] if ends else 0)))
            ends.append(number + 1)
            total = torch.zeros_like(total)
        advance()
    curves = torch.stack(points, -1).cpu().numpy()
    final = lanes.evaluate(lanes.loss, inputs, targets, max(batch_size, TOGETHER)).cpu().numpy()
    gone = lanes.state.diverged.cpu().numpy()
    return [Learning(np.array(ends), curves[:, i], final[:, i], gone[i :: lanes.sides]) for i in range(lanes.sides)]


@contextlib.contextmanager
def bar_for(shown: bool, total: int, what: str) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, once it has taken long and if somebody sees it; gives what to call after every step."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda: None
        return
    console = Console(stderr=True)
    if not shown or not (console.is_terminal or console.is_jupyter):
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(what, total=total)
    begun = time.monotonic()

    def advance() -> None:
        bar.advance(task)
        if not bar.live.is_started and time.monotonic() - begun > _PATIENCE:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:  # what was never shown would leave an empty line
            bar.stop()
