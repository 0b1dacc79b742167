"""A monitor changes nothing, reads what the metrics say, and names trouble in words."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import perennial
from perennial import Monitor, metrics
from perennial.monitor import DEFAULT, THRESHOLDS, Finding, Reading, Threshold
from perennial.monitor.findings import findings

EVERYTHING = [n for n, m in metrics.METRICS.items() if m.of in ("units", "features", "weights", "change", "gradients")]


class Drawing(nn.Module):
    """With all that a reading could disturb: batch norm, dropout, random numbers of its own, a buffer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.hidden, self.drop, self.out = nn.Linear(6 * 4 * 4, 12), nn.Dropout(0.3), nn.Linear(12, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = x + 0.01 * torch.randn_like(x) * np.random.rand()
        h = torch.relu(self.norm(self.conv(x))).flatten(1)
        return self.out(self.drop(torch.tanh(self.hidden(h))))  # type: ignore[no-any-return]


def images(seed: int, count: int = 16) -> torch.Tensor:
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def train(monitored: bool, steps: int = 25, kind: str = "plain") -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(1)
    np.random.seed(1)
    model = Drawing()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    monitor = Monitor(model, images(99), optimizer=optimizer, every=4, metrics=EVERYTHING) if monitored else None
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images(step)), torch.arange(16) % 3).backward()
        optimizer.step()
        if monitor is not None and step % 7 == 0:
            model.eval() if step % 2 else model.train()
            before = model.training
            monitor.read()
            assert model.training is before
        elif step % 7 == 0:
            model.eval() if step % 2 else model.train()
    return model, optimizer, monitor


def test_a_monitored_run_is_the_same_to_the_bit() -> None:
    """Check 33: modes, random states, gradients, buffers, parameters, optimizer state."""
    states = []
    for monitored in (False, True):
        model, optimizer, _ = train(monitored)
        grads = [p.grad for p in model.parameters()]
        moments = [v for s in optimizer.state.values() for v in s.values()]
        tensors = [*model.state_dict().values(), *grads, *moments, torch.get_rng_state(), torch.rand(3)]
        states.append((tensors, np.random.get_state()[1], [m.training for m in model.modules()], model._forward_hooks))
    for a, b in zip(states[0][0], states[1][0], strict=True):
        assert torch.equal(a, b)
    assert np.array_equal(states[0][1], states[1][1])
    assert states[0][2:] == states[1][2:]


def test_readings_are_what_the_metrics_say() -> None:
    model, _, monitor = train(True)
    reading = monitor.read()
    assert [r.step for r in monitor.history] == [1, 4, 8, 8, 12, 15, 16, 20, 22, 24, 25]
    twin = copy.deepcopy(model).eval()
    torch.manual_seed(0)
    np.random.seed(0)
    x = images(99)  # the model's own noise is drawn from the global generators
    torch.manual_seed(3)
    np.random.seed(3)
    again = monitor.read()
    torch.manual_seed(3)
    np.random.seed(3)
    with torch.no_grad():
        x = x + 0.01 * torch.randn_like(x) * np.random.rand()
        conv = torch.relu(twin.norm(twin.conv(x)))
        hidden = torch.tanh(twin.hidden(conv.flatten(1)))
    expected = {
        "conv": {"dead_units": metrics.dead_units(conv), "dormant_units": metrics.dormant_units(conv)},
        "hidden": {
            "saturated_units": metrics.saturated_units(hidden),
            "effective_rank_entropy": metrics.effective_rank_entropy(hidden),
            "rank_99": metrics.rank_99(hidden),
            "numerical_rank": metrics.numerical_rank(hidden),
            "feature_activity": metrics.feature_activity(hidden, low=-1, high=1),
            "duplicate_units": metrics.duplicate_units(hidden),
        },
    }
    for layer, values in expected.items():
        for name, value in values.items():
            assert again.layers[layer][name] == pytest.approx(float(value), rel=1e-6), (layer, name)
    assert again.network["dormant_units"] == pytest.approx(float(metrics.dormant_units([conv, hidden])))
    assert again.network["effective_rank_entropy"] == again.layers["hidden"]["effective_rank_entropy"]
    params = dict(model.named_parameters())
    assert again.network["weight_magnitude"] == pytest.approx(float(metrics.weight_magnitude(params)))
    assert again.network["gradient_norm_l2"] == pytest.approx(
        math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    )
    assert again.network["distance_l2"] > 0
    assert "dead_units" not in again.layers["hidden"]
    assert "units behind tanh are never exactly zero" in again.inapplicable["hidden"]["dead_units"]
    assert again.units == {"conv": 6, "hidden": 12}
    assert reading.step == 25


