"""The nodes behind Flower's grid: who is there, and which clients each says that it plays."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from flwr.app import MessageType as Kind
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedpeft.errors import FedPeftError, RunError, printable
from fedpeft.flower import errands
from fedpeft.flower.errands import Answer, Crash, Post, Refusal, content_of
from fedpeft.flower.messages import log, read_hello
from fedpeft.flower.roll import Roll
from fedpeft.types import Population

SLEEP = (0.05, 0.5)  # seconds between two looks for replies: the first, the longest
_LONGEST = 300
"""Characters of what a node says that the ledger has."""
_GLANCE = 3.0  # seconds between two looks for nodes, while somebody is to be asked again


class Nodes:
    """Nodes, of which each is greeted once it is there. ``roster`` says which site a node is."""

    def __init__(self, grid: Grid, messages: Post, roster: Callable[[], Mapping[int, str]]) -> None:
        self._grid, self._messages, self._roster = grid, messages, roster
        self._roll, self._wait = Roll({}, "", ""), 0.0
        self._greeted: dict[str, int] = {}
        self._silent: dict[str, str] = {}
        self._later: dict[int, tuple[float, int]] = {}
        self._present: frozenset[int] = frozenset()
        self._seen = -math.inf

    def population(self) -> Population:
        """Return every client that was met, with its training records."""
        return self._roll.population

    def node_of(self, client: str) -> int:
        """Return who plays a client that was met."""
        return self._roll.nodes[client]

    def there(self, client: str) -> bool:
        """Return whether the node of a client was there at the last look."""
        return self._roll.nodes.get(client) in self._present

    def strangers(self) -> dict[str, str]:
        """Return which nodes were found to play nobody, since this was last asked, and why."""
        found, self._roll.strangers = self._roll.strangers, {}
        return {node: printable(reason)[:_LONGEST] for node, reason in found.items()}

    def greet(
        self, expected: Mapping[str, int | None], version: str, plan: str, wait: float
    ) -> None:
        """Learn which node plays which client, until all of ``expected`` have been found.

        Each has so many training records; ``None`` where it has its own, and says how many.

        Raises ``RunError`` naming the missing clients after ``wait`` seconds, or as soon as every
        node has spoken.
        """
        if set(expected) - {*self.meet(expected, expected, version, plan, wait)}:
            raise RunError(self._roll.absent(len(self._greeted), wait))

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
        until, sleep, self._wait = time.monotonic() + wait, SLEEP[0], wait
        while not self._roll.nodes.keys() >= {*wanted}:
            if time.monotonic() > until or self._roll.hopeless:
                break
            self.look()
            time.sleep(sleep)
            sleep = min(1.5 * sleep, SLEEP[1])
        self._roll.strangers.clear()  # who stands by from the beginning is no stranger
        return [client for client in wanted if client in self._roll.nodes]

    def reachable(self, clients: Sequence[str]) -> Sequence[str]:
        """Return those of ``clients`` whose nodes are there; others are greeted when they come.

        Raises ``RunError`` where none of them is there for as long as the first greeting may take.
        """
        until, sleep = time.monotonic() + self._wait, SLEEP[0]
        while True:
            self.look()
            there = [client for client in clients if self.there(client)]
            if there or not clients:
                return there
            if time.monotonic() > until:
                few = len(clients) < len(self._roll.population)
                meant = f", of the {len(clients)} that may still be asked" if few else ""
                raise RunError(
                    f"no client was there for {self._wait:g} seconds{meant}; start the nodes"
                )
            time.sleep(sleep)
            sleep = min(1.5 * sleep, SLEEP[1])

    def glance(self) -> None:
        """Look, where the last look was some seconds ago."""
        if time.monotonic() > self._seen + _GLANCE:
            self.look()

    def look(self) -> None:
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
        if not lost and not (isinstance(found, Crash) and tries < errands.TRIES):
            return False
        log.warning("%s is greeted again: %s", name, found)
        self._later[node] = time.monotonic() + errands.PAUSE, tries
        del self._greeted[message]
        return True
