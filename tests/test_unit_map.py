"""Unit maps of real architectures, proved by an oracle that knows nothing of how they were traced.

The oracle works on a copy of the model in double precision, one unit at a time: with the unit's outgoing slices set to
zero and everything that makes it changed, the output must not change by a bit, and no other unit's activation either;
with the outgoing slices intact the output must change; with everything that makes it set to zero, the unit must not
know its input. Norms over units are read from a recording of the run before the change.

A unit of which nothing reaches the output can show no change. It passes only where the test says so, and only if the
slope of the output by the unit is exactly zero, by what makes it and by what its readers are given.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from zoo import ZOO, Example, Net, RootMeanSquareNorm, randomise, values

from perennial.units import Slice, UnitLayer, UnitMap, prove, trace
from perennial.units.prove import SILENT

pytestmark = [
    # The libraries' own: deprecated names that they still use at import, and the advice of models made by hand.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:peft"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:stable_baselines3"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gymnasium"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    # Two examples transpose vectors and matrices of sparse weights, which torch calls beta.
    pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning"),
]

# --- the oracle -----------------------------------------------------------------------------------------------------


def leaves(value: Any) -> list[Tensor]:
    """Every tensor in a value: in containers, records and the attributes of plain objects."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for one in value.values() for t in leaves(one)]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [t for one in value for t in leaves(one)]
    if hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
        return [t for one in vars(value).values() for t in leaves(one)]
    return []


_READERS = frozenset({
    F.linear, torch.addmm, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
})  # fmt: skip


