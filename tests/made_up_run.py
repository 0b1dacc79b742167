"""Run directories of made-up results, for the tests of the report."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

CBP = {"continual_backprop": {"replacement_rate": 1e-4, "maturity_threshold": 100}}
METHODS: dict[str, dict[str, Any]] = {
    "backprop": {"label": "Backprop", "rule": {"name": "sgd", "lr": 0.01}, "interventions": {}},
    "adam": {"label": "Adam", "rule": {"name": "adam", "lr": 0.001}, "interventions": {}},
    "l2": {"label": "L2", "rule": {"name": "sgd", "lr": 0.01, "weight_decay": 1e-4}, "interventions": {}},
    "shrink_and_perturb": {
        "label": "Shrink and perturb",
        "rule": {"name": "sgd", "lr": 0.01},
        "interventions": {"shrink_and_perturb": {"shrink": 0.999}},
    },
    "continual_backprop": {
        "label": "Continual backprop",
        "rule": {"name": "sgd", "lr": 0.01},
        "interventions": CBP,
    },
    "upgd": {"label": "UPGD", "rule": {"name": "upgd", "lr": 0.01}, "interventions": {}},
    "linear": {
        "label": "Linear",
        "rule": {"name": "sgd", "lr": 0.01},
        "interventions": {},
        "network": {"name": "linear"},
    },
}
WORSENING = {"backprop": 0.9, "adam": 1.4, "l2": 0.25, "shrink_and_perturb": 0.1, "continual_backprop": -0.1}
RATE, STEP_SIZE = "interventions.continual_backprop.replacement_rate", "rule.lr"
GRIDS = {
    "continual_backprop": {RATE: [0.0, 1e-5, 1e-4, 1e-3], STEP_SIZE: [0.003, 0.01]},
    "l2": {"rule.weight_decay": [0.0, 1e-5, 1e-4, 1e-3]},
    "upgd": {STEP_SIZE: [0.003, 0.01, 0.03]},
}


def build(
    directory: Path,
    *,
    parts: dict[str, str],
    methods: tuple[str, ...] = ("backprop", "continual_backprop", "linear"),
    grids: dict[str, dict[str, list[float]]] | None = None,
    seeds: int = 4,
    bins: int = 5,
    diverge: dict[tuple[str, str], dict[int, int]] | None = None,
    finished: bool = True,
    figure: dict[str, Any] | None = None,
) -> Path:
    """A run directory of made-up results.

    Args:
        directory: where; made if absent.
        parts: key -> "regression" or "classification".
        methods: keys of METHODS, or others.
        grids: method -> swept numbers.
        seeds: how many.
        bins: of 10,000 examples each.
        diverge: (method, settings) -> {seed: step}.
        finished: else the results lie in segments of jobs, without lanes and timings.
        figure: of the study.
    """
    directory.mkdir(parents=True, exist_ok=True)
    grids, diverge, width = grids or {}, diverge or {}, 10_000
    random = np.random.default_rng(7)
    rows: list[tuple[Any, ...]] = []
    lanes: list[dict[str, Any]] = []
    studied, timings = {}, []
    for part, task in parts.items():
        chosen = {m: METHODS.get(m, {"label": m, "rule": {"name": "sgd"}, "interventions": {m: {}}}) for m in methods}
        studied[part] = {
            "title": f"Made-up {task}, {part}",
            "stream": {"name": f"made_up_{task}", "flip_after": width},
            "network": {"name": "mlp", "hidden": [5], "activation": part},
            "steps": width * bins,
            "bin": width,
            "measure_every": width,
            "seeds": list(range(seeds)),
            "methods": chosen,
        }
        for method in methods:
            names = list(grids.get(method, {}))
            for values in itertools.product(*grids.get(method, {}).values()):
                numbers = dict(zip(names, values, strict=True))
                settings = ", ".join(f"{name}={value}" for name, value in numbers.items())
                penalty = sum(
                    0.2 * abs(np.log10(x + 1e-6) + 4 - 2 * (name == STEP_SIZE)) for name, x in numbers.items()
                )
                for seed in range(seeds):
                    end = diverge.get((method, settings), {}).get(seed)
                    lane = {"part": part, "method": method, "settings": settings, "seed": seed}
                    lanes.append(lane | {"diverged": end, "parameters": 111, "numbers": json.dumps(numbers)})
                    for metric, curve in _curves(method, task, bins, penalty, random).items():
                        for at, value in enumerate(curve, 1):
                            gone = end is not None and at * width > end
                            rows.append((*lane.values(), metric, at * width, None if gone else float(value)))
        timings += [
            {"part": part, "methods": [m], "lanes": seeds, "lane_steps": seeds * bins * width, "compile_seconds": 25.0}
            | {"train_seconds": (1.0 + 0.35 * i) * seeds}
            for i, m in enumerate(methods)
        ]
    study = {
        "name": "made_up",
        "title": "Made-up study of plasticity",
        "source": "Nobody et al. (2024)",
        "description": "What becomes of a network that goes on learning?\n\nNumbers with <angle> & ampersand.",
        "parts": studied,
    } | ({"figure": figure} if figure else {})
    (directory / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    environment = {"command": "perennial run made_up --seeds 4", "perennial": "0.1.0", "python": "3.11.9"}
    environment |= {"torch": "2.13.0", "platform": "Linux", "processor": "a processor"}
    environment |= {"started": "2026-11-23T01:00:00Z"}
    ended = "2026-11-23T01:20:00Z" if finished else None
    (directory / "environment.json").write_text(json.dumps(environment | {"finished": ended}))
    schema = ["part", "method", "settings", "seed", "metric", "step", "value"]
    frame = pl.DataFrame(rows, schema=schema, orient="row", infer_schema_length=None)
    if finished:
        frame.write_parquet(directory / "results.parquet")
        pl.DataFrame(lanes, infer_schema_length=None).write_parquet(directory / "lanes.parquet")
        (directory / "timings.json").write_text(json.dumps(timings))
    else:
        for job, ((method,), block) in enumerate(sorted(frame.group_by("method"))):
            folder = directory / "jobs" / f"{job}"
            folder.mkdir(parents=True)
            # The jobs have come differently far, and the last has not begun.
            for segment in range(bins - 1 - job):
                at = (segment + 1) * width
                block.filter(pl.col("step") == at).write_parquet(folder / f"segment-{segment:06d}.parquet")
            assert method
    return directory


def _curves(
    method: str, task: str, bins: int, penalty: float, random: np.random.Generator
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    time = np.arange(1, bins + 1) / bins
    lane, noise = random.normal(0, 0.06), random.normal(0, 0.04, bins)
    worse = WORSENING.get(method, 0.3) * time**0.7 + penalty + lane + noise + 0.5 * np.exp(-12 * time)
    made = {"online_loss": 1.2 + worse if method != "linear" else 2.6 + noise}
    if task == "classification":
        made["online_accuracy"] = 0.95 - 0.12 * (made["online_loss"] - 1.2)
    if method != "linear":
        falling = WORSENING.get(method, 0.3) * time
        made["dead_units"] = np.clip(0.03 + 0.3 * falling + 0.02 * random.normal(size=bins), 0, 1)
        made["weight_magnitude"] = 0.1 + 0.1 * time + 0.003 * random.normal(size=bins)
        made["effective_rank_entropy"] = 4.5 - falling + 0.1 * random.normal(size=bins)
    if method == "continual_backprop":
        made["units_replaced"] = 3 * time
    return made


FIGURE: dict[str, Any] = {
    "title": "As in nobody's Figure 1",
    "axis": "tasks",
    "panels": [
        {"metric": "online_loss"},
        {"title": "Step sizes", "methods": ["upgd", "linear"], "lines": "settings"},
        {"metric": "dead_units", "part": "digits", "methods": ["backprop", "l2"]},
        {"metric": "weight_magnitude", "methods": ["backprop"], "lines": "parts"},
        {"metric": "units_replaced", "part": "digits"},
    ],
}

SHOWCASE_DIVERGED = {
    ("upgd", "rule.lr=0.03"): {seed: 90_000 + 1000 * seed for seed in range(12)},
    ("adam", ""): {1: 240_000, 5: 310_000},
}


def showcase(directory: Path) -> Path:
    """Everything at once, at a realistic size."""
    return build(
        directory,
        parts={"relu": "regression", "digits": "classification"},
        methods=tuple(METHODS),
        grids=GRIDS,
        seeds=12,
        bins=60,
        diverge=SHOWCASE_DIVERGED,
        figure=FIGURE,
    )
