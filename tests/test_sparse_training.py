"""What dynamic sparse training must do by its own algebra: counts, schedules, and what becomes of each weight.

That SET and RigL equal their references, resume, and do nothing at OFF is tested for every method in test_methods.py.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import Table, lane, populate, same
from torch import Tensor, nn

from perennial import SET, SGD, Adam, ContinualBackprop, Lane, RigL, attach
from perennial.methods import Context
from perennial.methods.sparse_training import SparseTraining, counts, densities
from perennial.noise import Noise, seed_key
from perennial.units import UnitMap

LENET = {"1": (300, 784), "2": (100, 300), "3": (10, 100)}

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
RULES = {
    "momentum": SGD(lr=0.005, momentum=0.9, weight_decay=0.1),
    "adamw": Adam(lr=0.01, weight_decay=0.1, decoupled=True),
}
METHODS = [SET(0.5, every=4), RigL(0.5, every=4, until=40), RigL(0.4, every=3, until=None)]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name} {m.density}")
every_optimizer = pytest.mark.parametrize("optimizer_name", OPTIMIZERS)


# --- how dense each layer is ----------------------------------------------------------------------------------------


def test_erk_of_lenet_300_100_is_that_worked_out_by_hand() -> None:
    """Of 266,200 weights 26,620. A layer's N times its raw value is inputs plus outputs: 1084, 400 and 110. With
    epsilon = 26,620 / 1594 = 16.7 the last layer's density would be 16.7 * 0.11 = 1.84. So it is dense, all 1000, and
    for the others epsilon = 25,620 / 1484 = 17.2642."""
    epsilon = 25_620 / 1484
    found = densities(LENET, 0.1)
    assert found == pytest.approx({"1": epsilon * 1084 / 235_200, "2": epsilon * 400 / 30_000, "3": 1.0}, rel=1e-12)
    # 18714.39 and 6905.66: the one that is missing goes to the second
    assert counts(LENET, 0.1) == {"1": 18_714, "2": 6_906, "3": 1_000}
    assert densities(LENET, 0.1, "er") == found, "for linear layers the two are the same"
    assert densities(LENET, 0.1, "uniform") == {"1": 0.1, "2": 0.1, "3": 0.1}


def test_erk_goes_by_all_dimensions_and_er_by_two() -> None:
    shapes = {"conv": (64, 32, 3, 3), "linear": (10, 640)}
    sizes = {"conv": 64 * 32 * 9, "linear": 6400}
    raw = {"erk": {"conv": 102 / 18432, "linear": 650 / 6400}, "er": {"conv": 96 / 2048, "linear": 650 / 6400}}
    for distribution, of in raw.items():
        found = densities(shapes, 0.05, distribution)
        assert found["conv"] / found["linear"] == pytest.approx(of["conv"] / of["linear"], rel=1e-12)
        assert sum(found[n] * sizes[n] for n in shapes) == pytest.approx(0.05 * sum(sizes.values()), rel=1e-12)


shapes_of_layers = st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=6)


@given(shapes_of_layers, st.floats(1e-3, 1.0), st.sampled_from(["erk", "er", "uniform"]))
def test_the_total_is_exact_and_no_layer_is_overfull(shapes: list[list[int]], density: float, kind: str) -> None:
    named = {str(number): shape for number, shape in enumerate(shapes)}
    sizes = {name: math.prod(shape) for name, shape in named.items()}
    spread, found = densities(named, density, kind), counts(named, density, kind)
    assert list(found) == list(spread) == list(named)
    assert sum(found.values()) == round(density * sum(sizes.values()))
    for name, size in sizes.items():
        assert 0 <= found[name] <= size
        assert 0 < spread[name] <= 1
        assert abs(found[name] - spread[name] * size) <= 1 + 1e-6


@pytest.mark.parametrize(("call", "words"), [
    (lambda: densities(LENET, 0.0), "density is 0; it must be above 0"),
    (lambda: densities(LENET, 0.1, "even"), "distribution is 'even'; it is one of erk, er, uniform"),
    (lambda: densities({"1.bias": (3,)}, 0.1), "1.bias has fewer than two dimensions"),
    (lambda: attached(SET(0.01, "uniform")), r"density=0.01 and distribution='uniform' leaves no weight in 7.weight"),
    (lambda: SET().init({"a": torch.ones(3)}, UnitMap(())), "set found no weight matrix"),
])  # fmt: skip
def test_what_cannot_be_spread_is_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# --- a user's model -------------------------------------------------------------------------------------------------


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.Identity(), nn.ReLU(),
        nn.Linear(6, 3),
    )  # fmt: skip


MASKED = ("0.weight", "4.weight", "7.weight")


def attached(method: SparseTraining, optimizer: str = "momentum", seed: int = 0) -> Any:
    model = network()
    made = OPTIMIZERS[optimizer](model.parameters())
    return model, made, attach(method, model, made, seed=seed)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(7, 2, 6, 6, generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), torch.randint(0, 3, (7,), generator=generator)).backward()
    optimizer.step()


def slots(optimizer: torch.optim.Optimizer, w: nn.Parameter) -> list[Tensor]:
    return [v for v in optimizer.state[w].values() if isinstance(v, Tensor) and v.shape == w.shape]


@every_method
@every_optimizer
def test_absent_weights_are_zero_and_counts_stay(method: SparseTraining, optimizer_name: str) -> None:
    """After every step, with momentum and weight decay; and the optimizer's state of what is grown starts anew, that of
    what stays goes on."""
    model, optimizer, keeper = attached(method, optimizer_name)
    params = dict(model.named_parameters())
    start = {name: int(mask.sum()) for name, mask in keeper.state.mask.items()}
    assert tuple(start) == MASKED
    assert start == counts({name: params[name].shape for name in MASKED}, method.density)
    exchanged, again = 0, 0
    for step in range(50):
        before, weights = keeper.state.mask, {}
        if method.due(step + 1, False):  # what the step itself makes of weights and state, by a copy without the method
            bare = copy.deepcopy(model)
            theirs = OPTIMIZERS[optimizer_name](bare.parameters())
            state = {k: v for k, v in optimizer.state_dict().items() if k != "perennial"}
            theirs.load_state_dict(copy.deepcopy(state))
            learn(bare, theirs, step)
            weights = dict(bare.named_parameters())
        learn(model, optimizer, step)
        for name, mask in keeper.state.mask.items():
            w = params[name]
            assert (w[~mask] == 0).all()
            assert int(mask.sum()) == start[name]
            if not weights:
                assert torch.equal(mask, before[name])
                continue
            new = mask & ~before[name]
            exchanged += int(new.sum())
            assert (w[new] == 0).all()
            stays = mask & before[name]
            assert torch.equal(w[stays], weights[name][stays])
            for ours, bares in zip(slots(optimizer, w), slots(theirs, weights[name]), strict=True):
                assert (ours[~stays] == 0).all()
                assert torch.equal(ours[stays], bares[stays])
            smallest = weights[name].abs()[before[name]].sort().values
            dropped = _dropped(method, step + 1, start[name])
            again += int((w[stays].abs() <= smallest[dropped - 1]).sum()) if dropped else 0
    assert exchanged > 20
    assert again > 0, "none was dropped and grown again"
    assert keeper.method.measured(keeper.state) == {"weight_density": sum(start.values()) / (72 + 384 + 18)}


def _dropped(method: SparseTraining, step: int, count: int) -> int:
    until = getattr(method, "until", None)
    share = method.drop if until is None else method.drop / 2 * (1 + math.cos(math.pi * step / until))
    return int(share * count + 1e-9)


def test_the_first_mask_is_the_seeds() -> None:
    masks = [attached(SET(0.3), seed=seed)[2].state.mask for seed in (0, 0, 1)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in MASKED)
    assert not torch.equal(masks[0]["4.weight"], masks[2]["4.weight"])
    by_name = counts({name: m.shape for name, m in masks[0].items()}, 0.3)
    noise = Noise(
        torch.tensor(seed_key(1, "method"), dtype=torch.int32), torch.tensor(-1, dtype=torch.int32), "set"
    )  # fmt: skip
    for name, mask in masks[2].items():
        drawn = noise.uniform(f"{name}/begin", torch.arange(mask.numel(), dtype=torch.int32)).numpy()
        chosen = np.argsort(-drawn, kind="stable")[: by_name[name]]
        assert sorted(chosen) == mask.flatten().nonzero()[:, 0].tolist()


def test_every_weight_is_as_likely_as_any_other_to_be_there_at_first() -> None:
    method, units, params = SET(1 / 3), UnitMap(()), {"a.weight": torch.ones(5, 6)}
    state, found = method.init(params, units), torch.zeros(5, 6)
    for seed in range(600):
        key = torch.tensor(seed_key(seed, "method"), dtype=torch.int32)
        noise = Noise(key, torch.tensor(-1, dtype=torch.int32), method.name)
        changed, drawn = method.begin(params, state, Context({}, {}, noise, units))
        assert torch.equal(changed["a.weight"] == 1, drawn.mask["a.weight"])
        found += changed["a.weight"]
    assert (found.sum() == 600 * 10).all()
    assert ((found / 600 - 1 / 3).abs() < 5 * math.sqrt(2 / 9 / 600)).all()


# --- one exchange ---------------------------------------------------------------------------------------------------


def _exchange(method: SparseTraining, w: Tensor, mask: Tensor, slope: Tensor, time: int, seed: int = 0) -> Any:
    params, units = {"a.weight": w}, UnitMap(())
    key = torch.tensor(seed_key(seed, "method"), dtype=torch.int32)
    noise = Noise(key, torch.tensor(time - 1, dtype=torch.int32), method.name)
    state = method.init(params, units)._replace(mask={"a.weight": mask})
    changed, state = method.step(params, state, Context({"a.weight": slope}, {}, noise, units))
    outcome = method.event(params | changed, state, Context({}, {}, noise, units))
    return outcome.changed["a.weight"], outcome.state.mask["a.weight"], outcome.touched["a.weight"][-1]


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients() -> None:
    w = torch.tensor([[5.0, -1.0, 2.0, -3.0, 0.0, 0.0, 0.0, 0.0]])
    slope = torch.tensor([[0.0, -9.0, 0.1, 0.0, 1.0, -4.0, 3.0, 0.0]])
    # of four two go, -1 and 2; of the six candidates -1 and the one of gradient -4 come
    new, mask, touched = _exchange(RigL(drop=0.5, until=None), w, w != 0, slope, 100)
    assert new.tolist() == [[5.0, -1.0, 0.0, -3.0, 0.0, 0.0, 0.0, 0.0]]
    assert mask.tolist() == [[True, True, False, True, False, True, False, False]]
    assert touched.tolist() == [[False, False, True, False, True, True, True, True]]


def test_the_share_follows_the_cosine_and_ends() -> None:
    torch.manual_seed(0)
    w = torch.randn(40, 50) * (torch.rand(40, 50) < 0.5)
    mask, method = w != 0, RigL(drop=0.3, every=100, until=1000)
    for time in range(100, 1000, 100):
        new, after, _ = _exchange(method, w, mask, torch.where(mask, 0.0, 1.0), time)  # nothing dropped comes back
        expected = int(int(mask.sum()) * 0.3 / 2 * (1 + math.cos(math.pi * time / 1000)))
        assert int((after & ~mask).sum()) == int((mask & ~after).sum()) == expected
        assert int(after.sum()) == int(mask.sum())
        assert w[mask & ~after].abs().max() <= w[mask & after].abs().min()
        assert (new[~mask] == 0).all()
    assert [n for n in range(1, 1500) if method.due(n, True)] == list(range(100, 1000, 100))
    assert RigL(every=100, until=None).due(10**6, False)
    assert not any(RigL(every=0).due(n, True) for n in range(5))
    assert [n for n in range(5) if SET(every=None).due(n, n % 2 == 0)] == [2, 4], "not before the first step"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_share_that_is_a_whole_number_is_not_rounded_down(dtype: torch.dtype) -> None:
    """A lane's 0.7 in float32 is below 0.7."""
    w = torch.arange(1.0, 101.0).reshape(10, 10)
    for share, count in ((0.7, 10), (0.29, 100), (0.57, 100), (1.0, 100)):
        mask = w > 100 - count
        method = SET(drop=share).bound({"drop": torch.tensor(share, dtype=dtype)})
        _, after, _ = _exchange(SET(drop=share), w, mask, w, 1)
        _, ours, _ = _exchange(method, w, mask, w, 1)
        assert torch.equal(ours, after)
        dropped = w[mask].sort().values[: round(share * count)]
        assert (w[mask & ~ours][:, None] == dropped).any(1).all()


