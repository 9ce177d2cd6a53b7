"""How often clients can be reached: pure functions of label mixes, and the fields that choose one.

The generator is that of FedAU's released code (Wang and Ji 2024, arXiv 2306.03401), but for rates
above 1, which it does not expect: they are cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedpeft.availability import _tables
from fedpeft.errors import PlanError, SpecError
from fedpeft.rng import derive
from fedpeft.spec import bounded, method
from fedpeft.types import Crowd, Rng

Rates = NDArray[np.float64]
"""Of each client [N]: the share of rounds in which it can be reached."""


def by_labels(mix: NDArray[np.float64], mean: float, least: float, alpha: float, rng: Rng) -> Rates:
    """Return rates [N] that follow from label mixes [N, C], whose rows add up to 1.

    Each label has a weight, ``q ~ Dirichlet(alpha)``, and ``p_n = mean * C * (mix_n . q)``, between
    ``least`` and 1: clients with the same labels come and go alike. A small ``alpha`` leaves most
    labels with clients that are nearly always away.
    """
    labels = mix.shape[1]
    weights = rng.dirichlet(np.full(labels, alpha))
    return _bounded(mean * labels * (mix @ weights), least)


def independent(clients: int, mean: float, least: float, alpha: float, rng: Rng) -> Rates:
    """Return rates [N] that depend on nothing: ``Beta(alpha, alpha (1 / mean - 1))``, of this mean.

    That is how :func:`by_labels` has a client's rate distributed that holds a single one of
    ``1 / mean`` labels.
    """
    if mean == 1:
        return np.ones(clients)
    return _bounded(rng.beta(alpha, alpha * (1 / mean - 1), clients), least)


@method
class Rated:
    """Fields of the methods whose clients each have a rate: the share of rounds they are there.

    ``rates`` says where they are from: ``labels`` makes them follow from the labels of a client's
    records, as those of real devices do; ``shuffled`` deals the same rates to clients at random, so
    that only this relation is gone; ``independent`` draws them; with ``same`` all have ``mean``;
    ``table`` reads ``client,rate`` from ``file``. ``mean`` is before rates are held between
    ``least`` and 1; the smaller ``alpha``, the more they differ. Who is asked drops out before the
    reply with probability ``dropout``.
    """

    rates: Literal["labels", "shuffled", "independent", "same", "table"] = "labels"
    mean: float = bounded(default=0.1, above=0, high=1)
    least: float = bounded(default=0.02, low=0, high=1)
    alpha: float = bounded(default=0.1, low=1e-3, high=1e6)
    file: str | None = None
    dropout: float = bounded(default=0.0, low=0, below=1)

    def check(self) -> None:
        """Refuse a table that is not used, or missing, and bounds that exclude the mean."""
        if (self.rates == "table") != bool(self.file):
            raise SpecError(
                f"rates={self.rates!r} with file={self.file!r}: a table needs both, "
                "rates='table' and file='rates.csv'"
            )
        if self.least > self.mean:
            raise SpecError(f"least={self.least} must be at most mean={self.mean}")

    @property
    def needs(self) -> Mapping[str, str]:
        """Labels, where rates follow from them."""
        if self.rates not in ("labels", "shuffled"):
            return {}
        return {
            "labels": "makes rates from labels, and this task has none; say rates='independent' "
            "or rates='same'"
        }

    @property
    def offers(self) -> Mapping[str, str]:
        """Whether rates follow from nobody's records."""
        if self.rates not in ("same", "independent"):
            return {}
        return {"there-by-chance": "rates and coins depend on the seed alone"}

    def fingerprint(self) -> str:
        """Return the digest of the table, where one is read."""
        return _tables.digest(self.file) if self.file else ""

    def true_rates(self, crowd: Crowd) -> Rates:
        """Return each client's rate [N]. Raises ``DataError`` or ``PlanError`` for its table."""
        if self.file:
            return _tables.rates(self.file, crowd.names)
        rng = derive(crowd.seed, "availability", "rates")
        if self.rates == "same":
            return _bounded(np.full(len(crowd.names), self.mean), self.least)
        if self.rates == "independent":
            return independent(len(crowd.names), self.mean, self.least, self.alpha, rng)
        if not crowd.mix.shape[1]:
            raise PlanError(f"rates={self.rates!r}: the task has no labels; say rates='same'")
        found = by_labels(crowd.mix, self.mean, self.least, self.alpha, rng)
        return rng.permutation(found) if self.rates == "shuffled" else found


def _bounded(rates: Rates, least: float) -> Rates:
    """Hold rates between ``least`` and 1; a rate of 0 would be a client that never comes."""
    return np.clip(rates, least, 1.0)
