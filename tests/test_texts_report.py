"""Reports of language-model studies where runs are partial, large or of several kinds; on results made up by hand."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perennial.lm import DominantTickets, Recipe, Selection, TextStream, TextTraining
from perennial.lm.stream import Job
from perennial.report.heat_maps import by_layer
from perennial.report.lm_figures import method_looks
from perennial.report.lm_page import text_summary, write_dominant_report, write_text_report
from perennial.report.lm_tables import tabulate_dominant, tabulate_texts
from perennial.storage import write_json, write_tensors

ABOUT = {"title": "Made <up>", "description": "One.\n\nTwo.", "source": "Nobody", "study_text": "texts: {}"}
ONE = Recipe(label="One LoRA", trains="adapter_one")
FULL = Recipe(label="All weights", trains="all")
EACH = Recipe(label="Incremental", trains="adapter_each")
OSF = Recipe(label="OSF", trains="osf")
ALONE = Recipe(label="Adapter alone", trains="adapter_one", tasks="alone")
ALL_ALONE = Recipe(label="All weights alone", trains="all", tasks="alone")
IN_TURN = [[0.8, None], [0.6, 0.7]]
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta"}


def stream(methods: Mapping[str, Recipe], seeds: tuple[int, ...] = (0, 1)) -> TextStream:
    return TextStream(tasks=("yelp", "WiC"), methods=methods, seeds=seeds, training=TextTraining(steps=2))


def put(folder: Path, method: str, seed: int, scores: list[list[float | None]], **more: Any) -> None:
    found = {"scores": scores, "losses": [[2.0, 1.0]] * len(scores), "seconds": [4.0] * len(scores), "finished": True}
    write_json(Job(method, seed).folder(folder) / "results.json", found | more)


def each_alone(first: float, second: float) -> list[list[float | None]]:
    return [[first, None], [None, second]]


class Page(HTMLParser):
    """Every element is closed in its place, and nothing is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith(("#", "data:")), value
        assert tag not in ("script", "img", "iframe", "object")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(page: Path) -> str:
    """The page's text on one line."""
    text = page.read_text(encoding="utf-8")
    reader = Page()
    reader.feed(text)
    assert not reader.open
    assert "@import" not in text
    assert "Made &lt;up&gt;" in text
    for drawing in (page.parent / "figures").glob("*.svg"):
        ET.fromstring(drawing.read_text(encoding="utf-8"))
    return " ".join(text.split())


def test_a_method_is_compared_with_what_trains_as_it_does(tmp_path: Path) -> None:
    of = stream({"all_alone": ALL_ALONE, "alone": ALONE, "one": ONE, "each": EACH, "full": FULL, "osf": OSF})
    for seed in of.seeds:
        for method in ("one", "each", "full", "osf"):
            put(tmp_path, method, seed, IN_TURN)
        put(tmp_path, "alone", seed, each_alone(0.8, 0.8))
        put(tmp_path, "all_alone", seed, each_alone(0.9, 1.0))
    tables = tabulate_texts(of, tmp_path)
    assert tables.baselines == {"one": "alone", "each": "alone", "full": "all_alone", "osf": "all_alone"}
    rows = {row["method"]: row["against_alone"] for row in tables.methods.iter_rows(named=True)}
    assert rows["each"] == pytest.approx(0.75 - 0.8)
    assert rows["full"] == pytest.approx(0.75 - 0.95)
    assert rows["alone"] is None
    text = checked(write_text_report(of, tmp_path, **ABOUT))
    assert "Compared with All weights alone, as nothing that trains as they do learns alone: OSF." in text


def test_differences_pair_seeds(tmp_path: Path) -> None:
    of = stream({"one": ONE, "alone": ALONE}, (0, 1, 2))
    for seed, shift in enumerate((0.0, 0.1, 0.2)):
        put(tmp_path, "one", seed, [[0.5 + shift, None], [0.4 + shift, 0.6 + shift]])
        if seed:  # the first seed has no counterpart
            put(tmp_path, "alone", seed, each_alone(0.5 + shift, 0.7 + shift))
    tables = tabulate_texts(of, tmp_path)
    one, alone = tables.methods.iter_rows(named=True)
    assert one["learning"] == pytest.approx(0.65)  # 0.55, 0.65, 0.75
    assert alone["learning"] == pytest.approx(0.75)  # 0.7, 0.8
    for end in ("", "_low", "_high"):
        assert one[f"against_alone{end}"] == pytest.approx(-0.05)  # in each pair, not the difference of the means
    text = checked(write_text_report(of, tmp_path, **ABOUT))
    assert "Not all seeds have finished: Adapter alone (2 of 3)." in text