def test_a_monitor_reads_after_every_so_many_steps_until_removed() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told: list[Reading] = []
    monitor = Monitor(model, torch.randn(10, 4), optimizer=optimizer, every=3, to=[told.append])
    for step in range(10):
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        if step == 7:
            monitor.remove()
    assert [r.step for r in told] == [3, 6]
    assert told == monitor.history
    by_hand = Monitor(model, torch.randn(10, 4), every=2)
    assert by_hand.step() is None
    found = by_hand.step()
    assert found is not None
    assert found.step == 2
    assert "gradient_norm_l2" in found.network, "the gradients of the last backward pass are there"
    assert set(found.flat()) >= {"plasticity/dead_units", "plasticity/0/dead_units", "plasticity/weight_magnitude"}
    assert "no reading yet" in str(Monitor(model, torch.randn(10, 4)))


def test_its_state_is_saved_and_loaded(tmp_path: Path) -> None:
    model, _, monitor = train(True)
    torch.save(monitor.state_dict(), tmp_path / "monitor.pt")
    other = Monitor(Drawing(), images(99), every=4, metrics=EVERYTHING)
    other.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
    assert other.steps == 25
    assert other.history == monitor.history
    other._model.load_state_dict(model.state_dict())
    torch.manual_seed(5)
    np.random.seed(5)
    first = monitor.read().network["distance_l2"]
    torch.manual_seed(5)
    np.random.seed(5)
    assert other.read().network["distance_l2"] == first
    with pytest.raises(ValueError, match="of another network or other metrics: "):
        Monitor(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), torch.ones(2, 2)).load_state_dict(
            monitor.state_dict()
        )


def test_what_is_asked_wrongly_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="a monitor cannot read 'sharpness'; it reads dead_units, "):
        Monitor(model, torch.randn(3, 4), metrics=["sharpness"])
    with pytest.raises(ValueError, match="every is 0"):
        Monitor(model, torch.randn(3, 4), every=0)
    with pytest.raises(ValueError, match="no hidden units were found in this network"):
        Monitor(nn.Linear(4, 2), torch.randn(3, 4))
    with pytest.raises(TypeError, match=r"not a torch\.nn\.Module"):
        Monitor(lambda x: x, torch.randn(3, 4))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        Monitor(model, torch.randn(3, 5))
    assert any("while running the model once on example=" in note for note in caught.value.__notes__)
    with pytest.raises(ValueError, match="no reading to draw"):
        Monitor(model, torch.randn(3, 4)).plot("nowhere.svg")


# --- words ----------------------------------------------------------------------------------------------------------


def test_a_network_that_dies_is_told_of_in_words() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2))
    with torch.no_grad():
        model[2].bias.fill_(1.0)  # every unit answers to some input
    monitor = Monitor(model, torch.randn(50, 4), metrics=["dead_units", "dormant_units"])
    monitor.read()
    assert monitor.findings() == []
    assert "Nothing has crossed a threshold." in str(monitor)
    for units in (8, 16):
        monitor.steps += 1000
        with torch.no_grad():
            model[2].bias[:units] = -100.0
        monitor.read()
    found = {finding.metric: finding for finding in monitor.findings()}
    assert found["dead_units"].layers == ("2",)
    assert found["dead_units"].since == 1000
    assert found["dead_units"].value == pytest.approx(0.4)
    assert str(found["dead_units"]) == (
        "Dead units in 2: 40% since step 1,000 (threshold 10%): these units pass on nothing and get no gradient. "
        "Against it: ContinualBackprop, ReDo, SelfNormalizedResets."
    )
    assert found["dormant_units"].since == 2000, "20% at step 1,000 are below the threshold of 25%"
    assert "Dead units in 2" in str(monitor)
    with torch.no_grad():
        model[2].bias[:16] = 1.0
    monitor.read()
    assert "dead_units" not in {finding.metric for finding in monitor.findings()}, "it is over"


