"""The probe of utilities, against the same numbers computed one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from references import populate, same
from scipy import stats
from torch import Tensor, nn

import perennial
from perennial import MLP, SGD, Lane, Population, SumOfTwo, UtilityQuality
from perennial.methods import PROBES
from perennial.studies import load, variants_of

STEPS = 7
SCORES = UtilityQuality.__dataclass_fields__["score"].metadata["options"]
EVERY = [(s, g) for g in ("weight", "feature") for s in SCORES if (s, g) != ("contribution", "weight")]


def population(score: str, granularity: str, seeds: range = range(2)) -> Population:
    lanes = [Lane(s, SGD(lr=0.05), (UtilityQuality(score=score, granularity=granularity),)) for s in seeds]
    return Population(lambda: MLP(hidden=(6,)).build(5, 1), SumOfTwo(), lanes, dtype=torch.float64, compiled=False)


class ByHand:
    """Gradient descent on a model of torch, every utility by a loop."""

    def __init__(self, start: Population, seed: int) -> None:
        self.model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1)).double()
        values = [w[..., seed].clone() for w in start.state.params.values()]
        for p, value in zip(self.model.parameters(), values, strict=True):
            p.data = value
        self.x, self.y = (t[..., seed].double() for t in start.stream.open([0, 1], torch.device("cpu")).examples(0, 99))
        self.moved: Tensor = torch.zeros(())

    def loss(self, step: int) -> Tensor:
        return ((self.model(self.x[step]) - self.y[step]) ** 2).sum()

    @torch.no_grad()
    def without(self, step: int, weights: list[tuple[nn.Parameter, Any]]) -> float:
        """The loss without some weights, minus the loss with them."""
        with_them = float(self.loss(step))
        kept = [p.data.clone() for p, _ in weights]
        for p, at in weights:
            p.data[at] = 0.0
        without = float(self.loss(step))
        for (p, _), old in zip(weights, kept, strict=True):
            p.data = old
        return without - with_them

    def exact(self, step: int, granularity: str) -> np.ndarray:
        if granularity == "feature":
            return np.array([self.without(step, [(self.model[2].weight, (slice(None), unit))]) for unit in range(6)])
        places = [(p, at) for p in self.model.parameters() for at in np.ndindex(*p.shape)]
        return np.array([self.without(step, [place]) for place in places])

    def score(self, step: int, score: str, granularity: str) -> np.ndarray:
        params = list(self.model.parameters())
        grads = torch.autograd.grad(self.loss(step), params)
        h = torch.relu(self.model[0](self.x[step]))[0].detach()
        # the diagonal of the Hessian: with one output and squared error, 2 (d output / d w)^2, exactly
        slopes = torch.autograd.grad(self.model(self.x[step]).sum(), params)
        curvature = [2 * s**2 for s in slopes]
        if granularity == "weight":
            w, g, c = (torch.cat([t.detach().flatten() for t in ts]) for ts in (params, grads, curvature))
        else:
            w, g, c = params[2].detach()[0], grads[2][0], curvature[2][0]
        first = -g * w
        self.moved = self.moved + first
        found = {
            "first_order": first,
            "second_order": first + c * w**2 / 2,
            "magnitude": w.abs(),
            "squared_gradient": g**2,
            "snip": first.abs(),
            "fisher": first**2 / 2,
            "movement": self.moved,
        }
        return (h * w.abs() if score == "contribution" else found[score]).numpy()

    def descend(self, step: int) -> None:
        for p, g in zip(self.model.parameters(), torch.autograd.grad(self.loss(step), list(self.model.parameters()))):  # noqa: B905
            p.data -= 0.05 * g


@pytest.mark.parametrize(("score", "granularity"), [e for e in EVERY if e[0] != "random"])
def test_equals_the_same_by_hand(score: str, granularity: str) -> None:
    ours = population(score, granularity)
    hands = [ByHand(ours, seed) for seed in (0, 1)]
    for step in range(STEPS):
        ours.advance(1)
        measured = ours.measure()
        state = ours.state.methods[1]
        for seed, hand in enumerate(hands):
            exact, wanted = hand.exact(step, granularity), hand.score(step, score, granularity)
            got = torch.cat([v[..., seed].flatten() for v in state.score.values()]).numpy()
            np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)
            got = torch.cat([v[..., seed].flatten() for v in state.exact.values()]).numpy()
            np.testing.assert_allclose(got, exact, rtol=1e-6, atol=1e-13)
            exact = np.where(np.abs(exact) < 1e-13, 0.0, exact)
            assert float(measured["utility_spearman"][seed]) == pytest.approx(_spearman(wanted, exact), abs=1e-9)
            assert float(measured["utility_kendall"][seed]) == pytest.approx(_kendall(wanted, exact), abs=1e-9)
            hand.descend(step)


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of mean ranks."""
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def _kendall(a: np.ndarray, b: np.ndarray) -> float:
    """By counting pairs."""
    over = np.triu_indices(len(a), 1)
    x, y = (np.sign(np.subtract.outer(v, v))[over] for v in (a, b))
    return float((x * y).sum() / np.sqrt((x != 0).sum() * (y != 0).sum()))


