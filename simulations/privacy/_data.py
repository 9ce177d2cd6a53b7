"""SST-2 dealt to users of a few records each; what nobody holds is public."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fedpeft.data.jsonl import Jsonl
from fedpeft.errors import DataError
from fedpeft.rng import derive
from fedpeft.spec import bounded, method
from fedpeft.types import Row, Splits


@method
class Users:
    """``records`` of SST-2's training rows, drawn once, and the rows that adapters are scored on.

    ``score`` names the file of the latter; ``some`` takes so many of them.
    """

    records: int = bounded(default=6000, low=1)
    score: Literal["dev", "test"] = "test"
    some: int | None = bounded(default=None, low=1)

    def load(self) -> Splits:
        """Read the files. Raises ``DataError`` where there are fewer rows."""
        splits = _read(self.score)
        rows = splits.train
        if self.records > len(rows):
            raise DataError(f"records={self.records}: there are {len(rows)}; ask for fewer")
        scored = list(splits.test or ())[: self.some]
        told = f"{splits.fingerprint}, {self.records} records, {len(scored)} rows"
        return replace(splits, train=_drawn(rows, self.records)[0], test=scored, fingerprint=told)


@method
class Rest:
    """The training rows that are dealt to nobody where ``records`` are dealt."""

    records: int = bounded(default=6000, low=1)

    def load(self) -> Splits:
        """Read the files."""
        splits = _read("dev")
        told = f"{splits.fingerprint}, all but {self.records} records"
        rest = _drawn(splits.train, self.records)[1]
        return replace(splits, train=rest, test=None, fingerprint=told)


def _read(score: str) -> Splits:
    return Jsonl(train="cls/sst2.train.jsonl.gz", test=f"cls/sst2.{score}.jsonl.gz").load()


def _drawn(rows: Sequence[Row], count: int) -> tuple[list[Row], list[Row]]:
    order = derive(0, "rows").permutation(len(rows)).tolist()
    return [rows[i] for i in sorted(order[:count])], [rows[i] for i in sorted(order[count:])]
