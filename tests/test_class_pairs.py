"""Continual ImageNet: pairs of classes, the network of pictures, held-out accuracy at the end of a task."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import torch
from PIL import Image
from references import lane, same
from torch import Tensor, nn

from perennial import SGD, ContinualBackprop, Lane, Population
from perennial.methods import ResetLayers
from perennial.networks import ConvNet, Linear
from perennial.runs import plan
from perennial.streams import ClassPairs, class_pairs, files
from perennial.studies import load, stream_of, variants_of

CLASSES, TRAIN, TEST = 7, 6, 5
ZERO_HEAD = ResetLayers(values="zero")
BASE = Path(os.environ.get("PERENNIAL_DATA", Path(__file__).parents[2] / "shared" / "data"))


def forget() -> None:
    for cached in (files.images, class_pairs._parts):
        cached.cache_clear()


def value(cls: int, number: int, part: str) -> int:
    """The red of a picture's first pixel tells what it is."""
    return 30 * cls + 10 * (part == "test") + number


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A made-up Tiny-ImageNet of seven classes, noise but for the first pixel, in mixed order."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "tiny-imagenet-32"
    folder.mkdir()
    for part, count in (("train", TRAIN), ("test", TEST)):
        rows: list[dict[str, Any]] = []
        for number, cls in itertools.product(range(count), rng.permutation(CLASSES)):
            picture = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            picture[0, 0, 0] = value(int(cls), number, part)
            file = io.BytesIO()
            Image.fromarray(picture).save(file, format="PNG")
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": int(cls)})
        polars.DataFrame(rows).write_parquet(folder / f"{part}.parquet")
    monkeypatch.setenv("PERENNIAL_DATA", str(tmp_path))
    forget()
    yield
    forget()


def told(images: Tensor) -> Tensor:
    """What the first pixels say, of images [..., 3, 32, 32, seeds]."""
    return images[..., 0, 0, 0, :].to(torch.int64)


def tasks(stream: ClassPairs, seed: int, count: int) -> list[tuple[int, int]]:
    feed: Any = stream.open([seed], torch.device("cpu"))
    return [tuple(feed.pair(task)[:, 0].tolist()) for task in range(count)]


# --- the stream -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pictures")
def test_a_class_comes_once_before_all_have_come() -> None:
    stream = ClassPairs(epochs=1, batch_size=4)
    seen = [tasks(stream, seed, 9) for seed in range(20)]
    for pairs in seen:
        for once in (pairs[:3], pairs[3:6], pairs[6:]):
            assert len({cls for pair in once for cls in pair}) == 6
        assert pairs[:3] != pairs[3:6]
    first = {pairs[0] for pairs in seen}
    assert len(first) > 10, "other seeds have other pairs"
    assert {cls for pair in first for cls in pair} == set(range(CLASSES)), "every class may come"


