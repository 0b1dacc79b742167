"""Saved networks, read without running what is in the file.

Safetensors hold numbers alone. Pickles, which ``torch.save`` writes, can name any function to be called when they are
loaded; they are read with ``weights_only=True``, which knows tensors, containers and little else, and a file that needs
more is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "policy")
"""Where a state dict usually is in a checkpoint that holds more."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DDP, ``torch.compile`` and trainers put before every name."""

STEPS = ("step", "global_step", "num_timesteps", "iteration", "epoch")
"""Entries of a checkpoint that say when it was saved, the first first."""

_SHOWN = 5
_EXTRA = "_extra_state"  # torch's name for what is in a state dict besides tensors


class CheckpointError(ValueError):
    """A file that cannot be loaded into a network; the text says why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """What was found in a file or folder."""

    path: Path
    """As it was given."""
    state: Mapping[str, Any]
    """The state dict, names as they are in the file."""
    key: str = ""
    """Where in the file it was; empty for the file itself."""
    steps: Mapping[str, int] = field(default_factory=dict)
    """When it was saved, by where that was found."""
    files: tuple[Path, ...] = ()
    """What was read."""


def open_checkpoint(path: Path, key: str | None = None) -> Checkpoint:
    """Read a state dict: ``.safetensors``, what ``torch.save`` wrote, Stable-Baselines3's ``.zip``, or the folder that
    ``save_pretrained`` wrote. Nothing in it is run.

    Args:
        path: of the file or folder.
        key: where the state dict is, dots between keys; the last may be a prefix of names. None: it is looked for.

    Raises:
        CheckpointError: there is none, it is damaged, it needs code to be loaded, or no state dict is found in it.
    """
    steps: dict[str, int] = {}
    if path.is_dir():
        files, contents = _folder(path)
        steps |= _entries(_json(path / "trainer_state.json")) if (path / "trainer_state.json").is_file() else {}
    else:
        contents, more = read_tensors(path), {}
        if _is_baselines(path):
            more = _baselines_data(path)
        steps |= _entries(contents) | _entries(more)
        files = [path]
    state, found = _state_dict(contents, key, path)
    named = next((n for text in (path.name, path.absolute().parent.name) if (n := _in_name(text))), None)
    if named is not None:
        steps.setdefault(*named)
    return Checkpoint(path, state, found, steps, tuple(files))


def read_tensors(path: Path) -> Any:
    """What a file of tensors holds: ``.safetensors``, Stable-Baselines3's ``.zip``, else what ``torch.save`` wrote.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it needs code to be loaded.
    """
    present(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if not _is_baselines(path):
        return _torch(path, path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _torch(io.BytesIO(archive.read("policy.pth")), path)
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Copy or save it again") from None


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_into(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Load all of a state dict into a network, or nothing.

    Names may have one of the usual prefixes in front. A weight that is tied to another needs to be there only once.

    Args:
        model: the network that was saved.
        checkpoint: what was saved.

    Returns:
        Notes on what is not as it was saved.

    Raises:
        CheckpointError: names or shapes are not the network's.
    """
    wanted = model.state_dict(keep_vars=True)
    variants = list(_variants(checkpoint.state))
    problems = [_problems(state, wanted) for state in variants]
    best = min(range(len(variants)), key=lambda at: len(problems[at]))
    if problems[best]:
        more = f", and {len(problems[best]) - _SHOWN} more" if len(problems[best]) > _SHOWN else ""
        inside = f" ({checkpoint.key})" if checkpoint.key else ""
        raise CheckpointError(
            f"{checkpoint.path}{inside} is of another network than {type(model).__name__}: "
            f"{', '.join(problems[best][:_SHOWN])}{more}. Name the function that made the network that was saved, or "
            "another part of the file with --key"
        )
    state = dict(variants[best])
    present = {id(wanted[name]): value for name, value in state.items()}
    state |= {name: present[id(own)] for name, own in wanted.items() if name not in state}
    try:
        model.load_state_dict(state)
    except Exception as error:
        raise CheckpointError(f"{checkpoint.path} does not load: {' '.join(str(error).split())}") from None
    rounded = {
        f"{str(value.dtype).removeprefix('torch.')} read as {str(own.dtype).removeprefix('torch.')}"
        for name, own in wanted.items()
        if isinstance(own, Tensor)
        and isinstance(value := state[name], Tensor)
        and torch.promote_types(value.dtype, own.dtype) != own.dtype
    }
    return [f"{checkpoint.path.name}: {text}, which rounds the weights" for text in sorted(rounded)]


