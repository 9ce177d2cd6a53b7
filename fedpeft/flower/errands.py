"""Requests on Flower's grid, from the first push to the answer, or to why there is none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedpeft.errors import FedPeftError, RunError, printable
from fedpeft.faults import fault
from fedpeft.flower.messages import REFUSED, log, packet_record
from fedpeft.wire import Message as Packed

_APP_FAILED, _APP_CRASHED = (1, 2, 7), 8  # Flower: app not loaded, app raised, bad bundle
_KEPT = 60.0  # seconds that Flower keeps a message beyond its deadline
PAUSE = 2.0  # seconds before somebody is asked again
TRIES = 4  # times that an app may fail at the same request

Answer: TypeAlias = "RecordDict | FedPeftError"
Key = TypeVar("Key", bound=Hashable)


class Refusal(RunError):
    """The app at the client ran, or did not start, and says why."""


class Failure(Refusal):
    """The app at the client broke down."""


class Crash(Failure):
    """The process of the app at the client ended, as where it was killed."""


@dataclass(slots=True)
class Errand:
    """A request: to whom, until when an answer is waited for, and how often the app has failed."""

    client: str
    kind: str
    message: Packed
    until: float
    failed: int = 0
    due: float = math.inf
    """When to ask again, where nothing is under way."""


class Post:
    """Messages to nodes, by the ids that Flower gives them; what comes too late is told."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._late: dict[str, str] = {}
        self._strays: dict[str, str] = {}

    def push(self, node: int, kind: str, content: RecordDict, seconds: float) -> str:
        """Return the message's id, or nothing where the node is gone."""
        ttl = seconds + _KEPT if seconds else None
        fault("request.unsent")
        sent = list(self._grid.push_messages([Message(content, node, kind, ttl=ttl)]))
        fault("request.sent")
        return (sent[0] or "") if sent else ""

    def pull(self, pending: dict[str, Key]) -> Iterator[tuple[str, Key, Answer]]:
        """Yield (message id, whose it is, answer) and take them out of ``pending``."""
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

    def give_up(self, message: str, name: str) -> None:
        """Wait no longer for what ``name`` answers to a message."""
        self._late[message] = name

    def strays(self) -> dict[str, str]:
        """Return who has said something that nobody waited for, since this was last asked."""
        found, self._strays = self._strays, {}
        return found


class Errands(Generic[Key]):
    """Requests under way, by the caller's keys.

    Each has ``deadline`` seconds (0: as long as Flower keeps the message, twelve hours).
    ``node_of`` tells a client's node, which may change when the client comes back. Where ``every``
    reply is wanted, a request that was lost is sent again: its node, or the app there, was gone. It
    has the same bytes, so a node that has answered it answers the same.
    """

    def __init__(
        self, post: Post, node_of: Callable[[str], int], deadline: float, *, every: bool = False
    ) -> None:
        self._post, self._node_of, self._deadline, self._every = post, node_of, deadline, every
        self._errands: dict[Key, Errand] = {}
        self._sent: dict[str, Key] = {}
        self._gone: list[tuple[Key, str]] = []

    def __len__(self) -> int:
        return len(self._errands) + len(self._gone)

    @property
    def lost(self) -> bool:
        """Whether somebody is to be asked again."""
        return any(errand.due < math.inf for errand in self._errands.values())

    def begin(self, key: Key, client: str, kind: str, message: Packed) -> None:
        """Send a request; that its node is gone :meth:`poll` tells."""
        until = time.monotonic() + (self._deadline or math.inf)
        self._errands[key] = Errand(client, kind, message, until)
        if not self._pushed(key) and not self._every:
            del self._errands[key]
            self._gone.append((key, client))

    def poll(self) -> Iterator[tuple[Key, str, Answer]]:
        """Yield (key, client, answer) of requests that are over; an error says why without one."""
        while self._gone:
            yield *self._gone.pop(0), RunError("Flower did not take the message: its node is gone")
        for _, key, found in list(self._post.pull(self._sent)):
            errand = self._errands[key]
            if not self._again(errand, found):
                del self._errands[key]
                yield key, errand.client, found
        now = time.monotonic()
        for key, errand in list(self._errands.items()):
            if now > errand.until:
                self.drop(key)
                yield key, errand.client, RunError(f"no reply within {self._deadline:g} seconds")
            elif now >= errand.due:
                self._pushed(key)

    def drop(self, key: Key) -> None:
        """Wait no longer; what comes later is a stray."""
        errand = self._errands.pop(key, None)
        for message in [m for m, other in self._sent.items() if other == key]:
            del self._sent[message]
            if errand:
                self._post.give_up(message, errand.client)

    def _again(self, errand: Errand, found: Answer) -> bool:
        """Tell whether a request is sent again whose answer is this one."""
        lost = isinstance(found, FedPeftError) and not isinstance(found, Refusal)
        errand.failed += isinstance(found, Failure)
        if not self._every or not (lost or (isinstance(found, Failure) and errand.failed < TRIES)):
            return False
        log.warning("%s is asked again: %s", errand.client, found)
        errand.due = time.monotonic() + PAUSE
        return True

    def _pushed(self, key: Key) -> bool:
        """Send a request, or say when to try again."""
        errand = self._errands[key]
        content, seconds = packet_record(errand.message, errand.client), self._deadline
        message = self._post.push(self._node_of(errand.client), errand.kind, content, seconds)
        errand.due = math.inf if message else time.monotonic() + PAUSE
        if message:
            self._sent[message] = key
        return bool(message)


def content_of(found: Answer) -> RecordDict:
    """Return what a reply holds. Raises what stands for it where there is none."""
    if isinstance(found, Exception):
        raise found
    return found


def _answer(reply: Message) -> Answer:
    if not reply.has_error():
        return reply.content
    told = (reply.error.reason or "no reason given").strip().strip("'>").splitlines()
    text = printable((told or ["no reason given"])[-1].strip())
    if (code := reply.error.code) == REFUSED:
        return Refusal(text)
    lost = Crash if code == _APP_CRASHED else RunError
    return (Failure if code in _APP_FAILED else lost)(f"{text} (code {code})")
