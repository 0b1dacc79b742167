"""What studies share that compare methods over seeds, one run of one method with one seed at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from perennial.methods import REGISTRY, Intervention
from perennial.optim import OPTIMIZERS
from perennial.storage import read_json

STRICT: dict[str, str] = {"extra": "forbid"}
"""pydantic's configuration of settings: an unknown key is an error."""

INTERVENTIONS: dict[str, type[Intervention]] = {m.name: m for m in REGISTRY if issubclass(m, Intervention)}
"""The interventions of this project by name."""

RULES: dict[str, type[Any]] = {cls.rule.name: cls for cls in OPTIMIZERS.values()}
"""The optimizer rules of this project by name, as torch optimizers."""


class Job(NamedTuple):
    """One run of one method with one seed."""

    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}"

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}-{self.seed}"

    def folder(self, directory: Path) -> Path:
        """Where its results lie."""
        return directory / self.name

    def results(self, directory: Path) -> dict[str, Any] | None:
        """What its ``results.json`` says, as far as it has come; ``finished`` at its end."""
        found: dict[str, Any] | None = read_json(self.folder(directory) / "results.json")
        return found


def jobs(methods: Mapping[str, Any], seeds: Sequence[int]) -> list[Job]:
    """All runs, seed by seed."""
    return [Job(method, seed) for seed in seeds for method in methods]


def check_compared(methods: Mapping[str, Any], seeds: Sequence[int]) -> None:
    """Refuse no methods, and seeds that are not different whole numbers from 0.

    Raises:
        ValueError: says which.
    """
    if not methods:
        raise ValueError("methods is empty; a study compares at least one")
    check_seeds(seeds)


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse seeds that are not different whole numbers from 0.

    Raises:
        ValueError: says so.
    """
    if len(set(seeds)) < len(seeds) or not seeds or min(seeds) < 0:
        raise ValueError(f"seeds is {seeds}; they are different whole numbers from 0, at least one")


def made(known: Mapping[str, Any], kind: str, name: str, settings: Mapping[str, Any], *first: Any) -> Any:
    """Call what stands under a name in a table.

    Args:
        known: the table.
        kind: what its entries are, for messages.
        name: which.
        settings: keywords; text that is a number, as YAML reads 1e-4, becomes one.
        first: what comes before them.

    Raises:
        ValueError: there is no such entry, or it refuses a setting.
    """
    if name not in known:
        raise ValueError(f"there is no {kind} {name!r}; there are {', '.join(known)}")
    try:
        return known[name](*first, **numbers(settings))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind} {name}: {error}") from error


def made_interventions(settings: Mapping[str, Mapping[str, Any] | None]) -> list[Intervention]:
    """Interventions by name, with the settings of each.

    Raises:
        ValueError: as :func:`made`.
    """
    return [made(INTERVENTIONS, "intervention", name, own or {}) for name, own in settings.items()]


def numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with text that is a number as one."""
    return {key: float(value) if _is_number(value) else value for key, value in settings.items()}


def _is_number(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True
