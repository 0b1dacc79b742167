"""Which weights to prune first: scores of single weights, before, during or after training.

A score takes :class:`~perennial.tickets.Evidence` and gives, for every weight that may be pruned, a number: the
lowest are pruned first.
Values at places that are pruned already have no meaning and are ignored.

The scores of Zhou et al. (NeurIPS 2019, "Deconstructing Lottery Tickets") look at two values of a weight alone, the
one survivors are reset to, :math:`w_i`, and the trained one, :math:`w_f`. The others look at a loss on data, or, for
SynFlow, at the network alone. Those that need gradients work on a copy of the network, so that its mode, gradients,
buffers and hooks are left alone, as are the global random states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from perennial.scores import first_order
from perennial.tickets.masks import Masks, check_masks, whole
from perennial.tickets.prune import SCOPES, select
from perennial.trainability.lanes import Loss, copied, device_of, generator, left_alone, seed_globally

TEMPERATURE = 200.0
"""What :func:`grasp` divides outputs by, T."""
_AT_ONCE = 1 << 24
"""Numbers in the gradients of single samples that :func:`fisher` holds at a time."""


@dataclass(frozen=True)
class Evidence:
    """What a score may look at."""

    model: nn.Module
    """The network with the trained weights; those that are pruned are 0."""
    start: Mapping[str, Tensor]
    """The weights that survivors are reset to, by parameter name."""
    trained: Mapping[str, Tensor]
    """The trained weights, by parameter name."""
    masks: Mapping[str, Tensor]
    """Which weights are left: bool of the parameter's shape, by name, for parameters that may be pruned."""
    batches: Sequence[tuple[Tensor, Tensor]] = field(default=())
    """Inputs and targets to score on."""
    loss: Loss | None = None
    """Takes outputs and targets of a batch, and returns their mean loss, []."""
    example: Tensor | None = None
    """A batch of inputs, for its shape; None: the first of the batches."""
    seed: int = 0
    """Of :func:`perennial.tickets.scores.random`, and of what the network draws (dropout)."""


class _OfCopy(Evidence):
    """Whose network is a copy already: copying it for every round would take longer than the round."""


Score: TypeAlias = Callable[[Evidence], dict[str, Tensor]]


# --- two values of a weight -------------------------------------------------------------------------------------------


def large_final(evidence: Evidence) -> dict[str, Tensor]:
    """Keep the largest trained weights: :math:`|w_f|`.

    The magnitude of iterative pruning: Han et al. (NIPS 2015), Frankle and Carbin (ICLR 2019). The name is that of
    Zhou et al. (2019), as are those of the scores that follow.
    """
    return _of_two(evidence, lambda start, final: final.abs())


def small_final(evidence: Evidence) -> dict[str, Tensor]:
    """Keep the smallest trained weights: :math:`-|w_f|`. A control of Zhou et al. (2019)."""
    return _of_two(evidence, lambda start, final: -final.abs())


def large_init(evidence: Evidence) -> dict[str, Tensor]:
    """Keep the weights that started largest: :math:`|w_i|`. Zhou et al. (2019)."""
    return _of_two(evidence, lambda start, final: start.abs())


def small_init(evidence: Evidence) -> dict[str, Tensor]:
    """Keep the weights that started smallest: :math:`-|w_i|`. Zhou et al. (2019)."""
    return _of_two(evidence, lambda start, final: -start.abs())


def large_init_large_final(evidence: Evidence) -> dict[str, Tensor]:
    r"""Keep the weights that started and ended large: :math:`\min(r(|w_i|), r(|w_f|))`.

    :math:`r` is the share of a layer's surviving weights that are not larger. Zhou et al. (2019) keep, in each layer,
    what is above one percentile of both, and search for the percentile that leaves as many as wanted; those are the
    weights of the highest minimum.
    """
    return _lower_rank(evidence, 1.0)


def small_init_small_final(evidence: Evidence) -> dict[str, Tensor]:
    r"""Keep the weights that started and ended small: :math:`\min(r(-|w_i|), r(-|w_f|))`.

    :math:`r` is as in :func:`large_init_large_final`. Zhou et al. (2019).
    """
    return _lower_rank(evidence, -1.0)


