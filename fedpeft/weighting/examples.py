"""Weight by the number of training records (McMahan et al. 2017, arXiv 1602.05629)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fedpeft.spec import method
from fedpeft.types import Drawn, Weights


@method
class Examples:
    """``w_i = n_i``, divided by the cohort's records: the mean over records of those asked."""

    offers: ClassVar[Mapping[str, str]] = {"counts-records": "weighs clients by their records"}

    def weigh(self, drawn: Drawn) -> Weights:
        """Weigh a cohort."""
        of = {name: float(drawn.population[name]) for name in drawn.cohort}
        return Weights(of, drawn.share * sum(of.values()))
