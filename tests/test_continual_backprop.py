"""What continual backpropagation must do, and where its published code does not.

Each test names what it would have caught; "published" is the code beside the Nature paper.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import SIZES, Table, lane, populate, same
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call

from perennial import MLP, SGD, UPGD, Adam, ContinualBackprop, Lane
from perennial.methods import Context
from perennial.noise import Noise, seed_key
from perennial.units import build_and_record, trace

EARLIER: dict[str, Any] = {"utility": "adaptable_contribution", "bias_correction": True, "bias_transfer": True}


class Bench:
    """One network under continual backpropagation alone: no gradient moves anything."""

    def __init__(self, method: ContinualBackprop, model: nn.Module, example: Tensor, initial: Any = None) -> None:
        self.model = model.double()
        self.params = {name: w.detach().clone() for name, w in self.model.named_parameters()}
        self.units = trace(self.model, example.double(), initial=initial)
        (self.method,) = type(method).settled([method], self.units)
        self.state: Any = self.method.init(self.params, self.units)
        self.time = 0

    def output(self, x: Tensor) -> Tensor:
        return functional_call(self.model, self.params, (x,)).detach()

    def step(
        self, hidden: dict[str, Tensor], seed: int = 0, signals: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """One step on these activations; the masks of replaced units."""
        key = torch.tensor(seed_key(seed, "method"), dtype=torch.int32)
        noise = Noise(key, torch.tensor(self.time, dtype=torch.int32), self.method.name)
        grads = {name: torch.full_like(w, torch.nan) for name, w in self.params.items()}  # not its business
        context = Context(grads, hidden, noise, self.units, signals or {})
        changed, self.state = self.method.step(self.params, self.state, context)
        self.params |= changed
        self.time += 1
        return self.method.replaced(self.state)


def bench(method: ContinualBackprop, hidden: tuple[int, ...] = (8,), inputs: int = 6, outputs: int = 3) -> Bench:
    torch.manual_seed(0)
    model, initial = build_and_record(lambda: MLP(hidden=hidden).build(inputs, outputs))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # as after some training: biases are not zero
    return Bench(method, model, torch.zeros(2, inputs), initial)


def relu_units(b: Bench, x: Tensor) -> dict[str, Tensor]:
    """The activations of every hidden layer of an MLP by plain arithmetic."""
    found = {}
    names = [name.removesuffix(".weight") for name in b.params if name.endswith("weight")]
    for name in names[:-1]:
        x = torch.relu(x @ b.params[f"{name}.weight"].T + b.params[f"{name}.bias"])
        found[name] = x
    return found


# --- the moment of replacement --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.15, 1.0])
def test_bias_transfer_preserves_the_mean_output(rate: float) -> None:
    """Published: the mean activation is cleared before it is used, and nothing is ever transferred."""
    method = ContinualBackprop(rate, 0, utility_decay=0.0, bias_transfer=True)  # decay 0: the mean is this batch's
    b = bench(method)
    x = torch.randn(64, 6, dtype=torch.float64)
    for _ in range(8):
        before, hidden = b.output(x), relu_units(b, x)
        outgoing, bias = b.params["3.weight"].clone(), b.params["3.bias"].clone()
        gone = b.step(hidden)["1"]
        after = b.output(x)
        torch.testing.assert_close(after.mean(0), before.mean(0), rtol=0, atol=1e-12)
        removed = (hidden["1"] - hidden["1"].mean(0))[:, gone] @ outgoing[:, gone].T
        torch.testing.assert_close(after, before - removed, rtol=0, atol=1e-12)
        assert int(gone.sum()) in ((8,) if rate == 1.0 else (1, 2))
        assert not torch.equal(b.params["3.bias"], bias)
        b.params["3.weight"][:, gone] = torch.randn(3, 1, dtype=torch.float64)  # they learn something at once


def test_bias_transfer_uses_the_running_mean_since_birth() -> None:
    """With decay the transferred mean is the bias-corrected moving average of the unit's own lifetime."""
    decay = 0.8
    b = bench(ContinualBackprop(0.125, 4, decay, bias_transfer=True), hidden=(8,))
    rng = torch.Generator().manual_seed(1)
    history: list[list[float]] = [[] for _ in range(8)]
    replaced = 0
    for _ in range(60):
        h = torch.rand(5, 8, generator=rng, dtype=torch.float64)
        outgoing, bias = b.params["3.weight"].clone(), b.params["3.bias"].clone()
        gone = b.step({"1": h})["1"]
        for j in range(8):
            history[j].append(float(h[:, j].mean()))
        expected = bias
        for j in gone.nonzero()[:, 0].tolist():
            weights = [decay**age for age in reversed(range(len(history[j])))]
            expected = expected + outgoing[:, j] * float(np.average(history[j], weights=weights))
            history[j] = []
            replaced += 1
            b.params["3.weight"][:, j] = torch.randn(3, dtype=torch.float64)  # it learns something at once
        torch.testing.assert_close(b.params["3.bias"], expected, rtol=1e-9, atol=1e-12)
    assert replaced > 20


