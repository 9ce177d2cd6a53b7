"""Points drawn by chance, each by itself: what any other search is to be compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedpeft.rng import derive
from fedpeft.search._goal import check_goal, settled
from fedpeft.spec import bounded, method
from fedpeft.types import Point, Range, Rng, Space, Trial


@method
class Random:
    """Numbers evenly from their ranges, and each choice as likely.

    The points follow from ``seed`` alone: more ``trials`` are the same ones and more.
    """

    trials: int = bounded(default=20, low=1)
    maximize: str | None = None
    minimize: str | None = None
    batch: int = bounded(default=8, low=1)
    seed: int = bounded(default=0, low=0)

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


def _steps(of: Range) -> int:
    return math.floor((of.high - of.low) / (of.step or 1) * (1 + 1e-12)) + 1
