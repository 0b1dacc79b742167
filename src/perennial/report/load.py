"""What a run directory holds, read once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from perennial.streams import REGISTRY, Stream

RESULTS = {
    "part": pl.String,
    "method": pl.String,
    "settings": pl.String,
    "seed": pl.Int64,
    "metric": pl.String,
    "step": pl.Int64,
    "value": pl.Float64,
}
"""Columns of the results."""


class NotARunDirectoryError(FileNotFoundError):
    """A directory lacks what every run directory holds."""


class NoResultsError(ValueError):
    """A run directory holds no results that a report could show."""


@dataclass(frozen=True)
class Method:
    """A method of a part, as the study names it."""

    key: str
    """Name in the study; fixes the colour."""
    label: str
    """Name for readers."""
    linear: bool
    """Whether it trains a linear map in place of the part's network: the reference line."""
    plain: bool
    """Whether it is gradient descent without anything else: what costs are relative to."""


@dataclass(frozen=True)
class Part:
    """One part of a study: a stream, a network, and the methods compared on them."""

    key: str
    """Name in the study."""
    title: str
    """Name for readers."""
    stream: dict[str, Any]
    """Name and settings of the stream."""
    network: dict[str, Any]
    """Name and settings of the network."""
    steps: int
    """In the whole run."""
    judged_by: str | None
    """The metric that the study says."""
    seeds: tuple[int, ...]
    """One lane of each method and setting for each."""
    methods: tuple[Method, ...]
    """In the study's order."""
    batch: int = 1
    """Examples a step."""

    @property
    def counted(self) -> str:
        """What steps are counted in: examples where each has one."""
        return "examples" if self.batch == 1 else "steps"

    def task_steps(self) -> int | None:
        """Steps of a task; None where the stream has no tasks, or does not know them without data that is absent."""
        settings = {name: value for name, value in self.stream.items() if name != "name"}
        kind = _kind(self.stream["name"])
        try:
            return kind(**settings).task_length() if kind is not None else None
        except (TypeError, ValueError, FileNotFoundError):
            return None


@dataclass(frozen=True)
class Panel:
    """A panel of the main figure, as the study says it."""

    title: str
    """Its heading; empty: the metric's name."""
    metric: str | None
    """What is drawn; None: what the part is judged by."""
    part: str | None
    """Of which part; None: the first."""
    methods: tuple[str, ...] | None
    """Of which methods; None: all."""
    lines: str
    """``methods``, ``settings`` or ``parts``."""


@dataclass(frozen=True)
class MainFigure:
    """The figure at the top of a report, as the study says it."""

    title: str
    """Its heading."""
    axis: str
    """``steps`` or ``tasks``."""
    panels: tuple[Panel, ...]
    """In reading order."""


@dataclass(frozen=True)
class Run:
    """A run directory."""

    directory: Path
    """Where it is."""
    name: str
    """The study's name."""
    title: str
    """The study's name for readers."""
    source: str
    """Where the study comes from."""
    description: str
    """What the study asks."""
    parts: tuple[Part, ...]
    """In the study's order."""
    figure: MainFigure | None
    """The figure at the top."""
    study_text: str
    """The expanded study as it stands in the file."""
    environment: dict[str, str | None]
    """Command, versions, machine and times."""
    results: pl.DataFrame
    """One row a number; columns :data:`RESULTS`. A value is null or NaN once its lane has diverged."""
    diverged: dict[tuple[str, str, str, int], int]
    """(part, method, settings, seed) -> step, for the lanes known to have diverged."""
    timings: list[dict[str, Any]]
    """One entry a compiled program; empty while there are none."""
    finished: bool
    """Whether these are the whole run's results."""


