"""The dominant winning ticket of a pretrained model: the few weights that fine-tuning has to move.

Gong et al., "Finding the Dominant Winning Ticket in Pre-Trained Language Models" (Findings of ACL 2022, doi
10.18653/v1/2022.findings-acl.115), fine-tune with the L1 distance to the pretrained weights as a penalty, and keep the
weights that still move. There is no public code, and the full text was not at hand: that the penalty is a proximal step
in the optimizer's metric, and how a ticket is selected, is a reconstruction, and ours.

First :class:`~perennial.tickets.ProximalL1` trains all weights; :func:`~perennial.tickets.select_ticket` takes the
ticket. Then the model goes back to its start, and with ``enforce(model, masks, frozen=start)`` and a fresh optimizer
the ticket trains alone. :class:`~perennial.tickets.SparseDelta` keeps what came of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Optimizer, RMSprop

from perennial.attach.arguments import bare_optimizer
from perennial.methods import L1Init
from perennial.tickets.masks import Masks
from perennial.tickets.sparse_delta import same_shape
from perennial.trainability.lanes import generator

_OWN = (Adam, RMSprop, Adagrad, SGD)  # whose metric is known; AdamW is an Adam


class ProximalL1:
    r"""Pull weights back to their start by the L1 distance, after every step of an optimizer, to exact zeros of d.

    .. math:: \theta \leftarrow \theta_0 + \operatorname{sign}(d)\,\max(|d| - r, 0), \qquad d = \theta - \theta_0,
        \qquad r = \eta\lambda / (\sqrt{v} + \epsilon)

    minimises :math:`\lambda\lVert\theta - \theta_0\rVert_1` plus half the squared distance moved, in the metric in
    which the optimizer steps (Duchi et al., JMLR 2011, for Adagrad). Gong et al. (2022) have the penalty; the step is a
    reconstruction: ours. v is ``exp_avg_sq`` of Adam and AdamW, corrected for bias (with ``amsgrad``, its maximum),
    ``square_avg`` of RMSprop (``centered``, the variance), ``sum`` of Adagrad; SGD has :math:`r = \eta\lambda`. So the
    penalty weighs against the loss: with Adam, :math:`\eta\lambda` would weigh it against the gradient's sign.

    A weight that arrives has the start's bits. Types below float32 are pulled in float32 and rounded: pulls of less
    than half their spacing are lost, as the optimizer's own steps are. Weight decay, which pulls to zero, moves weights
    away again: turn it off. Parameters without a gradient are left alone, and all in steps that a ``GradScaler`` skips.

    Args:
        optimizer: of torch, or as accelerate wraps it.
        params: by name; the optimizer holds them, and they stay the same objects.
        strength: :math:`\lambda`, from 0; an attribute, which may be changed between steps.
        start: :math:`\theta_0` by name, taken in the parameter's type; None: the values now; or one number for all.
        metric: ``own``: the above; ``bounded``: the same, at most :math:`\eta`, as far as one step of Adam goes;
            ``plain``: :math:`r = \eta\lambda` with any optimizer. Where weights are not at the start that they are
            pulled to, take ``bounded``: one that has had no gradient yet, such as LoRA's A while B is zero, is pulled
            all the way in a single step otherwise.

    Raises:
        ValueError: an optimizer whose metric is not known, parameters that it does not hold, a start that is missing or
            of another shape, a strength that is no number from 0.
    """

    def __init__(
        self,
        optimizer: Any,
        params: Mapping[str, Tensor],
        strength: float,
        start: Mapping[str, Tensor] | float | None = None,
        *,
        metric: str = "own",
    ) -> None:
        bare = bare_optimizer(optimizer)
        if metric not in ("own", "bounded", "plain"):
            raise ValueError(f"metric is {metric!r}; it is 'own', the optimizer's, 'bounded' or 'plain'")
        if metric != "plain" and not isinstance(bare, _OWN):
            raise ValueError(
                f"the metric that {type(bare).__name__} steps in is not known; there are Adam, AdamW, RMSprop, Adagrad "
                'and SGD. Take one of these, or metric="plain", which pulls by lr * strength'
            )
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength is {strength}; it is a number from 0")
        held = {id(p) for group in bare.param_groups for p in group["params"]}
        for name, p in params.items():
            if id(p) not in held:
                raise ValueError(
                    f"the optimizer does not hold {name}; give the parameters it trains, such as {{n: p for n, p in "
                    "model.named_parameters() if p.requires_grad}, or add a parameter group first"
                )
        self.strength = strength
        self._plain = metric == "plain" or isinstance(bare, SGD)
        self._bounded = metric == "bounded"
        self._params = dict(params)  # held, so that no other object gets one of their ids
        self._starts = {id(p): _start_of(name, p, start).clone() for name, p in params.items()}
        self._hook = bare.register_step_post_hook(self._after)

    def remove(self) -> None:
        """Leave the optimizer to itself."""
        self._hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        # A fused optimizer is called even where a GradScaler skips the step, and finds this out on the device.
        overflow = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in self._starts or p.grad is None or not (self._plain or optimizer.state.get(p)):
                    continue
                wide, back = _wide(p), group["lr"] * self.strength
                if not self._plain:
                    back = back / _scale(optimizer, group, optimizer.state[p])
                if self._bounded:
                    back = back.clamp(max=group["lr"]) if isinstance(back, Tensor) else min(back, group["lr"])
                if overflow is not None:
                    back = torch.where(overflow == 0, back, 0.0)
                p.copy_(L1Init(rate=back).nearer(wide, self._starts[id(p)].to(wide.dtype)))


def l1_distance(params: Mapping[str, Tensor], start: Mapping[str, Tensor] | float) -> Tensor:
    r"""The penalty itself, :math:`\sum|\theta - \theta_0|`, [], to add to a loss.

    An optimizer that follows its gradient, the sign (0 at the start), swings about the start and makes no exact zeros.

    Raises:
        ValueError: no parameters, a start that is missing or of another shape.
    """
    _require(params, "parameters")
    sums = [(_wide(p) - _start_of(name, p, start)).abs().sum() for name, p in params.items()]
    return torch.stack([one.to(sums[0].device) for one in sums]).sum()


def select_ticket(
    distances: Mapping[str, Tensor],
    *,
    threshold: float | None = None,
    share: float | None = None,
    dimensions: int | None = None,
    scope: str = "global",
    dims: str = "rows",
) -> Masks:
    r"""The weights that moved furthest from their start; give one of threshold, share and dimensions.

    Args:
        distances: :math:`d = \theta - \theta_0` by name.
        threshold: keep :math:`|d| >` threshold; 0, after :class:`~perennial.tickets.ProximalL1`: all that moved.
        share: keep exactly round(share N) of N weights, the largest :math:`|d|`, of equal ones the first by name and
            place; where fewer have moved, that fills it up with some that have not.
        dimensions: keep so many rows or columns of each matrix, of the largest :math:`\lVert d \rVert_2`: Gong et al.
            (2022) find "a natural structure within each parameter matrix"; the selection is ours.
        scope: of a share: ``global``, all weights compared with each other, or ``matrix``.
        dims: of dimensions: ``rows``, a linear layer's outputs, or ``columns``, its inputs.

    Raises:
        ValueError: none or several of the three, one out of range, a share of less than a weight, dimensions of what is
            no matrix or has fewer, distances that are not finite.
    """
    given = {"threshold": threshold, "share": share, "dimensions": dimensions}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(
            f"give exactly one of threshold, share and dimensions; given is {' and '.join(named) or 'none'}"
        )
    _choice("scope", scope, ("global", "matrix"))
    _choice("dims", dims, ("rows", "columns"))
    _require(distances, "distances")
    for name, d in distances.items():
        if not bool(d.isfinite().all()):
            raise ValueError(f"distances of {name} are not finite; did the training that they come from diverge?")
    if dimensions is not None:
        return {name: _dimensions(name, d, dimensions, dims) for name, d in distances.items()}
    sizes = {name: _wide(d).abs() for name, d in distances.items()}
    if threshold is not None:
        if not threshold >= 0:
            raise ValueError(f"threshold is {threshold}; it is a number from 0: distances count without their sign")
        return {name: size > threshold for name, size in sizes.items()}
    assert share is not None
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it is above 0 and at most 1")
    total = sum(size.numel() for size in sizes.values())
    if scope == "matrix":
        found = {name: _largest(size, round(share * size.numel())) for name, size in sizes.items()}
    else:
        device = next(iter(sizes.values())).device
        every = _largest(torch.cat([size.flatten().to(device) for size in sizes.values()]), round(share * total))
        parts = every.split([size.numel() for size in sizes.values()])
        found = {n: part.view(d.shape).to(d.device) for (n, d), part in zip(sizes.items(), parts, strict=True)}
    if not any(bool(mask.any()) for mask in found.values()):
        raise ValueError(f"a share of {share} of {total} weights ({scope}) is none of them; take a larger one")
    return found


def magnitude_like(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Masks:
    r"""As many weights of each matrix, those of the largest :math:`|\theta_0|`, of equal ones the first.

    Of rows or columns it is ``select_ticket(weights, dimensions=k)``. ValueError: weights missing, of another shape.
    """
    found = {}
    for name, mask in masks.items():
        same_shape(name, weights, mask, "the weights")
        found[name] = _largest(_wide(weights[name]).abs(), int(mask.sum())).to(mask.device)
    return found


def random_dimensions_like(masks: Mapping[str, Tensor], seed: int, dims: str = "rows") -> Masks:
    """As many rows (or columns) of each matrix, at random. ValueError: a mask that is not made of whole ones."""
    _choice("dims", dims, ("rows", "columns"))
    found = {}
    for name, mask in masks.items():
        kept = mask.any(1 if dims == "rows" else 0) if mask.dim() == 2 else mask
        if mask.dim() != 2 or not torch.equal(_along(kept, mask, dims), mask):
            raise ValueError(
                f"the mask of {name} {list(mask.shape)} is not made of whole {dims}; give the dims that the ticket was "
                "selected with, or take random_like"
            )
        order = torch.randperm(len(kept), generator=generator(seed, f"dimensions of {name}"))
        found[name] = _along(kept[order.to(kept.device)], mask, dims)
    return found


def lora_rank_for(count: int, shapes: Iterable[Sequence[int]]) -> int:
    r"""The rank, from 1, at which LoRA's :math:`r \sum (\text{in} + \text{out})` parameters come nearest to a count.

    ValueError: a count below 1, no shapes, or one that is no matrix's.
    """
    sides = [tuple(shape) for shape in shapes]
    if count < 1:
        raise ValueError(f"count is {count}; it is a number of weights, from 1")
    if not sides or any(len(shape) != 2 for shape in sides):
        odd = [list(shape) for shape in sides if len(shape) != 2]
        raise ValueError(f"LoRA adapts matrices, [out, in]; shapes are {odd or 'none'}: give those of two dimensions")
    return max(1, round(count / sum(map(sum, sides))))


def bias_names(model: nn.Module) -> list[str]:
    """What BitFit trains (Ben Zaken et al., ACL 2022): every bias, norms' too. ValueError: none (T5, Llama)."""
    last = [(name, name.rpartition(".")[2]) for name, p in model.named_parameters() if p.dim() == 1]
    found = [name for name, leaf in last if leaf == "bias" or leaf.startswith("bias_") or leaf.endswith("_bias")]
    if not found:
        raise ValueError(f"{type(model).__name__} has no biases, as T5 and Llama have none: BitFit cannot train it")
    return found


