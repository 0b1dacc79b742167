"""Which parameters belong to a hidden unit: proved by doing, or refused with a reason."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F

from perennial.units import Distribution, Slice, UnitMap, build_and_record, trace

# --- the proof ------------------------------------------------------------------------------------------------------


def prove(model: nn.Module, units: UnitMap, x: Tensor, seed: int = 0) -> int:
    """Zero a unit's outgoing slices and perturb its incoming ones: the output must not change by a bit. With the
    outgoing slices intact it must change. And no other unit may lose a bit of what it reads. Returns the units proved.
    """
    model = model.double().eval()
    x = x.double() if x.is_floating_point() else x
    params = {name: w.detach().clone() for name, w in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)

    def output(changed: dict[str, Tensor]) -> list[Tensor]:
        return _tensors(functional_call(model, changed, (x,)))

    def along(part: Any, unit: int) -> tuple[Any, ...]:
        return (slice(None),) * part.dim + (part.index[unit],)

    proved = 0
    for layer in units:
        for unit in range(layer.size):
            cut = {name: w.clone() for name, w in params.items()}
            for part in layer.outgoing:
                cut[part.parameter][along(part, unit)] = 0
            before = output(cut)
            bent = {name: w.clone() for name, w in params.items()}
            for part in (*layer.incoming, *layer.norms):
                at = along(part, unit)
                noise = torch.rand(cut[part.parameter][at].shape, generator=generator, dtype=torch.float64)
                cut[part.parameter][at] += 3 + noise  # large enough that no rectifier hides it
                bent[part.parameter][at] += 3 + noise
            for a, b in zip(before, output(cut), strict=True):
                assert torch.equal(a, b), f"unit {unit} of {layer.name} is read elsewhere too"
            assert any(not torch.equal(a, b) for a, b in zip(output(params), output(bent), strict=True)), (
                f"unit {unit} of {layer.name} is not read at all"
            )
            proved += 1
    claimed: set[tuple[str, int, int]] = set()
    for layer in units:
        for part in layer.outgoing:
            for position in part.index.flatten().tolist():
                entry = (part.parameter, part.dim, position)
                assert entry not in claimed, f"{part.parameter}[:, {position}] is said to read two units"
                claimed.add(entry)
    return proved


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for one in value for t in _tensors(one)]


class Net(nn.Module):
    """A module out of parts and a function of (parts, input)."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def positive(n: int) -> Tensor:
    """An example that keeps rectifiers open."""
    return torch.rand(5, n) + 0.1


# --- networks that must be mapped -----------------------------------------------------------------------------------

MAPPED: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)),
        positive(6), ["0", "2"],
    ),
    "functional, in place, dropout": (
        lambda: Net(lambda m, x: m.c(F.dropout(F.relu(m.b(F.leaky_relu(m.a(x), inplace=True))), 0.5, m.training)),
                    a=nn.Linear(6, 5), b=nn.Linear(5, 4), c=nn.Linear(4, 2)),
        positive(6), ["a", "b"],
    ),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)), positive(6), ["0"],
    ),
    "conv flatten linear": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(),
                              nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 2)),
        torch.rand(4, 2, 8, 8), ["0", "3", "6"],
    ),
    "conv, channels last": (
        lambda: Net(lambda m, x: m.b(m.a(x).relu().permute(0, 2, 3, 1).flatten(1)),
                    a=nn.Conv2d(2, 3, 3), b=nn.Linear(27, 2)),
        torch.rand(4, 2, 5, 5), ["a"],
    ),
    "global average": (
        lambda: Net(lambda m, x: m.b(m.a(x).relu().mean((2, 3))), a=nn.Conv2d(2, 3, 3), b=nn.Linear(3, 2)),
        torch.rand(4, 2, 5, 5), ["a"],
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)), torch.rand(4, 2, 5), ["0"],
    ),
    "two readers": (
        lambda: Net(lambda m, x: (m.pi(m.a(x).tanh()), m.v(m.a.out)), a=_Remember(6, 5), pi=nn.Linear(5, 2),
                    v=nn.Linear(5, 1)),
        positive(6), ["a"],
    ),
    "elementwise with a constant": (
        lambda: Net(lambda m, x: m.b(2 * m.a(x).sigmoid() - 0.5), a=nn.Linear(6, 5), b=nn.Linear(5, 2)),
        positive(6), ["a"],
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 2)), torch.rand(3, 4, 6), ["0"],
    ),
    "reversed": (
        lambda: Net(lambda m, x: m.b(m.a(x).relu()[:, [4, 3, 2, 1, 0]]), a=nn.Linear(6, 5), b=nn.Linear(5, 2)),
        positive(6), ["a"],
    ),
}  # fmt: skip


