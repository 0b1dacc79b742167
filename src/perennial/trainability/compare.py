"""Aged weights against fresh ones, and warm starts against fresh ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from perennial.methods import Adam, Rule
from perennial.trainability.lanes import (
    TOGETHER,
    Factory,
    Lanes,
    Loss,
    copied,
    device_of,
    fresh,
    generator,
    left_alone,
    made,
    seed_globally,
    tensors,
)
from perennial.trainability.learning import bar_for, learn
from perennial.trainability.results import Trainability, WarmStartGap, mean
from perennial.units import recover
from perennial.units.trace import undisturbed

TASKS = ("random_labels", "teacher", "given")
"""What :func:`trainability` can have networks learn."""
_ADAM = Adam(lr=1e-3)


def trainability(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    task: str | None = None,
    classes: int | None = None,
    loss: Loss | None = None,
    factory: Factory | None = None,
    optimizer: Rule = _ADAM,
    steps: int = 500,
    batch_size: int = 32,
    seeds: int | Sequence[int] = 10,
    every: int | None = None,
    target: float | None = None,
    progress: bool = True,
) -> Trainability:
    r"""How well the model's weights learn something new, against fresh weights with the same data and budget.

    Lyle et al. (2023, arXiv 2303.01486) measure plasticity by how far a network gets on fresh random targets in a fixed
    number of steps. Here each seed trains a pair: the weights in question and fresh ones, with the same targets, the
    same batches, a new state of the same optimizer, and the same numbers from the global random generators (dropout).
    The interval of :attr:`Trainability.gap` is over targets, data order and fresh weights. It is about this one model,
    and says nothing of others aged in the same way. Example::

        from perennial.trainability import trainability

        print(trainability(model, images, seeds=20))

    The model is not touched: a copy is trained, in training mode. Parameters that do not require gradients are not
    trained, and without a factory not redrawn. Hooks on the model do not run, but for those of ``torch.nn.utils`` that
    make a weight (weight norm, spectral norm, pruning) and Perennial's, of which there is no need; a warning names any
    other. Memory is that of 2 x ``seeds`` networks with their gradients and optimizer states.

    Args:
        model: takes a batch of inputs and returns one tensor, [batch, ...].
        inputs: [samples, ...]. Batches of a seed are cut from one permutation of the samples after another.
        targets: a held-out task, [samples] of classes (an integer type) or floats of the shape of the outputs.
        task: ``"random_labels"``, a class for every sample, uniform and independent; ``"teacher"``, the outputs of a
            fresh network of the same architecture in evaluation mode, each output shifted and scaled to mean 0 and
            variance 1 over the samples, so that a constant's squared error is at least 1; ``"given"``. Labels and
            teacher are others for each seed. None: given if there are targets, else random labels.
        classes: of random labels; None: as many as the model has outputs.
        loss: takes outputs and targets of a batch, and returns their mean loss, []. None: cross-entropy for classes,
            otherwise the squared error, averaged over outputs too.
        factory: makes a fresh network, drawing from torch's, NumPy's or Python's global generators. None: fresh weights
            are drawn from what :func:`perennial.units.recover` finds, which does not see what a constructor did by
            itself; floating-point buffers likewise, and those of which it finds nothing stay as they are.
        optimizer: a rule of ``perennial.methods`` that needs gradients alone, such as ``SGD(lr=0.1)``.
        steps: optimizer steps, one batch each.
        batch_size: samples in a batch.
        seeds: how many pairs (seeds 0, 1, ...), or their seeds.
        every: steps in a window of the learning curve; None: a fiftieth of the steps, at least 10. The last window may
            be shorter.
        target: the loss that counts as learnt; None: half way between the first and the last point of the fresh
            networks' mean curve.
        progress: show a bar on stderr if it takes more than two seconds and ``rich`` is installed.

    Raises:
        ValueError: numbers out of range; inputs, targets, model and loss that do not fit together; a parameter of which
            it is not known how to draw it; a factory of other shapes; a rule that needs more than gradients.
        TypeError: an optimizer that is no rule, a model or factory that gives something else.
    """
    if task is None:
        task = "random_labels" if targets is None else "given"
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; it is one of {', '.join(TASKS)}")
    if (task == "given") != (targets is not None):
        found = "missing; give targets=, or another task" if targets is None else "given; leave one of the two out"
        raise ValueError(f"task is {task!r}, and targets are {found}")
    chosen = _checked(inputs, optimizer, seeds, batch_size, steps=steps, every=every)
    model = getattr(model, "_orig_mod", model)
    with left_alone(model):
        network = copied(model)
        mine, initial = tensors(network), recover(network) if factory is None else {}
        output = _output(network, inputs[:batch_size])
        if targets is not None:
            learnt = targets.expand(len(chosen), *targets.shape)
        elif task == "random_labels":
            learnt = torch.stack([_labels(output, classes, len(inputs), seed) for seed in chosen])
        else:
            teachers = ((seed, fresh(network, factory, initial, seed, "teacher")) for seed in chosen)
            learnt = torch.stack([_taught(network, teacher, inputs, seed) for seed, teacher in teachers])
        learnt = learnt.to(inputs.device)
        loss = _loss(output, learnt, inputs, loss)
        pairs = [(mine, fresh(network, factory, initial, seed, "init")) for seed in chosen]
        lanes = Lanes(network, optimizer, loss, chosen, pairs)
        pools = [torch.arange(len(inputs))] * len(chosen)
        with bar_for(progress, steps, "trainability") as advance:
            aged, new = learn(lanes, inputs, learnt, pools, "data", steps, every, batch_size, advance)
    if target is None:
        target = (mean(new.curve[:, 0]) + mean(new.curve[:, -1])) / 2
    return Trainability(task, chosen, aged, new, target, lanes.one_by_one)


def warm_start_gap(
    factory: Factory,
    inputs: Tensor,
    targets: Tensor,
    *,
    test: tuple[Tensor, Tensor],
    share: float = 0.5,
    loss: Loss | None = None,
    optimizer: Rule = _ADAM,
    steps: tuple[int, int] = (500, 500),
    batch_size: int = 32,
    seeds: int | Sequence[int] = 10,
    every: int | None = None,
    progress: bool = True,
) -> WarmStartGap:
    r"""What it costs to have been trained on a share of the data before all of it came.

    Ash and Adams (NeurIPS 2020), "On Warm-Starting Neural Network Training": a network that was trained on a share
    first fits all of the data as well as a fresh one does, and generalises worse. Each seed trains a pair from the same
    first weights. The warm network learns a random share of the samples for ``steps[0]`` steps; then both learn all of
    them for ``steps[1]`` steps, from the same batches, each with a new optimizer state. The gap is

    .. math:: \text{score}_\text{fresh} - \text{score}_\text{warm}

    where the score is the accuracy on the test data in evaluation mode, or the loss for targets that are no classes.

    Args:
        factory: makes a network, drawing from torch's, NumPy's or Python's global generators.
        inputs: [samples, ...].
        targets: [samples] of classes (an integer type), or floats of the shape of the outputs.
        test: inputs and targets to score by.
        share: of the samples, in (0, 1), rounded to a whole number of them.
        loss: as in :func:`trainability`, as are the settings that are not listed here.
        steps: of the first and of the second training.

    Raises:
        ValueError: numbers out of range; data, network and loss that do not fit together; a rule that needs more than
            gradients.
        TypeError: an optimizer that is no rule, a factory that gives something else.
    """
    first, second = steps
    chosen = _checked(inputs, optimizer, seeds, batch_size, steps=min(steps), every=every)
    part = round(share * len(inputs))
    if not 0 < share < 1 or part < batch_size:
        raise ValueError(
            f"share is {share:g}, which of {len(inputs)} samples makes {part}; it lies between 0 and 1, and must hold "
            f"a batch of {batch_size}"
        )
    if len(test[0]) != len(test[1]):
        raise ValueError(f"test has {len(test[0])} inputs and {len(test[1])} targets; each input needs its target")
    classes = not targets.is_floating_point()
    with left_alone(nn.Identity()):
        network = copied(made(factory, chosen[0], "init"))
        with undisturbed(network):
            learnt = targets.to(inputs.device).expand(len(chosen), *targets.shape)
            loss = _loss(_output(network, inputs[:batch_size]), learnt, inputs, loss)
            starts = [fresh(network, factory, {}, seed, "init") for seed in chosen]
            lanes = Lanes(network, optimizer, loss, chosen, [(start,) for start in starts])
            orders = [torch.randperm(len(inputs), generator=generator(seed, "share")) for seed in chosen]
            shares = [order[:part] for order in orders]
            with bar_for(progress, first + second, "warm-start gap") as advance:
                learn(lanes, inputs, learnt, shares, "first", first, every, batch_size, advance)
                lanes = lanes.beside(starts)
                warm, new = learn(lanes, inputs, learnt, orders, "data", second, every, batch_size, advance)
            scored = test[1].expand(len(chosen), *test[1].shape)
            scores = lanes.evaluate(_accuracy if classes else loss, test[0], scored, max(batch_size, TOGETHER))
    found = scores.cpu().numpy()
    measure = "accuracy" if classes else "loss"
    return WarmStartGap(chosen, measure, found[:, 0], found[:, 1], warm, new, lanes.one_by_one)


# --- what there is to learn -------------------------------------------------------------------------------------------


def _checked(
    inputs: Tensor, optimizer: Rule, seeds: int | Sequence[int], batch_size: int, **least_one: int | None
) -> tuple[int, ...]:
    """The seeds, after a look at the arguments."""
    if not isinstance(optimizer, Rule):
        raise TypeError(f"optimizer is {optimizer!r}; it is a rule of perennial.methods, such as Adam(lr=1e-3)")
    if optimizer.needs:
        raise ValueError(
            f"{optimizer.name} with these settings needs {', '.join(sorted(optimizer.needs))}, but a test of "
            "trainability has gradients alone; take other settings or another rule"
        )
    for name, value in least_one.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 1 <= batch_size <= len(inputs):
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1 and at most the {len(inputs)} samples")
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise ValueError(f"seeds is {seeds!r}; give a number of seeds from 1, or different whole numbers from 0")
    return chosen


def _output(network: nn.Module, x: Tensor) -> Tensor:
    with undisturbed(network):
        output: Any = network.train()(x.to(device_of(network)))
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returns a {type(output).__name__}; wrap it in a module that returns the one tensor to learn by"
        )
    return output


def _labels(output: Tensor, classes: int | None, samples: int, seed: int) -> Tensor:
    """Uniform classes, int64 [samples]."""
    if output.dim() != 2:
        raise ValueError(
            f"random labels need outputs [batch, classes], but the model's are {list(output.shape)}; take the task "
            "'teacher', or wrap the model"
        )
    count = output.shape[1] if classes is None else classes
    if not 2 <= count <= output.shape[1]:
        raise ValueError(
            f"there would be {count} classes of random labels; there must be at least 2, and at most the model's "
            f"{output.shape[1]} outputs. For regression take the task 'teacher'"
        )
    return torch.randint(count, (samples,), generator=generator(seed, "labels"))


def _taught(network: nn.Module, teacher: dict[str, Tensor], inputs: Tensor, seed: int) -> Tensor:
    """A teacher's standardised outputs for all samples, on their device."""
    seed_globally(seed, "teaching")
    network.eval()
    parts = (x.to(device_of(network)) for x in inputs.split(TOGETHER))
    answers = torch.cat([functional_call(network, teacher, (x,)).to(inputs.device) for x in parts])
    spread = answers.std(0, correction=0)
    if not bool((spread > 0).all() and spread.isfinite().all()):
        raise ValueError(
            f"an output of the teacher of seed {seed} is the same for all samples, or not finite, so that there is "
            "nothing to learn of it; take other inputs or another task"
        )
    return (answers - answers.mean(0)) / spread