def test_since_when_starts_anew_after_a_break() -> None:
    def at(step: int, **values: float) -> Reading:
        return Reading(step, {"weight_magnitude": values.get("weights", 1.0)}, {"a": {"dead_units": values["dead"]}})

    history = [at(0, dead=0.5), at(10, dead=0.0), at(20, dead=0.2), at(30, dead=0.3, weights=2.0)]
    first, second = findings(history, THRESHOLDS)
    assert (first.metric, first.since, first.value, first.first) == ("dead_units", 20, 0.3, 0.5)
    assert (second.metric, second.layers, second.since) == ("weight_magnitude", (), 30)
    assert "2 since step 30 (1 at first; threshold 2 times that)" in str(second)
    assert findings([], THRESHOLDS) == []
    mine = {"dead_units": Threshold(0.4, "at least", "so", ("ReDo",))}
    assert findings(history, mine) == []


def test_every_threshold_and_remedy_exists() -> None:
    for name, threshold in THRESHOLDS.items():
        assert metrics.METRICS[name].of in ("units", "features", "weights")
        for remedy in threshold.remedies:
            assert hasattr(perennial, remedy) or hasattr(perennial.modules, remedy), remedy
    assert set(DEFAULT) <= set(EVERYTHING)
    assert "4 at first; threshold 0.5 of that" in str(Finding("rank_99", ("a",), 1, 1.0, 4.0, THRESHOLDS["rank_99"]))


def test_a_run_that_diverges_goes_on_and_is_told_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    monitor = Monitor(model, torch.randn(10, 4), optimizer=optimizer, every=1)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    assert len(monitor.history) == 6
    first = monitor.findings()[0]
    assert not math.isfinite(first.value)
    assert "are not finite, it has diverged" in str(first)
    monitor.plot(tmp_path / "health.png")


