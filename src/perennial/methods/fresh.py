"""What weights are brought back to: a fresh draw, or the value that they started from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from perennial.methods.base import Context, Tensors
from perennial.noise import elements
from perennial.units import UnitMap


class Initial(NamedTuple):
    """State of a method that remembers where the weights started."""

    initial: dict[str, Tensor]
    """The value that each parameter had at ``init``, its shape."""


def remember(params: Tensors) -> Initial:
    """The parameters as they are now."""
    return Initial({name: w.detach().clone() for name, w in params.items()})


def require_known(method: str, parameters: Iterable[str], units: UnitMap) -> None:
    """Refuse parameters of which it is not known how they were first drawn.

    Raises:
        ValueError: names the method, the parameters and the way out.
    """
    unknown = [name for name in parameters if name not in units.initial]
    if unknown:
        raise ValueError(
            f"{method} cannot redraw {', '.join(unknown)}: how it was first drawn is not known. Fill it with a "
            "function of torch.nn.init in the factory"
        )


def drawn(name: str, param: Tensor, context: Context) -> Tensor:
    """A whole parameter drawn afresh from the distribution that it was first drawn from, its shape and dtype.

    The rows of one that was drawn orthogonal are random directions of the right length; see
    :meth:`perennial.units.Distribution.draw`.
    """
    fresh = context.units.initial[name].draw(context.noise, name, elements(param)).to(param.dtype)
    # A constant is the same in all lanes; added to zeros like the parameter it has their dimension, which it must have.
    return torch.zeros_like(param) + fresh


def falls_due(every: int | None, steps_made: int, task_ended: bool) -> bool:
    """Whether an event falls due: every so many optimizer steps, never (0), or when a new task begins (None)."""
    if every is None:
        return task_ended
    return every > 0 and steps_made % every == 0