@pytest.mark.parametrize("method", [SET(drop=0.5), RigL(drop=0.5, until=None)], ids=lambda m: m.name)
def test_between_equals_chance_decides(method: SparseTraining) -> None:
    """All weights and all gradients are equal: each is as likely to stay as to go, and the counts are exact."""
    w = torch.zeros(8, 8)
    mask = torch.arange(64).reshape(8, 8) % 2 == 0
    there = torch.zeros(8, 8)
    for seed in range(400):
        _, after, _ = _exchange(method, w, mask, torch.ones(8, 8), 1, seed)
        assert int(after.sum()) == 32
        there += after
    # half of those present stay; of the 48 candidates 16 come
    for chosen, chance in ((mask, 1 / 2 + 1 / 2 / 3), (~mask, 1 / 3)):
        spread = math.sqrt(chance * (1 - chance) / 400)
        assert ((there[chosen] / 400 - chance).abs() < 5 * spread).all()


# --- lanes ----------------------------------------------------------------------------------------------------------


@every_method
@every_optimizer
def test_lanes_keep_their_counts_and_zeros(method: SparseTraining, optimizer_name: str) -> None:
    """Lanes of different densities in one program, over many exchanges; and the density is measured."""
    shares = [0.3, 0.5, 0.8]
    lanes = [Lane(s, RULES[optimizer_name], (method.bound({"density": d}),)) for s, d in enumerate(shares)]
    population = populate(lanes, Table(batch=3))
    shapes = {n: w.shape[:-1] for n, w in population.state.params.items() if n.endswith("weight")}
    expected = [counts(shapes, density) for density in shares]
    last: dict[str, Tensor] = {}
    moved = 0
    for _ in range(36):
        for name, mask in population.state.methods[1].mask.items():
            assert mask.sum((0, 1)).tolist() == [of[name] for of in expected]
            assert (population.state.params[name][~mask] == 0).all()
            moved += int((mask != last.get(name, mask)).sum())
            last[name] = mask.clone()
        population.advance(1)
    assert moved > 50
    assert (population.state.diverged < 0).all()
    total = sum(math.prod(shape) for shape in shapes.values())
    found = population.measure()["weight_density"]
    assert found.tolist() == pytest.approx([round(d * total) / total for d in shares], rel=1e-12)


