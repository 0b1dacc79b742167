"""Training one subnetwork as the lottery ticket paper does, on data that lie in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perennial.methods import SGD, Adam
from perennial.storage import read_tensors, write_tensors
from perennial.tickets.find import Stage
from perennial.tickets.masks import Masks
from perennial.tickets.sparse_mlp import Examples, SparseMLPs, mlp_layers
from perennial.trainability.lanes import generator

OPTIMIZERS = ("adam", "sgd")
_TOGETHER = 500  # images of one evaluation pass


@dataclass(frozen=True)
class Training:
    """How a network is trained."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    iterations: int
    """Optimizer steps."""
    batch_size: int
    """Examples of one step."""
    optimizer: str
    """``adam`` or ``sgd``."""
    lr: float
    """Step size, after the warm-up and before the milestones."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 0.0
    """L2 coefficient, added to the gradient."""
    milestones: tuple[int, ...] = ()
    """Iterations at which the step size is divided by ten."""
    warm_up: int = 0
    """Iterations over which the step size grows linearly from zero."""
    evaluate_every: int = 100
    """Iterations between evaluations on the validation set."""
    validation: int = 5_000
    """Training examples held out, drawn by the seed."""
    augment: bool = False
    """Pictures are flipped and cropped at random (padded by four on each side)."""

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}; it is one of {', '.join(OPTIMIZERS)}")
        for name in ("iterations", "batch_size", "evaluate_every", "validation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.iterations % self.evaluate_every:
            raise ValueError(
                f"evaluate_every is {self.evaluate_every}; it must divide the {self.iterations} iterations, so that "
                "the end is evaluated"
            )

    def lr_at(self, step: int) -> float:
        """The step size of an iteration, counted from 0."""
        lr = self.lr * 0.1 ** sum(step >= at for at in self.milestones)
        return lr * (step + 1) / self.warm_up if step < self.warm_up else lr

    @property
    def rule(self) -> Adam | SGD:
        """The optimizer as a rule."""
        if self.optimizer == "adam":
            return Adam(lr=self.lr, weight_decay=self.weight_decay)
        return SGD(lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def make_optimizer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Over parameters, fused where torch can."""
        if self.optimizer == "adam":
            return torch.optim.Adam(params, self.lr, weight_decay=self.weight_decay, fused=True)
        return torch.optim.SGD(params, self.lr, self.momentum, weight_decay=self.weight_decay, fused=True)


@dataclass(frozen=True)
class Data:
    """Examples in memory, split for a seed."""

    inputs: Tensor
    """float32 [samples, ...]."""
    classes: Tensor
    """int64 [samples]."""
    test: tuple[Tensor, Tensor]
    """The same, of the test set."""

    def split(self, held_out: int, seed: int) -> Split:
        """The training and the validation set of a seed."""
        if held_out >= len(self.inputs):
            raise ValueError(f"validation is {held_out}, but there are {len(self.inputs)} training examples")
        order = torch.randperm(len(self.inputs), generator=generator(seed, "validation"))
        kept, apart = order[held_out:], order[:held_out]
        return Split(
            (self.inputs[kept], self.classes[kept]), (self.inputs[apart], self.classes[apart]), self.test, seed
        )


@dataclass(frozen=True)
class Split:
    """Training, validation and test examples: (inputs, classes) each."""

    training: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    seed: int

    @cached_property
    def sparse(self) -> dict[str, Examples]:
        """The same without zeros."""
        return {name: Examples(*getattr(self, name)) for name in ("training", "validation", "test")}


