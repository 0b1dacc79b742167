"""Modules that people combine with plasticity methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perennial.modules import CReLU, DeepFourier, Injected, OnlineNorm, inject_plasticity, normalize_layers
from perennial.networks import MLP
from perennial.units import Distribution, build_and_record

# --- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((3, 5), 1), ((3, 5, 4, 4), 1), ((3, 4, 5), -1), ((5,), 0)],
    ids=["flat", "conv", "tokens", "one"],
)
def test_doubling_activations(shape: tuple[int, ...], dim: int) -> None:
    z = torch.randn(shape)
    rectified, fourier = CReLU(dim)(z), DeepFourier(dim)(z)
    first, second = rectified.chunk(2, dim)
    assert torch.equal(first - second, z)
    assert torch.equal(first + second, z.abs())
    assert not (first * second).any()
    sine, cosine = fourier.chunk(2, dim)
    assert torch.allclose(torch.atan2(sine, cosine), torch.remainder(z + torch.pi, 2 * torch.pi) - torch.pi, atol=1e-5)
    assert torch.allclose(sine.square() + cosine.square(), torch.ones(shape))
    assert repr(CReLU(dim)) == f"CReLU(dim={dim})"


@pytest.mark.parametrize("activation", ["crelu", "deep_fourier"])
@pytest.mark.parametrize("init", ["kaiming", "default"])
def test_a_network_reads_twice_the_units(activation: str, init: str) -> None:
    torch.manual_seed(0)
    network = MLP(hidden=(300, 200), activation=activation, init=init).build(400, 3)
    assert [tuple(w.shape) for w in network.parameters() if w.dim() == 2] == [(300, 400), (200, 600), (3, 400)]
    assert network(torch.randn(7, 20, 20)).shape == (7, 3)
    if init == "kaiming":  # the size of the pre-activations is the same from layer to layer
        first = network[1](torch.randn(100, 400))
        second = network[3](network[2](first))
        size = first.square().mean().item() if activation == "crelu" else 1.0
        assert second.square().mean().item() == pytest.approx(size, rel=0.1)


def test_the_other_networks_read_their_units_once() -> None:
    assert [tuple(w.shape) for w in MLP(hidden=(4, 5)).build(3, 2).parameters()][::2] == [(4, 3), (5, 4), (2, 5)]


# --- normalize_layers -----------------------------------------------------------------------------------------------


def test_puts_a_norm_before_every_activation() -> None:
    act = nn.ReLU()  # one module at two places
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), act, nn.Conv2d(4, 6, 2), nn.BatchNorm2d(6), nn.MaxPool2d(1), act, nn.Flatten(),
        nn.Linear(6, 5), nn.Dropout(0.1), nn.GELU(),
        nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Dropout(0.1), nn.Tanh()),
        nn.Linear(3, 4), CReLU(), nn.Linear(8, 2),
    ).double()  # fmt: skip
    before = dict(model.named_parameters())
    added = normalize_layers(model)
    assert added == ["1.0", "5.0", "9.0", "12.0"]
    norms = [model.get_submodule(name) for name in added]
    assert [type(norm) for norm in norms] == [nn.GroupNorm, nn.GroupNorm, nn.LayerNorm, nn.LayerNorm]
    assert [norm.weight.numel() for norm in norms] == [4, 6, 5, 4]
    assert all(norm.weight.dtype == torch.float64 for norm in norms)
    assert model.get_submodule("1.1") is model.get_submodule("5.1") is act
    after = dict(model.named_parameters())
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {f"{name}.{kind}" for name in added for kind in ("weight", "bias")}
    assert model(torch.randn(2, 2, 4, 4).double()).shape == (2, 2)
    assert normalize_layers(model) == []


def test_what_the_norm_does() -> None:
    model = nn.Sequential(nn.Linear(3, 50), nn.ReLU())
    x = torch.randn(4, 3)
    normalize_layers(model)
    out = model(x)
    z = model[0](x)
    z = (z - z.mean(1, keepdim=True)) / torch.sqrt(z.var(1, correction=0, keepdim=True) + 1e-5)
    assert torch.allclose(out, z.relu(), atol=1e-6)
    with torch.no_grad():
        for w in model[0].parameters():
            w *= 100
    assert torch.allclose(model(x), out, atol=1e-3)


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()  # type: ignore[no-any-return]


class _Attribute(_Functional):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.act = nn.ReLU()


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (_Functional, "found no activation function"),
        (_Attribute, "before act, a ReLU in a _Attribute: it is not directly in an nn.Sequential"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU())), "before 1.0: no linear or convolutional"),
        (lambda: nn.Sequential(nn.Conv1d(3, 3, 1), nn.Flatten(), nn.ReLU()), "before 2: the Flatten between"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Tanh()), "before 2: the ReLU between"),
    ],
)
def test_refuses_where_no_norm_can_be_put(factory: Callable[[], nn.Module], words: str) -> None:
    model = factory()
    before = repr(model)
    with pytest.raises(ValueError, match=words):
        normalize_layers(model)
    assert repr(model) == before


# --- OnlineNorm -----------------------------------------------------------------------------------------------------


class _Reference:
    """Online Normalization one sample, one feature at a time, in NumPy."""

    def __init__(self, features: int, forward_decay: float, backward_decay: float, eps: float, scaling: bool) -> None:
        self.mean, self.var = np.zeros(features), np.ones(features)
        self.along, self.level = np.zeros(features), np.zeros(features)
        self.af, self.ab, self.eps, self.scaling = forward_decay, backward_decay, eps, scaling
        self.weight, self.bias = np.ones(features), np.zeros(features)

    def step(self, x: np.ndarray, slope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[samples, features, positions] and the gradient by the output -> output, gradient by x."""
        samples, features, positions = x.shape
        out, back = np.zeros_like(x), np.zeros_like(x)
        kept = []
        for t in range(samples):
            y, scale = np.zeros((features, positions)), np.zeros(features)
            for f in range(features):
                scale[f] = np.sqrt(self.var[f] + self.eps)
                y[f] = (x[t, f] - self.mean[f]) / scale[f]
                m, v = np.mean(x[t, f]), np.var(x[t, f])
                gap = m - self.mean[f]
                self.var[f] = self.af * self.var[f] + (1 - self.af) * v + self.af * (1 - self.af) * gap**2
                self.mean[f] = self.af * self.mean[f] + (1 - self.af) * m
            size = np.sqrt(np.mean(y**2) + self.eps) if self.scaling else 1.0
            out[t] = y / size * self.weight[:, None] + self.bias[:, None]
            kept.append((y, scale, size))
        for t, (y, scale, size) in enumerate(kept):
            dz = slope[t] * self.weight[:, None]
            # by layer scaling: z = y / size, d size / dy = y / (n size)
            dy = dz / size - (y * np.sum(dz * y) / (y.size * size**3) if self.scaling else 0)
            for f in range(features):
                g = dy[f] - (1 - self.ab) * self.along[f] * y[f]
                self.along[f] += np.mean(g * y[f])
                g = g / scale[f] - (1 - self.ab) * self.level[f]
                self.level[f] += np.mean(g)
                back[t, f] = g
        return out, back


