"""Networks in lanes that draw random numbers or keep running statistics: dropout, batch and online normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from references import Table, lane, same
from torch import Tensor, nn

from perennial import MLP, SGD, UPGD, ContinualBackprop, Lane, Population, metrics
from perennial.methods import Context, Intervention, Outcome
from perennial.methods.base import State, Tensors
from perennial.modules import OnlineNorm
from perennial.noise import Noise, elements, seed_key

RATE = 0.3


class _Masked(nn.Module):
    """Dropout by the numbers that a lane is given: the ``number``-th of its network."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.seed, self.step = number, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        key = torch.tensor(seed_key(self.seed, "method"), dtype=torch.int32)
        noise = Noise(key, torch.tensor(self.step, dtype=torch.int32), "network")
        kept = noise.uniform(f"dropout {self.number}", elements(x)) >= RATE
        return x * kept / (1 - RATE)


def dropped(plain: bool = False) -> nn.Module:
    first, second = (_Masked(1), _Masked(2)) if plain else (nn.Dropout(RATE), nn.Dropout(RATE))
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), first, nn.Linear(5, 4), nn.ReLU(), second, nn.Linear(4, 2))


def batch_normed(plain: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def batch_normed_pictures(plain: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, bias=False), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(),
        nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip


def online_normed(plain: bool = False) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 5), OnlineNorm(5, 0.9, 0.8), nn.ReLU(), nn.Linear(5, 4), OnlineNorm(4), nn.ReLU(), nn.Linear(4, 2)
    )


NETWORKS = {
    "dropout": dropped,
    "batch norm": batch_normed,
    "pictures": batch_normed_pictures,
    "online norm": online_normed,
}
EVERY = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())


def population(
    network: Callable[[], nn.Module], lanes: list[Lane], *, compiled: bool = False, dtype: torch.dtype = torch.float64
) -> Population:
    return Population(network, Table(batch=3), lanes, compiled=compiled, dtype=dtype)


@EVERY
@pytest.mark.parametrize("seeds", [(1,), (0, 1, 2)], ids=["alone", "among others"])
def test_they_train_as_torch_does(network: Callable[..., nn.Module], seeds: tuple[int, ...]) -> None:
    """Parameters and buffers after 15 steps, and what was predicted before each of them, without dropout."""
    made = population(network, [Lane(seed, SGD(lr=0.05)) for seed in seeds])
    model = network(plain=True).double()
    here = seeds.index(1)
    start = lane(made, here)
    model.load_state_dict({**start.params, **start.buffers})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = (torch.tensor(t, dtype=torch.float64) for t in Table(batch=3).rows(1))
    predicted = 0.0
    for step in range(15):
        for module in model.modules():
            if isinstance(module, _Masked):
                module.seed, module.step = 1, step
        optimizer.zero_grad()
        loss = ((model(x[step]) - y[step]) ** 2).sum(-1).mean()
        if network is dropped:
            with torch.no_grad():
                predicted += float(((model.eval()(x[step]) - y[step]) ** 2).sum(-1).mean())
            model.train()
        else:
            predicted += float(loss.detach())
        loss.backward()
        optimizer.step()
    made.advance(15)
    end = lane(made, here)
    for name, value in model.state_dict().items():
        torch.testing.assert_close({**end.params, **end.buffers}[name], value, rtol=1e-9, atol=1e-12)
    assert float(made.collect(15)["online_loss"][here]) == pytest.approx(predicted / 15, rel=1e-9)


@EVERY
def test_measuring_is_in_evaluation_and_changes_nothing(network: Callable[[], nn.Module]) -> None:
    made = population(network, [Lane(seed, SGD(lr=0.05)) for seed in (0, 1)])
    made.advance(9)
    before = {name: leaf.clone() for name, leaf in made.state_dict().items()}
    found = made.measure(["effective_rank_entropy", "dead_units"], samples=50)
    same(made.state_dict(), before)
    model = network().double().eval()
    inputs = made.feed.probe(9, 50).double()
    for number in (0, 1):
        state = lane(made, number)
        model.load_state_dict({**state.params, **state.buffers})
        features = nn.Sequential(*(part for part in model[:-1] if not isinstance(part, nn.Flatten)))(
            inputs[..., number]
        )
        expected = metrics.effective_rank_entropy(features.movedim(1, -1).flatten(0, -2))
        torch.testing.assert_close(found["effective_rank_entropy"][number], expected.double(), rtol=1e-6, atol=0)


@EVERY
def test_cutting_and_resuming_changes_no_bit(network: Callable[[], nn.Module]) -> None:
    lanes = [Lane(seed, SGD(lr=0.05), (ContinualBackprop(0.05, 5),)) for seed in (0, 3)]
    whole, cut, resumed = (population(network, lanes) for _ in range(3))
    whole.advance(20)
    cut.advance(7)
    resumed.load_state_dict(cut.state_dict())
    resumed.advance(13)
    same(resumed.state, whole.state)
    alone = population(network, lanes[1:])
    alone.advance(20)
    same(lane(alone, 0).params, lane(whole, 1).params, rtol=1e-9)
    assert int(whole.state.replaced.sum()) > 0


