"""Control whose physics change, on stock gymnasium and stable-baselines3 (the extra ``rl``)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from perennial.rl.control import Control, Ground, Learner, PPOSettings

if TYPE_CHECKING:
    from perennial.rl.agent import Episodes, LeCunPolicy, make_agent, make_env, measure, units_of
    from perennial.rl.film import frames, save_frames
    from perennial.rl.ground import SlipperyAnt, friction_of
    from perennial.rl.state import agent_state, load_agent_state, load_simulator_state, simulator_state

_HEAVY = {
    "perennial.rl.agent": ("Episodes", "LeCunPolicy", "make_agent", "make_env", "measure", "units_of"),
    "perennial.rl.film": ("frames", "save_frames"),
    "perennial.rl.ground": ("SlipperyAnt", "friction_of"),
    "perennial.rl.state": ("agent_state", "load_agent_state", "load_simulator_state", "simulator_state"),
}
"""What stands on gymnasium and stable-baselines3."""

__all__ = [
    "Control",
    "Episodes",
    "Ground",
    "LeCunPolicy",
    "Learner",
    "PPOSettings",
    "SlipperyAnt",
    "agent_state",
    "frames",
    "friction_of",
    "load_agent_state",
    "load_simulator_state",
    "make_agent",
    "make_env",
    "measure",
    "save_frames",
    "simulator_state",
    "units_of",
]


def __getattr__(name: str) -> Any:
    """What needs the extra is imported when it is first asked for: studies are read without it."""
    for module, names in _HEAVY.items():
        if name in names:
            try:
                return getattr(importlib.import_module(module), name)
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    f"perennial.rl.{name} needs {error.name}, which is not installed: pip install 'perennial[rl]'"
                ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
