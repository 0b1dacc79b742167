"""UPGD's step on all parameters of a network as one native function, ``upgd.cpp``.

:mod:`perennial.native` compiles the step of any rule, parameter by parameter. What that costs for small networks, a
dozen calls from Python, and for large ones, normal numbers written to memory, is here saved for the rule that this
library is about.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perennial import compiler, noise
from perennial.methods import UPGD, Rule

_PLAIN = {"order": 1, "scope": "global", "granularity": "weight", "gated": "all"}
"""The settings that it is made for; all others are numbers, or switches to it."""


def makes(rule: type[Rule], settings: Mapping[str, Any]) -> bool:
    """Whether this is the step of a rule with these settings."""
    return rule is UPGD and all(settings[name] == value for name, value in _PLAIN.items())


def takes(params: Sequence[Tensor]) -> bool:
    """Whether it can step these parameters: on the processor, all in float32 or all in float64; with a compiler."""
    kinds = {(p.device.type, p.dtype) for p in params}
    return kinds in ({("cpu", torch.float32)}, {("cpu", torch.float64)}) and _library() is not None


class Parameter(ctypes.Structure):
    """A parameter and its state, as matrices."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "gradients", "utilities", "row_ages", "column_ages")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        ("labels", ctypes.c_int32 * 2),
        ("group", ctypes.c_int64),
    ]


class Group(ctypes.Structure):
    """What parameters of one group and one step count share."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr", "decay", "noise", "weight_decay")),
        ("key", ctypes.c_int32 * 2),
        *((name, ctypes.c_int32) for name in ("step", "maximize", "protect", "doubled")),
    ]


def group_of(group: Mapping[str, Any], made: int) -> Group:
    """Of an optimizer's parameter group and the steps made before this one."""
    numbers = [float(group[name]) for name in ("lr", "utility_decay", "noise_std", "weight_decay")]
    switches = [int(bool(group[name])) for name in ("maximize", "protect", "doubled")]
    return Group(*numbers, noise.seed_key(group["seed"], "method"), made, *switches)


def parameter_of(tensors: Sequence[Tensor], labels: tuple[int, int]) -> Parameter:
    """Of [weights, utility, ages of rows, ages of columns], contiguous and of one type of number, but for its gradient
    and its group, which are to be set.

    Args:
        tensors: weights and utilities [rows, columns], ages [rows, 1] and [1, columns]; overwritten by the step.
        labels: the words that stand for the parameter's name in the noise.
    """
    w, utility, rows, columns = tensors
    return Parameter(
        weights=w.data_ptr(),
        utilities=utility.data_ptr(),
        row_ages=rows.data_ptr(),
        column_ages=columns.data_ptr(),
        rows=w.shape[0],
        columns=w.shape[1],
        labels=labels,
    )


def step(parameters: Sequence[Parameter], groups: Sequence[Group], dtype: torch.dtype, threads: int) -> None:
    """One step of all parameters, in place.

    Args:
        parameters: of the type of number ``dtype``.
        groups: what their ``group`` counts.
        dtype: float32 or float64.
        threads: processor threads.
    """
    library = _library()
    assert library is not None, "takes() was asked"
    run = library.step_float if dtype == torch.float32 else library.step_double
    run(
        ctypes.c_int64(len(parameters)),
        (Parameter * len(parameters))(*parameters),
        (Group * len(groups))(*groups),
        ctypes.c_int64(threads),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    if not compiler.has_compiler():
        return None
    return compiler.load_native(_constants() + Path(__file__).with_name("upgd.cpp").read_text())


def _constants() -> str:
    """The numbers that :mod:`perennial.noise` and :mod:`perennial.compiler` state, for C++."""
    words = {"Multiply1": noise.MULTIPLY_1, "Multiply2": noise.MULTIPLY_2, "Multiply3": noise.MULTIPLY_3}
    series = {"Log": noise.LOG_SERIES, "Cos": noise.COS_SERIES, "Exp": compiler.EXP_SERIES}
    lines = ["#include <cstdint>", f"constexpr int64_t kBlock = {noise.BLOCK};"]
    lines += [f"constexpr uint32_t k{name} = {word & 0xFFFFFFFF}u;" for name, word in words.items()]
    lines += [f"constexpr int32_t kRootHalf = {noise.ROOT_HALF};"]
    lines += [f"constexpr float kLn2High = {compiler.LN2_HIGH}f, kLn2Low = {compiler.LN2_LOW}f;"]
    for name, numbers in series.items():
        lines += [f"constexpr float k{name}[] = {{{', '.join(f'{number!r}f' for number in numbers)}}};"]
    return "\n".join(lines) + "\n"
