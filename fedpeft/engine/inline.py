"""All clients in this process, on one resident model; up to ``group`` of them in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fedpeft.engine._base import Engine, Stage, some_finite
from fedpeft.engine._grouped import Grouped
from fedpeft.grouping import Grouping
from fedpeft.spec import method
from fedpeft.types import Metrics, Population
from fedpeft.wire import Message

if TYPE_CHECKING:
    from fedpeft.engine._player import Player

_T = TypeVar("_T")


@method
class Inline(Grouped):
    """Clients in this process; see :class:`Grouped` for the fields."""

    @contextmanager
    def start(self, stage: Stage) -> Iterator[Engine]:
        """Choose the group; nothing has to be stopped."""
        from fedpeft.engine._player import Player

        grouping = self.grouping(stage)
        keep = partial(self.keep, stage)
        player = Player(stage.site, stage.memories, grouping, stage.warn, stage.seen, keep)
        yield _Running(player, stage)


class _Running:
    """See ``engine._base.Engine``."""

    remote = False

    def __init__(self, player: Player, stage: Stage) -> None:
        self._player, self._population = player, stage.site.federation.population

    def population(self) -> Population:
        """Return every client with its training records."""
        return self._population

    def exchange(
        self, requests: Iterable[tuple[str, Message]]
    ) -> Iterator[tuple[str, Message | bytes | Exception]]:
        """Play each client's round. Raises ``TrainError`` where nobody's training stays finite."""
        yield from some_finite(self._player.exchange(list(requests)))

    def evaluate(
        self, requests: Iterable[tuple[str, Message]]
    ) -> Iterator[tuple[str, Metrics | Exception]]:
        """Evaluate each client that has held-out records."""
        yield from self._player.evaluate(list(requests))

    def share(
        self, clients: Sequence[str], work: Callable[[Sequence[str], Grouping], _T]
    ) -> Iterator[_T]:
        """Do ``work`` in this process, window by window."""
        yield from self._player.share(clients, work)
