"""Intervals over seeds and paired comparisons, all of Student's t; Holm's correction for many.

Runs with the same seed share data, partition and starting point, so methods are compared by their
differences seed by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, such as that of paired differences, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Return ``higher``, ``lower`` or, where the interval covers zero, ``no difference``."""
        if self.low <= 0 <= self.high:
            return "no difference"
        return "higher" if self.mean > 0 else "lower"


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the interval of the mean. Raises ``ValueError`` for fewer than two values."""
    count = len(values)
    if count < 2:
        raise ValueError(f"{count} values: an interval needs two or more")
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) / math.sqrt(count)
    half = _quantile((1 + level) / 2, count - 1) * spread
    return Interval(mean, mean - half, mean + half)


def paired(differences: Sequence[float], level: float = 0.95) -> Interval:
    """Return the interval of the mean. Raises ``ValueError`` for fewer than two differences."""
    if len(differences) < 2:
        raise ValueError(f"{len(differences)} paired differences: an interval needs two or more")
    return interval(differences, level)


def p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p of a paired t-test; of equal differences 0, or 1 where they are zero.

    Raises ``ValueError`` for fewer than two differences.
    """
    count = len(differences)
    if count < 2:
        raise ValueError(f"{count} paired differences: a test needs two or more")
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    if deviation == 0.0:
        return 0.0 if mean else 1.0
    return float(2 * stats.t.sf(abs(mean) / (deviation / math.sqrt(count)), count - 1))


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for being as many as they are (Holm 1979), in their order.

    Below a level as many of them are as may be called significant with an error of that level in
    all of them together, however they depend on each other.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    found, least = [0.0] * len(values), 0.0
    for rank, at in enumerate(order):
        least = max(least, min(1.0, (len(values) - rank) * values[at]))
        found[at] = least
    return found


_known: dict[tuple[float, int], float] = {}


def _quantile(level: float, degrees: int) -> float:
    if (level, degrees) not in _known:
        _known[level, degrees] = float(stats.t.ppf(level, degrees))
    return _known[level, degrees]
