"""Run directories: whole, resumable, killed at any moment; and the command line around them."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars
import pytest
import torch
from typer.testing import CliRunner

from perennial.cli import app
from perennial.runs import RunError, execute, plan
from perennial.runs.directory import JobFolder
from perennial.runs.plan import lanes_per_program, make_plan, programs
from perennial.storage import write
from perennial.studies import load, stream_of, variants_of

SMALL = """\
stream: {name: slowly_changing_regression, flip_after: 500}
network: {name: linear}
steps: 6000
bin: 1500
measure_every: 3000
seeds: 3
methods:
  linear: {label: Linear learner, rule: {name: sgd, lr: [0.01, 1e30]}}
"""
"""One program that compiles fast; half of its lanes diverge."""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def command(study: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "perennial.cli", "run", str(study), "--out", str(out), "--workers", "1", *more]


def run_cli(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_a_run_end_to_end(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = subprocess.run(command(study, out), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    results = polars.read_parquet(out / "results.parquet")
    assert results.columns == ["part", "method", "settings", "seed", "metric", "step", "value"]
    assert set(results["metric"]) == {"online_loss", "weight_magnitude"}
    assert results.filter(metric="online_loss")["step"].unique().sort().to_list() == [1500, 3000, 4500, 6000]
    assert results.filter(metric="weight_magnitude")["step"].unique().sort().to_list() == [3000, 6000]
    fine = results.filter(settings="rule.lr=0.01")
    assert fine["value"].is_finite().all()
    lanes = polars.read_parquet(out / "lanes.parquet")
    assert lanes.filter(settings="rule.lr=1e+30")["diverged"].is_not_null().all()
    assert lanes.filter(settings="rule.lr=0.01")["diverged"].is_null().all()
    assert (out / "report.html").stat().st_size > 10_000
    environment = json.loads((out / "environment.json").read_text())
    assert environment["finished"]
    before = {p: p.stat().st_mtime_ns for p in (out / "jobs").rglob("*") if p.is_file()}
    same = ("run", str(study), "--out", str(out), "--workers", "1")  # no process of its own: importing torch takes long
    code, output = run_cli(*same)
    assert code == 0, output
    assert before == {p: p.stat().st_mtime_ns for p in (out / "jobs").rglob("*") if p.is_file()}

    code, output = run_cli(*same, "--seeds", "2")
    assert code == 1
    assert "another study" in " ".join(output.split())
    assert "--no-resume" in output


def processes_under(parent: int) -> list[int]:
    """The processes that one has started, and what these have started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [pid for child in map(int, children) for pid in (child, *processes_under(child))]


