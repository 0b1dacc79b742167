"""Dominant winning tickets of a language model: found on one task, trained on it or on another, against controls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from perennial.compared import check_seeds
from perennial.lm.data import TextTask, read_task
from perennial.lm.factors import adapted
from perennial.lm.models import Asked, Family, Reader, load_model, trained_modules
from perennial.lm.stream import TextTraining
from perennial.noise import torch_seed
from perennial.parallel import run_jobs
from perennial.storage import read_json, read_tensors, write_json, write_tensors
from perennial.tickets.control import random_like
from perennial.tickets.dominant import (
    ProximalL1,
    bias_names,
    l1_distance,
    lora_rank_for,
    magnitude_like,
    random_dimensions_like,
    select_ticket,
)
from perennial.tickets.masks import Masks, enforce, prunable
from perennial.tickets.overlap import jaccard
from perennial.tickets.sparse_delta import SparseDelta

CONTROLS = ("random", "magnitude", "lora", "bitfit", "full", "head")
"""What tickets are compared with: as many weights of every matrix at random, or the largest pretrained ones; LoRA of
the rank whose count is nearest; all biases; all weights; the new classifier alone."""


@dataclass(frozen=True)
class Selection:
    """How a ticket is cut from the distances; one of the three."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    share: float | None = None
    """Of all weights of the matrices, those farthest from their pretrained values."""
    threshold: float | None = None
    """Distance that a weight must exceed."""
    dimensions: int | None = None
    """Rows or columns of each matrix, those with the longest distance."""
    dims: Literal["rows", "columns"] = "rows"
    """Which of them ``dimensions`` counts."""

    def __post_init__(self) -> None:
        if sum(v is not None for v in (self.share, self.threshold, self.dimensions)) != 1:
            raise ValueError("a selection is a share, a threshold or a number of dimensions, one of them")

    def __str__(self) -> str:
        if self.share is not None:
            return f"{100 * self.share:g}%"
        if self.threshold is not None:
            return f"above {self.threshold:g}"
        return f"{self.dimensions} {self.dims if self.dimensions != 1 else self.dims.removesuffix('s')}"

    def masks(self, distances: Mapping[str, Tensor]) -> Masks:
        """The ticket."""
        return select_ticket(
            distances, threshold=self.threshold, share=self.share, dimensions=self.dimensions, dims=self.dims
        )


@dataclass(frozen=True)
class DominantTickets:
    """A pretrained model, tasks, the search and what is selected."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    tasks: tuple[str, ...]
    """Names of tasks (:func:`~perennial.lm.read_task`). Tickets are found on each and trained on each."""
    strength: float
    """Of the L1 distance to the pretrained weights, lambda."""
    selections: tuple[Selection, ...]
    """What is kept, one ticket for each."""
    how: Literal["proximal", "subgradient"] = "proximal"
    """How the distance is penalised: by proximal steps, which leave exact zeros, or as a part of the loss."""
    model: str = "minilm"
    """A folder, a name on the hub, or the bundled ``minilm``."""
    family: Family | None = None
    """``encoder``, ``seq2seq`` or ``causal``; the model's own if left out."""
    finding: TextTraining = field(default_factory=TextTraining)
    """How the ticket is found: all matrices are trained."""
    training: TextTraining = field(default_factory=TextTraining)
    """How a ticket, or a control, is trained."""
    full_lr: float | None = None
    """Step size where all weights are trained; the training's if left out."""
    controls: tuple[str, ...] = CONTROLS
    """Of ``perennial.lm.CONTROLS``."""
    target_modules: tuple[str, ...] = ("query", "value")
    """What LoRA adapts."""
    train: int | None = None
    """Training examples of each task, drawn by the seed; all if left out."""
    test: int | None = None
    """Test examples, the same for all seeds; all if left out."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the classifier, the choice and order of examples, random masks."""
    part: Literal["test", "validation"] = "test"
    """On which scores are taken: ``validation`` to choose settings by."""

    def __post_init__(self) -> None:
        if len(set(self.tasks)) < len(self.tasks) or not self.tasks:
            raise ValueError(f"tasks is {list(self.tasks)}; each stands there once, and there is at least one")
        if not self.selections:
            raise ValueError("selections is empty; give at least one, such as {share: 0.01}")
        for name in self.controls:
            if name not in CONTROLS:
                raise ValueError(f"there is no control {name!r}; there are {', '.join(CONTROLS)}")
        check_seeds(self.seeds)

    def steps(self, job: Job) -> int:
        """Optimizer steps that a training takes."""
        return (self.finding if job.kind == "find" else self.training).steps

    def jobs(self) -> list[Job]:
        """All trainings, what others need first."""
        found = [Job(s, "find", task, task) for s in self.seeds for task in self.tasks]
        plain = [c for c in self.controls if c in ("bitfit", "full", "head")]
        chosen = [c for c in self.controls if c not in plain]
        for seed in self.seeds:
            for task in self.tasks:
                found += [Job(seed, kind, task, "") for kind in plain]
                for number in range(len(self.selections)):
                    found += [Job(seed, "ticket", task, source, number) for source in self.tasks]
                    found += [Job(seed, kind, task, task, number) for kind in chosen]
        return found


