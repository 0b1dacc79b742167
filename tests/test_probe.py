"""`perennial probe` loads what is saved in all usual ways, runs nothing of it, and reads what a monitor reads."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from perennial.checkpoints import CheckpointError, in_order, load_into, open_checkpoint
from perennial.cli import app
from perennial.monitor.reading import read
from perennial.units import trace

SAMPLES = 128


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def wider() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 6, bias=False)
        self.hidden = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6))
        self.decode = nn.Linear(6, 6, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Any:
        return self.decode(self.hidden(self.encode(x)))


def inputs() -> Tensor:
    return torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(7))


def saved(seed: int = 1, dead: int = 0) -> dict[str, Tensor]:
    """A state dict; of the first layer so many units are dead."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = net()
    with torch.no_grad():
        model[0].weight[:dead] = 0
        model[0].bias[:dead] = -1
    return model.state_dict()


def run(*arguments: object, model: str = "net", data: object = f"{__name__}:inputs") -> Any:
    given = ["probe", f"{__name__}:{model}", *map(str, arguments), "--data", str(data)]
    return CliRunner().invoke(app, given, catch_exceptions=False, env={"COLUMNS": "100"})


def error_of(*arguments: object, **named: Any) -> str:
    result = run(*arguments, **named)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1, "one line"
    return str(result.stderr)


def expected(state: dict[str, Tensor], **named: Any) -> Any:
    model = net()
    model.load_state_dict(state)
    names = ("dead_units", "effective_rank_entropy", "weight_magnitude", "saturated_units")
    return read(model, trace(model, inputs()), (inputs(),), {}, names, **named)


# --- files of every kind --------------------------------------------------------------------------------------------


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def ddp(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in state.items()}


def compiled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module._orig_mod.{name}": value for name, value in state.items()}


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    inside = {f"model.{name}": value for name, value in state.items()}
    return {"epoch": 3, "global_step": 1200, "state_dict": inside, "optimizer_states": [], "hyper_parameters": {"a": 1}}


KINDS: dict[str, tuple[str, Callable[[dict[str, Tensor], Path], object], list[str], str]] = {
    "safetensors": ("model.safetensors", lambda s, p: save_file(s, p), [], "model.safetensors"),
    "state dict": ("a/step-700/model.pt", lambda s, p: torch.save(s, p), [], "step 700"),
    "old format": (
        "model.pth", lambda s, p: torch.save(s, p, _use_new_zipfile_serialization=False), [], "model.pth"
    ),
    "lightning": ("last.ckpt", lambda s, p: torch.save(lightning(s), p), [], "step 1,200"),
    "ddp": ("net_40_steps.pt", lambda s, p: torch.save(ddp(s), p), [], "step 40"),
    "compiled": ("m.pt", lambda s, p: torch.save({"model": compiled(s), "epoch": 2}, p), [], "epoch 2"),
    "key": ("m.pt", lambda s, p: torch.save({"a": {"b": s, "c": s}}, p), ["--key", "a.b"], "m.pt"),
    "part": (
        "m.pt",
        lambda s, p: torch.save({"state_dict": {f"actor.{n}": v for n, v in s.items()} | {"critic.w": s["0.bias"]}}, p),
        ["--key", "state_dict.actor"],
        "m.pt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_any_kind_is_read_as_the_network_itself(kind: str, tmp_path: Path) -> None:
    name, save, options, label = KINDS[kind]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    state = saved(dead=5)
    save(state, path)
    result = run("--checkpoint", path, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "out/probe.json").read_text())["checkpoints"][0]
    reading = expected(state)
    for layer, values in reading.layers.items():
        assert found["layers"][layer].items() >= dict(values).items()
    assert found["network"].items() >= dict(reading.network).items()
    assert found["label"] == label
    assert f"Layers at {label}" in result.stdout


def test_a_policy_of_stable_baselines3(tmp_path: Path) -> None:
    ppo = pytest.importorskip("stable_baselines3").PPO
    agent = ppo("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu", seed=0)
    agent.learn(16)
    agent.save(tmp_path / "agent.zip")
    result = run(
        "--checkpoint", tmp_path / "agent.zip", "--out", tmp_path, model="policy", data="200,4"
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["checkpoints"][0]["step"] == 16
    weights = [p.detach().abs().flatten() for p in agent.policy.parameters()]
    assert found["checkpoints"][0]["network"]["weight_magnitude"] == pytest.approx(float(torch.cat(weights).mean()))
    assert any("saturated_units" in layer for layer in found["checkpoints"][0]["layers"].values()), "tanh"
    assert "Random inputs say less than real ones" in result.stdout


def policy() -> nn.Module:
    from stable_baselines3 import PPO

    return PPO("MlpPolicy", "CartPole-v1", device="cpu").policy


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=20,
        )
    )  # fmt: skip


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_a_folder_of_hugging_face_with_tied_weights(shard: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = bert()
    folder = tmp_path / "checkpoint-500"
    model.save_pretrained(folder, max_shard_size=shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "10KB")
    result = run("--checkpoint", folder, "--out", tmp_path, model="bert", data="int:64,12")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "probe.json").read_text())["checkpoints"][0]
    assert found["step"] == 500
    mean = torch.cat([p.detach().abs().flatten() for p in model.parameters()]).mean()
    assert found["network"]["weight_magnitude"] == pytest.approx(float(mean))
    assert "queries and keys" in result.stdout or "nothing reads" in result.stdout, "what is left out is said"


