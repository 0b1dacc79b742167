"""Sphinx configuration, and the pages that are written from the code.

Every class in the registries of methods, streams and networks gets a page, and so does every study that ships. They are
written to docs/generated when the build begins, so that a new method needs no edit here.
"""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import rst

import perennial
from perennial import methods, metrics, networks, streams, studies

project = "Perennial"
author = "the Perennial authors"
release = version = perennial.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Perennial {release}"
html_copy_source = False

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"

# A reference that leads nowhere is an error. Other libraries' pages are not looked up: that would need the network.
nitpicky = True
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(torch|collections|typing|numpy|polars|pathlib|peft|transformers|gymnasium|stable_baselines3)\..*|Tensor",
    ),
    # Sphinx reads a signature with a default that is no expression, <factory>, by splitting it at commas.
    ("py:class", r"(tuple|dict|Mapping)\[\w+"),
    ("py:class", "Component"),  # the mapping with a name that a study file has for a component
]

GENERATED = Path(__file__).parent / "generated"


def setup(app: Sphinx) -> None:
    """Write the pages before Sphinx looks for sources, and see to docstrings before napoleon does."""
    app.connect("config-inited", lambda *_: write_pages())
    app.connect("autodoc-process-docstring", _keep_colons, priority=400)


def _keep_colons(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon, which comes next, from taking what stands before the first colon of a field's docstring as a type.

    An empty comment in front does it.
    """
    if what in ("attribute", "data", "property") and lines:
        lines[:0] = ["..", ""]


def write_pages() -> None:
    """Bring docs/generated up to date; a page that stays the same is left alone, so Sphinx does not read it again."""
    pages = dict([*_class_pages(), *_metric_pages(), *_study_pages()])
    for name, text in pages.items():
        path = GENERATED / f"{name}.rst"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for path in GENERATED.rglob("*.rst"):
        if path.relative_to(GENERATED).with_suffix("").as_posix() not in pages:
            path.unlink()


def _class_pages() -> Iterator[tuple[str, str]]:
    for method in methods.REGISTRY:
        kind = "An optimizer rule" if issubclass(method, methods.Rule) else "An intervention"
        summary = f"{kind}, ``{method.name}`` in a study."
        yield f"methods/{method.name}", _page(method, summary, _off(method), _state(method), _gate(method))
    for probe in methods.PROBES:
        yield f"methods/{probe.name}", _page(probe, f"A probe, ``{probe.name}`` in a study.", _state(probe))
    for stream in streams.REGISTRY:
        shape = f"{stream().inputs} inputs, {stream().outputs} outputs, {stream.task}"
        yield f"streams/{stream.name}", _page(stream, f"``{stream.name}`` in a study: {shape}.")
    for network in networks.REGISTRY:
        yield f"networks/{network.name}", _page(network, f"``{network.name}`` in a study.")


def _metric_pages() -> Iterator[tuple[str, str]]:
    """A page a metric, and a table of all of them."""
    rows = []
    for name, metric in metrics.METRICS.items():
        better = {"neither": "neither way is better"}.get(metric.better, f"{metric.better} is better")
        verbs = {"rectified": "are exactly zero over a range", "bounded": "have two bounds"}
        verbs["rectified or bounded"] = "are exactly zero over a range, or have two bounds"
        needs = {"": "any", "rectified": "exactly zero over a range", "bounded": "two bounds"}
        applies = needs.get(metric.needs, "exactly zero over a range, or two bounds")
        summary = f"Taken of {metric.of}; in [{metric.low:g}, {metric.high:g}]; {better}."
        if metric.needs:
            summary += f" Of activation functions that {verbs[metric.needs]}."
        record = f".. currentmodule:: perennial.metrics\n\n.. autofunction:: {name}\n"
        yield f"metrics/{name}", "\n".join([_heading(name), f"{metric.title}. {summary}", "", record])
        rows.append(
            (f":doc:`{name}`", metric.title, metric.of, f"{metric.low:g} to {metric.high:g}", metric.better, applies)
        )
    table = [".. list-table::", "   :header-rows: 1", ""]
    for row in (("Name", "What", "Taken of", "Range", "Better", "Activation function"), *rows):
        table += [f"   {'*' if number == 0 else ' '} - {cell}" for number, cell in enumerate(row)]
    words = [f"``{word}``\n   {rst.escape(text)}.\n" for word, text in metrics.registry.AMBIGUOUS.items()]
    toctree = [".. toctree::", "   :hidden:", "", *(f"   {name}" for name in metrics.METRICS)]
    parts = [_heading("Metrics of a network"), *table, "", _heading("Words that mean several things", "-"), *words]
    yield "metrics/index", "\n".join([*parts, *toctree, ""])


def _page(cls: Any, summary: str, *more: str) -> str:
    return "\n".join([_heading(cls.name), summary, "", _record(cls), *more])


def _heading(text: str, line: str = "=") -> str:
    return f"{text}\n{line * len(text)}\n"


def _record(cls: Any, indexed: bool = True) -> str:
    """A class with its docstring, and each field with type, default, range and docstring."""
    owners = [c for c in cls.__mro__ if c.__module__.startswith("perennial")]
    found: dict[str, list[str]] = {}
    annotations: dict[str, Any] = {}
    for owner in reversed(owners):  # fields may be inherited, and said anew
        documented = ModuleAnalyzer.for_module(owner.__module__).find_attr_docs()
        found |= {name: text for (class_name, name), text in documented.items() if class_name == owner.__name__}
        annotations |= vars(owner).get("__annotations__", {})
    is_dataclass = dataclasses.is_dataclass(cls)
    index = "" if indexed else "   :no-index:\n"
    parts = [f".. currentmodule:: {cls.__module__}\n\n.. autoclass:: {cls.__name__}\n{index}"]
    for field in dataclasses.fields(cls) if is_dataclass else cls._fields:
        name = field.name if is_dataclass else field
        annotation = annotations[name]  # a string, which NamedTuple wraps
        written = getattr(annotation, "__forward_arg__", annotation)
        head = [f".. attribute:: {name}", f"   :type: {written}", *([] if indexed else ["   :no-index:"])]
        body = ["\n".join(found.get(name, [])).strip()]
        if is_dataclass:
            head.append(f"   :value: {field.default!r}")
            body.append(_allowed(field))
        text = textwrap.indent("\n\n".join(filter(None, body)), "   ")
        parts.append(textwrap.indent("\n".join([*head, "", text, ""]), "   "))
    return "\n".join(parts)


def _allowed(field: dataclasses.Field[Any]) -> str:
    """The range of a field made by ``number`` or the options of one made by ``choice``, as a sentence."""
    if "options" in field.metadata:
        return "One of " + ", ".join(f"``{option}``" for option in field.metadata["options"]) + "."
    if "low" not in field.metadata:
        return ""
    low, high = field.metadata["low"], field.metadata["high"]
    edges = [f"{'above' if field.metadata['open_low'] else 'at least'} {low:g}"] if low > -math.inf else []
    edges += [f"{'below' if field.metadata['open_high'] else 'at most'} {high:g}"] if high < math.inf else []
    return (" and ".join(edges) or "any number").capitalize() + ". May differ from lane to lane."


def _gate(method: type[methods.Method]) -> str:
    """The picture of what a method protects, where there is one."""
    name = f"gate-{method.name}.svg"
    if not (Path(__file__).parent / "figures" / name).exists():
        return ""
    return "\n".join(
        [
            _heading("What it protects", "-"),
            "Every weight of the first layer of a network that has learned the sum of the first two of its inputs;",
            "what is drawn is said beside the colours. Made by ``python examples/gates.py --out FOLDER``, seed 0.\n",
            f".. figure:: ../../figures/{name}",
            f"   :alt: What {method.__name__} protects, weight by weight, and by whether the input matters\n",
        ]
    )


def _off(method: type[methods.Method]) -> str:
    off = getattr(method, "OFF", {})
    settings = " and ".join(f"``{name}={value:g}``" for name, value in off.items())
    return f"It does nothing, bit for bit, at {settings}.\n" if off else ""


def _state(method: type[methods.Method]) -> str:
    record = typing.get_type_hints(method.init).get("return")
    body = (
        _record(record, record.__module__ == method.__module__)
        if hasattr(record, "_fields")
        else "It keeps no state between steps.\n"
    )
    return f"{_heading('State', '-')}\n{body}"


def _study_pages() -> Iterator[tuple[str, str]]:
    shipped = studies.shipped()
    index = [_heading("Studies")]
    if shipped:
        index += ["The studies that ship with Perennial.\n", ".. toctree::", "   :maxdepth: 1", ""]
        index += [f"   {name}" for name in shipped]
    else:
        index.append("No studies ship with this version.")
    yield "studies/index", "\n".join([*index, ""])
    for name, text in shipped.items():
        yield f"studies/{name}", _study_page(name, text)


def _study_page(name: str, text: str) -> str:
    study = yaml.safe_load(text)
    parts = [_heading(str(study.get("title", name)))]
    for key in ("description", "source"):
        if key in study:
            prefix = "Source: " if key == "source" else ""
            parts.append(prefix + _plain(str(study[key])) + "\n")
    command = f"perennial run {name}"
    for language, code in (("sh", command), ("yaml", text.rstrip())):
        parts.append(f".. code-block:: {language}\n\n{textwrap.indent(code, '   ')}\n")
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Plain text as reStructuredText that shows it as it is; addresses stay links."""
    words = re.split(r"(https?://\S+)", text.strip())
    return "".join(word if word.startswith("http") else rst.escape(word) for word in words)