SHAPES = {"flat": (7, 3), "images": (4, 3, 2, 5), "one sample": (1, 3), "sequences": (6, 3, 4), "none": (0, 3)}


@pytest.mark.parametrize("scaling", [True, False], ids=["scaled", "plain"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
@pytest.mark.parametrize("shape", SHAPES)
def test_online_norm_is_the_papers_equations(shape: str, affine: bool, scaling: bool) -> None:
    torch.manual_seed(0)
    size = SHAPES[shape]
    settings = {"forward_decay": 0.9, "backward_decay": 0.7, "eps": 1e-3}
    module = OnlineNorm(3, affine=affine, layer_scaling=scaling, **settings).double()
    reference = _Reference(3, 0.9, 0.7, 1e-3, scaling)
    if affine:
        with torch.no_grad():
            module.weight.copy_(torch.tensor([0.5, 1.5, -1.0]))
            module.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
        reference.weight, reference.bias = module.weight.detach().numpy(), module.bias.detach().numpy()
    flat = (*size[:2], int(np.prod(size[2:])))
    for _ in range(5):
        x = (torch.randn(size).double() * 2 + 1).requires_grad_()
        slope = torch.randn(size).double()
        out = module(x)
        out.backward(slope)
        expected, back = reference.step(x.detach().numpy().reshape(flat), slope.numpy().reshape(flat))
        assert out.detach().numpy().reshape(flat) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert x.grad is not None
        assert x.grad.numpy().reshape(flat) == pytest.approx(back, rel=1e-9, abs=1e-12)
    for name, value in (("running_mean", reference.mean), ("running_var", reference.var),
                        ("output_error", reference.along), ("mean_error", reference.level)):  # fmt: skip
        assert getattr(module, name).numpy() == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_online_norm_by_the_batch_is_online_norm_by_the_sample() -> None:
    x, slope = torch.randn(20, 4).double(), torch.randn(20, 4).double()
    whole, single = OnlineNorm(4).double(), OnlineNorm(4).double()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    whole(a).backward(slope)
    for t in range(20):
        single(b[t : t + 1]).backward(slope[t : t + 1])
    assert torch.allclose(a.grad, b.grad, rtol=1e-10)
    for one, other in zip(whole.buffers(), single.buffers(), strict=True):
        assert torch.allclose(one, other, rtol=1e-10)


def test_online_norm_normalises_and_keeps_gradients_orthogonal() -> None:
    torch.manual_seed(0)
    module = OnlineNorm(2, forward_decay=0.99, backward_decay=0.9, layer_scaling=False, affine=False)
    outs, grads = [], []
    for _ in range(60):
        x = (torch.randn(50, 2) * torch.tensor([5.0, 0.1]) + torch.tensor([3.0, -2.0])).requires_grad_()
        out = module(x)
        out.backward(out.detach() + 2)  # a loss that pulls along the output and along the constant
        outs.append(out.detach())
        grads.append(x.grad)
    y, g = torch.cat(outs[20:]), torch.cat(grads[20:])
    assert torch.allclose(y.mean(0), torch.zeros(2), atol=0.1)
    assert torch.allclose(y.std(0), torch.ones(2), atol=0.1)
    scale = torch.tensor([5.0, 0.1])
    assert (g.mean(0) * scale).abs().max() < 0.05
    assert ((g * y).mean(0) * scale).abs().max() < 0.05


def test_online_norm_in_evaluation_uses_what_it_has() -> None:
    module = OnlineNorm(3)
    module(torch.randn(9, 3) + 2).sum().backward()
    module.eval()
    before = copy.deepcopy(module.state_dict())
    assert set(before) == {"weight", "bias", "running_mean", "running_var", "output_error", "mean_error"}
    x = torch.randn(4, 3, requires_grad=True)
    out = module(x)
    out.sum().backward()
    y = (x - module.running_mean) / torch.sqrt(module.running_var + 1e-5)
    assert torch.allclose(out, y / torch.sqrt(y.square().mean(1, keepdim=True) + 1e-5))
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert torch.equal(module(x[:1]), out[:1])


def test_online_norm_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    module = OnlineNorm(3)
    module(torch.randn(9, 3)).square().sum().backward()
    other = OnlineNorm(3)
    other.load_state_dict(module.state_dict())
    x = torch.randn(5, 3)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    module(a).square().sum().backward()
    other(b).square().sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert all(torch.equal(one, two) for one, two in zip(module.buffers(), other.buffers(), strict=True))
    module.reset_parameters()
    fresh = OnlineNorm(3).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in module.state_dict().items())


def test_online_norm_in_half_precision() -> None:
    torch.manual_seed(0)
    module, exact = OnlineNorm(8), OnlineNorm(8)
    x = torch.randn(50, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = x.bfloat16().requires_grad_()
        out = module(half)
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    exact(x.bfloat16().float().requires_grad_()).sum().backward()
    assert torch.allclose(module.running_mean, exact.running_mean, rtol=1e-4, atol=1e-6)
    assert torch.allclose(module.running_var, exact.running_var, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OnlineNorm(0), "0 features"),
        (lambda: OnlineNorm(3, forward_decay=1.0), r"forward_decay is 1; it must be at least 0 and below 1"),
        (lambda: OnlineNorm(3, backward_decay=-0.1), r"backward_decay is -0.1"),
        (lambda: OnlineNorm(3, eps=0.0), "eps is 0"),
        (lambda: OnlineNorm(3)(torch.rand(4, 5)), r"shape \[4, 5\]; it must be \[samples, 3\]"),
        (lambda: OnlineNorm(3)(torch.rand(3)), r"shape \[3\]"),
    ],
)
def test_online_norm_refuses(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# --- plasticity injection -------------------------------------------------------------------------------------------


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    head = list(model[2].parameters())  # type: ignore[index]
    return torch.optim.AdamW(
        [{"params": [*model[0].parameters(), head[0]], "lr": 0.01}, {"params": head[1:], "weight_decay": 0.3}],  # type: ignore[index]
        lr=0.02,
    )


def test_injection_changes_no_output_and_only_the_fresh_part_learns() -> None:
    model = _network()
    optimizer = _optimizer(model)
    _train(model, optimizer)
    x = torch.randn(50, 4, requires_grad=True)
    before = model(x)
    (slope,) = torch.autograd.grad(before.sum(), x)
    old = model[2]
    injected = inject_plasticity(model, "2", optimizer)
    assert model[2] is injected
    assert injected.frozen is old
    assert torch.equal(model(x), before)
    assert torch.allclose(torch.autograd.grad(model(x).sum(), x)[0], slope, atol=1e-6)
    assert not torch.equal(injected.trained[0].weight, injected.frozen[0].weight)
    assert all(p.grad is None for p in injected.parameters())
    frozen = copy.deepcopy([injected.frozen.state_dict(), injected.frozen_copy.state_dict()])
    fresh, body = copy.deepcopy(injected.trained.state_dict()), model[0].weight.detach().clone()
    _train(model, optimizer)
    after = [injected.frozen.state_dict(), injected.frozen_copy.state_dict()]
    assert all(torch.equal(after[i][key], frozen[i][key]) for i in range(2) for key in frozen[i])
    assert all(not torch.equal(value, fresh[key]) for key, value in injected.trained.state_dict().items())
    assert not torch.equal(model[0].weight, body)
    assert not torch.equal(model(x), before)
    injected.requires_grad_(True)
    assert not any(p.requires_grad for p in (*injected.frozen.parameters(), *injected.frozen_copy.parameters()))


def test_the_fresh_part_is_drawn_as_the_old_was() -> None:
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 100))
    nn.init.zeros_(model[2].weight)
    injected = inject_plasticity(model, "2", torch.optim.SGD(model.parameters(), 0.1))
    w = injected.trained.weight
    assert w.abs().max() <= 200**-0.5
    assert w.std().item() == pytest.approx((1 / 600) ** 0.5, rel=0.03)


