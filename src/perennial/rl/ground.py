"""An ant on ground whose friction changes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, SupportsFloat

import gymnasium
import torch
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.wrappers import TimeLimit

from perennial.noise import Noise, seed_key


def friction_of(seed: int, number: int, low: float = 0.02, high: float = 2.0) -> float:
    r"""The friction after so many changes: :math:`\exp(\log l + u\,(\log h - \log l))`, u uniform on (0, 1), a function
    of seed and number alone.

    Args:
        seed: which sequence.
        number: changes before it; 0 for the first.
        low: smallest, l.
        high: largest, h.

    Raises:
        ValueError: the range is empty or not above 0, or the number is negative.
    """
    if not 0 < low <= high < math.inf:
        raise ValueError(f"low is {low} and high {high}; frictions are above 0, and low is at most high")
    if number < 0:
        raise ValueError(f"number is {number}; it counts the changes so far, from 0")
    noise = Noise(torch.tensor(seed_key(seed, "tasks"), dtype=torch.int32), torch.tensor(number, dtype=torch.int32))
    u = float(noise.uniform("friction", torch.zeros((), dtype=torch.int32)))
    return math.exp(math.log(low) + u * (math.log(high) - math.log(low)))


class Change(NamedTuple):
    """The ground became another."""

    step: int
    """Environment steps made before."""
    friction: float
    """From then on."""


class SlipperyAnt(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Gymnasium's Ant-v5 on ground whose friction changes while it runs (Dohare et al., Nature 2024).

    The friction is drawn log-uniformly, :func:`friction_of`, at the start and at the first end of an episode at least
    ``period`` steps after the last change. It is set in the running simulation; no file is written. It is set for all
    surfaces, as the authors' default class of geoms does: MuJoCo takes the larger friction of two surfaces that touch,
    so that slippery ground alone would leave the ant the friction of its own feet. Rolling and torsional friction stay.

    An episode ends when the ant is unhealthy, or, truncated, after ``max_episode_steps``. ``info["friction"]`` is the
    friction in force, of the step that was made.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        period: int = 2_000_000,
        low: float = 0.02,
        high: float = 2.0,
        max_episode_steps: int = 1000,
        **ant: Any,
    ) -> None:
        """
        Args:
            seed: of the frictions. Starts are of the seed that ``reset`` is given.
            period: environment steps between changes.
            low: smallest friction.
            high: largest.
            max_episode_steps: longest episode.
            ant: settings of gymnasium's ``AntEnv``, such as ``render_mode``.

        Raises:
            ValueError: a number is out of range.
        """
        if period < 1:
            raise ValueError(f"period is {period}; it is a number of environment steps, at least 1")
        self._first = friction_of(seed, 0, low, high)  # refuses a wrong range before the simulator is made
        super().__init__(TimeLimit(AntEnv(**ant), max_episode_steps))
        self.seed, self.period, self.low, self.high = seed, period, low, high
        self.steps = 0
        """Environment steps made."""
        self.number = 0
        """Changes so far."""
        self.changed_at = 0
        """Step of the last."""
        self.log: list[Change] = []
        """Changes, the first friction among them; whoever reads it may clear it."""
        self._set(0)

    @property
    def friction(self) -> float:
        """In force now."""
        return friction_of(self.seed, self.number, self.low, self.high)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        info["friction"] = self._in_force
        self.steps += 1
        if (terminated or truncated) and self.steps - self.changed_at >= self.period:
            self._set(self.number + 1)
        return observation, reward, terminated, truncated, info

    def _set(self, number: int) -> None:
        self.number, self.changed_at = number, self.steps
        self._apply()
        self.log.append(Change(self.steps, self._in_force))

    def _apply(self) -> None:
        self._in_force = self.friction
        simulated: Any = self.unwrapped
        simulated.model.geom_friction[:, 0] = self._in_force

    def state_dict(self) -> dict[str, int]:
        """Where the schedule is."""
        return {"seed": self.seed, "steps": self.steps, "number": self.number, "changed_at": self.changed_at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is of another seed.
        """
        if state["seed"] != self.seed:
            raise ValueError(f"the state is of frictions of seed {state['seed']}, and this ant's are of {self.seed}")
        self.steps, self.number, self.changed_at = state["steps"], state["number"], state["changed_at"]
        self.log.clear()
        self._apply()
