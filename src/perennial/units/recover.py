"""How a live model's parameters would be drawn, when there is no factory to watch.

A twin of the model is made that has its structure and none of its numbers, and the model's own initialisers are run
on the twin under the recorder of :mod:`perennial.units.draw`, in the order in which a constructor runs them.
"""

from __future__ import annotations

import functools
import inspect
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from perennial.units.draw import Distribution, Recorder, recording

_HOOKS = {key for key, value in vars(nn.Module()).items() if isinstance(value, dict)} - {
    "_parameters",
    "_buffers",
    "_modules",
}


def recover(model: nn.Module) -> dict[str, Distribution]:
    """How each parameter of a model, and each floating-point buffer, would be drawn if the model were made again.

    What is run, from the inner modules to the outer ones, so that the last to fill a parameter counts:

    - a module's own ``reset_parameters()`` or ``_reset_parameters()``;
    - of a model of transformers, its ``_init_weights``, which knows the config;
    - of any other module, its ``_initialize_weights()`` or ``_init_weights()``, or, if that takes a module, the same
      applied to everything inside it;
    - of peft's LoRA layers, ``reset_lora_parameters`` with the adapter's ``init_lora_weights``.

    Absent are parameters that nothing of that fills, whose initialiser fails, or that it makes of other numbers (LoRA
    by ``"pissa"`` or ``"olora"``; the adapters of peft that are not LoRA; a parametrised weight). A parameter that two
    modules share goes by the first of them.

    What a constructor does *besides* calling those functions leaves no trace on the model, and is not seen: the
    gains by which stable-baselines3 applies ``orthogonal_`` to a policy, ``nn.init`` called in a constructor, the
    smaller weights that some code gives to the last layer of a residual block. There :func:`recover` says what the
    module alone would do. :func:`build_and_record` on the factory is exact.

    The model is not touched, and neither are the global generators of torch, NumPy and Python. The twin is on the CPU;
    its numbers are not drawn, so that a large model costs neither time nor memory worth mentioning.
    """
    twins, blanks = _twins(model)
    twin = twins[id(model)]
    generators = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), recording(blanks) as recorder:
            warnings.simplefilter("ignore")  # of initialisers, which the user has seen when the model was made
            for module in _inner_first(twin):
                _initialise(module, recorder)
            _initialise_adapters(twin, recorder)
    finally:
        random.setstate(generators[0])
        numpy.random.set_state(generators[1])
    found: dict[str, Distribution] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        other = twins[id(module)]
        for mine, its in ((module._parameters, other._parameters), (module._buffers, other._buffers)):
            for key, tensor in mine.items():
                if tensor is None or id(tensor) in seen or is_lazy(tensor) or not tensor.is_floating_point():
                    continue
                seen.add(id(tensor))
                drawn = its.get(key)
                distribution = None if drawn is None or drawn.shape != tensor.shape else recorder.of(drawn)
                if distribution is not None:
                    found[f"{prefix}.{key}" if prefix else key] = distribution
    return found


def _twins(model: nn.Module) -> tuple[dict[int, nn.Module], list[Tensor]]:
    """A module of the same class for each module of a model, by the original's identity, with blank parameters; and
    those parameters.

    Attributes that lead back into the model (modules and tensors in lists, methods of the model as attributes) lead
    into the twin instead. Other objects are shared. Tied parameters are not tied in the twin, since initialisers run
    before they are tied.
    """
    twins: dict[int, nn.Module] = {id(module): object.__new__(type(module)) for module in model.modules()}
    replaced: dict[int, Any] = dict(twins)
    blanks: list[Tensor] = []
    for module in model.modules():
        attributes: dict[str, Any] = {}
        for key in ("_parameters", "_buffers"):
            attributes[key] = {}
            for name, tensor in vars(module)[key].items():
                blank = tensor if tensor is None or is_lazy(tensor) else _blank(tensor)
                attributes[key][name] = blank
                if isinstance(blank, nn.Parameter) and not is_lazy(blank):
                    blanks.append(blank)
                if tensor is not None:
                    replaced.setdefault(id(tensor), blank)
        attributes["_modules"] = {
            name: None if child is None else twins[id(child)] for name, child in module._modules.items()
        }
        twins[id(module)].__dict__.update(attributes)
    for module in model.modules():
        own = vars(twins[id(module)])
        for key, value in vars(module).items():
            if key in _HOOKS:
                own[key] = type(value)()
            elif key not in own and key != "_is_hf_initialized":
                own[key] = _rebound(value, replaced)
    return twins, blanks


def _blank(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return tensor.detach().to("cpu", copy=True) if not tensor.is_meta else torch.empty_like(tensor)
    blank = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype), requires_grad=tensor.requires_grad)
    blank.__dict__.update({key: value for key, value in vars(tensor).items() if key != "_is_hf_initialized"})
    return blank


