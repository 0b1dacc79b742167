"""What the ant costs: environment steps a second beside plain stable-baselines3.

A plain PPO of stable-baselines3 on gymnasium's Ant-v5 and an agent of the study `nature/slippery-ant` learn in turn, a
rollout and its training each, and the ratio of every pair is taken. The study's agent is measured as a run measures it,
after every tenth rollout. Both have the same settings; what differs are the changing ground, the record of episodes,
the measurements and, in all methods but the first, the method.

    python benchmarks/rl.py [--methods NAME ...] [--pairs 20]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import gymnasium
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from stable_baselines3 import PPO

from perennial.rl import Control, make_agent, measure, units_of
from perennial.studies import ControlStudy, load

EVERY = 10
"""Rollouts from one measurement to the next, as in the study."""


def plain(control: Control) -> PPO:
    """As a user of stable-baselines3 would write it."""
    ppo, units = control.ppo, list(control.ppo.hidden)
    env = gymnasium.make("Ant-v5", include_cfrc_ext_in_observation=False, contact_cost_weight=0.0)
    return PPO(
        "MlpPolicy", env, learning_rate=ppo.lr, n_steps=ppo.rollout, batch_size=ppo.minibatch, n_epochs=ppo.epochs,
        gamma=ppo.gamma, gae_lambda=ppo.gae_lambda, clip_range=ppo.clip, ent_coef=0.0, vf_coef=ppo.value_weight,
        max_grad_norm=ppo.max_grad_norm, device="cpu", seed=0,
        policy_kwargs={"net_arch": {"pi": units, "vf": units}, "activation_fn": torch.nn.ReLU, "ortho_init": False},
    )  # fmt: skip


def seconds(work: Callable[[], None]) -> float:
    """Of the processor: both work in one thread, and a shared machine disturbs that least."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def compare(control: Control, method: str, pairs: int) -> tuple[float, float]:
    """Steps a second of the plain agent, and the median ratio of the study's agent's speed to it."""
    bare = plain(control)
    ours, _ = make_agent(control, method, 0)
    units, made = units_of(ours), 0

    def learn_bare() -> None:
        bare.learn(control.ppo.rollout, reset_num_timesteps=False)

    def learn_ours() -> None:
        nonlocal made
        ours.learn(control.ppo.rollout, reset_num_timesteps=False)
        made += 1
        if made % EVERY == 0:
            measure(ours, units)

    learn_bare()
    learn_ours()
    rows = []
    for number in track(range(pairs), method, console=Console(stderr=True)):
        if number % 2 == 0:
            first = seconds(learn_bare)
            rows.append((first, seconds(learn_ours)))
        else:
            second = seconds(learn_ours)
            rows.append((seconds(learn_bare), second))
    return control.ppo.rollout / statistics.median(b for b, _ in rows), statistics.median(b / o for b, o in rows)


def main() -> None:
    study = load("nature/slippery-ant")
    assert isinstance(study, ControlStudy)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", choices=list(study.control.methods), default=list(study.control.methods)
    )
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("method", "plain, steps/s", "this / plain"):
        table.add_column(title, justify="left" if title == "method" else "right")
    for method in options.methods:
        speed, ratio = compare(study.control, method, options.pairs)
        table.add_row(method, f"{speed:.0f}", f"{ratio:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
