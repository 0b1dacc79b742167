"""The page of a lottery-ticket experiment: whole, alone, the same each time, true to its results."""

from __future__ import annotations

import base64
import csv
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from perennial.report import NoResultsError
from perennial.report.tickets_page import ticket_drawings, ticket_summary, write_ticket_report
from perennial.report.tickets_tables import tabulate_tickets
from perennial.report.tickets_words import compared
from perennial.storage import write_json, write_tensors
from perennial.tickets.experiment import Experiment, Job
from perennial.tickets.find import Pruning
from perennial.tickets.masks import Masks, whole
from perennial.tickets.overlap import jaccard
from perennial.tickets.prune import select, shares
from perennial.tickets.training import Training

EXPERIMENT = Experiment(
    "lenet_300_100",
    "mnist",
    Training(2_000, 60, "adam", 1.2e-3, evaluate_every=100),
    Pruning({"*": 0.5}),
    rounds=2,
    seeds=(0, 1, 2),
    control_levels=(2,),
)
TEXTS = {
    "title": "Tickets <of> LeNet",
    "description": "One & two.\n\nThree.",
    "source": "Frankle and Carbin, 2019",
    "command": "perennial run tickets/made-up",
    "study_text": "title: Tickets\n",
}


def _results(job: Job) -> dict[str, Any]:
    stop = {"ticket": 1000 - 200 * job.level, "random_reinit": 1400, "random_mask": 1500}[job.kind] + 100 * job.seed
    early = {"ticket": 0.97 + 0.004 * job.level, "random_reinit": 0.96, "random_mask": 0.95}[job.kind]
    early += 0.001 * job.seed
    return {
        "early_stop": float(stop),
        "early_accuracy": early,
        "accuracy": early - 0.002,
        "training_loss": 0.01,
        "validation_loss": [0.1] * 20,
        "validation_accuracy": [early - 0.3 / (at + 1) for at in range(20)],
    }


def _build(directory: Path, jobs: list[Job]) -> Path:
    model = EXPERIMENT.make_model()
    share = shares(model, EXPERIMENT.pruning.rates)
    masks: dict[tuple[int, int], Masks] = {}
    for job in jobs:
        folder = job.folder(directory)
        if job.kind == "ticket":
            weights = {name: value.detach() + 2.0 for name, value in model.state_dict().items()}  # none is zero
            draw = torch.Generator().manual_seed(job.seed)
            before = masks.get((job.seed, job.level - 1), whole(model))
            scores = {name: torch.rand(mask.shape, generator=draw) for name, mask in before.items()}
            masks[job.seed, job.level] = before if job.level == 0 else select(scores, before, share)
            mine = masks[job.seed, job.level]
            write_tensors(folder / "masks.pt", mine)
            write_tensors(folder / "trained.pt", {n: w * mine[n] if n in mine else w for n, w in weights.items()})
        write_json(folder / "results.json", _results(job))
    return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = _build(tmp_path_factory.mktemp("tickets"), EXPERIMENT.jobs())
    write_ticket_report(EXPERIMENT, directory, **TEXTS)
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
    assert "Tickets &lt;of&gt; LeNet" in text
    assert "perennial run tickets/made-up" in text
    assert "unfinished" not in text
    for file in (finished / "tables").glob("*.csv"):
        assert base64.b64encode(file.read_bytes()).decode() in text


