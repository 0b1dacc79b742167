"""What every method should do, stated a second time: plain loops over weights and units, NumPy, float64.

Written from the papers' equations, not from the library's code; where they share anything, it is the random numbers,
which are given to both. To add a method, write a class with its update and give it an entry in :data:`REFERENCES`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from perennial import MLP, Lane, Population
from perennial.methods import REGISTRY, Method, Rule
from perennial.noise import Noise, seed_key
from perennial.population import LaneState
from perennial.streams import Examples, Stream

SIZES = (6, 5, 4, 2)
"""Inputs, two hidden layers, outputs: no two alike, so that a transposed index cannot pass."""

Place = tuple[str, int]
"""``("weight", 0)`` is the first layer's matrix [out, in], ``("bias", 0)`` its bias."""

Fresh = Any
"""What an event made anew: (layer, unit), the place of a whole parameter, or a place and a single weight of it."""


# --- the network and its gradient -----------------------------------------------------------------------------------


@dataclass
class Learned:
    """What a step is taken from."""

    loss: float
    grads: dict[Place, np.ndarray]
    hidden: list[np.ndarray]
    """The activations [samples, units] of every hidden layer."""
    signals: list[np.ndarray]
    """The gradient of the loss by each of them."""


class Network:
    """A ReLU network with a linear output; the loss is the squared error summed over outputs, averaged over samples."""

    def __init__(self, weights: Sequence[np.ndarray], biases: Sequence[np.ndarray]) -> None:
        self.values: dict[Place, np.ndarray] = {}
        for depth, (w, b) in enumerate(zip(weights, biases, strict=True)):
            self.values["weight", depth] = w.astype(np.float64)
            self.values["bias", depth] = b.astype(np.float64)
        self.depth = len(weights)

    def hidden(self, x: np.ndarray, silent: tuple[int, int] | None = None) -> list[np.ndarray]:
        """The activations of each hidden layer for one sample, then the output; those of the ``silent`` (layer, unit)
        are zero."""
        found = []
        for depth in range(self.depth):
            x = self.values["weight", depth] @ x + self.values["bias", depth]
            if depth < self.depth - 1:
                x = np.maximum(x, 0)
            if silent is not None and silent[0] == depth:
                x[silent[1]] = 0
            found.append(x)
        return found

    def loss(self, inputs: np.ndarray, targets: np.ndarray, silent: tuple[int, int] | None = None) -> float:
        """The loss on some samples."""
        errors = [((self.hidden(x, silent)[-1] - y) ** 2).sum() for x, y in zip(inputs, targets, strict=True)]
        return float(sum(errors)) / len(inputs)

    def curvature(self, inputs: np.ndarray) -> tuple[dict[Place, np.ndarray], list[np.ndarray]]:
        """HesScale's diagonal of the loss's Hessian: by every parameter; and, for each hidden layer, by a factor on the
        output of every unit.

        Exact for the outputs and their weights; below, the second derivatives by two different units are left out.
        """
        by_weight = {place: np.zeros_like(w) for place, w in self.values.items()}
        by_factor = [np.zeros(len(self.values["bias", depth])) for depth in range(self.depth - 1)]
        for x in inputs:
            layers = self.hidden(x)
            h = np.full(len(layers[-1]), 2 / len(inputs))
            for depth in reversed(range(self.depth)):
                below = x if depth == 0 else layers[depth - 1]
                for out in range(len(h)):
                    by_weight["bias", depth][out] += h[out]
                    for i, a in enumerate(below):
                        by_weight["weight", depth][out, i] += h[out] * a**2
                if depth > 0:
                    by_activation = (self.values["weight", depth] ** 2).T @ h
                    for j, a in enumerate(below):
                        by_factor[depth - 1][j] += by_activation[j] * a**2
                    h = by_activation * (below > 0)  # a ReLU has no curvature of its own
        return by_weight, by_factor

    def learn(self, inputs: np.ndarray, targets: np.ndarray) -> Learned:
        """Loss, gradients and activations."""
        grads = {place: np.zeros_like(v) for place, v in self.values.items()}
        seen: list[list[np.ndarray]] = [[] for _ in range(self.depth - 1)]
        signals: list[list[np.ndarray]] = [[] for _ in range(self.depth - 1)]
        for x, y in zip(inputs, targets, strict=True):
            layers = self.hidden(x)
            signal = 2 * (layers[-1] - y) / len(inputs)
            for depth in reversed(range(self.depth)):
                below = x if depth == 0 else layers[depth - 1]
                grads["weight", depth] += np.outer(signal, below)
                grads["bias", depth] += signal
                if depth > 0:
                    by_activation = self.values["weight", depth].T @ signal
                    seen[depth - 1].append(below)
                    signals[depth - 1].append(by_activation)
                    signal = by_activation * (below > 0)
        return Learned(self.loss(inputs, targets), grads, [np.array(h) for h in seen], [np.array(g) for g in signals])

    def fresh(self, place: Place, given: Given) -> np.ndarray:
        """A fresh draw of a parameter: Kaiming uniform, the last layer's for a linear layer; biases are zero."""
        kind, depth = place
        shape = self.values[place].shape
        if kind == "bias":
            return np.zeros(shape)
        bound = math.sqrt((3 if depth == self.depth - 1 else 6) / shape[1])
        u = given.uniform(parameter(place), shape).astype(np.float32)  # the library draws in single precision
        return (np.float32(-bound) + np.float32(2 * bound) * u).astype(np.float64)

    def of_unit(self, layer: int, unit: int) -> list[tuple[Place, Any]]:
        """Where the weights of a hidden unit lie: its row, its bias, its column in the next layer."""
        return [
            (("weight", layer), np.s_[unit, :]),
            (("bias", layer), np.s_[unit]),
            (("weight", layer + 1), np.s_[:, unit]),
        ]


