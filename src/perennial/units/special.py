"""Operations that are more than data movement or arithmetic: layers, attention, norms. By plain name in ``SPECIAL``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from perennial.units.record import named, units_in, varies

if TYPE_CHECKING:
    from perennial.units.tracer import Tracer


def _linear(tracer: Tracer, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    given = named(("input", "weight", "bias"), args, kwargs)
    tracer.weigh(name, out, given["input"], given["weight"], given.get("bias"), "linear", (0, 1))
    return out


def _conv(tracer: Tracer, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    given = named(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, kwargs)
    tracer.weigh(
        name, out, given["input"], given["weight"], given.get("bias"), "conv", (0, 1), int(given.get("groups", 1))
    )
    return out


def _conv_transpose(tracer: Tracer, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    order = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    given = named(order, args, kwargs)
    tracer.weigh(
        name, out, given["input"], given["weight"], given.get("bias"), "conv", (1, 0), int(given.get("groups", 1))
    )
    return out


def _addmm(tracer: Tracer, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """bias + x @ weight, as in GPT-2."""
    out = func(*args, **kwargs)
    given = named(("input", "mat1", "mat2"), args, kwargs)
    bias, weight = given["input"], given["mat2"]
    plain = kwargs.get("beta", 1) == 1 and kwargs.get("alpha", 1) == 1 and tracer.shadow(bias) is None
    if plain and id(weight) in tracer.parameters and tracer.shadow(weight) is None:
        tracer.weigh(name, out, given["mat1"], weight, bias, "linear", (1, 0))
    else:
        tracer.end_all([bias, given["mat1"], weight], name)
    return out


def _matmul(tracer: Tracer, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A product with a weight is a layer. Units on the right that are summed over positions, as attention does with its
    values, stay apart; summed over units they are mixed."""
    out = func(*args, **kwargs)
    left, right = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)][:2]
    mine, theirs = tracer.shadow(left), tracer.shadow(right)
    if id(right) in tracer.parameters and right.dim() == 2 and name in ("matmul", "mm") and left.dim() > 1:
        tracer.weigh(name, out, left, right, None, "linear", (1, 0))
        return out
    for tensor in (left, right):
        tracer.use(tensor, name)
        tracer.spoil(tensor, name)
        statistic = tracer.statistic(tensor)
        if statistic is not None:
            tracer.end(statistic[0], f"a statistic over units is read by {name}")
    if mine is not None:
        tracer.end(mine, f"multiplied with other activations by {name}: such units (queries, keys) have no outgoing "
                   "weights of their own")  # fmt: skip
    if theirs is not None:
        if mine is None and right.dim() > 1 and not varies(theirs, -2):
            tracer.keep(out, theirs.narrow(-2, 0, 1).expand(out.shape))
        else:
            tracer.end(theirs, f"multiplied with other activations by {name}: such units (queries, keys) have no "
                       "outgoing weights of their own")  # fmt: skip
    return out


_QUERIES = "queries and keys of attention have no outgoing weights of their own"


