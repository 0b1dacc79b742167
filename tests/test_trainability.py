"""Trainability against plain training loops, and what it must leave alone."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perennial
from perennial.methods import PROBES, REGISTRY, SGD, UPGD, Adam, ContinualBackprop, Rule
from perennial.modules import OnlineNorm
from perennial.noise import seed_key
from perennial.statistics import estimate
from perennial.trainability import Learning, Trainability, learning, trainability, warm_start_gap
from perennial.trainability.compare import _labels
from perennial.trainability.lanes import Lanes
from perennial.trainability.results import paired

SAMPLES, INPUTS, CLASSES = 30, 6, 3
QUICK: dict[str, Any] = {"steps": 10, "batch_size": 8, "seeds": 2, "every": 1, "progress": False}


pytestmark = pytest.mark.usefixtures("in_double")


def online() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 16), OnlineNorm(16, 0.9, 0.8), nn.ReLU(), nn.Linear(16, CLASSES))


def mlp(outputs: int = CLASSES) -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 16), nn.ReLU(), nn.Linear(16, outputs))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, CLASSES)
    )  # fmt: skip


class Branching(nn.Module):
    """An MLP whose flow depends on its data, which vmap cannot run."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if float(x.abs().sum()) >= 0 else x


class Tied(nn.Module):
    """A weight that two layers share, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = (nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, 3))
        self.second.weight = self.first.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.second(self.first(x).relu()).relu())
        return found


class Unknown(nn.Module):
    """A layer whose weight was drawn where nobody can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.strange = nn.Parameter(torch.rand(INPUTS, CLASSES).sort(0).values)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.strange


