"""What the numbers of a lottery-ticket experiment say, in sentences.

A comparison is of numbers of the same replicate, and is said of every replicate only where it holds in every one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import polars as pl

from perennial.report.tickets_figures import layer_label, percent_text
from perennial.report.tickets_tables import ALL, TICKET, TicketTables, kind_label, shown_levels

_FOCUS = 21.1
"""Percent of the weights: the level nearest to it is spoken of, and the last."""


def findings(tables: TicketTables) -> list[str]:
    """Paragraphs: the whole network; the ticket against it and the controls against the ticket at two levels; which
    levels do best; how much masks share."""
    trainings = tables.trainings
    whole = trainings.filter((pl.col("kind") == TICKET) & (pl.col("level") == 0))
    stops, shares = (whole.get_column(name).drop_nulls().to_list() for name in ("early_stop", "early_accuracy"))
    if not stops:
        return []
    shown = shown_levels(tables.levels)[1:]
    percent = dict(tables.levels.select("level", "percent").iter_rows())
    focus = sorted({min(shown, key=lambda n: abs(math.log(percent[n] / _FOCUS))), shown[-1]}) if shown else []
    found = [
        f"The whole network's early stop is at iteration {_range(stops, _whole)}, with a test accuracy of "
        f"{_range(shares, _percent)} there."
    ]
    found += [text for level in focus if (text := _at(trainings, level, percent[level]))]
    found += filter(None, [_best(tables.levels), _masks(tables.overlap)])
    return found


def compared(values: Sequence[float], more: str, less: str, write: Callable[[float], str]) -> str:
    """Paired differences in words: ``31% earlier in each of 3 replicates (28% to 35%)``."""
    many, mean = len(values), math.fsum(values) / len(values)
    if not any(values):
        return "the same" + (f" in each of {many} replicates" if many > 1 else " (one replicate)")
    word = more if mean > 0 else less
    agree = sum((value > 0) == (mean > 0) and value != 0 for value in values)
    if many == 1:
        return f"{write(abs(mean))} {word} (one replicate)"
    if agree == many:
        low, high = sorted((abs(min(values)), abs(max(values))))
        return f"{write(abs(mean))} {word} in each of {many} replicates ({write(low)} to {write(high)})"
    first, last = (
        f"{write(abs(v))} {more if v > 0 else less}" if v else "no change" for v in (min(values), max(values))
    )
    return f"{word} in {agree} of {many} replicates, on average {write(abs(mean))} {word} ({first} to {last})"


def _at(trainings: pl.DataFrame, level: int, percent: float) -> str:
    here = trainings.filter(pl.col("level") == level)
    ticket = here.filter(pl.col("kind") == TICKET)
    stop, early, end = (
        ticket.get_column(name).drop_nulls().to_list()
        for name in ("early_stop_change", "early_accuracy_change", "accuracy_change")
    )
    if not stop:
        return ""
    sentences = [
        f"With {percent_text(percent)}% of the weights, against the whole network of the same replicate, the ticket's "
        f"early stop is {compared(stop, 'later', 'earlier', _percent_whole)}; its test accuracy there is "
        f"{compared(early, 'higher', 'lower', _points)}, and at the end of training {_then(end)}."
    ]
    for kind in here.get_column("kind").unique(maintain_order=True):
        both = ticket.join(here.filter(pl.col("kind") == kind), on="seed", suffix="_other").drop_nulls(
            ["early_stop", "early_stop_other"]
        )
        if kind == TICKET or both.is_empty():
            continue
        later = (both["early_stop_other"] / both["early_stop"] - 1).to_list()
        higher = (both["early_accuracy_other"] - both["early_accuracy"]).to_list()
        sentences.append(
            f"{kind_label(kind)} against this ticket: its early stop is "
            f"{compared(later, 'later', 'earlier', _percent_whole)}, its test accuracy there "
            f"{compared(higher, 'higher', 'lower', _points)}."
        )
    return " ".join(sentences)


def _then(values: Sequence[float]) -> str:
    return compared(values, "higher", "lower", _points)


def _best(levels: pl.DataFrame) -> str:
    """Which tickets stop first, and how small one can be that is as accurate as the whole network."""
    mine = levels.filter((pl.col("kind") == TICKET) & (pl.col("level") > 0)).drop_nulls("early_accuracy_change_mean")
    if mine.is_empty():
        return ""
    most = mine.select(pl.col("replicates").max()).item()
    mine = mine.filter(pl.col("replicates") == most)  # means over fewer are of other replicates
    if mine.height < 2:
        return ""
    first = mine.sort("early_stop_mean", "level").row(0, named=True)
    text = (
        f"Of {mine.height} tickets, that of {percent_text(first['percent'])}% has the earliest mean early stop, at "
        f"iteration {_whole(first['early_stop_mean'])}."
    )
    where = "in every replicate" if most != 1 else "in the one replicate"
    as_good = mine.filter(pl.col("early_accuracy_change_low") >= 0).sort("percent")
    if as_good.is_empty():
        return f"{text} None is at least as accurate at its early stop as the whole network {where}."
    smallest = percent_text(as_good["percent"][0])
    return (
        f"{text} The smallest that is at least as accurate at its early stop as the whole network {where} has "
        f"{smallest}% of the weights."
    )


def _masks(overlap: pl.DataFrame) -> str:
    means = overlap.group_by("level", "percent", "layer", maintain_order=True).agg(
        pl.col("jaccard", "floor", "excess").mean(), pl.len().alias("pairs")
    )
    if means.is_empty():
        return ""
    level = min(means.select("level", "percent").rows(), key=lambda row: abs(math.log(row[1] / _FOCUS)))[0]
    here = means.filter(pl.col("level") == level)
    total = here.filter(pl.col("layer") == ALL).row(0, named=True)
    pairs = f"mean over {total['pairs']} pairs" if total["pairs"] > 1 else "one pair"
    text = (
        f"At {percent_text(total['percent'])}% of the weights, the masks of two replicates have a Jaccard index of "
        f"{total['jaccard']:.3f} over all layers ({pairs}); random masks with as many weights in each layer would have "
        f"{total['floor']:.3f}."
    )
    layers = here.filter(pl.col("layer") != ALL).drop_nulls("excess").sort("excess", "layer")
    if layers.height > 1:
        low, high = layers.row(0, named=True), layers.row(-1, named=True)
        text += (
            f" Beyond chance, on a scale from 0 (chance) to 1 (equal masks), {layer_label(high['layer'])} shares most "
            f"({high['excess']:.3f}) and {layer_label(low['layer'])} least ({low['excess']:.3f})."
        )
    return text


def _range(values: Sequence[float], write: Callable[[float], str]) -> str:
    many = len(values)
    spread = f" ({write(min(values))} to {write(max(values))} over {many} replicates)" if many > 1 else ""
    return write(math.fsum(values) / many) + spread


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def _percent_whole(value: float) -> str:
    return f"{100 * value:.0f}%"


def _points(value: float) -> str:
    return f"{100 * value:.2f} points"
