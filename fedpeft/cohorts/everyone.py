"""All clients in every round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedpeft.spec import method
from fedpeft.types import Rng, Sampling


@method
class Everyone:
    """Full participation."""

    offers: ClassVar[Mapping[str, str]] = {"known-sampling": "all are asked"}

    def choose(self, names: Sequence[str], rng: Rng) -> Sequence[str]:
        """Return every name."""
        return list(names)

    def expected(self, population: float) -> float:
        """Return the population's size."""
        return float(population)

    def sampling(self, population: int) -> Sampling:
        """Return that all are asked."""
        return Sampling("all", population)
