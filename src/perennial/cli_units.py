"""``perennial units``: the unit map of a model, as a table."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from perennial.attach.arguments import as_call, described
from perennial.units import Proof, UnitMap, prove, trace

SHAPE = re.compile(r"(int:)?(\d+(?:,\d+)*)")
"""An input given by its shape."""


class UnitsError(ValueError):
    """What was asked for cannot be shown; the text says why."""


def units(
    factory: Annotated[
        str,
        typer.Argument(metavar="MODULE:FACTORY", help="A function without arguments (or a class) that makes a model."),
    ],
    example: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE|MODULE:FUNCTION",
            help="An input: the shape of a tensor of random numbers, as `2,3,32,32`; `int:2,16` for token ids from 0 "
            "to 9; or a function that returns a tensor, a tuple of arguments or a dict of keywords.",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--prove/--no-prove", help="Prove every layer by perturbing it.")] = True,
) -> None:
    """Show which parameters belong to the hidden units of a model, and what is refused and why.

    Example: `perennial units mypackage.models:make_net --example 2,3,32,32`
    """
    console = Console()
    try:
        model = load_model(factory)
        args, kwargs = load_example(example, factory)
        unit_map = traced(model, args, kwargs, f"--example {example}")
        proofs = {p.layer: p for p in prove(model, unit_map, *args, **kwargs)} if check else {}
    except UnitsError as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console.print(table(unit_map, proofs))
    if unit_map.refused:
        console.print("\nRefused:")
        for name, reason in unit_map.refused:
            console.print(f"  [bold]{name}[/]: {reason}", highlight=False, soft_wrap=True)
    if unit_map.outputs:
        console.print(f"\nOutputs: {', '.join(unit_map.outputs)}", highlight=False, soft_wrap=True)


def load_model(target: str) -> nn.Module:
    """The model that ``MODULE:FACTORY`` makes."""
    made = _named(target)
    if callable(made) and not isinstance(made, nn.Module) and (needed := _required(made)):
        raise UnitsError(
            f"{target} cannot be called without arguments: it needs {', '.join(needed)}. Name a function without "
            "arguments that calls it"
        )
    model = made() if callable(made) and not isinstance(made, nn.Module) else made
    if not isinstance(model, nn.Module):
        raise UnitsError(f"{target} makes a {type(model).__name__}, not a torch.nn.Module")
    return model


def _required(function: Any) -> list[str]:
    """The arguments that a function cannot be called without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in fixed]


def traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: str) -> UnitMap:
    """The unit map of a model on an input; ``given`` is the option that named the input, for the error."""
    try:
        return trace(model, *args, **kwargs)
    except Exception as error:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        embeds = any(isinstance(module, nn.Embedding) for module in model.modules())
        reads_ids = embeds and all(value.is_floating_point() for value in tensors)
        option = given.partition(" ")[0]
        hint = f". For an embedding give whole numbers, as in {option} int:2,16" if reads_ids else ""
        what = " ".join(str(error).split()).removesuffix(".")
        raise UnitsError(
            f"the model cannot be run on {given}, {described((*args, *kwargs.values()))}: {type(error).__name__}: "
            f"{what}{hint}"
        ) from None


def load_example(text: str | None, factory: str, option: str = "--example") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example input that an option names, as positional and keyword arguments."""
    if text is None:
        raise UnitsError(
            f"give {option}, an input for one forward pass of {factory}: a shape as in {option} 2,3,32,32, or a "
            f"function as in {option} mypackage.data:batch"
        )
    shape = SHAPE.fullmatch(text)
    if shape:
        sizes = [int(n) for n in shape[2].split(",")]
        generator = torch.Generator().manual_seed(0)
        if shape[1]:
            return (torch.randint(0, 10, sizes, generator=generator),), {}
        return (torch.randn(sizes, generator=generator),), {}
    if ":" not in text:
        raise UnitsError(f"{option} {text} is neither a shape such as 2,3,32,32 nor MODULE:FUNCTION")
    made = _named(text)
    return as_call(made() if callable(made) else made)


def _named(target: str) -> Any:
    """What ``MODULE:NAME`` names; modules in the current folder are found as with ``python -m``."""
    module, colon, name = target.partition(":")
    if not colon or not module or not name:
        raise UnitsError(f"{target!r} is not of the form MODULE:NAME, such as mypackage.models:make_net")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UnitsError(
            f"cannot import {module}: {error}. Run this in the folder that holds it, or install it"
        ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise UnitsError(f"{module} has no {name}")
        found = getattr(found, part)
    return found


def table(unit_map: UnitMap, proofs: Mapping[str, Proof]) -> Table:
    """The layers of a unit map, one a row."""
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("layer", "units", "kind", "made by", "norms", "read by", *(("proof",) if proofs else ())):
        shown.add_column(title, justify="right" if title == "units" else "left", overflow="fold")
    for layer in unit_map:
        marks = [word for word, true in (("coupled", layer.coupled), ("normed", layer.normed)) if true]
        cells = [", ".join(part.parameter for part in parts) for parts in (layer.incoming, layer.norms, layer.outgoing)]
        proof = proofs.get(layer.name)
        verdict = [] if proof is None else [("proved " if proof.proved else "[red]not proved[/] ") + proof.note]
        shown.add_row(layer.name, str(layer.size), " ".join([layer.kind, *marks]), *cells, *verdict)
    return shown
