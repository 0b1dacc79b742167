"""Jobs in several processes: what is ready runs, and what is asked to stop saves itself."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.context import SpawnContext
from multiprocessing.managers import SyncManager
from typing import Any, Protocol, TypeVar

import torch

from perennial.storage import RunError


class Stopped(BaseException):
    """The run is asked to end; what is done is saved."""


class Work(Protocol):
    """A job's work, which calls ``pulse`` with its steps now and then; a module's function or a partial of one."""

    def __call__(self, job: Any, *, pulse: Callable[[int], None]) -> None: ...


J = TypeVar("J")

_LINGER_SECONDS = 10.0
"""How long messages are still taken after the command was killed, so that no worker stumbles before it notices."""

_jobs_at_work = 0


def orphaned() -> bool:
    """Whether the command that started this process was killed."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """Around a job in a worker, which lives until it has come out of it."""
    global _jobs_at_work
    _jobs_at_work += 1
    try:
        yield
    finally:
        _jobs_at_work -= 1


def pool_of(context: SpawnContext, workers: int) -> ProcessPoolExecutor:
    """Worker processes that end when the command that started them is killed: they would wait for work forever, or do
    what is left of it. Those that are at work end when they are done with the job, which looks at :func:`orphaned`."""
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent, initargs=(0.0,))


def manager_of(context: SpawnContext) -> SyncManager:
    """The process that passes messages; it, too, ends some time after the command was killed."""
    manager = SyncManager(ctx=context)
    manager.start(_end_with_parent, (_LINGER_SECONDS,))
    return manager


def _end_with_parent(linger: float) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "it is called in a process that was started"

    def end() -> None:
        parent.join()
        time.sleep(linger)
        while _jobs_at_work:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


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
    with manager_of(context) as manager:
        messages, stop = manager.Queue(), manager.Event()
        pool = pool_of(context, min(workers, len(left)))
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

    def pulse(step: int) -> None:
        if orphaned():  # nobody would know of what is done from here on
            raise Stopped
        messages.put((job, step))
        if stop.is_set():
            raise Stopped

    try:
        with at_work():
            work(job, pulse=pulse)
    except Stopped:
        return None
    except Exception as error:
        return f"{job}: {type(error).__name__}: {error}"
    return None
