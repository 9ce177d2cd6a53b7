"""Clients one after the other in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedpeft.evaluation import client_evaluation
from fedpeft.memory import MemoryStore
from fedpeft.rounds import client_round
from fedpeft.site import Site
from fedpeft.types import Metrics, Population
from fedpeft.wire import Message


class Inline:
    """The whole federation of a plan on one resident model."""

    def __init__(self, site: Site, memories: MemoryStore) -> None:
        self._site, self._memories = site, memories

    def population(self) -> Population:
        """Return every client with its training records."""
        return self._site.federation.population

    def exchange(
        self, requests: Iterable[tuple[str, Message]]
    ) -> Iterator[tuple[str, Message | bytes | Exception]]:
        """Play each client's round, in the order asked."""
        plan, site = self._site.plan, self._site
        for client, message in requests:
            memory = self._memories.load(client)
            reply, after = client_round(plan, site, client, message, memory)
            if site.tables.remembers:
                self._memories.save(client, after)
            yield client, reply

    def evaluate(
        self, requests: Iterable[tuple[str, Message]]
    ) -> Iterator[tuple[str, Metrics | Exception]]:
        """Evaluate each client that has held-out records."""
        plan, site = self._site.plan, self._site
        for client, message in requests:
            if held := site.held(client):
                memory = self._memories.load(client)
                yield client, client_evaluation(plan, site, held, client, message, memory)
