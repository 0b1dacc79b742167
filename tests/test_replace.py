"""The act of replacing units, on unit maps made by hand; and the methods that replace all units of a kind at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from references import Table, lane, populate, same
from torch import Tensor, nn
from torch.func import functional_call, vmap

from perennial import SGD, Adam, ContinualBackprop, Lane, scores
from perennial.methods import Context, ReDo, ReGraMa, SelfNormalizedResets
from perennial.methods import replace as replace_module
from perennial.methods.replace import Chosen, changes, replace_units, working_copy
from perennial.noise import Noise, elements, seed_key
from perennial.units import Distribution, Slice, UnitLayer, UnitMap, build_and_record

KINDS = ("resample", "rewind", "orthogonal", "split")


# --- networks, each with one layer of hidden units, and their maps ---------------------------------------------------


def _one(size: int) -> Tensor:
    return torch.arange(size)[:, None]


def _slice(parameter: str, dim: int, index: Tensor | int, groups: int = 1) -> Slice:
    return Slice(parameter, dim, _one(index) if isinstance(index, int) else index, groups)


class _Gated(nn.Module):
    """Each unit is a product of two rows of one matrix, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(5, 12)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).chunk(2, -1)
        return self.out(torch.sigmoid(gate) * value.flip(-1))


class _Embedded(nn.Module):
    """Units are columns of an embedding, and rows of the weight that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.out = nn.Module()
        self.out.weight, self.out.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(4))  # [in, out]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.table(x)) @ self.out.weight + self.out.bias


@dataclass
class Net:
    """A network, its layer of units, an input, and how to see the activation [samples, units, ...]."""

    model: nn.Module
    units: UnitMap
    x: Tensor
    seen: Callable[[nn.Module, Tensor], Tensor]

    @property
    def layer(self) -> UnitLayer:
        return self.units[0]

    def start(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and buffers."""
        params = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        buffers = {
            name: b.detach().clone()
            for name, b in self.model.named_buffers()
            if not name.endswith("num_batches_tracked")
        }
        return params, buffers

    def output(self, values: dict[str, Tensor]) -> Tensor:
        return functional_call(self.model.eval(), values, (self.x,)).detach()


def _net(factory: Callable[[], nn.Module], x: Tensor, seen: Any, layer: UnitLayer) -> Net:
    torch.manual_seed(1)
    model, initial = build_and_record(factory)
    with torch.no_grad():
        for p in (*model.parameters(), *model.buffers()):
            if p.is_floating_point():
                p.add_(torch.rand_like(p) * 0.3 + 0.1)  # as after some training
    return Net(model.eval(), UnitMap((layer,), initial=initial), x, seen)


def mlp() -> Net:
    layer = UnitLayer(
        "0",
        6,
        "linear",
        (_slice("0.weight", 0, 6), _slice("0.bias", 0, 6)),
        (),
        (_slice("2.weight", 1, 6),),
        "2.weight",
    )
    return _net(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)),
        torch.randn(9, 5), lambda m, x: m[1](m[0](x)), layer,
    )  # fmt: skip


def conv_norm() -> Net:
    norms = tuple(_slice(f"1.{leaf}", 0, 4) for leaf in ("weight", "bias", "running_mean", "running_var"))
    layer = UnitLayer(
        "0",
        4,
        "conv",
        (_slice("0.weight", 0, 4), _slice("0.bias", 0, 4)),
        norms,
        (_slice("3.weight", 1, 4),),
        "3.weight",
    )
    return _net(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)),
        torch.randn(3, 2, 6, 6), lambda m, x: m[2](m[1](m[0](x))), layer,
    )  # fmt: skip


def conv_flat() -> Net:
    index = torch.arange(16).reshape(4, 4)
    layer = UnitLayer(
        "0",
        4,
        "conv",
        (_slice("0.weight", 0, 4), _slice("0.bias", 0, 4)),
        (),
        (_slice("3.weight", 1, index),),
        "3.weight",
    )
    return _net(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
        torch.randn(3, 2, 4, 4), lambda m, x: m[1](m[0](x)), layer,
    )  # fmt: skip


def grouped() -> Net:
    layer = UnitLayer(
        "0",
        4,
        "conv",
        (_slice("0.weight", 0, 4), _slice("0.bias", 0, 4)),
        (),
        (_slice("2.weight", 1, 4, 2),),
        "2.weight",
    )
    return _net(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2)),
        torch.randn(3, 2, 5, 5), lambda m, x: m[1](m[0](x)), layer,
    )  # fmt: skip


def gated() -> Net:
    index = torch.stack([torch.arange(6), torch.arange(11, 5, -1)], 1)
    layer = UnitLayer(
        "both", 6, "linear", (_slice("both.weight", 0, index), _slice("both.bias", 0, index)), (),
        (_slice("out.weight", 1, 6),), "out.weight",
    )  # fmt: skip

    def seen(m: Any, x: Tensor) -> Tensor:
        gate, value = m.both(x).chunk(2, -1)
        return torch.sigmoid(gate) * value.flip(-1)

    return _net(_Gated, torch.randn(9, 5), seen, layer)


