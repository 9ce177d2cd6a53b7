"""What is promised to whom."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from fedpeft.types.sampling import Sampling

if TYPE_CHECKING:
    from fedpeft.privacy._mechanism import Mechanism
    from fedpeft.privacy._stepping import Stepping


@runtime_checkable
class Privacy(Protocol):
    """``privacy/``: what is promised to whom, and what keeps the promise.

    Every method has a default that promises nothing. ``secret`` says that nothing which follows
    from single clients leaves the server but through the mechanism, and that its coins come from
    the operating system; else ``seed`` decides them.
    """

    @property
    def bound(self) -> float:
        """The norm that updates are clipped to in the first round; infinite where they are not."""
        return math.inf

    @property
    def secret(self) -> bool:
        """Whether coins are drawn from the operating system and the ledger tells of no client."""
        return False

    def mechanism(self, sampling: Sampling, rounds: int) -> Mechanism | None:
        """Return how the server releases the sum of a round; ``None`` where it is as it is.

        Raises ``PlanError`` where no noise keeps the promise with this ``sampling``.
        """
        return None

    @property
    def hides(self) -> bool:
        """Whether clients hide single records, or units of them, from everybody else."""
        return False

    @property
    def unit(self) -> str | None:
        """The column whose value says which records are one unit; ``None``: each by itself."""
        return None

    def stepping(self, units: int, work: tuple[int, int], rounds: int) -> Stepping | None:
        """Return how a client of so many ``units`` hides them; ``None`` where it does not.

        ``work`` are the steps of a round and the units seen in it (``Trainer.budget``), ``rounds``
        those of the plan. Its noise may still have to be worked out.
        """
        return None


@runtime_checkable
class Rationed(Protocol):
    """What a promise has besides that may hold for few participations of a client alone."""

    @property
    def participations(self) -> int | None:
        """How often a client may be asked in a run; ``None`` where the promise needs no limit."""
        ...
