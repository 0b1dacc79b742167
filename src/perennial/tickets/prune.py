"""Which weights go: shares by layer, exact counts, ties by lot."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from perennial.tickets.masks import Masks, prunable
from perennial.trainability.lanes import generator

SCOPES = ("layer", "global")


def shares(model: nn.Module, rates: Mapping[str, float]) -> dict[str, float]:
    """The share pruned a round, by parameter name.

    Args:
        model: any.
        rates: pattern of modules' names -> share in [0, 1); the first that matches a layer counts. Layers that none
            matches are left whole.

    Raises:
        ValueError: a share out of range, a pattern that is never the first to match.
    """
    names = prunable(model)
    found: dict[str, float] = {}
    for pattern, share in rates.items():
        if not 0 <= share < 1:
            raise ValueError(f"the share pruned of {pattern!r} is {share}; it is at least 0 and below 1")
        matched = [n for n in prunable(model, [pattern]) if n not in found]
        if not matched:
            raise ValueError(f"all layers that {pattern!r} matches are matched by patterns before it; put it earlier")
        found |= dict.fromkeys(matched, share)
    return {name: found[name] for name in names if name in found}


def remaining_weights(model: nn.Module, rates: Mapping[str, float], rounds: int) -> list[float]:
    r"""The schedule of iterative pruning without training: percentages of weights that remain, level 0 (100) first.

    A layer of n weights keeps :math:`n - [p n]` of them in a round, [.] the nearest whole number: near
    :math:`(1 - p)^r` after r. The percentage is of the weights of all linear layers and convolutions.

    Args:
        model: any.
        rates: pattern of modules' names -> share pruned a round, see :func:`~perennial.tickets.shares`.
        rounds: how many.
    """
    if rounds < 0:
        raise ValueError(f"rounds is {rounds}; it is a number from 0")
    held = dict(model.named_parameters())
    counts = {name: held[name].numel() for name in prunable(model)}
    share, total = shares(model, rates), sum(counts.values())
    found = [100.0]
    for _ in range(rounds):
        counts = {name: n - round(share.get(name, 0.0) * n) for name, n in counts.items()}
        found.append(100 * sum(counts.values()) / total)
    return found


def select(
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    share: float | Mapping[str, float],
    *,
    scope: str = "layer",
    seed: int = 0,
) -> Masks:
    """Take a share of the kept weights away, those of the lowest scores.

    Exactly the nearest whole number of them, whatever the ties: equal scores go by lot.

    Args:
        scores: of every weight that has a mask; those of weights already gone do not matter.
        masks: before.
        share: of the kept weights, in [0, 1]; by parameter name, where one without is left whole.
        scope: ``layer``: the share of each; ``global``: of all that have the same share, compared with each other.
        seed: of the lot.

    Raises:
        ValueError: a share or scope out of range, scores that are missing, of another shape or NaN.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; it is one of {', '.join(SCOPES)}")
    by_name = {name: share if isinstance(share, (int, float)) else share.get(name, 0.0) for name in masks}
    for name, mask in masks.items():
        if not 0 <= by_name[name] <= 1:
            raise ValueError(f"the share pruned of {name} is {by_name[name]}; it is in [0, 1]")
        if name not in scores or scores[name].shape != mask.shape:
            what = f"of shape {list(scores[name].shape)}" if name in scores else "missing"
            raise ValueError(f"the scores of {name} are {what}, but its mask is {list(mask.shape)}")
        if bool((scores[name].isnan() & mask).any()):
            raise ValueError(f"scores of {name} are not numbers (NaN); did the training that they come from diverge?")
    pools: dict[object, list[str]] = {}
    for name in masks:
        pools.setdefault(by_name[name] if scope == "global" else name, []).append(name)
    lot = generator(seed, "ties")
    found = {name: mask.clone() for name, mask in masks.items()}
    for names in pools.values():
        kept = [masks[name].flatten().nonzero()[:, 0].cpu() for name in names]
        values = torch.cat([scores[name].flatten().cpu()[at] for name, at in zip(names, kept, strict=True)])
        count = round(by_name[names[0]] * len(values))
        drawn = torch.randperm(len(values), generator=lot)
        gone = torch.zeros(len(values), dtype=torch.bool)
        gone[drawn[values[drawn].argsort(stable=True)[:count]]] = True
        for name, at, part in zip(names, kept, gone.split([len(k) for k in kept]), strict=True):
            found[name].view(-1)[at[part].to(found[name].device)] = False
    return found
