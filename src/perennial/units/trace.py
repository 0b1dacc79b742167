"""Finding hidden units by carrying unit numbers through one forward pass.

Every activation carries a shadow: an integer tensor of the same shape that names the unit behind each entry, 0 where
there is none. Data movement moves the shadow the same way, element-wise operations join the units of their inputs, a
linear or convolutional layer reads off which of its columns read which unit and starts new units. An operation that is
not listed in ``perennial.units.operations`` ends its units: they are refused, with its name as the reason.

Joined units are one: what makes any of them makes all of them, and so for what reads them. What was joined is sorted
out at the end, by connected components. Components that have the same producers and the same readers form a layer.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from perennial.units.assemble import assemble
from perennial.units.draw import Distribution
from perennial.units.map import UnitMap
from perennial.units.record import tensors_in, units_in
from perennial.units.tracer import Tracer


def _unusual(parameter: nn.Parameter) -> str:
    """Why rows of a parameter cannot be handled as rows of a plain tensor; empty if they can."""
    kind = type(parameter).__name__
    if getattr(parameter, "_is_flat_param", False) or kind == "FlatParameter":
        return "flattened by FSDP: it has no rows; use DDP"
    if kind == "DTensor" or hasattr(parameter, "placements"):
        return "a DTensor: its rows lie on several devices"
    if parameter.layout != torch.strided:
        return f"sparse ({parameter.layout})"
    if parameter.is_quantized or not (parameter.is_floating_point() or parameter.is_complex()):
        return f"quantised or not floating point ({parameter.dtype})"
    return ""


def _overlapping(model: nn.Module) -> dict[str, str]:
    """Parameters that lie in the same memory as another, without being the same."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters():
        if not _unusual(parameter) and parameter.device.type != "meta" and parameter.numel():
            found.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
    shared = {name: [n for n in names if n != name] for names in found.values() if len(names) > 1 for name in names}
    return {name: f"it shares memory with {', '.join(others)}" for name, others in shared.items()}


@contextlib.contextmanager
def _same_random_state(devices: list[int]) -> Iterator[None]:
    """The global random states of torch, of Python and of NumPy, if it is there, are put back: models draw from all."""
    python, numpy = random.getstate(), sys.modules.get("numpy.random")
    arrays = numpy.get_state(legacy=False) if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(arrays)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model's forward pass in here, and it is left as it was: modes, buffers, gradients, global random states.

    Two runs start from the same random states and draw the same numbers. Buffers are put back through ``.data``, so
    that a graph made earlier can still be differentiated.
    """
    modules = list(model.modules())
    buffers = [(m, dict(m._buffers)) for m in modules]
    values = [(b, b.detach().clone()) for _, held in buffers for b in held.values() if b is not None]
    modes = [m.training for m in modules]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    # What torch.compile has made of the model is left aside: Dynamo cannot run under a function mode.
    compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in modules)
    plain = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    try:
        with _same_random_state(devices), torch.no_grad(), plain:
            yield
    finally:
        for module, held in buffers:
            module._buffers.clear()
            module._buffers.update(held)
        for buffer, value in values:
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)
        for module, training in zip(modules, modes, strict=True):
            module.training = training


def copied(example: Any) -> Any:
    """The arguments of a forward pass with tensors of their own: a network may write into its input."""
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, example)


def trace(model: nn.Module, *args: Any, initial: Mapping[str, Distribution] | None = None, **kwargs: Any) -> UnitMap:
    """The hidden units of a network, found in one forward pass on an example.

    The model is left as it was: mode, buffers, gradients, hooks and the global random states do not change.
    Units that are also read otherwise, by an operation that is not known, are an output, or whose weights are used more
    than once are refused, with the reason in :attr:`UnitMap.refused`. Units on a residual stream are listed as coupled.

    Args:
        model: any module; a wrapper made by ``torch.compile`` must be traced before it is compiled.
        *args: an example input, as the model takes it; keywords too.
        initial: how parameters were drawn (:func:`perennial.units.build_and_record`), kept in the map.
    """
    args, kwargs = copied((args, kwargs))  # before the tracer looks at which tensors there are
    tracer = Tracer(model)
    tracer.record.spoiled |= {n: why for n, p in model.named_parameters() if (why := _unusual(p))}
    tracer.record.spoiled |= _overlapping(model)
    with undisturbed(model), tracer:
        out = model(*args, **kwargs)
    tracer.look(leaves(out))
    for tensor in leaves(out):
        shadow, statistic = tracer.shadow(tensor), tracer.statistic(tensor)
        if shadow is not None:
            tracer.record.outputs.append(units_in(shadow))
        if statistic is not None:
            tracer.end(statistic[0], "a statistic over units is an output of the model")
    return assemble(model, tracer.record, dict(initial or {}))


def repeats(model: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether two forward passes give the same, to the bit.

    Random numbers of the global generators do not stand in the way; those of a generator of the model's own do.
    """
    found = []
    for _ in range(2):
        mine, named = copied((args, kwargs))
        with undisturbed(model):
            found.append(leaves(model(*mine, **named)))
    return all(
        a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in zip(*found, strict=True)
    )


def leaves(value: Any) -> list[Tensor]:
    """The tensors of an output, in containers of any kind that pytree knows and in plain objects that hold some."""
    found = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += leaves(list(leaf.values()))
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            found += tensors_in(list(vars(leaf).values()))
    return found
