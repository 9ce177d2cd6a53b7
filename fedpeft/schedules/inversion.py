"""Unlimited staleness by gradient inversion (Wang, Gao 2023, arXiv 2309.13536)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from fedpeft.errors import SpecError
from fedpeft.spec import bounded, method, wrapped
from fedpeft.tensors import prefixed, select, zeros_like
from fedpeft.types import (
    Converting,
    Flight,
    Rng,
    Schedule,
    Shapes,
    Stale,
    Standing,
    Tensors,
    Update,
)


@method
class Inversion(Schedule):
    """``schedule``, with stale updates worked out anew from the present model.

    The server looks for ``dummies``: features and soft labels on which the client's local training,
    simulated step by step from the version that it was sent, moves as its update says. What they
    make of the present model counts in the update's place, as if it were fresh. Steps of the
    simulation take all dummies, where the client's take a batch. Updates of up to ``beyond``
    versions ago are left to ``schedule``.

    They are found by ``iterations`` of Adam, ``rate`` falling to a thousandth, from normal draws
    or, later, from the client's last ones, if they were right. ``scale`` is about what a feature's
    standard deviation is. The L1 distance counts a share ``density`` of the update's entries, the
    largest. When a client's next stale update comes, the server sees what its last dummies make of
    the same version: if that is further away than the last update as it was, this one is not
    converted, but treated as ``schedule`` does; and so is one which the dummies found explain no
    better than nothing would. (The paper's switch, for all clients and for good, could not be
    read.)

    It is for small models; and it means to find what is like a client's data.
    """

    schedule: Schedule = wrapped()
    beyond: int = bounded(default=0, low=0)
    dummies: int = bounded(default=16, low=1)
    iterations: int = bounded(default=300, low=1)
    rate: float = bounded(default=0.05, above=0)
    scale: float = bounded(default=1.0, above=0)
    density: float = bounded(default=1.0, above=0, high=1)

    overlaps: ClassVar[bool] = True

    def check(self) -> None:
        """Raise ``SpecError`` for a schedule without stale updates of its own."""
        if not self.schedule.overlaps or isinstance(self.schedule, Converting):
            raise SpecError(
                "inversion: is about updates from older versions, as buffered uses them; say "
                "inversion(buffered(size=10))"
            )

    @property
    def offers(self) -> Mapping[str, str]:
        """That it looks into single updates."""
        reads = "looks for records that explain a single client's update"
        inverts = "means to find what is like a client's records"
        found = {"reads-single-updates": reads, "inverts-updates": inverts}
        return {**getattr(self.schedule, "offers", {}), **found}

    @property
    def needs(self) -> Mapping[str, str]:
        """Local training that can be simulated."""
        return {
            **getattr(self.schedule, "needs", {}),
            "plain-sgd": "simulates local steps, which only SGD without momentum, weight decay and "
            "clipping allows: say trainer: plain(optimizer='sgd', lr=...)",
            "features": "looks for made-up inputs of the one layer that trains; through a whole "
            "model that takes too long: say adapter: head, or leave inversion out",
            "cross-entropy": "knows what local steps make of soft labels for the cross entropy "
            "alone: say task: classify, or leave inversion out",
        }

    @property
    def refuses(self) -> Mapping[str, str]:
        """What an update is not that of local steps alone."""
        return {
            **getattr(self.schedule, "refuses", {}),
            "remembering-code": "would take what earlier updates lost for local training; use the "
            "codec without feedback",
        }

    def converted(self, stale: Stale) -> tuple[Tensors | None, Tensors]:
        """Return what the dummies make of the present model, unless they were wrong before."""
        from fedpeft.schedules import _unrolled
        from fedpeft.schedules._unrolled import Dummies

        if stale.staleness <= self.beyond:
            return None, {}
        delta, worse = stale.update.delta, False
        drawn = Dummies.drawn(stale, self.dummies, self.scale)
        if before := select(stale.kept, "dummies"):
            known, last = Dummies.read(stale, before), select(stale.kept, "update")
            worse = _apart(_unrolled.made(stale, stale.then, known), delta) > _apart(last, delta)
            drawn = drawn if worse else known
        how = self.iterations, self.rate, self.density, self.scale
        found = _unrolled.fitted(stale, drawn, *how)
        kept = {**prefixed("dummies", found.told()), **prefixed("update", delta)}
        again = _unrolled.made(stale, stale.then, found)
        if worse or not _apart(again, delta) < _apart(zeros_like(delta), delta):
            return None, kept
        return _unrolled.made(stale, stale.now, found), kept

    def keeps(self, shapes: Shapes) -> Shapes:
        """Return the shapes of the dummies and of the last update."""
        classes, width = next(shape for shape in shapes.values() if len(shape) == 2)
        found = {"features": (self.dummies, width), "labels": (self.dummies, classes)}
        return {
            f"{part}/{k}": s
            for part, own in (("dummies", found), ("update", shapes))
            for k, s in own.items()
        }

    def aged(self, update: Update, staleness: int, then: Tensors, now: Tensors) -> Update:
        """Return what counts of an update that is not converted."""
        return self.schedule.aged(update, staleness, then, now)

    @property
    def hurried(self) -> bool:
        """That of the schedule, as all below."""
        return self.schedule.hurried

    @property
    def least(self) -> int:
        """Return how few replies are not used."""
        return self.schedule.least

    def ask(
        self,
        stands: Standing,
        free: Sequence[str],
        cohort: Callable[[Sequence[str]], Sequence[str]],
        rng: Rng,
    ) -> tuple[Sequence[str], int]:
        """Return whom to ask now."""
        return self.schedule.ask(stands, free, cohort, rng)

    def weighed(self, stands: Standing, population: Sequence[str]) -> Sequence[str]:
        """Return who may be among those whose replies are used."""
        return self.schedule.weighed(stands, population)

    def expected(self, cohort: float) -> float:
        """Return how many replies a round has."""
        return self.schedule.expected(cohort)

    def asks(self, cohort: float) -> float:
        """Return how many clients a round asks."""
        return self.schedule.asks(cohort)

    def until(self, stands: Standing) -> float:
        """Return when to look who is late."""
        return self.schedule.until(stands)

    def late(self, stands: Standing, flight: Flight) -> str:
        """Return why a reply is waited for no longer."""
        return self.schedule.late(stands, flight)

    def given_up(self, stands: Standing, flight: Flight) -> str:
        """Return why nobody waits once a round is over."""
        return self.schedule.given_up(stands, flight)


def _apart(a: Tensors, b: Tensors) -> float:
    """Return the squared distance of two updates."""
    wide = ((a[k].astype(np.float64), b[k].astype(np.float64)) for k in b)
    return sum(float(np.square(one - other).sum()) for one, other in wide)
