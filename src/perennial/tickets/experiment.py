"""The lottery ticket paper's experiment: replicates of a search, its controls, several processes, one directory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import nn

from perennial.parallel import run_jobs
from perennial.storage import read_json
from perennial.streams.files import flat_images, images
from perennial.tickets.control import CONTROLS, run_control
from perennial.tickets.find import Level, Pruning, Stage, Ticket, find_ticket
from perennial.tickets.networks import NETWORKS
from perennial.tickets.prune import remaining_weights
from perennial.tickets.training import Data, Split, Training, fit


@dataclass(frozen=True)
class Experiment:
    """A network, its data, its training, how it is pruned and what it is compared with."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    network: str
    """One of ``perennial.tickets.NETWORKS``."""
    data: str
    """``mnist`` or ``cifar10``."""
    training: Training
    """How each round is trained."""
    pruning: Pruning = field(default_factory=Pruning)
    """What goes after each round."""
    rounds: int = 15
    """Of pruning."""
    rewind: int = 0
    """The iteration to whose weights survivors are reset."""
    after: str = "reset"
    """What becomes of survivors, see :func:`~perennial.tickets.find_ticket`: ``reset`` or
    ``rewind_learning_rate``."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Replicates: start, order of data, validation set."""
    controls: tuple[str, ...] = ("random_reinit", "random_mask")
    """Of :data:`~perennial.tickets.CONTROLS`."""
    control_levels: tuple[int, ...] | None = None
    """The rounds whose tickets are controlled; None: all but the first."""

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"there is no network {self.network!r}; there are {', '.join(NETWORKS)}")
        if self.data not in DATA:
            raise ValueError(f"there are no data {self.data!r}; there are {', '.join(DATA)}")
        if self.after not in ("reset", "rewind_learning_rate"):
            raise ValueError(f"after is {self.after!r}; in a study it is reset or rewind_learning_rate")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"seeds is {self.seeds}; they are different whole numbers from 0, at least one")
        for kind in self.controls:
            if kind not in CONTROLS:
                raise ValueError(f"there is no control {kind!r}; there are {', '.join(CONTROLS)}")
        for level in self.control_levels or ():
            if not 1 <= level <= self.rounds:
                raise ValueError(f"control_levels has {level}; levels with something pruned are 1 to {self.rounds}")

    @property
    def make_model(self) -> Callable[[], nn.Module]:
        """Makes the network."""
        return NETWORKS[self.network]

    def jobs(self) -> list[Job]:
        """All trainings, each after what it needs."""
        found = [Job(seed, "ticket", level) for level in range(self.rounds + 1) for seed in self.seeds]
        levels = self.control_levels if self.control_levels is not None else range(1, self.rounds + 1)
        return found + [Job(seed, kind, level) for level in levels for kind in self.controls for seed in self.seeds]


class Job(NamedTuple):
    """One training: a round of a search, or a control of the ticket that a round trains."""

    seed: int
    kind: str
    level: int

    def __str__(self) -> str:
        return f"{self.kind}, level {self.level}, seed {self.seed}"

    def folder(self, directory: Path) -> Path:
        """Where its results lie."""
        replicate = directory / f"replicate-{self.seed}"
        name = f"level-{self.level:02d}" if self.kind == "ticket" else f"{self.kind}-{self.level:02d}"
        return replicate / "ticket" / name if self.kind == "ticket" else replicate / name

    def results(self, directory: Path) -> dict[str, Any] | None:
        """What came of it, or None while it is not finished."""
        found: dict[str, Any] | None = read_json(self.folder(directory) / "results.json")
        return found

    @property
    def needs(self) -> Job | None:
        """What must be finished before: a control needs the round before its ticket's, whose weights make the mask."""
        return Job(self.seed, "ticket", self.level - 1) if self.level else None


