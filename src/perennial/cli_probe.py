"""``perennial probe``: the health of saved networks, as tables, findings, JSON and a page."""

from __future__ import annotations

import contextlib
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from perennial.attach.arguments import as_call, bare_model, described
from perennial.checkpoints import CheckpointError, present, read_tensors, sha256
from perennial.cli_units import SHAPE, UnitsError, load_example, load_model, traced
from perennial.metrics import METRICS
from perennial.probe import Data, Probe, ProbeError, cell
from perennial.probe import probe as probed
from perennial.units import UnitMap, trace

FILES = (".npy", ".npz", ".safetensors", ".pt", ".pth")
"""Kinds of files that data can be in."""


def probe(
    factory: Annotated[
        str,
        typer.Argument(metavar="MODULE:FACTORY", help="A function without arguments (or a class) that makes a model."),
    ],
    checkpoint: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="A saved network: `.safetensors`, what `torch.save` wrote, Stable-Baselines3's `.zip`, or a folder of "
            "`save_pretrained`. Repeat it for several of one run.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|MODULE:FUNCTION|SHAPE",
            help="What to read it on: `.npy`, `.npz`, `.safetensors` or `.pt`; a function that returns a tensor, a "
            "tuple or a dict of keywords; or a shape, as `256,3,32,32` or `int:64,16`, for random numbers.",
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The start of the run, for comparison. Default: the first of several."),
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Take this metric and no others. May be repeated.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="Where in the file the state dict is, as `agent.actor`. Default: it is looked for."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="At most so many samples of the data.")] = 1000,
    out: Annotated[Path | None, typer.Option(help="A folder for probe.json and probe.html.")] = None,
) -> None:
    """Show the health of a saved network, or how it changes over the checkpoints of a run.

    Checkpoints are loaded without running what is in them; files that need code to be loaded are refused.

    Example: `perennial probe mypackage.models:make_net --checkpoint step_1000.pt --data batch.npy`
    """
    from perennial.storage import RunError

    console, errors = Console(), Console(stderr=True)

    def watched(places: Sequence[int]) -> Iterable[int]:
        return track(places, "Reading", console=errors, transient=True) if len(places) > 1 else places

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what no checkpoint holds is the same every time
            model = _model(factory)
            given = load_data(data, factory, samples, model)
            unit_map = _traced(model, given)
        found = probed(
            model,
            unit_map,
            given,
            checkpoint,
            name=factory,
            start=start,
            metrics=metric or (),
            key=key,
            watched=watched,
        )
        show(found, console)
        if out is not None:
            write(found, out)
    except (UnitsError, ProbeError, CheckpointError, RunError, OSError) as error:
        errors.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if out is not None:
        console.print(f"\nPage: {escape(str(out / 'probe.html'))}", highlight=False, soft_wrap=True)


def _model(factory: str) -> nn.Module:
    model = bare_model(load_model(factory))
    if any(p.is_meta for p in model.parameters()):
        raise UnitsError(f"{factory} makes a network on the meta device: make one with real weights")
    return model.cpu()


def _traced(model: nn.Module, data: Data) -> UnitMap:
    """The map does not depend on how many samples there are, its cost does."""
    if any(is_lazy(p) for p in model.parameters()):
        with torch.no_grad(), contextlib.suppress(Exception):  # what is wrong is said below
            model(*data.args, **data.kwargs)
    try:
        args, kwargs = first(data.args, 8, data.samples), first(data.kwargs, 8, data.samples)
        return trace(model, *args, **kwargs)
    except Exception:  # not all inputs are one sample after another; or it does not run at all, which is said here
        return traced(model, data.args, data.kwargs, f"--data {data.given}")


def load_data(text: str | None, factory: str, samples: int, model: nn.Module) -> Data:
    """What ``--data`` names, at most so many samples of it, on the CPU."""
    if text is None:
        raise UnitsError(
            f"give --data, inputs for {factory}: a file ({', '.join(FILES)}), a function as in --data "
            "mypackage.data:batch, or a shape as in --data 256,3,32,32 for random numbers"
        )
    sha = ""
    kind: Literal["random", "function", "file"]
    if SHAPE.fullmatch(text):
        kind = "random"
        args, kwargs = load_example(text, factory, "--data")
    elif Path(text).suffix.lower() in FILES:
        kind = "file"
        args, kwargs = as_call(_from_file(Path(text)))
        sha = sha256(Path(text))
    else:
        kind = "function"
        if ":" not in text:
            raise UnitsError(f"--data {text} is neither a file ({', '.join(FILES)}) nor a shape nor MODULE:FUNCTION")
        args, kwargs = load_example(text, factory, "--data")
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.dim()]
    of = len(tensors[0]) if tensors else 0
    if not of:
        raise UnitsError(f"there is no sample in --data {text}: {described(kwargs or args)}")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if kind != "function":  # a file knows nothing of the network's precision
        args, kwargs = pytree.tree_map(
            lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, (args, kwargs)
        )
    args, kwargs = pytree.tree_map(lambda v: v.detach().cpu() if isinstance(v, Tensor) else v, (args, kwargs))
    return Data(text, kind, first(args, samples, of), first(kwargs, samples, of), min(samples, of), of, sha)


def first(value: Any, count: int, of: int) -> Any:
    """The first samples of every tensor that has one a row."""
    return pytree.tree_map(lambda v: v[:count] if isinstance(v, Tensor) and v.dim() and len(v) == of else v, value)


