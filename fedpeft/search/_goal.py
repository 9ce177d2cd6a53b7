"""What every search has: one goal, and numbers that can be read."""

from __future__ import annotations

from fedpeft.errors import SpecError
from fedpeft.types import Range

_DIGITS = 6
"""Of real numbers that are drawn."""


def check_goal(name: str, maximize: str | None, minimize: str | None) -> None:
    """Raise ``SpecError`` unless one of the two is given."""
    if (maximize is None) == (minimize is None):
        raise SpecError(
            f"{name}: give maximize or minimize, one of the two, such as maximize='test/accuracy'"
        )


def settled(of: Range, value: float) -> float | int:
    """Return a number of the range, with few digits, next to ``value``."""
    if of.step is not None:
        value = of.low + round((value - of.low) / of.step) * of.step
        if value > of.high * (1 + 1e-12):
            value -= of.step
    if of.whole:
        return int(min(of.high, max(of.low, round(value))))
    return min(of.high, max(of.low, float(f"{value:.{_DIGITS}g}")))
