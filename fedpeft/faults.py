"""Moments at which a process can be told to die, so that tests find out what a kill there leaves.

``FEDPEFT_FAULT="checkpoint.synced"`` (or ``"checkpoint.synced:3"`` for the third time) ends the
process with SIGKILL there. Where ``FEDPEFT_FAULT_FILE`` names a file that holds such a point, the
first process to pass it takes the file away and dies: so processes that are started again live on.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

SENDING = ("request.unsent", "request.sent", "reply.unsent", "reply.come")
"""At the server, before and after a request is handed to Flower; at a node, before a reply is; at
the server again, when it has come. What is written has moments of its own: see ``durable.py``."""

_passed: dict[str, int] = {}


def fault(point: str) -> None:
    """Kill this process here if it was told to."""
    if place := os.environ.get("FEDPEFT_FAULT_FILE"):
        _die_once(point, Path(place))
    wanted, _, count = os.environ.get("FEDPEFT_FAULT", "").partition(":")
    if wanted != point:
        return
    _passed[point] = _passed.get(point, 0) + 1
    if _passed[point] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)


def is_feared(point: str) -> bool:
    """Tell whether this process may be told to die at ``point``."""
    told = os.environ.get("FEDPEFT_FAULT", "").partition(":")[0] == point
    return told or bool(os.environ.get("FEDPEFT_FAULT_FILE"))


def _die_once(point: str, place: Path) -> None:
    try:
        if place.read_text(encoding="utf-8").strip() != point:
            return
        place.unlink()  # only one of several processes gets this far
    except OSError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