def _wide(t: Tensor) -> Tensor:
    """In float32 at least."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _scale(optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    """What the optimizer divides by, the parameter's shape."""
    steps, decay = state["step"], 1.0
    if isinstance(steps, Tensor) and steps.device.type == "cpu":
        steps = steps.item()  # Elsewhere it stays a tensor: nobody waits for the device.
    if isinstance(optimizer, Adam):
        mean = _wide(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]) / (1 - group["betas"][1] ** steps)
    elif isinstance(optimizer, RMSprop):
        mean = _wide(state["square_avg"])
        if group["centered"]:
            mean = mean - _wide(state["grad_avg"]).square()
    else:
        mean, decay = _wide(state["sum"]), 1 + (steps - 1) * group["lr_decay"]
    scale: Tensor = (mean.sqrt() + group["eps"]) * decay
    return scale


def _start_of(name: str, p: Tensor, start: Mapping[str, Tensor] | float | None) -> Tensor:
    if not p.is_floating_point():
        raise ValueError(f"{name} is {p.dtype}; only real floating-point parameters have a distance that shrinks")
    if start is None:
        return p.detach()
    if isinstance(start, Mapping):
        same_shape(name, start, p, "the start")
        return start[name].detach().to(p.device, p.dtype)
    return torch.as_tensor(start, dtype=p.dtype, device=p.device)


