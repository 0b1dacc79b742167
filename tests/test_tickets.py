"""Masks, pruning, the search for tickets, its controls and its training."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from perennial.methods import SGD, Adam
from perennial.tickets import (
    NETWORKS,
    Data,
    Evidence,
    Examples,
    Pruning,
    SparseMLPs,
    Split,
    Stage,
    Ticket,
    Training,
    controls,
    enforce,
    find_ticket,
    fit,
    mlp_layers,
    prunable,
    remaining,
    remaining_weights,
    select,
    sparsity,
    whole,
)
from perennial.tickets import training as training_module
from perennial.tickets.training import Order

TRAINING = Training(iterations=60, batch_size=32, optimizer="adam", lr=2e-3, evaluate_every=10, validation=200)


@functools.cache
def digits() -> Split:
    x, y = load_digits(return_X_y=True)
    inputs, classes = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    return Data(inputs[:1400], classes[:1400], (inputs[1400:], classes[1400:])).split(200, 0)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10)
    )


def train(stage: Stage, training: Training = TRAINING) -> dict[str, Any]:
    return fit(stage, digits(), training)


def some_masks(model: nn.Module, share: float = 0.4) -> dict[str, Tensor]:
    return {n: torch.rand(m.shape) > share for n, m in whole(model).items()}


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "rates", "expected"),
    [
        (
            "lenet_300_100",
            {"output": 0.1, "*": 0.2},
            {0: 100.0, 3: 51.3, 7: 21.1, 9: 13.5, 11: 8.7, 15: 3.6, 20: 1.2},
        ),
        ("conv_2", {"output": 0.1, "conv*": 0.1, "*": 0.2}, {11: 8.8, 14: 4.6}),
        ("conv_4", {"output": 0.1, "conv*": 0.1, "*": 0.2}, {11: 11.1, 12: 9.2}),
        ("conv_6", {"output": 0.1, "conv*": 0.15, "*": 0.2}, {7: 26.6, 10: 15.3}),
    ],
)
def test_remaining_weights_are_the_papers(network: str, rates: dict[str, float], expected: dict[int, float]) -> None:
    """The reference's levels, to 0.1 (Conv-6 as its own arithmetic has it: the paper prints 26.4 and 15.1)."""
    found = remaining_weights(NETWORKS[network](), rates, 20)
    assert len(found) == 21
    for level, percent in expected.items():
        assert round(found[level], 1) == percent


def test_pruning_keeps_the_schedule_exactly() -> None:
    model = perceptron()
    rates = {"5": 0.1, "*": 0.2}
    stated = remaining_weights(model, rates, 6)
    ticket = find_ticket(lambda: model, lambda stage: None, prune=Pruning(rates), rounds=6)
    assert [level.percent for level in ticket.levels] == pytest.approx(stated, abs=1e-12)


def test_rates_are_checked() -> None:
    model = perceptron()
    with pytest.raises(ValueError, match="'fc' matches no linear layer"):
        remaining_weights(model, {"fc": 0.1}, 3)
    with pytest.raises(ValueError, match="put it earlier"):
        remaining_weights(model, {"*": 0.2, "5": 0.1}, 3)
    with pytest.raises(ValueError, match=r"share pruned of '\*' is 1"):
        remaining_weights(model, {"*": 1.0}, 3)


def test_layers_without_a_rate_stay_whole() -> None:
    found = find_ticket(perceptron, lambda stage: None, prune=Pruning({"1": 0.5}), rounds=1)
    assert list(found.masks) == ["1.weight"]
    assert remaining(found.masks) == 0.5


# --- selection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_select_takes_exactly_the_share_and_the_lowest(scope: str, levels: int) -> None:
    torch.manual_seed(0)
    scores = {n: torch.randint(levels, (37, 11)).float() for n in "ab"}
    masks = {n: torch.rand(37, 11) < 0.7 for n in "ab"}
    found = select(scores, masks, 0.3, scope=scope, seed=1)
    groups = [["a"], ["b"]] if scope == "layer" else [["a", "b"]]
    for group in groups:
        kept = torch.cat([scores[n][found[n]] for n in group])
        gone = torch.cat([scores[n][masks[n] & ~found[n]] for n in group])
        before = sum(int(masks[n].sum()) for n in group)
        assert len(gone) == round(0.3 * before)
        assert len(kept) == before - len(gone)
        assert gone.max() <= kept.min()
    assert not any(bool((found[n] & ~masks[n]).any()) for n in "ab")


