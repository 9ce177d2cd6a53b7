"""Paired differences with a confidence interval of Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


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
    spread = statistics.stdev(differences) / math.sqrt(count)
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * spread
    return Interval(mean, mean - half, mean + half)