@dataclass
class Given:
    """What one step of one lane is given: random numbers, taken from the library as they are, and what was learned."""

    seed: int
    step: int
    scope: str
    grads: Mapping[Place, np.ndarray] = field(default_factory=dict)
    """The gradient of the loss (and of coupled penalties), from before the step."""
    signals: Sequence[np.ndarray] = ()
    """The gradient of the loss by each hidden layer's activations, [samples, units]."""
    hidden: Sequence[np.ndarray] = ()
    """Those activations."""
    loss: Callable[..., float] = lambda silent=None: math.nan
    """The loss on this step's samples with the network's values as they are, but for a ``silent`` (layer, unit)."""
    curvature: Callable[[], tuple[dict[Place, np.ndarray], list[np.ndarray]]] = lambda: ({}, [])
    """:meth:`Network.curvature` on this step's samples with the network's values as they are."""

    def _noise(self) -> Noise:
        key = torch.tensor(seed_key(self.seed, "method"), dtype=torch.int32)
        return Noise(key, torch.tensor(self.step, dtype=torch.int32), self.scope)

    def normal(self, place: Place, shape: tuple[int, ...]) -> np.ndarray:
        return self._array(self._noise().normal, parameter(place), shape)

    def uniform(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return self._array(self._noise().uniform, name, shape)

    @staticmethod
    def _array(draw: Callable[[str, torch.Tensor], torch.Tensor], name: str, shape: tuple[int, ...]) -> np.ndarray:
        element = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
        return draw(name, element).numpy().astype(np.float64)


def module(depth: int) -> str:
    """The name of a linear layer in :class:`perennial.MLP`: a flatten comes first, then linear and activation."""
    return str(1 + 2 * depth)


def parameter(place: Place) -> str:
    """A place's name in :class:`perennial.MLP`."""
    return f"{module(place[1])}.{place[0]}"


# --- rules ----------------------------------------------------------------------------------------------------------


class SGD:
    """v <- mu v + g + lambda w;  w <- w - alpha v."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings
        self.velocity = {place: np.zeros_like(w) for place, w in network.values.items()}

    def step(self, network: Network, grads: Mapping[Place, np.ndarray], given: Given) -> None:
        for place, w in network.values.items():
            momentum = 0.0 if self.s.momentum is None else self.s.momentum
            self.velocity[place] = momentum * self.velocity[place] + grads[place] + self.s.weight_decay * w
            network.values[place] = w - self.s.lr * self.velocity[place]

    def forget(self, place: Place, where: Any) -> None:
        self.velocity[place][where] = 0


class Adam:
    """Kingma and Ba's Algorithm 1, with a count for every single weight."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings
        self.mean = {place: np.zeros_like(w) for place, w in network.values.items()}
        self.square = {place: np.zeros_like(w) for place, w in network.values.items()}
        self.time = {place: np.zeros_like(w) for place, w in network.values.items()}

    def step(self, network: Network, grads: Mapping[Place, np.ndarray], given: Given) -> None:
        s = self.s
        for place, w in network.values.items():
            for at in np.ndindex(w.shape):
                g = grads[place][at]
                if s.decoupled:
                    w[at] *= 1 - s.lr * s.weight_decay
                else:
                    g += s.weight_decay * w[at]
                w[at] -= s.lr * self.direction(place, at, g)

    def direction(self, place: Place, at: tuple[int, ...], g: float) -> float:
        """One more gradient of a weight; the corrected mean by the root of the corrected mean square."""
        s = self.s
        self.time[place][at] += 1
        self.mean[place][at] += (1 - s.beta1) * (g - self.mean[place][at])
        self.square[place][at] += (1 - s.beta2) * (g**2 - self.square[place][at])
        mean = self.mean[place][at] / (1 - s.beta1 ** self.time[place][at])
        square = self.square[place][at] / (1 - s.beta2 ** self.time[place][at])
        return mean / (math.sqrt(square) + s.eps)

    def forget(self, place: Place, where: Any) -> None:
        for table in (self.mean, self.square, self.time):
            table[place][where] = 0

    def forget_single(self, place: Place, at: tuple[int, ...]) -> None:
        """Of a weight that is no row's or column's: its count stays."""
        self.mean[place][at] = self.square[place][at] = 0


class PGD:
    """w <- (1 - alpha lambda) w - alpha (g + s xi)."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings

    def step(self, network: Network, grads: Mapping[Place, np.ndarray], given: Given) -> None:
        s = self.s
        for place, w in network.values.items():
            perturbed = grads[place] + s.noise_std * given.normal(place, w.shape)
            network.values[place] = (1 - s.lr * s.weight_decay) * w - s.lr * perturbed

    def forget(self, place: Place, where: Any) -> None:
        """There is nothing to forget."""


class UPGD:
    """Elsayed and Mahmood's Algorithm 1 with decoupled decay: one maximum, of the corrected utilities, over layers.

    Tables of utility have a place's key, [out, in] or [out]; feature-wise the number of a hidden layer, [units].
    """

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings
        last = network.depth - 1
        if settings.granularity == "feature":
            shapes: dict[Any, tuple[int, ...]] = {layer: network.values["bias", layer].shape for layer in range(last)}
        else:
            own = [place for place in network.values if settings.gated == "all" or place[1] == last]
            shapes = {place: network.values[place].shape for place in own}
        self.utility = {key: np.zeros(shape) for key, shape in shapes.items()}
        self.time = {key: np.zeros(shape) for key, shape in shapes.items()}

    def instant(self, network: Network, grads: Mapping[Place, np.ndarray], given: Given) -> dict[Any, np.ndarray]:
        """The loss without a weight, or a unit's output, minus the loss."""
        found = {key: np.zeros_like(table) for key, table in self.utility.items()}
        by_weight, by_factor = given.curvature() if self.s.order == 2 else ({}, [])
        loss = given.loss() if self.s.order == "exact" else math.nan
        for key, table in found.items():
            for at in np.ndindex(table.shape):
                if self.s.granularity == "feature":
                    unit = at[0]
                    slope = sum(
                        a * g for a, g in zip(given.hidden[key][:, unit], given.signals[key][:, unit], strict=True)
                    )
                    if self.s.order == 1:
                        table[at] = -slope
                    elif self.s.order == 2:
                        table[at] = -slope + by_factor[key][unit] / 2
                    else:
                        table[at] = given.loss((key, unit)) - loss
                else:
                    w = network.values[key][at]
                    if self.s.order == 1:
                        table[at] = -grads[key][at] * w
                    elif self.s.order == 2:
                        table[at] = -grads[key][at] * w + by_weight[key][at] * w**2 / 2
                    else:
                        network.values[key][at] = 0
                        table[at] = given.loss() - loss
                        network.values[key][at] = w
        return found

    def gates(self, network: Network, grads: Mapping[Place, np.ndarray], given: Given) -> dict[Any, np.ndarray]:
        """1 - the scaled utility: how freely each weight, or unit, learns."""
        corrected = {}
        for key, instant in self.instant(network, grads, given).items():
            self.time[key] += 1
            self.utility[key] = self.s.utility_decay * self.utility[key] + (1 - self.s.utility_decay) * instant
            corrected[key] = self.utility[key] / (1 - self.s.utility_decay ** self.time[key])
        highest = max(float(u.max()) for u in corrected.values())
        free = {key: np.zeros_like(u) for key, u in corrected.items()}
        for key, u in corrected.items():
            for at in np.ndindex(u.shape):
                # of a weight by the others of its row, of a bias or a unit by the others of its layer
                scale = math.sqrt(sum(v**2 for v in u[at[:-1]])) if self.s.scope == "local" else highest
                if scale > 0:
                    free[key][at] = 1 / (1 + math.exp(u[at] / scale))
                else:  # nothing is useful: the worst learn freely
                    free[key][at] = 0.5 if u[at] == 0 else 1.0
        return free

    def slope(self, place: Place, at: tuple[int, ...], grad: float) -> float:
        """What stands for the gradient of a weight."""
        return grad

    def step(self, network: Network, grads: Mapping[Place, np.ndarray], given: Given) -> None:
        s = self.s
        gates = self.gates(network, grads, given)
        for place, w in network.values.items():
            depth = place[1]
            xi = given.normal(place, w.shape)
            for at in np.ndindex(w.shape):
                slope = self.slope(place, at, grads[place][at])
                if s.granularity == "feature" and depth == network.depth - 1:
                    update = slope  # what makes no unit
                else:
                    if s.granularity == "feature":
                        free = gates[depth][at[0]]
                    else:
                        free = gates[place][at] if place in gates else 0.5
                    noise = s.noise_std * xi[at] * free
                    update = slope * free + noise if s.protect else slope + noise
                    update *= 2 if s.doubled else 1
                w[at] = (1 - s.lr * s.weight_decay) * w[at] - s.lr * update

    def forget(self, place: Place, where: Any) -> None:
        for table in (self.utility, self.time):
            if place in table:
                table[place][where] = 0

    def forget_unit(self, layer: int, unit: Any) -> None:
        for table in (self.utility, self.time):
            if layer in table:
                table[layer][unit] = 0


class AdaUPGD(UPGD):
    """UPGD with Adam's m / (sqrt(v) + eps) in the gradient's place."""

    def __init__(self, settings: Any, network: Network) -> None:
        super().__init__(settings, network)
        self.moments = Adam(settings, network)

    def slope(self, place: Place, at: tuple[int, ...], grad: float) -> float:
        return self.moments.direction(place, at, grad)

    def forget(self, place: Place, where: Any) -> None:
        super().forget(place, where)
        self.moments.forget(place, where)


class Anchored:
    """w <- w - alpha (g + kappa I (w - a)), with a the corrected moving average of w, this step's included."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings
        self.anchor = {place: np.zeros_like(w) for place, w in network.values.items()}
        self.time = {place: np.zeros_like(w) for place, w in network.values.items()}
        self.first = {place: np.zeros_like(w) for place, w in network.values.items()}
        self.second = {place: np.zeros_like(w) for place, w in network.values.items()}

    def importance(self, place: Place, at: tuple[int, ...], grad: float) -> float:
        """How important a weight is in this step, its ``time``-th."""
        raise NotImplementedError

    def went(self, place: Place, at: tuple[int, ...], grad: float, by: float) -> None:
        """The weight has moved."""

    def average(self, table: dict[Place, np.ndarray], place: Place, at: tuple[int, ...], new: float) -> None:
        """One more for a moving average of the importance."""
        table[place][at] = self.s.importance_decay * table[place][at] + (1 - self.s.importance_decay) * new

    def step(self, network: Network, grads: Mapping[Place, np.ndarray], given: Given) -> None:
        s = self.s
        for place, w in network.values.items():
            for at in np.ndindex(w.shape):
                g, old = grads[place][at], w[at]
                self.time[place][at] += 1
                self.anchor[place][at] = s.anchor_decay * self.anchor[place][at] + (1 - s.anchor_decay) * old
                anchor = self.anchor[place][at] / (1 - s.anchor_decay ** self.time[place][at])
                w[at] -= s.lr * (g + s.strength * self.importance(place, at, g) * (old - anchor))
                self.went(place, at, g, w[at] - old)

    def forget(self, place: Place, where: Any) -> None:
        for table in (self.anchor, self.time, self.first, self.second):
            table[place][where] = 0


class EWC(Anchored):
    """The average squared gradient."""

    def importance(self, place: Place, at: tuple[int, ...], grad: float) -> float:
        self.average(self.first, place, at, grad**2)
        return self.first[place][at] / (1 - self.s.importance_decay ** self.time[place][at])


class MAS(Anchored):
    """The average size of the gradient."""

    def importance(self, place: Place, at: tuple[int, ...], grad: float) -> float:
        self.average(self.first, place, at, abs(grad))
        return self.first[place][at] / (1 - self.s.importance_decay ** self.time[place][at])


class SynapticIntelligence(Anchored):
    """The average of -g dw over the squared average of dw, of all steps before this one."""

    def importance(self, place: Place, at: tuple[int, ...], grad: float) -> float:
        before = self.time[place][at] - 1
        if before == 0:
            return 0.0
        full = 1 - self.s.importance_decay**before
        return (self.first[place][at] / full) / ((self.second[place][at] / full) ** 2 + self.s.eps)

    def went(self, place: Place, at: tuple[int, ...], grad: float, by: float) -> None:
        self.average(self.first, place, at, -grad * by)
        self.average(self.second, place, at, by)


class RWalk(Anchored):
    """The average squared gradient, and a score that halves: what a movement gained by the distance that it was."""

    def fisher(self, place: Place, at: tuple[int, ...]) -> float:
        return self.first[place][at] / (1 - self.s.importance_decay ** self.time[place][at])

    def importance(self, place: Place, at: tuple[int, ...], grad: float) -> float:
        self.average(self.first, place, at, grad**2)
        return self.fisher(place, at) + self.second[place][at]

    def went(self, place: Place, at: tuple[int, ...], grad: float, by: float) -> None:
        gained = -grad * by / (self.fisher(place, at) * by**2 / 2 + self.s.eps)
        self.second[place][at] = self.second[place][at] / 2 + max(0.0, gained) / 2


# --- interventions --------------------------------------------------------------------------------------------------


class Regulariser:
    """w <- w - r dOmega/dw after the rule, or r dOmega/dw in the gradient that the rule is given."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings
        self.initial = {place: w.copy() for place, w in network.values.items()}

    def slope(self, network: Network) -> dict[Place, np.ndarray]:
        """dOmega/dw, worked out by hand."""
        raise NotImplementedError

    def advance(self, network: Network) -> None:
        """What is kept from step to step."""

    def step(self, network: Network, hidden: Sequence[np.ndarray], given: Given) -> list[tuple[int, int]]:
        self.advance(network)
        if not self.s.coupled:
            for place, slope in self.slope(network).items():
                network.values[place] = network.values[place] - self.s.rate * slope
        return []


class L2Init(Regulariser):
    """dOmega/dw = w - w0."""

    def slope(self, network: Network) -> dict[Place, np.ndarray]:
        return {place: w - self.initial[place] for place, w in network.values.items()}


class L1Init(Regulariser):
    """dOmega/dw = sign(w - w0); by itself the step that cannot go past w0."""

    def slope(self, network: Network) -> dict[Place, np.ndarray]:
        return {place: np.sign(w - self.initial[place]) for place, w in network.values.items()}

    def step(self, network: Network, hidden: Sequence[np.ndarray], given: Given) -> list[tuple[int, int]]:
        if self.s.coupled:
            return []
        for place, w in network.values.items():
            for at in np.ndindex(w.shape):
                distance = w[at] - self.initial[place][at]
                if distance > self.s.rate:
                    w[at] -= self.s.rate
                elif distance < -self.s.rate:
                    w[at] += self.s.rate
                else:
                    w[at] = self.initial[place][at]
        return []


class WassersteinInit(Regulariser):
    """Every weight is pulled toward the initial weight of its own rank within the tensor."""

    def slope(self, network: Network) -> dict[Place, np.ndarray]:
        found = {}
        for place, w in network.values.items():
            targets = sorted(self.initial[place].ravel())
            found[place] = np.zeros_like(w)
            for rank, at in enumerate(sorted(np.ndindex(w.shape), key=lambda at, w=w: w[at])):
                found[place][at] = w[at] - targets[rank]
        return found


class Parseval(Regulariser):
    """d ||W W^T - s I||^2 / dW = 4 (W W^T - s I) W, for all matrices but the last."""

    def slope(self, network: Network) -> dict[Place, np.ndarray]:
        found = {}
        for depth in range(network.depth - 1):
            w = network.values["weight", depth]
            assert w.shape[0] <= w.shape[1], "with more rows than columns it is the columns' products"
            found["weight", depth] = 4 * (w @ w.T - self.s.scale * np.eye(len(w))) @ w
        return found


class SpectralRegularisation(Regulariser):
    """d (sigma^k - 1)^2 / dW = 2 (sigma^k - 1) k sigma^(k - 1) u v^T;  d ||b||^2 / db = 2 b."""

    def __init__(self, settings: Any, network: Network) -> None:
        super().__init__(settings, network)
        self.v = {}
        for (kind, depth), w in network.values.items():
            if kind == "weight":
                start = np.array([math.cos(i) for i in range(w.shape[1])])
                self.v[depth] = start / np.linalg.norm(start)

    def advance(self, network: Network) -> None:
        for depth, v in self.v.items():
            w = network.values["weight", depth]
            back = w.T @ (w @ v)
            self.v[depth] = back / np.linalg.norm(back)

    def slope(self, network: Network) -> dict[Place, np.ndarray]:
        k, found = self.s.power, {}
        for place, w in network.values.items():
            if place[0] == "bias":
                found[place] = 2 * w
                continue
            image = w @ self.v[place[1]]
            sigma = np.linalg.norm(image)
            found[place] = 2 * (sigma**k - 1) * k * sigma ** (k - 1) * np.outer(image / sigma, self.v[place[1]])
        return found


class WeightClipping:
    """|w|, |b| <= kappa / sqrt(fan_in)."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings

    def step(self, network: Network, hidden: Sequence[np.ndarray], given: Given) -> list[tuple[int, int]]:
        for (kind, depth), w in network.values.items():
            bound = self.s.kappa / math.sqrt(network.values["weight", depth].shape[1])
            network.values[kind, depth] = np.minimum(np.maximum(w, -bound), bound)
        return []


class ShrinkAndPerturb:
    """w <- (1 - s) w + sigma x, every step or when a new task begins."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings
        self.initial = {place: w.copy() for place, w in network.values.items()}

    def step(self, network: Network, hidden: Sequence[np.ndarray], given: Given) -> list[tuple[int, int]]:
        return self._change(network, given) if self.s.when == "step" else []

    def event(self, network: Network, given: Given) -> list[Fresh]:
        self._change(network, given)
        return []

    def _change(self, network: Network, given: Given) -> list[tuple[int, int]]:
        for place, w in network.values.items():
            if self.s.perturb == "normal":
                x = given.normal(place, w.shape)
            elif self.s.perturb == "fresh":
                x = network.fresh(place, given)
            else:
                x = self.initial[place]
            network.values[place] = w * (1 - self.s.shrink) + self.s.noise_std * x
        return []


class NormalizeAndProject:
    """Every matrix but the last goes (part of) the way back to its initial norm."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings
        self.norm = [np.linalg.norm(network.values["weight", d]) for d in range(network.depth - 1)]

    def step(self, network: Network, hidden: Sequence[np.ndarray], given: Given) -> list[tuple[int, int]]:
        for depth, norm in enumerate(self.norm):
            w = network.values["weight", depth]
            now = np.linalg.norm(w)
            wanted = now + self.s.strength * (norm - now)
            network.values["weight", depth] = w * (wanted / now)
        return []


class ResetLayers:
    """The last layers, weights and biases, are drawn afresh or become zero."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings
        if settings.values == "zero" and settings.every is None:
            for place in self.chosen(network):
                network.values[place] = 0 * network.values[place]

    def step(self, network: Network, hidden: Sequence[np.ndarray], given: Given) -> list[tuple[int, int]]:
        return []

    def event(self, network: Network, given: Given) -> list[Fresh]:
        for place in self.chosen(network):
            zero = np.zeros_like(network.values[place])
            network.values[place] = zero if self.s.values == "zero" else network.fresh(place, given)
        return list(self.chosen(network))

    def chosen(self, network: Network) -> list[Place]:
        first = 0 if self.s.last is None else max(0, network.depth - self.s.last)
        return [(kind, depth) for kind in ("weight", "bias") for depth in range(first, network.depth)]


class HareAndTortoise:
    """The tortoise follows slowly; now and then the hare is put where the tortoise is."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings
        self.slow = {place: w.copy() for place, w in network.values.items()}

    def step(self, network: Network, hidden: Sequence[np.ndarray], given: Given) -> list[tuple[int, int]]:
        for place, w in network.values.items():
            self.slow[place] = self.s.decay * self.slow[place] + (1 - self.s.decay) * w
        return []

    def event(self, network: Network, given: Given) -> list[Fresh]:
        for place, slow in self.slow.items():
            network.values[place] = slow.copy()
        return []


class DASH:
    """Rows that point away from where the gradient pushes them shrink."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings
        self.direction = {place: np.zeros_like(w) for place, w in network.values.items()}

    def step(self, network: Network, hidden: Sequence[np.ndarray], given: Given) -> list[tuple[int, int]]:
        for place, grad in given.grads.items():
            self.direction[place] = self.s.decay * self.direction[place] - (1 - self.s.decay) * grad
        return []

    def event(self, network: Network, given: Given) -> list[Fresh]:
        for depth in range(network.depth):
            for row, toward in zip(network.values["weight", depth], self.direction["weight", depth], strict=True):
                lengths = np.linalg.norm(row) * np.linalg.norm(toward)
                cosine = row @ toward / lengths if lengths > 0 else 1.0
                row *= min(max(cosine, self.s.floor), 1.0)
        return []


class FIRE:
    """Every matrix but the last becomes (nearly) its orthogonal factor."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings

    def step(self, network: Network, hidden: Sequence[np.ndarray], given: Given) -> list[tuple[int, int]]:
        return []

    def event(self, network: Network, given: Given) -> list[Fresh]:
        chosen: list[Fresh] = [("weight", depth) for depth in range(network.depth - 1)]
        for place in chosen:
            w = network.values[place]
            u, singular, v = np.linalg.svd(w, full_matrices=False)  # the iteration moves nothing but singular values
            singular = singular / np.linalg.norm(singular)
            for _ in range(self.s.iterations):
                singular = 1.5 * singular - 0.5 * singular**3
            network.values[place] = (u * singular) @ v * math.sqrt(w.shape[0] / w.shape[1])
        return chosen


class SET:
    """Of each layer's weights that are there the smallest go, and as many come at random."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings
        # the first mask is drawn before the first step: what is absent is zero, and nothing else is
        self.there = {place: set(zip(*np.nonzero(w), strict=True)) for place, w in network.values.items()}
        self.steps = 0

    def worth(self, place: Place, given: Given) -> np.ndarray:
        """What is absent comes by this, the largest first."""
        return given.uniform(f"{parameter(place)}/growth", self.slope[place].shape)

    def share(self) -> float:
        return float(self.s.drop)

    def step(self, network: Network, hidden: Sequence[np.ndarray], given: Given) -> list[tuple[int, int]]:
        self.steps += 1
        self.slope = given.grads
        for place, w in network.values.items():
            if place[0] == "weight":
                for at in np.ndindex(w.shape):
                    if at not in self.there[place]:
                        w[at] = 0
        return []

    def event(self, network: Network, given: Given) -> list[Fresh]:
        fresh: list[Fresh] = []
        for place, w in network.values.items():
            if place[0] == "bias":
                continue
            before = self.there[place]
            worth = self.worth(place, given)
            exchanged = int(self.share() * len(before) + 1e-9)
            chance = given.uniform(f"{parameter(place)}/drop", w.shape)
            after = set(sorted(before, key=lambda at, w=w, c=chance: (abs(w[at]), -c[at]))[exchanged:])
            chance = given.uniform(f"{parameter(place)}/grow", w.shape)
            absent = [at for at in np.ndindex(w.shape) if at not in after]
            after |= set(sorted(absent, key=lambda at, v=worth, c=chance: (-v[at], c[at]))[:exchanged])
            for at in np.ndindex(w.shape):
                if at not in before or at not in after:
                    w[at] = 0
            fresh += [(*place, at) for at in after - before]
            self.there[place] = after
        return fresh


class RigL(SET):
    """The same with the largest gradients, of fewer and fewer weights."""

    def worth(self, place: Place, given: Given) -> np.ndarray:
        return np.abs(self.slope[place])

    def share(self) -> float:
        if self.s.until is None:
            return float(self.s.drop)
        return float(self.s.drop / 2 * (1 + math.cos(math.pi * self.steps / self.s.until)))


class ReplacesUnits:
    """What is done to a unit once it has been chosen."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings
        self.widths = [len(network.values["bias", depth]) for depth in range(network.depth - 1)]
        self.kept = {place: w.copy() for place, w in network.values.items()}
        self.steps = 0

    def remember(self, network: Network) -> None:
        """Keep the weights of step ``rewind_to``."""
        self.steps += 1
        if self.steps == self.s.rewind_to:
            self.kept = {place: w.copy() for place, w in network.values.items()}

    def replace(self, network: Network, layer: int, units: Sequence[int], useful: int | None, given: Given) -> None:
        """Re-initialise units of a layer, all at once; ``useful`` is the unit that is split."""
        incoming, outgoing = network.values["weight", layer], network.values["weight", layer + 1]
        bias = network.values["bias", layer]
        fresh = network.fresh(("weight", layer), given)
        how = "resample" if self.s.reinitialise == "split" and useful is None else self.s.reinitialise
        others = np.array([incoming[i] for i in range(len(incoming)) if i not in units])
        length = np.mean([np.linalg.norm(row) for row in (others if len(others) else incoming)])
        share = np.zeros(0) if useful is None else outgoing[:, useful] / (1 + len(units))
        for j in units:
            bias[j] = 0
            outgoing[:, j] = 0
            if how == "resample":
                incoming[j] = fresh[j]
            elif how == "rewind":
                incoming[j] = self.kept["weight", layer][j]
                bias[j] = self.kept["bias", layer][j]
            elif how == "orthogonal":
                row = given.normal(("weight", layer), incoming.shape)[j]
                if len(others) > 0 and np.linalg.matrix_rank(others) < incoming.shape[1]:
                    row = row - others.T @ np.linalg.lstsq(others.T, row, rcond=None)[0]
                incoming[j] = row / np.linalg.norm(row) * length
            else:
                incoming[j] = incoming[useful]
                bias[j] = bias[useful]
                outgoing[:, j] = share
        if how == "split" and units:
            outgoing[:, useful] = share

    def transfer(self, network: Network, layer: int, j: int, mean: float) -> None:
        """The reader's bias takes over what a unit sends on average."""
        sent = network.values["weight", layer + 1][:, j] * mean
        network.values["bias", layer + 1] = network.values["bias", layer + 1] + sent


def most_useful(units: Sequence[int], mature: Sequence[int], score: Any) -> int | None:
    """The mature unit of the highest score; where none is mature, of them all."""
    among = [j for j in units if j in mature] or units
    return max(among, key=score.__getitem__, default=None)


class ContinualBackprop(ReplacesUnits):
    """Algorithm 1 of the Nature paper, layer by layer, unit by unit; its predecessor and other scores by options."""

    def __init__(self, settings: Any, network: Network) -> None:
        super().__init__(settings, network)
        self.utility = [np.zeros(n) for n in self.widths]
        self.mean = [np.zeros(n) for n in self.widths]
        self.age = [np.zeros(n, dtype=int) for n in self.widths]
        self.count = [0.0 for _ in self.widths]

    def score(self, network: Network, layer: int, j: int, h: np.ndarray, given: Given) -> float:
        incoming, outgoing = network.values["weight", layer][j], network.values["weight", layer + 1][:, j]
        sends, samples = np.abs(outgoing).sum(), len(h)
        weight = 1 - self.s.utility_decay ** self.age[layer][j]
        beyond = np.abs(h[:, j] - self.mean[layer][j] / weight).mean()
        if self.s.utility == "contribution":
            return np.abs(h[:, j]).mean() * sends
        if self.s.utility == "mean_corrected_contribution":
            return beyond * sends
        if self.s.utility == "adaptable_contribution":
            return beyond * sends / np.abs(incoming).mean()
        if self.s.utility == "outgoing_magnitude":
            return sends
        if self.s.utility == "incoming_magnitude":
            return np.abs(incoming).sum()
        if self.s.utility == "activation":
            return np.abs(h[:, j]).mean()
        if self.s.utility == "taylor":
            return sum(abs(h[n, j] * given.signals[layer][n, j]) for n in range(samples))
        if self.s.utility == "fisher":
            return samples / 2 * sum((h[n, j] * given.signals[layer][n, j]) ** 2 for n in range(samples))
        if self.s.utility == "random":
            return float(given.uniform(f"{module(layer)}.utility", (h.shape[1],))[j])
        assert self.s.utility == "exact"
        kept, before = outgoing.copy(), given.loss()
        outgoing[:] = 0
        without = given.loss()
        outgoing[:] = kept
        return without - before

    def step(self, network: Network, hidden: Sequence[np.ndarray], given: Given) -> list[tuple[int, int]]:
        s, replaced = self.s, []
        self.remember(network)
        scores = {}
        for layer, h in enumerate(hidden):
            for j in range(h.shape[1]):
                self.age[layer][j] += 1
                self.mean[layer][j] += (1 - s.utility_decay) * (h[:, j].mean() - self.mean[layer][j])
        for layer, h in enumerate(hidden):
            rank = {}
            eligible = []
            for j in range(h.shape[1]):
                weight = 1 - s.utility_decay ** self.age[layer][j]
                scores[layer, j] = self.score(network, layer, j, h, given)
                decay = 0.0 if s.utility == "random" else s.utility_decay
                self.utility[layer][j] = decay * self.utility[layer][j] + (1 - decay) * scores[layer, j]
                corrected = s.bias_correction and s.utility != "random"
                rank[j] = self.utility[layer][j] / (weight if corrected else 1)
                if self.age[layer][j] > s.maturity_threshold:
                    eligible.append(j)
            if s.accumulate:
                self.count[layer] += s.replacement_rate * len(eligible)
                number = int(self.count[layer])
                self.count[layer] -= number
            else:
                number, left = divmod(s.replacement_rate * len(eligible), 1)
                chance = given.uniform(module(layer), ())
                number = int(number) + int(chance < left)
            chosen = sorted(eligible, key=rank.__getitem__)[:number]
            if s.bias_transfer:
                for j in chosen:
                    mean = self.mean[layer][j] / (1 - s.utility_decay ** self.age[layer][j])
                    self.transfer(network, layer, j, mean)
            staying = [j for j in range(h.shape[1]) if j not in chosen]
            self.replace(network, layer, chosen, most_useful(staying, eligible, rank), given)
            for j in chosen:
                self.utility[layer][j] = self.mean[layer][j] = self.age[layer][j] = 0
                replaced.append((layer, j))
        return replaced


class ReDo(ReplacesUnits):
    """Now and then, units whose score is a small part of their layer's mean are replaced."""

    def __init__(self, settings: Any, network: Network) -> None:
        super().__init__(settings, network)
        self.score = [np.zeros(n) for n in self.widths]
        self.mean = [np.zeros(n) for n in self.widths]
        self.weight = [np.zeros(n) for n in self.widths]

    def instant(self, hidden: Sequence[np.ndarray], given: Given) -> list[np.ndarray]:
        return [np.abs(h).mean(0) for h in hidden]

    def step(self, network: Network, hidden: Sequence[np.ndarray], given: Given) -> list[tuple[int, int]]:
        self.remember(network)
        decay = self.s.score_decay
        for layer, score in enumerate(self.instant(hidden, given)):
            self.score[layer] = decay * self.score[layer] + (1 - decay) * score
            self.mean[layer] = decay * self.mean[layer] + (1 - decay) * hidden[layer].mean(0)
            self.weight[layer] = decay * self.weight[layer] + (1 - decay)
        return []

    def event(self, network: Network, given: Given) -> list[Fresh]:
        replaced: list[Fresh] = []
        for layer, total in enumerate(self.score):
            score = total / self.weight[layer]
            chosen = [j for j in range(len(score)) if score[j] <= self.s.threshold * score.mean()]
            staying = [j for j in range(len(score)) if j not in chosen]
            if self.s.bias_transfer:
                for j in chosen:
                    self.transfer(network, layer, j, self.mean[layer][j] / self.weight[layer][j])
            self.replace(network, layer, chosen, most_useful(staying, staying, score), given)
            for j in chosen:
                self.score[layer][j] = self.mean[layer][j] = self.weight[layer][j] = 0
                replaced.append((layer, j))
        return replaced


class ReGraMa(ReDo):
    """ReDo by the size of the gradient that reaches a unit."""

    def instant(self, hidden: Sequence[np.ndarray], given: Given) -> list[np.ndarray]:
        return [np.abs(g).mean(0) for g in given.signals]


class SelfNormalizedResets(ReplacesUnits):
    """A unit that has not fired for far longer than it usually takes is replaced."""

    def __init__(self, settings: Any, network: Network) -> None:
        super().__init__(settings, network)
        self.age = [[0] * n for n in self.widths]
        self.gaps: list[list[list[int]]] = [[[] for _ in range(n)] for n in self.widths]
        powers = [round(1.2**i) for i in range(100)]
        self.edges = sorted({edge for edge in powers if edge <= settings.max_age} | {settings.max_age})

    def step(self, network: Network, hidden: Sequence[np.ndarray], given: Given) -> list[tuple[int, int]]:
        self.remember(network)
        replaced = []
        for layer, h in enumerate(hidden):
            chosen = []
            for j in range(h.shape[1]):
                if (h[:, j] > 0).any():
                    self.gaps[layer][j].append(self.age[layer][j])
                    self.age[layer][j] = 0
                else:
                    self.age[layer][j] += 1
                gaps = self.gaps[layer][j]
                threshold = self.s.max_age
                if len(gaps) >= self.s.minimum:
                    wanted = self.s.quantile * len(gaps)
                    threshold = next(edge for edge in self.edges if sum(gap <= edge for gap in gaps) >= wanted)
                if self.age[layer][j] > threshold:
                    chosen.append(j)
            if self.s.bias_transfer:
                for j in chosen:
                    self.transfer(network, layer, j, h[:, j].mean())
            staying = [j for j in range(h.shape[1]) if j not in chosen]
            self.replace(network, layer, chosen, most_useful(staying, staying, np.abs(h).mean(0)), given)
            for j in chosen:
                self.gaps[layer][j], self.age[layer][j] = [], 0
                replaced.append((layer, j))
        return replaced


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A method's second statement, and the settings under which the two are compared."""

    statement: Callable[[Any, Network], Any]
    """Made of (settings, network). A rule has ``step(network, grads, given)``, ``forget(place, where)`` and, if it
    keeps anything by unit, ``forget_unit(layer, unit)``; an intervention has ``step(network, hidden, given) ->
    [(layer, unit) replaced]`` and, if it has events, ``event(network, given) -> [(layer, unit), place or (*place, index
    of a weight) made anew]``; a regulariser has ``slope(network)``. A rule that forgets less of a single weight than of
    a row has ``forget_single(place, index)``."""
    rows: Mapping[str, Mapping[str, Any]]
    """Label -> hyper-parameters. For an intervention ``rule`` may name the rule it follows; else plain SGD."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """More rows, there for their numbers: they are compared over 20 steps of three samples, and what else holds of
    every row is tested of them by ``make test-slow``."""
    like: str | None = None
    """A rule whose compiled step resembles this one's: this one's is compiled by ``make test-slow`` alone."""
    compiled: Sequence[str] = ()
    """Labels of the variants that are compiled there too."""


_OFTEN = {"replacement_rate": 0.05, "maturity_threshold": 5, "utility_decay": 0.9}
_EARLIER = {"utility": "adaptable_contribution", "bias_correction": True, "bias_transfer": True}

_AT_ONCE = {"shrink": 0.6, "noise_std": 0.1, "when": "task"}
_GATED = {"lr": 0.02, "utility_decay": 0.95, "noise_std": 0.1}
_UPGD = ("upgd", _GATED)
_FEATURE = _GATED | {"granularity": "feature"}
_MOMENTS = {"lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-2, "utility_decay": 0.95, "noise_std": 0.1}
_ANCHORED = {"lr": 0.02, "strength": 2.0, "importance_decay": 0.9, "anchor_decay": 0.95}
_TRAVELLED = _ANCHORED | {"strength": 0.1, "eps": 1e-2}
_MOMENTUM = ("sgd", {"lr": 0.005, "momentum": 0.9})
_DECAYING = ("sgd", {"lr": 0.005, "momentum": 0.9, "weight_decay": 0.1})
_DECAYING_ADAM = ("adam", {"lr": 0.01, "weight_decay": 0.1, "decoupled": True})
_AVERAGED = {"threshold": 0.6, "every": 10, "score_decay": 0.9}

REFERENCES: dict[str, Reference] = {
    "sgd": Reference(
        SGD,
        {
            "plain": {"lr": 0.02},
            "momentum": {"lr": 0.005, "momentum": 0.9},
            "l2": {"lr": 0.02, "weight_decay": 0.1},
            "momentum and l2": {"lr": 0.005, "momentum": 0.8, "weight_decay": 0.1},
        },
    ),
    "adam": Reference(
        Adam,
        {
            "plain": {"lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3},
            "l2": {"lr": 0.01, "weight_decay": 0.1},
            "decoupled": {"lr": 0.01, "weight_decay": 0.5, "decoupled": True},
        },
    ),
    "upgd": Reference(
        UPGD,
        {
            "protecting": _GATED,
            "weight decay": {"lr": 0.02, "utility_decay": 0.999, "noise_std": 0.01, "weight_decay": 0.3},
            "feature": _FEATURE,
        },
        {
            "no memory": _GATED | {"utility_decay": 0.0},
            "not protecting": _GATED | {"protect": False},
            "local": _GATED | {"scope": "local"},
            "second order": _GATED | {"order": 2},
            "second order, local, doubled": _GATED | {"order": 2, "scope": "local", "doubled": True},
            "exact": _GATED | {"order": "exact"},
            "gated output": _GATED | {"gated": "output"},
            "gated output, local, doubled": _GATED | {"gated": "output", "scope": "local", "doubled": True},
            "doubled, weight decay": _GATED | {"doubled": True, "weight_decay": 0.3},
            "feature, local, weight decay": _FEATURE | {"scope": "local", "weight_decay": 0.3},
            "feature, not protecting": _FEATURE | {"protect": False},
            "feature, second order, doubled": _FEATURE | {"order": 2, "doubled": True},
            "feature, exact": _FEATURE | {"order": "exact"},
        },
        compiled=(
            "second order, local, doubled",
            "exact",
            "gated output",
            "feature, local, weight decay",
            "feature, second order, doubled",
            "feature, exact",
        ),
    ),
    "ada_upgd": Reference(
        AdaUPGD,
        {"plain": _MOMENTS},
        {
            "not doubled, weight decay": _MOMENTS | {"doubled": False, "weight_decay": 0.3},
            "feature": _MOMENTS | {"granularity": "feature"},
            "feature, not doubled": _MOMENTS | {"granularity": "feature", "doubled": False},
            "not protecting": _MOMENTS | {"protect": False},
            "second order, local": _MOMENTS | {"order": 2, "scope": "local"},
        },
        like="upgd",
        compiled=("feature",),
    ),
    "pgd": Reference(PGD, {"shrinking": {"lr": 0.02, "noise_std": 0.1, "weight_decay": 0.3}}, like="upgd"),
    "ewc": Reference(EWC, {"plain": _ANCHORED | {"strength": 0.2}}, like="rwalk"),
    "mas": Reference(MAS, {"plain": _ANCHORED}, like="rwalk"),
    # these two strong enough that some weights go up their gradient: a negative importance, and a score's maximum of 0
    "synaptic_intelligence": Reference(
        SynapticIntelligence,
        {"plain": _TRAVELLED | {"strength": 0.5, "importance_decay": 0.3, "eps": 1e-3}},
        like="rwalk",
    ),
    "rwalk": Reference(RWalk, {"plain": _TRAVELLED | {"strength": 0.5}}),
    "l2_init": Reference(
        L2Init,
        {
            "decoupled": {"rate": 0.05},
            "coupled": {"rate": 0.5, "coupled": True},
            "coupled, in adam": {"rate": 0.5, "coupled": True, "rule": ("adam", {"lr": 0.01})},
        },
    ),
    "l1_init": Reference(
        L1Init,
        {
            "decoupled": {"rate": 0.002},
            "coupled": {"rate": 0.05, "coupled": True},
            "decoupled, after adam": {"rate": 0.002, "rule": ("adam", {"lr": 0.01})},
        },
    ),
    "wasserstein_init": Reference(
        WassersteinInit, {"decoupled": {"rate": 0.05}, "coupled": {"rate": 0.5, "coupled": True}}
    ),
    "parseval": Reference(
        Parseval,
        {
            "decoupled": {"rate": 0.01, "scale": 0.8},
            "coupled": {"rate": 0.1, "scale": 1.2, "coupled": True},
        },
    ),
    "spectral_regularisation": Reference(
        SpectralRegularisation,
        {
            "decoupled": {"rate": 0.005},
            "coupled": {"rate": 0.1, "coupled": True},
            "power 1, in adam": {"rate": 0.1, "coupled": True, "power": 1, "rule": ("adam", {"lr": 0.01})},
        },
    ),
    "weight_clipping": Reference(
        WeightClipping, {"plain": {"kappa": 1.2}, "after momentum": {"kappa": 1.0, "rule": _MOMENTUM}}
    ),
    "shrink_and_perturb": Reference(
        ShrinkAndPerturb,
        {
            "perturb": {"noise_std": 0.01},
            "both, after adam": {"shrink": 0.01, "noise_std": 0.01, "rule": ("adam", {"lr": 0.01})},
            "toward a fresh draw": {"shrink": 0.05, "noise_std": 0.05, "perturb": "fresh"},
            "toward the start": {"shrink": 0.05, "noise_std": 0.05, "perturb": "initial"},
            "fresh, at a task": {
                "shrink": 0.6,
                "noise_std": 0.3,
                "perturb": "fresh",
                "when": "task",
                "rule": _MOMENTUM,
            },
            "normal, at a task": _AT_ONCE,
        },
    ),
    "normalize_and_project": Reference(
        NormalizeAndProject, {"plain": {"strength": 1.0}, "part of the way": {"strength": 0.1, "rule": _MOMENTUM}}
    ),
    "reset_layers": Reference(
        ResetLayers,
        {
            "the head": {"every": 10, "rule": _MOMENTUM},
            "two layers": {"last": 2, "every": 10, "rule": ("adam", {"lr": 0.01})},
            "everything, at a task": {"last": None, "rule": _MOMENTUM},
            "the head to zero, at a task": {"values": "zero", "rule": _MOMENTUM},
            "two layers to zero": {"values": "zero", "last": 2, "every": 10, "rule": _MOMENTUM},
            "everything, after feature upgd": {
                "last": None,
                "every": 10,
                "rule": ("upgd", {"lr": 0.02, "utility_decay": 0.9, "granularity": "feature"}),
            },
        },
    ),
    "hare_and_tortoise": Reference(
        HareAndTortoise,
        {
            "plain": {"decay": 0.9, "every": 10},
            "slower, after momentum": {"decay": 0.98, "every": 25, "rule": _MOMENTUM},
        },
    ),
    "dash": Reference(
        DASH,
        {
            "plain": {"floor": 0.3, "decay": 0.9, "every": 10},
            "at a task": {"floor": 0.1, "decay": 0.5, "rule": _MOMENTUM},
        },
    ),
    "fire": Reference(
        FIRE,
        {
            "plain": {"every": 10, "rule": _MOMENTUM},
            "at a task, three iterations": {"iterations": 3, "rule": ("adam", {"lr": 0.01})},
        },
    ),
    "redo": Reference(
        ReDo,
        {
            "plain": {"threshold": 0.9, "every": 10, "rule": _MOMENTUM},
            "averaged, after adam": _AVERAGED | {"rule": ("adam", {"lr": 0.01})},
            "rarely": {"threshold": 0.6, "every": 25, "score_decay": 0.5},
            "rewind to step 15": _AVERAGED | {"reinitialise": "rewind", "rewind_to": 15},
            "bias transfer": _AVERAGED | {"bias_transfer": True},
            "orthogonal": _AVERAGED | {"threshold": 0.4, "reinitialise": "orthogonal"},
            "split": _AVERAGED | {"reinitialise": "split"},
        },
    ),
    "regrama": Reference(
        ReGraMa,
        {
            "plain": {"threshold": 0.9, "every": 10, "rule": _MOMENTUM},
            "averaged": _AVERAGED,
            "split, bias transfer": _AVERAGED | {"reinitialise": "split", "bias_transfer": True},
        },
    ),
    "self_normalized_resets": Reference(
        SelfNormalizedResets,
        {
            "plain": {"quantile": 0.8, "max_age": 20, "minimum": 6.0, "rule": _MOMENTUM},
            "after adam": {"quantile": 0.9, "max_age": 10, "minimum": 4.0, "rule": ("adam", {"lr": 0.01})},
            "rewind, bias transfer": {
                "quantile": 0.7,
                "max_age": 12,
                "minimum": 5.0,
                "reinitialise": "rewind",
                "bias_transfer": True,
            },
        },
    ),
    "set": Reference(
        SET,
        {"plain": {"density": 0.6, "drop": 0.4, "every": 10, "rule": _MOMENTUM}},
        {"uniform, at a task": {"density": 0.5, "distribution": "uniform", "every": None, "rule": _DECAYING_ADAM}},
    ),
    "rigl": Reference(
        RigL,
        {"plain": {"density": 0.6, "drop": 0.4, "every": 10, "until": 150, "rule": _DECAYING}},
        {
            "after adam": {"density": 0.4, "every": 5, "until": 100, "rule": _DECAYING_ADAM},
            "for ever, at a task": {"density": 0.5, "distribution": "er", "every": None, "until": None},
        },
        compiled=("after adam",),
    ),
    "continual_backprop": Reference(
        ContinualBackprop,
        {
            "nature": _OFTEN,
            "earlier form": _OFTEN | _EARLIER,
            "mean-corrected": _OFTEN | {"utility": "mean_corrected_contribution"},
            "bernoulli": _OFTEN | {"accumulate": False},
            "several at once": _OFTEN | {"replacement_rate": 0.6},
            "after adam": _OFTEN | {"rule": ("adam", {"lr": 0.01, "beta2": 0.95})},
            "after momentum, earlier form": _OFTEN | _EARLIER | {"rule": ("sgd", {"lr": 0.005, "momentum": 0.9})},
            **{
                f"by {utility.replace('_', ' ')}": _OFTEN | {"utility": utility}
                for utility in (
                    "incoming_magnitude",
                    "activation",
                    "taylor",
                    "fisher",
                    "exact",
                )
            },
            "by outgoing magnitude": {
                "replacement_rate": 0.05,
                "maturity_threshold": 5,
                "utility": "outgoing_magnitude",
            },
            "by random": {"replacement_rate": 0.05, "maturity_threshold": 5, "utility": "random"},
            "rewind": _OFTEN | {"reinitialise": "rewind"},
            "rewind to step 20": _OFTEN | {"reinitialise": "rewind", "rewind_to": 20},
            # after noise: a row orthogonal to rows with zeros has numbers that are zero but for rounding, which a ReLU
            # takes for positive or not
            "orthogonal, after upgd": _OFTEN | {"reinitialise": "orthogonal", "rule": _UPGD},
            "split": _OFTEN | {"reinitialise": "split"},
            "after upgd": _OFTEN | {"rule": _UPGD},
        },
        {
            "after feature upgd": _OFTEN | {"rule": ("upgd", _FEATURE)},
            "after feature upgd, second order": _OFTEN | {"rule": ("upgd", _FEATURE | {"order": 2, "scope": "local"})},
            "after ada_upgd": _OFTEN | {"rule": ("ada_upgd", _MOMENTS)},
            "after feature ada_upgd": _OFTEN | {"rule": ("ada_upgd", _MOMENTS | {"granularity": "feature"})},
            "after ewc": _OFTEN | {"rule": ("ewc", _ANCHORED | {"strength": 0.2})},
            "after mas": _OFTEN | {"rule": ("mas", _ANCHORED)},
            "after synaptic intelligence": _OFTEN | {"rule": ("synaptic_intelligence", _TRAVELLED)},
            "after rwalk": _OFTEN | {"rule": ("rwalk", _TRAVELLED)},
        },
    ),
}


@dataclass(frozen=True)
class Case:
    """One row of the table with its method: what a lane is made of."""

    method: type[Method]
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    variant: bool = False

    def __str__(self) -> str:
        return f"{self.method.name}: {self.label}"

    def made(self, **changes: Any) -> tuple[Rule, tuple[Any, ...]]:
        """The rule and the interventions of a lane, with some of the method's settings changed."""
        own = {k: v for k, v in self.settings.items() if k != "rule"} | changes
        if issubclass(self.method, Rule):
            return self.method(**own), ()
        name, numbers = self.settings.get("rule", ("sgd", {"lr": 0.02}))
        rule = next(m for m in REGISTRY if m.name == name)(**numbers)
        assert isinstance(rule, Rule)
        return rule, (self.method(**own),)

    def lane(self, seed: int, **changes: Any) -> Lane:
        return Lane(seed, *self.made(**changes))

    def until_events(self, usual: int) -> int:
        """The usual number of steps, or enough of them for an event to fall due."""
        first = next((n for n in range(1, 101) for m in self.made()[1] if m.due(n, n % Table().task_length() == 0)), 0)
        return max(usual, first + 5 if first else 0)


def cases(variants: bool = False) -> list[Case]:
    """Every row of every registered method, and the variants if told; a method without rows is tested with its
    defaults."""
    found = []
    for method in REGISTRY:
        if method.name not in REFERENCES:
            found.append(Case(method, "defaults"))
            continue
        reference = REFERENCES[method.name]
        found += [Case(method, label, settings) for label, settings in reference.rows.items()]
        if variants:
            found += [Case(method, label, settings, variant=True) for label, settings in reference.variants.items()]
    return found


# --- lanes of the table's network -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table(Stream):
    """A stream for tests: numbers drawn by NumPy once a seed, read row by row."""

    name = "table"
    task = "regression"
    inputs = SIZES[0]
    outputs = SIZES[-1]

    batch: int = 1

    def task_length(self) -> int:
        return 50

    def rows(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs [steps, batch, inputs] and targets [steps, batch, outputs] of one seed, float32."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((512, self.batch, self.inputs)).astype(np.float32)
        return x, rng.standard_normal((512, self.batch, self.outputs)).astype(np.float32)

    def open(self, seeds: Sequence[int], device: torch.device) -> _Feed:
        return _Feed(*(torch.tensor(np.stack(t, -1), device=device) for t in zip(*map(self.rows, seeds), strict=True)))


@dataclass
class _Feed:
    x: torch.Tensor
    y: torch.Tensor

    def examples(self, start: int, count: int) -> Examples:
        return Examples(self.x[start : start + count], self.y[start : start + count])

    def probe(self, step: int, size: int) -> torch.Tensor:
        return self.x[:size, 0]


def populate(
    lanes: Sequence[Lane], stream: Stream | None = None, hidden: tuple[int, ...] = SIZES[1:-1], **settings: Any
) -> Population:
    """A population of the table's network: float64 and uncompiled unless told."""
    stream = stream or Table()
    settings = {"dtype": torch.float64, "compiled": False} | settings
    return Population(lambda: MLP(hidden=hidden).build(stream.inputs, stream.outputs), stream, lanes, **settings)


def lane(population: Population, number: int) -> LaneState:
    """A copy of what one lane carries."""
    return pytree.tree_map(lambda t: t[..., number].clone(), population.state)


def same(left: Any, right: Any, rtol: float | None = None) -> None:
    """Two states are equal, every bit of every tensor; with ``rtol`` nearly so."""
    ours, theirs = pytree.tree_flatten_with_path(left)[0], pytree.tree_flatten_with_path(right)[0]
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        where = f"state{pytree.keystr(path)}"
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        if rtol is None or not a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, w=where: f"{w}: {m}")
        else:
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * 1e-2, msg=lambda m, w=where: f"{w}: {m}")


