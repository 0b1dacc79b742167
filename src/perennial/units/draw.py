"""From which distribution was a parameter first drawn?

A fresh unit should look like a unit at the start. Instead of guessing the initialiser from the layer's type, the model
factory is run once under a mode that watches the random fills (``uniform_``, ``normal_``, ``zeros_``, ...) that
``torch.nn.init`` and ``reset_parameters`` end in. Whatever the factory did last to a parameter is its distribution.
Where there is no factory but only a model, :func:`perennial.units.recover` runs the model's own initialisers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from perennial.noise import Noise

_KINDS = ("uniform", "normal", "truncated_normal", "orthogonal", "constant")
_LEAST_MASS = 1e-30  # below it the probability between the bounds is no longer a float32 that a draw can be made of


@dataclass(frozen=True)
class Distribution:
    """Where fresh values of a parameter come from."""

    kind: str
    """``"uniform"`` on [first, second]; ``"normal"`` of mean first and standard deviation second;
    ``"truncated_normal"``, that normal on the condition that it lies in [low, high]; ``"constant"`` first;
    ``"orthogonal"``, see below."""
    first: float
    """Of an orthogonal weight its gain; otherwise see ``kind``."""
    second: float = 0.0
    """Of an orthogonal weight [rows, ...] the norm that a row has in the root mean square,
    gain * sqrt(min(1, columns / rows)); otherwise see ``kind``."""
    low: float = -math.inf
    """Lower bound of a truncated normal."""
    high: float = math.inf
    """Upper bound of a truncated normal."""
    zeros: tuple[int, int] | None = None
    """The elements from the first number up to the second, which is left out, are zero whatever the kind: the padding
    row of an embedding."""

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"the kind of a distribution is {self.kind!r}; it is one of {', '.join(_KINDS)}")
        if self.kind != "truncated_normal":
            return
        if not (self.second > 0 and self.low < self.high):
            raise ValueError(
                f"a truncated normal has standard deviation {self.second:g} and bounds {self.low:g} to {self.high:g}; "
                "the deviation must be above 0 and the lower bound below the upper"
            )
        if _mass(self.first, self.second, self.low, self.high) < _LEAST_MASS:
            raise ValueError(
                f"a truncated normal of mean {self.first:g} and standard deviation {self.second:g} has almost no "
                f"probability from {self.low:g} to {self.high:g}, and nothing can be drawn from it; move the bounds "
                "closer to the mean"
            )

    def __str__(self) -> str:
        numbers = (self.first,) if self.kind == "constant" else (self.first, self.second)
        return f"{self.kind}({', '.join(f'{number:.3g}' for number in numbers)})"

    def draw(self, noise: Noise, name: str, element: Tensor) -> Tensor:
        r"""Fresh values for the numbered elements of the named parameter, float32, the shape of ``element``.

        The value of an element does not depend on which others are drawn with it: a row drawn alone is the row that
        drawing the whole parameter gives. Of an orthogonal weight a value depends on its whole row (and on nothing
        else), so that ``element`` must have the shape [rows, ...] and number whole rows, [1, ...] for a single one. A
        row is then a random direction of the right length,

        .. math:: w_i = g \sqrt{\min(1, n / m)}\; z_i / \lVert z_i \rVert, \qquad z_i \sim N(0, I_n)

        for a weight of m rows and n columns. It is *not* orthogonal to the other rows, whether they are drawn with it
        or were there before.

        Args:
            noise: the step's random numbers.
            name: the parameter's qualified name.
            element: int32, the elements' numbers in row-major order.

        Raises:
            ValueError: an orthogonal weight and an ``element`` of fewer than two dimensions.
        """
        if self.kind == "orthogonal":
            if element.dim() < 2:
                raise ValueError(
                    f"{name} was drawn orthogonal, and so is drawn by whole rows, but the elements have the shape "
                    f"{list(element.shape)}; give elements [rows, ...], [1, ...] for a single row"
                )
            z = noise.normal(name, element)
            length: Tensor = torch.linalg.vector_norm(z, dim=tuple(range(1, element.dim())), keepdim=True)
            return z * (self.second / length)
        fresh = self._independent(noise, name, element)
        if self.zeros is None:
            return fresh
        return torch.where((element >= self.zeros[0]) & (element < self.zeros[1]), 0.0, fresh)

    def scaled(self, factor: float) -> Distribution:
        """The distribution of a number drawn from this one, times a constant."""
        size = abs(factor)
        if factor == 0:
            return Distribution("constant", 0.0)
        if self.kind == "uniform":
            ends = sorted((self.first * factor, self.second * factor))
            return dataclasses.replace(self, first=ends[0], second=ends[1])
        if self.kind == "orthogonal":
            return dataclasses.replace(self, first=self.first * size, second=self.second * size)
        low, high = sorted((self.low * factor, self.high * factor))
        return dataclasses.replace(self, first=self.first * factor, second=self.second * size, low=low, high=high)

    def _independent(self, noise: Noise, name: str, element: Tensor) -> Tensor:
        if self.kind == "uniform":
            return self.first + (self.second - self.first) * noise.uniform(name, element)
        if self.kind == "normal":
            return self.first + self.second * noise.normal(name, element)
        if self.kind == "truncated_normal":
            return self._truncated(noise.uniform(name, element))
        return torch.full_like(element, self.first, dtype=torch.float32)

    def _truncated(self, uniform: Tensor) -> Tensor:
        """The inverse of the distribution function at a uniform number."""
        low, high = ((bound - self.first) / self.second for bound in (self.low, self.high))
        # In float32 small probabilities are finer than those close to 1: the longer tail is made the lower one.
        mirrored = low + high > 0
        if mirrored:
            low, high = -high, -low
        below = _normal_cdf(low)
        probability = below + uniform * (_normal_cdf(high) - below)
        z = torch.special.ndtri(probability.clamp(max=1 - 2.0**-24))
        fresh: Tensor = self.first + (-self.second if mirrored else self.second) * z
        return fresh.clamp(self.low, self.high)


def _normal_cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _mass(mean: float, std: float, low: float, high: float) -> float:
    """The probability of a normal between two bounds, from the side where it is exact."""
    low, high = (low - mean) / std, (high - mean) / std
    return _normal_cdf(-low) - _normal_cdf(-high) if low + high > 0 else _normal_cdf(high) - _normal_cdf(low)


class _Fill(NamedTuple):
    """What is known of the numbers in a storage."""

    distribution: Distribution
    sides: tuple[int, ...] = ()
    """Rows and columns of a matrix with orthonormal rows or columns."""


def _uniform(low: float = 0.0, high: float = 1.0) -> Distribution:
    return Distribution("uniform", float(low), float(high))


def _normal(mean: float = 0.0, std: float = 1.0) -> Distribution:
    return Distribution("normal", float(mean), float(std))


def _constant(value: float) -> Distribution:
    return Distribution("constant", float(value))


_FILLS: dict[str, Callable[..., Distribution]] = {
    "uniform_": _uniform,
    "normal_": _normal,
    "zero_": lambda: _constant(0.0),
    "fill_": _constant,
}
"""Operations that fill their first argument, and the distribution by the arguments after it."""

_MAKES: dict[str, Callable[..., Distribution]] = {
    "rand": lambda size: _uniform(),
    "rand_like": lambda like: _uniform(),
    "randn": lambda size: _normal(),
    "randn_like": lambda like: _normal(),
    "normal": lambda mean, std, *size: _normal(mean, std),
    "zeros": lambda size: _constant(0.0),
    "zeros_like": lambda like: _constant(0.0),
    "new_zeros": lambda like, size: _constant(0.0),
    "ones": lambda size: _constant(1.0),
    "ones_like": lambda like: _constant(1.0),
    "new_ones": lambda like, size: _constant(1.0),
    "full": lambda size, value: _constant(value),
    "full_like": lambda like, value: _constant(value),
    "new_full": lambda like, size, value: _constant(value),
}
"""Operations that make a filled tensor, and its distribution by the arguments."""


class Recorder(TorchDispatchMode):
    """Remembers how every storage was filled last; a change that it does not understand makes a storage unknown.

    Fills of a whole storage are understood, copies of what is known, multiplication by a Python number, the steps of
    ``torch.nn.init.orthogonal_``, and a contiguous part set to zero.
    """

    def __init__(self, blanks: Iterable[Tensor] = ()) -> None:
        """``blanks`` are tensors that fills are only recorded of, not made in: nobody looks at their numbers."""
        super().__init__()  # type: ignore[no-untyped-call]
        # A weak reference keeps no number alive, but while it is there no other storage gets the same identity.
        self.fills: dict[StorageWeakRef, _Fill] = {}
        self.blanks = {_storage(tensor) for tensor in blanks}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in _FILLS and _whole(args[0]) and _storage(args[0]) in self.blanks:
            out = args[0]
        else:
            out = func(*args, **kwargs)
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._written(name, value, args, kwargs)
            for value in kwargs.values():
                self._written("", value, (), {})
        elif isinstance(out, Tensor) and out.is_floating_point():
            self._made(name, out, args, kwargs)
        elif name == "linalg_qr" and len(args) == 1 and not kwargs and args[0].dim() == 2:
            source = self.fills.get(_storage(args[0]))
            if source is not None and source.distribution.kind == "normal" and source.distribution.first == 0:
                self.fills[_storage(out[0])] = _Fill(Distribution("orthogonal", 1.0), tuple(args[0].shape))
        return out

    def _written(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(value, (list, tuple)):
            for one in value:
                self._written("", one, (), {})
        if not isinstance(value, Tensor):
            return
        storage = _storage(value)
        known = self.fills.pop(storage, None)
        new = self._after(name, value, known, args, kwargs)
        if new is not None and value.is_floating_point():
            self.fills[storage] = new

    def _after(
        self, name: str, tensor: Tensor, known: _Fill | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Fill | None:
        """What is known of a tensor's storage after an operation has changed the tensor."""
        if name in _FILLS and _whole(tensor):
            given = [_number(value) for value in args[1:]]
            return None if None in given else _Fill(_FILLS[name](*given))
        if name == "copy_" and _whole(tensor):
            return self._copied(args[1], tensor)
        if known is None:
            return None
        if name in ("t_", "transpose_"):
            return known
        if name in ("mul_", "div_") and _whole(tensor) and not kwargs:
            return _multiplied(known, args[1], name == "div_")
        zero = name == "zero_" or (name == "fill_" and _number(args[1]) == 0)
        if zero and tensor.is_contiguous() and known.distribution.zeros is None and not known.sides:
            start = int(tensor.storage_offset())
            part = (start, start + tensor.numel())
            return _Fill(dataclasses.replace(known.distribution, zeros=part))
        return None

    def _made(self, name: str, out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        new = None
        if name in ("clone", "_to_copy"):
            new = self._copied(args[0], out)
        elif name in ("mul", "div") and not kwargs and isinstance(args[0], Tensor):
            known = self._copied(args[0], out)
            new = None if known is None else _multiplied(known, args[1], name == "div")
        elif name in _MAKES and not (name == "normal" and any(isinstance(value, Tensor) for value in args[:2])):
            new = _Fill(_MAKES[name](*args))
        if new is not None:
            self.fills[_storage(out)] = new

    def _copied(self, source: Any, target: Tensor) -> _Fill | None:
        if not isinstance(source, Tensor) or not _whole(source) or source.shape != target.shape:
            return None
        known = self.fills.get(_storage(source))
        if known is not None and known.distribution.zeros is not None:
            return known if source.is_contiguous() and target.is_contiguous() else None
        return known

    def truncated(self, tensor: Tensor, mean: float, std: float, low: float, high: float) -> None:
        """A tensor was filled from a truncated normal."""
        self.fills.pop(_storage(tensor), None)
        if _whole(tensor) and _mass(mean, std, low, high) >= _LEAST_MASS:
            distribution = Distribution("truncated_normal", float(mean), float(std), float(low), float(high))
            self.fills[_storage(tensor)] = _Fill(distribution)

    def forget(self, tensor: Tensor) -> None:
        """How a tensor was filled does not count."""
        self.fills.pop(_storage(tensor), None)

    def of(self, tensor: Tensor) -> Distribution | None:
        """How a tensor that fills its storage was drawn."""
        known = self.fills.get(_storage(tensor)) if _whole(tensor) else None
        if known is None:
            return None
        found = known.distribution
        if found.kind == "orthogonal":
            rows, columns = tensor.shape[0], tensor[0].numel() if tensor.dim() > 1 else 0
            if sorted((rows, columns)) != sorted(known.sides):
                return None
            return dataclasses.replace(found, second=found.first * math.sqrt(min(1.0, columns / rows)))
        return found if found.zeros is None or tensor.is_contiguous() else None


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _whole(tensor: Tensor) -> bool:
    """Whether a tensor covers its storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return None if value.is_meta or value.is_complex() else float(value)
    return float(value) if isinstance(value, (int, float)) else None


def _multiplied(known: _Fill, factor: Any, divided: bool) -> _Fill | None:
    """After multiplication by a Python number. A tensor may depend on what it multiplies, and makes it unknown."""
    if isinstance(factor, Tensor):
        # torch's orthogonal_ turns columns round so that their signs are random too
        return known if known.sides and bool((factor.abs() == 1).all()) else None
    number = _number(factor)
    if number is None or not math.isfinite(number) or (divided and number == 0):
        return None
    scaled = known.distribution.scaled(1 / number if divided else number)
    return _Fill(scaled, known.sides if scaled.kind == "orthogonal" else ())


@contextlib.contextmanager
def recording(blanks: Iterable[Tensor] = ()) -> Iterator[Recorder]:
    """Watch how tensors are filled; see :class:`Recorder`.

    ``trunc_normal_`` is watched as a function: what it does to a tensor (a plain normal, corrected if a number lies
    outside) does not always tell it from other fills.
    """
    recorder = Recorder(blanks)
    fill = nn.init._no_grad_trunc_normal_

    def watched(
        tensor: Tensor, mean: float, std: float, a: float, b: float, generator: torch.Generator | None = None
    ) -> Tensor:
        out = tensor if _storage(tensor) in recorder.blanks else fill(tensor, mean, std, a, b, generator)
        recorder.truncated(tensor, mean, std, a, b)
        return out

    with recorder, mock.patch.object(nn.init, "_no_grad_trunc_normal_", watched):
        yield recorder


def build_and_record(factory: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Distribution]]:
    """Run a model factory and say how each parameter, and each floating-point buffer, was drawn.

    The answer is exact for whatever the factory did, wherever it did it: initialisers applied from outside, as
    stable-baselines3 applies ``orthogonal_`` to a policy, are seen. A parameter that was filled in another way
    (``sparse_``, ``eye_``, a file, arithmetic other than multiplication by a number) is missing from the answer; a
    method that must redraw it says so.
    """
    with recording() as recorder:
        model = factory()
    drawn = {name: recorder.of(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return model, {name: d for name, d in drawn.items() if d is not None}
