"""Data sets from files."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

_TYPES = {0x08: torch.uint8}
"""The IDX format's codes of element types; images and labels are bytes."""


def data_folder() -> Path | None:
    """Where data sets lie: the environment variable ``PERENNIAL_DATA``."""
    named = os.environ.get("PERENNIAL_DATA")
    return Path(named).expanduser() if named else None


def read_idx(path: Path) -> Tensor:
    """The array in an IDX file, gzipped or not (LeCun's format of MNIST): uint8, its shape as the file says.

    Raises:
        ValueError: the file is not IDX, of another element type, cut short or too long; says where.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[3] == 0:
        raise ValueError(
            f"{path} is no IDX file: it begins with {data[:4].hex(' ')}, not with 00 00 08 and a dimension"
        )
    if data[2] not in _TYPES:
        raise ValueError(f"{path} holds elements of type 0x{data[2]:02x} (offset 2); only bytes, 0x08, are read")
    dims = data[3]
    begin = 4 + 4 * dims
    if len(data) < begin:
        raise ValueError(f"{path} ends at offset {len(data)}, within the sizes of its {dims} dimensions")
    shape = struct.unpack(f">{dims}I", data[4:begin])
    if len(data) - begin != math.prod(shape):
        raise ValueError(
            f"{path} says that it holds {' x '.join(map(str, shape))} bytes from offset {begin}, and holds "
            f"{len(data) - begin}"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=begin).reshape(shape)


@lru_cache(maxsize=1)
def mnist() -> tuple[Tensor, Tensor]:
    """The training images of MNIST, uint8 [60000, 784], and their classes, int64 [60000], in the original order.

    Read from ``PERENNIAL_DATA/mnist``: the official ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``,
    gzipped or not.

    Raises:
        FileNotFoundError: they are not there; says what to put where.
        ValueError: they are not what they should be.
    """
    base = data_folder()
    if base is None:
        raise FileNotFoundError(
            "MNIST is needed: set the environment variable PERENNIAL_DATA to a folder that holds "
            "mnist/train-images-idx3-ubyte.gz and mnist/train-labels-idx1-ubyte.gz"
        )
    found = {}
    for name, shape in (("train-images-idx3-ubyte", (60000, 28, 28)), ("train-labels-idx1-ubyte", (60000,))):
        options = [base / "mnist" / name, base / "mnist" / f"{name}.gz"]
        path = next((p for p in options if p.exists()), None)
        if path is None:
            raise FileNotFoundError(f"MNIST is needed, but there is no {options[1]}; put the official file there")
        array = read_idx(path)
        if tuple(array.shape) != shape:
            raise ValueError(f"{path} holds {tuple(array.shape)} bytes, MNIST {shape}: it is another data set")
        found[name] = array
    classes = found["train-labels-idx1-ubyte"].to(torch.int64)
    if int(classes.max()) > 9:
        at = int((classes > 9).nonzero()[0])
        raise ValueError(f"the label of MNIST's image {at} is {int(classes[at])}; labels are 0 to 9")
    return found["train-images-idx3-ubyte"].reshape(-1, 784), classes
