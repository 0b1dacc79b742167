"""One table of conformance tests for every registered method, and what must hold of each method by itself.

A method that enters ``perennial.methods.REGISTRY`` is tested here without a line added, but for its reference.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import math
import re
import textwrap
import typing
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import (
    REFERENCES,
    SIZES,
    Case,
    Replay,
    Table,
    cases,
    lane,
    parameter,
    populate,
    same,
    scalar_fields,
    whole_fields,
)

import perennial
from perennial import MLP, SGD, UPGD, Adam, Lane, Population, ShrinkAndPerturb
from perennial.methods import REGISTRY, Context, Intervention, Method, Rule
from perennial.noise import Noise, elements, seed_key
from perennial.units import UnitMap

CASES = cases()
EVERY_CASE = cases(variants=True)
FIRST = {m: next(c for c in CASES if c.method is m) for m in REGISTRY}


def _rows(kind: type[Method] = Method, first_only: bool = False) -> list[Any]:
    """Parameters of a test of every row; slow ones of the variants and, if told, of all but each method's first."""
    slow = [c for c in EVERY_CASE if c.variant or (first_only and c != FIRST[c.method])]
    return [
        pytest.param(c, id=str(c), marks=pytest.mark.slow if c in slow else ())
        for c in EVERY_CASE
        if issubclass(c.method, kind)
    ]


every_case_slowly = pytest.mark.parametrize("case", _rows(first_only=True))
every_method = pytest.mark.parametrize("method", REGISTRY, ids=lambda m: m.name)


# --- equals the paper's update --------------------------------------------------------------------------------------


@every_method
def test_has_a_reference(method: type[Method]) -> None:
    assert method.name in REFERENCES, (
        f"{method.__name__} has no reference. State its update a second time, from the paper, as a NumPy class in "
        f"tests/references.py, and add REFERENCES[{method.name!r}] = Reference(that class, "
        "{'label': {hyper-parameters}, ...})"
    )


def _trajectories() -> list[Any]:
    """Every row for a few steps of three samples, the first of each method that replaces units for a hundred of one
    sample as well; slow are twice as many of the first row, those of one sample of the other rows, and variants."""
    rows = []
    for case in EVERY_CASE:
        replaces = {"replacement_rate", "reinitialise"} & {f.name for f in dataclasses.fields(case.method)}
        lengths = [(1, 200, True), (1, 100, not replaces), (3, 40, False)]  # samples, steps, whether slow
        if case != FIRST[case.method]:
            lengths = [(1, 100, True), (3, 20, case.variant)]
        for batch, usual, slow in lengths:
            steps = case.until_events(usual)
            marks = pytest.mark.slow if slow else ()
            rows.append(pytest.param(case, batch, steps, id=f"{case}-{batch}-{steps}", marks=marks))
    return rows


@pytest.mark.parametrize(("case", "batch", "steps"), _trajectories())
def test_equals_the_reference_trajectory(case: Case, batch: int, steps: int) -> None:
    if case.method.name not in REFERENCES:
        pytest.skip("test_has_a_reference says what is missing")
    stream = Table(batch=batch)
    ours = case.lane(seed=3)
    population = populate([ours], stream)
    replay = Replay(population.lanes[0], stream, lane(population, 0))
    replacements, total = 0, 0.0
    method_has_events = case.method.due is not Intervention.due if issubclass(case.method, Intervention) else False
    for step in range(steps):
        population.advance(1)
        loss, expected = replay.step()
        total += loss
        state = lane(population, 0)
        found = []
        for method, own in zip(ours.interventions, state.methods[1:], strict=True):
            for depth, name in enumerate(("1", "3")):
                mask = method.replaced(own).get(name, torch.zeros(0))
                found += [(depth, int(unit)) for unit in mask.nonzero()[:, 0]]
        if not method_has_events:
            assert sorted(found) == expected, f"units replaced at step {step}"
        replacements += len(expected)
        assert int(state.replaced) == replacements, f"units replaced at step {step}, expected {expected}"
        for place, value in replay.network.values.items():
            got = state.params[parameter(place)].numpy()
            np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-7, err_msg=f"{parameter(place)} at step {step}")
    assert float(population.collect(steps)["online_loss"][0]) == pytest.approx(total / steps, rel=1e-5)
    if "replacement_rate" in case.settings:
        assert replacements > steps / 20, "too few replacements to compare"
    elif "reinitialise" in {f.name for f in dataclasses.fields(case.method)} and batch == 1:
        assert replacements > 1, "too few replacements to compare"