def is_there(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are found in /proc")
@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_goes_on_when_the_command_is_killed(kill: signal.Signals, study: Path, tmp_path: Path) -> None:
    """Not even work that was handed out already: a pool gives a worker its next job before it asks."""
    methods = "".join(f"  {name}: {{rule: {{name: {name}, lr: 0.01}}}}\n" for name in ("adam", "pgd"))
    study.write_text(SMALL.replace("6000", "30000000").replace("linear}", "mlp}", 1) + methods)
    out = tmp_path / "run"
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command(study, out, "--save-every", "0.5"), stdout=quiet, stderr=quiet)
    try:
        deadline = time.monotonic() + 120
        while not list(out.glob("jobs/*/checkpoint-*.pt")) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert list(out.glob("jobs/*/checkpoint-*.pt"))
        started = processes_under(process.pid)
        assert len(started) >= 2  # who passes messages, and a worker
        process.send_signal(kill)
        process.wait()
        deadline = time.monotonic() + 60
        while any(map(is_there, started)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert [pid for pid in started if is_there(pid)] == []
    finally:
        process.kill()


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_bytes(study: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    study.write_text(SMALL.replace("6000", "300000").replace("linear}", "mlp}", 1))
    options = ("--save-every", "0.2")
    subprocess.run(command(study, whole, *options), check=True, capture_output=True)
    rng = random.Random(3)
    kills = 0
    while True:
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(command(study, killed, *options), stdout=quiet, stderr=quiet)
        try:
            process.wait(timeout=rng.uniform(3, 14))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0
        break
    assert kills >= 2
    for name in ("results.parquet", "lanes.parquet"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(study: Path, tmp_path: Path) -> None:
    study.write_text(SMALL.replace("6000", "30000000"))
    out = tmp_path / "run"
    process = subprocess.Popen(command(study, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    manifests = out / "jobs"
    time.sleep(25)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Run the same command again to go on" in " ".join(errors.split())
    assert "Traceback" not in errors
    saved = [json.loads(p.read_text()) for p in manifests.rglob("manifest.json")]
    assert saved
    assert all(0 < m["step"] < 30_000_000 for m in saved)


def test_results_and_state_are_replaced_together(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    row = {"part": "p", "method": "m", "settings": "", "seed": 0, "metric": "online_loss", "step": 10, "value": 0.5}
    folder.save({"w": torch.ones(2)}, [row], step=10)
    # A kill between the files of the next save leaves new files that no manifest names.
    (tmp_path / "segment-000000000020.parquet").write_bytes(b"torn")
    (tmp_path / "checkpoint-000000000020.pt").write_bytes(b"torn")
    again = JobFolder(tmp_path)
    state = again.load()
    assert state is not None
    assert torch.equal(state["w"], torch.ones(2))
    assert again.rows()["step"].to_list() == [10]
    again.save({"w": torch.zeros(2)}, [{**row, "step": 20}], step=20)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-000000000020.pt",
        "manifest.json",
        "segment-000000000010.parquet",
        "segment-000000000020.parquet",
    ]
    assert JobFolder(tmp_path).rows()["step"].to_list() == [10, 20]


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    folder.save({"w": torch.ones(1)}, [], step=1)
    torch.save({"w": Path("x")}, tmp_path / folder.manifest["checkpoint"])
    with pytest.raises(Exception, match="weights_only"):
        folder.load()


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    write(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"No space left on device.*Nothing written before is lost"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_one(study: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RunError, match="could not be written"):
        execute(load(str(study)), blocked / "run", workers=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="holds no run"):
        execute(load(str(study)), tmp_path / "full", workers=1)


def test_lanes_of_one_structure_share_a_program() -> None:
    found = programs(load("demo", {"seeds": 2}))
    sizes = sorted(len(lanes) for _, lanes in found)
    assert len(found) == 12  # backprop and L2 differ in a number only
    assert sizes == [2] * 10 + [4] * 2


@pytest.mark.slow
def test_plan_covers_every_lane_once() -> None:
    study = load("demo", {"seeds": 3})
    for workers in (1, 2, 40):
        jobs = make_plan(study, workers, torch.device("cpu"))
        lanes = [(job.part, *lane) for job in jobs for lane in job.lanes]
        assert len(lanes) == len(set(lanes)) == 2 * 7 * 3
        assert (len(jobs) > 12) == (workers == 40)


def test_large_networks_run_one_at_a_time() -> None:
    part = load("permuted-digits", {"network.hidden": [2000, 2000]}).parts["main"]
    variant = variants_of(part, "main", "")[0]
    assert lanes_per_program(variant, stream_of(part, "main"), 10, torch.device("cpu")) == 1


@pytest.mark.parametrize(("seconds", "widths", "best"), [
    ({1: 2e-3, 8: 1e-3}, [1], 1),  # so long that what lanes could save together does not count
    ({1: 3e-4, 8: 6e-4, 20: 1e-4}, [1, 8], 1),
    ({1: 3e-4, 8: 2e-4, 20: 1e-4}, [1, 8, 20], 20),
])  # fmt: skip
def test_no_more_lanes_are_tried_than_can_pay(
    seconds: dict[int, float], widths: list[int], best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = load("permuted-digits", {"network.hidden": [300, 300]}).parts["main"]
    variant = variants_of(part, "main", "")[0]
    tried = []

    def timed(variant: Any, stream: Any, width: int) -> float:
        tried.append(width)
        return seconds[width]

    monkeypatch.setenv("PERENNIAL_CACHE", str(tmp_path))
    monkeypatch.setattr(plan, "_seconds_per_lane_step", timed)
    for _ in range(2):  # the second time it is remembered
        assert lanes_per_program(variant, stream_of(part, "main"), 20, torch.device("cpu")) == best
    assert tried == widths


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "demoo"], "did you mean 'demo'?"),
        (["run", "demo", "--seeds", "0"], "--seeds: parts.regression.seeds is 0; a study needs at least one seed"),
        (["run", "demo", "--set", "digits.methods.adam.rule.lr=-1"], "at least 0"),
        (["run", "demo", "--steps", "100"], "longer than the run"),
        (["run", "demo", "--methods", "adm"], "did you mean 'adam'?"),
        (["run", "demo", "--methods", ","], "--methods is empty"),
        (["run", "demo", "--device", "tpu"], "one of auto, cpu, cuda"),
        (["run", "demo", "--workers", "0"], "at least 1"),
        (["show", "demoo"], "did you mean 'demo'?"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_refused_before_any_work(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = run_cli(*arguments)
    assert code == 1
    assert words in " ".join(output.split())
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_not_there(study: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no CUDA device"):
        execute(load(str(study)), tmp_path / "run", device="cuda")


def test_list_and_show() -> None:
    code, output = run_cli("list")
    assert code == 0
    for name in ("demo", "slowly_changing_regression", "mlp", "continual_backprop", "upgd"):
        assert name in output
    code, output = run_cli("show", "permuted-digits", "--seeds", "3", "--set", "methods.adam.rule.lr=1e-2,1e-3")
    assert code == 0
    assert "seeds: 3" in output
    code, output = run_cli("show", "demo", "--methods", "adam, backprop")
    assert code == 0
    assert "continual_backprop" not in output
    for command_ in ("run", "report", "show", "list"):
        code, output = run_cli(command_, "--help")
        assert code == 0
        assert len(output) > 200
