"""The diagonal of the Hessian: HesScale against exact Hessians and against its recursion stated anew, Hutchinson
against both its mean and its variance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import perennial
from perennial import networks
from perennial.curvature import Diagonal, HesScale, Hutchinson, hesscale, hutchinson, rademacher
from perennial.methods import ReGraMa
from perennial.modules import CReLU, DeepFourier
from perennial.noise import Noise, seed_key

Params = dict[str, Tensor]


pytestmark = pytest.mark.usefixtures("in_double")


def parameters(model: nn.Module) -> Params:
    return {name: p.detach() for name, p in model.named_parameters()}


def of(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Diagonal:
    return hesscale(lambda p: functional_call(model, p, (x,)), parameters(model), loss)


def autograd(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Params:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss(model(x)), list(named.values())), strict=True))


def exact(loss: Callable[[Params], Tensor], params: Params) -> Params:
    """The diagonal of the full Hessian."""
    found = {}
    for name, w in params.items():
        whole = hessian(lambda v, name=name: loss(params | {name: v}))(w)
        found[name] = whole.reshape(w.numel(), w.numel()).diagonal().reshape(w.shape)
    return found


def close(found: Params, expected: Params, names: Any = None) -> None:
    assert names is not None or found.keys() == expected.keys()
    for name in expected if names is None else names:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- where it starts, and where it is exact -------------------------------------------------------------------------

_TARGET = torch.tensor([2, 0, 1, 3, 3])
_VALUES = torch.linspace(-1.5, 1.4, 20, dtype=torch.float64).reshape(5, 4)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross entropy": lambda o: F.cross_entropy(o, _TARGET),
    "cross entropy, sum": lambda o: F.cross_entropy(o, _TARGET, reduction="sum"),
    "cross entropy of a population": lambda o: networks.cross_entropy(o, _TARGET),
    "squared error": lambda o: F.mse_loss(o, _VALUES),
    "squared error of a population": lambda o: networks.squared_error(o, _VALUES),
    "absolute error": lambda o: F.l1_loss(o, _VALUES),
    "Huber": lambda o: F.huber_loss(o, _VALUES),
    "binary cross entropy": lambda o: F.binary_cross_entropy_with_logits(o, _VALUES.sigmoid()),
    "sum": lambda o: o.sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_start_is_the_exact_diagonal_by_the_output(name: str) -> None:
    out = torch.randn(5, 4)
    found = hesscale(lambda p: p["out"] + 0.0, {"out": out}, LOSSES[name])
    close(found.curvature, exact(lambda p: LOSSES[name](p["out"]), {"out": out}))
    close(found.grads, {"out": grad(LOSSES[name])(out)})
    assert torch.equal(found.loss, LOSSES[name](out))
    assert torch.equal(found.output, out)


def test_starts_known_in_closed_form() -> None:
    out = torch.randn(5, 4)
    p = out.softmax(1)
    entropy = hesscale(lambda w: w["out"] + 0.0, {"out": out}, LOSSES["cross entropy"])
    close(entropy.curvature, {"out": (p - p * p) / 5})
    squared = hesscale(lambda w: w["out"] + 0.0, {"out": out}, LOSSES["squared error"])
    close(squared.curvature, {"out": torch.full((5, 4), 2 / 20)})


def test_a_wide_output_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    out = torch.randn(5, 4)
    whole = hesscale(lambda p: p["out"] + 0.0, {"out": out}, LOSSES["cross entropy"]).curvature
    monkeypatch.setattr("perennial.curvature._AT_ONCE", 40)
    close(hesscale(lambda p: p["out"] + 0.0, {"out": out}, LOSSES["cross entropy"]).curvature, whole)


@pytest.mark.parametrize("name", LOSSES)
def test_exact_for_the_last_linear_layer(name: str) -> None:
    model, x = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(5, 3)
    expected = exact(lambda p: LOSSES[name](functional_call(model, p, (x,))), parameters(model))
    close(of(model, x, LOSSES[name]).curvature, expected, ["2.weight", "2.bias"])


SMOOTH: tuple[Callable[[], nn.Module], ...] = (
    nn.Tanh, nn.Sigmoid, nn.ELU, nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, nn.Softplus, nn.Mish, nn.SELU, nn.CELU,
    nn.Softsign, nn.Tanhshrink, nn.LogSigmoid, nn.Hardswish,
)  # fmt: skip
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    *SMOOTH, nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.ReLU6, nn.Identity, lambda: nn.Threshold(0.1, -0.3),
    lambda: nn.ReLU(inplace=True), lambda: nn.ELU(inplace=True), lambda: nn.LeakyReLU(inplace=True),
)  # fmt: skip


@pytest.mark.parametrize("make", ACTIVATIONS, ids=lambda make: repr(make()))
def test_exact_with_a_single_unit_a_layer(make: Callable[[], nn.Module]) -> None:
    """One path to the loss: nothing is left out."""
    model = nn.Sequential(nn.Linear(1, 1), make(), nn.Linear(1, 1), make(), nn.Linear(1, 1))
    x, y = torch.randn(6, 1), torch.randn(6, 1)

    def loss(out: Tensor) -> Tensor:
        return F.mse_loss(out, y)

    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    found = of(model, x, loss)
    close(found.grads, autograd(model, x, loss))
    close(found.curvature, exact(lambda p: loss(functional_call(model, p, (x,))), parameters(model)))


def test_exact_where_units_do_not_mix() -> None:
    """An element-wise network, of functions rather than modules."""
    x, y = torch.rand(6, 3), torch.randn(6, 3)

    def forward(p: Params) -> Tensor:
        h = torch.sin(x * p["a"] + p["b"])
        h = torch.exp(2 - h / 3) * p["c"]
        h = h**3 + h.square() - torch.cos(-h)
        return torch.log1p(h * h + 1.0)[:, :3].reshape(2, 3, 3).flatten(0, 1)

    params = {name: torch.rand(3) for name in "abc"}
    found = hesscale(forward, params, lambda o: F.mse_loss(o, y))
    close(found.grads, grad(lambda p: F.mse_loss(forward(p), y))(params))
    # h is read three times: what ties two of its uses together is left out, so only the one that is read once is exact.
    assert not torch.allclose(found.curvature["c"], exact(lambda p: F.mse_loss(forward(p), y), params)["c"])

    def chain(p: Params) -> Tensor:
        h = torch.sin(x * p["a"] + p["b"])
        h = torch.exp(2 - h / 3) * p["c"]
        return torch.log1p(h * h + 1.0)[:, :3].reshape(2, 3, 3).flatten(0, 1)

    found = hesscale(chain, params, lambda o: F.mse_loss(o, y))
    close(found.curvature, exact(lambda p: F.mse_loss(chain(p), y), params))


# --- the recursion stated anew, entry by entry -----------------------------------------------------------------------


def numpy_linear(w: np.ndarray, b: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, Callable[..., Any]]:
    z = np.array([[sum(w[o, i] * row[i] for i in range(w.shape[1])) + b[o] for o in range(w.shape[0])] for row in a])

    def back(g: np.ndarray, h: np.ndarray) -> Any:
        ga, ha, gw, hw = np.zeros_like(a), np.zeros_like(a), np.zeros_like(w), np.zeros_like(w)
        for s, o, i in np.ndindex(len(a), *w.shape):
            ga[s, i] += w[o, i] * g[s, o]
            ha[s, i] += w[o, i] ** 2 * h[s, o]
            gw[o, i] += g[s, o] * a[s, i]
            hw[o, i] += h[s, o] * a[s, i] ** 2
        return (ga, ha), {"weight": (gw, hw), "bias": (g.sum(0), h.sum(0))}

    return z, back


def numpy_conv(
    w: np.ndarray, b: np.ndarray, a: np.ndarray, stride: int, pad: int, dilation: int, groups: int
) -> tuple[np.ndarray, Callable[..., Any]]:
    samples, _, height, width = a.shape
    outs, ins, kh, kw = w.shape
    oh = (height + 2 * pad - dilation * (kh - 1) - 1) // stride + 1
    ow = (width + 2 * pad - dilation * (kw - 1) - 1) // stride + 1
    z = np.zeros((samples, outs, oh, ow)) + b[:, None, None]

    def taps() -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        for s, o, y, x, i, dy, dx in np.ndindex(samples, outs, oh, ow, ins, kh, kw):
            row, col = y * stride - pad + dy * dilation, x * stride - pad + dx * dilation
            if 0 <= row < height and 0 <= col < width:
                yield (s, o, y, x), (s, o // (outs // groups) * ins + i, row, col), (o, i, dy, dx)

    for to, of_input, of_kernel in taps():
        z[to] += w[of_kernel] * a[of_input]

    def back(g: np.ndarray, h: np.ndarray) -> Any:
        ga, ha, gw, hw = np.zeros_like(a), np.zeros_like(a), np.zeros_like(w), np.zeros_like(w)
        for to, of_input, of_kernel in taps():
            ga[of_input] += w[of_kernel] * g[to]
            ha[of_input] += w[of_kernel] ** 2 * h[to]
            gw[of_kernel] += a[of_input] * g[to]
            hw[of_kernel] += a[of_input] ** 2 * h[to]
        return (ga, ha), {"weight": (gw, hw), "bias": (g.sum((0, 2, 3)), h.sum((0, 2, 3)))}

    return z, back


def numpy_activation(kind: type[nn.Module], z: np.ndarray) -> tuple[np.ndarray, Callable[..., Any]]:
    value, first, second = {
        nn.Tanh: (np.tanh, lambda t: 1 - np.tanh(t) ** 2, lambda t: -2 * np.tanh(t) * (1 - np.tanh(t) ** 2)),
        nn.ReLU: (lambda t: max(t, 0.0), lambda t: float(t > 0), lambda t: 0.0),
        nn.Softplus: (
            lambda t: math.log(1 + math.exp(t)),
            lambda t: 1 / (1 + math.exp(-t)),
            lambda t: math.exp(-t) / (1 + math.exp(-t)) ** 2,
        ),
    }[kind]
    v1, v2 = np.vectorize(first)(z), np.vectorize(second)(z)
    return np.vectorize(value)(z), lambda g, h: ((v1 * g, v1**2 * h + v2 * g), {})


def numpy_pool(kind: type[nn.Module], a: np.ndarray, size: int) -> tuple[np.ndarray, Callable[..., Any]]:
    """Windows side by side."""
    samples, channels, height, width = a.shape
    z = np.zeros((samples, channels, height // size, width // size))
    parts: list[tuple[tuple[int, ...], tuple[int, ...], float]] = []
    for s, c, y, x in np.ndindex(*z.shape):
        window = [(s, c, y * size + dy, x * size + dx) for dy in range(size) for dx in range(size)]
        if kind is nn.MaxPool2d:
            parts.append(((s, c, y, x), max(window, key=lambda place: a[place]), 1.0))
        else:
            parts += [((s, c, y, x), place, 1 / size**2) for place in window]
    for to, place, share in parts:
        z[to] += share * a[place]

    def back(g: np.ndarray, h: np.ndarray) -> Any:
        ga, ha = np.zeros_like(a), np.zeros_like(a)
        for to, place, share in parts:
            ga[place] += share * g[to]
            ha[place] += share**2 * h[to]
        return (ga, ha), {}

    return z, back


def numpy_pass(model: nn.Sequential, x: Tensor, target: Tensor) -> tuple[Params, Params]:
    """Gradient and HesScale's diagonal of the mean cross entropy."""
    a, backs = x.numpy(), []
    for layer in model:
        own = {name: p.detach().numpy() for name, p in layer.named_parameters()}
        if isinstance(layer, nn.Linear):
            a, back = numpy_linear(own["weight"], own["bias"], a)
        elif isinstance(layer, nn.Conv2d):
            settings = (layer.stride[0], layer.padding[0], layer.dilation[0], layer.groups)
            a, back = numpy_conv(own["weight"], own["bias"], a, *settings)  # type: ignore[arg-type]
        elif isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d)):
            a, back = numpy_pool(type(layer), a, layer.kernel_size)  # type: ignore[arg-type]
        elif isinstance(layer, nn.Flatten):
            shape = a.shape
            a, back = a.reshape(len(a), -1), lambda g, h, s=shape: ((g.reshape(s), h.reshape(s)), {})
        else:
            a, back = numpy_activation(type(layer), a)
        backs.append(back)
    p = np.exp(a) / np.exp(a).sum(1, keepdims=True)
    g, h = (p - np.eye(p.shape[1])[target.numpy()]) / len(a), (p - p**2) / len(a)
    grads, curvature = {}, {}
    for number, back in reversed(list(enumerate(backs))):
        (g, h), own = back(g, h)
        grads |= {f"{number}.{name}": torch.as_tensor(pair[0]) for name, pair in own.items()}
        curvature |= {f"{number}.{name}": torch.as_tensor(pair[1]) for name, pair in own.items()}
    return grads, curvature


