"""An engine around another one, which watches or changes what goes between server and clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias, TypeVar

from fedpeft.engine._base import Engine
from fedpeft.grouping import Grouping
from fedpeft.types import Metrics, Population
from fedpeft.wire import Message

_T = TypeVar("_T")
Requests: TypeAlias = Iterable[tuple[str, Message]]
Replies: TypeAlias = Iterator[tuple[str, Message | bytes | Exception]]


class Around:
    """See ``engine._base.Engine``; all but the exchange of a round is the engine's within."""

    def __init__(self, engine: Engine, exchange: Callable[[Engine, Requests], Replies]) -> None:
        self._engine, self._exchange, self.remote = engine, exchange, engine.remote

    def population(self) -> Population:
        """Return every client with its training records."""
        return self._engine.population()

    def exchange(self, requests: Requests) -> Replies:
        """Do what is given, which has the engine within to ask."""
        return self._exchange(self._engine, requests)

    def evaluate(self, requests: Requests) -> Iterator[tuple[str, Metrics | Exception]]:
        """Ask the engine within."""
        return self._engine.evaluate(requests)

    def share(
        self, clients: Sequence[str], work: Callable[[Sequence[str], Grouping], _T]
    ) -> Iterator[_T]:
        """Ask the engine within."""
        return self._engine.share(clients, work)
