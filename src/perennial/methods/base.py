"""What a method is.

A method is a frozen dataclass of hyper-parameters with two pure functions over plain dicts of tensors: ``init`` makes
its state, ``step`` turns parameters and state into changed parameters and the next state. A :class:`Rule` turns
gradients into an update; an :class:`Intervention` changes parameters after the rule has.

The same functions run under ``vmap`` with a lane dimension added, compiled, in a loop, in float32 or float64. They must
therefore be free of side effects, of Python control flow on tensor values and of shapes that depend on values; masks
and ``torch.where`` do that work.

Fields annotated :data:`Scalar` are numbers that may differ from lane to lane: inside ``step`` they can be 0-d tensors.
All other fields (strings, booleans, ``None``) are structure: they choose which program is compiled. ``None`` in a
scalar field takes the feature, its state and its cost out of the program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

from perennial.noise import Noise, once
from perennial.units import UnitMap, along

Scalar: TypeAlias = float | Tensor
"""A number, or a 0-d tensor where it differs between lanes."""

Tensors: TypeAlias = Mapping[str, Tensor]
"""Tensors by the qualified name of the parameter they belong to (or have the shape of)."""

State: TypeAlias = Any
"""A method's own ``NamedTuple`` of tensors and dicts of tensors."""

Touched: TypeAlias = Mapping[str, Mapping[int, Tensor]]
"""Parameter name -> {dimension: bool [its length]}; see :meth:`perennial.units.UnitMap.touched`.
:func:`whole_parameter` marks all of one. Layer name -> {0: bool [units]} for what is kept by unit."""


class Context(NamedTuple):
    """What a method may look at in one step.

    Activations, signals, curvature and the loss are there if the method's :attr:`Method.needs` names them.
    """

    grads: Tensors
    """The gradient of the loss by parameter name, from before the step."""
    activations: Tensors
    """The activation of each unit layer in this step's forward pass, by layer name: [samples, units], or
    [samples, units, positions...] where a unit stands at several places of a sample (a convolution). The reductions of
    :mod:`perennial.scores` take either."""
    noise: Noise
    """This step's random numbers, already scoped to the method."""
    units: UnitMap
    """The network's hidden units, and how its parameters were first drawn."""
    signals: Tensors = {}
    """The gradient of the loss by each unit's activation, by layer name, the activation's shape."""
    loss: Callable[[Tensors], Tensor] | None = None
    """The loss [] on this step's examples as a function of the parameters, by name; those left out are as they are."""
    buffers: Tensors = {}
    """The network's buffers, such as running statistics of norms, by qualified name; a step or an event may return
    changed ones beside the parameters."""
    reduce: Callable[[Tensor], Tensor] = lambda score: score
    """The mean of a tensor over the processes of a data-parallel job; the tensor itself where there is one process.
    What a method computes from activations or signals goes through it, so that all processes decide alike."""
    look: bool = False
    """Activations are plain numbers in the processor's memory, which a score may look at to choose the faster way; the
    last bits of a sum may depend on that."""
    in_place: bool = False
    """The parameters are a user's own: :func:`perennial.methods.replace.replace_units` writes rows into them instead of
    returning whole tensors. Methods need not look at it."""
    curvature: Tensors = {}
    """The diagonal of the loss's Hessian by parameter name; see :mod:`perennial.curvature`."""
    shared: Tensors | None = None
    """What :meth:`Rule.shared` made of all parameters, where ``step`` is given only some of them; None: all are here.
    """


def number(
    default: float | None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    infinite: bool = False,
) -> Any:
    """A field for a hyper-parameter from ``low`` to ``high``, the ends excluded where they are open.

    None is a value of the field only if it is its default; infinity only with ``infinite``, for a bound that may be
    absent.
    """
    metadata = {"low": low, "high": high, "open_low": open_low, "open_high": open_high, "infinite": infinite}
    return dataclasses.field(default=default, metadata=metadata)


def whole(default: int | None, *, low: int = 0, optional: bool = False) -> Any:
    """A field for a whole number from ``low``: structure, the same in all lanes of a program.

    None is a value of the field only if it is its default, or with ``optional``.
    """
    return dataclasses.field(default=default, metadata={"whole_low": low, "optional": optional})


