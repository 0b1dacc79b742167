"""The report of a study of control, on made-up results and on a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from perennial.cli import app
from perennial.cli_report import write_report
from perennial.report.control_page import control_summary
from perennial.report.control_tables import BINS, tabulate_control
from perennial.report.load import RESULTS, NoResultsError
from perennial.rl import Control, friction_of
from perennial.studies import ControlStudy, as_yaml, load

LEVELS = {"standard": 100.0, "tuned": 200.0, "l2": 300.0, "continual_backprop": 500.0}


def made_up(directory: Path, *, until: int = 300_000, diverged: int = -1) -> Control:
    """The small study, longer: each method has its level, and seed s of it 10 s more; episodes of 1,000 steps."""
    study = load("nature/slippery-ant-small", {"steps": 300_000, "seeds": 3, "ground.period": 50_000})
    assert isinstance(study, ControlStudy)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "study.yaml").write_text(as_yaml(study))
    (directory / "environment.json").write_text(json.dumps({"command": "perennial run nature/slippery-ant-small"}))
    for job in study.control.jobs():
        end = diverged if (job.method, job.seed) == ("standard", 1) and diverged >= 0 else until
        own = {"part": "control", "method": job.method, "settings": "", "seed": job.seed}
        rows: list[dict[str, Any]] = []
        for step in range(1000, end + 1, 1000):
            value = LEVELS[job.method] + 10 * job.seed + 50 * math.sin(step / 20_000)
            rows.append(own | {"metric": "return", "step": step, "value": value})
        for step in range(10_240, end + 1, 10_240):
            for net in ("policy", "value"):
                drawn = {"rarely_active_units": step / 1e6, "rank_99": 240 - step / 5e3, "weight_magnitude": 0.06}
                rows += [own | {"metric": f"{net}.{n}", "step": step, "value": v} for n, v in drawn.items()]
        for number, step in enumerate(range(0, end, 50_000)):
            value = friction_of(job.seed, number)
            rows.append(own | {"metric": "friction", "step": step, "value": value})
        folder = directory / "jobs" / job.name
        folder.mkdir(parents=True)
        pl.DataFrame(rows, schema=RESULTS).write_parquet(folder / "segment-1.parquet")
        finished = until == 300_000
        manifest = {
            "step": end,
            "finished": finished,
            "train_seconds": end / 500,
            "diverged": [end if end < until else -1],
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return study.control


def test_tables_are_means_over_seeds_of_means_over_episodes(tmp_path: Path) -> None:
    control = made_up(tmp_path)
    tables = tabulate_control(control, tmp_path)
    assert tables.methods["method"].to_list() == list(LEVELS)
    assert tables.finished == 12
    wave = np.array([50 * math.sin(step / 20_000) for step in range(1000, 300_001, 1000)])
    for row in tables.methods.iter_rows(named=True):
        level = LEVELS[row["method"]] + 10
        assert row["whole"] == pytest.approx(level + wave.mean())
        assert row["late"] == pytest.approx(level + wave[-30:].mean())
        assert row["best"] == pytest.approx(level + wave.reshape(BINS, 5).mean(1).max())
        assert row["whole_high"] - row["whole"] == pytest.approx(10, abs=1)
        assert (row["against"], row["against_low"]) == pytest.approx((LEVELS[row["method"]] - 100,) * 2)
        assert row["policy.rank_99"] == pytest.approx(240 - 296_960 / 5e3)
        assert row["speed"] == pytest.approx(500)
    curve = tables.curves.filter((pl.col("metric") == "return") & (pl.col("method") == "l2"))
    assert curve["step"].to_list() == list(range(5000, 300_001, 5000))
    assert curve["mean"].to_numpy() == pytest.approx(310 + wave.reshape(BINS, 5).mean(1))
    assert tables.changes == [50_000, 100_000, 150_000, 200_000, 250_000]
    mine = tables.frictions.filter(pl.col("seed") == 2)
    assert mine["friction"].to_list() == [friction_of(2, number) for number in range(6)]


def test_page_stands_alone_and_says_what_it_must(tmp_path: Path) -> None:
    made_up(tmp_path)
    text = write_report(tmp_path).read_text()
    for piece in ("Continual backprop and L2", "friction 0.02 to 2, changed every 50,000 steps",
                  "Friction of the ground", "Return of an episode (higher is better)", "environment steps",
                  "perennial run nature/slippery-ant-small", "256 x 256 units", "paper calls dormant"):  # fmt: skip
        assert piece in text, piece
    assert "examples seen" not in text
    assert "unfinished" not in text
    for outside in ("<script", "src=", 'href="http'):
        assert outside not in text
    figures = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"return", "friction", "policy-rank-99", "value-rarely-active-units"} <= figures
    assert (tmp_path / "figures" / "return.svg").read_text().count("stroke-dasharray: 1.6,2.4") == 5, "changes"
    assert pl.read_csv(tmp_path / "tables" / "methods.csv").height == 4
    before = (tmp_path / "report.html").read_bytes()
    assert write_report(tmp_path).read_bytes() == before


def test_unfinished_and_diverged_runs_are_reported_as_far_as_they_have_come(tmp_path: Path) -> None:
    control = made_up(tmp_path, until=150_000, diverged=60_000)
    tables = tabulate_control(control, tmp_path)
    assert tables.finished == 0
    returns = tables.curves.filter((pl.col("metric") == "return") & (pl.col("method") == "standard"))
    assert returns["step"].max() == 150_000
    assert dict(returns.select("step", "lanes").iter_rows())[60_000] == 3
    assert dict(returns.select("step", "lanes").iter_rows())[65_000] == 2
    assert "This run is unfinished" in write_report(tmp_path).read_text()
    assert control_summary(control, tmp_path)["Method"].len() == 4


def test_nothing_to_report(tmp_path: Path) -> None:
    study = load("nature/slippery-ant-small")
    assert isinstance(study, ControlStudy)
    with pytest.raises(NoResultsError, match="has no results yet"):
        tabulate_control(study.control, tmp_path)


@pytest.mark.slow
def test_command_line_runs_and_reports(tmp_path: Path) -> None:
    settings = ["steps=128", "ppo.rollout=64", "ppo.minibatch=32", "ppo.hidden=[12,8]", "ppo.epochs=1",
                "measure_every=64", "episode_steps=30", "ground.period=40"]  # fmt: skip
    command = ["run", "nature/slippery-ant-small", "--out", str(tmp_path / "run"), "--workers", "1", "--seeds", "1"]
    command += [part for one in settings for part in ("--set", one)]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    results = pl.read_parquet(tmp_path / "run" / "results.parquet")
    assert set(results["method"]) == set(LEVELS)
    assert {"return", "friction", "policy.rank_99", "value.dead_units"} <= set(results["metric"])
    frictions = results.filter((pl.col("metric") == "friction") & (pl.col("method") == "l2")).sort("step")
    assert frictions["value"].to_list() == [friction_of(0, number) for number in range(len(frictions))]
    assert len(frictions) >= 2
    assert (tmp_path / "run" / "report.html").is_file()
    assert "Continual backprop" in found.output
