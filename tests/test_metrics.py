"""How plastic a network is: cases with a known answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.func import functional_call

from perennial import metrics
from perennial.metrics import (
    METRICS,
    UnitStatistics,
    collision_rate,
    collision_ratio,
    dead_units,
    distance_l1,
    distance_l2,
    dormant_units,
    dormant_units_of_sum,
    duplicate_units,
    effective_rank_entropy,
    feature_activity,
    feature_norm,
    gradient_norm_l0,
    gradient_norm_l1,
    gradient_norm_l2,
    hessian_effective_rank,
    loss_of_plasticity,
    ntk_effective_rank,
    numerical_rank,
    online_forgetting,
    rank_99,
    rank_99_energy,
    rarely_active_units,
    sample_plasticity,
    saturated_units,
    sharpness,
    singular_values,
    stable_rank_fro,
    weight_magnitude,
    weight_norm_l2,
    window_means,
)
from perennial.units import Nonlinearity, observe, trace


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


# --- other ranks ----------------------------------------------------------------------------------------------------

RANKS = [effective_rank_entropy, stable_rank_fro, rank_99, rank_99_energy, numerical_rank]


def by_numpy(rank: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """The definitions, worked out from a singular value decomposition by NumPy."""
    matrix = x.double().numpy()
    values = np.linalg.svd(matrix, compute_uv=False)
    if rank is effective_rank_entropy:
        return exact(values.tolist())
    if rank is stable_rank_fro:
        return float((np.linalg.norm(matrix, "fro") / np.linalg.norm(matrix, 2)) ** 2)
    if rank is numerical_rank:
        return float(np.linalg.matrix_rank(matrix, tol=max(x.shape) * torch.finfo(x.dtype).eps * values[0]))
    kept = values if rank is rank_99 else values**2
    return float(next(k for k in range(1, len(kept) + 1) if kept[:k].sum() >= 0.99 * kept.sum() * (1 - 1e-9)))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("samples", "features"), [(50, 12), (12, 50), (20, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_agree_with_numpy(
    rank: Callable[[torch.Tensor], torch.Tensor], samples: int, features: int, dtype: torch.dtype
) -> None:
    decaying = of_singular_values([0.7**k for k in range(10)], samples, features).to(dtype)
    for x in (torch.randn(samples, features, dtype=dtype), decaying, torch.randn(samples, features, dtype=dtype) + 3):
        assert float(rank(x)) == pytest.approx(by_numpy(rank, x), rel=1e-5)


@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_is_the_number_of_equal_directions(rank: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for size in (1, 3, 8):
        x = of_singular_values([2.5] * size, 30, 10)
        assert float(rank(x)) == pytest.approx(size, rel=1e-5)
        assert float(rank(1e-6 * x)) == pytest.approx(size, rel=1e-5)
    assert float(rank(torch.eye(100))) == pytest.approx(100, abs=1.0), "99 of 100 equal values make up 99%"
    assert float(rank(torch.zeros(6, 4))) == 0.0


def test_the_two_meanings_of_stable_rank_differ() -> None:
    """One strong direction and nine weak ones."""
    x = of_singular_values([10.0] + [1.0] * 9, 40, 20)
    assert float(stable_rank_fro(x)) == pytest.approx(1.09, rel=1e-6)
    assert float(rank_99(x)) == 10
    assert float(rank_99_energy(x)) == 9
    assert float(numerical_rank(x)) == 10
    tiny = of_singular_values([1.0] * 5 + [1e-12], 40, 20)
    assert float(numerical_rank(tiny)) == 6, "float64 tells it from rounding"
    assert float(numerical_rank(tiny.float())) == 5, "float32 does not"


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 1000), st.floats(0.1, 1.0))
def test_ranks_are_in_their_order(samples: int, features: int, seed: int, decay: float) -> None:
    size = min(samples, features)
    x = of_singular_values([decay**k for k in range(size)], samples, features, seed)
    fro, energy, absolute = float(stable_rank_fro(x)), float(rank_99_energy(x)), float(rank_99(x))
    assert 1 - 1e-9 <= fro <= size + 1e-9
    assert energy <= absolute <= float(numerical_rank(x)) <= size or decay**size < 1e-7
    assert fro <= float(effective_rank_entropy(x)) + 1e-6, "Renyi entropies fall with their order"


def test_singular_values() -> None:
    x = torch.randn(30, 7)
    assert torch.allclose(singular_values(x), torch.linalg.svdvals(x.double()), rtol=1e-7)
    assert torch.allclose(singular_values(x.T.contiguous()), torch.linalg.svdvals(x.double()), rtol=1e-7)


# --- units that do no work ------------------------------------------------------------------------------------------


def test_rarely_active_units() -> None:
    h = torch.zeros(200, 4)
    h[:1, 1] = 1.0  # on 0.5% of the samples
    h[:2, 2] = -1.0  # on 1%
    h[:, 3] = 2.0
    assert float(rarely_active_units(h)) == 0.5
    assert float(dead_units(h)) == 0.25
    assert float(rarely_active_units(h, share=0.5)) == 0.75


def test_dormant_units_and_the_other_scaling() -> None:
    """Mean magnitudes 0, 0.01, 1 and 2.99: the mean is 1."""
    h = torch.tensor([0.0, 0.01, 1.0, 2.99]) * torch.tensor([[1.0], [-1.0]])
    assert float(dormant_units(h)) == 0.5
    assert float(dormant_units(h, threshold=0.0)) == 0.25
    assert float(dormant_units(h, threshold=1.0)) == 0.75
    assert float(dormant_units_of_sum(h, threshold=0.25)) == 0.75, "the sum is four times the mean"
    assert float(dormant_units_of_sum(h)) == 0.5
    assert float(dormant_units(torch.zeros(3, 5))) == 1.0
    assert float(dormant_units(torch.ones(3, 50))) == 0.0
    assert float(dormant_units_of_sum(torch.ones(3, 50))) == 1.0, "why it is not to be used"


def test_saturated_units_and_activity() -> None:
    h = torch.tanh(torch.tensor([10.0, -10.0, 0.1]) * torch.ones(100, 1))
    h[0, 1] = 0.0  # 99 of 100 samples are at the bound
    assert float(saturated_units(h)) == pytest.approx(2 / 3)
    h[1, 1] = 0.0
    assert float(saturated_units(h)) == pytest.approx(1 / 3)
    assert float(feature_activity(h, low=-1, high=1)) == pytest.approx((100 + 2) / 300)
    sigmoid = (h + 1) / 2
    assert float(saturated_units(sigmoid, low=0, high=1)) == pytest.approx(1 / 3)
    rectified = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert float(feature_activity(rectified)) == 0.25
    with pytest.raises(ValueError, match=r"the bounds are 1\.0 and -1\.0; the first must lie below"):
        saturated_units(h, low=1.0, high=-1.0)


def test_duplicate_units() -> None:
    base = torch.linalg.qr(torch.randn(50, 3, dtype=torch.float64))[0]
    one, two, three = base.unbind(1)
    assert float(duplicate_units(base)) == 0.0, "orthogonal features"
    h = torch.stack([one, two, -3 * one, three, torch.zeros(50, dtype=torch.float64)], 1)
    assert float(duplicate_units(h)) == pytest.approx(2 / 5), "scale and sign do not matter, a dead unit is no multiple"
    near = torch.stack([one, one + 0.2 * two], 1)  # cosine 0.981
    assert float(duplicate_units(near)) == 0.0
    assert float(duplicate_units(near, similarity=0.98)) == 1.0


def test_feature_norm() -> None:
    h = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
    assert float(feature_norm(h)) == pytest.approx(5)
    assert float(feature_norm([h, 2 * h])) == pytest.approx(7.5)


# --- weights, gradients, changes ------------------------------------------------------------------------------------


def test_distances_and_gradient_norms() -> None:
    start = {"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([0.0])}
    now = {"b": torch.tensor([2.0]), "w": torch.tensor([[1.0, -1.0]])}
    assert float(distance_l1(now, start)) == 5
    assert float(distance_l2(now, start)) == pytest.approx(math.sqrt(13))
    assert float(distance_l2(list(start.values()), list(start.values()))) == 0.0
    g = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0, -4.0]])]
    assert float(gradient_norm_l0(g)) == 0.5
    assert float(gradient_norm_l1(g)) == 7
    assert float(gradient_norm_l2(g)) == 5
    assert float(weight_norm_l2(g)) == 5
    with pytest.raises(ValueError, match="c is in one alone"):
        distance_l1(now, {**start, "c": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"w is \[1, 2\] in the one and \[3\] in the other"):
        distance_l1({"w": torch.zeros(1, 2)}, {"w": torch.zeros(3)})
    with pytest.raises(ValueError, match="there are no weights"):
        weight_magnitude([])


def test_collisions() -> None:
    first = [torch.tensor([1.0, 0.0, -1.0, 0.0]), torch.tensor([1e-3, 0.0])]
    second = [torch.tensor([2.0, 2.0, 0.0, 0.0]), torch.tensor([1.0, 0.0])]
    assert float(collision_rate(first, second)) == pytest.approx(2 / 6)
    assert float(collision_rate(first, second, threshold=0.01)) == pytest.approx(1 / 6)
    assert float(collision_ratio(first, second)) == pytest.approx(2 / 6 / (3 / 6 * 3 / 6))
    assert math.isnan(float(collision_ratio(first, [torch.zeros(4), torch.zeros(2)])))
    rng = torch.Generator().manual_seed(0)
    masks = [(torch.rand(200_000, generator=rng) < share).float() for share in (0.1, 0.3)]
    # Binomial: 6,000 collisions expected, standard deviation 76 of them and of the masks' own counts less.
    assert float(collision_ratio([masks[0]], [masks[1]])) == pytest.approx(1, abs=4 * 77 / 6000)


# --- curvature ------------------------------------------------------------------------------------------------------


def quadratic(eigenvalues: list[float], dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, torch.Tensor]]:
    """A loss with these eigenvalues of the Hessian, in a rotated basis, of two parameters."""
    size = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    matrix = (basis * torch.tensor(eigenvalues, dtype=torch.float64) @ basis.T).to(dtype)
    params = {"a": torch.ones(size - 2, dtype=dtype), "b": torch.ones(2, 1, dtype=dtype)}

    def loss(p: dict[str, torch.Tensor]) -> torch.Tensor:
        w = torch.cat([p["a"], p["b"].flatten()])
        return 0.5 * w @ matrix @ w

    return loss, params


@pytest.mark.parametrize("eigenvalues", [[5.0, 1.0, 0.1, -7.0], [2.0] * 6, [1e-3 * k for k in range(1, 30)], [0.0] * 4])
def test_curvature_of_a_quadratic(eigenvalues: list[float]) -> None:
    loss, params = quadratic(eigenvalues)
    assert float(sharpness(loss, params, tolerance=1e-8)) == pytest.approx(max(eigenvalues), rel=1e-6, abs=1e-12)
    expected = exact(np.abs(eigenvalues).tolist()) if any(eigenvalues) else 0.0
    assert float(hessian_effective_rank(loss, params)) == pytest.approx(expected, rel=1e-6)


def small_network(width: int) -> tuple[Any, Any, dict[str, torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(0, 3, (20,))
    params = {name: w.detach() for name, w in model.named_parameters()}

    def forward(p: dict[str, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = functional_call(model, p, (x,))
        return out

    return lambda p: nn.functional.cross_entropy(forward(p), y), forward, params, x


def test_curvature_of_a_network_equals_autograd() -> None:
    loss, _, params, _ = small_network(8)
    sizes = [w.numel() for w in params.values()]

    def flat(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split(sizes)
        return loss({n: part.reshape(w.shape) for part, (n, w) in zip(parts, params.items(), strict=True)})

    hessian = torch.autograd.functional.hessian(flat, torch.cat([w.flatten() for w in params.values()]))
    values = torch.linalg.eigvalsh(hessian)
    assert float(sharpness(loss, params, tolerance=1e-6)) == pytest.approx(float(values[-1]), rel=1e-5)
    assert float(hessian_effective_rank(loss, params)) == pytest.approx(exact(values.abs().tolist()), rel=1e-6)
    with pytest.warns(UserWarning, match="known to .* only after 2 iterations"):
        sharpness(loss, params, iterations=2, tolerance=1e-6)
    with pytest.raises(ValueError, match="probes is 0"):
        hessian_effective_rank(loss, params, probes=0)


@pytest.mark.parametrize("small", [True, False])
def test_curvature_of_what_has_diverged(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not small:
        monkeypatch.setattr("perennial.metrics.curvature._SMALL", 0)
    loss, forward, params, _ = small_network(5)
    params["0.weight"][0, 0] = math.nan
    for value in (sharpness(loss, params), hessian_effective_rank(loss, params), ntk_effective_rank(forward, params)):
        assert math.isnan(float(value))


def test_the_estimate_for_large_hessians_is_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, _, params, _ = small_network(60)  # 603 parameters
    truth = float(hessian_effective_rank(loss, params))
    monkeypatch.setattr("perennial.metrics.curvature._SMALL", 0)
    estimates = [float(hessian_effective_rank(loss, params, seed=100 * k)) for k in range(5)]
    assert np.mean(estimates) == pytest.approx(truth, rel=0.1)
    assert max(estimates) < 1.3 * truth
    assert min(estimates) > 0.7 * truth


def test_tangent_kernel() -> None:
    _, forward, params, _ = small_network(5)
    jacobian = torch.func.jacrev(lambda p: forward(p).flatten())(params)
    rows = torch.cat([j.flatten(1) for j in jacobian.values()], 1)
    expected = exact((torch.linalg.svdvals(rows) ** 2).tolist())
    assert float(ntk_effective_rank(forward, params)) == pytest.approx(expected, rel=1e-6)
    x = torch.eye(4)  # a linear map without bias on orthogonal inputs: all outputs move independently
    assert float(ntk_effective_rank(lambda p: x @ p["w"], {"w": torch.randn(4, 2)})) == pytest.approx(8, rel=1e-5)
    with pytest.raises(ValueError, match=r"the derivatives of 40000 outputs by 40,000 parameters take 6 GiB"):
        ntk_effective_rank(lambda p: p["w"] * 1, {"w": torch.randn(40000)})


# --- all metrics of a network in one table --------------------------------------------------------------------------

GIVEN = {
    "units": lambda: [torch.relu(torch.randn(64, 5)), torch.relu(torch.randn(64, 3, 4))],
    "features": lambda: torch.relu(torch.randn(64, 5)),
    "weights": lambda: [torch.randn(4, 3), torch.randn(2)],
    "change": lambda: ([torch.randn(4, 3)], [torch.randn(4, 3)]),
    "gradients": lambda: [torch.randn(4, 3), torch.zeros(2)],
    "two changes": lambda: ([torch.randn(4, 3).relu()], [torch.randn(4, 3).relu()]),
    "two losses": lambda: (torch.rand(5), torch.rand(5)),
}


def called(name: str, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> torch.Tensor:
    """A metric on the table's input, which is the same on every call."""
    metric = METRICS[name]
    torch.manual_seed(3)
    if metric.of in ("loss", "outputs"):
        loss, forward, params, _ = small_network(5)
        return metric.function(loss if metric.of == "loss" else forward, params)
    given = torch.utils._pytree.tree_map(lambda t: t.to(dtype).requires_grad_(requires_grad), GIVEN[metric.of]())
    return metric.function(*given) if isinstance(given, tuple) else metric.function(given)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_changes_nothing(name: str) -> None:
    """Check 33: no random number is drawn, nothing is written, no gradient is recorded."""
    metric = METRICS[name]
    torch.manual_seed(3)
    if metric.of in ("loss", "outputs"):
        loss, forward, params, _ = small_network(5)
        given: Any = (loss if metric.of == "loss" else forward, params)
    else:
        given = GIVEN[metric.of]()
        given = given if isinstance(given, tuple) else (given,)
    tensors = [t.requires_grad_() for t in torch.utils._pytree.tree_leaves(given) if isinstance(t, torch.Tensor)]
    before, rng = [t.detach().clone() for t in tensors], torch.get_rng_state()
    first = metric.function(*given)
    assert torch.equal(metric.function(*given), first)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(a.detach(), b) and a.grad is None for a, b in zip(tensors, before, strict=True))
    if metric.of != "two losses":
        assert not first.requires_grad


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_lies_in_its_range_and_says_where_it_is_from(name: str) -> None:
    metric = METRICS[name]
    value = called(name)
    assert bool((metric.low <= value).all())
    assert bool((value <= metric.high).all())
    text = metric.function.__doc__ or ""
    assert all(section in text for section in ("Args:", "Returns:"))
    assert ":math:" in text or ".. math::" in text
    assert "Source" in text or "Elsayed" in text or name in ("gradient_norm_l2", "collision_ratio")
    assert metric.function is getattr(metrics, name)


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if m.of not in ("loss", "outputs")])
def test_float32_agrees_with_float64(name: str) -> None:
    """Check 37."""
    assert torch.allclose(called(name).double(), called(name, torch.float64).double(), rtol=1e-5)


def layers(samples: int) -> list[torch.Tensor]:
    """Two layers with dead, dormant, rare and cloned units."""
    rng = torch.Generator().manual_seed(5)
    first = torch.relu(torch.randn(samples, 6, generator=rng))
    first[:, 0] = 0.0
    first[:, 1] *= 1e-3
    first[1:, 2] = 0.0
    first[:, 4] = 2 * first[:, 3]
    return [first, torch.relu(torch.randn(samples, 4, 3, generator=rng))]


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if m.of in ("units", "features")])
def test_what_does_not_depend_on_the_order_of_samples_and_units(name: str) -> None:
    """Check 35: permutations."""
    metric = METRICS[name]
    given = layers(300)
    rows, columns = torch.randperm(300), [torch.randperm(6), torch.randperm(4)]
    moved = [h[rows][:, at] for h, at in zip(given, columns, strict=True)]
    if metric.of == "features":
        assert float(metric.function(moved[0])) == pytest.approx(float(metric.function(given[0])), rel=1e-9)
    else:
        assert float(metric.function(moved)) == pytest.approx(float(metric.function(given)), rel=1e-12)
        one = metric.function(given[0])
        assert torch.equal(metric.function([given[0]]), one), "one layer is a list of one"


@pytest.mark.parametrize(
    "name", [n for n, m in METRICS.items() if m.of in ("units", "features") and n != "numerical_rank"]
)
@pytest.mark.parametrize("bounded", [False, True])
def test_batch_by_batch_is_all_at_once(name: str, bounded: bool) -> None:
    """Check 35: streaming."""
    metric = METRICS[name]
    given = [torch.tanh(3 * h - 1) for h in layers(300)] if bounded else layers(300)
    if metric.needs in ("rectified", "bounded") and (metric.needs == "bounded") != bounded:
        return
    bounds = {"low": -1.0, "high": 1.0} if bounded else {}
    streamed = []
    for h in given:
        parts = [UnitStatistics.of(part, **bounds) for part in h.split([1, 99, 200])]
        streamed.append(parts[0] + parts[1] + parts[2])
    direct = bounds if name in ("saturated_units", "feature_activity") else {}
    if metric.of == "features":
        assert float(metric.function(streamed[0])) == pytest.approx(float(metric.function(given[0])), rel=1e-6)
    else:
        assert float(metric.function(streamed)) == pytest.approx(float(metric.function(given, **direct)), rel=1e-9)


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if m.share and m.of == "units"])
def test_more_samples_of_the_same_change_no_share(name: str) -> None:
    """Check 35: the batch size."""
    given = layers(200)
    twice = [torch.cat([h, h]) for h in given]
    assert float(METRICS[name].function(twice)) == float(METRICS[name].function(given))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_shares_of_units_do_not_depend_on_scale(seed: int, scale: float) -> None:
    h = torch.relu(torch.randn(40, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1)
    for function in (dead_units, rarely_active_units, dormant_units, dormant_units_of_sum, feature_activity):
        assert float(function(h * scale)) == float(function(h)), function.__name__


def test_statistics_refuse_what_is_not_of_one_layer() -> None:
    h = torch.randn(5, 3)
    with pytest.raises(ValueError, match="are not of the same layer"):
        UnitStatistics.of(h) + UnitStatistics.of(torch.randn(5, 4))
    with pytest.raises(ValueError, match="without the Gram matrix"):
        duplicate_units(UnitStatistics.of(h, gram=False))
    with pytest.raises(ValueError, match="there is no layer"):
        dead_units([])
    with pytest.raises(TypeError):
        UnitStatistics.of(h) + 1


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if m.of in ("units", "features")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_looks_like_no_health(name: str, value: float) -> None:
    h = torch.relu(torch.randn(20, 5))
    h[3, 2] = value
    bounds = {"low": 0.0, "high": 1.0} if name in ("saturated_units", "feature_activity") else {}
    found = float(METRICS[name].function(h, **bounds))
    assert math.isnan(found) or (name == "feature_norm" and found == math.inf)


@pytest.mark.parametrize("name", [n for n, m in METRICS.items() if m.of in ("units", "features")])
def test_odd_activations(name: str) -> None:
    function = METRICS[name].function
    whole = torch.randint(0, 3, (20, 5))
    assert float(function(whole)) == pytest.approx(float(function(whole.double())))
    assert math.isfinite(float(function(torch.rand(1, 1))))
    for wrong in (torch.zeros(0, 4), torch.zeros(4)):
        with pytest.raises(
            ValueError, match=r"activations are \[samples, units, \.\.\.\] of at least one sample, not "
        ):
            function(wrong)


def test_bounds_that_are_missing_are_not_passed_over() -> None:
    h = torch.tanh(torch.full((10, 3), 9.0))
    assert math.isnan(float(saturated_units(UnitStatistics.of(h))))
    assert math.isnan(float(feature_activity(UnitStatistics.of(h), low=-1, high=1)))
    with pytest.raises(ValueError, match="low is 0 and high is None; give both bounds"):
        feature_activity(h, low=0)
    with pytest.raises(TypeError, match="needs the activations themselves"):
        numerical_rank(UnitStatistics.of(h))  # type: ignore[arg-type]
    edge = torch.full((10, 1), 0.98828125)
    assert float(saturated_units(edge)) == float(saturated_units(edge.bfloat16())) == 0.0
    exact_multiples = torch.randn(50, 1) * torch.tensor([1.0, 2.0, 3.0, 0.7, 0.3, 11.0])
    assert float(duplicate_units(exact_multiples.double(), similarity=1.0)) > 0
    active = torch.zeros(700, 1)
    active[:49] = 1.0
    assert float(rarely_active_units(active, share=0.07)) == 0.0
    assert float(sample_plasticity(torch.zeros(1).half(), torch.zeros(1).half())) == 1.0
    with pytest.raises(ValueError, match="there are 1 and 2"):
        distance_l2([h], [h, h])


# --- where a metric applies -----------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Written without a module for any of its nonlinearities."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.function(self.first(x)))  # type: ignore[no-any-return]


F = nn.functional


@pytest.mark.parametrize(
    ("function", "name", "rectified", "bounded"),
    [
        (F.relu, "relu", True, False),
        (nn.ReLU(inplace=True), "relu", True, False),
        (torch.relu, "relu", True, False),
        (lambda h: h.clamp(min=0), "relu", True, False),
        (lambda h: F.threshold(h, 0.0, 0.0), "relu", True, False),
        (lambda h: F.relu(h) ** 2, "relu", True, False),
        (lambda h: F.dropout(F.relu(h), 0.5), "relu", True, False),
        (lambda h: F.max_pool1d(F.relu(h)[:, :, None], 1)[:, :, 0], "relu", True, False),
        (lambda h: torch.cat([F.relu(h[:, :3]), F.relu(-h[:, 3:])], 1), "relu", True, False),
        (lambda h: 3 * F.relu(h) / 2, "relu", True, False),
        (lambda h: 1 / (F.relu(h) + 1), "", False, False),
        (lambda h: 2 ** F.relu(h), "", False, False),
        (lambda h: F.relu(h) ** 0, "", False, False),
        (F.relu6, "relu6", True, True),
        (nn.Hardtanh(), "hardtanh", False, True),
        (torch.tanh, "tanh", False, True),
        (torch.sigmoid, "sigmoid", False, True),
        (F.gelu, "gelu", False, False),
        (F.silu, "silu", False, False),
        (F.leaky_relu, "leaky_relu", False, False),
        (lambda h: h, "", False, False),
        (lambda h: F.layer_norm(F.relu(h), (6,)), "", False, False),
        (lambda h: F.relu(h) + 1, "", False, False),
        (lambda h: torch.cat([F.relu(h[:, :3]), torch.tanh(h[:, 3:])], 1), "", False, False),
    ],
)
def test_the_nonlinearity_before_a_reader(
    function: Callable[[torch.Tensor], torch.Tensor], name: str, rectified: bool, bounded: bool
) -> None:
    model, x = Functional(function), torch.randn(3, 4)
    units = trace(model, x)
    rng, before = torch.get_rng_state(), {n: w.clone() for n, w in model.state_dict().items()}
    (found,) = set(observe(model, units, x).nonlinearities.values())
    assert (found.function, found.rectified, found.bounded) == (name, rectified, bounded)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())


