"""Online normalization."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function


class OnlineNorm(nn.Module):
    r"""Online Normalization (Chiley et al., NeurIPS 2019, arXiv 1905.05894): normalise by running statistics, one
    sample at a time, so that a batch of one will do.

    Forward, for each feature and each sample t, in the order of the batch; the mean and variance of x over the
    positions of the sample are :math:`\bar x_t` and :math:`s_t^2` (x itself and 0 where there are none):

    .. math::
        y_t &= \frac{x_t - \mu_{t-1}}{\sqrt{\sigma^2_{t-1} + \epsilon}} \\
        \mu_t &= \alpha_f \mu_{t-1} + (1 - \alpha_f)\,\bar x_t \\
        \sigma^2_t &= \alpha_f \sigma^2_{t-1} + (1 - \alpha_f)\,s_t^2
            + \alpha_f (1 - \alpha_f)(\bar x_t - \mu_{t-1})^2

    Backward, a control process instead of the derivative of the statistics: two accumulators a feature keep the
    gradient orthogonal, over time, to the output and to the constant. With :math:`y'` the gradient by the output and
    the bar the mean over positions:

    .. math::
        \tilde x'_t &= y'_t - (1 - \alpha_b)\,\varepsilon^{(y)}_{t-1} y_t, &
        \varepsilon^{(y)}_t &= \varepsilon^{(y)}_{t-1} + \overline{\tilde x'_t y_t} \\
        x'_t &= \frac{\tilde x'_t}{\sqrt{\sigma^2_{t-1} + \epsilon}} - (1 - \alpha_b)\,\varepsilon^{(1)}_{t-1}, &
        \varepsilon^{(1)}_t &= \varepsilon^{(1)}_{t-1} + \overline{x'_t}

    The result is then divided by its root mean square over the features and positions of the sample (layer scaling),
    which bounds it where the running statistics lag behind, and last comes the affine map:

    .. math:: z_t = \gamma\, \frac{y_t}{\sqrt{\overline{y_t^2} + \epsilon}} + \beta

    A forward pass in training mode moves the running statistics, a backward pass the accumulators; so it is not for
    recomputed activations (checkpointing), which would move them twice. In evaluation mode the running statistics are
    used and nothing moves. Half-precision inputs are normalised in the precision of the buffers. Its gradient cannot be
    differentiated again.

    With ``torch.func``, where a backward pass may change nothing, take the gradient by the accumulators too
    (:attr:`ACCUMULATORS`): what comes back for them is no gradient but how far they move. The running statistics must
    then be copies of the caller's, since they are written into, and each layer be used once in a forward pass.

    Args:
        features: features of the input, which lie along dimension 1.
        forward_decay: :math:`\alpha_f`, from 0 up to 1, which is left out.
        backward_decay: :math:`\alpha_b`, likewise.
        eps: :math:`\epsilon`, above 0.
        affine: a learned factor and offset a feature, ``weight`` and ``bias``.
        layer_scaling: divide by the root mean square over features.

    Raises:
        ValueError: a setting out of its range.
    """

    ACCUMULATORS: ClassVar[tuple[str, ...]] = ("output_error", "mean_error")
    """The buffers that a backward pass moves."""

    weight: nn.Parameter | None
    """[features]: :math:`\\gamma`, starts at 1; None without the affine map."""
    bias: nn.Parameter | None
    """[features]: :math:`\\beta`, starts at 0; None without the affine map."""
    running_mean: Tensor
    """[features]: :math:`\\mu`, starts at 0."""
    running_var: Tensor
    """[features]: :math:`\\sigma^2`, starts at 1."""
    output_error: Tensor
    """[features]: :math:`\\varepsilon^{(y)}`, starts at 0."""
    mean_error: Tensor
    """[features]: :math:`\\varepsilon^{(1)}`, starts at 0."""

    def __init__(
        self,
        features: int,
        forward_decay: float = 0.999,
        backward_decay: float = 0.99,
        eps: float = 1e-5,
        affine: bool = True,
        layer_scaling: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"OnlineNorm has {features} features; it must have at least 1")
        for name, decay in (("forward_decay", forward_decay), ("backward_decay", backward_decay)):
            if not 0 <= decay < 1:
                raise ValueError(f"OnlineNorm.{name} is {decay:g}; it must be at least 0 and below 1")
        if not eps > 0:
            raise ValueError(f"OnlineNorm.eps is {eps:g}; it must be above 0")
        self.features = features
        self.forward_decay = forward_decay
        self.backward_decay = backward_decay
        self.eps = eps
        self.layer_scaling = layer_scaling
        for name in ("running_mean", "running_var", "output_error", "mean_error"):
            self.register_buffer(name, torch.empty(features, device=device, dtype=dtype))
        for name in ("weight", "bias"):
            parameter = nn.Parameter(torch.empty(features, device=device, dtype=dtype)) if affine else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Statistics and accumulators as at the start."""
        self.running_mean.zero_()
        self.running_var.fill_(1.0)
        self.output_error.zero_()
        self.mean_error.zero_()

    def reset_parameters(self) -> None:
        """Everything as at the start: statistics, accumulators, factor 1, offset 0."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[samples, features] or [samples, features, positions...] -> the same shape and dtype."""
        if x.dim() < 2 or x.shape[1] != self.features:
            raise ValueError(
                f"OnlineNorm got an input of shape {list(x.shape)}; it must be [samples, {self.features}] or "
                f"[samples, {self.features}, positions...]"
            )
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, self.running_mean.dtype))
        flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(-1)
        y: Tensor
        if self.training:
            errors = self.output_error, self.mean_error
            owner = None if any(error.requires_grad for error in errors) else self
            decays = self.forward_decay, self.backward_decay, self.eps
            y, mean, var = online_normalise(flat, self.running_mean, self.running_var, *errors, decays, owner)
            self.running_mean.copy_(mean)
            self.running_var.copy_(var)
        else:
            y = F.batch_norm(flat, self.running_mean, self.running_var, eps=self.eps)  # as which others know it
        if self.layer_scaling:
            y = y / torch.sqrt(y.square().mean((1, 2), keepdim=True) + self.eps)
        if self.weight is not None and self.bias is not None:
            y = y * self.weight[:, None] + self.bias[:, None]
        return y.reshape(x.shape).to(dtype)

    def extra_repr(self) -> str:
        return (
            f"{self.features}, forward_decay={self.forward_decay}, backward_decay={self.backward_decay}, "
            f"eps={self.eps}, affine={self.weight is not None}, layer_scaling={self.layer_scaling}"
        )


