"""Federated Learning on Non-IID Data Silos (Li, Diao, Chen, He, 2021, arXiv 2102.02079): quantity.

Clients differ in how much they have, not in what: sizes follow a Dirichlet distribution.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.partitions import _deal
from fedpeft.spec import bounded, method
from fedpeft.types import Rng, Row


@method
class Quantity:
    """Deal shuffled records in parts whose shares are drawn from ``Dirichlet(alpha)``.

    Small ``alpha`` gives a few clients nearly everything. Every client first gets ``min_size``
    records; the shares say how the rest is dealt.
    """

    alpha: float = bounded(default=0.5, low=1e-3, high=1e6)
    min_size: int = bounded(default=1, low=1)

    def split(
        self,
        rows: Sequence[Row],
        labels: Sequence[Hashable] | None,
        clients: int | None,
        rng: Rng,
    ) -> Mapping[str, NDArray[np.int64]]:
        """Return client name to sorted row numbers; every row once.

        Raises ``DataError`` where ``clients`` is missing or the rows are too few for
        ``min_size`` each.
        """
        clients = _deal.check_clients("quantity", len(rows), clients, self.min_size)
        shares = rng.dirichlet(np.full(clients, self.alpha))
        sizes = self.min_size + _deal.apportion(len(rows) - clients * self.min_size, shares)
        return _deal.deal(_deal.cut(rng.permutation(len(rows)), sizes))
