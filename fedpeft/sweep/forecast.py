"""What a sweep will cost, and what of it will be refused, before anything of it runs.

Plans are previewed once for all seeds. Time is that of runs that have finished in the sweep's
folder: of the same values, else of all.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedpeft.errors import FedPeftError
from fedpeft.sweep.running import finished
from fedpeft.sweep.sweep_file import Cell


@dataclass(frozen=True, slots=True)
class Line:
    """What is known of all cells that differ in their seeds alone.

    ``bytes`` are those of a run, both ways, and ``epsilon`` what it promises, by whom that hides;
    ``problem`` is why they will be refused. ``finished`` are done already; ``seconds`` is what a
    run takes, where that is known.
    """

    values: Mapping[str, Any]
    runs: int
    finished: int
    bytes: int = 0
    epsilon: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    seconds: float | None = None

    @property
    def left(self) -> int:
        """How many runs there are to be made."""
        return 0 if self.problem else self.runs - self.finished


def forecast(
    cells: Sequence[Cell],
    folder_of: Callable[[Cell], Path],
    preview: Callable[[Any], Mapping[str, Any]],
) -> list[Line]:
    """Return a line for each combination of values but seeds, in the order of ``cells``."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        values = {k: v for k, v in cell.values.items() if k != "seed"}
        groups.setdefault(json.dumps(values, default=str), []).append(cell)
    lines = [_line(group, folder_of, preview) for group in groups.values()]
    known = [line.seconds for line in lines if line.seconds is not None]
    if not known:
        return lines
    usual = statistics.median(known)
    return [_timed(line, usual) for line in lines]


def as_text(lines: Sequence[Line], workers: int) -> Iterator[str]:
    """Yield what a person is told of a forecast."""
    runs, finished = sum(line.runs for line in lines), sum(line.finished for line in lines)
    refused = sum(line.runs for line in lines if line.problem)
    left = sum(line.left for line in lines)
    parts = [f"{runs} runs", f"{finished} finished", f"{left} to be made"]
    yield ", ".join(parts if not refused else [*parts, f"{refused} refused"])
    for problem, count in Counter(line.problem for line in lines if line.problem).items():
        first = next(line for line in lines if line.problem == problem)
        yield f"refused: {_said(first.values)}{_more(count)}: {problem}"
    if not left:
        return
    due = [line for line in lines if line.left]
    times = [line.seconds for line in due]
    seconds = sum(line.left * (line.seconds or 0.0) for line in due) / max(1, workers)
    yield (
        f"time: about {_long(seconds)}" if None not in times else "time: known after the first run"
    )
    yield f"bytes: {sum(line.left * line.bytes for line in due) / 1e6:,.1f} MB up and down"
    for whom in sorted({whom for line in due for whom in line.epsilon}):
        promised = sorted({f"{line.epsilon[whom]:.3g}" for line in due if whom in line.epsilon})
        yield f"epsilon of {whom}, for a run: {', '.join(sorted(promised, key=float))}"
    if any(line.epsilon for line in due) and (bare := sum(not line.epsilon for line in due)):
        yield f"{bare} of {len(due)} combinations promise nothing"


def _line(
    group: Sequence[Cell],
    folder_of: Callable[[Cell], Path],
    preview: Callable[[Any], Mapping[str, Any]],
) -> Line:
    values = {k: v for k, v in group[0].values.items() if k != "seed"}
    try:
        tables = [finished(cell.plan, folder_of(cell)) for cell in group if cell.plan is not None]
        done = [table for table in tables if table]
        told = [float(table["seconds"]) for table in done if "seconds" in table]
        seconds = statistics.median(told) if told else None
        first = group[0].plan
        if first is None:
            return Line(values, len(group), len(done), problem=group[0].problem)
        if len(done) == len(group):
            return Line(values, len(group), len(done), seconds=seconds)
        costs = preview(first)
    except FedPeftError as error:
        return Line(values, len(group), 0, problem=str(error).splitlines()[0])
    total = sum(costs["bytes"][way] for way in ("down_total", "up_total", "evaluation_total"))
    levels = {"users": "privacy", "records": "hiding"}
    epsilon = {whom: costs[part]["epsilon"] for whom, part in levels.items() if costs[part]}
    return Line(values, len(group), len(done), int(total), epsilon, "", seconds)


def _timed(line: Line, usual: float) -> Line:
    return line if line.seconds is not None else replace(line, seconds=usual)


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in values.items()) or "all"


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


def _long(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
