"""What a test of trainability finds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from perennial.statistics import Floats, estimate


class Paired(NamedTuple):
    """The mean of one number a seed, and how well it is known."""

    mean: float
    """NaN where no seed is left."""
    low: float
    """Lower end of the 95% percentile bootstrap interval over seeds; NaN with fewer than two seeds."""
    high: float
    """Upper end of it."""
    seeds: int
    """Seeds behind the mean: those in which the number is finite."""

    def __str__(self) -> str:
        return f"{self.mean:.3g}" + (f" [{self.low:.3g}, {self.high:.3g}]" if self.seeds > 1 else "")


@dataclass(frozen=True)
class Learning:
    """How networks learnt, one a seed."""

    steps: NDArray[np.int64]
    """[points]: the step at which each window of the curve ends."""
    curve: Floats
    """[seeds, points]: the loss on each step's batch before the step, averaged over the window. NaN from the window in
    which a network diverges."""
    final_loss: Floats
    """[seeds]: the mean loss over all samples after the last step, in evaluation mode (no dropout, the running
    statistics of batch norm). NaN for a network that diverged."""
    diverged: NDArray[np.int64]
    """[seeds]: the step, counted from 1, whose loss or updated weights were not finite; -1 where there is none. 0: it
    diverged in the first training of a warm start."""

    @property
    def area(self) -> Floats:
        r"""[seeds]: the area under the learning curve by its length, the mean of the loss over all steps,
        :math:`A = \frac{1}{T} \sum_{t=1}^{T} \ell_t`; NaN for a network that diverged."""
        length = np.diff(self.steps, prepend=0)
        return np.asarray(self.curve @ (length / length.sum()), dtype=np.float64)

    def steps_to(self, target: float) -> Floats:
        """[seeds]: the end of the first window whose mean loss is at most the target; NaN where there is none."""
        reached = self.curve <= target
        return np.where(reached.any(1), self.steps[reached.argmax(1)], np.nan)


@dataclass(frozen=True)
class Trainability:
    """How well weights learn something new, against fresh weights; see :func:`trainability`. ``print`` it.

    Differences are aged minus fresh, paired by seed: positive where the aged weights did worse. Seeds in which a
    network diverged are left out of them, and named in the verdict.
    """

    task: str
    """``"random_labels"``, ``"teacher"`` or ``"given"``."""
    seeds: tuple[int, ...]
    """Each fixes targets, data order, fresh weights and noise of one pair."""
    aged: Learning
    """Of the weights in question."""
    fresh: Learning
    """Of fresh ones."""
    target: float
    """The loss that counts as learnt."""
    one_by_one: str | None
    """Why the networks ran one after another, if ``vmap`` could not run them side by side."""

    @property
    def steps(self) -> NDArray[np.int64]:
        """[points]: the step at which each window of the curves ends."""
        return self.fresh.steps

    @cached_property
    def gap(self) -> Paired:
        r"""The trainability gap, relative: the mean over seeds of :math:`(A_{aged} - A_{fresh}) / A_{fresh}`, with the
        areas of :attr:`Learning.area`. 0.3: the loss was 30% higher on the way. Seeds whose fresh area is not above 0,
        which takes a loss that can be negative, are left out."""
        fresh = np.where(self.fresh.area > 0, self.fresh.area, np.nan)
        return paired(self.aged.area / fresh - 1)

    @cached_property
    def area(self) -> Paired:
        """The difference in area under the learning curve."""
        return paired(self.aged.area - self.fresh.area)

    @cached_property
    def final_loss(self) -> Paired:
        """The difference in final loss."""
        return paired(self.aged.final_loss - self.fresh.final_loss)

    @cached_property
    def steps_to_target(self) -> Paired:
        """The difference in steps to the target, over the seeds in which both networks reached it. Where some did not
        (NaN in ``aged.steps_to(target)``) it flatters the side that failed more often."""
        return paired(self.aged.steps_to(self.target) - self.fresh.steps_to(self.target))

    def __str__(self) -> str:
        words = {"random_labels": "random labels", "teacher": "outputs of a random teacher", "given": "the task given"}
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        lines = [f"These weights {self._verdict()} ({words[self.task]}, {seeds}, {self.steps[-1]} steps)."]
        if self.gap.seeds:
            low, high = 100 * self.gap.low, 100 * self.gap.high
            interval = f" [{low:+.3g}%, {high:+.3g}%]" if self.gap.seeds > 1 else ""
            sides = [side.steps_to(self.target) for side in (self.aged, self.fresh)]
            lines += [
                f"Loss on the way: {mean(self.aged.area):.3g} against {mean(self.fresh.area):.3g}, "
                f"{100 * self.gap.mean:+.3g}%{interval}.",
                f"Final loss: {mean(self.aged.final_loss):.3g} against {mean(self.fresh.final_loss):.3g}, "
                f"a difference of {self.final_loss}.",
                f"Steps to a loss of {self.target:.3g}: {_reached(sides[0])} against {_reached(sides[1])}.",
            ]
        if mean(self.fresh.curve[:, -1]) >= mean(self.fresh.curve[:, 0]):
            lines.append("The fresh networks did not learn: give more steps, or another step size.")
        for name, side in (("aged", self.aged), ("fresh", self.fresh)):
            gone = [str(seed) for seed, step in zip(self.seeds, side.diverged, strict=True) if step >= 0]
            if gone:
                lines.append(f"Diverged, and left out: {name} networks of seeds {', '.join(gone)}.")
        if self.one_by_one is not None:
            lines.append(f"Run one network after another, which is slower: {self.one_by_one}")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.gap.seeds == 0:
            return "cannot be compared with fresh ones: no pair has finished"
        if self.gap.seeds == 1:
            return "were compared with fresh ones in one pair, which says little"
        if self.gap.low > 0:
            return "learn worse than fresh ones"
        if self.gap.high < 0:
            return "learn better than fresh ones"
        return "learn neither worse nor better than fresh ones, as far as these seeds show"

    def table(self) -> Any:
        """Everything as a tidy polars table.

        Returns:
            Columns ``seed``, ``weights`` (``aged`` or ``fresh``), ``metric``, ``step`` and ``value``: ``online_loss``
            at the end of each window of the curve; ``final_loss``, ``area`` and ``steps_to_target`` at the last step.
            What is NaN in arrays is null here.
        """
        import polars

        rows: list[tuple[int, str, str, int, float]] = []
        last = int(self.steps[-1])
        for name, side in (("aged", self.aged), ("fresh", self.fresh)):
            ends = {"final_loss": side.final_loss, "area": side.area, "steps_to_target": side.steps_to(self.target)}
            for at, seed in enumerate(self.seeds):
                points = zip(self.steps.tolist(), side.curve[at].tolist(), strict=True)
                rows += [(seed, name, "online_loss", step, value) for step, value in points]
                rows += [(seed, name, metric, last, float(values[at])) for metric, values in ends.items()]
        columns = ["seed", "weights", "metric", "step", "value"]
        return polars.DataFrame(rows, schema=columns, orient="row").with_columns(polars.col("value").fill_nan(None))

    def plot(self, path: str | Path) -> None:
        """Draw both learning curves, means over seeds with 95% intervals, into a file of a type matplotlib knows."""
        from matplotlib.figure import Figure

        from perennial.report.figures import LABEL, NARROW
        from perennial.report.looks import KNOWN
        from perennial.report.svg import drawing_style

        with drawing_style("trainability"):
            figure = Figure(figsize=(NARROW[0] / 72, NARROW[1] / 72), facecolor="white", layout="constrained")
            axes = figure.add_subplot()
            drawn = (("fresh", self.fresh, KNOWN["linear"]), ("aged", self.aged, KNOWN["continual_backprop"]))
            for name, side, look in drawn:
                line, style = estimate(side.curve), "dashed" if look.dash else "solid"
                axes.fill_between(self.steps, line.low, line.high, color=look.colour, alpha=0.15, linewidth=0)
                axes.plot(self.steps, line.mean, color=look.colour, linestyle=style, label=f"{name} weights")
            axes.axhline(self.target, color="#8a8a8a", linewidth=0.8, linestyle="dotted", label="target")
            axes.set_xlabel("steps", fontsize=LABEL)
            axes.set_title("Loss on each step's batch", loc="left", fontsize=LABEL, fontweight="bold")
            axes.tick_params(labelsize=LABEL)
            axes.legend(frameon=False, fontsize=LABEL)
            figure.savefig(path)


@dataclass(frozen=True)
class WarmStartGap:
    """What a training before the training costs; see :func:`warm_start_gap`."""

    seeds: tuple[int, ...]
    """Each fixes the share of the data, data order, first weights and noise of one pair."""
    measure: str
    """What the test is scored by: ``"accuracy"``, or ``"loss"`` for targets that are no classes."""
    warm_test: Floats
    """[seeds]: of the networks that were trained on a share of the data first."""
    fresh_test: Floats
    """[seeds]: of those that were not."""
    warm: Learning
    """The second training of the former, on all of the data."""
    fresh: Learning
    """The only training of the latter."""
    one_by_one: str | None
    """Why the networks ran one after another, if ``vmap`` could not run them side by side."""

    @cached_property
    def gap(self) -> Paired:
        """Test score of fresh minus warm networks, paired by seed. Of accuracy, positive where the warm start costs; of
        loss, negative."""
        return paired(self.fresh_test - self.warm_test)

    def __str__(self) -> str:
        gone = len(self.seeds) - self.gap.seeds
        return (
            f"Test {self.measure} of fresh networks {mean(self.fresh_test):.3g}, of warm-started ones "
            f"{mean(self.warm_test):.3g}; fresh minus warm {self.gap}, over {self.gap.seeds} seeds"
            + (f" ({gone} left out, in which a network diverged)." if gone else ".")
        )


def paired(values: Floats) -> Paired:
    """Mean and interval of the finite ones of one number a seed."""
    known = values[np.isfinite(values)]
    if len(known) < 2:
        return Paired(mean(known), np.nan, np.nan, len(known))
    found = estimate(known[:, None])
    return Paired(float(found.mean[0]), float(found.low[0]), float(found.high[0]), len(known))


def mean(values: Floats) -> float:
    """The mean of the finite ones; NaN if there are none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _reached(steps: Floats) -> str:
    missed = int(np.isnan(steps).sum())
    if missed == len(steps):
        return "never reached"
    return f"{mean(steps):.3g}" + (f" (never in {missed} of {len(steps)})" if missed else "")
