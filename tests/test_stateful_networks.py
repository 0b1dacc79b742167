"""Networks in lanes that draw random numbers or keep running statistics: dropout, batch and online normalisation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from references import Table, lane, same
from torch import Tensor, nn

from perennial import MLP, SGD, ContinualBackprop, Lane, Population, metrics
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


@pytest.mark.parametrize(
    "layer", [nn.AlphaDropout(), nn.RReLU(), nn.Dropout1d()], ids=lambda layer: type(layer).__name__
)
def test_other_random_layers_are_refused(layer: nn.Module) -> None:
    network = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), layer, nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"draws random numbers by .*, which lanes could not draw again"):
        population(lambda: network, [Lane(0, SGD())])


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
