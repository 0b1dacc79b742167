"""Architectures for the tests of unit maps: small, random in every parameter, each with what its map must say.

``ZOO[name]()`` builds one :class:`Example`. What a map must say is written down from the architecture, never read off a
tracer: the layers that must be listed, with their size and whether they are coupled, and the modules that must be
refused, with a word of the reason. What is in neither may be either, as long as it is proved or refused.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint


@dataclass
class Example:
    """A network, an example input, and what its unit map must say."""

    model: nn.Module
    args: tuple[Any, ...]
    listed: Mapping[str, tuple[int, bool]]
    """{layer: (size, coupled)}. A layer of several producers goes by any of them."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """{module: a word of the reason}, the empty word for any reason."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    normed: frozenset[str] = frozenset()
    """The listed layers with a norm over units between them and a reader."""


class Net(nn.Module):
    """A module out of parts and a function of (parts, inputs)."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self, *args, **kwargs)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter and running statistic a value that is nothing special: no zero, no one, no two alike.

    Matrices keep activations of order one; factors and variances lie in [0.5, 1.5]; biases in [-0.3, 0.3].
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(like.shape, generator=generator, dtype=torch.float64)).to(like.dtype)

    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            last = name.rpartition(".")[2]
            if not p.is_floating_point() or p.layout != torch.strided or last in _KEPT:
                continue
            if p.dim() > 1:
                bound = math.sqrt(3 / max(p[0].numel(), 1)) if p.shape[0] > 1 else 1.0
                p.copy_(draw(p, -bound, bound))
            elif "weight" in last or last in ("running_var", "scale", "original0"):
                p.copy_(draw(p, 0.5, 1.5))
            elif last != "num_batches_tracked":
                p.copy_(draw(p, -0.3, 0.3))
    return model


_KEPT = frozenset({"inv_freq", "original_inv_freq", "action_scale", "action_bias"})


def values(*shape: int, seed: int = 1) -> Tensor:
    """An example input: normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, below: int) -> Tensor:
    """An example input: token numbers."""
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(2))


ZOO: dict[str, Callable[[], Example]] = {}


def entry(make: Callable[[], Example]) -> Callable[[], Example]:
    """Registers an example under its function's name, its model made random."""

    def build() -> Example:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            example = make()
        randomise(example.model)
        return example

    ZOO[make.__name__] = build
    return build


def register(name: str, make: Callable[[], Example]) -> None:
    make.__name__ = name
    entry(make)


# --- perceptrons ----------------------------------------------------------------------------------------------------


@entry
def inputs_that_come_in_late() -> Example:
    """Their tensors are there from the start, though no operation has used them while there are units."""

    def forward(m: Any, x: Tensor, y: Tensor, *, factor: Tensor) -> Tensor:
        h = m.a(x).tanh()
        g = m.b(y).tanh()
        return m.d((m.c(torch.cat([h, g], 1)) * factor).tanh())  # type: ignore[no-any-return]

    model = Net(forward, a=nn.Linear(6, 5), b=nn.Linear(3, 4), c=nn.Linear(9, 4), d=nn.Linear(4, 2))
    return Example(
        model, (values(8, 6), values(8, 3)), {"a": (5, False), "b": (4, False), "c": (4, False)},
        kwargs={"factor": values(8, 1).abs()},
    )  # fmt: skip


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, nn.LeakyReLU, nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.SELU, nn.CELU,
    nn.Softplus, nn.Softsign, nn.Mish, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.ReLU6, nn.LogSigmoid,
    nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.PReLU, lambda: nn.Threshold(-1.0, 0.2), nn.Identity,
    nn.Dropout, nn.AlphaDropout, lambda: nn.RReLU().eval(), lambda: nn.ReLU(inplace=True), lambda: nn.ELU(inplace=True),
)  # fmt: skip


def _activation(make: Callable[[], nn.Module]) -> Callable[[], Example]:
    def mlp() -> Example:
        model = nn.Sequential(nn.Linear(6, 5), make(), nn.Linear(5, 4), make(), nn.Linear(4, 2))
        return Example(model, (values(8, 6),), {"0": (5, False), "2": (4, False)})

    return mlp


for _make in ACTIVATIONS:
    _layer = _make()
    _variant = "inplace" if getattr(_layer, "inplace", False) else str(getattr(_layer, "approximate", "none"))
    _name = f"mlp_{type(_layer).__name__.lower()}" + ("" if _variant == "none" else f"_{_variant}")
    register(_name, _activation(_make))


@entry
def mlp_slopes_of_its_own() -> Example:
    model = nn.Sequential(nn.Linear(6, 5), nn.PReLU(5), nn.Linear(5, 2))
    return Example(model, (values(8, 6),), {"0": (5, False)})


@entry
def mlp_without_biases() -> Example:
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False))
    return Example(model, (values(8, 6),), {"0": (5, False)})


@entry
def mlp_on_one_sample_without_a_batch() -> Example:
    return Example(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), (values(6),), {"0": (5, False)})


@entry
def mlp_of_one_unit() -> Example:
    return Example(nn.Sequential(nn.Linear(6, 1), nn.Tanh(), nn.Linear(1, 2)), (values(8, 6),), {"0": (1, False)})


@entry
def frozen_layers() -> Example:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    model[4].requires_grad_(False)
    return Example(model, (values(8, 6),), {"0": (5, False), "2": (4, False)})


@entry
def concatenated_rectifiers() -> Example:
    model = Net(
        lambda m, x: m.b(torch.cat([(h := m.a(x)).relu(), (-h).relu()], 1)), a=nn.Linear(6, 4), b=nn.Linear(8, 2)
    )
    return Example(model, (values(8, 6),), {"a": (4, False)})


@entry
def two_heads_of_a_trunk() -> Example:
    model = Net(
        lambda m, x: {"policy": m.policy(h := m.trunk(x).tanh()), "value": m.value(h)},
        trunk=nn.Linear(6, 5), policy=nn.Linear(5, 3), value=nn.Linear(5, 1),
    )  # fmt: skip
    return Example(model, (values(8, 6),), {"trunk": (5, False)})


@entry
def sum_of_two_layers() -> Example:
    model = Net(
        lambda m, x: m.c((m.a(x) + m.b(x)).relu()), a=nn.Linear(6, 5), b=nn.Linear(6, 5, bias=False), c=nn.Linear(5, 2)
    )
    return Example(model, (values(8, 6),), {"a": (5, False)})


@entry
def factors_of_the_unit() -> Example:
    model = Net(
        lambda m, x: m.b(m.scale * m.a(x).relu() + m.shift),
        a=nn.Linear(6, 5), b=nn.Linear(5, 2), scale=nn.Parameter(torch.ones(5)), shift=nn.Parameter(torch.ones(5)),
    )  # fmt: skip
    return Example(model, (values(8, 6),), {"a": (5, False)})


