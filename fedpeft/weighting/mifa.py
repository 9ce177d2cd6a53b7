"""MIFA: the last updates of all clients, whoever replies (Gu et al. 2021, arXiv 2106.04159)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fedpeft.spec import method
from fedpeft.types import Drawn, Weights
from fedpeft.weighting import _last_updates


@method
class Mifa:
    """The mean of the last updates of all N clients, those of this round among them.

    ``x += sum_S (delta_i - y_i) / N + mean_N(y)`` with ``y_i`` the last update of client i, zero
    before its first one. The server keeps all ``y_i``, on its disk, divided by the learning rate of
    their round, and counts them at the present one, as in the paper.
    """

    recalls: ClassVar[bool] = True

    offers: ClassVar[Mapping[str, str]] = {
        **_last_updates.OFFERS,
        "bounded-weights": "all updates count the same",
    }
    needs: ClassVar[Mapping[str, str]] = _last_updates.NEEDS
    refuses: ClassVar[Mapping[str, str]] = _last_updates.REFUSES

    def weigh(self, drawn: Drawn) -> Weights:
        """Weigh a cohort."""
        return Weights(dict.fromkeys(drawn.cohort, 1.0), float(len(drawn.population)))

    def most(self) -> float:
        """Return 1."""
        return 1.0
