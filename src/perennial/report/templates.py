"""What pages are made of: templates, links to what they hold, files."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def template(name: str) -> Template:
    """A template of this folder. What it shows is escaped; a name that is not given is an error."""
    environment = Environment(
        loader=PackageLoader("perennial.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["commas"] = lambda value: f"{value:,}"
    return environment.get_template(name)


def link(text: str, kind: str) -> str:
    """An address that holds a text itself, so that a page need not load it. ``kind``: its media type."""
    return f"data:{kind};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"


def write_texts(folder: Path, texts: dict[str, str]) -> None:
    """Write files by name into a folder, which is made if absent."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
