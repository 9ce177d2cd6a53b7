"""Points drawn by chance, each by itself: what any other search is to be compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fedpeft.rng import derive
from fedpeft.search._goal import check_goal, settled
from fedpeft.spec import bounded, method
from fedpeft.types import Point, Range, Rng, Space, Trial


@method
class Random:
    """Numbers evenly from their ranges, and each choice as likely.

    The points follow from ``seed`` alone: more ``trials`` are the same ones and more.

    With another ``count`` than ``fixed`` the number of trials is drawn, at least one and ``trials``
    on average, and where runs keep a promise so is the seed, both by secret coins: choosing the
    best then costs far less privacy (Papernot and Steinke 2021, arXiv 2110.03620). ``geometric``
    and ``logarithmic`` are truncated negative binomials of shape 1 and 0; the last costs less and
    varies more.
    """

    trials: int = bounded(default=20, low=1)
    maximize: str | None = None
    minimize: str | None = None
    batch: int = bounded(default=8, low=1)
    seed: int = bounded(default=0, low=0)
    count: Literal["fixed", "geometric", "logarithmic"] = "fixed"

    @property
    def shape(self) -> float | None:
        """Of the distribution from which the number of trials is drawn."""
        return {"fixed": None, "geometric": 1.0, "logarithmic": 0.0}[self.count]

    def settled(self, rng: Rng) -> Random:
        """Return the search with its number of trials and its seed drawn."""
        mean = self.trials
        if self.count == "logarithmic" and mean > 1:
            trials = int(rng.logseries(-math.expm1(-_logarithmic(mean))))
        else:
            trials = int(rng.geometric(1 / mean)) if self.count == "geometric" else mean
        return replace(self, trials=trials, seed=int(rng.integers(2**63)), count="fixed")

    def check(self) -> None:
        """Raise ``SpecError`` without a goal."""
        check_goal("random", self.maximize, self.minimize)

    def ask(self, space: Space, trials: Sequence[Trial], count: int) -> Sequence[Point]:
        """Return the next points, whatever came of those before."""
        numbers = range(len(trials), len(trials) + count)
        return [
            {name: _drawn(of, derive(self.seed, "search", i, name)) for name, of in space.items()}
            for i in numbers
        ]


def _drawn(of: Range | int, rng: Rng) -> float | int:
    if isinstance(of, int):
        return int(rng.integers(of))
    if of.step is not None:
        return settled(of, of.low + of.step * int(rng.integers(_steps(of))))
    if of.whole and not of.log:
        return int(rng.integers(int(of.low), int(of.high) + 1))
    if of.log:
        half = 0.5 if of.whole else 0.0  # so that the ends are as likely as their share
        low, high = math.log(of.low - half), math.log(of.high + half)
        return settled(of, math.exp(rng.uniform(low, high)))
    return settled(of, float(rng.uniform(of.low, of.high)))


def _logarithmic(mean: float) -> float:
    """Return the ``t`` at which ``(exp(t) - 1) / t``, the distribution's mean, is ``mean``."""
    low, high = 0.0, 2 * math.log(mean) + 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if math.expm1(middle) < mean * middle else (low, middle)
    return high


def _steps(of: Range) -> int:
    return math.floor((of.high - of.low) / (of.step or 1) * (1 + 1e-12)) + 1
