"""Networks that studies name. Any model factory will do from Python; these are the papers'."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from perennial.modules import CReLU, DeepFourier, OnlineNorm

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "swish": nn.SiLU,
    "linear": nn.Identity,
    "crelu": CReLU,
    "deep_fourier": DeepFourier,
}

_GAINS = {
    "sigmoid": 1.0,
    "tanh": 5 / 3,
    "elu": math.sqrt(2),
    "relu": math.sqrt(2),
    "leaky_relu": math.sqrt(2 / (1 + 0.01**2)),
    "swish": math.sqrt(2),
    "linear": 1.0,
    "crelu": math.sqrt(2),
    "deep_fourier": math.sqrt(2),
}
"""What ``torch.nn.init.calculate_gain`` gives; it refuses ELU and swish, which get ReLU's as in the papers' code.

Where a unit becomes two, the two together have the unit's mean square (CReLU) or 1 (Fourier features): as for ReLU, the
mean square of an input is half of what the gain must restore.
"""


@dataclass(frozen=True)
class MLP:
    """A multilayer perceptron; weights Kaiming-uniform, biases zero (or as torch.nn.Linear draws them).

    With crelu and deep_fourier, which give two units for one, a layer reads twice the units of the hidden layer before.
    """

    name: ClassVar[str] = "mlp"

    hidden: tuple[int, ...] = (5,)
    """Units of each hidden layer."""
    activation: str = "relu"
    """One of sigmoid, tanh, elu, relu, leaky_relu, swish, linear, crelu, deep_fourier."""
    init: str = "kaiming"
    """``kaiming``: uniform on +-gain * sqrt(3 / fan_in), the output layer with gain 1, zero biases, as in the Nature
    paper's code. ``default``: as torch.nn.Linear."""
    dropout: float = 0.0
    """Share of hidden units that a step leaves out, after the activation function."""
    norm: str = "none"
    """``online``: :class:`perennial.modules.OnlineNorm` before each activation function; or ``none``."""
    forward_decay: float | None = None
    """Of the running statistics of online normalisation; None: 0.999."""
    backward_decay: float | None = None
    """Of its accumulated errors; None: 0.99."""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"mlp.activation is {self.activation!r}; it is one of {', '.join(ACTIVATIONS)}")
        if self.init not in ("kaiming", "default"):
            raise ValueError(f"mlp.init is {self.init!r}; it is one of kaiming, default")
        if any(not isinstance(n, int) or n < 1 for n in self.hidden):
            raise ValueError(f"mlp.hidden is {self.hidden!r}; it lists whole numbers of units, each at least 1")
        if self.norm not in ("none", "online"):
            raise ValueError(f"mlp.norm is {self.norm!r}; it is one of none, online")
        for name in ("dropout", "forward_decay", "backward_decay"):
            value = getattr(self, name)
            if name != "dropout" and value is not None and self.norm == "none":
                raise ValueError(
                    f"mlp.{name} is {value!r}, but mlp.norm is 'none'; leave it out, or set norm to online"
                )
            if value is not None and not (isinstance(value, int | float) and 0 <= value < 1):
                raise ValueError(f"mlp.{name} is {value!r}; it must be at least 0 and below 1")

    def build(self, inputs: int, outputs: int) -> nn.Module:
        """The network for flat inputs; parameters drawn from torch's global generator."""
        sizes = (inputs, *self.hidden, outputs)
        doubling = issubclass(ACTIVATIONS[self.activation], (CReLU, DeepFourier))
        layers: list[nn.Module] = []
        for depth, (units, fan_out) in enumerate(itertools.pairwise(sizes)):
            last = depth == len(sizes) - 2
            fan_in = 2 * units if doubling and depth > 0 else units
            linear = nn.Linear(fan_in, fan_out)
            if self.init == "kaiming":
                bound = (1.0 if last else _GAINS[self.activation]) * math.sqrt(3 / fan_in)
                nn.init.uniform_(linear.weight, -bound, bound)
                nn.init.zeros_(linear.bias)
            layers.append(linear)
            if last:
                break
            if self.norm == "online":
                forward = 0.999 if self.forward_decay is None else self.forward_decay
                backward = 0.99 if self.backward_decay is None else self.backward_decay
                layers.append(OnlineNorm(fan_out, forward, backward))
            layers.append(ACTIVATIONS[self.activation]())
            if self.dropout:
                layers.append(nn.Dropout(self.dropout))
        return nn.Sequential(nn.Flatten(), *layers)


@dataclass(frozen=True)
class Linear:
    """A linear map with bias, drawn as the output layer of an MLP: the reference line of the papers' figures."""

    name: ClassVar[str] = "linear"

    def build(self, inputs: int, outputs: int) -> nn.Module:
        """The network for flat inputs; parameters drawn from torch's global generator."""
        return MLP(hidden=()).build(inputs, outputs)


@dataclass(frozen=True)
class UPGDConvNet:
    """The convolutional network of the UPGD paper's CIFAR-10, for pictures of 3 x 32 x 32, drawn as torch draws layers.

    Convolution to 6 channels, 5 x 5, halved by maximum; to 16, 5 x 5, halved; 400 - 120 - 84 - outputs with ReLU. The
    published code has no activation function after the convolutions besides the maximum, and neither has this.
    """

    name: ClassVar[str] = "upgd_convnet"

    def build(self, inputs: int, outputs: int) -> nn.Module:
        """The network for inputs [batch, 3, 32, 32]; parameters drawn from torch's global generator.

        Raises:
            ValueError: an input has not 3 x 32 x 32 numbers.
        """
        _check_pictures(self.name, inputs)
        return nn.Sequential(
            nn.Conv2d(3, 6, 5),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, outputs),
        )


@dataclass(frozen=True)
class ConvNet:
    """The network of Continual ImageNet (Dohare et al., Nature 2024), for pictures of 3 x 32 x 32.

    Convolutions without padding to 32 channels (5 x 5), 64 and 128 (3 x 3), each with a ReLU and maxima over 2 x 2,
    then layers from 512 numbers to 128 units, 128 units and the outputs; weights as torch draws them.
    """

    name: ClassVar[str] = "convnet"

    def build(self, inputs: int, outputs: int) -> nn.Module:
        """The network for inputs [batch, 3, 32, 32]; parameters drawn from torch's global generator.

        Raises:
            ValueError: an input has not 3 x 32 x 32 numbers.
        """
        _check_pictures(self.name, inputs)
        layers: list[nn.Module] = []
        for channels, units, size in ((3, 32, 5), (32, 64, 3), (64, 128, 3)):
            layers += [nn.Conv2d(channels, units, size), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(128, outputs))


def _check_pictures(name: str, inputs: int) -> None:
    if inputs != 3 * 32 * 32:
        raise ValueError(f"{name} takes pictures of 3 x 32 x 32, 3072 numbers, but the inputs have {inputs}")


Network: TypeAlias = MLP | Linear | UPGDConvNet | ConvNet
"""Any of the networks that studies name."""

REGISTRY: tuple[type[Network], ...] = (MLP, Linear, UPGDConvNet, ConvNet)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of the squared error, summed over outputs. [batch, outputs] twice -> []."""
    return ((output - target) ** 2).sum(-1).mean()


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of the negative log likelihood of the class. [batch, classes], int [batch] -> []."""
    log_probability = output - output.logsumexp(-1, keepdim=True)
    return -log_probability.gather(-1, target[:, None].long()).mean()


def correct(output: Tensor, target: Tensor) -> Tensor:
    """Share of the batch whose largest logit is the class. [batch, classes], int [batch] -> []."""
    return (output.argmax(-1) == target).to(torch.float32).mean()
