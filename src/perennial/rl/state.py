"""All of a simulator and of an agent that a run must have to go on as if nothing had happened."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import mujoco  # type: ignore[import-untyped]
import numpy as np
import torch
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv

_DERIVED = ("xpos", "cfrc_ext")
"""What environments read before a step besides the simulator's state; left by the last step, not by the state."""


def simulator_state(env: gymnasium.Env[Any, Any]) -> dict[str, Any]:
    """The state of a MuJoCo environment of gymnasium in the middle of an episode: tensors, numbers and text.

    Positions, velocities, activations, time, controls, forces and the solver's warm start (what MuJoCo calls the
    integration state), frictions, the steps of the time limit, the random numbers of resets, and ``state_dict()`` of
    every wrapper that has one.

    Raises:
        ValueError: the environment is not a MuJoCo environment of gymnasium.
    """
    base: Any = _mujoco(env)
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(base.model, kind))
    mujoco.mj_getState(base.model, base.data, state, kind)
    return {
        "simulation": torch.from_numpy(state),
        "derived": {name: torch.from_numpy(getattr(base.data, name).copy()) for name in _DERIVED},
        "friction": torch.from_numpy(base.model.geom_friction.copy()),
        "random": json.dumps(base.np_random.bit_generator.state),
        "wrappers": [_wrapper_state(wrapper) for wrapper in _wrappers(env)],
    }


def load_simulator_state(env: gymnasium.Env[Any, Any], state: Mapping[str, Any]) -> None:
    """Put an environment that was made in the same way where another was.

    Raises:
        ValueError: the state is of another body or of other wrappers.
    """
    base: Any = _mujoco(env)
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    size, wrappers = mujoco.mj_stateSize(base.model, kind), list(_wrappers(env))
    if len(state["simulation"]) != size:
        raise ValueError(
            f"the state has {len(state['simulation'])} numbers, and this body's {size}: it is another body"
        )
    if len(state["wrappers"]) != len(wrappers):
        raise ValueError(
            f"the state is of {len(state['wrappers'])} wrappers, and this environment has {len(wrappers)}; make it as "
            "the other was made"
        )
    env.reset()  # wrappers want to have seen one
    mujoco.mj_setState(base.model, base.data, state["simulation"].numpy(), kind)
    base.model.geom_friction[:] = state["friction"].numpy()
    for name, value in state["derived"].items():
        getattr(base.data, name)[:] = value.numpy()
    base.np_random.bit_generator.state = json.loads(state["random"])
    for wrapper, own in zip(wrappers, state["wrappers"], strict=True):
        _load_wrapper_state(wrapper, own)


def _wrapper_state(wrapper: Any) -> dict[str, Any]:
    if isinstance(wrapper, TimeLimit):
        return {"elapsed": wrapper._elapsed_steps}
    if isinstance(wrapper, Monitor):
        return {"rewards": [float(reward) for reward in wrapper.rewards], "total_steps": wrapper.total_steps}
    return dict(wrapper.state_dict()) if hasattr(type(wrapper), "state_dict") else {}


def _load_wrapper_state(wrapper: Any, state: Mapping[str, Any]) -> None:
    if isinstance(wrapper, TimeLimit):
        wrapper._elapsed_steps = state["elapsed"]
    elif isinstance(wrapper, Monitor):
        wrapper.rewards, wrapper.total_steps = list(state["rewards"]), state["total_steps"]
    elif hasattr(type(wrapper), "load_state_dict"):
        wrapper.load_state_dict(state)


def agent_state(agent: OnPolicyAlgorithm) -> dict[str, Any]:
    """All that an agent of stable-baselines3 needs to go on between two rollouts, with its environments.

    Weights, the optimizer and the methods attached to it, the last observation, counts, the simulators, and the global
    random numbers of torch, NumPy and Python: tensors, numbers and text, so that reading them back runs no code.

    Raises:
        ValueError: the agent has not begun to learn, or its environments run in other processes.
    """
    envs = _envs(agent)
    if agent._last_obs is None:
        raise ValueError("this agent has not begun to learn; there is no state between two rollouts yet")
    drawn: Any = np.random.get_state()
    name, keys, *rest = drawn
    version, words, second = random.getstate()
    return {
        "policy": agent.policy.state_dict(),
        "optimizer": agent.policy.optimizer.state_dict(),
        "observation": torch.from_numpy(np.array(agent._last_obs)),
        "episode_starts": torch.from_numpy(np.array(agent._last_episode_starts)),
        "counts": {name: getattr(agent, name) for name in ("num_timesteps", "_n_updates", "_episode_num")},
        "envs": [simulator_state(env) for env in envs],
        "torch": torch.get_rng_state(),
        "numpy": {"name": name, "keys": torch.from_numpy(keys.astype(np.int64)), "rest": rest},
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "second": second},
    }  # fmt: skip


def load_agent_state(agent: OnPolicyAlgorithm, state: Mapping[str, Any]) -> None:
    """Put an agent that was made in the same way, with the same methods attached, where another was.

    It goes on with ``agent.learn(steps, reset_num_timesteps=False)``, and makes the very steps that the other would
    have made.

    Raises:
        ValueError: the state is of another body, other wrappers or another number of environments.
    """
    envs = _envs(agent)
    if len(envs) != len(state["envs"]):
        raise ValueError(f"the state is of {len(state['envs'])} environments, and this agent has {len(envs)}")
    for env, own in zip(envs, state["envs"], strict=True):
        load_simulator_state(env, own)
    agent.policy.load_state_dict(state["policy"])
    agent.policy.optimizer.load_state_dict(state["optimizer"])
    agent._last_obs = state["observation"].numpy().copy()
    agent._last_episode_starts = state["episode_starts"].numpy().copy()
    for name, count in state["counts"].items():
        setattr(agent, name, count)
    torch.set_rng_state(state["torch"])
    saved = state["numpy"]
    np.random.set_state((saved["name"], saved["keys"].numpy().astype(np.uint32), *saved["rest"]))
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["second"]))


def _envs(agent: OnPolicyAlgorithm) -> list[gymnasium.Env[Any, Any]]:
    if not isinstance(agent.env, DummyVecEnv):
        raise ValueError(
            f"the agent's environments are in a {type(agent.env).__name__}; only DummyVecEnv's can be saved"
        )
    return agent.env.envs


def _mujoco(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    base = env.unwrapped
    if not isinstance(getattr(base, "data", None), mujoco.MjData):
        raise ValueError(f"{type(base).__name__} is not a MuJoCo environment of gymnasium; its state cannot be read")
    return base


def _wrappers(env: gymnasium.Env[Any, Any]) -> Iterator[gymnasium.Env[Any, Any]]:
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
