"""Numbers and sentences for people."""

from __future__ import annotations

import math
import time

from distot.progress import duration

__all__ = ["ago", "compact", "count", "duration", "number", "percent", "plus_minus", "size"]


def count(value: float) -> str:
    """A whole number with commas."""
    return f"{round(value):,}"


def number(value: float, digits: int = 4) -> str:
    """A number with so many significant digits."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    if abs(value) >= 1e7 or abs(value) < 1e-4:
        return f"{value:.{max(digits - 1, 0)}g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"{round(value, places):,.{max(places, 0)}f}".replace("-", "−")


def plus_minus(value: float, error: float) -> str:
    """A value with its standard error, which gets two digits."""
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return number(value)
    places = 1 - math.floor(math.log10(error))
    if not -6 < places < 7:
        return f"{number(value)} ± {number(error, 2)}"
    shown = max(places, 0)
    return f"{round(value, places):,.{shown}f} ± {round(error, places):,.{shown}f}".replace("-", "−")


def percent(share: float) -> str:
    """A share of one, with two digits, and one more where it is large."""
    return f"{number(100 * share, 3 if abs(share) >= 1 else 2)} %"


def compact(value: float) -> str:
    """A label of an axis: 20k, 1.5M, 0.05, 1e-6."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}".replace("-", "−")
    if value != 0 and abs(value) < 1e-4:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def size(value: float) -> str:
    """Bytes as B, kB, MB, GB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} B"


def ago(moment: float) -> str:
    """How long a moment lies back."""
    return f"{duration(max(0.0, time.time() - moment))} ago"