class Kept:
    """A factory that keeps what it made."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.make, self.made = make, []  # type: ignore[var-annotated]

    def __call__(self) -> nn.Module:
        self.made.append(self.make())
        return copy.deepcopy(self.made[-1])


def inputs(*shape: int, samples: int = SAMPLES) -> Tensor:
    return torch.randn(samples, *(shape or (INPUTS,)), generator=torch.Generator().manual_seed(1))


# --- stated anew ------------------------------------------------------------------------------------------------------


def rng(seed: int, purpose: str) -> torch.Generator:
    high, low = seed_key(seed, purpose)
    return torch.Generator().manual_seed(((high % 2**32) << 32) + low % 2**32)


def order(seed: int, purpose: str, pool: Tensor, steps: int, size: int) -> Tensor:
    """The samples of every batch, [steps, batch]."""
    draws = rng(seed, purpose)
    epochs = [pool[torch.randperm(len(pool), generator=draws)] for _ in range(steps * size // len(pool) + 1)]
    return torch.cat(epochs)[: steps * size].view(steps, size)


def labels(seed: int, classes: int = CLASSES, samples: int = SAMPLES) -> Tensor:
    return torch.randint(classes, (samples,), generator=rng(seed, "labels"))


def loop(net: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, batches: Tensor, loss: Any) -> np.ndarray:
    """An ordinary training loop: the loss of each step, and the final one of all samples."""
    found = []
    net.train()
    for batch in batches:
        opt.zero_grad()
        value = loss(net(x[batch]), y[batch])
        value.backward()
        opt.step()
        found.append(value.item())
    net.eval()
    with torch.no_grad():
        return np.array([*found, loss(net(x), y).item()])


def both(result: Trainability, seed: int) -> tuple[np.ndarray, np.ndarray]:
    aged, fresh = (np.append(side.curve[seed], side.final_loss[seed]) for side in (result.aged, result.fresh))
    return aged, fresh


OPTIMIZERS: dict[str, tuple[Rule, Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (
        SGD(lr=0.05, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    ),
    "adam": (Adam(lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "make", [mlp, conv, Branching, Tied, online], ids=["mlp", "batch norm", "one by one", "tied", "online norm"]
)
def test_a_lane_is_a_plain_training_loop(make: Callable[[], nn.Module], name: str) -> None:
    rule, plain = OPTIMIZERS[name]
    x = inputs(1, 6, 6) if make is conv else inputs()
    model, factory = make(), Kept(make)
    if make is conv:  # statistics of a life before
        model(3 + inputs(1, 6, 6))
    result = trainability(model, x, factory=factory, optimizer=rule, **QUICK)
    assert (result.one_by_one is not None) == (make is Branching)
    for seed in range(2):
        batches = order(seed, "data", torch.arange(SAMPLES), 10, 8)
        for net, found in zip((model, factory.made[seed]), both(result, seed), strict=True):
            mine = copy.deepcopy(net)
            expected = loop(mine, plain(mine.parameters()), x, labels(seed), batches, F.cross_entropy)
            np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_given_targets_and_a_loss_of_ones_own() -> None:
    x, y, model, factory = inputs(), torch.randn(SAMPLES, 2), mlp(2), Kept(lambda: mlp(2))
    rule, plain = OPTIMIZERS["sgd"]
    for loss in (None, F.l1_loss):
        factory.made.clear()
        result = trainability(model, x, y, loss=loss, factory=factory, optimizer=rule, **QUICK)
        assert (result.task, result.one_by_one) == ("given", None)
        batches = order(1, "data", torch.arange(SAMPLES), 10, 8)
        for net, found in zip((model, factory.made[1]), both(result, 1), strict=True):
            mine = copy.deepcopy(net)
            expected = loop(mine, plain(mine.parameters()), x, y, batches, loss or F.mse_loss)
            np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_a_teacher_is_a_fresh_network_with_standardised_outputs() -> None:
    x, model, factory = 5 * inputs(), mlp(2), Kept(lambda: mlp(2))
    result = trainability(model, x, task="teacher", factory=factory, optimizer=SGD(lr=0.01), **QUICK)
    teachers, starts = factory.made[:2], factory.made[2:]
    weights = [net[0].weight for net in (*teachers, *starts)]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    for seed in range(2):
        with torch.no_grad():
            y = teachers[seed](x)
        y = (y - y.mean(0)) / y.var(0, correction=0).sqrt()
        mine = copy.deepcopy(starts[seed])
        batches = order(seed, "data", torch.arange(SAMPLES), 10, 8)
        expected = loop(mine, torch.optim.SGD(mine.parameters(), lr=0.01), x, y, batches, F.mse_loss)
        np.testing.assert_allclose(both(result, seed)[1], expected, rtol=1e-10)


def test_a_model_vmap_cannot_run_gives_the_same_numbers_one_by_one() -> None:
    model = Branching()
    alone = trainability(model, inputs(), **QUICK)
    together = trainability(model.net, inputs(), factory=None, **QUICK)
    assert together.one_by_one is None
    assert alone.one_by_one is not None
    assert "vmap" in alone.one_by_one
    assert alone.one_by_one in str(alone)
    np.testing.assert_allclose(alone.aged.curve, together.aged.curve, rtol=1e-12)
    np.testing.assert_allclose(alone.aged.final_loss, together.aged.final_loss, rtol=1e-12)


def test_warm_start_gap_is_two_plain_training_loops() -> None:
    x, y = inputs(), torch.randint(CLASSES, (SAMPLES,))
    test = inputs(samples=50), torch.randint(CLASSES, (50,))
    factory = Kept(mlp)
    options = {**QUICK, "steps": (12, 9), "share": 0.4, "optimizer": SGD(lr=0.2, momentum=0.9)}
    result = warm_start_gap(factory, x, y, test=test, **options)
    assert (result.measure, result.one_by_one) == ("accuracy", None)

    def trained(net: nn.Module, batches: Tensor) -> np.ndarray:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
        return loop(net, optimizer, x, y, batches, F.cross_entropy)

    def accuracy(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(test[0]).argmax(1) == test[1]).double().mean())

    for seed in range(2):
        start = factory.made[1 + seed]  # the first shows the shapes
        permuted = torch.randperm(SAMPLES, generator=rng(seed, "share"))
        batches = order(seed, "data", permuted, 9, 8)
        warm, fresh = copy.deepcopy(start), copy.deepcopy(start)
        trained(warm, order(seed, "first", permuted[:12], 12, 8))
        for net, side, score in ((warm, result.warm, result.warm_test), (fresh, result.fresh, result.fresh_test)):
            expected = trained(net, batches)
            np.testing.assert_allclose(np.append(side.curve[seed], side.final_loss[seed]), expected, rtol=1e-10)
            assert score[seed] == pytest.approx(accuracy(net), abs=1e-7)
    difference = result.fresh_test - result.warm_test
    assert result.gap.mean == pytest.approx(difference.mean())
    assert "fresh minus warm" in str(result)


def test_warm_start_gap_of_a_regression_is_of_the_loss() -> None:
    x, y = inputs(), torch.randn(SAMPLES, 2)
    result = warm_start_gap(lambda: mlp(2), x, y, test=(x, y), **{**QUICK, "steps": (6, 6)})
    assert result.measure == "loss"
    np.testing.assert_allclose(result.warm_test, result.warm.final_loss, rtol=1e-12)
    np.testing.assert_allclose(result.fresh_test, result.fresh.final_loss, rtol=1e-12)


def test_evaluation_in_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, model, options = inputs(), torch.randn(SAMPLES, 2), mlp(2), {**QUICK, "steps": 2}
    whole = [trainability(model, x, y, **options), trainability(model, x, task="teacher", **options)]
    monkeypatch.setattr(learning, "TOGETHER", 4)  # parts of a batch, 8, of which the last holds 6 samples
    monkeypatch.setattr(sys.modules["perennial.trainability.compare"], "TOGETHER", 4)
    parts = [trainability(model, x, y, **options), trainability(model, x, task="teacher", **options)]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.fresh.final_loss, other.fresh.final_loss, rtol=1e-12)
        np.testing.assert_allclose(one.aged.final_loss, other.aged.final_loss, rtol=1e-12)


# --- pairs ------------------------------------------------------------------------------------------------------------


def noisy() -> nn.Module:
    return nn.Sequential(
        nn.Dropout(0.2), nn.Linear(INPUTS, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, CLASSES)
    )


RULES = [rule for rule in REGISTRY if issubclass(rule, Rule) and not rule().needs]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_same_weights_have_no_gap_under_any_rule(rule: type[Rule]) -> None:
    """Data, labels, dropout and the rule's noise are shared: nothing differs, to the bit."""
    model = noisy()
    result = trainability(model, inputs(), factory=lambda: copy.deepcopy(model), optimizer=rule(), **QUICK)
    assert result.one_by_one is None
    assert np.array_equal(result.aged.curve, result.fresh.curve)
    assert result.gap == (0.0, 0.0, 0.0, 2)
    assert result.area.mean == result.final_loss.mean == 0.0
    assert not np.array_equal(result.aged.curve[0], result.aged.curve[1]), "seeds differ"


