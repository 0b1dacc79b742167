"""What the readers of hidden units are given, and which nonlinearity made it: what values a unit can take."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from perennial.units import operations
from perennial.units.map import UnitMap
from perennial.units.record import tensors_in
from perennial.units.trace import copied, undisturbed


@dataclass(frozen=True)
class Nonlinearity:
    """What is known of the values that a reader of hidden units is given."""

    function: str = ""
    """The operation that shaped them last, as torch names it (``"relu"``, ``"gelu"``); empty where there is none or it
    is not known."""
    low: float = -math.inf
    """Bound from below."""
    high: float = math.inf
    """Bound from above."""
    rectified: bool = False
    """Whether a unit is exactly zero, with a gradient of zero, over a range of its inputs: it can be dead."""

    @property
    def bounded(self) -> bool:
        """Whether it can saturate on either side."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def __str__(self) -> str:
        return self.function or "an unknown function"


UNKNOWN = Nonlinearity()

_FIXED = {
    "relu": Nonlinearity("relu", 0.0, math.inf, True),
    "relu6": Nonlinearity("relu6", 0.0, 6.0, True),
    "sigmoid": Nonlinearity("sigmoid", 0.0, 1.0),
    "hardsigmoid": Nonlinearity("hardsigmoid", 0.0, 1.0),
    "tanh": Nonlinearity("tanh", -1.0, 1.0),
    "softsign": Nonlinearity("softsign", -1.0, 1.0),
    "hardshrink": Nonlinearity("hardshrink", rectified=True),
    "softshrink": Nonlinearity("softshrink", rectified=True),
    "hardswish": Nonlinearity("hardswish", -0.375, math.inf, True),
}
_READING = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul mm bmm addmm baddbmm".split()
)
_SMOOTH = frozenset(
    "elu celu leaky_relu rrelu silu gelu selu softplus mish tanhshrink logsigmoid log_sigmoid prelu sin cos".split()
)
_CLAMPS = frozenset("hardtanh clamp clip clamp_min clamp_max threshold maximum max".split())
_KEEPING = operations.MOVEMENT | operations.SPATIAL | operations.SAME - {"alpha_dropout", "feature_alpha_dropout"}


class Observation(NamedTuple):
    """What :func:`observe` finds, by layer name; layers that nothing read in this pass are missing."""

    activations: dict[str, Tensor]
    """[samples, units] or [samples, units, positions...]: what the layer's reader was given."""
    nonlinearities: dict[str, Nonlinearity]
    """What stands before it."""


def observe(model: nn.Module, units: UnitMap, *args: Any, **kwargs: Any) -> Observation:
    """What the readers of hidden units are given in one forward pass, and what nonlinearity shaped it last.

    Functions are seen as well as modules. Pooling, dropout, reshaping and scaling keep what is known of a nonlinearity;
    a norm or a sum between it and the reader ends it, since a unit that is silent before it is not silent behind it.

    The model is left as it was: mode, buffers, gradients, hooks and the global random states do not change. It runs in
    the mode in which it is.

    Args:
        model: the network.
        units: its map.
        *args: an input, as the model takes it; keywords too.
    """
    args, kwargs = copied((args, kwargs))
    parameters = dict(model.named_parameters())
    taps = {id(parameters[layer.tap]): layer.tap for layer in units if layer.tap in parameters}
    with undisturbed(model), _Watch(taps) as watch:
        model(*args, **kwargs)
    seen = [layer for layer in units if layer.tap in watch.given]
    return Observation(
        {layer.name: layer.activation(watch.given[layer.tap]) for layer in seen},
        {layer.name: watch.found[layer.tap] for layer in seen},
    )


class _Watch(TorchFunctionMode):
    """Keeps, with every tensor that an operation makes, what its values can be."""

    def __init__(self, taps: Mapping[int, str]) -> None:
        super().__init__()
        self.taps = taps
        self.given: dict[str, Tensor] = {}
        self.found: dict[str, Nonlinearity] = {}
        self.known: dict[int, tuple[weakref.ref[Tensor], Nonlinearity]] = {}

    def of(self, tensor: Any) -> Nonlinearity:
        entry = self.known.get(id(tensor))  # ids are used again
        return entry[1] if entry is not None and entry[0]() is tensor else UNKNOWN

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operations.plain_name(func)
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            tap = self.taps.get(id(tensor))
            read = [t for t in given if id(t) not in self.taps and t.is_floating_point() and t.dim() > 1]
            if tap is not None and tap not in self.given and read and name in _READING:
                self.given[tap], self.found[tap] = read[0].detach(), self.of(read[0])
        what = self._result(name, given, args, kwargs, func)  # before the call, which may write in place
        out = func(*args, **kwargs)
        if name not in operations.QUIET:
            for tensor in tensors_in(out):
                self.known[id(tensor)] = (weakref.ref(tensor), what)
        return out

    def _result(
        self, name: str, given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], func: Callable[..., Any]
    ) -> Nonlinearity:
        if name in _FIXED:
            return _FIXED[name]
        if name in _SMOOTH:
            return Nonlinearity(name)
        if name in _CLAMPS:
            return _clamped(name, args, kwargs)
        kinds = {self.of(tensor) for tensor in given}
        if len(kinds) != 1:
            return UNKNOWN
        (kind,) = kinds
        if name in _KEEPING or name in operations.JOINING:
            return kind
        power = (*args[1:], kwargs.get("exponent"))[0] if name == "pow" else 1
        growing = isinstance(power, (int, float)) and power > 0 and not _reversed(func)
        if name in ("square", "pow", "abs", "absolute", "sqrt") and kind.rectified and kind.low >= 0 and growing:
            return Nonlinearity(kind.function, 0.0, math.inf, True)
        scaled = name in ("mul", "multiply", "div", "divide", "truediv", "true_divide") and not _reversed(func)
        if scaled and len(given) == 1 and kind.rectified:
            return Nonlinearity(kind.function, rectified=True)
        return UNKNOWN


def _reversed(func: Callable[..., Any]) -> bool:
    """Whether the tensor is the divisor, or the exponent, of a number."""
    return getattr(func, "__name__", "") in ("__rtruediv__", "__rdiv__", "__rpow__")


def _clamped(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Nonlinearity:
    """Of operations that take their bounds as arguments."""

    def bound(position: int, *names: str) -> Any:
        found = next((kwargs[n] for n in names if n in kwargs), args[position] if len(args) > position else None)
        if isinstance(found, Tensor):
            found = found.item() if found.numel() == 1 else None
        return None if found is None else float(found)

    low: float | None = None
    high: float | None = None
    if name == "hardtanh":
        low, high = bound(1, "min_val"), bound(2, "max_val")
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    elif name in ("clamp", "clip"):
        low, high = bound(1, "min"), bound(2, "max")
    elif name == "clamp_min":
        low = bound(1, "min")
    elif name == "clamp_max":
        high = bound(1, "max")
    elif name == "threshold":
        edge, low = bound(1, "threshold"), bound(2, "value")
        low = low if low is not None and low == edge else None
    elif len([a for a in args if isinstance(a, Tensor)]) == 2:  # maximum
        second = args[1]
        low = float(second) if second.numel() == 1 else (0.0 if not bool(second.any()) else None)
    if low is None and high is None:
        return UNKNOWN
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    return Nonlinearity("relu" if (low, high) == (0.0, math.inf) else name, low, high, low == 0.0 or high == 0.0)