def accumulators(model: nn.Module) -> list[str]:
    """The buffers of a model that a backward pass moves, by qualified name."""
    found = []
    for name, module in model.named_modules():
        found += [f"{name}.{part}".lstrip(".") for part in getattr(module, "ACCUMULATORS", ())]
    return found


def online_normalise(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The normalisation and the statistics after it: an operation that a ``TorchFunctionMode`` sees, unlike an autograd
    function."""
    if has_torch_function((x,)):
        return handle_torch_function(online_normalise, (x,), x, *rest)
    y, mean, var, _ = _Normalize.apply(x, *rest)  # type: ignore[no-untyped-call]
    return y, mean, var


class _Normalize(torch.autograd.Function):
    """The normalisation of [samples, features, positions] with its control process, and the statistics after it.

    The gradient by an accumulator is how far it moves. Where a module owns them, its next value is written into it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        output_error: Tensor,
        mean_error: Tensor,
        decays: tuple[float, float, float],
        owner: OnlineNorm | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        decay, _, eps = decays
        center = x.mean(2)
        spread = (x - center[:, :, None]).square().mean(2)
        mean = _before(running_mean, (1 - decay) * center, decay)
        gap = center - mean[:-1]
        var = _before(running_var, (1 - decay) * (spread + decay * gap.square()), decay)
        scale = torch.sqrt(var[:-1] + eps)[:, :, None]
        return (x - mean[:-1, :, None]) / scale, mean[-1], var[-1], scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        *_, output_error, mean_error, ctx.decays, ctx.owner = inputs
        y, mean, var, scale = output
        ctx.mark_non_differentiable(mean, var, scale)
        # A module's own are read when the gradient is taken: another backward pass may have moved them by then.
        own = () if ctx.owner is not None else (output_error, mean_error)
        ctx.save_for_backward(y, scale, *own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        y, scale, *own = ctx.saved_tensors
        owner: OnlineNorm | None = ctx.owner
        output_error, mean_error = own if owner is None else (owner.output_error, owner.mean_error)
        _, decay, _ = ctx.decays
        gain = 1 - decay
        # The first error's own recurrence: it shrinks by how large the output is, and grows by what is parallel to it.
        kept = 1 - gain * y.square().mean(2)
        added = (grad * y).mean(2)
        error = output_error.to(y.dtype)
        errors = []
        for factor, term in zip(kept, added, strict=True):
            errors.append(error)
            error = factor * error + term
        if errors:
            grad = grad - gain * torch.stack(errors)[:, :, None] * y
        grad = grad / scale
        means = _before(mean_error, grad.mean(2), decay)
        moves: tuple[Tensor | None, Tensor | None] = None, None
        if owner is None:
            moves = error - output_error, means[-1] - mean_error
        else:
            owner.output_error.copy_(error)
            owner.mean_error.copy_(means[-1])
        return grad - gain * means[:-1, :, None], None, None, *moves, None, None


def _before(start: Tensor, terms: Tensor, decay: float) -> Tensor:
    r"""The values of :math:`e_t = d e_{t-1} + x_t` before each of the terms, and after the last.

    [features], [samples, features] -> [samples + 1, features]. By one matrix product, since
    :math:`e_t = d^t e_0 + \sum_{i \le t} d^{t-i} x_i`.
    """
    count = terms.shape[0] + 1
    number = torch.arange(count, device=terms.device, dtype=terms.dtype)
    lag = number[:, None] - number
    powers = torch.where(lag >= 0, decay ** lag.clamp(min=0), 0.0)
    with torch.autocast(terms.device.type, enabled=False):  # half precision is too coarse for averages this slow
        return powers @ torch.cat([start.to(terms.dtype)[None], terms])
