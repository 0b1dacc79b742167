"""Sparse evolutionary training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from perennial.methods.base import Context
from perennial.methods.sparse_training import SparseTraining
from perennial.noise import elements


@dataclass(frozen=True)
class SET(SparseTraining):
    r"""Sparse evolutionary training (SET): train few weights, and now and then exchange the smallest for random ones.

    Of all parameters of two or more dimensions together the share ``density`` is present, drawn at random before the
    first step. Absent weights are exactly zero after every step; biases and norms are left alone.

    In an exchange, in every layer, of whose n present weights k go,

    .. math::
        k = \lfloor \zeta n \rfloor, \qquad
        \text{drop the } k \text{ of smallest } |w|, \qquad
        \text{grow } k \text{ absent ones at random, at } 0

    Equals are dropped at random. Those just dropped may be drawn again, and then keep their value and their optimizer's
    state, as if never dropped. All others that are grown start at zero with fresh optimizer state.

    Adam's step count stays, since it is kept by row and by column: its first updates of a weight grown late are up to
    three times the step size.

    Put it last: what an intervention after it adds to absent weights stays until the next step.

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired
    by network science", Nature Communications 2018. There weights are exchanged once an epoch, those just dropped may
    be drawn again too, and what is grown starts at a random value. Here it starts at zero, as in later work, so that an
    exchange takes away the dropped weights and changes nothing else.
    """

    def growth(self, name: str, state: Any, context: Context) -> Tensor:
        return context.noise.uniform(f"{name}/growth", elements(state.mask[name]))
