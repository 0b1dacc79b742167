"""Perennial keeps neural networks able to learn."""

from perennial import methods, optim
from perennial.attach import Keeper, attach
from perennial.methods import *  # noqa: F403 - every method is one import away
from perennial.monitor import Monitor
from perennial.networks import MLP
from perennial.population import Lane, Population
from perennial.streams import PermutedDigits, PermutedMNIST, SlowlyChangingRegression, SumOfTwo
from perennial.units import UnitMap, prove, trace

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "Keeper",
    "Lane",
    "Monitor",
    "PermutedDigits",
    "PermutedMNIST",
    "Population",
    "SlowlyChangingRegression",
    "SumOfTwo",
    "UnitMap",
    "__version__",
    "attach",
    "optim",
    "prove",
    "trace",
    *(method.__name__ for method in (*methods.REGISTRY, *methods.PROBES)),
]
