"""The page of a study of control: returns, the ground, what becomes of the networks."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from matplotlib.ticker import FuncFormatter, NullFormatter

from perennial.report.control_tables import ControlTables, tabulate_control
from perennial.report.figures import LABEL, WIDE, canvas, curve_figure, heading, label_ends
from perennial.report.load import Method, Part
from perennial.report.looks import OTHERS, looks
from perennial.report.sections import printed, section, write_page
from perennial.report.svg import Drawing, drawing_style, render
from perennial.report.words import examples, number
from perennial.rl import Control

_RETURNS = {
    "whole": ("Return over the run", 1.0),
    "late": ("In its last tenth", 1.0),
    "best": ("Best sixtieth", 1.0),
    "against": ("Over the run, less the first method's", 1.0),
}
_NETWORKS = {
    "policy.rarely_active_units": ("Policy's units active on under 1%, %", 100.0),
    "policy.rank_99": ("Policy's rank", 1.0),
    "value.rank_99": ("Value's rank", 1.0),
    "policy.weight_magnitude": ("Policy's mean |w|", 1.0),
}
_DIAGNOSTICS = ("rarely_active_units", "dormant_units", "dead_units", "rank_99", "weight_magnitude")
_AXIS = "environment steps"
_RETURN_NOTE = [
    "The return is the undiscounted sum of rewards of an episode, averaged over the episodes that end in each of sixty "
    "equal pieces of the run; mean over seeds with its 95% bootstrap interval. Of three seeds it is hardly more than "
    "their range. Differences are paired by seed: all methods see the same frictions. Vertical lines: the friction "
    "changes.",
]
_GROUND_NOTE = ["The friction of all surfaces, by seed. It changes at the first end of an episode after each period."]
_NETWORK_NOTE = [
    "On the observations of a rollout, after training on it: of units over both hidden layers, of ranks the last. "
    "Units active on fewer than 1% of the observations are what the paper calls dormant; the rank is the number of "
    "singular values that make up 99% of their sum, which it calls stable rank. The table has the last values.",
]


def write_control_report(control: Control, directory: Path, **about: str) -> Path:
    """Write ``report.html``, ``figures/*.svg`` and ``tables/*.csv`` into the directory of a study of control.

    The page stands alone and loads nothing; the same results give the same bytes. A run that has not finished is
    reported as far as it has come.

    Args:
        control: what was run.
        directory: where.
        about: ``title``, ``description``, ``source``, ``command`` and ``study_text`` of the run.

    Returns:
        The path of ``report.html``.

    Raises:
        NoResultsError: there are no results yet.
    """
    tables = tabulate_control(control, Path(directory))
    ppo, ground = control.ppo, control.ground
    facts = [
        f"{control.body}, {control.steps:,} steps, episodes of at most {control.episode_steps:,}",
        f"friction {number(ground.low)} to {number(ground.high)}, changed every {ground.period:,} steps"
        if ground
        else "constant ground",
        f"PPO, {' x '.join(map(str, ppo.hidden))} units, step size {number(ppo.lr)}, rollouts of "
        f"{ppo.rollout:,} steps, {ppo.epochs} epochs, minibatches of {ppo.minibatch}",
        f"{len(control.seeds)} seed{'' if len(control.seeds) == 1 else 's'}",
    ]
    drawings = draw_control(control, tables)
    diagnostics = [d.name for d in drawings if d.name not in ("return", "friction")]
    sections = [
        section("Return", ["return"], _RETURN_NOTE, tables.methods, _RETURNS),
        section("The ground", ["friction"], _GROUND_NOTE),
        section("The networks", diagnostics, _NETWORK_NOTE, tables.methods, _NETWORKS),
    ]
    frames = {"methods": tables.methods, "curves": tables.curves, "frictions": tables.frictions}
    progress = (tables.finished, len(control.jobs()))
    return write_page(directory, facts, [], sections, drawings, frames, progress, about)


def control_summary(control: Control, directory: Path) -> pl.DataFrame:
    """The methods as text, to print."""
    rows = tabulate_control(control, Path(directory)).methods
    return printed(rows, _RETURNS, "Method")


def draw_control(control: Control, tables: ControlTables) -> list[Drawing]:
    """Returns, frictions and diagnostics, as far as there are any."""
    methods = tuple(Method(key, learner.label or key, False, False) for key, learner in control.methods.items())
    part = Part("control", "", {}, {}, control.steps, "return", control.seeds, methods)
    shown = looks([part])
    wanted = ["return", *(f"{net}.{name}" for name in _DIAGNOSTICS for net in ("policy", "value")), "replaced_units"]
    found: list[Drawing | None] = []
    for metric in wanted:
        rows = tables.curves.filter(pl.col("metric") == metric)
        if rows.height:
            name = metric.replace(".", "-").replace("_", "-")
            found.append(
                curve_figure(name, name, part, rows, shown, wide=True, axis=_AXIS, marks=tables.changes)
            )  # fmt: skip
        if metric == "return" and tables.frictions.height:
            found.append(_friction(control, tables, [m.label for m in methods]))
    return [drawing for drawing in found if drawing is not None]


def _friction(control: Control, tables: ControlTables, labels: list[str]) -> Drawing:
    """The friction against steps, a line a seed; as wide as the returns above."""
    rows = tables.frictions
    seeds = sorted(set(rows["seed"]))
    end = int(tables.curves["step"].to_numpy().max())
    name, title = "friction", "Friction of the ground"
    with drawing_style(name):
        drawn = canvas(labels, min(len(seeds), 6), (WIDE[0], 190))
        axes, ends = drawn.axes, []
        for at, seed in enumerate(seeds):
            mine = rows.filter(pl.col("seed") == seed)
            steps, values = [*mine["step"], end], [*mine["friction"], mine["friction"][-1]]
            look = OTHERS[at % len(OTHERS)]
            axes.plot(steps, values, drawstyle="steps-post", color=look.colour, lw=1.5, ls=(0, look.dash or (1, 0)))
            ends.append((f"seed {seed}", look.colour, float(end), float(values[-1])))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(0, end)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: examples(value)))
        axes.set_xlabel(_AXIS, labelpad=7, fontsize=LABEL)
        heading(drawn.figure, title)
        if len(seeds) <= 6:
            label_ends(drawn.figure, axes, ends)
        low, high = rows["friction"].to_numpy().min(), rows["friction"].to_numpy().max()
        said = f"{rows.height - len(seeds)} changes over {len(seeds)} seeds, frictions from {low:.3g} to {high:.3g}."
        return render(drawn.figure, name, title, said, drawn.plot_share)
