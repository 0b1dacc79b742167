"""Reports of language-model studies, on results made up by hand."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from perennial.compared import Job
from perennial.lm import DominantTickets, Recipe, Selection, TextStream, TextTraining
from perennial.lm.dominant import Job as Training
from perennial.report.lm_page import dominant_summary, text_summary, write_dominant_report, write_text_report
from perennial.report.lm_tables import tabulate_dominant, tabulate_texts
from perennial.report.load import NoResultsError
from perennial.storage import write_json, write_tensors

ABOUT = {"title": "Made up", "description": "One.\n\nTwo <b>.", "source": "Nobody", "command": "perennial run x"}
SCORES: dict[str, Any] = {
    "nlora": [[0.8, None], [0.5, 0.6]],
    "alone": [[0.8, None], [None, 0.7]],
    "together": [[0.9, 0.8]],
}


def stream(seeds: tuple[int, ...] = (0, 1)) -> TextStream:
    methods = {
        "nlora": Recipe(label="N-LoRA", penalties={"nlora": {"strength": 1e-5}}),
        "alone": Recipe(label="Alone", tasks="alone", trains="adapter_one"),
        "together": Recipe(label="Together", tasks="together", trains="adapter_one"),
    }
    return TextStream(tasks=("yelp", "WiC"), methods=methods, seeds=seeds, training=TextTraining(steps=2))


def sequence(method: str, shift: float = 0.0) -> dict[str, Any]:
    scores = [[None if s is None else s + shift for s in row] for row in SCORES[method]]
    found = {"scores": scores, "losses": [[2.0, 1.0], [1.5, 0.5]], "seconds": [4.0, 8.0], "finished": True}
    if method == "alone":
        found["losses"] = [[2.0, 1.0], [1.0, 0.2]]
    if method == "nlora":
        found["pairs"] = [
            {"first": 0, "second": 1, "collision_rate": 0.02, "collision_floor": 0.04, "exact_rate": 1.0,
             "exact_floor": 1.0, "row_overlap": 3.0, "row_cosine": 0.1, "update_cosine": -0.2}
        ]  # fmt: skip
        adapter = {"nuclear_norm": 2.0, "frobenius_norm": 1.0, "effective_rank": 3.0, "sparsity": 0.8, "zeros": 0.25}
        found |= {"adapters": [adapter, adapter], "threshold": 0.1}
    return found


def write_streams(folder: Path, of: TextStream, methods: tuple[str, ...] = ("nlora", "alone", "together")) -> None:
    for job in of.jobs():
        if job.method in methods:
            write_json(job.folder(folder) / "results.json", sequence(job.method, 0.1 * job.seed))


def checked(page: Path) -> str:
    """The page's text, which loads nothing and whose drawings are well-formed."""
    text = page.read_text(encoding="utf-8")
    assert "Two &lt;b&gt;." in text
    for start in ('src="', "@import", "url(http", '<link rel="stylesheet"', "<script src"):
        assert start not in text
    for drawing in (page.parent / "figures").glob("*.svg"):
        ET.fromstring(drawing.read_text(encoding="utf-8"))
    return text


def test_measures_of_sequences_by_hand(tmp_path: Path) -> None:
    write_streams(tmp_path, stream())
    tables = tabulate_texts(stream(), tmp_path)
    row, alone, together = tables.methods.iter_rows(named=True)
    assert row["average"] == pytest.approx(0.55 + 0.05)
    assert row["forgetting"] == pytest.approx(0.3)
    assert row["learning"] == pytest.approx(0.7 + 0.05)
    assert row["against_alone"] == pytest.approx(-0.05)
    assert row["loss_against_alone"] == pytest.approx(1.25 - 1.05)
    assert row["seconds"] == 3.0
    assert row["learning_low"] <= row["learning"] <= row["learning_high"]
    assert (alone["average"], alone["learning"]) == (None, pytest.approx(0.8))
    assert (together["average"], together["learning"]) == (pytest.approx(0.9), None)
    (pair,) = tables.collisions.iter_rows(named=True)
    assert (pair["collision_ratio"], pair["sparsity"], pair["zeros"]) == pytest.approx((0.5, 0.8, 0.25))
    learned = tables.tasks.filter(tables.tasks["method"] == "nlora")
    assert learned["against_alone"].to_list() == pytest.approx([0.0, -0.1])
    assert tables.finished == 6


def test_the_page_of_a_stream(tmp_path: Path) -> None:
    of = stream()
    write_streams(tmp_path, of)
    page = write_text_report(of, tmp_path, **ABOUT, study_text="texts: {}")
    text = checked(page)
    assert "This run is unfinished" not in text
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == {"plane", "accuracy-matrix", "collisions", "learning"}
    for shown in ("N-LoRA", "60", "30.0", "0.5", "perennial run x"):
        assert shown in text
    assert {p.name for p in (tmp_path / "tables").iterdir()} == {"methods.csv", "collisions.csv", "tasks.csv"}
    write_text_report(of, tmp_path, **ABOUT, study_text="texts: {}")
    assert page.read_text(encoding="utf-8") == text
    summary = text_summary(of, tmp_path)
    assert summary["Method"].to_list() == ["N-LoRA", "Alone", "Together"]
    assert summary["Average at the end, %"][0].startswith("60")


