"""From what a forward pass has shown to layers of units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perennial.units.draw import Distribution
from perennial.units.map import Slice, UnitLayer, UnitMap
from perennial.units.record import Producer, Reader, Record

_MAKES = ("linear", "conv", "embedding", "parameter")


class _Part(NamedTuple):
    """A producer or a reader with the unit, by its component's label, of each of its positions."""

    where: Producer | Reader
    roots: Tensor


def assemble(model: nn.Module, record: Record, initial: Mapping[str, Distribution]) -> UnitMap:
    """The unit map of a record. Components of joined units with the same producers and readers form a layer."""
    labels = record.labels()
    producers = [_Part(p, labels[p.numbers]) for p in record.producers]
    readers = [_Part(r, labels[r.columns]) for r in record.readers]
    outputs = set(torch.cat(record.outputs).unique().tolist()) if record.outputs else set()
    outputs = {int(labels[unit]) for unit in outputs}
    reasons = _reasons(model, record, labels)
    normed = {int(labels[u]) for units in record.normed for u in units.tolist()}

    groups: dict[tuple[Any, ...], list[int]] = {}
    for root, signature in _signatures(producers, readers).items():
        groups.setdefault(
            (*signature, root in outputs, tuple(sorted(reasons.get(root, ()))), root in normed), []
        ).append(root)
    names: set[str] = set()
    layers: list[UnitLayer] = []
    refused: list[tuple[str, str]] = []
    heads: dict[str, None] = {}
    for (made, read, is_output, why, is_normed), roots in groups.items():
        mine = [producers[p] for p, _ in made]
        makers = [p.where for p in mine if p.where.kind in _MAKES]
        if not makers:
            continue  # a lone bias or norm of what is not a unit
        name = _name(mine, roots, names)
        theirs = [readers[r] for r, _ in read]
        problems = [*why, *_problems(record, [p.where.parameter for p in mine + theirs])]
        if is_output and not read:
            heads |= dict.fromkeys(maker.parameter for maker in makers)
            continue
        if is_output:
            problems.append("also an output of the model")
        if not read and not problems:
            problems.append("read by no layer")
        for part, (_, count) in zip(mine, made, strict=True):
            if part.where.kind in _MAKES and (1 < count == part.roots.numel() or 8 < count > part.roots.numel() / 2):
                problems.append("its units are mixed with each other and cannot be told apart")
        if problems:
            # Whatever else makes these units is left alone with them.
            others = (p.where.parameter.rpartition(".")[0] or p.where.parameter for p in mine if p.where.kind != "norm")
            every = dict.fromkeys([name, *(o for o in others if o != name.partition("[")[0])])
            refused += [(each, "; ".join(dict.fromkeys(problems))) for each in every]
        else:
            layers.append(_layer(name, roots, mine, theirs, is_normed))
        names.add(name)
    order = tuple(record.uses)
    refused += _unaccounted(model, record, layers, refused, heads)
    return UnitMap(tuple(layers), tuple(refused), dict(initial), tuple(heads), order, tuple(sorted(set(record.held))))


def _signatures(producers: Sequence[_Part], readers: Sequence[_Part]) -> dict[int, tuple[Any, Any]]:
    """For every component: which producers make it and which readers read it, each with the number of positions."""
    made: dict[int, list[tuple[int, int]]] = {}
    read: dict[int, list[tuple[int, int]]] = {}
    for table, parts in ((made, producers), (read, readers)):
        for number, part in enumerate(parts):
            roots, counts = part.roots[part.roots > 0].unique(return_counts=True)
            for root, count in zip(roots.tolist(), counts.tolist(), strict=True):
                table.setdefault(root, []).append((number, count))
    return {root: (tuple(places), tuple(read.get(root, ()))) for root, places in sorted(made.items())}


def _reasons(model: nn.Module, record: Record, labels: Tensor) -> dict[int, set[str]]:
    """Why components cannot be kept."""
    found: dict[int, set[str]] = {}
    for units, reason in record.ended:
        for root in labels[units].unique().tolist():
            found.setdefault(root, set()).add(reason)
    return found