def test_the_global_seed_says_what_is_injected() -> None:
    drawn = []
    for seed in (1, 1, 2):
        model = _network()
        torch.manual_seed(seed)
        drawn.append(inject_plasticity(model, "2", torch.optim.SGD(model.parameters(), 0.1)).trained[0].weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_fresh_parameters_get_the_settings_of_the_old() -> None:
    model = _network()
    optimizer = _optimizer(model)
    _train(model, optimizer)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    state = {id(p): optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    injected = inject_plasticity(model, "2", optimizer)
    assert [list(group["params"]) for group in optimizer.param_groups[:2]] == groups
    fresh = list(injected.trained.parameters())
    assert [list(group["params"]) for group in optimizer.param_groups[2:]] == [[fresh[0]], fresh[1:]]
    for old, new in zip(optimizer.param_groups[:2], optimizer.param_groups[2:], strict=True):
        assert {k: v for k, v in old.items() if k != "params"} == {k: v for k, v in new.items() if k != "params"}
    assert all(torch.equal(optimizer.state[p]["exp_avg"], state[id(p)]) for group in groups for p in group)


def test_an_optimizer_that_knows_names_learns_the_new_ones() -> None:
    model = _network()
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    inject_plasticity(model, "2.2", optimizer)
    assert optimizer.param_groups[1]["param_names"] == ["2.2.trained.weight", "2.2.trained.bias"]


def test_a_checkpoint_of_an_injected_model_loads_into_an_injected_model() -> None:
    model = _network()
    optimizer = _optimizer(model)
    _train(model, optimizer)
    inject_plasticity(model, "2.2", optimizer)
    _train(model, optimizer)
    inject_plasticity(model, "2.2.trained", optimizer)
    _train(model, optimizer)
    assert "2.2.frozen.weight" in model.state_dict()
    assert "2.2.trained.frozen_copy.bias" in model.state_dict()
    other = _network()
    other_optimizer = _optimizer(other)
    for name in ("2.2", "2.2.trained"):
        inject_plasticity(other, name, other_optimizer)
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, other_optimizer)):
        _train(m, o)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(2) - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_what_cannot_be_recovered_can_be_given() -> None:
    def factory() -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2), _Scaled())
        nn.init.constant_(model[1].scale, 3.0)
        return model

    model, initial = build_and_record(factory)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"how 1\.scale was first drawn; give `initial`"):
        inject_plasticity(model, "1", optimizer)
    injected = inject_plasticity(model, "1", optimizer, initial)
    assert torch.equal(injected.trained.scale, torch.full((2,), 3.0))
    initial["0.bias"] = Distribution("constant", 2.0)  # known better than what a linear layer would do
    assert torch.equal(inject_plasticity(model, "0", optimizer, initial).trained.bias, torch.full((2,), 2.0))


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("factory", "name", "words"),
    [
        (_network, "3", r"no submodule '3'; it has 0, 1, 2, 2\.0"),
        (_network, "", "no submodule ''"),
        (_network, "1", "1 has no parameters that are trained"),
        (lambda: _network().requires_grad_(False), "2", "2 has no parameters that are trained"),
        (_tied, "2", r"0\.weight is shared with 2"),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2))), "0", r"0\.1 drops out at random"),
        (lambda: nn.Sequential(nn.MultiheadAttention(4, 2, dropout=0.1)), "0", "0 drops out at random"),
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))), "0", r"0\.1 normalises by statist"),
    ],
)
def test_injection_refuses(factory: Callable[[], nn.Module], name: str, words: str) -> None:
    model = factory()
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.rand(1))], 0.1)
    before, state = repr(model), torch.get_rng_state()
    with pytest.raises(ValueError, match=words):
        inject_plasticity(model, name, optimizer)
    assert repr(model) == before
    assert len(optimizer.param_groups) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_injection_refuses_an_optimizer_without_the_parameters() -> None:
    model = _network()
    with pytest.raises(ValueError, match=r"does not hold 2\.0\.weight, 2\.0\.bias"):
        inject_plasticity(model, "2", torch.optim.SGD(model[0].parameters(), 0.1))  # type: ignore[index]
    assert all(p.requires_grad for p in model.parameters())


def test_injection_refuses_a_second_one_at_the_same_place() -> None:
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    inject_plasticity(model, "2", optimizer)
    with pytest.raises(ValueError, match=r"injected already; inject into its trained part, '2\.trained'"):
        inject_plasticity(model, "2", optimizer)


def test_injected_adds_tensors() -> None:
    with pytest.raises(TypeError, match="output of LSTM is a tuple"):
        Injected(nn.LSTM(3, 3), nn.LSTM(3, 3))(torch.rand(2, 3))
