"""The first half of normalise-and-project: a norm before every activation function."""

from __future__ import annotations

from torch import nn

from perennial.modules.activations import CReLU, DeepFourier

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.GLU,
    nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink,
    nn.Softplus, nn.Softsign, nn.Softshrink, nn.Threshold, CReLU, DeepFourier,
)  # fmt: skip
_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_KEEP_UNITS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
"""What may stand between a layer and its activation function without changing which dimension is the units."""


def normalize_layers(model: nn.Module) -> list[str]:
    r"""Put a layer norm before every activation function of a model, in place.

    .. math:: \phi(W h + b) \quad\to\quad \phi(\mathrm{LN}(W h + b))

    After a linear layer it is ``nn.LayerNorm(units)``, after a convolution ``nn.GroupNorm(1, channels)``, which is the
    same over channels and positions. With it a layer's output does not depend on the size of its weights, and
    :class:`~perennial.methods.normalize_and_project.NormalizeAndProject`, the second half, may hold that size at its
    start. An activation function with a layer, group or RMS norm between it and its layer is left as it is.

    An activation function at ``"net.1"`` becomes ``nn.Sequential(norm, activation)`` there: the norm is ``"net.1.0"``
    and the activation ``"net.1.1"``. Everything else keeps its name, and so do its entries in a state dict.

    Call it before the optimizer is made: the norms have parameters, which the optimizer must get, and before methods
    are attached. Activation functions must be modules directly in an ``nn.Sequential`` together with the layer that
    they follow. Those called as functions (``F.relu``) cannot be seen, and get no norm.

    Source: Lyle et al., arXiv 2407.01800.

    Returns:
        The names of the added norms.

    Raises:
        ValueError: an activation function is not in an ``nn.Sequential``, or the layer before it cannot be found there,
            or there is no activation function at all. The model is then as it was.
    """
    found: list[tuple[str, nn.Sequential, str, nn.Module]] = []
    activations = 0
    for name, module in model.named_modules():
        for key, child in module._modules.items():
            if not isinstance(child, _ACTIVATIONS):
                continue
            activations += 1
            where = f"{name}.{key}" if name else key
            if not isinstance(module, nn.Sequential):
                raise ValueError(
                    f"normalize_layers cannot put a norm before {where}, a {type(child).__name__} in a "
                    f"{type(module).__name__}: it is not directly in an nn.Sequential, so that what it follows is not "
                    "known. Put it into one after its layer, or write the norm into the model"
                )
            norm = _norm_before(module, key, where)
            if norm is not None:
                found.append((where, module, key, norm))
    if not activations:
        raise ValueError(
            "normalize_layers found no activation function among the modules of this model; those called as functions "
            "cannot be seen. Use modules (nn.ReLU) in an nn.Sequential, or write the norms into the model"
        )
    for _, parent, key, norm in found:
        activation = parent[list(parent._modules).index(key)]
        pair = nn.Sequential(norm, activation)
        pair.training = activation.training
        parent._modules[key] = pair
    return [f"{where}.0" for where, _, _, _ in found]


def _norm_before(parent: nn.Sequential, key: str, where: str) -> nn.Module | None:
    """The norm for the activation function ``key`` of a chain; None where there is one."""
    before = list(parent._modules.items())[: list(parent._modules).index(key)]
    for _, module in reversed(before):
        if isinstance(module, _NORMS):
            return None
        if isinstance(module, nn.Linear):
            return nn.LayerNorm(module.out_features, device=module.weight.device, dtype=module.weight.dtype)
        if isinstance(module, _CONVOLUTIONS):
            return nn.GroupNorm(1, module.out_channels, device=module.weight.device, dtype=module.weight.dtype)
        if not isinstance(module, _KEEP_UNITS):
            raise ValueError(
                f"normalize_layers cannot put a norm before {where}: the {type(module).__name__} between it and the "
                "layer before may change which dimension is the units. Put the activation function right after its "
                "linear or convolutional layer, or write the norm into the model"
            )
    raise ValueError(
        f"normalize_layers cannot put a norm before {where}: no linear or convolutional layer stands before it in the "
        "same nn.Sequential. Put both into one, or write the norm into the model"
    )