class Job(NamedTuple):
    """One training."""

    seed: int
    kind: str
    """``find``, ``ticket`` or a control."""
    task: str
    """That is trained and tested."""
    source: str
    """On which the ticket was found whose weights, or whose counts, are used; empty for none."""
    selection: int = 0
    """Number of the selection."""

    def __str__(self) -> str:
        return f"{self.kind} of {self.source or 'nothing'} on {self.task}, seed {self.seed}"

    def path(self, directory: Path) -> Path:
        """Where its results lie."""
        places = [self.kind, self.task, *([self.source] if self.source else []), str(self.selection), str(self.seed)]
        return directory / ("trainings/" + "-".join(p.replace("/", "_") for p in places) + ".json")

    def results(self, directory: Path) -> dict[str, Any] | None:
        """``score``, ``trained`` (weights, without the classifier), ``losses``, ``seconds``; of ``find`` also ``kept``:
        the weights that moved, by matrix."""
        found: dict[str, Any] | None = read_json(self.path(directory))
        return found

    def distances(self, directory: Path) -> Path:
        """Where what ``find`` found lies: tensors, the weights less their pretrained values by name."""
        return directory / f"distances/{self.source.replace('/', '_')}-{self.seed}.pt"


def run_dominant(
    experiment: DominantTickets,
    directory: Path,
    *,
    workers: int,
    device: str = "cpu",
    progress: Callable[[Job, int], None] = lambda job, step: None,
) -> None:
    """Run every training that is not finished, several at a time.

    Raises:
        RunError: a training failed; what is finished stays.
        KeyboardInterrupt: Ctrl-C.
    """
    _texts(experiment, experiment.seeds[0], experiment.tasks)  # what is missing is said before anything is begun
    left = []
    for job in experiment.jobs():
        if job.results(directory) is None:
            left.append(job)
        else:
            progress(job, experiment.steps(job))
    run_jobs(
        left,
        functools.partial(run_training, experiment, directory, device=device),
        ready=lambda job: job.kind == "find" or not job.source or job.distances(directory).exists(),
        workers=workers,
        progress=progress,
        finished=lambda job: progress(job, experiment.steps(job)),
    )


def _texts(experiment: DominantTickets, seed: int, names: Sequence[str]) -> list[TextTask]:
    return [read_task(name).smaller(experiment.train, None, 1 + seed).smaller(None, experiment.test) for name in names]