def embedded() -> Net:
    layer = UnitLayer(
        "table", 6, "embedding", (_slice("table.weight", 1, 6),), (), (_slice("out.weight", 0, 6),), "out.weight"
    )
    return _net(
        _Embedded, torch.randint(0, 7, (9,)), lambda m, x: torch.tanh(m.table(x)), layer
    )  # fmt: skip


def part_of_a_layer() -> Net:
    """Half of a layer's rows, in an order of their own, and two readers."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.left, self.right = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.wide(x))
            return torch.cat([self.left(h), self.right(h[:, [6, 1, 4, 3]])], 1)

    index = torch.tensor([6, 1, 4, 3])[:, None]
    layer = UnitLayer(
        "wide", 4, "linear", (_slice("wide.weight", 0, index), _slice("wide.bias", 0, index)), (),
        (_slice("left.weight", 1, index), _slice("right.weight", 1, 4)), "right.weight",
    )  # fmt: skip
    return _net(Model, torch.randn(9, 5), lambda m, x: torch.relu(m.wide(x))[:, [6, 1, 4, 3]], layer)


NETS = (mlp, conv_norm, conv_flat, grouped, gated, embedded, part_of_a_layer)
every_net = pytest.mark.parametrize("build", NETS, ids=lambda build: build.__name__)


def context(net: Net, buffers: dict[str, Tensor], *, in_place: bool = False, step: int = 3, **more: Any) -> Context:
    key = torch.tensor(seed_key(0, "method"), dtype=torch.int32)
    noise = Noise(key, torch.tensor(step, dtype=torch.int32), "test")
    return Context({}, {}, noise, net.units, buffers=buffers, in_place=in_place)._replace(**more)


def act(
    net: Net, gone: list[int], *, few: bool = False, in_place: bool = False, kind: str = "resample",
    mean: Tensor | None = None, useful: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """Parameters and buffers before and after."""
    params, buffers = net.start()
    before = {name: w.clone() for name, w in (params | buffers).items()}
    mark = torch.zeros(net.layer.size)
    mark[gone] = 1
    candidates = torch.tensor([*gone, *([0, net.layer.size - 1] if few else [])])  # room for more than there are
    given = context(net, buffers, in_place=in_place)
    current = working_copy(params, given)
    kept = {name: torch.full_like(w, 5.0) for name, w in params.items()}
    useful = torch.arange(net.layer.size, dtype=torch.float32) if useful is None else useful
    with torch.no_grad():
        replace_units(
            net.layer, current, Chosen(mark, candidates if few else None), given, reinitialise=kind, mean=mean,
            useful=useful, kept=kept,
        )  # fmt: skip
    if in_place:
        assert not changes(current, params, given)
    else:
        same(params | buffers, before)
    return before, current


# --- in place and as new tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("few", [False, True])
@every_net
def test_in_place_gives_the_same_bits(
    build: Any, few: bool, kind: str, host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the host only what is hit is looked at; on a device shapes are fixed, and some candidates are not hit."""
    net = build()
    if kind == "split" and build is grouped:
        pytest.skip("refused")
    if not host:
        monkeypatch.setattr(replace_module, "on_host", lambda tensor: False)
    for gone in ([], [2], [3, 0], list(range(net.layer.size))):
        mean = torch.rand(net.layer.size)
        before, pure = act(net, gone, few=few, kind=kind, mean=mean)
        _, live = act(net, gone, few=few, kind=kind, mean=mean, in_place=True)
        same(live, pure)
        if not gone:
            same(pure, before)


@pytest.mark.parametrize("kind", KINDS)
@every_net
def test_under_vmap_every_lane_is_as_alone(build: Any, kind: str) -> None:
    net = build()
    if kind == "split" and build is grouped:
        pytest.skip("refused")
    size = net.layer.size
    params, buffers = net.start()
    marks = torch.stack([torch.zeros(size), (torch.arange(size) < 2).float(), torch.ones(size)])
    units = torch.tensor([[0, 1, 0], [0, 1, 0], [2, 3, 0]])
    for few in (False, True):
        if few:
            marks = marks[:2]
            units = units[:2]

        def one(mark: Tensor, chosen: Tensor, few: bool = few) -> dict[str, Tensor]:
            given = context(net, buffers)
            current = working_copy(params, given)
            kept = {name: w * 2 for name, w in params.items()}
            replace_units(
                net.layer, current, Chosen(mark, chosen if few else None), given, reinitialise=kind, mean=mark * 0.5,
                useful=torch.arange(size) * 1.0, kept=kept,
            )  # fmt: skip
            return current

        together = vmap(one)(marks, units)
        for number in range(len(marks)):
            alone = one(marks[number], units[number])
            same({name: w[number] for name, w in together.items()}, alone, rtol=1e-5)


