"""Many runs as one program: each as if it were alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import polars
import pytest
import torch
from references import SIZES, Table, lane, populate, same
from torch import Tensor, nn
from torch.nn import functional as F

from perennial import (
    MLP,
    SGD,
    UPGD,
    Adam,
    ContinualBackprop,
    L2Init,
    Lane,
    PermutedDigits,
    Population,
    ShrinkAndPerturb,
    attach,
    metrics,
)
from perennial.methods import Context, Intervention, Outcome, Regulariser, Scalar
from perennial.methods.base import number as scalar
from perennial.methods.base import whole, whole_parameter
from perennial.noise import elements
from perennial.population import MEASURED
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


@pytest.mark.parametrize(("lr", "dtype", "pieces"), [
    pytest.param(lr, dtype, pieces, marks=() if pieces == [3, 20, 7] or lr == 1e3 else pytest.mark.slow)
    for lr, dtype in ((1e12, torch.float32), (1e12, torch.float64), (1e3, torch.float64))
    for pieces in ([30], [1] * 30, [3, 20, 7])
], ids=str)  # fmt: skip
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
    (Adam(lr=1e200),), (SGD(lr=1e6), OFTEN), pytest.param((UPGD(lr=1e6),), marks=pytest.mark.slow),
    (SGD(), ShrinkAndPerturb(noise_std=1e200)),
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
    assert set(first) == set(MEASURED)
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
    assert "saturated_units" not in smooth.inapplicable(["saturated_units", "dead_units"])
    with pytest.raises(ValueError, match="a population does not measure 'sharpness'; it measures dead_units, "):
        smooth.measure(["sharpness"])


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_any_metric_of_units_features_and_weights_can_be_asked_for(activation: str) -> None:
    """Every lane's value is what the metric's function gives for that lane's activations and weights."""
    make = lambda: MLP(hidden=(6, 5), activation=activation).build(SIZES[0], SIZES[-1])  # noqa: E731
    population = Population(make, Table(), [sgd(0), sgd(1)], dtype=torch.float64, compiled=False)
    population.advance(20)
    names = [name for name, metric in metrics.METRICS.items() if metric.of in ("units", "features", "weights")]
    values = population.measure(names, samples=40)
    assert set(values) == set(names) - set(population.inapplicable(names))
    assert ("dead_units" in values, "saturated_units" in values) == (activation == "relu", activation == "tanh")
    x = population.feed.probe(20, 40).double().movedim(-1, 0)
    shape = torch.relu if activation == "relu" else torch.tanh
    for number in range(2):
        params = lane(population, number).params
        h = shape(x[number] @ params["1.weight"].T + params["1.bias"])
        hidden = [h, shape(h @ params["3.weight"].T + params["3.bias"])]
        for name, value in values.items():
            function = metrics.METRICS[name].function
            taken = {"units": hidden, "features": hidden[-1], "weights": params}[metrics.METRICS[name].of]
            bounds = {"low": -1.0, "high": 1.0} if (name, activation) == ("feature_activity", "tanh") else {}
            assert float(value[number]) == pytest.approx(float(function(taken, **bounds)), rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("steps", [0, 7, 130])
def test_gradients_are_measured_on_the_last_steps_examples(steps: int) -> None:
    population = populate([sgd(0), sgd(1)])
    population.advance(steps)
    names = ["gradient_norm_l0", "gradient_norm_l1", "gradient_norm_l2"]
    before = population.state_dict()
    values = population.measure(names)
    assert all(torch.equal(before[name], tensor) for name, tensor in population.state_dict().items())
    begin = max(0, steps - 100)
    inputs, targets = population.feed.examples(begin, max(1, steps - begin))
    for number in range(2):
        model = MLP(hidden=SIZES[1:-1]).build(SIZES[0], SIZES[-1])
        model.load_state_dict(dict(lane(population, number).params))
        found = []
        for x, y in zip(inputs[..., number], targets[..., number], strict=True):
            model.zero_grad()
            (model(x) - y).square().sum(-1).mean().backward()
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            found.append([float(metrics.METRICS[name].function(gradients)) for name in names])
        expected = torch.tensor(found).mean(0)
        for name, value in zip(names, expected.tolist(), strict=True):
            assert float(values[name][number]) == pytest.approx(value, rel=1e-4), name


def test_more_is_measured_where_it_is_asked_for() -> None:
    table = populate([sgd(0)]).run(20, bin=10, measures=["rank_99", "gradient_norm_l2", "dead_units"])
    counts = table.group_by("metric").len()
    assert dict(counts.iter_rows())["rank_99"] == dict(counts.iter_rows())["gradient_norm_l2"] == 2
    assert table.filter(table["metric"] == "dead_units").height == 2
    with pytest.raises(ValueError, match=r"does not measure 'stable_rank'; .*what Dohare et al. .* is rank_99"):
        populate([sgd(0)]).run(20, bin=10, measures=["stable_rank"])


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
    assert set(table["metric"]) == {"online_loss", *MEASURED}
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
    population.advance(1000)
    values = population.collect(1000)
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


class _Convolutions(nn.Module):
    """Channels that a convolution reads: units that stand at several positions of a sample."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(1, 4, 2), nn.Conv1d(4, 4, 2, groups=groups)
        self.out = nn.Linear(16, SIZES[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.a(x[:, None]).relu()).relu().flatten(1))  # type: ignore[no-any-return]


class _TwoReaders(nn.Module):
    """Two layers read the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(SIZES[0], 5)
        self.left, self.right = nn.Linear(5, 1), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).relu()
        return torch.cat([self.left(h), F.linear(input=h, weight=self.right.weight) ** 2], -1)