def test_without_bias_transfer_the_output_loses_exactly_the_units_contribution() -> None:
    b = bench(ContinualBackprop(0.2, 0))
    x = torch.randn(16, 6, dtype=torch.float64)
    for _ in range(4):
        before, hidden, outgoing = b.output(x), relu_units(b, x), b.params["3.weight"].clone()
        bias = b.params["3.bias"].clone()
        gone = b.step(hidden)["1"]
        assert gone.any()
        assert (b.params["3.weight"][:, gone] == 0).all()
        assert torch.equal(b.params["3.weight"][:, ~gone], outgoing[:, ~gone])
        assert torch.equal(b.params["3.bias"], bias)
        removed = hidden["1"][:, gone] @ outgoing[:, gone].T
        torch.testing.assert_close(b.output(x), before - removed, rtol=0, atol=1e-12)


def test_a_fresh_unit_starts_from_nothing_and_others_are_left_alone() -> None:
    b = bench(ContinualBackprop(0.1, 3, 0.9, **EARLIER), hidden=(8, 5))
    x = torch.randn(16, 6, dtype=torch.float64)
    seen = 0
    for _ in range(30):
        before = {name: w.clone() for name, w in b.params.items()}
        old = b.state
        masks = b.step(relu_units(b, x))
        for name, below in (("1", None), ("3", "1")):
            gone = masks[name]
            seen += int(gone.sum())
            for table in (b.state.utility, b.state.mean, b.state.age):
                assert (table[name][gone] == 0).all()
            assert (b.params[f"{name}.bias"][gone] == 0).all()
            assert torch.equal(b.state.age[name][~gone], old.age[name][~gone] + 1)
            kept = torch.ones_like(before[f"{name}.weight"], dtype=torch.bool)
            kept[gone] = False
            if below is not None:
                kept[:, masks[below]] = False
            assert torch.equal(b.params[f"{name}.weight"][kept], before[f"{name}.weight"][kept])
            assert (b.params[f"{name}.weight"][gone] != before[f"{name}.weight"][gone]).all()
    assert seen > 10


# --- the optimizer's state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [
    Adam(lr=0.01), SGD(lr=0.005, momentum=0.9), UPGD(lr=0.02, noise_std=0.01)
], ids=lambda rule: rule.name)  # fmt: skip
def test_the_rules_state_is_fresh_on_row_bias_and_column_and_nowhere_else(rule: Any) -> None:
    """Published: torch's Adam is never reset, the convolutional code forgets the row's first moment."""
    population = populate([Lane(1, rule, (ContinualBackprop(0.05, 5),))], Table(batch=3))
    seen = 0
    for _ in range(60):
        old = lane(population, 0).methods[0]
        population.advance(1)
        state = lane(population, 0)
        gone = state.methods[1].replaced
        seen += int(gone["1"].sum() + gone["3"].sum())
        fresh = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in state.params.items()}
        for name, reader in (("1", "3"), ("3", "5")):
            fresh[f"{name}.weight"][gone[name]] = True
            fresh[f"{name}.bias"][gone[name]] = True
            fresh[f"{reader}.weight"][:, gone[name]] = True
        own = state.methods[0]
        for field, table in own._asdict().items():
            for name, entry in table.items():
                if isinstance(entry, tuple):  # counts a dimension: a weight's is the smallest of its coordinates'
                    age = entry[0]
                    for other in entry[1:]:
                        age = torch.minimum(age, other)
                    assert torch.equal(age == 0, fresh[name]), name
                else:
                    assert (entry[fresh[name]] == 0).all(), name
                    kept = ~fresh[name] & (getattr(old, field)[name] != 0)
                    assert (entry[kept] != 0).all(), name
    assert seen > 10


