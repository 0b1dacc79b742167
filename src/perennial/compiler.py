"""One step of many lanes as one native function.

The step is traced once to a graph of plain operators (``make_fx``), made free of mutation except for the final copies
into the state, and handed to Inductor. It enters below ``torch.compile``: Dynamo's guards and the autograd wrapper cost
100 to 300 microseconds a call (measured: 134 with 5 tensors, 288 with 40, against 5 and 11 here), which is more than
the step of a hundred small lanes. That also removes the reason to unroll several steps into one graph.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx


def cache_folder() -> Path:
    """Where compiled steps and measured plans are kept: ``PERENNIAL_CACHE``, or perennial under the user's cache."""
    base = os.environ.get("PERENNIAL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "perennial"
    return Path(base).expanduser()


os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))

Step = Callable[[list[Tensor]], Any]

VECTOR = 8
"""Lanes from which they fill a vector register; fewer are laid out as Inductor likes."""

_REALIZE_MANY, _REALIZE_FEW = 12, 30
"""Operations on a value from which it is kept in memory rather than computed again by each reader. In many lanes a
random row is cheaper kept than drawn again for every unit; in few, where the noise of a weight has one reader, keeping
it costs a pass over memory."""

_SMALL = 1 << 16
"""Elements of a matrix up to which a matrix-vector product is worth more fused than as a call to BLAS."""


def compile_step(
    step: Callable[..., Sequence[Tensor]], state: Sequence[Tensor], inputs: Sequence[Tensor], lanes: int, threads: int
) -> Step | None:
    """A native function that takes ``[*state, *inputs]`` and overwrites the state in place with ``step(...)``.

    Args:
        step: takes the state's tensors, then the inputs, and returns the next state, tensor by tensor.
        state: example tensors; not changed.
        inputs: example tensors.
        lanes: how many lanes the tensors hold, in their last dimension.
        threads: processor threads that one call may use.

    Returns:
        The function, or None where there is no compiler (said once, in a warning).
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    if not has_compiler():
        return None
    count = len(state)

    def in_place(*tensors: Tensor) -> tuple[Tensor, ...]:
        old = tensors[:count]
        for target, new in zip(old, step(*tensors), strict=True):
            target.copy_(new)
        return ()

    table: dict[Any, Any] = {**select_decomp_table(), **_DECOMPOSITIONS}
    example = [t.clone() for t in state] + list(inputs)
    with torch.no_grad():
        graph = make_fx(in_place, decomposition_table=table)(*example)
        pure = torch.func.functionalize(graph, remove="mutations")
        graph = make_fx(pure, decomposition_table=table)(*example)
        patches = {
            "cpp.threads": threads,
            "cpp.enable_floating_point_contract_flag": "fast",
            "unroll_reductions_threshold": 1,  # unrolling them repeats whatever was inlined into them
            "realize_opcount_threshold": _REALIZE_MANY if lanes >= VECTOR else _REALIZE_FEW,
            "size_asserts": False,  # the caller owns the tensors and never changes their layout
            "alignment_asserts": False,
        }
        with config.patch(patches | _vectors(lanes)), _lanes_innermost(lanes), _tails_stored_whole():
            compiled: Step = compile_fx_inner(graph, example)
    return compiled


def compile_any_size(
    step: Callable[..., Sequence[Tensor]], state: Sequence[Tensor], inputs: Sequence[Tensor], threads: int
) -> Step | None:
    """The same as :func:`compile_step` for tensors of any size, in one program.

    Dimensions that are equal in the examples (and not 1) stay equal; all others are free. Layouts are contiguous.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    if not has_compiler():
        return None
    count = len(state)

    def in_place(*tensors: Tensor) -> tuple[Tensor, ...]:
        for target, new in zip(tensors[:count], step(*tensors), strict=True):
            target.copy_(new)
        return ()

    pure = torch.func.functionalize(in_place, remove="mutations")
    with torch.no_grad():
        table: dict[Any, Any] = {**select_decomp_table(), torch.ops.aten.sigmoid.default: _sigmoid}
        graph = make_fx(pure, decomposition_table=table, tracing_mode="symbolic")(*state, *inputs)
        symbolic = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        patches = {
            "cpp.threads": threads,
            "cpp.enable_floating_point_contract_flag": "fast",
            "unroll_reductions_threshold": 1,
            "size_asserts": False,
            "alignment_asserts": False,
        }
        with config.patch(patches), _tails_stored_whole():
            compiled: Any = compile_fx_inner(graph, symbolic)
    # What is around it serves autotuning and profiling, and takes longer than a small matrix.
    inner: Step | None = getattr(compiled, "current_callable", None)
    return inner or compiled


