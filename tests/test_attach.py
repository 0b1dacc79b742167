"""What must hold of every intervention on a user's own model and optimizer: one table, made of the registry."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
import runpy
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from references import SIZES, Case, Table, cases, lane, populate
from torch import Tensor, nn

import perennial
from perennial import MLP, ContinualBackprop
from perennial.attach import Keeper, attach
from perennial.attach.keeper import KEY
from perennial.attach.shown import grouped
from perennial.methods import HareAndTortoise, Intervention, ReDo, ReGraMa, Regulariser, SelfNormalizedResets
from perennial.methods.replace import ReplacesUnits
from perennial.units import UnitMap, trace

AT_A_TASK = [
    Case(ReDo, "at a task", {"threshold": 0.9, "every": None, "rule": ("adam", {"lr": 0.01})}),
    Case(ReGraMa, "at a task", {"threshold": 0.9, "every": None}),
    Case(HareAndTortoise, "at a task", {"decay": 0.9, "every": None}),
]
CASES = [*(case for case in cases() if issubclass(case.method, Intervention)), *AT_A_TASK]
METHODS = list({c.method: c for c in CASES}.values())
"""A case of every method."""
KEEPS_MOST = [case for case in METHODS if case.method is ContinualBackprop]
"""The one with most to save."""
every_method = pytest.mark.parametrize("case", METHODS, ids=lambda c: c.method.name)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.001),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.001),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.001),
}


def crossed(cases: list[Case], optimizers: list[str], with_all: list[Case], always: list[str]) -> Any:
    """Every case with every optimizer; slow but for some cases with all of the optimizers, and one of every method with
    some."""
    rows = []
    for case in cases:
        for name in optimizers:
            quick = case in with_all or (case in METHODS and name in always)
            rows.append(pytest.param(case, name, id=f"{case}-{name}", marks=() if quick else pytest.mark.slow))
    return pytest.mark.parametrize(("case", "optimizer_name"), rows)


def conv_net(seed: int = 0) -> nn.Module:
    """Convolutions with batch norm, a grouped reader, a flatten, a layer norm: every kind of slice."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32, 10), nn.LayerNorm(10), nn.GELU(), nn.Linear(10, 4),
    )  # fmt: skip


