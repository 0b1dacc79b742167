"""Attached methods under the hosts that people train with, each with the real library.

For every host: units are replaced, training is that of a plain loop, a checkpoint of the host's own brings the method
back in the middle of a maturity period, and a method that is off changes no bit. docs/guides/hosts.md shows what is
here as a table, and its snippets are lines of this file.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import pickle
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

import perennial
from perennial import (
    ContinualBackprop,
    Keeper,
    L2Init,
    ReDo,
    SelfNormalizedResets,
    ShrinkAndPerturb,
)
from perennial.methods import Intervention, Regulariser

OFTEN = ContinualBackprop(replacement_rate=0.1, maturity_threshold=5, utility_decay=0.9)
"""Replaces units every few steps."""
OFF = dataclasses.replace(OFTEN, replacement_rate=0.0)
METHODS: dict[str, Intervention] = {
    "continual backprop": OFTEN,
    "self-normalized resets": SelfNormalizedResets(quantile=0.5, max_age=1, minimum=1),
    "redo": ReDo(threshold=0.5, every=5),
    "shrink and perturb": ShrinkAndPerturb(shrink=1e-3, noise_std=1e-3),
    "l2 init": L2Init(rate=1e-2, coupled=True),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
NOT_FEW = ("self-normalized resets", "redo")
few_methods = pytest.mark.parametrize("method", [
    pytest.param(method, id=name, marks=pytest.mark.slow if name in NOT_FEW else ())
    for name, method in METHODS.items()
])  # fmt: skip
"""The same, slow but for one method that replaces units, one that needs none, and one that adds to the loss."""


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3))


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: Any, steps: range, keeper: Keeper | None = None, accumulate: int = 1) -> None:
    """The plain loop that every host is compared with."""
    coupled = keeper is not None and isinstance(keeper.method, Regulariser) and keeper.method.coupled
    for step in steps:
        for part in range(accumulate):
            x, y = batch(step * accumulate + part)
            loss = F.cross_entropy(model(x), y)
            if coupled and keeper is not None:
                loss = loss + keeper.penalty()
            (loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()


def plain(method: Intervention, steps: int, accumulate: int = 1) -> tuple[nn.Module, Keeper]:
    model = network()
    optimizer = adam(model)
    keeper = perennial.attach(method, model, optimizer, example=batch(0)[0])
    train(model, optimizer, range(steps), keeper, accumulate)
    return model, keeper


def bare(steps: int, accumulate: int = 1) -> nn.Module:
    """What never heard of Perennial."""
    model = network()
    train(model, adam(model), range(steps), None, accumulate)
    return model


def replaced(keeper: Keeper) -> int:
    return sum(keeper.replaced().values())


def assert_same(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def assert_same_state(left: Keeper, right: Keeper) -> None:
    assert left.steps == right.steps
    assert left.replaced() == right.replaced()
    for ours, theirs in zip(pytree.tree_leaves(left.state), pytree.tree_leaves(right.state), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def assert_fresh_optimizer_state(keeper: Keeper) -> None:
    """Of the units that the last step replaced, of which there are some."""
    seen = 0
    for layer in keeper.units:
        gone = keeper.state.replaced[layer.name]
        seen += int(gone.sum())
        for part in (*layer.incoming, *layer.outgoing):
            parameter = keeper._params[part.parameter]
            for key in ("exp_avg", "exp_avg_sq"):
                moment = keeper._optimizer.state[parameter][key]
                assert (part.gather(moment)[gone] == 0).all(), (part.parameter, key)
                assert (moment != 0).any()
    assert seen


def ages(keeper: Keeper) -> dict[str, list[int]]:
    """The ages of all units; some of them have to be in the middle of their maturity period."""
    found = {name: age.tolist() for name, age in keeper.state.age.items()}
    assert any(0 < age < 5 for layer in found.values() for age in layer)
    return found


# --- plain loops ----------------------------------------------------------------------------------------------------


@few_methods
def test_plain_loop_resumes_in_the_middle_of_maturity(method: Intervention, tmp_path: Path) -> None:
    whole, unbroken = plain(method, 31)

    model, keeper = plain(method, 17)
    optimizer = keeper._optimizer
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")

    model = network(seed=1)
    optimizer = adam(model)
    keeper = perennial.attach(method, model, optimizer, example=batch(0)[0])
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert keeper.steps == 17
    train(model, optimizer, range(17, 31), keeper)
    assert_same(whole, model)
    assert_same_state(unbroken, keeper)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=40),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=2, threshold=0.5),
    "warm restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=7),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, total_iters=5), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[5],
    ),
}


@pytest.mark.parametrize("schedule", [
    pytest.param(made, id=name, marks=pytest.mark.slow if name in ("warm restarts", "sequence") else ())
    for name, made in SCHEDULES.items()
])  # fmt: skip
def test_learning_rate_schedulers(schedule: Callable[[Any], Any]) -> None:
    """Attached before the scheduler is made or after it: the same; off: as without."""

    def run(method: Intervention | None, first: bool) -> tuple[nn.Module, Keeper | None, list[float]]:
        model, keeper, rates = network(), None, []
        optimizer = adam(model)
        if method is not None and first:
            keeper = perennial.attach(method, model, optimizer, example=batch(0)[0])
        scheduler = schedule(optimizer)
        if method is not None and not first:
            keeper = perennial.attach(method, model, optimizer, example=batch(0)[0])
        for step in range(25):
            train(model, optimizer, range(step, step + 1))
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step(*((1.0,) if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else ()))
        return model, keeper, rates

    without, _, rates = run(None, True)
    for first in (True, False):
        off, _, same_rates = run(OFF, first)
        assert_same(off, without)
        assert same_rates == rates
    before, keeper, _ = run(OFTEN, True)
    after, other, _ = run(OFTEN, False)
    assert len(set(rates)) > 2
    assert keeper is not None
    assert other is not None
    assert replaced(keeper) > 30
    assert_same(before, after)
    assert_same_state(keeper, other)


def test_grad_scaler_with_autocast() -> None:
    """bfloat16 on a CPU; every third step overflows, does nothing and is not counted."""

    def run(method: Intervention | None, overflow: bool) -> tuple[nn.Module, Keeper | None]:
        model = network()
        optimizer = adam(model)
        keeper = None
        if method is not None:
            keeper = perennial.attach(method, model, optimizer, example=batch(0)[0])
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(24):
            if step % 3 == 2 and not overflow:
                continue
            x, y = batch(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            if step % 3 == 2:
                model[0].weight.grad[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update(4.0)
            optimizer.zero_grad()
        return model, keeper

    model, keeper = run(OFTEN, True)
    other, without_overflow = run(OFTEN, False)
    assert keeper is not None
    assert without_overflow is not None
    assert keeper.steps == 16
    assert replaced(keeper) > 20
    assert_same(model, other)
    assert_same_state(keeper, without_overflow)
    assert all(u.dtype == torch.float32 for u in keeper.state.utility.values())
    assert_same(run(OFF, True)[0], run(None, True)[0])


def test_schedulers_scalers_and_accumulation_resume() -> None:
    def start(seed: int) -> tuple[dict[str, Any], Keeper]:
        model = network(seed)
        optimizer = adam(model)
        keeper = perennial.attach(OFTEN, model, optimizer, example=batch(0)[0])
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=40)
        scaler = torch.amp.GradScaler("cpu", growth_interval=5)
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}, keeper

    def go_on(parts: dict[str, Any], steps: range) -> None:
        for step in steps:
            for part in range(2):
                x, y = batch(2 * step + part)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(parts["model"](x), y) / 2
                parts["scaler"].scale(loss).backward()
            parts["scaler"].step(parts["optimizer"])
            parts["scaler"].update()
            parts["scheduler"].step()
            parts["optimizer"].zero_grad()

    whole, unbroken = start(0)
    go_on(whole, range(31))
    first, _ = start(0)
    go_on(first, range(17))
    saved = copy.deepcopy({name: part.state_dict() for name, part in first.items()})
    second, keeper = start(1)
    for name, part in second.items():
        part.load_state_dict(saved[name])
    assert ages(keeper)
    go_on(second, range(17, 31))
    assert keeper.steps == 31
    assert replaced(keeper) > 30
    assert_same(whole["model"], second["model"])
    assert_same_state(unbroken, keeper)


def test_gradient_accumulation_looks_at_the_last_pass() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = ContinualBackprop(replacement_rate=0.0, utility_decay=0.0)
    keeper = perennial.attach(method, model, optimizer, example=batch(0)[0])
    for part in range(4):
        x, y = batch(part)
        F.cross_entropy(model(x), y).backward()
    hidden = model[1](model[0](x)).detach()
    with torch.no_grad():  # evaluation is not looked at
        model(batch(9)[0])
    optimizer.step()
    assert keeper.steps == 1
    expected = hidden.abs().mean(0) * model[2].weight.detach().abs().sum(0)
    torch.testing.assert_close(keeper.state.utility["0"], expected)


@every_method
def test_gradient_accumulation_counts_optimizer_steps(method: Intervention) -> None:
    _, keeper = plain(method, 12, accumulate=3)
    assert keeper.steps == 12


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_of_model_and_optimizer_are_not_attached(duplicate: Callable[[Any], Any]) -> None:
    model, keeper = plain(OFTEN, 9)
    before = ages(keeper)
    theirs, optimizer = duplicate((model, keeper._optimizer))
    train(theirs, optimizer, range(9, 15))  # a plain model with a plain optimizer
    assert keeper.steps == 9
    assert ages(keeper) == before
    again = perennial.attach(OFTEN, theirs, optimizer, example=batch(0)[0])
    train(theirs, optimizer, range(15, 30))
    assert replaced(again) > 20


# --- accelerate -----------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Any]]:
    """Makes accelerators, and forgets what accelerate keeps for the whole process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def forget() -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    def make(**settings: Any) -> Any:
        forget()
        return Accelerator(cpu=True, **settings)

    yield make
    forget()


