"""The optimizer rules as ``torch.optim.Optimizer``: ``perennial.optim.UPGD(model.named_parameters(), lr=0.01)``.

There is one class for every rule in ``perennial.methods.REGISTRY``, made from it: the arithmetic, the defaults and
the ranges are the rule's, and a lane of a :class:`~perennial.population.Population` with the same seed makes the same
steps.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from perennial import upgd_native
from perennial.methods import REGISTRY, Context, Rule
from perennial.methods.base import State, Tensors
from perennial.native import NativeRule, key_of, labels_of, native_rule
from perennial.noise import Noise, label_words, seed_key
from perennial.units import UnitMap
from perennial.units import along as _along

_CHUNK = 1 << 18
"""Normal numbers made at a time on a processor."""

UNITS = "units"
"""Under which ``optimizer.state`` holds what a rule keeps by unit: {field: {layer: tensor}}."""


class RuleOptimizer(Optimizer):
    """Base of the optimizers here. Not made itself; see the classes of this module.

    Args:
        params: parameters, ``named_parameters()`` or parameter groups, as for any optimizer of torch. A group may have
            every number of its own. Noise depends on the parameters' names, or on their positions where they have none.
        lr: step size, a float or a tensor of one element. Default: the rule's.
        units: the network's hidden units, for what goes by unit: ``perennial.trace(model, example)``. Needs names.
        curvature: the diagonal of the Hessian by parameter name when called, for rules of second order: the
            ``diagonal`` of a :class:`perennial.curvature.HesScale` or :class:`~perennial.curvature.Hutchinson`. Needs
            names.
        loss: the loss [] on the batch of the step as a function of changed parameters, by name, for ``order="exact"``.
            Needs names.
        seed: of the noise, which is a function of seed, step, name and element alone; stands in the parameter groups.
        maximize: go up instead of down.
        foreach: False makes the step parameter by parameter, with the least memory; True and None all at once. The
            numbers are the same.
        compiled: make the step one native function, when it is first called (seconds to a minute, kept on disk): far
            faster wherever noise is drawn. Needs a C++ compiler; without one a warning says that the step runs as it
            is.
        **settings: the rule's hyper-parameters by name.

    Raises:
        TypeError: an unknown setting, with the nearest known one.
        ValueError: a number out of range, duplicate parameters, something missing that the rule needs.
    """

    rule: ClassVar[type[Rule]]
    """The rule that it runs."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor | None = None,
        *,
        units: UnitMap | None = None,
        curvature: Callable[[], Tensors] | None = None,
        loss: Callable[[Tensors], Tensor] | None = None,
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        compiled: bool = False,
        **settings: Any,
    ) -> None:
        fields = {field.name: field.default for field in dataclasses.fields(self.rule)}
        for name in settings:
            if name not in fields:
                near = difflib.get_close_matches(name, fields, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"its settings are {', '.join(fields)}"
                raise TypeError(f"{type(self).__name__} has no setting {name!r}; {hint}")
        if lr is not None:
            settings["lr"] = lr
        if isinstance(settings.get("lr"), Tensor) and settings["lr"].numel() != 1:
            raise ValueError(f"lr has {settings['lr'].numel()} elements; it is a float or a tensor of one")
        seed_key(seed, "method")
        self._units, self._curvature, self._loss = units or UnitMap(()), curvature, loss
        self._compiled = compiled
        self._state_type: Any = None
        self._matrices: dict[Tensor, _Matrices] = {}
        defaults = {**fields, **settings, "seed": seed, "maximize": maximize, "foreach": foreach}
        rule = self._bound(defaults, checked=True)
        if compiled and (rule.needs or len(self._units)):
            raise ValueError(
                "compiled=True works parameter by parameter: leave it out with units=, and with an order other than 1"
            )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group's numbers are checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            rule = self._bound(group, checked=True)
            self._check_needs(rule, group)
            for p in group["params"]:
                if p.is_complex() or not p.is_floating_point():
                    raise ValueError(f"{type(self).__name__} trains real numbers; a parameter is {p.dtype}")
        except Exception:
            self.param_groups.pop()
            raise

    def _check_needs(self, rule: Rule, group: Mapping[str, Any]) -> None:
        given = {"curvature": self._curvature, "loss": self._loss}
        for need in rule.needs:
            if need not in given:
                raise ValueError(f"{rule.name} needs {need}, which an optimizer does not see")
            if given[need] is None:
                raise ValueError(f"{rule.name} with these settings needs {need}=, a function; see the class's page")
        if (rule.needs or len(self._units)) and "param_names" not in group:
            raise ValueError(f"{rule.name} goes by name here: give model.named_parameters() in place of parameters()")
        if _feature_wise(rule):
            if len(self.param_groups) > 1:
                raise ValueError("a unit's weights may lie in several groups: feature-wise there must be only one")
            held = set(group["param_names"])
            for layer in self._units:
                absent = [part.parameter for part in layer.outgoing if part.parameter not in held]
                if absent:
                    raise ValueError(
                        f"the utility of the units of {layer.name} is read off {', '.join(absent)}, which this "
                        "optimizer does not hold: give it that too, or a unit map without the layer"
                    )

    def _bound(self, group: Mapping[str, Any], *, checked: bool = False) -> Rule:
        values = {field.name: group[field.name] for field in dataclasses.fields(self.rule)}
        if checked:
            return self.rule(**values)
        return self.rule().bound(values)

    # --- the step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the gradients that the parameters hold; a parameter without a gradient is left alone.

        Args:
            closure: computes the loss and the gradients anew; its result is returned.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for parts in self._parts().values():
            if len(self._units) and _feature_wise(self._bound(parts[0].group)):
                self._check_gradients(parts)
            if self._compiled:
                self._run_native(parts)
            else:
                self._run(parts)
        return result

    def _parts(self) -> dict[torch.device, list[_Part]]:
        """The parameters that have a gradient, in parts of one group, one device and one step count, by device."""
        found: dict[tuple[int, torch.device, int], _Part] = {}
        number = 0
        for position, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for place, p in enumerate(group["params"]):
                name = names[place] if names else str(number)
                number += 1
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} takes no sparse gradients; {name} has one")
                count = int(self.state[p]["step"]) if "step" in self.state[p] else 0
                key = position, p.device, count
                if key not in found:
                    found[key] = _Part(group, count, {})
                found[key].params[name] = p
        by_device: dict[torch.device, list[_Part]] = {}
        for (_, device, _), part in found.items():
            self._start(part)
            by_device.setdefault(device, []).append(part)
        return by_device

    def _check_gradients(self, parts: Sequence[_Part]) -> None:
        there = parts[0].params if len(parts) == 1 else {}
        for layer in self._units:
            for part in layer.outgoing:
                if part.parameter not in there:
                    raise RuntimeError(
                        f"the utility of the units of {layer.name} needs the gradient of {part.parameter}, which has "
                        "none, on the device and with the step count of all the others"
                    )

    def _start(self, part: _Part) -> None:
        """State for parameters that have none yet."""
        new = {n: self._shown(_working(p)) for n, p in part.params.items() if "step" not in self.state[p]}
        if not new:
            return
        state = self._bound(part.group).init(new, self._units)
        for field, value in _dicts(state).items():
            for key, entry in value.items():
                own = pytree.tree_map(torch.clone, entry)  # rules may give one tensor to several fields
                if key in new:
                    p = part.params[key]
                    self._own(p)[field] = own.view(p.shape) if _is_like(own, new[key]) else own
                else:
                    self._by_unit.setdefault(field, {}).setdefault(key, own)
        for name in new:
            self.state[part.params[name]]["step"] = torch.zeros((), dtype=torch.float32)

    def _shown(self, tensor: Tensor) -> Tensor:
        """A parameter as the rule sees it: a matrix, but for what goes by unit."""
        return tensor if len(self._units) else _matrix(tensor)

    def _own(self, p: Tensor) -> dict[str, Any]:
        return self.state[p]  # type: ignore[no-any-return]

    @property
    def _by_unit(self) -> dict[str, dict[str, Any]]:
        """What the rule keeps by unit: {field: {layer: tensor}}."""
        state: dict[Any, dict[str, dict[str, Any]]] = self.state
        return state.setdefault(UNITS, {}) if self._units else {}

    def _state_of(self, part: _Part) -> State:
        """The rule's own record, of the tensors that ``optimizer.state`` holds."""
        kind = self._record(part)
        if kind is None:
            return ()
        found: dict[str, dict[str, Any]] = {field: {} for field in kind._fields}
        for name, p in part.params.items():
            for field, entry in self._own(p).items():
                if field in found:
                    found[field][name] = self._shown(entry) if _is_like(entry, p) else entry
        for field, entries in self._by_unit.items():
            found[field] |= entries
        return kind(**found)

    def _record(self, part: _Part) -> Any:
        """The type of the rule's state; None if it has none."""
        if self._state_type is None:
            example = {n: self._shown(torch.empty(p.shape, device="meta")) for n, p in part.params.items()}
            self._state_type = type(self._bound(part.group).init(example, self._units))
        return self._state_type if hasattr(self._state_type, "_fields") else None

    def _run(self, parts: Sequence[_Part]) -> None:
        noises = [self._noise(part) for part in parts]
        calls = [
            _Call(
                self._bound(part.group),
                {n: self._shown(_working(p)) for n, p in part.params.items()},
                {n: self._shown(_gradient(p, part.group["maximize"])) for n, p in part.params.items()},
                self._state_of(part),
                Noise(*noise, chunk=_CHUNK if noise[0].device.type == "cpu" else None),
            )
            for part, noise in zip(parts, noises, strict=True)
        ]
        for part, (changed, state) in zip(parts, self._advance(calls, [p.split for p in parts]), strict=True):
            for name, value in changed.items():
                p = part.params[name]
                p.copy_(value.view(p.shape))
            self._keep(part, state)

    def _advance(
        self, calls: Sequence[_Call], split: Sequence[bool]
    ) -> list[tuple[dict[str, Tensor], dict[str, dict[str, Any]]]]:
        """The changed parameters and the next state of every part: pure."""
        curvature = self._curvature() if self._curvature is not None else {}
        contexts = [
            Context(
                call.grads, {}, call.noise.scoped(call.rule.name), self._units, loss=self._loss, curvature=curvature
            )
            for call in calls
        ]
        shared: dict[str, Tensor] = {}
        for call, context in zip(calls, contexts, strict=True):
            for name, value in call.rule.shared(call.params, call.state, context).items():
                shared[name] = torch.maximum(shared[name], value) if name in shared else value
        found = []
        for call, context, apart in zip(calls, contexts, split, strict=True):
            changed: dict[str, Tensor] = {}
            kept: dict[str, dict[str, Any]] = {}
            portions = [{n: w} for n, w in call.params.items()] if apart else [call.params]
            for portion in portions:
                new, state = call.rule.step(portion, call.state, context._replace(shared=shared))
                changed |= new
                for field, entries in _dicts(state).items():
                    kept.setdefault(field, {}).update(entries)
            found.append((changed, kept))
        return found

    def _keep(self, part: _Part, state: Mapping[str, Mapping[str, Any]]) -> None:
        for field, value in state.items():
            for key, entry in value.items():
                if key in part.params:
                    p = part.params[key]
                    self._own(p)[field] = entry.view(p.shape) if _is_like(entry, self._shown(p)) else entry
                else:
                    self._by_unit[field][key] = entry
        for p in part.params.values():
            self.state[p]["step"] += 1

    def _noise(self, part: _Part) -> tuple[Tensor, Tensor]:
        device = next(iter(part.params.values())).device
        return key_of(part.group["seed"], device), torch.tensor(part.made, dtype=torch.int32, device=device)

    # --- fresh weights ----------------------------------------------------------------------------------------------

    def renew(self, parameter: Tensor, dim: int, positions: Tensor, hit: Tensor | None = None) -> None:
        """Start the counts of a parameter anew at positions along a dimension; its other state is reset by whoever
        resets optimizers, :func:`perennial.attach` above all.

        Args:
            parameter: one of the optimizer's.
            dim: the dimension.
            positions: int64 [k], distinct.
            hit: bool [k], which of the positions are meant; None: all.
        """
        for entry in self.state.get(parameter, {}).values():
            if isinstance(entry, tuple):
                if len(self._units):
                    counts, along = entry[dim], dim
                else:  # of the matrix: rows, and the columns of all other dimensions
                    rows = dim == 0 and parameter.dim() > 1
                    counts = entry[0] if rows else entry[1].view(1, *parameter.shape[1 if parameter.dim() > 1 else 0 :])
                    along = 0 if rows else max(dim, 1)
                kept = counts.index_select(along, positions)
                gone = torch.zeros_like(kept) if hit is None else kept * _along(~hit, along, kept.dim())
                counts.index_copy_(along, positions, gone)

    def renew_units(self, layer: str, units: Tensor) -> None:
        """Start anew what is kept by unit; ``units`` is bool [units]."""
        for entries in self._by_unit.values():
            for tensor in pytree.tree_leaves(entries.get(layer, ())):
                tensor.masked_fill_(units, 0)

    # --- compiled ---------------------------------------------------------------------------------------------------

    def _run_native(self, parts: Sequence[_Part]) -> None:
        """The same step by native functions that overwrite parameters and state, parameter by parameter.

        What is done here for every parameter is kept short: a small one is stepped in some twenty microseconds.
        """
        every = [p for part in parts for p in part.params.values()]
        if all(upgd_native.makes(self.rule, part.group) for part in parts) and upgd_native.takes(every):
            return self._run_upgd(parts)
        jobs: list[_Job] = []
        for part in parts:
            group, (key, step) = part.group, self._noise(part)
            made: dict[torch.dtype, tuple[NativeRule, list[Tensor]]] = {}
            for name, p in part.params.items():
                if p.dtype not in made:
                    found = native_rule(
                        self.rule,  # type: ignore[arg-type]
                        self._structure(group),
                        p.dtype,
                        group["maximize"],
                        torch.get_num_threads(),
                        p.device,
                    )
                    if found is None:
                        self._compiled = False
                        return self._run(parts)
                    made[p.dtype] = found, found.given_numbers(group, p.device)
                native, numbers = made[p.dtype]
                given = [_gradient_matrix(p), *numbers, key, labels_of(self.rule.name, name, p.device), step]
                jobs.append(_Job(p, native, self._matrices_of(p, part).tensors, given))
        most = self._surveyed(jobs)
        for p, native, tensors, given in jobs:
            assert native.step is not None
            native.step([*tensors, *given, most[native]])
            _put_back(tensors[0], p)
        torch._foreach_add_([self.state[p]["step"] for p, *_ in jobs], 1)

    def _run_upgd(self, parts: Sequence[_Part]) -> None:
        found: list[upgd_native.Parameter] = []
        copies: list[tuple[Tensor, Tensor]] = []
        held = []  # gradients that are copies, until the step is made
        for place, part in enumerate(parts):
            for name, p in part.params.items():
                known = self._matrices_of(p, part)
                if known.native is None:
                    known.native = upgd_native.parameter_of(known.tensors, label_words(self.rule.name, name))
                grad = p.grad
                assert grad is not None
                if grad.dtype != p.dtype or not grad.is_contiguous():
                    grad = _gradient_matrix(p)
                    held.append(grad)
                known.native.gradients = grad.data_ptr()
                known.native.group = place
                found.append(known.native)
                if known.tensors[0].data_ptr() != known.data_ptr:
                    copies.append((known.tensors[0], p))
        groups = [upgd_native.group_of(part.group, part.made) for part in parts]
        upgd_native.step(found, groups, known.tensors[0].dtype, torch.get_num_threads())
        for matrix, p in copies:
            _put_back(matrix, p)
        for part in parts:
            for p in part.params.values():
                self.state[p]["step"].add_(1)

    def _matrices_of(self, p: Tensor, part: _Part) -> _Matrices:
        """A parameter and its state as a native function takes them; remembered until one of them is another."""
        own, kind = self._own(p), self._record(part)
        fields = kind._fields if kind is not None else ()
        entries = [own[field] for field in fields if field in own]
        known = self._matrices.get(p)
        if known is not None and known.of(p, entries):
            return known
        leaves = [leaf for entry in entries for leaf in pytree.tree_leaves(entry)]
        tensors = [_matrix(p), *(t if t.shape != p.shape else _matrix(t) for t in leaves)]
        found = _Matrices(p.data_ptr(), p.shape, entries, tensors)
        if all(m.data_ptr() == t.data_ptr() for m, t in zip(tensors, (p, *leaves), strict=True)):  # not copies
            self._matrices[p] = found
        return found

    def _surveyed(self, jobs: Sequence[_Job]) -> dict[NativeRule, Tensor]:
        """What every native function needs to know of all parameters, in the order of its ``shared``."""
        by_native: dict[NativeRule, list[_Job]] = {}
        for job in jobs:
            by_native.setdefault(job.native, []).append(job)
        found: dict[NativeRule, Tensor] = {}
        most: dict[str, Tensor] = {}
        for native, its in by_native.items():
            like = its[0].tensors[0]
            found[native] = torch.empty(0, dtype=native.wide, device=like.device)
            if native.survey is None:
                continue
            rows = [found[native].new_empty(len(native.shared)) for _ in its]
            for row, job in zip(rows, its, strict=True):
                native.survey([row, *job.tensors, *job.given])
            found[native] = torch.stack(rows).amax(0)
            if len(by_native) > 1:
                for name, value in zip(native.shared, found[native].unbind(), strict=True):
                    most[name] = torch.maximum(most[name], value) if name in most else value
        if len(by_native) == 1:
            return found
        return {n: _stacked([most[name].to(n.wide) for name in n.shared], found[n]) for n in found}

    def _structure(self, group: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        """The rule's settings that are no numbers: for what a native function is made."""
        scalars, fields = _settings(self.rule)  # type: ignore[arg-type]
        return tuple((name, group[name]) for name in fields if name not in scalars or group[name] is None)

    # --- saving -----------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every tensor of the state keeps its own type of number: torch casts it to the parameter's,
        in which a count stops counting."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        order = [number for group in state_dict["param_groups"] for number in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(order, mine, strict=True):
            for field, value in saved.get(number, {}).items():
                if field != "step":
                    self.state[p][field] = _copied(value, p.device)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_units", "_curvature", "_loss", "_compiled", "_state_type")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._matrices = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            for p in group["params"]:
                count = self.state.get(p, {}).get("step")
                if count is not None and not isinstance(count, Tensor):
                    self.state[p]["step"] = torch.tensor(float(count))


class _Part(NamedTuple):
    """Parameters that one call of the rule steps: of one group, one device and one count."""

    group: dict[str, Any]
    made: int
    params: dict[str, Tensor]

    @property
    def split(self) -> bool:
        return self.group["foreach"] is False


class _Job(NamedTuple):
    """One parameter's step by a native function, which takes [*tensors, *given, what is shared]."""

    p: Tensor
    native: NativeRule
    tensors: list[Tensor]
    given: list[Tensor]


@dataclasses.dataclass
class _Matrices:
    """Views of a parameter and its state, and of what."""

    data_ptr: int
    shape: torch.Size
    entries: list[Any]
    tensors: list[Tensor]
    native: upgd_native.Parameter | None = None
    """The same for :mod:`perennial.upgd_native`."""

    def of(self, p: Tensor, entries: Sequence[Any]) -> bool:
        """Whether these are still the views of them."""
        if self.data_ptr != p.data_ptr() or self.shape != p.shape or len(self.entries) != len(entries):
            return False
        return all(map(operator.is_, self.entries, entries))


class _Call(NamedTuple):
    """What the rule is given."""

    rule: Rule
    params: dict[str, Tensor]
    grads: dict[str, Tensor]
    state: State
    noise: Noise


def _copied(value: Any, device: torch.device) -> Any:
    def copy(tensor: Tensor) -> Tensor:
        return tensor.to(device, copy=True)

    return pytree.tree_map_only(Tensor, copy, value)


def _working(tensor: Tensor) -> Tensor:
    """In the type of number that the step is computed in: float32 where the parameter has fewer digits."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.detach()


def _matrix(tensor: Tensor) -> Tensor:
    """[rows, columns], contiguous: a row an output, or one row of what has a single dimension."""
    if tensor.dim() == 2 and tensor.is_contiguous():
        return tensor.detach()
    return tensor.detach().reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1).contiguous()


def _gradient_matrix(p: Tensor) -> Tensor:
    """A parameter's gradient as a native function takes it."""
    assert p.grad is not None
    return _matrix(p.grad if p.grad.dtype == p.dtype else p.grad.to(p.dtype))


def _put_back(matrix: Tensor, p: Tensor) -> None:
    """What a native function wrote, if the parameter is not contiguous: the matrix is a copy."""
    if matrix.data_ptr() != p.data_ptr():
        p.copy_(matrix.view(p.shape))


@functools.cache
def _settings(rule: type[Rule]) -> tuple[frozenset[str], tuple[str, ...]]:
    """The names of a rule's numbers, and of all its settings."""
    return frozenset(rule.scalars()), tuple(field.name for field in dataclasses.fields(rule))


def _is_like(entry: Any, p: Tensor) -> bool:
    return isinstance(entry, Tensor) and entry.shape == p.shape


def _stacked(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values) if values else like.new_zeros(0)


def _gradient(p: Tensor, maximize: bool) -> Tensor:
    assert p.grad is not None
    return -_working(p.grad) if maximize else _working(p.grad)


def _feature_wise(rule: Rule) -> bool:
    return getattr(rule, "granularity", "") == "feature"


def _dicts(state: State) -> dict[str, dict[str, Any]]:
    return {k: v for k, v in state._asdict().items() if isinstance(v, dict)} if hasattr(state, "_fields") else {}


def _made_of(rule: type[Rule]) -> type[RuleOptimizer]:
    """The optimizer class of a rule, with its documentation and signature."""
    made = type(rule.__name__, (RuleOptimizer,), {"rule": rule, "__module__": __name__, "__doc__": rule.__doc__})
    fixed = list(inspect.signature(RuleOptimizer.__init__).parameters.values())[1:-1]
    own = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(rule)
    ]
    lr = next(f for f in own if f.name == "lr")
    fixed[1] = fixed[1].replace(default=lr.default)
    made.__signature__ = inspect.Signature([*fixed[:2], *(f for f in own if f is not lr), *fixed[2:]])  # type: ignore[attr-defined]
    return made


OPTIMIZERS: dict[str, type[RuleOptimizer]] = {r.__name__: _made_of(r) for r in REGISTRY if issubclass(r, Rule)}
"""The class of every rule by its name; each is an attribute of this module too."""

globals().update(OPTIMIZERS)
__all__ = ["OPTIMIZERS", "RuleOptimizer", *OPTIMIZERS]

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[RuleOptimizer]: ...
