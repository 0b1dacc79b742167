"""Masks beside a model: which weights are kept, and keeping the others where they are."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Masks: TypeAlias = dict[str, Tensor]
"""By parameter name: bool, the parameter's shape, True where the weight is kept. A parameter without one is whole."""


def prunable(model: nn.Module, patterns: Iterable[str] = ("*",)) -> list[str]:
    """The weights that pruning may take from: of linear layers and convolutions, by qualified name.

    Biases and the parameters of norms are few, and their loss changes what a unit is; the lottery ticket paper leaves
    them alone, as later work does.

    Args:
        model: any.
        patterns: of the modules' names, as ``fnmatch`` takes them (``*``, ``layer1.*``, ``fc``); any may match.

    Raises:
        ValueError: a pattern that matches nothing, or nothing at all to prune.
    """
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, _ConvNd))]
    held = dict(model.named_parameters())
    layers = [name for name in layers if _weight(name) in held]  # a tied weight has its first name alone
    wanted = list(patterns)
    for pattern in wanted:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
            raise ValueError(
                f"the pattern {pattern!r} matches no linear layer or convolution; there are "
                f"{', '.join(repr(name) for name in layers) or 'none'}"
            )
    return [_weight(name) for name in layers if any(fnmatch.fnmatchcase(name, p) for p in wanted)]


def whole(model: nn.Module, names: Iterable[str] | None = None) -> Masks:
    """Masks that keep everything, of :func:`~perennial.tickets.prunable` weights unless named."""
    held = dict(model.named_parameters())
    return {n: torch.ones_like(held[n], dtype=torch.bool) for n in (prunable(model) if names is None else names)}


def remaining(masks: Masks) -> float:
    """The share of weights that masks keep, in [0, 1]."""
    return sum(int(m.sum()) for m in masks.values()) / max(1, sum(m.numel() for m in masks.values()))


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Raise ValueError where masks do not belong to the model: a name, a shape, a type."""
    held = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in held:
            raise ValueError(f"there is a mask for {name!r}, but the model has no such parameter; is it another model?")
        if mask.dtype != torch.bool:
            raise ValueError(f"the mask of {name} is {mask.dtype}; masks are bool, True where a weight is kept")
        if mask.shape != held[name].shape:
            raise ValueError(
                f"the mask of {name} is {list(mask.shape)}, but the parameter {list(held[name].shape)}; is it of "
                "another model?"
            )


class Enforced:
    """Holds pruned weights where they are, whatever the optimizer does; :func:`~perennial.tickets.enforce` makes it."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], frozen: Mapping[str, Tensor] | None) -> None:
        check_masks(model, masks)
        held = dict(model.named_parameters())
        self.model = model
        self._gone = {name: ~mask.to(held[name].device) for name, mask in masks.items()}
        self._fill = {
            name: (torch.zeros(()) if frozen is None else frozen[name]).to(held[name].device, held[name].dtype)
            for name in masks
        }
        self._names = {id(held[name]): name for name in masks}
        self._hooks = (
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        )
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Put every pruned weight where it belongs: after weights were loaded, say."""
        held = dict(self.model.named_parameters())
        for name, gone in self._gone.items():
            held[name].copy_(torch.where(gone, self._fill[name], held[name]))

    def check(self) -> None:
        """Raise RuntimeError if a pruned weight has moved."""
        held = dict(self.model.named_parameters())
        for name, gone in self._gone.items():
            moved = int((gone & (held[name] != self._fill[name])).sum())
            if moved:
                raise RuntimeError(
                    f"{moved} pruned weights of {name} have moved: something other than a torch optimizer changed "
                    "them, or weights were loaded (call apply() after that)"
                )

    def remove(self) -> None:
        """Leave the weights to themselves."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _mine(self, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, str]]:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return [(p, self._names[id(p)]) for p in params if id(p) in self._names]

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for p, name in self._mine(optimizer):
            if p.grad is not None:
                p.grad.masked_fill_(self._gone[name], 0)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for p, name in self._mine(optimizer):
            gone, fill = self._gone[name], self._fill[name]
            if fill.dim():
                p.copy_(torch.where(gone, fill, p))
            else:
                p.masked_fill_(gone, 0)
            for slot in optimizer.state.get(p, {}).values():
                if isinstance(slot, Tensor) and slot.shape == p.shape and slot.is_floating_point():
                    slot.masked_fill_(gone, 0)


def enforce(model: nn.Module, masks: Mapping[str, Tensor], *, frozen: Mapping[str, Tensor] | None = None) -> Enforced:
    """Hold the pruned weights of a model at zero while any torch optimizer trains it.

    Masks stay outside: the model's modules, parameters and ``state_dict`` are as they were, and a copy of the model is
    a plain model. Before a step the gradients of pruned weights are zeroed, so that no norm or clipping counts them,
    and after it the weights and the optimizer's tensors of their shape, so that neither momentum nor decay moves them.
    Every optimizer of the process is watched: it may be made later. (A step hook is called around ``step``; a closure's
    gradients, which come within it, are masked through the weights and slots alone.)

    Args:
        model: any; the parameters must stay the same objects.
        masks: bool, True where kept.
        frozen: values by name at which pruned weights are held instead of zero (their start, in Zhou et al. 2019).

    Returns:
        A handle with ``apply()``, ``check()``, ``remove()``; also a context manager.

    Raises:
        ValueError: masks of another model.
    """
    return Enforced(model, masks, frozen)


def _weight(module: str) -> str:
    return f"{module}.weight" if module else "weight"
