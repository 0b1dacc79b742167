"""Attaching a method to a model and an optimizer."""

from __future__ import annotations

import dataclasses
import fnmatch
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from perennial.attach.arguments import (
    as_call,
    bare_model,
    bare_optimizer,
    checked_method,
    drawn_by,
    running_on,
    trained,
)
from perennial.attach.optimizer_state import FreshState, skipped
from perennial.attach.shown import grouped, wrapped
from perennial.attach.taps import Tap, let_compiled_code_see_hooks, tapped
from perennial.methods import Context, Intervention, Regulariser
from perennial.methods.base import Touched
from perennial.methods.replace import ReplacesUnits
from perennial.noise import Noise, seed_key
from perennial.units import Distribution, UnitLayer, UnitMap, prove, recover, trace
from perennial.units.prove import SILENT
from perennial.units.trace import undisturbed

KEY = "perennial"
"""Under which a keeper's state stands in ``optimizer.state_dict()``."""

_ATTACHED: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[Keeper]] = weakref.WeakKeyDictionary()
"""The keepers at work, by optimizer; their hooks keep them alive."""


def attach(
    method: Intervention,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    example: Any = None,
    units: UnitMap | None = None,
    factory: Callable[[], nn.Module] | None = None,
    layers: str | Sequence[str] = "*",
    coupled: bool = False,
    loss: Callable[[], Tensor] | None = None,
    check: bool = True,
    seed: int = 0,
) -> Keeper:
    """Let a method keep a model plastic while it is trained as before.

    After every step of the optimizer the method changes the model's parameters in place. Nothing else changes: the
    loop, the model's class, its parameters' identity, the optimizer. Several methods can be attached one after another.

    Example::

        keeper = perennial.attach(perennial.ContinualBackprop(replacement_rate=1e-5), model, optimizer, example=batch)
        print(keeper)      # layers and units kept, layers refused and why
        ...                # the loop stays as it is
        keeper.remove()

    Args:
        method: an intervention.
        model: any module. Attach before ``torch.compile``: what was compiled before the first keeper of a process is
            attached does not see its hooks (``torch.compiler.reset()`` drops it).
        optimizer: the optimizer that trains it. Its parameters alone are kept.
        example: an input for one forward pass, from which the units are traced: a tensor, a tuple of positional
            arguments, or a mapping of keywords (a batch of transformers). Not needed by methods that know no units.
        units: a map made by hand, in place of tracing (:meth:`perennial.units.UnitMap.by_name`).
        factory: makes such a model. Run once, to see how every parameter is drawn; without it that is taken from the
            modules' own initialisers (:func:`perennial.units.recover`).
        layers: names, or patterns with ``*``, of the layers to keep.
        coupled: keep units on residual streams too.
        loss: computes the loss on the batch of the last step, for methods that need it (``utility="exact"``).
        check: prove the unit map on the example first (:func:`perennial.units.prove`); a layer that fails is refused.
            Costs five forward passes a layer, and some thirty for a map made by hand, of which every two units are told
            apart.
        seed: of the method's random numbers.

    Raises:
        TypeError: not an intervention, a module or an optimizer.
        ValueError: nothing can be kept, with the reasons; the optimizer does not train this model; something that the
            method needs is missing; the factory makes another model; the same method is attached to the same weights
            already.
    """
    method = checked_method(method, model, optimizer)
    model, optimizer = bare_model(model), bare_optimizer(optimizer)
    params = trained(model, optimizer)
    if "loss" in method.needs and loss is None:
        raise ValueError(f"{method.name} needs loss=, a function without arguments that computes the last batch's loss")
    args, kwargs = as_call(example)
    names = [layers] if isinstance(layers, str) else list(layers)
    notes: dict[str, str] = {}
    by_hand = units is not None
    if units is None and example is not None:
        with running_on(example, model):
            units = trace(model, *args, **kwargs)
    elif units is None:
        units = UnitMap(())
    if isinstance(method, ReplacesUnits) and example is None and not len(units):
        raise ValueError(f"{method.name} replaces hidden units: give example=, an input from which they can be traced")
    drawn = drawn_by(factory, model) if factory is not None else {}
    initial: Mapping[str, Distribution] = units.initial or drawn or recover(model)
    units = dataclasses.replace(units, initial=initial)
    if isinstance(method, ReplacesUnits):
        units = _kept(units, names, coupled, params, initial)
        if example is not None:
            with running_on(example, model):
                if check:
                    units, notes = _proved(units, model, args, kwargs, by_hand)
                if "activations" in method.needs or "signals" in method.needs:
                    units = _seen(units, model, args, kwargs)
        if not len(units):
            reasons = "\n".join(f"  {name}: {reason}" for name, reason in units.refused) or "  it has no hidden layer"
            raise ValueError(f"{method.name} found no hidden units to keep in this network:\n{reasons}")
    (method,) = type(method).settled([method], units)
    _not_twice(method, optimizer, params, units)
    return Keeper(method, model, optimizer, units, notes, loss, seed)


