"""Many runs as one program: each as if it were alone."""

from __future__ import annotations

import math
from typing import Any

import polars
import pytest
import torch
from references import SIZES, Table, lane, populate, same
from torch import Tensor, nn
from torch.nn import functional as F

from perennial import MLP, SGD, UPGD, Adam, ContinualBackprop, Lane, PermutedDigits, Population, ShrinkAndPerturb
from perennial.population import METRICS
from perennial.streams import SlowlyChangingRegression

OFTEN = ContinualBackprop(0.05, 5)


def sgd(seed: int, lr: float = 0.02) -> Lane:
    return Lane(seed, SGD(lr=lr), (OFTEN,))


# --- divergence -----------------------------------------------------------------------------------------------------


def breaking_step(seed: int, lr: float, dtype: torch.dtype, start: dict[str, Tensor]) -> int:
    """The first step at which the loss or a weight of plain gradient descent is not finite."""
    model = MLP(hidden=SIZES[1:-1]).build(SIZES[0], SIZES[-1]).to(dtype)
    model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    x, y = (torch.tensor(t, dtype=dtype) for t in Table().rows(seed))
    for step in range(100):
        optimizer.zero_grad()
        loss = ((model(x[step]) - y[step]) ** 2).sum(-1).mean()
        loss.backward()
        optimizer.step()
        if not all(torch.isfinite(t).all() for t in (loss, *model.parameters())):
            return step
    raise AssertionError("it did not diverge")


@pytest.mark.parametrize("pieces", [[30], [1] * 30, [3, 20, 7]], ids=str)
@pytest.mark.parametrize(("lr", "dtype"), [(1e12, torch.float32), (1e12, torch.float64), (1e3, torch.float64)])
def test_a_diverging_lane_is_reported_frozen_and_disturbs_no_other(
    lr: float, dtype: torch.dtype, pieces: list[int]
) -> None:
    lanes = [Lane(0, SGD(lr=0.02)), Lane(1, SGD(lr=lr)), Lane(2, SGD(lr=0.02))]
    with_it, without = populate(lanes, dtype=dtype), populate([lanes[0]] * 2 + [lanes[2]], dtype=dtype)
    at = breaking_step(1, lr, dtype, lane(with_it, 1).params)
    assert 0 < at < 25
    for steps in pieces:
        with_it.advance(steps)
        expected = at if with_it.steps_made > at else -1
        assert with_it.state.diverged.tolist() == [-1, expected, -1]
    without.advance(30)
    for number in (0, 2):
        same(lane(with_it, number), lane(without, number))
    frozen = lane(with_it, 1)
    assert int(frozen.step) == 30
    values = with_it.collect(30)["online_loss"]
    assert torch.isnan(values).tolist() == [False, True, False]
    for name, value in with_it.measure(samples=20).items():
        assert torch.isnan(value).tolist() == [False, True, False], name
    with_it.advance(5)
    same(lane(with_it, 1).params, frozen.params)
    same(lane(with_it, 1).methods, frozen.methods)
    assert int(lane(with_it, 1).diverged) == at
    assert math.isnan(with_it.collect(5)["online_loss"][1]), "diverged once, diverged for good"


@pytest.mark.parametrize("methods", [
    (Adam(lr=1e200),), (SGD(lr=1e6), OFTEN), (UPGD(lr=1e6),), (SGD(), ShrinkAndPerturb(noise_std=1e200))
], ids=lambda methods: methods[-1].name)  # fmt: skip
def test_any_method_may_diverge_and_the_cut_does_not_matter(methods: tuple[Any, ...]) -> None:
    tame = [type(m)() if m is not OFTEN else m for m in methods]
    lanes = [Lane(0, tame[0], tuple(tame[1:])), Lane(1, methods[0], methods[1:])]
    whole, cut = populate(lanes), populate(lanes)
    whole.advance(24)
    for steps in (1, 2, 3, 4, 5, 9):
        cut.advance(steps)
    assert int(whole.state.diverged[0]) == -1
    assert int(whole.state.diverged[1]) >= 0
    for number in (0, 1):
        same(lane(whole, number).params, lane(cut, number).params)
        same(lane(whole, number).methods, lane(cut, number).methods)
    same(whole.state.diverged, cut.state.diverged)
    same(whole.state.replaced, cut.state.replaced)