def test_momentum_of_grown_weights_starts_anew_in_lanes() -> None:
    population = populate([Lane(0, RULES["momentum"], (RigL(0.5, every=5, until=None),))])
    population.advance(4)
    before = lane(population, 0)
    population.advance(1)
    after, grown = lane(population, 0), 0
    for name, mask in after.methods[1].mask.items():
        stays = mask & before.methods[1].mask[name]
        grown += int(mask.sum() - stays.sum())
        assert (after.methods[0].velocity[name][~stays] == 0).all()
        assert (after.methods[0].velocity[name][stays] != 0).any()
    assert grown


# --- saving and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [0, 14])
@pytest.mark.parametrize("order", ["model first", "attach first", "optimizer first"])
def test_goes_on_bit_for_bit_in_whatever_order_it_is_loaded(order: str, made: int) -> None:
    """To attach draws a mask, which must not be laid over the weights of a checkpoint; with another seed at that."""
    method = RigL(0.4, every=3, until=40)
    model, optimizer, keeper = attached(method, "adamw", seed=1)
    for step in range(made):
        learn(model, optimizer, step)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for step in range(made, 30):
        learn(model, optimizer, step)

    other = network(seed=5)
    theirs = OPTIMIZERS["adamw"](other.parameters())
    if order == "model first":
        if made == 0:  # what the checkpoint was made of: the weights before the mask
            other = network()
            theirs = OPTIMIZERS["adamw"](other.parameters())
        other.load_state_dict(saved[0] if made else other.state_dict())
    again = attach(method, other, theirs)
    if order == "attach first":
        other.load_state_dict(saved[0])
    theirs.load_state_dict(saved[1])
    if order == "optimizer first":
        other.load_state_dict(saved[0])
    for step in range(made, 30):
        learn(other, theirs, step)
    same(dict(other.state_dict()), dict(model.state_dict()))
    same(again.state, keeper.state)


