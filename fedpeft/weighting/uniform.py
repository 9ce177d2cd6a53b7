"""Every client counts the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fedpeft.spec import method
from fedpeft.types import Population, Weights


@method
class Uniform:
    """``w_i = 1``, divided by the size of the cohort drawn, or by the size ``expected`` of one."""

    denominator: Literal["cohort", "expected"] = "cohort"

    def weigh(self, cohort: Sequence[str], population: Population, expected: float) -> Weights:
        """Weigh a cohort."""
        size = expected if self.denominator == "expected" else float(len(cohort))
        return Weights(dict.fromkeys(cohort, 1.0), size)
