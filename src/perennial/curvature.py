"""Diagonals of the Hessian of a loss by the parameters, for utilities of second order.

:func:`hesscale` goes back through the network once, without noise, and knows a list of operations. :func:`hutchinson`
takes any network, and is a mean over random vectors. :class:`HesScale` and :class:`Hutchinson` are the two for a
training loop::

    source = HesScale(model, nn.CrossEntropyLoss())
    optimizer = perennial.optim.UPGD(model.named_parameters(), order=2, curvature=source.diagonal)
    for x, y in batches:
        optimizer.zero_grad()
        source(x, y).backward()
        optimizer.step()
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from perennial.noise import Noise, elements, seed_key
from perennial.units import operations
from perennial.units.trace import undisturbed

_AT_ONCE = 1 << 24
"""Elements that columns of the Hessian of the loss by the output may take together."""

_SUMS = operations.MOVEMENT | operations.JOINING | frozenset(
    "to float double half bfloat16 type type_as contiguous clone alias identity dropout alpha_dropout dropout1d "
    "dropout2d dropout3d feature_dropout feature_alpha_dropout pad sum embedding gather max_pool1d max_pool2d "
    "max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d".split()
)  # fmt: skip
"""An entry of the result is a sum of entries, mostly of one."""

_AVERAGES = frozenset(
    "mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d".split()
)
"""An entry of the result is a sum of entries, all times one number."""

_PRODUCTS = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul mm bmm mv dot".split()
)
"""An entry of the result is a sum of products, in which every entry of either side appears at most once."""

_ELEMENTWISE = operations.ELEMENTWISE - {"prelu", "rrelu"}

_STRAIGHT = frozenset(
    "relu relu6 leaky_relu hardtanh hardsigmoid threshold abs absolute neg negative positive add sub subtract mul "
    "multiply where masked_fill clamp clip clamp_min clamp_max maximum minimum".split()
)
"""Element-wise operations without a second derivative by any one operand."""

_CONSTANT = operations.QUIET | {"detach", "data"}
"""No gradient goes through."""


class Diagonal(NamedTuple):
    """What :func:`hesscale` finds."""

    loss: Tensor
    """[]."""
    output: Tensor
    """What the network gave, [batch, ...]."""
    grads: dict[str, Tensor]
    """The gradient of the loss by every parameter, its shape."""
    curvature: dict[str, Tensor]
    """The diagonal of the Hessian of the loss by every parameter, its shape; of either sign."""


def hesscale(
    forward: Callable[[dict[str, Tensor]], Tensor], params: Mapping[str, Tensor], loss: Callable[[Tensor], Tensor]
) -> Diagonal:
    r"""The diagonal of the Hessian of a loss by every parameter, approximated in one pass back.

    For an operation z = z(a) on the way to the loss L, with :math:`g = \partial L / \partial z`, the chain rule gives

    .. math::
        \frac{\partial^2 L}{\partial a_i^2}
        = \sum_{j, k} \frac{\partial z_j}{\partial a_i} \frac{\partial z_k}{\partial a_i}
          \frac{\partial^2 L}{\partial z_j \partial z_k}
        + \sum_j \frac{\partial^2 z_j}{\partial a_i^2}\, g_j.

    HesScale leaves out the terms with :math:`j \ne k`, so that a diagonal h goes back as the gradient does:

    .. math::
        h_i = \sum_j \Big(\frac{\partial z_j}{\partial a_i}\Big)^2 h_j + \frac{\partial^2 z_j}{\partial a_i^2}\, g_j

    - z = W a + b, convolutions and matrix products: :math:`h_a = (W^2)^\top h_z`, :math:`h_W = \sum h_z (a^2)^\top` and
      :math:`h_b = \sum h_z` over samples and positions, the gradient's formulas with W and a squared;
    - z = f(a) by element: :math:`h_a = f'(a)^2 h_z + f''(a)\, g_z`, for each of several operands by itself;
    - reshaping, indexing, joining, sums and max-pooling: as the gradient; averages: with their weights squared;
    - what is used several times: the sum over its uses, without terms that tie two uses together. On a residual branch,
      z = a + f(a), that is :math:`h_a = h_z + f'^2 h_z + f'' g_z`.

    It begins with the exact diagonal of the Hessian by the output, from second derivatives of ``loss``. It is exact for
    a last linear layer, and where every entry reaches the loss by a single entry of each later layer. Elsewhere it is
    an approximation, which may be negative where the Hessian's diagonal is not.

    Sources: Becker and LeCun (1988), with an approximate start; Elsayed and Mahmood, "HesScale" (arXiv
    2210.11639, 2022); Elsayed et al. (ICML 2024). Batch normalisation (in evaluation), products of two branches,
    embeddings and further operations follow here from the same rule.

    The function is pure, and runs under ``vmap`` and ``make_fx``. Results are detached.

    Args:
        forward: the network's output [batch, ...] for parameters by name. Called once.
        params: the parameters by name.
        loss: the loss [] of the output. Samples, which lie along the first dimension, must not mix in it: a sum or a
            mean over them. Its cost grows with the entries of a sample's output; where parts of it do not mix either,
            such as the pixels of a segmentation, let ``forward`` give [batch x pixels, classes].

    Raises:
        ValueError: an operation without a rule or one that mixes samples; an output that is no tensor or does not
            depend on the parameters; a loss that is not one number.
    """
    given = {name: w.detach() for name, w in params.items()}
    with torch.enable_grad(), _Tape(given.values()) as tape:
        output = forward(given)
    if not isinstance(output, Tensor) or not output.dim():
        kind = "a number" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ValueError(f"forward gave {kind}; HesScale needs the output before the loss, as a tensor [batch, ...]")
    tape.check([output])
    if id(output) not in tape.known:
        raise ValueError(
            "the output does not depend on the parameters by operations that HesScale can see (no_grad, torch.jit and "
            "NumPy hide them); use Hutchinson in its place, or a utility of order=1"
        )
    value, slope, bend = _of_output(loss, output.detach())
    found = tape.back(output, slope, bend)
    both = {name: found[id(w)] if id(w) in found else (torch.zeros_like(w),) * 2 for name, w in given.items()}
    grads, curvature = ({name: pair[k].detach() for name, pair in both.items()} for k in (0, 1))
    return Diagonal(value.detach(), output.detach(), grads, curvature)


def _vjp(function: Callable[..., Any], *operands: Tensor) -> tuple[Any, Callable[[Any], tuple[Tensor, ...]]]:
    out, pull = vjp(function, *operands)  # type: ignore[misc]  # three only with has_aux
    return out, pull


def _of_output(loss: Callable[[Tensor], Tensor], output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss [], its gradient by the output and the diagonal of its Hessian, both [batch, ...].

    One second derivative an entry of a sample's output, of all samples at once: as they do not mix, the Hessian times a
    vector that marks the same entry of every sample holds that entry's diagonal of every sample.
    """
    value = loss(output)
    if value.dim():
        raise ValueError(f"loss gave {tuple(value.shape)}; it is to give one number, a sum or mean over samples")
    g, pull = _vjp(grad(loss), output)
    entries = output.shape[1:].numel()
    marks = torch.eye(entries, dtype=output.dtype, device=output.device).reshape(entries, *output.shape[1:])

    def column(mark: Tensor) -> Tensor:
        return (pull(mark.expand_as(output))[0] * mark).reshape(len(output), -1).sum(1)

    columns = vmap(column, chunk_size=max(1, _AT_ONCE // max(1, output.numel())))(marks)  # [entries, batch]
    return value, g, columns.T.reshape(output.shape)


_Back = Callable[[Any, Any], Iterable[tuple[Tensor, Tensor]]]
"""From (gradient, diagonal) by an operation's result to those by each operand."""


class _Step(NamedTuple):
    operands: Sequence[Tensor]
    made: Sequence[Tensor]
    structure: Any
    back: _Back


class _Tape(TorchFunctionMode):
    """Runs a forward pass and keeps the way back through every operation on what depends on parameters."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {id(w): w for w in params}
        self.stale: dict[int, Tensor] = {}
        self.steps: list[_Step] = []

    def check(self, leaves: Iterable[Any]) -> None:
        if any(id(leaf) in self.stale for leaf in leaves):
            raise ValueError(
                "a tensor is used again after an operation in place on it, of which HesScale sees only what is "
                "returned: write x = f(x), or x = x + y, in the model"
            )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), operations.plain_name(func)
        leaves = pytree.tree_leaves((args, kwargs))
        self.check(leaves)
        operands = list({id(t): t for t in leaves if id(t) in self.known}.values())
        if not operands or name in _CONSTANT or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if name == "batch_norm" and not kwargs.get("training"):
            with self:
                return _batch_norm(*args, **kwargs)
        _refuse_training(name, args, kwargs)
        own = getattr(func, "__name__", "")
        in_place = bool(kwargs.pop("inplace", False)) or (own.endswith("_") and not own.endswith("__"))
        if name not in _ELEMENTWISE | _PRODUCTS | _SUMS | _AVERAGES:
            out = None if in_place else func(*args, **kwargs)
            if out is None or any(isinstance(t, Tensor) and t.is_floating_point() for t in pytree.tree_leaves(out)):
                raise ValueError(
                    f"HesScale has no rule for {name}: use Hutchinson in its place, which takes any network, or a "
                    "utility of order=1 (a softmax at the end belongs into the loss)"
                )
            return out
        if in_place:  # run out of place: the way back needs what was there before
            func = getattr(torch.Tensor, name, None) or getattr(F, name)
            self.stale[id(leaves[0])] = leaves[0]
        leaves, structure = pytree.tree_flatten((args, kwargs))

        def call(*values: Tensor, constant: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
            new = {id(t): value for t, value in zip(operands, values, strict=True)}
            filled = [new[id(leaf)] if id(leaf) in new else constant(leaf) for leaf in leaves]
            positional, named = pytree.tree_unflatten(filled, structure)
            return func(*positional, **named)

        back: _Back
        distinct = sum(id(leaf) in self.known for leaf in leaves) == len(operands)
        if name in _ELEMENTWISE:
            out = call(*operands)
            # The same tensor twice, as in x * x, is one operand, by which a product is not straight.
            back = functools.partial(_bent, call, operands, out, name in _STRAIGHT and distinct)
        elif name == "linear" and distinct and _plain(args):
            out = call(*operands)
            back = functools.partial(_by_linear, operands, *args[:2])
        else:
            out, pull = _vjp(call, *operands)
            if name in _PRODUCTS:
                back = functools.partial(_multiplied, call, operands, pull)
            else:
                share = _share(name, operands[0], out, args, kwargs) if name in _AVERAGES else None
                back = functools.partial(_pulled, pull, share)
        made, shape = pytree.tree_flatten(out)
        if not any(id(t) in self.known for t in made):  # else it gave its operand back: dropout in evaluation
            self.known |= {id(t): t for t in made if t.is_floating_point()}  # not what a comparison gives
            self.steps.append(_Step(operands, made, shape, back))
        return out

    def back(self, output: Tensor, slope: Tensor, bend: Tensor) -> dict[int, tuple[Tensor, ...]]:
        """Gradient and diagonal by all that the output depends on, by the tensor's id."""
        found: dict[int, tuple[Tensor, ...]] = {id(output): (slope, bend)}
        for step in reversed(self.steps):
            if any(id(t) in found for t in step.made):
                pairs = [found[id(t)] if id(t) in found else (torch.zeros_like(t),) * 2 for t in step.made]
                g, h = (pytree.tree_unflatten(side, step.structure) for side in zip(*pairs, strict=True))
                for operand, more in zip(step.operands, step.back(g, h), strict=True):
                    old = found.get(id(operand))
                    found[id(operand)] = more if old is None else (old[0] + more[0], old[1] + more[1])
        return found


def _pulled(
    pull: Callable[[Any], tuple[Tensor, ...]], share: Tensor | float | None, g: Any, h: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Through a linear operation whose every result is a sum, times ``share`` if there is one."""
    return zip(pull(g), pull(h if share is None else share * h), strict=True)


def _multiplied(
    call: Callable[..., Tensor], operands: Sequence[Tensor], pull: Callable[[Any], Any], g: Tensor, h: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradient's formulas with both sides squared. What is added, a bias, is in none of them."""

    def square(leaf: Any) -> Any:
        return leaf * leaf if isinstance(leaf, Tensor) else leaf

    _, pull_squares = _vjp(functools.partial(call, constant=square), *map(square, operands))
    return zip(pull(g), pull_squares(h), strict=True)


def _plain(args: Sequence[Any]) -> bool:
    """Whether a linear layer is called as ``nn.Linear`` does, without the casts of autocast."""
    return len(args) > 1 and args[1].dim() == 2 and not torch.is_autocast_enabled(args[0].device.type)


def _by_linear(
    operands: Sequence[Tensor], a: Tensor, w: Tensor, g: Tensor, h: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same in closed form, for the most frequent product: [..., in] by [out, in]."""
    rows, columns = a.reshape(-1, a.shape[-1]), [side.reshape(-1, side.shape[-1]).T for side in (g, h)]
    for operand in operands:
        if operand is a:
            yield g @ w, h @ (w * w)
        elif operand is w:
            yield columns[0] @ rows, columns[1] @ (rows * rows)
        else:
            yield columns[0].sum(1), columns[1].sum(1)


def _bent(
    call: Callable[..., Tensor], operands: Sequence[Tensor], out: Tensor, straight: bool, g: Tensor, h: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Through an element-wise function, each operand laid out as the result is."""
    wide, one = [t.expand(out.shape) for t in operands], torch.ones_like(out)
    for position, operand in enumerate(operands):

        def slope(z: Tensor, position: int = position) -> Any:
            return _vjp(lambda z: call(*wide[:position], z, *wide[position + 1 :]), z)[1](one)[0]

        if straight:
            first = slope(wide[position])
            bend = first * first * h
        else:
            first, pull = _vjp(slope, wide[position])
            bend = first * first * h + pull(one)[0] * g
        yield (first * g).sum_to_size(operand.shape), bend.sum_to_size(operand.shape)


def _share(name: str, x: Tensor, out: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | float:
    """The weight with which entries go into an average: one number, or by position of the result."""
    if name == "mean":
        return out.numel() / x.numel()
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    named = dict(zip(names, args[1:], strict=False)) | {key: value for key, value in kwargs.items() if key != "input"}
    if (divisor := named.pop("divisor_override", None)) is not None:
        return 1 / float(divisor)
    share = x.new_ones(())
    # A window is one along each dimension: pooling the rows of a unit matrix shows what it makes of each entry.
    for dim in range(-int(name[-2]), 0):
        rows = torch.eye(x.shape[dim], dtype=x.dtype, device=x.device)
        if name.startswith("adaptive"):
            pooled = F.adaptive_avg_pool1d(rows, out.shape[dim])
        else:
            given = {key: value for key, value in named.items() if value not in (None, (), [])}
            here: Any = {key: v if isinstance(v, int) else v[max(dim, -len(v))] for key, v in given.items()}
            pooled = F.avg_pool1d(rows, **here)
        share = share[..., None] * pooled.amax(0)
    return share


def _batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Any = None, bias: Any = None, *_: Any, eps: float, **__: Any
) -> Tensor:
    """Batch normalisation in evaluation, in operations that have a rule."""
    along = (-1, *[1] * (x.dim() - 2))
    out = (x - mean.reshape(along)) * torch.rsqrt(var + eps).reshape(along)
    out = out if weight is None else out * weight.reshape(along)
    return out if bias is None else out + bias.reshape(along)


def _refuse_training(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    reason = ""
    if "dropout" in name:
        rate, training = args[1:3] + (0.5, True)[len(args[1:3]) :]
        if kwargs.get("training", training) and kwargs.get("p", rate) > 0:
            reason = "draws anew on every pass"
    elif name == "batch_norm":
        reason = "mixes samples, which HesScale keeps apart"
    if reason:
        raise ValueError(
            f"{name} in training {reason}: use Hutchinson in its place, or put it into evaluation, .eval()"
        )


def hutchinson(
    loss: Callable[[dict[str, Tensor]], Tensor], params: Mapping[str, Tensor], probes: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    r"""The diagonal of the Hessian H of a loss by every parameter, estimated without bias.

    .. math:: \operatorname{diag} H = \mathbb{E}[v \odot H v] \approx \frac1n \sum_{k=1}^n v_k \odot H v_k

    for probes v of independent entries +1 and -1. The estimate of entry i has the variance
    :math:`\frac1n \sum_{j \ne i} H_{ij}^2`: none where H is diagonal. A product H v is the derivative of the gradient
    along v, forward over reverse, and costs about two gradients.

    Sources: Hutchinson (1989), for the trace; Bekas, Kokiopoulou and Saad (2007), for the diagonal.

    Args:
        loss: the loss [] as a function of the parameters by name, any that torch can differentiate twice.
        params: the parameters by name.
        probes: one or more dicts of +1 and -1 in the parameters' shapes, such as :func:`rademacher` draws.

    Returns:
        A tensor of each parameter's shape, by name.
    """
    if not probes:
        raise ValueError("hutchinson needs at least one probe; rademacher(noise, params, count) draws them")
    at, total = dict(params), dict[str, Tensor]()
    for probe in probes:
        _, products = jvp(grad(loss), (at,), ({name: probe[name] for name in at},))  # type: ignore[misc]
        for name, product in products.items():
            found = probe[name] * product / len(probes)
            total[name] = total[name] + found if name in total else found
    return total


def rademacher(noise: Noise, params: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Probes for :func:`hutchinson`: ``count`` times +1 or -1 with equal chances, in the parameters' shapes and dtypes.

    A sign is a function of the noise, the probe's number, the parameter's name and the element alone.
    """
    places = {name: elements(w) for name, w in params.items()}
    return [
        {n: torch.where(noise.uniform(f"{k} {n}", e) < 0.5, -1.0, 1.0).to(params[n].dtype) for n, e in places.items()}
        for k in range(count)
    ]


@contextlib.contextmanager
def _unwatched(model: nn.Module) -> Iterator[None]:
    """Methods attached to the model do not take what runs in here for a pass of training."""
    from perennial.attach.taps import Tap

    taps = [hook for m in model.modules() for hook in m._forward_pre_hooks.values() if isinstance(hook, Tap)]
    seen = [tap.seen for tap in taps]
    try:
        for tap in taps:
            tap.seen = None
        yield
    finally:
        for tap, before in zip(taps, seen, strict=True):
            tap.seen = before


class _Source:
    """The loss of a batch, which can be run again without a trace."""

    def __init__(self, model: nn.Module, criterion: Callable[..., Tensor]) -> None:
        self.model, self.criterion = model, criterion
        self._batch: tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]] | None = None
        self._random: list[Tensor] = []

    def __call__(self, *inputs: Any, **keywords: Any) -> Tensor:
        """The loss on a batch, for ``backward()``: ``criterion(model(x), y)`` for ``source(x, y)``.

        The last of several positional arguments is the target, the others and keywords go to the model. With fewer
        than two there is no target, and ``criterion`` gets the output alone: ``source(**batch)``.
        """
        inputs, target = (inputs[:-1], inputs[-1:]) if len(inputs) > 1 else (inputs, ())
        self._random = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices())]
        self._batch = inputs, keywords, target
        return self.criterion(self.model(*inputs, **keywords), *target)

    def diagonal(self) -> dict[str, Tensor]:
        """The diagonal on the batch of the last call, at the parameters as they are now.

        By name of ``model.named_parameters()``, of those that require a gradient, each of its parameter's shape. The
        model runs again, with the random numbers of that call. Its mode, buffers and gradients and the global random
        state stay as they are. The batch is not copied: do not write into it in between.
        """
        if self._batch is None:
            kind = type(self).__name__
            raise RuntimeError(f"{kind} has seen no batch: call loss = source(x, y) before source.diagonal()")
        params = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        with undisturbed(self.model), _unwatched(self.model):
            return {name: h.detach() for name, h in self._diagonal(params).items()}

    def _diagonal(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} defines no diagonal")

    def _devices(self) -> list[torch.device]:
        return sorted({p.device for p in self.model.parameters() if p.device.type == "cuda"}, key=str)

    def _output(self, params: dict[str, Tensor]) -> Any:
        assert self._batch is not None
        torch.set_rng_state(self._random[0])
        for device, state in zip(self._devices(), self._random[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
        # Copies: an earlier graph may need what the model would write over.
        buffers = {name: torch.clone(b) for name, b in self.model.named_buffers()}
        return functional_call(self.model, params | buffers, *self._batch[:2])

    def _loss(self, output: Any) -> Tensor:
        assert self._batch is not None
        return self.criterion(output, *self._batch[2])


class HesScale(_Source):
    """:func:`hesscale` for a training loop: makes the loss, and the diagonal of its Hessian when asked.

    Example::

        source = HesScale(model, nn.CrossEntropyLoss())
        source(x, y).backward()
        source.diagonal()["0.weight"]      # [out, in]

    Sources: Elsayed and Mahmood (arXiv 2210.11639, 2022); Becker and LeCun (1988).

    Args:
        model: of operations that :func:`hesscale` knows; dropout and batch normalisation in evaluation.
        criterion: the loss [] of output and target, in which samples do not mix.
    """

    def _diagonal(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return hesscale(self._output, params, self._loss).curvature


class Hutchinson(_Source):
    """:func:`hutchinson` for a training loop: makes the loss, and estimates the diagonal of its Hessian when asked.

    Used as :class:`HesScale`. Source: Hutchinson (1989).

    Args:
        model: any that torch can differentiate twice.
        criterion: the loss [] of output and target.
        probes: random vectors a call of ``diagonal``; each costs about two gradients.
        seed: of the probes, which are a function of seed, number of the loss, name and element.
    """

    calls: int
    """Losses made so far, the step of the noise. Set it where a run goes on that was interrupted."""

    def __init__(self, model: nn.Module, criterion: Callable[..., Tensor], probes: int = 1, seed: int = 0) -> None:
        super().__init__(model, criterion)
        if probes < 1:
            raise ValueError(f"probes is {probes}: Hutchinson needs at least one random vector")
        self.probes, self.key, self.calls = probes, seed_key(seed, "method"), 0

    def __call__(self, *inputs: Any, **keywords: Any) -> Tensor:
        """As :class:`HesScale`'s."""
        self.calls += 1
        return super().__call__(*inputs, **keywords)

    def _diagonal(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        device = next(iter(params.values())).device
        key, step = (torch.tensor(v, dtype=torch.int32, device=device) for v in (self.key, self.calls))
        probes = rademacher(Noise(key, step, "hutchinson"), params, self.probes)
        leaves = [p.requires_grad_() for p in params.values()]
        total = [torch.zeros_like(p) for p in leaves]
        # Reverse over reverse here: one pass serves all probes, dropout falls as it did in the loss, and functions of a
        # user's own need no more than a second derivative. The fused attentions do not even have that.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = self._loss(self._output(params))
            slopes = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
            for probe in probes:
                along = torch.stack([(g * v).sum() for g, v in zip(slopes, probe.values(), strict=True)]).sum()
                if not along.requires_grad:  # a loss that is linear in all parameters
                    break
                products = torch.autograd.grad(along, leaves, retain_graph=True, materialize_grads=True)
                total = [t + v * hv / self.probes for t, v, hv in zip(total, probe.values(), products, strict=True)]
        return dict(zip(params, total, strict=True))
