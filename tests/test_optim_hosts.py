"""The optimizers in the real libraries: each trains as in a plain loop, and resumes with the same bits."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hosts import Sentences, assert_same, batch, bert, lightning, network
from torch import Tensor, nn
from torch.nn import functional as F

import perennial
from perennial import optim

MAKERS: dict[str, Any] = {
    "UPGD": functools.partial(optim.UPGD, lr=0.01, noise_std=0.1, weight_decay=0.01),
    "AdaUPGD": functools.partial(optim.AdaUPGD, lr=0.003, noise_std=0.1),
}
"""With and without moments; every optimizer has the same shell."""
every = pytest.mark.parametrize("make", [pytest.param(m, id=n) for n, m in MAKERS.items()])
every_slowly = pytest.mark.parametrize(
    "make", [pytest.param(m, id=n, marks=() if n == "UPGD" else pytest.mark.slow) for n, m in MAKERS.items()]
)


def plain(make: Any, steps: int) -> nn.Module:
    model = network()
    optimizer = make(model.parameters())
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@every
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=20, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [5]
        ),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    ],
    ids=["one cycle", "cosine", "sequential", "lambda"],
)
def test_schedulers_set_the_step_size(make: Any, schedule: Any) -> None:
    scheduled, by_hand = network(), network()
    optimizer, other = make(scheduled.parameters()), make(by_hand.parameters())
    scheduler = schedule(optimizer)
    for step in range(12):
        x, y = batch(step)
        for group, ours in zip(other.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = ours["lr"]
        for model, own in ((scheduled, optimizer), (by_hand, other)):
            own.zero_grad()
            F.cross_entropy(model(x), y).backward()
            own.step()
        scheduler.step()
    assert_same(scheduled, by_hand)


@every
def test_grad_scaler_under_autocast(make: Any) -> None:
    scaled, by_hand = network(), network()
    optimizer, other = make(scaled.parameters()), make(by_hand.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(8):
        x, y = batch(step)
        for model, own in ((scaled, optimizer), (by_hand, other)):
            own.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            if own is optimizer:
                scaler.scale(loss).backward()
                scaler.step(own)
                scaler.update()
            else:
                loss.backward()
                own.step()
    assert_same(scaled, by_hand)  # a power of two scales without rounding


@every
def test_accelerate_trains_and_resumes(make: Any, tmp_path: Path) -> None:
    from accelerate import Accelerator

    def host(seed: int) -> tuple[Any, Any, Any]:
        accelerator = Accelerator(cpu=True)
        model = network(seed)
        return accelerator, *accelerator.prepare(model, make(model.parameters()))

    def go(accelerator: Any, model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            x, y = batch(step)
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()

    accelerator, model, optimizer = host(0)
    go(accelerator, model, optimizer, range(7))
    accelerator.save_state(tmp_path)
    accelerator, model, optimizer = host(1)
    accelerator.load_state(tmp_path)
    go(accelerator, model, optimizer, range(7, 15))
    assert_same(model, plain(make, 15))


@every_slowly
def test_trainer_trains_and_resumes(make: Any, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def run(folder: Path, max_steps: int, resume: Path | None = None, seed: int = 0) -> Any:
        model = bert(seed)
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=max_steps, save_steps=6, per_device_train_batch_size=4, use_cpu=True,
            max_grad_norm=0.0, bf16=False, report_to=[], disable_tqdm=True, logging_strategy="no",
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=Sentences(), optimizers=(make(model.named_parameters()), None)
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return model

    whole = run(tmp_path / "whole", 12)
    assert not all(torch.equal(p, q) for p, q in zip(whole.parameters(), bert().parameters(), strict=True))
    run(tmp_path / "parts", 6)  # the schedule of a shorter run differs, so what is resumed is the long one
    assert_same(run(tmp_path / "again", 12, tmp_path / "whole" / "checkpoint-6", seed=1), whole)


@lightning
@every_slowly
def test_lightning_trains_and_resumes(make: Any, tmp_path: Path) -> None:
    from lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self, seed: int = 0) -> None:
            super().__init__()
            self.network = network(seed)

        def training_step(self, given: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.network(given[0]), given[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return make(self.network.parameters())  # type: ignore[no-any-return]

    def run(module: Any, epochs: int, resume: Path | None = None) -> Any:
        trainer = Trainer(
            accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        batches: Any = [batch(step) for step in range(5)]
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=resume)
        return trainer

    first = Module()
    run(first, 1).save_checkpoint(tmp_path / "half.ckpt")
    assert_same(first.network, plain(make, 5))
    resumed, whole = Module(seed=1), Module()
    run(resumed, 2, tmp_path / "half.ckpt")
    run(whole, 2)
    assert_same(resumed.network, whole.network)


@pytest.mark.parametrize("name", ["PPO", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SAC", "DQN"))])
def test_sb3_builds_and_saves_it(name: str, tmp_path: Path) -> None:
    import stable_baselines3

    settings: dict[str, dict[str, Any]] = {
        "PPO": {"n_steps": 32, "batch_size": 16, "n_epochs": 2},
        "SAC": {"learning_starts": 20, "batch_size": 16},
        "DQN": {"learning_starts": 20, "batch_size": 16, "train_freq": 1},
    }
    kind = getattr(stable_baselines3, name)
    agent = kind(
        "MlpPolicy",
        "Pendulum-v1" if name == "SAC" else "CartPole-v1",
        seed=0,
        device="cpu",
        policy_kwargs={"optimizer_class": optim.AdaUPGD, "optimizer_kwargs": {"noise_std": 1e-3}},
        **settings[name],
    )
    agent.learn(60)
    optimizer = agent.actor.optimizer if name == "SAC" else agent.policy.optimizer
    assert isinstance(optimizer, perennial.optim.AdaUPGD)
    count = int(next(iter(optimizer.state.values()))["step"])
    assert count > 2
    agent.save(tmp_path / "agent")
    again = kind.load(tmp_path / "agent", env=agent.get_env(), device="cpu")
    loaded = again.actor.optimizer if name == "SAC" else again.policy.optimizer
    for old, new in zip(optimizer.state.values(), loaded.state.values(), strict=True):
        assert torch.equal(old["utility"], new["utility"])
        assert int(new["step"]) == count
    again.learn(60, reset_num_timesteps=False)
    assert int(next(iter(loaded.state.values()))["step"]) > count
