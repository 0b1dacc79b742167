"""Numbers as a reader sees them."""

from __future__ import annotations

import math
import re
from typing import Any

from perennial.report.load import Part
from perennial.report.series import measure, swept

MINUS = "\N{MINUS SIGN}"


def examples(count: float) -> str:
    """A number of examples in few characters: 0, 500, 20k, 1.5M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.4g}{suffix}"
    return f"{count:.4g}"


def number(value: float) -> str:
    """A swept number in few characters: 0, 0.01, 1e-5."""
    text = f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"
    mantissa, e, exponent = text.partition("e")
    if not e:
        return text
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def short(name: str) -> str:
    """A dotted name for readers: ``interventions.continual_backprop.replacement_rate`` -> ``replacement rate``."""
    return re.sub(r"_+", " ", name.rpartition(".")[2])


def readable(settings: str) -> str:
    """A settings text for readers; dotted names in full where their last words are the same."""
    found = swept(settings)
    names = [short(name) for name in found]
    shown = names if len(set(names)) == len(names) else list(found)
    return ", ".join(
        f"{name} {number(value) if isinstance(value, float) else value}"
        for name, value in zip(shown, found.values(), strict=True)
    )


def mean_text(value: float, low: float | None, high: float | None) -> str:
    """A number with the decimals that its interval leaves meaning to: two digits of half the interval's width.

    Without an interval, or with one of no width, three digits.
    """
    return _fixed(value, _decimals(value, low, high))


def interval_text(value: float, low: float | None, high: float | None) -> str:
    """``[low, high]`` with as many decimals as :func:`mean_text`; empty without an interval."""
    if low is None or high is None:
        return ""
    decimals = _decimals(value, low, high)
    return f"[{_fixed(low, decimals)}, {_fixed(high, decimals)}]"


def quantity(row: dict[str, Any], name: str) -> dict[str, str]:
    """One cell of the summary: its mean, its interval, or why there is none."""
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if value is None:
        reason = "all diverged" if row["diverged"] == row["lanes"] else "none"
        return {"mean": reason, "unit": "", "interval": "", "kind": "none"}
    unit = ""
    if measure(row["metric"]).share:
        unit = " points" if name == "loss_of_plasticity" else "%"
        value, low, high = (None if x is None else 100 * x for x in (value, low, high))
    return {
        "mean": mean_text(value, low, high),
        "unit": unit,
        "interval": interval_text(value, low, high),
        "kind": "number",
    }


def cost(row: dict[str, Any]) -> str:
    """Cost of a step relative to plain SGD; the time itself where that was not run or not timed."""
    if row["relative_cost"] is not None:
        return f"{row['relative_cost']:.2f}\N{MULTIPLICATION SIGN}"
    if row["seconds_per_step"] is not None:
        return f"{1e6 * row['seconds_per_step']:.3g} \N{MICRO SIGN}s"
    return "not timed"


def thing(what: dict[str, Any]) -> str:
    """A stream or network in words: ``mlp (hidden 5, activation relu)``."""
    settings = ", ".join(f"{key.replace('_', ' ')} {_value(value)}" for key, value in what.items() if key != "name")
    name = str(what.get("name", "")).replace("_", " ")
    return f"{name} ({settings})" if settings else name


def facts(part: Part) -> list[str]:
    """What a part is, in a few words each."""
    seeds = f"{len(part.seeds)} seed{'' if len(part.seeds) == 1 else 's'}"
    return [thing(part.stream), thing(part.network), f"{part.steps:,} {part.counted}", seeds]


def so_far(part: Part) -> str:
    """What the axis of steps is: ``examples seen``, or ``steps of 20 examples``."""
    return "examples seen" if part.batch == 1 else f"steps of {part.batch} examples"


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)


def _decimals(value: float, low: float | None, high: float | None) -> int:
    half = 0.0 if low is None or high is None else (high - low) / 2
    digits, size = (2, half) if half > 1e-12 * abs(value) else (3, abs(value))
    return max(0, digits - 1 - math.floor(math.log10(size))) if size > 0 else digits - 1


def _fixed(value: float, decimals: int) -> str:
    if decimals > 6:
        return f"{value:.2e}".replace("-", MINUS)
    text = f"{value:,.{decimals}f}"
    return text[1:] if text.strip("-0.,") == "" and text.startswith("-") else text.replace("-", MINUS)
