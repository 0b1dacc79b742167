"""Classes that arrive: their order, augmentation, the schedule, masks, resets, and runs that are interrupted."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import perennial.incremental.images
import perennial.incremental.learn
from perennial.compared import Job
from perennial.incremental import ArrivingClasses, ImageRecipe, ImageTraining, class_order, divided, run_arriving
from perennial.incremental.images import ArrivingImages
from perennial.incremental.learn import Learner, run_one
from perennial.incremental.measures import accuracy, diagnose
from perennial.metrics import rank_99, rarely_active_units
from perennial.parallel import Stopped
from perennial.resnet import ResNet18
from perennial.storage import read_tensors
from perennial.streams.augment import Augmentation, crop, flip, rotate
from perennial.streams.files import Images
from perennial.studies import ArrivingStudy, StudyError, load

METHODS = {
    "backprop": ImageRecipe(),
    "head": ImageRecipe(reset="head"),
    "retrained": ImageRecipe(reset="all", interventions={"shrink_and_perturb": {"noise_std": 1e-2}}),
    "cbp": ImageRecipe(
        coupled=True, interventions={"continual_backprop": {"replacement_rate": 0.1, "maturity_threshold": 2}}
    ),
}
SMALL = ArrivingClasses(
    methods=METHODS,
    increments=2,
    per_increment=2,
    train=5,
    validation=3,
    test=3,
    side=8,
    width=2,
    diagnosed=7,
    seeds=(0, 1),
    training=ImageTraining(epochs=3, batch_size=4, shift=2),
)


@pytest.fixture(autouse=True)
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five classes of ten and six pictures of 16 x 16, each class of a brightness of its own."""

    def read(name: str, part: str = "train") -> Images:
        assert name == "cifar100"
        each = {"train": 10, "test": 6}[part]
        generator = torch.Generator().manual_seed(each)
        classes = torch.arange(5).repeat(each)
        noise = torch.randint(0, 40, (len(classes), 3, 16, 16), generator=generator)
        return Images((noise + 40 * classes[:, None, None, None]).to(torch.uint8), classes)

    monkeypatch.setattr(perennial.incremental.images, "images", read)


def test_the_order_of_classes_is_a_permutation_that_the_seed_gives() -> None:
    orders = [class_order(100, seed) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0].sort().values, torch.arange(100))


def test_no_image_is_in_two_parts_and_every_class_has_as_many() -> None:
    classes = torch.randint(0, 6, (400,), generator=torch.Generator().manual_seed(0))
    order = class_order(6, 3)
    parts = divided(classes, order, 30, 10, 3)
    for part, count in ((parts.train, 30), (parts.validation, 10)):
        assert part.shape == (6, count)
        assert torch.equal(classes[part], order[:, None].expand(6, count))
    everything = torch.cat((parts.train.flatten(), parts.validation.flatten()))
    assert len(everything.unique()) == len(everything)
    assert torch.equal(divided(classes, order, 30, 10, 3).train, parts.train)
    assert not torch.equal(divided(classes, order, 30, 10, 4).train, parts.train)


def test_too_few_images_of_a_class_are_said() -> None:
    with pytest.raises(ValueError, match="class 1 has 2 images, and 4 are asked for"):
        divided(torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 1]), 3, 1, 0)


def test_images_stand_by_arrival_and_are_averaged_and_normalised() -> None:
    data = ArrivingImages(SMALL, 0)
    order = class_order(5, 0)
    assert data.train.shape == (4, 5, 3, 8, 8)
    assert data.test.shape == (4, 3, 3, 8, 8)
    brightness = data.train.float().mean((1, 2, 3, 4))
    assert torch.equal(brightness.argsort(), order[:4].argsort())
    after = data.arriving_next(4, 2, 7)  # the fifth class has five training images
    assert after.shape == (5, 3, 8, 8)
    assert data.arriving_next(2, 2, 7).shape == (7, 3, 8, 8)
    grey = torch.full((1, 3, 1, 1), 51, dtype=torch.uint8)
    expected = (0.2 - torch.tensor([0.5071, 0.4865, 0.4409])) / torch.tensor([0.2673, 0.2564, 0.2762])
    torch.testing.assert_close(data.normalised(grey).flatten(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"increments": 3}, "3 increments of 2 classes are 6; cifar100 has 5"),
        ({"side": 7}, "side is 7; images of 16 x 16"),
        ({"test": 7}, "has 6 images, and 7 are asked for"),
    ],
)
def test_images_that_do_not_do_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArrivingImages(dataclasses.replace(SMALL, **change), 0)