@every_case_slowly
def test_the_reference_depends_on_every_setting(case: Case) -> None:
    """A row whose setting moves nothing would compare nothing."""
    own = {k: v for k, v in case.settings.items() if k in case.method.scalars() and v != 0}
    halved = [case.lane(seed=3, **{name: value * 0.5}) for name, value in own.items()]
    if not own:
        return
    population = populate([case.lane(seed=3), *halved])
    still = list(own)
    for _ in range(8):
        population.advance(10)
        params = population.state.params.values()
        still = [
            name
            for position, name in enumerate(own, start=1)
            if all(torch.allclose(w[..., 0], w[..., position], rtol=1e-9, atol=0) for w in params) and name in still
        ]
        if not still:
            break
    assert not still, f"{case}: {', '.join(still)} moves nothing in 80 steps"


# --- resumes bit for bit --------------------------------------------------------------------------------------------


@every_case_slowly
def test_resumes_bit_for_bit(case: Case) -> None:
    lanes = [case.lane(seed=seed) for seed in (0, 1)]
    steps, stop = case.until_events(25), 12
    whole = populate(lanes, dtype=torch.float32)
    whole.advance(steps)

    first = populate(lanes, dtype=torch.float32)
    first.advance(stop)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    first.advance(2)  # what is written must not be moved by going on
    file.seek(0)
    second = populate(lanes, dtype=torch.float32)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.steps_made == stop
    second.advance(steps - stop)
    same(second.state, whole.state)


# --- does nothing at rate 0 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", _rows(Intervention, first_only=True))
def test_off_is_the_bare_rule(case: Case) -> None:
    assert case.method.OFF, f"{case.method.__name__}.OFF does not say at which settings the method does nothing"
    off = populate([case.lane(seed=5, **case.method.OFF)], dtype=torch.float32)
    rule, _ = case.made()
    bare = populate([Lane(5, rule)], dtype=torch.float32)
    for population in (off, bare):
        population.advance(case.until_events(25))
    assert int(off.state.replaced) == 0
    same(off.state.params, bare.state.params)
    same(off.state.methods[0], bare.state.methods[0])
    for name, w in off.state.params.items():  # the sign of zero included
        assert torch.equal(w.view(torch.int32), bare.state.params[name].view(torch.int32)), name


@pytest.mark.parametrize("case", _rows(Rule))
def test_lr_0_moves_nothing(case: Case) -> None:
    decay = {"weight_decay": 0.0} if "weight_decay" in case.method.scalars() else {}
    population = populate([case.lane(seed=5, lr=0.0, **decay)], dtype=torch.float32)
    before = lane(population, 0).params
    population.advance(20)
    same(lane(population, 0).params, before)


# --- lanes are independent ------------------------------------------------------------------------------------------


@every_case_slowly
def test_a_lane_alone_is_the_lane_among_others(case: Case) -> None:
    seeds = (4, 7, 7)
    numbers = [f for f in scalar_fields(case.method) if type(case.settings.get(f.name)) in (int, float)][:1]
    lanes = [
        case.lane(seed=seed, **{f.name: _within(f, case.settings[f.name] * (1 + position / 10)) for f in numbers})
        for position, seed in enumerate(seeds)
    ]
    together, steps = populate(lanes), case.until_events(20)
    together.advance(steps)
    alone = populate([lanes[1]])
    alone.advance(steps)
    same(lane(alone, 0), lane(together, 1), rtol=1e-6)


def _within(field: Any, value: float) -> float:
    """A value brought into the range of a setting: what went past its upper end is taken from the end instead."""
    high = field.metadata["high"]
    return value if value < high else high - (value - high) / 10