def _require(given: Mapping[str, Tensor], what: str) -> None:
    if not given:
        raise ValueError(f"there are no {what}; give them by name")


def _choice(what: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{what} is {value!r}; it is one of {', '.join(options)}")


def _largest(values: Tensor, count: int) -> Tensor:
    """Exactly so many of the highest, of equal ones the first; bool, of the values' shape."""
    flat = values.flatten()
    found = torch.zeros_like(flat, dtype=torch.bool)
    if count:
        least = flat.kthvalue(len(flat) - count + 1).values
        found |= flat > least
        found[(flat == least).nonzero()[:, 0][: count - int(found.sum())]] = True
    return found.view(values.shape)


def _dimensions(name: str, d: Tensor, count: int, dims: str) -> Tensor:
    if d.dim() != 2:
        raise ValueError(
            f"{name} is {list(d.shape)}, which has no rows and columns; leave it out of the distances, such as {{n: d "
            "for n, d in distances.items() if d.dim() == 2}"
        )
    norms = torch.linalg.vector_norm(_wide(d), dim=1 if dims == "rows" else 0)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(norms):
        raise ValueError(
            f"dimensions is {count}; {name} {list(d.shape)} has {len(norms)} {dims}: a number from 1 to that"
        )
    return _along(_largest(norms, count), d, dims)


def _along(chosen: Tensor, like: Tensor, dims: str) -> Tensor:
    """A mask of whole rows or columns."""
    return chosen.unsqueeze(1 if dims == "rows" else 0).expand(like.shape).clone()