def test_ties_are_broken_by_lot_and_by_seed() -> None:
    scores, masks = {"w": torch.zeros(1000)}, {"w": torch.ones(1000, dtype=torch.bool)}
    one, again, other = (select(scores, masks, 0.5, seed=seed)["w"] for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert int(one.sum()) == 500
    assert 200 < int(one[:500].sum()) < 300  # no half is preferred


def test_select_says_what_is_wrong() -> None:
    masks = {"w": torch.ones(3, dtype=torch.bool)}
    with pytest.raises(ValueError, match="NaN"):
        select({"w": torch.tensor([1.0, float("nan"), 0.0])}, masks, 0.3)
    with pytest.raises(ValueError, match="scores of w are missing"):
        select({}, masks, 0.3)
    with pytest.raises(ValueError, match="scope is 'all'"):
        select({"w": torch.zeros(3)}, masks, 0.3, scope="all")


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, weight_decay=0.1),
        lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True),
        lambda ps: torch.optim.AdamW(ps, 0.01, weight_decay=0.1),
        lambda ps: torch.optim.Adam(ps, 0.01, weight_decay=0.1, amsgrad=True, fused=True),
        lambda ps: torch.optim.RMSprop(ps, 0.01, momentum=0.9, centered=True),
    ],
)
def test_masks_hold_after_every_step(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """With momentum and decay, whose slots would move a weight without a gradient; slots are zero too."""
    torch.manual_seed(0)
    model = perceptron()
    optimizer = make(model.parameters())
    x, y = digits().training
    for _ in range(3):  # momentum from before there were masks
        F.cross_entropy(model(x[:32]), y[:32]).backward()
        optimizer.step()
    masks = some_masks(model)
    with enforce(model, masks) as held:
        for step in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(x[step * 32 : step * 32 + 32]), y[step * 32 : step * 32 + 32]).backward()
            optimizer.step()
            held.check()
            for name, p in model.named_parameters():
                if name in masks:
                    assert not p[~masks[name]].any()
                    assert p[masks[name]].all()
                    for slot in optimizer.state[p].values():
                        if isinstance(slot, Tensor) and slot.shape == p.shape:
                            assert not slot[~masks[name]].any()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert all(p[~masks[n]].any() for n, p in model.named_parameters() if n in masks)  # removed: they may move


def test_masked_training_is_that_of_the_subnetwork() -> None:
    """Masks enforced from outside give what multiplying by the mask in the forward pass gives."""
    torch.manual_seed(0)
    model = perceptron().double()
    masks = some_masks(model)
    x, y = digits().training[0][:64].double(), digits().training[1][:64]
    other = copy.deepcopy(model)
    weights = dict(other.named_parameters())
    one = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    two = torch.optim.SGD(weights.values(), 0.1, momentum=0.9)
    with enforce(model, masks):
        for _ in range(30):
            one.zero_grad()
            two.zero_grad()
            F.cross_entropy(model(x), y).backward()
            one.step()
            gated = {n: w * masks[n] if n in masks else w for n, w in weights.items()}
            F.cross_entropy(torch.func.functional_call(other, gated, (x,)), y).backward()
            two.step()
    for name, w in model.named_parameters():
        expected = weights[name] * masks[name] if name in masks else weights[name]
        torch.testing.assert_close(w, expected, rtol=1e-10, atol=1e-12)


def test_masks_leave_the_model_as_it_is() -> None:
    model = perceptron()
    keys, hooks = list(model.state_dict()), [len(m._forward_pre_hooks) for m in model.modules()]
    with enforce(model, some_masks(model)):
        assert list(model.state_dict()) == keys
        assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
        copy.deepcopy(model)(torch.zeros(1, 64))


