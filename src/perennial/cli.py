"""The command line."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from perennial.cli_probe import probe
from perennial.cli_units import units
from perennial.studies import StudyError, as_yaml, load, parse_setting, shipped

app = typer.Typer(
    name="perennial",
    help="Keep neural networks able to learn: run studies of plasticity, and report them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command()(units)
app.command()(probe)
_console = Console()


def _fail(message: object) -> typer.Exit:
    Console(stderr=True).print(f"[bold red]Error:[/] {message}", highlight=False, soft_wrap=True)
    return typer.Exit(1)


StudyArgument = Annotated[str, typer.Argument(help="A study that ships (`perennial list`), or a path to a YAML file.")]
SeedsOption = Annotated[int | None, typer.Option(help="How many seeds, in every part.")]
StepsOption = Annotated[int | None, typer.Option(help="How many steps, in every part.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change any setting, by its dotted name as `perennial show` prints it; a comma list is a grid. "
        "Without `parts.NAME.` in front it is changed in every part that has it. May be repeated.",
    ),
]


ModelOption = Annotated[
    str | None,
    typer.Option(help="The language model of a study that has one: a folder, a name on the hub, or `minilm`."),
]


MethodsOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,NAME",
        help="Only these of the methods that the study compares, by their names in `perennial show`.",
    ),
]


def _study(
    name: str,
    seeds: int | None,
    steps: int | None,
    methods: str | None,
    settings: list[str] | None,
    model: str | None,
) -> Any:
    try:
        changes = dict(parse_setting(text) for text in settings or [])
        if seeds is not None:
            changes["seeds"] = seeds
        if steps is not None:
            changes["steps"] = steps
        if model is not None:
            changes["model"] = model
        chosen = None if methods is None else [part.strip() for part in methods.split(",") if part.strip()]
        return load(name, changes, chosen)
    except StudyError as error:
        raise _fail(error) from None


@app.command()
def run(
    study: StudyArgument,
    seeds: SeedsOption = None,
    steps: StepsOption = None,
    methods: MethodsOption = None,
    settings: SetOption = None,
    model: ModelOption = None,
    out: Annotated[Path | None, typer.Option(help="The run directory. Default: runs/STUDY.")] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with the run that the directory holds; otherwise it is set aside and kept.")
    ] = True,
    device: Annotated[str, typer.Option(help="`cpu`, `cuda`, or `auto`: cuda where there is one.")] = "auto",
    workers: Annotated[int | None, typer.Option(help="Worker processes. Default: one a processor.")] = None,
    save_every: Annotated[float, typer.Option(help="Seconds between checkpoints.", min=0.0)] = 60.0,
) -> None:
    """Run a study and write its report.

    Every method, at every point of its grid, with every seed, becomes a lane; lanes of the same structure are trained
    side by side by one compiled program. Killed or stopped at any moment, the same command goes on where it was, and
    ends with the same results.

    Examples: `perennial run demo`; `perennial run permuted-digits --seeds 30 --set methods.adam.rule.lr=1e-2,1e-3`
    """
    from perennial.cli_report import write_report
    from perennial.runs import RunError, execute

    expanded = _study(study, seeds, steps, methods, settings, model)
    directory = out or Path("runs") / study.replace("/", "-").removesuffix(".yaml")
    try:
        execute(
            expanded,
            directory,
            resume=resume,
            device=device,
            workers=workers,
            save_every=save_every,
            console=Console(stderr=True),
        )
        page = write_report(directory)
    except (RunError, OSError) as error:
        raise _fail(error) from None
    _summary(directory)
    _console.print(f"Report: {page}", soft_wrap=True)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A run directory, finished or not.")],
    film: Annotated[
        bool, typer.Option("--film", help="Also draw what agents do, as strips of frames (studies of control).")
    ] = False,
) -> None:
    """Write a run's report again: report.html, figures and tables, from the results in the directory."""
    from perennial.cli_report import write_film, write_report

    try:
        page = write_report(directory)
        if film:
            for strip in write_film(directory):
                _console.print(f"Frames: {strip}", soft_wrap=True)
    except (ValueError, OSError, RuntimeError) as error:
        raise _fail(error) from None
    _summary(directory)
    _console.print(f"Report: {page}", soft_wrap=True)


def _summary(directory: Path) -> None:
    """The report's table in short: every method at its best setting."""
    from perennial.cli_report import summary_table

    rows = summary_table(directory)
    parts = rows.partition_by("Part", maintain_order=True, as_dict=True) if "Part" in rows.columns else {(None,): rows}
    for (title,), part in parts.items():
        shown = part.drop("Part", strict=False)
        table = Table(*shown.columns, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for method, *cells in shown.iter_rows():
            table.add_row(method, *(cell.partition(" [")[0] for cell in cells))  # intervals are in the report
        _console.print(table)
        _console.print()


@app.command()
def show(
    study: StudyArgument,
    seeds: SeedsOption = None,
    steps: StepsOption = None,
    methods: MethodsOption = None,
    settings: SetOption = None,
    model: ModelOption = None,
) -> None:
    """Print a study with everything spelled out, as YAML that can be saved, changed and run."""
    sys.stdout.write(as_yaml(_study(study, seeds, steps, methods, settings, model)))


@app.command("list")
def list_() -> None:
    """List what ships: studies, streams, networks, methods and penalties with their settings, and metrics."""
    import yaml

    from perennial import methods, networks, streams
    from perennial.lm import PENALTIES
    from perennial.methods import Rule
    from perennial.metrics import METRICS

    for title, entries in (
        ("Studies", {name: yaml.safe_load(text).get("title", "") for name, text in shipped().items()}),
        ("Streams", {s.name: _first_line(s) for s in streams.REGISTRY}),
        ("Networks", {n.name: _first_line(n) for n in networks.REGISTRY}),
        ("Optimizer rules", {m.name: _first_line(m) for m in methods.REGISTRY if issubclass(m, Rule)}),
        ("Interventions", {m.name: _first_line(m) for m in methods.REGISTRY if not issubclass(m, Rule)}),
        ("Probes", {m.name: _first_line(m) for m in methods.PROBES}),
        ("Penalties on LoRA updates", {p.name: _first_line(p) for p in PENALTIES.values()}),
        ("Metrics", {m.name: f"{m.title} [dim](of {m.of})[/]" for m in METRICS.values()}),
    ):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, line in entries.items():
            table.add_row(f"[bold]{name}[/]", line)
        _console.print(table)
        _console.print()


def _first_line(cls: type[Any]) -> str:
    """The first sentence of a docstring, and the settings with their defaults."""
    sentence = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    settings = ", ".join(
        f.name if f.default is dataclasses.MISSING else f"{f.name}={f.default}" for f in dataclasses.fields(cls)
    )
    return sentence + (f" [dim]({settings})[/]" if settings else "")


if __name__ == "__main__":
    app()
