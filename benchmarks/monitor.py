"""What a monitor costs: the time of a reading, as a share of the training from one reading to the next.

Readings and training steps are timed in turn, some steps and then a reading, so that what slows the machine slows both.
The share is that at the default interval.

    python benchmarks/monitor.py [--networks NAME ...] [--rounds 10] [--device cuda]
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import perennial
from perennial.resnet import ResNet18

EVERY: int = inspect.signature(perennial.Monitor).parameters["every"].default


def mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    )

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = BertForSequenceClassification(config)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids=ids).logits  # type: ignore[no-any-return]

    return Logits()


def tokens(count: int) -> torch.Tensor:
    return torch.randint(0, 30_000, (count, 64))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor], int, int]] = {
    "784-300-150-10, batch 32": (lambda: mlp(784, 300, 150, 10), lambda n: torch.randn(n, 784), 32, 256),
    "784-2000x3-10, batch 32": (lambda: mlp(784, 2000, 2000, 2000, 10), lambda n: torch.randn(n, 784), 32, 256),
    "24-256-256-8, batch 128": (lambda: mlp(24, 256, 256, 8), lambda n: torch.randn(n, 24), 128, 256),
    "ResNet-18, 32 x 32, batch 90": (lambda: ResNet18(100), lambda n: torch.randn(n, 3, 32, 32), 90, 90),
    "MiniLM-sized BERT, 64 tokens, batch 16": (bert, tokens, 16, 32),
}
"""How to make the network and an input of some samples, the batch, and the samples of a reading."""


def measure(name: str, rounds: int, steps: int, device: str) -> tuple[float, float]:
    """Median seconds of a training step and of a reading."""
    make, inputs, batch, samples = NETWORKS[name]
    torch.manual_seed(0)
    model = make().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    monitor = perennial.Monitor(model, inputs(samples).to(device))
    x = inputs(batch).to(device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)

    def timed(function: Callable[[], Any]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step()
    monitor.read()
    training, reading = [], []
    for _ in track(range(rounds), name, console=Console(stderr=True)):
        training.append(timed(lambda: [step() for _ in range(steps)]) / steps)
        reading.append(timed(monitor.read))
    return statistics.median(training), statistics.median(reading)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="training steps between two readings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("network", "step, ms", "reading, ms", "reading / step", f"share at every {EVERY:,}"):
        table.add_column(title, justify="left" if title == "network" else "right")
    for name in options.networks:
        step, reading = measure(name, options.rounds, options.steps, options.device)
        share = reading / (EVERY * step)
        table.add_row(name, f"{1e3 * step:.2f}", f"{1e3 * reading:.1f}", f"{reading / step:.1f}", f"{share:.2%}")
    Console().print(table)


if __name__ == "__main__":
    main()
