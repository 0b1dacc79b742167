"""What a user's model computes on its way, seen through hooks on its modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perennial.units import UnitLayer
from perennial.units.trace import undisturbed


class Tap:
    """A forward pre-hook that keeps what a module was given last, while gradients are recorded.

    Passes under ``no_grad`` (evaluation, rollouts) are not looked at. A copy or a pickle of the model takes along a
    hook that does nothing: its keeper stays with the original.
    """

    def __init__(self, name: str = "", seen: dict[str, Tensor] | None = None, slopes: dict[str, Tensor] | None = None):
        self.name, self.seen, self.slopes = name, seen, slopes

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.seen is None or not torch.is_grad_enabled():
            return
        given = args[0] if args else kwargs["input"]
        self.seen[self.name] = given.detach()
        if self.slopes is not None and given.requires_grad:
            given.register_hook(self.keep_slope)

    def keep_slope(self, slope: Tensor) -> None:
        """Keep the gradient of what the module was given."""
        if self.slopes is not None:
            self.slopes[self.name] = slope.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        return Tap()

    def __reduce__(self) -> tuple[type[Tap], tuple[()]]:
        return Tap, ()


def let_compiled_code_see_hooks() -> None:
    """Make Dynamo check the hooks of modules before it runs what it has compiled.

    It leaves that out to save time. Then two models of one class share compiled code whether or not hooks are on them:
    forward passes of a bare model would reach the keeper of another. What was compiled before stays unchecked. Free of
    cost: whatever makes an optimizer has imported Dynamo.
    """
    import torch._dynamo

    if hasattr(torch._dynamo.config, "skip_nnmodule_hook_guards"):
        torch._dynamo.config.skip_nnmodule_hook_guards = False


_READERS = {
    "linear": (nn.Linear,),
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}


def _kind(module: nn.Module) -> str:
    return "conv" if isinstance(module, _READERS["conv"]) else "linear"


def tapped(
    model: nn.Module, layers: Sequence[UnitLayer], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, UnitLayer], dict[str, str]]:
    """Which readers' inputs hooks can see, found by looking.

    Returns:
        The layers by name, each with a tap on a module that was called in the forward pass; and for the others the
        reason why no hook sees what reads them.
    """
    modules = dict(model.named_modules())
    candidates: dict[str, list[tuple[str, str]]] = {}
    for layer in layers:
        for part in sorted(layer.outgoing, key=lambda part: part.parameter != layer.tap):
            owner, _, leaf = part.parameter.rpartition(".")
            if leaf == "weight":
                candidates.setdefault(layer.name, []).append((part.parameter, owner))
    shapes: dict[str, torch.Size] = {}

    def look(owner: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            value = given[0] if given else named.get("input")
            if isinstance(value, Tensor):
                shapes[owner] = value.shape

        return hook

    owners = {owner for found in candidates.values() for _, owner in found}
    handles = [modules[owner].register_forward_pre_hook(look(owner), with_kwargs=True) for owner in owners]
    try:
        with undisturbed(model):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    found, missing = {}, {}
    for layer in layers:
        for parameter, owner in candidates.get(layer.name, ()):
            kind = _kind(modules[owner])
            if owner in shapes:
                found[layer.name] = dataclasses.replace(layer, tap=parameter, reader=kind)
                break
        else:
            readers = ", ".join(part.parameter for part in layer.outgoing)
            missing[layer.name] = f"what reads it ({readers}) is not called as a module, so no hook sees its activation"
    return found, missing
