"""What is known of the operations that a forward pass is made of: which of them keep units apart.

By name, as ``torch.overrides`` shows it to a function mode, without what marks an operation as one in place
(:func:`plain_name`). An operation in none of these sets ends the units that it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SAME = frozenset(
    "to float double half bfloat16 type type_as contiguous clone detach requires_grad data cpu cuda identity alias "
    "dropout alpha_dropout dropout1d dropout2d dropout3d feature_dropout feature_alpha_dropout nan_to_num".split()
)
"""The result has an entry for every entry of the input, in the same place and of that alone."""

MOVEMENT = frozenset(
    "view reshape flatten permute transpose movedim moveaxis squeeze unsqueeze expand expand_as view_as reshape_as "
    "getitem t T mT H adjoint chunk split unbind narrow select swapaxes swapdims unflatten roll flip repeat tile "
    "repeat_interleave index_select tensor_split hsplit vsplit ravel broadcast_to pixel_shuffle pixel_unshuffle "
    "channel_shuffle unfold diagonal fliplr flipud split_with_sizes".split()
)
"""Every entry of the result is an entry of the first argument."""

JOINING = frozenset("cat concat concatenate stack hstack vstack dstack column_stack row_stack".split())
"""Every entry of the result is an entry of one of the tensors in the first argument."""

ELEMENTWISE = frozenset(
    "relu relu6 sigmoid tanh elu celu leaky_relu rrelu silu gelu selu softplus mish hardtanh hardswish hardsigmoid "
    "hardshrink softshrink tanhshrink softsign logsigmoid log_sigmoid threshold prelu abs absolute neg negative pow "
    "mul multiply div divide true_divide floordiv floor_divide add subtract sub rsub sin cos tan atan sinh cosh asinh "
    "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square reciprocal erf erfc sign clamp clip clamp_min clamp_max "
    "maximum minimum fmax fmin where masked_fill lerp addcmul addcdiv remainder fmod round floor ceil trunc gt lt ge "
    "le eq ne logical_and logical_or logical_not isnan isinf isfinite and or xor invert truediv positive sinc logit "
    "hypot atan2 copysign heaviside deg2rad".split()
)
"""Every entry of the result is made of the entries in its own place."""

ADDITIVE = frozenset("add sub subtract rsub where cat".split())
"""Element-wise operations by which a parameter is added to a unit rather than scales it."""

REDUCTIONS = frozenset(
    "mean sum amax amin max min std var norm vector_norm logsumexp prod nanmean nansum median any all count_nonzero "
    "std_mean var_mean aminmax".split()
)
"""Made of the entries along some dimensions, which are gone or of length 1 in the result."""

STATISTICS = frozenset("mean sum std var norm vector_norm std_mean var_mean nanmean nansum".split())
"""The reductions that norms are written with."""

ALONG = frozenset("softmax log_softmax softmin cumsum cumprod logcumsumexp".split())
"""Every entry of the result is made of the entries along one dimension."""

SPATIAL = frozenset(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices interpolate upsample "
    "upsample_nearest upsample_bilinear".split()
)
"""Works on the last dimensions (one, two or three of them) of [..., channels, positions], each channel by itself."""

QUIET = frozenset(
    "size dim shape numel nelement device dtype is_floating_point is_complex stride ndim ndimension is_contiguous "
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor "
    "requires_grad is_leaf grad grad_fn layout is_cuda is_sparse is_quantized is_meta is_nested names element_size "
    "data_ptr storage_offset untyped_storage get_device result_type can_cast is_same_size is_nonzero_static "
    "retain_grad register_hook is_inference is_signed has_names __hash__ __repr__ __format__ __len__ itemsize nbytes "
    "_is_view is_conj is_neg is_shared is_pinned _version is_cpu is_mps is_xpu".split()
)
"""Gives nothing of the values."""

_SPATIAL_DIMS = {"1d": 1, "2d": 2, "3d": 3}


def plain_name(func: Callable[..., Any]) -> str:
    """The operation's name: ``"add"`` for ``torch.add``, ``Tensor.add_``, ``Tensor.__radd__`` and ``Tensor.__iadd__``;
    ``"T"`` for the property ``Tensor.T``."""
    name = getattr(func, "__name__", str(func))
    if name == "grad":  # torch.autograd.grad; the property Tensor.grad comes as __get__
        return "autograd_grad"
    if name in ("__get__", "__set__", "__delete__"):
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    if name in QUIET:
        return name
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        for mark in ("r", "i"):
            if name.startswith(mark) and name[1:] in _ARITHMETIC:
                name = name[1:]
    elif name.startswith("_") and name[1:] in ELEMENTWISE | SAME | {"softmax", "log_softmax"}:
        name = name[1:]
    return name.rstrip("_") if not name.startswith("_") else name


_ARITHMETIC = frozenset("add sub mul truediv floordiv pow mod and or xor matmul div lshift rshift".split())


def spatial_dims(name: str, dims: int) -> int:
    """How many last dimensions a :data:`SPATIAL` operation works on, for an input of ``dims`` dimensions."""
    for mark, count in _SPATIAL_DIMS.items():
        if mark in name:
            return count
    return dims - 2


def reduced_dims(name: str, dims: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """The dimensions that a reduction, or an operation along a dimension, works on."""
    position = 2 if name in ("norm", "vector_norm") else 1  # their first argument after the tensor is the order
    given = kwargs.get("dim", kwargs.get("axis", args[position] if len(args) > position else None))
    if given is None or (isinstance(given, (tuple, list)) and not given):
        return list(range(dims))
    if isinstance(given, (tuple, list)):
        return [int(d) % dims for d in given]
    if isinstance(given, bool) or not isinstance(given, int):
        return list(range(dims))
    return [given % dims] if dims else []
