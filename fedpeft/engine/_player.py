"""Plays the clients of one process, in groups that share forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TypeVar

from fedpeft.client_rounds import Asked, group_round
from fedpeft.engine._allocator import keep_freed_memory
from fedpeft.errors import FedPeftError, GroupError, TrainError
from fedpeft.evaluation import group_evaluation
from fedpeft.grouping import Grouping
from fedpeft.memory import MemoryStore
from fedpeft.out_of_memory import is_out_of_memory, release
from fedpeft.site import Site
from fedpeft.spending import Purse
from fedpeft.tensors import size
from fedpeft.types import Metrics
from fedpeft.wire import Message, peek

_POOLED = 256
"""Clients whose held-out records are evaluated together where they hold the same adapter."""
_STATE = 5
"""Copies of what trains that a client in training holds: itself, gradient, optimizer, a spare."""
_WAITING = 1 << 30
"""Bytes that clients who wait for a pass may take: fixed, because who shares a pass decides
the last bits, and a resumed run must repeat them."""

TOO_LARGE = (
    "one client's pass does not fit into memory; lower the trainer's batch or raise accumulate"
)

Request = tuple[str, Message]
_T = TypeVar("_T")
_Item = TypeVar("_Item")


class Player:
    """Plays rounds and evaluates; a group that cannot be trained in memory is halved."""

    def __init__(
        self,
        site: Site,
        memories: MemoryStore,
        grouping: Grouping,
        warn: Callable[[str], None],
        on_step: Callable[[int], None] = lambda _: None,
        keep: Callable[[Grouping], None] = lambda _: None,
    ) -> None:
        self._site, self._memories, self._warn, self._on_step = site, memories, warn, on_step
        self._keep = keep
        self.grouping = grouping
        keep_freed_memory()
        if grouping.checkpointing and not site.attached.checkpoint():
            warn("checkpointing: this model or adapter has no layers that can be computed again")
        most = site.plan.adapter.max_group
        if most is not None and grouping.width > most:
            self._alone("this adapter has no stacked form")

    def narrow(self, width: int) -> None:
        """Let no more than ``width`` clients share a pass from now on, in a resumed run as well."""
        if width < self.grouping.width:
            self.grouping = replace(self.grouping, width=width)
            self._keep(self.grouping)

    def window(self, clients: int, workers: int = 1) -> int:
        """Return how many of ``clients`` a worker should be handed at once."""
        tables = self._site.tables
        roles = tables.roles(0)
        trained = 4 * size(shape for k, shape in tables.shapes.items() if k in roles.train)
        adapters = 2 if self._site.plan.personal.when == "rounds" else 1
        most = self.grouping.window(adapters * _STATE * trained, _WAITING)
        parts = -(-clients // most)
        return -(-clients // (-(-parts // workers) * workers)) if clients else 1

    def exchange(self, requests: Sequence[Request]) -> Iterator[tuple[str, Message | FedPeftError]]:
        """Play each client's round; window by window, in the order asked, one round at a time."""
        for part in chain.from_iterable(map(self._windows, _by_round(requests))):
            asked = [self._asked(*request) for request in part]
            play = partial(group_round, self._site.plan, self._site, asked, on_step=self._on_step)
            for one, played in zip(asked, self._sharing(asked[0].client, play), strict=True):
                if played.memory is not one.memory and isinstance(played.reply, Message):
                    self._memories.save(played.client, played.memory)
                yield played.client, played.reply

    def evaluate(self, requests: Sequence[Request]) -> Iterator[tuple[str, Metrics]]:
        """Evaluate each client that has held-out records."""
        left = ((c, m) for c, m in requests if len(self._site.held(c)))
        trains = self._site.plan.personal.when == "evaluation"
        while part := list(islice(left, self._pool(len(requests)))):
            asked = [self._asked(*request) for request in part]
            held = [self._site.held(client) for client, _ in part]
            evaluate = partial(group_evaluation, self._site.plan, self._site, asked, held)
            found = self._sharing(part[0][0], evaluate) if trains else self._together(evaluate)
            yield from zip([client for client, _ in part], found, strict=True)

    def share(
        self, clients: Sequence[str], work: Callable[[Sequence[str], Grouping], _T]
    ) -> Iterator[_T]:
        """Do ``work`` for one window of clients after the other, in the order given.

        It is told who they are and which of them share a pass, and called again with smaller
        groups where they do not fit into memory.
        """
        for part in self._windows(clients):
            yield self._sharing(part[0], partial(work, part))

    def _pool(self, clients: int) -> int:
        """Return how many of ``clients`` are evaluated at once."""
        if self._site.plan.personal.when != "never":  # each holds an adapter of its own
            return self.window(clients)
        return _POOLED if self.grouping.width > 1 else 1

    def _windows(self, items: Sequence[_Item]) -> Iterator[list[_Item]]:
        """Cut into windows, whose size follows the grouping while it is narrowed."""
        left = iter(items)
        while part := list(islice(left, self.window(len(items)))):
            yield part

    def _asked(self, client: str, message: Message) -> Asked:
        return Asked(client, message, self._memories.load(client), Purse(self._memories.ledgers))

    def _together(self, work: Callable[[Grouping], _T]) -> _T:
        """Do ``work`` as the grouping says, or one client at a time where they share no pass."""
        try:
            return work(self.grouping)
        except GroupError as error:
            self._alone(str(error))
        return work(self.grouping)

    def _sharing(self, first: str, work: Callable[[Grouping], _T]) -> _T:
        """Train as the grouping says, or with fewer clients in a pass where it must be."""
        while True:
            try:
                return self._together(work)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._halve(first)  # when the error no longer holds the tensors of the failed pass

    def _halve(self, first: str) -> None:
        if self.grouping.width == 1:
            raise TrainError(f"{first}: {TOO_LARGE}")
        release(self._site.learner.device)
        self.narrow(self.grouping.halved().width)
        self._warn(f"a group does not fit into memory; going on with group={self.grouping.width}")

    def _alone(self, reason: str) -> None:
        self.grouping = replace(self.grouping, width=1, costs=())
        self._warn(f"clients train one at a time: {reason}")


def _by_round(requests: Sequence[Request]) -> list[list[Request]]:
    """Part requests that began from different versions of the model: they share no pass."""
    found: dict[object, list[Request]] = {}
    for request in requests:
        found.setdefault(peek(request[1]).get("round"), []).append(request)
    return [*found.values()]