# --- what is done -----------------------------------------------------------------------------------------------------


@every_net
def test_resample_draws_the_units_entries_and_silences_the_unit(build: Any) -> None:
    net = build()
    gone = [1, 3]
    for few in (False, True):
        before, after = act(net, gone, few=few)
        mark = torch.zeros(net.layer.size)
        mark[gone] = 1
        noise = context(net, {}).noise
        expected = dict(before)
        for part in net.layer.outgoing:
            w = expected[part.parameter]
            expected[part.parameter] = torch.where(part.mask(mark, w) > 0, torch.zeros(()), w)
        for part in net.layer.incoming:
            w = expected[part.parameter]
            fresh = net.units.initial[part.parameter].draw(noise, part.parameter, elements(w))
            expected[part.parameter] = torch.where(part.mask(mark, w) > 0, fresh, w)
        for part in net.layer.norms:
            start = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
            expected[part.parameter][gone] = start[part.parameter.rpartition(".")[2]]
        same(after, expected)
        # A silenced unit may do what it likes.
        output = net.output(after)
        for part in net.layer.incoming:
            w = after[part.parameter]
            after[part.parameter] = torch.where(part.mask(mark, w) > 0, w + 3.0, w)
        assert torch.equal(net.output(after), output)
        unlike = dict(after)
        for part in net.layer.incoming:
            w = after[part.parameter]
            unlike[part.parameter] = torch.where(part.mask(1 - mark, w) > 0, w + 3.0, w)
        assert not torch.equal(net.output(unlike), output)


@every_net
def test_bias_transfer_keeps_the_mean_output(build: Any) -> None:
    """Of a reader that hears the unit everywhere alike: these convolutions do not pad, and positions have equal means
    because the inputs are made constant in space."""
    net = build()
    if net.x.dim() == 4:
        net.x = net.x[:, :, :1, :1].expand_as(net.x).contiguous()
    with torch.no_grad():
        mean = scores.mean_activation(net.seen(net.model, net.x))
    before, after = act(net, [1, 3], mean=mean)
    _, without = act(net, [1, 3])
    dims = (0, *range(2, net.output(before).dim()))
    torch.testing.assert_close(net.output(after).mean(dims), net.output(before).mean(dims), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(net.output(without).mean(dims), net.output(before).mean(dims), rtol=1e-3)


def test_rewind_takes_what_was_kept() -> None:
    for build in (mlp, gated, conv_norm):
        net = build()
        before, after = act(net, [1], kind="rewind")
        for part in net.layer.incoming:
            rows = part.index[1]
            assert (after[part.parameter][rows] == 5.0).all()
            kept = torch.ones(len(before[part.parameter]), dtype=torch.bool)
            kept[rows] = False
            assert torch.equal(after[part.parameter][kept], before[part.parameter][kept])


@pytest.mark.parametrize("build", [mlp, gated, conv_norm, part_of_a_layer], ids=lambda build: build.__name__)
def test_orthogonal_rows(build: Any) -> None:
    net = build()
    part = net.layer.incoming[0]
    gone = [0, 2]
    before, after = act(net, gone, kind="orthogonal")
    old, new = (part.gather(w[part.parameter]).double() for w in (before, after))
    stay = [j for j in range(net.layer.size) if j not in gone]
    assert len(stay) < old.shape[1]
    products = new[gone] @ old[stay].T
    torch.testing.assert_close(products, torch.zeros_like(products), rtol=0, atol=1e-5)
    length = old[stay].norm(dim=1).mean()
    torch.testing.assert_close(new[gone].norm(dim=1), length.expand(2), rtol=1e-5, atol=0)
    assert torch.equal(new[stay], old[stay])
    bias = net.layer.incoming[1]
    source = net.units.initial[bias.parameter]
    fresh = source.draw(context(net, {}).noise, bias.parameter, elements(after[bias.parameter]))
    assert torch.equal(after[bias.parameter][bias.index[gone]], fresh[bias.index[gone]])


def test_orthogonal_where_the_rows_span_everything_is_a_random_direction() -> None:
    net = mlp()  # 6 rows of 5 numbers
    w = net.start()[0]["0.weight"].double()
    noise = context(net, {}).noise.normal("0.weight", elements(w)).double()
    _, after = act(net, [4], kind="orthogonal")
    expected = noise[4] / noise[4].norm() * w[[0, 1, 2, 3, 5]].norm(dim=1).mean()
    torch.testing.assert_close(after["0.weight"][4].double(), expected, rtol=1e-5, atol=0)
    _, after = act(net, list(range(6)), kind="orthogonal")  # none is left to be orthogonal to
    expected = noise / noise.norm(dim=1, keepdim=True) * w.norm(dim=1).mean()
    torch.testing.assert_close(after["0.weight"].double(), expected, rtol=1e-5, atol=0)


def test_orthogonal_does_not_stop_at_a_lane_that_has_diverged() -> None:
    net = mlp()
    with torch.no_grad():
        net.model[0].weight[1] = torch.nan
    _, after = act(net, [0], kind="orthogonal")
    assert torch.isnan(after["0.weight"][1]).all()


@pytest.mark.parametrize("gone", [[1], [1, 2, 0]])
@pytest.mark.parametrize(
    "build", [net for net in NETS if net is not grouped], ids=lambda build: build.__name__
)  # fmt: skip
def test_split_preserves_what_the_network_computes(build: Any, gone: list[int]) -> None:
    """Unit 3, say, is the most useful: it and its copies together do what it did."""
    net = build()
    useful = torch.zeros(net.layer.size)
    useful[3], useful[1] = 2.0, 9.0  # one that goes does not count
    before, after = act(net, gone, kind="split", useful=useful)
    silenced = dict(before)
    mark = torch.zeros(net.layer.size)
    mark[gone] = 1
    for part in net.layer.outgoing:
        w = silenced[part.parameter]
        silenced[part.parameter] = torch.where(part.mask(mark, w) > 0, torch.zeros(()), w)
    torch.testing.assert_close(net.output(after), net.output(silenced), rtol=1e-5, atol=1e-5)
    for part in (*net.layer.incoming, *net.layer.norms):
        old, new = part.gather(before[part.parameter]), part.gather(after[part.parameter])
        assert torch.equal(new[gone], old[[3] * len(gone)])
        assert torch.equal(new[3:], old[3:])
    for part in net.layer.outgoing:
        old, new = part.gather(before[part.parameter]), part.gather(after[part.parameter])
        for unit in (3, *gone):
            torch.testing.assert_close(new[unit], old[3] / (1 + len(gone)))


def test_split_without_a_unit_left_is_resample() -> None:
    net = conv_norm()
    _, split = act(net, [0, 1, 2, 3], kind="split")
    _, fresh = act(net, [0, 1, 2, 3])
    same(split, fresh)


def test_a_norm_of_its_own_start_goes_back_to_it() -> None:
    net = conv_norm()
    net.units.initial["1.weight"] = Distribution("constant", 0.25)  # type: ignore[index]
    _, after = act(net, [2])
    assert after["1.weight"][2] == 0.25


def test_an_orthogonal_column_is_taken_from_whole_rows() -> None:
    """Where a unit is a column of a weight that was drawn row by row."""
    net = embedded()
    net.units.initial["table.weight"] = Distribution("orthogonal", 1.0, 1.0)  # type: ignore[index]
    for few in (False, True):
        _, pure = act(net, [2], few=few)
        _, live = act(net, [2], few=few, in_place=True)
        same(live, pure)
    whole = net.units.initial["table.weight"].draw(
        context(net, {}).noise, "table.weight", elements(net.start()[0]["table.weight"])
    )
    assert torch.equal(pure["table.weight"][:, 2], whole[:, 2])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [ContinualBackprop, ReDo, ReGraMa, SelfNormalizedResets])