def with_accelerate(
    accelerator: Any, method: Intervention | None, order: str = "before", seed: int = 0
) -> tuple[nn.Module, Any, Keeper | None]:
    model, example = network(seed), batch(0)[0]
    optimizer, keeper = adam(model), None
    if method is not None and order == "before":
        keeper = perennial.attach(method, model, optimizer, example=example)
    model, optimizer = accelerator.prepare(model, optimizer)
    if method is not None and order == "after":
        keeper = perennial.attach(method, model, optimizer, example=example)
    return model, optimizer, keeper


def accelerated(accelerator: Any, model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        x, y = batch(step)
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("order", ["before", "after"])
def test_accelerate_trains_like_a_plain_loop(accelerator: Callable[..., Any], order: str) -> None:
    host = accelerator()
    model, optimizer, keeper = with_accelerate(host, OFTEN, order)
    accelerated(host, model, optimizer, range(30))
    expected, other = plain(OFTEN, 30)
    assert keeper is not None
    assert replaced(keeper) > 40
    assert_same(model, expected)
    assert_same_state(keeper, other)


@pytest.mark.parametrize("order", ["before", "after"])
def test_accelerate_off_changes_no_bit(accelerator: Callable[..., Any], order: str) -> None:
    host = accelerator()
    model, optimizer, _ = with_accelerate(host, OFF, order)
    accelerated(host, model, optimizer, range(20))
    assert_same(model, bare(20))


def test_accelerate_accumulates_gradients(accelerator: Callable[..., Any]) -> None:
    host = accelerator(gradient_accumulation_steps=3)
    model, optimizer, keeper = with_accelerate(host, OFTEN)
    accelerated(host, model, optimizer, range(60))
    expected, other = plain(OFTEN, 20, accumulate=3)
    assert keeper is not None
    assert keeper.steps == 20
    assert replaced(keeper) > 20
    assert_same(model, expected)
    assert_same_state(keeper, other)


@pytest.mark.parametrize(("method", "order"), [
    *(pytest.param(method, "before", id=name, marks=pytest.mark.slow if name in NOT_FEW else ())
      for name, method in METHODS.items()),
    pytest.param(OFTEN, "after", id="after"),
])  # fmt: skip
def test_accelerate_resumes(accelerator: Callable[..., Any], method: Intervention, order: str, tmp_path: Path) -> None:
    if isinstance(method, Regulariser):
        method = dataclasses.replace(method, coupled=False)
    whole, unbroken = plain(method, 31)
    host = accelerator()
    model, optimizer, keeper = with_accelerate(host, method, order)
    accelerated(host, model, optimizer, range(17))
    host.save_state(tmp_path)

    host = accelerator()
    model, optimizer, keeper = with_accelerate(host, method, order, seed=1)
    host.load_state(tmp_path)
    assert keeper is not None
    assert keeper.steps == 17
    if method is OFTEN:
        assert ages(keeper) == ages(plain(method, 17)[1])
    accelerated(host, model, optimizer, range(17, 31))
    assert_same(model, whole)
    assert_same_state(keeper, unbroken)


# --- transformers ---------------------------------------------------------------------------------------------------


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random words with random labels."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        words = torch.randint(0, 50, (10,), generator=generator)
        return {"input_ids": words, "attention_mask": torch.ones(10, dtype=torch.long), "labels": words[0] % 3}


def bert(seed: int = 0) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
        )
    )  # fmt: skip


