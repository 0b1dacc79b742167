"""What a study says, and how it becomes lanes."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from perennial import methods, networks, streams
from perennial.incremental import ArrivingClasses
from perennial.lm import DominantTickets, TextStream
from perennial.methods import Intervention, Method, Rule
from perennial.population import Lane
from perennial.rl import Control
from perennial.streams import Stream
from perennial.tickets.experiment import Experiment
from perennial.tickets.supply import Supply


class StudyError(ValueError):
    """A study that cannot be run as it is written; the message says where, what and what would do."""


Component = dict[str, Any]
"""``{name: ..., setting: value, ...}``; a list of values is a grid."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class MethodEntry(_Strict):
    """One line in the figure: an optimizer rule, interventions, and perhaps a network of its own."""

    label: str = ""
    """How figures call it."""
    rule: Component
    """The optimizer rule."""
    interventions: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    """Settings of each intervention by its name, in the order in which they act."""
    network: Component | None = None
    """A network in place of the study's."""


class Part(_Strict):
    """One experiment: a stream, a network, methods, seeds."""

    title: str = ""
    """Heading of its section in the report."""
    stream: Component
    """What is learned."""
    network: Component
    """Who learns it."""
    steps: int = Field(gt=0)
    """Optimizer steps of each lane."""
    bin: int = Field(gt=0)
    """Steps over which online loss and accuracy are averaged."""
    measure_every: int | None = Field(default=None, gt=0)
    """Steps between diagnostics, a multiple of ``bin``; every bin if left out."""
    measures: list[str] = Field(default_factory=list)
    """Diagnostics besides the usual ones: names of metrics of units, features, weights and gradients."""
    plasticity_every: int | None = Field(default=None, gt=0)
    """Steps between samples at which the sample plasticity is taken; never if left out."""
    dtype: Literal["float32", "float64"] = "float32"
    """Numbers in which the lanes are trained."""
    judged_by: str | None = None
    """The metric of the learning curves and tables, one that is measured; the online accuracy, or where there is none
    the online loss, if left out."""
    seeds: int | list[int]
    """How many, or which."""
    methods: dict[str, MethodEntry] = Field(min_length=1)
    """What is compared."""


class Panel(_Strict):
    """One panel of a study's main figure: one metric against time."""

    title: str = ""
    """Its heading; the metric's name if left out."""
    metric: str | None = None
    """What is drawn; what the part is judged by if left out."""
    part: str | None = None
    """Of which part; the first if left out. With a line a part it is left out."""
    methods: list[str] | None = Field(default=None, min_length=1)
    """Of which methods; of all if left out."""
    lines: Literal["methods", "settings", "parts"] = "methods"
    """What the lines are: each method at its best setting; every setting of each method, beside the linear learner at
    its best; or the methods at their best setting in every part."""


class MainFigure(_Strict):
    """The figure at the top of a study's report: of a paper's experiment, the paper's own panels and axes."""

    title: str
    """Its heading; of a paper's experiment, which of its figures this is."""
    axis: Literal["steps", "tasks"] = "steps"
    """What time is counted in."""
    panels: list[Panel] = Field(min_length=1)
    """In reading order."""


class _Described(_Strict):
    """What every study says of itself."""

    name: str
    """What it was asked for as."""
    title: str = ""
    """Heading of the report."""
    description: str = ""
    """What it shows."""
    source: str = ""
    """The paper whose experiment it is."""


class Study(_Described):
    """A study with everything spelled out."""

    figure: MainFigure | None = None
    """The figure at the top of the report; none if left out."""
    parts: dict[str, Part] = Field(min_length=1)
    """The experiments, by a short name."""


class TicketStudy(_Described):
    """A search for winning tickets and its controls, with everything spelled out."""

    tickets: Experiment
    """The search, and what it is compared with."""


class SupplyStudy(_Described):
    """Networks that live through a stream, and the winning tickets that are found in them on the way."""

    life: Part
    """The stream, the network, the methods and the seeds."""
    supply: Supply
    """When networks are taken from it, and how their tickets are looked for."""


class TextStudy(_Described):
    """A language model that learns text tasks one after another, by several methods."""

    texts: TextStream
    """The tasks, the model, the methods and the seeds."""


class DominantStudy(_Described):
    """Dominant winning tickets of a pretrained language model, moved between tasks, and their controls."""

    dominant: DominantTickets
    """The tasks, the model, what is selected and what it is compared with."""


class ArrivingStudy(_Described):
    """A convolutional network that is trained on more and more classes of images, by several methods."""

    arriving: ArrivingClasses
    """The images, the network, the training, the methods and the seeds."""


class ControlStudy(_Described):
    """A body that learns to run while the ground under it changes, or does not, by several methods."""

    control: Control
    """The body, PPO's settings, the methods and the seeds."""


@dataclass(frozen=True)
class Variant:
    """One method at one point of its grid."""

    part: str
    method: str
    settings: str
    """The swept values, as text; empty without a grid."""
    numbers: dict[str, Any]
    """The swept values by dotted name."""
    rule: Rule
    interventions: tuple[Intervention, ...]
    network: networks.Network

    def lane(self, seed: int) -> Lane:
        """The run of this variant with a seed."""
        return Lane(seed, self.rule, self.interventions)


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that offers the nearest known name, or lists them all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1, 0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(map(str, known)) or 'none'}"


