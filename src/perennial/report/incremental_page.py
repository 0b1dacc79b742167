"""The page of a study of arriving classes."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from perennial.incremental import ArrivingClasses
from perennial.report.incremental_figures import draw_arriving
from perennial.report.incremental_tables import AGAINST, tabulate_arriving
from perennial.report.sections import printed, section, write_page
from perennial.report.words import number

_ACCURACY = {
    "test_accuracy": ("Test accuracy at the end, %", 100.0),
    AGAINST: ("Less trained from scratch, points", 100.0),
    "average": ("Average over increments, %", 100.0),
}
_UNITS = {
    "dormant": ("Dormant units, %", 100.0),
    "rank_99": ("Rank of the features, % of all", 100.0),
    "effective_rank": ("Effective rank", 1.0),
    "weight_magnitude": ("Mean weight magnitude", 1.0),
    "training_loss": ("Training loss, last epoch", 1.0),
}
_NOTE = [
    "Mean over seeds with its 95% bootstrap interval; of few seeds it is hardly more than their range. The network of "
    "an increment is that of the epoch with the best accuracy on validation images; test images are looked at once an "
    "increment, unchanged and in evaluation mode, and choose nothing. Differences are paired by seed: above zero, what "
    "was learned before helps; below, it stands in the way.",
]
_UNITS_NOTE = [
    "Taken of the kept network, in evaluation mode, on training images of the classes that arrive next, which it has "
    "not seen; at the last increment at which there are such. Dormant: behind a rectifier and other than zero on fewer "
    "than 1% of images and positions. Rank of the features: how many singular values make up 99% of their sum, which "
    "the paper calls stable rank. Training loss of the last epoch, on all classes.",
]


def write_arriving_report(setting: ArrivingClasses, directory: Path, **about: str) -> Path:
    """Write ``report.html``, ``figures/*.svg`` and ``tables/*.csv`` into the directory of a study of arriving classes.

    The page stands alone and loads nothing; the same results give the same bytes. Of a run that has not finished, the
    methods and seeds are shown that have.

    Args:
        setting: what was run.
        directory: where.
        about: ``title``, ``description``, ``source``, ``command`` and ``study_text`` of the run.

    Returns:
        The path of ``report.html``.

    Raises:
        NoResultsError: nothing has finished.
    """
    tables = tabulate_arriving(setting, directory)
    training = setting.training
    facts = [
        f"{setting.data}, {setting.increments} times {setting.per_increment} classes",
        f"{setting.train} training, {setting.validation} validation, {setting.test} test images a class, "
        f"{setting.side} x {setting.side}, {'' if training.augment else 'not '}augmented",
        f"ResNet-18 of width {setting.width}, {training.epochs} epochs an increment, batches of {training.batch_size}",
        f"SGD, step size {number(training.lr)}, momentum {number(training.momentum)}, decay "
        f"{number(training.weight_decay)}{', bfloat16 on a GPU' if training.precision == 'bfloat16' else ''}",
        f"{len(setting.seeds)} seed{'' if len(setting.seeds) == 1 else 's'}",
    ]
    drawings = draw_arriving(tables, _scratch(setting))
    sections = [
        section("Accuracy", ["accuracy", "difference"], _NOTE, tables.methods, _ACCURACY, seconds=True),
        section("Units", ["units"], _UNITS_NOTE, tables.methods, _UNITS),
    ]
    frames = {"methods": tables.methods, "increments": tables.increments}
    progress = (tables.finished, len(setting.jobs()))
    return write_page(directory, facts, _divergence(tables.methods), sections, drawings, frames, progress, about)


def arriving_summary(setting: ArrivingClasses, directory: Path) -> pl.DataFrame:
    """The methods as text, to print."""
    return printed(tabulate_arriving(setting, directory).methods, _ACCURACY | {"dormant": _UNITS["dormant"]}, "Method")


def _scratch(setting: ArrivingClasses) -> str | None:
    return next((method for method, recipe in setting.methods.items() if recipe.reset == "all"), None)


def _divergence(methods: pl.DataFrame) -> list[str]:
    rows = methods.filter(pl.col("diverged") > 0).select("label", "diverged", "seeds").iter_rows()
    told = [f"{label}: the loss of {diverged} of {seeds} runs stopped being finite" for label, diverged, seeds in rows]
    return [". ".join(told) + "."] if told else []