def test_checks_the_network_first(method: Any) -> None:
    net = mlp()
    params, _ = net.start()
    with pytest.raises(ValueError, match=f"{method.name} found no hidden units"):
        method().init(params, UnitMap(()))
    unknown = UnitMap(net.units.layers)
    for kind in ("resample", "split"):
        with pytest.raises(ValueError, match=rf"{method.name} cannot redraw 0\.weight.*rewind"):
            method(reinitialise=kind).init(params, unknown)
    with pytest.raises(ValueError, match=rf"{method.name} cannot redraw 0\.bias"):
        method(reinitialise="orthogonal").init(params, unknown)
    method(reinitialise="rewind").init(params, unknown)
    without = {name: w for name, w in params.items() if name != "2.bias"}
    with pytest.raises(ValueError, match=r"bias beside 2\.weight"):
        method(bias_transfer=True).init(without, net.units)
    odd = params | {"2.bias": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"2\.bias of shape \(2, 2\).*4 outputs"):
        method(bias_transfer=True).init(odd, net.units)


def test_refuses_to_split_what_groups_read_and_a_norm_of_unknown_start() -> None:
    net = grouped()
    with pytest.raises(ValueError, match=r'"split" cannot split the units of 0: 2\.weight'):
        ReDo(reinitialise="split").init(net.start()[0], net.units)
    net = conv_norm()
    layer = net.layer
    odd = UnitLayer(
        layer.name, layer.size, layer.kind, layer.incoming, (_slice("1.gamma", 0, 4),), layer.outgoing, layer.tap
    )
    with pytest.raises(ValueError, match=r"1\.gamma starts from is not known"):
        ReDo().init(net.start()[0], UnitMap((odd,), initial=net.units.initial))


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [(), (3,), (2, 3)], ids=["flat", "line", "image"])
def test_scores_by_plain_loops(positions: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    h, g = rng.standard_normal((2, 4, 5, *positions))
    mean, out, other, into = (rng.standard_normal(shape) for shape in ((5,), (5, 3), (5, 2), (5, 6)))
    th, tg, tmean, tout, tother, tinto = map(torch.tensor, (h, g, mean, out, other, into))
    expected: dict[str, list[float]] = {}
    for j in range(5):
        size = abs(h[:, j]).mean()
        sends = abs(out[j]).sum() + abs(other[j]).sum()
        each = [(h[n, j] * g[n, j]).sum() for n in range(4)]
        for name, value in {
            "mean": h[:, j].mean(), "activation": size, "outgoing": sends, "incoming": abs(into[j]).sum(),
            "contribution": size * sends, "corrected": abs(h[:, j] - mean[j]).mean() * sends,
            "adaptation": 1 / abs(into[j]).mean(), "both": 1 / np.abs(np.r_[into[j], out[j]]).mean(),
            "taylor": sum(abs(v) for v in each), "fisher": 4 / 2 * sum(v**2 for v in each),
        }.items():  # fmt: skip
            expected.setdefault(name, []).append(value)
    found = {
        "mean": scores.mean_activation(th), "activation": scores.activation_magnitude(th),
        "outgoing": scores.outgoing_magnitude(tout, tother), "incoming": scores.incoming_magnitude(tinto),
        "contribution": scores.contribution(th, tout, tother),
        "corrected": scores.mean_corrected_contribution(th, tmean, tout, tother),
        "adaptation": scores.adaptation(tinto), "both": scores.adaptation(tinto, tout),
        "taylor": scores.taylor(th, tg), "fisher": scores.fisher(th, tg),
    }  # fmt: skip
    for name, value in found.items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-12, err_msg=name)


