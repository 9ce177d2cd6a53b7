"""Structured logs: what happens, one JSON object a line, for machines that read logs.

Each has ``time`` (UTC), ``level`` and ``event``. The lines of rounds are those of the ledger
without its lists, so they say no more of a private run than the ledger; when they were written,
and warnings that name a client, are the server's own to know (``docs/privacy.md``).
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from fedpeft.watching import Line

if TYPE_CHECKING:
    from fedpeft.driver import Result
    from fedpeft.plan import Plan


class JsonLog:
    """Writes events to a stream, each in one piece."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream, self._lock = stream or sys.stderr, threading.Lock()

    def write(self, event: str, *, level: str = "info", **fields: Any) -> None:
        """Write one event. What JSON has no word for becomes text; a number that is none, null."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        told = {"time": now, "level": level, "event": event, **fields}
        text = json.dumps({k: _plain(v) for k, v in told.items()}, allow_nan=False, default=str)
        with self._lock:
            self._stream.write(text + "\n")
            self._stream.flush()


class RunLog:
    """Logs a run; see ``watching.Watch``. Use it as a context manager, as the terminal's view."""

    def __init__(self, folder: Path, log: JsonLog | None = None) -> None:
        self._log, self._folder = log or JsonLog(), str(folder)

    def __enter__(self) -> RunLog:
        self._write("preparing")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._write("stopped", level="error", kind=type(error).__name__, reason=str(error))

    def warn(self, text: str) -> None:
        """Log a warning."""
        self._write("warning", level="warning", reason=text)

    def begin(self, plan: Plan, round: int) -> None:
        """Log that rounds begin, or go on."""
        self._write("begin", round=round, rounds=plan.rounds)

    def client(self, done: int, cohort: int) -> None:
        """Say nothing: who replied is told once the ledger tells it."""

    def seen(self, records: int) -> None:
        """Say nothing."""

    def round(self, line: Line) -> None:
        """Log a round, and why replies were not used."""
        told: dict[str, Any] = {k: v for k, v in line.items() if isinstance(v, int | float)}
        told |= {"replied": len(line["replied"])} if "replied" in line else {}
        self._write("round", **told)
        for client, reason in line.get("refused", {}).items():
            about = {"client": client, "reason": reason}
            self._write("refused", level="warning", round=line["round"], **about)

    def compare(self, name: str, done: int, total: int) -> None:
        """Log a comparison that is complete."""
        if done == total:
            self._write("compared", name=name, records=total)

    def finish(self, result: Result) -> None:
        """Log the end."""
        table: Mapping[str, Any] = result.table
        kept = ("rounds", "clients", "last", "rows", "epsilon")
        self._write("finished", **{k: table[k] for k in kept if k in table})

    def _write(self, event: str, *, level: str = "info", **fields: Any) -> None:
        self._log.write(event, level=level, folder=self._folder, **fields)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
