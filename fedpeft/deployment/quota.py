"""How many messages of a run a site works on, whatever the server asks.

A plan has so many rounds, and a run of it one name. A message that comes again, byte for byte, is
worked on in the same way and counts once. A round may have a second one: a server that was killed
goes back to its last checkpoint, and goes on with whoever is there then.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedpeft.durable import append_line, file_name
from fedpeft.errors import RunError
from fedpeft.plan import Plan

_TIMES = 2
"""Different messages a round, in the mean."""
_SIZE = 16


def most_of(plan: Plan, phases: int) -> int:
    """Return how many messages of one kind a run may have for a client; each phase has its own."""
    return _TIMES * (plan.rounds + 1) * max(1, phases)


class Quota:
    """The messages of one ``kind`` that a client has had of a run, in a file of ``folder``.

    Call it for one client in one process at a time.
    """

    def __init__(self, folder: Path, client: str, kind: str, most: int) -> None:
        self._path, self._most, self._kind = folder / f"{file_name(client)}.{kind}", most, kind

    def take(self, packet: bytes) -> None:
        """Note a message, before anything is done for it.

        Raises ``RunError`` where there were too many others, or the disk does not take it.
        """
        digest = hashlib.blake2b(packet, digest_size=_SIZE).hexdigest()
        text = self._path.read_text(encoding="ascii") if self._path.exists() else ""
        lines = {line for line in text.split("\n") if line}
        if digest in lines:
            return
        if len(lines) >= self._most:
            raise RunError(
                f"has had {len(lines)} different messages of this run to {self._kind} on, and its "
                "plan needs no more; submit another run"
            )
        torn = "" if text.endswith("\n") or not text else "\n"
        append_line(self._path, torn + digest, "asked")