@pytest.mark.usefixtures("pictures")
def test_an_epoch_visits_each_image_of_the_pair_once_in_an_order_of_its_own() -> None:
    stream = ClassPairs(epochs=2, batch_size=4)
    assert (stream.epoch_steps(), stream.task_length()) == (3, 6)
    inputs, targets = stream.open([1, 4], torch.device("cpu")).examples(0, 18)
    assert inputs.shape == (18, 4, 3, 32, 32, 2)
    seen = told(inputs)
    for number, seed in enumerate((1, 4)):
        orders = []
        for epoch, pair in enumerate(p for p in tasks(stream, seed, 3) for _ in range(2)):
            at = slice(3 * epoch, 3 * epoch + 3)
            these, those = seen[at, :, number].flatten(), targets[at, :, number].flatten()
            expected = {value(cls, n, "train") for cls in pair for n in range(TRAIN)}
            assert len(these) == len(expected)
            assert set(these.tolist()) == expected
            assert [pair[y] for y in those.tolist()] == (these // 30).tolist()
            orders.append((those * TRAIN + these % 30).tolist())
        assert all(a != b for a, b in itertools.pairwise(orders))


@pytest.mark.usefixtures("pictures")
def test_pixels_stay_as_they_are() -> None:
    inputs, _ = ClassPairs(epochs=1, batch_size=12).open([0], torch.device("cpu")).examples(0, 1)
    pixels = files.images("tiny-imagenet-32", "train").pixels
    first = inputs[0, 0, ..., 0]
    (original,) = [p for p in pixels if p[0, 0, 0] == first[0, 0, 0]]
    assert torch.equal(first, original.float())
    assert first.max() > 200


@pytest.mark.usefixtures("pictures")
def test_held_out_images_are_the_test_images_of_the_pair() -> None:
    stream = ClassPairs(epochs=2, batch_size=4)
    feed: Any = stream.open([3, 9], torch.device("cpu"))
    for step in (0, 5, 6, 17):
        inputs, classes = feed.held_out(step)
        for number, seed in enumerate((3, 9)):
            pair = tasks(stream, seed, 3)[step // 6]
            assert told(inputs)[:, number].tolist() == [value(c, n, "test") for c in pair for n in range(TEST)]
            assert classes[:, number].tolist() == [0] * TEST + [1] * TEST
    probe = told(feed.probe(17, 30))[:, 0]
    assert {int(v) // 30 for v in probe} == set(tasks(stream, 3, 3)[2])
    assert (probe % 30 < TRAIN).all()


@pytest.mark.usefixtures("pictures")
def test_the_papers_split_takes_both_parts_from_the_training_set() -> None:
    train, test = ClassPairs(train_images=4, test_images=2).parts()
    assert train[:, :, 0, 0, 0].tolist() == [[value(c, n, "train") for n in range(4)] for c in range(CLASSES)]
    assert test[:, :, 0, 0, 0].tolist() == [[value(c, n, "train") for n in (4, 5)] for c in range(CLASSES)]


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(("settings", "said"), [
    ({"batch_size": 5}, "batch_size is 5, which does not divide the 12"),
    ({"train_images": 4, "test_images": 3}, "needs 7 images of every class, but class 0 .* has 6"),
])  # fmt: skip
def test_what_the_data_cannot_give_is_refused(settings: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ClassPairs(**settings).open([0], torch.device("cpu"))


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(("part", "kept", "said"), [
    ("test", range(CLASSES - 1), f"class {CLASSES - 1} of tiny-imagenet-32 has no images in its test set"),
    ("train", [1, 2], "class 0 of tiny-imagenet-32 has no images in its train set"),
    ("train", [0], "needs images of two classes and more, and of every class; tiny-imagenet-32 has one"),
])  # fmt: skip
def test_a_class_without_images_is_refused(part: str, kept: list[int], said: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny-imagenet-32" / f"{part}.parquet"
    rows = polars.read_parquet(path)
    rows.filter(rows["label"].is_in(list(kept))).write_parquet(path)
    with pytest.raises(ValueError, match=said):
        ClassPairs(epochs=1, batch_size=2).open([0], torch.device("cpu"))


@pytest.mark.parametrize(("settings", "said"), [
    ({"data": "mnist"}, "data is 'mnist'; it is one of tiny-imagenet-32"),
    ({"epochs": 0}, "epochs is 0"), ({"batch_size": 0}, "batch_size is 0"), ({"train_images": 0}, "train_images is 0"),
    ({"test_images": 5}, "train_images is empty"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ClassPairs(**settings)


# --- the network ----------------------------------------------------------------------------------------------------


def test_the_network_is_the_papers() -> None:
    model = ConvNet().build(3072, 2)
    shapes = [tuple(w.shape) for name, w in model.named_parameters() if name.endswith("weight")]
    assert shapes == [(32, 3, 5, 5), (64, 32, 3, 3), (128, 64, 3, 3), (128, 512), (128, 128), (2, 128)]
    assert model(torch.zeros(5, 3, 32, 32)).shape == (5, 2)
    with pytest.raises(ValueError, match=r"3072 numbers, but the inputs have 784"):
        ConvNet().build(784, 10)


# --- in a population ------------------------------------------------------------------------------------------------


def populate(lanes: list[Lane], stream: ClassPairs, network: Any = None, **settings: Any) -> Population:
    network = network or ConvNet()
    settings = {"compiled": False} | settings
    return Population(lambda: network.build(stream.inputs, stream.outputs), stream, lanes, **settings)


@pytest.mark.usefixtures("pictures")
def test_training_is_torchs_with_the_head_at_zero_when_a_task_begins() -> None:
    stream = ClassPairs(epochs=1, batch_size=6)
    population = populate([Lane(2, SGD(lr=1e-3, momentum=0.9), (ZERO_HEAD,))], stream, dtype=torch.float64)
    model = ConvNet().build(3072, 2).double()
    model.load_state_dict(lane(population, 0).params)
    head = (model[-1].weight, model[-1].bias)
    assert all((w == 0).all() for w in head)
    assert model[0].weight.std() > 0.01
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    inputs, targets = stream.open([2], torch.device("cpu")).examples(0, 5)
    for step in range(5):
        if step and step % 2 == 0:
            for w in head:
                w.data.zero_()
                optimizer.state[w]["momentum_buffer"].zero_()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[step, ..., 0].double()), targets[step, :, 0]).backward()
        optimizer.step()
    population.advance(5)
    assert all((w != 0).any() for w in head)
    same(lane(population, 0).params, dict(model.named_parameters()), rtol=1e-9)


@pytest.mark.usefixtures("pictures")
def test_held_out_accuracy_is_that_of_the_pairs_that_ended() -> None:
    """With fixed weights that ask whether the first pixel is above 75: it is for the classes from 3 and no other."""
    stream = ClassPairs(epochs=2, batch_size=12)
    lanes = [Lane(seed, SGD(lr=0.0)) for seed in (5, 0, 5)]
    population = populate(lanes, stream, Linear())
    for name, w in population.state.params.items():
        w.zero_()
        if name.endswith("weight"):
            w[1, 0] = 1
        else:
            w[1] = -75
    found = {
        s: v["test_accuracy"].tolist()
        for s, v in population.records(10, bin=4, measure_every=4)
        if "test_accuracy" in v
    }
    assert list(found) == [4, 8, 10]

    def accuracy(seed: int, task: int) -> float:
        a, b = tasks(stream, seed, task + 1)[task]
        return ((a < 3) + (b >= 3)) / 2

    for end, ended in ((4, (0, 1)), (8, (2, 3)), (10, (4,))):
        expected = [sum(accuracy(ln.seed, t) for t in ended) / len(ended) for ln in lanes]
        assert found[end] == expected
    assert len({v for values in found.values() for v in values}) > 2, "or it would not tell one number from another"


@pytest.mark.usefixtures("pictures")
def test_a_bin_in_which_no_task_ends_has_no_held_out_accuracy() -> None:
    population = populate([Lane(0, SGD())], ClassPairs(epochs=2, batch_size=12), Linear())
    found = [s for s, v in population.records(6, bin=1, measure_every=1) if "test_accuracy" in v]
    assert found == [2, 4, 6]


@pytest.mark.usefixtures("pictures")
def test_held_out_accuracy_is_taken_before_the_head_becomes_zero() -> None:
    """A head of zeros gives one half on every pair."""
    population = populate(
        [Lane(s, SGD(lr=1e-4), (ZERO_HEAD,)) for s in range(4)], ClassPairs(epochs=20, batch_size=12), Linear()
    )
    ((_, values),) = population.records(20, bin=20, measure_every=20)
    assert (values["test_accuracy"] != 0.5).any()
    assert (population.state.params["1.weight"] == 0).all()


@pytest.mark.usefixtures("pictures")
def test_goes_on_from_a_checkpoint_with_the_same_bits() -> None:
    """Within a bin, after a task of it has ended."""
    keeper = ContinualBackprop(0.05, 2, utility="adaptable_contribution", bias_correction=True)
    lanes = [Lane(s, SGD(lr=1e-3, momentum=0.9), (keeper, ZERO_HEAD)) for s in (0, 1)]
    stream = ClassPairs(epochs=1, batch_size=6)
    through, stopped, resumed = (populate(lanes, stream) for _ in range(3))
    expected = list(through.records(8, bin=8, measure_every=8))
    stopped.advance(3)
    resumed.load_state_dict(stopped.state_dict())
    found = list(resumed.records(8, bin=8, measure_every=8))
    for (step, a), (other, b) in zip(expected, found, strict=True):
        assert step == other
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    same(lane(through, 1), lane(resumed, 1))
    values = expected[0][1]
    assert (values["units_replaced"] > 0).all(), "channels are replaced as well"
    assert {"dead_units", "weight_magnitude", "effective_rank_entropy", "test_accuracy"} <= values.keys()
    assert all(torch.isfinite(v).all() for v in values.values())
    alone = populate(lanes[1:], stream)
    ((_, own),) = alone.records(8, bin=8, measure_every=8)
    assert own["test_accuracy"][0] == values["test_accuracy"][1]


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
def test_compiled_is_the_same() -> None:
    lanes = [Lane(0, SGD(lr=1e-4, momentum=0.9), (ContinualBackprop(0.02, 1), ZERO_HEAD))]
    both = [populate(lanes, ClassPairs(epochs=2, batch_size=6), compiled=c) for c in (False, True)]
    for population in both:
        population.advance(5)
    same(lane(both[0], 0).params, lane(both[1], 0).params, rtol=1e-3)


# --- the studies ----------------------------------------------------------------------------------------------------


def test_the_study_is_the_papers() -> None:
    study = load("nature/continual-imagenet")
    steps = {key: part.steps for key, part in study.parts.items()}  # type: ignore[union-attr]
    each = 250 * 1200 // 100
    assert steps == {"backprop": 2000 * each, "methods": 5000 * each}
    for key, part in study.parts.items():  # type: ignore[union-attr]
        stream = stream_of(part, key)
        assert isinstance(stream, ClassPairs)
        assert (stream.data, stream.epochs, stream.batch) == ("imagenet-32", 250, 100)
        assert (stream.train_images, stream.test_images) == (600, 100)
        assert part.judged_by == "test_accuracy"
        assert part.bin == 50 * each
        for variant in variants_of(part, key, key):
            assert variant.rule.momentum == 0.9  # type: ignore[attr-defined]
            assert variant.interventions[-1] == ZERO_HEAD


@pytest.mark.slow
@pytest.mark.skipif(not (BASE / "tiny-imagenet-32").exists(), reason="Tiny-ImageNet is not here: set PERENNIAL_DATA")
@pytest.mark.parametrize("name", ["nature/continual-imagenet", "nature/continual-imagenet-small"])
def test_a_study_makes_its_first_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERENNIAL_DATA", str(BASE))
    forget()
    changes = {} if name.endswith("small") else {"stream.data": "tiny-imagenet-32"}
    changes |= {} if name.endswith("small") else {"stream.train_images": None, "stream.test_images": None}
    study = load(name, changes=changes)
    for key, lanes in plan.programs(study):  # type: ignore[arg-type]
        part = study.parts[key]  # type: ignore[union-attr]
        variants = variants_of(part, key, key)
        stream = stream_of(part, key)
        population = populate([variants[lanes[0][0]].lane(0)], stream)  # type: ignore[arg-type]
        population.advance(2)
        assert torch.isfinite(population.collect(2)["online_loss"]).all()
    forget()