def _some(count: int = 5, height: int = 6, width: int = 7) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_flip_mirrors_some() -> None:
    images = _some()
    where = torch.tensor([True, False, True, False, False])
    out = flip(images, where)
    for i in range(5):
        for x in range(7):
            source = 6 - x if where[i] else x
            assert torch.equal(out[i, :, :, x], images[i, :, :, source])


def test_crop_is_a_window_of_the_reflected_image() -> None:
    images, padding = _some(), 2
    down, right = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([4, 0, 2, 1, 3])

    def reflected(place: int, size: int) -> int:
        place = abs(place)
        return place if place < size else 2 * (size - 1) - place

    out = crop(images, down, right, padding)
    for i in range(5):
        for y in range(6):
            for x in range(7):
                source = images[i, :, reflected(y + int(down[i]) - 2, 6), reflected(x + int(right[i]) - 2, 7)]
                assert torch.equal(out[i, :, y, x], source)
    assert torch.equal(crop(images, down * 0, right * 0, 0), images)
    with pytest.raises(ValueError, match="padding is 6; images of 6 x 7 can be reflected by 0 to 5"):
        crop(images, down, right, 6)


@pytest.mark.parametrize("shape", [(6, 6), (5, 8)])
def test_rotation_interpolates_where_a_pixel_came_from(shape: tuple[int, int]) -> None:
    height, width = shape
    images = _some(3, *shape)
    degrees = torch.tensor([15.0, -40.0, 90.0], dtype=torch.float64)
    out = rotate(images, degrees)
    for i, angle in enumerate(torch.deg2rad(degrees).tolist()):
        for y in range(height):
            for x in range(width):
                right, down = x - (width - 1) / 2, y - (height - 1) / 2
                from_x = right * math.cos(angle) - down * math.sin(angle) + (width - 1) / 2
                from_y = right * math.sin(angle) + down * math.cos(angle) + (height - 1) / 2
                value = torch.zeros(3, dtype=torch.float64)
                for row in (math.floor(from_y), math.floor(from_y) + 1):
                    for column in (math.floor(from_x), math.floor(from_x) + 1):
                        if 0 <= row < height and 0 <= column < width:
                            share = (1 - abs(from_y - row)) * (1 - abs(from_x - column))
                            value += share * images[i, :, row, column]
                torch.testing.assert_close(out[i, :, y, x], value)
    if height == width:
        torch.testing.assert_close(out[2], images[2].rot90(1, (-2, -1)))


def test_augmentation_draws_over_the_whole_range_and_acts_in_order() -> None:
    augmentation = Augmentation()
    drawn = augmentation.draw(4000, torch.Generator().manual_seed(0))
    assert 0.45 < drawn.mirrored.float().mean() < 0.55
    for places in (drawn.down, drawn.right):
        assert torch.equal(places.unique(), torch.arange(9))
    assert drawn.degrees.min() >= 0
    assert 14.9 < drawn.degrees.max() <= 15
    images = _some(8, 16, 16)
    part = drawn.of(torch.arange(8))
    expected = rotate(crop(flip(images, part.mirrored), part.down, part.right, 4), part.degrees)
    assert torch.equal(augmentation(images, part), expected)
    assert torch.equal(Augmentation(0.0, 0, 0.0, 0.0)(images, part._replace(mirrored=part.mirrored & False)), images)


