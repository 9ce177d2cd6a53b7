"""Every client counts the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fedpeft.spec import method
from fedpeft.types import Drawn, Weights


@method
class Uniform:
    """``w_i = 1``, divided by the size of the cohort drawn, or ``expected``, or of the population.

    Divided by the population, a client that is not asked counts as one that sends zero.
    """

    denominator: Literal["cohort", "expected", "population"] = "cohort"

    @property
    def offers(self) -> Mapping[str, str]:
        """What bounds the weights, and whether the sum stands for all clients."""
        found = {"bounded-weights": "all updates count the same"}
        if self.denominator != "cohort":
            found["even-weights"] = "weights and denominator are known before a cohort is drawn"
        if self.denominator == "population":
            found["mean-over-all"] = "who is not asked counts as one who sends zero"
        return found

    def weigh(self, drawn: Drawn) -> Weights:
        """Weigh a cohort."""
        sizes = {
            "cohort": drawn.share * len(drawn.cohort),
            "expected": drawn.expected,
            "population": float(len(drawn.population)),
        }
        return Weights(dict.fromkeys(drawn.cohort, 1.0), sizes[self.denominator])

    def most(self) -> float:
        """Return 1."""
        return 1.0
