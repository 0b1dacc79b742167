"""Steps a second, beside the papers' own code in the same run.

    python benchmarks/against_authors.py --plasticity PATH --upgd PATH

The paths are checkouts of shibhansh/loss-of-plasticity and mohmdelsayed/upgd; without them only our side is measured.
The two sides run in turn, several rounds; the table shows the median round of each and the median of the ratios, which
hold on a noisy machine where single numbers do not.

A step is a lane's update; of the ant, a step of the environment with its share of the agent's training. The ant needs
the extra ``rl``. Its authors' side is their agent and PPO on gymnasium's Ant-v5, since the old gym that their script
wants no longer installs. Their ResNet imports a function from torchvision, which reports that it is used; an empty one
stands in.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from perennial import (
    MLP,
    SGD,
    UPGD,
    Adam,
    ContinualBackprop,
    Lane,
    Population,
    ResetLayers,
    SlowlyChangingRegression,
    attach,
)
from perennial.networks import ConvNet, UPGDConvNet
from perennial.resnet import ResNet18
from perennial.streams import ChangingAverage, Examples, Stream

BATCH = 90
"""Images a step of the ResNet."""


@dataclass(frozen=True)
class RandomImages(Stream):
    """Random images; the time of a step does not depend on what is in them."""

    name = "random_images"
    task = "classification"
    inputs: int = 784  # type: ignore[misc]
    outputs: int = 10  # type: ignore[misc]
    input_shape: tuple[int, ...] = (784,)  # type: ignore[misc]
    batch_size: int = 1

    def task_length(self) -> int:
        return 5000

    def open(self, seeds: Sequence[int], device: torch.device) -> RandomFeed:
        return RandomFeed(self, len(seeds))


class RandomFeed:
    """One block of images, over and over."""

    def __init__(self, stream: RandomImages, seeds: int) -> None:
        self.inputs = torch.rand(1000, stream.batch, *stream.input_shape, seeds)
        self.targets = torch.randint(stream.outputs, (1000, stream.batch, seeds))

    def examples(self, start: int, count: int) -> Examples:
        """The first ``count`` images."""
        return Examples(self.inputs[:count], self.targets[:count])

    def probe(self, step: int, size: int) -> torch.Tensor:
        """The first ``size`` images."""
        return self.inputs[:size, 0]


Timed = Callable[[], float]
"""Runs a while and returns lane-steps a second."""


def of_population(population: Population, seconds: float = 1.0) -> Timed:
    """A compiled population."""
    population.advance(1)
    begun = time.perf_counter()
    population.advance(20)
    steps = max(20, int(20 * seconds / (time.perf_counter() - begun)))

    def measure() -> float:
        begun = time.perf_counter()
        population.advance(steps)
        return steps * len(population.lanes) / (time.perf_counter() - begun)

    return measure


def of_calls(step: Callable[[], object], seconds: float = 1.0, steps: int = 1) -> Timed:
    """One call after another, of so many steps each."""
    begun = time.perf_counter()
    for number in range(20):
        step()
        if number and time.perf_counter() - begun > seconds:
            break

    def measure() -> float:
        begun, calls = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            step()
            calls += 1
        return calls * steps / (time.perf_counter() - begun)

    return measure


def regression(lanes: int) -> Population:
    """Slowly-changing regression under continual backpropagation."""
    cbp = ContinualBackprop(replacement_rate=1e-4)
    members = [Lane(seed % 100, SGD(lr=0.01), (cbp,)) for seed in range(lanes)]
    return Population(lambda: MLP(hidden=(5,)).build(20, 1), SlowlyChangingRegression(), members)


def images(hidden: tuple[int, ...], rule: SGD | UPGD, keep: bool) -> Population:
    """One lane on images of MNIST's size."""
    interventions = (ContinualBackprop(replacement_rate=1e-5),) if keep else ()
    return Population(lambda: MLP(hidden=hidden).build(784, 10), RandomImages(), [Lane(0, rule, interventions)])


def authors_regression() -> Timed:
    """Continual backpropagation of shibhansh/loss-of-plasticity on the 20-5-1 network."""
    from lop.algos.cbp import ContinualBackprop as Theirs
    from lop.nets.ffnn import FFNN

    learner = Theirs(
        FFNN(input_size=20, num_features=5, hidden_activation="relu"),
        step_size=0.01,
        replacement_rate=1e-4,
        decay_rate=0.99,
    )
    x, y = (torch.rand(1, 20) > 0.5).float(), torch.randn(1, 1)
    return of_calls(lambda: learner.learn(x, y))


