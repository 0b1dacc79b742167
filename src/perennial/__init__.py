"""Perennial keeps neural networks able to learn."""

from perennial.methods import SGD, UPGD, Adam, ContinualBackprop, ShrinkAndPerturb
from perennial.networks import MLP
from perennial.population import Lane, Population
from perennial.streams import PermutedDigits, SlowlyChangingRegression

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "SGD",
    "UPGD",
    "Adam",
    "ContinualBackprop",
    "Lane",
    "PermutedDigits",
    "Population",
    "ShrinkAndPerturb",
    "SlowlyChangingRegression",
    "__version__",
]