def test_dropout_is_shared_by_a_pair_and_differs_between_seeds() -> None:
    class Mask(nn.Module):
        def __init__(self, branch: bool) -> None:
            super().__init__()
            self.scale, self.branch = nn.Parameter(torch.ones(1)), branch

        def forward(self, x: Tensor) -> Tensor:
            if self.branch:
                float(x.sum())
            return F.dropout(x, 0.5, self.training) * self.scale

    targets, ones, weight = torch.zeros(SAMPLES, INPUTS), torch.ones(SAMPLES, INPUTS), torch.rand(SAMPLES, INPUTS)
    for branch in (False, True):
        result = trainability(
            Mask(branch),
            ones,
            targets,
            loss=lambda o, t: (o * weight[: len(o)]).mean(),
            factory=lambda branch=branch: Mask(branch),
            optimizer=SGD(lr=0.0),
            **{**QUICK, "seeds": 5, "steps": 3},
        )
        assert (result.one_by_one is not None) == branch
        assert np.array_equal(result.aged.curve, result.fresh.curve)
        assert len(set(result.aged.curve.flat)) == 15, "every seed has masks of its own, and every step"
        np.testing.assert_allclose(result.aged.final_loss, float(weight.mean()), err_msg="no dropout in the evaluation")


def test_a_fresh_network_is_as_trainable_as_fresh_networks() -> None:
    torch.set_default_dtype(torch.float32)
    options = {"steps": 60, "batch_size": 16, "seeds": 12, "progress": False, "optimizer": Adam(lr=0.01)}
    result = trainability(mlp(), inputs(), **options)
    assert result.gap.low < 0 < result.gap.high
    assert result.gap.seeds == 12
    assert "neither worse nor better" in str(result)
    assert result.fresh.final_loss.mean() < result.fresh.curve[:, 0].mean()


