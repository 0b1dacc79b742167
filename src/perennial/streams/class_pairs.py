"""Pairs of classes, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from perennial.streams.base import Examples, SeededNoise, Stream
from perennial.streams.files import images

SETS = ("tiny-imagenet-32", "imagenet-32", "cifar100")
"""The data sets with classes enough; all their pictures are 3 x 32 x 32."""


@dataclass(frozen=True)
class ClassPairs(Stream):
    """Continual ImageNet: a task is to tell two classes of pictures apart; then come two others.

    The setting of Dohare et al. (Nature, 2024). The classes of the data set are put in a random order and taken two by
    two, so that no class comes twice before all have come; then they are put in a new order. A task visits the training
    images of its two classes epoch by epoch, each time in a new random order, in batches; the target is 0 for the first
    class of the pair and 1 for the second. Nothing announces a change. Held-out accuracy is taken on the test images of
    the two classes.

    Pixels stay as they are, numbers from 0 to 255: the paper's code neither scales nor centres them. The paper takes
    700 images of each of 1,000 classes, 600 to train on and 100 to test on; ``tiny-imagenet-32`` has 200 classes of 150
    and 50. The paper's orders of classes come from a file; here they are a function of the seed.

    Raises:
        FileNotFoundError: the data set is not where ``PERENNIAL_DATA`` says.
        ValueError: a class has too few images, or the batch size does not divide an epoch.
    """

    data: str = "tiny-imagenet-32"
    """The data set: tiny-imagenet-32, imagenet-32 or cifar100."""
    epochs: int = 250
    """Passes over the training images of a pair."""
    batch_size: int = 100
    """Images a step; divides the training images of a pair."""
    train_images: int | None = None
    """Training images of a class, the first of the training set; None: as many as its rarest class has."""
    test_images: int | None = None
    """Held-out images of a class, from the training set as well, those after ``train_images``, as in the paper; None:
    the data set's own test images, as many as its rarest class has."""

    name = "class_pairs"
    task = "classification"
    inputs = 3 * 32 * 32
    outputs = 2
    holds_out = True

    def __post_init__(self) -> None:
        if self.data not in SETS:
            raise ValueError(f"class_pairs.data is {self.data!r}; it is one of {', '.join(SETS)}")
        self.check("epochs", self.epochs, 1)
        self.check("batch_size", self.batch_size, 1)
        for name in ("train_images", "test_images"):
            if (count := getattr(self, name)) is not None:
                self.check(name, count, 1)
        if self.test_images is not None and self.train_images is None:
            raise ValueError(
                f"class_pairs.test_images is {self.test_images}, but train_images is empty: say how many come before"
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (3, 32, 32)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Training and held-out images, class by class in the order of the files: uint8 [classes, images, 3, 32, 32].

        Raises:
            FileNotFoundError: the data set is not there.
            ValueError: a class has too few images.
        """
        return _parts(self.data, self.train_images, self.test_images)

    def epoch_steps(self) -> int:
        """Steps of one pass over the training images of a pair."""
        images = 2 * (self.train_images or self.parts()[0].shape[1])
        if images % self.batch_size:
            raise ValueError(
                f"class_pairs.batch_size is {self.batch_size}, which does not divide the {images} training images of a "
                f"pair of {self.data}; choose another, or set train_images"
            )
        return images // self.batch_size

    def task_length(self) -> int:
        return self.epochs * self.epoch_steps()

    def open(self, seeds: Sequence[int], device: torch.device) -> _Feed:
        return _Feed(self, tuple(seeds), device)


@lru_cache(maxsize=2)
def _parts(data: str, train: int | None, test: int | None) -> tuple[Tensor, Tensor]:
    if test is None:
        return _by_class(data, "train", train), _by_class(data, "test", None)
    assert train is not None, "refused where the stream is made"
    both = _by_class(data, "train", train + test)
    return both[:, :train], both[:, train:]


def _by_class(data: str, part: str, count: int | None) -> Tensor:
    """The first so many images of every class of a part: uint8 [classes, count, 3, 32, 32]."""
    found = images(data, part)
    held = found.classes.bincount(minlength=len(images(data, "train").classes.bincount()))
    fewest = int(held.min())
    if len(held) < 2 or not fewest:
        which = (
            f"class {int(held.argmin())} of {data} has no images in its {part} set"
            if len(held) > 1
            else f"{data} has one"
        )
        raise ValueError(f"class_pairs needs images of two classes and more, and of every class; {which}")
    if count is not None and count > fewest:
        raise ValueError(
            f"class_pairs needs {count} images of every class, but class {int(held.argmin())} of {data} has {fewest} "
            f"in its {part} set; set train_images and test_images to fewer"
        )
    begin = (held.cumsum(0) - held)[:, None]
    first = torch.arange(fewest if count is None else count)
    return found.pixels[found.classes.argsort(stable=True)[begin + first]]


class _Feed:
    def __init__(self, stream: ClassPairs, seeds: tuple[int, ...], device: torch.device) -> None:
        self.seeds, self.device = seeds, device
        self.train, self.test = (part.to(device) for part in stream.parts())
        self.batch, self.epochs, self.epoch_length = stream.batch_size, stream.epochs, stream.epoch_steps()
        self.classes = lru_cache(maxsize=4)(self._classes)
        self.order = lru_cache(maxsize=4)(self._order)

    def _noise(self, position: int) -> SeededNoise:
        return SeededNoise(self.seeds, "tasks", torch.tensor([position], dtype=torch.int32, device=self.device))

    def _classes(self, once: int) -> Tensor:
        """The order of all classes while they come once, int64 [classes, seeds]."""
        return self._noise(once).order("classes", len(self.train))

    def pair(self, task: int) -> Tensor:
        """The two classes of a task, int64 [2, seeds]."""
        pairs = len(self.train) // 2  # of an odd number of classes one is left out, each time another
        first = 2 * (task % pairs)
        return self.classes(task // pairs)[first : first + 2]

    def _order(self, epoch: int) -> Tensor:
        """The order of a pair's training images in a pass, int64 [images, seeds]; passes are counted from the first
        task's first."""
        return self._noise(epoch).order("order", 2 * self.train.shape[1])

    def _taken(self, images: Tensor, pair: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Images number ``which`` [n, seeds] of each seed's pair, the first class's first: float32
        [n, 3, 32, 32, seeds], and which of the two classes each is of, int64 [n, seeds]."""
        target = which // images.shape[1]
        chosen = images[pair.gather(0, target), which % images.shape[1]]
        return chosen.movedim(1, -1).to(torch.float32), target

    def examples(self, start: int, count: int) -> Examples:
        inputs, targets = [], []
        at = start
        while at < start + count:
            epoch = at // self.epoch_length
            end = min(start + count, (epoch + 1) * self.epoch_length)
            begin = at - epoch * self.epoch_length
            which = self.order(epoch)[begin * self.batch : (begin + end - at) * self.batch]
            x, y = self._taken(self.train, self.pair(epoch // self.epochs), which)
            inputs.append(x.unflatten(0, (end - at, self.batch)))
            targets.append(y.unflatten(0, (end - at, self.batch)))
            at = end
        return Examples(torch.cat(inputs), torch.cat(targets))

    def probe(self, step: int, size: int) -> Tensor:
        epoch = step // self.epoch_length
        order = self.order(epoch)
        which = order[torch.arange(size, device=self.device) % len(order)]
        return self._taken(self.train, self.pair(epoch // self.epochs), which)[0]

    def held_out(self, step: int) -> tuple[Tensor, Tensor]:
        every = torch.arange(2 * self.test.shape[1], device=self.device)[:, None].expand(-1, len(self.seeds))
        return self._taken(self.test, self.pair(step // self.epoch_length // self.epochs), every)
