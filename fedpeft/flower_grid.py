"""Clients behind Flower's grid, as an engine that carries its own post."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, TypeVar

from flwr.app import Message, RecordDict
from flwr.app import MessageType as Kind
from flwr.serverapp import Grid

from fedpeft.errors import FedPeftError, RunError
from fedpeft.faults import fault
from fedpeft.flower import (
    REFUSED,
    log,
    packet_record,
    read_hello,
    read_metrics,
    read_packet,
)
from fedpeft.flower_roll import Roll
from fedpeft.grouping import Grouping
from fedpeft.post import Came
from fedpeft.types import Flight, Metrics, Population
from fedpeft.wire import Message as Packed

_APP_FAILED = (REFUSED, 1, 2, 7, 8)  # Flower: app not loaded, app raised, bad bundle, app crashed
_SLEEP = (0.05, 0.5)  # seconds between two looks for replies: the first, the longest
_KEPT = 60.0  # seconds that Flower keeps a message beyond its deadline

_T = TypeVar("_T")
Answer: TypeAlias = "RecordDict | FedPeftError"


class GridEngine:
    """Clients behind Flower's grid; see ``engine.base.Engine``. Greet them before the first round.

    A client that has not replied after ``deadline`` seconds (0: as long as Flower keeps the
    message, twelve hours) is left out of the round; what it says later is dropped. One that is
    ``patient`` goes on where every client that was asked refuses. ``roster`` says which site a node
    is (``flower_roll.py``).
    """

    remote = True

    def __init__(
        self,
        grid: Grid,
        deadline: float = 0.0,
        *,
        patient: bool = False,
        roster: Callable[[], Mapping[int, str]] = dict,
    ) -> None:
        self._grid, self._deadline, self._patient = grid, deadline, patient
        self._roster = roster
        self._roll, self._wait = Roll({}, "", ""), 0.0
        self._greeted: dict[str, int] = {}
        self._silent: dict[str, str] = {}
        self._present: frozenset[int] = frozenset()
        self._late: dict[str, str] = {}
        self._began, self._gone = time.monotonic(), 0
        self._flying: dict[str, tuple[Flight, float]] = {}
        self._answers: dict[Flight, Answer] = {}
        self._strays: dict[str, str] = {}
        self._come: deque[Came] = deque()

    def population(self) -> Population:
        """Return every client that was greeted, with its training records."""
        return self._roll.population

    def greet(self, expected: Population, version: str, plan: str, wait: float) -> None:
        """Learn which node plays which client, until all of ``expected`` have been found.

        Raises ``RunError`` naming the missing clients after ``wait`` seconds, or as soon as every
        node has spoken.
        """
        roll = self._roll = Roll(expected, version, plan, roster=self._roster)
        until, sleep, self._wait = time.monotonic() + wait, _SLEEP[0], wait
        while roll.missing:
            if time.monotonic() > until or 0 < roll.total <= roll.heard:
                raise RunError(roll.absent(len(self._greeted), wait))
            self._look()
            time.sleep(sleep)
            sleep = min(1.5 * sleep, _SLEEP[1])

    def reachable(self, clients: Sequence[str]) -> Sequence[str]:
        """Return those of ``clients`` whose nodes are there; others are greeted when they come.

        Raises ``RunError`` where nobody is there for as long as the first greeting may take.
        """
        until, sleep = time.monotonic() + self._wait, _SLEEP[0]
        while True:
            self._look()
            there = [c for c in clients if self._roll.nodes.get(c) in self._present]
            if there or not clients:
                return there
            if time.monotonic() > until:
                raise RunError(f"no client was there for {self._wait:g} seconds; start the nodes")
            time.sleep(sleep)
            sleep = min(1.5 * sleep, _SLEEP[1])

    def _look(self) -> None:
        """See which nodes are there, greet new ones and hear what those say that were greeted."""
        self._present = frozenset(self._grid.get_node_ids())
        for node in sorted(self._present - {*self._greeted.values()}):
            if pushed := self._push(node, Kind.QUERY, RecordDict(), self._wait):
                self._greeted[pushed], self._silent[pushed] = node, f"node {node}"
        for message, name, found in list(self._pull(self._silent)):
            self._roll.heard += 1
            try:
                hello = read_hello(_content(found))
                self._roll.welcome(hello, self._greeted[message], self._present)
            except FedPeftError as error:
                self._roll.problems.append(f"{name}: {error}")
                log.warning("%s", self._roll.problems[-1])

    def start(self, clock: float) -> None:
        """Begin, or go on, at ``clock``."""
        self._began = time.monotonic() - clock

    @property
    def clock(self) -> float:
        """Seconds since the run's begin."""
        return time.monotonic() - self._began

    def send(self, flight: Flight, message: Packed) -> None:
        """Push a request; who is gone is told by :meth:`wait`."""
        node, content = self._roll.nodes[flight.client], packet_record(message, flight.client)
        if pushed := self._push(node, Kind.TRAIN, content, self._deadline):
            self._flying[pushed] = flight, time.monotonic() + (self._deadline or math.inf)
        else:
            self._missed(flight, "Flower did not take the message: its node is gone")

    def wait(self, until: float) -> Came | None:
        """Look for replies until one has come, or a client has had its ``deadline``."""
        sleep = _SLEEP[0]
        while not self._come:
            names = {message: flight.client for message, (flight, _) in self._flying.items()}
            for message, client, found in self._pull(names):
                flight, _ = self._flying.pop(message)
                if isinstance(found, Exception) and not isinstance(found, _Refusal):
                    self._missed(flight, str(found))
                    continue
                self._answers[flight] = found
                self._come.append(Came(client, flight.version, self.clock))
            for message, (flight, end) in list(self._flying.items()):
                if time.monotonic() > end:
                    self._late[message] = self._flying.pop(message)[0].client
                    self._missed(flight, f"no reply within {self._deadline:g} seconds")
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
            if isinstance(found, _Refusal):
                refusals[flight.client] = str(found)
            yield flight.client, _read(found, read_packet)
        gone, self._gone = self._gone, 0
        self._raise_if_all(refusals, used + gone)

    def drop(self, flight: Flight) -> None:
        """Wait no longer: what it says later is dropped with a line."""
        self._answers.pop(flight, None)
        for message in [m for m, (other, _) in self._flying.items() if other == flight]:
            self._late[message] = self._flying.pop(message)[0].client

    def strays(self) -> dict[str, str]:
        """Return who has said something that nobody waited for, since this was last asked."""
        found, self._strays = self._strays, {}
        return found

    def exchange(
        self, requests: Iterable[tuple[str, Packed]]
    ) -> Iterator[tuple[str, Packed | bytes | Exception]]:
        """Have each client answer a question of a later phase.

        Raises ``RunError`` where every client that was asked refuses: that is no bad luck.
        """
        asked, refusals = 0, dict[str, str]()
        for client, found in self._ask(Kind.TRAIN, requests):
            asked += 1
            if isinstance(found, _Refusal):
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

    def share(
        self, clients: Sequence[str], work: Callable[[Sequence[str], Grouping], _T]
    ) -> Iterator[_T]:
        """Do ``work`` in this process, for one client after the other."""
        return (work([client], Grouping()) for client in clients)

    def _ask(
        self, kind: str, requests: Iterable[tuple[str, Packed]]
    ) -> Iterator[tuple[str, Answer]]:
        pending: dict[str, str] = {}
        for client, message in requests:
            node = self._roll.nodes[client]
            if node not in self._present:
                yield client, RunError("its node is away")
            elif pushed := self._push(node, kind, packet_record(message, client), self._deadline):
                pending[pushed] = client
            else:
                yield client, RunError("Flower did not take the message: its node is gone")
        until = time.monotonic() + self._deadline if self._deadline else math.inf
        sleep = _SLEEP[0]
        while pending:
            for _, client, found in self._pull(pending):
                yield client, found
                sleep = _SLEEP[0]
            if time.monotonic() > until:
                self._late |= pending
                for client in pending.values():
                    yield client, RunError(f"no reply within {self._deadline:g} seconds")
                return
            if pending:
                time.sleep(sleep)
                sleep = min(1.5 * sleep, _SLEEP[1])

    def _raise_if_all(self, refusals: Mapping[str, str], asked: int) -> None:
        """Raise ``RunError`` where everybody refuses: that is no bad luck."""
        if refusals and len(refusals) == asked and not self._patient:
            client, reason = next(iter(refusals.items()))
            raise RunError(f"no client plays this round; {client}: {reason}")

    def _missed(self, flight: Flight, problem: str) -> None:
        self._gone += 1
        self._come.append(Came(flight.client, flight.version, self.clock, problem))

    def _push(self, node: int, kind: str, content: RecordDict, seconds: float) -> str:
        """Return the message's id, or nothing where the node is gone."""
        ttl = seconds + _KEPT if seconds else None
        fault("request.unsent")
        sent = list(self._grid.push_messages([Message(content, node, kind, ttl=ttl)]))
        fault("request.sent")
        return (sent[0] or "") if sent else ""

    def _pull(self, pending: dict[str, str]) -> Iterator[tuple[str, str, Answer]]:
        """Yield (message id, whom it was sent to, answer) and take them out of ``pending``."""
        wanted = [*pending, *self._late]
        for reply in self._grid.pull_messages(wanted) if wanted else ():
            fault("reply.come")
            message = reply.metadata.reply_to_message_id
            if message in self._late:
                log.info("dropped what %s said too late", name := self._late.pop(message))
                self._strays[name] = "what it said came too late"
            elif message not in pending:
                log.warning("dropped a reply to a message that was not sent: %.40s", message)
                self._strays[f"node {reply.metadata.src_node_id}"] = "answers what nobody asked"
            else:
                yield message, pending.pop(message), _answer(reply)


class _Refusal(RunError):
    """The app at the client ran, or did not start, and says why."""


def _answer(reply: Message) -> Answer:
    if not reply.has_error():
        return reply.content
    told = (reply.error.reason or "no reason given").strip().strip("'>").splitlines()
    text = (told or ["no reason given"])[-1].strip()[:500]
    kind = _Refusal if reply.error.code in _APP_FAILED else RunError
    return kind(text if reply.error.code == REFUSED else f"{text} (code {reply.error.code})")


def _content(found: Answer) -> RecordDict:
    if isinstance(found, Exception):
        raise found
    return found


def _read(found: Answer, read: Callable[[RecordDict], _T]) -> _T | Exception:
    try:
        return read(_content(found))
    except FedPeftError as error:
        return error