NUMPY_NETWORKS: dict[str, Callable[[], tuple[nn.Sequential, Tensor]]] = {
    "tanh": lambda: (
        nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4)),
        torch.randn(5, 3),
    ),
    "relu": lambda: (nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)), torch.randn(5, 3)),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Softplus(), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 2, padding=1, dilation=2, groups=2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(6, 4),
        ),
        torch.randn(5, 2, 9, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMPY_NETWORKS)
def test_the_recursion_entry_by_entry(name: str) -> None:
    model, x = NUMPY_NETWORKS[name]()
    grads, curvature = numpy_pass(model, x, _TARGET)
    found = of(model, x, LOSSES["cross entropy"])
    close(found.grads, {n: grads[n] for n in found.grads})
    close(found.curvature, {n: curvature[n] for n in found.curvature})


def dense_pass(model: nn.Sequential, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Params:
    """HesScale's diagonal from the full Jacobian and the full second derivatives of every layer by itself."""
    inputs = [x]
    for layer in model:
        inputs.append(layer(inputs[-1].clone()).detach())
    g = grad(loss)(inputs[-1])
    h = exact(lambda p: loss(p["out"]), {"out": inputs[-1]})["out"]
    found: Params = {}
    for number, layer in reversed(list(enumerate(model))):
        operands = {"": inputs[number]} | parameters(layer)
        new_g = g
        for name, value in operands.items():

            def run(flat: Tensor, layer: nn.Module = layer, name: str = name, at: Params = operands) -> Tensor:
                now = at | {name: flat.reshape(at[name].shape)}
                given = now.pop("")
                return functional_call(layer, now, (given.clone(),)).flatten()

            jacobian = torch.func.jacrev(run)(value.flatten())
            bend = hessian(lambda flat, g=g, run=run: (run(flat) * g.flatten()).sum())(value.flatten()).diagonal()
            both = ((jacobian**2).T @ h.flatten() + bend).reshape(value.shape)
            if name:
                found[f"{number}.{name}"] = both
            else:
                new_h, new_g = both, (jacobian.T @ g.flatten()).reshape(value.shape)
        g, h = new_g, new_h
    return {name: found[name] for name, _ in model.named_parameters()}


def batch_norm(channels: int, kind: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    norm = kind(channels)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    return norm.eval()


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.own = nn.ParameterList([torch.randn(shape) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.own)


def linear() -> nn.Module:
    return nn.Linear(4, 4)


LAYERS: dict[str, tuple[tuple[int, ...], Callable[[], list[nn.Module]]]] = {
    "linear without bias": ((4,), lambda: [linear(), nn.Tanh(), nn.Linear(4, 4, bias=False)]),
    "linear by keywords": ((4,), lambda: [linear(), nn.Tanh(), Call(lambda x, w: F.linear(input=x, weight=w), (3, 4))]),
    "linear to a number": ((2, 4), lambda: [linear(), nn.Tanh(), Call(lambda x, w: F.linear(x, w), (4,))]),
    "linear on tokens": ((2, 4), lambda: [linear(), nn.Tanh(), linear(), nn.Flatten(), nn.Linear(8, 4)]),
    "conv1d": ((2, 7), lambda: [nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.GELU(), nn.Conv1d(3, 2, 2, bias=False)]),
    "conv1d, same": ((2, 5), lambda: [nn.Conv1d(2, 2, 3, padding="same"), nn.Tanh(), nn.Conv1d(2, 1, 3)]),
    "conv2d": (
        (2, 5, 6),
        lambda: [nn.Conv2d(2, 4, 3, (1, 2), (1, 2), groups=2), nn.SiLU(), nn.Conv2d(4, 2, 2, dilation=(1, 2))],
    ),
    "conv2d, circular": (
        (1, 4, 4), lambda: [nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Conv2d(2, 1, 3)],
    ),
    "conv3d": ((1, 3, 4, 4), lambda: [nn.Conv3d(1, 2, 2, padding=1, stride=2), nn.Tanh(), nn.Conv3d(2, 2, 2)]),
    "transposed conv": ((2, 4), lambda: [nn.ConvTranspose1d(2, 3, 3, 2, 1), nn.Tanh(), nn.Conv1d(3, 2, 3)]),
    "max pool": ((1, 6, 6), lambda: [nn.Conv2d(1, 2, 2), nn.Tanh(), nn.MaxPool2d(3, 1, 1), nn.Conv2d(2, 1, 3)]),
    "adaptive max pool": ((1, 5, 6), lambda: [nn.Conv2d(1, 2, 2), nn.Tanh(), nn.AdaptiveMaxPool2d((2, 3))]),
    "avg pool": ((1, 6, 5), lambda: [nn.Conv2d(1, 2, 2), nn.AvgPool2d((3, 2), 2, 1, ceil_mode=True), nn.Tanh()]),
    "avg pool without padding": (
        (1, 6, 5), lambda: [nn.Conv2d(1, 2, 2), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Tanh()],
    ),
    "avg pool with a divisor": (
        (1, 5, 5), lambda: [nn.Conv2d(1, 2, 2), nn.AvgPool2d(2, divisor_override=3), nn.Tanh()],
    ),
    "avg pool 1d": ((1, 8), lambda: [nn.Conv1d(1, 2, 2), nn.AvgPool1d(3, 2, 1), nn.Tanh()]),
    "avg pool 3d": ((1, 4, 4, 5), lambda: [nn.Conv3d(1, 2, 2), nn.AvgPool3d((1, 3, 2), 1), nn.Tanh()]),
    "adaptive avg pool": ((1, 6, 8), lambda: [nn.Conv2d(1, 2, 2), nn.AdaptiveAvgPool2d((2, 3)), nn.Tanh()]),
    "adaptive avg pool to one": ((1, 4, 4), lambda: [nn.Conv2d(1, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]),
    "mean": ((2, 4), lambda: [linear(), Call(lambda x: x.mean(1)), nn.Tanh()]),
    "sum": ((2, 4), lambda: [linear(), Call(lambda x: torch.sum(x, dim=1, keepdim=True)), nn.Tanh()]),
    "batch norm": ((2, 4, 4), lambda: [nn.Conv2d(2, 3, 2), batch_norm(3), nn.ReLU(inplace=True), nn.Flatten()]),
    "batch norm of units": ((4,), lambda: [linear(), batch_norm(4, nn.BatchNorm1d), nn.Tanh(), linear()]),
    "dropout, evaluation": ((4,), lambda: [linear(), nn.Dropout().eval(), nn.Tanh(), nn.Dropout(0.0), linear()]),
    "matrix product": ((3, 4), lambda: [linear(), nn.Tanh(), Call(lambda x, w: x @ w, (4, 2))]),
    "product with transposes": ((3, 4), lambda: [linear(), nn.Tanh(), Call(lambda x, w: (w @ x.mT).mT, (2, 4))]),
    "constants": ((4,), lambda: [linear(), Call(lambda x: 3 - 2 * (x - 1) / 4 + x.new_ones(4)), nn.Tanh(), linear()]),
    "parameters by element": (
        (2, 4), lambda: [linear(), nn.Tanh(), Call(lambda x, w, v: x * w + v, (2, 1), (4,)), nn.Tanh()],
    ),
    "movement": (
        (2, 4),
        lambda: [
            linear(), nn.Tanh(),
            Call(lambda x: x.transpose(1, 2).permute(0, 2, 1).unsqueeze(1).squeeze(1)[:, :, [3, 0, 0, 1]].flip(2)),
            nn.Unflatten(2, (2, 2)), nn.Flatten(), nn.Linear(8, 2),
        ],
    ),
    "split": ((4,), lambda: [linear(), Call(lambda x: x.split(2, 1)[1].tanh()), Call(lambda x: x.chunk(2, -1)[0])]),
    "padding": ((1, 4), lambda: [nn.Conv1d(1, 1, 2), nn.Tanh(), nn.ReflectionPad1d(2), nn.ZeroPad1d(1), nn.Tanh()]),
    "crelu": ((4,), lambda: [linear(), Call(lambda x: torch.cat([x.relu(), (-x).relu()], 1)), nn.Linear(8, 2)]),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers_against_their_full_derivatives(name: str) -> None:
    shape, make = LAYERS[name]
    model, x = nn.Sequential(*make()), torch.randn(3, *shape)
    y = torch.randn_like(model(x))

    def loss(out: Tensor) -> Tensor:
        return F.mse_loss(out, y)

    found = of(model, x, loss)
    close(found.grads, autograd(model, x, loss))
    if name != "crelu":  # where a layer reads its input twice, the layer is more than one operation
        close(found.curvature, dense_pass(model, x, loss))


@pytest.mark.parametrize("activation", [CReLU, DeepFourier])
def test_two_units_for_one(activation: type[nn.Module]) -> None:
    """Both ways back add up; for a rectifier and its mirror image that is exact with a single unit."""
    model, x, y = nn.Sequential(nn.Linear(1, 1), activation(), nn.Linear(2, 1)), torch.randn(6, 1), torch.randn(6, 1)

    def loss(out: Tensor) -> Tensor:
        return F.mse_loss(out, y)

    found, (z, w) = of(model, x, loss), (model[0](x).detach(), model[2].weight[0].detach())
    close(found.grads, autograd(model, x, loss))
    g = 2 * (model(x).detach() - y) / 6
    if activation is CReLU:
        h = torch.where(z > 0, w[0], w[1]) ** 2 * 2 / 6
    else:
        h = ((w[0] * z.cos()) ** 2 + (w[1] * z.sin()) ** 2) * 2 / 6 - (w[0] * z.sin() + w[1] * z.cos()) * g
    close(found.curvature, {"0.weight": (h * x**2).sum()[None, None], "0.bias": h.sum()[None]}, ["0.weight", "0.bias"])


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, 2, 2)])
def test_a_convolution_is_a_linear_layer_on_patches(stride: int, padding: int, dilation: int) -> None:
    x = torch.randn(3, 2, 6, 5)
    first, conv = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 4, 3, stride, padding, dilation)

    def patches(p: Params) -> Tensor:
        h = torch.tanh(F.conv2d(x, p["w0"], p["b0"]))
        columns = F.unfold(h, 3, dilation, padding, stride)  # [samples, 2 x 9, positions]
        return F.linear(columns.mT, p["w1"].flatten(1), p["b1"]).mT

    def convolved(p: Params) -> Tensor:
        h = torch.tanh(F.conv2d(x, p["w0"], p["b0"]))
        return F.conv2d(h, p["w1"], p["b1"], stride, padding, dilation).flatten(2)

    params = {"w0": first.weight, "b0": first.bias, "w1": conv.weight, "b1": conv.bias}
    params = {name: w.detach() for name, w in params.items()}
    y = torch.randn_like(convolved(params))
    found, expected = (hesscale(f, params, lambda o: F.mse_loss(o, y)) for f in (convolved, patches))
    close(found.curvature, expected.curvature)
    close(found.grads, expected.grads)


# --- what is used several times -------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.before, self.branch, self.after = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        a = self.before(x)
        out = F.softplus(self.branch(a)) - 1  # what is overwritten below, autograd does not need
        if self.in_place:
            out += a
        else:
            out = a + out
        return self.after(out)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_residual_branch_adds(in_place: bool) -> None:
    model, x, y = Residual(in_place), torch.randn(5, 3), torch.randn(5, 2)

    def loss(out: Tensor) -> Tensor:
        return F.mse_loss(out, y)

    found = of(model, x, loss)
    close(found.grads, autograd(model, x, loss))
    a = model.before(x).detach()
    t = torch.sigmoid(model.branch(a)).detach()
    g, h = 2 * (model(x).detach() - y) / 10, torch.full((5, 2), 0.2)
    g, h = g @ model.after.weight.detach(), h @ model.after.weight.detach() ** 2
    h_z = t**2 * h + t * (1 - t) * g
    h_a = h + h_z @ model.branch.weight.detach() ** 2
    close(
        found.curvature,
        found.curvature
        | {"branch.weight": h_z.T @ a**2, "branch.bias": h_z.sum(0)}
        | {"before.weight": h_a.T @ x**2, "before.bias": h_a.sum(0)},
    )


def test_a_linear_layer_applied_to_its_own_weight() -> None:
    w, y = torch.randn(4, 4), torch.randn(4, 4)
    found = hesscale(lambda p: F.linear(p["w"], p["w"]), {"w": w}, lambda o: F.mse_loss(o, y))
    close(found.grads, {"w": grad(lambda w: F.mse_loss(w @ w.T, y))(w)})
    close(found.curvature, {"w": torch.full((4, 4), 2 / 16) @ w**2 * 2})


def test_under_autocast() -> None:
    """Parameters keep their precision, and what was computed in a coarser one is near."""
    torch.set_default_dtype(torch.float32)
    model, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(5, 3)
    expected = of(model, x, LOSSES["cross entropy"])
    with torch.autocast("cpu", torch.bfloat16):
        found = of(model, x, LOSSES["cross entropy"])
    for name, h in expected.curvature.items():
        assert found.curvature[name].dtype == torch.float32
        assert (found.curvature[name] - h).abs().max() < 0.05 * h.abs().max()
        assert (found.grads[name] - expected.grads[name]).abs().max() < 0.05 * expected.grads[name].abs().max()


def test_uses_of_a_parameter_add() -> None:
    """One of two layers that share a matrix, with the matrix of the other taken apart, and the other way round."""
    x, y, w, v = torch.randn(5, 4), torch.randn(5, 4), torch.randn(4, 4), torch.randn(4)

    def forward(first: Tensor, second: Tensor, v: Tensor) -> Tensor:
        return torch.tanh(x @ first + v) @ second.T + v

    def loss(out: Tensor) -> Tensor:
        return F.mse_loss(out, y)

    shared = hesscale(lambda p: forward(p["w"], p["w"], p["v"]), {"w": w, "v": v}, loss)
    apart = hesscale(lambda p: forward(p["1"], p["2"], p["v"]), {"1": w, "2": w, "v": v}, loss)
    for found, parts in ((shared.grads, apart.grads), (shared.curvature, apart.curvature)):
        close(found, {"w": parts["1"] + parts["2"], "v": parts["v"]})


def test_parameters_of_no_use_have_none() -> None:
    found = hesscale(lambda p: p["a"] * 2, {"a": torch.randn(3, 2), "b": torch.randn(2)}, lambda o: o.square().sum())
    assert torch.equal(found.curvature["b"], torch.zeros(2))
    assert torch.equal(found.grads["b"], torch.zeros(2))
    close(found.curvature, {"a": torch.full((3, 2), 8.0), "b": torch.zeros(2)})


def test_what_passes_no_gradient_passes_none() -> None:
    """As autograd: detached values, comparisons and what is made under no_grad are constants."""
    x = torch.randn(5, 3)

    def forward(p: Params) -> Tensor:
        h = x * p["w"]
        with torch.no_grad():
            size = h.abs().mean()
        gate = torch.where(h > 0, torch.zeros_like(h) + h.shape[0], -1.0)
        place = h.abs().long().clamp(max=2)
        return h * gate + h.detach() * size + h.gather(1, place)

    params = {"w": torch.randn(3)}
    found = hesscale(forward, params, lambda o: o.square().mean())
    w = params["w"].clone().requires_grad_()
    close(found.grads, {"w": torch.autograd.grad(forward({"w": w}).square().mean(), w)[0]})


# --- pure -----------------------------------------------------------------------------------------------------------


def lanes(count: int) -> tuple[nn.Module, Params, Tensor, Tensor]:
    make = lambda: nn.Sequential(  # noqa: E731
        nn.Conv1d(1, 3, 3), nn.Tanh(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(9, 5), nn.ReLU(inplace=True),
        nn.Linear(5, 4),
    )  # fmt: skip
    models = [make() for _ in range(count)]
    stacked = {n: torch.stack([parameters(m)[n] for m in models], -1) for n in parameters(models[0])}
    return models[0], stacked, torch.randn(5, 1, 8, count), torch.randint(0, 4, (5, count))


def one_lane(model: nn.Module, params: Params, x: Tensor, y: Tensor) -> Diagonal:
    return hesscale(lambda p: functional_call(model, p, (x,)), params, lambda o: networks.cross_entropy(o, y))


def test_lanes_together_equal_lanes_alone() -> None:
    model, params, x, y = lanes(3)
    together = vmap(lambda *a: one_lane(model, *a), in_dims=-1, out_dims=-1)(params, x, y)
    for lane in range(3):
        alone = one_lane(model, {n: w[..., lane] for n, w in params.items()}, x[..., lane], y[..., lane])
        close({n: h[..., lane] for n, h in together.curvature.items()}, alone.curvature)
        close({n: g[..., lane] for n, g in together.grads.items()}, alone.grads)
        torch.testing.assert_close(together.loss[lane], alone.loss)


@pytest.mark.parametrize("stacked", [False, True])
def test_traced_to_a_graph(stacked: bool) -> None:
    """The graph gives what the function gives, on numbers that it was not traced on."""
    model, params, x, y = lanes(3)

    def step(params: Params, x: Tensor, y: Tensor) -> Params:
        if stacked:
            return vmap(lambda *a: one_lane(model, *a).curvature, in_dims=-1, out_dims=-1)(params, x, y)
        one = {n: w[..., 0] for n, w in params.items()}
        return one_lane(model, one, x[..., 0], y[..., 0]).curvature

    graph = make_fx(step)(params, x, y)
    other = ({n: torch.randn_like(w) for n, w in params.items()}, torch.randn_like(x), y.flip(0))
    close(graph(*other), step(*other))


def test_nothing_given_is_written_to() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)), torch.randn(5, 3)
    params = {name: w.requires_grad_() for name, w in parameters(model).items()}
    before, given = {n: w.detach().clone() for n, w in params.items()}, x.clone()
    found = hesscale(lambda p: functional_call(model, p, (x,)), params, LOSSES["cross entropy"])
    assert all(torch.equal(w, before[n]) and w.grad is None for n, w in params.items())
    assert torch.equal(x, given)
    assert not any(
        t.requires_grad for t in (found.loss, found.output, *found.grads.values(), *found.curvature.values())
    )


