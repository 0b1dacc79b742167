"""What a study of arriving classes says: images, network, training, methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from perennial.compared import RULES, STRICT, Job, check_compared, jobs, made, made_interventions
from perennial.methods import Intervention
from perennial.streams.augment import Augmentation


@dataclass(frozen=True)
class ImageTraining:
    """How a network is trained between two arrivals; the defaults are the paper's."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    epochs: int = 200
    """Passes over the images of all classes so far."""
    batch_size: int = 90
    """Images a step. The images of an epoch are dealt out evenly, so that no batch is a small rest."""
    lr: float = 0.1
    """Step size of SGD at the begin of each increment."""
    momentum: float = 0.9
    """Of SGD. Its buffers outlast an increment, as in the published code, also where the best weights are put back."""
    weight_decay: float = 5e-4
    """Of SGD, added to the gradient."""
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8)
    """Shares of the epochs of an increment after which the step size falls: epochs 60, 120 and 160 of 200."""
    factor: float = 0.2
    """By what it falls."""
    augment: bool = True
    """Mirror, move and turn training images at random (:class:`perennial.streams.augment.Augmentation`)."""
    shift: int = 4
    """Pixels by which they are moved."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Numbers in which a GPU computes activations (``torch.autocast``); a CPU computes in float32."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if list(self.milestones) != sorted(self.milestones) or any(not 0 < m < 1 for m in self.milestones):
            raise ValueError(f"milestones is {list(self.milestones)}; they are shares between 0 and 1 in their order")
        Augmentation(shift=self.shift)

    def scale(self, epoch: int) -> float:
        """What the step size is multiplied by in an epoch of an increment, from 0."""
        return self.factor ** sum(epoch >= round(share * self.epochs) for share in self.milestones)


@dataclass(frozen=True)
class ImageRecipe:
    """A method: what trains, what is attached to it, and what begins anew when classes arrive."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    label: str = ""
    """How figures call it."""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """Settings of SGD in place of the training's; with ``name``, an optimizer rule of this project instead."""
    interventions: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    """Settings of each intervention by its name, in the order in which they act."""
    coupled: bool = False
    """Whether interventions also replace the units of residual streams (:func:`perennial.attach`)."""
    reset: Literal["none", "head", "all"] = "none"
    """What is drawn anew before every increment but the first, with fresh optimizer state: nothing, the last layer, or
    the whole network."""

    def __post_init__(self) -> None:
        self.made_interventions()
        self.made_optimizer([("w", nn.Parameter(torch.zeros(2, 2)))], ImageTraining())

    def made_interventions(self) -> list[Intervention]:
        """The interventions themselves."""
        return made_interventions(self.interventions)

    def made_optimizer(
        self, params: Sequence[tuple[str, nn.Parameter]], training: ImageTraining
    ) -> torch.optim.Optimizer:
        """What trains the parameters, given with their names."""
        settings = dict(self.optimizer)
        if (name := settings.pop("name", None)) is None:
            base = {"lr": training.lr, "momentum": training.momentum, "weight_decay": training.weight_decay}
            sgd: torch.optim.Optimizer = made({"sgd": torch.optim.SGD}, "optimizer", "sgd", base | settings, params)
            return sgd
        rule: torch.optim.Optimizer = made(RULES, "optimizer rule", name, {"lr": training.lr} | settings, params)
        return rule


@dataclass(frozen=True)
class ArrivingClasses:
    """Images whose classes arrive a few at a time, a ResNet-18, methods and seeds; the defaults are the paper's.

    With every increment the network goes on with the images of all classes so far. The network of an increment is that
    of the epoch with the best accuracy on the validation images; the next increment begins with it.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    methods: Mapping[str, ImageRecipe]
    """What is compared, by key."""
    data: str = "cifar100"
    """Name of a data set of images in colour, one of ``perennial.streams.files.DATA_SETS``."""
    increments: int = 20
    """How often classes arrive."""
    per_increment: int = 5
    """Classes at a time."""
    train: int = 450
    """Images of each class to train on."""
    validation: int = 50
    """Images of each class to choose the best epoch by."""
    test: int = 100
    """Images of each class to report."""
    side: int = 32
    """Pixels of a side; images are made smaller by averaging squares of pixels."""
    width: int = 64
    """Channels of the network's first stage (:class:`perennial.resnet.ResNet18`)."""
    training: ImageTraining = field(default_factory=ImageTraining)
    """How each increment is trained."""
    diagnosed: int = 1000
    """Training images of the classes that arrive next on which units are looked at, unseen until then."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the order of classes, the division of images, the weights, batches, augmentation, and the methods' noise."""

    def __post_init__(self) -> None:
        check_compared(self.methods, self.seeds)
        for name in ("increments", "per_increment", "train", "validation", "test", "side", "width", "diagnosed"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.training.shift >= self.side:
            raise ValueError(f"training.shift is {self.training.shift}; images have {self.side} pixels a side")

    @property
    def classes(self) -> int:
        """How many arrive in all."""
        return self.increments * self.per_increment

    def jobs(self) -> list[Job]:
        """All runs, seed by seed."""
        return jobs(self.methods, self.seeds)

    def batches(self, increment: int) -> int:
        """Steps of an epoch of an increment, from 0."""
        images = (increment + 1) * self.per_increment * self.train
        return -(-images // self.training.batch_size)

    def steps(self, job: Job) -> int:
        """Optimizer steps of a run."""
        return self.training.epochs * sum(self.batches(k) for k in range(self.increments))
