"""FedNova: normalised averaging (Wang et al. 2020, arXiv 2007.07481)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fedpeft.spec import method
from fedpeft.types import Drawn, Weights


@method
class FedNova:
    """Each update is divided by how far its client goes, and the sum multiplied by the mean of it.

    How far is ``|a_i|_1``, the sum of the coefficients of a client's gradients: its local steps,
    with a rate that falls their share of it, with momentum ``rho`` step k counts
    ``1 + rho + ... + rho^k``. So ``w_i = n_i m / |a_i|_1`` with ``m = sum n_i |a_i|_1 / sum n_i``,
    over the cohort's records ``n_i``, and clients with more steps do not count more than by these.
    Both are known beforehand, since steps follow from records.
    """

    offers: ClassVar[Mapping[str, str]] = {"counts-records": "weighs clients by their records"}
    needs: ClassVar[Mapping[str, str]] = {
        "sums-gradients": "divides updates by the sum of their gradients' coefficients, which SGD "
        "alone has: say trainer: plain(optimizer='sgd', lr=...)"
    }

    def weigh(self, drawn: Drawn) -> Weights:
        """Weigh a cohort."""
        records = {client: float(drawn.population[client]) for client in drawn.cohort}
        efforts = {client: drawn.effort(client) for client in drawn.cohort}
        total = sum(records.values())
        mean = sum(n * efforts[client] for client, n in records.items()) / (total or 1.0)
        return Weights({c: n * mean / efforts[c] for c, n in records.items()}, drawn.share * total)