def with_trainer(
    folder: Path, method: Intervention | None, max_steps: int, resume: Path | None = None, seed: int = 0
) -> tuple[Any, Keeper | None, list[dict[str, Tensor]]]:
    """A run of the Trainer; the model, the keeper, and the batches in the order in which they were used."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    used: list[dict[str, Tensor]] = []

    def collate(rows: list[Any]) -> Any:
        used.append(default_data_collator(rows))
        return used[-1]

    model, example, keeper = bert(seed), default_data_collator([Sentences()[0]]), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    if method is not None:
        keeper = perennial.attach(method, model, optimizer, example=example)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=max_steps, save_steps=10, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, max_grad_norm=0.0, lr_scheduler_type="constant", use_cpu=True, bf16=False,
        report_to=[], disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=Sentences(), optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return model, keeper, used


def test_trainer_trains_like_a_plain_loop(tmp_path: Path) -> None:
    model, keeper, used = with_trainer(tmp_path, OFTEN, 18)
    other = bert()
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.003)
    theirs = perennial.attach(OFTEN, other, optimizer, example=used[0])
    for step in range(18):
        for given in used[2 * step : 2 * step + 2]:
            # This model takes keywords, so the Trainer leaves it to the model to divide the loss; it does not.
            other(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert keeper is not None
    assert keeper.steps == 18
    assert {
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.1.intermediate.dense",
    } <= keeper.replaced().keys()
    assert all(count > 10 for count in keeper.replaced().values())
    assert_same(model, other)
    assert_same_state(keeper, theirs)


def test_trainer_resumes(tmp_path: Path) -> None:
    whole, unbroken, _ = with_trainer(tmp_path / "whole", OFTEN, 18)
    _, stopped, _ = with_trainer(tmp_path / "parts", OFTEN, 10)
    model, keeper, _ = with_trainer(tmp_path / "parts", OFTEN, 18, tmp_path / "parts" / "checkpoint-10", seed=1)
    assert stopped is not None
    assert ages(stopped)
    assert keeper is not None
    assert unbroken is not None
    assert_same(model, whole)
    assert_same_state(keeper, unbroken)


def test_trainer_off_changes_no_bit(tmp_path: Path) -> None:
    assert_same(with_trainer(tmp_path, OFF, 8)[0], with_trainer(tmp_path, None, 8)[0])


# --- Lightning ------------------------------------------------------------------------------------------------------


def lightning_module(method: Intervention | None, seed: int = 0) -> Any:
    from lightning import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(seed)
            self.keeper: Keeper | None = None

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)

        def training_step(self, given: tuple[Tensor, Tensor], index: int) -> Tensor:
            x, y = given
            loss = F.cross_entropy(self(x), y)
            if isinstance(method, Regulariser) and method.coupled:
                loss = loss + self.keeper.penalty()
            return loss

        def validation_step(self, given: tuple[Tensor, Tensor], index: int) -> None:
            self(given[0] * 100)  # not looked at

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
            if method is not None:
                self.keeper = perennial.attach(method, self, optimizer, example=batch(0)[0])
            return optimizer

    return Module()


def with_lightning(module: Any, epochs: int, resume: Path | None = None, accumulate: int = 1) -> Any:
    """Epochs of 17 optimizer steps, with validation in between."""
    from lightning import Trainer

    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, accumulate_grad_batches=accumulate, logger=False, val_check_interval=5,
        limit_val_batches=2, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    batches: Any = [batch(step) for step in range(17 * accumulate)]
    data = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(module, data, data, ckpt_path=resume)
    return trainer


lightning = pytest.mark.filterwarnings(
    # Advice on how to load data faster; and Lightning's use of something that torch deprecates.
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec.* is deprecated:FutureWarning",
)


@lightning
@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightning_trains_like_a_plain_loop(accumulate: int) -> None:
    module = lightning_module(OFTEN)
    with_lightning(module, 1, accumulate=accumulate)
    other = lightning_module(OFTEN)
    train(other, other.configure_optimizers(), range(17), other.keeper, accumulate)
    assert module.keeper.steps == 17
    assert replaced(module.keeper) > 20
    assert_same(module, other)
    assert_same_state(module.keeper, other.keeper)


@lightning
def test_lightning_off_changes_no_bit() -> None:
    module = lightning_module(OFF)
    with_lightning(module, 1)
    assert_same(module.network, bare(17))


@lightning
@few_methods
def test_lightning_resumes(method: Intervention, tmp_path: Path) -> None:
    whole = lightning_module(method)
    with_lightning(whole, 2)
    module = lightning_module(method)
    trainer = with_lightning(module, 1)
    trainer.save_checkpoint(tmp_path / "lightning.ckpt")
    if method is OFTEN:
        assert ages(module.keeper)

    module = lightning_module(method, seed=1)
    with_lightning(module, 2, tmp_path / "lightning.ckpt")
    assert module.keeper.steps == 34
    assert_same(module, whole)
    assert_same_state(module.keeper, whole.keeper)


# --- stable-baselines3 ----------------------------------------------------------------------------------------------


def agent(name: str) -> Any:
    import stable_baselines3

    settings: dict[str, dict[str, Any]] = {
        "PPO": {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "policy_kwargs": {"net_arch": [24, 20]}},
        "SAC": {"learning_starts": 20, "batch_size": 16, "policy_kwargs": {"net_arch": [16, 16]}},
        "DQN": {"learning_starts": 20, "batch_size": 16, "train_freq": 1, "target_update_interval": 10},
    }
    where = "Pendulum-v1" if name == "SAC" else "CartPole-v1"
    return getattr(stable_baselines3, name)("MlpPolicy", where, seed=0, device="cpu", **settings[name])


def keep_agent(name: str, agent: Any, method: Intervention) -> list[Keeper]:
    return {"PPO": keep_ppo, "SAC": keep_sac, "DQN": keep_dqn}[name](agent, method)


def observations(agent: Any) -> Tensor:
    """Some of them: units that are silent on all examples have no effect that could be seen."""
    space = agent.observation_space
    space.seed(0)
    found, _ = agent.policy.obs_to_tensor(numpy.stack([space.sample() for _ in range(64)]))
    return found


def keep_ppo(agent: Any, method: Intervention) -> list[Keeper]:
    policy = agent.policy

    def factory() -> nn.Module:
        return agent.policy_class(
            agent.observation_space, agent.action_space, agent.lr_schedule, use_sde=agent.use_sde, **agent.policy_kwargs
        )

    return [perennial.attach(method, policy, policy.optimizer, example=observations(agent), factory=factory)]


def keep_sac(agent: Any, method: Intervention) -> list[Keeper]:
    actor, critic, example = agent.actor, agent.critic, observations(agent)
    action = torch.zeros(len(example), *agent.action_space.shape)
    return [
        perennial.attach(method, actor, actor.optimizer, example=example),
        perennial.attach(method, critic, critic.optimizer, example=(example, action), seed=1),
    ]


def keep_dqn(agent: Any, method: Intervention) -> list[Keeper]:
    return [perennial.attach(method, agent.q_net, agent.policy.optimizer, example=observations(agent))]


AGENTS = {"PPO": 160, "SAC": 60, "DQN": 60}
"""Environment steps, by algorithm."""
every_agent = pytest.mark.parametrize("name", AGENTS)
some_agents = pytest.mark.parametrize(
    "name", ["PPO", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SAC", "DQN"))]
)
"""The same, slow but for one."""


@every_agent
def test_sb3_replaces_units(name: str) -> None:
    student = agent(name)
    keepers = keep_agent(name, student, OFTEN)
    student.learn(AGENTS[name])
    for keeper in keepers:
        assert keeper.steps == (20 if name == "PPO" else 40)
        assert all(count > 10 for count in keeper.replaced().values()), keeper
        assert_fresh_optimizer_state(keeper)
    layers = {layer for keeper in keepers for layer in keeper.replaced()}
    assert (
        layers
        == {
            "PPO": {f"mlp_extractor.{half}_net.{number}" for half in ("policy", "value") for number in (0, 2)},
            "SAC": {"latent_pi.0", "latent_pi.2", "qf0.0", "qf0.2", "qf1.0", "qf1.2"},
            "DQN": {"q_net.0", "q_net.2"},
        }[name]
    )


def test_sb3_draws_fresh_weights_of_ppo_as_its_factory_does() -> None:
    """Orthogonal with a gain that is seen in the constructor alone."""
    student = agent("PPO")
    (keeper,) = keep_ppo(student, OFTEN)
    assert keeper.units.initial["mlp_extractor.policy_net.2.weight"].kind == "orthogonal"
    student.learn(64)


@some_agents
def test_sb3_off_changes_no_bit(name: str) -> None:
    student, other = agent(name), agent(name)
    keep_agent(name, student, OFF)
    for one in (student, other):
        one.set_random_seed(3)
        one.learn(AGENTS[name])
    assert_same(student.policy, other.policy)


@some_agents
def test_sb3_resumes(name: str, tmp_path: Path) -> None:
    """Loading makes a new agent whose optimizers have no keeper yet: attach, then load the parameters once more."""
    first = agent(name)
    keepers = keep_agent(name, first, OFTEN)
    first.learn(AGENTS[name])
    path = tmp_path / "agent.zip"
    first.save(path)
    if name != "PPO":
        first.save_replay_buffer(tmp_path / "buffer")

    second = type(first).load(path, env=agent(name).get_env(), device="cpu")
    loaded = keep_agent(name, second, OFTEN)
    assert all(keeper.steps == 0 for keeper in loaded)
    second.set_parameters(path, device="cpu")
    if name != "PPO":
        second.load_replay_buffer(tmp_path / "buffer")
    for keeper, other in zip(keepers, loaded, strict=True):
        assert ages(other) == ages(keeper)
        assert_same_state(keeper, other)

    first.set_env(agent(name).get_env())
    for one in (first, second):  # an environment is not part of a checkpoint: both begin an episode
        one.set_random_seed(5)
        one.learn(AGENTS[name] // 2, reset_num_timesteps=False)
    assert_same(first.policy, second.policy)
    for keeper, other in zip(keepers, loaded, strict=True):
        assert keeper.steps > 40 or name == "PPO"
        assert_same_state(keeper, other)


# --- data-parallel processes ----------------------------------------------------------------------------------------


def intervention_cases() -> dict[str, Intervention]:
    """A setting at work of every intervention that there is."""
    from references import cases

    found: dict[str, Intervention] = {}
    for case in cases():
        if issubclass(case.method, Intervention):
            (method,) = case.made()[1]
            found[str(case)] = method
    return found


@dataclasses.dataclass
class Share:
    """The part of every batch that is one process's."""

    rank: int
    processes: int
    step: int = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        x, y = batch(self.step, 16)
        return x[self.rank :: self.processes], y[self.rank :: self.processes]