@entry
def a_factor_of_all_units() -> Example:
    model = Net(
        lambda m, x: m.b(m.temperature * m.a(x).relu()),
        a=nn.Linear(6, 5), b=nn.Linear(5, 2), temperature=nn.Parameter(torch.ones(())),
    )  # fmt: skip
    return Example(model, (values(8, 6),), {"a": (5, False)})


class _Noisy(nn.Linear):
    """A linear layer with learned noise, as NoisyNet draws it."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__(n, k)
        self.sigma_weight = nn.Parameter(torch.ones(k, n))
        self.sigma_bias = nn.Parameter(torch.ones(k))

    def forward(self, x: Tensor) -> Tensor:
        eps_in, eps_out = torch.randn(x.shape[-1]).to(x.dtype), torch.randn(self.out_features).to(x.dtype)
        weight = self.weight + self.sigma_weight * eps_out[:, None] * eps_in[None]
        return F.linear(x, weight, self.bias + self.sigma_bias * eps_out)


@entry
def noisy_network() -> Example:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), _Noisy(5, 4), nn.ReLU(), _Noisy(4, 2))
    return Example(model, (values(8, 6),), {})


# --- gates ----------------------------------------------------------------------------------------------------------


@entry
def gated_by_a_sigmoid() -> Example:
    model = Net(lambda m, x: m.c(m.a(x) * m.b(x).sigmoid()), a=nn.Linear(6, 5), b=nn.Linear(6, 5), c=nn.Linear(5, 2))
    return Example(model, (values(8, 6),), {"a": (5, False)})


@entry
def gated_linear_unit() -> Example:
    model = Net(lambda m, x: m.b(F.glu(m.a(x), -1)), a=nn.Linear(6, 8), b=nn.Linear(4, 2))
    return Example(model, (values(8, 6),), {"a": (4, False)})


@entry
def gated_by_chunks() -> Example:
    def forward(m: Any, x: Tensor) -> Tensor:
        up, gate = m.a(x).chunk(2, -1)
        return m.b(up * F.silu(gate))

    return Example(Net(forward, a=nn.Linear(6, 8), b=nn.Linear(4, 2)), (values(8, 6),), {"a": (4, False)})


@entry
def swiglu() -> Example:
    model = Net(
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
        gate=nn.Linear(6, 5, bias=False), up=nn.Linear(6, 5, bias=False), down=nn.Linear(5, 2, bias=False),
    )  # fmt: skip
    return Example(model, (values(8, 6),), {"gate": (5, False)})


@entry
def highway() -> Example:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        t = m.gate(h).sigmoid()
        return m.head(t * m.body(h).relu() + (1 - t) * h)

    model = Net(forward, stem=nn.Linear(6, 5), gate=nn.Linear(5, 5), body=nn.Linear(5, 5), head=nn.Linear(5, 2))
    return Example(model, (values(8, 6),), {"stem": (5, True)})


@entry
def experts_side_by_side() -> Example:
    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = m.trunk(x).relu().chunk(2, 1)
        return m.head(torch.cat([m.a(left).tanh(), m.b(right).relu()], 1))

    model = Net(forward, trunk=nn.Linear(6, 8), a=nn.Linear(4, 3), b=nn.Linear(4, 5), head=nn.Linear(8, 2))
    return Example(model, (values(8, 6),), {"a": (3, False), "b": (5, False), "trunk[0:4]": (4, False)})


@entry
def gate_of_the_whole_layer() -> Example:
    """A squeeze-and-excitation block: positions are averaged, and channels gate themselves."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x).relu()
        gate = m.excite(m.squeeze(h.mean((2, 3))).relu()).sigmoid()
        return m.head((h * gate[:, :, None, None]).flatten(1))

    model = Net(
        forward, stem=nn.Conv2d(2, 4, 3), squeeze=nn.Linear(4, 3), excite=nn.Linear(3, 4), head=nn.Linear(36, 2)
    )
    return Example(model, (values(3, 2, 5, 5),), {"squeeze": (3, False), "stem": (4, True)})


# --- convolutions ---------------------------------------------------------------------------------------------------

POOLS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "max": (lambda: nn.MaxPool2d(2), 16), "average": (lambda: nn.AvgPool2d(2), 16),
    "adaptive_average": (lambda: nn.AdaptiveAvgPool2d(2), 16), "adaptive_max": (lambda: nn.AdaptiveMaxPool2d(2), 16),
    "global": (lambda: nn.AdaptiveAvgPool2d(1), 4), "overlapping": (lambda: nn.MaxPool2d(3, 1, 1), 64),
}  # fmt: skip


def _pooled(make: Callable[[], nn.Module], columns: int) -> Callable[[], Example]:
    def convolutional() -> Example:
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), make(), nn.Flatten(),
            nn.Linear(columns, 5), nn.ReLU(), nn.Linear(5, 2),
        )  # fmt: skip
        return Example(model, (values(3, 2, 8, 8),), {"0": (3, False), "2": (4, False), "6": (5, False)})

    return convolutional


for _name, (_make, _columns) in POOLS.items():
    register(f"pool_{_name}", _pooled(_make, _columns))


@entry
def convolution_of_one_dimension() -> Example:
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(3, 4, 2, dilation=2), nn.Tanh(),
        nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    return Example(model, (values(3, 2, 16),), {"0": (3, False), "3": (4, False)})


@entry
def convolution_of_three_dimensions() -> Example:
    model = nn.Sequential(
        nn.Conv3d(1, 3, 2), nn.ReLU(), nn.AvgPool3d(2), nn.Conv3d(3, 4, 1), nn.ReLU(), nn.Flatten(1), nn.Linear(4, 2)
    )
    return Example(model, (values(3, 1, 4, 4, 4),), {"0": (3, False), "3": (4, False)})


@entry
def channels_last() -> Example:
    model = Net(
        lambda m, x: m.c(m.b(m.a(x).relu().permute(0, 2, 3, 1)).relu().flatten(1)),
        a=nn.Conv2d(2, 3, 3), b=nn.Linear(3, 4), c=nn.Linear(36, 2),
    )  # fmt: skip
    return Example(model, (values(3, 2, 5, 5),), {"a": (3, False), "b": (4, False)})