def _loss(output: Tensor, targets: Tensor, inputs: Tensor, loss: Loss | None) -> Loss:
    """The loss, tried on a batch. ``targets`` are [seeds, samples, ...]."""
    if targets.shape[1:2] != inputs.shape[:1]:
        raise ValueError(f"there are {len(inputs)} samples of inputs, but targets of shape {list(targets.shape[1:])}")
    batch = targets[0, : len(output)].to(output.device)
    floats = batch.is_floating_point()
    if loss is None:
        if not (output.shape == batch.shape if floats else output.dim() == 2 and batch.dim() == 1):
            raise ValueError(
                f"outputs of shape {list(output.shape)} do not fit targets of shape {list(batch.shape)} and type "
                f"{batch.dtype}: classes are integers [batch] for outputs [batch, classes], other targets floats of "
                "the outputs' shape; or give loss="
            )
        loss = _squared_error if floats else _cross_entropy
    value = loss(output, batch)
    if value.dim():
        raise ValueError(
            f"loss gives the shape {list(value.shape)} for a batch; it must give the mean, a single number"
        )
    return loss


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target)


def _cross_entropy(output: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(output, classes.long())


def _accuracy(output: Tensor, classes: Tensor) -> Tensor:
    return (output.argmax(1) == classes).to(torch.float32).mean()
