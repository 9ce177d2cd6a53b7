"""FedBuff: Asynchronous Aggregation in a Buffer (Nguyen et al. 2022, arXiv 2106.06639)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from fedpeft.errors import PlanError
from fedpeft.schedules._staleness import LAWS, Law, compensated
from fedpeft.spec import bounded, method
from fedpeft.types import Flight, Rng, Schedule, Standing, Tensors, Update

_STALE = "uses updates that began from older versions of the model"


@method
class Buffered(Schedule):
    """``concurrency`` clients are at work at any time; the server steps after ``size`` replies.

    Each trains the version it was sent. When a reply comes, whoever is free is as likely as any
    other to be asked next; nobody is asked anew before the step that uses its reply. An update that
    is t versions old counts ``s(t)`` times its weight: 1 (``law="constant"``), ``(1 + t) ^
    -exponent`` (``polynomial``), ``2 ^ (-t / half_life)`` (``exponential``; FedAsync, arXiv
    1903.03934, has others). The denominator is that of ``size`` average clients, so it is known
    before, and staleness makes steps smaller, as in the paper; FLSim's code makes them sqrt(2)
    times as large. After ``max_staleness`` versions, or ``deadline`` seconds, nobody waits for a
    reply any longer. Where all who could be asked have replied, the server steps with fewer.

    ``compensation`` is the lambda of delay-compensated SGD (arXiv 1609.08326): an update becomes
    ``d - lambda / lr_sum * d^2 * (x_now - x_then)``, tensor by tensor, in factors as they are. It
    starts from what the client decoded, so the server keeps the versions that are at work.
    """

    size: int = bounded(default=10, low=1)
    concurrency: int = bounded(default=20, low=1)
    max_staleness: int | None = bounded(default=20, low=0)
    law: Law = "polynomial"
    exponent: float = bounded(default=0.5, low=0)
    half_life: float = bounded(default=20.0, above=0)
    compensation: float = bounded(default=0.0, low=0)
    deadline: float | None = bounded(default=None, above=0)

    overlaps: ClassVar[bool] = True

    @property
    def offers(self) -> Mapping[str, str]:
        """What compensation makes of updates, and what there is without."""
        if self.compensation:
            return {"reads-single-updates": "compensation squares each client's update"}
        return {"counts-turns": "asks by chance alone, and an update counts at most its weight"}

    @property
    def hurried(self) -> bool:
        """With a deadline."""
        return self.deadline is not None

    @property
    def needs(self) -> Mapping[str, str]:
        """Who must not mind updates from older versions."""
        found = {
            "takes-stale": f"{_STALE}, and this aggregator reads them as of the newest; use "
            "aggregator: mean",
            "stateless": f"{_STALE}, and this correction's state is of the newest; use "
            "correction: none or fedprox",
        }
        if self.compensation:
            found["plain-sgd"] = (
                "compensation takes an update for a gradient, which only SGD without momentum, "
                "weight decay and clipping allows: say trainer: plain(optimizer='sgd', lr=...)"
            )
        return found

    @property
    def refuses(self) -> Mapping[str, str]:
        """What changes from version to version, or says itself whom to ask."""
        return {
            "draws-cohorts": "asks whoever is free, so that concurrency clients are at work; use "
            "cohort: everyone",
            "by-turns": f"{_STALE}, in which another factor trained; use lora(train='A,B') or 'B'",
            "resting-ranks": f"{_STALE}, in which other ranks trained; set ranks to fixed ones",
            "fresh": f"{_STALE}, whose factors have begun anew since; set fresh='none'",
            "differences": "a client would be sent what has changed since a version that it is "
            "still at work with; use downlink: half",
            "learns-participation": "has no rounds that a client takes part in or not; use "
            "weighting: uniform",
            "known-rates": "has no rounds that a client takes part in or not; use "
            "weighting: uniform",
            "mean-over-all": "divides by the size of its buffer, and these weights by all clients; "
            "use weighting: uniform",
        }

    def expected(self, cohort: float) -> float:
        """Return ``size``."""
        return float(self.size)

    def ask(
        self,
        stands: Standing,
        free: Sequence[str],
        cohort: Callable[[Sequence[str]], Sequence[str]],
        rng: Rng,
    ) -> tuple[Sequence[str], int]:
        """Ask as many as there is room for."""
        room = min(self.concurrency - len(stands.flying), len(free))
        if room <= 0:
            return [], self.size
        return [free[i] for i in sorted(rng.choice(len(free), room, replace=False))], self.size

    def weighed(self, stands: Standing, population: Sequence[str]) -> Sequence[str]:
        """Return everybody. Raises ``PlanError`` where ``size`` is more."""
        if self.size > len(population):
            raise PlanError(
                f"schedule: buffered(size={self.size}) waits for the replies of more clients than "
                f"the {len(population)} there are; lower size"
            )
        return population

    def until(self, stands: Standing) -> float:
        """Return the first client's deadline."""
        if self.deadline is None:
            return math.inf
        return min((f.since + self.deadline for f in stands.flying), default=math.inf)

    def late(self, stands: Standing, flight: Flight) -> str:
        """Tell whose deadline has passed."""
        if self.deadline is None or stands.now < flight.since + self.deadline:
            return ""
        return f"no reply within {self.deadline:g} seconds"

    def given_up(self, stands: Standing, flight: Flight) -> str:
        """Tell whose update would be too old in the next round."""
        staleness = stands.version + 1 - flight.version
        if self.max_staleness is None or staleness <= self.max_staleness:
            return ""
        most = f"more than max_staleness={self.max_staleness}"
        return f"its update would be {staleness} versions old, {most}"

    def aged(self, update: Update, staleness: int, then: Tensors, now: Tensors) -> Update:
        """Return the update with its factor, compensated for the delay."""
        weight = update.weight * LAWS[self.law](staleness, self.exponent, self.half_life)
        if not self.compensation:
            return replace(update, weight=weight)
        delta = compensated(update.delta, self.compensation / update.lr_sum, then, now)
        return replace(update, weight=weight, delta=delta)
