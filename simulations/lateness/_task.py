"""Classification that also says how much of one class is found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from fedpeft.spec import bounded, method
from fedpeft.tasks.classify import Classify
from fedpeft.types import Metrics


@method
class Finding(Classify):
    """``classify`` with ``recall``: the share of the records of class ``place`` that are found.

    0 where there is no such record, as at most clients.
    """

    place: int = bounded(default=0, low=0)

    measures: ClassVar[Sequence[str]] = (*Classify.measures, "recall")

    def metrics(self, tally: Metrics) -> Metrics:
        """Return those of ``classify``, and ``recall``."""
        there = tally[f"true/{self.place}"]
        recall = tally[f"hit/{self.place}"] / there if there else 0.0
        return {**super().metrics(tally), "recall": recall}