def run_job(
    experiment: Experiment, directory: Path, job: Job, *, pulse: Callable[[int], None], device: str = "cpu"
) -> None:
    """One training of an experiment, where its needs are finished; leaves its results in the directory."""

    def train(stage: Stage) -> Mapping[str, Any]:
        return fit(stage, _split(experiment.data, experiment.training.validation, job.seed), experiment.training,
                   device=device, pulse=pulse)  # fmt: skip

    search = functools.partial(
        find_ticket,
        experiment.make_model,
        prune=experiment.pruning,
        rewind=experiment.rewind,
        after=experiment.after,
        seed=job.seed,
        directory=job.folder(directory).parent if job.kind == "ticket" else directory / f"replicate-{job.seed}/ticket",
        progress=False,
    )
    if job.kind == "ticket":
        search(train, rounds=job.level)
        return

    def masks_only(stage: Stage) -> Mapping[str, Any]:
        raise _Ready(stage)

    try:
        ticket: Ticket = search(masks_only, rounds=job.level)
    except _Ready as ready:
        before: Ticket = search(masks_only, rounds=job.level - 1)
        here = Level(job.level, ready.stage.masks, {}, {})
        ticket = Ticket(here.masks, before.start, (*before.levels, here), before.step)
    # A control's place in the table is part of its seed: new ones go to the table's end, or results are others.
    drawn = 1 + job.seed * 1_000 + job.level * 10 + list(CONTROLS).index(job.kind)
    run_control(job.kind, ticket, experiment.make_model, train, seed=drawn, order=job.seed,
                directory=job.folder(directory))  # fmt: skip


class _Ready(Exception):
    """A round's mask is there, and its training, which is another job's, is about to begin."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage


def run_experiment(
    experiment: Experiment,
    directory: Path,
    *,
    workers: int,
    device: str = "cpu",
    progress: Callable[[Job, int], None] = lambda job, step: None,
) -> None:
    """Train everything that is not finished, several at a time.

    Args:
        experiment: what.
        directory: where; made if absent.
        workers: processes.
        device: where networks other than perceptrons are trained.
        progress: called with iterations made, and with all of them when a training is finished.

    Raises:
        RunError: a training failed; what is finished stays.
        KeyboardInterrupt: Ctrl-C; trainings under way have saved a checkpoint.
    """
    left = []
    for job in experiment.jobs():
        if job.results(directory) is None:
            left.append(job)
        else:
            progress(job, experiment.training.iterations)
    run_jobs(
        left,
        functools.partial(run_job, experiment, directory, device=device),
        ready=lambda job: job.needs is None or job.needs.results(directory) is not None,
        workers=workers,
        progress=progress,
        finished=lambda job: progress(job, experiment.training.iterations),
    )


def rows(experiment: Experiment, directory: Path) -> list[dict[str, Any]]:
    """What is finished, a row a training: ``kind`` (``ticket`` or a control), ``level``, ``seed``, ``percent`` of the
    weights that remain, ``early_stop`` (iteration), ``early_accuracy`` (test, there), ``accuracy`` (test, at the end),
    ``training_loss``."""
    percent = remaining_weights(experiment.make_model(), experiment.pruning.rates, experiment.rounds)
    found = []
    for job in experiment.jobs():
        results = job.results(directory)
        if results is not None:
            numbers = {name: value for name, value in results.items() if not isinstance(value, list)}
            found.append(dict(job._asdict()) | {"percent": percent[job.level]} | numbers)
    return found


def _mnist() -> Data:
    """Pixels in [0, 1], flat."""
    (x, y), (test, classes) = (flat_images("mnist", part) for part in ("train", "test"))
    return Data(x.float() / 255, y, (test.float() / 255, classes))


def _cifar10() -> Data:
    """Each channel less its mean over the training set, by its standard deviation."""
    (x, y), (test, classes) = (images("cifar10", part) for part in ("train", "test"))
    mean, spread = x.float().mean((0, 2, 3), keepdim=True), x.float().std((0, 2, 3), keepdim=True)
    return Data((x - mean) / spread, y, ((test - mean) / spread, classes))


DATA: dict[str, Callable[[], Data]] = {"mnist": _mnist, "cifar10": _cifar10}


@functools.lru_cache(maxsize=1)
def _data(name: str) -> Data:
    return DATA[name]()


@functools.lru_cache(maxsize=2)
def _split(name: str, held_out: int, seed: int) -> Split:
    return _data(name).split(held_out, seed)
