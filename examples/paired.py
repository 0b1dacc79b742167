"""The difference between two settings of finished runs, paired over seeds, with its bootstrap interval.

    python examples/paired.py RUN METHOD SETTINGS OTHER_RUN METHOD SETTINGS

SETTINGS are words that the settings of one lane contain, as the CSV files of a report write them, with commas between;
an empty word takes a method of one setting. What is compared is the metric's mean over the whole run, the first less
the second.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import polars as pl

from perennial.statistics import estimate


def averages(run: Path, part: str, method: str, settings: str, metric: str) -> pl.DataFrame:
    """The mean of a metric over the bins of a run, by seed in ascending order."""
    rows = pl.read_parquet(run / "results.parquet").filter(method=method, metric=metric)
    rows = rows.filter(part=part) if part else rows
    words = [word.strip() for word in settings.split(",") if word.strip()]
    found = rows
    for word in words:
        found = found.filter(pl.col("settings").str.contains(word, literal=True))
    kinds = found.get_column("settings").unique().to_list()
    parts = found.get_column("part").unique().to_list()
    if len(kinds) * len(parts) != 1:
        raise SystemExit(f"{run}: {settings!r} stands for {len(kinds)} settings in {len(parts)} parts; name one")
    return found.group_by("seed").agg(pl.col("value").mean()).sort("seed")


def main() -> None:
    """Print the difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for side in ("first", "second"):
        parser.add_argument(f"{side}_run", type=Path)
        parser.add_argument(f"{side}_method")
        parser.add_argument(f"{side}_settings")
    parser.add_argument("--metric", default="online_loss")
    parser.add_argument("--part", default="", help="of a study of several parts")
    asked = parser.parse_args()
    first = averages(asked.first_run, asked.part, asked.first_method, asked.first_settings, asked.metric)
    second = averages(asked.second_run, asked.part, asked.second_method, asked.second_settings, asked.metric)
    both = first.join(second, on="seed", how="full", suffix="_of_second")
    if both.null_count().sum_horizontal()[0]:
        raise SystemExit(f"the seeds differ: {first['seed'].to_list()} and {second['seed'].to_list()}")
    made = estimate((both["value"] - both["value_of_second"]).to_numpy()[:, None])
    print(f"{made.mean[0]:.3f} [{made.low[0]:.3f}, {made.high[0]:.3f}], {both.height} seeds")


if __name__ == "__main__":
    main()