def test_a_fresh_unit_gets_fresh_running_statistics() -> None:
    made = population(batch_normed, [Lane(0, SGD(lr=0.05), (ContinualBackprop(0.1, 1),))])
    had = 0
    for _ in range(40):
        made.advance(1)
        state = lane(made, 0)
        fresh = int(state.replaced) - had
        had = int(state.replaced)
        assert int((state.buffers["1.running_var"] == 1).sum()) == fresh
        assert int((state.buffers["1.running_mean"] == 0).sum()) == fresh
    assert had > 2


def test_a_fresh_unit_behind_online_normalisation_starts_anew() -> None:
    made = population(online_normed, [Lane(0, SGD(lr=0.05), (ContinualBackprop(0.1, 1),))])
    assert {part.parameter for part in made.units.layers[0].norms} == {
        f"1.{name}" for name in ("running_mean", "running_var", "output_error", "mean_error")
    }
    replaced = 0
    for _ in range(40):
        made.advance(1)
        state = lane(made, 0)
        fresh = state.methods[1].replaced["0"]
        for name, start in (("running_mean", 0), ("running_var", 1), ("output_error", 0), ("mean_error", 0)):
            assert torch.equal(state.buffers[f"1.{name}"] == start, fresh), name
        replaced += int(fresh.sum())
    assert replaced > 2


def test_a_diverged_lane_keeps_its_statistics() -> None:
    made = population(batch_normed, [Lane(0, SGD(lr=0.05)), Lane(1, SGD(lr=1e300))])
    made.advance(10)
    assert made.state.diverged[0] == -1
    assert made.state.diverged[1] >= 0
    frozen = lane(made, 1).buffers
    made.advance(10)
    same(lane(made, 1).buffers, frozen)
    assert lane(made, 0).buffers["1.num_batches_tracked"] == 20


@pytest.mark.compiles
@EVERY
def test_compiled_they_do_the_same(network: Callable[[], nn.Module]) -> None:
    lanes = [Lane(seed, SGD(lr=0.01), (ContinualBackprop(0.05, 5),)) for seed in range(5)]
    made = [population(network, lanes, compiled=compiled, dtype=torch.float32) for compiled in (True, False)]
    for one in made:
        one.advance(12)
    same(made[0].state, made[1].state, rtol=2e-4)


class _Assigning(nn.Module):
    """Keeps an average by assignment, which ``functional_call`` does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * x.mean(0)
        return self.linear(x)  # type: ignore[no-any-return]


class _Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = OnlineNorm(5), nn.Linear(6, 5), nn.Linear(5, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.second(self.norm(self.first(x)).relu())).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "layer", [nn.AlphaDropout(), nn.RReLU(), nn.Dropout1d(), _Noisy()], ids=lambda m: type(m).__name__
)
def test_other_random_layers_are_refused(layer: nn.Module) -> None:
    network = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), layer, nn.Linear(4, 2))
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="draws random numbers in its forward pass, which lanes could not draw again"):
        population(lambda: network, [Lane(0, SGD())])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("network", "message"), [
    (_Assigning, "assigns to its buffer average, of which lanes see nothing"),
    (_Twice, "norm is used 2 times in a forward pass"),
    (lambda: nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2, momentum=None)), "1 has momentum=None"),
])  # fmt: skip
def test_what_lanes_could_not_follow_is_refused(network: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        population(network, [Lane(0, SGD())])


def test_batch_norm_of_single_examples_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        Population(batch_normed, Table(batch=1), [Lane(0, SGD())], compiled=False)


@pytest.mark.parametrize("granularity", ["weight", "feature"])
@EVERY
def test_losses_of_changed_parameters_leave_statistics_alone(
    network: Callable[[], nn.Module], granularity: str
) -> None:
    """An exact utility asks for the loss many times a step, within a vmap of its own."""
    lanes = [Lane(seed, UPGD(lr=0.05, order="exact", granularity=granularity, noise_std=0.0)) for seed in (0, 1)]
    made = population(network, lanes)
    made.advance(3)
    alone = population(network, lanes[1:])
    alone.advance(3)
    same(lane(alone, 0).buffers, lane(made, 1).buffers, rtol=1e-9)
    if (tracked := made.state.buffers.get("1.num_batches_tracked")) is not None:
        assert tracked.tolist() == [3, 3]


def test_hesscale_does_not_look_through_online_normalisation() -> None:
    made = population(online_normed, [Lane(0, UPGD(order=2))])
    with pytest.raises(ValueError, match="HesScale has no rule for online_normalise"):
        made.advance(1)


def test_an_accumulator_stays_where_no_gradient_comes_from() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aside, self.norm, self.linear = nn.Linear(6, 5), OnlineNorm(5), nn.Linear(6, 2)
            self.norm.output_error.fill_(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.norm(self.aside(x)).detach().sum(1, keepdim=True)  # type: ignore[no-any-return]

    made = population(Detached, [Lane(0, SGD(lr=0.01)), Lane(1, SGD(lr=0.01))])
    made.advance(4)
    assert (made.state.buffers["norm.output_error"] == 0.5).all()


class _Fork(nn.Module):
    """One activation, read plainly and through dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.plain, self.dropped = nn.Linear(6, 5), nn.Linear(5, 2), nn.Linear(5, 2)
        self.drop = nn.Dropout(RATE)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.plain(h) + self.dropped(self.drop(h))  # type: ignore[no-any-return]


