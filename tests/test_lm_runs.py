"""Adapter stacks and studies of text tasks, with the real Trainer on small models of each family."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import socket
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from text_models import TARGETS, text_task, write_model, write_tasks
from torch import Tensor, nn

from perennial.compared import Job
from perennial.lm import (
    AdapterStack,
    Asked,
    DominantTickets,
    ModelError,
    NLoRA,
    OLoRA,
    Recipe,
    Selection,
    TextStream,
    TextTraining,
    load_model,
    overlaps,
    run_dominant,
    run_stream,
    stack_measures,
    train,
)
from perennial.lm.dominant import Job as Training
from perennial.lm.dominant import run_training
from perennial.lm.learn import run_sequence
from perennial.parallel import Stopped
from perennial.storage import RunError, read_tensors
from perennial.studies import StudyError, TextStudy, load
from perennial.tickets import SparseDelta

QUICK = TextTraining(steps=3, batch_size=4, lr=1e-2, max_length=64)
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {family: write_model(family, folder) for family in TARGETS}


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_tasks(tmp_path)
    monkeypatch.setenv("PERENNIAL_DATA", str(tmp_path))
    return tmp_path


def started(folders: dict[str, str], family: str = "encoder", merge: bool = False) -> tuple[AdapterStack, Any]:
    from peft import LoraConfig

    model, reader = load_model(folders[family], [text_task("colour"), text_task("size")], max_length=64)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS[family])
    torch.manual_seed(1)
    return AdapterStack(model, config, merge=merge, heads=reader.heads), reader


def taught(stack: AdapterStack, reader: Any, name: str, seed: int = 0, **settings: Any) -> None:
    """One more adapter, trained a little."""
    task = text_task(name)
    model = stack.begin(name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    asked = [Asked(task, example) for example in task.train]
    train(model, reader, asked, optimizer, QUICK, steps=3, callbacks=[stack.callback()], seed=seed, **settings)


def logits(stack: AdapterStack, reader: Any) -> Tensor:
    task = text_task("colour")
    batch = reader.batch([Asked(task, e) for e in task.test])
    if reader.loss is not None:
        batch.pop("labels")
    stack.model.eval()
    with torch.no_grad():
        found: Tensor = stack.model(**batch).logits
    return found


families = pytest.mark.parametrize("family", [pytest.param(f, marks=() if f == "encoder" else slow) for f in TARGETS])


@families
@pytest.mark.parametrize("merge", [False, True], ids=["active", "merged"])
def test_old_adapters_keep_every_bit_after_a_task_and_after_loading(
    folders: dict[str, str], tmp_path: Path, family: str, merge: bool
) -> None:
    stack, reader = started(folders, family, merge)
    taught(stack, reader, "colour")
    first = stack.state("colour")
    assert any(t.any() for n, t in first.items() if "lora_B" in n)
    taught(stack, reader, "size", penalties=[OLoRA(0.5), NLoRA(1e-3)])
    for name, tensor in stack.state("colour").items():
        assert torch.equal(tensor, first[name])
    stack.save(tmp_path)
    stack.save(tmp_path)
    again = AdapterStack.load(tmp_path, started(folders, family)[0].base)
    assert again.names == ["colour", "size"]
    for name in again.names:
        for key, tensor in stack.state(name).items():
            assert torch.equal(tensor, again.state(name)[key])
    assert torch.equal(logits(stack, reader), logits(again, reader))
    assert [p.old is not None for p in again.pairs()] == [True] * len(stack.pairs())
    trained = {n for n, p in again.model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in stack.model.named_parameters() if p.requires_grad}
    assert all("size" in n or "classifier" in n for n in trained)


@families
def test_merged_equals_active(folders: dict[str, str], family: str) -> None:
    (active, reader), (merged, _) = started(folders, family), started(folders, family, merge=True)
    for k, name in enumerate(("colour", "size")):  # the same adapters in both
        for stack in (active, merged):
            torch.manual_seed(3 + k)
            stack.begin(name)
            g = torch.Generator().manual_seed(k)
            for one in stack.factors(name).values():
                one.up.copy_(0.3 * torch.randn(one.up.shape, generator=g))
    expected = logits(active, reader)
    assert (logits(merged, reader) - expected).abs().max() < 1e-5 * expected.abs().max()
    whole = active.merge_and_unload()
    batch = reader.batch([Asked(text_task("colour"), e) for e in text_task("colour").test])
    if reader.loss is not None:
        batch.pop("labels")
    with torch.no_grad():
        out: Any = whole(**batch)
    assert (out.logits - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own
def test_a_saved_adapter_is_an_ordinary_one_of_peft(folders: dict[str, str], tmp_path: Path) -> None:
    from peft import PeftModel

    stack, reader = started(folders, "seq2seq")
    taught(stack, reader, "colour")
    stack.save(tmp_path)
    (place,) = (p for p in tmp_path.iterdir() if p.is_dir())
    base = started(folders, "seq2seq")[0].base
    other = PeftModel.from_pretrained(base, str(place))  # type: ignore[arg-type]
    for module, one in stack.factors("colour").items():
        layer = dict(base.named_modules())[module]
        assert torch.equal(layer.get_delta_weight("default"), one.update)
    assert isinstance(other, PeftModel)


def test_damage_to_a_saved_stack_is_named_and_nothing_else_is_lost(folders: dict[str, str], tmp_path: Path) -> None:
    stack, reader = started(folders)
    taught(stack, reader, "colour")
    taught(stack, reader, "size")
    stack.save(tmp_path)
    place = next(p for p in tmp_path.iterdir() if p.name.startswith("size-"))
    file = place / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="was cut short or changed"):
        AdapterStack.load(tmp_path, started(folders)[0].base)
    file.unlink()
    with pytest.raises(RunError, match="is missing; the other adapters are intact"):
        AdapterStack.load(tmp_path, started(folders)[0].base)
    stack.save(tmp_path)
    AdapterStack.load(tmp_path, started(folders)[0].base)
    with pytest.raises(FileNotFoundError, match="holds no saved stack"):
        AdapterStack.load(tmp_path / "elsewhere", started(folders)[0].base)
    with pytest.raises((RunError, ModelError), match=r"another model|cannot be adapted|no module of the model"):
        AdapterStack.load(tmp_path, started(folders, "causal")[0].base)


def test_a_save_that_is_killed_leaves_the_one_before(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, reader = started(folders)
    taught(stack, reader, "colour")
    stack.save(tmp_path)
    before = stack.state("colour")
    with torch.no_grad():
        for one in stack.pairs():
            one.new.up.add_(1.0)
    monkeypatch.setattr("perennial.lm.stack.write_json", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stack.save(tmp_path)
    again = AdapterStack.load(tmp_path, started(folders)[0].base)
    for key, tensor in again.state("colour").items():
        assert torch.equal(tensor, before[key])


def test_bad_names_and_missing_modules(folders: dict[str, str]) -> None:
    from peft import LoraConfig

    stack, _ = started(folders)
    stack.begin("one")
    for name, message in (
        ("one", "already"),
        ("a/b", "cannot be called"),
        ("lora_x", "cannot be called"),
        ("a", "cannot be called"),
        ("values", "cannot be called"),
    ):
        with pytest.raises(ValueError, match=message):
            stack.begin(name)
    base = started(folders, "causal")[0].base
    with pytest.raises(ModelError, match=r"q_proj, k_proj, v_proj, o_proj"):
        AdapterStack(base, LoraConfig(target_modules=["query"])).begin("one")
    with pytest.raises(RuntimeError, match="no adapter yet"):
        AdapterStack(base, LoraConfig()).model  # noqa: B018


class Halt(Exception):
    """A kill."""


def trainer_for(stack: AdapterStack, reader: Any, folder: Path, stop_at: int | None = None, **settings: Any) -> Any:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from perennial.lm import PenaltyMixin

    class Killer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop_at:
                raise Halt

    class PenaltyTrainer(PenaltyMixin, Trainer):
        pass

    task = text_task("size", 32)
    arguments = TrainingArguments(
        output_dir=str(folder), save_steps=2, learning_rate=1e-2, remove_unused_columns=False,
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, logging_strategy="no",
        **{"per_device_train_batch_size": 4, "max_steps": 4} | settings,
    )  # fmt: skip
    trainer = PenaltyTrainer(
        model=stack.model,
        args=arguments,
        train_dataset=[Asked(task, e) for e in task.train],  # type: ignore[arg-type]
        data_collator=reader.batch,
        compute_loss_func=reader.loss,
        callbacks=[stack.callback(), Killer()],
    )
    if not reader.adds_up:
        trainer.loss_is_scaled_for_ga = False
    trainer.penalty = OLoRA(0.1)
    return trainer


@pytest.mark.filterwarnings("ignore:Multiple active adapters:UserWarning", "ignore:.*Trainer.*:UserWarning")
def test_a_trainer_resumes_with_all_adapters_and_heads(folders: dict[str, str], tmp_path: Path) -> None:
    ends = []
    for stop_at in (None, 3):
        stack, reader = started(folders)
        taught(stack, reader, "colour")
        stack.begin("size")
        folder = tmp_path / str(stop_at)
        trainer = trainer_for(stack, reader, folder, stop_at)
        if stop_at is None:
            trainer.train()
        else:
            with pytest.raises(Halt):
                trainer.train()
            with torch.no_grad():  # what a fresh process has not: it is restored, or the test fails
                for parameter in stack.model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(1.0)
            trainer_for(stack, reader, folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        acting = [m.active_adapters for m in stack.model.modules() if hasattr(m, "lora_A")]
        assert acting == [["size", "colour"]] * len(acting)
        ends.append({n: p.detach().clone() for n, p in stack.model.named_parameters()})
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


@pytest.mark.filterwarnings("ignore:Multiple active adapters:UserWarning", "ignore:.*Trainer.*:UserWarning")
@pytest.mark.parametrize("merge", [False, True], ids=["active", "merged"])
def test_a_new_process_resumes_a_trainer(folders: dict[str, str], tmp_path: Path, merge: bool) -> None:
    stack, reader = started(folders, merge=merge)
    taught(stack, reader, "colour")
    stack.save(tmp_path / "stack")
    stack.begin("size")
    trainer_for(stack, reader, tmp_path / "whole").train()
    expected = {n: p.detach().clone() for n, p in stack.model.named_parameters()}
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")

    fresh = AdapterStack.load(tmp_path / "stack", started(folders)[0].base)
    fresh.begin("size")
    assert fresh.heads == reader.heads
    trainer_for(fresh, reader, tmp_path / "whole").train(resume_from_checkpoint=checkpoint)
    for name, tensor in fresh.model.named_parameters():
        assert torch.equal(tensor, expected[name]), name

    other, _ = started(folders, merge=merge)  # begun as it was, but never trained
    for name in ("colour", "size"):
        other.begin(name)
    resumed = trainer_for(other, reader, tmp_path / "whole")
    if merge:
        with pytest.raises(RunError, match=r"made with other merged adapters .* than this stack's"):
            resumed.train(resume_from_checkpoint=checkpoint)
    else:
        resumed.train(resume_from_checkpoint=checkpoint)
        for pair in other.pairs():
            assert pair.old is not None
            assert torch.equal(pair.old, stack.factors("colour")[pair.module].down)
        for name, tensor in other.model.named_parameters():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.filterwarnings("ignore:Multiple active adapters:UserWarning", "ignore:.*Trainer.*:UserWarning")
def test_a_trainer_that_would_lose_heads_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    stack, reader = started(folders)
    taught(stack, reader, "colour")
    trainer = trainer_for(stack, reader, tmp_path / "one")
    trainer.args.load_best_model_at_end = True
    with pytest.raises(ValueError, match="load_best_model_at_end would bring back nothing"):
        trainer.train()
    trainer_for(stack, reader, tmp_path / "one").train()
    for name, alpha in (("other", 8), ("colour", 16)):
        wrong = AdapterStack(
            started(folders)[0].base, dataclasses.replace(stack.config, lora_alpha=alpha), heads=reader.heads
        )
        wrong.begin(name)
        what = "settings" if alpha == 16 else "adapters"
        with pytest.raises(RunError, match=rf"checkpoint-2 was made with other {what} "):
            trainer_for(wrong, reader, tmp_path / "one").train(
                resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2")
            )
    moved = trainer_for(stack, reader, tmp_path / "two")
    with pytest.raises(RunError, match=r"two.checkpoint-2 holds no heads.safetensors"):
        moved.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))


def test_a_head_that_is_adapted_too_leaves_old_adapters_alone(folders: dict[str, str], tmp_path: Path) -> None:
    from peft import LoraConfig

    base, reader = started(folders)[0].base, started(folders)[1]
    stack = AdapterStack(base, LoraConfig(r=2, target_modules=[*TARGETS["encoder"], "classifier"]), heads=reader.heads)
    taught(stack, reader, "colour")
    before = stack.state("colour")
    assert any("classifier" in name for name in before)
    taught(stack, reader, "size")
    for name, tensor in stack.state("colour").items():
        assert torch.equal(tensor, before[name]), name
    stack.save(tmp_path)
    again = AdapterStack.load(tmp_path, started(folders)[0].base)
    assert torch.equal(logits(again, reader), logits(stack, reader))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora of the LoraConfig is True; a stack's adapters are plain LoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias of the LoraConfig is 'lora_only'"),
        ({"modules_to_save": ["classifier"]}, r"modules_to_save .* name what else is trained in heads="),
        ({"task_type": "SEQ_CLS"}, r"task_type .* name what else is trained in heads="),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base's weights"),
    ],
)
def test_what_no_stack_can_be_made_of_is_refused(
    folders: dict[str, str], settings: dict[str, Any], message: str
) -> None:
    from peft import LoraConfig

    base = started(folders)[0].base
    with pytest.raises(ValueError, match=message):
        AdapterStack(base, LoraConfig(target_modules=["query"], **settings))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")  # peft's own
def test_modules_that_no_stack_can_adapt_are_refused(folders: dict[str, str]) -> None:
    from peft import LoraConfig

    stack, _ = started(folders)
    stack.begin("one")
    with pytest.raises(ValueError, match="has adapters already"):
        AdapterStack(stack.base, stack.config)
    with pytest.raises(ValueError, match="heads names 'clasifier'"):
        AdapterStack(started(folders)[0].base, stack.config, heads=["clasifier"])
    base = started(folders)[0].base
    with pytest.raises(ModelError, match=r"word_embeddings, which is Embedding; a stack adapts linear layers"):
        AdapterStack(base, LoraConfig(target_modules=["word_embeddings", "query"])).begin("one")
    assert all(p.requires_grad for p in base.parameters())  # the base is as it was
    AdapterStack(base, stack.config).begin("one")
    base = started(folders, "seq2seq")[0].base
    base.lm_head.weight = base.shared.weight  # type: ignore[union-attr]
    tied = LoraConfig(target_modules=["q", "lm_head"])
    with pytest.raises(ModelError, match=r"weights of lm_head are tied to those of .*shared"):
        AdapterStack(base, tied, merge=True).begin("one")


def test_a_damaged_index_or_configuration_is_named(folders: dict[str, str], tmp_path: Path) -> None:
    stack, reader = started(folders)
    taught(stack, reader, "colour")
    stack.save(tmp_path)
    (place,) = (p for p in tmp_path.iterdir() if p.is_dir())
    config = place / "adapter_config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"lora_alpha": 8', '"lora_alpha": 800'))
    with pytest.raises(RunError, match=r"adapter_config.json was cut short or changed"):
        AdapterStack.load(tmp_path, started(folders)[0].base)
    stack.save(tmp_path)
    assert config.read_text() == whole
    config.unlink()
    with pytest.raises(RunError, match=r"adapter_config.json is missing"):
        AdapterStack.load(tmp_path, started(folders)[0].base)
    (place / "adapter_model.safetensors").write_bytes(b"")
    stack.save(tmp_path)
    AdapterStack.load(tmp_path, started(folders)[0].base)
    index = (tmp_path / "stack.json").read_text()
    for damaged, message in (
        (index[:-9], "is damaged or cut short"),
        ("{}", "was not written by this version of AdapterStack.save"),
    ):
        (tmp_path / "stack.json").write_text(damaged)
        with pytest.raises(RunError, match=message):
            AdapterStack.load(tmp_path, started(folders)[0].base)
    with pytest.raises(ValueError, match="there is no adapter 'size'; there are colour"):
        stack.state("size")


def test_penalties_find_the_stack_of_a_wrapped_model_and_let_it_go(folders: dict[str, str]) -> None:
    stack, _ = started(folders, merge=True)
    with pytest.raises(RuntimeError, match="no adapter yet"):
        stack.pairs()
    for name in ("colour", "size"):
        model = stack.begin(name)
    expected = OLoRA(1.0)(model).detach()
    assert expected > 0
    assert OLoRA(1.0)(torch.compile(model)).detach() == expected  # type: ignore[arg-type]
    with torch.no_grad():
        for pair in stack.pairs():
            pair.new.up.normal_()
    for penalty in (NLoRA(1.0), OLoRA(1.0)):
        with torch.autocast("cpu", torch.bfloat16):
            inside = penalty(model)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, penalty(model))
    alive = weakref.ref(model)
    del stack, model, pair
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("family", ["encoder", "seq2seq", pytest.param("causal", marks=slow)])
def test_the_penalty_counts_once_a_step_whatever_is_accumulated(
    folders: dict[str, str], tmp_path: Path, family: str
) -> None:
    def moved(batch: int, accumulate: int, strength: float) -> dict[str, Tensor]:
        stack, reader = started(folders, family)
        stack.begin("colour")
        with torch.no_grad():
            for pair in stack.pairs():
                pair.new.up.normal_(generator=torch.Generator().manual_seed(0))
        stack.begin("size")
        for module in stack.model.modules():
            for rate in ("p", "dropout"):  # T5's attention has a number of its own
                if isinstance(getattr(module, rate, None), float):
                    setattr(module, rate, 0.0)
        trainer = trainer_for(
            stack, reader, tmp_path, optim="sgd", max_grad_norm=0.0, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        trainer.penalty = OLoRA(strength)
        before = {n: p.detach().clone() for n, p in stack.model.named_parameters() if p.requires_grad}
        trainer.args.max_steps = 1
        trainer.train()
        return {n: p.detach() - before[n] for n, p in stack.model.named_parameters() if n in before}

    pulled = [moved(*how, 1.0) for how in ((8, 1), (1, 8))]
    free = [moved(*how, 0.0) for how in ((8, 1), (1, 8))]
    for name, tensor in free[0].items():
        assert torch.allclose(tensor, free[1][name], rtol=1e-3, atol=1e-5), name
    at_once, in_eight = ({n: on[n] - off[n] for n in on} for on, off in zip(pulled, free, strict=True))
    down = [n for n in at_once if "lora_A" in n]
    assert all(at_once[n].abs().max() > 1e-4 for n in down)
    for name in down:  # the task's part is the same to rounding, and goes out
        assert torch.allclose(at_once[name], in_eight[name], atol=1e-6)


def test_the_proximal_step_gives_exact_zeros_and_the_subgradient_none(folders: dict[str, str]) -> None:
    shares, kept = {}, {}
    for form in ("factors", "update"):
        stack, reader = started(folders)
        model = stack.begin("colour")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        penalty = NLoRA(1e-3, form=form)  # type: ignore[arg-type]
        handle = penalty.proximal(optimizer, model) if form == "factors" else None
        first = {m: f.down.clone() for m, f in stack.factors("colour").items()}
        task = text_task("colour")
        pulls = [] if handle else [penalty]
        train(model, reader, [Asked(task, e) for e in task.train], optimizer, QUICK, steps=6, penalties=pulls)
        if handle:
            handle.remove()
        updates = [f.down == 0 for f in stack.factors("colour").values()]
        shares[form] = sum(int(u.sum()) for u in updates) / sum(u.numel() for u in updates)
        left = [f.down.abs().mean() / first[m].abs().mean() for m, f in stack.factors("colour").items()]
        kept[form] = float(torch.stack(left).mean())
    assert shares["update"] == 0.0
    assert 0.05 < shares["factors"] < 0.9
    assert kept["factors"] > 0.3 * kept["update"]  # A, of which B = 0 leaves no gradient, is not thrown away at once


# Studies

METHODS = {
    "each": Recipe(penalties={"olora": {"strength": 0.5}, "nlora": {"strength": 1e-4}}),
    "one": Recipe(trains="adapter_one", ewc=10.0, replay=4),
    "proximal": Recipe(penalties={"nlora": {"strength": 1e-3, "form": "factors"}}),
    "full": Recipe(trains="all", lr=1e-3),
    "osf": Recipe(trains="osf", lr=1e-3),
    "upgd": Recipe(trains="adapter_one", rule={"name": "ada_upgd", "noise_std": 1e-3}),
    "backprop": Recipe(
        trains="adapter_one",
        interventions={"continual_backprop": {"replacement_rate": 0.1, "maturity_threshold": 2}},
    ),
    "alone": Recipe(trains="adapter_one", tasks="alone"),
    "together": Recipe(trains="adapter_one", tasks="together"),
}


def stream_of(model: str, *methods: str, family: str = "encoder", **settings: Any) -> TextStream:
    from perennial.lm import Adapters

    adapters = Adapters(rank=2, alpha=8.0, dropout=0.1, target_modules=tuple(TARGETS[family]))
    chosen = {m: METHODS[m] for m in methods or METHODS}
    given = {"tasks": ("agnews", "yelp", "WiC"), "training": QUICK, "seeds": (0,)} | settings
    return TextStream(model=model, methods=chosen, adapters=adapters, **given)


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=() if m in ("each", "one", "osf", "alone", "together") else slow) for m in METHODS],
)
def test_a_sequence_that_is_killed_ends_as_if_it_had_not_been(
    folders: dict[str, str], texts: Path, method: str
) -> None:
    stream, job = stream_of(folders["encoder"], method), Job(method, 0)
    run_sequence(stream, texts / "whole", job, pulse=lambda step: None)

    def killed(step: int) -> None:
        if step == 5:
            raise Stopped

    if method != "together":
        with pytest.raises(Stopped):
            run_sequence(stream, texts / "killed", job, pulse=killed)
        halfway = job.results(texts / "killed")
        assert halfway is not None
        assert len(halfway["losses"]) == 1
    run_sequence(stream, texts / "killed", job, pulse=lambda step: None)
    whole, again = (job.results(texts / name) for name in ("whole", "killed"))
    assert whole is not None
    assert again is not None
    del whole["seconds"], again["seconds"]
    assert whole == again
    rows = {"alone": 3, "together": 1}.get(method, 3)
    assert len(whole["scores"]) == rows
    assert [sum(s is not None for s in row) for row in whole["scores"]] == {
        "alone": [1, 1, 1], "together": [3],
    }.get(method, [1, 2, 3])  # fmt: skip
    assert len(whole["losses"][0]) == (9 if method == "together" else 3)
    assert ("pairs" in whole) == (method in ("each", "proximal"))


@pytest.mark.parametrize("family", [pytest.param("seq2seq"), pytest.param("causal", marks=slow)])
def test_models_that_answer_in_words_learn_a_stream(folders: dict[str, str], texts: Path, family: str) -> None:
    stream = stream_of(folders[family], "each", family=family, tasks=("agnews", "yelp"), test=4)
    run_sequence(stream, texts, Job("each", 0), pulse=lambda step: None)
    found = Job("each", 0).results(texts)
    assert found is not None
    assert found["finished"]
    assert found["losses"][0][-1] < found["losses"][0][0]
    assert len(found["pairs"]) == 1


@slow
def test_a_stream_in_processes_is_the_same(folders: dict[str, str], texts: Path) -> None:
    stream = stream_of(folders["encoder"], "each", "alone", seeds=(0, 1))
    made: dict[Any, int] = {}
    run_stream(stream, texts / "run", workers=2, progress=lambda job, step: made.update({job: step}))
    assert made == dict.fromkeys(stream.jobs(), 9)
    run_sequence(stream, texts / "alone", Job("each", 1), pulse=lambda step: None)
    one, other = (Job("each", 1).results(texts / f) for f in ("run", "alone"))
    assert one is not None
    assert other is not None
    assert one["scores"] == other["scores"]
    assert one["losses"] == other["losses"]


def test_measures_of_a_stack_of_random_adapters(folders: dict[str, str]) -> None:
    stack, _ = started(folders, merge=True)
    for k, name in enumerate(("colour", "size")):
        stack.begin(name)
        with torch.no_grad():
            for pair in stack.pairs():
                pair.new.up.normal_(generator=torch.Generator().manual_seed(k))
    found = stack_measures(stack)
    (pair,) = found["pairs"]
    assert pair["exact_rate"] == pair["exact_floor"] == 1.0
    assert abs(pair["collision_rate"] / pair["collision_floor"] - 1) < 0.05
    assert len(found["adapters"]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalties": {"nlra": {}}}, "no penalty 'nlra'; there are nlora, olora"),
        ({"penalties": {"nlora": {"strengh": 1}}}, "penalty nlora: .*strengh"),
        ({"penalties": {"nlora": {"strength": 1.0}}, "trains": "all"}, "penalties are on adapters"),
        ({"rule": {"name": "upg"}}, "no optimizer rule 'upg'"),
        ({"interventions": {"cbp": {}}}, "no intervention 'cbp'"),
        ({"replay": -1}, "replay is -1"),
    ],
)
def test_bad_recipes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": "order7"}, "no order 'order7'"),
        ({"tasks": ("a", "a")}, "each stands there once"),
        ({"seeds": (0, 0)}, "different whole numbers"),
        ({"methods": {}}, "methods is empty"),
    ],
)
def test_bad_streams(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextStream(**{"tasks": "order1", "methods": {"a": Recipe()}} | settings)


def test_missing_texts_stop_a_run_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERENNIAL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="agnews are needed"):
        run_stream(stream_of("minilm", "each"), tmp_path / "run", workers=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts.methods.lora.lrr": 1}, "'lrr' is not a key here; did you mean 'lr'"),
        ({"texts.methods.nlora.penalties.nlora.strenth": 1}, "strenth"),
        ({"texts.adapters.ranks": 1}, "did you mean 'rank'"),
        ({"texts.tasks": "order9"}, "no order 'order9'"),
    ],
)
def test_mistakes_in_a_study_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        load("lm/order1", changes)


def test_the_model_of_a_study_may_be_named() -> None:
    study = load("lm/order1", {"model": "a/b", "texts.tasks": "order4", "seeds": 2})
    assert isinstance(study, TextStudy)
    assert (study.texts.model, len(study.texts.names), study.texts.seeds) == ("a/b", 15, (0, 1))
    with pytest.raises(StudyError, match="'model' is not a key here"):
        load("tickets/lenet-mnist", {"model": "a/b"})


# Dominant tickets


@pytest.fixture
def dominant(folders: dict[str, str], texts: Path) -> tuple[DominantTickets, Path]:
    selections = (Selection(share=0.02), Selection(dimensions=2, dims="columns"))
    return (
        DominantTickets(
            tasks=("yelp", "WiC"), strength=1e-3, selections=selections, model=folders["encoder"],
            finding=QUICK, training=QUICK, seeds=(0,),
        ),
        texts,
    )  # fmt: skip


def run_one(experiment: DominantTickets, folder: Path, *job: Any) -> dict[str, Any]:
    training = Training(*job)
    run_training(experiment, folder, training, pulse=lambda step: None)
    found = training.results(folder)
    assert found is not None
    return found


def test_a_ticket_is_found_moved_and_compared(dominant: tuple[DominantTickets, Path], folders: dict[str, str]) -> None:
    experiment, folder = dominant
    for task in experiment.tasks:
        found = run_one(experiment, folder, 0, "find", task, task)
        whole = sum(t.numel() for t in read_tensors(Training(0, "find", task, task).distances(folder)).values())
        assert 0 < sum(found["kept"].values()) < whole  # the proximal step has brought some back to the bit
    count = round(0.02 * whole)
    for kind, source in (("ticket", "WiC"), ("random", "yelp"), ("magnitude", "yelp")):
        assert run_one(experiment, folder, 0, kind, "yelp", source)["trained"] == count
    columns = run_one(experiment, folder, 0, "random", "yelp", "yelp", 1)["trained"]
    assert columns == run_one(experiment, folder, 0, "ticket", "yelp", "yelp", 1)["trained"]
    lora = run_one(experiment, folder, 0, "lora", "yelp", "yelp")["trained"]
    assert lora % (4 * (24 + 24)) == 0
    bits = run_one(experiment, folder, 0, "bitfit", "yelp", "")["trained"]
    base, _ = load_model(folders["encoder"], [text_task("size")])
    assert bits == sum(p.numel() for n, p in base.named_parameters() if n.endswith("bias") and "classifier" not in n)
    assert run_one(experiment, folder, 0, "head", "yelp", "")["trained"] == 0
    everything = run_one(experiment, folder, 0, "full", "yelp", "")["trained"]
    assert everything == sum(p.numel() for n, p in base.named_parameters() if "classifier" not in n)

    delta = SparseDelta.load(Training(0, "ticket", "yelp", "WiC").path(folder).with_suffix(".safetensors"))
    start = {n: p.detach().clone() for n, p in base.named_parameters()}
    delta.apply(base)
    changed = {n: int((p != start[n]).sum()) for n, p in base.named_parameters()}
    assert sum(c for n, c in changed.items() if "classifier" not in n) <= count
    assert changed["classifier.weight"] > 0
    assert not any(c for n, c in changed.items() if "LayerNorm" in n or "embeddings" in n)
    rows = [row for row in overlaps(experiment, folder) if not row["matrix"]]
    assert [row["selection"] for row in rows] == ["2%", "2 columns"]
    assert all(0 <= row["iou"] <= 1 and row["floor"] > 0 for row in rows)


def test_the_subgradient_brings_nothing_back(dominant: tuple[DominantTickets, Path]) -> None:
    experiment, folder = dominant
    pulled = dataclasses.replace(experiment, how="subgradient", tasks=("WiC",))
    run_one(pulled, folder, 0, "find", "WiC", "WiC")
    distances = read_tensors(Training(0, "find", "WiC", "WiC").distances(folder))
    attention = {n: d for n, d in distances.items() if "attention" in n or "pooler" in n}
    assert all((d != 0).all() for d in attention.values())


@slow
def test_a_search_is_run_to_the_end_in_processes(dominant: tuple[DominantTickets, Path]) -> None:
    experiment, folder = dominant
    run_dominant(experiment, folder, workers=2)
    assert all(job.results(folder) is not None for job in experiment.jobs())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ()}, "at least one"),
        ({"selections": ()}, "selections is empty"),
        ({"controls": ("rand",)}, "no control 'rand'"),
        ({"seeds": ()}, "at least one"),
    ],
)
def test_bad_searches(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DominantTickets(**{"tasks": ("yelp",), "strength": 1.0, "selections": (Selection(share=0.1),)} | settings)


def test_a_selection_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="one of them"):
        Selection(share=0.1, threshold=0.1)


# Command line, guide, several processes


@slow
def test_the_guide_runs() -> None:
    guide = Path(__file__).parents[1] / "docs" / "guides" / "language-models.md"
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    exec("\n".join(blocks), {})


@slow
def test_the_command_line_runs_a_small_stream(folders: dict[str, str], texts: Path) -> None:
    from perennial.lm import Adapters
    from perennial.runs import execute

    changes: dict[str, Any] = {
        "texts.model": folders["encoder"],
        "texts.tasks": ["yelp", "WiC"],
        "texts.methods": {"each": {"penalties": {"nlora": {"strength": 1e-5}}}},
        "steps": 2,
        "seeds": 1,
    }
    study = load("lm/order1", changes)
    execute(study, texts / "run", workers=1)
    found = json.loads((texts / "run/each-0/results.json").read_text())
    assert found["finished"]
    with pytest.raises(RunError, match="holds a run of another study"):
        execute(load("lm/order1", changes | {"steps": 3}), texts / "run", workers=1)
    assert Adapters() == Adapters(8, 32.0, 0.1, ("query", "value"))


def ranked(rank: int, folder: str, model: str) -> None:
    import torch.distributed as dist
    from peft import LoraConfig

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    task = text_task("colour")
    base, reader = load_model(model, [task], max_length=64)
    stack = AdapterStack(base, LoraConfig(r=2, target_modules=["query", "value"]), heads=reader.heads)
    torch.manual_seed(0)
    stack.begin("colour")
    stack.model.eval()
    with torch.no_grad():
        for pair in stack.pairs():
            pair.new.up.normal_(generator=torch.Generator().manual_seed(0))
    parallel = nn.parallel.DistributedDataParallel(stack.model)
    examples = [Asked(task, e) for e in task.train[:8]]
    batch = reader.batch(examples[rank::2])
    labels = batch.pop("labels")
    assert reader.loss is not None
    (reader.loss(parallel(**batch), labels) + NLoRA(1e-3)(parallel)).backward()
    shared = {n: p.grad.clone() for n, p in stack.model.named_parameters() if p.grad is not None}
    stack.model.zero_grad()
    batch = reader.batch(examples)
    labels = batch.pop("labels")
    (reader.loss(stack.model(**batch), labels) + NLoRA(1e-3)(stack.model)).backward()
    for name, p in stack.model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(p.grad, shared[name], atol=1e-6), name
    dist.destroy_process_group()


@slow
def test_penalties_in_two_processes_are_those_of_one(folders: dict[str, str], tmp_path: Path) -> None:
    torch.multiprocessing.spawn(ranked, (str(tmp_path), folders["encoder"]), nprocs=2)  # type: ignore[no-untyped-call]


def trained_in(world: int, rank: int, folder: Path, model: str, port: int) -> None:
    """One step of plain gradient descent on eight texts, in one process of several, with a Trainer."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)} if world > 1 else {}  # fmt: skip
    stack, reader = started({"encoder": model})
    for name in ("colour", "size"):
        stack.begin(name)
    with torch.no_grad():
        for pair in stack.pairs():
            pair.new.up.normal_(generator=torch.Generator().manual_seed(0))
    for module in stack.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    settings = {"optim": "sgd", "max_grad_norm": 0.0, "per_device_train_batch_size": 8 // world, "max_steps": 1}
    more = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False} if world > 1 else {}
    trainer = trainer_for(stack, reader, folder / f"trainer-{world}", **settings, **more, save_strategy="no")
    assert trainer.args.world_size == world
    trainer.penalty = lambda of: OLoRA(0.1)(of) + NLoRA(1e-2)(of)
    trainer.train()
    if rank == 0:
        torch.save(
            {n: p.detach() for n, p in stack.model.named_parameters() if p.requires_grad}, folder / f"{world}.pt"
        )
    if world > 1:
        torch.distributed.destroy_process_group()


def in_two(rank: int, folder: str, model: str, port: int) -> None:
    trained_in(2, rank, Path(folder), model, port)


@slow
@pytest.mark.filterwarnings("ignore:Multiple active adapters:UserWarning", "ignore:.*Trainer.*:UserWarning")
def test_a_trainer_in_two_processes_makes_the_step_of_one(folders: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (str(tmp_path), folders["encoder"], port)
    torch.multiprocessing.spawn(in_two, arguments, nprocs=2)  # type: ignore[no-untyped-call]
    trained_in(1, 0, tmp_path, folders["encoder"], port)
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    assert one.keys() == two.keys()
    assert any("lora_A.size" in name for name in one)
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=1e-6), name
