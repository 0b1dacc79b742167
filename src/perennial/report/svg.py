"""A matplotlib figure as an SVG that can stand alone and beside others on one page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

FONTS = "'Inter', 'Helvetica Neue', 'Arial', 'Liberation Sans', 'DejaVu Sans', sans-serif"
"""What the reader's machine has of these, the first first. Layout is by DejaVu Sans, the widest of them."""

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 11.0,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "text.color": "#2b2b2b",
    "axes.labelcolor": "#4a4a4a",
    "xtick.color": "#8a8a8a",
    "ytick.color": "#8a8a8a",
    "xtick.labelcolor": "#4a4a4a",
    "ytick.labelcolor": "#4a4a4a",
    "ytick.major.size": 0.0,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Drawing:
    """A figure, ready for a file and for the page."""

    name: str
    """Unique in the report; also the file's name."""
    title: str
    """What it shows."""
    description: str
    """What a reader who does not see it should know."""
    svg: str
    """The ``<svg>`` element."""
    plot_share: float
    """Share of the width up to the labels at the line ends; a narrow screen shows no more, and has the key instead."""


@contextmanager
def drawing_style(name: str) -> Iterator[None]:
    """Matplotlib's own defaults and this report's style over them, whatever the user's settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": name})
        yield


def render(figure: Figure, name: str, title: str, description: str, plot_share: float) -> Drawing:
    """The figure as SVG with a title and a description, the same bytes for the same figure.

    Every id begins with ``name``, so that several figures can stand on one page. Call it inside :func:`drawing_style`.
    """
    file = io.BytesIO()
    nothing: dict[str, object] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue().decode()
    # Inside a page a style element would apply to the whole page; the root's attributes say the same of this figure.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    text = re.sub(r'(?<= id=")', f"{name}-", text)
    text = re.sub(r'(?<=href="#)|(?<=url\(#)', f"{name}-", text)
    opening = re.search(r"<svg[^>]*>", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert opening is not None
    assert box is not None
    root = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" '
        f'aria-labelledby="{name}-title {name}-description" font-family="{FONTS}" '
        'stroke-linejoin="round" stroke-linecap="butt">\n'
        f'<title id="{name}-title">{escape(title)}</title>\n'
        f'<desc id="{name}-description">{escape(description)}</desc>'
    )
    body = text[opening.end() :].strip()
    return Drawing(name, title, description, root + body + "\n", plot_share)