def test_a_metric_that_does_not_apply_says_why() -> None:
    """Check 36."""
    tanh, relu, gelu = Nonlinearity("tanh", -1, 1), Nonlinearity("relu", 0, math.inf, True), Nonlinearity("gelu")
    assert "units behind tanh are never exactly zero" in metrics.inapplicable("dead_units", tanh)
    assert metrics.inapplicable("dead_units", relu) == ""
    assert "no two bounds" in metrics.inapplicable("saturated_units", relu)
    assert metrics.inapplicable("saturated_units", tanh) == ""
    assert "neither exactly zero nor at a bound" in metrics.inapplicable("feature_activity", gelu)
    assert "no nonlinearity that is known stands right before" in metrics.inapplicable(
        "rarely_active_units", Nonlinearity()
    )
    for name in ("dormant_units", "effective_rank_entropy", "duplicate_units"):
        assert not any(metrics.inapplicable(name, kind) for kind in (tanh, relu, gelu, Nonlinearity()))
    with pytest.raises(ValueError, match="there is no metric 'dead'; there are dead_units, "):
        metrics.inapplicable("dead", relu)


def test_words_with_two_meanings_lead_to_the_precise_ones() -> None:
    for word, leads_to in (("stable_rank", "rank_99"), ("dead", "dormant_units"), ("srank", "stable_rank_fro")):
        with pytest.raises(AttributeError, match=leads_to):
            getattr(metrics, word)
    with pytest.raises(AttributeError, match="there is dormant_units"):
        metrics.dormant_unit  # noqa: B018


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
