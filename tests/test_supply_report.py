"""The page of a study of tickets along a stream: whole, alone, the same each time, true to its results."""

from __future__ import annotations

import base64
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from perennial.report import NoResultsError
from perennial.report.supply_correlations import correlations, spearman
from perennial.report.supply_page import supply_drawings, supply_summary, write_supply_report
from perennial.report.supply_tables import CORRELATED, tabulate_supply
from perennial.report.supply_words import coefficient, findings
from perennial.runs.supply import FRESH, Look, lives_of, looks_of
from perennial.storage import write_json
from perennial.studies import SupplyStudy

STUDY = SupplyStudy.model_validate(
    {
        "name": "made-up",
        "title": "Supply <of> tickets",
        "description": "One & two.\n\nThree.",
        "life": {
            "stream": {"name": "permuted_mnist", "task_steps": 100},
            "network": {"name": "mlp", "hidden": [4, 4]},
            "steps": 2000,
            "bin": 100,
            "seeds": 3,
            "methods": {
                "backprop": {"label": "Adam", "rule": {"name": "adam"}},
                "l2": {"rule": {"name": "adam", "weight_decay": 1e-4}},
            },
        },
        "supply": {
            "checkpoints": [0, 100, 400, 2000],
            "training": {"iterations": 100, "batch_size": 10, "optimizer": "adam", "lr": 0.001, "validation": 20},
            "rounds": 2,
            "pruning": {"rates": {"*": 0.5}},
            "examples": 60,
        },
    }
)
TEXTS = {"command": "perennial run made-up", "study_text": "title: Supply\n"}


def _measured(look: Look) -> dict[str, Any]:
    """Under backprop rank and tickets fall and tickets become more alike; under l2 nothing has a direction."""
    at = STUDY.supply.checkpoints.index(look.step)
    age = at if look.method == "backprop" else 0
    swing = 0.001 * (-1) ** (at + look.seed) if look.method == "l2" else 0.0
    accuracy = 0.95 + 0.001 * look.seed - 0.01 * age + swing
    best = accuracy + 0.005
    return {
        "accuracy": accuracy,
        "speed": accuracy - 0.1,
        "effective_rank": 40.0 + look.seed - 5 * age + 1000 * swing,
        "dead_units": 0.02 * age,
        "percent": [100.0, 50.0, 25.0],
        "ticket": [accuracy, best, best - 0.01],
        "control": [best - 0.02 + 0.002 * age, best - 0.05 + 0.002 * age],
        "overlap": [0.2 + 0.1 * age + swing, 0.4 + 0.1 * age + swing],
        "overlap_deep": [0.1 + swing, 0.2 + swing],
        "best_ticket": best,
        "advantage": (0.02 + 0.04) / 2 - 0.002 * age,
    }


def _build(directory: Path, looks: list[Look], bins: int) -> Path:
    for look in looks:
        write_json(look.path(directory), dict(look._asdict()) | _measured(look))
    for life in lives_of(STUDY) if bins else []:
        online = [0.8 - 0.01 * at + 0.01 * life.seed for at in range(bins)]
        write_json(directory / "lives" / f"{life.method}-{life.seed}" / "online.json", online)
    return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = _build(tmp_path_factory.mktemp("supply"), looks_of(STUDY), 20)
    write_supply_report(STUDY, directory, **TEXTS)
    return directory


