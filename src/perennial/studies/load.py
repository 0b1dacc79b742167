"""Reading studies: by name or file, with changes from the command line, with the place of every mistake."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import yaml
from pydantic import BaseModel, ValidationError

from perennial.metrics import AMBIGUOUS
from perennial.population import MEASURABLE, MEASURED
from perennial.streams import PermutedMNIST
from perennial.studies.schema import (
    ArrivingStudy,
    ControlStudy,
    DominantStudy,
    MainFigure,
    MethodEntry,
    Panel,
    Part,
    Study,
    StudyError,
    SupplyStudy,
    TextStudy,
    TicketStudy,
    Variant,
    nearest,
    seeds_of,
    stream_of,
    variants_of,
)

OtherStudy: TypeAlias = TicketStudy | SupplyStudy | TextStudy | DominantStudy | ArrivingStudy | ControlStudy
"""Studies that are not made of parts."""

_HEAD = ("name", "title", "description", "source")
"""Keys of every study that are no settings."""

_BESIDE = (*_HEAD, "figure")
"""Keys of a study of parts that stand beside them."""

Lines = dict[str, str]
"""Where each dotted key stands: "steps" -> "my-study.yaml, line 4"."""


_OPTIONS = ("seeds", "steps", "model")
"""Settings for which the command line has an option of their own."""


def shipped() -> dict[str, str]:
    """The studies that ship, by name: their text."""
    found: dict[str, str] = {}

    def walk(folder: Any, prefix: str) -> None:
        for entry in sorted(folder.iterdir(), key=lambda e: e.name):
            if entry.is_dir() and not entry.name.startswith("_"):
                walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                found[prefix + entry.name.removesuffix(".yaml")] = entry.read_text()

    walk(resources.files("perennial.studies"), "")
    return found


def load(
    source: str, changes: Mapping[str, Any] | None = None, methods: Sequence[str] | None = None
) -> Study | OtherStudy:
    """A study with everything spelled out and every component checked.

    Args:
        source: the name of a study that ships, or the path of a YAML file.
        changes: dotted keys to values (:func:`parse_setting`) that replace the file's.
        methods: the names of the methods to keep, of those that the study compares; all if left out.

    Raises:
        StudyError: names the mistake, where it stands, and the nearest thing that is known.
    """
    lines: Lines = {}
    tree = _read(source, lines)
    if methods is not None:
        _keep(tree, methods, "--methods")
    for dotted, value in (changes or {}).items():
        option = f"--{dotted}" if dotted in _OPTIONS else f"--set {dotted}"
        _change(tree, dotted, value, option, lines)
    tree["name"] = _name(source)
    kind = _kind_of(tree)
    if kind is not None:
        return _of_kind(kind, tree, lines)
    try:
        study = Study.model_validate(tree)
        for key, checked in study.parts.items():
            _check(key, checked)
        _check_figure(study)
    except ValidationError as error:
        raise StudyError(_explain(error, lines)) from None
    except StudyError as error:
        raise StudyError(_place(str(error), lines)) from None
    return study


class _Kind(NamedTuple):
    """A kind of study that is not made of parts."""

    model: type[OtherStudy]
    roots: tuple[str, ...]
    """Its keys that hold settings; what names none of them is meant for the first, or for the one that has it."""
    short: Mapping[str, str]
    """Options of the command line -> keys."""


_KINDS = {
    "tickets": _Kind(TicketStudy, ("tickets",), {"steps": "tickets.training.iterations", "seeds": "tickets.seeds"}),
    "supply": _Kind(SupplyStudy, ("supply", "life"), {"steps": "life.steps", "seeds": "life.seeds"}),
    "texts": _Kind(TextStudy, ("texts",), {"steps": "texts.training.steps", "seeds": "texts.seeds"}),
    "dominant": _Kind(DominantStudy, ("dominant",), {"steps": "dominant.training.steps", "seeds": "dominant.seeds"}),
    "arriving": _Kind(ArrivingStudy, ("arriving",), {"steps": "arriving.training.epochs", "seeds": "arriving.seeds"}),
    "control": _Kind(ControlStudy, ("control",), {"steps": "control.steps", "seeds": "control.seeds"}),
}


def _kind_of(tree: Mapping[str, Any]) -> _Kind | None:
    return next((kind for key, kind in _KINDS.items() if key in tree), None)


def _of_kind(kind: _Kind, tree: dict[str, Any], lines: Lines) -> OtherStudy:
    for key in kind.roots:
        root = tree.get(key)
        if kind.model is not SupplyStudy and isinstance(root, dict) and isinstance(root.get("seeds"), int):
            root["seeds"] = list(range(root["seeds"]))
    try:
        study = kind.model.model_validate(tree)
        if isinstance(study, SupplyStudy):
            _check_supply(study)
    except ValidationError as error:
        raise StudyError("\n".join(_explained(one, kind.model, lines) for one in error.errors())) from None
    except StudyError as error:
        raise StudyError(_place(str(error), lines)) from None
    return study


def _check_supply(study: SupplyStudy) -> None:
    life, checkpoints = study.life, study.supply.checkpoints
    stream = stream_of(life, "life")
    if not isinstance(stream, PermutedMNIST):
        raise StudyError(f"life.stream: tickets are looked for on whole tasks, which {stream.name} does not have")
    seeds_of(life, "life")
    found = variants_of(life, "life", "life")
    if len(found) > len(life.methods):
        raise StudyError("life.methods: a list of values is a grid; here every method has one setting")
    if any(variant.network != found[0].network for variant in found):
        raise StudyError("life.methods: all methods train the network of life.network here")
    for step in checkpoints:
        if step % stream.task_length() or step % life.bin:
            raise StudyError(
                f"supply.checkpoints has {step}; it must end a task of {stream.task_length()} steps and a bin of "
                f"{life.bin}"
            )
    for name in ("measure_every", "measures", "plasticity_every", "judged_by"):
        if getattr(life, name):
            raise StudyError(f"life.{name}: a life is looked at at its checkpoints, by what supply says; leave it out")
    if checkpoints[-1] != life.steps:
        raise StudyError(f"life.steps is {life.steps}; it must be the last of supply.checkpoints, {checkpoints[-1]}")


def _explained(error: Any, model: type[BaseModel], lines: Lines) -> str:
    """What is wrong with one setting."""
    path = [str(key) for key in error["loc"]]
    where = ".".join(path)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        owner: Any = model
        for key in path[:-1]:
            owner = _within(owner, key)
        known = [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else owner.model_fields
        return _place(f"{where}: {path[-1]!r} is not a key here; {nearest(path[-1], known)}", lines)
    if error["type"] in ("missing", "missing_argument"):
        return _place(f"{where} is missing", lines)
    if error["type"] == "value_error":
        return _place(f"{where}: {error['msg'].removeprefix('Value error, ')}", lines)
    return _place(f"{where} is {error['input']!r}: {error['msg'].lower()}", lines)


def _within(owner: Any, key: str) -> Any:
    """The type of what stands under a key of a mapping, in a tuple, or in a record."""
    inside = [part for part in typing.get_args(owner) if part is not ...]
    if typing.get_origin(owner) is types.UnionType:
        owner = next(part for part in inside if part is not type(None))
    elif inside:
        return inside[-1]
    return typing.get_type_hints(owner)[key]


def _name(source: str) -> str:
    return source if not Path(source).suffix else Path(source).stem


def parse_setting(text: str) -> tuple[str, Any]:
    """``key=value`` of ``--set``: the dotted key, and the value as YAML; ``a,b`` is a list."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise StudyError(f"--set {text!r}: write key=value, for example steps=1000 or methods.adam.rule.lr=1e-3,1e-4")
    source = f"[{value}]" if "," in value and not value.lstrip().startswith(("[", "{")) else value
    try:
        parsed = yaml.safe_load(source)
    except yaml.YAMLError:
        raise StudyError(f"--set {text!r}: {value!r} is not a value that YAML can read") from None
    return key.strip(), parsed


