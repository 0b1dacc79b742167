"""One adapter a task on one base model."""

from __future__ import annotations

import copy
import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import safetensors
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from perennial.lm.factors import STACK, Factors, Pair, adapted, factors_of
from perennial.lm.models import ModelError, trained_modules
from perennial.storage import RunError, read_json, write, write_json


class AdapterStack:
    """A sequence of LoRA adapters (Hu et al., 2022) on one model of ``peft``: the current one is trained, earlier ones
    are frozen and go on acting.

    Example::

        stack = AdapterStack(base, LoraConfig(r=8, lora_alpha=32, target_modules=["query", "value"]))
        for task in tasks:
            model = stack.begin(task.name)
            ...                            # with a fresh optimizer: a loop, or a Trainer with stack.callback()
            stack.save("adapters")
        stack = AdapterStack.load("adapters", base)      # base as it was before the first task

    Nothing of ``peft`` is changed: :attr:`model` is an ordinary ``PeftModel``, each saved adapter an ordinary folder of
    ``PeftModel.from_pretrained``.
    """

    def __init__(self, base: nn.Module, config: LoraConfig, *, merge: bool = False, heads: Sequence[str] = ()) -> None:
        """
        Args:
            base: a model of transformers. It is changed in place: layers get adapters, and with ``merge`` its weights
                the earlier updates.
            config: of every adapter, plain LoRA on matrices; ``target_modules`` must be in the model.
            merge: earlier adapters are added to the base's weights when the next begins. The same function up to
                rounding, at the cost of one adapter however many tasks there were (and no dropout on earlier ones).
            heads: modules by name that are trained beside the adapters, such as ``classifier``.

        Raises:
            ValueError: a configuration of which peft takes one adapter alone, or whose update is not :math:`s B A`; a
                base that has adapters already.
            ModelError: the model has no such head.
        """
        _check_config(config)
        if hasattr(base, "peft_config"):
            raise ValueError("the base model has adapters already; give it as it was before the first task")
        if unknown := [name for name in heads if not any(trained_modules(base, [name]))]:
            raise ModelError(f"heads names {unknown[0]!r}, and no module of the model that has parameters is called so")
        self.base, self.config, self.merge, self.heads = base, config, merge, tuple(heads)
        self.names: list[str] = []
        """Adapters, oldest first; the last is current."""
        self._model: PeftModel | None = None
        self._merged: dict[str, dict[str, Tensor]] = {}
        self._pairs: list[Pair] | None = None

    @property
    def model(self) -> PeftModel:
        """The model with its adapters."""
        if self._model is None:
            raise RuntimeError("the stack has no adapter yet; begin(name) adds the first")
        return self._model

    def begin(self, name: str) -> PeftModel:
        """Add an adapter, current from now on, and freeze the one before.

        Raises:
            ValueError: a name that is taken or that peft cannot take.
            ModelError: the model has none of the target modules.
        """
        if name in self.names:
            raise ValueError(f"there is an adapter {name!r} already; give each task a name of its own")
        if set(name) & set("./\\") or "lora_" in name or name in "lora_" or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f"an adapter cannot be called {name!r}: peft takes no name with . / \\ or lora_, none that is a part "
                "of the word lora_, and none that torch's modules have themselves"
            )
        before = self.names[-1] if self.names else None
        if self._model is None:
            trained = [p for p in self.base.parameters() if p.requires_grad]
            try:
                model = adapted(self.base, copy.deepcopy(self.config), name)
            except ValueError as error:
                kinds = (nn.Linear, Conv1D)
                layers = [n.rpartition(".")[2] for n, m in self.base.named_modules() if isinstance(m, kinds)]
                raise ModelError(
                    f"target_modules {self.config.target_modules} cannot be adapted: {error} The model's linear layers "
                    f"are called {', '.join(dict.fromkeys(layers)) or 'nothing: there are none'}"
                ) from error
            if wrong := self._wrong_layer(model):
                model.unload()
                for parameter in trained:
                    parameter.requires_grad_(True)
                raise ModelError(wrong)
            setattr(model, STACK, self)
            self._model = model
        else:
            self._model.add_adapter(name, copy.deepcopy(self.config))
        if before is not None and self.merge:
            self._add_to_base(before)
        self.names.append(name)
        if before is not None and self.merge:
            self.activate()  # the current one must act before the one before can go
            self._model.delete_adapter(before)
        self.activate()
        return self._model

    def _add_to_base(self, name: str) -> None:
        self._merged[name] = self.state(name)
        with torch.no_grad():
            for layer in _layers(self.model).values():
                if name in layer.lora_A:
                    weight = layer.get_base_layer().weight
                    weight.copy_(weight + layer.get_delta_weight(name).to(weight.dtype))

    def _wrong_layer(self, model: PeftModel) -> str:
        """What is adapted and is no matrix of its own, and what to do; empty if nothing is."""
        owners: dict[int, list[str]] = {}
        for name, module in self.base.named_modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(name)
        for name, layer in _layers(model).items():
            base = layer.get_base_layer()
            if not isinstance(base, nn.Linear | Conv1D):
                return f"target_modules name {name}, which is {type(base).__name__}; a stack adapts linear layers"
            if self.merge and len(shared := owners[id(base.weight)]) > 1:
                others = " and ".join(o for o in shared if o.removesuffix(".base_layer") != name)
                return (
                    f"the weights of {name} are tied to those of {others}, which merging would change as well; leave "
                    "it out of target_modules, or take merge=False"
                )
        return ""

    def activate(self) -> None:
        """See that the current adapter and the heads are trained and all others act, frozen: after anything that may
        have changed it, such as a Trainer's resuming."""
        model, current = self.model, self.names[-1]
        others = [] if self.merge else self.names[-2::-1]
        tuner: Any = model.base_model
        tuner.set_adapter([current, *others])
        model.active_adapter = current
        for name in others:
            tuner.set_requires_grad(name, False)
        for _, parameter in self._head_parameters():
            parameter.requires_grad_(True)
        self._pairs = None

    def pairs(self) -> list[Pair]:
        """The current adapter's matrices with what earlier ones have there."""
        if self._pairs is None:
            current = self.factors(self.model.active_adapter, detach=False)  # the model says if there is none
            earlier = [self.factors(name) for name in self.names[:-1]]
            self._pairs = []
            for module, new in current.items():
                old = [factors[module].down.to(new.down) for factors in earlier if module in factors]
                self._pairs.append(Pair(module, new, torch.cat(old) if old else None))
        return self._pairs

    def factors(self, name: str, *, detach: bool = True) -> dict[str, Factors]:
        """An adapter's matrices by module, those of merged adapters too. ValueError: there is none."""
        self._check_name(name)
        found = {}
        for module, layer in _layers(self.model).items():
            if name in layer.lora_A:
                here = factors_of(layer, name)
            elif (key := f"base_model.model.{module}.lora_A.weight") in self._merged.get(name, {}):
                down, up = self._merged[name][key], self._merged[name][key.replace("lora_A", "lora_B")]
                at = layer.get_base_layer().weight.device
                here = Factors(down.to(at), up.to(at), layer.scaling[self.names[-1]])  # all have one configuration
            else:
                continue
            found[module] = Factors(here.down.detach(), here.up.detach(), here.scaling) if detach else here
        return found

    def _check_name(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"there is no adapter {name!r}; there are {', '.join(self.names) or 'none'}")

    def state(self, name: str) -> dict[str, Tensor]:
        """A copy of an adapter's tensors, by the names under which peft saves them. ValueError: there is none."""
        self._check_name(name)
        if name in self._merged:
            return {key: tensor.clone() for key, tensor in self._merged[name].items()}
        found = get_peft_model_state_dict(self.model, adapter_name=name, save_embedding_layers=False)
        return {key: tensor.detach().cpu().clone() for key, tensor in found.items()}

    def merge_and_unload(self) -> nn.Module:
        """The base model with every update added to its weights, without adapters. The stack is over after it."""
        merged: nn.Module = self.model.merge_and_unload(adapter_names=list(self.model.peft_config))
        return merged

    def callback(self) -> TrainerCallback:
        """For a Trainer, which saves and resumes the adapters that are not merged, and lets the first alone act again.

        After it all act, and heads, which a Trainer does not save beside adapters, are restored. In a new process
        build the stack first as it was: ``AdapterStack.load`` with the earlier adapters, then ``begin``. Adapters that
        are not those with which the checkpoint was made, by name, settings or, if merged, values, are refused with a
        RunError, and so is a checkpoint without heads; ``load_best_model_at_end``, which does not know adapters of
        several names, with a ValueError.
        """
        return _StackCallback(self)

    def save(self, folder: str | Path) -> None:
        """Write all adapters, heads and their order. Killed at any moment, what was saved before can be loaded.

        Layout: ``stack.json`` names for each adapter a folder ``NAME-DIGEST`` as ``peft`` lays it out.
        """
        folder = Path(folder)
        places, configs = {}, {}
        for name in self.names:
            data = self._bytes(name)
            places[name] = f"{name}-{_digest(data)}"
            with tempfile.TemporaryDirectory() as drawn:
                self.model.peft_config[self.names[-1]].save_pretrained(drawn)
                config = (Path(drawn) / _CONFIG).read_bytes()
            configs[name] = _digest(config)
            for part, content in ((_CONFIG, config), (_WEIGHTS, data)):
                there = folder / places[name] / part
                if not there.exists() or there.read_bytes() != content:  # damaged ones are mended
                    write(there, content)
        heads = safetensors.torch.save({name: p.detach().cpu().contiguous() for name, p in self._head_parameters()})
        write(folder / (file := f"heads-{_digest(heads)}.safetensors"), heads)
        index = {"adapters": places, "configs": configs, "heads": file, "head_modules": self.heads, "merge": self.merge}
        write_json(folder / "stack.json", index)
        for path in folder.iterdir():  # what an earlier save wrote of the adapter that is still current
            if path.is_dir() and path.name not in places.values() and path.name[:-17] in self.names:
                shutil.rmtree(path)
            elif path.is_file() and path.name.startswith("heads-") and path.name != file:
                path.unlink()

    def _bytes(self, name: str) -> bytes:
        """An adapter as a safetensors file."""
        return safetensors.torch.save({k: t.contiguous() for k, t in self.state(name).items()}, {"format": "pt"})

    @classmethod
    def load(cls, folder: str | Path, base: nn.Module) -> AdapterStack:
        """The stack that was saved, on a base model as it was before the first task; the last adapter is current.

        Raises:
            FileNotFoundError: no stack was saved there.
            RunError: a file is missing, cut short or changed, or belongs to another model; says which.
        """
        folder = Path(folder)
        try:
            index = read_json(folder / "stack.json")
        except ValueError as error:
            raise RunError(
                f"{folder / 'stack.json'} is damaged or cut short: {error}; restore it, or save anew"
            ) from error
        if index is None:
            raise FileNotFoundError(f"{folder} holds no saved stack: there is no stack.json")
        if not isinstance(index, dict) or (missing := _INDEX - index.keys()):
            what = f"{', '.join(sorted(missing))} is missing" if isinstance(index, dict) else "it is no record"
            raise RunError(f"{folder / 'stack.json'} was not written by this version of AdapterStack.save: {what}")
        stack: AdapterStack | None = None
        for name, place in index["adapters"].items():
            state = safetensors.torch.load(_checked(folder / place / _WEIGHTS, place[-16:]))
            _checked(folder / place / _CONFIG, index["configs"][name])
            config = LoraConfig.from_pretrained(str(folder / place))
            config.inference_mode = False
            stack = stack or cls(base, config, merge=index["merge"], heads=index["head_modules"])
            model = stack.begin(name)
            expected = {k: t.shape for k, t in stack.state(name).items()}
            if expected != {k: t.shape for k, t in state.items()}:
                raise RunError(f"the adapter in {folder / place} is of another model: its matrices have other shapes")
            set_peft_model_state_dict(model, state, adapter_name=name)
        if stack is None:
            raise RunError(f"{folder / 'stack.json'} names no adapter")
        saved = _checked(folder / index["heads"], index["heads"].removesuffix(".safetensors")[-16:])
        stack._load_heads(safetensors.torch.load(saved))
        stack._pairs = None
        return stack

    def _load_heads(self, saved: Mapping[str, Tensor]) -> None:
        held = dict(self._head_parameters())
        if held.keys() != saved.keys():
            raise RunError(f"saved heads are {', '.join(saved) or 'none'}; this stack has {', '.join(held) or 'none'}")
        with torch.no_grad():
            for name, parameter in held.items():
                parameter.copy_(saved[name])

    def _head_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(trained_modules(self.base, self.heads)) if self.heads else []


