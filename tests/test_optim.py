"""One conformance table for the optimizers, torch's own beside them as controls.

A rule that enters ``perennial.methods.REGISTRY`` is tested here without a line added; some rows by ``make test-slow``.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from references import SIZES, Table, populate
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import perennial
from perennial import Lane, optim
from perennial.compiler import _sigmoid
from perennial.methods import REGISTRY, Rule
from perennial.optim import OPTIMIZERS

Make = Callable[..., torch.optim.Optimizer]

RULES = [rule for rule in REGISTRY if issubclass(rule, Rule)]
SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"weight_decay": 0.01},
    "UPGD": {"noise_std": 0.1, "weight_decay": 0.01},
    "AdaUPGD": {"noise_std": 0.1},
    "PGD": {"noise_std": 0.1, "weight_decay": 0.01},
    "SynapticIntelligence": {"strength": 0.01},
}
"""Settings under which a rule does all that it can; the others are tested with their defaults."""

OURS: dict[str, Make] = {
    name: functools.partial(made, lr=0.01, **SETTINGS.get(name, {})) for name, made in OPTIMIZERS.items()
}
OURS["UPGD, local"] = functools.partial(optim.UPGD, lr=0.01, scope="local", noise_std=0.1)
OURS["Adam, decoupled"] = functools.partial(optim.Adam, lr=0.01, weight_decay=0.1, decoupled=True)
CONTROLS: dict[str, Make] = {
    "torch SGD": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "torch AdamW": functools.partial(torch.optim.AdamW, lr=0.01),
}
NOISY = {"UPGD", "AdaUPGD", "PGD", "UPGD, local"}

every = pytest.mark.parametrize("make", [pytest.param(m, id=n) for n, m in (OURS | CONTROLS).items()])
SOME = ("SGD", "Adam", "UPGD", *CONTROLS)
"""Rules that take part in the quick runs of the tests that take long; the shell is the same for all."""
each_of_ours = pytest.mark.parametrize("make", [pytest.param(m, id=n) for n, m in OURS.items()])


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.stack([x[:, 0] - x[:, 1], x.sum(1).tanh()], 1).to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step, next(model.parameters()).dtype)
    return F.mse_loss(model(x), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], sign: float = 1.0) -> None:
    for step in steps:
        optimizer.zero_grad()
        (sign * loss_of(model, step)).backward()
        optimizer.step()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def weights_after(make: Make, steps: int = 10, dtype: torch.dtype = torch.float64, **settings: Any) -> Tensor:
    model = network(dtype)
    train(model, make(model.named_parameters(), **settings), range(steps))
    return flat(model)


def same_state(left: Any, right: Any) -> None:
    one, spec = torch.utils._pytree.tree_flatten(left)
    two, other = torch.utils._pytree.tree_flatten(right)
    assert spec == other
    for a, b in zip(one, two, strict=True):
        if isinstance(a, Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b


# --- 1: construction ------------------------------------------------------------------------------------------------


@every
def test_refuses_what_cannot_be_optimized(make: Make) -> None:
    model = network()
    with pytest.raises(ValueError, match=r"lr|learning rate"):
        make(model.parameters(), lr=-0.1)
    with pytest.raises(ValueError, match="empty"):
        make([])
    with pytest.raises(TypeError):
        make(model[0].weight)
    p = model[0].weight
    with pytest.raises(ValueError, match="more than one parameter group"):
        make([{"params": [p]}, {"params": [p]}])
    with pytest.raises(ValueError, match="names are missing"):
        make([("a", model[0].weight), model[0].bias])


@each_of_ours
def test_names_the_nearest_setting(make: Make) -> None:
    with pytest.raises(TypeError, match=r"no setting 'weight_dcay'|no setting 'weight_dcay'; its settings are"):
        make(network().parameters(), weight_dcay=0.1)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_every_number_is_checked_in_every_group(rule: type[Rule]) -> None:
    model = network()
    optimizer = OPTIMIZERS[rule.__name__](model[0].parameters())
    for name in rule.scalars():
        with pytest.raises((ValueError, TypeError), match=name):
            OPTIMIZERS[rule.__name__](model.parameters(), **{name: -1.0})
        with pytest.raises((ValueError, TypeError), match=name):
            optimizer.add_param_group({"params": list(model[2].parameters()), name: math.nan})
    assert len(optimizer.param_groups) == 1, "a refused group must not stay"


def test_every_rule_has_a_class_with_a_signature_and_a_page() -> None:
    assert set(OPTIMIZERS) == {rule.__name__ for rule in RULES}
    for rule in RULES:
        made = OPTIMIZERS[rule.__name__]
        assert getattr(optim, rule.__name__) is made
        assert set(made.__signature__.parameters) >= set(rule.scalars()) | {"params", "seed", "maximize"}
        assert made.__doc__ == rule.__doc__


# --- 2 to 6: what a step does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(m, id=n, marks=() if n in SOME and n != "UPGD" else pytest.mark.slow)
        for n, m in (OURS | CONTROLS).items()
    ],
)
def test_the_loss_falls_under_schedulers(make: Make) -> None:
    model = network()
    optimizer = make(model.parameters(), lr=0.05)
    by_step = torch.optim.lr_scheduler.StepLR(optimizer, 50, 0.9)
    on_plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=20)

    def total() -> float:
        with torch.no_grad():
            return sum(float(loss_of(model, s)) for s in range(20))

    before = total()
    for step in range(200):
        train(model, optimizer, [step % 20])
        by_step.step()
        on_plateau.step(float(loss_of(model, 0).detach()))
    assert total() < 0.9 * before
    assert optimizer.param_groups[0]["lr"] < 0.05


@every
def test_groups_have_their_own_numbers(make: Make) -> None:
    model = network()
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.0},
        {"params": list(model[2].parameters()), "lr": 0.05},
        {"params": list(model[4].parameters())},
    ]
    start = copy.deepcopy(model.state_dict())
    train(model, make(groups), range(3))
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]) == name.startswith("0."), name


@every
def test_takes_a_tensor_as_lr(make: Make) -> None:
    plain, tensor = weights_after(make, lr=0.02), weights_after(make, lr=torch.tensor(0.02, dtype=torch.float64))
    torch.testing.assert_close(plain, tensor, rtol=1e-6, atol=1e-9)


@each_of_ours
def test_refuses_a_tensor_of_several_lrs(make: Make) -> None:
    with pytest.raises(ValueError, match="2 elements"):
        make(network().parameters(), lr=torch.tensor([0.1, 0.2]))


@every
def test_maximize_is_minimizing_the_negative(make: Make) -> None:
    up, down = network(), network()
    train(up, make(up.named_parameters(), maximize=True), range(5))
    train(down, make(down.named_parameters()), range(5), sign=-1.0)
    torch.testing.assert_close(flat(up), flat(down), rtol=1e-12, atol=1e-15)


@every
def test_a_parameter_without_a_gradient_is_left_alone(make: Make) -> None:
    model = network()
    optimizer = make(model.named_parameters())
    model[2].weight.requires_grad_(False)
    start = model[2].weight.clone()
    train(model, optimizer, range(3))
    assert torch.equal(model[2].weight, start)
    assert not optimizer.state[model[2].weight]
    model[2].weight.requires_grad_(True)  # its own count begins now
    train(model, optimizer, range(3))
    assert not torch.equal(model[2].weight, start)


@each_of_ours
def test_a_gradient_of_zero_leaves_what_noise_and_decay_do(make: Make) -> None:
    model = network()
    rule = make.func.rule  # type: ignore[attr-defined]
    off = {name: 0.0 for name in ("noise_std", "weight_decay") if name in rule.scalars()}
    optimizer = make(model.named_parameters(), **off)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    start = flat(model)
    optimizer.step()
    torch.testing.assert_close(flat(model), start, rtol=0, atol=0)


# --- 7, 8, 20: gradients, foreach, accumulation ---------------------------------------------------------------------


@every
def test_never_writes_into_gradients(make: Make) -> None:
    model = network()
    optimizer = make(model.parameters(), maximize=True)
    loss_of(model, 0).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@every
def test_foreach_is_the_loop(make: Make) -> None:
    loop, together = weights_after(make, foreach=False), weights_after(make, foreach=True)
    torch.testing.assert_close(loop, together, rtol=1e-13, atol=1e-15)


@every
def test_accumulated_gradients_are_their_sum(make: Make) -> None:
    model, other = network(), network()
    one, two = make(model.named_parameters()), make(other.named_parameters())
    for step in range(4):
        one.zero_grad()
        for part in (0, 1):
            (0.5 * loss_of(model, 2 * step + part)).backward()
        one.step()
        two.zero_grad()
        (0.5 * loss_of(other, 2 * step) + 0.5 * loss_of(other, 2 * step + 1)).backward()
        two.step()
    torch.testing.assert_close(flat(model), flat(other), rtol=1e-10, atol=1e-12)


# --- 9 to 14: saving, hooks -----------------------------------------------------------------------------------------


@every
def test_resumes_from_a_saved_state(make: Make) -> None:
    whole = network()
    train(whole, make(whole.named_parameters()), range(12))
    model = network()
    optimizer = make(model.named_parameters())
    train(model, optimizer, range(6))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    kept = copy.deepcopy(saved)
    other = network(seed=1)
    resumed = make(other.named_parameters(), lr=0.5)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    same_state(saved["optimizer"], kept["optimizer"])
    train(other, resumed, range(6, 12))
    assert torch.equal(flat(other), flat(whole))


@each_of_ours
def test_the_seed_of_the_noise_is_in_the_state(make: Make) -> None:
    model = network()
    optimizer = make(model.named_parameters(), seed=5)
    train(model, optimizer, range(3))
    other = make(copy.deepcopy(model).named_parameters(), seed=6)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["seed"] == 5


@each_of_ours
def test_noise_is_a_function_of_seed_step_and_name(make: Make, request: pytest.FixtureRequest) -> None:
    first, again, other = weights_after(make, seed=1), weights_after(make, seed=1), weights_after(make, seed=2)
    assert torch.equal(first, again)
    noisy = request.node.callspec.id in NOISY
    assert torch.equal(first, other) != noisy
    before = torch.get_rng_state()
    model = network()
    state = torch.get_rng_state()
    train(model, make(model.parameters()), range(2))
    assert torch.equal(state, torch.get_rng_state())
    torch.set_rng_state(before)


@every
def test_an_older_state_without_new_settings_loads(make: Make) -> None:
    model = network()
    optimizer = make(model.named_parameters())
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for name in ("maximize", "foreach"):
            del group[name]
    other = make(model.named_parameters())
    other.load_state_dict(saved)
    train(model, other, range(2, 4))


@every
def test_named_and_unnamed_states_load_into_each_other(make: Make) -> None:
    for first, second in (("parameters", "named_parameters"), ("named_parameters", "parameters")):
        model = network()
        optimizer = make(getattr(model, first)())
        train(model, optimizer, range(2))
        other = make(getattr(model, second)())
        other.load_state_dict(optimizer.state_dict())
        train(model, other, range(2, 4))


@each_of_ours
def test_a_step_that_is_a_number_loads(make: Make) -> None:
    model = network()
    optimizer = make(model.named_parameters())
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = float(state["step"])
    other = make(model.named_parameters())
    other.load_state_dict(saved)
    twin = copy.deepcopy(model)
    third = make(twin.named_parameters())
    third.load_state_dict(optimizer.state_dict())
    train(model, other, range(2, 4))
    train(twin, third, range(2, 4))
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_of_ours
def test_the_state_of_small_parameters_is_in_single_precision(make: Make, dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = make(model.named_parameters())
    train(model, optimizer, range(3))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = make(model.named_parameters())
    other.load_state_dict(torch.load(file, weights_only=True))
    for p in model.parameters():
        for name, value in other.state[p].items():
            for leaf in torch.utils._pytree.tree_leaves(value):
                assert leaf.dtype == torch.float32, name
        same_state(other.state[p], optimizer.state[p])


@every
def test_hooks_fire_and_can_be_removed(make: Make) -> None:
    model = network()
    optimizer = make(model.named_parameters())
    seen: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        optimizer.register_state_dict_post_hook(lambda *_: seen.append("save")),
        optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load")),
        optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded")),
    ]
    train(model, optimizer, [0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "save", "load", "loaded"]
    for handle in handles:
        handle.remove()
    train(model, optimizer, [1])
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(seen) == 5


# --- 15 to 18: copies, closures, refusals, scalers ------------------------------------------------------------------


@every
def test_copies_and_pickles_go_on_alike(make: Make) -> None:
    model = network()
    optimizer = make(model.named_parameters())
    train(model, optimizer, range(3))
    pair = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    assert "lr" in repr(optimizer)
    train(model, optimizer, range(3, 6))
    for other, twin in (pair, pickled):
        train(other, twin, range(3, 6))
        assert torch.equal(flat(other), flat(model))


@every
def test_a_closure_is_run_with_gradients(make: Make) -> None:
    model, other = network(), network()
    optimizer = make(model.named_parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with torch.no_grad():
        result = optimizer.step(closure)
    assert float(result.detach()) == pytest.approx(float(loss_of(other, 0).detach()))
    train(other, make(other.named_parameters()), [0])
    assert torch.equal(flat(model), flat(other))


@each_of_ours
def test_refuses_sparse_gradients_and_complex_parameters(make: Make) -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = make(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients; weight has one"):
        optimizer.step()
    with pytest.raises(ValueError, match="complex64"):
        make([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


@every
def test_a_skipped_step_counts_for_nothing(make: Make) -> None:
    model = network(torch.float32)
    optimizer = make(model.named_parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    before, state = flat(model), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 1) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(model), before)
    same_state(optimizer.state_dict()["state"], state["state"])


# --- 19: compiled ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [pytest.param(m, id=n, marks=() if n == "SGD" else pytest.mark.slow) for n, m in OURS.items()]
)
def test_compiled_is_the_same_step(make: Make, request: pytest.FixtureRequest) -> None:
    plain, native = network(), network()
    one, two = make(plain.named_parameters()), make(native.named_parameters(), compiled=True)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (one, two)]
    for step in range(6):
        train(plain, one, [step])
        train(native, two, [step])
        for scheduler in schedulers:
            scheduler.step()
    # Normal numbers are float32, of which a compiler rounds a sum of products once; a step adds a thousandth of one.
    noisy = request.node.callspec.id in NOISY
    torch.testing.assert_close(flat(native), flat(plain), rtol=1e-8, atol=1e-9 if noisy else 1e-10)
    same_state(two.state_dict()["state"].keys(), one.state_dict()["state"].keys())


def test_compiled_follows_replaced_tensors() -> None:
    plain, native = network(), network()
    make = OURS["SGD"]
    one, two = make(plain.named_parameters()), make(native.named_parameters(), compiled=True)
    for step in range(8):
        train(plain, one, [step])
        train(native, two, [step])
        if step == 1:
            for p in native.parameters():
                p.data = p.data.clone()
        if step == 3:
            two.load_state_dict(copy.deepcopy(two.state_dict()))
        if step == 5:
            native, two = copy.deepcopy((native, two))
    torch.testing.assert_close(flat(native), flat(plain), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [
    {},
    {"protect": False, "utility_decay": 0.0},
    {"doubled": True, "weight_decay": 0.1, "maximize": True},
], ids=["plain", "non-protecting", "doubled"])  # fmt: skip
def test_upgd_compiled_whole_is_the_same_step(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """In groups, with several step counts, fresh rows and columns, and weights that are not contiguous."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 20, 3), nn.Flatten(), nn.Linear(720, 300), nn.ReLU(), nn.Linear(300, 7)).to(
        dtype
    )
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert not twin[0].weight.is_contiguous()
    made = []
    for net in (model, twin):
        named = list(net.named_parameters())
        groups = [{"params": named[:3]}, {"params": named[3:], "lr": 0.01, "noise_std": 0.02, "seed": 9}]
        common = {"lr": 0.05, "noise_std": 0.01, "utility_decay": 0.9, "compiled": net is twin, **settings}
        made.append(optim.UPGD(groups, **common))
    for step in range(6):
        inputs = torch.randn(4, 3, 8, 8, dtype=dtype)
        for net, optimizer in zip((model, twin), made, strict=True):
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
            if step == 1:
                net[4].bias.grad = None  # one step behind the others
            optimizer.step()
            if step == 2:
                optimizer.renew(net[2].weight, 0, torch.tensor([3, 5]))
                optimizer.renew(net[2].weight, 1, torch.tensor([1, 700]))
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(flat(twin), flat(model), **close)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        one, two = made[0].state[p], made[1].state[q]
        torch.testing.assert_close(two["utility"], one["utility"], **close)
        assert all(map(torch.equal, two["ages"], one["ages"]))
        assert two["step"] == one["step"]