def _from_file(path: Path) -> Any:
    """A tensor, a tuple of them, or keywords."""
    try:
        if path.suffix.lower() not in (".npy", ".npz"):
            found = read_tensors(path)
            if isinstance(found, dict) and len(found) == 1 and path.suffix == ".safetensors":
                return next(iter(found.values()))
            if not isinstance(found, (Tensor, tuple, list, dict)):
                raise UnitsError(f"{path} holds a {type(found).__name__}: save a tensor, a tuple or a dict of tensors")
            return found
        present(path)
    except CheckpointError as error:
        raise UnitsError(f"--data: {error}") from None
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"": loaded}
        tensors = {name: torch.from_numpy(a.astype(a.dtype.newbyteorder("="))) for name, a in arrays.items()}
    except Exception as error:
        what = " ".join(str(error).split()).partition(". If you trust")[0]
        raise UnitsError(f"--data: {path} holds no plain arrays of numbers: {what}") from None
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors


def write(found: Probe, folder: Path) -> None:
    """Write ``probe.json`` and ``probe.html``, each whole or not at all.

    Raises:
        RunError: the folder cannot be written.
    """
    from perennial.report.probe_page import page
    from perennial.storage import write as replace

    text = json.dumps(found.as_json(), indent=2, ensure_ascii=False, allow_nan=False)
    html = page(found)
    replace(folder / "probe.json", f"{text}\n".encode())
    replace(folder / "probe.html", html.encode())


def show(found: Probe, console: Console) -> None:
    """Print tables, what is left out, findings and notes."""
    last = found.checkpoints[-1]

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(f"[bold]{escape(found.model)}[/] on {escape(str(found.data))}")
    for note in found.notes:
        say(f"[yellow]Note:[/] {escape(note)}")
    if len(found.checkpoints) > 1:
        say("\n[bold]The network, checkpoint by checkpoint[/]")
        console.print(*_spaced(over_checkpoints(found, console.width)))
    say(f"\n[bold]Layers at {escape(last.label)}[/]" + (f" ({escape(last.path)})" if last.label != last.path else ""))
    console.print(*_spaced(layer_tables(found, console.width)))
    if len(found.checkpoints) == 1:  # otherwise they are in the first table
        network, by_layer = found.readings[-1].network, found.readings[-1].layers.values()
        for name in (name for name in network if not any(name in values for values in by_layer)):
            say(f"{METRICS[name].title}: {cell(name, network[name])}")
    if left_out := found.left_out():
        say("\n[bold]Left out[/]")
        for layers, why in left_out:
            say(f"  {escape(layers)}: {escape(why)}")
    say("\n[bold]Findings[/]")
    for words in found.words() or ["Nothing has crossed a threshold."]:
        say(f"  {escape(words)}")


def over_checkpoints(found: Probe, width: int) -> list[Table]:
    """A row a checkpoint: metrics of the whole network."""
    names = list(dict.fromkeys(name for reading in found.readings for name in reading.network))
    rows = [([saved.label], reading.network) for saved, reading in zip(found.checkpoints, found.readings, strict=True)]
    return _tables(["checkpoint"], rows, names, width)


def layer_tables(found: Probe, width: int) -> list[Table]:
    """A row a layer of the last checkpoint, and the network below."""
    last = found.readings[-1]
    names = list(dict.fromkeys(name for values in last.layers.values() for name in values))
    rows = [([layer, str(last.units[layer])], values) for layer, values in last.layers.items()]
    rows.append((["network", str(sum(last.units.values()))], last.network))
    return _tables(["layer", "units"], rows, names, width)


def _spaced(tables: Sequence[Table]) -> list[Table | str]:
    """An empty line between tables."""
    return [part for table in tables for part in ("", table)][1:]


def _tables(
    heads: Sequence[str], rows: Sequence[tuple[list[str], Mapping[str, float]]], names: Sequence[str], width: int
) -> list[Table]:
    """As many tables as it takes for no number to be cut off, one below the other."""
    gap = 2
    titles = {name: textwrap.wrap(METRICS[name].title, 9, break_long_words=False) for name in names}
    widths = {
        name: gap + max([*map(len, titles[name]), *(len(cell(name, values.get(name))) for _, values in rows)])
        for name in names
    }
    firsts = [max(len(head), *(len(label[at]) for label, _ in rows)) for at, head in enumerate(heads)]
    firsts[0] = min(firsts[0], max(12, width // 3))  # long names are folded
    free = width - sum(firsts) - gap * len(firsts)
    groups: list[list[str]] = [[]]
    for name in names:
        if groups[-1] and sum(widths[n] for n in groups[-1]) + widths[name] > free:
            groups.append([])
        groups[-1].append(name)
    tables = []
    for group in groups:
        table = Table(box=None, padding=(0, gap, 0, 0))
        for at, head in enumerate(heads):
            side: Literal["left", "right"] = "right" if at else "left"
            table.add_column(head, justify=side, overflow="fold", min_width=firsts[at])
        for name in group:
            table.add_column("\n".join(titles[name]), justify="right", no_wrap=True)
        for label, values in rows:
            table.add_row(*map(escape, label), *(cell(name, values.get(name)) for name in group))
        tables.append(table)
    return tables
