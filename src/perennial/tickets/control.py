"""What a ticket must beat: the same sparsity without one thing that makes it a ticket."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from perennial.noise import torch_seed
from perennial.storage import read_json, write_json
from perennial.tickets.find import Stage, Ticket, Train, Weights, made_apart, weights_of
from perennial.tickets.masks import Masks, enforce
from perennial.trainability.lanes import generator

Start = tuple[Weights, Masks, int]
"""Weights to start from, masks, and the step that these weights are of."""
Control = Callable[[Ticket, Callable[[], nn.Module], int], Start]


def random_reinit(ticket: Ticket, make_model: Callable[[], nn.Module], seed: int) -> Start:
    """The ticket's mask on weights drawn anew. Frankle and Carbin (2019): tells the mask from the start."""
    return _fresh(make_model, seed), ticket.masks, 0


def random_mask(ticket: Ticket, make_model: Callable[[], nn.Module], seed: int) -> Start:
    """As many weights of each layer at random places, drawn anew ("random sparsity" in the paper)."""
    return _fresh(make_model, seed), random_like(ticket.masks, seed), 0


def shuffled_mask(ticket: Ticket, make_model: Callable[[], nn.Module], seed: int) -> Start:
    """As many weights of each layer at random places, at the ticket's start. Frankle et al. (ICLR 2021), Su et al.
    (NeurIPS 2020): what prunes before training does no worse by it."""
    return ticket.start, random_like(ticket.masks, seed), ticket.step


def inverted(ticket: Ticket, make_model: Callable[[], nn.Module], seed: int) -> Start:
    """As many weights of each layer, those that are smallest after the whole network's training, at the ticket's
    start."""
    first = ticket.levels[0]
    if len(ticket.levels) == 1:
        raise ValueError("nothing is pruned at level 0, so that nothing can be pruned the other way round")
    trained, masks = first.trained, {}
    for name, mask in ticket.masks.items():
        kept = torch.zeros(mask.numel(), dtype=torch.bool)
        kept[trained[name].abs().flatten().argsort()[: int(mask.sum())]] = True
        masks[name] = kept.view(mask.shape)
    return ticket.start, masks, ticket.step


def shuffled_start(ticket: Ticket, make_model: Callable[[], nn.Module], seed: int) -> Start:
    """The ticket's mask, its survivors' start values dealt out anew within each layer (Zhou et al., NeurIPS 2019)."""
    return _on_survivors(ticket, lambda kept, _: kept[torch.randperm(len(kept), generator=generator(seed, "deal"))])


def shuffled_start_same_sign(ticket: Ticket, make_model: Callable[[], nn.Module], seed: int) -> Start:
    """The same, each with the sign that it had (Zhou et al., 2019)."""

    def dealt(kept: Tensor, _: Tensor) -> Tensor:
        return kept[torch.randperm(len(kept), generator=generator(seed, "deal"))].abs() * kept.sign()

    return _on_survivors(ticket, dealt)


def random_reinit_same_sign(ticket: Ticket, make_model: Callable[[], nn.Module], seed: int) -> Start:
    """The ticket's mask on weights drawn anew, each with the sign that its survivor had (Zhou et al., 2019)."""
    fresh = _fresh(make_model, seed)
    signed = {n: fresh[n].abs() * ticket.start[n].sign() for n in ticket.masks}
    return {**fresh, **signed}, ticket.masks, 0


def signed_constant(ticket: Ticket, make_model: Callable[[], nn.Module], seed: int) -> Start:
    """The ticket's mask; every survivor at the standard deviation of its layer's start, with the sign that it had (Zhou
    et al., 2019: the sign is what matters)."""
    return _on_survivors(ticket, lambda kept, layer: kept.sign() * layer.std())


CONTROLS: dict[str, Control] = {
    function.__name__: function
    for function in (
        random_reinit,
        random_mask,
        shuffled_mask,
        inverted,
        shuffled_start,
        shuffled_start_same_sign,
        random_reinit_same_sign,
        signed_constant,
    )
}