def test_weights_that_overflow_while_the_loss_is_finite_are_divergence() -> None:
    """A step's loss is from before the step: a lane may not go on with infinite weights that it has not used yet."""
    lanes = [Lane(0, SGD(lr=0.001), (ShrinkAndPerturb(noise_std=std),)) for std in (0.0, 3e38)]
    population = populate(lanes, dtype=torch.float32)
    population.advance(1)
    assert population.state.diverged.tolist() == [-1, 0]
    assert math.isnan(population.collect(1)["online_loss"][1])


# --- how steps are cut, measured, saved -----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [
    Table(), SlowlyChangingRegression(slow_bits=4, fast_bits=2, flip_after=7, target_units=5)
], ids=["table", "regression"])  # fmt: skip
def test_cutting_a_run_changes_no_bit(stream: Any) -> None:
    lanes = [sgd(0), sgd(3)]
    whole, cut, measured = (populate(lanes, stream, dtype=torch.float32) for _ in range(3))
    whole.advance(30)
    for steps in (1, 9, 0, 13, 7):
        cut.advance(steps)
    same(cut.state, whole.state)
    for _ in range(30):
        measured.advance(1)
        measured.measure(samples=10)
    same(measured.state, whole.state)


def test_measure_changes_nothing_and_says_the_same_twice() -> None:
    population = populate([sgd(0), sgd(1)])
    population.advance(10)
    before = {name: leaf.clone() for name, leaf in population.state_dict().items()}
    rng, mode = torch.get_rng_state(), population.model.training
    first, second = population.measure(samples=30), population.measure(samples=30)
    same(first, second)
    same(population.state_dict(), before)
    assert torch.equal(rng, torch.get_rng_state())
    assert population.model.training is mode
    assert set(first) == set(METRICS)
    assert all(value.dtype == torch.float64 and value.shape == (2,) for value in first.values())


def test_what_is_measured() -> None:
    population = populate([sgd(0), sgd(1)])
    population.advance(20)
    values = population.measure(samples=40)
    x = population.feed.probe(20, 40).double().movedim(-1, 0)
    for number in range(2):
        params = lane(population, number).params
        h = torch.relu(x[number] @ params["1.weight"].T + params["1.bias"])
        h2 = torch.relu(h @ params["3.weight"].T + params["3.bias"])
        dead = sum(int((one == 0).all(0).sum()) for one in (h, h2)) / 9
        everything = torch.cat([w.flatten() for w in params.values()])
        share = torch.linalg.svdvals(h2) / torch.linalg.svdvals(h2).sum()
        share = share[share > 1e-8]
        assert float(values["dead_units"][number]) == pytest.approx(dead)
        assert float(values["weight_magnitude"][number]) == pytest.approx(float(everything.abs().mean()))
        rank = float((-(share * share.log()).sum()).exp())
        assert float(values["effective_rank_entropy"][number]) == pytest.approx(rank, rel=1e-5)
        replaced = int(lane(population, number).replaced)
        assert float(values["units_replaced"][number]) == pytest.approx(replaced / 9)


def test_inapplicable_metrics_are_left_out_with_a_reason() -> None:
    smooth = Population(
        lambda: MLP(hidden=(4,), activation="tanh").build(SIZES[0], SIZES[-1]), Table(), [sgd(0)], compiled=False
    )
    smooth.advance(1)
    assert "dead_units" not in smooth.measure()
    assert "rectifier" in smooth.inapplicable()["dead_units"]
    linear = populate([Lane(0, SGD())], hidden=())
    assert set(linear.measure()) == {"weight_magnitude"}
    assert set(linear.inapplicable()) == {"dead_units", "effective_rank_entropy", "units_replaced"}


def test_collect_gives_means_and_starts_anew() -> None:
    population = populate([sgd(0)])
    losses = []
    for _ in range(8):
        population.advance(1)
        losses.append(float(population.collect(1)["online_loss"][0]))
    again = populate([sgd(0)])
    again.advance(5)
    assert float(again.collect(5)["online_loss"][0]) == pytest.approx(sum(losses[:5]) / 5)
    again.advance(3)
    assert float(again.collect(3)["online_loss"][0]) == pytest.approx(sum(losses[5:]) / 3)