def choice(default: str | int, *options: str | int) -> Any:
    """A field for a name (or an order) out of a closed list."""
    return dataclasses.field(default=default, metadata={"options": options})


@dataclass(frozen=True)
class Method:
    """Base of every method: ranges checked, a name, nothing else."""

    name: ClassVar[str]
    """Under which studies and the command line know it: the class name in snake case, unless the class says another."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            where = f"{self.name}.{field.name}"
            options = field.metadata.get("options")
            if options is not None and not any(value == o and type(value) is type(o) for o in options):
                raise ValueError(f"{where} is {value!r}; it is one of {', '.join(map(str, options))}")
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise TypeError(f"{where} is {value!r}; it is True or False")
            absent = value is None and (field.default is None or field.metadata.get("optional", False))
            if "whole_low" in field.metadata and not absent:
                low = field.metadata["whole_low"]
                if isinstance(value, bool) or not isinstance(value, int):
                    raise TypeError(f"{where} is {value!r}, which is not a whole number")
                if value < low:
                    raise ValueError(f"{where} is {value}; it must be at least {low}")
            if "low" in field.metadata and not absent and not isinstance(value, Tensor):
                _check_range(where, value, **field.metadata)

    @classmethod
    def scalars(cls) -> tuple[str, ...]:
        """The fields that may differ between lanes."""
        return tuple(f.name for f in dataclasses.fields(cls) if "low" in f.metadata)

    def bound(self, values: Mapping[str, Any]) -> Self:
        """A copy with other values of some fields, which were checked before or are tensors."""
        copy = object.__new__(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(copy, field.name, values.get(field.name, getattr(self, field.name)))
        return copy

    @property
    def needs(self) -> frozenset[str]:
        """What it reads of the context beyond gradients, of ``"activations"``, ``"signals"``, ``"curvature"`` and
        ``"loss"``.

        What nobody needs is not recorded: a forward hook less on a user's model.
        """
        return frozenset()

    @classmethod
    def settled(cls, methods: Sequence[Self], units: UnitMap) -> Sequence[Self]:
        """The methods of lanes that share a program, with the settings filled in that follow from the network or from
        all of them together. Most methods have none."""
        return methods

    def init(self, params: Tensors, units: UnitMap) -> State:
        """The state before the first step; ``()`` for a method without one."""
        return ()

    def step(self, params: Tensors, state: State, context: Context) -> tuple[dict[str, Tensor], State]:
        """One step: the parameters that change, by name, and the next state."""
        raise NotImplementedError(f"{type(self).__name__} defines no step")


class Rule(Method):
    """A method that turns gradients into an update.

    ``step`` treats every parameter by itself but for what :meth:`shared` says, so that an optimizer may hand it the
    parameters in parts.
    """

    def shared(self, params: Tensors, state: State, context: Context) -> dict[str, Tensor]:
        """What ``step`` has to know of all parameters at once, by name. Of parts of the parameters the maximum counts.

        A rule that defines it reads ``context.shared``, and makes it itself where that is None.
        """
        return {}

    def reset(self, state: State, touched: Touched) -> State:
        """Fresh weights get a fresh state.

        In every dict of the state, a tensor shaped like its parameter goes back to zero where ``touched`` marks it; a
        tuple of per-dimension counts (:func:`start_ages`) goes back to zero along the marked dimension. What is kept
        by unit, under the layer's name, is marked by that name. A rule whose state starts elsewhere than at zero
        overrides this.
        """
        if not hasattr(state, "_fields"):
            return state
        return state._replace(
            **{
                name: {key: _cleared(entry, touched.get(key, {})) for key, entry in value.items()}
                for name, value in state._asdict().items()
                if isinstance(value, dict)
            }
        )


class Outcome(NamedTuple):
    """What an event of an intervention did."""

    changed: dict[str, Tensor]
    """The parameters and buffers that change, by name."""
    state: State
    """The method's next state."""
    touched: Touched = {}
    """Where weights are fresh, so that the optimizer's state there starts anew."""
    replaced: Tensors = {}
    """Which units are fresh: layer name -> bool [units]. Counted, and shown to the user."""