def test_fisher_and_taylor_are_the_losss_own_expansion() -> None:
    """For a loss that is quadratic in what the unit sends, with the gradient at its minimum's slope, Taylor is exact to
    first order in the unit."""
    h = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(6, 3, dtype=torch.float64)
    loss = (h * slope).sum(1).mean()
    (signal,) = torch.autograd.grad(loss, h)
    each = (h * slope).abs().mean(0)
    torch.testing.assert_close(scores.taylor(h, signal), each)
    torch.testing.assert_close(scores.fisher(h, signal), (h * slope).square().mean(0) / 2)


def test_activation_magnitude_stays_in_range_in_half_precision() -> None:
    h = torch.full((4, 2, 64, 64), 60.0, dtype=torch.float16)
    torch.testing.assert_close(scores.activation_magnitude(h).float(), torch.full((2,), 60.0))
    signed = torch.randn(3, 4, 5, 5)
    for x in (signed, signed.relu()):
        torch.testing.assert_close(scores.activation_magnitude(x, look=True), x.abs().mean((0, 2, 3)))


def test_normalised() -> None:
    assert scores.normalised(torch.tensor([1.0, 3.0])).tolist() == [0.5, 1.5]
    assert scores.normalised(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert torch.isnan(scores.normalised(torch.tensor([1.0, torch.nan]))).all()


# --- methods on a live model ------------------------------------------------------------------------------------------


def _both(method: Any, build: Any, steps: int, event_every: int = 0) -> int:
    """Run a method as pure functions and in place, on the same activations; how many units were replaced."""
    net = build()
    (method,) = type(method).settled([method], net.units)
    modes = {}
    for in_place in (False, True):
        params, buffers = net.start()
        modes[in_place] = [params, buffers, method.init(params, net.units)]
    rng = torch.Generator().manual_seed(0)
    shape = net.seen(net.model, net.x).shape
    total = 0
    live = {name: w for part in modes[True][:2] for name, w in part.items()}
    for step in range(steps):
        h = torch.relu(torch.randn(shape, generator=rng))
        h[:, 1] *= 1e-3
        h[:, 2] *= step % 9 < 3
        g = h * torch.randn(shape, generator=rng)
        learnt = {
            name: torch.randn(w.shape, generator=rng) * 0.1 for part in modes[False][:2] for name, w in part.items()
        }
        for in_place, parts in modes.items():
            params, buffers, state = parts
            for name, w in (params | buffers).items():
                w.add_(learnt[name])
            given = context(
                net, buffers, in_place=in_place, step=step, activations={net.layer.name: h},
                signals={net.layer.name: g},
                loss=lambda changed, p=params, b=buffers: net.output({**p, **b, **changed}).square().mean(),
            )  # fmt: skip
            changed, state = method.step(params, state, given)
            fresh = method.replaced(state)
            if event_every and (step + 1) % event_every == 0:
                params = params | {k: w for k, w in changed.items() if k in params}
                outcome = method.event(params, state, given)
                changed, state, fresh = {**changed, **outcome.changed}, outcome.state, outcome.replaced
                marks = outcome.touched[net.layer.incoming[0].parameter]
                assert torch.equal(marks[0].sum() > 0, fresh[net.layer.name].any())
            assert not (in_place and changed)
            parts[0] = {name: changed.get(name, w) for name, w in params.items()}
            parts[1] = {name: changed.get(name, w) for name, w in buffers.items()}
            parts[2] = state
        total += int(sum(mask.sum() for mask in fresh.values()))
        same(modes[True], modes[False])
    for name, w in live.items():
        now = modes[True][0][name] if name in modes[True][0] else modes[True][1][name]
        assert now is w, "a live tensor was exchanged"
    return total


UTILITIES = (
    "contribution", "mean_corrected_contribution", "adaptable_contribution", "outgoing_magnitude",
    "incoming_magnitude", "activation", "taylor", "fisher", "random",
)  # fmt: skip


@pytest.mark.parametrize(("build", "host"), [
    pytest.param(build, host, id=f"{build.__name__}-{'host' if host else 'device'}", marks=marks)
    for build in (mlp, conv_norm, conv_flat, grouped)
    for host, marks in ((True, ()), (False, () if build is conv_norm else pytest.mark.slow))
])  # fmt: skip
def test_continual_backprop_in_place_is_continual_backprop(
    build: Any, host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not host:
        monkeypatch.setattr(replace_module, "on_host", lambda tensor: False)
        monkeypatch.setattr("perennial.methods.continual_backprop.on_host", lambda tensor: False)
    for number, utility in enumerate(UTILITIES):
        kind = KINDS[number % (3 if build is grouped else 4)]
        method = ContinualBackprop(
            0.2, 2, 0.8, utility, reinitialise=kind, bias_transfer=number % 2 == 0, accumulate=number % 3 > 0,
            rewind_to=3 if kind == "rewind" else 0,
        )  # fmt: skip
        assert _both(method, build, 12) > 3
    assert _both(ContinualBackprop(0.9, 2, per_step=3), build, 12) > 3


@pytest.mark.parametrize("build", [mlp, conv_norm, conv_flat, grouped], ids=lambda build: build.__name__)
def test_mask_methods_in_place_are_the_same(build: Any) -> None:
    for kind in KINDS[: 3 if build is grouped else 4]:
        for method in (
            ReDo(0.1, reinitialise=kind, score_decay=0.5, bias_transfer=True),
            ReGraMa(0.1, reinitialise=kind),
        ):
            assert _both(method, build, 9, event_every=3) >= 3
        if build is mlp:
            snr = SelfNormalizedResets(0.3, 20, 2, reinitialise=kind, bias_transfer=True)
            assert _both(snr, build, 40) > 0


def test_in_place_without_a_unit_due_makes_no_tensor_of_a_weights_size() -> None:
    """The step of a large layer must cost little more than the score."""
    from torch.utils._python_dispatch import TorchDispatchMode

    net = mlp()
    params, _ = net.start()
    method = ContinualBackprop(1e-4, 100, utility="activation", per_step=1)
    state = method.init(params, net.units)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dim() == 2:
                made.append((func, out.shape))
            return out

    given = context(net, {}, in_place=True, activations={"0": torch.rand(2, 6)})
    with Watch():
        changed, _ = method.step(params, state, given)
    assert not changed
    assert [shape for _, shape in made] == [torch.Size([2, 6])]  # |h|


@pytest.mark.parametrize(("method", "needs"), [
    (ContinualBackprop(), {"activations"}),
    (ContinualBackprop(utility="outgoing_magnitude"), set()),
    (ContinualBackprop(utility="incoming_magnitude"), set()),
    (ContinualBackprop(utility="random"), set()),
    (ContinualBackprop(utility="random", bias_transfer=True), {"activations"}),
    (ContinualBackprop(utility="exact"), {"loss"}),
    (ContinualBackprop(utility="taylor"), {"activations", "signals"}),
    (ContinualBackprop(utility="fisher"), {"activations", "signals"}),
    (ReDo(), {"activations"}), (ReDo(every=0), set()),
    (ReGraMa(), {"signals"}), (ReGraMa(bias_transfer=True), {"activations", "signals"}), (ReGraMa(every=0), set()),
    (SelfNormalizedResets(), {"activations"}), (SelfNormalizedResets(max_age=0), set()),
])  # fmt: skip
def test_needs(method: Any, needs: set[str]) -> None:
    """Nothing is read that was not asked for."""
    assert method.needs == needs
    net = mlp()
    params, _ = net.start()
    (method,) = type(method).settled([method], net.units)
    given: dict[str, Any] = {}
    h = net.seen(net.model, net.x).detach()
    if "activations" in needs:
        given["activations"] = {"0": h}
    if "signals" in needs:
        given["signals"] = {"0": h}
    if "loss" in needs:
        given["loss"] = lambda changed: net.output({**params, **changed}).square().mean()
    method.step(params, method.init(params, net.units), context(net, {}, **given))


# --- each method's own rule -------------------------------------------------------------------------------------------


def test_exact_is_the_loss_without_the_unit() -> None:
    net = mlp()
    params, _ = net.start()
    method = ContinualBackprop(0.0, 0, 0.0, utility="exact", per_step=1)
    for in_place in (False, True):
        given = context(
            net, {}, in_place=in_place, loss=lambda changed: net.output({**params, **changed}).square().mean()
        )
        _, state = method.step(params, method.init(params, net.units), given)
        for unit in range(6):
            without = params["2.weight"].clone()
            without[:, unit] = 0
            loss = net.output(params).square().mean()
            expected = net.output(params | {"2.weight": without}).square().mean() - loss
            torch.testing.assert_close(state.utility["0"][unit], expected, rtol=1e-4, atol=1e-6)


def _stepped(method: Any, hidden: list[list[float]], steps: Any = None) -> Any:
    """An MLP's units under given activations, one sample a step; after each step the units replaced."""
    net = mlp()
    params, _ = net.start()
    state = method.init(params, net.units)
    found = []
    for step, row in enumerate(hidden):
        h = torch.tensor([row])
        given = context(net, {}, step=step, activations={"0": h}, signals={"0": h})
        changed, state = method.step(params, state, given)
        fresh = method.replaced(state)
        if method.due(step + 1, False):
            outcome = method.event(params, state, given)
            state, fresh, changed = outcome.state, outcome.replaced, outcome.changed
            if fresh["0"].any():
                assert set(changed) == {"0.weight", "0.bias", "2.weight"}
        found.append(fresh["0"].nonzero()[:, 0].tolist() if fresh else [])
    return found, state


@pytest.mark.parametrize("method", [ReDo, ReGraMa])
def test_dormant_units_are_replaced_and_no_others(method: Any) -> None:
    row = [1.0, 0.0, -1.0, 0.02, 2.0, 0.0]
    assert _stepped(method(0.03, 2), [row] * 4)[0] == [[], [1, 3, 5], [], [1, 3, 5]]
    assert _stepped(method(0.0, 1), [row])[0] == [[1, 5]]
    assert _stepped(method(0.03, 1), [[0.0] * 6])[0] == [[0, 1, 2, 3, 4, 5]]
    assert _stepped(method(0.03, 0), [[0.0] * 6] * 2)[0] == [[], []]


def test_a_dormant_units_score_is_an_average_since_birth() -> None:
    loud, quiet = [1.0] * 6, [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    average = ReDo(0.17, 3, 0.5)  # after 1, 0, 0 unit 5 has (1/8) / (7/8) = 1/7 beside ones: 1/6 of the mean
    assert _stepped(average, [loud, quiet, quiet])[0][-1] == [5]
    assert _stepped(ReDo(0.16, 3, 0.5), [loud, quiet, quiet])[0][-1] == []
    _, state = _stepped(average, [loud, quiet, quiet, loud])
    assert int(state.age["0"][5]) == 1
    assert int(state.age["0"][0]) == 4
    assert float(state.score["0"][5]) == 0.5


def test_snr_edges() -> None:
    assert SelfNormalizedResets(max_age=20).edges() == (1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 15, 18, 20)
    assert SelfNormalizedResets(max_age=18).edges()[-2:] == (15, 18)
    assert SelfNormalizedResets(max_age=1).edges() == (1,)
    assert SelfNormalizedResets(max_age=0).edges() == ()
    edges = SelfNormalizedResets().edges()
    assert len(edges) < 60
    assert edges[-1] == 20000
    assert all(later <= math.ceil(1.25 * edge) + 1 for edge, later in itertools.pairwise(edges))


@pytest.mark.parametrize(("quantile", "max_age", "minimum"), [(0.5, 12, 3), (0.9, 30, 1), (0.75, 7, 4)])
def test_snr_by_plain_lists(quantile: float, max_age: int, minimum: int) -> None:
    rng = np.random.default_rng(0)
    rates = np.array([0.9, 0.5, 0.3, 0.1, 0.05, 0.0])
    rows = [[float(fires) if fires else -1.0 for fires in rng.random(6) < rates] for _ in range(300)]
    edges = SelfNormalizedResets(max_age=max_age).edges()
    ages, gaps = [0] * 6, [[] for _ in range(6)]
    expected = []
    for row in rows:
        gone = []
        for j in range(6):
            if row[j] > 0:
                gaps[j].append(ages[j])
                ages[j] = 0
            else:
                ages[j] += 1
            limit = max_age
            if len(gaps[j]) >= minimum:
                limit = min(e for e in edges if sum(g <= e for g in gaps[j]) >= quantile * len(gaps[j]))
            if ages[j] > limit:
                gone.append(j)
                ages[j], gaps[j] = 0, []
        expected.append(gone)
    found, _ = _stepped(SelfNormalizedResets(quantile, max_age, minimum), rows)
    assert found == expected
    assert sum(map(len, expected)) > 15


def test_snr_in_float32_reaches_a_share_that_float32_rounds_up() -> None:
    gaps = torch.tensor([[49, 49, 50]], dtype=torch.int32)
    edge = torch.tensor([1, 2, 3], dtype=torch.int32)
    for quantile in (0.98, torch.tensor(0.98), torch.tensor(0.98, dtype=torch.float64)):
        method = SelfNormalizedResets(quantile, 3)
        assert method._threshold(gaps, edge).tolist() == [1]
    assert SelfNormalizedResets(0.981, 3)._threshold(gaps, edge).tolist() == [3]


def test_snr_fires_at_any_sample_and_position() -> None:
    net = conv_norm()
    params, buffers = net.start()
    method = SelfNormalizedResets(max_age=2)
    state = method.init(params, net.units)
    h = torch.full((3, 4, 5, 5), -1.0)
    h[2, 1, 4, 0] = 0.5
    for step in range(3):
        _, state = method.step(params, state, context(net, buffers, step=step, activations={"0": h}))
    assert state.replaced["0"].tolist() == [True, False, True, True]


def test_rewind_goes_back_to_the_step_it_names() -> None:
    net = mlp()
    for in_place in (False, True):
        params, _ = net.start()
        start = params["0.weight"].clone()
        method = ReDo(reinitialise="rewind", rewind_to=2)
        state = method.init(params, net.units)
        for step in range(4):
            with torch.no_grad():
                for w in params.values():
                    w.add_(1.0)
            given = context(net, {}, step=step, in_place=in_place, activations={"0": torch.ones(1, 6)})
            _, state = method.step(params, state, given)
            torch.testing.assert_close(state.kept["0.weight"], start + (2.0 if step >= 1 else 0.0))


def test_scores_are_agreed_upon_between_processes() -> None:
    """What is computed from this process's samples goes through ``reduce``; the other's samples decide here too."""
    net = mlp()
    params, _ = net.start()
    here, there = torch.rand(4, 6) + 0.1, torch.rand(4, 6) + 0.1
    for utility in ("contribution", "activation", "taylor", "fisher"):
        method = ContinualBackprop(0.0, 0, 0.0, utility=utility, per_step=1)
        states = []
        for h, other in ((here, there), (there, here)):
            ready = context(net, {}, activations={"0": other}, signals={"0": other})
            theirs: list[Tensor] = []
            method.step(
                params, method.init(params, net.units), ready._replace(reduce=lambda t, s=theirs: s.append(t) or t)
            )
            mine = ready._replace(activations={"0": h}, signals={"0": h}, reduce=lambda t, s=theirs: (t + s.pop(0)) / 2)
            states.append(method.step(params, method.init(params, net.units), mine)[1])
        same(states[0].utility, states[1].utility)


# --- in populations ---------------------------------------------------------------------------------------------------


def test_positional_settings_of_continual_backprop() -> None:
    method = ContinualBackprop(0.1, 5, 0.9, "taylor", True)
    assert (method.replacement_rate, method.maturity_threshold, method.utility_decay) == (0.1, 5, 0.9)
    assert (method.utility, method.bias_correction, method.bias_transfer) == ("taylor", True, False)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "split" else pytest.mark.slow) for k in KINDS])