def magnitude_increase(evidence: Evidence) -> dict[str, Tensor]:
    """Keep the weights whose magnitude grew most: :math:`|w_f| - |w_i|`. Zhou et al. (2019)."""
    return _of_two(evidence, lambda start, final: final.abs() - start.abs())


def movement(evidence: Evidence) -> dict[str, Tensor]:
    """Keep the weights that moved furthest: :math:`|w_f - w_i|`. Zhou et al. (2019)."""
    return _of_two(evidence, lambda start, final: (final - start).abs())


def large_final_same_sign(evidence: Evidence) -> dict[str, Tensor]:
    r"""Keep the largest trained weights that kept their sign: :math:`|w_f|` if :math:`\text{sign}\,w_f =
    \text{sign}\,w_i`, else 0.

    Zhou et al. (2019). A weight of exactly 0 has a sign of its own.
    """
    return _in_group(evidence, large_final(evidence), same=True, otherwise=0.0)


def large_final_diff_sign(evidence: Evidence) -> dict[str, Tensor]:
    r"""Keep the largest trained weights that changed their sign: :math:`|w_f|` if :math:`\text{sign}\,w_f \ne
    \text{sign}\,w_i`, else 0. Zhou et al. (2019)."""
    return _in_group(evidence, large_final(evidence), same=False, otherwise=0.0)


def magnitude_increase_same_sign(evidence: Evidence) -> dict[str, Tensor]:
    r"""Keep the weights that kept their sign, those whose magnitude grew most: :math:`|w_f| - |w_i|` if
    :math:`\text{sign}\,w_f = \text{sign}\,w_i`; all others are pruned before them.

    Zhou et al. (2019). Their code gives the others the score 0 here too, where it is not the lowest: weights that
    changed their sign are then kept before weights that kept it and shrank. Here the others have the lowest number of
    the type, so that the group of the name is kept as long as it lasts.
    """
    return _in_group(evidence, magnitude_increase(evidence), same=True, otherwise=None)


def magnitude_increase_diff_sign(evidence: Evidence) -> dict[str, Tensor]:
    r"""Keep the weights that changed their sign, those whose magnitude grew most: :math:`|w_f| - |w_i|` if
    :math:`\text{sign}\,w_f \ne \text{sign}\,w_i`; all others are pruned before them.

    Zhou et al. (2019); see :func:`magnitude_increase_same_sign` for what differs from their code.
    """
    return _in_group(evidence, magnitude_increase(evidence), same=False, otherwise=None)


def movement_same_sign(evidence: Evidence) -> dict[str, Tensor]:
    r"""Keep the weights that kept their sign, those that moved furthest: :math:`|w_f - w_i|` if
    :math:`\text{sign}\,w_f = \text{sign}\,w_i`, else 0. After Zhou et al. (2019), who have no such pair."""
    return _in_group(evidence, movement(evidence), same=True, otherwise=0.0)


def movement_diff_sign(evidence: Evidence) -> dict[str, Tensor]:
    r"""Keep the weights that changed their sign, those that moved furthest: :math:`|w_f - w_i|` if
    :math:`\text{sign}\,w_f \ne \text{sign}\,w_i`, else 0. After Zhou et al. (2019), who have no such pair."""
    return _in_group(evidence, movement(evidence), same=False, otherwise=0.0)


def random(evidence: Evidence) -> dict[str, Tensor]:
    """Keep any: uniform on [0, 1), a function of seed, name and place. The control of every other score."""
    found = {}
    for name, mask in evidence.masks.items():
        rng = generator(evidence.seed, f"random score {name}")
        found[name] = torch.rand(mask.shape, generator=rng, dtype=torch.float64).to(mask.device)
    return found


# --- a loss on data ---------------------------------------------------------------------------------------------------


