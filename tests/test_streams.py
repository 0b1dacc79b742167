"""What changes under a network: the same for every method, every chunk, every companion."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import polars
import pytest
import torch
from PIL import Image
from references import lane, populate, same
from scipy import stats
from torch import Tensor
from torch.func import functional_call

from perennial import (
    MLP,
    SGD,
    UPGD,
    Adam,
    ContinualBackprop,
    Lane,
    PermutedDigits,
    Population,
    SlowlyChangingRegression,
)
from perennial.streams import (
    REGISTRY,
    ChangingAverage,
    ClassPairs,
    HeldOutEMNIST,
    LabelPermutedCIFAR10,
    LabelPermutedEMNIST,
    LabelPermutedMiniImageNet,
    NaturePermutedMNIST,
    PermutedMNIST,
    StationaryMNIST,
    Stream,
    SumOfTwo,
)
from perennial.streams.files import DATA_SETS, flat_images, images
from perennial.streams.formats import read_idx, read_pictures

DATA = Path(os.environ.get("PERENNIAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_mnist = pytest.mark.skipif(
    not (DATA / "mnist" / "train-images-idx3-ubyte.gz").exists(),
    reason="MNIST is not here: set PERENNIAL_DATA to a folder that holds mnist/",
)


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERENNIAL_DATA", str(DATA))


SMALL: dict[str, Stream] = {
    "one": SlowlyChangingRegression(slow_bits=4, fast_bits=3, flip_after=20, target_units=10),
    "all": SlowlyChangingRegression(slow_bits=4, fast_bits=3, flip_after=20, target_units=10, flip="all"),
    "no fast bits": SlowlyChangingRegression(slow_bits=4, fast_bits=0, flip_after=20, target_units=10),
    "digits": PermutedDigits(),
    "mnist": PermutedMNIST(task_steps=40),
    "nature mnist": NaturePermutedMNIST(task_steps=40),
    "stationary mnist": StationaryMNIST(task_steps=40),
    "emnist": LabelPermutedEMNIST(task_steps=40),
    "cifar10": LabelPermutedCIFAR10(task_steps=40),
    "mini-imagenet": LabelPermutedMiniImageNet(task_steps=40),
    "sum": SumOfTwo(task_steps=20),
    "average, signs": ChangingAverage(task_steps=20),
    "average, inputs": ChangingAverage(change="inputs", task_steps=20),
    "held-out emnist": HeldOutEMNIST(task_steps=40),
    "pairs": ClassPairs(epochs=2, batch_size=60),
}
FILES = {
    "mnist": "mnist/train-images-idx3-ubyte.gz",
    "nature mnist": "mnist/train-images-idx3-ubyte.gz",
    "stationary mnist": "mnist/train-images-idx3-ubyte.gz",
    "emnist": "emnist47/train-images-idx3-ubyte.gz",
    "held-out emnist": "emnist47/t10k-images-idx3-ubyte.gz",
    "cifar10": "cifar10/train.parquet",
    "pairs": "tiny-imagenet-32/train.parquet",
    "mini-imagenet": "mini-imagenet/features.npz",
}


def needs(name: str) -> list[pytest.MarkDecorator]:
    if name not in FILES:
        return []
    absent = not (DATA / FILES[name]).exists()
    marks = [pytest.mark.skipif(absent, reason=f"{FILES[name]} is not here: set PERENNIAL_DATA to the folder of it")]
    return [*marks, pytest.mark.slow] if name == "cifar10" else marks


every_stream = pytest.mark.parametrize("stream", [pytest.param(s, id=n, marks=needs(n)) for n, s in SMALL.items()])


def test_every_stream_is_tested() -> None:
    assert {type(s) for s in SMALL.values()} == set(REGISTRY), "add a new stream to SMALL in tests/test_streams.py"


class Opened:
    """A stream opened for some seeds, with the seeds in front: what it yields is compared seed by seed."""

    def __init__(self, stream: Stream, seeds: list[int]) -> None:
        self.feed: Any = stream.open(seeds, torch.device("cpu"))

    def examples(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs [steps, seeds, batch, ...], targets [steps, seeds, batch, ...]."""
        inputs, targets = self.feed.examples(start, count)
        return inputs.movedim(-1, 1), targets.movedim(-1, 1)

    def probe(self, step: int, size: int) -> Tensor:
        """[seeds, size, ...]."""
        return self.feed.probe(step, size).movedim(-1, 0)  # type: ignore[no-any-return]


def slow_and_fast(stream: SlowlyChangingRegression, inputs: Tensor) -> tuple[Tensor, Tensor]:
    return inputs[..., : stream.slow_bits], inputs[..., stream.slow_bits :]


