"""From which distribution was a parameter first drawn?

A fresh unit should look like a unit at the start. Instead of guessing the initialiser from the layer's type, the model
factory is run once under a mode that watches the random fills (``uniform_``, ``normal_``, ``zeros_``, ...) that
``torch.nn.init`` and ``reset_parameters`` end in. Whatever the factory did last to a parameter is its distribution.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

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
    """Remembers the last fill of every storage that was filled whole; any other change in place makes it unknown."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fills: dict[int, Distribution] = {}
        self.alive: list[Any] = []  # storages, so that no address is given out twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self._changed(name, value, args)
        for value in kwargs.values() if func._schema.is_mutable else ():
            if isinstance(value, Tensor):
                self.fills.pop(value.untyped_storage().data_ptr(), None)
        return out

    def _changed(self, name: str, tensor: Tensor, args: tuple[Any, ...]) -> None:
        storage = tensor.untyped_storage()
        self.fills.pop(storage.data_ptr(), None)
        whole = tensor.numel() * tensor.element_size() == storage.nbytes()
        if name in _FILLS and whole:
            self.fills[storage.data_ptr()] = _FILLS[name](*args[1:])
            self.alive.append(storage)

    def of(self, tensor: Tensor) -> Distribution | None:
        """How a tensor that fills its storage was drawn."""
        storage = tensor.untyped_storage()
        whole = tensor.numel() * tensor.element_size() == storage.nbytes()
        return self.fills.get(storage.data_ptr()) if whole else None


_FILLS: dict[str, Callable[..., Distribution]] = {
    "uniform_": lambda low=0.0, high=1.0: Distribution("uniform", float(low), float(high)),
    "normal_": lambda mean=0.0, std=1.0: Distribution("normal", float(mean), float(std)),
    "zero_": lambda: Distribution("constant", 0.0),
    "fill_": lambda value: Distribution("constant", float(value)),
}


@contextlib.contextmanager
def _unknown_truncated_normals(recorder: _Recorder) -> Iterator[None]:
    """``trunc_normal_`` fills with a plain normal first, and if no number lies outside changes nothing after that."""
    fill = nn.init._no_grad_trunc_normal_

    def watched(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = fill(tensor, *args, **kwargs)
        recorder.fills.pop(tensor.untyped_storage().data_ptr(), None)
        return out

    with mock.patch.object(nn.init, "_no_grad_trunc_normal_", watched):
        yield


def build_and_record(factory: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Distribution]]:
    """Run a model factory and say how each parameter was drawn.

    A parameter that was filled in another way (``orthogonal_``, ``trunc_normal_``, a file) is missing from the answer;
    a method that must redraw it says so.
    """
    with _Recorder() as recorder, _unknown_truncated_normals(recorder):
        model = factory()
    drawn = {name: recorder.of(p) for name, p in model.named_parameters()}
    return model, {name: d for name, d in drawn.items() if d is not None}
