"""DP-SGD: a promise about each record (Abadi et al. 2016, arXiv 1607.00133)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fedpeft.errors import SpecError
from fedpeft.privacy import _accountant
from fedpeft.privacy._stepping import Stepping
from fedpeft.spec import bounded, method
from fedpeft.types import Privacy


@method
class Record(Privacy):
    """Whatever one record is, what anybody outside its client sees is about as likely.

    Clients add the noise themselves, so the server need not be trusted. In each local step every
    record is in the batch by a coin of its own, its gradient is clipped to the norm ``clip``,
    and Gaussian noise is added to the sum. Of ``epsilon`` (at ``delta``, for all rounds that a
    client may take part in) and ``noise_multiplier`` one is given; the other follows for each
    client from the number of its records.

    With a ``unit`` all records of a client that have the same value in that column (a patient, an
    account) are one: their mean gradient is clipped, and a coin is thrown for all of them.
    ``per_unit`` is the most of them that a step takes. ``rounds`` is how often a client may take
    part, where that is less than the rounds of the plan: it refuses more.

    ``simulate_noise`` has the plan's seed decide batches and noise: for experiments. Nothing is
    promised then.
    """

    epsilon: float | None = bounded(default=None, above=0, high=100)
    noise_multiplier: float | None = bounded(default=None, low=_accountant.LEAST_NOISE)
    delta: float = bounded(default=1e-5, above=0, below=1)
    clip: float = bounded(default=1.0, above=0)
    unit: str | None = None
    per_unit: int | None = bounded(default=None, low=1)
    rounds: int | None = bounded(default=None, low=1)
    simulate_noise: bool = False

    needs: ClassVar[Mapping[str, str]] = {
        "hides-records": "clips and noises the gradients of single records in each step; use "
        "trainer: plain",
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "counts-records": "a client's weight tells how many records it has, and no noise covers "
        "that; use weighting: uniform",
        "inverts-updates": "hides what a client's records are like, and the schedule means to find "
        "it; leave inversion out",
    }

    def check(self) -> None:
        """Raise ``SpecError`` for fields that contradict each other."""
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise SpecError("record: give epsilon or noise_multiplier, one of the two")
        if self.unit is None and self.per_unit is not None:
            raise SpecError("record: per_unit is about the records of a unit; set unit")
        if self.unit == "":
            raise SpecError("record: unit='' names no column")

    @property
    def hides(self) -> bool:
        """Always."""
        return True

    @property
    def secret(self) -> bool:
        """Whether it is meant."""
        return not self.simulate_noise

    def stepping(self, units: int, work: tuple[int, int], rounds: int) -> Stepping:
        """Return how a client steps."""
        steps, seen = work
        return Stepping(
            units=units,
            rate=min(1.0, seen / (steps * units)),
            steps=steps,
            rounds=min(self.rounds or rounds, rounds),
            clip=self.clip,
            delta=self.delta,
            noise=self.noise_multiplier,
            target=self.epsilon,
            column=self.unit,
            per_unit=self.per_unit,
        )