def run_training(
    experiment: DominantTickets, directory: Path, job: Job, *, pulse: Callable[[int], None], device: str = "cpu"
) -> None:
    """One training; leaves its results in the directory."""
    from perennial.lm.learn import quiet, train

    quiet()
    texts = _texts(experiment, job.seed, [job.task])[0]
    model, reader = load_model(
        experiment.model,
        [texts],
        family=experiment.family,
        max_length=experiment.training.max_length,
        seed=torch_seed(job.seed, "head") >> 1,
    )
    model = model.to(device)
    training = experiment.finding if job.kind == "find" else experiment.training
    trained = _Trained(experiment, directory, job, model, reader)
    rate = experiment.full_lr if job.kind in ("find", "full") and experiment.full_lr is not None else training.lr
    optimizer = torch.optim.AdamW([p for p in trained.model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    penalties: list[Callable[[nn.Module], Tensor]] = []
    handle: Any = None
    if job.kind == "find" and experiment.how == "proximal":
        handle = ProximalL1(optimizer, trained.matrices, experiment.strength, trained.start)
    elif job.kind == "find":
        penalties.append(lambda _: experiment.strength * l1_distance(trained.matrices, trained.start))
    elif trained.masks is not None:
        handle = enforce(trained.model, trained.masks, frozen=trained.start)
    losses, seconds = train(
        trained.model,
        reader,
        [Asked(texts, example) for example in texts.train],
        optimizer,
        training,
        steps=training.steps,
        penalties=penalties,
        seed=torch_seed(job.seed, f"train {job.task}") & 0x7FFFFFFF,
        pulse=pulse,
        device=device,
    )
    if handle is not None:
        handle.remove()
    found = {
        "score": reader.grade(trained.model, texts, getattr(texts, experiment.part)),
        "trained": trained.count,
        "losses": losses,
        "seconds": seconds,
    }
    if job.kind == "find":
        with torch.no_grad():
            distances = {n: (p - trained.start[n]).cpu() for n, p in trained.matrices.items()}
        found["kept"] = {n: int((d != 0).sum()) for n, d in distances.items()}
        write_tensors(job.distances(directory), distances)
    elif job.kind == "ticket":
        start = trained.start | trained.heads
        delta = SparseDelta.between(trained.model, start, names=list(start), whole=list(trained.heads))
        delta.save(job.path(directory).with_suffix(".safetensors"))
    write_json(job.path(directory), found)


class _Trained:
    """A model of which that is trainable which a kind of training trains."""

    def __init__(
        self, experiment: DominantTickets, directory: Path, job: Job, model: nn.Module, reader: Reader
    ) -> None:
        heads = dict(trained_modules(model, reader.heads))
        held = dict(model.named_parameters())
        names = [n for n in prunable(model) if n not in heads]
        self.heads = {n: p.detach().clone() for n, p in heads.items()}
        self.model, self.masks = model, None
        self.start = {n: held[n].detach().clone() for n in names}
        self.matrices = {n: held[n] for n in names}
        if job.kind in ("ticket", "random", "magnitude", "lora"):
            chosen = experiment.selections[job.selection]
            ticket = chosen.masks(read_tensors(job.distances(directory)))
            self.masks = self._masks(job, ticket, chosen)
        self.count = self._open(experiment, job)
        for parameter in heads.values():
            parameter.requires_grad_(True)

    def _masks(self, job: Job, ticket: Masks, chosen: Selection) -> Masks:
        drawn = torch_seed(job.seed, f"random {job.selection}") >> 1
        if job.kind == "random":
            if chosen.dimensions is not None:
                return random_dimensions_like(ticket, drawn, dims=chosen.dims)
            return random_like(ticket, drawn)
        if job.kind == "magnitude":
            if chosen.dimensions is not None:
                return select_ticket(self.start, dimensions=chosen.dimensions, dims=chosen.dims)
            return magnitude_like(ticket, self.start)
        return ticket

    def _open(self, experiment: DominantTickets, job: Job) -> int:
        """Make trainable what is; how many weights that is."""
        held = dict(self.model.named_parameters())
        for parameter in held.values():
            parameter.requires_grad_(False)
        if job.kind == "head":
            return 0
        if job.kind == "lora":
            return self._adapt(experiment)
        names = list(self.matrices)
        if job.kind == "bitfit":
            names = bias_names(self.model)
        elif job.kind == "full":
            names = list(held)
        names = [name for name in names if name not in self.heads]
        for name in names:
            held[name].requires_grad_(True)
        if self.masks is not None:
            return sum(int(mask.sum()) for mask in self.masks.values())
        return sum(held[name].numel() for name in names)

    def _adapt(self, experiment: DominantTickets) -> int:
        from peft import LoraConfig

        assert self.masks is not None
        count = sum(int(mask.sum()) for mask in self.masks.values())
        shapes = [
            m.weight.shape
            for n, m in self.model.named_modules()
            if isinstance(m, nn.Linear) and n.endswith(experiment.target_modules)
        ]
        if not shapes:
            raise ValueError(f"no linear layer's name ends with one of {', '.join(experiment.target_modules)}")
        rank = lora_rank_for(count, shapes)
        config = LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=list(experiment.target_modules))
        torch.manual_seed(0)
        self.model, self.masks = adapted(self.model, config), None
        return rank * sum(sum(shape) for shape in shapes)


def overlaps(experiment: DominantTickets, directory: Path) -> list[dict[str, Any]]:
    """How alike the tickets of every two tasks, and of the same task under every two seeds, are: rows of ``selection``,
    ``first``, ``second``, ``first_seed``, ``second_seed``, ``matrix`` (empty for all together), ``iou``
    (intersection by union) and ``floor``, its mean over random masks of the same counts."""
    found = []
    sources = [Job(s, "find", t, t) for t in experiment.tasks for s in experiment.seeds]
    there = [job for job in sources if job.distances(directory).exists()]
    for chosen in experiment.selections:
        tickets = {job: chosen.masks(read_tensors(job.distances(directory))) for job in there}
        for at, one in enumerate(there):
            for other in there[at + 1 :]:
                if one.task != other.task and one.seed != other.seed:
                    continue
                shared = jaccard(tickets[one], tickets[other])
                for matrix, of in [("", shared.overall), *shared.layers.items()]:
                    found.append(
                        {
                            "selection": str(chosen),
                            "first": one.task,
                            "second": other.task,
                            "first_seed": one.seed,
                            "second_seed": other.seed,
                            "matrix": matrix,
                            "iou": of.jaccard,
                            "floor": of.floor,
                        }
                    )
    return found
