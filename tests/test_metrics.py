"""How plastic a network is: cases with a known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from perennial.metrics import (
    dead_units,
    effective_rank_entropy,
    loss_of_plasticity,
    online_forgetting,
    sample_plasticity,
    weight_magnitude,
    window_means,
)


def of_singular_values(values: list[float], samples: int, features: int, seed: int = 0) -> torch.Tensor:
    """A matrix with exactly these singular values, float64."""
    rng = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(samples, samples, generator=rng, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(features, features, generator=rng, dtype=torch.float64))[0]
    return left[:, : len(values)] * torch.tensor(values, dtype=torch.float64) @ right[: len(values)]


def exact(values: list[float]) -> float:
    return float(np.exp(stats.entropy(values)))


# --- effective rank -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "features"), [(40, 12), (12, 40), (20, 20)])
@pytest.mark.parametrize("rank", [1, 2, 7, 12])
def test_effective_rank_of_equal_directions_is_their_number(rank: int, samples: int, features: int) -> None:
    x = of_singular_values([3.0] * rank, samples, features)
    assert float(effective_rank_entropy(x)) == pytest.approx(rank, rel=1e-5)


@pytest.mark.parametrize("values", [[5.0, 1.0], [1.0, 0.5, 0.25, 0.125], [1.0, 1e-3], [1e4, 3e3, 1.0]])
def test_effective_rank_is_the_exponential_of_the_entropy(values: list[float]) -> None:
    assert float(effective_rank_entropy(of_singular_values(values, 30, 10))) == pytest.approx(exact(values), rel=1e-5)


def test_effective_rank_of_special_matrices() -> None:
    assert float(effective_rank_entropy(torch.eye(9))) == pytest.approx(9)
    assert float(effective_rank_entropy(torch.zeros(8, 3))) == 0.0
    assert float(effective_rank_entropy(torch.ones(8, 3))) == pytest.approx(1, rel=1e-5)
    assert float(effective_rank_entropy(torch.rand(1, 5) + 1)) == pytest.approx(1)


def test_effective_rank_does_not_depend_on_scale_order_or_precision() -> None:
    x = torch.randn(60, 9)
    rank = float(effective_rank_entropy(x))
    assert float(effective_rank_entropy(x[torch.randperm(60)])) == pytest.approx(rank, rel=1e-9)
    assert float(effective_rank_entropy(x[:, torch.randperm(9)])) == pytest.approx(rank, rel=1e-9)
    assert float(effective_rank_entropy(x * 1e-12)) == pytest.approx(rank, rel=1e-5)
    assert float(effective_rank_entropy(x * 1e12)) == pytest.approx(rank, rel=1e-5)
    assert float(effective_rank_entropy(x.double())) == rank
    assert effective_rank_entropy(x).dtype == torch.float64
    assert rank == pytest.approx(exact(torch.linalg.svdvals(x.double()).tolist()), rel=1e-6)


def test_effective_rank_forgets_directions_below_a_ten_millionth() -> None:
    """What rounding leaves behind does not count, however many columns of it there are."""
    x = torch.randn(1000, 3, dtype=torch.float64) @ torch.randn(3, 200, dtype=torch.float64)
    assert float(effective_rank_entropy(x)) == pytest.approx(exact(torch.linalg.svdvals(x)[:3].tolist()), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_effective_rank_lies_between_1_and_the_shorter_side(samples: int, features: int, seed: int) -> None:
    x = torch.randn(samples, features, generator=torch.Generator().manual_seed(seed))
    rank = float(effective_rank_entropy(x))
    assert 1 - 1e-6 <= rank <= min(samples, features) + 1e-6
    assert rank == pytest.approx(exact(torch.linalg.svdvals(x.double()).tolist()), rel=1e-5)


# --- dead units and weights -----------------------------------------------------------------------------------------


def test_dead_units() -> None:
    h = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    assert float(dead_units([h])) == pytest.approx(1 / 3)
    assert float(dead_units([h, torch.zeros(3, 2)])) == pytest.approx(3 / 5), "by units, not by layers"
    assert float(dead_units([torch.zeros(4, 5)])) == 1.0
    assert float(dead_units([torch.ones(4, 5)])) == 0.0
    assert float(dead_units([-torch.ones(4, 5)])) == 0.0
    cancelling = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert float(dead_units([cancelling])) == 0.0, "published: the sum of activations, which can cancel"
    assert float(dead_units([torch.full((4, 2), 1e-30)])) == 0.0
    assert float(dead_units([h[torch.randperm(3)]])) == pytest.approx(1 / 3)
    assert float(dead_units([h.double()])) == pytest.approx(1 / 3)


def test_weight_magnitude() -> None:
    w, b = torch.tensor([[1.0, -3.0], [2.0, -2.0]]), torch.tensor([7.0])
    assert float(weight_magnitude([w, b])) == pytest.approx(15 / 5), "by elements, not by tensors"
    assert float(weight_magnitude([torch.zeros(3)])) == 0.0
    assert float(weight_magnitude([b, w])) == float(weight_magnitude([w, b]))
    assert float(weight_magnitude([w.double(), b.double()])) == pytest.approx(float(weight_magnitude([w, b])))
    assert not math.isnan(float(weight_magnitude([torch.full((3,), 1e30)])))


@pytest.mark.parametrize("metric", [lambda x: dead_units([x]), lambda x: weight_magnitude([x]), effective_rank_entropy])
def test_a_metric_changes_nothing(metric: object) -> None:
    x = torch.randn(6, 4, requires_grad=True)
    before, rng = x.detach().clone(), torch.get_rng_state()
    metric(x)  # type: ignore[operator]
    assert torch.equal(x.detach(), before)
    assert x.grad is None
    assert torch.equal(rng, torch.get_rng_state())


# --- of streams -----------------------------------------------------------------------------------------------------


def test_sample_plasticity() -> None:
    before, after = torch.tensor([2.0, 2.0, 1.0, 0.0, 0.0]), torch.tensor([0.5, 3.0, 0.0, 0.0, 1.0])
    assert sample_plasticity(before, after).tolist() == [0.75, 0.0, 1.0, 1.0, 0.0]


def test_measures_of_a_stream() -> None:
    accuracy = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    by_task = window_means(accuracy, 2)
    assert by_task.tolist() == [0.5, 1.0, 0.0], "the incomplete window is left out"
    assert float(online_forgetting(by_task)) == 0.5
    assert float(loss_of_plasticity(by_task)) == 0.5
    differences = by_task[:-1] - by_task[1:]
    assert float(differences.sum()) == float(online_forgetting(by_task)), "the sum of the steps telescopes"
    assert window_means(torch.ones(6, 3), 3).shape == (2, 3)
    with pytest.raises(ValueError, match="window is 8; it must be at least 1 and at most the 7 steps"):
        window_means(accuracy, 8)
