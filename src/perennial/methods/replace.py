"""The act that methods which replace hidden units share: give a unit fresh weights, and its readers nothing to hear.

Which units are replaced is the business of each method; :func:`replace_units` then does the same for all of them, in a
population (whole new tensors, masks, no Python control flow on values) and on a user's own model (rows and columns
written into the live tensors). Both give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from perennial.methods.base import Context, Intervention, Tensors, choice, whole
from perennial.noise import elements
from perennial.units import Distribution, Slice, UnitLayer, UnitMap, along, bias_beside

_NEUTRAL = {
    "weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0, "output_error": 0.0, "mean_error": 0.0
}  # fmt: skip
"""What the parameters, statistics and accumulators of a norm start from, by the last part of their name."""


class Chosen(NamedTuple):
    """Which units of a layer are replaced in a step."""

    mark: Tensor
    """[units]: 1 where the unit is replaced, else 0. Numbers, because compiled loops read floats at once and booleans
    one by one."""
    units: Tensor | None = None
    """int64 [k]: numbers of units among which all replaced ones are, for a method that replaces few at a time; None:
    any of them may be replaced."""


@dataclass(frozen=True, kw_only=True)
class ReplacesUnits(Intervention):
    """Base of the methods that replace hidden units: what a fresh unit starts from, and who makes up for the old one.

    Norms between a replaced unit and its readers (scale, offset, running statistics) go back to where they started; the
    unit's outgoing weights become zero, so that the network's output loses the old unit and nothing else.
    """

    reinitialise: str = choice("resample", "resample", "rewind", "orthogonal", "split")
    """Where a replaced unit's incoming weights come from:

    - "resample": drawn anew from the distribution that they were first drawn from;
    - "rewind": the values that they had at step ``rewind_to``;
    - "orthogonal": a random row orthogonal to those of the layer's other units, as long as theirs are on average (a row
      without constraint where they span everything); biases are resampled;
    - "split": those of the layer's most useful unit, norms included; it and its r copies each keep 1 / (1 + r) of its
      outgoing weights, so that the output loses the old units and nothing else. Copies differ in their optimizer's
      state alone: with plain SGD, and nothing else that tells them apart, they stay copies.
    """
    rewind_to: int = whole(0)
    """The step whose weights "rewind" goes back to, in optimizer steps made: 0 for those at the start, which also serve
    until that step is reached."""
    bias_transfer: bool = False
    """Add a replaced unit's mean contribution to the biases of its readers, so that their mean input stays. Exact but
    for what a reader does not see everywhere alike: a convolution that pads sees less of the unit at the border."""

    def check(self, params: Tensors, units: UnitMap) -> None:
        """Refuse a network on which these settings cannot be carried out.

        Raises:
            ValueError: no hidden units, weights of unknown distribution that would be drawn, no bias to transfer to, or
                a unit that cannot be split. Says which, and what to do.
        """
        if not len(units):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in units.refused) or "it has no hidden layer"
            raise ValueError(f"{self.name} found no hidden units to keep in this network ({reasons})")
        for layer in units:
            for part in layer.incoming:
                drawn = self.reinitialise in ("resample", "split") or (
                    self.reinitialise == "orthogonal" and params[part.parameter].dim() < 2
                )
                if drawn and part.parameter not in units.initial:
                    raise ValueError(
                        f"{self.name} cannot redraw {part.parameter}: how it was first drawn is not known. Fill it "
                        "with torch.nn.init's uniform, normal, kaiming, xavier, orthogonal or constant functions in "
                        'the factory, or set reinitialise="rewind"'
                    )
            for part in layer.norms:
                _neutral(part, units)
            for part in layer.outgoing:
                if self.bias_transfer:
                    _check_bias(part, params)
                if self.reinitialise == "split" and part.groups > 1:
                    raise ValueError(
                        f'reinitialise="split" cannot split the units of {layer.name}: {part.parameter}, a convolution '
                        f"in {part.groups} groups, reads each of them in other rows. Choose another"
                    )

    @staticmethod
    def zeros(params: Tensors, units: UnitMap) -> dict[str, Tensor]:
        """A zero for every unit, [units] by layer name, where its weights are; at least float32, because an average in
        fewer bits stands still."""
        found = {}
        for layer in units:
            like = params[layer.incoming[0].parameter]
            found[layer.name] = like.new_zeros(layer.size, dtype=torch.promote_types(like.dtype, torch.float32))
        return found

    def start(self, params: Tensors, units: UnitMap) -> dict[str, Tensor]:
        """What "rewind" goes back to at first: the incoming weights as they are now, by name; empty for the others."""
        if self.reinitialise != "rewind":
            return {}
        names = dict.fromkeys(part.parameter for layer in units for part in layer.incoming)
        return {name: params[name].detach().clone() for name in names}

    def keep(self, params: Tensors, kept: dict[str, Tensor], context: Context) -> dict[str, Tensor]:
        """What "rewind" goes back to after this step, from the parameters as the optimizer has left them."""
        if self.rewind_to == 0 or not kept:
            return kept
        now = context.noise.step + 1 == self.rewind_to
        if context.in_place and on_host(now):  # no copy of the weights at all other steps
            return {name: params[name].detach().clone() for name in kept} if bool(now) else kept
        return {name: torch.where(now, params[name].detach(), old) for name, old in kept.items()}


def on_host(tensor: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return tensor.device.type == "cpu"


def working_copy(params: Tensors, context: Context) -> dict[str, Tensor]:
    """Parameters and buffers in one dict, for :func:`replace_units` to exchange entries in."""
    return {**params, **context.buffers}


def changes(current: Tensors, params: Tensors, context: Context) -> dict[str, Tensor]:
    """The entries of a working copy that were exchanged since."""
    return {
        name: w for name, w in current.items() if w is not (params[name] if name in params else context.buffers[name])
    }


def replace_units(
    layer: UnitLayer,
    params: dict[str, Tensor],
    chosen: Chosen,
    context: Context,
    *,
    reinitialise: str = "resample",
    mean: Tensor | None = None,
    useful: Tensor | None = None,
    kept: Tensors | None = None,
) -> None:
    """Replace units of a layer.

    Where ``context.in_place`` is false, entries of ``params`` are exchanged for new tensors. Where it is true they are
    written into: only rows and columns of replaced units, in shapes that depend on no value, so that a GPU is not
    waited for ("orthogonal" does wait, to find out whether its decomposition is needed).

    Args:
        layer: whose units.
        params: parameters and buffers by name.
        chosen: which of them.
        context: this step's noise and unit map.
        reinitialise: see :class:`ReplacesUnits`.
        mean: [units], mean activations to transfer to the readers' biases; None: no transfer.
        useful: [units], for "split": how useful each unit is, minus infinity for one that is not to be split.
        kept: for "rewind": incoming weights to go back to, by name.
    """
    act = _Act(params, chosen, context)
    if act.idle(reinitialise):
        return
    if mean is not None:
        _transfer_bias(layer, params, torch.where(chosen.mark > 0, mean, 0.0), context)
    if reinitialise == "split":
        assert useful is not None, "split needs to know how useful the units are"
        _split(layer, act, useful)
        return
    for part in layer.outgoing:
        act.put(part, _zero(params[part.parameter]))
    for part in layer.norms:
        act.put(part, act.drawn(part, _neutral(part, context.units)))
    for part in layer.incoming:
        w = params[part.parameter]
        if reinitialise == "rewind":
            assert kept is not None, "rewind needs the weights to go back to"
            act.put(part, _taken(kept[part.parameter], part.dim))
        elif reinitialise == "orthogonal" and w.dim() > 1:
            act.put(part, _taken(_orthogonal(part, w, chosen.mark, context), part.dim))
        else:
            source = context.units.initial[part.parameter]
            # Drawing a number costs more than storing it, so few units are drawn one by one.
            by_unit = source.kind != "constant" and w.dim() > 1
            act.put(part, act.drawn(part, source), by_unit=by_unit)


Fresh = Callable[[Tensor | None], Tensor]
"""Values of a parameter at positions along the slice's dimension (int64 [n]; None: at all of them), or one for all."""