class _Remember(nn.Linear):
    """A linear layer whose last activation a second head reads."""

    out: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.out = super().forward(x).tanh()
        return self.out


@pytest.mark.parametrize("name", MAPPED)
def test_maps_and_proves(name: str) -> None:
    factory, x, expected = MAPPED[name]
    torch.manual_seed(0)
    model = factory()
    units = trace(model, x)
    if name == "two readers":
        assert {part.parameter for part in units[0].outgoing} == {"pi.weight", "v.weight"}
    assert [layer.name for layer in units] == expected
    assert prove(model, units, x) == sum(layer.size for layer in units)
    with torch.no_grad():
        seen: dict[str, Tensor] = {}
        readers = {layer.tap.removesuffix(".weight"): layer for layer in units}
        handles = [
            model.get_submodule(tap).register_forward_pre_hook(lambda _, args, tap=tap: seen.__setitem__(tap, args[0]))
            for tap in readers
        ]
        model(x.double())
        for handle in handles:
            handle.remove()
    for tap, layer in readers.items():
        h = layer.activation(seen[tap])
        assert h.shape[1] == layer.size
        assert h.numel() == seen[tap].numel()


def test_the_output_layer_is_never_listed() -> None:
    for factory, x, _ in MAPPED.values():
        model = factory()
        listed = {layer.name for layer in trace(model, x)}
        last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
        assert last not in listed
    single = trace(nn.Linear(3, 2), torch.rand(4, 3))
    assert len(single) == 0


# --- networks that must be refused ----------------------------------------------------------------------------------


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def _three(forward: Callable[[Any, Tensor], Any], **more: Any) -> Callable[[], nn.Module]:
    return lambda: Net(
        forward, a=nn.Linear(6, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 2), **{k: make() for k, make in more.items()}
    )


REFUSED: dict[str, tuple[Callable[[], nn.Module], Tensor, set[str], str]] = {
    # name: (network, example, modules that must not be listed, a word of the reason)
    "residual stream": (
        lambda: Net(lambda m, x: _residual(m, x), a=nn.Linear(6, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 2)),
        positive(6), {"a", "b"}, "residual",
    ),
    "softmax": (_three(lambda m, x: m.c(m.b(m.a(x).relu()).softmax(1))), positive(6), {"b"}, "softmax"),
    "sum over units": (
        _three(lambda m, x: m.c(h := m.a(x).relu()) + h.sum(1, keepdim=True)), positive(6), {"a"}, "statistic",
    ),
    "mean over units": (
        _three(lambda m, x: m.c(h := m.a(x).relu()) * m.d(h.mean(1, keepdim=True)), d=lambda: nn.Linear(1, 1)),
        positive(6), {"a"}, "",
    ),
    "maximum over units": (
        _three(lambda m, x: m.c(F.max_pool1d(m.a(x)[:, None], 3, 1, 1)[:, 0])), positive(6), {"a"}, "",
    ),
    "maxout": (
        lambda: Net(lambda m, x: m.b(F.max_pool1d(m.a(x)[:, None], 2)[:, 0]), a=nn.Linear(6, 8), b=nn.Linear(4, 2)),
        positive(6), {"a"}, "",
    ),
    "used twice": (_three(lambda m, x: m.c(m.b(m.b(m.a(x).relu()).relu()))), positive(6), {"a", "b"}, "more than once"),
    "matrix product": (_three(lambda m, x: m.a(x).relu() @ m.c.weight.T), positive(6), {"a"}, "matmul"),
    "transposed beside its reader": (
        _three(lambda m, x: m.c(h := m.a(x).relu()) + h.T.sum(0)[:, None]), positive(6), {"a"}, "",
    ),
    "custom function beside its reader": (
        _three(lambda m, x: m.c(h := m.a(x).relu()) + _Double.apply(h)[:, :2]), positive(6), {"a"}, "",
    ),
    "weight read elsewhere": (
        _three(lambda m, x: m.c(m.a(x).relu()) + m.a.weight.sum()), positive(6), {"a"}, "",
    ),
    "tied autoencoder": (
        lambda: Net(lambda m, x: F.linear(m.b(m.a(x).relu()).relu(), m.a.weight.T), a=nn.Linear(6, 5),
                    b=nn.Linear(5, 5)),
        positive(6), {"a", "b"}, "",
    ),
    "shared weight": (
        lambda: _shared(), positive(6), {"a"}, "more than once",
    ),
    "an output besides": (
        _three(lambda m, x: (m.c(h := m.a(x).relu()), h)), positive(6), {"a"}, "output",
    ),
    "an output in a dict": (
        _three(lambda m, x: {"logits": m.c(h := m.a(x).relu()), "hidden": h}), positive(6), {"a"}, "",
    ),
    "a nested output": (
        _three(lambda m, x: (m.c(h := m.a(x).relu()), (h, h))), positive(6), {"a"}, "",
    ),
    "halves of a layer": (
        lambda: Net(lambda m, x: torch.cat([m.mean(m.a(x).relu().chunk(2, 1)[0]), m.std(m.a(x).relu().chunk(2, 1)[1])]),
                    a=nn.Linear(6, 8), mean=nn.Linear(4, 2), std=nn.Linear(4, 2)),
        positive(6), set(), "",
    ),
    "halves of one pass": (
        lambda: Net(_halves, a=nn.Linear(6, 8), mean=nn.Linear(4, 2), std=nn.Linear(4, 2)), positive(6), set(), "",
    ),
    "some units read": (
        _three(lambda m, x: m.d(m.a(x).relu()[:, :3]), d=lambda: nn.Linear(3, 2)), positive(6), set(), "",
    ),
    "some units read twice": (
        lambda: Net(lambda m, x: m.b(m.a(x).relu()[:, [0, 0, 0, 1]]), a=nn.Linear(6, 2), b=nn.Linear(4, 2)),
        positive(6), set(), "",
    ),
    "read by nobody": (
        _three(lambda m, x: (m.a(x), m.c(m.b(x[:, :5]).relu()))[1]), positive(6), {"a"}, "read by no layer",
    ),
}  # fmt: skip


