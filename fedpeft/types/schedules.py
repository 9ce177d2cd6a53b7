"""When the server asks and whose replies it uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from fedpeft.types.aggregation import Update
from fedpeft.types.basics import Rng, Shapes, Tensors
from fedpeft.types.corrections import Correction

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Flight:
    """A request under way: whom the server asked, with which version of the model, and when.

    ``since`` counts seconds from the run's begin, as all times of a schedule do.
    """

    client: str
    version: int
    since: float


@dataclass(frozen=True, slots=True)
class Standing:
    """How a round stands: all that a schedule may look at.

    ``version`` is the model's; the round ``began`` with it. ``flying`` are those the server waits
    for, ``taken`` those whose replies the round uses, ``lost`` whose it does not and why. Once it
    is ``opened`` it has ``asked`` these, and ``awaited`` is how many replies it is to use.
    """

    version: int
    began: float
    now: float
    flying: tuple[Flight, ...] = ()
    taken: tuple[Flight, ...] = ()
    lost: tuple[tuple[Flight, str], ...] = ()
    asked: tuple[str, ...] = ()
    awaited: int = 0
    opened: bool = False


@dataclass(frozen=True, slots=True)
class Stale:
    """An update that began ``staleness`` versions ago, and what is known of how it was made.

    ``then`` is what its client was sent of what moves, ``now`` what others are sent. The client
    took ``steps`` steps of plain SGD at the rate ``lr``, on average, with the ``correction``.
    ``kept`` is what was kept of this client the last time; ``seed`` belongs to this update alone,
    and ``device`` is where the server computes.
    """

    update: Update
    staleness: int
    then: Tensors
    now: Tensors
    steps: int
    lr: float
    correction: Correction
    kept: Tensors
    seed: int
    device: torch.device


@runtime_checkable
class Schedule(Protocol):
    """``schedules/``: when the server asks, whose replies it uses and when it steps.

    The event machine (``events.py``) calls it; nothing here takes time or remembers. A method that
    does nothing else is synchronous: a round ends with its last reply. Of one that ``overlaps``
    rounds the next may wait for replies to requests of this one.
    """

    overlaps: ClassVar[bool] = False

    @property
    def hurried(self) -> bool:
        """Whether what is used depends on how long replies take."""
        return False

    @property
    def least(self) -> int:
        """Fewer replies than this are not used."""
        return 1

    def ask(
        self,
        stands: Standing,
        free: Sequence[str],
        cohort: Callable[[Sequence[str]], Sequence[str]],
        rng: Rng,
    ) -> tuple[Sequence[str], int]:
        """Return whom to ask now, in the order of ``free``, and how many replies are awaited.

        ``free`` can be reached and are not at work on something that the server waits for;
        ``cohort`` is the plan's choice among them.
        """
        ...

    def weighed(self, stands: Standing, population: Sequence[str]) -> Sequence[str]:
        """Return, once the first are asked, all who may be among those whose replies are used."""
        return stands.asked

    def expected(self, cohort: float) -> float:
        """Return how many replies a round has on average, given the expected size of a cohort."""
        return cohort

    def asks(self, cohort: float) -> float:
        """Return how many clients a round asks on average, given the expected size of a cohort."""
        return self.expected(cohort)

    def until(self, stands: Standing) -> float:
        """Return when to look who is :meth:`late`."""
        return math.inf

    def late(self, stands: Standing, flight: Flight) -> str:
        """Return why a reply that has not come is waited for no longer; nothing where it is."""
        return ""

    def given_up(self, stands: Standing, flight: Flight) -> str:
        """Return why, once a round is over, nobody waits; nothing where the next one waits on."""
        return "no reply"

    def aged(self, update: Update, staleness: int, then: Tensors, now: Tensors) -> Update:
        """Return what counts of an update that began ``staleness`` versions ago.

        ``then`` is what its client was sent of what moves, ``now`` what others are sent.
        """
        return update


@runtime_checkable
class Converting(Protocol):
    """What a schedule has besides that works out what a stale update would be from now.

    It trains at the server, which keeps for it what it has found out about each client.
    """

    def converted(self, stale: Stale) -> tuple[Tensors | None, Tensors]:
        """Return the ``delta`` from now, and what to keep of the client, float32.

        Without one the update is :meth:`Schedule.aged`; with one it counts as if it were fresh.
        Where there is nothing to keep, what was kept stays.
        """
        ...

    def keeps(self, shapes: Shapes) -> Shapes:
        """Return what is kept of a client, where updates have these ``shapes``; all float32."""
        ...