def _read(source: str, lines: Lines, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """A study's tree: what it builds on is read, and experiments stand under ``parts`` unless it is of another kind.

    ``above`` are the studies that build on this one.
    """
    if source in above:
        raise StudyError(f"a study builds on itself: {' on '.join([*above, source])}; let one of them stand alone")
    above = (*above, source)
    tree = _tree(source, lines)
    if "study" in tree:
        return _built(tree, lines, above)
    if _kind_of(tree) is not None:
        return tree
    if "parts" not in tree:
        part = {k: v for k, v in tree.items() if k not in _BESIDE}
        tree = {k: tree[k] for k in _BESIDE if k in tree} | {"parts": {"main": part}}
        moved = {k if k.partition(".")[0] in _BESIDE else f"parts.main.{k}": v for k, v in lines.items()}
        lines.clear()
        lines.update(moved)
    else:
        for key, part in tree["parts"].items():
            tree["parts"][key] = _extended(key, part, lines, above)
    return tree


def _built(tree: dict[str, Any], lines: Lines, above: tuple[str, ...]) -> dict[str, Any]:
    """A whole study that builds on another: ``study: name``, with ``methods`` to keep and settings to ``set``."""
    known = (*_HEAD, "study", "methods", "set")
    for key in tree:
        if key not in known:
            raise StudyError(
                f"{lines[key]}: {key!r} is not a key of a study that builds on another; {nearest(key, known)} "
                "Settings of the other are changed under set."
            )
    methods, settings = tree.get("methods"), tree.get("set") or {}
    if methods is not None and not (isinstance(methods, list) and all(isinstance(name, str) for name in methods)):
        raise StudyError(f"{lines['methods']}: methods is {methods!r}; here it is a list of names to keep")
    if not isinstance(settings, dict):
        raise StudyError(f"{lines['set']}: set is {settings!r}; it holds settings of {tree['study']}, as steps: 1000")
    inner: Lines = {}
    base = _read(str(tree["study"]), inner, above)
    if methods is not None:
        _keep(base, methods, f"{lines['methods']}: methods")
    for dotted, value in settings.items():
        _change(base, str(dotted), value, f"{lines[f'set.{dotted}']}: set.{dotted}", inner)
    for key in _HEAD:
        base.pop(key, None)
        inner.pop(key, None)
    head = {key: tree[key] for key in _HEAD if key in tree}
    places = {key: lines[key] for key in head}
    lines.clear()
    lines.update(inner | places)
    return head | base


def _keep(tree: dict[str, Any], methods: Sequence[str], asked: str) -> None:
    """Drop all methods but those named, and parts that have none of them."""
    kind = _kind_of(tree)
    roots = tree["parts"] if kind is None else {key: tree.get(key) for key in kind.roots}
    before = list(roots)
    having = {key: r for key, r in roots.items() if isinstance(r, dict) and isinstance(r.get("methods"), dict)}
    known = {name for root in having.values() for name in root["methods"]}
    if not known:
        raise StudyError(f"{asked}: the study does not compare methods by name, so none can be chosen")
    if not methods:
        raise StudyError(f"{asked} is empty; known: {', '.join(sorted(known))}")
    for name in methods:
        if name not in known:
            raise StudyError(f"{asked}: the study has no method {name!r}; {nearest(name, sorted(known))}")
    for key, root in having.items():
        root["methods"] = {name: entry for name, entry in root["methods"].items() if name in methods}
        if kind is None and not root["methods"]:
            del tree["parts"][key]
    figure = tree.get("figure")
    if kind is None and isinstance(figure, dict) and isinstance(figure.get("panels"), list):
        _keep_panels(tree, methods, before)


def _keep_panels(tree: dict[str, Any], methods: Sequence[str], before: Sequence[str]) -> None:
    """Drop the panels that show none of the methods or a part that is gone, and the figure with the last of them.

    ``before`` are the parts that there were; a panel that names none shows the first.
    """
    first, gone = before[0], set(before) - set(tree["parts"])
    kept = []
    for panel in tree["figure"]["panels"]:
        if isinstance(panel, dict) and isinstance(panel.get("methods"), list):
            panel["methods"] = [name for name in panel["methods"] if name in methods]
            if not panel["methods"]:
                continue
        part = None if not isinstance(panel, dict) or panel.get("lines") == "parts" else panel.get("part") or first
        if not isinstance(part, str) or part not in gone:
            kept.append(panel)
    tree["figure"]["panels"] = kept
    if not kept:
        del tree["figure"]


def _tree(source: str, lines: Lines) -> dict[str, Any]:
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        try:
            text, label = path.read_text(), str(path)
        except OSError as error:
            raise StudyError(f"the study file {source} cannot be read: {error.strerror or error}") from None
    else:
        known = shipped()
        if source not in known:
            raise StudyError(
                f"there is no study {source!r}; {nearest(source, known)} A study of your own is a path ending in .yaml"
            )
        text, label = known[source], f"{source}.yaml"
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None:
            _note(node, "", label, lines)
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise StudyError(f"{label} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise StudyError(f"{label} holds no study: it needs keys such as stream, network, steps, seeds and methods")
    return tree


def _note(node: yaml.Node, prefix: str, label: str, lines: Lines) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[Hashable] = set()
    for key, value in node.value:
        place = f"{label}, line {key.start_mark.line + 1}"
        if key.value in seen:
            raise StudyError(f"{place}: {prefix}{key.value} stands here a second time; keep one of the two")
        seen.add(key.value)
        lines[prefix + key.value] = place
        _note(value, f"{prefix}{key.value}.", label, lines)


def _extended(key: str, part: Any, lines: Lines, above: tuple[str, ...]) -> Any:
    """A part that builds on another study (``study: name``), with its own keys in place of that study's."""
    if not isinstance(part, dict) or "study" not in part:
        return part
    inner: Lines = {}
    base = _read(str(part["study"]), inner, above)
    if list(base.get("parts", ())) != ["main"]:
        what = "has parts itself" if "parts" in base else "is a study of another kind"
        raise StudyError(f"parts.{key}.study: {part['study']} {what}; name one with a stream and without parts")
    merged = dict(base["parts"]["main"])
    for line, place in inner.items():
        if line.startswith("parts.main."):
            lines.setdefault(f"parts.{key}.{line.removeprefix('parts.main.')}", place)
    for name, value in part.items():
        if name != "study":
            merged[name] = value
    return merged


def _change(tree: dict[str, Any], dotted: str, value: Any, asked: str, lines: Lines) -> None:
    """Set a dotted key; without ``parts.`` in front it means every part."""
    kind = _kind_of(tree)
    if kind is not None:
        _change_of_kind(kind, tree, dotted, value, asked, lines)
        return
    keys = dotted.split(".")
    if keys[0] in tree["parts"]:
        keys.insert(0, "parts")
    whole = keys[0] in ("parts", *_BESIDE)
    roots = {"": tree} if whole else {f"parts.{key}.": part for key, part in tree["parts"].items()}
    known: set[str] = set()
    missing = keys[0]
    done = False
    for prefix, root in roots.items():
        at = root
        for depth, key in enumerate(keys[:-1]):
            if isinstance(at, dict) and key in at:
                if at[key] is None:
                    at[key] = {}
                at = at[key]
                continue
            known |= set(at) if isinstance(at, dict) else set()
            missing = key
            if len(roots) == 1:
                so_far = ".".join(keys[: depth + 1])
                raise StudyError(f"{asked}: there is no {so_far!r}; {nearest(key, known)}")
            break
        else:
            if isinstance(at, dict):
                at[keys[-1]] = value
                for known_by in range(max(1, len(keys) - 1), len(keys) + 1):  # a component's mistakes are its owner's
                    lines[prefix + ".".join(keys[:known_by])] = asked
                done = True
    if not done:
        raise StudyError(f"{asked}: no part of the study has it; {nearest(missing, known)}")


def _change_of_kind(kind: _Kind, tree: dict[str, Any], dotted: str, value: Any, asked: str, lines: Lines) -> None:
    keys = kind.short.get(dotted, dotted).split(".")
    if keys[0] not in (*kind.roots, *_HEAD):
        having = [root for root in kind.roots if isinstance(tree.get(root), dict) and keys[0] in tree[root]]
        keys.insert(0, (having or kind.roots)[0])
    at: Any = tree
    for key in keys[:-1]:
        at = at.setdefault(key, {})
        if not isinstance(at, dict):
            raise StudyError(f"{asked}: {key!r} has no settings of its own")
    at[keys[-1]] = value
    lines[".".join(keys)] = asked


def _check(key: str, part: Part) -> None:
    where = f"parts.{key}"
    seeds_of(part, where)
    stream_of(part, where)
    variants = variants_of(part, key, where)
    _check_metric(part, variants, where)
    if part.bin > part.steps:
        raise StudyError(f"{where}.bin is {part.bin}, longer than the run of {part.steps} steps; make it at most that")
    if part.measure_every is not None and part.measure_every % part.bin:
        raise StudyError(f"{where}.measure_every is {part.measure_every}; it must be a multiple of bin, {part.bin}")


def _check_metric(part: Part, variants: Sequence[Variant], where: str) -> None:
    """That every method has what the part is judged by, and that what is to be measured can be."""
    for name in part.measures:
        if name not in MEASURABLE:
            hint = AMBIGUOUS.get(name) or nearest(name, MEASURABLE)
            raise StudyError(f"{where}.measures names {name!r}, which a population does not measure; {hint}")
    if part.judged_by is None:
        return
    for variant in variants:
        known = _measured(part, [variant], where)
        if part.judged_by not in known:
            raise StudyError(
                f"{where}.judged_by is {part.judged_by!r}, which nothing measures with {variant.method}; "
                f"{nearest(part.judged_by, known)}"
            )


def _measured(part: Part, variants: Sequence[Variant], where: str) -> list[str]:
    """Every metric that a part's run records of some of the variants."""
    stream = stream_of(part, where)
    every = ["online_loss", *MEASURED, *part.measures]
    every += ["online_accuracy"] if stream.task == "classification" else []
    every += ["sample_plasticity"] if part.plasticity_every else []
    every += ["test_accuracy"] if stream.holds_out else []
    return [*every, *(name for variant in variants for method in variant.interventions for name in method.MEASURES)]


def _check_figure(study: Study) -> None:
    """That every panel of the figure shows what there is."""
    for at, panel in enumerate(study.figure.panels if study.figure else ()):
        where = f"figure.panels.{at}"
        if panel.part is not None and panel.lines == "parts":
            raise StudyError(f"{where}.part is {panel.part!r}, but with a line a part all are shown; leave it out")
        if panel.part is not None and panel.part not in study.parts:
            raise StudyError(f"{where}.part is {panel.part!r}; {nearest(panel.part, study.parts)}")
        keys = list(study.parts) if panel.lines == "parts" else [panel.part or next(iter(study.parts))]
        judged = {key: _judged_by(study.parts[key], key) for key in keys}
        if panel.metric is None and len(set(judged.values())) > 1:
            told = ", ".join(f"{key} by {metric}" for key, metric in judged.items())
            raise StudyError(f"{where}: its parts are judged by different metrics ({told}); add metric")
        for key in keys:
            part = study.parts[key]
            for name in panel.methods or ():
                if name not in part.methods:
                    raise StudyError(f"{where}.methods: part {key} has no {name!r}; {nearest(name, part.methods)}")
            shown = [v for v in variants_of(part, key, f"parts.{key}") if v.method in (panel.methods or part.methods)]
            known = _measured(part, shown, f"parts.{key}")
            if panel.metric is not None and panel.metric not in known:
                raise StudyError(
                    f"{where}.metric is {panel.metric!r}, which nothing measures in part {key}; "
                    f"{nearest(panel.metric, known)}"
                )


def _judged_by(part: Part, key: str) -> str:
    usual = "online_accuracy" if stream_of(part, f"parts.{key}").task == "classification" else "online_loss"
    return part.judged_by or usual


_PART_MODELS: dict[int, type[BaseModel]] = {1: Study, 3: Part}
_FIGURE_MODELS: dict[int, type[BaseModel]] = {1: Study, 2: MainFigure, 4: Panel}


def _explain(error: ValidationError, lines: Lines) -> str:
    found = []
    for one in error.errors():
        path = [str(k) for k in one["loc"]]
        where = ".".join(path)
        models = _FIGURE_MODELS if path[0] == "figure" else _PART_MODELS
        if one["type"] == "extra_forbidden":
            known = list(models.get(len(path), MethodEntry).model_fields)
            found.append(_place(f"{where}: {path[-1]!r} is not a key here; {nearest(path[-1], known)}", lines))
        elif one["type"] == "missing":
            field = models.get(len(path), MethodEntry).model_fields[path[-1]]
            place = _place(f"{'.'.join(path[:-1])}: {path[-1]!r} is missing: {field.description or ''}", lines)
            found.append(place.removesuffix(": "))
        else:
            found.append(_place(f"{where} is {one['input']!r}: {one['msg'].lower()}", lines))
    return "\n".join(found)


def _place(message: str, lines: Lines) -> str:
    """The message with the file and line of the longest key that it begins with."""
    dotted = message.split(":")[0].split(" ")[0]
    keys = dotted.split(".")
    shown = message.replace("parts.main.", "")
    for count in range(len(keys), 0, -1):
        if ".".join(keys[:count]) in lines:
            return f"{lines['.'.join(keys[:count])]}: {shown}"
    return shown


def same_settings(one: str, other: str) -> bool:
    """Whether two studies, as :func:`as_yaml` writes them, differ at most in title, description, source and figure."""
    return one == other or (_settings(one) is not None and _settings(one) == _settings(other))


def _settings(text: str) -> str | None:
    """A study without what is told and drawn of it, in its own order, which counts; None if the text is no study."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    if not isinstance(tree, dict):
        return None
    return str(yaml.safe_dump({k: v for k, v in tree.items() if k == "name" or k not in _BESIDE}, sort_keys=False))


def as_yaml(study: BaseModel | Sequence[Any]) -> str:
    """A study as the YAML that reproduces it."""
    if isinstance(study, BaseModel):
        data: Any = study.model_dump(exclude_none=True, mode="python" if isinstance(study, Study) else "json")
    else:
        data = study
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100))
