"""Files that data sets come in: IDX, and Parquet with encoded pictures."""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_TYPES = {0x08: torch.uint8}
"""The IDX format's codes of element types; images and labels are bytes."""


def read_idx(path: Path) -> Tensor:
    """The array in an IDX file, gzipped or not (LeCun's format of MNIST): uint8, its shape as the file says.

    Raises:
        ValueError: the file is not IDX, of another element type, empty, cut short or too long; says where.
    """
    try:
        data = _unpacked(path) if path.suffix == ".gz" else path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if not data:
        raise ValueError(f"{path} is empty; put a whole copy there")
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
    if 0 in shape:
        raise ValueError(f"{path} says that it holds {' x '.join(map(str, shape))} bytes, which is nothing")
    if len(data) - begin != math.prod(shape):
        raise ValueError(
            f"{path} says that it holds {' x '.join(map(str, shape))} bytes from offset {begin}, and holds "
            f"{len(data) - begin}"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=begin).reshape(shape)


def _unpacked(path: Path) -> bytes:
    data = bytearray()
    with path.open("rb") as packed:
        try:
            with gzip.GzipFile(fileobj=packed) as opened:
                while part := opened.read(1 << 16):
                    data += part
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{path} is damaged near offset {packed.tell()}, after {len(data)} bytes of what it holds: {error}; "
                "put a whole copy there"
            ) from error
    return bytes(data)


def read_pictures(
    paths: Sequence[Path],
    labels: Sequence[str],
    shape: tuple[int, int, int],
    pictures: Sequence[str] = ("img", "image"),
    classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The pictures and labels in Parquet files, as data sets on the Hugging Face hub have them.

    A picture is a record with the encoded file in ``bytes`` (PNG, JPEG), or nested lists of pixels, with channels first
    or last. Needs polars and pillow (the extra ``studies``).

    Args:
        paths: the files, one after another.
        labels: names that the column of labels may have; the first that is there is read.
        shape: channels, height and width that every picture must have: 3 channels for RGB, 1 for grey.
        pictures: names that the column of pictures may have.
        classes: labels run from 0 to one less; None leaves them unchecked.

    Returns:
        uint8 [n, channels, height, width] and int64 [n].

    Raises:
        ValueError: a file is not Parquet, has no rows, lacks a column, or holds a label out of range or a picture that
            cannot be decoded or has another size; names the file and the row.
    """
    found = [_read_one(path, labels, shape, pictures, classes) for path in paths]
    return torch.cat([pixels for pixels, _ in found]), torch.cat([classes for _, classes in found])


def _read_one(
    path: Path, labels: Sequence[str], shape: tuple[int, int, int], pictures: Sequence[str], classes: int | None
) -> tuple[Tensor, Tensor]:
    import polars

    try:
        frame = polars.read_parquet(path)
    except (polars.exceptions.PolarsError, polars.exceptions.PanicException, OSError) as error:
        raise ValueError(f"{path} is damaged, or no Parquet file: {error}") from error
    if not frame.height:
        raise ValueError(f"{path} has no rows; put a whole copy there")
    chosen = []
    for names in (pictures, labels):
        column = next((name for name in names if name in frame.columns), None)
        if column is None:
            raise ValueError(f"{path} has the columns {', '.join(frame.columns)}; one must be {' or '.join(names)}")
        if (missing := frame[column].is_null()).any():
            raise ValueError(f"{path} has no {column} in row {missing.arg_true()[0]}")
        chosen.append(frame[column])
    if not chosen[1].dtype.is_integer():
        raise ValueError(f"{path} has labels of type {chosen[1].dtype} in {chosen[1].name}; they must be whole numbers")
    if classes is not None and len(wrong := ((chosen[1] < 0) | (chosen[1] >= classes)).arg_true()):
        raise ValueError(
            f"{path}, row {wrong[0]} has the label {chosen[1][wrong[0]]} in {chosen[1].name}; labels are 0 to "
            f"{classes - 1}: it is another data set"
        )
    pixels = torch.empty((frame.height, *shape), dtype=torch.uint8)
    for row, value in enumerate(chosen[0]):
        pixels[row] = _picture(value, shape, f"{path}, row {row}")
    return pixels, torch.tensor(chosen[1].to_list(), dtype=torch.int64)


def _picture(value: object, shape: tuple[int, int, int], where: str) -> Tensor:
    """One picture as uint8 [channels, height, width]."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, dict):
        if not value.get("bytes"):
            raise ValueError(f"{where} holds no picture: its bytes are empty")
        try:
            array = np.asarray(Image.open(io.BytesIO(value["bytes"])).convert("RGB" if shape[0] == 3 else "L"))
        except UnidentifiedImageError:
            raise ValueError(f"{where} holds a picture that cannot be decoded: it is of no known format") from None
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
        ) as error:
            raise ValueError(f"{where} holds a picture that cannot be decoded: {error}") from error
    else:
        try:
            array = np.asarray(value.to_list() if hasattr(value, "to_list") else value)
        except ValueError:
            raise ValueError(f"{where} holds rows of pixels that differ in length") from None
        if array.dtype.kind not in "iu" or array.size == 0 or array.min() < 0 or array.max() > 255:
            raise ValueError(f"{where} holds pixels that are no whole numbers from 0 to 255")
    if array.ndim == 2:
        array = array[..., None]
    if array.shape == shape and shape[0] != shape[2]:
        return torch.from_numpy(array.astype(np.uint8))
    if array.shape != (*shape[1:], shape[0]):
        raise ValueError(
            f"{where} holds a picture of {' x '.join(map(str, array.shape))}, where one of "
            f"{shape[1]} x {shape[2]} x {shape[0]} is needed: it is another data set"
        )
    return torch.from_numpy(array.astype(np.uint8)).permute(2, 0, 1)