@entry
def vgg() -> Example:
    parts: list[nn.Module] = []
    for n, k, pooled in ((2, 4, False), (4, 4, True), (4, 6, False), (6, 6, True)):
        parts += [nn.Conv2d(n, k, 3, padding=1), nn.BatchNorm2d(k), nn.ReLU(True)]
        parts += [nn.MaxPool2d(2)] if pooled else []
    model = nn.Sequential()
    model.features = nn.Sequential(*parts)
    model.flatten = nn.Flatten()
    model.classifier = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
    listed = {f"features.{i}": (k, False) for i, k in ((0, 4), (3, 4), (7, 6), (10, 6))}
    return Example(model, (values(4, 2, 8, 8),), {**listed, "classifier.0": (8, False)})


class _Block(nn.Module):
    """The basic block of a residual network."""

    def __init__(self, n: int, k: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n, k, 3, stride, 1, bias=False), nn.BatchNorm2d(k)
        self.conv2, self.bn2 = nn.Conv2d(k, k, 3, 1, 1, bias=False), nn.BatchNorm2d(k)
        self.downsample: nn.Module | None = None
        if stride != 1 or n != k:
            self.downsample = nn.Sequential(nn.Conv2d(n, k, 1, stride, bias=False), nn.BatchNorm2d(k))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = self.bn2(self.conv2(h))
        h += x if self.downsample is None else self.downsample(x)
        return F.relu(h, inplace=True)


class ResNet18(nn.Module):
    """A residual network of 18 layers with the stem for small images."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for i in range(1, 5):
            first = _Block(widths[i - 1], widths[i], 1 if i == 1 else 2)
            setattr(self, f"layer{i}", nn.Sequential(first, _Block(widths[i], widths[i], 1)))
        self.fc = nn.Linear(8 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(h, 1), 1))


def _resnet(training: bool) -> Example:
    interior = {f"layer{i}.{j}.conv1": (2 * 2**i, False) for i in range(1, 5) for j in range(2)}
    streams = {"conv1": (4, True), **{f"layer{i}.0.conv2": (2 * 2**i, True) for i in range(2, 5)}}
    return Example(ResNet18().train(training), (values(3, 3, 16, 16),), {**interior, **streams})


register("resnet18_training", lambda: _resnet(True))
register("resnet18_evaluating", lambda: _resnet(False))


@entry
def shortcut_of_zeros() -> Example:
    """A residual network whose wider stage begins with its narrower one, padded with channels of zeros."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        h = h + m.b(m.a(h).relu())
        wide = F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)) + m.d(m.c(h).relu())
        return m.head(wide.relu().mean((2, 3)))

    model = Net(
        forward, stem=nn.Conv2d(2, 4, 1), a=nn.Conv2d(4, 3, 1), b=nn.Conv2d(3, 4, 1), c=nn.Conv2d(4, 5, 1, 2),
        d=nn.Conv2d(5, 6, 1), head=nn.Linear(6, 2),
    )  # fmt: skip
    return Example(model, (values(3, 2, 6, 6),), {"a": (3, False), "c": (5, False)})


@entry
def depthwise_separable() -> Example:
    def part(n: int, k: int) -> list[nn.Module]:
        return [
            nn.Conv2d(n, n, 3, 1, 1, groups=n, bias=False), nn.BatchNorm2d(n), nn.ReLU6(),
            nn.Conv2d(n, k, 1, bias=False), nn.BatchNorm2d(k), nn.ReLU6(),
        ]  # fmt: skip

    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), *part(4, 5), *part(5, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    )
    return Example(model, (values(3, 2, 8, 8),), {"0": (4, False), "5": (5, False), "11": (6, False)})


@entry
def inverted_residual() -> Example:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        h = h + m.project(m.depth(m.expand(h).relu()).relu())
        return m.head(h.mean((2, 3)))

    model = Net(
        forward, stem=nn.Conv2d(2, 4, 1), expand=nn.Conv2d(4, 8, 1), depth=nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        project=nn.Conv2d(8, 4, 1), head=nn.Linear(4, 2),
    )  # fmt: skip
    return Example(model, (values(3, 2, 6, 6),), {"expand": (8, False), "stem": (4, True)})


@entry
def depthwise_with_a_multiplier() -> Example:
    """Each channel becomes two, which stay one unit: nothing else is in them."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)
    )
    return Example(model, (values(3, 2, 6, 6),), {"0": (4, False)})


@entry
def grouped_reader() -> Example:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)
    )
    return Example(model, (values(3, 2, 5, 5),), {"0": (4, False), "2": (6, False)})


@entry
def grouped_reader_in_four() -> Example:
    model = nn.Sequential(
        nn.Conv1d(2, 8, 1), nn.Tanh(), nn.Conv1d(8, 4, 2, groups=4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
    )
    return Example(model, (values(3, 2, 4),), {"0": (8, False), "2": (4, False)})


@entry
def shuffled_groups() -> Example:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).relu()
        shuffled = h.view(h.shape[0], 2, 3, *h.shape[2:]).transpose(1, 2).reshape(h.shape)
        return m.c(m.b(shuffled).relu().flatten(1))

    model = Net(forward, a=nn.Conv2d(2, 6, 3), b=nn.Conv2d(6, 4, 3, groups=2), c=nn.Linear(4, 2))
    return Example(model, (values(3, 2, 5, 5),), {"a": (6, False), "b": (4, False)})


@entry
def transposed_convolutions() -> Example:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, 2), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2, 2), nn.ReLU(), nn.ConvTranspose2d(3, 5, 3),
        nn.ReLU(), nn.Conv2d(5, 1, 1),
    )  # fmt: skip
    return Example(model, (values(3, 2, 7, 7),), {"0": (4, False), "2": (3, False), "4": (5, False)})


@entry
def transposed_convolution_in_groups() -> Example:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, 2), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Conv2d(6, 1, 1))
    return Example(model, (values(3, 2, 7, 7),), {})


@entry
def decoder_from_a_vector() -> Example:
    model = nn.Sequential(
        nn.Linear(5, 16), nn.ReLU(), nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 3, 2, 2), nn.ReLU(),
        nn.ConvTranspose2d(3, 1, 3),
    )  # fmt: skip
    return Example(model, (values(3, 5),), {"3": (3, False)})


@entry
def densely_connected() -> Example:
    def forward(m: Any, x: Tensor) -> Tensor:
        parts = [m.stem(x)]
        for layer in m.layers:
            parts.append(layer(torch.cat(parts, 1)))
        return m.head(torch.cat(parts, 1).mean((2, 3)))

    def layer(n: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 3, 3, padding=1, bias=False))

    model = Net(
        forward, stem=nn.Conv2d(2, 4, 3), layers=nn.ModuleList([layer(4), layer(7), layer(10)]), head=nn.Linear(13, 2)
    )
    listed = {"stem": (4, False), **{f"layers.{i}.2": (3, False) for i in range(3)}}
    return Example(model, (values(3, 2, 6, 6),), listed)


def _unet(up: Callable[[], nn.Module], listed: Mapping[str, tuple[int, bool]]) -> Example:
    def forward(m: Any, x: Tensor) -> Tensor:
        left = m.down(x).relu()
        deep = m.bottom(F.max_pool2d(left, 2)).relu()
        return m.head(m.join(torch.cat([m.up(deep), left], 1)).relu())

    model = Net(
        forward, down=nn.Conv2d(2, 3, 3, 1, 1), bottom=nn.Conv2d(3, 4, 3, 1, 1), up=up(), join=nn.Conv2d(7, 5, 3, 1, 1),
        head=nn.Conv2d(5, 1, 1),
    )  # fmt: skip
    common = {"down": (3, False), "bottom": (4, False), "join": (5, False)}
    return Example(model, (values(3, 2, 6, 6),), {**common, **listed})


register("unet_transposed", lambda: _unet(lambda: nn.ConvTranspose2d(4, 4, 2, 2), {"up": (4, False)}))
register("unet_nearest", lambda: _unet(lambda: nn.Upsample(scale_factor=2), {}))
register("unet_bilinear", lambda: _unet(lambda: nn.Upsample(scale_factor=2, mode="bilinear"), {}))


@entry
def shuffled_pixels() -> Example:
    """Four channels lie side by side in the picture that the next layer reads with one column."""
    model = nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.PixelShuffle(2), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 1))
    return Example(model, (values(3, 2, 5, 5),), {"3": (4, False)})


# --- norms ----------------------------------------------------------------------------------------------------------


class RootMeanSquareNorm(nn.Module):
    """A root mean square norm written out, as language models do."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _batch_norm(training: bool) -> Example:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    return Example(model.train(training), (values(8, 6),), {"0": (5, False), "3": (4, False)})