def load_native(source: str) -> ctypes.CDLL:
    """A C++ source compiled for this processor, with OpenMP; kept on disk.

    Raises:
        RuntimeError: there is no compiler.
    """
    from torch._inductor import config
    from torch._inductor.codecache import CppCodeCache

    if not has_compiler():
        raise RuntimeError("this needs a C++ compiler: install g++, or name one in the variable CXX")
    # Inductor's own flags do without what its generated code spells out: loops made vectors, products added in one. And
    # they take comparisons of floats for something that might trap, which keeps loops with one from becoming vectors.
    flags = ("-ftree-loop-vectorize", "-fno-math-errno", "-fno-trapping-math")
    with config.patch({"cpp.enable_floating_point_contract_flag": "fast"}):
        library: ctypes.CDLL = CppCodeCache.load(source, extra_flags=flags)
    return library


@contextlib.contextmanager
def _lanes_innermost(lanes: int) -> Iterator[None]:
    """Lay every intermediate out like the state: neighbours in memory are neighbouring lanes.

    ``vmap`` puts the lane dimension first. Where Inductor is free to choose it keeps it outermost for about half
    of the buffers, and the loops between the two layouts transpose element by element.
    """
    from torch._inductor import ir

    realize, join = ir.StorageBox.realize, ir.ConcatKernel.__dict__["realize_into"]
    joining = 0

    def realize_by_lanes(box: Any) -> Any:
        name = realize(box)
        buffer = box.data
        if lanes < VECTOR or joining or not isinstance(buffer, ir.ComputedBuffer):
            return name
        if isinstance(buffer.layout, ir.FlexibleLayout):
            size = buffer.get_size()
            # A layer of as many units as there are lanes looks the same from one side; what ends in lanes is laid out.
            if len(size) > 1 and size[0] == lanes and size[-1] != lanes:
                buffer.freeze_layout_with_fill_order([0, *reversed(range(1, len(size)))])
        return name

    def join_freely(source: Any, target: Any) -> Any:
        # A part of a concatenation takes the whole's layout; one of a fixed layout is copied, again and again if the
        # copy's layout is fixed too.
        nonlocal joining
        joining += 1
        try:
            return join.__get__(None, ir.ConcatKernel)(source, target)
        finally:
            joining -= 1

    ir.StorageBox.realize = realize_by_lanes  # type: ignore[method-assign,assignment]
    ir.ConcatKernel.realize_into = join_freely  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        ir.StorageBox.realize = realize  # type: ignore[method-assign]
        ir.ConcatKernel.realize_into = join  # type: ignore[method-assign]


