"""Jobs in several processes: what is ready runs, and what is asked to stop saves itself."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, Protocol, TypeVar

import torch

from perennial.storage import RunError


class Stopped(BaseException):
    """The run is asked to end; what is done is saved."""


class Work(Protocol):
    """A job's work, which calls ``pulse`` with its steps now and then; a module's function or a partial of one."""

    def __call__(self, job: Any, *, pulse: Callable[[int], None]) -> None: ...


J = TypeVar("J")


def run_jobs(
    jobs: Sequence[J],
    work: Work,
    *,
    ready: Callable[[J], bool] = lambda job: True,
    workers: int,
    progress: Callable[[J, int], None] = lambda job, step: None,
    finished: Callable[[J], None] = lambda job: None,
) -> None:
    """Run jobs in processes of one thread each, in their order as far as they are ready.

    Args:
        jobs: what is to be done; they and ``work`` are sent to the processes.
        work: does one, and raises if it cannot; :class:`Stopped` comes out of its ``pulse`` when it must end.
        ready: whether a job may begin: asked again whenever one has finished.
        workers: processes.
        progress: called with what a job says of its steps.
        finished: called when a job is done.

    Raises:
        RunError: a job failed; the others are stopped.
        KeyboardInterrupt: Ctrl-C, after all have stopped.
    """
    left = list(jobs)
    if not left:
        return
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        messages, stop = manager.Queue(), manager.Event()
        pool = ProcessPoolExecutor(min(workers, len(left)), mp_context=context)
        running: dict[Future[str | None], J] = {}
        try:
            while left or running:
                for job in [job for job in left if ready(job)][: workers - len(running)]:
                    left.remove(job)
                    running[pool.submit(_one, work, job, messages, stop)] = job
                if not running:
                    raise RunError(f"nothing makes {', '.join(map(str, left))} ready: what they need is missing")
                done = wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done
                while not messages.empty():
                    progress(*messages.get())
                for future in done:
                    job = running.pop(future)
                    problem = future.result()
                    if problem is not None:
                        raise RunError(problem)
                    finished(job)
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _one(work: Work, job: Any, messages: Any, stop: Any) -> str | None:
    """In a process: one job; what went wrong, in words."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which asks for an end
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def pulse(step: int) -> None:
        if parent is not None and not parent.is_alive():  # killed: nobody would know of what is done from here on
            raise Stopped
        messages.put((job, step))
        if stop.is_set():
            raise Stopped

    try:
        work(job, pulse=pulse)
    except Stopped:
        return None
    except Exception as error:
        return f"{job}: {type(error).__name__}: {error}"
    return None