def _problems(record: Record, parameters: Sequence[str]) -> list[str]:
    """What speaks against the parameters of a layer."""
    found = []
    for name in dict.fromkeys(parameters):
        if name in record.spoiled:
            found.append(record.spoiled[name])
        uses = record.uses.get(name, [])
        if len(uses) > 1:
            kinds = list(dict.fromkeys(uses))
            tied = f" (tied weights: by {' and '.join(kinds)})" if len(kinds) > 1 else ""
            found.append(f"{name} is used more than once{tied}")
    return found


def _name(parts: Sequence[_Part], roots: Sequence[int], taken: set[str]) -> str:
    first = next(p for p in parts if p.where.kind in _MAKES)
    parameter = first.where.parameter
    module = parameter if first.where.kind == "parameter" else parameter.rpartition(".")[0] or parameter
    mine = torch.isin(first.roots, torch.tensor(roots)).nonzero()[:, 0]
    low, high = int(mine[0]), int(mine[-1]) + 1
    name = module if len(mine) == len(first.roots) else f"{module}[{low}:{high}]"
    if len(mine) not in (len(first.roots), high - low):
        name = f"{module}[{low}:{high}:{(high - 1 - low) // max(1, len(mine) - 1)}]"
    number = 2
    while name in taken:
        name, number = f"{name.split(' #')[0]} #{number}", number + 1
    return name


def _layer(
    name: str, roots: Sequence[int], producers: Sequence[_Part], readers: Sequence[_Part], normed: bool
) -> UnitLayer:
    first = next(p for p in producers if p.where.kind in _MAKES)
    kept = set(roots)
    order = list(dict.fromkeys(root for root in first.roots.tolist() if root in kept))
    rank = {root: place for place, root in enumerate(order)}

    def positions(part: _Part) -> Tensor:
        lists: list[list[int]] = [[] for _ in order]
        for position, root in enumerate(part.roots.tolist()):
            if root in rank:
                lists[rank[root]].append(position)
        return torch.tensor(lists, dtype=torch.int64).reshape(len(order), -1)

    incoming: list[Slice] = []
    norms: list[Slice] = []
    outgoing: list[Slice] = []
    for part in producers:
        target = norms if part.where.kind == "norm" else incoming
        target.append(Slice(part.where.parameter, part.where.dim, positions(part)))
    for part in readers:
        groups = getattr(part.where, "groups", 1)
        outgoing.append(Slice(part.where.parameter, part.where.dim, positions(part), groups))
    weights_first = sorted(incoming, key=lambda s: s.parameter != first.where.parameter)
    seen = next((r for r in readers if r.where.kind in ("linear", "conv")), readers[0])
    last_made = max(p.where.when for p in producers if p.where.kind in _MAKES)
    return UnitLayer(
        name,
        len(order),
        "linear" if first.where.kind == "parameter" else first.where.kind,
        tuple(weights_first),
        tuple(norms),
        tuple(outgoing),
        seen.where.parameter,
        "conv" if seen.where.kind == "conv" else "linear",
        coupled=last_made > min(r.where.when for r in readers),
        normed=normed,
    )


def _unaccounted(
    model: nn.Module,
    record: Record,
    layers: Sequence[UnitLayer],
    refused: Sequence[tuple[str, str]],
    heads: Mapping[str, None],
) -> list[tuple[str, str]]:
    """Weights that no layer, no head and no refusal speaks of: nothing is left out without a word."""
    spoken = {part.parameter for layer in layers for part in (*layer.incoming, *layer.norms, *layer.outgoing)}
    told = {name.partition("[")[0].split(" #")[0] for name, _ in refused}
    produced = {p.parameter for p in record.producers if p.kind in _MAKES}
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0] or name
        if parameter.dim() < 2 or name in spoken or name in heads or module in told or name in told:
            continue
        if name in record.spoiled:
            found.setdefault(module, record.spoiled[name])
        elif name not in record.uses:
            found.setdefault(module, "not used in the forward pass on this example")
        elif name not in produced:
            found.setdefault(module, f"{name} is used by {record.uses[name][0]}, which is not known to make units")
    return list(found.items())
