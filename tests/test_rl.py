"""The ant on changing ground: the ground, the simulator, the agent, resuming, the study and its report."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from perennial.parallel import Stopped
from perennial.rl import (
    Control,
    Ground,
    Learner,
    PPOSettings,
    SlipperyAnt,
    agent_state,
    frames,
    friction_of,
    load_agent_state,
    load_simulator_state,
    make_agent,
    make_env,
    measure,
    save_frames,
    simulator_state,
    units_of,
)
from perennial.runs.control import folder_of, gather, run_control, run_one
from perennial.storage import RunError, read_tensors, write_tensors
from perennial.studies import ControlStudy, StudyError, load, shipped

OFTEN = {"continual_backprop": {"replacement_rate": 0.02, "maturity_threshold": 5}}
METHODS = {
    "standard": Learner(label="Adam"),
    "l2": Learner(label="L2", betas=(0.99, 0.99), weight_decay=1e-3),
    "continual_backprop": Learner(label="CBP", betas=(0.99, 0.99), weight_decay=1e-4, interventions=OFTEN),
    "redo": Learner(label="ReDo", interventions={"redo": {"threshold": 0.5, "every": 3}}),
    "ada_upgd": Learner(label="AdaUPGD", rule={"name": "ada_upgd", "noise_std": "1e-3"}),
}
SMALL = Control(
    METHODS,
    ground=Ground(period=100),
    steps=384,
    episode_steps=40,
    measure_every=128,
    ppo=PPOSettings(rollout=64, epochs=2, minibatch=32, hidden=(16, 12)),
    seeds=(0,),
)


@pytest.fixture(autouse=True)
def global_random_numbers() -> Any:
    """stable-baselines3 draws from the global generators; other tests shall not see that."""
    before = torch.get_rng_state(), np.random.get_state()
    yield
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])


def actions(count: int) -> Any:
    return np.random.default_rng(0).uniform(-1, 1, (count, 8)).astype(np.float32)


# --- the ground -----------------------------------------------------------------------------------------------------


def test_friction_is_uniform_in_the_logarithm_and_a_function_of_seed_and_number() -> None:
    drawn = np.array([[friction_of(seed, number) for number in range(25)] for seed in range(40)])
    place = (np.log(drawn) - math.log(0.02)) / math.log(100)
    assert 0 < place.min() < 0.02
    assert 0.98 < place.max() < 1
    counts, _ = np.histogram(place, 10, (0, 1))
    assert ((counts - 100) ** 2 / 100).sum() < 30  # chi-squared with 9 degrees: 1 in 2,000 by chance
    assert abs(np.corrcoef(place[:, :-1].ravel(), place[:, 1:].ravel())[0, 1]) < 0.1
    assert abs(np.corrcoef(place[:-1].ravel(), place[1:].ravel())[0, 1]) < 0.1
    assert drawn[3, 5] == friction_of(3, 5)
    assert friction_of(0, 0, 0.5, 0.5) == pytest.approx(0.5)


def test_friction_changes_at_the_first_end_of_an_episode_after_the_period() -> None:
    env = SlipperyAnt(3, period=70, max_episode_steps=30)
    env.reset(seed=0)
    frictions, ends = [], []
    for action in actions(400):
        *_, terminated, truncated, info = env.step(action)
        frictions.append(info["friction"])
        if terminated or truncated:
            ends.append(env.steps)
            env.reset()
    assert [change.step for change in env.log[1:]] == [90, 180, 270, 360], "every third end of 30 steps"
    assert set(ends) >= {change.step for change in env.log[1:]}
    assert [change.friction for change in env.log] == [friction_of(3, number) for number in range(5)]
    for change in env.log[1:]:
        assert frictions[change.step - 1] != frictions[change.step] == change.friction


@pytest.mark.parametrize("friction", [0.03, 1.7])
def test_mujoco_uses_the_friction(friction: float) -> None:
    """Of every contact: MuJoCo takes the larger one of two surfaces, and the ant's own is 1 in gymnasium's file."""
    env = SlipperyAnt(0, low=friction, high=friction)
    env.reset(seed=0)
    base: Any = env.unwrapped
    touched = 0
    for action in actions(30):
        env.step(action)
        for contact in base.data.contact:
            touched += 1
            assert contact.friction[:2] == pytest.approx([friction, friction])
            assert contact.friction[2:] == pytest.approx([0.5, 0.5, 0.5])
    assert touched > 10


def test_ground_changes_the_motion_and_touches_no_other_ant() -> None:
    places = []
    for friction in (0.02, 0.02, 2.0):
        env = SlipperyAnt(0, low=friction, high=friction)
        env.reset(seed=0)
        for action in actions(60):
            observation, *_ = env.step(action)
        places.append(observation)
    assert np.array_equal(places[0], places[1])
    assert not np.allclose(places[0], places[2], atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"period": 0}, "period is 0"),
        ({"low": 0.0}, "low is 0.0"),
        ({"low": 3.0}, "low is 3.0"),
        ({"high": math.inf}, "high inf"),
    ],
)
def test_ground_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlipperyAnt(0, **settings)
    with pytest.raises(ValueError, match=message):
        Ground(**settings)


def test_number_of_changes_is_not_negative() -> None:
    with pytest.raises(ValueError, match="number is -1"):
        friction_of(0, -1)


# --- the simulator's state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["ant", "hopper", "walker"])
def test_simulator_goes_on_to_the_bit(body: Any, tmp_path: Path) -> None:
    """In the middle of an episode, over later ends of episodes and changes of the ground."""
    control = dataclasses.replace(SMALL, body=body, ground=Ground(period=50) if body == "ant" else None)
    one, other = make_env(control, 1), make_env(control, 1)
    one.reset(seed=0)
    size = one.action_space.shape[0]  # type: ignore[index]
    ahead = actions(150)[:, :size]

    def walk(env: Any, given: Any) -> list[Any]:
        seen = []
        for action in given:
            observation, reward, terminated, truncated, _ = env.step(action)
            seen.append(np.append(observation, [reward, terminated, truncated]))
            if terminated or truncated:
                seen.append(env.reset()[0])
        return seen

    walk(one, ahead[:65])
    write_tensors(tmp_path / "state.pt", simulator_state(one))
    load_simulator_state(other, read_tensors(tmp_path / "state.pt"))
    rest = walk(one, ahead[65:])
    assert len(rest) > len(ahead) - 65 + 1, "an episode ended"
    for mine, its in zip(rest, walk(other, ahead[65:]), strict=True):
        assert np.array_equal(mine, its)


def test_state_of_another_body_or_schedule_is_refused() -> None:
    ant = make_env(SMALL, 0)
    ant.reset(seed=0)
    state = simulator_state(ant)
    hopper = make_env(dataclasses.replace(SMALL, body="hopper", ground=None), 0)
    with pytest.raises(ValueError, match="another body"):
        load_simulator_state(hopper, state)
    with pytest.raises(ValueError, match="seed 0"):
        load_simulator_state(make_env(SMALL, 1), state)
    with pytest.raises(ValueError, match="2 wrappers"):
        load_simulator_state(ant.env, state)  # type: ignore[attr-defined]


def test_only_mujoco_has_a_state() -> None:
    import gymnasium

    with pytest.raises(ValueError, match="CartPoleEnv is not a MuJoCo"):
        simulator_state(gymnasium.make("CartPole-v1"))


# --- the agent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_methods_take_steps_and_begin_alike(method: str) -> None:
    plain, _ = make_agent(SMALL, "standard", 0)
    agent, keepers = make_agent(SMALL, method, 0)
    start = {n: p.detach().clone() for n, p in agent.policy.named_parameters()}
    assert all(torch.equal(p, start[n]) for n, p in plain.policy.named_parameters())
    agent.learn(3 * 64)
    assert all(not torch.equal(p, start[n]) for n, p in agent.policy.named_parameters())
    assert all(bool(torch.isfinite(p).all()) for p in agent.policy.parameters())
    if keepers:
        (keeper,) = keepers
        assert len(keeper.units) == 4
        assert all(count > 0 for count in keeper.replaced().values()), keeper


def test_the_same_steps_are_seen_until_training_begins() -> None:
    """Methods see the same starts, frictions and exploration until their weights differ."""
    seen = []
    for method in METHODS:
        agent, _ = make_agent(SMALL, method, 4)
        agent.learn(64)
        seen.append(agent.rollout_buffer.observations.copy())
    buffers = [np.sort(np.round(one.reshape(64, -1), 6), axis=0) for one in seen]
    assert all(np.array_equal(buffers[0], one) for one in buffers)


def test_settings_are_those_of_the_papers() -> None:
    study = load("nature/slippery-ant")
    assert isinstance(study, ControlStudy)
    agent, keepers = make_agent(study.control, "continual_backprop", 0)
    sizes = {n: tuple(p.shape) for n, p in agent.policy.named_parameters()}
    assert sizes["mlp_extractor.policy_net.2.weight"] == sizes["mlp_extractor.value_net.2.weight"] == (256, 256)
    assert (agent.n_steps, agent.n_epochs, agent.batch_size) == (2048, 10, 128)
    assert (agent.gamma, agent.gae_lambda, agent.clip_range(1.0)) == (0.99, 0.95, 0.2)
    assert (agent.ent_coef, agent.vf_coef, agent.max_grad_norm, agent.clip_range_vf) == (0.0, 1.0, 1e9, None)
    assert agent.normalize_advantage
    (group,) = agent.policy.optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-4, (0.99, 0.99), 1e-8, 1e-4)
    assert len(group["params"]) == len(list(agent.policy.parameters())), "one Adam for both"
    assert not agent.policy.log_std.detach().any()
    (keeper,) = keepers
    assert float(keeper.method.replacement_rate) == 1e-4
    assert keeper.method.maturity_threshold == 10_000
    for name, parameter in agent.policy.named_parameters():
        weight = parameter.detach()
        if weight.dim() == 2:
            bound = math.sqrt(3 / weight.shape[1])
            assert 0.9 * bound < float(weight.abs().max()) <= bound
            assert float(weight.var()) == pytest.approx(1 / weight.shape[1], rel=0.2)
        elif name.endswith("bias"):
            assert not weight.any()
    drawn = keeper.units.initial["mlp_extractor.value_net.2.weight"]
    element = torch.arange(10_000, dtype=torch.int32)
    fresh = drawn.draw(keeper._noise, "any", element)
    assert 0.99 * math.sqrt(3 / 256) < float(fresh.abs().max()) <= math.sqrt(3 / 256)


def test_continual_backprop_makes_the_moments_of_fresh_units_anew() -> None:
    agent, (keeper,) = make_agent(SMALL, "continual_backprop", 0)
    seen = 0

    def after(optimizer: Any, *_: Any) -> None:
        nonlocal seen
        for layer, mark in keeper.state.replaced.items():
            units = mark.nonzero().flatten().tolist()
            weight = agent.policy.get_parameter(f"{layer}.weight")
            for unit in units:
                seen += 1
                state = optimizer.state[weight]
                assert not state["exp_avg"][unit].any()
                assert not state["exp_avg_sq"][unit].any()

    agent.policy.optimizer.register_step_post_hook(after)
    agent.learn(4 * 64)
    assert seen > 4


def test_time_limits_are_bootstrapped() -> None:
    """The reward of a step cut off by the time limit has the value of what comes after it; a fall has not."""
    control = dataclasses.replace(SMALL, episode_steps=10, ground=None)
    agent, _ = make_agent(control, "standard", 0)
    bare = make_env(control, 0)
    policy, given = agent.policy, []
    env: Any = agent.env
    step = env.envs[0].step
    ends: list[tuple[int, float, Any]] = []

    def watched(action: Any) -> Any:
        found = step(action)
        given.append(float(found[1]))
        if found[3]:
            with torch.no_grad():
                value = float(policy.predict_values(torch.as_tensor(found[0]).float().unsqueeze(0)))
            ends.append((len(given) - 1, value, found[2]))
        return found

    env.envs[0].step = watched
    agent._setup_learn(64, None)
    from stable_baselines3.common.callbacks import CallbackList

    silent = CallbackList([])
    silent.init_callback(agent)
    agent.collect_rollouts(env, silent, agent.rollout_buffer, 64)
    rewards = agent.rollout_buffer.rewards.flatten()
    cut = {at: value for at, value, terminated in ends if not terminated}
    assert len(cut) >= 5
    assert any(abs(value) > 1e-3 for value in cut.values())
    for at in range(64):
        assert rewards[at] == pytest.approx(given[at] + 0.99 * cut.get(at, 0.0), abs=1e-4)
    bare.close()


def test_measurements() -> None:
    agent, _ = make_agent(SMALL, "standard", 0)
    agent.learn(64)
    units = units_of(agent)
    found = measure(agent, units)
    with torch.no_grad():
        for parameter in agent.policy.mlp_extractor.policy_net[2].parameters():
            parameter.fill_(-100.0)
    again = measure(agent, units)
    assert found["policy.dead_units"] < 0.3
    assert again["policy.dead_units"] >= 12 / 28 > found["policy.dead_units"]
    assert again["value.dead_units"] == found["value.dead_units"]
    assert 1 < found["policy.rank_99"] <= 12
    hidden = [p.detach() for n, p in agent.policy.named_parameters() if "value_net." in n and n.endswith("weight")]
    assert [tuple(p.shape) for p in hidden] == [(16, 27), (12, 16), (1, 12)]
    mean = sum(float(p.abs().sum()) for p in hidden) / sum(p.numel() for p in hidden)
    assert found["value.weight_magnitude"] == pytest.approx(mean)


def test_agent_without_a_step_has_no_state() -> None:
    agent, _ = make_agent(SMALL, "standard", 0)
    with pytest.raises(ValueError, match="has not begun"):
        agent_state(agent)


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    ["continual_backprop", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "continual_backprop")],
)
def test_killed_and_resumed_equals_undisturbed(method: str, tmp_path: Path) -> None:
    """Run twice from checkpoints on disk, with every global generator disturbed in between."""
    control = dataclasses.replace(SMALL, methods={method: METHODS[method]})
    (job,) = control.jobs()

    def stop_at(steps: int) -> Any:
        def pulse(step: int) -> None:
            if step >= steps:
                raise Stopped

        return pulse

    run_one(control, tmp_path / "whole", job, pulse=lambda step: None)
    for steps in (128, 256):
        with pytest.raises(Stopped):
            run_one(control, tmp_path / "halves", job, pulse=stop_at(steps), save_every=0)
        assert folder_of(tmp_path / "halves", job).manifest["step"] == steps
        torch.manual_seed(steps)
        np.random.seed(steps)
    run_one(control, tmp_path / "halves", job, pulse=lambda step: None)
    for name in ("whole", "halves"):
        gather(control, tmp_path / name)
    for file in ("results.parquet", "lanes.parquet"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "halves" / file).read_bytes()
    whole, halves = (folder_of(tmp_path / name, job).load() for name in ("whole", "halves"))
    assert_same(whole, halves)


def test_a_users_own_agent_goes_on_to_the_bit(tmp_path: Path) -> None:
    """With stable-baselines3's own Monitor around the ant and the policy that it makes by itself."""
    from stable_baselines3 import PPO

    def own() -> PPO:
        env = SlipperyAnt(1, period=80, max_episode_steps=30)
        small = {"net_arch": [8, 8]}
        return PPO("MlpPolicy", env, n_steps=50, batch_size=25, n_epochs=1, seed=3, policy_kwargs=small, device="cpu")

    one, other = own(), own()
    one.learn(50)
    write_tensors(tmp_path / "agent.pt", agent_state(one))
    one.learn(100, reset_num_timesteps=False)
    load_agent_state(other, read_tensors(tmp_path / "agent.pt"))
    other.learn(100, reset_num_timesteps=False)
    assert_same(agent_state(one), agent_state(other))
    ended = [[(episode["r"], episode["l"]) for episode in agent.ep_info_buffer] for agent in (one, other)]
    assert ended[1] == ended[0][-len(ended[1]) :]
    assert len(ended[1]) >= 3