class _StackCallback(TrainerCallback):
    def __init__(self, stack: AdapterStack) -> None:
        self.stack = stack

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            place = self._place(args, state)
            heads = {name: p.detach().cpu().contiguous() for name, p in self.stack._head_parameters()}
            write(place / "heads.safetensors", safetensors.torch.save(heads))
            write_json(place / "stack.json", self._made())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end would bring back nothing of a stack of adapters; leave it out, and load the "
                "best checkpoint's adapters yourself"
            )
        self.stack.activate()
        if state.global_step:
            place = self._place(args, state)
            if not (place / "heads.safetensors").exists():
                raise RunError(
                    f"{place} holds no heads.safetensors, which the stack's callback saves: resume from a checkpoint "
                    "in the Trainer's own output_dir that was made with the callback"
                )
            made, mine = read_json(place / "stack.json") or {}, self._made()
            if wrong := [key for key in mine if made.get(key) != mine[key]]:
                raise RunError(
                    f"{place} was made with other {' and '.join(wrong)} ({made.get(wrong[0])}) than this stack's "
                    f"({mine[wrong[0]]}); this stack is spoilt by the attempt: build it anew as it was, by "
                    "AdapterStack.load and begin(), then resume"
                )
            self.stack._load_heads(safetensors.torch.load((place / "heads.safetensors").read_bytes()))

    def _made(self) -> dict[str, Any]:
        """What a checkpoint is made with: adapters in order, their settings, and digests of those that are merged."""
        stack = self.stack
        told = {
            name: getattr(stack.config, name)
            for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        }
        merged = {name: _digest(stack._bytes(name)) for name in stack.names[:-1]} if stack.merge else {}
        return {"adapters": stack.names, "settings": told, "merged adapters": merged}

    @staticmethod
    def _place(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"


_WEIGHTS, _CONFIG = peft.utils.SAFETENSORS_WEIGHTS_NAME, peft.utils.CONFIG_NAME
_INDEX = {"adapters", "configs", "heads", "head_modules", "merge"}


def _check_config(config: LoraConfig) -> None:
    """Refuse what a stack of adapters cannot be made of; peft itself says so only at the second, or not at all."""
    wanted: dict[str, Any] = {
        "task_type": None, "modules_to_save": None, "trainable_token_indices": None, "bias": "none", "use_dora": False,
        "lora_bias": False, "target_parameters": None, "layer_replication": None, "use_qalora": False,
        "use_bdlora": None, "alora_invocation_tokens": None, "arrow_config": None, "kasa_config": None,
        "monteclora_config": None, "velora_config": None,
    }  # fmt: skip
    for name, value in wanted.items():
        if (given := getattr(config, name, value)) != value and given:
            extra = "; name what else is trained in heads=" if name in ("task_type", "modules_to_save") else ""
            raise ValueError(
                f"{name} of the LoraConfig is {given!r}; a stack's adapters are plain LoRA, {value!r}{extra}"
            )
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("gaussian", "eva", "orthogonal"):
        raise ValueError(
            f"init_lora_weights is {config.init_lora_weights!r}, which changes the base's weights as well; take one "
            "that does not: True, 'gaussian', 'orthogonal' or 'eva'"
        )


def _layers(model: PeftModel) -> dict[str, Any]:
    inner: Any = model.base_model.model
    return {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _checked(path: Path, digest: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RunError(f"{path} is missing; the other adapters are intact. Restore it, or save anew") from None
    if _digest(data) != digest:
        raise RunError(
            f"{path} was cut short or changed: its SHA-256 begins with {_digest(data)}, not {digest}. The other "
            "adapters are intact; restore this one"
        )
    return data
