"""The networks of the lottery ticket paper, drawn as there: Gaussian Glorot weights, biases of zero."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd


def lenet_300_100() -> nn.Module:
    """LeNet-300-100 for MNIST: 266,200 weights."""
    return _drawn(_named(_perceptron(784, 300, 100, 10)))


def conv_2() -> nn.Module:
    """Two convolutions of 64 channels, pooling, 256-256-10: 4.3 million weights; CIFAR-10."""
    return _drawn(_convolutions((64,)))


def conv_4() -> nn.Module:
    """Twice two convolutions, of 64 and 128 channels, 256-256-10: 2.4 million weights; CIFAR-10."""
    return _drawn(_convolutions((64, 128)))


def conv_6() -> nn.Module:
    """Three times two convolutions, of 64, 128 and 256 channels, 256-256-10: 2.3 million weights; CIFAR-10.

    The paper prints 1.7 million; what it describes has 2.26.
    """
    return _drawn(_convolutions((64, 128, 256)))


def vgg_19() -> nn.Module:
    """VGG-19 for CIFAR-10 with batch norms and one linear layer: 20 million weights."""
    layers: dict[str, nn.Module] = {}
    channels = 3
    for block, (width, count) in enumerate(((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)), start=1):
        for place in "abcd"[:count]:
            layers[f"conv{block}{place}"] = nn.Conv2d(channels, width, 3, padding=1)
            layers[f"norm{block}{place}"], layers[f"relu{block}{place}"] = nn.BatchNorm2d(width), nn.ReLU()
            channels = width
        layers[f"pool{block}"] = nn.MaxPool2d(2) if block < 5 else nn.AvgPool2d(2)
    return _drawn(_named(layers | _perceptron(512, 10)))


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norms, around which the input is added."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


def resnet_20() -> nn.Module:
    """The residual network of 16, 32 and 64 channels for CIFAR-10: 272,000 weights.

    The paper calls it ResNet-18; it is not that of torchvision.
    """
    layers: dict[str, nn.Module] = {"conv": nn.Conv2d(3, 16, 3, 1, 1, bias=False), "norm": nn.BatchNorm2d(16)}
    layers["relu"], channels = nn.ReLU(), 16
    for group, (width, stride) in enumerate(((16, 1), (32, 2), (64, 2)), start=1):
        for place in "abc":
            layers[f"block{group}{place}"] = _Block(channels, width, stride if place == "a" else 1)
            channels = width
    return _drawn(_named(layers | {"pool": nn.AdaptiveAvgPool2d(1)} | _perceptron(64, 10)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    factory.__name__: factory for factory in (lenet_300_100, conv_2, conv_4, conv_6, resnet_20, vgg_19)
}


def _perceptron(*sizes: int) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for number, (inputs, units) in enumerate(pairwise(sizes[:-1]), start=1):
        layers[f"fc{number}"], layers[f"act{number}"] = nn.Linear(inputs, units), nn.ReLU()
    return layers | {"output": nn.Linear(sizes[-2], sizes[-1])}


def _convolutions(widths: tuple[int, ...]) -> nn.Sequential:
    layers: dict[str, nn.Module] = {}
    channels = 3
    for block, width in enumerate(widths, start=1):
        for place in "ab":
            layers[f"conv{block}{place}"] = nn.Conv2d(channels, width, 3, padding=1)
            layers[f"relu{block}{place}"] = nn.ReLU()
            channels = width
        layers[f"pool{block}"] = nn.MaxPool2d(2)
    side = 32 >> len(widths)
    return _named(layers | _perceptron(channels * side * side, 256, 256, 10))


def _named(layers: dict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


@torch.no_grad()
def _drawn(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Linear, _ConvNd)):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
