"""Data sets of images, by name: from a folder, or from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from perennial.streams.formats import read_idx, read_pictures


class Images(NamedTuple):
    """One part of a data set of images, in the order of its files."""

    pixels: Tensor
    """uint8 [images, channels, height, width]."""
    classes: Tensor
    """int64 [images], from 0."""


@dataclass(frozen=True)
class DataSet:
    """Where a data set of images lies, and what must be found there."""

    title: str
    """How its authors call it."""
    shape: tuple[int, int, int]
    """Channels, height, width."""
    classes: int
    """Classes; labels run from 0."""
    counts: tuple[int, int] | None
    """Images to train on and to test on; None where they vary between versions."""
    folders: tuple[str, ...]
    """Names of its folder under ``PERENNIAL_DATA``; the first that holds files of it is read."""
    stems: tuple[str, ...] = ("",)
    """What may stand before the names of IDX files."""
    hub: str | None = None
    """The data set on the Hugging Face hub to fetch it from where it is in no folder; None: it must be put there."""
    labels: tuple[str, ...] = ("label",)
    """Names of the column of labels in Parquet files."""


DATA_SETS = {
    "mnist": DataSet("MNIST", (1, 28, 28), 10, (60_000, 10_000), ("mnist",), hub="ylecun/mnist"),
    "emnist": DataSet(
        "EMNIST (47 classes)",
        (1, 28, 28),
        47,
        None,
        ("emnist", "emnist47"),
        ("", "emnist-balanced-", "emnist-bymerge-"),
    ),
    "fashion_mnist": DataSet(
        "Fashion-MNIST",
        (1, 28, 28),
        10,
        (60_000, 10_000),
        ("fashion_mnist", "fashion-mnist"),
        hub="zalando-datasets/fashion_mnist",
    ),
    "cifar10": DataSet("CIFAR-10", (3, 32, 32), 10, (50_000, 10_000), ("cifar10",), hub="uoft-cs/cifar10"),
    "cifar100": DataSet(
        "CIFAR-100",
        (3, 32, 32),
        100,
        (50_000, 10_000),
        ("cifar100",),
        hub="uoft-cs/cifar100",
        labels=("fine_label", "label"),
    ),
    "tiny-imagenet-32": DataSet("Tiny-ImageNet at 32 x 32", (3, 32, 32), 200, None, ("tiny-imagenet-32",)),
    "imagenet-32": DataSet(
        "ImageNet at 32 x 32", (3, 32, 32), 1000, None, ("imagenet-32",), hub="benjamin-paine/imagenet-1k-32x32"
    ),
}
"""Data sets by the names that studies use."""

_PARTS = {"train": (0, "train", ("train",)), "test": (1, "t10k", ("test", "validation", "valid"))}
"""Position in counts, beginning of IDX files, beginnings of Parquet files."""


def data_folder() -> Path | None:
    """Where data sets lie: the environment variable ``PERENNIAL_DATA``."""
    named = os.environ.get("PERENNIAL_DATA")
    return Path(named).expanduser() if named else None


@lru_cache(maxsize=4)
def images(name: str, part: str = "train") -> Images:
    """One part of a data set, decoded once and kept.

    Read from ``PERENNIAL_DATA/NAME``, either IDX (``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, for the
    test set ``t10k-...``, gzipped or not) or Parquet as on the Hugging Face hub (``train.parquet`` or
    ``train-00000-of-00003.parquet``, for the test set ``test`` or ``validation``; in the folder or in one within it).
    What is not there is fetched from the hub, and held against the hub's SHA-256 of it; files stay in the hub's own
    cache, from where they are read the next time, without a network too.

    Args:
        name: one of :data:`DATA_SETS`.
        part: ``train`` or ``test``.

    Raises:
        FileNotFoundError: it is not there and cannot be fetched; says what to put where.
        ValueError: an unknown name or part, or files that are not what they should be; names file and place.
    """
    if name not in DATA_SETS:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(DATA_SETS)}")
    if part not in _PARTS:
        raise ValueError(f"part is {part!r}; it is one of {', '.join(_PARTS)}")
    data_set = DATA_SETS[name]
    number, idx, _ = _PARTS[part]
    idx_files, parquet = None, []
    for folder in _folders(data_set):
        idx_files = _idx_files(data_set, folder, idx)
        parquet = [] if idx_files else _parquet_files(folder, _PARTS[part][2])
        if idx_files or parquet:
            break
    if idx_files:
        found = _read_pair(data_set, *idx_files)
    else:
        parquet = parquet or _fetch(data_set, part)
        found = Images(*read_pictures(parquet, data_set.labels, data_set.shape, classes=data_set.classes))
    if data_set.counts:
        where = idx_files[0] if idx_files else parquet[0]
        if len(found.classes) != data_set.counts[number]:
            raise ValueError(
                f"{where} holds {len(found.classes)} images; the {part} set of {data_set.title} has "
                f"{data_set.counts[number]}: it is another data set, or not all of it"
            )
        if (kinds := len(found.classes.unique())) != data_set.classes:
            raise ValueError(
                f"{where} holds images of {kinds} classes; {data_set.title} has {data_set.classes}: it is another data "
                "set"
            )
    return found


def flat_images(name: str, part: str = "train") -> tuple[Tensor, Tensor]:
    """A data set's images as rows, uint8 [images, channels x height x width], and their classes, int64 [images]."""
    pixels, classes = images(name, part)
    return pixels.flatten(1), classes


