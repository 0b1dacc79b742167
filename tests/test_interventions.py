"""What each regulariser and each dense intervention must do by its own algebra.

That they equal their reference, resume, and do nothing at OFF is tested for every method in test_methods.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from perennial.methods import (
    DASH,
    FIRE,
    REGISTRY,
    SET,
    Context,
    ContinualBackprop,
    HareAndTortoise,
    Intervention,
    L1Init,
    L2Init,
    NormalizeAndProject,
    Outcome,
    Parseval,
    ReDo,
    ReGraMa,
    Regulariser,
    ResetLayers,
    RigL,
    SelfNormalizedResets,
    ShrinkAndPerturb,
    SpectralRegularisation,
    WassersteinInit,
    WeightClipping,
)
from perennial.noise import Noise, elements, seed_key
from perennial.units import UnitMap, build_and_record

MATRICES = ("0.weight", "4.weight", "6.weight")
HIDDEN = MATRICES[:2]


def network() -> nn.Module:
    """A convolution, a norm, a hidden layer and a head."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)
    )


def twins() -> nn.Module:
    """Two networks side by side, as an actor and a critic are."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.actor = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2))
            self.critic = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))

    return Twins()


class Bench:
    """One network under one method: no gradient moves anything but by the test's hand."""

    def __init__(
        self,
        method: Intervention,
        factory: Callable[[], nn.Module] = network,
        outputs: tuple[str, ...] = ("6.weight",),
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        model, initial = build_and_record(factory)
        self.start = {name: w.detach().double() for name, w in model.named_parameters()}
        self.units = UnitMap((), initial=initial, outputs=outputs, order=tuple(self.start))
        self.method: Any = method
        self.params = dict(self.start)
        self.state = method.init(self.params, self.units)
        self.time = -1
        changed, self.state = method.begin(self.params, self.state, self.context())
        self.params = self.params | changed
        self.time = 0

    def train(self, distance: float = 0.3) -> Bench:
        """Move every parameter, as a learner would have."""
        self.params = {name: w + distance * torch.randn_like(w) for name, w in self.params.items()}
        return self

    def context(self, grads: dict[str, Tensor] | None = None) -> Context:
        key = torch.tensor(seed_key(0, "method"), dtype=torch.int32)
        noise = Noise(key, torch.tensor(self.time, dtype=torch.int32), self.method.name)
        # what a method does not ask for is not its business
        grads = grads or {name: torch.full_like(w, torch.nan) for name, w in self.params.items()}
        return Context(grads, {}, noise, self.units)

    def step(self, grads: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        changed, self.state = self.method.step(self.params, self.state, self.context(grads))
        self.params = self.params | changed
        self.time += 1
        return changed

    def event(self) -> Outcome:
        outcome: Outcome = self.method.event(self.params, self.state, self.context())
        self.params, self.state = self.params | outcome.changed, outcome.state
        return outcome

    def penalty(self) -> Tensor:
        found: Tensor = self.method.penalty(self.params, self.state, self.units)
        return found


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, w in left.items():
        assert torch.equal(w.view(torch.int64), right[name].view(torch.int64)), name


def close(left: Tensor, right: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


# --- regularisers: the gradient is the formula's --------------------------------------------------------------------


def _parseval(w: Tensor, scale: float) -> Tensor:
    rows = w.reshape(w.shape[0], -1)
    if rows.shape[0] > rows.shape[1]:
        rows = rows.T
    total = torch.zeros(())
    for i in range(rows.shape[0]):
        for j in range(rows.shape[0]):
            total = total + (torch.dot(rows[i], rows[j]) - scale * (i == j)) ** 2
    return total


def _ranked(w: Tensor, start: Tensor) -> Tensor:
    order = w.detach().reshape(-1).argsort()
    return 0.5 * ((w.reshape(-1)[order] - start.reshape(-1).sort().values) ** 2).sum()


Formula = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]

FORMULAS: list[tuple[Regulariser, Formula]] = [
    (L2Init(0.1), lambda p, p0: torch.stack([((p[n] - p0[n]) ** 2).sum() / 2 for n in p]).sum()),
    (L1Init(0.1), lambda p, p0: torch.stack([(p[n] - p0[n]).abs().sum() for n in p]).sum()),
    (WassersteinInit(0.1), lambda p, p0: torch.stack([_ranked(p[n], p0[n]) for n in p]).sum()),
    (Parseval(0.01), lambda p, p0: torch.stack([_parseval(p[n], 1.0) for n in HIDDEN]).sum()),
    (Parseval(0.01, scale=2.5), lambda p, p0: torch.stack([_parseval(p[n], 2.5) for n in HIDDEN]).sum()),
]
every_formula = pytest.mark.parametrize(("method", "formula"), FORMULAS, ids=lambda v: getattr(v, "name", ""))


@every_formula
def test_the_penalty_and_its_gradient_are_the_formulas(method: Regulariser, formula: Formula) -> None:
    b = Bench(dataclasses.replace(method, coupled=True)).train()
    leaves = {name: w.clone().requires_grad_() for name, w in b.params.items()}
    expected = formula(leaves, b.start)
    slopes = torch.autograd.grad(expected, list(leaves.values()), allow_unused=True)
    ours = b.method.penalty(leaves, b.state, b.units)
    close(ours, expected)
    found = torch.autograd.grad(ours, list(leaves.values()), allow_unused=True)
    for name, ours_slope, slope in zip(leaves, found, slopes, strict=True):
        assert (ours_slope is None) == (slope is None), name
        if slope is not None:
            close(ours_slope, slope)


@pytest.mark.parametrize(
    ("method", "formula"),
    [row for row in FORMULAS if not isinstance(row[0], L1Init)],  # which takes the proximal step
    ids=lambda v: getattr(v, "name", ""),
)
def test_the_decoupled_step_goes_down_the_formula(method: Regulariser, formula: Formula) -> None:
    b = Bench(method).train()
    before = b.params
    leaves = {name: w.clone().requires_grad_() for name, w in before.items()}
    slopes = torch.autograd.grad(formula(leaves, b.start), list(leaves.values()), allow_unused=True)
    b.step()
    for (name, w), slope in zip(before.items(), slopes, strict=True):
        close(b.params[name], w if slope is None else w - method.rate * slope)


@pytest.mark.parametrize("method", [m for m, _ in FORMULAS] + [SpectralRegularisation(0.1)], ids=lambda m: m.name)
def test_coupled_changes_no_weight_itself(method: Regulariser) -> None:
    b = Bench(dataclasses.replace(method, coupled=True)).train()
    assert b.step() == {}


@pytest.mark.parametrize("method", [m for m, _ in FORMULAS] + [SpectralRegularisation(0.1)], ids=lambda m: m.name)
def test_rate_0_changes_no_bit(method: Regulariser) -> None:
    b = Bench(dataclasses.replace(method, rate=0.0)).train(1e-3)
    before = b.params
    b.step()
    same_bits(b.params, before)


# --- toward the start -----------------------------------------------------------------------------------------------


def test_l1_comes_back_exactly_and_stays() -> None:
    b = Bench(L1Init(0.1)).train()
    side = {name: torch.sign(w - b.start[name]) for name, w in b.params.items()}
    for _ in range(30):
        b.step()
        for name, w in b.params.items():
            assert ((w - b.start[name]) * side[name] >= 0).all(), f"{name} went past its start"
    same_bits(b.params, b.start)


def test_l1_takes_the_proximal_step() -> None:
    b = Bench(L1Init(0.1)).train()
    before = b.params
    b.step()
    for name, w in before.items():
        d = w - b.start[name]
        close(b.params[name], b.start[name] + d.sign() * (d.abs() - 0.1).clamp(min=0))


def test_l1_of_rate_0_keeps_the_sign_of_zero() -> None:
    b = Bench(L1Init(0.0))
    b.params["6.bias"] = torch.full_like(b.params["6.bias"], -0.0)
    before = b.params
    b.step()
    same_bits(b.params, before)


def test_l1_hides_no_divergence() -> None:
    b = Bench(L1Init(0.1))
    b.params["6.bias"] = torch.tensor([math.nan, math.inf, 0.0], dtype=torch.float64)
    b.step()
    assert b.params["6.bias"][0].isnan()
    assert b.params["6.bias"][1].isinf()


@pytest.mark.parametrize("coupled", [True, False])
def test_l1_has_no_slope_at_the_start(coupled: bool) -> None:
    b = Bench(L1Init(0.1, coupled=coupled))
    w = b.params["4.weight"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(b.method.penalty(b.params | {"4.weight": w}, b.state, b.units), w)
    assert (slope == 0).all()


def test_wasserstein_lets_weights_change_places() -> None:
    b = Bench(WassersteinInit(0.1))
    for name, w in b.start.items():
        b.params[name] = w.flatten()[torch.randperm(w.numel())].reshape(w.shape)
    assert float(b.penalty()) == 0
    before = b.params
    b.step()
    same_bits(b.params, before)

    b.train()
    trained = float(b.penalty())
    for name, w in b.params.items():
        b.params[name] = w.flatten()[torch.randperm(w.numel())].reshape(w.shape)
    assert float(b.penalty()) == pytest.approx(trained, rel=1e-12)


def test_wasserstein_pulls_each_weight_to_the_initial_value_of_its_rank() -> None:
    b = Bench(WassersteinInit(1.0)).train()
    before = b.params
    b.step()
    for name, w in before.items():
        start = b.start[name].flatten().sort().values
        for place, value in enumerate(w.flatten()):
            rank = int((w < value).sum())
            close(b.params[name].flatten()[place], start[rank])


# --- Parseval and spectral ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow), 0.25])
def test_parseval_makes_rows_orthogonal_or_columns_where_rows_cannot_be(scale: float) -> None:
    def factory() -> nn.Module:
        return nn.Sequential(network(), nn.Linear(3, 7), nn.Linear(7, 2))

    b = Bench(Parseval(0.05, scale=scale), factory, ("2.weight",))
    start = b.start
    for _ in range(400):
        b.step()
    for name in ("0.0.weight", "0.4.weight", "0.6.weight"):
        w = b.params[name].flatten(1)
        close(w @ w.T, scale * torch.eye(w.shape[0], dtype=w.dtype), 1e-6)
    tall = b.params["1.weight"]
    close(tall.T @ tall, scale * torch.eye(3, dtype=tall.dtype), 1e-6)
    assert float(b.penalty()) < 1e-9, "the rows of a tall matrix are asked for what they cannot do"
    for name in ("2.weight", "1.bias", "0.1.weight"):
        assert torch.equal(b.params[name], start[name])


@pytest.mark.parametrize("power", [1, *(pytest.param(power, marks=pytest.mark.slow) for power in (2, 3))])
def test_spectral_takes_the_largest_singular_value_to_1(power: int) -> None:
    b = Bench(SpectralRegularisation(0.02, power=power)).train()
    trained = b.params
    assert any(abs(float(torch.linalg.svdvals(trained[n].flatten(1))[0]) - 1) > 0.2 for n in MATRICES)
    for _ in range(1000):
        b.step()
    for name in MATRICES:
        assert float(torch.linalg.svdvals(b.params[name].flatten(1))[0]) == pytest.approx(1, abs=1e-3)
    for name in ("0.bias", "1.bias", "6.bias"):
        assert float(b.params[name].abs().max()) < 1e-9
    assert torch.equal(b.params["1.weight"], trained["1.weight"])


def test_spectral_gradient_is_that_of_the_true_singular_value() -> None:
    """Once the power iteration has found the singular vectors of a matrix that stands still."""
    b = Bench(SpectralRegularisation(0.1, coupled=True, power=3)).train()
    for _ in range(2000):
        b.step()
    leaves = {name: w.clone().requires_grad_() for name, w in b.params.items()}
    expected = torch.zeros((), dtype=torch.float64)
    for name, w in leaves.items():
        if name in MATRICES:
            expected = expected + (torch.linalg.svdvals(w.flatten(1))[0] ** 3 - 1) ** 2
        elif name.endswith("bias"):
            expected = expected + (w**2).sum()
    ours = b.method.penalty(leaves, b.state, b.units)
    close(ours, expected, 1e-9)
    names = [name for name in leaves if name != "1.weight"]
    for found, slope in zip(
        torch.autograd.grad(ours, [leaves[n] for n in names]),
        torch.autograd.grad(expected, [leaves[n] for n in names]),
        strict=True,
    ):
        close(found, slope, 1e-6)


@pytest.mark.parametrize("power", [1, 2])
def test_spectral_of_zeros_is_no_error_and_no_trap(power: int) -> None:
    b = Bench(SpectralRegularisation(0.1, power=power))
    b.params["4.weight"] = torch.zeros_like(b.params["4.weight"])
    b.step()
    assert (b.params["4.weight"] == 0).all()
    assert float(torch.linalg.vector_norm(b.state.direction["4.weight"])) == pytest.approx(1)
    b.train()  # it has grown, and must be followed again
    for _ in range(300):
        b.step()
    assert float(torch.linalg.svdvals(b.params["4.weight"])[0]) == pytest.approx(1, abs=1e-2)


# --- clipping and projection ----------------------------------------------------------------------------------------


def test_clipping_bounds_weights_and_their_biases_by_fan_in() -> None:
    b = Bench(WeightClipping(0.5)).train(2.0)
    trained = b.params
    b.step()
    for layer, fan in (("0", 18), ("4", 16), ("6", 5)):
        bound = 0.5 / math.sqrt(fan)
        for name in (f"{layer}.weight", f"{layer}.bias"):
            w = trained[name]
            assert (w.abs() > bound).any()
            expected = torch.where(w.abs() > bound, w.sign() * bound, w)
            close(b.params[name], expected, 1e-15)
    for name in ("1.weight", "1.bias"):
        assert torch.equal(b.params[name], trained[name]), "a norm's scale and offset have no bound"


def test_clipping_without_a_bound_changes_no_bit() -> None:
    b = Bench(WeightClipping(math.inf)).train(2.0)
    before = b.params
    b.step()
    same_bits(b.params, before)


def _norms(params: dict[str, Tensor]) -> dict[str, float]:
    joint = torch.cat([params["1.weight"], params["1.bias"]])
    return {name: float(params[name].pow(2).sum().sqrt()) for name in HIDDEN} | {"1": float(joint.pow(2).sum().sqrt())}


def test_projection_keeps_norms_and_directions() -> None:
    b = Bench(NormalizeAndProject())
    expected = _norms(b.start)
    for _ in range(3):
        b.train()
        trained = b.params
        b.step()
        assert _norms(b.params) == pytest.approx(expected, rel=1e-12)
        for name in (*HIDDEN, "1.weight", "1.bias"):
            ratio = b.params[name] / trained[name]
            close(ratio, ratio.flatten()[0].expand_as(ratio))
        for name in ("6.weight", "0.bias", "4.bias", "6.bias"):
            assert torch.equal(b.params[name], trained[name]), f"{name} is not projected"


def test_projection_goes_part_of_the_way() -> None:
    b = Bench(NormalizeAndProject(0.25)).train()
    start, trained = _norms(b.start), _norms(b.params)
    b.step()
    expected = {name: trained[name] + 0.25 * (start[name] - trained[name]) for name in start}
    assert _norms(b.params) == pytest.approx(expected, rel=1e-12)


def test_projection_of_strength_0_changes_no_bit() -> None:
    b = Bench(NormalizeAndProject(0.0)).train()
    before = b.params
    b.step()
    same_bits(b.params, before)


def test_projection_leaves_zeros_alone() -> None:
    b = Bench(NormalizeAndProject())
    b.params["4.weight"] = torch.zeros_like(b.params["4.weight"])
    b.step()
    assert (b.params["4.weight"] == 0).all()

    def empty() -> nn.Module:
        model = network()
        nn.init.zeros_(model.get_parameter("4.weight"))
        return model

    b = Bench(NormalizeAndProject(), empty).train()
    trained = b.params["4.weight"]
    b.step()
    assert torch.equal(b.params["4.weight"], trained)


# --- shrink and perturb ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["step", "task"])
@pytest.mark.parametrize("perturb", ["normal", "fresh", "initial"])
def test_shrink_and_perturb_adds_what_it_says_when_it_says(perturb: str, when: str) -> None:
    method = ShrinkAndPerturb(0.4, 0.2, perturb=perturb, when=when)
    assert method.due(7, True) == (when == "task")
    assert not method.due(7, False)
    b = Bench(method).train()
    before, noise = b.params, b.context().noise
    if when == "task":
        assert b.step() == {}
        b.time = 0
        b.event()
    else:
        b.step()
    for name, w in before.items():
        added = {
            "normal": noise.normal(name, elements(w)).double(),
            "fresh": b.units.initial[name].draw(noise, name, elements(w)).double(),
            "initial": b.start[name],
        }[perturb]
        close(b.params[name], 0.6 * w + 0.2 * added)
    assert (b.state == ()) == (perturb != "initial")


def test_a_whole_soft_reset_is_a_fresh_network() -> None:
    b = Bench(ShrinkAndPerturb(1.0, 1.0, perturb="fresh", when="task")).train()
    b.event()
    for name, w in b.params.items():
        source = b.units.initial[name]
        if source.kind == "constant":
            assert (w == source.first).all()
        else:
            assert (w >= source.first).all()
            assert (w <= source.second).all()
            assert not torch.equal(w, b.start[name])


def _strange() -> nn.Module:
    model = network()
    with torch.no_grad():
        model.get_parameter("4.weight").copy_(torch.linspace(-1, 1, 80).reshape(5, 16))  # as from a file
    return model


@pytest.mark.parametrize("method", [ShrinkAndPerturb(perturb="fresh"), ResetLayers(last=2)], ids=lambda m: m.name)
def test_refuses_to_redraw_what_was_drawn_nobody_knows_how(method: Intervention) -> None:
    with pytest.raises(ValueError, match=rf"{method.name} cannot redraw 4\.weight"):
        Bench(method, _strange)


@pytest.mark.parametrize("method", [ShrinkAndPerturb(), ShrinkAndPerturb(perturb="initial"), ResetLayers(last=1)])
def test_works_where_nothing_unknown_is_redrawn(method: Intervention) -> None:
    Bench(method, _strange)


# --- layer resets ---------------------------------------------------------------------------------------------------

_HEAD, _LAYER, _CONV = ["6.weight", "6.bias"], ["4.weight", "4.bias"], ["0.weight", "0.bias", "1.weight", "1.bias"]
_ACTOR_HEAD, _CRITIC_HEAD = ["actor.3.weight", "actor.3.bias"], ["critic.2.weight", "critic.2.bias"]
_CRITIC = [f"critic.{n}.{part}" for n in (0, 1) for part in ("weight", "bias")]


@pytest.mark.parametrize(("last", "expected"), [
    (1, _HEAD), (2, [*_LAYER, *_HEAD]), (3, [*_CONV, *_LAYER, *_HEAD]), (None, [*_CONV, *_LAYER, *_HEAD]),
])  # fmt: skip
def test_reset_draws_the_last_layers_and_marks_them(last: int | None, expected: list[str]) -> None:
    b = Bench(ResetLayers(last=last)).train()
    before, noise = b.params, b.context().noise
    outcome = b.event()
    assert list(outcome.changed) == list(outcome.touched) == expected
    for name, w in b.params.items():
        if name in expected:
            assert w.dtype == torch.float64
            assert torch.equal(w, b.units.initial[name].draw(noise, name, elements(w)).double())
            (mark,) = outcome.touched[name].items()
            assert mark[0] == 0
            assert mark[1].shape == w.shape[:1]
            assert mark[1].all()
        else:
            assert torch.equal(w, before[name])


def test_reset_takes_every_head_and_what_leads_to_it() -> None:
    def chosen(last: int) -> list[str]:
        outputs = ("actor.3.weight", "critic.2.weight")
        return list(Bench(ResetLayers(last=last), twins, outputs).event().changed)

    assert chosen(1) == [*_ACTOR_HEAD, *_CRITIC_HEAD], "the critic's norm stands before its head"
    assert chosen(2) == ["actor.2.weight", "actor.2.bias", *_ACTOR_HEAD, *_CRITIC, *_CRITIC_HEAD]


def test_reset_leaves_the_bias_of_a_matrix_that_stays() -> None:
    """Wherever the forward pass uses it."""
    b = Bench(ResetLayers())
    b.units = dataclasses.replace(b.units, order=(*MATRICES, "6.bias", "4.bias", "0.bias"))
    assert list(b.event().changed) == _HEAD


def test_reset_takes_the_last_matrix_where_outputs_are_unknown() -> None:
    b = Bench(ResetLayers(), outputs=())
    b.units = dataclasses.replace(b.units, order=())
    assert list(b.event().changed) == _HEAD


def test_reset_draws_other_numbers_each_time() -> None:
    b = Bench(ResetLayers())
    first = b.event().changed["6.weight"]
    b.time += 1
    assert not torch.equal(first, b.event().changed["6.weight"])


def test_reset_refuses_more_layers_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"last is 4.*at most 3"):
        Bench(ResetLayers(last=4))


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (True, TypeError), (1.0, TypeError), ("1", TypeError)])
def test_reset_refuses_settings_that_are_no_number_of_layers(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"reset_layers\.last is {value!r}"):
        ResetLayers(last=value)


