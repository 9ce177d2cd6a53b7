"""Whom the server asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from fedpeft.types.basics import Population, Rng


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is known of a cohort before anybody replies: all that a weighting may look at.

    ``population`` are all clients that could be asked, ``expected`` is the expected size of a
    cohort. Replies of a ``share`` of the cohort are waited for, whichever come: what is a mean over
    the cohort is divided by as much less. ``rates`` are the probabilities that a client takes part
    in a round, in a simulation that knows them. ``learned`` is what a :class:`Learning` weighting
    has learned of each client of the cohort, before this round. ``effort`` gives
    :meth:`Summing.effort` of a client's round.
    """

    cohort: Sequence[str]
    population: Population
    expected: float
    share: float = 1.0
    rates: Mapping[str, float] = field(default_factory=dict)
    learned: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    effort: Callable[[str], float] = lambda _: 1.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a cohort is drawn from ``population`` clients: all that an accountant looks at.

    ``all`` of them; each by a coin of its own with probability ``rate`` (``coins``), and of more
    than ``size`` so many, each set as likely; or ``size`` of them, each set as likely (``fixed``).
    Or nothing is known but that the sum of a round has ``size`` replies, and that nobody's are in
    those of more than ``most`` rounds (``turns``).
    """

    kind: Literal["all", "coins", "fixed", "turns"]
    population: int
    rate: float = 1.0
    size: int | None = None
    most: int | None = None

    @property
    def expected(self) -> float:
        """The expected size of a cohort."""
        if self.kind in ("fixed", "turns") and self.size is not None:
            return float(self.size)
        if self.size is None or self.size >= self.population:
            return self.rate * self.population
        from scipy.special import betainc

        beyond = np.arange(self.size)  # the chance of more than k heads, added up over k
        return float(betainc(beyond + 1, self.population - beyond, self.rate).sum())

    @property
    def told(self) -> str:
        """How it is drawn, in words."""
        if self.kind == "all":
            return f"all {self.population} clients in every round"
        if self.kind == "turns":
            return (
                f"{self.size} replies in a round, of {self.population} clients who are each asked "
                f"at most {self.most} times; nothing is gained by chance"
            )
        if self.kind == "fixed":
            return f"{self.size} of {self.population} clients, without replacement"
        capped = "" if self.size is None else f", at most {self.size} of them"
        return f"each of {self.population} clients with probability {self.rate:g}{capped}"


@runtime_checkable
class Cohort(Protocol):
    """``cohorts/``: whom the server asks, of those whom it can reach."""

    def choose(self, names: Sequence[str], rng: Rng) -> Sequence[str]:
        """Return the clients of one round, in the order of ``names``; all where these are few."""
        ...

    def expected(self, population: float) -> float:
        """Return the expected size of a cohort where ``population`` clients can be reached.

        More than these where it asks for more than there are.
        """
        ...


@runtime_checkable
class Sampled(Protocol):
    """What a cohort has besides whose draws an accountant knows."""

    def sampling(self, population: int) -> Sampling:
        """Return how it draws from so many clients."""
        ...