def test_the_first_adam_steps_of_a_fresh_unit_are_those_of_a_fresh_adam() -> None:
    """A zeroed moment with an old step count would take steps sqrt(1 - .999) / (1 - .9) = 0.3 times too small."""
    rate = 0.01
    population = populate([Lane(1, Adam(lr=rate), (ContinualBackprop(0.05, 5),))], Table(batch=16))
    checked = 0
    for _ in range(80):
        population.advance(1)
        before = lane(population, 0)
        population.advance(1)
        after = lane(population, 0)
        again = after.methods[1].replaced
        for name, mask in before.methods[1].replaced.items():
            rows = mask & ~again[name]
            moved = (after.params[f"{name}.bias"] - before.params[f"{name}.bias"])[rows].abs()
            # The unit's outgoing weights are 0: no gradient reaches its row yet, and its column moves by lr exactly.
            torch.testing.assert_close(moved, torch.zeros_like(moved), rtol=0, atol=0)
            reader = {"1": "3", "3": "5"}[name]
            columns = (after.params[f"{reader}.weight"] - before.params[f"{reader}.weight"])[:, rows].abs()
            if reader in again:
                columns = columns[~again[reader]]
            moving = columns[columns > 0]
            torch.testing.assert_close(moving, torch.full_like(moving, rate), rtol=1e-3, atol=0)
            checked += len(moving)
    assert checked > 20


# --- how many, and which --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize(
    ("rate", "units", "steps"), [pytest.param(0.01, 10, 1500, marks=pytest.mark.slow), (0.27, 10, 400)]
)
def test_replaces_the_expected_number(rate: float, units: int, steps: int, accumulate: bool) -> None:
    """Published: without accumulation 1 or more due are cut to a whole number instead of rounded at random."""
    threshold = 4
    b = bench(ContinualBackprop(rate, threshold, accumulate=accumulate), hidden=(units,))
    h = {"1": torch.rand(1, units, dtype=torch.float64)}
    total, expected, variance, ages = 0, 0.0, 0.0, np.zeros(units, dtype=int)
    for _ in range(steps):
        gone = b.step(h)["1"].numpy()
        ages += 1
        eligible = int((ages > threshold).sum())
        expected += rate * eligible
        variance += (rate * eligible % 1) * (1 - rate * eligible % 1)
        total += int(gone.sum())
        assert gone.sum() <= eligible
        assert (ages[gone] > threshold).all(), "an immature unit was replaced"
        ages[gone] = 0
        assert np.array_equal(ages, b.state.age["1"].numpy())
        assert 0 <= float(b.state.quota["1"]) < 1 if accumulate else float(b.state.quota["1"]) == 0
    assert expected > 20
    if accumulate:
        assert abs(total - expected) <= 1
    else:
        assert abs(total - expected) < 4 * math.sqrt(variance)


@pytest.mark.parametrize("accumulate", [True, False])
def test_no_burst_after_a_drought(accumulate: bool) -> None:
    """Published, convolutions: the debt grows with all channels while few are mature, then falls due at once."""
    rate, units, threshold = 0.2, 10, 40
    b = bench(ContinualBackprop(rate, threshold, accumulate=accumulate), hidden=(units,))
    h = {"1": torch.rand(1, units, dtype=torch.float64)}
    ages, total = np.zeros(units, dtype=int), 0
    for step in range(400):
        gone = b.step(h)["1"].numpy()
        ages += 1
        eligible = int((ages > threshold).sum())
        if step < threshold:
            assert float(b.state.quota["1"]) == 0
            assert not gone.any()
        assert gone.sum() <= rate * eligible + 1
        total += int(gone.sum())
        ages[gone] = 0
    assert total > 50


_SETTINGS = given(
    rate=st.floats(0, 1), threshold=st.integers(0, 6), units=st.integers(1, 9), accumulate=st.booleans(),
    seed=st.integers(0, 1000),
)  # fmt: skip


