"""Weight by the number of training records (McMahan et al. 2017, arXiv 1602.05629)."""

from __future__ import annotations

from collections.abc import Sequence

from fedpeft.spec import method
from fedpeft.types import Population, Weights


@method
class Examples:
    """``w_i = n_i``, divided by the cohort's records: the mean over records of those asked."""

    def weigh(self, cohort: Sequence[str], population: Population, expected: float) -> Weights:
        """Weigh a cohort."""
        of = {name: float(population[name]) for name in cohort}
        return Weights(of, sum(of.values()))