@pytest.mark.parametrize("settings", [{"mirror": 1.5}, {"shift": -1}, {"low": 20.0}])
def test_augmentation_out_of_range_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Augmentation(**settings)  # type: ignore[arg-type]


def test_the_step_size_falls_at_shares_of_the_epochs() -> None:
    rates = [ImageTraining().scale(epoch) for epoch in range(200)]
    expected = [0.2 ** ((e >= 60) + (e >= 120) + (e >= 160)) for e in range(200)]
    assert rates == pytest.approx(expected)
    assert [ImageTraining(epochs=10).scale(e) for e in (2, 3, 5, 6, 7, 8)] == pytest.approx(
        [1, 0.2, 0.2, 0.04, 0.04, 0.008]
    )


def test_the_rate_starts_anew_at_each_increment() -> None:
    learner = Learner(SMALL, ImageRecipe(optimizer={"lr": 0.5}), 0)
    rates = []
    while learner.increment < 2:
        learner.epoch_of_training()
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.1, 0.004] * 2)  # milestones at epochs 1, 2 and 2 of 3
    assert learner.step == SMALL.steps(Job("backprop", 0)) == 3 * (3 + 5)


def test_logits_of_classes_that_have_not_arrived_get_no_gradient() -> None:
    learner = Learner(SMALL, ImageRecipe(), 0)
    learner.loss(learner.images.normalised(learner.images.train[:2].flatten(0, 1)), torch.arange(10) // 5, 2).backward()
    weight, bias = learner.model.fc.weight.grad, learner.model.fc.bias.grad
    assert weight is not None
    assert bias is not None
    assert not weight[2:].any()
    assert not bias[2:].any()
    assert weight[:2].any()


def test_accuracy_is_among_the_classes_that_have_arrived() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    logits = torch.tensor([[1.0, 0.0, 9.0], [0.0, 1.0, 9.0], [1.0, 0.0, 9.0]])
    targets = torch.tensor([0, 1, 1])
    assert accuracy(Fixed(), lambda part: logits[part], targets, 2, batch=2) == pytest.approx(2 / 3)
    assert accuracy(Fixed(), lambda part: logits[part], targets, 3, batch=2) == 0


def test_the_network_of_an_increment_is_that_of_the_best_epoch() -> None:
    learner = Learner(SMALL, ImageRecipe(), 0)
    seen: list[tuple[float, dict[str, Tensor]]] = []
    for _ in range(3):
        learner._end_increment = lambda *_: None  # type: ignore[method-assign]
        learner.epoch_of_training()
        validated = learner._accuracy(learner.images.validation, 2)
        seen.append((validated, {n: v.clone() for n, v in learner.model.state_dict().items()}))
    best = max(range(3), key=lambda e: (seen[e][0], -e))
    assert learner.best_epoch == best
    Learner._end_increment(learner, 2, 0.0)
    for name, value in learner.model.state_dict().items():
        assert torch.equal(value, seen[best][1][name]), name
    assert learner.records[0]["test_accuracy"] == learner._accuracy(learner.images.test, 2)


def test_all_methods_begin_with_one_network_and_see_the_same_batches() -> None:
    first, second = Learner(SMALL, METHODS["backprop"], 0), Learner(SMALL, METHODS["head"], 0)
    other = Learner(SMALL, METHODS["backprop"], 1)
    for learner in (first, second):
        while learner.increment == 0:
            learner.epoch_of_training()
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    assert first.records == second.records
    assert not torch.equal(other.model.conv1.weight, Learner(SMALL, METHODS["backprop"], 0).model.conv1.weight)


def test_a_new_head_leaves_the_body_and_loses_its_momentum() -> None:
    learner = Learner(SMALL, METHODS["head"], 0)
    while learner.increment == 0:
        learner.epoch_of_training()
    before = {n: v.clone() for n, v in learner.model.state_dict().items()}
    kept = len(learner.optimizer.state)
    learner._begin_increment()
    for name, value in learner.model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("fc."), name
    assert len(learner.optimizer.state) == kept - 2


def test_retraining_begins_with_another_network_each_time() -> None:
    learner = Learner(SMALL, METHODS["retrained"], 0)
    first = learner.model.conv1.weight.detach().clone()
    while learner.increment == 0:
        learner.epoch_of_training()
    trained = learner.model.conv1.weight.detach().clone()
    learner._begin_increment()
    assert not torch.equal(learner.model.conv1.weight, trained)
    assert not torch.equal(learner.model.conv1.weight, first)
    assert learner.model.conv1.weight.detach().std().item() == pytest.approx(math.sqrt(2 / 27), rel=0.3)
    assert not learner.optimizer.state
    assert len(learner.keepers) == 1


def test_units_are_replaced_on_residual_streams_too() -> None:
    learner = Learner(SMALL, METHODS["cbp"], 0)
    while learner.increment == 0:
        learner.epoch_of_training()
    replaced = learner.keepers[0].replaced()
    assert replaced["conv1"] > 0
    assert replaced["blocks.0.conv1"] > 0
    assert learner.records[0]["replaced"] == sum(replaced.values())


def test_diagnostics_leave_the_network_as_it_is() -> None:
    torch.manual_seed(0)
    model = ResNet18(4, 2)
    images = torch.randn(6, 3, 8, 8)
    model(images)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with torch.no_grad():
        model.blocks[7].bn2.weight.zero_()  # type: ignore[union-attr]
        model.blocks[7].shortcut = torch.nn.Identity()
        found = diagnose(model, images)
    assert model.training
    for name in ("bn1.running_mean", "bn1.num_batches_tracked"):
        assert torch.equal(model.state_dict()[name], before[name])
    model.eval()
    with torch.no_grad():
        layers = [torch.relu(model.bn1(model.conv1(images)))]
        for block in model.blocks:
            inner = torch.relu(block.bn1(block.conv1(layers[-1])))
            layers += [inner, torch.relu(block.bn2(block.conv2(inner)) + block.shortcut(layers[-1]))]
    assert len(layers) == 17
    assert found["dormant"] == float(rarely_active_units(layers))
    assert found["rank_99"] == float(rank_99(layers[-1].mean((2, 3))))


def _undisturbed(job: Job, folder: Path) -> dict[str, Any]:
    run_one(SMALL, folder, job, pulse=lambda step: None)
    found = job.results(folder)
    assert found is not None
    return found


@pytest.mark.parametrize("method", list(METHODS))
def test_a_run_that_is_killed_goes_on_with_the_same_bits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perennial.incremental.learn, "_SAVE_SECONDS", 0.0)
    last: dict[str, Tensor] = {}
    unlink = Path.unlink

    def keep(path: Path, missing_ok: bool = False) -> None:
        if path.name == "checkpoint.pt":  # the last one is removed when a run has finished
            last.update(read_tensors(path)["model"])
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", keep)
    job = Job(method, 0)
    expected = _undisturbed(job, tmp_path / "whole")
    weights = dict(last)
    for stop in (5, 11, 18):  # in the first increment, right behind its last epoch, in the second

        def pulse(step: int, stop: int = stop) -> None:
            if step == stop:
                raise Stopped

        with pytest.raises(Stopped):
            run_one(SMALL, tmp_path / "cut", job, pulse=pulse)
    found = _undisturbed(job, tmp_path / "cut")
    assert found["increments"] == expected["increments"]
    assert found["finished"]
    assert len(found["increments"]) == 2
    for name, value in weights.items():
        assert torch.equal(value, last[name]), name
    assert not (job.folder(tmp_path / "cut") / "checkpoint.pt").exists()


