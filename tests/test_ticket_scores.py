"""Scores of weights against independent statements of their formulas, and pruning before training."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perennial.tickets.scores import SCORES, TEMPERATURE, Evidence, prune_at_start

pytestmark = pytest.mark.usefixtures("in_double")

OF_DATA = ("snip", "grasp", "taylor", "utility", "fisher")
NAMES = ("0.weight", "2.weight")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data(batches: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Batches of different sizes."""
    return [(torch.randn(4 + n, 4), torch.randint(3, (4 + n,))) for n in range(batches)]


def evidence_of(model: nn.Module, **more: Any) -> Evidence:
    """Of a network with a third of its weights pruned, that came from another start."""
    trained = dict(model.named_parameters())
    masks = {name: torch.rand(w.shape) > 0.3 for name, w in trained.items() if w.dim() > 1}
    with torch.no_grad():
        for name, mask in masks.items():
            trained[name].mul_(mask)
    held = {name: w.detach().clone() for name, w in trained.items()}
    start = {name: torch.where(masks.get(name, torch.tensor(True)), torch.randn_like(w), 0) for name, w in held.items()}
    return Evidence(model, start, held, masks, **more)


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], masks: Any = None) -> None:
    """At the surviving weights, if there are masks."""
    assert list(found) == list(wanted)
    for name, values in found.items():
        assert values.shape == wanted[name].shape
        where = torch.ones_like(values, dtype=torch.bool) if masks is None else masks[name]
        torch.testing.assert_close(values[where], wanted[name][where].to(values.dtype))


# --- two values of a weight -------------------------------------------------------------------------------------------


def alone(rule: Callable[[float, float], float]) -> Callable[[Evidence], dict[str, Tensor]]:
    """One weight at a time."""

    def of(evidence: Evidence) -> dict[str, Tensor]:
        found = {}
        for name in evidence.masks:
            pairs = zip(evidence.start[name].flatten().tolist(), evidence.trained[name].flatten().tolist(), strict=True)
            found[name] = torch.tensor([rule(*pair) for pair in pairs]).view(evidence.start[name].shape)
        return found

    return of


LOWEST = torch.finfo(torch.float64).min
ZHOU: dict[str, Callable[[float, float], float]] = {
    "large_final": lambda start, final: abs(final),
    "small_final": lambda start, final: -abs(final),
    "large_init": lambda start, final: abs(start),
    "small_init": lambda start, final: -abs(start),
    "magnitude_increase": lambda start, final: abs(final) - abs(start),
    "movement": lambda start, final: abs(final - start),
    "large_final_same_sign": lambda start, final: abs(final) if start * final > 0 else 0.0,
    "large_final_diff_sign": lambda start, final: abs(final) if start * final < 0 else 0.0,
    "magnitude_increase_same_sign": lambda start, final: abs(final) - abs(start) if start * final > 0 else LOWEST,
    "magnitude_increase_diff_sign": lambda start, final: abs(final) - abs(start) if start * final < 0 else LOWEST,
    "movement_same_sign": lambda start, final: abs(final - start) if start * final > 0 else 0.0,
    "movement_diff_sign": lambda start, final: abs(final - start) if start * final < 0 else 0.0,
}


@pytest.mark.parametrize("name", ZHOU)
def test_two_values(name: str) -> None:
    evidence = evidence_of(mlp())
    close(SCORES[name](evidence), alone(ZHOU[name])(evidence), evidence.masks)


def test_a_weight_that_kept_its_sign_is_kept_before_all_that_changed_it() -> None:
    # Of Zhou et al.'s code, which gives the others 0, this is false: the first weight shrank, the second changed.
    start, final = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5, -3.0]])
    evidence = Evidence(nn.Linear(2, 1), {"weight": start}, {"weight": final}, {"weight": torch.ones(1, 2) > 0})
    (score,) = SCORES["magnitude_increase_same_sign"](evidence)["weight"]
    assert score[0] > score[1]


@pytest.mark.parametrize(("name", "sign"), [("large_init_large_final", 1), ("small_init_small_final", -1)])
def test_both_large_is_the_intersection_at_one_percentile(name: str, sign: int) -> None:
    evidence = evidence_of(mlp())
    for layer, score in SCORES[name](evidence).items():
        mask = evidence.masks[layer]
        pair = [sign * np.abs(w[layer][mask].numpy()) for w in (evidence.start, evidence.trained)]
        # Every intersection of what is above the same rank in both is the highest scores, as many as it has.
        order = [np.argsort(values) for values in pair]
        for cut in range(mask.sum()):
            kept = set(order[0][cut:]) & set(order[1][cut:])
            highest = np.argsort(score[mask].numpy(), kind="stable")[::-1][: len(kept)]
            assert set(highest) == kept


