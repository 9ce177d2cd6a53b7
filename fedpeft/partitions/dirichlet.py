"""Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification
(Hsu, Qi, Brown, 2019, arXiv 1909.06335): label skew, in the per-class form of Federated Learning on
Non-IID Data Silos (Li, Diao, Chen, He, 2021, arXiv 2102.02079).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.partitions import _deal
from fedpeft.spec import bounded, method
from fedpeft.types import Rng, Row

_TRIES = 100


@method
class Dirichlet:
    """Deal each class by shares over the clients that are drawn from ``Dirichlet(alpha)``.

    Small ``alpha`` gives each class to few clients; large ``alpha`` is nearly iid. Sizes differ
    too. Shares are drawn again, up to 100 times, until every client has ``min_size`` records (the
    second paper uses 10); then records move from the largest clients to those that lack some.
    ``field`` names a column to take as the label instead of the task's.
    """

    alpha: float = bounded(default=0.5, low=1e-3, high=1e6)
    field: str | None = None
    min_size: int = bounded(default=1, low=1)

    @property
    def needs(self) -> Mapping[str, str]:
        """Labels, unless ``field`` says what to deal by."""
        return _deal.label_needs(self.field)

    def check(self) -> None:
        """Refuse an empty column name."""
        _deal.check_field("dirichlet", self.field)

    def split(
        self,
        rows: Sequence[Row],
        labels: Sequence[Hashable] | None,
        clients: int | None,
        rng: Rng,
    ) -> Mapping[str, NDArray[np.int64]]:
        """Return client name to sorted row numbers; every row once.

        Raises ``DataError`` where ``clients`` is missing, the rows are too few for ``min_size``
        each, or a row has no label.
        """
        clients = _deal.check_clients("dirichlet", len(rows), clients, self.min_size)
        number = _deal.classes("dirichlet", rows, labels, self.field)
        counts = self._counts(np.bincount(number), clients, rng)
        members = [rng.permutation(np.flatnonzero(number == c)) for c in range(len(counts))]
        pieces = [_deal.cut(m, sizes) for m, sizes in zip(members, counts, strict=True)]
        return _deal.deal([np.concatenate(own) for own in zip(*pieces, strict=True)])

    def _counts(self, totals: _deal.Rows, clients: int, rng: Rng) -> _deal.Rows:
        """Return how many records of each class each client gets [classes, clients]."""
        best, most = np.empty(0, dtype=np.int64), -1
        for _ in range(_TRIES):
            shares = rng.dirichlet(np.full(clients, self.alpha), size=len(totals))
            counts = np.stack(
                [_deal.apportion(int(n), p) for n, p in zip(totals, shares, strict=True)]
            )
            filled = int(np.minimum(counts.sum(axis=0), self.min_size).sum())
            if filled > most:
                best, most = counts, filled
            if filled == clients * self.min_size:
                break
        return _fill(best, self.min_size)


def _fill(counts: _deal.Rows, least: int) -> _deal.Rows:
    """Move records, of their largest class, from the largest clients until all have ``least``."""
    counts = counts.copy()
    sizes = counts.sum(axis=0)
    while sizes.min() < least:
        poor, rich = int(sizes.argmin()), int(sizes.argmax())
        kind = int(counts[:, rich].argmax())
        counts[kind, [poor, rich]] += [1, -1]
        sizes[[poor, rich]] += [1, -1]
    return counts
