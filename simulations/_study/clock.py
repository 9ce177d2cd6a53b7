"""The server's CPU seconds apart from the clients'."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fedpeft.engine._base import Engine, Stage
from fedpeft.plan import Plan
from fedpeft.types import Simulation
from fedpeft.watching import Line, Quiet
from simulations._study.around import Around, Replies, Requests


class Clock(Quiet):
    """An engine that separates the clients' CPU seconds from the server's, round by round.

    The server's are what is left of a round: packing what goes down, checking and decoding what
    comes up, aggregating. The last round also evaluates, and does not count.
    """

    def __init__(self, inner: Simulation) -> None:
        self.inner, self.clients = inner, 0.0
        self._at, self._server = 0.0, list[float]()

    def made_with(self) -> Mapping[str, int | str]:
        """Return what the engine within does."""
        return self.inner.made_with()

    def check_device(self, device: str) -> None:
        """Ask the engine within."""
        self.inner.check_device(device)

    @contextmanager
    def start(self, stage: Stage) -> Iterator[Engine]:
        """Start the engine within."""
        with self.inner.start(stage) as engine:
            yield Around(engine, self._exchange)

    def begin(self, plan: Plan, round: int) -> None:
        """Start to count."""
        self._at, self.clients = time.process_time(), 0.0

    def round(self, line: Line) -> None:
        """Note what the round took beside its clients."""
        now = time.process_time()
        self._server.append(now - self._at - self.clients)
        self._at, self.clients = now, 0.0

    def per_round(self) -> float | None:
        """Return the median of the server's CPU seconds; ``None`` with one round."""
        return round(statistics.median(self._server[:-1]), 4) if self._server[:-1] else None

    def _exchange(self, engine: Engine, requests: Requests) -> Replies:
        """Have all clients play their round before the server sees any reply."""
        packed, begun = list(requests), time.process_time()
        answers = list(engine.exchange(packed))
        self.clients += time.process_time() - begun
        yield from answers