# --- refused --------------------------------------------------------------------------------------------------------


def refused(function: Callable[[Tensor], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        hesscale(lambda p: function(torch.randn(5, 4) @ p["w"]), {"w": torch.randn(4, 4)}, lambda o: o.square().sum())


def test_unknown_operations_are_refused_by_name() -> None:
    refused(lambda x: x.softmax(1), r"no rule for softmax: use Hutchinson.*order=1")
    refused(lambda x: F.layer_norm(x, (4,)), "no rule for layer_norm")
    refused(lambda x: torch.cumsum(x, 1), "no rule for cumsum")
    refused(lambda x: torch.zeros(5, 4).copy_(x), "no rule for copy")

    def assigned(x: Tensor) -> Tensor:
        out = torch.zeros(5, 4)
        out[:, 0] = x[:, 0]
        return out

    refused(assigned, "no rule for setitem")


def test_what_mixes_samples_or_draws_is_refused() -> None:
    refused(lambda x: nn.BatchNorm1d(4)(x), r"batch_norm in training mixes samples.*Hutchinson")
    refused(lambda x: F.dropout(x), r"dropout in training draws anew.*\.eval\(\)")
    refused(lambda x: nn.Dropout(0.1)(x), "dropout in training")
    refused(lambda x: torch.dropout(x, 0.1, True), "dropout in training")
    refused(lambda x: F.dropout(x, 0.1), "dropout in training")


def test_a_tensor_overwritten_and_used_again_is_refused() -> None:
    refused(lambda x: x.relu_() + x, "in place")

    def overwritten(x: Tensor) -> Tensor:
        x.mul_(2)
        return x

    refused(overwritten, "in place")


def test_outputs_and_losses_that_do_not_fit() -> None:
    refused(lambda x: (x, x), "forward gave a tuple")
    refused(lambda x: x.sum(), "forward gave a number")
    refused(lambda x: x.detach(), "does not depend on the parameters")
    with pytest.raises(ValueError, match=r"loss gave \(2,\)"):
        hesscale(lambda p: p["w"] * 1, {"w": torch.randn(3, 2)}, lambda o: o.sum(0))


# --- Hutchinson -----------------------------------------------------------------------------------------------------


def noise(seed: int = 0, step: int = 0) -> Noise:
    return Noise(torch.tensor(seed_key(seed, "method"), dtype=torch.int32), torch.tensor(step, dtype=torch.int32))


def test_signs_are_even_and_depend_on_the_place_alone() -> None:
    params = {"a": torch.zeros(100, 30), "b": torch.zeros(3000, dtype=torch.float32)}
    first, second = rademacher(noise(), params, 2)
    assert (first["a"].dtype, first["b"].dtype) == (torch.float64, torch.float32)
    for signs in (first["a"], first["b"], second["a"], first["a"].flatten() * first["b"], first["a"] * second["a"]):
        assert set(signs.unique().tolist()) == {-1.0, 1.0}
        assert abs(signs.mean()) < 4 / math.sqrt(3000)
    again = rademacher(noise(), {"b": params["b"]}, 1)
    assert torch.equal(again[0]["b"], first["b"])
    assert not torch.equal(rademacher(noise(step=1), params, 1)[0]["b"], first["b"])


def test_exact_for_a_diagonal_hessian_with_one_probe() -> None:
    params = {"a": torch.randn(3, 2), "b": torch.randn(4)}

    def loss(p: Params) -> Tensor:
        return p["a"].exp().sum() + (p["b"] ** 3).sum()

    found = hutchinson(loss, params, rademacher(noise(), params, 1))
    close(found, {"a": params["a"].exp(), "b": 6 * params["b"]})


def test_the_mean_is_the_diagonal_within_its_own_variance() -> None:
    model, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)), torch.randn(5, 2)
    params, count = parameters(model), 400

    def loss(p: Params) -> Tensor:
        return LOSSES["cross entropy"](functional_call(model, p, (x,)))

    found = hutchinson(loss, params, rademacher(noise(), params, count))
    sizes = [w.numel() for w in params.values()]

    def of_vector(v: Tensor) -> Tensor:
        parts = zip(params.items(), v.split(sizes), strict=True)
        return loss({name: part.reshape(w.shape) for (name, w), part in parts})

    whole = hessian(of_vector)(torch.cat([w.flatten() for w in params.values()]))
    diagonal = whole.diagonal()
    spread = ((whole**2).sum(1) - diagonal**2).sqrt() / math.sqrt(count)
    error = (torch.cat([h.flatten() for h in found.values()]) - diagonal) / spread
    assert error.abs().max() < 4.5
    assert 0.5 < error.square().mean() < 1.7  # neither noisier than it should be nor, by accident, exact


