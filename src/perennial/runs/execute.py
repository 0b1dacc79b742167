"""Running a study: plan, workers, progress, and what is left behind."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import platform
import queue
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import Any

import polars
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

import perennial
from perennial.parallel import manager_of, pool_of
from perennial.runs.control import run_control
from perennial.runs.directory import RESULT_SCHEMA, JobFolder, write_table
from perennial.runs.job import work
from perennial.runs.plan import Job, lanes_of, make_plan, read_plan
from perennial.runs.supply import looks_of, run_supply
from perennial.storage import RunError, read_json, write, write_json
from perennial.studies import (
    ArrivingStudy,
    ControlStudy,
    DominantStudy,
    OtherStudy,
    Study,
    TextStudy,
    TicketStudy,
    as_yaml,
    same_settings,
    seeds_of,
)
from perennial.tickets.experiment import run_experiment


class Interrupted(RunError):
    """Ctrl-C; everything up to now is saved."""


def execute(
    study: Study | OtherStudy,
    directory: Path,
    *,
    resume: bool = True,
    device: str = "auto",
    workers: int | None = None,
    save_every: float = 60.0,
    console: Console | None = None,
) -> None:
    """Run a study to the end in a directory, going on from what is there.

    Args:
        study: expanded and checked (:func:`perennial.studies.load`).
        directory: made if absent.
        resume: False sets an earlier run of this directory aside (renames it) and begins anew.
        device: ``cpu``, ``cuda`` or ``auto``.
        workers: processes; None: as many as processors.
        save_every: seconds between checkpoints of a job.
        console: where progress goes.

    Raises:
        RunError: the directory holds another study, cannot be written, or a worker failed.
        Interrupted: Ctrl-C; run again to go on.
    """
    console = console or Console(stderr=True)
    where = choose_device(device)
    count = workers if workers is not None else (os.cpu_count() or 1)
    if count < 1:
        raise RunError(f"--workers is {count}; it must be at least 1")
    if not isinstance(study, Study):
        _claim(study, directory, resume)
        write(directory / "study.yaml", as_yaml(study).encode())
        _note_environment(directory, finished=None)
        _run_other(study, directory, count, where, save_every, console)
        _note_environment(directory, finished=_now())
        return
    jobs = _prepare(study, directory, resume, count, where, console)
    _note_environment(directory, finished=None)
    threads = max(1, (os.cpu_count() or 1) // count)
    options = {"device": str(where), "threads": threads, "save_every": save_every}
    left = [job for job in jobs if not JobFolder(directory / "jobs" / job.name).manifest["finished"]]
    if left:
        _train(study, directory, left, min(count, len(left)), options, console)
    _gather(study, directory, jobs)
    _note_environment(directory, finished=_now())


def choose_device(name: str) -> torch.device:
    """The device that ``--device`` names, if it is there."""
    if name not in ("auto", "cpu", "cuda"):
        raise RunError(f"--device is {name!r}; it is one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: this PyTorch sees no CUDA device; use --device cpu, or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _claim(study: Study | OtherStudy, directory: Path, resume: bool) -> bool:
    """See that a directory is free for a study, or holds a run of it; whether it does."""
    held = directory / "study.yaml"
    if held.exists() and not resume:
        number = next(n for n in range(1, 10_000) if not directory.with_name(f"{directory.name}.{n}").exists())
        os.replace(directory, directory.with_name(f"{directory.name}.{number}"))
    if held.exists():
        if not same_settings(held.read_text(), as_yaml(study)):
            raise RunError(
                f"{directory} holds a run of another study or other settings; name another folder with --out, or set "
                "that run aside with --no-resume"
            )
        return True
    if directory.exists() and any(directory.iterdir()):
        raise RunError(f"{directory} is not empty and holds no run; name another folder with --out")
    return False


def _prepare(
    study: Study, directory: Path, resume: bool, workers: int, device: torch.device, console: Console
) -> list[Job]:
    planned = read_json(directory / "plan.json") if _claim(study, directory, resume) else None
    if planned is not None:
        write(directory / "study.yaml", as_yaml(study).encode())
        return read_plan(planned)
    with _progress(console) as progress:
        bar = progress.add_task("choosing the lanes of a program by their speed", total=None)
        try:
            jobs = make_plan(
                study, workers, device, lambda done, total: progress.update(bar, completed=done, total=total)
            )
        except ValueError as error:
            raise RunError(str(error)) from error
        progress.update(bar, visible=False)
    write(directory / "study.yaml", as_yaml(study).encode())
    write_json(directory / "plan.json", [job.as_json() for job in jobs])
    return jobs


def _run_other(
    study: OtherStudy, directory: Path, workers: int, device: torch.device, save_every: float, console: Console
) -> None:
    """A study that is not made of parts, with its progress."""
    with _progress(console) as progress:
        try:
            if isinstance(study, TicketStudy):
                _search(study, directory, workers, device, progress)
            elif isinstance(study, TextStudy):
                _learn_texts(study, directory, workers, device, progress)
            elif isinstance(study, DominantStudy):
                _find_dominant(study, directory, workers, device, progress)
            elif isinstance(study, ArrivingStudy):
                _learn_classes(study, directory, workers, device, progress)
            elif isinstance(study, ControlStudy):
                control = study.control
                advance = _advance(
                    progress,
                    dict.fromkeys(control.jobs(), control.steps),
                    lambda job: control.methods[job.method].label or job.method,
                )
                run_control(control, directory, workers=workers, save_every=save_every, progress=advance)
            else:
                seeds = len(seeds_of(study.life, "life"))
                totals = {"lives": seeds * study.life.steps * len(study.life.methods), "looks": len(looks_of(study))}
                bars = {what: progress.add_task(what, total=total) for what, total in totals.items()}
                run_supply(
                    study,
                    directory,
                    workers=workers,
                    device=str(device),
                    progress=lambda what, amount: progress.advance(bars[what], amount),
                )
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped; everything up to now is saved in {directory}. Run the same command again to go on"
            ) from None
        except (FileNotFoundError, ValueError) as error:
            raise RunError(str(error)) from error


def _search(study: TicketStudy, directory: Path, workers: int, device: torch.device, progress: Progress) -> None:
    """All trainings of a search for tickets and of its controls."""
    experiment = study.tickets
    steps = dict.fromkeys(experiment.jobs(), experiment.training.iterations)
    advance = _advance(progress, steps, lambda job: job.kind)
    run_experiment(experiment, directory, workers=workers, device=str(device), progress=advance)


def _learn_texts(study: TextStudy, directory: Path, workers: int, device: torch.device, progress: Progress) -> None:
    """All sequences of text tasks."""
    from perennial.lm import run_stream

    stream = study.texts
    steps = {job: stream.steps(job) for job in stream.jobs()}
    advance = _advance(progress, steps, lambda job: stream.methods[job.method].label or job.method)
    run_stream(stream, directory, workers=workers, device=str(device), progress=advance)


def _find_dominant(
    study: DominantStudy, directory: Path, workers: int, device: torch.device, progress: Progress
) -> None:
    """All trainings of a search for dominant tickets and of its controls."""
    from perennial.lm import run_dominant

    experiment = study.dominant
    advance = _advance(progress, {job: experiment.steps(job) for job in experiment.jobs()}, lambda job: job.kind)
    run_dominant(experiment, directory, workers=workers, device=str(device), progress=advance)


def _learn_classes(
    study: ArrivingStudy, directory: Path, workers: int, device: torch.device, progress: Progress
) -> None:
    """All runs of a study of arriving classes."""
    from perennial.incremental import run_arriving

    setting = study.arriving
    steps = {job: setting.steps(job) for job in setting.jobs()}
    advance = _advance(progress, steps, lambda job: setting.methods[job.method].label or job.method)
    run_arriving(setting, directory, workers=workers, device=str(device), progress=advance)


def _advance(progress: Progress, steps: Mapping[Any, int], kind: Callable[[Any], str]) -> Callable[[Any, int], None]:
    """A bar for each kind of job, and what moves them when a job says how many steps it has made."""
    totals: Counter[str] = Counter()
    for job, count in steps.items():
        totals[kind(job)] += count
    bars = {name: progress.add_task(name.replace("_", " "), total=total) for name, total in totals.items()}
    made: dict[Any, int] = {}

    def advance(job: Any, step: int) -> None:
        progress.advance(bars[kind(job)], step - made.get(job, 0))
        made[job] = step

    return advance


def _train(
    study: Study, directory: Path, jobs: list[Job], workers: int, options: dict[str, Any], console: Console
) -> None:
    context = multiprocessing.get_context("spawn")
    with manager_of(context) as manager, _progress(console) as progress:
        messages, stop = manager.Queue(), manager.Event()
        bars = _bars(progress, study, directory, jobs)
        pool = pool_of(context, workers)
        running: dict[Future[str | None], str] = {}
        try:
            for job in jobs:
                running[pool.submit(work, str(directory), job.name, options, messages, stop)] = job.name
            problems = _watch(running, messages, bars)
        except KeyboardInterrupt:
            progress.console.print("Stopping: saving what is done ...")
            stop.set()
            for future in running:
                future.cancel()
            wait([f for f in running if not f.cancelled()])
            raise Interrupted(
                f"stopped; everything up to now is saved in {directory}. Run the same command again to go on"
            ) from None
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    if problems:
        raise RunError("\n".join(problems))


def _watch(running: dict[Future[str | None], str], messages: Any, bars: Callable[[str, int], None]) -> list[str]:
    """Show progress until all jobs are done; what went wrong, in words."""
    problems: list[str] = []
    while True:
        done = wait(running, timeout=0.1, return_when=FIRST_EXCEPTION).done
        while True:
            try:
                bars(*messages.get_nowait())
            except queue.Empty:
                break
        for future in list(done):
            if future.cancelled():
                continue
            error = future.exception()
            if error is not None:
                raise error
            if (answer := future.result()) not in (None, "stopped"):
                problems.append(str(answer))
                del running[future]
        if all(future.done() for future in running):
            return problems


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


def _bars(progress: Progress, study: Study, directory: Path, jobs: list[Job]) -> Callable[[str, int], None]:
    tasks: dict[str, TaskID] = {}
    for job in jobs:
        variants, lanes = lanes_of(study, job)
        labels = dict.fromkeys(study.parts[job.part].methods[v.method].label or v.method for v in variants)
        tasks[job.name] = progress.add_task(
            f"{job.part}: {', '.join(labels)}, {len(lanes)} lanes",
            total=study.parts[job.part].steps,
            completed=JobFolder(directory / "jobs" / job.name).manifest["step"],
        )

    def update(name: str, step: int) -> None:
        progress.update(tasks[name], completed=step)

    return update


def _gather(study: Study, directory: Path, jobs: list[Job]) -> None:
    """Bring the jobs' segments together in one table, in an order that depends on the study alone."""
    tables, lanes, timings = [], [], []
    for job in jobs:
        folder = JobFolder(directory / "jobs" / job.name)
        tables.append(folder.rows())
        variants, members = lanes_of(study, job)
        for variant, lane, diverged in zip(variants, members, folder.manifest["diverged"], strict=True):
            lanes.append(
                {
                    "part": job.part,
                    "method": variant.method,
                    "settings": variant.settings,
                    "seed": lane.seed,
                    "diverged": None if diverged < 0 else diverged,
                    "numbers": json.dumps(variant.numbers),
                }
            )
        timings.append(
            {
                "part": job.part,
                "methods": list(dict.fromkeys(v.method for v in variants)),
                "lanes": len(members),
                "lane_steps": len(members) * study.parts[job.part].steps,
                "compile_seconds": folder.manifest["compile_seconds"],
                "train_seconds": folder.manifest["train_seconds"],
            }
        )
    order = ["part", "method", "settings", "seed", "metric", "step"]
    write_table(directory / "results.parquet", polars.concat(tables).select(list(RESULT_SCHEMA)).sort(order))
    table = polars.DataFrame(lanes, schema_overrides={"diverged": polars.Int64, "seed": polars.Int64})
    write_table(directory / "lanes.parquet", table.sort(order[:4]))
    write_json(directory / "timings.json", timings)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _note_environment(directory: Path, finished: str | None) -> None:
    path = directory / "environment.json"
    before = read_json(path) or {}
    write_json(
        path,
        {
            "command": before.get("command") or shlex.join(["perennial", *sys.argv[1:]]),
            "perennial": perennial.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "platform": platform.platform(),
            "processor": _processor(),
            "started": before.get("started") or _now(),
            "finished": finished,
        },
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()