class _Residual(nn.Module):
    """The stream is read and written; the units of ``up`` lie between."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.up, self.down = nn.Linear(SIZES[0], 4), nn.Linear(4, 5), nn.Linear(5, 4)
        self.out = nn.Linear(4, SIZES[-1])

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        return self.out(h + self.down(self.up(h).relu()))  # type: ignore[no-any-return]


def test_units_on_a_residual_stream_are_left_alone() -> None:
    population = Population(_Residual, Table(), [Lane(0, SGD(), (ContinualBackprop(0.5, 2),))], compiled=False)
    assert [layer.name for layer in population.units] == ["up"]
    population.advance(10)
    assert int(population.state.replaced) > 3


def test_a_grouped_convolution_over_units_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 groups, b\.weight, reads the units of a.*ungrouped"):
        Population(lambda: _Convolutions(2), Table(), [Lane(0, SGD())], compiled=False)


def test_metrics_count_every_position_of_a_unit_as_a_sample() -> None:
    population = Population(_Convolutions, Table(), [Lane(0, SGD(lr=0.05))], compiled=False, dtype=torch.float64)
    population.advance(5)
    model = _Convolutions().double()
    model.load_state_dict(lane(population, 0).params)
    x = population.feed.probe(5, 40)[..., 0].double()
    with torch.no_grad():
        h = model.a(x[:, None]).relu()
        h2 = model.b(h).relu()
    columns = [h.movedim(1, -1).reshape(-1, 4), h2.flatten(1)]
    values = population.measure(samples=40)
    dead = sum(int((one == 0).all(0).sum()) for one in (columns[0], h2.movedim(1, -1).reshape(-1, 4)))
    assert float(values["dead_units"][0]) == pytest.approx(dead / 8)
    share = torch.linalg.svdvals(h2.movedim(1, -1).reshape(-1, 4))
    share = share / share.sum()
    share = share[share > 1e-8]
    assert float(values["effective_rank_entropy"][0]) == pytest.approx(float((-(share * share.log()).sum()).exp()))


# --- what methods are shown -----------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """What :class:`_Looks` was shown in the last step, by a number each: a sum with weights by place."""

    activations: dict[str, Tensor]
    signals: dict[str, Tensor]
    losses: Tensor


@dataclass(frozen=True)
class _Looks(Intervention):
    """Writes down what it is shown, and checks that it is shown no more than somebody wants."""

    wants: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    """What another method of the lane wants."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.wants)

    def init(self, params: Any, units: Any) -> _Seen:
        zero = next(iter(params.values())).new_zeros(())
        zeros = {layer.name: zero for layer in units}
        return _Seen(zeros, dict(zeros), torch.stack([zero, zero]))

    def step(self, params: Any, state: _Seen, context: Context) -> tuple[dict[str, Tensor], _Seen]:
        wanted = {*self.wants, *self.also}
        assert bool(context.activations) == bool(wanted & {"activations", "signals"})
        assert bool(context.signals) == ("signals" in wanted)
        assert (context.loss is not None) == ("loss" in self.wants)
        losses = state.losses
        if context.loss is not None:
            last, w = list(params.items())[-1]
            losses = torch.stack([context.loss({}), context.loss({last: w + 1})])
        activations = {name: fingerprint(h) for name, h in context.activations.items()} or state.activations
        signals = {name: fingerprint(g) for name, g in context.signals.items()} or state.signals
        return {}, _Seen(activations, signals, losses)