STEPS = 120
"""Of a data-parallel job and of the run that it must equal: every method replaces several units in them."""


def process(rank: int, processes: int, folder: str, labels: list[str]) -> None:
    """What one process of a data-parallel job does: trains with each method, and writes down what came out."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    share = Share(rank, processes)
    known = METHODS if METHODS.keys() >= {first_is(label)[0] for label in labels} else intervention_cases()
    found: dict[str, Any] = {"refused": refusals_of_sharded_models()}
    for label in labels:
        name, first = first_is(label)
        model, _, keeper = with_ddp(share, known[name], range(STEPS), first)
        assert keeper is not None
        found[label] = (model.state_dict(), pytree.tree_leaves(keeper.state), keeper.replaced())
    assert_same(with_ddp(share, OFF, range(20))[0], with_ddp(share, None, range(20))[0])
    found["accumulated"] = with_ddp(share, OFTEN, range(60), accumulate=2)[0].state_dict()
    found["resumed"] = resumed_with_ddp(share)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def first_is(label: str) -> tuple[str, bool]:
    """The method's name, and whether it is attached before the model is wrapped."""
    return label.removesuffix(", attached first"), label.endswith(", attached first")


def with_ddp(
    share: Share,
    method: Intervention | None,
    steps: range,
    first: bool = False,
    accumulate: int = 1,
    load: dict[str, Any] | None = None,
) -> tuple[nn.Module, torch.optim.Optimizer, Keeper | None]:
    model = network(seed=0 if first else share.rank)  # wrapping gives all processes the weights of process 0
    optimizer, example, keeper = adam(model), batch(0)[0], None

    def loss() -> Tensor:
        x, y = share.batch()
        return F.cross_entropy(model(x), y)

    more = {"loss": loss} if method is not None and "loss" in method.needs else {}
    if method is not None and first:
        keeper = perennial.attach(method, model, optimizer, example=example, **more)
    parallel = DistributedDataParallel(model)
    if method is not None and not first:
        keeper = perennial.attach(method, parallel, optimizer, example=example, **more)
    if load is not None:
        model.load_state_dict(load["model"])
        optimizer.load_state_dict(load["optimizer"])
    for step in steps:
        for part in range(accumulate):
            share.step = step * accumulate + part
            x, y = share.batch()
            with parallel.no_sync() if part < accumulate - 1 else contextlib.nullcontext():
                objective = F.cross_entropy(parallel(x), y)
                if keeper is not None and isinstance(method, Regulariser) and method.coupled:
                    objective = objective + keeper.penalty()
                (objective / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        if keeper is not None and step % 20 == 19:
            keeper.new_task()
    return model, optimizer, keeper


def resumed_with_ddp(share: Share) -> dict[str, Tensor]:
    """All steps in two parts; the second from what process 0 has saved."""
    model, optimizer, _ = with_ddp(share, OFTEN, range(17))
    saved = [{"model": model.state_dict(), "optimizer": optimizer.state_dict()}]
    torch.distributed.broadcast_object_list(saved)
    return with_ddp(share, OFTEN, range(17, STEPS), load=saved[0])[0].state_dict()


def in_processes(processes: int, folder: Path, labels: list[str]) -> list[dict[str, Any]]:
    torch.multiprocessing.spawn(process, (processes, str(folder), labels), nprocs=processes)
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def whole_batch(method: Intervention) -> tuple[nn.Module, Keeper]:
    model = network()
    optimizer = adam(model)
    keeper = perennial.attach(method, model, optimizer, example=batch(0)[0])
    for step in range(STEPS):
        x, y = batch(step, 16)
        loss = F.cross_entropy(model(x), y)
        if isinstance(keeper.method, Regulariser) and keeper.method.coupled:
            loss = loss + keeper.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            keeper.new_task()
    return model, keeper


def refusals_of_sharded_models() -> list[str]:
    """What attaching says to a model that FSDP has flattened, and to one of DTensors."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    flattened, sharded = FullyShardedDataParallel(network(), device_id=torch.device("cpu")), network()
    fully_shard(sharded)
    found = []
    for model in (flattened, sharded):
        with pytest.raises(ValueError, match="no hidden units") as refusal:
            perennial.attach(OFTEN, model, adam(model), example=batch(0)[0])
        found.append(str(refusal.value))
    return found


WITH_DDP = [*METHODS, "continual backprop, attached first", "l2 init, attached first"]


@pytest.mark.parametrize(("processes", "labels"), [
    pytest.param(2, ["continual backprop", "l2 init, attached first"], id="2, some"),
    pytest.param(2, WITH_DDP, id="2", marks=pytest.mark.slow),
    pytest.param(4, WITH_DDP, id="4", marks=pytest.mark.slow),
])  # fmt: skip
def test_ddp_processes_stay_equal_and_train_like_one(processes: int, labels: list[str], tmp_path: Path) -> None:
    ranks = in_processes(processes, tmp_path, labels)
    for label in labels:
        weights, state, count = ranks[0][label]
        for other, their_state, their_count in (rank[label] for rank in ranks[1:]):
            assert count == their_count, label
            assert all(torch.equal(w, other[name]) for name, w in weights.items()), label
            assert all(torch.equal(a, b) for a, b in zip(state, their_state, strict=True)), label
        model, keeper = whole_batch(METHODS[first_is(label)[0]])
        assert count == keeper.replaced(), label
        assert sum(count.values()) > 1 or not count
        for name, w in model.state_dict().items():
            torch.testing.assert_close(weights[name], w, rtol=1e-3, atol=1e-4, msg=lambda m, k=label: f"{k}: {m}")
    flattened, sharded = ranks[0]["refused"]
    assert "flattened by FSDP" in flattened
    assert "a DTensor: its rows lie on several devices" in sharded
    for what in ("accumulated", "resumed"):
        for rank in ranks[1:]:
            assert all(torch.equal(w, rank[what][name]) for name, w in ranks[0][what].items()), what
    # DDP adds up the gradients of its first step in another order, which shows where there are more than two of them.
    exact = {"rtol": 0.0, "atol": 0.0} if processes == 2 else {"rtol": 1e-3, "atol": 1e-4}
    for name, w in ranks[0]["continual backprop"][0].items():
        torch.testing.assert_close(ranks[0]["resumed"][name], w, **exact)


@pytest.mark.slow
def test_ddp_processes_stay_equal_with_every_method(tmp_path: Path) -> None:
    labels = list(intervention_cases())
    ranks = in_processes(2, tmp_path, labels)
    apart = [
        label for label in labels
        if not all(torch.equal(w, ranks[1][label][0][name]) for name, w in ranks[0][label][0].items())
    ]  # fmt: skip
    assert not apart


# --- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler() -> Iterator[None]:
    """Nothing is compiled yet, and nothing attached that has told the compiler to look at hooks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        yield
    torch._dynamo.reset()


def compiled(method: Intervention, **settings: Any) -> tuple[nn.Module, Keeper]:
    model = network()
    optimizer = adam(model)
    keeper = perennial.attach(method, model, optimizer, example=batch(0)[0])
    train(torch.compile(model, **settings), optimizer, range(30), keeper)
    return model, keeper


@pytest.mark.usefixtures("compiler")
@few_methods
def test_compiled_after_attaching(method: Intervention) -> None:
    """The hooks are part of the one graph."""
    model, keeper = compiled(method, backend="aot_eager", fullgraph=True)
    expected, other = plain(method, 30)
    assert keeper.steps == 30
    assert replaced(keeper) > 1 or not keeper.replaced()
    assert_same(model, expected)
    assert_same_state(keeper, other)


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings(
    # After a graph break the compiler asks every tensor for its gradient. It hides what torch says to that by a filter,
    # which does not help where warnings are errors.
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
def test_compiled_with_methods_that_need_signals() -> None:
    """Right, at the price of a graph break at every layer that is kept."""
    method = dataclasses.replace(OFTEN, utility="taylor")
    model, keeper = compiled(method, backend="aot_eager")
    expected, other = plain(method, 30)
    assert replaced(keeper) > 40
    assert_same(model, expected)
    assert_same_state(keeper, other)
    assert torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_by_inductor() -> None:
    model, keeper = compiled(OFTEN, backend="inductor", fullgraph=True)
    expected, other = plain(OFTEN, 30)
    assert keeper.replaced() == other.replaced()
    assert replaced(keeper) > 40
    for name, w in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], w, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("compiler")
def test_compiled_off_changes_no_bit() -> None:
    model, _ = compiled(OFF, backend="aot_eager")
    other = network()
    train(torch.compile(other, backend="aot_eager"), adam(other), range(30))
    assert_same(model, other)


@pytest.mark.usefixtures("compiler")
def test_compiled_first_is_fine_until_the_first_call() -> None:
    model = network()
    fast = torch.compile(model, backend="aot_eager")
    optimizer = adam(model)
    keeper = perennial.attach(OFTEN, fast, optimizer, example=batch(0)[0])
    train(fast, optimizer, range(30))
    expected, other = plain(OFTEN, 30)
    assert_same(model, expected)
    assert_same_state(keeper, other)


@pytest.mark.usefixtures("compiler")
def test_compiled_resumes_and_accumulates() -> None:
    def run(model: nn.Module, start: nn.Module, steps: range, load: Any = None) -> tuple[dict[str, Any], Keeper]:
        optimizer = adam(start)
        keeper = perennial.attach(OFTEN, model, optimizer, example=batch(0)[0])
        if load is not None:
            start.load_state_dict(load["model"])
            optimizer.load_state_dict(load["optimizer"])
        train(model, optimizer, steps, keeper, accumulate=2)
        return copy.deepcopy({"model": start.state_dict(), "optimizer": optimizer.state_dict()}), keeper

    def fast(model: nn.Module) -> Any:
        return torch.compile(model, backend="aot_eager", fullgraph=True)

    first, second = network(), network(seed=1)
    saved, _ = run(fast(first), first, range(17))
    _, keeper = run(fast(second), second, range(17, 31), saved)
    expected, other = plain(OFTEN, 31, accumulate=2)
    assert_same(second, expected)
    assert_same_state(keeper, other)


@pytest.mark.usefixtures("compiler")
def test_compiled_in_place() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    fast, model = Model(), Model()
    keepers = []
    for one in (fast, model):
        optimizer = adam(one)
        keepers.append(perennial.attach(OFTEN, one, optimizer, example=batch(0)[0]))
        if one is fast:
            one.compile(backend="aot_eager", fullgraph=True)
        train(one, optimizer, range(30))
    assert replaced(keepers[0]) > 40
    assert_same(fast, model)
    assert_same_state(*keepers)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("same", [
    pytest.param(True, id="the model itself"),
    pytest.param(False, id="another of its class", marks=pytest.mark.slow),
])  # fmt: skip
def test_compiled_before_the_first_attach_is_an_error_until_reset(same: bool) -> None:
    model, other = network(), network(seed=1)
    fast, optimizer = torch.compile(model, backend="aot_eager"), adam(model)
    if same:
        train(fast, optimizer, range(2))
    else:
        train(torch.compile(other, backend="aot_eager"), adam(other), range(2))
    keeper = perennial.attach(OFTEN, fast, optimizer, example=batch(0)[0])
    with pytest.raises(RuntimeError, match=r"attach before the first compiled call, or call torch.compiler.reset\(\)"):
        train(fast, optimizer, range(2, 3))
    torch.compiler.reset()
    optimizer.zero_grad()
    train(fast, optimizer, range(3, 20))
    assert replaced(keeper) > 20


@pytest.mark.usefixtures("compiler")
def test_compiled_models_of_one_class_are_kept_apart() -> None:
    """The compiled code of a kept model does not serve a bare one, whose passes would reach the keeper."""
    models = [network(seed) for seed in range(3)]
    optimizers = [adam(model) for model in models]
    keeper = perennial.attach(OFTEN, models[0], optimizers[0], example=batch(0)[0])
    fast = [torch.compile(model, backend="aot_eager") for model in models]
    for step in range(20):
        for one in fast:
            F.cross_entropy(one(batch(step)[0]), batch(step)[1]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    late = perennial.attach(OFTEN, models[2], optimizers[2], example=batch(0)[0])  # it is noticed as well
    train(fast[2], optimizers[2], range(20, 40))
    assert replaced(late) > 20
    expected, other = plain(OFTEN, 20)
    assert_same(models[0], expected)
    assert_same_state(keeper, other)


# --- what is not carried ----------------------------------------------------------------------------------------------


def test_distributed_checkpoints_need_the_state_apart() -> None:
    """get_optimizer_state_dict keeps parameter states and groups alone."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, keeper = plain(OFTEN, 17)
    optimizer = keeper._optimizer
    saved = get_optimizer_state_dict(model, optimizer)
    assert "perennial" not in saved
    beside = optimizer.state_dict()["perennial"]

    other = network(seed=1)
    theirs = adam(other)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, theirs, saved)  # makes a step of its own, so attach after it
    again = perennial.attach(OFTEN, other, theirs, example=batch(0)[0])
    theirs.load_state_dict(theirs.state_dict() | {"perennial": beside})
    train(other, theirs, range(17, 31), again)
    whole, unbroken = plain(OFTEN, 31)
    assert_same(other, whole)
    assert_same_state(again, unbroken)


def test_one_optimizer_for_every_parameter_is_refused() -> None:
    """As in setups that step in the backward pass: no optimizer trains a unit's incoming and outgoing weights."""
    model = network()
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    with pytest.raises(ValueError, match="not in the optimizer"):
        perennial.attach(OFTEN, model, optimizers[0], example=batch(0)[0])


# --- the guide ------------------------------------------------------------------------------------------------------

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "hosts.md"


def test_the_guide_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", GUIDE.read_text(encoding="utf-8")))
    sources = [Path(__file__), Path(__file__).with_name("test_attach.py")]
    known = set(re.findall(r"def (test_\w+)", "".join(path.read_text(encoding="utf-8") for path in sources)))
    assert named
    assert not named - known


def blocks_of_the_guide() -> list[str]:
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def is_program(block: str) -> bool:
    return block.startswith(("import ", "from "))


PROGRAMS = [block for block in blocks_of_the_guide() if is_program(block)]


@lightning
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("block", PROGRAMS, ids=[f"program {number}" for number in range(len(PROGRAMS))])
def test_the_guide_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerator: Callable[..., Any]
) -> None:
    accelerator()
    monkeypatch.chdir(tmp_path)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    exec(compile(block, str(GUIDE), "exec"), {"__name__": "__main__"})


def test_the_guide_shows_lines_of_this_file() -> None:
    blocks = [textwrap.dedent(block) for block in blocks_of_the_guide() if not is_program(block)]
    assert blocks

    def bare_lines(text: str) -> str:
        return "\n".join(line.strip() for line in text.splitlines() if line.strip())

    here = bare_lines(Path(__file__).read_text(encoding="utf-8"))
    for block in blocks:
        assert bare_lines(block) in here, textwrap.indent(block, "  ")