def test_hutchinson_under_vmap_and_traced() -> None:
    model, params, x, y = lanes(3)

    def one(params: Params, x: Tensor, y: Tensor) -> Params:
        probes = rademacher(noise(), params, 2)
        return hutchinson(lambda p: networks.cross_entropy(functional_call(model, p, (x,)), y), params, probes)

    together = vmap(one, in_dims=-1, out_dims=-1)(params, x, y)
    graph = make_fx(vmap(one, in_dims=-1, out_dims=-1))(params, x, y)
    close(graph(params, x, y), together)
    for lane in range(3):
        alone = one({n: w[..., lane] for n, w in params.items()}, x[..., lane], y[..., lane])
        close({n: h[..., lane] for n, h in together.items()}, alone)


def test_no_probe_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one probe"):
        hutchinson(lambda p: p["a"].sum(), {"a": torch.randn(2)}, [])
    with pytest.raises(ValueError, match="probes is 0"):
        Hutchinson(nn.Linear(1, 1), F.mse_loss, probes=0)


# --- in a user's loop -----------------------------------------------------------------------------------------------

SOURCES: tuple[Callable[..., HesScale | Hutchinson], ...] = (HesScale, Hutchinson)


@pytest.mark.parametrize("kind", SOURCES)
def test_the_loss_is_an_ordinary_one(kind: Callable[..., HesScale | Hutchinson]) -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)), torch.randn(5, 3)
    source = kind(model, nn.CrossEntropyLoss())
    with pytest.raises(RuntimeError, match=r"has seen no batch: call loss = source\(x, y\)"):
        source.diagonal()
    expected = autograd(model, x, LOSSES["cross entropy"])
    loss = source(x, _TARGET)
    assert torch.equal(loss, LOSSES["cross entropy"](model(x)))
    before = source.diagonal()  # the order of the two does not matter
    loss.backward()
    close({n: p.grad for n, p in model.named_parameters()}, expected)
    kept = {n: p.grad.clone() for n, p in model.named_parameters()}
    close(source.diagonal(), before)
    assert all(torch.equal(p.grad, kept[n]) for n, p in model.named_parameters())
    assert not any(h.requires_grad for h in before.values())


