"""A rule's step on one parameter of any size, as a native function.

A whole optimizer step compiled at once takes minutes for a network of some size, and again for the next network. Here
the step is compiled once for a matrix of unknown size (a symbol for its rows, one for its columns), and called for
every parameter: the same function serves every network, and is kept on disk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from perennial.compiler import compile_any_size
from perennial.methods import Context, Rule
from perennial.methods.base import State
from perennial.noise import Noise, label_words, seed_key
from perennial.units import UnitMap

Program = Callable[[list[Tensor]], Any]

_NAME = "p"
_ROWS, _COLUMNS = 509, 4603
"""The example: large enough to be worth several threads, and no size that anything could take for a special one."""


class NativeRule:
    """The step of one rule, for parameters of one type of number.

    Args:
        rule: its settings that are not numbers count; numbers are given at every call.
        dtype: of the parameters. The state and the arithmetic are in float32 where that has more digits.
        maximize: go up.
        threads: processor threads that one call may use.
        device: where.
    """

    def __init__(self, rule: Rule, dtype: torch.dtype, maximize: bool, threads: int, device: torch.device) -> None:
        self.rule, self.maximize = rule, maximize
        w = torch.zeros(_ROWS, _COLUMNS, dtype=dtype, device=device)
        self.wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        leaves, self.spec = pytree.tree_flatten(rule.init({_NAME: w.to(self.wide)}, UnitMap(())))
        leaves = [leaf.clone() for leaf in leaves]  # rules may give one tensor to several fields
        self.numbers = [name for name in rule.scalars() if getattr(rule, name) is not None]
        numbers = [torch.full((), 0.5, dtype=self.wide, device=device) for _ in self.numbers]
        words = [torch.zeros(n, dtype=torch.int32, device=device) for n in (2, 2)]
        common = [*numbers, *words, torch.zeros((), dtype=torch.int32, device=device)]
        grad = torch.zeros_like(w)
        self.shared = list(self._shared([w[:1, :1], *(leaf[:1, :1] for leaf in leaves)], [grad[:1, :1], *common]))
        totals = torch.zeros(len(self.shared), dtype=self.wide, device=device)
        own = [w, *leaves]
        compiled = functools.partial(compile_any_size, threads=threads)
        self.survey = compiled(self._survey, [totals], [*own, grad, *common]) if self.shared else None
        self.step = compiled(self._step, own, [grad, *common, totals])

    def _call(self, own: list[Tensor], given: list[Tensor]) -> tuple[Rule, dict[str, Tensor], State, Context]:
        """What the rule is given: of [weights, *state] and [gradient, *numbers, key, labels, step]."""
        w, grad = own[0].to(self.wide), given[0].to(self.wide)
        count = len(self.numbers)
        numbers = dict(zip(self.numbers, given[1 : 1 + count], strict=True))
        key, labels, step = given[1 + count :]
        noise = Noise(key, step, self.rule.name, {_NAME: labels})
        context = Context({_NAME: -grad if self.maximize else grad}, {}, noise, UnitMap(()))
        return self.rule.bound(numbers), {_NAME: w}, pytree.tree_unflatten(own[1:], self.spec), context

    def _shared(self, own: list[Tensor], given: list[Tensor]) -> dict[str, Tensor]:
        rule, *call = self._call(own, given)
        return rule.shared(*call)

    def _survey(self, *tensors: Tensor) -> list[Tensor]:
        own = list(tensors[1 : 2 + self.spec.num_leaves])
        found = self._shared(own, list(tensors[2 + self.spec.num_leaves :]))
        return [torch.stack([found[name] for name in self.shared])]

    def _step(self, *tensors: Tensor) -> list[Tensor]:
        count = 1 + self.spec.num_leaves
        *given, totals = tensors[count:]
        rule, params, state, context = self._call(list(tensors[:count]), given)
        shared = {name: totals[place] for place, name in enumerate(self.shared)}
        changed, new = rule.step(params, state, context._replace(shared=shared))
        results = [changed[_NAME], *pytree.tree_leaves(new)]
        return [value.to(old.dtype) for value, old in zip(results, tensors[:count], strict=True)]

    def given_numbers(self, group: Mapping[str, Any], device: torch.device) -> list[Tensor]:
        """The rule's numbers as both functions take them, after the gradient and before key, labels and step.

        In the type that is calculated in: a loop would convert them again for every vector of weights.
        """
        numbers = [torch.as_tensor(group[name], dtype=self.wide, device=device) for name in self.numbers]
        return [number.reshape(()) for number in numbers]


@functools.cache
def native_rule(
    kind: type[Rule],
    structure: tuple[tuple[str, Any], ...],
    dtype: torch.dtype,
    maximize: bool,
    threads: int,
    device: torch.device,
) -> NativeRule | None:
    """The :class:`NativeRule` of these settings, made once a process; None where there is no compiler."""
    numbers = dict.fromkeys(kind.scalars(), 0.5)
    rule = kind().bound({**numbers, **dict(structure)})
    made = NativeRule(rule, dtype, maximize, threads, device)
    return None if made.step is None else made


@functools.lru_cache(maxsize=4096)
def labels_of(scope: str, name: str, device: torch.device) -> Tensor:
    """The words that stand for a name in the noise, int32 [2]."""
    return torch.tensor(label_words(scope, name), dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=256)
def key_of(seed: int, device: torch.device) -> Tensor:
    """The words that stand for a seed in the noise of methods, int32 [2]. Not to be changed."""
    return torch.tensor(seed_key(seed, "method"), dtype=torch.int32, device=device)
