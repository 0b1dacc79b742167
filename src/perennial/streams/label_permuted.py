"""Images one at a time whose labels change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from perennial.streams.base import SeededNoise
from perennial.streams.files import data_folder, flat_images
from perennial.streams.online_images import OnlineImages, OnlineImagesFeed


@dataclass(frozen=True)
class _LabelPermuted(OnlineImages):
    """Every so many images, each class gets another label."""

    task_steps: int = 2500
    """Images a task."""

    def labels(self, noise: SeededNoise, task: int) -> Tensor | None:
        return noise.order("labels", self.outputs)


@dataclass(frozen=True)
class LabelPermutedEMNIST(_LabelPermuted):
    """Online label-permuted EMNIST, one image a step: every so many images the 47 labels are permuted anew.

    The setting of Elsayed and Mahmood (ICLR 2024): pixels in [-1, 1] stay where they are, so what the hidden layers
    have learned stays useful, and only the last layer's reading of it is wrong after a change. Images are visited in a
    random order, once a pass. Whatever EMNIST of 47 classes lies in ``PERENNIAL_DATA/emnist`` is read (balanced,
    by-merge, or a part of them).

    Raises:
        FileNotFoundError: EMNIST is not where ``PERENNIAL_DATA`` says.
    """

    name = "label_permuted_emnist"
    inputs = 784
    outputs = 47

    def data(self) -> tuple[Tensor, Tensor]:
        return flat_images("emnist")


@dataclass(frozen=True)
class HeldOutEMNIST(LabelPermutedEMNIST):
    """Label-permuted EMNIST with images that are never trained on: what a task leaves behind, apart from being quick.

    At the end of every task the network is tested on the first so many test images, labelled as in that task. The
    offline evaluation of Elsayed and Mahmood (ICLR 2024), whose code tests one step later, after the first example of
    the next task.

    Raises:
        FileNotFoundError: EMNIST is not where ``PERENNIAL_DATA`` says.
        ValueError: it has fewer test images.
    """

    name = "held_out_emnist"
    holds_out = True

    test_images: int = 250
    """Test images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("test_images", self.test_images, 1)

    def open(self, seeds: Sequence[int], device: torch.device) -> _HeldOutFeed:
        return _HeldOutFeed(self, tuple(seeds), device)


class _HeldOutFeed(OnlineImagesFeed):
    def __init__(self, stream: HeldOutEMNIST, seeds: tuple[int, ...], device: torch.device):
        super().__init__(stream, seeds, device)
        shown, classes = flat_images("emnist", "test")
        if len(classes) < stream.test_images:
            raise ValueError(
                f"held_out_emnist.test_images is {stream.test_images}, but EMNIST's files here have {len(classes)} "
                "test images; ask for fewer"
            )
        self.test = shown[: stream.test_images].to(device), classes[: stream.test_images].to(device)

    def held_out(self, step: int) -> tuple[Tensor, Tensor]:
        labels = self.labels(step // self.length)
        assert labels is not None, "labels are permuted"
        inputs, classes = self.test
        return self.stream.scaled(inputs)[..., None].expand(-1, -1, len(self.seeds)), labels[classes]


@dataclass(frozen=True)
class LabelPermutedCIFAR10(_LabelPermuted):
    """Online label-permuted CIFAR-10, one image a step: every so many images the 10 labels are permuted anew.

    The setting of Elsayed and Mahmood (ICLR 2024); pixels in [-1, 1].

    Raises:
        FileNotFoundError: CIFAR-10 is not where ``PERENNIAL_DATA`` says, and cannot be fetched.
    """

    name = "label_permuted_cifar10"
    inputs = 3072
    outputs = 10

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (3, 32, 32)

    def data(self) -> tuple[Tensor, Tensor]:
        return flat_images("cifar10")


@dataclass(frozen=True)
class LabelPermutedMiniImageNet(_LabelPermuted):
    """Online label-permuted mini-ImageNet, one image's features a step: every so many the 100 labels are permuted anew.

    The setting of Elsayed and Mahmood (ICLR 2024), where the inputs are the 2,048 pooled features of a trained
    ResNet-50. They are read from ``PERENNIAL_DATA/mini-imagenet/features.npz``, a NumPy archive with ``features``,
    numbers [images, 2048], and ``labels``, whole numbers [images] from 0 to 99.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is not what it should be.
    """

    name = "label_permuted_mini_imagenet"
    inputs = 2048
    outputs = 100

    def data(self) -> tuple[Tensor, Tensor]:
        return _features()


@lru_cache(maxsize=1)
def _features() -> tuple[Tensor, Tensor]:
    import numpy as np

    base, own = data_folder(), "mini-imagenet/features.npz"
    path = base / own if base else None
    if path is None or not path.exists():
        where = f"there is no {path}" if path else f"PERENNIAL_DATA does not name the folder that holds {own}"
        raise FileNotFoundError(
            f"features of mini-ImageNet are needed, but {where}; it is a NumPy archive with features, numbers "
            "[images, 2048] of a trained network, and labels, whole numbers [images]"
        )
    try:
        archive = np.load(path, allow_pickle=False)
        features, labels = archive["features"], archive["labels"]
    except Exception as error:  # whatever zipfile, zlib and NumPy's reader of headers make of damaged bytes
        raise ValueError(
            f"{path} cannot be read as an archive of features and labels: {error}; write it with numpy.savez"
        ) from error
    if features.ndim != 2 or features.shape[1] != 2048 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"{path} holds features {features.shape} and labels {labels.shape}; they are [images, 2048] and [images]"
        )
    if not len(labels):
        raise ValueError(f"{path} holds no images")
    if features.dtype.kind not in "fiu":
        raise ValueError(f"{path} holds features of type {features.dtype}; they must be numbers")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 99:
        raise ValueError(f"{path} holds labels that are no whole numbers from 0 to 99")
    if not np.isfinite(features).all():
        raise ValueError(
            f"{path} holds features that are not finite in row {np.argwhere(~np.isfinite(features))[0][0]}"
        )
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels.astype(np.int64))
