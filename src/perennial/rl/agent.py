"""The papers' PPO on stable-baselines3 as it is, with a method attached."""

from __future__ import annotations

from typing import Any, NamedTuple, SupportsFloat

import gymnasium
import torch
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from perennial.attach import Keeper, attach
from perennial.metrics import weight_magnitude
from perennial.monitor.reading import read
from perennial.noise import torch_seed
from perennial.rl.control import Control
from perennial.rl.ground import SlipperyAnt
from perennial.units import UnitMap, trace

MEASURED = ("dead_units", "rarely_active_units", "dormant_units", "rank_99", "effective_rank_entropy")
"""Metrics of the hidden units of policy and of value. The papers' dormant units are ``rarely_active_units``, their
stable rank is ``rank_99``."""
_BODIES = {"ant": "Ant-v5", "hopper": "Hopper-v5", "walker": "Walker2d-v5"}


class LeCunPolicy(ActorCriticPolicy):
    """Policy and value whose weights are drawn uniformly within sqrt(3 / inputs), without biases, as the papers do."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
                    nn.init.zeros_(module.bias)


class Episode(NamedTuple):
    """One that has ended."""

    step: int
    """Environment steps made when it had."""
    reward: float
    """Undiscounted return."""
    length: int
    """Steps."""


class Episodes(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Adds up the rewards of episodes."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.log: list[Episode] = []
        """Those that ended; whoever reads it may clear it."""
        self.steps, self._reward, self._length = 0, 0.0, 0

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.steps += 1
        self._reward += float(reward)
        self._length += 1
        if terminated or truncated:
            self.log.append(Episode(self.steps, self._reward, self._length))
            self._reward, self._length = 0.0, 0
        return observation, reward, terminated, truncated, info

    def state_dict(self) -> dict[str, Any]:
        """The episode that goes on."""
        return {"steps": self.steps, "reward": self._reward, "length": self._length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with it."""
        self.steps, self._reward, self._length = state["steps"], state["reward"], state["length"]
        self.log.clear()


def make_env(control: Control, seed: int, **settings: Any) -> gymnasium.Env[Any, Any]:
    """The body of a study on its ground.

    Args:
        control: the study.
        seed: of the frictions.
        settings: of the simulated body, such as ``render_mode``.
    """
    if control.body == "ant" and not control.contact_forces:
        settings |= {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0}
    if control.ground is not None:
        ground = control.ground
        return SlipperyAnt(
            seed, period=ground.period, low=ground.low, high=ground.high,
            max_episode_steps=control.episode_steps, **settings,
        )  # fmt: skip
    spec = gymnasium.spec(_BODIES[control.body])
    made: gymnasium.Env[Any, Any] = gymnasium.make(spec, disable_env_checker=True, max_episode_steps=-1, **settings)
    return TimeLimit(made, control.episode_steps)


def make_agent(control: Control, method: str, seed: int) -> tuple[PPO, list[Keeper]]:
    """The agent of one run, before its first step, and the methods that are attached to it.

    Environments, first weights and exploration are functions of the seed alone: all methods begin alike.
    """
    learner, settings = control.methods[method], control.ppo
    kind, options = learner.optimizer(seed)
    units = list(settings.hidden)
    agent = PPO(
        LeCunPolicy,
        DummyVecEnv([lambda: Episodes(make_env(control, seed))]),
        learning_rate=settings.lr,
        n_steps=settings.rollout,
        batch_size=settings.minibatch,
        n_epochs=settings.epochs,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        clip_range=settings.clip,
        ent_coef=0.0,
        vf_coef=settings.value_weight,
        max_grad_norm=settings.max_grad_norm,
        policy_kwargs={
            "net_arch": {"pi": units, "vf": units},
            "activation_fn": nn.ReLU,
            "ortho_init": False,
            "optimizer_class": kind,
            "optimizer_kwargs": options,
        },
        seed=torch_seed(seed, "init") & 0x7FFFFFFF,
        device="cpu",
    )

    def factory() -> nn.Module:
        return agent.policy_class(agent.observation_space, agent.action_space, agent.lr_schedule, **agent.policy_kwargs)

    example = _example(agent)
    keepers = []
    with torch.random.fork_rng(devices=[]):  # the factory draws weights, and exploration shall not depend on it
        for one in learner.made_interventions():
            keepers.append(
                attach(one, agent.policy, agent.policy.optimizer, example=example, factory=factory, seed=seed)
            )
    return agent, keepers


def units_of(agent: PPO) -> UnitMap:
    """The hidden units of policy and value."""
    return trace(agent.policy, _example(agent))


def measure(agent: PPO, units: UnitMap) -> dict[str, float]:
    """How plastic policy and value are on the observations of the last rollout.

    Returns:
        ``policy.NAME`` and ``value.NAME`` for every name in ``MEASURED``, over all hidden layers of each for
        metrics of units and of the last for ranks; ``policy.weight_magnitude`` and ``value.weight_magnitude``, of the
        weights of all layers, without biases.
    """
    shape = agent.observation_space.shape
    assert shape is not None
    seen = torch.as_tensor(agent.rollout_buffer.observations).reshape(-1, *shape).float()
    found: dict[str, float] = {}
    for part, own in (("policy", ("policy_net", "action_net")), ("value", ("value_net",))):
        mine = UnitMap(tuple(layer for layer in units if own[0] in layer.name))
        reading = read(agent.policy, mine, (seen,), {}, MEASURED)
        found |= {f"{part}.{name}": value for name, value in reading.network.items()}
        named = agent.policy.named_parameters()
        weights = {n: p.detach() for n, p in named if p.dim() == 2 and any(name in n for name in own)}
        found[f"{part}.weight_magnitude"] = float(weight_magnitude(weights))
    return found


def _example(agent: PPO) -> Tensor:
    """Observations on which hardly a fresh unit is silent."""
    shape = agent.observation_space.shape
    assert shape is not None
    return torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
