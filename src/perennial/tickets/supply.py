"""Do networks that lose plasticity run out of winning tickets? What is measured of one network at one time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perennial import metrics
from perennial.tickets.control import CONTROLS, run_control
from perennial.tickets.find import Pruning, Stage, Ticket, find_ticket
from perennial.tickets.overlap import jaccard
from perennial.tickets.training import Data, Split, Training, fit


@dataclass(frozen=True)
class Supply:
    """When networks are taken from their stream, and how their tickets are looked for."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    checkpoints: tuple[int, ...]
    """Steps of the stream after which networks are taken; 0: as they were drawn. Each ends a task."""
    training: Training
    """How a task is learnt from the network's weights, by the whole network and by every ticket."""
    rounds: int
    """Of pruning."""
    pruning: Pruning
    """What goes after each."""
    examples: int
    """Images of a task to learn from, those held out for validation among them."""
    test_examples: int = 10_000
    """Images of the task's test set to score on."""
    control: str = "shuffled_mask"
    """What tickets are compared with, of :data:`perennial.tickets.CONTROLS`: as many weights at random places, at the
    same start."""

    def __post_init__(self) -> None:
        if not self.checkpoints or list(self.checkpoints) != sorted(set(self.checkpoints)) or self.checkpoints[0] < 0:
            raise ValueError(
                f"checkpoints is {self.checkpoints}; they are different numbers of steps from 0, ascending"
            )
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; without a round nothing is pruned")
        if self.test_examples < 1:
            raise ValueError(f"test_examples is {self.test_examples}; it must be at least 1")
        if self.control not in CONTROLS:
            raise ValueError(f"there is no control {self.control!r}; there are {', '.join(CONTROLS)}")
        if self.examples <= self.training.validation:
            raise ValueError(
                f"examples is {self.examples}, of which validation takes {self.training.validation}; more are needed"
            )


def drawn_examples(inputs: Tensor, classes: Tensor, test: tuple[Tensor, Tensor], supply: Supply, seed: int) -> Split:
    """The part of a task that networks learn, split."""
    rng = torch.Generator().manual_seed(seed)
    some = torch.randperm(len(inputs), generator=rng)[: supply.examples]
    scored = torch.randperm(len(test[0]), generator=rng)[: supply.test_examples]
    data = Data(inputs[some], classes[some], (test[0][scored], test[1][scored]))
    return data.split(supply.training.validation, seed)


def measure_supply(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    tasks: tuple[Split, Split],
    supply: Supply,
    seed: int,
    pulse: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """What one network can still learn, and what its tickets are worth, on tasks that it has not seen.

    Args:
        model: of the network's shape; left as it is.
        weights: the network's, by parameter name.
        tasks: the next task, and another one after it.
        supply: how.
        seed: of the order of the data and of the control.
        pulse: called after evaluations.

    Returns:
        ``accuracy``: test accuracy of the whole network on the next task, at the early stop, after training from these
        weights; ``speed``: its mean validation accuracy on the way; ``effective_rank`` and ``dead_units``: means over
        hidden layers before training, on the next task's inputs; lists by level (0: the whole network): ``percent``,
        ``ticket`` and ``control`` (test accuracy at the early stop; the control has none at level 0), ``overlap``: of
        the tickets of the two tasks, (Jaccard - floor) / (1 - floor), overall, ``overlap_deep``: without the first
        layer. ``best_ticket``: the accuracy of the level above 0 with the best validation accuracy; ``advantage``: mean
        over levels of ticket less control.
    """
    held = copy.deepcopy(model)
    held.load_state_dict(dict(weights))

    def make() -> nn.Module:
        return copy.deepcopy(held)

    def search(split: Split) -> tuple[Ticket, Callable[[Stage], Mapping[str, Any]]]:
        def train(stage: Stage) -> Mapping[str, Any]:
            return fit(stage, split, supply.training, pulse=pulse)

        return find_ticket(make, train, prune=supply.pruning, rounds=supply.rounds, seed=seed, progress=False), train

    ticket, train = search(tasks[0])
    other, _ = search(tasks[1])
    levels = ticket.levels
    control = [
        float(run_control(supply.control, ticket.at(level), make, train, seed=seed, order=seed)["early_accuracy"])
        for level in range(1, len(levels))
    ]
    accuracies = [float(level.results["early_accuracy"]) for level in levels]
    peaks = [max(level.results["validation_accuracy"]) for level in levels[1:]]
    overlaps, deep = [], []
    for mine, theirs in zip(levels[1:], other.levels[1:], strict=True):
        first = next(iter(mine.masks))
        overlaps.append(jaccard(mine.masks, theirs.masks).overall.excess)
        rest = [{n: m for n, m in masks.items() if n != first} for masks in (mine.masks, theirs.masks)]
        deep.append(jaccard(*rest).overall.excess)
    features = hidden(held, tasks[0].training[0][:1000])
    return {
        "accuracy": accuracies[0],
        "speed": sum(levels[0].results["validation_accuracy"]) / len(levels[0].results["validation_accuracy"]),
        "effective_rank": _mean(float(metrics.effective_rank_entropy(h)) for h in features),
        "dead_units": _mean(float(metrics.dead_units(h)) for h in features),
        "percent": [level.percent for level in levels],
        "ticket": accuracies,
        "control": control,
        "overlap": overlaps,
        "overlap_deep": deep,
        "best_ticket": accuracies[1 + peaks.index(max(peaks))],
        "advantage": _mean(t - c for t, c in zip(accuracies[1:], control, strict=True)),
    }


@torch.no_grad()
def hidden(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """The output of every ReLU of a sequence of modules, [samples, units] each."""
    found = []
    for module in model.children():
        inputs = module(inputs)
        if isinstance(module, nn.ReLU):
            found.append(inputs)
    return found


def _mean(values: Any) -> float:
    kept = list(values)
    return float(sum(kept) / len(kept))
