"""What each optimizer protects: figures for its page and for the guide to optimizers.

    python examples/gates.py --out FOLDER

A network of one hidden layer learns the sum of two of its five inputs. Drawn is, for every weight of the first layer at
the end, how freely it learns (UPGD: 1 - gate, by the utility of first and of second order), or how strongly it is held
(EWC, MAS, synaptic intelligence, RWalk: its importance). Written beside the figures: their numbers as CSV.
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
SETTINGS = {"lr": 0.02}
GATED = {"upgd": optim.UPGD, "ada_upgd": optim.AdaUPGD}
HELD = {
    "ewc": optim.EWC,
    "mas": optim.MAS,
    "synaptic_intelligence": optim.SynapticIntelligence,
    "rwalk": optim.RWalk,
}


def trained(kind: type[optim.RuleOptimizer], order: int, **settings: float) -> tuple[nn.Module, optim.RuleOptimizer]:
    """The network and its optimizer after a while."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 1))

    def squared(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(output[:, 0], y)

    loss = HesScale(model, squared)
    more = {"order": order, "curvature": loss.diagonal if order == 2 else None} if "noise_std" in settings else {}
    optimizer = kind(model.named_parameters(), **settings, **more)
    for _ in track(range(STEPS), f"{kind.__name__}, order {order}", console=Console(stderr=True)):
        x = torch.rand(1, 5) - 0.5
        optimizer.zero_grad()
        loss(x, x[:, 0] + x[:, 1]).backward()
        optimizer.step()
    return model, optimizer


def freedom(kind: type[optim.RuleOptimizer], order: int) -> np.ndarray:
    """How freely each weight of the first layer learns, 1 - gate, [units, inputs]."""
    settings = SETTINGS if kind is optim.UPGD else {"lr": 0.002}
    model, optimizer = trained(kind, order, **settings, utility_decay=DECAY, noise_std=0.01)
    corrected = [optimizer.state[p]["utility"] / (1 - DECAY**STEPS) for p in model.parameters()]
    highest = max(float(u.max()) for u in corrected)
    return torch.sigmoid(-corrected[0] / highest).numpy()


def importance(kind: type[optim.RuleOptimizer]) -> np.ndarray:
    """The importance of each weight of the first layer, as a share of the largest, [units, inputs]."""
    model, optimizer = trained(kind, 1, **SETTINGS, importance_decay=DECAY)
    state = optimizer.state[next(model.parameters())]
    if kind is optim.SynapticIntelligence:
        found = state["first"] / (state["second"].square() + optimizer.defaults["eps"])
    elif kind is optim.RWalk:
        found = state["first"] + state["second"]
    else:
        found = state["importance"]
    return (found / found.max()).numpy()


def draw(name: str, panels: dict[str, np.ndarray], label: str, limits: tuple[float, float], out: Path) -> None:
    """A picture of every weight a panel, and the weights of inputs in the sum beside those of the others."""
    widths = [3.0] * len(panels) + [2.0]
    figure, axes = plt.subplots(1, len(widths), figsize=(3.6 + 3.2 * len(panels), 3.2), layout="constrained",
                                width_ratios=widths)  # fmt: skip
    rows, groups = [], []
    for (title, values), axis in zip(panels.items(), axes, strict=False):
        rows += [(title, unit, entry + 1, float(value)) for (unit, entry), value in np.ndenumerate(values)]
        groups += [values[:, :2].ravel(), values[:, 2:].ravel()]
        image = axis.imshow(values.T, aspect="auto", cmap="viridis", vmin=limits[0], vmax=limits[1])
        axis.set(xlabel="hidden unit", title=title)
        axis.set_yticks(range(5), ["1 (in the sum)", "2 (in the sum)", "3", "4", "5"] if axis is axes[0] else [""] * 5)
    axes[0].set_ylabel("input")
    figure.colorbar(image, ax=axes[-2], label=label)
    axes[-1].boxplot(groups, tick_labels=["in", "not"] * len(panels), widths=0.5)
    axes[-1].set(ylabel=label, title="in the sum or not", ylim=limits)
    if len(panels) == 2:
        axes[-1].set_xlabel("              ".join(panels))
        axes[-1].axhline(0.5, color="0.6", linewidth=0.8)
    frame = polars.DataFrame(rows, ["panel", "unit", "input", "value"], orient="row")
    frame.write_csv(out / f"gate-{name}.csv", float_precision=5)
    figure.savefig(out / f"gate-{name}.svg", metadata={"Date": None})
    figure.savefig(out / f"gate-{name}.png", dpi=80)
    plt.close(figure)


def main() -> None:
    """The figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "perennial"
    for name, kind in GATED.items():
        draw(name, {f"order {order}": freedom(kind, order) for order in (1, 2)}, "1 - gate", (0.27, 0.73), out)
    for name, kind in HELD.items():
        draw(name, {"importance": importance(kind)}, "share of the largest", (0.0, 1.0), out)


if __name__ == "__main__":
    main()