# --- hare and tortoise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_the_hare_goes_on_from_where_the_tortoise_is(decay: float) -> None:
    b = Bench(HareAndTortoise(decay))
    slow = {name: w.clone() for name, w in b.start.items()}
    for _ in range(5):
        b.train()
        slow = {name: decay * slow[name] + (1 - decay) * w for name, w in b.params.items()}
        assert b.step() == {}
    outcome = b.event()
    assert outcome.touched == {}
    for name, w in b.params.items():
        close(w, slow[name])
        close(b.state.slow[name], slow[name])
        w.zero_()  # a caller that goes on in place
        close(b.state.slow[name], slow[name])


# --- DASH -----------------------------------------------------------------------------------------------------------


def _pulled(method: DASH, grads: Callable[[str, Tensor], Tensor]) -> tuple[Bench, dict[str, Tensor]]:
    """A network shrunk after one step of the given gradients, and what it was before."""
    b = Bench(method).train()
    before = b.params
    b.step({name: grads(name, w) for name, w in before.items()})
    assert b.event().touched == {}
    return b, before


def test_dash_follows_the_average_negative_gradient() -> None:
    b = Bench(DASH(decay=0.8))
    expected = {name: torch.zeros_like(b.params[name]) for name in MATRICES}
    for _ in range(4):
        grads = {name: torch.randn_like(w) for name, w in b.params.items()}
        expected = {name: 0.8 * e - 0.2 * grads[name] for name, e in expected.items()}
        b.step(grads)
    for name in MATRICES:
        close(b.state.direction[name], expected[name])