def test_the_online_loss_is_from_before_the_update() -> None:
    """Prequential: an example is predicted before it is learned from."""
    population = populate([Lane(0, SGD(lr=0.1))])
    start = lane(population, 0).params
    population.advance(1)
    x, y = (torch.tensor(t[0], dtype=torch.float64) for t in Table().rows(0))
    h = torch.relu(torch.relu(x @ start["1.weight"].T + start["1.bias"]) @ start["3.weight"].T + start["3.bias"])
    expected = ((h @ start["5.weight"].T + start["5.bias"] - y) ** 2).sum()
    assert float(population.collect(1)["online_loss"][0]) == pytest.approx(float(expected))


def test_run_returns_the_tidy_table() -> None:
    lanes = [sgd(4), sgd(2), sgd(4, lr=0.001)]
    table = populate(lanes).run(30, bin=10)
    assert isinstance(table, polars.DataFrame)
    assert table.columns == ["lane", "seed", "metric", "step", "value"]
    assert set(table["metric"]) == {"online_loss", *METRICS}
    assert len(table) == 3 * 3 * 5
    assert table.select("lane", "metric", "step").is_unique().all()
    assert set(table["step"]) == {10, 20, 30}
    assert {tuple(row) for row in table.select("lane", "seed").unique().rows()} == {(0, 4), (1, 2), (2, 4)}
    by_hand = populate(lanes)
    by_hand.advance(10)
    expected = by_hand.collect(10)["online_loss"].tolist()
    found = table.filter((polars.col("metric") == "online_loss") & (polars.col("step") == 10)).sort("lane")
    assert found["value"].to_list() == expected


def test_run_measures_as_often_as_told() -> None:
    table = populate([sgd(0)]).run(40, bin=10, measure_every=20)
    steps = {metric: set(table.filter(polars.col("metric") == metric)["step"]) for metric in set(table["metric"])}
    assert steps["online_loss"] == {10, 20, 30, 40}
    assert steps["dead_units"] == {20, 40}
    odd = populate([sgd(0)]).run(25, bin=10)
    assert set(odd["step"]) == {10, 20, 25}, "the last bin is shorter"


@pytest.mark.parametrize("bin", [0, -1, 31])
def test_run_refuses_bins_that_do_not_fit(bin: int) -> None:
    with pytest.raises(ValueError, match=f"bin is {bin}"):
        populate([sgd(0)]).run(30, bin=bin)


def test_classification_has_an_accuracy() -> None:
    lanes = [Lane(0, SGD(lr=0.1)), Lane(1, SGD(lr=0.0))]
    population = populate(lanes, PermutedDigits(), hidden=(8,), dtype=torch.float32)
    population.advance(300)
    values = population.collect(300)
    assert set(values) == {"online_loss", "online_accuracy"}
    assert 0.25 < float(values["online_accuracy"][0]) <= 1
    assert 0 <= float(values["online_accuracy"][1]) < 0.25
    assert float(values["online_loss"][0]) < math.log(10) + 0.5


# --- what lanes share and what they do not --------------------------------------------------------------------------


def test_a_seed_fixes_everything() -> None:
    twice = populate([sgd(3), sgd(1), sgd(3)])
    assert not torch.equal(lane(twice, 0).params["1.weight"], lane(twice, 1).params["1.weight"])
    twice.advance(20)
    same(lane(twice, 0), lane(twice, 2))


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = populate([sgd(0)])
    one.advance(3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    two = populate([sgd(0)])
    two.advance(3)
    same(one.state, two.state)


def test_methods_do_not_change_initial_weights() -> None:
    states = [
        lane(populate([Lane(5, rule, interventions)]), 0).params
        for rule, interventions in ((SGD(), ()), (Adam(), (OFTEN,)), (UPGD(), (ShrinkAndPerturb(),)))
    ]
    same(states[0], states[1])
    same(states[0], states[2])


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [
    Lane(1, Adam(), (OFTEN,)), Lane(1, SGD()), Lane(1, SGD(momentum=0.5), (OFTEN,)),
    Lane(1, SGD(), (ContinualBackprop(0.05, 5, accumulate=False),)), Lane(1, SGD(), (OFTEN, ShrinkAndPerturb())),
])  # fmt: skip
def test_lanes_of_different_structure_are_refused(second: Lane) -> None:
    with pytest.raises(ValueError, match="structure"):
        populate([Lane(0, SGD(), (OFTEN,)), second])


def test_no_lanes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one lane"):
        populate([])


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 2), (6, 3)])
def test_a_network_that_does_not_fit_is_refused(inputs: int, outputs: int) -> None:
    with pytest.raises(ValueError, match="the network"):
        Population(lambda: MLP().build(inputs, outputs), Table(), [sgd(0)], compiled=False)