class _Act:
    """Puts fresh values where the weights of replaced units lie."""

    def __init__(self, params: dict[str, Tensor], chosen: Chosen, context: Context) -> None:
        self.params, self.context, self.mark, self.index = params, context, chosen.mark, chosen.units
        self.units = torch.arange(self.mark.shape[0], device=self.mark.device)
        self.hit: Tensor | None = None
        """bool [k]: which of ``index`` are replaced; None: all."""

    def idle(self, reinitialise: str) -> bool:
        """In place: get ready to write, and say whether there is nothing to be written."""
        if not self.context.in_place:
            return False
        if on_host(self.mark) or reinitialise == "orthogonal":
            self.index = self.mark.nonzero()[:, 0]
            return not len(self.index)
        self.index = self.units if self.index is None else self.index
        self.hit = self.mark[self.index] > 0
        return False

    def put(self, part: Slice, fresh: Fresh, *, by_unit: bool = False) -> None:
        """Exchange the values of replaced units for fresh ones.

        Outside in-place mode ``by_unit`` asks for the values of one unit at a time, where few are replaced.
        """
        w = self.params[part.parameter]
        if self.context.in_place:
            self._write(part, w, fresh)
            return
        if by_unit and self.index is not None and part.index.shape[1] == 1:
            for unit in self.index.unbind(0):
                mine = (self.units == unit).to(self.mark.dtype) * self.mark
                values = fresh(part.positions(unit.unsqueeze(0)))
                w = torch.where(part.mask(mine, w) > 0, values, w)
        else:
            w = torch.where(part.mask(self.mark, w) > 0, fresh(None), w)
        self.params[part.parameter] = w

    def _write(self, part: Slice, w: Tensor, fresh: Fresh) -> None:
        if part.groups > 1:
            w.copy_(torch.where(part.mask(self.mark, w) > 0, fresh(None), w))
            return
        assert self.index is not None
        at = part.positions(self.index)
        values = fresh(at).expand(*w.shape[: part.dim], len(at), *w.shape[part.dim + 1 :])
        if self.hit is not None:
            hit = along(self.hit.repeat_interleave(part.index.shape[1]), part.dim, w.dim())
            values = torch.where(hit, values, w.index_select(part.dim, at))
        w.index_copy_(part.dim, at, values)

    def drawn(self, part: Slice, source: Distribution) -> Fresh:
        """Draws of a parameter, numbered by the place in it: which others are drawn beside one changes nothing."""
        w = self.params[part.parameter]

        def draw(at: Tensor | None) -> Tensor:
            alone = at is not None and (source.kind != "orthogonal" or part.dim == 0)
            number = _elements_at(w, part.dim, at) if alone and at is not None else elements(w)
            fresh = source.draw(self.context.noise, part.parameter, number).to(w.dtype)
            # An orthogonal weight is drawn by whole rows, also where a unit's weights are a column of it.
            return fresh if alone or at is None else fresh.index_select(part.dim, at)

        return draw


