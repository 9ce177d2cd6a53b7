"""What a round sends, and how long the server waits for answers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedpeft.coding import HEAD
from fedpeft.phases import Reply
from fedpeft.wire import Message


@dataclass
class Traffic:
    """Bytes sent, those of the head among them, and seconds ``waited``."""

    bytes: int = 0
    head_bytes: int = 0
    waited: float = 0.0

    def counted(self, requests: Iterable[tuple[str, Message]]) -> Iterator[tuple[str, Message]]:
        """Count each message that is passed on."""
        for client, message in requests:
            self.bytes += message.nbytes
            self.head_bytes += message.sizes.get(HEAD, 0)
            yield client, message

    def waiting(self, answers: Iterator[Reply]) -> Iterator[Reply]:
        """Take the time until each answer, in which the server does nothing."""
        while True:
            began = time.perf_counter()
            found = next(answers, None)
            self.waited += time.perf_counter() - began
            if found is None:
                return
            yield found
