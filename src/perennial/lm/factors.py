"""Low-rank updates, and where they stand in a model."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perennial.attach.arguments import bare_model


class Factors(NamedTuple):
    r"""An update of one matrix, :math:`\Delta W = s B A`."""

    down: Tensor
    """A, [rank, in]."""
    up: Tensor
    """B, [out, rank]."""
    scaling: float
    """s."""

    @property
    def update(self) -> Tensor:
        """The update itself, [out, in], float32, detached."""
        return self.scaling * (self.up.detach().float() @ self.down.detach().float())


class Pair(NamedTuple):
    """What a penalty sees of one adapted matrix."""

    module: str
    """Qualified name of the adapted module."""
    new: Factors
    """The adapter in training."""
    old: Tensor | None
    """A of all earlier adapters below each other, [sum of ranks, in], detached; None where there are none."""


def factors_of(layer: Any, adapter: str) -> Factors:
    """An adapter of a layer of peft's, its live parameters."""
    return Factors(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter])


def adapted(base: nn.Module, config: Any, name: str = "default") -> Any:
    """A model with its first adapter, a ``PeftModel``."""
    from peft import get_peft_model

    with warnings.catch_warnings():  # peft 0.21 asks for an attribute that transformers 5.24 has renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return get_peft_model(base, config, adapter_name=name)


STACK = "_perennial_stack"
"""Attribute of a model that names its :class:`~perennial.lm.AdapterStack`."""


def pairs_of(model: nn.Module) -> list[Pair]:
    """The adapted matrices of a model: of its :class:`~perennial.lm.stack.AdapterStack`, or where it has none of peft's
    active adapters, of which those that are trained are new (one a matrix) and the others old.

    Raises:
        ValueError: no adapter is trained, or its update is not :math:`s B A`.
    """
    from peft.tuners.lora import LoraLayer

    model = bare_model(model)
    if (stack := getattr(model, STACK, None)) is not None:
        known: list[Pair] = stack.pairs()
        return known
    found = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            names = [a for a in module.active_adapters if a in module.lora_A]
            if any(getattr(module, "use_dora", {}).get(a) for a in names):
                raise ValueError(f"{name} has DoRA, whose update is not s B A: penalties are on plain LoRA")
            acting = [factors_of(module, a) for a in names]
            new = [f for f in acting if f.down.requires_grad]
            old = [f.down.detach() for f in acting if not f.down.requires_grad]
            found += [Pair(name, one, torch.cat(old) if old else None) for one in new[:1]]
    if not found:
        raise ValueError("the model has no LoRA adapter in training; a penalty on its update has nothing to act on")
    return found