def test_a_lane_alone_is_the_lane_among_others(kind: str) -> None:
    made = (
        ContinualBackprop(0.1, 3, reinitialise=kind, bias_transfer=True),
        SelfNormalizedResets(0.5, 8, 2, reinitialise=kind),
    )  # fmt: skip
    lanes = [Lane(seed, Adam(lr=0.01), made) for seed in (1, 2)]
    together = populate(lanes, Table(batch=2))
    together.advance(25)
    assert (together.state.replaced > 5).all()
    for number, one in enumerate(lanes):
        alone = populate([one], Table(batch=2))
        alone.advance(25)
        same(lane(alone, 0), lane(together, number), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.compiles
def test_compiled_is_uncompiled() -> None:
    """The ways to re-initialise that compute more than a draw."""
    made = (
        ContinualBackprop(0.1, 3, reinitialise="orthogonal", bias_transfer=True),
        SelfNormalizedResets(0.5, 8, 2, reinitialise="split"),
    )
    states = []
    for compiled in (True, False):
        population = populate(
            [Lane(seed, SGD(lr=0.02), made) for seed in (0, 1)], Table(batch=2), hidden=(3,), compiled=compiled
        )
        population.advance(25)
        states.append(population.state)
    assert (states[0].replaced > 3).all()
    same(states[0], states[1], rtol=2e-4)
