"""Last updates of all clients, for weightings that count those who are away as well.

They are kept at the learning rate that the run began with, and count at the present one: where the
rate falls, those who are away do not go on pushing with the rate they left with. They lie in a
store beside the run, each under the round in which it came, so that a run which is taken up again
finds what it had; of each client the newest, and the one before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedpeft.memory import Memory, MemoryStore, earlier
from fedpeft.types import Tensors, Update, Weights


@dataclass(frozen=True, slots=True)
class LastUpdates:
    """Whose last updates there are, and their sum, float64."""

    clients: tuple[str, ...] = ()
    total: Tensors = field(default_factory=dict)


class Recall:
    """A round at the server, seen from the last updates of those who are in the population.

    A client that has left is forgotten: one that comes back begins as if it were new. ``pace`` is
    this round's learning rate as a share of the run's highest.
    """

    def __init__(
        self,
        held: LastUpdates,
        store: MemoryStore,
        round: int,
        population: Collection[str],
        pace: float = 1.0,
    ) -> None:
        self._store, self._round, self._count = store, round, len(population)
        self._pace = pace
        self._clients = dict.fromkeys(held.clients)
        self._total = dict(held.total)
        for client in [client for client in held.clients if client not in population]:
            self._add(self._last(client), -1.0)
            del self._clients[client]

    def changes(
        self, updates: Iterable[Update], moving: Tensors, weights: Weights
    ) -> Iterator[Update]:
        """Yield the mean of the last updates, as one that counts whole, then what is new in each.

        All are of what is ``moving`` in this round. Keeps each as its client's last one.
        """
        if self._clients:
            known = {k: self._total.get(k, np.zeros(v.shape)) for k, v in moving.items()}
            mean = {k: value / self._count * self._pace for k, value in known.items()}
            yield Update("", mean, weights.denominator, 0.0)
        for update in updates:
            last = self._last(update.client)
            came = {k: v.astype(np.float64) for k, v in update.delta.items()}
            kept = {k: (v / self._pace).astype(np.float32) for k, v in came.items()}
            delta = {k: v - self._pace * _wide(last, k) for k, v in came.items()}
            self._add({k: v.astype(np.float64) - _wide(last, k) for k, v in kept.items()}, 1.0)
            self._keep(update.client, {**last, **kept})
            yield Update(update.client, delta, update.weight, update.lr_sum, sent=update.sent)

    @property
    def held(self) -> LastUpdates:
        """What there is now."""
        return LastUpdates(tuple(self._clients), self._total)

    def _last(self, client: str) -> Tensors:
        versions = earlier(self._store, client, self._round)
        return versions[max(versions)] if client in self._clients else {}

    def _keep(self, client: str, tensors: Tensors) -> None:
        before = sorted(earlier(self._store, client, self._round).items())[-1:]
        self._store.save(client, Memory({**dict(before), self._round: tensors}))
        self._clients[client] = None

    def _add(self, delta: Tensors, times: float) -> None:
        for name, value in delta.items():
            part = times * value.astype(np.float64)
            self._total[name] = self._total[name] + part if name in self._total else part


def _wide(tensors: Tensors, name: str) -> Any:
    """Return a tensor in float64, 0 where there is none."""
    return tensors[name].astype(np.float64) if name in tensors else 0.0
