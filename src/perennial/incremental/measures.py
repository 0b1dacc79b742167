"""What becomes of a network's units, on images that it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from perennial.metrics import UnitStatistics, effective_rank_entropy, rank_99, rarely_active_units, weight_magnitude
from perennial.resnet import ResNet18


def diagnose(model: ResNet18, images: Tensor) -> dict[str, float]:
    """``dormant`` (:func:`perennial.metrics.rarely_active_units` behind every rectifier), ``rank_99`` and
    ``effective_rank`` of the features that the last layer reads, in evaluation mode; ``weight_magnitude``.

    Args:
        model: left as it is.
        images: [n, 3, side, side], normalised.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _Rectified() as seen:
            features = model.features(images)
    finally:
        model.train(training)
    return {
        "dormant": float(rarely_active_units(seen.layers)),
        "rank_99": float(rank_99(features)),
        "effective_rank": float(effective_rank_entropy(features)),
        "weight_magnitude": float(weight_magnitude(dict(model.named_parameters()))),
    }


def accuracy(
    model: nn.Module, images: Callable[[slice], Tensor], targets: Tensor, seen: int, batch: int = 500
) -> float:
    """Share of images whose largest logit among those of the classes ``seen`` is their own, in evaluation mode.

    Args:
        model: gives logits by order of arrival.
        images: a slice -> normalised images.
        targets: int64 [n], by order of arrival.
        seen: how many classes have arrived.
        batch: images at a time.
    """
    model.eval()
    hits = torch.zeros((), dtype=torch.int64, device=targets.device)
    with torch.no_grad():
        for start in range(0, len(targets), batch):
            part = slice(start, start + batch)
            hits += (model(images(part))[:, :seen].argmax(1) == targets[part]).sum()
    model.train()
    return int(hits) / len(targets)


class _Rectified(TorchFunctionMode):
    """Takes the statistics of what every rectifier gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[UnitStatistics] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "relu":
            self.layers.append(UnitStatistics.of(out, gram=False))
        return out
