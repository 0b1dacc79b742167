"""Running a study of tickets along a stream: lives first, then what is measured of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from perennial.noise import torch_seed
from perennial.parallel import run_jobs
from perennial.population import Population
from perennial.storage import read_json, read_tensors, write_json, write_tensors
from perennial.streams import PermutedMNIST
from perennial.studies import SupplyStudy, Variant, factory_of, seeds_of, stream_of, variants_of
from perennial.tickets.supply import drawn_examples, measure_supply

FRESH = "fresh"
"""The method that is none: weights as they were drawn, on the same tasks as the others."""


class Life(NamedTuple):
    """One network along the stream. Of this size they run faster one after another than side by side."""

    method: str
    seed: int


class Look(NamedTuple):
    """One network at one time."""

    method: str
    seed: int
    step: int

    def path(self, directory: Path) -> Path:
        """Where its measurements lie."""
        return directory / "looks" / f"{self.method}-{self.seed}-{self.step}.json"


def lives_of(study: SupplyStudy) -> list[Life]:
    """All lives."""
    return [Life(v.method, seed) for seed in seeds_of(study.life, "life") for v in variants(study)]


def variants(study: SupplyStudy) -> list[Variant]:
    """The methods, each at its one setting."""
    return variants_of(study.life, "life", "life")


def looks_of(study: SupplyStudy) -> list[Look]:
    """All measurements, the fresh networks' among them."""
    found = []
    for step in study.supply.checkpoints:
        for seed in seeds_of(study.life, "life"):
            found.append(Look(FRESH, seed, step))
            if step:
                found += [Look(v.method, seed, step) for v in variants(study)]
    return found


def run_supply(
    study: SupplyStudy,
    directory: Path,
    *,
    workers: int,
    device: str,
    progress: Callable[[str, int], None] = lambda what, amount: None,
) -> None:
    """Run what is missing of a study.

    Args:
        study: what.
        directory: where; weights at checkpoints under ``weights``, measurements under ``looks``.
        workers: processes.
        device: of the lives.
        progress: called with ``lives`` and steps of a network, or ``looks`` and networks, made since the last call.

    Raises:
        RunError: something failed; what is finished stays.
        KeyboardInterrupt: Ctrl-C.
    """
    made: dict[Life, int] = {}

    def lived(life: Life, step: int) -> None:
        progress("lives", step - made.get(life, 0))
        made[life] = step

    last = study.supply.checkpoints[-1]
    lives = lives_of(study)
    for life in lives:
        if _weights(directory, life, last).exists():
            lived(life, last)
    run_jobs(
        [life for life in lives if not _weights(directory, life, last).exists()],
        functools.partial(live, study, directory, device=device),
        workers=workers,
        progress=lived,
    )
    looks = looks_of(study)
    left = [look for look in looks if not look.path(directory).exists()]
    progress("looks", len(looks) - len(left))
    run_jobs(
        left,
        functools.partial(look_at, study, directory),
        workers=workers,
        finished=lambda _: progress("looks", 1),
    )


def live(study: SupplyStudy, directory: Path, life: Life, *, pulse: Callable[[int], None], device: str) -> None:
    """Train the network of one life, keeping its weights at every checkpoint."""
    variant = next(v for v in variants(study) if v.method == life.method)
    stream = stream_of(study.life, "life")
    lanes = [variant.lane(life.seed)]
    population = Population(factory_of(variant, stream), stream, lanes, device=device, threads=1)
    path = directory / "lives" / f"{life.method}-{life.seed}"
    records: list[float] = read_json(path / "online.json") or []
    if (saved := read_tensors(path / "state.pt")) is not None:
        population.load_state_dict(saved)
        records = records[: population.steps_made // study.life.bin]
    chunk = population.chunk_length()
    for step in study.supply.checkpoints:
        while (done := population.steps_made) < step:
            end = min((done // study.life.bin + 1) * study.life.bin, step)
            while population.steps_made < end:
                population.advance(min(chunk, end - population.steps_made))
                pulse(population.steps_made)
            records.append(float(population.collect(end - done)["online_accuracy"]))
        if step == population.steps_made:
            write_json(path / "online.json", records)
            params = population.state.params
            write_tensors(_weights(directory, life, step), {n: w[..., 0].clone() for n, w in params.items()})
            write_tensors(path / "state.pt", population.state_dict())


def look_at(study: SupplyStudy, directory: Path, look: Look, *, pulse: Callable[[int], None]) -> None:
    """Measure one network at one time."""
    of, step = (variants(study)[0].method, 0) if look.method == FRESH else (look.method, look.step)
    weights: Mapping[str, Tensor] = read_tensors(_weights(directory, Life(of, look.seed), step))
    stream = stream_of(study.life, "life")
    assert isinstance(stream, PermutedMNIST)
    task = look.step // stream.task_length()
    splits = [
        drawn_examples(
            *stream.whole_task(look.seed, number),
            stream.whole_task(look.seed, number, "test"),
            study.supply,
            torch_seed(look.seed, f"task {number}") >> 1,
        )
        for number in (task, task + 1)
    ]
    model: nn.Module = factory_of(variants(study)[0], stream)()
    found: dict[str, Any] = measure_supply(model, weights, (splits[0], splits[1]), study.supply, look.seed, pulse)
    write_json(look.path(directory), dict(look._asdict()) | found)


def _weights(directory: Path, life: Life, step: int) -> Path:
    return directory / "weights" / f"{life.method}-{life.seed}-{step}.pt"
