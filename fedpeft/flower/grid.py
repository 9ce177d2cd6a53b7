"""Clients behind Flower's grid, as an engine that carries its own post."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from flwr.app import MessageType as Kind
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedpeft.errors import FedPeftError, RunError
from fedpeft.flower.errands import Answer, Errands, Key, Refusal, content_of
from fedpeft.flower.errands import Post as Messages
from fedpeft.flower.messages import KEEP, log, read_metrics, read_packet
from fedpeft.flower.nodes import SLEEP, Nodes
from fedpeft.grouping import Grouping
from fedpeft.post import Came
from fedpeft.types import Flight, Metrics, Population
from fedpeft.wire import Message as Packed

_LAST = 3600.0  # seconds that a client has to keep the result, where rounds have no deadline

_T = TypeVar("_T")


class GridEngine:
    """Clients behind Flower's grid; see ``engine.base.Engine``. Greet them before the first round.

    A client that has not replied after ``deadline`` seconds (0: as long as Flower keeps the
    message, twelve hours) is left out of the round; what it says later is dropped. One that is
    ``patient`` goes on where every client that was asked refuses. With ``every`` nobody is left out
    because a node, or its app, was gone: it is waited for, and asked again until its deadline.
    ``roster`` says which site a node is (``flower/roll.py``).
    """

    remote = True

    def __init__(
        self,
        grid: Grid,
        deadline: float = 0.0,
        *,
        patient: bool = False,
        every: bool = False,
        roster: Callable[[], Mapping[int, str]] = dict,
    ) -> None:
        self._deadline = deadline
        self._patient, self._every = patient, every
        self._messages = Messages(grid)
        self.nodes = Nodes(grid, self._messages, roster)
        self._began, self._gone = time.monotonic(), 0
        self._flying: Errands[Flight] = self._errands()
        self._answers: dict[Flight, Answer] = {}
        self._come: deque[Came] = deque()

    def population(self) -> Population:
        """Return every client that was greeted, with its training records."""
        return self.nodes.population()

    def reachable(self, clients: Sequence[str]) -> Sequence[str]:
        """Return those of ``clients`` whose nodes are there; with ``every``, all are waited for.

        Raises ``RunError`` where none is there for as long as the first greeting may take.
        """
        if self._every:
            self.nodes.look()
            return clients
        return self.nodes.reachable(clients)

    def start(self, clock: float) -> None:
        """Begin, or go on, at ``clock``."""
        self._began = time.monotonic() - clock

    @property
    def clock(self) -> float:
        """Seconds since the run's begin."""
        return time.monotonic() - self._began

    def send(self, flight: Flight, message: Packed) -> None:
        """Push a request; who is gone is told by :meth:`wait`."""
        self._flying.begin(flight, flight.client, Kind.TRAIN, message)

    def wait(self, until: float) -> Came | None:
        """Look for replies until one has come, or a client has had its ``deadline``."""
        sleep = SLEEP[0]
        while not self._come:
            for flight, client, found in self._polled(self._flying):
                problem = ""
                if isinstance(found, Exception) and not isinstance(found, Refusal):
                    self._gone, problem = self._gone + 1, str(found)
                else:
                    self._answers[flight] = found
                self._come.append(Came(client, flight.version, self.clock, problem))
            if not self._come:
                if self.clock >= until:
                    return None
                time.sleep(max(0.0, min(sleep, until - self.clock)))
                sleep = min(1.5 * sleep, SLEEP[1])
        return self._come.popleft()

    def replies(self, taken: Iterable[Flight]) -> Iterator[tuple[str, Packed | bytes | Exception]]:
        """Hand over what came.

        Raises ``RunError`` where every client that was asked refuses: that is no bad luck.
        """
        used, refusals = 0, dict[str, str]()
        for flight in taken:
            used, found = used + 1, self._answers.pop(flight)
            if isinstance(found, Refusal):
                refusals[flight.client] = str(found)
            yield flight.client, _read(found, read_packet)
        gone, self._gone = self._gone, 0
        self._raise_if_all(refusals, used + gone)

    def drop(self, flight: Flight) -> None:
        """Wait no longer: what it says later is dropped with a line."""
        self._answers.pop(flight, None)
        self._flying.drop(flight)

    def strays(self) -> dict[str, str]:
        """Return who has said something that nobody waited for, or plays nobody, since then."""
        return {**self._messages.strays(), **self.nodes.strangers()}

    def exchange(
        self, requests: Iterable[tuple[str, Packed]]
    ) -> Iterator[tuple[str, Packed | bytes | Exception]]:
        """Have each client answer a question of a later phase.

        Raises ``RunError`` where every client that was asked refuses: that is no bad luck.
        """
        asked, refusals = 0, dict[str, str]()
        for client, found in self._ask(Kind.TRAIN, requests):
            asked += 1
            if isinstance(found, Refusal):
                refusals[client] = str(found)
            yield client, _read(found, read_packet)
        self._raise_if_all(refusals, asked)

    def evaluate(
        self, requests: Iterable[tuple[str, Packed]]
    ) -> Iterator[tuple[str, Metrics | Exception]]:
        """Have each client evaluate; one without held-out records answers nothing."""
        for client, found in self._ask(Kind.EVALUATE, requests):
            metrics = _read(found, read_metrics)
            if isinstance(metrics, Exception):
                log.warning("%s does not evaluate: %s", client, metrics)
            if metrics:
                yield client, metrics

    def hand_out(
        self, requests: Iterable[tuple[str, Packed]]
    ) -> Iterator[tuple[str, Metrics | Exception]]:
        """Have each client keep the result. Whose node is away, or dies over it, is left out."""
        self.nodes.look()
        asked: Errands[str] = Errands(self._messages, self.nodes.node_of, self._deadline or _LAST)
        for client, found in self._asked(asked, KEEP, requests, every=False):
            yield client, _read(found, read_metrics)

    def share(
        self, clients: Sequence[str], work: Callable[[Sequence[str], Grouping], _T]
    ) -> Iterator[_T]:
        """Do ``work`` in this process, for one client after the other."""
        return (work([client], Grouping()) for client in clients)

    def _ask(
        self, kind: str, requests: Iterable[tuple[str, Packed]]
    ) -> Iterator[tuple[str, Answer]]:
        return self._asked(self._errands(), kind, requests, every=self._every)

    def _asked(
        self,
        asked: Errands[str],
        kind: str,
        requests: Iterable[tuple[str, Packed]],
        *,
        every: bool,
    ) -> Iterator[tuple[str, Answer]]:
        for client, message in requests:
            if every or self.nodes.there(client):
                asked.begin(client, client, kind, message)
            else:
                yield client, RunError("its node is away")
        sleep = SLEEP[0]
        while asked:
            for _, client, found in self._polled(asked):
                yield client, found
                sleep = SLEEP[0]
            if asked:
                time.sleep(sleep)
                sleep = min(1.5 * sleep, SLEEP[1])

    def _errands(self) -> Errands[Any]:
        return Errands(self._messages, self.nodes.node_of, self._deadline, every=self._every)

    def _polled(self, errands: Errands[Key]) -> list[tuple[Key, str, Answer]]:
        """Return which requests are over; see who is back where somebody is to be asked again."""
        if errands.lost:
            self.nodes.glance()
        return list(errands.poll())

    def _raise_if_all(self, refusals: Mapping[str, str], asked: int) -> None:
        """Raise ``RunError`` where everybody refuses: that is no bad luck."""
        if refusals and len(refusals) == asked and not self._patient:
            client, reason = next(iter(refusals.items()))
            raise RunError(f"no client plays this round; {client}: {reason}")


def _read(found: Answer, read: Callable[[RecordDict], _T]) -> _T | Exception:
    try:
        return read(content_of(found))
    except FedPeftError as error:
        return error
