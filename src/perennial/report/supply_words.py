"""What the numbers of a study of tickets along a stream say, in sentences.

A direction is said only where the interval excludes 0; otherwise, that none shows.
"""

from __future__ import annotations

from typing import Any

import polars as pl

from perennial.report.supply_tables import QUANTITIES, SupplyTables
from perennial.report.words import MINUS, examples, interval_text, mean_text


def findings(tables: SupplyTables) -> list[tuple[str, str]]:
    """Questions with their answers, as far as there are numbers."""
    asked = {
        "Is the ability to learn lost, and does the rank fall?": [
            _trend(tables, "accuracy_gap"),
            _trend(tables, "effective_rank"),
            _relation(tables, "accuracy_gap", "effective_rank"),
        ],
        "Does the best ticket fall with the rank?": [
            _trend(tables, "best_ticket_gap"),
            _relation(tables, "best_ticket_gap", "effective_rank"),
        ],
        "Does what the ticket has over its control fall?": [
            _trend(tables, "advantage"),
            _relation(tables, "advantage", "effective_rank"),
        ],
        "Do the tickets for two tasks become more alike?": [
            _trend(tables, "overlap"),
            _trend(tables, "overlap_deep"),
            _relation(tables, "overlap", "accuracy_gap"),
            _relation(tables, "overlap_deep", "accuracy_gap"),
        ],
    }
    return [(question, " ".join(filter(None, said))) for question, said in asked.items() if any(said)]


def coefficient(value: float | None) -> str:
    """A correlation with its sign and two decimals; a dash if there is none."""
    if value is None:
        return "\N{EN DASH}"
    text = f"{value:+.2f}"
    return text[1:] if text in ("+0.00", "-0.00") else text.replace("-", MINUS)


def amount(quantity: str, row: dict[str, Any]) -> tuple[str, str]:
    """A mean and its interval in the unit in which the quantity is shown, without the unit; shares in percent."""
    scale = 100.0 if QUANTITIES[quantity].share else 1.0
    value, low, high = (None if row[name] is None else scale * row[name] for name in ("mean", "low", "high"))
    assert value is not None
    return mean_text(value, low, high), interval_text(value, low, high)


def direction(row: dict[str, Any]) -> int:
    """1 or -1 if the whole interval lies above or below 0, else 0; without an interval 0."""
    low, high = row["low"], row["high"]
    return 0 if low is None or high is None else int(low > 0) - int(high < 0)


def _trend(tables: SupplyTables, quantity: str) -> str:
    """How a quantity changes from the first checkpoint after the start, and from the start, to the last."""
    rows = tables.changes.filter(pl.col("quantity") == quantity)
    parts: list[str] = []
    before: dict[str, int] = {}
    for since in sorted(set(rows.get_column("since")), reverse=True):
        here = rows.filter(pl.col("since") == since).rows(named=True)
        signs = {row["method"]: direction(row) for row in here}
        groups = []
        for sign, verb in ((-1, "falls"), (1, "rises"), (0, "shows no change")):
            mine = [row for row in here if signs[row["method"]] == sign]
            if mine:
                groups.append(f"{verb} under {_and([_with_amount(tables, quantity, row) for row in mine])}")
        if since:
            parts.append(f"from {examples(since)} to {examples(here[0]['until'])} examples {_and(groups)}")
        else:
            parts.append("from the start on likewise" if signs == before else f"from the start on it {_and(groups)}")
        before = signs
    return f"{_upper(QUANTITIES[quantity].said)} {'; '.join(parts)}." if parts else ""


def _with_amount(tables: SupplyTables, quantity: str, row: dict[str, Any]) -> str:
    mean, interval = amount(quantity, row)
    sign = "" if mean.startswith(MINUS) else "+"
    unit = " points" if QUANTITIES[quantity].share else ""
    return f"{tables.labels[row['method']]} ({sign}{mean}{unit}{f' {interval}' if interval else ''})"


def _relation(tables: SupplyTables, one: str, other: str) -> str:
    """How two quantities go together, over all points and within lives, with the start and without it."""
    rows = {
        (row["version"], row["start"]): row
        for row in tables.correlations.rows(named=True)
        if {row["first"], row["second"]} == {one, other} and row["spearman"] is not None
    }
    if not rows:
        return ""
    groups: dict[int, list[str]] = {}
    for start, what in ((True, ""), (False, " without the start")):
        for version, where in (("pooled", "over all points"), ("within", "within lives")):
            if row := rows.get((version, start)):
                numbers = coefficient(row["spearman"])
                if row["low"] is not None:
                    numbers += f" [{coefficient(row['low'])}, {coefficient(row['high'])}]"
                groups.setdefault(direction(row), []).append(f"{where}{what} ({numbers})")
    by = QUANTITIES[other].said
    verbs = {
        1: f"is higher where {by} is higher",
        -1: f"is lower where {by} is higher",
        0: f"does not show a relation to {by}",
    }
    said = [f"{verbs[sign]}: {_and(items)}" for sign, items in groups.items()]
    return f"{_upper(QUANTITIES[one].said)} {'; it '.join(said)}."


def _and(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
