"""AG News with as many test rows as are scored, drawn once: the same for every run."""

from __future__ import annotations

from dataclasses import replace

from fedpeft.data.jsonl import Jsonl
from fedpeft.errors import DataError
from fedpeft.rng import derive
from fedpeft.spec import bounded, method
from fedpeft.types import Splits


@method
class AgNews:
    """The file's training rows, and ``test_rows`` of its test rows, in their order."""

    test_rows: int = bounded(default=2000, low=1)

    def load(self) -> Splits:
        """Read both files. Raises ``DataError`` where there are fewer test rows."""
        train, test = (f"cls/ag_news.{split}.jsonl.gz" for split in ("train", "test"))
        splits = Jsonl(train=train, test=test).load()
        rows = splits.test or ()
        if self.test_rows > len(rows):
            raise DataError(f"test_rows={self.test_rows}: there are {len(rows)}; ask for fewer")
        drawn = derive(0, "test rows").choice(len(rows), self.test_rows, replace=False)
        return replace(
            splits,
            test=[rows[i] for i in sorted(drawn)],
            fingerprint=f"{splits.fingerprint}, {self.test_rows} test rows",
        )
