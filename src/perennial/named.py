"""Things that a study names, made with the settings that it gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def made(known: Mapping[str, Any], kind: str, name: str, settings: Mapping[str, Any], *first: Any) -> Any:
    """What a name stands for, called with ``first`` and the settings.

    Raises:
        ValueError: there is no such thing, or it does not take these settings; says which there are, or why.
    """
    if name not in known:
        raise ValueError(f"there is no {kind} {name!r}; there are {', '.join(known)}")
    try:
        return known[name](*first, **{k: float(v) if _is_number(v) else v for k, v in settings.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{kind} {name}: {error}") from error


def _is_number(value: Any) -> bool:
    """YAML reads 1e-4 as text."""
    if isinstance(value, (bool, int)) or not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True