class Order:
    """Batches cut from one permutation after another; a pure function of seed and step."""

    def __init__(self, seed: int, count: int, size: int) -> None:
        self.seed, self.count, self.size = seed, count, size
        self._drawn: dict[int, Tensor] = {}

    def batch(self, step: int) -> Tensor:
        """The examples of a step, int64 [size]."""
        first, last = step * self.size, (step + 1) * self.size
        parts = []
        for epoch in range(first // self.count, (last - 1) // self.count + 1):
            begin = epoch * self.count
            parts.append(self._epoch(epoch)[max(first - begin, 0) : last - begin])
        return torch.cat(parts)

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._drawn:
            self._drawn = {n: order for n, order in self._drawn.items() if n == epoch - 1}
            self._drawn[epoch] = torch.randperm(self.count, generator=generator(self.seed, f"order {epoch}"))
        return self._drawn[epoch]


class _Engine(Protocol):
    """Trains one network."""

    def step(self, picks: Tensor, step: int) -> float: ...

    def evaluate(self, part: str) -> tuple[float, float]: ...

    def weights(self) -> dict[str, Tensor]: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


class _Sparse:
    """A perceptron, at a cost that falls with its weights."""

    def __init__(self, model: nn.Module, masks: Masks, split: Split, training: Training) -> None:
        layers = mlp_layers(model)
        assert layers is not None
        start = {name: p.detach().float() for name, p in model.named_parameters()}
        self.split, self.training = split, training
        density = split.sparse["training"].density
        self.networks = SparseMLPs(layers, [start], [masks], training.rule, density=density)

    def step(self, picks: Tensor, step: int) -> float:
        return float(self.networks.step(self.split.sparse["training"], picks[None], self.training.lr_at(step))[0])

    def evaluate(self, part: str) -> tuple[float, float]:
        loss, accuracy = self.networks.evaluate(self.split.sparse[part])
        return float(loss[0]), float(accuracy[0])

    def weights(self) -> dict[str, Tensor]:
        return self.networks.params(0)

    def state(self) -> dict[str, Any]:
        return dict(self.networks.state_dict())

    def load(self, state: dict[str, Any]) -> None:
        self.networks.load_state_dict(state)


class _Dense:
    """Any network; masks are held by :func:`perennial.tickets.enforce`."""

    def __init__(self, model: nn.Module, split: Split, training: Training, device: torch.device) -> None:
        self.model, self.training, self.split = model.to(device), training, split
        self.parts = {n: tuple(t.to(device) for t in getattr(split, n)) for n in ("training", "validation", "test")}
        self.optimizer = training.make_optimizer(list(model.parameters()))

    def step(self, picks: Tensor, step: int) -> float:
        self.optimizer.param_groups[0]["lr"] = self.training.lr_at(step)
        x, y = (t[picks.to(t.device)] for t in self.parts["training"])
        if self.training.augment:
            x = flip_and_crop(x, generator(self.split.seed, f"augment {step}"))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self, part: str) -> tuple[float, float]:
        self.model.eval()
        loss = hits = 0.0
        inputs, classes = self.parts[part]
        for x, y in zip(inputs.split(_TOGETHER), classes.split(_TOGETHER), strict=True):
            out = self.model(x)
            loss += float(F.cross_entropy(out, y, reduction="sum"))
            hits += int((out.argmax(1) == y).sum())
        return loss / len(inputs), hits / len(inputs)

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.model.state_dict().items()}

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def fit(
    stage: Stage,
    split: Split,
    training: Training,
    *,
    device: torch.device | str = "cpu",
    save_every: float = 30.0,
    pulse: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Train a stage's network, evaluating on the way: the ``train`` of :func:`~perennial.tickets.find_ticket`.

    The validation loss is taken every ``evaluate_every`` iterations. All runs train to the end; the early stop is the
    iteration of the smallest validation loss, found afterwards. The test set is looked at where the validation loss is
    the smallest so far, and at the end.

    Args:
        stage: what to train; killed, it goes on from the last checkpoint in the stage's folder, with the same result.
        split: the data; perceptrons on a CPU are trained by :class:`~perennial.tickets.SparseMLPs`, other networks
            by plain torch.
        training: how.
        device: where.
        save_every: seconds between checkpoints.
        pulse: called with the iterations made at every evaluation; may stop the training by raising, after a save.

    Returns:
        ``early_stop`` (iteration), ``early_accuracy`` (test, there), ``accuracy`` (test, at the end),
        ``training_loss`` (mean over the last evaluation interval), and the lists ``validation_loss`` and
        ``validation_accuracy``, one entry an evaluation.
    """
    where = torch.device(device)
    engine: _Engine
    if mlp_layers(stage.model) is not None and where.type == "cpu" and not (training.augment or stage.frozen):
        engine = _Sparse(stage.model, stage.masks, split, training)
    else:
        engine = _Dense(stage.model, split, training, where)
    end = training.iterations if stage.stop is None else stage.stop
    order = Order(stage.seed, len(split.training[0]), training.batch_size)
    every, losses, accuracies = training.evaluate_every, list[float](), list[float]()
    best = {"loss": float("inf"), "step": -1.0, "accuracy": float("nan")}
    step, total, recent = stage.start, 0.0, float("nan")
    path = None if stage.folder is None else Path(stage.folder) / "checkpoint.pt"
    if path is not None and (saved := read_tensors(path)) is not None:
        engine.load(saved["engine"])
        names = ("step", "total", "recent", "losses", "accuracies", "best")
        step, total, recent, losses, accuracies, best = (saved[name] for name in names)
    written = time.monotonic()

    def save() -> None:
        if path is not None:
            held = {"engine": engine.state(), "step": step, "total": total, "recent": recent}
            write_tensors(path, held | {"losses": losses, "accuracies": accuracies, "best": best})

    while step < end:
        total += engine.step(order.batch(step), step)
        step += 1
        if step % every and step < end:
            continue
        loss, accuracy = engine.evaluate("validation")
        losses.append(loss)
        accuracies.append(accuracy)
        if loss < best["loss"]:
            best = {"loss": loss, "step": float(step), "accuracy": engine.evaluate("test")[1]}
        recent, total = total / every, 0.0
        try:
            pulse(step)
        except BaseException:
            save()
            raise
        if time.monotonic() - written > save_every and step < end:
            save()
            written = time.monotonic()
    _put(stage.model, engine.weights())
    return {
        "early_stop": best["step"],
        "early_accuracy": best["accuracy"],
        "accuracy": engine.evaluate("test")[1],
        "training_loss": recent,
        "validation_loss": losses,
        "validation_accuracy": accuracies,
    }


def flip_and_crop(x: Tensor, rng: torch.Generator) -> Tensor:
    """Every picture mirrored with probability one half and moved by up to four pixels, zeros coming in from outside.

    Args:
        x: [samples, channels, height, width].
        rng: on the CPU.
    """
    count, _, height, width = x.shape
    flipped = torch.where((torch.rand(count, generator=rng) < 0.5).to(x.device)[:, None, None, None], x.flip(3), x)
    wide = F.pad(flipped, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, count, 1, 1), generator=rng).to(x.device)
    rows = top + torch.arange(height, device=x.device)[:, None]
    columns = left + torch.arange(width, device=x.device)
    return wide[torch.arange(count, device=x.device)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


@torch.no_grad()
def _put(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        if value.data_ptr() != weights[name].data_ptr():
            value.copy_(weights[name])