def _pick(registry: Sequence[type[Any]], kind: str, name: Any, where: str) -> type[Any]:
    for entry in registry:
        if entry.name == name:
            return entry
    raise StudyError(f"{where}: there is no {kind} {name!r}; {nearest(str(name), [e.name for e in registry])}")


def _value(field: dataclasses.Field[Any], hint: Any, value: Any, where: str) -> Any:
    """A YAML value as the field's type; YAML reads 1e-4 as text and 1 as an int."""
    if "low" in field.metadata:
        if value is None and type(None) not in typing.get_args(hint):
            raise StudyError(f"{where} is empty; it needs a number")
        if value is None or isinstance(value, bool):
            return value
        try:
            return float(value)
        except (TypeError, ValueError):
            raise StudyError(f"{where} is {value!r}, which is not a number") from None
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise StudyError(f"{where} is {value!r}; it is a list, such as [5, 5]")
        return tuple(value)
    allowed = tuple(a for a in (typing.get_args(hint) or (hint,)) if isinstance(a, type))
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join("empty" if t is types.NoneType else t.__name__ for t in allowed)
        raise StudyError(f"{where} is {value!r}; it is {names}")
    return value


def _make(cls: type[Any], settings: Mapping[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in settings.items():
        if key not in fields:
            raise StudyError(f"{where}.{key}: {cls.name} has no setting {key!r}; {nearest(key, fields)}")
        values[key] = _value(fields[key], hints[key], value, f"{where}.{key}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise StudyError(f"{where}: {error}") from error


def _grid(cls: type[Any], settings: Mapping[str, Any], where: str) -> list[tuple[dict[str, Any], Any]]:
    """Every point of the grid of a component: the swept values by dotted name, and the component there."""
    hints = typing.get_type_hints(cls)
    axes: dict[str, list[Any]] = {}
    for key, value in settings.items():
        if not isinstance(value, list):
            continue
        whole = typing.get_origin(hints.get(key)) is tuple and not (value and isinstance(value[0], (list, tuple)))
        if not whole:
            if not value:
                raise StudyError(f"{where}.{key} is an empty list; a grid needs at least one value")
            axes[key] = value
    found = []
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        made = _make(cls, {**settings, **point}, where)
        swept = {f"{where}.{k}": getattr(made, k) for k, v in axes.items() if len(v) > 1}
        found.append((swept, made))
    return found


def _named(component: Component, registry: Sequence[type[Any]], kind: str, where: str) -> tuple[type[Any], Component]:
    if "name" not in component:
        raise StudyError(f"{where} does not say which {kind}; add name: {', '.join(e.name for e in registry)}")
    cls = _pick(registry, kind, component["name"], f"{where}.name")
    return cls, {k: v for k, v in component.items() if k != "name"}


def stream_of(part: Part, where: str) -> Stream:
    """The stream that a part names."""
    cls, settings = _named(part.stream, streams.REGISTRY, "stream", f"{where}.stream")
    for key, value in settings.items():
        if isinstance(value, list):
            raise StudyError(f"{where}.stream.{key} is a list; give each stream a part of its own")
    return _make(cls, settings, f"{where}.stream")  # type: ignore[no-any-return]


def seeds_of(part: Part, where: str) -> list[int]:
    """The seeds that a part names."""
    seeds = list(range(part.seeds)) if isinstance(part.seeds, int) else part.seeds
    if not seeds:
        raise StudyError(f"{where}.seeds is {part.seeds!r}; a study needs at least one seed")
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise StudyError(f"{where}.seeds is {part.seeds!r}; seeds are different whole numbers from 0")
    return seeds


def variants_of(part: Part, key: str, where: str) -> list[Variant]:
    """Every method of a part at every point of its grid."""
    rules = [m for m in methods.REGISTRY if issubclass(m, Rule)]
    others = [m for m in (*methods.REGISTRY, *methods.PROBES) if issubclass(m, Intervention)]
    found = []
    for name, entry in part.methods.items():
        here = f"{where}.methods.{name}"
        cls, settings = _named(entry.rule, rules, "optimizer rule", f"{here}.rule")
        axes: list[list[tuple[dict[str, Any], Any]]] = [_grid(cls, settings, f"{here}.rule")]
        for intervention, chosen in entry.interventions.items():
            cls = _pick(others, "intervention", intervention, f"{here}.interventions")
            axes.append(_grid(cls, chosen or {}, f"{here}.interventions.{intervention}"))
        network = entry.network or part.network
        place = f"{here}.network" if entry.network else f"{where}.network"
        cls, settings = _named(network, networks.REGISTRY, "network", place)
        axes.append(_grid(cls, settings, place))
        for point in itertools.product(*axes):
            numbers = {
                k.removeprefix(f"{here}.").removeprefix(f"{where}."): v for swept, _ in point for k, v in swept.items()
            }
            made: list[Method] = [m for _, m in point[:-1]]
            found.append(
                Variant(
                    key,
                    name,
                    ", ".join(f"{k}={_text(v)}" for k, v in numbers.items()),
                    numbers,
                    made[0],  # type: ignore[arg-type]
                    tuple(made[1:]),  # type: ignore[arg-type]
                    point[-1][1],
                )
            )
    return found


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def factory_of(variant: Variant, stream: Stream) -> Callable[[], Any]:
    """What builds a variant's network."""
    return lambda: variant.network.build(stream.inputs, stream.outputs)
