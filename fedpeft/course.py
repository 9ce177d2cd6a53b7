"""One round between a schedule and its clients: asks, waits and hands on the replies to be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from fedpeft import events
from fedpeft.errors import RunError
from fedpeft.phases import Reply
from fedpeft.post import Came, Post
from fedpeft.types import Flight, Rng, Schedule, Standing

Tell = Callable[[int, int], None]
"""Is told how many of how many replies have come."""


@dataclass
class Course:
    """A round under way.

    ``choose`` says who of those within reach is the cohort; ``draw`` returns what decides by chance
    whom the schedule asks once so many were asked. ``send`` carries requests to ``post``,
    which says when replies come. ``versions`` says with which version of the model those clients
    began whose replies are used; ``came`` is all that was waited for, ``None`` where time passed.
    """

    schedule: Schedule
    choose: Callable[[Sequence[str]], Sequence[str]]
    post: Post
    send: Callable[[Sequence[Flight]], None]
    reachable: Sequence[str]
    draw: Callable[[int], Rng]
    stands: Standing
    versions: dict[str, int] = field(default_factory=dict)
    came: list[Came | None] = field(default_factory=list)

    def ask(self) -> None:
        """Ask whom the schedule wants asked now."""
        more = self.draw(len(self.stands.asked))
        self.stands, new = events.ask(self.schedule, self.stands, self.reachable, self.choose, more)
        if new:
            self.send(new)

    def replies(self, order: Sequence[str], tell: Tell) -> Iterator[Reply]:
        """Yield the replies to be used, and why others are not, in the ``order`` of clients."""
        answers = chain(self.post.replies(self._enough()), self._lost())
        expected = max(len(self.stands.asked), self.stands.awaited)
        return in_order(answers, order, lambda done: tell(min(done, expected), expected))

    def told(self, population: Iterable[str]) -> Mapping[str, Any]:
        """Return what of this round does not follow from the plan: who was away, what came when."""
        there = frozenset(self.reachable)
        return {
            "round": self.stands.version,
            "began": self.stands.began,
            "away": [client for client in population if client not in there],
            "came": [
                c and [c.client, c.version, c.now, *([c.problem] if c.problem else [])]
                for c in self.came
            ],
        }

    def _taken(self) -> Iterator[Flight]:
        """Yield whose replies are used, as they come."""
        while not events.is_full(self.stands):
            self.ask()
            if not self.stands.flying:
                return
            until = self.schedule.until(self.stands)
            came = self.post.wait(until)
            self.came.append(came)
            if came is None:
                self.stands = events.wait(self.schedule, self.stands, until)
                continue
            of = came.client, came.version
            self.stands, used = events.arrive(self.stands, *of, came.now, came.problem)
            if used:
                self.versions[used.client] = used.version
                yield used

    def _enough(self) -> Iterator[Flight]:
        """Yield whose replies are used; nobody where they are too few."""
        taken, first = self._taken(), list[Flight]()
        while len(first) < self.schedule.least and (flight := next(taken, None)):
            first.append(flight)
        if len(first) < self.schedule.least:
            self.stands = events.void(self.stands, self.schedule.least)
            return
        yield from first
        yield from taken

    def _lost(self) -> Iterator[Reply]:
        """End the round; yield why the replies of other clients are not used."""
        self.stands = events.finish(self.schedule, self.stands)
        for flight, reason in self.stands.lost:
            self.post.drop(flight)
            self.versions.pop(flight.client, None)
            yield flight.client, RunError(reason)


def in_order(
    answers: Iterable[Reply], order: Sequence[str], tell: Callable[[int], None]
) -> Iterator[Reply]:
    """Yield answers in the order of clients; those that come early wait, encoded."""
    waiting: dict[str, Reply] = {}
    left = iter(order)
    expected = next(left, None)
    for done, (client, answer) in enumerate(answers, 1):
        tell(done)
        waiting[client] = client, answer
        while expected in waiting:
            yield waiting.pop(expected)
            expected = next(left, None)
    for client in [expected, *left] if expected is not None else []:
        if client in waiting:
            yield waiting.pop(client)