def fingerprint(tensor: Tensor) -> Tensor:
    weights = torch.cos(torch.arange(tensor.numel(), dtype=tensor.dtype)).reshape(tensor.shape)
    return (tensor * weights).sum()


@pytest.mark.parametrize("wants", [(), ("activations",), ("signals",), ("loss",), ("activations", "signals", "loss")])
def test_methods_are_shown_what_somebody_needs(wants: tuple[str, ...]) -> None:
    population = populate([Lane(0, SGD(), (_Looks(wants),))])
    population.advance(2)
    seen = lane(population, 0).methods[1]
    assert all((h != 0) == bool({"activations", "signals"} & set(wants)) for h in seen.activations.values())
    assert all((g != 0) == ("signals" in wants) for g in seen.signals.values())
    assert (seen.losses[0] != 0) == ("loss" in wants)
    two = populate([Lane(0, SGD(), (_Looks(("signals",), also=wants), _Looks(wants, also=("signals",))))])
    two.advance(2)
    same(lane(two, 0).params, lane(population, 0).params)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("network", [_ByKeyword, _Conv, _Convolutions, _TwoReaders, _Residual])
def test_signals_are_autograds(network: type[nn.Module], lanes: int) -> None:
    """The gradient by what the readers of a unit are given, whatever the network's form."""
    stream = Table(batch=3)
    made = [Lane(seed, SGD(lr=0.0), (_Looks(("activations", "signals")),)) for seed in range(lanes)]
    population = Population(network, stream, made, compiled=False, dtype=torch.float64)
    population.advance(1)
    for number in range(lanes):
        model = network().double()
        model.load_state_dict(lane(population, number).params, strict=False)
        rectified: list[Tensor] = []

        class Kept(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                if func in (torch.relu, Tensor.relu, F.relu):
                    out.retain_grad()
                    rectified.append(out)  # noqa: B023
                return out

        x, y = (torch.tensor(t[0], dtype=torch.float64) for t in stream.rows(number))
        with Kept():
            output = model(x)
        ((output - y) ** 2).sum(-1).mean().backward()
        seen = lane(population, number).methods[1]
        assert len(population.units) == len(rectified)
        for layer, h in zip(population.units, rectified, strict=True):
            assert h.grad is not None
            torch.testing.assert_close(seen.activations[layer.name], fingerprint(h.detach()), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(seen.signals[layer.name], fingerprint(h.grad), rtol=1e-9, atol=1e-12)


def test_the_loss_is_that_of_the_parameters_as_they_are() -> None:
    """After the rule: an intervention asks what its own change would do."""
    stream = Table(batch=3)
    population = populate([Lane(seed, SGD(lr=0.05), (_Looks(("loss",)),)) for seed in (0, 1)], stream)
    population.advance(3)
    for number in (0, 1):
        state = lane(population, number)
        x, y = (torch.tensor(t[2], dtype=torch.float64) for t in stream.rows(number))
        model = MLP(hidden=SIZES[1:-1]).build(SIZES[0], SIZES[-1]).double()
        for last in (0.0, 1.0):
            model.load_state_dict({**state.params, "5.bias": state.params["5.bias"] + last})
            expected = ((model(x) - y) ** 2).sum(-1).mean().detach()
            torch.testing.assert_close(state.methods[1].losses[int(last)], expected, rtol=1e-12, atol=0)


# --- coupled regularisers -------------------------------------------------------------------------------------------


class _Scale(NamedTuple):
    scale: Tensor


@dataclass(frozen=True)
class _Pull(Regulariser):
    """Half the squared weights, times a number that its state doubles every step."""

    rate: Scalar = scalar(0.1, low=0.0)
    coupled: bool = True
    growth: Scalar = scalar(1.0)

    def init(self, params: Any, units: Any) -> _Scale:
        return _Scale(next(iter(params.values())).new_ones(()))

    def penalty(self, params: Any, state: _Scale, units: Any) -> Tensor:
        return state.scale * sum(0.5 * (w**2).sum() for w in params.values())

    def advance(self, params: Any, state: _Scale, units: Any) -> _Scale:
        return _Scale(state.scale * self.growth)


@pytest.mark.parametrize("rule", [SGD, Adam])
def test_a_coupled_penalty_belongs_to_the_gradient_and_not_to_the_loss(rule: Any) -> None:
    """Half the squared weights in the loss are L2 in the optimizer, for its moments too."""
    lanes = [Lane(seed, rule(lr=0.01), (_Pull(rate),)) for seed, rate in ((0, 0.3), (1, 0.0))]
    ours = populate(lanes)
    theirs = populate([Lane(0, rule(lr=0.01, weight_decay=0.3)), Lane(1, rule(lr=0.01))])
    for population in (ours, theirs):
        population.advance(20)
    for number in (0, 1):
        same(lane(ours, number).params, lane(theirs, number).params, rtol=1e-9)
        same(lane(ours, number).methods[0], lane(theirs, number).methods[0], rtol=1e-9)
    same(ours.collect(20)["online_loss"], theirs.collect(20)["online_loss"], rtol=1e-9)


def test_a_coupled_penalty_uses_the_state_from_before_the_step() -> None:
    population = populate([Lane(0, SGD(lr=0.01), (_Pull(0.5, growth=2.0),))])
    plain = populate([Lane(0, SGD(lr=0.01, weight_decay=0.5))])
    population.advance(1)
    plain.advance(1)
    same(lane(population, 0).params, lane(plain, 0).params, rtol=1e-12)
    assert float(lane(population, 0).methods[1].scale) == 2.0
    decoupled = populate([Lane(0, SGD(lr=0.01), (_Pull(0.01, coupled=False),))])
    bare = populate([Lane(0, SGD(lr=0.01))])
    decoupled.advance(1)
    bare.advance(1)
    shrunk = {name: w * 0.99 for name, w in lane(bare, 0).params.items()}
    same(lane(decoupled, 0).params, shrunk, rtol=1e-12)


# --- events ---------------------------------------------------------------------------------------------------------


class _Marks(NamedTuple):
    events: Tensor
    steps: Tensor
    drawn: Tensor


@dataclass(frozen=True)
class _Now(Intervention):
    """Adds noise to the last bias now and then, says that it is fresh, and that a unit is."""

    size: Scalar = scalar(1.0, infinite=True)
    every: int | None = whole(None)

    def init(self, params: Any, units: Any) -> _Marks:
        zero = torch.zeros((), dtype=torch.int32)
        return _Marks(zero, zero, torch.zeros_like(params["5.bias"]))

    def _draw(self, params: Any, context: Context) -> Tensor:
        w = params["5.bias"]
        return context.noise.normal("5.bias", elements(w)).to(w.dtype)

    def step(self, params: Any, state: _Marks, context: Context) -> tuple[dict[str, Tensor], _Marks]:
        return {}, state._replace(steps=state.steps + 1, drawn=self._draw(params, context))

    def due(self, steps_made: int, task_ended: bool) -> bool:
        return task_ended if self.every is None else self.every > 0 and steps_made % self.every == 0

    def event(self, params: Any, state: _Marks, context: Context) -> Outcome:
        assert not context.activations
        w = params["5.bias"]
        drawn = self._draw(params, context)
        unit = torch.arange(SIZES[2]) == 1
        right = torch.where((drawn - state.drawn).abs().amax() < 1e-4, 0.0, torch.nan)  # the noise is the step's own
        changed = {"5.bias": w + self.size * drawn + right}
        touched = {"5.bias": whole_parameter(w), "3.weight": {0: unit}}
        return Outcome(changed, state._replace(events=state.events + 1), touched, {"3": unit})


def now(seed: int, size: float = 1.0, every: int | None = 7, lr: float = 0.01) -> Lane:
    return Lane(seed, SGD(lr=lr, momentum=0.9), (_Now(size, every), OFTEN))


@pytest.mark.parametrize(("every", "steps", "expected"), [(7, 30, 4), (0, 30, 0), (None, 49, 0), (None, 100, 2)])
def test_events_happen_when_due(every: int | None, steps: int, expected: int) -> None:
    population = populate([now(0, every=every), now(1, every=every)])
    population.advance(steps)
    for number in (0, 1):
        own = lane(population, number).methods[1]
        assert (int(own.events), int(own.steps)) == (expected, steps)


def test_an_event_changes_parameters_resets_the_rule_and_counts_units() -> None:
    lanes = [Lane(seed, SGD(lr=0.01, momentum=0.9), (_Now(size, 5),)) for seed, size in ((3, 0.5), (4, 0.0))]
    population = populate(lanes)
    bare = populate([dataclasses.replace(one, interventions=()) for one in lanes])
    for made in (population, bare):
        made.advance(5)
    for number, size in ((0, 0.5), (1, 0.0)):
        ours, theirs = lane(population, number), lane(bare, number)
        moved = theirs.params["5.bias"] + size * ours.methods[1].drawn
        same(ours.params, theirs.params | {"5.bias": moved}, rtol=1e-12)
        velocity = theirs.methods[0].velocity
        velocity["5.bias"].zero_()
        velocity["3.weight"][1] = 0
        same(ours.methods[0].velocity, velocity, rtol=1e-12)
        assert int(ours.replaced) == 1
    assert not torch.equal(lane(population, 0).methods[1].drawn, lane(population, 1).methods[1].drawn)


@pytest.mark.parametrize("every", [7, pytest.param(None, marks=pytest.mark.slow)])
def test_cutting_and_resuming_between_events_changes_no_bit(every: int | None) -> None:
    lanes = [now(0, every=every), now(3, every=every)]
    whole_run, cut = (populate(lanes, dtype=torch.float32) for _ in range(2))
    whole_run.advance(60)
    for steps in (6, 1, 1, 0, 20, 21, 1):
        cut.advance(steps)
    resumed = populate(lanes, dtype=torch.float32)
    resumed.load_state_dict(cut.state_dict())
    resumed.advance(10)
    same(resumed.state, whole_run.state)
    assert int(whole_run.state.methods[1].events[0]) == (8 if every else 1)


def test_a_lane_among_others_has_the_events_it_has_alone() -> None:
    together, alone = populate([now(0), now(1, 0.5), now(1)]), populate([now(1, 0.5)])
    for population in (together, alone):
        population.advance(20)
    same(lane(together, 1), lane(alone, 0), rtol=1e-9)


@pytest.mark.parametrize(
    "pieces", [*(pytest.param(p, marks=pytest.mark.slow) for p in ([30], [1] * 30)), [7, 13, 10]], ids=str
)
@pytest.mark.parametrize("spoil", ["event", "step"])
def test_a_lane_that_diverges_by_an_event_or_before_one_is_frozen(spoil: str, pieces: list[int]) -> None:
    """By the event after step 6 (infinite weights), or by a step before it (then it must not have the event)."""
    broken = now(1, size=math.inf) if spoil == "event" else now(1, lr=1e30)
    population, without = populate([now(0), broken, now(2)]), populate([now(0), now(1), now(2)])
    for steps in pieces:
        population.advance(steps)
    without.advance(30)
    at = int(population.state.diverged[1])
    assert at == 6 if spoil == "event" else 0 < at < 7
    for number in (0, 2):
        same(lane(population, number), lane(without, number))
    frozen = lane(population, 1)
    assert int(frozen.methods[1].events) == 0
    assert int(frozen.methods[1].steps) == at
    assert all(torch.isfinite(w).all() for w in frozen.params.values())


def test_nobody_is_asked_where_no_event_can_fall_due(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Population, steps_made: int) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(Population, "_run_events", fail)
    populate([sgd(0)]).advance(3)
    with pytest.raises(AssertionError, match="asked"):
        populate([now(0)]).advance(3)


@pytest.mark.compiles
def test_compiled_lanes_see_and_do_what_uncompiled_ones_do() -> None:
    """Signals, losses, a coupled penalty and events; five lanes, so that some are padding."""
    needs = _Looks(("activations", "signals", "loss"))
    lanes = [Lane(seed, SGD(lr=0.01, momentum=0.9), (needs, _Pull(0.1), _Now(0.1 * seed, 3))) for seed in range(5)]
    made = [populate(lanes, dtype=torch.float32, compiled=compiled) for compiled in (True, False)]
    for population in made:
        population.advance(5)
        population.advance(5)
    same(made[0].state, made[1].state, rtol=2e-4)
    assert made[0].state.methods[3].events.tolist() == [3] * 5


# --- one compiled -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
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


# --- sample plasticity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2])
def test_sample_plasticity_is_what_a_second_forward_pass_says(lanes: int) -> None:
    """Against the losses before and after each step, worked out from the parameters themselves."""
    stream = Table(batch=2)
    members = [Lane(seed, SGD(lr=0.05)) for seed in range(lanes)]
    every, steps = 3, 12
    population = Population(
        lambda: MLP(hidden=(5,)).build(6, 2),
        stream,
        members,
        compiled=False,
        dtype=torch.float64,
        plasticity_every=every,
    )
    other = Population(lambda: MLP(hidden=(5,)).build(6, 2), stream, members, compiled=False, dtype=torch.float64)
    feed = stream.open([lane.seed for lane in members], torch.device("cpu"))
    total = torch.zeros(lanes, dtype=torch.float64)
    for step in range(steps):
        x, y = (t[0].double() for t in feed.examples(step, 1))

        def loss(number: int, x: torch.Tensor = x, y: torch.Tensor = y) -> float:
            params = {name: w[..., number] for name, w in other.state.params.items()}
            out = torch.func.functional_call(other.model, params, (x[..., number],))
            return float(((out - y[..., number]) ** 2).sum(1).mean())

        before = [loss(number) for number in range(lanes)]
        other.advance(1)
        if (step + 1) % every == 0:
            for number in range(lanes):
                total[number] += min(1.0, max(0.0, 1 - loss(number) / before[number]))
    population.advance(steps)
    found = population.collect(steps)["sample_plasticity"]
    torch.testing.assert_close(found, total / (steps // every), rtol=1e-9, atol=0)
    for name, w in other.state.params.items():
        assert torch.equal(population.state.params[name], w), "measuring changes nothing"
    population.advance(2)
    assert population.collect(2)["sample_plasticity"].isnan().all(), "no sample was taken in these two steps"
    with pytest.raises(ValueError, match="plasticity_every is 0"):
        Population(lambda: MLP().build(6, 2), stream, members, compiled=False, plasticity_every=0)


@pytest.mark.slow
def test_a_layer_may_have_as_many_units_as_there_are_lanes() -> None:
    lanes = [Lane(seed, SGD(lr=0.02), (ContinualBackprop(replacement_rate=0.01),)) for seed in range(8)]
    found = []
    for compiled in (True, False):
        population = Population(lambda: MLP(hidden=(16, 8)).build(6, 2), Table(batch=1), lanes, compiled=compiled)
        population.advance(20)
        found.append(population.state.params)
    for name, w in found[0].items():
        torch.testing.assert_close(w, found[1][name], rtol=1e-4, atol=1e-6)


# --- what methods do before the first step -------------------------------------------------------------------------


@dataclass(frozen=True)
class Doubling(Intervention):
    """Begins with every weight doubled, or with what it is given."""

    name = "doubling"
    wrong: str = ""

    def init(self, params: Any, units: Any) -> tuple[()]:
        return ()

    def begin(self, params: Any, state: tuple[()], context: Any) -> Any:
        if self.wrong == "name":
            return {"nope": torch.zeros(1)}, state
        if self.wrong == "shape":
            return {name: w.flatten() for name, w in params.items() if w.dim() == 2}, state
        changed = {name: 2 * w for name, w in params.items()}
        return changed if self.wrong == "pair" else (changed, state)


def test_a_method_is_initialised_on_what_those_before_it_have_begun_with() -> None:
    plain, begun = (lane(populate([Lane(3, SGD(), ms)]), 0) for ms in ((), (Doubling(), L2Init(rate=0.1))))
    same({n: 2 * w for n, w in plain.params.items()}, begun.params)
    same(begun.methods[2].initial, begun.params)
    model = MLP(hidden=(4,)).build(3, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for method in (Doubling(), L2Init(rate=0.1)):
        keeper = attach(method, model, optimizer, example=torch.randn(8, 3))
    same(keeper.state.initial, {name: 2 * w for name, w in before.items()})


@pytest.mark.parametrize(("wrong", "message"), [
    ("name", r"doubling.begin changes 'nope', which is no parameter: 1.weight"),
    ("shape", r"doubling.begin makes 1.weight \(\d+,\); it is \(\d+, \d+\)"),
    ("pair", r"doubling.begin returned dict; it returns \(changed parameters, state\)"),
])  # fmt: skip
def test_what_begin_returns_is_looked_at(wrong: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        populate([Lane(0, SGD(), (Doubling(wrong),))])


@dataclass(frozen=True)
class Halving(Doubling):
    """Halves every weight after every step, or gives back what it must not."""

    name = "halving"

    def begin(self, params: Any, state: tuple[()], context: Any) -> Any:
        return {}, state

    def due(self, steps_made: int, task_ended: bool) -> bool:
        return True

    def event(self, params: Any, state: tuple[()], context: Any) -> Any:
        if self.wrong == "shape":
            return Outcome({name: w.flatten() for name, w in params.items() if w.dim() == 2}, state)
        return ({name: w / 2 for name, w in params.items()}, state)


@pytest.mark.parametrize(("wrong", "message"), [
    ("shape", r"halving.event makes 0.weight \(\d+,\); it is \(\d+, \d+\)"),
    ("pair", r"halving.event returned tuple; it returns an Outcome"),
])  # fmt: skip
def test_what_event_returns_is_looked_at(wrong: str, message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(Halving(wrong), model, optimizer, example=torch.randn(8, 3))
    model(torch.randn(8, 3)).sum().backward()
    with pytest.raises(ValueError, match=message):
        optimizer.step()


def test_a_stream_that_says_it_holds_out_and_does_not_is_refused() -> None:
    class Careless(Table):
        holds_out = True

    with pytest.raises(ValueError, match=r"table says that it holds examples out, but its feed, .*, has no held_out"):
        populate([Lane(0, SGD())], Careless())


class _Wide(Table):
    input_shape = (1, SIZES[0] + 1)


class _Odd(Table):
    task = "ranking"


class _Flat(Table):
    def open(self, seeds: Sequence[int], device: torch.device) -> Any:
        feed = super().open(seeds, device)
        feed.y = feed.y[:, :, :1]
        return feed


@pytest.mark.parametrize(("stream", "message"), [
    (_Wide(), rf"table.inputs is {SIZES[0]}, but its input_shape, .*, has {SIZES[0] + 1} numbers"),
    (_Odd(), "table.task is 'ranking'; it is 'regression' or 'classification'"),
    (_Flat(), rf"the targets of one step of table are \(1, 1, 1, 1\); by its fields they are \(1, 1, {SIZES[-1]}, 1\)"),
])  # fmt: skip
def test_a_stream_that_contradicts_itself_is_refused(stream: Table, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        populate([Lane(0, SGD())], stream).advance(1)
