"""The report of arriving classes, from results made by hand, and a run from its study to its page."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from perennial.cli_report import summary_table, write_report
from perennial.incremental import ArrivingClasses, ImageRecipe
from perennial.report import NoResultsError
from perennial.report.incremental_page import arriving_summary, write_arriving_report
from perennial.report.incremental_tables import tabulate_arriving
from perennial.runs import execute
from perennial.studies import load

SETTING = ArrivingClasses(
    methods={
        "backprop": ImageRecipe(label="Backprop"),
        "wild": ImageRecipe(label="Wild & free"),
        "scratch": ImageRecipe(label="Anew", reset="all"),
    },
    increments=2,
    per_increment=3,
    width=2,
    seeds=(0, 1),
)
ABOUT = {"title": "A <title>", "description": "One.\n\nTwo.", "source": "Somewhere", "command": "perennial run x"}


def _record(accuracy: float, *, last: bool = False, replaced: int = 0) -> dict[str, Any]:
    found = {"test_accuracy": accuracy, "training_loss": 1 - accuracy, "replaced": replaced}
    units = {"dormant": accuracy / 10, "rank_99": 8.0, "effective_rank": 3.0, "weight_magnitude": 0.1}
    return found if last else found | units


def _write(folder: Path, accuracies: dict[str, list[list[float]]], finished: bool = True) -> None:
    for method, seeds in accuracies.items():
        for seed, values in enumerate(seeds):
            rows = [_record(v, last=at == 1, replaced=at) for at, v in enumerate(values)]
            diverged = None if len(values) == 2 else len(values)
            path = folder / f"{method}-{seed}" / "results.json"
            path.parent.mkdir(parents=True)
            told = {"increments": rows, "diverged": diverged, "seconds": [2.0] * len(rows), "finished": finished}
            path.write_text(json.dumps(told))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    _write(
        tmp_path,
        {"backprop": [[0.5, 0.4], [0.7, 0.2]], "wild": [[0.6], [0.8, 0.9]], "scratch": [[0.4, 0.5], [0.5, 0.6]]},
    )
    return tmp_path


def test_tables_pair_seeds_and_leave_out_what_was_not_taken(run: Path) -> None:
    tables = tabulate_arriving(SETTING, run)
    rows = {r["method"]: r for r in tables.methods.iter_rows(named=True)}
    assert list(rows) == ["backprop", "wild", "scratch"]
    assert tables.finished == 6
    plain = rows["backprop"]
    assert plain["test_accuracy"] == pytest.approx(0.3)
    assert (plain["test_accuracy_low"], plain["test_accuracy_high"]) == pytest.approx((0.2, 0.4))
    assert plain["average"] == pytest.approx((0.45 + 0.45) / 2)
    assert plain["against_retrained"] == pytest.approx((-0.1 - 0.4) / 2)
    assert plain["dormant"] == pytest.approx(0.06)  # at the first increment, the last that has it
    assert plain["rank_99"] == 0.5  # 8 of 16 features
    assert plain["replaced"] == 1
    assert plain["seconds"] == pytest.approx(4.0 / (200 * (15 + 30)))
    assert rows["scratch"]["against_retrained"] is None
    assert rows["wild"]["diverged"] == 1
    assert rows["wild"]["test_accuracy"] == pytest.approx(0.9)
    assert rows["wild"]["against_retrained"] == pytest.approx(0.3)
    points = tables.increments.filter(pl.col("method") == "backprop")
    assert points["classes"].to_list() == [3, 6]
    assert points["against_retrained"].to_list() == pytest.approx([0.15, -0.25])
    assert points["dormant"].to_list() == [pytest.approx(0.06), None]


def test_the_page_stands_alone_and_is_the_same_each_time(run: Path) -> None:
    page = write_arriving_report(SETTING, run, **ABOUT, study_text="name: x\n")
    text = page.read_text()
    assert "A &lt;title&gt;" in text
    assert "Wild &amp; free: the loss of 1 of 2 runs stopped being finite." in text
    assert "-25" in text.replace("\N{MINUS SIGN}", "-")
    assert "unfinished" not in text
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text)
    for name in ("accuracy", "difference", "units"):
        drawing = (run / "figures" / f"{name}.svg").read_text()
        assert drawing.split("\n", 1)[1][:100] in text
        assert "Backprop" in drawing
    table = pl.read_csv(run / "tables" / "increments.csv")
    assert table.height == 6
    before = page.read_bytes()
    assert write_arriving_report(SETTING, run, **ABOUT, study_text="name: x\n").read_bytes() == before


def test_a_run_under_way_is_reported_as_far_as_it_has_come(tmp_path: Path) -> None:
    with pytest.raises(NoResultsError, match="no finished run yet"):
        tabulate_arriving(SETTING, tmp_path)
    _write(tmp_path, {"backprop": [[0.5, 0.4]]})
    _write(tmp_path, {"scratch": [[0.5, 0.4]]}, finished=False)
    text = write_arriving_report(SETTING, tmp_path, **ABOUT).read_text()
    assert "1 of 6 have finished" in text
    assert "difference" not in {path.stem for path in (tmp_path / "figures").iterdir()}
    assert arriving_summary(SETTING, tmp_path)["Method"].to_list() == ["Backprop"]


@pytest.mark.slow
def test_a_study_runs_to_its_page_and_again_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    for part, each in (("train", 8), ("test", 4)):
        rows = []
        for number in range(5 * each):
            pixels = np.random.default_rng(number).integers(0, 60, (32, 32, 3)) + 40 * (number % 5)
            file = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
            rows.append({"image": {"bytes": file.getvalue(), "path": f"{number}.png"}, "label": number % 5})
        folder = tmp_path / "data" / "tiny-imagenet-32"
        folder.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(rows).write_parquet(folder / f"{part}.parquet")
    monkeypatch.setenv("PERENNIAL_DATA", str(tmp_path / "data"))
    changes: dict[str, Any] = {
        "data": "tiny-imagenet-32", "increments": 2, "per_increment": 2, "train": 5, "validation": 2, "test": 4,
        "width": 2, "side": 8, "diagnosed": 4, "seeds": 1, "steps": 2,
    }  # fmt: skip
    study = load("nature/incremental-cifar100-small", changes)
    execute(study, tmp_path / "run", workers=2, device="cpu")
    page = write_report(tmp_path / "run")
    assert summary_table(tmp_path / "run").height == 5
    assert "unfinished" not in page.read_text()
    results = tmp_path / "run" / "continual_backprop-0" / "results.json"
    before = results.stat().st_mtime_ns
    execute(study, tmp_path / "run", workers=2, device="cpu")
    assert results.stat().st_mtime_ns == before
