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


@lru_cache(maxsize=2)
def mnist(part: str = "train") -> tuple[Tensor, Tensor]:
    """The images of MNIST, uint8 [60000, 784], and their classes, int64 [60000], in the original order.

    Read from ``PERENNIAL_DATA/mnist``: the official ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, for
    the test set ``t10k-...``, gzipped or not.

    Args:
        part: ``train``, or ``test`` (10,000 images).

    Raises:
        FileNotFoundError: they are not there; says what to put where.
        ValueError: they are not what they should be.
    """
    name, count = {"train": ("train", 60_000), "test": ("t10k", 10_000)}[part]
    found = []
    for file, shape in ((f"{name}-images-idx3-ubyte", (count, 28, 28)), (f"{name}-labels-idx1-ubyte", (count,))):
        path = _there("MNIST", "mnist", file, f"{file}.gz")
        array = read_idx(path)
        if tuple(array.shape) != shape:
            raise ValueError(f"{path} holds {tuple(array.shape)} bytes, MNIST {shape}: it is another data set")
        found.append(array)
    classes = found[1].to(torch.int64)
    _check_classes("MNIST", classes, 10)
    return found[0].reshape(-1, 784), classes


@lru_cache(maxsize=2)
def cifar10(part: str = "train") -> tuple[Tensor, Tensor]:
    """The images of CIFAR-10, uint8 [50000, 3, 32, 32], and their classes, int64 [50000], in the order of the file.

    Read from ``PERENNIAL_DATA/cifar10``: ``train.parquet`` and ``test.parquet``, as on the Hugging Face hub: an encoded
    picture in column ``img``, its class in ``label``. Needs polars and pillow (the extra ``studies``).

    Args:
        part: ``train``, or ``test`` (10,000 images).

    Raises:
        FileNotFoundError: they are not there; says what to put where.
        ValueError: they are not what they should be.
    """
    import io

    import numpy as np
    import polars
    from PIL import Image

    path = _there("CIFAR-10", "cifar10", f"{part}.parquet")
    frame = polars.read_parquet(path)
    if not {"img", "label"} <= set(frame.columns):
        raise ValueError(f"{path} has the columns {', '.join(frame.columns)}; CIFAR-10 has img and label")
    count = {"train": 50_000, "test": 10_000}[part]
    if frame.height != count:
        raise ValueError(f"{path} has {frame.height} rows; CIFAR-10's {part} set has {count}")
    pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in frame["img"]]
    if any(picture.shape != (32, 32, 3) for picture in pictures):
        raise ValueError(f"{path} holds pictures that are not 32 x 32: it is another data set")
    classes = torch.tensor(frame["label"].to_list(), dtype=torch.int64)
    _check_classes("CIFAR-10", classes, 10)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), classes


def _there(title: str, folder: str, *names: str) -> Path:
    """The first of some files that is there, in a data set's folder."""
    base = data_folder()
    if base is None:
        raise FileNotFoundError(
            f"{title} is needed: set the environment variable PERENNIAL_DATA to a folder that holds "
            f"{folder}/{names[-1]}"
        )
    for name in names:
        if (path := base / folder / name).exists():
            return path
    raise FileNotFoundError(
        f"{title} is needed, but there is no {base / folder / names[-1]}; put the official file there"
    )


def _check_classes(title: str, classes: Tensor, count: int) -> None:
    wrong = (classes < 0) | (classes >= count)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(f"the label of {title}'s image {at} is {int(classes[at])}; labels are 0 to {count - 1}")
