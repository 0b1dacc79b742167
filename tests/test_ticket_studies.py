"""Studies of tickets: what they may say, and how they run, stop and go on."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from perennial.cli import app
from perennial.parallel import run_jobs
from perennial.runs.supply import FRESH, looks_of
from perennial.storage import RunError
from perennial.streams import PermutedMNIST
from perennial.streams.files import flat_images, images
from perennial.studies import StudyError, SupplyStudy, TicketStudy, load
from perennial.tickets.experiment import Job, rows

DATA = Path(os.environ.get("PERENNIAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_mnist = pytest.mark.skipif(
    not (DATA / "mnist" / "train-images-idx3-ubyte.gz").exists(),
    reason="MNIST is not here: set PERENNIAL_DATA to a folder that holds mnist/",
)
needs_cifar = pytest.mark.skipif(
    not (DATA / "cifar10" / "train.parquet").exists(),
    reason="CIFAR-10 is not here: set PERENNIAL_DATA to a folder that holds cifar10/",
)


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERENNIAL_DATA", str(DATA))


# --- what studies say ---------------------------------------------------------------------------------------------


def test_the_lenet_study_is_the_papers() -> None:
    study = load("tickets/lenet-mnist")
    assert isinstance(study, TicketStudy)
    tickets = study.tickets
    training = tickets.training
    assert (training.iterations, training.batch_size, training.optimizer, training.lr) == (50_000, 60, "adam", 1.2e-3)
    assert (training.evaluate_every, training.validation) == (100, 5_000)
    assert (dict(tickets.pruning.rates), tickets.rounds) == ({"output": 0.1, "*": 0.2}, 15)
    assert len(tickets.seeds) >= 3
    assert set(tickets.controls) == {"random_reinit", "random_mask"}


def test_settings_of_ticket_studies_from_the_command_line() -> None:
    study = load("tickets/lenet-mnist", {"seeds": 2, "steps": 500, "training.lr": 0.01, "tickets.rounds": 15})
    assert isinstance(study, TicketStudy)
    assert (study.tickets.seeds, study.tickets.training.iterations) == ((0, 1), 500)
    assert study.tickets.training.lr == 0.01
    supply = load("tickets/plasticity", {"seeds": 2, "rounds": 3, "bin": 5000})
    assert isinstance(supply, SupplyStudy)
    assert (supply.life.seeds, supply.supply.rounds, supply.life.bin) == (2, 3, 5000)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("lenet-mnist", {"training.learning_rate": 3}, "'learning_rate' is not a key here"),
        ("lenet-mnist", {"round": 3}, "did you mean 'rounds'"),
        ("lenet-mnist", {"network": "lenet"}, "there is no network 'lenet'"),
        ("lenet-mnist", {"control_levels": [16]}, "control_levels has 16"),
        ("lenet-mnist", {"controls": ["luck"]}, "no control 'luck'"),
        ("lenet-mnist", {"after": "fine_tune"}, "after is 'fine_tune'"),
        ("lenet-mnist", {"after": "continue"}, "after is 'continue'"),
        ("lenet-mnist", {"seeds": [1, 1]}, "different whole numbers"),
        ("lenet-mnist", {"training.optimizer": "adagrad"}, "optimizer is 'adagrad'"),
        ("lenet-mnist", {"steps": 50}, "evaluate_every is 100"),
        ("lenet-mnist", {"rounds": "many"}, "rounds is 'many'"),
        ("plasticity", {"checkpoints": [0, 5]}, "must end a task"),
        ("plasticity", {"steps": 10_000}, "must be the last of supply.checkpoints"),
        ("plasticity", {"stream": {"name": "permuted_digits"}}, "whole tasks"),
        ("plasticity", {"life.network.hidden": [[5], [6]]}, "grid"),
        ("plasticity", {"examples": 10}, "examples is 10"),
    ],
)
def test_mistakes_in_ticket_studies_are_named(name: str, changes: dict[str, object], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        load(f"tickets/{name}", changes)


def test_every_network_with_a_look_is_looked_at() -> None:
    study = load("tickets/plasticity", {"seeds": 2})
    assert isinstance(study, SupplyStudy)
    looks = looks_of(study)
    methods, steps = len(study.life.methods), len(study.supply.checkpoints)
    assert len(looks) == len(set(looks)) == 2 * (steps + methods * (steps - 1))
    assert sum(look.method == FRESH for look in looks) == 2 * steps


# --- data ---------------------------------------------------------------------------------------------------------


@needs_mnist
def test_a_whole_task_is_what_the_stream_shows() -> None:
    stream = PermutedMNIST(task_steps=300)
    feed = stream.open([0, 5], torch.device("cpu"))
    inputs, classes = stream.whole_task(5, 2)
    shown = feed.examples(600, 300)
    rows_shown = feed.order(0)[600:900, 1]
    assert torch.equal(inputs[rows_shown], shown.inputs[:, 0, :, 1])
    assert torch.equal(classes[rows_shown], shown.targets[:, 0, 1])
    assert stream.whole_task(5, 2, "test")[0].shape == (10_000, 784)


@needs_mnist
def test_the_test_set_of_mnist() -> None:
    pixels, classes = flat_images("mnist", "test")
    assert (pixels.shape, pixels.dtype) == ((10_000, 784), torch.uint8)
    assert classes.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@needs_cifar
@pytest.mark.slow
def test_cifar10() -> None:
    pixels, classes = images("cifar10", "test")
    assert (pixels.shape, pixels.dtype) == ((10_000, 3, 32, 32), torch.uint8)
    assert classes.bincount().tolist() == [1000] * 10
    assert images("cifar10").pixels.shape == (50_000, 3, 32, 32)


def test_absent_and_wrong_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import polars

    images.cache_clear()
    monkeypatch.setenv("PERENNIAL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is needed, but there is no .*train\.parquet"):
        images("cifar10")
    (tmp_path / "cifar10").mkdir()
    path = tmp_path / "cifar10" / "train.parquet"
    polars.DataFrame({"image": [1]}).write_parquet(path)
    with pytest.raises(ValueError, match=r"has the columns image; one must be label"):
        images("cifar10")
    polars.DataFrame({"img": [{"bytes": b""}], "label": [1]}).write_parquet(path)
    with pytest.raises(ValueError, match=r"row 0 holds no picture"):
        images("cifar10")


# --- running ------------------------------------------------------------------------------------------------------

SMALL = ["--seeds", "2", "--steps", "200", "--set", "rounds=2", "--set", "control_levels=[2]"]


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "perennial.cli", "run", "tickets/lenet-mnist", "--out", str(out), *SMALL, *more]


@pytest.mark.slow
@needs_mnist
def test_a_search_end_to_end(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, command(tmp_path / "run", "--workers", "2")[3:])
    assert result.exit_code == 0, result.output
    study = load(str(tmp_path / "run" / "study.yaml"))
    assert isinstance(study, TicketStudy)
    found = rows(study.tickets, tmp_path / "run")
    assert {(row["kind"], row["level"], row["seed"]) for row in found} == {
        *(("ticket", level, seed) for level in range(3) for seed in range(2)),
        *((kind, 2, seed) for kind in ("random_reinit", "random_mask") for seed in range(2)),
    }
    assert all(row["accuracy"] > 0.8 for row in found)
    assert [round(row["percent"], 1) for row in found if row["kind"] == "ticket"] == [100, 100, 80, 80, 64.1, 64.1]
    assert (tmp_path / "run" / "report.html").exists()
    assert "64.1" in result.output
    masks = torch.load(Job(0, "ticket", 2).folder(tmp_path / "run") / "masks.pt")
    assert [int(m.sum()) for m in masks.values()] == [150_528, 19_200, 810]
    other = CliRunner().invoke(app, ["run", "tickets/lenet-mnist", "--out", str(tmp_path / "run")])
    assert other.exit_code == 1
    assert "holds a run of another study" in other.output


@needs_mnist
@pytest.mark.slow
def test_a_killed_search_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """Killed with all its processes, and the parent alone, whose workers must notice."""
    done = subprocess.run(command(tmp_path / "whole"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for kill in (
        lambda p: os.killpg(p.pid, signal.SIGKILL),
        lambda p: p.kill(),
        lambda p: p.send_signal(signal.SIGINT),
    ):
        run = subprocess.Popen(command(tmp_path / "killed"), start_new_session=True)
        time.sleep(20)
        kill(run)
        run.wait(60)
        deadline = time.monotonic() + 60
        while _alive(run.pid) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not _alive(run.pid), "workers outlived their parent"
    done = subprocess.run(command(tmp_path / "killed"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("results.json")]
    assert len(files) == 10
    for name in files:
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "killed" / name).read_text()


def _alive(group: int) -> bool:
    """Whether a process of the group is there that would do work: multiprocessing's helpers linger for a moment."""
    found = subprocess.run(["pgrep", "-g", str(group), "-f", "spawn_main"], capture_output=True, check=False)
    return found.returncode == 0


