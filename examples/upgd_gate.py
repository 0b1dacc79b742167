"""What UPGD's gate does, and how its settings trade off: two figures for the guide to optimizers.

    python examples/upgd_gate.py --out FOLDER

The gate: a network of one hidden layer learns the sum of two of its five inputs; drawn is how freely its weights
learn (1 - gate) at the end, by the utility of first and of second order. The sweep: online permuted digits
(64-32-32-10), UPGD at every point of a grid of step size, noise and decay of the utility, three seeds, 53,910 images;
drawn is the mean online accuracy of the last ten of thirty tasks. Written beside the figures: both as CSV.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import polars
import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.nn import functional as F

from perennial import MLP, UPGD, Lane, PermutedDigits, Population, optim
from perennial.curvature import HesScale

STEPS, DECAY = 3000, 0.99
RATES, NOISES, DECAYS = (0.003, 0.01, 0.03), (0.0, 0.001, 0.01, 0.1), (0.9, 0.99, 0.999, 0.9999)
SEEDS, TASKS = 3, 30


def plasticity(order: int) -> np.ndarray:
    """How freely each weight of the first layer learns after a while, [units, inputs]."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 1))

    def squared(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(output[:, 0], y)

    loss = HesScale(model, squared)
    optimizer = optim.UPGD(
        model.named_parameters(), lr=0.02, utility_decay=DECAY, noise_std=0.01, order=order,
        curvature=loss.diagonal if order == 2 else None,
    )  # fmt: skip
    for _ in track(range(STEPS), f"gate, order {order}", console=Console(stderr=True)):
        x = torch.rand(1, 5) - 0.5
        optimizer.zero_grad()
        loss(x, x[:, 0] + x[:, 1]).backward()
        optimizer.step()
    corrected = [optimizer.state[p]["utility"] / (1 - DECAY**STEPS) for p in model.parameters()]
    highest = max(float(u.max()) for u in corrected)
    return torch.sigmoid(-corrected[0] / highest).numpy()


def gate(out: Path) -> None:
    """The gate on a small problem, weight by weight, by the utility of first and of second order."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained", width_ratios=[3, 3, 2])
    rows, groups = [], []
    for order, axis in zip((1, 2), axes, strict=False):
        free = plasticity(order)
        rows += [(order, unit, entry, float(value)) for (unit, entry), value in np.ndenumerate(free)]
        groups += [free[:, :2].ravel(), free[:, 2:].ravel()]
        image = axis.imshow(free.T, aspect="auto", cmap="viridis", vmin=0.27, vmax=0.73)
        axis.set(xlabel="hidden unit", title=f"order {order}")
        axis.set_yticks(range(5), ["1 (in the sum)", "2 (in the sum)", "3", "4", "5"] if order == 1 else [""] * 5)
    axes[0].set_ylabel("input")
    figure.colorbar(image, ax=axes[1], label="1 - gate")
    axes[2].boxplot(groups, tick_labels=["in", "not", "in", "not"], widths=0.5)
    axes[2].axhline(0.5, color="0.6", linewidth=0.8)
    axes[2].set(ylabel="1 - gate", xlabel="order 1              order 2", title="input in the sum or not")
    frame = polars.DataFrame(rows, ["order", "unit", "input", "plasticity"], orient="row")
    frame.write_csv(out / "upgd-gate.csv", float_precision=5)
    figure.savefig(out / "upgd-gate.svg", metadata={"Date": None})
    figure.savefig(out / "upgd-gate.png", dpi=80)


def sweep(out: Path) -> None:
    """The grid, as one population."""
    stream = PermutedDigits()
    points = list(itertools.product(RATES, NOISES, DECAYS, range(SEEDS)))
    lanes = [Lane(seed, UPGD(lr=r, noise_std=n, utility_decay=d)) for r, n, d, seed in points]
    population = Population(lambda: MLP(hidden=(32, 32)).build(64, 10), stream, lanes)
    accuracy = []
    length = stream.task_length()
    for _ in track(range(TASKS), "sweep", console=Console(stderr=True)):
        population.advance(length)
        accuracy.append(population.collect(length)["online_accuracy"])
    last = torch.stack(accuracy[-10:]).mean(0)
    first = torch.stack(accuracy[:10]).mean(0)
    frame = polars.DataFrame(
        [(*point, float(a), float(b)) for point, a, b in zip(points, first, last, strict=True)],
        ["lr", "noise_std", "utility_decay", "seed", "first_ten", "last_ten"],
        orient="row",
    )
    frame.write_csv(out / "upgd-sweep.csv", float_precision=5)
    mean = np.nanmean(last.numpy().reshape(len(RATES), len(NOISES), len(DECAYS), SEEDS), axis=3)
    figure, axes = plt.subplots(1, len(RATES), figsize=(9, 2.8), layout="constrained", sharey=True)
    for rate, values, axis in zip(RATES, mean, axes, strict=True):
        image = axis.imshow(values, vmin=np.nanmin(mean), vmax=np.nanmax(mean), cmap="viridis", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            dark = value < (np.nanmin(mean) + np.nanmax(mean)) / 2
            axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color="white" if dark else "black")
        axis.set(title=f"lr {rate:g}", xlabel="utility_decay")
        axis.set_xticks(range(len(DECAYS)), [f"{d:g}" for d in DECAYS])
        axis.set_yticks(range(len(NOISES)), [f"{n:g}" for n in NOISES])
    axes[0].set_ylabel("noise_std")
    figure.colorbar(image, ax=axes, label="online accuracy, tasks 21 to 30")
    figure.savefig(out / "upgd-sweep.svg", metadata={"Date": None})
    figure.savefig(out / "upgd-sweep.png", dpi=80)


def main() -> None:
    """Both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "perennial"
    sweep(out)
    gate(out)


if __name__ == "__main__":
    main()
