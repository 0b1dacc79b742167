"""The dominant winning ticket: the proximal step, selection, controls, and what training leaves."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from perennial.tickets import (
    Changed,
    ProximalL1,
    SparseDelta,
    bias_names,
    enforce,
    l1_distance,
    lora_rank_for,
    magnitude_like,
    random_dimensions_like,
    random_like,
    remaining,
    select_ticket,
)

Make = Callable[[Any], Optimizer]


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def trained(model: nn.Module, optimizer: Optimizer, steps: int = 5) -> None:
    rng = torch.Generator().manual_seed(7)
    like = next(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=rng).to(like)).square().sum().backward()
        optimizer.step()


# --- the proximal step ------------------------------------------------------------------------------------------------


def adam(decay: float, amsgrad: bool) -> Callable[..., Any]:
    def step(w: list[float], g: list[float], lr: float, t: int, state: dict[str, list[float]]) -> list[float]:
        n, backs = len(w), []
        m, v, top = (state.setdefault(k, [0.0] * n) for k in ("m", "v", "top"))
        for i in range(n):
            m[i] = 0.8 * m[i] + 0.2 * g[i]
            v[i] = 0.95 * v[i] + 0.05 * g[i] ** 2
            top[i] = max(top[i], v[i])
            scale = math.sqrt((top[i] if amsgrad else v[i]) / (1 - 0.95**t)) + 1e-3
            w[i] = w[i] * (1 - lr * decay) - lr * m[i] / (1 - 0.8**t) / scale
            backs.append(lr / scale)
        return backs

    return step


def sgd(w: list[float], g: list[float], lr: float, t: int, state: dict[str, list[float]]) -> list[float]:
    m = state.setdefault("m", [0.0] * len(w))
    for i in range(len(w)):
        m[i] = 0.9 * m[i] + g[i]
        w[i] -= lr * m[i]
    return [lr] * len(w)


def rmsprop(centered: bool) -> Callable[..., Any]:
    def step(w: list[float], g: list[float], lr: float, t: int, state: dict[str, list[float]]) -> list[float]:
        n, backs = len(w), []
        v, m = (state.setdefault(k, [0.0] * n) for k in ("v", "m"))
        for i in range(n):
            v[i] = 0.9 * v[i] + 0.1 * g[i] ** 2
            m[i] = 0.9 * m[i] + 0.1 * g[i]
            scale = math.sqrt(v[i] - centered * m[i] ** 2) + 1e-3
            w[i] -= lr * g[i] / scale
            backs.append(lr / scale)
        return backs

    return step


def adagrad(w: list[float], g: list[float], lr: float, t: int, state: dict[str, list[float]]) -> list[float]:
    v, backs = state.setdefault("v", [0.0] * len(w)), []
    for i in range(len(w)):
        v[i] += g[i] ** 2
        backs.append(lr / (1 + (t - 1) * 0.1) / (math.sqrt(v[i]) + 1e-3))
        w[i] -= backs[i] * g[i]
    return backs


ADAM: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}
OWN: dict[str, tuple[Make, Callable[..., Any]]] = {
    "Adam": (lambda p: Adam(p, **ADAM), adam(0.0, False)),
    "Adam, amsgrad": (lambda p: Adam(p, **ADAM, amsgrad=True), adam(0.0, True)),
    "Adam, tensor lr": (lambda p: Adam(p, **{**ADAM, "lr": torch.tensor(0.1, dtype=torch.float64)}), adam(0.0, False)),
    "AdamW": (lambda p: AdamW(p, **ADAM, weight_decay=0.3), adam(0.3, False)),
    "AdamW, fused": (lambda p: AdamW(p, **ADAM, weight_decay=0.3, fused=True), adam(0.3, False)),
    "SGD, momentum": (lambda p: SGD(p, lr=0.1, momentum=0.9), sgd),
    "RMSprop": (lambda p: RMSprop(p, lr=0.1, alpha=0.9, eps=1e-3), rmsprop(False)),
    "RMSprop, centered": (lambda p: RMSprop(p, lr=0.1, alpha=0.9, eps=1e-3, centered=True), rmsprop(True)),
    "Adagrad": (lambda p: Adagrad(p, lr=0.1, lr_decay=0.1, eps=1e-3), adagrad),
}


@pytest.mark.parametrize("metric", ["own", "bounded"])
@pytest.mark.parametrize("start", ["now", "given", "zero"])
@pytest.mark.parametrize("kind", OWN)
def test_prox_is_the_exact_step_in_the_optimizers_metric(kind: str, start: str, metric: str) -> None:
    make, reference = OWN[kind]
    torch.manual_seed(1)
    p = nn.Parameter(torch.randn(40).double())
    others = torch.randn(40).double()
    origin = {"now": p.detach().clone(), "given": others, "zero": torch.zeros(40).double()}[start]
    optimizer = make([p])
    starts = {"now": None, "given": {"w": others}, "zero": 0.0}
    prox = ProximalL1(optimizer, {"w": p}, 0.4, starts[start], metric=metric)  # type: ignore[arg-type]
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    w, state, lr, zeros = p.tolist(), {}, 0.1, 0
    for t in range(1, 13):
        p.grad = torch.randn(40).double() * torch.logspace(-3, 1, 40).double()
        backs = reference(w, p.grad.tolist(), lr, t, state)
        for i, back in enumerate(backs):
            d = w[i] - float(origin[i])
            pull = min(0.4 * back, lr) if metric == "bounded" else 0.4 * back
            w[i] = float(origin[i]) + math.copysign(max(abs(d) - pull, 0.0), d)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.tensor(w, dtype=torch.float64), rtol=1e-11, atol=1e-12)
        at = torch.tensor(w, dtype=torch.float64) == origin
        assert torch.equal(p.detach() == origin, at)
        zeros += int(at.sum())
        lr *= 0.7
        schedule.step()
    assert zeros > 0
    prox.remove()


def test_a_bounded_pull_leaves_what_has_had_no_gradient_yet() -> None:
    values = torch.linspace(-1, 1, 8)
    for metric, left in (("own", 0.0), ("bounded", 0.99)):
        p = nn.Parameter(values.clone())
        optimizer = Adam([p], lr=0.01)
        ProximalL1(optimizer, {"w": p}, 1e-4, 0.0, metric=metric)
        p.grad = torch.zeros(8)
        optimizer.step()
        assert float(p.detach().max()) == pytest.approx(left)


@pytest.mark.parametrize("make", [lambda p: NAdam(p, lr=0.1), lambda p: Adam(p, lr=0.1)])
def test_plain_pulls_by_lr_times_strength(make: Make) -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 11))
    other = nn.Parameter(p.detach().clone())
    pulled, free = make([p]), make([other])
    ProximalL1(pulled, {"w": p}, 2.0, 0.0, metric="plain")
    p.grad = other.grad = torch.ones(11)
    pulled.step()
    free.step()
    torch.testing.assert_close(p, F.softshrink(other, 0.2))


def regression(pull: str) -> Tensor:
    """The distance from the start after fits in which four of twenty weights must move."""
    torch.manual_seed(0)
    x, start = torch.randn(200, 20), torch.randn(20)
    target = x @ (start + torch.cat((torch.full((4,), 2.0), torch.zeros(16)))) + 0.1 * torch.randn(200)
    w = nn.Parameter(start.clone())
    optimizer = Adam([w], lr=0.02)
    if pull == "prox":
        ProximalL1(optimizer, {"w": w}, 0.2)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (x @ w - target).square().mean()
        (loss + 0.2 * l1_distance({"w": w}, {"w": start}) if pull == "subgradient" else loss).backward()
        optimizer.step()
    return w.detach() - start


def test_prox_finds_the_weights_that_move_and_a_subgradient_no_zeros() -> None:
    prox, subgradient = regression("prox"), regression("subgradient")
    assert torch.equal(prox != 0, torch.arange(20) < 4)
    assert int((subgradient == 0).sum()) == 0
    # Both are at the minimum of the same sum of loss and penalty: the metric does not change where it is.
    torch.testing.assert_close(prox, subgradient, rtol=0, atol=0.02)
    assert torch.equal(select_ticket({"w": prox}, threshold=0)["w"], torch.arange(20) < 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda p: Adam(p, lr=0.5), lambda p: SGD(p, lr=0.5)])
def test_low_precision_is_pulled_in_float32(make: Make, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start = torch.randn(300)
    p = nn.Parameter(start.to(dtype))
    optimizer = make([p])
    seen: dict[str, Tensor] = {}
    optimizer.register_step_post_hook(lambda o, *_: seen.update(p=p.detach().clone(), **o.state[p]))
    ProximalL1(optimizer, {"w": p}, 0.3, {"w": start})
    arrived = 0
    for t in range(1, 6):
        p.grad = torch.randn(300).to(dtype)
        optimizer.step()
        scale = (seen["exp_avg_sq"].double() / (1 - 0.999**t)).sqrt() + 1e-8 if "exp_avg_sq" in seen else 1.0
        at, origin, back = seen["p"].double(), start.to(dtype).double(), 0.5 * 0.3 / scale
        exact = torch.where((at - origin).abs() <= back, origin, at - back * (at - origin).sign())
        assert torch.equal(p.detach(), exact.to(dtype))
        arrived += int((p.detach() == start.to(dtype)).sum())
    assert 0 < arrived < 1500


@pytest.mark.parametrize("off", ["strength 0", "removed", "left"])
def test_off_is_bit_identical(off: str) -> None:
    model, free = net(), net()
    optimizer = AdamW(model.parameters(), lr=0.01)
    strength, metric = 0.0 if off == "strength 0" else 1e3, "plain" if off == "left" else "own"
    prox = ProximalL1(optimizer, dict(model.named_parameters()), strength, 0.0, metric=metric)
    if off == "removed":
        prox.remove()
    elif off == "left":
        with prox:
            optimizer.step()  # there are no gradients yet, so that nothing is pulled
    trained(model, optimizer)
    trained(free, AdamW(free.parameters(), lr=0.01))
    for p, q in zip(model.parameters(), free.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("metric", ["own", "plain"])
def test_steps_that_a_scaler_skips_pull_nothing(fused: bool, metric: str) -> None:
    model = net()
    optimizer = Adam(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    ProximalL1(optimizer, dict(model.named_parameters()), 1e3, 0.0, metric=metric)
    before = named(model)
    for inputs, moves in ((torch.full((2, 6), math.inf), False), (torch.ones(2, 6), True)):
        optimizer.zero_grad()
        scaler.scale(model(inputs).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        for name, p in model.named_parameters():
            assert torch.equal(p, torch.zeros_like(p) if moves else before[name]), name


def test_wrapped_optimizer_and_several_groups() -> None:
    class Wrapper(Optimizer):  # as accelerate's
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> None:
            self.optimizer.step(closure)

    a, b, c = (nn.Parameter(torch.full((3,), 2.0)) for _ in range(3))
    inner = SGD([{"params": [a], "lr": 0.1}, {"params": [b, c], "lr": 0.5}])
    ProximalL1(Wrapper(inner), {"a": a, "b": b}, 1.0, 0.0)
    a.grad, b.grad, c.grad = (torch.zeros(3) for _ in range(3))
    Wrapper(inner).step()
    for p, value in ((a, 1.9), (b, 1.5), (c, 2.0)):
        torch.testing.assert_close(p.detach(), torch.full((3,), value))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"make": NAdam}, 'NAdam steps in is not known.*metric="plain"'),
        ({"metric": "adam"}, "metric is 'adam'; it is 'own'"),
        ({"strength": -1.0}, "strength is -1.0"),
        ({"strength": math.nan}, "strength is nan"),
        ({"start": {}}, "w is missing in the start"),
        ({"start": {"w": torch.zeros(3)}}, r"w is \[3\] in the start, but \[2\] here"),
        ({"params": {"v": nn.Parameter(torch.zeros(2))}}, "does not hold v; give the parameters it trains"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "w is torch.complex64"),
    ],
)
def test_prox_refuses_in_words(change: dict[str, Any], words: str) -> None:
    w = nn.Parameter(change.get("w", torch.zeros(2)))
    optimizer = change.get("make", Adam)([w])
    with pytest.raises(ValueError, match=words):
        ProximalL1(
            optimizer,
            change.get("params", {"w": w}),
            change.get("strength", 1.0),
            change.get("start"),
            metric=change.get("metric", "own"),
        )


def test_l1_distance_and_its_gradient() -> None:
    params = {"a": torch.tensor([1.0, -2.0, 3.0]), "b": torch.full((1000,), 1.0, dtype=torch.bfloat16)}
    for p in params.values():
        p.requires_grad_()
    distance = l1_distance(params, {"a": torch.tensor([1.0, 0.0, 0.0]), "b": torch.full((1000,), 0.5)})
    distance.backward()
    assert distance.item() == 505.0  # which bfloat16 does not hold
    assert params["a"].grad is not None
    assert params["a"].grad.tolist() == [0.0, -1.0, 1.0]
    assert l1_distance({"a": params["a"]}, 1.0).item() == 5.0
    with pytest.raises(ValueError, match="no parameters"):
        l1_distance({}, 0.0)


# --- selection and controls -------------------------------------------------------------------------------------------


def distances() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {"a": torch.randn(7, 4), "b": 3 * torch.randn(5, 6), "c": torch.randn(9)}


@pytest.mark.parametrize("share", [0.013, 0.1, 0.37, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_share_keeps_exactly_the_largest(share: float, dtype: torch.dtype) -> None:
    d = {name: t.to(dtype) for name, t in distances().items()}
    every = torch.cat([t.flatten() for t in d.values()]).abs()
    kept = torch.cat([m.flatten() for m in select_ticket(d, share=share).values()])
    assert int(kept.sum()) == round(share * 67)
    assert kept.all() or every[kept].min() >= every[~kept].max()
    if share >= 0.1:
        for name, mask in select_ticket(d, share=share, scope="matrix").items():
            assert mask.shape == d[name].shape
            assert int(mask.sum()) == round(share * mask.numel())
            assert mask.all() or d[name].abs()[mask].min() >= d[name].abs()[~mask].max()


def test_ties_go_to_the_first_and_the_count_is_exact() -> None:
    d = {"a": torch.tensor([[1.0, -2.0, 0.0], [0.0, 2.0, -2.0]]), "b": torch.tensor([2.0, 2.0, 0.0, 5.0])}
    found = select_ticket(d, share=0.4)
    assert found["a"].int().tolist() == [[0, 1, 0], [0, 1, 1]]
    assert found["b"].int().tolist() == [0, 0, 0, 1]
    filled = select_ticket(d, share=0.8)  # seven have moved, eight are asked for
    assert filled["a"].int().tolist() == [[1, 1, 1], [0, 1, 1]]
    assert filled["b"].int().tolist() == [1, 1, 0, 1]
    assert {n: int(m.sum()) for n, m in select_ticket(d, threshold=0).items()} == {"a": 4, "b": 3}
    assert {n: int(m.sum()) for n, m in select_ticket(d, threshold=2.0).items()} == {"a": 0, "b": 1}
    tied = select_ticket({"a": torch.ones(5, 3)}, dimensions=2)
    assert tied["a"].int().tolist() == [[1] * 3] * 2 + [[0] * 3] * 3


@pytest.mark.parametrize(("dims", "dim"), [("rows", 1), ("columns", 0)])
def test_dominant_dimensions_and_their_controls(dims: str, dim: int) -> None:
    d = {name: t for name, t in distances().items() if t.dim() == 2}
    ticket = select_ticket(d, dimensions=2, dims=dims)
    drawn = random_dimensions_like(ticket, 4, dims)
    for name, mask in ticket.items():
        best = d[name].norm(dim=dim).argsort(descending=True)[:2]
        assert torch.equal(mask.all(dim).nonzero()[:, 0], best.sort().values)
        for one in (mask, drawn[name]):
            assert torch.equal(one.all(dim), one.any(dim))
            assert int(one.all(dim).sum()) == 2
    others = [random_dimensions_like(ticket, seed, dims) for seed in range(4)]
    assert any(not torch.equal(a["a"], b["a"]) for a, b in itertools.pairwise(others))
    assert all(torch.equal(m, random_dimensions_like(ticket, 4, dims)[n]) for n, m in drawn.items())
    with pytest.raises(ValueError, match=r"a \[7, 4\] is not made of whole"):
        random_dimensions_like(ticket, 0, "columns" if dims == "rows" else "rows")
    with pytest.raises(ValueError, match=r"c \[9\] is not made of whole"):
        random_dimensions_like({"c": torch.ones(9, dtype=torch.bool)}, 0, dims)


def test_controls_keep_the_count_of_every_matrix() -> None:
    ticket = select_ticket(distances(), share=0.5)
    weights = {name: t.flip(0) for name, t in distances().items()}
    drawn, large = random_like(ticket, 0), magnitude_like(ticket, weights)
    for name, mask in ticket.items():
        assert int(mask.sum()) == int(drawn[name].sum()) == int(large[name].sum())
        assert weights[name].abs()[large[name]].min() >= weights[name].abs()[~large[name]].max()
    assert any(not torch.equal(m, drawn[n]) for n, m in ticket.items())
    assert all(torch.equal(m, random_like(ticket, 0)[n]) for n, m in drawn.items())
    assert any(not torch.equal(m, random_like(ticket, 1)[n]) for n, m in drawn.items())
    with pytest.raises(ValueError, match="b is missing in the weights"):
        magnitude_like(ticket, {"a": weights["a"]})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "exactly one.*given is none"),
        ({"share": 0.1, "threshold": 0.0}, "given is threshold and share"),
        ({"share": 0.0}, "share is 0.0; it is above 0 and at most 1"),
        ({"share": 1.1}, "share is 1.1"),
        ({"share": math.nan}, "share is nan"),
        ({"share": 0.001}, r"share of 0.001 of 67 weights \(global\) is none"),
        ({"share": 0.01, "scope": "matrix"}, r"\(matrix\) is none"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"share": 0.1, "scope": "layer"}, "scope is 'layer'; it is one of global, matrix"),
        ({"dimensions": 1, "dims": "units"}, "dims is 'units'; it is one of rows, columns"),
        ({"dimensions": 1}, r"c is \[9\], which has no rows and columns; leave it out"),
        ({"dimensions": 6, "leave": "c"}, r"dimensions is 6; b \[5, 6\] has 5 rows"),
        ({"dimensions": 5, "dims": "columns", "leave": "c"}, r"dimensions is 5; a \[7, 4\] has 4 columns"),
        ({"dimensions": 0, "leave": "c"}, "dimensions is 0"),
        ({"threshold": 0.0, "leave": "abc"}, "no distances"),
        ({"threshold": 0.0, "bad": math.nan}, "distances of a are not finite"),
    ],
)
def test_selection_refuses_in_words(given: dict[str, Any], words: str) -> None:
    given = dict(given)
    leave, bad = given.pop("leave", ""), given.pop("bad", 0.0)
    d = {name: t for name, t in distances().items() if name not in leave}
    if d:
        next(iter(d.values()))[0, 0] += bad
    with pytest.raises(ValueError, match=words):
        select_ticket(d, **given)


# --- training a ticket, and what it leaves ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=0.01), lambda p: SGD(p, lr=0.01, momentum=0.9)])
def test_training_a_ticket_leaves_all_else_as_it_was(make: Make) -> None:
    model = net()
    start = named(model)
    optimizer = make(model.parameters())
    with ProximalL1(optimizer, dict(model.named_parameters()), 0.5):
        trained(model, optimizer)
    ticket = select_ticket({n: p.detach() - start[n] for n, p in model.named_parameters()}, share=0.1)
    assert remaining(ticket) == round(0.1 * 63) / 63
    model.load_state_dict(start)
    with enforce(model, ticket, frozen=start):
        trained(model, make(model.parameters()))
    delta = SparseDelta.between(model, start)
    assert delta.numel == round(0.1 * 63)
    assert delta.density == remaining(ticket)
    for name, p in model.named_parameters():
        assert same_bits(p.detach()[~ticket[name]], start[name][~ticket[name]])
        assert torch.equal(delta.parameters[name].indices, ticket[name].flatten().nonzero()[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_delta_gives_the_trained_weights_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model, base = net(dtype=dtype), net(dtype=dtype)
    start = named(base)
    trained(model, AdamW(model.parameters(), lr=0.01))
    with torch.no_grad():  # one unchanged, one sparse, a sign of zero, a number that is none
        model[0].bias.copy_(start["0.bias"])
        model[0].weight[1:].copy_(start["0.weight"][1:])
        base[3].bias[0], model[3].bias[0], model[3].bias[1] = 0.0, -0.0, math.nan
    delta = SparseDelta.between(model, named(base))
    assert len(delta.parameters["0.bias"].indices) == 0
    path = tmp_path / "sub" / "ticket.safetensors"
    delta.save(path)
    loaded = SparseDelta.load(str(path))
    assert (loaded.numel, loaded.density) == (delta.numel, delta.density)
    pointers = [p.data_ptr() for p in base.parameters()]
    loaded.apply(base)
    assert [p.data_ptr() for p in base.parameters()] == pointers
    for name, p in base.named_parameters():
        assert same_bits(p.detach(), dict(model.named_parameters())[name].detach()), name
    with pytest.raises(ValueError, match=r"0.weight is not what .* has the delta already"):
        loaded.apply(base)


def test_delta_of_transposed_and_compiled_parameters() -> None:
    model = nn.Linear(4, 3)
    model.weight = nn.Parameter(torch.arange(12.0).view(4, 3).t())
    start = named(model)
    with torch.no_grad():
        model.weight[2, 1] = -1
    delta = SparseDelta.between(model, start, ["weight"])
    assert delta.parameters["weight"].indices.tolist() == [2 * 4 + 1]
    other = nn.Linear(4, 3)
    other.weight = nn.Parameter(torch.arange(12.0).view(4, 3).t())
    delta.apply(nn.DataParallel(other))
    assert not other.weight.is_contiguous()
    assert torch.equal(other.weight, model.weight)


def test_a_head_that_is_kept_whole_fits_any_start_of_it() -> None:
    model, base = net(), net()
    with torch.no_grad():
        model[3].bias[0] += 1
        base[3].bias.normal_()
    delta = SparseDelta.between(model, named(net()), whole=["3.bias"])
    assert delta.numel == 3
    delta.apply(base)
    assert torch.equal(base[3].bias, model[3].bias)
    with pytest.raises(ValueError, match=r"3.bias is not what"):
        SparseDelta.between(model, named(net()), ["3.bias"]).apply(net(1))


def test_delta_changes_all_or_nothing() -> None:
    model = net()
    trained(model, AdamW(model.parameters(), lr=0.01))
    delta = SparseDelta.between(dict(model.named_parameters()), named(net()), ["0.weight", "3.bias"])
    sparse = SparseDelta(
        {n: c._replace(indices=c.indices[:2], values=c.values[:2]) for n, c in delta.parameters.items()}
    )
    base = net()
    with torch.no_grad():
        base[3].bias += 1
    before = named(base)
    with pytest.raises(ValueError, match=r"3.bias is not what .* another base model"):
        sparse.apply(base)
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    sparse.apply(base, strict=False)
    assert torch.equal(base[3].bias[:2], model[3].bias[:2])
    assert torch.equal(base[3].bias[2:], before["3.bias"][2:])
    wrong: list[tuple[nn.Module, str]] = [
        (nn.Sequential(nn.Linear(6, 5)), r"3.bias \[3\], but there is none"),
        (nn.Sequential(nn.Linear(6, 4)), r"0.weight \[5, 6\], but it is \[4, 6\] there"),
    ]
    for other, words in wrong:
        for strict in (True, False):
            with pytest.raises(ValueError, match=words):
                sparse.apply(other, strict)
    with pytest.raises(ValueError, match=r"0.weight is torch.float64 in the model and torch.float32 in the delta"):
        delta.apply(net(dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"names": ["5.bias"]}, "5.bias is not among the parameters that are compared: 5.bias"),
        ({"names": ["0.bias"], "whole": ["3.bias"]}, "3.bias is not among .*: 0.bias"),
        ({"start": {}}, "0.weight is missing in the start"),
        ({"start": named(net(dtype=torch.float64))}, "0.weight is torch.float32, its start torch.float64"),
    ],
)
def test_between_refuses_in_words(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SparseDelta.between(
            net(), change.get("start", named(net())), change.get("names"), whole=change.get("whole", ())
        )


@pytest.mark.parametrize(
    ("indices", "values"),
    [([1, 1], 2), ([2, 1], 2), ([-1], 1), ([6], 1), ([0], 2), ([0.0], 1), ([[0]], 1)],
)
def test_indices_that_are_none_are_refused(indices: list[Any], values: int) -> None:
    with pytest.raises(ValueError, match="w: indices must be int64, ascending, below 6"):
        SparseDelta({"w": Changed(torch.tensor(indices), torch.zeros(values), (2, 3), "")})


def test_a_start_that_is_no_copy_is_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"the start of 0\.weight is the trained weight itself; keep a copy"):
        SparseDelta.between(model, model.state_dict())


def test_files_that_are_no_delta_are_refused_in_words(tmp_path: Path) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0] += 1
    good = tmp_path / "good.safetensors"
    SparseDelta.between(model, named(net())).save(good)
    data, about = good.read_bytes(), {"format": "perennial.sparse_delta", "version": "1"}
    path = tmp_path / "bad.safetensors"
    parts = {"indices/w": torch.tensor([0]), "values/w": torch.zeros(1)}
    bad: list[tuple[Callable[[], Any], str]] = [
        (lambda: path.write_bytes(data[:-1]), "damaged one: .*not fully covered.* Copy it again"),
        (lambda: path.write_bytes(data[:20]), "damaged one: .*header"),
        (lambda: path.write_bytes(b""), "is empty"),
        (lambda: path.unlink(), "there is no .*bad.safetensors"),
        (lambda: save_file(parts, path), "format is None None, not perennial.sparse_delta 1"),
        (lambda: save_file(parts, path, {**about, "version": "2"}), "sparse_delta 2, not perennial.sparse_delta 1"),
        (lambda: save_file(parts, path, about), "'parameters'"),
        (lambda: save_file(parts, path, {**about, "parameters": "[]"}), "no attribute"),
        (lambda: save_file(parts, path, {**about, "parameters": '{"w": [2, [3], ""]}'}), "w has 1 indices, not 2"),
        (lambda: save_file(parts, path, {**about, "parameters": '{"v": [1, [3], ""]}'}), "indices/v"),
        (lambda: save_file(parts, path, {**about, "parameters": '{"w": [1, [0], ""]}'}), "must be .*below 0"),
    ]
    for make, words in bad:
        make()
        with pytest.raises(ValueError, match=words):
            SparseDelta.load(path)
    assert set(load_file(good)) == {f"{k}/{n}" for k in ("indices", "values") for n in named(model)}
    assert not list(tmp_path.glob("*.part"))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    count, shape, start = json.loads(header["__metadata__"]["parameters"])["0.weight"]
    assert (count, shape, len(start)) == (6, [5, 6], 64)


# --- sizes of what a ticket is compared with --------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (149, 1), (151, 2), (1049, 10), (1051, 11)])
def test_lora_rank_comes_nearest(count: int, rank: int) -> None:
    assert lora_rank_for(count, [(10, 20), torch.Size([30, 40])]) == rank
    with pytest.raises(ValueError, match="count is 0"):
        lora_rank_for(0, [(10, 20)])
    for shapes, words in (([], "none"), ([(3, 3), (4,)], r"\[4\]")):
        with pytest.raises(ValueError, match=f"shapes are .*{words}"):
            lora_rank_for(count, shapes)


def test_bias_names_are_biases_wherever_they_are() -> None:
    layers = {"linear": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "attention": nn.MultiheadAttention(2, 1)}
    model = nn.ModuleDict({**layers, "gru": nn.GRU(2, 2)})
    model.register_parameter("position_bias", nn.Parameter(torch.zeros(4, 4)))  # a table, and no bias of units
    assert bias_names(model) == [
        "linear.bias",
        "norm.bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "gru.bias_ih_l0",
        "gru.bias_hh_l0",
    ]
    with pytest.raises(ValueError, match="Linear has no biases"):
        bias_names(nn.Linear(2, 2, bias=False))


def test_frozen_weights_of_low_precision_are_checked_in_their_own_type() -> None:
    torch.manual_seed(0)
    start = torch.randn(4, 3)
    model = nn.Linear(3, 4, bias=False, dtype=torch.bfloat16)
    handle = enforce(model, {"weight": torch.zeros(4, 3, dtype=torch.bool)}, frozen={"weight": start})
    handle.check()
    handle.remove()
    assert torch.equal(model.weight, start.bfloat16())
