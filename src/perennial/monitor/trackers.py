"""Readings on their way to trackers and hosts. Each needs its own library, and imports it when it is made.

A tracker is a function of a reading, for ``Monitor(..., to=[...])``. A host's callback makes the monitor itself, when
training begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perennial.monitor.monitor import Monitor
from perennial.monitor.reading import Reading

Tracker = Callable[[Reading], None]


def tensorboard(writer: Any) -> Tracker:
    """Scalars for a ``torch.utils.tensorboard.SummaryWriter``."""

    def tell(reading: Reading) -> None:
        for name, value in reading.flat().items():
            writer.add_scalar(name, value, reading.step)

    return tell


def wandb(run: Any) -> Tracker:
    """Metrics of a Weights & Biases run, over ``plasticity/step`` as their own axis.

    W&B wants its global step to grow with every call; a reading may come between two of the training loop's.
    """
    run.define_metric("plasticity/step")
    run.define_metric("plasticity/*", step_metric="plasticity/step")

    def tell(reading: Reading) -> None:
        run.log({"plasticity/step": reading.step, **reading.flat()})

    return tell


def mlflow(run_id: str | None = None) -> Tracker:
    """Metrics of an MLflow run; None: the active one."""
    import mlflow as library

    def tell(reading: Reading) -> None:
        library.log_metrics(reading.flat(), step=reading.step, run_id=run_id)

    return tell


def trackio() -> Tracker:
    """Metrics of the trackio run that ``trackio.init`` began."""
    import trackio as library

    def tell(reading: Reading) -> None:
        library.log(reading.flat(), step=reading.step)

    return tell


def lightning(example: Any, **options: Any) -> Any:
    """A Lightning callback with a monitor on the module and its first optimizer; readings go to the trainer's loggers.

    Args:
        example: as for :class:`~perennial.monitor.Monitor`; the module's own ``forward`` takes it.
        **options: of the monitor. Afterwards it is ``callback.monitor``; its state is in Lightning's checkpoints.
    """
    from lightning.pytorch import Callback

    class MonitorCallback(Callback):
        monitor: Monitor | None = None
        saved: dict[str, Any] | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            def tell(reading: Reading) -> None:
                for logger in trainer.loggers:
                    logger.log_metrics(reading.flat(), step=reading.step)

            told = (*options.get("to", ()), tell)
            self.monitor = Monitor(
                pl_module,
                _moved(example, pl_module.device),
                **{**options, "to": told, "optimizer": trainer.optimizers[0]},
            )
            if self.saved is not None:
                self.monitor.load_state_dict(self.saved)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            assert self.monitor is not None
            self.monitor.remove()

        def state_dict(self) -> dict[str, Any]:
            return {} if self.monitor is None else self.monitor.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.saved = state_dict or None

    return MonitorCallback()


def huggingface(trainer: Any, example: Any, **options: Any) -> Any:
    """Add a monitor to a ``transformers.Trainer``; readings go through ``trainer.log`` to whatever it reports to.

    Args:
        trainer: the trainer.
        example: as for :class:`~perennial.monitor.Monitor`, such as a batch of the data collator; labels may be in it.
        **options: of the monitor.

    Returns:
        The callback that was added; once training has begun its monitor is ``callback.monitor``.
    """
    from transformers import TrainerCallback

    class MonitorCallback(TrainerCallback):
        monitor: Monitor | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self.monitor is not None:
                self.monitor.remove()
            told = (*options.get("to", ()), lambda reading: trainer.log(reading.flat()))
            self.monitor = Monitor(
                given["model"],
                _moved(example, args.device),
                **{**options, "to": told, "optimizer": given["optimizer"]},
            )
            self.monitor.steps = state.global_step

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            assert self.monitor is not None
            self.monitor.remove()

    callback = MonitorCallback()
    trainer.add_callback(callback)
    return callback


def stable_baselines3(example: Any = None, **options: Any) -> Any:
    """A stable-baselines3 callback with a monitor on the policy; readings go to SB3's logger.

    For agents whose policy has one optimizer (PPO, A2C, DQN). The logger writes at the end of a rollout what it was
    given last.

    Args:
        example: observations as the policy's ``forward`` takes them. None: those of the first rollout, for algorithms
            with a rollout buffer.
        **options: of the monitor. Once training has begun it is ``callback.monitor``.
    """
    from stable_baselines3.common.callbacks import BaseCallback

    class MonitorCallback(BaseCallback):
        monitor: Monitor | None = None

        def _start(self, observations: Any) -> None:
            def tell(reading: Reading) -> None:
                for name, value in reading.flat().items():
                    self.logger.record(name, value)

            told = (*options.get("to", ()), tell)
            policy = self.model.policy
            network = getattr(policy, "q_net", policy)
            self.monitor = Monitor(network, observations, **{**options, "to": told, "optimizer": policy.optimizer})

        def _on_training_start(self) -> None:
            if self.monitor is None and example is not None:
                self._start(_moved(example, self.model.device))

        def _on_rollout_end(self) -> None:
            if self.monitor is None:
                buffer = getattr(self.model, "rollout_buffer", None)
                if buffer is None:
                    raise ValueError(
                        f"{type(self.model).__name__} keeps no rollouts to take observations from; give example="
                    )
                if isinstance(buffer.observations, dict):
                    raise ValueError("the observations are a dict; give example=, as the policy takes them")
                seen = buffer.observations.reshape(-1, *buffer.observations.shape[2:])[:256]
                self._start(torch.as_tensor(seen, device=self.model.device))

        def _on_step(self) -> bool:
            return True

    return MonitorCallback()


def _moved(example: Any, device: Any) -> Any:
    if isinstance(example, Tensor):
        return example.to(device)
    if isinstance(example, (tuple, list)):
        return tuple(_moved(part, device) for part in example)
    if hasattr(example, "items"):
        return {name: _moved(part, device) for name, part in example.items()}
    return example
