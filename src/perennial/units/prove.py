"""The proof of a unit map: done on the model, not read off it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perennial.units.map import Slice, UnitLayer, UnitMap
from perennial.units.record import Counter
from perennial.units.trace import copied, leaves, repeats, undisturbed


class Proof(NamedTuple):
    """What the proof found of one layer."""

    layer: str
    """The layer's name."""
    proved: bool
    note: str
    """What went wrong; of a proved layer, under which condition it holds. Often empty."""


SILENT = "its units have no effect on the output for this example"
"""The note of a layer whose wiring nothing contradicts, but of which nothing was seen either: its units are dead, or
nothing of what reads them reaches the output."""

RANDOM = (
    "the model's output is random in a way that cannot be repeated; attach with model.eval(), and call model.train() "
    "afterwards"
)
"""The note of a layer that cannot be proved where a generator of the model's own makes every forward pass another."""

_HELD = "with the statistics of the norms over units held fixed"


def prove(
    model: nn.Module, unit_map: UnitMap, *args: Any, seed: int = 0, every_pair: bool = True, **kwargs: Any
) -> list[Proof]:
    """Whether nothing but its outgoing slices reads a unit, layer by layer.

    In every layer the outgoing slices of half of the units are set to zero. Then their incoming slices and norms may be
    changed at will: the output must not change by a bit. The same for the other half. With the outgoing slices back in
    place the change of one half or the other must show; of a layer where neither does (all of its units are dead, or
    what reads them goes nowhere) nothing is proved, and the note says that they have no effect. A unit whose columns
    were taken for another's fails if the two are in different halves; so with ``every_pair`` the units are halved again
    and again, by the digits of their numbers in a random order, until every two of them have been apart both ways.

    Where a norm over units (LayerNorm, RMSNorm, GroupNorm) stands between the units and their readers, units feel each
    other through its statistics. These are held fixed in all runs, and the note says so.

    The model is left as it was, to the bit; its parameters change while this runs. It costs one forward pass, and four
    more for each halving of a layer: about 36 for a layer of 512 units, 4 without ``every_pair``.

    Args:
        model: the model of the map.
        unit_map: traced, or made by hand.
        *args: an example input, as the model takes it; keywords too.
        seed: of the halves and of the changes.
        every_pair: halve until every two units have been apart; False: once, which finds a reader that is missing but
            may miss two units that were exchanged.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    held = _Held(unit_map.held)

    def run() -> list[Tensor]:
        mine, named = copied((args, kwargs))
        with undisturbed(model), held.again():
            return leaves(model(*mine, **named))

    run()  # records the statistics
    held.recording = False
    base = run()
    found = []
    for layer in unit_map:
        problem = _missing(layer, tensors)
        if not problem:
            felt = False
            for half in _halves(layer.size, generator, every_pair):
                problem, felt = _try(layer, half, tensors, run, base, generator, felt)
                if problem:
                    break
            problem = problem or ("" if felt else SILENT)
        found.append(Proof(layer.name, not problem, problem or (_HELD if layer.normed else "")))
    contradicted = [proof for proof in found if not proof.proved and proof.note != SILENT]
    if contradicted and not repeats(model, *args, **kwargs):
        return [proof._replace(note=RANDOM) if proof in contradicted else proof for proof in found]
    return found


def _halves(size: int, generator: torch.Generator, every_pair: bool) -> list[Tensor]:
    """Units as 0/1 masks [size], each half followed by the other one; of a single unit that one alone."""
    if size == 1:
        return [torch.ones(1)]
    order = torch.randperm(size, generator=generator)
    digits = (size - 1).bit_length() if every_pair else 1
    halves = [((order >> digit) & 1).float() for digit in range(digits)]
    return [half for first in halves for half in (first, 1 - first)]


def _missing(layer: UnitLayer, tensors: dict[str, Tensor]) -> str:
    for part in (*layer.incoming, *layer.norms, *layer.outgoing):
        if part.parameter not in tensors:
            return f"the model has no parameter {part.parameter}"
    return "" if layer.outgoing else "it has no outgoing slices"


def _try(
    layer: UnitLayer,
    half: Tensor,
    tensors: dict[str, Tensor],
    run: Callable[[], list[Tensor]],
    base: list[Tensor],
    generator: torch.Generator,
    felt: bool,
) -> tuple[str, bool]:
    """What contradicts the layer, and whether the output feels its units; not looked at again where it is known to."""
    makes, reads = (*layer.incoming, *layer.norms), layer.outgoing
    with _kept([tensors[part.parameter] for part in (*makes, *reads)]) as restore:
        _cut(reads, half, tensors)
        before = run()
        _disturb(makes, half, tensors, generator)
        after = run()
        if not _same(before, after):
            return "something besides its outgoing slices reads its units, or they are another unit's", True
        if felt:
            return "", True
        restore([tensors[part.parameter] for part in reads])
        if not _same(base, run()):
            return "", True
    # Nothing came through. Weights that start at zero (a gate of a residual branch, the second half of LoRA) hide it.
    with _kept([t for t in tensors.values() if t.is_floating_point()]):
        with torch.no_grad():
            for tensor in tensors.values():
                if tensor.is_floating_point() and not bool(tensor.any()):
                    tensor.data.copy_(0.05 + 0.1 * torch.rand(tensor.shape, generator=generator))
        open_ = run()
        _disturb(makes, half, tensors, generator)
        return "", not _same(open_, run())


def _cut(parts: Sequence[Slice], half: Tensor, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for part in parts:
            w = tensors[part.parameter].data
            w.masked_fill_(part.mask(half.to(w.device), w) > 0, 0.0)


def _disturb(parts: Sequence[Slice], half: Tensor, tensors: dict[str, Tensor], generator: torch.Generator) -> None:
    """Add positive numbers of about the parameter's own size, so that some rectifiers open and no exponential flows
    over."""
    with torch.no_grad():
        for part in parts:
            w = tensors[part.parameter].data
            size = 2 * w.abs().mean(dtype=torch.float32).clamp(min=0.02).cpu()
            change = size * (0.5 + torch.rand(w.shape, generator=generator))
            w.add_((change.to(w.device) * part.mask(half.to(w.device), w)).to(w.dtype))


@contextlib.contextmanager
def _kept(tensors: list[Tensor]) -> Iterator[Callable[[list[Tensor]], None]]:
    """Put the tensors back when done; the function given puts some of them back earlier."""
    saved = {id(t): (t, t.detach().clone()) for t in tensors}

    def restore(some: list[Tensor]) -> None:
        for tensor in some:
            tensor.data.copy_(saved[id(tensor)][1])

    try:
        yield restore
    finally:
        restore([tensor for tensor, _ in saved.values()])


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) and not bool(torch.isnan(a).any()) for a, b in zip(left, right, strict=True))


class _Held(Counter):
    """Runs a forward pass in which the statistics of chosen norms are those of the first run."""

    def __init__(self, calls: Sequence[int]) -> None:
        super().__init__()
        self.calls = frozenset(calls)
        self.recording = True
        self.kept: dict[int, Any] = {}

    def again(self) -> _Held:
        """Count operations from the start."""
        self.number = -1
        return self

    def operate(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.number not in self.calls:
            return func(*args, **kwargs)
        if name in ("layer_norm", "rms_norm", "group_norm"):
            order = ("input", "shape", "weight", *(() if name == "rms_norm" else ("bias",)), "eps")
            names = {"normalized_shape": "shape", "num_groups": "shape"}
            given = dict(zip(order, args, strict=False)) | {names.get(key, key): value for key, value in kwargs.items()}
            return self.norm(name, **given)
        if self.recording:
            self.kept[self.number] = func(*args, **kwargs)
        return self.kept[self.number]

    def norm(
        self, name: str, input: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: Any = None
    ) -> Tensor:
        """The norm written out, so that its statistics can be held. ``shape`` is the number of groups of group_norm."""
        x = input.unflatten(1, (shape, -1)) if name == "group_norm" else input
        dims = tuple(range(2, x.dim())) if name == "group_norm" else tuple(range(-len(shape), 0))
        eps = eps if eps is not None else torch.finfo(x.dtype).eps if name == "rms_norm" else 1e-5
        if self.recording:
            mean = x.mean(dims, keepdim=True) if name != "rms_norm" else torch.zeros((), dtype=x.dtype, device=x.device)
            self.kept[self.number] = mean, ((x - mean) ** 2).mean(dims, keepdim=True)
        mean, square = self.kept[self.number]
        out: Tensor = (x - mean) * torch.rsqrt(square + eps)
        if name == "group_norm":
            out = out.flatten(1, 2)
            affine = (1, -1) + (1,) * (out.dim() - 2)
            weight, bias = (None if part is None else part.reshape(affine) for part in (weight, bias))
        out = out if weight is None else out * weight
        return out if bias is None else out + bias
