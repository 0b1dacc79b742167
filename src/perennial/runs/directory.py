"""What a run leaves on disk.

A job's manifest is the one file that says which segments and which checkpoint belong together: it is replaced last, so
that a run killed at any instant finds either the old pair or the new one.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars
import torch
from torch import Tensor

from perennial.storage import read_json, write, write_json

RESULT_SCHEMA = {
    "part": polars.String,
    "method": polars.String,
    "settings": polars.String,
    "seed": polars.Int64,
    "metric": polars.String,
    "step": polars.Int64,
    "value": polars.Float64,
}


def write_table(path: Path, table: polars.DataFrame) -> None:
    """Replace a Parquet file; the same rows give the same bytes."""
    buffer = io.BytesIO()
    table.write_parquet(buffer, compression="zstd", statistics=True)
    write(path, buffer.getvalue())


class JobFolder:
    """The folder of one job: its manifest, its checkpoint, its segments."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = read_json(path / "manifest.json") or {
            "step": 0,
            "finished": False,
            "segments": [],
            "checkpoint": None,
            "train_seconds": 0.0,
            "compile_seconds": 0.0,
            "diverged": [],
        }

    def load(self) -> dict[str, Tensor] | None:
        """The checkpoint's tensors; loading runs no code. None before the first checkpoint."""
        name = self.manifest["checkpoint"]
        if name is None:
            return None
        loaded: dict[str, Tensor] = torch.load(self.path / name, weights_only=True)
        return loaded

    def save(self, state: Mapping[str, Tensor], rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
        """Put a checkpoint and the rows since the last one on disk together."""
        step = facts["step"]
        manifest = {**self.manifest, **facts, "segments": list(self.manifest["segments"])}
        if rows:
            name = f"segment-{step:012d}.parquet"
            write_table(self.path / name, polars.DataFrame(list(rows), schema=RESULT_SCHEMA))
            manifest["segments"].append(name)
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        manifest["checkpoint"] = f"checkpoint-{step:012d}.pt"
        write(self.path / manifest["checkpoint"], buffer.getvalue())
        write_json(self.path / "manifest.json", manifest)
        self.manifest = manifest
        kept = {manifest["checkpoint"], *manifest["segments"]}
        for old in (*self.path.glob("checkpoint-*.pt"), *self.path.glob("segment-*.parquet")):
            if old.name not in kept:
                old.unlink(missing_ok=True)

    def rows(self) -> polars.DataFrame:
        """Every row that the manifest vouches for."""
        tables = [polars.read_parquet(self.path / name) for name in self.manifest["segments"]]
        return polars.concat(tables) if tables else polars.DataFrame(schema=RESULT_SCHEMA)