def images(step: int, batch: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(batch, 3, 8, 8, generator=generator)
    return x, torch.randint(0, 4, (batch,), generator=generator)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, keeper: Keeper | None = None, task: int = 10
) -> None:
    """A plain loop; a new task every ``task`` steps."""
    for step in steps:
        x, y = images(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        if keeper is not None and isinstance(keeper.method, Regulariser) and keeper.method.coupled:
            loss = loss + keeper.penalty()
        loss.backward()
        optimizer.step()
        if keeper is not None and (step + 1) % task == 0:
            keeper.new_task()


def equal(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def keep(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, **changes: Any) -> Keeper:
    (method,) = case.made(**changes)[1]
    x, y = images(0)
    loss = (lambda: nn.functional.cross_entropy(model(x), y)) if "loss" in method.needs else None
    # No unit of layer 0 can be split: a grouped convolution reads it.
    layers = "7" if getattr(method, "reinitialise", "") == "split" else "*"
    return attach(method, model, optimizer, example=x, loss=loss, check=False, layers=layers)


# --- the same mathematics as the population's ------------------------------------------------------------------------

TORCH = {
    "sgd": lambda p, lr, momentum=None, weight_decay=0.0: torch.optim.SGD(
        p, lr=lr, momentum=momentum or 0.0, weight_decay=weight_decay
    ),
    "adam": lambda p, lr, beta1=0.9, beta2=0.999, eps=1e-8: torch.optim.Adam(p, lr=lr, betas=(beta1, beta2), eps=eps),
}


def _of_torch() -> list[Any]:
    """Every case whose rule torch has, and for how many steps; slow but for one of each method, and two behind Adam,
    across one change of task."""
    cases = [(c, c.settings.get("rule", ("sgd",))[0]) for c in CASES]
    behind_adam = [c for c, rule in cases if rule == "adam" and c.method in (ContinualBackprop, perennial.L2Init)]
    quick = [*METHODS, *behind_adam]
    known = [c for c, rule in cases if rule in TORCH]
    return [pytest.param(c, 60, id=f"{c}-60") for c in known if c in quick] + [
        pytest.param(c, 110, id=f"{c}-110", marks=pytest.mark.slow) for c in known
    ]


@pytest.mark.parametrize(("case", "steps"), _of_torch())
def test_attached_equals_the_population(case: Case, steps: int) -> None:
    """Same seed, same data: the hook on torch's optimizer and the lane give the same weights, replace the same units at
    the same steps, and Adam's state of fresh units is the same."""
    stream, seed = Table(batch=3), 3
    population = populate([case.lane(seed=seed)], stream)
    start = lane(population, 0).params

    def factory() -> nn.Module:
        return MLP(hidden=SIZES[1:-1]).build(SIZES[0], SIZES[-1])

    model = factory().double()
    model.load_state_dict(start)
    name, numbers = case.settings.get("rule", ("sgd", {"lr": 0.02}))
    optimizer = TORCH[name](model.parameters(), **numbers)
    x, y = (torch.tensor(t, dtype=torch.float64) for t in stream.rows(seed))
    now = 0

    def loss() -> Tensor:
        return ((model(x[now]) - y[now]) ** 2).sum(-1).mean()

    (method,) = case.made()[1]
    keeper = attach(
        method, model, optimizer, example=x[0], factory=factory, seed=seed, check=False,
        loss=loss if "loss" in method.needs else None,
    )  # fmt: skip
    for step in range(steps):
        now = step
        optimizer.zero_grad()
        objective = loss()
        if isinstance(method, Regulariser) and method.coupled:
            objective = objective + keeper.penalty()
        objective.backward()
        optimizer.step()
        if (step + 1) % stream.task_length() == 0:
            keeper.new_task()
        population.advance(1)
        if step % 10 == 9:
            for key, w in model.named_parameters():
                torch.testing.assert_close(
                    w.detach(), population.state.params[key][..., 0], rtol=1e-7, atol=1e-10,
                    msg=lambda m, k=key: f"{k} {m}",
                )  # fmt: skip
    assert sum(keeper.replaced().values()) == int(population.state.replaced)
    before = {name: w.clone() for name, w in start.items()}
    assert any(not torch.equal(w, before[key]) for key, w in model.named_parameters())


# --- does nothing at rate 0, and nothing once removed ---------------------------------------------------------------


@crossed(METHODS, list(OPTIMIZERS), KEEPS_MOST, ["adam"])
def test_off_is_bit_identical_to_not_attached(case: Case, optimizer_name: str) -> None:
    ours, bare = conv_net(), conv_net()
    mine, theirs = (OPTIMIZERS[optimizer_name](m.parameters()) for m in (ours, bare))
    keeper = keep(case, ours, mine, **case.method.OFF)
    rng = torch.get_rng_state()
    train(ours, mine, range(25), keeper)
    assert torch.equal(rng, torch.get_rng_state())
    train(bare, theirs, range(25))
    assert equal(ours, bare)


@every_method
def test_remove_takes_everything_away(case: Case) -> None:
    model, other = conv_net(), conv_net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    hooks = _hooks(model, optimizer)
    identities = [id(p) for p in model.parameters()]
    keeper = keep(case, model, optimizer)
    train(model, optimizer, range(12), keeper)
    keeper.remove()
    keeper.remove()  # twice does no harm
    assert _hooks(model, optimizer) == hooks
    assert [id(p) for p in model.parameters()] == identities
    assert KEY not in optimizer.state_dict()
    other.load_state_dict(model.state_dict())
    theirs = OPTIMIZERS["adam"](other.parameters())
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(12, 20))
    train(other, theirs, range(12, 20))
    assert equal(model, other)


def _hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    found = []
    for module in model.modules():
        found += [len(v) for k, v in vars(module).items() if "hooks" in k and v is not None]
    return found + [len(v) for k, v in vars(optimizer).items() if "hooks" in k]


# --- resumes bit for bit --------------------------------------------------------------------------------------------


@crossed(CASES, ["momentum", "adam", "adamw amsgrad"], KEEPS_MOST, ["adam"])
def test_resumes_bit_for_bit_in_the_middle_of_maturity(case: Case, optimizer_name: str) -> None:
    make = OPTIMIZERS[optimizer_name]
    whole = conv_net()
    optimizer = make(whole.parameters())
    keeper = keep(case, whole, optimizer)
    train(whole, optimizer, range(17), keeper)
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(whole, optimizer, range(17, 31), keeper)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = conv_net(seed=1)
    theirs = make(second.parameters())
    again = keep(case, second, theirs)
    second.load_state_dict(saved["model"])
    theirs.load_state_dict(saved["optimizer"])
    assert again.steps == 17
    train(second, theirs, range(17, 31), again)
    assert equal(whole, second)
    left, right = (torch.utils._pytree.tree_leaves(k.state) for k in (keeper, again))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(left, right, strict=True))


def test_loading_is_refused_before_anything_changes() -> None:
    model = conv_net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    attach(ContinualBackprop(1e-3), model, optimizer, example=images(0)[0], check=False)
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.ReLU(), nn.Linear(9, 4))
    theirs = OPTIMIZERS["adam"](other.parameters())
    attach(ContinualBackprop(1e-3), other, theirs, example=images(0)[0], check=False)
    with pytest.raises(ValueError, match="another network"):
        theirs.load_state_dict(saved)
    with pytest.warns(UserWarning, match="holds nothing of continual_backprop"):
        theirs.load_state_dict(OPTIMIZERS["adam"](other.parameters()).state_dict())


def test_counts_stay_whole_numbers_with_half_precision_parameters() -> None:
    """torch casts loaded state to the parameter's dtype; in bfloat16 an age of 300 plus 1 is 300."""
    model = conv_net().to(torch.bfloat16)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    x = images(0)[0].bfloat16()
    keeper = attach(ContinualBackprop(1e-3), model, optimizer, example=x, check=False)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    for _ in range(2):
        optimizer.load_state_dict(optimizer.state_dict())
    for age in keeper.state.age.values():
        assert age.dtype == torch.int32
        assert (age == 3).all()
    assert all(u.dtype == torch.float32 for u in keeper.state.utility.values())


def test_two_methods_on_one_optimizer_keep_their_states_apart() -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, list[Keeper]]:
        model = conv_net()
        optimizer = OPTIMIZERS["adam"](model.parameters())
        x = images(0)[0]
        methods = [ContinualBackprop(0.02, 3), perennial.ShrinkAndPerturb(1e-3, 1e-4), ContinualBackprop(0.01, 2)]
        return model, optimizer, [attach(m, model, optimizer, example=x, check=False) for m in methods]

    model, optimizer, _ = make()
    train(model, optimizer, range(9))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    assert {"continual_backprop", "continual_backprop 2", "shrink_and_perturb", "counts"} == saved["perennial"].keys()
    train(model, optimizer, range(9, 15))
    other, theirs, _ = make()
    other.load_state_dict(weights)
    theirs.load_state_dict(saved)
    train(other, theirs, range(9, 15))
    assert equal(model, other)


# --- the moment of a reset ------------------------------------------------------------------------------------------

OFTEN = {"replacement_rate": 0.3, "maturity_threshold": 2, "utility_decay": 0.5}


@pytest.mark.parametrize(("make_optimizer", "layers"), [
    pytest.param(make, layers, id=f"{name}-{layers}", marks=() if quick else pytest.mark.slow)
    for name, make in OPTIMIZERS.items()
    for layers in ("0", "3", "7")
    for quick in [layers == "0" or name == "adamw amsgrad"]  # layer 0 has a norm and is read by groups
])  # fmt: skip
def test_everything_of_a_replaced_unit_is_fresh(make_optimizer: Any, layers: str) -> None:
    """Weights, bias, norm, running statistics; every optimizer tensor of the parameter's shape, on the right axis."""
    model = conv_net()
    optimizer = make_optimizer(model.parameters())
    keeper = attach(ContinualBackprop(**OFTEN), model, optimizer, example=images(0)[0], layers=layers, check=False)
    names, seen = dict(model.named_parameters()), 0
    buffers = dict(model.named_buffers())
    (layer,) = keeper.units
    for step in range(12):
        train(model, optimizer, range(step, step + 1))
        gone = keeper.state.replaced[layer.name]
        seen += int(gone.sum())
        for part in (*layer.incoming, *layer.norms, *layer.outgoing):
            tensor = names[part.parameter] if part.parameter in names else buffers[part.parameter]
            mine = part.gather(tensor.detach())[gone]
            if part in layer.outgoing:
                assert (mine == 0).all()
            if part in layer.norms:
                one = part.parameter.endswith(("weight", "running_var"))
                assert (mine == (1 if one else 0)).all(), part.parameter
            if part.parameter in names:
                for key, value in optimizer.state[tensor].items():
                    if isinstance(value, Tensor) and value.shape == tensor.shape:
                        assert (part.gather(value)[gone] == 0).all(), (part.parameter, key)
                        assert (value != 0).any(), (part.parameter, key)
    assert seen > 3
    assert seen == sum(keeper.replaced().values())


