"""Every client gets a random sample of the same size."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.partitions import _deal
from fedpeft.spec import method
from fedpeft.types import Rng, Row


@method
class Iid:
    """Deal shuffled records in equal parts; sizes differ by one at most."""

    def split(
        self,
        rows: Sequence[Row],
        labels: Sequence[Hashable] | None,
        clients: int | None,
        rng: Rng,
    ) -> Mapping[str, NDArray[np.int64]]:
        """Return client name to sorted row numbers; every row once.

        Raises ``DataError`` where ``clients`` is missing or greater than the number of rows.
        """
        clients = _deal.check_clients("iid", len(rows), clients)
        return _deal.deal(np.array_split(rng.permutation(len(rows)), clients))
