"""Colour, line and marker of each method: the same in every figure, part and report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from perennial.report.load import Part

Dash = tuple[float, ...]


@dataclass(frozen=True)
class Look:
    """How a method is drawn. Line and marker differ too, so that it reads without colour."""

    colour: str
    """Hexadecimal."""
    dash: Dash = ()
    """Lengths of stroke and gap in points; empty for a solid line."""
    marker: str = ""
    """Matplotlib's name; empty for none."""

    @property
    def marker_path(self) -> str:
        """The marker as an SVG path around (0, 0), for the page's own key."""
        return _MARKERS[self.marker] if self.marker else ""


# Okabe and Ito's palette for colour-blind readers, moved in lightness so that each has a contrast of 3:1 or more with
# white and all stay apart in each kind of colour blindness.
KNOWN = {
    "backprop": Look("#1f1f1f", (), "o"),
    "adam": Look("#9a4208", (6, 2), "s"),
    "l2": Look("#c08c09", (2, 1.4), "D"),
    "shrink_and_perturb": Look("#a861a6", (7, 2, 1.5, 2), "v"),
    "continual_backprop": Look("#1a80e6", (), "^"),
    "upgd": Look("#16a05f", (4, 1.5, 1.5, 1.5, 1.5, 1.5), "P"),
    "linear": Look("#767676", (4, 3)),
}
"""Methods that every report draws the same way."""

OTHERS = (
    Look("#176076", (5, 2.5), "<"),
    Look("#5b3df0", (), "s"),
    Look("#e04048", (2, 1.4), ">"),
    Look("#5f403b", (7, 2, 1.5, 2), "D"),
    Look("#2c2c82", (), "v"),
    Look("#3e3b0f", (4, 1.5, 1.5, 1.5, 1.5, 1.5), "o"),
)
"""For other methods, in the order in which the study first names them; after the last their colours again, with other
lines and markers."""

LINEAR_DASHES: tuple[Dash, ...] = ((4, 3), (1.5, 2.5), (9, 3))
"""Grey reference lines, if there are several."""

_MARKERS = {
    "o": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z",
    "s": "M-2.7 -2.7h5.4v5.4h-5.4z",
    "D": "M0 -3.6L3.6 0L0 3.6L-3.6 0z",
    "v": "M-3.3 -2.6h6.6L0 3.6z",
    "^": "M-3.3 2.6h6.6L0 -3.6z",
    "<": "M2.6 -3.3v6.6L-3.6 0z",
    ">": "M-2.6 -3.3v6.6L3.6 0z",
    "P": "M-1.2 -3.6h2.4v2.4h2.4v2.4h-2.4v2.4h-2.4v-2.4h-2.4v-2.4h2.4z",
}


def looks(parts: Iterable[Part]) -> dict[str, Look]:
    """A look for every method key of a study. Methods on a linear map are grey and dashed, whatever their key."""
    found: dict[str, Look] = {}
    others, lines = 0, 0
    for part in parts:
        for method in part.methods:
            if method.key in found:
                continue
            if method.linear:
                found[method.key] = Look(KNOWN["linear"].colour, LINEAR_DASHES[lines % len(LINEAR_DASHES)])
                lines += 1
            elif method.key in KNOWN:
                found[method.key] = KNOWN[method.key]
            else:
                found[method.key] = other(others)
                others += 1
    return found


def other(at: int) -> Look:
    """The look of the so-manieth (from 0) method that is not known: no two of the first 36 are the same."""
    turn, place = divmod(at, len(OTHERS))
    apart = OTHERS[(place + turn) % len(OTHERS)]
    return Look(OTHERS[place].colour, apart.dash, apart.marker)