def _compiled_rows() -> list[Any]:
    """As few programs as hold every method: the rules in turn, each with the interventions that fall to it. All but
    the one whose program takes least to compile, rules that are like another, and variants of rules, are slow."""
    alike = {name for name, reference in REFERENCES.items() if reference.like is not None}
    rules = [m for m in REGISTRY if issubclass(m, Rule) and m.name not in alike]
    others = [m for m in REGISTRY if issubclass(m, Intervention)]
    fast = [
        (FIRST[rule], *(FIRST[m] for i, m in enumerate(others) if i % len(rules) == number))
        for number, rule in enumerate(rules)
    ]
    alone = [FIRST[m] for m in REGISTRY if m.name in alike] + [
        c for c in EVERY_CASE if c.method.name in REFERENCES and c.label in REFERENCES[c.method.name].compiled
    ]
    long = [() if row[0].method is Adam else pytest.mark.slow for row in fast]
    ids = [" + ".join(case.method.name for case in row) for row in fast]
    return [pytest.param(row, id=name, marks=mark) for row, name, mark in zip(fast, ids, long, strict=True)] + [
        pytest.param((case,), id=str(case), marks=pytest.mark.slow) for case in alone
    ]


@pytest.mark.compiles
@pytest.mark.parametrize("row", _compiled_rows())
def test_compiled_equals_uncompiled(row: tuple[Case, ...]) -> None:
    interventions = tuple(c.made()[1][0] for c in row[1:])
    lanes = [Lane(seed, row[0].made()[0], interventions) for seed in (0, 1, 2)]
    made = []
    for compiled in (True, False):
        population = populate(lanes, hidden=(3,), dtype=torch.float32, compiled=compiled)
        population.advance(25)
        made.append(population.state)
    same(made[0], made[1], rtol=2e-4)


# --- refuses what it cannot do --------------------------------------------------------------------------------------


def _refused() -> list[Any]:
    rows = []
    for method in REGISTRY:
        hints = typing.get_type_hints(method)
        for field in dataclasses.fields(method):
            bad: list[Any] = []
            data = field.metadata
            if "low" in data:
                bad = [math.nan, "much", True, [1.0]]
                if data["low"] > -math.inf:
                    bad += [data["low"] - 0.5, -math.inf]
                    bad += [data["low"]] if data["open_low"] else []
                if data["high"] < math.inf:
                    bad += [data["high"] + 0.5, math.inf]
                    bad += [data["high"]] if data["open_high"] else []
                if type(None) not in typing.get_args(hints[field.name]):
                    bad += [None]
            elif "whole_low" in data:
                bad = [1.5, "much", True, [1], data["whole_low"] - 1]
                bad += [] if field.default is None or data["optional"] else [None]
            elif "options" in data:
                bad = [value for value in ("nonsense", None, 1, 3) if value not in data["options"]]
            elif hints[field.name] is bool:
                bad = ["no", None, 1]
            rows += [pytest.param(method, field, value, id=f"{method.name}.{field.name}={value!r}") for value in bad]
    return rows


