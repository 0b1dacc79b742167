"""Finding hidden units by carrying unit numbers through one forward pass.

Every activation carries a shadow: an integer tensor of the same shape that names the unit behind each entry. Data
movement moves the shadow the same way, element-wise operations join the units of their inputs, a linear or
convolutional layer reads off which of its columns read which unit and starts new units. An operation that is not
listed ends its units: they are refused, with the operation's name as the reason.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from perennial.units.draw import Distribution
from perennial.units.map import Slice, UnitLayer, UnitMap

_MOVEMENT = frozenset(
    "view reshape flatten permute transpose movedim squeeze unsqueeze contiguous clone expand __getitem__ t "
    "chunk split unbind narrow select swapaxes swapdims unflatten max_pool1d max_pool2d max_pool3d avg_pool1d "
    "avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d mean "
    "detach to float double".split()
)
_ELEMENTWISE = frozenset(
    "relu relu_ sigmoid tanh elu elu_ leaky_relu leaky_relu_ silu gelu selu softplus mish hardtanh hardswish relu6 "
    "dropout abs neg pow mul div add sub sin cos exp clamp __mul__ __rmul__ __add__ __radd__ __sub__ __rsub__ "
    "__truediv__ __neg__ __pow__ mul_ add_ tanh_ sigmoid_ identity".split()
)
_QUIET = frozenset("size dim shape numel device dtype is_floating_point stride ndim is_contiguous".split())


class _Tracer(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.shadows: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self.parent: list[int] = [0]  # union-find over unit numbers; 0 is "no unit"
        self.made: list[tuple[str, str, str | None, int, int]] = []  # module, kind, bias, first number, size
        self.read: list[tuple[str, str, Tensor]] = []  # weight, kind of reader, unit number of each column
        self.ended: dict[int, str] = {}
        self.spoiled: dict[str, str] = {}  # parameter -> who else uses it
        self.generator = torch.Generator().manual_seed(0)
        self.codes = torch.zeros(0, dtype=torch.float64)

    def find(self, unit: int) -> int:
        while self.parent[unit] != unit:
            unit = self.parent[unit]
        return unit

    def shadow(self, tensor: Any) -> Tensor | None:
        entry = self.shadows.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def keep(self, tensor: Tensor, shadow: Tensor) -> None:
        self.shadows[id(tensor)] = (weakref.ref(tensor), shadow)

    def end(self, shadow: Tensor, reason: str) -> None:
        for unit in shadow.unique().tolist():
            if unit:
                self.ended.setdefault(self.find(int(unit)), reason)

    def join(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = torch.broadcast_tensors(left, right)
        pairs = torch.stack([left.reshape(-1), right.reshape(-1)], 1).unique(dim=0).tolist()
        for a, b in pairs:
            if a and b:
                self.parent[self.find(b)] = self.find(a)
        return torch.maximum(left, right)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name in _QUIET or not _tensors(out):
            return out
        if func in (F.linear, F.conv1d, F.conv2d, F.conv3d):
            return self.weigh(name, out, *args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            if id(tensor) in self.parameters:
                self.spoiled.setdefault(self.parameters[id(tensor)], f"its weights are also used by {name}")
        shadows = [s for s in map(self.shadow, tensors) if s is not None]
        if not shadows:
            return out
        if name in _MOVEMENT and len(shadows) == 1 and self.shadow(args[0] if args else None) is not None:
            self.move(func, name, out, shadows[0], args, kwargs)
        elif name in _ELEMENTWISE and isinstance(out, Tensor):
            joined = shadows[0]
            for other in shadows[1:]:
                joined = self.join(joined, other)
            self.keep(out, joined.expand(out.shape) if joined.shape != out.shape else joined)
        else:
            for shadow in shadows:
                self.end(shadow, f"read by {name}, which is not known to keep units apart")
        return out

    def move(
        self, func: Callable[..., Any], name: str, out: Any, shadow: Tensor, args: Any, kwargs: dict[str, Any]
    ) -> None:
        """Do to the shadow what was done to the tensor.

        Units go by random codes, so that whatever mixes two of them (a mean, a maximum) gives a number that is no
        unit's, or another one when all signs are turned.
        """
        if len(self.codes) < len(self.parent):
            self.codes = torch.rand(2 * len(self.parent), dtype=torch.float64, generator=self.generator) + 1
        codes = self.codes[: len(self.parent)]
        order = codes.argsort()
        with torch._C.DisableTorchFunction():
            moved, turned = (func(sign * codes[shadow], *args[1:], **kwargs) for sign in (1, -1))
        for piece, there, back in zip(_tensors(out), _tensors(moved), _tensors(turned), strict=True):
            code = there.to(torch.float64)
            nearest = torch.searchsorted(codes[order], code.contiguous() - 1e-9).clamp(max=len(codes) - 1)
            found = order[nearest]
            apart = torch.equal(there, -back) and bool(((codes[found] - code).abs() < 1e-9).all())
            if apart and piece.shape == there.shape:
                self.keep(piece, found)
            else:
                self.end(shadow, f"mixed with others by {name}")

    def weigh(
        self,
        name: str,
        out: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        kind = "linear" if name == "linear" else "conv"
        axis = -1 if kind == "linear" else 1
        shadow = self.shadow(input)
        owner = self.parameters.get(id(weight))
        groups = named.get("groups", rest[3] if len(rest) > 3 else 1)
        if shadow is not None:
            columns = shadow.movedim(axis, -1).reshape(-1, shadow.shape[axis])
            if owner is None:
                self.end(shadow, f"read by {name} with a weight that is not a parameter of the model")
            elif groups != 1:
                self.end(shadow, "read by a grouped convolution")
            elif bool((columns != columns[0]).any()):
                self.end(shadow, f"columns of {owner} read different units in different places")
            else:
                self.read.append((owner, kind, columns[0]))
        if owner is not None:
            first, size = len(self.parent), int(weight.shape[0])
            self.parent += range(first, first + size)
            self.made.append((owner, kind, self.parameters.get(id(bias)), first, size))
            numbers = torch.arange(first, first + size)
            shape = [1] * out.dim()
            shape[axis] = size
            self.keep(out, numbers.reshape(shape).expand(out.shape))
        return out


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def trace(model: nn.Module, *args: Any, initial: Mapping[str, Distribution] | None = None, **kwargs: Any) -> UnitMap:
    """The hidden units of a network, found in one forward pass on an example.

    The model is left as it was: mode, buffers, gradients and the global random state do not change.
    Layers whose units are joined with others (residual streams), read by an operation that is not known, or used more
    than once are refused, with the reason in :attr:`UnitMap.refused`.

    Args:
        model: any module.
        *args: an example input, as the model takes it; keywords too.
        initial: how parameters were drawn (:func:`perennial.units.build_and_record`), kept in the map.
    """
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    tracer = _Tracer(model)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), tracer:
            out = model(*args, **kwargs)
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    for tensor in _tensors(out):
        shadow = tracer.shadow(tensor)
        if shadow is not None:
            tracer.end(shadow, "output")
    layers: list[UnitLayer] = []
    refused: list[tuple[str, str]] = []
    times = [weight for weight, *_ in tracer.made]
    roots: dict[int, int] = {}
    for unit in range(1, len(tracer.parent)):
        roots[tracer.find(unit)] = roots.get(tracer.find(unit), 0) + 1
    for weight, kind, bias, first, size in tracer.made:
        module = weight.rpartition(".")[0]
        units = range(first, first + size)
        reasons = {tracer.ended[tracer.find(u)] for u in units if tracer.find(u) in tracer.ended}
        if times.count(weight) > 1:
            reasons.add("used more than once")
        if any(roots[tracer.find(u)] > 1 for u in units):
            reasons.add("joined with other units")
        outgoing, problem = _outgoing(tracer, first, size)
        if problem and (not reasons or problem != "read by no layer"):
            reasons.add(problem)
        mine = [weight, bias, *(part.parameter for part, _ in outgoing)]
        reasons |= {tracer.spoiled[name] for name in mine if name in tracer.spoiled}
        if reasons:
            if reasons != {"output"} or outgoing:
                refused.append((module, "; ".join(sorted(reasons)).replace("output", "also an output of the model")))
            continue
        rows = torch.arange(size)[:, None]
        incoming = tuple(Slice(p, 0, rows) for p in (weight, bias) if p is not None)
        slices = tuple(s for s, _ in outgoing)
        layers.append(UnitLayer(module, size, kind, incoming, (), slices, slices[0].parameter, outgoing[0][1]))
    return UnitMap(tuple(layers), tuple(refused), dict(initial or {}))


def _outgoing(tracer: _Tracer, first: int, size: int) -> tuple[list[tuple[Slice, str]], str]:
    """Where the units are read, and what speaks against it."""
    found: list[tuple[Slice, str]] = []
    readers = [weight for weight, _, _ in tracer.read]
    for weight, kind, columns in tracer.read:
        mine = (columns >= first) & (columns < first + size)
        if not bool(mine.any()):
            continue
        if readers.count(weight) > 1:
            return [], f"its reader {weight.rpartition('.')[0]} is used more than once"
        counts = torch.bincount(columns[mine] - first, minlength=size)
        if bool((counts != counts[0]).any()):
            return [], "only some of its units are read, or some more often than others"
        positions = mine.nonzero()[:, 0]
        order = torch.argsort(columns[positions], stable=True)
        found.append((Slice(weight, 1, positions[order].reshape(size, -1)), kind))
    return found, "" if found else "read by no layer"
