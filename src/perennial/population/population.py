"""Many runs as one program."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.utils import _pytree as pytree

from perennial import metrics, networks
from perennial.compiler import compile_step
from perennial.methods import Context, Intervention, Method, Regulariser
from perennial.methods.base import Tensors
from perennial.modules.online_norm import accumulators
from perennial.noise import Noise, seed_key, torch_seed
from perennial.population.lanes import Lane, LaneState, bind, hyper_parameters, structure
from perennial.population.passes import InLanes, Taps, copied, counted, evaluating
from perennial.streams import HeldOut, Stream
from perennial.units import build_and_record, observe, trace

_CHUNK_BYTES = 1 << 25
"""Examples are made this much at a time."""

MEASURED = ("dead_units", "weight_magnitude", "effective_rank_entropy", "units_replaced")
"""What :meth:`Population.measure` says if not asked for anything else, besides what methods measure."""

MEASURABLE = (
    *(name for name, m in metrics.METRICS.items() if m.of in ("units", "features", "weights", "gradients")),
    "units_replaced",
)
"""What it can be asked for, besides."""

_GRADIENT_STEPS = 100
"""Steps over whose examples metrics of gradients are means."""


class Population:
    """Lanes that differ in seed and in any number of their methods, trained side by side by one compiled step.

    Example::

        lanes = [
            Lane(seed, SGD(lr=0.01), (ContinualBackprop(replacement_rate=rate),))
            for seed in range(30) for rate in (0.0, 1e-4)
        ]
        population = Population(lambda: MLP(hidden=(5,)).build(20, 1), SlowlyChangingRegression(), lanes)
        table = population.run(1_000_000, bin=20_000)      # a polars table

    All lanes must have the same structure: the same classes of methods with the same settings that are not numbers.
    Units on a residual stream are left alone.

    Networks may have buffers (running statistics) and dropout (``nn.Dropout``), whose masks are the lane's own noise.
    What a lane predicts online is then taken by a second forward pass, without dropout; it learns from the one with it.

    Args:
        factory: makes the network, drawing its parameters from torch's global generator.
        stream: what it learns.
        lanes: the runs.
        device: where; lanes never leave it.
        dtype: of parameters, and of methods' numbers.
        compiled: False runs the same functions uncompiled.
        threads: processor threads for one step; None: torch's setting.
        plasticity_every: steps between samples at which the sample plasticity is taken
            (:func:`perennial.metrics.sample_plasticity`), by a second forward pass; None: never. The mean over a
            share of the samples estimates that over all.

    Raises:
        ValueError: no lanes, lanes of different structure, a network that does not fit the stream, draws
            random numbers other than for ``nn.Dropout``, assigns to its buffers in place of writing into them, or has a
            grouped convolution over hidden units.
    """

    def __init__(
        self,
        factory: Callable[[], nn.Module],
        stream: Stream,
        lanes: Sequence[Lane],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        compiled: bool = True,
        threads: int | None = None,
        plasticity_every: int | None = None,
    ) -> None:
        if plasticity_every is not None and plasticity_every < 1:
            raise ValueError(f"plasticity_every is {plasticity_every}; it is a number of steps from 1, or None")
        self.plasticity_every = plasticity_every
        if not lanes:
            raise ValueError("a population needs at least one lane")
        _check_fields(stream)
        self.stream, self.device, self.dtype = stream, torch.device(device), dtype
        self.threads = threads or torch.get_num_threads()
        self.compiled = compiled
        self.compile_seconds = 0.0
        self.model, initial = self._build(factory, lanes[0].seed)
        example = torch.zeros(2, *stream.input_shape)
        self._check_fit(example[: stream.batch])
        self._accumulators = accumulators(self.model)
        self.units = trace(self.model, example, initial=initial).interior()
        self._check_groups()
        self._nonlinearities = observe(self.model, self.units, example).nonlinearities
        for lane in lanes:
            if [structure(m) for m in lane.methods] != [structure(m) for m in lanes[0].methods]:
                raise ValueError(
                    f"lanes of one population differ in numbers only, but {lane.methods} and {lanes[0].methods} "
                    "differ in structure; make one population of each"
                )
        columns = [type(ms[0]).settled(ms, self.units) for ms in zip(*(lane.methods for lane in lanes), strict=True)]
        settled = zip(*columns, strict=True)
        self.lanes = tuple(Lane(lane.seed, ms[0], tuple(ms[1:])) for lane, ms in zip(lanes, settled, strict=True))
        seeds = sorted({lane.seed for lane in lanes})
        padded = _padded(self.lanes) if compiled else self.lanes
        self._lane_seed = torch.tensor([seeds.index(lane.seed) for lane in padded], device=self.device)
        self._own_seeds = self._lane_seed.tolist() == list(range(len(seeds)))
        self.feed = stream.open(seeds, self.device)
        if stream.holds_out and not hasattr(self.feed, "held_out"):
            raise ValueError(
                f"{stream.name} says that it holds examples out, but its feed, {type(self.feed).__name__}, has no "
                "held_out(step); add it, or set holds_out to False"
            )
        self._numbers = hyper_parameters(padded, dtype, self.device)
        keys = [seed_key(lane.seed, "method") for lane in padded]
        self._keys = torch.tensor(keys, dtype=torch.int32, device=self.device).T.contiguous()  # [2, lanes]
        self._leaves = self._start(factory, seeds, padded)
        self.state: LaneState = pytree.tree_unflatten([leaf[..., : len(lanes)] for leaf in self._leaves], self._spec)
        self._needs = frozenset().union(*(method.needs for method in self.lanes[0].methods))
        self._watched = _Watched({}, {})
        self._eventful = any(type(m).due is not Intervention.due for m in self.lanes[0].interventions)
        self._step: Callable[[tuple[Tensor, ...]], Any] | None = None

    # --- making -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _build(factory: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, dict[str, Any]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "init"))
            model, initial = build_and_record(factory)
        return model.train(), initial

    def _check_fit(self, example: Tensor) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
                raise ValueError(
                    f"{name} has momentum=None, a mean over all steps, which lanes cannot keep; give a number"
                )
        buffers = dict(self.model.named_buffers())
        accumulating = {name: m for name, m in self.model.named_modules() if hasattr(m, "ACCUMULATORS")}
        try:
            with (
                torch.random.fork_rng(devices=[]),
                torch.no_grad(),
                InLanes(None) as seen,
                counted(accumulating) as uses,
            ):
                at = torch.get_rng_state()
                out = self.model(example)
                drew = not torch.equal(at, torch.get_rng_state())
        except RuntimeError as error:
            raise ValueError(
                f"the network does not take the inputs of {self.stream.name}, {tuple(example.shape[1:])}: {error}"
            ) from error
        self._drops, self._special = seen.drops, seen.drops or bool(buffers)
        if drew:
            raise ValueError(
                "the network draws random numbers in its forward pass, which lanes could not draw again; of layers "
                "that draw they take nn.Dropout"
            )
        for name, buffer in self.model.named_buffers():
            if buffers.get(name) is not buffer:
                raise ValueError(
                    f"the network assigns to its buffer {name}, of which lanes see nothing: write into it, as in "
                    f"self.{name.rpartition('.')[2]}.copy_(...)"
                )
        for name, module in accumulating.items():
            if uses[module] > 1:
                raise ValueError(
                    f"{name} is used {uses[module]} times in a forward pass, and lanes can follow what a backward pass "
                    "moves in it only once: give each place a layer of its own"
                )
        if out.shape != (len(example), self.stream.outputs):
            raise ValueError(
                f"the network gives {tuple(out.shape[1:])} numbers for an example of {self.stream.name}, which needs "
                f"({self.stream.outputs},)"
            )

    def _check_examples(self, step: int) -> None:
        """Whether a step's examples are what the stream says they are."""
        stream, seeds = self.stream, len({lane.seed for lane in self.lanes})
        each = (stream.outputs,) if stream.task == "regression" else ()
        wanted = {"inputs": (1, stream.batch, *stream.input_shape, seeds), "targets": (1, stream.batch, *each, seeds)}
        for name, tensor in self.feed.examples(step, 1)._asdict().items():
            if tuple(tensor.shape) != wanted[name]:
                raise ValueError(
                    f"the {name} of one step of {stream.name} are {tuple(tensor.shape)}; by its fields they are "
                    f"{wanted[name]}, [steps, batch, ..., seeds]"
                )

    def _check_groups(self) -> None:
        for layer in self.units:
            for part in layer.outgoing:
                if part.groups > 1:
                    raise ValueError(
                        f"a convolution in {part.groups} groups, {part.parameter}, reads the units of {layer.name}: a "
                        "fresh unit is no whole row or column of it, and lanes count the age of Adam's moments by row "
                        "and column. Use an ungrouped convolution, or train a single model outside a population"
                    )

    def _start(self, factory: Callable[[], nn.Module], seeds: Sequence[int], padded: Sequence[Lane]) -> list[Tensor]:
        """Every tensor of the state before the first step, lanes last."""
        drawn = {}
        for seed in seeds:
            model, _ = self._build(factory, seed)
            params = {n: p.detach().to(self.device, self.dtype) for n, p in model.named_parameters()}
            drawn[seed] = params, {n: self._moved_here(b) for n, b in model.named_buffers()}

        def one(lane: Lane) -> LaneState:
            params, buffers = drawn[lane.seed]
            zero = torch.zeros((), dtype=torch.int32, device=self.device)
            total = zero.to(torch.float64)
            states = [lane.rule.init(params, self.units)]
            noise = Noise(torch.tensor(seed_key(lane.seed, "method"), dtype=torch.int32, device=self.device), zero - 1)
            for method in lane.interventions:
                context = Context({}, {}, noise.scoped(method.name), self.units, buffers=buffers)
                changed, own = method.begun(params, method.init(params, self.units), context)
                states.append(own)
                params = params | changed
            return LaneState(params, buffers, tuple(states), zero, zero - 1, zero, total, total, total, total)

        first = one(self.lanes[0])
        leaves, self._spec = pytree.tree_flatten(first)
        stacked = [torch.empty((*leaf.shape, len(padded)), dtype=leaf.dtype, device=self.device) for leaf in leaves]
        for position, lane in enumerate(padded):
            for target, leaf in zip(stacked, pytree.tree_leaves(one(lane)), strict=True):
                target[..., position] = leaf
        return stacked

    def _moved_here(self, buffer: Tensor) -> Tensor:
        return buffer.detach().to(self.device, self.dtype if buffer.is_floating_point() else buffer.dtype)

    # --- one step ---------------------------------------------------------------------------------------------------

    def _loss(self, output: Tensor, y: Tensor) -> Tensor:
        return networks.squared_error(output, y) if self._regression else networks.cross_entropy(output, y)

    @property
    def _regression(self) -> bool:
        return self.stream.task == "regression"

    def _output(
        self, params: Tensors, buffers: Tensors, x: Tensor, noise: Noise | None = None, move: bool = False
    ) -> Tensor:
        """What the network gives; dropout goes by the noise, and is none without. With ``move`` the pass writes into
        the buffers that it is given; otherwise what it would write is lost."""
        held = buffers if move else copied(buffers)
        with InLanes(noise, () if move else held.values()) if self._special else contextlib.nullcontext():
            return cast(Tensor, functional_call(self.model, {**params, **held}, (x,)))

    def _forward(
        self,
        params: Tensors,
        buffers: Tensors,
        x: Tensor,
        noise: Noise | None = None,
        moved: dict[str, Tensor] | None = None,
        move: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, and every unit layer's activation [samples, units, ...].

        ``moved`` is added to what readers are given: by the weight of one that stands for all that are given the same.
        """
        readers = {part.parameter for layer in self.units for part in layer.outgoing}
        added = {reader: moved[first] for reader, first in self._watched.first.items()} if moved else {}
        with Taps(params, readers, added) as taps:
            output = self._output(params, buffers, x, noise, move)
        return output, {layer.name: layer.activation(taps.seen[layer.tap]) for layer in self.units}

    def _watch(self, x: Tensor) -> None:
        """Find out, for a step's inputs [batch, ...], which readers are given the same tensor and of what shape: the
        gradient by it is the gradient by a unit's activation. One reader stands for all of them."""
        params, buffers = ({name: w[..., 0].clone() for name, w in part.items()} for part in self.state[:2])
        readers = {part.parameter for layer in self.units for part in layer.outgoing}
        with torch.no_grad(), Taps(params, readers, {}) as taps:
            self._output(params, buffers, x)
        taken: dict[int, str] = {}
        for reader, given in taps.seen.items():
            taken.setdefault(id(given), reader)
        watched = {taken[id(taps.seen[layer.tap])] for layer in self.units}
        first = {reader: taken[id(given)] for reader, given in taps.seen.items() if taken[id(given)] in watched}
        self._watched = _Watched(first, {reader: taps.seen[reader].shape for reader in sorted(watched)})

    def _lane_step(self, state: LaneState, numbers: dict[str, Tensor], key: Tensor, x: Tensor, y: Tensor) -> LaneState:
        """One step of one lane: pure. ``vmap`` and the compiler do the rest."""
        rule, *interventions = bind(self.lanes[0].methods, numbers)
        noise = Noise(key, state.step)
        moved = {name: x.new_zeros(shape) for name, shape in self._watched.shapes.items()}
        accumulators = {name: state.buffers[name] for name in self._accumulators}

        def objective(
            params: dict[str, Tensor], moved: dict[str, Tensor], accumulators: dict[str, Tensor]
        ) -> tuple[Tensor, tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]]:
            buffers = copied(state.buffers) | accumulators
            if {"activations", "signals"} & self._needs:
                output, activations = self._forward(params, buffers, x, noise, moved, move=True)
            else:
                output, activations = self._output(params, buffers, x, noise, move=True), {}
            loss = whole = self._loss(output, y)
            for method, own in zip(interventions, state.methods[1:], strict=True):
                if isinstance(method, Regulariser) and method.coupled:
                    whole = whole + method.rate * method.penalty(params, own, self.units)
            return whole, (loss, output, activations, buffers)

        curvature: Tensors = {}
        if "curvature" in self._needs:
            from perennial.curvature import hesscale

            curvature = hesscale(
                lambda p: self._output(p, state.buffers, x, noise),
                state.params,
                lambda out: self._loss(out, y),
            ).curvature
        slopes, (_, (loss, output, activations, buffers)) = grad_and_value(objective, argnums=(0, 1, 2), has_aux=True)(
            state.params, moved, accumulators
        )
        grads, by_input, accumulated = slopes
        buffers |= {name: state.buffers[name] + change for name, change in accumulated.items()}
        if self._drops:
            output = self._output(state.params, state.buffers, x)
            loss = self._loss(output, y)
        signals = {}
        if "signals" in self._needs:
            signals = {layer.name: layer.activation(by_input[self._watched.first[layer.tap]]) for layer in self.units}
        params, given = dict(state.params), dict(state.buffers)

        def seen_by(method: Method) -> Context:
            at, those = dict(params), dict(given)

            def loss_at(changed: Tensors) -> Tensor:
                return self._loss(self._output(at | dict(changed), those, x, noise), y)

            wanted = loss_at if "loss" in method.needs else None
            scoped = noise.scoped(method.name)
            return Context(grads, activations, scoped, self.units, signals, wanted, dict(buffers), curvature=curvature)

        changed, rule_state = rule.step(params, state.methods[0], seen_by(rule))
        params |= changed
        states: list[Any] = []
        replaced = state.replaced
        for method, old in zip(interventions, state.methods[1:], strict=True):
            changed, new = method.step(params, old, seen_by(method))
            _exchange(method, changed, params, buffers, given)
            states.append(new)
            fresh = method.replaced(new)  # type: ignore[attr-defined]
            if fresh:
                touched = self.units.touched(fresh, {name: w.shape for name, w in params.items()})
                rule_state = rule.reset(rule_state, touched | self.units.renewed(touched))  # type: ignore[attr-defined]
                for mask in fresh.values():
                    replaced = replaced + mask.sum(dtype=torch.int32)
        correct = state.correct if self._regression else state.correct + networks.correct(output, y)
        return LaneState(
            params,
            buffers,
            (rule_state, *states),
            state.step + 1,
            state.diverged,
            replaced,
            state.loss + loss,
            correct,
            state.plasticity,
            state.held_out,
        )

    def _lane_events(self, due: Sequence[bool], state: LaneState, numbers: dict[str, Tensor], key: Tensor) -> LaneState:
        """The events of one lane's interventions after the step just made: pure, run eagerly under ``vmap``.

        They get the noise of that step, and no activations: what an event goes by is in its method's state.
        """
        rule, *interventions = bind(self.lanes[0].methods, numbers)
        noise = Noise(key, state.step - 1)
        params, buffers = dict(state.params), dict(state.buffers)
        states, replaced = list(state.methods), state.replaced
        for position, method in enumerate(interventions, start=1):
            if not due[position - 1]:
                continue
            context = Context({}, {}, noise.scoped(method.name), self.units, buffers=dict(buffers))
            outcome = method.happened(params, states[position], context)  # type: ignore[attr-defined]
            _exchange(method, outcome.changed, params, buffers)
            # What is the same in every lane has no lane dimension yet, and as the last vmap does not add it.
            old = state.params | state.buffers
            for name, part in ((n, part) for n in outcome.changed for part in (params, buffers) if n in part):
                part[name] = torch.where(torch.zeros_like(old[name]) == 1, old[name], part[name])
            states[position] = outcome.state
            if outcome.touched:
                touched = {**outcome.touched, **self.units.renewed(outcome.touched)}
                states[0] = rule.reset(states[0], touched)  # type: ignore[attr-defined]
            for mask in outcome.replaced.values():
                replaced = replaced + mask.sum(dtype=torch.int32)
        return state._replace(params=params, buffers=buffers, methods=tuple(states), replaced=replaced)

    def _run_events(self, steps_made: int) -> None:
        """What is due after this many steps, written into the state."""
        ended = steps_made % self.stream.task_length() == 0
        due = [m.due(steps_made, ended) for m in self.lanes[0].interventions]
        if not any(due):
            return
        state = pytree.tree_unflatten(self._leaves, self._spec)
        inputs = (state, self._numbers, self._keys)
        with torch.no_grad():
            if self._keys.shape[-1] == 1:
                one = pytree.tree_map(lambda t: t[..., 0], inputs)
                new = pytree.tree_map(lambda t: t[..., None], self._lane_events(due, *one))
            else:
                lane_events = functools.partial(self._lane_events, due)
                new = vmap(lane_events, in_dims=-1, out_dims=-1)(*inputs)
            for leaf, value in zip(self._leaves, pytree.tree_leaves(new), strict=True):
                if value is not leaf:
                    leaf.copy_(value)

    def _flat_step(self, *tensors: Tensor) -> list[Tensor]:
        """The step of all lanes on flat lists of tensors whose last dimension is the lane."""
        names = list(self._numbers)
        count = len(tensors) - len(names) - 3
        state = pytree.tree_unflatten(list(tensors[:count]), self._spec)
        numbers = dict(zip(names, tensors[count : count + len(names)], strict=True))
        key, x, y = tensors[-3:]
        if key.shape[-1] == 1:
            one = pytree.tree_map(lambda t: t[..., 0], (state, numbers, key, x, y))
            return [t[..., None] for t in pytree.tree_leaves(self._lane_step(*one))]
        new = vmap(self._lane_step, in_dims=-1, out_dims=-1)(state, numbers, key, x, y)
        return pytree.tree_leaves(new)

    def _compile(self, x: Tensor, y: Tensor) -> None:
        leaves = self._leaves
        constants = [*self._numbers.values(), self._keys]
        begun = time.perf_counter()
        if "signals" in self._needs:
            self._watch(x[..., 0])
        native = None
        if self.compiled:
            native = compile_step(self._flat_step, leaves, [*constants, x, y], self._keys.shape[-1], self.threads)

        def plain(tensors: list[Tensor]) -> None:
            with torch.no_grad():
                for target, new in zip(leaves, self._flat_step(*tensors), strict=True):
                    target.copy_(new)

        run = native or plain
        self._step = lambda example: run([*leaves, *constants, *example])
        self.compile_seconds += time.perf_counter() - begun

    # --- running ----------------------------------------------------------------------------------------------------

    @property
    def steps_made(self) -> int:
        """Steps that every lane has made."""
        return int(self.state.step.reshape(-1)[0])

    def _batches(self, start: int, count: int) -> list[tuple[Tensor, ...]]:
        """The examples of each step with the lane last: inputs [batch, ..., lanes], targets [batch, ..., lanes]."""
        inputs, targets = self.feed.examples(start, count)
        both = []
        for tensor in (inputs.to(self.dtype), targets):
            if tensor.is_floating_point():
                tensor = tensor.to(self.dtype)
            if not self._own_seeds:
                tensor = tensor.index_select(-1, self._lane_seed)
            both.append(tensor.contiguous().unbind(0))
        return list(zip(*both, strict=True))

    def chunk_length(self) -> int:
        """Steps whose examples are made at once; depends on the population alone."""
        wide = math.prod(self.stream.input_shape) * self.stream.batch * len(self.lanes) * 4
        return max(1, min(1000, _CHUNK_BYTES // wide))

    def advance(self, steps: int) -> None:
        """Train every lane for ``steps`` more steps.

        How the steps are cut into calls changes no bit of the result.
        """
        done = self.steps_made
        end = done + steps
        while done < end:
            length = self.chunk_length()
            stop = min(end, (done // length + 1) * length)
            self._advance_chunk(done, stop - done)
            done = stop

    def _advance_chunk(self, start: int, count: int) -> None:
        """A chunk at full speed; only if a lane diverged in it, once more step by step to find out where.

        Nothing in the compiled step looks for non-finite numbers: that would cost it another pass over memory. Lanes
        never touch each other, so a diverged one may compute on; what it held before is put back at the chunk's end.
        """
        leaves = self._leaves
        state: LaneState = pytree.tree_unflatten(leaves, self._spec)
        before = [leaf.clone() for leaf in leaves]
        self._run_steps(start, count)
        if bool(self._gone_wrong(state).any()):
            for leaf, old in zip(leaves, before, strict=True):
                leaf.copy_(old)
            for step in range(start, start + count):
                last = [leaf.clone() for leaf in leaves]
                self._run_steps(step, 1)
                newly = self._gone_wrong(state)
                for leaf, old in zip(before, last, strict=True):
                    torch.where(newly, old, leaf, out=leaf)
                state.diverged.masked_fill_(newly, step)
        gone = state.diverged >= 0
        if bool(gone.any()):
            for now, old in zip(self._frozen_parts(leaves), self._frozen_parts(before), strict=True):
                now.copy_(torch.where(gone, old, now))

    def _frozen_parts(self, leaves: list[Tensor]) -> list[Tensor]:
        """What stays as it was once a lane has diverged: parameters, buffers, methods' state, units replaced."""
        state: LaneState = pytree.tree_unflatten(leaves, self._spec)
        parts: list[Tensor] = pytree.tree_leaves((state.params, state.buffers, state.methods, state.replaced))
        return parts

    def _run_steps(self, start: int, count: int) -> None:
        with _no_denormals():
            self._run_each(start, count)

    def _run_each(self, start: int, count: int) -> None:
        if self._step is None:
            self._check_examples(start)
            self._compile(*self._batches(start, 1)[0])
            assert self._step is not None
        examples = self._batches(start, count)
        collecting = gc.isenabled()
        gc.disable()  # a step makes no cycles, and looking for them costs a tenth of the time
        try:
            every = self.plasticity_every or 0
            for number, example in enumerate(examples, start=start + 1):
                taken = every and number % every == 0
                before = self._sums().loss.clone() if taken else None
                self._step(example)
                if before is not None:
                    self._take_plasticity(before, example)
                if self.stream.holds_out and number % self.stream.task_length() == 0:
                    self._take_held_out(number - 1)  # before a method acts on the change, such as on the head
                if self._eventful:
                    self._run_events(number)
        finally:
            if collecting:
                gc.enable()

    def _sums(self) -> LaneState:
        """The state with padding lanes."""
        state: LaneState = pytree.tree_unflatten(self._leaves, self._spec)
        return state

    def _take_plasticity(self, before: Tensor, example: tuple[Tensor, ...]) -> None:
        """Add the sample plasticity of the step just made; ``before`` is the sum of the losses before it, [lanes]."""
        state = self._sums()

        def loss(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return self._loss(self._output(params, buffers, x), y)

        inputs = (state.params, state.buffers, *example)
        with torch.no_grad():
            if self._keys.shape[-1] == 1:
                after = loss(*pytree.tree_map(lambda t: t[..., 0], inputs))[None]
            else:
                after = vmap(loss, in_dims=-1)(state.params, state.buffers, *example)
            state.plasticity.add_(metrics.sample_plasticity(state.loss - before, after.to(torch.float64)))

    def _take_held_out(self, step: int) -> None:
        """Add the accuracy on the held-out examples of the task in force at a step, lane by lane: they may be many."""
        state = self._sums()
        inputs, classes = cast(HeldOut, self.feed).held_out(step)
        with torch.no_grad(), evaluating(self.model):
            for number, seed in enumerate(self._lane_seed[: len(self.lanes)].tolist()):
                params, buffers = ({name: w[..., number] for name, w in part.items()} for part in state[:2])
                output = self._output(params, buffers, inputs[..., seed].to(self.dtype))
                state.held_out[number] += networks.correct(output, classes[..., seed]).to(torch.float64)

    @staticmethod
    def _gone_wrong(state: LaneState) -> Tensor:
        """Lanes not yet known as diverged whose loss or weights are not finite, bool [lanes]."""
        finite = torch.isfinite(state.loss)
        for w in state.params.values():
            finite &= torch.isfinite(w.sum(tuple(range(w.dim() - 1)), dtype=torch.float64))
        return ~finite & (state.diverged < 0)

    def collect(self, steps: int) -> dict[str, Tensor]:
        """The mean online loss (and accuracy) over the ``steps`` since the last call, float64 [lanes]; empties the
        sums. ``test_accuracy``, the mean of the held-out accuracies at the ends of tasks, is among them if a task ended
        in these steps and the stream holds examples out."""
        found = {"online_loss": self.state.loss / steps}
        if self.stream.task == "classification":
            found["online_accuracy"] = self.state.correct / steps
        if self.plasticity_every:
            end = self.steps_made
            taken = end // self.plasticity_every - (end - steps) // self.plasticity_every
            found["sample_plasticity"] = self.state.plasticity / taken if taken else self.state.plasticity * torch.nan
        if self.stream.holds_out:
            end, length = self.steps_made, self.stream.task_length()
            if ended := end // length - (end - steps) // length:
                found["test_accuracy"] = self.state.held_out / ended
        self.state.held_out.zero_()
        self.state.plasticity.nan_to_num_().zero_()
        self.state.loss.nan_to_num_().zero_()
        self.state.correct.nan_to_num_().zero_()
        gone = self.state.diverged >= 0
        return {name: torch.where(gone, torch.nan, value) for name, value in found.items()}

    def measure(self, names: Sequence[str] | None = None, samples: int = 1000) -> dict[str, Tensor]:
        """Diagnostics of every lane now, float64 [lanes], on fresh inputs of the task in force; changes nothing.

        A metric that does not apply to this network is missing from the answer; :meth:`inapplicable` says why.

        Args:
            names: ``"units_replaced"``, what the lanes' interventions measure (their ``MEASURES``), and any of
                :data:`~perennial.metrics.METRICS` that is taken of units, of features (those of the last hidden layer),
                of weights, or of gradients (the mean over the last hundred steps' examples of that of the loss on
                each, without dropout). None: ``MEASURED`` and the interventions' measures.
            samples: inputs.

        Raises:
            ValueError: something else is asked for.
        """
        told = self._told_names()
        asked = (*MEASURED, *told) if names is None else tuple(names)
        self._check_measures(asked)
        gone = self.inapplicable(asked)
        wanted = [name for name in asked if name not in gone]
        kinds = {name: metrics.METRICS[name].of for name in wanted if name in metrics.METRICS}
        found: dict[str, Tensor] = {}
        if "units_replaced" in wanted:
            found["units_replaced"] = self.state.replaced / sum(layer.size for layer in self.units)
        for name in (name for name, kind in kinds.items() if kind == "weights"):
            found[name] = vmap(metrics.METRICS[name].function, in_dims=-1)(self.state.params)
        of_activations = [name for name, kind in kinds.items() if kind in ("units", "features")]
        if of_activations:
            probe = self.feed.probe(self.steps_made, samples).to(self.dtype)

            def one(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
                hidden = self._forward(params, buffers, x)[1]
                return {name: self._of_activations(name, hidden) for name in of_activations}

            with torch.no_grad(), evaluating(self.model):
                found |= vmap(one, in_dims=-1)(
                    self.state.params, self.state.buffers, probe.index_select(-1, self._lane_seed[: len(self.lanes)])
                )
        if of_gradients := [name for name, kind in kinds.items() if kind == "gradients"]:
            found |= self._of_gradients(of_gradients)
        if set(told) & set(wanted):
            found |= self._told()
        diverged = self.state.diverged >= 0
        return {name: torch.where(diverged, torch.nan, found[name].to(torch.float64)) for name in wanted}

    def _of_activations(self, name: str, hidden: dict[str, Tensor]) -> Tensor:
        """A metric of one lane's activations, by layer name."""
        metric = metrics.METRICS[name]
        if metric.of == "features":
            return metric.function(list(hidden.values())[-1])
        seen = []
        for layer, h in hidden.items():
            kind = self._nonlinearities[layer]
            if not metrics.inapplicable(name, kind):
                bounds = {"low": kind.low, "high": kind.high} if kind.bounded else {}
                seen.append(metrics.UnitStatistics.of(h, gram=name == "duplicate_units", **bounds))
        return metric.function(seen)

    def _of_gradients(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Metrics of the gradient of the loss on a step's examples, means over the last steps, [lanes]."""
        begin = max(0, self.steps_made - _GRADIENT_STEPS)
        end = max(1, self.steps_made)
        chunk = min(self.chunk_length(), end - begin)
        state = self._sums()

        def one(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
            gradients = grad(lambda p: self._loss(self._output(p, buffers, x), y))(params)
            return {name: metrics.METRICS[name].function(gradients) for name in names}

        total = dict.fromkeys(names, torch.zeros((), dtype=torch.float64, device=self.device))
        with evaluating(self.model):
            for start in range(begin, end, chunk):
                for example in self._batches(start, min(chunk, end - start)):
                    values = vmap(one, in_dims=-1)(state.params, state.buffers, *example)
                    total = {name: value + values[name] for name, value in total.items()}
        return {name: value[: len(self.lanes)] / (end - begin) for name, value in total.items()}

    def _check_measures(self, asked: Sequence[str]) -> None:
        """ValueError: one of some names is nothing that :meth:`measure` gives."""
        told = self._told_names()
        for name in asked:
            if name not in (*MEASURABLE, *told):
                hint = f"; {metrics.AMBIGUOUS[name]}" if name in metrics.AMBIGUOUS else ""
                listed = ", ".join([*MEASURABLE, *told])
                raise ValueError(f"a population does not measure {name!r}; it measures {listed}{hint}")

    def _told_names(self) -> list[str]:
        return [name for method in self.lanes[0].interventions for name in method.MEASURES]

    def _told(self) -> dict[str, Tensor]:
        """What the interventions have measured, [lanes]."""
        rows = []
        for number, lane in enumerate(self.lanes):
            row: dict[str, float] = {}
            for method, own in zip(lane.interventions, self.state.methods[1:], strict=True):
                row |= method.measured(pytree.tree_map(lambda leaf, at=number: leaf[..., at], own))
            rows.append(row)
        told = {name: [row[name] for row in rows] for name in rows[0]}
        return {n: torch.tensor(v, dtype=torch.float64, device=self.device) for n, v in told.items()}

    def inapplicable(self, names: Sequence[str] = MEASURED) -> dict[str, str]:
        """Those of some metrics that mean nothing for this network, with the reason.

        One of units is taken over the layers to which it applies, and is among these if there are none.
        """
        of_units = {name for name, metric in metrics.METRICS.items() if metric.of in ("units", "features")}
        found = {}
        for name in names:
            if not len(self.units) and name in of_units | {"units_replaced"}:
                found[name] = "the network has no hidden units"
            elif name in of_units:
                reasons = [metrics.inapplicable(name, self._nonlinearities[layer.name]) for layer in self.units]
                if all(reasons):
                    found[name] = reasons[0]
        return found

    def run(self, steps: int, *, bin: int, measure_every: int | None = None, measures: Sequence[str] = ()) -> Any:
        """Train for ``steps`` steps and return a tidy polars table.

        Args:
            steps: at least ``bin``.
            bin: steps over which online loss and accuracy are averaged.
            measure_every: steps between diagnostics; None: every bin.
            measures: what :meth:`measure` is asked for besides the usual.

        Returns:
            Columns ``lane``, ``seed``, ``metric``, ``step`` (steps made at the end of the bin) and ``value``.
        """
        import polars

        rows: list[dict[str, Any]] = []
        for step, values in self.records(steps, bin=bin, measure_every=measure_every or bin, measures=measures):
            for name, lanes in values.items():
                for number, value in enumerate(lanes.tolist()):
                    rows.append(
                        {"lane": number, "seed": self.lanes[number].seed, "metric": name, "step": step, "value": value}
                    )
        return polars.DataFrame(rows)

    def records(
        self,
        steps: int,
        *,
        bin: int,
        measure_every: int,
        measures: Sequence[str] = (),
        pulse: Callable[[int], None] = lambda step: None,
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Train up to ``steps`` steps in all and yield (step, {metric: [lanes]}) at the end of every bin.

        Starts where the population stands, within a bin or between two.

        Args:
            steps: steps in all, at least ``bin``.
            bin: steps over which online loss and accuracy are averaged.
            measure_every: steps between diagnostics, a multiple of ``bin``; the end is always measured.
            measures: what :meth:`measure` is asked for besides the usual.
            pulse: called with the steps made, between the chunks of a bin: a place to save, or to stop by raising.
        """
        if not 1 <= bin <= steps:
            raise ValueError(f"bin is {bin}; it must be at least 1 and at most the {steps} steps of the run")
        if measure_every % bin:
            raise ValueError(f"measure_every is {measure_every}; it must be a multiple of bin, {bin}")
        asked = list(dict.fromkeys((*MEASURED, *self._told_names(), *measures)))
        self._check_measures(asked)
        chunk = self.chunk_length()
        while (done := self.steps_made) < steps:
            begin = done // bin * bin
            end = min(begin + bin, steps)
            while done < end:
                stop = min(end, (done // chunk + 1) * chunk)
                self.advance(stop - done)
                done = stop
                if done < end:
                    pulse(done)
            values = self.collect(end - begin)
            if end % measure_every == 0 or end == steps:
                values |= self.measure(asked)
            yield end, values

    # --- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that the lanes carry, by its path; nothing but tensors."""
        paths, _ = pytree.tree_flatten_with_path(self.state)
        return {pytree.keystr(path): leaf.clone() for path, leaf in paths}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Take up a saved state, bit for bit. The population must be made of the same lanes."""
        mine = {pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(self.state)[0]}
        if mine.keys() != saved.keys():
            missing = sorted(mine.keys() ^ saved.keys())
            raise ValueError(f"the saved state is of another population: {', '.join(missing[:5])} do not match")
        for name, leaf in mine.items():
            if leaf.shape != saved[name].shape or leaf.dtype != saved[name].dtype:
                raise ValueError(
                    f"the saved state is of another population: {name} is {tuple(saved[name].shape)} "
                    f"{saved[name].dtype} there and {tuple(leaf.shape)} {leaf.dtype} here"
                )
        for name, leaf in mine.items():
            leaf.copy_(saved[name])
        for leaf in self._leaves:
            leaf[..., len(self.lanes) :] = leaf[..., len(self.lanes) - 1, None]

    @property
    def bytes_per_lane(self) -> int:
        """Memory that one lane's state takes."""
        leaves = pytree.tree_leaves(self.state)
        return int(sum(leaf.numel() * leaf.element_size() for leaf in leaves)) // len(self.lanes)


def _padded(lanes: Sequence[Lane]) -> list[Lane]:
    """The lanes, the last repeated up to a multiple of a vector register's eight numbers.

    A remainder would be computed by masked loops beside the full ones: twice the code to compile and to run.
    """
    missing = -len(lanes) % 8 if len(lanes) > 3 else 0
    return [*lanes, *[lanes[-1]] * missing]


def _check_fields(stream: Stream) -> None:
    if stream.task not in ("regression", "classification"):
        raise ValueError(f"{stream.name}.task is {stream.task!r}; it is 'regression' or 'classification'")
    if math.prod(stream.input_shape) != stream.inputs:
        raise ValueError(
            f"{stream.name}.inputs is {stream.inputs}, but its input_shape, {stream.input_shape}, has "
            f"{math.prod(stream.input_shape)} numbers"
        )


@contextlib.contextmanager
def _no_denormals() -> Iterator[None]:
    """Numbers too small for a full mantissa count as zero while lanes run.

    The averages of units that have died decay into them, and a processor takes a hundred times as long over each.
    """
    tiny = torch.full((1,), 1e-39)
    had = float(tiny * 1) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(had)


def _exchange(method: Method, changed: Tensors, params: dict[str, Tensor], *buffers: dict[str, Tensor]) -> None:
    """What a method changed, put where it belongs."""
    for name, value in changed.items():
        parts = [part for part in (params, *buffers) if name in part]
        if not parts:
            known = ", ".join([*params, *buffers[0]])
            raise ValueError(f"{method.name} changes {name!r}, which is no parameter and no buffer: {known}")
        if value.shape != parts[0][name].shape:
            raise ValueError(f"{method.name} makes {name} {tuple(value.shape)}; it is {tuple(parts[0][name].shape)}")
        for part in parts:
            part[name] = value


class _Watched(NamedTuple):
    """Where the gradient by an activation is taken."""

    first: dict[str, str]
    """Reader's weight -> the weight of the reader that stands for all that are given the same tensor."""
    shapes: dict[str, torch.Size]
    """The shape of that tensor, by the standing reader's weight."""