@settings(max_examples=10, deadline=None)
@_SETTINGS
def test_replaces_the_lowest_of_the_mature_and_never_more(
    rate: float, threshold: int, units: int, accumulate: bool, seed: int
) -> None:
    """Published, convolutions: topk raises when the debt exceeds the mature units."""
    _replaces_the_lowest(rate, threshold, units, accumulate, seed)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@_SETTINGS
def test_replaces_the_lowest_of_the_mature_under_many_settings(
    rate: float, threshold: int, units: int, accumulate: bool, seed: int
) -> None:
    _replaces_the_lowest(rate, threshold, units, accumulate, seed)


def _replaces_the_lowest(rate: float, threshold: int, units: int, accumulate: bool, seed: int) -> None:
    b = bench(ContinualBackprop(rate, threshold, 0.5, accumulate=accumulate), hidden=(units,))
    rng = torch.Generator().manual_seed(seed)
    for _ in range(25):
        h = torch.rand(2, units, generator=rng, dtype=torch.float64)
        score = h.mean(0) * b.params["3.weight"].abs().sum(0)
        utility = 0.5 * b.state.utility["1"] + 0.5 * score
        mature = b.state.age["1"] + 1 > threshold
        gone = b.step({"1": h}, seed)["1"]
        assert not (gone & ~mature).any()
        if gone.any() and (mature & ~gone).any():
            assert utility[gone].max() <= utility[mature & ~gone].min() * (1 + 1e-12)
        assert int(gone.sum()) <= math.floor(rate * int(mature.sum()) + 1)
        b.params["3.weight"] = torch.where(
            gone, torch.randn(3, 1, generator=rng, dtype=torch.float64), b.params["3.weight"]
        )


@pytest.mark.parametrize("threshold", [0, 3, 7])
def test_the_maturity_threshold_is_kept(threshold: int) -> None:
    """Published: the setting was read under another name, and 10 used whatever the study said."""
    b = bench(ContinualBackprop(1.0, threshold), hidden=(4,))
    h = {"1": torch.rand(1, 4, dtype=torch.float64)}
    for cycle in range(3):
        for step in range(threshold + 1):
            gone = b.step(h)["1"]
            assert gone.all() if step == threshold else not gone.any(), (cycle, step)


def test_per_step_limits_and_the_debt_stays_payable() -> None:
    b = bench(ContinualBackprop(0.9, 2, per_step=2), hidden=(8,))
    h = {"1": torch.rand(1, 8, dtype=torch.float64)}
    for _ in range(50):
        assert int(b.step(h)["1"].sum()) <= 2
        assert float(b.state.quota["1"]) <= 8


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "two"])
def test_per_step_is_a_whole_number_from_1(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"continual_backprop\.per_step"):
        ContinualBackprop(per_step=value)


def test_lanes_may_differ_in_any_rate() -> None:
    """Rates are numbers: a control at rate 0 and a lane that replaces several at once share a program, and each gets
    what it would get alone."""
    rates = (0.0, 0.05, 0.9)
    lanes = [Lane(2, SGD(lr=0.02), (ContinualBackprop(rate, 5),)) for rate in rates]
    together = populate(lanes)
    together.advance(40)
    assert int(together.state.replaced[0]) == 0
    for number, one in enumerate(lanes):
        alone = populate([one])
        alone.advance(40)
        same(lane(alone, 0).params, lane(together, number).params, rtol=1e-6)


# --- utilities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["contribution", "mean_corrected_contribution", "adaptable_contribution"])
def test_utilities_decay(kind: str) -> None:
    """Published, residual networks: a running sum without decay, which a fresh unit even inherits."""
    decay = 0.9
    b = bench(ContinualBackprop(0.0, 0, decay, utility=kind))
    for _ in range(5):
        b.step({"1": torch.rand(4, 8, dtype=torch.float64)})
    assert (b.state.utility["1"] > 0).all()
    if kind != "contribution":  # constant activations have no mean-corrected contribution, once the mean has settled
        mean = b.state.mean["1"].clone()
        for _ in range(400):
            b.step({"1": torch.full((4, 8), 0.5, dtype=torch.float64)})
        assert (b.state.utility["1"] < 1e-6).all()
        assert not torch.equal(mean, b.state.mean["1"])
        torch.testing.assert_close(b.state.mean["1"], torch.full((8,), 0.5, dtype=torch.float64), rtol=1e-6, atol=0)
        return
    for _ in range(5):
        before = b.state.utility["1"]
        b.step({"1": torch.zeros(4, 8, dtype=torch.float64)})
        torch.testing.assert_close(b.state.utility["1"], decay * before, rtol=1e-12, atol=0)