def test_upgd_compiled_passes_on_what_is_no_number() -> None:
    p = nn.Parameter(torch.ones(300))
    p.grad = torch.ones(300)
    p.grad[5] = math.nan
    optim.UPGD([p], compiled=True).step()
    assert p.isnan().all()


def test_the_compiled_sigmoid_is_exact_to_two_bits() -> None:
    x = torch.cat([torch.linspace(-1, 1, 20_001), torch.linspace(-87, 120, 40_001)])
    exact = torch.sigmoid(x.double())
    assert ((_sigmoid(x) - exact).abs() / exact).max() < 2 * 2.0**-23
    ends = _sigmoid(torch.tensor([-math.inf, -1e30, 1e30, math.inf, math.nan]))
    torch.testing.assert_close(ends, torch.tensor([0.0, 0.0, 1.0, 1.0, math.nan]), rtol=0, atol=1e-37, equal_nan=True)


# --- the arithmetic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "steps"), [
    *(pytest.param(r, 60, id=f"{r.name}-60") for r in RULES if r.__name__ in SOME),
    *(pytest.param(r, 200, id=r.name, marks=pytest.mark.slow) for r in RULES),
])  # fmt: skip
def test_equals_the_lane_of_a_population(rule: type[Rule], steps: int) -> None:
    """The same seed, a float64 lane; the lane equals an independent statement (tests/test_methods.py)."""
    settings = {"lr": 0.01} | SETTINGS.get(rule.__name__, {})
    _compare_to_population(rule(**settings), {}, settings, steps)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"granularity": "feature", "noise_std": 0.1}, 60),
        pytest.param({"granularity": "feature", "noise_std": 0.1}, 200, marks=pytest.mark.slow),
        pytest.param({"granularity": "feature", "scope": "local", "protect": False}, 200, marks=pytest.mark.slow),
        pytest.param({"gated": "output", "doubled": True}, 200, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_unit_wise_equals_the_lane_of_a_population(settings: dict[str, Any], steps: int) -> None:
    settings = {"lr": 0.01, "utility_decay": 0.9, **settings}
    _compare_to_population(perennial.UPGD(**settings), {"units": True}, settings, steps)


def _compare_to_population(rule: Rule, wants: dict[str, bool], settings: dict[str, Any], steps: int) -> None:
    stream = Table(batch=3)
    population = populate([Lane(4, rule)], stream, compiled=False)
    model = copy.deepcopy(population.model).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(population.state.params[name][..., 0])
    more = {"units": population.units} if wants else {}
    optimizer = OPTIMIZERS[type(rule).__name__](model.named_parameters(), seed=4, **more, **settings)
    feed = stream.open([4], torch.device("cpu"))
    for step in range(steps):
        population.advance(1)
        x, y = (t[0, ..., 0].double() for t in feed.examples(step, 1))
        optimizer.zero_grad()
        ((model(x) - y) ** 2).sum(1).mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), population.state.params[name][..., 0], rtol=1e-6, atol=1e-9)