def test_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"buffers \(1\.running_mean"):
        Population(
            lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
            Table(),
            [Lane(0, SGD())],
            compiled=False,
        )


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed is -1"):
        populate([sgd(-1)])


@pytest.mark.parametrize(("rule", "others"), [(OFTEN, ()), (SGD(), (Adam(),))])
def test_rules_and_interventions_have_their_places(rule: Any, others: Any) -> None:
    with pytest.raises(TypeError, match="is not an"):
        Lane(0, rule, others)


def test_a_state_of_other_lanes_is_refused() -> None:
    saved = populate([sgd(0), sgd(1)]).state_dict()
    with pytest.raises(ValueError, match="another population"):
        populate([sgd(0)]).load_state_dict(saved)
    with pytest.raises(ValueError, match="another population"):
        populate([Lane(0, SGD()), Lane(1, SGD())]).load_state_dict(saved)
    with pytest.raises(ValueError, match="another population"):
        populate([sgd(0), sgd(1)], dtype=torch.float32).load_state_dict(saved)
    untouched = populate([sgd(0), sgd(1)])
    before = {name: leaf.clone() for name, leaf in untouched.state_dict().items()}
    broken = {**saved, ".step": torch.zeros(7, dtype=torch.int32)}
    other = {name: leaf if leaf.dtype == torch.bool else leaf + 1 for name, leaf in broken.items()}
    with pytest.raises(ValueError, match=r"\.step"):
        untouched.load_state_dict(other)
    same(untouched.state_dict(), before)


# --- networks of other forms ----------------------------------------------------------------------------------------


class _ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(SIZES[0], 4), nn.Linear(4, SIZES[-1])

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.linear(x, weight=self.a.weight, bias=self.a.bias))
        return F.linear(h, weight=self.b.weight, bias=self.b.bias)


class _Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(1, 3, 2), nn.Linear(15, SIZES[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x[:, None]).relu().flatten(1))  # type: ignore[no-any-return]


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(SIZES[0], 6), nn.Linear(6, 6), nn.Linear(6, SIZES[-1])
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("network", [_ByKeyword, _Conv, _Tied])
def test_other_networks_train_as_torch_does(network: type[nn.Module]) -> None:
    """The same gradients as autograd on the plain module, whatever its form."""
    torch.manual_seed(0)
    stream = Table(batch=3)
    population = Population(network, stream, [Lane(1, SGD(lr=0.05))], compiled=False, dtype=torch.float64)
    model = network().double()
    model.load_state_dict(lane(population, 0).params, strict=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = (torch.tensor(t, dtype=torch.float64) for t in stream.rows(1))
    for step in range(15):
        optimizer.zero_grad()
        ((model(x[step]) - y[step]) ** 2).sum(-1).mean().backward()
        optimizer.step()
    population.advance(15)
    for name, w in model.named_parameters():
        torch.testing.assert_close(lane(population, 0).params[name], w.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("network", [_ByKeyword, _Conv])
def test_units_of_other_networks_are_replaced(network: type[nn.Module]) -> None:
    lanes = [Lane(seed, Adam(lr=0.01), (ContinualBackprop(0.1, 3),)) for seed in (0, 1)]
    population = Population(network, Table(), lanes, compiled=False)
    population.advance(20)
    assert (population.state.replaced > 3).all()


# --- one compiled -----------------------------------------------------------------------------------------------------


@pytest.mark.compiles
def test_compiled_lanes_diverge_and_resume_alike() -> None:
    """What holds uncompiled holds compiled: a diverged lane disturbs no other, and resumption is bit for bit."""
    lanes = [sgd(0), sgd(1, lr=1e12), sgd(2)]
    make = lambda lr: populate(  # noqa: E731
        [lanes[0], sgd(1, lr=lr), lanes[2]], dtype=torch.float32, compiled=True, hidden=(3,)
    )
    whole, other, resumed = make(1e12), make(0.02), make(1e12)
    whole.advance(8)
    resumed.load_state_dict({name: leaf.clone() for name, leaf in whole.state_dict().items()})
    whole.advance(12)
    resumed.advance(12)
    other.advance(20)
    assert int(whole.state.diverged[1]) > 0
    assert int(other.state.diverged[1]) == -1
    for number in (0, 2):
        same(lane(whole, number), lane(other, number))
    same(resumed.state, whole.state)