def _rebound(value: Any, replaced: Mapping[int, Any], depth: int = 3) -> Any:
    """A value with what belongs to the model replaced by what belongs to the twin."""
    if id(value) in replaced:
        return replaced[id(value)]
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, types.MethodType):
        owner = replaced.get(id(value.__self__))
        return value if owner is None else types.MethodType(value.__func__, owner)
    if depth == 0:
        return value
    if type(value) in (list, tuple):
        return type(value)(_rebound(one, replaced, depth - 1) for one in value)
    if type(value) is dict:
        return {key: _rebound(one, replaced, depth - 1) for key, one in value.items()}
    if type(value) is functools.partial:
        func, *args = (_rebound(one, replaced, depth - 1) for one in (value.func, *value.args))
        return functools.partial(func, *args, **_rebound(value.keywords, replaced, depth - 1))
    return value


def _inner_first(module: nn.Module, seen: set[int] | None = None) -> Iterator[nn.Module]:
    """Every module once, after the modules inside it."""
    seen = set() if seen is None else seen
    seen.add(id(module))
    for child in module.children():
        if id(child) not in seen:
            yield from _inner_first(child, seen)
    yield module


def _initialise(module: nn.Module, recorder: Recorder) -> None:
    for name in ("reset_parameters", "_reset_parameters"):
        function = getattr(module, name, None)
        if _required(function) == 0:
            _attempt(module, recorder, function)
            break
    if _is_pretrained(module):
        _initialise_pretrained(module, module, recorder)
        return
    for name in ("_initialize_weights", "_init_weights"):
        function = getattr(module, name, None)
        if _required(function) == 0:
            _attempt(module, recorder, function)
        elif _required(function) == 1:
            for inner in _inner_first(module):
                _attempt(inner, recorder, function, inner)
        else:
            continue
        break


def _initialise_pretrained(module: nn.Module, model: Any, recorder: Recorder) -> None:
    """As transformers does it: each module by the ``_init_weights`` of the model that it is nearest inside."""
    for child in module.children():
        _initialise_pretrained(child, child if _is_pretrained(child) else model, recorder)
    _attempt(module, recorder, model._init_weights, module)


def _is_pretrained(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers.modeling_utils")  # a model of it cannot exist where it is not imported
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def _initialise_adapters(twin: nn.Module, recorder: Recorder) -> None:
    """peft adds adapters to a model that is initialised already, so that the model's initialiser has no say in them."""
    configs: dict[int, Mapping[str, Any]] = {}
    for module in twin.modules():
        known = vars(module).get("peft_config", configs.get(id(module)))
        if isinstance(known, Mapping):
            for inner in module.modules():
                configs[id(inner)] = known
    for module in twin.modules():
        if not (hasattr(module, "adapter_layer_names") and hasattr(module, "get_base_layer")):
            continue
        for name in module.adapter_layer_names:  # type: ignore[union-attr]
            adapter: Any = getattr(module, name, None)
            if isinstance(adapter, (nn.Module, nn.Parameter)):
                _forget(adapter, recorder)
        reset: Any = getattr(module, "reset_lora_parameters", None)
        if not callable(reset) or list(inspect.signature(reset).parameters) != ["adapter_name", "init_lora_weights"]:
            continue
        for name, config in configs.get(id(module), {}).items():
            _initialise_lora(module, name, config, reset, recorder)


def _initialise_lora(module: Any, name: str, config: Any, reset: Callable[..., Any], recorder: Recorder) -> None:
    kind = getattr(config, "init_lora_weights", None)
    parts = [part[name] for part in (module.lora_A, module.lora_B) if name in part]
    variants = getattr(module, "lora_variant", {})
    if name in variants and not module.use_dora.get(name):
        return  # it may draw the matrices in its own way; DoRA leaves them as they are
    if kind is False:
        for part in parts:
            if hasattr(part, "reset_parameters"):
                _attempt(part, recorder, part.reset_parameters)
    elif kind is True or (isinstance(kind, str) and kind.lower() == "gaussian"):
        _attempt(module, recorder, reset, name, kind, forget=parts)


def _required(function: Any) -> int:
    """How many arguments a function cannot be called without; -1 where there is no function to call."""
    if not callable(function):
        return -1
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return -1
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return sum(p.default is inspect.Parameter.empty and p.kind not in fixed for p in parameters)


def _attempt(
    module: nn.Module, recorder: Recorder, function: Any, *args: Any, forget: list[nn.Module] | None = None
) -> None:
    """Run an initialiser of somebody else's. If it fails, nothing is known of what it would have filled."""
    try:
        with torch.no_grad():
            function(*args)
    except Exception:
        for part in [module] if forget is None else forget:
            _forget(part, recorder)


def _forget(part: nn.Module | nn.Parameter, recorder: Recorder) -> None:
    for tensor in [part] if isinstance(part, nn.Parameter) else [*part.parameters(), *part.buffers()]:
        if not is_lazy(tensor):
            recorder.forget(tensor)