@pytest.mark.parametrize(("turn", "factor"), [(-1.0, 1.0), (1.0, 0.3), (0.0, 1.0)])
def test_dash_keeps_aligned_weights_and_shrinks_opposed_ones_to_the_floor(turn: float, factor: float) -> None:
    """The gradient points against the weight, along it, nowhere."""
    b, before = _pulled(DASH(0.3), lambda name, w: turn * 7.0 * w)
    for name, w in before.items():
        close(b.params[name], w * (factor if name in MATRICES else 1))


def test_dash_shrinks_by_the_cosine_between() -> None:
    """A row's and a kernel's own: the direction is the weight turned by an angle of its own."""
    angles: dict[str, Tensor] = {}

    def turned(name: str, w: Tensor) -> Tensor:
        if name not in MATRICES:
            return torch.full_like(w, 5.0)
        rows = w.flatten(2).flatten(0, 1) if w.dim() > 2 else w
        across = torch.randn_like(rows)
        across -= rows * ((across * rows).sum(1) / (rows * rows).sum(1))[:, None]
        across *= (rows.norm(dim=1) / across.norm(dim=1))[:, None]
        angles[name] = torch.linspace(0.0, math.pi, rows.shape[0], dtype=torch.float64)
        direction = rows * angles[name].cos()[:, None] + across * angles[name].sin()[:, None]
        return -direction.reshape(w.shape) * torch.rand(w.shape[0], *[1] * (w.dim() - 1), dtype=w.dtype)

    b, before = _pulled(DASH(0.3), turned)
    for name in MATRICES:
        factors = angles[name].cos().clamp(0.3, 1.0)
        shape = (4, 2, 1, 1) if name == "0.weight" else (-1, 1)
        close(b.params[name], before[name] * factors.reshape(shape), 1e-9)