def test_a_dense_checkpoint_stays_masked() -> None:
    model = network()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    learn(model, optimizer, 0)
    dense = optimizer.state_dict()
    keeper = attach(SET(0.3), model, optimizer)
    with pytest.warns(UserWarning, match="holds nothing of set"):
        optimizer.load_state_dict(dense)
    for name, mask in keeper.state.mask.items():
        assert (dict(model.named_parameters())[name][~mask] == 0).all()


def test_half_precision_keeps_its_types() -> None:
    model = network().to(torch.bfloat16)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    keeper = attach(RigL(0.5, every=2, until=None), model, optimizer)
    kinds = [leaf.dtype for leaf in torch.utils._pytree.tree_leaves(keeper.state)]
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(7, 2, 6, 6).bfloat16()).square().sum().backward()
        optimizer.step()
    assert [leaf.dtype for leaf in torch.utils._pytree.tree_leaves(keeper.state)] == kinds
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


# --- beside others, and compiled ------------------------------------------------------------------------------------


def test_put_last_it_keeps_absent_weights_zero_beside_a_method_that_replaces_units() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    others = attach(ContinualBackprop(0.2, 2), model, optimizer, example=torch.randn(4, 6))
    keeper = attach(SET(0.4, every=3), model, optimizer)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
        for name, mask in keeper.state.mask.items():
            assert (dict(model.named_parameters())[name][~mask] == 0).all()
    assert sum(others.replaced().values())


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("method", METHODS[:2], ids=lambda m: m.name)
def test_compiled_lanes_keep_their_zeros(method: SparseTraining) -> None:
    lanes = [Lane(s, RULES["adamw"], (method,)) for s in range(4)]
    population = populate(lanes, Table(batch=3), dtype=torch.float32, compiled=True)
    for _ in range(30):
        population.advance(1)
        for name, mask in population.state.methods[1].mask.items():
            assert (population.state.params[name][~mask] == 0).all()