class Intervention(Method):
    """A method that changes parameters after the optimizer has.

    ``step`` runs after every optimizer step. What is done only now and then (every thousand steps, or when a new task
    begins) goes into ``event``, which the caller runs after ``step`` where :meth:`due` says so; in a population it is
    not part of the compiled step and costs nothing in between.
    """

    OFF: ClassVar[Mapping[str, Any]] = {}
    """The hyper-parameters at which it does nothing, bit for bit."""

    def begin(self, params: Tensors, state: State, context: Context) -> tuple[dict[str, Tensor], State]:
        """Once, before the first step, run eagerly: the parameters that change, by name, and the next state.

        For what ``init`` cannot do, which has no random numbers and changes nothing. The context has the noise of step
        -1 and the units, and nothing else. A function of the parameters and the noise alone: where a checkpoint is
        loaded before the first step it is undone, or done again with the checkpoint's seed. Of several interventions
        each is initialised and begins before the next is initialised, so one that remembers the start remembers what
        those before it made of it.
        """
        return {}, state

    def begun(self, params: Tensors, state: State, context: Context) -> tuple[dict[str, Tensor], State]:
        """What :meth:`begin` returns, looked at.

        Raises:
            ValueError: it is not a pair, or names a parameter that there is not, or gives one another shape.
        """
        made = self.begin(params, state, context)
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], Mapping):
            raise ValueError(
                f"{self.name}.begin returned {type(made).__name__}; it returns (changed parameters, state)"
            )
        for name in made[0]:
            if name not in params:
                raise ValueError(f"{self.name}.begin changes {name!r}, which is no parameter: {', '.join(params)}")
        self._look_at(made[0], params, "begin")
        return made

    def step(self, params: Tensors, state: State, context: Context) -> tuple[dict[str, Tensor], State]:
        """After every optimizer step: the parameters that change, by name, and the next state."""
        return {}, state

    def replaced(self, state: State) -> dict[str, Tensor]:
        """Which units the last ``step`` re-initialised: layer name -> bool [units]. The caller resets the optimizer's
        state there. Empty for a method that replaces none."""
        return {}

    MEASURES: ClassVar[tuple[str, ...]] = ()
    """The metrics that :meth:`measured` gives."""

    def measured(self, state: State) -> dict[str, float]:
        """What the method found out by the last step, of one lane, by metric: not part of the step, and run only when
        a population is measured."""
        return {}

    def acts_on(self, params: Tensors, units: UnitMap) -> list[str]:
        """The parameters that it may change, by name, to be shown. All, unless the method says otherwise."""
        return list(params)

    def due(self, steps_made: int, task_ended: bool) -> bool:
        """Whether ``event`` runs after this step. A plain function of its arguments and of structure.

        Args:
            steps_made: optimizer steps so far, this one included.
            task_ended: a new task begins with the next step.
        """
        return False

    def event(self, params: Tensors, state: State, context: Context) -> Outcome:
        """The rare part; see :meth:`due`."""
        return Outcome({}, state)

    def happened(self, params: Tensors, state: State, context: Context) -> Outcome:
        """What :meth:`event` returns, looked at.

        Raises:
            ValueError: it is no :class:`Outcome`, or gives a parameter another shape.
        """
        outcome = self.event(params, state, context)
        if not isinstance(outcome, Outcome):
            raise ValueError(f"{self.name}.event returned {type(outcome).__name__}; it returns an Outcome")
        self._look_at(outcome.changed, {**params, **context.buffers}, "event")
        return outcome

    def _look_at(self, changed: Tensors, params: Tensors, where: str) -> None:
        for name, value in changed.items():
            if name in params and value.shape != params[name].shape:
                raise ValueError(
                    f"{self.name}.{where} makes {name} {tuple(value.shape)}; it is {tuple(params[name].shape)}"
                )


