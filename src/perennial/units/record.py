"""What a traced forward pass shows, and the small operations on shadows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from perennial.units import operations as known


@dataclass
class Producer:
    """A parameter whose positions along a dimension make units, or scale or shift them."""

    parameter: str
    dim: int
    numbers: Tensor
    """int64 [positions]: the unit that each position belongs to, 0 where there is none."""
    kind: str
    """``"linear"``, ``"conv"``, ``"embedding"`` or ``"parameter"`` where it makes units; ``"also"`` for what else is
    added to units, as a bias, or filters each by itself; ``"norm"`` for factors and running statistics."""
    when: float
    """The operation's number; what it reads comes before what it makes."""


@dataclass
class Reader:
    """A weight whose columns read units."""

    parameter: str
    dim: int
    columns: Tensor
    """int64 [columns]: the unit that each reads, 0 where there is none."""
    kind: str
    when: float
    groups: int = 1


@dataclass
class Record:
    """What one forward pass has shown."""

    edges: list[Tensor] = field(default_factory=list)
    """Pairs of joined unit numbers, int64 [pairs, 2]."""
    count: int = 1
    """Unit numbers given out; 0 is no unit."""
    producers: list[Producer] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    ended: list[tuple[Tensor, str]] = field(default_factory=list)
    """Unit numbers that cannot be kept, and why."""
    normed: list[Tensor] = field(default_factory=list)
    """Unit numbers that a norm over units reads."""
    held: list[int] = field(default_factory=list)
    """Numbers of the operations that compute the statistics of such norms."""
    outputs: list[Tensor] = field(default_factory=list)
    """Unit numbers that are the network's outputs."""
    uses: dict[str, list[str]] = field(default_factory=dict)
    """By which operations each parameter was used, in the order of first use."""
    spoiled: dict[str, str] = field(default_factory=dict)
    """Parameters whose part in the network is not understood, and why."""

    def labels(self) -> Tensor:
        """int64 [count]: the smallest number among those that each number is joined with."""
        labels = torch.arange(self.count)
        if not self.edges:
            return labels
        left, right = torch.cat(self.edges).unbind(1)
        while True:
            low = torch.minimum(labels[left], labels[right])
            new = labels.clone()
            for ends in (labels[left], labels[right], left, right):
                new.scatter_reduce_(0, ends, low, "amin")
            new = new[new]
            if torch.equal(new, labels):
                return labels
            labels = new


class Counter(TorchFunctionMode):
    """Numbers the operations of a forward pass: the tracer's numbers and those of the proof are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.number = -1

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = known.plain_name(func)
        if name in known.QUIET:
            self.glance(name, args, kwargs or {})
            out = func(*args, **(kwargs or {}))
            self.note(out)
            return out
        self.number += 1
        out = self.operate(func, name, args, kwargs or {})
        self.note(out)
        return out

    def note(self, out: Any) -> None:
        """Look at the result of an operation."""

    def glance(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the arguments of an operation that gives nothing of its first argument's values."""

    def operate(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do it. ``name`` is :func:`perennial.units.operations.plain_name` of the operation."""
        return func(*args, **kwargs)


def named(order: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    return dict(zip(order, args, strict=False)) | kwargs


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a nested structure."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def both_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``max`` or ``min`` compares two tensors entry by entry."""
    return isinstance(args[1] if len(args) > 1 else kwargs.get("other"), Tensor)


def laid(numbers: Tensor, axis: int, dims: int) -> Tensor:
    """A vector laid along one of ``dims`` dimensions."""
    shape = [1] * dims
    shape[axis] = numbers.shape[0]
    return numbers.reshape(shape)


def without_repeats(shadows: Sequence[Tensor]) -> list[Tensor]:
    """The shadows without what is merely repeated (expanded) in all of them."""
    found = list(shadows)
    for dim in range(found[0].dim()):
        if found[0].shape[dim] > 1 and all(s.stride(dim) == 0 for s in found):
            found = [s.narrow(dim, 0, 1) for s in found]
    return found


def units_in(shadow: Tensor) -> Tensor:
    """The unit numbers that occur, each once, without 0."""
    units: Tensor = without_repeats([shadow])[0].unique()
    return units[units > 0]


def varies(shadow: Tensor, dim: int) -> bool:
    """Whether different units stand along a dimension."""
    if shadow.shape[dim] < 2 or shadow.stride(dim) == 0:
        return False
    (compact,) = without_repeats([shadow])
    high = compact.amax(dim, keepdim=True)
    return bool(((compact != high) & (compact != 0)).any())


def representative(shadow: Tensor, dims: Sequence[int]) -> Tensor:
    """The shadow with length 1 along dimensions on which it does not vary."""
    return shadow.amax(list(dims), keepdim=True) if dims and shadow.numel() else shadow