def test_both_large_goes_by_the_other_where_one_is_constant() -> None:
    """As after signed constants."""
    start, final = torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([[0.3, 0.1, 0.2]])
    evidence = Evidence(nn.Linear(3, 1), {"weight": start}, {"weight": final}, {"weight": torch.ones(1, 3) > 0})
    assert SCORES["large_init_large_final"](evidence)["weight"].argsort().tolist() == [[1, 2, 0]]


def test_random_is_of_seed_and_name() -> None:
    evidence = evidence_of(mlp())
    once, again = SCORES["random"](evidence), SCORES["random"](evidence)
    close(once, again)
    flat = torch.cat([score.flatten() for score in once.values()])
    assert len(flat.unique()) == len(flat)
    assert not torch.equal(once[NAMES[0]], SCORES["random"](_with(evidence, seed=1))[NAMES[0]])


def _with(evidence: Evidence, **changes: Any) -> Evidence:
    return Evidence(**{**vars(evidence), **changes})


# --- a loss on data ---------------------------------------------------------------------------------------------------


def explicit(evidence: Evidence, masks: dict[str, Tensor], x: Tensor) -> Tensor:
    """The output of the MLP with its weights times masks that may have a gradient."""
    w = evidence.trained
    hidden = torch.tanh(x @ (w[NAMES[0]] * masks[NAMES[0]]).T + w["0.bias"])
    return hidden @ (w[NAMES[1]] * masks[NAMES[1]]).T + w["2.bias"]


