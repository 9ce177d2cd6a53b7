"""The last reply of each client, on disk: a message that comes twice is trained for once.

So it does with a server that asks again after a kill, and where the process that was to send the
reply ended before it had. A reply is found by its message's bytes, so nothing else is ever answered
with it; it is no more than what was sent already. One that a power cut took is made again; where
that would cost privacy again the reply is durable before it leaves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from fedpeft.durable import file_name, replace_file, write_pending
from fedpeft.errors import RunError

_SIZE = 32


class Replies:
    """Those of one run, in ``folder``; ``warn`` is told where the disk does not take one."""

    def __init__(self, folder: Path, warn: Callable[[str], None] = lambda _: None) -> None:
        self._folder, self._warn = folder, warn

    def find(self, client: str, message: bytes, phase: int = 0) -> bytes | None:
        """Return what was last replied to exactly this message, if anything was."""
        try:
            held = self._path(client, phase).read_bytes()
        except OSError:
            return None
        asked, checksum, reply = held[:_SIZE], held[_SIZE : 2 * _SIZE], held[2 * _SIZE :]
        return reply if (asked, checksum) == (_digest(message), _digest(reply)) else None

    def keep(
        self, client: str, message: bytes, reply: bytes, phase: int = 0, *, durable: bool = False
    ) -> None:
        """Keep a reply in place of the client's last one in this ``phase`` of a round.

        One that is ``durable`` outlives a power cut.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path, whole = self._path(client, phase), [_digest(message), _digest(reply), reply]
            if durable:
                replace_file(path, whole, "reply", private=True)
            else:
                write_pending(path, b"".join(whole), "reply")
        except (OSError, RunError) as error:
            self._warn(f"{client}: its reply is not kept, so asked again it trains again ({error})")

    def _path(self, client: str, phase: int) -> Path:
        return self._folder / file_name(f"{client}\0{phase}" if phase else client)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_SIZE).digest()