def _folders(data_set: DataSet) -> list[Path]:
    base = data_folder()
    return [base / one for one in data_set.folders if (base / one).is_dir()] if base else []


def _idx_files(data_set: DataSet, folder: Path, begin: str) -> tuple[Path, Path] | None:
    """The IDX files of images and of labels, or None where there are none.

    Raises:
        FileNotFoundError: one is there without the other.
    """
    for stem in data_set.stems:
        begins = [begin, "test"] if stem and begin == "t10k" else [begin]
        for first in begins:
            names = [f"{stem}{first}-{what}-ubyte" for what in ("images-idx3", "labels-idx1")]
            there = [next((p for p in (folder / n, folder / f"{n}.gz") if p.exists()), None) for n in names]
            if there[0] and there[1]:
                return there[0], there[1]
            if there[0] or there[1]:
                missing = names[0] if there[1] else names[1]
                raise FileNotFoundError(
                    f"{data_set.title} is needed, but there is no {folder / missing}.gz beside {there[0] or there[1]}; "
                    "put the official file there"
                )
    return None


def _read_pair(data_set: DataSet, pictures: Path, labels: Path) -> Images:
    pixels, classes = read_idx(pictures), read_idx(labels)
    if tuple(pixels.shape[1:]) != data_set.shape[1:]:
        raise ValueError(
            f"{pictures} holds {tuple(pixels.shape)} bytes, {data_set.title} (images, {data_set.shape[1]}, "
            f"{data_set.shape[2]}): it is another data set"
        )
    if classes.dim() != 1 or len(classes) != len(pixels):
        raise ValueError(f"{labels} holds {tuple(classes.shape)} labels for the {len(pixels)} images in {pictures}")
    if len(wrong := (classes >= data_set.classes).nonzero()):
        at = int(wrong[0])
        raise ValueError(
            f"{labels} has the label {int(classes[at])} for image {at} (offset {8 + at}); labels of {data_set.title} "
            f"are 0 to {data_set.classes - 1}: it is another data set"
        )
    return Images(pixels[:, None], classes.to(torch.int64))


_SHARD = re.compile(r"-\d{5}-of-(\d{5})")


