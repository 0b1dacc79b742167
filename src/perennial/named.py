"""Making something by its name in a table, with settings as a YAML file gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
