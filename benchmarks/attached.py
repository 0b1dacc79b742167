"""What an attached intervention costs: ResNet-18 on 32 x 32 images, a batch of 90, SGD with momentum.

For every intervention a bare network and one with the intervention attached are trained in turn, a step each, and the
ratio of every pair is taken. Steps take a second or two on two cores and a shared machine is noisy, so the time spent
in the hooks themselves is measured as well and given as a share of the bare step: that is the cost, the ratio is the
check.

    python benchmarks/attached.py [--methods NAME ...] [--pairs 10] [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import perennial
from perennial.methods import REGISTRY, Intervention
from perennial.resnet import ResNet18

SETTINGS: dict[str, dict[str, Any]] = {
    "continual_backprop": {"replacement_rate": 1e-5, "maturity_threshold": 1000},
    "redo": {"every": 5},
    "regrama": {"every": 5},
    "hare_and_tortoise": {"every": 5},
}
"""Where the default is not the papers' setting for this network, or an event would fall outside of the steps timed."""


class Clock:
    """Adds up the time that the keeper's hook takes after a step."""

    def __init__(self, keeper: perennial.Keeper, device: str) -> None:
        self.inner, self.device, self.seconds = keeper._after_step, device, 0.0
        keeper._handles[0].remove()
        keeper._handles[0] = keeper._optimizer.register_step_post_hook(self)

    def __call__(self, *given: Any) -> None:
        wait(self.device)
        begun = time.perf_counter()
        self.inner(*given)
        wait(self.device)
        self.seconds += time.perf_counter() - begun


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def network(device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = ResNet18(100).to(device)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def measure(method: Intervention, pairs: int, batch: int, device: str) -> tuple[float, float, float]:
    """Median seconds of a bare step, median ratio of the pairs, seconds in the hook a step."""
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, 100, (batch,), device=device)
    bare, attached = network(device), network(device)
    keeper = perennial.attach(method, *attached, example=x[:2], check=False)
    clock = Clock(keeper, device)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        wait(device)
        begun = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        wait(device)
        return time.perf_counter() - begun

    step(*bare)
    step(*attached)
    clock.seconds = 0.0
    rows = []
    for number in track(range(pairs), method.name, console=Console(stderr=True)):
        order = (bare, attached) if number % 2 == 0 else (attached, bare)
        first, second = (step(*one) for one in order)
        rows.append((first, second) if number % 2 == 0 else (second, first))
    return (
        statistics.median(b for b, _ in rows),
        statistics.median(a / b for b, a in rows),
        clock.seconds / pairs,
    )


def main() -> None:
    every = [m.name for m in REGISTRY if issubclass(m, Intervention)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=every, default=every)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=90)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("intervention", "bare step, s", "hook, ms", "hook / step", "attached / bare"):
        table.add_column(title, justify="left" if title == "intervention" else "right")
    for method in REGISTRY:
        if method.name in options.methods:
            made: Any = method(**SETTINGS.get(method.name, {}))
            bare, ratio, hook = measure(made, options.pairs, options.batch, options.device)
            table.add_row(method.name, f"{bare:.3f}", f"{1e3 * hook:.2f}", f"{100 * hook / bare:.2f}%", f"{ratio:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
