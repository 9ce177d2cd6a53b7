"""What became of a sweep's cells, and the table of all of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedpeft.sweep.sweep_file import Cell


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a cell: ``done``, ``kept`` (finished before) or ``failed``.

    ``run`` names its folder, ``table`` is the run's final one, ``seconds`` what it took now.
    """

    cell: Cell
    status: str
    run: str
    table: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    seconds: float = 0.0


def as_csv(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as CSV: axes, seed, status, metrics, bytes, seconds, problem."""
    rows = [_flat(outcome) for outcome in outcomes]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns = [c for c in columns if c != "problem"] + ["problem"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {**outcome.cell.values, "status": outcome.status, "run": outcome.run}
    table = outcome.table
    row |= dict(table.get("last", {}))
    row |= {f"{n}/{k}": v for n, ms in table.get("rows", {}).items() for k, v in ms.items()}
    row |= {k: table[k] for k in ("rounds", "up_bytes", "down_bytes", "seconds") if k in table}
    return row | {"problem": outcome.problem}