def test_an_unfinished_stream_is_reported_as_far_as_it_has_come(tmp_path: Path) -> None:
    of = stream()
    with pytest.raises(NoResultsError, match="no finished sequence"):
        write_text_report(of, tmp_path, **ABOUT)
    begun = sequence("nlora") | {"finished": False}
    write_json(Job("nlora", 0).folder(tmp_path) / "results.json", begun)
    with pytest.raises(NoResultsError, match="no finished sequence"):
        write_text_report(of, tmp_path, **ABOUT)
    write_json(Job("nlora", 1).folder(tmp_path) / "results.json", sequence("nlora"))
    text = checked(write_text_report(of, tmp_path, **ABOUT))
    assert "1 of 6 have finished" in text.replace("\n", " ")
    assert not (tmp_path / "figures" / "learning.svg").exists()  # nothing learned alone to compare with
    assert text_summary(of, tmp_path)["Learning accuracy less alone, points"].to_list() == ["\N{EN DASH}"]


def search() -> DominantTickets:
    return DominantTickets(
        tasks=("yelp", "WiC"), strength=1e-4, selections=(Selection(share=0.5),), seeds=(0, 1),
        controls=("random", "full"),
    )  # fmt: skip


def write_search(folder: Path) -> None:
    scores = {"find": 0.5, "full": 0.9, "random": 0.6, "ticket": 0.8}
    name = "encoder.layer.0.attention.self.query.weight"
    for job in search().jobs():
        moved = job.kind == "ticket" and job.source != job.task
        result: dict[str, Any] = {
            "score": scores[job.kind] - 0.1 * moved + 0.01 * job.seed, "trained": 4, "losses": [1.0], "seconds": 2.0
        }  # fmt: skip
        if job.kind == "find":
            result["kept"] = {name: 6}
            g = torch.Generator().manual_seed(job.seed + 10 * (job.task == "WiC"))
            write_tensors(job.distances(folder), {name: torch.randn(4, 2, generator=g)})
        write_json(job.path(folder), result)


def test_scores_of_tickets_by_hand_and_their_page(tmp_path: Path) -> None:
    with pytest.raises(NoResultsError, match="no finished training"):
        write_dominant_report(search(), tmp_path, **ABOUT)
    write_search(tmp_path)
    tables = tabulate_dominant(search(), tmp_path)
    rows = {(r["task"], r["kind"], r["source"]): r for r in tables.scores.iter_rows(named=True)}
    moved = rows["yelp", "ticket", "WiC"]
    assert moved["score"] == pytest.approx(0.705)
    assert (moved["against_random"], moved["against_full"]) == pytest.approx((0.1, -0.2))
    assert rows["yelp", "full", ""]["against_random"] is None
    overall = tables.overlap.filter(tables.overlap["matrix"] == "")
    assert overall["relation"].to_list() == ["other seed", "other task"] or set(overall["relation"]) == {
        "other seed",
        "other task",
    }
    page = write_dominant_report(search(), tmp_path, **ABOUT)
    text = checked(page)
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == {"scores", "overlap", "moved"}
    for shown in ("Ticket of another task", "Random places", "layer 1", "attention query"):
        assert shown in text
    write_dominant_report(search(), tmp_path, **ABOUT)
    assert page.read_text(encoding="utf-8") == text
    assert "yelp: Ticket of another task, 50%" in dominant_summary(search(), tmp_path)["Trained"].to_list()


def test_matrices_without_a_weight_of_the_ticket_have_no_overlap(tmp_path: Path) -> None:
    write_search(tmp_path)
    for job in search().jobs():
        if job.kind == "find":
            weights = {f"encoder.layer.{k}.output.dense.weight": torch.full((4, 2), float(1 - k)) for k in (0, 1)}
            write_tensors(job.distances(tmp_path), weights)
    checked(write_dominant_report(search(), tmp_path, **ABOUT))
    rows = tabulate_dominant(search(), tmp_path).overlap
    assert rows.filter(rows["matrix"].str.contains("layer.1"))["iou"].to_list() == [None, None]


def test_the_command_line_knows_both(tmp_path: Path) -> None:
    from perennial.cli_report import summary_table, write_report
    from perennial.studies import as_yaml, load

    study = load("lm/order1", {"texts.tasks": ["yelp", "WiC"], "seeds": 1})
    (tmp_path / "study.yaml").write_text(as_yaml(study))
    for method in ("nlora", "alone"):
        write_json(Job(method, 0).folder(tmp_path) / "results.json", sequence(method))
    assert "Four text tasks" in write_report(tmp_path).read_text(encoding="utf-8")
    assert summary_table(tmp_path).height == 2
    other = tmp_path / "other"
    other.mkdir()
    dominant = load(
        "lm/dominant-ticket",
        {"tasks": ["yelp", "WiC"], "seeds": [0, 1], "controls": ["random", "full"], "selections": [{"share": 0.5}]},
    )
    (other / "study.yaml").write_text(as_yaml(dominant))
    write_search(other)
    assert json.loads(Training(0, "find", "yelp", "yelp").path(other).read_text())["score"] == 0.5
    assert "Dominant winning tickets" in write_report(other).read_text(encoding="utf-8")
    assert summary_table(other).height > 4