def run_control(
    name: str,
    ticket: Ticket,
    make_model: Callable[[], nn.Module],
    train: Train,
    *,
    seed: int = 0,
    order: int = 0,
    directory: Path | None = None,
) -> dict[str, float]:
    """Train one control of a ticket; what the training function returns.

    Args:
        name: one of :data:`~perennial.tickets.CONTROLS`.
        ticket: the control has as many weights in each layer.
        make_model: as in :func:`~perennial.tickets.find_ticket`.
        train: likewise.
        seed: of what the control draws.
        order: the ``stage.seed`` that the training function gets; that of the ticket, so that both see the same data.
        directory: where its results are kept; a finished control is not trained again.

    Raises:
        ValueError: no such control.
    """
    if name not in CONTROLS:
        raise ValueError(f"there is no control {name!r}; there are {', '.join(CONTROLS)}")
    if directory is not None and (found := read_json(directory / "results.json")) is not None:
        return dict(found)
    start, masks, step = CONTROLS[name](ticket, make_model, seed)
    model = made_apart(make_model, seed, "init")
    model.load_state_dict(start)
    with enforce(model, masks) as held:
        results = dict(train(Stage(model, masks, ticket.levels[-1].level, step, None, order, False, directory)) or {})
        held.check()
    if directory is not None:
        write_json(directory / "results.json", results)
        for left in directory.glob("checkpoint*"):
            left.unlink()
    return results


def controls(
    ticket: Ticket,
    make_model: Callable[[], nn.Module],
    train: Train,
    *,
    kinds: Sequence[str] = ("random_reinit", "random_mask", "shuffled_mask", "inverted"),
    levels: Sequence[int] | None = None,
    seed: int = 0,
    directory: Path | str | None = None,
) -> list[dict[str, float | str]]:
    """Train the controls of a ticket, by default at its last level.

    Args:
        ticket: of :func:`~perennial.tickets.find_ticket`.
        make_model: as given there.
        train: likewise.
        kinds: of :data:`~perennial.tickets.CONTROLS`.
        levels: rounds whose tickets are controlled; None: the last.
        seed: that of the search; controls see the same data, and draw weights and masks of their own.
        directory: where finished controls are kept, and not trained again.

    Returns:
        A row each, with kind, level, percent of the weights that remain, and what the training function returned.
    """
    rows: list[dict[str, float | str]] = []
    for level in levels or (len(ticket.levels) - 1,):
        at = ticket.at(level)
        for kind in kinds:
            place = None if directory is None else Path(directory) / f"{kind}-{level:02d}"
            drawn = torch_seed(seed, f"{kind} {level}") >> 1
            found = run_control(kind, at, make_model, train, seed=drawn, order=seed, directory=place)
            rows.append({"kind": kind, "level": level, "percent": at.levels[-1].percent, **found})
    return rows


def _fresh(make_model: Callable[[], nn.Module], seed: int) -> Weights:
    return weights_of(made_apart(make_model, seed, "fresh"))


def random_like(masks: Mapping[str, Tensor], seed: int) -> Masks:
    """As many weights of each matrix at random places. Such masks match LoRA by themselves with a larger step size
    ("Random Masking Finds Winning Tickets for Parameter Efficient Fine-tuning", ICML 2024)."""
    rng = generator(seed, "places")
    return {n: m.flatten()[torch.randperm(m.numel(), generator=rng)].view(m.shape) for n, m in masks.items()}


def _on_survivors(ticket: Ticket, change: Callable[[Tensor, Tensor], Tensor]) -> Start:
    start = dict(ticket.start)
    for name, mask in ticket.masks.items():
        layer = ticket.start[name]
        start[name] = layer.clone()
        start[name][mask] = change(layer[mask], layer)
    return start, ticket.masks, ticket.step