class Replay:
    """A lane of the table's network in NumPy."""

    def __init__(self, lane: Lane, stream: Table, start: LaneState) -> None:
        depths = range(len(SIZES) - 1)
        self.network = Network(
            [start.params[parameter(("weight", d))].numpy() for d in depths],
            [start.params[parameter(("bias", d))].numpy() for d in depths],
        )
        self.seed, self.time = lane.seed, 0
        self.x, self.y = stream.rows(lane.seed)
        self.rule = REFERENCES[lane.rule.name].statement(lane.rule, self.network)
        self.scope = lane.rule.name
        self.methods = lane.interventions
        self.interventions = [REFERENCES[m.name].statement(m, self.network) for m in lane.interventions]
        self.task_length = stream.task_length()

    def step(self) -> tuple[float, list[tuple[int, int]]]:
        """The loss, and the hidden units replaced as (layer, unit)."""
        x, y = self.x[self.time].astype(np.float64), self.y[self.time].astype(np.float64)
        learned = self.network.learn(x, y)
        for method, intervention in zip(self.methods, self.interventions, strict=True):
            if getattr(method, "coupled", False):
                for place, slope in intervention.slope(self.network).items():
                    learned.grads[place] = learned.grads[place] + method.rate * slope
        given = Given(
            self.seed,
            self.time,
            self.scope,
            learned.grads,
            learned.signals,
            learned.hidden,
            lambda silent=None: self.network.loss(x, y, silent),
            lambda: self.network.curvature(x),
        )
        self.rule.step(self.network, learned.grads, given)
        replaced: list[tuple[int, int]] = []
        for method, intervention in zip(self.methods, self.interventions, strict=True):
            own = dataclasses.replace(given, scope=method.name)
            replaced += self._forget(intervention.step(self.network, learned.hidden, own))
        self.time += 1
        for method, intervention in zip(self.methods, self.interventions, strict=True):
            if method.due(self.time, self.time % self.task_length == 0):
                own = Given(self.seed, self.time - 1, method.name)
                replaced += self._forget(intervention.event(self.network, own))
        return learned.loss, sorted(replaced)

    def _forget(self, made: Sequence[Fresh]) -> list[tuple[int, int]]:
        """Fresh weights get a fresh state of the rule; says which of what was made anew are units."""
        for place, where, *single in made:
            if single:
                getattr(self.rule, "forget_single", self.rule.forget)((place, where), single[0])
            elif isinstance(place, str):
                self.rule.forget((place, where), ...)
                if place == "weight" and hasattr(self.rule, "forget_unit"):
                    self.rule.forget_unit(where, ...)  # a layer made anew is made of new units
            else:
                for one, at in self.network.of_unit(place, where):
                    self.rule.forget(one, at)
                if hasattr(self.rule, "forget_unit"):
                    self.rule.forget_unit(place, where)
        return [one for one in made if not isinstance(one[0], str)]


def whole_fields(method: type[Method]) -> list[dataclasses.Field[Any]]:
    """The settings that are whole numbers, the same for all lanes."""
    return [f for f in dataclasses.fields(method) if "whole_low" in f.metadata]


def scalar_fields(method: type[Method]) -> list[dataclasses.Field[Any]]:
    """The settings that are numbers."""
    return [f for f in dataclasses.fields(method) if f.name in method.scalars()]