def test_the_baseline_does_not_change_while_a_study_runs(tmp_path: Path) -> None:
    of = stream({"one": ONE, "all_alone": ALL_ALONE, "alone": ALONE}, (0,))
    put(tmp_path, "one", 0, IN_TURN)
    put(tmp_path, "all_alone", 0, each_alone(0.9, 1.0))
    tables = tabulate_texts(of, tmp_path)
    assert tables.baselines == {"one": "alone"}
    assert tables.methods["against_alone"].to_list() == [None, None]
    assert "No results yet: Adapter alone." in checked(write_text_report(of, tmp_path, **ABOUT))
    put(tmp_path, "alone", 0, each_alone(0.8, 0.8))
    assert tabulate_texts(of, tmp_path).methods["against_alone"].to_list()[0] == pytest.approx(0.75 - 0.8)


def test_one_seed_and_no_method_alone(tmp_path: Path) -> None:
    of = stream({"one": ONE, "each": EACH}, (3,))
    put(tmp_path, "one", 3, IN_TURN)
    begun = {"scores": [[0.8, None]], "losses": [[2.0, 1.0]], "seconds": [4.0]}
    write_json(Job("each", 3).folder(tmp_path) / "results.json", begun)
    page = write_text_report(of, tmp_path, **ABOUT)
    before = page.read_bytes()
    assert write_text_report(of, tmp_path, **ABOUT).read_bytes() == before
    text = checked(page)
    for note in (
        "1 of 2 have finished",
        "No results yet: Incremental.",
        "Begun and left out of every number: Incremental, seed 3 (1 of 2 tasks).",
        "One seed: there is no interval, and a difference may be chance.",
        "No method of this study learns each task alone",
    ):
        assert note in text
    (row,) = text_summary(of, tmp_path).iter_rows(named=True)
    assert row == {
        "Method": "One LoRA",
        "Average at the end, %": "65.0",
        "Forgetting, points": "20.0",
        "Learning accuracy, %": "75.0",
        "Learning accuracy less alone, points": "\N{EN DASH}",
    }


def test_eighteen_methods_look_different(tmp_path: Path) -> None:
    of = stream({f"m{at}": Recipe(label=f"Method {at}", trains="adapter_one") for at in range(18)}, (0,))
    for job in of.jobs():
        put(tmp_path, job.method, 0, IN_TURN)
    tables = tabulate_texts(of, tmp_path)
    looks = method_looks(tables)
    assert len({(look.colour, look.dash) for look in looks.values()}) == 18
    assert len({(look.marker, look.dash, look.colour) for look in looks.values()}) == 18
    text = checked(write_text_report(of, tmp_path, **ABOUT))
    key = text.partition('<ul class="key"')[2].partition("</ul>")[0]  # a narrow screen cuts off that of the figure
    assert key.count("<li>") == 18
    assert "Method 17" in (tmp_path / "figures" / "plane.svg").read_text(encoding="utf-8")


def test_a_pair_without_a_ratio_under_one_seed_has_that_of_the_others(tmp_path: Path) -> None:
    of = stream({"each": EACH})
    adapter = {"nuclear_norm": 1.0, "frobenius_norm": 1.0, "effective_rank": 1.0, "sparsity": 0.5, "zeros": 0.0}
    for seed, (rate, floor) in enumerate(((0.0, 0.0), (0.3, 0.2))):
        pair = {"first": 0, "second": 1, "collision_rate": rate, "collision_floor": floor, "row_cosine": 0.1,
                "update_cosine": 0.0}  # fmt: skip
        put(tmp_path, "each", seed, IN_TURN, pairs=[pair], adapters=[adapter] * 2, threshold=0.1)
    ratios = tabulate_texts(of, tmp_path).ratios["each"]
    assert ratios[0, 1] == ratios[1, 0] == pytest.approx(1.5)
    assert np.isnan(np.diag(ratios)).all()


NAME = "encoder.layer.{}.attention.self.query.weight"


def search(selections: int) -> DominantTickets:
    return DominantTickets(
        tasks=("yelp", "WiC"), strength=1e-4, seeds=(0, 1), controls=("random", "full", "head"),
        selections=tuple(Selection(share=share) for share in (0.25, 0.5, 0.75)[:selections]),
    )  # fmt: skip


def write_search(folder: Path, of: DominantTickets) -> None:
    counts = {"full": 40, "find": 16, "head": 0}
    scores = {"find": 0.5, "full": 0.9, "random": 0.6, "ticket": 0.8, "head": 0.1}
    for job in of.jobs():
        trained = counts.get(job.kind, 4 * (job.selection + 1))
        result: dict[str, Any] = {"score": scores[job.kind] + 0.01 * job.seed, "trained": trained, "seconds": 2.0}
        if job.kind == "find":
            result["kept"] = {NAME.format(0): 6, NAME.format(1): 2}
            g = torch.Generator().manual_seed(job.seed + 10 * (job.task == "WiC"))
            write_tensors(job.distances(folder), {NAME.format(k): torch.randn(4, 2, generator=g) for k in (0, 1)})
        write_json(job.path(folder), result)


