"""Multilayer perceptrons of which only some weights are there, trained side by side at a cost that falls with them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from perennial.compiler import load_native
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
    """Examples without their zeros: what :class:`SparseMLPs` learns from.

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
    """Networks of one shape with masks of their own, as one flat parameter for one optimizer.

    Kept weights alone are stored and trained: a pruned weight costs nothing and cannot move. Any optimizer that treats
    every weight alike, whatever its place, trains them as it would train each network alone: SGD, Adam, AdamW; not one
    that takes norms or orders over a parameter.

    Args:
        layers: :func:`mlp_layers` of the model.
        starts: parameters by name, of each network.
        masks: of each network; a weight without a mask is whole.
        optimizer: makes the optimizer of a list of parameters.
        density: the share of inputs that are not zero (:attr:`Examples.density`); it and the masks decide how the first
            layer is multiplied, which changes the cost and nothing else.
        threads: processor threads, of use up to one a network.

    Raises:
        RuntimeError: there is no C++ compiler.
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, str]],
        starts: Sequence[Mapping[str, Tensor]],
        masks: Sequence[Masks],
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        density: float = 1.0,
        threads: int = 1,
    ) -> None:
        self.layers, self.threads, self.lanes = tuple(layers), threads, len(starts)
        first = starts[0]
        self.dtype = first[layers[0][0]].dtype
        self._masks = [
            [mask[w].cpu() if w in mask else torch.ones(start[w].shape, dtype=torch.bool) for w, _ in layers]
            for start, mask in zip(starts, masks, strict=True)
        ]
        sizes = [first[layers[0][0]].shape[1], *(first[w].shape[0] for w, _ in layers)]
        width = -(-sizes[1] // 32) * 32
        self._by_input = [_by_input(kept[0], density) for kept in self._masks]
        offsets, starts_, places, values, biases, ends, copies = [], [], [], [], [], [], []
        rows_before = place = copied = 0
        for start, kept, by_input in zip(starts, self._masks, self._by_input, strict=True):
            offsets.append(rows_before)
            copies.append(copied if by_input else -1)
            copied += sizes[0] * width if by_input else 0
            for depth, ((weight, bias), mask) in enumerate(zip(layers, kept, strict=True)):
                mask, held = (mask.T, start[weight].cpu().T) if by_input and depth == 0 else (mask, start[weight].cpu())
                ends_of_rows = mask.sum(1).cumsum(0) + place
                starts_.append(torch.cat((torch.tensor([place]), ends_of_rows)))
                rows_before += mask.shape[0] + 1
                units = len(start[bias])
                places += [mask.nonzero()[:, 1], torch.zeros(units, dtype=torch.int64)]  # biases have a place too
                values += [held[mask], start[bias].cpu()]
                biases.append(int(ends_of_rows[-1]))
                place = biases[-1] + units
            ends.append(place)
        self.values = nn.Parameter(torch.cat(values).to(self.dtype))
        self.values.grad = torch.zeros_like(self.values)
        self._ends, self._biases = ends, biases
        held_numbers = [torch.tensor(n) for n in (sizes, offsets)]
        held_numbers += [torch.cat(starts_), torch.cat(places).to(torch.int32)]
        held_numbers += [torch.tensor(n) for n in (biases, ends, copies)]
        self._shape = (*held_numbers, torch.zeros(copied, dtype=self.dtype))
        self._losses, self._accuracies = np.zeros(self.lanes), np.zeros(self.lanes)
        self._run = _library()[f"evaluate_{str(self.dtype).removeprefix('torch.')}"]
        self.optimizer = optimizer([self.values])

    def step(self, examples: Examples, picks: Tensor) -> Numbers:
        """One optimizer step of every network on its batch; the mean losses before it, float64 [networks].

        Args:
            examples: all there are.
            picks: which make up each network's batch, int64 [networks, batch].
        """
        assert self.values.grad is not None
        self._call(examples, self.values.grad, picks, picks.shape[1])
        self.optimizer.step()
        return self._losses

    def evaluate(self, examples: Examples) -> tuple[Numbers, Numbers]:
        """Mean loss and accuracy of every network over all examples, float64 [networks] each."""
        self._call(examples, None, None, examples.count)
        return self._losses.copy(), self._accuracies.copy()

    def params(self, lane: int) -> dict[str, Tensor]:
        """A network's weights and biases by name, pruned weights exactly 0."""
        return self._dense(self.values.detach(), lane)

    def load(self, lane: int, params: Mapping[str, Tensor]) -> None:
        """Give a network other values; those of pruned weights are left out."""
        for (weight, bias), mask, flat, own in self._parts(self.values.detach(), lane):
            flat.copy_(params[weight].T[mask.T] if self._turned(lane, weight) else params[weight][mask])
            own.copy_(params[bias])

    def _dense(self, flat: Tensor, lane: int) -> dict[str, Tensor]:
        found = {}
        for (weight, bias), mask, kept, own in self._parts(flat, lane):
            found[weight] = torch.zeros(mask.shape, dtype=flat.dtype)
            if self._turned(lane, weight):
                found[weight].T[mask.T] = kept
            else:
                found[weight][mask] = kept
            found[bias] = own.clone()
        return found

    def _turned(self, lane: int, weight: str) -> bool:
        return self._by_input[lane] and weight == self.layers[0][0]

    def _parts(self, flat: Tensor, lane: int) -> list[tuple[tuple[str, str], Tensor, Tensor, Tensor]]:
        """(names, mask, kept weights, biases) of every layer, as views of the flat tensor."""
        place, found = self._ends[lane - 1] if lane else 0, []
        depth = len(self.layers)
        for number, (names, mask) in enumerate(zip(self.layers, self._masks[lane], strict=True)):
            bias = self._biases[lane * depth + number]
            found.append((names, mask, flat[place:bias], flat[bias : bias + mask.shape[0]]))
            place = bias + mask.shape[0]
        return found

    def _call(self, examples: Examples, slopes: Tensor | None, picks: Tensor | None, count: int) -> None:
        self._run(
            ctypes.c_int64(self.lanes),
            ctypes.c_int64(len(self.layers)),
            *(_pointer(tensor) for tensor in self._shape),
            _pointer(self.values),
            _pointer(slopes),
            *(_pointer(t) for t in (examples.rows, examples.columns, examples.values, examples.classes)),
            _pointer(picks),
            ctypes.c_int64(count),
            ctypes.c_void_p(self._losses.ctypes.data),
            ctypes.c_void_p(self._accuracies.ctypes.data),
            ctypes.c_int64(self.threads),
        )


def _by_input(mask: Tensor, density: float) -> bool:
    """Whether the first layer is cheaper by input. By unit a kept weight costs about 20 cycles forth and back, for 64
    examples; by input, a number of the input that is not zero costs about 2.5 for eight units."""
    kept = int(mask.sum())
    return density * mask.numel() * 64 / 8 * 2.5 < 20 * kept


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@functools.cache
def _library() -> ctypes.CDLL:
    return load_native(Path(__file__).with_suffix(".cpp").read_text())
