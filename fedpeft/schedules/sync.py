"""Rounds with a deadline and over-selection (Bonawitz et al. 2019, arXiv 1902.01046)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from fedpeft.spec import bounded, method
from fedpeft.types import Flight, Rng, Schedule, Standing


@method
class Sync(Schedule):
    """Each round asks a cohort and ends when all have replied, or after ``deadline`` seconds.

    ``over`` times as many are asked as the cohort has, the others drawn evenly from those that it
    leaves out; the first replies are taken, as many as the cohort has. The weights are those of all
    who are asked, and the denominator is the awaited share of theirs, so both are known before the
    first reply. Fewer replies than ``minimum`` are not used: the step is zero, as if nobody had
    replied. Whose reply is not used is in the ledger with the reason; who is asked again drops what
    it was at.
    """

    deadline: float | None = bounded(default=None, above=0)
    minimum: int = bounded(default=1, low=1)
    over: float = bounded(default=1.0, low=1)

    @property
    def offers(self) -> Mapping[str, str]:
        """Whether a reply counts for its own sake."""
        if self.over > 1 or self.minimum > 1:
            return {}
        return {"whole-cohorts": "whether a reply counts does not depend on the others"}

    @property
    def refuses(self) -> Mapping[str, str]:
        """What clients beyond the cohort do not go with."""
        if self.over == 1:
            return {}
        return {
            "learns-participation": "takes the fastest of more clients than the cohort has, and "
            "these weights divide by all clients, however many replies are taken; use over=1",
            "known-rates": "takes the fastest of more clients than the cohort has, so how likely a "
            "reply is used nobody knows; use over=1",
            "mean-over-all": "takes the replies of some of those it asks, and these weights divide "
            "by all clients; use over=1",
        }

    @property
    def hurried(self) -> bool:
        """With a deadline, or where the first replies are taken."""
        return self.deadline is not None or self.over > 1

    @property
    def least(self) -> int:
        """``minimum``."""
        return self.minimum

    def asks(self, cohort: float) -> float:
        """Return ``over`` times as many as the cohort has."""
        return cohort * self.over

    def ask(
        self,
        stands: Standing,
        free: Sequence[str],
        cohort: Callable[[Sequence[str]], Sequence[str]],
        rng: Rng,
    ) -> tuple[Sequence[str], int]:
        """Ask the cohort and more when the round begins."""
        if stands.opened:
            return [], stands.awaited
        chosen = list(cohort(free))
        its = frozenset(chosen)
        rest = [name for name in free if name not in its]
        more = min(len(rest), math.ceil(round((self.over - 1) * len(chosen), 9)))
        added = {rest[i] for i in rng.choice(len(rest), more, replace=False)} if more else set()
        asked = [name for name in free if name in its or name in added] if more else chosen
        return asked, len(chosen)

    def until(self, stands: Standing) -> float:
        """Return the deadline."""
        return math.inf if self.deadline is None else stands.began + self.deadline

    def late(self, stands: Standing, flight: Flight) -> str:
        """Tell that the deadline has passed."""
        over = stands.now >= self.until(stands)
        return f"no reply within {self.deadline:g} seconds" if over else ""

    def given_up(self, stands: Standing, flight: Flight) -> str:
        """Tell that the round is over."""
        return f"{stands.awaited} others were faster"