@pytest.mark.parametrize("task", ["random_labels", "teacher"])
def test_a_network_of_dead_units_learns_worse(task: str) -> None:
    torch.set_default_dtype(torch.float32)
    model = mlp()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)
    options = {"steps": 60, "batch_size": 16, "seeds": 5, "progress": False, "optimizer": Adam(lr=0.01)}
    result = trainability(model, inputs(), task=task, **options)
    assert result.gap.low > 0.05
    assert result.final_loss.low > 0
    assert "learn worse than fresh ones" in str(result)
    assert np.isnan(result.aged.steps_to(result.target)).all()
    assert "never reached against" in str(result)
    middle = (result.fresh.curve[:, 0].mean() + result.fresh.curve[:, -1].mean()) / 2
    assert result.target == pytest.approx(middle)


def test_fresh_weights_are_drawn_as_the_layers_draw_theirs() -> None:
    model = nn.Sequential(nn.Linear(INPUTS, 400), nn.BatchNorm1d(400), nn.ReLU(), nn.Linear(400, CLASSES))
    model(7 + inputs())
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(9)
    seen: list[Lanes] = []
    made = Lanes.__init__

    def look(self: Lanes, *args: Any) -> None:
        made(self, *args)
        seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lanes, "__init__", look)
        trainability(model, inputs(), optimizer=SGD(lr=0.0), **{**QUICK, "steps": 1})
    state = seen[0].state
    for name, bound in (("0.weight", INPUTS**-0.5), ("3.weight", 400**-0.5), ("0.bias", INPUTS**-0.5)):
        aged, fresh = state.params[name][::2], state.params[name][1::2]
        assert bool((aged == 9).all())
        assert not torch.equal(fresh[0], fresh[1])
        assert fresh.abs().max() <= bound
        assert float(fresh.std()) == pytest.approx(bound / 3**0.5, rel=0.15)
    assert bool((state.params["1.weight"][1::2] == 1).all())
    assert bool((state.params["1.bias"][1::2] == 0).all())
    mean = state.buffers["1.running_mean"]
    assert mean[0].abs().mean() > 10 * mean[1].abs().mean(), "the aged statistics are the aged network's"
    assert state.buffers["1.num_batches_tracked"].tolist() == [2, 1, 2, 1]


def test_what_is_frozen_is_neither_trained_nor_redrawn_nor_copied() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    started = copy.deepcopy(model)
    states = []
    with pytest.MonkeyPatch.context() as patch:
        step = Lanes.step
        patch.setattr(Lanes, "step", lambda self, *a: (step(self, *a), states.append(self.state))[0])
        trainability(model, inputs(), **QUICK)
        assert list(states[-1].params) == ["2.weight", "2.bias"]
        assert not states[-1].fixed
        trainability(model, inputs(), factory=mlp, **QUICK)
        assert list(states[-1].fixed) == ["0.weight", "0.bias"]
        assert torch.equal(states[-1].fixed["0.weight"][2], started[0].weight)
        assert not torch.equal(states[-1].fixed["0.weight"][1], states[-1].fixed["0.weight"][3])


def test_a_lane_that_diverges_disturbs_no_other() -> None:
    x, model, factory = inputs(), mlp(), mlp
    good = trainability(model, x, factory=factory, **QUICK)
    with torch.no_grad():
        model[0].weight.mul_(1e200)
        model[2].weight.mul_(1e200)
    result = trainability(model, x, factory=factory, **QUICK)
    assert result.aged.diverged.tolist() == [1, 1]
    assert result.fresh.diverged.tolist() == [-1, -1]
    assert np.isnan(result.aged.curve).all()
    assert np.isnan(result.aged.area).all()
    assert np.isnan(result.aged.final_loss).all()
    np.testing.assert_allclose(result.fresh.curve, good.fresh.curve, rtol=1e-12)
    assert result.gap.seeds == 0
    assert "no pair has finished" in str(result)
    assert "aged networks of seeds 0, 1" in str(result)


def steep(output: Tensor, _: Tensor) -> Tensor:
    """Not finite from an output of 3 on, while its gradient is."""
    return torch.where(output.mean() > 3, torch.inf, 0.0) - output.mean()