register("batch_norm_training", lambda: _batch_norm(True))
register("batch_norm_evaluating", lambda: _batch_norm(False))


@entry
def batch_norm_without_affine_or_running_statistics() -> Example:
    norm = nn.BatchNorm1d(5, affine=False, track_running_stats=False)
    return Example(nn.Sequential(nn.Linear(6, 5), norm, nn.Linear(5, 2)), (values(8, 6),), {"0": (5, False)})


@entry
def batch_norm_on_the_flattened() -> Example:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.BatchNorm1d(27), nn.ReLU(), nn.Linear(27, 2))
    return Example(model, (values(4, 2, 5, 5),), {"0": (3, False)})


def _between(norm: Callable[[], nn.Module]) -> Callable[[], Example]:
    def normed() -> Example:
        model = nn.Sequential(nn.Linear(6, 5), norm(), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
        return Example(model, (values(8, 6),), {"0": (5, False), "3": (4, False)}, normed=frozenset({"0"}))

    return normed


register("layer_norm", _between(lambda: nn.LayerNorm(5)))
register("layer_norm_without_affine", _between(lambda: nn.LayerNorm(5, elementwise_affine=False)))
register("root_mean_square_norm", _between(lambda: nn.RMSNorm(5)))
register("root_mean_square_norm_written_out", _between(lambda: RootMeanSquareNorm(5)))


@entry
def group_norm() -> Example:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    )
    listed = {"0": (4, False), "3": (3, False)}
    return Example(model, (values(3, 2, 6, 6),), listed, normed=frozenset({"0"}))


@entry
def instance_norm() -> Example:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )
    return Example(model, (values(3, 2, 6, 6),), {"0": (4, False)})


@entry
def local_response_norm() -> Example:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.LocalResponseNorm(3), nn.Flatten(), nn.Linear(64, 2))
    return Example(model, (values(3, 2, 6, 6),), {}, {"0": ""})


# --- attention ------------------------------------------------------------------------------------------------------


def _encoder(norm_first: bool, training: bool) -> Example:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first)
    model = nn.Sequential()
    model.embed = nn.Linear(6, 8)
    model.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model.norm = nn.LayerNorm(8)
    model.head = nn.Linear(8, 2)
    listed, refused = {"embed": (8, True)}, {}
    for i in range(2):
        listed[f"encoder.layers.{i}.linear1"] = (12, False)
        listed[f"encoder.layers.{i}.self_attn[16:24]"] = (8, False)
        refused[f"encoder.layers.{i}.self_attn"] = ""
    return Example(model.train(training), (values(3, 4, 6),), listed, refused, normed=frozenset({"embed"}))


for _first in (True, False):
    for _training in (True, False):
        register(
            f"transformer_encoder_norm_{'first' if _first else 'last'}_{'training' if _training else 'evaluating'}",
            lambda first=_first, training=_training: _encoder(first, training),
        )


def _attention(weights: bool) -> Example:
    model = Net(
        lambda m, x: m.attention(x, x, x, need_weights=weights)[0],
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
    )
    return Example(model, (values(3, 4, 8),), {"attention[16:24]": (8, False)}, {"attention": ""})


register("attention_alone", lambda: _attention(False))
register("attention_alone_with_its_weights", lambda: _attention(True))


@entry
def attention_of_other_widths() -> Example:
    """Keys and values of other widths have projections of their own."""
    model = Net(
        lambda m, x, y, z: m.attention(x, y, z)[0],
        attention=nn.MultiheadAttention(8, 2, kdim=5, vdim=6, batch_first=True),
    )
    return Example(model, (values(3, 4, 8), values(3, 7, 5), values(3, 7, 6)), {"attention": (8, False)})


def _own_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (part.view(*x.shape[:2], 2, 4).transpose(1, 2) for part in m.qkv(x).split(8, -1))
    pattern = torch.softmax(q @ k.transpose(-2, -1) / 2, -1)
    return m.out((pattern @ v).transpose(1, 2).reshape(*x.shape[:2], 8))


@entry
def attention_written_out() -> Example:
    model = Net(_own_attention, qkv=nn.Linear(6, 24), out=nn.Linear(8, 3))
    return Example(model, (values(3, 4, 6),), {"qkv[16:24]": (8, False)}, {"qkv": ""})


@entry
def attention_over_units() -> Example:
    """The softmax runs over the values' own positions, but the product over their units: nothing may be listed."""
    model = Net(
        lambda m, x: m.out(m.values(x) @ torch.softmax(m.mix(x).mean(1).view(-1, 5, 5), -1)),
        values=nn.Linear(6, 5), mix=nn.Linear(6, 25), out=nn.Linear(5, 2),
    )  # fmt: skip
    return Example(model, (values(3, 4, 6),), {}, {"values": "", "mix": ""})


# --- what must be refused -------------------------------------------------------------------------------------------