def test_the_sign_of_an_activation_does_not_matter() -> None:
    """Published, one variant: a signed mean, which takes a strong negative unit for the worst."""
    h = torch.tensor([[3.0, -3.0, 0.1], [-3.0, -3.0, 0.1]], dtype=torch.float64)
    b = bench(ContinualBackprop(0.34, 0), hidden=(3,))
    b.params["3.weight"] = torch.ones(3, 3, dtype=torch.float64)
    assert b.step({"1": h})["1"].tolist() == [False, False, True]


@pytest.mark.parametrize(("corrected", "victim"), [(True, 1), (False, 0)])
def test_bias_correction_does_not_replace_a_unit_for_being_young(corrected: bool, victim: int) -> None:
    """Published in ports: ranked by the raw average, the newly mature are replaced again and again."""
    b = bench(ContinualBackprop(0.0, 3, 0.99, bias_correction=corrected), hidden=(2,))
    b.params["3.weight"] = torch.ones(3, 2, dtype=torch.float64)
    h = {"1": torch.tensor([[2.0, 1.0]], dtype=torch.float64)}  # unit 0 is twice as useful ...
    for _ in range(300):
        b.step(h)
    for table in (b.state.utility, b.state.age):
        table["1"][0] = 0  # ... but born now
    for _ in range(4):
        b.step(h)
    b.method = ContinualBackprop(0.5, 3, 0.99, bias_correction=corrected, per_step=1)
    assert b.step(h)["1"].nonzero()[:, 0].tolist() == [victim]


@pytest.mark.parametrize("kind", ["outgoing_magnitude", "incoming_magnitude", "activation", "taylor", "fisher"])
def test_the_least_useful_unit_goes(kind: str) -> None:
    """Of three units one is least by its outgoing weights, one by its incoming, one by what it does."""
    b = bench(ContinualBackprop(0.34, 0, utility=kind), hidden=(3,))
    b.params["3.weight"] = torch.tensor([[0.1, 1.0, 1.0]] * 3, dtype=torch.float64)
    b.params["1.weight"] = torch.tensor([[1.0] * 6, [-0.1] * 6, [1.0] * 6], dtype=torch.float64)
    b.params["1.bias"] = torch.tensor([1.0, 99.0, 1.0], dtype=torch.float64)  # is no incoming weight
    h = torch.tensor([[1.0, 1.0, 0.1], [1.0, 1.0, 0.0]], dtype=torch.float64)
    victim = {"outgoing_magnitude": 0, "incoming_magnitude": 1}.get(kind, 2)
    assert b.step({"1": h}, signals={"1": torch.ones_like(h)})["1"].nonzero()[:, 0].tolist() == [victim]


def test_random_utility_replaces_every_unit_alike() -> None:
    """A new number at every step, neither averaged nor corrected: otherwise units of some age would be favoured."""
    b = bench(ContinualBackprop(0.2, 0, 0.9, utility="random", bias_correction=True), hidden=(5,))
    h = {"1": torch.rand(1, 5, dtype=torch.float64)}
    count = np.zeros(5)
    for _ in range(600):
        gone = b.step(h)["1"].numpy()
        utility = b.state.utility["1"]
        assert ((utility > 0) | torch.tensor(gone)).all()
        assert (utility[gone] == 0).all()
        count += gone
    assert count.sum() == 600
    assert stats.chisquare(count).pvalue > 1e-4


# --- where fresh weights come from ----------------------------------------------------------------------------------


