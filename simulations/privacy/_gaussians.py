"""The epsilon that tells two normal distributions apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.optimize import brentq
from scipy.special import log_ndtr

from fedpeft.errors import RunError

_MOST = 1e7
"""No epsilon is searched above."""


@dataclass(frozen=True, slots=True)
class Normal:
    """A normal distribution."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Normal:
        """Return that with the mean and the deviation of a sample.

        Raises ``RunError`` for fewer than two values, or if all are the same.
        """
        if len(values) < 2 or min(values) == max(values):
            raise RunError(f"{len(values)} statistics have no deviation; use more canaries")
        return cls(statistics.fmean(values), statistics.stdev(values))

    def log_mass(self, low: float, high: float) -> float:
        """Return the logarithm of the probability between ``low`` and ``high``."""
        ends = (low - self.mean) / self.deviation, (high - self.mean) / self.deviation
        less, more = ends if ends[0] + ends[1] < 0 else (-ends[1], -ends[0])  # of two tails the
        below, above = float(log_ndtr(less)), float(log_ndtr(more))  # one that rounds least
        if below == -math.inf:
            return above
        return above + math.log(-math.expm1(below - above)) if above > below else -math.inf


def epsilon(one: Normal, other: Normal, delta: float) -> float:
    """Return the least epsilon with which the two are (epsilon, delta)-indistinguishable.

    Both ways round; exact but for rounding. Where it is above ten million, it is that.
    """

    def apart(value: float) -> float:
        return max(_delta(one, other, value), _delta(other, one, value)) - delta

    if apart(0.0) <= 0:
        return 0.0
    high = 1.0
    while apart(high) > 0:
        high *= 2
        if high > _MOST:
            return _MOST
    return float(brentq(apart, 0.0, high, xtol=1e-9, rtol=1e-9))


def _delta(one: Normal, other: Normal, epsilon: float) -> float:
    """Return ``P[S] - exp(epsilon) Q[S]`` where the density of P is above exp(epsilon) Q's.

    The logarithm of the densities' ratio is a quadratic function, so S ends at its two roots.
    """
    p, q = 1 / one.deviation**2, 1 / other.deviation**2
    square, line = (q - p) / 2, one.mean * p - other.mean * q
    rest = (other.mean**2 * q - one.mean**2 * p) / 2 + math.log(q / p) * -0.5 - epsilon
    parts = _above(square, line, rest)
    logs = [(one.log_mass(*part), other.log_mass(*part)) for part in parts]
    return sum(math.exp(a) - (math.exp(epsilon + b) if epsilon + b < 700 else 0.0) for a, b in logs)


def _above(square: float, line: float, rest: float) -> list[tuple[float, float]]:
    """Return where ``square x^2 + line x + rest`` is above zero."""
    if abs(square) <= 1e-12 * max(1.0, abs(line)):
        if line == 0:
            return [(-math.inf, math.inf)] if rest > 0 else []
        root = -rest / line
        return [(root, math.inf)] if line > 0 else [(-math.inf, root)]
    inner = line * line - 4 * square * rest
    if inner <= 0:
        return [(-math.inf, math.inf)] if square > 0 else []
    far = -(line + math.copysign(math.sqrt(inner), line)) / 2
    low, high = sorted((far / square, rest / far))
    return [(-math.inf, low), (high, math.inf)] if square > 0 else [(low, high)]
