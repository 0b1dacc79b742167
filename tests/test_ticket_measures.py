"""Supermasks, linear paths between networks, and what masks share."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perennial.tickets.connectivity import ConnectivityResult, instability, linear_path
from perennial.tickets.overlap import jaccard, sparsity
from perennial.tickets.supermask import Supermask


def mlp(*sizes: int) -> nn.Module:
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]


def states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


# --- supermasks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and classes to learn, and to test by."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1400]], y[order[:1400]], x[order[1400:]], y[order[1400:]]


def learn(supermask: Supermask, x: Tensor, y: Tensor, steps: int, lr: float, first: int = 0) -> None:
    optimizer = torch.optim.Adam(supermask.parameters(), lr=lr)
    for step in range(first, first + steps):
        batch = torch.randint(len(x), (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(supermask(x[batch]), y[batch]).backward()
        optimizer.step()


def untrained(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = mlp(64, 128, 64, 10)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
    return model


@pytest.mark.parametrize(
    ("kind", "lr", "constant"), [("bernoulli", 0.1, False), ("bernoulli", 0.1, True), ("top_k", 0.01, False)]
)
def test_a_mask_alone_makes_a_classifier(digits: Any, kind: str, lr: float, constant: bool) -> None:
    x, y, test_x, test_y = digits
    model = untrained()
    weights = tensors(model)
    supermask = Supermask(model, kind, signed_constant=constant)
    learn(supermask, x, y, 120, lr)
    accuracy = (supermask.eval()(test_x).argmax(1) == test_y).double().mean()
    assert accuracy > 0.8

    # The accuracy is that of the model's own weights, masked; and what a random mask of as many weights gives is not.
    def by_hand(masks: dict[str, Tensor]) -> float:
        masked = copy.deepcopy(model)
        with torch.no_grad():
            for name, w in masked.named_parameters():
                if name in masks:
                    kept = masks[name].double().mean()
                    w.copy_(w.sign() * w.std(correction=0) if constant else w)
                    w.mul_(masks[name] / (kept if kind == "bernoulli" else kept.sqrt()))
        return float((masked(test_x).argmax(1) == test_y).double().mean())

    masks = supermask.masks()
    assert by_hand(masks) == pytest.approx(float(accuracy), abs=0.005)
    shuffled = {n: m.flatten()[torch.randperm(m.numel())].view(m.shape) for n, m in masks.items()}
    assert by_hand(shuffled) < 0.5
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    if kind == "top_k":
        assert [int(m.sum()) for m in masks.values()] == [m.numel() // 2 for m in masks.values()]


def test_only_logits_are_trained_and_the_gradient_passes_straight_through() -> None:
    torch.manual_seed(0)
    model = mlp(3, 2)
    x = torch.randn(5, 3)
    supermask = Supermask(model, share=0.7)
    supermask(x).square().sum().backward()
    assert {n for n, w in supermask.named_parameters() if w.requires_grad} == {"mask_logits.0/weight"}
    m = supermask.drawn(0)["0.weight"].float().requires_grad_()
    (F.linear(x, model[0].weight * m * (6 / m.sum()), model[0].bias)).square().sum().backward()
    assert m.grad is not None
    torch.testing.assert_close(supermask.logits["0.weight"].grad, m.grad * 0.7 * 0.3)

    chosen = Supermask(model, "top_k", share=0.5, rescale=False)
    chosen(x).square().sum().backward()
    m = chosen.masks()["0.weight"].float().requires_grad_()
    (F.linear(x, model[0].weight * m, model[0].bias)).square().sum().backward()
    torch.testing.assert_close(chosen.logits["0.weight"].grad, m.grad)
    s = chosen.logits["0.weight"]
    assert s[chosen.masks()["0.weight"]].min() > s[~chosen.masks()["0.weight"]].max()


def test_draws_are_of_seed_and_number_and_have_their_probability() -> None:
    model = mlp(200, 100)
    one, other = (Supermask(model, share=0.3, seed=seed) for seed in (1, 2))
    first = one.drawn(0)["0.weight"]
    assert abs(float(first.float().mean()) - 0.3) < 0.02
    assert not torch.equal(first, one.drawn(1)["0.weight"])
    assert not torch.equal(first, other.drawn(0)["0.weight"])
    assert torch.equal(first, Supermask(model, share=0.3, seed=1).drawn(0)["0.weight"])
    x = torch.randn(2, 200)
    assert not torch.equal(one(x), one(x))
    one.eval()
    assert torch.equal(one(x), one(x))
    scores = [Supermask(model, "top_k", seed=seed).logits["0.weight"] for seed in (1, 1, 2)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("kind", ["bernoulli", "top_k"])
def test_a_supermask_that_is_loaded_goes_on_as_if_not_interrupted(digits: Any, kind: str) -> None:
    x, y, *_ = digits
    model = untrained()
    whole = Supermask(model, kind)
    learn(whole, x, y, 5, 0.05)
    halves = Supermask(untrained(seed=1), kind, seed=0)
    halves.load_state_dict(copy.deepcopy(whole.state_dict()))
    for supermask in (whole, halves):
        learn(supermask, x, y, 5, 0.05, first=5)
    for name, s in whole.logits.items():
        assert torch.equal(s, halves.logits[name])
    model.load_state_dict(halves.model.state_dict())  # its keys are those of the model
    assert set(whole.state_dict()) == {
        *(f"model.{name}" for name in model.state_dict()),
        *(f"mask_logits.{i}/weight" for i in (0, 2, 4)),
        "draws",
    }


def test_the_masked_model_is_a_copy() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval()
    held, before = tensors(model), states()
    supermask = Supermask(model, names=["0.weight"]).train()
    assert states() == before
    supermask(torch.randn(3, 4)).sum().backward()
    assert list(supermask.logits) == ["0.weight"]
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    assert all(w.requires_grad and w.grad is None for w in model.parameters())
    assert not model.training
    assert supermask.model[1].num_batches_tracked == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "soft"}, "kind is 'soft'; it is one of bernoulli, top_k"),
        ({"share": 1.0}, "share is 1; it must be between 0 and 1"),
        ({"names": ["1.weight"]}, "no parameters named 1.weight; it has 0.weight, 0.bias"),
        ({"names": []}, "no weights to mask"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_supermask_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Supermask(mlp(3, 2), **arguments)
    with pytest.raises(ValueError, match="the masks of top_k are not drawn"):
        Supermask(mlp(3, 2), "top_k").drawn(0)


# --- linear paths -----------------------------------------------------------------------------------------------------


def squared_error(x: Tensor, y: Tensor) -> Any:
    def evaluate(network: nn.Module) -> float:
        assert not network.training
        return float((network(x) - y).square().mean())

    return evaluate


def test_a_convex_loss_has_no_barrier_and_the_path_is_its_parabola() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20, 2)
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    model = nn.Linear(3, 2)
    held, before = tensors(model), states()
    found = linear_path(model, tensors(one), tensors(other), squared_error(x, y))
    assert states() == before
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    assert model.training
    assert len(found.alphas) == 30
    assert found.alphas[0] == 0
    assert found.alphas[-1] == 1
    a, b = (net(x).detach() - y for net in (one, other))
    wanted = [float(((1 - t) * a + t * b).square().mean()) for t in found.alphas]
    np.testing.assert_allclose(found.errors, wanted, rtol=1e-5)
    assert found.errors[0] == float(a.square().mean())
    assert found.errors[-1] == float(b.square().mean())
    assert found.barrier <= abs(found.errors[0] - found.errors[-1]) / 2 + 1e-12
    same = linear_path(model, tensors(one), tensors(one), squared_error(x, y), points=3)
    assert same.barrier == pytest.approx(0, abs=1e-6)
    assert same.stable()


def test_two_networks_that_differ_in_the_order_of_units_have_a_barrier() -> None:
    torch.manual_seed(0)
    one = mlp(3, 50, 1)
    other = copy.deepcopy(one)
    order = torch.randperm(50)
    with torch.no_grad():
        other[0].weight.copy_(one[0].weight[order])
        other[0].bias.copy_(one[0].bias[order])
        other[2].weight.copy_(one[2].weight[:, order])
    x = torch.randn(100, 3)
    found = linear_path(one, tensors(one), tensors(other), squared_error(x, one(x).detach()), points=11)
    assert found.errors[[0, -1]] == pytest.approx([0, 0], abs=1e-10)
    assert found.barrier == pytest.approx(found.errors.max())
    assert found.errors.argmax() == 5
    assert str(found).startswith(f"barrier {found.barrier:.4g}: error ")


def test_barrier() -> None:
    found = ConnectivityResult(np.array([0, 0.5, 1.0]), np.array([0.1, 0.35, 0.2]))
    assert found.barrier == pytest.approx(0.2)
    assert not found.stable()
    assert found.stable(0.21)
    assert np.isnan(ConnectivityResult(found.alphas, np.array([0.1, np.nan, 0.2])).barrier)


def with_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(16, 5),
        nn.BatchNorm1d(5),
    )  # fmt: skip


@pytest.mark.parametrize("once", [False, True])
def test_batch_norms_are_measured_anew_at_every_point(once: bool) -> None:
    torch.manual_seed(0)
    one, other, model = with_norms(), with_norms(), with_norms()
    batches = [torch.randn(8, 1, 4, 4) + 1 for _ in range(3)]
    seen = []

    def evaluate(network: nn.Module) -> float:
        seen.append(copy.deepcopy(network))
        return 0.0

    given: list[Tensor] | Iterator[Tensor] = iter(batches) if once else batches
    held = tensors(model)
    linear_path(model, tensors(one), tensors(other), evaluate, points=3, recalibrate=given)
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
    for alpha, network in zip((0, 0.5, 1), seen, strict=True):
        conv, norm, last = network[0], network[1], network[6]
        assert norm.momentum == 0.3
        torch.testing.assert_close(conv.weight, (1 - alpha) * one[0].weight + alpha * other[0].weight)
        with torch.no_grad():
            hidden = [conv(x) for x in batches]
            mean = torch.stack([h.mean((0, 2, 3)) for h in hidden]).mean(0)
            variance = torch.stack([h.transpose(0, 1).flatten(1).var(1) for h in hidden]).mean(0)
            torch.testing.assert_close(norm.running_mean, mean)
            torch.testing.assert_close(norm.running_var, variance)
            # The one behind it sees what a batch's own statistics give, without dropout.
            own = [F.batch_norm(h, None, None, norm.weight, norm.bias, True) for h in hidden]
            out = [network[5](F.relu(h).flatten(1)) for h in own]
            torch.testing.assert_close(last.running_mean, torch.stack([o.mean(0) for o in out]).mean(0))


def test_batch_norms_without_data_are_refused() -> None:
    model = with_norms()
    one = tensors(model)
    with pytest.raises(ValueError, match=r"the model has batch norms \(1, 6\), .* give recalibrate="):
        linear_path(model, one, one, lambda network: 0.0)
    with pytest.raises(TypeError, match="recalibrate gives a list; it must give tensors"):
        linear_path(model, one, one, lambda network: 0.0, recalibrate=[[torch.ones(2, 1, 4, 4), 1]])
    with pytest.raises(ValueError, match="recalibrate gives no batches"):
        linear_path(model, one, one, lambda network: 0.0, recalibrate=[])
    without = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    linear_path(without, tensors(without), tensors(without), lambda network: 0.0, points=2)


def test_a_path_refuses_networks_that_do_not_fit() -> None:
    model = mlp(3, 2)
    one, wide, named = tensors(model), tensors(mlp(4, 2)), {"x": torch.ones(2)}
    with pytest.raises(ValueError, match=r"0.weight is \[2, 3\] in the first network, \[2, 4\] in the second"):
        linear_path(model, one, wide, lambda network: 0.0)
    with pytest.raises(ValueError, match=r"x is \[2\] in the first network, missing in the second"):
        linear_path(model, {**one, **named}, one, lambda network: 0.0)
    with pytest.raises(ValueError, match=r"the networks lack 0.bias"):
        linear_path(model, *({"0.weight": one["0.weight"]} for _ in range(2)), lambda network: 0.0)
    with pytest.raises(ValueError, match="points is 1"):
        linear_path(model, one, one, lambda network: 0.0, points=1)


def test_instability_trains_two_copies_from_one_start() -> None:
    torch.manual_seed(0)
    x, y, start = torch.randn(30, 3), torch.randn(30, 2), tensors(mlp(3, 8, 2))
    ends = []

    def train(network: nn.Module, seed: int) -> None:
        assert all(torch.equal(value, start[name]) for name, value in network.state_dict().items())
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for i in torch.randperm(30, generator=torch.Generator().manual_seed(seed)):
            optimizer.zero_grad()
            (network(x[i]) - y[i]).square().mean().backward()
            optimizer.step()
        ends.append((seed, tensors(network), float(torch.rand(()))))

    before = states()
    found = instability(lambda: mlp(3, 8, 2), train, start, squared_error(x, y), seeds=(3, 4), points=5)
    assert states() == before
    assert [seed for seed, *_ in ends] == [3, 4]
    assert ends[0][2] != ends[1][2]  # numbers of the global generators differ too
    wanted = linear_path(mlp(3, 8, 2), ends[0][1], ends[1][1], squared_error(x, y), points=5)
    assert np.array_equal(found.errors, wanted.errors)
    again = instability(lambda: mlp(3, 8, 2), train, start, squared_error(x, y), seeds=(3, 4), points=5)
    assert np.array_equal(found.errors, again.errors)
    with pytest.raises(ValueError, match=r"seeds are \(1, 1\); they must differ"):
        instability(lambda: mlp(3, 2), train, start, squared_error(x, y), seeds=(1, 1))
    with pytest.raises(ValueError, match=r"start has 2.weight, 2.bias, which a network of make_model\(\) lacks"):
        instability(lambda: mlp(3, 8), train, start, squared_error(x, y))


# --- what masks share -------------------------------------------------------------------------------------------------


def kept(count: int, of: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(of, generator=generator).argsort() < count).view(1, of)


@pytest.mark.parametrize(("a", "b"), [(6, 9), (20, 20), (35, 30), (1, 1), (40, 7), (0, 5)])
def test_the_floor_is_that_of_random_masks(a: int, b: int) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = kept(a, 40, generator), kept(b, 40, generator)
    found = jaccard({"w": one}, {"w": other}).layers["w"]
    both, either = int((one & other).sum()), int((one | other).sum())
    assert (found.both, found.either, found.jaccard) == (both, either, both / either)
    ranks = torch.rand(4000, 2, 40, generator=generator).argsort(-1)
    first, second = ranks[:, 0] < a, ranks[:, 1] < b
    drawn = ((first & second).sum(1) / (first | second).sum(1)).double()
    assert found.floor == pytest.approx(float(drawn.mean()), abs=4 * float(drawn.std()) / 4000**0.5 + 1e-6)
    for end, share in zip(found.interval, (0.025, 0.975), strict=True):
        assert float((drawn < end - 1e-6).double().mean()) <= share + 0.01
        assert float((drawn <= end + 1e-6).double().mean()) >= share - 0.01


def test_the_floor_is_exact() -> None:
    """Against sums of binomial coefficients, in whole numbers."""
    from fractions import Fraction
    from math import comb

    def exact(size: int, a: int, b: int) -> Fraction:
        ways = [(k, comb(a, k) * comb(size - a, b - k)) for k in range(max(0, a + b - size), min(a, b) + 1)]
        return sum((Fraction(n * k, (a + b - k) * comb(size, b)) for k, n in ways), Fraction(0))

    generator = torch.Generator().manual_seed(0)
    for size, a, b in ((50, 20, 25), (3000, 90, 1200), (3000, 2900, 2950)):
        one, other = kept(a, size, generator), kept(b, size, generator)
        assert jaccard({"w": one}, {"w": other}).layers["w"].floor == pytest.approx(float(exact(size, a, b)), rel=1e-12)


def test_the_overall_floor_is_of_layers_that_keep_their_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, a, b = (30, 50, 8), (10, 5, 8), (20, 9, 4)
    one, other = ({str(i): kept(n, s, generator) for i, (n, s) in enumerate(zip(c, sizes))} for c in (a, b))  # noqa: B905
    found = jaccard(one, other)
    drawn = []
    for _ in range(2000):
        pairs = [(kept(m, s, generator), kept(n, s, generator)) for m, n, s in zip(a, b, sizes, strict=True)]
        both = sum(int((p & q).sum()) for p, q in pairs)
        drawn.append(both / (sum(a) + sum(b) - both))
    assert found.overall.floor == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 2000**0.5)
    assert found.overall.both == sum(layer.both for layer in found.layers.values())
    assert found.overall.either == sum(layer.either for layer in found.layers.values())
    low, high = found.overall.interval
    assert np.mean((np.array(drawn) >= low) & (np.array(drawn) <= high)) > 0.94
    assert str(found).splitlines()[-1].startswith("all  J ")
    assert found.layers["2"].jaccard == found.layers["2"].floor == 0.5  # 4 of 8 that the first keeps all


def test_large_masks_take_no_time_and_lie_on_their_floor() -> None:
    torch.manual_seed(0)
    one, other = ({str(i): torch.rand(1000, 1000) < p for i in range(3)} for p in (0.2, 0.3))
    found = jaccard(one, other)
    for shared in (*found.layers.values(), found.overall):
        assert abs(shared.floor - 0.06 / 0.44) < 1e-3
        assert shared.interval[0] - 1e-4 < shared.jaccard < shared.interval[1] + 1e-4
        assert shared.interval[1] - shared.interval[0] < 2e-3
        assert abs(shared.excess) < 2e-3
    # Three alike layers: the spread is that of one, by the root of three.
    widths = [s.interval[1] - s.interval[0] for s in (found.layers["0"], found.overall)]
    assert widths[0] / widths[1] == pytest.approx(3**0.5, rel=0.02)


def test_equal_empty_and_full_masks() -> None:
    some, none, full = torch.arange(6).view(2, 3) < 2, torch.zeros(2, 3) > 0, torch.ones(2, 3) > 0
    assert jaccard({"w": some}, {"w": some}).overall.excess == 1
    empty = jaccard({"w": none}, {"w": none}).layers["w"]
    assert np.isnan([empty.jaccard, empty.floor, empty.excess]).all()
    all_kept = jaccard({"w": full}, {"w": full}).layers["w"]
    assert (all_kept.jaccard, all_kept.floor) == (1, 1)
    assert np.isnan(all_kept.excess)
    assert jaccard({"w": some}, {"w": none}).layers["w"].jaccard == 0


def test_masks_that_cannot_be_compared() -> None:
    mask = torch.ones(2, 3) > 0
    with pytest.raises(ValueError, match="only the first has w, only the second v"):
        jaccard({"w": mask}, {"v": mask})
    with pytest.raises(ValueError, match=r"the masks of w are \[2, 3\] and \[3, 2\]"):
        jaccard({"w": mask}, {"w": mask.T})
    with pytest.raises(ValueError, match=r"a mask of w is torch.float32; masks are bool"):
        jaccard({"w": mask}, {"w": mask.float()})
    with pytest.raises(ValueError, match="the masks have no layers"):
        jaccard({}, {})


def test_sparsity_counts_the_zeros_that_are_there() -> None:
    model = mlp(4, 3, 2)
    with torch.no_grad():
        model[0].weight[0].zero_()
        model[2].weight[1, 2] = -0.0
    found = sparsity(model)
    assert {name: (z.zeros, z.total) for name, z in found.layers.items()} == {
        "0.weight": (4, 12),
        "2.weight": (1, 6),
    }
    assert (found.overall.zeros, found.overall.kept, found.overall.total) == (5, 13, 18)
    assert found.overall.sparsity == 5 / 18
    assert found.overall.density == 13 / 18
    masks = {name: w != 0 for name, w in model.named_parameters() if w.dim() > 1}
    assert sparsity(masks) == found
    with pytest.raises(ValueError, match="there are none"):
        sparsity(nn.ReLU())
    with pytest.raises(ValueError, match="there are no weights to count"):
        sparsity({})
