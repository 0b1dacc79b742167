"""Milliseconds of an optimizer step, beside torch's AdamW and the UPGD paper's own optimizer in the same run.

    python benchmarks/optimizers.py [--upgd PATH]

PATH is a checkout of mohmdelsayed/upgd. All optimizers step in turn, round after round, each on parameters of its own
with the same gradients; the table shows the median of each and the median of its ratios, which hold on a noisy machine
where single numbers do not. The floor of an optimizer is the time in which the machine, at the bandwidth that fused
AdamW reaches, moves what the step must: for UPGD eight numbers a weight (gradient, weight and utility read for the
maximum; the same read again, weight and utility written), for AdamW seven.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perennial import optim
from perennial.resnet import ResNet18

NUMBERS = {"SGD": 3, "Adam": 7, "UPGD": 8, "AdaUPGD": 12, "PGD": 3, "EWC": 7, "MAS": 7}
"""Numbers a weight that a step must move."""


def models() -> dict[str, Callable[[], nn.Module]]:
    """The parameters on which steps are timed."""
    return {
        "ResNet-18": lambda: ResNet18(100),
        "MLP 784-300-150-10": lambda: nn.Sequential(
            nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 150), nn.ReLU(), nn.Linear(150, 10)
        ),
    }


def makers(upgd: bool) -> dict[str, Callable[[nn.Module], Any]]:
    """Every optimizer that is timed, by name."""
    found: dict[str, Callable[[nn.Module], Any]] = {
        "torch AdamW, fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-6, fused=True),
        "torch AdamW, foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-6, foreach=True),
    }
    if upgd:
        found["UPGD of the paper"] = _authors
    for name in NUMBERS:
        for compiled in (True, False):
            label = f"{name}, {'compiled' if compiled else 'as it is'}"
            found[label] = lambda m, name=name, compiled=compiled: optim.OPTIMIZERS[name](  # type: ignore[misc]
                m.named_parameters(), lr=1e-6, compiled=compiled
            )
    return found


def _authors(model: nn.Module) -> Any:
    from core.optim.weight_upgd.first_order import FirstOrderGlobalUPGD

    return FirstOrderGlobalUPGD(model.named_parameters(), lr=1e-6, beta_utility=0.999, sigma=0.001, weight_decay=0.0)


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgd", type=Path, help="a checkout of mohmdelsayed/upgd")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--optimizers", default="", help="optimizers whose name contains this, beside fused AdamW")
    arguments = parser.parse_args()
    if arguments.upgd:
        sys.path.append(str(arguments.upgd))
    for title, make in models().items():
        if arguments.only not in title:
            continue
        start = make()
        for p in start.parameters():
            p.grad = 0.01 * torch.randn_like(p)
        timed = {}
        for label, maker in makers(arguments.upgd is not None).items():
            if arguments.optimizers not in label and "fused" not in label and "paper" not in label:
                continue
            model = copy.deepcopy(start)
            for p, q in zip(model.parameters(), start.parameters(), strict=True):
                p.grad = q.grad
            timed[label] = (maker(model), [])
            begun = time.perf_counter()
            timed[label][0].step()
            first = time.perf_counter() - begun
            timed[label][0].step()
            if first > 1:
                print(f"{label}: the first step took {first:.0f} s", flush=True)
        for _ in range(arguments.rounds):
            for optimizer, seconds in timed.values():
                begun = time.perf_counter()
                optimizer.step()
                seconds.append(time.perf_counter() - begun)
        print(
            f"\n{title}: {sum(p.numel() for p in start.parameters()):,} parameters, {torch.get_num_threads()} threads"
        )
        print(f"{'optimizer':26} {'ms':>8} {'/ fused AdamW':>14} {'/ floor':>8} {'paper / it':>11}")
        fused = timed["torch AdamW, fused"][1]
        paper = timed.get("UPGD of the paper", (None, None))[1]
        for label, (_, seconds) in timed.items():
            ratio = statistics.median(a / b for a, b in zip(seconds, fused, strict=True))
            numbers = NUMBERS.get(label.partition(",")[0])
            floor = f"{ratio * 7 / numbers:8.2f}" if numbers else " " * 8
            against = statistics.median(b / a for a, b in zip(seconds, paper, strict=True)) if paper else float("nan")
            print(f"{label:26} {1e3 * statistics.median(seconds):8.2f} {ratio:14.2f} {floor} {against:11.1f}")
        print(flush=True)


if __name__ == "__main__":
    main()