def test_dash_never_grows_a_weight() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        b, before = _pulled(DASH(0.05), lambda name, w: torch.randn_like(w) - 2 * w)
        for name, w in before.items():
            assert (b.params[name].abs() <= w.abs()).all()
            assert (b.params[name] * w >= 0).all()


def test_dash_with_a_floor_of_1_changes_no_bit() -> None:
    b, before = _pulled(DASH(1.0), lambda name, w: torch.randn_like(w))
    same_bits(b.params, before)


def test_dash_leaves_zero_weights_zero() -> None:
    b = Bench(DASH(0.3))
    b.params["4.weight"] = torch.zeros_like(b.params["4.weight"])
    b.step({name: torch.randn_like(w) for name, w in b.params.items()})
    b.event()
    assert (b.params["4.weight"] == 0).all()


# --- FIRE -----------------------------------------------------------------------------------------------------------


def test_fire_makes_the_nearest_orthogonal_matrix() -> None:
    b = Bench(FIRE(iterations=40)).train()
    before = b.params
    outcome = b.event()
    assert list(outcome.changed) == list(outcome.touched) == list(HIDDEN)
    assert all(outcome.touched[name][0].all() for name in HIDDEN)
    w, scale = b.params["4.weight"], 5 / 16
    close(w @ w.T, scale * torch.eye(5, dtype=w.dtype), 1e-9)
    u, _, v = torch.linalg.svd(before["4.weight"], full_matrices=False)
    close(w, math.sqrt(scale) * u @ v, 1e-9)
    for i in range(3):
        for j in range(3):
            u, _, v = torch.linalg.svd(before["0.weight"][:, :, i, j], full_matrices=False)
            close(b.params["0.weight"][:, :, i, j], math.sqrt(4 / 2) / 9 * u @ v, 1e-9)
    for name in b.params.keys() - set(HIDDEN):
        assert torch.equal(b.params[name], before[name])


