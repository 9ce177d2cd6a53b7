"""What a person sees of a sweep: its progress and its running runs, live, and a line for each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from fedpeft.sweep.outcomes import Outcome
from fedpeft.sweep.sweep_file import Cell
from fedpeft.terminal import note

_STYLES = {"failed": "red", "kept": "dim"}


class SweepScreen:
    """Shows a sweep of ``cells``, to which a search adds up to a ``total``. A context manager.

    On a terminal its lower part is a table of what is running; elsewhere there are lines alone.
    """

    def __init__(
        self, cells: list[Cell], console: Console | None = None, total: int | None = None
    ) -> None:
        self._console = console or Console(soft_wrap=True, markup=False, highlight=False)
        self._cells, self._total = cells, len(cells) if total is None else total
        self._fixed = _fixed(cells)
        self._running: dict[int, tuple[int, int, float]] = {}
        self._counts = {"done": 0, "kept": 0, "failed": 0}
        self._spent, self._began = 0.0, time.monotonic()
        self._live = Live(get_renderable=self.shown, console=self._console, refresh_per_second=4,
                          transient=True, auto_refresh=self._console.is_terminal)  # fmt: skip

    def __enter__(self) -> SweepScreen:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()
        if kind is KeyboardInterrupt:
            ended = sum(self._counts.values())
            self.say([f"stopped after {ended} of {self._total} runs; the same command goes on"])

    def say(self, lines: Iterable[str]) -> None:
        """Print lines above the table."""
        for line in lines:
            self._console.print(line)

    def rounds(self, number: int, done: int, total: int) -> None:
        """Note that a run has so many of its rounds done."""
        began = self._running.get(number, (0, 0, time.monotonic()))[2]
        self._running[number] = done, total, began

    def outcome(self, number: int, outcome: Outcome) -> None:
        """Print what became of a cell."""
        self._running.pop(number, None)
        self._counts[outcome.status] += 1
        score = note(outcome.table.get("last", {})) if outcome.table else outcome.problem
        values = self._told(outcome.cell)
        self._console.print(
            f"{sum(self._counts.values())}/{self._total} {outcome.status:6} {values}: {score}",
            style=_STYLES.get(outcome.status, ""),
        )

    def shown(self) -> Group:
        """Return what is under way: how many runs have ended, and a row for each that runs."""
        ended, total = sum(self._counts.values()), self._total
        made = self._counts["done"]
        seconds = time.monotonic() - self._began
        left = f", about {_long(seconds / made * (total - ended))} left" if made else ""
        parts = [f"{count} {name}" for name, count in self._counts.items() if count]
        parts.append(f"{total - ended} to go{left}")
        table = Table.grid(padding=(0, 2))
        for number, (done, rounds, began) in sorted(self._running.items()):
            table.add_row(
                self._told(self._cells[number]),
                ProgressBar(total=rounds, completed=done, width=20),
                f"round {done}/{rounds}",
                _long(time.monotonic() - began),
            )
        whole = Table.grid(padding=(0, 2))
        whole.add_row(ProgressBar(total=total, completed=ended, width=40), ", ".join(parts))
        return Group(whole, table)

    def _told(self, cell: Cell) -> str:
        return told({k: v for k, v in cell.values.items() if k not in self._fixed})


def told(values: Mapping[str, Any]) -> str:
    """Return the values of a cell in a line."""
    return ", ".join(f"{k}={v}" for k, v in values.items())


def _fixed(cells: Sequence[Cell]) -> set[str]:
    """Return the axes on which all of several cells are the same: they tell nobody which it is."""
    if len(cells) < 2:
        return set()
    first = cells[0].values
    return {k for k, v in first.items() if all(cell.values.get(k) == v for cell in cells)}


def _long(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