def _one(
    forward: Callable[..., Any], refused: Mapping[str, str], listed: Mapping[str, tuple[int, bool]] | None = None,
    **more: Callable[[], nn.Module],
) -> Callable[[], Example]:  # fmt: skip
    """Layers a (6 to 5), b (5 to 5) and c (5 to 2), and a function of them."""

    def build() -> Example:
        parts = {"a": nn.Linear(6, 5), "b": nn.Linear(5, 5), "c": nn.Linear(5, 2)}
        parts |= {name: make() for name, make in more.items()}
        return Example(Net(forward, **parts), (values(8, 6),), listed or {}, refused)

    return build


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class _Foreign(torch.autograd.Function):
    """Sums over units in memory that torch does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.cumsum(x.detach().numpy(), 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _written(m: Any, x: Tensor) -> Tensor:
    """Two layers write into one buffer."""
    h = torch.zeros(x.shape[0], 10, dtype=x.dtype)
    h[:, :5] = m.a(x).relu()
    h[:, 5:] = m.b(x[:, :5]).relu()
    return m.d(h)


def _written_whole(m: Any, x: Tensor) -> Tensor:
    h = torch.empty(x.shape[0], 5, dtype=x.dtype)
    h.copy_(m.a(x).relu())
    return m.c(h) + m.b(x[:, :5])[:, :2]


def _given_out(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    doubled = torch.empty_like(h)
    torch.mul(h, 2.0, out=doubled)
    return m.c(h) + doubled[:, :2] + m.b(x[:, :5])[:, :2]


def _view_of_what_changes(m: Any, x: Tensor) -> Tensor:
    """A view that was made before the tensor changed shows what it became."""
    h = m.a(x)
    view = h[:, :2]
    h += m.b(x[:, :5]).roll(2, 1)
    return m.c(h) + view


def _change_through_a_view(m: Any, x: Tensor) -> Tensor:
    """A tensor changes with its view, which is all that the operation names."""
    h = m.a(x).clone()
    h[:, :2].add_(m.b(x[:, :5])[:, 3:])
    return m.c(h.tanh())


def _change_through_the_view_of_a_view(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros(x.shape[0], 5, dtype=x.dtype)
    h.view(-1, 5).t()[:3].copy_(m.a(x)[:, 2:].T)
    return m.c(h + m.b(x[:, :5])) + h[:, :2]


def _overwritten(m: Any, x: Tensor) -> Tensor:
    """What was in the place before is gone."""
    h = m.a(x).tanh()
    h[:, :2] = m.b(x[:, :5])[:, 3:]
    return m.c(h)


def _scattered(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros(x.shape[0], 5, dtype=x.dtype)
    h.index_add_(1, torch.tensor([0, 0, 1, 2, 3]), m.a(x))
    return m.c(h) + m.b(x[:, :5])[:, :2]


def _filled_from_a_list(m: Any, x: Tensor) -> Tensor:
    """A tensor made of numbers read out of another."""
    h = m.a(x).relu()
    return m.c(h) + torch.tensor(h.tolist(), dtype=x.dtype)[:, 3:] + m.b(x[:, :5])[:, :2]


def _mapped(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    return m.c(h) + torch.vmap(lambda row: row.cumsum(0))(h)[:, :2] + m.b(x[:, :5])[:, :2]


def _checkpointed(m: Any, x: Tensor) -> Tensor:
    h = checkpoint(lambda y: m.b(m.a(y).relu()).relu(), x, use_reentrant=False)
    return m.c(h)


def _of_the_gradient(m: Any, x: Tensor) -> Tensor:
    """An energy model: the output is made of a gradient, which no forward pass shows."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = m.c(m.b(m.a(x).tanh()).tanh()).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
    return force


