"""Which parameters belong to a hidden unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from perennial.units.draw import Distribution


def along(values: Tensor, dim: int, dims: int) -> Tensor:
    """A vector laid along one of ``dims`` dimensions, the others of length 1.

    By ``unsqueeze``, never ``reshape``: a compiler must give what is reshaped a plain layout, and loses its own choice.
    """
    for _ in range(dim):
        values = values.unsqueeze(0)
    for _ in range(dims - dim - 1):
        values = values.unsqueeze(-1)
    return values


def bias_beside(weight: str) -> str:
    """The name that the bias of a weight has: "0.weight" -> "0.bias", "in_proj_weight" -> "in_proj_bias"."""
    return weight.removesuffix("weight") + "bias"


def weight_beside(bias: str) -> str:
    """The name that the weight of a bias has: "0.bias" -> "0.weight"."""
    return bias.removesuffix("bias") + "weight"


def fan_in(weight: Tensor) -> int:
    """How many numbers one output of a linear or convolutional layer reads: what a row of [out, in, ...] holds."""
    return weight[0].numel()


@dataclass(frozen=True)
class Slice:
    """The entries of one parameter that belong to each unit of a layer, along one dimension."""

    parameter: str
    """Qualified name, as in ``model.named_parameters()``."""
    dim: int
    """The dimension along which units are laid out: 0 for rows (incoming), 1 for columns (outgoing)."""
    index: Tensor
    """int64 [units, entries]: the positions along ``dim`` of each unit. More than one entry a unit where a flatten
    stands between a convolution and a linear layer."""

    one_to_one: bool = field(init=False)
    """Whether unit i is simply position i."""
    _owner: dict[int, Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        size, entries = self.index.shape
        identity = entries == 1 and torch.equal(self.index[:, 0], torch.arange(size))
        object.__setattr__(self, "one_to_one", identity)

    def owner(self, length: int) -> Tensor:
        """The unit at each position along the dimension, int64 [length]; the number of units where there is none."""
        if length not in self._owner:
            size, entries = self.index.shape
            owner = torch.full((length,), size, dtype=torch.int64)
            owner[self.index.reshape(-1)] = torch.arange(size).repeat_interleave(entries)
            self._owner[length] = owner
        return self._owner[length]

    def spread(self, values: Tensor, length: int) -> Tensor:
        """Per-unit ``values`` [units] laid out along the dimension [length]; positions of no unit get zero."""
        if self.one_to_one and length == self.index.shape[0]:
            return values
        return torch.cat([values, torch.zeros_like(values[:1])])[self.owner(length).to(values.device)]

    def mask(self, units: Tensor, parameter: Tensor) -> Tensor:
        """Per-unit ``units`` [units] as a tensor that broadcasts against the parameter."""
        return along(self.spread(units, parameter.shape[self.dim]), self.dim, parameter.dim())

    def gather(self, parameter: Tensor) -> Tensor:
        """The parameter as [units, everything that belongs to the unit]."""
        moved = parameter.movedim(self.dim, 0)
        if self.one_to_one and moved.shape[0] == self.index.shape[0]:
            return moved.flatten(1) if moved.dim() > 2 else moved
        return moved[self.index.to(parameter.device)].reshape(self.index.shape[0], -1)


@dataclass(frozen=True)
class UnitLayer:
    """A layer of hidden units that nothing but its outgoing slices reads."""

    name: str
    """The module that makes the units, e.g. ``"0"`` or ``"features.3"``."""
    size: int
    kind: str
    """``"linear"`` or ``"conv"``: what makes the units."""
    incoming: tuple[Slice, ...]
    """Weight rows and bias: what makes the unit."""
    norms: tuple[Slice, ...]
    """Affine parameters of norms between the unit and its readers."""
    outgoing: tuple[Slice, ...]
    """Weight columns of every reader."""
    tap: str
    """The weight of the reader whose input is the unit's activation, whatever functional form made it."""
    reader: str = "linear"
    """``"linear"`` or ``"conv"``: what the tap's weight belongs to."""

    def activation(self, tapped: Tensor) -> Tensor:
        """What the reader saw, as [samples, units]; positions of one unit become samples of it.

        ``tapped`` is the reader's input: [batch, ..., columns] for a linear reader, [batch, channels, ...] for a
        convolution.
        """
        columns = next(s for s in self.outgoing if s.parameter == self.tap)
        channels_last = tapped if self.reader == "linear" else tapped.movedim(1, -1)
        flat = channels_last.flatten(0, -2) if channels_last.dim() > 2 else channels_last
        if columns.one_to_one and flat.shape[1] == self.size:
            return flat
        return flat[:, columns.index.to(flat.device)].movedim(2, 1).reshape(-1, self.size)


@dataclass(frozen=True)
class UnitMap(Sequence[UnitLayer]):
    """The layers of hidden units of a network, and what could not be proved to be one."""

    layers: tuple[UnitLayer, ...]
    refused: tuple[tuple[str, str], ...] = ()
    """(module, reason) of every layer that is left alone."""
    initial: Mapping[str, Distribution] = field(default_factory=dict)
    """From which distribution each parameter was first drawn."""

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.layers[index]

    def __iter__(self) -> Iterator[UnitLayer]:
        return iter(self.layers)

    def touched(self, replaced: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, dict[int, Tensor]]:
        """Where the parameters of replaced units lie.

        ``replaced`` maps layer names to bool [units]; the answer maps parameter names to {dimension: bool [its
        length]}: an element is fresh if any of its coordinates is marked. This is what an optimizer rule needs to give
        fresh weights a fresh state.
        """
        marks: dict[str, dict[int, Tensor]] = {}
        for layer in self.layers:
            if layer.name not in replaced:
                continue
            for part in (*layer.incoming, *layer.norms, *layer.outgoing):
                mark = part.spread(replaced[layer.name], shapes[part.parameter][part.dim])
                dims = marks.setdefault(part.parameter, {})
                dims[part.dim] = dims[part.dim] | mark if part.dim in dims else mark
        return marks