def test_hesscale_in_a_loop() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)), torch.randn(5, 3)
    source = HesScale(model, nn.CrossEntropyLoss())
    source(torch.randn(5, 3), _TARGET)
    source(x, _TARGET)
    close(source.diagonal(), of(model, x, LOSSES["cross entropy"]).curvature)
    with torch.no_grad():
        model[0].weight += 1.0
    close(source.diagonal(), of(model, x, LOSSES["cross entropy"]).curvature)  # at the parameters as they are now
    model[0].requires_grad_(False)
    assert list(source.diagonal()) == ["2.weight", "2.bias"]


def test_hutchinson_in_a_loop() -> None:
    """Its signs are those of seed and call, and a sharper mean is nearer to the truth."""
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), torch.randn(5, 3)
    params = parameters(model)
    source, other = Hutchinson(model, nn.CrossEntropyLoss(), 2), Hutchinson(model, nn.CrossEntropyLoss(), 2, seed=1)
    for each in (source, other):
        each(x, _TARGET)
    first = source.diagonal()
    expected = hutchinson(
        lambda p: LOSSES["cross entropy"](functional_call(model, p, (x,))),
        params,
        rademacher(noise(step=1).scoped("hutchinson"), params, 2),
    )
    close(first, expected)
    assert torch.equal(source.diagonal()["0.weight"], first["0.weight"])
    assert not torch.equal(other.diagonal()["0.weight"], first["0.weight"])
    source(x, _TARGET)
    assert not torch.equal(source.diagonal()["0.weight"], first["0.weight"])
    source.calls = 1
    assert torch.equal(source.diagonal()["0.weight"], first["0.weight"])