def _written_through_a_view(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    memory = torch.zeros(x.shape[0], 5, dtype=x.dtype)
    memory.view(-1, 5)[:] = h
    return m.c(h) + memory[:, :2] + m.b(x[:, :5])[:, :2]


def _added_through_a_view(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    memory = torch.zeros(x.shape[0], 5, dtype=x.dtype)
    memory[:, :3].add_(h[:, :3])
    return m.c(h) + memory[:, :2] + m.b(x[:, :5])[:, :2]


def _given_out_to_a_view(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    memory = torch.zeros(x.shape[0], 5, dtype=x.dtype)
    torch.mul(h, 2.0, out=memory.view(-1, 5))
    return m.c(h) + memory[:, :2] + m.b(x[:, :5])[:, :2]


def _mask_of_an_assignment(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    out = m.c(h.relu())
    out[h[:, :2] > 0] = 0.3
    return out + m.b(x[:, :5])[:, :2]


def _new_tensor(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        copied = x.new_tensor(h)
    return m.c(h) + copied[:, :2] + m.b(x[:, :5])[:, :2]


def _filled_with_a_unit(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    return m.c(h) + x.new_full((2,), h[0, 0]) + torch.full_like(x[:, :2], h[0, 1])


def _clipped_by_another(m: Any, x: Tensor) -> Tensor:
    h, bound = m.a(x), m.b(x[:, :5])
    return m.c(torch.clamp(h, max=bound.abs()))


def _reinterpreted(m: Any, x: Tensor) -> Tensor:
    """Two halves become the parts of complex numbers, which turn each other."""
    h = m.a(x)[:, :4]
    turned = torch.view_as_real(torch.view_as_complex(h.reshape(-1, 2, 2).contiguous()) * 1j).flatten(1)
    return m.c(F.pad(turned, (0, 1))) + m.b(x[:, :5])[:, :2]


def _through_numpy(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    outside = torch.from_numpy(h.detach().numpy() * 2.0)
    return m.c(h) + outside[:, :2] + m.b(x[:, :5])[:, :2]


def _through_numbers(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    return m.c(h) + float(h[0, 0]) + m.b(x[:, :5])[:, :2]


def _into_a_buffer_of_the_module(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    m.kept.copy_(h)
    return m.c(h) + m.kept[:, :2] + m.b(x[:, :5])[:, :2]


def _through_data(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    return m.c(h) + h.data[:, :2] + m.b(x[:, :5])[:, :2]


class _Holder:
    """An output that is no container torch knows of."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


@dataclass
class _Record:
    logits: Tensor
    hidden: Tensor


def _shape_of(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    return m.c(h) + (h > 0.5).nonzero().shape[0] + m.b(x[:, :5])[:, :2]


def _branch(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    return m.c(h) if bool(h.max() > 2) else -m.c(h) + m.b(x[:, :5])[:, :2]


def _masked(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    other = m.b(x[:, :5])
    return m.c(torch.where(other > 0, h, other))


def _tied(a: bool) -> Callable[[], Example]:
    def build() -> Example:
        model = Net(
            (lambda m, x: m.c(m.b(m.a(x).relu()).relu())) if a
            else lambda m, x: F.linear(m.b(m.a(x).relu()).relu(), m.a.weight.T),
            a=nn.Linear(5, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 2),
        )  # fmt: skip
        if a:
            model.b.weight = model.a.weight
        else:
            del model.c
        return Example(model, (values(8, 5),), {}, {"a": ""} if a else {"a": "", "b": ""})

    return build


def _recurrent(make: Callable[[], nn.Module], cell: bool) -> Callable[[], Example]:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.embed(x).relu()
        if cell:
            state = m.core(h[:, 0])
            state = m.core(h[:, 1], state)
            return m.head(state[0] if isinstance(state, tuple) else state)
        return m.head(m.core(h)[0])

    def build() -> Example:
        model = Net(forward, embed=nn.Linear(6, 5), core=make(), head=nn.Linear(4, 2))
        return Example(model, (values(3, 4, 6),), {}, {"core": "", "embed": ""})

    return build


REFUSED: dict[str, Callable[[], Example]] = {
    "lstm": _recurrent(lambda: nn.LSTM(5, 4, batch_first=True), False),
    "gru": _recurrent(lambda: nn.GRU(5, 4, batch_first=True), False),
    "plain_recurrence": _recurrent(lambda: nn.RNN(5, 4, batch_first=True), False),
    "lstm_cell": _recurrent(lambda: nn.LSTMCell(5, 4), True),
    "gru_cell": _recurrent(lambda: nn.GRUCell(5, 4), True),
    "softmax_over_units": _one(lambda m, x: m.c(m.b(m.a(x).relu()).softmax(1)), {"b": "softmax"}, {"a": (5, False)}),
    "used_twice": _one(lambda m, x: m.c(m.b(m.b(m.a(x).relu()).relu())), {"a": "", "b": ""}),
    "shared_weight": _tied(True),
    "tied_autoencoder": _tied(False),
    "custom_function": _one(lambda m, x: m.c(_Double.apply(m.b(m.a(x).relu()))), {}, {"a": (5, False)}),
    "custom_function_beside_a_reader": _one(
        lambda m, x: m.c(h := m.b(m.a(x).relu())) + _Double.apply(h)[:, :2], {"b": ""}, {"a": (5, False)}
    ),
    "custom_function_out_of_sight": _one(
        lambda m, x: m.c(_Foreign.apply(m.b(m.a(x).relu()))), {"b": ""}, {"a": (5, False)}
    ),
    "custom_function_out_of_sight_beside_a_reader": _one(
        lambda m, x: m.c(h := m.b(m.a(x).relu())) + _Foreign.apply(h)[:, :2], {"b": ""}, {"a": (5, False)}
    ),
    "product_of_activations": _one(
        lambda m, x: m.c((h := m.a(x)) @ h.T @ m.b(x[:, :5])), {"a": "matmul"}, {"b": (5, False)}
    ),
    "outer_product": _one(
        lambda m, x: m.d((m.a(x)[:, :, None] * m.b(x[:, :5])[:, None]).flatten(1)), {"a": "", "b": ""},
        d=lambda: nn.Linear(25, 2),
    ),
    "bilinear": _one(lambda m, x: m.d(m.a(x), m.b(x[:, :5])), {"a": "", "b": ""}, d=lambda: nn.Bilinear(5, 5, 2)),
    "also_an_output": _one(lambda m, x: (m.c(h := m.b(m.a(x).relu()).relu()), h), {"b": "output"}, {"a": (5, False)}),
    "also_an_output_in_a_record": _one(
        lambda m, x: _Record(m.c(h := m.b(m.a(x).relu()).relu()), h), {"b": "output"}, {"a": (5, False)}
    ),
    "also_an_output_in_a_plain_object": _one(
        lambda m, x: _Holder(logits=m.c(h := m.b(m.a(x).relu()).relu()), hidden=[h]), {"b": "output"}
    ),
    "mean_over_units_read_elsewhere": _one(
        lambda m, x: m.c(h := m.a(x).relu()) * m.d(h.mean(1, keepdim=True)), {"a": ""}, d=lambda: nn.Linear(1, 1)
    ),
    "own_norm_whose_statistic_is_read_elsewhere": _one(
        lambda m, x: m.c((h := m.a(x)) * (s := torch.rsqrt(h.pow(2).mean(-1, keepdim=True)))) + s, {"a": ""}
    ),
    "sum_over_units": _one(lambda m, x: m.c(h := m.a(x).relu()) + h.sum(1, keepdim=True), {"a": "over units"}),
    "normalised_over_units": _one(lambda m, x: m.c(F.normalize(m.a(x), dim=1)), {"a": ""}),
    "sorted_units": _one(lambda m, x: m.c(m.a(x).sort(1)[0]), {"a": "sort"}),
    "cumulated_units": _one(lambda m, x: m.c(m.a(x).cumsum(1)), {"a": "cumsum"}),
    "top_units": _one(lambda m, x: m.d(m.a(x).topk(3, 1)[0]), {"a": "topk"}, d=lambda: nn.Linear(3, 2)),
    "best_unit_looked_up": _one(
        lambda m, x: m.c(h := m.a(x).relu()) + m.d(h.argmax(1)), {"a": "argmax"}, d=lambda: nn.Embedding(5, 2)
    ),
    "maxout": _one(lambda m, x: m.d(F.max_pool1d(m.a(x)[:, None], 2)[:, 0]), {"a": ""}, d=lambda: nn.Linear(2, 2)),
    "weight_norm": _one(
        lambda m, x: m.c(m.d(m.a(x).relu()).relu()), {"a": "", "d": ""}, d=lambda: weight_norm(nn.Linear(5, 5))
    ),
    "weight_read_elsewhere": _one(lambda m, x: m.c(m.a(x).relu()) + m.a.weight.sum(), {"a": ""}),
    "column_read_elsewhere": _one(lambda m, x: m.c(m.a(x).relu()) + m.c.weight.norm(), {"a": ""}),
    "written_into_a_buffer": _one(_written, {}, {"a": (5, False), "b": (5, False)}, d=lambda: nn.Linear(10, 2)),
    "written_into_the_whole_of_a_buffer": _one(_written_whole, {}),
    "written_by_an_out_argument": _one(_given_out, {"a": ""}),
    "view_of_what_changes": _one(_view_of_what_changes, {}),
    "change_through_a_view": _one(_change_through_a_view, {}),
    "change_through_the_view_of_a_view": _one(_change_through_the_view_of_a_view, {}),
    "overwritten": _one(_overwritten, {}),
    "scattered": _one(_scattered, {"a": ""}),
    "filled_from_a_list": _one(_filled_from_a_list, {"a": ""}),
    "mapped": _one(_mapped, {"a": ""}),
    "checkpointed": _one(_checkpointed, {}, {"a": (5, False), "b": (5, False)}),
    "gradient_of_an_energy": _one(_of_the_gradient, {"a": "", "b": ""}),
    "written_through_a_view": _one(_written_through_a_view, {"a": ""}),
    "added_through_a_view": _one(_added_through_a_view, {"a": ""}),
    "given_out_to_a_view": _one(_given_out_to_a_view, {"a": ""}),
    "mask_of_an_assignment": _one(_mask_of_an_assignment, {"a": ""}),
    "new_tensor": _one(_new_tensor, {"a": ""}),
    "filled_with_a_unit": _one(_filled_with_a_unit, {"a": ""}),
    "clipped_by_another": _one(_clipped_by_another, {}),
    "reinterpreted": _one(_reinterpreted, {"a": ""}),
    "spectral_norm": _one(
        lambda m, x: m.c(m.d(m.a(x).relu()).relu()), {"a": "", "d": ""}, d=lambda: spectral_norm(nn.Linear(5, 5))
    ),
    "through_numpy": _one(_through_numpy, {"a": ""}),
    "through_a_python_number": _one(_through_numbers, {"a": ""}),
    "through_data": _one(_through_data, {"a": ""}),
    "through_the_number_of_large_entries": _one(_shape_of, {"a": ""}),
    "through_a_branch": _one(_branch, {"a": ""}),
    "read_by_nobody": _one(lambda m, x: (m.a(x), m.c(m.b(x[:, :5]).relu()))[1], {"a": "read by no"}, {"b": (5, False)}),
    "einsum": _one(lambda m, x: torch.einsum("bi,oi->bo", m.b(m.a(x).relu()).relu(), m.c.weight), {}),
    "read_through_a_slice": _one(lambda m, x: F.linear(m.a(x)[:, :3], m.c.weight[:, :3]), {"a": ""}),
    "joined_with_a_rolled_self": _one(lambda m, x: m.c((h := m.a(x)) + h.roll(1, 1)), {"a": ""}),
    "joined_with_the_reversed_other": _one(lambda m, x: m.c(m.a(x) * m.b(x[:, :5]).flip(1)), {}),
    "chosen_by_the_other": _one(_masked, {}),
    "units_as_batch": _one(lambda m, x: m.d(m.a(x).T), {"a": ""}, d=lambda: nn.Linear(8, 2)),
    "one_unit_scales_all": _one(lambda m, x: m.c((h := m.a(x)) * h[:, :1]), {"a": ""}),
    "noise_of_the_units_shape": _one(
        lambda m, x: m.c(m.b((h := m.a(x)) + torch.randn_like(h)).relu()), {}, {"b": (5, False)}
    ),
    "distance_between_units": _one(lambda m, x: m.d(torch.cdist(m.a(x), m.b(x[:, :5]))), {"a": "", "b": ""},
                                   d=lambda: nn.Linear(8, 2)),
}  # fmt: skip

for _name, _make in REFUSED.items():
    register(_name, _make)


@entry
def written_into_a_buffer_of_the_module() -> Example:
    example = _one(_into_a_buffer_of_the_module, {"a": ""})()
    example.model.register_buffer("kept", torch.zeros(8, 5))
    return example


@entry
def mixture_of_experts() -> Example:
    """Each token goes to its best expert."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.embed(x).flatten(0, 1)
        weight, chosen = m.router(h).softmax(-1).max(-1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(m.experts):
            at = (chosen == i).nonzero()[:, 0]
            out.index_add_(0, at, weight[at, None] * expert(h[at]))
        return m.head(h + out)

    expert = lambda: nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 5))  # noqa: E731
    model = Net(
        forward, embed=nn.Linear(6, 5), router=nn.Linear(5, 2), experts=nn.ModuleList([expert(), expert()]),
        head=nn.Linear(5, 2),
    )  # fmt: skip
    return Example(model, (values(4, 5, 6),), {f"experts.{i}.0": (4, False) for i in range(2)}, {"router": ""})


@entry
def layer_that_nothing_uses() -> Example:
    example = _one(lambda m, x: m.c(m.a(x).relu()), {"b": ""}, {"a": (5, False)})()
    return example


@entry
def sparse_weight() -> Example:
    model = Net(lambda m, x: m.c(torch.sparse.mm(m.w, m.a(x).relu().T).T.relu()), a=nn.Linear(6, 5), c=nn.Linear(4, 2))
    model.w = nn.Parameter(torch.ones(4, 5).tril().to_sparse())
    return Example(model, (values(8, 6),), {}, {"a": ""})


@entry
def whole_number_weight() -> Example:
    """A weight of int8 with a scale, as quantised layers have it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.linear(m.a(x).relu(), m.q.to(x.dtype) * m.scale, None)
        return m.c(h.relu())

    model = Net(forward, a=nn.Linear(6, 5), c=nn.Linear(4, 2), scale=nn.Parameter(torch.ones(4, 1)))
    weight = torch.randint(-127, 128, (4, 5), dtype=torch.int8)
    model.q = nn.Parameter(weight, requires_grad=False)
    return Example(model, (values(8, 6),), {}, {"a": ""})


@entry
def scripted_function() -> Example:
    """What runs inside TorchScript is seen by nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        doubled = torch.jit.script(_doubled)
    return Example(
        Net(lambda m, x: m.c(h := m.a(x).relu()) + doubled(h)[:, :2], a=nn.Linear(6, 5), c=nn.Linear(5, 2)),
        (values(8, 6),), {}, {"a": ""},
    )  # fmt: skip


def _doubled(x: Tensor) -> Tensor:
    return x * 2


# --- language and vision models, adapters, policies -----------------------------------------------------------------


def _bert_config() -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=19, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=10, type_vocab_size=2,
    )  # fmt: skip


@entry
def bert() -> Example:
    from transformers import BertForSequenceClassification

    listed = {"bert.pooler.dense": (8, False), "bert.embeddings.word_embeddings": (8, True)}
    refused = {}
    for i in range(2):
        listed[f"bert.encoder.layer.{i}.intermediate.dense"] = (12, False)
        listed[f"bert.encoder.layer.{i}.attention.self.value"] = (8, False)
        refused |= {f"bert.encoder.layer.{i}.attention.self.{part}": "" for part in ("query", "key")}
    return Example(
        BertForSequenceClassification(_bert_config()).eval(), (tokens(3, 6, below=19),), listed, refused,
        normed=frozenset({"bert.embeddings.word_embeddings"}),
    )  # fmt: skip


def _t5(activation: str) -> Example:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=19, d_model=8, d_kv=3, d_ff=12, num_layers=2, num_decoder_layers=1, num_heads=2,
        feed_forward_proj=activation, decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    wi = "wi" if activation == "relu" else "wi_0"
    listed: dict[str, tuple[int, bool]] = {}
    refused = {"shared": ""}
    for side, blocks, feed in (("encoder", 2, 1), ("decoder", 1, 2)):
        for i in range(blocks):
            listed[f"{side}.block.{i}.layer.{feed}.DenseReluDense.{wi}"] = (12, False)
            listed[f"{side}.block.{i}.layer.0.SelfAttention.v"] = (6, False)
            refused |= {f"{side}.block.{i}.layer.0.SelfAttention.{part}": "" for part in "qk"}
    listed["decoder.block.0.layer.1.EncDecAttention.v"] = (6, False)
    inputs = {"input_ids": tokens(3, 6, below=19), "decoder_input_ids": tokens(3, 5, below=19)}
    return Example(T5ForConditionalGeneration(config).eval(), (), listed, refused, kwargs=inputs)


register("t5", lambda: _t5("relu"))
register("t5_gated", lambda: _t5("gated-gelu"))


def _llama_model(attention: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=19, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, attn_implementation=attention, use_cache=False,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _llama(attention: str, training: bool = False) -> Example:
    listed = {"model.embed_tokens": (16, True)}
    refused = {}
    for i in range(2):
        listed[f"model.layers.{i}.mlp.gate_proj"] = (12, False)
        listed[f"model.layers.{i}.self_attn.v_proj"] = (8, False)
        refused |= {f"model.layers.{i}.self_attn.{part}_proj": "" for part in "qk"}
    return Example(
        _llama_model(attention).train(training), (), listed, refused, kwargs={"input_ids": tokens(2, 5, below=19)},
        normed=frozenset({"model.embed_tokens"}),
    )  # fmt: skip


register("llama_eager", lambda: _llama("eager"))
register("llama_sdpa", lambda: _llama("sdpa"))
register("llama_training", lambda: _llama("sdpa", True))


@entry
def vit() -> Example:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=2, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, num_labels=3,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    listed = {"vit.embeddings.patch_embeddings.projection": (8, True)}
    refused = {}
    for i in range(2):
        listed[f"vit.layers.{i}.mlp.fc1"] = (12, False)
        listed[f"vit.layers.{i}.attention.v_proj"] = (8, False)
        refused |= {f"vit.layers.{i}.attention.{part}_proj": "" for part in "qk"}
    return Example(
        model, (values(3, 2, 8, 8),), listed, refused,
        normed=frozenset({"vit.embeddings.patch_embeddings.projection"}),
    )  # fmt: skip


@entry
def gpt2() -> Example:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=19, n_positions=10, n_embd=8, n_layer=2, n_head=2, n_inner=12, use_cache=False, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    listed: dict[str, tuple[int, bool]] = {}
    refused = {"transformer.wte": ""}
    for i in range(2):
        listed[f"transformer.h.{i}.mlp.c_fc"] = (12, False)
        listed[f"transformer.h.{i}.attn.c_attn[16:24]"] = (8, False)
        refused[f"transformer.h.{i}.attn.c_attn"] = ""
    return Example(GPT2LMHeadModel(config).eval(), (tokens(3, 6, below=19),), listed, refused)


@entry
def lora_on_llama() -> Example:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(_llama_model("sdpa"), LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    root = "base_model.model.model"
    listed = {f"{root}.embed_tokens": (16, True)}
    for i in range(2):
        listed[f"{root}.layers.{i}.mlp.gate_proj"] = (12, False)
        listed[f"{root}.layers.{i}.self_attn.v_proj.base_layer"] = (8, False)
        for target in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            listed[f"{root}.layers.{i}.{target}.lora_A.default"] = (3, False)
    return Example(model.eval(), (), listed, {}, kwargs={"input_ids": tokens(2, 5, below=19)})


@entry
def lora_on_bert() -> Example:
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification

    config = LoraConfig(r=3, lora_dropout=0.1, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(BertForSequenceClassification(_bert_config()), config)
    root = "base_model.model.bert"
    listed = {f"{root}.encoder.layer.{i}.intermediate.dense": (12, False) for i in range(2)}
    listed |= {f"{root}.encoder.layer.{i}.attention.self.{part}.lora_A.default": (3, False)
               for i in range(2) for part in ("query", "value")}  # fmt: skip
    return Example(model.train(), (), listed, {}, kwargs={"input_ids": tokens(3, 6, below=19)})


def _spaces() -> Any:
    import gymnasium

    box = gymnasium.spaces.Box
    return box(-2.0, 2.0, (3,)), box(-2.0, 2.0, (1,)), gymnasium.spaces.Discrete(2)


def _schedule(_: float) -> float:
    return 3e-4


@entry
def ppo() -> Example:
    from stable_baselines3.ppo import MlpPolicy

    observations, actions, _ = _spaces()
    model = MlpPolicy(observations, actions, _schedule, net_arch={"pi": [6, 5], "vf": [4, 7]})
    listed = {f"mlp_extractor.policy_net.{i}": (k, False) for i, k in ((0, 6), (2, 5))}
    listed |= {f"mlp_extractor.value_net.{i}": (k, False) for i, k in ((0, 4), (2, 7))}
    return Example(model, (values(8, 3),), listed, kwargs={"deterministic": True})


@entry
def ppo_of_discrete_actions() -> Example:
    from stable_baselines3.ppo import MlpPolicy

    observations, _, actions = _spaces()
    model = MlpPolicy(observations, actions, _schedule, net_arch=[6, 5])
    # one of the two networks makes the value, a number; the other chooses an action and its log-probability
    listed = {f"mlp_extractor.{net}_net.{i}": (k, False) for net in ("policy", "value") for i, k in ((0, 6), (2, 5))}
    return Example(model, (values(8, 3),), listed)


def _sac() -> Any:
    from stable_baselines3.sac import MlpPolicy

    observations, actions, _ = _spaces()
    return MlpPolicy(observations, actions, _schedule, net_arch=[6, 5])


@entry
def sac_actor() -> Example:
    return Example(
        _sac().actor, (values(8, 3),), {"latent_pi.0": (6, False), "latent_pi.2": (5, False)},
        kwargs={"deterministic": False},
    )  # fmt: skip


@entry
def sac_critic() -> Example:
    listed = {f"qf{q}.{i}": (k, False) for q in range(2) for i, k in ((0, 6), (2, 5))}
    return Example(_sac().critic, (values(8, 3), values(8, 1)), listed)


@entry
def dqn() -> Example:
    from stable_baselines3.dqn import MlpPolicy

    observations, _, actions = _spaces()
    model = MlpPolicy(observations, actions, _schedule, net_arch=[6, 5]).q_net
    return Example(model, (values(8, 3),), {"q_net.0": (6, False), "q_net.2": (5, False)})
