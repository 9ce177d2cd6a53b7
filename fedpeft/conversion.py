"""Stale updates at the server, where the schedule works out what they would be from now.

What it finds out about a client lies in a store beside the run, under the round in which it came,
so that a run which is taken up again finds what it had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from fedpeft.errors import PlanError
from fedpeft.memory import Memory, MemoryStore, earlier
from fedpeft.plan import Plan
from fedpeft.rng import derive_seed
from fedpeft.tables import Tables
from fedpeft.tensors import is_finite, shapes_of, size
from fedpeft.types import Converting, Population, Stale, Summing, Tensors, Update

if TYPE_CHECKING:
    import torch

Aged: TypeAlias = Callable[[Update, int, Tensors, Tensors], Update]
"""See ``Schedule.aged``."""
_KEPT = 2
"""Older versions of what is kept: one for each checkpoint that a run may be taken up from."""


def found_bytes(plan: Plan, tables: Tables, clients: int) -> int:
    """Return the bytes of what the server finds out about clients and keeps on disk, at most."""
    if not isinstance(plan.schedule, Converting):
        return 0
    kept = plan.schedule.keeps(tables.up(0)["adapter"])
    return (_KEPT + 1) * 4 * clients * size(kept.values())


@dataclass
class Conversion:
    """The stale updates of ``round``; ``count`` is how many of them were converted so far."""

    plan: Plan
    device: torch.device
    store: MemoryStore
    round: int
    population: Population
    count: int = field(default=0, init=False)

    def aged(self, update: Update, staleness: int, then: Tensors, now: Tensors) -> Update:
        """Return what counts of an update, converted where that can be done."""
        schedule, client = self.plan.schedule, update.client
        if not isinstance(schedule, Converting):
            return schedule.aged(update, staleness, then, now)
        versions = earlier(self.store, client, self.round)
        kept = versions[max(versions)] if versions else {}
        delta, found = schedule.converted(self._stale(update, staleness, then, now, kept))
        if found and is_finite(found):
            newest = dict(sorted(versions.items())[-_KEPT:])
            self.store.save(client, Memory({**newest, self.round: found}))
        if delta is None or not is_finite(delta):
            return schedule.aged(update, staleness, then, now)
        if shapes_of(delta) != shapes_of(update.delta):
            raise PlanError("schedule: converts updates to other names or shapes")
        self.count += 1
        return replace(update, delta=delta)

    def _stale(
        self, update: Update, staleness: int, then: Tensors, now: Tensors, kept: Tensors
    ) -> Stale:
        plan, version = self.plan, self.round - staleness
        records, trainer = self.population[update.client], plan.trainer
        if not isinstance(trainer, Summing):
            raise PlanError("schedule: asks for a sum of gradients, and the trainer has none")
        steps, _ = trainer.budget(records)
        progress = version / plan.rounds, (version + 1) / plan.rounds
        return Stale(
            update,
            staleness,
            then,
            now,
            steps,
            trainer.effort(records, progress) / steps,
            plan.correction,
            kept,
            derive_seed(plan.seed, version, update.client, "conversion"),
            self.device,
        )
