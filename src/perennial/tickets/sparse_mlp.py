"""Multilayer perceptrons of which only some weights are there, trained side by side at a cost that falls with them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from perennial.compiler import load_native
from perennial.methods import SGD, Adam
from perennial.tickets.masks import Masks

Numbers: TypeAlias = np.ndarray[Any, Any]


def mlp_layers(model: nn.Module) -> list[tuple[str, str]] | None:
    """(weight, bias) of every linear layer, by qualified name, if the model is linear layers with ReLU between them."""
    if not isinstance(model, nn.Sequential):
        return None
    found: list[tuple[str, str]] = []
    for place, (name, module) in enumerate(module_list := list(model.named_children())):
        if isinstance(module, nn.Flatten) and place == 0 and len(module_list) > 1:
            continue
        linear = place % 2 == (1 if isinstance(module_list[0][1], nn.Flatten) else 0)
        if type(module) is not (nn.Linear if linear else nn.ReLU):
            return None
        if isinstance(module, nn.Linear):
            if module.bias is None:
                return None
            found.append((f"{name}.weight", f"{name}.bias"))
    return found if found and isinstance(module_list[-1][1], nn.Linear) else None


class Examples:
    """Examples without their zeros: what :class:`~perennial.tickets.SparseMLPs` learns from.

    Args:
        inputs: [samples, features], float; further dimensions are flattened.
        classes: int64 [samples].
    """

    def __init__(self, inputs: Tensor, classes: Tensor) -> None:
        flat = inputs.flatten(1)
        present = flat != 0
        self.count, self.features = flat.shape
        self.rows = torch.cat((torch.zeros(1, dtype=torch.int64), present.sum(1).cumsum(0)))
        self.columns = torch.cat([part.nonzero()[:, 1].to(torch.int32) for part in present.split(4096)])
        self.values = flat[present]
        self.classes = classes.to(torch.int64).contiguous()
        if len(classes) != self.count:
            raise ValueError(f"there are {self.count} examples and {len(classes)} classes")

    @property
    def density(self) -> float:
        """The share of inputs that are not zero."""
        return len(self.values) / max(1, self.count * self.features)


class SparseMLPs:
    """Networks of one shape with masks of their own, trained side by side.

    Kept weights alone are stored, multiplied and updated: a pruned weight costs nothing and cannot move. Each network
    is trained as it would be alone, by SGD with momentum or by Adam; their update is part of the native step, since a
    second pass over weights, gradients and moments would cost more than all the rest.

    Args:
        layers: :func:`mlp_layers` of the model.
        starts: parameters by name, of each network.
        masks: of each network; a weight without a mask is whole.
        rule: :class:`~perennial.methods.sgd.SGD` or :class:`~perennial.methods.adam.Adam`, with the same update as
            theirs.
        density: the share of inputs that are not zero (:attr:`Examples.density`); it and the masks decide how the first
            layer is multiplied, which changes the cost and nothing else.
        threads: processor threads, of use up to one a network.

    Raises:
        RuntimeError: there is no C++ compiler.
        TypeError: another rule.
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, str]],
        starts: Sequence[Mapping[str, Tensor]],
        masks: Sequence[Masks],
        rule: SGD | Adam,
        *,
        density: float = 1.0,
        threads: int = 1,
    ) -> None:
        if not isinstance(rule, (SGD, Adam)):
            raise TypeError(f"rule is {rule!r}; sparse perceptrons are trained by SGD or Adam")
        self.layers, self.rule, self.threads, self.lanes = tuple(layers), rule, threads, len(starts)
        first = starts[0]
        self.dtype = first[layers[0][0]].dtype
        self._masks = [
            [mask[w].cpu() if w in mask else torch.ones(start[w].shape, dtype=torch.bool) for w, _ in layers]
            for start, mask in zip(starts, masks, strict=True)
        ]
        sizes = [first[layers[0][0]].shape[1], *(first[w].shape[0] for w, _ in layers)]
        group = 128 // self.dtype.itemsize  # four registers
        self._width = -(-sizes[1] // group) * group
        self._dense_first = [_dense_first(kept[0], density) for kept in self._masks]
        offsets, starts_, places, values, biases, ends, copies = [], [], [], [], [], [], []
        rows_before = place = copied = 0
        for start, kept, dense in zip(starts, self._masks, self._dense_first, strict=True):
            offsets.append(rows_before)
            copies.append(copied if dense else -1)
            copied += sizes[0] * self._width if dense else 0
            for depth, ((weight, bias), mask) in enumerate(zip(layers, kept, strict=True)):
                mask, held = (mask.T, start[weight].cpu().T) if depth == 0 else (mask, start[weight].cpu())
                ends_of_rows = mask.sum(1).cumsum(0) + place
                starts_.append(torch.cat((torch.tensor([place]), ends_of_rows)))
                rows_before += mask.shape[0] + 1
                units = len(start[bias])
                places += [mask.nonzero()[:, 1], torch.zeros(units, dtype=torch.int64)]  # biases have a place too
                values += [held[mask], start[bias].cpu()]
                biases.append(int(ends_of_rows[-1]))
                place = biases[-1] + units
            ends.append(place)
        self.values = torch.cat(values).to(self.dtype).detach().clone()
        self.mean, self.square = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.steps = 0
        self._ends, self._biases = ends, biases
        held_numbers = [torch.tensor(n) for n in (sizes, offsets)]
        held_numbers += [torch.cat(starts_), torch.cat(places).to(torch.int32)]
        held_numbers += [torch.tensor(n) for n in (biases, ends, copies)]
        self._dense = torch.zeros(copied, dtype=self.dtype)
        self._copies = copies
        self._shape = (*held_numbers, self._dense)
        self._losses, self._accuracies = np.zeros(self.lanes), np.zeros(self.lanes)
        self._run = _library()[f"run_{str(self.dtype).removeprefix('torch.')}"]
        self._copy_out()

    def step(self, examples: Examples, picks: Tensor, lr: float | None = None) -> Numbers:
        """One step of every network on its batch; the mean losses before it, float64 [networks].

        Args:
            examples: all there are.
            picks: which make up each network's batch, int64 [networks, batch].
            lr: the step size, in place of the rule's.
        """
        rule = self.rule
        self.steps += 1
        at = float(rule.lr) if lr is None else lr
        if isinstance(rule, Adam):
            beta1, beta2 = float(rule.beta1), float(rule.beta2)
            unbiased = 1 / (1 - beta1**self.steps), 1 / (1 - beta2**self.steps)
            numbers = (at, beta1, beta2, float(rule.eps), float(rule.weight_decay), *unbiased, 1.0, rule.decoupled)
        else:
            numbers = (at, float(rule.momentum or 0.0), 0.0, 0.0, float(rule.weight_decay), 0.0, 0.0, 0.0, False)
        self._call(examples, np.array(numbers, dtype=np.float64), picks, picks.shape[1])
        return self._losses

    def evaluate(self, examples: Examples) -> tuple[Numbers, Numbers]:
        """Mean loss and accuracy of every network over all examples, float64 [networks] each."""
        self._call(examples, None, None, examples.count)
        return self._losses.copy(), self._accuracies.copy()

    def params(self, lane: int) -> dict[str, Tensor]:
        """A network's weights and biases by name, pruned weights exactly 0."""
        found = {}
        for (weight, bias), mask, kept, own in self._parts(lane):
            found[weight] = torch.zeros(mask.shape, dtype=self.dtype)
            if weight == self.layers[0][0]:
                found[weight].T[mask.T] = kept
            else:
                found[weight][mask] = kept
            found[bias] = own.clone()
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """What a training must keep to go on."""
        return {"values": self.values, "mean": self.mean, "square": self.square, "steps": torch.tensor(self.steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave, bit for bit."""
        for name in ("values", "mean", "square"):
            getattr(self, name).copy_(state[name])
        self.steps = int(state["steps"])
        self._copy_out()

    def _copy_out(self) -> None:
        """The dense copies are what the values say."""
        width = self._width
        for lane, begin in enumerate(self._copies):
            if begin >= 0:
                (_, mask, kept, _), *_ = self._parts(lane)
                rows = self._dense[begin : begin + mask.shape[1] * width].view(mask.shape[1], width)[:, : mask.shape[0]]
                rows[mask.T] = kept

    def _parts(self, lane: int) -> list[tuple[tuple[str, str], Tensor, Tensor, Tensor]]:
        """(names, mask, kept weights, biases) of every layer, as views of the values."""
        flat = self.values
        place, found = self._ends[lane - 1] if lane else 0, []
        depth = len(self.layers)
        for number, (names, mask) in enumerate(zip(self.layers, self._masks[lane], strict=True)):
            bias = self._biases[lane * depth + number]
            found.append((names, mask, flat[place:bias], flat[bias : bias + mask.shape[0]]))
            place = bias + mask.shape[0]
        return found

    def _call(self, examples: Examples, numbers: Numbers | None, picks: Tensor | None, count: int) -> None:
        self._run(
            ctypes.c_int64(self.lanes),
            ctypes.c_int64(len(self.layers)),
            *(_pointer(tensor) for tensor in self._shape),
            *(_pointer(tensor) for tensor in (self.values, self.mean, self.square)),
            ctypes.c_void_p(None if numbers is None else numbers.ctypes.data),
            *(_pointer(t) for t in (examples.rows, examples.columns, examples.values, examples.classes)),
            _pointer(picks),
            ctypes.c_int64(count),
            ctypes.c_void_p(self._losses.ctypes.data),
            ctypes.c_void_p(self._accuracies.ctypes.data),
            ctypes.c_int64(self.threads),
        )


def _dense_first(mask: Tensor, density: float) -> bool:
    """Whether the first layer is cheaper by a dense copy.

    Estimated for 784-300 (AVX2), in cycles forth and back: dense, five for a number of the input that is not zero and
    eight units, and seven for a kept weight's update; sparse, twenty-two for a kept weight.
    """
    kept = int(mask.sum())
    return density * mask.numel() * 64 / 8 * 5 + 7 * kept < 22 * kept


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@functools.cache
def _library() -> ctypes.CDLL:
    return load_native(Path(__file__).with_suffix(".cpp").read_text())
