r"""A fresh unit gets a fresh optimizer state, whatever the optimizer.

Every tensor in the optimizer's state that is shaped like its parameter (momentum, averages, their maxima) goes back to
zero on the unit's rows and columns. What is kept per parameter as a whole cannot be reset for a unit: a factored
second moment, and the step count of Adam. With moments at zero and an old count Adam's first updates of a unit would
be :math:`(1 - \beta_1) / \sqrt{1 - \beta_2}` times those of a fresh Adam: 3.2 times for the usual numbers, a spike. So
for ``torch.optim.Adam`` and ``AdamW`` the count of every unit is kept here, and the update is put right after each
step:

.. math:: w \leftarrow w + \alpha\left(\frac{m / c_1(T)}{\sqrt{v / c_2(T)} + \epsilon}
          - \frac{m / c_1(t)}{\sqrt{v / c_2(t)} + \epsilon}\right), \qquad c_i(t) = 1 - \beta_i^t,

with T the parameter's count and t the unit's own. The result is what an Adam with a count for every weight does, from
the first step on; after some ten thousand steps the two are the same, and nothing is left to correct. The optimizers of
:mod:`perennial.optim` have such counts built in.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from perennial.methods.base import unbiasing
from perennial.optim import RuleOptimizer
from perennial.units import along

_OLD = 1 << 30
"""The count of a weight that was never reset."""

_NEGLIGIBLE = 1e-4
"""How far a correction factor may be from 1 before it is left out."""


class FreshState:
    """Resets optimizer state, and counts the steps of fresh units for Adam. One an optimizer, shared by its keepers."""

    _of: ClassVar[weakref.WeakKeyDictionary[Optimizer, FreshState]] = weakref.WeakKeyDictionary()

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.counts: dict[Tensor, dict[int, Tensor]] = {}
        self.handle: Any = None
        self.users = 0

    @classmethod
    def of(cls, optimizer: Optimizer) -> FreshState:
        """The one of this optimizer."""
        if optimizer not in cls._of:
            cls._of[optimizer] = cls(optimizer)
        return cls._of[optimizer]

    def enter(self) -> None:
        """One keeper more. Its step hook must be registered after this: the correction comes first."""
        self.users += 1
        optimizer = self.optimizer()
        if self.handle is None and isinstance(optimizer, Adam):
            self.handle = optimizer.register_step_post_hook(self._correct)

    def leave(self) -> None:
        """One keeper less. With the last one the hook goes."""
        self.users -= 1
        if self.users == 0 and self.handle is not None:
            self.handle.remove()
            self.handle = None
            self.counts.clear()

    def policy(self) -> str:
        """What happens to the optimizer's state of a fresh unit, in words."""
        optimizer = self.optimizer()
        name = type(optimizer).__name__
        if isinstance(optimizer, RuleOptimizer):
            return f"{name}: all state starts at zero and every fresh unit has a step count of its own"
        if isinstance(optimizer, Adam):
            return f"{name}: moments start at zero and every fresh unit has a step count of its own"
        return f"{name}: every state tensor of the parameter's shape starts at zero; step counts stay"

    def reset(self, parameter: Tensor, dim: int, positions: Tensor, hit: Tensor | None = None) -> None:
        """Make the state of a parameter fresh at positions along a dimension.

        Args:
            parameter: one of the optimizer's.
            dim: the dimension.
            positions: int64 [k], distinct.
            hit: bool [k], which of the positions are meant; None: all.
        """
        optimizer = self.optimizer()
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0:
                _zero(value, dim, positions, hit)
        if isinstance(optimizer, RuleOptimizer):
            optimizer.renew(parameter, dim, positions, hit)
        if isinstance(optimizer, Adam):
            counts = self.counts.setdefault(parameter, {})
            if dim not in counts:
                counts[dim] = torch.full((parameter.shape[dim],), _OLD, dtype=torch.int32, device=parameter.device)
            _zero(counts[dim], 0, positions, hit)

    def reset_units(self, layer: str, units: Tensor) -> None:
        """The same for what an optimizer keeps by unit: ``units`` is bool [units] of the named layer."""
        optimizer = self.optimizer()
        if isinstance(optimizer, RuleOptimizer):
            optimizer.renew_units(layer, units)

    def reset_where(self, parameter: Tensor, mask: Tensor) -> None:
        """The same for what no position along one dimension describes: a mask that broadcasts against the parameter.

        Adam's count stays, since it is kept by row and by column.
        """
        optimizer = self.optimizer()
        for value in (optimizer.state.get(parameter, {}) if optimizer is not None else {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0:
                value.masked_fill_(mask.expand(value.shape), 0)

    # --- Adam's count -----------------------------------------------------------------------------------------------

    def _correct(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.counts or skipped(optimizer):
            return
        with torch.no_grad():
            moved = [dims for parameter, dims in self.counts.items() if parameter.grad is not None]
            if not moved:
                return
            torch._foreach_add_([count for dims in moved for count in dims.values()], 1)
            for group in optimizer.param_groups:
                horizon = math.ceil(math.log(_NEGLIGIBLE) / math.log(max(*map(float, group["betas"]), 0.5)))
                for parameter in group["params"]:
                    if parameter in self.counts and parameter.grad is not None:
                        _put_right(parameter, optimizer.state[parameter], group, self.counts[parameter], horizon)

    # --- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The counts: {position of the parameter in the optimizer: {dimension: int32 [its length]}}."""
        return {
            str(number): {str(dim): count.clone() for dim, count in self.counts[parameter].items()}
            for number, parameter in enumerate(self._parameters())
            if parameter in self.counts
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take up saved counts."""
        parameters = self._parameters()
        self.counts.clear()
        for number, dims in saved.items():
            parameter = parameters[int(number)]
            self.counts[parameter] = {
                int(dim): count.to(parameter.device, torch.int32).clone() for dim, count in dims.items()
            }

    def _parameters(self) -> list[Tensor]:
        optimizer = self.optimizer()
        return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]


def skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler made the step do nothing.

    Only optimizers that take the scale themselves (``fused``) have their ``step`` called then; asking costs such an
    optimizer a wait for the device.
    """
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item())


def _zero(value: Tensor, dim: int, positions: Tensor, hit: Tensor | None) -> None:
    if hit is None:
        value.index_fill_(dim, positions, 0)
    else:
        kept = along(~hit, dim, value.dim()).to(value.dtype)
        value.index_copy_(dim, positions, value.index_select(dim, positions) * kept)


def _put_right(
    parameter: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], counts: Mapping[int, Tensor], horizon: int
) -> None:
    """From the update that Adam made to the one with a count for every weight, on rows and columns that are fresh."""
    dims = parameter.dim()
    ages = tuple(along(counts[d], d, dims) for d in sorted(counts))
    square = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    done: dict[int, Tensor] = {}
    for dim, count in sorted(counts.items()):
        young, positions = count < horizon, None
        if parameter.device.type == "cpu":
            positions = young.nonzero()[:, 0]
            if not len(positions):
                continue
            mine = tuple(a.index_select(dim, positions) if a.shape[dim] > 1 else a for a in ages)
            mean, second = (t.index_select(dim, positions) for t in (state["exp_avg"], square))
        else:  # all of it: how many are fresh is known to the device alone
            mine, mean, second = ages, state["exp_avg"], square
        shift = _difference(mean, second, mine, state["step"], group)
        for earlier, fresh in done.items():  # already put right as a row
            shift = torch.where(along(fresh, earlier, dims), 0.0, shift)
        if positions is None:
            parameter.add_(torch.where(along(young, dim, dims), shift, 0.0).to(parameter.dtype))
        else:
            parameter.index_add_(dim, positions, shift.to(parameter.dtype))
        done[dim] = young


def _difference(mean: Tensor, square: Tensor, ages: tuple[Tensor, ...], step: Any, group: Mapping[str, Any]) -> Tensor:
    """What Adam took off the weights, minus what it should have."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    total = torch.as_tensor(step, dtype=torch.float64, device=mean.device).reshape(())
    # A weight that was never reset is as old as the parameter.
    own = tuple(torch.minimum(age.to(torch.float64), total) for age in ages)

    def update(counts: tuple[Tensor, ...]) -> Tensor:
        first, second = (unbiasing(counts, beta) for beta in (beta1, beta2))
        return mean * first / (torch.sqrt(square * second) + float(group["eps"]))

    wide = mean.dtype if mean.dtype == torch.float64 else torch.float32
    mean, square = mean.to(wide), square.to(wide)
    shift = update((total.reshape((1,) * mean.dim()),)) - update(own)
    lr = torch.as_tensor(group["lr"], dtype=torch.float64, device=mean.device)
    return (lr * shift).to(wide)
