"""The report's page: whole, alone, the same each time, also where something is missing."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from made_up_run import GRIDS, build, showcase

from perennial.report import NoResultsError, NotARunDirectoryError, summary_numbers, write_report


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return build(tmp_path / "run", parts={"relu": "regression", "digits": "classification"})


class _Page(HTMLParser):
    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes nothing"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data

    def every(self, name: str) -> list[str]:
        return [value for _, attributes in self.attributes if (value := attributes.get(name)) is not None]


def _read(run: Path) -> _Page:
    return _Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = showcase(tmp_path_factory.mktemp("report") / "run")
    write_report(run)
    return run


def test_page_is_well_formed_with_unique_ids_that_references_find(whole: Path) -> None:
    page = _Page((whole / "report.html").read_text(encoding="utf-8"))
    repeated = [name for name, times in Counter(page.every("id")).items() if times > 1]
    assert not repeated
    text = (whole / "report.html").read_text(encoding="utf-8")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    used |= {name for names in page.every("aria-labelledby") for name in names.split()}
    assert used
    assert used <= set(page.every("id"))


def test_page_stands_alone(whole: Path) -> None:
    page = _Page((whole / "report.html").read_text(encoding="utf-8"))
    for tag, attributes in page.attributes:
        assert tag not in ("script", "iframe", "img", "object")
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    text = (whole / "report.html").read_text(encoding="utf-8")
    assert "@import" not in text
    assert "url(http" not in text
    assert "perennial run made_up --seeds 4" in page.text
    assert "2.13.0" in page.text
    assert "Numbers with <angle> & ampersand." in page.text


def test_embedded_tables_are_the_files(whole: Path) -> None:
    page = _Page((whole / "report.html").read_text(encoding="utf-8"))
    links = {a["download"]: a["href"] for _, a in page.attributes if "download" in a}
    for file in (whole / "tables").glob("*.csv"):
        head, _, body = (links[file.name] or "").partition(",")
        assert head == "data:text/csv;charset=utf-8;base64"
        assert base64.b64decode(body) == file.read_bytes()
    assert base64.b64decode((links["study.yaml"] or "").partition(",")[2]) == (whole / "study.yaml").read_bytes()


def test_figures_are_xml_and_on_the_page(whole: Path) -> None:
    text = (whole / "report.html").read_text(encoding="utf-8")
    files = sorted((whole / "figures").glob("*.svg"))
    names = {file.stem for file in files}
    assert {"relu-learning-curves", "relu-dead-units", "relu-by-rule-lr", "digits-units-replaced"} <= names
    for file in files:
        svg = file.read_text(encoding="utf-8")
        root = ET.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("viewBox")
        assert all(root.findtext("{http://www.w3.org/2000/svg}" + tag) for tag in ("title", "desc"))
        assert svg.strip() in text
        assert "metadata" not in svg
        assert "<style" not in svg


def test_every_number_drawn_is_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[float] = []
    plot, fill, bars = Axes.plot, Axes.fill_between, Axes.vlines

    def heard(original: Any, ys: slice) -> Any:
        def call(self: Axes, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("transform") is None:  # in the data's coordinates: leaders and breaks are not data
                for values in args[ys]:
                    if not isinstance(values, str):
                        drawn.extend(np.asarray(values, dtype=float).ravel())
            return original(self, *args, **kwargs)

        return call

    monkeypatch.setattr(Axes, "plot", heard(plot, slice(1, 2)))
    monkeypatch.setattr(Axes, "fill_between", heard(fill, slice(1, 3)))
    monkeypatch.setattr(Axes, "vlines", heard(bars, slice(1, 3)))
    run = build(tmp_path, parts={"relu": "regression"}, grids=GRIDS, diverge={("backprop", ""): {1: 25_000}})
    write_report(run)
    written = set()
    for file in (run / "tables").glob("*.csv"):
        for row in csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))):
            written |= {float(row[name]) for name in row if name in ("mean", "low", "high") and row[name]}
    finite = {value for value in drawn if np.isfinite(value)}
    assert len(finite) > 100
    assert finite <= written


def test_same_results_give_the_same_bytes(small: Path) -> None:
    def bytes_of(run: Path) -> dict[str, bytes]:
        write_report(run)
        made = [run / "report.html", *(run / "figures").iterdir(), *(run / "tables").iterdir()]
        return {str(file.relative_to(run)): file.read_bytes() for file in made}

    first = bytes_of(small)
    shutil.rmtree(small / "figures")
    shutil.rmtree(small / "tables")
    frame = pl.read_parquet(small / "results.parquet")
    frame.sample(fraction=1.0, shuffle=True, seed=3).write_parquet(small / "results.parquet")
    assert bytes_of(small) == first


def test_unknown_methods_and_odd_names_do(tmp_path: Path) -> None:
    methods = ("backprop", "new one <b>", "other/new", "third", "fourth", "fifth", "sixth", "seventh")
    run = build(tmp_path, parts={"A b/c": "regression", "a-b c": "regression"}, methods=methods, bins=2, seeds=2)
    page = _read(run)
    assert "new one <b>" in page.text
    assert len(list((run / "figures").glob("*-learning-curves.svg"))) == 2
    assert len(set(page.every("id"))) == len(page.every("id"))
    assert not any(re.search(r"\s", name) for name in page.every("id"))


def test_one_seed_is_said_and_has_no_interval(tmp_path: Path) -> None:
    run = build(tmp_path, parts={"relu": "regression"}, seeds=1)
    text = _read(run).text
    assert "one seed, so no interval can be given" in text
    assert "95%" not in text
    table = summary_numbers(run)
    assert table["average"].null_count() == 0
    assert table["average_low"].null_count() == table.height


def test_one_bin(tmp_path: Path) -> None:
    run = build(tmp_path, parts={"relu": "regression"}, bins=1)
    text = _read(run).text
    assert "First 10,000" in text
    assert "4 seeds: bootstrap intervals of so few are narrower" in text
    assert summary_numbers(run)["loss_of_plasticity"].null_count() == 3


@pytest.mark.parametrize("step", [1, 25_000])
def test_all_lanes_diverged_is_said(tmp_path: Path, step: int) -> None:
    gone = {("backprop", ""): dict.fromkeys(range(4), step)}
    run = build(tmp_path, parts={"relu": "regression"}, diverge=gone)
    page = _read(run)
    assert "All lanes diverged: Backprop." in page.text
    assert "4 of 4" in page.text
    row = summary_numbers(run).filter(method="backprop").row(0, named=True)
    assert row["average"] is None
    assert row["diverged"] == 4
    assert (row["first"] is None) == (step == 1)


def test_everything_diverged_at_once(tmp_path: Path) -> None:
    gone = {(method, ""): dict.fromkeys(range(4), 1) for method in ("backprop", "continual_backprop", "linear")}
    run = build(tmp_path, parts={"relu": "regression"}, diverge=gone)
    assert "all diverged" in _read(run).text
    assert not (run / "figures/relu-learning-curves.svg").exists()


def test_diverged_setting_in_a_grid(tmp_path: Path) -> None:
    gone = {("upgd", "rule.lr=0.03"): dict.fromkeys(range(4), 15000)}
    run = build(tmp_path, parts={"relu": "regression"}, methods=("backprop", "upgd"), grids=GRIDS, diverge=gone)
    assert "A cross at the edge" in _read(run).text
    table = pl.read_csv(run / "tables/relu-sensitivity.csv")
    assert table["diverged"].to_list() == [0, 0, 4]
    assert table["mean"].null_count() == 1


def test_choices_that_are_not_numbers_have_a_row_each(tmp_path: Path) -> None:
    grids = {"backprop": {"rule.momentum": [0.0, 0.9], "rule.lr": [0.01, 0.1]}}
    run = build(tmp_path, parts={"relu": "regression"}, grids=grids)
    for name in ("results", "lanes"):
        frame = pl.read_parquet(run / f"{name}.parquet")
        none = pl.col("settings").str.replace("momentum=0.0", "momentum=None", literal=True)
        frame.with_columns(settings=none).write_parquet(run / f"{name}.parquet")
    text = _read(run).text
    assert "momentum None, lr 0.1" in text
    assert {file.stem for file in (run / "figures").glob("*-by-*")} == {"relu-by-rule-lr", "relu-by-rule-momentum"}
    table = pl.read_csv(run / "tables/relu-choices.csv")
    assert table["choice"].to_list() == ["rule.momentum"] * 2
    best = pl.read_csv(run / "tables/relu-summary.csv").filter(method="backprop").sort("rank")
    for row in table.iter_rows(named=True):
        of_it = best.filter(pl.col("settings").str.contains(f"rule.momentum={row['value']}", literal=True))
        assert (row["settings"], row["mean"]) == (of_it["settings"][0], of_it["average"][0]), (
            "at the best of the others"
        )
    assert table["value"][0] in best["settings"][0], "best first"
    drawn = (run / "figures/relu-by-rule-momentum.svg").read_text()
    assert drawn.index(">" + table["value"][0] + "<") < drawn.index(">" + table["value"][1] + "<")
    assert "By momentum" in drawn


def test_a_choice_of_which_every_lane_diverged_is_marked(tmp_path: Path) -> None:
    grids = {"backprop": {"rule.nesterov": [0.0, 1.0]}}
    run = build(tmp_path, parts={"relu": "regression"}, grids=grids)
    for name in ("results", "lanes"):
        frame = pl.read_parquet(run / f"{name}.parquet")
        named = pl.col("settings").str.replace("=0.0", "=no", literal=True).str.replace("=1.0", "=yes", literal=True)
        frame = frame.with_columns(settings=named)
        if name == "results":
            gone = pl.col("settings") == "rule.nesterov=yes"
            frame = frame.with_columns(value=pl.when(gone).then(None).otherwise(pl.col("value")))
        frame.write_parquet(run / f"{name}.parquet")
    _read(run)
    table = pl.read_csv(run / "tables/relu-choices.csv")
    assert table["mean"].is_null().to_list() == [False, True]
    assert "choice-0" in (run / "figures/relu-by-rule-nesterov.svg").read_text()


def test_study_with_a_number_of_seeds_and_one_part_without_a_title(tmp_path: Path) -> None:
    run = build(tmp_path, parts={"relu": "regression"})
    study = yaml.safe_load((run / "study.yaml").read_text())
    study["parts"]["relu"] |= {"seeds": 4, "title": ""}
    (run / "study.yaml").write_text(yaml.safe_dump(study))
    text = _read(run).text
    assert "4 seeds" in text
    assert "Made up regression" in text


def test_unfinished_run_is_said_and_compared_as_far_as_all_have_come(tmp_path: Path) -> None:
    run = build(tmp_path, parts={"relu": "regression", "digits": "classification"}, bins=4, finished=False)
    page = _read(run)
    assert "This run is unfinished." in page.text
    assert "not yet" in page.text
    table = summary_numbers(run)
    assert table["steps"].unique().to_list() == [10_000]
    assert table["relative_cost"].null_count() == table.height
    curves = pl.read_csv(run / "tables/relu-learning-curves.csv")
    assert dict(curves.group_by("method").agg(pl.max("step")).iter_rows()) == {
        "backprop": 30_000,
        "continual_backprop": 20_000,
        "linear": 10_000,
    }
    shutil.rmtree(run / "jobs/2")
    assert "No results yet: Linear." in _read(run).text


def test_divergence_is_known_from_the_values_alone(tmp_path: Path) -> None:
    run = build(tmp_path, parts={"relu": "regression"}, diverge={("backprop", ""): {0: 25_000}})
    (run / "lanes.parquet").unlink()
    row = summary_numbers(run).filter(method="backprop").row(0, named=True)
    assert row["diverged"] == 1
    assert row["steps"] == 50_000


def test_metric_without_a_name_for_readers_is_drawn_under_its_own(tmp_path: Path) -> None:
    run = build(tmp_path, parts={"relu": "regression"})
    frame = pl.read_parquet(run / "results.parquet")
    more = frame.filter(metric="dead_units").with_columns(metric=pl.lit("my_measure"))
    pl.concat([frame, more]).write_parquet(run / "results.parquet")
    write_report(run)
    assert "My measure" in (run / "figures/relu-my-measure.svg").read_text(encoding="utf-8")


def test_part_without_results(tmp_path: Path) -> None:
    run = build(tmp_path, parts={"relu": "regression", "digits": "classification"}, finished=False)
    for file in run.glob("jobs/*/segment-*.parquet"):
        pl.read_parquet(file).filter(part="relu").write_parquet(file)
    assert "This part has no results yet." in _read(run).text


def test_errors_name_the_path_the_reason_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(NotARunDirectoryError, match=r"not a run directory.*study\.yaml.*perennial run"):
        write_report(tmp_path)
    run = build(tmp_path / "run", parts={"relu": "regression"})
    frame = pl.read_parquet(run / "results.parquet")
    frame.with_columns(method=pl.lit("stranger")).write_parquet(run / "results.parquet")
    with pytest.raises(NoResultsError, match=r"stranger.*study\.yaml"):
        summary_numbers(run)
    (run / "results.parquet").unlink()
    with pytest.raises(NoResultsError, match=re.escape(str(run)) + r" has no results yet.*environment\.json"):
        write_report(run)
    (run / "environment.json").unlink()
    with pytest.raises(NotARunDirectoryError, match=r"environment\.json"):
        write_report(run)


def test_importing_perennial_does_not_import_the_report() -> None:
    heavy = "'matplotlib', 'polars', 'jinja2', 'perennial.report'"
    code = f"import perennial, sys; sys.exit(' '.join(m for m in ({heavy}) if m in sys.modules) or None)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
def test_browser_draws_every_figure(whole: Path, tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("needs a browser: the Debian package chromium is not installed")
    # The page itself has no script; a copy of it measures what the browser made of it and writes that at its end. It
    # stands in a frame as wide as a phone, since a window has a least width.
    measure = """<script>addEventListener("load", () => {
      const size = e => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
      const seen = {
        figures: [...document.querySelectorAll("figure svg")].map(size),
        lines: [...document.querySelectorAll('figure svg g[id*="-line-"]')].map(size),
        texts: [...document.querySelectorAll("figure svg text")].map(size),
        page: [document.documentElement.scrollWidth, innerWidth],
      };
      parent.document.body.insertAdjacentHTML("beforeend", "<output>" + JSON.stringify(seen) + "</output>");
    });</script>"""
    text = (whole / "report.html").read_text(encoding="utf-8")
    inner = (text + measure).replace("&", "&amp;").replace('"', "&quot;")
    copy = tmp_path / "copy.html"
    frame = f'<iframe width="{width}" height="900" srcdoc="{inner}"></iframe>'
    copy.write_text('<!doctype html><link rel="icon" href="data:,">' + frame)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    flags += ["--virtual-time-budget=20000", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000"]
    shown = subprocess.run([browser, *flags, copy.as_uri()], capture_output=True, text=True, timeout=180, check=True)
    found = re.search(r"<output>(.*?)</output>", shown.stdout)
    assert found, shown.stderr[-2000:]
    seen = json.loads(found[1])
    assert len(seen["figures"]) == len(list((whole / "figures").glob("*.svg")))
    assert all(w > 200 and h > 100 for w, h in seen["figures"])
    assert seen["lines"]
    assert all(w > 0 for w, _ in seen["lines"])
    assert seen["texts"]
    assert all(w > 0 and h > 7 for w, h in seen["texts"])
    assert seen["page"][0] <= seen["page"][1], "the page is wider than the screen"
    assert "CONSOLE" not in shown.stderr, shown.stderr[-2000:]
