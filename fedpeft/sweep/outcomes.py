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

    ``run`` names its folder, ``table`` is the run's final one, ``seconds`` what it took now. A
    problem is ``passing`` where it lies with the disk.
    """

    cell: Cell
    status: str
    run: str
    table: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    seconds: float = 0.0
    passing: bool = False


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
    row |= {k: v for k, v in numbers(outcome.table).items() if "/" in k or k in _SHOWN}
    return row | {"problem": outcome.problem}


_SHOWN = ("rounds", "up_bytes", "down_bytes", "seconds")


def numbers(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a final table has by name: metrics as ``test/accuracy``, rows, bytes, epsilon."""
    found = dict(table.get("last", {}))
    found |= {f"{n}/{k}": v for n, ms in table.get("rows", {}).items() for k, v in ms.items()}
    return found | {k: v for k, v in table.items() if isinstance(v, int | float)}