def assert_same(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        late = {"differentiable"}  # torch's load_state_dict adds this key to groups that lack it
        assert one.keys() - late == other.keys() - late, where
        for key in one.keys() - late:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for at, (mine, its) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, its, f"{where}.{at}")
    else:
        assert one == other, where


@pytest.mark.slow
def test_runs_go_through_workers_and_a_finished_run_is_not_made_again(tmp_path: Path) -> None:
    control = dataclasses.replace(SMALL, methods={"standard": METHODS["standard"]}, seeds=(0, 1), steps=100)
    seen: dict[Any, int] = {}
    run_control(control, tmp_path, workers=1, progress=seen.__setitem__)
    assert list(seen.values()) == [100, 100]
    table = pl.read_parquet(tmp_path / "results.parquet")
    assert sorted(set(table["seed"])) == [0, 1]
    lengths = table.filter((pl.col("metric") == "episode_steps") & (pl.col("seed") == 0)).sort("step")
    assert (lengths["step"] - lengths["value"]).to_list() == [0, *lengths["step"][:-1]]
    before = (tmp_path / "results.parquet").read_bytes(), folder_of(tmp_path, control.jobs()[0]).path.stat().st_mtime_ns
    run_control(control, tmp_path, workers=1)
    after = (tmp_path / "results.parquet").read_bytes(), folder_of(tmp_path, control.jobs()[0]).path.stat().st_mtime_ns
    assert after == before


