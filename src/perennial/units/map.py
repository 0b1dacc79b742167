"""Which parameters belong to a hidden unit."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import Tensor, nn

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
    """Qualified name, as in ``model.named_parameters()`` (``model.named_buffers()`` for a running statistic)."""
    dim: int
    """The dimension along which units are laid out: 0 for rows (incoming), 1 for columns (outgoing)."""
    index: Tensor
    """int64 [units, entries]: the positions along ``dim`` of each unit. More than one entry a unit where a flatten
    stands between a convolution and a linear layer, or where attention heads share a value."""
    groups: int = 1
    """Of a grouped convolution that reads the units: its weight [out, in / groups, ...] has a column of every input
    channel in the rows of one group only. Position p along dimension 1 is then column p % (in / groups) in the rows of
    group p // (in / groups)."""

    one_to_one: bool = field(init=False)
    """Whether unit i is simply position i."""
    _copies: dict[Any, Tensor] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        size, entries = self.index.shape
        identity = entries == 1 and torch.equal(self.index[:, 0], torch.arange(size))
        object.__setattr__(self, "one_to_one", identity)

    def __reduce__(self) -> tuple[type[Slice], tuple[Any, ...]]:  # without the copies: they may lie on a device
        return Slice, (self.parameter, self.dim, self.index, self.groups)

    def on(self, device: torch.device) -> Tensor:
        """:attr:`index` on a device, copied there once."""
        return self._on(device, self.index, "index")

    def _on(self, device: torch.device, values: Tensor, name: Any) -> Tensor:
        if values.device == device:
            return values
        there = self._copies.get((name, device))
        if there is None:
            there = values.to(device)
            if type(there) is Tensor:  # what a trace has in place of a tensor is of that trace alone
                self._copies[name, device] = there
        return there

    def positions(self, units: Tensor) -> Tensor:
        """The positions along the dimension of some units, int64 [k] -> int64 [k x entries]."""
        return units if self.one_to_one else self.on(units.device)[units].reshape(-1)

    def length(self, parameter: Tensor) -> int:
        """How many positions the parameter has along the slice's dimension."""
        return parameter.shape[self.dim] * self.groups

    def owner(self, length: int) -> Tensor:
        """The unit at each position along the dimension, int64 [length]; the number of units where there is none."""
        if length not in self._copies:
            size, entries = self.index.shape
            owner = torch.full((length,), size, dtype=torch.int64)
            owner[self.index.reshape(-1)] = torch.arange(size).repeat_interleave(entries)
            self._copies[length] = owner
        return self._copies[length]

    def spread(self, values: Tensor, length: int) -> Tensor:
        """Per-unit ``values`` [units] laid out along the dimension [length]; positions of no unit get zero."""
        if self.one_to_one and length == self.index.shape[0]:
            return values
        owner = self._on(values.device, self.owner(length), length)
        return torch.cat([values, torch.zeros_like(values[:1])])[owner]

    def mask(self, units: Tensor, parameter: Tensor) -> Tensor:
        """Per-unit ``units`` [units] as a tensor that broadcasts against the parameter."""
        values = self.spread(units, self.length(parameter))
        if self.groups > 1:
            by_group: Tensor = values.unflatten(0, (self.groups, -1))
            rows = by_group.repeat_interleave(parameter.shape[0] // self.groups, 0)
            return rows[(...,) + (None,) * (parameter.dim() - 2)]
        return along(values, self.dim, parameter.dim())

    def gather(self, parameter: Tensor) -> Tensor:
        """The parameter as [units, everything that belongs to the unit]."""
        if self.groups > 1:  # [groups, rows, columns, ...] -> [groups x columns, rows, ...]
            moved: Tensor = parameter.unflatten(0, (self.groups, -1)).movedim(2, 1).flatten(0, 1)
        else:
            moved = parameter.movedim(self.dim, 0)
        if self.one_to_one and moved.shape[0] == self.index.shape[0]:
            return moved.flatten(1) if moved.dim() > 2 else moved
        return moved[self.on(parameter.device)].reshape(self.index.shape[0], -1)


@dataclass(frozen=True)
class UnitLayer:
    """A layer of hidden units that nothing but its outgoing slices reads."""

    name: str
    """The module that makes the units, e.g. ``"0"`` or ``"features.3"``; with the rows, as in ``"attention[64:96]"``,
    where the module makes others too."""
    size: int
    kind: str
    """``"linear"``, ``"conv"`` or ``"embedding"``: what makes the units."""
    incoming: tuple[Slice, ...]
    """Weight rows, bias, and whatever else is added to the unit: what makes it."""
    norms: tuple[Slice, ...]
    """Affine parameters and running statistics (buffers) of norms between the unit and its readers, and other factors
    of the unit alone."""
    outgoing: tuple[Slice, ...]
    """Weight columns of every reader."""
    tap: str
    """The weight of the reader whose input is the unit's activation, whatever functional form made it."""
    reader: str = "linear"
    """``"linear"`` or ``"conv"``: what the tap's weight belongs to."""
    coupled: bool = False
    """Whether the units lie on a residual stream: something that reads them writes to them again. They have many
    producers and many readers, which are changed together or not at all."""
    normed: bool = False
    """Whether a norm over units (LayerNorm, RMSNorm, GroupNorm) stands between them and a reader. Other units then feel
    a change of one through the norm's statistics, and through them alone."""

    def makers(self) -> tuple[str, ...]:
        """Its name, and the other modules that make its units."""
        modules = (p.parameter.rpartition(".")[0] or p.parameter for p in self.incoming)
        return tuple(dict.fromkeys([self.name, *(m for m in modules if m != self.name.partition("[")[0])]))

    def activation(self, tapped: Tensor) -> Tensor:
        """What the reader saw, as [samples, units] or [samples, units, positions...].

        ``tapped`` is the reader's input: [batch, ..., columns] for a linear reader, [batch, channels, ...] for a
        convolution.
        """
        columns = next(s for s in self.outgoing if s.parameter == self.tap)
        if self.reader == "conv":
            if columns.one_to_one and tapped.shape[1] == self.size:
                return tapped
            return tapped[:, columns.on(tapped.device)].movedim(2, -1)
        flat = tapped if tapped.dim() == 2 else tapped.reshape(-1, tapped.shape[-1])
        if columns.one_to_one and flat.shape[1] == self.size:
            return flat
        return flat[:, columns.on(flat.device)]


@dataclass(frozen=True, repr=False)
class UnitMap(Sequence[UnitLayer]):
    """The layers of hidden units of a network, and what could not be proved to be one.

    Printed, or shown in a notebook, it is a table.
    """

    layers: tuple[UnitLayer, ...]
    refused: tuple[tuple[str, str], ...] = ()
    """(module, reason) of every layer that is left alone."""
    initial: Mapping[str, Distribution] = field(default_factory=dict)
    """From which distribution each parameter was first drawn."""
    outputs: tuple[str, ...] = ()
    """The weights that make the network's outputs: its heads."""
    order: tuple[str, ...] = ()
    """Every parameter that the forward pass used, in the order in which it first did."""
    held: tuple[int, ...] = ()
    """Which of the forward pass's operations compute statistics of norms over units, by their number in it; the proof
    holds them fixed."""

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.layers[index]

    def __iter__(self) -> Iterator[UnitLayer]:
        return iter(self.layers)

    @classmethod
    def by_name(cls, model: nn.Module, layers: Sequence[Mapping[str, Sequence[str]]]) -> UnitMap:
        """A map made by hand, for a network that cannot be traced; :func:`perennial.units.prove` says if it holds.

        Example::

            UnitMap.by_name(model, [{"incoming": ["conv1"], "norms": ["bn1"], "outgoing": ["fc2"]}])

        Args:
            model: the network.
            layers: one entry a layer of units, with the names of the modules that make the units, of the norms between
                them and their readers, and of the modules that read them. Rows and columns are matched in order; a
                reader with a multiple of the columns reads each unit's positions one after another, as behind a
                flatten. Linear and convolutional modules; what they own beside a weight is a bias.

        Raises:
            ValueError: a module that is not there, or has no weight; sizes that do not fit.
        """
        made = tuple(_by_name(model, entry) for entry in layers)
        return cls(made, order=tuple(name for name, _ in model.named_parameters()))

    def _rows(self) -> list[tuple[str, str, str, str, str, str]]:
        rows = []
        for layer in self.layers:
            marks = [word for word, true in (("coupled", layer.coupled), ("normed", layer.normed)) if true]
            makes, norms, reads = (
                ", ".join(part.parameter for part in parts) for parts in (layer.incoming, layer.norms, layer.outgoing)
            )
            rows.append((layer.name, str(layer.size), " ".join([layer.kind, *marks]), makes, norms, reads))
        return rows

    def __str__(self) -> str:
        rows = [("layer", "units", "kind", "made by", "norms", "read by"), *self._rows()]
        widths = [min(40, max(len(row[i]) for row in rows)) for i in range(6)]
        lines = [
            "  ".join(_shortened(cell, n).ljust(n) for cell, n in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        return "\n".join([*lines, *(f"refused: {name}: {reason}" for name, reason in self.refused)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{cell}</th>" for cell in ("layer", "units", "kind", "made by", "norms", "read by"))
        body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in self._rows())
        items = "".join(f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in self.refused)
        refused = f"<p>Refused:</p><ul>{items}</ul>" if items else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{refused}"

    def interior(self) -> UnitMap:
        """The map without coupled layers, which are then among the refused."""
        coupled = tuple(
            (maker, "on a residual stream") for layer in self.layers if layer.coupled for maker in layer.makers()
        )
        kept = tuple(layer for layer in self.layers if not layer.coupled)
        return dataclasses.replace(self, layers=kept, refused=self.refused + coupled)

    def matrices(self, params: Mapping[str, Tensor]) -> tuple[str, ...]:
        """The weights of linear and convolutional layers, in the order in which the forward pass uses them.

        Every parameter of two or more dimensions that a traced network uses; of a map made by hand, in the order of
        ``params``.
        """
        return tuple(name for name in (self.order or params) if name in params and params[name].dim() > 1)

    def hidden_matrices(self, params: Mapping[str, Tensor]) -> tuple[str, ...]:
        """:meth:`matrices` without those that make the network's outputs (without the last, if that is not known)."""
        found = self.matrices(params)
        outputs = self.outputs or found[-1:]
        return tuple(name for name in found if name not in outputs)

    def touched(self, replaced: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, dict[int, Tensor]]:
        """Where the parameters of replaced units lie.

        ``replaced`` maps layer names to bool [units]; the answer maps parameter names to {dimension: bool [its
        length]}: an element is fresh if any of its coordinates is marked. This is what an optimizer rule needs to give
        fresh weights a fresh state. Buffers, which no rule changes, are left out.

        A grouped convolution that reads the units has no such dimension: {-1: bool that broadcasts against it}.
        """
        marks: dict[str, dict[int, Tensor]] = {}
        for layer in self.layers:
            if layer.name not in replaced:
                continue
            for part in (*layer.incoming, *layer.norms, *layer.outgoing):
                if part.parameter not in shapes:
                    continue
                shape = shapes[part.parameter]
                if part.groups > 1:
                    dim, mark = -1, part.mask(replaced[layer.name], torch.empty(shape, device="meta"))
                else:
                    dim, mark = part.dim, part.spread(replaced[layer.name], shape[part.dim])
                dims = marks.setdefault(part.parameter, {})
                dims[dim] = dims[dim] | mark if dim in dims else mark
        return marks

    def renewed(self, touched: Mapping[str, Mapping[int, Tensor]]) -> dict[str, dict[int, Tensor]]:
        """The units whose incoming weights are all marked, as marks by layer: {layer: {0: bool [units]}}.

        ``touched`` is as :meth:`touched` gives it, or marks whole parameters.
        """
        found = {}
        for layer in self.layers:
            part = layer.incoming[0]
            rows = touched.get(part.parameter, {}).get(part.dim)
            if rows is not None:
                found[layer.name] = {0: rows[part.index.to(rows.device)].all(1)}
        return found


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _by_name(model: nn.Module, entry: Mapping[str, Sequence[str]]) -> UnitLayer:
    unknown = set(entry) - {"incoming", "norms", "outgoing"}
    if unknown:
        raise ValueError(f"a layer has incoming, norms and outgoing; {', '.join(sorted(unknown))} is none of these")
    modules, tensors = dict(model.named_modules()), dict(model.named_parameters()) | dict(model.named_buffers())

    def owned(name: str) -> dict[str, Tensor]:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, 1)
            raise ValueError(f"the model has no module {name!r}" + (f"; there is {near[0]!r}" if near else ""))
        return {key: tensors[key] for key in (f"{name}.{part}" for part in _PARTS) if key in tensors}

    makers, norms, readers = (list(entry.get(key, ())) for key in ("incoming", "norms", "outgoing"))
    if not makers or not readers:
        raise ValueError("a layer of units needs at least one module that makes them and one that reads them")
    for name in (*makers, *readers):
        if f"{name}.weight" not in owned(name):
            raise ValueError(f"{name} has no weight of its own: it makes and reads no units")
    transposed = {name: type(modules[name]).__name__.startswith("ConvTranspose") for name in (*makers, *readers)}
    first = tensors[f"{makers[0]}.weight"]
    size = first.shape[1 if transposed[makers[0]] else 0]
    rows = torch.arange(size)[:, None]
    incoming, around, outgoing = [], [], []
    for name in makers:
        for key, tensor in owned(name).items():
            dim = 1 if transposed[name] and tensor.dim() > 1 else 0
            if tensor.shape[dim] != size:
                raise ValueError(f"{key} makes {tensor.shape[dim]} units and {makers[0]} makes {size}")
            incoming.append(Slice(key, dim, rows))
    for name in norms:
        for key, tensor in owned(name).items():
            if tensor.shape[0] % size:
                raise ValueError(f"{key} has {tensor.shape[0]} entries, which is no multiple of the {size} units")
            around.append(Slice(key, 0, torch.arange(tensor.shape[0]).reshape(size, -1)))
    for name in readers:
        weight = tensors[f"{name}.weight"]
        groups = int(getattr(modules[name], "groups", 1))
        dim = 0 if transposed[name] else 1
        columns = weight.shape[dim] * groups
        if columns % size:
            raise ValueError(f"{name} reads {columns} columns, which is no multiple of the {size} units of {makers[0]}")
        outgoing.append(Slice(f"{name}.weight", dim, torch.arange(columns).reshape(size, -1), groups))
    reader = "conv" if tensors[outgoing[0].parameter].dim() > 2 else "linear"
    kind = "conv" if first.dim() > 2 else "linear"
    return UnitLayer(
        makers[0], size, kind, tuple(incoming), tuple(around), tuple(outgoing), outgoing[0].parameter, reader
    )


_PARTS = ("weight", "bias", "running_mean", "running_var")
