"""Modules that people combine with plasticity methods.

They are ordinary modules of PyTorch and need nothing else of this library: activations that keep every unit's gradient
alive, normalisation layers, and the injection of a fresh head into a network that has stopped learning.
"""

from perennial.modules.activations import CReLU, DeepFourier
from perennial.modules.injection import Injected, inject_plasticity
from perennial.modules.normalize import normalize_layers
from perennial.modules.online_norm import OnlineNorm

__all__ = ["CReLU", "DeepFourier", "Injected", "OnlineNorm", "inject_plasticity", "normalize_layers"]
