"""Files that are there whole or not at all: written beside their place, flushed to disk and renamed over it."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class RunError(RuntimeError):
    """A run that cannot go on; the message says what stands in the way and what to do."""


def write(path: Path, data: bytes) -> None:
    """Replace a file in one go, or leave it as it was.

    Raises:
        RunError: the folder cannot be written or the disk is full; what was there before is intact.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise RunError(
            f"{path} could not be written: {error.strerror or error}. Nothing written before is lost; make room or "
            "choose a folder that can be written, then do the same again"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Replace a file of tensors in dictionaries."""
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    write(path, buffer.getvalue())


def read_tensors(path: Path) -> Any:
    """The tensors in a file, on the CPU, or None where there is no such file; reading runs no code."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        return None


def write_json(path: Path, data: Any) -> None:
    """Replace a JSON file."""
    write(path, (json.dumps(data, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """A JSON file's content, or None where there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
