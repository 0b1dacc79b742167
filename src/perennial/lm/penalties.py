"""What continual LoRA adds to the loss: pulls on the update of the current adapter.

Each penalty is a plain callable, ``loss + penalty(model)``. It belongs to an optimizer step, not to an example: where
gradients are accumulated over k batches a plain loop adds it once, or divides by k as it divides the loss;
:class:`PenaltyMixin` does so for a Trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from perennial.attach.arguments import bare_model
from perennial.lm.factors import Pair, pairs_of

_ROWS = 512
"""Rows of an update that are made at a time: what lies between stays in a processor's cache."""


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _Known(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        ctx.count = count
        return value

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        return None, None, *(g * above[0].to(g.dtype) for g in ctx.saved_tensors), *(None for _ in range(ctx.count))


def _with_gradients(value: Tensor, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    if not (torch.is_grad_enabled() and any(p.requires_grad for p in params)):
        return value
    found: Tensor = _Known.apply(value, len(params), *params, *grads)  # type: ignore[no-untyped-call]
    return found


def _check_strength(owner: object, name: str, value: object) -> None:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} of {type(owner).__name__} is {value!r}; it is a number from 0")


@dataclass(frozen=True)
class Penalty:
    """Base: the sum of :meth:`of` over the adapted matrices, by ``strength``."""

    strength: float
    """Weight in the loss, lambda."""

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        _check_strength(self, "strength", self.strength)

    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of a model's current adapter: float32, []."""
        return self.on(pairs_of(model))

    def on(self, pairs: Sequence[Pair]) -> Tensor:
        """The penalty of given matrices."""
        if not pairs:
            raise ValueError(f"there are no adapted matrices for {type(self).__name__} to act on")
        with torch.autocast(pairs[0].new.down.device.type, enabled=False):
            found = [self.of(pair) for pair in pairs]
            return self.strength * torch.stack(found).sum()

    def of(self, pair: Pair) -> Tensor:
        """Of one matrix, before the strength: float32, []."""
        raise NotImplementedError(f"{type(self).__name__} defines no penalty of a pair")


@dataclass(frozen=True)
class NLoRA(Penalty):
    r"""The L1 norm of the update (N-LoRA, COLING 2025).

    .. math:: \lambda \sum \lVert \Delta W \rVert_1, \qquad \Delta W = s B A

    The gradients, :math:`s\,G A^\top` and :math:`s\,B^\top G` with :math:`G = \operatorname{sign}(B A)`, are made block
    by block as the value is: no matrix of the update's size is held, in memory or in a graph.

    The subgradient of an adaptive optimizer gives no exact zeros. ``form="factors"`` penalises
    :math:`\lVert A \rVert_1 + \lVert B \rVert_1` instead, whose proximal step does: do not add it to the loss, but
    attach :meth:`proximal` to the optimizer (of a Trainer after ``trainer.create_optimizer()``). ``"published"`` is
    what the published code computes: the sum over the :math:`r \times r` product :math:`A B`, which exists only where a
    matrix is square.
    """

    form: Literal["update", "factors", "published"] = "update"
    """What is penalised."""
    name: ClassVar[str] = "nlora"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("update", "factors", "published"):
            raise ValueError(f"form is {self.form!r}; it is update, factors or published")

    def of(self, pair: Pair) -> Tensor:
        down, up, scaling = pair.new
        if self.form == "factors":
            return _wide(down).abs().sum() + _wide(up).abs().sum()
        if self.form == "published":
            if down.shape[1] != up.shape[0]:
                raise ValueError(
                    f"the published form of N-LoRA multiplies A {list(down.shape)} by B {list(up.shape)}, which does "
                    f"not go for {pair.module}: its matrix is not square. form='update' is the paper's"
                )
            return (_wide(down) @ _wide(up)).abs().sum()
        with torch.no_grad():
            a, b = _wide(down), _wide(up)
            grad_a, grad_b = torch.zeros_like(a), torch.empty_like(b)
            for start in range(0, len(b), _ROWS):
                rows = b[start : start + _ROWS]
                sign = (rows @ a).sign_()
                torch.mm(sign, a.T, out=grad_b[start : start + _ROWS])
                grad_a.addmm_(rows.T, sign)
            size = abs(scaling)
            value = (grad_b * b).sum()  # |B A| summed is <G, B A> = <G A^T, B>: no pass of its own
        return _with_gradients(size * value, (down, up), ((size * grad_a).to(down.dtype), (size * grad_b).to(up.dtype)))

    def proximal(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
        """Take the proximal step of the factor form after each step of an optimizer, exact zeros included; the handle
        has ``remove()``. A pull is at most the step size: see ``bounded`` of :class:`perennial.tickets.ProximalL1`."""
        from perennial.tickets import ProximalL1

        if self.form != "factors":
            raise ValueError(f"form is {self.form!r}; only the factor form has a proximal step that can be computed")
        params: dict[str, Tensor] = {}
        for pair in pairs_of(model):
            params |= {f"{pair.module}.A": pair.new.down, f"{pair.module}.B": pair.new.up}
        return ProximalL1(optimizer, params, self.strength, start=0.0, metric="bounded")


@dataclass(frozen=True)
class OLoRA(Penalty):
    r"""Orthogonality to earlier adapters (O-LoRA, Findings of EMNLP 2023).

    .. math:: \lambda \sum \sum_{ij} \lvert A\,A_{old}^\top \rvert_{ij} + \lambda_2 (\lVert A \rVert + \lVert B \rVert)

    As published and as the authors' code has it: A is the down-projection, whose rows span the update's row space,
    entries are not squared, and the second term is the norm itself. It can be satisfied by shrinking A. With
    ``normalize`` rows have length 1 in the first term, which then is the sum of absolute cosines, and cannot.
    """

    norm_strength: float = 0.0
    r"""Weight of the norms, :math:`\lambda_2`; 0 in most of the published scripts."""
    normalize: bool = False
    """Rows of length 1."""
    name: ClassVar[str] = "olora"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_strength(self, "norm_strength", self.norm_strength)

    def of(self, pair: Pair) -> Tensor:
        down = _wide(pair.new.down)
        found = down.new_zeros(()) + 0.0 * down.sum()
        if pair.old is not None:
            old = pair.old.to(down)
            if self.normalize:
                down, old = (nn.functional.normalize(t, dim=1) for t in (down, old))
            found = (down @ old.T).abs().sum()
        return found

    def on(self, pairs: Sequence[Pair]) -> Tensor:
        found = super().on(pairs)
        if self.norm_strength:
            norms = [_wide(t).norm() for pair in pairs for t in pair.new[:2]]
            found = found + self.norm_strength * torch.stack(norms).sum()
        return found


@dataclass(frozen=True)
class L2Update(Penalty):
    r"""The squared Frobenius norm of the update.

    .. math:: \lambda \sum \lVert \Delta W \rVert_F^2 = \lambda \sum s^2 \operatorname{tr}(B^\top B\, A A^\top)
    """

    name: ClassVar[str] = "l2"

    def of(self, pair: Pair) -> Tensor:
        a, b = _wide(pair.new.down), _wide(pair.new.up)
        return pair.new.scaling**2 * ((b.T @ b) * (a @ a.T)).sum()


@dataclass(frozen=True)
class NuclearNorm(Penalty):
    r"""The sum of the update's singular values, which prefers few ranks.

    .. math:: \lambda \sum \lVert \Delta W \rVert_*

    From the QR decompositions of both factors. The subgradient is :math:`U V^\top` over the singular values that are
    not zero, so that an adapter at its start (B = 0) is not moved.
    """

    name: ClassVar[str] = "nuclear"

    def of(self, pair: Pair) -> Tensor:
        down, up, scaling = pair.new
        with torch.no_grad():
            a, b = _wide(down), _wide(up)
            (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
            u, s, vt = torch.linalg.svd(r_b @ r_a.T)
            there = s > 1e-7 * s.max()
            left, right = q_b @ (u * there), vt @ q_a.T
            size = abs(scaling)
            grad_a, grad_b = size * (b.T @ left) @ right, size * left @ (right @ a.T)
        return _with_gradients(size * s.sum(), (down, up), (grad_a.to(down.dtype), grad_b.to(up.dtype)))


PENALTIES: Mapping[str, type[Penalty]] = {cls.name: cls for cls in (NLoRA, OLoRA, L2Update, NuclearNorm)}
"""By the name that studies call them."""


class ElasticWeights:
    r"""Elastic weight consolidation (Kirkpatrick et al., 2017) of what is trained:
    :math:`\frac{\lambda}{2} \sum_i F_i (w_i - w_i^*)^2`, with one Fisher information, the sum of all tasks', and the
    weights at the end of the last (online EWC without decay, Schwarz et al., 2018).
    """

    def __init__(self, strength: float) -> None:
        _check_strength(self, "strength", strength)
        self.strength = strength
        self.fisher: dict[str, Tensor] = {}
        """By parameter name, its shape."""
        self.anchor: dict[str, Tensor] = {}
        """By parameter name, its shape."""

    def __call__(self, model: nn.Module) -> Tensor:
        held = dict(bare_model(model).named_parameters())
        if gone := [name for name in self.fisher if name not in held]:
            raise ValueError(
                f"the model has no {gone[0]} any more, which is to be kept: elastic weight consolidation is of "
                "parameters that are trained throughout, such as one adapter for all tasks"
            )
        found = [(self.fisher[n] * (_wide(held[n]) - self.anchor[n]).square()).sum() for n in self.fisher]
        device = next(iter(held.values())).device
        return self.strength / 2 * torch.stack(found).sum() if found else torch.zeros((), device=device)

    def consolidate(self, model: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> None:
        """Add the diagonal Fisher information of a task: the mean over examples of the squared gradient of the loss on
        the right label (the empirical Fisher), without dropout; ``losses``: one function an example."""
        training = model.training
        model.eval()
        held = {n: p for n, p in bare_model(model).named_parameters() if p.requires_grad}
        total = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in held.items()}
        for loss in losses:
            grads = torch.autograd.grad(loss(), list(held.values()), allow_unused=True)
            for into, grad in zip(total.values(), grads, strict=True):
                if grad is not None:
                    into += _wide(grad).square() / len(losses)
        for name, p in held.items():
            self.fisher[name] = self.fisher.get(name, torch.zeros_like(total[name])) + total[name]
            self.anchor[name] = p.detach().float().clone()
        model.train(training)


class PenaltyMixin:
    """Gives any Trainer of transformers a penalty: ``class MyTrainer(PenaltyMixin, Trainer)``, then
    ``trainer.penalty = NLoRA(1e-4)``.

    The penalty counts once an optimizer step, whatever ``gradient_accumulation_steps`` is: where the Trainer does not
    divide the loss by them, because the model counts the items of the whole step, the penalty alone is divided.
    """

    penalty: Callable[[nn.Module], Tensor] | None = None
    task_loss: Tensor
    """The last batch's loss without the penalty."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)  # type: ignore[misc]
        self.task_loss = loss.detach()
        if self.penalty is not None and model.training:
            me: Any = self
            pull = self.penalty(me.accelerator.unwrap_model(model))
            scaled = getattr(me, "loss_is_scaled_for_ga", None)
            if scaled is None:
                scaled = (me.model_accepts_loss_kwargs and num_items_in_batch is not None) or (
                    me.compute_loss_func is not None
                )
            loss = loss + (pull / me.current_gradient_accumulation_steps if scaled else pull)
        return (loss, outputs) if return_outputs else loss