def test_tied_weights_are_needed_once(tmp_path: Path) -> None:
    state = Tied().state_dict()
    del state["decode.weight"]
    torch.save(state, tmp_path / "m.pt")
    model = Tied()
    assert load_into(model, open_checkpoint(tmp_path / "m.pt")) == []
    assert torch.equal(model.decode.weight, state["encode.weight"])
    assert model.decode.weight is model.encode.weight


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["torch", "old", "pickle", "zip"])
def test_code_in_a_checkpoint_is_never_run(way: str, tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / "evil.pt"
    harmful = {"state_dict": saved(), "extra": Evil(made)}
    if way == "pickle":
        path.write_bytes(pickle.dumps(harmful["extra"]))
    elif way == "zip":
        torch.save(harmful, tmp_path / "policy.pth")
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "policy.pth", "policy.pth")
    else:
        torch.save(harmful, path, _use_new_zipfile_serialization=way == "torch")
    said = error_of("--checkpoint", path)
    assert not made.exists()
    assert "posix.system" in said
    assert "torch.save(model.state_dict()" in said
    said = error_of("--checkpoint", path, data=path)
    assert not made.exists()
    pickle.loads(pickle.dumps(Evil(made)))
    assert made.exists(), "the file would have done it"


def test_a_whole_module_is_refused_with_its_class(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "m.pt")
    said = error_of("--checkpoint", tmp_path / "m.pt")
    assert "torch.nn.modules.linear.Linear" in said
    assert "would have to be run" in said