def in_order(checkpoints: Sequence[Checkpoint]) -> tuple[str, list[int]]:
    """By what the checkpoints of one run are told apart, and the number of each.

    The first entry that all have, no two alike; else the one number in which their paths differ; else their places in
    the order given, from 1 on, under the name ``""``.
    """
    shared = [key for key in checkpoints[0].steps if all(key in c.steps for c in checkpoints)] if checkpoints else []
    for key in sorted(shared, key=lambda k: STEPS.index(k) if k in STEPS else len(STEPS)):
        numbers = [c.steps[key] for c in checkpoints]
        if len(set(numbers)) == len(numbers):
            return key, numbers
    parts = [re.split(r"(\d+)", str(c.path)) for c in checkpoints]
    if len(parts) > 1 and len({len(p) for p in parts}) == 1:
        differing = [at for at, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
        if len(differing) == 1 and differing[0] % 2 == 1:
            numbers = [int(p[differing[0]]) for p in parts]
            if len(set(numbers)) == len(numbers):
                return "step in the name", numbers
    return "", list(range(1, len(checkpoints) + 1))


def present(path: Path) -> None:
    """Raise if there is no such file, or nothing in it."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a file")
    if not path.is_file():
        raise CheckpointError(f"there is no {path}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty: saving it was cut short. Take an earlier one")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        raise CheckpointError(f"{path} needs the package safetensors: pip install safetensors") from None
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {error}. Copy or save it again") from None


def _torch(source: Path | io.BytesIO, path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what kind of archive it is; the errors below say it better
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        needed = _code(path, str(error))
        if needed:
            more = f" and {len(needed) - _SHOWN} more" if len(needed) > _SHOWN else ""
            raise CheckpointError(
                f"{path} is refused: to load it, {', '.join(needed[:_SHOWN])}{more} would have to be run, and a file "
                "can name any code so. Where it was made, save the weights alone: torch.save(model.state_dict(), "
                '"model.pt"), or safetensors.torch.save_file(model.state_dict(), "model.safetensors")'
            ) from None
        why = " ".join(str(error).split())
        if "TorchScript" in why:
            raise CheckpointError(
                f"{path} is refused: it is a TorchScript archive, which holds code. Where it was made, save the "
                'weights alone: torch.save(model.state_dict(), "model.pt")'
            ) from None
        long = isinstance(error, KeyError) or "weights_only" in why or not why  # torch's inner troubles, or a lecture
        raise CheckpointError(
            f"{path} is damaged, or not what torch.save writes{'' if long else f' ({why[:200]})'}. Copy or save it "
            "again"
        ) from None


def _code(path: Path, message: str) -> list[str]:
    """Names that a pickle would have imported or called, as far as they can be known without doing so."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:
        named = re.search(r"GLOBAL (\S+)", message)
    if named:
        return [named[1]]
    found: list[str] = []
    texts: list[str] = []
    try:
        with path.open("rb") as file:
            for operation, argument, _ in pickletools.genops(file):
                if operation.name == "GLOBAL":
                    found.append(str(argument).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL":
                    found.append(".".join(texts[-2:]))
                elif isinstance(argument, str):
                    texts.append(argument)
    except Exception:
        return []  # no pickle to its end: damaged
    return sorted(set(found))


def _folder(path: Path) -> tuple[list[Path], Any]:
    """The files of a Hugging Face checkpoint, and the state dict that they hold together."""
    index = path / "model.safetensors.index.json"
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name], read_tensors(path / name)
    if index.is_file():
        shards = _json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{index} has no weight_map")
        contents: dict[str, Any] = {}
        files = []
        for name in sorted({str(shard) for shard in shards.values()}):
            if Path(name).name != name:
                raise CheckpointError(f"{index} names {name}, which is not a file beside it")
            files.append(path / name)
            contents |= read_tensors(path / name)
        if absent := sorted(shards.keys() - contents.keys()):
            raise CheckpointError(f"{index} promises {absent[0]}, which is not in {shards[absent[0]]}")
        return [index, *files], contents
    if (path / "adapter_model.safetensors").is_file():
        raise CheckpointError(
            f"{path} holds a PEFT adapter, not a whole network: save what model.merge_and_unload() returns with "
            "save_pretrained"
        )
    raise CheckpointError(
        f"{path} is a folder without model.safetensors, model.safetensors.index.json or pytorch_model.bin: name the "
        "file of the checkpoint"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return found if isinstance(found, dict) else {}


def _is_baselines(path: Path) -> bool:
    """Whether it is what Stable-Baselines3 saves; what ``torch.save`` writes is a zip file as well."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "policy.pth" in archive.namelist()


def _baselines_data(path: Path) -> dict[str, Any]:
    """The plain numbers beside a Stable-Baselines3 policy; the pickles among them stay text."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = json.loads(archive.read("data"))
    except (KeyError, ValueError, zipfile.BadZipFile):
        return {}
    return found if isinstance(found, dict) else {}


def _state_dict(contents: Any, key: str | None, path: Path) -> tuple[dict[str, Any], str]:
    if key:
        return _at(contents, key, path), key
    if _is_state(contents):
        return dict(contents), ""
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}, not a state dict: save model.state_dict()")
    found = [name for name in KEYS if _is_state(contents.get(name))]
    if len(found) == 1:
        return dict(contents[found[0]]), found[0]
    if found:
        raise CheckpointError(f"{path} holds several state dicts: say which with --key {' or --key '.join(found)}")
    raise CheckpointError(
        f"no state dict was found in {path}: it holds {_entries_of(contents)}, and none of {', '.join(KEYS)} is one. "
        "Say where it is with --key"
    )


def _at(contents: Any, key: str, path: Path) -> dict[str, Any]:
    """What ``a.b`` names: entries within entries, and in a state dict the names that begin so."""
    here, rest = contents, key
    while isinstance(here, Mapping) and rest:
        if rest in here:
            here, rest = here[rest], ""
            continue
        first, _, after = rest.partition(".")
        if first in here:
            here, rest = here[first], after
            continue
        inside = {name[len(rest) + 1 :]: value for name, value in here.items() if str(name).startswith(rest + ".")}
        if not inside:
            raise CheckpointError(f"{path} has no {key}: there is {_entries_of(here)}")
        here, rest = inside, ""
    if not _is_state(here):
        what = f"holds {_entries_of(here)}" if isinstance(here, Mapping) else f"is a {type(here).__name__}"
        raise CheckpointError(f"{key} in {path} is not a state dict: it {what}")
    return dict(here)


def _entries_of(found: Mapping[Any, Any]) -> str:
    names = [str(name) for name in found]
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "nothing"


def _is_state(found: Any) -> bool:
    return (
        isinstance(found, Mapping)
        and any(isinstance(value, Tensor) for value in found.values())
        and all(
            isinstance(name, str) and (isinstance(value, Tensor) or name.endswith(_EXTRA))
            for name, value in found.items()
        )
    )


def _variants(state: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The state dict as it is, and with prefixes taken off that all names have."""
    waiting, seen = [dict(state)], list[dict[str, Any]]()
    while waiting:
        names = waiting.pop(0)
        if any(names.keys() == other.keys() for other in seen):
            continue
        seen.append(names)
        yield names
        inner = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): value for name, value in names.items()}
        waiting += [inner] if len(inner) == len(names) else []  # else two names became one
        waiting += [
            {name.removeprefix(prefix): value for name, value in names.items()}
            for prefix in PREFIXES
            if all(name.startswith(prefix) for name in names)
        ]


def _problems(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What keeps a state dict from being that of a network, in words."""
    present = {id(wanted[name]) for name in state if name in wanted}
    missing = [name for name, own in wanted.items() if name not in state and id(own) not in present]
    found = [f"the network's {name} is not in the file" for name in missing]
    found += [f"{name} is in the file alone" for name in state if name not in wanted]
    for name, own in wanted.items():
        saved = state.get(name)
        if not isinstance(own, Tensor) or not isinstance(saved, Tensor) or is_lazy(own):
            continue
        if own.shape != saved.shape:
            found.append(f"{name} is {list(saved.shape)} in the file, {list(own.shape)} in the network")
        elif own.is_floating_point() != saved.is_floating_point():
            kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (saved, own)]
            found.append(f"{name} is {kinds[0]} in the file, {kinds[1]} in the network")
    return found


def _entries(contents: Any) -> dict[str, int]:
    """When a checkpoint was saved, by what it says itself."""
    found = {}
    for key in STEPS:
        value = contents.get(key) if isinstance(contents, Mapping) else None
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            found[key] = value
    return found


def _in_name(text: str) -> tuple[str, int] | None:
    """The step in the name of a file or folder: ``checkpoint-500``, ``epoch=3-step=1200.ckpt``, ``1000_steps.zip``."""
    for word in ("step", "iteration", "iter", "update", "checkpoint", "ckpt", "epoch"):
        if found := re.search(rf"{word}s?[-_=]?(\d+)", text, re.IGNORECASE):
            return f"{'epoch' if word == 'epoch' else 'step'} in the name", int(found[1])
    if found := re.search(r"(\d+)[-_]?(?:steps?|iter|updates?)\b", text, re.IGNORECASE):
        return "step in the name", int(found[1])
    if found := re.fullmatch(r"(\d+)\.[a-z]+", text):
        return "step in the name", int(found[1])
    return None
