"""The data sets, or as many of their records as a quick look takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedpeft.data.jsonl import Jsonl
from fedpeft.rng import derive
from fedpeft.spec import bounded, method
from fedpeft.types import Row, Splits


@method
class Texts:
    """``cls/<name>.train.jsonl.gz`` and its test rows; ``rows`` of each, drawn once.

    ``test`` takes so many of the test rows and leaves the others whole.
    """

    name: str
    rows: int | None = bounded(default=None, low=1)
    test: int | None = bounded(default=None, low=1)

    def load(self) -> Splits:
        """Read both files. Raises ``DataError`` where they are missing."""
        train, test = (f"cls/{self.name}.{split}.jsonl.gz" for split in ("train", "test"))
        splits = Jsonl(train=train, test=test).load()
        if self.rows is None and self.test is None:
            return splits
        tests = self.test or self.rows
        return replace(
            splits,
            train=_some(splits.train, self.rows),
            test=_some(splits.test or (), tests),
            fingerprint=f"{splits.fingerprint}, {self.rows} and {tests} rows",
        )


def _some(rows: Sequence[Row], count: int | None) -> Sequence[Row]:
    if count is None:
        return rows
    drawn = derive(0, "rows").choice(len(rows), min(count, len(rows)), replace=False)
    return [rows[i] for i in sorted(drawn.tolist())]