def test_a_loss_that_is_not_finite_ends_a_run_and_is_recorded(tmp_path: Path) -> None:
    setting = dataclasses.replace(SMALL, methods={"wild": ImageRecipe(optimizer={"lr": 1e20, "weight_decay": 0.0})})
    run_one(setting, tmp_path, job := Job("wild", 0), pulse=lambda step: None)
    found = job.results(tmp_path)
    assert found is not None
    assert found["diverged"] == 0
    assert found["finished"]
    assert found["increments"] == []


def test_all_runs_of_a_study_are_made_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = dataclasses.replace(SMALL, methods={"backprop": ImageRecipe()})
    made: list[Job] = []

    def in_turn(jobs: Any, work: Any, **options: Any) -> None:
        for job in jobs:
            made.append(job)
            work(job, pulse=lambda step: None)
            options["finished"](job)

    monkeypatch.setattr(perennial.incremental.learn, "run_jobs", in_turn)
    steps: dict[Job, int] = {}
    for _ in range(2):
        run_arriving(setting, tmp_path, workers=1, progress=lambda job, step: steps.update({job: step}))
    assert made == setting.jobs() == [Job("backprop", 0), Job("backprop", 1)]
    assert steps == dict.fromkeys(made, 24)
    losses = [job.results(tmp_path)["increments"][0]["training_loss"] for job in made]  # type: ignore[index]
    assert losses[0] != losses[1]