def test_the_output_loses_the_removed_units_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(20, 6)
    keeper = attach(ContinualBackprop(0.2, 0), model, optimizer, example=x)
    for _ in range(4):
        before, h, w = model(x).detach(), model[1](model[0](x)).detach(), model[2].weight.detach().clone()
        model(x).sum().backward()
        optimizer.step()
        gone = keeper.state.replaced["0"]
        assert gone.any()
        torch.testing.assert_close(model(x).detach(), before - h[:, gone] @ w[:, gone].T)


@pytest.mark.parametrize("grouped", [False, True])
def test_bias_transfer_preserves_the_mean_output_of_the_batch(grouped: bool) -> None:
    """Exactly, for the batch that the mean is of, with a reader of pooled convolutional features."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, groups=2 if grouped else 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(12, 3, 5, 5, dtype=torch.float64)
    keeper = attach(ContinualBackprop(0.3, 0, utility_decay=0.0, bias_transfer=True), model, optimizer, example=x)
    # Where the reader's window meets every position, the mean over positions is the mean that it sees.
    for _ in range(4):
        model(x).sum().backward()
        h = model[:2](x).detach()
        w = model[2].weight.detach().clone()
        b = model[2].bias.detach().clone()
        optimizer.step()
        gone = keeper.state.replaced["0"]
        assert gone.any()
        mean = h.mean((0, 2, 3)) * gone
        if not grouped:
            torch.testing.assert_close(model[2].bias.detach(), b + (w * mean[:, None, None]).sum((1, 2, 3)))
        else:
            per = torch.stack(
                [(w[row] * mean[(row // 2) * 4 : (row // 2) * 4 + 4, None, None]).sum() for row in range(4)]
            )
            torch.testing.assert_close(model[2].bias.detach(), b + per)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_first_updates_of_a_fresh_unit_are_those_of_a_fresh_adam(amsgrad: bool) -> None:
    """Not three times too large (moments cleared, old count), not a thousandth (moments kept): for as long as it
    matters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=amsgrad)
    x = torch.randn(30, 6, dtype=torch.float64)

    def backward() -> None:
        optimizer.zero_grad()
        model(x).pow(2).sum().backward()

    for _ in range(400):  # an old count
        backward()
        optimizer.step()
    keeper = attach(ContinualBackprop(0.25, 0), model, optimizer, example=x)
    backward()
    optimizer.step()
    (unit,) = keeper.state.replaced["0"].nonzero()[:, 0].tolist()
    keeper.method = ReDo(every=0)  # no more replacements; the count of the fresh unit goes on
    keeper.state = keeper.method.init(keeper._params, keeper.units)
    row = model[0].weight.detach()[unit].clone()
    column = model[2].weight.detach()[:, unit].clone()
    means = [torch.zeros_like(row), torch.zeros_like(column)]
    squares = [torch.zeros_like(row), torch.zeros_like(column)]
    peaks = [torch.zeros_like(row), torch.zeros_like(column)]
    for time in range(1, 60):
        backward()
        grads = [model[0].weight.grad[unit].clone(), model[2].weight.grad[:, unit].clone()]
        optimizer.step()
        for number, (w, g) in enumerate(zip((row, column), grads, strict=True)):
            means[number] = 0.9 * means[number] + 0.1 * g
            squares[number] = 0.999 * squares[number] + 0.001 * g * g
            peaks[number] = torch.maximum(peaks[number], squares[number]) if amsgrad else squares[number]
            w -= 0.01 * (means[number] / (1 - 0.9**time)) / ((peaks[number] / (1 - 0.999**time)).sqrt() + 1e-8)
        torch.testing.assert_close(model[0].weight.detach()[unit], row, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(model[2].weight.detach()[:, unit], column, rtol=1e-9, atol=1e-12)


# --- gradient accumulation, scalers, schedules ------------------------------------------------------------------------


def test_gradient_accumulation_counts_optimizer_steps() -> None:
    model = conv_net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    keeper = attach(ContinualBackprop(1e-3), model, optimizer, example=images(0)[0], check=False)
    for step in range(12):
        x, y = images(step)
        nn.functional.cross_entropy(model(x), y).backward()
        if step % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    assert keeper.steps == 3
    assert all((age == 3).all() for age in keeper.state.age.values())


def test_a_step_that_a_grad_scaler_skips_does_not_count() -> None:
    model = conv_net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    keeper = attach(ContinualBackprop(**OFTEN), model, optimizer, example=images(0)[0], check=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(8):
        x, y = images(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if step % 2:
            model[0].weight.grad[0] = math.inf
        weights = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if step % 2:
            assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert keeper.steps == 4


@pytest.mark.parametrize("fused", [False, True])
def test_learning_rate_schedules_reach_the_fresh_units(fused: bool) -> None:
    model = conv_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01) if not fused else 0.01, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 5 else 0.0)
    keeper = attach(ContinualBackprop(**OFTEN), model, optimizer, example=images(0)[0], check=False)
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        schedule.step()
    keeper.method = ReDo(every=0)
    keeper.state = keeper.method.init(keeper._params, keeper.units)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_evaluation_is_not_looked_at() -> None:
    model = conv_net()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    keeper = attach(SelfNormalizedResets(), model, optimizer, example=images(0)[0], check=False)
    train(model, optimizer, range(1))
    seen = {name: h.clone() for name, h in keeper._seen.items()}
    with torch.no_grad():
        model(images(7)[0])
    assert all(torch.equal(h, seen[name]) for name, h in keeper._seen.items())


def test_nothing_grows_with_time() -> None:
    model = conv_net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    keeper = attach(ContinualBackprop(**OFTEN), model, optimizer, example=images(0)[0], check=False)

    def held() -> int:
        tensors = torch.utils._pytree.tree_leaves((keeper.state, keeper._seen, keeper._slopes, optimizer.state_dict()))
        return sum(t.numel() for t in tensors if isinstance(t, Tensor))

    train(model, optimizer, range(12))
    first = held()
    train(model, optimizer, range(12, 40))
    assert held() == first


# --- copies ---------------------------------------------------------------------------------------------------------


def test_copies_and_pickles_of_the_model_are_plain_models() -> None:
    model = conv_net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    keeper = attach(ContinualBackprop(**OFTEN), model, optimizer, example=images(0)[0], check=False)
    train(model, optimizer, range(3))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        seen = {name: h.clone() for name, h in keeper._seen.items()}
        theirs = OPTIMIZERS["adam"](other.parameters())
        train(other, theirs, range(3, 6))
        assert all(torch.equal(h, seen[name]) for name, h in keeper._seen.items())
        copied = copy.deepcopy(optimizer)
        copied.step()  # a copy of the optimizer has no hooks
        assert keeper.steps == 3
    train(model, optimizer, range(3, 6))
    assert keeper.steps == 6


# --- what is kept and what is refused ---------------------------------------------------------------------------------


def test_says_what_is_kept_and_what_is_not() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    keeper = attach(ContinualBackprop(1e-3), model, optimizer, example=torch.randn(2, 5, 16))
    text = " ".join(repr(keeper).split())
    assert [layer.name for layer in keeper.units] == ["linear1"]
    for part in ("linear1", "32 units", "self_attn[0:32]", "queries and keys", "self_attn[32:48]", "no hook sees"):
        assert part in text, text


@pytest.mark.parametrize("method", [ContinualBackprop(**OFTEN), ReDo(threshold=0.5, every=3)], ids=["cbp", "redo"])
def test_looking_at_the_activations_changes_no_decision(method: Any) -> None:
    """Behind rectifiers a score is summed the faster way; the same units are replaced, with the same weights."""
    models = [conv_net(), conv_net()]
    optimizers = [OPTIMIZERS["adam"](m.parameters()) for m in models]
    keepers = [attach(method, m, o, example=images(0)[0], check=False) for m, o in zip(models, optimizers, strict=True)]
    context = keepers[1]._context
    keepers[1]._context = lambda *seen: context(*seen)._replace(look=False)  # type: ignore[method-assign]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(20))
    assert equal(*models)
    assert keepers[0].replaced() == keepers[1].replaced()
    assert sum(keepers[0].replaced().values()) > 5


@pytest.mark.parametrize("case", AT_A_TASK, ids=str)
def test_events_at_a_task_happen_then_and_only_then(case: Case) -> None:
    model = conv_net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    keeper = keep(case, model, optimizer)

    def moved(change: Callable[[], None]) -> bool:
        before = copy.deepcopy(model)
        change()
        return not equal(before, model)

    def train_bare() -> None:
        bare = copy.deepcopy(model)
        theirs = OPTIMIZERS["adam"](bare.parameters())
        theirs.load_state_dict({k: v for k, v in optimizer.state_dict().items() if k != KEY})
        train(model, optimizer, range(6))
        train(bare, theirs, range(6))
        assert equal(bare, model)

    assert not moved(keeper.new_task), "nothing was seen yet"
    assert moved(train_bare)
    assert moved(keeper.new_task)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert (sum(keeper.replaced().values()) > 0) == issubclass(case.method, ReDo)
    assert not moved(keeper.new_task), "nothing new was seen"
    made = case.made(every=5)[1][0]
    assert not made.due(4, True)
    assert made.due(5, False)
    with pytest.raises(TypeError, match="every is 'task'"):
        case.made(every="task")


def test_dead_units_are_kept_since_nothing_speaks_against_them() -> None:
    """They show no effect on the example; to bring them back is what the methods are for."""
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
    optimizer = OPTIMIZERS["adam"](model.parameters())
    keeper = attach(ReDo(every=1), model, optimizer, example=torch.zeros(4, 6))
    assert "no effect" in repr(keeper)
    model(torch.zeros(4, 6)).sum().backward()
    optimizer.step()
    assert keeper.replaced() == {"0": 8}


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_model_compiled_in_place_is_traced_as_it_is(fullgraph: bool) -> None:
    model = conv_net()
    model.compile(fullgraph=fullgraph, backend="eager")
    keeper = attach(ContinualBackprop(1e-3), model, OPTIMIZERS["adam"](model.parameters()), example=images(0)[0])
    assert [layer.name for layer in keeper.units] == ["0", "3", "7"]


def test_frozen_layers_are_left_alone_with_a_reason() -> None:
    model = conv_net()
    model[7].weight.requires_grad_(False)
    optimizer = OPTIMIZERS["adam"]([p for p in model.parameters() if p.requires_grad])
    keeper = attach(ContinualBackprop(1e-3), model, optimizer, example=images(0)[0], check=False)
    assert [layer.name for layer in keeper.units] == ["0"]
    assert "frozen" in dict(keeper.units.refused)["7"]
    assert "7" in {layer.name for layer in trace(model, images(0)[0])}, "the map lists it all the same"


def test_layers_are_chosen_by_name() -> None:
    model = conv_net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    keeper = attach(ContinualBackprop(1e-3), model, optimizer, example=images(0)[0], layers="7", check=False)
    assert [layer.name for layer in keeper.units] == ["7"]
    keeper.remove()
    with pytest.raises(ValueError, match="matches no layer"):
        attach(ContinualBackprop(1e-3), model, optimizer, example=images(0)[0], layers="decoder.*")


def test_a_wrong_map_is_not_believed() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = OPTIMIZERS["adam"](model.parameters())
    wrong = UnitMap.by_name(model, [{"incoming": ["0"], "outgoing": ["4"]}])
    with pytest.raises(ValueError, match="not proved"):
        attach(ContinualBackprop(1e-3), model, optimizer, example=torch.rand(3, 6), units=wrong)


@pytest.mark.parametrize(("call", "error", "word"), [
    (lambda m, o: attach(perennial.Adam(), m, o), TypeError, "not an intervention"),
    (lambda m, o: attach(ContinualBackprop(), "model", o), TypeError, "torch.nn.Module"),
    (lambda m, o: attach(ContinualBackprop(), m, m), TypeError, "torch.optim.Optimizer"),
    (lambda m, o: attach(ContinualBackprop(), m, o), ValueError, "example="),
    (lambda m, o: attach(ContinualBackprop(utility="exact"), m, o, example=images(0)[0]), ValueError, "loss="),
    (lambda m, o: attach(ContinualBackprop(), copy.deepcopy(m), o, example=images(0)[0]), ValueError, "another model"),
    (lambda m, o: attach(ContinualBackprop(), m[7], o, example=torch.rand(2, 32)), ValueError, "no hidden units"),
    (lambda m, o: attach(perennial.ShrinkAndPerturb(), m, o).penalty(), ValueError, "coupled=True"),
], ids=["rule", "no module", "no optimizer", "no example", "no loss", "another", "no units", "no penalty"])  # fmt: skip
def test_bad_input_is_refused_in_words(call: Any, error: type[Exception], word: str) -> None:
    model = conv_net()
    with pytest.raises(error, match=word):
        call(model, OPTIMIZERS["adam"](model.parameters()))


@pytest.mark.parametrize(("call", "error", "word"), [
    (lambda m, o, x: attach(ContinualBackprop, m, o, example=x), TypeError, r"pass an instance: ContinualBackprop\(\)"),
    (lambda m, o, x: attach("redo", m, o, example=x), TypeError, "pass an instance"),
    (lambda m, o, x: attach([ReDo(), ReDo()], m, o, example=x), TypeError, "one call each"),
    (lambda m, o, x: attach(m, o, ReDo(), example=x), TypeError, r"the order is attach\(method, model, optimizer\)"),
    (lambda m, o, x: attach(ReDo(), m, torch.optim.lr_scheduler.StepLR(o, 9)), TypeError, "scheduler: pass the opt"),
    (lambda m, o, x: attach(ReDo(), m, o, example=x, factory=conv_net()), TypeError, "factory= is a Sequential"),
    (lambda m, o, x: attach(ReDo(), m, o, example=x, factory=lambda: None), TypeError, "returned a NoneType"),
    (
        lambda m, o, x: attach(ReDo(), m, o, example=x, factory=lambda: conv_net()[:7]),
        ValueError, r"it has no 7.weight; it has no 7.bias; it has no 8.weight; and 3 more",
    ),
    (
        lambda m, o, x: attach(ReDo(), m, o, factory=lambda: nn.Sequential(*m[:10], nn.Linear(10, 5)), example=x),
        ValueError, r"its 10.weight is \[5, 10\], the model's \[4, 10\]",
    ),
], ids=["class", "name", "list", "order", "scheduler", "model", "nothing", "fewer", "shape"])  # fmt: skip
def test_mistakes_are_answered_with_what_to_pass(call: Any, error: type[Exception], word: str) -> None:
    model = conv_net()
    with pytest.raises(error, match=word):
        call(model, OPTIMIZERS["adam"](model.parameters()), images(0)[0])


def test_an_example_that_does_not_fit_is_named() -> None:
    model = conv_net()
    with pytest.raises(RuntimeError) as caught:
        attach(ReDo(), model, OPTIMIZERS["adam"](model.parameters()), example=torch.randn(2, 4, 8, 8))
    assert "running the model once on example=float32 tensor [2, 4, 8, 8] on cpu" in caught.value.__notes__[0]
    words = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(RuntimeError) as caught:
        attach(ReDo(), words, OPTIMIZERS["adam"](words.parameters()), example={"input": torch.randn(2, 5)})
    assert "{input: float32 tensor [2, 5] on cpu}" in caught.value.__notes__[0]
    assert "embedding, which reads whole numbers" in caught.value.__notes__[1]


def test_the_same_method_twice_is_refused() -> None:
    """As where a cell of a notebook is run again."""
    model, x = conv_net(), images(0)[0]
    optimizer = OPTIMIZERS["adam"](model.parameters())
    keeper = attach(ReDo(), model, optimizer, example=x, layers="7", check=False)
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        attach(ReDo(), model, optimizer, example=x, check=False, seed=1)
    others = [
        attach(ReDo(), model, optimizer, example=x, layers="[03]", check=False),
        attach(ReDo(threshold=0.5), model, optimizer, example=x, check=False),
        attach(perennial.L2Init(), model, optimizer),
    ]
    with pytest.raises(ValueError, match="attached to this optimizer already"):
        attach(perennial.L2Init(), model, optimizer)
    for one in (keeper, *others):
        one.remove()
    attach(ReDo(), model, optimizer, example=x, check=False)


def test_a_penalty_that_nobody_asks_for_is_warned_of() -> None:
    model = conv_net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    attach(perennial.L2Init(coupled=True), model, optimizer)
    train(model, optimizer, range(9))
    with pytest.warns(UserWarning, match=r"keeper.penalty\(\) was not called in ten steps"):
        train(model, optimizer, range(9, 10))
    train(model, optimizer, range(10, 25))  # once is enough


def test_random_numbers_of_every_global_generator_are_drawn_again_and_put_back() -> None:
    class Noisy(nn.Module):
        def __init__(self, draw: Callable[[], float]) -> None:
            super().__init__()
            self.draw, self.layers = draw, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) * (1 + self.draw())

    x, own = torch.rand(4, 6), torch.Generator()
    for draw in (random.random, numpy.random.rand, lambda: float(torch.rand(()))):
        model = Noisy(draw)
        before = random.getstate(), numpy.random.get_state()[1:3], torch.get_rng_state()
        keeper = attach(ReDo(), model, OPTIMIZERS["adam"](model.parameters()), example=x)
        assert [layer.name for layer in keeper.units] == ["layers.0"]
        after = random.getstate(), numpy.random.get_state()[1:3], torch.get_rng_state()
        assert before[0] == after[0]
        assert (before[1][0] == after[1][0]).all()
        assert before[1][1] == after[1][1]
        assert torch.equal(before[2], after[2])
    model = Noisy(lambda: float(torch.rand((), generator=own)))
    with pytest.raises(ValueError, match=r"random in a way that cannot be repeated; attach with model.eval\(\)"):
        attach(ReDo(), model, OPTIMIZERS["adam"](model.parameters()), example=x)


