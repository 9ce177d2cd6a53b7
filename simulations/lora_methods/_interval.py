"""Paired differences with a confidence interval of Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    """The mean of paired differences and the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Return ``higher``, ``lower`` or, where the interval covers zero, ``no difference``."""
        if self.low <= 0 <= self.high:
            return "no difference"
        return "higher" if self.mean > 0 else "lower"


def paired(differences: Sequence[float], level: float = 0.95) -> Interval:
    """Return the interval of the mean. Raises ``ValueError`` for fewer than two differences."""
    count = len(differences)
    if count < 2:
        raise ValueError(f"{count} paired differences: an interval needs two or more")
    mean = statistics.fmean(differences)
    half = quantile(level, count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def quantile(level: float, degrees: int) -> float:
    """Return ``t`` with ``P(|T| < t) = level``, by bisection over ``atan(t / sqrt(degrees))``."""
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _within(angle: float, degrees: int) -> float:
    """Return ``P(|T| < sqrt(degrees) tan(angle))``: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    cosine, odd = math.cos(angle), degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 or not odd else 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
