"""Five new classes of CIFAR-100 at a time, with continual backpropagation attached and without.

A convolutional network sees the first five classes, then ten, up to a hundred; nothing is reset in between. Written is
what becomes of its units: the share that is dormant (active on fewer than 1% of held-out images), and the accuracy on
the classes seen so far.

    python examples/arriving_classes.py --data FOLDER --out FOLDER

FOLDER of ``--data`` holds CIFAR-100 as the hub lays it out: parquet files with the columns ``img`` (bytes) and
``fine_label``, ``train`` and ``test`` in their names. A run that is stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import polars
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import perennial

METHODS = {
    "backprop": None,
    "continual backprop": perennial.ContinualBackprop(replacement_rate=1e-4, maturity_threshold=100),
}


def read(folder: Path, split: str, per_class: int) -> tuple[Tensor, Tensor]:
    """Images [n, 3, 32, 32] in [-1, 1], sorted by class with ``per_class`` of each, and their classes."""
    files = sorted(folder.glob(f"**/*{split}*.parquet"))
    if not files:
        raise SystemExit(f"no parquet file with {split!r} in its name under {folder}")
    frame = polars.concat([polars.read_parquet(file, columns=["img", "fine_label"]) for file in files])
    frame = frame.sort("fine_label", maintain_order=True).group_by("fine_label", maintain_order=True).head(per_class)
    pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in frame["img"]]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.tensor(frame["fine_label"].to_list())


def network() -> nn.Module:
    """The convolutional network of the papers' Continual ImageNet, for a hundred classes."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 100),
    )  # fmt: skip


@torch.no_grad()
def dormant(model: nn.Module, x: Tensor) -> float:
    """Share of hidden units that are active on fewer than 1% of the images, at any of their positions."""
    active = []
    for module in model:
        x = module(x)
        if isinstance(module, nn.ReLU):
            active.append((x.flatten(2).amax(2) if x.dim() > 2 else x).gt(0).float().mean(0))
    return float((torch.cat(active) < 0.01).float().mean())


def run(
    method: perennial.methods.Intervention | None,
    seed: int,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    epochs: int,
    lr: float,
    label: str,
) -> list[dict[str, float]]:
    """One network from the first five classes to all hundred."""
    torch.manual_seed(seed)
    order = torch.randperm(100)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    if method is not None:
        keeper = perennial.attach(method, model, optimizer, example=train[0][:4], factory=network, seed=seed)
    rows = []
    for seen in track(range(5, 101, 5), label, console=Console(stderr=True)):
        mine = torch.isin(train[1], order[:seen]).nonzero()[:, 0]
        for _ in range(epochs):
            for batch in mine[torch.randperm(len(mine))].split(50):
                x, y = train[0][batch], train[1][batch]
                optimizer.zero_grad()
                logits = model(x)
                logits = logits.masked_fill(~torch.isin(torch.arange(100), order[:seen]), -1e9)
                nn.functional.cross_entropy(logits, y).backward()
                optimizer.step()
        shown = torch.isin(test[1], order[:seen]).nonzero()[:, 0]
        with torch.no_grad():
            logits = model(test[0][shown])[:, order[:seen]]
        accuracy = float((order[:seen][logits.argmax(1)] == test[1][shown]).float().mean())
        replaced = sum(keeper.replaced().values()) if method is not None else 0
        rows.append(
            {"classes": seen, "dormant": dormant(model, test[0][::4]), "accuracy": accuracy, "replaced": replaced}
        )
    return rows


def draw(table: polars.DataFrame, path: Path) -> None:
    """Both measures against the number of classes: the mean over seeds, every seed a thin line."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "perennial"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, measure, name in zip(
        axes, ("dormant", "accuracy"), ("dormant units", "accuracy, classes so far"), strict=True
    ):
        for (label,), mine in table.group_by("method", maintain_order=True):
            mean = mine.group_by("classes", maintain_order=True).agg(polars.col(measure).mean())
            (line,) = axis.plot(mean["classes"], 100 * mean[measure], label=label)
            for _, one in mine.group_by("seed"):
                axis.plot(one["classes"], 100 * one[measure], color=line.get_color(), alpha=0.25, linewidth=0.8)
        axis.set(xlabel="classes", ylabel=f"{name} (%)", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data with every five classes")
    parser.add_argument("--per-class", type=int, default=100, help="training images of each class")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    train, test = read(options.data, "train", options.per_class), read(options.data, "test", 40)
    tables = []
    for seed in range(options.seeds):
        for label, method in METHODS.items():
            file = options.out / f"{label.replace(' ', '-')}-{seed}.csv"
            if not file.exists():
                rows = run(method, seed, train, test, options.epochs, options.lr, f"{label}, seed {seed}")
                polars.DataFrame(rows).with_columns(method=polars.lit(label), seed=seed).write_csv(file)
            tables.append(polars.read_csv(file))
    table = polars.concat(tables)
    table.write_csv(options.out / "arriving-classes.csv", float_precision=4)
    draw(table, options.out / "arriving-classes.svg")
    last = table.filter(polars.col("classes") == 100)
    Console().print(last.group_by("method", maintain_order=True).agg(polars.col("dormant", "accuracy").mean()))


if __name__ == "__main__":
    main()
