"""Communication-Efficient Learning of Deep Networks from Decentralized Data (McMahan, Moore,
Ramage, Hampson, Agüera y Arcas, 2016, arXiv 1602.05629), section 3: sorted by label, cut in shards.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import DataError
from fedpeft.partitions import _deal
from fedpeft.spec import bounded, method
from fedpeft.types import Rng, Row


@method
class Shards:
    """Sort records by label, cut ``clients * per_client`` shards, deal each client ``per_client``.

    Most clients then have at most ``per_client`` labels, where classes are larger than a shard.
    Shards differ by one record at most. ``field`` names a column to sort by instead of the
    task's label.
    """

    per_client: int = bounded(default=2, low=1)
    field: str | None = None

    @property
    def needs(self) -> Mapping[str, str]:
        """Labels, unless ``field`` says what to sort by."""
        return _deal.label_needs(self.field)

    def check(self) -> None:
        """Refuse an empty column name."""
        _deal.check_field("shards", self.field)

    def split(
        self,
        rows: Sequence[Row],
        labels: Sequence[Hashable] | None,
        clients: int | None,
        rng: Rng,
    ) -> Mapping[str, NDArray[np.int64]]:
        """Return client name to sorted row numbers; every row once.

        Raises ``DataError`` where ``clients`` is missing, there are fewer rows than shards, or a
        row has no label.
        """
        clients = _deal.check_clients("shards", len(rows), clients)
        count = clients * self.per_client
        if count > len(rows):
            raise DataError(
                f"shards: {len(rows)} records cannot fill {count} shards "
                f"(clients={clients}, per_client={self.per_client}); lower one of the two"
            )
        number = _deal.classes("shards", rows, labels, self.field)
        shuffled = rng.permutation(len(rows))
        by_label = shuffled[np.argsort(number[shuffled], kind="stable")]
        shards = np.array_split(by_label, count)
        dealt = rng.permutation(count).reshape(clients, self.per_client)
        return _deal.deal([np.concatenate([shards[i] for i in own]) for own in dealt])