def _harvest(factory: Any, steps: int = 120) -> dict[str, np.ndarray]:
    """All weights redrawn in a network whose units are all replaced at every step."""
    torch.manual_seed(0)
    model, initial = build_and_record(factory)
    b = Bench(ContinualBackprop(1.0, 0), model, torch.zeros(2, 6), initial)
    found: dict[str, list[Tensor]] = {}
    for _ in range(steps):
        for name, w in b.params.items():
            b.params[name] = torch.full_like(w, 77.0)
        hidden = {layer.name: torch.rand(1, layer.size, dtype=torch.float64) for layer in b.units}
        assert all(mask.all() for mask in b.step(hidden).values())
        for layer in b.units:
            for part in layer.incoming:
                found.setdefault(part.parameter, []).append(b.params[part.parameter].flatten())
    return {name: torch.cat(all_).numpy() for name, all_ in found.items()}


def _normal_net() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 2))
    nn.init.normal_(net[0].weight, 0.5, 0.2)
    nn.init.xavier_normal_(net[2].weight)
    nn.init.constant_(net[0].bias, 0.25)
    nn.init.uniform_(net[2].bias, 1.0, 2.0)
    return net


@pytest.mark.parametrize(("factory", "expected"), [
    pytest.param(
        lambda: MLP(hidden=(9, 7)).build(6, 2),
        {"1.weight": stats.uniform(-1, 2), "3.weight": stats.uniform(-math.sqrt(6 / 9), 2 * math.sqrt(6 / 9)),
         "1.bias": 0.0, "3.bias": 0.0},
        marks=pytest.mark.slow,
    ),
    (lambda: MLP(hidden=(9, 7), init="default").build(6, 2),
     {"1.weight": stats.uniform(-(6**-0.5), 2 * 6**-0.5), "1.bias": stats.uniform(-(6**-0.5), 2 * 6**-0.5),
      "3.weight": stats.uniform(-1 / 3, 2 / 3), "3.bias": stats.uniform(-1 / 3, 2 / 3)}),
    (_normal_net,
     {"0.weight": stats.norm(0.5, 0.2), "2.weight": stats.norm(0, math.sqrt(2 / 16)), "0.bias": 0.25,
      "2.bias": stats.uniform(1, 1)}),
], ids=["kaiming", "default", "normal"])  # fmt: skip
def test_fresh_weights_come_from_the_layers_own_distribution(factory: Any, expected: dict[str, Any]) -> None:
    """Published: one bound for every convolution whatever the initialiser, and biases always zero."""
    found = _harvest(factory)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        if isinstance(expected[name], float):
            assert (values == expected[name]).all(), name
            continue
        low, high = expected[name].support()
        assert low - 1e-6 <= values.min() <= values.max() <= high + 1e-6, name
        assert stats.kstest(values, expected[name].cdf).pvalue > 1e-4, name
        assert len(np.unique(values)) > 0.99 * len(values), f"{name}: the same numbers drawn again"


def test_fresh_weights_are_a_function_of_seed_step_and_place() -> None:
    """Which other units are replaced beside it, and in which order, does not change what a unit gets."""
    rows = []
    for rate, scale in ((1.0, 1.0), (0.125, 0.001)):
        b = bench(ContinualBackprop(rate, 0), hidden=(8,))
        h = torch.ones(1, 8, dtype=torch.float64)
        h[0, 5] = scale * 1e-6
        gone = b.step({"1": h}, seed=9)["1"]
        assert gone[5]
        rows.append(b.params["1.weight"][5])
    assert torch.equal(rows[0], rows[1])
    b = bench(ContinualBackprop(1.0, 0), hidden=(8,))
    b.step({"1": torch.ones(1, 8, dtype=torch.float64)}, seed=10)
    assert (b.params["1.weight"][5] != rows[0]).all()


# --- convolutions ---------------------------------------------------------------------------------------------------


class _Conv(nn.Module):
    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3)
        self.second = nn.Conv2d(3, 4, 2)
        self.hidden = nn.Linear(4 * 2 * 2, 5)
        self.out = nn.Linear(5, 2)
        self.channels_last = channels_last

    def flat(self, x: Tensor) -> Tensor:
        h = torch.relu(self.second(torch.relu(self.first(x))))
        h = torch.max_pool2d(h, 2)
        return (h.permute(0, 2, 3, 1) if self.channels_last else h).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(self.flat(x))))


