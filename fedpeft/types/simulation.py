"""What only a simulation has: its crowd, their coming and going, its clock, its engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedpeft.types.basics import Rng

if TYPE_CHECKING:
    from fedpeft.engine._base import Engine, Stage

Presence: TypeAlias = Callable[[int], NDArray[np.bool_]]
"""Of each round, who can be reached [N]; a pure function of it."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """The clients of a simulation, as far as their coming and going may depend on them.

    ``names`` are sorted. ``mix`` [N, C] has the share of each label among a client's training
    records; [N, 0] where the task has none. ``seed`` is the plan's.
    """

    names: Sequence[str]
    mix: NDArray[np.float64]
    seed: int


@runtime_checkable
class Availability(Protocol):
    """``availability/``: who can be reached in each round of a simulation.

    Everything follows from the crowd and the round, so a run that is resumed, and every engine,
    meets the same clients.
    """

    @property
    def dropout(self) -> float:
        """How likely a client that is asked drops out before its reply."""
        ...

    def true_rates(self, crowd: Crowd) -> NDArray[np.float64]:
        """Return the share of rounds in which each client can be reached, in the long run [N].

        Raises ``DataError`` or ``PlanError`` where a file does not fit the crowd.
        """
        ...

    def presence(self, crowd: Crowd) -> Presence:
        """Return who can be reached in a round; quick where rounds are asked about in order."""
        ...

    def fingerprint(self) -> str:
        """Return a digest of the files that it reads; nothing where there are none."""
        ...


@runtime_checkable
class Latency(Protocol):
    """``latency/``: how long the clients of a simulation take, in seconds of its clock.

    One that is not ``timed`` takes none, and the clock says nothing.
    """

    timed: ClassVar[bool] = False

    def speeds(self, crowd: Crowd) -> NDArray[np.float64]:
        """Return what stays the same of each client in the whole run [N]."""
        return np.ones(len(crowd.names))

    def seconds(self, speed: float, rng: Rng) -> float:
        """Return how long a client of this ``speed`` takes from a request to its reply."""
        return 0.0


@runtime_checkable
class Simulation(Protocol):
    """``engine/``: where the clients of a simulation run. Part of no plan: it changes no result."""

    def made_with(self) -> Mapping[str, int | str]:
        """Return what decides the last bits of a run beside its plan, such as threads."""
        ...

    def check_device(self, device: str) -> None:
        """Raise ``PlanError`` for a device that its clients would not train on."""
        ...

    def start(self, stage: Stage) -> AbstractContextManager[Engine]:
        """Return the running engine; leaving its context stops what it has started."""
        ...