def test_a_coupled_penalty_and_an_exact_utility_get_what_they_need() -> None:
    recipe = ImageRecipe(
        optimizer={"name": "adam", "lr": 1e-3},
        interventions={"l2_init": {"rate": 0.1, "coupled": True}, "continual_backprop": {"utility": "exact"}},
    )
    learner, plain = Learner(SMALL, recipe, 0), Learner(SMALL, ImageRecipe(optimizer=recipe.optimizer), 0)
    learner.epoch_of_training()
    plain.epoch_of_training()
    assert not torch.equal(learner.model.conv1.weight, plain.model.conv1.weight)


def test_the_full_study_has_the_settings_of_the_paper() -> None:
    study = load("nature/incremental-cifar100")
    assert isinstance(study, ArrivingStudy)
    assert study.arriving == ArrivingClasses(methods=study.arriving.methods)
    assert list(study.arriving.methods) == [
        "backprop", "head_reset", "shrink_and_perturb", "continual_backprop", "retrained",
    ]  # fmt: skip
    assert study.arriving.steps(Job("backprop", 0)) == 200 * 25 * 210
    small = load("nature/incremental-cifar100-small", {"seeds": 3, "steps": 2, "per_increment": 4})
    assert isinstance(small, ArrivingStudy)
    assert small.arriving.seeds == (0, 1, 2)
    assert small.arriving.training.epochs == 2
    assert small.arriving.per_increment == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arriving.increments": 0}, "increments is 0; it must be at least 1"),
        ({"arriving.training.epochs": 0}, "epochs is 0"),
        ({"arriving.training.milestones": [0.5, 0.2]}, "shares between 0 and 1 in their order"),
        ({"arriving.training.shift": 40}, "training.shift is 40; images have 32 pixels a side"),
        ({"arriving.methods.backprop.interventions": {"cbp": {}}}, "there is no intervention 'cbp'"),
        ({"arriving.methods.backprop.optimizer": {"lrr": 1}}, "optimizer sgd: .*lrr"),
        ({"arriving.methods.backprop.reset": "tail"}, "reset"),
        ({"arriving.widht": 8}, "did you mean 'width'"),
        ({"arriving.seeds": [1, 1]}, "different whole numbers"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_words(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        load("nature/incremental-cifar100", changes)


@pytest.mark.slow
def test_the_full_setting_makes_its_first_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(name: str, part: str = "train") -> Images:
        each = {"train": 500, "test": 100}[part]
        pixels = torch.randint(
            0, 256, (100, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(each)
        )
        return Images(pixels.repeat(each, 1, 1, 1), torch.arange(100).repeat(each))

    monkeypatch.setattr(perennial.incremental.images, "images", read)
    study = load("nature/incremental-cifar100")
    assert isinstance(study, ArrivingStudy)
    steps = []

    def pulse(step: int) -> None:
        steps.append(step)
        raise Stopped

    for job in study.arriving.jobs()[:5]:
        with pytest.raises(Stopped):
            run_one(study.arriving, tmp_path, job, pulse=pulse)
    assert steps == [1] * 5