@pytest.mark.parametrize(("method", "field", "value"), _refused())
def test_refuses_settings_out_of_range(method: type[Method], field: Any, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        method(**{field.name: value})
    text = str(caught.value)
    assert f"{method.name}.{field.name}" in text
    shown = f"{value:g}" if isinstance(value, float) else repr(value)
    assert shown in text
    if "options" in field.metadata:
        assert all(str(option) in text for option in field.metadata["options"])
    elif "whole_low" in field.metadata:
        assert "whole number" in text or str(field.metadata["whole_low"]) in text.replace(shown, "", 1), text
    elif isinstance(value, float):
        for edge in (field.metadata["low"], field.metadata["high"]):
            assert math.isinf(edge) or f"{edge:g}" in text.replace(shown, "", 1), text


@every_method
def test_refuses_unknown_settings(method: type[Method]) -> None:
    with pytest.raises(TypeError, match="replacment"):
        method(replacment_rate=0.1)  # type: ignore[call-arg]


def _edges() -> list[Any]:
    """(case, the settings of one lane after another): an end of a range each, as many lanes as share a structure."""
    rows = []
    for case in {c.method: c for c in CASES}.values():
        together, alone = [], []
        defaults = {f.name: f.default for f in dataclasses.fields(case.method)}
        for field in scalar_fields(case.method):
            data = field.metadata
            edges = ([] if data["open_low"] else [data["low"]]) + ([] if data["open_high"] else [data["high"]])
            optional = case.settings.get(field.name, defaults[field.name]) is None  # set, it is another structure
            for edge in edges:
                if math.isfinite(edge):
                    (alone if optional else together).append((field.name, float(edge)))
        alone += [(field.name, field.metadata["whole_low"]) for field in whole_fields(case.method)]
        for ends in ([together] if together else []) + [[one] for one in alone]:
            said = ", ".join(f"{name}={edge:g}" for name, edge in ends)
            rows.append(pytest.param(case, ends, id=f"{case.method.name}: {said}"))
    return rows


@pytest.mark.parametrize(("case", "ends"), _edges())
def test_works_at_the_ends_of_the_range(case: Case, ends: list[tuple[str, float]]) -> None:
    """What is allowed must work: nothing is divided by zero at an end that the range includes."""
    population = populate([case.lane(seed=0, **{name: edge}) for name, edge in ends])
    population.advance(case.until_events(5))
    for number, end in enumerate(ends):
        state = lane(population, number)
        assert int(state.diverged) == -1, end
        for leaf in torch.utils._pytree.tree_leaves(state):
            assert not torch.isnan(leaf.to(torch.float64)).any(), end


@every_method
def test_every_setting_and_state_field_is_documented(method: type[Method]) -> None:
    case = next(c for c in CASES if c.method is method)
    population = populate([case.lane(seed=0)])
    state = population.state.methods[0 if issubclass(method, Rule) else 1]
    shared = [base for base in method.__mro__[1:-1] if base is not Method and "__dataclass_fields__" in vars(base)]
    records = [method, *shared] + ([type(state)] if state != () else [])
    for record in records:
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(record))).body[0]).body
        for item, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(item, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{record.__name__}.{ast.unparse(item.target)} has no docstring"
        assert record.__doc__
    assert re.fullmatch(r"[a-z0-9_]+", method.name)


@every_case_slowly
def test_step_and_event_are_pure(case: Case) -> None:
    """Neither parameters, nor gradients, nor state, nor the global random state change under a method's hands."""
    population = populate([case.lane(seed=0)])
    population.advance(8)
    state = lane(population, 0)
    methods = population.lanes[0].methods
    method, own = (methods[0], state.methods[0]) if issubclass(case.method, Rule) else (methods[1], state.methods[1])
    grads = {name: torch.randn_like(w) for name, w in state.params.items()}
    hidden = {layer.name: torch.rand(3, layer.size, dtype=torch.float64) for layer in population.units}
    signals = {name: torch.randn_like(h) for name, h in hidden.items()}

    def loss(changed: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((w**2).sum() for w in (state.params | changed).values())  # type: ignore[return-value]

    key = torch.tensor(seed_key(0, "method"), dtype=torch.int32)
    noise = Noise(key, state.step, method.name)
    curvature = {name: torch.rand_like(w) for name, w in state.params.items()}
    context = Context(grads, hidden, noise, population.units, signals, loss, curvature=curvature)
    inputs = (dict(state.params), own, grads, hidden, signals, curvature)
    before = torch.utils._pytree.tree_map(torch.clone, inputs)
    rng = torch.get_rng_state()
    calls = [lambda: method.step(state.params, own, context)]
    if isinstance(method, Intervention):
        bare = Context({}, {}, noise, population.units)
        calls.append(lambda: method.event(state.params, own, bare))
        calls.append(lambda: method.begin(state.params, own, bare))
    for call in calls:
        first, second = call(), call()
        same(inputs, before)
        same(first, second)
    assert torch.equal(rng, torch.get_rng_state())


# --- SGD and Adam are torch's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), [
    (SGD(lr=0.01), lambda p: torch.optim.SGD(p, lr=0.01)),
    (SGD(lr=0.01, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
    (SGD(lr=0.01, momentum=0.9, weight_decay=0.1),
     lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1)),
    (Adam(lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    (Adam(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-4, weight_decay=0.1),
     lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.1)),
    (Adam(lr=0.01, weight_decay=0.1, decoupled=True), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
], ids=["sgd", "momentum", "momentum l2", "adam", "adam l2", "adamw"])  # fmt: skip
def test_equals_torch_optim(ours: Rule, theirs: Any) -> None:
    stream = Table(batch=3)
    population = populate([Lane(2, ours)], stream)
    model = MLP(hidden=SIZES[1:-1]).build(SIZES[0], SIZES[-1]).double()
    model.load_state_dict(lane(population, 0).params)
    optimizer = theirs(model.parameters())
    x, y = (torch.tensor(t, dtype=torch.float64) for t in stream.rows(2))
    for step in range(100):
        optimizer.zero_grad()
        ((model(x[step]) - y[step]) ** 2).sum(-1).mean().backward()
        optimizer.step()
    population.advance(100)
    for name, w in model.named_parameters():
        torch.testing.assert_close(population.state.params[name][..., 0], w.detach(), rtol=1e-9, atol=1e-12)


# --- UPGD -----------------------------------------------------------------------------------------------------------


def _upgd(
    rule: UPGD, params: dict[str, torch.Tensor], grads: dict[str, torch.Tensor], state: Any = None
) -> tuple[dict[str, torch.Tensor], Any]:
    units = UnitMap(())
    noise = Noise(torch.tensor([1, 2], dtype=torch.int32), torch.tensor(0, dtype=torch.int32), rule.name)
    return rule.step(params, rule.init(params, units) if state is None else state, Context(grads, {}, noise, units))


def _f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_upgd_with_utility_0_is_half_an_sgd_step() -> None:
    """A gate of sigmoid(0) = 1/2 (the paper's own form; the published one-file optimizer doubles it)."""
    params = {"w": torch.zeros(4, dtype=torch.float64), "v": torch.zeros(2, 3, dtype=torch.float64)}
    grads = {name: torch.randn_like(w) for name, w in params.items()}
    changed, _ = _upgd(UPGD(lr=0.1, noise_std=0.0), params, grads)
    for name, w in params.items():
        torch.testing.assert_close(changed[name], w - 0.1 * 0.5 * grads[name], rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_upgd_without_a_useful_weight_keeps_every_sign(dtype: torch.dtype) -> None:
    """A negative maximum would turn the ranking around, a zero one would divide by zero."""
    w = torch.tensor([1.0, -2.0, 0.0, 1e-20], dtype=dtype)
    grads = torch.tensor([0.5, -0.25, 0.5, 0.5], dtype=dtype)  # -g w: -.5, -.5, 0, about 0
    rule = UPGD(lr=0.1, noise_std=0.0)
    changed, state = _upgd(rule, {"w": w}, {"w": grads})
    for _ in range(20):
        assert torch.isfinite(changed["w"]).all()
        changed, state = _upgd(rule, {"w": w}, {"w": grads}, state)
    moved = (w - changed["w"]) / (0.1 * grads)
    expected = torch.tensor([1.0, 1.0, 0.5, 1.0], dtype=dtype)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=0)


def test_upgd_gate_divides_by_the_largest_corrected_utility() -> None:
    """Of the first step's utilities u the gates are sigmoid(u / max u), however slow the average. With the maximum of
    the uncorrected average, as in the published code, they would be sigmoid(1000 u / max u): open or shut."""
    w, g = {"a": _f64(1.0, 0.5), "b": _f64(-1.0, 2.0)}, {"a": _f64(-2.0, -1.0), "b": _f64(-0.5, 0.25)}
    changed, _ = _upgd(UPGD(lr=0.1, noise_std=0.0, utility_decay=0.999), w, g)
    utility = {"a": _f64(2.0, 0.5), "b": _f64(-0.5, -0.5)}  # the largest, 2, is in "a" and scales "b" too
    for name, u in utility.items():
        gate = torch.sigmoid(u / 2.0)
        torch.testing.assert_close(changed[name], w[name] - 0.1 * g[name] * (1 - gate), rtol=1e-9, atol=0)


def test_upgd_corrects_each_weight_by_its_own_age() -> None:
    """A weight whose unit was re-initialised is not taken for useless because its average is young."""
    rule = UPGD(lr=0.1, noise_std=0.0, utility_decay=0.9)
    params, grads = {"w": torch.ones(2, 3, dtype=torch.float64)}, {"w": -torch.ones(2, 3, dtype=torch.float64)}
    _, state = _upgd(rule, params, grads)
    for _ in range(9):
        _, state = _upgd(rule, params, grads, state)
    state = rule.reset(state, {"w": {1: torch.tensor([False, True, False])}})
    changed, _ = _upgd(rule, params, grads, state)
    expected = 1.0 + 0.1 * (1 - torch.sigmoid(_f64(1.0)))
    torch.testing.assert_close(changed["w"], expected.expand(2, 3), rtol=1e-12, atol=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=4, max_size=4), st.lists(st.floats(-10, 10), min_size=4, max_size=4))
def test_upgd_moves_between_nothing_and_an_sgd_step(weights: list[float], gradients: list[float]) -> None:
    changed, _ = _upgd(UPGD(lr=0.1, noise_std=0.0), {"w": _f64(*weights)}, {"w": _f64(*gradients)})
    step = -0.1 * _f64(*gradients)
    moved = changed["w"] - _f64(*weights)
    slack = 1e-12 * (1 + _f64(*weights).abs())
    assert (moved * step.sign() >= -slack).all()
    assert (moved.abs() <= step.abs() + slack).all()


def test_upgd_noise_is_gated_and_scaled_by_lr() -> None:
    params, grads = {"w": torch.zeros(50_000)}, {"w": torch.zeros(50_000)}
    changed, _ = _upgd(UPGD(lr=0.1, noise_std=2.0), params, grads)
    assert float(changed["w"].std()) == pytest.approx(0.1 * 2.0 * 0.5, rel=0.02)


# --- shrink and perturb ---------------------------------------------------------------------------------------------


def test_shrink_and_perturb_of_everything_is_fresh_noise() -> None:
    population = populate([Lane(0, SGD(lr=0.0), (ShrinkAndPerturb(shrink=1.0, noise_std=0.5),))], hidden=(400, 100))
    population.advance(2)
    w = population.state.params["3.weight"][..., 0]
    assert float(w.std()) == pytest.approx(0.5, rel=0.02)
    assert abs(float(w.mean())) < 0.01
    assert (population.state.params["3.bias"] != 0).all()


# --- noise, compiled and not ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Drawn(Rule):
    """Parameters become uniform numbers: for looking at what a compiled step draws."""

    def step(self, params: Any, state: Any, context: Context) -> tuple[dict[str, torch.Tensor], Any]:
        return {name: context.noise.uniform(name, elements(w)).to(w.dtype) for name, w in params.items()}, state


@pytest.mark.slow
@pytest.mark.compiles
def test_uniform_noise_compiled_is_uncompiled_bit_for_bit() -> None:
    made = []
    for compiled in (True, False):
        population = Population(
            lambda: MLP(hidden=(7,)).build(*SIZES[:: len(SIZES) - 1]),
            Table(),
            [Lane(s, _Drawn()) for s in range(3)],
            compiled=compiled,
        )
        population.advance(3)
        made.append(population.state.params)
    same(made[0], made[1])


def test_every_method_is_one_import_away() -> None:
    """The registry and what is imported are two lists: mypy must see the names."""
    missing = [method.__name__ for method in REGISTRY if method.__name__ not in perennial.methods.__all__]
    assert not missing, f"add {', '.join(missing)} to __all__ of perennial/methods/__init__.py"
    assert all(getattr(perennial, method.__name__) is method for method in REGISTRY)