def test_a_run_that_diverges_is_recorded_and_ends(tmp_path: Path) -> None:
    """Weights that are not numbers; stable-baselines3 raises at the next of the policy's outputs."""
    wild = {"wild": Learner(rule={"name": "sgd", "weight_decay": 1e12})}
    control = dataclasses.replace(SMALL, methods=wild)
    (job,) = control.jobs()
    run_one(control, tmp_path, job, pulse=lambda step: None)
    gather(control, tmp_path)
    manifest = folder_of(tmp_path, job).manifest
    assert manifest["finished"]
    (step,) = manifest["diverged"]
    assert 0 < step < control.steps
    assert pl.read_parquet(tmp_path / "lanes.parquet")["diverged"].to_list() == [step]


# --- studies --------------------------------------------------------------------------------------------------------

STUDIES = {
    "nature/slippery-ant": (20_000_000, 30, 6),
    "nature/ant": (50_000_000, 30, 6),
    "nature/hopper": (100_000_000, 30, 4),
    "nature/walker": (50_000_000, 30, 4),
    "nature/slippery-ant-small": (60_000, 2, 4),
    "nature/ant-small": (100_000, 2, 2),
    "nature/hopper-small": (100_000, 2, 2),
    "nature/walker-small": (100_000, 2, 2),
}
SHORT = "nature/slippery-ant-small"
"""Its settings are those of the first, but for the times."""