def test_a_loss_without_curvature_has_none() -> None:
    model = nn.Linear(3, 4)
    for kind in SOURCES:
        source = kind(model, lambda out: out.sum())
        source(torch.randn(5, 3))
        close(source.diagonal(), {n: torch.zeros_like(p) for n, p in parameters(model).items()})


def test_how_batches_are_given() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, x: Tensor, z: Tensor, *, scale: float = 1.0) -> Tensor:
            return self.a(x) + scale * self.b(z)

    model, x, z = Two(), torch.randn(5, 3), torch.randn(5, 2)
    y = torch.randn(5, 4)
    source = HesScale(model, nn.MSELoss())
    assert torch.equal(source(x, z, y, scale=2.0), F.mse_loss(model(x, z, scale=2.0), y))
    first = source.diagonal()
    source(x, z, y, scale=4.0)
    close(source.diagonal(), first | {"b.weight": 4 * first["b.weight"], "b.bias": 4 * first["b.bias"]})
    alone = HesScale(model, lambda out: F.mse_loss(out, y))
    alone(x=x, z=z, scale=2.0)
    close(alone.diagonal(), first)


@pytest.mark.parametrize("kind", SOURCES)
def test_an_attached_method_does_not_see_it(kind: Callable[..., HesScale | Hutchinson]) -> None:
    """It goes by activations, and by the gradient by them, of the loss's own passes."""
    ended = []
    for looking in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        source, x = kind(model, nn.CrossEntropyLoss()), torch.randn(5, 3)
        perennial.attach(ReGraMa(threshold=0.8, every=2), model, optimizer, example=x)
        for _ in range(6):
            optimizer.zero_grad()
            source(x, _TARGET).backward()
            if looking:
                source.diagonal()
            optimizer.step()
        ended.append(parameters(model))
    assert all(torch.equal(w, ended[1][n]) for n, w in ended[0].items())


