"""Plasticity injection."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perennial.noise import Noise, elements, seed_key
from perennial.units.draw import Distribution
from perennial.units.recover import recover


class Injected(nn.Module):
    r"""A module into which fresh parameters were injected.

    .. math:: f(x) + \big(g(x) - g_0(x)\big)

    ``frozen`` (f) is the module as it was, ``trained`` (g) a fresh one, ``frozen_copy`` (:math:`g_0`) the fresh one as
    it was at first. All three pass the gradient by x on; only ``trained`` learns. In a state dict their entries have
    the names of the module with ``frozen.``, ``trained.`` and ``frozen_copy.`` before them.
    """

    def __init__(self, frozen: nn.Module, trained: nn.Module) -> None:
        """Freezes ``frozen`` and copies ``trained`` as it is now."""
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.trained = trained
        self.frozen_copy = copy.deepcopy(trained).requires_grad_(False)
        self.training = frozen.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the module, for a module whose output is a tensor."""
        out = self.frozen(*args, **kwargs)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"the output of {type(self.frozen).__name__} is a {type(out).__name__}, and outputs are added here; "
                "inject plasticity into modules whose output is a tensor"
            )
        # In this order the difference is exactly zero at first, and the sum exactly what it was.
        difference: Tensor = self.trained(*args, **kwargs) - self.frozen_copy(*args, **kwargs)
        return out + difference

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Of the trained part alone: the other two stay frozen."""
        self.trained.requires_grad_(requires_grad)
        return self


def inject_plasticity(
    model: nn.Module, name: str, optimizer: Optimizer, initial: Mapping[str, Distribution] | None = None
) -> Injected:
    r"""Give a part of a network fresh parameters without changing what it computes (Nikishin et al., arXiv 2305.15555).

    The submodule ``name``, most often the head, becomes :class:`Injected`: the module as it is, frozen, plus the
    difference of a fresh module and its copy. The output is the same to the bit until the next step, and only the fresh
    module learns from then on. As many parameters learn as before.

    The fresh parameters are drawn as :func:`perennial.units.recover` says; torch's global generator gives the seed.
    Each group of the optimizer that held some of the originals gets another group with the same settings that holds the
    fresh ones. The originals stay in their group; their gradient is None from now on, and optimizers leave parameters
    without a gradient alone. The optimizer's state of everything else is untouched. A scheduler of learning rates knows
    the groups that there were when it was made: make it anew. Inject before methods are attached, since they look at
    parameters when they are attached.

    **Checkpoints.** The state dicts of an injected model and of its optimizer fit an injected model. To load one, build
    model and optimizer as at first, call this again for the same names in the same order, then load both.

    To inject a second time, inject into the trained part: ``inject_plasticity(model, "head.trained", optimizer)``.

    Args:
        model: the network.
        name: the submodule's qualified name; its output is a tensor.
        optimizer: what trains it.
        initial: how parameters were first drawn, by qualified name, where it is known
            (:func:`perennial.units.build_and_record`); it has the last word over what can be recovered.

    Returns:
        The module that now stands at ``name``.

    Raises:
        ValueError: there is no such submodule; it has no parameters to train; the optimizer does not hold them all;
            other modules share them; it has dropout or running statistics, with which the output would not stay the
            same; or it is not known how its parameters were first drawn. Nothing is then changed.
    """
    module = _submodule(model, name)
    groups = _groups(name, module, optimizer)
    fresh = _fresh(model, name, module, initial)
    injected = Injected(module, fresh)
    for parameter in module.parameters():
        parameter.grad = None
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, injected)
    new = dict(fresh.named_parameters())
    for group, held in groups:
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        if "param_names" in group:
            optimizer.add_param_group({**settings, "params": [(f"{name}.trained.{key}", new[key]) for key in held]})
        else:
            optimizer.add_param_group({**settings, "params": [new[key] for key in held]})
    return injected


def _submodule(model: nn.Module, name: str) -> nn.Module:
    """The module to inject into, if that can be done."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if name == "" or name not in modules:
        raise ValueError(
            f"the model has no submodule {name!r}; it has {', '.join(key for key in modules if key) or 'none'}"
        )
    module: nn.Module = modules[name]
    if isinstance(module, Injected):
        raise ValueError(f"{name} is injected already; inject into its trained part, {name + '.trained'!r}")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(f"{name} has no parameters that are trained, so that nothing can be injected into it")
    inside = {id(parameter) for parameter in module.parameters()}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in inside and not key.startswith(f"{name}."):
            raise ValueError(f"{key} is shared with {name} and would be frozen with it; inject into all that share it")
    for key, part in module.named_modules(prefix=name):
        rate = part.p if isinstance(part, nn.modules.dropout._DropoutNd) else getattr(part, "dropout", 0.0)
        if isinstance(rate, float) and rate > 0:
            raise ValueError(
                f"{key} drops out at random, and so the output would not stay the same; set its rate to 0, or inject "
                "into a part without dropout"
            )
        if getattr(part, "running_mean", None) is not None:
            raise ValueError(
                f"{key} normalises by statistics of the batch, and so the output would not stay the same; inject into "
                "a part without it"
            )
    return module


def _fresh(model: nn.Module, name: str, module: nn.Module, initial: Mapping[str, Distribution] | None) -> nn.Module:
    """A copy of the module with parameters drawn anew."""
    known = {**recover(model), **(initial or {})}
    unknown = [key for key, _ in module.named_parameters(prefix=name) if key not in known]
    if unknown:
        raise ValueError(
            f"it is not known how {', '.join(unknown)} was first drawn; give `initial`, the distributions by parameter "
            "name (perennial.units.build_and_record finds them by running the model's factory)"
        )
    seed = int(torch.randint(2**31 - 1, ()).item())
    fresh: nn.Module = copy.deepcopy(module)
    with torch.no_grad():
        for key, parameter in fresh.named_parameters(prefix=name):
            key_words = torch.tensor(seed_key(seed, "init"), dtype=torch.int32, device=parameter.device)
            noise = Noise(key_words, torch.zeros((), dtype=torch.int32, device=parameter.device), "inject_plasticity")
            parameter.copy_(known[key].draw(noise, key, elements(parameter)))
            parameter.grad = None
    return fresh


def _groups(name: str, module: nn.Module, optimizer: Optimizer) -> list[tuple[dict[str, Any], list[str]]]:
    """The optimizer's groups that hold parameters of the module, and which."""
    names = {id(parameter): key for key, parameter in module.named_parameters()}
    groups = [
        (group, [names[id(parameter)] for parameter in group["params"] if id(parameter) in names])
        for group in optimizer.param_groups
    ]
    held = {key for _, keys in groups for key in keys}
    missing = [
        f"{name}.{key}" for key, parameter in module.named_parameters() if parameter.requires_grad and key not in held
    ]
    if missing:
        raise ValueError(
            f"the optimizer does not hold {', '.join(missing)}; give the optimizer that trains them, or freeze them "
            "first"
        )
    return [(group, keys) for group, keys in groups if keys]
