"""Clients behind Flower's grid, as an engine that carries its own post."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from flwr.app import MessageType as Kind
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedpeft import flower_errands
from fedpeft.errors import FedPeftError, RunError
from fedpeft.flower import KEEP, log, read_hello, read_metrics, read_packet
from fedpeft.flower_errands import Answer, Crash, Errands, Key, Refusal, content_of
from fedpeft.flower_errands import Post as Messages
from fedpeft.flower_roll import Roll
from fedpeft.grouping import Grouping
from fedpeft.post import Came
from fedpeft.types import Flight, Metrics, Population
from fedpeft.wire import Message as Packed

_SLEEP = (0.05, 0.5)  # seconds between two looks for replies: the first, the longest
_GLANCE = 3.0  # seconds between two looks for nodes, while somebody is to be asked again
_LAST = 3600.0  # seconds that a client has to keep the result, where rounds have no deadline

_T = TypeVar("_T")


class GridEngine:
    """Clients behind Flower's grid; see ``engine.base.Engine``. Greet them before the first round.

    A client that has not replied after ``deadline`` seconds (0: as long as Flower keeps the
    message, twelve hours) is left out of the round; what it says later is dropped. One that is
    ``patient`` goes on where every client that was asked refuses. With ``every`` nobody is left out
    because a node, or its app, was gone: it is waited for, and asked again until its deadline.
    ``roster`` says which site a node is (``flower_roll.py``).
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
        self._grid, self._deadline, self._roster = grid, deadline, roster
        self._patient, self._every = patient, every
        self._messages = Messages(grid)
        self._roll, self._wait = Roll({}, "", ""), 0.0
        self._greeted: dict[str, int] = {}
        self._silent: dict[str, str] = {}
        self._later: dict[int, tuple[float, int]] = {}
        self._present: frozenset[int] = frozenset()
        self._began, self._gone, self._seen = time.monotonic(), 0, -math.inf
        self._flying: Errands[Flight] = self._errands()
        self._answers: dict[Flight, Answer] = {}
        self._come: deque[Came] = deque()

    def population(self) -> Population:
        """Return every client that was greeted, with its training records."""
        return self._roll.population

    def greet(
        self, expected: Mapping[str, int | None], version: str, plan: str, wait: float
    ) -> None:
        """Learn which node plays which client, until all of ``expected`` have been found.

        Each has so many training records; ``None`` where it has its own, and says how many.

        Raises ``RunError`` naming the missing clients after ``wait`` seconds, or as soon as every
        node has spoken.
        """
        roll = self._roll = Roll(expected, version, plan, roster=self._roster)
        if not self._met(expected, wait):
            raise RunError(roll.absent(len(self._greeted), wait))

    def meet(
        self,
        wanted: Collection[str],
        expected: Mapping[str, int | None],
        version: str,
        plan: str,
        wait: float,
    ) -> list[str]:
        """Return which of ``wanted`` are there within ``wait`` seconds; see :meth:`greet`."""
        self._roll = Roll(expected, version, plan, roster=self._roster)
        self._met(wanted, wait)
        return [client for client in wanted if client in self._roll.nodes]

    def _met(self, wanted: Collection[str], wait: float) -> bool:
        """Greet nodes until all who are wanted were found, or time is up, or there is no hope."""
        until, sleep, self._wait = time.monotonic() + wait, _SLEEP[0], wait
        while not self._roll.nodes.keys() >= {*wanted}:
            if time.monotonic() > until or self._roll.hopeless:
                return False
            self._look()
            time.sleep(sleep)
            sleep = min(1.5 * sleep, _SLEEP[1])
        return True

    def reachable(self, clients: Sequence[str]) -> Sequence[str]:
        """Return those of ``clients`` whose nodes are there; others are greeted when they come.

        Raises ``RunError`` where none of them is there for as long as the first greeting may take.
        """
        until, sleep = time.monotonic() + self._wait, _SLEEP[0]
        while True:
            self._look()
            if self._every:
                return clients
            there = [c for c in clients if self._roll.nodes.get(c) in self._present]
            if there or not clients:
                return there
            if time.monotonic() > until:
                few = len(clients) < len(self._roll.population)
                meant = f", of the {len(clients)} that may still be asked" if few else ""
                raise RunError(
                    f"no client was there for {self._wait:g} seconds{meant}; start the nodes"
                )
            time.sleep(sleep)
            sleep = min(1.5 * sleep, _SLEEP[1])

    def _look(self) -> None:
        """See which nodes are there, greet new ones and hear what those say that were greeted."""
        self._present, self._seen = frozenset(self._grid.get_node_ids()), time.monotonic()
        known = {*self._greeted.values()}
        for node in sorted(self._present - known):
            if time.monotonic() < self._later.get(node, (0.0, 0))[0]:
                continue
            if pushed := self._messages.push(node, Kind.QUERY, RecordDict(), self._wait):
                self._greeted[pushed], self._silent[pushed] = node, f"node {node}"
        for message, name, found in list(self._messages.pull(self._silent)):
            if self._greets_again(message, name, found):
                continue
            self._roll.heard += 1
            try:
                hello = read_hello(content_of(found))
                self._roll.welcome(hello, self._greeted[message], self._present)
            except FedPeftError as error:
                self._roll.turn_away(self._greeted[message], f"{name}: {error}")

    def _greets_again(self, message: str, name: str, found: Answer) -> bool:
        """Tell whether an answer to a greeting was lost: a node, or the app there, was killed."""
        node = self._greeted[message]
        tries = self._later.get(node, (0.0, 0))[1] + isinstance(found, Crash)
        lost = isinstance(found, FedPeftError) and not isinstance(found, Refusal)
        if not lost and not (isinstance(found, Crash) and tries < flower_errands.TRIES):
            return False
        log.warning("%s is greeted again: %s", name, found)
        self._later[node] = time.monotonic() + flower_errands.PAUSE, tries
        del self._greeted[message]
        return True

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
        sleep = _SLEEP[0]
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
                sleep = min(1.5 * sleep, _SLEEP[1])
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
        """Return who has said something that nobody waited for, since this was last asked."""
        return self._messages.strays()

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
        self._look()
        asked: Errands[str] = Errands(self._messages, self._node_of, self._deadline or _LAST)
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
            if every or self._roll.nodes.get(client) in self._present:
                asked.begin(client, client, kind, message)
            else:
                yield client, RunError("its node is away")
        sleep = _SLEEP[0]
        while asked:
            for _, client, found in self._polled(asked):
                yield client, found
                sleep = _SLEEP[0]
            if asked:
                time.sleep(sleep)
                sleep = min(1.5 * sleep, _SLEEP[1])

    def _errands(self) -> Errands[Any]:
        node_of = self._node_of
        return Errands(self._messages, node_of, self._deadline, every=self._every)

    def _node_of(self, client: str) -> int:
        return self._roll.nodes[client]

    def _polled(self, errands: Errands[Key]) -> list[tuple[Key, str, Answer]]:
        """Return which requests are over; see who is back where somebody is to be asked again."""
        if errands.lost and time.monotonic() > self._seen + _GLANCE:
            self._look()
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