def _zero(like: Tensor) -> Fresh:
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    return lambda at: zero


def _taken(values: Tensor, dim: int) -> Fresh:
    return lambda at: values if at is None else values.index_select(dim, at)


def _elements_at(w: Tensor, dim: int, positions: Tensor) -> Tensor:
    """The numbers of a parameter's elements at positions along a dimension, int32, the shape of that selection."""
    within = math.prod(w.shape[dim + 1 :])
    number = positions.to(torch.int32).unsqueeze(-1) * within + _counted(within, w)
    if dim > 0:
        number = (_counted(math.prod(w.shape[:dim]), w) * (within * w.shape[dim]))[:, None, None] + number
    return number.reshape(*w.shape[:dim], positions.shape[0], *w.shape[dim + 1 :])


def _counted(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, dtype=torch.int32, device=like.device)


def _neutral(part: Slice, units: UnitMap) -> Distribution:
    """Where a norm's parameter or statistic starts from."""
    if part.parameter in units.initial:
        return units.initial[part.parameter]
    leaf = part.parameter.rpartition(".")[2]
    if leaf not in _NEUTRAL:
        raise ValueError(
            f"what {part.parameter} starts from is not known: it was not filled by torch.nn.init's functions in the "
            f"factory, and by its name it is none of a norm's {', '.join(_NEUTRAL)}"
        )
    return Distribution("constant", _NEUTRAL[leaf])


# --- bias transfer --------------------------------------------------------------------------------------------------


def _output_dim(part: Slice) -> int:
    """The dimension of a reader's weight along which its outputs lie."""
    return 1 if part.dim == 0 else 0


def _check_bias(part: Slice, params: Tensors) -> None:
    bias = bias_beside(part.parameter)
    if bias not in params:
        raise ValueError(f"bias_transfer needs a bias beside {part.parameter}, and there is none")
    outputs = params[part.parameter].shape[_output_dim(part)]
    if params[bias].shape != (outputs,):
        raise ValueError(
            f"bias_transfer cannot use {bias} of shape {tuple(params[bias].shape)}: it must hold one number for each "
            f"of the {outputs} outputs of {part.parameter}"
        )


def _transfer_bias(layer: UnitLayer, params: dict[str, Tensor], mean: Tensor, context: Context) -> None:
    for part in layer.outgoing:
        w, name = params[part.parameter], bias_beside(part.parameter)
        others = [dim for dim in range(w.dim()) if dim != _output_dim(part)]
        moved = (w * part.mask(mean, w)).sum(others)
        bias = (params[name] + moved).to(params[name].dtype)
        if context.in_place:
            params[name].copy_(bias)
        else:
            params[name] = bias


# --- orthogonal -----------------------------------------------------------------------------------------------------