def test_figures_are_xml_on_the_page_and_drawings(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    drawings = ticket_drawings(EXPERIMENT, finished)
    assert [drawing.name for drawing in drawings] == [
        "tickets-early-stop",
        "tickets-early-accuracy",
        "tickets-accuracy",
        "tickets-learning-curves",
        "tickets-reinit-learning-curves",
        "tickets-mask-overlap",
        "tickets-mask-excess",
    ]
    for drawing in drawings:
        ET.fromstring(drawing.svg)
        assert (finished / "figures" / f"{drawing.name}.svg").read_text(encoding="utf-8") == drawing.svg
        assert drawing.svg.strip() in text


def test_the_same_results_give_the_same_bytes(finished: Path) -> None:
    def every() -> dict[str, bytes]:
        files = [finished / "report.html", *(finished / "figures").iterdir(), *(finished / "tables").iterdir()]
        return {file.name: file.read_bytes() for file in files}

    before = every()
    state = torch.get_rng_state()
    write_ticket_report(EXPERIMENT, finished, **TEXTS)
    assert every() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_summary_has_the_means(finished: Path) -> None:
    assert ticket_summary(EXPERIMENT, finished).rows(named=True) == [
        {
            "Weights %": "100",
            "Ticket accuracy %": "97.10",  # 97.0, 97.1, 97.2
            "Ticket early stop": "1,100",  # 1000, 1100, 1200
            "Random reinit accuracy %": "",
            "Random reinit early stop": "",
            "Random mask accuracy %": "",
            "Random mask early stop": "",
        },
        {
            "Weights %": "50.0",
            "Ticket accuracy %": "97.50",
            "Ticket early stop": "900",
            "Random reinit accuracy %": "",
            "Random reinit early stop": "",
            "Random mask accuracy %": "",
            "Random mask early stop": "",
        },
        {
            "Weights %": "25.0",
            "Ticket accuracy %": "97.90",
            "Ticket early stop": "700",
            "Random reinit accuracy %": "96.10",
            "Random reinit early stop": "1,500",
            "Random mask accuracy %": "95.10",
            "Random mask early stop": "1,600",
        },
    ]


def test_changes_are_paired_by_replicate(finished: Path) -> None:
    tables = tabulate_tickets(EXPERIMENT, finished)
    last = tables.levels.filter((pl.col("kind") == "ticket") & (pl.col("level") == 2)).row(0, named=True)
    changes = [600 / 1000 - 1, 700 / 1100 - 1, 800 / 1200 - 1]
    assert last["early_stop_change_mean"] == pytest.approx(sum(changes) / 3)
    assert (last["early_stop_change_low"], last["early_stop_change_high"]) == pytest.approx((-0.4, -1 / 3))
    assert last["early_accuracy_change_mean"] == pytest.approx(0.008)
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert "early stop is 37% earlier in each of 3 replicates (33% to 40%)" in text
    assert "earlier in 3 of 3" in text


def test_learning_curves_average_evaluations(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tabulate_tickets(EXPERIMENT, finished).validation.row(1, named=True)
    assert (first["kind"], first["level"], first["iteration"], first["replicates"]) == ("ticket", 0, 200.0, 3)
    assert (first["mean"], first["low"], first["high"]) == pytest.approx((0.971 - 0.15, 0.97 - 0.15, 0.972 - 0.15))
    monkeypatch.setattr("perennial.report.tickets_tables.POINTS", 7)
    mine = tabulate_tickets(EXPERIMENT, finished).validation.filter(kind="ticket", level=0)
    assert mine["iteration"].to_list() == [200, 500, 800, 1100, 1400, 1700, 1950]
    assert mine["evaluations"].to_list() == [3, 3, 3, 3, 3, 3, 2]
    assert mine["mean"][0] == pytest.approx(0.971 - (0.3 + 0.15 + 0.1) / 3)


def test_sparsity_is_counted_and_compared_with_the_schedule(finished: Path, tmp_path: Path) -> None:
    tables = tabulate_tickets(EXPERIMENT, finished)
    total = tables.sparsity.filter(pl.col("layer") == "all").sort("level")
    assert total["scheduled"].to_list() == [266_200, 133_100, 66_550]
    assert total["kept_low"].to_list() == total["kept_high"].to_list() == total["scheduled"].to_list()
    assert "counts are those of the schedule" in (finished / "report.html").read_text(encoding="utf-8")

    other = _build(tmp_path, [Job(0, "ticket", 0), Job(0, "ticket", 1)])
    place = Job(0, "ticket", 1).folder(other) / "trained.pt"
    weights = torch.load(place, weights_only=True)
    name = next(iter(torch.load(place.with_name("masks.pt"), weights_only=True)))
    weights[name][weights[name] == 0] = 1.0
    write_tensors(place, weights)
    text = write_ticket_report(EXPERIMENT, other, **TEXTS).read_text(encoding="utf-8")
    assert "2 of 8 counts differ from the schedule" in text


def test_overlap_is_that_of_the_masks(finished: Path) -> None:
    masks = [torch.load(Job(s, "ticket", 2).folder(finished) / "masks.pt", weights_only=True) for s in (0, 2)]
    shared = jaccard(*masks)
    with (finished / "tables" / "tickets-mask-overlap.csv").open(encoding="utf-8") as file:
        found = {(r["level"], r["layer"], r["first"], r["second"]): r for r in csv.DictReader(file)}
    assert float(found["2", "all", "0", "2"]["jaccard"]) == shared.overall.jaccard
    assert float(found["2", "all", "0", "2"]["floor"]) == shared.overall.floor
    assert len(found) == 2 * 3 * 4  # levels, pairs, layers and all of them


def test_unfinished_run_says_how_far_it_is(tmp_path: Path) -> None:
    with pytest.raises(NoResultsError, match="no finished training"):
        write_ticket_report(EXPERIMENT, tmp_path, **TEXTS)
    _build(tmp_path, [Job(0, "ticket", 0)])
    text = write_ticket_report(EXPERIMENT, tmp_path, **TEXTS).read_text(encoding="utf-8")
    assert "1 of 15 trainings" in text
    assert ticket_drawings(EXPERIMENT, tmp_path) == []

    _build(tmp_path, [Job(0, "ticket", 0), Job(1, "ticket", 0), Job(0, "ticket", 1)])
    diverged = _results(Job(1, "ticket", 0)) | {"early_stop": -1.0, "early_accuracy": float("nan")}
    write_json(Job(1, "ticket", 0).folder(tmp_path) / "results.json", diverged)
    text = write_ticket_report(EXPERIMENT, tmp_path, **TEXTS).read_text(encoding="utf-8")
    assert "Diverged, so that there is no early stop; left out of its means: Ticket at 100%, replicate 1." in text
    assert "No results yet: Random reinit, Random mask." in text
    assert "Ticket at 100, 50.0%" in text
    assert ticket_summary(EXPERIMENT, tmp_path)["Ticket early stop"].to_list() == ["1,000 (1 of 3)", "800 (1 of 3)"]


def test_comparisons_claim_no_more_than_holds() -> None:
    def say(*values: float) -> str:
        return compared(values, "later", "earlier", lambda value: f"{100 * value:.0f}%")

    assert say(-0.3, -0.2, -0.4) == "30% earlier in each of 3 replicates (20% to 40%)"
    assert say(-0.3, 0.1, -0.4) == "earlier in 2 of 3 replicates, on average 20% earlier (40% earlier to 10% later)"
    assert say(-0.3, 0.0) == "earlier in 1 of 2 replicates, on average 15% earlier (30% earlier to no change)"
    assert say(0.0, 0.0) == "the same in each of 2 replicates"
    assert say(0.25) == "25% later (one replicate)"
