"""Texts, models' families, penalties and measures of continual fine-tuning."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from text_models import TARGETS, text_task, write_model, write_tasks
from torch import Tensor, nn
from torch.nn import functional as F

from perennial.lm import (
    ORDERS,
    Asked,
    ElasticWeights,
    Example,
    Factors,
    L2Update,
    ModelError,
    NLoRA,
    NuclearNorm,
    OLoRA,
    Pair,
    Penalty,
    TextTask,
    adapter_measures,
    collision,
    continual,
    from_dataset,
    load_model,
    normalised,
    pairs_of,
    read_cl_benchmark,
    read_glue,
    read_task,
    relative_threshold,
    row_overlap,
    update_cosine,
)
from perennial.lm.models import Encoder, choice_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own


def factors(rank: int = 3, inputs: int = 7, outputs: int = 600, scaling: float = 2.0, seed: int = 0) -> Factors:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((rank, inputs), (outputs, rank)))
    return Factors(a.requires_grad_(), b.requires_grad_(), scaling)


# Texts


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    write_tasks(tmp_path)
    return tmp_path


def test_a_task_is_read_and_validation_comes_from_training(texts: Path) -> None:
    task = read_cl_benchmark(texts / "CL_Benchmark/TC/agnews")
    assert (task.name, task.group, len(task.train), len(task.validation), len(task.test)) == ("agnews", "TC", 36, 4, 12)
    whole = text_task("colour", 40)
    assert sorted(task.train + task.validation) == sorted(whole.train)
    assert read_cl_benchmark(texts / "CL_Benchmark/TC/agnews") == task


def test_the_published_prompt() -> None:
    task = dataclasses.replace(text_task(), name="amazon")
    assert task.prompt("Good.") == (
        "Task:SC\nDataset:amazon\nWhat is the sentiment of the following paragraph? Choose one from the option.\n"
        "Option: red, green, blue \nGood.\nAnswer:"
    )
    copa = TextTask("COPA", "COPA", ("A",), (Example("x", "A"),), (), (Example("x", "A"),))
    assert copa.prompt("Which?") == "Task:COPA\nDataset:COPA\nWhich?\nAnswer:"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "train.json").write_text((f / "train.json").read_text()[:-20]), "train.json is damaged or cut"),
        (lambda f: (f / "train.json").write_text('[{"sentence": "a"}]'), "train.json, row 0"),
        (
            lambda f: (f / "test.json").write_text('[{"sentence": "a", "label": "pink"}]'),
            "test example 0.*'pink'.*none",
        ),
        (lambda f: (f / "labels.json").write_text("{}"), "holds no list of labels"),
        (lambda f: (f / "test.json").write_text("[]"), "no test examples"),
        (lambda f: (f / "test.json").unlink(), "there is no .*test.json; put"),
    ],
)
def test_damaged_texts_are_refused_by_name(texts: Path, damage: Any, message: str) -> None:
    folder = texts / "CL_Benchmark/TC/agnews"
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_cl_benchmark(folder)


def test_glue_is_read_from_parquet_and_damage_is_named(tmp_path: Path) -> None:
    import polars

    folder = tmp_path / "glue/rte"
    folder.mkdir(parents=True)
    rows = {"sentence1": ["a"] * 20, "sentence2": ["b"] * 20, "label": [0, 1] * 10}
    for part in ("train", "validation"):
        polars.DataFrame(rows).write_parquet(folder / f"{part}.parquet")
    task = read_task("glue/rte", tmp_path)
    assert (len(task.train), len(task.validation), len(task.test)) == (18, 2, 20)
    assert task.test[1] == Example("a", "not_entailment", "b")
    data = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(data[:-30])
    with pytest.raises(ValueError, match=r"train\.parquet is damaged"):
        read_glue(folder)
    polars.DataFrame({"sentence1": ["a"], "label": [0]}).write_parquet(folder / "train.parquet")
    with pytest.raises(ValueError, match="sentence2 is missing"):
        read_glue(folder)
    with pytest.raises(ValueError, match="no task 'glu'"):
        read_task("glu", tmp_path)


def test_rows_of_any_data_set() -> None:
    rows = [{"text": str(i), "label": i % 2} for i in range(20)]
    task = from_dataset("mine", rows, rows[:4], columns=["text"], labels=["no", "yes"])
    assert task.test[1] == Example("1", "yes")
    with pytest.raises(ValueError, match="row 0: the label is 2"):
        from_dataset("mine", [{"text": "a", "label": 2}], rows, columns=["text"], labels=["no", "yes"])
    with pytest.raises(ValueError, match="row 0 has no 'words'"):
        from_dataset("mine", rows, rows, columns=["words"], labels=["no", "yes"])


def test_smaller_draws_by_seed_without_repeats() -> None:
    task = text_task(count=24)
    one, same, other = task.smaller(8, 4, 0), task.smaller(8, 4, 0), task.smaller(8, 4, 1)
    assert one == same != other
    assert len(set(one.train)) == 8
    assert len(one.test) == len(one.validation) == 4
    assert task.smaller(100, 100) == task


def test_scores() -> None:
    task = text_task()
    assert normalised(" Science & Math. ") == "science math"
    assert task.grade(["RED.", "green", "red"], task.train[:3]) == pytest.approx(2 / 3)
    pairs = dataclasses.replace(task, labels=("no", "yes"), score="matthews", train=(Example("a", "no"),) * 4,
                                validation=(), test=(Example("a", "no"),))  # fmt: skip
    truth = [Example("", label) for label in ("no", "no", "yes", "yes", "yes")]
    # 2 true negatives, 1 false negative, 2 true positives: (2 * 2 - 0) / sqrt(2 * 3 * 2 * 3)
    assert pairs.grade(["no", "no", "no", "yes", "yes"], truth) == pytest.approx(4 / 6)
    assert pairs.grade(["no"] * 5, truth) == 0.0
    graded = dataclasses.replace(
        pairs, labels=(), score="pearson", train=(Example("a", "1"),), test=(Example("a", "1"),)
    )
    assert graded.grade(["1", "2", "4"], [Example("", v) for v in ("2", "4", "8")]) == pytest.approx(1.0)


def test_matthews_of_several_labels_is_gorodkins() -> None:
    task = dataclasses.replace(text_task(), score="matthews")
    truth = ["red", "red", "green", "green", "blue", "blue"]
    answers = ["red", "green", "green", "green", "blue", "none of them"]
    # c = 4 of s = 6 are right, t = 2, 2, 2 are true, p = 1, 3, 1 and 1 other are answered:
    # (c s - sum p t) / sqrt((s^2 - sum p^2) (s^2 - sum t^2))
    expected = (4 * 6 - (1 * 2 + 3 * 2 + 1 * 2)) / math.sqrt((36 - (1 + 9 + 1 + 1)) * (36 - 12))
    assert task.grade(answers, [Example("", label) for label in truth]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="no examples of colour"):
        task.grade([], [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "f1"}, "score of task colour is 'f1'; it is one of accuracy, matthews, pearson"),
        ({"score": "pearson"}, "3 labels and the score pearson: a regression"),
        ({"labels": ()}, "0 labels and the score accuracy: a regression, which has none, is scored by pearson"),
        ({"labels": (), "score": "pearson"}, "colour, train example 0: 'red' is no number"),
    ],
)
def test_tasks_whose_score_does_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(text_task(), **change)


def test_a_reader_refuses_what_its_model_has_no_answer_for(folders: dict[str, str]) -> None:
    task = text_task()
    _, reader = load_model(folders["encoder"], [task])
    with pytest.raises(ValueError, match="the label 'pink' is none of colour's: red, green, blue"):
        reader.batch([Asked(task, Example("a", "pink"))])
    with pytest.raises(ValueError, match=r"no column for \('size', .*it was loaded for other tasks"):
        reader.batch([Asked(text_task("size"), text_task("size").train[0])])
    with pytest.raises(ValueError, match="tasks are called colour, colour; each needs a name of its own"):
        load_model(folders["encoder"], [task, task])


def test_orders_are_permutations_of_the_fifteen_tasks() -> None:
    assert {len(set(ORDERS[f"order{i}"])) for i in (1, 2, 3)} == {4}
    assert len({frozenset(ORDERS[f"order{i}"]) for i in (4, 5, 6)}) == 1
    assert len(ORDERS["order4"]) == len(set(ORDERS["order4"])) == 15


# Families


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {family: write_model(family, folder) for family in TARGETS}


@pytest.mark.parametrize("family", TARGETS)
def test_each_family_is_recognised_asked_and_answers(folders: dict[str, str], family: str) -> None:
    tasks = [text_task("colour"), text_task("size")]
    model, reader = load_model(folders[family], tasks, max_length=64)
    assert reader.family == family
    batch = reader.batch([Asked(tasks[0], tasks[0].train[0]), Asked(tasks[1], tasks[1].train[1])])
    labels = batch.pop("labels")
    out = model(**batch) if reader.loss else model(**batch, labels=labels)
    loss = reader.loss(out, labels) if reader.loss else out.loss
    assert math.isfinite(loss.item())
    model.train()
    before = torch.get_rng_state()
    answers = reader.answers(model, tasks[0], tasks[0].test)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    assert len(answers) == len(tasks[0].test)
    if family == "encoder":
        assert set(answers) <= set(tasks[0].labels)
    assert 0 <= reader.grade(model, tasks[0]) <= 1


def test_an_encoder_answers_in_the_order_of_the_examples(folders: dict[str, str]) -> None:
    task = text_task()
    model, reader = load_model(folders["encoder"], [task])
    examples = [Example("thing " * (9 - i), "red") for i in range(9)]
    one_by_one = [reader.answers(model, task, [e])[0] for e in examples]
    assert reader.answers(model, task, examples, batch_size=4) == one_by_one


def test_choice_loss_is_the_cross_entropy_among_a_tasks_own_answers() -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.full((3, 6), math.nan)
    labels[0, :3] = torch.tensor([0.0, 1.0, 0.0])
    labels[1, 3:5] = torch.tensor([1.0, 0.0])
    labels[2, 5] = 2.5
    expected = (
        F.cross_entropy(logits[0, :3], torch.tensor(1))
        + F.cross_entropy(logits[1, 3:5], torch.tensor(0))
        + (logits[2, 5] - 2.5) ** 2
    ) / 3
    found = choice_loss(SimpleNamespace(logits=logits), labels)
    assert torch.allclose(found, expected)
    (grad,) = torch.autograd.grad(found, logits)
    (true,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(grad, true, atol=1e-7)
    assert torch.isfinite(grad).all()
    parts = [choice_loss(SimpleNamespace(logits=logits[at]), labels[at], 18) for at in (slice(0, 1), slice(1, 3))]
    assert torch.allclose(parts[0] + parts[1], expected)  # as a Trainer accumulates: 18 entries in the step's labels


@pytest.mark.parametrize(("head", "columns", "opened"), [("task", 7, 2), ("union", 5, 5)])
def test_heads_of_an_encoder(folders: dict[str, str], head: Any, columns: int, opened: int) -> None:
    again = dataclasses.replace(text_task("size"), name="again")
    tasks = [text_task("colour"), text_task("size"), again]
    model, reader = load_model(folders["encoder"], tasks, head=head)
    assert isinstance(reader, Encoder)
    assert model.num_labels == columns
    labels = reader.batch([Asked(again, again.train[0])])["labels"]
    assert int((~labels.isnan()).sum()) == opened
    assert float(labels.nansum()) == 1.0


def test_a_causal_model_is_taught_the_answer_alone(folders: dict[str, str]) -> None:
    task = text_task()
    _, reader = load_model(folders["causal"], [task], max_length=64)
    batch = reader.batch([Asked(task, Example("a", "red")), Asked(task, Example("a much longer thing", "blue"))])
    tokenizer = reader.tokenizer
    for row, mask, labels, word in zip(*batch.values(), ("red", "blue"), strict=True):
        assert tokenizer.decode(labels[labels != -100]) == f"{word} [SEP]"
        assert torch.equal(row[labels != -100], labels[labels != -100])
        assert labels[-1] == tokenizer.eos_token_id  # padded on the left
        assert int(row[mask.bool()][0]) == tokenizer.bos_token_id if tokenizer.bos_token_id is not None else True
        assert not row[~mask.bool()].any()


def test_long_texts_are_cut_within_the_sentence(folders: dict[str, str]) -> None:
    task = text_task()
    _, reader = load_model(folders["seq2seq"], [task], max_length=48)
    (prompt,) = reader._prompts([Asked(task, Example("word " * 500, "red"))])
    assert len(reader.tokenizer(prompt)["input_ids"]) <= 48
    assert prompt.endswith("\nAnswer:")
    assert "Option: red, green, blue" in prompt
    reader.max_length = 8
    with pytest.raises(ModelError, match="max_length is 8, but the question of colour alone has"):
        reader._prompts([Asked(task, Example("word " * 500, "red"))])


def test_a_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or each file is asked for several times
    for name in ("nobody/has-this-model", str(tmp_path)):
        with pytest.raises(ModelError, match="cannot be had"):
            load_model(name, [text_task()])


def test_minilm_is_the_bundled_one() -> None:
    model, reader = load_model("minilm", [text_task()])
    assert sum(p.numel() for p in model.parameters()) == 22_714_371
    assert reader.family == "encoder"


# Penalties


def plain(penalty: Penalty, pair: Pair) -> Tensor:
    """Each formula as it is written, with the update in the graph."""
    a, b, s = pair.new
    update = s * b @ a
    if isinstance(penalty, NLoRA):
        if penalty.form == "factors":
            return penalty.strength * (a.abs().sum() + b.abs().sum())
        return penalty.strength * ((a @ b).abs().sum() if penalty.form == "published" else update.abs().sum())
    if isinstance(penalty, L2Update):
        return penalty.strength * update.square().sum()
    if isinstance(penalty, NuclearNorm):
        return penalty.strength * torch.linalg.matrix_norm(update, "nuc")
    assert isinstance(penalty, OLoRA)
    assert pair.old is not None
    rows, old = (a / a.norm(dim=1, keepdim=True), pair.old / pair.old.norm(dim=1, keepdim=True)) if penalty.normalize \
        else (a, pair.old)  # fmt: skip
    return penalty.strength * (rows @ old.T).abs().sum() + penalty.norm_strength * (a.norm() + b.norm())


@pytest.mark.parametrize(
    "penalty",
    [
        NLoRA(0.3),
        NLoRA(0.3, form="factors"),
        NLoRA(0.3, form="published"),
        OLoRA(0.5),
        OLoRA(0.5, norm_strength=0.2),
        OLoRA(0.5, normalize=True),
        L2Update(0.1),
        NuclearNorm(0.1),
    ],
    ids=repr,
)
def test_value_and_gradients_equal_autograd_of_the_formula(penalty: Penalty) -> None:
    square = isinstance(penalty, NLoRA) and penalty.form == "published"
    pairs = []
    for seed in range(2):
        new = factors(outputs=7 if square else 600, seed=seed)  # 600: more than one block of rows
        pairs.append(Pair(f"layer{seed}", new, factors(seed=9 + seed).down.detach()))
    found, expected = penalty.on(pairs), sum((plain(penalty, pair) for pair in pairs), torch.zeros(()))
    assert torch.allclose(found, expected.double(), rtol=1e-12)
    tensors = [t for pair in pairs for t in pair.new[:2]]
    grads = torch.autograd.grad(3 * found, tensors, allow_unused=True)
    true = torch.autograd.grad(3 * expected, tensors, allow_unused=True)
    for grad, exact in zip(grads, true, strict=True):
        for one, other in ((grad, exact), (exact, grad)):
            assert one is not None or other is None or not other.any()
        if grad is not None and exact is not None:
            assert torch.allclose(grad, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("penalty", [NLoRA(1.0), NuclearNorm(1.0), OLoRA(1.0, normalize=True)], ids=repr)
def test_an_adapter_at_its_start_gets_no_nan(penalty: Penalty) -> None:
    new = factors()
    zero = Factors(new.down, torch.zeros_like(new.up, requires_grad=True), 2.0)
    grads = torch.autograd.grad(penalty.on([Pair("layer", zero, new.down.detach())]), zero[:2], allow_unused=True)
    assert all(g is None or torch.isfinite(g).all() for g in grads)


def test_low_precision_is_penalised_in_float32() -> None:
    low = Factors(*(t.detach().bfloat16().requires_grad_() for t in factors()[:2]), 2.0)
    found = NLoRA(1.0).on([Pair("layer", low, None)])
    assert found.dtype == torch.float32
    assert torch.allclose(found, (2 * low.up.float() @ low.down.float()).abs().sum(), rtol=1e-5)
    assert {g.dtype for g in torch.autograd.grad(found, low[:2])} == {torch.bfloat16}


def test_the_published_form_needs_square_matrices() -> None:
    with pytest.raises(ValueError, match=r"multiplies A \[3, 7\] by B \[600, 3\].*layer.*form='update'"):
        NLoRA(1.0, form="published").on([Pair("layer", factors(), None)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NLoRA(-1.0), "-1.0; it is a number from 0"),
        (lambda: NLoRA("1e-4"), "strength of NLoRA is '1e-4'"),  # type: ignore[arg-type]
        (lambda: OLoRA(math.inf), "strength of OLoRA is inf"),
        (lambda: OLoRA(1.0, norm_strength=-1.0), "norm_strength of OLoRA is -1.0"),
        (lambda: NLoRA(1.0, form="x"), "form is 'x'"),  # type: ignore[arg-type]
        (lambda: NLoRA(1.0).on([]), "no adapted matrices for NLoRA"),
    ],
)
def test_bad_penalties(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_shrinking_satisfies_orthogonality_as_published_and_not_with_rows_of_length_one() -> None:
    new = factors()
    small = Factors((new.down.detach() * 1e-6).requires_grad_(), new.up, 2.0)
    old = factors(seed=3).down.detach()
    assert OLoRA(1.0).on([Pair("", small, old)]) < 1e-4 * OLoRA(1.0).on([Pair("", new, old)])
    rows = OLoRA(1.0, normalize=True)
    assert torch.allclose(rows.on([Pair("", small, old)]), rows.on([Pair("", new, old)]))


def test_a_model_without_a_stack(folders: dict[str, str]) -> None:
    from peft import LoraConfig, get_peft_model

    base, _ = load_model(folders["causal"], [text_task()])
    with pytest.raises(ValueError, match="no LoRA adapter in training"):
        pairs_of(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config, adapter_name="first")  # type: ignore[arg-type]
    model.add_adapter("second", config)
    model.base_model.set_adapter(["second", "first"])
    model.base_model.set_requires_grad("first", False)  # type: ignore[operator]
    pairs = pairs_of(model)
    assert len(pairs) == 4
    for pair in pairs:
        layer = dict(model.named_modules())[pair.module]
        assert pair.new.down is layer.lora_A["second"].weight
        assert torch.equal(pair.old, layer.lora_A["first"].weight)  # type: ignore[arg-type]
    assert OLoRA(1.0)(nn.DataParallel(model)) == OLoRA(1.0)(model)
    other, _ = load_model(folders["causal"], [text_task()])
    dora = get_peft_model(other, LoraConfig(target_modules=["q_proj"], use_dora=True))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has DoRA, whose update is not s B A"):
        NLoRA(1.0)(dora)


def test_elastic_weights_pull_by_the_fisher_information() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False)
    xs = torch.randn(5, 1, 2)
    elastic = ElasticWeights(3.0)
    assert float(elastic(model)) == 0.0
    elastic.consolidate(model, [lambda x=x: model(x).square().sum() for x in xs])  # type: ignore[misc]
    at = model.weight.detach().clone()
    grads = [2 * (x @ at.T) * x for x in xs]
    fisher = torch.stack([g.square() for g in grads]).mean(0)
    assert torch.allclose(elastic.fisher["weight"], fisher)
    assert model.training
    with torch.no_grad():
        model.weight += 0.1
    assert torch.allclose(elastic(model), 1.5 * (fisher * 0.01).sum())
    with pytest.raises(ValueError, match="the model has no weight any more"):
        elastic(nn.Sequential(nn.Linear(2, 1, bias=False)))


# Measures


def test_measures_of_a_sequence() -> None:
    scores = [[0.8, math.nan, math.nan], [0.9, 0.6, math.nan], [0.5, 0.7, 0.4]]
    found = continual(scores)
    assert found.average == pytest.approx((0.5 + 0.7 + 0.4) / 3)
    assert found.forgetting == pytest.approx(((0.9 - 0.5) + 0.0) / 2)
    assert found.backward_transfer == pytest.approx((-0.3 + 0.1) / 2)
    assert found.learning == pytest.approx((0.8 + 0.6 + 0.4) / 3)
    with pytest.raises(ValueError, match="not finished"):
        continual([[0.8, 0.0], [math.nan, 0.6]])
    with pytest.raises(ValueError, match=r"scores are \[1, 2\]"):
        continual([[0.8, 0.0]])


def test_collisions_of_independent_places_are_at_the_floor() -> None:
    g = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(40):
        masks = [
            {f"layer{m}": (torch.rand(200, 100, generator=g) < share) for m, share in enumerate(shares)}
            for shares in ((0.05, 0.4), (0.2, 0.1))
        ]
        ratios.append(collision(*({k: m.float() for k, m in one.items()} for one in masks)).ratio)
    error = float(np.std(ratios, ddof=1)) / math.sqrt(len(ratios))
    assert abs(float(np.mean(ratios)) - 1) < 4 * error
    assert error < 0.01  # so that the test can tell


def test_collisions_by_hand() -> None:
    one = {"a": torch.tensor([[0.0, 2.0], [3.0, 0.1]]), "b": torch.tensor([[1.0, 0.0]])}
    other = {"a": torch.tensor([[1.0, 1.0], [0.0, 5.0]]), "b": torch.tensor([[0.0, 1.0]])}
    found = collision(one, other, 0.5)
    assert found.rate == pytest.approx(1 / 6)
    assert found.floor == pytest.approx((2 * 3 / 4 + 1 * 1 / 2) / 6)
    assert collision(one, other).rate == pytest.approx(2 / 6)
    assert math.isnan(collision({"a": torch.zeros(2)}, {"a": torch.ones(2)}).ratio)
    masks = [{k: t.abs() > 0.5 for k, t in update.items()} for update in (one, other)]
    assert collision(masks[0], masks[1]) == found
    with pytest.raises(ValueError, match="different modules"):
        collision(one, {"a": one["a"]})
    rms = math.sqrt(sum(float(t.square().sum()) for u in (one, other) for t in u.values()) / 12)
    assert relative_threshold([one, other], 0.5) == pytest.approx(0.5 * rms)


def test_measures_of_adapters_equal_those_of_the_whole_update() -> None:
    one, other = {"m": factors(outputs=9)}, {"m": factors(outputs=9, seed=4)}
    first, second = one["m"].update.double(), other["m"].update.double()
    assert update_cosine(one, other) == pytest.approx(
        float(F.cosine_similarity(first.flatten(), second.flatten(), 0)), abs=1e-6
    )
    found = adapter_measures(one, 1.0)
    assert found["nuclear_norm"] == pytest.approx(float(torch.linalg.matrix_norm(first, "nuc")), rel=1e-5)
    assert found["frobenius_norm"] == pytest.approx(float(first.norm()), rel=1e-5)
    assert found["sparsity"] == pytest.approx(float((first.abs() <= 1).double().mean()))
    assert found["zeros"] == 0.0
    shares = torch.linalg.svdvals(first)[:3]
    shares = shares / shares.sum()
    assert found["effective_rank"] == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-5)
    a, b = one["m"].down.detach(), other["m"].down.detach()
    assert row_overlap(one["m"], other["m"]) == pytest.approx(float((a @ b.T).abs().sum()), rel=1e-5)
    cosines = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    assert row_overlap(one["m"], other["m"], normalize=True) == pytest.approx(float(cosines.abs().mean()), rel=1e-5)


def test_texts_at_hand_are_whole(request: pytest.FixtureRequest) -> None:
    from perennial.streams.files import data_folder

    folder = data_folder()
    if folder is None or not (folder / "CL_Benchmark").exists():
        pytest.skip("CL_Benchmark is not there: set PERENNIAL_DATA")
    for name in ORDERS["order4"]:
        task = read_task(name)
        assert {e.label for e in task.train} <= set(task.labels)
    assert len(read_task("amazon").test) == 7600
    assert json.loads((folder / "CL_Benchmark/NLI/RTE/labels.json").read_text()) == ["contradiction", "entailment"]