def _orthogonal(part: Slice, w: Tensor, mark: Tensor, context: Context) -> Tensor:
    """A parameter whose rows (a unit's weights) are random, orthogonal to those of the units that stay.

    In float64: through the Gram matrix a singular value counts by its square.
    """
    normal = context.noise.normal_like(part.parameter, w)
    random, rows = part.gather(normal).to(torch.float64), part.gather(w).to(torch.float64)
    gone = (mark > 0).unsqueeze(1)
    others = torch.where(gone, 0.0, rows)
    units, width = rows.shape
    gram = others.T @ others if units > width else others @ others.T
    # The decomposition would stop all lanes at a number that is not finite; the lane is found by its weights.
    values, vectors = torch.linalg.eigh(torch.where(torch.isfinite(gram), gram, 0.0))
    present = values > values.amax(0) * (max(units, width) * torch.finfo(torch.float64).eps)
    if units > width:
        inside = random @ (vectors * present) @ vectors.T
    else:
        inverse = vectors * torch.where(present, 1 / torch.where(present, values, 1.0), 0.0)
        inside = random @ others.T @ inverse @ vectors.T @ others
    free = torch.where(present.sum(0) < width, random - inside, random)
    lengths = torch.linalg.vector_norm(rows, dim=1)
    stay = 1 - (mark > 0).to(torch.float64)
    left = stay.sum(0)
    length = torch.where(left > 0, (lengths * stay).sum(0) / left.clamp(min=1), lengths.mean(0))
    fresh = free / torch.linalg.vector_norm(free, dim=1, keepdim=True) * length
    return _spread_rows(part, fresh.to(w.dtype), w)


def _spread_rows(part: Slice, rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of :meth:`Slice.gather`: [units, everything of the unit] as the parameter, zero where no unit is."""
    length = like.shape[part.dim]
    rest = [n for dim, n in enumerate(like.shape) if dim != part.dim]
    flat = rows.reshape(-1, *rest)
    if not (part.one_to_one and length == part.index.shape[0]):
        slot = torch.full((length,), flat.shape[0], dtype=torch.int64)
        slot[part.index.reshape(-1)] = torch.arange(flat.shape[0])
        flat = torch.cat([flat, torch.zeros_like(flat[:1])])[slot.to(like.device)]
    return flat.movedim(0, part.dim)


# --- split ----------------------------------------------------------------------------------------------------------


def _split(layer: UnitLayer, act: _Act, useful: Tensor) -> None:
    gone = act.mark > 0
    worth = torch.where(gone, -math.inf, useful)
    donor = worth.argmax(0)
    found = worth.amax(0) > -math.inf
    share = 1 / (1 + act.mark.sum(0))
    source = torch.where(gone & found, donor, act.units)
    giving = (act.units == donor) & found
    factor = torch.where(gone, torch.where(found, share, 0.0), torch.where(giving, share, 1.0))
    for part in (*layer.incoming, *layer.norms):
        act.put(part, _copied_or_drawn(part, act, source, found))
    for part in layer.outgoing:
        w = act.params[part.parameter]
        places, scale = _places(part, w, source), _scale(part, w, factor)

        def shared(
            at: Tensor | None, part: Slice = part, w: Tensor = w, p: Tensor = places, s: Tensor = scale
        ) -> Tensor:
            p, s = (p, s) if at is None else (p[at], s[at])
            return w.index_select(part.dim, p) * along(s, part.dim, w.dim())

        if act.context.in_place:
            act.put(part, shared)
            mine = part.positions(donor.unsqueeze(0))
            w.index_copy_(part.dim, mine, w.index_select(part.dim, mine) * along(scale[mine], part.dim, w.dim()))
        else:
            act.params[part.parameter] = shared(None)


def _copied_or_drawn(part: Slice, act: _Act, source: Tensor, found: Tensor) -> Fresh:
    """Each unit's values from the unit that ``source`` names; drawn where no unit was found to copy from."""
    w = act.params[part.parameter]
    places, drawn = _places(part, w, source), act.drawn(part, _neutral(part, act.context.units))

    def fresh(at: Tensor | None) -> Tensor:
        return torch.where(found, w.index_select(part.dim, places if at is None else places[at]), drawn(at))

    return fresh


def _places(part: Slice, w: Tensor, source: Tensor) -> Tensor:
    """For every position along the slice's dimension the one that it takes its values from, int64: that of the unit
    which ``source``, int64 [units], names, and itself where no unit is."""
    length = w.shape[part.dim]
    if part.one_to_one and length == part.index.shape[0]:
        return source
    index = part.index.to(w.device)
    return torch.arange(length, device=w.device).scatter(0, index.reshape(-1), index[source].reshape(-1))


def _scale(part: Slice, w: Tensor, factor: Tensor) -> Tensor:
    """A factor a unit, [units], laid out along the slice's dimension; 1 where no unit is."""
    length = w.shape[part.dim]
    owned = part.spread(torch.ones_like(factor), length) > 0
    return torch.where(owned, part.spread(factor, length), 1.0).to(w.dtype)