def cut(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def damaged(path: Path, how: str) -> Path:
    if how == "missing":
        return path / "none.pt"
    if how == "folder":
        return path
    if how == "adapter":
        save_file(saved(), path / "adapter_model.safetensors")
        return path
    if how == "index":
        (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
        return path
    file = path / ("m.safetensors" if how.endswith("safetensors") else "m.pt")
    if how.startswith("empty"):
        file.touch()
    elif how == "text":
        file.write_text("hello, this is no checkpoint")
    elif how == "list":
        torch.save([1, 2], file)
    elif how == "no state dict":
        torch.save({"step": 4, "losses": [1.0]}, file)
    elif how == "several":
        torch.save({"model": saved(), "policy": saved()}, file)
    elif how == "script":
        torch.jit.save(torch.jit.trace(net(), inputs()), str(file))
    else:
        save_file(saved(), file) if how.endswith("safetensors") else torch.save(saved(), file)
        cut(file)
    return file


@pytest.mark.parametrize(("how", "said"), [
    ("missing", "there is no"),
    ("folder", "is a folder without model.safetensors"),
    ("adapter", "PEFT adapter"),
    ("index", "which is not a file beside it"),
    ("empty", "is empty"),
    ("empty safetensors", "is empty"),
    ("truncated", "is damaged"),
    ("truncated safetensors", "is damaged"),
    ("text", "is damaged, or not what torch.save writes"),
    ("list", "holds a list, not a state dict"),
    ("no state dict", "it holds step, losses"),
    ("several", "--key model or --key policy"),
    ("script", "TorchScript archive, which holds code"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_cannot_be_loaded_is_named_with_the_reason(how: str, said: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, how)
    message = error_of("--checkpoint", path)
    assert said in message
    assert str(path) in message


def test_another_network_is_refused_whole(tmp_path: Path) -> None:
    torch.save(saved(), tmp_path / "m.pt")
    said = error_of("--checkpoint", tmp_path / "m.pt", model="wider")
    assert "0.weight is [12, 6] in the file, [20, 6] in the network" in said
    assert "4.weight is in the file alone" in said
    assert re.search(r"and \d more", said)
    model = wider()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="is of another network"):
        load_into(model, open_checkpoint(tmp_path / "m.pt"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    part = saved()
    del part["4.bias"]
    torch.save(part, tmp_path / "part.pt")
    assert "the network's 4.bias is not in the file" in error_of("--checkpoint", tmp_path / "part.pt")
    torch.save(saved() | {"0.weight": torch.ones(12, 6, dtype=torch.int8)}, tmp_path / "int.pt")
    assert "0.weight is int8 in the file, float32" in error_of("--checkpoint", tmp_path / "int.pt")
    torch.save({name: value.double() for name, value in saved().items()}, tmp_path / "double.pt")
    assert "float64 read as float32, which rounds" in run("--checkpoint", tmp_path / "double.pt").stdout


# --- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["x.npy", "x.npz", "x.safetensors", "keywords.safetensors", "x.pt", "tuple.pt", "d.pt"]
)
def test_data_from_a_file_is_the_same_data(name: str, tmp_path: Path) -> None:
    path, x = tmp_path / name, inputs()
    if path.suffix == ".npy":
        np.save(path, x.double().numpy())
    elif path.suffix == ".npz":
        np.savez(path, x.numpy())
    elif path.suffix == ".safetensors":
        save_file({"input": x} | ({"y": x + 1} if name == "keywords.safetensors" else {}), path)
    else:
        torch.save({"x.pt": x, "tuple.pt": (x,), "d.pt": {"input": x}}[name], path)
    torch.save(saved(), tmp_path / "m.pt")
    if name == "keywords.safetensors":
        assert "unexpected keyword argument 'y'" in error_of("--checkpoint", tmp_path / "m.pt", data=path)
        return
    result = run("--checkpoint", tmp_path / "m.pt", "--out", tmp_path, data=path)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["checkpoints"][0]["network"].items() >= dict(expected(saved()).network).items()
    assert found["data"]["kind"] == "file"
    assert len(found["data"]["sha256"]) == 64


def test_data_that_cannot_be_used_is_refused_in_words(tmp_path: Path) -> None:
    torch.save(saved(), tmp_path / "m.pt")
    given = ("--checkpoint", tmp_path / "m.pt")
    np.save(tmp_path / "o.npy", np.array([Evil(tmp_path / "made")], dtype=object), allow_pickle=True)
    (tmp_path / "e.npy").touch()
    (tmp_path / "t.npy").write_text("hello")
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    assert "no plain arrays of numbers" in error_of(*given, data=tmp_path / "o.npy")
    assert not (tmp_path / "made").exists()
    assert "is empty" in error_of(*given, data=tmp_path / "e.npy")
    assert "no plain arrays" in error_of(*given, data=tmp_path / "t.npy")
    assert "no plain arrays" in error_of(*given, data=tmp_path / "words.npy")
    assert "there is no" in error_of(*given, data=tmp_path / "none.npy")
    assert "neither a file" in error_of(*given, data="nonsense")
    assert "cannot be run on --data 2,9" in error_of(*given, data="2,9")
    assert "no sample" in error_of(*given, data="0,6")
    result = CliRunner().invoke(app, ["probe", f"{__name__}:net", *map(str, given)])
    assert result.exit_code == 1
    assert "give --data" in result.stderr


def test_a_checkpoint_that_has_diverged_is_shown_as_that(tmp_path: Path) -> None:
    torch.save(saved(), tmp_path / "step_1.pt")
    torch.save(saved() | {"0.bias": torch.full((12,), torch.nan)}, tmp_path / "step_2.pt")
    result = run("--checkpoint", tmp_path / "step_1.pt", "--checkpoint", tmp_path / "step_2.pt", "--out", tmp_path)
    assert result.exit_code == 0
    assert "it has diverged" in " ".join(result.stdout.split())
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["checkpoints"][1]["network"]["weight_magnitude"] is None
    assert "it has diverged" in found["findings"][0]["text"]


def test_only_so_many_samples_are_read(tmp_path: Path) -> None:
    torch.save(saved(), tmp_path / "m.pt")
    result = run("--checkpoint", tmp_path / "m.pt", "--samples", 50, "--out", tmp_path)
    found = json.loads((tmp_path / "probe.json").read_text())
    assert (found["data"]["samples"], found["data"]["of"]) == (50, SAMPLES)
    assert "first 50 of 128 samples" in result.stdout
    assert "Only 50 samples" in result.stdout


# --- metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "said"), [
    ("dead_unit", "did you mean dead_units"),
    ("stable_rank", "stable_rank_fro"),
    ("gradient_norm_l2", "gradients, which a checkpoint does not have"),
    ("sharpness", "which a checkpoint does not have"),
    ("distance_l1", "give --start FILE or several checkpoints"),
])  # fmt: skip
def test_metrics_that_cannot_be_taken_are_refused(name: str, said: str, tmp_path: Path) -> None:
    torch.save(saved(), tmp_path / "m.pt")
    assert said in error_of("--checkpoint", tmp_path / "m.pt", "--metric", name)


def test_metrics_that_are_asked_for_are_taken_alone(tmp_path: Path) -> None:
    torch.save(saved(), tmp_path / "m.pt")
    run("--checkpoint", tmp_path / "m.pt", "--metric", "feature_norm", "--metric", "dead_units", "--out", tmp_path)
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["metrics"] == ["feature_norm", "dead_units"]
    assert found["checkpoints"][0]["network"].keys() == {"feature_norm", "dead_units"}


# --- several checkpoints --------------------------------------------------------------------------------------------


def several(tmp_path: Path, names: dict[str, int]) -> list[object]:
    """Checkpoints with so many dead units, as arguments."""
    for name, dead in names.items():
        torch.save(saved(dead=dead), tmp_path / name)
    return [part for name in names for part in ("--checkpoint", tmp_path / name)]


def test_checkpoints_are_ordered_by_step_and_findings_say_since_when(tmp_path: Path) -> None:
    given = several(tmp_path, {"net_1000.pt": 5, "net_0.pt": 0, "net_200.pt": 4})
    result = run(*given, "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "probe.json").read_text())
    assert [c["step"] for c in found["checkpoints"]] == [0, 200, 1000]
    assert [c["layers"]["0"]["dead_units"] for c in found["checkpoints"]] == pytest.approx([0, 4 / 12, 5 / 12])
    start = saved()
    assert found["checkpoints"][0]["network"]["distance_l2"] == 0
    change = torch.cat([(saved(dead=5)[n] - w).flatten() for n, w in start.items()])
    assert found["checkpoints"][2]["network"]["distance_l2"] == pytest.approx(float(change.norm()), rel=1e-6)
    (dead,) = [f for f in found["findings"] if f["metric"] == "dead_units"]
    assert (dead["layers"], dead["since"]) == (["0"], 200)
    assert "Dead units in 0: 42% since step 200" in result.stdout
    assert "step 1,000" in result.stdout
    assert "Saturated units" not in dead["text"]


def test_without_steps_the_order_given_holds(tmp_path: Path) -> None:
    given = several(tmp_path, {"first.pt": 0, "second.pt": 5, "best.pt": 6})
    result = run(*given, "--out", tmp_path)
    assert "do not say at which step" in result.stdout
    found = json.loads((tmp_path / "probe.json").read_text())
    assert [c["label"] for c in found["checkpoints"]] == ["first.pt", "second.pt", "best.pt"]
    assert [c["step"] for c in found["checkpoints"]] == [None] * 3
    assert "since second.pt" in result.stdout
    assert "since step" not in (tmp_path / "probe.html").read_text()


def test_one_checkpoint_is_compared_with_a_start(tmp_path: Path) -> None:
    several(tmp_path, {"step_0.pt": 0})
    torch.save({name: 3 * value for name, value in saved(dead=11).items()}, tmp_path / "step_9.pt")
    alone = run("--checkpoint", tmp_path / "step_9.pt")
    assert "Dead units in 0: 92% (threshold 10%)" in alone.stdout
    assert "at first" not in alone.stdout
    both = run("--checkpoint", tmp_path / "step_9.pt", "--start", tmp_path / "step_0.pt", "--out", tmp_path)
    assert "Mean weight magnitude" in both.stdout
    assert "at first; threshold 2 times that" in both.stdout
    found = json.loads((tmp_path / "probe.json").read_text())
    assert [c["start"] for c in found["checkpoints"]] == [True, False]
    assert "later than step 0" in error_of(
        "--checkpoint", tmp_path / "step_0.pt", "--start", tmp_path / "step_9.pt"
    )  # fmt: skip


def test_entries_of_the_file_come_before_its_name(tmp_path: Path) -> None:
    for at, step in enumerate((30, 10)):
        torch.save({"model": saved(), "epoch": 0, "global_step": step}, tmp_path / f"m_{at}.pt")
    opened = [open_checkpoint(tmp_path / f"m_{at}.pt") for at in range(2)]
    assert in_order(opened) == ("global_step", [30, 10])
    torch.save({"model": saved(), "epoch": 4}, tmp_path / "epoch=3-step=1200.pt")
    torch.save({"model": saved(), "epoch": 5}, tmp_path / "other.pt")
    opened = [open_checkpoint(tmp_path / name) for name in ("epoch=3-step=1200.pt", "other.pt")]
    assert opened[0].steps["step in the name"] == 1200
    assert in_order(opened) == ("epoch", [4, 5])


# --- what is written ------------------------------------------------------------------------------------------------


def test_the_page_stands_alone(tmp_path: Path) -> None:
    given = several(tmp_path, {"step_0.pt": 0, "step_50.pt": 4, "step_90.pt": 6})
    run(*given, "--out", tmp_path / "a/b")
    page = (tmp_path / "a/b/probe.html").read_text()
    found = json.loads((tmp_path / "a/b/probe.json").read_text())
    shown = {n for c in found["checkpoints"] for by in (c["network"], *c["layers"].values()) for n in by} - {"units"}
    assert page.count("<figure") == len(shown) >= 8
    assert set(re.findall(r'(\S+)="https?://', page)) == {"xmlns", "xmlns:xlink"}
    assert page.count("http") == len(re.findall(r'xmlns(?::xlink)?="http', page))
    assert "<script" not in page
    assert not re.search(r'src=|url\((?!#)|href="(?!#|data:,)|@import', page)
    assert "prefers-color-scheme: dark" in page
    assert found["findings"][0]["text"] in page.replace("&#39;", "'")
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    first = {name: (tmp_path / "a/b" / name).read_bytes() for name in ("probe.html", "probe.json")}
    run(*given, "--out", tmp_path / "a/b")
    assert first == {name: (tmp_path / "a/b" / name).read_bytes() for name in first}, "the same command, the same bytes"
    assert {p.name for p in (tmp_path / "a/b").iterdir()} == first.keys(), "nothing is left beside them"
    run(*given[:2], "--out", tmp_path)
    assert "<figure" not in (tmp_path / "probe.html").read_text(), "one checkpoint is no curve"


def test_a_page_cannot_be_written_over_a_file(tmp_path: Path) -> None:
    torch.save(saved(), tmp_path / "m.pt")
    result = run("--checkpoint", tmp_path / "m.pt", "--out", tmp_path / "m.pt")
    assert result.exit_code == 1
    assert "could not be written" in result.stderr


def test_random_states_are_left_as_they_were(tmp_path: Path) -> None:
    torch.save(saved(), tmp_path / "m.pt")
    before = torch.get_rng_state(), np.random.get_state(legacy=False)
    result = run("--checkpoint", tmp_path / "m.pt", data="64,6")
    assert result.exit_code == 0
    assert torch.equal(torch.get_rng_state(), before[0])
    after = np.random.get_state(legacy=False)
    assert np.array_equal(after["state"]["key"], before[1]["state"]["key"])