@pytest.mark.parametrize("name", STUDIES)
def test_studies_expand(name: str) -> None:
    study = load(name)
    assert isinstance(study, ControlStudy)
    control = study.control
    assert (control.steps, len(control.seeds), len(control.methods)) == STUDIES[name]
    assert len(control.jobs()) == len(set(control.jobs())) == len(control.seeds) * len(control.methods)
    assert (control.ground is not None) == ("slippery" in name)
    if name == "nature/slippery-ant":
        assert control.ground == Ground(2_000_000, 0.02, 2.0)
    again = load(name, {"seeds": 2, "steps": 5000, "ppo.lr": "3e-4"})
    assert isinstance(again, ControlStudy)
    assert (again.control.seeds, again.control.steps, again.control.ppo.lr) == ((0, 1), 5000, 3e-4)


def test_every_study_of_control_is_tested_here() -> None:
    assert {name for name in shipped() if isinstance(load(name), ControlStudy)} == set(STUDIES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [(n, m) for n in STUDIES if n != SHORT for m in load(n).control.methods],  # type: ignore[union-attr]
)
def test_first_steps_of_full_settings(name: str, method: str, tmp_path: Path) -> None:
    """A rollout, its training and a measurement."""
    study = load(name, {"steps": 2048, "measure_every": 2048, "seeds": 1})
    assert isinstance(study, ControlStudy)
    job = next(job for job in study.control.jobs() if job.method == method)
    run_one(study.control, tmp_path, job, pulse=lambda step: None)
    rows = folder_of(tmp_path, job).rows()
    assert {"return", "policy.rank_99", "value.rarely_active_units", "policy.weight_magnitude"} <= set(rows["metric"])
    assert folder_of(tmp_path, job).manifest == folder_of(tmp_path, job).manifest | {"finished": True, "diverged": [-1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"body": "humanoid"}, "body is 'humanoid'"),
        ({"ground.period": 0}, "period is 0"),
        ({"ground.high": 0.001}, "high 0.001"),
        ({"body": "hopper"}, "ground is the ant's"),
        ({"ppo.minibatch": 100}, "minibatch is 100; it must divide"),
        ({"ppo.hidden": []}, "at least one hidden layer"),
        ({"ppo.rollout": 0}, "rollout is 0"),
        ({"ppo.gama": 0.9}, "did you mean 'gamma'"),
        ({"steps": 0}, "steps is 0"),
        ({"seeds": [1, 1]}, "seeds is"),
        ({"methods": {}}, "methods is empty"),
        ({"methods.l2.interventions": {"redoo": {}}}, "there is no intervention 'redoo'"),
        ({"methods.l2.interventions": {"redo": {"threshold": -1}}}, "threshold"),
        ({"methods.l2.betas": [0.9, 1.5]}, "Invalid beta"),
        ({"methods.l2.rule": {"name": "ada_upgd"}}, "a rule has its own settings"),
        ({"methods.tuned": {"rule": {"name": "adamm"}}}, "there is no optimizer rule 'adamm'"),
        ({"methods.tuned": {"rule": {"name": "adam", "lr": 0.1}}}, "give it as ppo.lr"),
        ({"methods.tuned": {"rule": {"name": "adam", "beta3": 0.1}}}, "beta3"),
    ],
)
def test_study_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        load("nature/slippery-ant-small", change)


