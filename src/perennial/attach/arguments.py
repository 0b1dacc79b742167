"""What is given to ``attach``: looked at before anything is done, and refused in words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from perennial.methods import PROBES, Intervention
from perennial.methods.base import Method, Rule
from perennial.units import Distribution, build_and_record


def checked_method(method: Any, model: Any, optimizer: Any) -> Intervention:
    """The intervention.

    Raises:
        TypeError: it is none; says what it is instead and what to pass.
    """
    if isinstance(method, PROBES):
        raise TypeError(
            f"{type(method).__name__} is a probe, which only measures: give it to a Lane of a Population, or a study"
        )
    if isinstance(method, Intervention):
        return method
    if isinstance(method, (nn.Module, Optimizer)) or any(isinstance(other, Method) for other in (model, optimizer)):
        raise TypeError(
            f"the order is attach(method, model, optimizer): the first argument is a {type(method).__name__}, not an "
            "intervention"
        )
    if isinstance(method, type) and issubclass(method, Intervention):
        raise TypeError(f"{method.__name__} is a class, not an intervention: pass an instance: {method.__name__}()")
    if isinstance(method, (list, tuple)):
        raise TypeError(
            f"a {type(method).__name__} is not an intervention: attach several methods by one call each; they act in "
            "that order"
        )
    if isinstance(method, Rule):
        raise TypeError(
            f"{method!r} is not an intervention. Optimizer rules train a model themselves; they are not attached to "
            "another optimizer"
        )
    raise TypeError(f"{method!r} is not an intervention: pass an instance such as perennial.ContinualBackprop()")


def bare_model(model: Any) -> nn.Module:
    """The module inside DDP, DataParallel and what ``torch.compile`` returns: the same parameters, their own names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            assert isinstance(model, nn.Module)
            return model


def bare_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer whose ``step`` runs: inside what accelerate and others put around it."""
    kind = type(optimizer).__name__
    if isinstance(optimizer, LRScheduler):  # it has an optimizer inside, as a wrapper has
        raise TypeError(f"optimizer is a {kind}, a learning rate scheduler: pass the optimizer that it was made for")
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is a {kind}, not a torch.optim.Optimizer")
    return optimizer


def trained(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of the model that the optimizer trains."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = {name: p for name, p in model.named_parameters() if id(p) in held and p.requires_grad}
    if not found:
        raise ValueError(
            "the optimizer holds none of the model's parameters that require a gradient: it was made for another "
            "model, or before the model was moved or copied"
        )
    return found


def drawn_by(factory: Callable[[], nn.Module], model: nn.Module) -> dict[str, Distribution]:
    """How a factory draws the parameters of such a model.

    Raises:
        TypeError: it is a model itself, or makes none.
        ValueError: it makes another model.
    """
    if isinstance(factory, nn.Module):
        raise TypeError(
            f"factory= is a {type(factory).__name__}, a model: pass a function without arguments that makes one"
        )

    def build() -> nn.Module:
        made: Any = factory()
        if not isinstance(made, nn.Module):
            raise TypeError(f"factory= returned a {type(made).__name__}, not a torch.nn.Module")
        return made

    made, initial = build_and_record(build)
    ours, theirs = dict(model.named_parameters()), dict(made.named_parameters())
    wrong = [f"it has no {name}" for name in ours if name not in theirs]
    wrong += [f"its {name} is not in the model" for name in theirs if name not in ours]
    wrong += [
        f"its {name} is {list(theirs[name].shape)}, the model's {list(ours[name].shape)}"
        for name in ours
        if name in theirs and not is_lazy(theirs[name]) and theirs[name].shape != ours[name].shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"factory= makes another model than the one that is attached to: {'; '.join(wrong[:3])}{more}")
    return initial


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as positional and keyword arguments."""
    if example is None:
        return (), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}


@contextlib.contextmanager
def running_on(example: Any, model: nn.Module) -> Iterator[None]:
    """Whatever goes wrong in here gets a note of which example the model was run on."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while running the model once on example={described(example)}")
        if hint := _hint(example, model):
            error.add_note(hint)
        raise


def described(value: Any) -> str:
    """An example in short: types, shapes and dtypes."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)} on {value.device}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {described(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)) and len(value) <= 8 and any(isinstance(item, Tensor) for item in value):
        return "(" + ", ".join(described(item) for item in value) + ")"
    return f"a {type(value).__name__}"


def _hint(example: Any, model: nn.Module) -> str:
    args, kwargs = as_call(example)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not tensors:
        return "give example= a tensor, a tuple of positional arguments, or a mapping of keywords"
    floating = all(tensor.is_floating_point() for tensor in tensors)
    if floating and any(isinstance(module, nn.Embedding) for module in model.modules()):
        return "the model has an embedding, which reads whole numbers: give ids, such as torch.randint(0, 10, (2, 16))"
    first = next(model.parameters(), None)
    if first is None:
        return ""
    return f"the model's parameters are {str(first.dtype).removeprefix('torch.')} on {first.device}"
