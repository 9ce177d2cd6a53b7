"""Promises about clients and about records at once: ``user(...) | record(...)``."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedpeft.errors import SpecError
from fedpeft.privacy._mechanism import Mechanism
from fedpeft.privacy._stepping import Stepping
from fedpeft.spec import method
from fedpeft.types import Privacy, Rationed, Sampling


@method
class Chain(Privacy):
    """Clients hide their records, and the server noises the sum of what they send.

    Each promise holds by itself, with its own epsilon, unit and adversary.
    """

    stages: tuple[Privacy, ...]

    def check(self) -> None:
        """Raise ``SpecError`` for anything but one promise of each level."""
        if len(self.stages) != 2 or not all(isinstance(s, Privacy) for s in self.stages):
            raise SpecError("chain: write user(...) | record(...)")
        if [s.bound < math.inf for s in self.stages] != [True, False] or [
            s.hides for s in self.stages
        ] != [False, True]:
            raise SpecError("chain: one promise about clients and one about records, in this order")
        if self.stages[0].secret != self.stages[1].secret:
            raise SpecError("chain: say simulate_noise in both promises, or in none")

    @property
    def needs(self) -> Mapping[str, str]:
        """What either needs."""
        return {k: v for s in self.stages for k, v in dict(getattr(s, "needs", {})).items()}

    @property
    def refuses(self) -> Mapping[str, str]:
        """What either refuses."""
        return {k: v for s in self.stages for k, v in dict(getattr(s, "refuses", {})).items()}

    @property
    def bound(self) -> float:
        """The first promise's."""
        return self.stages[0].bound

    @property
    def secret(self) -> bool:
        """Whether they are meant."""
        return self.stages[0].secret

    @property
    def hides(self) -> bool:
        """Always."""
        return True

    @property
    def participations(self) -> int | None:
        """The first promise's."""
        first = self.stages[0]
        return first.participations if isinstance(first, Rationed) else None

    @property
    def unit(self) -> str | None:
        """The second promise's."""
        return self.stages[1].unit

    def mechanism(self, sampling: Sampling, rounds: int) -> Mechanism | None:
        """Return the first promise's."""
        return self.stages[0].mechanism(sampling, rounds)

    def stepping(self, units: int, work: tuple[int, int], rounds: int) -> Stepping | None:
        """Return the second promise's, for the rounds that the first lets a client take part in."""
        return self.stages[1].stepping(units, work, min(rounds, self.participations or rounds))