def test_a_reader_behind_dropout_is_given_something_else() -> None:
    made = population(_Fork, [Lane(0, SGD(), (ContinualBackprop(0.1, 3, utility="taylor"),))])
    made.advance(1)
    assert len(made._watched.first) == 1, "the reader that is tapped stands for itself alone"


class _Forgetting(Intervention):
    """Running statistics start anew at every task: by constants, which have no lane dimension."""

    def due(self, steps_made: int, task_ended: bool) -> bool:
        return task_ended

    def event(self, params: Tensors, state: State, context: Context) -> Outcome:
        return Outcome({"1.running_mean": torch.full((5,), 7.0, dtype=torch.float64)}, state)


class _Misspelt(_Forgetting):
    name = "misspelt"
    changed: ClassVar[dict[str, Tensor]] = {"1.runing_mean": torch.zeros(5)}

    def event(self, params: Tensors, state: State, context: Context) -> Outcome:
        return Outcome(self.changed, state)


@pytest.mark.parametrize("count", [1, 3])
def test_an_event_may_change_buffers(count: int) -> None:
    made = population(batch_normed, [Lane(seed, SGD(lr=0.05), (_Forgetting(),)) for seed in range(count)])
    length = made.stream.task_length()
    made.advance(length)
    assert (made.state.buffers["1.running_mean"] == 7).all()
    made.advance(1)
    assert (made.state.buffers["1.running_mean"] != 7).all()


def test_what_an_event_gives_is_looked_at() -> None:
    made = population(batch_normed, [Lane(0, SGD(lr=0.05), (_Misspelt(),))])
    with pytest.raises(ValueError, match=r"misspelt changes '1\.runing_mean', which is no parameter and no buffer"):
        made.advance(made.stream.task_length())


def test_running_statistics_of_instances_are_refused() -> None:
    network = nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(), nn.Linear(6, 2)
    )
    with pytest.raises(ValueError, match="running statistics of instance normalisation"):
        population(lambda: network, [Lane(0, SGD())])


def test_a_study_network_may_have_them() -> None:
    made = MLP(hidden=(5, 4), dropout=0.2, norm="online", forward_decay=0.9).build(6, 2)
    kinds = [type(module).__name__ for module in made]
    hidden = ["Linear", "OnlineNorm", "ReLU", "Dropout"]
    assert kinds == ["Flatten", *hidden, *hidden, "Linear"]
    assert made[2].forward_decay == 0.9
    assert made[4].p == 0.2


@pytest.mark.parametrize(("settings", "message"), [
    ({"dropout": 1.0}, r"mlp.dropout is 1.0; it must be at least 0 and below 1"),
    ({"dropout": "much"}, r"mlp.dropout is 'much'"),
    ({"norm": "group"}, r"mlp.norm is 'group'; it is one of none, online"),
    ({"norm": "online", "backward_decay": 2.0}, r"mlp.backward_decay is 2.0; it must be at least 0 and below 1"),
    ({"forward_decay": 0.9}, r"mlp.forward_decay is 0.9, but mlp.norm is 'none'"),
])  # fmt: skip
def test_a_study_network_refuses(settings: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLP(**settings)  # type: ignore[arg-type]


class _Gated(nn.Module):
    """A constant buffer that is negated on the way, and a count that is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)
        self.register_buffer("shut", torch.tensor([True, False, False, False, True, False]))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.linear(x * ~self.shut)  # type: ignore[no-any-return]


def test_buffers_that_are_read_and_counted_in_aside_passes() -> None:
    lanes = [Lane(seed, UPGD(lr=0.05, order="exact", noise_std=0.0)) for seed in (0, 1)]
    made = Population(_Gated, Table(batch=3), lanes, compiled=False, dtype=torch.float64, plasticity_every=1)
    made.advance(4)
    made.measure(["weight_magnitude"])
    assert made.state.buffers["passes"].tolist() == [4, 4]
    model = _Gated().double()
    start = population(_Gated, [Lane(0, SGD(lr=0.05))])
    model.load_state_dict({**lane(start, 0).params, **lane(start, 0).buffers})
    x, y = (torch.tensor(t, dtype=torch.float64) for t in Table(batch=3).rows(0))
    expected = float(((model(x[0]) - y[0]) ** 2).sum(-1).mean().detach())
    start.advance(1)
    assert float(start.collect(1)["online_loss"][0]) == pytest.approx(expected, rel=1e-12)
