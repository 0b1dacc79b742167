"""Networks under test, side by side: copies of a model, fresh weights for it, and the training step of all of them."""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils import _pytree as pytree

from perennial.methods import Context, Rule
from perennial.modules.online_norm import accumulators
from perennial.noise import Noise, elements, seed_key, torch_seed
from perennial.units import Distribution, UnitMap
from perennial.units.trace import undisturbed

Factory: TypeAlias = Callable[[], nn.Module]
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]

TOGETHER = 256
"""Samples of one evaluation pass, or the batch size if that is larger."""


@contextlib.contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """No gradients are recorded; the model and all global random states are left as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), undisturbed(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # vmap, of an operation that it runs in a loop
        yield


def copied(model: nn.Module) -> nn.Module:
    """A copy of the model that shares nothing with it, without hooks of others than torch."""
    memo: dict[int, Any] = {}
    for name, module in model.named_modules():
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
            hooks: dict[int, Any] = getattr(module, kind)
            kept: OrderedDict[int, Any] = OrderedDict()
            for key, hook in hooks.items():
                origin = getattr(hook, "__module__", None) or ""
                if origin.startswith("torch."):
                    kept[key] = hook
                elif not origin.startswith("perennial."):
                    warnings.warn(
                        f"hooks do not run on networks under test, and module {name!r} has one, {hook!r}. If it is a "
                        "part of what the network computes, make it a module",
                        stacklevel=2,
                    )
            memo[id(hooks)] = kept
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # which tensors themselves refuse to copy
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, by qualified name."""
    return {name: t.detach() for name, t in (*network.named_parameters(), *network.named_buffers())}


def device_of(network: nn.Module) -> torch.device:
    """Where the first parameter lies."""
    return next((t.device for t in tensors(network).values()), torch.device("cpu"))


def generator(seed: int, purpose: str) -> torch.Generator:
    """A generator of its own for one purpose of a seed."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose))


def seed_globally(seed: int, purpose: str) -> None:
    """Seed the global generators that factories and models draw from."""
    one = torch_seed(seed, purpose)
    torch.default_generator.manual_seed(one)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(one)
    random.seed(one)
    np.random.seed(one & 0xFFFFFFFF)


def made(factory: Factory, seed: int, purpose: str) -> nn.Module:
    """A network by the user's factory, for one purpose of a seed."""
    seed_globally(seed, purpose)
    with torch.enable_grad():
        network = factory()
    if not isinstance(network, nn.Module):
        raise TypeError(f"factory() gives a {type(network).__name__}; it must give a module")
    bare: nn.Module = getattr(network, "_orig_mod", network)
    return bare


def fresh(
    network: nn.Module, factory: Factory | None, initial: Mapping[str, Distribution], seed: int, purpose: str
) -> dict[str, Tensor]:
    """Parameters and buffers of a fresh network, by name: by the factory, or drawn from the distributions."""
    mine = tensors(network)
    if factory is not None:
        theirs = tensors(made(factory, seed, purpose))
        for name in (*mine, *theirs):
            shape, wanted = (list(t[name].shape) if name in t else "missing" for t in (theirs, mine))
            if shape != wanted:
                raise ValueError(
                    f"factory() makes another network: its {name} is {shape}, where the model's is {wanted}; give the "
                    "factory that made the model"
                )
        return {name: theirs[name].to(w.device, w.dtype) for name, w in mine.items()}
    trained = [name for name, w in network.named_parameters() if w.requires_grad]
    unknown = [name for name in trained if name not in initial]
    if unknown:
        raise ValueError(
            f"how {', '.join(unknown)} was drawn is not known, so that it cannot be drawn afresh; give factory=, a "
            "function that makes a fresh network"
        )
    key = torch.tensor(seed_key(seed, purpose), dtype=torch.int32, device=device_of(network))
    noise = Noise(key, torch.zeros_like(key[0]), "fresh")
    drawn = initial.keys() & {*trained, *dict(network.named_buffers())}
    found = {}
    for name, w in mine.items():
        if name in drawn:
            found[name] = initial[name].draw(noise, name, elements(w)).to(w.dtype)
        else:
            found[name] = torch.zeros_like(w) if name.endswith("num_batches_tracked") else w
    return found