def zero() -> nn.Module:
    net = nn.Linear(INPUTS, 1, bias=False)
    nn.init.zeros_(net.weight)
    return net


def test_divergence_is_dated_and_what_came_before_stays() -> None:
    states, step = [], Lanes.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lanes, "step", lambda self, *a: (step(self, *a), states.append(self.state))[0])
        options = {**QUICK, "every": 2, "optimizer": SGD(lr=0.1), "loss": steep}
        result = trainability(zero(), torch.ones(SAMPLES, INPUTS), torch.zeros(SAMPLES, 1), factory=zero, **options)
    # The output is 0.6 x steps made: above 3 first when six are made, so at the loss of the seventh step.
    assert result.aged.diverged.tolist() == [7, 7]
    np.testing.assert_allclose(result.aged.curve[0], [-0.3, -1.5, -2.7, np.nan, np.nan])
    assert np.isnan(result.aged.final_loss).all()
    torch.testing.assert_close(states[-1].params["weight"], torch.full((4, 1, INPUTS), 0.6))


def test_a_warm_start_that_diverges_in_its_first_training() -> None:
    x, y = torch.ones(SAMPLES, INPUTS), torch.zeros(SAMPLES, 1)
    options = {**QUICK, "steps": (8, 3), "optimizer": SGD(lr=0.1), "loss": steep}
    result = warm_start_gap(zero, x, y, test=(x, y), **options)
    assert result.warm.diverged.tolist() == [0, 0]
    assert result.fresh.diverged.tolist() == [-1, -1]
    np.testing.assert_allclose(result.fresh_test, [-1.8, -1.8])
    assert np.isnan(result.warm_test).all()
    assert "over 0 seeds (2 left out, in which a network diverged)" in str(result)


# --- left alone -------------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> list[Any]:
    found: list[Any] = [torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"]]
    found += [np.random.get_state(legacy=False)["state"]["pos"]]
    for tensor in (*model.parameters(), *model.buffers()):
        found += [id(tensor), tensor.detach().clone(), tensor._version, tensor.requires_grad, tensor.grad]
        found += [None if tensor.grad is None else tensor.grad.clone()]
    for module in model.modules():
        found += [module.training, {k: dict(v) for k, v in vars(module).items() if k.endswith("_hooks")}]
        found += [sorted(vars(module))]
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)


@pytest.mark.parametrize("branching", [False, True])
def test_the_model_and_the_generators_are_left_alone(branching: bool) -> None:
    class Rolling(nn.Module):
        """Draws from every generator; keeps what it saw."""

        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            if branching:
                float(x.sum())
            return x + 0.01 * torch.randn_like(x) * random.random() * np.random.rand()

    model = nn.Sequential(Rolling(), noisy())
    model(inputs()).sum().backward()
    seen = model[0].seen
    model.eval()
    model[1][2].train()
    calls: list[Any] = []
    model[1][1].register_forward_hook(lambda *_: calls.append(1))
    model[1][1].weight.register_hook(lambda g: calls.append(2))
    data, before = inputs(), snapshot(model)
    kept = data.clone()
    teaching = {"factory": lambda: nn.Sequential(Rolling(), noisy()), "task": "teacher"}
    with pytest.warns(UserWarning, match=r"hooks do not run .* module '1.1' has one"):
        result = trainability(model, data, **QUICK)
    with pytest.warns(UserWarning, match="hooks do not run"):
        other = trainability(model, data, **teaching, **QUICK)
    assert (result.one_by_one is not None) == (other.one_by_one is not None) == branching
    assert all(same(a, b) for a, b in zip(before, snapshot(model), strict=True))
    assert not calls
    assert model[0].seen is seen
    assert torch.equal(data, kept)


def test_the_factory_of_a_warm_start_may_give_a_model_in_use() -> None:
    model, x, y = noisy(), inputs(), torch.randint(CLASSES, (SAMPLES,))
    before = snapshot(model)
    warm_start_gap(lambda: model, x, y, test=(x, y), **{**QUICK, "steps": (3, 3)})
    assert all(same(a, b) for a, b in zip(before, snapshot(model), strict=True))