def test_frozen_weights_stay_at_their_start() -> None:
    torch.manual_seed(0)
    model = perceptron()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = some_masks(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with enforce(model, masks, frozen=start) as held:
        for _ in range(5):
            F.cross_entropy(model(digits().training[0]), digits().training[1]).backward()
            optimizer.step()
        held.check()
    for name, mask in masks.items():
        p = model.get_parameter(name)
        assert torch.equal(p[~mask], start[name][~mask])
        assert not torch.equal(p[mask], start[name][mask])


def test_moved_weights_are_told() -> None:
    model = perceptron()
    with enforce(model, some_masks(model)) as held:
        with torch.no_grad():
            model.get_parameter("1.weight").fill_(1)
        with pytest.raises(RuntimeError, match=r"pruned weights of 1\.weight have moved"):
            held.check()
        held.apply()
        held.check()


def test_masks_of_another_model_are_refused() -> None:
    model = perceptron()
    with pytest.raises(ValueError, match="no such parameter"):
        enforce(model, {"9.weight": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match="of another model"):
        enforce(model, {"1.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="masks are bool"):
        enforce(model, {"1.weight": torch.ones(30, 64)})


def test_prunable_leaves_biases_norms_and_tied_weights() -> None:
    assert prunable(convolutional()) == ["1.weight", "5.weight"]
    tied = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    tied[1].weight = tied[0].weight
    assert prunable(tied) == ["0.weight"]
    assert prunable(nn.Linear(2, 2)) == ["weight"]


# --- the search -------------------------------------------------------------------------------------------------------


def test_survivors_are_reset_and_the_rest_is_zero() -> None:
    starts: list[dict[str, Tensor]] = []

    def note(stage: Stage) -> dict[str, float]:
        starts.append({n: w.detach().clone() for n, w in stage.model.named_parameters()})
        assert (stage.start, stage.stop) == (0, None)
        train(stage)
        return {"level": float(stage.level)}

    ticket = find_ticket(perceptron, note, rounds=3)
    for start, level in zip(starts, ticket.levels, strict=True):
        for name, w in start.items():
            kept = level.masks.get(name, torch.ones_like(w, dtype=torch.bool))
            assert torch.equal(w, torch.where(kept, ticket.start[name], 0.0))
    assert [level.results["level"] for level in ticket.levels] == [0, 1, 2, 3]
    last = ticket.levels[-1]
    zeros = sparsity({n: w for n, w in last.trained.items() if n in last.masks}).overall
    assert zeros.zeros == sum(int((~m).sum()) for m in last.masks.values())


def test_the_largest_weights_survive_each_round() -> None:
    ticket = find_ticket(perceptron, train, rounds=2)
    for before, after in itertools.pairwise(ticket.levels):
        for name, mask in after.masks.items():
            size = before.trained[name].abs()
            assert size[mask].min() >= size[before.masks[name] & ~mask].max()


def test_late_rewinding_starts_from_the_weights_at_that_step() -> None:
    seen: list[tuple[int, int | None]] = []

    def note(stage: Stage) -> dict[str, Any]:
        seen.append((stage.start, stage.stop))
        return train(stage)

    ticket = find_ticket(perceptron, note, rounds=2, rewind=20)
    assert seen == [(0, 20), (20, None), (20, None), (20, None)]
    straight = find_ticket(perceptron, train, rounds=0)
    for name, w in straight.levels[0].trained.items():  # cut at 20 and gone on: SGD's data order is by step
        assert not torch.equal(ticket.start[name], straight.start[name])
        assert ticket.levels[0].trained[name].shape == w.shape


@pytest.mark.parametrize(
    ("after", "steps"),
    [
        ("continue", [(0, True), (0, False), (0, False), (0, True)]),
        ("rewind_learning_rate", [(0, True), (0, False), (0, False)]),
        ("fine_tune", [(0, True), (50, False), (50, False)]),
    ],
)
def test_what_becomes_of_survivors(after: str, steps: list[tuple[int, bool]]) -> None:
    """The step at which each round begins, and whether it begins from the first weights."""
    seen: list[tuple[int, bool]] = []
    drawn: dict[str, Tensor] = {}

    def note(stage: Stage) -> dict[str, Any]:
        weights = {n: w.detach().clone() for n, w in stage.model.named_parameters()}
        drawn.update({} if drawn else weights)
        first = all(
            torch.equal(w, torch.where(stage.masks[n], drawn[n], 0.0)) for n, w in weights.items() if n in stage.masks
        )
        seen.append((stage.start, first))
        return train(stage)

    find_ticket(perceptron, note, rounds=2, after=after, fine_tune_from=50 if after == "fine_tune" else None)
    assert seen == steps


def test_one_shot_prunes_once_as_far_as_all_rounds() -> None:
    ticket = find_ticket(perceptron, train, rounds=5, one_shot=True)
    assert [level.level for level in ticket.levels] == [0, 5]
    assert ticket.levels[-1].percent == pytest.approx(100 * 0.8**5, abs=0.1)


def test_pruned_weights_may_be_held_at_their_start() -> None:
    ticket = find_ticket(perceptron, train, rounds=2, pruned="start")
    for level in ticket.levels:
        for name, mask in level.masks.items():
            assert torch.equal(level.trained[name][~mask], ticket.start[name][~mask])
            assert not torch.equal(level.trained[name][mask], ticket.start[name][mask])
    with pytest.raises(ValueError, match="pruned is 'one'"):
        find_ticket(perceptron, train, pruned="one")


def test_finished_rounds_are_never_trained_again(tmp_path: Path) -> None:
    trained: list[int] = []

    def note(stage: Stage) -> dict[str, Any]:
        trained.append(stage.level)
        return train(stage)

    first = find_ticket(perceptron, note, rounds=2, directory=tmp_path / "a")
    again = find_ticket(perceptron, note, rounds=2, directory=tmp_path / "a")
    more = find_ticket(perceptron, note, rounds=3, directory=tmp_path / "a")
    assert trained == [0, 1, 2, 3]
    whole_search = find_ticket(perceptron, train, rounds=3)
    for one, other in zip(more.levels, whole_search.levels, strict=True):
        assert one.results == other.results
        assert all(torch.equal(w, other.trained[n]) for n, w in one.trained.items())
    assert all(torch.equal(m, again.masks[n]) for n, m in first.masks.items())


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("make", [perceptron, convolutional], ids=["sparse", "dense"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_killed_within_a_round_ends_with_the_same_bits(
    make: Callable[[], nn.Module], optimizer: str, tmp_path: Path
) -> None:
    training = Training(60, 32, optimizer, 0.01, weight_decay=1e-3, evaluate_every=10, validation=200, warm_up=15,
                        milestones=(40,))  # fmt: skip
    undisturbed = find_ticket(make, functools.partial(train, training=training), rounds=1)
    calls = itertools.count(1)

    def pulse(step: int) -> None:
        if next(calls) in (3, 9, 12):  # twice within a round, once at its very end
            raise _Killed

    def fragile(stage: Stage) -> dict[str, Any]:
        return fit(stage, digits(), training, pulse=pulse)

    kills = 0
    while True:
        try:
            found = find_ticket(make, fragile, rounds=1, directory=tmp_path / "killed")
            break
        except _Killed:
            kills += 1
    assert kills == 3
    for one, other in zip(found.levels, undisturbed.levels, strict=True):
        assert one.results == other.results
        assert all(torch.equal(w, other.trained[n]) for n, w in one.trained.items())
    assert not list(tmp_path.rglob("checkpoint*"))


def test_a_directory_of_another_search_is_refused(tmp_path: Path) -> None:
    find_ticket(perceptron, train, rounds=0, directory=tmp_path / "a")
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        find_ticket(perceptron, train, rounds=0, seed=1, directory=tmp_path / "a")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        find_ticket(perceptron, train, rounds=0, directory=tmp_path)


def test_settings_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="after is 'rest'"):
        find_ticket(perceptron, train, after="rest")
    with pytest.raises(ValueError, match="fine_tune_from"):
        find_ticket(perceptron, train, after="fine_tune")
    with pytest.raises(ValueError, match="rewind belongs"):
        find_ticket(perceptron, train, after="continue", rewind=5)
    with pytest.raises(ValueError, match="no score 'size'"):
        Pruning(score="size")


def test_a_search_disturbs_no_random_state() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    find_ticket(perceptron, train, rounds=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("score", ["movement", "random", "snip"])
def test_other_scores_prune(score: str) -> None:
    x, y = digits().training
    data = {"batches": [(x[:100], y[:100])], "loss": F.cross_entropy}
    ticket = find_ticket(perceptron, train, prune=Pruning({"*": 0.5}, "global", score), rounds=1, data=data)
    assert remaining(ticket.masks) == pytest.approx(0.5, abs=1e-3)


def test_a_function_may_score() -> None:
    def first_rows(evidence: Evidence) -> dict[str, Tensor]:
        return {n: torch.arange(m.numel()).view(m.shape).float() for n, m in evidence.masks.items()}

    ticket = find_ticket(perceptron, train, prune=Pruning({"1": 0.5}, score=first_rows), rounds=1)
    assert not ticket.masks["1.weight"][:15].any()
    assert ticket.masks["1.weight"][15:].all()


def test_a_ticket_goes_into_a_model() -> None:
    ticket = find_ticket(perceptron, train, rounds=2)
    model = perceptron()
    ticket.apply(model)
    for name, mask in ticket.masks.items():
        assert torch.equal(model.get_parameter(name), torch.where(mask, ticket.start[name], 0.0))
    assert ticket.at(1).levels[-1].level == 1
    with pytest.raises(ValueError, match="no level 5"):
        ticket.at(5)


# --- controls ---------------------------------------------------------------------------------------------------------


def test_controls_have_the_ticket_sparsity_and_their_own_difference(tmp_path: Path) -> None:
    ticket = find_ticket(perceptron, train, rounds=2)
    seen: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    kinds = iter(
        names := ["random_reinit", "random_mask", "shuffled_mask", "inverted", "shuffled_start",
                  "shuffled_start_same_sign", "random_reinit_same_sign", "signed_constant"]
    )  # fmt: skip

    def note(stage: Stage) -> dict[str, float]:
        seen[next(kinds)] = ({n: w.detach().clone() for n, w in stage.model.named_parameters()}, stage.masks)
        return {"accuracy": 0.5}

    rows = controls(ticket, perceptron, note, kinds=names, directory=tmp_path)
    assert [row["kind"] for row in rows] == names
    again = controls(ticket, perceptron, lambda stage: pytest.fail("trained again"), kinds=names, directory=tmp_path)
    assert again == rows
    for name, mask in ticket.masks.items():
        first, last = ticket.levels[0].trained[name].abs(), ticket.start[name]
        starts = {kind: (weights[name], masks[name]) for kind, (weights, masks) in seen.items()}
        assert all(int(m.sum()) == int(mask.sum()) for _, m in starts.values())
        assert all(not w[~m].any() for w, m in starts.values())
        same_mask = {kind for kind, (_, m) in starts.items() if torch.equal(m, mask)}
        assert same_mask == set(names) - {"random_mask", "shuffled_mask", "inverted"}
        w, m = starts["shuffled_mask"]
        assert torch.equal(w[m], last[m])
        w, m = starts["inverted"]
        assert torch.equal(w[m], last[m])
        assert first[m].max() <= first[~m].min()
        w, _ = starts["shuffled_start"]
        assert torch.equal(w[mask].sort()[0], last[mask].sort()[0])
        assert not torch.equal(w[mask], last[mask])
        for kind in ("shuffled_start_same_sign", "random_reinit_same_sign", "signed_constant"):
            assert torch.equal(starts[kind][0][mask].sign(), last[mask].sign())
        assert starts["signed_constant"][0][mask].abs().unique().numel() == 1
        w, _ = starts["random_reinit"]
        assert not torch.isin(w[mask], last).any()


def test_controls_train_from_the_step_that_their_weights_are_of() -> None:
    ticket = find_ticket(perceptron, train, rounds=1, rewind=20)
    assert ticket.step == ticket.at(0).step == 20
    begun: list[int] = []
    controls(ticket, perceptron, lambda stage: begun.append(stage.start), kinds=["shuffled_mask", "random_reinit"])
    assert begun == [20, 0]


# --- sparse perceptrons -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.05, 1.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("batch", [1, 60, 64, 130])
def test_sparse_perceptrons_equal_masked_torch(density: float, batch: int) -> None:
    """In float64, several networks with masks of their own, ends of blocks included, for Adam and SGD."""
    torch.manual_seed(0)
    x = torch.rand(500, 37).double() * (torch.rand(500, 37) < 0.3)
    y = torch.randint(7, (500,))
    examples = Examples(x, y)
    shape = nn.Sequential(nn.Linear(37, 70), nn.ReLU(), nn.Linear(70, 13), nn.ReLU(), nn.Linear(13, 7)).double()
    for rule, make in (
        (Adam(lr=1e-2), lambda ps: torch.optim.Adam(ps, 1e-2)),
        (Adam(lr=1e-2, weight_decay=0.1), lambda ps: torch.optim.Adam(ps, 1e-2, weight_decay=0.1)),
        (Adam(lr=1e-2, weight_decay=0.1, decoupled=True), lambda ps: torch.optim.AdamW(ps, 1e-2, weight_decay=0.1)),
        (SGD(lr=0.1, momentum=0.9, weight_decay=0.01), lambda ps: torch.optim.SGD(ps, 0.1, 0.9, weight_decay=0.01)),
    ):
        models = [copy.deepcopy(shape) for _ in range(3)]
        for model in models:
            for p in model.parameters():
                nn.init.normal_(p, std=0.3)
        masks = [some_masks(model, share) for model, share in zip(models, (0.0, 0.5, 0.97), strict=True)]
        starts = [{n: p.detach().clone() for n, p in model.named_parameters()} for model in models]
        layers = mlp_layers(shape)
        assert layers is not None
        networks = SparseMLPs(layers, starts, masks, rule, density=density)
        assert networks._dense_first[0] == (density < 1)
        optimizers = [make(list(model.parameters())) for model in models]
        handles = [enforce(model, mask) for model, mask in zip(models, masks, strict=True)]
        for _ in range(15):
            picks = torch.randint(500, (3, batch))
            losses = networks.step(examples, picks).copy()
            for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[picks[i]]), y[picks[i]])
                loss.backward()
                optimizer.step()
                assert losses[i] == pytest.approx(loss.item(), abs=1e-10)
        for handle in handles:
            handle.remove()
        found, accuracy = networks.evaluate(examples)
        for i, model in enumerate(models):
            out = model(x)
            assert found[i] == pytest.approx(F.cross_entropy(out, y).item(), abs=1e-10)
            assert accuracy[i] == pytest.approx((out.argmax(1) == y).double().mean().item())
            for name, w in networks.params(i).items():
                torch.testing.assert_close(w, model.get_parameter(name), rtol=1e-9, atol=1e-11)


def test_networks_other_than_perceptrons_are_told_apart() -> None:
    assert mlp_layers(perceptron()) == [("1.weight", "1.bias"), ("3.weight", "3.bias"), ("5.weight", "5.bias")]
    assert mlp_layers(NETWORKS["lenet_300_100"]()) is not None
    for other in (
        convolutional(),
        nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        nn.Sequential(nn.Linear(2, 2, bias=False)),
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        nn.Linear(2, 2),
    ):
        assert mlp_layers(other) is None


@pytest.fixture
def dense_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_module, "mlp_layers", lambda model: None)


def test_both_ways_of_training_agree(dense_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = find_ticket(perceptron, train, rounds=1)
    monkeypatch.undo()
    sparse = find_ticket(perceptron, train, rounds=1)
    for one, other in zip(dense.levels, sparse.levels, strict=True):
        assert one.results["validation_loss"] == pytest.approx(other.results["validation_loss"], rel=1e-4)
        assert one.results["early_stop"] == other.results["early_stop"]


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_early_stop_is_the_smallest_validation_loss() -> None:
    found = find_ticket(perceptron, train, rounds=0).levels[0].results
    losses = found["validation_loss"]
    assert len(losses) == 6
    assert found["early_stop"] == 10 * (1 + losses.index(min(losses)))
    assert found["accuracy"] > 0.4  # ten classes


def test_the_training_and_validation_sets_share_nothing() -> None:
    numbers = torch.arange(100.0)[:, None]
    split = Data(numbers, torch.zeros(100, dtype=torch.int64), (numbers, numbers)).split(30, 3)
    assert len(split.validation[0]) == 30
    assert sorted(torch.cat((split.training[0], split.validation[0])).flatten().tolist()) == list(range(100))
    with pytest.raises(ValueError, match="validation is 100"):
        Data(numbers, torch.zeros(100), (numbers, numbers)).split(100, 0)


def test_an_epoch_visits_everything_once() -> None:
    order = Order(3, 10, 4)
    seen = torch.cat([order.batch(step) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert torch.equal(Order(3, 10, 4).batch(3), order.batch(3))
    assert Order(3, 3, 8).batch(0).tolist().count(0) in (2, 3)


def test_the_step_size_follows_warm_up_and_milestones() -> None:
    training = Training(100, 1, "sgd", 0.4, warm_up=10, milestones=(50, 80))
    assert [training.lr_at(step) for step in (0, 4, 9, 10, 49, 50, 80)] == pytest.approx(
        [0.04, 0.2, 0.4, 0.4, 0.4, 0.04, 0.004]
    )


def test_flips_and_crops_move_whole_pictures() -> None:
    from perennial.tickets.training import flip_and_crop

    torch.manual_seed(0)
    x = torch.rand(200, 3, 12, 12)
    moved = flip_and_crop(x, torch.Generator().manual_seed(0))
    for before, after in zip(x, moved, strict=True):
        wide = [F.pad(picture, (4, 4, 4, 4)) for picture in (before, before.flip(2))]
        options = [w[:, i : i + 12, j : j + 12] for w in wide for i in range(9) for j in range(9)]
        assert any(torch.equal(after, option) for option in options)
    same = sum(torch.equal(a, b) for a, b in zip(x, moved, strict=True))
    assert same < 20


@pytest.mark.parametrize("name", list(NETWORKS))
def test_networks_of_the_paper(name: str) -> None:
    model = NETWORKS[name]()
    x = torch.zeros(2, 784) if name == "lenet_300_100" else torch.zeros(2, 3, 32, 32)
    assert model(x).shape == (2, 10)
    count = sum(model.get_parameter(n).numel() for n in prunable(model))
    assert (
        count
        == {
            "lenet_300_100": 266_200,
            "conv_2": 4_300_992,
            "conv_4": 2_425_024,
            "conv_6": 2_261_184,
            "resnet_20": 270_896,
            "vgg_19": 20_024_000,
        }[name]
    )


def test_a_ticket_is_found_that_beats_its_controls(tmp_path: Path) -> None:
    """On the embedded digits, three seeds: at 13% of the weights the ticket is better than both, in the mean."""
    training = Training(400, 32, "adam", 2e-3, evaluate_every=20, validation=200)
    gaps = []
    for seed in range(3):
        use = functools.partial(train, training=training)
        ticket: Ticket = find_ticket(perceptron, use, rounds=9, seed=seed)
        rows = controls(ticket, perceptron, use, kinds=("random_reinit", "random_mask"), seed=seed)
        mine = ticket.levels[-1].results["early_accuracy"]
        gaps.append([mine - float(row["early_accuracy"]) for row in rows])
        assert mine > ticket.levels[0].results["early_accuracy"] - 0.05
    assert all(sum(gap) / 3 > 0 for gap in zip(*gaps, strict=True))
