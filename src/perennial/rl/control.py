"""What a study of control says: which body on which ground, PPO's settings, methods, seeds."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from perennial.compared import RULES, STRICT, Job, check_compared, jobs, made_interventions, numbers
from perennial.methods import Intervention


@dataclass(frozen=True)
class Ground:
    """When the friction changes, and between which values."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    period: int = 2_000_000
    """Environment steps; the friction changes at the first end of an episode after them."""
    low: float = 0.02
    """Smallest sliding friction."""
    high: float = 2.0
    """Largest; between them it is uniform in the logarithm."""

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"period is {self.period}; it is a number of environment steps, at least 1")
        if not 0 < self.low <= self.high < float("inf"):
            raise ValueError(f"low is {self.low} and high {self.high}; frictions are above 0, and low is at most high")


@dataclass(frozen=True)
class PPOSettings:
    """Settings of proximal policy optimisation; the defaults are those of Dohare et al. (2024)."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    lr: float = 1e-4
    """Step size of policy and value together."""
    rollout: int = 2048
    """Environment steps between two trainings."""
    epochs: int = 10
    """Passes over a rollout."""
    minibatch: int = 128
    """Environment steps a gradient step."""
    gamma: float = 0.99
    """Discount."""
    gae_lambda: float = 0.95
    """Of generalised advantage estimation."""
    clip: float = 0.2
    """How far the ratio of probabilities counts."""
    value_weight: float = 1.0
    """Of the squared error of the value in the loss."""
    max_grad_norm: float = 1e9
    """Longest gradient; the papers clip none."""
    hidden: tuple[int, ...] = (256, 256)
    """Units of the hidden layers, of policy and of value each."""

    def __post_init__(self) -> None:
        for name in ("rollout", "epochs", "minibatch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.rollout % self.minibatch:
            raise ValueError(f"minibatch is {self.minibatch}; it must divide the rollout of {self.rollout} steps")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden is {self.hidden}; policy and value have at least one hidden layer")


@dataclass(frozen=True)
class Learner:
    """A method: the optimizer of policy and value, and what keeps the network plastic."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    label: str = ""
    """How figures call it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of torch's Adam."""
    eps: float = 1e-8
    """Of torch's Adam."""
    weight_decay: float = 0.0
    """L2 coefficient of torch's Adam, added to the gradient."""
    rule: Mapping[str, Any] = field(default_factory=dict)
    """An optimizer rule of this project by name, with its settings, in place of torch's Adam."""
    interventions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of each intervention by its name."""

    def __post_init__(self) -> None:
        self.made_interventions()
        kind, settings = self.optimizer(0)
        try:
            kind([nn.Parameter(torch.zeros(2, 2))], lr=1e-4, **settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{kind.__name__}: {error}") from error
        if self.rule and (self.betas, self.eps, self.weight_decay) != ((0.9, 0.999), 1e-8, 0.0):
            raise ValueError(
                "betas, eps and weight_decay are of torch's Adam; a rule has its own settings, give them there"
            )

    def made_interventions(self) -> list[Intervention]:
        """The interventions themselves."""
        return made_interventions(self.interventions)

    def optimizer(self, seed: int) -> tuple[Any, dict[str, Any]]:
        """Class and settings of the optimizer, without the step size."""
        if not self.rule:
            return torch.optim.Adam, {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        settings = numbers({key: value for key, value in self.rule.items() if key != "name"})
        name = str(self.rule.get("name", ""))
        if name not in RULES:
            raise ValueError(f"there is no optimizer rule {name!r}; there are {', '.join(RULES)}")
        if "lr" in settings:
            raise ValueError(f"rule.lr is {settings['lr']}; the step size is PPO's, give it as ppo.lr")
        if "seed" in inspect.signature(RULES[name].__init__).parameters:
            settings["seed"] = seed
        return RULES[name], settings


@dataclass(frozen=True)
class Control:
    """A body that learns to run by PPO, methods and seeds."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    methods: Mapping[str, Learner]
    """What is compared, by key."""
    body: Literal["ant", "hopper", "walker"] = "ant"
    """Gymnasium's Ant-v5, Hopper-v5 or Walker2d-v5, on MuJoCo."""
    ground: Ground | None = None
    """How the friction under the ant changes; it stays as it is if left out."""
    contact_forces: bool = False
    """Whether the ant feels the forces of contacts and pays for them. In the papers' simulator, MuJoCo 2.1, they were
    zero."""
    steps: int = 20_000_000
    """Environment steps of a run; whole rollouts are made, so that it may be a little longer."""
    episode_steps: int = 1000
    """Longest episode; the value of the state after it is part of the return."""
    measure_every: int = 20_480
    """Environment steps between diagnostics; they are taken at the end of a rollout."""
    ppo: PPOSettings = field(default_factory=PPOSettings)
    """How it learns."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the frictions, the starts, the first weights, the exploration and the methods' random numbers."""

    def __post_init__(self) -> None:
        check_compared(self.methods, self.seeds)
        for name in ("steps", "episode_steps", "measure_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.ground is not None and self.body != "ant":
            raise ValueError(f"ground is the ant's, and body is {self.body!r}; leave it out")
        if self.contact_forces and self.body != "ant":
            raise ValueError(f"contact_forces are the ant's, and body is {self.body!r}; leave them out")

    def jobs(self) -> list[Job]:
        """All runs, seed by seed."""
        return jobs(self.methods, self.seeds)