def test_fire_iterates_on_singular_values() -> None:
    """Each goes its own way by x <- 1.5 x - .5 x^3, from its share of the Frobenius norm."""
    b = Bench(FIRE(iterations=3)).train()
    values = torch.linalg.svdvals(b.params["4.weight"])
    values = values / values.norm()
    for _ in range(3):
        values = 1.5 * values - 0.5 * values**3
    b.event()
    close(torch.linalg.svdvals(b.params["4.weight"]), math.sqrt(5 / 16) * values)


def test_fire_of_zeros_is_zero() -> None:
    b = Bench(FIRE())
    b.params["0.weight"][:, :, 0, 0] = 0
    b.event()
    assert (b.params["0.weight"][:, :, 0, 0] == 0).all()
    assert torch.isfinite(b.params["0.weight"]).all()


# --- what holds of all ----------------------------------------------------------------------------------------------

EVENTS = (ResetLayers, HareAndTortoise, DASH, FIRE)

ALL = [
    *(m for m, _ in FORMULAS),
    SpectralRegularisation(0.02, power=3),
    WeightClipping(0.3),
    *(ShrinkAndPerturb(0.3, 0.1, perturb=p, when=w) for p in ("normal", "fresh", "initial") for w in ("step", "task")),
    NormalizeAndProject(0.7),
    ResetLayers(last=2),
    ResetLayers(last=None),
    HareAndTortoise(0.8),
    DASH(0.2),
    FIRE(),
    SET(0.4),
    RigL(0.4, until=500),
]
every_one = pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)


