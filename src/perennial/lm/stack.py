"""One adapter a task on one base model."""

from __future__ import annotations

import copy
import hashlib
import shutil
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

from perennial.lm.factors import STACKS, Factors, Pair, adapted, factors_of
from perennial.lm.models import ModelError, trained_modules
from perennial.storage import RunError, read_json, write, write_json


class AdapterStack:
    """A sequence of LoRA adapters (Hu et al., 2022) on one model of ``peft``: the current one is trained, earlier ones
    are frozen and go on acting.

    Example::

        stack = AdapterStack(base, LoraConfig(r=8, lora_alpha=32, target_modules=["query", "value"]))
        for task in tasks:
            model = stack.begin(task.name)
            ...                            # train model: a loop or a Trainer with stack.callback()
            stack.save("adapters")
        stack = AdapterStack.load("adapters", base)

    Nothing of ``peft`` is changed: :attr:`model` is an ordinary ``PeftModel``, each saved adapter an ordinary folder of
    ``PeftModel.from_pretrained``.
    """

    def __init__(self, base: nn.Module, config: LoraConfig, *, merge: bool = False, heads: Sequence[str] = ()) -> None:
        """
        Args:
            base: a model of transformers. It is changed in place: layers get adapters, and with ``merge`` its weights
                the earlier updates.
            config: of every adapter; ``target_modules`` must be in the model. Give no ``task_type``: peft would then
                copy the classifier for each adapter and use the first copy alone.
            merge: earlier adapters are added to the base's weights when the next begins. The same function up to
                rounding, at the cost of one adapter however many tasks there were (and no dropout on earlier ones).
            heads: modules by name that are trained beside the adapters, such as ``classifier``.
        """
        self.base, self.config, self.merge, self.heads = base, config, merge, tuple(heads)
        self.names: list[str] = []
        """Adapters, oldest first; the last is current."""
        self._model: PeftModel | None = None
        self._merged: dict[str, dict[str, Tensor]] = {}
        self._old: dict[str, list[Tensor]] = {}
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
        if set(name) & set("./\\") or "lora_" in name or name in "lora_":
            raise ValueError(f"an adapter cannot be called {name!r}: peft takes no . / \\, and nothing like lora_")
        before = self.names[-1] if self.names else None
        if self._model is None:
            try:
                self._model = adapted(self.base, copy.deepcopy(self.config), name)
            except ValueError as error:
                layers = [n.rpartition(".")[2] for n, m in self.base.named_modules() if isinstance(m, nn.Linear)]
                raise ModelError(
                    f"target_modules {self.config.target_modules} cannot be adapted: {error} The model's linear layers "
                    f"are called {', '.join(dict.fromkeys(layers)) or 'nothing: there are none'}"
                ) from error
            STACKS[self._model] = self
        else:
            self._model.add_adapter(name, copy.deepcopy(self.config))
        if before is not None:
            self._retire(before)
        self.names.append(name)
        if before is not None and self.merge:
            self.activate()  # the current one must act before the one before can go
            self._model.delete_adapter(before)
        self.activate()
        return self._model

    def _retire(self, name: str) -> None:
        for module, factors in self.factors(name).items():
            self._old.setdefault(module, []).append(factors.down.detach().clone())
        if self.merge:
            self._merged[name] = self.state(name)
            with torch.no_grad():
                for layer in self._layers().values():
                    if name in layer.lora_A:
                        weight = layer.get_base_layer().weight
                        weight.copy_(weight + layer.get_delta_weight(name).to(weight.dtype))

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
            current = self.factors(self.names[-1], detach=False)
            self._pairs = [
                Pair(module, new, torch.cat(self._old[module]) if self._old.get(module) else None)
                for module, new in current.items()
            ]
        return self._pairs

    def factors(self, name: str, *, detach: bool = True) -> dict[str, Factors]:
        """An adapter's matrices by module, those of merged adapters too."""
        if name not in self.names:
            raise ValueError(f"there is no adapter {name!r}; there are {', '.join(self.names) or 'none'}")
        found = {}
        for module, layer in self._layers().items():
            if name in layer.lora_A:
                here = factors_of(layer, name)
            elif (key := f"base_model.model.{module}.lora_A.weight") in self._merged.get(name, {}):
                down, up = self._merged[name][key], self._merged[name][key.replace("lora_A", "lora_B")]
                here = Factors(down, up, layer.scaling[self.names[-1]])  # all adapters have one configuration
            else:
                continue
            found[module] = Factors(here.down.detach(), here.up.detach(), here.scaling) if detach else here
        return found

    def state(self, name: str) -> dict[str, Tensor]:
        """A copy of an adapter's tensors, by the names under which peft saves them."""
        if name in self._merged:
            return self._merged[name]
        found = get_peft_model_state_dict(self.model, adapter_name=name, save_embedding_layers=False)
        return {key: tensor.detach().cpu().clone() for key, tensor in found.items()}

    def merge_and_unload(self) -> nn.Module:
        """The base model with every update added to its weights, without adapters. The stack is over after it."""
        merged: nn.Module = self.model.merge_and_unload(adapter_names=list(self.model.peft_config))
        return merged

    def callback(self) -> TrainerCallback:
        """For a Trainer: after it resumed, which brings back the first adapter alone, all act again; heads, which it
        does not save beside adapters, are saved and restored."""
        return _StackCallback(self)

    def save(self, folder: str | Path) -> None:
        """Write all adapters, heads and their order. Killed at any moment, what was saved before can be loaded.

        Layout: ``stack.json`` names for each adapter a folder ``NAME-DIGEST`` as ``peft`` lays it out.
        """
        folder = Path(folder)
        places = {}
        for name in self.names:
            data = safetensors.torch.save({k: t.contiguous() for k, t in self.state(name).items()}, {"format": "pt"})
            places[name] = f"{name}-{_digest(data)}"
            if not (folder / places[name] / peft.utils.SAFETENSORS_WEIGHTS_NAME).exists():
                write(folder / places[name] / peft.utils.SAFETENSORS_WEIGHTS_NAME, data)
                self.model.peft_config[self.names[-1]].save_pretrained(str(folder / places[name]))
        heads = safetensors.torch.save({name: p.detach().cpu().contiguous() for name, p in self._head_parameters()})
        write(folder / (file := f"heads-{_digest(heads)}.safetensors"), heads)
        write_json(folder / "stack.json", {"adapters": places, "heads": file, "merge": self.merge})
        for path in folder.iterdir():  # what an earlier save wrote of the adapter that is still current
            if path.is_dir() and path.name not in places.values() and path.name[:-17] in self.names:
                shutil.rmtree(path)
            elif path.name.startswith("heads-") and path.name != file:
                path.unlink()

    @classmethod
    def load(cls, folder: str | Path, base: nn.Module, *, heads: Sequence[str] = ()) -> AdapterStack:
        """The stack that was saved, on a base model as it was before the first task; the last adapter is current.

        Raises:
            FileNotFoundError: no stack was saved there.
            RunError: a file is missing, cut short or changed, or belongs to another model; says which.
        """
        folder = Path(folder)
        index = read_json(folder / "stack.json")
        if index is None:
            raise FileNotFoundError(f"{folder} holds no saved stack: there is no stack.json")
        stack: AdapterStack | None = None
        for name, place in index["adapters"].items():
            state = _checked(folder / place / peft.utils.SAFETENSORS_WEIGHTS_NAME, place[-16:])
            config = LoraConfig.from_pretrained(str(folder / place))
            config.inference_mode = False
            stack = stack or cls(base, config, merge=index["merge"], heads=heads)
            model = stack.begin(name)
            expected = {k: t.shape for k, t in stack.state(name).items()}
            if expected != {k: t.shape for k, t in state.items()}:
                raise RunError(f"the adapter in {folder / place} is of another model: its matrices have other shapes")
            set_peft_model_state_dict(model, state, adapter_name=name)
        if stack is None:
            raise RunError(f"{folder / 'stack.json'} names no adapter")
        stack._load_heads(_checked(folder / index["heads"], index["heads"].removesuffix(".safetensors")[-16:]))
        return stack

    def _load_heads(self, saved: Mapping[str, Tensor]) -> None:
        held = dict(self._head_parameters())
        if held.keys() != saved.keys():
            raise RunError(f"saved heads are {', '.join(saved) or 'none'}; this stack has {', '.join(held) or 'none'}")
        with torch.no_grad():
            for name, parameter in held.items():
                parameter.copy_(saved[name])

    def _layers(self) -> dict[str, Any]:
        inner: Any = self.model.base_model.model
        return {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}

    def _head_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(trained_modules(self.base, self.heads)) if self.heads else []


class _StackCallback(TrainerCallback):
    def __init__(self, stack: AdapterStack) -> None:
        self.stack = stack

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.stack.heads:
            data = {name: p.detach().cpu().contiguous() for name, p in self.stack._head_parameters()}
            write(self._file(args, state), safetensors.torch.save(data))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and self.stack.heads and (path := self._file(args, state)).exists():
            self.stack._load_heads(safetensors.torch.load(path.read_bytes()))
        self.stack.activate()

    @staticmethod
    def _file(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "heads.safetensors"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _checked(path: Path, digest: str) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise RunError(f"{path} is missing; the other adapters are intact. Restore it, or save anew") from None
    if _digest(data) != digest:
        raise RunError(
            f"{path} was cut short or changed: its SHA-256 begins with {_digest(data)}, not {digest}. The other "
            "adapters are intact; restore this one"
        )
    return safetensors.torch.load(data)
