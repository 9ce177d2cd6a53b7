"""Packets as Flower messages, and an engine over Flower's grid: the only module that imports flwr.

A message carries one array of bytes, because Flower's cost is per array. A node says which clients
it plays when it is greeted: the grid itself knows only random node numbers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TypeAlias, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app import MessageType as Kind
from flwr.serverapp import Grid

from fedpeft.errors import FedPeftError, RunError, WireError
from fedpeft.grouping import Grouping
from fedpeft.types import Metrics, Population
from fedpeft.wire import Message as Packed

log = logging.getLogger("flwr.fedpeft")  # below Flower's own, so that --stream shows it

REFUSED = 100
"""Error code of a client that says why it does not answer; Flower's own are below."""
_APP_FAILED = (REFUSED, 1, 2, 7, 8)  # Flower: app not loaded, app raised, bad bundle, app crashed
_SLEEP = (0.05, 0.5)  # seconds between two looks for replies: the first, the longest
_KEPT = 60.0  # seconds that Flower keeps a message beyond its deadline
_STYPE = "fedpeft.packet"

_T = TypeVar("_T")
Answer: TypeAlias = "RecordDict | FedPeftError"


@dataclass(frozen=True, slots=True)
class Hello:
    """What a node says of itself.

    ``clients`` are those it plays, with their ``records``; none where the plan has none for this
    node. ``nodes`` is how many there are in all, 0 if unknown. ``plan`` is a digest of the plan and
    the data as the node sees them.
    """

    clients: list[str]
    records: list[int]
    nodes: int
    version: str
    plan: str


def packet_record(message: Packed | bytes, client: str = "") -> RecordDict:
    """Wrap a packet as one opaque array; to a node it says which of its clients is meant."""
    data = bytes(message)
    array = Array(dtype="uint8", shape=(len(data),), stype=_STYPE, data=data)
    content = RecordDict({"packet": ArrayRecord({"bytes": array})})
    if client:
        content["to"] = ConfigRecord({"client": client})
    return content


def addressee(content: RecordDict) -> str:
    """Return which client a message to a node is for. Raises ``WireError`` where it says none."""
    found = dict(content.config_records.get("to", {})).get("client")
    if not isinstance(found, str):
        raise WireError("message names no client")
    return found


def read_packet(content: RecordDict) -> bytes:
    """Return the packet's bytes. Raises ``WireError`` for any other content."""
    records = content.array_records
    if list(records) != ["packet"] or list(records["packet"]) != ["bytes"]:
        raise WireError("message holds no packet")
    array = records["packet"]["bytes"]
    if array.stype != _STYPE or array.shape != (len(array.data),):
        raise WireError("message holds an array that is no packet")
    return array.data


def metrics_record(metrics: Metrics) -> RecordDict:
    """Wrap metrics; empty ones say that there was nothing to evaluate on."""
    return RecordDict({"metrics": MetricRecord({k: float(v) for k, v in metrics.items()})})


def read_metrics(content: RecordDict) -> Metrics:
    """Return metrics. Raises ``WireError`` for any other content."""
    found = dict(content.metric_records.get("metrics", {"?": ""}))
    if not all(isinstance(value, float) for value in found.values()):
        raise WireError("message holds no metrics")
    return {name: float(value) for name, value in found.items()}  # type: ignore[arg-type]


def hello_record(hello: Hello) -> RecordDict:
    """Wrap what a node says of itself."""
    return RecordDict({"hello": ConfigRecord(asdict(hello))})


def read_hello(content: RecordDict) -> Hello:
    """Return what a node says of itself. Raises ``WireError`` for any other content."""
    found = dict(content.config_records.get("hello", {}))
    found = {"clients": [], "records": [], **found}  # Flower drops empty lists
    kinds = {name: type(value) for name, value in found.items()}
    if kinds != {"clients": list, "records": list, "nodes": int, "version": str, "plan": str}:
        raise WireError("message is no hello of this version")
    hello = Hello(**found)  # type: ignore[arg-type]
    fits = all(isinstance(c, str) for c in hello.clients) and all(
        isinstance(n, int) for n in hello.records
    )
    if not fits or len(hello.clients) != len(hello.records):
        raise WireError("message is no hello of this version")
    return hello


def answer(message: Message, make: Callable[[], RecordDict]) -> Message:
    """Reply with what ``make`` returns, or with the reason it gives for not answering."""
    try:
        return Message(make(), reply_to=message)
    except FedPeftError as error:
        log.warning("refused: %s", error)
        return Message(Error(REFUSED, str(error)), reply_to=message)