@pytest.mark.parametrize("granularity", ["weight", "feature"])
def test_it_changes_nothing(granularity: str) -> None:
    probed = population("second_order", granularity)
    bare = Population(
        lambda: MLP(hidden=(6,)).build(5, 1),
        SumOfTwo(),
        [Lane(s, SGD(lr=0.05)) for s in (0, 1)],
        dtype=torch.float64,
        compiled=False,
    )
    for p in (probed, bare):
        p.advance(20)
    same(probed.state.params, bare.state.params)


def test_random_orders_nothing() -> None:
    ours = population("random", "weight", range(8))
    found = []
    for _ in range(40):
        ours.advance(1)
        found.append(ours.measure()["utility_spearman"])
    mean = float(torch.stack(found).mean())
    assert abs(mean) < 4 / np.sqrt(8 * 40 * 43)  # 43 weights


def test_one_that_says_the_same_of_all_has_correlation_zero() -> None:
    before = population("first_order", "weight")
    assert float(before.measure()["utility_spearman"][0]) == 0  # nothing is known before the first step


@pytest.mark.slow
def test_compiled_equals_uncompiled() -> None:
    lanes = [Lane(s, SGD(lr=0.05), (UtilityQuality(score="second_order"),)) for s in range(3)]
    compiled, plain = (
        Population(lambda: MLP(hidden=(6,)).build(5, 1), SumOfTwo(), lanes, dtype=torch.float64, compiled=c)
        for c in (True, False)
    )
    for p in (compiled, plain):
        p.advance(30)
    for name in UtilityQuality.MEASURES:
        np.testing.assert_allclose(compiled.measure()[name], plain.measure()[name], atol=1e-9)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="granularity='feature'"):
        UtilityQuality(score="contribution")
    with pytest.raises(ValueError, match="has none"):
        populate([Lane(0, SGD(), (UtilityQuality(granularity="feature"),))], hidden=())


def test_a_probe_is_not_attached() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="UtilityQuality is a probe, which only measures: give it to a Lane"):
        perennial.attach(UtilityQuality(), model, optimizer)


def test_only_what_is_asked_for_is_measured() -> None:
    ours = population("first_order", "weight")
    assert ours.measure(()) == {}
    assert set(ours.measure(["utility_kendall"])) == {"utility_kendall"}
    assert set(UtilityQuality.MEASURES) < set(ours.measure())


def test_the_study_measures_every_score() -> None:
    study = load("upgd/utility-quality")
    probes = {
        (probe.score, probe.granularity)
        for key, part in study.parts.items()
        for variant in variants_of(part, key, key)
        for probe in variant.interventions
        if isinstance(probe, UtilityQuality)
    }
    assert probes == set(EVERY)
    assert all(dataclasses.is_dataclass(probe) and not probe.OFF for probe in PROBES)