class Mixed(nn.Module):
    """Batch statistics, dropout, attention and a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(3, 8), nn.BatchNorm1d(8)
        self.attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
        self.out = nn.Linear(8, 4)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.inner(x)).tanh()
        if self.training:
            self.seen.mul_(0.9).add_(h.detach().mean(0))
        return self.out(self.attention(h.unflatten(1, (2, 4))).flatten(1))


def test_any_network_and_no_trace() -> None:
    model, x = Mixed().train(), torch.randn(5, 3)
    source = Hutchinson(model, nn.CrossEntropyLoss(), probes=2)
    torch.manual_seed(3)
    loss = source(x, _TARGET)
    assert int(model.norm.num_batches_tracked) == 1
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    objects = dict(model.named_buffers())
    torch.rand(3)  # whoever draws next must not get what the loss was made with
    random, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    found = source.diagonal()
    assert all(torch.equal(b, buffers[n]) and b is objects[n] for n, b in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(h.shape == model.get_parameter(n).shape and h.isfinite().all() for n, h in found.items())
    loss.backward()

    # The Hessian of the very loss that was made, with its dropout, by ordinary second derivatives.
    params = parameters(model)
    expected = {n: torch.zeros_like(p) for n, p in params.items()}
    for v in rademacher(noise(step=1).scoped("hutchinson"), params, 2):
        torch.manual_seed(3)
        names, values = zip(*model.named_parameters(), strict=True)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            slopes = torch.autograd.grad(F.cross_entropy(model(x), _TARGET), values, create_graph=True)
        along = sum((s * v[n]).sum() for n, s in zip(names, slopes, strict=True))
        for n, product in zip(names, torch.autograd.grad(along, values), strict=True):
            expected[n] += v[n] * product / 2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_state_that_the_loss_depends_on(kind: Callable[..., HesScale | Hutchinson]) -> None:
    """A graph made before can still be differentiated after."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 4)
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            self.scale.mul_(0.9)
            return self.inner(x) * self.scale

    model, x = Scaled(), torch.randn(5, 3)
    source = kind(model, nn.CrossEntropyLoss())
    loss = source(x, _TARGET)
    source.diagonal()
    loss.backward()
    assert torch.equal(model.scale, torch.full((4,), 0.9))


