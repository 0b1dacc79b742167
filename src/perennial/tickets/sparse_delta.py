"""What the training of a ticket left of a model, as indices and values."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from perennial.attach.arguments import bare_model
from perennial.checkpoints import CheckpointError, present
from perennial.storage import write

FORMAT, VERSION = "perennial.sparse_delta", "1"
"""What a saved :class:`SparseDelta` says that it is."""


class Changed(NamedTuple):
    """One parameter in a :class:`SparseDelta`."""

    indices: Tensor
    """int64 [count], ascending: places in the flattened parameter."""
    values: Tensor
    """[count], in the parameter's type: the new values, not what was added."""
    shape: tuple[int, ...]
    """The parameter's."""
    start: str
    """SHA-256 of the start's type, shape and bytes, in hexadecimal."""


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """What the training of a ticket left: which weights changed, and their new values.

    New values rather than differences, because start + (trained - start) is rounded: put into the model that training
    started from, they give the trained parameters bit for bit. Buffers (running statistics) are not parameters.
    """

    parameters: Mapping[str, Changed]
    """By name; one that did not change has no indices, and is there for its start."""

    def __post_init__(self) -> None:
        for name, (at, values, shape, _) in self.parameters.items():
            size = math.prod(shape)
            fits = at.dtype == torch.int64 and at.dim() == 1 and at.shape == values.shape
            if not fits or (len(at) and not (at[0] >= 0 and at[-1] < size and bool((at.diff() > 0).all()))):
                raise ValueError(
                    f"{name}: indices must be int64, ascending, below {size} and as many as values; they are "
                    f"{at.dtype} {list(at.shape)} for {list(values.shape)} values"
                )

    @classmethod
    def between(
        cls,
        model: nn.Module | Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        names: Iterable[str] | None = None,
        *,
        whole: Iterable[str] = (),
    ) -> Self:
        """What differs, in any bit, between a trained model, or its parameters, and their start.

        Args:
            model: trained.
            start: by name, in the same types.
            names: which to compare; None: all parameters.
            whole: of these, those that are kept whole, so that the start does not matter: a head that every load of
                the base model draws anew.

        Raises:
            ValueError: a name that either side lacks, another shape or type, a start that is no copy.
        """
        held = dict(bare_model(model).named_parameters() if isinstance(model, nn.Module) else model)
        complete, found = set(whole), {}
        wanted = list(held if names is None else names)
        for name in (*wanted, *complete):
            if name not in held or name not in wanted:
                raise ValueError(f"{name} is not among the parameters that are compared: {', '.join(wanted) or 'none'}")
        for name in wanted:
            trained = held[name].detach()
            same_shape(name, start, trained, "the start")
            before = start[name].detach().to(trained.device)
            if before.data_ptr() == trained.data_ptr() != 0 and name not in complete:
                raise ValueError(f"the start of {name} is the trained weight itself; keep a copy, made by clone()")
            if before.dtype != trained.dtype:
                raise ValueError(f"{name} is {trained.dtype}, its start {before.dtype}; keep the start in that type")
            moved = (_bits(trained) != _bits(before)) | (name in complete)
            at = moved.nonzero()[:, 0]
            values = trained.take(at).cpu()
            found[name] = Changed(at.cpu(), values, tuple(trained.shape), _fingerprint(before))
        return cls(found)

    @property
    def numel(self) -> int:
        """Values that are kept."""
        return sum(len(one.indices) for one in self.parameters.values())

    @property
    def density(self) -> float:
        """The share of the compared weights that are kept, in [0, 1]."""
        return self.numel / max(1, sum(math.prod(one.shape) for one in self.parameters.values()))

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, whole or not at all. The package safetensors is needed."""
        from safetensors.torch import save

        about = {name: (len(one.indices), one.shape, one.start) for name, one in self.parameters.items()}
        tensors = {f"indices/{name}": one.indices for name, one in self.parameters.items()}
        tensors |= {f"values/{name}": one.values for name, one in self.parameters.items()}
        write(Path(path), save(tensors, {"format": FORMAT, "version": VERSION, "parameters": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what :meth:`save` wrote. CheckpointError, a ValueError: no such file, cut short, other tensors."""
        from safetensors import SafetensorError, safe_open

        present(Path(path))
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                kind = (about.get("format"), about.get("version"))
                if kind != (FORMAT, VERSION):
                    raise ValueError("its format is {} {}, not {} {}".format(*kind, FORMAT, VERSION))
                found = {}
                for name, (count, shape, start) in json.loads(about["parameters"]).items():
                    at, values = (file.get_tensor(f"{part}/{name}") for part in ("indices", "values"))
                    if len(at) != count:
                        raise ValueError(f"{name} has {len(at)} indices, not {count}")
                    found[name] = Changed(at, values, tuple(shape), start)
            return cls(found)
        except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is no sparse delta, or a damaged one: {error}. Copy it again, or give a file that "
                "SparseDelta.save wrote with this version of perennial"
            ) from None

    @torch.no_grad()
    def apply(self, model: nn.Module, strict: bool = True) -> None:
        """Put the values into a model, in place: all, or none where anything does not fit.

        Args:
            model: the one that training started from; not strict, any that has these parameters.
            strict: refuse weights other than the start's, bit for bit, in parameters that are not kept whole, and
                other types.

        Raises:
            ValueError: names or shapes that the model lacks, another base model.
        """
        held = dict(bare_model(model).named_parameters())
        for name, (_, _, shape, _) in self.parameters.items():
            if name not in held or tuple(held[name].shape) != shape:
                what = f"it is {list(held[name].shape)} there" if name in held else "there is none"
                raise ValueError(
                    f"the delta is of {name} {list(shape)}, but {what}; give the model that it was made of"
                )
        for name, (at, values, _, start) in self.parameters.items() if strict else ():
            p = held[name]
            if p.dtype != values.dtype:
                raise ValueError(
                    f"{name} is {p.dtype} in the model and {values.dtype} in the delta; convert the model, or pass "
                    "strict=False, which rounds the values"
                )
            if len(at) < p.numel() and _fingerprint(p) != start:
                raise ValueError(
                    f"{name} is not what the training of this delta started from: this is another base model, or it is "
                    "trained, or has the delta already. Load the base model anew, or pass strict=False"
                )
        for name, (at, values, _, _) in self.parameters.items():
            held[name].put_(at.to(held[name].device), values.to(held[name]))


def same_shape(name: str, given: Mapping[str, Tensor], like: Tensor, where: str) -> None:
    if name not in given or given[name].shape != like.shape:
        what = f"{list(given[name].shape)}" if name in given else "missing"
        raise ValueError(f"{name} is {what} in {where}, but {list(like.shape)} here; is it of another model?")


def _bits(t: Tensor) -> Tensor:
    """Flat; equal where all bits are, which 0 and -0 are not, and NaN is with itself."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.contiguous().flatten().view(whole)


def _fingerprint(t: Tensor) -> str:
    digest = hashlib.sha256(f"{t.dtype} {list(t.shape)}".encode())
    digest.update(_bits(t.detach().cpu()).numpy().data)
    return digest.hexdigest()
