"""AG News with one label made rare, in training alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedpeft.data.jsonl import Jsonl
from fedpeft.rng import derive
from fedpeft.spec import bounded, method
from fedpeft.types import Row, Splits

RARE = 3
"""The label, Sci/Tech, which is also its place among the four."""


@method
class Thinned:
    """``cls/ag_news.train.jsonl.gz`` with a share of the rare label, and all test rows.

    ``rows`` of each are taken where they are given. Both are drawn once, whatever the plan's seed.
    """

    keep: float = bounded(default=0.25, above=0, high=1)
    rows: int | None = bounded(default=None, low=1)

    def load(self) -> Splits:
        """Read both files. Raises ``DataError`` where they are missing."""
        files = {split: f"cls/ag_news.{split}.jsonl.gz" for split in ("train", "test")}
        splits = Jsonl(**files).load()
        drawn = derive(0, "thinned").random(len(splits.train))
        train = [
            row
            for row, chance in zip(splits.train, drawn, strict=True)
            if row["label"] != RARE or chance < self.keep
        ]
        told = f"{splits.fingerprint}, {self.keep:g} of label {RARE}, {self.rows} rows"
        test = self._some(splits.test or ())
        return replace(splits, train=self._some(train), test=test, fingerprint=told)

    def _some(self, rows: Sequence[Row]) -> Sequence[Row]:
        if self.rows is None:
            return rows
        drawn = derive(0, "rows").choice(len(rows), min(self.rows, len(rows)), replace=False)
        return [rows[i] for i in sorted(drawn.tolist())]
