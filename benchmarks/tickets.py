"""How fast LeNet-300-100 is trained on MNIST: replicates of a search for tickets, against a plain PyTorch loop.

    python benchmarks/tickets.py [--replicates 4] [--iterations 300]

The plain loop is what one writes first: ``DataLoader`` over a ``TensorDataset``, ``nn.Sequential``, ``cross_entropy``,
``torch.optim.Adam``, all processors. Perennial trains the replicates side by side, one thread a processor, each round
with the weights that it has left. Both in turn at every level, three times; the fastest of each counts. MNIST comes
from ``PERENNIAL_DATA``. The last line is the search's sixteen rounds together: all their iterations over all their
time, against the median of the plain loop.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from perennial.methods import Adam
from perennial.streams.files import flat_images
from perennial.tickets import NETWORKS, Examples, SparseMLPs, mlp_layers, remaining_weights, whole

RATES = {"output": 0.1, "*": 0.2}
ROUNDS = 15


def plain(x: torch.Tensor, y: torch.Tensor, iterations: int) -> float:
    """Seconds an iteration of the plain loop."""
    model = NETWORKS["lenet_300_100"]()
    optimizer = torch.optim.Adam(model.parameters(), 1.2e-3)
    loader = DataLoader(TensorDataset(x, y), 60, shuffle=True)
    begun = time.perf_counter()
    for number, (inputs, classes) in enumerate(loader):
        if number == 20:
            begun = time.perf_counter()
        if number == iterations + 20:
            break
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), classes).backward()
        optimizer.step()
    return (time.perf_counter() - begun) / iterations


def searched(examples: Examples, kept: float, replicates: int, iterations: int) -> float:
    """Seconds an iteration of one replicate, of which ``kept`` of the weights are left."""
    models = [NETWORKS["lenet_300_100"]() for _ in range(replicates)]
    masks = [{n: torch.rand(m.shape) < kept for n, m in whole(model).items()} for model in models]
    starts = [dict(model.named_parameters()) for model in models]
    layers = mlp_layers(models[0])
    assert layers is not None
    threads = min(replicates, os.cpu_count() or 1)
    networks = SparseMLPs(layers, starts, masks, Adam(lr=1.2e-3), density=examples.density, threads=threads)
    picks = torch.randint(examples.count, (iterations + 20, replicates, 60))
    begun = 0.0
    for number in range(iterations + 20):
        if number == 20:
            begun = time.perf_counter()
        networks.step(examples, picks[number])
    return (time.perf_counter() - begun) / iterations / replicates


def best(measure: Callable[[], float]) -> float:
    return min(measure() for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=300)
    chosen = parser.parse_args()
    images, classes = flat_images("mnist")
    x, y = images[:55_000].float() / 255, classes[:55_000]
    examples = Examples(x, y)
    levels = [percent / 100 for percent in remaining_weights(NETWORKS["lenet_300_100"](), RATES, ROUNDS)]
    total, loops = 0.0, [best(lambda: plain(x, y, chosen.iterations))]
    for level, kept in enumerate(levels):
        mine = best(lambda kept=kept: searched(examples, kept, chosen.replicates, chosen.iterations))
        loops.append(best(lambda: plain(x, y, chosen.iterations)))
        total += mine
        print(f"level {level:2d}, {100 * kept:5.1f}%: {1 / mine:8,.0f} a second, {loops[-1] / mine:5.1f} times")
    loop = statistics.median(loops)
    print(f"plain loop, median of {len(loops)}: {1 / loop:,.0f} iterations a second")
    print(f"the search of {ROUNDS} rounds: {len(levels) / total:,.0f} a second, {loop * len(levels) / total:.1f} times")


if __name__ == "__main__":
    main()
