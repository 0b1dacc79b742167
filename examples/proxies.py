"""How well do the signs of lost plasticity predict the thing itself?

    python examples/proxies.py --out FOLDER [--seeds 5] [--workers 2]

Networks of two hidden layers of 100 ReLUs live through tasks on handwritten digits whose pixels are permuted anew every
200 batches, under six ways of training. Six times in each life every metric is taken on the digits as they are, and the
weights are put to the direct test: random labels, against fresh weights. Written are every point, the rank correlation
(Spearman) of each metric with the gap in trainability, with a 95% bootstrap interval over lives, and a figure.

Interrupted, the same command goes on with the lives that are missing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import polars
import torch
from rich.console import Console
from rich.progress import track
from scipy.stats import rankdata
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

import perennial
from perennial import metrics
from perennial.metrics import METRICS
from perennial.trainability import trainability

TASK_STEPS = 200
LOOKS = (0, 400, 1000, 2000, 4000, 8000)
BATCH = 32
RESAMPLES = 2000

Attach = Callable[[nn.Module, torch.optim.Optimizer, torch.Tensor], object]

LIVES: dict[str, tuple[float, Attach]] = {
    "Adam, 0.001": (0.001, lambda *_: None),
    "Adam, 0.003": (0.003, lambda *_: None),
    "Adam, 0.01": (0.01, lambda *_: None),
    "Adam, 0.003, continual backprop": (
        0.003,
        lambda m, o, x: perennial.attach(
            perennial.ContinualBackprop(replacement_rate=1e-3, maturity_threshold=100), m, o, example=x
        ),
    ),
    "Adam, 0.003, L2 towards the start": (
        0.003,
        lambda m, o, x: perennial.attach(perennial.L2Init(rate=1e-2, coupled=False), m, o, example=x),
    ),
    "Adam, 0.003, shrink and perturb": (
        0.003,
        lambda m, o, x: perennial.attach(perennial.ShrinkAndPerturb(shrink=1e-4, noise_std=1e-3), m, o, example=x),
    ),
}
"""How networks are trained: step size, and what is attached."""

READ = [n for n, m in METRICS.items() if m.of in ("units", "features", "weights", "change", "gradients")]
SKIPPED = ("saturated_units", "dormant_units_of_sum")  # not of rectifiers; a rescaled threshold


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    found = load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


def curvature(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Metrics that differentiate the loss on a fresh permutation of the pixels, which is a new task."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def forward(p: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(model, p, (x,))

    return {
        "sharpness": float(metrics.sharpness(lambda p: nn.functional.cross_entropy(forward(p), y), params)),
        "ntk_effective_rank": float(metrics.ntk_effective_rank(lambda p: forward(p)[:64], params)),
    }


def life(name: str, seed: int) -> list[dict[str, object]]:
    """The points of one network."""
    torch.set_num_threads(1)
    images, labels = digits()
    torch.manual_seed(seed)
    model = network()
    lr, attach = LIVES[name]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    attach(model, optimizer, images[:256])
    taken = [n for n in READ if n not in SKIPPED]
    monitor = perennial.Monitor(model, images[:500], metrics=taken)
    fresh = torch.randperm(64, generator=torch.Generator().manual_seed(1000 + seed))
    rows: list[dict[str, object]] = []
    for step in range(LOOKS[-1] + 1):
        if step % TASK_STEPS == 0:
            pixels = torch.randperm(64)
        if step in LOOKS:
            new = images[:500][:, fresh]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(new), labels[:500]).backward()
            values = dict(monitor.read().network) | curvature(model, new, labels[:500])
            test = trainability(model, images[:500], seeds=4, steps=300, progress=False, factory=network)
            row = {"life": name, "seed": seed, "step": step, "gap": test.gap.mean}
            rows.append(row | {n: values.get(n, math.nan) for n in (*taken, "sharpness", "ntk_effective_rank")})
        chosen = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen][:, pixels]), labels[chosen]).backward()
        optimizer.step()
    return rows


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    kept = np.isfinite(x) & np.isfinite(y)
    if kept.sum() < 3 or np.ptp(x[kept]) == 0:
        return math.nan
    return float(np.corrcoef(rankdata(x[kept]), rankdata(y[kept]))[0, 1])


def correlations(points: polars.DataFrame) -> polars.DataFrame:
    """Of every metric with the gap, over all points with an interval that resamples whole lives."""
    lives = points.select("life", "seed").unique(maintain_order=True).rows()
    parts = [points.filter((polars.col("life") == n) & (polars.col("seed") == s)) for n, s in lives]
    names = [n for n in points.columns if n not in ("life", "seed", "step", "gap")]
    tables = [part.select("gap", *names).to_numpy() for part in parts]
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(tables), len(tables)) for _ in range(RESAMPLES)]
    rows = []
    everything = np.concatenate(tables)
    for at, name in enumerate(names, start=1):
        found = [spearman(*np.concatenate([tables[i][:, [at, 0]] for i in draw]).T) for draw in draws]
        low, high = np.nanquantile(found, [0.025, 0.975])
        rows.append((name, METRICS[name].title, spearman(everything[:, at], everything[:, 0]), low, high))
    frame = polars.DataFrame(rows, ["metric", "title", "spearman", "low", "high"], orient="row")
    return frame.sort(polars.col("spearman").abs(), descending=True)


def draw(points: polars.DataFrame, found: polars.DataFrame, out: Path) -> None:
    """The lives' gaps over time, and the correlations with their intervals."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.8), layout="constrained", width_ratios=(1, 1.15))
    for name in LIVES:
        part = points.filter(polars.col("life") == name).group_by("step", maintain_order=True).agg(
            polars.col("gap").mean()
        )  # fmt: skip
        left.plot(part["step"], 100 * part["gap"], marker="o", markersize=3, label=name)
    left.axhline(0, color="0.6", linewidth=0.8)
    left.set(xlabel="steps of life", ylabel="trainability gap, %: loss on the way, aged over fresh")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False, fontsize=8)
    rows = found.reverse()
    at = np.arange(len(rows))
    centre, low, high = (rows[name].to_numpy() for name in ("spearman", "low", "high"))
    right.errorbar(centre, at, xerr=[centre - low, high - centre], fmt="o", color="#1f1f1f", capsize=2, markersize=4)
    right.axvline(0, color="0.6", linewidth=0.8)
    right.set_yticks(at, rows["title"].to_list(), fontsize=8)
    right.set(xlabel="Spearman correlation with the gap, 95% interval over lives", xlim=(-1, 1))
    figure.savefig(out / "proxies.svg", metadata={"Date": None})
    figure.savefig(out / "proxies.png", dpi=80)


def main() -> None:
    """The lives, the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    parts = options.out / "lives"
    parts.mkdir(parents=True, exist_ok=True)
    jobs = {(n, s): parts / f"{list(LIVES).index(n)}-{s}.csv" for s in range(options.seeds) for n in LIVES}
    missing = [job for job, path in jobs.items() if not path.exists()]
    with ProcessPoolExecutor(options.workers) as pool:
        running = {pool.submit(life, *job): job for job in missing}
        done = as_completed(running)
        for future in track(done, "lives", total=len(missing), console=Console(stderr=True)):
            polars.DataFrame(future.result()).write_csv(jobs[running[future]])
    points = polars.concat([polars.read_csv(path) for path in jobs.values()])
    points.write_csv(options.out / "proxies-points.csv", float_precision=6)
    found = correlations(points)
    found.write_csv(options.out / "proxies.csv", float_precision=4)
    plt.rcParams["svg.hashsalt"] = "perennial"
    draw(points, found, options.out)
    print(found)


if __name__ == "__main__":
    main()
