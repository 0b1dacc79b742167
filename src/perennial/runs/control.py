"""Running a study of control: one process a run, results and state saved together."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars
import torch
from filelock import FileLock

from perennial.compared import Job
from perennial.parallel import Stopped, run_jobs
from perennial.rl import Control
from perennial.runs.directory import RESULT_SCHEMA, JobFolder, write_table
from perennial.storage import RunError, write_json

PART = "control"
"""What stands in the results' column of parts."""


def run_control(
    control: Control,
    directory: Path,
    *,
    workers: int,
    save_every: float = 60.0,
    progress: Callable[[Job, int], None] = lambda job, step: None,
) -> None:
    """Make every run that is not finished, several at a time; stopped or killed, it goes on after a rollout.

    Args:
        control: what.
        directory: where; made if absent.
        workers: processes.
        save_every: seconds between checkpoints of a run.
        progress: called with the environment steps that a run has made.

    Raises:
        RunError: a run failed; what is finished stays.
        KeyboardInterrupt: Ctrl-C.
    """
    from perennial.rl import agent as _  # noqa: F401 - what is missing is said before anything is begun

    jobs, left = control.jobs(), []
    for job in jobs:
        if folder_of(directory, job).manifest["finished"]:
            progress(job, control.steps)
        else:
            left.append(job)
    run_jobs(
        left,
        functools.partial(run_one, control, directory, save_every=save_every),
        workers=workers,
        progress=lambda job, step: progress(job, min(step, control.steps)),
        finished=lambda job: progress(job, control.steps),
    )
    gather(control, directory)


def folder_of(directory: Path, job: Job) -> JobFolder:
    """Where a run's results lie."""
    return JobFolder(directory / "jobs" / job.name)


def run_one(
    control: Control, directory: Path, job: Job, *, pulse: Callable[[int], None], save_every: float = 60.0
) -> None:
    """One run, from where it stands to the end."""
    path = directory / "jobs" / job.name
    path.mkdir(parents=True, exist_ok=True)
    with FileLock(path / ".lock", timeout=60):  # a worker whose parent was killed may still be saving itself
        _Run(control, directory, job).go(pulse, save_every)


class _Run:
    def __init__(self, control: Control, directory: Path, job: Job) -> None:
        from perennial.rl.agent import make_agent, units_of
        from perennial.rl.state import load_agent_state

        self.control, self.job, self.folder = control, job, folder_of(directory, job)
        self.agent, self.keepers = make_agent(control, job.method, job.seed)
        self.units = units_of(self.agent)
        env: Any = self.agent.env
        self.episodes = env.envs[0]
        if (saved := self.folder.load()) is not None:
            load_agent_state(self.agent, saved)
        self.diverged = next(iter(self.folder.manifest["diverged"]), -1)
        self.rows: list[dict[str, Any]] = []
        self.before, self.begun = float(self.folder.manifest["train_seconds"]), time.perf_counter()

    def go(self, pulse: Callable[[int], None], save_every: float) -> None:
        agent, last = self.agent, time.perf_counter()
        while agent.num_timesteps < self.control.steps and self.diverged < 0:
            self._rollout()
            try:
                pulse(agent.num_timesteps)
            except Stopped:
                self._save(finished=False)
                raise
            if time.perf_counter() - last >= save_every:
                self._save(finished=False)
                last = time.perf_counter()
        self._save(finished=True)

    def _rollout(self) -> None:
        """One rollout and the training on it, and what is to be told of them."""
        from perennial.rl.agent import measure

        agent, every = self.agent, self.control.measure_every
        before = agent.num_timesteps
        try:
            agent.learn(agent.n_steps, reset_num_timesteps=False)
        except ValueError:  # how stable-baselines3 says that the policy's outputs are not numbers
            if self._finite():
                raise
        if not self._finite():
            self.diverged = agent.num_timesteps
        step = agent.num_timesteps
        for one in self.episodes.log:
            self._note("return", one.step, one.reward)
            self._note("episode_steps", one.step, one.length)
        self.episodes.log.clear()
        ground: Any = self.episodes.env
        for change in getattr(ground, "log", ()) if self.control.ground is not None else ():
            self._note("friction", change.step, change.friction)
        if self.control.ground is not None:
            ground.log.clear()
        if step // every > before // every and self.diverged < 0:
            for name, value in measure(agent, self.units).items():
                self._note(name, step, value)
            for keeper in self.keepers:
                if counts := keeper.replaced():
                    self._note("replaced_units", step, sum(counts.values()))

    def _finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.agent.policy.parameters())

    def _note(self, metric: str, step: int, value: float) -> None:
        own = {"part": PART, "method": self.job.method, "settings": "", "seed": self.job.seed}
        self.rows.append(own | {"metric": metric, "step": step, "value": float(value)})

    def _save(self, finished: bool) -> None:
        from perennial.rl.state import agent_state

        self.folder.save(
            agent_state(self.agent),
            self.rows,
            step=self.agent.num_timesteps,
            finished=finished,
            train_seconds=self.before + time.perf_counter() - self.begun,
            diverged=[self.diverged],
        )
        self.rows.clear()


def film(control: Control, directory: Path) -> list[Path]:
    """Draw what every method's agent of the first seed does now, as strips of frames; their files.

    Raises:
        RunError: no run of it has begun, or no off-screen rendering works here.
    """
    from perennial.rl import frames, load_agent_state, make_agent, save_frames

    written = []
    for job in [job for job in control.jobs() if job.seed == control.seeds[0]]:
        if (state := folder_of(directory, job).load()) is None:
            continue
        agent, _ = make_agent(control, job.method, job.seed)
        load_agent_state(agent, state)
        path = directory / "figures" / f"film-{job.name}.png"
        save_frames(frames(agent, control), path)
        written.append(path)
    if not written:
        raise RunError(f"{directory} has no agent yet; run the study again to go on with it")
    return written


def gather(control: Control, directory: Path) -> None:
    """Bring the segments of all runs together, in an order that depends on the study alone."""
    folders = {job: folder_of(directory, job) for job in control.jobs()}
    order = ["part", "method", "settings", "seed", "metric", "step"]
    tables = [folder.rows() for folder in folders.values()]
    write_table(directory / "results.parquet", polars.concat(tables).select(list(RESULT_SCHEMA)).sort(order))
    lanes = [
        {
            "part": PART,
            "method": job.method,
            "settings": "",
            "seed": job.seed,
            "diverged": None if folder.manifest["diverged"][0] < 0 else folder.manifest["diverged"][0],
            "numbers": "{}",
        }
        for job, folder in folders.items()
    ]
    table = polars.DataFrame(lanes, schema_overrides={"diverged": polars.Int64, "seed": polars.Int64})
    write_table(directory / "lanes.parquet", table.sort(order[:4]))
    timings = [
        {
            "part": PART,
            "methods": [job.method],
            "lanes": 1,
            "lane_steps": folder.manifest["step"],
            "compile_seconds": 0.0,
            "train_seconds": folder.manifest["train_seconds"],
        }
        for job, folder in folders.items()
    ]
    write_json(directory / "timings.json", timings)