def test_contact_forces_are_the_ants() -> None:
    with pytest.raises(ValueError, match="contact_forces are the ant's"):
        dataclasses.replace(SMALL, body="walker", ground=None, contact_forces=True)
    felt = make_env(dataclasses.replace(SMALL, contact_forces=True), 0)
    assert felt.observation_space.shape == (105,)
    assert make_env(SMALL, 0).observation_space.shape == (27,)


@pytest.mark.slow
def test_studies_are_read_without_the_simulator() -> None:
    """Listing and reading needs neither gymnasium nor stable-baselines3."""
    import subprocess
    import sys

    code = (
        "import sys; from perennial.studies import load; load('nature/slippery-ant'); import perennial.runs; "
        "print([n for n in ('gymnasium', 'mujoco', 'stable_baselines3') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- frames ---------------------------------------------------------------------------------------------------------


def test_frames_show_the_ant_or_say_what_is_missing(tmp_path: Path) -> None:
    from PIL import Image

    agent, _ = make_agent(SMALL, "standard", 0)
    agent.learn(64)
    before = agent_state(agent)
    try:
        drawn = frames(agent, SMALL, count=3, every=4, size=48)
    except RunError as error:
        assert "EGL" in str(error)  # noqa: PT017 - where nothing can be drawn, this is what is promised
        return
    assert drawn.shape == (3, 48, 48, 3)
    assert drawn.std() > 10
    assert (drawn[0] != drawn[2]).any()
    save_frames(drawn, tmp_path / "strip.png")
    save_frames(drawn, tmp_path / "clip.gif")
    with Image.open(tmp_path / "strip.png") as strip, Image.open(tmp_path / "clip.gif") as clip:
        assert strip.size == (144, 48)
        assert clip.n_frames == 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"ends in '\.bmp'"):
        save_frames(drawn, tmp_path / "strip.bmp")
    assert_same(agent_state(agent), before)


def test_without_rendering_an_error_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    agent, _ = make_agent(SMALL, "standard", 0)
    with pytest.raises(RunError, match=r"MUJOCO_GL=nonsense.*Install EGL"):
        frames(agent, SMALL, count=1)


# --- the guide ------------------------------------------------------------------------------------------------------


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = Path(__file__).parents[1] / "docs" / "guides" / "control.md"
    pieces = re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL)
    assert len(pieces) == 2
    monkeypatch.chdir(tmp_path)
    exec("\n".join(pieces), {})  # ends with the comparison of both agents
    assert (tmp_path / "agent.pt").is_file()


def test_the_guide_names_every_method_and_study() -> None:
    text = (Path(__file__).parents[1] / "docs" / "guides" / "control.md").read_text()
    study = load("nature/slippery-ant")
    assert isinstance(study, ControlStudy)
    assert [method for method in study.control.methods if f"| `{method}` |" not in text] == []
