"""LEAF: A Benchmark for Federated Settings (Caldas et al., 2018, arXiv 1812.01097).

Its natural clients: whoever wrote, said or owned a record.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import DataError
from fedpeft.partitions import _deal
from fedpeft.spec import bounded, method
from fedpeft.types import Rng, Row


@method
class ByField:
    """One client for every value of column ``field``, named by it.

    Clients with fewer than ``min_size`` records are dropped, with their records; of the others the
    ``max_clients`` largest stay (of equal ones, the first by name).
    """

    field: str = "client"
    min_size: int = bounded(default=1, low=1)
    max_clients: int | None = bounded(default=None, low=1)

    def check(self) -> None:
        """Refuse an empty column name."""
        _deal.check_field("by_field", self.field)

    def split(
        self,
        rows: Sequence[Row],
        labels: Sequence[Hashable] | None,
        clients: int | None,
        rng: Rng,
    ) -> Mapping[str, NDArray[np.int64]]:
        """Return client name to sorted row numbers, in the order of the names.

        Raises ``DataError`` where ``clients`` is given, a row has no value in the column, or no
        client has ``min_size`` records.
        """
        if clients is not None:
            raise DataError(
                f"by_field: column {self.field!r} says who the clients are, not clients={clients}; "
                "drop the clients line or use max_clients"
            )
        members = self._members(rows)
        large = [name for name in sorted(members) if len(members[name]) >= self.min_size]
        if not large:
            most = max(map(len, members.values()), default=0)
            raise DataError(
                f"by_field: no client of column {self.field!r} has min_size={self.min_size} "
                f"records; the largest has {most}"
            )
        kept = sorted(large, key=lambda name: -len(members[name]))[: self.max_clients]
        return {name: np.array(members[name], dtype=np.int64) for name in sorted(kept)}

    def _members(self, rows: Sequence[Row]) -> Mapping[str, list[int]]:
        members: defaultdict[str, list[int]] = defaultdict(list)
        for number, value in enumerate(_deal.column("by_field", rows, self.field)):
            if not (name := str(value)).strip():
                raise DataError(
                    f"by_field: row {number + 1} has {value!r} in column {self.field!r}; "
                    "a client needs a name"
                )
            members[name].append(number)
        return members