# --- a pure function of seed and position ---------------------------------------------------------------------------


@every_stream
def test_chunks_do_not_matter(stream: Stream) -> None:
    steps = 2 * stream.task_length() + 7
    inputs, targets = Opened(stream, [3, 5]).examples(0, steps)
    assert inputs.shape == (steps, 2, stream.batch, *stream.input_shape)
    each = (stream.outputs,) if stream.task == "regression" else ()
    assert targets.shape == (steps, 2, stream.batch, *each)
    feed = Opened(stream, [3, 5])
    at = 0
    for length in (1, 6, 13, stream.task_length() - 5, steps):
        length = min(length, steps - at)
        for part, whole in zip(feed.examples(at, length), (inputs, targets), strict=True):
            assert torch.equal(part, whole[at : at + length])
        at += length
    for part, whole in zip(feed.examples(2, 5), (inputs, targets), strict=True):  # and out of order
        assert torch.equal(part, whole[2:7])


@every_stream
def test_other_seeds_do_not_matter(stream: Stream) -> None:
    steps = stream.task_length() + 9
    together = Opened(stream, [8, 3, 1])
    alone = Opened(stream, [3])
    for a, b in zip(together.examples(0, steps), alone.examples(0, steps), strict=True):
        assert torch.equal(a[:, 1], b[:, 0])
    for step in (0, steps - 1):
        assert torch.equal(together.probe(step, 30)[1], alone.probe(step, 30)[0])


@every_stream
def test_seeds_differ(stream: Stream) -> None:
    inputs, targets = Opened(stream, [0, 1]).examples(0, 50)
    assert not torch.equal(inputs[:, 0], inputs[:, 1])
    assert not torch.equal(targets[:, 0], targets[:, 1])


@every_stream
def test_far_positions_are_reached_directly(stream: Stream) -> None:
    """Not by going through all the positions before: a resumed run starts at once, with the same examples."""
    start = 3_000 * stream.task_length() - 3
    fresh, used = Opened(stream, [2]), Opened(stream, [2])
    used.examples(0, 2 * stream.task_length())
    used.examples(start - 1, 4)
    for a, b in zip(fresh.examples(start, 6), used.examples(start, 6), strict=True):
        assert torch.equal(a, b)


@every_stream
def test_a_stream_leaves_the_global_random_state_alone(stream: Stream) -> None:
    before = torch.get_rng_state()
    feed = Opened(stream, [0])
    feed.examples(0, 30)
    feed.probe(0, 10)
    assert torch.equal(before, torch.get_rng_state())


def test_every_method_sees_the_same_tasks() -> None:
    """Published: label permutations came from the random state that the methods' noise consumed."""
    losses = []
    stream = SMALL["one"]
    for rule, interventions in (
        (SGD(lr=0.0), ()), (Adam(lr=0.0), ()), (UPGD(lr=0.0, noise_std=1.0), ()),
        (SGD(lr=0.0), (ContinualBackprop(1.0, 1000),)),
    ):  # fmt: skip
        population = populate([Lane(4, rule, interventions)], stream)
        population.advance(45)
        losses.append(population.collect(45)["online_loss"])
        same(lane(population, 0).params, lane(populate([Lane(4, SGD())], stream), 0).params)
    assert all(torch.equal(loss, losses[0]) for loss in losses)


# --- slowly-changing regression -------------------------------------------------------------------------------------


def test_one_slow_bit_flips_between_tasks() -> None:
    """Published: the default configuration draws all the bits anew, which is another experiment."""
    stream = SlowlyChangingRegression(slow_bits=15, fast_bits=5, flip_after=3, target_units=5)
    inputs, _ = Opened(stream, [0, 1]).examples(0, 3 * 400)
    slow = slow_and_fast(stream, inputs)[0][:, :, 0].reshape(400, 3, 2, 15)
    assert (slow == slow[:, :1]).all(), "slow bits hold for the whole task"
    flips = (slow[1:, 0] != slow[:-1, 0]).double()
    assert (flips.sum(-1) == 1).all()
    for seed in (0, 1):
        assert stats.chisquare(flips[:, seed].sum(0).numpy()).pvalue > 1e-4, "every bit as often"
    assert not torch.equal(flips[:, 0], flips[:, 1])