def _parquet_files(folder: Path, begins: Sequence[str]) -> list[Path]:
    """The files that begin so, in order; several where a part is cut into shards.

    Raises:
        FileNotFoundError: a shard of several is missing.
    """
    for place in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
        for begin in begins:
            if (whole := place / f"{begin}.parquet").exists():
                return [whole]
            sizes = [
                _SHARD.fullmatch(path.stem.removeprefix(begin)) for path in sorted(place.glob(f"{begin}-*.parquet"))
            ]
            if count := next((int(size[1]) for size in sizes if size), 0):
                wanted = [place / f"{begin}-{n:05d}-of-{count:05d}.parquet" for n in range(count)]
                if missing := [path for path in wanted if not path.exists()]:
                    raise FileNotFoundError(f"{missing[0]} is missing: the {begin} set comes in {count} files")
                return wanted
    return []


def _cached(hub: str, begins: Sequence[str]) -> list[Path]:
    """Files that were fetched before and begin so, if all of them are there and are what they were."""
    from huggingface_hub import errors, snapshot_download

    try:
        found = _parquet_files(Path(snapshot_download(hub, repo_type="dataset", local_files_only=True)), begins)
    except (errors.LocalEntryNotFoundError, FileNotFoundError):
        return []
    for path in found:
        digest = path.resolve().name  # the cache names large files by their SHA-256
        if len(digest) == 64:
            _check_digest(path, digest)
    return found


def _check_digest(path: Path, digest: str) -> None:
    with path.open("rb") as opened:
        have = hashlib.file_digest(opened, "sha256").hexdigest()
    if have != digest:
        raise ValueError(
            f"{path.resolve()} is damaged: its SHA-256 is {have}, on the hub {digest}; delete it and try again"
        )


def _wanted(data_set: DataSet, part: str) -> tuple[str, str]:
    """What is not there, and what to do about it."""
    base, own = data_folder(), data_set.folders[0]
    if data_set.shape[0] == 1:
        begin = _PARTS[part][1]
        stem = "" if data_set.counts else data_set.stems[1]
        files = [f"{stem}{begin}-images-idx3-ubyte.gz", f"{stem}{begin}-labels-idx1-ubyte.gz"]
        what = "the official files"
    else:
        files = [f"{part}.parquet"]
        what = (
            "the official file" if data_set.hub else "a Parquet file with pictures in the column image and their label"
        )
    needed = f"{data_set.title} is needed, but there is no {' and '.join(str(Path(own) / file) for file in files)}"
    if base is None:
        return needed, f"set the environment variable PERENNIAL_DATA to the folder that holds {own}/"
    gone = "" if base.is_dir() else ", which does not exist"
    return f"{needed} in {base} (PERENNIAL_DATA){gone}", f"put {what} there"


def _fetch(data_set: DataSet, part: str) -> list[Path]:
    """The Parquet files of one part from the hub, checked; from its cache, where they have been fetched before."""
    needed, wanted = _wanted(data_set, part)
    if data_set.hub is None:
        raise FileNotFoundError(f"{needed}; {wanted}")
    try:
        from huggingface_hub import HfApi, errors, hf_hub_download
    except ImportError:
        raise FileNotFoundError(f"{needed}; {wanted}, or install huggingface_hub to have it fetched") from None
    begins = _PARTS[part][2]
    if cached := _cached(data_set.hub, begins[:1]):
        return cached
    try:
        every = HfApi().list_repo_tree(data_set.hub, repo_type="dataset", recursive=True, expand=False)
        entries = {e.path: e for e in every if e.path.endswith(".parquet")}
        chosen = next(
            (
                found
                for begin in _PARTS[part][2]
                if (found := sorted(p for p in entries if Path(p).name.startswith(f"{begin}-")))
            ),
            [],
        )
        paths = [Path(hf_hub_download(data_set.hub, path, repo_type="dataset")) for path in chosen]
    except (errors.HfHubHTTPError, errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        if cached := _cached(data_set.hub, begins):
            return cached
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(f"{needed}, and it cannot be fetched ({reason}); {wanted}") from error
    if not chosen:
        raise FileNotFoundError(f"{needed}, and {data_set.hub} on the hub has no {part} files in Parquet; {wanted}")
    for path, entry in zip(paths, chosen, strict=True):
        digest = getattr(getattr(entries[entry], "lfs", None), "sha256", None)
        if digest is not None:
            _check_digest(path, digest)
    return paths