def test_page_stands_alone_and_its_references_are_found(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    for value in re.findall(r'\b(?:src|href|xlink:href)="([^"]*)"', text):
        assert value.startswith(("#", "data:")), value
    assert not re.search(r"<(script|img|iframe|object)|@import|url\(http", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    used |= {name for names in re.findall(r'aria-labelledby="([^"]+)"', text) for name in names.split()}
    assert used
    assert used <= set(ids)
    assert "Supply &lt;of&gt; tickets" in text
    assert "perennial run made-up" in text
    assert "unfinished" not in text
    files = list((finished / "tables").glob("*.csv"))
    assert len(files) == 5
    for file in files:
        assert base64.b64encode(file.read_bytes()).decode() in text


def test_figures_are_xml_and_on_the_page(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    for name in ("supply-over-life", "supply-tickets"):
        svg = (finished / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        ET.fromstring(svg)
        assert svg.strip() in text


def test_the_same_results_give_the_same_bytes(finished: Path) -> None:
    def every() -> dict[str, bytes]:
        files = [finished / "report.html", *(finished / "figures").iterdir(), *(finished / "tables").iterdir()]
        return {file.name: file.read_bytes() for file in files}

    before = every()
    write_supply_report(STUDY, finished, **TEXTS)
    assert every() == before


def test_means_and_changes_are_those_by_hand(finished: Path) -> None:
    tables = tabulate_supply(STUDY, finished)
    found = {
        (row["quantity"], row["method"], row["step"]): row["mean"] for row in tables.over_life.iter_rows(named=True)
    }
    assert found["effective_rank", "backprop", 2000] == pytest.approx(41 - 15)  # seeds: 40, 41, 42
    assert found["effective_rank", "backprop", 0] == found["effective_rank", FRESH, 0] == pytest.approx(41)
    assert found["overlap", "backprop", 400] == pytest.approx(0.5)  # mean of two levels
    assert found["best_ticket_gap", "backprop", 400] == pytest.approx(-0.02)
    assert found["accuracy_gap", "backprop", 0] == 0
    assert found["online_accuracy", "l2", 200] == pytest.approx(0.8)  # 0.79, 0.80, 0.81
    assert ("online_accuracy", FRESH, 200) not in found
    levels = {(r["method"], r["step"], r["of"], r["percent"]): r["mean"] for r in tables.levels.iter_rows(named=True)}
    assert levels["backprop", 2000, "control", 25.0] == pytest.approx(0.951 - 0.03 + 0.005 - 0.05 + 0.006)
    assert ("backprop", 2000, "control", 100.0) not in levels
    changes = {(r["quantity"], r["method"], r["since"]): r for r in tables.changes.iter_rows(named=True)}
    change = changes["advantage", "backprop", 100]
    assert [change[name] for name in ("mean", "low", "high")] == pytest.approx([-0.004] * 3)
    assert changes["advantage", "backprop", 0]["mean"] == pytest.approx(-0.006)
    summary = supply_summary(STUDY, finished)
    assert summary.get_column("Examples").to_list() == ["0", *["100"] * 3, *["2k"] * 3]
    assert summary.row(4, named=True)["Effective rank"].startswith("26")


def test_spearman_is_scipys() -> None:
    table = np.random.default_rng(0).integers(0, 6, (12, 4)).astype(float)  # with ties
    np.testing.assert_allclose(spearman(table), spearmanr(table).statistic, atol=1e-12)
    table[:, 2] = 1.0
    assert np.isnan(spearman(table)[2]).all()
    assert np.isnan(spearman(table[:2])).all()


def test_correlations_are_pooled_and_within_lives() -> None:
    rng = np.random.default_rng(1)
    points = pl.DataFrame(
        [
            {"method": method, "seed": seed, "step": step, "x": rng.normal() + 3 * (method == "b"), "y": rng.normal()}
            | {"z": 0.0 if (method, seed) == ("a", 1) else float(step)}
            for method in "ab"
            for seed in range(3)
            for step in (0, 10, 20, 30)
        ]
    )
    rows = {
        (r["version"], r["start"], r["first"], r["second"]): r
        for r in correlations(points, ("x", "y", "z")).iter_rows(named=True)
    }
    pooled = rows["pooled", True, "x", "y"]
    assert pooled["spearman"] == pytest.approx(spearmanr(points["x"], points["y"]).statistic)
    assert pooled["low"] < pooled["spearman"] < pooled["high"]
    assert (pooled["points"], pooled["lives"]) == (24, 6)
    lives = [life for _, life in points.group_by("method", "seed", maintain_order=True)]
    each = [spearmanr(life["x"], life["y"]).statistic for life in lives]
    assert rows["within", True, "x", "y"]["spearman"] == pytest.approx(np.mean(each))
    by_seed = [np.mean([each[seed], each[3 + seed]]) for seed in range(3)]
    assert rows["within", True, "x", "y"]["low"] == pytest.approx(min(by_seed))  # 1 draw in 27 takes one seed alone
    assert rows["within", True, "x", "y"]["high"] == pytest.approx(max(by_seed))
    constant = rows["within", True, "x", "z"]
    assert (constant["lives"], constant["constant"], constant["points"]) == (5, 1, 20)
    later = points.filter(pl.col("step") > 0)
    assert rows["pooled", False, "x", "y"]["spearman"] == pytest.approx(spearmanr(later["x"], later["y"]).statistic)


def test_words_name_a_direction_only_where_there_is_one(finished: Path) -> None:
    tables = tabulate_supply(STUDY, finished)
    said = dict(findings(tables))
    ticket = said["Does what the ticket has over its control fall?"]
    assert ticket.startswith("Ticket less control from 100 to 2k examples falls under Adam (")
    assert "shows no change under l2" in ticket
    alike = said["Do the tickets for two tasks become more alike?"]
    assert "The overlap of the tickets from 100 to 2k examples rises under Adam" in alike
    assert re.search(r"without the first layer from 100 to 2k examples shows no change under Adam .*? and l2", alike)
    assert "is higher where the effective rank is higher: over all points (+" in said[
        "Does the best ticket fall with the rank?"
    ]  # fmt: skip
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "left out are: Dead units in 3 lives" in page  # l2's never change
    assert "3 seeds: bootstrap intervals of so few are narrower" in page
    assert [coefficient(x) for x in (0.5, -0.125, -0.001, None)] == ["+0.50", "−0.12", "0.00", "–"]  # noqa: RUF001
    assert set(tables.correlations.get_column("first")) | {"overlap_deep"} == set(CORRELATED)


def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path) -> None:
    with pytest.raises(NoResultsError, match="no measurements"):
        write_supply_report(STUDY, tmp_path)
    _build(tmp_path, [], 2)
    text = write_supply_report(STUDY, tmp_path).read_text(encoding="utf-8")
    assert "0 of 6 lives have\nfinished, and 0 of 30 networks are measured" in text
    assert "there is the online accuracy alone" in text
    assert [drawing.name for drawing in supply_drawings(STUDY, tmp_path)] == ["supply-over-life"]
    gone = Look("l2", 0, 100)
    shutil.rmtree(tmp_path / "lives")
    some = [look for look in looks_of(STUDY) if (look.step, look.seed) < (400, 1)]
    _build(tmp_path, some, 20)
    write_json(gone.path(tmp_path), dict(gone._asdict()) | _measured(gone) | {"accuracy": float("nan")})
    text = write_supply_report(STUDY, tmp_path).read_text(encoding="utf-8")
    assert f"6 of 6 lives have\nfinished, and {len(some)} of 30 networks are measured" in text
    assert "(1 of 3)" in text
    assert "left out of means and correlations: l2, seed 0, after 100." in text
    assert "13 points of 6 lives" in text  # 2 x (3 at the start, 3 at 100, 1 at 400) less 1
    tables = tabulate_supply(STUDY, tmp_path)
    assert tables.steps == [0, 100, 400]
    change = tables.changes.filter((pl.col("quantity") == "effective_rank") & (pl.col("method") == "backprop"))
    assert change.get_column("seeds").to_list() == [1, 1]
    assert change.get_column("low").to_list() == [None, None]
