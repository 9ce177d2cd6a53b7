"""When a process that has ended is started again: soon, and ever later where that does not help."""

from __future__ import annotations

FIRST, LAST = 1.0, 60.0
"""Seconds before a process is started again: after its first end, after many."""
STEADY = 60.0
"""Seconds after which a process that lives has overcome its earlier ends."""


def pause_after(ends: int) -> float:
    """Return how many seconds to wait after so many ends in a row."""
    return min(LAST, FIRST * 2.0 ** (ends - 1))


def how_ended(status: int) -> str:
    """Return how a process ended, by its exit status; below 0 it is a signal's."""
    return f"was killed (signal {-status})" if status < 0 else f"ended (status {status})"


class Restarts:
    """The ends in a row of one process, and when it is ``due`` again.

    Times are in seconds of a clock that never goes back.
    """

    def __init__(self) -> None:
        self.ends, self.due = 0, 0.0

    def note_end(self, begun: float, now: float) -> int:
        """Count an end ``now`` of what was started at ``begun``; return how many in a row it is."""
        self.ends = 1 if now - begun > STEADY else self.ends + 1
        return self.ends

    def wait(self, now: float, pause: float | None = None) -> float:
        """Have it wait for ``pause`` seconds, or as many as its ends ask for; return these."""
        pause = pause_after(self.ends) if pause is None else pause
        self.due = now + pause
        return pause
