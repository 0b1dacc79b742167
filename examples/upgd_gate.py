"""What UPGD's gate does: a figure for the guide to optimizers.

    python examples/upgd_gate.py --out FOLDER

A network of one hidden layer learns the sum of two of its five inputs; drawn is how freely its weights learn (1 - gate)
at the end, by the utility of first and of second order. Written beside the figure: the numbers as CSV.
"""

from __future__ import annotations

import argparse
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

from perennial import optim
from perennial.curvature import HesScale

STEPS, DECAY = 3000, 0.99


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


def main() -> None:
    """The figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "perennial"
    gate(out)


if __name__ == "__main__":
    main()