def test_sgd_and_adam_are_those_of_torch() -> None:
    pairs: list[tuple[Make, Make]] = [
        (OURS["SGD"], functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.01)),
        (OURS["Adam"], functools.partial(torch.optim.Adam, lr=0.01, weight_decay=0.01)),
        (OURS["Adam, decoupled"], functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(weights_after(ours, 200), weights_after(theirs, 200), rtol=1e-9, atol=1e-12)


def test_what_goes_by_unit_needs_names_and_units() -> None:
    model = network()
    units = perennial.trace(model, batch(0)[0])
    with pytest.raises(ValueError, match="named_parameters"):
        optim.UPGD(model.parameters(), granularity="feature", units=units)
    with pytest.raises(ValueError, match="trace the network"):
        train(model, optim.UPGD(model.named_parameters(), granularity="feature"), [0])
    with pytest.raises(ValueError, match="does not hold"):
        optim.UPGD(model[0].named_parameters(), granularity="feature", units=units)
    with pytest.raises(ValueError, match="curvature="):
        optim.UPGD(model.named_parameters(), order=2)
    with pytest.raises(ValueError, match="loss="):
        optim.UPGD(model.named_parameters(), order="exact")


def test_exact_utility_by_a_function_of_the_loss() -> None:
    """One step from rest: the gate is of the true change of the loss, worked out weight by weight."""
    model = network()
    x, y = batch(0)

    def loss(changed: Any) -> Tensor:
        return F.mse_loss(functional_call(model, dict(changed), (x,)), y)

    start = copy.deepcopy(model)
    optimizer = optim.UPGD(model.named_parameters(), lr=0.01, order="exact", noise_std=0.0, loss=loss)
    train(model, optimizer, [0])
    base = float(loss_of(start, 0).detach())
    utility = {}
    for name, p in start.named_parameters():
        utility[name] = torch.zeros_like(p)
        for place in range(p.numel()):
            with torch.no_grad():
                kept = p.view(-1)[place].clone()
                p.view(-1)[place] = 0
                utility[name].view(-1)[place] = float(loss_of(start, 0)) - base
                p.view(-1)[place] = kept
    highest = max(float(u.max()) for u in utility.values())
    loss_of(start, 0).backward()
    for (name, p), q in zip(start.named_parameters(), model.parameters(), strict=True):
        expected = p - 0.01 * p.grad * torch.sigmoid(-utility[name] / highest)
        torch.testing.assert_close(q, expected, rtol=1e-9, atol=1e-12)


# --- with units that are reset --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Adam", {}),
        pytest.param("AdaUPGD", {"noise_std": 0.05}, marks=pytest.mark.slow),
        pytest.param("EWC", {}, marks=pytest.mark.slow),
        pytest.param("UPGD", {"noise_std": 0.05, "utility_decay": 0.9}, marks=pytest.mark.slow),
        ("UPGD", {"granularity": "feature", "noise_std": 0.05, "utility_decay": 0.9}),
    ],
    ids=str,
)
def test_fresh_units_have_fresh_state_as_in_a_population(name: str, settings: dict[str, Any]) -> None:
    """Attached continual backprop beside our optimizer is the lane of both: averages, counts, utilities by unit."""
    rule = OPTIMIZERS[name].rule(lr=0.01, **settings)
    cbp = perennial.ContinualBackprop(replacement_rate=0.05, maturity_threshold=5)
    stream = Table(batch=3)
    population = populate([Lane(3, rule, (cbp,))], stream, compiled=False)

    def factory() -> nn.Module:
        return perennial.MLP(hidden=SIZES[1:-1]).build(SIZES[0], SIZES[-1])

    model = factory().double()
    model.load_state_dict({n: w[..., 0] for n, w in population.state.params.items()})
    feed = stream.open([3], torch.device("cpu"))
    example = feed.examples(0, 1).inputs[0, ..., 0].double()
    units = {"units": population.units} if "granularity" in settings else {}
    optimizer = OPTIMIZERS[name](model.named_parameters(), lr=0.01, seed=3, **units, **settings)
    keeper = perennial.attach(cbp, model, optimizer, example=example, factory=factory, seed=3, check=False)
    for step in range(110):
        x, y = (t[0, ..., 0].double() for t in feed.examples(step, 1))
        optimizer.zero_grad()
        ((model(x) - y) ** 2).sum(1).mean().backward()
        optimizer.step()
        population.advance(1)
    assert sum(keeper.replaced().values()) == int(population.state.replaced) > 10
    for key, w in model.named_parameters():
        torch.testing.assert_close(w.detach(), population.state.params[key][..., 0], rtol=1e-7, atol=1e-10)
    assert "a step count of its own" in " ".join(str(keeper).split())


def test_a_fresh_column_of_a_convolution_counts_anew() -> None:
    conv = nn.Conv2d(3, 4, 2)
    optimizer = optim.Adam(conv.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        conv(torch.randn(2, 3, 5, 5)).sum().backward()
        optimizer.step()
    optimizer.renew(conv.weight, 1, torch.tensor([2]))
    optimizer.renew(conv.weight, 0, torch.tensor([0, 3]), torch.tensor([True, False]))
    optimizer.renew(conv.bias, 0, torch.tensor([1]))
    rows, columns = optimizer.state[conv.weight]["ages"]
    assert rows.flatten().tolist() == [0, 5, 5, 5]
    assert columns.view(3, 2, 2).flatten(1).tolist() == [[5] * 4, [5] * 4, [0] * 4]
    assert optimizer.state[conv.bias]["ages"][1].flatten().tolist() == [5, 0, 5, 5]