class Merging(nn.Module):
    """As LoRA layers that fold their weights together when they are put into evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.merges = nn.Linear(4, 6), nn.Linear(6, 2), 0

    def train(self, mode: bool = True) -> Merging:
        self.merges += 1
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(x))
        return self.last(hidden) if self.training or len(x) < 8 else x[:, :2]  # type: ignore[no-any-return]


def test_what_a_reading_cannot_see_it_says() -> None:
    model = Merging()
    monitor = Monitor(model, torch.randn(5, 4))
    monitor.read()
    assert model.merges == 0, "modes are set without the module's own train(), which may change weights"
    assert model.training
    monitor.example = torch.randn(9, 4)
    with pytest.raises(ValueError, match="in evaluation mode nothing reads the hidden units of this network"):
        monitor.read()
    with pytest.raises(ValueError, match=r"every is 2\.5; it is a whole number"):
        Monitor(model, torch.randn(5, 4), every=2.5)  # type: ignore[arg-type]
    dead = [Reading(step, {}, {"a": {"rank_99": 0.0}}) for step in (0, 1)]
    assert findings(dead, THRESHOLDS) == [], "what was nothing at first has not fallen"


GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "monitor.md"


def test_the_guide_lists_every_threshold() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for name, threshold in THRESHOLDS.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        value = f"{threshold.value:.0%}" if metrics.METRICS[name].share else f"{threshold.value:g}"
        assert f" {value} " in row
        assert ("first reading" in row) == (threshold.kind != "at least")
        assert row.endswith(f"| {threshold.why} | {', '.join(threshold.remedies)} |")


def _of_the_guide() -> list[str]:
    """Its program, and the line that it adds then."""
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)[:2]


def test_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(_of_the_guide()[0], {})
    assert "Dead units in 2: " in capsys.readouterr().out


@pytest.mark.slow
def test_the_remedy_of_the_guide_helps(capsys: pytest.CaptureFixture[str]) -> None:
    program, remedy = _of_the_guide()
    exec(program.replace("monitor.read()  # how it begins\n", f"monitor.read()\n{remedy}"), {})
    printed = capsys.readouterr().out
    assert "step 2,000" in printed
    assert "Dead units" not in printed
    assert "Effective rank" not in printed


# --- hosts and trackers, the real libraries -------------------------------------------------------------------------


def small() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(10, 4)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from perennial.monitor import trackers

    model, x = small()
    with SummaryWriter(str(tmp_path)) as writer:
        monitor = Monitor(model, x, every=1, to=[trackers.tensorboard(writer)])
        monitor.step(), monitor.step()
    events = EventAccumulator(str(tmp_path)).Reload()
    written = [(event.step, event.value) for event in events.Scalars("plasticity/0/effective_rank_entropy")]
    ranks = [(r.step, r.layers["0"]["effective_rank_entropy"]) for r in monitor.history]
    assert [step for step, _ in written] == [1, 2]
    assert [v for _, v in written] == pytest.approx([v for _, v in ranks])


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    from perennial.monitor import trackers

    model, x = small()
    with wandb.init(mode="offline", project="test", dir=str(tmp_path)) as run:
        monitor = Monitor(model, x, every=1, to=[trackers.wandb(run)])
        run.log({"loss": 1.0}, step=50)  # the loop's own steps run ahead
        monitor.step()
        assert run.summary["plasticity/step"] == 1
        written = run.summary["plasticity/effective_rank_entropy"]
    assert written == pytest.approx(monitor.history[0].network["effective_rank_entropy"])


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    from perennial.monitor import trackers

    mlflow.set_tracking_uri(tmp_path.as_uri())
    model, x = small()
    mlflow.set_experiment("test")
    with mlflow.start_run() as run:
        monitor = Monitor(model, x, every=1, to=[trackers.mlflow()])
        monitor.step(), monitor.step()
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "plasticity/0/dead_units")
    assert [(m.step, m.value) for m in history] == [(r.step, r.layers["0"]["dead_units"]) for r in monitor.history]


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    from perennial.monitor import trackers

    model, x = small()
    trackio.init(project="test", embed=False)
    Monitor(model, x, every=1, to=[trackers.trackio()]).step()
    trackio.finish()
    assert list(tmp_path.rglob("test*.db"))


@pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.*LeafSpec.* is deprecated:FutureWarning",
)
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    from perennial.monitor import trackers

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = small()[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)  # type: ignore[no-any-return]

        def training_step(self, batch: Any, at: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(40, 4), torch.arange(40) % 2), 4)
    quiet = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "default_root_dir": tmp_path,
    }
    callback = trackers.lightning(small()[1], every=5)
    logger = CSVLogger(tmp_path, name="log", version=0)
    trainer = lightning.Trainer(max_epochs=1, logger=logger, callbacks=[callback], **quiet)
    trainer.fit(Module(), data)
    assert [r.step for r in callback.monitor.history] == [5, 10]
    text = (tmp_path / "log" / "version_0" / "metrics.csv").read_text()
    assert "plasticity/net.0/dead_units" in text
    trainer.save_checkpoint(tmp_path / "here.ckpt")
    again = trackers.lightning(small()[1], every=5)
    trainer = lightning.Trainer(max_epochs=2, logger=False, callbacks=[again], **quiet)
    trainer.fit(Module(), data, ckpt_path=tmp_path / "here.ckpt")
    assert [r.step for r in again.monitor.history] == [5, 10, 15, 20]


def test_transformers_trainer(tmp_path: Path) -> None:
    """A fine-tuning run: readings go where the trainer reports, under gradient accumulation too."""
    transformers = pytest.importorskip("transformers")
    from perennial.monitor import trackers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config)
    rows = [{"input_ids": torch.randint(0, 40, (8,)), "labels": k % 2} for k in range(32)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        report_to=[],
        logging_steps=2,
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    batch = {"input_ids": torch.randint(0, 40, (16, 8))}
    callback = trackers.huggingface(trainer, batch, every=3)
    trainer.train()
    assert [r.step for r in callback.monitor.history] == [3, 6]
    logged = [entry for entry in trainer.state.log_history if "plasticity/weight_magnitude" in entry]
    assert [entry["step"] for entry in logged] == [3, 6] or len(logged) == 2
    names = [name for name in logged[0] if "intermediate" in name]
    assert any("dormant_units" in name for name in names)
    assert not any("dead_units" in name for name in names), "GELU has no dead units"


@pytest.mark.parametrize("given", [False, True])
def test_stable_baselines3(given: bool) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.logger import configure

    from perennial.monitor import trackers

    def made() -> Any:  # it seeds the global generators
        agent = sb3.PPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32, n_epochs=2, seed=0, device="cpu")
        agent.set_logger(configure(None, []))
        return agent

    agent = made()
    callback = trackers.stable_baselines3(torch.ones(30, 4) if given else None, every=2)
    agent.learn(192, callback=callback)
    assert [r.step for r in callback.monitor.history] == [2, 4, 6, 8, 10, 12]
    last = callback.monitor.history[-1]
    assert "saturated_units" in last.network
    assert "dead_units" not in last.network, "SB3's default is tanh"
    assert len(last.layers) == 4, "two hidden layers of the actor, two of the critic"
    other = made()
    other.learn(192)
    for name, w in agent.policy.state_dict().items():
        assert torch.equal(w, other.policy.state_dict()[name]), f"the monitored agent is another at {name}"