@needs_mnist
@pytest.mark.slow
def test_tickets_along_a_stream_end_to_end(tmp_path: Path) -> None:
    small = "stream.task_steps=300 bin=300 steps=600 checkpoints=[0,300,600] training.iterations=100 rounds=1"
    more = [word for setting in small.split() for word in ("--set", setting)]
    call = [
        "run",
        "tickets/plasticity",
        "--out",
        str(tmp_path / "run"),
        "--seeds",
        "2",
        "--set",
        "examples=2500",
        *more,
    ]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    study = load(str(tmp_path / "run" / "study.yaml"))
    assert isinstance(study, SupplyStudy)
    looks = [json.loads(look.path(tmp_path / "run").read_text()) for look in looks_of(study)]
    assert len(looks) == 2 * (3 + 3 * 2)
    for look in looks:
        assert len(look["ticket"]) == len(look["percent"]) == 2
        assert len(look["control"]) == len(look["overlap"]) == 1
        assert 0.3 < look["accuracy"] < 1
        assert 1 <= look["effective_rank"] <= 100
    online = json.loads((tmp_path / "run" / "lives" / "backprop-0" / "online.json").read_text())
    assert len(online) == 2
    again = CliRunner().invoke(app, call)
    assert again.exit_code == 0, again.output


# --- jobs in processes --------------------------------------------------------------------------------------------