def load(directory: Path) -> Run:
    """Read a run directory, finished or not.

    Raises:
        NotARunDirectoryError: ``study.yaml`` or ``environment.json`` is missing.
        NoResultsError: there are no results yet, or they do not belong to the study beside them.
    """
    directory = Path(directory)
    for name in ("study.yaml", "environment.json"):
        if not (directory / name).is_file():
            raise NotARunDirectoryError(
                f"{directory} is not a run directory: it has no {name}. Name a directory that `perennial run` made"
            )
    text = (directory / "study.yaml").read_text(encoding="utf-8")
    study = yaml.safe_load(text)
    alone = len(study["parts"]) == 1
    parts = tuple(_part(key, part, alone) for key, part in study["parts"].items())
    whole = directory / "results.parquet"
    files = [whole] if whole.is_file() else sorted(directory.glob("jobs/*/segment-*.parquet"))
    lanes, timings = directory / "lanes.parquet", directory / "timings.json"
    return Run(
        directory=directory,
        name=study["name"],
        title=study.get("title") or study["name"],
        source=study.get("source") or "",
        description=study.get("description") or "",
        parts=parts,
        figure=_figure(study.get("figure")),
        study_text=text,
        environment=json.loads((directory / "environment.json").read_text(encoding="utf-8")),
        results=_results(directory, files, parts),
        diverged=_diverged(lanes) if lanes.is_file() else {},
        timings=json.loads(timings.read_text(encoding="utf-8")) if timings.is_file() else [],
        finished=whole.is_file(),
    )


def _part(key: str, part: dict[str, Any], alone: bool) -> Part:
    seeds = part["seeds"]
    return Part(
        key=key,
        # The key of a study's only part tells nothing; what is learned does.
        title=part.get("title") or (str(part["stream"]["name"]).replace("_", " ").capitalize() if alone else key),
        stream=part["stream"],
        network=part["network"],
        steps=int(part["steps"]),
        judged_by=part.get("judged_by"),
        seeds=tuple(range(seeds) if isinstance(seeds, int) else seeds),
        methods=tuple(_method(name, method) for name, method in part["methods"].items()),
        batch=int(part["stream"].get("batch_size") or _usual_batch(part["stream"]["name"])),
    )


def _figure(figure: dict[str, Any] | None) -> MainFigure | None:
    if figure is None:
        return None
    panels = tuple(
        Panel(
            title=panel.get("title") or "",
            metric=panel.get("metric"),
            part=panel.get("part"),
            methods=tuple(panel["methods"]) if panel.get("methods") is not None else None,
            lines=panel.get("lines") or "methods",
        )
        for panel in figure["panels"]
    )
    return MainFigure(figure["title"], figure.get("axis") or "steps", panels)


def _usual_batch(stream: str) -> int:
    """Examples a step of a stream that does not say: its default, 1 if it is not known here."""
    return int(getattr(_kind(stream), "batch_size", 1))


def _kind(stream: str) -> type[Stream] | None:
    return next((kind for kind in REGISTRY if kind.name == stream), None)


def _method(key: str, method: dict[str, Any]) -> Method:
    rule, network = method.get("rule") or {}, method.get("network") or {}
    bare = not method.get("interventions") and not network
    return Method(
        key=key,
        label=method.get("label") or key,
        linear=network.get("name") == "linear",
        plain=bare and rule.get("name") == "sgd" and not rule.get("weight_decay") and not rule.get("momentum"),
    )


def _results(directory: Path, files: list[Path], parts: tuple[Part, ...]) -> pl.DataFrame:
    frames = [pl.read_parquet(file).select(pl.col(name).cast(kind) for name, kind in RESULTS.items()) for file in files]
    results = pl.concat(frames) if frames else pl.DataFrame(schema=RESULTS)
    if results.is_empty():
        raise NoResultsError(
            f"{directory} has no results yet: neither results.parquet nor jobs/*/segment-*.parquet holds a row. "
            "Wait for the run's first segment, or go on with the run by its command, which is in environment.json"
        )
    named = {(part.key, method.key) for part in parts for method in part.methods}
    stray = sorted(set(results.select("part", "method").unique().iter_rows()) - named)
    if stray:
        raise NoResultsError(
            f"{directory} has results of part {stray[0][0]!r}, method {stray[0][1]!r}, which its study.yaml does not "
            "name: study and results are of different runs. Put back the study.yaml that the run wrote"
        )
    return results


def _diverged(path: Path) -> dict[tuple[str, str, str, int], int]:
    lanes = pl.read_parquet(path).filter(pl.col("diverged").is_not_null())
    rows = lanes.select("part", "method", "settings", "seed", "diverged").iter_rows()
    return {(part, method, settings, seed): step for part, method, settings, seed, step in rows}