class GridEngine:
    """Clients behind Flower's grid; see ``engine.base.Engine``. Greet them before the first round.

    A client that has not replied after ``deadline`` seconds (0: as long as Flower keeps the
    message, twelve hours) is left out of the round; what it says later is dropped.
    """

    remote = True

    def __init__(self, grid: Grid, deadline: float = 0.0) -> None:
        self._grid, self._deadline = grid, deadline
        self._nodes: dict[str, int] = {}
        self._records: dict[str, int] = {}
        self._late: dict[str, str] = {}

    def population(self) -> Population:
        """Return every client that was greeted, with its training records."""
        return {client: self._records[client] for client in sorted(self._records)}

    def greet(self, expected: Population, version: str, plan: str, wait: float) -> None:
        """Learn which node plays which client, until all of ``expected`` have been found.

        Raises ``RunError`` naming the missing clients after ``wait`` seconds, or as soon as every
        node has spoken.
        """
        asked: dict[str, int] = {}
        pending: dict[str, str] = {}
        problems: list[str] = []
        until, sleep, nodes, heard = time.monotonic() + wait, _SLEEP[0], 0, 0
        while missing := [client for client in expected if client not in self._nodes]:
            if time.monotonic() > until or 0 < nodes <= heard:
                raise RunError(_absent(missing, len(expected), len(asked), problems, wait))
            for node in sorted({*self._grid.get_node_ids()} - {*asked.values()}):
                if pushed := self._push(node, Kind.QUERY, RecordDict(), wait):
                    asked[pushed], pending[pushed] = node, f"node {node}"
            for message, name, found in self._pull(pending):
                heard += 1
                try:
                    hello = read_hello(_content(found))
                    nodes = max(nodes, hello.nodes)
                    self._welcome(hello, asked[message], expected, version, plan)
                except FedPeftError as error:
                    problems.append(f"{name}: {error}")
                    log.warning("%s", problems[-1])
            time.sleep(sleep)
            sleep = min(1.5 * sleep, _SLEEP[1])
        self._late |= pending

    def exchange(
        self, requests: Iterable[tuple[str, Packed]]
    ) -> Iterator[tuple[str, Packed | bytes | Exception]]:
        """Have each client play its round.

        Raises ``RunError`` where every client that was asked refuses: that is no bad luck.
        """
        asked, refusals = 0, dict[str, str]()
        for client, found in self._ask(Kind.TRAIN, requests):
            asked += 1
            if isinstance(found, _Refusal):
                refusals[client] = str(found)
            yield client, _read(found, read_packet)
        if refusals and len(refusals) == asked:
            client, reason = next(iter(refusals.items()))
            raise RunError(f"no client plays this round; {client}: {reason}")

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

    def _welcome(
        self, hello: Hello, node: int, expected: Population, version: str, plan: str
    ) -> None:
        if hello.version != version:
            raise RunError(f"has fedpeft {hello.version}, the server has {version}")
        if hello.plan != plan:
            raise RunError("reads other data than the server for this plan")
        if not hello.clients:
            log.warning("node %d is left out: the plan has no client for it", node)
        for client, records in zip(hello.clients, hello.records, strict=True):
            if client not in expected:
                raise RunError(f"says that it plays {client[:80]!r}, which the plan does not have")
            if client in self._nodes:
                raise RunError(f"says that it plays {client}, as another node did")
            if records != expected[client]:
                raise RunError(f"{client} has {records} records, in the plan {expected[client]}")
        for client, records in zip(hello.clients, hello.records, strict=True):
            self._nodes[client], self._records[client] = node, records

    def _ask(
        self, kind: str, requests: Iterable[tuple[str, Packed]]
    ) -> Iterator[tuple[str, Answer]]:
        pending: dict[str, str] = {}
        for client, message in requests:
            node = self._nodes[client]
            if pushed := self._push(node, kind, packet_record(message, client), self._deadline):
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

    def _push(self, node: int, kind: str, content: RecordDict, seconds: float) -> str:
        """Return the message's id, or nothing where the node is gone."""
        ttl = seconds + _KEPT if seconds else None
        sent = list(self._grid.push_messages([Message(content, node, kind, ttl=ttl)]))
        return (sent[0] or "") if sent else ""

    def _pull(self, pending: dict[str, str]) -> Iterator[tuple[str, str, Answer]]:
        """Yield (message id, whom it was sent to, answer) and take them out of ``pending``."""
        wanted = [*pending, *self._late]
        for reply in self._grid.pull_messages(wanted) if wanted else ():
            message = reply.metadata.reply_to_message_id
            if message in self._late:
                log.info("dropped what %s said too late", self._late.pop(message))
            elif message not in pending:
                log.warning("dropped a reply to a message that was not sent: %.40s", message)
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


def _absent(missing: list[str], clients: int, nodes: int, problems: list[str], wait: float) -> str:
    names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    remedy = "; ".join(problems[:3]) or f"they did not answer within {wait:g} seconds (wait)"
    return f"{len(missing)} of {clients} clients are missing ({names}); {nodes} nodes: {remedy}"
