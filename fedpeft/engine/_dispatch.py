"""Windows of clients, dealt to workers that answer in any order and may die."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import fedpeft.errors
from fedpeft.engine._base import Stage, some_finite
from fedpeft.errors import FedPeftError, RunError, TrainError
from fedpeft.grouping import Grouping
from fedpeft.types import Metrics, Population
from fedpeft.wire import Body, Message

if TYPE_CHECKING:
    from fedpeft.engine._player import Player, Request

_T = TypeVar("_T")

_TRIES = 3
"""A window that has ended so many workers is given up, as are workers that cannot start."""


@dataclass(slots=True)
class Window:
    """Clients that are played together, under one broadcast, and how many workers died of them."""

    what: str
    requests: Sequence[Request]
    deaths: int = 0
    answered: set[str] = field(default_factory=set)

    @property
    def body(self) -> Body:
        """What all of them are sent."""
        return self.requests[0][1].body

    def told(self, width: int) -> dict[str, Any]:
        """Return what a worker is told, beside the body."""
        return {
            "what": self.what,
            "width": width,
            "clients": [client for client, _ in self.requests],
            "heads": [message.head.decode() for _, message in self.requests],
        }

    def __str__(self) -> str:
        more = len(self.requests) - 1
        return self.requests[0][0] + (f" and {more} more" if more else "")


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker waits for a window: it has started, or ended the one it had."""

    width: int | None
    warnings: Sequence[str]


@dataclass(frozen=True, slots=True)
class Answered:
    """A client's reply, metrics, or why there is none."""

    client: str
    answer: Any


@dataclass(frozen=True, slots=True)
class Broken:
    """A window, or the start of a worker, ended in an error. The worker will be ready again."""

    error: FedPeftError


@dataclass(frozen=True, slots=True)
class Died:
    """A worker is no more."""

    cause: str


@dataclass(frozen=True, slots=True)
class Seen:
    """Training steps of a worker have seen so many records."""

    records: int


Event: TypeAlias = Ready | Answered | Broken | Died | Seen


class Crew(Protocol):
    """Workers by number.

    One is handed a window only while it is ready, that is while it reads and tells nothing, so
    worker and parent never both wait for the other to read, however long what they send.
    """

    size: int

    def hand(self, number: int, window: Window, width: int) -> None:
        """Give a ready worker a window; that it has died meanwhile is for :meth:`next` to tell."""
        ...

    def next(self) -> tuple[int, Event]:
        """Wait for the next thing that a worker tells."""
        ...

    def restart(self, number: int) -> None:
        """Start another worker in the place of a dead one."""
        ...


class Dispatch:
    """The engine of a crew; see ``engine._base.Engine``."""

    remote = False

    def __init__(self, stage: Stage, player: Player, crew: Crew) -> None:
        self._stage, self._player, self._crew = stage, player, crew
        self._ready: set[int] = set()
        self._at: dict[int, Window] = {}
        self._stillborn = 0
        self._warned: set[str] = set()

    def population(self) -> Population:
        """Return every client with its training records."""
        return self._stage.site.federation.population

    def exchange(
        self, requests: Iterable[Request]
    ) -> Iterator[tuple[str, Message | bytes | Exception]]:
        """Play each client's round. Raises ``TrainError`` where nobody's training stays finite."""
        yield from some_finite(self._answers("train", list(requests)))

    def evaluate(self, requests: Iterable[Request]) -> Iterator[tuple[str, Metrics | Exception]]:
        """Evaluate each client that has held-out records."""
        held = self._stage.site.federation.held
        yield from self._answers("evaluate", [(c, m) for c, m in requests if len(held[c])])

    def share(
        self, clients: Sequence[str], work: Callable[[Sequence[str], Grouping], _T]
    ) -> Iterator[_T]:
        """Do ``work`` in this process, window by window."""
        yield from self._player.share(clients, work)

    def _answers(self, what: str, requests: Sequence[Request]) -> Iterator[tuple[str, Any]]:
        self._settle()
        queue = deque(self._windows(what, requests))
        while queue or self._at:
            for number in sorted(self._ready)[: len(queue)]:
                self._ready.remove(number)
                self._at[number] = queue.popleft()
                self._crew.hand(number, self._at[number], self._player.grouping.width)
            number, event = self._crew.next()
            window = self._at.get(number)
            if isinstance(event, Broken):
                raise event.error
            if isinstance(event, Died):
                if again := self._buried(number, event):
                    queue.appendleft(again)
            elif isinstance(event, Ready):
                self._welcome(number, event)
            elif isinstance(event, Seen):
                self._stage.seen(event.records)
            elif window is not None and event.client not in window.answered:
                window.answered.add(event.client)
                yield event.client, event.answer

    def _windows(self, what: str, requests: Sequence[Request]) -> Iterator[Window]:
        size = self._player.window(len(requests), self._crew.size)
        for body in {id(message.body): message.body for _, message in requests}.values():
            part = [request for request in requests if request[1].body is body]
            for at in range(0, len(part), size):
                yield Window(what, part[at : at + size])

    def _settle(self) -> None:
        """Let windows end whose answers nobody waits for any more: a round was abandoned."""
        while self._at:
            number, event = self._crew.next()
            if isinstance(event, Died):
                self._buried(number, event)
            elif isinstance(event, Ready):
                self._welcome(number, event)

    def _welcome(self, number: int, event: Ready) -> None:
        self._stillborn = 0
        self._at.pop(number, None)
        self._ready.add(number)
        for text in event.warnings:
            if text not in self._warned:
                self._warned.add(text)
                self._stage.warn(text)
        if event.width is not None:
            self._player.narrow(event.width)

    def _buried(self, number: int, event: Died) -> Window | None:
        """Replace a dead worker; return the window it was at. Raises where that is no use."""
        window = self._at.pop(number, None)
        self._ready.discard(number)
        if window is None:
            self._stillborn += 1
            if self._stillborn == _TRIES:
                raise RunError(f"engine: workers cannot start ({event.cause})")
        self._crew.restart(number)
        if window is not None:
            window.deaths += 1
            if window.deaths == _TRIES:
                told = f"workers keep dying ({event.cause}) while they play {window}"
                raise TrainError(f"{told}; lower group or workers")
            self._stage.warn(f"a worker died ({event.cause}); playing {window} again")
            if window.deaths > 1 and self._player.grouping.width > 1:  # no longer bad luck
                self._player.narrow(self._player.grouping.halved().width)
                self._stage.warn(f"going on with group={self._player.grouping.width}")
        return window


def event_of(told: dict[str, Any], body: bytes | None = None) -> Event:
    """Return what a worker's frame says."""
    if told["kind"] == "ready":
        return Ready(told["width"], told["warnings"])
    if told["kind"] == "seen":
        return Seen(told["records"])
    if told["kind"] == "broken":
        return Broken(_error(told))
    if told["kind"] == "failed":
        return Answered(told["client"], _error(told))
    if told["kind"] == "metrics":
        return Answered(told["client"], told["metrics"])
    pieces = [memoryview(body or b"")]
    return Answered(told["client"], Message(told["head"].encode(), Body([], pieces)))


def requests_of(told: dict[str, Any], body: Body) -> list[Request]:
    """Return the requests of a window, as a worker was told them."""
    return [
        (client, Message(head.encode(), body))
        for client, head in zip(told["clients"], told["heads"], strict=True)
    ]


def _error(told: dict[str, Any]) -> FedPeftError:
    kind = getattr(fedpeft.errors, told["error"], RunError)
    found: FedPeftError = kind(*told["problems"])
    if "trace" in told:
        found.add_note(told["trace"])
    return found