def _residual(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(h + m.b(h.relu()))  # type: ignore[no-any-return]


def _halves(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = m.a(x).relu().chunk(2, 1)
    return m.mean(mean), m.std(std)


def _shared() -> nn.Module:
    net = Net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 2))
    net.b.weight = net.a.weight
    return net


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_or_proves(name: str) -> None:
    """What is listed is proved; what must not be listed is refused, with a reason that names it; nothing raises."""
    factory, x, banned, word = REFUSED[name]
    torch.manual_seed(0)
    model = factory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        units = trace(model, x).interior()
    prove(model, units, x)
    assert not banned & {layer.name for layer in units}
    reasons = {
        name.partition("[")[0]: reason for name, reason in units.refused
    }  # a part of a layer has its rows behind
    assert banned <= reasons.keys(), "left out without a reason"
    assert all(reasons.values())
    assert any(word in reason for reason in reasons.values()) or not word, reasons


@pytest.mark.parametrize("name", [*MAPPED, *REFUSED])
def test_tracing_leaves_no_trace(name: str) -> None:
    factory, x = {**MAPPED, **REFUSED}[name][:2]
    torch.manual_seed(0)
    model = factory()
    model.train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    list(model.modules())[-1].eval()
    before = {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "rng": torch.get_rng_state(),
        "x": x.clone(),
    }
    trace(model, x)
    assert all(torch.equal(v, before["state"][k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == before["modes"]
    assert torch.equal(torch.get_rng_state(), before["rng"])
    assert torch.equal(x, before["x"])
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()


def test_batch_norm_buffers_are_put_back() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trace(model, positive(6))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_forward_that_raises_leaves_the_buffers_as_they_were() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x)
            raise KeyError("mine")

    model = Broken()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyError, match="mine"):
        trace(model, positive(6))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_keyword_arguments() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, *, observation: Tensor) -> Tensor:
            h = F.linear(input=observation, weight=self.a.weight, bias=self.a.bias).relu()
            return F.linear(h, bias=self.b.bias, weight=self.b.weight)

    assert [layer.name for layer in trace(Named(), observation=positive(6))] == ["a"]