def write_after(folder: Path, job: int, *, pulse: Callable[[int], None]) -> None:
    pulse(1)
    if job == 99:
        raise ValueError("no such number")
    assert job == 0 or (folder / str(job - 1)).exists()
    (folder / str(job)).write_text("done")


def test_jobs_run_when_what_they_need_is_there(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    finished: list[int] = []
    run_jobs(
        [2, 1, 0],
        functools.partial(write_after, tmp_path),
        ready=lambda job: job == 0 or (tmp_path / str(job - 1)).exists(),
        workers=2,
        progress=lambda job, step: heard.append((job, step)),
        finished=finished.append,
    )
    assert finished == [0, 1, 2]
    assert set(heard) == {(0, 1), (1, 1), (2, 1)}
    with pytest.raises(RunError, match="99: ValueError: no such number"):
        run_jobs([99], functools.partial(write_after, tmp_path), workers=1)
    with pytest.raises(RunError, match="nothing makes 5 ready"):
        run_jobs([5], functools.partial(write_after, tmp_path), ready=lambda job: False, workers=1)


@needs_mnist
@pytest.mark.slow
def test_nine_rounds_of_lenet() -> None:
    """The reference's check, at a tenth of the paper's iterations: accuracy within half a point of the whole network,
    an early stop no later, and both better than with weights drawn anew."""
    from perennial.tickets import controls, find_ticket, fit
    from perennial.tickets.experiment import DATA as DATA_SETS

    study = load("tickets/lenet-mnist", {"steps": 5000})
    assert isinstance(study, TicketStudy)
    tickets = study.tickets
    split = DATA_SETS["mnist"]().split(5000, 0)
    train = functools.partial(fit, split=split, training=tickets.training)
    ticket = find_ticket(tickets.make_model, train, prune=tickets.pruning, rounds=9)
    whole, last = ticket.levels[0].results, ticket.levels[-1].results
    reinit = controls(ticket, tickets.make_model, train, kinds=["random_reinit"])[0]
    assert last["early_accuracy"] > whole["early_accuracy"] - 0.005
    assert last["early_stop"] <= whole["early_stop"]
    assert last["early_accuracy"] > float(reinit["early_accuracy"])
    assert min(last["validation_loss"]) < min(reinit["validation_loss"])  # type: ignore[type-var]
