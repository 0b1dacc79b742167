"""Training while classes arrive."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perennial.attach import Keeper, attach
from perennial.compared import Job
from perennial.incremental.images import ArrivingImages
from perennial.incremental.measures import accuracy, diagnose
from perennial.incremental.setting import ArrivingClasses, ImageRecipe
from perennial.methods import Regulariser
from perennial.noise import torch_seed
from perennial.parallel import run_jobs
from perennial.resnet import ResNet18
from perennial.storage import read_tensors, write_json, write_tensors
from perennial.streams.augment import Augmentation

_SAVE_SECONDS = 30.0
"""Between checkpoints, which are taken at the end of epochs."""


def run_arriving(
    setting: ArrivingClasses,
    directory: Path,
    *,
    workers: int,
    device: str = "cpu",
    progress: Callable[[Job, int], None] = lambda job, step: None,
) -> None:
    """Train every method with every seed, several at a time; stopped or killed, it goes on after the last epoch saved.

    On a CPU a run that was interrupted ends with the same bits as one that was not.

    Args:
        setting: what.
        directory: where; made if absent.
        workers: processes.
        device: where networks are trained.
        progress: called with the optimizer steps that a run has made.

    Raises:
        FileNotFoundError: the data set is not there.
        RunError: a run failed; what is finished stays.
        KeyboardInterrupt: Ctrl-C.
    """
    left = []
    for job in setting.jobs():
        if (job.results(directory) or {}).get("finished"):
            progress(job, setting.steps(job))
        else:
            left.append(job)
    if left:
        ArrivingImages(setting, setting.seeds[0])  # what is missing is said before anything is begun
    run_jobs(
        left,
        functools.partial(run_one, setting, directory, device=device),
        workers=workers,
        progress=progress,
        finished=lambda job: progress(job, setting.steps(job)),
    )


def run_one(
    setting: ArrivingClasses, directory: Path, job: Job, *, pulse: Callable[[int], None], device: str = "cpu"
) -> None:
    """One method with one seed, from where it stands; leaves its results in the directory."""
    folder = job.folder(directory)
    learner = Learner(setting, setting.methods[job.method], job.seed, device)
    saved = read_tensors(folder / "checkpoint.pt")
    if saved is not None:
        learner.load_state_dict(saved)
    last_saved = time.monotonic()
    while learner.increment < setting.increments and learner.diverged is None:
        learner.epoch_of_training(pulse)
        if learner.epoch == 0 or learner.diverged is not None:
            write_json(folder / "results.json", learner.results())
        if time.monotonic() - last_saved >= _SAVE_SECONDS:
            write_tensors(folder / "checkpoint.pt", learner.state_dict())
            last_saved = time.monotonic()
    write_json(folder / "results.json", learner.results() | {"finished": True})
    (folder / "checkpoint.pt").unlink(missing_ok=True)


class Learner:
    """A network, its optimizer and what is attached to them, on their way through the classes."""

    def __init__(self, setting: ArrivingClasses, recipe: ImageRecipe, seed: int, device: str = "cpu") -> None:
        self.setting, self.recipe, self.seed, self.device = setting, recipe, seed, device
        self.images = ArrivingImages(setting, seed, device)
        self.augmentation = Augmentation(shift=setting.training.shift)
        self.increment, self.epoch, self.step = 0, 0, 0
        self.diverged: int | None = None
        self.records: list[dict[str, Any]] = []
        self.seconds: list[float] = [0.0]
        self.best, self.best_epoch = -1.0, -1
        self.best_weights: dict[str, Tensor] = {}
        self._batch: tuple[Tensor, Tensor] | None = None
        self._build(0)

    # --- the network ------------------------------------------------------------------------------------------------

    def _build(self, increment: int) -> None:
        """A fresh network with a fresh optimizer: the same for all methods, another at each increment."""
        setting = self.setting

        def factory() -> nn.Module:
            return ResNet18(setting.classes, setting.width)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(self.seed, f"network {increment}"))
            self.model = ResNet18(setting.classes, setting.width)
        # On a CPU channels last is faster at some sizes and slower at the full one, and torch 2.13 corrupts memory
        # there in the backward pass of convolutions of fewer than 8 channels.
        self.layout = torch.contiguous_format if self.device == "cpu" else torch.channels_last
        self.model.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]
        self.optimizer = self.recipe.made_optimizer(list(self.model.named_parameters()), setting.training)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        example = self.images.normalised(self.images.train[0, :4])
        self.keepers: list[Keeper] = [
            attach(
                method,
                self.model,
                self.optimizer,
                example=example,
                factory=factory,
                coupled=self.recipe.coupled,
                loss=self._loss_again,
                seed=torch_seed(self.seed, f"method {increment}") >> 1,
            )
            for method in self.recipe.made_interventions()
        ]

    def _begin_increment(self) -> None:
        """What a method does when classes arrive; at the first there is nothing to be reset."""
        if self.recipe.reset == "all":
            for keeper in self.keepers:
                keeper.remove()
            self._build(self.increment)
            return
        if self.recipe.reset == "head":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(torch_seed(self.seed, f"head {self.increment}"))
                self.model.draw_head()
            for parameter in self.model.fc.parameters():
                self.optimizer.state.pop(parameter, None)
        for keeper in self.keepers:
            keeper.new_task()

    # --- training ---------------------------------------------------------------------------------------------------

    def epoch_of_training(self, pulse: Callable[[int], None] = lambda step: None) -> None:
        """The next epoch; with the last one of an increment, also what is recorded of it."""
        setting, training = self.setting, self.setting.training
        if self.epoch == 0 and self.increment:
            self._begin_increment()
        start = time.perf_counter()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * training.scale(self.epoch)
        loss = self._pass(pulse)
        self.seconds[-1] += time.perf_counter() - start
        if not math.isfinite(loss):
            self.diverged = self.increment
            return
        seen = (self.increment + 1) * setting.per_increment
        validated = self._accuracy(self.images.validation, seen)
        if validated > self.best:
            self.best, self.best_epoch = validated, self.epoch
            self.best_weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.epoch += 1
        if self.epoch == training.epochs:
            self._end_increment(seen, loss)

    def _pass(self, pulse: Callable[[int], None]) -> float:
        """Train on all images so far, once; the mean loss on an image."""
        setting = self.setting
        seen = (self.increment + 1) * setting.per_increment
        pixels = self.images.train[:seen].flatten(0, 1)
        targets = self._targets(seen, setting.train)
        generator = torch.Generator().manual_seed(torch_seed(self.seed, f"epoch {self.increment} {self.epoch}"))
        order = torch.randperm(len(pixels), generator=generator).to(self.device)
        drawn = self.augmentation.draw(len(pixels), generator).to(self.device)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for where in order.tensor_split(setting.batches(self.increment)):
            images = self.images.normalised(pixels[where])
            if setting.training.augment:
                images = self.augmentation(images, drawn.of(where))
            self._batch = images.contiguous(memory_format=self.layout), targets[where]
            self.optimizer.zero_grad()
            loss = self.loss(*self._batch, seen)
            total += loss.detach() * len(where)
            for keeper in self.keepers:
                if isinstance(keeper.method, Regulariser) and keeper.method.coupled:
                    loss = loss + keeper.penalty()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            pulse(self.step)
        return float(total) / len(pixels)

    def loss(self, images: Tensor, targets: Tensor, seen: int) -> Tensor:
        """Cross entropy over the classes that have arrived; the logits of the others take no part."""
        with self._numbers():
            logits = self.model(images)
        return F.cross_entropy(logits[:, :seen].float(), targets)

    def _loss_again(self) -> Tensor:
        assert self._batch is not None
        return self.loss(*self._batch, (self.increment + 1) * self.setting.per_increment)

    def _numbers(self) -> torch.autocast:
        half = self.setting.training.precision == "bfloat16" and self.device != "cpu"
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=half)

    def _targets(self, seen: int, each: int) -> Tensor:
        return torch.arange(seen, device=self.device).repeat_interleave(each)

    def _accuracy(self, images: Tensor, seen: int) -> float:
        pixels = images[:seen].flatten(0, 1)
        with self._numbers():
            return accuracy(
                self.model,
                lambda part: self.images.normalised(pixels[part]),
                self._targets(seen, images.shape[1]),
                seen,
            )

    def _end_increment(self, seen: int, loss: float) -> None:
        """Put the best weights back, and record what they are."""
        self.model.load_state_dict(self.best_weights)
        record: dict[str, Any] = {
            "classes": seen,
            "test_accuracy": self._accuracy(self.images.test, seen),
            "validation_accuracy": self.best,
            "best_epoch": self.best_epoch,
            "training_loss": loss,
            "replaced": sum(sum(keeper.replaced().values()) for keeper in self.keepers),
        }
        following = self.images.arriving_next(seen, self.setting.per_increment, self.setting.diagnosed)
        if len(following):
            record |= diagnose(self.model, following)
        self.records.append(record)
        self.seconds.append(0.0)
        self.best, self.best_epoch, self.best_weights = -1.0, -1, {}
        self.increment, self.epoch = self.increment + 1, 0

    # --- state ------------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """What is written down."""
        return {"increments": self.records, "diverged": self.diverged, "seconds": self.seconds[: len(self.records)]}

    _PLAIN = ("increment", "epoch", "step", "diverged", "records", "seconds", "best", "best_epoch", "best_weights")

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on: tensors, numbers and names."""
        plain = {name: getattr(self, name) for name in self._PLAIN}
        return plain | {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there."""
        for name in self._PLAIN:
            setattr(self, name, saved[name])
        self.best_weights = {name: value.to(self.device) for name, value in self.best_weights.items()}
        if self.recipe.reset == "all" and self.increment and self.epoch:
            for keeper in self.keepers:
                keeper.remove()
            self._build(self.increment)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