class _Watched(TorchFunctionMode):
    """A forward pass in double precision throughout, whose norms over units can be replayed.

    ``statistics`` is None to compute them as ever, ``"record"``, ``"replay"``, or ``"neutral"`` (mean 0, scale 1).
    """

    def __init__(self, oracle: Oracle, statistics: str | None) -> None:
        super().__init__()
        self.oracle, self.statistics = oracle, statistics
        self.seen: dict[str, Tensor] = {}
        self.calls = 0

    def held(self, value: Callable[[], Tensor], neutral: float) -> Tensor:
        if self.statistics is None:
            return value()
        self.calls += 1
        if self.statistics == "record":
            self.oracle.recorded[self.calls] = value()
        if self.statistics == "neutral":
            return torch.full_like(value(), neutral)
        return self.oracle.recorded[self.calls]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        if func in _READERS:
            read = next(t for t in tensors if id(t) not in self.oracle.names)
            self.seen |= {self.oracle.names[id(t)]: read for t in tensors if id(t) in self.oracle.names}
        if torch.is_grad_enabled() and "out" in kwargs:
            return kwargs.pop("out").copy_(func(*args, **kwargs))  # as autograd has it
        if func in (F.layer_norm, torch.layer_norm):
            return self.norm(*args, **kwargs)
        if func in (F.rms_norm, torch.rms_norm):
            return self.root_mean_square(*args, **kwargs)
        if func in (F.group_norm, torch.group_norm):
            return self.groups(*args, **kwargs)
        if func is F.normalize:
            x, dim = args[0], kwargs.get("dim", args[2] if len(args) > 2 else 1)
            return x / self.held(lambda: x.norm(dim=dim, keepdim=True).clamp_min(1e-12), 1.0)
        if self.oracle.depth and func in (Tensor.mean, torch.mean):
            return self.held(lambda: func(*args, **kwargs), 1.0)
        return func(*args, **kwargs)

    def norm(self, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Tensor:
        dims = tuple(range(-len(shape), 0))
        mean = self.held(lambda: x.mean(dims, keepdim=True), 0.0)
        scale = self.held(lambda: torch.rsqrt(x.var(dims, correction=0, keepdim=True) + eps), 1.0)
        out = (x - mean) * scale * (1.0 if weight is None else weight)
        return out if bias is None else out + bias

    def root_mean_square(self, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
        dims = tuple(range(-len(shape), 0))
        floor = torch.finfo(x.dtype).eps if eps is None else eps
        out = x * self.held(lambda: torch.rsqrt(x.square().mean(dims, keepdim=True) + floor), 1.0)
        return out if weight is None else out * weight

    def groups(
        self, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
    ) -> Tensor:
        parts = x.unflatten(1, (groups, -1)).flatten(2)
        out = self.norm(parts, parts.shape[2:], eps=eps).view(x.shape)
        side = (1, -1, *(1 for _ in range(x.dim() - 2)))
        out = out if weight is None else out * weight.view(side)
        return out if bias is None else out + bias.view(side)


class Oracle:
    """Says of a layer why it is not what a map claims, or nothing.

    Args:
        model: taken over; it must be nobody else's.
        args: an example input; keywords too.
        units: how many units of a layer are tried one by one; the others are tried by random halves.
        seed: of the changes.
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *,
        units: int = 6, seed: int = 0,
    ) -> None:  # fmt: skip
        self.model = model.double()
        self.args, self.kwargs = _double(args), _double(dict(kwargs or {}))
        self.units, self.random = units, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        self.tensors = {name: t for name, t in named if t.layout == torch.strided}
        self.names = {id(t): name for name, t in self.model.named_parameters()}
        self.start = {name: t.detach().clone() for name, t in self.tensors.items()}
        self.parameters = set(self.names.values())
        self.recorded: dict[int, Tensor] = {}
        self.depth = 0
        for module in self.model.modules():
            if "Norm" in type(module).__name__:
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self.depth += 1

    def _leave(self, *_: Any) -> None:
        self.depth -= 1

    def run(
        self, changes: Mapping[str, Tensor], statistics: str | None = None, args: Any = None, kwargs: Any = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The outputs, and what each weight's reader saw, with some tensors changed for this run."""
        with torch.no_grad():
            outputs, seen = self.watch(changes, statistics, args, kwargs)
        return [t.detach().clone() for t in outputs], {k: v.detach().clone() for k, v in seen.items()}

    def watch(
        self, changes: Mapping[str, Tensor], statistics: str | None, args: Any = None, kwargs: Any = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        self.depth = 0
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(changes.get(name, self.start[name]))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(7)  # the CPU's alone: for a GPU torch would keep a traceback a call
            with _Watched(self, statistics) as watched:
                out = self.model(*(self.args if args is None else args), **(self.kwargs if kwargs is None else kwargs))
        return leaves(out), watched.seen

    def slope(self, layer: UnitLayer, units: list[int], changes: Mapping[str, Tensor], statistics: str | None) -> bool:
        """Whether the outputs have a slope by some units: by the parameters that make them, or by what their readers
        are given."""
        with torch.enable_grad():
            outputs, seen = self.watch(changes, statistics)
            total = sum((t * torch.rand_like(t)).sum() for t in outputs if t.requires_grad)
        if not isinstance(total, Tensor):
            return False
        makes = [(part, self.model.get_parameter(part.parameter)) for part in (*layer.incoming, *layer.norms)
                 if part.parameter in self.parameters]  # fmt: skip
        reads = [(part, seen[part.parameter]) for part in layer.outgoing if part.parameter in seen]
        slopes = torch.autograd.grad(total, [t for _, t in (*makes, *reads)], allow_unused=True)
        found = []
        for (part, _), slope in zip(makes, slopes, strict=False):
            if slope is not None:
                found += [tensor[place] for tensor, place in self.at(part, units, {part.parameter: slope})]
        for (part, _), slope in zip(reads, slopes[len(makes) :], strict=True):
            if slope is not None:
                dim = 1 if self.start[part.parameter].dim() > 2 else -1
                found.append(slope.index_select(dim, part.index[units].flatten()))
        return any(bool(t.any()) for t in found)

    def at(self, part: Slice, units: list[int], changes: dict[str, Tensor]) -> Iterator[tuple[Tensor, Any]]:
        """The places of some units in a parameter: (parameter, what to index it with)."""
        tensor = changes.setdefault(part.parameter, self.start[part.parameter].clone())
        positions = part.index[units].reshape(-1)
        if part.groups == 1:
            yield tensor, (*(slice(None),) * part.dim, positions)
            return
        rows, columns = tensor.shape[0] // part.groups, tensor.shape[1]
        for position in positions.tolist():
            group = position // columns
            yield tensor, (slice(group * rows, (group + 1) * rows), position % columns)

    def cut(self, layer: UnitLayer, units: list[int]) -> dict[str, Tensor]:
        return self.without_readers(layer, units, {})

    def without_readers(self, layer: UnitLayer, units: list[int], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        cut = {name: t.clone() for name, t in changes.items()}
        for part in layer.outgoing:
            for tensor, place in self.at(part, units, cut):
                tensor[place] = 0
        return cut

    def disturb(self, layer: UnitLayer, units: list[int], size: float, sign: int) -> dict[str, Tensor]:
        """Everything that makes some units changed by numbers of about a size; sign 0 for either."""
        bent: dict[str, Tensor] = {}
        for part in (*layer.incoming, *layer.norms):
            for tensor, place in self.at(part, units, bent):
                noise = size * (0.5 + torch.rand(tensor[place].shape, generator=self.generator, dtype=torch.float64))
                signs = 1 - 2 * torch.randint(0, 2, noise.shape, generator=self.generator)
                variance = part.parameter.endswith("running_var")
                tensor[place] += noise if variance else (sign or signs) * noise
        return bent

    def deny(self, layer: UnitLayer, *, complete: bool = True, silent: bool | None = None) -> str:
        """Why the layer is not what it is said to be; empty if it is.

        Args:
            layer: what the map says.
            complete: asks whether ``incoming`` is all that makes the units (a network may add its input to them, and
                that is no parameter).
            silent: None where every unit must show in the output. Otherwise whether nothing of the layer reaches the
                output (True), or something does (False); of what does not, the slope must be zero.
        """
        problem = self.deny_form(layer)
        if problem:
            return problem
        everyone = list(range(layer.size))
        alone = everyone if layer.size <= self.units else sorted(self.random.sample(everyone, self.units))
        trials = [[unit] for unit in alone]
        if layer.size > self.units:
            half = sorted(self.random.sample(everyone, layer.size // 2))
            trials += [half, [unit for unit in everyone if unit not in half]]
        self.felt = False
        for units in trials:
            problem = self.deny_units(layer, units, complete, silent)
            if problem:
                return f"{layer.name}, units {units}: {problem}"
        if silent is not None and silent == self.felt:
            return f"{layer.name}: " + ("it is said to be silent and is not" if silent else "it is silent")
        return ""

    def deny_form(self, layer: UnitLayer) -> str:
        for part in (*layer.incoming, *layer.norms, *layer.outgoing):
            if part.parameter not in self.tensors:
                return f"no parameter {part.parameter}"
            shape = self.tensors[part.parameter].shape
            length = shape[part.dim] * part.groups if part.dim < len(shape) else 0
            if part.index.shape[0] != layer.size or part.index.dtype != torch.int64:
                return f"the index of {part.parameter} has shape {tuple(part.index.shape)}"
            if int(part.index.min()) < 0 or int(part.index.max()) >= length:
                return f"the index of {part.parameter} leaves it"
            if len(part.index.unique()) != part.index.numel():
                return f"the index of {part.parameter} gives a position to two units"
        if not layer.incoming or not layer.outgoing:
            return "nothing makes its units, or nothing reads them"
        if layer.tap not in {part.parameter for part in layer.outgoing}:
            return "its tap is none of its readers"
        return ""

    def deny_units(self, layer: UnitLayer, units: list[int], complete: bool, silent: bool | None) -> str:
        record, replay, neutral = ("record", "replay", "neutral") if layer.normed else (None, None, None)
        base, seen = self.run({}, record)
        if not all(bool(torch.isfinite(t).all()) for t in base if t.is_floating_point()):
            return "the outputs are not finite, and nothing can be said"
        tried: list[dict[str, Tensor]] = [{}]
        for size, sign in ((0.3, 0), (1.0, 0), (1.0, 1), (1.0, -1), (3.0, 0), (3.0, 1), (3.0, -1), (10.0, 0)):
            bent = self.disturb(layer, units, size, sign)
            out, seen_bent = self.run(bent, replay)
            if not _same(base, out):
                self.felt = True
                break
            tried.append(bent)
        else:
            if silent is None:
                return "the output does not feel them"
            if any(self.slope(layer, units, changes, replay) for changes in tried):
                return "the output does not feel them, and has a slope by them"
        if len(layer.outgoing) == 1 and layer.tap in seen and torch.equal(seen[layer.tap], seen_bent[layer.tap]):
            return "the tap does not see them"
        cut = self.cut(layer, units)
        before, seen_before = self.run(cut, record)
        after, seen_after = self.run(self.without_readers(layer, units, bent), replay)
        if not _same(before, after):
            return "something besides the outgoing slices reads them"
        if layer.tap in seen_before:
            others = torch.ones(layer.size, dtype=torch.bool)
            others[units] = False
            left, right = layer.activation(seen_before[layer.tap]), layer.activation(seen_after[layer.tap])
            if left.shape[1] != layer.size:
                return f"the activation has shape {tuple(left.shape)}"
            if not torch.equal(left[:, others], right[:, others]):
                return "other units' activations change with them"
        if complete:
            nothing = dict(cut)
            for part in layer.incoming:
                for tensor, place in self.at(part, units, nothing):
                    tensor[place] = 0
            _, here = self.run(nothing, neutral)
            own = {part.parameter for part in (*layer.incoming, *layer.norms, *layer.outgoing)}
            for name, start in self.start.items():
                if name not in own and name in self.parameters and start.is_floating_point():
                    nothing[name] = start + 0.1 * torch.rand(start.shape, generator=self.generator, dtype=torch.float64)
            _, there = self.run(nothing, neutral, *self.other_inputs())
            for part in layer.outgoing:
                if part.parameter in here:
                    dim = 1 if self.start[part.parameter].dim() > 2 else -1
                    left, right = (
                        s[part.parameter].index_select(dim, part.index[units].flatten()) for s in (here, there)
                    )
                    if left.shape == right.shape and not torch.allclose(left, right, rtol=1e-9, atol=1e-9):
                        return "something besides the incoming slices makes them"
        return ""

    def other_inputs(self) -> tuple[Any, Any]:
        def other(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.flip(0) if value.is_floating_point() and value.dim() > 1 else value.roll(1, -1)
            return value

        return tuple(map(other, self.args)), {name: other(value) for name, value in self.kwargs.items()}


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map(_double, value))
    return {k: _double(v) for k, v in value.items()} if isinstance(value, dict) else value


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def overlaps(unit_map: UnitMap) -> list[str]:
    """The places that two units, of one layer or of two, are both said to own in the same role."""
    claimed: dict[tuple[str, str, int, int], str] = {}
    found = []
    for layer in unit_map:
        for role, parts in (("makes", layer.incoming), ("scales", layer.norms), ("reads", layer.outgoing)):
            for part in parts:
                for position in part.index.flatten().tolist():
                    key = (role, part.parameter, part.dim, position)
                    if key in claimed:
                        found.append(f"{part.parameter}[{position}] {role} {claimed[key]} and {layer.name}")
                    claimed[key] = layer.name
    return found


def skipped(model: nn.Module, unit_map: UnitMap) -> list[str]:
    """The matrices of the model, and the rows of a listed one, that the map does not speak of."""
    told = {name.partition("[")[0].split(" #")[0] for name, _ in unit_map.refused}

    def refused(parameter: str) -> bool:
        module = parameter.rpartition(".")[0]
        parents = {".".join(module.split(".")[:i]) for i in range(1, module.count(".") + 2)}
        return parameter in told or bool(parents & told)

    silent = []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name in unit_map.outputs or refused(name):
            continue
        made: dict[int, list[int]] = {}
        for part in (part for layer in unit_map for part in layer.incoming if part.parameter == name):
            made.setdefault(part.dim, []).extend(part.index.flatten().tolist())
        read = any(part.parameter == name for layer in unit_map for part in (*layer.outgoing, *layer.norms))
        if not made and not read:
            silent.append(name)
        for dim, rows in made.items():
            missing = set(range(parameter.shape[dim])) - set(rows)
            if missing:
                silent.append(f"{name}: positions {sorted(missing)} of dimension {dim}")
    return silent


def find(unit_map: UnitMap, name: str) -> UnitLayer | None:
    """The layer of that name, or, where layers are joined, the one that the module helps to make."""
    for layer in unit_map:
        if layer.name == name:
            return layer
    if "[" in name:
        return None
    for layer in unit_map:
        if {f"{name}.weight", f"{name}.in_proj_weight", f"{name}.v_proj_weight"} & {
            p.parameter for p in layer.incoming
        }:
            return layer
    return None


# --- the oracle itself ----------------------------------------------------------------------------------------------


def rows(name: str, size: int, dim: int = 0) -> Slice:
    return Slice(name, dim, torch.arange(size)[:, None])


def made(
    name: str, size: int, incoming: list[str], outgoing: list[str], norms: tuple[str, ...] = (), **more: Any
) -> UnitLayer:
    """A layer by hand, whose unit i is position i everywhere."""
    return UnitLayer(
        name, size, "linear", tuple(rows(n, size) for n in incoming), tuple(rows(n, size) for n in norms),
        tuple(rows(n, size, 1) for n in outgoing), outgoing[0], **more,
    )  # fmt: skip


def _oracle(name: str) -> Oracle:
    example = ZOO[name]()
    return Oracle(example.model, example.args, example.kwargs)


def test_the_oracle_confirms_maps_made_by_hand() -> None:
    assert not _oracle("mlp_relu").deny(made("0", 5, ["0.weight", "0.bias"], ["2.weight"]))
    norms = ("1.weight", "1.bias", "1.running_mean", "1.running_var")
    for name in ("batch_norm_training", "batch_norm_evaluating"):
        assert not _oracle(name).deny(made("0", 5, ["0.weight", "0.bias"], ["3.weight"], norms))
    for name in ("layer_norm", "root_mean_square_norm", "root_mean_square_norm_written_out"):
        scale = ("1.weight", "1.bias") if name == "layer_norm" else ("1.weight",)
        assert not _oracle(name).deny(made("0", 5, ["0.weight", "0.bias"], ["3.weight"], scale, normed=True))
    trunk = made("trunk", 5, ["trunk.weight", "trunk.bias"], ["policy.weight", "value.weight"])
    assert not _oracle("two_heads_of_a_trunk").deny(trunk)
    stream = made("stem", 5, [f"{m}.{p}" for m in ("stem", "gate", "body") for p in ("weight", "bias")],
                  ["gate.weight", "body.weight", "head.weight"], coupled=True)  # fmt: skip
    assert not _oracle("highway").deny(stream)
    grouped = made("0", 4, ["0.weight", "0.bias"], ["2.weight"], reader="conv")
    columns = Slice("2.weight", 1, torch.arange(4)[:, None], groups=2)
    assert not _oracle("grouped_reader").deny(dataclasses.replace(grouped, outgoing=(columns,)))
    flat = Slice("6.weight", 1, torch.arange(16).view(4, 4))
    conv = dataclasses.replace(made("2", 4, ["2.weight", "2.bias"], ["6.weight"]), outgoing=(flat,))
    assert not _oracle("pool_max").deny(conv)


@pytest.mark.parametrize(("name", "layer", "word"), [
    ("two_heads_of_a_trunk", made("trunk", 5, ["trunk.weight", "trunk.bias"], ["policy.weight"]), "besides the out"),
    ("mlp_relu", made("0", 5, ["0.weight"], ["2.weight"]), "besides the incoming"),
    ("mlp_relu", made("0", 4, ["2.weight"], ["4.weight"]), "besides the incoming"),
    ("mlp_relu", made("2", 4, ["0.weight"], ["4.weight"]), "besides the out"),
    ("layer_norm", made("0", 5, ["0.weight", "0.bias"], ["3.weight"], ("1.weight", "1.bias")), "besides the out"),
    ("highway", made("stem", 5, ["stem.weight", "stem.bias"], ["gate.weight", "body.weight", "head.weight"]),
     "besides the incoming"),
    ("batch_norm_evaluating", made("0", 5, ["0.weight", "0.bias"], ["3.bias"]), "leaves it"),
    ("sum_over_units", made("a", 5, ["a.weight", "a.bias"], ["c.weight"]), "besides the out"),
    ("mean_over_units_read_elsewhere", made("a", 5, ["a.weight", "a.bias"], ["c.weight"], normed=True), "besides"),
    ("own_norm_whose_statistic_is_read_elsewhere", made("a", 5, ["a.weight", "a.bias"], ["c.weight"], normed=True),
     "besides"),
    ("softmax_over_units", made("b", 5, ["b.weight", "b.bias"], ["c.weight"]), "other units"),
    ("layer_that_nothing_uses", made("b", 5, ["b.weight", "b.bias"], ["c.weight"]), "does not feel"),
    ("mlp_relu", dataclasses.replace(made("0", 5, ["0.weight", "0.bias"], ["2.weight"]), tap="4.weight"), "tap"),
    ("also_an_output_in_a_plain_object", made("b", 5, ["b.weight", "b.bias"], ["c.weight"]), "besides the out"),
])  # fmt: skip
def test_the_oracle_denies_wrong_maps(name: str, layer: UnitLayer, word: str) -> None:
    problem = _oracle(name).deny(layer)
    assert problem
    assert word in problem or word == "other units", problem


@pytest.mark.parametrize("name", ["mlp_relu", "layer_norm", "grouped_reader", "pool_max", "two_heads_of_a_trunk"])
def test_the_oracle_takes_no_unit_for_silent_that_is_not(name: str) -> None:
    """By the slope of the output too, which finds each unit by itself."""
    example, oracle = _quietly(name), _oracle(name)
    for layer in trace(example.model, *example.args):
        assert not oracle.deny(layer, silent=False)
        assert "is not" in oracle.deny(layer, silent=True)
        oracle.run({}, "record")
        assert all(oracle.slope(layer, [unit], {}, "replay" if layer.normed else None) for unit in range(layer.size))


# --- every architecture ---------------------------------------------------------------------------------------------

LARGE = frozenset({
    "t5_gated", "lora_on_llama", "llama_eager", "llama_training", "resnet18_evaluating", "vit",
    "transformer_encoder_norm_first_training", "transformer_encoder_norm_last_evaluating",
    "transformer_encoder_norm_first_evaluating", "transformer_encoder_norm_last_training", "llama_sdpa", "t5",
    "depthwise_separable",
})  # fmt: skip
"""Networks that take the oracle long, each of parts that are tried with the quick tests, and most of them a variant of
a network that is: a ResNet, BERT, GPT-2 and LoRA on BERT are."""

ADDS_INPUTS = frozenset({"noise_of_the_units_shape"})
"""Networks that add something to their units that no parameter makes."""


def _quietly(name: str) -> Example:
    """Third parties warn when imported and when models are made: that is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ZOO[name]()


@pytest.mark.parametrize("name", ZOO)
def test_the_map_says_what_the_architecture_is(name: str) -> None:
    example = _quietly(name)
    unit_map = trace(example.model, *example.args, **example.kwargs)
    reasons = [(module.partition("[")[0].split(" #")[0], reason) for module, reason in unit_map.refused]
    for layer_name, (size, coupled) in example.listed.items():
        layer = find(unit_map, layer_name)
        assert layer is not None, f"{layer_name} is not listed: {[x.name for x in unit_map]}, {unit_map.refused}"
        assert (layer.size, layer.coupled) == (size, coupled), layer_name
        if layer_name in example.normed:
            assert layer.normed, layer_name
    for module, word in example.refused.items():
        found = [reason for at, reason in reasons if at == module or at.startswith(f"{module}.")]
        assert found, f"{module} is not refused: {unit_map.refused}"
        assert all(found)
        assert any(word in reason for reason in found), found
        assert module not in {layer.name for layer in unit_map}
    assert not skipped(example.model, unit_map)
    assert not overlaps(unit_map)
    names = [layer.name for layer in unit_map]
    assert len(set(names)) == len(names)
    assert not any(layer.coupled for layer in unit_map.interior())
    parameters = dict(example.model.named_parameters())
    assert set(unit_map.outputs) <= set(unit_map.order) <= set(parameters)


@pytest.mark.parametrize(("name", "outputs"), [
    ("mlp_relu", {"4.weight"}), ("two_heads_of_a_trunk", {"policy.weight", "value.weight"}),
    ("resnet18_training", {"fc.weight"}), ("unet_nearest", {"head.weight"}), ("llama_sdpa", {"lm_head.weight"}),
    ("ppo", {"action_net.weight", "value_net.weight"}), ("dqn", {"q_net.4.weight"}), ("vit", {"classifier.weight"}),
    ("transposed_convolutions", {"6.weight"}), ("attention_alone", {"attention.out_proj.weight"}),
])  # fmt: skip
def test_heads_are_outputs_and_the_order_is_that_of_use(name: str, outputs: set[str]) -> None:
    example = _quietly(name)
    unit_map = trace(example.model, *example.args, **example.kwargs)
    assert set(unit_map.outputs) == outputs
    params = dict(example.model.named_parameters())
    matrices = unit_map.matrices(params)
    assert set(matrices) == {name for name, p in params.items() if p.dim() > 1}
    assert set(unit_map.hidden_matrices(params)) == set(matrices) - outputs
    if name in ("resnet18_training", "vit", "llama_sdpa", "mlp_relu"):
        assert matrices[-1] in outputs


@pytest.mark.parametrize("name", ["resnet18_evaluating", "bert", "highway"])
def test_the_interior_is_the_map_without_residual_streams(name: str) -> None:
    example = _quietly(name)
    unit_map = trace(example.model, *example.args, **example.kwargs)
    interior = unit_map.interior()
    assert [layer.name for layer in unit_map if not layer.coupled] == [layer.name for layer in interior]
    coupled = {layer.name for layer in unit_map if layer.coupled}
    assert coupled
    reasons = dict(interior.refused)
    assert all("residual stream" in reasons[name] for name in coupled)
    assert not skipped(example.model, interior)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LARGE else ()) for n in ZOO])
def test_the_oracle_and_the_proof_confirm_the_map(name: str) -> None:
    example = _quietly(name)
    unit_map = trace(example.model, *example.args, **example.kwargs)
    oracle = Oracle(_quietly(name).model, example.args, example.kwargs, units=2 if len(unit_map) > 5 else 5)
    denied = [problem for layer in unit_map if (problem := oracle.deny(layer, complete=name not in ADDS_INPUTS))]
    assert not denied, denied
    proofs = prove(example.model, unit_map, *example.args, **example.kwargs)
    assert [proof.layer for proof in proofs] == [layer.name for layer in unit_map]
    assert all(proof.proved for proof in proofs), [proof for proof in proofs if not proof.proved]


# --- networks of random blocks --------------------------------------------------------------------------------------

BLOCKS = (
    "layer", "layer", "layer", "residual", "residual", "concatenation", "dense", "gated", "chunks", "highway", "norm",
    "norm", "depthwise", "grouped", "pool", "split", "heads", "attention", "tied", "twice", "unknown", "leak", "part",
    "permuted", "written", "dropout", "statistic", "scale", "rolled", "overwritten", "flat",
)  # fmt: skip
RECTIFIERS = (torch.atan, torch.tanh, F.gelu, torch.sigmoid, F.elu, F.silu, F.softplus, F.leaky_relu)


class _Grown(nn.Module):
    """A network of random blocks on vectors [b, n], sequences [b, t, n] or pictures [b, n, h, w].

    Args:
        kind: ``"vectors"``, ``"sequences"`` or ``"pictures"``.
        blocks: (block, two numbers that choose its details) in the order in which they are applied.
    """

    def __init__(self, kind: str, blocks: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.kind, self.parts, self.steps = kind, nn.ModuleList(), []
        self.width = 4
        for block, i, j in [("layer", 3, 0), *blocks]:
            self.grow(block, i, j)
        self.head = self.layer(self.width, 2)

    @property
    def axis(self) -> int:
        return 1 if self.kind in ("pictures", "vectors") else 2

    def layer(self, n: int, k: int, bias: bool = True) -> nn.Module:
        if self.kind == "pictures":
            return nn.Conv2d(n, k, 3, padding=1, bias=bias)
        return nn.Linear(n, k, bias=bias)

    def grow(self, name: str, i: int, j: int) -> None:
        found = self.block(name, i, j)
        if found is not None:
            parts, self.width, step = found
            self.parts.append(nn.ModuleList(parts))
            self.steps.append(step)
            if name == "flat":
                self.kind = "vectors"

    def block(self, name: str, i: int, j: int) -> tuple[list[nn.Module], int, Callable[[Any, Tensor], Tensor]] | None:
        """The block's parts, how many units it makes, and its function; none if it does not fit the kind or width."""
        n, k, f = self.width, 2 + i, RECTIFIERS[(i + j) % len(RECTIFIERS)]
        axis, layer, pictures, sequences = self.axis, self.layer, self.kind == "pictures", self.kind == "sequences"

        if name == "layer":
            return [layer(n, k, j % 3 > 0)], k, lambda p, x: f(p[0](x))
        if name == "residual":
            return [layer(n, k), layer(k, n)], n, lambda p, x: x + p[1](f(p[0](x)))
        if name == "concatenation":
            return [layer(n, k), layer(n, 3)], k + 3, lambda p, x: torch.cat([f(p[0](x)), p[1](x)], axis)
        if name == "dense":
            return [layer(n, k)], n + k, lambda p, x: torch.cat([x, f(p[0](x))], axis)
        if name == "gated":
            return [layer(n, k), layer(n, k)], k, lambda p, x: p[0](x) * torch.sigmoid(p[1](x))
        if name == "chunks" and j % 2:
            return [layer(n, 2 * k)], k, lambda p, x: F.glu(p[0](x), axis)
        if name == "chunks":
            return [layer(n, 2 * k)], k, lambda p, x: (c := p[0](x).chunk(2, axis))[0] * f(c[1])
        if name == "highway":
            return [layer(n, n), layer(n, n)], n, lambda p, x: torch.lerp(x, f(p[0](x)), torch.sigmoid(p[1](x)))
        if name == "norm":
            return [self.norm(n, j)], n, lambda p, x: p[0](x)
        if name == "depthwise" and pictures:
            return [nn.Conv2d(n, n, 3, padding=1, groups=n)], n, lambda p, x: f(p[0](x))
        if name == "grouped" and pictures and n % 2 == 0:
            return [nn.Conv2d(n, 2 * k, 1, groups=2)], 2 * k, lambda p, x: f(p[0](x))
        if name == "pool" and pictures:
            return [], n, lambda p, x: (F.avg_pool2d if j % 2 else F.max_pool2d)(x, 3, 1, 1)
        if name == "split" and n > 1:
            sizes = [n // 2, n - n // 2]
            return (
                [layer(sizes[0], k), layer(sizes[1], 2)],
                k + 2,
                lambda p, x: torch.cat(
                    [f(part(half)) for part, half in zip(p, x.split(sizes, axis), strict=True)], axis
                ),
            )
        if name == "heads" and n % 2 == 0 and sequences:
            return [], n, lambda p, x: x.unflatten(2, (2, -1)).transpose(2, 3).flatten(2)
        if name == "attention" and sequences:
            return (
                [nn.Linear(n, n) for _ in range(4)],
                n,
                lambda p, x: x + p[3](F.scaled_dot_product_attention(p[0](x), p[1](x), p[2](x))),
            )
        if name == "tied":
            return [layer(n, n)], n, lambda p, x: p[0](f(p[0](x)))
        if name == "twice":
            return [layer(n, n)], n, lambda p, x: p[0](x) + p[0](x * x)
        if name == "unknown":
            mixes: tuple[Callable[[Tensor], Tensor], ...] = (
                lambda x: x.softmax(axis), lambda x: x.sort(axis)[0], lambda x: x.cumsum(axis), lambda x: x.flip(axis),
                lambda x: F.normalize(x, dim=axis), lambda x: x - x.amax(axis, keepdim=True),
            )  # fmt: skip
            return [layer(n, n)], n, lambda p, x: mixes[j % 6](p[0](x))
        if name == "leak":
            return [], n, lambda p, x: self.leak(x, j)
        if name == "part" and n > 2:
            return [], n - 1, lambda p, x: x.narrow(axis, j % 2, n - 1)
        if name == "permuted":
            order = torch.randperm(n, generator=torch.Generator().manual_seed(j))
            return [], n, lambda p, x: x.index_select(axis, order)
        if name == "written":
            return [layer(n, n)], n, lambda p, x: _write(p[0](x), j)
        if name == "overwritten":
            return [layer(n, n), layer(n, 1)], n, lambda p, x: _overwrite(f(p[0](x)).clone(), p[1](x), axis, j)
        if name == "dropout":
            return [], n, lambda p, x: F.dropout(x, 0.1, self.training)
        if name == "statistic":
            return [layer(1, n)], n, lambda p, x: x * torch.sigmoid(p[0](x.mean(axis, keepdim=True)))
        if name == "scale":
            scale = nn.ParameterList([torch.ones((n, 1, 1) if pictures else n)])
            return [scale], n, lambda p, x: f(x * p[0][0])
        if name == "rolled":
            return [], n, lambda p, x: x + x.roll(1, axis)
        if name == "flat" and pictures:
            return [nn.Linear(n * 25, k)], k, lambda p, x: f(p[0](x.flatten(1)))
        if name == "flat" and sequences:
            return [], n, lambda p, x: x.mean(1) if j % 2 else x[:, 0]
        return None

    def norm(self, n: int, j: int) -> nn.Module:
        if self.kind == "pictures":
            return (nn.BatchNorm2d(n), nn.GroupNorm(1, n), nn.InstanceNorm2d(n, affine=True))[j % 3]
        norms = (nn.LayerNorm(n), nn.RMSNorm(n), RootMeanSquareNorm(n), nn.BatchNorm1d(n))
        return norms[j % (4 if self.kind == "vectors" else 3)]

    def leak(self, x: Tensor, j: int) -> Tensor:
        first = x.narrow(self.axis, 0, 1)
        self.leaks.append((x.sum(self.axis), first, x, x.amax(self.axis), first.sum())[j % 5])
        return x

    def forward(self, x: Tensor) -> Any:
        self.leaks: list[Tensor] = []
        for parts, step in zip(self.parts, self.steps, strict=True):
            x = step(parts, x)
        leaks, self.leaks = self.leaks, []
        return self.head(x), leaks


def _write(h: Tensor, j: int) -> Tensor:
    """Units written into memory that was there before, in one of four ways."""
    memory = torch.zeros_like(h)
    if j % 4 == 0:
        memory[:] = h
    elif j % 4 == 1:
        memory += h
    elif j % 4 == 2:
        memory.flatten(1)[:, :3].add_(h.flatten(1)[:, :3])
    else:
        torch.mul(h, 2.0, out=memory)
    return memory


def _overwrite(h: Tensor, other: Tensor, axis: int, j: int) -> Tensor:
    """One unit becomes another, or the sum of both, by way of a view."""
    view = h.narrow(axis, j % h.shape[axis], 1)
    if j % 2:
        view.copy_(other)
    else:
        view.add_(other)
    return h


def _grown(kind: str, blocks: list[tuple[str, int, int]], seed: int, training: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    shape = {"vectors": (4, 4), "sequences": (3, 3, 4), "pictures": (3, 4, 5, 5)}[kind]
    return randomise(_Grown(kind, blocks), seed).train(training), values(*shape, seed=seed)


_BLOCK = st.tuples(st.sampled_from(BLOCKS), st.integers(0, 4), st.integers(0, 11))
_NETWORKS = {
    "kind": st.sampled_from(["vectors", "sequences", "pictures"]),
    "blocks": st.lists(_BLOCK, min_size=1, max_size=6),
    "seed": st.integers(0, 1000), "training": st.booleans(),
}  # fmt: skip


def _hold_the_map_of(kind: str, blocks: list[tuple[str, int, int]], seed: int, training: bool) -> None:
    model, x = _grown(kind, blocks, seed, training)
    unit_map = trace(model, x)
    assert not skipped(model, unit_map)
    assert not overlaps(unit_map)
    assert all(reason for _, reason in unit_map.refused)
    copied, _ = _grown(kind, blocks, seed, training)
    oracle = Oracle(copied, (x,), units=2, seed=seed)
    proofs = prove(model, unit_map, x)
    # What a later block drops leaves the units before it without effect: the proof must say so, and of no others.
    silent = [proof.note == SILENT for proof in proofs]
    assert [proof.proved for proof in proofs] == [not mute for mute in silent], proofs
    pairs = zip(unit_map, silent, strict=True)
    denied = [problem for layer, mute in pairs if (problem := oracle.deny(layer, silent=mute))]
    assert not denied, denied


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(**_NETWORKS)
def test_every_layer_of_a_random_network_is_proved(
    kind: str, blocks: list[tuple[str, int, int]], seed: int, training: bool
) -> None:
    _hold_the_map_of(kind, blocks, seed, training)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(**_NETWORKS)
def test_every_layer_of_many_random_networks_is_proved(
    kind: str, blocks: list[tuple[str, int, int]], seed: int, training: bool
) -> None:
    _hold_the_map_of(kind, blocks, seed, training)


def _between() -> list[Any]:
    """(kind, block, the second numbers that choose its details); slow are all but two of the numbers, on vectors."""
    rows = []
    for block in sorted(set(BLOCKS)):
        many = block in ("unknown", "leak", "norm", "written", "overwritten")
        for kind in ("vectors", "sequences", "pictures"):
            usual = range(6 if many and kind != "vectors" else 2)
            marks = pytest.mark.slow if kind != "vectors" else ()
            rows.append(pytest.param(kind, block, usual, id=f"{block}-{kind}", marks=marks))
        if many:
            more = pytest.param("vectors", block, range(2, 6), id=f"{block}-vectors, more", marks=pytest.mark.slow)
            rows.append(more)
    return rows


@pytest.mark.parametrize(("kind", "block", "numbers"), _between())
def test_every_block_between_two_layers(kind: str, block: str, numbers: range) -> None:
    for j in numbers:
        _hold_the_map_of(kind, [(block, 2, j), ("layer", 1, 1)], j, bool(j % 2))


@pytest.mark.parametrize(("kind", "blocks", "silent"), [
    pytest.param("pictures", [("written", 0, 2), ("part", 0, 1)], ["parts.0.0"], id="all that reads them is dropped"),
    pytest.param("pictures", [("layer", 0, 1), ("grouped", 0, 0), ("part", 0, 0), ("part", 0, 0)], [],
                 id="one of two units"),
    pytest.param("pictures", [("layer", 2, 1), ("grouped", 0, 0), ("part", 0, 0), ("part", 0, 0)], [],
                 id="two of four units", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_units_without_effect_are_said_to_have_none(
    kind: str, blocks: list[tuple[str, int, int]], silent: list[str], training: bool
) -> None:
    """And no others: a layer of which some units come through is proved."""
    for seed in range(2):
        _hold_the_map_of(kind, blocks, seed, training)
        model, x = _grown(kind, blocks, seed, training)
        assert [proof.layer for proof in prove(model, trace(model, x), x) if not proof.proved] == silent


# --- wrong maps -----------------------------------------------------------------------------------------------------

WRONG = (
    "mlp_tanh", "pool_average", "layer_norm", "batch_norm_evaluating", "grouped_reader_in_four", "two_heads_of_a_trunk",
    "gated_linear_unit", "highway", "transformer_encoder_norm_first_evaluating", "gpt2",
)  # fmt: skip


WIDE = frozenset({"gpt2", "transformer_encoder_norm_first_evaluating"})
"""Those of many layers, which take long; the quicker tests of the same networks go on."""
every_wrong = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in WIDE else ()) for n in WRONG]
)


def _with(unit_map: UnitMap, number: int, **changes: Any) -> UnitMap:
    layers = list(unit_map)
    layers[number] = dataclasses.replace(layers[number], **changes)
    return dataclasses.replace(unit_map, layers=tuple(layers))


def _mapped(name: str) -> tuple[Example, UnitMap]:
    example = _quietly(name)
    unit_map = trace(example.model, *example.args, **example.kwargs)
    assert len(unit_map)
    return example, unit_map


def _caught(example: Example, wrong: UnitMap, number: int) -> None:
    proofs = prove(example.model, wrong, *example.args, **example.kwargs)
    assert not proofs[number].proved, wrong[number]
    assert proofs[number].note
    others = [proof for i, proof in enumerate(proofs) if i != number]
    assert all(proof.proved for proof in others), "a wrong layer makes another one fail"


@every_wrong
def test_swapped_columns_are_caught(name: str) -> None:
    """Any two units, of any reader: a proof by one random half of the units would miss every second pair."""
    example, unit_map = _mapped(name)
    for number, layer in enumerate(unit_map):
        pairs = [(i, j) for i in range(layer.size) for j in range(i)]
        for i, j in random.Random(number).sample(pairs, min(6, len(pairs))):
            for place, part in enumerate(layer.outgoing):
                index = part.index.clone()
                index[[i, j]] = index[[j, i]]
                outgoing = list(layer.outgoing)
                outgoing[place] = dataclasses.replace(part, index=index)
                _caught(example, _with(unit_map, number, outgoing=tuple(outgoing)), number)
                break  # one reader a pair


@every_wrong
def test_swapped_rows_are_caught(name: str) -> None:
    example, unit_map = _mapped(name)
    for number, layer in enumerate(unit_map):
        part = layer.incoming[0]
        index = part.index.clone()
        index[[0, -1]] = index[[-1, 0]]
        changed = (dataclasses.replace(part, index=index), *layer.incoming[1:])
        _caught(example, _with(unit_map, number, incoming=changed), number)


@every_wrong
def test_shifted_columns_are_caught(name: str) -> None:
    example, unit_map = _mapped(name)
    for number, layer in enumerate(unit_map):
        shifted = tuple(dataclasses.replace(part, index=part.index.roll(1, 0)) for part in layer.outgoing)
        _caught(example, _with(unit_map, number, outgoing=shifted), number)


@pytest.mark.parametrize(
    "name",
    [
        "two_heads_of_a_trunk",
        "highway",
        pytest.param("transformer_encoder_norm_first_evaluating", marks=pytest.mark.slow),
        pytest.param("bert", marks=pytest.mark.slow),
    ],
)
def test_a_dropped_reader_is_caught(name: str) -> None:
    example, unit_map = _mapped(name)
    tried = 0
    for number, layer in enumerate(unit_map):
        for place in range(len(layer.outgoing) if len(layer.outgoing) > 1 else 0):
            kept = layer.outgoing[:place] + layer.outgoing[place + 1 :]
            tap = kept[0].parameter
            _caught(example, _with(unit_map, number, outgoing=kept, tap=tap), number)
            tried += 1
    assert tried


def test_a_dropped_column_of_a_flattened_channel_is_caught() -> None:
    example, unit_map = _mapped("pool_average")
    number = next(i for i, layer in enumerate(unit_map) if layer.outgoing[0].index.shape[1] > 1)
    part = unit_map[number].outgoing[0]
    fewer = dataclasses.replace(part, index=part.index[:, 1:])
    _caught(example, _with(unit_map, number, outgoing=(fewer,)), number)


def test_another_layers_rows_are_caught() -> None:
    example, unit_map = _mapped("mlp_tanh")
    first = dataclasses.replace(unit_map[1], incoming=tuple(rows(f"0.{p}", 4) for p in ("weight", "bias")))
    _caught(example, dataclasses.replace(unit_map, layers=(unit_map[0], first)), 1)


def _masked(mask: list[float]) -> tuple[nn.Module, Tensor]:
    """A network of two units of which only those count that the mask lets through."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.c(m.b(m.a(x).tanh() * torch.tensor(mask)).tanh())  # type: ignore[no-any-return]

    return randomise(Net(forward, a=nn.Linear(6, 2), b=nn.Linear(2, 2), c=nn.Linear(2, 3))), values(8, 6)


@pytest.mark.parametrize(("mask", "silent"), [([0, 1], False), ([1, 0], False), ([0, 0], True)])
def test_a_layer_is_silent_only_if_all_of_it_is(mask: list[float], silent: bool) -> None:
    """Whichever half of the units is tried first; and half of the units without effect hide no contradiction."""
    model, x = _masked(mask)
    right, wrong = (made("a", 2, ["a.weight", "a.bias"], [reader]) for reader in ("b.weight", "c.weight"))
    for seed in range(4):
        assert prove(model, UnitMap((right,)), x, seed=seed) == [("a", not silent, SILENT if silent else "")]
        (proof,) = prove(model, UnitMap((wrong,)), x, seed=seed)
        assert not proof.proved
        assert (proof.note == SILENT) == silent


def test_a_parameter_that_the_model_lacks_is_caught() -> None:
    example, unit_map = _mapped("mlp_tanh")
    _caught(example, _with(unit_map, 0, outgoing=(rows("9.weight", 5, 1),), tap="9.weight"), 0)


def test_a_norm_that_is_not_held_is_caught() -> None:
    """A map that keeps silent about a norm over units claims too much."""
    example, unit_map = _mapped("layer_norm")
    wrong = dataclasses.replace(_with(unit_map, 0, normed=False), held=())
    assert not prove(example.model, wrong, *example.args)[0].proved


@pytest.mark.parametrize("name", ["sum_over_units", "also_an_output", "mean_over_units_read_elsewhere"])
def test_what_must_be_refused_is_not_proved_when_claimed_by_hand(name: str) -> None:
    example = _quietly(name)
    which = "b" if name == "also_an_output" else "a"
    layer = made(which, 5, [f"{which}.weight", f"{which}.bias"], ["c.weight"])
    (proof,) = prove(example.model, UnitMap((layer,)), *example.args)
    assert not proof.proved
    assert proof.note


# --- no trace -------------------------------------------------------------------------------------------------------


def _everything(model: nn.Module) -> dict[str, Any]:
    """All of a model that could change."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "tensors": {name: (id(t), t.data_ptr(), t.requires_grad, t.detach().clone()) for name, t in tensors},
        "gradients": {n: (id(p.grad), None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()},
        "modes": [module.training for module in model.modules()],
        "hooks": [
            {key: list(hooks) for key, hooks in vars(m).items() if key.endswith("_hooks")} for m in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "forwards": [module.__dict__.get("forward") for module in model.modules()],
        "random": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "settings": (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.overrides._get_current_function_mode_stack(),
        ),
    }


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_equal, left, right))
    return bool(left == right)


LIVED_IN = (
    "vgg", "resnet18_training", "batch_norm_training", "batch_norm_evaluating", "mlp_dropout", "llama_training", "t5",
    "transformer_encoder_norm_last_training", "transformer_encoder_norm_first_evaluating", "gpt2", "lora_on_bert",
    "weight_norm", "written_into_a_buffer_of_the_module", "noisy_network", "shared_weight", "lstm",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in LARGE or n in ("resnet18_training", "gpt2") else ())
        for n in LIVED_IN
    ],
)
def test_tracing_and_proving_leave_no_trace(name: str) -> None:
    example = _quietly(name)
    model = example.model
    list(model.modules())[-1].training ^= True  # modes differ from module to module
    for i, p in enumerate(model.parameters()):
        if p.requires_grad and i % 2:
            p.grad = torch.rand_like(p)
    model.register_forward_hook(lambda *_: None)
    inputs = [t.clone() for t in leaves((example.args, example.kwargs))]
    torch.manual_seed(5)
    model(*example.args, **example.kwargs)  # what a forward pass leaves behind is there before
    before = _everything(model)
    unit_map = trace(model, *example.args, **example.kwargs)
    for key, value in _everything(model).items():
        assert _equal(before[key], value), f"trace changed {key}"
    prove(model, unit_map, *example.args, **example.kwargs)
    for key, value in _everything(model).items():
        assert _equal(before[key], value), f"prove changed {key}"
    assert _same(inputs, leaves((example.args, example.kwargs)))


@pytest.mark.parametrize("name", ["inverted_residual", pytest.param("resnet18_training", marks=pytest.mark.slow)])
def test_two_traces_and_two_proofs_are_alike(name: str) -> None:
    example = _quietly(name)
    first, second = (trace(example.model, *example.args) for _ in range(2))
    assert [layer.name for layer in first] == [layer.name for layer in second]
    assert (first.refused, first.outputs, first.order) == (second.refused, second.outputs, second.order)
    assert prove(example.model, first, *example.args) == prove(example.model, second, *example.args)


@pytest.mark.parametrize("training", [True, False])
def test_a_gradient_can_be_taken_through_a_pass_made_before(training: bool) -> None:
    """Whoever attaches a method between the forward and the backward pass must not lose the graph."""
    example = _quietly("vgg")
    model = example.model.train(training)
    torch.manual_seed(0)
    loss = model(*example.args).square().sum()
    expected = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    prove(model, trace(model, *example.args), *example.args)
    again = torch.autograd.grad(loss, list(model.parameters()))
    assert _same(list(expected), list(again))


def test_a_forward_pass_that_raises_leaves_no_trace() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.passes = nn.Linear(6, 5), nn.BatchNorm1d(5), 0

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(self.norm(self.a(x)))
            raise KeyError("mine")

    model = Broken()
    unit_map = UnitMap((made("a", 5, ["a.weight"], ["a.weight"]),))
    before = _everything(model)
    for call in (lambda: trace(model, values(4, 6)), lambda: prove(model, unit_map, values(4, 6))):
        with pytest.raises(KeyError, match="mine"):
            call()
        for key, value in _everything(model).items():
            assert _equal(before[key], value), key


def test_a_network_that_changes_its_input_finds_it_as_it_was() -> None:
    """As a network does that begins with a rectifier in place: the example is the user's."""
    model = randomise(nn.Sequential(nn.ELU(inplace=True), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)))
    x = values(8, 6)
    unit_map = trace(model, x)
    assert torch.equal(x, values(8, 6))
    assert [layer.name for layer in unit_map] == ["1"]
    assert all(proof.proved for proof in prove(model, unit_map, x))
    assert torch.equal(x, values(8, 6))


def test_a_network_that_replaces_its_buffers_finds_them_as_they_were() -> None:
    """As a network does that counts its passes with ``self.passes = self.passes + 1``."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.passes = m.passes + 1
        return m.b(m.a(x).tanh())

    model = randomise(Net(forward, a=nn.Linear(6, 5), b=nn.Linear(5, 2)))
    model.register_buffer("passes", torch.zeros(()))
    before = _everything(model)
    prove(model, trace(model, values(8, 6)), values(8, 6))
    for key, value in _everything(model).items():
        assert _equal(before[key], value), key


def test_parameters_that_share_memory_are_refused() -> None:
    """Two parameters, one memory: a change of one is a change of the other, whatever their names say."""
    model = randomise(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)))
    model[2].weight = nn.Parameter(model[0].weight.data)
    unit_map = trace(model, values(8, 5))
    assert not {"0", "2"} & {layer.name for layer in unit_map}
    assert {"0", "2"} <= dict(unit_map.refused).keys()


def test_tracing_under_the_users_own_modes() -> None:
    example = _quietly("mlp_relu")
    expected = [layer.name for layer in trace(example.model, *example.args)]
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            assert [layer.name for layer in trace(example.model, *example.args)] == expected


def test_tracing_after_the_collector_was_told_to_forget() -> None:
    """``gc.freeze()``, as servers call it that fork: what was there before is not shown any more."""
    example = _quietly("two_heads_of_a_trunk")
    gc.freeze()
    try:
        unit_map = trace(example.model, *example.args)
    finally:
        gc.unfreeze()
    assert [layer.name for layer in unit_map] == ["trunk"]


def test_half_precision() -> None:
    example = _quietly("mlp_relu")
    model, x = example.model.to(torch.bfloat16), example.args[0].to(torch.bfloat16)
    unit_map = trace(model, x)
    assert [layer.name for layer in unit_map] == ["0", "2"]
    assert all(proof.proved for proof in prove(model, unit_map, x))


# --- maps by name ---------------------------------------------------------------------------------------------------


def _untraceable() -> tuple[nn.Module, Tensor]:
    """A network whose middle is out of sight."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.bn1(m.fc1(x))
        return m.fc2(_OutOfSight.apply(h))  # type: ignore[no-any-return]

    model = Net(forward, fc1=nn.Linear(6, 5), bn1=nn.BatchNorm1d(5), fc2=nn.Linear(5, 2), other=nn.Linear(3, 2))
    return randomise(model), values(8, 6)


class _OutOfSight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_a_map_by_name() -> None:
    model, x = _untraceable()
    assert not len(trace(model, x))
    unit_map = UnitMap.by_name(model, [{"incoming": ["fc1"], "norms": ["bn1"], "outgoing": ["fc2"]}])
    (layer,) = unit_map
    assert (layer.name, layer.size, layer.tap) == ("fc1", 5, "fc2.weight")
    assert {part.parameter for part in layer.incoming} == {"fc1.weight", "fc1.bias"}
    assert {part.parameter for part in layer.norms} == {
        "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"
    }  # fmt: skip
    assert prove(model, unit_map, x) == [("fc1", True, "")]
    assert not Oracle(_untraceable()[0], (x,)).deny(layer)


def test_a_map_by_name_that_is_wrong_is_not_proved() -> None:
    example = _quietly("two_heads_of_a_trunk")
    unit_map = UnitMap.by_name(example.model, [{"incoming": ["trunk"], "outgoing": ["policy"]}])
    (proof,) = prove(example.model, unit_map, *example.args)
    assert not proof.proved


@pytest.mark.parametrize(("spec", "word"), [
    ({"incoming": ["fc"], "outgoing": ["fc2"]}, "'fc'"),
    ({"incoming": ["fc1"], "outgoing": ["fc3"]}, "fc3"),
    ({"incoming": ["fc1"], "norms": ["bn2"], "outgoing": ["fc2"]}, "bn2"),
    ({"incoming": ["fc1"], "outgoing": ["other"]}, "other"),
    ({"incoming": ["fc1", "other"], "outgoing": ["fc2"]}, "other"),
    ({"incoming": ["fc1"], "readers": ["fc2"], "outgoing": ["fc2"]}, "readers"),
    ({"incoming": ["fc1"]}, "reads"),
    ({"outgoing": ["fc2"]}, "makes"),
], ids=["unknown producer", "unknown reader", "unknown norm", "reader of another size", "producer of another size",
        "unknown key", "no reader", "no producer"])  # fmt: skip
def test_a_map_by_name_that_does_not_fit_says_why(spec: dict[str, list[str]], word: str) -> None:
    model, _ = _untraceable()
    with pytest.raises((ValueError, KeyError), match=word):
        UnitMap.by_name(model, [spec])