def test_tickets_of_several_selections(tmp_path: Path) -> None:
    of = search(2)
    write_search(tmp_path, of)
    tables = tabulate_dominant(of, tmp_path)
    rows = {(r["task"], r["kind"], r["source"], r["selection"]): r for r in tables.scores.iter_rows(named=True)}
    assert rows["yelp", "ticket", "yelp", "50%"]["share"] == pytest.approx(8 / 40)
    assert rows["yelp", "ticket", "yelp", "50%"]["against_random"] == pytest.approx(0.2)
    assert rows["yelp", "random", "yelp", "50%"]["against_random"] is None  # less itself says nothing
    assert rows["yelp", "full", "", ""]["against_full"] is None
    moved = tables.kept.filter(tables.kept["task"] == "yelp")
    assert moved["share"].to_list() == [6 / 8, 2 / 8]
    assert "8<span>20%</span>" in checked(write_dominant_report(of, tmp_path, **ABOUT))
    drawn = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "figures").iterdir()}
    assert set(drawn) == {"scores", "scores-by-count", "overlap", "moved"}
    for selection in ("25%", "50%"):
        assert f"Ticket of {selection}" in drawn["overlap"]


def test_rows_and_columns_are_no_part_of_the_curves_of_single_weights(tmp_path: Path) -> None:
    of = replace(
        search(2), selections=(*search(2).selections, Selection(dimensions=1), Selection(dimensions=1, dims="columns"))
    )
    write_search(tmp_path, of)
    scores = tabulate_dominant(of, tmp_path).scores
    whole = dict(scores.select("selection", "whole").unique().iter_rows())
    assert whole == {"": "", "25%": "", "50%": "", "1 row": "rows", "1 column": "columns"}
    write_dominant_report(of, tmp_path, **ABOUT)
    drawn = (tmp_path / "figures" / "scores-by-count.svg").read_text(encoding="utf-8")
    for named in ("Whole rows", "Whole columns", "Random places", "Ticket of another task"):
        assert f">{named}<" in drawn
    rows_alone = replace(of, selections=of.selections[2:])
    write_search(tmp_path / "rows", rows_alone)
    write_dominant_report(rows_alone, tmp_path / "rows", **ABOUT)
    assert ">Random places<" in (tmp_path / "rows" / "figures" / "scores-by-count.svg").read_text(encoding="utf-8")


def test_without_a_training_of_all_weights_there_is_no_share(tmp_path: Path) -> None:
    of = replace(search(2), controls=("random",))
    write_search(tmp_path, of)
    assert set(tabulate_dominant(of, tmp_path).scores["share"]) == {None}
    assert "8</td>" in checked(write_dominant_report(of, tmp_path, **ABOUT))
    assert (tmp_path / "figures" / "scores-by-count.svg").exists()


def test_a_search_under_way_says_what_is_missing(tmp_path: Path) -> None:
    of = search(1)
    write_search(tmp_path, of)
    for job in of.jobs():
        if job.kind == "random" and job.seed == 1:
            job.path(tmp_path).unlink()
        if job.kind == "find":
            job.distances(tmp_path).unlink()
    text = checked(write_dominant_report(of, tmp_path, **ABOUT))
    assert "22 of 24 have finished" in text
    assert "yelp: Random places, 25% (1 of 2)" in text
    assert "No overlap of two tasks" in text
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"scores", "moved"}


def test_encoder_and_decoder_have_rows_of_their_own() -> None:
    names = [f"{part}.block.{k}.layer.0.SelfAttention.q.weight" for part in ("encoder", "decoder") for k in (0, 1)]
    values = dict(zip(names, (1.0, 2.0, 3.0, 4.0), strict=True))
    drawing = by_layer("map", "Map", {"": values}, "{:.0f}".format)
    assert drawing is not None
    for row in ("encoder layer 1", "decoder layer 2"):
        assert f">{row}<" in drawing.svg
    assert drawing.svg.index(">encoder layer 2<") < drawing.svg.index(">decoder layer 1<")
    assert "from 1 to 4, in the mean 2.5" in drawing.description
    assert by_layer("map", "Map", {"": {names[0]: float("nan")}}, "{:.0f}".format) is None


def test_experts_of_a_layer_have_columns_of_their_own() -> None:
    values = {f"model.layers.{k}.mlp.experts.{e}.up.weight": float(1 + 2 * k + e) for k in (0, 1) for e in (0, 1)}
    drawing = by_layer("map", "Map", {"": values}, "{:.0f}".format)
    assert drawing is not None
    assert "from 1 to 4, in the mean 2.5" in drawing.description


def test_all_at_once_alone_has_an_average_and_no_figure(tmp_path: Path) -> None:
    of = stream({"together": Recipe(label="Together", trains="adapter_one", tasks="together")})
    put(tmp_path, "together", 0, [[0.9, 0.7]])
    put(tmp_path, "together", 1, [[0.8, 0.6]])
    assert "<td>75.0<span>[70.0, 80.0]</span></td>" in checked(write_text_report(of, tmp_path, **ABOUT))
    assert not list((tmp_path / "figures").iterdir())