def _vectors(lanes: int) -> dict[str, Any]:
    """Settings that keep lanes to vectors that they fill: they are padded to eight, not to the sixteen of AVX-512."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return {"cpp.simdlen": 256} if lanes > 1 and pick_vec_isa().bit_width() > 256 else {}


@contextlib.contextmanager
def _tails_stored_whole() -> Iterator[None]:
    """See that a reduction over the inner of two tiled loops ends with as many numbers as the outer loop has left.

    Inductor 2.13 looks for the inner loop right below the outer one. With a loop between them it stores a whole vector
    for what is left, over the end of the buffer (https://github.com/pytorch/pytorch/issues/196681).
    """
    from torch._inductor.codegen import cpp

    usual = cpp.CppKernelProxy.aggregate_reduction_buffers

    def aggregate(proxy: Any, split: bool, outer: Any) -> None:
        main = proxy.kernels[0]
        if isinstance(main, cpp.CppTile2DKernel):
            first, second = (proxy.loop_nest.loops[at] for at in main.tiling_indices)
            split = second.is_reduction and not first.is_reduction
        usual(proxy, split, outer)

    cpp.CppKernelProxy.aggregate_reduction_buffers = aggregate  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        cpp.CppKernelProxy.aggregate_reduction_buffers = usual  # type: ignore[method-assign]


_warned = False


def has_compiler() -> bool:
    """Whether there is a C++ compiler; if not, a warning says so once."""
    global _warned
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        if not _warned:
            warnings.warn(
                "no C++ compiler was found (g++; the variable CXX names another): lanes run uncompiled, far slower",
                RuntimeWarning,
                stacklevel=4,
            )
            _warned = True
        return False
    return True


EXP_SERIES = (0.50000001201, -0.16666665459, 4.1665795894e-2, -8.3334519073e-3, 1.3981999507e-3, -1.9875691500e-4)
"""(exp(-t) - 1 + t) / t^2 for t in [-log(2) / 2, log(2) / 2], lowest power first; Cephes, expf."""
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
"""Their sum is log(2); the first has so few digits that whole multiples of it are exact."""


def _sigmoid(x: Tensor) -> Any:
    """To the last bit or two (below 1e-38 to 1e-38), by a polynomial: a library's exponential is called, not inlined,
    and around the call every register is saved. Of the 2.1 ns in which UPGD updates a weight that is half a nanosecond.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return NotImplemented
    x = x.clamp(-88.0, 87.0)
    whole = torch.round(x * (-1 / math.log(2)))
    t = x + whole * LN2_HIGH + whole * LN2_LOW
    series = t * EXP_SERIES[-1] + EXP_SERIES[-2]
    for coefficient in reversed(EXP_SERIES[:-2]):
        series = series * t + coefficient
    power_of_two = ((whole.to(torch.int32) + 127) << 23).view(torch.float32)
    return 1 / (1 + (series * (t * t) - t + 1) * power_of_two)


def _bmm(a: Tensor, b: Tensor) -> Any:
    """Products of a row or a column a lane are loops over lanes; left as BLAS calls they could not be fused."""
    if a.shape[2] == 1:
        return a * b
    if a.shape[1] == 1:
        return (a.transpose(1, 2) * b).sum(1, keepdim=True)
    if b.shape[2] == 1:
        return (a * b.transpose(1, 2)).sum(2, keepdim=True)
    return NotImplemented


def _mm(a: Tensor, b: Tensor) -> Any:
    """The same for a single lane; a large matrix times a vector stays a BLAS call."""
    if a.shape[1] == 1:
        return a * b  # an outer product, fused into the update that uses it: the gradient is never stored
    if a.shape[0] == 1 and b.numel() <= _SMALL:
        return (a.transpose(0, 1) * b).sum(0, keepdim=True)
    if b.shape[1] == 1 and a.numel() <= _SMALL:
        return (a * b.transpose(0, 1)).sum(1, keepdim=True)
    return NotImplemented


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if a.shape[0] != 1 or alpha != 1 or beta != 1:
        return NotImplemented
    return bias + torch.mm(a, b)


_DECOMPOSITIONS = {
    torch.ops.aten.sigmoid.default: _sigmoid,
    torch.ops.aten.bmm.default: _bmm,
    torch.ops.aten.mm.default: _mm,
    torch.ops.aten.addmm.default: _addmm,
}