def test_it_is_a_pure_function_of_seeds() -> None:
    model = noisy()
    first = trainability(model, inputs(), **QUICK)
    torch.randn(5)
    again = trainability(model.eval(), inputs(), **QUICK)
    assert np.array_equal(first.aged.curve, again.aged.curve)
    assert np.array_equal(first.fresh.final_loss, again.fresh.final_loss)
    plain = mlp()
    many = trainability(plain, inputs(), **{**QUICK, "seeds": (4, 0, 7)})
    one = trainability(plain, inputs(), **{**QUICK, "seeds": (7,)})
    np.testing.assert_allclose(many.fresh.curve[2], one.fresh.curve[0], rtol=1e-12)
    assert "one pair" in str(one)


def test_a_model_that_perennial_keeps_and_one_that_is_compiled() -> None:
    model = mlp()
    plain = trainability(model, inputs(), **QUICK)
    wrapped = trainability(torch.compile(model), inputs(), **QUICK)
    keeper = perennial.attach(
        ContinualBackprop(), model, torch.optim.SGD(model.parameters(), lr=0.1), example=inputs()
    )  # fmt: skip
    kept = trainability(model, inputs(), **QUICK)  # no warning: warnings are errors here
    keeper.remove()
    assert np.array_equal(plain.aged.curve, wrapped.aged.curve)
    assert np.array_equal(plain.aged.curve, kept.aged.curve)


def test_hooks_of_torch_that_make_a_weight_go_along() -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(INPUTS, 8)), nn.ReLU(), nn.Linear(8, CLASSES))

    model = normed()
    model(inputs())  # leaves a weight that is no leaf, and that does not copy
    factory = Kept(normed)
    result = trainability(model, inputs(), factory=factory, optimizer=SGD(lr=0.1), **QUICK)
    batches = order(0, "data", torch.arange(SAMPLES), 10, 8)
    mine = factory.made[0]
    expected = loop(mine, torch.optim.SGD(mine.parameters(), lr=0.1), inputs(), labels(0), batches, F.cross_entropy)
    np.testing.assert_allclose(both(result, 0)[1], expected, rtol=1e-8)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_random_labels_are_uniform_and_others_for_each_seed() -> None:
    out = torch.zeros(2, 10)
    drawn = torch.stack([_labels(out, None, 3000, seed) for seed in range(4)])
    assert torch.equal(drawn[2], labels(2, 10, 3000))
    counts = torch.stack([row.bincount(minlength=10) for row in drawn])
    chi_square = ((counts - 300) ** 2 / 300).sum(1)
    assert float(chi_square.max()) < 30, "9 degrees of freedom: 27.9 is the 0.999 quantile"
    agreement = (drawn[0] == drawn[1]).double().mean()
    assert float(agreement) == pytest.approx(0.1, abs=0.03)
    assert int(_labels(out, 4, 500, 0).max()) == 3


def learnt(curve: list[list[float]], steps: tuple[int, ...] = (10, 20, 25)) -> Learning:
    found = np.array(curve)
    return Learning(np.array(steps), found, found[:, -1], np.where(np.isfinite(found[:, -1]), -1, 21))


def test_area_and_steps_to_target() -> None:
    side = learnt([[3.0, 2.0, 1.0], [1.0, 4.0, 4.0], [3.0, 1.5, np.nan], [9.0, 9.0, 9.0]])
    np.testing.assert_allclose(side.area, [55 / 25, 70 / 25, np.nan, 9.0])
    np.testing.assert_array_equal(side.steps_to(2.0), [20, 10, 20, np.nan])
    np.testing.assert_array_equal(side.steps_to(0.5), [np.nan] * 4)
    np.testing.assert_array_equal(side.steps_to(np.nan), [np.nan] * 4)