class LaneState(NamedTuple):
    """What the networks carry from step to step; every tensor [lanes, ...], seed by seed and in it side by side."""

    params: dict[str, Tensor]
    """What is trained."""
    fixed: dict[str, Tensor]
    """What is not trained, where networks differ in it."""
    buffers: dict[str, Tensor]
    """By qualified name, as the others."""
    rule: Any
    """The optimizer's state."""
    diverged: Tensor
    """int64 [lanes]: see :attr:`perennial.trainability.Learning.diverged`."""


class Lanes:
    """Networks that are trained side by side.

    Those of one seed (its sides) get the same batches, the same noise and the same dropout. A lane that diverges keeps
    what it held before the step, and disturbs no other.
    """

    def __init__(
        self,
        network: nn.Module,
        rule: Rule,
        loss: Loss,
        seeds: Sequence[int],
        starts: Sequence[Sequence[Mapping[str, Tensor]]],
    ) -> None:
        """``starts``: parameters and buffers by name, of each seed's sides. ``network`` is used up."""
        self.network, self.loss, self.seeds, self.sides = network, loss, seeds, len(starts[0])
        self.one_by_one: str | None = None
        self.device = device_of(network)
        self._units, self._accumulators = UnitMap(()), accumulators(network)
        self.rule = type(rule).settled([rule], self._units)[0]
        keys = [seed_key(seed, "method") for seed in seeds for _ in range(self.sides)]
        self._keys = torch.tensor(keys, dtype=torch.int32, device=self.device)
        flat = [start for sides in starts for start in sides]
        named = dict(network.named_parameters())
        # A large part that is not trained, the same in all of them, is not copied: the network itself holds it.
        apart = [n for n, w in named.items() if not w.requires_grad and not all(torch.equal(one[n], w) for one in flat)]
        groups = ([n for n, w in named.items() if w.requires_grad], apart, [n for n, _ in network.named_buffers()])
        params, fixed, buffers = ({n: torch.stack([one[n] for one in flat]) for n in names} for names in groups)
        if not params:
            raise ValueError("the model has no parameter that requires a gradient, so that there is nothing to train")
        states = [self.rule.init({n: w[lane] for n, w in params.items()}, self._units) for lane in range(len(flat))]
        state = pytree.tree_map(lambda *leaves: torch.stack(leaves), *states)
        self.state = LaneState(params, fixed, buffers, state, torch.full((len(flat),), -1, device=self.device))

    def beside(self, starts: Sequence[Mapping[str, Tensor]]) -> Lanes:
        """These networks, of one side, with another beside each; all with a new optimizer state."""
        state = self.state
        held = {**state.params, **state.fixed, **state.buffers}
        pairs = [({**start, **{n: t[lane] for n, t in held.items()}}, start) for lane, start in enumerate(starts)]
        both = Lanes(self.network, self.rule, self.loss, self.seeds, pairs)
        both.one_by_one = self.one_by_one
        both.state.diverged[::2] = torch.where(state.diverged >= 0, 0, -1)
        return both

    def step(self, number: int, x: Tensor, y: Tensor) -> Tensor:
        """One step on each seed's batch, [seeds, batch, ...]; the loss before it, float64 [seeds, sides], NaN for lanes
        that have diverged."""
        self.network.train()
        old = self.state
        loss, grads, buffers = self._run(self._slopes, number, x, y)
        at = torch.tensor(number, dtype=torch.int32, device=self.device)
        params, rule = vmap(self._update, in_dims=(0, 0, 0, 0, None))(old.params, old.rule, grads, self._keys, at)
        sound = torch.stack([loss.isfinite(), *(w.flatten(1).isfinite().all(1) for w in _rows(params))]).all(0)
        alive = sound & (old.diverged < 0)
        diverged = torch.where((old.diverged < 0) & ~sound, number + 1, old.diverged)
        new = old._replace(params=params, buffers=buffers, rule=rule)
        if not bool(alive.all()):
            new = pytree.tree_map(lambda after, before: torch.where(_along(alive, after), after, before), new, old)
        self.state = new._replace(diverged=diverged)
        return torch.where(alive, loss.double(), torch.nan).view(len(self.seeds), self.sides)

    def evaluate(self, score: Loss, inputs: Tensor, targets: Tensor, together: int) -> Tensor:
        """The mean of a score over samples, targets [seeds, samples, ...], in evaluation mode; float64 [seeds, sides],
        NaN for lanes that have diverged."""
        self.network.eval()

        def scored(lane: LaneState, x: Tensor, y: Tensor, _: object = None) -> Tensor:
            return score(self._forward(lane, lane.params, x)[0], y).double()

        total = torch.zeros(self._keys.shape[0], dtype=torch.float64, device=self.device)
        for x, y in zip(inputs.split(together), targets.split(together, dim=1), strict=True):
            each = x.to(self.device).expand(len(self.seeds), *x.shape)
            total += len(x) * self._run(scored, 0, each, y.to(self.device))
        return torch.where(self.state.diverged >= 0, torch.nan, total / len(inputs)).view(-1, self.sides)

    def _forward(self, lane: LaneState, free: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, and the buffers after it; ``free`` are parameters, and the buffers that a backward pass moves."""
        buffers = {n: b.clone() for n, b in lane.buffers.items() if n not in free}
        return functional_call(self.network, {**lane.fixed, **buffers, **free}, (x,)), buffers

    def _slopes(
        self, lane: LaneState, x: Tensor, y: Tensor, differentiate: Any = grad_and_value
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The loss of one network, its gradient, and the buffers after it."""

        def objective(free: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            output, buffers = self._forward(lane, free, x)
            return self.loss(output, y), buffers

        moving = {n: lane.buffers[n] for n in self._accumulators}
        grads, (loss, buffers) = differentiate(objective, has_aux=True)(lane.params | moving)
        moved = {n: b + grads.pop(n) for n, b in moving.items()}
        return loss, grads, {n: {**buffers, **moved}[n] for n in lane.buffers}

    def _update(
        self, params: dict[str, Tensor], state: Any, grads: dict[str, Tensor], key: Tensor, number: Tensor
    ) -> tuple[dict[str, Tensor], Any]:
        context = Context(grads, {}, Noise(key, number).scoped(self.rule.name), self._units)
        changed, new = self.rule.step(params, state, context)
        return {**params, **changed}, new

    def _run(self, function: Any, number: int, x: Tensor, y: Tensor) -> Any:
        """``function(lane, x, y)`` of all lanes, its tensors [lanes, ...]; x and y are [seeds, batch, ...].

        Side by side as long as vmap can run it; what it raised says why not.
        """
        shape, carried = (len(self.seeds), self.sides), self.state._replace(rule=())
        if self.one_by_one is None:
            seed_globally(self.seeds[0], f"model {number}")
            pairs = pytree.tree_map(lambda t: t.unflatten(0, shape), carried)
            # Data have a dimension of sides too: some operations' rules for vmap mishandle operands that differ in it.
            each = (t.unsqueeze(1).expand(-1, self.sides, *t.shape[1:]) for t in (x, y))
            try:
                both = vmap(vmap(function, randomness="same"), randomness="different")(pairs, *each)
                return pytree.tree_map(lambda t: t.flatten(0, 1), both)
            except Exception as error:  # if the network itself is at fault, it raises again below
                self.one_by_one = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        found = []
        for lane in range(len(self.seeds) * self.sides):
            mine = lane // self.sides
            seed_globally(self.seeds[mine], f"model {number}")
            alone = pytree.tree_map(lambda t, lane=lane: t[lane], carried)
            found.append(function(alone, x[mine], y[mine], _by_autograd))
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *found)


def _rows(params: dict[str, Tensor]) -> Iterator[Tensor]:
    return (w.unsqueeze(-1) for w in params.values())


def _along(lanes: Tensor, like: Tensor) -> Tensor:
    return lanes.view(-1, *(1 for _ in like.shape[1:]))


def _by_autograd(objective: Callable[..., Any], has_aux: bool) -> Callable[[dict[str, Tensor]], Any]:
    """As ``grad_and_value``, by plain autograd, which runs whatever a training loop runs."""

    def both(params: dict[str, Tensor]) -> Any:
        with torch.enable_grad():
            leaves = {n: w.detach().clone().requires_grad_() for n, w in params.items()}
            loss, aux = objective(leaves)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True)), (loss.detach(), {n: b.detach() for n, b in aux.items()})

    return both
