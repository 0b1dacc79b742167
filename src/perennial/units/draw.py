"""From which distribution was a parameter first drawn?

A fresh unit should look like a unit at the start. Instead of guessing the initialiser from the layer's type, the model
factory is run once under a mode that watches the random fills (``uniform_``, ``normal_``, ``zeros_``, ...) that
``torch.nn.init`` and ``reset_parameters`` end in. Whatever the factory did last to a parameter is its distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from perennial.noise import Noise


@dataclass(frozen=True)
class Distribution:
    """Where fresh values of a parameter come from."""

    kind: str
    """``"uniform"`` on [first, second], ``"normal"`` of mean first and standard deviation second, or ``"constant"``
    first."""
    first: float
    second: float = 0.0

    def draw(self, noise: Noise, name: str, element: Tensor) -> Tensor:
        """Fresh values for the numbered elements (int32, any shape) of the named parameter, float32."""
        if self.kind == "uniform":
            return self.first + (self.second - self.first) * noise.uniform(name, element)
        if self.kind == "normal":
            return self.first + self.second * noise.normal(name, element)
        return torch.full_like(element, self.first, dtype=torch.float32)


class _Recorder(TorchDispatchMode):
    """Remembers the last fill of every tensor by its storage; any other change in place makes it unknown."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fills: dict[int, Distribution] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            name = func._schema.name.removeprefix("aten::")
            if name in _FILLS:
                self.fills[args[0].data_ptr()] = _FILLS[name](*args[1:])
            elif name not in _HARMLESS:
                self.fills.pop(args[0].data_ptr(), None)
        return out


_FILLS: dict[str, Callable[..., Distribution]] = {
    "uniform_": lambda low=0.0, high=1.0: Distribution("uniform", float(low), float(high)),
    "normal_": lambda mean=0.0, std=1.0: Distribution("normal", float(mean), float(std)),
    "zero_": lambda: Distribution("constant", 0.0),
    "fill_": lambda value: Distribution("constant", float(value)),
}
_HARMLESS = frozenset({"requires_grad_", "detach_", "set_", "resize_"})


def build_and_record(factory: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Distribution]]:
    """Run a model factory and say how each parameter was drawn.

    A parameter that was filled in another way (``orthogonal_``, ``trunc_normal_``, a file) is missing from the answer;
    a method that must redraw it says so.
    """
    with _Recorder() as recorder:
        model = factory()
    known = recorder.fills
    found = {name: known[p.data_ptr()] for name, p in model.named_parameters() if p.data_ptr() in known}
    return model, found