def by_masks(evidence: Evidence, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The gradient of the loss of a batch by the entries of the masks."""
    masks = {name: mask.double().requires_grad_() for name, mask in evidence.masks.items()}
    F.cross_entropy(explicit(evidence, masks, batch[0]), batch[1]).backward()
    return {name: mask.grad for name, mask in masks.items() if mask.grad is not None}


def of_data() -> Evidence:
    return evidence_of(mlp(), batches=data(), loss=F.cross_entropy)


def test_snip_is_the_gradient_by_the_mask() -> None:
    evidence = of_data()
    slopes = [by_masks(evidence, batch) for batch in evidence.batches]
    wanted = {name: sum(s[name] for s in slopes).abs() for name in NAMES}
    total = sum(float(s.sum()) for s in wanted.values())
    found = SCORES["snip"](evidence)
    close(found, {name: s / total for name, s in wanted.items()}, evidence.masks)
    assert sum(float(s.sum()) for s in found.values()) == pytest.approx(1)


def test_taylor_utility_and_fisher_of_gradients_by_the_mask() -> None:
    evidence = of_data()
    slopes = [by_masks(evidence, batch) for batch in evidence.batches]
    close(SCORES["taylor"](evidence), {n: sum(s[n] ** 2 for s in slopes) / 3 for n in NAMES}, evidence.masks)
    close(SCORES["utility"](evidence), {n: -sum(s[n] for s in slopes) / 3 for n in NAMES}, evidence.masks)
    samples = [(x[None], y[None]) for batch in evidence.batches for x, y in zip(*batch, strict=True)]
    slopes = [by_masks(evidence, sample) for sample in samples]
    wanted = {n: sum(s[n] ** 2 for s in slopes) / (2 * len(samples)) for n in NAMES}
    close(SCORES["fisher"](evidence), wanted, evidence.masks)


def test_fisher_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = of_data()
    whole = SCORES["fisher"](evidence)
    monkeypatch.setattr("perennial.tickets.scores._AT_ONCE", 80)  # two samples
    close(SCORES["fisher"](evidence), whole)


def test_grasp_is_the_hessian_times_the_gradient() -> None:
    evidence = of_data()
    sizes = [evidence.trained[name].numel() for name in NAMES]
    left = torch.cat([evidence.masks[name].flatten() for name in NAMES])

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        w = {n: part.view(evidence.trained[n].shape) for n, part in zip(NAMES, parts, strict=True)}
        network = _with(evidence, trained={**evidence.trained, **w})
        every = {name: torch.ones_like(value) for name, value in w.items()}
        each = [F.cross_entropy(explicit(network, every, x) / TEMPERATURE, y) for x, y in evidence.batches]
        return torch.stack(each).sum()

    at = torch.cat([evidence.trained[name].flatten() for name in NAMES])
    hessian, slope = torch.func.hessian(loss)(at), torch.func.grad(loss)(at)
    wanted = at * (hessian @ torch.where(left, slope, 0))
    found = SCORES["grasp"](evidence)
    close(found, {n: s.view(found[n].shape) for n, s in zip(NAMES, wanted.split(sizes), strict=True)}, evidence.masks)

    # What it is for: taking away a little of a weight with the lowest score makes the gradient's norm grow most.
    def norm(flat: Tensor) -> Tensor:
        return torch.where(left, torch.func.grad(loss)(flat), 0).square().sum()

    change = torch.stack([norm(at - 1e-6 * at * (torch.arange(len(at)) == i)) - norm(at) for i in range(len(at))])
    assert int(change.argmax()) == int(torch.where(left, wanted, torch.inf).argmin())
    torch.testing.assert_close(change[left], -2e-6 * wanted[left], rtol=1e-4, atol=1e-16)


def test_grasp_of_a_linear_loss_is_zero() -> None:
    model = nn.Linear(3, 1, bias=False)
    evidence = evidence_of(model, batches=[(torch.randn(2, 3), torch.zeros(2))], loss=lambda out, target: out.mean())
    assert not SCORES["grasp"](evidence)["weight"].any()


def test_batches_are_scored_in_training_mode() -> None:
    """With a batch norm's own statistics, whatever mode the network is in, and the same dropout every time."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    evidence = evidence_of(model, batches=data(1), loss=F.cross_entropy)
    wanted = copy.deepcopy(model).train()
    F.cross_entropy(wanted(evidence.batches[0][0]), evidence.batches[0][1]).backward()
    slopes = {name: w.grad for name, w in wanted.named_parameters()}
    found = SCORES["utility"](evidence)
    close(found, {n: -slopes[n] * evidence.trained[n] for n in evidence.masks})
    noisy = evidence_of(nn.Sequential(mlp(), nn.Dropout()), batches=data(1), loss=F.cross_entropy)
    for name in ("snip", "grasp"):
        close(SCORES[name](noisy), SCORES[name](noisy))


# --- the network alone ------------------------------------------------------------------------------------------------


def test_synflow_is_the_flow_through_paths() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    evidence = evidence_of(model, example=torch.randn(2, 4))
    w = {name: np.abs(value.numpy()) for name, value in evidence.trained.items()}
    one = w["0.weight"] @ np.ones(4) + w["0.bias"]
    two = w["2.weight"] @ one + w["2.bias"]
    wanted = {
        "0.weight": np.outer(np.ones(3) @ w["4.weight"] @ w["2.weight"], np.ones(4)) * w["0.weight"],
        "2.weight": np.outer(np.ones(3) @ w["4.weight"], one) * w["2.weight"],
        "4.weight": np.outer(np.ones(3), two) * w["4.weight"],
    }
    close(SCORES["synflow"](evidence), {name: torch.from_numpy(score) for name, score in wanted.items()})


def test_synflow_conserves_the_flow_from_layer_to_layer() -> None:
    conv = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 3, bias=False),
    ).float()  # fmt: skip
    found = SCORES["synflow"](evidence_of(conv, batches=[(torch.randn(2, 2, 6, 6), torch.zeros(2))]))
    sums = torch.stack([score.sum() for score in found.values()])
    assert {score.dtype for score in found.values()} == {torch.float64}
    torch.testing.assert_close(sums, sums[:1].expand(3))


# --- all of them ------------------------------------------------------------------------------------------------------


