"""FedVARP: variance reduction by last updates (Jhunjhunwala et al. 2022, arXiv 2207.14130)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fedpeft.spec import method
from fedpeft.types import Drawn, Weights
from fedpeft.weighting import _last_updates


@method
class FedVarp:
    """What is new in the cohort's updates, averaged over it, and the mean of all last ones.

    ``x += sum_S (delta_i - y_i) / |S| + mean_N(y)`` with ``y_i`` the last update of client i, zero
    before its first one: unbiased where all are asked as often, and of less variance than the
    cohort's mean. The server keeps all ``y_i``, on its disk; where the learning rate falls, they
    count at the present one, a case that the paper does not have.
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
        return Weights(dict.fromkeys(drawn.cohort, 1.0), drawn.share * len(drawn.cohort))

    def most(self) -> float:
        """Return 1."""
        return 1.0
