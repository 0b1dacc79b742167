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


# --- the network and its gradient -----------------------------------------------------------------------------------


class Network:
    """A ReLU network with a linear output; the loss is the squared error summed over outputs, averaged over samples."""

    def __init__(self, weights: Sequence[np.ndarray], biases: Sequence[np.ndarray]) -> None:
        self.values: dict[Place, np.ndarray] = {}
        for depth, (w, b) in enumerate(zip(weights, biases, strict=True)):
            self.values["weight", depth] = w.astype(np.float64)
            self.values["bias", depth] = b.astype(np.float64)
        self.depth = len(weights)

    def hidden(self, x: np.ndarray) -> list[np.ndarray]:
        """The activations of each hidden layer for one sample, then the output."""
        found = []
        for depth in range(self.depth):
            x = self.values["weight", depth] @ x + self.values["bias", depth]
            if depth < self.depth - 1:
                x = np.maximum(x, 0)
            found.append(x)
        return found

    def learn(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[float, dict[Place, np.ndarray], list[np.ndarray]]:
        """Loss, gradient, and the activations [samples, units] of every hidden layer."""
        loss = 0.0
        grads = {place: np.zeros_like(v) for place, v in self.values.items()}
        seen: list[list[np.ndarray]] = [[] for _ in range(self.depth - 1)]
        for x, y in zip(inputs, targets, strict=True):
            layers = self.hidden(x)
            loss += float(((layers[-1] - y) ** 2).sum()) / len(inputs)
            signal = 2 * (layers[-1] - y) / len(inputs)
            for depth in reversed(range(self.depth)):
                below = x if depth == 0 else layers[depth - 1]
                grads["weight", depth] += np.outer(signal, below)
                grads["bias", depth] += signal
                if depth > 0:
                    signal = (self.values["weight", depth].T @ signal) * (below > 0)
            for depth in range(self.depth - 1):
                seen[depth].append(layers[depth])
        return loss, grads, [np.array(h) for h in seen]

    def of_unit(self, layer: int, unit: int) -> list[tuple[Place, Any]]:
        """Where the weights of a hidden unit lie: its row, its bias, its column in the next layer."""
        return [
            (("weight", layer), np.s_[unit, :]),
            (("bias", layer), np.s_[unit]),
            (("weight", layer + 1), np.s_[:, unit]),
        ]


@dataclass
class Given:
    """The random numbers of one step of one lane, taken from the library as they are."""

    seed: int
    step: int
    scope: str

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
                self.time[place][at] += 1
                self.mean[place][at] += (1 - s.beta1) * (g - self.mean[place][at])
                self.square[place][at] += (1 - s.beta2) * (g**2 - self.square[place][at])
                mean = self.mean[place][at] / (1 - s.beta1 ** self.time[place][at])
                square = self.square[place][at] / (1 - s.beta2 ** self.time[place][at])
                w[at] -= s.lr * mean / (math.sqrt(square) + s.eps)

    def forget(self, place: Place, where: Any) -> None:
        for table in (self.mean, self.square, self.time):
            table[place][where] = 0


class UPGD:
    """Elsayed and Mahmood's Algorithm 1 with decoupled decay: one maximum, of the corrected utilities, over layers."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings
        self.utility = {place: np.zeros_like(w) for place, w in network.values.items()}
        self.time = {place: np.zeros_like(w) for place, w in network.values.items()}

    def step(self, network: Network, grads: Mapping[Place, np.ndarray], given: Given) -> None:
        s = self.s
        corrected = {}
        for place, w in network.values.items():
            self.time[place] += 1
            self.utility[place] = s.utility_decay * self.utility[place] - (1 - s.utility_decay) * grads[place] * w
            corrected[place] = self.utility[place] / (1 - s.utility_decay ** self.time[place])
        highest = max(float(u.max()) for u in corrected.values())
        for place, w in network.values.items():
            xi = given.normal(place, w.shape)
            for at in np.ndindex(w.shape):
                if highest > 0:
                    gate = 1 / (1 + math.exp(-corrected[place][at] / highest))
                else:  # nothing is useful: the worst learn freely
                    gate = 0.5 if corrected[place][at] == 0 else 0.0
                update = (grads[place][at] + s.noise_std * xi[at]) * (1 - gate)
                w[at] = (1 - s.lr * s.weight_decay) * w[at] - s.lr * update

    def forget(self, place: Place, where: Any) -> None:
        self.utility[place][where] = 0
        self.time[place][where] = 0


# --- interventions --------------------------------------------------------------------------------------------------


class ShrinkAndPerturb:
    """w <- (1 - s) w + sigma xi."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings

    def step(self, network: Network, hidden: Sequence[np.ndarray], given: Given) -> list[tuple[int, int]]:
        for place, w in network.values.items():
            network.values[place] = w * (1 - self.s.shrink) + self.s.noise_std * given.normal(place, w.shape)
        return []


class ContinualBackprop:
    """Algorithm 1 of the Nature paper, layer by layer, unit by unit; its predecessor by options."""

    def __init__(self, settings: Any, network: Network) -> None:
        self.s = settings
        widths = [len(network.values["bias", depth]) for depth in range(network.depth - 1)]
        self.utility = [np.zeros(n) for n in widths]
        self.mean = [np.zeros(n) for n in widths]
        self.age = [np.zeros(n, dtype=int) for n in widths]
        self.count = [0.0 for _ in widths]

    def step(self, network: Network, hidden: Sequence[np.ndarray], given: Given) -> list[tuple[int, int]]:
        s, replaced = self.s, []
        for layer, h in enumerate(hidden):
            incoming, outgoing = network.values["weight", layer], network.values["weight", layer + 1]
            rank = {}
            eligible = []
            for j in range(h.shape[1]):
                self.age[layer][j] += 1
                weight = 1 - s.utility_decay ** self.age[layer][j]
                self.mean[layer][j] += (1 - s.utility_decay) * (h[:, j].mean() - self.mean[layer][j])
                if s.utility == "contribution":
                    score = np.abs(h[:, j]).mean() * np.abs(outgoing[:, j]).sum()
                else:
                    beyond = np.abs(h[:, j] - self.mean[layer][j] / weight).mean()
                    score = beyond * np.abs(outgoing[:, j]).sum()
                if s.utility == "adaptable_contribution":
                    score /= np.abs(incoming[j]).mean()
                self.utility[layer][j] = s.utility_decay * self.utility[layer][j] + (1 - s.utility_decay) * score
                rank[j] = self.utility[layer][j] / (weight if s.bias_correction else 1)
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
            for j in sorted(eligible, key=rank.__getitem__)[:number]:
                self._replace(network, layer, j, given)
                replaced.append((layer, j))
        return replaced

    def _replace(self, network: Network, layer: int, j: int, given: Given) -> None:
        incoming, outgoing = network.values["weight", layer], network.values["weight", layer + 1]
        if self.s.bias_transfer:
            mean = self.mean[layer][j] / (1 - self.s.utility_decay ** self.age[layer][j])
            network.values["bias", layer + 1] = network.values["bias", layer + 1] + outgoing[:, j] * mean
        bound = math.sqrt(6 / incoming.shape[1])  # Kaiming uniform for ReLU
        incoming[j] = bound * (2 * given.uniform(parameter(("weight", layer)), incoming.shape)[j] - 1)
        network.values["bias", layer][j] = 0
        outgoing[:, j] = 0
        self.utility[layer][j] = self.mean[layer][j] = self.age[layer][j] = 0


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A method's second statement, and the settings under which the two are compared."""

    statement: Callable[[Any, Network], Any]
    """Made of (settings, network); a rule has ``step(network, grads, given)`` and ``forget(place, where)``, an
    intervention ``step(network, hidden, given) -> [(layer, unit) replaced]``."""
    rows: Mapping[str, Mapping[str, Any]]
    """Label -> hyper-parameters. For an intervention ``rule`` may name the rule it follows; else plain SGD."""


_OFTEN = {"replacement_rate": 0.05, "maturity_threshold": 5, "utility_decay": 0.9}
_EARLIER = {"utility": "adaptable_contribution", "bias_correction": True, "bias_transfer": True}

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
            "protecting": {"lr": 0.02, "utility_decay": 0.95, "noise_std": 0.1},
            "weight decay": {"lr": 0.02, "utility_decay": 0.999, "noise_std": 0.01, "weight_decay": 0.3},
            "no memory": {"lr": 0.02, "utility_decay": 0.0, "noise_std": 0.1},
        },
    ),
    "shrink_and_perturb": Reference(
        ShrinkAndPerturb,
        {
            "perturb": {"noise_std": 0.01},
            "both, after adam": {"shrink": 0.01, "noise_std": 0.01, "rule": ("adam", {"lr": 0.01})},
        },
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
            "after upgd": _OFTEN | {"rule": ("upgd", {"lr": 0.02, "utility_decay": 0.95, "noise_std": 0.1})},
        },
    ),
}


