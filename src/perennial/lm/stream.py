"""What a study of text tasks in a row says: tasks, model, training, methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from perennial.compared import RULES, STRICT, Job, check_compared, jobs, made, made_interventions
from perennial.lm.data import ORDERS, TextTask, read_task
from perennial.lm.models import Family
from perennial.lm.penalties import PENALTIES, Penalty
from perennial.methods import Intervention


@dataclass(frozen=True)
class TextTraining:
    """How each task is trained: AdamW without decay at a constant rate, as in the papers, unless a method differs."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    steps: int = 100
    """Optimizer steps a task."""
    batch_size: int = 16
    """Examples a batch."""
    accumulate: int = 1
    """Batches a step."""
    lr: float = 1e-3
    """Step size."""
    max_length: int = 128
    """Tokens of a text."""
    clip: float = 1.0
    """Longest norm of the gradient; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Adapters:
    """The LoRA adapters; the defaults are the papers'."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    rank: int = 8
    """r."""
    alpha: float = 32.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.1
    """On an adapter's input, in training."""
    target_modules: tuple[str, ...] = ("query", "value")
    """Which linear layers, by the end of their names; ``q`` and ``v`` of T5, ``q_proj`` and ``v_proj`` of Llama."""


@dataclass(frozen=True)
class Recipe:
    """A method: what is trained, on what, with which pulls and rules."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    label: str = ""
    """How figures call it."""
    trains: Literal["adapter_each", "adapter_one", "all", "osf"] = "adapter_each"
    """A new adapter for each task on top of the frozen earlier ones, one for all tasks, all weights, or all weights
    within the orthogonal subspaces of peft's OSF (Nayak et al., 2025)."""
    tasks: Literal["in_turn", "alone", "together"] = "in_turn"
    """One after another; each by itself from the pretrained weights; all at once, with as many steps as all have."""
    penalties: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of each penalty by its name, see :data:`~perennial.lm.PENALTIES`."""
    ewc: float = 0.0
    """Strength of elastic weight consolidation."""
    replay: int = 0
    """Examples kept of each task and mixed with those of later ones."""
    rule: Mapping[str, Any] = field(default_factory=dict)
    """An optimizer rule of this project by name, with its settings; AdamW if left out."""
    interventions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of each intervention on the trained model by its name."""
    lr: float | None = None
    """In place of the training's."""

    def __post_init__(self) -> None:
        self.made_penalties()
        self.made_interventions()
        self.optimizer([nn.Parameter(torch.zeros(2, 2))], 1e-3)
        if self.replay < 0 or self.ewc < 0:
            raise ValueError(f"replay is {self.replay} and ewc {self.ewc}; both are at least 0")
        if self.ewc and self.trains == "adapter_each":
            raise ValueError("ewc is of weights that are trained throughout: trains is adapter_one, all or osf")
        if self.penalties and not self.trains.startswith("adapter"):
            raise ValueError(f"penalties are on adapters' updates, and trains is {self.trains!r}")

    def made_penalties(self) -> list[Penalty]:
        """The penalties themselves."""
        return [made(PENALTIES, "penalty", name, settings) for name, settings in self.penalties.items()]

    def made_interventions(self) -> list[Intervention]:
        """The interventions themselves."""
        return made_interventions(self.interventions)

    def optimizer(self, params: Sequence[Any], lr: float) -> torch.optim.Optimizer:
        """What trains the parameters, or (name, parameter)."""
        lr = self.lr if self.lr is not None else lr
        if not self.rule:
            return torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
        settings = {"lr": lr} | {k: v for k, v in self.rule.items() if k != "name"}
        found: torch.optim.Optimizer = made(RULES, "optimizer rule", self.rule.get("name", ""), settings, params)
        return found


@dataclass(frozen=True)
class TextStream:
    """A model, text tasks in an order, methods and seeds."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    tasks: str | tuple[str, ...]
    """``order1`` to ``order6``, or names of tasks (:func:`~perennial.lm.read_task`) in their order."""
    methods: Mapping[str, Recipe]
    """What is compared, by key."""
    model: str = "minilm"
    """A folder, a name on the hub, or the bundled ``minilm``."""
    family: Family | None = None
    """``encoder``, ``seq2seq`` or ``causal``; the model's own if left out."""
    head: Literal["task", "union"] = "task"
    """Whether an encoder has answers for each task or for all labels, see :func:`~perennial.lm.load_model`."""
    train: int | None = None
    """Training examples of each task, drawn by the seed; all if left out."""
    test: int | None = None
    """Test examples of each task, the same for all seeds; all if left out."""
    training: TextTraining = field(default_factory=TextTraining)
    """How each task is trained."""
    adapters: Adapters = field(default_factory=Adapters)
    """Where there are adapters."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the classifier, the adapters, the choice and the order of examples."""
    part: Literal["test", "validation"] = "test"
    """On which scores are taken: ``validation`` to choose settings by."""

    def __post_init__(self) -> None:
        check_compared(self.methods, self.seeds)
        if isinstance(self.tasks, str) and self.tasks not in ORDERS:
            known = ", ".join(ORDERS)
            raise ValueError(f"there is no order {self.tasks!r}; there are {known}; or list tasks, such as [glue/rte]")
        if len(set(self.names)) < len(self.names) or not self.names:
            raise ValueError(f"tasks is {list(self.names)}; each stands there once, and there is at least one")

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, in their order."""
        return ORDERS[self.tasks] if isinstance(self.tasks, str) else self.tasks

    def texts(self, seed: int) -> list[TextTask]:
        """The tasks of a seed."""
        found = []
        for name in self.names:
            task = read_task(name)
            found.append(task.smaller(self.train, None, 1 + seed).smaller(None, self.test))
        return found

    def jobs(self) -> list[Job]:
        """All sequences, seed by seed."""
        return jobs(self.methods, self.seeds)

    def steps(self, job: Job) -> int:
        """Optimizer steps that a sequence takes."""
        return self.training.steps * len(self.names)
