"""How a lane runs its network: what it does otherwise than torch, and what it looks at on the way."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from perennial.methods.base import Tensors
from perennial.noise import Noise


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, and in training mode afterwards."""
    model.eval()
    try:
        yield
    finally:
        model.train()


def copied(buffers: Tensors) -> dict[str, Tensor]:
    """Tensors that may be written into."""
    return {name: buffer.clone() for name, buffer in buffers.items()}


@contextlib.contextmanager
def counted(modules: Mapping[str, nn.Module]) -> Iterator[Counter[nn.Module]]:
    """How often each module is called meanwhile."""
    uses: Counter[nn.Module] = Counter()
    hooks = [module.register_forward_hook(lambda called, *_: uses.update([called])) for module in modules.values()]
    try:
        yield uses
    finally:
        for hook in hooks:
            hook.remove()


class InLanes(TorchFunctionMode):
    """What stands in for functions of torch's that lanes cannot call.

    Dropout goes by the lane's noise, one draw for each call in the order of the pass; without noise there is none.
    Batch normalisation moves its statistics by arithmetic: torch's own writes into a copy where lanes come last. What a
    pass would write into ``lost`` buffers it does not write: a pass within another ``vmap`` could not.
    """

    def __init__(self, noise: Noise | None, lost: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.noise = noise and noise.scoped("network")
        self.lost = {id(buffer) for buffer in lost}
        self.calls, self.drops = 0, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.batch_norm:
            return _batch_norm(not self.lost, *args, **kwargs)
        if func is F.instance_norm:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            if given.get("running_mean") is not None:
                raise ValueError("lanes cannot keep the running statistics of instance normalisation; leave them out")
        name = getattr(func, "__name__", "")
        in_place = name in _AUGMENTED or (name.endswith("_") and not name.endswith("__"))
        if in_place and args and id(args[0]) in self.lost:
            return args[0]
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        self.calls += 1
        if not training or p == 0:
            return input
        self.drops = True
        if self.noise is None:
            return input.view_as(input)  # a tensor of its own, as with noise: who reads it is given something else
        element = torch.arange(input.numel(), dtype=torch.int32, device=input.device).view(input.shape)
        kept = self.noise.uniform(f"dropout {self.calls}", element) >= p
        factor = kept.to(input.dtype) * (1 / (1 - p) if p < 1 else 0.0)
        return input.mul_(factor) if inplace else input * factor


_AUGMENTED = {f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()}
_AUGMENTED.add("__setitem__")


def _batch_norm(
    moves: bool,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    out = F.batch_norm(input, None, None, weight, bias, True, momentum, eps)
    if not moves:
        return out
    with torch.no_grad():
        others = [d for d in range(input.dim()) if d != 1]
        var, mean = torch.var_mean(input.detach(), others)
        running_mean.mul_(1 - momentum).add_(momentum * mean)
        running_var.mul_(1 - momentum).add_(momentum * var)
    return out


class Taps(TorchFunctionMode):
    """Keeps what the readers of hidden units were given, and adds to it."""

    def __init__(self, params: Tensors, readers: Iterable[str], added: dict[str, Tensor]) -> None:
        super().__init__()
        self.wanted = {id(params[reader]): reader for reader in readers}
        self.added = added
        self.seen: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.linear, F.conv1d, F.conv2d, F.conv3d):
            reader = self.wanted.get(id(kwargs["weight"] if "weight" in kwargs else args[1]))
            if reader is not None:
                given = kwargs["input"] if "input" in kwargs else args[0]
                self.seen[reader] = given
                if reader in self.added:
                    moved = given + self.added[reader]
                    if args:
                        args = (moved, *args[1:])
                    else:
                        kwargs = kwargs | {"input": moved}
        return func(*args, **kwargs)
