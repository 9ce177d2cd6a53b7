"""Who is told of a run's rounds while it goes, besides its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Tracked:
    """A run that begins or goes on: its ``folder``, id, and the ``lines`` of its plan.

    ``history`` has the rounds that are done, as ``rounds.jsonl`` has them.
    """

    folder: Path
    run: str
    lines: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]


class Tracking(Protocol):
    """A tracker that follows one run. It may raise anything: it is given up then, not the run."""

    def write(self, round: int, values: Mapping[str, float]) -> None:
        """Add the numbers of a round, by name; they are finite."""
        ...

    def close(self, *, done: bool) -> None:
        """End; ``done`` tells whether the run has come to its end."""
        ...


@runtime_checkable
class Tracker(Protocol):
    """``track/``: who is told. It is given only what ``rounds.jsonl`` may hold.

    Keys of services are none of its fields: plans are shown, sent and kept.
    """

    def open(self, run: Tracked) -> Tracking | None:
        """Begin to follow a run, or go on with it without a step twice; ``None``: not at all."""
        ...