@pytest.mark.parametrize("channels_last", [False, True])
def test_conv_flatten_linear_against_brute_force(channels_last: bool) -> None:
    """Which inputs of the linear layer move when a channel's bias does: no rule about layouts is assumed."""
    torch.manual_seed(0)
    model, initial = build_and_record(lambda: _Conv(channels_last))
    x = torch.randn(7, 2, 7, 7, dtype=torch.float64)
    b = Bench(ContinualBackprop(0.25, 0, 0.0, bias_transfer=True), model, x, initial)
    assert [layer.name for layer in b.units] == ["first", "second", "hidden"]
    layer = b.units[1]
    assert layer.tap == "hidden.weight"
    columns = []
    for channel in range(4):
        with torch.no_grad():
            before = model.flat(x)
            model.second.bias[channel] += 50.0
            columns.append((model.flat(x) != before).any(0).nonzero()[:, 0])
            model.second.bias[channel] -= 50.0
    assert sorted(torch.cat(columns).tolist()) == list(range(16))
    by_channel = torch.stack([model.flat(x).detach()[:, c] for c in columns], 2)  # [batch, positions, channels]
    torch.testing.assert_close(
        layer.activation(model.flat(x).detach()).sort(2)[0], by_channel.mT.sort(2)[0], rtol=0, atol=0
    )
    for channel in range(4):
        unit = layer.outgoing[0].gather(b.params["hidden.weight"])[channel]
        assert sorted(unit.tolist()) == sorted(b.params["hidden.weight"][:, columns[channel]].flatten().tolist())
    hidden = {
        "first": torch.relu(model.first(x)).detach(),
        "second": layer.activation(model.flat(x).detach()),
        "hidden": torch.relu(model.hidden(model.flat(x))).detach(),
    }
    for _ in range(4):
        before = {name: w.clone() for name, w in b.params.items()}
        masks = b.step(hidden)
        fresh = torch.zeros(16, dtype=torch.bool)
        for channel in masks["second"].nonzero()[:, 0].tolist():
            fresh[columns[channel]] = True
            mean = before["hidden.weight"][:, columns[channel]].sum(1) * by_channel[..., channel].mean()
            keep = ~masks["hidden"]
            moved = b.params["hidden.bias"] - before["hidden.bias"]
            torch.testing.assert_close(moved[keep], mean[keep], rtol=1e-9, atol=1e-12)
        rows = ~masks["hidden"]
        assert (b.params["hidden.weight"][:, fresh][rows] == 0).all()
        assert torch.equal(b.params["hidden.weight"][:, ~fresh][rows], before["hidden.weight"][:, ~fresh][rows])
        bound = 1 / math.sqrt(3 * 2 * 2)
        assert (b.params["second.weight"][masks["second"]].abs() <= bound).all()
        assert (
            b.params["second.weight"][masks["second"]][:, ~masks["first"]]
            != before["second.weight"][masks["second"]][:, ~masks["first"]]
        ).all()
        touched = b.units.touched(masks, {name: w.shape for name, w in b.params.items()})
        assert torch.equal(touched["hidden.weight"][1], fresh)
        assert torch.equal(touched["second.weight"][0], masks["second"])
        assert torch.equal(touched["second.weight"][1], masks["first"])
    assert any(m.any() for m in masks.values())


# --- what it refuses ------------------------------------------------------------------------------------------------


def test_refuses_a_network_without_hidden_units() -> None:
    with pytest.raises(ValueError, match="continual_backprop found no hidden units"):
        populate([Lane(0, SGD(), (ContinualBackprop(),))], hidden=())


def test_refuses_what_it_cannot_redraw() -> None:
    def factory() -> nn.Module:
        net = nn.Sequential(nn.Linear(SIZES[0], 4), nn.ReLU(), nn.Linear(4, 2))
        with torch.no_grad():
            net[0].weight.copy_(torch.eye(4, SIZES[0]))
        return net

    model, initial = build_and_record(factory)
    with pytest.raises(ValueError, match=r"cannot redraw 0\.weight"):
        Bench(ContinualBackprop(), model, torch.zeros(2, SIZES[0]), initial)


def test_refuses_to_transfer_to_a_bias_that_is_not_there() -> None:
    model, initial = build_and_record(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)))
    with pytest.raises(ValueError, match=r"bias beside 2\.weight"):
        Bench(ContinualBackprop(bias_transfer=True), model, torch.zeros(2, 6), initial)
    Bench(ContinualBackprop(), model, torch.zeros(2, 6), initial)
