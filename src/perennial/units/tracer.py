"""The function mode that carries unit numbers through a forward pass; :mod:`perennial.units.trace` says how."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from perennial.units import operations as known
from perennial.units.record import (
    Counter,
    Producer,
    Reader,
    Record,
    both_tensors,
    laid,
    representative,
    tensors_in,
    units_in,
    varies,
    without_repeats,
)
from perennial.units.special import SPECIAL


def _kinds(kind: type) -> frozenset[type]:
    """A class and every class made of it."""
    return frozenset({kind}).union(*map(_kinds, type.__subclasses__(kind)))


class Tracer(Counter):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.record = Record()
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.buffers = {id(b): name for name, b in model.named_buffers()}
        self.shadows: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self.statistics: dict[int, tuple[weakref.ref[Tensor], Tensor, list[int]]] = {}
        self.moments = 0
        self.drawn_from: dict[int, str] = {}  # first unit number of a parameter used by itself -> its name

        # Tensors that are there before the pass, and what is made in it. Not by id alone: memory is used again.
        self.at_hand: list[Tensor] = []  # shadows of what was alive after the last operation
        # A lookup of the type: there are hundreds of thousands of objects, and a subclass test takes twice as long. The
        # model's own are named beside them, since after gc.freeze() the collector shows nothing that was there before.
        kinds = _kinds(Tensor)
        there = [t for t in gc.get_objects() if type(t) in kinds]
        self.made = {id(t): weakref.ref(t) for t in (*there, *model.parameters(), *model.buffers())}

    # --- what is not seen -------------------------------------------------------------------------------------------

    def note(self, out: Any) -> None:
        for tensor in tensors_in(out):
            self.made[id(tensor)] = weakref.ref(tensor)
        self.shadows = {key: entry for key, entry in self.shadows.items() if entry[0]() is not None}
        self.at_hand = [shadow for _, shadow in self.shadows.values()]

    def look(self, tensors: Sequence[Tensor]) -> None:
        """A tensor that was not there before and that no operation made comes from code out of sight (``torch.jit``,
        ``torch.func``, NumPy). It may have read whatever was at hand after the operation before."""
        for tensor in tensors:
            made = self.made.get(id(tensor))
            if tensor.is_floating_point() and (made is None or made() is not tensor):
                for shadow in self.at_hand:
                    self.end(shadow, "code that cannot be followed (torch.jit, torch.func, NumPy) may read it")
                self.made[id(tensor)] = weakref.ref(tensor)

    # --- shadows ----------------------------------------------------------------------------------------------------

    def shadow(self, tensor: Any) -> Tensor | None:
        entry = self.shadows.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def statistic(self, tensor: Any) -> tuple[Tensor, list[int]] | None:
        """The units of which a tensor holds a statistic, and the operations that computed it."""
        entry = self.statistics.get(id(tensor))
        return entry[1:] if entry is not None and entry[0]() is tensor else None

    def keep(self, tensor: Tensor, shadow: Tensor) -> None:
        self.statistics.pop(id(tensor), None)
        self.shadows[id(tensor)] = (weakref.ref(tensor), shadow)

    def keep_statistic(self, tensor: Tensor, units: Tensor, calls: list[int]) -> None:
        self.shadows.pop(id(tensor), None)
        self.statistics[id(tensor)] = (weakref.ref(tensor), units, calls)

    def new_units(self, count: int) -> Tensor:
        first = self.record.count
        self.record.count += count
        return torch.arange(first, first + count)

    def end(self, shadow: Tensor, reason: str) -> None:
        self.record.ended.append((units_in(shadow), reason))

    def join(self, left: Tensor, right: Tensor) -> Tensor:
        """The shadow of what is made of both."""
        shape = torch.broadcast_shapes(left.shape, right.shape)
        left, right = left.expand(shape), right.expand(shape)
        if left.data_ptr() == right.data_ptr() and left.stride() == right.stride():
            return left
        self.tie(*without_repeats([left, right]))
        left_compact, right_compact = without_repeats([left, right])
        return torch.maximum(left_compact, right_compact).expand(shape)

    def tie(self, left: Tensor, right: Tensor) -> None:
        both = (left > 0) & (right > 0) & (left != right)
        if bool(both.any()):
            left, right = left[both], right[both]
            code = (left * self.record.count + right).unique()
            self.record.edges.append(torch.stack([code // self.record.count, code % self.record.count], 1))

    def lay_along(self, shadow: Tensor, dim: int) -> Tensor:
        """The unit of each position along a dimension; units that share a position are joined."""
        moved = shadow.movedim(dim, 0)
        (compact,) = without_repeats([moved])
        columns = compact.reshape(compact.shape[0], -1)
        top = columns.amax(1)
        self.tie(top[:, None].expand_as(columns), columns)
        return top.expand(moved.shape[0])

    # --- parameters -------------------------------------------------------------------------------------------------

    def name_of(self, tensor: Any) -> str | None:
        name = self.parameters.get(id(tensor))
        return name if name is not None else self.buffers.get(id(tensor))

    def use(self, tensor: Any, operation: str) -> None:
        name = self.parameters.get(id(tensor))
        if name is not None:
            self.record.uses.setdefault(name, []).append(operation)

    def produce(self, tensor: Any, dim: int, numbers: Tensor, kind: str) -> None:
        name = self.name_of(tensor)
        if name is not None:
            self.record.producers.append(Producer(name, dim, numbers, kind, self.moment()))

    def moment(self) -> float:
        """Later within the operation with every call, so that what is made in it comes after what is read before."""
        self.moments += 1
        return self.number + self.moments / (self.moments + 1)

    def own_shadow(self, parameter: Any) -> Tensor:
        """Unit numbers for a parameter that is used by itself, as an embedding of positions or a scale: one for each
        position of its last dimension of more than one, in which such parameters hold their units."""
        dim = max((d for d in range(parameter.dim()) if parameter.shape[d] > 1), default=-1)
        if dim < 0:
            return torch.zeros(parameter.shape, dtype=torch.int64)
        numbers = self.new_units(parameter.shape[dim])
        self.drawn_from[int(numbers[0])] = self.parameters[id(parameter)]
        self.produce(parameter, dim, numbers, "parameter")
        return laid(numbers, dim, parameter.dim()).expand(parameter.shape)

    # --- operations -------------------------------------------------------------------------------------------------

    def glance(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.end_all([leaf for leaf in tensors_in((args[1:], kwargs)) if self.shadow(leaf) is not None], name)

    def operate(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.moments = 0
        self.look(tensors_in((args, kwargs)))
        handler = SPECIAL.get(name)
        if handler is not None:
            return handler(self, func, name, args, kwargs)
        into = self.written(func, args, kwargs)
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            if id(tensor) in self.parameters and not isinstance(out, type(NotImplemented)):
                self.use(tensor, name)
        results = tensors_in(out)
        if into is not None and name != "setitem":
            given = [s for t in tensors if t is not into and (s := self.shadow(t)) is not None]
            for shadow in given:
                self.end(shadow, "written into memory through a view")
            if given and into._base is not None:
                self.taint([into._base], "a write through a view")
        if name == "autograd_grad":
            self.end(torch.arange(self.record.count), "a gradient taken in the forward pass may depend on it")
        elif name == "setitem":
            self.write(args)
        elif not results:
            self.end_all(tensors, name)
        elif name in known.SAME and isinstance(out, Tensor):
            self.same(out, args[0] if args else kwargs.get("input"), name, tensors)
        elif name in known.MOVEMENT:
            self.move(func, name, out, tensors, args, kwargs)
        elif name in known.JOINING:
            self.concatenate(func, name, out, tensors, args, kwargs)
        elif name in known.ELEMENTWISE or (name in ("max", "min") and both_tensors(args, kwargs)):
            self.entry_by_entry(name, results, tensors)
        elif name in known.REDUCTIONS | known.ALONG:
            self.reduce(name, results, tensors, args, kwargs)
        elif name in known.SPATIAL:
            self.spatial(name, results, tensors)
        elif name == "pad":
            self.pad(name, out, tensors, args, kwargs)
        else:
            followed = any(self.shadow(tensor) is not None for tensor in tensors)
            self.end_all(tensors, name)
            if followed:
                self.taint(results, name)
        return out

    @staticmethod
    def written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The view that an operation writes into; what other views of its memory hold then is not followed."""
        if "out" in kwargs:
            target = kwargs["out"]
        else:
            name = getattr(func, "__name__", "")
            in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
            target = args[0] if in_place and args else None
        return target if isinstance(target, Tensor) and target._base is not None else None

    def unknown(self, name: str) -> Tensor:
        """A new unit, [1], that cannot be kept: what was made of others in a way that nobody can follow."""
        unknown = self.new_units(1)
        self.end(unknown, f"joined with what {name} made of other units")
        return unknown

    def taint(self, results: Sequence[Tensor], name: str) -> None:
        """What an unknown operation made of units is one unit that cannot be kept, and so is what it is added to."""
        unknown = self.unknown(name)
        for out in results:
            self.keep(out, unknown.expand(out.shape) if out.dim() else unknown.reshape(()))

    def end_all(self, tensors: Sequence[Tensor], name: str, but: Any = None) -> None:
        """End every unit that an operation reads, and give up every parameter that it uses."""
        for tensor in tensors:
            if tensor is but:
                continue
            reason = f"read by {name}, which is not known to keep units apart"
            shadow, statistic = self.shadow(tensor), self.statistic(tensor)
            if shadow is not None:
                self.end(shadow, reason)
            if statistic is not None:
                self.end(statistic[0], f"a statistic over units is {reason}")
            self.spoil(tensor, name)

    def spoil(self, tensor: Any, name: str) -> None:
        owner = self.parameters.get(id(tensor))
        if owner is not None:
            self.record.spoiled.setdefault(owner, f"its weights are also used by {name}")

    def same(self, out: Tensor, source: Any, name: str, tensors: Sequence[Tensor]) -> None:
        shadow, statistic = self.shadow(source), self.statistic(source)
        if id(source) in self.parameters and out is not source:
            shadow = self.own_shadow(source)
        if shadow is not None:
            self.keep(out, shadow)
        elif statistic is not None:
            self.keep_statistic(out, *statistic)
        self.end_all([t for t in tensors if t is not source and name != "type_as"], name)

    def move(
        self,
        func: Callable[..., Any],
        name: str,
        out: Any,
        tensors: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        source = args[0] if args else kwargs.get("input")
        if name not in ("expand_as", "view_as", "reshape_as"):
            self.end_all(tensors, name, but=source)
        shadow, statistic = self.shadow(source), self.statistic(source)
        if id(source) in self.parameters:
            shadow = self.own_shadow(source)
        results = tensors_in(out)
        if statistic is not None:
            for piece in results:
                self.keep_statistic(piece, *statistic)
        if shadow is None:
            return
        rest = {k: v for k, v in kwargs.items() if k != "input"}
        try:
            moved = tensors_in(func(shadow, *args[1:], **rest))
        except (RuntimeError, TypeError, ValueError):
            moved = []
        if [m.shape for m in moved] != [r.shape for r in results]:
            self.end(shadow, f"moved by {name} in a way that its unit numbers cannot follow")
            return
        for piece, its in zip(results, moved, strict=True):
            self.keep(piece, its)

    def concatenate(
        self,
        func: Callable[..., Any],
        name: str,
        out: Any,
        tensors: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        parts = list(args[0] if args else kwargs["tensors"])
        shadows = []
        for part in parts:
            shadow, statistic = self.shadow(part), self.statistic(part)
            if id(part) in self.parameters:
                shadow = self.own_shadow(part)
            if statistic is not None:
                self.end(statistic[0], f"a statistic over units is read by {name}")
            shadows.append(torch.zeros(part.shape, dtype=torch.int64) if shadow is None else shadow)
        if any(bool(s.any()) for s in shadows):
            rest = {k: v for k, v in kwargs.items() if k != "tensors"}
            self.keep(out, func(shadows, *args[1:], **rest))

    def write(self, args: tuple[Any, ...]) -> None:
        """``target[index] = value``: part of the target is now the value's units."""
        target, index, value = args
        mine, theirs = self.shadow(target), self.shadow(value)
        self.end_all([leaf for leaf in tensors_in(index) if leaf is not target], "an index")
        if theirs is not None and target._base is not None:
            self.end(theirs, "written into memory through a view")
        statistic = self.statistic(value)
        if statistic is not None:
            self.end(statistic[0], "a statistic over units is written into a tensor")
        if mine is None and theirs is None:
            return
        base = torch.zeros(target.shape, dtype=torch.int64) if mine is None else mine.clone()
        base[index] = 0 if theirs is None else theirs
        self.keep(target, base)

    def entry_by_entry(self, name: str, results: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        joined: Tensor | None = None
        for tensor in tensors:
            shadow = self.shadow(tensor)
            if shadow is not None:
                joined = shadow if joined is None else self.join(joined, shadow)
        statistics = [s for s in map(self.statistic, tensors) if s is not None]
        own = [t for t in tensors if id(t) in self.parameters]
        if joined is None:
            for parameter in own:
                if len(own) > 1 or statistics:
                    self.spoil(parameter, name)
                else:
                    joined = self.own_shadow(parameter)  # a parameter by itself: its entries are units, as yet unread
        else:
            for parameter in own:
                joined = self.scale(name, joined, parameter)
        for units, calls in statistics:
            if joined is not None and not self.norm_by(joined, units, calls, name):
                joined = self.join(joined, self.unknown("a statistic over them").expand(joined.shape))
        for out in results:
            if joined is not None:
                self.keep(out, joined.expand(out.shape) if joined.dim() <= out.dim() else joined.reshape(out.shape))
            elif statistics:
                units = torch.cat([units for units, _ in statistics]).unique()
                self.keep_statistic(out, units, [call for _, calls in statistics for call in calls])

    def scale(self, name: str, joined: Tensor, parameter: Tensor) -> Tensor:
        """A parameter is added to units or multiplies them: where it has positions of their own it is theirs."""
        shape = torch.broadcast_shapes(joined.shape, parameter.shape)
        joined = joined.expand(shape)
        missing = len(shape) - parameter.dim()
        for dim in reversed(range(parameter.dim())):
            if parameter.shape[dim] == 1 or not varies(joined, dim + missing):
                continue
            numbers = self.lay_along(joined, dim + missing)
            self.produce(parameter, dim, numbers, "also" if name in known.ADDITIVE else "norm")
            break
        return joined

    def norm_by(self, shadow: Tensor, units: Tensor, calls: list[int], name: str) -> bool:
        """Units meet a statistic: of themselves it is a norm, of others it is a channel that nobody accounts for."""
        labels = self.record.labels()
        mine = labels[units_in(shadow)].unique()
        theirs = labels[units].unique()
        if torch.equal(mine, theirs):
            self.record.normed.append(theirs)
            self.record.held += calls
            return True
        self.end(units, f"a statistic over units is read by others, by {name}")
        return False

    def reduce(
        self, name: str, results: Sequence[Tensor], tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: Any
    ) -> None:
        source = args[0] if args else kwargs.get("input", kwargs.get("x"))
        self.end_all(tensors, name, but=source)
        self.spoil(source, name)
        statistic, shadow = self.statistic(source), self.shadow(source)
        if statistic is not None:
            self.end(statistic[0], f"a statistic over units is read by {name}")
        if shadow is None:
            return
        dims = known.reduced_dims(name, source.dim(), args, kwargs)
        if any(varies(shadow, dim) for dim in dims):
            if name in known.STATISTICS and name not in known.ALONG:
                for out in results:
                    self.keep_statistic(out, units_in(shadow), [self.number])
            else:
                self.end(shadow, f"mixed with others by {name}")
                self.taint(results, name)
            return
        for out in results:
            self.keep(out, shadow if out.shape == shadow.shape else representative(shadow, dims).reshape(out.shape))

    def spatial(self, name: str, results: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        source = tensors[0]
        shadow, statistic = self.shadow(source), self.statistic(source)
        if statistic is not None:
            self.end(statistic[0], f"a statistic over units is read by {name}")
        if shadow is None:
            return
        count = known.spatial_dims(name, source.dim())
        dims = list(range(source.dim() - count, source.dim()))
        if any(varies(shadow, dim) for dim in dims):
            self.end(shadow, f"mixed with others by {name}")
            return
        for out in results:
            self.keep(out, representative(shadow, dims).expand(out.shape))

    def pad(self, name: str, out: Tensor, tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: Any) -> None:
        source = tensors[0]
        shadow, statistic = self.shadow(source), self.statistic(source)
        if statistic is not None:
            self.end(statistic[0], f"a statistic over units is read by {name}")
        if shadow is None:
            return
        widths = args[1] if len(args) > 1 else kwargs["pad"]
        mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
        moved = F.pad(shadow.double(), tuple(widths), mode, **({"value": 0.0} if mode == "constant" else {}))
        self.keep(out, moved.long())

    # --- layers -----------------------------------------------------------------------------------------------------

    def read(self, name: str, shadow: Tensor, axis: int, weight: Tensor, dim: int, kind: str, groups: int = 1) -> None:
        owner = self.parameters.get(id(weight))
        if owner is None:
            self.end(shadow, f"read by {name} with a weight that is not a parameter of the model")
            return
        columns = self.lay_along(shadow, axis)
        self.record.readers.append(Reader(owner, dim, columns, kind, self.moment(), groups))

    def weigh(
        self,
        name: str,
        out: Tensor,
        source: Tensor,
        weight: Tensor,
        bias: Any,
        kind: str,
        dims: tuple[int, int],
        groups: int = 1,
    ) -> None:
        """A layer: its weight's dimension ``dims[1]`` reads units and its dimension ``dims[0]`` makes them."""
        axis = -1 if kind == "linear" else out.dim() - (known.spatial_dims(name, 0) + 1)
        shadow, statistic = self.shadow(source), self.statistic(source)
        for used in (weight, bias):
            self.use(used, name)
        if statistic is not None:
            self.end(statistic[0], f"a statistic over units is read by {name}")
        if id(source) in self.parameters:
            self.spoil(source, name)
        own = id(weight) in self.parameters
        if shadow is not None and groups > 1 and groups == source.shape[axis] and dims == (0, 1) and own:
            # Depthwise: every unit is filtered by itself and goes on.
            numbers = self.lay_along(shadow, axis).repeat_interleave(weight.shape[0] // groups)
            bare = numbers == 0  # channels without a unit: what is made of them is one
            if bool(bare.any()):
                made = torch.zeros_like(numbers).masked_scatter(bare, self.new_units(int(bare.sum())))
                self.produce(weight, 0, made, kind)
            self.produce(weight, 0, numbers, "also")
            if bool(bare.any()):
                numbers = numbers + made
            self.produce(bias, 0, numbers, "also")
            self.keep(out, laid(numbers, axis, out.dim()).expand(out.shape))
            return
        if shadow is not None and groups > 1 and dims != (0, 1):
            self.end(shadow, f"read by a grouped {name}")
        elif shadow is not None:
            self.read(name, shadow, axis, weight, dims[1], kind, groups)
        if own and (groups == 1 or dims == (0, 1)):
            numbers = self.new_units(weight.shape[dims[0]])
            self.produce(weight, dims[0], numbers, kind)
            if bias is not None and self.name_of(bias) is not None and bias.dim() == 1:
                self.produce(bias, 0, numbers, "also")
            self.keep(out, laid(numbers, axis, out.dim()).expand(out.shape))
        elif not own:
            self.spoil_source(weight, name)

    def spoil_source(self, weight: Tensor, name: str) -> None:
        """A layer uses a weight that was made of parameters: those have no part of their own."""
        shadow = self.shadow(weight)
        if shadow is not None:
            first = set(units_in(shadow).tolist()) & self.drawn_from.keys()
            for number in first:
                self.record.spoiled.setdefault(self.drawn_from[number], f"{name} uses a weight made of it")
            self.end(shadow, f"used as a weight by {name}")
