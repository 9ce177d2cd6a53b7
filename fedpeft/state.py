"""What the server remembers between rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedpeft.folds import Fold
from fedpeft.last_updates import LastUpdates
from fedpeft.learned import Learned
from fedpeft.mirror import Mirror
from fedpeft.plan import Plan
from fedpeft.releases import Coins, drawn
from fedpeft.tables import Tables
from fedpeft.types import Tensors


@dataclass(frozen=True, slots=True)
class ServerState:
    """All the server remembers between rounds; ``round`` is the next one.

    ``past`` are the tensors of those earlier versions with which some client is still at work.
    """

    params: Tensors
    slots: Tensors
    control: Tensors
    acks: Mapping[str, int] = field(default_factory=dict)
    round: int = 0
    fold: Fold = field(default_factory=Fold)
    kept: Tensors = field(default_factory=dict)
    once: Tensors = field(default_factory=dict)
    mirror: Mirror = field(default_factory=Mirror)
    learned: Learned = field(default_factory=Learned)
    last: LastUpdates = field(default_factory=LastUpdates)
    past: Mapping[int, Tensors] = field(default_factory=dict)
    coins: Coins = field(default_factory=Coins)

    def at(self, version: int) -> ServerState:
        """Return what clients were sent whose replies to ``version`` the server waits for."""
        return (
            self
            if version == self.round
            else replace(self, params=self.past[version], round=version)
        )

    @property
    def tensors(self) -> Tensors:
        """The shared adapter and the edits of the base."""
        return {**self.params, **self.once, **self.fold.tensors}


def start(plan: Plan, tables: Tables, initial: Tensors) -> ServerState:
    """Return the state before round 0."""
    params = {k: initial[k] for k in tables.down(0)["adapter"]}
    slots, control = plan.optimizer.init(params), plan.correction.server_init(params)
    fold = Fold.empty(tables.shapes) if tables.folds else Fold()
    once = {name: initial[name] for name in tables.once}
    mirror = Mirror(params) if tables.differs else Mirror()
    coins = drawn(plan, 0, plan.privacy.bound)
    return ServerState(params, slots, control, fold=fold, once=once, mirror=mirror, coins=coins)
