"""What a round sends, and how long the server waits for answers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedpeft.phases import Reply
from fedpeft.wire import Message


@dataclass
class Traffic:
    """Bytes sent, those of the tensors of ``head`` among them, and seconds ``waited``."""

    head: Sequence[str]
    bytes: int = 0
    head_bytes: int = 0
    waited: float = 0.0

    def counted(self, requests: Iterable[tuple[str, Message]]) -> Iterator[tuple[str, Message]]:
        """Count each message that is passed on."""
        for client, message in requests:
            self.bytes += message.nbytes
            self.head_bytes += self.of_head(message.body.sizes)
            yield client, message

    def of_head(self, sizes: Mapping[str, int]) -> int:
        """Return the bytes of the head."""
        return sum(sizes.get(name, 0) for name in self.head)

    def waiting(self, answers: Iterator[Reply]) -> Iterator[Reply]:
        """Take the time until each answer, in which the server does nothing."""
        while True:
            began = time.perf_counter()
            found = next(answers, None)
            self.waited += time.perf_counter() - began
            if found is None:
                return
            yield found