class Conv(nn.Module):
    """With everything that could be disturbed."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(), nn.Flatten())
        self.head = nn.Linear(12, 3)
        self.unused = nn.Linear(2, 2)
        self.unused.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]


@pytest.mark.parametrize("name", SCORES)
def test_the_model_is_left_alone(name: str) -> None:
    model = Conv()
    model.features[1].eval()
    batches = [(torch.randn(4, 1, 4, 4), torch.randint(3, (4,))) for _ in range(2)]
    model(batches[0][0]).sum().backward()
    evidence = evidence_of(model, batches=batches, loss=F.cross_entropy)
    held = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    grads = {n: None if w.grad is None else w.grad.clone() for n, w in model.named_parameters()}
    before = states()
    found = SCORES[name](evidence)
    assert states() == before
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, held[key]) for key, value in model.state_dict().items())
    for key, w in model.named_parameters():
        assert w.grad is None if grads[key] is None else torch.equal(w.grad, grads[key])
    assert not model.unused.weight.requires_grad
    assert list(found) == ["features.0.weight", "head.weight", "unused.weight"]
    assert all(score.isfinite().all() and not score.requires_grad for score in found.values())
    close(found, SCORES[name](evidence))
    assert SCORES[name].__doc__


@pytest.mark.parametrize("name", OF_DATA)
@pytest.mark.parametrize("lacks", ["batches", "loss"])
def test_missing_evidence_is_named(name: str, lacks: str) -> None:
    evidence = _with(of_data(), **{lacks: () if lacks == "batches" else None})
    with pytest.raises(ValueError, match=rf"{name} needs batches of inputs and targets and a loss, .* no {lacks}"):
        SCORES[name](evidence)


def test_other_evidence_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="synflow needs the shape of an input"):
        SCORES["synflow"](evidence_of(mlp()))
    with pytest.raises(ValueError, match=r"example's are torch.int64, such as\s+tokens"):
        SCORES["synflow"](evidence_of(mlp(), example=torch.zeros(1, 4, dtype=torch.int64)))
    good = of_data()
    with pytest.raises(ValueError, match=r"x is missing in the evidence's start, but its mask is \[5, 4\]"):
        SCORES["movement"](_with(good, masks={"x": good.masks[NAMES[0]]}))
    with pytest.raises(ValueError, match=r"the mask of 2.weight is \[5, 4\], but the parameter \[3, 5\]"):
        SCORES["snip"](_with(good, masks={NAMES[1]: good.masks[NAMES[0]]}))
    with pytest.raises(ValueError, match=r"the mask of 0.weight is torch.float64; masks are bool"):
        SCORES["snip"](_with(good, masks={NAMES[0]: good.masks[NAMES[0]].double()}))
    with pytest.raises(ValueError, match=r"snip of 0.weight, 2.weight is not finite"):
        SCORES["snip"](_with(good, loss=lambda out, target: out.sum() * torch.nan))


# --- pruning before training ------------------------------------------------------------------------------------------


def counts(masks: dict[str, Tensor]) -> list[int]:
    return [int(mask.sum()) for mask in masks.values()]


def test_one_round_keeps_the_highest() -> None:
    model, batches = mlp(), data()
    held = dict(model.named_parameters())
    masks = {name: torch.ones_like(held[name], dtype=torch.bool) for name in NAMES}
    score = SCORES["snip"](Evidence(model, held, held, masks, batches, F.cross_entropy))
    found = prune_at_start(model, "snip", 0.4, batches=batches, loss=F.cross_entropy)
    kept = torch.cat([score[n][found[n]] for n in NAMES])
    gone = torch.cat([score[n][~found[n]] for n in NAMES])
    assert len(kept) == 14
    assert kept.min() > gone.max()
    by_layer = prune_at_start(model, SCORES["large_final"], 0.4, scope="layer")
    assert counts(by_layer) == [8, 6]
    for name, mask in by_layer.items():
        assert held[name][mask].abs().min() > held[name][~mask].abs().max()


def test_rounds_follow_the_exponential_schedule_and_never_return_a_weight() -> None:
    model, seen = mlp(), []

    def score(evidence: Evidence) -> dict[str, Tensor]:
        seen.append({name: mask.clone() for name, mask in evidence.masks.items()})
        for name, mask in evidence.masks.items():
            assert torch.equal(evidence.trained[name] != 0, mask)
            assert torch.equal(dict(evidence.model.named_parameters())[name], evidence.trained[name])
            assert evidence.start[name].all()
        return SCORES["random"](evidence)

    seen.append(prune_at_start(model, score, 0.1, iterations=4))
    assert [sum(counts(masks)) for masks in seen] == [35, 20, 11, 6, 4]
    assert all(not (late[n] & ~early[n]).any() for early, late in itertools.pairwise(seen) for n in NAMES)
    assert all(w.all() for w in model.parameters())


def test_it_goes_on_from_masks() -> None:
    model = mlp()
    half = prune_at_start(model, "random", 0.5)
    copied = {name: mask.clone() for name, mask in half.items()}
    found = prune_at_start(model, "large_final", 0.2, masks=half)
    assert sum(counts(found)) == 7
    assert all(not (found[n] & ~half[n]).any() and torch.equal(half[n], copied[n]) for n in NAMES)
    only = prune_at_start(model, "large_final", 0.2, masks={NAMES[1]: half[NAMES[1]] | True})
    assert list(only) == [NAMES[1]]
    assert counts(only) == [3]


def test_among_equals_the_seed_decides_and_the_count_is_exact() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    for w in model.parameters():
        nn.init.ones_(w)
    found = [prune_at_start(model, "large_final", 0.3, seed=seed) for seed in (0, 0, 1)]
    assert [sum(counts(masks)) for masks in found] == [60, 60, 60]
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    assert not all(torch.equal(found[0][n], found[2][n]) for n in found[0])
    assert min(counts(found[0])) > 15


def test_which_weights_may_be_pruned() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 2), nn.Conv1d(2, 2, 1))
    assert list(prune_at_start(model, "large_final", 0.5)) == ["2.weight", "3.weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "snp"}, "score is 'snp'; it is a function or one of large_final"),
        ({"density": 0.0}, "density is 0; it must be above 0, and at most 1"),
        ({"density": 1.5}, "density is 1.5"),
        ({"iterations": 0}, "iterations is 0"),
        ({"scope": "unit"}, "scope is 'unit'; it is one of layer, global"),
        ({"masks": {}}, "density is 0.5; it must be above 0, and at most 0"),
        ({"masks": {"x": torch.ones(2) > 0}}, "there is a mask for 'x'"),
        ({"score": "snip"}, "snip needs batches"),
        ({"score": lambda e: {n: m * torch.nan for n, m in e.masks.items()}}, "not numbers"),
    ],
)
def test_pruning_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune_at_start(mlp(), **{"score": "large_final", "density": 0.5, **arguments})


def vgg_19(width: float) -> nn.Module:
    """VGG-19 with batch norms for CIFAR-10, its layers a share of their width, drawn as by Kaiming."""
    layers: list[nn.Module] = []
    channels = 3
    for block, depth in zip((64, 128, 256, 512, 512), (2, 2, 4, 4, 4), strict=True):
        for _ in range(depth):
            units = int(block * width)
            layers += [nn.Conv2d(channels, units, 3, padding=1, bias=False), nn.BatchNorm2d(units), nn.ReLU()]
            channels = units
        layers.append(nn.MaxPool2d(2))
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 10)).float()
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    return network


def collapse(width: float, seed: int, density: float, *, synflow: bool) -> None:
    """SNIP in one round leaves a layer without weights; SynFlow in a hundred leaves none so."""
    torch.manual_seed(seed)
    network = vgg_19(width)
    batch = (torch.randn(32, 3, 32, 32, dtype=torch.float32), torch.randint(10, (32,)))
    found = prune_at_start(network, "snip", density, batches=[batch], loss=F.cross_entropy)
    assert min(counts(found)) == 0
    if synflow:
        flowing = prune_at_start(network, "synflow", density, iterations=100, example=batch[0])
        assert sum(counts(flowing)) == sum(counts(found))
        share = sum(counts(flowing)) / len(flowing)
        sizes = [mask.numel() for mask in flowing.values()]
        assert all(n > min(size, share) / 2 for n, size in zip(counts(flowing), sizes, strict=True))
        network.load_state_dict({n: w * flowing[n] if n in flowing else w for n, w in network.state_dict().items()})
        assert network(batch[0]).std(0).max() > 0  # something gets through


def test_synflow_leaves_no_layer_empty_where_snip_does() -> None:
    """Acceptance: no layer collapse at density 10^-2 where SNIP collapses."""
    collapse(1 / 8, 0, 0.01, synflow=True)
    for seed in (1, 2):
        collapse(1 / 8, seed, 0.01, synflow=False)


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.01, 0.001])
@pytest.mark.parametrize("seed", range(5))
def test_synflow_leaves_no_layer_empty_in_more_networks(seed: int, density: float) -> None:
    collapse(1 / 8, seed, density, synflow=True)


@pytest.mark.slow
def test_synflow_leaves_no_layer_empty_in_a_wider_network() -> None:
    collapse(1 / 4, 0, 0.01, synflow=True)