def authors_images(width: int) -> Timed:
    """The same on 784-width-width-width-10."""
    from lop.algos.cbp import ContinualBackprop as Theirs
    from lop.nets.deep_ffnn import DeepFFNN

    net = DeepFFNN(784, num_features=width, num_outputs=10, num_hidden_layers=3)
    learner = Theirs(net, step_size=0.003, loss="nll", replacement_rate=1e-5, decay_rate=0.99, accumulate=True)
    x, y = torch.rand(1, 784), torch.randint(10, (1,))
    return of_calls(lambda: learner.learn(x, y))


def features() -> Population:
    """One lane on the features of mini-ImageNet."""
    stream = RandomImages(2048, 100, (2048,))
    return Population(lambda: MLP(hidden=(300, 150)).build(2048, 100), stream, [Lane(0, UPGD_RULE)])


def authors_upgd(inputs: int, outputs: int) -> Timed:
    """First-order global UPGD of mohmdelsayed/upgd on inputs-300-150-outputs."""
    from core.optim.weight_upgd.first_order import FirstOrderGlobalUPGD

    net = nn.Sequential(nn.Linear(inputs, 300), nn.ReLU(), nn.Linear(300, 150), nn.ReLU(), nn.Linear(150, outputs))
    optimizer = FirstOrderGlobalUPGD(net.named_parameters(), lr=0.01, beta_utility=0.9999, sigma=0.1, weight_decay=0.01)
    x, y = torch.rand(1, inputs), torch.randint(outputs, (1,))
    return of_calls(_step_of(net, optimizer, x, y))


def restarts() -> Population:
    """One lane of Adam whose network is drawn anew with every task."""
    again = ResetLayers(last=None)
    return Population(lambda: MLP(hidden=(300, 150)).build(784, 10), RandomImages(), [Lane(0, Adam(lr=1e-3), (again,))])


def authors_restarts() -> Timed:
    """The same by mohmdelsayed/upgd: its Adam, and layers that draw their weights anew every 5,000 steps."""
    from core.optim.adam import Adam as Theirs

    net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 150), nn.ReLU(), nn.Linear(150, 10))
    optimizer = Theirs(net.named_parameters(), lr=1e-3)
    x, y = torch.rand(1, 784), torch.randint(10, (1,))
    made, step = 0, _step_of(net, optimizer, x, y)

    def step_or_restart() -> None:
        nonlocal made
        step()
        made += 1
        if made % 5000 == 0:
            for layer in net:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()

    return of_calls(step_or_restart)


def average() -> Population:
    """One lane of UPGD on the deep linear network of a changing average."""
    network = MLP(hidden=(300, 150), activation="linear")
    rule = UPGD(lr=0.01, utility_decay=0.9, noise_std=0.1)
    return Population(lambda: network.build(16, 1), ChangingAverage(), [Lane(0, rule)])


def authors_average() -> Timed:
    """The same by mohmdelsayed/upgd."""
    from core.optim.weight_upgd.first_order import FirstOrderGlobalUPGD

    net = nn.Sequential(nn.Linear(16, 300), nn.Linear(300, 150), nn.Linear(150, 1))
    optimizer = FirstOrderGlobalUPGD(net.named_parameters(), lr=0.01, beta_utility=0.9, sigma=0.1, weight_decay=0.0)
    x, y = torch.randn(1, 16), torch.randn(1, 1)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()

    return of_calls(step)


def pictures(network: ConvNet | UPGDConvNet, outputs: int, batch: int, rule: Any, keep: bool) -> Population:
    """One lane of a convolutional network."""
    stream = RandomImages(3072, outputs, (3, 32, 32), batch)
    interventions = (_imagenet_keeper(),) if keep else ()
    return Population(lambda: network.build(3072, outputs), stream, [Lane(0, rule, interventions)])


def _imagenet_keeper() -> ContinualBackprop:
    return ContinualBackprop(
        replacement_rate=3e-4,
        maturity_threshold=100,
        utility_decay=0.99,
        utility="adaptable_contribution",
        bias_correction=True,
    )


