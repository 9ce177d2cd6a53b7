"""What drives clients: one small protocol for this process, other processes and real machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from fedpeft.errors import TrainError
from fedpeft.grouping import Grouping
from fedpeft.types import Metrics, Population
from fedpeft.wire import Message

if TYPE_CHECKING:
    from fedpeft.memory import MemoryStore
    from fedpeft.plan import Plan
    from fedpeft.site import Site

_T = TypeVar("_T")


class Engine(Protocol):
    """Delivers messages to clients and brings back what they answer, in any order.

    Clients that are ``remote`` hold what they were sent themselves; to others it is all at hand.
    """

    remote: bool

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

    def share(
        self, clients: Sequence[str], work: Callable[[Sequence[str], Grouping], _T]
    ) -> Iterator[_T]:
        """Do ``work`` in this process, for one window of clients after the other.

        It is told who they are and which of them share a pass; nothing is sent to anybody.
        """
        ...


@runtime_checkable
class Handing(Protocol):
    """What an engine has besides whose clients keep the result of a run themselves."""

    def hand_out(
        self, requests: Iterable[tuple[str, Message]]
    ) -> Iterator[tuple[str, Metrics | Exception]]:
        """Have each client keep what it is sent; it may tell of its gain. Nobody is waited for."""
        ...


class Hosts(Protocol):
    """Processes elsewhere, each with an interpreter of its own, which do one call at a time."""

    size: int

    def call(self, number: int, work: Callable[..., Any], *arguments: Any) -> None:
        """Have one that is idle call a function that it can import; nothing is waited for."""
        ...

    def ended(self, seconds: float) -> list[tuple[int, Any]]:
        """Return what calls have returned, once some have or the seconds are over.

        An exception stands for what a call has raised, ``RunError`` for a process that has died.
        Another takes its place.
        """
        ...


@runtime_checkable
class Hosting(Protocol):
    """What an engine has besides whose workers can take whole runs, so many at once if known."""

    @property
    def workers(self) -> int | None: ...

    def check_device(self, device: str) -> None:
        """Raise ``PlanError`` where its workers are of another kind."""
        ...

    def hosts(self, plans: Iterable[Plan]) -> AbstractContextManager[Hosts]:
        """Start its workers, with what these plans' own parts are defined in; end them with it."""
        ...

    def within(self) -> tuple[Any, str]:
        """Return the engine of a run on a worker, and the device."""
        ...


@dataclass(frozen=True, slots=True)
class Stage:
    """What a simulation gives its engine.

    ``site`` is the driver's own; ``memories`` are where clients keep theirs. ``folder`` is the run
    folder, where there is one. ``warn`` tells the user; ``seen`` is told the records of each step.
    ``device`` is as the user wrote it: ``cuda`` leaves open which one.
    """

    site: Site
    memories: MemoryStore
    folder: Path | None
    warn: Callable[[str], None]
    seen: Callable[[int], None] = lambda _: None
    device: str = "cpu"


def some_finite(
    answers: Iterable[tuple[str, Message | bytes | Exception]],
) -> Iterator[tuple[str, Message | bytes | Exception]]:
    """Pass answers on. Raises ``TrainError`` where every client failed: that is no bad luck."""
    asked, failed = 0, dict[str, Exception]()
    for client, answer in answers:
        asked += 1
        if isinstance(answer, Exception):
            failed[client] = answer
        yield client, answer
    if failed and len(failed) == asked:
        client, reason = next(iter(failed.items()))
        raise TrainError(f"no client can be trained; {client}: {reason}")
