"""Which lanes share a program, and how many.

Lanes of the same network and the same methods, up to numbers, can share a program. Small networks are stacked whole:
the cost of a step is mostly overhead, and more lanes share it. Networks whose state fills the cache run one at a time.
In between it is measured, once: the answer is remembered beside the compiled code.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from perennial.compiler import VECTOR, cache_folder
from perennial.population import Lane, Population
from perennial.population.lanes import structure
from perennial.storage import read_json, write_json
from perennial.studies import Study, Variant, factory_of, seeds_of, stream_of, variants_of

_SMALL = 1 << 22
"""Bytes of state below which all lanes of a program are stacked without measuring: they stay in the cache."""

_TINY = 1 << 16
"""Bytes of one lane's state up to which lanes are stacked even where they fill no vector register: overhead is all.
A few larger ones side by side, of 784-300-150-10 for one, take far longer than one after another."""

_LARGE = 1 << 23
"""Bytes of one lane's state from which lanes run one at a time without measuring: one alone fills the caches."""

_LONG = 1e-3
"""Seconds of one lane's step on a processor from which no others are tried beside it. What lanes save together is
overhead, some tens of microseconds; and beside each other convolutions are compiled for minutes, to be slower."""

_LOST = 1.5
"""How much longer a lane's step takes than in fewer lanes where still more lanes are not tried: thirty convolutional
lanes side by side would be compiled for minutes to find out what eight have shown."""


@dataclass(frozen=True)
class Job:
    """Lanes that one worker trains as one population."""

    name: str
    """Its folder under ``jobs/``."""
    part: str
    """Of which part of the study."""
    lanes: list[tuple[int, int]]
    """(number of the variant in the part, seed) of each."""

    def as_json(self) -> dict[str, Any]:
        """For plan.json."""
        return asdict(self)


def programs(study: Study) -> list[tuple[str, list[tuple[int, int]]]]:
    """The groups of lanes that can share a program: (part, lanes).

    Builds one lane of every variant, so that whatever does not fit is refused here, before any work.

    Raises:
        ValueError: a network that does not fit its stream, a method that cannot keep this network.
    """
    found: list[tuple[str, list[tuple[int, int]]]] = []
    for key, part in study.parts.items():
        stream = stream_of(part, key)
        groups: dict[Any, list[tuple[int, int]]] = {}
        for number, variant in enumerate(variants_of(part, key, f"parts.{key}")):
            try:
                lane = probe(variant, stream, 0).lanes[0]
            except ValueError as error:
                raise ValueError(f"{variant.method} in part {key} cannot run: {error}") from error
            group = groups.setdefault((repr(variant.network), *map(structure, lane.methods)), [])
            group += [(number, seed) for seed in seeds_of(part, key)]
        found += [(key, lanes) for lanes in groups.values()]
    return found


def probe(variant: Variant, stream: Any, seed: int, lanes: int = 1) -> Population:
    """A population of a variant that is only looked at or timed."""
    return Population(factory_of(variant, stream), stream, [variant.lane(seed)] * lanes, threads=1)


def make_plan(
    study: Study, workers: int, device: torch.device, progress: Callable[[int, int], None] | None = None
) -> list[Job]:
    """The jobs of a study, largest first.

    Args:
        study: what is to be run.
        workers: processes that will run it.
        device: where.
        progress: called with the programs that have been looked at and with how many there are.
    """
    jobs: list[Job] = []
    every = programs(study)
    for looked_at, (part, lanes) in enumerate(every):
        if progress is not None:
            progress(looked_at, len(every))
        stream = stream_of(study.parts[part], part)
        variant = variants_of(study.parts[part], part, f"parts.{part}")[lanes[0][0]]
        width = lanes_per_program(variant, stream, len(lanes), device)
        if len(every) < workers:  # more workers than programs: let them share the lanes
            width = min(width, -(-len(lanes) // workers))
        for start in range(0, len(lanes), width):
            jobs.append(Job(f"{len(jobs):04d}-{part}-{variant.method}", part, lanes[start : start + width]))
    weight = {job.name: len(job.lanes) * study.parts[job.part].steps for job in jobs}
    return sorted(jobs, key=lambda job: (-weight[job.name], job.name))


def lanes_per_program(variant: Variant, stream: Any, most: int, device: torch.device) -> int:
    """How many of ``most`` lanes are trained fastest side by side, each lane's time counted."""
    size = probe(variant, stream, 0).bytes_per_lane
    if most == 1 or (size * most <= _SMALL and (most >= VECTOR or size <= _TINY)):
        return most
    if size >= _LARGE:
        return 1
    known_as = hashlib.sha256(
        repr(
            (
                variant.network,
                *map(structure, (variant.rule, *variant.interventions)),
                stream,
                most,
                torch.__version__,
                str(device),
                torch.get_num_threads(),
            )
        ).encode()
    ).hexdigest()[:24]
    shelf = cache_folder() / "plans.json"
    remembered = read_json(shelf) or {}
    if known_as not in remembered:
        candidates = sorted({1, min(8, most), min(64, most), most} if size * most <= 1 << 30 else {1, min(8, most)})
        times: dict[int, float] = {}
        for width in candidates:
            times[width] = _seconds_per_lane_step(variant, stream, width)
            if times[width] > _LOST * min(times.values()) or (device.type == "cpu" and times[1] >= _LONG):
                break
        remembered[known_as] = min(times, key=lambda width: times[width])
        write_json(shelf, remembered)
    return int(remembered[known_as])


def _seconds_per_lane_step(variant: Variant, stream: Any, width: int) -> float:
    population = probe(variant, stream, 0, width)
    population.advance(1)
    steps, spent = 1, 0.0
    while spent < 0.2:
        begun = time.perf_counter()
        population.advance(steps)
        spent = time.perf_counter() - begun
        steps *= 2
    return spent / (steps / 2) / width


def lanes_of(study: Study, job: Job) -> tuple[list[Variant], list[Lane]]:
    """The variant and the lane of each of a job's places."""
    every = variants_of(study.parts[job.part], job.part, f"parts.{job.part}")
    chosen = [every[number] for number, _ in job.lanes]
    return chosen, [variant.lane(seed) for variant, (_, seed) in zip(chosen, job.lanes, strict=True)]


def read_plan(data: Sequence[dict[str, Any]]) -> list[Job]:
    """The jobs of plan.json."""
    return [Job(d["name"], d["part"], [(int(a), int(b)) for a, b in d["lanes"]]) for d in data]


def plan_key(jobs: Sequence[Job]) -> str:
    """What identifies a plan."""
    return hashlib.sha256(json.dumps([job.as_json() for job in jobs]).encode()).hexdigest()[:12]
