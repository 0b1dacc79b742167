"""What changes under a network: tasks, their order, their data.

To add a stream, write its file and add its class to :data:`REGISTRY`.
"""

from perennial.streams.base import Examples, Feed, HeldOut, Stream
from perennial.streams.class_pairs import ClassPairs
from perennial.streams.permuted_digits import PermutedDigits
from perennial.streams.permuted_mnist import PermutedMNIST
from perennial.streams.slowly_changing_regression import SlowlyChangingRegression
from perennial.streams.sum_of_two import SumOfTwo

REGISTRY: tuple[type[Stream], ...] = (SlowlyChangingRegression, PermutedDigits, PermutedMNIST, SumOfTwo, ClassPairs)

__all__ = [
    "REGISTRY",
    "ClassPairs",
    "Examples",
    "Feed",
    "HeldOut",
    "PermutedDigits",
    "PermutedMNIST",
    "SlowlyChangingRegression",
    "Stream",
    "SumOfTwo",
]
