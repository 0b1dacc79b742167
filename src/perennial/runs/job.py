"""What one worker does: train a job's lanes from their last checkpoint to the end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from perennial.parallel import at_work, orphaned
from perennial.population import Population
from perennial.runs.directory import JobFolder
from perennial.runs.plan import Job, lanes_of, read_plan
from perennial.storage import RunError, read_json
from perennial.studies import Study, factory_of, load, stream_of


class Stopped(Exception):
    """The run was asked to stop; the job has saved itself."""


def run_job(
    directory: Path,
    job: Job,
    *,
    device: str,
    threads: int,
    save_every: float,
    report: Callable[[int], None],
    stopping: Callable[[], bool],
) -> None:
    """Train a job's lanes to the end, saving results and state together.

    Args:
        directory: the run directory; holds the study.
        job: which lanes.
        device: where.
        threads: processor threads for one step.
        save_every: seconds between checkpoints.
        report: told the steps made, about ten times a second at most.
        stopping: asked between chunks; the job saves itself and raises :class:`Stopped` once it says yes.
    """
    folder = JobFolder(directory / "jobs" / job.name)
    if folder.manifest["finished"]:
        report(folder.manifest["step"])
        return
    study = load(str(directory / "study.yaml"))
    assert isinstance(study, Study)
    part = study.parts[job.part]
    stream = stream_of(part, job.part)
    variants, lanes = lanes_of(study, job)
    torch.set_num_threads(threads)
    population = Population(
        factory_of(variants[0], stream),
        stream,
        lanes,
        device=device,
        threads=threads,
        plasticity_every=part.plasticity_every,
        dtype=getattr(torch, part.dtype),
    )
    saved = folder.load()
    if saved is not None:
        population.load_state_dict(saved)
    rows: list[dict[str, Any]] = []
    trained = float(folder.manifest["train_seconds"])
    compiled = float(folder.manifest["compile_seconds"])
    begun = time.perf_counter()
    last_save = last_report = begun

    def save(finished: bool = False) -> None:
        nonlocal last_save
        folder.save(
            population.state_dict(),
            rows,
            step=population.steps_made,
            finished=finished,
            compile_seconds=compiled + population.compile_seconds,
            train_seconds=trained + time.perf_counter() - begun - population.compile_seconds,
            diverged=population.state.diverged.tolist(),
        )
        rows.clear()
        last_save = time.perf_counter()

    def pulse(step: int) -> None:
        nonlocal last_report
        now = time.perf_counter()
        if stopping():
            save()
            raise Stopped
        if now - last_save >= save_every:
            save()
        if now - last_report >= 0.1:
            report(step)
            last_report = now

    every = part.measure_every or part.bin
    records = population.records(part.steps, bin=part.bin, measure_every=every, measures=part.measures, pulse=pulse)
    for step, values in records:
        for metric, numbers in values.items():
            for variant, lane, value in zip(variants, lanes, numbers.tolist(), strict=True):
                rows.append(
                    {
                        "part": job.part,
                        "method": variant.method,
                        "settings": variant.settings,
                        "seed": lane.seed,
                        "metric": metric,
                        "step": step,
                        "value": value,
                    }
                )
        if step < part.steps:
            pulse(step)
    save(finished=True)
    report(part.steps)


def work(directory: str, name: str, options: dict[str, Any], messages: Any, stop: Any) -> str | None:
    """A job in a worker process. Returns None, or why it could not be done; "stopped" if it was asked to stop.

    A worker that outlives its parent (killed, say) stops by itself, and holds a lock until then: a second run of the
    same folder waits for it rather than train the same lanes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    if orphaned():  # work that was handed out before the command was killed
        return "stopped"
    root = Path(directory)
    job = next(job for job in read_plan(read_json(root / "plan.json")) if job.name == name)
    try:
        (root / "jobs" / name).mkdir(parents=True, exist_ok=True)
        with at_work(), FileLock(root / "jobs" / name / ".lock", timeout=60):
            run_job(
                root,
                job,
                report=lambda step: messages.put((name, step)),
                stopping=lambda: orphaned() or bool(stop.is_set()),
                **options,
            )
    except Stopped:
        return "stopped"
    except Timeout:
        return f"another process is still training {root / 'jobs' / name}; stop it, or wait, and run the command again"
    except (RunError, OSError) as error:
        return str(error)
    return None