def test_hesscale_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 4)).train()
    source, x = HesScale(model, nn.CrossEntropyLoss()), torch.randn(5, 3)
    source(x, _TARGET)
    with pytest.raises(ValueError, match="batch_norm in training"):
        source.diagonal()
    assert int(model[1].num_batches_tracked) == 1
    model[1].eval()
    source(x, _TARGET)
    buffers, random = {n: b.clone() for n, b in model.named_buffers()}, torch.get_rng_state()
    close(source.diagonal(), of(model, x, LOSSES["cross entropy"]).curvature)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert not model[1].training


def test_every_layer_type_has_a_row() -> None:
    """The products and averages that have a rule appear in a network above."""
    from perennial.curvature import _AVERAGES, _PRODUCTS

    seen: set[str] = set()

    class Names(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.__name__)
            return func(*args, **(kwargs or {}))

    for shape, make in LAYERS.values():
        with Names():
            nn.Sequential(*make())(torch.randn(3, *shape))
    missing = (_AVERAGES | _PRODUCTS) - seen
    assert missing <= {"mm", "bmm", "mv", "dot", *itertools.chain(*_SAME_AS_A_ROW.values())}, missing


_SAME_AS_A_ROW = {
    "conv_transpose1d": ("conv_transpose2d", "conv_transpose3d"),
    "adaptive_avg_pool2d": ("adaptive_avg_pool1d", "adaptive_avg_pool3d"),
}