def snip(evidence: Evidence) -> dict[str, Tensor]:
    r"""Keep the weights whose absence the loss would feel, by first order, in either direction:
    :math:`|g_j w_j| / \sum_k |g_k w_k|`.

    :math:`g` is the gradient of the loss summed over the batches, and :math:`g_j w_j` that by a mask's entry; the sum
    over k runs over all weights of all layers. Lee et al. (ICLR 2019, arXiv 1810.02340), before training. The network
    runs in training mode, as theirs does.
    """
    with _running(evidence, "snip", training=True) as (network, weights):
        slopes = _slope(evidence, network, weights)
        found = {name: (slopes[name] * w).abs() for name, w in _values(weights).items()}
        total = torch.stack([score.sum() for score in found.values()]).sum()
        scale = torch.where(total == 0, 1.0, total)  # all of them are 0 then, and stay so
        return _sound("snip", {name: score / scale for name, score in found.items()})


def grasp(evidence: Evidence) -> dict[str, Tensor]:
    r"""Keep the weights that carry the gradient's flow: :math:`w \odot H g`.

    Removing weight j changes the squared norm of the gradient, by first order, by :math:`-2 w_j (H g)_j`. Wang et al.
    (ICLR 2020, arXiv 2002.07376) score by :math:`-w \odot H g` and remove the highest; this is its negative, of which
    the lowest are removed: weights whose removal makes the gradient larger. Gradient and Hessian are those by the
    surviving weights that may be pruned, of the loss of the outputs divided by T = 200 (:data:`TEMPERATURE`), summed
    over the batches. Their code divides by the magnitude of the sum over all weights, which changes no order.
    The network runs in training mode, as theirs does; a batch's dropout is the same in both gradients.
    """
    with _running(evidence, "grasp", training=True) as (network, weights):
        flow = _slope(evidence, network, weights, TEMPERATURE)
        flow = {name: torch.where(evidence.masks[name].to(g.device), g, 0.0) for name, g in flow.items()}
        products = {name: torch.zeros_like(w) for name, w in _values(weights).items()}
        for number in range(len(evidence.batches)):
            with torch.enable_grad():
                slopes = _gradient(_loss(evidence, network, weights, number, TEMPERATURE), weights, keep=True)
                along = torch.stack([(slopes[name] * flow[name]).sum() for name in weights]).sum()
            if along.requires_grad:  # else the gradient is a constant, and the Hessian 0
                for name, product in _gradient(along, weights).items():
                    products[name] += product
        return _sound("grasp", {name: w * products[name] for name, w in _values(weights).items()})


def taylor(evidence: Evidence) -> dict[str, Tensor]:
    r"""Keep the weights whose absence changes the loss, by first order, squared: :math:`\overline{(g w)^2}`.

    The mean is over batches, :math:`g` a batch's gradient. Molchanov et al. (CVPR 2019, arXiv 1906.10771), equation 8,
    of single weights. The network runs in training mode.
    """
    return _mean_of_batches(evidence, "taylor", lambda w, g: (g * w).square())


def utility(evidence: Evidence) -> dict[str, Tensor]:
    r"""Keep the weights without which the loss would be higher, by first order: :math:`\overline{-g w}`.

    The mean is over batches. The utility of UPGD, Elsayed and Mahmood (ICLR 2024), equation 3, see
    :func:`perennial.scores.first_order`: unlike :func:`taylor` and :func:`snip` it prunes first what does harm. The
    network runs in training mode.
    """
    return _mean_of_batches(evidence, "utility", first_order)