def test_differences_are_paired_and_leave_out_what_is_missing() -> None:
    aged = learnt([[4.0, 4.0, 2.0], [4.0, 2.0, 2.0], [4.0, 4.0, 4.0], [4.0, 4.0, np.nan]])
    fresh = learnt([[4.0, 2.0, 1.0], [4.0, 2.0, 2.0], [2.0, 1.0, 1.0], [2.0, 1.0, 1.0]])
    result = Trainability("given", (3, 5, 6, 9), aged, fresh, 2.0, None)
    assert result.final_loss[::3] == pytest.approx(((1 + 0 + 3) / 3, 3))
    assert result.steps_to_target[::3] == pytest.approx((2.5, 2)), "the third never got there, the fourth diverged"
    areas = [(90 / 65) - 1, 0.0, 100 / 35 - 1]
    assert result.gap[::3] == pytest.approx((np.mean(areas), 3))
    assert result.area[::3] == pytest.approx((np.mean([1, 0, 2.6]), 3))
    text = str(result)
    assert "Diverged, and left out: aged networks of seeds 9." in text
    assert "Steps to a loss of 2: 22.5 (never in 2 of 4) against 15." in text
    assert "the task given, 4 seeds, 25 steps" in text


def test_verdicts() -> None:
    flat = learnt([[1.0, 1.0, 1.0]] * 3)
    worse = learnt([[2.0, 2.0, 2.0], [2.2, 2.2, 2.2], [1.9, 1.9, 1.9]])
    seeds = (0, 1, 2)
    assert "learn worse" in str(Trainability("given", seeds, worse, flat, 1.5, None))
    assert "learn better" in str(Trainability("given", seeds, flat, worse, 1.5, None))
    assert "neither" in str(Trainability("given", seeds, flat, flat, 1.5, None))
    assert "The fresh networks did not learn" in str(Trainability("given", seeds, worse, flat, 1.5, None))
    assert "why" in str(Trainability("given", seeds, worse, flat, 1.5, "why"))


def test_intervals_are_those_of_reports() -> None:
    values = np.random.default_rng(0).normal(size=9)
    expected = estimate(values[:, None])
    found = paired(values)
    assert found[:3] == pytest.approx((expected.mean[0], expected.low[0], expected.high[0]), rel=1e-12)
    assert np.isnan(paired(values[:1])[1:3]).all()
    assert paired(np.array([np.nan]))[3] == 0
    assert str(paired(values[:1])) == f"{values[0]:.3g}"