def test_all_draws_every_slow_bit_anew() -> None:
    stream = SlowlyChangingRegression(slow_bits=15, fast_bits=1, flip_after=2, flip="all", target_units=5)
    inputs, _ = Opened(stream, [0]).examples(0, 2 * 600)
    slow = slow_and_fast(stream, inputs)[0][:, 0, 0].reshape(600, 2, 15)
    assert (slow[:, 0] == slow[:, 1]).all()
    flips = (slow[1:, 0] != slow[:-1, 0]).double()
    assert abs(float(flips.mean()) - 0.5) < 5 * 0.5 / flips.numel() ** 0.5
    assert float(flips.sum(-1).std()) == pytest.approx((15 / 4) ** 0.5, rel=0.2)


def test_fast_bits_are_fair_and_independent() -> None:
    stream = SlowlyChangingRegression(target_units=5)
    inputs, _ = Opened(stream, [7]).examples(0, 40_000)
    fast = slow_and_fast(stream, inputs)[1][:, 0, 0]
    assert set(fast.unique().tolist()) == {0.0, 1.0}
    code = (fast.long() * 2 ** torch.arange(5)).sum(1)
    assert stats.chisquare(torch.bincount(code, minlength=32).numpy()).pvalue > 1e-4
    pairs = torch.bincount(code[1:] * 32 + code[:-1], minlength=1024)
    assert stats.chisquare(pairs.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(("stream", "seed"), [
    (SlowlyChangingRegression(flip_after=50), 0),
    (SlowlyChangingRegression(flip_after=50), 11),
    (SlowlyChangingRegression(slow_bits=3, fast_bits=2, flip_after=10, target_units=7, beta=0.6), 2),
])  # fmt: skip
def test_targets_equal_an_independent_evaluation(stream: SlowlyChangingRegression, seed: int) -> None:
    """The fixed network, unit by unit. Published: the bias weight counts with the wrong sign in the threshold."""
    feed = Opened(stream, [seed])
    inputs, targets = feed.examples(0, 500)
    weights = np.concatenate([feed.feed.weight[0].numpy(), feed.feed.constant[0].numpy()[:, None]], 1)
    readout, offset = feed.feed.readout[0].numpy().flatten(), float(feed.feed.offset.flatten()[0])
    for table in (weights, readout, np.array([offset])):
        assert set(np.unique(table)) <= {-1.0, 1.0}
    assert weights.shape == (stream.target_units, stream.inputs + 1)
    expected = []
    for x in inputs[:, 0, 0].numpy():
        total = offset
        for w, v in zip(weights, readout, strict=True):
            agreeing = sum(w[j] * x[j] for j in range(stream.inputs)) + w[-1] * 1.0
            negative = sum(1 for value in w if value == -1)
            total += v if agreeing > stream.beta * (stream.inputs + 1) - negative else 0.0
        expected.append(total)
    np.testing.assert_allclose(targets[:, 0, 0, 0].numpy(), expected, rtol=0, atol=1e-5)
    assert len(set(expected)) > 3


def test_the_target_network_is_drawn_fairly() -> None:
    feed = Opened(SlowlyChangingRegression(target_units=500), list(range(10)))
    for table in (feed.feed.weight, feed.feed.constant, feed.feed.readout):
        assert abs(float(table.mean())) < 5 / table.numel() ** 0.5


@pytest.mark.parametrize(("field", "value"), [
    ("slow_bits", 0), ("slow_bits", 1.5), ("slow_bits", True), ("fast_bits", -1), ("fast_bits", 13), ("flip_after", 0),
    ("flip_after", "9"), ("target_units", 0), ("flip", "two"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"slowly_changing_regression\.{field} is {value!r}"):
        SlowlyChangingRegression(**{field: value})


@pytest.mark.parametrize("beta", [float("nan"), "much", None])
def test_beta_must_be_a_number(beta: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"slowly_changing_regression\.beta"):
        SlowlyChangingRegression(beta=beta)


# --- permuted digits ------------------------------------------------------------------------------------------------


def _lexsorted(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T[::-1])]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    return images / 16, classes


def _unpermute(images: np.ndarray, original: np.ndarray) -> np.ndarray:
    """The columns of ``images`` put back by what is in them: a column is known by its sorted values."""
    here = [tuple(np.sort(column)) for column in images.T]
    there = [tuple(np.sort(column)) for column in original.T]
    assert sorted(here) == sorted(there), "the pixels are not those of the original images"
    chosen: list[int] = []
    for column in there:  # equal columns (all zero) stand for one another
        chosen.append(next(i for i, other in enumerate(here) if other == column and i not in chosen))
    return images[:, chosen]


def test_every_task_permutes_the_originals_and_shows_each_once() -> None:
    """A task is the original images, one permutation of the pixels for all of them, in an order of its own."""
    stream = PermutedDigits()
    original, classes = _digits()
    length = stream.task_length()
    assert length == len(classes)
    inputs, targets = Opened(stream, [0, 6]).examples(0, 3 * length)
    x = inputs[:, :, 0].reshape(3, length, 2, 64).double().numpy()
    y = targets[:, :, 0].reshape(3, length, 2).numpy()
    expected = _lexsorted(np.column_stack([original, classes]))
    seen = []
    for task in range(3):
        for seed in range(2):
            images = _unpermute(x[task, :, seed], original)
            np.testing.assert_array_equal(_lexsorted(np.column_stack([images, y[task, :, seed]])), expected)
            assert not np.array_equal(x[task, :, seed], original)
            seen.append((x[task, :, seed].sum(1), x[task, :, seed].sum(0)))
    for i, (order, pixels) in enumerate(seen):
        for other_order, other_pixels in seen[:i]:
            assert not np.array_equal(order, other_order), "every task has an order of its own"
            assert not np.allclose(pixels, other_pixels), "every task has a permutation of its own"


# --- the probe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one", "all"])
def test_the_probe_is_of_the_task_in_force(kind: str) -> None:
    stream = SMALL[kind]
    assert isinstance(stream, SlowlyChangingRegression)
    feed = Opened(stream, [0, 4])
    inputs, _ = feed.examples(0, 400)
    for step in (0, 19, 20, 21, 139, 399):
        probe = feed.probe(step, 64)
        assert probe.shape == (2, 64, stream.inputs)
        slow, fast = slow_and_fast(stream, probe)
        expected, _ = slow_and_fast(stream, inputs[step, :, 0])
        assert (slow == expected[:, None]).all()
        assert all(len(one.unique(dim=0)) == 8 for one in fast), "fresh fast bits"


def test_the_digits_probe_is_of_the_task_in_force() -> None:
    stream = PermutedDigits()
    length = stream.task_length()
    feed = Opened(stream, [0, 4])
    for step in (0, length - 1, length):
        probe = feed.probe(step, 200)
        task = feed.examples(step // length * length, length)[0][:, :, 0]
        for seed in range(2):
            rows = {tuple(row) for row in task[:, seed].tolist()}
            assert all(tuple(row) in rows for row in probe[seed].tolist())


# --- MNIST ----------------------------------------------------------------------------------------------------------


@needs_mnist
def test_mnist_is_permuted_from_the_original_and_visited_once_a_pass() -> None:
    images, classes = flat_images("mnist")
    seen, targets = Opened(PermutedMNIST(task_steps=25_000), [2]).examples(0, 60_001)
    assert float(seen.min()) == -1
    assert float(seen.max()) == 1
    # Every image once: pixel sums do not change under permutations, and with the class they say enough.
    here = torch.stack([seen[:60_000, 0, 0].double().add(1).mul(127.5).round().sum(1), targets[:60_000, 0, 0].double()])
    there = torch.stack([images.double().sum(1), classes.double()])
    assert sorted(map(tuple, here.T.tolist())) == sorted(map(tuple, there.T.tolist()))

    # A pixel that no image uses stands still within a task, and lies elsewhere in the next.
    def still(start: int, end: int) -> list[int]:
        return (seen[start:end, 0, 0] == -1).all(0).nonzero()[:, 0].tolist()  # type: ignore[no-any-return]

    unused = int((images == 0).all(0).sum())
    assert len(still(0, 25_000)) >= unused
    assert still(0, 25_000) != still(25_000, 50_000)
    assert len(still(0, 50_000)) < unused


@needs_mnist
def test_the_papers_permutations_build_on_each_other_and_tasks_begin_passes() -> None:
    stream = NaturePermutedMNIST(task_steps=70_000)
    feed: Any = stream.open([3, 4], torch.device("cpu"))
    first, second = (feed.pixels(task) for task in (0, 1))
    drawn = feed.noise(1).uniform("pixels", 784)[0].argsort(dim=0, stable=True)
    assert torch.equal(second, first.gather(0, drawn))
    assert torch.equal(stream.open([3], torch.device("cpu")).pixels(1)[:, 0], second[:, 0])
    # A task of 70,000 is a whole pass and the beginning of another; the next task begins a third.
    shown = torch.cat([feed.examples(at, 5000).targets[:, 0, 0] for at in range(0, 75_000, 5000)])
    counts = flat_images("mnist")[1].bincount()
    assert torch.equal(shown[:60_000].bincount(), counts)
    orders = [feed.order(epoch)[:, 0] for epoch in range(3)]
    classes = flat_images("mnist")[1]
    assert torch.equal(shown[60_000:70_000], classes[orders[1][:10_000]])
    assert torch.equal(shown[70_000:], classes[orders[2][:5000]])
    pixels = feed.examples(69_999, 2).inputs[:, 0, :, 0]
    assert float(pixels.min()) == 0
    assert float(pixels.max()) == 1
    rows = classes.new_tensor([orders[1][9999], orders[2][0]])
    assert torch.allclose(pixels[0], flat_images("mnist")[0][rows[0]].float()[first[:, 0]] / 255)
    assert torch.allclose(pixels[1], flat_images("mnist")[0][rows[1]].float()[second[:, 0]] / 255)


@pytest.mark.skipif(not (DATA / FILES["emnist"]).exists(), reason="EMNIST is not here")
def test_labels_are_permuted_and_pixels_stay() -> None:
    pixels, classes = (images("emnist").pixels.flatten(1), images("emnist").classes)
    feed: Any = LabelPermutedEMNIST(task_steps=3000).open([5], torch.device("cpu"))
    inputs, targets = feed.examples(0, 6000)
    rows = feed.order(0)[:6000, 0]
    assert torch.allclose(inputs[:, 0, :, 0], pixels[rows].float() / 127.5 - 1)
    maps = []
    for task in range(2):
        within = slice(3000 * task, 3000 * (task + 1))
        label = feed.labels(task)[:, 0]
        assert label.sort().values.tolist() == list(range(47))
        assert torch.equal(targets[within, 0, 0], label[classes[rows[within]]])
        maps.append(label)
    assert not torch.equal(*maps)


@pytest.mark.skipif(not (DATA / FILES["held-out emnist"]).exists(), reason="EMNIST is not here")
def test_held_out_images_are_test_images_with_the_labels_of_the_task_in_force() -> None:
    stream = HeldOutEMNIST(task_steps=30)
    feed: Any = stream.open([5, 9], torch.device("cpu"))
    same: Any = LabelPermutedEMNIST(task_steps=30).open([5, 9], torch.device("cpu"))
    for mine, theirs in zip(feed.examples(0, 70), same.examples(0, 70), strict=True):
        assert torch.equal(mine, theirs)
    pixels, classes = images("emnist", "test")
    for step in (0, 29, 30, 65):
        inputs, labels = feed.held_out(step)
        assert inputs.shape == (250, 784, 2)
        for seed in range(2):
            assert torch.allclose(inputs[..., seed], pixels[:250].flatten(1).float() / 127.5 - 1)
            assert torch.equal(labels[:, seed], same.labels(step // 30)[:, seed][classes[:250]])
    with pytest.raises(ValueError, match=r"test_images is 100000, but EMNIST's files here have \d+ test images"):
        HeldOutEMNIST(test_images=100_000).open([0], torch.device("cpu"))


@pytest.mark.skipif(not (DATA / FILES["held-out emnist"]).exists(), reason="EMNIST is not here")
def test_a_population_is_tested_on_what_was_held_out() -> None:
    stream = HeldOutEMNIST(task_steps=30, test_images=40)
    population = Population(lambda: MLP(hidden=(8,)).build(784, 47), stream, [Lane(3, SGD(lr=0.05))], compiled=False)
    population.advance(30)
    inputs, labels = stream.open([3], torch.device("cpu")).held_out(29)
    said = functional_call(
        MLP(hidden=(8,)).build(784, 47), {n: w[..., 0] for n, w in population.state.params.items()}, (inputs[..., 0],)
    )
    right = (said.argmax(1) == labels[:, 0]).double().mean()
    assert torch.equal(population.collect(30)["test_accuracy"], right[None])
    population.advance(10)
    assert "test_accuracy" not in population.collect(10)


def test_stationary_mnist_never_changes() -> None:
    stream = StationaryMNIST()
    assert stream.pixels(None, 3) is None  # type: ignore[arg-type]
    assert stream.labels(None, 3) is None  # type: ignore[arg-type]


def test_features_of_mini_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERENNIAL_DATA", str(tmp_path))
    stream = LabelPermutedMiniImageNet(task_steps=4)
    with pytest.raises(FileNotFoundError, match=r"no .*features.npz; it is a NumPy archive with features"):
        stream.data()
    path = tmp_path / "mini-imagenet" / "features.npz"
    path.parent.mkdir()
    rows = np.random.default_rng(0).normal(size=(7, 2048))
    for bad, message in (
        ({"features": rows}, "cannot be read as an archive of features and labels"),
        ({"features": rows[:, :5], "labels": np.arange(7)}, r"holds features \(7, 5\) and labels \(7,\)"),
        ({"features": rows, "labels": np.arange(7) + 94}, "no whole numbers from 0 to 99"),
        ({"features": np.where(rows == rows[4, 8], np.nan, rows), "labels": np.arange(7)}, "not finite in row 4"),
        ({"features": rows[:0], "labels": np.arange(0)}, "features.npz holds no images"),
        ({"features": rows.astype(str), "labels": np.arange(7)}, "features of type <U.*; they must be numbers"),
    ):
        np.savez(path, **bad)
        with pytest.raises(ValueError, match=message):
            stream.data()
    for write in (lambda: np.save(path.with_suffix(".npy"), rows), lambda: path.with_suffix(".npy").write_bytes(b"")):
        write()
        path.with_suffix(".npy").replace(path)
        with pytest.raises(ValueError, match=r"cannot be read as an archive of features and labels: .*numpy.savez"):
            stream.data()
    np.savez(path, features=rows, labels=np.arange(7) * 10)
    feed: Any = stream.open([0], torch.device("cpu"))
    inputs, targets = feed.examples(0, 7)
    order = feed.order(0)[:, 0]
    assert torch.equal(inputs[:, 0, :, 0], torch.from_numpy(rows).float()[order])
    assert torch.equal(targets[:4, 0, 0], feed.labels(0)[order[:4] * 10, 0])


def idx(folder: Path, shape: tuple[int, ...], kind: int = 8, extra: bytes = b"") -> Path:
    count = int(np.prod(shape))
    path = folder / "array.gz"
    header = struct.pack(">HBB", 0, kind, len(shape)) + struct.pack(f">{len(shape)}I", *shape)
    path.write_bytes(gzip.compress(header + bytes(i % 256 for i in range(count)) + extra))
    return path


def test_reads_idx(tmp_path: Path) -> None:
    array = read_idx(idx(tmp_path, (3, 4, 5)))
    assert array.shape == (3, 4, 5)
    assert array.flatten().tolist() == list(range(60))
    plain = tmp_path / "array"
    plain.write_bytes(gzip.decompress((tmp_path / "array.gz").read_bytes()))
    assert torch.equal(read_idx(plain), array)


def test_refuses_a_damaged_idx_by_name_and_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"array.gz holds elements of type 0x0d \(offset 2\)"):
        read_idx(idx(tmp_path, (3,), kind=13))
    with pytest.raises(ValueError, match=r"holds 3 x 4 bytes from offset 12, and holds 13"):
        read_idx(idx(tmp_path, (3, 4), extra=b"x"))
    path = idx(tmp_path, (200, 40))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"array.gz is damaged near offset {path.stat().st_size}, after \d+ bytes"):
        read_idx(path)
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match=r"array.gz is empty; put a whole copy there"):
        read_idx(path)
    with pytest.raises(ValueError, match="says that it holds 0 x 28 bytes, which is nothing"):
        read_idx(idx(tmp_path, (0, 28)))
    (tmp_path / "folder.gz").mkdir()
    with pytest.raises(ValueError, match=r"folder.gz cannot be read: Is a directory"):
        read_idx(tmp_path / "folder.gz")
    (tmp_path / "words").write_bytes(b"not an array")
    with pytest.raises(ValueError, match="words is no IDX file: it begins with 6e 6f 74 20"):
        read_idx(tmp_path / "words")
    (tmp_path / "short").write_bytes(b"\0\0\x08\x03\0\0")
    with pytest.raises(ValueError, match="ends at offset 6, within the sizes of its 3 dimensions"):
        read_idx(tmp_path / "short")


def test_says_what_is_needed_where_mnist_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PERENNIAL_DATA", str(tmp_path))
    with pytest.raises(
        FileNotFoundError,
        match=r"no mnist.train-images-idx3-ubyte.gz and mnist.train-labels-idx1-ubyte.gz in .* \(PERENNIAL_DATA\), and "
        r"it cannot be fetched .*; put the official files there",
    ):
        PermutedMNIST().open([0], torch.device("cpu"))
    monkeypatch.setenv("PERENNIAL_DATA", str(tmp_path / "gone"))
    with pytest.raises(
        FileNotFoundError, match=r"gone \(PERENNIAL_DATA\), which does not exist; put the official files"
    ):
        images("emnist")
    monkeypatch.delenv("PERENNIAL_DATA")
    with pytest.raises(
        FileNotFoundError, match=r"no mnist.train-images.*; set the environment variable PERENNIAL_DATA"
    ):
        PermutedMNIST().open([0], torch.device("cpu"))
    (tmp_path / "mnist").mkdir()
    idx(tmp_path, (2, 28, 28)).rename(tmp_path / "mnist" / "train-images-idx3-ubyte.gz")
    monkeypatch.setenv("PERENNIAL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no .*train-labels-idx1-ubyte.gz beside .*; put the official file"):
        PermutedMNIST().open([0], torch.device("cpu"))
    idx(tmp_path, (2,)).rename(tmp_path / "mnist" / "train-labels-idx1-ubyte.gz")
    with pytest.raises(ValueError, match=r"holds 2 images; the train set of MNIST has 60000"):
        PermutedMNIST().open([0], torch.device("cpu"))


def png(value: int, size: tuple[int, int] = (32, 32)) -> dict[str, bytes]:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 255)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue()}