def test_a_slice_goes_to_a_device_once() -> None:
    """A copy a step would have the processor wait for the device each time. ``meta`` stands for a device here."""
    part = Slice("6.weight", 1, torch.tensor([[4, 1], [0, 5], [3, 2]]))
    device, values = torch.device("meta"), torch.zeros(3, device="meta")
    assert part.on(torch.device("cpu")) is part.index
    assert part.on(device) is part.on(device)
    copies: list[Any] = []
    for _ in range(2):
        assert part.spread(values, 6).shape == (6,)
        assert part.gather(torch.zeros(2, 6, device="meta")).shape == (3, 4)
        assert part.positions(torch.tensor([2, 0], device="meta")).shape == (4,)
        copies.append([there for there in part._copies.values() if there.device == device])
    assert len(copies[0]) == 2
    assert all(a is b for a, b in zip(*copies, strict=True))
    for again in (pickle.loads(pickle.dumps(part)), copy.deepcopy(part), dataclasses.replace(part, dim=0)):
        assert torch.equal(again.index, part.index)
        assert not again._copies
    other = Slice("6.weight", 1, part.index)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert other.on(device).device == device
    assert not other._copies, "what stands for a tensor while a step is traced"


def test_the_positions_of_units() -> None:
    part = Slice("6.weight", 1, torch.tensor([[4, 1], [0, 5], [3, 2]]))
    assert part.positions(torch.tensor([2, 0])).tolist() == [3, 2, 4, 1]
    assert Slice("0.weight", 0, torch.arange(3)[:, None]).positions(torch.tensor([2, 0])).tolist() == [2, 0]


_MLPS = given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    activation=st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.SiLU, nn.Softplus]),
    bias=st.booleans(), seed=st.integers(0, 10_000), dropout=st.booleans(),
)  # fmt: skip


@settings(max_examples=8, deadline=None)
@_MLPS
def test_random_mlps_are_proved(
    widths: list[int], activation: type[nn.Module], bias: bool, seed: int, dropout: bool
) -> None:
    _prove_mlp(widths, activation, bias, seed, dropout)


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@_MLPS
def test_many_random_mlps_are_proved(
    widths: list[int], activation: type[nn.Module], bias: bool, seed: int, dropout: bool
) -> None:
    _prove_mlp(widths, activation, bias, seed, dropout)


def _prove_mlp(widths: list[int], activation: type[nn.Module], bias: bool, seed: int, dropout: bool) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (n, k) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(n, k, bias=bias)]
        if i < len(widths) - 2:
            layers += [activation()] + ([nn.Dropout(0.3)] if dropout else [])
    model = nn.Sequential(*layers)
    for p in model.parameters():
        nn.init.uniform_(p, 0.1, 1.0)  # every unit is on, every path open
    x = torch.rand(4, widths[0]) + 0.1
    units = trace(model, x)
    assert not units.refused
    assert [layer.size for layer in units] == widths[1:-1]
    assert prove(model, units, x, seed) == sum(widths[1:-1])


# --- how parameters were drawn --------------------------------------------------------------------------------------


def _drawn(act: Callable[[nn.Linear], Any], seed: int = 0) -> dict[str, Distribution]:
    torch.manual_seed(seed)

    def factory() -> nn.Module:
        layer = nn.Linear(6, 5)
        act(layer)
        return layer

    return build_and_record(factory)[1]


@pytest.mark.parametrize(("act", "weight"), [
    (lambda m: None, Distribution("uniform", -(6**-0.5), 6**-0.5)),
    (lambda m: nn.init.uniform_(m.weight, -0.3, 0.7), Distribution("uniform", -0.3, 0.7)),
    (lambda m: nn.init.uniform_(m.weight), Distribution("uniform", 0.0, 1.0)),
    (lambda m: nn.init.normal_(m.weight, 0.1, 0.2), Distribution("normal", 0.1, 0.2)),
    (lambda m: nn.init.normal_(m.weight), Distribution("normal", 0.0, 1.0)),
    (lambda m: nn.init.zeros_(m.weight), Distribution("constant", 0.0)),
    (lambda m: nn.init.ones_(m.weight), Distribution("constant", 1.0)),
    (lambda m: nn.init.constant_(m.weight, 0.4), Distribution("constant", 0.4)),
    (lambda m: nn.init.kaiming_uniform_(m.weight, nonlinearity="relu"), Distribution("uniform", -1.0, 1.0)),
    (lambda m: nn.init.kaiming_normal_(m.weight), Distribution("normal", 0.0, 3**-0.5)),
    (lambda m: nn.init.xavier_uniform_(m.weight), Distribution("uniform", -((6 / 11) ** 0.5), (6 / 11) ** 0.5)),
    (lambda m: nn.init.xavier_normal_(m.weight), Distribution("normal", 0.0, (2 / 11) ** 0.5)),
    (lambda m: m.weight.data.uniform_(-2, 2), Distribution("uniform", -2.0, 2.0)),
    (lambda m: (nn.init.orthogonal_(m.weight), nn.init.normal_(m.weight)), Distribution("normal", 0.0, 1.0)),
], ids=["default", "uniform", "uniform 01", "normal", "normal 01", "zeros", "ones", "constant", "kaiming uniform",
        "kaiming normal", "xavier uniform", "xavier normal", "by data", "last one counts"])  # fmt: skip