def authors_imagenet() -> Timed:
    """Continual backpropagation of shibhansh/loss-of-plasticity on the network of Continual ImageNet."""
    from lop.algos.convCBP import ConvCBP
    from lop.nets.conv_net import ConvNet as Theirs

    learner = ConvCBP(
        Theirs(), step_size=0.01, momentum=0.9, loss="nll", init="default", replacement_rate=3e-4, decay_rate=0.99,
        util_type="adaptable_contribution", maturity_threshold=100,
    )  # fmt: skip
    x, y = torch.rand(100, 3, 32, 32), torch.randint(2, (100,))
    return of_calls(lambda: learner.learn(x, y))


def authors_upgd_pictures() -> Timed:
    """First-order global UPGD of mohmdelsayed/upgd on its convolutional network, built here: theirs needs HesScale."""
    from core.optim.weight_upgd.first_order import FirstOrderGlobalUPGD

    net = UPGDConvNet().build(3072, 10)
    optimizer = FirstOrderGlobalUPGD(net.named_parameters(), lr=0.01, beta_utility=0.999, sigma=0.01, weight_decay=1e-4)
    x, y = torch.rand(1, 3, 32, 32), torch.randint(10, (1,))
    return of_calls(_step_of(net, optimizer, x, y))


def _step_of(net: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def resnet() -> Timed:
    """A ResNet-18 in a plain loop, with continual backpropagation attached."""
    net = ResNet18(100)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    x, y = torch.rand(BATCH, 3, 32, 32), torch.randint(100, (BATCH,))
    attach(ContinualBackprop(replacement_rate=1e-5, maturity_threshold=1000), net, optimizer, example=x[:4])
    return of_calls(_step_of(net, optimizer, x, y), 8.0)


def authors_resnet() -> Timed:
    """The same by shibhansh/loss-of-plasticity."""
    utils = ModuleType("torchvision.utils")
    utils._log_api_usage_once = lambda module: None  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": ModuleType("torchvision"), "torchvision.utils": utils}
    from lop.algos.res_gnt import ResGnT
    from lop.nets.torchvision_modified_resnet import build_resnet18, kaiming_init_resnet_module

    net = build_resnet18(num_classes=100, norm_layer=nn.BatchNorm2d)
    net.apply(kaiming_init_resnet_module)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    keeper = ResGnT(net, "relu", replacement_rate=1e-5, util_type="contribution", maturity_threshold=1000)
    x, y = torch.rand(BATCH, 3, 32, 32), torch.randint(100, (BATCH,))

    def step() -> None:
        optimizer.zero_grad()
        features: list[torch.Tensor] = []
        nn.functional.cross_entropy(net.forward(x, features), y).backward()
        optimizer.step()
        keeper.gen_and_test(features)

    return of_calls(step, 8.0)


def ant() -> Timed:
    """The slippery ant's agent with continual backpropagation and L2."""
    from perennial.rl import make_agent
    from perennial.studies import ControlStudy, load

    study = load("nature/slippery-ant")
    assert isinstance(study, ControlStudy)
    agent, _ = make_agent(study.control, "continual_backprop", 0)
    rollout = study.control.ppo.rollout
    return of_calls(lambda: agent.learn(rollout, reset_num_timesteps=False), 15.0, rollout)


def authors_ant() -> Timed:
    """PPO and continual backpropagation of shibhansh/loss-of-plasticity, with the settings of cfg/sant/cbp.yml."""
    import gymnasium
    from lop.algos.rl.agent import Agent
    from lop.algos.rl.buffer import Buffer
    from lop.algos.rl.ppo import PPO
    from lop.nets.policies import MLPPolicy
    from lop.nets.valuefs import MLPVF

    env = gymnasium.make("Ant-v5", include_cfrc_ext_in_observation=False, contact_cost_weight=0.0)
    inputs, actions, rollout = env.observation_space.shape[0], env.action_space.shape[0], 2048  # type: ignore[index]
    policy = MLPPolicy(inputs, actions, act_type="ReLU", h_dim=[256, 256], device="cpu", init="lecun")
    value = MLPVF(inputs, act_type="ReLU", h_dim=[256, 256], device="cpu", init="lecun")
    learner = PPO(
        policy, Buffer(inputs, actions, rollout, device="cpu"), 1e-4, g=0.99, vf=value, lm=0.95, Opt=torch.optim.Adam,
        n_itrs=10, n_slices=16, wd=1e-4, betas=(0.99, 0.99), replacement_rate=1e-4, mt=10000, vgnt=True, pgnt=True,
    )  # fmt: skip
    agent = Agent(policy, learner)
    seen = env.reset(seed=0)[0]

    def steps() -> None:
        nonlocal seen
        for _ in range(rollout):
            action, log_probability, distribution, _ = agent.get_action(seen)
            after, reward, terminated, truncated, _ = env.step(action)
            agent.log_update(seen, action, reward, after, log_probability, distribution, terminated or truncated)
            seen = env.reset()[0] if terminated or truncated else after

    return of_calls(steps, 15.0, rollout)


UPGD_RULE = UPGD(lr=0.01, utility_decay=0.9999, noise_std=0.1, weight_decay=0.01)
PICTURES_RULE = UPGD(lr=0.01, utility_decay=0.999, noise_std=0.01, weight_decay=1e-4)
WORK: list[tuple[str, int, float | None, Callable[[], Population | Timed], Callable[[], Timed]]] = [
    ("regression, continual backprop, 1 lane", 1, 50, lambda: regression(1), authors_regression),
    ("regression, continual backprop, 30 lanes", 1, None, lambda: regression(30), authors_regression),
    ("regression, continual backprop, 100 lanes", 1, 500, lambda: regression(100), authors_regression),
    ("regression, continual backprop, 1000 lanes", 1, None, lambda: regression(1000), authors_regression),
    ("continual backprop, 784-100-100-100-10", 1, 8, lambda: images((100,) * 3, SGD(lr=0.003), True),
     lambda: authors_images(100)),
    ("continual backprop, 784-2000-2000-2000-10", 2, 2, lambda: images((2000,) * 3, SGD(lr=0.003), True),
     lambda: authors_images(2000)),
    ("Continual ImageNet, continual backprop", 1, None,
     lambda: pictures(ConvNet(), 2, 100, SGD(lr=0.01, momentum=0.9), True), authors_imagenet),
    ("ResNet-18, continual backprop", 2, None, resnet, authors_resnet),
    ("ant, PPO and continual backprop", 1, None, ant, authors_ant),
    ("UPGD, 784-300-150-10", 1, 8, lambda: images((300, 150), UPGD_RULE, False),
     lambda: authors_upgd(784, 10)),
    ("UPGD's Adam, 784-300-150-10, drawn anew", 1, None, restarts, authors_restarts),
    ("UPGD, 2048-300-150-100", 1, None, features, lambda: authors_upgd(2048, 100)),
    ("UPGD, 16-300-150-1, linear", 1, None, average, authors_average),
    ("UPGD, two convolutions and 400-120-84-10", 1, None,
     lambda: pictures(UPGDConvNet(), 10, 1, PICTURES_RULE, False), authors_upgd_pictures),
]  # fmt: skip
"""What, threads, the ratio to reach, our side, theirs."""


def _shown(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plasticity", type=Path, help="a checkout of shibhansh/loss-of-plasticity")
    parser.add_argument("--upgd", type=Path, help="a checkout of mohmdelsayed/upgd")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    sys.path += [str(p) for p in (arguments.plasticity, arguments.upgd) if p]
    print(f"{'work':44} {'threads':>7} {'ours/s':>11} {'theirs/s':>9} {'ratio':>7} {'to reach':>8} {'kB/lane':>8}")
    for name, threads, target, make, make_theirs in WORK:
        if arguments.only not in name:
            continue
        torch.set_num_threads(threads)
        made = make()
        mine = of_population(made) if isinstance(made, Population) else made
        size = f"{made.bytes_per_lane / 1000:,.1f}" if isinstance(made, Population) else ""
        there = arguments.upgd if name.startswith("UPGD") else arguments.plasticity
        other = make_theirs() if there else None
        rounds = [(mine(), other() if other else float("nan")) for _ in range(arguments.rounds)]
        ratio = statistics.median(a / b for a, b in rounds)
        print(
            f"{name:44} {threads:7} {_shown(statistics.median(a for a, _ in rounds)):>11} "
            f"{_shown(statistics.median(b for _, b in rounds)):>9} {ratio:7.2f} {target or '':>8} "
            f"{size:>8}",
            flush=True,
        )


if __name__ == "__main__":
    main()
