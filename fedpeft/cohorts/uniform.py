"""A fixed number of clients, drawn without replacement (McMahan et al. 2017, arXiv 1602.05629)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedpeft.spec import bounded, method
from fedpeft.types import Rng, Sampling


@method
class Uniform:
    """``size`` clients, each equally likely; all of them where fewer can be reached."""

    size: int = bounded(default=10, low=1)

    offers: ClassVar[Mapping[str, str]] = {
        "draws-cohorts": "says how many clients a round asks",
        "known-sampling": "each set of clients is as likely",
    }

    def choose(self, names: Sequence[str], rng: Rng) -> Sequence[str]:
        """Draw ``size`` names, or as many as there are."""
        chosen = rng.choice(len(names), min(self.size, len(names)), replace=False)
        return [names[i] for i in sorted(chosen)]

    def expected(self, population: float) -> float:
        """Return ``size``."""
        return float(self.size)

    def sampling(self, population: int) -> Sampling:
        """Return that ``size`` are drawn, or that all are asked where there are no more."""
        if self.size >= population:
            return Sampling("all", population)
        return Sampling("fixed", population, self.size / population, self.size)