def test_records_how_a_weight_was_drawn(act: Callable[[nn.Linear], Any], weight: Distribution) -> None:
    found = _drawn(act)
    got = found["weight"]
    assert got.kind == weight.kind
    assert (got.first, got.second) == pytest.approx((weight.first, weight.second))
    assert found["bias"].kind == "uniform"
    assert found["bias"].second == pytest.approx(6**-0.5)


def _part(m: nn.Linear, act: Callable[[Tensor], Any]) -> None:
    with torch.no_grad():
        act(m.weight)


@pytest.mark.parametrize("act", [
    lambda m: nn.init.sparse_(m.weight, 0.5),
    lambda m: nn.init.eye_(m.weight),
    lambda m: _part(m, lambda w: w.copy_(torch.rand(5, 6) - 0.5)),
    lambda m: _part(m, lambda w: w.mul_(torch.rand(6))),
    lambda m: _part(m, lambda w: w[0].fill_(0.1)),
    lambda m: _part(m, lambda w: w[2].normal_()),
    lambda m: _part(m, lambda w: w[:, :3].normal_()),
    lambda m: _part(m, lambda w: w[1:].mul_(0.1)),
    lambda m: _part(m, lambda w: torch.add(w, 1.0, out=w)),
    lambda m: setattr(m, "weight", nn.Parameter(torch.rand(5, 6) - 0.5)),
    lambda m: setattr(m, "weight", nn.Parameter(torch.empty(5, 6).uniform_().square())),
], ids=["sparse", "eye", "copy", "scaled", "first row", "a row", "columns", "rows scaled",
        "out", "made elsewhere", "made of a draw"])  # fmt: skip
def test_omits_what_it_cannot_redraw(act: Callable[[nn.Linear], Any]) -> None:
    assert "weight" not in _drawn(act)


@pytest.mark.parametrize("bounds", [(-2.0, 2.0), (-1.0, 1.0), (0.0, 3.0)], ids=str)
def test_a_truncated_normal_is_never_taken_for_a_plain_draw(bounds: tuple[float, float]) -> None:
    """torch draws a plain normal (or uniform) first and corrects it only if a number lies outside, which with few
    numbers may not happen: the answer must not depend on the luck of the draw."""
    for seed in range(30):
        found = _drawn(lambda m: nn.init.trunc_normal_(m.weight, 0.0, 1.0, *bounds), seed)
        assert found["weight"] == Distribution("truncated_normal", 0.0, 1.0, *bounds), seed


def test_a_freed_tensors_fill_is_not_anothers() -> None:
    """Memory is used again: what was drawn into a tensor that is gone says nothing of the next at its address."""

    def factory() -> nn.Module:
        net = nn.Module()
        for i in range(20):
            values = torch.empty(64, 64)
            values.uniform_(-1, 1)
            scaled = values / 7
            del values
            net.register_parameter(f"p{i}", nn.Parameter(scaled * scaled))
        return net

    assert build_and_record(factory)[1] == {}


def test_dirac_is_not_a_constant() -> None:
    def factory() -> nn.Module:
        conv = nn.Conv2d(3, 3, 3)
        nn.init.dirac_(conv.weight)
        return conv

    assert "weight" not in build_and_record(factory)[1]


def test_recording_draws_what_the_factory_draws() -> None:
    torch.manual_seed(3)
    plain = nn.Linear(6, 5)
    torch.manual_seed(3)
    recorded, _ = build_and_record(lambda: nn.Linear(6, 5))
    assert torch.equal(plain.weight, recorded.weight)
    assert torch.equal(plain.bias, recorded.bias)


def test_a_shared_parameter_is_recorded_once() -> None:
    _, found = build_and_record(_shared)
    assert found["a.weight"].second == pytest.approx(1 / math.sqrt(6))
    assert "b.weight" not in found