def _attention(tracer: Tracer, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    order = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = named(order, args, kwargs)
    for part in ("query", "key", "attn_mask"):
        shadow = tracer.shadow(given.get(part))
        if shadow is not None:
            tracer.end(shadow, _QUERIES)
    value = tracer.shadow(given["value"])
    if value is not None:
        if varies(value, -2):
            tracer.end(value, f"mixed with others by {name}")
        else:
            heads, shared = out.shape[-3] if out.dim() > 2 else 1, value.shape[-3] if value.dim() > 2 else 1
            rows = value.narrow(-2, 0, 1)
            if heads != shared:
                rows = rows.repeat_interleave(heads // shared, -3)
            tracer.keep(out, rows.expand(out.shape))
    return out


def _multi_head_attention(tracer: Tracer, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """All of ``nn.MultiheadAttention``, whose pieces are out of sight: rows of values go head by head to columns of the
    output projection; the rows of queries and keys end."""
    out = func(*args, **kwargs)
    given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    given.apply_defaults()
    its = given.arguments
    sources = [its["query"], its["key"], its["value"]]
    together = its["in_proj_weight"] is not None and not its["use_separate_proj_weight"]
    weights = [its["in_proj_weight"]] if together else [its[f"{p}_proj_weight"] for p in "qkv"]
    for part in (*weights, its["in_proj_bias"], its["out_proj_weight"], its["out_proj_bias"]):
        tracer.use(part, name)
    for position, source in enumerate(sources):
        shadow = tracer.shadow(source)
        if shadow is None or any(source is earlier for earlier in sources[:position] if together):
            continue
        tracer.read(name, shadow, -1, weights[0 if together else position], 1, "attention")
    width = its["out_proj_weight"].shape[1]
    rows = [tracer.new_units(w.shape[0]) for w in weights]
    for weight, numbers in zip(weights, rows, strict=True):
        tracer.produce(weight, 0, numbers, "linear")
    every = torch.cat(rows)
    if its["in_proj_bias"] is not None:
        tracer.produce(its["in_proj_bias"], 0, every, "also")
    if its["bias_k"] is not None or its["bias_v"] is not None:
        tracer.end(every, "attention with biases for keys and values is not followed")
    tracer.end(every[:-width], _QUERIES)
    result = out[0]
    values = every[-width:].expand(*result.shape[:-1], width)
    tracer.read(name, values, -1, its["out_proj_weight"], 1, "attention")
    numbers = tracer.new_units(its["out_proj_weight"].shape[0])
    tracer.produce(its["out_proj_weight"], 0, numbers, "linear")
    if its["out_proj_bias"] is not None:
        tracer.produce(its["out_proj_bias"], 0, numbers, "also")
    tracer.keep(result, numbers.expand(result.shape))
    return out


def _embedding(tracer: Tracer, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    given = named(("input", "weight"), args, kwargs)
    source, weight = given["input"], given["weight"]
    if not isinstance(weight, Tensor) or weight.dtype == torch.int64:  # torch.embedding has them the other way round
        source, weight = weight, source
    tracer.end_all([source], name)
    tracer.use(weight, name)
    if id(weight) in tracer.parameters:
        numbers = tracer.new_units(weight.shape[1])
        tracer.produce(weight, 1, numbers, "embedding")
        tracer.keep(out, numbers.expand(out.shape))
    return out


def _broadcast(tracer: Tracer, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    given = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    for piece, source in zip(out, given, strict=True):
        shadow = tracer.shadow(source)
        if shadow is not None:
            tracer.keep(piece, shadow.expand(piece.shape))
        elif id(source) in tracer.parameters or tracer.statistic(source) is not None:
            tracer.end_all([source], name)
    return out


def _glu(tracer: Tracer, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    given = named(("input", "dim"), args, kwargs)
    shadow = tracer.shadow(given["input"])
    tracer.end_all([given["input"]], name, but=None if shadow is None else given["input"])
    if shadow is not None:
        tracer.keep(out, tracer.join(*shadow.chunk(2, given.get("dim", -1))))
    return out


def _channel_norm(tracer: Tracer, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Batch and instance norm: every channel by itself."""
    out = func(*args, **kwargs)
    given = named(("input", "running_mean", "running_var", "weight", "bias"), args, kwargs)
    parts = [given.get(part) for part in ("weight", "bias", "running_mean", "running_var")]
    _norm(tracer, name, out, given["input"], 1, parts)
    return out


def _group_norm(tracer: Tracer, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    given = named(("input", "num_groups", "weight", "bias"), args, kwargs)
    source = given["input"]
    if given["num_groups"] != source.shape[1]:
        _mixes(tracer, source)
    _norm(tracer, name, out, source, 1, [given.get("weight"), given.get("bias")])
    return out


def _online_norm(tracer: Tracer, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """:func:`perennial.modules.online_norm.online_normalise`, by statistics of each feature that it is given."""
    out = func(*args, **kwargs)
    _norm(tracer, name, out[0], args[0], 1, args[1:5])
    return out


def _layer_norm(tracer: Tracer, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """LayerNorm and RMSNorm over the last dimensions."""
    out = func(*args, **kwargs)
    given = named(("input", "normalized_shape", "weight", "bias"), args, kwargs)
    source = given["input"]
    dims = range(source.dim() - len(given["normalized_shape"]), source.dim())
    shadow = tracer.shadow(source)
    if shadow is not None and any(varies(shadow, dim) for dim in dims):
        _mixes(tracer, source)
    axis = next((d for d in dims if shadow is not None and varies(shadow, d)), source.dim() - 1)
    if shadow is not None and sum(varies(shadow, d) for d in dims) > 1:
        tracer.end(shadow, f"spread over several dimensions of {name}")
    _norm(tracer, name, out, source, axis, [given.get("weight"), given.get("bias")], axis - dims[0])
    return out


def _mixes(tracer: Tracer, source: Tensor) -> None:
    shadow = tracer.shadow(source)
    if shadow is not None:
        tracer.record.normed.append(units_in(shadow))
        tracer.record.held.append(tracer.number)


def _norm(
    tracer: Tracer, name: str, out: Tensor, source: Tensor, axis: int, parts: Sequence[Any], dim: int = 0
) -> None:
    statistic, shadow = tracer.statistic(source), tracer.shadow(source)
    for part in parts:
        tracer.use(part, name)
    if statistic is not None:
        tracer.end(statistic[0], f"a statistic over units is read by {name}")
    if shadow is None:
        return
    numbers = tracer.lay_along(shadow, axis)
    for part in parts:
        if isinstance(part, Tensor):
            tracer.produce(part, dim, numbers, "norm")
    tracer.keep(out, shadow)


SPECIAL: dict[str, Callable[[Tracer, Any, str, Any, Any], Any]] = {
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    "addmm": _addmm,
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul),
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head_attention,
    "embedding": _embedding,
    "glu": _glu,
    "broadcast_tensors": _broadcast,
    **dict.fromkeys(("batch_norm", "instance_norm"), _channel_norm),
    "online_normalise": _online_norm,
    "group_norm": _group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), _layer_norm),
}
