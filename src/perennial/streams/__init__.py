"""What changes under a network: tasks, their order, their data.

To add a stream, write its file and add its class to :data:`REGISTRY`.
"""

from perennial.streams.base import Examples, Feed, HeldOut, Stream
from perennial.streams.changing_average import ChangingAverage
from perennial.streams.class_pairs import ClassPairs
from perennial.streams.label_permuted import (
    HeldOutEMNIST,
    LabelPermutedCIFAR10,
    LabelPermutedEMNIST,
    LabelPermutedMiniImageNet,
)
from perennial.streams.permuted_digits import PermutedDigits
from perennial.streams.permuted_mnist import NaturePermutedMNIST, PermutedMNIST, StationaryMNIST
from perennial.streams.slowly_changing_regression import SlowlyChangingRegression
from perennial.streams.sum_of_two import SumOfTwo

REGISTRY: tuple[type[Stream], ...] = (
    SlowlyChangingRegression,
    PermutedDigits,
    PermutedMNIST,
    NaturePermutedMNIST,
    StationaryMNIST,
    LabelPermutedEMNIST,
    HeldOutEMNIST,
    LabelPermutedCIFAR10,
    LabelPermutedMiniImageNet,
    SumOfTwo,
    ChangingAverage,
    ClassPairs,
)

__all__ = [
    "REGISTRY",
    "ChangingAverage",
    "ClassPairs",
    "Examples",
    "Feed",
    "HeldOut",
    "HeldOutEMNIST",
    "LabelPermutedCIFAR10",
    "LabelPermutedEMNIST",
    "LabelPermutedMiniImageNet",
    "NaturePermutedMNIST",
    "PermutedDigits",
    "PermutedMNIST",
    "SlowlyChangingRegression",
    "StationaryMNIST",
    "Stream",
    "SumOfTwo",
]