class Regulariser(Intervention):
    r"""An intervention that goes down a penalty :math:`\Omega` on the parameters.

    Decoupled (the default) it takes a step of its own after the optimizer's,
    :math:`w \leftarrow w - r \nabla\Omega(w)`, which no momentum and no Adam rescales. Coupled,
    :math:`r\,\Omega` belongs to the loss: a population adds it, on a user's model ``loss = loss + keeper.penalty()``
    does.

    A subclass has the fields ``rate`` and ``coupled`` and defines :meth:`penalty`.
    """

    rate: Scalar
    coupled: bool

    OFF = {"rate": 0.0}

    def penalty(self, params: Tensors, state: State, units: UnitMap) -> Tensor:
        """The penalty, [], without the factor ``rate``."""
        raise NotImplementedError(f"{type(self).__name__} defines no penalty")

    def advance(self, params: Tensors, state: State, units: UnitMap) -> State:
        """The next state, from the parameters after the step; most regularisers have a constant one."""
        return state

    def step(self, params: Tensors, state: State, context: Context) -> tuple[dict[str, Tensor], State]:
        new = self.advance(params, state, context.units)
        if self.coupled:
            return {}, new
        slope = torch.func.grad(lambda p: self.penalty(p, new, context.units))(dict(params))
        down = {name: self.rate * slope[name] for name in params}
        # Minus nothing is not always nothing: -0.0 - -0.0 is 0.0.
        return {name: torch.where(down[name] == 0, w, w - down[name]) for name, w in params.items()}, new


def _check_range(
    where: str, value: Any, low: float, high: float, open_low: bool, open_high: bool, infinite: bool
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where} is {value!r}, which is not a number")
    below = value <= low if open_low else value < low
    above = value >= high if open_high else value > high
    finite = math.isfinite(value) or (infinite and value == math.inf)
    if below or above or not finite:
        lower = "" if low == -math.inf else f"{'above' if open_low else 'at least'} {low:g}"
        upper = "" if high == math.inf else f"{'below' if open_high else 'at most'} {high:g}"
        allowed = " and ".join(text for text in (lower, upper, "" if finite else "finite") if text)
        raise ValueError(f"{where} is {value:g}; it must be {allowed}")


def _cleared(entry: Tensor | tuple[Tensor, ...], dims: Mapping[int, Tensor]) -> Tensor | tuple[Tensor, ...]:
    if isinstance(entry, tuple):
        return tuple(
            torch.where(along(dims[d], d, ages.dim()), torch.zeros_like(ages), ages) if d in dims else ages
            for d, ages in enumerate(entry)
        )
    for dim, mask in dims.items():
        mask = mask if dim < 0 else along(mask, dim, entry.dim())
        entry = torch.where(mask, torch.zeros_like(entry), entry)
    return entry


def whole_parameter(param: Tensor) -> dict[int, Tensor]:
    """The mark of :data:`Touched` on every element of a parameter."""
    if not param.dim():
        return {-1: torch.ones((), dtype=torch.bool, device=param.device)}
    return {0: torch.ones(param.shape[0], dtype=torch.bool, device=param.device)}


def start_ages(param: Tensor) -> tuple[Tensor, ...]:
    """Steps since each coordinate of a parameter was last reset, per dimension, each of shape [1, .., n, .., 1].

    A weight is reset when its row is (its unit is fresh) or its column is (the unit that it reads is), so its own age
    is the minimum over the dimensions: exact, at the price of a row and a column instead of a matrix.
    """
    return tuple(
        param.new_zeros([n if d == dim else 1 for d in range(param.dim())]) for dim, n in enumerate(param.shape)
    )


def reached(decay: Scalar, age: Tensor) -> Tensor:
    r"""What a moving average of ones has reached after ``age`` steps: :math:`1 - \beta^t`, the shape of ``age``.

    By ``expm1``, which is exact where the power is close to 1 and which compiled loops compute for eight numbers at
    once; a power they compute one by one.
    """
    if isinstance(decay, Tensor):
        return -torch.expm1(age * torch.log(decay))
    return -torch.expm1(age * (math.log(decay) if decay > 0 else -math.inf))


def unbiasing(ages: tuple[Tensor, ...], decay: Scalar) -> Tensor:
    r"""What takes the bias of the zero start out of a moving average: :math:`1 / (1 - \beta^t)`, t the element's own
    age. Infinite at age 0.

    It falls with t, so the maximum over the dimensions is that of the youngest coordinate, and a power is computed for
    a row and a column instead of a matrix. Broadcasts against the parameter.
    """
    return functools.reduce(torch.maximum, [once(1 / reached(decay, age)) for age in ages])