def test_shows_what_waits_and_what_is_gone() -> None:
    model = conv_net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    keeper = attach(ReDo(every=None), model, optimizer, example=images(0)[0], check=False)
    assert "tell it by keeper.new_task(), which was not called yet" in repr(keeper)
    keeper.new_task()
    assert "keeper.new_task(), called 1 times so far" in repr(keeper)
    assert "new_task" not in repr(attach(ReDo(), model, optimizer, example=images(0)[0], check=False))
    assert "removed" not in repr(keeper)
    keeper.remove()
    assert "removed: it does nothing any more" in repr(keeper)


def test_names_are_shown_in_groups_and_lines_are_short() -> None:
    names = [f"h.{layer}.attention.{part}" for layer in range(12) for part in "qk"]
    assert grouped([*names, "head", "0", "1"]) == ["h.*.attention.q (12)", "h.*.attention.k (12)", "head", "0", "1"]
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 3, enable_nested_tensor=False)
    keeper = attach(ReDo(), model, OPTIMIZERS["adam"](model.parameters()), example=torch.randn(5, 2, 16))
    text = repr(keeper)
    assert "layers.*.linear2 (3)" in " ".join(text.split())
    assert all(len(line) <= 100 for line in text.partition("leaves alone")[2].splitlines())


@pytest.mark.parametrize("case", [c for c in METHODS if not issubclass(c.method, ReplacesUnits)], ids=str)
def test_what_a_method_says_that_it_acts_on_is_what_changes(case: Case) -> None:
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    keeper = keep(case, model, optimizer)
    said = set(keeper.method.acts_on(keeper._params, keeper.units))
    assert ("acts on all parameters" in repr(keeper)) == (len(said) == len(keeper._params))
    written: set[str] = set()
    write = keeper._write
    keeper._write = lambda changed: (written.update(changed), write(changed))  # type: ignore[method-assign, assignment, func-returns-value]
    train(model, optimizer, range(12), keeper)
    if not (isinstance(keeper.method, Regulariser)):
        assert written == said, (written, said)
    else:
        assert written in (set(), set(keeper._params))
        assert said <= set(keeper._params)


def test_methods_that_know_no_units_need_no_example() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in {c.method: c for c in CASES}.values():
            (method,) = case.made()[1]
            if isinstance(method, ReplacesUnits):
                continue
            model = conv_net()
            optimizer = OPTIMIZERS["momentum"](model.parameters())
            keeper = attach(method, model, optimizer)
            train(model, optimizer, range(11), keeper)
            assert keeper.steps == 11


# --- from the shell -------------------------------------------------------------------------------------------------


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def wide(width: int) -> nn.Module:
    return nn.Linear(width, width)


@pytest.mark.parametrize(("target", "example", "said"), [
    ("words", "2,5", "float32 tensor [2, 5] on cpu"),
    ("words", "2,5", "For an embedding give whole numbers, as in --example int:2,16"),
    ("conv_net", "2,4,8,8", "cannot be run on --example 2,4,8,8"),
    ("wide", "2,4", "cannot be called without arguments: it needs width"),
])  # fmt: skip
def test_the_shell_answers_mistakes_in_a_line(
    target: str, example: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["perennial", "units", f"{__name__}:{target}", "--example", example])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("perennial", run_name="__main__")
    assert caught.value.code == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