def test_table_figure_and_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(learning, "_PATIENCE", -1.0)
    model = mlp()
    result = trainability(model, inputs(), target=1.0, **{**QUICK, "every": 4, "progress": True})
    assert not capsys.readouterr().err, "no terminal, nobody to show it to"
    monkeypatch.setenv("FORCE_COLOR", "1")
    single = trainability(model, inputs(), **{**QUICK, "progress": True})
    assert "trainability" in capsys.readouterr().err
    assert result.steps.tolist() == [4, 8, 10]
    parts = [single.aged.curve[:, :4], single.aged.curve[:, 4:8], single.aged.curve[:, 8:]]
    np.testing.assert_allclose(result.aged.curve, np.stack([part.mean(1) for part in parts], 1), rtol=1e-12)
    np.testing.assert_allclose(result.aged.area, single.aged.curve.mean(1), rtol=1e-12)
    table = result.table()
    assert table.columns == ["seed", "weights", "metric", "step", "value"]
    assert table.height == 2 * 2 * (3 + 3)
    row = table.filter((table["seed"] == 1) & (table["weights"] == "fresh") & (table["metric"] == "online_loss"))
    assert row["value"].to_list() == result.fresh.curve[1].tolist()
    never = Trainability("given", (0,), learnt([[1.0, 1, 1]]), learnt([[1.0, 1, 1]]), 0.5, None).table()
    assert never.filter(never["metric"] == "steps_to_target")["value"].to_list() == [None, None]
    result.plot(tmp_path / "curves.svg")
    assert "aged weights" in (tmp_path / "curves.svg").read_text()
    result.plot(str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_it_needs_torch_and_numpy_only() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import perennial.trainability; "
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new & {'scipy', 'polars', 'matplotlib', 'rich', 'jinja2', 'pandas'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- errors -----------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.net(x), 1


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, None]


def frozen() -> nn.Module:
    return mlp().requires_grad_(False)


TARGETS = torch.zeros(SAMPLES, CLASSES)
ERRORS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "task": (mlp, {"task": "labels"}, "task is 'labels'; it is one of random_labels, teacher, given"),
    "targets beside": (mlp, {"task": "teacher", "targets": TARGETS}, "'teacher', and targets are given; leave one"),
    "targets missing": (mlp, {"task": "given"}, "task is 'given', and targets are missing; give targets="),
    "optimizer": (mlp, {"optimizer": torch.optim.Adam}, "it is a rule of perennial.methods, such as Adam"),
    "needs": (mlp, {"optimizer": UPGD(order=2)}, "upgd with these settings needs curvature, but"),
    "units": (mlp, {"optimizer": UPGD(granularity="feature")}, "feature-wise UPGD gates hidden units"),
    "intervention": (mlp, {"optimizer": PROBES[0]()}, "it is a rule of perennial.methods"),
    "steps": (mlp, {"steps": 0}, "steps is 0; it must be at least 1"),
    "every": (mlp, {"every": 0}, "every is 0; it must be at least 1"),
    "batch": (mlp, {"batch_size": 31}, "batch_size is 31; it must be at least 1 and at most the 30 samples"),
    "no seeds": (mlp, {"seeds": 0}, "seeds is 0; give a number of seeds from 1, or different whole numbers"),
    "two alike": (mlp, {"seeds": (1, 1)}, r"seeds is \(1, 1\); give"),
    "negative": (mlp, {"seeds": (-1,)}, r"seeds is \(-1,\); give"),
    "output": (Pair, {}, "the model returns a tuple; wrap it"),
    "dimensions": (Sequence, {}, r"random labels need outputs \[batch, classes\], but the model's are \[8, 1, 3\]"),
    "one output": (lambda: mlp(1), {}, "there would be 1 classes of random labels; .* take the task 'teacher'"),
    "classes": (mlp, {"classes": 4}, "there would be 4 classes of random labels; .* at most the model's 3 outputs"),
    "unknown": (Unknown, {}, "how strange was drawn is not known, .* give factory="),
    "factory": (mlp, {"factory": lambda: mlp(4)}, r"its 2.weight is \[4, 16\], where the model's is \[3, 16\]; give"),
    "factory less": (mlp, {"factory": lambda: nn.Linear(6, 3)}, r"0.weight is missing, where the model's is \[16, 6\]"),
    "no module": (mlp, {"factory": lambda: 3}, r"factory\(\) gives a int; it must give a module"),
    "frozen": (frozen, {}, "the model has no parameter that requires a gradient"),
    "samples": (mlp, {"targets": TARGETS[:20]}, r"there are 30 samples of inputs, but targets of shape \[20, 3\]"),
    "shape": (mlp, {"targets": TARGETS[:, :1]}, r"outputs of shape \[8, 3\] do not fit targets of shape \[8, 1\]"),
    "kind": (
        mlp,
        {"targets": TARGETS.long()},
        r"outputs of shape \[8, 3\] do not fit .* classes are integers \[batch\]",
    ),
    "loss": (mlp, {"loss": lambda o, t: o.sum(1)}, r"loss gives the shape \[8\] for a batch; it must give the mean"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_do(name: str) -> None:
    make, options, message = ERRORS[name]
    with pytest.raises((ValueError, TypeError), match=message):
        trainability(make(), inputs(), **{**QUICK, **options})


def test_a_teacher_that_says_nothing() -> None:
    def dead() -> nn.Module:
        net = mlp()
        nn.init.constant_(net[0].weight, 0.0)
        return net

    with pytest.raises(ValueError, match="an output of the teacher of seed 0 is the same for all samples"):
        trainability(mlp(), inputs(), task="teacher", factory=dead, **QUICK)


def test_an_error_of_the_model_itself_comes_through() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = mlp(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 3:
                raise RuntimeError("out of calls")
            return self.net(x)

    with pytest.raises(RuntimeError, match="out of calls"):
        trainability(Late(), inputs(), **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.2}, "share is 0.2, which of 30 samples makes 6; .* must hold a batch of 8"),
        ({"share": 1.0}, "share is 1, which of 30 samples makes 30; it lies between 0 and 1"),
        ({"steps": (5, 0)}, "steps is 0; it must be at least 1"),
        ({"test": (inputs(), torch.zeros(3))}, "test has 30 inputs and 3 targets"),
    ],
)
def test_errors_of_warm_starts(options: dict[str, Any], message: str) -> None:
    x, y = inputs(), torch.zeros(SAMPLES, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        warm_start_gap(mlp, x, y, **{**QUICK, "steps": (5, 5), "test": (x, y), **options})
