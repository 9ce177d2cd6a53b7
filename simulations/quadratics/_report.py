"""The tables, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simulations.quadratics import _cells

RESULTS = Path(__file__).parent / "results"
_SHOWN = {"corrections": "slope", "links": "rms", "away": "rms"}
_SAID = {
    "corrections": "Norm of the global gradient, root mean square over the last fifth of rounds",
    "links": "Distance from the optimum, root mean square over the last fifth of rounds",
    "away": "The same where 4 of 20 take part in a round",
}


def tables(folder: Path, cells: Sequence[_cells.Cell]) -> str:
    """Return every table of what there is in ``folder``."""
    parts = []
    for table, metric in _SHOWN.items():
        own = [cell for cell in cells if cell.table == table]
        rows, columns = (list(dict.fromkeys(getattr(c, k) for c in own)) for k in ("row", "column"))
        if table == "corrections":
            columns = list(_cells.SETTINGS)
        found = {(c.row, c.column): _read(folder, c) for c in own}
        lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row in rows:
            values = [_shown(found.get((row, column)), metric) for column in columns]
            lines.append(f"| `{row}` | {' | '.join(values)} |")
        parts.append(f"{_SAID[table]}:\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _read(folder: Path, cell: _cells.Cell) -> Mapping[str, Any] | None:
    path = folder / f"{cell.name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _shown(found: Mapping[str, Any] | None, metric: str) -> str:
    return "" if found is None else f"{found['tail'][metric]:.1e}"