def test_reads_pictures_from_parquet(tmp_path: Path) -> None:
    shape = (3, 32, 32)
    polars.DataFrame({"img": [png(3), png(4)], "fine_label": [7, 1], "label": [0, 0]}).write_parquet(tmp_path / "a")
    pixels, classes = read_pictures([tmp_path / "a"], ["fine_label", "label"], shape)
    assert pixels[:, 0, 0, 0].tolist() == [3, 4]
    assert pixels[:, 2].unique().tolist() == [255]
    assert classes.tolist() == [7, 1]
    lists = pixels.permute(0, 2, 3, 1).tolist()
    polars.DataFrame({"image": lists, "label": [5, 6]}).write_parquet(tmp_path / "b")
    polars.DataFrame({"image": pixels.tolist(), "label": [5, 6]}).write_parquet(tmp_path / "c")
    both, classes = read_pictures([tmp_path / "b", tmp_path / "c"], ["label"], shape)
    assert torch.equal(both, torch.cat([pixels, pixels]))
    assert classes.tolist() == [5, 6, 5, 6]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": [png(1)], "label": [None]}, "no label in row 0"),
        (
            {"img": [png(1), {"bytes": b"?"}], "label": [0, 1]},
            "row 1 holds a picture that cannot be decoded: it is of no",
        ),
        ({"img": [png(1), png(1, (16, 32))], "label": [0, 1]}, "row 1 holds a picture of 32 x 16 x 3, where one of 32"),
        ({"img": [png(1)], "label": ["cat"]}, "labels of type String in label"),
        ({"img": [[[[1.5] * 3] * 32] * 32], "label": [1]}, "row 0 holds pixels that are no whole numbers"),
        ({"img": [[[[1] * 3] * 32, [[1] * 3] * 31]], "label": [1]}, "row 0 holds rows of pixels that differ in length"),
        ({"img": [png(1)] * 2, "label": [1, 10]}, "row 1 has the label 10 in label; labels are 0 to 9"),
        ({"img": [], "label": []}, "a.parquet has no rows"),
        ({"picture": [png(1)], "label": [1]}, "has the columns picture, label; one must be img or image"),
    ],
)
def test_refuses_damaged_pictures_by_row(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    polars.DataFrame(columns).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        read_pictures([tmp_path / "a.parquet"], ["label"], (3, 32, 32), classes=10)


def test_refuses_labels_and_classes_of_another_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERENNIAL_DATA", str(tmp_path))
    images.cache_clear()
    for name in ("emnist", "emnist47", "fashion_mnist"):
        (tmp_path / name).mkdir()
    idx(tmp_path, (60, 28, 28)).rename(tmp_path / "emnist47" / "train-images-idx3-ubyte.gz")
    idx(tmp_path, (60,)).rename(tmp_path / "emnist47" / "train-labels-idx1-ubyte.gz")
    with pytest.raises(
        ValueError, match=r"emnist47.train-labels.*.gz has the label 47 for image 47 \(offset 55\); labels"
    ):
        images("emnist")  # the folder that comes first is empty
    folder = tmp_path / "cifar100"
    folder.mkdir()
    rows = {"img": [png(1)] * 500, "label": [k % 10 for k in range(500)]}
    few = dataclasses.replace(DATA_SETS["cifar100"], counts=(500, 500))
    monkeypatch.setitem(DATA_SETS, "cifar100", few)
    polars.DataFrame(rows).write_parquet(folder / "train.parquet")
    with pytest.raises(ValueError, match=r"train.parquet holds images of 10 classes; CIFAR-100 has 100: it is another"):
        images("cifar100")


def test_reads_what_was_fetched_before_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("PERENNIAL_DATA", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    images.cache_clear()
    with pytest.raises(FileNotFoundError, match="cannot be fetched"):
        images("imagenet-32")
    home = tmp_path / "datasets--benjamin-paine--imagenet-1k-32x32"
    commit = "0" * 39 + "1"
    for folder in ("blobs", "refs", f"snapshots/{commit}/data"):
        (home / folder).mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    polars.DataFrame({"image": [png(1), png(2)], "label": [999, 0]}).write_parquet(home / "blobs" / "new")
    digest = hashlib.sha256((home / "blobs" / "new").read_bytes()).hexdigest()
    blob = (home / "blobs" / "new").rename(home / "blobs" / digest)
    (home / "snapshots" / commit / "data" / "train-00000-of-00001.parquet").symlink_to(blob)
    assert images("imagenet-32").classes.tolist() == [999, 0]
    images.cache_clear()
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"blobs.{digest} is damaged: its SHA-256 is"):
        images("imagenet-32")
    images.cache_clear()


def test_reads_shards_and_refuses_damaged_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERENNIAL_DATA", str(tmp_path))
    folder = tmp_path / "tiny-imagenet-32"
    folder.mkdir()
    for shard in (0, 1):
        table = polars.DataFrame({"image": [png(shard)], "label": [199 + shard]})
        table.write_parquet(folder / f"train-{shard:05d}-of-00002.parquet")
    images.cache_clear()
    (folder / "train-or-rather-of-not.parquet").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"00001-of-00002.parquet, row 0 has the label 200 in label; labels are 0 to 199"
    ):
        images("tiny-imagenet-32")
    polars.DataFrame({"image": [png(1)], "label": [0]}).write_parquet(folder / "train-00001-of-00002.parquet")
    assert images("tiny-imagenet-32").classes.tolist() == [199, 0]
    (folder / "train-00000-of-00002.parquet").unlink()
    images.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"train-00000-of-00002.parquet is missing: the train set comes in 2"):
        images("tiny-imagenet-32")
    (folder / "test.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match=r"test.parquet is damaged, or no Parquet file"):
        images("tiny-imagenet-32", "test")
    with pytest.raises(ValueError, match=r"there is no data set 'mnits'; there are mnist, emnist"):
        images("mnits")
    with pytest.raises(ValueError, match="part is 'dev'; it is one of train, test"):
        images("mnist", "dev")


# --- sum of two -----------------------------------------------------------------------------------------------------


def test_the_target_is_the_sum_of_the_same_two_inputs_through_a_task() -> None:
    inputs, targets = Opened(SumOfTwo(width=4, task_steps=30), list(range(40))).examples(0, 60)
    x, y = inputs[:, :, 0], targets[:, :, 0, 0]
    assert float(x.min()) > -0.5
    assert float(x.max()) < 0.5
    pairs = [(i, j) for i in range(4) for j in range(i, 4)]
    sums = torch.stack([x[..., i] + x[..., j] for i, j in pairs])
    right = (sums - y).abs() < 1e-6
    chosen = []
    for task in (right[:, :30].all(1), right[:, 30:].all(1)):
        assert task.sum(0).tolist() == [1] * 40
        chosen.append(task.int().argmax(0))
    assert set(torch.cat(chosen).tolist()) == set(range(len(pairs)))
    assert not torch.equal(*chosen)


# --- a changing average ---------------------------------------------------------------------------------------------


def test_the_average_is_of_two_inputs_for_good_and_its_sign_alternates() -> None:
    inputs, targets = Opened(ChangingAverage(width=4, task_steps=30), list(range(60))).examples(0, 90)
    x, y = inputs[:, :, 0], targets[:, :, 0, 0]
    assert abs(float(x.mean())) < 0.03
    assert abs(float(x.var()) - 1) < 0.03
    y = y * torch.tensor([1.0, -1.0, 1.0]).repeat_interleave(30)[:, None]
    pairs = [(i, j) for i in range(4) for j in range(i, 4)]
    right = torch.stack([((x[..., i] + x[..., j]) / 2 - y).abs() < 1e-6 for i, j in pairs]).all(1)
    assert right.sum(0).tolist() == [1] * 60
    assert set(right.int().argmax(0).tolist()) == set(range(len(pairs)))


def test_the_average_goes_round_the_inputs() -> None:
    inputs, targets = Opened(ChangingAverage(change="inputs", width=6, task_steps=5), [0, 4]).examples(0, 40)
    for step in range(40):
        first = 2 * (step // 5 % 3)
        mean = inputs[step, :, 0, first : first + 2].mean(-1)
        assert torch.allclose(targets[step, :, 0, 0], mean, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"change": "both"}, "one of sign, inputs"), ({"width": 5}, "must be even"), ({"width": 0}, "at least 2")],
)
def test_what_a_changing_average_cannot_be_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ChangingAverage(**settings)