def test_no_intervention_is_forgotten_here() -> None:
    """But for those that replace units by a score, which test_replace.py tests together."""
    by_score = {ContinualBackprop, ReDo, ReGraMa, SelfNormalizedResets}
    assert {type(m) for m in ALL} | by_score == {m for m in REGISTRY if issubclass(m, Intervention)}


@pytest.mark.parametrize("method", EVENTS, ids=lambda m: m.name)
def test_events_fall_due(method: Any) -> None:
    assert [n for n in range(1, 11) if method(every=4).due(n, n == 6)] == [4, 8]
    assert not any(method(every=0).due(n, True) for n in range(1, 11))
    if method is HareAndTortoise:
        assert method().every == 1000
    else:
        assert [n for n in range(1, 11) if method().due(n, n == 6)] == [6]


@pytest.mark.parametrize("method", [Parseval, SpectralRegularisation, NormalizeAndProject, ResetLayers, DASH, FIRE])
def test_refuses_a_network_without_what_it_works_on(method: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{method.name} found n"):
        method().init({"a": torch.ones(3)}, UnitMap(()))


def _lanes(method: Intervention) -> tuple[list[Bench], list[dict[str, Tensor]]]:
    benches = [Bench(method, seed=seed).train() for seed in range(3)]
    return benches, [{name: torch.randn_like(w) for name, w in b.params.items()} for b in benches]


@every_one
def test_lanes_side_by_side_are_lanes_one_by_one(method: Intervention) -> None:
    """Every scalar of the method differs between the lanes."""
    benches, grads = _lanes(method)
    units = benches[0].units  # of one network, drawn with three seeds
    keys = torch.stack([torch.tensor(seed_key(s, "method"), dtype=torch.int32) for s in range(3)])
    present = [name for name in method.scalars() if getattr(method, name) is not None]
    numbers = {n: torch.tensor([getattr(method, n) * f for f in (0.5, 0.8, 1.0)]).double() for n in present}

    def lane(params: Any, state: Any, grads: Any, key: Tensor, numbers: dict[str, Tensor]) -> Any:
        bound = object.__new__(type(method))
        for field in dataclasses.fields(method):
            object.__setattr__(bound, field.name, numbers.get(field.name, getattr(method, field.name)))
        noise = Noise(key, torch.tensor(0, dtype=torch.int32), method.name)
        context = Context(grads, {}, noise, units)
        changed, state = bound.step(params, state, context)
        stepped = dict(params) | changed
        outcome = bound.event(stepped, state, context)
        return stepped, state, (stepped | outcome.changed, outcome.state), (outcome.touched, outcome.replaced)

    inputs = [(b.params, b.state, g, keys[i]) for i, (b, g) in enumerate(zip(benches, grads, strict=True))]
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves, -1), *inputs)
    *states, marks = torch.vmap(lane, in_dims=-1, out_dims=(-1, -1, -1, 0))(*stacked, numbers)
    for i, one in enumerate(inputs):
        alone = lane(*one, {n: float(v[i]) for n, v in numbers.items()})  # type: ignore[misc]
        together = *pytree.tree_map(lambda t, i=i: t[..., i], states), pytree.tree_map(lambda t, i=i: t[i], marks)
        ours, spec = pytree.tree_flatten(together)
        theirs, expected_spec = pytree.tree_flatten(alone)
        assert spec == expected_spec
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@every_one
def test_step_and_event_write_into_nothing(method: Intervention) -> None:
    (b, *_), (grads, *_) = _lanes(method)
    inputs = (b.params, b.state, grads)
    before = pytree.tree_map(torch.clone, inputs)
    random = torch.get_rng_state()
    _, state = method.step(b.params, b.state, b.context(grads))
    kept = pytree.tree_map(torch.clone, state)
    method.event(b.params, state, b.context(grads))
    for now, then in ((inputs, before), (state, kept)):
        for a, c in zip(pytree.tree_leaves(now), pytree.tree_leaves(then), strict=True):
            assert torch.equal(a, c)
    assert torch.equal(random, torch.get_rng_state())


@every_one
def test_works_on_live_parameters(method: Intervention) -> None:
    """As a user's optimizer has them: float32, requiring gradients, in a hook without them."""
    torch.manual_seed(0)
    model, initial = build_and_record(network)
    live = dict(model.named_parameters())
    units = UnitMap((), initial=initial, outputs=("6.weight",), order=tuple(live))
    with torch.no_grad():
        state = method.init(live, units)
        for w in live.values():
            w.add_(0.1)
    if isinstance(method, Regulariser):
        penalty = method.penalty(live, state, units)
        penalty.backward()
        assert live["4.weight"].grad is not None
        assert live["4.weight"].grad.abs().sum() > 0
    key = torch.tensor(seed_key(0, "method"), dtype=torch.int32)
    context = Context(
        {name: torch.randn_like(w) for name, w in live.items()}, {}, Noise(key, key[0] * 0, method.name), units
    )
    with torch.no_grad():
        changed, state = method.step(live, state, context)
        outcome = method.event(live, state, context)
    for name, w in (changed | outcome.changed).items():
        assert w.dtype == torch.float32
        assert w.shape == live[name].shape
        assert not w.requires_grad
        assert w is not live[name]
    for leaf in pytree.tree_leaves(state):
        assert not leaf.requires_grad