def fisher(evidence: Evidence) -> dict[str, Tensor]:
    r"""Keep the weights whose absence raises the loss, by second order at a minimum: :math:`\tfrac12 w^2\,
    \overline{g_n^2}`.

    The mean is over samples, :math:`g_n` the gradient of one sample's loss: the diagonal of the empirical Fisher
    information in place of the Hessian's of optimal brain damage (LeCun et al., 1989), as in Theis et al. (arXiv
    1801.05787, 2018). The network runs in evaluation mode, because in training mode a batch norm has no single samples.
    """
    with _running(evidence, "fisher", training=False) as (network, weights):
        held = _values(weights)
        total = {name: torch.zeros_like(w) for name, w in held.items()}
        together = max(1, _AT_ONCE // max(1, sum(w.numel() for w in held.values())))

        def of_one(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            assert evidence.loss is not None
            return evidence.loss(functional_call(network, params, (x.unsqueeze(0),)), y.unsqueeze(0))

        each = vmap(grad(of_one), in_dims=(None, 0, 0), randomness="different")
        for batch in evidence.batches:
            inputs, targets = (t.to(device_of(network)) for t in batch)
            for x, y in zip(inputs.split(together), targets.split(together), strict=True):
                for name, slopes in each(held, x, y).items():
                    total[name] += slopes.square().sum(0)
        samples = sum(len(inputs) for inputs, _ in evidence.batches)
        return _sound("fisher", {name: w.square() * total[name] / (2 * samples) for name, w in held.items()})


# --- the network alone ------------------------------------------------------------------------------------------------


def synflow(evidence: Evidence) -> dict[str, Tensor]:
    r"""Keep the weights on strong paths: :math:`\left|\frac{\partial R}{\partial |w|}\,|w|\right|`, where R is the sum
    of the outputs of the network with the magnitudes of all its parameters and buffers, for an input of ones.

    Needs no data. In a network of linear layers and rectifiers the scores of a layer sum to the same for every layer,
    biases aside, so that in many rounds (:func:`~perennial.tickets.prune_at_start` with 100 ``iterations``) no layer
    is emptied while
    others have weights to spare: those of a layer of few weights score high. Tanaka et al. (NeurIPS 2020, arXiv
    2006.05467). In evaluation mode, and in float64, whose range deep networks need.

    Raises:
        ValueError: inputs that are no floats, and so cannot be ones; a score that is not finite.
    """
    example = evidence.example
    if example is None:
        if not evidence.batches:
            raise ValueError("synflow needs the shape of an input: give the evidence an example=, a batch of inputs")
        example = evidence.batches[0][0]
    if not example.is_floating_point():
        raise ValueError(
            f"synflow feeds the network ones in place of its inputs, but the example's are {example.dtype}, such as "
            "tokens; take another score, or let the network begin behind its embedding"
        )
    with _running(evidence, "synflow", training=False, data=False) as (network, weights):
        tensors = (*network.named_parameters(), *network.named_buffers())
        wide = {name: t.detach().abs().double() for name, t in tensors if t.is_floating_point() and name not in weights}
        ones = torch.ones(1, *example.shape[1:], dtype=torch.float64, device=device_of(network))
        leaves = {name: w.abs().double().requires_grad_() for name, w in _values(weights).items()}
        with torch.enable_grad():
            slopes = _gradient(functional_call(network, {**wide, **leaves}, (ones,)).sum(), leaves)
        return _sound("synflow", {name: (slopes[name] * w).abs() for name, w in _values(leaves).items()})


SCORES: dict[str, Score] = {
    score.__name__: score
    for score in (
        large_final,
        small_final,
        large_init,
        small_init,
        large_init_large_final,
        small_init_small_final,
        magnitude_increase,
        movement,
        large_final_same_sign,
        large_final_diff_sign,
        magnitude_increase_same_sign,
        magnitude_increase_diff_sign,
        movement_same_sign,
        movement_diff_sign,
        random,
        snip,
        grasp,
        synflow,
        taylor,
        utility,
        fisher,
    )
}
"""By name."""


def prune_at_start(
    model: nn.Module,
    score: str | Score,
    density: float,
    *,
    iterations: int = 1,
    batches: Sequence[tuple[Tensor, Tensor]] = (),
    loss: Loss | None = None,
    example: Tensor | None = None,
    seed: int = 0,
    scope: str = "global",
    masks: Mapping[str, Tensor] | None = None,
) -> Masks:
    r"""Prune the network as it is, without training, in one round or many.

    Round k of n leaves the share :math:`d_0 (d / d_0)^{k/n}` of the weights, :math:`d_0` what is left before, and
    scores what the round before left. One round is SNIP and GraSP as published; 100 are SynFlow, and with SNIP
    iterative SNIP (de Jorge et al., arXiv 2006.09081, without weights that return). Example::

        masks = prune_at_start(model, "synflow", 0.01, iterations=100, example=images[:1])

    The model is left as it was.

    Args:
        model: with the weights that survivors will have.
        score: a name of :data:`~perennial.tickets.SCORES`, or a function of :class:`~perennial.tickets.Evidence`.
        density: share of the weights in the masks' tensors that is left at the end, in (0, 1], rounded to a whole
            number of weights.
        iterations: rounds.
        batches: inputs and targets, for scores that look at a loss.
        loss: takes outputs and targets of a batch, and returns their mean loss.
        example: a batch of inputs, for synflow; None: the first of the batches.
        seed: of the order among equal scores, of random scores and of dropout.
        scope: ``"global"``, the lowest of all layers together, or ``"layer"``, the same share of every layer.
        masks: what is pruned already, and which weights may be pruned: bool by parameter name. None: nothing, and those
            of :func:`perennial.tickets.prunable`.

    Returns:
        Masks, bool by parameter name; True is kept.

    Raises:
        ValueError: numbers out of range, an unknown score, a density above what the masks leave, masks of another
            model; what the score raises.
    """
    if isinstance(score, str) and score not in SCORES:
        raise ValueError(f"score is {score!r}; it is a function or one of {', '.join(SCORES)}")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1")
    if scope not in SCOPES:
        raise ValueError(f"scope is {scope!r}; it is one of {', '.join(SCOPES)}")
    if masks is not None:
        check_masks(model, masks)
    scored = SCORES[score] if isinstance(score, str) else score
    with left_alone(model):
        network = copied(model)
        named = {name: w.detach() for name, w in network.named_parameters()}
        start = {name: w.clone() for name, w in named.items()}
        given = whole(network) if masks is None else masks
        left = {name: mask.to(named[name].device, copy=True) for name, mask in given.items()}
        before = {name: int(mask.sum()) for name, mask in left.items()}
        share = sum(before.values()) / max(1, sum(mask.numel() for mask in left.values()))
        if not 0 < density <= share:
            raise ValueError(
                f"density is {density:g}; it must be above 0, and at most {share:g}, the share of weights that the "
                "masks leave"
            )
        for number in range(1, iterations + 1):
            for name, mask in left.items():
                named[name].copy_(torch.where(mask, start[name], 0.0))
            trained = {name: w.clone() for name, w in named.items()}
            evidence = _OfCopy(network, start, trained, left, batches, loss, example, seed)
            part = (density / share) ** (number / iterations)
            left = select(scored(evidence), left, _gone(left, before, part, scope), scope=scope, seed=seed)
        return left


# --- what they share --------------------------------------------------------------------------------------------------


def _gone(left: Masks, before: Mapping[str, int], part: float, scope: str) -> float | dict[str, float]:
    """The share of what is left that goes, so that a part of what was there before stays, in whole weights."""
    now = {name: int(mask.sum()) for name, mask in left.items()}
    if scope == "global":
        return 1 - round(part * sum(before.values())) / max(1, sum(now.values()))
    return {name: 1 - round(part * before[name]) / max(1, count) for name, count in now.items()}


def _check(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], where: str) -> None:
    for name, mask in masks.items():
        found = list(weights[name].shape) if name in weights else "missing"
        if found != list(mask.shape):
            raise ValueError(f"{name} is {found} in the evidence's {where}, but its mask is {list(mask.shape)}")


def _of_two(evidence: Evidence, score: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """A function of the weights at the start and at the end."""
    _check(evidence.masks, evidence.start, "start")
    _check(evidence.masks, evidence.trained, "trained")
    return {name: score(evidence.start[name].detach(), evidence.trained[name].detach()) for name in evidence.masks}


def _lower_rank(evidence: Evidence, sign: float) -> dict[str, Tensor]:
    """The lower one of the ranks of both values among a layer's survivors, each as a share, float64."""

    def ranks(values: Tensor, mask: Tensor) -> Tensor:
        order = values[mask].sort().values
        # Equal values share the highest of their ranks: where all are equal, as signed constants, the other decides.
        return torch.searchsorted(order, values.contiguous(), right=True) / max(1, len(order))

    def lower(start: Tensor, final: Tensor, mask: Tensor) -> Tensor:
        pair = [ranks(sign * w.abs().double(), mask) for w in (start, final)]
        return torch.minimum(*pair)

    both = _of_two(evidence, lambda start, final: torch.stack((start, final)))
    return {name: lower(start, final, evidence.masks[name]) for name, (start, final) in both.items()}


def _in_group(
    evidence: Evidence, scores: Mapping[str, Tensor], *, same: bool, otherwise: float | None
) -> dict[str, Tensor]:
    """Scores of the weights that kept, or changed, their sign; ``otherwise`` those of the others, None: the lowest."""
    kept = _of_two(evidence, lambda start, final: start.sign() == final.sign())
    found = {}
    for name, score in scores.items():
        low = torch.finfo(score.dtype).min if otherwise is None else otherwise
        found[name] = torch.where(kept[name] == same, score, low)
    return found


@contextlib.contextmanager
def _running(
    evidence: Evidence, score: str, *, training: bool, data: bool = True
) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """A copy of the network, and its weights that are scored, as leaves of graphs, the pruned ones 0."""
    model = evidence.model
    check_masks(model, evidence.masks)
    if data:
        lacking = [what for what in ("batches", "loss") if not getattr(evidence, what)]
        if lacking:
            raise ValueError(
                f"{score} needs batches of inputs and targets and a loss, and the evidence has no "
                f"{' and no '.join(lacking)}; give batches=[(inputs, targets), ...] and loss="
            )
    with left_alone(model):
        network = (model if isinstance(evidence, _OfCopy) else copied(model)).train(training)
        named = dict(network.named_parameters())
        seed_globally(evidence.seed, "score")
        left = {name: mask.to(named[name].device) for name, mask in evidence.masks.items()}
        yield network, {n: torch.where(mask, named[n].detach(), 0.0).requires_grad_() for n, mask in left.items()}


def _values(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.detach() for name, w in weights.items()}


def _loss(
    evidence: Evidence, network: nn.Module, weights: dict[str, Tensor], number: int, temperature: float = 1.0
) -> Tensor:
    """Of a batch, of the outputs divided by the temperature."""
    assert evidence.loss is not None
    seed_globally(evidence.seed, f"score batch {number}")
    inputs, targets = (t.to(device_of(network)) for t in evidence.batches[number])
    outputs = functional_call(network, weights, (inputs,))
    return evidence.loss(outputs if temperature == 1.0 else outputs / temperature, targets)


def _gradient(value: Tensor, weights: dict[str, Tensor], *, keep: bool = False) -> dict[str, Tensor]:
    """0 for weights that are not used."""
    leaves = list(weights.values())
    found = torch.autograd.grad(value, leaves, create_graph=keep, allow_unused=True, materialize_grads=True)
    return dict(zip(weights, found, strict=True))


def _slope(
    evidence: Evidence, network: nn.Module, weights: dict[str, Tensor], temperature: float = 1.0
) -> dict[str, Tensor]:
    """The gradient of the loss, summed over the batches."""
    total = {name: torch.zeros_like(w) for name, w in _values(weights).items()}
    for number in range(len(evidence.batches)):
        with torch.enable_grad():
            slopes = _gradient(_loss(evidence, network, weights, number, temperature), weights)
        for name, slope in slopes.items():
            total[name] += slope
    return total


def _mean_of_batches(evidence: Evidence, score: str, of_batch: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """The mean over batches of a function of weight and gradient."""
    with _running(evidence, score, training=True) as (network, weights):
        held = _values(weights)
        total = {name: torch.zeros_like(w) for name, w in held.items()}
        for number in range(len(evidence.batches)):
            with torch.enable_grad():
                slopes = _gradient(_loss(evidence, network, weights, number), weights)
            for name, slope in slopes.items():
                total[name] += of_batch(held[name], slope)
        return _sound(score, {name: t / len(evidence.batches) for name, t in total.items()})


def _sound(score: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    bad = [name for name, values in found.items() if not bool(values.isfinite().all())]
    if bad:
        raise ValueError(
            f"{score} of {', '.join(bad)} is not finite; look at the loss of the batches, or scale the network's "
            "weights or its inputs"
        )
    return found
