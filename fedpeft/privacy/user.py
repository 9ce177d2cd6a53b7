"""DP-FedAvg: a promise to each client (McMahan et al. 2018, arXiv 1710.06963)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.errors import PlanError, SpecError
from fedpeft.privacy import _accountant
from fedpeft.privacy._mechanism import Adaptive, Mechanism
from fedpeft.spec import bounded, method
from fedpeft.types import Privacy, Sampling

_TURNS = (
    "bounds how often a client takes part, which schedule: buffered without compensation counts; "
    "use it, or leave participations out"
)
_EVEN = (
    "bounds what one client adds to a sum, so weights and their denominator must follow from the "
    "plan alone; use weighting: uniform(denominator='expected')"
)


@method
class User(Privacy):
    """Whatever a client's records are, what others see of the run is about as likely.

    Each round, updates (all that travels, as one vector) are clipped to the norm ``clip`` by the
    client and again by the server once they are decoded, added up, and Gaussian noise is added to
    the sum. Of ``epsilon`` (at ``delta``, for all rounds of the plan) and ``noise_multiplier`` one
    is given; the other follows. The server is trusted: it sees updates as they are.

    With a ``quantile`` the clip follows that of the norms (arXiv 1905.03871): each round it moves
    by ``clip_lr`` times how many more than these were within it. ``bit_noise`` is the noise on
    their number, a twentieth of the expected cohort by default; its share of the budget is taken
    out of the noise on updates.

    ``participations`` is for ``schedule: buffered``: no client is asked more often in the run. What
    one changes is then in so many rounds at most, whichever these are, and nothing is gained by
    chance.

    ``simulate_noise`` has the plan's seed decide cohorts and noise, and the ledger tell of clients:
    for experiments. Nothing is promised then.
    """

    epsilon: float | None = bounded(default=None, above=0, high=100)
    noise_multiplier: float | None = bounded(default=None, low=_accountant.LEAST_NOISE)
    delta: float = bounded(default=1e-5, above=0, below=1)
    clip: float = bounded(default=0.5, above=0)
    quantile: float | None = bounded(default=None, low=0, high=1)
    clip_lr: float = bounded(default=0.2, above=0)
    bit_noise: float | None = bounded(default=None, above=0)
    participations: int | None = bounded(default=None, low=1)
    simulate_noise: bool = False

    @property
    def needs(self) -> Mapping[str, str]:
        """What the noise on a sum covers."""
        found = {
            "linear": "adds noise to the sum of the updates, so the step must be a function of the "
            "sum; use aggregator: mean",
            "stateless": "bounds what a client adds to the update's sum, and control state has no "
            "such bound; use correction: none or fedprox",
            "even-weights": _EVEN,
            "known-sampling": "needs to know how cohorts are drawn; use cohort: poisson, uniform "
            "or everyone",
        }
        if self.participations is None:
            whole = (
                "bounds what one client changes, and where replies compete it changes whose others "
                "count; use schedule: sync without minimum and over, or user(participations=...) "
                "with buffered"
            )
            return {**found, "whole-cohorts": whole}
        there = (
            "holds where who is there depends on nobody's records; use availability: always, or "
            "rates='same' or 'independent'"
        )
        return {**found, "counts-turns": _TURNS, "there-by-chance": there}

    @property
    def refuses(self) -> Mapping[str, str]:
        """What it does not cover."""
        found = {
            "asks": "answers are neither clipped nor noised; use aggregator: mean",
            "learns-participation": "weights that follow from who took part are private; use "
            "weighting: uniform(denominator='expected')",
            "reads-single-updates": "is about the noised sum of updates, and single ones would be "
            "kept or looked into; use weighting: uniform(denominator='expected') and schedule: "
            "sync",
            "inverts-updates": "works out what a single client's records are like; use schedule: "
            "sync",
            "keeps-updates": "one update would count in every later round, and noise covers one; "
            "use weighting: uniform(denominator='expected')",
        }
        if self.participations is None:
            return found
        slow = (
            "makes those slow who hold certain records, and whose replies share a step would tell; "
            "use stragglers='drawn'"
        )
        return {**found, "slow-by-records": slow}

    def check(self) -> None:
        """Raise ``SpecError`` for fields that contradict each other."""
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise SpecError("user: give epsilon or noise_multiplier, one of the two")
        if self.quantile is None and self.bit_noise is not None:
            raise SpecError("user: bit_noise is for a clip that follows a quantile; set quantile")
        if self.quantile is not None and self.participations is not None:
            raise SpecError(
                "user: with participations updates of several versions share a sum, and their "
                "clips would differ; leave quantile out"
            )

    @property
    def bound(self) -> float:
        """``clip``."""
        return self.clip

    @property
    def secret(self) -> bool:
        """Whether it is meant."""
        return not self.simulate_noise

    def mechanism(self, sampling: Sampling, rounds: int) -> Mechanism:
        """Return the mechanism. Raises ``PlanError`` where ``epsilon`` is out of reach."""
        noise = self.noise_multiplier
        if noise is None and self.epsilon is not None:
            noise = _accountant.calibrated(sampling, self.epsilon, rounds, self.delta)
        adaptive, of = None, noise or 0.0
        if self.quantile is not None:
            bits = self.bit_noise or sampling.expected / 20
            if 2 * bits <= of:
                raise PlanError(
                    f"privacy: the count of clipped updates has the noise {bits:g}, and the whole "
                    f"noise multiplier {of:g} leaves nothing for updates; set bit_noise above "
                    f"{of / 2:.3g}, or ask more clients in a round"
                )
            adaptive = Adaptive(self.quantile, self.clip_lr, bits)
        return Mechanism(sampling, self.clip, of, self.delta, adaptive)
