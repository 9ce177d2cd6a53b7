"""Which tensors there are, and what happens to each in a round."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from fedpeft.errors import PlanError
from fedpeft.types.basics import Shapes, Stacked, Tensors
from fedpeft.types.models import Attached

if TYPE_CHECKING:
    import torch

    from fedpeft.models._base import Base
    from fedpeft.models._outline import Outline


@dataclass(frozen=True, slots=True)
class Roles:
    """What happens to each adapter tensor in one round.

    ``train`` changes at the client; ``down`` and ``up`` travel; ``local`` trains but stays in the
    client's memory; ``fresh`` begins anew in every round, see :class:`Restarting`; ``once`` never
    changes, and comes down until a client is known to have it. A tensor in none of them is frozen
    and derived from the plan on every side.
    """

    train: frozenset[str]
    down: frozenset[str]
    up: frozenset[str]
    local: frozenset[str] = frozenset()
    fresh: frozenset[str] = frozenset()
    once: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Raise ``PlanError`` for roles that contradict each other."""
        if both := sorted(self.local & (self.up | self.down)):
            raise PlanError(f"adapter: {both[0]} cannot both travel and stay local")
        if idle := sorted((self.up | self.local) - self.train):
            raise PlanError(f"adapter: {idle[0]} does not train, so it has nothing to send or keep")
        if lost := sorted(self.up - self.down - self.fresh):
            raise PlanError(f"adapter: {lost[0]} goes up but never down")
        if moved := sorted(self.once & (self.train | self.down | self.fresh)):
            raise PlanError(f"adapter: {moved[0]} is sent once, so it must never change")
        if sent := sorted(self.fresh & (self.down | self.local)):
            raise PlanError(f"adapter: {sent[0]} begins anew, so nobody needs its last values")


@runtime_checkable
class Adapter(Protocol):
    """``adapters/``: which tensors there are; which train, travel and stay in each round.

    ``max_group`` is how many clients may share a pass: ``None`` where only memory limits them.
    """

    max_group: ClassVar[int | None] = 1

    def shapes(self, outline: Outline) -> Shapes:
        """Return the adapter tensors for a model of this outline, without loading it."""
        ...

    def roles(self, shapes: Shapes, round: int) -> Roles:
        """Say what happens to each tensor in ``round``."""
        ...

    def initial(self, base: Base, shapes: Shapes, seed: int) -> Tensors:
        """Return the float32 tensors before round 0."""
        ...

    def attach(self, base: Base) -> Attached:
        """Tie the adapter to a loaded model."""
        ...

    def precondition(self, fixed: Stacked) -> Stacked:
        """Return matrices [K, d, d] that gradients [K, ..., d] may be multiplied by from the right.

        They go by the name of what trains, and follow from what does not, ``fixed`` [K, ...].
        """
        ...

    def after_fit(self, trained: Tensors, received: Tensors, round: int) -> Tensors:
        """Return what a client takes for trained, once it has; the update is the way there.

        ``received`` is the whole adapter as the client started with it.
        """
        ...

    def export(self, base: Base, tensors: Tensors, folder: Path) -> None:
        """Write the folder that other tools load."""
        ...

    def restore(self, folder: Path, shapes: Shapes) -> Tensors:
        """Read such a folder. Raises ``ModelError`` where it does not fit."""
        ...


@runtime_checkable
class Narrowing(Protocol):
    """What an adapter has besides whose clients may have less than all of it (mixed ranks)."""

    def narrow(self, shapes: Shapes, client: str, seed: int, round: int | None) -> Shapes:
        """Return what ``client`` has: of each tensor the first entries along every axis.

        The same object where it has everything. It may have less while it trains in a ``round``
        than when it uses the adapter (``None``). ``seed`` is the plan's.
        """
        ...

    def check_clients(self, names: Collection[str]) -> None:
        """Raise ``PlanError`` where the clients of a federation are not those it speaks of."""
        ...


@runtime_checkable
class Ranked(Protocol):
    """What an adapter has besides that moves weights by matrices of low rank, or none at all."""

    @property
    def highest_rank(self) -> int:
        """The highest rank that any client trains; 0 where only heads train."""
        ...


@runtime_checkable
class Restarting(Protocol):
    """What an adapter has besides whose clients forget some tensors after each round."""

    def begin(self, shapes: Shapes, round: int, client: str, seed: int) -> Tensors:
        """Return what ``client`` begins ``round`` with, of its ``shapes``: on every side the same.

        Nothing where no tensor is fresh (``Roles.fresh``). ``seed`` is the plan's.
        """
        ...


@runtime_checkable
class Informed(Protocol):
    """What an adapter has besides whose start follows from gradients on public records.

    Only the server has the records; what follows from them is sent (``Roles.once``).
    """

    def informant(self) -> tuple[str, int] | None:
        """Return a data line and how many of its training records; ``None`` where none is asked."""
        ...

    def informed(self, initial: Tensors, gradients: Tensors) -> Tensors:
        """Return the tensors before round 0, beside those of :meth:`Adapter.initial`.

        ``gradients`` [out, in], float64, are those of the mean loss in the weights of the modules.
        """
        ...


@runtime_checkable
class Probing(Protocol):
    """What an adapter has besides that leaves the base as it is, up to its last layer.

    What goes in there, a record's features, is computed once. Its :class:`Attached` takes inputs of
    ``features`` [K * b, d] in place of records.
    """

    def features(self, base: Base, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the features of records [b, d], float32. Raises ``ModelError``."""
        ...