class Keeper:
    """A method at work on a model; made by :func:`attach`.

    Its state travels in ``optimizer.state_dict()`` and comes back with ``optimizer.load_state_dict()``.
    """

    def __init__(
        self,
        method: Intervention,
        model: nn.Module,
        optimizer: Optimizer,
        units: UnitMap,
        notes: Mapping[str, str],
        loss: Callable[[], Tensor] | None,
        seed: int,
    ) -> None:
        self.method = method
        """The method, with settings that follow from the network filled in."""
        self.units = units
        """The units that it keeps; the others, with the reason, in ``units.refused``."""
        self.seed = seed
        """Of the method's random numbers; that of a checkpoint once it is loaded."""
        self.notes = dict(notes)
        """What is to be known of layers that are kept, by name: that their units are silent on the example, say."""
        self.steps = 0
        """Optimizer steps seen."""
        self._begun: dict[str, tuple[Tensor, Tensor]] = {}
        self._model, self._optimizer, self._loss_of_batch = model, optimizer, loss
        self._params = trained(model, optimizer)
        self._named = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        device = next(iter(self._params.values())).device
        self._step = torch.full((), -1, dtype=torch.int32, device=device)  # the number of the last step, from 0
        self._noise = Noise(
            torch.tensor(seed_key(seed, "method"), dtype=torch.int32, device=device), self._step, method.name
        )
        with torch.no_grad():
            self.state: Any = method.init({name: _wide(p).clone() for name, p in self._params.items()}, units)
            """The method's state."""
            self._begin()
        self._total = {
            layer.name: torch.zeros(layer.size, dtype=torch.int64, device=device)
            for layer in (units if isinstance(method, ReplacesUnits) else ())
        }
        self._seen: dict[str, Tensor] = {}
        self._slopes: dict[str, Tensor] = {}
        self._loaded: Mapping[str, Any] = {}
        self._tasks = 0  # how many times new_task() was called
        self._penalties = 0  # and penalty()
        self._here = 0  # steps seen since attaching, those of a checkpoint not counted
        self._fresh = FreshState.of(optimizer)
        self._fresh.enter()
        self._handles: list[Any] = []
        self._label = self._free_label(optimizer)
        self._hook()

    # --- what a user calls ------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Take away every hook. The model and the optimizer are as if never attached, with the weights they have."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            _ATTACHED[self._optimizer].discard(self)
            self._fresh.leave()
            self._seen.clear()
            self._slopes.clear()

    def new_task(self) -> None:
        """Say that a new task begins with the next step: methods that act when tasks change act now."""
        self._tasks += 1
        if self.method.due(self.steps, True) and not self.method.due(self.steps, False):
            with torch.no_grad():
                self._event()

    def penalty(self) -> Tensor:
        """What a coupled regulariser adds to the loss: ``loss = loss + keeper.penalty()``. [], differentiable.

        Raises:
            ValueError: the method is not a regulariser, or is one that takes a step of its own (``coupled=False``).
        """
        if not isinstance(self.method, Regulariser) or not self.method.coupled:
            raise ValueError(f"{self.method!r} adds nothing to the loss; only a regulariser with coupled=True does")
        self._penalties += 1
        return self.method.rate * self.method.penalty(self._params, self.state, self.units)

    def replaced(self) -> dict[str, int]:
        """How many units have been re-initialised so far, by layer."""
        return {name: int(total.sum()) for name, total in self._total.items()}

    # --- hooks ------------------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        optimizer = self._optimizer
        _ATTACHED.setdefault(optimizer, weakref.WeakSet()).add(self)
        self._handles = [
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]
        modules = dict(self._model.named_modules())
        slopes = self._slopes if "signals" in self.method.needs else None
        if {"activations", "signals"} & self.method.needs:
            let_compiled_code_see_hooks()
            for tap in dict.fromkeys(layer.tap for layer in self.units):
                module = modules[tap.rpartition(".")[0]]
                handle = module.register_forward_pre_hook(Tap(tap, self._seen, slopes), with_kwargs=True)
                self._handles.append(handle)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if skipped(self._optimizer):
            return
        activations, signals = self._look()
        method = self.method
        with torch.no_grad():
            self._step.add_(1)
            context = self._context(activations, signals)
            changed, self.state = method.step(self._params, self.state, context)
            self._write(changed)
            self._renew(method.replaced(self.state))
            self.steps += 1
            self._here += 1
            self._begun.clear()
            if self._here == 10:
                self._warn_of_a_missing_penalty()
            if method.due(self.steps, False):
                self._event()

    def _begin(self) -> None:
        """What the method does before the first step. Until that is made, what was overwritten is kept, with what it
        was overwritten by: the weights may be those of a checkpoint, of which the optimizer's part is loaded next."""
        context = self._context({}, {})._replace(grads={})
        changed, self.state = self.method.begun(self._params, self.state, context)
        self._begun = {name: (self._live(name).detach().clone(), new) for name, new in changed.items()}
        self._write(changed)

    def _begin_undone(self) -> None:
        """Put back what :meth:`_begin` has overwritten, but for what was loaded since."""
        for name, (old, new) in self._begun.items():
            if torch.equal(self._live(name), new):
                self._live(name).copy_(old)
        self._begun.clear()

    def _event(self) -> None:
        context = self._context({}, {})._replace(grads={})  # as in a population: what it goes by is in its state
        outcome = self.method.happened(self._params, self.state, context)
        self.state = outcome.state
        self._write(outcome.changed)
        if outcome.replaced:
            self._renew(dict(outcome.replaced))
        else:
            self._renew_marked(outcome.touched)

    def _look(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The activations and signals of the last forward pass that recorded gradients."""
        if not {"activations", "signals"} & self.method.needs:
            return {}, {}
        missing = [layer.name for layer in self.units if layer.tap not in self._seen]
        if missing:
            raise RuntimeError(
                f"{self.method.name} saw no activation of {', '.join(missing[:5])} before this optimizer step. If "
                "anything was compiled before the first attach() of this process, this model or another of its class, "
                "compiled code without hooks may be in use: attach before the first compiled call, or call "
                "torch.compiler.reset() after attaching. If these layers take no part in training, leave them out with "
                "layers="
            )
        activations = {layer.name: layer.activation(_wide(self._seen[layer.tap])) for layer in self.units}
        signals = {}
        if "signals" in self.method.needs:
            lost = [layer.name for layer in self.units if layer.tap not in self._slopes]
            if lost:
                raise RuntimeError(
                    f"{self.method.name} needs the gradient of the loss by the activations, and saw none of "
                    f"{', '.join(lost[:5])}: no backward pass went through them before this optimizer step"
                )
            signals = {layer.name: layer.activation(_wide(self._slopes[layer.tap])) for layer in self.units}
        return activations, signals

    def _context(self, activations: Mapping[str, Tensor], signals: Mapping[str, Tensor]) -> Context:
        return Context(
            _Gradients(self._params),
            activations,
            self._noise,
            self.units,
            signals,
            self._loss if self._loss_of_batch is not None else None,
            self._buffers,
            _mean_over_processes if _processes() > 1 else _itself,
            look=self._step.device.type == "cpu",
            in_place=True,
        )

    def _loss(self, overrides: Mapping[str, Tensor]) -> Tensor:
        """The loss of the last batch with other values for some parameters."""
        assert self._loss_of_batch is not None
        saved = {name: self._named[name].detach().clone() for name in overrides}
        try:
            for name, value in overrides.items():
                self._named[name].copy_(value)
            with undisturbed(self._model):
                return self._loss_of_batch().detach()
        finally:
            for name, value in saved.items():
                self._named[name].copy_(value)

    def _write(self, changed: Mapping[str, Tensor]) -> None:
        for name, value in changed.items():
            self._live(name).copy_(value)

    def _live(self, name: str) -> Tensor:
        """The model's own parameter or buffer."""
        return self._params[name] if name in self._params else self._buffers[name]

    def _warn_of_a_missing_penalty(self) -> None:
        method = self.method
        if isinstance(method, Regulariser) and method.coupled and not self._penalties and float(method.rate):
            warnings.warn(
                f"{method.name} with coupled=True does nothing by itself, and keeper.penalty() was not called in ten "
                "steps: add it to the loss, loss = loss + keeper.penalty(), or set coupled=False",
                stacklevel=4,
            )

    # --- fresh optimizer state --------------------------------------------------------------------------------------

    def _renew(self, replaced: Mapping[str, Tensor]) -> None:
        """Give the weights of replaced units a fresh optimizer state."""
        for layer in self.units:
            mark = replaced.get(layer.name)
            if mark is None:
                continue
            units, hit = _which(mark, getattr(self.method, "per_step", None))
            if not len(units):
                continue
            self._total[layer.name].add_(mark)
            self._fresh.reset_units(layer.name, mark)
            for part in (*layer.incoming, *layer.norms, *layer.outgoing):
                parameter = self._params.get(part.parameter)
                if parameter is None:
                    continue
                if part.groups > 1:
                    self._fresh.reset_where(parameter, part.mask(mark, parameter))
                    continue
                every = None if hit is None else hit.repeat_interleave(part.index.shape[1])
                self._fresh.reset(parameter, part.dim, part.positions(units), every)

    def _renew_marked(self, touched: Touched) -> None:
        for layer, marks in self.units.renewed(touched).items():
            self._fresh.reset_units(layer, marks[0])
        for name, dims in touched.items():
            parameter = self._params[name]
            for dim, mark in dims.items():
                if dim < 0:
                    self._fresh.reset_where(parameter, mark)
                    continue
                positions, hit = _which(mark, None)
                if len(positions):
                    self._fresh.reset(parameter, dim, positions, hit)

    # --- state ------------------------------------------------------------------------------------------------------

    def _free_label(self, optimizer: Optimizer) -> str:
        taken = optimizer.state_dict().get(KEY, {})
        label, number = self.method.name, 2
        while label in taken:
            label, number = f"{self.method.name} {number}", number + 1
        return label

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        paths, _ = pytree.tree_flatten_with_path(self.state)
        mine = {
            "steps": self.steps,
            "seed": self.seed,
            "state": {pytree.keystr(path): leaf.clone() for path, leaf in paths},
            "total": {name: total.clone() for name, total in self._total.items()},
        }
        others = state_dict.get(KEY, {})
        return state_dict | {KEY: others | {self._label: mine, "counts": self._fresh.state_dict()}}

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Refuse what does not fit before anything is changed."""
        saved = state_dict.get(KEY, {}).get(self._label)
        self._loaded = state_dict.get(KEY, {})
        if saved is None:
            warnings.warn(
                f"the loaded optimizer state holds nothing of {self._label}: it goes on with the state that it has",
                stacklevel=4,
            )
            return
        mine = {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(self.state)[0]}
        theirs = saved["state"]
        wrong = sorted(mine.keys() ^ theirs.keys()) or [n for n, leaf in mine.items() if leaf.shape != theirs[n].shape]
        if wrong:
            raise ValueError(
                f"the loaded state of {self._label} is of another network or of other settings: {', '.join(wrong[:5])} "
                "do not fit. Attach the same method to the same model before loading"
            )

    def _load(self, optimizer: Optimizer) -> None:
        loaded = self._loaded
        saved = loaded.get(self._label)
        if saved is None:
            return
        paths, spec = pytree.tree_flatten_with_path(self.state)
        # The dtypes are those of the keeper: torch casts what it loads to the parameter's, we do not.
        leaves = [saved["state"][pytree.keystr(path)].to(leaf.device, leaf.dtype).clone() for path, leaf in paths]
        self.state = pytree.tree_unflatten(leaves, spec)
        self.steps = int(saved["steps"])
        self._step.fill_(self.steps - 1)
        if int(saved["seed"]) != self.seed:
            self.seed = int(saved["seed"])
            self._noise.key.copy_(torch.tensor(seed_key(self.seed, "method"), dtype=torch.int32))
        for name, total in saved["total"].items():
            self._total[name].copy_(total)
        self._fresh.load_state_dict(loaded["counts"])
        self._loaded = {}
        with torch.no_grad():
            self._begin_undone()
            if not self.steps:
                self._begin()

    # --- showing ----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        method = self.method
        lines = wrapped(f"{method}", 0)
        if not self._handles:
            lines.append("  removed: it does nothing any more")
        lines += wrapped(f"seed {self.seed}, {self.steps} steps; {self._fresh.policy()}", 2)
        if self._total:
            kept = sum(layer.size for layer in self.units)
            lines.append(f"  keeps {kept} units in {len(self._total)} layers, of which replaced so far:")
            width = max(len(name) for name in self._total)
            for layer in self.units:
                source = self.units.initial.get(layer.incoming[0].parameter)
                note = "".join(f"; {text}" for text in (self.notes.get(layer.name),) if text)
                lines.append(
                    f"    {layer.name:<{width}}  {layer.size:>6} units  {self._replaced(layer):>6} replaced"
                    f"  redrawn: {source or 'unknown'}{note}"
                )
        if not isinstance(method, ReplacesUnits):
            names = method.acts_on(self._params, self.units)
            share = "all" if len(names) == len(self._params) else f"{len(names)} of {len(self._params)}"
            listed = "" if share == "all" else f": {', '.join(grouped(names))}"
            lines += wrapped(f"acts on {share} parameters{listed}", 2)
        if self.units.refused and self._total:
            lines.append("  leaves alone:")
            by_reason: dict[str, list[str]] = {}
            for name, reason in self.units.refused:
                by_reason.setdefault(reason, []).append(name)
            for reason, names in by_reason.items():
                lines += wrapped(f"{', '.join(grouped(names))}: {reason}", 4)
        if isinstance(method, Regulariser) and method.coupled:
            lines.append("  coupled: add keeper.penalty() to the loss")
        if method.due(1, True) and not method.due(1, False):
            told = f"called {self._tasks} times so far" if self._tasks else "which was not called yet"
            lines.append(f"  acts when a new task begins: tell it by keeper.new_task(), {told}")
        return "\n".join(lines)

    def _replaced(self, layer: UnitLayer) -> int:
        return int(self._total[layer.name].sum())


# --- making ---------------------------------------------------------------------------------------------------------


def _not_twice(method: Intervention, optimizer: Optimizer, params: Mapping[str, Tensor], units: UnitMap) -> None:
    """Refuse what is there already, as after running a cell of a notebook again."""

    def weights(units: UnitMap, params: Mapping[str, Tensor]) -> set[int]:
        makes = {part.parameter for layer in units for part in layer.incoming}
        return {id(params[name]) for name in (makes if isinstance(method, ReplacesUnits) else params)}

    for keeper in _ATTACHED.get(optimizer, ()):
        if keeper.method == method and weights(units, params) & weights(keeper.units, keeper._params):
            raise ValueError(
                f"{method} is attached to this optimizer already, and would act twice on the same weights. Call "
                "remove() on the first keeper, or attach with other settings or to other layers="
            )


def _kept(
    units: UnitMap,
    names: Sequence[str],
    coupled: bool,
    params: Mapping[str, Tensor],
    initial: Mapping[str, Distribution],
) -> UnitMap:
    """The layers that are asked for and can be kept; the others among the refused, with the reason."""
    for pattern in names:
        every = [*(layer.name for layer in units), *dict(units.refused)]
        if pattern != "*" and not any(fnmatch.fnmatchcase(name, pattern) for name in every):
            known = ", ".join(layer.name for layer in units)
            raise ValueError(f"layers={pattern!r} matches no layer. Layers of units: {known}")
    kept, refused = [], list(units.refused)
    buffers = {part.parameter for layer in units for part in layer.norms if "running_" in part.parameter}
    for layer in units:
        parts = [part.parameter for part in (*layer.incoming, *layer.norms, *layer.outgoing)]
        frozen = [name for name in parts if name not in params and name not in buffers]
        if not any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in names):
            refused.append((layer.name, "not asked for"))
        elif layer.coupled and not coupled:
            why = "on a residual stream; kept only with coupled=True, all that writes to it and reads it together"
            refused += [(maker, why) for maker in layer.makers()]
        elif frozen:
            refused.append((layer.name, f"not trained: {', '.join(frozen[:3])} is frozen or not in the optimizer"))
        else:
            kept.append(layer)
    return dataclasses.replace(units, layers=tuple(kept), refused=tuple(refused))


def _proved(
    units: UnitMap, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], every_pair: bool
) -> tuple[UnitMap, dict[str, str]]:
    proofs = {proof.layer: proof for proof in prove(model, units, *args, every_pair=every_pair, **kwargs)}
    # Dead units are what these methods are there for: only a contradiction speaks against a layer.
    wrong = {name: proof.note for name, proof in proofs.items() if not proof.proved and proof.note != SILENT}
    kept = tuple(layer for layer in units if layer.name not in wrong)
    failed = tuple((name, f"not proved: {note}") for name, note in wrong.items())
    notes = {name: proof.note for name, proof in proofs.items() if name not in wrong and proof.note}
    return dataclasses.replace(units, layers=kept, refused=units.refused + failed), notes


def _seen(units: UnitMap, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UnitMap:
    found, missing = tapped(model, units.layers, args, kwargs)
    kept = tuple(found[layer.name] for layer in units if layer.name in found)
    return dataclasses.replace(units, layers=kept, refused=units.refused + tuple(missing.items()))


# --- small things ---------------------------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: running averages in half precision stand still."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.detach()


def _which(mark: Tensor, most: int | None) -> tuple[Tensor, Tensor | None]:
    """The marked positions, int64 [k]; and, where the processor does not know how many they are, which of them count.

    On a CPU exactly those. On a device nobody waits for the count: at most ``most`` (None: all) positions.
    """
    if mark.device.type == "cpu":
        return mark.nonzero()[:, 0], None
    if most is None:
        return torch.arange(len(mark), device=mark.device), mark
    values, positions = mark.to(torch.int8).topk(min(most, len(mark)))
    return positions, values > 0


class _Gradients(Mapping[str, Tensor]):
    """Gradients by name, looked up when asked for; zero where there is none."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self._params = params

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._params[name]
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _mean_over_processes(score: Tensor) -> Tensor:
    total = score.clone()
    torch.distributed.all_reduce(total)
    return total / _processes()


def _itself(score: Tensor) -> Tensor:
    return score
