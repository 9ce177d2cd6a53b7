"""Every client independently with the same probability (McMahan et al. 2018, arXiv 1710.06963)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedpeft.spec import bounded, method
from fedpeft.types import Rng, Sampling


@method
class Poisson:
    """``rate`` per client and round; a cohort may be empty, and then the step is zero.

    Of more than ``cap`` clients so many are drawn evenly.
    """

    rate: float = bounded(default=0.1, above=0, high=1)
    cap: int | None = bounded(default=None, low=1)

    offers: ClassVar[Mapping[str, str]] = {
        "draws-cohorts": "says how many clients a round asks",
        "known-sampling": "each client has a coin of its own",
    }

    def choose(self, names: Sequence[str], rng: Rng) -> Sequence[str]:
        """Flip one coin per name."""
        coins = rng.random(len(names))
        chosen = [name for name, coin in zip(names, coins, strict=True) if coin < self.rate]
        if self.cap is None or len(chosen) <= self.cap:
            return chosen
        return [chosen[i] for i in sorted(rng.choice(len(chosen), self.cap, replace=False))]

    def expected(self, population: float) -> float:
        """Return ``rate * population``, less where the cap cuts."""
        if self.cap is None:
            return self.rate * population
        return self.sampling(round(population)).expected

    def sampling(self, population: int) -> Sampling:
        """Return the rate and the cap."""
        return Sampling("coins", population, self.rate, self.cap)