@dataclass(frozen=True)
class Case:
    """One row of the table with its method: what a lane is made of."""

    method: type[Method]
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)

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


def cases() -> list[Case]:
    """Every row of every registered method; a method without rows is tested with its defaults."""
    found = []
    for method in REGISTRY:
        rows = REFERENCES[method.name].rows if method.name in REFERENCES else {"defaults": {}}
        found += [Case(method, label, settings) for label, settings in rows.items()]
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
        self.interventions = [(m.name, REFERENCES[m.name].statement(m, self.network)) for m in lane.interventions]

    def step(self) -> tuple[float, list[tuple[int, int]]]:
        """The loss, and the hidden units replaced as (layer, unit)."""
        x, y = self.x[self.time].astype(np.float64), self.y[self.time].astype(np.float64)
        loss, grads, hidden = self.network.learn(x, y)
        self.rule.step(self.network, grads, Given(self.seed, self.time, self.scope))
        replaced = []
        for name, intervention in self.interventions:
            fresh = intervention.step(self.network, hidden, Given(self.seed, self.time, name))
            for layer, unit in fresh:
                for place, where in self.network.of_unit(layer, unit):
                    self.rule.forget(place, where)
            replaced += fresh
        self.time += 1
        return loss, sorted(replaced)


def scalar_fields(method: type[Method]) -> list[dataclasses.Field[Any]]:
    """The settings that are numbers."""
    return [f for f in dataclasses.fields(method) if f.name in method.scalars()]
