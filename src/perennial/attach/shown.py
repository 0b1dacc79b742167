"""How a keeper is shown: names in groups, lines of bounded length."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

WIDTH = 100
"""Columns."""


def grouped(names: Iterable[str]) -> list[str]:
    """Names that differ in the numbers of their layers as one, with how many they are.

    ``["h.0.q", "h.1.q", "head"]`` is ``["h.*.q (2)", "head"]``. A number at the end of a name stays: in ``net.0`` and
    ``net.2`` it says which layer it is.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"(?<![^.])\d+(?=\.)", "*", name), []).append(name)
    return [f"{key} ({len(same)})" if len(same) > 1 else same[0] for key, same in found.items()]


def wrapped(text: str, indent: int) -> list[str]:
    """A paragraph as lines; the second and later ones are indented by two more."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )
