"""What drives clients: one small protocol for this process, other processes and real machines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from fedpeft.types import Metrics, Population
from fedpeft.wire import Message


class Engine(Protocol):
    """Delivers messages to clients and brings back what they answer, in any order."""

    def population(self) -> Population:
        """Return every client that can be asked, sorted by name, with its training records."""
        ...

    def exchange(
        self, requests: Iterable[tuple[str, Message]]
    ) -> Iterator[tuple[str, Message | bytes | Exception]]:
        """Have each client play its round; an exception stands for a reply that never came."""
        ...

    def evaluate(
        self, requests: Iterable[tuple[str, Message]]
    ) -> Iterator[tuple[str, Metrics | Exception]]:
        """Have each client evaluate on its held-out records; one without any answers nothing."""
        ...
