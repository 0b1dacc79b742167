"""Layer resets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perennial.methods.base import Context, Intervention, Outcome, Tensors, choice, whole, whole_parameter
from perennial.methods.fresh import drawn, falls_due, require_known
from perennial.units import UnitMap, bias_beside


@dataclass(frozen=True)
class ResetLayers(Intervention):
    r"""Draw the last layers anew, or make them zero, or the whole network, now and then.

    .. math:: W_l, b_l \sim \text{the distribution that they were first drawn from}, \qquad l > L - k

    The optimizer's state of what is drawn anew starts anew as well. Of a network with several heads, the last k layers
    are all heads, and for each head the k - 1 hidden layers used before it. A parameter that is neither a weight matrix
    nor the bias of one, such as a norm's scale, goes with the weight matrix used before it. Buffers, such as running
    statistics, stay as they are, even where the whole network is drawn anew.

    Sources: Nikishin et al., arXiv 2205.07802 (the last layers, every so many steps); Dohare et al., Nature 2024 (the
    head, or a network retrained from scratch, when a new task begins).
    """

    last: int | None = 1
    """How many of the last weight layers, k: 1 for the head or heads alone; None for the whole network."""
    every: int | None = whole(None)
    """Optimizer steps from one reset to the next; 0: never; None: when a new task begins."""
    values: str = choice("drawn", "drawn", "zero")
    """What they become: drawn from the distribution that they were first drawn from, or zero."""

    OFF = {"every": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last is None:
            return
        if isinstance(self.last, bool) or not isinstance(self.last, int):
            raise TypeError(f"reset_layers.last is {self.last!r}; it is a whole number, or None for the whole network")
        if self.last < 1:
            raise ValueError(f"reset_layers.last is {self.last}; it must be at least 1, or None for the whole network")

    def init(self, params: Tensors, units: UnitMap) -> tuple[()]:
        chosen = self._chosen(params, units)
        if self.values == "drawn":
            require_known(self.name, chosen, units)
        return ()

    def acts_on(self, params: Tensors, units: UnitMap) -> list[str]:
        return self._chosen(params, units)

    def begin(self, params: Tensors, state: tuple[()], context: Context) -> tuple[dict[str, Tensor], tuple[()]]:
        if self.values == "drawn" or self.every is not None:
            return {}, state
        return {name: torch.zeros_like(params[name]) for name in self._chosen(params, context.units)}, state

    def due(self, steps_made: int, task_ended: bool) -> bool:
        return falls_due(self.every, steps_made, task_ended)

    def event(self, params: Tensors, state: tuple[()], context: Context) -> Outcome:
        chosen = self._chosen(params, context.units)
        return Outcome(
            {name: self._value(name, params[name], context) for name in chosen},
            state,
            {name: whole_parameter(params[name]) for name in chosen},
        )

    def _value(self, name: str, param: Tensor, context: Context) -> Tensor:
        return torch.zeros_like(param) if self.values == "zero" else drawn(name, param, context)

    def _chosen(self, params: Tensors, units: UnitMap) -> list[str]:
        """The parameters to draw anew."""
        if self.last is None:
            return list(params)
        matrices, hidden = units.matrices(params), units.hidden_matrices(params)
        if not matrices:
            raise ValueError("reset_layers found no weight matrix in this network")
        if self.last > len(hidden) + 1:
            raise ValueError(
                f"reset_layers.last is {self.last}, but the network has {len(hidden)} hidden weight layers before its "
                f"outputs; it must be at most {len(hidden) + 1}, or None for the whole network"
            )
        layers: set[str] = set()
        before: list[str] = []
        for name in matrices:
            if name in hidden:
                before.append(name)
            else:
                layers |= {name, *before[max(0, len(before) - self.last + 1) :]}
        biases = {bias_beside(name): name for name in matrices if bias_beside(name) in params}
        chosen, latest = [], ""
        for name in units.order or params:
            if name not in params:
                continue
            latest = name if name in matrices else latest
            if biases.get(name, latest) in layers:
                chosen.append(name)
        return chosen
