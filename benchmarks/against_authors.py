"""Steps a second, beside the papers' own code in the same run.

    python benchmarks/against_authors.py --plasticity PATH --upgd PATH

The paths are checkouts of shibhansh/loss-of-plasticity and mohmdelsayed/upgd; without them only our side is measured.
The two sides run in turn, several rounds; the table shows the median round of each and the median of the ratios, which
hold on a noisy machine where single numbers do not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from perennial import MLP, SGD, UPGD, ContinualBackprop, Lane, Population, SlowlyChangingRegression
from perennial.streams import Examples, Stream


@dataclass(frozen=True)
class RandomImages(Stream):
    """Random images of MNIST's size; the time of a step does not depend on what is in them."""

    name = "random_images"
    task = "classification"
    inputs = 784
    outputs = 10

    def open(self, seeds: Sequence[int], device: torch.device) -> RandomFeed:
        return RandomFeed(len(seeds))


class RandomFeed:
    """One block of images, over and over."""

    def __init__(self, seeds: int) -> None:
        self.inputs = torch.rand(1000, 1, 784, seeds)
        self.targets = torch.randint(10, (1000, 1, seeds))

    def examples(self, start: int, count: int) -> Examples:
        """The first ``count`` images."""
        return Examples(self.inputs[:count], self.targets[:count])

    def probe(self, step: int, size: int) -> torch.Tensor:
        """The first ``size`` images."""
        return self.inputs[:size, 0]


Timed = Callable[[], float]
"""Runs a while and returns lane-steps a second."""


def ours(population: Population, seconds: float = 1.0) -> Timed:
    """Our side: a compiled population."""
    population.advance(1)
    begun = time.perf_counter()
    population.advance(100)
    steps = max(100, int(100 * seconds / (time.perf_counter() - begun)))

    def measure() -> float:
        begun = time.perf_counter()
        population.advance(steps)
        return steps * len(population.lanes) / (time.perf_counter() - begun)

    return measure


def theirs(step: Callable[[], object], seconds: float = 1.0) -> Timed:
    """The authors' side: one call a step."""
    for _ in range(20):
        step()

    def measure() -> float:
        begun, steps = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            step()
            steps += 1
        return steps / (time.perf_counter() - begun)

    return measure


def regression(lanes: int) -> Population:
    """Slowly-changing regression under continual backpropagation."""
    cbp = ContinualBackprop(replacement_rate=1e-4)
    members = [Lane(seed % 100, SGD(lr=0.01), (cbp,)) for seed in range(lanes)]
    return Population(lambda: MLP(hidden=(5,)).build(20, 1), SlowlyChangingRegression(), members)


def images(hidden: tuple[int, ...], rule: SGD | UPGD, keep: bool) -> Population:
    """One lane on images of MNIST's size."""
    interventions = (ContinualBackprop(replacement_rate=1e-5),) if keep else ()
    return Population(lambda: MLP(hidden=hidden).build(784, 10), RandomImages(), [Lane(0, rule, interventions)])


def authors_regression() -> Timed:
    """Continual backpropagation of shibhansh/loss-of-plasticity on the 20-5-1 network."""
    from lop.algos.cbp import ContinualBackprop as Theirs
    from lop.nets.ffnn import FFNN

    learner = Theirs(
        FFNN(input_size=20, num_features=5, hidden_activation="relu"),
        step_size=0.01,
        replacement_rate=1e-4,
        decay_rate=0.99,
    )
    x, y = (torch.rand(1, 20) > 0.5).float(), torch.randn(1, 1)
    return theirs(lambda: learner.learn(x, y))


def authors_images(width: int) -> Timed:
    """The same on 784-width-width-width-10."""
    from lop.algos.cbp import ContinualBackprop as Theirs
    from lop.nets.deep_ffnn import DeepFFNN

    net = DeepFFNN(784, num_features=width, num_outputs=10, num_hidden_layers=3)
    learner = Theirs(net, step_size=0.003, loss="nll", replacement_rate=1e-5, decay_rate=0.99, accumulate=True)
    x, y = torch.rand(1, 784), torch.randint(10, (1,))
    return theirs(lambda: learner.learn(x, y))


def authors_upgd() -> Timed:
    """First-order global UPGD of mohmdelsayed/upgd on 784-300-150-10."""
    from core.optim.weight_upgd.first_order import FirstOrderGlobalUPGD

    net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 150), nn.ReLU(), nn.Linear(150, 10))
    optimizer = FirstOrderGlobalUPGD(net.named_parameters(), lr=0.01, beta_utility=0.9999, sigma=0.1, weight_decay=0.01)
    x, y = torch.rand(1, 784), torch.randint(10, (1,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return theirs(step)


UPGD_RULE = UPGD(lr=0.01, utility_decay=0.9999, noise_std=0.1, weight_decay=0.01)
WORK: list[tuple[str, int, float | None, Callable[[], Population], Callable[[], Timed]]] = [
    ("regression, continual backprop, 1 lane", 1, 50, lambda: regression(1), authors_regression),
    ("regression, continual backprop, 30 lanes", 1, None, lambda: regression(30), authors_regression),
    ("regression, continual backprop, 100 lanes", 1, 500, lambda: regression(100), authors_regression),
    ("regression, continual backprop, 1000 lanes", 1, None, lambda: regression(1000), authors_regression),
    ("UPGD, 784-300-150-10", 1, 8, lambda: images((300, 150), UPGD_RULE, False), authors_upgd),
    ("continual backprop, 784-100-100-100-10", 1, 8, lambda: images((100,) * 3, SGD(lr=0.003), True),
     lambda: authors_images(100)),
    ("continual backprop, 784-2000-2000-2000-10", 2, 2, lambda: images((2000,) * 3, SGD(lr=0.003), True),
     lambda: authors_images(2000)),
]  # fmt: skip
"""What, threads, the ratio to reach, our side, theirs."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plasticity", type=Path, help="a checkout of shibhansh/loss-of-plasticity")
    parser.add_argument("--upgd", type=Path, help="a checkout of mohmdelsayed/upgd")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    sys.path += [str(p) for p in (arguments.plasticity, arguments.upgd) if p]
    print(f"{'work':44} {'threads':>7} {'ours/s':>11} {'theirs/s':>9} {'ratio':>7} {'to reach':>8} {'kB/lane':>8}")
    for name, threads, target, make, make_theirs in WORK:
        if arguments.only not in name:
            continue
        torch.set_num_threads(threads)
        population = make()
        mine = ours(population)
        there = arguments.upgd if name.startswith("UPGD") else arguments.plasticity
        other = make_theirs() if there else None
        rounds = [(mine(), other() if other else float("nan")) for _ in range(arguments.rounds)]
        ratio = statistics.median(a / b for a, b in rounds)
        print(
            f"{name:44} {threads:7} {statistics.median(a for a, _ in rounds):11,.0f} "
            f"{statistics.median(b for _, b in rounds):9,.0f} {ratio:7.1f} {target or '':>8} "
            f"{population.bytes_per_lane / 1000:8,.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
