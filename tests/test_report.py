"""The report's numbers: means, intervals, grids, and how they are written."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from made_up_run import FIGURE, GRIDS, RATE, STEP_SIZE, build

from perennial.report import summary_numbers, summary_table, write_report
from perennial.report.figures import positions, spread
from perennial.report.load import load
from perennial.report.looks import KNOWN, OTHERS, looks, other
from perennial.report.series import swept
from perennial.report.words import examples, interval_text, mean_text, number, readable
from perennial.statistics import Floats, estimate, run_average


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return build(tmp_path / "run", parts={"relu": "regression", "digits": "classification"})


def test_interval_is_scipys() -> None:
    from scipy.stats import bootstrap

    samples = np.random.default_rng(0).lognormal(size=(17, 3))
    made = estimate(samples, resamples=2000, seed=5)
    for point in range(3):
        theirs = bootstrap(
            (samples[:, point],), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(5)
        ).confidence_interval
        np.testing.assert_allclose([made.low[point], made.high[point]], [theirs.low, theirs.high], rtol=1e-12)
    np.testing.assert_allclose(made.mean, samples.mean(0), rtol=1e-14)


def test_interval_of_many_normal_lanes_is_the_analytic_one() -> None:
    samples = np.random.default_rng(1).normal(3.0, 2.0, (400, 1))
    made = estimate(samples)
    half = 1.959964 * samples.std(ddof=0) / 20  # the bootstrap's variance is the plug-in one
    np.testing.assert_allclose([made.low[0], made.high[0]], [samples.mean() - half, samples.mean() + half], atol=0.02)


def test_diverged_lanes_leave_the_mean_and_the_interval() -> None:
    samples = np.random.default_rng(2).normal(size=(6, 300))
    samples[4:, 200:] = np.nan
    made = estimate(samples)
    np.testing.assert_allclose(made.mean[200:], samples[:4, 200:].mean(0))
    assert (made.lanes == np.where(np.arange(300) < 200, 6, 4)).all()
    assert np.isfinite(made.low).all()
    assert (made.low <= made.mean).all()
    assert (made.mean <= made.high).all()


def test_one_lane_has_no_interval_and_no_lane_no_mean() -> None:
    made = estimate([[1.0, np.nan], [np.nan, np.nan]])
    assert made.mean[0] == 1
    assert np.isnan(made.mean[1])
    assert np.isnan(made.low).all()
    assert np.isnan(made.high).all()
    assert made.lanes.tolist() == [1, 0]
    assert np.isnan(estimate([[2.0]]).low[0])


def test_average_counts_bins_by_their_length() -> None:
    average = run_average(np.array([[1.0, 2.0, 4.0], [1.0, np.nan, 1.0]]), np.array([10, 20, 25]))
    assert average[0] == pytest.approx((10 + 20 + 20) / 25)
    assert np.isnan(average[1])


def _main_figure(tmp_path: Path, stream: dict[str, object] | None = None) -> tuple[Path, pl.DataFrame]:
    run = build(
        tmp_path / "run",
        parts={"relu": "regression", "digits": "classification"},
        methods=("backprop", "l2", "continual_backprop", "upgd", "linear"),
        grids=GRIDS,
        figure=FIGURE,
    )
    study = yaml.safe_load((run / "study.yaml").read_text())
    for part in study["parts"].values():
        part["stream"] = stream or part["stream"]
    (run / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    write_report(run)
    return run, pl.read_csv(run / "tables" / "main-figure.csv")


def test_the_main_figure_has_the_lines_that_its_panels_ask_for(tmp_path: Path) -> None:
    run, frame = _main_figure(tmp_path)
    lines = {at: frame.filter(panel=at).get_column("line").unique(maintain_order=True).to_list() for at in range(1, 6)}
    assert lines == {
        1: ["Backprop", "L2", "Continual backprop", "UPGD", "Linear"],
        2: ["lr 0.003", "lr 0.01", "lr 0.03", "Linear"],
        3: ["Backprop", "L2"],
        4: ["Made-up regression, relu", "Made-up classification, digits"],
        5: ["Continual backprop"],
    }
    assert frame.group_by("panel", maintain_order=True).first().get_column("title").to_list() == [
        "Online loss", "Step sizes", "Dead units", "Mean weight magnitude", "Replacements per unit so far",
    ]  # fmt: skip
    assert (frame["time"] == frame["step"]).all()  # no task length is known of a made-up stream
    # a method is shown at its best setting, a setting by the mean over its own seeds
    summary = summary_numbers(run).filter(part="relu", rank=1)
    best = dict(summary.select("method", "settings").iter_rows())
    first = frame.filter(panel=1).select("method", "settings").unique()
    assert {(m, s or "") for m, s in first.iter_rows()} == {(m, best[m]) for m in best}
    results = pl.read_parquet(run / "results.parquet")
    mine = results.filter(part="relu", method="upgd", settings="rule.lr=0.03", metric="online_loss", step=30_000)
    shown = frame.filter(panel=2, line="lr 0.03", step=30_000).get_column("mean")
    assert shown.to_list() == pytest.approx([mine.get_column("value").mean()])


def test_lines_of_the_main_figure_whose_labels_are_the_same_stay_apart(tmp_path: Path) -> None:
    figure = {"title": "x", "panels": [{"metric": "online_loss"}]}
    run = build(tmp_path / "run", parts={"relu": "regression"}, methods=("backprop", "l2"), figure=figure)
    text = (run / "study.yaml").read_text()
    (run / "study.yaml").write_text(text.replace("label: L2", "label: Backprop"))
    write_report(run)
    frame = pl.read_csv(run / "tables" / "main-figure.csv")
    assert frame.get_column("line").unique(maintain_order=True).to_list() == ["Backprop (backprop)", "Backprop (l2)"]
    assert frame.group_by("line").len().get_column("len").to_list() == [5, 5]
    grids = {"l2": {STEP_SIZE: [0.12351, 0.12352]}}
    figure = {"title": "costs $5 or \\nosuch$", "panels": [{"metric": "online_loss", "lines": "settings"}]}
    run = build(tmp_path / "two", parts={"relu": "regression"}, methods=("l2",), grids=grids, figure=figure)
    write_report(run)
    frame = pl.read_csv(run / "tables" / "main-figure.csv")
    assert frame.get_column("line").n_unique() == 2
    assert "costs $5 or" in (run / "figures" / "main-figure.svg").read_text()


def test_the_main_figure_counts_tasks_where_they_are_known(tmp_path: Path) -> None:
    stream = {"name": "slowly_changing_regression", "flip_after": 20_000}
    run, frame = _main_figure(tmp_path, stream)
    assert (frame["time"] == frame["step"] / 20_000).all()
    assert ">task number<" in (run / "figures" / "main-figure.svg").read_text()


def test_loss_of_plasticity_is_paired_and_positive_where_it_worsens(small: Path) -> None:
    table = summary_numbers(small)
    for part, sign in (("relu", 1), ("digits", -1)):
        row = table.filter(part=part, method="backprop").row(0, named=True)
        frame = pl.read_parquet(small / "results.parquet").filter(part=part, method="backprop", metric=row["metric"])
        ends = frame.pivot("step", index="seed", values="value").select("10000", "50000").to_numpy()
        lost = sign * (ends[:, 1] - ends[:, 0])
        assert row["loss_of_plasticity"] == pytest.approx(lost.mean())
        assert lost.mean() > 0
        assert row["loss_of_plasticity_low"] == pytest.approx(estimate(lost[:, None]).low[0])
        assert row["first"] == pytest.approx(ends[:, 0].mean())
        assert row["last"] == pytest.approx(ends[:, 1].mean())


def test_cost_is_relative_to_plain_sgd(small: Path) -> None:
    costs = dict(summary_numbers(small).filter(part="relu").select("method", "relative_cost").iter_rows())
    assert costs == pytest.approx({"backprop": 1.0, "continual_backprop": 1.35, "linear": 1.7})


def test_settings_stand_best_first_and_fewest_diverged_before_that(tmp_path: Path) -> None:
    grid = {"continual_backprop": {RATE: [0.0, 1e-5, 1e-4, 1e-3]}}
    best = f"{RATE}=0.0001"
    run = build(tmp_path, parts={"relu": "regression"}, grids=grid)
    table = summary_numbers(run).filter(method="continual_backprop")
    assert table.height == 4
    assert table["settings_tried"].to_list() == [4, 4, 4, 4]
    assert table["settings"][0] == best
    assert table["average"].is_sorted()
    write_report(run)
    whole = pl.read_csv(run / "tables/relu-summary.csv").filter(method="continual_backprop")
    assert whole.height == 4
    gone = {("continual_backprop", best): {2: 1}}
    diverging = build(tmp_path, parts={"relu": "regression"}, grids=grid, diverge=gone)
    assert summary_numbers(diverging).filter(method="continual_backprop")["settings"][0] != best


def test_sensitivity_takes_the_best_of_the_other_numbers(tmp_path: Path) -> None:
    run = build(tmp_path, parts={"relu": "regression"}, grids={"continual_backprop": GRIDS["continual_backprop"]})
    write_report(run)
    curve = pl.read_csv(run / "tables/relu-sensitivity.csv")
    whole = pl.read_csv(run / "tables/relu-summary.csv").filter(method="continual_backprop")
    assert curve.filter(number=RATE)["value"].to_list() == [0.0, 1e-5, 1e-4, 1e-3]
    for value, mean in curve.filter(number=STEP_SIZE).select("value", "mean").iter_rows():
        mine = [row["average"] for row in whole.iter_rows(named=True) if swept(row["settings"])[STEP_SIZE] == value]
        assert mean == min(mine)


def test_curves_of_every_setting_are_those_of_the_results(tmp_path: Path) -> None:
    grid = {"upgd": GRIDS["upgd"], "continual_backprop": {STEP_SIZE: [10.0**-n for n in range(1, 9)]}}
    methods = ("backprop", "upgd", "continual_backprop", "linear")
    run = build(tmp_path, parts={"relu": "regression"}, methods=methods, grids=grid)
    write_report(run)
    assert {file.stem for file in (run / "figures").glob("*-every-*")} == {"relu-every-upgd"}, "eight are too many"
    svg = (run / "figures/relu-every-upgd.svg").read_text(encoding="utf-8")
    assert "UPGD: online loss" in svg
    table = pl.read_csv(run / "tables/relu-every-setting.csv")
    settings = [f"rule.lr={value}" for value in GRIDS["upgd"]["rule.lr"]]
    assert set(table["settings"]) == set(settings)
    results = pl.read_parquet(run / "results.parquet").filter(method="upgd", metric="online_loss")
    for one in settings:
        assert f"lr {one.partition('=')[2]}" in svg
        mean = results.filter(settings=one).group_by("step").agg(pl.col("value").mean()).sort("step")
        assert table.filter(settings=one)["mean"].to_list() == pytest.approx(mean["value"].to_list())


def test_table_to_print_is_the_pages_and_writes_nothing(tmp_path: Path, small: Path) -> None:
    before = sorted(small.rglob("*"))
    table = summary_table(small)
    assert sorted(small.rglob("*")) == before
    assert table.columns[:3] == ["Part", "Method", "First"]
    assert table.height == 6
    accuracy = table.row(3, named=True)
    assert accuracy["Average"].partition(" ")[0].endswith("%")
    assert " points [" in accuracy["Loss of plasticity"]
    page = write_report(small).read_text(encoding="utf-8")
    assert all(f">{cell.partition('%')[0].partition(' ')[0]}<" in page for cell in table["Average"])
    grid = {"continual_backprop": GRIDS["continual_backprop"]}
    alone = summary_table(build(tmp_path / "grid", parts={"relu": "regression"}, grids=grid))
    assert alone.columns[:2] == ["Method", "Settings"]
    assert alone.height == 1 + 3 + 1
    assert alone["Settings"][1] == "replacement rate 1e-4, lr 0.01"


def test_settings_text() -> None:
    text = "rule.lr=0.01, interventions.continual_backprop.replacement_rate=1e-05"
    assert swept(text) == {"rule.lr": 0.01, RATE: 1e-5}
    assert swept("") == {}
    assert readable(text) == "lr 0.01, replacement rate 1e-5"
    assert readable("rule.weight_decay=0.1, interventions.x.weight_decay=1.0").startswith("rule.weight_decay 0.1")
    assert swept("network.hidden=(5, 5), rule.lr=1") == {"network.hidden": "(5, 5)", "rule.lr": 1.0}
    assert readable("network.hidden=(5, 5), rule.lr=1") == "hidden (5, 5), lr 1"


def test_a_stream_that_does_not_say_has_its_usual_batch(tmp_path: Path) -> None:
    directory = build(tmp_path / "run", parts={"relu": "classification"}, seeds=2)
    study = yaml.safe_load((directory / "study.yaml").read_text())
    study["parts"]["relu"]["stream"] = {"name": "class_pairs"}
    (directory / "study.yaml").write_text(yaml.safe_dump(study))
    assert load(directory).parts[0].batch == 100


@pytest.mark.parametrize(
    ("batch", "axis", "whole"), [(1, "examples seen", "50,000 examples"), (20, "steps of 20 examples", "50,000 steps")]
)
def test_steps_are_called_examples_only_where_they_have_one(tmp_path: Path, batch: int, axis: str, whole: str) -> None:
    directory = build(tmp_path / "run", parts={"relu": "classification"}, seeds=2)
    study = yaml.safe_load((directory / "study.yaml").read_text())
    if batch > 1:
        study["parts"]["relu"]["stream"]["batch_size"] = batch
    (directory / "study.yaml").write_text(yaml.safe_dump(study))
    page = write_report(directory).read_text()
    assert whole in page
    assert f"against {axis}" in page
    assert axis in (directory / "figures" / "relu-learning-curves.svg").read_text()
    if batch > 1:
        assert "examples seen" not in page
        assert "each bin of 10,000 steps" in page


def test_positions_on_the_axis() -> None:
    assert positions([1.0, 2.0, 10.0]) == [1.0, 2.0, 10.0]
    assert positions([0.01, 0.1, 1.0]) == pytest.approx([-2, -1, 0])
    with_zero = positions([0.0, 0.01, 1.0])
    assert with_zero[0] < with_zero[1] - 0.3
    assert with_zero[1:] == pytest.approx([-2, 0])
    assert positions([-1.0, 0.0, 50.0]) == [-1.0, 0.0, 50.0]
    assert [number(x) for x in (0.0, 0.01, 1e-5, 2.5e-6, 1.0, 200000.0)] == ["0", "0.01", "1e-5", "2.5e-6", "1", "2e5"]
    assert [examples(x) for x in (0, 500, 20_000, 1_500_000)] == ["0", "500", "20k", "1.5M"]


def test_labels_are_spread() -> None:
    levels = spread([0.0, 0.01, 0.5, 0.99, 1.0, 1.0], 0.1)
    assert all(b - a > 0.0999 for a, b in itertools.pairwise(levels))
    assert levels[0] >= 0.05 - 1e-9
    assert levels[-1] <= 0.95 + 1e-9
    assert levels[2] == pytest.approx(0.5)


def test_colours_are_fixed_by_key(small: Path) -> None:
    look = looks(load(small).parts)
    assert look["backprop"] == KNOWN["backprop"]
    assert look["linear"].colour == KNOWN["linear"].colour
    everyone = [*KNOWN.values(), *OTHERS]
    assert len({entry.colour for entry in everyone}) == len(everyone)
    for entry in everyone:
        assert _contrast(entry.colour) >= 3
    assert len({(entry.dash, entry.marker) for entry in everyone}) == len(everyone)
    assert len({other(at) for at in range(36)}) == 36
    assert [other(at) for at in range(len(OTHERS))] == list(OTHERS)


DICHROMACY = {  # Machado, Oliveira and Fernandes (2009), of linear RGB
    "none": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("kind", DICHROMACY)
def test_colours_stay_apart_for_colour_blind_readers(kind: str) -> None:
    seen = [_lab(np.array(DICHROMACY[kind]) @ _linear(look.colour)) for look in KNOWN.values()]
    nearest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
    assert nearest > 14, "CIE76; 2.3 is just noticeable"


def _linear(colour: str) -> Floats:
    """Linear RGB in [0, 1] of a hexadecimal sRGB colour."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def _lab(linear: Floats) -> Floats:
    """CIELAB under D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(linear, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def _contrast(colour: str) -> float:
    """Against white, as the web content accessibility guidelines define it."""
    return 1.05 / (float(_linear(colour) @ np.array([0.2126, 0.7152, 0.0722])) + 0.05)


def test_numbers_have_the_digits_their_interval_leaves_them() -> None:
    assert mean_text(1.23456, 1.2, 1.26) == "1.235"
    assert interval_text(1.23456, 1.2, 1.26) == "[1.200, 1.260]"
    assert mean_text(-0.5, -2.0, 1.0) == "\N{MINUS SIGN}0.5"
    assert mean_text(1234.5, 1000.0, 1400.0) == "1,234"
    assert mean_text(0.012345, None, None) == "0.0123"
    assert interval_text(1.0, None, None) == ""
    assert mean_text(0.0, 0.0, 0.0) == "0.00"
    assert mean_text(-1e-9, -0.1, 0.1) == "0.00"
